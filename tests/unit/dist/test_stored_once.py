"""Bytes that are stored already are named: in this save, in its base, or elsewhere."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import shutil
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import ckptcoord
from ckptcoord import (
    CheckpointCoordinator,
    Compression,
    CoordinatorConfig,
    Lossy,
    SharingPattern,
    StateComponent,
)
from ckptcoord.core.entries import Fork, Retire, Sweep
from ckptcoord.core.lossy import CompressionLevel
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.errors import ConfigError, DisagreementError
from ckptcoord.plan import elsewhere as plan_elsewhere
from ckptcoord.plan.lineage import BaseChoice, Precision
from ckptcoord.repo.compaction import compact
from ckptcoord.repo.maintenance import local_times, prepare_gc, run_gc
from ckptcoord.repo.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

REPLICATED, PER_RANK = SharingPattern.REPLICATED, SharingPattern.PER_RANK
AUTO = Compression(level=CompressionLevel.AUTO)
CHAIN = Compression(level=CompressionLevel.AUTO, base=BaseChoice.PREVIOUS)
CODED = Compression(level=CompressionLevel.AUTO, compress_anchors=True)
WRITER = "e" * 32


def weights(seed: int = 0, shape: tuple[int, ...] = (64, 512)) -> dict[str, torch.Tensor]:
    """Three matrices of 128 KiB."""
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(shape, generator=generator) for i in range(3)}


def manifest(job: Any, step: int, branch: str = "") -> dict[str, Any]:
    name = f"checkpoint-{step}{branch and '@' + branch}"
    path = job.output_dir / name / "checkpoint_manifest.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def stored(job: Any, step: int, component: str = "model", branch: str = "") -> int:
    found: int = manifest(job, step, branch)["components"][component]["stored_bytes"]
    return found


def kinds(job: Any, step: int, component: str) -> set[str]:
    files = manifest(job, step)["files"]
    return {f["kind"] for f in files if f["component"] == component} & {"tensors", "delta"}


def part(key: str, state: object, **more: Any) -> StateComponent:
    return StateComponent(key, state, more.pop("pattern", REPLICATED), **more)


def zeros(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in state.items()}


def copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.items()}


def put(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in other.items():
        state[name].copy_(value)


def check(job: Any, ref: str, wanted: dict[str, dict[str, torch.Tensor]]) -> None:
    """It loads as it was, and every byte verifies."""
    got = {key: zeros(state) for key, state in wanted.items()}
    job.do(
        1,
        lambda _: [part(key, state) for key, state in got.items()],
        lambda coordinator, _: coordinator.load_checkpoint(ref),
    )
    for key, state in wanted.items():
        assert all(torch.equal(got[key][name], value) for name, value in state.items()), key
    sound(job, ref)


def sound(job: Any, ref: str) -> None:
    repository = ckptcoord.open_repository(job.output_dir)
    assert verify_checkpoint(repository, repository.resolve(ref)).ok


# --- in one save ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_same_weights_in_two_components_are_stored_once_whoever_writes_them(job, size):
    live = [{"model": weights(), "ema": weights(1)} for _ in range(size)]

    def declare(rank: int) -> list[StateComponent]:
        return [
            part("model", live[rank]["model"], validate_replication=True),
            part("ema", live[rank]["ema"], validate_replication=True),
        ]

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        coordinator.save_checkpoint(step=1)
        put(live[rank]["model"], weights(2))
        put(live[rank]["ema"], weights(2))
        coordinator.save_checkpoint(step=2)

    job.do(size, declare, work, compression=AUTO)
    both = sorted([stored(job, 2, "model"), stored(job, 2, "ema")])
    assert both[0] < 4000
    assert both[1] > 300_000
    assert manifest(job, 2)["lineage"]["needs"] == ["checkpoint-1"]
    check(job, "main@2", {"model": weights(2), "ema": weights(2)})


def test_replicas_that_nobody_compared_are_named_by_the_rank_that_writes_them_only(job):
    live = [{"model": weights(rank), "ema": weights(rank)} for rank in range(2)]
    declare = lambda r: [part("model", live[r]["model"]), part("ema", live[r]["ema"])]  # noqa: E731

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        coordinator.save_checkpoint(step=1)
        for state in live[rank].values():
            put(state, weights(rank + 5))
        coordinator.save_checkpoint(step=2)

    job.do(2, declare, work, compression=AUTO)
    sound(job, "main@2")


def test_what_is_given_up_of_a_tensor_is_no_source_of_another(job):
    live = {"approximate": weights(), "exact": weights(1)}
    live["narrow"] = {name: v.bfloat16() for name, v in live["approximate"].items()}

    def work(coordinator: CheckpointCoordinator, _: int) -> None:
        coordinator.save_checkpoint(step=1)
        after = {name: value + 1e-3 * weights(7)[name] for name, value in weights().items()}
        put(live["approximate"], after)
        put(live["exact"], after)
        put(live["narrow"], {name: value.bfloat16() for name, value in after.items()})
        coordinator.save_checkpoint(step=2)

    def declare(_: int) -> list[StateComponent]:
        lossy = {"approximate": Lossy(update_fraction=0.2)}
        return [part(key, state, lossy=lossy.get(key)) for key, state in live.items()]

    job.do(1, declare, work, compression=AUTO)
    check(job, "main@2", live)  # what could be approximate is the exact one, at no cost


def test_equal_tensors_of_one_component_are_stored_once(job):
    live = {"a": weights()["w0"], "b": weights()["w1"]}

    def work(coordinator: CheckpointCoordinator, _: int) -> None:
        coordinator.save_checkpoint(step=1)
        for value in live.values():
            value.copy_(weights(3)["w0"])
        coordinator.save_checkpoint(step=2)

    job.do(1, lambda _: [part("model", live)], work, compression=AUTO)
    assert 100_000 < stored(job, 2) < 140_000
    check(job, "main@2", {"model": live})


def test_of_tensors_that_begin_alike_the_equal_one_is_found(job):
    def padded(seed: int) -> torch.Tensor:
        values = weights(seed)["w0"].flatten()
        values[:300] = 0
        return values

    live = {name: padded(seed) for seed, name in enumerate("abcdef")}

    def work(coordinator: CheckpointCoordinator, _: int) -> None:
        coordinator.save_checkpoint(step=1)
        for seed, name in enumerate("abcaba", 10):
            live["abcdef"[seed - 10]].copy_(padded(10 + "abc".index(name)))
        coordinator.save_checkpoint(step=2)

    job.do(1, lambda _: [part("model", live)], work, compression=AUTO)
    assert stored(job, 2) < 2.9 * live["a"].nbytes
    check(job, "main@2", {"model": live})


def test_a_tensor_with_the_same_beginning_is_stored_whole(job):
    live = {"a": weights()["w0"], "b": weights()["w0"]}

    def work(coordinator: CheckpointCoordinator, _: int) -> None:
        coordinator.save_checkpoint(step=1)
        live["a"].copy_(weights(3)["w0"])
        live["b"].copy_(weights(3)["w0"])
        live["b"][-1, -1] = 7
        coordinator.save_checkpoint(step=2)

    job.do(1, lambda _: [part("model", live)], work, compression=AUTO)
    check(job, "main@2", {"model": live})


# --- elsewhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_a_state_that_returns_to_an_earlier_value_costs_no_bytes(job, size):
    live = [weights() for _ in range(size)]

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step, seed in enumerate((0, 1, 2, 3, 1), start=1):
            put(live[rank], weights(seed))
            coordinator.save_checkpoint(step=step)

    rule = Compression(level=CompressionLevel.AUTO, reanchor_interval=9)
    job.do(size, lambda r: [part("model", live[r])], work, compression=rule)
    assert stored(job, 4) > 300_000
    assert stored(job, 5) < 5000
    assert manifest(job, 5)["lineage"]["needs"] == ["checkpoint-1", "checkpoint-2"]
    check(job, "main@5", {"model": weights(1)})


def test_a_save_over_one_of_the_same_bytes_names_what_it_replaces(job):
    live = weights()

    with CheckpointCoordinator(
        [part("model", live)], output_dir=job.output_dir, config=CoordinatorConfig(compression=AUTO)
    ) as coordinator:
        for step, seed in ((1, 0), (2, 1)):
            put(live, weights(seed))
            coordinator.save_checkpoint(step=step)
        path = coordinator.save_checkpoint(step=2, overwrite=True)
    assert not path.endswith("checkpoint-2")
    commit = ckptcoord.open_repository(job.output_dir).resolve("main@2")
    assert commit.needs == ("checkpoint-1", "checkpoint-2")
    assert commit.stored_bytes < 5000
    check(job, "main@2", {"model": weights(1)})


def fork(job: Any, branch: str, step: int) -> None:
    source = CheckpointId(BranchName("main"), step)
    entry = Fork(writer=WRITER, branch=BranchName(branch), source=source)
    ckptcoord.open_repository(job.output_dir).log.append(lambda _: entry)


def two_branches(job: Any, size: int = 1) -> Callable[..., None]:
    """`main@1`, and `exp@2` that has the weights of seed 2; returns what saves to main."""
    live = [weights() for _ in range(size)]

    def save(step: int, seed: int, **settings: Any) -> None:
        for one in live:
            put(one, weights(seed))
        job.do(
            size,
            lambda r: [part("model", live[r])],
            lambda coordinator, _: coordinator.save_checkpoint(step=step),
            **{"compression": AUTO, **settings},
        )

    save(1, 0)
    fork(job, "exp", 1)
    save(2, 2, branch="exp")
    return save


@pytest.mark.parametrize("size", [1, 2])
def test_weights_that_another_branch_has_cost_no_bytes(job, size):
    save = two_branches(job, size)
    save(3, 2)
    assert stored(job, 3) < 5000
    assert manifest(job, 3)["lineage"]["needs"] == ["checkpoint-1", "checkpoint-2@exp"]
    commit = ckptcoord.open_repository(job.output_dir).resolve("main@3")
    assert commit.needs == ("checkpoint-1", "checkpoint-2@exp")
    check(job, "main@3", {"model": weights(2)})


def test_what_another_checkpoint_only_names_is_named_where_it_is(job):
    save = two_branches(job)
    save(3, 2)
    save(4, 2, branch="exp")  # all of it the same as in exp@2
    shutil.rmtree(job.output_dir / "checkpoint-3")
    check(job, "exp@4", {"model": weights(2)})
    fork(job, "third", 1)
    save(5, 2, branch="third")
    # main@3, exp@4 and exp@2 have these bytes: exp@2 stores them.
    needs = manifest(job, 5, "third")["lineage"]["needs"]
    assert needs == ["checkpoint-1", "checkpoint-2@exp"]


def test_another_branch_that_cannot_be_read_is_left_out_with_a_warning(job, caplog):
    save = two_branches(job)
    shard = next((job.output_dir / "checkpoint-2@exp").glob("model*.delta.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "ckptcoord"):
        save(3, 2)
    assert "checkpoint-2@exp" in caplog.text
    assert manifest(job, 3)["lineage"]["needs"] == ["checkpoint-1"]
    check(job, "main@3", {"model": weights(2)})


def test_where_a_checkpoint_elsewhere_is_swept_before_the_commit_there_is_an_anchor(job, caplog):
    save = two_branches(job)
    live = weights(2)
    repository = ckptcoord.open_repository(job.output_dir)

    def sweep(step: str) -> None:
        """gc at the worst moment: the other branch goes, after what is named was decided."""
        if step == "written" and CheckpointId(BranchName("exp"), 2) in repository.state().commits:
            entries = (
                Retire(writer=WRITER, checkpoint_ids=(CheckpointId(BranchName("exp"), 2),)),
                Sweep(writer=WRITER, paths=("checkpoint-2@exp",)),
            )
            for entry in entries:
                repository.log.append(lambda _, entry=entry: entry)

    def work(coordinator: CheckpointCoordinator, _: int) -> None:
        coordinator.save_checkpoint(step=3)

    del save
    job.do(1, lambda _: [part("model", live)], work, compression=AUTO, probe=sweep)
    assert manifest(job, 3)["kind"] == "anchor"
    assert "as an anchor: checkpoint-3 needs checkpoint-2@exp" in caplog.text
    check(job, "main@3", {"model": weights(2)})


def test_a_star_whose_saves_change_one_part_each_needs_a_bounded_number_of_others(job, monkeypatch):
    monkeypatch.setattr(plan_elsewhere, "MAX_NEEDS", 4)
    live = {f"w{i}": torch.randn(64, 300) for i in range(12)}
    rule = Compression(level=CompressionLevel.AUTO, reanchor_interval=99)

    def work(coordinator: CheckpointCoordinator, _: int) -> None:
        coordinator.save_checkpoint(step=0)
        for step in range(1, 12):
            live[f"w{step}"] += 1e-3
            coordinator.save_checkpoint(step=step)

    job.do(1, lambda _: [part("model", live)], work, compression=rule)
    counts = [len(manifest(job, step)["lineage"]["needs"]) for step in range(12)]
    assert counts == [0, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3]
    check(job, "main@11", {"model": live})


def test_verify_finds_what_is_named_and_not_said_to_be_needed(job):
    save = two_branches(job)
    save(3, 2)
    repository = ckptcoord.open_repository(job.output_dir)
    commit = repository.resolve("main@3")
    less = dataclasses.replace(commit, needs=("checkpoint-1",))
    findings = verify_checkpoint(repository, less).findings
    assert [one.harmful for one in findings] == [True]
    assert "is made out of checkpoint-2@exp, which its commit does not need" in findings[0].why


def test_a_small_tensor_is_not_worth_keeping_another_checkpoint_for(job):
    live = {"w": torch.zeros(1000), "frozen": torch.zeros(30_000)}

    def work(coordinator: CheckpointCoordinator, _: int) -> None:
        for step, fill in enumerate((0, 1, 2, 3, 1), start=1):
            live["w"].copy_(torch.randn(1000, generator=torch.Generator().manual_seed(fill)))
            coordinator.save_checkpoint(step=step)

    rule = Compression(level=CompressionLevel.AUTO, reanchor_interval=9)
    job.do(1, lambda _: [part("model", live)], work, compression=rule)
    assert manifest(job, 5)["lineage"]["needs"] == ["checkpoint-1"]


# --- coded anchors -------------------------------------------------------------------------------


def test_a_coded_anchor_is_smaller_stands_alone_and_becomes_plain_when_compacted(job):
    master = {name: v * 0.01 for name, v in weights().items()}
    live = {"model": {n: v.bfloat16() for n, v in master.items()}, "optimizer": master}
    live["ema"] = copy(live["model"])
    declare = lambda _: [part(key, state) for key, state in live.items()]  # noqa: E731
    job.do(1, declare, lambda c, _: c.save_checkpoint(step=1), compression=CODED)
    found = manifest(job, 1)
    assert (found["kind"], found["base"], found["lineage"]["needs"]) == ("anchor", None, [])
    assert {kind for key in live for kind in kinds(job, 1, key)} == {"delta"}
    assert stored(job, 1, "model") < 3000
    assert stored(job, 1, "ema") < 3000
    assert stored(job, 1, "optimizer") < 0.95 * 3 * 128 * 1024
    check(job, "main@1", live)
    repository = ckptcoord.open_repository(job.output_dir)
    assert compact(repository, CheckpointId(BranchName(), 1), writer=WRITER)
    commit = repository.resolve("main@1")
    for key, state in live.items():
        loaded = load_file(job.output_dir / commit.path / f"{key}.safetensors")
        assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert not compact(repository, CheckpointId(BranchName(), 1), writer=WRITER)
    check(job, "main@1", live)


@pytest.mark.parametrize("base", list(BaseChoice))
def test_deltas_stand_on_a_coded_anchor(job, base):
    rule = Compression(level=CompressionLevel.AUTO, compress_anchors=True, base=base)
    live = [weights() for _ in range(2)]

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in range(1, 5):
            live[rank]["w0"][step] += 1e-3
            coordinator.save_checkpoint(step=step)

    job.do(2, lambda r: [part("model", live[r])], work, compression=rule)
    assert [manifest(job, step)["kind"] for step in range(1, 5)] == ["anchor"] + 3 * ["delta"]
    assert stored(job, 4) < 10_000
    check(job, "main@4", {"model": live[0]})


def test_a_coded_anchor_is_exact_whatever_may_be_given_up(job):
    rule = Compression(
        level=CompressionLevel.AUTO, precision=Precision.BOUNDED, compress_anchors=True,
        lossy={"model": Lossy(mantissa_bits=2)},
    )  # fmt: skip
    live = weights()
    job.do(1, lambda _: [part("model", live)], lambda c, _: c.save_checkpoint(step=1),
           compression=rule)  # fmt: skip
    assert manifest(job, 1)["components"]["model"]["given_up_tensors"] == 0
    check(job, "main@1", {"model": weights()})


# --- settings of one component -------------------------------------------------------------------


def two_saves(job: Any, declare: Callable[..., list[StateComponent]], **settings: Any) -> None:
    live = {"model": weights(), "optimizer": weights(1)}

    def work(coordinator: CheckpointCoordinator, _: int) -> None:
        coordinator.save_checkpoint(step=1)
        for state in live.values():
            state["w0"] += 1e-4
        coordinator.save_checkpoint(step=2)

    job.do(1, lambda _: declare(live), work, **settings)
    check(job, "main@2", live) if settings.pop("exact", True) else sound(job, "main@2")


def test_a_component_stays_plain_in_deltas_and_in_coded_anchors(job):
    two_saves(
        job,
        lambda live: [
            part("model", live["model"], compression="off"),
            part("optimizer", live["optimizer"]),
        ],
        compression=CODED,
    )
    assert manifest(job, 2)["kind"] == "delta"
    for step in (1, 2):
        assert kinds(job, step, "model") == {"tensors"}
        assert kinds(job, step, "optimizer") == {"delta"}
    found = load_file(job.output_dir / "checkpoint-2" / "model.safetensors")
    assert torch.equal(found["w0"], weights()["w0"] + 1e-4)


def test_a_component_is_coded_where_the_others_are_not(job):
    two_saves(
        job,
        lambda live: [
            part("model", live["model"]),
            part("optimizer", live["optimizer"], compression="aggressive"),
        ],
    )
    assert manifest(job, 2)["kind"] == "delta"
    assert (kinds(job, 2, "model"), kinds(job, 2, "optimizer")) == ({"tensors"}, {"delta"})
    assert kinds(job, 1, "optimizer") == {"tensors"}
    assert stored(job, 2, "optimizer") < 200_000


def test_a_save_of_which_nothing_is_coded_is_an_anchor(job):
    two_saves(
        job,
        lambda live: [part(key, state, compression="off") for key, state in live.items()],
        compression=AUTO,
    )
    assert manifest(job, 2)["kind"] == "anchor"
    assert manifest(job, 2)["lineage"]["reason"] == "compression is off"


def test_a_components_own_lossy_settings_go_before_the_coordinators(job):
    lossy = Lossy(update_fraction=0.2)
    rule = Compression(level=CompressionLevel.AUTO, lossy={"model": lossy, "optimizer": lossy})
    live = {"model": weights(), "optimizer": weights(1)}

    def work(coordinator: CheckpointCoordinator, _: int) -> None:
        coordinator.save_checkpoint(step=1)
        for seed, state in enumerate(live.values()):
            noise = torch.Generator().manual_seed(seed)
            state["w0"] += 1e-4 * torch.randn(state["w0"].shape, generator=noise)
        coordinator.save_checkpoint(step=2)

    def declare(_: int) -> list[StateComponent]:
        return [part("model", live["model"]), part("optimizer", live["optimizer"], lossy=Lossy())]

    job.do(1, declare, work, compression=rule)
    given_up = {key: one["given_up_tensors"] for key, one in manifest(job, 2)["components"].items()}
    assert given_up == {"model": 1, "optimizer": 0}


@pytest.mark.parametrize("pattern", [REPLICATED, PER_RANK, SharingPattern.PER_GROUP])
@pytest.mark.parametrize(
    ("mine", "yours", "word"),
    [
        ({"compression": "off"}, {}, "compression=off"),
        ({"lossy": Lossy(mantissa_bits=3)}, {"lossy": Lossy()}, "mantissa_bits"),
    ],
)
def test_ranks_with_other_settings_are_told(job, pattern, mine, yours, word):
    group = {"process_group_name": "tp"} if pattern is SharingPattern.PER_GROUP else {}

    def declare(rank: int) -> list[StateComponent]:
        return [part("model", weights(), pattern=pattern, **group, **(yours if rank else mine))]

    def work(coordinator: CheckpointCoordinator, _: int) -> None:
        with pytest.raises(DisagreementError, match=word):
            coordinator.save_checkpoint(step=1)

    job.do(2, declare, work, groups=lambda _: {"tp": (0, 1)}, compression=AUTO)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"compression": "much"}, "compression"),
        ({"lossy": {"mantissa_bits": 3}}, "lossy"),
        ({"compression": "off", "lossy": Lossy(mantissa_bits=3)}, "lossy"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, field):
    with pytest.raises(ConfigError, match=field):
        part("model", {}, **given)


def test_an_exact_component_may_be_off(job):
    assert part("model", {}, compression="off", lossy=Lossy()).compression is CompressionLevel.OFF


def test_anchors_are_plain_by_default():
    assert not CoordinatorConfig(compression="auto").rule.compress_anchors
    with pytest.raises(ConfigError, match="compress_anchors"):
        Compression(compress_anchors="yes")  # type: ignore[arg-type]


# --- whatever comes ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [1, 2])
def test_whatever_is_named_stays_as_long_as_it_is(job, seed, size):
    """Two runs on two branches, values that come again, retention, and gc all the time."""
    choose = random.Random(seed)
    repository = None
    values = [weights(one, (32, 600)) for one in range(4)]
    live = [{"model": copy(values[0]), "ema": copy(values[1])} for _ in range(size)]
    at: dict[str, dict[str, int]] = {}

    def declare(rank: int) -> list[StateComponent]:
        return [part(key, live[rank][key], validate_replication=True) for key in live[rank]]

    for run in range(6):
        branch = ("main", "exp")[run % 2]
        picks = [(choose.randrange(4), choose.randrange(4)) for _ in range(4)]

        def work(
            coordinator: CheckpointCoordinator,
            rank: int,
            run: int = run,
            picks: list[tuple[int, int]] = picks,
        ) -> None:
            for number, (model, ema) in enumerate(picks):
                put(live[rank]["model"], values[model])
                put(live[rank]["ema"], values[ema])
                coordinator.save_checkpoint(step=run * 10 + number)

        rule = Compression(
            level=CompressionLevel.AUTO,
            base=choose.choice(list(BaseChoice)),
            compress_anchors=choose.choice([True, False]),
        )
        keep = choose.choice([None, 1, 3])
        job.do(size, declare, work, compression=rule, branch=branch, keep_last=keep)
        for number, (model, ema) in enumerate(picks):
            at[f"{branch}@{run * 10 + number}"] = {"model": model, "ema": ema}
        repository = ckptcoord.open_repository(job.output_dir)
        plan = prepare_gc(
            repository, now=datetime.now(UTC), changed=local_times(repository), grace_s=0.0
        )
        assert not run_gc(repository, plan, writer=WRITER).failed
    assert repository is not None
    alive = sorted(one.ref for one in repository.state().commits)
    assert alive
    for ref in alive:
        check(job, ref, {key: values[seed] for key, seed in at[ref].items()})
