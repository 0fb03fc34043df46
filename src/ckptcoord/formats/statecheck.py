"""Whether a state that was read is of a size that its file can have meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ckptcoord.errors import CorruptError
from ckptcoord.formats.folder import RECOPY

MAX_VALUES = 5_000_000
MAX_DEPTH = 100
_Memory = tuple[int, tuple[int, ...], tuple[int, ...], str]


def check_state(state: object, path: str, *, limit_bytes: int) -> None:
    """Refuse a state that is much more when it is written out than where it is read from.

    A tensor of stride 0 has elements without bytes; lists that hold one list ten times each, ten
    times over, have 10**10 values.

    Raises:
        CorruptError: it has over 5,000,000 values, `limit_bytes` of tensors or 100 levels, or
            holds itself.
    """
    _Check(path, limit_bytes).run(state)


class _Check:
    def __init__(self, path: str, limit_bytes: int) -> None:
        self._path, self._limit_bytes = path, limit_bytes
        self._counted: dict[int, int] = {}  # by container: the values in it
        self._open: set[int] = set()
        self._kept: list[object] = []
        self._memory: set[_Memory] = set()
        self._bytes = 0

    def run(self, state: object) -> None:
        self._count(state, 0)

    def _count(self, value: Any, depth: int) -> int:  # noqa: ANN401 (whatever was saved)
        if isinstance(value, torch.Tensor | np.ndarray):
            self._weigh(value)
            return 1
        if not isinstance(value, Mapping | list | tuple | set | frozenset):
            return 1
        known = self._counted.get(id(value))
        if known is not None:
            return known
        if id(value) in self._open or depth > MAX_DEPTH:
            self._refuse(f"holds itself, or has over {MAX_DEPTH} levels")
        self._open.add(id(value))
        self._kept.append(value)  # a freed one's id could come again
        total = 1
        for item in value.values() if isinstance(value, Mapping) else value:
            total += 1 + self._count(item, depth + 1)
            if total > MAX_VALUES:
                self._refuse(f"has over {MAX_VALUES} values")
        self._open.discard(id(value))
        self._counted[id(value)] = total
        return total

    def _weigh(self, value: torch.Tensor | np.ndarray) -> None:
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            key = (value.data_ptr(), tuple(value.shape), value.stride(), str(value.dtype))
            if key in self._memory:
                return
            self._memory.add(key)
        self._bytes += value.nbytes
        if self._bytes > self._limit_bytes:
            self._refuse(f"has tensors of more than {self._limit_bytes} bytes: more than the file")

    def _refuse(self, why: str) -> None:
        raise CorruptError(path=self._path, why=why, help=RECOPY)
