"""Who takes how much: by checkpoint, by component, and what is kept for others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ckptcoord.core.manifest_fields import TENSOR_KINDS, FileKind
from ckptcoord.errors import CkptError
from ckptcoord.plan.commit import folder_users, live_folders, needed_by
from ckptcoord.repo.maintenance import survey
from ckptcoord.repo.plain import component_sizes, plain_manifest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ckptcoord.core.entries import Commit
    from ckptcoord.core.plainmanifest import PlainFile
    from ckptcoord.core.refs import CheckpointId
    from ckptcoord.plan.commit import LogState
    from ckptcoord.repo.repository import Repository

    _Users: TypeAlias = dict[str, tuple[CheckpointId, ...]]

_OTHER = "other"
_NAMED_ONLY = frozenset({"same", "cast"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentUsage:
    """A component, of one checkpoint or of all live ones: its state's bytes and its files'."""

    key: str
    size_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecUsage:
    """What is stored in one way, in one checkpoint or in all live ones.

    Attributes:
        codec: `plain`, or how a delta file makes its tensors: `coded`, `update`, `same`, `cast`;
            `other` is what is no tensor: headers, documents.
        tensors: how many.
        size_bytes: of these tensors' state.
        stored_bytes: in the files; none for what is only named.
    """

    codec: str
    tensors: int
    size_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Savings:
    """Why tensors take less than their state: two ratios whose product is that of both.

    Attributes:
        deduped_bytes: of tensors that are not stored: equal ones are there, or a wider one that
            they are the cast of; or a threshold has left them as they were.
        held_bytes: of the others, as state.
        stored_bytes: of those in the files, without headers.
    """

    deduped_bytes: int
    held_bytes: int
    stored_bytes: int

    @property
    def dedup_ratio(self) -> float | None:
        """Bytes of tensors for each byte of those that are stored."""
        both = self.deduped_bytes + self.held_bytes
        return both / self.held_bytes if self.held_bytes else None

    @property
    def compression_ratio(self) -> float | None:
        """Bytes of the tensors that are stored for each byte that they take."""
        return self.held_bytes / self.stored_bytes if self.stored_bytes else None


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
        codecs: of a live one, where they were asked for and its headers can be read; their stored
            bytes are together those of the checkpoint.
        unreadable: why that is so, or empty.
    """

    commit: Commit
    live: bool
    needed_by: tuple[CheckpointId, ...]
    freed_bytes: int
    components: tuple[ComponentUsage, ...] = ()
    codecs: tuple[CodecUsage, ...] = ()
    unreadable: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """A repository's bytes.

    Attributes:
        checkpoints: the live ones by branch and step, then the retired ones by folder.
        components: all live checkpoints together, by key.
        codecs: the same by codec, where that was asked for.
        size_bytes: of the states of the live checkpoints.
        stored_bytes: of their files.
        kept_bytes: of retired checkpoints that live ones need.
        retired_bytes: of retired checkpoints that nothing needs: gc deletes them.
        other_bytes: of unfinished saves, and of folders that no commit names.
    """

    checkpoints: tuple[CheckpointUsage, ...]
    components: tuple[ComponentUsage, ...]
    codecs: tuple[CodecUsage, ...]
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


def savings(codecs: Iterable[CodecUsage]) -> Savings:
    """What was saved on these, by dedup and by compression."""
    tensors = [one for one in codecs if one.codec != _OTHER]
    coded = [one for one in tensors if one.codec not in _NAMED_ONLY]
    return Savings(
        deduped_bytes=sum(one.size_bytes for one in tensors if one.codec in _NAMED_ONLY),
        held_bytes=sum(one.size_bytes for one in coded),
        stored_bytes=sum(one.stored_bytes for one in coded),
    )


def measure(repository: Repository, *, codecs: bool = False) -> Usage:
    """What the checkpoints of a repository take.

    Reads the log, each live checkpoint's manifest, and what else stands in the folders; for the
    codecs the header of each file of tensors, too.

    Raises:
        CkptError: the log or the repository's folder cannot be read.
    """
    state = repository.state()
    users = folder_users(state)
    live = [
        _live(repository, state, one, users, codecs=codecs)
        for _, one in sorted(state.commits.items())
    ]
    listing = survey(repository, lambda _: None, state)
    others = [one for one in listing.folders if one.path not in state.retired]
    names = listing.names or frozenset()
    there = [one.commit for path, one in sorted(state.retired.items()) if path in names]
    retired = [_retired(state, commit) for commit in there]
    return Usage(
        checkpoints=(*live, *retired),
        components=_together(one.components for one in live),
        codecs=_by_codec(codec for one in live for codec in one.codecs),
        size_bytes=sum(one.commit.size_bytes for one in live),
        stored_bytes=sum(one.commit.stored_bytes for one in live),
        kept_bytes=sum(one.commit.stored_bytes - one.freed_bytes for one in retired),
        retired_bytes=sum(one.freed_bytes for one in retired),
        other_bytes=sum(one.size_bytes for one in others),
    )


def _live(
    repository: Repository, state: LogState, commit: Commit, users: _Users, *, codecs: bool
) -> CheckpointUsage:
    components: tuple[ComponentUsage, ...] = ()
    found: tuple[CodecUsage, ...] = ()
    unreadable = ""
    try:
        components = _components(repository, commit)
        if codecs:
            found = _codecs(repository, commit)
    except CkptError as error:
        unreadable = error.what
    return CheckpointUsage(
        commit=commit,
        live=True,
        needed_by=users.get(commit.path, ()),
        freed_bytes=_freed_bytes(state, commit, users),
        components=components,
        codecs=found,
        unreadable=unreadable,
    )


def _retired(state: LogState, commit: Commit) -> CheckpointUsage:
    return CheckpointUsage(
        commit=commit,
        live=False,
        needed_by=needed_by(state, commit.path),
        freed_bytes=0 if commit.path in live_folders(state) else commit.stored_bytes,
    )


def _freed_bytes(state: LogState, commit: Commit, users: _Users) -> int:
    """The files that only this live checkpoint holds: its own, and retired ones that it needs."""
    sizes = {commit.path: commit.stored_bytes} | {
        path: state.retired[path].commit.stored_bytes
        for path in commit.needs
        if path in state.retired
    }
    own = {commit.checkpoint_id}
    return sum(size for path, size in sizes.items() if own.issuperset(users.get(path, ())))


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


def _by_codec(parts: Iterable[CodecUsage]) -> tuple[CodecUsage, ...]:
    """One of each codec, sorted."""
    found: dict[str, list[CodecUsage]] = {}
    for part in parts:
        found.setdefault(part.codec, []).append(part)
    return tuple(
        CodecUsage(
            codec=codec,
            tensors=sum(one.tensors for one in found[codec]),
            size_bytes=sum(one.size_bytes for one in found[codec]),
            stored_bytes=sum(one.stored_bytes for one in found[codec]),
        )
        for codec in sorted(found)
    )


def _codecs(repository: Repository, commit: Commit) -> tuple[CodecUsage, ...]:
    files = plain_manifest(repository, commit).files
    return _by_codec(part for file in files for part in _codecs_of(repository, commit, file))


def _codecs_of(repository: Repository, commit: Commit, record: PlainFile) -> Iterator[CodecUsage]:
    """The tensors of a file, by its header, and what else is in it."""
    other = record.size_bytes
    for codec, size_bytes, stored_bytes in _tensors(repository, commit, record):
        other -= stored_bytes
        yield CodecUsage(codec=codec, tensors=1, size_bytes=size_bytes, stored_bytes=stored_bytes)
    yield CodecUsage(codec=_OTHER, tensors=0, size_bytes=0, stored_bytes=other)


def _tensors(
    repository: Repository, commit: Commit, record: PlainFile
) -> Iterator[tuple[str, int, int]]:
    """Of each tensor of a file: its codec, its bytes and those that are stored."""
    if record.kind not in TENSOR_KINDS:
        return
    from ckptcoord.repo.readers import ShardReader  # late: only codecs ask for headers

    path = f"{commit.path}/{record.path}"
    with ShardReader(
        repository.store, path, expected=record.digest, size_bytes=record.size_bytes
    ) as shard:
        header = shard.header
    if record.kind is not FileKind.DELTA:
        for entry in header.entries:
            yield "plain", entry.spec.nbytes, entry.spec.nbytes
        return
    from ckptcoord.codec.recipe import DELTA_KEY, parse_recipes  # late: numpy

    recipes = parse_recipes(header.metadata.get(DELTA_KEY, ""), header, path=path)
    for recipe in recipes.values():
        yield recipe.how.value, recipe.spec.nbytes, sum(recipe.parts)


def _components(repository: Repository, commit: Commit) -> tuple[ComponentUsage, ...]:
    return tuple(
        ComponentUsage(key=key, size_bytes=size_bytes, stored_bytes=stored_bytes)
        for key, size_bytes, stored_bytes in component_sizes(repository, commit)
    )
