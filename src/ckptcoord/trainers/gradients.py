"""Gradients of parameters that may be DTensors: averaged, measured and scaled by what is here."""

from __future__ import annotations

import math
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.distributed as c10d
from torch.distributed.tensor import DTensor

from ckptcoord.dist.parallel import as_one, local

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ckptcoord.trainers.mesh import Place

BUCKET_BYTES = 25 << 20  # of gradients that travel together, as in DDP
_TINY = 1e-6  # as in torch.nn.utils.clip_grads_with_norm_


def complete_gradients(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """What this rank holds of the gradient of each trained parameter, in the parameter's layout.

    Zeros where there was no gradient: another rank may have one. Terms of a sum are summed, over
    the parameter's own mesh.
    """
    found = []
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = parameter.grad
        if isinstance(parameter, DTensor) and isinstance(grad, DTensor):
            # Nothing travels where it is laid out so already.
            parameter.grad = grad.redistribute(placements=parameter.placements)
        found.append(local(parameter.grad))
    return found


def average(gradients: Sequence[torch.Tensor], place: Place) -> None:
    """Give each gradient its mean over the ranks of a dimension. Collective.

    The order of sums depends on the sizes of the tensors alone, so that a resumed run gives the
    same bits.
    """
    if place.size == 1:
        return

    def mean(flat: torch.Tensor) -> None:
        c10d.all_reduce(flat, group=place.group)
        flat /= place.size

    for bucket in _buckets(gradients):
        as_one(bucket, mean)


def clip(
    parameters: Iterable[torch.Tensor],
    max_norm: float,
    place: Place,
    counts: Callable[[torch.Tensor], bool],
) -> torch.Tensor:
    """Scale gradients to a norm of `max_norm` at most. Collective.

    Args:
        parameters: of this rank.
        max_norm: of all gradients of the model together.
        place: the ranks that hold the model together.
        counts: whether this rank answers for a parameter; of those that hold the same, one does.

    Returns:
        The norm before, the same on all these ranks.
    """
    own = [(p, local(p.grad)) for p in parameters if p.grad is not None]
    device = own[0][1].device if own else torch.device("cpu")
    squares = torch.zeros(1, dtype=torch.float64, device=device)
    for parameter, gradient in own:
        if counts(parameter):
            squares += torch.linalg.vector_norm(gradient, dtype=torch.float32).double() ** 2
    squares = squares.cpu()
    if place.size > 1:
        c10d.all_reduce(squares, group=place.words)
    norm = math.sqrt(float(squares))
    scale = max_norm / (norm + _TINY)
    if scale < 1:
        for _, gradient in own:
            gradient.mul_(scale)
    return torch.tensor(norm, device=device)


def _buckets(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    for _, alike in groupby(gradients, key=lambda gradient: gradient.dtype):
        bucket: list[torch.Tensor] = []
        for gradient in alike:
            bucket.append(gradient)
            if sum(g.numel() * g.element_size() for g in bucket) >= BUCKET_BYTES:
                yield bucket
                bucket = []
        if bucket:
            yield bucket
