"""Start real worlds of processes, tell them what to do, and leave none of them behind.

`World` forks its ranks from a server that has imported torch already: about a second a world.
`Torchrun` is the real thing; its agent and its ranks may be forks of such a server, too, which
spares each of them some 5 s of imports. CKPTCOORD_TEST_COLD=1 in the environment: none are.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.distributed.rank import Outcome, Place, host, serve
from tests.unit.docs.fastshell import FastShell

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S, END_TIMEOUT_S = 90.0, 20.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch.distributed", "torch._dynamo", "ckptcoord.dist.coordinator", "tests.distributed.rank"]
)


class World:
    """Ranks in processes of their own that wait for orders; a context manager that kills them.

    Args:
        log_dir: for what the processes print.
        size: number of ranks.
        store_apart: run the c10d store in one more process, as torchrun's agent does, rather than
            in rank 0.
    """

    def __init__(self, log_dir: Path, size: int = 4, *, store_apart: bool = False) -> None:
        self.size = size
        self._shared = _CONTEXT.RawArray("i", 1 + size)
        self._channels: dict[int, Connection] = {}
        self._processes: dict[int | str, Any] = {}
        name = secrets.token_hex(4)
        try:
            for rank in range(size):
                place = self._place(rank, store_apart, log_dir / f"{name}.rank{rank}.log")
                self._channels[rank], theirs = _CONTEXT.Pipe()
                self._start(rank, serve, place, theirs)
                theirs.close()
            if store_apart:
                self._start("host", host, self._place(-1, store_apart, log_dir / f"{name}.host"))
            started = self.hear(START_TIMEOUT_S)
            assert len(started) == size, f"only ranks {sorted(started)} started; see {log_dir}"
        except BaseException:
            self.end()
            raise

    def _place(self, rank: int, store_apart: bool, log: Path) -> Place:
        return Place(
            rank=rank,
            size=self.size,
            shared=self._shared,
            store_apart=store_apart,
            log_path=str(log),
        )

    def _start(self, name: int | str, target: Any, *arguments: Any) -> None:
        process = _CONTEXT.Process(target=target, args=arguments, daemon=True, name=str(name))
        self._processes[name] = process
        process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def tell(self, order: str, ranks: Iterable[int] | None = None, **arguments: Any) -> None:
        """Give an order and do not wait."""
        for rank in self._channels if ranks is None else ranks:
            self._channels[rank].send((order, arguments))

    def hear(
        self, timeout_s: float, ranks: Iterable[int] | None = None, *, quiet: bool = False
    ) -> dict[int, Outcome]:
        """The outcome of the last order on each rank; the dead, and who is not back yet, lack.

        Unless `quiet`, the stacks of the latter go into their logs.
        """
        waiting = {
            self._channels[rank]: rank for rank in (self._channels if ranks is None else ranks)
        }
        heard: dict[int, Outcome] = {}
        until = time.monotonic() + timeout_s
        while waiting and (left := until - time.monotonic()) > 0:
            for channel in wait(list(waiting), left):
                rank = waiting.pop(channel)  # type: ignore[call-overload]
                with contextlib.suppress(EOFError, ConnectionResetError):
                    heard[rank] = channel.recv()  # type: ignore[union-attr]
        for rank in () if quiet else waiting.values():
            self.signal(rank, signal.SIGUSR1)  # its stacks go into its log
        for rank, outcome in heard.items():
            assert not outcome.bug, f"rank {rank}: {outcome.bug}"
        return heard

    def ask(self, order: str, *, within_s: float = 60.0, **arguments: Any) -> dict[int, Outcome]:
        """Give an order to all ranks; all must come back, and none with an error."""
        self.tell(order, **arguments)
        heard = self.hear(within_s)
        errors = {rank: outcome.error for rank, outcome in heard.items() if outcome.error}
        assert len(heard) == self.size, f"only {sorted(heard)} answered {order} {arguments}"
        assert not errors, f"{order} {arguments}: {errors}"
        return heard

    def await_file(self, path: Path, within_s: float = 30.0) -> None:
        """Wait until the ranks have made it."""
        until = time.monotonic() + within_s
        while not path.exists():
            assert time.monotonic() < until, f"{path} did not appear"
            time.sleep(0.002)

    def pid(self, name: int | str) -> int:
        """Of a rank's process."""
        return int(self._processes[name].pid)

    def signal(self, name: int | str, number: signal.Signals) -> None:
        """Send a signal to a rank, or to the store's `host`."""
        os.kill(self.pid(name), number)

    def close(self, timeout_s: float = 30.0) -> list[int | None]:
        """Let the ranks end in good order; their exit codes, None for one that hangs."""
        for channel in self._channels.values():
            channel.send(None)
        until = time.monotonic() + timeout_s
        for rank in self._channels:
            self._processes[rank].join(max(0.0, until - time.monotonic()))
        return [self._processes[rank].exitcode for rank in self._channels]

    def end(self) -> None:
        """Kill whatever still runs; SIGKILL ends a stopped process too."""
        for process in self._processes.values():
            if process.pid is not None:
                process.kill()
        for process in self._processes.values():
            if process.pid is not None:
                process.join(END_TIMEOUT_S)
                assert process.exitcode is not None, f"{process} outlived SIGKILL"
        for channel in self._channels.values():
            channel.close()


@functools.cache
def warm_python() -> str:
    """A `python` whose processes have imported torch and trainers already: forks of one server."""
    if os.getenv("CKPTCOORD_TEST_COLD"):
        return sys.executable
    folder = tempfile.TemporaryDirectory(prefix="warm")
    shell = FastShell(Path(folder.name), syncs=True)
    atexit.register(folder.cleanup)
    atexit.register(shell.close)
    shell.wait()
    return str(shell.bin / "python")


class Torchrun:
    """One torchrun job; a context manager that leaves no process of it.

    torchrun gives each worker a session of its own, so that a process group does not hold them
    all: they are found by a mark in their environment.

    Args:
        arguments: of torchrun: its options, the script, the script's arguments.
        log: for what all processes print.
        warm: fork its processes from a warm one; their parent is then that one.
        env: more of the environment.
    """

    def __init__(
        self, arguments: Sequence[str], log: Path, *, warm: bool = False, **env: str
    ) -> None:
        self._mark = f"CKPTCOORD_TEST_JOB={secrets.token_hex(16)}"
        name, _, value = self._mark.partition("=")
        self.log = log
        python = warm_python() if warm else sys.executable
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [python, "-m", "torch.distributed.run", *arguments],
                stdout=output,
                stderr=output,
                cwd=ROOT,
                # Thread counts change the order of sums.
                env={
                    **os.environ,  # noqa: TID251 (a launcher)
                    "OMP_NUM_THREADS": "1",
                    "PYTHON_EXEC": python,
                    **env,
                    name: value,
                },
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether torchrun itself has not ended."""
        return self._process.poll() is None

    def finish(self, timeout_s: float) -> int:
        """Wait for its end; the exit code."""
        return self._process.wait(timeout_s)

    def succeed(self, timeout_s: float) -> None:
        """Wait for its end, which must be a success."""
        code = self.finish(timeout_s)
        assert code == 0, f"torchrun exited with {code}:\n{self.log.read_text()[-4000:]}"

    def kill(self) -> int:
        """SIGKILL every process of the job, all stopped first; how many there were."""
        killed: set[int] = set()
        for number in (signal.SIGSTOP, signal.SIGKILL):
            while fresh := set(self._members()) - killed:  # some may be starting others
                for pid in fresh:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                killed |= fresh
            killed = killed if number is signal.SIGKILL else set()
        self._process.wait()
        return len(killed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def _members(self) -> list[int]:
        mark = self._mark.encode()
        found = []
        for folder in Path("/proc").iterdir():
            # A process may end meanwhile; a zombie's environment is empty.
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and mark in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found
