"""Saves that are deltas: what they cost, what they stand on, and that every one of them loads."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ckptcoord import (
    CheckpointCoordinator,
    Compression,
    CoordinatorConfig,
    SharingPattern,
    StateComponent,
)
from ckptcoord.core.lossy import CompressionLevel, Lossy
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.errors import ConfigError, DisagreementError, SaveAbortedError
from ckptcoord.plan.lineage import BaseChoice
from ckptcoord.repo import bases
from ckptcoord.repo.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

GLOBAL, REPLICATED, PER_RANK, PER_GROUP, PER_NODE = (
    SharingPattern.GLOBAL,
    SharingPattern.REPLICATED,
    SharingPattern.PER_RANK,
    SharingPattern.PER_GROUP,
    SharingPattern.PER_NODE,
)
AUTO = Compression(level=CompressionLevel.AUTO)
CHAIN = Compression(level=CompressionLevel.AUTO, base=BaseChoice.PREVIOUS, chain_below=1.0)
NEAR = Compression(
    level=CompressionLevel.AUTO,
    base=BaseChoice.PREVIOUS,
    lossy={"model": Lossy(update_fraction=0.1)},
)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Four matrices of 16 KiB."""
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(64, 64, generator=generator) for i in range(4)}


def train(state: dict[str, torch.Tensor], step: int) -> None:
    """A small step of all of it, the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    for value in state.values():
        value.add_(torch.randn(value.shape, generator=generator), alpha=1e-4)


def manifest(job: Any, step: int, branch: str = "") -> dict[str, Any]:
    name = f"checkpoint-{step}{branch and '@' + branch}"
    found: dict[str, Any] = json.loads(
        (job.output_dir / name / "checkpoint_manifest.json").read_text()
    )
    return found


def stored(job: Any, step: int, component: str = "model") -> int:
    found: int = manifest(job, step)["components"][component]["stored_bytes"]
    return found


def part(key: str, state: object, pattern: SharingPattern = REPLICATED) -> StateComponent:
    return StateComponent(key, state, pattern)


def copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def saving(steps: range, live: list[dict[str, torch.Tensor]], seen: dict[int, Any]) -> Callable:
    """Trains and saves; `seen` takes what rank 0 had at each step."""

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in steps:
            train(live[rank], step)
            coordinator.save_checkpoint(step=step)
            if rank == 0:
                seen[step] = copy(live[rank])

    return work


@pytest.mark.parametrize("rule", [AUTO, CHAIN], ids=["star", "chain"])
@pytest.mark.parametrize("size", [1, 3])
def test_every_delta_loads_as_it_was_saved(job, rule, size):
    live, seen = [weights() for _ in range(size)], {}
    work = saving(range(1, 6), live, seen)
    job.do(size, lambda r: [part("model", live[r])], work, compression=rule)
    kinds = [manifest(job, step)["kind"] for step in seen]
    assert kinds == ["anchor", "delta", "delta", "delta", "delta"]
    bases = [manifest(job, step)["base"] for step in seen]
    chained = [None, "main@1", "main@1", "main@3", "main@1"]
    assert bases == (chained if rule is CHAIN else [None, *4 * ["main@1"]])
    for step, want in seen.items():
        got = [{name: torch.zeros_like(v) for name, v in weights().items()} for _ in range(2)]
        job.do(
            2,
            lambda r, got=got: [part("model", got[r])],
            lambda coordinator, _, step=step: coordinator.load_checkpoint(f"main@{step}"),
        )
        assert all(equal(one, want) for one in got), step


def test_a_rule_goes_on_from_what_another_rule_made(job):
    live, seen, bases = [weights()], {}, []
    rules = [AUTO, AUTO, AUTO, CHAIN, CHAIN, CHAIN, CHAIN, AUTO, CHAIN]
    for step, rule in enumerate(rules, 1):
        work = saving(range(step, step + 1), live, seen)
        job.do(1, lambda r: [part("model", live[r])], work, compression=rule)
        bases.append(manifest(job, step)["base"])
    # At the places 1 and 2 a star; then a chain, whose places 3, 4, 5 and 6 go on from it; at 7 the
    # star again; at 8 the chain.
    assert bases == [None, *(f"main@{step}" for step in (1, 1, 3, 1, 5, 5, 1, 1))]
    for step, want in seen.items():
        got = {name: torch.zeros_like(v) for name, v in weights().items()}
        with CheckpointCoordinator([part("model", got)], output_dir=job.output_dir) as coordinator:
            coordinator.load_checkpoint(f"main@{step}")
        assert equal(got, want), step


def test_a_chain_says_all_that_it_needs(job):
    live, seen = [weights()], {}
    job.do(
        1, lambda r: [part("model", live[r])], saving(range(1, 5), live, seen), compression=CHAIN
    )
    assert manifest(job, 4)["lineage"]["needs"] == ["checkpoint-1", "checkpoint-3"]
    with CheckpointCoordinator([part("model", live[0])], output_dir=job.output_dir) as coordinator:
        commit = coordinator.repository.resolve("main@4")
    assert commit.needs == ("checkpoint-1", "checkpoint-3")


def test_what_has_not_changed_costs_a_line_and_no_bytes(job):
    live = [{**weights(), "frozen": torch.randn(512, 512)} for _ in range(2)]
    for one in live[1:]:
        one.update(copy(live[0]))

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        coordinator.save_checkpoint(step=1)
        coordinator.save_checkpoint(step=2)
        live[rank]["w0"][0, 0] += 1
        coordinator.save_checkpoint(step=3)

    job.do(2, lambda r: [part("model", live[r])], work, compression=AUTO)
    assert stored(job, 2) < 4096
    assert stored(job, 3) - stored(job, 2) < 1024


def test_a_process_that_starts_anew_finds_out_what_has_not_changed(job):
    live = weights()

    def one_save(step: int) -> None:
        job.do(
            1,
            lambda _: [part("model", live)],
            lambda coordinator, _: coordinator.save_checkpoint(step=step),
            compression=AUTO,
        )

    one_save(1)
    one_save(2)
    assert manifest(job, 2)["kind"] == "delta"
    assert stored(job, 2) < 2500


@pytest.mark.parametrize("size", [1, 3])
def test_a_process_that_starts_anew_names_what_its_parent_holds(job, size):
    live = [weights() for _ in range(size)]

    def saves(*changed: str, step: int) -> None:
        def work(coordinator: CheckpointCoordinator, rank: int) -> None:
            for at, name in enumerate(changed, step):
                if name:
                    live[rank][name].add_(1e-3 * weights(at)[name])
                coordinator.save_checkpoint(step=at)

        job.do(size, lambda r: [part("model", live[r])], work, compression=AUTO)

    saves("", step=1)
    saves("w0", step=2)
    saves("w1", step=3)  # each a process of its own, but for the last two
    saves("w2", "w2", step=4)
    assert {manifest(job, step)["base"] for step in (2, 3, 4, 5)} == {"main@1"}
    assert manifest(job, 5)["lineage"]["needs"] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    for step in (3, 4, 5):
        assert stored(job, step) < stored(job, 2) + 1500
    got = [weights() for _ in range(size)]
    job.do(size, lambda r: [part("model", got[r])], lambda c, _: c.load_checkpoint())
    assert all(equal(*pair) for pair in zip(got, live, strict=True))


def test_a_cast_of_a_wider_tensor_costs_no_bytes_on_whichever_rank_they_are(job):
    live = [weights() for _ in range(3)]
    narrow = [{name: v.bfloat16() for name, v in one.items()} for one in live]

    def declare(rank: int) -> list[StateComponent]:
        master = {"master": live[rank]}
        return [
            part("model", narrow[rank]),
            StateComponent("optimizer", master, REPLICATED, validate_replication=True),
        ]

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in (1, 2):
            train(live[rank], step)
            for name, value in live[rank].items():
                narrow[rank][name].copy_(value.bfloat16())
            coordinator.save_checkpoint(step=step)

    job.do(3, declare, work, compression=AUTO)
    assert stored(job, 2) < 3000
    got = {name: torch.zeros_like(value) for name, value in narrow[0].items()}
    master = {"master": {name: torch.zeros_like(value) for name, value in live[0].items()}}
    job.do(
        1,
        lambda _: [part("model", got), part("optimizer", master)],
        lambda coordinator, _: coordinator.load_checkpoint(),
    )
    assert equal(got, narrow[0])
    assert equal(master["master"], live[0])


def test_a_cast_is_found_among_tensors_that_begin_with_a_row_of_zeros(job):
    """As those of an embedding with padding and of its moments do."""
    names = ("exp_avg", "exp_avg_sq", "master")
    live = {name: weights(seed)["w0"].flatten() for seed, name in enumerate(names)}
    for value in live.values():
        value[:300] = 0
    narrow = {"w": live["master"].bfloat16()}

    def work(coordinator: CheckpointCoordinator, _: int) -> None:
        for step in (1, 2):
            for value in live.values():
                value.mul_(1 + step / 1000)
            narrow["w"].copy_(live["master"].bfloat16())
            coordinator.save_checkpoint(step=step)

    parts = [part("model", narrow), part("optimizer", live)]
    job.do(1, lambda _: parts, work, compression=AUTO)
    files = [file for file in manifest(job, 2)["files"] if file["component"] == "model"]
    assert sum(file["size_bytes"] for file in files) < 700
    got = {"w": torch.zeros_like(narrow["w"])}
    job.do(1, lambda _: [part("model", got), parts[1]], lambda c, _: c.load_checkpoint())
    assert equal(got, narrow)


def test_replicas_that_nobody_compared_are_never_the_source_of_another_ranks_cast(job):
    live = [{"m": torch.full((4000,), 1.0 + rank), "n": torch.zeros(4000)} for rank in range(2)]
    narrow = [{name: v.bfloat16() for name, v in one.items()} for one in live]

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in (1, 2):
            for name, value in live[rank].items():
                value.add_(1)
                narrow[rank][name].copy_(value.bfloat16())
            coordinator.save_checkpoint(step=step)

    components = lambda r: [part("model", narrow[r]), part("optimizer", live[r])]  # noqa: E731
    job.do(2, components, work, compression=AUTO)
    with CheckpointCoordinator(components(0), output_dir=job.output_dir) as coordinator:
        commit = coordinator.repository.resolve("main@2")
        assert verify_checkpoint(coordinator.repository, commit).ok


def test_bytes_that_are_stored_under_another_name_are_stored_once(job):
    live = weights()
    state = {"model": live, "ema": copy(live)}

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        coordinator.save_checkpoint(step=1)
        state["model"]["w0"], state["model"]["w1"] = live["w1"].clone(), live["w0"].clone()
        coordinator.save_checkpoint(step=2)

    job.do(1, lambda _: [part("model", state)], work, compression=AUTO)
    assert stored(job, 2) < 4500


def test_all_patterns_and_groups_with_different_members(job):
    groups = [(0, 1), (0, 1), (2, 3), (2, 3)]

    def declare(held: list[dict[str, Any]]) -> Callable[[int], list[StateComponent]]:
        return lambda rank: [
            part("model", held[rank]["model"]),
            part("job", held[rank]["job"], GLOBAL),
            part("rng", held[rank]["rng"], PER_RANK),
            part("cache", held[rank]["cache"], PER_NODE),
            StateComponent("stage", held[rank]["stage"], PER_GROUP, process_group_name="tp"),
        ]

    def make(fill: int) -> list[dict[str, Any]]:
        return [
            {
                "model": {name: value * fill for name, value in weights().items()},
                "job": {"n": fill, "t": torch.full((100,), fill)},
                "rng": {"state": torch.full((300,), rank * fill, dtype=torch.uint8)},
                "cache": {"hits": torch.full((50,), float(fill))},
                # Members of one instance hold different names.
                "stage": {f"layer{rank}": torch.full((64, 8), float(rank + fill))},
            }
            for rank in range(4)
        ]

    held = make(1)

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        coordinator.save_checkpoint(step=1)
        held[rank]["job"]["n"] = 2
        held[rank]["job"]["t"][3] = 9
        held[rank]["rng"]["state"][rank] += 1
        held[rank]["stage"][f"layer{rank}"][0] += 1
        coordinator.save_checkpoint(step=2)

    options = {"groups": lambda rank: {"tp": groups[rank]}, "compression": AUTO}
    job.do(4, declare(held), work, **options)
    assert manifest(job, 2)["kind"] == "delta"
    got = make(0)
    job.do(4, declare(got), lambda c, _: c.load_checkpoint(), **options)
    for rank in range(4):
        assert got[rank]["job"]["n"] == 2
        for key in ("model", "rng", "cache", "stage"):
            assert equal(got[rank][key], held[rank][key]), (rank, key)
        assert torch.equal(got[rank]["job"]["t"], held[0]["job"]["t"])


def test_the_first_save_of_a_branch_is_a_delta_against_where_it_was_forked(job):
    from ckptcoord.core.entries import Fork

    live, seen = [weights()], {}
    declare = lambda r: [part("model", live[r])]  # noqa: E731
    job.do(1, declare, saving(range(1, 4), live, seen), compression=AUTO)
    with CheckpointCoordinator(declare(0), output_dir=job.output_dir) as coordinator:
        fork = Fork(
            writer="0" * 32, branch=BranchName("exp"), source=CheckpointId(BranchName("main"), 3)
        )
        coordinator.repository.log.append(lambda _: fork)
    work = saving(range(4, 5), live, seen)
    job.do(1, declare, work, compression=AUTO, branch="exp")
    forked = manifest(job, 4, "exp")
    assert (forked["kind"], forked["parent"], forked["base"]) == ("delta", "main@3", "main@1")
    assert forked["components"]["model"]["stored_bytes"] < stored(job, 1)


def test_an_interval_and_the_costs_bring_new_anchors(job):
    live, seen = [weights()], {}
    every_3 = Compression(level=CompressionLevel.AUTO, reanchor_interval=3)
    work = saving(range(1, 8), live, seen)
    job.do(1, lambda r: [part("model", live[r])], work, compression=every_3)
    kinds = "".join(manifest(job, step)["kind"][0] for step in seen)
    assert kinds == "addadda"
    assert manifest(job, 4)["lineage"]["reason"] == "every 3 saves, as configured"


def test_noise_is_not_worth_a_delta(job):
    live = [{"w": torch.zeros(1000)}]

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in range(1, 5):
            live[0]["w"].copy_(torch.randint(0, 2**31, (1000,)).to(torch.int32).view(torch.float32))
            coordinator.save_checkpoint(step=step)

    job.do(1, lambda r: [part("model", live[r])], work, compression=AUTO)
    assert [manifest(job, step)["kind"] for step in range(1, 5)] == [
        "anchor",
        "delta",
        "anchor",
        "delta",
    ]


def test_a_save_whose_base_is_damaged_meanwhile_stands_alone(job, caplog):
    live = [weights() for _ in range(2)]
    declare = lambda r: [part("model", live[r])]  # noqa: E731
    shard = job.output_dir / "checkpoint-1" / "model-00002-of-00002.safetensors"

    def work(coordinator: CheckpointCoordinator, rank: int) -> str:
        coordinator.save_checkpoint(step=1)
        if rank == 0:
            shard.write_bytes(shard.read_bytes()[:-1])
        train(live[rank], 2)
        coordinator.save_checkpoint(step=2)
        return coordinator.load_checkpoint().checkpoint_id

    assert job.run(2, declare, work, compression=AUTO).values == 2 * ["checkpoint-2"]
    assert manifest(job, 2)["kind"] == "anchor"
    assert "cannot be its base" in manifest(job, 2)["lineage"]["reason"]
    assert caplog.text.count("saving checkpoint-2 again, as an anchor") == 1


def _missing(path: Path) -> None:
    path.unlink()


def _short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _other_header(path: Path) -> None:
    """JSON still, and of the same length: only its digest tells."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size]
    at = header.index(b'"shape"') - 3
    path.write_bytes(data[: 8 + at] + bytes([header[at] ^ 1]) + data[9 + at :])


@pytest.mark.parametrize("damage", [_missing, _short, _other_header])
def test_a_process_that_starts_anew_writes_an_anchor_where_its_base_is_damaged(job, damage, caplog):
    live, seen = [weights() for _ in range(2)], {}
    declare = lambda r: [part("model", live[r])]  # noqa: E731
    job.do(2, declare, saving(range(1, 3), live, seen), compression=AUTO)
    damage(job.output_dir / "checkpoint-1" / "model-00002-of-00002.safetensors")
    with caplog.at_level(logging.WARNING, "ckptcoord"):
        job.do(2, declare, saving(range(3, 5), live, seen), compression=AUTO)
    assert [manifest(job, step)["kind"] for step in (2, 3, 4)] == ["delta", "anchor", "delta"]
    file = "checkpoint-1/model-00002-of-00002.safetensors"
    assert file in manifest(job, 3)["lineage"]["reason"]
    assert file in caplog.text
    assert "writing an anchor" in caplog.text
    got = {name: torch.zeros_like(value) for name, value in weights().items()}
    job.do(1, lambda _: [part("model", got)], lambda c, _: c.load_checkpoint())
    assert equal(got, seen[4])


@pytest.mark.parametrize("rule", [NEAR, replace(NEAR, compress_anchors=True)], ids=["", "coded"])
def test_what_a_base_is_made_out_of_is_looked_at_too(job, rule):
    live, seen = [weights()], {}
    declare = lambda r: [part("model", live[r])]  # noqa: E731
    job.do(1, declare, saving(range(1, 4), live, seen), compression=rule)
    assert manifest(job, 3)["base"] == "main@2"
    (first,) = (job.output_dir / "checkpoint-1").glob("*.safetensors")
    first.unlink()
    job.do(1, declare, saving(range(4, 5), live, seen), compression=rule)
    assert manifest(job, 4)["kind"] == "anchor"
    assert f"checkpoint-1/{first.name}" in manifest(job, 4)["lineage"]["reason"]


def test_a_base_is_looked_at_once_and_what_a_process_wrote_not_at_all(job, monkeypatch):
    live, seen = [weights()], {}
    declare = lambda r: [part("model", live[r])]  # noqa: E731
    looked: list[str] = []
    ordinary = bases.check_files

    def counted(repository: Any, folder: str, found: Any, *, threads: int) -> None:
        looked.append(folder)
        ordinary(repository, folder, found, threads=threads)

    monkeypatch.setattr(bases, "check_files", counted)
    job.do(1, declare, saving(range(1, 4), live, seen), compression=AUTO)
    assert not looked
    job.do(1, declare, saving(range(4, 7), live, seen), compression=AUTO)
    assert looked == ["checkpoint-1"]


def test_a_parent_whose_manifest_cannot_be_read_leads_to_an_anchor(job, caplog):
    live, seen = [weights()], {}
    declare = lambda r: [part("model", live[r])]  # noqa: E731
    job.do(1, declare, saving(range(1, 2), live, seen), compression=AUTO)
    (job.output_dir / "checkpoint-1" / "checkpoint_manifest.json").write_text("{}")
    with caplog.at_level(logging.WARNING, "ckptcoord"):
        job.do(1, declare, saving(range(2, 3), live, seen), compression=AUTO)
    assert manifest(job, 2)["kind"] == "anchor"
    assert "writing an anchor" in caplog.text


def test_retention_keeps_what_a_delta_needs(job):
    live, seen = [weights()], {}
    declare = lambda r: [part("model", live[r])]  # noqa: E731
    work = saving(range(1, 6), live, seen)
    job.do(1, declare, work, compression=AUTO, keep_last=1)
    folders = {path.name for path in Path(job.output_dir).glob("checkpoint-*")}
    assert {"checkpoint-1", "checkpoint-5"} <= folders
    assert "checkpoint-2" not in folders
    got = {name: torch.zeros_like(value) for name, value in weights().items()}
    job.do(1, lambda _: [part("model", got)], lambda c, _: c.load_checkpoint())
    assert equal(got, seen[5])


def test_a_repository_can_be_moved_and_verified(job, tmp_path):
    live, seen = [weights()], {}
    declare = lambda r: [part("model", live[r])]  # noqa: E731
    job.do(1, declare, saving(range(1, 4), live, seen), compression=CHAIN)
    moved = tmp_path / "moved"
    shutil.move(job.output_dir, moved)
    with CheckpointCoordinator(declare(0), output_dir=moved) as coordinator:
        for step in seen:
            commit = coordinator.repository.resolve(f"main@{step}")
            assert verify_checkpoint(coordinator.repository, commit).ok
        (moved / "checkpoint-1" / "model.safetensors").unlink()
        report = verify_checkpoint(coordinator.repository, coordinator.repository.resolve("latest"))
    assert not report.ok
    assert "checkpoint-1/model.safetensors" in str([one.why for one in report.findings])


def test_ranks_must_agree_on_compression(job):
    live = [weights() for _ in range(2)]

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        if rank:
            object.__setattr__(coordinator._config, "compression", AUTO)
        coordinator.save_checkpoint(step=1)

    outcome = job.run(2, lambda r: [part("model", live[r])], work)
    assert all(isinstance(error, DisagreementError | SaveAbortedError) for error in outcome.errors)


@pytest.mark.parametrize("bad", ["fast", 7, None])
def test_an_unknown_level_is_refused(bad):
    with pytest.raises(ConfigError, match=r"compression\.level"):
        CoordinatorConfig(compression=bad)
    with pytest.raises(ConfigError, match=r"compression\.base"):
        Compression(base=bad or "nothing")
