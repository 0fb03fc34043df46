"""Where ranks live and which groups they form; and the copies (scopes) that follow from it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from ckptcoord.errors import ConfigError

_GROUP_NAME = re.compile(r"[A-Za-z_][A-Za-z_-]{0,31}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLayout:
    """All instances of one named process group.

    Attributes:
        name: letters, `_`, `-`: it stands in file names before the instance's number.
        instances: the sorted global ranks of each instance, in ascending order.
    """

    name: str
    instances: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if _GROUP_NAME.fullmatch(self.name) is None or self.name in ("rank", "node"):
            raise ConfigError(
                field="process_groups",
                why=f"{self.name!r} cannot name a group",
                help="Use at most 32 letters, '_' or '-', and neither 'rank' nor 'node'",
            )
        if any(tuple(sorted(set(i))) != i for i in self.instances) or (
            tuple(sorted(self.instances)) != self.instances
        ):
            raise ConfigError(
                field=f"process_groups[{self.name!r}]",
                why=f"its instances are not sorted sets of ranks: {self.instances}",
            )
        members = [rank for instance in self.instances for rank in instance]
        if len(set(members)) != len(members) or () in self.instances:
            raise ConfigError(
                field=f"process_groups[{self.name!r}]",
                why=f"its instances share a rank, or one is empty: {self.instances}",
                help="Pass on each rank the one group that it is a member of",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The ranks of each node, in node order, and the named groups, sorted by name.

    Node order is torchrun's GROUP_RANK; within a node, ranks are in LOCAL_RANK order.
    """

    nodes: tuple[tuple[int, ...], ...]
    groups: tuple[GroupLayout, ...] = ()

    def __post_init__(self) -> None:
        ranks = sorted(rank for node in self.nodes for rank in node)
        if ranks != list(range(len(ranks))) or not ranks:
            raise ConfigError(
                field="topology",
                why=f"nodes {self.nodes} do not hold each rank from 0 once",
                help="Check LOCAL_RANK, LOCAL_WORLD_SIZE and GROUP_RANK on every rank",
            )
        for group in self.groups:
            outside = [r for i in group.instances for r in i if not 0 <= r < len(ranks)]
            if outside:
                raise ConfigError(
                    field=f"process_groups[{group.name!r}]",
                    why=f"ranks {outside} are not in a world of {len(ranks)}",
                )

    @classmethod
    def single_node(cls, world_size: int, groups: tuple[GroupLayout, ...] = ()) -> Topology:
        """All ranks on one node."""
        return cls(nodes=(tuple(range(world_size)),), groups=groups)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return sum(len(node) for node in self.nodes)

    def group(self, name: str) -> GroupLayout | None:
        """The group of that name, if there is one."""
        return next((group for group in self.groups if group.name == name), None)


class ScopeKind(StrEnum):
    """What one copy of a component belongs to."""

    JOB = "job"
    RANK = "rank"
    NODE = "node"
    GROUP = "group"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """One copy of a component: who may write it and who reads it.

    Attributes:
        kind: what it belongs to.
        index: the rank, the node, or the instance's position among its group's instances.
        group_name: for GROUP.
        writers: the ranks that hold it (sorted); the work of writing is striped over them.
        readers: the ranks that load it (sorted).
    """

    kind: ScopeKind
    index: int
    group_name: str | None = None
    writers: tuple[int, ...]
    readers: tuple[int, ...]

    @property
    def label(self) -> str:
        """What stands in file names: `` (empty), `rank00002`, `node00001`, `tp00000`."""
        if self.kind is ScopeKind.JOB:
            return ""
        prefix = self.group_name if self.kind is ScopeKind.GROUP else self.kind.value
        return f"{prefix}{self.index:05d}"
