"""The weighted average of tensors, and which tensors have one.

    average = round(sum of weight_i * tensor_i / sum of weight_i)

In float64, summed in the order given, each step rounded as IEEE 754 says: the same everywhere, bit
for bit. The last step rounds to the first tensor's dtype, as torch does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import torch

from ckptcoord.codec.tensorspec import TensorSpec
from ckptcoord.core.box import Box
from ckptcoord.dist.capture import tensor_bytes
from ckptcoord.formats.casting import narrowed, part, widened
from ckptcoord.formats.spill import scratch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from ckptcoord.core.digest import Digest
    from ckptcoord.dist.saved import SavedTensor
    from ckptcoord.formats.whole import WholeCheckpoint, WholeState, WholeTensor

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_CHUNK = 1 << 17  # elements at a time: what is made of them stays in the cache


class How(StrEnum):
    """Where a tensor of the average comes from."""

    AVERAGE = "average"
    EQUAL = "equal"
    COMPARE = "compare"
    FIRST = "first"


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One of the checkpoints.

    Attributes:
        source: open.
        weight: of it, before weights are made to sum to one.
    """

    source: WholeCheckpoint
    weight: float

    @property
    def ref(self) -> str:
        """Its ref."""
        return self.source.commit.checkpoint_id.ref


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How it is done.

    Attributes:
        normalise: divide by the sum of the weights.
        keep_first: integers that differ, and what is no tensor, are the first checkpoint's.
    """

    normalise: bool = True
    keep_first: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """How each tensor is made, by the headers alone, and why some cannot be.

    Attributes:
        how: by name, in the order of the first checkpoint.
        problems: `name: why`, sorted by name.
    """

    how: Mapping[str, How]
    problems: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Findings:
    """What was only seen in the bytes: `name: why`."""

    problems: list[str] = field(default_factory=list)


def compare(terms: Sequence[Term], states: Sequence[WholeState], rules: Rules) -> Differences:
    """See which tensors all checkpoints have, in one shape and dtype. No tensor is read."""
    first, *others = states
    how: dict[str, How] = {}
    problems: list[str] = []
    for name, tensor in first.tensors.items():
        same = [one.tensors.get(name) for one in others]
        why = _why_not(tensor, same, terms)
        how[name] = How.FIRST if why else _how(tensor, same, rules)
        if why:
            problems.append(f"{name}: {why}")
        elif how[name] is How.FIRST and not rules.keep_first:
            problems.append(f"{name}: {tensor.saved.spec.dtype} tensors that differ")
    for term, one in zip(terms[1:], others, strict=True):
        extra = one.tensors.keys() - first.tensors.keys()
        problems += [f"{name}: only in {term.ref}" for name in extra]
        alike = one.tensors.keys() == first.tensors.keys()
        if alike and one.state.tree != first.state.tree and not rules.keep_first:
            problems.append(f"{term.ref}: what is no tensor differs")
    return Differences(how=how, problems=tuple(sorted(problems)))


def make(
    terms: Sequence[Term],
    tensors: Sequence[WholeTensor],
    how: How,
    rules: Rules,
    out: torch.Tensor,
    findings: Findings,
) -> None:
    """Fill a tensor of the average; what is wrong with it is added to `findings`.

    Args:
        terms: the checkpoints.
        tensors: of each of these, the tensor; of the first only, where that is all that is needed.
        how: where it comes from.
        rules: how it is done.
        out: in the first tensor's dtype.
        findings: of all tensors.

    Raises:
        CorruptError, StorageError: one of them cannot be read.
    """
    if how is How.AVERAGE:
        _average(terms, tensors, rules, out, findings)
        return
    terms[0].source.read(tensors[0], out)
    if how is How.COMPARE:
        for term, tensor in zip(terms[1:], tensors[1:], strict=True):
            other = scratch(tensor.spec)
            term.source.read(tensor, other)
            if not torch.equal(other, out) and not rules.keep_first:
                name, dtype = tensor.spec.name, tensor.spec.dtype
                findings.problems.append(f"{name}: {dtype} tensors that differ")
                return


def _why_not(
    tensor: WholeTensor, others: Sequence[WholeTensor | None], terms: Sequence[Term]
) -> str:
    """Why a tensor has no average, whatever its bytes are."""
    spec = tensor.saved.spec
    for term, other in zip(terms[1:], others, strict=True):
        if other is None:
            return f"not in {term.ref}"
        found = other.saved.spec
        if found.shape != spec.shape:
            return f"{list(spec.shape)}, but {list(found.shape)} in {term.ref}"
        if found.dtype != spec.dtype and not {found.dtype, spec.dtype} <= FLOATS:
            return f"{spec.dtype}, but {found.dtype} in {term.ref}"
    return ""


def _how(tensor: WholeTensor, others: Sequence[WholeTensor | None], rules: Rules) -> How:
    """How a tensor is made that all checkpoints have in one shape."""
    digests = [_digest(one.saved) for one in (tensor, *others) if one is not None]
    dtypes = {one.saved.spec.dtype for one in (tensor, *others) if one is not None}
    known = None not in digests and len(dtypes) == 1
    averaged = tensor.saved.spec.dtype in FLOATS
    if known and len(set(digests)) == 1 and (rules.normalise or not averaged):
        return How.EQUAL
    if averaged:
        return How.AVERAGE
    return How.FIRST if known else How.COMPARE


def _digest(saved: SavedTensor) -> Digest | None:
    """Of a tensor that was saved as a whole."""
    whole = Box.whole(saved.spec.shape)
    return next((entry.digest for box, (_, entry) in saved.pieces if box == whole), None)


def _average(
    terms: Sequence[Term],
    tensors: Sequence[WholeTensor],
    rules: Rules,
    out: torch.Tensor,
    findings: Findings,
) -> None:
    name, dtype = tensors[0].spec.name, tensors[0].spec.dtype
    sums = scratch(TensorSpec(name=name, dtype="F64", shape=(out.numel(),)))
    total = tensor_bytes(sums).view(np.float64)
    total[:] = 0
    nans = [
        term.ref for term, tensor in zip(terms, tensors, strict=True) if _add(term, tensor, total)
    ]
    divisor = sum(term.weight for term in terms) if rules.normalise else 1.0
    undefined, overflowed = _finish(total, divisor, dtype, tensor_bytes(out))
    if nans:
        findings.problems.append(f"{name}: NaN in {', '.join(nans)}")
    elif undefined:
        findings.problems.append(f"{name}: infinities cancel one another")
    elif overflowed:
        findings.problems.append(f"{name}: too large for {dtype}")


def _add(term: Term, tensor: WholeTensor, total: NDArray[np.float64]) -> bool:
    """Add a checkpoint's share of a tensor to the sum; returns whether there is a NaN in it."""
    one = scratch(tensor.spec)
    term.source.read(tensor, one)
    data, dtype, found = tensor_bytes(one), tensor.spec.dtype, False
    for begin, stop in _chunks(total.size):
        values = widened(part(data, dtype, begin, stop), dtype)
        found = found or bool(np.isnan(values).any())
        with np.errstate(invalid="ignore", over="ignore"):
            # Two steps, not a fused one: whether there is such a one depends on the machine.
            share = np.multiply(values, term.weight, dtype=np.float64)
            total[begin:stop] += share
    return found


def _finish(
    total: NDArray[np.float64], divisor: float, dtype: str, out: NDArray[np.uint8]
) -> tuple[bool, bool]:
    """Round the sum; returns whether there is a NaN in it, and whether what is finite overflows."""
    undefined = overflowed = False
    for begin, stop in _chunks(total.size):
        values = total[begin:stop]
        with np.errstate(invalid="ignore", over="ignore"):
            values /= divisor
        narrow = narrowed(values, dtype)
        part(out, dtype, begin, stop)[:] = narrow
        undefined = undefined or bool(np.isnan(values).any())
        too_large = np.isinf(widened(narrow, dtype)) & np.isfinite(values)
        overflowed = overflowed or bool(too_large.any())
    return undefined, overflowed


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + _CHUNK, count)) for begin in range(0, count, _CHUNK))
