"""One run on a store: its log, its checkpoints, and the way from a ref to verified bytes."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ckptcoord.codec.digest import blake3_digest
from ckptcoord.core.entries import Claim, Commit, Fork, Tag
from ckptcoord.core.manifest_fields import MANIFEST_NAME, MAX_MANIFEST_BYTES
from ckptcoord.core.refs import (
    BranchName,
    CheckpointId,
    PathRef,
    Ref,
    TagName,
    is_checkpoint_folder,
    parse_ref,
)
from ckptcoord.errors import (
    DigestMismatchError,
    ManifestError,
    MissingFileError,
    OutputDirError,
    RefNotFoundError,
    RepositoryNotFoundError,
    StorageError,
    UnsafePathError,
)
from ckptcoord.plan.commit import STAGING, LogState, live_folders, nearest, resolve
from ckptcoord.plan.retention import KEEP_ALL, Retention
from ckptcoord.repo.log import Log
from ckptcoord.repo.settings import CONFIG_PATH, MARKER, RepoConfig, has_marker, read_config
from ckptcoord.store.local import LocalStore
from ckptcoord.store.paced import PacedStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptcoord.core.digest import Digest
    from ckptcoord.core.manifest import CheckpointManifest, FileRecord
    from ckptcoord.core.plainmanifest import PlainFile
    from ckptcoord.repo.readers import TensorReader
    from ckptcoord.store.base import Store

_MAX_DOCUMENT_BYTES = 1 << 30
_DEFAULTS = RepoConfig()


class Repository:
    """Checkpoints of one run.

    Args:
        store: where it lives.
        clock: stamps log entries.
        retention: the rules in its settings; without them, all checkpoints stay.
    """

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], datetime],
        retention: Retention = KEEP_ALL,
    ) -> None:
        self.store = store
        self.log = Log(store, clock=clock)
        self.retention = retention

    @property
    def url(self) -> str:
        """Where it is."""
        return self.store.url

    def state(self) -> LogState:
        """What the log says now (INV-3)."""
        return self.log.refresh()

    def resolve(self, ref: str | Ref) -> Commit:
        """The commit that a ref names.

        Raises:
            RefNotFoundError: there is none; the nearest are named.
            InvalidNameError: the text is no ref.
        """
        parsed = parse_ref(ref) if isinstance(ref, str) else ref
        if isinstance(parsed, PathRef):
            parsed = self._folder_of(parsed)
        return resolve(self.state(), parsed)

    def is_dropped(self, commit: Commit) -> bool:
        """Whether a checkpoint was retired or replaced since, so that its files may be gone."""
        return commit.path not in live_folders(self.state())

    def manifest(self, commit: Commit) -> CheckpointManifest:
        """The manifest of a commit, checked against the digest in the log.

        Raises:
            CorruptError: missing, changed or malformed.
        """
        manifest = self.manifest_in(commit.path, commit.manifest_digest)
        path = f"{commit.path}/{MANIFEST_NAME}"
        if manifest.checkpoint_id != str(commit.checkpoint_id):
            raise ManifestError(
                path=path,
                why=f"is of {manifest.checkpoint_id}, and the log names it {commit.checkpoint_id}",
            )
        return manifest

    def manifest_in(self, folder: str, digest: Digest) -> CheckpointManifest:
        """The manifest in a checkpoint's folder, checked against its digest; committed or not.

        Raises:
            CorruptError: missing, changed or malformed.
        """
        # Late: pydantic takes a tenth of a second, and `ckptcoord log` reads no manifest.
        from ckptcoord.core.manifest import CheckpointManifest

        path = f"{folder}/{MANIFEST_NAME}"
        data = self.store.read(path, limit_bytes=MAX_MANIFEST_BYTES)
        found = blake3_digest(data)
        if found != digest:
            raise DigestMismatchError(path=path, expected=str(digest), found=str(found))
        return CheckpointManifest.parse(data, path=path)

    def open_shard(self, commit: Commit, record: FileRecord | PlainFile) -> TensorReader:
        """Open a file of tensors, whole ones or deltas, its header checked against the manifest."""
        path = f"{commit.path}/{record.path}"
        digest, size_bytes = record.digest, record.size_bytes
        if record.kind.value != "delta":
            from ckptcoord.repo.readers import ShardReader  # late: few commands need it

            return ShardReader(self.store, path, expected=digest, size_bytes=size_bytes)
        from ckptcoord.repo.deltas import open_tensors  # late: numpy, which few commands need

        return open_tensors(self.store, path, expected=digest, size_bytes=size_bytes)

    def read_document(self, commit: Commit, record: FileRecord | PlainFile) -> bytes:
        """A state document or index, checked against the manifest."""
        path = f"{commit.path}/{record.path}"
        data = self.store.read(path, limit_bytes=min(record.size_bytes, _MAX_DOCUMENT_BYTES))
        found = blake3_digest(data)
        if found != record.digest:
            raise DigestMismatchError(path=path, expected=str(record.digest), found=str(found))
        return data

    def claim(self, branch: BranchName, *, writer: str, world_size: int, host: str) -> int:
        """Take a branch for a writer; returns the claim's epoch (INV-2)."""
        epochs: list[int] = []

        def make(state: LogState) -> Claim:
            last = state.claims.get(branch)
            epochs.append(last.epoch + 1 if last else 1)
            return Claim(
                writer=writer, branch=branch, epoch=epochs[-1], host=host, world_size=world_size
            )

        self.log.append(make)
        return epochs[-1]

    def tag(self, name: TagName, target: CheckpointId, *, writer: str) -> None:
        """Set or move a tag.

        Raises:
            RefNotFoundError: there is no such checkpoint.
        """
        self.log.append(lambda _: Tag(writer=writer, name=name, target=target))

    def fork(self, branch: BranchName, source: CheckpointId, *, writer: str) -> None:
        """Begin a branch at a checkpoint.

        Raises:
            BranchExistsError: the branch is there already, be it by a claim alone.
            RefNotFoundError: there is no such checkpoint.
        """
        self.log.append(lambda _: Fork(writer=writer, branch=branch, source=source))

    def settle(
        self, checkpoint_id: CheckpointId, attempt: str, *, suspect: str, fence: Claim
    ) -> str | None:
        """What became of an attempt whose writer, `suspect`, fell silent.

        Its folder, if it was committed. Otherwise None, and from here on it cannot be: unless
        somebody else has, `fence` claims the branch, with whatever epoch is next (INV-2).
        """
        branch = checkpoint_id.branch

        def make(state: LogState) -> Claim:
            held = state.claims.get(branch)
            if _path_of(state, checkpoint_id, attempt) or held is None or held.writer != suspect:
                raise _SettledError
            return replace(fence, branch=branch, epoch=held.epoch + 1)

        with suppress(_SettledError):
            self.log.append(make)
        return _path_of(self.state(), checkpoint_id, attempt)

    def paced(self, bytes_per_s: float) -> Store:
        """Its store, with new files that fill at no more than so many bytes a second together."""
        return PacedStore(self.store, bytes_per_s)

    def is_own(self, path: Path) -> bool:
        """Whether a path, from wherever this process is, leads to a name in the repository."""
        try:
            return path.parent.resolve() == Path(self.url).resolve()
        except (OSError, RuntimeError, ValueError):  # a loop of links; what cannot be a path
            return False

    def _folder_of(self, ref: PathRef) -> PathRef:
        """A checkpoint's folder, given as a path, must be one of this repository's."""
        path = Path(ref.path)
        if self.is_own(path):
            return PathRef(path.name)
        if path.is_absolute():
            raise RefNotFoundError(ref=ref.path, nearest=nearest(self.state(), path.name))
        return ref


class _SettledError(Exception):
    """There is nothing to append."""


def _path_of(state: LogState, checkpoint_id: CheckpointId, attempt: str) -> str | None:
    commit = state.commits.get(checkpoint_id)
    return commit.path if commit is not None and commit.attempt == attempt else None


def open_repository(path: str | os.PathLike[str]) -> Repository:
    """Open the repository in a folder for reading.

    Raises:
        RepositoryNotFoundError: the folder is none.
        FormatVersionError: a newer ckptcoord wrote it.
    """
    if not os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises on a name that is too long)
        raise RepositoryNotFoundError(path=f"{path!s:.1000}")
    return open_store(LocalStore(path), clock=lambda: datetime.now(UTC))


def open_store(store: Store, *, clock: Callable[[], datetime]) -> Repository:
    """Open the repository on a store.

    Raises:
        RepositoryNotFoundError: there is none.
        FormatVersionError: a newer ckptcoord wrote it.
        ManifestError: its marker is malformed.
    """
    try:
        config = read_config(store)
    except MissingFileError as error:
        raise RepositoryNotFoundError(path=store.url) from error
    return Repository(store, clock=clock, retention=config.retention)


def create_repository(
    path: str | os.PathLike[str],
    *,
    clock: Callable[[], datetime],
    config: RepoConfig = _DEFAULTS,
) -> Repository:
    """Open the repository in a folder, making the folder and the repository where they are absent.

    Args:
        path: the folder.
        clock: stamps log entries.
        config: the settings of a repository that is made.

    Raises:
        OutputDirError: the path is a file, or cannot be written, or a checkpoint is around it.
        FormatVersionError: a newer ckptcoord wrote it.
    """
    _check_outside(path)
    return create_store(make_folder(path), clock=clock, config=config)


def _check_outside(path: str | os.PathLike[str]) -> None:
    """Refuse to make a repository where another one's checkpoint or marker is around it."""
    if has_marker(Path(path), CONFIG_PATH):
        return
    try:
        place = Path(os.path.realpath(path))  # unlike resolve(), it takes links in a circle
    except ValueError:  # a NUL
        return
    for inner, outer in pairwise((place, *place.parents)):
        own = is_checkpoint_folder(inner.name) or inner.name == MARKER
        if own and has_marker(outer, CONFIG_PATH):
            why = f"it is in {inner.name} of the repository {outer}, and would be deleted with that"
            raise OutputDirError(path=str(path), why=why)


def make_folder(path: str | os.PathLike[str]) -> LocalStore:
    """The store in a folder, which is made, durably, with its parents where they are absent.

    Raises:
        OutputDirError: a file is in the way, or it cannot be made.
    """
    try:
        return LocalStore(path, create=True)
    except StorageError as error:
        blocked = error.errno in (errno.EEXIST, errno.ENOTDIR)
        why = "a file is in the way" if blocked else error.why
        raise OutputDirError(path=str(path), why=why) from error
    except UnsafePathError as error:
        raise OutputDirError(path=str(path), why=error.why) from error
    except ValueError as error:  # a NUL
        raise OutputDirError(path=ascii(path), why=str(error)) from error


def create_store(
    store: Store, *, clock: Callable[[], datetime], config: RepoConfig = _DEFAULTS
) -> Repository:
    """Open the repository on a store, making it with these settings where it is absent.

    Raises:
        OutputDirError: the store cannot be written.
        FormatVersionError: a newer ckptcoord wrote it.
    """
    try:
        store.make_dirs(f"{MARKER}/log")
        store.make_dirs(STAGING)
        # Also finds out now, not at the first save, that the folder cannot be written.
        store.put_new(CONFIG_PATH, config.to_bytes())
        probe = f"{STAGING}/.writable-{os.urandom(8).hex()}"
        store.make_dirs(probe)
        store.remove_tree(probe)
    except StorageError as error:
        raise OutputDirError(path=store.url, why=error.why) from error
    return open_store(store, clock=clock)
