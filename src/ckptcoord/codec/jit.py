"""How this package's loops are compiled. Importing numba takes a second: import late."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")
Value: TypeAlias = Any
"""A numpy scalar or array in a compiled function, which is compiled for each type that comes."""

_WORD, _HALF = ir.IntType(64), ir.IntType(32)


def _load(context: Value, builder: Value, signature: Value, args: Value) -> Value:
    return builder.load(_word_at(context, builder, signature, args, _WORD), align=1)


def _load_half(context: Value, builder: Value, signature: Value, args: Value) -> Value:
    half = builder.load(_word_at(context, builder, signature, args, _HALF), align=1)
    return builder.zext(half, _WORD)


def _store(context: Value, builder: Value, signature: Value, args: Value) -> Value:
    builder.store(args[2], _word_at(context, builder, signature, args, _WORD), align=1)
    return context.get_dummy_value()


def _word_at(context: Value, builder: Value, signature: Value, args: Value, word: Value) -> Value:
    array = context.make_array(signature.args[0])(context, builder, args[0])
    first = builder.bitcast(array.data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(first, [args[1]]), word.as_pointer())


def _load64(_context: Value, data: Value, at: Value) -> Value:
    return types.uint64(data, types.uint64), _load


def _load32(_context: Value, data: Value, at: Value) -> Value:
    return types.uint64(data, types.uint64), _load_half


def _store64(_context: Value, data: Value, at: Value, value: Value) -> Value:
    return types.void(data, types.uint64, types.uint64), _store


# In compiled functions only; nothing checks that the bytes are within the array.
load64: Any = intrinsic(_load64)
"""`load64(data, at)`: the eight bytes at `at` (uint64) as a little-endian uint64."""
load32: Any = intrinsic(_load32)
"""The same of four bytes; also as a uint64."""
store64: Any = intrinsic(_store64)
"""`store64(data, at, value)`: the inverse of `load64`."""


def compiled(function: F) -> F:
    """Compile at the first call, to run without the interpreter's lock.

    The machine code is kept on disk, beside the source or in the user's cache, for processes to
    come; where numba finds no folder to write to, each process compiles for itself.
    """
    return _compiled(function, {})


def summing(function: F) -> F:
    """As `compiled`, for a loop that adds floats up and may do so in any order."""
    return _compiled(function, {"fastmath": {"reassoc", "contract", "nsz"}})


def _compiled(function: F, options: dict[str, Any]) -> F:
    try:
        made: F = njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # "no locator available"
        made = njit(nogil=True, **options)(function)
    return made
