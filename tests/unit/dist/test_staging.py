"""What is staged is the state at the call, byte for byte, whoever copies it and whenever."""

from __future__ import annotations

import asyncio
import collections
import gc
import signal
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord import SharingPattern, StateComponent, ValidationLevel
from ckptcoord.dist.capture import TORCH_DTYPES, capture
from ckptcoord.dist.capturer import Capturer
from ckptcoord.dist.copying import copy_flat
from ckptcoord.dist.deadline import Deadline
from ckptcoord.dist.pieces import Pieces
from ckptcoord.dist.replication import tensor_digest
from ckptcoord.dist.staging import Stager, StagingPool
from ckptcoord.errors import CkptError, ClosedError, ConfigError, ThreadLimitError

WAIT_S = 30
MIB = 1 << 20


def component(state, key="m"):
    return StateComponent(key, state, SharingPattern.REPLICATED)


def hold(*components):
    return {one.key: capture(one) for one in components}


def at_call(held):
    return {
        (key, name): tensor.read().copy()
        for key, captured in held.items()
        for name, tensor in captured.tensors.items()
    }


def staged(snapshot):
    return {
        (key, name): tensor.read().copy()
        for key, captured in snapshot.components().items()
        for name, tensor in captured.tensors.items()
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, data in expected.items():
        assert np.array_equal(found[name], data), name


class All:
    def __contains__(self, name):
        return True


everything = collections.defaultdict(All)
nothing = collections.defaultdict(frozenset)


@contextmanager
def stager(*components, pool=None, **settings):
    one = Stager(components, pool or StagingPool(), **settings)
    try:
        yield one
    finally:
        one.close()


def training(elements=8 * MIB // 4 + 5, count=3):
    """A model in pieces of more than one, its optimizer after a first step, and a step."""
    own = torch.Generator().manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(elements, generator=own)) for _ in range(count)]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    state = {f"w{i}": parameter for i, parameter in enumerate(parameters)}
    return component(state, "model"), component(optimizer, "optimizer"), optimizer


class Gate:
    """A probe that holds the staging thread at its first piece until it is opened."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()
        self.threads = []
        self.elsewhere = threading.Semaphore(0)

    def __call__(self, step):
        assert step == "copy"
        self.threads.append(threading.current_thread())
        if threading.current_thread().name == "ckptcoord-staging":
            self.reached.set()
            assert self.open.wait(WAIT_S)
        else:
            self.elsewhere.release()


# --- bytes ----------------------------------------------------------------------------------------


def layouts(tensor):
    """The same elements, or some of them, in all the ways that torch may hold them."""
    flat = tensor.reshape(-1)
    wide = tensor.reshape(-1, 2) if tensor.numel() % 2 == 0 else tensor.reshape(1, -1)
    yield tensor
    yield flat[1:]
    yield flat[::3]
    yield wide.t()
    yield wide.unsqueeze(0).expand(3, *wide.shape)
    yield wide.unfold(1, 1, 1)
    yield flat[:1].reshape(())
    yield flat[5:6]
    yield flat[:0]
    yield wide[:, :0]
    if tensor.is_complex():
        yield wide.conj()
        yield wide.conj().t().imag
        yield flat.real


@st.composite
def any_tensor(draw):
    dtype = draw(st.sampled_from(sorted(TORCH_DTYPES)))
    elements = draw(st.sampled_from([6, 10, 64, 4096, 33_000]))
    own = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    width = TORCH_DTYPES[dtype].itemsize
    data = torch.randint(0, 2 if dtype == "BOOL" else 256, (elements * width,), generator=own)
    tensor = data.to(torch.uint8).view(TORCH_DTYPES[dtype])
    found = list(layouts(tensor))
    return found[draw(st.integers(0, len(found) - 1))]


@st.composite
def any_array(draw):
    dtype = draw(st.sampled_from(["f2", "f4", "f8", "i1", "i8", "u2", "c8", "c16", "?"]))
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    array = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2, shape).astype(dtype)
    array = np.asarray(array, order=draw(st.sampled_from("CF")))
    array = draw(st.sampled_from([array, array.T, array[..., ::2] if shape else array]))
    array.flags.writeable = draw(st.booleans())
    return array


@settings(max_examples=150, deadline=None)
@given(st.lists(any_tensor() | any_array(), min_size=1, max_size=6))
def test_any_leaf_is_staged_as_it_would_be_read(leaves):
    held = hold(component({f"x{i}": leaf for i, leaf in enumerate(leaves)}))
    expected = at_call(held)
    specs = {name: tensor.spec for name, tensor in held["m"].tensors.items()}
    live = {name: tensor.value for name, tensor in held["m"].tensors.items()}
    with stager(deferred=False) as one:
        snapshot = one.take(held, everything, {})
        same(staged(snapshot), expected)
        for name, tensor in snapshot.components()["m"].tensors.items():
            assert tensor.spec == specs[name]
            assert type(tensor.value) is (
                np.ndarray if isinstance(live[name], np.ndarray) else torch.Tensor
            )
            assert tuple(tensor.value.shape) == tuple(live[name].shape)
            assert tensor.value.dtype == live[name].dtype
            assert np.array_equal(tensor.head(3), expected["m", name][: tensor.head(3).size])


def test_what_changes_after_the_call_is_staged_as_it_was():
    state = {"small": torch.zeros(9), "large": torch.zeros(3 * MIB), "array": np.zeros(7)}
    held = hold(component(state))
    expected = at_call(held)
    with stager() as one:
        snapshot = one.take(held, everything, {})
        for name in state:
            state[name] += 1
        same(staged(snapshot), expected)
        assert snapshot.components()["m"].document == held["m"].document


def test_an_exotic_tensor_is_read_through_its_own_code():
    class Odd(torch.Tensor):
        pass

    state = {"odd": torch.arange(40_000.0).as_subclass(Odd), "grad": torch.ones(9).requires_grad_()}
    held = hold(component(state))
    with stager() as one, torch.inference_mode():
        same(staged(one.take(held, everything, {})), at_call(held))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_a_gpu_are_staged_as_they_were():
    parameters = [torch.nn.Parameter(torch.randn(1 << 22, device="cuda")) for _ in range(4)]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    state = component({f"w{i}": p for i, p in enumerate(parameters)}, "model")
    other = component({"x": torch.randn(999, 7, device="cuda").t(), "host": torch.ones(9)}, "other")
    parts = (state, component(optimizer, "optimizer"), other)
    with stager(*parts) as one:
        for _ in range(6):
            held = hold(*parts)
            expected = at_call(held)
            snapshot = one.take(held, everything, {"model": ValidationLevel.TENSOR})
            other.stateful["x"] += 1
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            same(staged(snapshot), expected)
            snapshot.release()


# --- one snapshot after the other -----------------------------------------------------------------


class Turns:
    """A state whose tensors change between saves in all that a layout or schedule depends on."""

    def __init__(self, deferred):
        self.model, self.part, self.optimizer = training(20_000)
        weights = self.model.stateful
        weights |= {f"small{i}": torch.randn(50 + i) for i in range(3)}
        weights |= {"middle": torch.randn(40_000), "large": torch.randn(400_000), "bytes": BYTES}
        self.other = component({"x": torch.ones(3)}, "other")
        self.levels, self.wanted = {}, everything
        self.parts = [self.model, self.part, self.other]
        self.capturer = Capturer()
        self.stager = Stager(self.parts, StagingPool(), deferred=deferred)

    def take(self):
        held = {one.key: self.capturer.capture(one) for one in self.parts}
        expected = {
            (key, name): (
                tensor.spec,
                tensor.read().tobytes() if name in self.wanted[key] else None,
                tensor_digest(tensor, self.levels[key]) if key in self.levels else None,
            )
            for key, captured in held.items()
            for name, tensor in captured.tensors.items()
        }
        documents = {key: one.document for key, one in held.items()}
        return self.stager.take(held, self.wanted, self.levels), expected, documents

    def step(self):
        self.optimizer.step()

    def write(self):
        for value in self.model.stateful.values():
            if not value.requires_grad:
                with torch.inference_mode(value.is_inference()):
                    value.add_(1)

    def move(self):
        for name in ("small0", "middle", "large"):
            self.model.stateful[name] = self.model.stateful[name].clone()

    def move_weight(self):
        weight = self.model.stateful["w1"]
        weight.data = weight.data.clone()

    def alias(self):
        self.model.stateful["large"] = self.optimizer.param_groups[0]["params"][0].detach()[1:]

    def transpose(self):
        self.model.stateful["small1"] = torch.randn(17, 3).t()
        self.model.stateful["middle"] = torch.randn(200, 200).t()

    def inference(self):
        with torch.inference_mode():
            self.model.stateful["middle"] = torch.randn(40_000)

    def momentum(self):
        for parameter in self.optimizer.param_groups[0]["params"]:
            self.optimizer.state[parameter] = {"mean": torch.randn(20_000), "n": torch.ones(())}

    def replace_state(self):
        for state in self.optimizer.state.values():
            state["mean"] = state["mean"].clone()

    def grow(self):
        self.other.stateful[f"more{len(self.other.stateful)}"] = torch.ones(5)

    def array(self):  # from then on, the component has no form
        self.other.stateful["array"] = np.arange(7.0)

    def want_some(self):
        self.wanted = {one.key: Some(bool(self.levels)) for one in self.parts}

    def want_all(self):
        self.wanted = everything

    def compare(self):
        self.levels = {"model": ValidationLevel.QUICK, "other": ValidationLevel.TENSOR}

    def trust(self):
        self.levels = {}


class Some:
    def __init__(self, odd):
        self.odd = odd

    def __contains__(self, name):
        return len(name) % 2 == self.odd


BYTES = torch.arange(99, dtype=torch.uint8)[::2]
CHANGES = [name for name in vars(Turns) if name[0] != "_" and name != "take"]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(CHANGES), max_size=3), min_size=1, max_size=7),
    st.sampled_from([True, False, "auto"]),
)
def test_whatever_changes_between_snapshots_each_is_of_its_call(turns, deferred):
    job = Turns(deferred)
    try:
        for changes in [[], [], *turns, []]:
            for change in changes:
                getattr(job, change)()
            snapshot, expected, documents = job.take()
            job.step()
            job.write()
            snapshot.staged.result(WAIT_S)
            found = snapshot.components()
            assert {key: one.document for key, one in found.items()} == documents
            assert {
                (key, name): (
                    tensor.spec,
                    None if tensor.value is None else tensor.read().tobytes(),
                    tensor.digest,
                )
                for key, one in found.items()
                for name, tensor in one.tensors.items()
            } == expected
            snapshot.release()
    finally:
        job.stager.close()


def test_what_stays_as_it_was_is_neither_laid_out_nor_scheduled_again():
    job = Turns(deferred=True)
    seen = set()
    for turn in range(5):
        job.take()[0].components()
        job.step()
        job.write()
        if turn > 1:
            seen.add((job.stager._layout, job.stager._schedule))
    job.move()
    job.take()[0].components()
    job.stager.close()
    assert len(seen) == 1
    ((layout, schedule),) = seen
    assert job.stager._layout is layout
    assert job.stager._schedule is not schedule


def test_what_an_optimizer_gives_up_is_copied_at_the_call_from_then_on():
    job = Turns(deferred=True)
    optimizer = StateComponent("o", job.optimizer, SharingPattern.REPLICATED, get_state=dict)
    job.parts = [job.model, optimizer]
    job.stager.close()
    job.stager = Stager(job.parts, StagingPool(), deferred=True)
    for _ in range(2):
        assert job.take()[0].components()
    weight = job.optimizer.param_groups[0]["params"].pop(0)
    layout = job.stager._layout
    snapshot, expected, _ = job.take()
    weight.data.zero_()
    found = snapshot.components()["model"].tensors["w0"]
    assert found.read().tobytes() == expected["model", "w0"][1]
    assert job.stager._layout is layout
    job.stager.close()


def test_a_layout_and_a_schedule_keep_no_tensor_alive():
    import weakref

    job = Turns(deferred=True)
    tensors = [job.model.stateful.pop(name) for name in ("small0", "large")]
    job.model.stateful.update(a=tensors[0], b=tensors[1])
    alive = [weakref.ref(one) for one in (*tensors, *job.optimizer.param_groups[0]["params"])]
    for _ in range(3):
        job.take()[0].components()
    del tensors
    job.model.stateful.clear()
    job.optimizer.param_groups.clear()
    job.optimizer.state.clear()
    gc.collect()
    assert [one() for one in alive] == [None] * 5
    job.stager.close()


# --- what is kept, what is digested ---------------------------------------------------------------


def test_what_another_rank_writes_is_not_kept():
    held = hold(component({"a": torch.ones(5), "b": torch.ones(6)}))
    with stager() as one:
        found = one.take(held, {"m": {"b"}}, {}).components()["m"]
    assert list(found.tensors) == ["a", "b"]
    assert (found.tensors["a"].value, found.tensors["a"].digest) == (None, None)
    assert found.tensors["a"].spec == held["m"].tensors["a"].spec
    for read in (found.tensors["a"].read, lambda: found.tensors["a"].head(2)):
        with pytest.raises(CkptError, match="tensor 'a' were not kept"):
            read()
    assert one.pool.held_bytes == 64


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("level", list(ValidationLevel))
def test_digests_are_those_of_the_state_at_the_call_kept_or_not(level, deferred):
    model, optimizer_part, optimizer = training(30_000)
    model.stateful["buffer"] = torch.ones(5000)
    model.stateful["array"] = np.arange(5000)
    held = hold(model, optimizer_part)
    expected = {
        name: tensor_digest(tensor, level) for name, tensor in held["model"].tensors.items()
    }
    gate = Gate()
    with stager(model, optimizer_part, deferred=deferred, probe=gate) as one:
        kept = ("w0", "buffer")
        snapshot = one.take(held, collections.defaultdict(lambda: kept), {"model": level})
        model.stateful["buffer"] += 1
        model.stateful["array"] += 1
        gate.open.set()
        optimizer.step()
        found = snapshot.components()
    for name, tensor in found["model"].tensors.items():
        digest = None if level is ValidationLevel.NONE else expected[name]
        assert (tensor.digest, tensor.value is not None) == (digest, name in kept)


# --- copies that are left to later ----------------------------------------------------------------


def test_a_step_waits_for_what_is_not_copied_and_helps():
    model, optimizer_part, optimizer = training()
    gate = Gate()
    with stager(model, optimizer_part, deferred=True, probe=gate) as one:
        held = hold(model, optimizer_part)
        expected = at_call(held)
        snapshot = one.take(held, everything, {})
        assert gate.reached.wait(WAIT_S)
        stepping = threading.Thread(target=optimizer.step, name="stepping")
        stepping.start()
        for _ in range(len(_pieces_of(model)) - 1):
            assert gate.elsewhere.acquire(timeout=WAIT_S)
        same(at_call(hold(model)), {k: v for k, v in expected.items() if k[0] == "model"})
        assert stepping.is_alive()
        assert not snapshot.staged.done()
        gate.open.set()
        stepping.join(WAIT_S)
        same(staged(snapshot), expected)
        assert not np.array_equal(at_call(hold(model))["model", "w0"], expected["model", "w0"])
        assert {thread.name for thread in gate.threads} == {"ckptcoord-staging", "stepping"}


def _pieces_of(model):
    return [start for w in model.stateful.values() for start in range(0, w.nbytes, 8 * MIB)][
        : -(-sum(w.nbytes for w in model.stateful.values()) // (8 * MIB))
    ]


def test_finish_is_idempotent_and_counts_what_it_blocks():
    model, optimizer_part, _ = training(30_000)
    gate = Gate()
    gate.open.set()
    with stager(model, optimizer_part, deferred=True, probe=gate) as one:
        held = hold(model, optimizer_part)
        snapshot = one.take(held, everything, {})
        before_s = snapshot.blocked_s
        snapshot.finish()
        snapshot.finish()
        assert snapshot.blocked_s >= before_s > 0
        assert snapshot.blocked_s >= snapshot.waited_s
        same(staged(snapshot), at_call(held))
        snapshot.finish()


@pytest.mark.parametrize("error", [MemoryError("no more"), SystemExit(3), OSError("gone")])
def test_what_fails_beside_training_fails_the_save_alone(error):
    heard = type(error) if isinstance(error, Exception) else CkptError
    model, optimizer_part, optimizer = training(30_000)
    failing = [error]

    def probe(step):
        if failing and threading.current_thread().name == "ckptcoord-staging":
            raise failing.pop()

    with stager(model, optimizer_part, deferred=True, probe=probe) as one:
        first = one.take(hold(model, optimizer_part), everything, {})
        with pytest.raises(heard):
            first.staged.result(WAIT_S)
        with pytest.raises(heard):
            first.components()
        first.release()
        optimizer.step()
        held = hold(model, optimizer_part)
        expected = at_call(held)
        second = one.take(held, everything, {})
        optimizer.step()
        same(staged(second), expected)
        assert one.pool.held_bytes < 2 * sum(map(len, expected.values()))


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError(), ValueError()])
@pytest.mark.parametrize("released", [False, True])
def test_whatever_a_callback_raises_the_thread_goes_on_and_the_room_is_given_back(
    caplog, error, released
):
    def leave(_):
        raise error

    model, optimizer_part, _ = training(30_000)
    gate, room = Gate(), StagingPool(500_000)  # for one
    with stager(model, optimizer_part, pool=room, deferred=True, probe=gate) as one:
        for _ in range(3):
            gate.open.clear()
            gate.reached.clear()
            held = hold(model, optimizer_part)
            snapshot = one.take(held, everything, {}, deadline=Deadline.after(WAIT_S))
            assert gate.reached.wait(WAIT_S)
            snapshot.staged.add_done_callback(leave)
            if released:  # at its end, then
                snapshot.release()
            gate.open.set()
            found = snapshot.staged.exception(WAIT_S)
            assert isinstance(found, ClosedError if released else type(None))
            if not released:
                snapshot.release()
    assert isinstance(error, ValueError) or "a callback of PendingSave.staged" in caplog.text


class PanicException(BaseException):
    """Of the name of pyo3's, which is no Exception."""


@pytest.mark.parametrize("error", [MemoryError("no more"), PanicException("unwrap on a None")])
def test_what_fails_in_the_hook_fails_the_save_and_not_the_step(error):
    model, optimizer_part, optimizer = training()
    gate = Gate()

    def probe(step):
        gate(step)
        if threading.current_thread().name != "ckptcoord-staging":
            gate.open.set()
            raise error

    with stager(model, optimizer_part, deferred=True, probe=probe) as one:
        snapshot = one.take(hold(model, optimizer_part), everything, {})
        assert gate.reached.wait(WAIT_S)
        optimizer.step()
        with pytest.raises((MemoryError, CkptError), match=str(error)):
            snapshot.staged.result(WAIT_S)


def test_an_interrupt_in_the_hook_reaches_the_user():
    model, optimizer_part, optimizer = training()
    gate = Gate()

    def probe(step):
        gate(step)
        if threading.current_thread().name != "ckptcoord-staging":
            raise KeyboardInterrupt

    with stager(model, optimizer_part, deferred=True, probe=probe) as one:
        snapshot = one.take(hold(model, optimizer_part), everything, {})
        assert gate.reached.wait(WAIT_S)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        gate.open.set()
        with pytest.raises(CkptError, match="interrupted"):
            snapshot.staged.result(WAIT_S)


def test_what_fails_at_the_call_gives_the_room_back():
    class Broken(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.cpu:
                raise MemoryError
            return super().__torch_function__(function, types, args, kwargs)

    held = hold(component({"a": torch.ones(MIB), "b": torch.ones(9).as_subclass(Broken)}))
    with stager(pool=StagingPool(5 * MIB)) as one:
        for _ in range(3):
            with pytest.raises(MemoryError):
                one.take(held, everything, {})
        one.take(held, {"m": {"a"}}, {}).components()


def test_when_the_call_fails_no_thread_goes_on_with_its_copies(monkeypatch):
    under_way, slow = [], threading.Event()

    def copy(*_):
        under_way.append(True)
        slow.wait(0.2)
        under_way.remove(True)

    def fail(*_):
        while not under_way:
            slow.wait(0.01)
        raise MemoryError

    monkeypatch.setattr("ckptcoord.dist.snapshot.copy_flat", copy)
    monkeypatch.setattr("ckptcoord.dist.snapshot.copy_whole", fail)
    held = hold(component({"a": torch.ones(30 * MIB), "b": np.ones(9)}))
    with stager() as one:
        with pytest.raises(MemoryError):
            one.take(held, everything, {})
        assert not under_way
        slow.wait(0.3)
        assert not under_way


@pytest.mark.parametrize("started", [0, 1])
def test_when_no_more_threads_can_be_started_those_that_were_copy(monkeypatch, started):
    copied_by, begun = set(), threading.Event()
    start = threading.Thread.start

    def copy(*args):
        copied_by.add(threading.current_thread().name)
        begun.set()
        copy_flat(*args)

    def start_some(thread):
        if thread.name == f"ckptcoord-copying_{started}":
            assert not started or begun.wait(WAIT_S)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr("ckptcoord.dist.snapshot.copy_flat", copy)
    monkeypatch.setattr(threading.Thread, "start", start_some)
    held = hold(component({"a": torch.randn(30 * MIB)}))
    with stager(threads=3) as one:
        for _ in range(2):
            begun.clear()
            same(staged(one.take(held, everything, {})), at_call(held))
            assert one._helpers is None  # and nothing waits in it that would hold the state
        assert {f"ckptcoord-copying_{index}" for index in range(started)} < copied_by


def test_an_interrupt_at_the_call_waits_for_the_copies_that_are_under_way(monkeypatch):
    """Else they would go on in a buffer that is somebody else's by then."""
    under_way, slow = [], threading.Event()

    def copy(*_):
        if threading.current_thread() is threading.main_thread():
            while not under_way:
                slow.wait(0.01)
            return
        under_way.append(True)
        slow.wait(0.2)  # until the main thread has nothing to do but wait
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        slow.wait(0.2)
        under_way.remove(True)

    monkeypatch.setattr("ckptcoord.dist.snapshot.copy_flat", copy)
    held = hold(component({"a": torch.ones(4 * MIB)}))  # two pieces
    with stager(threads=2) as one:
        with pytest.raises(KeyboardInterrupt):
            one.take(held, everything, {})
        assert not under_way


def test_a_staging_thread_that_could_not_be_started_is_started_by_the_next_call(monkeypatch):
    start, refused = threading.Thread.start, []

    def start_at_last(thread):
        if thread.name == "ckptcoord-staging" and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_at_last)
    held = hold(component({"a": torch.ones(MIB)}))
    with stager(pool=StagingPool(5 * MIB)) as one:  # room for one
        with pytest.raises(ThreadLimitError):
            one.take(held, everything, {"m": ValidationLevel.TENSOR})
        snapshot = one.take(held, everything, {"m": ValidationLevel.TENSOR})
        snapshot.staged.result(WAIT_S)


# --- the end --------------------------------------------------------------------------------------


def test_nothing_can_be_read_once_it_was_released():
    held = hold(component({"a": torch.ones(9), "b": np.ones(9)}))
    with stager() as one:
        snapshot = one.take(held, everything, {})
        tensors = list(snapshot.components()["m"].tensors.values())
        snapshot.release()
        snapshot.release()
        for tensor in tensors:
            for read in (
                tensor.read,
                lambda tensor=tensor: tensor.value,
                lambda t=tensor: t.head(1),
            ):
                with pytest.raises(ClosedError):
                    read()
        with pytest.raises(ClosedError):
            snapshot.components()


def test_released_before_it_was_copied_it_writes_into_nobody_elses_buffer():
    model, optimizer_part, optimizer = training(30_000)
    gate = Gate()
    with stager(model, optimizer_part, deferred=True, probe=gate) as one:
        first = one.take(hold(model, optimizer_part), everything, {})
        assert gate.reached.wait(WAIT_S)
        first.release()
        held = hold(model, optimizer_part)
        expected = at_call(held)
        second = one.take(held, everything, {}, deferred=False)
        gate.open.set()
        with pytest.raises(ClosedError):
            first.staged.result(WAIT_S)
        optimizer.step()
        same(staged(second), expected)
        second.release()


def test_close_finishes_what_was_taken_and_leaves_no_thread_and_no_hook():
    from torch.optim import optimizer as module

    model, optimizer_part, _ = training()
    hooks = dict(module._global_optimizer_pre_hooks)
    threads = set(threading.enumerate())
    one = Stager([model, optimizer_part], StagingPool(), deferred=True)
    held = hold(model, optimizer_part)
    snapshot = one.take(held, everything, {"model": ValidationLevel.FULL})
    one.close()
    one.close()
    same(staged(snapshot), at_call(held))
    assert dict(module._global_optimizer_pre_hooks) == hooks
    assert not [t for t in set(threading.enumerate()) - threads if "ckptcoord" in t.name]
    with pytest.raises(ClosedError, match="the stager is closed"):
        one.take(held, everything, {})


def test_a_stager_that_nobody_closed_takes_its_thread_along_and_its_hook_does_nothing():
    model, optimizer_part, optimizer = training(30_000)
    one = Stager([model, optimizer_part], StagingPool(), deferred=True)
    one.take(hold(model, optimizer_part), everything, {}).staged.result(WAIT_S)
    thread = one._thread
    hook = one._hook
    del one
    gc.collect()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    optimizer.step()
    hook.remove()


def test_a_snapshot_that_needs_no_thread_starts_none():
    held = hold(component({"a": torch.ones(9)}))
    with stager() as one:
        snapshot = one.take(held, everything, {})
        assert snapshot.staged.done()
        assert one._thread is None
        assert one._hook is None


def test_nothing_live_is_kept_alive_by_what_is_staged():
    import weakref

    tensor = torch.ones(9)
    alive = weakref.ref(tensor)
    held = hold(component({"a": tensor}))
    with stager() as one:
        snapshot = one.take(held, everything, {})
        held = None
        del tensor
        gc.collect()
        # The component itself is declared for the coordinator's life, and so is what it holds.
        snapshot.components()["m"].component.stateful.clear()
        gc.collect()
        assert alive() is None
        assert snapshot.components()["m"].tensors["a"].read().view(np.float32).tolist() == [1.0] * 9


# --- room -----------------------------------------------------------------------------------------


def test_a_save_for_which_there_is_no_room_waits_for_one_before_it():
    held = hold(component({"a": torch.ones(MIB // 4)}))
    with stager(pool=StagingPool(MIB + 64)) as one:
        first = one.take(held, everything, {})
        taken = []
        waiting = threading.Thread(target=lambda: taken.append(one.take(held, everything, {})))
        waiting.start()
        with pytest.raises(CkptError, match="no room to stage"):
            one.take(held, everything, {}, deadline=Deadline.after(0.01))
        assert not taken
        first.release()
        waiting.join(WAIT_S)
        assert taken[0].waited_s > 0
        assert taken[0].blocked_s >= taken[0].waited_s
        same(staged(taken[0]), at_call(held))


def test_what_can_never_fit_is_told_before():
    held = hold(component({"a": torch.ones(16), "b": torch.ones(17)}))
    for budget, fits in ((None, True), (192, True), (191, False), (0, False)):
        with stager(pool=StagingPool(budget)) as one:
            assert one.fits(held, everything) is fits
            assert one.fits(held, nothing)
            if not fits:
                with pytest.raises(ConfigError, match="staging_bytes"):
                    one.take(held, everything, {})
            one.take(held, nothing, {}).components()


def test_a_buffer_is_used_again_where_it_is_not_far_too_large():
    pool = StagingPool()
    first = pool.acquire(1000)
    address = first.address
    first.release()
    for nbytes, again in ((1000, True), (500, True), (499, False), (1001, False)):
        buffer = pool.acquire(nbytes)
        assert (buffer.address == address) is again
        assert buffer.array.nbytes == (1000 if again else nbytes)
        assert buffer.address % 64 == 0
        assert buffer.tensor.data_ptr() == buffer.array.ctypes.data == buffer.address
        if again:
            buffer.release()


def test_idle_buffers_make_room_the_largest_first_and_go_when_out_of_use():
    pool = StagingPool(1000)
    for buffer in [pool.acquire(n) for n in (100, 300, 200)]:
        buffer.release()
    assert pool.held_bytes == 600
    large = pool.acquire(650)
    assert pool.held_bytes == 950  # without the 300
    large.release()
    for _ in range(12):
        pool.acquire(650).release()
    pool.acquire(10).release()
    assert pool.held_bytes == 660
    pool.close()
    assert pool.held_bytes == 0
    last = pool.acquire(10)
    last.release()
    assert pool.held_bytes == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 400) | st.just(-1), max_size=40))
def test_loans_never_overlap_and_never_exceed_the_budget(wishes):
    pool, loans = StagingPool(1000), []
    for wish in wishes:
        if wish < 0 and loans:
            buffer, value = loans.pop(0)
            assert (buffer.array == value).all()
            buffer.release()
            with pytest.raises(ClosedError):
                _ = buffer.array
        elif wish >= 0 and wish + sum(one.array.nbytes for one, _ in loans) <= 1000:
            buffer, value = pool.acquire(wish), len(loans) + 1
            buffer.array[:] = value
            loans.append((buffer, value))
        assert pool.held_bytes <= 1000
    for buffer, value in loans:
        assert (buffer.array == value).all()


def test_pieces_are_done_once_each_by_whoever_comes():
    done, barrier = [], threading.Barrier(4)
    pieces = Pieces(range(1000))

    def work():
        barrier.wait(WAIT_S)
        pieces.work(done.append)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    pieces.wait()
    assert sorted(done) == list(range(1000))
    for thread in threads:
        thread.join(WAIT_S)
