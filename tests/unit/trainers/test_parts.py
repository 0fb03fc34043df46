from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.errors import ConfigError
from ckptcoord.trainers.arguments import SchedulerType, TrainingArguments
from ckptcoord.trainers.batch import loss_of, sample_count, to_device, token_count
from ckptcoord.trainers.boundary import Grace, Word, to_ms
from ckptcoord.trainers.loop import TrainOutput
from ckptcoord.trainers.pacing import SavePacer
from ckptcoord.trainers.ranks import OneRank
from ckptcoord.trainers.schedule import default_optimizer, default_scheduler, lr_factor
from ckptcoord.trainers.signals import StopSignals
from ckptcoord.trainers.state import TrainerControl, TrainerState


class Pair(NamedTuple):
    x: torch.Tensor
    y: int


# --- pacing ---------------------------------------------------------------------------------------


@given(
    overhead=st.floats(0.005, 0.3),
    step_s=st.floats(0.01, 0.05),
    saves=st.lists(st.floats(0.05, 1.0), min_size=4, max_size=4),
)
@settings(max_examples=30, deadline=None)
def test_steady_saves_stay_under_the_budget_and_use_it(
    overhead: float, step_s: float, saves: list[float]
) -> None:
    pacer = SavePacer(overhead, state_bytes=0)
    taken = 0
    slowest = max(saves)
    for _ in range(5_000):
        pacer.stepped(step_s)
        if pacer.due:
            save(pacer, saves[taken % 4])
            taken += 1
            if taken >= 5:  # by now it has seen the slowest one
                assert pacer.overhead <= overhead + 2 * slowest / (
                    pacer.training_s + pacer.saving_s
                )
    elapsed = pacer.training_s + pacer.saving_s
    assert pacer.overhead > overhead - (3 * slowest + 0.2 + overhead * step_s) / elapsed


def test_equal_saves_never_pass_the_budget() -> None:
    pacer = SavePacer(0.02, state_bytes=100_000_000)
    when = []
    for step in range(2000):
        pacer.stepped(1.0)
        if pacer.due:
            save(pacer, 0.5)
            when.append(step)
            assert pacer.overhead <= 0.02
    assert when[0] > 50  # the first waits for 1.1 guessed seconds to fit
    gaps = [later - earlier for earlier, later in pairwise(when)]
    assert set(gaps[2:]) <= {24, 25}  # the first ones make up for the guess


def test_a_slow_save_is_remembered_for_three_saves() -> None:
    pacer = SavePacer(0.5, state_bytes=0)
    for seconds in (9.0, 1.0, 1.0):
        save(pacer, seconds)
    pacer.trained(19.5)
    assert not pacer.due
    pacer.trained(0.5)
    assert pacer.due
    save(pacer, 1.0)
    pacer.trained(-7.0)  # 13 s of training against 12 saved and 1 to come
    assert pacer.due


def test_nothing_is_no_overhead() -> None:
    assert SavePacer(0.02, 1).overhead == 0.0


def save(pacer: SavePacer, seconds: float) -> None:
    """A save that training waits for."""
    pacer.began(seconds)
    pacer.ended()


def test_a_save_in_the_background_costs_its_call_and_what_steps_lose() -> None:
    pacer = SavePacer(0.5, state_bytes=0)
    for seconds in (1.0, 1.0, 9.0):  # one slow step is no reason to think all are
        pacer.stepped(seconds)
    pacer.began(0.25)
    for seconds in (1.5, 1.25, 0.5):  # a step that was faster gives nothing back
        pacer.stepped(seconds)
    assert pacer.saving_s == 1.0
    assert pacer.training_s == 11.0 + 2.5
    assert not pacer.due  # what it will have cost is not known
    pacer.ended()
    assert pacer.due
    pacer.trained(-11.5)  # 2 s of training against 1 saved and 1 to come
    assert pacer.due
    pacer.trained(-0.5)
    assert not pacer.due


def test_saves_that_overlap_share_what_they_cost() -> None:
    pacer = SavePacer(0.5, state_bytes=0)
    pacer.began(3.0)
    pacer.stepped(7.0)  # no step without a save is known: it counts as training
    pacer.began(1.0)
    pacer.ended()
    pacer.ended()
    assert (pacer.saving_s, pacer.training_s) == (4.0, 7.0)
    pacer.trained(-1.0)
    assert pacer.due  # 4 + 2 of 6
    pacer.trained(-0.5)
    assert not pacer.due


# --- step boundaries ------------------------------------------------------------------------------

WORDS = st.integers(0, 2**31 - 1)


@given(st.tuples(*[WORDS] * 7))
def test_a_word_survives_as_flags(numbers: tuple[int, ...]) -> None:
    word = Word.from_flags(numbers)
    assert word.to_flags() == numbers
    assert Word.from_flags(word.to_flags()) == word


@pytest.mark.parametrize(
    ("seconds", "wanted"), [(0.0, 0), (-1.0, 0), (1.2345, 1234), (1e9, 2**31 - 1)]
)
def test_seconds_become_milliseconds_that_32_bits_hold(seconds: float, wanted: int) -> None:
    assert to_ms(seconds) == wanted


@given(
    total=st.floats(0, 100),
    gone=st.integers(0, 10**5),
    drain=st.integers(0, 10**5),
    cost=st.integers(0, 10**5),
)
def test_a_last_save_is_begun_only_where_it_ends_within_the_grace(
    total: float, gone: int, drain: int, cost: int
) -> None:
    word = Word(signal=signal.SIGTERM, since_ms=gone, drain_ms=drain, save_ms=cost)
    grace = Grace.of(word, total)
    ends_s = (gone + drain + cost) / 1000
    assert grace.left_s >= 0
    if ends_s < total - 1e-6:
        assert grace.fits
    if ends_s > total + 1e-6 and drain + cost:
        assert not grace.fits


def test_why_there_is_no_last_save_is_said_in_numbers() -> None:
    word = Word(signal=signal.SIGTERM, since_ms=4500, drain_ms=12_000, save_ms=10_000)
    why = Grace.of(word, 25.0).why_not()
    assert why == (
        "SIGTERM came 4.5 s before, 20.5 s of the 25 s of grace were left, and a save takes about "
        "10.0 s, behind about 12.0 s of others"
    )


@pytest.mark.parametrize(("number", "code"), [(None, 0), (signal.SIGTERM, 75)])
def test_what_to_exit_with(number: int | None, code: int) -> None:
    output = TrainOutput(
        global_step=1, training_loss=0.0, stopped_by_signal=number, best_model_checkpoint=None
    )
    assert output.exit_code == code


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_is_remembered_and_the_old_handler_put_back(number: signal.Signals) -> None:
    seen = []
    old = signal.signal(number, lambda n, _frame: seen.append(n))
    try:
        with StopSignals() as signals:
            assert signals.received == 0
            os.kill(os.getpid(), number)
            assert signals.received == number
        os.kill(os.getpid(), number)
        assert seen == [number]
    finally:
        signal.signal(number, old)


def test_handlers_are_put_back_after_a_failure() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), StopSignals():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_handler_from_c_becomes_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    old = signal.getsignal(signal.SIGUSR1)
    try:
        stop = StopSignals()
        with stop:
            stop._old[signal.SIGUSR1] = None
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_the_time_of_a_signal_is_when_it_came_and_not_when_its_handler_could_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with StopSignals() as signals:
        assert signals.since_s == 0.0
        before_s = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)  # later ones leave it as it is
        assert signals._arrivals is not None
        while signals._arrivals.first_s is None:
            time.sleep(0.001)
        seen_s = signals._arrivals.first_s
        assert before_s <= seen_s <= time.monotonic()
        # As if the main thread had been in a long backward pass until now.
        signals._came_s = seen_s + 100.0
        assert 0.0 <= signals.since_s == pytest.approx(time.monotonic() - seen_s, abs=5.0)
    assert not [one for one in threading.enumerate() if one.name == "ckptcoord-signals"]
    assert signal.set_wakeup_fd(-1) == -1


def test_where_no_thread_starts_signals_are_remembered_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with StopSignals() as signals:
        assert signal.set_wakeup_fd(-1) == -1
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
        assert 0 <= signals.since_s < 60


def test_a_wakeup_descriptor_of_somebody_else_is_left_alone() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno())
        try:
            with StopSignals() as signals:
                os.kill(os.getpid(), signal.SIGUSR1)
                assert signals.received == signal.SIGUSR1
                assert signals.since_s >= 0.0
            assert ours.recv(1) == bytes([signal.SIGUSR1])
        finally:
            assert signal.set_wakeup_fd(-1) == theirs.fileno()


FORKED = """
import os, signal, sys, time
from ckptcoord.trainers.signals import StopSignals

def child(do):
    ours, theirs = os.pipe()
    number = os.fork()
    if not number:
        os.write(theirs, b"1")
        do()
    os.read(ours, 1)
    return number

def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

if {handled}:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    signal.signal(signal.SIGUSR1, lambda *_: print("told", flush=True))
with StopSignals() as signals, StopSignals():
    sleeping = child(lambda: time.sleep(60))
    os.kill(sleeping, signal.SIGUSR1)
    os.kill(sleeping, signal.SIGTERM)
    print(end(sleeping))
    print(end(child(lambda: sys.exit(5))))
    began_s = time.monotonic()
    os.kill(os.getpid(), signal.SIGTERM)
    while signals._arrivals.first_s is None and time.monotonic() < began_s + 20:
        time.sleep(0.001)
    print(signals._arrivals.first_s >= began_s)
"""


@pytest.mark.parametrize(
    ("handled", "said"), [(0, ["-15", "5", "True"]), (1, ["told", "7", "5", "True"])]
)
def test_a_forked_child_has_the_old_handlers_and_its_signals_are_its_own(
    handled: int, said: list[str]
) -> None:
    """But no SIGUSR1 to the whole process group ends it, as if it were a loader's worker."""
    command = [sys.executable, "-u", "-W", "ignore", "-c", FORKED.format(handled=handled)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == said, done.stderr


def test_another_thread_catches_nothing_and_breaks_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    inside = []

    def work() -> None:
        with StopSignals():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


# --- batches --------------------------------------------------------------------------------------


def test_a_batch_of_any_shape_is_moved_and_keeps_its_shape() -> None:
    ones = torch.ones(2)
    batch = {"a": ones, "b": [ones, (ones, "text")], "c": Pair(ones, 3)}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"].is_meta
    assert moved["b"][0].is_meta
    assert moved["b"][1][1] == "text"
    assert isinstance(moved["c"], Pair)
    assert moved["c"].x.is_meta


def test_samples_and_tokens_are_counted() -> None:
    ids = torch.zeros(3, 5)
    assert sample_count({"n": 1, "ids": ids}) == 3
    assert sample_count(["x", (ids,)]) == 3
    assert sample_count(torch.tensor(1.0)) == 1
    assert sample_count("text") == 1
    assert token_count({"input_ids": ids}) == 15
    assert token_count([ids]) == token_count({"x": ids}) == 0


@pytest.mark.parametrize(
    "output",
    [
        torch.tensor(2.0),
        torch.tensor([2.0]),
        {"loss": torch.tensor(2.0)},
        OrderedDict(loss=torch.tensor(2.0)),
        (torch.tensor(2.0), "logits"),
        [torch.tensor(2.0)],
        SimpleNamespace(loss=torch.tensor(2.0)),
    ],
)
def test_the_loss_is_found_where_models_put_it(output: Any) -> None:
    assert float(loss_of(output)) == 2.0


@pytest.mark.parametrize("output", [{}, (), None, 2.0, torch.ones(2), {"loss": 1.0}])
def test_an_output_without_a_loss_is_refused(output: Any) -> None:
    with pytest.raises(ConfigError, match="without a loss"):
        loss_of(output)


# --- schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (SchedulerType.LINEAR, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        (SchedulerType.CONSTANT, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (SchedulerType.COSINE, [0.0, 0.5, 1.0, 0.85355, 0.5, 0.14645, 0.0, 0.0]),
    ],
)
def test_the_learning_rate_warms_up_and_falls_to_the_end(
    kind: SchedulerType, wanted: list[float]
) -> None:
    factors = [lr_factor(kind, step, 2, 6) for step in range(8)]
    assert factors == pytest.approx(wanted, abs=1e-5)


def test_a_resumed_schedule_follows_its_own_arguments() -> None:
    args = TrainingArguments(learning_rate=1.0)
    model = torch.nn.Linear(2, 2)
    saved = default_scheduler(default_optimizer(model, args), args, 10).state_dict()
    longer = default_scheduler(default_optimizer(model, args), args, 20)
    longer.load_state_dict(saved)
    longer.optimizer.step()
    longer.step()
    assert longer.get_last_lr() == [0.95, 0.95]


def test_only_matrices_decay_and_frozen_parameters_stay_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    groups = default_optimizer(model, TrainingArguments(weight_decay=0.3)).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.3), (2, 0.0)]


# --- state, ranks ---------------------------------------------------------------------------------


def test_progress_round_trips_and_leaves_the_log_out() -> None:
    state = TrainerState(global_step=7, epoch_index=1, steps_in_epoch=3, best_metric=-0.0)
    state.log_history.append({"loss": 1.0})
    saved = state.state_dict()
    assert "log_history" not in saved
    other = TrainerState(max_steps=99, steps_per_epoch=4)
    other.load_state_dict(saved)
    assert other.state_dict() == saved
    assert (other.epoch, other.max_steps, other.log_history) == (1.75, 99, [])


@given(st.tuples(*[st.booleans()] * 5))
@settings(max_examples=32)
def test_control_survives_as_flags(flags: tuple[bool, ...]) -> None:
    control = TrainerControl(**dict(zip(TrainerControl.__slots__, flags, strict=True)))
    other = TrainerControl()
    other.take_flags(control.to_flags())
    assert other == control


def test_one_rank_agrees_with_itself() -> None:
    ranks = OneRank()
    assert ranks.agree([1, 0]) == (1, 0)
    assert ranks.total([0.5]) == (0.5,)
    assert ranks.from_first("x") == "x"
