"""How long the command line takes to answer, on a repository of 1,000 checkpoints.

Beside it, in the same round: starting Python, which no answer can be faster than, and the bar of
0.3 s. Times are of whole processes, with bytecode and page cache warm.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import emit, options, order, paired, ratio, spread_table

from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent

BAR_S = 0.3
PYTHON = "python -c pass"


def main() -> None:
    """Build the repository, then time each command in turn."""
    parser = options(__doc__)
    parser.add_argument("--commits", type=int, default=1000)
    args = parser.parse_args()
    rounds, commits = (3, 100) if args.quick else (9, args.commits)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), commits)
        sides = {PYTHON: [sys.executable, "-c", "pass"]} | {
            name: [sys.executable, "-m", "ckptcoord.cli", name, *more, folder]
            for name, more in (("log", ["-n", "20"]), ("inspect", []), ("ls", []))
        }
        seconds = measure(sides, rounds)
    ratios = {
        f"{name}_vs_300_ms": ratio([value / BAR_S for value in values])
        for name, values in seconds.items()
        if name != PYTHON
    }
    ratios |= {
        f"{name}_vs_python": paired(values, seconds[PYTHON])
        for name, values in seconds.items()
        if name != PYTHON
    }
    table = spread_table("whole processes", seconds, 0)
    emit("cli", ratios, {"commits": commits}, as_json=args.json, tables=[table])


def build(folder: Path, commits: int) -> None:
    """Two real checkpoints, the first and the last, and a log that says there are many between."""
    components = [StateComponent("state", {"n": 1}, SharingPattern.GLOBAL)]
    with CheckpointCoordinator(components, output_dir=folder) as coordinator:
        coordinator.save_checkpoint(step=0)
        log, first = coordinator.repository.log, coordinator.repository.resolve("latest")
        for step in range(1, commits - 1):
            like = dataclasses.replace(
                first,
                checkpoint_id=dataclasses.replace(first.checkpoint_id, step=step),
                path=f"checkpoint-{step}",
            )
            log.append(lambda _, like=like: like)
        coordinator.save_checkpoint(step=commits)


def measure(sides: dict[str, list[str]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side by round; the first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name in order(list(sides), turn):
            began_s = time.perf_counter()
            subprocess.run(sides[name], stdout=subprocess.DEVNULL, check=True)
            if turn:
                seconds[name].append(time.perf_counter() - began_s)
    return seconds


if __name__ == "__main__":
    main()
