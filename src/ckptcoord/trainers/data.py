"""Loaders that resume at the very batch: a position in the epoch, not in a prefetch queue."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as c10d
from torch.utils.data import BatchSampler, DataLoader, Sampler

from ckptcoord.errors import CkptError, ConfigError
from ckptcoord.trainers.rng import mix_seed
from ckptcoord.trainers.wire import broadcast, pack, plain, scatter
from ckptcoord.trainers.workers import EpochKeys, SeededDataset, ignore_signals, signals_blocked

if TYPE_CHECKING:
    import numpy as np


class MapDataset(Sized, Protocol):
    """A dataset with a length and samples by index."""

    def __getitem__(self, index: int, /) -> Any: ...  # noqa: ANN401 (a sample is the user's own)


class StatefulSampler(Sampler[int]):
    """This rank's indices of one epoch, from a position on.

    The order of an epoch depends on (seed, epoch) alone and is drawn from a generator of its own,
    so it neither disturbs nor depends on torch's global one. Rank r takes every world_size-th
    index from r on.

    Args:
        length: samples in the dataset.
        rank: whose indices.
        world_size: number of ranks that share the epoch.
        shuffle: draw a new order each epoch; else ascending.
        seed: of the order; 0 or more.
        drop_last: leave out the samples that do not go round evenly; else the first ones of the
            epoch are used twice to fill up. Either way every rank gets equally many.

    Attributes:
        epoch: the current epoch, from 0.
        position: GLOBAL samples of the epoch that all ranks together have consumed. It moves by
            `advance` only: the sampler cannot know which of its indices were merely prefetched.

    Raises:
        ConfigError: an argument out of range.
    """

    def __init__(
        self,
        length: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        if length < 0 or seed < 0 or not 0 <= rank < world_size:
            raise ConfigError(
                field="StatefulSampler",
                why=f"length {length}, seed {seed}, rank {rank} of {world_size} make no sense",
                help="Length and seed are 0 or more, the rank is below the world size",
            )
        self.length, self.rank, self.world_size = length, rank, world_size
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.epoch = 0
        self.position = 0

    @property
    def total(self) -> int:
        """Global samples that an epoch hands out."""
        rounds = self.length // self.world_size
        if not self.drop_last and self.length % self.world_size:
            rounds += 1
        return rounds * self.world_size

    @property
    def consumed(self) -> int:
        """This rank's share of the position."""
        return self.position // self.world_size

    def __len__(self) -> int:
        """Samples of an epoch for this rank, wherever the position is."""
        return self.total // self.world_size

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        places = range(self.position + self.rank, self.total, self.world_size)
        return (int(order[place % self.length]) for place in places)

    def advance(self, samples: int) -> None:
        """`samples` more of the epoch, counted over all ranks, have been consumed."""
        self.position = min(self.position + samples, self.total)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; the current one keeps its position."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, and what it must match to mean the same."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "length": self.length,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "world_size": self.world_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go where it stood.

        Raises:
            ConfigError: the saved run had another dataset length, seed, order or world size.
        """
        for name in ("length", "seed", "shuffle", "drop_last", "world_size"):
            if state_dict[name] != getattr(self, name):
                raise ConfigError(
                    field=f"sampler.{name}",
                    why=f"is {getattr(self, name)}, but the checkpoint was saved with "
                    f"{state_dict[name]}: its position in the epoch would mean other samples",
                    help="Resume with the dataset and settings of the saved run, or load with "
                    "strict=False and without the dataset component",
                )
        self.epoch, self.position = int(state_dict["epoch"]), int(state_dict["position"])

    def _order(self) -> Sequence[int] | np.ndarray:
        if not self.shuffle:
            return range(self.length)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        return torch.randperm(self.length, generator=generator).numpy()


class ResumableLoader:
    """torch's DataLoader with a position that counts the batches handed to the trainer.

    Iterating gives the rest of the current epoch; call `set_epoch` before the next one. The
    position is right with any number of workers and any prefetch. Worker processes ignore
    SIGTERM, SIGUSR1 and SIGINT, and seed their generators by (seed, epoch, index), so that random
    augmentations are the same after a resume; without workers samples draw from the process's own
    generators, which `RNGState` restores.

    Args:
        dataset: has a length and samples by index.
        batch_size: samples a batch, for this rank.
        rank: whose batches.
        world_size: number of ranks that share the epoch.
        shuffle: as the sampler's.
        seed: as the sampler's.
        drop_last: leave out the batch that does not fill up; see also the sampler.
        num_workers: processes that read ahead; 0 reads in this one.
        collate_fn: makes a batch of a list of samples.
        pin_memory: for faster copies to a GPU.

    Raises:
        ConfigError: the dataset has no length, or an argument is out of range.
    """

    def __init__(  # noqa: PLR0913 (keywords only)
        self,
        dataset: MapDataset,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ConfigError(
                field="train_dataset",
                why=f"{type(dataset).__name__} has no length or no samples by index",
                help="Override get_train_dataloader() with a loader that has state_dict and "
                "load_state_dict",
            )
        if batch_size < 1:
            raise ConfigError(field="batch_size", why=f"is {batch_size}, less than 1")
        self.dataset, self.batch_size, self.drop_last = dataset, batch_size, drop_last
        self.sampler = StatefulSampler(
            len(dataset),
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
        )
        self._num_workers, self._collate, self._pin = num_workers, collate_fn, pin_memory
        self._least = batch_size if drop_last else 1  # samples that still make a batch
        self._live: Iterator[Any] = iter(())
        self._closed = 0  # how often: an iteration from before the last time has ended

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the position is."""
        whole, rest = divmod(len(self.sampler), self.batch_size)
        return whole + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[Any]:
        self.close()
        with signals_blocked():
            self._live = iter(self._loader())
        mine, left = self._closed, len(self.sampler) - self.sampler.consumed
        while mine == self._closed and left >= self._least:
            # No local name holds torch's iterator: `close` must free it while this one waits.
            batch = next(self._live)
            size = min(self.batch_size, left)
            left -= size
            # Before the trainer sees it: a save while it works on this batch must not repeat it.
            self.sampler.advance(size * self.sampler.world_size)
            yield batch
        if mine == self._closed:
            self.close()

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; the current one keeps its position."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position, and the batch size that it must match."""
        return {"sampler": self.sampler.state_dict(), "batch_size": self.batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the saved loader stood, from the next `iter()` on.

        Raises:
            ConfigError: the saved run had another batch size, dataset length, seed or world size.
        """
        if state_dict["batch_size"] != self.batch_size:
            raise ConfigError(
                field="per_device_train_batch_size",
                why=f"is {self.batch_size}, but the checkpoint was saved with "
                f"{state_dict['batch_size']}",
                help="Resume with the batch size of the saved run",
            )
        self.sampler.load_state_dict(state_dict["sampler"])
        self.close()

    def close(self) -> None:
        """End the iteration under way and its worker processes."""
        self._closed += 1
        self._live = iter(())  # torch's iterator ends its workers when it is freed

    def _loader(self) -> DataLoader[Any]:
        sampler = self.sampler
        batches: Any = BatchSampler(sampler, self.batch_size, drop_last=self.drop_last)
        dataset: Any = self.dataset
        if self._num_workers:
            dataset = SeededDataset(dataset, sampler.seed)
            batches = EpochKeys(batches, sampler.epoch)
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self._num_workers,
            collate_fn=self._collate,
            pin_memory=self._pin,
            worker_init_fn=ignore_signals,
            # Otherwise making an iterator draws from torch's global generator.
            generator=torch.Generator().manual_seed(mix_seed(sampler.seed, sampler.epoch)),
        )


class DispatchLoader:
    """Rank 0 reads and sends each rank its batch; the other ranks need no dataset.

    Declare it GLOBAL: rank 0's position is the only one, and what other ranks hold as state is
    not used. All ranks iterate together, and the epoch ends for all in the same round.

    Args:
        source: on rank 0, a loader with world size 1 whose batches are dealt out in rank order;
            None elsewhere.
        group: where batches travel, as state trees and bytes (`trainers.wire`); a gloo group keeps
            them off the GPU. None: the default group.

    Raises:
        ConfigError: rank 0 has no source, or the job has no process group.
    """

    def __init__(
        self, source: ResumableLoader | None, *, group: c10d.ProcessGroup | None = None
    ) -> None:
        if not (c10d.is_available() and c10d.is_initialized()):
            raise ConfigError(
                field="dispatch_batches",
                why="there is no process group to send batches over",
                help="Start with torchrun and DDPTrainer, or set dispatch_batches to false",
            )
        self.source, self._group = source, group
        self.rank, self.world_size = c10d.get_rank(), c10d.get_world_size()
        mine = None if source is None else (len(source), source.state_dict())
        facts: Any = broadcast(mine, group=group)
        if facts is None:
            raise ConfigError(field="DispatchLoader.source", why="is None on rank 0")
        self._batches, self._mirror = facts

    def __len__(self) -> int:
        """Rounds of a whole epoch."""
        return int(self._batches) // self.world_size

    def __iter__(self) -> Iterator[Any]:
        hands = None if self.source is None else iter(self.source)
        while True:
            received: Any = scatter(None if hands is None else self._deal(hands), self._group)
            kind, value = received
            if kind == "end":
                return
            if kind == "error":
                raise CkptError(
                    what=f"rank 0 could not read the next batch: {value}",
                    help="Its own traceback is in rank 0's output",
                )
            yield value

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; the current one keeps its position."""
        if self.source is not None:
            self.source.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Rank 0's position; elsewhere, the last one that was loaded."""
        return self._mirror if self.source is None else self.source.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the saved loader stood.

        Raises:
            ConfigError: on rank 0, the saved run had another dataset or settings.
        """
        self._mirror = state_dict
        if self.source is not None:
            self.source.load_state_dict(state_dict)

    def close(self) -> None:
        """End rank 0's worker processes."""
        if self.source is not None:
            self.source.close()

    def _deal(self, hands: Iterator[Any]) -> list[torch.Tensor]:
        """One message for each rank: its batch, the end of the epoch, or why there is none."""
        try:
            batches = list(islice(hands, self.world_size))
            if len(batches) < self.world_size:
                return [pack(("end", None))] * self.world_size
            return [pack(("batch", plain(batch))) for batch in batches]
        except Exception as error:
            failure = pack(("error", f"{type(error).__name__}: {error}"))
            scatter([failure] * self.world_size, self._group)
            raise
