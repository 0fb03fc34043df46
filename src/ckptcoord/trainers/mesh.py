"""A mesh of ranks with named dimensions: data, tensor and pipeline parallelism together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ckptcoord.errors import ConfigError
from ckptcoord.trainers.ranks import TorchRanks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptcoord.trainers.ranks import Ranks

DIMENSIONS = ("dp", "pp", "tp")
MODEL = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This rank in one dimension of the mesh.

    Attributes:
        index: from 0.
        size: of the dimension.
        ranks: the global ranks that differ from this one in that dimension only, by index.
        group: theirs; None: alone.
        words: theirs for what is on the CPU; None: there is none, or nobody to talk to.
    """

    index: int = 0
    size: int = 1
    ranks: tuple[int, ...] = (0,)
    group: c10d.ProcessGroup | None = None
    words: c10d.ProcessGroup | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelMesh:
    """Where this rank stands.

    Attributes:
        device_mesh: torch's, of the dimensions as they were given.
        dp: works on other batches.
        pp: holds another stage.
        tp: holds other parts of the same tensors.
        model: `pp` and `tp` together: the ranks that hold one copy of the model.
        model_name: of that group among `groups`; "" where each rank holds the model whole.
        groups: by name, for components that are PER_GROUP.
    """

    device_mesh: DeviceMesh
    dp: Place
    pp: Place
    tp: Place
    model: Place
    model_name: str
    groups: Mapping[str, c10d.ProcessGroup]

    def lines(self, name: str) -> list[list[int]]:
        """The ranks of every instance of a dimension."""
        return _instances(self.device_mesh, name)


def make_mesh(device_type: str, shape: Mapping[str, int], world_size: int) -> ParallelMesh:
    """Lay all ranks out, the last dimension the fastest. Collective.

    Raises:
        ConfigError: unknown dimensions, or their product is not the number of ranks.
    """
    check_shape(shape, world_size)
    names = tuple(shape)
    device_mesh = init_device_mesh(device_type, tuple(shape.values()), mesh_dim_names=names)
    groups = {name: device_mesh.get_group(name) for name in names}
    parts = [name for name in names if name != "dp"]
    model_name = MODEL if len(parts) > 1 else "".join(parts)
    if len(parts) > 1:
        groups[MODEL] = _model_group(_instances(device_mesh, MODEL))
    places = {name: _place(group, _instances(device_mesh, name)) for name, group in groups.items()}
    alone = Place(ranks=(c10d.get_rank(),))
    return ParallelMesh(
        device_mesh=device_mesh,
        **{name: places.get(name, alone) for name in DIMENSIONS},
        model=places.get(model_name, alone),
        model_name=model_name,
        groups=groups,
    )


def whole_job(ranks: Ranks) -> Place:
    """All ranks as one dimension."""
    if not isinstance(ranks, TorchRanks):
        return Place()
    group = c10d.group.WORLD
    return Place(
        index=ranks.rank,
        size=ranks.size,
        ranks=tuple(range(ranks.size)),
        group=group,
        words=ranks.group or group,
    )


def check_shape(shape: Mapping[str, int], world_size: int) -> None:
    """Refuse a mesh that these ranks cannot fill.

    Raises:
        ConfigError: says why.
    """
    unknown = sorted(set(shape) - set(DIMENSIONS))
    why = ""
    if unknown:
        why = f"has the dimensions {', '.join(unknown)}, and there are {', '.join(DIMENSIONS)}"
    elif any(size < 1 for size in shape.values()) or math.prod(shape.values()) != world_size:
        sizes = " x ".join(f"{name} {size}" for name, size in shape.items())
        why = f"is {sizes or 'empty'}, and there are {world_size} ranks"
    if why:
        raise ConfigError(
            field="mesh_shape", why=why, help='Give sizes whose product it is: {"dp": 2, "tp": 2}'
        )


def _place(group: c10d.ProcessGroup, instances: list[list[int]]) -> Place:
    words = group
    if c10d.get_backend(group) != "gloo":
        words, _ = c10d.new_subgroups_by_enumeration(instances, backend="gloo")  # type: ignore[no-untyped-call]
    ranks = tuple(c10d.get_process_group_ranks(group))
    index = ranks.index(c10d.get_rank())
    return Place(index=index, size=len(ranks), ranks=ranks, group=group, words=words)


def _model_group(instances: list[list[int]]) -> c10d.ProcessGroup:
    own: c10d.ProcessGroup
    own, _ = c10d.new_subgroups_by_enumeration(instances)  # type: ignore[no-untyped-call]
    return own


def _instances(device_mesh: DeviceMesh, name: str) -> list[list[int]]:
    """The ranks of every instance of a group: a dimension's, or all but "dp"."""
    names, layout = device_mesh.mesh_dim_names or (), device_mesh.mesh
    if name != MODEL:
        size = layout.shape[names.index(name)]
        lines: list[list[int]] = layout.movedim(names.index(name), -1).reshape(-1, size).tolist()
        return lines
    copies = layout.movedim(names.index("dp"), 0) if "dp" in names else layout[None]
    parts: list[list[int]] = copies.flatten(1).tolist()
    return parts
