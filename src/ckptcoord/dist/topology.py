"""Nodes and process groups, put together from what each rank knows of itself."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch.distributed as c10d

from ckptcoord.core.topology import GroupLayout, Topology
from ckptcoord.dist.messages import as_dict, as_int, as_list
from ckptcoord.dist.session import heard
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.dist.deadline import Deadline
    from ckptcoord.dist.world import World


def agree_on_topology(
    world: World, process_groups: Mapping[str, object], deadline: Deadline
) -> Topology:
    """What every rank knows of itself, put together: nodes and group instances.

    Raises:
        ConfigError: the launcher's variables or the groups contradict one another.
    """
    mine = heard(lambda: _own_facts(process_groups))
    decision = as_dict(world.agree("topology", mine, _merge_topology, deadline=deadline))
    return _topology_from(decision)


def _own_facts(process_groups: Mapping[str, object]) -> JsonValue:
    groups: JsonValue = {name: _ranks_of(name, group) for name, group in process_groups.items()}
    return {**_node_facts(), "groups": groups}


def _node_facts() -> dict[str, JsonValue]:
    environ = os.environ  # noqa: TID251 (torchrun tells through the environment)
    # GROUP_RANK and LOCAL_RANK are torchrun's; without them, a node is a host name.
    return {
        "node": environ.get("GROUP_RANK", ""),
        "host": socket.gethostname(),
        "local_rank": environ.get("LOCAL_RANK", ""),
        "local_world_size": environ.get("LOCAL_WORLD_SIZE", ""),
    }


def _ranks_of(name: str, group: object) -> list[JsonValue]:
    """The global ranks of this rank's instance of a group; empty when it is in none."""
    if group is None or group is c10d.GroupMember.NON_GROUP_MEMBER:
        return []
    if isinstance(group, c10d.ProcessGroup):
        return [*sorted(c10d.get_process_group_ranks(group))]
    if isinstance(group, Sequence) and not isinstance(group, str | bytes):
        ranks = [rank for rank in group if isinstance(rank, int)]
        if len(ranks) == len(group):
            return [*sorted(ranks)]
    raise ConfigError(
        field=f"process_groups[{name!r}]",
        why=f"is a {type(group).__name__}, neither a ProcessGroup nor a sequence of ranks",
    )


def _merge_topology(said: list[JsonValue]) -> JsonValue:
    facts = [as_dict(one) for one in said]
    by_node: dict[tuple[int, str], list[tuple[int, int]]] = {}
    groups: dict[str, set[tuple[int, ...]]] = {}
    for rank, one in enumerate(facts):
        node, local = str(one["node"]), str(one["local_rank"])
        # Two agents on one machine are two nodes; without an agent, a host name is a node.
        place = (int(node), "") if node.isdigit() else (0, str(one["host"]))
        by_node.setdefault(place, []).append((int(local) if local.isdigit() else rank, rank))
        for name, ranks in as_dict(one["groups"]).items():
            instances = groups.setdefault(name, set())
            if ranks:
                instances.add(tuple(as_int(r) for r in as_list(ranks)))
    for place, members in by_node.items():
        _check_node(place, members, facts)
    return {
        "nodes": [[rank for _, rank in sorted(by_node[place])] for place in sorted(by_node)],
        "groups": {
            name: [list(ranks) for ranks in sorted(groups[name])] for name in sorted(groups)
        },
    }


def _check_node(
    place: tuple[int, str], members: list[tuple[int, int]], facts: list[dict[str, JsonValue]]
) -> None:
    locals_seen = [local for local, _ in members]
    promised = {str(facts[rank]["local_world_size"]) for _, rank in members} - {""}
    if len(set(locals_seen)) != len(locals_seen) or promised - {str(len(members))}:
        raise ConfigError(
            field="LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK",
            why=f"node {place[0] if not place[1] else place[1]} has local ranks "
            f"{sorted(locals_seen)} where {', '.join(sorted(promised)) or '?'} were promised",
            help="Start the ranks with torchrun, or set these variables as torchrun does",
        )


def _topology_from(decision: dict[str, JsonValue]) -> Topology:
    return Topology(
        nodes=tuple(
            tuple(as_int(rank) for rank in as_list(node)) for node in as_list(decision["nodes"])
        ),
        groups=tuple(
            GroupLayout(
                name=name,
                instances=tuple(
                    tuple(as_int(rank) for rank in as_list(ranks)) for ranks in as_list(instances)
                ),
            )
            for name, instances in sorted(as_dict(decision["groups"]).items())
        ),
    )
