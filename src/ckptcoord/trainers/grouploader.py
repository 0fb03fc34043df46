"""Batches for the stages of a pipeline: the first one reads, all get the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptcoord.errors import CkptError
from ckptcoord.trainers.pipeline import tell
from ckptcoord.trainers.wire import plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptcoord.trainers.data import ResumableLoader
    from ckptcoord.trainers.mesh import Place


class GroupLoader:
    """The first rank of a pipeline reads, and every stage gets every batch.

    The position is what a `ResumableLoader` has, and the same on all ranks of the job: the epoch
    may go on with any trainer, on any mesh.

    Args:
        source: of the pipeline's slice of the data; the first stage alone reads from it.
        place: of this rank among the stages.
    """

    def __init__(self, source: ResumableLoader, place: Place) -> None:
        self.source, self._place = source, place

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.source)

    @property
    def batches_left(self) -> int:
        """Batches that the epoch has before it."""
        return self.source.batches_left

    def __iter__(self) -> Iterator[Any]:
        if self._place.size == 1:
            yield from self.source
            return
        batches = iter(self.source) if self._place.index == 0 else None
        sampler = self.source.sampler
        while True:
            mine, failure = (None, None) if batches is None else _next(batches)
            told: Any = tell(mine, source=self._place.ranks[0], group=self._place.words)
            kind, value = told
            if failure is not None:
                raise failure
            if kind == "error":
                raise CkptError(
                    what=f"rank {self._place.ranks[0]} could not read the next batch: {value}",
                    help="Its own traceback is in its output",
                )
            if kind == "end":
                return
            if batches is None:
                size = min(self.source.batch_size, sampler.left)
                sampler.advance(size * sampler.world_size)
            yield value

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; the current one keeps its position."""
        self.source.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position; alike on all ranks."""
        return self.source.state_dict()

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """Whether the position means anything here. Nothing is changed.

        Raises:
            ConfigError: the saved run had another dataset length, seed or order.
        """
        self.source.check_state(state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the saved loader stood.

        Raises:
            ConfigError: the saved run had another dataset length, seed or order.
        """
        self.source.load_state_dict(state_dict)

    def close(self) -> None:
        """End the first rank's worker processes."""
        self.source.close()


def _next(batches: Iterator[Any]) -> tuple[list[Any], Exception | None]:
    """What to tell the group, and what to raise here once it is told."""
    try:
        return ["batch", plain(next(batches))], None
    except StopIteration:
        return ["end", None], None
    except Exception as error:  # noqa: BLE001 (whatever it is, the others wait)
        return ["error", f"{type(error).__name__}: {error}"], error
