"""What runs in a data loader's workers: out of reach of signals, seeded sample by sample."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from ckptcoord.dist.rng import seed_everything

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

# A launcher sends these to the whole process group; a worker that died of one would take the
# trainer's last save with it.
_SHIELDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def ignore_signals(worker_id: int) -> None:
    """Let the trainer alone decide how a signal ends the run. A `worker_init_fn`."""
    for number in _SHIELDED:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Hold signals back while workers start: until `ignore_signals` has run, they have the mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SeededDataset(Dataset[Any]):
    """A dataset whose random augmentations depend on (seed, epoch, index) only.

    A worker's generators would otherwise depend on what the worker has served since it started,
    which differs after a resume. Indices are `(epoch, index)` pairs.
    """

    def __init__(self, dataset: Any, seed: int) -> None:  # noqa: ANN401 (torch's Dataset holds anything)
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:  # noqa: ANN401 (a sample)
        seed_everything(self.seed, *key)
        return self.dataset[key[1]]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Any:  # noqa: ANN401 (samples)
        """A batch at once where the dataset can do that; seeded by its first sample."""
        fetch = getattr(self.dataset, "__getitems__", None)
        if fetch is None:
            return [self[key] for key in keys]
        seed_everything(self.seed, *keys[0])
        return fetch([index for _, index in keys])


class EpochKeys:
    """Batches of indices as batches of the `(epoch, index)` keys that `SeededDataset` takes."""

    def __init__(self, batches: Iterable[list[int]], epoch: int) -> None:
        self.batches, self.epoch = batches, epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([(self.epoch, index) for index in batch] for batch in self.batches)
