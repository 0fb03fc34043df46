"""Where a run of a trainer begins: at nothing, at a checkpoint, on a branch that begins there."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ckptcoord.core.context import MODEL, Reset, Variable
from ckptcoord.core.jsonio import dump_json, parse_json
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.dist.missing import naming_missing
from ckptcoord.dist.rng import seed_everything
from ckptcoord.errors import CkptError, ConfigError
from ckptcoord.plan.commit import branches
from ckptcoord.repo.repository import open_repository
from ckptcoord.trainers.arguments import SaveStrategy

if TYPE_CHECKING:
    import torch

    from ckptcoord.core.context import Anew
    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.sharing import StateComponent
    from ckptcoord.dist.loading import LoadReport
    from ckptcoord.trainers.arguments import TrainingArguments
    from ckptcoord.trainers.base import BaseTrainer
    from ckptcoord.trainers.saves import RunSaves


class Fresh:
    """What begins anew where training goes on, and how that was in the new trainer.

    Args:
        anew: what.
        optimizer: as it is now.
        scheduler: as it is now.
    """

    def __init__(self, anew: Anew, optimizer: Any, scheduler: Any) -> None:  # noqa: ANN401 (anything that has state)
        self.anew = anew
        parts = {Reset.OPTIMIZER: optimizer, Reset.SCHEDULER: scheduler}
        self._states = {one: deepcopy(parts[one].state_dict()) for one in parts if one in anew}

    def put_back(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:  # noqa: ANN401 (likewise)
        """Have them as they were; the learning rate is what the schedule says, new or loaded."""
        parts = {Reset.OPTIMIZER: optimizer, Reset.SCHEDULER: scheduler}
        for one, state in self._states.items():
            parts[one].load_state_dict(deepcopy(state))
        if self._states:
            rates = scheduler.get_last_lr()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate


class Beginning:
    """The first steps of a call of `train()`. All methods are collective.

    Args:
        trainer: whose state is loaded.
        saves: of the run.
    """

    def __init__(self, trainer: BaseTrainer, saves: RunSaves) -> None:
        self._trainer, self._saves = trainer, saves
        self._source = ""  # where what begins anew came from

    def go_on(self) -> bool:
        """Load what `resume_from_checkpoint` names; False: nothing to load.

        What a fork begins anew is not loaded, and need not be there.

        Raises:
            MissingComponentsError: the checkpoint lacks something that does not begin anew.
            CkptError: it cannot be loaded, or its branch not begun.
        """
        trainer, args, fresh = self._trainer, self._trainer.args, self._trainer.fresh
        ref = self._ref()
        if not ref:
            return False
        report = self._load(ref, fresh.anew)
        if isinstance(args.resume_from_checkpoint, str) and args.save_strategy is not _NEVER:
            self._begin_branch(CheckpointId.parse(report.checkpoint_id))
        if not fresh.anew.weights_only:
            self._stand_at(report.step)
        fresh.put_back(trainer.optimizer, trainer.lr_scheduler)
        seed = fresh.anew.seed
        if seed is not None or fresh.anew.weights_only:
            seed_everything(args.seed if seed is None else seed, trainer.ranks.rank)
        if fresh.anew:
            self._source = CheckpointId.parse(report.checkpoint_id).ref
        return True

    def save_anew(self) -> None:
        """The first checkpoint of a branch on which something was begun anew.

        Nothing else remembers that: a run that is killed before its first save goes on from this.

        Raises:
            CkptError: it cannot be saved.
        """
        args = self._trainer.args
        if not self._source or args.save_strategy is _NEVER:
            return
        if self._source.rpartition("@")[0] != args.branch:  # else it has that step
            message = f"fork of {self._source}: {self._trainer.fresh.anew}"
            self._saves.save(metrics={}, message=message, background=False)

    # --- helpers ---------------------------------------------------------------------------------

    def _ref(self) -> str:
        """What is loaded; empty: nothing.

        Raises:
            ConfigError: the branch has newer ones.
        """
        wanted, ranks = self._trainer.args.resume_from_checkpoint, self._trainer.ranks
        if wanted is False:
            return ""
        coordinator = self._trainer.coordinator
        newest = ranks.from_first(coordinator.resolve_checkpoint_path() or "")
        if isinstance(wanted, str) and newest:
            path = ranks.from_first(coordinator.resolve_checkpoint_path(wanted) or "")
            _refuse_collision(self._trainer.args, path, newest, self._trainer.fresh.anew)
        return wanted if isinstance(wanted, str) else newest

    def _load(self, ref: str, anew: Anew) -> LoadReport:
        trainer = self._trainer
        wanted = components = trainer.get_state_components()
        if anew:
            wanted = [one for one in components if _takes_over(one, anew, trainer)]
        if not wanted:
            raise ConfigError(
                field=str(Variable.RESET),
                why=f"is {Reset.WEIGHTS_ONLY}, and none of the components "
                f"({', '.join(one.key for one in components)}) is the model",
                help=f"Call its component {MODEL!r}",
            )
        with naming_missing(trainer.coordinator.repository, ref, wanted, anew):
            if not anew:
                return trainer.coordinator.load_checkpoint(ref)
            with trainer.make_coordinator(wanted) as some:
                return some.load_checkpoint(ref)

    def _stand_at(self, step: int) -> None:
        """Count from there."""
        trainer, state = self._trainer, self._trainer.state
        set_epoch(trainer)
        trainer.recount_steps()
        self._saves.loaded(step)
        if state.best_model_checkpoint == f"{trainer.args.branch}@{step}":
            # A kill may have come between this checkpoint and its tag.
            trainer.coordinator.set_best_checkpoint(state.best_model_checkpoint)

    def _begin_branch(self, source: CheckpointId) -> None:
        """A branch that is new begins in the log where training goes on from."""
        args, ranks = self._trainer.args, self._trainer.ranks
        failed = ranks.from_first(_begin_branch(args, source) if ranks.rank == 0 else "")
        if failed:
            document = cast("dict[str, Any]", parse_json(failed.encode(), path="rank 0"))
            raise CkptError.from_document(document)


_NEVER = SaveStrategy.NO


def set_epoch(trainer: BaseTrainer) -> None:
    """Tell the loader which epoch is under way, if it wants to know."""
    tell = getattr(trainer.train_dataloader, "set_epoch", None)
    if callable(tell):
        tell(trainer.state.epoch_index)


def _takes_over(one: StateComponent, anew: Anew, trainer: BaseTrainer) -> bool:
    """Whether it is loaded; the model may be in components of other names, part by part."""
    if anew.takes_over(one.key):
        return True
    parts = trainer.unwrapped_model().modules()
    return anew.weights_only and any(one.stateful is part for part in parts)


def _refuse_collision(args: TrainingArguments, path: str, newest: str, anew: Anew) -> None:
    """Going on from an older checkpoint would meet the steps of the newer ones again."""
    if not path or path == newest or args.save_strategy is _NEVER:
        return
    old, new = CheckpointId.parse(Path(path).name), CheckpointId.parse(Path(newest).name)
    why = ""
    if anew.weights_only and str(new.branch) == args.branch:
        why = f"begins steps at 0 with the weights of {old.ref}, and its branch is at {new.ref}"
    elif old.step < new.step:
        why = f"{old.ref} is older than {new.ref}, whose branch this run saves to"
    if why:
        raise ConfigError(
            field="resume_from_checkpoint",
            why=why,
            help="Set branch to a new name, or resume from the newest",
        )


def _begin_branch(args: TrainingArguments, source: CheckpointId) -> str:
    """Rank 0: what went wrong, as JSON; empty where nothing did."""
    branch = BranchName(args.branch)
    try:
        repository = open_repository(args.output_dir)
        if branch not in branches(repository.state()):
            repository.fork(branch, source, writer=os.urandom(16).hex())
    except CkptError as error:
        return dump_json(cast("JsonValue", error.to_document())).decode()
    return ""
