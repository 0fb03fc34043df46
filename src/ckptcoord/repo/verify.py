"""Every byte of a checkpoint against every digest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptcoord.core.manifest import (
    MANIFEST_NAME,
    TENSOR_KINDS,
    CheckpointManifest,
    FileKind,
    FileRecord,
)
from ckptcoord.errors import CkptError, CorruptError
from ckptcoord.repo.readjobs import ReadJob, check_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ckptcoord.codec.tensorfile import TensorEntry
    from ckptcoord.core.entries import Commit
    from ckptcoord.repo.readers import TensorReader
    from ckptcoord.repo.repository import Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is not as the manifest says.

    Attributes:
        path: within the repository.
        why: one line.
        tensor: the one that cannot be read, where it is a tensor.
        harmful: false for what a load does not care about, such as an extra file.
        error: what a load of it would raise.
    """

    path: str
    why: str
    tensor: str = ""
    harmful: bool = True
    error: CkptError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a verification found; `files` and `bytes_read` say how much was read."""

    checkpoint_id: str
    files: int
    bytes_read: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Nothing harmful was found."""
        return not any(finding.harmful for finding in self.findings)


def verify_checkpoint(
    repository: Repository,
    commit: Commit,
    *,
    threads: int = 2,
    progress: Callable[[int], None] = lambda _: None,
) -> VerifyReport:
    """Read a whole checkpoint and compare; damage is reported, not raised.

    Args:
        repository: where it is.
        commit: which.
        threads: that read and hash.
        progress: called with the bytes that were read, or given up, since the last call.
    """
    path = f"{commit.path}/{MANIFEST_NAME}"
    try:
        manifest = repository.manifest(commit)
    except CkptError as error:
        finding = _finding(path, error)
        return VerifyReport(
            checkpoint_id=str(commit.checkpoint_id), files=0, bytes_read=0, findings=(finding,)
        )
    findings, bytes_read = [], 0
    for record in manifest.files:
        check = _FileCheck(repository, commit, record, threads, progress)
        findings += [_finding(check.path, error) for error in check.run()]
        bytes_read += check.bytes_read
    findings += _strangers(repository, commit, manifest)
    return VerifyReport(
        checkpoint_id=str(commit.checkpoint_id),
        files=len(manifest.files),
        bytes_read=bytes_read,
        findings=tuple(findings),
    )


def require_sound(repository: Repository, commit: Commit, *, threads: int = 2) -> None:
    """Verify, and raise the first damage found.

    Raises:
        CorruptError: names file and reason.
    """
    report = verify_checkpoint(repository, commit, threads=threads)
    for finding in report.findings:
        if finding.harmful:
            raise CorruptError(path=finding.path, why=finding.why)


class _FileCheck:
    """One file against its digests."""

    def __init__(
        self,
        repository: Repository,
        commit: Commit,
        record: FileRecord,
        threads: int,
        progress: Callable[[int], None],
    ) -> None:
        self.path = f"{commit.path}/{record.path}"
        self.bytes_read = 0
        self._repository = repository
        self._commit = commit
        self._record = record
        self._threads = threads
        self._progress = progress

    def run(self) -> list[CkptError]:
        """What is wrong with it: one error for the file, or one for each damaged tensor."""
        try:
            return self._shard() if self._record.kind in TENSOR_KINDS else self._document()
        except CkptError as error:
            return [error.with_traceback(None)]
        finally:
            self._progress(max(0, self._record.size_bytes - self.bytes_read))

    def _document(self) -> list[CkptError]:
        self._repository.read_document(self._commit, self._record)
        self._count(self._record.size_bytes)
        return []

    def _shard(self) -> list[CkptError]:
        errors: list[CkptError] = []
        with self._repository.open_shard(self._commit, self._record) as reader:
            self._count(reader.header.data_start)
            if self._record.kind is FileKind.DELTA:
                errors += _not_needed(self._commit, reader)
            for batch in _batches(reader.header.entries):
                jobs: list[ReadJob] = [(reader, one, memoryview(b"")) for one in batch]
                if not _all_sound(jobs, self._threads):
                    errors += _each(jobs)
                self._count(sum(one.end - one.begin for one in batch))
        return errors

    def _count(self, size_bytes: int) -> None:
        self.bytes_read += size_bytes
        self._progress(size_bytes)


def _not_needed(commit: Commit, reader: TensorReader) -> Iterator[CorruptError]:
    """INV-5: what a delta file refers to is in the commit's `needs`, or gc could delete it."""
    from ckptcoord.repo.deltas import DeltaReader  # late: numpy

    recipes = reader.recipes.values() if isinstance(reader, DeltaReader) else ()
    folders = {one.source[0].folder for one in recipes if one.source is not None}
    for folder in sorted(folders - {"", commit.path, *commit.needs}):
        why = f"is made out of {folder}, which its commit does not need: gc may delete that"
        yield CorruptError(path=reader.path, why=why)


def _all_sound(jobs: Sequence[ReadJob], threads: int) -> bool:
    try:
        check_tensors(jobs, threads=threads)
    except CorruptError:  # the first of perhaps several
        return False
    return True


def _each(jobs: Sequence[ReadJob]) -> Iterator[CorruptError]:
    for reader, entry, _ in jobs:
        try:
            reader.examine(entry)
        except CorruptError as error:
            yield error.with_traceback(None)  # which would keep its frames alive


def _batches(entries: tuple[TensorEntry, ...]) -> Iterator[list[TensorEntry]]:
    """Runs of at most 64 MiB, or one larger tensor: between them, progress is shown."""
    batch: list[TensorEntry] = []
    held = 0
    for entry in entries:
        if batch and held + entry.spec.nbytes > 64 << 20:
            yield batch
            batch, held = [], 0
        batch.append(entry)
        held += entry.spec.nbytes
    if batch:
        yield batch


def _strangers(
    repository: Repository, commit: Commit, manifest: CheckpointManifest
) -> list[Finding]:
    known = {record.path for record in manifest.files} | {MANIFEST_NAME}
    return [
        Finding(
            path=f"{commit.path}/{entry.name}",
            why="is not in the manifest; no load looks at it",
            harmful=False,
        )
        for entry in repository.store.list(commit.path)
        if entry.name not in known
    ]


def _finding(path: str, error: CkptError) -> Finding:
    tensor = error.tensor if isinstance(error, CorruptError) else ""
    return Finding(path=path, why=error.what.removeprefix(f"{path}: "), tensor=tensor, error=error)
