"""Write a delta or a coded anchor anew as a plain anchor (`ckptcoord compact`)."""

from __future__ import annotations

import posixpath
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ckptcoord.codec.givenup import given_up_metadata
from ckptcoord.core.entries import Entry, Rewrite, timestamp_of
from ckptcoord.core.manifest import (
    CheckpointKind,
    CheckpointManifest,
    ComponentManifest,
    FileKind,
    FileRecord,
    LineageRecord,
    checksum_of,
)
from ckptcoord.errors import CheckpointInUseError
from ckptcoord.plan.commit import replay
from ckptcoord.repo.attempt import Attempt
from ckptcoord.repo.shards import TensorSource, hf_index
from ckptcoord.repo.stated import StatedSizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from numpy.typing import NDArray

    from ckptcoord.codec.tensorfile import TensorEntry
    from ckptcoord.core.entries import Commit
    from ckptcoord.core.refs import CheckpointId
    from ckptcoord.plan.commit import LogState
    from ckptcoord.repo.readers import TensorReader
    from ckptcoord.repo.repository import Repository
    from ckptcoord.repo.shards import WrittenFile

_DELTA = ".delta.safetensors"


def needing_retired(state: LogState) -> tuple[Commit, ...]:
    """The live checkpoints for whose sake gc keeps folders of retired ones, sorted by id."""
    live = {commit.path for commit in state.commits.values()}
    needing = [commit for commit in state.commits.values() if set(commit.needs) - live]
    return tuple(sorted(needing, key=lambda commit: commit.checkpoint_id))


def as_if_compacted(state: LogState, commits: Iterable[Commit], *, now: datetime) -> LogState:
    """What the log would say once these were compacted now, each into a folder of any name."""
    for number, commit in enumerate(commits, state.number + 1):
        attempt = f"{number:032x}"
        path = f"{commit.checkpoint_id}.{attempt[-8:]}"
        new = replace(commit, path=path, attempt=attempt, needs=(), replaces=commit.path)
        body = Rewrite(writer=commit.writer, commit=new)
        entry = Entry(number=number, timestamp=timestamp_of(now), body=body)
        state = replay(state, (entry,))
    return state


def is_plain(repository: Repository, commit: Commit) -> bool:
    """Whether a checkpoint is plain safetensors that need nothing else.

    Raises:
        CorruptError, StorageError: its manifest cannot be read.
    """
    if commit.needs:
        return False
    return all(one.kind is not FileKind.DELTA for one in repository.manifest(commit).files)


def compact(
    repository: Repository,
    checkpoint_id: CheckpointId,
    *,
    writer: str,
    threads: int = 2,
    progress: Callable[[int], None] = lambda _: None,
) -> bool:
    """Write a checkpoint anew as an anchor of plain safetensors.

    Its place in history, metrics and message stay.

    Safe beside running saves and loads: the old folder is retired, and deleted by a later gc. Every
    byte is checked on the way. Killed anywhere, the checkpoint is as it was before or as it is
    after.

    Args:
        repository: where.
        checkpoint_id: which; a live one.
        writer: 32 hex digits, the caller's own.
        threads: that hash and write.
        progress: called with the bytes of tensors written since the last call.

    Returns:
        False where it is that already.

    Raises:
        RefNotFoundError: there is no such checkpoint.
        CorruptError, StorageError: it cannot be read or written.
        CheckpointInUseError: it was saved again meanwhile.
    """
    commit = repository.resolve(checkpoint_id.ref)
    if is_plain(repository, commit):
        return False
    manifest = repository.manifest(commit)
    attempt = Attempt(repository, checkpoint_id, secrets.token_hex(16), overwrite=True)
    attempt.open()
    try:
        copy = _Copy(repository, commit, manifest, attempt, threads, progress)
        records = [copy.file(record) for record in manifest.files]
        records += copy.indexes(manifest, records)
        attempt.sync()
        _require_standing(repository, commit)  # or the copy would be debris for a day
        path, digest = attempt.publish(_anchor(manifest, attempt, records), lambda _: None)
    except BaseException:
        attempt.abandon()
        raise
    place = replace(commit, path=path, manifest_digest=digest, attempt=attempt.nonce)
    stored_bytes = sum(record.size_bytes for record in records)
    new = replace(place, stored_bytes=stored_bytes, needs=(), replaces=commit.path)
    repository.log.append(lambda _: Rewrite(writer=writer, commit=new))
    return True


def _require_standing(repository: Repository, commit: Commit) -> None:
    """Refuse what the log would refuse, before the copy gets a checkpoint's name."""
    now = repository.resolve(commit.checkpoint_id.ref)
    if now.path != commit.path:
        raise CheckpointInUseError(
            checkpoint_id=str(commit.checkpoint_id), used_by="another save of it, made meanwhile"
        )


class _Copy:
    """The files of a checkpoint, written once more."""

    def __init__(
        self,
        repository: Repository,
        commit: Commit,
        manifest: CheckpointManifest,
        attempt: Attempt,
        threads: int,
        progress: Callable[[int], None],
    ) -> None:
        self._repository = repository
        self._commit = commit
        self._attempt = attempt
        self._threads = threads
        self._progress = progress
        self._stated = StatedSizes(manifest)
        self._names: dict[str, tuple[str, ...]] = {}
        self._nbytes: dict[str, int] = {}

    def file(self, record: FileRecord) -> FileRecord:
        """One file; deltas become whole tensors."""
        if record.kind in (FileKind.TENSORS, FileKind.DELTA):
            return self._shard(record)
        data = self._repository.read_document(self._commit, record)
        return _rewritten(record, self._attempt.write_file(record.path, data))

    def indexes(self, manifest: CheckpointManifest, records: list[FileRecord]) -> list[FileRecord]:
        """What Hugging Face tools read beside several shards of one copy."""
        copies: dict[tuple[str, str], list[FileRecord]] = {}
        for record in records:
            if record.kind is FileKind.TENSORS:
                copies.setdefault((record.component, record.scope), []).append(record)
        known = {record.path for record in manifest.files}
        found = []
        for (component, scope), shards in copies.items():
            name = f"{component}.{scope}" if scope else component
            path = f"{name}.safetensors.index.json"
            if len(shards) > 1 and path not in known:
                names = {shard.path: self._names[shard.path] for shard in shards}
                data = hf_index(names, sum(self._nbytes[shard.path] for shard in shards))
                written = self._attempt.write_file(path, data)
                found.append(
                    _rewritten(shards[0].model_copy(update={"kind": FileKind.INDEX}), written)
                )
        return found

    def _shard(self, record: FileRecord) -> FileRecord:
        path = record.path
        if path.endswith(_DELTA):
            path = f"{path.removesuffix(_DELTA)}.safetensors"
        with self._repository.open_shard(self._commit, record) as reader:
            self._stated.check(record, reader)
            sources = [
                TensorSource(spec=entry.spec, read=self._reading(reader, entry))
                for entry in reader.header.entries
            ]
            metadata = given_up_metadata(reader.given_up())
            written = self._attempt.write_shard(
                path, sources, threads=self._threads, metadata=metadata
            )
        self._names[path] = tuple(source.spec.name for source in sources)
        self._nbytes[path] = sum(source.spec.nbytes for source in sources)
        kind = FileKind.TENSORS
        return _rewritten(record.model_copy(update={"kind": kind}), written)

    def _reading(self, reader: TensorReader, entry: TensorEntry) -> Callable[[], NDArray[np.uint8]]:
        def read() -> NDArray[np.uint8]:
            data = np.empty(entry.spec.nbytes, np.uint8)
            reader.read_into(entry, data.data)
            self._progress(data.nbytes)
            return data

        return read


def _rewritten(record: FileRecord, written: WrittenFile) -> FileRecord:
    update = {
        "path": posixpath.basename(written.path),
        "size_bytes": written.size_bytes,
        "digest": written.digest,
    }
    return record.model_copy(update=update)


def _anchor(
    manifest: CheckpointManifest, attempt: Attempt, records: list[FileRecord]
) -> CheckpointManifest:
    """The manifest of the same checkpoint as an anchor."""
    lineage = LineageRecord(
        base_path=None,
        base_digest=None,
        needs=(),
        stored_bytes=(),
        reason="compacted; it was "
        + ("coded" if manifest.base is None else f"a delta against {manifest.base}"),
    )
    fields = dict(manifest)
    fields |= {
        "kind": CheckpointKind.ANCHOR,
        "base": None,
        "lineage": lineage,
        "attempt": attempt.nonce,
        "components": {
            key: _component(key, component, records)
            for key, component in manifest.components.items()
        },
        "files": tuple(records),
    }
    return CheckpointManifest(**fields)


def _component(
    key: str, component: ComponentManifest, records: list[FileRecord]
) -> ComponentManifest:
    own = sorted((r for r in records if r.component == key), key=lambda record: record.path)
    fields = dict(component)
    fields |= {
        "stored_bytes": sum(record.size_bytes for record in own),
        "checksum": checksum_of(record.digest for record in own),
        "files": tuple(record.path for record in own),
    }
    return ComponentManifest(**fields)
