"""How long the command line takes to answer: 1,000 checkpoints, the newest of 100,000 tensors.

Beside it, in the same round: starting Python, which no answer can be faster than, and the bar of
0.3 s, of completion 0.2 s. Times are of whole processes, with bytecode and page cache warm.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import emit, options, order, paired, ratio, spread_table

from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent

BAR_S = 0.3
COMPLETION_BAR_S = 0.2
COMPLETION = "completion"
COMMANDS = {
    "log -n 20": ["log", "-n", "20"],
    "log --graph": ["log", "--graph"],
    "show": ["show"],
    "inspect": ["inspect"],
    "ls": ["ls"],
    "du": ["du"],
    "status": ["status"],
    "branch": ["branch"],
}
PYTHON = "python -c pass"


def main() -> None:
    """Build the repository, then time each command in turn."""
    parser = options(__doc__)
    parser.add_argument("--commits", type=int, default=1000)
    parser.add_argument("--tensors", type=int, default=100_000)
    args = parser.parse_args()
    rounds, commits, tensors = (3, 100, 1000) if args.quick else (9, args.commits, args.tensors)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), commits, tensors)
        cli = [sys.executable, "-m", "ckptcoord.cli"]
        sides = {PYTHON: [sys.executable, "-c", "pass"]}
        sides |= {name: [*cli, *words, "-C", folder] for name, words in COMMANDS.items()}
        sides[COMPLETION] = [*cli, "__complete", f"ckptcoord show -C {folder} main@9"]
        seconds = measure(sides, rounds)
    ratios = {
        f"{name}_vs_bar": ratio(
            [value / (COMPLETION_BAR_S if name == COMPLETION else BAR_S) for value in values]
        )
        for name, values in seconds.items()
        if name != PYTHON
    }
    ratios |= {
        f"{name}_vs_python": paired(values, seconds[PYTHON])
        for name, values in seconds.items()
        if name != PYTHON
    }
    table = spread_table("whole processes", seconds, 0)
    numbers = {"commits": commits, "tensors": tensors}
    emit("cli", ratios, numbers, as_json=args.json, tables=[table])


def build(folder: Path, commits: int, tensors: int) -> None:
    """So many real checkpoints, of which the first and the last have so many tensors."""
    state: dict[str, object] = {"n": 1}
    large = {f"layers.{n}.weight": np.full(2, n, np.float32) for n in range(tensors)}
    components = [StateComponent("state", state, SharingPattern.GLOBAL)]
    with CheckpointCoordinator(components, output_dir=folder) as coordinator:
        for step in range(commits):
            if step in (0, commits - 1):
                state.update(large)
            coordinator.save_checkpoint(step=step, metrics={"loss": 1 / (step + 1)})
            for name in large if step == 0 else ():
                del state[name]


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
