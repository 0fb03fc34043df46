from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as c10d
from tests.unit.trainers.job import Wide, run_job
from tests.unit.trainers.tiny import Noisy, arguments, model

from ckptcoord import CkptError, FSDPTrainer, HybridTrainer
from ckptcoord.errors import ConfigError
from ckptcoord.trainers.data import ResumableLoader
from ckptcoord.trainers.gradients import average, clip, complete_gradients
from ckptcoord.trainers.grouploader import GroupLoader
from ckptcoord.trainers.mesh import Place, check_shape, make_mesh

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    ("shape", "ranks", "why"),
    [
        ({"dp": 2, "ep": 2}, 4, "has the dimensions ep"),
        ({"dp": 2, "tp": 2}, 8, "is dp 2 x tp 2, and there are 8 ranks"),
        ({"dp": -2, "tp": -2}, 4, "is dp -2 x tp -2"),
        ({}, 4, "is empty"),
    ],
)
def test_a_mesh_that_the_ranks_cannot_fill_is_refused(
    shape: dict[str, int], ranks: int, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        check_shape(shape, ranks)


# --- what ranks do --------------------------------------------------------------------------------


def places() -> Any:
    """Every dimension of a cube whose dimensions are given in an odd order."""
    c10d.init_process_group("gloo")
    mesh = make_mesh("cpu", {"tp": 2, "dp": 2, "pp": 2}, 8)
    found = {name: getattr(mesh, name).ranks for name in ("dp", "pp", "tp", "model")}
    return {
        **found,
        "name": mesh.model_name,
        "groups": sorted(mesh.groups),
        "lines": mesh.lines("pp"),
    }


def gradients() -> Any:
    """Averages and norms; one parameter has a gradient on rank 0 only."""
    c10d.init_process_group("gloo")
    rank = c10d.get_rank()
    place = Place(index=rank, size=2, ranks=(0, 1), group=c10d.group.WORLD)
    one, two = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    one.grad = torch.full((3,), 2.0 + 2 * rank)
    if rank == 0:
        two.grad = torch.full((2,), 8.0)
    average(complete_gradients([one, two]), place)
    means = one.grad.tolist(), two.grad.tolist()
    one.grad, two.grad = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 4.0])
    norm = clip([one, two], 1.0, place, lambda parameter: (parameter is one) == (rank == 0))
    return means, float(norm), one.grad.tolist(), two.grad.tolist()


class Broken(Noisy):
    def __getitem__(self, index: int) -> Any:
        if self.length == 5:
            raise OSError("disk on fire")
        return super().__getitem__(index)["y"]


def shared_batches(length: int) -> Any:
    """What the ranks of a group get, and where they stand."""
    c10d.init_process_group("gloo")
    rank = c10d.get_rank()
    place = Place(index=rank, size=2, ranks=(0, 1), group=c10d.group.WORLD, words=c10d.group.WORLD)
    source = ResumableLoader(Broken(length), batch_size=4, drop_last=False) if rank == 0 else None
    loader = GroupLoader(source, place)
    seen: list[Any] = []
    error = ""
    try:
        seen.extend((batch.flatten().tolist(), loader.batches_left) for batch in loader)
    except (OSError, CkptError) as caught:
        error = str(caught)
    return seen, error, loader.state_dict()


def refusals(folder: str) -> list[str]:
    """What trainers say of what does not fit."""
    said = []
    args = arguments(folder)  # type: ignore[arg-type]
    net = Wide()
    for make in (
        lambda: FSDPTrainer(net, args, Noisy(40), optimizer=torch.optim.SGD(net.parameters(), 0.1)),
        lambda: HybridTrainer(Wide(), args, Noisy(40), mesh_shape={"tp": 2}),
        lambda: HybridTrainer(Wide(), args, Noisy(40), mesh_shape={"pp": 2}),
        lambda: HybridTrainer(Wide(sparse=True), args, Noisy(40), mesh_shape={"dp": 2}),
    ):
        try:
            make()
            said.append("")
        except ConfigError as error:
            said.append(error.what)
    return said


# --- the tests ------------------------------------------------------------------------------------


def test_ranks_know_their_places() -> None:
    found = run_job(places, size=8)
    assert found[0] == {
        "dp": (0, 2),
        "pp": (0, 1),
        "tp": (0, 4),
        "model": (0, 1, 4, 5),
        "name": "model",
        "groups": ["dp", "model", "pp", "tp"],
        "lines": [[0, 1], [2, 3], [4, 5], [6, 7]],
    }
    assert found[7]["model"] == (2, 3, 6, 7)


def test_gradients_are_means_and_a_norm_counts_each_once() -> None:
    for means, norm, one, two in run_job(gradients, size=2):
        assert means == ([3.0] * 3, [4.0] * 2)
        assert norm == 5.0
        assert one == pytest.approx([0.6, 0, 0])
        assert two == pytest.approx([0, 0.8])


def test_one_rank_reads_for_its_group() -> None:
    first, second = run_job(shared_batches, 10, size=2)
    assert first == second
    seen, error, _ = first
    assert [len(batch) for batch, _ in seen] == [4, 4, 2]
    assert [left for _, left in seen] == [2, 1, 0]
    assert not error


def test_alone_a_group_is_its_loader() -> None:
    def make() -> ResumableLoader:
        return ResumableLoader([*range(10)], batch_size=4, drop_last=False)

    alone, wanted = GroupLoader(make(), Place()), make()
    first, theirs = next(iter(alone)), next(iter(wanted))
    assert first.tolist() == theirs.tolist()
    assert alone.state_dict() == wanted.state_dict()
    assert (len(alone), alone.batches_left) == (3, 2)
    other = GroupLoader(ResumableLoader([*range(9)], batch_size=4), Place())
    with pytest.raises(ConfigError, match="length"):
        other.check_state(alone.state_dict())
    assert other.batches_left == len(other) == 2


def test_a_group_hears_that_its_reader_failed() -> None:
    (_, own, _), (_, told, _) = run_job(shared_batches, 5, size=2)
    assert own == "disk on fire"
    assert "rank 0 could not read the next batch: OSError: disk on fire" in told


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    for optimizer, parts, stages, sparse in run_job(refusals, str(tmp_path), size=2):
        assert "steps 11 parameters that the model no longer has" in optimizer
        assert "HybridTrainer.parallelize" in parts
        assert "pipeline_layers()" in stages or "pipeline_split" in stages
        assert "sparse gradients" in sparse


def test_a_mesh_needs_ranks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the ranks that torchrun starts"):
        HybridTrainer(model(), arguments(tmp_path), Noisy(4), mesh_shape={"dp": 1})
