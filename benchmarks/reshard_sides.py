"""The state of reshard.py, in DTensors over all ranks, and its two sides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from blake3 import blake3
from sides import CkptcoordSide, DcpSide, Job, Side, bytes_of
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ckptcoord.store.files import LocalReader

if TYPE_CHECKING:
    from pathlib import Path

OURS, DCP = CkptcoordSide.name, DcpSide.name
LAYERS, COLUMNS = 16, 1024
SCALARS = {"step": 1000, "lr": 3e-4}

Span = tuple[int, int]


# --- the state ------------------------------------------------------------------------------------


def make_state(size_bytes: int) -> dict[str, object]:
    """Fp32 weights and two moments of them, of so many bytes together, and scalars.

    Of each layer half is sharded evenly by rows, a quarter unevenly, and a quarter by columns;
    what is replicated is small.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = size_bytes // (3 * LAYERS * 4 * COLUMNS)
    forms: dict[str, tuple[tuple[int, ...], Shard | Replicate]] = {
        "attention.weight": ((rows // 2, COLUMNS), Shard(0)),
        "expert.weight": ((rows // 4 - 1 | 1, COLUMNS), Shard(0)),
        "projection.weight": ((rows // 4, COLUMNS), Shard(1)),
        "projection.bias": ((COLUMNS - 1,), Shard(0)),
        "norm.weight": ((COLUMNS,), Replicate()),
    }
    parts = {}
    for seed, part in enumerate(("weights", "exp_avg", "exp_avg_sq")):
        own = torch.Generator().manual_seed(seed * mesh.size() + mesh.get_rank())
        alike = torch.Generator().manual_seed(seed)
        parts[part] = {
            f"layers.{layer}.{name}": _random(
                mesh, shape, placement, alike if placement.is_replicate() else own
            )
            for layer in range(LAYERS)
            for name, (shape, placement) in forms.items()
        }
    return {**parts, **SCALARS}


def _random(
    mesh: DeviceMesh,
    shape: tuple[int, ...],
    placement: Shard | Replicate,
    generator: torch.Generator,
) -> DTensor:
    size, _ = compute_local_shape_and_global_offset(shape, mesh, [placement])
    return DTensor.from_local(
        torch.rand(size, generator=generator),
        mesh,
        [placement],
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )


def tensors_of(state: dict[str, object]) -> dict[str, DTensor]:
    """The tensors of a state, by name."""
    return {
        f"{part}.{name}": tensor
        for part, members in state.items()
        if isinstance(members, dict)
        for name, tensor in members.items()
    }


def held_bytes(state: dict[str, object]) -> int:
    """What this rank holds of it."""
    return sum(tensor.to_local().nbytes for tensor in tensors_of(state).values())


def blank(state: dict[str, object]) -> None:
    """Zero all of it, in place."""
    for tensor in tensors_of(state).values():
        tensor.to_local().zero_()
    state |= dict.fromkeys(SCALARS, 0)


def content_of(state: dict[str, object]) -> dict[str, object]:
    """The scalars, and BLAKE3 digests of the full tensors; collective, and empty but on rank 0."""
    content: dict[str, object] = {name: state[name] for name in SCALARS}
    for name, tensor in tensors_of(state).items():
        full = tensor.full_tensor()
        if dist.get_rank() == 0:
            content[name] = blake3(bytes_of(full)).hexdigest()
    return content if dist.get_rank() == 0 else {}


# --- the sides ------------------------------------------------------------------------------------


class KeptDcpSide(DcpSide):
    """DCP that loads, before it has saved, what a job before it saved last."""

    def files(self) -> Path:
        """The folder of the last save."""
        if self._number:
            return super().files()
        (last,) = self._job.folder.glob(f"{self.name}-*")
        return last


class ReadOnceSide(CkptcoordSide):
    """ckptcoord that sends what several ranks want from the one that reads it to the others."""

    def load(self, live: dict[str, object]) -> None:
        """As `CkptcoordSide` does, but for that."""
        assert live
        self._coordinator.load_checkpoint(read_once=True)


def make_side(name: str, job: Job, state: dict[str, object]) -> Side:
    """The side of that name."""
    if name == DCP:
        return KeptDcpSide(job)
    side = CkptcoordSide if name == OURS else ReadOnceSide
    return side(job, state, groups={"all": dist.group.WORLD})


# --- bytes ----------------------------------------------------------------------------------------


class CountingReader:
    """From here on, what this process reads of ckptcoord's files.

    Attributes:
        spans: file by file, the ranges that were read.
    """

    def __init__(self) -> None:
        self.spans: dict[str, set[Span]] = {}
        fill = LocalReader._fill  # noqa: SLF001 (all of its reads come through here)

        def counted(reader: LocalReader, offset: int, rest: memoryview) -> None:
            self.spans.setdefault(reader._path, set()).add((offset, offset + rest.nbytes))  # noqa: SLF001 (as above)
            fill(reader, offset, rest)

        LocalReader._fill = counted  # type: ignore[method-assign]  # noqa: SLF001 (as above)


def united_bytes(ranks: list[dict[str, set[Span]]]) -> int:
    """How many bytes the ranks read of all files, each byte counted once."""
    files: dict[str, set[Span]] = {}
    for spans in ranks:
        for path, found in spans.items():
            files.setdefault(path, set()).update(found)
    total = 0
    for found in files.values():
        end = 0
        for start, stop in sorted(found):
            total += max(0, stop - max(start, end))
            end = max(end, stop)
    return total
