"""Which checkpoints may go. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Self, TypeVar

from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from ckptcoord.core.entries import Commit
    from ckptcoord.core.refs import BranchName, CheckpointId
    from ckptcoord.plan.commit import LogState

_T = TypeVar("_T")
MAX_COUNT = 10**15
_SPAN = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([smhdw])")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Mode(StrEnum):
    """Which values of a metric are the best."""

    MIN = "min"
    MAX = "max"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What is kept: a checkpoint stays if any rule keeps it; without a rule, all stay.

    What a tag names, what a branch was forked from, and the newest of each branch always stay.

    Attributes:
        keep_last: the newest so many of a branch; tagged ones and fork points do not count.
        keep_best: the best so many of a branch by `metric`; of equals the older is the better.
        metric: its name. A checkpoint without it, or with NaN, is not among the best.
        mode: by default `min` if the metric's name ends in "loss", else `max`.
        keep_every: those whose step is a multiple.
        keep_for_s: those that are no older, in seconds.

    Raises:
        ConfigError: a value makes no sense; its field is `retention.<name>`.
    """

    keep_last: int | None = None
    keep_best: int | None = None
    metric: str | None = None
    mode: Mode | None = None
    keep_every: int | None = None
    keep_for_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_best", "keep_every"):
            _check_count(name, getattr(self, name))
        if self.keep_for_s is not None and not _is_span(self.keep_for_s):
            raise _wrong("keep_for", self.keep_for_s, "a time span from 0 s on")
        if self.metric is not None and not _is_text(self.metric):
            raise _wrong("metric", self.metric, "a metric's name")
        if self.mode is not None and self.mode not in tuple(Mode):
            raise _wrong("mode", self.mode, "min or max")
        if self.mode is not None:
            object.__setattr__(self, "mode", Mode(self.mode))  # a plain "min" is one, too
        if self.keep_best is not None and self.metric is None:
            raise ConfigError(field="retention.keep_best", why="needs a metric")

    @classmethod
    def from_settings(cls, settings: object) -> Self:
        """The rules in a mapping: `keep_last, keep_best, metric, mode, keep_every, keep_for`.

        `keep_for` is a span as `parse_span` reads it, or seconds.

        Raises:
            ConfigError: it is no mapping, has an unknown key, or a value makes no sense.
        """
        if not isinstance(settings, dict):
            raise _wrong("", settings, "a mapping of rules")
        known = dict(settings)
        span = known.pop("keep_for", None)
        mode = known.pop("mode", None)
        names = {field.name for field in fields(cls)} - {"keep_for_s"}
        for name in known:
            if name not in names:
                why = f"there is no rule {ascii(name)[:40]}"
                raise ConfigError(field="retention", why=why)
        if mode is not None and mode not in tuple(Mode):
            raise _wrong("mode", mode, "min or max")
        return cls(
            **known,
            mode=None if mode is None else Mode(mode),
            keep_for_s=parse_span(span, field="retention.keep_for")
            if isinstance(span, str)
            else span,
        )

    @property
    def has_rules(self) -> bool:
        """Whether anything may go at all."""
        rules = (self.keep_last, self.keep_best, self.keep_every, self.keep_for_s)
        return any(rule is not None for rule in rules)

    def over(self, other: Retention) -> Retention:
        """These rules, and of `other` those that are not given here.

        The metric and its mode belong to `keep_best`, and go with it where that is given.
        """
        best = other if self.keep_best is None else self
        return Retention(
            keep_last=_first(self.keep_last, other.keep_last),
            keep_best=best.keep_best,
            metric=best.metric,
            mode=best.mode,
            keep_every=_first(self.keep_every, other.keep_every),
            keep_for_s=_first(self.keep_for_s, other.keep_for_s),
        )

    def __str__(self) -> str:
        """`keep_last=3, keep_every=1000`: the reason in a retire entry."""
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ", ".join(f"{name}={value}" for name, value in given if value is not None)


def parse_span(text: str, *, field: str) -> float:
    """Seconds of `90s`, `30m`, `1h`, `1.5d`, `2w`.

    Raises:
        ConfigError: it is none; names `field`.
    """
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        why = f"{ascii(text)[:40]} is no time span"
        raise ConfigError(field=field, why=why, help="Write it as in 90s, 30m, 1h, 7d or 2w")
    return float(match[1]) * _UNITS_S[match[2]]


def surplus(
    state: LogState, branch: BranchName, retention: Retention, now: datetime
) -> tuple[CheckpointId, ...]:
    """The checkpoints of a branch that no rule keeps, oldest first.

    Old and new go by their place in the log, not by step; `keep_for_s` alone by the clock, and what
    has no time that can be read is kept.
    """
    if not retention.has_rules:
        return ()
    pinned = {*state.tags.values(), *(fork.source for fork in state.forks.values())}
    own = sorted(
        (one for one in state.commits if one.branch == branch),
        key=lambda one: state.stamps[one].number,
    )
    free = [one for one in own if one not in pinned]
    kept = pinned | set(own[-1:]) | _best(state, own, retention)
    kept |= set(free[-retention.keep_last :]) if retention.keep_last else set()
    return tuple(
        one
        for one in free
        if one not in kept
        and not (retention.keep_every and one.step % retention.keep_every == 0)
        and not _is_young(state.stamps[one].timestamp, retention.keep_for_s, now)
    )


def age_s(timestamp: str, now: datetime) -> float | None:
    """Seconds since a time of the log; None when it is no time."""
    try:
        return (now - datetime.fromisoformat(timestamp)).total_seconds()
    except (ValueError, TypeError, OverflowError):  # TypeError: it has no time zone
        return None


def _best(state: LogState, own: list[CheckpointId], retention: Retention) -> set[CheckpointId]:
    """The best of these, which are given oldest first."""
    metric = retention.metric
    if retention.keep_best is None or metric is None:
        return set()
    mode = retention.mode or (Mode.MIN if metric.endswith("loss") else Mode.MAX)
    sign = 1 if mode is Mode.MIN else -1
    scored = [one for one in own if _has(state.commits[one], metric)]
    ranked = sorted(scored, key=lambda one: sign * state.commits[one].metrics[metric])
    return set(ranked[: retention.keep_best])


def _has(commit: Commit, metric: str) -> bool:
    return metric in commit.metrics and not math.isnan(commit.metrics[metric])


def _is_young(timestamp: str, span_s: float | None, now: datetime) -> bool:
    if span_s is None:
        return False
    age = age_s(timestamp, now)
    return age is None or age <= span_s


def _first(own: _T | None, other: _T | None) -> _T | None:
    return other if own is None else own


def _check_count(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
        raise _wrong(name, value, f"a whole number from 1 to {MAX_COUNT}")


def _is_span(value: object) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _wrong(name: str, value: object, wanted: str) -> ConfigError:
    field = f"retention.{name}".rstrip(".")
    return ConfigError(field=field, why=f"is {ascii(value)[:40]}, not {wanted}")


KEEP_ALL = Retention()
