"""Real loaders of torchdata and Hugging Face datasets, in a real run."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.unit.trainers.tiny import Noisy, Spy, arguments, model, remains
from torch.utils.data import DataLoader

from ckptcoord.core.sharing import SharingPattern, StateComponent
from ckptcoord.dist.capture import capture
from ckptcoord.errors import ConfigError
from ckptcoord.trainers.data import ResumableLoader
from ckptcoord.trainers.foreign import ForeignLoader, adopt_loader, length_of
from ckptcoord.trainers.single import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
torchdata = pytest.importorskip("torchdata.stateful_dataloader")
datasets = pytest.importorskip("datasets")

SAMPLES, BATCHES = 13, 7  # of two, the last of one


class Quiet(Noisy):
    """Without noise, for workers of other libraries draw as they like."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.linspace(0, 1, 8) * (index + 1) / self.length
        return {"x": x, "y": x.sum().reshape(1)}


def stream(shards: int = 2) -> Any:
    """A Hugging Face stream of the same samples, whose shards change places each epoch."""
    rows = [Quiet(SAMPLES)[i] for i in range(SAMPLES)]
    columns = {name: [row[name].tolist() for row in rows] for name in ("x", "y")}
    whole = datasets.Dataset.from_dict(columns).to_iterable_dataset(num_shards=shards)
    return whole.with_format("torch")


def of_torchdata(dataset: Any, **given: Any) -> Any:
    return torchdata.StatefulDataLoader(dataset, batch_size=2, **given)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: of_torchdata(Noisy(SAMPLES), shuffle=True),
    "workers": lambda: of_torchdata(Quiet(SAMPLES), shuffle=True, num_workers=2),
    "stream": lambda: of_torchdata(stream()),
    "stream, worker": lambda: of_torchdata(stream(), num_workers=1),
    "stream, torch's": lambda: DataLoader(stream(), batch_size=2),
}


@pytest.fixture(autouse=True)
def _no_batch_norm_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn, "BatchNorm1d", torch.nn.LayerNorm)


def run(folder: Path, make: Callable[[], Any], *, seed: int = 1, **given: Any) -> Any:
    """Train with a loader that a user made, whose order is drawn with a seed."""

    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            torch.manual_seed(seed)
            return make()

    spy = Spy(stop_at=given.pop("stop_at", -1))
    trainer = Own(model(), arguments(folder, **{"max_steps": 16, **given}), callbacks=[spy])
    trainer.train()
    trainer.close()
    return trainer, spy


@pytest.mark.parametrize("at", [1, 6, 7, 9, 14])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_run_with_a_foreign_loader_goes_on_as_if_undisturbed(
    tmp_path: Path, kind: str, at: int
) -> None:
    make = LOADERS[kind]
    straight, heard = run(tmp_path / "straight", make)
    wanted = remains(straight)
    run(tmp_path / "run", make, stop_at=at)
    resumed, after = run(tmp_path / "run", make, seed=2, resume_from_checkpoint=True)
    assert isinstance(resumed.train_dataloader, ForeignLoader)
    assert after.losses == {step: loss for step, loss in heard.losses.items() if step > at}
    assert remains(resumed) == wanted


@pytest.mark.parametrize("kind", LOADERS)
def test_an_epoch_saved_after_its_end_is_not_given_again(tmp_path: Path, kind: str) -> None:
    make = LOADERS[kind]
    counted = {} if length_of(make()) is None else {"max_steps": -1, "num_train_epochs": 3}
    given = {"save_strategy": "epoch", **counted}
    _, heard = run(tmp_path, make, **given)
    _, after = run(tmp_path, make, seed=2, resume_from_checkpoint="main@14", branch="b", **given)
    assert after.losses == {step: loss for step, loss in heard.losses.items() if step > 14}
    assert "step 15" in after.events


def values(batches: Any) -> list[list[float]]:
    return [batch["y"].flatten().tolist() for batch in batches]


@pytest.mark.parametrize("kind", LOADERS)
def test_the_rest_of_an_epoch_comes_from_a_loaded_and_from_a_live_loader(kind: str) -> None:
    if kind == "shuffled":
        pytest.skip("its samples are noisy")
    torch.manual_seed(3)
    whole = values(LOADERS[kind]())
    torch.manual_seed(3)
    live = adopt_loader(LOADERS[kind](), 0, 1)
    begun = iter(live)
    taken = [values([next(begun)])[0] for _ in range(3)]
    saved = live.state_dict()
    fresh = adopt_loader(LOADERS[kind](), 0, 1)
    fresh.load_state_dict(saved)
    fresh.set_epoch(0)
    assert fresh.state_dict() == saved or kind == "workers"  # which has tensors in its state
    assert fresh.batches == 3
    for loader in (fresh, live):
        assert taken + values(loader) == whole
        assert values(loader) == []
    assert live.batches_left in {0, None}
    live.set_epoch(1)
    assert len(values(live)) == len(whole)


@pytest.mark.parametrize("kind", LOADERS)
def test_the_state_is_a_tree_of_plain_data_and_names_the_number_of_ranks(kind: str) -> None:
    loader = adopt_loader(LOADERS[kind](), 0, 4)
    component = StateComponent("dataset", loader, SharingPattern.PER_RANK)
    assert loader.state_dict()["of_rank"]["0"]["state"] is None
    assert capture(component).tensors == {}
    next(iter(loader))
    assert loader.state_dict()["world_size"] == 4
    assert bool(capture(component).tensors) == (kind in {"shuffled", "workers"})


def test_another_number_of_ranks_is_refused_with_a_way_out() -> None:
    copies = [adopt_loader(LOADERS["stream"](), rank, 2) for rank in range(2)]
    for copy in copies:
        next(iter(copy))
    saved = [copy.state_dict() for copy in copies]
    # What a load on another number of ranks makes of them.
    union = {"world_size": 2, "of_rank": {**saved[0]["of_rank"], **saved[1]["of_rank"]}}
    for count in (1, 3):
        loader = adopt_loader(LOADERS["stream"](), 0, count)
        for take in (loader.check_state, loader.load_state_dict):
            with pytest.raises(
                ConfigError, match=f"a StatefulDataLoader was saved by 2 ranks .* by {count}: each"
            ) as caught:
                take(union)
            assert "Resume on 2 ranks; or start the epoch again: declare" in caught.value.help
        assert loader.batches == 0
    copies[1].load_state_dict(saved[1])
    with pytest.raises(ConfigError, match="has no position of rank 1 in the checkpoint"):
        copies[1].check_state(saved[0])


def test_making_an_iterator_leaves_the_global_generators_alone() -> None:
    loader = adopt_loader(LOADERS["workers"](), 0, 1)
    before = torch.get_rng_state()
    values(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sampler_and_a_dataset_hear_of_the_epoch() -> None:
    sampler = torch.utils.data.DistributedSampler(Quiet(12), num_replicas=3, rank=1)
    loader = adopt_loader(of_torchdata(Quiet(12), sampler=sampler), 0, 3)
    first = values(loader)
    loader.set_epoch(1)
    assert sampler.epoch == 1
    assert values(loader) != first
    dataset = stream()
    adopt_loader(DataLoader(dataset, batch_size=2), 0, 1).set_epoch(4)
    assert dataset.epoch == 4


def test_a_stream_counts_no_epochs_and_a_list_of_samples_does(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_steps: is not given, and the train_dataloader has"):
        run(tmp_path, LOADERS["stream"], max_steps=-1)
    trainer, _ = run(tmp_path, LOADERS["stream"], max_steps=9)
    assert (trainer.state.steps_per_epoch, trainer.state.global_step) == (9, 9)
    trainer, _ = run(tmp_path, LOADERS["shuffled"], max_steps=-1, num_train_epochs=2)
    assert (trainer.state.steps_per_epoch, trainer.state.global_step) == (BATCHES, 2 * BATCHES)


def test_an_epoch_that_is_skipped_to_begins_anew() -> None:
    loader = adopt_loader(LOADERS["shuffled"](), 0, 2)
    loader.set_epoch(3)  # the trainer's progress was loaded, the loader's state was not
    assert loader.batches_left == len(loader) == BATCHES


def test_workers_that_cannot_be_asked_for_their_position_are_refused() -> None:
    with pytest.raises(ConfigError, match="in 2 worker processes, and torch's DataLoader"):
        adopt_loader(DataLoader(stream(), batch_size=2, num_workers=2), 0, 1)


def test_other_loaders_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ResumableLoader(Quiet(4), batch_size=2)
    plain = DataLoader(Quiet(4))
    assert adopt_loader(own, 0, 2) is own
    assert adopt_loader(plain, 0, 2) is plain
    foreign = LOADERS["stream"]()
    for name in ("torchdata.stateful_dataloader", "datasets"):
        monkeypatch.delitem(sys.modules, name)
    assert adopt_loader(foreign, 0, 2) is foreign
    assert "datasets" not in sys.modules


@pytest.mark.parametrize("kind", ["own", "torchdata"])
def test_a_script_that_leaves_an_epoch_unfinished_exits(kind: str) -> None:
    lines = (
        "import sys, torch",
        "from torch.utils.data import TensorDataset",
        "from torchdata.stateful_dataloader import StatefulDataLoader",
        "from ckptcoord.trainers.data import ResumableLoader",
        "from ckptcoord.trainers.foreign import adopt_loader",
        "data = TensorDataset(torch.arange(100.0))",
        "make = ResumableLoader if sys.argv[1] == 'own' else StatefulDataLoader",
        "loader = adopt_loader(make(data, batch_size=2, num_workers=2), 0, 1)",
        "batches = iter(loader)",
        "next(batches)",
    )
    command = [sys.executable, "-W", "ignore", "-c", "\n".join(lines), kind]
    assert subprocess.run(command, check=False, timeout=100).returncode == 0
