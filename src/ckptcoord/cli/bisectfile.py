"""What a bisection knows, in a file of the user's own: a shared repository holds nobody's search.

See docs/adr/0014-bisections-are-the-users.md. Each write is atomic: a kill leaves what was known
before it, or after.
"""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ckptcoord.core.fields import Fields
from ckptcoord.core.jsonio import dump_json, parse_json
from ckptcoord.core.refs import CheckpointId
from ckptcoord.errors import (
    ConfigError,
    CorruptError,
    ManifestError,
    MissingFileError,
    StorageError,
)
from ckptcoord.plan.bisection import Bisection, Verdict
from ckptcoord.repo.repository import make_folder
from ckptcoord.store.files import storage_error
from ckptcoord.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptcoord.core.jsonio import JsonValue

FORMAT_VERSION = 1
_MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A bisection that is under way, or done.

    Attributes:
        repository: its folder, absolute.
        search: what is known.
        whys: what each verdict is from, for people.
    """

    repository: str
    search: Bisection
    whys: Mapping[CheckpointId, str]

    def mark(self, one: CheckpointId, verdict: Verdict, why: str) -> Self:
        """With one more verdict.

        Raises:
            ConfigError: it contradicts what is known.
        """
        whys = {**self.whys, one: why}
        return replace(self, search=self.search.mark(one, verdict), whys=whys)

    def to_bytes(self) -> bytes:
        """The file's content."""
        verdicts: list[JsonValue] = [
            {"checkpoint_id": str(one), "verdict": verdict.value, "why": self.whys.get(one, "")}
            for one, verdict in self.search.verdicts.items()
        ]
        return dump_json(
            {
                "format_version": FORMAT_VERSION,
                "repository": self.repository,
                "line": [str(one) for one in self.search.line],
                "verdicts": verdicts,
            },
            indent=2,
        )

    @classmethod
    def parse(cls, data: bytes, *, path: str) -> Self:
        """Read the file.

        Raises:
            ManifestError: it is no such file.
        """
        with Fields(parse_json(data, path=path, max_bytes=_MAX_BYTES), path=path) as fields:
            if fields.integer("format_version") != FORMAT_VERSION:
                raise ConfigError(field="format_version", why="is unknown")
            line = tuple(map(CheckpointId.parse, fields.texts("line")))
            verdicts, whys = {}, {}
            for item in fields.items("verdicts"):
                with Fields(item, path=path) as one:
                    checkpoint_id = CheckpointId.parse(one.text("checkpoint_id"))
                    verdicts[checkpoint_id] = verdict_of("verdict", one.text("verdict"))
                    whys[checkpoint_id] = one.text("why")
            search = Bisection(line=line, verdicts=verdicts)
            return cls(repository=fields.text("repository"), search=search, whys=whys)


class SessionFile:
    """Where a session is kept.

    Args:
        root: the repository.
        given: the file; None: one for this user and this repository.

    Attributes:
        repository: its folder, absolute.
        path: of the file.
        is_given: somebody has named the file, which may be anything.

    Raises:
        ConfigError: there is no home folder to keep it in.
    """

    def __init__(self, root: Path, given: str | None) -> None:
        # Of a name that is no text, what can be written down.
        self.repository = os.fsencode(root.resolve()).decode(errors="backslashreplace")
        self.is_given = given is not None
        path = _own(self.repository) if given is None else Path(given)
        if path.name in ("", "..") or "\0" in str(path):
            raise ConfigError(field="--state", why=f"{given!r} is no file's name")
        self.path = str(path)
        self._name, self._folder = path.name, path.parent

    def read(self) -> Session | None:
        """What is there.

        Raises:
            ManifestError: it is damaged, or of another repository.
            UnsafePathError: it is no plain file.
            StorageError: it cannot be read.
        """
        try:
            with LocalStore(self._folder) as store:
                data = store.read(self._name, limit_bytes=_MAX_BYTES)
            session = Session.parse(data, path=self.path)
        except MissingFileError:
            return None
        except CorruptError as error:
            raise self._unfit(error.why) from error
        except StorageError as error:
            if error.errno == errno.ENOENT:  # nor is the folder there
                return None
            raise
        if session.repository != self.repository:
            raise self._unfit(f"is of the repository {session.repository}")
        return session

    def _unfit(self, why: str) -> ManifestError:
        """No bisection here: what of our own is damaged can go, what somebody named may be else."""
        way = "Give another file with --state"
        if not self.is_given:
            way = "`ckptcoord bisect reset` forgets it; then begin again"
        return ManifestError(path=self.path, why=why, help=way)

    def write(self, session: Session) -> None:
        """Keep it.

        Raises:
            OutputDirError, StorageError: it cannot be.
        """
        with make_folder(self._folder) as store:
            store.put(self._name, session.to_bytes())

    def delete(self) -> None:
        """Forget it; nothing but a file is ever removed.

        Raises:
            StorageError: it cannot be.
        """
        try:
            (self._folder / self._name).unlink(missing_ok=True)
        except OSError as error:
            raise storage_error("delete", self.path, error) from error


def _own(repository: str) -> Path:
    """https://specifications.freedesktop.org/basedir: state of a user, one file a repository."""
    name = hashlib.blake2b(os.fsencode(repository), digest_size=16).hexdigest()
    given = os.environ.get("XDG_STATE_HOME", "")
    try:
        base = Path(given) if Path(given).is_absolute() else Path.home() / ".local/state"
    except RuntimeError as error:
        raise ConfigError(
            field="bisect",
            why="there is no home folder to keep the search in",
            help="Name a file with --state",
        ) from error
    return base / "ckptcoord/bisect" / f"{name}.json"


def verdict_of(field: str, text: str) -> Verdict:
    """The verdict of that name.

    Raises:
        ConfigError: there is none.
    """
    if text not in list(Verdict):
        why = f"is {text[:40]!r}, not {', '.join(Verdict)}"
        raise ConfigError(field=field, why=why)
    return Verdict(text)
