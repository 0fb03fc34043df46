"""Rank 0's decision at each save: an anchor, or a delta and against what."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptcoord.core.lossy import CompressionLevel
from ckptcoord.core.manifest import CheckpointKind
from ckptcoord.errors import BaseUnreadableError
from ckptcoord.plan.elsewhere import closure, elsewhere, nearby, other_heads
from ckptcoord.plan.lineage import Past, base_place, why_anchor, why_delta
from ckptcoord.repo.bases import Base
from ckptcoord.repo.manifests import Lineage

if TYPE_CHECKING:
    from ckptcoord.core.digest import Digest
    from ckptcoord.core.entries import Commit
    from ckptcoord.core.manifest import CheckpointManifest
    from ckptcoord.core.refs import BranchName, CheckpointId
    from ckptcoord.dist.session import Session
    from ckptcoord.plan.commit import LogState
    from ckptcoord.plan.lineage import Compression

_log = logging.getLogger("ckptcoord")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was decided, and why.

    Attributes:
        base: what deltas are against; None for an anchor.
        stored_bytes: of the last anchor and of each delta since.
    """

    reason: str
    base: Base | None = None
    stored_bytes: tuple[int, ...] = ()


def choose(
    session: Session, state: LogState, parent: CheckpointId | None, branch: BranchName
) -> Choice:
    """Decide for a save on a branch that goes on from `parent`, by what the log says."""
    rule = session.config.rule.over(one.compression for one in session.declared)
    refused, session.refused = session.refused, ""
    if refused:
        return Choice(reason=refused)
    if rule.level is CompressionLevel.OFF:
        return Choice(reason=why_anchor(rule, None))
    commit = None if parent is None else state.commits.get(parent)
    if commit is None:
        return Choice(reason=why_anchor(rule, None))
    try:
        manifest = session.bases.manifest(commit.path, commit.manifest_digest)
        return _choose(session, state, rule, commit, manifest, branch)
    except BaseUnreadableError as error:
        _log.warning("writing an anchor: %s", error.what)
        return Choice(reason=error.what)


def lineage_of(session: Session, named: set[str]) -> Lineage:
    """What the checkpoint that is being saved stands on.

    Args:
        session: of rank 0, which has decided.
        named: the folders that its files refer to.
    """
    chosen = session.chosen
    assert chosen is not None, "decided when the save was opened"
    base = chosen.base
    if base is None:
        assert not named, "an anchor's files name only one another"
        return Lineage(reason=chosen.reason)
    return Lineage(
        reason=chosen.reason,
        base=(base.ref, base.path, base.digest),
        needs=closure(session.repository.state(), {base.path, *named}),
        stored_bytes=chosen.stored_bytes,
    )


def _choose(
    session: Session,
    state: LogState,
    rule: Compression,
    commit: Commit,
    manifest: CheckpointManifest,
    branch: BranchName,
) -> Choice:
    stored_bytes = (*manifest.lineage.stored_bytes, manifest.stored_bytes)
    past = Past(
        stored_bytes=stored_bytes,
        size_bytes=manifest.size_bytes,
        is_fork=commit.checkpoint_id.branch != branch,
        is_exact=rule.is_exact and all(one.is_exact for one in session.declared),
    )
    reason = why_anchor(rule, past)
    if reason:
        return Choice(reason=reason)
    ref, path, digest = _base_at(session, base_place(rule, past), commit, manifest)
    # A process that fails of its base and starts anew would meet the same one again, for ever.
    session.bases.check(path, digest, threads=session.config.io_threads)
    folders = nearby(state, path, commit.path)
    return Choice(
        reason=why_delta(rule, past),
        base=Base(
            ref=ref,
            path=path,
            digest=digest,
            folders=folders,
            elsewhere=_elsewhere(session, state, branch, folders, commit, path),
        ),
        stored_bytes=stored_bytes,
    )


def _base_at(
    session: Session, place: int, commit: Commit, manifest: CheckpointManifest
) -> tuple[str, str, Digest]:
    """Ref, folder and manifest's digest of what a checkpoint stands on that has this place.

    Where none has, as what it stands on was chosen by another rule: of the next one further back.
    """
    ref, path, digest = commit.checkpoint_id.ref, commit.path, commit.manifest_digest
    while manifest.kind is CheckpointKind.DELTA and len(manifest.lineage.stored_bytes) > place:
        lineage = manifest.lineage
        assert manifest.base is not None, "a delta has its base"
        assert lineage.base_path is not None, "and where that is"
        assert lineage.base_digest is not None, "and what it is"
        ref, path, digest = manifest.base, lineage.base_path, lineage.base_digest
        manifest = session.bases.manifest(path, digest)
    return ref, path, digest


def _elsewhere(
    session: Session,
    state: LogState,
    branch: BranchName,
    near: tuple[str, ...],
    parent: Commit,
    base: str,
) -> tuple[tuple[str, Digest], ...]:
    """The checkpoints beside its base that this save may name: its parent, and others."""
    if parent.path not in near:  # without its parent it begins anew with what it needs
        return ()
    if session.heads is None:
        session.heads = other_heads(state, branch)
    found = elsewhere(state, near, (*session.bases.saves, *session.heads))
    if parent.path != base:  # a process that starts anew has yet to read what it holds
        found = (parent, *found)
    return tuple((commit.path, commit.manifest_digest) for commit in found)
