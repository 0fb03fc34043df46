"""Saves and loads over several ranks: what comes back, who wrote it, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ckptcoord import (
    CheckpointCoordinator,
    CoordinatorConfig,
    SharingPattern,
    StateComponent,
    open_repository,
)
from ckptcoord.errors import (
    CheckpointExistsError,
    ClosedError,
    ConfigError,
    CorruptError,
    DigestMismatchError,
    DisagreementError,
    DuplicateComponentError,
    FencedError,
    InvalidNameError,
    NotInGroupError,
    OutputDirError,
    RefNotFoundError,
    SaveAbortedError,
    SetupAbortedError,
    StateMismatchError,
    UnknownGroupError,
    UnsupportedStateError,
)
from ckptcoord.repo.verify import verify_checkpoint

GLOBAL, REPLICATED, PER_RANK, PER_GROUP, PER_NODE = (
    SharingPattern.GLOBAL,
    SharingPattern.REPLICATED,
    SharingPattern.PER_RANK,
    SharingPattern.PER_GROUP,
    SharingPattern.PER_NODE,
)


def weights() -> dict:
    own = torch.Generator().manual_seed(7)
    return {f"layer.{i}.weight": torch.randn(16, 8, generator=own) for i in range(12)}


def component(key: str, state: object, pattern: SharingPattern, **more: object) -> StateComponent:
    return StateComponent(key, state, pattern, **more)


def save(step: int, **more: object):
    return lambda coordinator, rank: coordinator.save_checkpoint(step=step, **more)


def load(ref: str | None = None, **more: object):
    return lambda coordinator, rank: coordinator.load_checkpoint(ref, **more)


def equal(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.dtype == right.dtype
    if isinstance(left, np.ndarray):
        return np.array_equal(left, right) and left.dtype == right.dtype
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        same = type(left) is type(right) and len(left) == len(right)
        return same and all(map(equal, left, right))
    return type(left) is type(right) and left == right


# --- what comes back -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_was_saved_is_loaded_for_every_pattern(job, size):
    def state(rank: int) -> dict[str, object]:
        return {
            "model": weights(),
            "cursor": {"at": 5, "order": np.arange(9)},
            "rng": {"rank": rank, "state": torch.arange(rank + 3)},
            "expert": {"w": torch.full((4, 4), float(rank // 2))},
            "cache": {"hosts": ["a", "b"]},
        }

    def empty(rank: int) -> dict[str, object]:
        return {
            "model": {name: torch.zeros_like(t) for name, t in weights().items()},
            "cursor": {},
            "rng": {},
            "expert": {},
            "cache": {},
        }

    def declare(held: dict[str, object]) -> list[StateComponent]:
        return [
            component("model", held["model"], REPLICATED, validate_replication=True),
            component("cursor", held["cursor"], GLOBAL),
            component("rng", held["rng"], PER_RANK),
            component("expert", held["expert"], PER_GROUP, process_group_name="ep"),
            component("cache", held["cache"], PER_NODE),
        ]

    def groups(rank: int) -> dict[str, object]:
        return {"ep": [r for r in range(size) if r // 2 == rank // 2]}

    job.run(size, lambda rank: declare(state(rank)), save(3), groups=groups).values  # noqa: B018
    fresh = [empty(rank) for rank in range(size)]
    reports = job.run(size, lambda rank: declare(fresh[rank]), load(), groups=groups).values
    for rank in range(size):
        assert equal(fresh[rank], state(rank))
        assert reports[rank].step == 3
        assert reports[rank].loaded == ("model", "cursor", "rng", "expert", "cache")


def test_replicated_tensors_are_striped_evenly_and_each_is_written_once(job):
    (path, *_) = job.run(4, lambda _: [component("model", weights(), REPLICATED)], save(1)).values
    manifest = json.loads((Path(path) / "checkpoint_manifest.json").read_text())
    shards = [f for f in manifest["files"] if f["kind"] == "tensors"]
    assert sorted(f["writer_rank"] for f in shards) == [0, 1, 2, 3]
    assert len({f["size_bytes"] for f in shards}) == 1
    index = json.loads((Path(path) / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(weights())


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(4, 1), (4, 3), (1, 4), (2, 4)])
def test_replicated_and_global_state_loads_on_any_number_of_ranks(job, saved_on, loaded_on):
    def declare(model: dict, cursor: dict) -> list[StateComponent]:
        return [component("model", model, REPLICATED), component("cursor", cursor, GLOBAL)]

    job.run(saved_on, lambda _: declare(weights(), {"at": 9}), save(1)).values  # noqa: B018
    fresh = [({}, {}) for _ in range(loaded_on)]
    job.run(loaded_on, lambda rank: declare(*fresh[rank]), load()).values  # noqa: B018
    for model, cursor in fresh:
        assert equal(model, weights())
        assert cursor == {"at": 9}


def test_modules_and_optimizers_come_back_with_tied_weights_and_exact_groups(job):
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
        model["b"].weight = model["a"].weight
        groups = [{"params": model["a"].parameters(), "lr": 0.1}, {"params": [model["b"].bias]}]
        return model, torch.optim.AdamW(groups, lr=0.03)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model["b"](model["a"](torch.ones(2, 4))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def declare(pair: tuple) -> list[StateComponent]:
        return [
            component("model", pair[0], REPLICATED),
            component("optimizer", pair[1], REPLICATED),
        ]

    old, new = make(), make()
    step(*old)
    (path,) = job.run(1, lambda _: declare(old), save(1)).values
    job.run(1, lambda _: declare(new), load()).values  # noqa: B018
    assert equal(dict(new[0].state_dict()), dict(old[0].state_dict()))
    assert equal(new[1].state_dict(), old[1].state_dict())
    step(*old)
    step(*new)
    assert equal(dict(new[0].state_dict()), dict(old[0].state_dict()))
    from safetensors.torch import load_file

    assert sorted(load_file(Path(path) / "model.safetensors")) == ["a.bias", "a.weight", "b.bias"]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn,
        torch.float8_e5m2, torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32,
        torch.uint32, torch.int64, torch.uint64, torch.bool, torch.complex64, torch.complex128,
    ],
)  # fmt: skip
def test_every_dtype_comes_back_bit_for_bit(job, dtype):
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (4, 6 * 16), dtype=torch.uint8)
    whole = raw.view(dtype)
    state = {
        "matrix": whole,
        "scalar": whole.reshape(-1)[0].clone(),
        "empty": whole[:0],
        "transposed": whole.T,
        "strided": whole[:, ::2],
        "expanded": whole[:1].expand(3, -1),
    }
    job.run(2, lambda _: [component("model", state, REPLICATED)], save(1)).values  # noqa: B018
    fresh: dict = {}
    job.run(1, lambda _: [component("model", fresh, REPLICATED)], load()).values  # noqa: B018
    assert fresh.keys() == state.keys()
    for name, tensor in state.items():
        assert fresh[name].shape == tensor.shape
        assert fresh[name].dtype == dtype
        same = fresh[name].reshape(-1).contiguous().view(torch.uint8)
        assert torch.equal(same, tensor.contiguous().reshape(-1).view(torch.uint8)), name


def test_a_live_dict_keeps_its_tensors_and_its_identity(job):
    live = {"w": torch.ones(3), "n": 4, "nested": {"v": torch.zeros(2)}, "list": [1, 2]}
    tensor, nested = live["w"], live["nested"]
    job.run(1, lambda _: [component("state", live, GLOBAL)], save(1)).values  # noqa: B018
    live["w"].zero_()
    live["n"], live["extra"] = 5, "gone after the load"
    live["list"].append(3)
    job.run(1, lambda _: [component("state", live, GLOBAL)], load()).values  # noqa: B018
    assert live["w"] is tensor
    assert live["nested"] is nested
    assert tensor.tolist() == [1, 1, 1]
    assert (live["n"], "extra" in live, live["list"]) == (4, False, [1, 2])


def test_group_members_that_hold_different_names_make_one_copy_together(job):
    def stage(rank: int) -> dict:
        return {f"layer.{rank}.weight": torch.full((8,), float(rank)), "shared": torch.ones(4)}

    def declare(held: dict) -> list[StateComponent]:
        return [
            component("stages", held, PER_GROUP, process_group_name="pp", validate_replication=True)
        ]

    def groups(rank: int) -> dict[str, object]:
        return {"pp": [0, 1] if rank < 2 else [2, 3]}

    def twice(coordinator: CheckpointCoordinator, rank: int) -> None:
        coordinator.save_checkpoint(step=1)
        coordinator.save_checkpoint(step=2)

    job.run(4, lambda rank: declare(stage(rank)), twice, groups=groups).values  # noqa: B018
    repository = open_repository(job.output_dir)
    commit = repository.resolve("main@2")
    names = []
    for record in repository.manifest(commit).files:
        if record.kind == "tensors":
            with repository.open_shard(commit, record) as reader:
                names += [(record.scope, entry.spec.name) for entry in reader.header.entries]
    assert sorted(names) == sorted(
        [("pp00000", n) for n in ("layer.0.weight", "layer.1.weight", "shared")]
        + [("pp00001", n) for n in ("layer.2.weight", "layer.3.weight", "shared")]
    )
    fresh: list[dict] = [{} for _ in range(4)]
    job.run(4, lambda rank: declare(fresh[rank]), load(), groups=groups).values  # noqa: B018
    assert all(equal(fresh[rank], stage(rank)) for rank in range(4))


def test_refs_resolve_to_the_newest_a_step_a_tag_a_folder(job):
    held = {"n": 0}

    def work(coordinator: CheckpointCoordinator, rank: int) -> list[int]:
        for step in (9, 10, 100):
            held["n"] = step
            coordinator.save_checkpoint(step=step)
        coordinator.set_best_checkpoint("main@10")
        path = coordinator.resolve_checkpoint_path("main@9")
        assert coordinator.resolve_checkpoint_path() == str(job.output_dir / "checkpoint-100")
        assert coordinator.resolve_checkpoint_path("main@7") is None
        refs = [None, "latest", "main@9", "best", "checkpoint-10", path, Path(path)]
        return [coordinator.load_checkpoint(ref).step for ref in refs]

    (steps,) = job.run(1, lambda _: [component("state", held, GLOBAL)], work).values
    assert steps == [100, 100, 9, 10, 10, 9, 9]


def test_overwriting_writes_beside_and_commits_over(job):
    held = {"n": 1}

    def work(coordinator: CheckpointCoordinator, rank: int) -> tuple[str, str]:
        first = coordinator.save_checkpoint(step=5)
        before = (Path(first) / "state.state.json").read_bytes()
        held["n"] = 2
        second = coordinator.save_checkpoint(step=5, overwrite=True, validate=True)
        assert (Path(first) / "state.state.json").read_bytes() == before
        return first, second

    ((first, second),) = job.run(1, lambda _: [component("state", held, GLOBAL)], work).values
    assert first != second
    held["n"] = 0
    job.run(1, lambda _: [component("state", held, GLOBAL)], load("main@5")).values  # noqa: B018
    assert held["n"] == 2


def test_metrics_and_messages_are_kept_and_what_is_not_finite_is_left_out(job):
    metrics = {"loss": 2.5, "nan": math.nan, "inf": math.inf}
    work = save(1, message="first light", metrics=metrics, epoch=0.5)
    job.run(2, lambda _: [component("state", {}, REPLICATED)], work).values  # noqa: B018
    repository = open_repository(job.output_dir)
    commit = repository.resolve("latest")
    manifest = repository.manifest(commit)
    assert (manifest.metrics, manifest.message, manifest.epoch) == (
        {"loss": 2.5},
        "first light",
        0.5,
    )
    assert dict(commit.metrics) == {"loss": 2.5}


def test_a_hugging_face_config_goes_with_the_model(job):
    class Config:
        def to_json_string(self) -> str:
            return '{"model_type": "x"}'

    model = torch.nn.Linear(2, 2)
    model.config = Config()
    (path,) = job.run(1, lambda _: [component("model", model, GLOBAL)], save(1)).values
    assert json.loads((Path(path) / "config.json").read_text()) == {"model_type": "x"}


def test_save_model_writes_a_plain_folder_and_replaces_it_only_when_told(job, tmp_path):
    model = torch.nn.Linear(4, 4)
    target = tmp_path / "export"

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        coordinator.save_model(target)
        with pytest.raises(ConfigError, match="not empty"):
            coordinator.save_model(target)
        coordinator.save_model(target, overwrite_output_dir=True)

    job.run(1, lambda _: [component("model", model, GLOBAL)], work, max_shard_size=64).values  # noqa: B018
    from safetensors.torch import load_file

    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(equal(load_file(target / f)[n], model.state_dict()[n]) for n, f in index.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "run"]


# --- what is refused, on every rank, before anything is touched ----------------------------------


def test_a_duplicate_key_is_refused_on_every_rank(job):
    twice = [component("state", {}, GLOBAL), component("state", {}, GLOBAL)]
    one = [component("state", {}, GLOBAL)]
    errors = job.run(3, lambda _: twice, save(1)).errors
    assert [type(error) for error in errors] == [DuplicateComponentError] * 3
    errors = job.run(3, lambda rank: twice if rank == 1 else one, save(1)).errors
    assert all(isinstance(e, SetupAbortedError) and set(e.failures) == {1} for e in errors)
    assert not job.output_dir.exists()


def test_a_group_that_nobody_gave_is_refused(job):
    held = [component("x", {}, PER_GROUP, process_group_name="tp")]
    for error in job.run(2, lambda _: held, save(1), groups=lambda _: {"dp": [0, 1]}).errors:
        assert isinstance(error, UnknownGroupError)
        assert (error.group, tuple(error.known)) == ("tp", ("dp",))


def test_a_rank_in_no_instance_of_its_group_is_refused_and_named(job):
    held = [component("x", {}, PER_GROUP, process_group_name="tp")]
    groups = {"tp": [0, 1]}
    for error in job.run(
        3, lambda _: held, save(1), groups=lambda r: groups if r < 2 else {}
    ).errors:
        assert isinstance(error, SetupAbortedError)
        assert set(error.failures) == {2}
        assert NotInGroupError.__name__ in error.failures[2]


@pytest.mark.parametrize("field", ["step", "branch", "overwrite", "components"])
def test_ranks_that_disagree_are_told_who_said_what(job, field):
    def declare(rank: int) -> list[StateComponent]:
        extra = [component("more", {}, PER_RANK)] if field == "components" and rank == 1 else []
        return [component("state", {}, REPLICATED), *extra]

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        odd = rank == 1
        if field == "branch" and odd:
            coordinator._session.config = dataclasses.replace(coordinator._config, branch="b")
            coordinator._config = coordinator._session.config
        step, overwrite = 1 + (field == "step" and odd), field == "overwrite" and odd
        coordinator.save_checkpoint(step=step, overwrite=overwrite)

    for error in job.run(3, declare, work).errors:
        assert isinstance(error, DisagreementError)
        assert error.field == field
        assert sorted(error.values.values()) == [[0, 2], [1]]
    assert not open_repository(job.output_dir).state().commits


def test_a_component_that_only_some_members_of_a_group_declare_is_refused(job):
    def declare(rank: int) -> list[StateComponent]:
        return [component("x", {}, PER_GROUP, process_group_name="tp")] if rank != 1 else []

    errors = job.run(2, declare, save(1), groups=lambda _: {"tp": [0, 1]}).errors
    assert all(isinstance(error, DisagreementError) for error in errors)


def test_an_output_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(OutputDirError, match="a file is in the way"):
        CheckpointCoordinator([], output_dir=tmp_path / "run")
    assert (tmp_path / "run").read_text() == "precious"


def test_a_step_saved_twice_is_refused_and_the_first_stays(job):
    def work(coordinator: CheckpointCoordinator, rank: int) -> str:
        path = coordinator.save_checkpoint(step=1)
        with pytest.raises(CheckpointExistsError):
            coordinator.save_checkpoint(step=1)
        return path

    job.run(2, lambda _: [component("state", {"n": 1}, REPLICATED)], work).values  # noqa: B018
    repository = open_repository(job.output_dir)
    assert verify_checkpoint(repository, repository.resolve("latest")).ok
    assert not list((job.output_dir / ".ckptcoord" / "staging").iterdir())


def test_a_checkpoint_is_named_exactly_once(job):
    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        with pytest.raises(ConfigError, match="names no checkpoint"):
            coordinator.save_checkpoint()
        with pytest.raises(ConfigError):
            coordinator.save_checkpoint(step=1, checkpoint_id="checkpoint-2")
        with pytest.raises(ConfigError, match="not a folder of the repository"):
            coordinator.save_checkpoint("/elsewhere/checkpoint-2")
        with pytest.raises(InvalidNameError):
            coordinator.save_checkpoint(step=-1)
        with pytest.raises(ConfigError):
            coordinator.save_checkpoint(checkpoint_id="checkpoint-1@other")
        coordinator.save_checkpoint(job.output_dir / "checkpoint-2", "checkpoint-2", step=2)

    job.run(1, lambda _: [component("state", {}, GLOBAL)], work).values  # noqa: B018


def test_a_ref_that_does_not_exist_names_the_nearest(job):
    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in (10, 20, 300):
            coordinator.save_checkpoint(step=step)
        with pytest.raises(RefNotFoundError) as caught:
            coordinator.load_checkpoint("main@21")
        assert "main@20" in caught.value.nearest

    job.run(2, lambda _: [component("state", {}, REPLICATED)], work).values  # noqa: B018


def test_state_that_cannot_be_stored_is_named_by_path_and_rank(job):
    def declare(rank: int) -> list[StateComponent]:
        return [component("state", {"a": [1, print if rank == 1 else 2]}, PER_RANK)]

    errors = job.run(3, declare, save(1)).errors
    assert all(isinstance(e, SaveAbortedError) and set(e.failures) == {1} for e in errors)
    assert isinstance(errors[1].__cause__, UnsupportedStateError)
    assert "state['a'][1]" in errors[0].failures[1] or "state.a[1]" in errors[0].failures[1]


def test_a_component_whose_own_code_raises_on_one_rank_is_named_on_all(job):
    def broken() -> dict:
        raise RuntimeError("no such buffer")

    def declare(rank: int) -> list[StateComponent]:
        return [component("state", {}, PER_RANK, get_state=broken if rank == 2 else dict)]

    for error in job.run(3, declare, save(1)).errors:
        assert isinstance(error, SaveAbortedError)
        assert "no such buffer" in error.failures[2]


def test_after_a_failed_save_the_next_one_works(job):
    bad = {"on": True}

    def state() -> dict:
        if bad["on"]:
            raise RuntimeError("not yet")
        return {"n": 4}

    def work(coordinator: CheckpointCoordinator, rank: int) -> str:
        with pytest.raises(SaveAbortedError):
            coordinator.save_checkpoint(step=1)
        bad["on"] = False
        return coordinator.save_checkpoint(step=2)

    declare = [component("state", {}, PER_RANK, get_state=state), component("x", {}, GLOBAL)]
    outcomes = job.run(
        2,
        lambda rank: (
            declare
            if rank == 0
            else [component("state", {}, PER_RANK, get_state=dict), component("x", {}, GLOBAL)]
        ),
        work,
    )
    assert outcomes.values == [str(job.output_dir / "checkpoint-2")] * 2


def test_a_closed_coordinator_refuses(job):
    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        coordinator.close()
        coordinator.close()
        with pytest.raises(ClosedError):
            coordinator.save_checkpoint(step=1)
        with pytest.raises(ClosedError):
            coordinator.load_checkpoint()

    job.run(1, lambda _: [], work).values  # noqa: B018


def test_the_settings_are_checked(tmp_path):
    for wrong in ({"timeout_s": 0}, {"max_shard_size": 0}, {"io_threads": 0}, {"keep_last": 0}):
        with pytest.raises(ConfigError):
            CoordinatorConfig(**wrong)
    with pytest.raises(InvalidNameError):
        CoordinatorConfig(branch="../x")


# --- fencing -------------------------------------------------------------------------------------


def test_the_newer_writer_of_a_branch_fences_the_older_which_deletes_nothing(job, tmp_path):
    def coordinator() -> CheckpointCoordinator:
        return CheckpointCoordinator([component("s", {"n": 1}, GLOBAL)], output_dir=job.output_dir)

    with coordinator() as old, coordinator() as new:
        old.save_checkpoint(step=1)
        new.save_checkpoint(step=2)
        with pytest.raises(FencedError):
            old.save_checkpoint(step=3)
        with pytest.raises(FencedError):
            old.save_checkpoint(step=4)
        new.save_checkpoint(step=3)
    steps = [c.step for c in open_repository(job.output_dir).state().commits]
    assert sorted(steps) == [1, 2, 3]


# --- loads that must not happen ------------------------------------------------------------------


def test_names_shapes_and_dtypes_that_do_not_fit_are_reported_together(job):
    saved = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    live = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3), "c": torch.nn.Linear(2, 2)})
    live["a"].bias = torch.nn.Parameter(torch.zeros(2))
    job.run(2, lambda _: [component("model", saved, REPLICATED)], save(1)).values  # noqa: B018
    before = {name: t.clone() for name, t in live.state_dict().items()}
    for error in job.run(2, lambda _: [component("model", live, REPLICATED)], load()).errors:
        assert isinstance(error, StateMismatchError)
        assert set(error.missing) == {"model.c.weight", "model.c.bias"}
        assert set(error.unexpected) == {"model.b.weight", "model.b.bias"}
        assert [text.partition(":")[0] for text in error.mismatched] == ["model.a.weight"]
    assert equal(dict(live.state_dict()), before)
    work = load(strict=False)
    (report,) = job.run(1, lambda _: [component("model", live, REPLICATED)], work).values
    assert len(report.missing) == len(report.unexpected) == 2
    assert torch.equal(live["a"].bias, saved["a"].bias)
    assert torch.equal(live["a"].weight, before["a.weight"])


def test_an_optimizer_over_other_parameters_is_refused_before_the_load(job):
    def optimizer(count: int) -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1)) for _ in range(count)], lr=0.1)

    job.run(1, lambda _: [component("opt", optimizer(3), GLOBAL)], save(1)).values  # noqa: B018
    (error,) = job.run(1, lambda _: [component("opt", optimizer(2), GLOBAL)], load()).errors
    assert isinstance(error, StateMismatchError)
    assert "param_groups" in error.mismatched[0]


def test_per_rank_state_on_another_number_of_ranks_is_refused_by_name(job):
    def declare(rank: int) -> list[StateComponent]:
        return [component("model", weights(), REPLICATED), component("rng", {"r": rank}, PER_RANK)]

    job.run(4, declare, save(1)).values  # noqa: B018
    for error in job.run(2, declare, load()).errors:
        assert isinstance(error, StateMismatchError)
        (why,) = error.missing
        assert "rng (it was saved PER_RANK by 4 ranks and is PER_RANK on 2 now" in why
        assert "its copies differ at rng.r" in why
    report = job.run(2, declare, load(strict=False)).values[1]
    assert report.loaded == ("model",)
    assert set(report.skipped) == {"rng"}


def test_a_component_that_is_not_required_may_be_absent(job):
    job.run(1, lambda _: [component("a", {"n": 1}, GLOBAL)], save(1)).values  # noqa: B018
    needs = [component("a", {}, GLOBAL), component("b", {}, GLOBAL)]
    (error,) = job.run(1, lambda _: needs, load()).errors
    assert isinstance(error, StateMismatchError)
    wants = [component("a", {}, GLOBAL), component("b", {}, GLOBAL, required=False)]
    (report,) = job.run(1, lambda _: wants, load()).values
    assert (report.loaded, set(report.skipped)) == (("a",), {"b"})


def test_what_the_checkpoint_has_and_nobody_declares_is_reported(job):
    declare = [component("a", {"n": 1}, GLOBAL), component("b", {}, GLOBAL)]
    job.run(1, lambda _: declare, save(1)).values  # noqa: B018
    (report,) = job.run(1, lambda _: declare[:1], load()).values
    assert report.unexpected == ("b",)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damage_on_disk_is_an_error_on_every_rank_and_changes_nothing_live(job, damage):
    job.run(2, lambda _: [component("model", weights(), REPLICATED)], save(1)).values  # noqa: B018
    folder = job.output_dir / "checkpoint-1"
    target = folder / (
        "checkpoint_manifest.json" if damage == "manifest" else "model-00002-of-00002.safetensors"
    )
    data = bytearray(target.read_bytes())
    data[-5] ^= 1
    target.unlink()
    if damage != "remove":
        target.write_bytes(data[: -9 if damage == "truncate" else None])
    live = {name: torch.zeros_like(t) for name, t in weights().items()}
    for error in job.run(2, lambda _: [component("model", live, REPLICATED)], load()).errors:
        assert isinstance(error, CorruptError)
        assert target.name in str(error)
    assert all(not t.any() for t in live.values())


def test_a_rank_that_cannot_read_its_part_stops_the_load_everywhere(job):
    def declare(held: dict) -> list[StateComponent]:
        return [component("model", held["m"], REPLICATED), component("rng", held["r"], PER_RANK)]

    job.run(3, lambda r: declare({"m": weights(), "r": {"t": torch.ones(r + 1)}}), save(1)).values  # noqa: B018
    shard = job.output_dir / "checkpoint-1" / "rng.rank00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    live = [{"m": {n: t * 0 for n, t in weights().items()}, "r": {}} for _ in range(3)]
    for error in job.run(3, lambda rank: declare(live[rank]), load()).errors:
        assert isinstance(error, DigestMismatchError)
        assert (error.path, error.tensor) == (f"checkpoint-1/{shard.name}", "t")
        assert "(found by rank 1)" in str(error)
    assert all(not t.any() for one in live for t in one["m"].values())
    assert all(not one["r"] for one in live)


def test_the_next_save_goes_beside_the_debris_of_a_crashed_one(job):
    declare = [component("state", {"n": 1}, GLOBAL)]
    job.run(1, lambda _: declare, save(1)).values  # noqa: B018
    shutil.copytree(job.output_dir / "checkpoint-1", job.output_dir / "checkpoint-2")
    (error,) = job.run(1, lambda _: declare, load("main@2")).errors
    assert isinstance(error, RefNotFoundError)
    (path,) = job.run(1, lambda _: declare, save(2)).values
    assert re.fullmatch(r"checkpoint-2\.[0-9a-f]{8}", Path(path).name)
    repository = open_repository(job.output_dir)
    assert verify_checkpoint(repository, repository.resolve("main@2")).ok
