"""Where torch ends and bytes begin: what is captured, and what is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ckptcoord import SharingPattern, StateComponent
from ckptcoord.codec.tensorfile import TensorSpec
from ckptcoord.dist.capture import DTYPE_NAMES, TORCH_DTYPES, TorchAdapter, capture, tensor_bytes
from ckptcoord.dist.restore import apply, compare, empty_like, live_of, memory_of
from ckptcoord.dist.sharded import Sharded
from ckptcoord.dist.shutdown import shutdown
from ckptcoord.errors import CkptError, ConfigError, UnsupportedStateError


def one(state: object, **more: object) -> StateComponent:
    return StateComponent("m", state, SharingPattern.GLOBAL, **more)


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.zeros(2, device="meta"), "no data"),
        (torch.zeros(2, 2).to_sparse(), "layout"),
        (torch.zeros(2, dtype=torch.bits8), "bits8"),
    ],
)
def test_a_tensor_without_plain_bytes_is_refused_by_its_path(tensor, why):
    with pytest.raises(UnsupportedStateError, match=why) as caught:
        capture(one({"a": {"b": tensor}}))
    assert caught.value.path == "m.a.b"


@pytest.mark.parametrize("pattern", ["global", "replicated", "per_node"])
def test_a_part_of_a_tensor_is_refused_where_everyone_holds_a_whole_copy(pattern):
    state = {"w": Sharded(torch.zeros(2), offset=(2,), shape=(4,))}
    with pytest.raises(UnsupportedStateError, match=r"m\.w.*declare it PER_GROUP or PER_RANK"):
        capture(StateComponent("m", state, SharingPattern(pattern)))


def test_a_part_of_a_tensor_is_an_entry_that_is_named_for_its_box():
    state = {"w": Sharded(torch.ones(2, 3), offset=(2, 0), shape=(4, 3)), "b": torch.ones(1)}
    found = capture(StateComponent("m", state, SharingPattern.PER_RANK))
    assert list(found.tensors) == ["w[2:4,0:3]", "b"]
    assert found.tensors["w[2:4,0:3]"].spec.shape == (2, 3)
    assert b'{"$":"sharded","name":"w","shape":[4,3]}' in found.document


def test_an_empty_part_is_no_entry():
    state = {"w": Sharded(torch.ones(0, 3), offset=(4, 0), shape=(4, 3))}
    assert not capture(StateComponent("m", state, SharingPattern.PER_RANK)).tensors


def test_parts_of_the_same_memory_are_tied_if_they_are_the_same_part():
    memory = torch.ones(2)
    one = Sharded(memory, offset=(0,), shape=(4,))
    state = {"a": one, "b": Sharded(memory, (0,), (4,)), "c": Sharded(memory, (2,), (4,))}
    tensors = capture(StateComponent("m", state, SharingPattern.PER_RANK)).tensors
    assert list(tensors) == ["a[0:2]", "c[2:4]"]


def test_a_part_lies_inside_of_its_tensor():
    with pytest.raises(ConfigError, match="is no part of"):
        Sharded(torch.zeros(2), offset=(3,), shape=(4,))


def test_something_without_state_is_refused_by_its_type():
    with pytest.raises(ConfigError, match="is a int without state_dict"):
        capture(one(5))


def test_an_error_of_our_own_passes_through_and_any_other_is_wrapped():
    def ours() -> dict:
        raise ConfigError(field="x", why="y")

    def theirs() -> dict:
        raise ZeroDivisionError("oops")

    with pytest.raises(ConfigError, match="x: y"):
        capture(one({}, get_state=ours))
    with pytest.raises(CkptError, match="ZeroDivisionError: oops") as caught:
        capture(one({}, get_state=theirs))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_views_of_the_same_elements_are_one_tensor_and_others_are_not():
    base = torch.arange(6.0)
    tensors = {"a": base, "tied": base.view(6), "part": base[:3], "copy": base.clone()}
    assert list(capture(one(tensors)).tensors) == ["a", "part", "copy"]
    empty = {"a": torch.zeros(0), "b": torch.zeros(0)}
    assert list(capture(one(empty)).tensors) == ["a", "b"]
    conjugate = torch.tensor([1 + 2j])
    assert len(capture(one({"a": conjugate, "b": conjugate.conj()})).tensors) == 2


def test_bytes_are_a_view_where_possible_and_always_row_major():
    tensor = torch.arange(6.0).view(2, 3)
    data = tensor_bytes(tensor)
    tensor[0, 0] = 9
    assert data.view(np.float32)[0] == 9
    assert tensor_bytes(tensor.T).view(np.float32).tolist() == tensor.T.reshape(-1).tolist()
    lazy = torch.tensor([1 + 2j]).conj()
    assert tensor_bytes(lazy).view(np.complex64).tolist() == [1 - 2j]
    negative = lazy.imag
    assert tensor_bytes(negative).view(np.float32).tolist() == [-2.0]


@pytest.mark.parametrize(
    "value",
    [
        torch.bfloat16,
        torch.device("cpu"),
        torch.device("cuda", 3),
        torch.Size([2, 3]),
        torch.Size([]),
    ],
)
def test_torch_s_own_constants_survive(value):
    adapter = TorchAdapter()
    back = adapter.decode_atom(*adapter.encode_atom(value))
    assert back == value
    assert type(back) is type(value)


def test_what_is_no_constant_of_torch_is_refused():
    adapter = TorchAdapter()
    assert adapter.encode_atom(3) is None
    for kind, text in [
        ("torch.dtype", "load"),
        ("torch.device", "no such device"),
        ("torch.Size", "x"),
        ("os.system", "x"),
    ]:
        with pytest.raises(ValueError):  # noqa: PT011 (the law says ValueError, the words vary)
            adapter.decode_atom(kind, text)


def test_every_dtype_has_one_name():
    assert len(DTYPE_NAMES) == len(TORCH_DTYPES) >= 20


def test_a_tensor_to_read_into_is_its_own_bytes():
    tensor = empty_like(TensorSpec(name="t", dtype="BF16", shape=(2, 2)))
    memory_of(tensor)[:] = bytes(range(8))
    assert tensor_bytes(tensor).tolist() == list(range(8))
    tensor = empty_like(TensorSpec(name="t", dtype="F32", shape=(0, 3)))
    assert (tensor.shape, len(memory_of(tensor))) == ((0, 3), 0)


def test_a_setter_takes_the_state_and_its_failure_is_named():
    taken = []
    component = one({}, set_state=taken.append)
    fit = compare(one({}), live_of(one({})), {}, {}, {})
    apply(component, {"n": 1}, fit=fit)
    assert taken == [{"n": 1}]

    def refuse(_: object) -> None:
        raise KeyError("lr")

    with pytest.raises(CkptError, match="component 'm': loading its state failed: KeyError: 'lr'"):
        apply(one({}, set_state=refuse), {}, fit=fit)
    with pytest.raises(CkptError, match="a list cannot be filled from a dict"):
        apply(one([]), {}, fit=fit)


def test_shutdown_closes_everything_and_raises_the_first_failure_at_the_end():
    closed = []

    class Thing:
        def __init__(self, name: str, *, broken: bool = False) -> None:
            self.name, self.broken = name, broken

        def close(self) -> None:
            closed.append(self.name)
            if self.broken:
                raise OSError(self.name)

    with pytest.raises(OSError, match="b"):
        shutdown(Thing("a"), Thing("b", broken=True), object(), Thing("c"))
    assert closed == ["a", "b", "c"]
    shutdown()


def test_shutdown_closes_a_coordinator_that_nobody_closed(tmp_path):
    from ckptcoord import CheckpointCoordinator
    from ckptcoord.errors import ClosedError

    coordinator = CheckpointCoordinator([], output_dir=tmp_path)
    shutdown()
    with pytest.raises(ClosedError):
        coordinator.save_checkpoint(step=1)
