from __future__ import annotations

import random
import signal
from itertools import islice
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
    [("length", 11), ("seed", 1), ("shuffle", False), ("drop_last", False)],
)
def test_a_state_that_would_mean_other_samples_is_refused(name: str, other: Any) -> None:
    settings_ = {"length": 10, "seed": 0, "shuffle": True, "drop_last": True}
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


@pytest.mark.parametrize("bad", [-1, 1.5, True, "3"])
@pytest.mark.parametrize("name", ["position", "epoch"])
def test_a_position_that_is_none_is_refused(name: str, bad: Any) -> None:
    sampler = StatefulSampler(10)
    with pytest.raises(ConfigError, match=rf"dataset\.{name}: is .* in the checkpoint"):
        sampler.load_state_dict({**sampler.state_dict(), name: bad})


# --- a change of ranks ----------------------------------------------------------------------------

layouts = st.tuples(st.integers(1, 7), st.integers(1, 4))  # ranks, samples a batch


def ranks_of(
    length: int, layout: tuple[int, int], *, drop_last: bool, state: Any = None, seed: int = 3
) -> list[ResumableLoader]:
    """The loaders of all ranks, one for each, that go on from a state."""
    world, batch_size = layout
    loaders = [
        ResumableLoader(
            Numbers(length),
            batch_size=batch_size,
            rank=rank,
            world_size=world,
            seed=seed,
            drop_last=drop_last,
        )
        for rank in range(world)
    ]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    return loaders


def rounds_of(loaders: list[ResumableLoader], most: int) -> list[list[list[int]]]:
    """What each rank was given in the rounds that were taken; the state is alike on all ranks."""
    before = [loader.batches_left for loader in loaders]
    taken = [list(islice(loader, most)) for loader in loaders]
    assert len({len(one) for one in taken}) == 1
    for loader, one, many in zip(loaders, taken, before, strict=True):
        assert len(one) == min(many, most)
        assert loader.batches_left == many - len(one)
        assert loader.state_dict() == loaders[0].state_dict()
    return [[batch[:, 0].int().tolist() for batch in turn] for turn in zip(*taken, strict=True)]


@given(
    length=st.integers(1, 60),
    history=st.lists(st.tuples(layouts, st.integers(0, 6)), min_size=0, max_size=4),
    last=layouts,
    drop_last=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_an_epoch_that_many_layouts_shared_has_every_sample_once(
    length: int, history: list[tuple[tuple[int, int], int]], last: tuple[int, int], drop_last: bool
) -> None:
    seen: list[int] = []
    state = None
    for layout, most in [*history, (last, 1000)]:
        loaders = ranks_of(length, layout, drop_last=drop_last, state=state)
        for turn in rounds_of(loaders, most):
            assert len({len(batch) for batch in turn}) == 1  # every rank gets as many
            # Dealt one by one, so this is the epoch's order.
            seen += [index for deal in zip(*turn, strict=True) for index in deal]
        state = loaders[0].state_dict()
    order = list(StatefulSampler(length, seed=3))
    if drop_last:
        assert seen == order[: len(seen)]
        assert length - len(seen) < last[0] * last[1]
        return
    assert seen[:length] == order
    filled = seen[length:]
    assert filled == [order[place % length] for place in range(len(filled))]
    widest = max(world for (world, _), _ in [*history, (last, 0)])
    assert len(filled) < widest


@given(st.integers(1, 40), layouts, layouts)
@settings(max_examples=60, deadline=None)
def test_after_the_fill_up_an_epoch_has_ended_for_any_layout(
    length: int, one: tuple[int, int], other: tuple[int, int]
) -> None:
    loaders = ranks_of(length, one, drop_last=False)
    rounds_of(loaders, 1000)
    state = loaders[0].state_dict()
    assert state["sampler"]["position"] >= length
    for loader in ranks_of(length, other, drop_last=False, state=state):
        assert loader.batches_left == 0
        assert list(loader) == []
        loader.set_epoch(1)
        assert loader.batches_left == len(loader) > 0


def test_what_one_layout_cannot_round_off_a_smaller_one_still_gets() -> None:
    four = ranks_of(11, (4, 2), drop_last=True)
    assert len(rounds_of(four, 1000)) == 1
    (alone,) = ranks_of(11, (1, 1), drop_last=True, state=four[0].state_dict())
    assert len(list(alone)) == 3


@given(st.integers(1, 40), layouts, st.integers(0, 9), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_loader_that_deals_gives_each_rank_what_its_own_would(
    length: int, layout: tuple[int, int], most: int, drop_last: bool
) -> None:
    world, batch_size = layout
    wanted = rounds_of(ranks_of(length, layout, drop_last=drop_last), 1000)
    dealer = ResumableLoader(Numbers(length), batch_size=batch_size, seed=3, drop_last=drop_last)
    dealer.deal_to(world)
    assert len(dealer) == len(wanted)
    hands = (batch[:, 0].int().tolist() for batch in dealer)
    dealt = [list(islice(hands, world)) for _ in range(min(most, len(wanted)))]
    assert dealt == wanted[: len(dealt)]
    assert dealer.batches_left == len(wanted) - len(dealt)
    rest = ranks_of(length, layout, drop_last=drop_last, state=dealer.state_dict())
    assert rounds_of(rest, 1000) == wanted[len(dealt) :]


def test_closing_in_the_middle_of_a_deal_ends_it() -> None:
    dealer = ResumableLoader(Numbers(8), batch_size=1)
    dealer.deal_to(4)
    hands = iter(dealer)
    next(hands)
    dealer.close()
    assert list(hands) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_on_after_a_change_of_ranks(workers: int) -> None:
    (alone,) = ranks_of(12, (1, 2), drop_last=True)
    taken = rounds_of([alone], 2)
    rest = []
    for rank in range(2):
        loader = ResumableLoader(
            Numbers(12), batch_size=2, rank=rank, world_size=2, seed=3, num_workers=workers
        )
        loader.load_state_dict(alone.state_dict())
        rest += [int(index) for batch in loader for index in batch[:, 0]]
    assert sorted(rest + [i for turn in taken for batch in turn for i in batch]) == list(range(12))


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
