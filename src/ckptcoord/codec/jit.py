"""How this package's loops are compiled. Importing numba takes a second: import late."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from numba import njit

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")
Value: TypeAlias = Any
"""A numpy scalar or array in a compiled function, which is compiled for each type that comes."""


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
