from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.unit.trainers.tiny import Noisy, Spy, arguments, model, plain, remains

from ckptcoord import AccelTrainer, SharingPattern
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


class Scaling(AccelTrainer):
    """With a gradient scaler, as of fp16; it skips step 5, whose gradients overflow."""

    def create_accelerator(self, model: torch.nn.Module) -> Any:
        accelerator = super().create_accelerator(model)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        return accelerator

    def compute_loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        loss = super().compute_loss(model, batch)
        return loss * (torch.inf if self.state.global_step == 4 else 1.0)


def scaled(folder: Path, **settings: Any) -> tuple[dict[str, Any], list[float], dict[str, Any]]:
    stop_at = settings.pop("stop_at", -1)
    args = arguments(folder, max_grad_norm=0, lr_scheduler_type="linear", **settings)
    rates: list[float] = []

    class Rates(Spy):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rates.append(kwargs["logs"].get("learning_rate"))

    trainer = Scaling(model(), args, Noisy(30), callbacks=[Rates(stop_at=stop_at)])
    trainer.train()
    trainer.close()
    return remains(trainer), rates, plain(trainer.accelerator.scaler.state_dict())


@pytest.mark.parametrize("stop_at", [2, 5])
def test_a_gradient_scaler_resumes_too(tmp_path: Path, stop_at: int) -> None:
    left, rates, scale = scaled(tmp_path / "a")
    assert rates[4] == rates[5], "the schedule waits where a step was skipped"
    scaled(tmp_path / "b", stop_at=stop_at)
    found, _, found_scale = scaled(tmp_path / "b", resume_from_checkpoint=True)
    assert found_scale == scale
    assert found == left


def test_what_it_declares(tmp_path: Path) -> None:
    trainer = Scaling(model(), arguments(tmp_path), Noisy(4))
    components = {one.key: one for one in trainer.get_state_components()}
    for key in ("model", "optimizer", "scheduler", "scaler"):
        assert components[key].sharing_pattern is SharingPattern.REPLICATED
        assert components[key].validate_replication
    assert type(components["optimizer"].stateful.optimizer) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"distributed_type": "DistributedType.FSDP"}, "is of the kind FSDP"),
        ({"num_processes": 2}, "knows 2 of 1 processes"),
        ({"gradient_accumulation_steps": 4}, "is 4: losses would be divided twice"),
    ],
)
def test_accelerators_that_do_not_fit_are_refused(
    tmp_path: Path, facts: dict[str, Any], why: str
) -> None:
    fits = {"distributed_type": "NO", "num_processes": 1, "gradient_accumulation_steps": 1}
    with pytest.raises(ConfigError, match=why):
        AccelTrainer(model(), arguments(tmp_path), accelerator=SimpleNamespace(**{**fits, **facts}))


def test_without_accelerate_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ConfigError) as caught:
        AccelTrainer(model(), arguments(tmp_path), Noisy(4))
    assert "needs the package accelerate" in caught.value.what
    assert "ckptcoord[accelerate]" in caught.value.help
