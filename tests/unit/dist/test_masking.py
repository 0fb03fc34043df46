"""A token in the environment or argument list reaches no manifest, log entry, report or log."""

import logging
import sys

import pytest
import torch

from ckptcoord import (
    CheckpointCoordinator,
    CkptError,
    CoordinatorConfig,
    SharingPattern,
    StateComponent,
    redact,
)

TOKEN = "planted-4f6c1e9a77d04b2c8e51"
OTHER = "another-0b7d5e3c1a9f86420dc4"


@pytest.fixture(autouse=True)
def _planted(monkeypatch) -> None:
    monkeypatch.setattr(redact, "_told", set())
    monkeypatch.setenv("CKPTCOORD_TOKEN", TOKEN)
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", OTHER])


class Broken:
    """State that fails to be taken, and says too much of why."""

    def state_dict(self):
        raise ValueError(f"cannot reach https://me:secret@host: Invalid header b'Bearer {TOKEN}'")

    def load_state_dict(self, state) -> None:
        raise AssertionError


def _component(stateful):
    return StateComponent(
        key="model",
        stateful=stateful,
        sharing_pattern=SharingPattern.GLOBAL,
        metadata={"from": f"hub with {TOKEN}", TOKEN: ["a", OTHER]},
    )


def test_no_file_of_a_checkpoint_holds_a_token(tmp_path) -> None:
    state = {"w": torch.ones(4), "note": "ours"}
    message = f"{' '.join(sys.argv)} with {TOKEN}, from s3://key:secret@bucket/x"
    with CheckpointCoordinator([_component(state)], output_dir=tmp_path) as coordinator:
        coordinator.save_checkpoint(step=1, message=message)

    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(texts) > 4
    for data in texts:
        assert not any(one.encode() in data for one in (TOKEN, OTHER, "key:secret"))
    assert any(b"train.py --hub_token *** with ***, from s3://***@bucket/x" in t for t in texts)


def test_no_failure_of_a_save_tells_a_token(tmp_path, caplog) -> None:
    reports = []

    def on_saved(report) -> None:
        reports.append(report)
        raise RuntimeError(f"no room for {TOKEN}")

    config = CoordinatorConfig(on_saved=on_saved)
    with (
        caplog.at_level(logging.DEBUG, "ckptcoord"),
        CheckpointCoordinator([_component(Broken())], output_dir=tmp_path, config=config) as one,
        pytest.raises(CkptError) as caught,
    ):
        one.save_checkpoint(step=1)

    assert "https://***@host: Invalid header b'Bearer ***'" in str(caught.value)
    (report,) = reports
    (record,) = [record for record in caplog.records if record.exc_info]
    for text in (f"{caught.value} {caught.value.facts}", report.error, caplog.text):
        assert "***" in text
        assert TOKEN not in text
    assert "on_saved failed" in record.getMessage()
