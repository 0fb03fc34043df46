"""What stands in `.ckptcoord/repo.yaml` and `.ckptcoord/workspace.yaml`: the one place to read it.

Both are written once and then belong to whoever edits them, so a mistake in them is named by file
and field, and nothing in them is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ckptcoord.core.context import check_autocommit, check_branch
from ckptcoord.errors import (
    CkptError,
    ConfigError,
    FormatVersionError,
    ManifestError,
    MissingFileError,
)
from ckptcoord.plan.retention import KEEP_ALL, Retention
from ckptcoord.redact import redact_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from ckptcoord.store.base import Store

_T = TypeVar("_T")
MARKER = ".ckptcoord"
CONFIG_PATH = f"{MARKER}/repo.yaml"
WORKSPACE_PATH = f"{MARKER}/workspace.yaml"
FORMAT_VERSION = 1
MAX_CONFIG_BYTES = 64 << 10
MAX_DESCRIPTION = 2_000
_PLAIN = f"format_version: {FORMAT_VERSION}\n".encode()
_VERSION = "format_version"
_MEND = "Mend the file; what can stand in it is in docs/format.md"


def has_marker(folder: Path, marker: str) -> bool:
    """Whether a folder holds a marker, as far as this process can see."""
    try:
        return (folder / marker).is_file()
    except (OSError, ValueError):  # no access, or no name that a file can have
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkspaceConfig:
    """`workspace.yaml`.

    Attributes:
        description: for people, one line.

    Raises:
        ConfigError: a value makes no sense.
    """

    description: str = ""

    def __post_init__(self) -> None:
        _check_description(self.description)

    @classmethod
    def parse(cls, data: bytes, *, path: str) -> Self:
        """What `to_bytes` or a person wrote.

        Raises:
            ConfigError: it is no such file; names `path` and the field.
            FormatVersionError: a newer ckptcoord wrote it.
        """
        settings = _settings(data, path)
        return _build(cls, {"description": _text}, settings, path)

    def to_bytes(self) -> bytes:
        """As it stands in the file."""
        return _dump({"description": self.description})


@dataclass(frozen=True, slots=True, kw_only=True)
class RepoConfig:
    """`repo.yaml`.

    Attributes:
        description: for people, one line.
        branch: that runs save to where nobody says otherwise.
        autocommit: steps from one commit to the next likewise; 0: none by itself.
        retention: which checkpoints are kept.

    Raises:
        ConfigError: a value makes no sense.
    """

    description: str = ""
    branch: str | None = None
    autocommit: int | None = None
    retention: Retention = KEEP_ALL

    def __post_init__(self) -> None:
        _check_description(self.description)
        if self.branch is not None:
            _text(self.branch, "branch")
            check_branch(self.branch)
        if self.autocommit is not None:
            check_autocommit(self.autocommit, field="autocommit")

    @classmethod
    def parse(cls, data: bytes, *, path: str) -> Self:
        """What `to_bytes` or a person wrote.

        Raises:
            ConfigError: it is no such file; names `path` and the field.
            FormatVersionError: a newer ckptcoord wrote it.
        """
        if data == _PLAIN:
            return cls()
        readers = {
            "description": _text,
            "branch": _text,
            "autocommit": _as_it_is,
            "retention": _retention,
        }
        return _build(cls, readers, _settings(data, path), path)

    def to_bytes(self) -> bytes:
        """As it stands in the file."""
        rules = {
            field.name: getattr(self.retention, field.name)
            for field in fields(Retention)
            if getattr(self.retention, field.name) is not None
        }
        if "keep_for_s" in rules:
            rules["keep_for"] = rules.pop("keep_for_s")
        if "mode" in rules:
            rules["mode"] = str(rules["mode"])
        settings = {
            "description": self.description,
            "branch": self.branch,
            "autocommit": self.autocommit,
            "retention": rules,
        }
        return _dump(settings)


def read_config(store: Store) -> RepoConfig:
    """The settings of the repository on a store.

    Raises:
        MissingFileError: there is no repository.
        ManifestError: its marker is malformed.
        FormatVersionError: a newer ckptcoord wrote it.
    """
    path = f"{store.url}/{CONFIG_PATH}"
    data = store.read(CONFIG_PATH, limit_bytes=MAX_CONFIG_BYTES)
    try:
        return RepoConfig.parse(data, path=path)
    except ConfigError as error:
        why = error.what.removeprefix(f"{path}: ")
        raise ManifestError(path=path, why=why, help=error.help or _MEND) from error


def read_workspace_config(store: Store) -> WorkspaceConfig | None:
    """The settings of the workspace on a store; None where there is none.

    Raises:
        ConfigError: its marker is malformed.
        FormatVersionError: a newer ckptcoord wrote it.
    """
    try:
        data = store.read(WORKSPACE_PATH, limit_bytes=MAX_CONFIG_BYTES)
    except MissingFileError:
        return None
    return WorkspaceConfig.parse(data, path=f"{store.url}/{WORKSPACE_PATH}")


# --- from bytes ----------------------------------------------------------------------------------


def _settings(data: bytes, path: str) -> dict[object, object]:
    """The mapping in a YAML file that nobody vouches for, its version checked and taken out."""
    import yaml  # late: nobody but people who edit the file needs it

    try:
        _refuse_anchors(yaml.scan(data, Loader=yaml.SafeLoader), path)
        _refuse_twice(yaml.compose(data, Loader=yaml.SafeLoader), path)
        settings = yaml.safe_load(data)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: a date that is none, or a number with too many digits.
        raise ConfigError(field=path, why="is no YAML", help=_MEND) from error
    version = settings.pop(_VERSION, None) if isinstance(settings, dict) else None
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ConfigError(field=f"{path}: {_VERSION}", why=f"is {ascii(version)[:80]}")
    if version > FORMAT_VERSION:
        raise FormatVersionError(path=path, found=version, supported=FORMAT_VERSION)
    assert isinstance(settings, dict)  # or it would have no version
    return settings


def _refuse_anchors(tokens: Iterable[object], path: str) -> None:
    """With them, a few lines could mean gigabytes."""
    if any(type(token).__name__ in ("AnchorToken", "AliasToken") for token in tokens):
        raise ConfigError(field=path, why="has YAML anchors or aliases")


def _refuse_twice(node: Any, path: str) -> None:  # noqa: ANN401 (yaml has no types)
    """YAML would take the last of two values of one key."""
    children = node.value if node is not None and isinstance(node.value, list) else []
    seen: set[str] = set()
    for child in children:
        key, value = child if isinstance(child, tuple) else (None, child)
        if key is not None and isinstance(key.value, str):
            if key.value in seen:
                raise ConfigError(field=path, why=f"has {ascii(key.value)[:80]} twice")
            seen.add(key.value)
        _refuse_twice(value, path)


def _build(
    cls: type[_T],
    readers: Mapping[str, Callable[[object, str], object]],
    settings: dict[object, object],
    path: str,
) -> _T:
    """The values of a file, each read as its field wants it; what is empty is not given."""
    unknown = settings.keys() - readers.keys()
    if unknown:
        name = ascii(min(unknown, key=str))[:80]
        raise ConfigError(
            field=path, why=f"has the unknown setting {name}", help=f"Known: {', '.join(readers)}"
        )
    try:
        return cls(
            **{
                str(name): readers[str(name)](value, str(name))
                for name, value in settings.items()
                if value is not None
            }
        )
    except ValueError as error:  # ConfigError and InvalidNameError are
        what = error.what if isinstance(error, CkptError) else str(error)
        help_ = (error.help if isinstance(error, CkptError) else "") or _MEND
        raise ConfigError(field=path, why=what, help=help_) from error


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(field=name, why=f"is {ascii(value)[:40]}, not text")
    return value


def _as_it_is(value: object, _: str) -> object:
    return value


def _retention(value: object, _: str) -> Retention:
    return Retention.from_settings(value)


def _check_description(text: str) -> None:
    _text(text, "description")
    if len(text) > MAX_DESCRIPTION or (text and not text.isprintable()):
        why = f"is longer than {MAX_DESCRIPTION} characters, or has a line break or the like"
        raise ConfigError(field="description", why=why)


# --- to bytes ------------------------------------------------------------------------------------


def _dump(settings: Mapping[str, object]) -> bytes:
    """YAML of what says anything; tokens in it are masked."""
    said = {name: value for name, value in settings.items() if value not in (None, "", {})}
    if not said:
        return _PLAIN
    import yaml  # late: see above

    document = {_VERSION: FORMAT_VERSION, **redact_all(said)}
    text: str = yaml.safe_dump(document, sort_keys=False, width=1 << 20)
    return text.encode()
