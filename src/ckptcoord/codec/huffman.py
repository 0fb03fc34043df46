"""Writes byte planes as zstandard frames of literals, Huffman-coded: RFC 8878, without sequences.

zstandard's own compressor looks for matches first, which costs two thirds of its time on planes
that have none, and where a byte takes one or two bits it finds some that make the result longer.
What is written here is a plain frame, which zstandard decodes: one Huffman tree for the plane, and
blocks of literals in four streams, or raw where a block would grow.

Shapes: N bytes of a plane.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ckptcoord.codec.jit import compiled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Bytes: TypeAlias = NDArray[np.uint8]
    Words: TypeAlias = NDArray[np.uint32]
    Ints: TypeAlias = NDArray[np.int64]

MIN_BYTES = 64
"""Of a block that is coded: a handful of bytes has no four streams, nor would they pay."""

MAX_BITS = 10  # of a code; the format allows 11, but three must fit into 31 bits
_SIZE = 1 << MAX_BITS
_BLOCK = 64 << 10  # the format allows 128 KiB; trees for smaller blocks follow the data closer
_STREAM_WORDS = _BLOCK // 4 * MAX_BITS // 32 + 4
_MAX_TREE = 128
U32, U64 = np.uint32, np.uint64

# The weights of a tree (how far a code is from the longest, plus 1; 0 without one) are coded by FSE
# with one fixed distribution over 0 to 11, of 64 in all: fitting one would save some 10 bytes.
_SHARES = (6, 12, 10, 8, 7, 6, 4, 3, 3, 2, 2, 1)
_FSE_LOG = 6


@compiled
def code_lengths(counts: NDArray[np.uint32], lengths: Bytes) -> int:
    """Lengths (256,) of a code for bytes that occur as often as `counts` (256,) says.

    Returns how many bits all of them need. At least two bytes must occur.
    """
    symbols = np.argsort(counts)
    first = 0
    while counts[symbols[first]] == 0:
        first += 1
    n = 256 - first
    # Two queues: the leaves in order, and the nodes made of them, which arise in order.
    weight = np.zeros(2 * n, np.int64)
    parent = np.zeros(2 * n, np.int64)
    for i in range(n):
        weight[i] = counts[symbols[first + i]]
    leaf, node, made = 0, n, n
    while made < 2 * n - 1:
        for _ in range(2):
            if leaf < n and (node >= made or weight[leaf] <= weight[node]):
                taken = leaf
                leaf += 1
            else:
                taken = node
                node += 1
            weight[made] += weight[taken]
            parent[taken] = made
        made += 1
    depth = np.zeros(2 * n, np.int64)
    for i in range(2 * n - 3, -1, -1):
        depth[i] = depth[parent[i]] + 1
    _limit(depth, n)
    lengths[:] = 0
    bits = 0
    for i in range(n):
        lengths[symbols[first + i]] = depth[i]
        bits += depth[i] * counts[symbols[first + i]]
    return bits


@compiled
def _limit(depth: NDArray[np.int64], n: int) -> None:
    """Bring leaves, rarest first, to MAX_BITS at most, with no code left over."""
    room = 0
    for i in range(n):
        depth[i] = min(depth[i], MAX_BITS)
        room += _SIZE >> depth[i]
    room = _SIZE - room
    i = 0
    while room < 0:  # too many codes: lengthen the rarest that are short enough
        if depth[i] < MAX_BITS:
            depth[i] += 1
            room += _SIZE >> depth[i]
        else:
            i += 1
    i = n - 1
    while room > 0:  # and give what that freed to the most frequent that can use it
        if _SIZE >> depth[i] <= room:
            room -= _SIZE >> depth[i]
            depth[i] -= 1
        else:
            i -= 1


def _fse() -> tuple[bytes, Ints]:
    """The distribution as a frame describes it, and FSE's table for encoding by it.

    Of each weight and of each state that the reader goes on to, or 64 where the weights end: the
    state that stands for the weight, how many bits it reads, and which; (12, 65, 3). RFC 8878, 4.1.
    """
    size = 1 << _FSE_LOG
    bits, used = _FSE_LOG - 5, 4
    left, threshold, width = size + 1, size, _FSE_LOG + 1
    for share in _SHARES:
        most = 2 * threshold - 1 - left
        left -= share
        value = share + 1
        if value >= threshold:
            value += most
        bits |= value << used
        used += width - (value < most)
        while left < threshold:
            width, threshold = width - 1, threshold >> 1
    spread = [0] * size
    at = 0
    for weight, share in enumerate(_SHARES):
        for _ in range(share):
            spread[at] = weight
            at = (at + (size >> 1) + (size >> 3) + 3) % size
    following = list(_SHARES)
    table = np.zeros((len(_SHARES), size + 1, 3), np.int64)
    for state, weight in enumerate(spread):
        reads = _FSE_LOG + 1 - following[weight].bit_length()
        first = (following[weight] << reads) - size
        following[weight] += 1
        for to in range(first, first + (1 << reads)):
            table[weight, to] = state, reads, to - first
        table[weight, size] = state, 0, 0
    return bits.to_bytes(-(-used // 8), "little"), table


_DESCRIPTION, _STATES = _fse()


@compiled
def _put_bits(out: Bytes, bit: int, value: int, count: int) -> int:
    """Append bits to bytes, lowest first; where they end."""
    for i in range(count):
        if bit % 8 == 0:
            out[bit // 8] = 0
        out[bit // 8] |= ((value >> i) & 1) << (bit % 8)
        bit += 1
    return bit


@compiled
def _weights(lengths: Bytes) -> Ints:
    """The weights up to the last byte that has a code."""
    last, longest = 0, 0
    for symbol in range(256):
        if lengths[symbol]:
            last = symbol
            longest = max(longest, lengths[symbol])
    weights = np.zeros(last + 1, np.int64)
    for symbol in range(last + 1):
        if lengths[symbol]:
            weights[symbol] = longest + 1 - lengths[symbol]
    return weights


@compiled
def _tree(lengths: Bytes, states: Ints, description: Bytes, out: Bytes) -> int:
    """Write the description of a tree; its size, or 0 where FSE would need more than it may."""
    weights = _weights(lengths)
    last = weights.size - 1  # the weight of the last is for the reader to work out
    if last <= 128:
        out[0] = 127 + last
        weights[last] = 0
        for i in range((last + 1) // 2):
            out[1 + i] = (weights[2 * i] << 4) | weights[2 * i + 1]
        return 1 + (last + 1) // 2
    for i in range(description.size):
        out[1 + i] = description[i]
    bit = 8 * (1 + description.size)
    # Written from the last weight to the first; two states take turns.
    state = np.full(2, 1 << _FSE_LOG, np.int64)
    for i in range(last - 1, -1, -1):
        before, reads, value = states[weights[i], state[i % 2]]
        bit = _put_bits(out, bit, value, reads)
        state[i % 2] = before
    bit = _put_bits(out, bit, state[1], _FSE_LOG)
    bit = _put_bits(out, bit, state[0], _FSE_LOG)
    bit = _put_bits(out, bit, 1, 1)
    out[0] = (bit + 7) // 8 - 1
    return (bit + 7) // 8 if out[0] < 128 else 0


@compiled
def _codes(lengths: Bytes, codes: NDArray[np.uint16]) -> None:
    """The code of each byte; the longest codes are the lowest."""
    following = np.zeros(MAX_BITS + 2, np.int64)
    for symbol in range(256):
        following[lengths[symbol]] += 1
    code = 0
    for length in range(MAX_BITS, 0, -1):
        code, following[length] = (code + following[length]) >> 1, code
    for symbol in range(256):
        codes[symbol] = following[lengths[symbol]]
        following[lengths[symbol]] += 1


@compiled
def _streams(
    part: Bytes, codes: NDArray[np.uint16], lengths: Bytes, words: Words, sizes: Ints
) -> None:
    """Write a block's four streams to `words` (4, _STREAM_WORDS); `sizes` (4,) are their bytes."""
    segment = (part.size + 3) // 4
    for s in range(4):
        sizes[s] = _stream(part[s * segment : (s + 1) * segment], codes, lengths, words[s])


@compiled
def _stream(part: Bytes, codes: NDArray[np.uint16], lengths: Bytes, words: Words) -> int:
    """Write one stream, from its last byte on; its size in bytes."""
    acc, held, at = U64(0), U64(0), U64(0)
    rows = part.size // 3
    for i in range(part.size - 1, 3 * rows - 1, -1):
        acc |= U64(codes[part[i]]) << held
        held += U64(lengths[part[i]])
    rest = part[: 3 * rows].reshape(rows, 3)
    for back in range(rows):
        r = U64(rows - 1 - back)
        for k in (2, 1, 0):
            symbol = rest[r, k]
            acc |= U64(codes[symbol]) << held
            held += U64(lengths[symbol])
        words[at] = U32(acc)
        full = held >> U64(5)
        acc >>= full << U64(5)
        held &= U64(31)
        at += full
    acc |= U64(1) << held
    words[at] = U32(acc)
    words[at + U64(1)] = U32(acc >> U64(32))
    return int(at) * 4 + int(held) // 8 + 1


@compiled
def _little(out: Bytes, at: int, value: int, size: int) -> int:
    for i in range(size):
        out[at + i] = (value >> (8 * i)) & 255
    return at + size


@compiled
def count_bytes(plane: Bytes, counts: NDArray[np.uint32]) -> int:
    """How often each byte is in a plane: (N,), (256,). Returns how many different bytes occur."""
    # Four tables: adding to one count twice in a row waits for the first addition.
    table = np.zeros((4, 256), np.uint32)
    rows = plane.size // 4
    part = plane[: 4 * rows].reshape(rows, 4)
    for i in range(rows):
        table[0, part[i, 0]] += 1
        table[1, part[i, 1]] += 1
        table[2, part[i, 2]] += 1
        table[3, part[i, 3]] += 1
    for i in range(4 * rows, plane.size):
        table[0, plane[i]] += 1
    different = 0
    for k in range(256):
        counts[k] = table[0, k] + table[1, k] + table[2, k] + table[3, k]
        different += counts[k] > 0
    return different


@compiled
def _copy(data: Bytes, out: Bytes, at: int) -> int:
    to = out[at : at + data.size]
    for i in range(data.size):
        to[i] = data[i]
    return at + data.size


@compiled
def _compressed(part: Bytes, tree: Bytes, words: Words, sizes: Ints, out: Bytes, at: int) -> int:
    """Write the content of a compressed block: literals, and no sequences."""
    literals = tree.size + 6 + sizes.sum()
    at = _little(out, at, 2 | (3 << 2) | (part.size << 4) | (literals << 22), 5)
    at = _copy(tree, out, at)
    for s in range(3):
        at = _little(out, at, sizes[s], 2)
    for s in range(4):
        at = _copy(words[s].view(np.uint8)[: sizes[s]], out, at)
    return _little(out, at, 0, 1)


@compiled
def write_frame(plane: Bytes, ends: Ints, states: Ints, description: Bytes, out: Bytes) -> int:
    """Write a plane (N,) as a frame with blocks up to `ends`; its size."""
    tree = np.empty(3 * _MAX_TREE, np.uint8)
    counts = np.empty(256, np.uint32)
    lengths = np.empty(256, np.uint8)
    codes = np.empty(256, np.uint16)
    words = np.empty((4, _STREAM_WORDS), np.uint32)
    sizes = np.empty(4, np.int64)
    # Magic, "single segment, the size has four bytes", size.
    at = _little(out, _little(out, _little(out, 0, 0xFD2FB528, 4), 0xA0, 1), plane.size, 4)
    begin = 0
    for end_of_block in ends:
        part = plane[begin:end_of_block]
        begin = end_of_block
        last = 1 if end_of_block == plane.size else 0
        if count_bytes(part, counts) == 1:
            at = _little(out, at, last | (1 << 1) | (part.size << 3), 3)
            at = _little(out, at, part[0], 1)
            continue
        bits = code_lengths(counts, lengths)
        tree_bytes = _tree(lengths, states, description, tree)
        if part.size < MIN_BYTES or tree_bytes == 0 or tree_bytes + bits // 8 + 16 >= part.size:
            at = _little(out, at, last | (part.size << 3), 3)
            at = _copy(part, out, at)
            continue
        _codes(lengths, codes)
        _streams(part, codes, lengths, words, sizes)
        end = _compressed(part, tree[:tree_bytes], words, sizes, out, at + 3)
        _little(out, at, last | (2 << 1) | ((end - at - 3) << 3), 3)
        at = end
    return at


def frame_bound(nbytes: int, parts: int = 1) -> int:
    """The most bytes that the frame of a plane in so many parts takes."""
    return nbytes + 16 + 4 * (parts + nbytes // _BLOCK)


def encode_literals(plane: Bytes, room: Bytes, sizes: Sequence[int] = ()) -> Bytes:
    """A plane (N,) as a zstandard frame, which is a view of `room`.

    Args:
        plane: at least one byte.
        room: for `frame_bound(N, parts)` bytes.
        sizes: of the parts of the plane that are to have codes of their own, none of them empty.
    """
    ends: list[int] = []
    at = 0
    for size in sizes or (plane.size,):
        blocks = -(-size // _BLOCK)
        ends += [at + size * (b + 1) // blocks for b in range(blocks)]
        at += size
    size = write_frame(plane, np.array(ends), _STATES, np.frombuffer(_DESCRIPTION, np.uint8), room)
    return room[:size]
