"""CheckpointEngine: git for the state of a training loop of one's own."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Self

from ckptcoord.core.context import Anew, Reset, check_autocommit
from ckptcoord.core.sharing import OnWorldSizeChange, SharingPattern
from ckptcoord.dist.parallel import start_process_group
from ckptcoord.dist.session import close_after, heard
from ckptcoord.dist.world import current_world
from ckptcoord.engine.config import EngineConfig
from ckptcoord.engine.course import Course
from ckptcoord.engine.parts import Getter, Parts, Setter, user_state
from ckptcoord.engine.points import Forking
from ckptcoord.engine.session import EngineSession, agree_on_context
from ckptcoord.engine.standing import as_step
from ckptcoord.errors import DuplicateComponentError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    import torch

    from ckptcoord.core.sharing import Stateful
    from ckptcoord.dist.loading import LoadReport


class CheckpointEngine:
    """Commits, resumes and forks what a training loop holds: model, optimizer, scheduler, RNG.

    Made by `attach`. Under torchrun, all ranks call the same methods in the same order. A context
    manager: leaving it finishes the commits that are under way, and raises what failed.
    """

    def __init__(self, session: EngineSession) -> None:
        self._session = session
        self._every = session.context.autocommit
        self._course = Course(session)

    @classmethod
    def attach(
        cls,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Stateful | None = None,
        *,
        workspace: str | os.PathLike[str] | None = None,
        repo: str | os.PathLike[str] | None = None,
        config: EngineConfig | None = None,
    ) -> Self:
        """An engine for these, once before training. Collective.

        Where torchrun started several processes and nobody has initialised torch.distributed, it
        does so, with gloo. What `ckptcoord resume` and `ckptcoord fork` ask for in the environment
        is done before it returns.

        Args:
            model: maybe wrapped in DDP or torch.compile, or sharded by `fully_shard`.
            optimizer: of the model's parameters.
            scheduler: of the learning rate; anything with `state_dict` and `load_state_dict`.
            workspace: its folder; made if absent, where the repository is named here, too.
            repo: a repository's name in the workspace, or its path (with a `/` in it); made if
                absent. None: as the environment says, or the nearest from here upwards.
            config: settings.

        Raises:
            RepositoryNotFoundError: nobody names a repository, and there is none around.
            ConfigError: what is attached cannot be saved, or a setting makes no sense.
            CkptError: what the environment asks for cannot be done.
        """
        settings = config or EngineConfig()
        if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):  # noqa: TID251 (torchrun's word)
            start_process_group(use_cpu=True)
        parts = heard(partial(Parts, model, optimizer, scheduler))
        world = current_world()
        try:
            context = agree_on_context(world, parts, workspace, repo, settings)
            assert isinstance(parts, Parts), "else all ranks have raised its error"
        except BaseException:
            world.close()
            raise
        session = EngineSession(parts, context, settings, world)
        try:
            engine = cls(session)
            engine._course.take_up()
        except BaseException:
            session.close()
            raise
        return engine

    # --- where it is -----------------------------------------------------------------------------

    @property
    def current_step(self) -> int:
        """The step that was committed, resumed or told to `maybe_commit` last; 0 at the start."""
        return self._course.standing.step

    @property
    def branch(self) -> str:
        """The branch that it commits to."""
        return self._session.branch

    @property
    def repo_name(self) -> str:
        """The name of the repository's folder."""
        return self._session.context.repo_name

    @property
    def repo_path(self) -> Path:
        """The repository's folder, absolute."""
        return self._session.context.repo_path

    @property
    def workspace_path(self) -> Path | None:
        """The workspace that the repository is in; None: it stands alone."""
        return self._session.context.workspace_path

    # --- committing ------------------------------------------------------------------------------

    def register_state(
        self,
        name: str,
        getter: Getter,
        setter: Setter,
        *,
        sharing_pattern: SharingPattern | str = SharingPattern.PER_RANK,
        on_world_size_change: OnWorldSizeChange | str = OnWorldSizeChange.REFUSE,
        required: bool = True,
    ) -> None:
        """Save and load something else, too: a data loader, a GradScaler, counters. Collective.

        Where the engine has just resumed a checkpoint that has this state, it is loaded now.

        Args:
            name: its component in the checkpoint.
            getter: gives the state: a tree of tensors, numbers, text, lists, dicts and the like.
            setter: takes such a state back.
            sharing_pattern: whether each rank has its own, or all have the same (`REPLICATED`).
            on_world_size_change: what a load on another number of ranks does, if each has its own.
            required: refuse checkpoints without it; else it stays as it is there.

        Raises:
            DuplicateComponentError: there is one of that name.
            InvalidNameError: the name cannot be a file's.
            CkptError: it cannot be loaded, or an earlier commit failed.
        """
        session = self._session
        session.ready()
        component = user_state(
            name,
            getter,
            setter,
            sharing_pattern=sharing_pattern,
            on_world_size_change=on_world_size_change,
            required=bool(required),
        )
        if any(one.key.lower() == name.lower() for one in session.parts.components()):
            raise DuplicateComponentError(key=name)
        session.renew()
        session.parts.add(component)
        ref = self._course.standing.holds(name)
        if ref is not None:
            with session.coordinator_of([component]) as coordinator:
                coordinator.load_checkpoint(ref)

    def autocommit(self, every: int | None) -> None:
        """Have `maybe_commit` commit at every multiple of so many steps; 0 or None: never.

        Raises:
            ConfigError: it is no such number.
        """
        self._every = check_autocommit(0 if every is None else every, field="autocommit")

    def maybe_commit(
        self, step: int, message: str = "", *, metrics: Mapping[str, float] | None = None
    ) -> str | None:
        """Commit if it is time to: the checkpoint's ref, or None. Call it after every step.

        Raises:
            CkptError: as `commit`, though it is not yet time to.
        """
        self._session.ready()
        step = as_step(step)
        standing = self._course.standing
        if self._every and step != standing.last:
            standing.check(self.branch, step)
            if step % self._every == 0:
                return self._course.commit(step, message, metrics)
        standing.step = step
        return None

    def commit(
        self, step: int, message: str = "", *, metrics: Mapping[str, float] | None = None
    ) -> str:
        """Commit the state as it is now, while training goes on; the checkpoint's ref. Collective.

        The checkpoint is there once its save has ended: `wait()` for that.

        Args:
            step: how many steps have been done; more than at the branch's newest checkpoint.
            message: for `ckptcoord log`.
            metrics: by name, such as the loss.

        Raises:
            CheckpointExistsError: this step is committed already.
            ConfigError: the branch has checkpoints that this run does not go on from, or newer
                ones.
            CkptError: an earlier commit failed. This one was not begun.
        """
        self._session.ready()
        step = as_step(step)
        self._course.standing.check(self.branch, step)
        return self._course.commit(step, message, metrics)

    def wait(self) -> None:
        """Wait until every commit has ended. Collective.

        Raises:
            CkptError: one of them failed.
        """
        self._course.wait()

    # --- going on --------------------------------------------------------------------------------

    def resume(
        self, ref: str | os.PathLike[str], *, rewind: bool = False, strict: bool = True
    ) -> LoadReport:
        """Go on from a checkpoint: model, optimizer, scheduler, RNG, what was registered.

        Collective. From then on, commits go to the branch that the ref names. Where
        `EngineConfig.branch` or the environment has named another, they go there, and it begins at
        this checkpoint if it is not there yet.

        Args:
            ref: `main@500`, `main`, `latest`, a tag, a checkpoint's folder.
            rewind: drop what came after it on its branch. Files stay until `ckptcoord gc`.
            strict: refuse a checkpoint that lacks what is live, or has other shapes.

        Raises:
            RefNotFoundError: there is no such checkpoint; the nearest are named.
            NotNewestError: its branch has newer ones: `fork` it, or `rewind`.
            ConfigError: it is on another branch than the one that was named.
            CheckpointInUseError: one that is to be dropped has a tag, or a branch begins there.
            MissingComponentsError: it lacks something altogether; `fork` can begin that anew.
            StateMismatchError: it does not fit. Nothing was changed.
        """
        text = os.fspath(ref) if isinstance(ref, os.PathLike) else ref
        self._course.resume(text, rewind=bool(rewind), strict=bool(strict))
        report = self._course.standing.landed
        assert report is not None, "it has just been loaded"
        return report

    def resume_latest(self) -> LoadReport | None:
        """Go on from the newest checkpoint of the branch; None: it has none. Collective.

        Raises:
            CkptError: as `resume`.
        """
        return self.resume(f"{self.branch}@latest") if self._course.newest() is not None else None

    def fork(  # noqa: PLR0913 (each is something else to begin anew)
        self,
        from_ref: str,
        new_branch: str,
        reset_optimizer: bool = False,  # noqa: FBT001, FBT002 (a public name)
        reset_scheduler: bool = False,  # noqa: FBT001, FBT002 (a public name)
        reset_rng_seed: int | None = None,
        message: str = "",
        *,
        weights_only: bool = False,
    ) -> LoadReport:
        """Begin a branch at a checkpoint, and go on from there on that branch. Collective.

        Where something is begun anew, or there is a message, the branch gets its first checkpoint
        at once, so that whoever resumes it goes on from that. What is begun anew need not be in the
        checkpoint.

        Args:
            from_ref: any ref, also of another branch.
            new_branch: its name.
            reset_optimizer: as it was when attached: moments, hyperparameters, learning rates.
            reset_scheduler: as it was when attached, and with it the learning rates that it sets.
            reset_rng_seed: seed the generators anew, those of each rank by its number.
            message: of that first checkpoint.
            weights_only: take over the model alone. Optimizer and scheduler are as they were when
                attached, steps begin at 0, and what was registered and the generators stay as they
                are.

        Raises:
            BranchExistsError: there is such a branch. Nothing was changed.
            RefNotFoundError: there is no such checkpoint; the nearest are named.
            InvalidNameError: the name is none.
            ConfigError: there is no scheduler, or the seed is none.
            MissingComponentsError: the checkpoint lacks something that is not begun anew.
            StateMismatchError: the checkpoint does not fit. Nothing was changed.
        """
        self._session.ready()
        asked = {
            Reset.OPTIMIZER: reset_optimizer,
            Reset.SCHEDULER: reset_scheduler,
            Reset.WEIGHTS_ONLY: weights_only,
        }
        resets = tuple(one for one, wanted in asked.items() if wanted)
        anew = Anew(resets=resets, seed=reset_rng_seed)
        return self._course.fork(Forking(ref=from_ref, branch=new_branch), anew, message)

    # --- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Finish the commits under way. Collective where there are any; safe to call twice.

        Raises:
            CkptError: one of them failed.
        """
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        close_after(exc, self.close, what="A commit")
