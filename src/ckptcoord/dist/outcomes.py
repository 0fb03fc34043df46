"""What an error says: did something fail, and have all ranks that error?"""

from __future__ import annotations

from ckptcoord.errors import (
    CkptError,
    DisagreementError,
    SaveAbortedError,
    StoreUnreachableError,
)

_APART = ("operation", "saving in the background")  # who disagrees here does not meet again soon


def is_failure(error: BaseException) -> bool:
    """Whether it says that something failed, and not that somebody wants to leave.

    A panic of Rust's, as blake3's where memory is short, is no Exception; each library has a class
    of its own for it.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def is_common(error: CkptError) -> bool:
    """Whether all ranks have it, and are where this one is.

    Nobody was silent, this one did not lose the store, and nobody was in another operation, or
    waits for it where others do not.
    """
    lost = isinstance(error.__cause__, StoreUnreachableError)
    apart = isinstance(error, DisagreementError) and error.field in _APART
    silent = bool(getattr(error, "silent", ()))
    return not (lost or apart or silent)


def is_by(error: CkptError, *kinds: type[CkptError]) -> bool:
    """Whether it is of these kinds on each rank that failed; the same on all ranks."""
    if isinstance(error, SaveAbortedError):
        names = tuple(kind.__name__ for kind in kinds)
        return is_common(error) and all(why.startswith(names) for why in error.failures.values())
    return isinstance(error, kinds)
