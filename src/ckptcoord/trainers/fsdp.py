"""FSDPTrainer: every rank holds a part of each parameter, gradient and moment (FSDP2)."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ckptcoord.core.sharing import SharingPattern, StateComponent
from ckptcoord.trainers.ddp import DDPTrainer
from ckptcoord.trainers.mesh import Place, whole_job
from ckptcoord.trainers.ranks import OneRank
from ckptcoord.trainers.sharded import JOB, check_optimizer, redeclared, sum_losses

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

GROUP = "fsdp"


class FSDPTrainer(DDPTrainer):
    """Trains on the ranks that torchrun started, as `torch.distributed.fsdp.fully_shard` has it.

    Weights, gradients and the optimizer's state are DTensors of which each rank holds a part, and
    each rank writes its own: nothing is gathered anywhere. The checkpoint loads on any number of
    ranks, and into any other trainer of the same model. Alone, without torchrun, nothing is
    sharded.

    Works with NCCL on GPUs, and with gloo on CPUs, where nothing overlaps. A resumed run gives the
    same bits: how gradients are reduced depends on the shapes of parameters and the number of ranks
    alone.

    The optimizer is made of the sharded parameters. One that is made before cannot know them:
    override `create_optimizer`. Buffers are rank 0's, as in DDP.

    Attributes:
        mesh: that of `create_mesh`; None on one rank alone.
    """

    mesh: DeviceMesh | None = None

    def place_model(self, model: nn.Module) -> nn.Module:
        """On this rank's device, then sharded in place: each unit, and what is left at the root."""
        model = super().place_model(model)
        if isinstance(self.ranks, OneRank):
            return model
        self.mesh = self.create_mesh()
        options = {"mesh": self.mesh, **self.shard_options()}
        for unit in self.shard_units(model):
            fully_shard(unit, **options)
        fully_shard(model, **options)
        return model

    def create_mesh(self) -> DeviceMesh:
        """Over all ranks; its last dimension must be called "fsdp".

        A dimension before that replicates what the last one shards (HSDP).
        """
        return init_device_mesh(self.device.type, (self.ranks.size,), mesh_dim_names=(GROUP,))

    def shard_options(self) -> dict[str, Any]:
        """More arguments of `fully_shard`, such as `mp_policy`."""
        return {}

    def shard_units(self, model: nn.Module) -> Sequence[nn.Module]:
        """Modules inside of the model whose parameters are gathered together, inner ones first.

        By default the layers: the children of the ModuleList with most parameters. The root gathers
        what is in no unit.
        """
        lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
        largest = max(lists, key=_size, default=())
        return [child for child in largest if _size(child)]

    def create_optimizer(self, given: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
        """Over the sharded parameters.

        Raises:
            ConfigError: the given one was made of parameters that sharding has replaced.
        """
        if given is not None:
            check_optimizer(given, self.model)
        return super().create_optimizer(given)

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """It is sharded already."""
        return model

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Only the last batch of an optimizer step reduces gradients; until then they are whole."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        yield

    @property
    def shares_buffers(self) -> bool:
        """Where there are several ranks."""
        return self.mesh is not None

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """By the norm over all parts."""
        norm = super().clip_gradients(max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def get_state_components(self) -> list[StateComponent]:
        """Model and optimizer in pieces, each written by its holder; the rest as DDPTrainer's."""
        pattern, group = SharingPattern.REPLICATED, None
        if self.mesh is not None:
            pattern, group = SharingPattern.PER_GROUP, GROUP if self.mesh.ndim == 1 else JOB
        parts = {
            "sharing_pattern": pattern,
            "process_group_name": group,
            "validate_replication": True,
        }
        return redeclared(super().get_state_components(), {"model": parts, "optimizer": parts})

    def get_process_groups(self) -> Mapping[str, object]:
        """The mesh's, by their names there; all ranks as "job"."""
        if self.mesh is None:
            return {}
        groups = {name: self.mesh.get_group(name) for name in self.mesh.mesh_dim_names or ()}
        return {**groups, JOB: range(self.ranks.size)}

    def _sum_losses(self, dataset: Any) -> tuple[float, float]:  # noqa: ANN401 (any dataset)
        """As BaseTrainer's; all ranks make equally many forwards, which are collective."""
        try:
            loss_of = partial(self.compute_loss, self.model)
            return sum_losses(self, dataset, loss_of, whole_job(self.ranks), Place())
        finally:
            # No backward does it: until then, the root's parameters are whole ones.
            for part in self.model.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
