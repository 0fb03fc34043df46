"""Find the first bad checkpoint of a line, with as few questions as there can be. Pure.

A line is a checkpoint and those that training went through to get there, across forks. Its first
is good, its last is bad; somewhere between, good turned bad. Each answer halves what is left, a
skip takes one away: `ceil(log2 n)` questions for `n` checkpoints after the good one, and one more
for each skip.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Self

from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from ckptcoord.core.refs import CheckpointId
    from ckptcoord.plan.commit import LogState


class Verdict(StrEnum):
    """What was found of a checkpoint."""

    GOOD = "good"
    BAD = "bad"
    SKIP = "skip"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bisection:
    """What is known so far.

    Attributes:
        line: oldest first; the first one is good and the last one bad.
        verdicts: of those on the line that somebody has judged.

    Raises:
        ConfigError: these contradict one another, or the line's ends.
    """

    line: tuple[CheckpointId, ...]
    verdicts: Mapping[CheckpointId, Verdict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.line) < 2 or len(set(self.line)) < len(self.line):
            raise ConfigError(field="line", why="is not two checkpoints or more, each once")
        judged = {self.line[0]: Verdict.GOOD} | dict(self.verdicts)
        judged |= {self.line[-1]: judged.get(self.line[-1], Verdict.BAD)}
        object.__setattr__(self, "verdicts", judged)
        if not judged.keys() <= set(self.line):
            raise ConfigError(field="verdicts", why="are of checkpoints that are not on the line")
        ends = judged[self.line[0]], judged[self.line[-1]]
        if ends != (Verdict.GOOD, Verdict.BAD) or self._last_good > self._first_bad:
            raise ConfigError(field="verdicts", why="contradict one another")

    @property
    def good(self) -> CheckpointId:
        """The newest that is known to be good."""
        return self.line[self._last_good]

    @property
    def bad(self) -> CheckpointId:
        """The oldest that is known to be bad."""
        return self.line[self._first_bad]

    @property
    def answers(self) -> tuple[CheckpointId, ...]:
        """Those of which the first bad one is one, oldest first; never empty."""
        return self.line[self._last_good + 1 : self._first_bad + 1]

    def candidates(self, there: Container[CheckpointId]) -> tuple[CheckpointId, ...]:
        """Those that it would help to judge, oldest first.

        Args:
            there: the checkpoints that still exist; what was retired cannot be tried.
        """
        return tuple(one for one in self.answers[:-1] if one not in self.verdicts and one in there)

    def next(self, there: Container[CheckpointId]) -> CheckpointId | None:
        """The one to judge now; None when nothing is left that would help."""
        candidates = self.candidates(there)
        return candidates[len(candidates) // 2] if candidates else None

    def steps_left(self, there: Container[CheckpointId]) -> int:
        """How many more questions there are at most, if none is skipped."""
        return len(self.candidates(there)).bit_length()  # n candidates part n + 1 answers

    def mark(self, one: CheckpointId, verdict: Verdict) -> Self:
        """With one more verdict; it may take the place of a skip.

        Raises:
            ConfigError: the checkpoint is not on the line, or it contradicts what is known.
        """
        if one not in self.line:
            raise ConfigError(
                field=verdict.value,
                why=f"{one.ref} is not between {self.line[0].ref} and {self.line[-1].ref}",
                help="`ckptcoord bisect log` shows what is",
            )
        at, known = self.line.index(one), self.verdicts.get(one)
        against: CheckpointId | None = None
        if verdict is Verdict.GOOD and at >= self._first_bad:
            against = self.bad
        elif verdict is Verdict.BAD and at <= self._last_good:
            against = self.good
        elif verdict is Verdict.SKIP and known in (Verdict.GOOD, Verdict.BAD):
            against = one
        if against is not None:
            raise ConfigError(
                field=verdict.value,
                why=f"{one.ref} cannot be: {against.ref} is known to be {self.verdicts[against]}",
                help="If that was wrong, begin anew: `ckptcoord bisect reset`",
            )
        return replace(self, verdicts={**self.verdicts, one: verdict})

    @property
    def _last_good(self) -> int:
        return max(i for i, one in enumerate(self.line) if self._is(one, Verdict.GOOD))

    @property
    def _first_bad(self) -> int:
        return min(i for i, one in enumerate(self.line) if self._is(one, Verdict.BAD))

    def _is(self, one: CheckpointId, verdict: Verdict) -> bool:
        return self.verdicts.get(one) is verdict


def line_to(state: LogState, tip: CheckpointId) -> tuple[CheckpointId, ...]:
    """The checkpoints that exist and led to one, oldest first; itself the last.

    Parents are followed, across forks and through those that were retired. What was swept, too,
    has no parent any more: then the newest before it on its branch stands for that, or where the
    branch began.
    """
    dropped = {
        one.commit.checkpoint_id: one.commit.parent
        for one in sorted(state.retired.values(), key=lambda one: one.stamp.number)
    }
    parents = dropped | {one: commit.parent for one, commit in state.commits.items()}
    line: dict[CheckpointId, None] = {}
    current: CheckpointId | None = tip
    while current is not None and current not in line:  # a forged log may have a cycle
        line[current] = None
        current = parents[current] if current in parents else _before(state, current)
    return tuple(one for one in reversed(line) if one in state.commits)


def line_between(
    state: LogState, good: CheckpointId, bad: CheckpointId
) -> tuple[CheckpointId, ...]:
    """The line from a good checkpoint to a bad one that came out of it.

    Raises:
        ConfigError: it did not.
    """
    line = line_to(state, bad)
    if good == bad:
        raise ConfigError(field="--bad", why=f"{bad.ref} is the good one, too")
    if good in line:
        return line[line.index(good) :]
    other = line_to(state, good)
    if bad in other:
        why, help_ = f"{bad.ref} comes before {good.ref}", "Give the older one as --good"
    else:
        common = [one for one in line if one in set(other)]
        why = f"{bad.ref} did not come out of {good.ref}"
        help_ = (
            f"They part at {common[-1].ref}: if that is good, give it as --good"
            if common
            else "They have no checkpoint in common"
        )
    raise ConfigError(field="--good", why=why, help=help_)


def _before(state: LogState, gone: CheckpointId) -> CheckpointId | None:
    """What stands for the parent of a checkpoint of which nothing is known any more."""
    branch = gone.branch
    earlier = [one for one in state.commits if one.branch == branch and one.step < gone.step]
    fork = state.forks.get(branch)
    return max(earlier, key=lambda one: one.step, default=fork.source if fork else None)
