"""BaseTrainer: everything about training but how state is shared between ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset

from ckptcoord.codec.digest import blake3_digest
from ckptcoord.core.jsonio import dump_json
from ckptcoord.core.sharing import OnWorldSizeChange, SharingPattern, StateComponent
from ckptcoord.dist.config import CoordinatorConfig
from ckptcoord.dist.coordinator import CheckpointCoordinator
from ckptcoord.dist.optimizer import OptimizerState
from ckptcoord.dist.rng import RNGState, preserved_rng
from ckptcoord.errors import ConfigError
from ckptcoord.plan.lineage import Compression
from ckptcoord.trainers.batch import loss_of, sample_count, to_device
from ckptcoord.trainers.beginning import Fresh
from ckptcoord.trainers.callbacks import (
    CallbackList,
    FlowCallback,
    ProgressCallback,
    TrainerCallback,
)
from ckptcoord.trainers.data import ResumableLoader
from ckptcoord.trainers.evaluation import Evaluations
from ckptcoord.trainers.foreign import adopt_loader, length_of
from ckptcoord.trainers.handoff import take_over
from ckptcoord.trainers.loop import TrainingRun, TrainOutput
from ckptcoord.trainers.ranks import OneRank, Ranks
from ckptcoord.trainers.schedule import default_optimizer, default_scheduler, lr_factor
from ckptcoord.trainers.signals import StopSignals
from ckptcoord.trainers.state import TrainerControl, TrainerState

if TYPE_CHECKING:
    from ckptcoord.dist.report import SaveReport
    from ckptcoord.trainers.arguments import TrainingArguments

# Where a run is written and how it began say nothing about what it computes.
_NOT_HASHED = {
    "output_dir",
    "run_name",
    "branch",
    "resume_from_checkpoint",
    "save_timeout_s",
    "background_saves",
    "save_queue_depth",
    "save_deferred",
    "save_staging_bytes",
    "save_io_budget",
    "on_save_failure",
    "preemption_grace_s",
}


class BaseTrainer(ABC):
    """Trains a model and checkpoints all that a bit-exact resume needs.

    A subclass declares what it holds and how it is shared (`get_state_components`,
    `get_process_groups`), and may replace any of: `compute_loss`, `get_train_dataloader`,
    `evaluate`, `place_model`, `wrap_model`, `training_step`, `clip_gradients`.

    A run that is interrupted and resumed gives the same weights, optimizer state and losses as an
    undisturbed one, bit for bit, given the same arguments, number of ranks, hardware, thread
    counts and deterministic kernels.

    Args:
        model: the plain module; it is moved to the trainer's device.
        args: how to train.
        train_dataset: has a length and samples by index; None where `get_train_dataloader` is
            overridden, or on ranks that receive their batches (`dispatch_batches`).
        eval_dataset: likewise.
        data_collator: makes a batch of a list of samples; by default torch's.
        optimizer: over the model's parameters; by default AdamW.
        scheduler: of its learning rate; by default as `lr_scheduler_type` says.
        callbacks: called after the built-in ones, in order.

    Attributes:
        model: the plain module.
        model_wrapped: what is called in training.
        state: progress.
        control: what should happen next.
        fresh: what begins anew where the run goes on from a checkpoint.
        stopped_by_signal: the signal that ended the last `train()`; None: none.
        evaluations: gives out their batches.

    Raises:
        ConfigError: the pieces do not fit together.
    """

    def __init__(  # noqa: PLR0913, PLR0917 (Hugging Face's own order)
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        train_dataset: Any = None,  # noqa: ANN401 (any map-style dataset)
        eval_dataset: Any = None,  # noqa: ANN401 (any map-style dataset)
        data_collator: Callable[[list[Any]], Any] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        callbacks: Iterable[TrainerCallback] = (),
    ) -> None:
        self.args = args
        self.ranks = self.join_ranks()
        self.args, anew = take_over(args, self.ranks)
        self.device = self.pick_device()
        self.model = self.place_model(model)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.data_collator = data_collator
        self.train_dataloader = adopt_loader(
            self.get_train_dataloader(), self.ranks.rank, self.ranks.size
        )
        self.state = self._new_state()
        self.control = TrainerControl()
        self.optimizer = self.create_optimizer(optimizer)
        self._makes_schedule = scheduler is None
        self.lr_scheduler = scheduler or default_scheduler(
            self.optimizer, self.args, self.state.max_steps
        )
        self.fresh = Fresh(anew, self.optimizer, self.lr_scheduler)
        self.rng = RNGState(self.args.seed)
        self.model_wrapped = self.wrap_model(self.model)
        self.callbacks = CallbackList((FlowCallback(), ProgressCallback(), *callbacks))
        self.stopped_by_signal: int | None = None
        self.evaluations = Evaluations(self.ranks)
        self._coordinator: CheckpointCoordinator | None = None
        self._reports: SimpleQueue[SaveReport] = SimpleQueue()
        self.announce("on_init_end")

    # --- what a subclass says --------------------------------------------------------------------

    @abstractmethod
    def get_state_components(self) -> list[StateComponent]:
        """What to save, and who shares it. Called once the trainer is complete."""

    @abstractmethod
    def get_process_groups(self) -> Mapping[str, object]:
        """The process groups that PER_GROUP components name."""

    def join_ranks(self) -> Ranks:
        """Called first: start what the ranks need to talk to one another."""
        return OneRank()

    def pick_device(self) -> torch.device:
        """Where the model lives."""
        return torch.device("cpu" if self.args.use_cpu or not torch.cuda.is_available() else "cuda")

    def place_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """What of the model this rank trains, on its device; called before anything is made of it.

        The optimizer is made of its parameters.
        """
        return model.to(self.device)

    def create_optimizer(self, given: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
        """Of what this rank trains: the constructor's, or AdamW where it was given none."""
        return given or default_optimizer(self.model, self.args)

    def wrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """What is called in training; it must leave the model's parameters the same objects."""
        return model

    def accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """Around the forward and backward of a batch; `last` of those of one optimizer step."""
        return nullcontext()

    def get_train_dataloader(self) -> Any:  # noqa: ANN401 (any loader)
        """Anything with iter() and state_dict/load_state_dict, and len() unless max_steps is given.

        `set_epoch` is called if it has that. Iterating gives the rest of the epoch from its state
        on, the same number of batches on every rank; where `batches_left` says how many these are,
        steps are counted right on another number of ranks, too. torchdata's StatefulDataLoader, and
        a DataLoader over Hugging Face's IterableDataset, are wrapped (`trainers.foreign`).
        """
        return self.make_loader(self.ranks.rank, self.ranks.size)

    def make_loader(self, rank: int, world_size: int) -> ResumableLoader:
        """The default loader for one of so many ranks."""
        return ResumableLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            rank=rank,
            world_size=world_size,
            seed=self.args.seed,
            num_workers=self.args.dataloader_num_workers,
            collate_fn=self.data_collator,
            pin_memory=self.device.type == "cuda",
        )

    def compute_loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:  # noqa: ANN401 (a batch)
        """The loss of a batch: a mapping is passed by keyword, a list or tuple by position."""
        if isinstance(batch, Mapping):
            return loss_of(model(**batch))
        if isinstance(batch, list | tuple):
            return loss_of(model(*batch))
        return loss_of(model(batch))

    def training_step(self, batches: Sequence[Any]) -> torch.Tensor:
        """Forward and backward of the batches of one optimizer step, whose losses count alike.

        Gradients are left ready for clipping; returned is the mean loss, detached.
        """
        losses = []
        for place, raw in enumerate(batches, start=1):
            last = place == len(batches)
            batch = to_device(raw, self.device)
            with self.accumulating(last=last):
                loss = self.compute_loss(self.model_wrapped, batch) / len(batches)
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            if not last:
                self.announce("on_substep_end")
        return sum(losses[1:], losses[0])

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Scale gradients to a norm of `max_norm` at most; the norm they had, of the whole model.

        Collective where ranks hold parts of the model.
        """
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    @property
    def data_ranks(self) -> int:
        """How many ranks work on batches of their own; the others share theirs."""
        return self.ranks.size

    # --- what anyone may call --------------------------------------------------------------------

    def train(self) -> TrainOutput:
        """Train to the end, from where `resume_from_checkpoint` says. Collective.

        SIGTERM and SIGUSR1, to any rank, end it on every rank after the step under way, or the
        batch of an evaluation, with one common save, if that fits what is left of
        `preemption_grace_s` (none where save_strategy is no); `stopped_by_signal` then says so,
        and `exit_code` what to exit with. Otherwise every save has ended when it returns. Seeds
        the global generators (by seed and rank) unless it resumes.

        Raises:
            CkptError: a save or load failed; training does not go on without. Of a save in the
                background it is raised at a later step boundary, on all ranks at the same one.
        """
        with StopSignals() as signals, self.evaluations.heeding(signals):
            return TrainingRun(self, signals).run()

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:  # noqa: ANN401 (any dataset)
        """`eval_loss`, the mean over all samples of all ranks. Collective; draws leave no trace.

        NaN, where a signal that ends the run under way came before its last batch: the run takes
        no notice of what is returned then.

        Raises:
            ConfigError: there is nothing to evaluate on.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ConfigError(
                field="eval_dataset",
                why="is None, and an evaluation is due",
                help="Pass eval_dataset, or set eval_strategy to no",
            )
        with preserved_rng(), torch.no_grad():
            total, samples = self._sum_losses(dataset)
        total, samples = self.ranks.total((total, samples))
        if self.evaluations.was_cut:
            return {"eval_loss": math.nan}
        metrics = {"eval_loss": total / samples if samples else math.nan}
        self.announce("on_evaluate", metrics=metrics)
        return metrics

    def named_optimizer(self) -> OptimizerState:
        """The optimizer's state by the names of parameters, which any layout of ranks can load."""
        return OptimizerState(self.optimizer, self.unwrapped_model())

    def unwrapped_model(self) -> torch.nn.Module:
        """The plain module."""
        return self.model

    @property
    def coordinator(self) -> CheckpointCoordinator:
        """Made at the first use, which is collective."""
        if self._coordinator is None:
            self._coordinator = self.make_coordinator(self.get_state_components())
        return self._coordinator

    def make_coordinator(self, components: Sequence[StateComponent]) -> CheckpointCoordinator:
        """A coordinator for these components with the arguments' settings. Collective."""
        args = self.args
        hashed = args.model_dump(mode="json", exclude=_NOT_HASHED)
        return CheckpointCoordinator(
            components,
            self.get_process_groups(),
            output_dir=args.output_dir,
            config=CoordinatorConfig(
                compression=Compression(
                    level=args.compression,
                    reanchor_interval=args.reanchor_interval,
                    compress_anchors=args.compress_anchors,
                ),
                branch=args.branch,
                max_shard_size=args.max_shard_size,
                timeout_s=args.save_timeout_s,
                retention=args.retention,
                training_args_hash=str(blake3_digest(dump_json(hashed))),
                queue_depth=args.save_queue_depth,
                deferred=args.save_deferred.setting,
                staging_bytes=args.save_staging_bytes,
                on_failure=args.on_save_failure,
                io_budget=args.save_io_budget,
                on_saved=self._reports.put,
            ),
        )

    def take_reports(self) -> list[SaveReport]:
        """Of the saves of this rank that have ended since the last call, in order."""
        return [self._reports.get() for _ in range(self._reports.qsize())]

    def announce(self, event: str, **kwargs: object) -> None:
        """Call every callback's method of that name."""
        self.control = self.callbacks.call(
            event,
            self.args,
            self.state,
            self.control,
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            train_dataloader=self.train_dataloader,
            **kwargs,
        )

    def close(self) -> None:
        """End the coordinator and the loader's workers, and let go of the wrapped model."""
        try:
            if self._coordinator is not None:
                self._coordinator.close()
        finally:
            close_loader = getattr(self.train_dataloader, "close", None)
            if callable(close_loader):
                close_loader()
            self.model_wrapped = self.model

    # --- helpers ---------------------------------------------------------------------------------

    def _get_dataset_sharing_pattern(self) -> SharingPattern:
        """GLOBAL where rank 0 reads for all, else each rank has its own position."""
        return SharingPattern.GLOBAL if self.args.dispatch_batches else SharingPattern.PER_RANK

    def _standard_components(
        self, shared: SharingPattern, dataset: SharingPattern
    ) -> list[StateComponent]:
        """Model, optimizer, scheduler and progress alike; the loader; each rank's generators."""
        own = SharingPattern.PER_RANK
        validate = shared is SharingPattern.REPLICATED
        return [
            StateComponent("model", self.unwrapped_model(), shared, validate_replication=validate),
            StateComponent("optimizer", self.named_optimizer(), shared),
            StateComponent("scheduler", self.lr_scheduler, shared),
            StateComponent("dataset", self.train_dataloader, dataset),
            StateComponent("progress", self.state, shared),
            StateComponent("rng", self.rng, own, on_world_size_change=OnWorldSizeChange.OWN),
        ]

    def _new_state(self) -> TrainerState:
        state = TrainerState(
            is_world_process_zero=self.ranks.rank == 0,
            is_local_process_zero=self._is_first_on_node(),
        )
        self._count_steps(state)
        return state

    def recount_steps(self) -> None:
        """After a load: count the epoch under way, and all to come, in steps of these ranks.

        Where these are as many as saved it, and their batches as large, nothing changes.
        """
        state = self.state
        batches = getattr(self.train_dataloader, "batches_left", None)
        if batches is not None:
            left = math.ceil(batches / self.args.gradient_accumulation_steps)
            state.steps_in_epoch = state.steps_per_epoch - left
        before = state.max_steps
        self._count_steps(state)
        if self._makes_schedule and state.max_steps != before:
            self._stretch_schedule(state.max_steps)

    def _count_steps(self, state: TrainerState) -> None:
        """Where training ends, from where the state is."""
        per_epoch, max_steps = self._steps_per_epoch(), self.args.max_steps
        state.steps_per_epoch = per_epoch
        if max_steps < 0:
            max_steps = math.ceil(self.args.num_train_epochs * per_epoch) + state.step_offset
        state.max_steps = max_steps
        state.num_train_epochs = math.ceil((max_steps - state.step_offset) / per_epoch)

    def _steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch; of a stream that does not know, of the whole run."""
        batches = length_of(self.train_dataloader)
        if batches is None and self.args.max_steps < 0:
            raise ConfigError(
                field="max_steps",
                why="is not given, and the train_dataloader has no length to count epochs by",
            )
        if batches is None:
            return max(1, self.args.max_steps)
        if not batches:
            raise ConfigError(
                field="train_dataset",
                why="has too few samples for one batch on every rank",
                help="Lower per_device_train_batch_size or start fewer ranks",
            )
        return math.ceil(batches / self.args.gradient_accumulation_steps)

    def _stretch_schedule(self, max_steps: int) -> None:
        """Have the default schedule end at another step than it was made for."""
        kind, warmup = self.args.lr_scheduler_type, self.args.warmup_steps

        def factor(step: int) -> float:
            return lr_factor(kind, step, warmup, max_steps)

        if isinstance(self.lr_scheduler, LambdaLR):
            self.lr_scheduler.lr_lambdas = [factor for _ in self.lr_scheduler.lr_lambdas]

    def _is_first_on_node(self) -> bool:
        return self.ranks.rank == 0

    def _sum_losses(self, dataset: Any) -> tuple[float, float]:  # noqa: ANN401 (any dataset)
        """This rank's part of the data: the sum of its samples' losses, and their number.

        The plain model is called: ranks may have different numbers of batches.
        """
        own = Subset(dataset, range(self.ranks.rank, len(dataset), self.ranks.size))
        size = self.args.per_device_eval_batch_size
        loader: DataLoader[Any] = DataLoader(own, batch_size=size, collate_fn=self.data_collator)
        was_training = self.model.training
        self.model.eval()
        total = samples = 0.0
        for batch in self.evaluations.batches(loader):
            count = sample_count(batch)
            loss = self.compute_loss(self.model, to_device(batch, self.device))
            total += float(loss) * count
            samples += count
        self.model.train(was_training)
        return total, samples
