"""`ckptcoord rm`: drop checkpoints; gc deletes their files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.cli.dropping import Consent, Drop, carry_out
from ckptcoord.cli.locate import find_commit
from ckptcoord.core.refs import TagName
from ckptcoord.errors import CheckpointInUseError, ConfigError
from ckptcoord.plan.dropping import HeldBy, holds
from ckptcoord.repo.repository import open_repository

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptcoord.cli.output import Output
    from ckptcoord.core.refs import CheckpointId
    from ckptcoord.plan.dropping import Hold


def run(out: Output, root: Path, refs: Sequence[str], *, force: bool, consent: Consent) -> int:
    """Retire what the refs name; with `force` also what is held by tags and branches.

    Raises:
        ConfigError: there is no ref, or there is nobody to ask and no `-y`.
        RefNotFoundError: a ref names nothing.
        CheckpointInUseError: something holds one of them.
        CkptError: the repository cannot be read, or its log not appended to.
    """
    if not refs:
        raise ConfigError(field="rm", why="needs a REF", help="See `ckptcoord rm --help`")
    consent.require(out)
    repository = open_repository(root)
    state = repository.state()
    ids = tuple({find_commit(state, root, ref).checkpoint_id: None for ref in refs})
    held = holds(state, ids)
    _refuse_held(held, force=force)
    tags = tuple(TagName(one.name) for one in held if one.by is HeldBy.TAG)
    carry_out(out, repository, state, Drop(ids=ids, tags=tags, reason="rm"), consent)
    return 0


def _refuse_held(held: Sequence[Hold], *, force: bool) -> None:
    """The first of them that is held, with all that holds it."""
    strong = [one for one in held if one.by is HeldBy.START]
    reasons = strong or ([] if force else held)
    if not reasons:
        return
    first: CheckpointId = reasons[0].checkpoint_id
    advice = "Give --force to drop it all the same"
    if strong:
        advice = "That branch would begin nowhere; the log refuses it"
    raise CheckpointInUseError(
        checkpoint_id=first.ref,
        used_by=" and ".join(str(one) for one in reasons if one.checkpoint_id == first),
        help=f"{advice}. Nothing was changed",
    )
