"""What is kept between commands: the token, in the OS keyring or a file, and facts about it.

The folder is `ckptcoord` in XDG_CONFIG_HOME (by default ~/.config), 0700. `auth.json` in it says
who logged in where, without the token; `token` holds the token where no keyring can. Both are 0600
from their creation, and replaced in one step.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ckptcoord.cli.bearer import Endpoint, Token
from ckptcoord.cli.deadlines import within
from ckptcoord.core.fields import Fields
from ckptcoord.core.jsonio import dump_json, parse_json
from ckptcoord.errors import (
    ConfigError,
    CorruptError,
    LoginError,
    MissingFileError,
    StorageError,
    UnsafePathError,
)
from ckptcoord.store.files import storage_errors
from ckptcoord.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

FACTS = "auth.json"
TOKEN = "token"
KEYRING = "keyring"
FILE = "file"

_SERVICE, _USER = "ckptcoord", "login"
# A person may have to unlock the keyring first.
_KEYRING_TIMEOUT_S = 60.0
_VERSION = 1
_MAX_FACTS_BYTES = 16 << 10
_MAX_TOKEN_BYTES = 8 << 10
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_AGAIN = "Run `ckptcoord logout`, then log in again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Who logged in where; all but the token.

    Attributes:
        user: as the server named them.
        url: where the token was checked.
        verified_at: when, UTC, ISO 8601.
        salt: 32 hex digits.
        fingerprint: 8 hex digits that only this token and salt give.
        kept_in: `keyring` or `file`.
    """

    user: str
    url: str
    verified_at: str
    salt: str
    fingerprint: str
    kept_in: str

    def __post_init__(self) -> None:
        Endpoint(self.url)
        if self.kept_in not in (KEYRING, FILE):
            raise ConfigError(field="kept_in", why=f"is neither {KEYRING!r} nor {FILE!r}")

    def is_of(self, token: Token) -> bool:
        """Whether it is the token that was checked."""
        return secrets.compare_digest(fingerprint_of(token, self.salt), self.fingerprint)

    def to_bytes(self) -> bytes:
        """What `from_bytes` takes."""
        facts = {name: getattr(self, name) for name in self.__slots__}
        return dump_json({"version": _VERSION, **facts}, indent=2)

    @classmethod
    def from_bytes(cls, data: bytes, *, path: str) -> Self:
        """Read it back; a breach of the format is a ManifestError that names `path`."""
        with Fields(parse_json(data, path=path), path=path) as fields:
            if fields.integer("version") != _VERSION:
                raise ConfigError(field="version", why=f"is not {_VERSION}")
            return cls(**{name: fields.text(name) for name in cls.__slots__})


def fingerprint_of(token: Token, salt: str) -> str:
    """8 hex digits; slow to make, so that they do not help to guess the token."""
    digest = hashlib.pbkdf2_hmac("sha256", token.text.encode(), salt.encode(), 50_000, dklen=4)
    return digest.hex()


class Vault:
    """The folder and the keyring.

    Args:
        folder: made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self:
        """The one of the user whose environment it is.

        Raises:
            LoginError: there is no home directory.
        """
        home = environ.get("XDG_CONFIG_HOME", "")
        try:
            # The specification has relative paths ignored.
            base = Path(home) if home.startswith("/") else Path.home() / ".config"
        except RuntimeError as error:
            help_ = "Set HOME or XDG_CONFIG_HOME"
            raise LoginError(where="login", why="no home directory", help=help_) from error
        return cls(base / "ckptcoord")

    def prepare(self) -> None:
        """Make the folder, or see that it is the user's own and closed to others.

        Raises:
            LoginError: it is another user's.
            StorageError: it cannot be made.
        """
        with LocalStore(self.folder, create=True):
            found = self.folder.stat()
            if found.st_uid != os.geteuid():
                why = f"belongs to user {found.st_uid}"
                raise LoginError(where=str(self.folder), why=why, help="Set XDG_CONFIG_HOME")
            if found.st_mode & _OTHERS:
                self.folder.chmod(stat.S_IRWXU)

    def keep(self, token: Token) -> tuple[str, str]:
        """Put the token where it is safest: the place, and why it is not the keyring.

        Raises:
            StorageError: the file cannot be written.
        """
        why = _in_keyring(lambda keyring: _put(keyring, token))
        if not why:
            self._remove(TOKEN)
            return KEYRING, ""
        self._write(TOKEN, token.text.encode() + b"\n")
        return FILE, why

    def token(self, session: Session) -> Token:
        """The token of this session.

        Raises:
            LoginError: it is gone, cannot be read, or is another one.
        """
        found = self._from_file() if session.kept_in == FILE else self._from_keyring()
        try:
            token = Token(found.strip())
        except ConfigError as error:
            raise LoginError(where=session.kept_in, why=error.why, help=_AGAIN) from error
        if not session.is_of(token):
            why = "the token that is kept is not the one that was checked"
            raise LoginError(where=session.kept_in, why=why, help=_AGAIN)
        return token

    def remember(self, session: Session) -> None:
        """Write the facts.

        Raises:
            StorageError: they cannot be written.
        """
        self._write(FACTS, session.to_bytes())

    def session(self) -> Session | None:
        """The facts; None where nobody is logged in.

        Raises:
            LoginError: they cannot be read.
        """
        data = self._read(FACTS, _MAX_FACTS_BYTES)
        if data is None:
            return None
        path = str(self.folder / FACTS)
        try:
            return Session.from_bytes(data, path=path)
        except CorruptError as error:
            raise LoginError(where=path, why=error.why, help=_AGAIN) from error

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        with self._opened() as store:
            return store is not None and store.exists(name)

    def leave_keyring(self) -> str:
        """Remove the token from the keyring; says why it may still be there."""
        return _in_keyring(_delete)

    def remove_files(self) -> None:
        """Remove token and facts, the token first.

        Raises:
            StorageError: one cannot be removed.
        """
        self._remove(TOKEN)
        self._remove(FACTS)

    def _from_file(self) -> str:
        path = self.folder / TOKEN
        data = self._read(TOKEN, _MAX_TOKEN_BYTES)
        if data is None:
            raise LoginError(where=str(path), why="the token is gone", help=_AGAIN)
        with storage_errors("stat", str(path)):
            mode = path.stat(follow_symlinks=False).st_mode
        if mode & _OTHERS:
            help_ = "If nobody can have read it, chmod 600; else make a new token and log in"
            raise LoginError(where=str(path), why="others may read this file", help=help_)
        return data.decode("ascii", "replace")

    def _from_keyring(self) -> str:
        found: list[object] = []
        why = _in_keyring(lambda keyring: found.append(keyring.get_password(_SERVICE, _USER)))
        if why:
            raise LoginError(where=KEYRING, why=why, help="Unlock it, or log in again")
        if not isinstance(found[0], str):
            raise LoginError(where=KEYRING, why="the token is gone", help=_AGAIN)
        return found[0]

    def _read(self, name: str, limit_bytes: int) -> bytes | None:
        try:
            with self._opened() as store:
                return None if store is None else store.read(name, limit_bytes=limit_bytes)
        except MissingFileError:
            return None
        except (CorruptError, UnsafePathError) as error:
            path = str(self.folder / name)
            raise LoginError(where=path, why=error.why, help=_AGAIN) from error

    def _write(self, name: str, data: bytes) -> None:
        self.prepare()
        with self._opened() as store:
            if store is not None:
                store.put(name, data)

    def _remove(self, name: str) -> None:
        with self._opened() as store:
            if store is not None:
                store.remove_tree(name)

    @contextmanager
    def _opened(self) -> Iterator[LocalStore | None]:
        """The folder, if it is there; errors name all of a path."""
        try:
            store = LocalStore(self.folder)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                yield None
                return
            raise
        try:
            with store:
                yield store
        except StorageError as error:
            path = str(self.folder / error.path)
            raise type(error)(
                operation=error.operation, path=path, why=error.why, errno=error.errno
            ) from error


def _put(keyring: Any, token: Token) -> None:  # noqa: ANN401 (a back end of keyring's)
    keyring.set_password(_SERVICE, _USER, token.text)
    if keyring.get_password(_SERVICE, _USER) != token.text:
        raise LoginError(where=KEYRING, why="it did not give back what it was given")


def _delete(keyring: Any) -> None:  # noqa: ANN401 (a back end of keyring's)
    if keyring.get_password(_SERVICE, _USER) is not None:
        keyring.delete_password(_SERVICE, _USER)


def _in_keyring(work: Callable[[Any], object]) -> str:
    """Do this with the keyring's back end; returns why that was not possible."""
    try:
        within(_KEYRING_TIMEOUT_S, lambda: work(_back_end()))
    except TimeoutError:
        return f"it has not answered for {_KEYRING_TIMEOUT_S:.0f} s"
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed: pip install 'ckptcoord[login]'"
    except Exception as error:  # noqa: BLE001 (back ends raise anything; the caller says it)
        return str(error) or type(error).__name__
    return ""


def _back_end() -> Any:  # noqa: ANN401 (keyring is an extra)
    keyring = import_module("keyring")
    back_end = keyring.get_keyring()
    # keyring's own rule for what is recommended: less is plain files, or keeps nothing at all.
    if back_end.priority < 1:
        raise LoginError(where=KEYRING, why="no safe back end was found on this machine")
    return back_end
