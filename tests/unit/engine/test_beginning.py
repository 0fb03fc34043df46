"""What is reset is really reset: it trains on as a new one would, to the last bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.engine.loop import plain

from ckptcoord.core.context import Anew
from ckptcoord.engine.beginning import Beginning

if TYPE_CHECKING:
    from collections.abc import Callable

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "AdamW, its rate a tensor": lambda p: torch.optim.AdamW(p, torch.tensor(0.1), fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1),  # has state before its first step
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.5),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda _: None,
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "steps": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 7),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=30),
    "in turn": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        milestones=[3],
    ),
}


class Trained:
    """A model that an optimizer and a scheduler step."""

    def __init__(self, optimizer: str, scheduler: str) -> None:
        torch.manual_seed(1)
        self.model = torch.nn.Linear(3, 2)
        groups = [{"params": [self.model.weight]}, {"params": [self.model.bias], "lr": 0.05}]
        self.optimizer = OPTIMIZERS[optimizer](
            self.model.parameters() if optimizer == "LBFGS" else groups
        )
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)

    def train(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(7)
        for _ in range(steps):
            x = torch.randn(4, 3, generator=generator)

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                self.optimizer.zero_grad()
                loss = (self.model(x) - x[:, :2]).square().mean()
                loss.backward()
                return loss

            self.optimizer.step(closure)
            if self.scheduler is not None:
                self.scheduler.step()

    def left(self) -> Any:
        schedule = None if self.scheduler is None else self.scheduler.state_dict()
        return plain([self.model.state_dict(), self.optimizer.state_dict(), schedule])


def pairs() -> list[tuple[str, str]]:
    """One cycle cycles the momentum of those that have any."""
    cycled = {"SGD", "RMSprop", "AdamW", "AdamW fused"}
    return [
        (optimizer, scheduler)
        for optimizer in OPTIMIZERS
        for scheduler in SCHEDULERS
        if scheduler != "one cycle" or optimizer in cycled
    ]


@given(pair=st.sampled_from(pairs()), before=st.integers(0, 5), after=st.integers(0, 6))
@settings(max_examples=150)
def test_what_was_reset_trains_on_as_new(pair, before, after):
    one = Trained(*pair)
    beginning = Beginning(one.optimizer, one.scheduler)
    one.train(before)
    beginning.reset_optimizer()
    beginning.reset_scheduler()
    new = Trained(*pair)
    new.model.load_state_dict(one.model.state_dict())
    assert one.left() == new.left()
    one.train(after)
    new.train(after)
    assert one.left() == new.left()


@given(pair=st.sampled_from(pairs()), kept=st.integers(1, 4), more=st.integers(1, 4))
@settings(max_examples=60)
def test_an_optimizer_that_was_attached_in_training_goes_back_to_that(pair, kept, more):
    one, same = Trained(*pair), Trained(*pair)
    one.train(kept)
    same.train(kept)
    beginning = Beginning(one.optimizer, one.scheduler)
    one.train(more)
    beginning.reset_optimizer()
    beginning.reset_scheduler()
    one.model.load_state_dict(same.model.state_dict())
    assert one.left() == same.left()
    one.train(more)
    beginning.reset_optimizer()  # as often as one likes
    beginning.reset_scheduler()
    one.model.load_state_dict(same.model.state_dict())
    assert one.left() == same.left()


def test_a_scheduler_alone_takes_its_rates_back_and_leaves_the_moments():
    one = Trained("SGD", "one cycle")
    new = Trained("SGD", "one cycle")
    beginning = Beginning(one.optimizer, one.scheduler)
    one.train(4)
    moments = plain(one.optimizer.state_dict()["state"])
    beginning.reset_scheduler()
    assert plain(one.optimizer.state_dict()["state"]) == moments
    assert plain(one.scheduler.state_dict()) == plain(new.scheduler.state_dict())
    for group, fresh in zip(one.optimizer.param_groups, new.optimizer.param_groups, strict=True):
        assert {**group, "params": 0} == {**fresh, "params": 0}


@given(pair=st.sampled_from(pairs()), before=st.integers(1, 4), after=st.integers(1, 4))
@settings(max_examples=60)
def test_an_optimizer_alone_leaves_the_schedule_and_the_rates_that_it_sets(pair, before, after):
    one, same, new = Trained(*pair), Trained(*pair), Trained(*pair)
    beginning = Beginning(one.optimizer, one.scheduler)
    one.train(before)
    same.train(before)
    beginning.reset_optimizer()
    moments = [plain(each.optimizer.state_dict()["state"]) for each in (one, new)]
    assert moments[0] == moments[1]
    for _ in range(after):
        assert rates(one) == rates(new if one.scheduler is None else same)
        one.train(1)
        same.train(1)


def rates(one):
    return [float(group["lr"]) for group in one.optimizer.param_groups]


def test_groups_that_were_added_since_lose_their_moments_and_keep_their_settings():
    one = Trained("AdamW", "none")
    beginning = Beginning(one.optimizer, None)
    late = torch.nn.Parameter(torch.ones(2))
    one.optimizer.add_param_group({"params": [late], "lr": 0.7})
    late.grad = torch.ones(2)
    one.train(1)
    late.grad = torch.ones(2)
    one.optimizer.step()
    assert late in one.optimizer.state
    beginning.reset_optimizer()
    assert not one.optimizer.state
    assert one.optimizer.param_groups[2]["lr"] == 0.7


def test_a_rate_that_is_a_tensor_stays_that_tensor():
    """A captured graph reads it."""
    one = Trained("AdamW, its rate a tensor", "exponential")
    beginning = Beginning(one.optimizer, one.scheduler)
    rate = one.optimizer.param_groups[0]["lr"]
    one.train(2)
    assert float(rate) != pytest.approx(0.1)
    beginning.reset_optimizer()
    beginning.reset_scheduler()
    assert one.optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.1)


def test_seeds_differ_by_rank_and_are_the_same_each_time():
    one = Trained("SGD", "none")
    beginning = Beginning(one.optimizer, None)
    draws = []
    for rank in (0, 1, 0):
        beginning.begin(Anew(seed=3), rank=rank)
        draws.append(torch.rand(2).tolist())
    assert draws[0] == draws[2] != draws[1]
