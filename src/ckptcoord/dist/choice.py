"""Rank 0's decision at each save: an anchor, or a delta and against what."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptcoord.core.manifest import CheckpointKind
from ckptcoord.errors import BaseUnreadableError
from ckptcoord.plan.lineage import BaseChoice, CompressionLevel, Past, why_anchor, why_delta
from ckptcoord.repo.bases import Base
from ckptcoord.repo.manifests import Lineage

if TYPE_CHECKING:
    from ckptcoord.core.entries import Commit
    from ckptcoord.core.manifest import CheckpointManifest
    from ckptcoord.core.refs import BranchName, CheckpointId
    from ckptcoord.dist.session import Session

_log = logging.getLogger("ckptcoord")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was decided, and why.

    Attributes:
        base: what deltas are against; None for an anchor.
        parent_path: the folder of what training goes on from.
        parent_needs: what that needs.
        stored_bytes: of the last anchor and of each delta since.
    """

    reason: str
    base: Base | None = None
    parent_path: str = ""
    parent_needs: tuple[str, ...] = ()
    stored_bytes: tuple[int, ...] = ()


def choose(session: Session, parent: CheckpointId | None, branch: BranchName) -> Choice:
    """Decide for a save on a branch that goes on from `parent`."""
    rule = session.config.rule
    refused, session.refused = session.refused, ""
    if refused:
        return Choice(reason=refused)
    if rule.level is CompressionLevel.OFF:
        return Choice(reason=why_anchor(rule, None))
    commit = None if parent is None else session.repository.state().commits.get(parent)
    if commit is None:
        return Choice(reason=why_anchor(rule, None))
    try:
        manifest = session.bases.manifest(commit.path, commit.manifest_digest)
    except BaseUnreadableError as error:
        _log.warning("writing an anchor: %s", error)
        return Choice(reason=error.what)
    return _choose(session, commit, manifest, is_fork=commit.checkpoint_id.branch != branch)


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
        return Lineage(reason=chosen.reason)
    needs = {base.path, *named}
    if base.path == chosen.parent_path or needs - {base.path}:
        needs |= {*chosen.parent_needs}
    if base.path != chosen.parent_path:
        needs |= {*session.bases.manifest(base.path, base.digest).lineage.needs}
    return Lineage(
        reason=chosen.reason,
        base=(base.ref, base.path, base.digest),
        needs=tuple(sorted(needs)),
        stored_bytes=chosen.stored_bytes,
    )


def _choose(
    session: Session, commit: Commit, manifest: CheckpointManifest, *, is_fork: bool
) -> Choice:
    rule, lineage = session.config.rule, manifest.lineage
    stored_bytes = (*lineage.stored_bytes, manifest.stored_bytes)
    past = Past(stored_bytes=stored_bytes, size_bytes=manifest.size_bytes, is_fork=is_fork)
    reason = why_anchor(rule, past)
    if reason:
        return Choice(reason=reason)
    ref, path, digest = commit.checkpoint_id.ref, commit.path, commit.manifest_digest
    if manifest.kind is CheckpointKind.DELTA and rule.base is BaseChoice.ANCHOR:
        ref = manifest.base or ref
        path, digest = lineage.base_path or path, lineage.base_digest or digest
    folders = tuple(sorted({path, commit.path, *lineage.needs}))
    return Choice(
        reason=why_delta(rule, past),
        base=Base(ref=ref, path=path, digest=digest, folders=folders),
        parent_path=commit.path,
        parent_needs=lineage.needs,
        stored_bytes=stored_bytes,
    )
