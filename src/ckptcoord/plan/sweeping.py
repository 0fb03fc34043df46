"""What gc may delete, and why it keeps the rest. Pure (INV-5)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

from ckptcoord.plan.commit import STAGING, LogState, live_folders, needed_by
from ckptcoord.plan.retention import age_s

if TYPE_CHECKING:
    from datetime import datetime

    from ckptcoord.core.entries import Commit

ASIDE = ("-debris", "-swept")
"""How folders in staging end that gc, or once a save, has moved out of the way."""
ABANDONED_S = 24 * 3600.0
"""A save that has not touched its folder for so long is taken for dead."""


class Why(StrEnum):
    """Why a folder goes."""

    RETIRED = "retired"
    SWEPT = "left by a sweep"
    ABANDONED = "abandoned save"
    DEBRIS = "without a commit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder that no live checkpoint is.

    Attributes:
        attempt: whose files it holds, by its manifest; None where it has none.
        unreadable: why that could not be found out, or empty.
        changed_s: when it last changed, in seconds since 1970.
    """

    path: str
    attempt: str | None = None
    unreadable: str = ""
    changed_s: float | None = None
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What stands in a repository.

    Attributes:
        names: of the repository's folder; None where only its staging was looked at.
        folders: those that no live checkpoint is.
    """

    names: frozenset[str] | None
    folders: tuple[Folder, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Doomed:
    """A folder that goes.

    Attributes:
        attempt: whose files it holds; it commits no more. None: files that no commit could name.
        size_bytes: of its files; 0 for a retired checkpoint that somebody deleted already.
    """

    path: str
    attempt: str | None
    why: Why
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A folder that stays though it is no live checkpoint."""

    path: str
    why: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A checkpoint that a killed gc had moved aside, and where it belongs."""

    path: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GcPlan:
    """What gc does; each part is sorted by path."""

    doomed: tuple[Doomed, ...] = ()
    kept: tuple[Kept, ...] = ()
    restored: tuple[Restored, ...] = ()

    @property
    def freed_bytes(self) -> int:
        """What goes altogether."""
        return sum(one.size_bytes for one in self.doomed)


def plan_gc(state: LogState, listing: Listing, *, now: datetime, grace_s: float) -> GcPlan:
    """What may be deleted.

    Retired checkpoints that no live one needs, `grace_s` after they were retired; the rest only
    once it has not changed for `ABANDONED_S`, or for `grace_s` where a sweep has named it already.
    What could not be read, and what nobody knows, stays.
    """
    judge = _Judge(state, listing, now, grace_s)
    found = [judge(folder) for folder in listing.folders] + judge.lost()
    return GcPlan(
        doomed=tuple(sorted((x for x in found if isinstance(x, Doomed)), key=lambda x: x.path)),
        kept=tuple(sorted((x for x in found if isinstance(x, Kept)), key=lambda x: x.path)),
        restored=tuple(sorted((x for x in found if isinstance(x, Restored)), key=lambda x: x.path)),
    )


_Verdict: TypeAlias = "Doomed | Kept | Restored | None"


class _Judge:
    def __init__(self, state: LogState, listing: Listing, now: datetime, grace_s: float) -> None:
        self._state, self._names = state, listing.names
        self._now, self._grace_s = now, grace_s
        self._owned = {commit.path for commit in state.commits.values()}
        self._live = live_folders(state)
        retired = (one.commit for one in state.retired.values())
        self._known = {c.attempt: c for c in (*retired, *state.commits.values())}

    def __call__(self, folder: Folder) -> _Verdict:
        if folder.path in self._owned:  # since it was listed
            return None
        if folder.unreadable:
            return _kept(folder, f"its manifest cannot be read: {folder.unreadable}")
        if folder.path in self._state.retired:
            return self._retired(folder)
        owner = self._known.get(folder.attempt or "")
        if owner is not None:
            return self._astray(folder, owner)
        if folder.attempt is None and not is_staged(folder.path):
            return _kept(folder, "no checkpoint of ckptcoord")
        return self._dead(folder)

    def lost(self) -> list[_Verdict]:
        """Retired checkpoints whose folder somebody has deleted: their names become free."""
        if self._names is None:
            return []
        gone = self._state.retired.keys() - self._names - self._live
        ready = (self._retired(Folder(path=p)) for p in gone)
        return [one for one in ready if isinstance(one, Doomed)]

    def _retired(self, folder: Folder) -> _Verdict:
        """A retired checkpoint, or what is in its place."""
        if folder.path in self._live:
            ids = ", ".join(one.ref for one in needed_by(self._state, folder.path))
            return _kept(folder, f"needed by {ids}")
        retired = self._state.retired[folder.path]
        if folder.size_bytes and folder.attempt != retired.commit.attempt:
            return _kept(folder, "does not hold the files of the checkpoint of its name")
        age = age_s(retired.stamp.timestamp, self._now)
        if age is None or max(0.0, age) < self._grace_s:  # clocks differ
            return _kept(folder, f"retired {_since(age)}")
        return _doomed(folder, Why.RETIRED, retired.commit.attempt)

    def _astray(self, folder: Folder, owner: Commit) -> _Verdict:
        """The files of a known checkpoint in a place that is not theirs."""
        aside = folder.path.endswith(ASIDE)
        if aside and self._names is not None and owner.path not in self._names:
            return Restored(path=folder.path, target=owner.path)
        return _kept(folder, f"holds the files of {owner.checkpoint_id.ref}")

    def _dead(self, folder: Folder) -> _Verdict:
        """What no checkpoint knows: a save that is under way, or was killed."""
        swept = folder.attempt in self._state.swept
        if folder.attempt is None and folder.path.endswith("-swept"):
            swept = True  # what is left of it has no manifest
        least_s = self._grace_s if swept else max(ABANDONED_S, self._grace_s)
        age = None if folder.changed_s is None else self._now.timestamp() - folder.changed_s
        if least_s > 0 and (age is None or age < least_s):
            return _kept(folder, f"may belong to a save that is under way: changed {_since(age)}")
        why = Why.ABANDONED if is_staged(folder.path) else Why.DEBRIS
        return _doomed(folder, Why.SWEPT if swept else why, folder.attempt)


def _doomed(folder: Folder, why: Why, attempt: str | None) -> Doomed:
    return Doomed(path=folder.path, attempt=attempt, why=why, size_bytes=folder.size_bytes)


def _kept(folder: Folder, why: str) -> Kept:
    return Kept(path=folder.path, why=why, size_bytes=folder.size_bytes)


def is_staged(path: str) -> bool:
    """Whether a path is among the unfinished saves."""
    return path.startswith(f"{STAGING}/")


def _since(age: float | None) -> str:
    if age is None:
        return "at an unknown time"
    return f"{max(0, int(age / 60))} min ago"
