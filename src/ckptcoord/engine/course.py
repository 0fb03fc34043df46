"""The course of a run: it stands at a checkpoint or past it, goes on, and leaves new ones."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ckptcoord.core.context import Reset
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.dist.session import heard
from ckptcoord.engine.beginning import Resets
from ckptcoord.engine.points import Point, Resuming, newest
from ckptcoord.engine.standing import Standing
from ckptcoord.errors import LoadAbortedError, NotNewestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.dist.loading import LoadReport
    from ckptcoord.engine.points import Forking
    from ckptcoord.engine.session import EngineSession
    from ckptcoord.errors import CkptError
    from ckptcoord.repo.repository import Repository


class Course:
    """Moves a session from checkpoint to checkpoint. Every method is collective.

    Args:
        session: the engine's.

    Attributes:
        standing: where it is.
    """

    def __init__(self, session: EngineSession) -> None:
        self._session = session
        self.standing = Standing()
        # What the environment has begun anew, and where: no checkpoint holds it yet. It is not
        # committed in attach(), since what the user has to register is not there.
        self._handed = ("", "", Resets())

    def take_up(self) -> None:
        """Do what the environment asks for, or see where the branch stands.

        Raises:
            CkptError: it cannot be done.
        """
        context, session = self._session.context, self._session
        if context.resume_ref is None:
            self.standing.ahead = self.newest()
            return
        resets = Resets(
            optimizer=Reset.OPTIMIZER in context.resets,
            scheduler=Reset.SCHEDULER in context.resets,
            seed=context.seed,
        )
        resets.checked(session.parts.beginning)
        point = self.resume(context.resume_ref, since=context.resume_since)
        if resets.any and not point.is_restart:  # then it was done when the run began
            self._handed = (point.ref, point.branch, resets)
            resets.apply(session.parts.beginning, rank=session.world.rank)

    def newest(self) -> str | None:
        """The exact ref of where the branch stands.

        Raises:
            CkptError: an earlier commit failed.
        """
        branch = self._session.branch
        at = self._ask(branch, partial(newest, branch=branch))
        return None if at is None else str(at)

    def resume(
        self, ref: str, *, rewind: bool = False, strict: bool = True, since: int | None = None
    ) -> Point:
        """Load what a ref names, and go on from there.

        Raises:
            CkptError: nothing was changed, but where the error says so.
        """
        session = self._session
        named, branch = session.is_named, session.branch
        wish = Resuming(ref=ref, branch=branch, named=named, rewind=rewind, since=since)
        try:
            point = Point.from_json(self._ask(heard(wish.checked), wish.find))
        except NotNewestError as error:
            error.add_note("In Python: fork(ref, NEW_BRANCH), or resume(ref, rewind=True)")
            raise
        self._load(point.ref, point.branch, wish, strict=strict)
        ref_anew, branch_anew, resets = self._handed
        if (ref_anew, branch_anew) == (point.ref, point.branch):
            self._begin_anew(resets, point.ref, "")
        return point

    def fork(self, wish: Forking, resets: Resets, message: str) -> LoadReport:
        """Load what a ref names, and go on from there on a new branch.

        Raises:
            CkptError: nothing was changed, but where the error says so.
        """
        parts = self._session.parts
        said = heard(lambda: [*wish.checked(), *resets.checked(parts.beginning)])
        ref = str(self._ask(said, wish.find))
        report = self._load(ref, wish.branch, wish)
        self._begin_anew(resets, ref, message)
        return report

    def commit(self, step: int, message: str, metrics: Mapping[str, float] | None) -> str:
        """Save the state in the background; the ref that it will have.

        Raises:
            CkptError: an earlier commit failed. This one was not begun.
        """
        session, standing = self._session, self.standing
        session.parts.settle_buffers()
        with standing.unsure():
            session.ready().save_checkpoint_async(step=step, message=message, metrics=metrics)
        standing.step = standing.last = step
        return CheckpointId(BranchName(session.branch), step).ref

    def wait(self) -> None:
        """Wait until every commit has ended.

        Raises:
            CkptError: one of them failed.
        """
        with self.standing.unsure():
            self._session.ready().wait()

    # --- helpers ---------------------------------------------------------------------------------

    def _ask(
        self, say: JsonValue | CkptError, decide: Callable[[Repository], JsonValue]
    ) -> JsonValue:
        """Once all commits have ended, what rank 0 finds."""
        self.wait()
        return self._session.agree(LoadAbortedError, say, decide)

    def _load(
        self, ref: str, branch: str, wish: Resuming | Forking, *, strict: bool = True
    ) -> LoadReport:
        """The state is that of a checkpoint now, and commits go to this branch."""
        session = self._session
        coordinator = session.ready()
        settle = partial(wish.settle, coordinator.repository, writer=session.writer)
        report = coordinator.load_checkpoint(ref, strict, permit=settle)
        if branch != session.branch:
            session.renew()
            session.branch = branch
        own = CheckpointId.parse(report.checkpoint_id).branch == BranchName(branch)
        last = report.step if own else None  # a branch that begins may have that step, too
        self.standing = Standing(landed=report, step=report.step, last=last, base=last)
        return report

    def _begin_anew(self, resets: Resets, ref: str, message: str) -> None:
        """Reset what is asked for, and commit that: no checkpoint holds it yet."""
        resets.apply(self._session.parts.beginning, rank=self._session.world.rank)
        if message or resets.any:
            self.commit(self.standing.step, message or f"fork of {ref}: {resets}", None)
