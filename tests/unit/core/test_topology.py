"""Where ranks live: a topology holds each rank once, and groups name ranks that exist."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.core.topology import GroupLayout, Scope, ScopeKind, Topology
from ckptcoord.errors import ConfigError


@st.composite
def node_lists(draw):
    ranks = draw(st.permutations(range(draw(st.integers(1, 24)))))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(ranks) - 1)), max_size=4)))
    edges = [0, *(cut for cut in cuts if cut < len(ranks)), len(ranks)]
    return tuple(tuple(ranks[a:b]) for a, b in itertools.pairwise(edges))


@given(node_lists())
@settings(max_examples=100)
def test_any_split_of_all_ranks_over_nodes_is_a_topology(nodes):
    topology = Topology(nodes=nodes)
    assert topology.world_size == sum(map(len, nodes))
    assert topology.nodes == nodes


@pytest.mark.parametrize(
    "nodes", [(), ((),), ((0, 0),), ((1,),), ((0, 2),), ((0,), (0, 1)), ((-1, 0),), ((0, 1), (3,))]
)
def test_nodes_that_do_not_hold_each_rank_once_are_refused(nodes):
    with pytest.raises(ConfigError, match="do not hold each rank from 0 once") as caught:
        Topology(nodes=nodes)
    assert "LOCAL_RANK" in caught.value.help


def test_a_single_node_holds_all_ranks():
    assert Topology.single_node(3) == Topology(nodes=((0, 1, 2),))


def test_groups_are_found_by_name():
    group = GroupLayout(name="tp", instances=((0, 1), (2, 3)))
    topology = Topology.single_node(4, (group,))
    assert topology.group("tp") is group
    assert topology.group("dp") is None


@pytest.mark.parametrize(
    "name", ["", "rank", "node", "tp0", "a b", "a/b", "..", "-x", "x" * 33, "é"]
)
def test_a_groups_name_must_stand_before_a_number_in_a_file_name(name):
    with pytest.raises(ConfigError, match="cannot name a group"):
        GroupLayout(name=name, instances=())


@pytest.mark.parametrize(
    "instances", [((1, 0),), ((0, 0),), ((2, 3), (0, 1)), ((0, 1), (1, 2)), ((),), ((), (0,))]
)
def test_instances_are_disjoint_sorted_sets(instances):
    with pytest.raises(ConfigError, match="process_groups"):
        GroupLayout(name="tp", instances=instances)


@pytest.mark.parametrize("instances", [((0, 4),), ((-1, 0),)])
def test_a_group_of_ranks_beyond_the_world_is_refused(instances):
    group = GroupLayout(name="tp", instances=instances)
    with pytest.raises(ConfigError, match="are not in a world of 4"):
        Topology.single_node(4, (group,))


@pytest.mark.parametrize(
    ("kind", "group", "label"),
    [
        (ScopeKind.JOB, None, ""),
        (ScopeKind.RANK, None, "rank00002"),
        (ScopeKind.NODE, None, "node00002"),
        (ScopeKind.GROUP, "tp", "tp00002"),
    ],
)
def test_a_scopes_label_is_what_stands_in_file_names(kind, group, label):
    scope = Scope(kind=kind, index=2, group_name=group, writers=(2,), readers=(2,))
    assert scope.label == label
