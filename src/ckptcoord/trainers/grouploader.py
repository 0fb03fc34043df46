"""Batches for the stages of a pipeline: the first one reads, all get the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptcoord.errors import CkptError
from ckptcoord.trainers.data import FollowedLoader, sampler_of
from ckptcoord.trainers.wire import broadcast, plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptcoord.trainers.data import ResumableLoader
    from ckptcoord.trainers.mesh import Place


class GroupLoader(FollowedLoader):
    """The first rank of a pipeline reads, and every stage gets every batch.

    The position is what a `ResumableLoader` has, and the same on all ranks of the job: the epoch
    may go on with any trainer, on any mesh. All stages make it, and iterate, together.

    Args:
        source: on the first stage, a loader of the pipeline's slice of the data; None elsewhere.
        place: of this rank among the stages.
    """

    def __init__(self, source: ResumableLoader | None, place: Place) -> None:
        self._place = place
        mine = None
        if source is not None:
            sampler = source.sampler
            mine = [source.batch_size, sampler.world_size, sampler.state_dict()]
        facts: Any = mine
        if place.size > 1:
            facts = broadcast(mine, source=place.ranks[0], group=place.words)
        batch_size, world_size, state = facts
        super().__init__(source, sampler_of(source, state, world_size), batch_size)

    def __iter__(self) -> Iterator[Any]:
        mine = None if self.source is None else iter(self.source)
        for batch in read_together(mine, self._place):
            if self.source is None:
                self._follow()
            yield batch


def read_together(batches: Iterator[Any] | None, place: Place) -> Iterator[Any]:
    """The first rank's batches, on every rank. Collective, each of them and their end.

    Args:
        batches: on the first rank; None elsewhere.
        place: of this rank among those that read together.

    Raises:
        CkptError: the first rank could not read one; there, its own error.
    """
    if place.size == 1:
        yield from batches or ()
        return
    first = place.ranks[0]
    while True:
        mine, failure = (None, None) if batches is None else _next(batches)
        told: Any = broadcast(mine, source=first, group=place.words)
        kind, value = told
        if failure is not None:
            raise failure
        if kind == "error":
            raise CkptError(
                what=f"rank {first} could not read the next batch: {value}",
                help="Its own traceback is in its output",
            )
        if kind == "end":
            return
        yield value


def _next(batches: Iterator[Any]) -> tuple[list[Any], Exception | None]:
    """What to tell the group, and what to raise here once it is told."""
    try:
        return ["batch", plain(next(batches))], None
    except StopIteration:
        return ["end", None], None
    except Exception as error:  # noqa: BLE001 (whatever it is, the others wait)
        return ["error", f"{type(error).__name__}: {error}"], error
