"""What people say to the log: checkpoints are dropped, tags set and deleted."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from ckptcoord.core.entries import Retire, Tag
from ckptcoord.errors import TagExistsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ckptcoord.core.refs import CheckpointId, TagName
    from ckptcoord.plan.commit import LogState
    from ckptcoord.repo.repository import Repository

_AT_ONCE = 1000  # an entry has 1 MiB at most


def retire(
    repository: Repository, ids: Iterable[CheckpointId], *, writer: str, reason: str
) -> None:
    """Drop checkpoints; their files stay until gc.

    Raises:
        RefNotFoundError: one of them is not there.
        CheckpointInUseError: a tag names one, or a branch has nothing else.
        CkptError: the log cannot be read or appended to.
    """
    for batch in _batches(ids):
        _append(repository, Retire(writer=writer, checkpoint_ids=batch, reason=reason))


def set_tag(
    repository: Repository, name: TagName, target: CheckpointId, *, writer: str, move: bool = False
) -> CheckpointId | None:
    """Set a tag; returns what it named before.

    Raises:
        TagExistsError: it names another checkpoint, and `move` is not set.
        RefNotFoundError: there is no such checkpoint.
        CkptError: the log cannot be read or appended to.
    """
    before: list[CheckpointId | None] = []

    def make(state: LogState) -> Tag:
        named = state.tags.get(name)
        if named is not None and named != target and not move:
            raise TagExistsError(tag=str(name), target=named.ref)
        before.append(named)
        return Tag(writer=writer, name=name, target=target)

    repository.log.append(make)
    return before[-1]


def delete_tag(repository: Repository, name: TagName, *, writer: str) -> None:
    """Delete a tag; the checkpoint stays.

    Raises:
        RefNotFoundError: there is none.
        CkptError: the log cannot be read or appended to.
    """
    _append(repository, Tag(writer=writer, name=name, target=None))


def _append(repository: Repository, entry: Retire | Tag) -> None:
    repository.log.append(lambda _: entry)


def _batches(ids: Iterable[CheckpointId]) -> Iterator[tuple[CheckpointId, ...]]:
    rest = iter(ids)
    while batch := tuple(islice(rest, _AT_ONCE)):
        yield batch
