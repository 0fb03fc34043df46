"""The course of a run: it stands at a checkpoint or past it, goes on, and leaves new ones."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ckptcoord.core.context import Anew
from ckptcoord.core.refs import BranchName, CheckpointId, StepRef, parse_ref
from ckptcoord.dist.missing import naming_missing
from ckptcoord.dist.session import heard
from ckptcoord.engine.points import Point, Resuming, newest
from ckptcoord.engine.standing import Standing
from ckptcoord.errors import LoadAbortedError, MissingComponentsError, NotNewestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ckptcoord.core.entries import Commit
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
        self._handed = ("", "", Anew())

    def take_up(self) -> None:
        """Do what the environment asks for, or see where the branch stands.

        Raises:
            CkptError: it cannot be done.
        """
        context, session = self._session.context, self._session
        if context.resume_ref is None:
            self.standing.ahead = self.newest()
            return
        anew = Anew(resets=context.resets, seed=context.seed)
        session.parts.beginning.check(anew)
        wish = self._wish(context.resume_ref, since=context.resume_since)
        point = self._find(wish)
        if point.is_restart:
            anew = Anew()  # it was done when the run began
        self._load(point.ref, point.branch, wish, anew)
        self._handed = (point.ref, point.branch, anew)

    def newest(self) -> str | None:
        """The exact ref of where the branch stands.

        Raises:
            CkptError: an earlier commit failed.
        """
        branch = self._session.branch
        at = self._ask(branch, partial(newest, branch=branch))
        return None if at is None else str(at)

    def resume(self, ref: str, *, rewind: bool = False, strict: bool = True) -> None:
        """Load what a ref names, and go on from there.

        Raises:
            CkptError: nothing was changed, but where the error says so.
        """
        wish = self._wish(ref, rewind=rewind)
        point = self._find(wish)
        ref_anew, branch_anew, anew = self._handed
        if (ref_anew, branch_anew) != (point.ref, point.branch):
            anew = Anew()
        self._load(point.ref, point.branch, wish, anew, strict=strict)
        self._begin(anew, point.ref, "")

    def fork(self, wish: Forking, anew: Anew, message: str) -> LoadReport:
        """Load what a ref names, and go on from there on a new branch.

        Raises:
            CkptError: nothing was changed, but where the error says so.
        """
        parts = self._session.parts
        said = heard(lambda: [*wish.checked(), *parts.beginning.check(anew)])
        ref = str(self._ask(said, wish.find))
        report = self._load(ref, wish.branch, wish, anew)
        self._begin(anew, ref, message)
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

    def _wish(self, ref: str, *, rewind: bool = False, since: int | None = None) -> Resuming:
        session = self._session
        named, branch = session.is_named, session.branch
        return Resuming(ref=ref, branch=branch, named=named, rewind=rewind, since=since)

    def _find(self, wish: Resuming) -> Point:
        """Where that is; the same on all ranks."""
        try:
            return Point.from_json(self._ask(heard(wish.checked), wish.find))
        except NotNewestError as error:
            error.add_note("In Python: fork(ref, NEW_BRANCH), or resume(ref, rewind=True)")
            raise

    def _load(
        self, ref: str, branch: str, wish: Resuming | Forking, anew: Anew, *, strict: bool = True
    ) -> LoadReport:
        """The state is that of a checkpoint now, or begun anew; commits go to this branch."""
        session = self._session
        exact = parse_ref(ref)
        assert isinstance(exact, StepRef), "it was found"
        anew.check_branch(exact.id, BranchName(branch))
        settle = partial(wish.settle, session.ready().repository, writer=session.writer)
        report = self._read(ref, anew, settle, strict=strict)
        if anew or branch != session.branch:
            session.renew()
            session.branch = branch
        own = exact.id.branch == BranchName(branch)
        last = report.step if own else None  # a branch that begins may have that step, too
        step = 0 if anew.weights_only else report.step
        self.standing = Standing(
            landed=report, weights_only=anew.weights_only, step=step, last=last, base=last
        )
        session.parts.beginning.begin(anew, rank=session.world.rank)
        return report

    def _read(
        self, ref: str, anew: Anew, settle: Callable[[Commit], None], *, strict: bool
    ) -> LoadReport:
        """What is taken over, on all ranks or on none."""
        session = self._session
        coordinator, wanted = session.ready(), session.parts.taken_over(anew)
        try:
            with naming_missing(coordinator.repository, ref, wanted, anew):
                if not anew:
                    return coordinator.load_checkpoint(ref, strict, permit=settle)
                with session.coordinator_of(wanted) as some:
                    return some.load_checkpoint(ref, strict, permit=settle)
        except MissingComponentsError as error:
            error.add_note(f"In Python: fork({ref!r}, NEW_BRANCH, weights_only=True)")
            raise

    def _begin(self, anew: Anew, ref: str, message: str) -> None:
        """Commit what was begun anew: no checkpoint holds it yet."""
        if message or (anew and self.standing.last is None):
            self.commit(self.standing.step, message or f"fork of {ref}: {anew}", None)
