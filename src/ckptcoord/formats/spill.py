"""Tensors in a file without a name: memory that the system may take back while they are idle.

For tools that want a whole state as tensors, and read them one after another: what they hold at a
time is one tensor, whatever the state's size. The file is gone when its last tensor is, also after
a kill.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import tempfile
from typing import TYPE_CHECKING

import torch

from ckptcoord.dist.restore import empty_like
from ckptcoord.errors import CkptError
from ckptcoord.store.files import storage_errors

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ckptcoord.codec.tensorspec import TensorSpec

_ALIGN = 64
_LARGE_BYTES = 1 << 20


class Spill:
    """Room for tensors.

    Args:
        folder: on whose file system the room is taken.
        specs: of all tensors that will be in it.

    Raises:
        StorageFullError: there is not as much space.
        StorageError: the file cannot be made.
    """

    def __init__(self, folder: Path, specs: Iterable[TensorSpec]) -> None:
        size_bytes = sum(_room(spec.nbytes) for spec in specs)
        self._end = 0
        self._map: mmap.mmap | None = None
        if not size_bytes:
            return
        with (
            storage_errors("allocate", str(folder)),
            tempfile.TemporaryFile(dir=folder) as file,
        ):
            # Now: to write to memory of a file that finds no space would be a SIGBUS.
            os.posix_fallocate(file.fileno(), 0, size_bytes)
            self._map = mmap.mmap(file.fileno(), size_bytes)

    def take(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of zeros, with a storage of its own."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes or self._map is None:
            return torch.empty(shape, dtype=dtype)
        data = torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=self._end)
        self._end += _room(nbytes)
        return data.view(dtype).view(shape)

    def clear(self) -> None:
        """Make all tensors zeros again."""
        if self._map is not None:
            first = ctypes.c_char.from_buffer(self._map)
            ctypes.memset(ctypes.addressof(first), 0, len(self._map))


def scratch(spec: TensorSpec) -> torch.Tensor:
    """New memory for a tensor that soon goes: back to the system at once, whatever malloc keeps.

    Raises:
        ConfigError: this torch has no such dtype.
        CkptError: there is no memory for it.
    """
    if spec.nbytes < _LARGE_BYTES:
        return empty_like(spec)
    try:
        memory = mmap.mmap(-1, spec.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        why = f"tensor {spec.name!r} needs {spec.nbytes:,} bytes of memory, more than there are"
        raise CkptError(what=why) from error
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    return flat.view(empty_like(spec, size=()).dtype).view(spec.shape)


def _room(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
