"""One try to save: a staging folder that becomes a checkpoint by one append, or stays debris."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptcoord.codec.digest import blake3_digest
from ckptcoord.core.entries import Commit
from ckptcoord.core.manifest import MANIFEST_NAME, CheckpointManifest
from ckptcoord.core.manifest_fields import MAX_MANIFEST_BYTES
from ckptcoord.errors import CkptError, CommitUnknownError, StorageError
from ckptcoord.plan.commit import STAGING, LogState, parent_of, taken_folders
from ckptcoord.repo.deltawriting import write_deltas
from ckptcoord.repo.shards import TensorSource, WrittenFile, write_file, write_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ckptcoord.core.digest import Digest
    from ckptcoord.core.refs import CheckpointId
    from ckptcoord.repo.deltacoding import Home
    from ckptcoord.repo.deltawriting import DeltaFile, WrittenDelta
    from ckptcoord.repo.repository import Repository
    from ckptcoord.store.base import Store

_log = logging.getLogger("ckptcoord")


class Attempt:
    """The storage side of one save.

    Args:
        repository: where.
        checkpoint_id: what it will be.
        nonce: 32 hex digits, this attempt's own.
        overwrite: commit over a checkpoint of the same id.
        store: to reach the repository through, where that is not its own store.
    """

    def __init__(
        self,
        repository: Repository,
        checkpoint_id: CheckpointId,
        nonce: str,
        *,
        overwrite: bool = False,
        store: Store | None = None,
    ) -> None:
        self._repository = repository
        self._store = repository.store if store is None else store
        self.checkpoint_id = checkpoint_id
        self.nonce = nonce
        self.overwrite = overwrite
        self.folder = f"{STAGING}/{nonce}"

    def open(self) -> None:
        """Make the staging folder."""
        self._store.make_dirs(self.folder)

    def write_shard(
        self,
        name: str,
        sources: Sequence[TensorSource],
        *,
        threads: int,
        metadata: Mapping[str, str] | None = None,
    ) -> WrittenFile:
        """Write one shard into staging, durably."""
        path = f"{self.folder}/{name}"
        return write_shard(self._store, path, sources, threads=threads, metadata=metadata)

    def write_deltas(
        self,
        files: Iterable[DeltaFile],
        *,
        homes: Callable[[Digest], Home | None],
        threads: int,
        coded: Callable[[], None],
    ) -> list[WrittenDelta]:
        """Write delta files, whose paths are names here, into staging, durably.

        `coded` is called when all of a file is coded.
        """
        staged = (replace(file, path=f"{self.folder}/{file.path}") for file in files)
        return write_deltas(self._store, staged, homes=homes, threads=threads, coded=coded)

    def write_file(self, name: str, data: bytes) -> WrittenFile:
        """Write one document into staging, durably."""
        return write_file(self._store, f"{self.folder}/{name}", data)

    def sync(self) -> None:
        """Make the names of the files written so far durable."""
        self._store.sync_dir(self.folder)

    def unseen(self, files: Mapping[str, int]) -> tuple[str, ...]:
        """Which of these files (name to bytes) are not yet visible at their full size."""
        sizes = {entry.name: entry.size_bytes for entry in self._store.list(self.folder)}
        return tuple(name for name, size in files.items() if sizes.get(name) != size)

    def parent(self) -> CheckpointId | None:
        """What training went on from: the branch's newest commit, or where it was forked."""
        return parent_of(self._repository.state(), self.checkpoint_id)

    def publish(
        self, manifest: CheckpointManifest, probe: Callable[[str], None]
    ) -> tuple[str, Digest]:
        """Write the manifest and move the folder to its final name; returns that and the digest."""
        probe("manifest")
        written = self.write_file(MANIFEST_NAME, manifest.to_bytes())
        self.sync()
        probe("rename")
        target = self._settle()
        probe("renamed")
        return target, written.digest

    def commit(
        self,
        path: str,
        manifest: CheckpointManifest,
        digest: Digest,
        *,
        writer: str,
        epoch: int,
        timing: Mapping[str, float] | None = None,
    ) -> None:
        """Append the commit entry: from here on the checkpoint exists (INV-1).

        Args:
            path: the checkpoint's folder, from `publish`.
            manifest: its manifest.
            digest: of the manifest, from `publish`.
            writer: whose claim it stands on.
            epoch: of that claim.
            timing: what is known of the save's times, as in `core.entries.Commit`.

        Raises:
            CommitUnknownError: whether it was appended could not be found out (INV-6).
            FencedError: another writer has claimed the branch (INV-2).
            CheckpointExistsError, BaseGoneError, AttemptSweptError, StorageError: it was not; the
                folder is in staging again, for `abandon`.
        """

        def make(state: LogState) -> Commit:
            old = state.commits.get(self.checkpoint_id)
            return Commit(
                writer=writer,
                checkpoint_id=self.checkpoint_id,
                path=path,
                manifest_digest=digest,
                epoch=epoch,
                attempt=self.nonce,
                parent=manifest.parent_id,
                size_bytes=manifest.size_bytes,
                stored_bytes=manifest.stored_bytes,
                metrics=manifest.metrics,
                message=manifest.message,
                needs=manifest.lineage.needs,
                replaces=old.path if old is not None and self.overwrite else None,
                timing=timing or {},
            )

        try:
            self._repository.log.append(make)  # INV-1: the last write
        except CommitUnknownError:
            raise
        except CkptError:
            self._take_back(path, digest, writer)
            raise

    def committed(self) -> str | None:
        """The folder of the checkpoint, if this very attempt was committed."""
        commit = self._repository.state().commits.get(self.checkpoint_id)
        return commit.path if commit is not None and commit.attempt == self.nonce else None

    def abandon(self) -> None:
        """Delete the staging folder."""
        self._store.remove_tree(self.folder)

    def _take_back(self, path: str, digest: Digest, writer: str) -> None:
        """Published and refused: a full disk would stay full of it until a gc, and its name taken.

        Whoever has been stopped here may find another writer's checkpoint: that goes back.
        """
        try:
            state = self._repository.state()
            claim = state.claims.get(self.checkpoint_id.branch)
            if claim is None or claim.writer != writer or path in taken_folders(state):
                return
            self._store.move_dir(path, self.folder)
            manifest = self._store.read(
                f"{self.folder}/{MANIFEST_NAME}", limit_bytes=MAX_MANIFEST_BYTES
            )
            if blake3_digest(manifest) != digest:
                self._store.move_dir(self.folder, path)
        except CkptError as error:
            # Debris that gc deletes; why the append was refused says more.
            _log.warning("%s was not committed, and stays until a gc: %s", path, error)

    def _settle(self) -> str:
        """Move the folder to the checkpoint's own name, or with the nonce behind it (INV-4).

        What has the name already stays where it is, though no commit may name it: it can be what
        the writer that has fenced this one is about to commit (ADR 23).
        """
        own = str(self.checkpoint_id)
        if own not in taken_folders(self._repository.state()):
            try:
                self._store.move_dir(self.folder, own)
            except StorageError:
                if not (self._store.exists(own) and self._store.exists(self.folder)):
                    raise
            else:
                return own
        beside = f"{own}.{self.nonce[:8]}"
        self._store.move_dir(self.folder, beside)
        return beside
