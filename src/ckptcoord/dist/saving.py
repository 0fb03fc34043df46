"""One save, step by step (docs/protocol.md)."""

from __future__ import annotations

import logging
import secrets
import socket
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from ckptcoord.core.entries import Claim
from ckptcoord.core.refs import StepRef
from ckptcoord.core.sharing import ValidationLevel
from ckptcoord.dist.choice import choose, lineage_of
from ckptcoord.dist.messages import as_dict, as_int, as_list, as_number
from ckptcoord.dist.opening import (
    Opening,
    check_agreement,
    declaration,
    declared,
    divergences,
    inventory_versions,
    own_documents,
    validation_of,
)
from ckptcoord.dist.outcomes import is_by
from ckptcoord.dist.replication import (
    content_digest,
    document_digest,
    raise_divergence,
    structure_digest,
)
from ckptcoord.dist.report import UNKNOWN_STEP, Slowest, log_report, watched
from ckptcoord.dist.session import Session, heard
from ckptcoord.dist.writing import write_pieces
from ckptcoord.errors import (
    BaseGoneError,
    BaseUnreadableError,
    CheckpointExistsError,
    CkptError,
    CommitUnknownError,
    FencedError,
    SaveAbortedError,
    StorageError,
    StoreUnreachableError,
)
from ckptcoord.plan.commit import parent_of
from ckptcoord.repo.attempt import Attempt
from ckptcoord.repo.maintenance import local_times, retain
from ckptcoord.repo.manifests import ManifestFacts, Written, build_manifest
from ckptcoord.repo.verify import require_sound
from ckptcoord.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.dist.capture import CapturedComponent
    from ckptcoord.dist.config import Deferred
    from ckptcoord.dist.deadline import Deadline
    from ckptcoord.dist.report import SaveTimer
    from ckptcoord.dist.request import SaveRequest
    from ckptcoord.plan.commit import LogState

_VISIBILITY_POLL_S = 0.05
_log = logging.getLogger("ckptcoord")


@dataclass(slots=True, kw_only=True)
class SaveTask:
    """One save on this rank.

    Attributes:
        request: what is asked for, or why that cannot be said. What a rank's own work raised is
            heard on all ranks: one that went home by itself would have the others wait, and would
            be an operation behind from then on.
        state: gives what this rank holds, as it was at the call; may wait for copies.
        timer: from the call on.
        bytes_per_s: to write at most; None: as fast as it goes.
        background: whether training goes on meanwhile.
        queue_depth: saves unfinished at the call, this one among them.
        validate: every byte is read back after the commit.
        declared: what was declared at the call; None: what is at the time.
        deferred: of a save in the background, whether copies were deferred.
        void: set by who asked, when the live state that is being written is about to change.
    """

    request: SaveRequest | CkptError
    state: Callable[[], Mapping[str, CapturedComponent]]
    timer: SaveTimer
    bytes_per_s: float | None = None
    background: bool = False
    queue_depth: int = 1
    validate: bool = False
    declared: Sequence[JsonValue] | None = None
    deferred: Deferred | None = None
    void: bool = False

    @property
    def label(self) -> str:
        """The checkpoint's id, or nothing."""
        return "" if isinstance(self.request, CkptError) else str(self.request.checkpoint_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What became of a save: its folder, and of all ranks together, the bytes of it."""

    path: str
    size_bytes: int = 0
    stored_bytes: int = 0
    slowest: Slowest | None = None


def save(session: Session, task: SaveTask) -> str:
    """Save all components as one checkpoint, on all ranks or on none; report on it.

    Returns:
        The name of the checkpoint's folder.

    Raises:
        SaveAbortedError: some rank failed or fell silent; the last commit stands.
        CkptError: what every rank said alike, or what rank 0 decided.
    """
    world, request = session.world, task.request
    world.begin(SaveAbortedError, task.label)
    try:
        if isinstance(request, CkptError):
            world.agree("open", request, lambda _: None, deadline=session.deadline())
            raise request  # pragma: no cover (the round has raised it)
        saved = _save_or_anchor(session, task, request)
    except CkptError as error:
        _report(session, task, Saved(path=""), error)
        raise
    task.timer.mark("committed")
    watched(lambda: _retain(session, request), "dropping checkpoints", background=task.background)
    _report(session, task, saved, None)
    return saved.path


def verify(session: Session, task: SaveTask) -> None:
    """Read back every byte of what was just committed, on rank 0.

    Raises:
        CorruptError: it is damaged.
    """
    if isinstance(task.request, CkptError):
        raise task.request
    checkpoint_id = task.request.checkpoint_id
    session.world.begin(SaveAbortedError, f"{checkpoint_id}, verification")
    session.world.agree(
        "verify",
        None,
        lambda _: require_sound(
            session.repository, session.repository.resolve(StepRef(checkpoint_id))
        ),
        deadline=session.deadline(),
    )


def declare(session: Session) -> list[JsonValue]:
    """What this rank declares of every component, as it is now."""
    return [declaration(component) for component in session.components]


def hold(session: Session) -> dict[str, CapturedComponent]:
    """What this rank holds of every component that it takes part in, live."""
    return {
        component.key: session.capturer.capture(component)
        for component in session.components
        if session.world.rank in session.scope(component).writers
    }


def _report(session: Session, task: SaveTask, saved: Saved, error: CkptError | None) -> None:
    request = task.request
    report = task.timer.report(
        checkpoint_id=task.label,
        step=UNKNOWN_STEP if isinstance(request, CkptError) else request.checkpoint_id.step,
        rank=session.world.rank,
        background=task.background,
        path=saved.path,
        error=error,
        size_bytes=saved.size_bytes,
        stored_bytes=saved.stored_bytes,
        queue_depth=task.queue_depth,
        slowest=saved.slowest,
    )
    # Once for all ranks; rank 0 says it unless it cannot.
    if session.world.rank == 0 or 0 in getattr(error, "silent", ()):
        watched(lambda: log_report(report), "the log of a save", background=task.background)
    on_saved = session.config.on_saved
    if on_saved is not None:
        watched(lambda: on_saved(report), "on_saved", background=task.background)


def _save_or_anchor(session: Session, task: SaveTask, request: SaveRequest) -> Saved:
    """Save; again, as an anchor, where the base has turned out to be none."""
    try:
        return _save(session, task, request)
    except CkptError as error:
        if not is_by(error, BaseUnreadableError, BaseGoneError):
            raise
        if session.world.rank == 0:
            _log.warning("saving %s again, as an anchor: %s", task.label, error.what)
    session.world.begin(SaveAbortedError, task.label)
    return _save(session, task, request)


def _save(session: Session, task: SaveTask, request: SaveRequest) -> Saved:
    world = session.world
    held: dict[str, CapturedComponent] = {}
    session.step("capture")
    word = heard(lambda: _describe(session, task, request, held))
    session.step("open")
    opening = Opening.from_json(
        world.agree(
            "open", word, lambda said: _open(session, request, said), deadline=session.deadline()
        )
    )
    task.timer.mark("opened")
    for divergence in opening.diverged:
        captured = held.get(divergence.component)
        level = validation_of(captured.component) if captured else ValidationLevel.NONE
        raise_divergence(world, divergence, captured, level, session.deadline())
    attempt = _attempt(session, request, opening.attempt, task.bytes_per_s)
    session.bases.begin(opening.base)
    session.step("write")
    world.note(f"{request.checkpoint_id}: write")
    began_s = time.monotonic()
    coded = partial(task.timer.mark, "encoded")
    files = heard(lambda: write_pieces(session, attempt, held, opening, coded))
    if task.void:
        files = CkptError(what="the call was interrupted while the live state was being written")
    if not isinstance(files, CkptError):
        task.timer.mark("written")
        files = {"files": files, "write_s": round(time.monotonic() - began_s, 6)}
    session.step("vote")
    return _vote(session, task, request, opening, attempt, files)


def _vote(
    session: Session,
    task: SaveTask,
    request: SaveRequest,
    opening: Opening,
    attempt: Attempt,
    files: JsonValue | CkptError,
) -> Saved:
    deadline = session.deadline()
    try:
        decision = session.world.agree(
            "vote",
            files,
            lambda said: _commit(session, task, request, attempt, said, deadline),
            deadline=deadline,
        )
    except SaveAbortedError as error:
        if _undecided(error) and not isinstance(files, CkptError):
            return Saved(path=_settle(session, attempt, opening.writer, error))
        _sweep(session, attempt)
        _doubt_base(session, opening, error)
        raise
    except (FencedError, CommitUnknownError):
        raise  # INV-2, INV-6: nothing is deleted
    except CkptError as error:
        _sweep(session, attempt)
        _doubt_base(session, opening, error)
        raise
    session.step("decided")
    # A rank that is silent in the next save would else seem to hang in the writing of this one.
    session.world.note(f"{request.checkpoint_id}: committed")
    found = as_dict(decision)
    saved = Saved(
        path=str(found["path"]),
        size_bytes=as_int(found["size_bytes"]),
        stored_bytes=as_int(found["stored_bytes"]),
        slowest=Slowest(as_int(found["slowest"]), as_number(found["write_s"])),
    )
    session.bases.committed(saved.path)
    return saved


def _attempt(
    session: Session, request: SaveRequest, nonce: str, bytes_per_s: float | None = None
) -> Attempt:
    repository = session.repository
    return Attempt(
        repository,
        request.checkpoint_id,
        nonce,
        overwrite=request.overwrite,
        store=None if bytes_per_s is None else repository.paced(bytes_per_s),
    )


def _describe(
    session: Session, task: SaveTask, request: SaveRequest, held: dict[str, CapturedComponent]
) -> JsonValue:
    """Learn what this rank holds, and say what the others need to know of it."""
    held.update(task.state())
    digests: dict[str, JsonValue] = {
        key: [
            structure_digest(captured),
            content_digest(captured, validation_of(captured.component)),
            document_digest(captured),
        ]
        for key, captured in held.items()
    }
    return {
        "step": request.checkpoint_id.step,
        "branch": str(request.checkpoint_id.branch),
        "overwrite": request.overwrite,
        "world size": session.world.size,
        "compression": str(session.config.compression),
        "validate": task.validate,
        "saving in the background": task.background,
        "deferred": str(task.deferred),
        "components": list(declare(session) if task.declared is None else task.declared),
        "digests": digests,
    }


# --- rank 0 --------------------------------------------------------------------------------------


def _open(session: Session, request: SaveRequest, said: list[JsonValue]) -> JsonValue:
    """Compare what the ranks said; claim the branch; make the staging folder."""
    words = [as_dict(word) for word in said]
    check_agreement(words)
    diverged = divergences(words, session.topology)
    if diverged:
        return Opening(diverged=diverged).to_json()
    session.declared = declared(words)
    attempt = _attempt(session, request, secrets.token_hex(16))
    state = session.repository.state()
    _check_held(session, state, request)
    _check_free(state, request)
    if session.claimed is None:
        _claim(session, request)
        state = session.repository.state()
    parent = parent_of(state, request.checkpoint_id)
    session.chosen = choose(session, state, parent, request.checkpoint_id.branch)
    attempt.open()
    return Opening(
        attempt=attempt.nonce,
        writer=session.writer,
        versions=inventory_versions(words, session.topology),
        documents=own_documents(words, session.topology),
        base=session.chosen.base,
    ).to_json()


def _check_free(state: LogState, request: SaveRequest) -> None:
    commit = state.commits.get(request.checkpoint_id)
    if commit is not None and not request.overwrite:
        raise CheckpointExistsError(checkpoint_id=str(request.checkpoint_id))


def _check_held(session: Session, state: LogState, request: SaveRequest) -> None:
    """A claim by another after ours means we are superseded, whatever else is wrong (INV-2)."""
    if session.claimed is None:
        return
    branch = request.checkpoint_id.branch
    holder = state.claims[branch]
    if holder.writer != session.writer:
        raise FencedError(
            branch=str(branch),
            writer=session.writer,
            holder=holder.writer,
            epoch=holder.epoch,
            host=holder.host,
        )


def _claim(session: Session, request: SaveRequest) -> None:
    session.claimed = session.repository.claim(
        request.checkpoint_id.branch,
        writer=session.writer,
        world_size=session.world.size,
        host=socket.gethostname(),
    )


def _commit(
    session: Session,
    task: SaveTask,
    request: SaveRequest,
    attempt: Attempt,
    said: list[JsonValue],
    deadline: Deadline,
) -> JsonValue:
    """All ranks have written: manifest, rename, append."""
    task.timer.mark("voted")
    words = [as_dict(word) for word in said]
    files = tuple(
        Written.from_json(file, writer_rank=rank)
        for rank, word in enumerate(words)
        for file in as_list(word["files"])
    )
    slowest = max(
        (Slowest(rank, as_number(word["write_s"])) for rank, word in enumerate(words)),
        key=lambda one: one.write_s,
    )
    _await_files(attempt, {file.record.path: file.record.size_bytes for file in files}, deadline)
    manifest = build_manifest(_facts(session, request, attempt, files), files)
    path, digest = attempt.publish(manifest, session.step)
    session.step("append")
    attempt.commit(
        path,
        manifest,
        digest,
        writer=session.writer,
        epoch=session.claimed or 0,
        timing=task.timer.timing(slowest, queue_depth=task.queue_depth),
    )
    session.step("appended")
    return {
        "path": path,
        "size_bytes": manifest.size_bytes,
        "stored_bytes": manifest.stored_bytes,
        "slowest": slowest.rank,
        "write_s": slowest.write_s,
    }


def _facts(
    session: Session, request: SaveRequest, attempt: Attempt, files: Sequence[Written]
) -> ManifestFacts:
    return ManifestFacts(
        checkpoint_id=request.checkpoint_id,
        parent=attempt.parent(),
        lineage=lineage_of(session, {folder for file in files for folder in file.needs}),
        attempt=attempt.nonce,
        epoch=request.epoch,
        topology=session.topology,
        timestamp=session.config.clock(),
        components=session.declared,
        metrics=request.metrics,
        message=request.message,
        training_args_hash=session.config.training_args_hash,
        ckptcoord_version=VERSION,
        pytorch_version=torch.__version__,
    )


def _await_files(attempt: Attempt, files: Mapping[str, int], deadline: Deadline) -> None:
    """Shared storage may show other ranks' files late; a file that never shows is an error."""
    while unseen := attempt.unseen(files):
        if not deadline.remaining_s():
            raise StorageError(
                operation="list",
                path=attempt.folder,
                why=f"{len(unseen)} files that other ranks wrote are not visible to rank 0, "
                f"{unseen[0]} among them: is output_dir the same folder on every node?",
            )
        time.sleep(_VISIBILITY_POLL_S)


def _retain(session: Session, request: SaveRequest) -> None:
    """Drop what is surplus. The save has succeeded, and a failure here must not undo that."""
    if session.world.rank != 0:
        return
    repository = session.repository
    try:
        retain(
            repository,
            request.checkpoint_id.branch,
            session.config.retention.over(repository.retention),
            writer=session.writer,
            now=session.config.clock(),
            changed=local_times(repository),
        )
    except CkptError as error:
        _log.warning("old checkpoints were not deleted, the next save will try again: %s", error)


# --- when it fails -------------------------------------------------------------------------------


def _sweep(session: Session, attempt: Attempt) -> None:
    if session.world.rank != 0:
        return
    try:
        attempt.abandon()
    except StorageError:
        # The error that led here says more, and gc sweeps staging in any case.
        return


def _doubt_base(session: Session, opening: Opening, error: CkptError) -> None:
    """A save that failed for its base: the next try stands alone."""
    about = (BaseUnreadableError.__name__, BaseGoneError.__name__)
    said = error.failures.values() if isinstance(error, SaveAbortedError) else (repr(error),)
    if opening.base is not None and any(reason.startswith(about) for reason in said):
        session.refused = f"the try before failed: {opening.base.path} cannot be its base"


def _undecided(error: SaveAbortedError) -> bool:
    """Whether it may have been decided without this rank: no decision came, or went, through."""
    return 0 in error.silent or isinstance(error.__cause__, StoreUnreachableError)


def _settle(session: Session, attempt: Attempt, writer: str, error: SaveAbortedError) -> str:
    """Rank 0 or the store is gone and we have voted: the log knows what was committed (INV-1).

    Where nothing was, a claim keeps rank 0 from committing later what we report as failed (INV-2).
    """
    try:
        if session.world.rank == 0:
            path = attempt.committed()  # it cannot be from here on: only this rank commits it
        else:
            fence = Claim(
                writer=session.writer,
                branch=attempt.checkpoint_id.branch,
                epoch=1,
                host=socket.gethostname(),
                world_size=session.world.size,
            )
            path = session.repository.settle(
                attempt.checkpoint_id, attempt.nonce, suspect=writer, fence=fence
            )
    except StorageError as cause:
        raise CommitUnknownError(
            entry=f"the commit of {attempt.checkpoint_id}", why=cause.what
        ) from error
    if path is None:
        _sweep(session, attempt)
        raise error
    return path
