"""A real torchrun DDP training, killed at random moments and resumed, against one left alone.

`python -m tests.distributed.kill_sweep 20 7`: 20 kills, seed 7. Imports no pytest.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.distributed.launch import ROOT, Torchrun

from ckptcoord import open_repository
from ckptcoord.errors import RepositoryNotFoundError
from ckptcoord.repo.inspect import content_digests

MAX_STEPS = 96
SAVE_STEPS = 4
TIMEOUT_S = 300.0
POLL_S = 0.01
_SMALL = {
    "layers": 2,
    "width": 48,
    "heads": 2,
    "context": 48,
    "text-bytes": 1 << 17,
    "per-device-train-batch-size": 4,
    "max-steps": MAX_STEPS,
    "save-steps": SAVE_STEPS,
    "logging-steps": 1,
}


@dataclass(slots=True, kw_only=True)
class Tally:
    """What a sweep did.

    Attributes:
        kills: for each kill, how far the training was (the newest committed step).
        chains: trainings that were killed, and compared at their end.
        compared: digests and losses that were equal.
    """

    kills: list[int] = field(default_factory=list)
    chains: int = 0
    compared: int = 0

    def __str__(self) -> str:
        return (
            f"{len(self.kills)} kills of {self.chains} trainings of {MAX_STEPS} steps on 4 ranks, "
            f"after the commits of steps {sorted(self.kills)}; {self.compared} digests and losses "
            "compared with the undisturbed run, all equal"
        )


def sweep(folder: Path, kills: int, rng: random.Random) -> Tally:
    """Kill until there were so many kills; every training that was killed must end as if not.

    Raises:
        AssertionError: a job failed, or a tensor, document or loss differs.
    """
    span_s = undisturbed(folder)
    tally = Tally()
    while len(tally.kills) < kills:
        tally.chains += 1
        output = folder / f"chain{tally.chains}"
        before = len(tally.kills)
        while len(tally.kills) < kills and kill_once(output, folder, span_s, rng, tally):
            pass
        if len(tally.kills) == kills:
            with train(output, folder) as job:
                job.succeed(TIMEOUT_S)
        compared = compare(folder / "undisturbed", output)
        tally.compared += compared if len(tally.kills) > before else 0
    return tally


def train(output: Path, folder: Path) -> Torchrun:
    """Start the example, from the newest checkpoint if there is one."""
    options = [text for name, value in _SMALL.items() for text in (f"--{name}", str(value))]
    resume = ["--resume-from-checkpoint", "true"] if newest(output) else []
    # Every other training that is killed saves deltas; what is in them must be the same.
    odd = output.name.endswith(("1", "3", "5", "7", "9"))
    options += ["--compression", "auto" if odd else "off"]
    return Torchrun(
        [
            *("--standalone", "--nproc_per_node=4", str(ROOT / "examples" / "ddp" / "train.py")),
            *("--output-dir", str(output), *options, *resume),
        ],
        folder / f"{output.name}.log",
        warm=True,
    )


def undisturbed(folder: Path) -> float:
    """The run that nobody kills; the seconds from its first commit to its end."""
    output = folder / "undisturbed"
    with train(output, folder) as job:
        assert await_commit(job, output, after=0), job.log.read_text()
        started_s = time.monotonic()
        job.succeed(TIMEOUT_S)
        return time.monotonic() - started_s


def kill_once(output: Path, folder: Path, span_s: float, rng: random.Random, tally: Tally) -> bool:
    """Run until a random moment after the next commit; false when the job ended before that."""
    before = newest(output)
    with train(output, folder) as job:
        if await_commit(job, output, after=before):
            # Uniform over what is left of the run, as long as the undisturbed one took for it.
            until = time.monotonic() + rng.random() * span_s * (1 - before / MAX_STEPS)
            while job.running and time.monotonic() < until:
                time.sleep(POLL_S)
        if job.running:
            job.kill()
            tally.kills.append(newest(output))
            return True
        job.succeed(0)
    return False


def await_commit(job: Torchrun, output: Path, *, after: int) -> bool:
    """Wait for a commit newer than a step; false when the job ended before that."""
    until = time.monotonic() + TIMEOUT_S
    while job.running:
        if newest(output) > after:
            return True
        assert time.monotonic() < until, f"no commit after {after}: {job.log.read_text()[-4000:]}"
        time.sleep(POLL_S)
    return False


def newest(output: Path) -> int:
    """The newest committed step, 0 before there is one."""
    try:
        return max((one.step for one in open_repository(output).state().commits), default=0)
    except RepositoryNotFoundError:
        return 0


def compare(straight: Path, killed: Path) -> int:
    """Every tensor and document of every checkpoint, and every logged loss; how many there were.

    Raises:
        AssertionError: names what differs.
    """
    ours, theirs = open_repository(killed), open_repository(straight)
    commits = theirs.state().commits
    assert set(ours.state().commits) == set(commits)
    assert max(one.step for one in commits) == MAX_STEPS
    count = 0
    for one in commits:
        left, right = (content_digests(repo, repo.resolve(one.ref)) for repo in (ours, theirs))
        differing = sorted(name for name in left | right if left.get(name) != right.get(name))
        assert not differing, f"{killed}, {one}: {differing}"
        count += len(left)
    losses = [read_losses(folder / "losses.jsonl") for folder in (killed, straight)]
    assert losses[0] == losses[1], f"{killed}: {losses[0]} against {losses[1]}"
    assert [step for step, _ in losses[0]] == list(range(1, MAX_STEPS + 1))
    return count + len(losses[0])


def read_losses(path: Path) -> list[tuple[int, str]]:
    """Step and exact loss of every logged step."""
    lines = [json.loads(line, parse_float=str) for line in path.read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every `with` is left
    with tempfile.TemporaryDirectory() as temporary:
        tally = sweep(Path(temporary), int(sys.argv[1]), random.Random(int(sys.argv[2])))
        print(tally)  # noqa: T201 (a script)
