"""PipelineTrainer: each rank trains one stage of the model, microbatch by microbatch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as c10d
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional
from torch.utils.data import DataLoader

from ckptcoord.core.sharing import OnWorldSizeChange, SharingPattern, StateComponent
from ckptcoord.errors import CkptError, ConfigError
from ckptcoord.trainers.arguments import PipelineSchedule
from ckptcoord.trainers.batch import sample_count, to_device
from ckptcoord.trainers.data import StatefulSampler, batches_in
from ckptcoord.trainers.ddp import DDPTrainer
from ckptcoord.trainers.ranks import TorchRanks
from ckptcoord.trainers.rng import preserved_rng
from ckptcoord.trainers.schedule import default_optimizer
from ckptcoord.trainers.stages import Names, Stage, keep_only, split_layers
from ckptcoord.trainers.wire import pack, plain, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from ckptcoord.trainers.data import ResumableLoader
    from ckptcoord.trainers.stages import Tie

    Inputs = tuple[torch.Tensor, ...]


class PipelineTrainer(DDPTrainer):
    """Trains a model whose stages are on the ranks that torchrun started, one on each.

    Pass the whole model, the same on every rank, and let go of it: a rank keeps its own stage. What
    the stages are says `pipeline_split`; by default the layers of an `nn.Sequential`, or of a model
    with `pipeline_layers()`, are dealt out evenly. Parameters keep their names in the whole model,
    and so does what the optimizer holds of them.

    A batch of `per_device_train_batch_size` samples is the whole pipeline's. Rank 0 reads it; it is
    cut into `pipeline_microbatches` equal parts, and its loss is the mean of theirs. With one
    microbatch the loss is that of one process, bit for bit, unless something draws random numbers:
    each rank draws from generators of its own.

    Weights that several stages hold (an embedding that is the output layer too) get the sum of
    their gradients.

    Override `pipeline_split`, `split_batch` and `output_loss` as the model needs. An optimizer of
    one's own is made of the whole model's parameters. On one rank it trains without a pipeline.
    """

    # --- what a model may need to be said of it --------------------------------------------------

    def pipeline_split(self, model: nn.Module, stages: int) -> list[nn.Module]:
        """The model as so many modules, each called with the output of the one before.

        They are made of modules, parameters and buffers of the model; a stage gives one tensor or a
        tuple of tensors with the samples in the first dimension.
        """
        return split_layers(model, stages)

    def split_batch(self, batch: Any) -> tuple[Inputs, torch.Tensor]:  # noqa: ANN401 (a batch)
        """What the first stage is called with, and what the last one's output is compared with.

        By default the targets are `labels` of a mapping, and what else it holds are inputs in its
        order; or they are the last of a list or tuple.

        Raises:
            ConfigError: a batch of another form.
        """
        if isinstance(batch, Mapping) and "labels" in batch:
            return tuple(v for name, v in batch.items() if name != "labels"), batch["labels"]
        if isinstance(batch, list | tuple) and len(batch) > 1:
            return tuple(batch[:-1]), batch[-1]
        raise ConfigError(
            field="train_dataset",
            why=f"gives a {type(batch).__name__} that is neither a mapping with labels nor a tuple "
            "of inputs and targets",
            help="Override split_batch()",
        )

    def output_loss(self, output: Any, targets: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 (the model's)
        """The mean loss of some samples: by default cross entropy, classes in the last place."""
        return functional.cross_entropy(output.flatten(0, -2), targets.flatten())

    # --- what the base class asks ----------------------------------------------------------------

    def place_model(self, model: nn.Module) -> nn.Module:
        """This rank's stage, as a `Stage`. Collective."""
        size, rank = self.ranks.size, self.ranks.rank
        self._check_settings()
        parts = self.pipeline_split(model, size)
        if len(parts) != size:
            raise ConfigError(
                field="pipeline_split", why=f"made {len(parts)} stages for {size} ranks"
            )
        names = Names(model)
        stage = Stage(parts[rank], names, config=getattr(model, "config", None)).to(self.device)
        self._default_optimizer = keep_only(default_optimizer(model, self.args), stage)
        self._ties = _live_ties(names.ties(parts), rank)
        for tie in self._ties:
            c10d.broadcast(tie.parameter.detach(), src=tie.first, group=tie.group)
        self._pipes: dict[bool, _Pipe] = {}
        return stage

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """The stage itself: no other rank has these parameters."""
        return model

    def create_optimizer(self, given: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
        """What of the whole model's optimizer steps this stage."""
        return self._default_optimizer if given is None else keep_only(given, self.model)

    def get_train_dataloader(self) -> Any:  # noqa: ANN401 (any loader)
        """Rank 0 reads for all."""
        if self.ranks.size == 1:
            return self.make_loader(0, 1)
        return SharedLoader(self.make_loader(0, 1) if self.ranks.rank == 0 else None, self._group)

    @property
    def data_ranks(self) -> int:
        """All ranks work on one batch."""
        return 1

    def training_step(self, batches: Sequence[Any]) -> torch.Tensor:
        """The batches through the pipeline; the last stage's loss, on all ranks. Collective."""
        losses = []
        for place, raw in enumerate(batches, start=1):
            losses.append(self._run(raw, self._microbatches, share=len(batches), training=True))
            if place < len(batches):
                self.announce("on_substep_end")
        for tie in self._ties:
            tie.sum_gradients()
        loss = sum(losses[1:], losses[0])
        if self.ranks.size > 1:
            c10d.broadcast(loss, src=self.ranks.size - 1)
        return loss

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """By the norm over all stages; what several hold counts once. Collective."""
        if self.ranks.size == 1:
            return super().clip_gradients(max_norm)
        counted_elsewhere = {
            id(tie.parameter) for tie in self._ties if tie.first != self.ranks.rank
        }
        parameters = [one for one in self.model.parameters() if one.grad is not None]
        own = [p.grad for p in parameters if p.grad is not None and id(p) not in counted_elsewhere]
        norm = float(torch.nn.utils.get_total_norm(own)) if own else 0.0
        (squares,) = self.ranks.total((norm**2,))
        total = torch.tensor(math.sqrt(squares), device=self.device)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
        return total

    def get_state_components(self) -> list[StateComponent]:
        """Of model and optimizer each rank has its part, by full names; see docs/pipeline.md."""
        own, shared = SharingPattern.PER_RANK, SharingPattern.REPLICATED
        return [
            StateComponent("model", self.model, own),
            StateComponent("optimizer", self.named_optimizer(), own),
            StateComponent("scheduler", self.lr_scheduler, shared),
            StateComponent("dataset", self.train_dataloader, SharingPattern.GLOBAL),
            StateComponent("progress", self.state, shared),
            StateComponent("rng", self.rng, own, on_world_size_change=OnWorldSizeChange.OWN),
        ]

    # --- helpers ---------------------------------------------------------------------------------

    @property
    def _stage(self) -> Stage:
        assert isinstance(self.model, Stage), "place_model made it"
        return self.model

    @property
    def _group(self) -> c10d.ProcessGroup | None:
        """Where words and batches travel."""
        return self.ranks.group if isinstance(self.ranks, TorchRanks) else None

    @property
    def _microbatches(self) -> int:
        return self.args.pipeline_microbatches or self.ranks.size

    def _check_settings(self) -> None:
        """Raises ConfigError where batch, microbatches and stages do not fit together."""
        args, count = self.args, self._microbatches
        if args.per_device_train_batch_size % count:
            raise ConfigError(
                field="per_device_train_batch_size",
                why=f"is {args.per_device_train_batch_size}, no multiple of the {count} "
                "microbatches it is cut into",
                help="Change it, or pipeline_microbatches",
            )
        one_by_one = args.pipeline_schedule is PipelineSchedule.ONE_F_ONE_B
        if one_by_one and count < self.ranks.size:
            raise ConfigError(
                field="pipeline_microbatches",
                why=f"is {count}, and 1f1b needs as many as there are stages, {self.ranks.size}",
                help="Raise it, or set pipeline_schedule to gpipe",
            )

    def _run(
        self,
        raw: Any,  # noqa: ANN401 (a batch)
        microbatches: int,
        *,
        share: int = 1,
        training: bool,
    ) -> torch.Tensor:
        """A batch through all stages; on the last, its loss over `share`, detached; else zero."""
        if sample_count(raw) % microbatches:
            raise ConfigError(
                field="train_dataloader",
                why=f"gave a batch of {sample_count(raw)} samples, which cannot be cut into "
                f"{microbatches} equal microbatches",
            )
        inputs, targets = self.split_batch(to_device(raw, self.device))
        self._parts = microbatches * share
        if self.ranks.size == 1:
            losses = self._run_alone(inputs, targets, microbatches, training=training)
        else:
            losses = self._pipe(inputs, microbatches, training=training).run(inputs, targets)
        zero = torch.zeros((), device=self.device)
        return sum((loss.detach() for loss in losses), zero)

    def _run_alone(
        self, inputs: Inputs, targets: torch.Tensor, microbatches: int, *, training: bool
    ) -> list[torch.Tensor]:
        losses = []
        cut = zip(*(one.chunk(microbatches) for one in (*inputs, targets)), strict=True)
        for *parts, target in cut:
            loss = self._part_of_loss(self.model(*parts), target)
            if training:
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss)
        return losses

    def _part_of_loss(self, output: Any, targets: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 (the model's)
        return self.output_loss(output, targets) / self._parts

    def _pipe(self, inputs: Inputs, microbatches: int, *, training: bool) -> _Pipe:
        """The schedule for inputs of these shapes. Collective where the last one had others."""
        shapes = tuple((one.shape, one.dtype) for one in inputs)
        pipe = self._pipes.get(training)
        if pipe is None or pipe.shapes != shapes:
            taken, given = self._trial(tuple(one.chunk(microbatches)[0] for one in inputs))
            stage = PipelineStage(
                self.model,
                self.ranks.rank,
                self.ranks.size,
                self.device,
                input_args=taken,
                output_args=given,
            )
            steady = training and self.args.pipeline_schedule is PipelineSchedule.ONE_F_ONE_B
            kind = Schedule1F1B if steady else ScheduleGPipe
            # The loss is divided by their number already; torch would divide sums of several
            # batches again and again.
            schedule = kind(stage, microbatches, loss_fn=self._part_of_loss, scale_grads=False)
            pipe = _Pipe(shapes=shapes, stage=stage, schedule=schedule, training=training)
            self._pipes[training] = pipe
        return pipe

    def _trial(self, inputs: Inputs) -> tuple[Inputs, Inputs]:
        """What each stage takes and gives, found by one microbatch of zeros that leaves no trace.

        Torch would find it out too, but with traces: buffers such as those of batch norm would
        count a batch more in each process, and a resumed run would not be the undisturbed one.
        """
        taken = inputs
        given: Inputs = ()
        for place in range(self.ranks.size):
            here = place == self.ranks.rank
            if here:
                with preserved_rng(), _preserved_buffers(self._stage):
                    output = self.model(*taken)
                given = tuple(output) if isinstance(output, list | tuple) else (output,)
            outline = [[o.dtype, list(o.shape), o.requires_grad] for o in given] if here else None
            told: Any = tell(outline, source=place, group=self._group)
            if place + 1 == self.ranks.rank:
                taken = tuple(
                    torch.zeros(shape, dtype=dtype, device=self.device, requires_grad=grad)
                    for dtype, shape, grad in told
                )
        return taken, given

    def _sum_losses(self, dataset: Any) -> tuple[float, float]:  # noqa: ANN401 (any dataset)
        """The sum of all samples' losses and their number, on the last rank; nothing elsewhere."""
        size, last = self.args.per_device_eval_batch_size, self.ranks.rank == self.ranks.size - 1
        loader: DataLoader[Any] | None = None
        if self.ranks.rank == 0:
            loader = DataLoader(dataset, batch_size=size, collate_fn=self.data_collator)
        was_training = self.model.training
        self.model.eval()
        total = samples = 0.0
        for batch in self._shared(loader):
            loss, count = self._run(batch, 1, training=False), sample_count(batch)
            total += float(loss) * count
            samples += count
        self.model.train(was_training)
        return (total, samples) if last else (0.0, 0.0)

    def _shared(self, loader: DataLoader[Any] | None) -> Iterator[Any]:
        if self.ranks.size == 1 and loader is not None:
            return iter(loader)
        return read_together(None if loader is None else iter(loader), self._group)


class SharedLoader:
    """Rank 0 reads, and every rank gets every batch. Declare it GLOBAL.

    All ranks know the position, which is what a `ResumableLoader` has: the epoch may go on with
    any trainer. All ranks iterate together.

    Args:
        source: on rank 0, a loader of whole batches; None elsewhere.
        group: where batches travel, as state trees and bytes; None: the default group.
    """

    def __init__(
        self, source: ResumableLoader | None, group: c10d.ProcessGroup | None = None
    ) -> None:
        self.source, self._group = source, group
        mine = None if source is None else [source.batch_size, source.sampler.state_dict()]
        facts: Any = tell(mine, source=0, group=group)
        self._batch_size, state = facts
        if source is None:
            names = ("length", "shuffle", "seed", "drop_last")
            self._sampler = StatefulSampler(**{name: state[name] for name in names})
        else:
            self._sampler = source.sampler

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self._batches(len(self._sampler))

    @property
    def batches_left(self) -> int:
        """Batches that the epoch has before it."""
        return self._batches(self._sampler.left)

    def __iter__(self) -> Iterator[Any]:
        mine = None if self.source is None else iter(self.source)
        for batch in read_together(mine, self._group):
            if self.source is None:
                self._sampler.advance(min(self._batch_size, self._sampler.left))
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; the current one keeps its position."""
        self._sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position; alike on all ranks."""
        return {"sampler": self._sampler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the saved loader stood.

        Raises:
            ConfigError: the saved run had another dataset length, seed or order.
        """
        self._sampler.load_state_dict(state_dict["sampler"])
        self.close()

    def close(self) -> None:
        """End rank 0's worker processes."""
        if self.source is not None:
            self.source.close()

    def _batches(self, samples: int) -> int:
        return batches_in(samples, self._batch_size, drop_last=self._sampler.drop_last)


def read_together(
    batches: Iterator[Any] | None, group: c10d.ProcessGroup | None = None
) -> Iterator[Any]:
    """Rank 0's batches, on every rank as they travelled. Collective, each of them and their end.

    Raises:
        CkptError: rank 0 could not read one; there, its own error.
    """
    while True:
        failure: Exception | None = None
        mine: list[Any] | None = None
        if batches is not None:
            try:
                mine = ["batch", plain(next(batches))]
            except StopIteration:
                mine = ["end", None]
            except Exception as error:  # noqa: BLE001 (whatever it is, the others wait)
                failure = error
                mine = ["error", f"{type(error).__name__}: {error}"]
        received: Any = tell(mine, source=0, group=group)
        kind, value = received
        if failure is not None:
            raise failure
        if kind == "error":
            raise CkptError(
                what=f"rank 0 could not read the next batch: {value}",
                help="Its own traceback is in rank 0's output",
            )
        if kind == "end":
            return
        yield value


def tell(value: object, *, source: int, group: c10d.ProcessGroup | None = None) -> object:
    """One rank's value on every rank, as a state tree and bytes. Collective."""
    packed = pack(value) if c10d.get_rank() == source else None
    length = torch.tensor([0 if packed is None else packed.numel()])
    c10d.broadcast(length, src=source, group=group)
    if packed is None:
        packed = torch.empty(int(length), dtype=torch.uint8)
    c10d.broadcast(packed, src=source, group=group)
    return unpack(packed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pipe:
    """A schedule, and the inputs it was made for: their shapes and dtypes, whole batches."""

    shapes: tuple[tuple[torch.Size, torch.dtype], ...]
    stage: PipelineStage
    schedule: Schedule1F1B | ScheduleGPipe
    training: bool

    def run(self, inputs: Inputs, targets: torch.Tensor) -> list[torch.Tensor]:
        """One batch, forwards and, in training, backwards; the microbatches' losses on the last."""
        losses: list[torch.Tensor] = []
        given = inputs if self.stage.is_first else ()
        wanted: dict[str, Any] = {"target": targets, "losses": losses}
        if not self.stage.is_last:
            wanted = {}
        if self.training:
            self.schedule.step(*given, **wanted, return_outputs=False)
        else:
            self.schedule.eval(*given, **wanted)
        return losses


@dataclass(frozen=True, slots=True, kw_only=True)
class _LiveTie:
    """This process's copy of a parameter that several stages hold.

    Attributes:
        parameter: the copy.
        group: the ranks that hold one.
        first: the lowest of them.
    """

    parameter: torch.Tensor
    group: Any
    first: int

    def sum_gradients(self) -> None:
        """Give each copy the sum. Collective over the group."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        c10d.all_reduce(self.parameter.grad, group=self.group)


def _live_ties(ties: Sequence[Tie], rank: int) -> list[_LiveTie]:
    """Those that this rank has a copy of, and groups for them. Collective over all ranks."""
    groups = {stages: c10d.new_group(stages) for stages in sorted({tie.stages for tie in ties})}
    return [
        _LiveTie(parameter=tie.parameter, group=groups[tie.stages], first=tie.stages[0])
        for tie in ties
        if rank in tie.stages
    ]


@contextmanager
def _preserved_buffers(stage: Stage) -> Iterator[None]:
    """Whatever happens inside to a stage's buffers is undone."""
    before = [
        (module, name, buffer, buffer.clone())
        for module in stage.all_modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, copy in before:
            buffer.copy_(copy)
            setattr(module, name, buffer)
