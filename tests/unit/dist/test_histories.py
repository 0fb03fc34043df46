"""Random histories of saves, forks, gc and crashes: no live checkpoint is lost or altered.

`scripts/sweep histories N` runs N of them; here are a few.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord import load as load_object
from ckptcoord.core.entries import Fork, Retire
from ckptcoord.core.lossy import CompressionLevel
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.errors import CkptError
from ckptcoord.plan.lineage import BaseChoice, Compression
from ckptcoord.repo.compaction import compact, is_plain
from ckptcoord.repo.maintenance import local_times, prepare_gc, run_gc
from ckptcoord.repo.repository import open_repository

if TYPE_CHECKING:
    from collections.abc import Callable

WRITER = "c" * 32
RULES = {
    "off": Compression(),
    "star": Compression(level=CompressionLevel.AUTO),
    "chain": Compression(level=CompressionLevel.AUTO, base=BaseChoice.PREVIOUS, chain_below=1.0),
    "every 2": Compression(level=CompressionLevel.AUTO, reanchor_interval=2),
    "coded": Compression(level=CompressionLevel.AUTO, compress_anchors=True),
}
STEPS = ("open", "write", "written", "vote", "manifest", "rename", "renamed", "append", "appended")


class Crash(BaseException):
    """The process is gone: nobody tidies up."""


class Histories(RuleBasedStateMachine):
    """What a repository should hold, beside one that does."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="ckptcoord-history-"))
        torch.manual_seed(0)
        self.live = {
            "w": torch.randn(20_000),
            "b": torch.randn(300).bfloat16(),
            "n": torch.arange(9),
        }
        self.branch, self.step, self.branches = "main", 0, 1
        self.saved: dict[CheckpointId, dict[str, torch.Tensor]] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(name=st.sampled_from(["w", "b", "n"]), scale=st.sampled_from([0.0, 1e-4, 10.0]))
    def train(self, name: str, scale: float) -> None:
        value = self.live[name]
        if value.is_floating_point():
            value += scale * torch.randn(value.shape)
        else:
            value += int(scale)

    @rule(first=st.sampled_from(["w", "b", "n"]))
    def change_one_element(self, first: str) -> None:
        self.live[first][3] += 1

    @rule(name=st.sampled_from(sorted(RULES)), keep=st.sampled_from([None, None, 1, 3]))
    def save(self, name: str, keep: int | None) -> None:
        self.step += 1
        self._coordinate(name, keep, lambda one: one.save_checkpoint(step=self.step))
        self.saved[self._id()] = self._copy()
        self._forget_retired()

    @rule(name=st.sampled_from(sorted(RULES)))
    @precondition(lambda self: self.saved)
    def save_over(self, name: str) -> None:
        if self._id() in self.saved:
            self._coordinate(
                name, None, lambda o: o.save_checkpoint(step=self.step, overwrite=True)
            )
            self.saved[self._id()] = self._copy()

    @rule(name=st.sampled_from(sorted(RULES)), at=st.sampled_from(STEPS))
    def crash(self, name: str, at: str) -> None:
        self.step += 1

        def probe(step: str) -> None:
            if step == at:
                raise Crash

        try:
            self._coordinate(name, None, lambda o: o.save_checkpoint(step=self.step), probe)
        except Crash:
            if self._id() in open_repository(self.folder).state().commits:
                self.saved[self._id()] = self._copy()  # it had been committed
        else:
            self.saved[self._id()] = self._copy()

    @rule(data=st.data())
    @precondition(lambda self: self.saved)
    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(self.saved)))
        self.branches += 1
        self.branch = f"b{self.branches}"
        entry = Fork(writer=WRITER, branch=BranchName(self.branch), source=source)
        open_repository(self.folder).log.append(lambda _: entry)
        self.live = {name: value.clone() for name, value in self.saved[source].items()}

    @rule(data=st.data())
    @precondition(lambda self: self.saved)
    def retire(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(sorted(self.saved)))
        try:
            open_repository(self.folder).log.append(
                lambda _: Retire(writer=WRITER, checkpoint_ids=(one,))
            )
        except CkptError:
            return  # a branch begins there, or it is a head: the table says why
        del self.saved[one]

    @rule()
    @precondition(lambda self: self.step)
    def collect(self) -> None:
        repository = open_repository(self.folder)
        now, changed = datetime.now(UTC), local_times(repository)
        plan = prepare_gc(repository, now=now, changed=changed, grace_s=0.0)
        result = run_gc(repository, plan, writer=WRITER)
        assert not result.failed

    @rule(data=st.data())
    @precondition(lambda self: self.saved)
    def compact(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(sorted(self.saved)))
        repository = open_repository(self.folder)
        plain = is_plain(repository, repository.state().commits[one])
        assert compact(repository, one, writer=WRITER) != plain
        assert not repository.state().commits[one].needs
        assert is_plain(repository, repository.state().commits[one])

    @rule(data=st.data())
    @precondition(lambda self: self.saved)
    def load(self, data: st.DataObject) -> None:
        self._check(data.draw(st.sampled_from(sorted(self.saved))))

    @invariant()
    def the_log_knows_what_is_alive(self) -> None:
        if self.step and (self.folder / ".ckptcoord").exists():
            assert set(open_repository(self.folder).state().commits) == set(self.saved)

    def check_all(self) -> None:
        for one in self.saved:
            self._check(one)

    def _check(self, one: CheckpointId) -> None:
        found = load_object(self.folder, one.ref)
        assert isinstance(found, dict)
        for name, want in self.saved[one].items():
            got = found[name]
            assert got.dtype == want.dtype
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), (one, name)

    def _coordinate(
        self,
        name: str,
        keep: int | None,
        work: Callable[[CheckpointCoordinator], object],
        probe: Callable[[str], None] = lambda _: None,
    ) -> None:
        part = StateComponent("object", self.live, SharingPattern.GLOBAL)
        config = CoordinatorConfig(
            branch=self.branch, compression=RULES[name], keep_last=keep, probe=probe
        )
        with CheckpointCoordinator([part], output_dir=self.folder, config=config) as coordinator:
            work(coordinator)

    def _id(self) -> CheckpointId:
        return CheckpointId(BranchName(self.branch), self.step)

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.live.items()}

    def _forget_retired(self) -> None:
        alive = open_repository(self.folder).state().commits
        self.saved = {one: state for one, state in self.saved.items() if one in alive}


class Whole(Histories):
    """The same, and at the end every live checkpoint is loaded."""

    def teardown(self) -> None:
        try:
            self.check_all()
        finally:
            super().teardown()


def settled(histories: int) -> settings:
    """So many histories of 25 steps."""
    return settings(
        max_examples=histories,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


TestHistories = Whole.TestCase
TestHistories.settings = settled(12)

if __name__ == "__main__":
    count, number = int(sys.argv[1]), int(sys.argv[2])
    run_state_machine_as_test(seed(number)(Whole), settings=settled(count))
    print(f"{count} histories of 25 steps, every live checkpoint as it was saved")  # noqa: T201
