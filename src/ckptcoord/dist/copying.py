"""Copies of tensors and arrays into a buffer, row-major, byte for byte as `CapturedTensor.read`."""

from __future__ import annotations

import ctypes
from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import torch

from ckptcoord.dist.capture import flat_bytes, tensor_bytes
from ckptcoord.dist.deferral import is_plain

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptcoord.dist.stagingpool import Buffer

SMALL_BYTES = 64 << 10
"""What is copied with the GIL held."""
# With the GIL held: to let it go for a copy of microseconds can cost the milliseconds until
# another thread gives it back.
_copy_small = ctypes.PyDLL(None).memmove
_copy_small.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_copy_small.restype = None
_WORD = np.dtype(np.int64)


def is_flat(tensor: torch.Tensor) -> bool:
    """Whether its elements lie in this process's memory as they are to be stored."""
    return (
        tensor.is_cpu
        and tensor.is_contiguous()
        and is_plain(tensor)
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def copy_flat(buffer: Buffer, offset: int, tensor: torch.Tensor, span: tuple[int, int]) -> None:
    """Copy a range of a flat tensor's bytes.

    Args:
        buffer: where to.
        offset: of the whole tensor's copy in it, in bytes.
        tensor: as `is_flat` says.
        span: the first byte of the tensor to copy, and the one after the last.
    """
    start, stop = span
    nbytes = stop - start
    target, source = buffer.address + offset + start, tensor.data_ptr() + start
    if nbytes <= SMALL_BYTES:
        _copy_small(target, source, nbytes)
    elif (target | source) % _WORD.itemsize:
        ctypes.memmove(target, source, nbytes)
    else:
        # A sixth faster than memmove, which stores past the caches what the save reads next.
        whole = nbytes - nbytes % _WORD.itemsize
        place = buffer.array[offset + start : offset + start + whole].view(_WORD)
        words = tensor_bytes(tensor)[start : start + whole].view(_WORD)
        np.positive(words, out=place)
        _copy_small(target + whole, source + whole, nbytes - whole)


class Copies:
    """Copies of flat tensors of at most SMALL_BYTES, made in one go.

    It knows where they are and keeps none: who makes the copies holds the tensors.
    """

    def __init__(self) -> None:
        self._sources: list[int] = []
        self._offsets: list[int] = []
        self._sizes: list[int] = []

    def add(self, tensor: torch.Tensor, offset: int) -> None:
        """One more, to an offset in bytes in the buffer."""
        self._sources.append(tensor.data_ptr())
        self._offsets.append(offset)
        self._sizes.append(tensor.nbytes)

    def make(self, buffer: Buffer) -> None:
        """Make them all."""
        base = buffer.address
        targets = [base + offset for offset in self._offsets]
        deque(map(_copy_small, targets, self._sources, self._sizes), maxlen=0)  # a loop in C


@torch.no_grad()
def copy_whole(buffer: Buffer, offset: int, value: torch.Tensor | np.ndarray) -> None:
    """Copy any tensor or array. From a CUDA device: on the current stream, not waited for."""
    nbytes = value.nbytes
    if not nbytes:
        return
    if isinstance(value, np.ndarray):
        place = buffer.array[offset : offset + nbytes].view(value.dtype)
        np.copyto(place.reshape(value.shape), value)
    elif value.is_cuda and is_plain(value):
        place_t = buffer.tensor[offset : offset + nbytes]
        place_t.copy_(flat_bytes(value), non_blocking=True)
    elif value.is_cpu and is_plain(value):
        buffer.tensor[offset : offset + nbytes].view(value.dtype).view(value.shape).copy_(value)
    else:
        np.copyto(buffer.array[offset : offset + nbytes], tensor_bytes(value))


class SideStreams:
    """A stream beside the current one on each CUDA device that is concerned; on none: no effect."""

    def __init__(self, devices: Iterable[int]) -> None:
        self._streams = [
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for device in sorted(set(devices))
        ]

    def __bool__(self) -> bool:
        return bool(self._streams)

    def fork(self) -> None:
        """What is put on them from here on comes after all that was given to the device so far."""
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))

    def join(self) -> None:
        """What is given to the device from here on comes after all that was put on them so far.

        The calling thread does not wait.
        """
        for stream in self._streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    def entered(self) -> ExitStack:
        """A context in which they are the current ones."""
        stack = ExitStack()
        for stream in self._streams:
            stack.enter_context(torch.cuda.stream(stream))
        return stack

    def drain(self) -> None:
        """Wait for all that was put on them."""
        for stream in self._streams:
            stream.synchronize()
