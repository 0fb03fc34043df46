"""The sides of save_load.py: ckptcoord, its peers, and the raw work that no one can do without.

A side saves or loads one and the same state, on every rank. A save returns when all that it wrote
is durable: files and folders synced. The peers get their syncs from `sync_tree`.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_WRITE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One rank of a job, and where it may write.

    Attributes:
        threads: how many a rank may use to write, read and hash; the same for every side.
    """

    rank: int
    size: int
    threads: int
    folder: Path


class Side(Protocol):
    """One way to save and load."""

    def save(self, state: dict[str, object]) -> None:
        """Save durably into a place of its own."""
        ...

    def load(self, live: dict[str, object]) -> None:
        """Load what was saved last into the tensors of `live`."""
        ...

    def files(self) -> Path:
        """The folder that holds all the bytes of the last save."""
        ...

    def close(self) -> None:
        """End what runs for it."""
        ...


def make_state(size_bytes: int, *, seed: int, layers: int = 64) -> dict[str, object]:
    """Fp32 tensors of equal size, one a layer, small ones beside them, and scalars."""
    generator = torch.Generator().manual_seed(seed)
    large, columns = size_bytes // layers, 1024
    rows = max(1, large // (4 * columns))
    tensors: dict[str, object] = {}
    for layer in range(layers):
        tensors[f"h.{layer}.weight"] = torch.rand(rows, columns, generator=generator)
        tensors[f"h.{layer}.bias"] = torch.rand(columns, generator=generator)
    return {"model": tensors, "step": 1000, "lr": 3e-4, "name": "gpt", "betas": (0.9, 0.95)}


def tensors_of(state: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """The tensors of a state, by name."""
    model = state["model"]
    assert isinstance(model, dict)
    return model


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's memory."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def sync_tree(folder: Path) -> None:
    """Make every file below a folder durable, and its name, and the folder's own name."""
    for below, _, files in os.walk(folder):
        for name in [*files, "."]:
            sync(Path(below) / name)
    sync(folder.parent)


def read_all(folder: Path) -> None:
    """Have every byte below a folder in the page cache."""
    buffer = bytearray(_WRITE_BYTES)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def drop_cached(folder: Path) -> None:
    """Have no byte below a folder in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # what is not yet on the disk cannot be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def peak_memory(work: Callable[[], None]) -> int:
    """The most resident bytes that this process has during `work`, beyond those it has before."""
    Path("/proc/self/clear_refs").write_text("5")  # from here the peak counts anew
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {field} in /proc/self/status")


def sync(path: Path) -> None:
    """Make a file's bytes or a folder's names durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _InFolders:
    """Each save goes to a new folder `<name>-<n>`."""

    name = ""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._number = 0

    def files(self) -> Path:
        """The folder of the last save."""
        return self._job.folder / f"{self.name}-{self._number}"

    def close(self) -> None:
        """Nothing runs for it."""

    def _next(self) -> Path:
        self._number += 1
        folder = self.files()
        folder.mkdir(exist_ok=True)
        return folder


class RawSide(_InFolders):
    """The same bytes by pwrite and one fsync, a share a rank; read back without any check."""

    name = "raw"

    def save(self, state: dict[str, object]) -> None:
        """Write this rank's share into one file."""
        path = self._next() / f"{self._job.rank}.bin"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            offset = 0
            for tensor in list(tensors_of(state).values())[self._job.rank :: self._job.size]:
                data = bytes_of(tensor)
                for start in range(0, data.nbytes, _WRITE_BYTES):
                    offset += os.pwrite(descriptor, data[start : start + _WRITE_BYTES], offset)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync(path.parent)
        sync(path.parent.parent)

    def load(self, live: dict[str, object]) -> None:
        """Nobody loads from it."""
        raise AssertionError(f"{self.name} is for saving {len(live)} entries only")


class TorchSide(_InFolders):
    """torch.save by rank 0; torch.load by every rank."""

    name = "torch.save"

    def save(self, state: dict[str, object]) -> None:
        """The other ranks wait at the barrier that follows."""
        folder = self._next()
        if self._job.rank == 0:
            torch.save(state, folder / "state.pt")
            sync_tree(folder)

    def load(self, live: dict[str, object]) -> None:
        """Load beside, then copy."""
        path = self.files() / "state.pt"
        loaded = torch.load(path, weights_only=True)
        for name, tensor in tensors_of(live).items():
            tensor.copy_(loaded["model"][name])


class SafetensorsSide(_InFolders):
    """safetensors' save_file by rank 0; every rank loads, copies and checks BLAKE3 digests."""

    name = "safetensors"

    def __init__(self, job: Job, digests: Mapping[str, bytes]) -> None:
        super().__init__(job)
        self._digests = digests

    def save(self, state: dict[str, object]) -> None:
        """The tensors only: it has no place for the scalars."""
        from safetensors.torch import save_file

        folder = self._next()
        if self._job.rank == 0:
            save_file(tensors_of(state), folder / "model.safetensors")
            sync_tree(folder)

    def load(self, live: dict[str, object]) -> None:
        """Load, copy, and digest what arrived in the live tensors."""
        from safetensors.torch import load_file

        path = self.files() / "model.safetensors"
        loaded = load_file(path)
        for name, tensor in tensors_of(live).items():
            tensor.copy_(loaded[name])
            found = blake3(bytes_of(tensor), max_threads=self._job.threads).digest()
            if found != self._digests[name]:
                raise ValueError(f"{path}: {name} is corrupt")


class DcpSide(_InFolders):
    """torch.distributed.checkpoint: replicated tensors, each written by one rank."""

    name = "dcp"

    def save(self, state: dict[str, object]) -> None:
        """Its writer syncs its files; the folder and the metadata are synced here."""
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        folder = self._next()
        writer = FileSystemWriter(folder, thread_count=self._job.threads)
        save(state, storage_writer=writer, no_dist=self._job.size == 1)
        if self._job.rank == 0:
            sync_tree(folder)

    def load(self, live: dict[str, object]) -> None:
        """In place, as it does."""
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        reader = FileSystemReader(self.files())
        load(live, storage_reader=reader, no_dist=self._job.size == 1)


class CkptcoordSide:
    """ckptcoord: one component, striped over the ranks, digests on every byte.

    It is REPLICATED; or, given a group by its name, PER_GROUP.
    """

    name = "ckptcoord"

    def __init__(
        self, job: Job, state: dict[str, object], *, groups: Mapping[str, object] | None = None
    ) -> None:
        from ckptcoord import CheckpointCoordinator, CoordinatorConfig
        from ckptcoord.core.sharing import SharingPattern, StateComponent

        component = StateComponent(
            key="state",
            stateful=state,
            sharing_pattern=SharingPattern.PER_GROUP if groups else SharingPattern.REPLICATED,
            process_group_name=next(iter(groups)) if groups else None,
        )
        self._coordinator = CheckpointCoordinator(
            [component],
            groups,
            output_dir=job.folder / self.name,
            config=CoordinatorConfig(io_threads=job.threads),
        )
        self._steps = itertools.count(1)
        self._saved = ""

    def save(self, state: dict[str, object]) -> None:
        """One checkpoint, committed."""
        assert state
        self._saved = self._coordinator.save_checkpoint(step=next(self._steps))

    def load(self, live: dict[str, object]) -> None:
        """Into the state that it was made with."""
        assert live
        self._coordinator.load_checkpoint()

    def files(self) -> Path:
        """The checkpoint's folder."""
        return Path(self._saved)

    def close(self) -> None:
        """End what runs for it."""
        self._coordinator.close()


def digests_of(state: Mapping[str, object]) -> dict[str, bytes]:
    """The BLAKE3 digests of a state's tensors."""
    return {name: blake3(bytes_of(tensor)).digest() for name, tensor in tensors_of(state).items()}


def make_side(name: str, job: Job, state: dict[str, object], digests: Mapping[str, bytes]) -> Side:
    """The side of that name."""
    if name == SafetensorsSide.name:
        return SafetensorsSide(job, digests)
    if name == CkptcoordSide.name:
        return CkptcoordSide(job, state)
    return {side.name: side for side in (RawSide, TorchSide, DcpSide)}[name](job)
