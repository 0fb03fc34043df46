"""A load that fills live tensors where they are: which ones, when, and what it must not do."""

from __future__ import annotations

import pytest
import torch

from ckptcoord import SharingPattern, StateComponent
from ckptcoord.core.box import Box
from ckptcoord.core.leaf import LeafForm
from ckptcoord.dist.capture import capture
from ckptcoord.dist.restore import count_change, fillable, live_of, memory_of, misfits, unshared
from ckptcoord.dist.saved import SavedTensor
from ckptcoord.dist.sharded import Layout, layout_of
from ckptcoord.errors import CorruptError
from ckptcoord.repo.readers import ShardReader


def component(stateful: object, **more: object) -> StateComponent:
    return StateComponent("state", stateful, SharingPattern.GLOBAL, **more)


def names(stateful: object, **more: object) -> set[str]:
    """What could be filled in place if what is live had been saved."""
    declared = component(stateful, **more)
    return set(fillable(declared, live_of(declared), as_saved(declared), ()))


def as_saved(declared: StateComponent) -> dict[str, SavedTensor]:
    """What is live, as a checkpoint would have it."""
    return {
        name: SavedTensor(form=LeafForm(), spec=one.spec, pieces=())
        for name, one in capture(declared).tensors.items()
    }


def save(step: int):
    return lambda coordinator, rank: coordinator.save_checkpoint(step=step)


def load(coordinator: object, rank: int) -> object:
    return coordinator.load_checkpoint()


class Holder:
    """A Stateful of the trainer's own."""

    def __init__(self) -> None:
        self.w = torch.ones(3)

    def state_dict(self) -> dict[str, object]:
        return {"w": self.w}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.w = state["w"]


class HolderDict(dict):
    """A dict that takes its state itself."""

    state_dict = dict.copy
    load_state_dict = dict.update


def test_tensors_of_dicts_lists_and_modules_are_filled_in_place():
    assert names({"a": {"w": torch.ones(2)}, "n": 1}) == {"a.w"}
    assert names([torch.ones(2), torch.ones(())]) == {"0", "1"}
    assert names(torch.nn.Linear(2, 3)) == {"weight", "bias"}


def test_what_takes_its_state_itself_gets_tensors_of_its_own():
    assert names(Holder()) == set()
    assert names(HolderDict(w=torch.ones(2))) == set()
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    assert names(optimizer) == set()
    live = {"w": torch.ones(2)}
    assert names(live, set_state=live.update) == set()
    assert names({}, get_state=lambda: live, set_state=live.update) == set()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(4, 6).t(),
        torch.ones(1).expand(5),
        torch.ones(0),
        torch.ones(3, dtype=torch.complex64).conj(),
    ],
    ids=["transposed", "expanded", "empty", "conjugated"],
)
def test_memory_that_is_not_the_elements_in_order_is_not_filled(tensor):
    assert names({"w": tensor, "plain": torch.ones(1)}) == {"plain"}


def test_another_shape_or_dtype_is_not_filled():
    saved = as_saved(component({"a": torch.ones(2), "b": torch.ones(2)}))
    other = component({"a": torch.ones(3), "b": torch.ones(2).half()})
    live = live_of(other)
    assert fillable(other, live, saved, misfits(live, saved)) == {}


def test_memory_that_two_tensors_have_a_part_in_is_filled_for_neither():
    whole, alone = torch.zeros(8), torch.ones(2)
    found = unshared(
        [{"whole": layout_of(whole), "alone": layout_of(alone)}, {"half": layout_of(whole[:4])}]
    )
    assert [set(group) for group in found] == [{"alone"}, set()]


@pytest.mark.parametrize("pattern", [SharingPattern.GLOBAL, SharingPattern.REPLICATED])
@pytest.mark.parametrize("size", [1, 2])
def test_live_tensors_keep_their_memory_and_get_the_saved_bytes(job, pattern, size):
    saved = torch.nn.Linear(5, 7)
    job.run(size, lambda _: [StateComponent("m", saved, pattern)], save(1)).values  # noqa: B018
    live = [torch.nn.Linear(5, 7) for _ in range(size)]
    where = [[p.data_ptr() for p in model.parameters()] for model in live]
    job.run(size, lambda rank: [StateComponent("m", live[rank], pattern)], load).values  # noqa: B018
    assert [[p.data_ptr() for p in model.parameters()] for model in live] == where
    for model in live:
        assert all(map(torch.equal, model.parameters(), saved.parameters()))


def test_views_of_one_buffer_come_back_as_they_were_saved(job):
    flat = torch.arange(8.0)
    job.run(1, lambda _: [component({"a": flat[:4], "b": flat[4:]})], save(1)).values  # noqa: B018
    other = torch.zeros(8)
    job.run(1, lambda _: [component({"a": other[:4], "b": other[4:]})], load).values  # noqa: B018
    assert torch.equal(other, flat)


def test_tied_weights_are_filled_once_and_stay_tied(job):
    one = torch.ones(3)
    job.run(1, lambda _: [component({"a": one, "b": one})], save(1)).values  # noqa: B018
    live = torch.zeros(3)
    state = {"a": live, "b": live}
    job.run(1, lambda _: [component(state)], load).values  # noqa: B018
    assert live.tolist() == [1, 1, 1]
    assert state["a"] is state["b"]


def test_autograd_hears_of_what_was_written(job):
    weight = torch.nn.Parameter(torch.ones(3))
    state = {"w": weight}
    job.run(1, lambda _: [component(state)], save(1)).values  # noqa: B018
    loss = (weight * weight).sum()
    job.run(1, lambda _: [component(state)], load).values  # noqa: B018
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_inference_tensor_is_filled_too():
    with torch.inference_mode():
        tensor = torch.zeros(3)
    memory_of(tensor)[:] = bytes(12)
    count_change([tensor])


def test_a_file_that_changes_after_the_check_is_an_error_and_no_silent_value(job, monkeypatch):
    declare = [component({"w": torch.ones(3)})]
    job.run(1, lambda _: declare, save(1)).values  # noqa: B018
    shard = next((job.output_dir / "checkpoint-1").glob("*.safetensors"))
    check = ShardReader.check

    def check_and_damage(reader, entry):
        found = check(reader, entry)
        with shard.open("r+b") as file:
            file.seek(entry.begin)
            file.write(b"\x01")
        return found

    monkeypatch.setattr(ShardReader, "check", check_and_damage)
    (error,) = job.run(1, lambda _: declare, load).errors
    assert isinstance(error, CorruptError)
    assert "changed between the check and the read" in str(error)


def test_pieces_of_one_tensor_may_share_its_memory():
    memory = torch.zeros(4, 3)
    pieces = tuple(
        (Box(offset=(row, 0), size=(2, 3)), memory[at : at + 2]) for at, row in ((0, 0), (2, 6))
    )
    strided = Layout(shape=(8, 3), dtype=memory.dtype, pieces=pieces, sharded=True)
    assert unshared([{"w": strided}]) == [{"w": strided}]
    assert unshared([{"w": strided, "part": layout_of(memory[:1])}]) == [{}]
