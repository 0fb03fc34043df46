from __future__ import annotations

import random
import signal
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.errors import ConfigError
from ckptcoord.trainers.data import DispatchLoader, ResumableLoader, StatefulSampler
from ckptcoord.trainers.workers import SeededDataset


class Numbers:
    """0, 1, 2, … as tensors; optionally with noise from the process's generators."""

    def __init__(self, length: int, *, noisy: bool = False) -> None:
        self.length, self.noisy = length, noisy

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = random.random() + torch.rand(1).item() if self.noisy else 0.0
        return torch.tensor([float(index), noise], dtype=torch.float64)


def batches_of(loader: Any) -> list[list[list[float]]]:
    return [batch.tolist() for batch in loader]


sizes = st.tuples(st.integers(1, 60), st.integers(1, 5), st.booleans(), st.booleans())


@given(sizes, st.integers(0, 3), st.integers(0, 2**40))
@settings(max_examples=60)
def test_ranks_share_an_epoch_evenly_and_between_them_leave_nothing_out(
    size: tuple[int, int, bool, bool], epoch: int, seed: int
) -> None:
    length, world, shuffle, drop_last = size
    slices = []
    for rank in range(world):
        sampler = StatefulSampler(
            length, rank=rank, world_size=world, shuffle=shuffle, seed=seed, drop_last=drop_last
        )
        sampler.set_epoch(epoch)
        slices.append(list(sampler))
        assert len(slices[-1]) == len(sampler)
    assert len({len(one) for one in slices}) == 1
    seen = [index for one in slices for index in one]
    if drop_last:
        assert len(set(seen)) == len(seen) == length // world * world
    else:
        assert set(seen) == set(range(length))
        assert len(seen) - length < world


@given(sizes, st.integers(0, 20))
@settings(max_examples=60)
def test_a_sampler_goes_on_where_all_ranks_together_stood(
    size: tuple[int, int, bool, bool], rounds: int
) -> None:
    length, world, shuffle, drop_last = size

    def fresh() -> StatefulSampler:
        return StatefulSampler(
            length, rank=world - 1, world_size=world, shuffle=shuffle, drop_last=drop_last
        )

    first, second = fresh(), fresh()
    first.set_epoch(1)
    whole = list(first)
    first.advance(rounds * world)
    second.load_state_dict(first.state_dict())
    assert list(second) == whole[rounds:]
    assert second.position <= second.total


def test_each_epoch_and_seed_has_an_order_of_its_own() -> None:
    orders = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        sampler = StatefulSampler(30, seed=seed)
        sampler.set_epoch(epoch)
        orders.add(tuple(sampler))
    assert len(orders) == 4


def test_the_same_epoch_keeps_its_position_and_another_starts_anew() -> None:
    sampler = StatefulSampler(10)
    sampler.advance(4)
    sampler.set_epoch(0)
    assert sampler.position == 4
    sampler.set_epoch(1)
    assert sampler.position == 0


@pytest.mark.parametrize(
    ("name", "other"),
    [("length", 11), ("seed", 1), ("world_size", 2), ("shuffle", False), ("drop_last", False)],
)
def test_a_state_that_would_mean_other_samples_is_refused(name: str, other: Any) -> None:
    settings_ = {"length": 10, "seed": 0, "world_size": 1, "shuffle": True, "drop_last": True}
    saved = StatefulSampler(**settings_).state_dict()
    live = StatefulSampler(**{**settings_, name: other})
    with pytest.raises(ConfigError, match=rf"sampler\.{name}: is .* saved with"):
        live.load_state_dict(saved)


@pytest.mark.parametrize("bad", [{"length": -1}, {"seed": -1}, {"rank": 1}, {"world_size": 0}])
def test_a_sampler_that_makes_no_sense_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="make no sense"):
        StatefulSampler(**{"length": 3, **bad})


@given(st.integers(1, 40), st.integers(1, 5), st.booleans(), st.integers(0, 12), st.integers(1, 3))
@settings(max_examples=40)
def test_a_loader_goes_on_with_the_next_batch(
    length: int, batch_size: int, drop_last: bool, taken: int, world: int
) -> None:
    def fresh() -> ResumableLoader:
        return ResumableLoader(
            Numbers(length), batch_size=batch_size, drop_last=drop_last, world_size=world, seed=5
        )

    whole = batches_of(fresh())
    assert len(whole) == len(fresh())
    first, second = fresh(), fresh()
    for _, _batch in zip(range(taken), first, strict=False):
        pass
    second.load_state_dict(first.state_dict())
    assert batches_of(second) == whole[taken:]


@pytest.mark.parametrize("taken", [1, 3])
def test_prefetching_workers_do_not_move_the_position(taken: int) -> None:
    def fresh() -> ResumableLoader:
        return ResumableLoader(Numbers(24, noisy=True), batch_size=2, num_workers=2, seed=3)

    whole = batches_of(fresh())
    first = fresh()
    rest = iter(first)
    for _ in range(taken):
        next(rest)
    assert first.sampler.position == 2 * taken
    second = fresh()
    second.load_state_dict(first.state_dict())
    first.close()
    # With noise: workers draw alike whatever they have served before.
    assert batches_of(second) == whole[taken:]


def test_making_an_iterator_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches_of(ResumableLoader(Numbers(8), batch_size=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_closing_or_loading_ends_an_iteration_under_way() -> None:
    loader = ResumableLoader(Numbers(8), batch_size=1)
    old = iter(loader)
    next(old)
    loader.load_state_dict(loader.state_dict())
    assert list(old) == []
    assert len(batches_of(loader)) == 7


def test_a_second_iteration_ends_the_first() -> None:
    loader = ResumableLoader(Numbers(6), batch_size=1)
    old = iter(loader)
    next(old)
    new = iter(loader)
    next(new)
    assert list(old) == []
    assert len(list(new)) == 4


class Handlers:
    """What a worker does about signals, as data."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        return torch.tensor([signal.getsignal(number) == signal.SIG_IGN for number in numbers])


def test_workers_ignore_the_signals_that_stop_a_trainer() -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    (batch,) = ResumableLoader(Handlers(), batch_size=2, num_workers=1)
    assert batch.all()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


def test_a_batch_size_other_than_the_saved_one_is_refused() -> None:
    saved = ResumableLoader(Numbers(8), batch_size=2).state_dict()
    with pytest.raises(ConfigError, match="is 4, but the checkpoint was saved with 2"):
        ResumableLoader(Numbers(8), batch_size=4).load_state_dict(saved)


def test_a_dataset_without_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="generator has no length"):
        ResumableLoader((x for x in [1]), batch_size=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is 0, less than 1"):
        ResumableLoader(Numbers(1), batch_size=0)


class Fetching(Numbers):
    """A dataset that reads a batch at once."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]


def test_samples_are_seeded_by_epoch_and_index_one_by_one_or_batch_by_batch() -> None:
    plain = SeededDataset(Numbers(9, noisy=True), seed=1)
    assert plain[0, 3].tolist() == plain[0, 3].tolist() != plain[1, 3].tolist()
    assert len(plain) == 9
    assert [t.tolist() for t in plain.__getitems__([(0, 3), (0, 4)])] == [
        plain[0, 3].tolist(),
        plain[0, 4].tolist(),
    ]
    fetching = SeededDataset(Fetching(9, noisy=True), seed=1)
    once = [t.tolist() for t in fetching.__getitems__([(0, 3), (0, 4)])]
    assert once == [t.tolist() for t in fetching.__getitems__([(0, 3), (0, 4)])]
    assert once[0] == plain[0, 3].tolist()


def test_dispatching_without_a_process_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="no process group"):
        DispatchLoader(ResumableLoader(Numbers(4), batch_size=1))
