"""Where in a buffer the tensors of a snapshot go, which stays from save to save."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch

from ckptcoord.core.sharing import ValidationLevel
from ckptcoord.dist.capturer import LiveTensors, form_of
from ckptcoord.dist.copying import is_flat
from ckptcoord.dist.stagingpool import ALIGN_BYTES, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import numpy as np

    from ckptcoord.dist.capture import CapturedComponent, CapturedTensor
    from ckptcoord.repo.shards import TensorSpec

_LARGE_BYTES = 256 << 10  # of a tensor that begins with a page
Wanted: TypeAlias = "Mapping[str, Collection[str]]"
"""By component, the names of the tensors to keep."""
_Key: TypeAlias = "list[tuple[str, object, object, ValidationLevel]]"


@dataclass(slots=True, kw_only=True, eq=False)
class Place:
    """What is to become of one tensor.

    Attributes:
        name: its component's key, and its own name.
        spec: what it is.
        dtype: torch's or numpy's.
        nbytes: its size.
        level: at which its digest is to be taken; NONE: it is not.
        flat: whether any range of its bytes can be copied by itself.
        on_device: whether it is in another memory than the host's.
        offset: of its copy in the buffer; negative: it is not kept.
    """

    name: tuple[str, str]
    spec: TensorSpec
    dtype: torch.dtype | np.dtype
    nbytes: int
    level: ValidationLevel
    flat: bool
    on_device: bool
    offset: int = -1

    @property
    def concerned(self) -> bool:
        """Whether anything is to become of it."""
        return self.offset >= 0 or self.level is not ValidationLevel.NONE

    @property
    def costly(self) -> bool:
        """Whether what is asked of it takes long: all of it must be read."""
        return self.offset >= 0 or self.level in (ValidationLevel.TENSOR, ValidationLevel.FULL)

    @property
    def digested_live(self) -> bool:
        """Whether its digest must be of the live tensor: there is no copy, or a device is fast."""
        if self.level is ValidationLevel.NONE:
            return False
        return self.offset < 0 or (self.on_device and self.level is ValidationLevel.TENSOR)


class StagingLayout:
    """Of all tensors of some captures.

    Attributes:
        parts: the components' places, in order.
        places: those of tensors that are kept or digested, in order.
        size: of the buffer, in bytes.
        devices: on which kept or digested tensors are, by index; none: the host.
        digested: whether any digest is to be taken.
    """

    def __init__(
        self,
        held: Mapping[str, CapturedComponent],
        wanted: Wanted,
        levels: Mapping[str, ValidationLevel],
    ) -> None:
        self._key = _key(held, wanted, levels)
        self.parts: list[list[Place]] = []
        self._rows: list[list[int]] = []
        devices: set[int] = set()
        for key, captured in held.items():
            tensors = list(captured.tensors.values())
            level = levels.get(key, ValidationLevel.NONE)
            part = [_place(key, one, level, one.spec.name in wanted[key]) for one in tensors]
            rows = [row for row, place in enumerate(part) if place.concerned]
            self.parts.append(part)
            self._rows.append(rows)
            devices.update(_device_of(tensors[row]) for row in rows)
        self.places = [
            part[row] for part, rows in zip(self.parts, self._rows, strict=True) for row in rows
        ]
        self.size = _assign(self.places)
        self.devices = frozenset(devices - {-1})
        self.digested = any(place.level is not ValidationLevel.NONE for place in self.places)

    def is_of(
        self,
        held: Mapping[str, CapturedComponent],
        wanted: Wanted,
        levels: Mapping[str, ValidationLevel],
    ) -> bool:
        """Whether it would come out the same of these, as far as that can be told at once."""
        key = _key(held, wanted, levels)
        return len(key) == len(self._key) and all(
            a[1] is b[1] is not None and a[2] is b[2] and (a[0], a[3]) == (b[0], b[3])
            for a, b in zip(key, self._key, strict=True)
        )

    def live(self, held: Mapping[str, CapturedComponent]) -> list[torch.Tensor | np.ndarray]:
        """The tensors for the `places`, as they are in captures that it is of."""
        return [
            values[row]
            for captured, rows in zip(held.values(), self._rows, strict=True)
            for values in (_values(captured),)
            for row in rows
        ]

    def addresses(self, held: Mapping[str, CapturedComponent]) -> list[int]:
        """Likewise, where they begin in memory; empty: nobody has asked."""
        found: list[int] = []
        for captured, rows in zip(held.values(), self._rows, strict=True):
            if not isinstance(captured.tensors, LiveTensors):
                return []
            addresses = captured.tensors.addresses
            found.extend([addresses[row] for row in rows])
        return found


def bare(held: Mapping[str, CapturedComponent]) -> list[CapturedComponent]:
    """The components without their tensors."""
    return [replace(captured, tensors={}) for captured in held.values()]


def _key(
    held: Mapping[str, CapturedComponent], wanted: Wanted, levels: Mapping[str, ValidationLevel]
) -> _Key:
    return [
        (key, form_of(captured), wanted[key], levels.get(key, ValidationLevel.NONE))
        for key, captured in held.items()
    ]


def _values(captured: CapturedComponent) -> Sequence[torch.Tensor | np.ndarray]:
    tensors = captured.tensors
    if isinstance(tensors, LiveTensors):
        return tensors.live
    return [one.value for one in tensors.values() if one.value is not None]


def _place(key: str, captured: CapturedTensor, level: ValidationLevel, wanted: bool) -> Place:  # noqa: FBT001
    value = captured.value
    assert value is not None, "what is live has a value"
    tensor = value if isinstance(value, torch.Tensor) else None
    return Place(
        name=(key, captured.spec.name),
        spec=captured.spec,
        dtype=value.dtype,
        nbytes=value.nbytes,
        level=level,
        flat=tensor is not None and is_flat(tensor),
        on_device=tensor is not None and tensor.device.type != "cpu",
        offset=0 if wanted else -1,
    )


def _device_of(captured: CapturedTensor) -> int:
    value = captured.value
    return value.get_device() if isinstance(value, torch.Tensor) and value.is_cuda else -1


def _assign(places: Sequence[Place]) -> int:
    """Give each that is kept its offset, the large ones first; returns the bytes they take."""
    size = 0
    for large in (True, False):
        for place in places:
            if place.offset >= 0 and (place.nbytes >= _LARGE_BYTES) is large:
                place.offset = size
                size += padded(place.nbytes)
    return size


def padded(nbytes: int) -> int:
    """What a tensor of so many bytes takes in a buffer."""
    unit = PAGE_BYTES if nbytes >= _LARGE_BYTES else ALIGN_BYTES
    return -(-nbytes // unit) * unit
