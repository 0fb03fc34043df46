"""Loaders of other libraries: torchdata's StatefulDataLoader, Hugging Face's IterableDataset."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from ckptcoord.dist.rng import preserved_rng
from ckptcoord.errors import ConfigError
from ckptcoord.trainers.data import ExitGuard, count_in
from ckptcoord.trainers.workers import signals_blocked

if TYPE_CHECKING:
    from collections.abc import Iterator


_END = object()


def adopt_loader(loader: Any, rank: int, world_size: int) -> Any:  # noqa: ANN401 (any loader)
    """A loader as the trainer wants it: one of another library is wrapped, others stay as they are.

    Neither library is imported: a loader of theirs cannot be there unless they are.

    Raises:
        ConfigError: a Hugging Face IterableDataset is read by worker processes of torch's own
            DataLoader, which nobody can ask where they stand.
    """
    if _is_a(loader, "torchdata.stateful_dataloader", "StatefulDataLoader"):
        return ForeignLoader(loader, loader, rank=rank, world_size=world_size)
    dataset = getattr(loader, "dataset", None)
    if type(loader) is not DataLoader or not _is_a(dataset, "datasets", "IterableDataset"):
        return loader
    if loader.num_workers:
        raise ConfigError(
            field="train_dataloader",
            why=f"reads a Hugging Face IterableDataset in {loader.num_workers} worker processes, "
            "and torch's DataLoader does not tell where they stand in it",
            help="Use torchdata's StatefulDataLoader, or num_workers=0",
        )
    return ForeignLoader(loader, dataset, rank=rank, world_size=world_size)


class ForeignLoader:
    """A loader with a position of its own kind, by which this rank, and no other, can go on.

    What it holds as state is kept as it is, by rank, beside the number of ranks that saved it: a
    position in a stream, or in an order that a sampler drew for one rank, cannot be dealt to other
    ranks. Iterating gives the rest of the epoch, and nothing where it has ended, until `set_epoch`.

    Making an iterator leaves no trace in the global generators, so that a resumed run draws as an
    undisturbed one. What the library's own worker processes draw is not restored. They are made
    with SIGTERM, SIGUSR1 and SIGINT blocked, as these are for the trainer alone.

    Args:
        loader: what is iterated.
        holder: what has the state: the loader, or its dataset.
        rank: this one.
        world_size: ranks of the job.

    Attributes:
        epoch: the current epoch, from 0.
        batches: how many of it this rank has been given.
    """

    def __init__(self, loader: Any, holder: Any, *, rank: int, world_size: int) -> None:  # noqa: ANN401 (theirs)
        self.loader, self.rank, self.world_size = loader, rank, world_size
        self.epoch = self.batches = 0
        self._holder = holder
        self._finished = False  # the epoch: asked again, a loader would begin anew
        self._begun = False  # whether the holder is read since the epoch began or was loaded
        self._loaded: Any = None  # the state it was given and has not yet gone on from
        self._live: Iterator[Any] = iter(())
        self._guard = ExitGuard(self)
        self._closed = 0  # how often: an iteration from before the last time has ended

    def __len__(self) -> int:
        """Batches of a whole epoch.

        Raises:
            TypeError: it does not know.
        """
        return len(self.loader)

    @property
    def batches_left(self) -> int | None:
        """Batches of the epoch that are still to come; None: it does not know."""
        whole = length_of(self.loader)
        if whole is None:
            return None
        return 0 if self._finished else max(0, whole - self.batches)

    def __iter__(self) -> Iterator[Any]:
        if self._finished:
            return
        self.close()
        with signals_blocked(), preserved_rng():
            self._live = iter(self.loader)
        self._guard.arm()
        self._begun, self._loaded = True, None
        mine = self._closed
        while mine == self._closed:
            # No local name holds their iterator: `close` must free it while this one waits.
            batch = next(self._live, _END)
            if batch is _END:
                self._finished = True
                return
            self.batches += 1
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Tell whatever wants to know of the epoch; another than the current one begins anew."""
        parts = (
            getattr(self.loader, name, None) for name in ("sampler", "batch_sampler", "dataset")
        )
        for part in (self.loader, *parts):
            tell = getattr(part, "set_epoch", None)
            if callable(tell):
                tell(epoch)
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, 0
            self._finished = self._begun = False

    def state_dict(self) -> dict[str, Any]:
        """Where it stands. Before an epoch's first batch there is no state of the holder's."""
        mine = {
            "epoch": self.epoch,
            "batches": self.batches,
            "finished": self._finished,
            "state": self._holder.state_dict() if self._begun else self._loaded,
        }
        return {"world_size": self.world_size, "of_rank": {str(self.rank): mine}}

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """Refuse a state that is not of this rank among as many.

        Raises:
            ConfigError: another number of ranks saved it, or this rank did not.
        """
        saved = count_in(state_dict, "world_size")
        what = f"a {type(self._holder).__name__}"
        if saved != self.world_size:
            raise ConfigError(
                field="train_dataloader",
                why=f"{what} was saved by {saved} ranks and is loaded by {self.world_size}: each "
                "rank's position in the data is its own, and cannot be dealt to other ranks",
                help=f"Resume on {saved} ranks; or start the epoch again: declare the dataset "
                'component with on_world_size_change="skip" (docs/data.md)',
            )
        if str(self.rank) not in state_dict["of_rank"]:
            raise ConfigError(
                field="train_dataloader",
                why=f"{what} has no position of rank {self.rank} in the checkpoint",
                help="Declare the dataset component PER_RANK: each rank has a position of its own",
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the saved loader stood, from the next `iter()` on.

        Raises:
            ConfigError: as `check_state` says.
        """
        self.check_state(state_dict)
        mine = state_dict["of_rank"][str(self.rank)]
        self.epoch, self.batches = (count_in(mine, name) for name in ("epoch", "batches"))
        self._finished = bool(mine["finished"])
        if mine["state"] is not None:
            self._load(mine["state"])

    def close(self) -> None:
        """End the iteration under way and its worker processes; the next one goes on there."""
        self._closed += 1
        self._guard.disarm()
        self._live = iter(())
        if self._begun:  # a loader that is given a state lets go of its iterator
            self._load(self._holder.state_dict())

    def _load(self, state: object) -> None:
        self._holder.load_state_dict(state)
        self._begun, self._loaded = False, state


def length_of(loader: object) -> int | None:
    """Batches of a whole epoch; None: a stream, which does not know."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # what torch's DataLoader raises over a dataset without a length
        return None


def _is_a(thing: object, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(thing, kind)
