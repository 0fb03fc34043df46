"""Two real torchrun agents are two nodes, on one machine too."""

from __future__ import annotations

import json
import socket

import pytest
from tests.distributed.launch import ROOT, Torchrun

from ckptcoord import open_repository
from ckptcoord.repo.verify import verify_checkpoint

pytestmark = pytest.mark.dist
PROGRAM = str(ROOT / "tests" / "distributed" / "node_program.py")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_per_node_state_is_written_once_a_node_by_its_first_rank_and_read_by_all_of_it(tmp_path):
    repo = tmp_path / "run"
    options = [
        *("--nnodes=2", "--nproc_per_node=2", "--rdzv-backend=c10d", "--local-addr=127.0.0.1"),
        *(f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=two-nodes"),
        *(PROGRAM, str(repo), str(tmp_path)),
    ]
    with (
        Torchrun(options, tmp_path / "agent0.log", GLOO_SOCKET_IFNAME="lo") as first,
        Torchrun(options, tmp_path / "agent1.log", GLOO_SOCKET_IFNAME="lo") as second,
    ):
        first.succeed(120)
        second.succeed(60)
    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    nodes = {answer["node"] for answer in answers}
    assert nodes == {0, 1}
    for answer in answers:
        assert answer["cache"] == [100.0 + answer["node"]]
        assert answer["own"] == [float(answer["rank"])]

    repository = open_repository(repo)
    commit = repository.resolve("latest")
    manifest = repository.manifest(commit)
    members = tuple(
        tuple(a["rank"] for a in sorted(answers, key=lambda a: a["local_rank"]) if a["node"] == n)
        for n in (0, 1)
    )
    assert manifest.topology.to_topology().nodes == members
    shards = [
        (record.path, record.writer_rank)
        for record in manifest.files
        if record.component == "cache" and record.path.endswith(".safetensors")
    ]
    assert sorted(writer for _, writer in shards) == sorted(ranks[0] for ranks in members)
    assert all(f".node{node:05}" in path for node, (path, _) in enumerate(sorted(shards)))
    assert verify_checkpoint(repository, commit).ok
