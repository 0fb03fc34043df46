"""Anchor or delta, and against what: the rule that decides at each save. Pure.

An anchor is written whole and stands alone. A delta costs less to write and more to read: its base,
too. Against one anchor (a star) deltas grow as training moves away from it, so that at some point a
new anchor is cheaper than what it saves. Costs are measured in stored bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING

from ckptcoord.core.lossy import EXACT, CompressionLevel, Lossy, Role
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# The coarsest with which the loss after a resume stays within 1e-4 (benchmarks/lossy.py).
_UPDATE_FRACTION = 0.25  # the error is half a step: an eighth; beside a zero, a whole one
_MOMENT_BITS = {Role.FIRST_MOMENT: 1, Role.SECOND_MOMENT: 1}
MAX_CHAIN = 32  # a tensor may take three links a save, and readers follow a hundred
_PAYS = 0.95  # of an anchor: a delta that is larger saves less than reading its base costs


class Precision(StrEnum):
    """Whether what is read is what was saved, or as near as `bounded` says."""

    EXACT = "exact"
    BOUNDED = "bounded"


class BaseChoice(StrEnum):
    """What a delta is against: the last anchor (a star) or a save since that (a chain)."""

    ANCHOR = "anchor"
    PREVIOUS = "previous"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """How saves use what is stored already.

    Attributes:
        level: `off`, `auto` or `aggressive`.
        base: `anchor` or `previous`; by default `anchor`, but `previous` where `precision` is
            `bounded`: what is given up is a part of the change since the base. Exact deltas skip
            some of the saves before (`base_place`), so that a restore reads few of them.
        chain_below: exact deltas of a chain are against others only that take less than this part
            of their anchor's bytes: through larger ones a chain saves some 5 %, and each of them
            makes a restore half as long again. 1 chains whatever the size.
        reanchor_interval: every so many saves an anchor is written; None leaves it to the costs.
        restore_budget: an anchor is written when reading a delta and all it is against would take
            more than this many times the state's own bytes.
        precision: `bounded`: updates of a module's parameters to an eighth of their own root mean
            square (a quarter where the sign would be another one); of an optimizer, the running
            means of gradients and of their squares with one bit of mantissa (25 % at most); all
            else, and every anchor, stays exact. What is known to be either: docs/codec.md, "Bounded
            precision". Each rank keeps in memory what readers will have of the tensors that it
            writes.
        change_threshold: a tensor whose change is smaller, relative L2 norm, is not written.
        lossy: by component key, what may be given up of it, in the place of the two above. Where
            something may be given up and no component is coded, a coordinator refuses the settings.
        compress_anchors: anchors are coded, too, and cast and equal tensors in them only named:
            smaller files, that transformers does not read until `ckptcoord compact` has made them
            plain. By default they are plain safetensors.

    Raises:
        ConfigError: a value out of range.
    """

    level: CompressionLevel = CompressionLevel.OFF
    base: BaseChoice | None = None
    chain_below: float = 0.25
    reanchor_interval: int | None = None
    restore_budget: float = 4.0
    precision: Precision = Precision.EXACT
    change_threshold: float = 0.0
    lossy: Mapping[str, Lossy] = field(default_factory=dict)
    compress_anchors: bool = False

    def __post_init__(self) -> None:
        if self.base is None:
            near = self.precision == Precision.BOUNDED
            object.__setattr__(self, "base", BaseChoice.PREVIOUS if near else BaseChoice.ANCHOR)
        kinds = {"level": CompressionLevel, "base": BaseChoice, "precision": Precision}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value not in list(kind):  # a set cannot be asked for everything
                known = ", ".join(kind)
                raise ConfigError(field=f"compression.{name}", why=f"is {value!r:.40}, not {known}")
            object.__setattr__(self, name, kind(value))
        _check_lossy(self.change_threshold, self.lossy)
        coded: object = self.compress_anchors
        if not isinstance(coded, bool):
            why = f"is {coded!r:.40}, not True or False"
            raise ConfigError(field="compression.compress_anchors", why=why)
        interval = self.reanchor_interval
        if interval is not None and (type(interval) is not int or interval < 1):
            why = f"is {interval!r:.40}, not a whole number from 1"
            raise ConfigError(field="compression.reanchor_interval", why=why)
        _check_number("restore_budget", self.restore_budget, 1)
        _check_number("chain_below", self.chain_below, 0)

    @property
    def is_exact(self) -> bool:
        """Whether nothing may be given up, but for what components say themselves."""
        given_up = {Lossy(change_threshold=self.change_threshold), *self.lossy.values()} - {EXACT}
        return self.precision is Precision.EXACT and not given_up

    def level_of(self, own: CompressionLevel | None) -> CompressionLevel:
        """How hard a component is coded that has this setting of its own, or None."""
        return self.level if own is None else own

    def over(self, own: Iterable[CompressionLevel | None]) -> Compression:
        """The rule for a save of components with these settings: off where none of them is coded.

        The level of what is not off is that of each component, not the one here.
        """
        coded = any(self.level_of(one) is not CompressionLevel.OFF for one in own)
        if coded == (self.level is not CompressionLevel.OFF):
            return self
        return replace(self, level=CompressionLevel.AUTO if coded else CompressionLevel.OFF)

    def lossy_of(self, component: str, own: Lossy | None, role: Role) -> Lossy:
        """What may be given up of a tensor.

        Args:
            component: its key.
            own: the component's own setting, if it has one.
            role: of the tensor.
        """
        if role is Role.COUNT:
            return EXACT
        own = self.lossy.get(component) if own is None else own
        if own is not None:
            return own
        bounded = self.precision is Precision.BOUNDED
        return _lossy(
            self.change_threshold,
            _UPDATE_FRACTION if bounded and role is Role.PARAMETER else 0.0,
            _MOMENT_BITS.get(role) if bounded else None,
        )

    @classmethod
    def of(cls, given: Compression | str) -> Compression:
        """Itself, or that of a level.

        Raises:
            ConfigError: there is no such level.
        """
        return given if isinstance(given, cls) else cls(level=given)  # type: ignore[arg-type]


@lru_cache
def _lossy(change_threshold: float, update_fraction: float, mantissa_bits: int | None) -> Lossy:
    """Asked for of every tensor in every save, and checked when it is made."""
    return Lossy(
        change_threshold=change_threshold,
        update_fraction=update_fraction,
        mantissa_bits=mantissa_bits,
    )


def _check_number(name: str, value: object, least: int) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value < math.inf:  # type: ignore[operator]
        why = f"is {value!r:.40}, not a number from {least}"
        raise ConfigError(field=f"compression.{name}", why=why)


def _check_lossy(change_threshold: float, lossy: object) -> None:
    try:
        Lossy(change_threshold=change_threshold)
    except ConfigError as error:
        raise ConfigError(field="compression.change_threshold", why=error.why) from error
    if not isinstance(lossy, Mapping):
        raise ConfigError(
            field="compression.lossy", why=f"is {lossy!r:.40}, not Lossy by component"
        )
    for key, value in lossy.items():
        if not isinstance(value, Lossy):
            field = f"compression.lossy[{key!r:.40}]"
            raise ConfigError(field=field, why=f"is {value!r:.40}, not a Lossy")


NO_COMPRESSION = Compression()


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What a save goes on from.

    Attributes:
        stored_bytes: of the last anchor and of each delta since, oldest first; never empty.
        size_bytes: of the newest one's state, before any coding.
        is_fork: whether the newest one is on another branch.
        is_exact: whether nothing may be given up of the next save.
    """

    stored_bytes: Sequence[int]
    size_bytes: int
    is_fork: bool = False
    is_exact: bool = True


def base_place(rule: Compression, past: Past) -> int:
    """What the next delta is against: the anchor is 0, the first save after it is 1, and so on.

    In an exact chain that is the next one's own place less its lowest bit: 10 is against 8, and 8
    against the anchor; and less the next bit, where the delta at that place is not small. So a
    restore of the nth reads as many deltas as n has bits, or fewer, and none is against a save that
    the one before it does not stand on, too. What is given up of a tensor is a part of the change
    since its base, which has to be the save before.
    """
    if rule.base is BaseChoice.ANCHOR:
        return 0
    place = len(past.stored_bytes)
    if not past.is_exact:
        return place - 1
    place &= place - 1
    while place and _is_dense(rule, past, place):
        place &= place - 1
    return place


def _is_dense(rule: Compression, past: Past, place: int) -> bool:
    """Whether that delta is too large for others to be against it."""
    return past.stored_bytes[place] >= rule.chain_below * past.stored_bytes[0]


def why_anchor(rule: Compression, past: Past | None) -> str:
    """The reason for which the next save is an anchor; empty when it is a delta."""
    if rule.level is CompressionLevel.OFF:
        return "compression is off"
    if past is None:
        return "there is nothing to be a delta against"
    if len(past.stored_bytes) > MAX_CHAIN and (past.is_fork or rule.base is BaseChoice.PREVIOUS):
        return f"a chain has {MAX_CHAIN} deltas at most"
    if past.is_fork:
        return ""
    return _why_due(rule, past) or _why_dear(rule, past)


def why_delta(rule: Compression, past: Past) -> str:
    """The reason for which the next save is a delta, where `why_anchor` gives none."""
    if past.is_fork:
        return "the first of a branch"
    if len(past.stored_bytes) == 1:
        return "the first after an anchor"
    next_bytes, mean = _predicted(past), _mean(past)
    if next_bytes >= mean:  # of no account in a chain, or where an interval is configured
        return f"about {next_bytes} bytes"
    return f"about {next_bytes} bytes, under the {mean:.0f} that a save took since the anchor"


def _why_due(rule: Compression, past: Past) -> str:
    interval = rule.reanchor_interval
    if interval is not None and len(past.stored_bytes) >= interval:
        return f"every {interval} saves, as configured"
    return ""


def _why_dear(rule: Compression, past: Past) -> str:
    anchor, *deltas = past.stored_bytes
    if not deltas:
        return ""
    next_bytes, mean = _predicted(past), _mean(past)
    read = next_bytes + _read(rule, past)
    if read > rule.restore_budget * past.size_bytes:
        return f"a restore would read {read} bytes, over {rule.restore_budget:g} times the state"
    if deltas[-1] > anchor:  # perhaps it was made before an optimizer had its state
        return (
            f"the last delta took {deltas[-1]} bytes, more than its anchor's {anchor}; "
            f"the state has {past.size_bytes} by now"
        )
    if deltas[-1] >= _PAYS * anchor:
        return f"the last delta took {deltas[-1]} bytes, hardly less than its anchor's {anchor}"
    # A chain's deltas do not grow, so what they save is never used up; but where it is none.
    dense = past.is_exact and _is_dense(rule, past, len(deltas))
    star = rule.base is BaseChoice.ANCHOR or dense
    if star and rule.reanchor_interval is None and next_bytes >= mean:
        return f"the next delta would take about {next_bytes} bytes, over the mean of {mean:.0f}"
    return ""


def _read(rule: Compression, past: Past) -> int:
    """What a restore of the next delta's base reads."""
    place = base_place(rule, past)
    read = past.stored_bytes[0]
    while place:
        read += past.stored_bytes[place]
        place = base_place(rule, replace(past, stored_bytes=past.stored_bytes[:place]))
    return read


def _predicted(past: Past) -> int:
    """The size of the next delta: the last one's, and as much more as that was more than before."""
    _, *deltas = past.stored_bytes
    growth = max(0, deltas[-1] - deltas[-2]) if len(deltas) > 1 else 0
    return deltas[-1] + growth


def _mean(past: Past) -> float:
    return sum(past.stored_bytes) / len(past.stored_bytes)
