"""Who takes how much: by checkpoint, by component, and what is kept for others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptcoord.codec.digest import blake3_digest
from ckptcoord.core.jsonio import parse_json
from ckptcoord.core.manifest_laws import MANIFEST_NAME
from ckptcoord.errors import CkptError, DigestMismatchError, ManifestError
from ckptcoord.plan.commit import live_folders, needed_by
from ckptcoord.repo.maintenance import MAX_MANIFEST_BYTES, survey

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptcoord.core.entries import Commit
    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.refs import CheckpointId
    from ckptcoord.plan.commit import LogState
    from ckptcoord.repo.repository import Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentUsage:
    """A component, of one checkpoint or of all live ones: its state's bytes and its files'."""

    key: str
    size_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointUsage:
    """A checkpoint whose files are there.

    Attributes:
        commit: what the log says of it; its `size_bytes` and `stored_bytes` are the sizes here.
        live: False when it was retired or replaced.
        needed_by: the live checkpoints whose deltas are against it.
        freed_bytes: what gc could delete if this one alone were retired; of a retired one, what it
            can delete now.
        components: by key; empty where the manifest cannot be read.
        unreadable: why that is so, or empty.
    """

    commit: Commit
    live: bool
    needed_by: tuple[CheckpointId, ...]
    freed_bytes: int
    components: tuple[ComponentUsage, ...] = ()
    unreadable: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """A repository's bytes.

    Attributes:
        checkpoints: the live ones by branch and step, then the retired ones by folder.
        components: all live checkpoints together, by key.
        size_bytes: of the states of the live checkpoints.
        stored_bytes: of their files.
        kept_bytes: of retired checkpoints that live ones need.
        retired_bytes: of retired checkpoints that nothing needs: gc deletes them.
        other_bytes: of unfinished saves, and of folders that no commit names.
    """

    checkpoints: tuple[CheckpointUsage, ...]
    components: tuple[ComponentUsage, ...]
    size_bytes: int
    stored_bytes: int
    kept_bytes: int
    retired_bytes: int
    other_bytes: int

    @property
    def ratio(self) -> float | None:
        """Bytes of state for each byte that is stored for it, shared and coded as it is."""
        stored_bytes = self.stored_bytes + self.kept_bytes
        return self.size_bytes / stored_bytes if stored_bytes else None


def measure(repository: Repository) -> Usage:
    """What the checkpoints of a repository take.

    Reads the log, each live checkpoint's manifest, and what else stands in the folders.

    Raises:
        CkptError: the log or the repository's folder cannot be read.
    """
    state = repository.state()
    live = [_live(repository, state, one) for _, one in sorted(state.commits.items())]
    listing = survey(repository, lambda _: None)
    others = [one for one in listing.folders if one.path not in state.retired]
    names = listing.names or frozenset()
    there = [one.commit for path, one in sorted(state.retired.items()) if path in names]
    retired = [_retired(state, commit) for commit in there]
    return Usage(
        checkpoints=(*live, *retired),
        components=_together(one.components for one in live),
        size_bytes=sum(one.commit.size_bytes for one in live),
        stored_bytes=sum(one.commit.stored_bytes for one in live),
        kept_bytes=sum(one.commit.stored_bytes - one.freed_bytes for one in retired),
        retired_bytes=sum(one.freed_bytes for one in retired),
        other_bytes=sum(one.size_bytes for one in others),
    )


def _live(repository: Repository, state: LogState, commit: Commit) -> CheckpointUsage:
    components: tuple[ComponentUsage, ...] = ()
    unreadable = ""
    try:
        components = _components(repository, commit)
    except CkptError as error:
        unreadable = error.what
    return CheckpointUsage(
        commit=commit,
        live=True,
        needed_by=needed_by(state, commit.path),
        freed_bytes=_freed_bytes(state, commit),
        components=components,
        unreadable=unreadable,
    )


def _retired(state: LogState, commit: Commit) -> CheckpointUsage:
    return CheckpointUsage(
        commit=commit,
        live=False,
        needed_by=needed_by(state, commit.path),
        freed_bytes=0 if commit.path in live_folders(state) else commit.stored_bytes,
    )


def _freed_bytes(state: LogState, commit: Commit) -> int:
    """The files that only this live checkpoint holds: its own, and retired ones that it needs."""
    retired = {path: one.commit.stored_bytes for path, one in state.retired.items()}
    sizes = {commit.path: commit.stored_bytes} | {
        path: retired[path] for path in commit.needs if path in retired
    }
    own = {commit.checkpoint_id}
    return sum(size for path, size in sizes.items() if set(needed_by(state, path)) <= own)


def _together(parts: Iterable[tuple[ComponentUsage, ...]]) -> tuple[ComponentUsage, ...]:
    sizes: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    for part in parts:
        for one in part:
            sizes[one.key] += one.size_bytes
            stored[one.key] += one.stored_bytes
    return tuple(
        ComponentUsage(key=key, size_bytes=sizes[key], stored_bytes=stored[key])
        for key in sorted(sizes)
    )


def _components(repository: Repository, commit: Commit) -> tuple[ComponentUsage, ...]:
    """The components by the manifest's plain JSON: `Repository.manifest` takes pydantic's time."""
    path = f"{commit.path}/{MANIFEST_NAME}"
    data = repository.store.read(path, limit_bytes=MAX_MANIFEST_BYTES)
    found = blake3_digest(data)
    if found != commit.manifest_digest:
        raise DigestMismatchError(path=path, expected=str(commit.manifest_digest), found=str(found))
    document = parse_json(data, path=path, max_bytes=MAX_MANIFEST_BYTES)
    components = document.get("components") if isinstance(document, dict) else None
    if not isinstance(components, dict):
        raise ManifestError(path=path, why="components: is not an object")
    return tuple(
        ComponentUsage(
            key=key,
            size_bytes=_bytes(component, "size_bytes", path),
            stored_bytes=_bytes(component, "stored_bytes", path),
        )
        for key, component in sorted(components.items())
    )


def _bytes(component: JsonValue, name: str, path: str) -> int:
    size = component.get(name) if isinstance(component, dict) else None
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ManifestError(path=path, why=f"{name}: is not a number of bytes")
    return size
