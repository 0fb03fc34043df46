"""One try to save: a staging folder that becomes a checkpoint by one append, or stays debris."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping, Sequence

from ckptcoord.codec.digest import blake3_digest
from ckptcoord.core.entries import Claim, Commit
from ckptcoord.core.manifest import MANIFEST_NAME, CheckpointManifest
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.errors import CheckpointExistsError, FencedError, StorageError
from ckptcoord.plan.commit import LogState, head
from ckptcoord.repo.repository import STAGING, Repository
from ckptcoord.repo.shards import TensorSource, WrittenFile, write_file, write_shard


class Attempt:
    """The storage side of one save.

    Args:
        repository: where.
        checkpoint_id: what it will be.
        nonce: 32 hex digits, this attempt's own.
    """

    def __init__(self, repository: Repository, checkpoint_id: CheckpointId, nonce: str) -> None:
        self._repository = repository
        self._store = repository.store
        self.checkpoint_id = checkpoint_id
        self.nonce = nonce
        self.folder = f"{STAGING}/{nonce}"

    def open(self) -> None:
        """Make the staging folder."""
        self._store.make_dirs(self.folder)

    def write_shard(
        self, name: str, sources: Sequence[TensorSource], *, threads: int
    ) -> WrittenFile:
        """Write one shard into staging, durably."""
        return write_shard(self._store, f"{self.folder}/{name}", sources, threads=threads)

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

    def publish(self, manifest: CheckpointManifest, probe: Callable[[str], None]) -> str:
        """Write the manifest and move the folder to its final name; returns that name.

        Raises:
            CheckpointExistsError: somebody committed this step meanwhile.
        """
        probe("manifest")
        self.write_file(MANIFEST_NAME, manifest.to_bytes())
        self.sync()
        probe("rename")
        target = self._free_name(self._repository.state())
        self._store.move_dir(self.folder, target)
        probe("renamed")
        return target

    def abandon(self) -> None:
        """Delete the staging folder."""
        self._store.remove_tree(self.folder)

    def _free_name(self, state: LogState) -> str:
        """The checkpoint's own name; with the attempt's nonce when a committed one has it (INV-4)."""
        name = str(self.checkpoint_id)
        taken = {commit.path for commit in state.commits.values()}
        if name in taken:
            return f"{name}.{self.nonce[:8]}"
        if self._store.exists(name):
            self._move_aside(name)
        return name

    def _move_aside(self, name: str) -> None:
        """INV-1: a folder without a commit is debris. Put it back if its commit came meanwhile."""
        aside = f"{STAGING}/{self.nonce}-debris"
        self._store.move_dir(name, aside)
        state = self._repository.state()
        if any(commit.path == name for commit in state.commits.values()):
            self._store.move_dir(aside, name)
            raise CheckpointExistsError(checkpoint_id=name)
