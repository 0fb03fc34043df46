"""`loss > 3`: what makes a checkpoint bad, by the metrics that were saved with it. Pure."""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from ckptcoord.errors import ConfigError
from ckptcoord.plan.bisection import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_FORM = re.compile(r"([^<>=\s](?:[^<>=]{0,198}[^<>=\s])?) ?(<=|>=|<|>) ?([^<>=\s]{1,40})")
_COMPARE: Mapping[str, Callable[[float, float], bool]] = MappingProxyType(
    {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """Bad is what it holds for.

    Attributes:
        metric: its name.
        relation: `<`, `<=`, `>` or `>=`.
        limit: finite.
        absent: of a checkpoint that has no such metric; a save leaves out what is not finite.
    """

    metric: str
    relation: str
    limit: float
    absent: Verdict = Verdict.SKIP

    @classmethod
    def parse(cls, text: str, *, absent: Verdict = Verdict.SKIP) -> Self:
        """Read `loss > 3`.

        Raises:
            ConfigError: it is no comparison of a name with a finite number.
        """
        match = _FORM.fullmatch(" ".join(text[:400].split()))
        limit = _number(match[3]) if match is not None else math.nan
        if match is None or not math.isfinite(limit):
            raise ConfigError(
                field="--metric",
                why=f"{text[:80]!r} is not a metric's name, one of < <= > >=, and a number",
                help="For example: --metric 'loss > 3'",
            )
        return cls(metric=match[1], relation=match[2], limit=limit, absent=absent)

    def verdict(self, metrics: Mapping[str, float]) -> Verdict:
        """Of a checkpoint with these metrics; NaN is bad, however it is compared."""
        value = metrics.get(self.metric)
        if value is None:
            return self.absent
        bad = math.isnan(value) or _COMPARE[self.relation](value, self.limit)
        return Verdict.BAD if bad else Verdict.GOOD

    def __str__(self) -> str:
        return f"{self.metric} {self.relation} {self.limit!r}"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
