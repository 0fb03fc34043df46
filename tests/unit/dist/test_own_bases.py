"""What a process wrote itself it need not read again to know what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ckptcoord import CheckpointCoordinator, Compression, Lossy, SharingPattern, StateComponent
from ckptcoord.core.lossy import CompressionLevel
from ckptcoord.plan.lineage import BaseChoice
from ckptcoord.repo.bases import Bases

if TYPE_CHECKING:
    from collections.abc import Callable

AUTO = CompressionLevel.AUTO


def part(key: str, state: object) -> StateComponent:
    return StateComponent(key, state, SharingPattern.REPLICATED)


def homes(bases: Bases, path: str, component: str) -> dict[Any, Any]:
    return {key: home for key, home in bases._homes[path].items() if key[0] == component}


@pytest.mark.parametrize("base", list(BaseChoice))
@pytest.mark.parametrize("lossy", [Lossy(), Lossy(update_fraction=0.1, change_threshold=0.1)])
def test_it_knows_what_the_headers_say_without_reading_them(job, monkeypatch, base, lossy):
    torch.manual_seed(0)
    live: dict[str, Any] = {name: torch.randn(150, 150) for name in ("w", "still", "once")}
    cast = {"half": live["w"].bfloat16(), "copy": live["w"].clone()}
    rule = Compression(level=AUTO, base=base, lossy={"model": lossy})
    ordinary_look, ordinary_read = Bases.look, Bases._read_header
    read, looked = [], []

    def read_counted(self: Bases, file: Any) -> Any:
        read.append(file.path)
        return ordinary_read(self, file)

    def look(self: Bases, base: Any, component: str, label: str) -> None:
        read.clear()
        ordinary_look(self, base, component, label)
        looked.append(list(read))
        anew = Bases(self.repository)
        anew.begin(base)
        ordinary_look(anew, base, component, label)
        assert homes(self, base.path, component) == homes(anew, base.path, component) != {}

    monkeypatch.setattr(Bases, "_read_header", read_counted)
    monkeypatch.setattr(Bases, "look", look)

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in range(1, 6):
            coordinator.save_checkpoint(step=step)
            live["w"] += 1e-3 * torch.randn(150, 150)
            live["once"] += step == 3
            cast["half"].copy_(live["w"])
            cast["copy"].copy_(live["w"])

    declare = lambda _: [part("model", live), part("other", cast)]  # noqa: E731
    job.do(1, declare, work, compression=rule)
    assert len(looked) >= 6, "deltas of two components"
    assert not any(looked)


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"short")])
def test_where_a_base_of_its_own_is_gone_there_is_an_anchor(job, harm: Callable[[Path], object]):
    live: dict[str, Any] = {"w": torch.randn(100_000)}
    rule = Compression(
        level=AUTO, base=BaseChoice.PREVIOUS, lossy={"model": Lossy(update_fraction=0.1)}
    )

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        for step in (1, 2):
            coordinator.save_checkpoint(step=step)
            live["w"] += 1e-3
        (delta,) = (job.output_dir / "checkpoint-2").glob("*.delta.safetensors")
        harm(delta)
        coordinator.save_checkpoint(step=3)
        assert list((job.output_dir / "checkpoint-3").glob("model.safetensors")), "an anchor"

    job.do(1, lambda _: [part("model", live)], work, compression=rule)
