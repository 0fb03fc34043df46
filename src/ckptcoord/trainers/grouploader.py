"""Batches for the stages of a pipeline: the first one reads, all get the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptcoord.errors import CkptError
from ckptcoord.trainers.data import StatefulSampler, batches_in
from ckptcoord.trainers.wire import broadcast, plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptcoord.trainers.data import ResumableLoader
    from ckptcoord.trainers.mesh import Place


class GroupLoader:
    """The first rank of a pipeline reads, and every stage gets every batch.

    The position is what a `ResumableLoader` has, and the same on all ranks of the job: the epoch
    may go on with any trainer, on any mesh. All stages make it, and iterate, together.

    Args:
        source: on the first stage, a loader of the pipeline's slice of the data; None elsewhere.
        place: of this rank among the stages.
    """

    def __init__(self, source: ResumableLoader | None, place: Place) -> None:
        self.source, self._place = source, place
        mine = None
        if source is not None:
            sampler = source.sampler
            mine = [source.batch_size, sampler.world_size, sampler.state_dict()]
        facts: Any = mine
        if place.size > 1:
            facts = broadcast(mine, source=place.ranks[0], group=place.words)
        self._batch_size, world_size, state = facts
        self._sampler = _mirror(state, world_size) if source is None else source.sampler

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self._batches(len(self._sampler))

    @property
    def batches_left(self) -> int:
        """Batches that the epoch has before it."""
        return self._batches(self._sampler.left)

    def __iter__(self) -> Iterator[Any]:
        mine = None if self.source is None else iter(self.source)
        sampler = self._sampler
        for batch in read_together(mine, self._place):
            if self.source is None:
                sampler.advance(min(self._batch_size, sampler.left) * sampler.world_size)
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; the current one keeps its position."""
        self._sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position; alike on all ranks."""
        return {"sampler": self._sampler.state_dict()}

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """Whether the position means anything here. Nothing is changed.

        Raises:
            ConfigError: the saved run had another dataset length, seed or order.
        """
        self._sampler.check_state(state_dict["sampler"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the saved loader stood.

        Raises:
            ConfigError: the saved run had another dataset length, seed or order.
        """
        self._sampler.load_state_dict(state_dict["sampler"])
        self.close()

    def close(self) -> None:
        """End the first rank's worker processes."""
        if self.source is not None:
            self.source.close()

    def _batches(self, samples: int) -> int:
        return batches_in(samples, self._batch_size, drop_last=self._sampler.drop_last)


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


def _mirror(state: dict[str, Any], world_size: int) -> StatefulSampler:
    """A sampler that stands where the first stage's does, on a stage that reads nothing."""
    names = ("length", "shuffle", "seed", "drop_last")
    sampler = StatefulSampler(world_size=world_size, **{name: state[name] for name in names})
    sampler.load_state_dict(state)
    return sampler
