from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as c10d
from tests.unit.trainers import job
from tests.unit.trainers.job import run_job
from tests.unit.trainers.tiny import Noisy, arguments, model, plain, remains

import ckptcoord
from ckptcoord import DDPTrainer, SharingPattern
from ckptcoord.errors import CkptError, ConfigError
from ckptcoord.trainers import data, ddp, ranks
from ckptcoord.trainers.data import DispatchLoader, ResumableLoader

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dispatch_batches": True, "gradient_accumulation_steps": 2},
        {"compression": "auto", "save_steps": 1, "save_total_limit": 2},
    ],
    ids=["own slices", "dispatched", "deltas"],
)
def test_four_ranks_resume_bit_for_bit_in_new_processes(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    straight = run_job(job.train, str(tmp_path / "a"), **settings)
    before = run_job(job.train, str(tmp_path / "b"), spy={"stop_at": 4}, **settings)
    after = run_job(job.train, str(tmp_path / "b"), resume_from_checkpoint=True, **settings)
    for rank in range(4):
        wanted, losses, _, _ = straight[rank]
        if rank and "dispatch_batches" in settings:
            wanted.pop("dataset")  # rank 0 has the only position
            after[rank][0].pop("dataset")
        assert after[rank][0] == wanted
        assert {**before[rank][1], **after[rank][1]} == losses
    models = [one[0]["model"] for one in after]
    assert all(other == models[0] for other in models)
    assert len({str(one[0]["draws"]) for one in after}) == 4


def test_a_signal_to_one_rank_ends_all_in_one_save(tmp_path: Path) -> None:
    ended = run_job(job.train, str(tmp_path), spy=job.one_stops, save_strategy="adaptive")
    for _, _, events, number in ended:
        assert events == ["step 1", "step 2", "step 3", "save 3"]
        assert number == signal.SIGUSR1
    commit = ckptcoord.open_repository(tmp_path).resolve("latest")
    assert commit.checkpoint_id.step == 3


def test_a_signal_within_an_evaluation_ends_it_on_all_ranks(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1}
    ended = run_job(
        job.train, str(tmp_path), struck=1, save_strategy="adaptive", size=2, **settings
    )
    for _, _, events, number in ended:
        assert events == ["step 1", "step 2", "save 2", "2 read"]
        assert number == signal.SIGUSR1


def test_ranks_tag_the_best_together_while_saves_go_on(tmp_path: Path) -> None:
    settings = {"metric_for_best_model": "loss", "save_total_limit": 1, "size": 2}
    ended = run_job(
        job.train, str(tmp_path), save_strategy="steps", save_steps=1, max_steps=6, **settings
    )
    losses = ended[0][1]
    best = min(losses, key=losses.__getitem__)
    assert ckptcoord.open_repository(tmp_path).resolve("best").checkpoint_id.step == best


def test_a_callback_of_one_rank_speaks_for_all(tmp_path: Path) -> None:
    ended = run_job(job.train, str(tmp_path), spy=job.one_wishes, max_steps=3, size=2)
    assert all("save 2" in events for _, _, events, _ in ended)


def test_sparse_gradients_resume_too(tmp_path: Path) -> None:
    settings = {"sparse": True, "max_grad_norm": 0, "max_steps": 4, "size": 3}
    straight = run_job(job.train, str(tmp_path / "a"), **settings)
    run_job(job.train, str(tmp_path / "b"), spy={"stop_at": 2}, **settings)
    after = run_job(job.train, str(tmp_path / "b"), resume_from_checkpoint=True, **settings)
    assert [one[0] for one in after] == [one[0] for one in straight]


class Apart(DDPTrainer):
    """Each rank keeps statistics of its own."""

    def wrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def statistics(folder: str, kind: type[DDPTrainer], **settings: Any) -> Any:
    """Those of batch norm after a few steps."""
    args = arguments(Path(folder), max_steps=4, gradient_accumulation_steps=2, **settings)
    trainer = kind(model(), args, Noisy(100))
    trainer.train()
    trainer.close()
    return plain(dict(trainer.model.named_buffers()))


def test_buffers_are_the_same_on_all_ranks_when_a_step_ends(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "size": 2}
    first, second = run_job(statistics, str(tmp_path), DDPTrainer, **settings)
    assert first == second


def test_buffers_that_ddp_leaves_alone_stay_each_ranks_own(tmp_path: Path) -> None:
    first, second = run_job(statistics, str(tmp_path), Apart, size=2)
    assert first != second


def test_ranks_agree_on_the_largest_add_in_order_and_hear_the_first() -> None:
    said = run_job(job.words)
    assert all(one == said[0] for one in said)
    flags, totals, word = said[0]
    assert flags == (3, 7, 0)
    assert totals == (((0.1 + 0.2) + 0.1 * 3) + 0.4, 4.0)
    assert word == "of 0"


def test_rank_0_deals_every_batch_once_and_its_failure_is_everyones() -> None:
    said = run_job(job.dispatch)
    seen = [one[0] for one in said]
    assert seen == [[0.0, 4.0], [1.0, 5.0], [2.0, 6.0], [3.0, 7.0]]
    assert {one[1] for one in said} == {2}
    assert [one[2] for one in said] == [[4.0], [5.0], [6.0], [7.0]]
    assert said[0][3][0] == "disk on fire"
    assert all("OSError: disk on fire" in one[3][0] for one in said[1:])
    assert all("is None on rank 0" in one[3][1] for one in said)


def test_settling_buckets_touches_neither_gradients_nor_generators() -> None:
    assert run_job(job.buckets, size=2) == [(True, True, "Wide")] * 2


# --- without a process group ----------------------------------------------------------------------


def test_alone_it_trains_like_any_trainer_and_resumes(tmp_path: Path) -> None:
    def run(folder: str, **settings: Any) -> dict[str, Any]:
        args = arguments(tmp_path / folder, dispatch_batches=True, **settings)
        trainer = DDPTrainer(model(), args, Noisy(13))
        trainer.train()
        trainer.close()
        return remains(trainer)

    wanted = run("a", lr_scheduler_type="constant")
    settings = {"lr_scheduler_type": "constant", "save_strategy": "steps"}
    run("b", max_steps=4, **settings)
    assert run("b", resume_from_checkpoint=True, **settings) == wanted


def test_what_it_declares(tmp_path: Path) -> None:
    trainer = DDPTrainer(model(), arguments(tmp_path), Noisy(4))
    components = {c.key: c for c in trainer.get_state_components()}
    assert components["model"].validate_replication
    patterns = {key: c.sharing_pattern for key, c in components.items()}
    assert patterns == {
        "model": SharingPattern.REPLICATED,
        "optimizer": SharingPattern.REPLICATED,
        "scheduler": SharingPattern.REPLICATED,
        "progress": SharingPattern.REPLICATED,
        "dataset": SharingPattern.PER_RANK,
        "rng": SharingPattern.PER_RANK,
    }
    dispatched = DDPTrainer(model(), arguments(tmp_path, dispatch_batches=True), Noisy(4))
    assert dispatched._get_dataset_sharing_pattern() is SharingPattern.GLOBAL
    assert trainer.get_process_groups() == {}


def test_half_an_environment_of_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"):
        ddp.start_process_group()


def test_gpus_are_used_where_every_local_rank_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", started.append)
    monkeypatch.setattr(
        ddp.c10d, "init_process_group", lambda *args, **kwargs: started.append((args, kwargs))
    )
    assert ddp.start_process_group()
    assert started.pop() == (("nccl",), {"device_id": torch.device("cuda", 1)})
    assert started == [1]
    assert ddp.start_process_group(use_cpu=True)
    assert started.pop() == (("gloo",), {})


def test_without_torch_distributed_it_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddp.c10d, "is_available", lambda: False)
    assert not ddp.start_process_group()


def test_sparse_embeddings_are_seen() -> None:
    assert ddp.has_sparse_gradients(torch.nn.Sequential(torch.nn.Embedding(2, 2, sparse=True)))
    assert not ddp.has_sparse_gradients(torch.nn.Embedding(2, 2))


@pytest.fixture
def lone_group() -> Iterator[None]:
    """A process group of one, in this process."""
    c10d.init_process_group("gloo", store=c10d.HashStore(), rank=0, world_size=1)
    yield
    ckptcoord.shutdown()


@pytest.mark.usefixtures("lone_group")
@pytest.mark.parametrize("dispatch", [False, True])
def test_a_group_of_one_resumes_too(tmp_path: Path, *, dispatch: bool) -> None:
    def run(folder: str, **settings: Any) -> dict[str, Any]:
        args = arguments(
            tmp_path / folder,
            dispatch_batches=dispatch,
            gradient_accumulation_steps=2,
            lr_scheduler_type="constant",
            **settings,
        )
        trainer = DDPTrainer(model(), args, Noisy(13))
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        trainer.train()
        trainer.close()
        return remains(trainer)

    wanted = run("a")
    run("b", max_steps=4, save_strategy="steps")
    assert run("b", resume_from_checkpoint=True) == wanted


@pytest.mark.usefixtures("lone_group")
def test_a_lone_dealer_fails_as_its_source_does() -> None:
    loader = DispatchLoader(ResumableLoader(job.Failing(8), batch_size=1, shuffle=False))
    with pytest.raises(OSError, match="disk on fire"):
        list(loader)
    with pytest.raises(ConfigError, match="is None on rank 0"):
        DispatchLoader(None)


@pytest.mark.usefixtures("lone_group")
def test_ranks_talk_over_gloo_of_their_own_where_the_job_uses_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    monkeypatch.setattr(ranks.c10d, "get_backend", lambda: "nccl")
    monkeypatch.setattr(ranks.c10d, "new_group", lambda **settings: made.append(settings))
    words = ranks.TorchRanks()
    assert made == [{"backend": "gloo"}]
    assert words.agree([2, 0]) == (2, 0)
    assert words.total([0.1]) == (0.1,)
    assert words.from_first("x") == "x"


@pytest.mark.usefixtures("lone_group")
def test_frozen_parameters_and_buffers_are_left_alone_by_settling() -> None:
    net = model()
    net.first.weight.requires_grad_(False)
    before = plain(net.state_dict())
    parallel = ddp.settle_buckets(torch.nn.parallel.DistributedDataParallel(net))
    assert parallel.module is net
    assert plain(net.state_dict()) == before
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.usefixtures("lone_group")
def test_the_mirror_of_a_rank_that_only_receives_follows_what_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = data.StatefulSampler(16)
    theirs.advance(4)
    monkeypatch.setattr(data, "broadcast", lambda mine, **_: (2, theirs.state_dict()))
    loader = DispatchLoader(None)
    assert (len(loader), loader.batches_left) == (8, 6)
    assert loader.state_dict() == {"sampler": theirs.state_dict()}
    theirs.advance(2)
    loader.load_state_dict({"sampler": theirs.state_dict()})
    assert loader.batches_left == 5
    monkeypatch.setattr(data, "scatter", _hand_out(("batch", 5), ("end", None)))
    assert list(loader) == [5]
    assert loader.batches_left == 4
    loader.set_epoch(3)
    loader.close()
    assert loader.state_dict()["sampler"] == data.StatefulSampler(16).state_dict() | {"epoch": 3}
    monkeypatch.setattr(data, "scatter", _hand_out(("error", "OSError: fire")))
    with pytest.raises(CkptError, match="rank 0 could not read the next batch: OSError: fire"):
        list(loader)


def _hand_out(*messages: Any) -> Any:
    """A scatter that brings these messages, one a call."""
    waiting = iter(messages)

    def scatter(packed: Any, group: Any = None) -> Any:
        assert packed is None
        return next(waiting)

    return scatter


def test_the_gpu_is_that_of_the_local_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = DDPTrainer(model(), arguments(tmp_path), Noisy(4))
    trainer.args = arguments(tmp_path, use_cpu=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert trainer.pick_device() == torch.device("cuda", 3)
    trainer.ranks.size = 2
    monkeypatch.setattr(ddp.c10d, "get_backend", lambda: "gloo")
    assert trainer.pick_device() == torch.device("cpu")
    monkeypatch.setattr(ddp.c10d, "get_backend", lambda: "nccl")
    assert trainer.pick_device() == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not trainer._is_first_on_node()


@pytest.mark.usefixtures("lone_group")
def test_buckets_that_are_never_rebuilt_need_no_settling() -> None:
    parallel = torch.nn.parallel.DistributedDataParallel(model(), find_unused_parameters=True)
    assert ddp.settle_buckets(parallel) is parallel
