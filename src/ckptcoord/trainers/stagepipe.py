"""A pipeline over some of the ranks: its schedule, and what its stages hold in common."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as c10d
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from ckptcoord.dist.rng import preserved_rng
from ckptcoord.errors import ConfigError
from ckptcoord.trainers.arguments import PipelineSchedule
from ckptcoord.trainers.wire import broadcast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ckptcoord.trainers.mesh import Place
    from ckptcoord.trainers.stages import Stage, Tie

    Schedule: TypeAlias = Schedule1F1B | ScheduleGPipe

Inputs: TypeAlias = "tuple[torch.Tensor, ...]"


@dataclass(slots=True, kw_only=True)
class StagePipe:
    """Batches through the stages of one group of ranks, microbatch by microbatch.

    Attributes:
        stage: this rank's.
        place: of this rank among the stages.
        device: of the stage.
        schedule: of training; evaluation has no backward to order.
        microbatches: that a batch of training is cut into; one of evaluation stays whole.
        loss_of: the mean loss of some samples: of the last stage's output and their targets.
    """

    stage: Stage
    place: Place
    device: torch.device
    schedule: PipelineSchedule
    microbatches: int
    loss_of: Callable[[Any, torch.Tensor], torch.Tensor]
    _parts: int = 1  # by which the loss of a microbatch is divided
    _made: dict[bool, tuple[object, Schedule]] = field(default_factory=dict)

    def run(
        self, inputs: Inputs, targets: torch.Tensor, *, share: int = 1, training: bool
    ) -> torch.Tensor:
        """Forwards, and backwards in training. Collective over the stages.

        Returns:
            On the last stage, the batch's mean loss over `share`, detached; zero on the others.

        Raises:
            ConfigError: the batch cannot be cut into equal microbatches.
        """
        count = self.microbatches if training else 1
        if len(targets) % count:
            raise ConfigError(
                field="train_dataloader",
                why=f"gave a batch of {len(targets)} samples, which cannot be cut into {count} "
                "equal microbatches",
            )
        self._parts = count * share
        run = self._run_alone if self.place.size == 1 else self._run_stages
        losses = run(inputs, targets, count, training=training)
        zero = torch.zeros((), device=self.device)
        return sum((loss.detach() for loss in losses), zero)

    def _run_alone(
        self, inputs: Inputs, targets: torch.Tensor, microbatches: int, *, training: bool
    ) -> list[torch.Tensor]:
        losses = []
        cut = zip(*(one.chunk(microbatches) for one in (*inputs, targets)), strict=True)
        for *parts, target in cut:
            loss = self._part_of_loss(self.stage(*parts), target)
            if training:
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss)
        return losses

    def _run_stages(
        self, inputs: Inputs, targets: torch.Tensor, microbatches: int, *, training: bool
    ) -> list[torch.Tensor]:
        """The microbatches' losses, on the last stage."""
        index, last = self.place.index, self.place.size - 1
        schedule = self._schedule(inputs, microbatches, training=training)
        losses: list[torch.Tensor] = []
        given = inputs if index == 0 else ()
        wanted: dict[str, Any] = {"target": targets, "losses": losses} if index == last else {}
        if training:
            schedule.step(*given, **wanted, return_outputs=False)
        else:
            schedule.eval(*given, **wanted)
        return losses

    def _schedule(self, inputs: Inputs, microbatches: int, *, training: bool) -> Schedule:
        """For inputs of these shapes; made anew where the last ones had others. Collective then."""
        shapes = [(one.shape, one.dtype) for one in inputs]
        made = self._made.get(training)
        if made is not None and made[0] == shapes:
            return made[1]
        taken, given = self._trial(tuple(one.chunk(microbatches)[0] for one in inputs))
        stage = PipelineStage(
            self.stage,
            self.place.index,
            self.place.size,
            self.device,
            input_args=taken,
            output_args=given,
            group=self.place.group,
        )
        steady = training and self.schedule is PipelineSchedule.ONE_F_ONE_B
        kind = Schedule1F1B if steady else ScheduleGPipe
        # The loss is divided by their number already; torch would divide sums of several batches
        # again and again.
        schedule = kind(stage, microbatches, loss_fn=self._part_of_loss, scale_grads=False)
        self._made[training] = shapes, schedule
        return schedule

    def _part_of_loss(self, output: Any, targets: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 (the model's)
        return self.loss_of(output, targets) / self._parts

    def _trial(self, inputs: Inputs) -> tuple[Inputs, Inputs]:
        """What this stage takes and gives, found out by a microbatch that leaves no trace.

        Torch would find it out too, but draw random numbers and count the batch in batch norms once
        in each process: a resumed run would not be the undisturbed one.
        """
        taken = inputs
        given: Inputs = ()
        for place in range(self.place.size):
            here = place == self.place.index
            if here:
                with preserved_rng(), _preserved_buffers(self.stage):
                    output = self.stage(*taken)
                given = tuple(output) if isinstance(output, list | tuple) else (output,)
            outline = [[o.dtype, list(o.shape), o.requires_grad] for o in given] if here else None
            told: Any = broadcast(outline, source=self.place.ranks[place], group=self.place.words)
            if place + 1 == self.place.index:
                taken = tuple(
                    torch.zeros(shape, dtype=dtype, device=self.device, requires_grad=grad)
                    for dtype, shape, grad in told
                )
        return taken, given


@dataclass(frozen=True, slots=True, kw_only=True)
class TiedCopy:
    """This rank's copy of a parameter that several stages hold.

    Attributes:
        parameter: the copy.
        group: the ranks that hold one.
        ranks: they, by stage.
    """

    parameter: torch.Tensor
    group: Any
    ranks: tuple[int, ...]

    @property
    def first(self) -> bool:
        """Whether this rank answers for all copies."""
        return c10d.get_rank() == self.ranks[0]

    def share(self) -> None:
        """Give all copies the first one's value. Collective over the group."""
        c10d.broadcast(self.parameter.detach(), src=self.ranks[0], group=self.group)

    def sum_gradients(self) -> None:
        """Give each copy the sum. Collective over the group."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        c10d.all_reduce(self.parameter.grad, group=self.group)


def tied_copies(ties: Sequence[Tie], lines: Sequence[Sequence[int]], rank: int) -> list[TiedCopy]:
    """This rank's copies, and groups for them. Collective over all ranks of the job.

    Args:
        ties: of the stages.
        lines: the ranks of each pipeline, by stage.
        rank: this one's, in the job.
    """
    groups: dict[tuple[int, ...], Any] = {}
    copies = []
    for tie in ties:
        for line in lines:  # all ranks make all groups
            ranks = tuple(line[stage] for stage in tie.stages)
            if ranks not in groups:
                groups[ranks] = c10d.new_group(list(ranks))
            if rank in ranks:
                copies.append(TiedCopy(parameter=tie.parameter, group=groups[ranks], ranks=ranks))
    return copies


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
