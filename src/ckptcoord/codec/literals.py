"""Reads the frames that `huffman` writes, without the interpreter.

A frame of literals is decoded here as fast as zstandard does it. Called from a compiled loop, that
spares the many small steps between two planes, for which threads would wait for the interpreter's
lock. Anything else that a zstandard frame may be, and all that is damaged, is left to zstandard:
what is read here is only ever read whole and sound.

Four streams are read side by side, from their ends: what comes next of each is in the topmost bits
of a word, and the lowest bit that is set says how many of its bits were used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ckptcoord.codec.huffman import FSE_DECODING, FSE_DESCRIPTION, FSE_LOG, MAX_BITS, MIN_BYTES
from ckptcoord.codec.jit import Value, compiled, load64, store16, trailing_zeros

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes: TypeAlias = NDArray[np.uint8]
    Singles: TypeAlias = NDArray[np.uint16]
    Doubles: TypeAlias = NDArray[np.uint32]
    Word: TypeAlias = Value  # of 64 bits
    Ints: TypeAlias = NDArray[np.int64]

_SIZE = 1 << MAX_BITS
_HEAD_BYTES = 9  # magic, descriptor, size
_MAGIC, _DESCRIPTOR = 0xFD2FB528, 0xA0  # a single segment, whose size has four bytes
_LITERALS_HEAD, _JUMPS = 5, 6
_OWN_CODES, _SAME_CODES = 2 | 3 << 2, 3 | 3 << 2
_MAX_BLOCK = 128 << 10
_A_TIME = 5  # codes of a stream that a word has bits for, having lost up to seven
_BYTES_A_TIME = 7  # that they and the bits lost take at most
_PAIRED_BITS = 5.5  # a byte, below which most codes come with another in the same bits
U64 = np.uint64
I64: Value = np.int64  # of unsigned ones: with others they would make floats
_TOP, _LOW = U64(64 - MAX_BITS), U64(63)
_ONE, _THREE, _SEVEN, _EIGHT, _SIXTEEN = U64(1), U64(3), U64(7), U64(8), U64(16)


def decoding_tables() -> tuple[Singles, Doubles]:
    """What `read_frame` needs to have, for one thread: codes by the bits that come next."""
    return np.empty(_SIZE, np.uint16), np.empty(_SIZE, np.uint32)


@compiled
def little(data: Bytes, at: int, size: int) -> int:
    """A whole number of so many bytes, the lowest first."""
    value = 0
    for i in range(size):
        value |= I64(data[at + i]) << (8 * i)
    return value


@compiled
def copy_bytes(data: Bytes, out: Bytes) -> None:
    """The first of `data` to all of `out`."""
    for i in range(out.size):
        out[i] = data[i]


@compiled
def fill_bytes(out: Bytes, byte: int) -> None:
    """The same byte everywhere."""
    for i in range(out.size):
        out[i] = byte


@compiled
def read_frame(coded: Bytes, out: Bytes, singles: Singles, doubles: Doubles) -> bool:
    """Decode a frame to `out`, all of it.

    Whether that was done: a frame of another kind, and one that is not sound, is not.
    """
    if not _is_for(coded, out.size):
        return False
    at, done, bits = _HEAD_BYTES, 0, 0.0  # how many a byte takes by the codes at hand
    while coded.size - at >= 3:
        head = little(coded, at, 3)
        at += 3
        kind, size, rest = (head >> 1) & 3, head >> 3, out[done:]
        if kind == 0 and size <= min(coded.size - at, rest.size):
            copy_bytes(coded[at : at + size], rest[:size])
            at += size
        elif kind == 1 and size <= rest.size and at < coded.size:
            fill_bytes(rest[:size], coded[at])
            at += 1
        elif kind == 2 and size <= coded.size - at:
            at += size
            size, bits = _read_block(coded[:at], at - size, rest, bits, singles, doubles)
            if size == 0:
                return False
        else:
            return False
        done += size
        if head & 1:
            return at == coded.size and done == out.size
    return False


@compiled
def _is_for(coded: Bytes, nbytes: int) -> bool:
    """Whether a frame begins as ours do, and is of so many bytes."""
    if coded.size < _HEAD_BYTES or little(coded, 0, 4) != _MAGIC or coded[4] != _DESCRIPTOR:
        return False
    return little(coded, 5, 4) == nbytes


@compiled
def _read_block(
    coded: Bytes, at: int, out: Bytes, bits: float, singles: Singles, doubles: Doubles
) -> tuple[int, float]:
    """Decode the block from `at` to the end of `coded` to the first of `out`.

    Returns how many bytes there were, 0 where it is not sound, and how many bits one takes.
    """
    begin = at + _LITERALS_HEAD
    if coded.size <= begin:
        return 0, bits
    head = little(coded, at, _LITERALS_HEAD)
    kind, size, end = head & 15, (head >> 4) & 0x3FFFF, begin + (head >> 22)
    # Of four streams with codes of their own, or those before; no sequences follow, in one byte.
    if kind not in {_OWN_CODES, _SAME_CODES} or end + 1 != coded.size or coded[end]:
        return 0, bits
    if not MIN_BYTES <= size <= min(out.size, _MAX_BLOCK):
        return 0, bits
    if kind == _OWN_CODES:
        weights = np.zeros(257, np.int64)
        count, used = _read_weights(coded[:end], begin, weights)
        if count == 0 or not _fill_singles(weights, count, singles):
            return 0, bits
        begin += used
        bits = 8 * (end - begin) / size
        if bits < _PAIRED_BITS:
            _fill_doubles(singles, doubles)
    paired = bits < _PAIRED_BITS
    if bits == 0 or not _read_streams(coded[:end], begin, out[:size], paired, singles, doubles):
        return 0, bits
    return size, bits


@compiled
def _read_weights(coded: Bytes, begin: int, weights: Ints) -> tuple[int, int]:
    """The weights (257,) of a tree that is described there, but for the last.

    How many they are, or 0 where they are not sound, and how many bytes they take. `coded` has
    eight bytes before.
    """
    size = I64(coded[begin]) if begin < coded.size else 0
    if size < 128:
        return _coded_weights(coded[: begin + 1 + size], begin + 1, weights), 1 + size
    count = size - 127
    used = 1 + (count + 1) // 2
    if used > coded.size - begin:
        return 0, 0
    for i in range(count):
        both = coded[begin + 1 + i // 2]
        weights[i] = both & 15 if i % 2 else both >> 4
    return count, used


@compiled
def _coded_weights(coded: Bytes, begin: int, weights: Ints) -> int:
    """The same where they are coded up to the end; only in the way that `huffman` codes them."""
    first = begin + FSE_DESCRIPTION.size
    left = _bits_of(coded, first, coded.size)
    if left < 2 * FSE_LOG:
        return 0
    for i in range(FSE_DESCRIPTION.size):
        if coded[begin + i] != FSE_DESCRIPTION[i]:
            return 0
    # Two states take turns. One that wants more bits than there are is the last but one.
    state = _next_bits(coded, first, left, FSE_LOG)
    other = _next_bits(coded, first, left - FSE_LOG, FSE_LOG)
    left -= 2 * FSE_LOG
    for i in range(254):
        weights[i], reads, to = FSE_DECODING[state]
        if left < reads:
            weights[i + 1] = FSE_DECODING[other, 0]
            return i + 2
        state, other = other, to + _next_bits(coded, first, left, reads)
        left -= reads
    return 0


@compiled
def _bits_of(coded: Bytes, begin: int, end: int) -> int:
    """How many bits a stream has: those below the highest that is set; -1 where none is."""
    if not 0 <= begin < end <= coded.size or coded[end - 1] == 0:
        return -1
    bits = 8 * (end - begin) - 1
    while not (coded[end - 1] >> (bits & 7)) & 1:
        bits -= 1
    return bits


@compiled
def _next_word(coded: Bytes, begin: int, left: int) -> Word:
    """What comes next of a stream of which so many bits are left, topmost; others follow them.

    `coded` has eight bytes before.
    """
    used = (left + 7) >> 3
    return load64(coded, U64(begin + used - 8)) << U64(8 * used - left)


@compiled
def _next_bits(coded: Bytes, begin: int, left: int, count: int) -> int:
    """The next bits, at least one."""
    bits: int = I64(_next_word(coded, begin, left) >> U64(64 - count))
    return bits


@compiled
def _fill_singles(weights: Ints, count: int, singles: Singles) -> bool:
    """Fill the table of codes: a byte, above how many bits its code has.

    Whether the first of the weights (257,), and the one that they leave, are those of a tree.
    """
    longest = _longest(weights, count)
    if longest == 0:
        return False
    # The longest codes come first, and bytes with codes of one length in their order.
    starts = np.zeros(MAX_BITS + 2, np.int64)
    for symbol in range(count + 1):
        starts[weights[symbol] + 1] += _run(weights[symbol], longest)
    for weight in range(1, MAX_BITS + 2):
        starts[weight] += starts[weight - 1]
    for symbol in range(count + 1):
        weight = weights[symbol]
        part = singles[starts[weight] : starts[weight] + _run(weight, longest)]
        starts[weight] += part.size
        for j in range(part.size):
            part[j] = (symbol << 8) | (longest + 1 - weight)
    return True


@compiled
def _run(weight: int, longest: int) -> int:
    """How much of the table a code takes."""
    return ((1 << weight) >> 1) << (MAX_BITS - longest)


@compiled
def _longest(weights: Ints, count: int) -> int:
    """How long the longest codes are; 0 where there is no such tree. Puts the last weight."""
    total, last = 0, 0
    for i in range(count):
        if weights[i] > MAX_BITS:
            return 0
        total += (1 << weights[i]) >> 1
        last += weights[i] == 1
    longest = 0
    while 1 << longest <= total:
        longest += 1
    rest, weight = (1 << longest) - total, 1
    while 1 << (weight - 1) < rest:
        weight += 1
    weights[count] = weight
    last += weight == 1  # of codes that are as long as that: there are some
    is_tree = last > 0 and longest <= MAX_BITS and 1 << (weight - 1) == rest
    return longest if is_tree else 0


@compiled
def _fill_doubles(singles: Singles, doubles: Doubles) -> None:
    """Fill the table of two codes: both bytes, above how many there are, above their bits.

    Of one byte where the bits have no room for the code that follows.
    """
    for i in range(_SIZE):
        first = np.uint32(singles[i])
        bits = first & np.uint32(255)
        after = np.uint32(singles[(U64(i) << U64(bits)) & U64(_SIZE - 1)])
        both = bits + (after & np.uint32(255))
        if both <= np.uint32(MAX_BITS):
            found = ((first >> np.uint32(8)) << np.uint32(16)) | (
                (after >> np.uint32(8)) << np.uint32(24)
            )
            doubles[i] = found | np.uint32(2 << 8) | both
        else:
            doubles[i] = ((first >> np.uint32(8)) << np.uint32(16)) | np.uint32(1 << 8) | bits


@compiled
def _read_streams(
    coded: Bytes,
    begin: int,
    out: Bytes,
    paired: bool,  # noqa: FBT001
    singles: Singles,
    doubles: Doubles,
) -> bool:
    """Decode four streams, to equal parts of `out` one after another; whether they were sound."""
    begins, left = np.empty(4, np.int64), np.empty(4, np.int64)
    at, ends = np.empty(4, np.int64), np.empty(4, np.int64)
    share = (out.size + 3) // 4
    end = begin + _JUMPS
    if end > coded.size:
        return False
    for s in range(4):
        begins[s] = end
        end = coded.size if s == 3 else end + little(coded, begin + 2 * s, 2)
        left[s] = _bits_of(coded, begins[s], end)
        at[s], ends[s] = s * share, min((s + 1) * share, out.size)
        if left[s] < 0:
            return False
    if paired:
        _read_pairs(coded, begins, left, out, at, ends, doubles)
    else:
        _read_each(coded, begins, left, out, at, ends, singles)
    for s in range(4):
        rest = out[at[s] : ends[s]]
        if not _read_rest(coded, begins[s], left[s], rest, singles):
            return False
    return True


@compiled
def _read_rest(coded: Bytes, begin: int, left: int, out: Bytes, singles: Singles) -> bool:
    """Decode the end of a stream; whether it ends there."""
    for i in range(out.size):
        if left < 0:
            return False
        code = singles[_next_bits(coded, begin, left, MAX_BITS)]
        left -= code & 255
        out[i] = code >> 8
    return left == 0


# Where a word is from, and what is left of it, go together: `_begun` to `_left` say how.


@compiled
def _begun(coded: Bytes, begin: int, left: int) -> tuple[int, Word]:
    """Where the word of a stream's next bits begins, and the word, marked."""
    at = begin + ((left + 7) >> 3) - 8
    return at, (load64(coded, U64(at)) | _ONE) << U64(-left & 7)


@compiled
def _refilled(coded: Bytes, at: int, word: Word) -> tuple[int, Word]:
    """The same later on; at most seven bytes before."""
    used = trailing_zeros(word)
    at -= I64(used >> _THREE)
    return at, (load64(coded, U64(at)) | _ONE) << (used & _SEVEN)


@compiled
def _left(begin: int, at: int, word: Word) -> int:
    """How many bits are left of the stream."""
    left: int = 8 * (at + 8 - begin) - I64(trailing_zeros(word))
    return left


@compiled
def _read_each(  # noqa: PLR0913, PLR0917 (as above; four streams)
    coded: Bytes, begins: Ints, left: Ints, out: Bytes, at: Ints, ends: Ints, singles: Singles
) -> None:
    """Decode most of four streams, code by code; `left` and `at` go on by what was read."""
    a, b, c, d = out[at[0] :], out[at[1] :], out[at[2] :], out[at[3] :]
    at_a, word_a = _begun(coded, begins[0], left[0])
    at_b, word_b = _begun(coded, begins[1], left[1])
    at_c, word_c = _begun(coded, begins[2], left[2])
    at_d, word_d = _begun(coded, begins[3], left[3])
    i, end = U64(0), U64(ends[3] - at[3])
    while True:
        # However wrong the bits are, nothing is read before the frame.
        turns = min(I64(end - i) // _A_TIME, min(at_a, at_b, at_c, at_d) // _BYTES_A_TIME)
        if turns <= 0:
            break
        for _ in range(turns):
            for _ in range(_A_TIME):
                word_a = _read_code(word_a, singles, a, i)
                word_b = _read_code(word_b, singles, b, i)
                word_c = _read_code(word_c, singles, c, i)
                word_d = _read_code(word_d, singles, d, i)
                i += _ONE
            at_a, word_a = _refilled(coded, at_a, word_a)
            at_b, word_b = _refilled(coded, at_b, word_b)
            at_c, word_c = _refilled(coded, at_c, word_c)
            at_d, word_d = _refilled(coded, at_d, word_d)
    at += I64(i)
    left[0] = _left(begins[0], at_a, word_a)
    left[1] = _left(begins[1], at_b, word_b)
    left[2] = _left(begins[2], at_c, word_c)
    left[3] = _left(begins[3], at_d, word_d)


@compiled
def _read_code(word: Word, singles: Singles, out: Bytes, i: Word) -> Word:
    """Decode one byte to `out[i]`; the word without its bits."""
    code = U64(singles[word >> _TOP])
    out[i] = code >> _EIGHT
    return word << (code & _LOW)


@compiled
def _read_pairs(  # noqa: PLR0913, PLR0917 (as above; four streams)
    coded: Bytes, begins: Ints, left: Ints, out: Bytes, at: Ints, ends: Ints, doubles: Doubles
) -> None:
    """The same, of one or two codes at once."""
    to_a, to_b, to_c, to_d = U64(at[0]), U64(at[1]), U64(at[2]), U64(at[3])
    at_a, word_a = _begun(coded, begins[0], left[0])
    at_b, word_b = _begun(coded, begins[1], left[1])
    at_c, word_c = _begun(coded, begins[2], left[2])
    at_d, word_d = _begun(coded, begins[3], left[3])
    while True:
        room = min(
            ends[0] - I64(to_a),
            ends[1] - I64(to_b),
            ends[2] - I64(to_c),
            ends[3] - I64(to_d),
        )
        before = min(at_a, at_b, at_c, at_d)
        turns = min(room // (2 * _A_TIME), before // _BYTES_A_TIME)
        if turns <= 0:
            break
        for _ in range(turns):
            for _ in range(_A_TIME):
                to_a, word_a = _read_codes(word_a, doubles, out, to_a)
                to_b, word_b = _read_codes(word_b, doubles, out, to_b)
                to_c, word_c = _read_codes(word_c, doubles, out, to_c)
                to_d, word_d = _read_codes(word_d, doubles, out, to_d)
            at_a, word_a = _refilled(coded, at_a, word_a)
            at_b, word_b = _refilled(coded, at_b, word_b)
            at_c, word_c = _refilled(coded, at_c, word_c)
            at_d, word_d = _refilled(coded, at_d, word_d)
    at[0], at[1], at[2], at[3] = to_a, to_b, to_c, to_d
    left[0] = _left(begins[0], at_a, word_a)
    left[1] = _left(begins[1], at_b, word_b)
    left[2] = _left(begins[2], at_c, word_c)
    left[3] = _left(begins[3], at_d, word_d)


@compiled
def _read_codes(word: Word, doubles: Doubles, out: Bytes, i: Word) -> tuple[Word, Word]:
    """Decode one byte or two to `out[i]` and after it; where the next goes, and the word."""
    code = U64(doubles[word >> _TOP])
    store16(out, i, code >> _SIXTEEN)
    return i + ((code >> _EIGHT) & _SEVEN), word << (code & _LOW)
