"""Planes of a difference, sorted by the exponents of the base.

A step changes a parameter by an amount that has little to do with its size: the larger its
exponent, the fewer steps of its last bit that amounts to. Bytes of elements of like exponents are
therefore alike: each group gets codes of its own. Who decodes has the base, too.

    1 byte     how many groups there are, G
    1 byte     how many of them are in the first part
    G bytes    of each, the first exponent, in order; that of the first group is 0
    2 times    kind and size of a plane, as in a frame
    2 planes   the bytes of the groups of the first part, group after group, and those of the rest

The rest is where exponents are so large that a step rarely changes the byte. An exponent is the
eight bits below the sign, whatever the dtype takes them for. Shapes: N elements of a plane, in
blocks of the mask; G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ckptcoord.codec.delta import BLOCK_BYTES, PLANE_HEADER, DecodeError, PlaneKind
from ckptcoord.codec.huffman import count_bytes, frame_bound
from ckptcoord.codec.jit import compiled
from ckptcoord.codec.kernels import entropy, width_of
from ckptcoord.codec.planes import MASKED_BITS, plane_bound

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ckptcoord.codec.jit import Value
    from ckptcoord.codec.planes import PlaneCoder

    Bytes: TypeAlias = NDArray[np.uint8]
    Mask: TypeAlias = NDArray[np.bool_]
    Ints: TypeAlias = NDArray[np.int64]

MAX_GROUPS = 16
_PAYS = 0.99  # of the size without groups
_MIN_ELEMENTS = 4096
_RUN = 512
_STEP = 8


@compiled
def exponents(base: Value, mask: Mask, out: Bytes) -> None:
    """The exponents of the base (B, E) in blocks of the mask (B,); `out` has room for all."""
    T = base.dtype.type
    width = width_of(T)
    at = 0
    for b in range(base.shape[0]):
        if mask[b]:
            for j in range(BLOCK_BYTES // width):
                out[at + j] = np.uint8(T(base[b, j] << 1) >> (8 * width - 8))
            at += BLOCK_BYTES // width


@compiled
def count_groups(plane: Bytes, exponent: Bytes, group_of: Bytes, step: int, counts: Value) -> None:
    """How often each byte is in each group: (N,), (N,), (256,), (G, 256) of uint32.

    Of every `step` runs of _RUN elements one is looked at.
    """
    counts[:] = 0
    for begin in range(0, plane.size, _RUN * step):
        for i in range(begin, min(begin + _RUN, plane.size)):
            counts[group_of[exponent[i]], plane[i]] += 1


@compiled
def gather_groups(plane: Bytes, exponent: Bytes, group_of: Bytes, starts: Ints, out: Bytes) -> None:
    """Bring the bytes of each group together; `starts` (G,) is where in `out` (N,)."""
    at = starts.copy()
    for i in range(plane.size):
        g = group_of[exponent[i]]
        out[np.uint64(at[g])] = plane[i]
        at[g] += 1


@compiled
def spread_groups(
    grouped: Bytes, exponent: Bytes, group_of: Bytes, starts: Ints, out: Bytes
) -> None:
    """The inverse of `gather_groups`."""
    at = starts.copy()
    for i in range(out.size):
        g = group_of[exponent[i]]
        out[i] = grouped[np.uint64(at[g])]
        at[g] += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Contexts:
    """The groups of a frame's elements.

    Attributes:
        exponent: of each element, (N,).
        firsts: of each group the first exponent, (G,).
        group_of: the group of each exponent, (256,).
        sizes: how many elements each group has, (G,).
        starts: how many are in groups before, (G,).
    """

    exponent: Bytes
    firsts: Bytes
    group_of: Bytes
    sizes: Ints
    starts: Ints


def choose_contexts(exponent: Bytes) -> Contexts | None:
    """Groups of exponents that are next to each other, of like size; None where one would do."""
    if exponent.size < _MIN_ELEMENTS:
        return None
    counts = _counts(exponent)
    before = np.cumsum(counts) - counts
    share = np.minimum(before * MAX_GROUPS // exponent.size, MAX_GROUPS - 1)
    starts = np.flatnonzero(np.diff(share, prepend=-1))
    firsts = np.array([0, *starts[1:]], np.uint8)
    return _contexts(exponent, firsts, counts) if firsts.size > 1 else None


def _counts(exponent: Bytes) -> Ints:
    counts = np.empty(256, np.uint32)
    count_bytes(exponent, counts)
    return counts.astype(np.int64)


def _contexts(exponent: Bytes, firsts: Bytes, counts: Ints) -> Contexts:
    first = firsts.astype(np.int64)
    sizes = np.add.reduceat(counts, first)
    return Contexts(
        exponent=exponent,
        firsts=firsts,
        group_of=(np.searchsorted(first, np.arange(256), side="right") - 1).astype(np.uint8),
        sizes=sizes,
        starts=np.cumsum(sizes) - sizes,
    )


def encode_contexts(
    plane: Bytes, contexts: Contexts, coder: PlaneCoder, plain_bits: float
) -> Bytes | None:
    """A plane (N,) by groups; None where that saves nothing against `plain_bits` a byte."""
    groups = contexts.firsts.size
    counts = np.empty((groups, 256), np.uint32)
    count_groups(plane, contexts.exponent, contexts.group_of, _STEP, counts)
    bits = [entropy(row) if row.any() else 0.0 for row in counts]
    if float(np.dot(bits, contexts.sizes)) > _PAYS * min(plain_bits, 8) * plane.size:
        return None
    grouped = np.empty_like(plane)
    gather_groups(plane, contexts.exponent, contexts.group_of, contexts.starts, grouped)
    busy = max((g + 1 for g in range(groups) if bits[g] >= MASKED_BITS), default=0)
    split = int(contexts.sizes[:busy].sum())
    parts = (
        _busy(grouped[:split], contexts.sizes[:busy], coder),
        _quiet(grouped[split:], counts[busy:], coder),
    )
    head = bytes([groups, busy]) + contexts.firsts.tobytes()
    head += b"".join(PLANE_HEADER.pack(kind, part.size) for kind, part in parts)
    size = len(head) + sum(part.size for _, part in parts)
    if size > _PAYS * min(plain_bits, 8) * plane.size / 8:
        return None
    return np.concatenate((np.frombuffer(head, np.uint8), *(part for _, part in parts)))


def _busy(plane: Bytes, sizes: Ints, coder: PlaneCoder) -> tuple[PlaneKind, Bytes]:
    """Groups of a plane with codes of their own."""
    sizes = sizes[sizes > 0]
    room = np.empty(frame_bound(plane.size, sizes.size), np.uint8)
    if not plane.size:
        return PlaneKind.VERBATIM, plane
    return PlaneKind.ZSTD, coder.literals.encode(plane, room, sizes.tolist())


def _quiet(plane: Bytes, counts: NDArray[np.uint32], coder: PlaneCoder) -> tuple[PlaneKind, Bytes]:
    """Groups of a plane together."""
    if not plane.size:
        return PlaneKind.VERBATIM, plane
    total = counts.sum(axis=0, dtype=np.uint32)
    bits = entropy(total) if total.any() else 8.0
    room = np.empty(plane_bound(plane.size), np.uint8)
    return coder.encode(plane, np.array([bits]), int(total.argmax()), room)


def decode_contexts(coded: memoryview, exponent: Bytes, coder: PlaneCoder, out: Bytes) -> None:
    """Fill `out` (N,) with a plane of elements whose base has such exponents (N,).

    Raises:
        DecodeError: `coded` is no such plane.
    """
    groups, busy = coded[:2] if len(coded) > 2 else (0, 0)
    at = 2 + groups
    begin = at + 2 * PLANE_HEADER.size
    if not 0 < groups <= MAX_GROUPS or busy > groups or len(coded) < begin:
        raise DecodeError("a plane by exponents has no sound number of groups")
    firsts = np.frombuffer(coded[2:at], np.uint8)
    if firsts[0] or (np.diff(firsts.astype(np.int64)) <= 0).any():
        raise DecodeError("a plane by exponents has groups that do not follow each other")
    contexts = _contexts(exponent, firsts, _counts(exponent))
    grouped = np.empty_like(out)
    split = int(contexts.sizes[:busy].sum())
    for part in (grouped[:split], grouped[split:]):
        kind, size = PLANE_HEADER.unpack_from(coded, at)
        at += PLANE_HEADER.size
        coder.decode(kind, coded[begin : begin + size], part)
        begin += size
    if begin != len(coded):
        raise DecodeError("a plane by exponents is not filled by its parts")
    spread_groups(grouped, exponent, contexts.group_of, contexts.starts, out)
