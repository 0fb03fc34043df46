"""Every byte of a checkpoint against every digest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from ckptcoord.core.manifest import (
    MANIFEST_NAME,
    TENSOR_KINDS,
    CheckpointManifest,
    FileKind,
    FileRecord,
)
from ckptcoord.errors import CkptError, CorruptError
from ckptcoord.repo.readjobs import ReadJob, check_inputs, check_tensors
from ckptcoord.repo.stated import StatedSizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from ckptcoord.codec.tensorfile import TensorEntry
    from ckptcoord.core.entries import Commit
    from ckptcoord.repo.deltas import SourceFiles
    from ckptcoord.repo.readers import Proof, TensorReader
    from ckptcoord.repo.repository import Repository

_KEPT_OPEN = 128  # of the files that deltas are made out of


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

    What deltas are made out of is checked as a load checks it, so that what is sound here loads.

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
    with _Shards(repository, commit, manifest) as shards:
        for record in manifest.files:
            check = _FileCheck(shards, record, threads, progress)
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
            raise CorruptError(path=finding.path, why=finding.why, tensor=finding.tensor)


class _Shards:
    """The files of a checkpoint, opened as a load opens them; a context manager.

    Attributes:
        known: by an input's key, what of it was found sound.
        stated: what the headers may have.
    """

    def __init__(
        self, repository: Repository, commit: Commit, manifest: CheckpointManifest
    ) -> None:
        self.repository = repository
        self.commit = commit
        self.known: dict[tuple[str, str], Proof] = {}
        self.stated = StatedSizes(manifest)
        self._manifest = manifest
        self._files: SourceFiles | None = None

    def open(self, record: FileRecord) -> TensorReader:
        """A file of tensors; the caller closes it."""
        if record.kind is not FileKind.DELTA:
            return self.repository.open_shard(self.commit, record)
        from ckptcoord.repo.deltas import open_tensors  # late: numpy

        return open_tensors(
            self.repository.store,
            f"{self.commit.path}/{record.path}",
            expected=record.digest,
            size_bytes=record.size_bytes,
            sources=self._sources(),
        )

    def _sources(self) -> SourceFiles:
        """What deltas are made out of, opened once for all of them."""
        from ckptcoord.repo.deltas import SourceFiles  # late: numpy

        if self._files is None:
            self._files = SourceFiles(self.repository.store)
            for one in self._manifest.files:
                if one.kind in TENSOR_KINDS:
                    path = f"{self.commit.path}/{one.path}"
                    self._files.vouch(path, size_bytes=one.size_bytes, digest=one.digest)
        elif len(self._files) > _KEPT_OPEN:
            self._files.close()  # what is needed again is opened again
        return self._files

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._files is not None:
            self._files.close()


class _FileCheck:
    """One file against its digests."""

    def __init__(
        self,
        shards: _Shards,
        record: FileRecord,
        threads: int,
        progress: Callable[[int], None],
    ) -> None:
        self.path = f"{shards.commit.path}/{record.path}"
        self.bytes_read = 0
        self._shards = shards
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
        self._shards.repository.read_document(self._shards.commit, self._record)
        self._count(self._record.size_bytes)
        return []

    def _shard(self) -> list[CkptError]:
        errors: list[CkptError] = []
        known = self._shards.known
        with self._shards.open(self._record) as reader:
            self._count(reader.header.data_start)
            self._shards.stated.check(self._record, reader)
            if self._record.kind is FileKind.DELTA:
                errors += _not_needed(self._shards.commit, reader)
            for batch in _batches(reader.header.entries):
                jobs: list[ReadJob] = [(reader, one, memoryview(b"")) for one in batch]
                if not _all_sound(jobs, known, self._threads):
                    errors += _each(jobs, known)
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


def _all_sound(jobs: Sequence[ReadJob], known: dict[tuple[str, str], Proof], threads: int) -> bool:
    try:
        _check(jobs, known, threads)
    except CorruptError:  # the first of perhaps several
        return False
    return True


def _each(jobs: Sequence[ReadJob], known: dict[tuple[str, str], Proof]) -> Iterator[CorruptError]:
    for job in jobs:
        try:
            _check([job], known, threads=1)
        except CorruptError as error:
            yield _of_tensor(job, error.with_traceback(None))  # which would keep its frames alive


def _check(jobs: Sequence[ReadJob], known: dict[tuple[str, str], Proof], threads: int) -> None:
    """Check tensors of one file; of a delta first what a load checks before it touches anything.

    What they are made out of is checked as a whole, were it only bytes that these tensors do not
    take: more than some loads ask for.

    Raises:
        CorruptError, StorageError: the first failure.
    """
    made = [job for job in jobs if job[0].recipes]
    check_inputs(made, known, threads=threads)
    own = [job for job in jobs if job[0].home(job[1])[0] is job[0]]  # the others are inputs
    check_tensors(own, threads=threads)


def _of_tensor(job: ReadJob, error: CorruptError) -> CorruptError:
    """The same of the tensor that cannot be read, where another file is damaged."""
    reader, entry, _ = job
    if error.path == reader.path:
        return error
    name = entry.spec.name
    why = f"tensor {name!r:.80} is made out of {error.what}"
    found = CorruptError(path=reader.path, why=why, tensor=name)
    found.__cause__ = error
    return found


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
