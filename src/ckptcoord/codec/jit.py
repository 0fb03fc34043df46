"""How this package's loops are compiled. Importing numba takes a second: import late."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core.cgutils import get_or_insert_function
from numba.core.extending import intrinsic
from numba.core.registry import cpu_target

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")
Value: TypeAlias = Any
"""A numpy scalar or array in a compiled function, which is compiled for each type that comes."""

_SLOW_AT_BIT_MOVES = {"bdver4", "znver1", "znver2"}  # they take dozens of steps
_WORD, _HALF, _QUARTER = ir.IntType(64), ir.IntType(32), ir.IntType(16)


def _load(context: Value, builder: Value, signature: Value, args: Value) -> Value:
    return builder.load(_word_at(context, builder, signature, args, _WORD), align=1)


def _load_half(context: Value, builder: Value, signature: Value, args: Value) -> Value:
    half = builder.load(_word_at(context, builder, signature, args, _HALF), align=1)
    return builder.zext(half, _WORD)


def _store(context: Value, builder: Value, signature: Value, args: Value) -> Value:
    builder.store(args[2], _word_at(context, builder, signature, args, _WORD), align=1)
    return context.get_dummy_value()


def _store_quarter(context: Value, builder: Value, signature: Value, args: Value) -> Value:
    quarter = builder.trunc(args[2], _QUARTER)
    builder.store(quarter, _word_at(context, builder, signature, args, _QUARTER), align=1)
    return context.get_dummy_value()


def _zeros(_context: Value, builder: Value, _signature: Value, args: Value) -> Value:
    return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))


def _count(_context: Value, builder: Value, _signature: Value, args: Value) -> Value:
    return builder.ctpop(args[0])


def _moving(name: str) -> Callable[..., Value]:
    """What calls an instruction of two words."""

    def call(_context: Value, builder: Value, _signature: Value, args: Value) -> Value:
        kind = ir.FunctionType(_WORD, [_WORD, _WORD])
        function = get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
        return builder.call(function, args)

    return call


def _word_at(context: Value, builder: Value, signature: Value, args: Value, word: Value) -> Value:
    array = context.make_array(signature.args[0])(context, builder, args[0])
    first = builder.bitcast(array.data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(first, [args[1]]), word.as_pointer())


def _load64(_context: Value, data: Value, at: Value) -> Value:
    return types.uint64(data, types.uint64), _load


def _load32(_context: Value, data: Value, at: Value) -> Value:
    return types.uint64(data, types.uint64), _load_half


def _store16(_context: Value, data: Value, at: Value, value: Value) -> Value:
    return types.void(data, types.uint64, types.uint64), _store_quarter


def _trailing_zeros(_context: Value, value: Value) -> Value:
    return types.uint64(types.uint64), _zeros


def _count_bits(_context: Value, value: Value) -> Value:
    return types.uint64(types.uint64), _count


def _gather_bits(_context: Value, word: Value, mask: Value) -> Value:
    return types.uint64(types.uint64, types.uint64), _moving("llvm.x86.bmi.pext.64")


def _spread_bits(_context: Value, word: Value, mask: Value) -> Value:
    return types.uint64(types.uint64, types.uint64), _moving("llvm.x86.bmi.pdep.64")


def _store64(_context: Value, data: Value, at: Value, value: Value) -> Value:
    return types.void(data, types.uint64, types.uint64), _store


# In compiled functions only; nothing checks that the bytes are within the array.
load64: Any = intrinsic(_load64)
"""`load64(data, at)`: the eight bytes at `at` (uint64) as a little-endian uint64."""
load32: Any = intrinsic(_load32)
"""The same of four bytes; also as a uint64."""
store64: Any = intrinsic(_store64)
"""`store64(data, at, value)`: the inverse of `load64`."""


store16: Any = intrinsic(_store16)
"""`store16(data, at, value)`: its two lowest bytes."""
trailing_zeros: Any = intrinsic(_trailing_zeros)
"""How many bits of a uint64 are below the lowest that is set."""

count_bits: Any = intrinsic(_count_bits)
"""How many bits of a uint64 are set, as one."""
gather_bits: Any = intrinsic(_gather_bits)
"""`gather_bits(word, mask)`: the bits of a word that the mask has, at its low end. HAS_BIT_MOVES"""
spread_bits: Any = intrinsic(_spread_bits)
"""The inverse, with zeros elsewhere. HAS_BIT_MOVES"""


def _has_bit_moves() -> bool:
    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    return "+bmi2" in features.split(",") and name not in _SLOW_AT_BIT_MOVES


HAS_BIT_MOVES = _has_bit_moves()
"""Whether what is compiled for has `gather_bits` and `spread_bits`, and is fast at them."""


def compiled(function: F) -> F:
    """Compile at the first call, to run without the interpreter's lock.

    The machine code is kept on disk, beside the source or in the user's cache, for processes to
    come; where numba finds no folder to write to, each process compiles for itself.
    """
    return _compiled(function, {})


def inlined(function: F) -> F:
    """As `compiled`, for what one other function calls at one place: it becomes part of that.

    What a function calls is compiled once more with it. So a chain of calls takes as long as all
    its functions together, once for each of them that is compiled on its own.
    """
    return _compiled(function, {"inline": "always"})


def summing(function: F) -> F:
    """As `compiled`, for a loop that adds floats up and may do so in any order."""
    return _compiled(function, {"fastmath": {"reassoc", "contract", "nsz"}})


def _compiled(function: F, options: dict[str, Any]) -> F:
    try:
        made: F = njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # "no locator available"
        made = njit(nogil=True, **options)(function)
    return _for_types(made)


def _for_types(made: F) -> F:
    """Compile for types only, and not again for each constant that a caller writes."""
    dispatcher: Any = made
    exact = getattr(dispatcher, "get_call_template", None)
    if exact is not None:  # without it nothing is wrong, but slower to compile
        unliteral: Any = types.unliteral
        dispatcher.get_call_template = lambda args, kws: exact(tuple(map(unliteral, args)), kws)
    return made
