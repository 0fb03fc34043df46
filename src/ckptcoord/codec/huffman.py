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

from ckptcoord.codec.jit import compiled, inlined, load32, load64, store64

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Bytes: TypeAlias = NDArray[np.uint8]
    Codes: TypeAlias = NDArray[np.uint64]
    Ints: TypeAlias = NDArray[np.int64]

MIN_BYTES = 64
"""Of a block that is coded: a handful of bytes has no four streams, nor would they pay."""

MAX_BITS = 11  # of a code, the most that the format allows
BLOCK = 64 << 10  # the format allows 128 KiB; trees for smaller blocks follow the data closer
FINE_BLOCK = 32 << 10  # pays where codes are short: making trees for others takes too long
_MAX_TREE = 128
_NEVER = 1 << 40  # more bits than any plane has
_SPARE = 8  # bytes behind what is written, which a word that is stored may reach
_LOW, _BYTE = np.uint64(63), np.uint64(255)
U64 = np.uint64

# The weights of a tree (how far a code is from the longest, plus 1; 0 without one) are coded by FSE
# with one fixed distribution over 0 to 11, of 64 in all: fitting one would save some 10 bytes.
_SHARES = (6, 12, 10, 8, 7, 6, 4, 3, 3, 2, 2, 1)
FSE_LOG = 6


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
    weight = np.zeros(2 * n, np.int64)
    for i in range(n):
        weight[i] = counts[symbols[first + i]]
    depth = _depths(weight, n)
    if depth[0] > MAX_BITS:  # the rarest is the deepest
        _merge_packages(weight[:n], depth)
    lengths[:] = 0
    bits = 0
    for i in range(n):
        lengths[symbols[first + i]] = depth[i]
        bits += depth[i] * weight[i]
    return bits


@compiled
def _depths(weight: Ints, n: int) -> Ints:
    """How deep n leaves of such weights, rarest first, are in a tree; `weight` has room for 2n."""
    # Two queues: the leaves in order, and the nodes made of them, which arise in order.
    parent = np.zeros(2 * n, np.int64)
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
    return depth


@compiled
def _merge_packages(weight: Ints, depth: Ints) -> None:
    """The depths of leaves (n,), rarest first, that cost the least where MAX_BITS is the limit.

    Larmore and Hirschberg, "A fast algorithm for optimal length-limited Huffman codes", 1990. For
    each bit there is a list of all leaves and of the pairs of the list before, by weight; a leaf is
    as deep as there are lists of which it is taken.
    """
    n = weight.size
    is_leaf = np.empty((MAX_BITS, 2 * n), np.bool_)
    pairs = np.empty(n, np.int64)
    items = np.empty(2 * n, np.int64)
    found = 0  # pairs
    for level in range(MAX_BITS):
        leaf, pair = 0, 0
        for i in range(n + found):
            takes_leaf = pair == found or (leaf < n and weight[leaf] <= pairs[pair])
            items[i] = weight[leaf] if takes_leaf else pairs[pair]
            is_leaf[level, i] = takes_leaf
            leaf += takes_leaf
            pair += not takes_leaf
        found = (n + found) // 2
        for i in range(found):
            pairs[i] = items[2 * i] + items[2 * i + 1]
    depth[:n] = 0
    taken = 2 * n - 2
    for level in range(MAX_BITS - 1, -1, -1):
        leaves = 0
        for i in range(taken):
            leaves += is_leaf[level, i]
        for i in range(leaves):
            depth[i] += 1
        taken = 2 * (taken - leaves)


def _fse() -> tuple[bytes, Ints, Ints]:
    """The distribution as a frame describes it, and FSE's tables by it. RFC 8878, 4.1.

    For encoding, of each weight and of each state that the reader goes on to, or 64 where the
    weights end: the state that stands for the weight, how many bits it reads, and which;
    (12, 65, 3). For decoding, of each state: the weight, how many bits it reads, and to which state
    it goes on where they are zeros; (64, 3).
    """
    size = 1 << FSE_LOG
    bits, used = FSE_LOG - 5, 4
    left, threshold, width = size + 1, size, FSE_LOG + 1
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
    decoding = np.zeros((size, 3), np.int64)
    for state, weight in enumerate(spread):
        reads = FSE_LOG + 1 - following[weight].bit_length()
        first = (following[weight] << reads) - size
        decoding[state] = weight, reads, first
        following[weight] += 1
        for to in range(first, first + (1 << reads)):
            table[weight, to] = state, reads, to - first
        table[weight, size] = state, 0, 0
    return bits.to_bytes(-(-used // 8), "little"), table, decoding


_DESCRIPTION, _STATES, FSE_DECODING = _fse()
FSE_DESCRIPTION = np.frombuffer(_DESCRIPTION, np.uint8)


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
    state = np.full(2, 1 << FSE_LOG, np.int64)
    for i in range(last - 1, -1, -1):
        before, reads, value = states[weights[i], state[i % 2]]
        bit = _put_bits(out, bit, value, reads)
        state[i % 2] = before
    bit = _put_bits(out, bit, state[1], FSE_LOG)
    bit = _put_bits(out, bit, state[0], FSE_LOG)
    bit = _put_bits(out, bit, 1, 1)
    out[0] = (bit + 7) // 8 - 1
    return (bit + 7) // 8 if out[0] < 128 else 0


@compiled
def _codes(lengths: Bytes, codes: Codes) -> None:
    """The code of each byte, in the topmost bits, and its length in the lowest; 0 without one.

    The longest codes are the lowest.
    """
    following = np.zeros(MAX_BITS + 2, np.int64)
    for symbol in range(256):
        following[lengths[symbol]] += 1
    code = 0
    for length in range(MAX_BITS, 0, -1):
        code, following[length] = (code + following[length]) >> 1, code
    for symbol in range(256):
        length = lengths[symbol]
        codes[symbol] = (U64(following[length]) << (U64(64 - length) & _LOW)) | U64(length)
        following[length] += 1
        if length == 0:
            codes[symbol] = 0


@compiled
def _pair_codes(codes: Codes, pairs: Codes) -> None:
    """The same (65536,) of two bytes, by the lower and 256 times the upper, which comes first.

    Only of bytes that occur; what stands for others is left as it is.
    """
    first, last = 255, 0
    for symbol in range(256):
        if codes[symbol]:
            first = min(first, symbol)
            last = symbol
    after = codes[first : last + 1]
    for upper in range(first, last + 1):
        length = codes[upper] & _LOW
        if length:
            code = codes[upper] ^ length
            row = pairs[256 * upper + first : 256 * upper + last + 1]
            for k in range(after.size):
                more = after[k] & _LOW
                row[k] = (after[k] ^ more) | (code >> more) | (length + more)


@compiled
def _streams(part: Bytes, codes: Codes, pairs: Codes, out: Bytes, at: int) -> int:
    """Write a block's four streams, with the sizes of three before them; where they end."""
    segment = (part.size + 3) // 4
    end = at + 6
    for s in range(4):
        begin = end
        end = _stream(part[s * segment : (s + 1) * segment], codes, pairs, out, begin)
        if s < 3:
            put_little(out, at + 2 * s, end - begin, 2)
    return end


@compiled
def _stream(part: Bytes, codes: Codes, pairs: Codes, out: Bytes, begin: int) -> int:
    """Write one stream, from its last byte on; where it ends. Touches _SPARE bytes more.

    `acc` holds what has been written, the last bit topmost; below the lowest `held` of these it is
    anything, as is all of `held` but the lowest six bits until it is cut to less than a byte's.
    """
    acc, held, at = U64(0), U64(0), U64(begin)
    quads = part.size // 4
    for i in range(part.size - 1, 4 * quads - 1, -1):
        code = codes[part[i]]
        acc = (acc >> (code & _LOW)) | code
        held += code
        store64(out, at, acc >> ((U64(0) - held) & _LOW))
        at += (held >> U64(3)) & U64(7)
        held &= U64(7)
    first = U64(4 * quads)
    for _ in range(quads):
        first -= U64(4)
        four = load32(part, first)
        code = pairs[four >> U64(16)]
        acc = (acc >> (code & _LOW)) | code
        held += code
        code = pairs[four & U64(0xFFFF)]
        acc = (acc >> (code & _LOW)) | code
        held += code
        store64(out, at, acc >> ((U64(0) - held) & _LOW))
        at += (held >> U64(3)) & U64(7)
        held &= U64(7)
    left = acc >> ((U64(0) - held) & _LOW) if held else U64(0)
    out[at] = np.uint8(left | (U64(1) << held))
    return int(at) + 1


@compiled
def put_little(out: Bytes, at: int, value: int, size: int) -> int:
    """Write a whole number in so many bytes, the lowest first; where they end."""
    for i in range(size):
        out[at + i] = (value >> (8 * i)) & 255
    return at + size


@compiled
def count_bytes(plane: Bytes, counts: NDArray[np.uint32]) -> int:
    """How often each byte is in a plane: (N,), (256,). Returns how many different bytes occur."""
    # Four tables: adding to one count twice in a row waits for the first addition.
    a, b = np.zeros(256, np.uint32), np.zeros(256, np.uint32)
    c, d = np.zeros(256, np.uint32), np.zeros(256, np.uint32)
    rows = plane.size // 8
    for i in range(rows):
        word = load64(plane, U64(8 * i))
        a[word & _BYTE] += np.uint32(1)
        b[(word >> U64(8)) & _BYTE] += np.uint32(1)
        c[(word >> U64(16)) & _BYTE] += np.uint32(1)
        d[(word >> U64(24)) & _BYTE] += np.uint32(1)
        a[(word >> U64(32)) & _BYTE] += np.uint32(1)
        b[(word >> U64(40)) & _BYTE] += np.uint32(1)
        c[(word >> U64(48)) & _BYTE] += np.uint32(1)
        d[word >> U64(56)] += np.uint32(1)
    for i in range(8 * rows, plane.size):
        a[plane[i]] += np.uint32(1)
    different = 0
    for k in range(256):
        counts[k] = a[k] + b[k] + c[k] + d[k]
        different += counts[k] > 0
    return different


@compiled
def _bits_with(codes: Codes, counts: NDArray[np.uint32]) -> int:
    """What bytes that occur as often as `counts` take in codes that there are; or _NEVER."""
    bits = 0
    for symbol in range(256):
        length = np.int64(codes[symbol] & _LOW)
        bits += counts[symbol] * (length if length else _NEVER)
    return bits if bits < _NEVER else _NEVER


@compiled
def _entropy_bits(counts: NDArray[np.uint32], total: int) -> float:
    """Bits that bytes take at least, by themselves, of which so many occur as `counts` says."""
    bits = total * np.log2(total)
    for symbol in range(256):
        if counts[symbol]:
            bits -= counts[symbol] * np.log2(counts[symbol])
    return float(bits)


@compiled
def put_bytes(data: Bytes, out: Bytes, at: int) -> int:
    """Write bytes; where they end."""
    to = out[at : at + data.size]
    for i in range(data.size):
        to[i] = data[i]
    return at + data.size


@inlined
def write_frame(  # noqa: PLR0913, PLR0917 (a tuple would be unpacked element by element)
    plane: Bytes,
    ends: Ints,
    tried: NDArray[np.bool_],
    states: Ints,
    description: Bytes,
    pairs: Codes,
    out: Bytes,
) -> int:
    """Write a plane (N,) as a frame with blocks up to `ends`, coded where `tried`; its size."""
    counts = np.empty(256, np.uint32)
    codes = np.zeros(256, np.uint64)
    # Magic, "single segment, the size has four bytes", size.
    at = put_little(out, put_little(out, put_little(out, 0, 0xFD2FB528, 4), 0xA0, 1), plane.size, 4)
    begin, spare = 0, 0.0
    for b in range(ends.size):
        part = plane[begin : ends[b]]
        begin = ends[b]
        last = 1 if begin == plane.size else 0
        if tried[b] and count_bytes(part, counts) == 1:
            at = put_little(out, at, last | (1 << 1) | (part.size << 3), 3)
            at = put_little(out, at, part[0], 1)
            continue
        end = 0
        if tried[b] and part.size >= MIN_BYTES:
            end, spare = _literals(
                part, counts, codes, pairs, spare, states, description, out, at + 3
            )
        if end:
            put_little(out, at, last | (2 << 1) | ((end - at - 3) << 3), 3)
            at = end
        else:
            at = put_bytes(part, out, put_little(out, at, last | (part.size << 3), 3))
    return at


@compiled
def write_blocks(  # noqa: PLR0913, PLR0917 (as above)
    plane: Bytes,
    bits: NDArray[np.float64],
    most_bits: float,
    block: int,
    states: Ints,
    description: Bytes,
    pairs: Codes,
    out: Bytes,
) -> int:
    """Write a plane (N,) as a frame with equal blocks of at most `block` bytes; its size.

    Coded is what lies where `bits`, estimates for equal parts of the plane, are below `most_bits`.
    """
    blocks = (plane.size + block - 1) // block
    ends, tried = np.empty(blocks, np.int64), np.empty(blocks, np.bool_)
    for b in range(blocks):
        ends[b] = plane.size * (b + 1) // blocks
        tried[b] = bits[b * bits.size // blocks] < most_bits
    return write_frame(plane, ends, tried, states, description, pairs, out)


@inlined
def _literals(  # noqa: PLR0913, PLR0917 (as above)
    part: Bytes,
    counts: NDArray[np.uint32],
    codes: Codes,
    pairs: Codes,
    spare: float,
    states: Ints,
    description: Bytes,
    out: Bytes,
    at: int,
) -> tuple[int, float]:
    """Write a block's literals, and no sequences; where they end, or 0 if they would not pay.

    `codes` and `pairs` are those of the block before. They serve again where that takes up to
    `spare` bits more than the entropy; what is returned for the next block is how many new codes
    take, with their tree.
    """
    tree, lengths = np.empty(3 * _MAX_TREE, np.uint8), np.empty(256, np.uint8)
    least = _entropy_bits(counts, part.size)
    bits, tree_bytes = _bits_with(codes, counts), 0
    repeats = bits - least <= spare
    if not repeats:
        bits = code_lengths(counts, lengths)
        tree_bytes = _tree(lengths, states, description, tree)
        if tree_bytes == 0:
            return 0, spare
    if tree_bytes + bits // 8 + 20 >= part.size:
        return 0, spare
    if not repeats:
        _codes(lengths, codes)
        _pair_codes(codes, pairs)
        spare = bits - least + 8 * tree_bytes
    end = _streams(part, codes, pairs, out, put_bytes(tree[:tree_bytes], out, at + 5))
    coding = 3 if repeats else 2
    put_little(out, at, coding | (3 << 2) | (part.size << 4) | ((end - at - 5) << 22), 5)
    return put_little(out, end, 0, 1), spare


def parts_of(nbytes: int) -> int:
    """How many parts with codes of their own a plane is written in."""
    return -(-nbytes // BLOCK)


def frame_bound(nbytes: int, parts: int = 1) -> int:
    """The most bytes that the frame of a plane in so many parts takes, or touches."""
    return nbytes + 16 + _SPARE + 4 * (parts + nbytes // FINE_BLOCK)


class LiteralWriter:
    """Writes planes as frames; it keeps a table, so one thread at a time uses it.

    Attributes:
        tables: the last arguments of `write_frame` and `write_blocks` but for `out`.
    """

    __slots__ = ("tables",)

    def __init__(self) -> None:
        self.tables = (_STATES, FSE_DESCRIPTION, np.empty(1 << 16, np.uint64))

    def encode(self, plane: Bytes, room: Bytes, sizes: Sequence[int] = ()) -> Bytes:
        """A plane (N,) as a zstandard frame, which is a view of `room`.

        Args:
            plane: at least one byte.
            room: for `frame_bound(N, parts)` bytes.
            sizes: of the parts of the plane that are to have codes of their own, none of them
                empty.
        """
        ends: list[int] = []
        at = 0
        for size in sizes or (plane.size,):
            blocks = parts_of(size)
            ends += [at + size * (b + 1) // blocks for b in range(blocks)]
            at += size
        tried = np.ones(len(ends), np.bool_)
        return room[: write_frame(plane, np.array(ends), tried, *self.tables, room)]
