"""One save, step by step (docs/protocol.md)."""

from __future__ import annotations

import logging
import secrets
import socket
import time
from typing import TYPE_CHECKING

import torch

from ckptcoord.core.entries import Claim
from ckptcoord.core.sharing import ValidationLevel
from ckptcoord.dist.capture import CapturedComponent, capture
from ckptcoord.dist.choice import choose, lineage_of
from ckptcoord.dist.messages import as_dict, as_list
from ckptcoord.dist.opening import (
    Opening,
    check_agreement,
    declaration,
    declared,
    divergences,
    inventory_versions,
    validation_of,
)
from ckptcoord.dist.replication import content_digest, raise_divergence, structure_digest
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
from ckptcoord.repo.attempt import Attempt
from ckptcoord.repo.maintenance import local_times, retain
from ckptcoord.repo.manifests import ManifestFacts, Written, build_manifest
from ckptcoord.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.dist.deadline import Deadline
    from ckptcoord.dist.request import SaveRequest

_VISIBILITY_POLL_S = 0.05
_log = logging.getLogger("ckptcoord")


def save(session: Session, ask: Callable[[], SaveRequest]) -> tuple[SaveRequest, str]:
    """Save all components as one checkpoint, on all ranks or on none.

    Args:
        session: of the coordinator.
        ask: makes the request. What it raises is heard on all ranks: one that went home by itself
            would have the others wait, and would be an operation behind from then on.

    Returns:
        The request, and the name of the checkpoint's folder.

    Raises:
        SaveAbortedError: some rank failed or fell silent; the last commit stands.
        CkptError: what every rank said alike, or what rank 0 decided.
    """
    request = heard(ask)
    if isinstance(request, CkptError):
        session.world.begin(SaveAbortedError, "")
        session.world.agree("open", request, lambda _: None, deadline=session.deadline())
        raise request  # pragma: no cover (the round has raised it)
    return request, _save(session, request)


def _save(session: Session, request: SaveRequest) -> str:
    world = session.world
    world.begin(SaveAbortedError, str(request.checkpoint_id))
    held: dict[str, CapturedComponent] = {}
    session.step("capture")
    word = heard(lambda: _describe(session, request, held))
    session.step("open")
    opening = Opening.from_json(
        world.agree(
            "open", word, lambda said: _open(session, request, said), deadline=session.deadline()
        )
    )
    for divergence in opening.diverged:
        captured = held.get(divergence.component)
        level = validation_of(captured.component) if captured else ValidationLevel.NONE
        raise_divergence(world, divergence, captured, level, session.deadline())
    attempt = _attempt(session, request, opening.attempt)
    session.bases.begin(opening.base)
    session.step("write")
    world.note(f"{request.checkpoint_id}: write")
    files = heard(lambda: write_pieces(session, attempt, held, opening))
    session.step("vote")
    return _vote(session, request, opening, attempt, files)


def _vote(
    session: Session,
    request: SaveRequest,
    opening: Opening,
    attempt: Attempt,
    files: JsonValue | CkptError,
) -> str:
    deadline = session.deadline()
    try:
        decision = session.world.agree(
            "vote",
            files,
            lambda said: _commit(session, request, attempt, said, deadline),
            deadline=deadline,
        )
    except SaveAbortedError as error:
        if _undecided(error) and not isinstance(files, CkptError):
            return _settle(session, attempt, opening.writer, error)
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
    path = str(as_dict(decision)["path"])
    session.bases.committed(path)
    _retain(session, request)
    return path


def _attempt(session: Session, request: SaveRequest, nonce: str) -> Attempt:
    return Attempt(session.repository, request.checkpoint_id, nonce, overwrite=request.overwrite)


def _describe(
    session: Session, request: SaveRequest, held: dict[str, CapturedComponent]
) -> JsonValue:
    """Capture what this rank holds, and say what the others need to know of it."""
    digests: dict[str, JsonValue] = {}
    for component in session.components:
        if session.world.rank not in session.scope(component).writers:
            continue
        captured = held[component.key] = capture(component)
        digests[component.key] = [
            structure_digest(captured),
            content_digest(captured, validation_of(component)),
        ]
    return {
        "step": request.checkpoint_id.step,
        "branch": str(request.checkpoint_id.branch),
        "overwrite": request.overwrite,
        "world size": session.world.size,
        "compression": str(session.config.compression),
        "components": [declaration(component) for component in session.components],
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
    _check_free(session, request)
    _claim(session, request)
    session.chosen = choose(session, attempt.parent(), request.checkpoint_id.branch)
    attempt.open()
    return Opening(
        attempt=attempt.nonce,
        writer=session.writer,
        versions=inventory_versions(words, session.topology),
        base=session.chosen.base,
    ).to_json()


def _check_free(session: Session, request: SaveRequest) -> None:
    commit = session.repository.state().commits.get(request.checkpoint_id)
    if commit is not None and not request.overwrite:
        raise CheckpointExistsError(checkpoint_id=str(request.checkpoint_id))


def _claim(session: Session, request: SaveRequest) -> None:
    """Claim the branch once; a claim by another after that means we are superseded (INV-2)."""
    branch = request.checkpoint_id.branch
    if session.claimed is None:
        session.claimed = session.repository.claim(
            branch,
            writer=session.writer,
            world_size=session.world.size,
            host=socket.gethostname(),
        )
        return
    holder = session.repository.state().claims[branch]
    if holder.writer != session.writer:
        raise FencedError(
            branch=str(branch), writer=session.writer, holder=holder.writer, epoch=holder.epoch
        )


def _commit(
    session: Session,
    request: SaveRequest,
    attempt: Attempt,
    said: list[JsonValue],
    deadline: Deadline,
) -> JsonValue:
    """All ranks have written: manifest, rename, append."""
    files = tuple(
        Written.from_json(file, writer_rank=rank)
        for rank, word in enumerate(said)
        for file in as_list(word)
    )
    _await_files(attempt, {file.record.path: file.record.size_bytes for file in files}, deadline)
    manifest = build_manifest(
        ManifestFacts(
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
        ),
        files,
    )
    path, digest = attempt.publish(manifest, session.step)
    session.step("append")
    attempt.commit(path, manifest, digest, writer=session.writer, epoch=session.claimed or 0)
    session.step("appended")
    return {"path": path}


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
    """A save that failed for its base: the next one stands alone."""
    about = (BaseUnreadableError.__name__, BaseGoneError.__name__)
    said = error.failures.values() if isinstance(error, SaveAbortedError) else (repr(error),)
    if opening.base is not None and any(reason.startswith(about) for reason in said):
        session.refused = f"the save before failed: {opening.base.path} cannot be its base"


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
