"""Where an engine stands on its branch, and which step may be committed next."""

from __future__ import annotations

import operator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsIndex

from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.errors import CheckpointExistsError, CkptError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptcoord.dist.loading import LoadReport


@dataclass(slots=True, kw_only=True)
class Standing:
    """What the state is made of.

    Attributes:
        step: of the state, as far as the engine was told.
        last: the step of the branch that it comes from or was committed at; None: there is none.
        base: what `last` was before this engine committed anything to the branch.
        landed: the last load.
        weights_only: it took over the model alone.
        ahead: exact ref of the branch's newest checkpoint, where the state does not come from it.
    """

    step: int = 0
    last: int | None = None
    base: int | None = None
    landed: LoadReport | None = None
    weights_only: bool = False
    ahead: str | None = None

    def check(self, branch: str, step: int) -> None:
        """Whether a commit of this step goes on from the branch's newest.

        Raises:
            CheckpointExistsError: it is committed already.
            ConfigError: it does not; says what to do.
        """
        checkpoint_id = CheckpointId(BranchName(branch), step)
        if self.ahead is not None:
            raise ConfigError(
                field="commit",
                why=f"{branch!r} is at {self.ahead}, and this run does not go on from there",
                help="resume_latest() before training, fork(ref, NEW_BRANCH), or attach with "
                "EngineConfig(branch=NEW_BRANCH)",
            )
        if self.last is None or step > self.last:
            return
        if step == self.last:
            raise CheckpointExistsError(checkpoint_id=str(checkpoint_id))
        raise ConfigError(
            field="step",
            why=f"is {step}, and {branch}@{self.last} is committed already: steps go up",
            help=f"Fork an earlier checkpoint: fork('{branch}@STEP', NEW_BRANCH)",
        )

    @contextmanager
    def unsure(self) -> Iterator[None]:
        """Around what raises that a commit failed: which of them stand is for the log to say."""
        try:
            yield
        except CkptError:
            self.last = self.base
            raise

    def holds(self, component: str) -> str | None:
        """The exact ref of the checkpoint just loaded, if it has this and nobody loaded it."""
        landed = self.landed
        if landed is None or self.weights_only or landed.step != self.step:
            return None
        if component not in landed.unexpected:
            return None
        return CheckpointId.parse(landed.checkpoint_id).ref


def as_step(step: object) -> int:
    """A step as an int: numpy's and torch's are taken, too.

    Raises:
        ConfigError: it is no whole number.
    """
    if isinstance(step, bool) or not isinstance(step, SupportsIndex):
        why = f"is a {type(step).__name__}, not a whole number"
        raise ConfigError(field="step", why=why)
    return operator.index(step)
