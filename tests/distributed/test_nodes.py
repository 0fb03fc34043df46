"""Each real torchrun agent is a node, on one machine too."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack

import pytest
from tests.distributed import node_program
from tests.distributed.launch import Torchrun
from tests.distributed.program import TIMEOUT_S, said

from ckptcoord import open_repository
from ckptcoord.repo.verify import verify_checkpoint

pytestmark = pytest.mark.dist


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def agents(function, folder, nodes, **settings):
    """A job with an agent for each of `nodes`, which say how many ranks each has."""
    folder.mkdir()
    together = [
        *(f"--nnodes={len(nodes)}", "--rdzv-backend=c10d", "--local-addr=127.0.0.1"),
        *(f"--rdzv-endpoint=127.0.0.1:{free_port()}", f"--rdzv-id={folder.name}"),
    ]
    job = f"{function.__module__}:{function.__name__}"
    program = ["-m", "tests.distributed.program", job, str(folder), json.dumps(settings)]
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                Torchrun(
                    [*together, f"--nproc_per_node={ranks}", *program],
                    folder / f"agent{number}.log",
                    warm=True,
                    GLOO_SOCKET_IFNAME="lo",
                )
            )
            for number, ranks in enumerate(nodes)
        ]
        for agent in started:
            agent.succeed(TIMEOUT_S)


WAYS = {
    "table": ["table", "refuse"],
    "refuse": ["cache", "refuse"],
    "skip": ["cache", "skip"],
    "own": ["cache", "own"],
    "ranks": ["own", "refuse"],
}


def loaded(folder, repository, nodes):
    """What each rank of a job on such nodes has after these loads."""
    agents(node_program.load, folder, nodes, repository=str(repository), ways=WAYS)
    return said(folder, "found", sum(nodes))


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    """What a job on two nodes of two ranks has saved, and where its ranks were."""
    folder = tmp_path_factory.mktemp("nodes")
    agents(node_program.save, folder / "saver", [2, 2], repository=str(folder / "run"))
    return folder / "run", said(folder / "saver", "place", 4)


@pytest.fixture(scope="module")
def on_one(two_nodes, tmp_path_factory):
    """The same, loaded on one node."""
    repository, _ = two_nodes
    return loaded(tmp_path_factory.mktemp("one") / "loader", repository, [4])


def test_per_node_state_is_written_once_a_node_by_its_first_rank(two_nodes):
    path, places = two_nodes
    places = sorted(places, key=lambda place: place["local_rank"])
    members = tuple(tuple(one["rank"] for one in places if one["node"] == node) for node in (0, 1))
    assert [len(ranks) for ranks in members] == [2, 2]
    repository = open_repository(path)
    commit = repository.resolve("latest")
    manifest = repository.manifest(commit)
    assert manifest.topology.to_topology().nodes == members
    shards = sorted(
        (record.scope, record.writer_rank)
        for record in manifest.files
        if record.component == "cache" and record.path.endswith(".safetensors")
    )
    assert shards == [("node00000", members[0][0]), ("node00001", members[1][0])]
    assert verify_checkpoint(repository, commit).ok


def test_all_ranks_of_a_node_read_its_copy_whatever_is_declared_for_other_nodes(
    two_nodes, tmp_path
):
    for rank, found in enumerate(loaded(tmp_path / "loader", two_nodes[0], [2, 2])):
        for way in ("refuse", "skip", "own"):
            assert found[way]["x"] == [100.0 + found["node"]]
            assert not found[way]["skipped"]
        assert found["ranks"]["x"] == [rank]


def test_two_nodes_load_on_one_where_their_copies_are_alike_and_else_are_refused_by_name(on_one):
    for rank, found in enumerate(on_one):
        assert found["table"]["x"] == [7.0]
        assert "its copies differ at cache.x" in found["refuse"]["error"]
        assert found["refuse"]["x"] == [-1.0]
        assert "its copies differ at cache.x" in found["skip"]["skipped"]["cache"]
        assert found["skip"]["x"] == [-1.0]
        assert found["ranks"]["x"] == [rank]


def test_a_node_that_was_there_loads_its_own(on_one):
    for found in on_one:
        assert found["own"]["x"] == [100.0]
        assert not found["own"]["derived"]


def test_one_node_loads_on_two_of_other_sizes(tmp_path):
    agents(node_program.save, tmp_path / "saver", [4], repository=str(tmp_path / "run"))
    places = said(tmp_path / "saver", "place", 4)
    assert {place["node"] for place in places} == {0}
    for rank, found in enumerate(loaded(tmp_path / "loader", tmp_path / "run", [1, 3])):
        for way in ("refuse", "skip"):
            assert found[way] == {"error": None, "skipped": {}, "x": [100.0], "derived": []}
        assert found["table"]["x"] == [7.0]
        assert found["ranks"]["x"] == [rank]
