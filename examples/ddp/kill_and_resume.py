"""Train on four ranks, kill them all in the middle of a save, resume, and compare bit for bit.

Three real `torchrun` jobs of examples/ddp/train.py: one undisturbed, one that is killed with
SIGKILL while its files are in staging, and one that resumes it. The resumed run must end with
exactly the weights, optimizer state and losses of the undisturbed one. The last line begins with
`PASS:`, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ckptcoord import open_repository
from ckptcoord.repo.inspect import content_digests

TRAIN = Path(__file__).with_name("train.py")
POLL_S = 0.0005
KILL_ATTEMPTS = 3


def main() -> int:
    """Run the three jobs and compare."""
    args = parse()
    output = Path(args.output_dir)
    shutil.rmtree(output, ignore_errors=True)
    straight, killed = output / "undisturbed", output / "killed-and-resumed"

    say(f"1/3 training {args.max_steps} steps on {args.nproc} ranks, undisturbed")
    finish(launch(args, straight))
    say(f"2/3 the same, killed in the save of step {args.kill_step}")
    last = kill_in_save(args, killed)
    say(f"    killed; the newest commit is {last or 'none'}")
    say("3/3 resuming with torchrun")
    finish(launch(args, killed, "--resume-from-checkpoint", "true"))
    return compare(straight, killed, args.max_steps)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default="demo-output")
    parser.add_argument("--nproc", type=int, default=4)
    parser.add_argument("--max-steps", type=int, default=12)
    parser.add_argument("--save-steps", type=int, default=3)
    parser.add_argument("--kill-step", type=int, default=9, help="the step whose save is cut short")
    return parser.parse_args()


def launch(args: argparse.Namespace, output: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start one torchrun job in a session of its own, so that all of it can be killed at once."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--standalone", f"--nproc_per_node={args.nproc}", str(TRAIN)]
    command += ["--output-dir", str(output), "--max-steps", str(args.max_steps)]
    command += ["--save-steps", str(args.save_steps), "--logging-steps", "1", *more]
    # Thread counts change the order of sums: both runs must have the same.
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True
    )


def finish(job: subprocess.Popen[bytes]) -> None:
    """Wait for a job that must succeed."""
    if job.wait():
        sys.exit(f"FAIL: the training job exited with {job.returncode}")


def kill_in_save(args: argparse.Namespace, output: Path) -> str:
    """Start a job and kill all its processes while files of the chosen save are in staging."""
    for _ in range(KILL_ATTEMPTS):
        shutil.rmtree(output, ignore_errors=True)
        job = launch(args, output)
        strike(job, output, args)
        last = newest(output)
        if last != f"checkpoint-{args.kill_step}":
            return last
        say("    the save was faster than the signal; once more")
    sys.exit("FAIL: no save could be cut short")


def strike(job: subprocess.Popen[bytes], output: Path, args: argparse.Namespace) -> None:
    """Wait for the save before the chosen one, then for the first file of the chosen one."""
    log, staging = output / ".ckptcoord" / "log", output / ".ckptcoord" / "staging"
    entries_before = args.kill_step // args.save_steps  # a claim, and a commit for each save
    victims: list[int] = []
    while job.poll() is None:
        if not victims and count(log) >= entries_before:
            victims = [job.pid, *descendants(job.pid)]
        if victims and in_progress(staging):
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            job.wait()
            return
        time.sleep(POLL_S)
    sys.exit(f"FAIL: the job ended ({job.returncode}) before it could be killed in a save")


def descendants(pid: int) -> list[int]:
    """All processes below one: torchrun puts each rank into a session of its own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended meanwhile
        if parent == pid:
            found += [int(folder.name), *descendants(int(folder.name))]
    return found


def count(folder: Path) -> int:
    """How many log entries there are."""
    return sum(1 for _ in folder.glob("*.json"))


def in_progress(staging: Path) -> bool:
    """Whether a save has begun to write."""
    return any(path.is_file() for path in staging.glob("*/*"))


def newest(output: Path) -> str:
    """The newest commit's id."""
    commits = open_repository(output).state().commits
    return str(max(commits, key=lambda one: one.step)) if commits else ""


def compare(straight: Path, killed: Path, step: int) -> int:
    """Every tensor and every logged loss, by digest and to the last bit."""
    ours, theirs = digests(killed, step), digests(straight, step)
    differing = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    losses = [read_losses(folder / "losses.jsonl") for folder in (straight, killed)]
    say(f"compared {len(ours)} tensors and documents and {len(losses[0])} logged losses")
    if differing or losses[0] != losses[1] or len(losses[0]) != step:
        say(f"    differing: {differing[:10]}")
        say(f"    losses: {losses[0][-3:]} against {losses[1][-3:]}")
        print("FAIL: the resumed run is not the undisturbed one")
        return 1
    manifest = killed / f"checkpoint-{step}" / "checkpoint_manifest.json"
    say(f"the manifest: {manifest.resolve()}")
    print(f"PASS: killed in a save, resumed, and equal to the last bit ({len(ours)} digests)")
    return 0


def digests(folder: Path, step: int) -> dict[str, str]:
    """Of all state at a step."""
    repository = open_repository(folder)
    return content_digests(repository, repository.resolve(f"main@{step}"))


def read_losses(path: Path) -> list[tuple[int, str]]:
    """Step and exact loss of every logged step."""
    lines = [json.loads(line, parse_float=str) for line in path.read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def say(text: str) -> None:
    """Progress goes to stderr, so that the verdict stands alone on stdout."""
    print(f"demo: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
