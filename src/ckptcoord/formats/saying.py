"""What torch means when it cannot write or read."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.api import CheckpointException

from ckptcoord.errors import ConfigError, CorruptError, StorageError
from ckptcoord.store.files import storage_error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptcoord.errors import CkptError


@contextmanager
def torch_writes(path: str) -> Iterator[None]:
    """Turn what torch raises in the block into a StorageError.

    torch reports a full disk as a position that it did not expect; the reason is further down.
    """
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        behind = _behind(error)
        if isinstance(behind, OSError):
            raise storage_error("write", path, behind) from behind
        raise StorageError(operation="write", path=path, why=_first_line(behind)) from behind


@contextmanager
def torch_reads_back(path: str) -> Iterator[None]:
    """Turn what torch raises in the block, of what it has just written, into a CorruptError."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        behind = _behind(error)
        why = f"cannot be read back: {_first_line(behind)}"
        raise CorruptError(path=path, why=why, help="Nothing was exported; try again") from behind


def weights_only_error(error: Exception, path: str) -> CkptError:
    """What it means that torch does not read back what it has just written."""
    return ConfigError(
        field="export",
        why=f"{path} would not load with weights_only=True: {_first_line(error)}",
        help="Export fewer components: `--component KEY` in the place of `--all`",
    )


def _behind(error: BaseException) -> BaseException:
    """The system's own word, if it stands somewhere behind an error; else what DCP wraps."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError):
            return current
        current = current.__cause__ or current.__context__
    return error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
