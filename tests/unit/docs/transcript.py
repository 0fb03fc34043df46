"""Records docs/first-hour.md: see scripts/transcript."""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

from tests.unit.docs.pages import Page
from tests.unit.docs.runner import ROOT, Runner

PAGE = ROOT / "docs/first-hour.md"
VARIES = "\n\n<!-- varies -->"  # Python's generator, which nobody seeds, and when the kill comes
KILLED = """mkdir killed && cd killed && { python ../train.py > losses.txt & } && \\
  until [ -e ml-experiments/first/checkpoint-60 ]; do sleep 0.01; done; kill -9 $!"""
FORK = """ckptcoord fork --repo ml-experiments/first main@100 anew --reset-optimizer --seed 7 \\
  -- python train.py | tail -n 1"""
# What a new user types, and why.
STORY = (
    ("Train. The checkpoints are made meanwhile.", "python train.py > losses.txt"),
    ("What is there?", "ckptcoord log ml-experiments/first -n 2"),
    ("", "ckptcoord status ml-experiments/first"),
    ("Try something else from step 100: a new optimizer, other random numbers.", FORK),
    ("", "ckptcoord log ml-experiments/first --graph"),
    (
        f"What did it change?{VARIES}",
        "ckptcoord diff ml-experiments/first main@200 anew@200 --top 3",
    ),
    (
        "Is what is stored what was saved?",
        "ckptcoord verify ml-experiments/first --all | tail -n 2",
    ),
    ("Train the same in another folder, and kill it with SIGKILL on its way.", KILLED),
    (
        f"Start it again. It goes on after the last checkpoint that was committed.{VARIES}",
        "cd killed && python ../train.py > rest.txt; head -n 1 rest.txt",
    ),
    (
        "The last loss of the run that was killed, and that of the one that was not:",
        "tail -qn 1 killed/rest.txt losses.txt",
    ),
)


def main() -> None:
    readme = (ROOT / "README.md").read_text()
    script = re.search(r"```python\n(\"\"\"A training loop.*?)```", readme, re.DOTALL)
    assert script is not None, "the README shows the script"
    parts, marks = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train.py").write_text(script[1])
        runner = Runner(Page(path=PAGE), folder, Path(sys.executable).parent)
        started_s = time.perf_counter()
        for why, command in STORY:
            before_s = time.perf_counter()
            code, output = runner.shell(command)
            now_s = time.perf_counter()
            assert code == 0, output
            marks[command.split()[1]] = now_s - started_s
            took = f"*{_clock(now_s - started_s)}, {now_s - before_s:.1f} s.*"
            gap = "\n" if why.endswith("-->") else "\n\n"
            shown = "\n".join([f"$ {command}", *output.replace(name, "...").splitlines()])
            parts.append(f"{why}{gap}```console\n{shown}\n```\n\n{took}\n".lstrip())
    PAGE.write_text(
        HEAD.format(
            script=script[1],
            cores=os.cpu_count(),
            python=platform.python_version(),
            first=f"{marks['train.py']:.0f}",
            differs=f"{marks['diff']:.0f}",
        )
        + "\n"
        + "\n".join(parts)
    )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


HEAD = """# The first hour

Recorded by `scripts/transcript`: an empty folder, ckptcoord installed, and what the README says.
Behind each command stand the time since the beginning and what the command took, on {cores} cores
that others used, too, with Python {python}. The first checkpoints were there after {first} s, a
fork and its comparison with the other branch after {differs} s. Most of the time of a command that
trains is the import of torch.

The script is the README's:

<!-- file: train.py -->
```python
{script}```
"""


if __name__ == "__main__":
    main()
