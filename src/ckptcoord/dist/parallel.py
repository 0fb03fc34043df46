"""What torch.distributed and DDP leave to whoever checkpoints: the start, buckets, buffers."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as c10d

from ckptcoord.dist.sharded import is_dtensor
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.nn.parallel import DistributedDataParallel


def start_process_group(*, use_cpu: bool = False) -> bool:
    """Initialise torch.distributed from torchrun's environment; False where there is none.

    Does nothing when it is initialised already.

    Raises:
        ConfigError: torchrun's variables are incomplete.
    """
    if not c10d.is_available():
        return False
    if c10d.is_initialized():
        return True
    if not _environment("WORLD_SIZE"):
        return False
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not _environment(name)]
    if missing:
        raise ConfigError(
            field="WORLD_SIZE",
            why=f"is set, but {', '.join(missing)} is not",
            help="Start with torchrun, or unset WORLD_SIZE to train alone",
        )
    local_rank = int(_environment("LOCAL_RANK"))
    local_size = int(_environment("LOCAL_WORLD_SIZE", "1"))
    if not use_cpu and torch.cuda.is_available() and torch.cuda.device_count() >= local_size:
        torch.cuda.set_device(local_rank)
        c10d.init_process_group("nccl", device_id=torch.device("cuda", local_rank))
    else:
        c10d.init_process_group("gloo")
    return True


def settle_buckets(parallel: DistributedDataParallel) -> DistributedDataParallel:
    """Have DDP lay out its buckets now and for good; see DDPTrainer. Collective.

    Gradients are left at None, and no generator is touched.
    """
    if parallel.find_unused_parameters:
        return parallel  # such buckets are never rebuilt
    model = parallel.module
    parallel.module = _Touch(model)
    try:
        parallel().backward()
    finally:
        parallel.module = model
    for parameter in model.parameters():
        parameter.grad = None
    return parallel


def has_sparse_gradients(model: torch.nn.Module) -> bool:
    """Whether an embedding of the model gives sparse gradients, which zeros cannot stand in for."""
    embeddings = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    return any(isinstance(part, embeddings) and part.sparse for part in model.modules())


def share_buffers(model: torch.nn.Module, group: c10d.ProcessGroup | None, first: int) -> None:
    """Give every rank of a group the first one's buffers, as DDP does. Collective.

    Args:
        model: whose persistent buffers they are; without any, nothing happens.
        group: None: all ranks.
        first: its global rank.
    """
    state = model.state_dict(keep_vars=True)
    buffers = [local(buffer) for name, buffer in model.named_buffers() if name in state]
    for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
        alike = [buffer for buffer in buffers if buffer.dtype == dtype]
        as_one(alike, partial(c10d.broadcast, src=first, group=group))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, detached; changes to it are changes of the tensor."""
    plain: Any = tensor.detach()
    held: torch.Tensor = plain.to_local() if is_dtensor(plain) else plain
    return held


def as_one(tensors: Sequence[torch.Tensor], work: Callable[[torch.Tensor], object]) -> None:
    """Change tensors of one dtype in place, as `work` changes the 1-D tensor of them all."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    work(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


class _Touch(torch.nn.Module):
    """Zero, made of every parameter. Autograd runs later operations first: the last one leads.

    The model stays inside, since DDP looks for its buffers there.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> torch.Tensor:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        total = torch.zeros((), device=parameters[0].device)
        for parameter in parameters:
            total = total + 0 * parameter.reshape(-1)[:1].sum()
        return total


def _environment(name: str, default: str = "") -> str:
    return os.environ.get(name, default)  # noqa: TID251 (torchrun tells through the environment)
