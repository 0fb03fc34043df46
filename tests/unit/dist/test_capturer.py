"""Captures one after the other are those that one alone would have been."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord import SharingPattern, StateComponent
from ckptcoord.dist import capture as module
from ckptcoord.dist.capture import capture
from ckptcoord.dist.capturer import Capturer, LiveTensors
from ckptcoord.errors import UnsupportedStateError


def component(stateful, key="m"):
    return StateComponent(key, stateful, SharingPattern.GLOBAL)


def same(found, expected):
    assert found.document == expected.document
    assert list(found.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        again = found.tensors[name]
        assert (again.spec, again.digest) == (tensor.spec, tensor.digest)
        assert again.value is tensor.value
    assert found.config == expected.config


def forms(capturer, component, times):
    found = [capturer.capture(component).tensors for _ in range(times)]
    return [one.form if isinstance(one, LiveTensors) else None for one in found]


class Job:
    """A state with everything in it that training may change."""

    def __init__(self):
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.state = {
            "model": None,
            "optimizer": None,
            "schedule": None,
            "ema": {"w": torch.ones(3, 3), "n": torch.tensor(0)},
            "losses": [0.5, (1, 2.0, None)],
            "rng": torch.zeros(16, dtype=torch.uint8),
        }

    def state_dict(self):
        parts = {name: getattr(self, name).state_dict() for name in list(self.state)[:3]}
        return self.state | parts

    def load_state_dict(self, state):
        raise NotImplementedError

    def step(self):
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.schedule.step()

    def constants(self):
        self.state["losses"][0] += 0.25
        self.state["rng"] = torch.ones(16, dtype=torch.uint8)

    def grow(self):
        self.state["losses"].append(-0.0)

    def tie(self):
        self.model[1].weight = self.model[0].weight

    def swap(self):
        self.state["ema"]["w"] = self.model[0].weight.detach()

    def untie(self):
        self.state["ema"]["w"] = torch.zeros(3, 3)

    def transpose(self):
        self.state["ema"]["w"] = torch.zeros(3, 3).t()

    def cast(self):
        self.state["ema"]["w"] = torch.ones(3, 3, dtype=torch.float64)

    def resize(self):
        self.state["ema"]["n"] = torch.zeros(4)

    def conjugate(self):
        self.state["ema"]["n"] = torch.tensor([1 + 2j]).conj()

    def parameter(self):
        self.state["ema"]["w"] = torch.nn.Parameter(torch.zeros(3, 3))

    def array(self):
        self.state["ema"]["n"] = np.zeros(3)

    def empty(self):
        self.state["ema"]["n"] = torch.zeros(0)

    def move(self):
        self.model[0].weight.data = self.model[0].weight.data.clone()

    def version(self):
        self.model.register_buffer("extra", torch.ones(2))

    def flag(self):
        self.optimizer.param_groups[0]["lr"] = torch.tensor(0.5)

    def exact(self):
        self.optimizer.param_groups[0]["lr"] = np.float64(0.5)


CHANGES = [name for name in vars(Job) if name[0] != "_" and "state_dict" not in name]


@settings(max_examples=120, deadline=None)
@given(st.lists(st.lists(st.sampled_from(CHANGES), max_size=2), max_size=8))
def test_whatever_changes_between_saves_each_is_captured_as_if_alone(turns):
    job, capturer = Job(), Capturer()
    part = component(job)
    state = None
    part = StateComponent("m", job, SharingPattern.GLOBAL, get_state=lambda: state)
    for turn in turns:
        for change in turn:
            getattr(job, change)()
        state = job.state_dict()
        same(capturer.capture(part), capture(part))


def test_what_keeps_its_form_is_of_one_form_wherever_it_lies():
    job, capturer = Job(), Capturer()
    job.step()
    part = component(job)
    first, second, third = forms(capturer, part, 3)
    assert first is None
    assert second is third is not None
    job.step()
    job.move()
    job.constants()
    assert forms(capturer, part, 1) == [second]


@pytest.mark.parametrize("change", ["transpose", "cast", "resize", "conjugate"])
def test_what_changes_its_form_is_of_another(change):
    job, capturer = Job(), Capturer()
    part = component(job)
    _, before = forms(capturer, part, 2)
    getattr(job, change)()
    after, again = forms(capturer, part, 2)
    assert after is again
    assert after is not None
    assert after is not before


@pytest.mark.parametrize("change", ["grow", "tie", "swap", "parameter", "version", "flag"])
def test_what_is_built_otherwise_is_learned_anew(change):
    job, capturer = Job(), Capturer()
    part = component(job)
    forms(capturer, part, 2)
    getattr(job, change)()
    first, second = forms(capturer, part, 2)
    assert first is None
    assert second is not None


def test_what_is_never_as_it_was_is_soon_expected_no_more(monkeypatch):
    compiled = []
    monkeypatch.setattr("ckptcoord.dist.capturer.compile_outline", lambda *_: compiled.append(1))
    capturer, state = Capturer(), {"a": torch.ones(3)}
    for _ in range(9):
        capturer.capture(component(state))
    assert len(compiled) == 3


def test_what_was_like_the_one_before_may_change_again():
    capturer, state = Capturer(), {"a": torch.ones(3)}
    for size in range(6):
        state["n"] = list(range(size))
        first, second = forms(capturer, component(state), 2)
        assert first is None
        assert second is not None


def test_two_components_are_known_apart():
    capturer = Capturer()
    parts = [component({"a": torch.ones(3)}, "x"), component({"a": 1}, "y")]
    for _ in range(2):
        found = [capturer.capture(part) for part in parts]
    assert [isinstance(one.tensors, LiveTensors) for one in found] == [True, True]
    for one, part in zip(found, parts, strict=True):
        same(one, capture(part))


def test_a_document_is_of_the_call_whenever_it_is_made():
    capturer, state = Capturer(), {"n": 1, "more": OrderedDict(x=[1.5])}
    part = component(state)
    capturer.capture(part)
    expected = capture(part).document
    found = capturer.capture(part)
    state["n"] = 2
    state["more"]["x"].append(3)
    assert found.document == expected
    assert found.document is found.document


def test_a_document_that_is_too_large_says_so_when_it_is_asked_for(monkeypatch):
    capturer, state = Capturer(), {"text": "a"}
    part = component(state)
    capturer.capture(part)
    monkeypatch.setattr(module, "MAX_STATE_BYTES", 100)
    assert capturer.capture(part).document
    state["text"] = "a" * 100
    found = capturer.capture(part)
    for ask in (lambda: found.document, lambda: found.document, lambda: capture(part)):
        with pytest.raises(UnsupportedStateError, match=r"bytes of JSON, 100 at most") as caught:
            ask()
        assert caught.value.path == "m"


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, device="meta"),
        torch.zeros(2).to_sparse(),
        torch.zeros(2, dtype=torch.bits8),
    ],
)
def test_a_tensor_without_plain_bytes_is_refused_by_its_path_in_any_save(tensor):
    capturer, state = Capturer(), {"a": {"b": torch.zeros(2)}}
    part = component(state)
    forms(capturer, part, 2)
    state["a"]["b"] = tensor
    for _ in range(2):
        with pytest.raises(UnsupportedStateError) as caught:
            capturer.capture(part)
        assert caught.value.path == "m.a.b"
    state["a"]["b"] = torch.zeros(2)
    same(capturer.capture(part), capture(part))


def test_nothing_of_the_state_is_kept_alive():
    capturer, tensor = Capturer(), torch.ones(9)
    alive = weakref.ref(tensor)
    state = {"a": tensor}
    part = component(state)
    for _ in range(3):
        capturer.capture(part)
    state.clear()
    del tensor
    gc.collect()
    assert alive() is None
