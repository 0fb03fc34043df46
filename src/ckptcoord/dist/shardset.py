"""The shards that one load reads: all their headers first, then their tensors."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Self, TypeAlias

from ckptcoord.core.manifest import TENSOR_KINDS, FileKind
from ckptcoord.errors import CorruptError
from ckptcoord.repo.deltas import SourceFiles, open_tensors
from ckptcoord.repo.readjobs import ReadJob, check_inputs, fill_tensors, read_tensors
from ckptcoord.repo.stated import StatedSizes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

    from ckptcoord.core.entries import Commit
    from ckptcoord.core.manifest import CheckpointManifest, FileRecord
    from ckptcoord.repo.readers import Out, Proof, TensorEntry, TensorReader
    from ckptcoord.repo.repository import Repository

# Of the 1,024 files that a process may usually have open; a shard for each saving rank is more.
_KEPT_OPEN = 128

Source: TypeAlias = "tuple[FileRecord, TensorEntry]"
Want: TypeAlias = "tuple[Source, Out]"
Proofs: TypeAlias = "dict[tuple[str, str], Proof]"  # by the shard's path and the name


class ShardSet:
    """Shards of one commit, a bounded number of them open; a context manager.

    What deltas are made out of is opened once for all of them, and checked once.

    Args:
        repository: where.
        commit: of which.
    """

    def __init__(self, repository: Repository, commit: Commit) -> None:
        self._repository = repository
        self._commit = commit
        self._stack = ExitStack()
        self._kept: dict[str, TensorReader] = {}
        self._files = self._stack.enter_context(SourceFiles(repository.store))
        self._checked: dict[tuple[str, str], Proof] = {}
        self._stated: StatedSizes | None = None

    def vouch(self, manifest: CheckpointManifest) -> None:
        """Say what the manifest has of the commit's files, which deltas may be made out of.

        No header is believed any more that has more than the manifest says.
        """
        self._stated = StatedSizes(manifest)
        for record in manifest.files:
            if record.kind in TENSOR_KINDS:
                self._files.vouch(
                    self._path(record), size_bytes=record.size_bytes, digest=record.digest
                )

    def sources(self, records: Iterable[FileRecord]) -> dict[str, Source]:
        """Every tensor of these shards by name.

        Raises:
            CorruptError: a header is damaged or has more than the manifest says, or two shards
                hold a tensor of one name.
        """
        found: dict[str, Source] = {}
        for record in records:
            for entry in self._entries(record):
                if entry.spec.name in found:
                    other = found[entry.spec.name][0].path
                    raise CorruptError(
                        path=self._path(record),
                        why=f"tensor {entry.spec.name!r} stands in {other}, too",
                    )
                found[entry.spec.name] = record, entry
        return found

    @contextmanager
    def reader(self, record: FileRecord) -> Iterator[TensorReader]:
        """An open file of the commit; the block's own unless it is kept open.

        Raises:
            CorruptError: its header is damaged.
        """
        kept = self._kept.get(record.path)
        if kept is not None:
            yield kept
            return
        with self._open(record) as reader:
            yield reader

    def read(self, wanted: Iterable[Want], *, threads: int) -> None:
        """Fill each view with its tensor, against its digest (INV-9).

        Raises:
            CorruptError, StorageError: the first failure.
        """
        for batch in self._opened(wanted):
            read_tensors([job for job, _ in batch], threads=threads)

    def check(self, wanted: Iterable[Want], *, threads: int) -> Proofs:
        """Check all that each tensor is read from (INV-9) and leave its view alone until `fill`.

        Raises:
            CorruptError, StorageError: the first failure.
        """
        found: Proofs = {}
        for batch in self._opened(wanted):
            proofs = check_inputs([job for job, _ in batch], self._checked, threads=threads)
            found |= zip([key_of(want) for _, want in batch], proofs, strict=True)
        return found

    def fill(self, wanted: Iterable[Want], found: Proofs, *, threads: int) -> None:
        """Fill the views of what `check` found sound, here or on another rank.

        Raises:
            CorruptError, StorageError: the first failure, a file that changed since among them;
                some views are filled then, some are not.
        """
        for batch in self._opened(wanted):
            fill_tensors([(job, found[key_of(want)]) for job, want in batch], threads=threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(exc_type, exc, traceback)

    def _entries(self, record: FileRecord) -> tuple[TensorEntry, ...]:
        with ExitStack() as stack:
            reader = self._kept.get(record.path) or self._keep(record, stack)
            if self._stated is not None:
                self._stated.check(record, reader)
            return reader.header.entries

    def _opened(self, wanted: Iterable[Want]) -> Iterator[list[tuple[ReadJob, Want]]]:
        """The same with their shards open, as many at a time as may be."""
        by_path: dict[str, list[Want]] = {}
        for want in wanted:
            by_path.setdefault(want[0][0].path, []).append(want)
        open_now = [path for path in by_path if path in self._kept]
        others = [path for path in by_path if path not in self._kept]
        for batch in (open_now, *_batched(others, _KEPT_OPEN)):
            with ExitStack() as stack:
                readers = dict(self._kept)
                for path in batch:
                    if path not in readers:
                        # Its header is held to the same digest again: it is the same.
                        (record, _), _ = by_path[path][0]
                        readers[path] = self._keep(record, stack)
                yield [
                    ((readers[path], want[0][1], want[1]), want)
                    for path in batch
                    for want in by_path[path]
                ]
            if len(self._files) > _KEPT_OPEN:
                self._files.close()  # what is needed again is opened again

    def _keep(self, record: FileRecord, stack: ExitStack) -> TensorReader:
        """Open a file, and leave it open where there is room; else `stack` closes it."""
        reader = self._open(record)
        if len(self._kept) < _KEPT_OPEN:
            self._kept[record.path] = self._stack.enter_context(reader)
        else:
            stack.enter_context(reader)
        return reader

    def _open(self, record: FileRecord) -> TensorReader:
        if record.kind is not FileKind.DELTA:
            return self._repository.open_shard(self._commit, record)
        return open_tensors(
            self._repository.store,
            self._path(record),
            expected=record.digest,
            size_bytes=record.size_bytes,
            sources=self._files,
        )

    def _path(self, record: FileRecord) -> str:
        return f"{self._commit.path}/{record.path}"


def _batched(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Runs of at most `size`."""
    return (items[at : at + size] for at in range(0, len(items), size))


def key_of(want: Want) -> tuple[str, str]:
    """By what the fingerprint of this tensor is known."""
    (record, entry), _ = want
    return record.path, entry.spec.name
