"""A pipeline over some of the ranks: its schedule, and what its stages hold in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as c10d
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from ckptcoord.errors import ConfigError
from ckptcoord.trainers.arguments import PipelineSchedule
from ckptcoord.trainers.pipeline import tell
from ckptcoord.trainers.rng import preserved_rng

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from ckptcoord.trainers.mesh import Place

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
        loss_of: the mean loss of some samples: of the last stage's output and their targets.
    """

    stage: nn.Module
    place: Place
    device: torch.device
    schedule: PipelineSchedule
    loss_of: Callable[[Any, torch.Tensor], torch.Tensor]
    _parts: int = 1  # by which the loss of a microbatch is divided
    _made: dict[bool, tuple[object, Schedule]] = field(default_factory=dict)

    def run(
        self,
        inputs: Inputs,
        targets: torch.Tensor,
        microbatches: int,
        *,
        share: int = 1,
        training: bool,
    ) -> torch.Tensor:
        """Forwards, and backwards in training. Collective over the stages.

        Returns:
            On the last stage, the batch's mean loss over `share`, detached; zero on the others.

        Raises:
            ConfigError: the batch cannot be cut into equal microbatches, or there are too few.
        """
        index, last = self.place.index, self.place.size - 1
        self._check(len(targets), microbatches, training=training)
        schedule = self._schedule(inputs, microbatches, training=training)
        self._parts = microbatches * share
        losses: list[torch.Tensor] = []
        given = inputs if index == 0 else ()
        wanted: dict[str, Any] = {"target": targets, "losses": losses} if index == last else {}
        if training:
            schedule.step(*given, **wanted, return_outputs=False)
        else:
            schedule.eval(*given, **wanted)
        zero = torch.zeros((), device=self.device)
        return sum((loss.detach() for loss in losses), zero)

    def _check(self, samples: int, microbatches: int, *, training: bool) -> None:
        if samples % microbatches:
            raise ConfigError(
                field="pipeline_microbatches",
                why=f"is {microbatches}, and a batch has {samples} samples",
                help="Make per_device_train_batch_size a multiple of it",
            )
        steady = training and self.schedule is PipelineSchedule.ONE_F_ONE_B
        if steady and microbatches < self.place.size:
            raise ConfigError(
                field="pipeline_microbatches",
                why=f"is {microbatches}, and 1f1b needs as many as there are stages, "
                f"{self.place.size}",
                help="Raise it, or set pipeline_schedule to gpipe",
            )

    def _schedule(self, inputs: Inputs, microbatches: int, *, training: bool) -> Schedule:
        """For inputs of these shapes; made anew where the last ones had others."""
        shapes = (microbatches, [(one.shape, one.dtype) for one in inputs])
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
        # Torch would divide the sum of several batches again and again.
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
                output = self._output_of(taken)
                given = tuple(output) if isinstance(output, list | tuple) else (output,)
            outline = [[o.dtype, list(o.shape), o.requires_grad] for o in given] if here else None
            told: Any = tell(outline, source=self.place.ranks[place], group=self.place.words)
            if place + 1 == self.place.index:
                taken = tuple(
                    torch.zeros(shape, dtype=dtype, device=self.device, requires_grad=grad)
                    for dtype, shape, grad in told
                )
        return taken, given

    def _output_of(self, taken: Inputs) -> Any:  # noqa: ANN401 (the model's)
        was_training = self.stage.training
        self.stage.eval()  # batch norms count nothing
        with preserved_rng():
            output = self.stage(*taken)
        self.stage.train(was_training)
        return output


@dataclass(frozen=True, slots=True)
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
