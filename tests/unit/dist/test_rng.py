from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.dist import rng as rng_module
from ckptcoord.dist.rng import RNGState, mix_seed, preserved_rng, seed_everything
from ckptcoord.errors import ConfigError


def draw() -> tuple[object, ...]:
    """Something from every generator, the cached halves of normal pairs included."""
    return (
        random.random(),
        random.gauss(0, 1),
        float(np.random.random()),
        float(np.random.normal()),
        torch.rand(3).tolist(),
        torch.randn(2).tolist(),
    )


def waste(count: int) -> None:
    for _ in range(count):
        random.gauss(0, 1)
        np.random.normal()
        torch.randn(1)


@given(seed=st.integers(0, 2**63 - 1), before=st.integers(0, 3), after=st.integers(0, 3))
@settings(max_examples=30)
def test_every_generator_goes_on_where_it_was_saved(seed: int, before: int, after: int) -> None:
    seed_everything(seed)
    waste(before)
    saved = RNGState().state_dict()
    wanted = [draw() for _ in range(3)]
    waste(after)
    RNGState().load_state_dict(saved)
    assert [draw() for _ in range(3)] == wanted


def test_a_state_that_came_back_as_tensors_is_the_same_state() -> None:
    seed_everything(1)
    saved = RNGState().state_dict()
    wanted = draw()
    saved["python"]["words"] = torch.as_tensor(saved["python"]["words"].astype(np.int64))
    key = torch.as_tensor(saved["numpy"]["state"]["key"].astype(np.int64))
    saved["numpy"]["state"]["key"] = key.to(torch.uint32)
    RNGState().load_state_dict(saved)
    assert draw() == wanted


def test_a_saved_state_does_not_move_with_the_live_generators() -> None:
    seed_everything(2)
    saved = RNGState().state_dict()
    wanted = draw()
    waste(5)
    RNGState().load_state_dict(saved)
    assert draw() == wanted


def test_what_is_drawn_in_a_preserved_block_leaves_no_trace_even_when_it_fails() -> None:
    seed_everything(3)
    wanted = draw()
    seed_everything(3)
    with contextlib.suppress(KeyError), preserved_rng():
        waste(4)
        raise KeyError
    assert draw() == wanted


def test_ranks_and_seeds_draw_different_numbers() -> None:
    drawn = set()
    for path in ((0,), (1,), (0, 0), (0, 1), (1, 0)):
        seed_everything(*path)
        drawn.add(repr(draw()))
    assert len(drawn) == 5
    assert all(0 <= mix_seed(n, m) < 2**63 for n in range(50) for m in range(3))


def test_another_kind_of_numpy_generator_is_refused() -> None:
    saved = RNGState().state_dict()
    saved["numpy"]["bit_generator"] = "PCG64"
    with pytest.raises(ConfigError, match="MT19937, the saved one a PCG64"):
        RNGState().load_state_dict(saved)


def test_cuda_states_without_a_gpu_are_left_out_with_a_warning() -> None:
    saved = {**RNGState().state_dict(), "cuda": [torch.zeros(16, dtype=torch.uint8)]}
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.warns(UserWarning, match="1 CUDA generators were saved"):
        RNGState().load_state_dict(saved)


def test_cuda_states_go_back_to_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    live = {0: torch.tensor([1], dtype=torch.uint8), 1: torch.tensor([2], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [s.clone() for s in live.values()])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, d: live.__setitem__(d, s))
    saved = rng_module._cuda_states()
    live[0], live[1] = torch.tensor([8]), torch.tensor([9])
    rng_module._load_cuda(saved)
    assert [int(state) for state in live.values()] == [1, 2]


def test_the_load_puts_generators_back_last() -> None:
    assert RNGState().restore_last is True


@given(seed=st.integers(0, 2**63 - 1), step=st.integers(0, 2**40), rank=st.integers(0, 2**20))
@settings(max_examples=30, deadline=None)
def test_a_new_rank_draws_what_seed_step_and_rank_say_and_nobody_else_does(
    seed: int, step: int, rank: int
) -> None:
    def drawn(seed: int, step: int, rank: int) -> tuple[object, ...]:
        waste(1)
        RNGState(seed).derive_state(step, rank)
        return draw()

    own = drawn(seed, step, rank)
    assert drawn(seed, step, rank) == own
    others = [(seed, step + 1, rank), (seed, step, rank + 1), (seed ^ 1, step, rank)]
    assert own not in [drawn(*other) for other in others]
    # A run's start, a sample's draws, and what they were derived from without a word of their own.
    for path in ((rank,), (step, rank), (step,), ()):
        seed_everything(seed, *path)
        assert draw() != own


def test_without_a_seed_a_new_rank_goes_by_what_torch_was_seeded_with() -> None:
    drawn = []
    for seed, waste_ in ((7, 0), (7, 3), (8, 0)):
        torch.manual_seed(seed)
        waste(waste_)
        RNGState().derive_state(5, 1)
        drawn.append(draw())
    assert drawn[0] == drawn[1] != drawn[2]
    torch.manual_seed(7)
    RNGState(7).derive_state(5, 1)
    assert draw() == drawn[0]
