"""What the log says of a checkpoint, for every command alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptcoord.cli.text import Painter, Style
from ckptcoord.plan.commit import branches
from ckptcoord.plan.lookup import head, latest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptcoord.core.entries import Commit
    from ckptcoord.core.refs import CheckpointId
    from ckptcoord.plan.commit import LogState


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What else a checkpoint is called.

    Attributes:
        is_latest: `latest` names it.
        heads: the branches that stand at it.
        tags: the tags on it.
    """

    is_latest: bool = False
    heads: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    def text(self, paint: Painter) -> str:
        """` (latest, main, tag: best)`, as git marks them; empty where there are none."""
        shown = [paint(LATEST, Style.BOLD, Style.CYAN)] if self.is_latest else []
        shown += [paint(name, Style.BOLD, Style.GREEN) for name in self.heads]
        shown += [paint(f"tag: {name}", Style.BOLD, Style.YELLOW) for name in self.tags]
        return f" ({', '.join(shown)})" if shown else ""


LATEST = "latest"
_NONE = Names()


class Naming:
    """The names of all checkpoints."""

    def __init__(self, state: LogState) -> None:
        newest = latest(state)
        self._latest = newest.checkpoint_id if newest else None
        self._heads: dict[CheckpointId, list[str]] = {}
        self._tags: dict[CheckpointId, list[str]] = {}
        for branch in branches(state):
            at = head(state, branch)
            if at is not None:
                self._heads.setdefault(at.checkpoint_id, []).append(str(branch))
        for tag, target in sorted(state.tags.items()):
            self._tags.setdefault(target, []).append(str(tag))

    def of(self, checkpoint_id: CheckpointId) -> Names:
        """The names of one."""
        heads, tags = self._heads.get(checkpoint_id), self._tags.get(checkpoint_id)
        is_latest = checkpoint_id == self._latest
        if not (heads or tags or is_latest):
            return _NONE
        return Names(is_latest=is_latest, heads=tuple(heads or ()), tags=tuple(tags or ()))


def newest_first(state: LogState) -> list[Commit]:
    """All commits by their place in the log, not by step or clock."""
    return sorted(
        state.commits.values(), key=lambda one: state.stamps[one.checkpoint_id].number, reverse=True
    )


def lineage(state: LogState, commit: Commit) -> tuple[tuple[CheckpointId, ...], bool]:
    """The checkpoint, its parent, that one's parent and so on; and whether the last was dropped.

    The last is the first that has no parent or is no longer there.
    """
    chain = {commit.checkpoint_id: None}  # a dict keeps the order; a forged log may have a cycle
    current: Commit | None = commit
    while current is not None and current.parent is not None and current.parent not in chain:
        chain[current.parent] = None
        current = state.commits.get(current.parent)
    return tuple(chain), current is None


def commit_document(state: LogState, commit: Commit, names: Names) -> dict[str, object]:
    """A commit as JSON values: the log's fields, its ref and its names."""
    stamp = state.stamps[commit.checkpoint_id]
    return {
        "ref": commit.checkpoint_id.ref,
        "checkpoint_id": str(commit.checkpoint_id),
        "branch": str(commit.checkpoint_id.branch),
        "step": commit.checkpoint_id.step,
        "path": commit.path,
        "parent": None if commit.parent is None else commit.parent.ref,
        "timestamp": stamp.timestamp,
        "log_number": stamp.number,
        "size_bytes": commit.size_bytes,
        "stored_bytes": commit.stored_bytes,
        "metrics": _plain(commit.metrics),
        "message": commit.message,
        "latest": names.is_latest,
        "heads": list(names.heads),
        "tags": list(names.tags),
        "manifest_digest": str(commit.manifest_digest),
        "attempt": commit.attempt,
        "writer": commit.writer,
        "epoch": commit.epoch,
    }


def _plain(metrics: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(metrics.items()))
