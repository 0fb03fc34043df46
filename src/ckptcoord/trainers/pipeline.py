"""PipelineTrainer: each rank trains one stage of the model, microbatch by microbatch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as c10d
from torch.nn import functional

from ckptcoord.core.sharing import SharingPattern
from ckptcoord.errors import ConfigError
from ckptcoord.trainers.arguments import PipelineSchedule
from ckptcoord.trainers.batch import to_device
from ckptcoord.trainers.ddp import DDPTrainer
from ckptcoord.trainers.gradients import clip
from ckptcoord.trainers.grouploader import GroupLoader
from ckptcoord.trainers.mesh import Place, whole_job
from ckptcoord.trainers.schedule import default_optimizer
from ckptcoord.trainers.sharded import redeclared, sum_losses
from ckptcoord.trainers.stagepipe import StagePipe, tied_copies
from ckptcoord.trainers.stages import Names, Stage, keep_only, split_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from ckptcoord.core.sharing import StateComponent

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
        stages = whole_job(self.ranks)
        return self._take_stage(model, stages, [stages.ranks])

    def _take_stage(self, model: nn.Module, stages: Place, lines: Sequence[Sequence[int]]) -> Stage:
        """This rank's stage on its device, and what it takes to train it. Collective over the job.

        Args:
            model: the whole one.
            stages: of this rank's pipeline.
            lines: the ranks of each pipeline of the job, by stage.

        Raises:
            ConfigError: batch, microbatches and stages do not fit together.
        """
        self._check_settings(stages.size)
        parts = self.pipeline_split(model, stages.size)
        if len(parts) != stages.size:
            raise ConfigError(
                field="pipeline_split", why=f"made {len(parts)} stages for {stages.size} ranks"
            )
        names = Names(model)
        config = getattr(model, "config", None)
        stage = Stage(parts[stages.index], names, config=config).to(self.device)
        self._stages = stages
        self._default_optimizer = keep_only(default_optimizer(model, self.args), stage)
        self._copies = tied_copies(names.ties(parts), lines, self.ranks.rank)
        for copy in self._copies:
            copy.share()
        self._pipe = StagePipe(
            stage=stage,
            place=stages,
            device=self.device,
            schedule=self.args.pipeline_schedule,
            microbatches=self.args.pipeline_microbatches or stages.size,
            loss_of=self.output_loss,
        )
        return stage

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """The stage itself: no other rank has these parameters."""
        return model

    def create_optimizer(self, given: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
        """What of the whole model's optimizer steps this stage."""
        return self._default_optimizer if given is None else keep_only(given, self.model)

    def get_train_dataloader(self) -> Any:  # noqa: ANN401 (any loader)
        """Rank 0 reads for all."""
        source = self.make_loader(0, 1) if self._stages.index == 0 else None
        return GroupLoader(source, self._stages)

    @property
    def data_ranks(self) -> int:
        """All ranks work on one batch."""
        return 1

    def training_step(self, batches: Sequence[Any]) -> torch.Tensor:
        """The batches through the pipeline; the last stage's loss, on all ranks. Collective."""
        losses, stages = [], self._stages
        for place, raw in enumerate(batches, start=1):
            inputs, targets = self.split_batch(to_device(raw, self.device))
            losses.append(self._pipe.run(inputs, targets, share=len(batches), training=True))
            if place < len(batches):
                self.announce("on_substep_end")
        for copy in self._copies:
            copy.sum_gradients()
        loss = sum(losses[1:], losses[0])
        if stages.size > 1:
            c10d.broadcast(loss, src=stages.ranks[-1], group=stages.group)
        return loss

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """By the norm over all stages; what several hold counts once. Collective."""
        return clip(self.model.parameters(), max_norm, self._stages, self._counts)

    def get_state_components(self) -> list[StateComponent]:
        """Of model and optimizer each rank has its part, by full names; see docs/pipeline.md."""
        standard = self._standard_components(SharingPattern.REPLICATED, SharingPattern.GLOBAL)
        own = {"sharing_pattern": SharingPattern.PER_RANK, "validate_replication": False}
        return redeclared(standard, {"model": own, "optimizer": own})

    # --- helpers ---------------------------------------------------------------------------------

    def _check_settings(self, stages: int) -> None:
        """Raises ConfigError where batch, microbatches and stages do not fit together."""
        args = self.args
        count = args.pipeline_microbatches or stages
        if args.per_device_train_batch_size % count:
            raise ConfigError(
                field="per_device_train_batch_size",
                why=f"is {args.per_device_train_batch_size}, no multiple of the {count} "
                "microbatches it is cut into",
                help="Change it, or pipeline_microbatches",
            )
        one_by_one = args.pipeline_schedule is PipelineSchedule.ONE_F_ONE_B
        if one_by_one and count < stages:
            raise ConfigError(
                field="pipeline_microbatches",
                why=f"is {count}, and 1f1b needs as many as there are stages, {stages}",
                help="Raise it, or set pipeline_schedule to gpipe",
            )

    def _counts(self, parameter: torch.Tensor) -> bool:
        """Whether this stage answers for a parameter."""
        return not any(copy.parameter is parameter and not copy.first for copy in self._copies)

    def _sum_losses(self, dataset: Any) -> tuple[float, float]:  # noqa: ANN401 (any dataset)
        """As BaseTrainer's, of all samples, on the last rank; nothing elsewhere."""
        return self._sum_losses_of(dataset, Place())

    def _sum_losses_of(self, dataset: Any, data: Place) -> tuple[float, float]:  # noqa: ANN401 (any dataset)
        """Of one part of the data, on the last stage."""
        sums = sum_losses(self, dataset, self._evaluation_loss, data, self._stages)
        return sums if self._stages.index == self._stages.size - 1 else (0.0, 0.0)

    def _evaluation_loss(self, batch: Any) -> torch.Tensor:  # noqa: ANN401 (a batch)
        return self._pipe.run(*self.split_batch(batch), training=False)
