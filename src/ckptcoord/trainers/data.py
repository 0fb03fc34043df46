"""Loaders that resume at the very batch: a position in the epoch, not in a prefetch queue."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as c10d
from torch.utils.data import DataLoader, Sampler

from ckptcoord.dist.rng import mix_seed
from ckptcoord.errors import CkptError, ConfigError
from ckptcoord.trainers.wire import broadcast, pack, plain, scatter
from ckptcoord.trainers.workers import EpochKeys, SeededDataset, ignore_signals, signals_blocked

if TYPE_CHECKING:
    import numpy as np


class MapDataset(Sized, Protocol):
    """A dataset with a length and samples by index."""

    def __getitem__(self, index: int, /) -> Any: ...  # noqa: ANN401 (a sample is the user's own)


class Closeable(Protocol):
    """What has worker processes to end."""

    def close(self) -> None:
        """End them."""
        ...


class StatefulSampler(Sampler[int]):
    """This rank's indices of one epoch, from a position on.

    The order of an epoch depends on (seed, epoch) alone and is drawn from a generator of its own,
    so it neither disturbs nor depends on torch's global one. What is left of it from the position
    on is dealt in rounds, one index to each rank in rank order.

    **Another number of ranks.** The position is global, and the state is the same on all ranks:
    loaded on any number of them, what is left is dealt over these. So in an epoch that any numbers
    of ranks have shared, one after the other, no sample comes twice, and none is left out but what
    does not go round at its very end, which `drop_last` is about: fewer samples than the last ranks
    are many.

    Args:
        length: samples in the dataset.
        rank: whose indices.
        world_size: number of ranks that share the epoch.
        shuffle: draw a new order each epoch; else ascending.
        seed: of the order; 0 or more.
        drop_last: leave out the samples of the last round if it is not full; else the first ones of
            the epoch are used again to fill it up. Either way every rank gets equally many.

    Attributes:
        epoch: the current epoch, from 0.
        position: GLOBAL samples of the epoch that all ranks together have consumed, those that
            fill up included. It moves by `advance` only: the sampler cannot know which of its
            indices were merely prefetched.

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
    def left(self) -> int:
        """Samples of the epoch that this rank has before it."""
        return self._rounds(self.length - self.position)

    @property
    def total(self) -> int:
        """Where the epoch ends, as a position."""
        return self.position + self.left * self.world_size

    def __len__(self) -> int:
        """Samples of a whole epoch for this rank, wherever the position is."""
        return self._rounds(self.length)

    def __iter__(self) -> Iterator[int]:
        (own,) = self.indices([self.rank])
        return own

    def indices(self, ranks: Iterable[int]) -> list[Iterator[int]]:
        """What is left of the epoch for each of these ranks."""
        order, total = self._order(), self.total
        places = [range(self.position + rank, total, self.world_size) for rank in ranks]
        return [(int(order[place % self.length]) for place in own) for own in places]

    def advance(self, samples: int) -> None:
        """`samples` more of the epoch, counted over all ranks, have been consumed."""
        self.position = min(self.position + samples, self.total)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; the current one keeps its position."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, and what it must match to mean the same; alike on all ranks."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "length": self.length,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """Refuse a state that would mean other samples.

        Raises:
            ConfigError: the saved run had another dataset length, seed or order, or its position
                is none.
        """
        for name in ("length", "seed", "shuffle", "drop_last"):
            if state_dict[name] != getattr(self, name):
                raise ConfigError(
                    field=f"sampler.{name}",
                    why=f"is {getattr(self, name)}, but the checkpoint was saved with "
                    f"{state_dict[name]}: its position in the epoch would mean other samples",
                    help="Resume with the dataset and settings of the saved run, or load with "
                    "strict=False and without the dataset component",
                )
        for name in ("epoch", "position"):
            count_in(state_dict, name)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go where it stood, on whatever number of ranks.

        Raises:
            ConfigError: as `check_state` says.
        """
        self.check_state(state_dict)
        self.epoch, self.position = state_dict["epoch"], state_dict["position"]

    def _rounds(self, samples: int) -> int:
        whole, rest = divmod(max(0, samples), self.world_size)
        return whole + bool(rest and not self.drop_last)

    def _order(self) -> Sequence[int] | np.ndarray:
        if not self.shuffle:
            return range(self.length)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        return torch.randperm(self.length, generator=generator).numpy()


class ExitGuard:
    """Closes a loader that is still read from when the interpreter exits.

    Otherwise multiprocessing would send its worker processes SIGTERM, which they do not hear, and
    wait for them for ever.
    """

    def __init__(self, loader: Closeable) -> None:
        self._end = partial(_close, weakref.ref(loader))

    def arm(self) -> None:
        """What is registered after multiprocessing's own runs before it."""
        atexit.register(self._end)

    def disarm(self) -> None:
        """It has been closed."""
        atexit.unregister(self._end)


def _close(loader: weakref.ref[Closeable]) -> None:
    found = loader()
    if found is not None:
        found.close()


def count_in(state_dict: Mapping[str, Any], name: str) -> int:
    """A number of things in a loaded state.

    Raises:
        ConfigError: it is no number, or below 0.
    """
    value = state_dict[name]
    if type(value) is not int or value < 0:
        raise ConfigError(field=f"dataset.{name}", why=f"is {value!r} in the checkpoint")
    return value


def batches_in(samples: int, batch_size: int, *, drop_last: bool) -> int:
    """Batches of a rank's samples."""
    whole, rest = divmod(samples, batch_size)
    return whole + bool(rest and not drop_last)


class ResumableLoader:
    """torch's DataLoader with a position that counts the batches handed to the trainer.

    Iterating gives the rest of the current epoch; call `set_epoch` before the next one. The
    position is right with any number of workers and any prefetch. Worker processes ignore
    SIGTERM, SIGUSR1 and SIGINT, and seed their generators by (seed, epoch, index), so that random
    augmentations are the same after a resume; without workers samples draw from the process's own
    generators, which `RNGState` restores.

    The position is in samples of all ranks, so an epoch goes on with any number of ranks and any
    batch size (`StatefulSampler`). Every rank gets batches of equal sizes, and equally many. With
    drop_last the last layout leaves out what no longer fills a batch on every rank: fewer than
    batch_size times world_size samples. Without, the last batch is smaller, and only the last
    sample of each rank's can be one that fills up.

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
        self._ranks: Sequence[int] = (rank,)  # whose batches it gives, in turns
        self._least = batch_size if drop_last else 1  # samples that still make a batch
        self._live: Iterator[Any] = iter(())
        self._guard = ExitGuard(self)
        self._closed = 0  # how often: an iteration from before the last time has ended

    def __len__(self) -> int:
        """Batches of a whole epoch for a rank, wherever the position is."""
        return batches_in(len(self.sampler), self.batch_size, drop_last=self.drop_last)

    @property
    def batches_left(self) -> int:
        """Batches of the epoch that a rank has before it."""
        return batches_in(self.sampler.left, self.batch_size, drop_last=self.drop_last)

    def __iter__(self) -> Iterator[Any]:
        self.close()
        turns = self._turns(self.sampler.left)
        with signals_blocked():
            self._live = iter(self._loader())
        self._guard.arm()
        mine = self._closed
        for rank, size in turns:
            if mine != self._closed:
                return
            # No local name holds torch's iterator: `close` must free it while this one waits.
            batch = next(self._live)
            if rank == self._ranks[0]:
                # Before the trainer sees it: a save while it works on this batch must not repeat
                # it. All ranks take their turns of a round together.
                self.sampler.advance(size * self.sampler.world_size)
            yield batch
        if mine == self._closed:
            self.close()

    def deal_to(self, world_size: int) -> None:
        """From the next `iter()` on, give the batches of so many ranks, in turns in rank order.

        Each is what a loader of that rank would give; the length stays that of one rank.
        """
        self.sampler.rank, self.sampler.world_size = 0, world_size
        self._ranks = range(world_size)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; the current one keeps its position."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position; alike on all ranks."""
        return {"sampler": self.sampler.state_dict()}

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """As the sampler's."""
        self.sampler.check_state(state_dict["sampler"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the saved loader stood, from the next `iter()` on.

        Raises:
            ConfigError: the saved run had another dataset length, seed or order.
        """
        self.sampler.load_state_dict(state_dict["sampler"])
        self.close()

    def close(self) -> None:
        """End the iteration under way and its worker processes."""
        self._closed += 1
        self._guard.disarm()
        self._live = iter(())  # torch's iterator ends its workers when it is freed

    def _loader(self) -> DataLoader[Any]:
        sampler = self.sampler
        indices = dict(zip(self._ranks, sampler.indices(self._ranks), strict=True))
        turns = self._turns(sampler.left)
        batches: Any = (list(islice(indices[rank], size)) for rank, size in turns)
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

    def _turns(self, left: int) -> Iterator[tuple[int, int]]:
        """The rank and size of each batch, where every rank has so many samples before it."""
        while left >= self._least:
            size = min(self.batch_size, left)
            left -= size
            yield from ((rank, size) for rank in self._ranks)


class FollowedLoader:
    """A loader that one rank reads, and whose position the other ranks follow.

    Attributes:
        source: the reading rank's loader; None elsewhere.
    """

    def __init__(
        self, source: ResumableLoader | None, sampler: StatefulSampler, batch_size: int
    ) -> None:
        self.source, self._sampler, self._batch_size = source, sampler, batch_size

    def __len__(self) -> int:
        """Batches of a whole epoch, for this rank."""
        return self._batches(len(self._sampler))

    @property
    def batches_left(self) -> int:
        """Batches that the epoch has before it, for this rank."""
        return self._batches(self._sampler.left)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; the current one keeps its position."""
        self._sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position; alike on all ranks, and what a `ResumableLoader` has."""
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
        """End the reading rank's worker processes."""
        if self.source is not None:
            self.source.close()

    def _follow(self) -> None:
        """Another rank has read a batch for each that shares the epoch."""
        sampler = self._sampler
        sampler.advance(min(self._batch_size, sampler.left) * sampler.world_size)

    def _batches(self, samples: int) -> int:
        return batches_in(samples, self._batch_size, drop_last=self._sampler.drop_last)


class DispatchLoader(FollowedLoader):
    """Rank 0 reads and sends each rank its batch; the other ranks need no dataset.

    Each rank gets what a `ResumableLoader` of its own would give it, so that an epoch may go on
    either way, and on another number of ranks. Declare it GLOBAL: rank 0's position counts, and the
    others follow it. All ranks iterate together, and the epoch ends for all in the same round.

    Args:
        source: on rank 0, a loader, which from now on deals to all ranks; None elsewhere.
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
        self._group = group
        self.rank, self.world_size = c10d.get_rank(), c10d.get_world_size()
        mine = None if source is None else (source.batch_size, source.sampler.state_dict())
        facts: Any = broadcast(mine, group=group)
        if facts is None:
            raise ConfigError(field="DispatchLoader.source", why="is None on rank 0")
        batch_size, state = facts
        if source is not None:
            source.deal_to(self.world_size)
        super().__init__(source, sampler_of(source, state, self.world_size), batch_size)

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
            if self.source is None:
                self._follow()
            yield value

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


def sampler_of(
    source: ResumableLoader | None, state_dict: dict[str, Any], world_size: int
) -> StatefulSampler:
    """The reading rank's own sampler; elsewhere, one that stands where it does."""
    if source is not None:
        return source.sampler
    names = ("length", "shuffle", "seed", "drop_last")
    sampler = StatefulSampler(world_size=world_size, **{name: state_dict[name] for name in names})
    sampler.load_state_dict(state_dict)
    return sampler
