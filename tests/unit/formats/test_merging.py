"""Averages: their laws, and what has none."""

from __future__ import annotations

import os
from collections import OrderedDict
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptcoord
from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord.core.refs import BranchName
from ckptcoord.dist.sharded import Sharded
from ckptcoord.errors import (
    BranchExistsError,
    ConfigError,
    CorruptError,
    NotMergeableError,
    StateMismatchError,
    StorageFullError,
)
from ckptcoord.formats.averaging import How, Rules
from ckptcoord.formats.merging import Merge, merge
from ckptcoord.testing.ranks import run_ranks

BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}
BITS |= {torch.bfloat16: torch.int16}


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def saved(root, *states, compression="off"):
    """A repository with a checkpoint of each of these models: main@1, main@2, ..."""
    live = OrderedDict(states[0])
    model = StateComponent(
        "model", {}, SharingPattern.REPLICATED, get_state=lambda: live, set_state=print
    )
    optimizer = StateComponent("optimizer", {"lr": 0.1}, SharingPattern.REPLICATED)
    config = CoordinatorConfig(compression=compression)
    with CheckpointCoordinator([model, optimizer], output_dir=root, config=config) as coordinator:
        for step, state in enumerate(states, 1):
            live = OrderedDict(state)
            coordinator.save_checkpoint(step=step)
    return root


def merged(root, *weights, refs=(), into="soup", dry_run=False, **wanted):
    repository = ckptcoord.open_repository(root)
    given = {name: wanted.pop(name) for name in ("normalise", "keep_first") if name in wanted}
    rules = Rules(**given)
    refs = refs or [f"main@{step}" for step in range(1, len(weights) + 1)]
    parts = [(repository.resolve(ref), weight) for ref, weight in zip(refs, weights, strict=True)]
    asked = Merge(parts=tuple(parts), into=BranchName(into), rules=rules, **wanted)
    return merge(repository, asked, dry_run=dry_run)


def model(root, ref="soup"):
    found = ckptcoord.load(root, ref)
    assert isinstance(found, dict)
    assert list(found) == ["model"], "and no optimizer"
    return found["model"]


def exact(values, weights):
    """The average in rational numbers, rounded once."""
    total = sum(Fraction(v) * Fraction(w) for v, w in zip(values, weights, strict=True))
    return float(total / sum(map(Fraction, weights)))


weight = st.floats(0.01, 100)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), weights=st.lists(weight, min_size=2, max_size=4))
def test_an_average_is_the_exact_one_to_the_last_bit_but_one(tmp_path_factory, seed, weights):
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-6, 6, (1,), generator=generator)
    draws = [torch.randn(40, generator=generator, dtype=torch.float64) * scale for _ in weights]
    states = [
        {
            "single": draw.float(),
            "brain": draw.bfloat16(),
            "half": draw.clamp(-6e4, 6e4).half(),
        }
        for draw in draws
    ]
    root = saved(tmp_path_factory.mktemp("it") / "run", *states)

    merged(root, *weights)

    for name, tensor in model(root).items():
        columns = zip(*(state[name].tolist() for state in states), strict=True)
        expected = torch.tensor([exact(column, weights) for column in columns]).to(tensor.dtype)
        bits = BITS[tensor.dtype]
        assert (tensor.view(bits).long() - expected.view(bits).long()).abs().max() <= 1, name


@pytest.mark.parametrize("dtype", list(BITS))
@pytest.mark.parametrize("compression", ["off", "auto"])
def test_the_average_of_equals_is_that_bit_for_bit(tmp_path, dtype, compression) -> None:
    state = {
        "w": torch.randn(3000).to(dtype),
        "odd": torch.tensor([float("inf"), -0.0, float("nan")]).to(dtype),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 2, dtype=dtype),
        "scalar": torch.tensor(0.1, dtype=dtype),
    }
    root = saved(tmp_path / "run", state, state, state, compression=compression)

    report = merged(root, 0.1, 0.3, 7.0)

    assert report.counts[How.EQUAL] == 5
    for name, tensor in model(root).items():
        assert torch.equal(tensor.nan_to_num(9.0), state[name].nan_to_num(9.0)), name
    assert model(root)["odd"].signbit()[1]


def test_it_is_the_same_however_many_threads_and_wherever_in_a_tensor(tmp_path) -> None:
    base = torch.randn(3)
    other = torch.randn(3)
    long = [one.repeat(700_001) for one in (base, other)]  # longer than a chunk, no multiple of it
    root = saved(tmp_path / "run", {"w": long[0]}, {"w": long[1]})
    threads = torch.get_num_threads()
    try:
        merged(root, 0.3, 0.9)
        torch.set_num_threads(1)
        merged(root, 0.3, 0.9, into="again")
    finally:
        torch.set_num_threads(threads)

    found = model(root)["w"]
    assert torch.equal(found, model(root, "again")["w"])
    assert torch.equal(found, found[:3].repeat(700_001))


def test_weights_as_given_make_task_arithmetic(tmp_path) -> None:
    tuned, base, other = ({"w": torch.tensor([value, 1.0])} for value in (5.0, 2.0, 7.0))
    root = saved(tmp_path / "run", tuned, base, other)

    merged(root, 1.0, -1.0, 1.0, normalise=False)

    assert model(root)["w"].tolist() == [10.0, 1.0]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "weights", [(1.0,), (0.0, 0.0), (1.0, -0.5), (1.0, NAN), (1.0, INF), (1e308, 1e308)]
)
def test_weights_that_make_no_average_are_refused(tmp_path, weights) -> None:
    root = saved(tmp_path / "run", {"w": torch.ones(1)}, {"w": torch.ones(1)})

    with pytest.raises(ConfigError, match="--average"):
        merged(root, *weights)


# --- the new branch -------------------------------------------------------------------------------


def test_the_new_branch_begins_at_the_first_and_says_what_it_is(tmp_path) -> None:
    root = saved(tmp_path / "run", *({"w": torch.full((2,), float(i))} for i in range(3)))

    report = merged(root, 1.0, 3.0, refs=["main@3", "main@1"])

    repository = ckptcoord.open_repository(root)
    commit = repository.resolve("soup")
    assert (report.ref, commit.checkpoint_id.ref) == ("soup@3", "soup@3")
    assert report.path == str(root / "checkpoint-3@soup")
    assert commit.parent is not None
    assert commit.parent.ref == "main@3"
    assert "Average of main@3 x 0.25, main@1 x 0.75" in commit.message
    assert "no optimizer" in commit.message
    manifest = repository.manifest(commit)
    terms = manifest.components["model"].metadata["average_of"]
    assert [(one["ref"], one["weight"]) for one in terms] == [("main@3", 0.25), ("main@1", 0.75)]
    assert model(root)["w"].tolist() == [0.5, 0.5]
    step = merged(root, 1.0, 1.0, into="named", step=70, message="mine")
    assert step.ref == "named@70"
    assert repository.resolve("named").message.startswith("mine\n")


def test_deltas_are_averaged_as_what_they_stand_for(tmp_path) -> None:
    base = torch.randn(5000)
    states = [{"w": base + step * 1e-3, "still": base} for step in range(3)]
    root = saved(tmp_path / "run", *states, compression="auto")
    assert ckptcoord.open_repository(root).resolve("main@3").needs, "it is a delta"

    report = merged(root, 1.0, 1.0, refs=["main@2", "main@3"])

    assert (report.counts[How.AVERAGE], report.counts[How.EQUAL]) == (1, 1)
    expected = (states[1]["w"].double() + states[2]["w"].double()) / 2
    assert torch.equal(model(root)["w"], expected.float())


def test_a_strict_load_names_what_is_missing_and_a_lenient_one_takes_the_model(tmp_path) -> None:
    root = saved(tmp_path / "run", *({"w": torch.full((2,), float(i))} for i in range(2)))
    merged(root, 1.0, 1.0)
    state, lr = {"w": torch.zeros(2)}, {"lr": 0.7}
    components = [
        StateComponent("model", state, SharingPattern.REPLICATED),
        StateComponent("optimizer", lr, SharingPattern.REPLICATED),
    ]
    with CheckpointCoordinator(components, output_dir=root) as coordinator:
        with pytest.raises(StateMismatchError, match="optimizer"):
            coordinator.load_checkpoint("soup")
        coordinator.load_checkpoint("soup", strict=False)

    assert (state["w"].tolist(), lr) == ([0.5, 0.5], {"lr": 0.7})


def test_a_branch_that_is_there_is_refused_before_anything(tmp_path) -> None:
    root = saved(tmp_path / "run", {"w": torch.ones(1)}, {"w": torch.zeros(1)})

    with pytest.raises(BranchExistsError):
        merged(root, 1.0, 1.0, into="main")
    merged(root, 1.0, 1.0)
    number = ckptcoord.open_repository(root).state().number
    with pytest.raises(BranchExistsError):
        merged(root, 1.0, 1.0)
    assert ckptcoord.open_repository(root).state().number == number


def test_a_merge_that_was_killed_after_it_began_the_branch_goes_on(tmp_path, monkeypatch) -> None:
    root = saved(tmp_path / "run", {"w": torch.ones(1)}, {"w": torch.zeros(1)})

    def killed(*_, **__) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointCoordinator, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            merged(root, 1.0, 1.0)
    assert ckptcoord.open_repository(root).resolve("soup").checkpoint_id.ref == "main@1"
    with pytest.raises(BranchExistsError):
        merged(root, 1.0, 1.0, refs=["main@2", "main@1"])

    assert merged(root, 1.0, 1.0).ref == "soup@2"


def test_nothing_is_left_in_the_repository_but_the_checkpoint(tmp_path) -> None:
    root = saved(tmp_path / "run", {"w": torch.ones(99)}, {"w": torch.zeros(99)})
    before = {path for path in root.rglob("*") if path.is_file()}

    merged(root, 1.0, 1.0)

    added = {path for path in root.rglob("*") if path.is_file()} - before
    assert {path.parent.name for path in added} == {"log", "checkpoint-2@soup"}


# --- what has no average --------------------------------------------------------------------------


GOOD = {"w": torch.ones(2, 3), "n": torch.tensor(4)}


@pytest.mark.parametrize(
    ("other", "problem", "dry"),
    [
        ({"w": torch.ones(3, 2)}, "w: [2, 3], but [3, 2] in main@2", True),
        ({"n": torch.tensor(5)}, "n: I64 tensors that differ", True),
        ({"n": torch.tensor(4.0)}, "n: I64, but F32 in main@2", True),
        ({"extra": torch.ones(1)}, "extra: only in main@2", True),
        ({"w": None}, "w: not in main@2", True),
        ({"note": "x"}, "main@2: what is no tensor differs", True),
        ({"w": torch.full((2, 3), float("nan"))}, "w: NaN in main@2", False),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path, other, problem, dry) -> None:
    changed = {name: value for name, value in (GOOD | other).items() if value is not None}
    root = saved(tmp_path / "run", GOOD, changed)
    number = ckptcoord.open_repository(root).state().number

    assert (problem in merged(root, 1.0, 1.0, dry_run=True).problems) == dry
    with pytest.raises(NotMergeableError) as caught:
        merged(root, 1.0, 1.0)

    assert problem in caught.value.problems
    assert ckptcoord.open_repository(root).state().number == number


def test_all_problems_are_named_at_once(tmp_path) -> None:
    states = [{f"n{i}": torch.tensor(i + one) for i in range(20)} for one in (0, 1)]
    root = saved(tmp_path / "run", *states)

    with pytest.raises(NotMergeableError, match="and 12 more") as caught:
        merged(root, 1.0, 1.0)
    assert len(caught.value.problems) == 20


def test_infinities_that_cancel_and_what_is_too_large(tmp_path) -> None:
    inf = float("inf")
    states = [
        {"a": torch.tensor([inf]), "b": torch.tensor([6e4]).half()},
        {"a": torch.tensor([-inf]), "b": torch.tensor([6e4 - 32]).half()},
    ]
    root = saved(tmp_path / "run", *states)

    with pytest.raises(NotMergeableError) as caught:
        merged(root, 1.0, 1.0, normalise=False)
    assert caught.value.problems == ("a: infinities cancel one another", "b: too large for F16")


def test_integers_of_the_first_where_that_is_asked_for(tmp_path) -> None:
    root = saved(tmp_path / "run", GOOD, GOOD | {"n": torch.tensor(5), "w": torch.zeros(2, 3)})

    report = merged(root, 1.0, 1.0, keep_first=True)

    assert report.counts == {How.AVERAGE: 1, How.EQUAL: 0, How.COMPARE: 0, How.FIRST: 1}
    assert model(root)["n"] == 4
    assert model(root)["w"].tolist() == [[0.5] * 3] * 2


def test_floats_of_two_dtypes_come_in_that_of_the_first(tmp_path) -> None:
    root = saved(
        tmp_path / "run", {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0]).bfloat16()}
    )

    merged(root, 1.0, 1.0)

    assert model(root)["w"].dtype == torch.float32
    assert model(root)["w"].tolist() == [1.5]


def test_arrays_stay_arrays_and_ties_stay_ties(tmp_path) -> None:
    states = []
    for i in range(2):
        shared = torch.full((3,), float(i))
        states.append({"a": shared, "b": shared, "np": np.full(2, i, np.float64)})
    root = saved(tmp_path / "run", *states)

    merged(root, 1.0, 1.0)

    found = model(root)
    assert found["a"] is found["b"]
    assert isinstance(found["np"], np.ndarray)
    assert found["np"].tolist() == [0.5, 0.5]


def test_a_damaged_checkpoint_and_no_space(tmp_path, monkeypatch) -> None:
    root = saved(tmp_path / "run", {"w": torch.ones(99)}, {"w": torch.zeros(99)})
    number = ckptcoord.open_repository(root).state().number
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(StorageFullError):
            merged(root, 1.0, 1.0)
    shard = root / "checkpoint-2/model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")

    with pytest.raises(CorruptError):
        merged(root, 1.0, 1.0)
    assert ckptcoord.open_repository(root).state().number == number


def _save_rows(world, root):
    for step, value in ((1, 1.0), (2, 2.0)):
        rows = torch.full((2, 3), value + world.rank)
        count = torch.full((2,), world.rank)
        parts = {
            "w": Sharded(rows, (2 * world.rank, 0), (4, 3)),
            "n": Sharded(count, (2 * world.rank,), (4,)),
        }
        model = StateComponent("model", parts, SharingPattern.PER_GROUP, "all")
        config = CoordinatorConfig()
        with CheckpointCoordinator(
            [model], {"all": [0, 1]}, world, root, config=config
        ) as coordinator:
            coordinator.save_checkpoint(step=step)


def test_parts_of_tensors_are_put_together_first(tmp_path) -> None:
    root = tmp_path / "run"
    for future in run_ranks(2, lambda world: _save_rows(world, root)).futures:
        future.result()

    report = merged(root, 1.0, 1.0)

    assert report.counts[How.COMPARE] == 1
    assert model(root)["w"].tolist() == [[1.5] * 3] * 2 + [[2.5] * 3] * 2
    assert model(root)["n"].tolist() == [0, 0, 1, 1]


def test_a_step_that_cannot_be(tmp_path) -> None:
    root = saved(tmp_path / "run", {"w": torch.ones(1)}, {"w": torch.zeros(1)})

    with pytest.raises(ckptcoord.CkptError):
        merged(root, 1.0, 1.0, step=10**18)
