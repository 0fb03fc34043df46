"""Every byte of a checkpoint against every digest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptcoord.core.manifest import MANIFEST_NAME, CheckpointManifest, FileKind, FileRecord
from ckptcoord.errors import CkptError, CorruptError
from ckptcoord.repo.shards import TensorEntry, read_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ckptcoord.core.entries import Commit
    from ckptcoord.repo.repository import Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is not as the manifest says.

    Attributes:
        path: within the repository.
        why: one line.
        harmful: false for what a load does not care about, such as an extra file.
    """

    path: str
    why: str
    harmful: bool = True


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
        progress: called with the bytes of each file that is done.
    """
    try:
        manifest = repository.manifest(commit)
    except CkptError as error:
        finding = _finding(f"{commit.path}/{MANIFEST_NAME}", error)
        return VerifyReport(
            checkpoint_id=str(commit.checkpoint_id), files=0, bytes_read=0, findings=(finding,)
        )
    findings, read = [], 0
    for record in manifest.files:
        try:
            _check_file(repository, commit, record, threads)
            read += record.size_bytes
        except CkptError as error:
            findings.append(_finding(f"{commit.path}/{record.path}", error))
        progress(record.size_bytes)
    findings += _strangers(repository, commit, manifest)
    return VerifyReport(
        checkpoint_id=str(commit.checkpoint_id),
        files=len(manifest.files),
        bytes_read=read,
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


def _check_file(repository: Repository, commit: Commit, record: FileRecord, threads: int) -> None:
    if record.kind is not FileKind.TENSORS:
        repository.read_document(commit, record)
        return
    with repository.open_shard(commit, record) as reader:
        for batch in _batches(reader.header.entries):
            jobs = [(reader, entry, memoryview(bytearray(entry.spec.nbytes))) for entry in batch]
            read_tensors(jobs, threads=threads)


def _batches(entries: tuple[TensorEntry, ...]) -> Iterator[list[TensorEntry]]:
    """Runs of at most 64 MiB, or one larger tensor: what is in memory at once."""
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
    return Finding(path=path, why=error.what.removeprefix(f"{path}: "))
