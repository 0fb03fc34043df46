"""What is given up is what was asked for, is said, and does not add up."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ckptcoord
from ckptcoord import (
    CheckpointCoordinator,
    Compression,
    CoordinatorConfig,
    Lossy,
    SharingPattern,
    StateComponent,
)
from ckptcoord.codec.recipe import How, SourceFile
from ckptcoord.core.lossy import CompressionLevel
from ckptcoord.dist.optimizer import OptimizerState
from ckptcoord.errors import CkptError, ConfigError
from ckptcoord.plan.lineage import BaseChoice, Precision
from ckptcoord.repo.attempt import Attempt
from ckptcoord.repo.deltas import DeltaReader, SourceFiles

if TYPE_CHECKING:
    from collections.abc import Iterator

AUTO = CompressionLevel.AUTO
BOUNDED = Compression(level=AUTO, precision=Precision.BOUNDED)


def part(key: str, state: object) -> StateComponent:
    return StateComponent(key, state, SharingPattern.REPLICATED)


def component(job: Any, step: int, key: str = "model") -> dict[str, Any]:
    path = job.output_dir / f"checkpoint-{step}" / "checkpoint_manifest.json"
    found: dict[str, Any] = json.loads(path.read_text())["components"][key]
    return found


def recipes(job: Any, step: int, key: str = "model") -> Iterator[Any]:
    repository = ckptcoord.open_repository(job.output_dir)
    commit = repository.resolve(f"main@{step}")
    for record in repository.manifest(commit).files:
        if record.component == key and record.kind.value == "delta":
            with repository.open_shard(commit, record) as reader:
                assert isinstance(reader, DeltaReader)
                yield from reader.recipes.values()


def load(job: Any, step: int, like: dict[str, Any]) -> dict[str, Any]:
    got = {name: torch.zeros_like(v) if torch.is_tensor(v) else v for name, v in like.items()}
    work = lambda coordinator, _: coordinator.load_checkpoint(f"main@{step}")  # noqa: E731
    job.do(1, lambda _: [part("model", got)], work)
    return got


@pytest.mark.parametrize("base", list(BaseChoice))
def test_bounded_updates_stay_within_half_a_step_of_the_truth_however_many_saves(job, base):
    torch.manual_seed(0)
    live: dict[str, Any] = {"w": torch.randn(200, 200), "n": torch.tensor(5), "lr": 0.1}
    seen = {}
    rule = Compression(level=AUTO, base=base, lossy={"model": Lossy(update_fraction=0.1)})

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in range(1, 7):
            live["w"] += 1e-3 * torch.randn(200, 200)
            live["n"] += 1
            coordinator.save_checkpoint(step=step)
            seen[step] = live["w"].clone()

    job.do(1, lambda _: [part("model", live)], work, compression=rule)
    assert torch.equal(load(job, 1, live)["w"], seen[1]), "an anchor is exact"
    for step in range(2, 7):
        (recipe,) = [one for one in recipes(job, step) if one.spec.name == "w"]
        assert recipe.how is How.UPDATE
        got = load(job, step, live)
        apart = (got["w"] - seen[step]).abs()
        beside_zero = got["w"].abs() <= recipe.step
        assert 0 < apart[~beside_zero].max() <= recipe.step / 2 * 1.01
        assert apart.max() <= recipe.step * 1.01
        assert torch.equal(got["w"].sign(), seen[step].sign())
        assert recipe.given_up.max_abs == pytest.approx(apart.max().item(), rel=1e-3)
        assert got["n"] == live["n"] - (6 - step), "what is no float is exact"
    assert component(job, 6)["given_up_tensors"] == 1
    assert component(job, 6)["given_up"] > 0
    assert component(job, 1)["given_up_tensors"] == 0


def test_a_tensor_with_a_new_zero_is_exact_and_zeros_that_stay_are_zeros(job):
    torch.manual_seed(0)
    live = {"w": torch.randn(5000)}
    live["w"][:10] = 0.0
    kinds: dict[int, How] = {}

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in range(1, 5):
            coordinator.save_checkpoint(step=step)
            live["w"][10:] += 1e-3 * torch.randn(4990)
            if step >= 2:
                live["w"][: 9 + step] = 0.0

    rule = Compression(
        level=AUTO, base=BaseChoice.PREVIOUS, lossy={"model": Lossy(update_fraction=0.25)}
    )
    job.do(1, lambda _: [part("model", live)], work, compression=rule)
    for step in (2, 3, 4):
        kinds[step] = next(recipes(job, step)).how
        zeros = (load(job, step, live)["w"] == 0).sum().item()
        assert zeros == {2: 10, 3: 11, 4: 12}[step]
    assert kinds == {2: How.UPDATE, 3: How.CODED, 4: How.CODED}


@pytest.mark.parametrize("fails", [False, True], ids=["", "one fails"])
def test_a_chain_of_bounded_saves_reads_no_chain(job, monkeypatch, fails):
    """What readers will have is kept; where it is not known to be that, it is read."""
    torch.manual_seed(0)
    live: dict[str, Any] = {"w": torch.randn(100, 100), "m": torch.randn(100, 100)}
    opened: list[str] = []
    ordinary = SourceFiles.open

    def open_counted(files: SourceFiles, file: SourceFile, folder: str = "") -> Any:
        opened.append(file.path)
        return ordinary(files, file, folder)

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        monkeypatch.setattr(SourceFiles, "open", open_counted)
        for step in range(1, 7):
            live["w"] += 1e-3 * torch.randn(100, 100)
            opened.clear()
            if fails and step == 4:
                with monkeypatch.context() as patch:
                    patch.setattr(Attempt, "write_file", lambda *_: 1 / 0)
                    with pytest.raises(CkptError):
                        coordinator.save_checkpoint(step=step)
                coordinator.save_checkpoint(step=step)
                assert opened, "what the failed save made is no base"
                continue
            coordinator.save_checkpoint(step=step)
            assert not opened or step == 2, "after the anchor, which is exact"

    rule = Compression(
        level=AUTO, base=BaseChoice.PREVIOUS, lossy={"model": Lossy(update_fraction=0.1)}
    )
    job.do(1, lambda _: [part("model", live)], work, compression=rule)
    got = load(job, 6, live)
    assert torch.allclose(got["w"], live["w"], rtol=0, atol=1e-3)
    assert not torch.equal(got["w"], live["w"])


def test_what_is_next_to_nothing_beside_its_base_is_exact(job):
    """The error of an update would be more than a double's range times the tensor."""
    live: dict[str, Any] = {"w": torch.full((2000,), 1e150, dtype=torch.float64)}

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step, value in enumerate((1e150, 1e-300), 1):
            live["w"].fill_(value)
            live["w"][0] = 0.0
            coordinator.save_checkpoint(step=step)

    rule = Compression(level=AUTO, lossy={"model": Lossy(update_fraction=0.3)})
    job.do(1, lambda _: [part("model", live)], work, compression=rule)
    got = load(job, 2, live)
    (recipe,) = recipes(job, 2)
    assert (recipe.how is How.CODED) == (recipe.given_up is None)
    assert recipe.given_up is not None or torch.equal(got["w"], live["w"])


@pytest.mark.parametrize("lossy", [Lossy(update_fraction=0.1), Lossy(mantissa_bits=3)])
def test_what_was_loaded_again_is_named_where_it_is(job, lossy):
    """Of what is approximated each time only the approximation is hashed, unless it is exact."""
    torch.manual_seed(0)
    live: dict[str, Any] = {"w": torch.randn(100, 100)}

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in range(1, 5):
            live["w"] += 1e-3 * torch.randn(100, 100)
            coordinator.save_checkpoint(step=step)
        for step in (4, 3):
            coordinator.load_checkpoint(f"main@{step}")
            coordinator.save_checkpoint(step=9 - step)

    rule = Compression(level=AUTO, base=BaseChoice.PREVIOUS, lossy={"model": lossy})
    job.do(1, lambda _: [part("model", live)], work, compression=rule)
    for step in (5, 6):
        (recipe,) = recipes(job, step)
        assert recipe.how is How.SAME
        assert recipe.given_up is None
        assert recipe.source[0].folder == f"checkpoint-{9 - step}"
        assert torch.equal(load(job, step, live)["w"], load(job, 9 - step, live)["w"])


def test_where_a_base_is_damaged_there_is_an_anchor(job):
    live: dict[str, Any] = {"w": torch.randn(100_000)}

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        rule = coordinator._session.config.rule
        assert rule.base is BaseChoice.PREVIOUS
        for step in (1, 2, 3):
            live["w"] += 1e-3
            coordinator.save_checkpoint(step=step)
        (delta,) = (job.output_dir / "checkpoint-3").glob("*.delta.safetensors")
        raw = bytearray(delta.read_bytes())
        raw[-50_000:-40_000] = bytes(10_000)
        delta.write_bytes(raw)
        live["w"] += 1e-3
        coordinator.save_checkpoint(step=4)

    rule = Compression(level=AUTO, base=BaseChoice.PREVIOUS)
    job.do(1, lambda _: [part("model", live)], work, compression=rule)
    assert torch.equal(load(job, 4, live)["w"], live["w"])


def test_bounded_is_much_smaller_and_leaves_an_optimizers_steps_and_signs_alone(job):
    torch.manual_seed(0)
    model = torch.nn.Linear(256, 256)
    optimizer = torch.optim.AdamW(model.parameters())

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in range(1, 4):
            model(torch.randn(8, 256)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            coordinator.save_checkpoint(step=step)

    components = [part("model", model), part("optimizer", optimizer)]
    job.do(1, lambda _: components, work, compression=BOUNDED)
    for key in ("model", "optimizer"):
        assert component(job, 3, key)["stored_bytes"] < component(job, 1, key)["stored_bytes"] / 4
    repository = ckptcoord.open_repository(job.output_dir)
    found = ckptcoord.load(repository.url)
    assert isinstance(found, dict)
    for index, live in optimizer.state_dict()["state"].items():
        got = found["optimizer"]["state"][index]
        assert torch.equal(got["step"], live["step"])
        assert torch.equal(got["exp_avg"].sign(), live["exp_avg"].sign())
        assert not (got["exp_avg_sq"] < 0).any()
        error = (got["exp_avg_sq"] - live["exp_avg_sq"]).abs()
        assert (error <= live["exp_avg_sq"].abs() * 0.25).all()
        error = (got["exp_avg"] - live["exp_avg"]).abs()
        assert (error <= live["exp_avg"].abs() * 0.25).all()
    names = {one.spec.name: one.given_up for one in recipes(job, 3, "optimizer")}
    assert names["state.0.step"] is None
    assert names["state.0.exp_avg"] is not None


def test_a_tensor_under_the_threshold_is_left_out_and_its_change_adds_up_until_it_is_not(job):
    live = {"w": torch.ones(1000), "nan": torch.full((4,), float("nan"))}
    rule = Compression(level=AUTO, change_threshold=0.01)
    errors = []

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in range(1, 8):
            coordinator.save_checkpoint(step=step)
            live["w"] += 0.004

    job.do(1, lambda _: [part("model", live)], work, compression=rule)
    for step in range(1, 8):
        truth = torch.ones(1000)
        for _ in range(step - 1):
            truth += 0.004
        errors.append((load(job, step, live)["w"] - truth).abs().max().item())
    assert errors[0] == 0
    assert errors[1] > 0, "0.4 % is under 1 %"
    assert max(errors) < 0.011, "measured against what is stored: it never adds up"
    assert 0.0 in errors[2:], "it was written when it had changed by more"
    assert component(job, 2)["given_up_tensors"] == 1


def test_a_tensor_that_became_nan_is_never_taken_for_unchanged(job):
    live = {"w": torch.ones(1000)}
    rule = Compression(level=AUTO, change_threshold=0.5)

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        coordinator.save_checkpoint(step=1)
        live["w"][3] = float("nan")
        coordinator.save_checkpoint(step=2)

    job.do(1, lambda _: [part("model", live)], work, compression=rule)
    assert torch.isnan(load(job, 2, live)["w"][3])
    assert component(job, 2)["given_up_tensors"] == 0


def test_bounded_updates_are_against_the_save_before_unless_said_otherwise():
    assert BOUNDED.base is BaseChoice.PREVIOUS
    assert Compression(level=AUTO).base is BaseChoice.ANCHOR
    star = Compression(level=AUTO, precision=Precision.BOUNDED, base=BaseChoice.ANCHOR)
    assert star.base is BaseChoice.ANCHOR


def test_exact_is_the_default(job):
    live = {"w": torch.randn(1000)}

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in range(1, 4):
            live["w"] += 1e-4
            coordinator.save_checkpoint(step=step)

    job.do(1, lambda _: [part("model", live)], work, compression="auto")
    assert torch.equal(load(job, 3, live)["w"], live["w"])
    assert component(job, 3)["given_up"] == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"change_threshold": -1},
        {"change_threshold": float("nan")},
        {"update_fraction": 1.0},
        {"update_fraction": "0.1"},
        {"mantissa_bits": -1},
        {"mantissa_bits": 1.5},
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Lossy(**bad)


def test_a_setting_of_a_component_that_there_is_not_is_refused_before_anything_is_made(tmp_path):
    rule = Compression(level=AUTO, lossy={"modle": Lossy(update_fraction=0.1)})
    config = CoordinatorConfig(compression=rule)
    with pytest.raises(ConfigError, match=r"'modle'.*no component") as caught:
        CheckpointCoordinator(
            [part("model", {"w": torch.ones(4)})], output_dir=tmp_path / "run", config=config
        )
    assert "model" in caught.value.help
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rule", "own", "field"),
    [
        (Compression(precision=Precision.BOUNDED), None, "precision"),
        (Compression(change_threshold=0.1), None, "change_threshold"),
        (Compression(lossy={"model": Lossy(mantissa_bits=3)}), None, "lossy"),
        (Compression(level=AUTO, precision=Precision.BOUNDED), "off", "precision"),
        (Compression(level=AUTO, lossy={"model": Lossy(mantissa_bits=3)}), "off", "lossy"),
    ],
)
def test_settings_that_no_component_is_coded_with_are_refused(tmp_path, rule, own, field):
    component = StateComponent("model", {}, SharingPattern.REPLICATED, compression=own)
    with pytest.raises(ConfigError, match=rf"compression\.{field}.*writes no deltas") as caught:
        CheckpointCoordinator(
            [component], output_dir=tmp_path / "run", config=CoordinatorConfig(compression=rule)
        )
    assert 'level="auto"' in caught.value.help
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lossy", [{}, {"model": Lossy(mantissa_bits=3)}, {"model": Lossy()}])
def test_a_level_of_a_components_own_is_enough(tmp_path, lossy):
    component = StateComponent("model", {}, SharingPattern.REPLICATED, compression=AUTO)
    rule = Compression(precision=Precision.BOUNDED, lossy=lossy)
    config = CoordinatorConfig(compression=rule)
    with CheckpointCoordinator([component], output_dir=tmp_path, config=config) as coordinator:
        assert coordinator.save_checkpoint(step=1)


# --- what is approximated at all -----------------------------------------------------------------


def network() -> torch.nn.Module:
    """Parameters and buffers large enough to be coded."""
    return torch.nn.Sequential(
        torch.nn.Linear(64, 2000, bias=False),
        torch.nn.BatchNorm1d(2000),
        torch.nn.Linear(2000, 2),
    )


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 64)).square().mean().backward()
        optimizer.step()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in one if torch.equal(one[name], other[name])]


@pytest.mark.parametrize("second", [0.95, 0.5])
def test_a_training_resumes_from_an_object_of_state_dicts(tmp_path, second):
    """A tree knows no module: its model is exact, its optimizer is known by how it is built."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, second))
    for _ in range(5):
        train(model, optimizer, 4)
        state = {"model": model.state_dict(), "run": {"optimizer": optimizer.state_dict()}}
        ckptcoord.save(state, tmp_path, compression=BOUNDED)
        got: Any = ckptcoord.load(tmp_path)
        for name, live in model.state_dict().items():
            assert torch.equal(got["model"][name], live), name
        for index, live in optimizer.state_dict()["state"].items():
            found = got["run"]["optimizer"]["state"][index]
            assert torch.equal(found["step"], live["step"])
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(found[name].sign(), live[name].sign())
                assert ((found[name] - live[name]).abs() <= live[name].abs() * 0.25).all()
    moments = got["run"]["optimizer"]["state"][0], optimizer.state_dict()["state"][0]
    assert same(*moments) == ["step"], "the others are approximated"
    resumed = network()
    again = torch.optim.AdamW(resumed.parameters())
    resumed.load_state_dict(got["model"])
    again.load_state_dict(got["run"]["optimizer"])
    train(resumed, again, 3)
    assert all(torch.isfinite(one).all() for one in resumed.state_dict().values())


def test_of_a_module_the_parameters_are_approximated_and_buffers_are_not(job):
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in range(1, 6):
            train(model, optimizer, 2)
            coordinator.save_checkpoint(step=step)

    job.do(1, lambda _: [part("model", model)], work, compression=BOUNDED)
    got: Any = ckptcoord.load(job.output_dir)
    small = {"2.bias", "1.num_batches_tracked"}
    buffers = {name for name, _ in model.named_buffers()}
    assert set(same(got["model"], model.state_dict())) == buffers | small
    restored = network()
    restored.load_state_dict(got["model"])
    assert torch.isfinite(restored.eval()(torch.randn(4, 64))).all()


class Wrapped:
    """As Accelerate's: torch's optimizer is an attribute."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


@pytest.mark.parametrize("kind", ["bound", "function", "wrapper", "named"])
def test_an_optimizer_is_known_however_it_is_declared(job, kind):
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.5))

    def declared() -> StateComponent:
        if kind == "wrapper":
            return part("optimizer", Wrapped(optimizer))
        if kind == "named":
            return part("optimizer", OptimizerState(optimizer, model))
        get = optimizer.state_dict if kind == "bound" else lambda: {**optimizer.state_dict()}
        pattern, put = SharingPattern.REPLICATED, optimizer.load_state_dict
        return StateComponent("optimizer", None, pattern, get_state=get, set_state=put)

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in range(1, 5):
            train(model, optimizer, 3)
            coordinator.save_checkpoint(step=step)

    job.do(1, lambda _: [declared()], work, compression=BOUNDED)
    got: Any = ckptcoord.load(job.output_dir)
    (found, *_), (live, *_) = (
        list(one["state"].values()) for one in (got["optimizer"], optimizer.state_dict())
    )
    assert not torch.equal(found["exp_avg_sq"], live["exp_avg_sq"]), "approximated"
    for name in ("exp_avg", "exp_avg_sq"):
        assert ((found[name] - live[name]).abs() <= live[name].abs() * 0.25).all()
    assert torch.equal(found["step"], live["step"])


@pytest.mark.parametrize("kind", ["optimizer", "tree"])
def test_of_moments_of_which_the_difference_counts_nothing_is_given_up(job, kind):
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, centered=True, momentum=0.9)

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in range(1, 4):
            train(model, optimizer, 3)
            coordinator.save_checkpoint(step=step)

    component = part("optimizer", optimizer)
    if kind == "tree":
        get, pattern = (lambda: {**optimizer.state_dict()}), SharingPattern.REPLICATED
        component = StateComponent("optimizer", None, pattern, get_state=get)
    job.do(1, lambda _: [component], work, compression=BOUNDED)
    found = ckptcoord.load(job.output_dir)["optimizer"]["state"][0]
    live = optimizer.state_dict()["state"][0]
    assert set(same(found, live)) == {"step", "square_avg", "grad_avg"}


def test_parameters_that_are_not_trained_are_exact(job):
    """They may be statistics, as of a codebook."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 2000)
    model.register_parameter("seen", torch.nn.Parameter(torch.rand(5000), requires_grad=False))

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in range(1, 4):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.9).add_(0.1 * torch.rand_like(parameter))
            coordinator.save_checkpoint(step=step)

    job.do(1, lambda _: [part("model", model)], work, compression=BOUNDED)
    found: Any = ckptcoord.load(job.output_dir)
    assert same(found["model"], model.state_dict()) == ["seen"]


@pytest.mark.parametrize("kind", ["bound", "wrapped"])
def test_a_module_is_known_by_its_own_state_dict_and_through_wrappers(job, kind):
    torch.manual_seed(0)
    inner: torch.nn.Module = torch.nn.Linear(64, 2000)
    model = torch.nn.Sequential(checkpoint_wrapper(inner) if kind == "wrapped" else inner)
    pattern, get = SharingPattern.REPLICATED, model.state_dict if kind == "bound" else None
    component = StateComponent("model", model, pattern, get_state=get)

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in range(1, 4):
            with torch.no_grad():
                inner.weight += 1e-3 * torch.randn(2000, 64)  # type: ignore[operator]
            coordinator.save_checkpoint(step=step)

    job.do(1, lambda _: [component], work, compression=BOUNDED)
    (recipe,) = [one for one in recipes(job, 3) if one.spec.name == "0.weight"]
    assert recipe.how is How.UPDATE


def test_what_is_not_known_is_exact_whatever_it_is_called(job):
    """No module and no optimizer: names alone say nothing."""
    torch.manual_seed(0)
    names = ("weight", "exp_avg", "exp_avg_sq", "sum", "momentum_buffer", "running_var")
    live: dict[str, Any] = {"state": {name: torch.rand(5000) for name in names}, "exp_avg_sq": 0.5}

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in range(1, 4):
            for value in live["state"].values():
                value.add_(1e-3 * torch.rand(5000))
            coordinator.save_checkpoint(step=step)

    module = StateComponent(
        "odd", torch.nn.Linear(1, 1), SharingPattern.REPLICATED, get_state=lambda: live["state"]
    )
    job.do(1, lambda _: [part("dataset", live), module], work, compression=BOUNDED)
    got: Any = ckptcoord.load(job.output_dir)
    assert same(got["dataset"]["state"], live["state"]) == list(names)
    assert same(got["odd"], live["state"]) == list(names)


def test_an_optimizers_step_counts_are_exact_whatever_may_be_given_up(job):
    count = torch.full((3,), 1000.0)
    live: dict[str, Any] = {
        "state": {0: {"step": count, "exp_avg": torch.ones(3)}},
        "param_groups": [{"params": [0]}],
    }

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in range(1, 4):
            count.add_(1)
            coordinator.save_checkpoint(step=step)

    rule = Compression(level=AUTO, change_threshold=0.5)
    job.do(1, lambda _: [part("optimizer", live)], work, compression=rule)
    got: Any = ckptcoord.load(job.output_dir)
    assert torch.equal(got["optimizer"]["state"][0]["step"], count)
