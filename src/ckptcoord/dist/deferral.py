"""What may be copied after the call: tensors that only an optimizer's step changes (ADR 9).

That they kept still is not taken on trust: a `Watch` remembers each one's version and a sample of
its elements. Fused optimizers, writes to `.data` and numpy views leave the version as it was;
the sample finds these.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ckptcoord.dist.stagingpool import ALIGN_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from ckptcoord.core.sharing import StateComponent
    from ckptcoord.dist.stagingpool import Buffer

Mode: TypeAlias = "bool | Literal['auto']"
Name: TypeAlias = "tuple[str, str]"
"""A component's key and a tensor's name."""
Owned: TypeAlias = "dict[tuple[int, int], tuple[torch.Tensor, ...]]"
Samples: TypeAlias = "list[torch.Tensor]"

LEAST_DEFERRED_BYTES = 64 << 10
"""Of a tensor: to copy less takes no longer than to watch it."""
_LEAST_STATE_ELEMENTS = 1025  # of an optimizer's state: what is less may change outside of a step
_RUNS, _RUN = 16, 4  # a sample: so many runs of so many elements, evenly spread
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_log = logging.getLogger("ckptcoord")


# --- whose is it --------------------------------------------------------------------------------


def owned_storages(components: Iterable[StateComponent]) -> Owned:
    """What the declared optimizers change in their step, by storage: its device and address."""
    found: Owned = {}
    for component in components:
        optimizer = _optimizer_of(component.stateful)
        for one in () if optimizer is None else _tensors_of(optimizer):
            storage = storage_of(one) if is_plain(one) else (0, 0)
            if storage[1]:
                found[storage] = (*found.get(storage, ()), one)
    return found


def is_deferrable(value: object, owned: Owned) -> bool:
    """Whether an optimizer owns it and it can be watched."""
    return (
        isinstance(value, torch.Tensor)
        and value.nbytes >= LEAST_DEFERRED_BYTES
        and is_plain(value)
        and (value.is_cpu or value.is_cuda)
        and storage_of(value) in owned
        and not value.is_inference()  # which has no version
        and not value.is_conj()
        and not value.is_neg()
    )


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is a tensor as torch makes them; a subclass may keep its elements elsewhere."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided


def storage_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Which memory it is a view of: device (-1: the CPU) and address; 0: none."""
    if tensor.storage_offset():
        return tensor.get_device(), tensor.untyped_storage().data_ptr()
    return tensor.get_device(), tensor.data_ptr()  # the same, and quicker


def _optimizer_of(stateful: object) -> torch.optim.Optimizer | None:
    if isinstance(stateful, torch.optim.Optimizer):
        return stateful
    inner = getattr(stateful, "optimizer", None)  # as of Accelerate's
    return inner if isinstance(inner, torch.optim.Optimizer) else None


def _tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        if isinstance(state, dict):
            yield from (
                value
                for value in state.values()
                if isinstance(value, torch.Tensor) and value.numel() >= _LEAST_STATE_ELEMENTS
            )


# --- did it keep still --------------------------------------------------------------------------


class Watch:
    """Versions and samples of tensors, as they were when it was made.

    All tensors are deferrable ones. They are kept alive until `let_go`.

    Args:
        tensors: to watch.
        owners: of each, the optimizers' tensors in the same memory: a tensor that was made by
            `.data` has a version of its own, which does not move with theirs.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        owners: Sequence[tuple[torch.Tensor, ...]] | None = None,
    ) -> None:
        self._tensors = list(tensors)
        self._owners = [()] * len(self._tensors) if owners is None else list(owners)
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, tensor in enumerate(self._tensors):
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
        self._groups = list(groups.values())
        self._moved: set[int] = set()
        self._steps = [(tensor.numel() - _RUN) // (_RUNS - 1) for tensor in self._tensors]
        self._places = [self._place(index) for index in range(len(self._tensors))]
        self._before = self._sample()
        self._after: Samples = []

    def look(self) -> None:
        """Take versions and samples again; devices are not waited for."""
        for index, place in enumerate(self._places):
            if self._place(index) != place:
                self._moved.add(index)
        self._after = self._sample()

    def moved(self) -> set[int]:
        """Which tensors were not, at `look`, what they had been; waits for their devices."""
        return self._moved | self._differing(self._after)

    def differing(self, buffer: Buffer, offsets: Sequence[int]) -> set[int]:
        """Which copies are not of what the tensors had been.

        Args:
            buffer: holds the copies, row-major.
            offsets: of each tensor's copy, in bytes; negative: it has none.
        """
        return self._differing(
            [self._sample_copies(rows, buffer, offsets) for rows in self._groups],
            {index for index, offset in enumerate(offsets) if offset < 0},
        )

    def let_go(self) -> None:
        """Drop the tensors and all that is known of them."""
        self._tensors, self._owners, self._groups, self._places = [], [], [], []
        self._before, self._after = [], []

    def _place(self, index: int) -> tuple[int, ...]:
        """Where a tensor is, and its versions, for which torch has no public name."""
        tensor = self._tensors[index]
        versions = (one._version for one in self._owners[index])  # noqa: SLF001
        return tensor.data_ptr(), tensor._version, *versions  # noqa: SLF001

    @torch.no_grad()
    def _sample(self) -> Samples:
        """Of all tensors as they are now, where they are: [tensors * runs, run] for each group."""
        return [torch.cat([self._sample_one(index) for index in rows]) for rows in self._groups]

    def _sample_one(self, index: int) -> torch.Tensor:
        tensor, step = self._tensors[index], self._steps[index]
        if self._moved and index in self._moved:  # its memory may be gone
            return tensor.new_zeros((_RUNS, _RUN))
        if tensor.is_contiguous():
            return tensor.as_strided((_RUNS, _RUN), (step, 1))
        flat = (np.arange(_RUNS)[:, None] * step + np.arange(_RUN)).reshape(-1)
        where = (torch.from_numpy(axis) for axis in np.unravel_index(flat, tuple(tensor.shape)))
        return tensor[tuple(where)].view(_RUNS, _RUN)

    def _sample_copies(
        self, rows: Sequence[int], buffer: Buffer, offsets: Sequence[int]
    ) -> torch.Tensor:
        copies = buffer.tensor
        copies = copies[: copies.numel() // ALIGN_BYTES * ALIGN_BYTES]
        copies = copies.view(self._tensors[rows[0]].dtype)
        samples = []
        for index in rows:
            if offsets[index] < 0:
                samples.append(copies.new_zeros((_RUNS, _RUN)))
                continue
            start = offsets[index] // copies.itemsize
            samples.append(copies.as_strided((_RUNS, _RUN), (self._steps[index], 1), start))
        return torch.cat(samples)

    def _differing(self, now: Samples, leave_out: Iterable[int] = ()) -> set[int]:
        found: set[int] = set()
        for rows, a, b in zip(self._groups, self._before, now, strict=True):
            # Bytes, for a NaN is no change.
            pair = [one.cpu().view(torch.uint8).view(len(rows), -1) for one in (a, b)]
            apart = (pair[0] != pair[1]).any(dim=1).nonzero().view(-1).tolist()
            found.update(rows[row] for row in apart)
        return found.difference(leave_out)


# --- what to defer ------------------------------------------------------------------------------


class Deferral:
    """Which tensors to defer, and what has been learned of that.

    With "auto", a tensor is deferred once it was seen to keep still from a save to the next step of
    an optimizer, and never again once it was seen to move. Thread safe.
    """

    def __init__(self, components: Sequence[StateComponent]) -> None:
        self._components = tuple(components)
        self._still: set[Name] = set()
        self._moving: set[Name] = set()
        self._watched: list[tuple[tuple[Name, ...], Watch]] = []
        self._lock = threading.Lock()

    def owned(self) -> Owned:
        """What the declared optimizers own at this moment."""
        return owned_storages(self._components)

    def choose(self, names: Sequence[Name], mode: Mode) -> list[bool]:
        """For each deferrable tensor, whether to defer it."""
        if mode != "auto":
            return [bool(mode)] * len(names)
        with self._lock:
            return [name in self._still for name in names]

    def watch(self, tensors: Mapping[Name, torch.Tensor], owned: Owned) -> bool:
        """Watch deferrable tensors until the next step; returns whether anything is watched."""
        with self._lock:
            known = self._moving | self._still
            known.update(name for names, _ in self._watched for name in names)
            new = {name: tensor for name, tensor in tensors.items() if name not in known}
            if new:
                owners = [owned[storage_of(tensor)] for tensor in new.values()]
                self._watched.append((tuple(new), Watch(list(new.values()), owners)))
            return bool(self._watched)

    def learn(self) -> None:
        """An optimizer is about to step: what has moved until here will not be deferred."""
        with self._lock:
            watched, self._watched = self._watched, []
            for names, watch in watched:
                watch.look()
                moved = {names[index] for index in watch.moved()}
                watch.let_go()
                self._still.update(names)
                self._note(moved)

    def caught(self, names: Iterable[Name]) -> None:
        """These moved."""
        with self._lock:
            self._note(set(names) - self._moving)

    def forget(self) -> None:
        """Watch no longer what is being watched: it was meant to change, as by a load."""
        with self._lock:
            self._watched.clear()

    def _note(self, moved: set[Name]) -> None:
        self._moving |= moved
        self._still -= moved
        if moved:
            _log.info(
                '%d tensors change before the optimizer\'s step; deferred="auto" will copy them '
                "at the call: %s",
                len(moved),
                ", ".join(sorted(map(".".join, moved))),
            )


class StepHook:
    """Calls a method before the step of any torch optimizer, in the thread that steps.

    It does not keep the method's object alive.
    """

    def __init__(self, before_step: Callable[[], None]) -> None:
        method = weakref.WeakMethod(before_step)

        def hook(optimizer: object, args: object, kwargs: object) -> None:
            call = method()
            if call is not None:
                call()

        self._handle = register_optimizer_step_pre_hook(hook)

    def remove(self) -> None:
        """Call no more; again: nothing."""
        self._handle.remove()
