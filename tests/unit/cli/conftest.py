"""Real repositories, built as a save builds them, and the CLI in this process."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ckptcoord import redact
from ckptcoord.cli import main
from ckptcoord.codec.tensorfile import TensorSpec
from ckptcoord.core.entries import Fork
from ckptcoord.core.manifest import FileKind, FileRecord
from ckptcoord.core.refs import BranchName, CheckpointId, TagName
from ckptcoord.core.sharing import ComponentSpec, SharingPattern, ValidationLevel
from ckptcoord.core.topology import GroupLayout, Topology
from ckptcoord.repo.attempt import Attempt
from ckptcoord.repo.manifests import Declared, Lineage, ManifestFacts, Written, build_manifest
from ckptcoord.repo.repository import Repository, create_repository
from ckptcoord.repo.shards import TensorSource

if TYPE_CHECKING:
    from pathlib import Path

    from ckptcoord.core.entries import Commit

WRITER = "a" * 32
BEGIN = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)


class Builder:
    """A repository that is being filled by one writer, a minute a log entry."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._entries = 0
        self.repository: Repository = create_repository(root, clock=self._clock)
        self._epochs: dict[BranchName, int] = {}

    def _clock(self) -> datetime:
        self._entries += 1
        return BEGIN + timedelta(minutes=self._entries)

    def claim(self, branch: str = "main") -> int:
        name = BranchName(branch)
        if name not in self._epochs:
            self._epochs[name] = self.repository.claim(
                name, writer=WRITER, world_size=2, host="host\x1b[31m7"
            )
        return self._epochs[name]

    def fork(self, branch: str, step: int) -> None:
        source = CheckpointId(BranchName("main"), step)
        self.repository.log.append(
            lambda _: Fork(writer=WRITER, branch=BranchName(branch), source=source)
        )

    def tag(self, name: str, step: int) -> None:
        target = CheckpointId(BranchName("main"), step)
        self.repository.tag(TagName(name), target, writer=WRITER)

    def commit(
        self,
        step: int,
        branch: str = "main",
        *,
        message: str = "",
        metrics: dict[str, float] | None = None,
        overwrite: bool = False,
        timing: dict[str, float] | None = None,
    ) -> Commit:
        """Save a model of two tensors, replicated over two ranks, and a document a rank."""
        epoch = self.claim(branch)
        checkpoint_id = CheckpointId(BranchName(branch), step)
        attempt = Attempt(
            self.repository, checkpoint_id, secrets.token_hex(16), overwrite=overwrite
        )
        attempt.open()
        files = [self._shard(attempt, step), *(self._document(attempt, rank) for rank in (0, 1))]
        attempt.sync()
        manifest = build_manifest(self._facts(attempt, message, metrics or {}), files)
        path, digest = attempt.publish(manifest, lambda _: None)
        attempt.commit(path, manifest, digest, writer=WRITER, epoch=epoch, timing=timing)
        return self.repository.state().commits[checkpoint_id]

    def _facts(self, attempt: Attempt, message: str, metrics: dict[str, float]) -> ManifestFacts:
        patterns = {"model": SharingPattern.REPLICATED, "rng": SharingPattern.PER_RANK}
        return ManifestFacts(
            checkpoint_id=attempt.checkpoint_id,
            parent=attempt.parent(),
            lineage=Lineage(reason="compression is off"),
            attempt=attempt.nonce,
            epoch=1.5,
            topology=Topology.single_node(2, (GroupLayout(name="tp", instances=((0, 1),)),)),
            timestamp=BEGIN,
            components=[
                Declared(
                    spec=ComponentSpec(key=key, pattern=pattern),
                    validation=ValidationLevel.TENSOR,
                    required=key != "rng",
                    metadata={"kind": "gpt\x1b"} if key == "model" else {},
                )
                for key, pattern in patterns.items()
            ],
            metrics=metrics,
            message=message,
            training_args_hash="0123abcd",
            ckptcoord_version="0.1.0",
            pytorch_version="2.13.0",
        )

    @staticmethod
    def _shard(attempt: Attempt, step: int) -> Written:
        arrays = {
            "wte.weight": np.full((8, 16), step, np.float32),
            "lm_head.bias": np.arange(8, dtype=np.int64),
        }
        sources = [
            TensorSource(
                spec=TensorSpec(
                    name=name, dtype="F32" if a.dtype == np.float32 else "I64", shape=a.shape
                ),
                read=lambda a=a: a.reshape(-1).view(np.uint8),
            )
            for name, a in arrays.items()
        ]
        written = attempt.write_shard("model.safetensors", sources, threads=1)
        record = FileRecord(
            path="model.safetensors",
            size_bytes=written.size_bytes,
            digest=written.digest,
            component="model",
            scope="",
            writer_rank=0,
            kind=FileKind.TENSORS,
        )
        return Written(record=record, logical_bytes=sum(a.nbytes for a in arrays.values()))

    @staticmethod
    def _document(attempt: Attempt, rank: int) -> Written:
        data = json.dumps({"rank": rank}).encode()
        written = attempt.write_file(f"rng.rank{rank:05d}.state.json", data)
        record = FileRecord(
            path=f"rng.rank{rank:05d}.state.json",
            size_bytes=written.size_bytes,
            digest=written.digest,
            component="rng",
            scope=f"rank{rank:05d}",
            writer_rank=rank,
            kind=FileKind.STATE,
        )
        return Written(record=record, logical_bytes=len(data))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str
    json: Any = field(default=None)


class Cli:
    """Runs the CLI in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: object) -> Answer:
        self._capsys.readouterr()
        code = main([str(word) for word in words])
        found = self._capsys.readouterr()
        document = json.loads(found.out) if "--json" in words else None
        return Answer(code=code, out=found.out, err=found.err, json=document)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _forget_durability(monkeypatch)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.null.Keyring")
    monkeypatch.setattr(redact, "_told", set())
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "CKPTCOORD_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


@pytest.fixture
def build(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "run")


def _forget_durability(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here cuts the power, and a sync takes longer than the rest of a test."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def history(written_history: Path, tmp_path: Path) -> Builder:
    """main@100 to main@1000, a tag, and a branch of two commits that began at main@200."""
    shutil.copytree(written_history, tmp_path / "run")
    return Builder(tmp_path / "run")


@pytest.fixture(scope="session")
def written_history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `history` copies."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _forget_durability(monkeypatch)
        build = Builder(tmp_path_factory.mktemp("history") / "run")
        _write_history(build)
    return build.root


def _write_history(build: Builder) -> None:
    build.commit(100, message="first\n\nwith a body", metrics={"loss": 3.5})
    build.commit(200, metrics={"loss": 2.25, "eval_loss": 2.5})
    build.tag("best", 200)
    build.fork("exp", 200)
    build.commit(250, "exp")
    build.commit(1000, message="the newest but one")
    timing = {"stall_s": 0.0123, "opened_s": 0.025, "staged_s": 0.25, "written_s": 1.5}
    timing |= {"voted_s": 1.625, "slowest_rank": 1}
    build.commit(300, "exp", message="the newest", timing=timing)
