"""DDPTrainer: the same model on every rank, gradients averaged by DistributedDataParallel."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as c10d
from torch.nn.parallel import DistributedDataParallel

from ckptcoord.core.sharing import SharingPattern, StateComponent
from ckptcoord.dist.parallel import (
    has_sparse_gradients,
    settle_buckets,
    share_buffers,
    start_process_group,
)
from ckptcoord.trainers.base import BaseTrainer
from ckptcoord.trainers.data import DispatchLoader
from ckptcoord.trainers.ranks import OneRank, Ranks, TorchRanks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager


class DDPTrainer(BaseTrainer):
    """Trains on the ranks that torchrun started; alone, without DDP, where it did not.

    Initialises torch.distributed if nobody has: NCCL where every local rank has a GPU, else gloo.
    End with `ckptcoord.shutdown(trainer)`.

    **Bit-exact resume.** DDP sums gradients bucket by bucket and, after the first backward pass of
    a process, lays its buckets out anew in the order in which gradients arrived. A ring all-reduce
    adds ranks in an order that depends on an element's place in its bucket; so the first step of a
    resumed process would round differently from the same step of an undisturbed one. `wrap_model`
    therefore lets DDP rebuild before any training, with one backward pass of zeros that touches the
    parameters in reverse order of registration (`settle_buckets`). From then on the layout depends
    on the model alone. It costs one all-reduce of zeros at the start and nothing a step.
    `find_unused_parameters=True` also keeps the layout, but walks the graph and reduces a bitmap at
    every step.
    """

    def join_ranks(self) -> Ranks:
        """Join, or start, the default process group."""
        return TorchRanks() if start_process_group(use_cpu=self.args.use_cpu) else OneRank()

    def pick_device(self) -> torch.device:
        """The GPU of this local rank, if the job's backend works on GPUs."""
        if self.ranks.size > 1 and "nccl" not in c10d.get_backend():
            return torch.device("cpu")
        device = super().pick_device()
        return device if device.type == "cpu" else torch.device("cuda", torch.cuda.current_device())

    def wrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """DDP with settled buckets."""
        if isinstance(self.ranks, OneRank):
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return settle_buckets(
            DistributedDataParallel(
                model, device_ids=devices, find_unused_parameters=has_sparse_gradients(model)
            )
        )

    def accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """Only the last batch of an optimizer step reduces gradients."""
        if last or not isinstance(self.model_wrapped, DistributedDataParallel):
            return super().accumulating(last=last)
        return self.model_wrapped.no_sync()

    @property
    def shares_buffers(self) -> bool:
        """Whether every rank gets the first one's buffers at each step, as DDP does by default."""
        wrapped = self.model_wrapped
        return isinstance(wrapped, DistributedDataParallel) and wrapped.broadcast_buffers

    def training_step(self, batches: Sequence[Any]) -> torch.Tensor:
        """As BaseTrainer's; buffers are the same on all ranks when it ends.

        DDP shares them at the next forward only, and a save may come before it.
        """
        loss = super().training_step(batches)
        if self.shares_buffers:
            share_buffers(self.model, group=None, first=0)
        return loss

    def get_train_dataloader(self) -> Any:  # noqa: ANN401 (any loader)
        """Each rank reads its own slice, or rank 0 reads for all (`dispatch_batches`)."""
        if not self.args.dispatch_batches or not isinstance(self.ranks, TorchRanks):
            return super().get_train_dataloader()
        source = self.make_loader(0, 1) if self.ranks.rank == 0 else None
        return DispatchLoader(source, group=self.ranks.group)

    def get_state_components(self) -> list[StateComponent]:
        """One replica on every rank, validated; generators and positions of each rank's own."""
        return self._standard_components(
            SharingPattern.REPLICATED, self._get_dataset_sharing_pattern()
        )

    def get_process_groups(self) -> Mapping[str, object]:
        """None besides the default one."""
        return {}

    def _is_first_on_node(self) -> bool:
        return _environment("LOCAL_RANK", str(self.ranks.rank)) == "0"


def _environment(name: str, default: str = "") -> str:
    return os.environ.get(name, default)  # noqa: TID251 (torchrun tells through the environment)
