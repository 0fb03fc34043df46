"""How a component is coded: how hard, and what may be given up of its floats."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ckptcoord.errors import ConfigError


class CompressionLevel(StrEnum):
    """How hard deltas are coded; `off` writes plain safetensors only. All are lossless."""

    OFF = "off"
    AUTO = "auto"
    AGGRESSIVE = "aggressive"


class Role(StrEnum):
    """What a tensor is in a training, as far as that is known for certain."""

    PARAMETER = "parameter"
    FIRST_MOMENT = "first moment"  # a running mean of gradients
    SECOND_MOMENT = "second moment"  # of their squares
    COUNT = "count"  # of an optimizer's steps
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lossy:
    """The error that a component's deltas may have; anchors are exact. Zeros: none.

    Each is measured against what a reader has, so errors do not add up over several saves. What was
    given up stands in the recipe of each tensor, in the manifest and in `ckptcoord inspect`.

    Attributes:
        change_threshold: a tensor whose change since its base, relative L2 norm, is smaller is not
            written.
        update_fraction: changes of F32 and F64 are kept in whole steps of so much of their own root
            mean square; 0.1 costs about 4 bits an element. An element is half a step off at most, a
            whole one where it would change its sign otherwise; a tensor of which an element has
            become zero is exact. For parameters.
        mantissa_bits: values keep so many bits of mantissa: a relative error of 2**-(bits + 1).
            Denormals, which have no such grid, are exact. For moments. None keeps all.

    Raises:
        ConfigError: a value out of range.
    """

    change_threshold: float = 0.0
    update_fraction: float = 0.0
    mantissa_bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("change_threshold", "update_fraction"):
            value: object = getattr(self, name)
            if not isinstance(value, int | float) or not 0.0 <= value < 1.0:
                why = f"is {value!r:.40}, not a number from 0 to 1"
                raise ConfigError(field=f"Lossy.{name}", why=why)
        bits: object = self.mantissa_bits
        if bits is not None and (type(bits) is not int or not 0 <= bits <= 52):
            why = f"is {bits!r:.40}, not a whole number from 0 to 52"
            raise ConfigError(field="Lossy.mantissa_bits", why=why)


EXACT = Lossy()
