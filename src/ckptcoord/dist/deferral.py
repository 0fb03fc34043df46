"""What may be copied after the call: tensors that only an optimizer's step changes (ADR 9).

That they kept still is not taken on trust: a `Watch` remembers each one's version and a sample of
its elements. Fused optimizers, writes to `.data` and numpy views leave the version as it was;
the sample finds these. What "auto" has yet to decide on is watched as a whole, once.
"""

from __future__ import annotations

import logging
import threading
import weakref
from dataclasses import dataclass
from itertools import chain, compress
from operator import attrgetter, ne
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
import xxhash
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ckptcoord.dist.capture import tensor_bytes
from ckptcoord.dist.devicesums import device_checksum
from ckptcoord.dist.sharded import is_dtensor, local_part
from ckptcoord.dist.stagingpool import ALIGN_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from ckptcoord.core.sharing import StateComponent
    from ckptcoord.dist.stagingpool import Buffer

Mode: TypeAlias = "bool | Literal['auto']"
Name: TypeAlias = "tuple[str, str]"
"""A component's key and a tensor's name."""
Storage: TypeAlias = "tuple[int, int]"
"""Memory: its device (-1: the host's) and address; address 0: none."""
Samples: TypeAlias = "list[torch.Tensor]"

LEAST_DEFERRED_BYTES = 64 << 10
"""Of a tensor: to copy less takes no longer than to watch it."""
_LEAST_STATE_ELEMENTS = 1025  # of an optimizer's state: what is less may change outside of a step
_RUNS, _RUN = 16, 4  # a sample: so many runs of so many elements, evenly spread
_SLICE_BYTES = 8 << 20  # of a tensor on the CPU that is looked at as a whole, at a time
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_log = logging.getLogger("ckptcoord")

# Of all tensors, one fact at a time: functions in C, called from C.
_TENSOR: Any = torch.Tensor
_version_of = attrgetter("_version")  # torch has no public name for it
_FACTS = (_TENSOR.storage_offset, _TENSOR.data_ptr, _TENSOR.numel, _TENSOR.get_device)
_Facts: TypeAlias = "list[list[object]]"


# --- whose is it --------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True, eq=False)
class Owned:
    """What the declared optimizers change in their step.

    Attributes:
        tensors: all of it, and maybe more.
        rows: by storage, which of them are in it. The same object for as long as nothing moves.
    """

    tensors: list[torch.Tensor]
    rows: Mapping[Storage, tuple[int, ...]]


class Owners:
    """Finds what the declared optimizers own, in less time where that is what it was.

    Of the tensors it keeps none.
    """

    def __init__(self, components: Iterable[StateComponent]) -> None:
        self._components = tuple(components)
        self._rows: Mapping[Storage, tuple[int, ...]] = {}
        self._facts: _Facts = []

    def find(self) -> Owned:
        """It, at this moment."""
        values = _values_of(self._components)
        parameters, states = map(_plain, values)
        tensors = [*parameters, *states]
        # What is done to a DTensor moves its own version and not that of its part.
        others = [value for some in values for value in some if type(value) not in _PLAIN]
        wholes = [value for value in others if is_dtensor(value)]
        facts = [[len(parameters), len(wholes)], *([*map(fact, tensors)] for fact in _FACTS)]
        if any(facts[1]):  # an offset in bytes depends on the dtype
            facts.append([tensor.dtype for tensor in tensors])
        if facts != self._facts:
            self._rows, self._facts = _rows_of(parameters, states, wholes), facts
        return Owned(tensors=[*tensors, *wholes], rows=self._rows)


def _rows_of(
    parameters: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    wholes: Sequence[torch.Tensor],
) -> dict[Storage, tuple[int, ...]]:
    found: dict[Storage, tuple[int, ...]] = {}
    for row, one in enumerate([*parameters, *states]):
        storage = storage_of(one)
        if storage[1] and (row < len(parameters) or one.numel() >= _LEAST_STATE_ELEMENTS):
            found[storage] = (*found.get(storage, ()), row)
    for row, one in enumerate(wholes, len(parameters) + len(states)):
        storage = storage_of(local_part(one))
        if storage in found:
            found[storage] += (row,)
    return found


def is_deferrable(value: object, owned: Collection[Storage]) -> bool:
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


def storage_of(tensor: torch.Tensor) -> Storage:
    """Which memory it is a view of: device (-1: the CPU) and address; 0: none."""
    if tensor.storage_offset():
        return tensor.get_device(), tensor.untyped_storage().data_ptr()
    return tensor.get_device(), tensor.data_ptr()  # the same, and quicker


def _optimizer_of(stateful: object) -> torch.optim.Optimizer | None:
    if isinstance(stateful, torch.optim.Optimizer):
        return stateful
    inner = getattr(stateful, "optimizer", None)  # as of Accelerate's
    return inner if isinstance(inner, torch.optim.Optimizer) else None


def _values_of(components: Iterable[StateComponent]) -> tuple[list[Any], list[Any]]:
    """The parameters of their optimizers, and what these keep of them."""
    parameters: list[Any] = []
    states: list[Any] = []
    for component in components:
        optimizer = _optimizer_of(component.stateful)
        if optimizer is None:
            continue
        for group in optimizer.param_groups:
            parameters.extend(group["params"])
        for state in optimizer.state.values():
            if isinstance(state, dict):
                states.extend(state.values())
    return parameters, states


def _plain(values: Sequence[Any]) -> list[torch.Tensor]:
    """The plain tensors among these, and those that DTensors hold here."""
    held = [
        value if type(value) in _PLAIN or not is_dtensor(value) else local_part(value)
        for value in values
    ]
    tensors: list[torch.Tensor] = [value for value in held if type(value) in _PLAIN]
    layouts = list(map(_TENSOR.layout.__get__, tensors))
    if layouts.count(torch.strided) == len(tensors):
        return tensors
    # Torch does not say of the others where they are.
    return [tensor for tensor in tensors if is_plain(tensor)]


# --- did it keep still --------------------------------------------------------------------------


class Sampling:
    """Where a `Watch` looks at tensors: the same for those of the same shapes, dtypes and devices.

    Args:
        tensors: deferrable ones.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, tensor in enumerate(tensors):
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
        self.groups = list(groups.values())
        self.steps = [(tensor.numel() - _RUN) // (_RUNS - 1) for tensor in tensors]
        self._dense = [tensor.is_contiguous() for tensor in tensors]

    def take(self, tensors: Sequence[torch.Tensor], leave_out: Collection[int]) -> Samples:
        """Samples as they are now: [tensors * runs, run] for each group; zeros for some."""
        return [
            torch.cat(
                [
                    tensors[index].new_zeros((_RUNS, _RUN))
                    if index in leave_out
                    else self._one(index, tensors[index])
                    for index in rows
                ]
            )
            for rows in self.groups
        ]

    def _one(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        step = self.steps[index]
        if self._dense[index]:
            return tensor.as_strided((_RUNS, _RUN), (step, 1))
        flat = (np.arange(_RUNS)[:, None] * step + np.arange(_RUN)).reshape(-1)
        where = (torch.from_numpy(axis) for axis in np.unravel_index(flat, tuple(tensor.shape)))
        return tensor[tuple(where)].view(_RUNS, _RUN)


def fingerprint(tensor: torch.Tensor) -> bytes:
    """16 bytes that stand for all of a deferrable tensor; its device is waited for."""
    if not tensor.is_cpu:
        return device_checksum(tensor)
    rows = max(1, _SLICE_BYTES * tensor.shape[0] // tensor.nbytes)
    hasher = xxhash.xxh3_128()
    data = tensor.detach()
    for start in range(0, tensor.shape[0], rows):  # what is not contiguous is copied to be hashed
        hasher.update(tensor_bytes(data[start : start + rows]).data)
    return hasher.digest()


class Watch:
    """Versions and samples of tensors, as they were when it was made.

    All tensors are deferrable ones. They are kept alive until `let_go`.

    Args:
        tensors: to watch.
        owners: the optimizers' tensors in the same memory: a tensor that was made by `.data` has a
            version of its own, which does not move with theirs.
        owner_of: of each owner, the index of the tensor.
        sampling: of tensors of these shapes, dtypes and devices.
        whole: every element counts, not only those sampled. It takes a pass over memory when it is
            made and when it looks, and waits for devices there.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        owners: Sequence[torch.Tensor] = (),
        owner_of: Sequence[int] = (),
        sampling: Sampling | None = None,
        *,
        whole: bool = False,
    ) -> None:
        self._tensors = list(tensors)
        self._owners = list(owners)
        self._indices = [*range(len(self._tensors)), *owner_of]
        self._sampling = sampling or Sampling(self._tensors)
        self._moved: set[int] = set()
        self._addresses, self._versions = self._places()
        self._before = self._sample()
        self._after: Samples = []
        self._prints = list(map(fingerprint, self._tensors)) if whole else []

    def look(self) -> None:
        """Take versions and samples again; devices are not waited for unless all is compared."""
        addresses, versions = self._places()
        for was, now in ((self._addresses, addresses), (self._versions, versions)):
            self._moved.update(compress(self._indices, map(ne, was, now)))
        for index, known in enumerate(self._prints):
            if index not in self._moved and fingerprint(self._tensors[index]) != known:
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
            [self._sample_copies(rows, buffer, offsets) for rows in self._sampling.groups],
            {index for index, offset in enumerate(offsets) if offset < 0},
        )

    def let_go(self) -> None:
        """Drop the tensors and all that is known of them."""
        self._tensors, self._owners = [], []
        self._before, self._after = [], []

    def _places(self) -> tuple[list[int], list[int]]:
        """Where the tensors are; their versions and then their owners'."""
        addresses = list(map(_TENSOR.data_ptr, self._tensors))
        return addresses, list(map(_version_of, chain(self._tensors, self._owners)))

    @torch.no_grad()
    def _sample(self) -> Samples:
        # The memory of what has moved may be gone.
        return self._sampling.take(self._tensors, self._moved)

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
            samples.append(
                copies.as_strided((_RUNS, _RUN), (self._sampling.steps[index], 1), start)
            )
        return torch.cat(samples)

    def _differing(self, now: Samples, leave_out: Iterable[int] = ()) -> set[int]:
        found: set[int] = set()
        for rows, a, b in zip(self._sampling.groups, self._before, now, strict=True):
            # Bytes, for a NaN is no change.
            pair = [one.cpu().view(torch.uint8).view(len(rows), -1) for one in (a, b)]
            apart = (pair[0] != pair[1]).any(dim=1).nonzero().view(-1).tolist()
            found.update(rows[row] for row in apart)
        return found.difference(leave_out)


# --- what to defer ------------------------------------------------------------------------------


class Deferral:
    """Which tensors to defer, and what has been learned of that.

    With "auto", a tensor is deferred once all of it was seen to keep still from a save to the next
    step of an optimizer, and never again once it was seen to move. Thread safe.
    """

    def __init__(self, components: Sequence[StateComponent]) -> None:
        self._owners = Owners(components)
        self._still: frozenset[Name] = frozenset()
        self._moving: set[Name] = set()
        self._avoided: set[str] = set()
        self._watched: list[tuple[tuple[Name, ...], Watch]] = []
        self._lock = threading.Lock()

    def owned(self) -> Owned:
        """What the declared optimizers own at this moment. From one thread."""
        return self._owners.find()

    def choice(self, mode: Mode) -> frozenset[Name] | bool:
        """Which deferrable tensors to defer; True: all. The same object until it changes."""
        if mode != "auto":
            return bool(mode)
        with self._lock:
            return self._still

    def watch(self, tensors: Mapping[Name, torch.Tensor], owned: Owned) -> bool:
        """Watch deferrable tensors until the next step; returns whether anything is watched."""
        with self._lock:
            known = self._moving | self._still
            known.update(name for names, _ in self._watched for name in names)
            new = {
                name: tensor
                for name, tensor in tensors.items()
                if name not in known and name[0] not in self._avoided
            }
            if new:
                rows = [owned.rows[storage_of(tensor)] for tensor in new.values()]
                owners = [owned.tensors[row] for row in chain.from_iterable(rows)]
                owner_of = [index for index, each in enumerate(rows) for _ in each]
                watch = Watch(list(new.values()), owners, owner_of, whole=True)
                self._watched.append((tuple(new), watch))
            return bool(self._watched)

    def learn(self) -> None:
        """An optimizer is about to step: what has moved until here will not be deferred."""
        with self._lock:
            watched, self._watched = self._watched, []
            for names, watch in watched:
                watch.look()
                moved = {names[index] for index in watch.moved()}
                watch.let_go()
                self._still |= {name for name in names if name[0] not in self._avoided}
                self._note(moved)

    def avoid(self, keys: Collection[str]) -> None:
        """Defer nothing of these components any more: some of it moved that a save had counted on.

        What moves one tensor now and then moves others, as averaged weights do that are put in for
        an evaluation.
        """
        with self._lock:
            new = sorted(set(keys) - self._avoided)
            self._avoided |= set(new)
            self._still = frozenset(name for name in self._still if name[0] not in self._avoided)
        if new:
            _log.info(
                'deferred="auto" will copy all of %s at the call: it changed between a save and '
                "the optimizer's step",
                ", ".join(new),
            )

    def forget(self) -> None:
        """Watch no longer what is being watched: it was meant to change, as by a load."""
        with self._lock:
            self._watched.clear()

    def _note(self, moved: set[Name]) -> None:
        self._moving |= moved
        if moved:
            self._still -= moved
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
