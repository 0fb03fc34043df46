"""HybridTrainer: data parallelism beside tensor parallelism, or pipelines, or both."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as c10d
from torch.distributed.tensor import DTensor

from ckptcoord.core.sharing import SharingPattern
from ckptcoord.dist.parallel import has_sparse_gradients, local, share_buffers
from ckptcoord.errors import ConfigError
from ckptcoord.trainers.base import BaseTrainer
from ckptcoord.trainers.callbacks import TrainerCallback
from ckptcoord.trainers.ddp import DDPTrainer
from ckptcoord.trainers.gradients import average, clip, complete_gradients
from ckptcoord.trainers.grouploader import GroupLoader
from ckptcoord.trainers.mesh import ParallelMesh, make_mesh
from ckptcoord.trainers.pipeline import PipelineTrainer
from ckptcoord.trainers.sharded import (
    JOB,
    check_optimizer,
    redeclared,
    sum_losses,
)
from ckptcoord.trainers.wire import broadcast

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from ckptcoord.core.sharing import StateComponent
    from ckptcoord.trainers.arguments import TrainingArguments


class HybridTrainer(PipelineTrainer):
    """Trains on a mesh of the ranks that torchrun started: dimensions "dp", "tp" and "pp".

    Ranks that differ in "dp" hold copies of the same and work on other batches; those that differ
    in "tp" hold parts of the same tensors (`parallelize`); those that differ in "pp" hold other
    stages (as in PipelineTrainer: `pipeline_split`, `split_batch`, `output_loss`). All ranks of a
    copy work on one batch of `per_device_train_batch_size` samples, which its first stage reads.

    Gradients are averaged over "dp" after the last backward of a step, in buckets laid out by the
    sizes of parameters. DistributedDataParallel has no part in it: it takes no DTensors, and a
    pipeline's schedule would have it reduce at each microbatch.

    Model and optimizer are PER_GROUP over "job", all ranks: what several of them hold alike is
    compared at each save, and written by one of them. The data position is PER_GROUP over the ranks
    that hold a copy together: the mesh's "tp" or "pp", or "model" where it has both.

    **Random numbers.** Ranks that differ in "tp" only draw the same ones, as dropout on what they
    all hold needs: when training begins, they take over the generators of the first of them. Where
    activations are sharded (sequence parallelism), their dropout masks are the same, too.

    Args:
        model: the whole one, as in BaseTrainer, as are all others.
        args: likewise.
        mesh_shape: sizes by dimension, whose product is the number of ranks; neighbours in the last
            one have neighbouring ranks.

    Attributes:
        mesh: where this rank stands.

    Raises:
        ConfigError: the mesh does not fit the ranks, or the model is not made for it.
    """

    mesh: ParallelMesh

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *positional: Any,  # noqa: ANN401 (BaseTrainer's own)
        mesh_shape: Mapping[str, int],
        **keywords: Any,  # noqa: ANN401 (BaseTrainer's own)
    ) -> None:
        self.mesh_shape = dict(mesh_shape)
        super().__init__(model, args, *positional, **keywords)
        self.callbacks.callbacks.insert(0, _DrawAlike(self))

    def parallelize(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Have the model's parameters be DTensors over `mesh`, in place: `parallelize_module`.

        Raises:
            ConfigError: it is not overridden.
        """
        raise ConfigError(
            field="HybridTrainer.parallelize",
            why="says of no module how it is split over the ranks of tp",
            help="Override it: parallelize_module(model, mesh, {name: ColwiseParallel(), ...})",
        )

    # --- what the base class asks ----------------------------------------------------------------

    def place_model(self, model: nn.Module) -> nn.Module:
        """This rank's part of it, the same on all ranks that hold the same. Collective."""
        if not c10d.is_initialized():
            raise ConfigError(field="HybridTrainer", why="needs the ranks that torchrun starts")
        if has_sparse_gradients(model):
            raise ConfigError(field="model", why="has sparse gradients, which are not averaged")
        self.mesh = mesh = make_mesh(self.device.type, self.mesh_shape, self.ranks.size)
        model = model.to(self.device)
        if mesh.tp.size > 1:
            self.parallelize(model, mesh.device_mesh["tp"])
        if mesh.pp.size > 1:
            model = self._take_stage(model, mesh.pp, mesh.lines("pp"))
        self._share_weights(model)
        return model

    def create_optimizer(self, given: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
        """What of the whole model's optimizer steps this rank's part."""
        if self.mesh.pp.size > 1:
            return super().create_optimizer(given)
        optimizer = BaseTrainer.create_optimizer(self, given)
        check_optimizer(optimizer, self.model)
        return optimizer

    def get_train_dataloader(self) -> Any:  # noqa: ANN401 (any loader)
        """One slice for each copy of the model; the ranks of its first stage read it.

        They draw the same random numbers, so they read the same.
        """
        mesh = self.mesh
        first = mesh.pp.index == 0
        return GroupLoader(
            self.make_loader(mesh.dp.index, mesh.dp.size) if first else None, mesh.pp
        )

    @property
    def data_ranks(self) -> int:
        """Copies of the model."""
        return self.mesh.dp.size

    def training_step(self, batches: Sequence[Any]) -> torch.Tensor:
        """As BaseTrainer's, or through the pipeline; gradients are the mean of all copies'."""
        mesh = self.mesh
        if mesh.pp.size > 1:
            loss = super().training_step(batches)
        else:
            loss = BaseTrainer.training_step(self, batches)
        average(complete_gradients(self.model.parameters()), mesh.dp)
        if mesh.dp.size > 1:
            share_buffers(self.model, mesh.dp.group, mesh.dp.ranks[0])
        return loss

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """By the norm of the whole model's; what several ranks hold counts once."""
        return clip(self.model.parameters(), max_norm, self.mesh.model, self._counts)

    def get_state_components(self) -> list[StateComponent]:
        """Model and optimizer of all ranks together, a data position for each copy of them."""
        standard = DDPTrainer.get_state_components(self)
        name = self.mesh.model_name
        if not name:
            return standard
        shared = {"sharing_pattern": SharingPattern.PER_GROUP, "validate_replication": True}
        names = {"model": JOB, "optimizer": JOB, "dataset": name}
        return redeclared(
            standard,
            {key: {**shared, "process_group_name": group} for key, group in names.items()},
        )

    def get_process_groups(self) -> Mapping[str, object]:
        """The mesh's, by name; all ranks as "job"."""
        return {**self.mesh.groups, JOB: range(self.ranks.size)}

    # --- helpers ---------------------------------------------------------------------------------

    def _share_weights(self, model: nn.Module) -> None:
        """Have all that hold the same begin with the same: as the first of them has it."""
        mesh = self.mesh
        for tensor in (*model.parameters(), *model.buffers()):
            own = local(tensor)
            # What torch has parted comes from the first rank of tp already.
            for place in (mesh.dp,) if isinstance(tensor, DTensor) else (mesh.tp, mesh.dp):
                if place.size > 1:
                    value = own.contiguous()
                    c10d.broadcast(value, src=place.ranks[0], group=place.group)
                    own.copy_(value)

    def _counts(self, parameter: torch.Tensor) -> bool:
        """Whether this rank answers for a parameter."""
        mesh = self.mesh
        parted = isinstance(parameter, DTensor) and any(
            not one.is_replicate() for one in parameter.placements
        )
        stages_say = mesh.pp.size == 1 or super()._counts(parameter)
        return (parted or mesh.tp.index == 0) and stages_say

    def _sum_losses(self, dataset: Any) -> tuple[float, float]:  # noqa: ANN401 (any dataset)
        """As BaseTrainer's, of each copy's part of the data; of stages, the last one's."""
        mesh = self.mesh
        if mesh.pp.size > 1:
            return self._sum_losses_of(dataset, mesh.dp)
        loss_of = partial(self.compute_loss, self.model)
        return sum_losses(self, dataset, loss_of, mesh.dp, mesh.pp)


class _DrawAlike(TrainerCallback):
    """Before the first step, ranks that differ in tp only take over one generator's state."""

    def __init__(self, trainer: HybridTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 (any event's)
        """After a load, or after the seed."""
        tp, rng = self._trainer.mesh.tp, self._trainer.rng
        if tp.size == 1:
            return
        mine = rng.state_dict() if tp.index == 0 else None
        state: Any = broadcast(mine, source=tp.ranks[0], group=tp.words)
        if tp.index:
            rng.load_state_dict(state)
