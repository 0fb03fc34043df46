"""`ckptcoord`, `python` and `torchrun` for a shell, without their start: forks of one warm process.

That process has imported torch and the whole CLI. A command of a page then takes some 50 ms in the
place of 0.4 s, or of 5 s with torch; what it runs is the same. This `torchrun` starts its ranks in
the environment that the real one gives them, and neither watches nor restarts them.
The fork shows CKPTCOORD_TEST_JOB in its /proc/PID/environ, and a kill of the client kills it.
"""

from __future__ import annotations

import atexit
import ctypes
import marshal
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path

_CLIENT = """#!{python} -SE
import marshal, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    said = marshal.dumps((os.getcwd(), words, dict(os.environ)))
    socket.send_fds(server, [len(said).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(said)
    runs = int.from_bytes(server.recv(8), "big")
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(one, lambda number, _: os.kill(runs, number))
    code = server.recv(16)
if not code:  # it was killed
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(code))
"""

_TORCHRUN = """#!/usr/bin/env bash
# torchrun [--standalone] --nproc_per_node=N SCRIPT [WORDS]
while [[ $1 == --* ]]; do
  case $1 in --nproc[-_]per[-_]node=*) ranks=${1#*=} ;; esac
  shift
done
export WORLD_SIZE=$ranks LOCAL_WORLD_SIZE=$ranks GROUP_RANK=0 OMP_NUM_THREADS=1
export TORCHELASTIC_RUN_ID=none TORCHELASTIC_RESTART_COUNT=0
export MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + RANDOM % 20000))
started=()
for ((rank = 0; rank < ranks; rank++)); do
  RANK=$rank LOCAL_RANK=$rank python "$@" & started+=($!)
done
code=0
for one in "${started[@]}"; do wait "$one" || code=1; done
exit $code
"""


_MARK = "CKPTCOORD_TEST_JOB"  # by which launchers find the processes of a job
_MARK_LENGTH = 32
_PR_SET_PDEATHSIG = 1


class FastShell:
    """A folder `bin` of such commands, while it is open.

    Args:
        folder: with a short path.
        syncs: whether files are synced: nobody cuts the power.
    """

    def __init__(self, folder: Path, *, syncs: bool = False) -> None:
        self.bin = folder / "bin"
        self._address = str(folder / "socket")
        self.bin.mkdir()
        for name in ("ckptcoord", "python", "python3"):
            client = self.bin / name
            client.write_text(_CLIENT.format(python=sys.executable, address=self._address))
            client.chmod(0o755)
        torchrun = self.bin / "torchrun"
        torchrun.write_text(_TORCHRUN)
        torchrun.chmod(0o755)
        self._server = subprocess.Popen(
            [sys.executable, __file__, self._address, "syncs" if syncs else ""],
            stdout=subprocess.PIPE,
            env={**os.environ, _MARK: secrets.token_hex(_MARK_LENGTH // 2)},  # noqa: TID251 (a launcher)
        )

    def wait(self) -> None:
        """Until it answers."""
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == b"ready\n"

    def close(self) -> None:
        self._server.terminate()
        self._server.wait()
        assert self._server.stdout is not None
        self._server.stdout.close()


# --- the warm process ----------------------------------------------------------------------------

_IMPORTED = (
    *("torch._dynamo", "torch.distributed.launcher.api", "torch.distributed.tensor.parallel"),
    *("ckptcoord.engine", "ckptcoord.trainers.hybrid"),
)


def _serve(address: str, *, syncs: bool) -> None:
    from importlib import import_module

    from typer.main import get_command

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for name in _IMPORTED:
        import_module(name)
    from ckptcoord.cli.app import app
    from ckptcoord.cli.progress import progress
    from ckptcoord.codec import kernels

    kernels.warm()
    if not syncs:
        os.fsync = lambda _: None
    # However slow this machine is, no page shows how far a command has come.
    progress.__wrapped__.__kwdefaults__["every_s"] = math.inf
    group = get_command(app)
    for word in group.list_commands(None):
        group.get_command(None, word)
    # A process that ends is of no interest to this one: its own client hears its code.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(64)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    import torch

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, *_ = socket.recv_fds(connection, 8, 3)
    data = b""
    while len(data) < int.from_bytes(size, "big"):
        data += (part := connection.recv(1 << 16))
        if not part:
            os._exit(0)  # the client was killed
    folder, words, environ = marshal.loads(data)
    _show_mark(environ.get(_MARK, ""))
    connection.sendall(os.getpid().to_bytes(8, "big"))
    threading.Thread(target=_die_with, args=(connection,), daemon=True).start()
    for target, file in enumerate(files):
        os.dup2(file, target)
    os.chdir(folder)
    os.environ.clear()  # noqa: TID251 (the client's takes its place)
    os.environ.update(environ)  # noqa: TID251 (likewise)
    torch.set_num_threads(int(environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    code = _run(words)
    sys.stdout.flush()
    connection.sendall(str(code).encode())
    os._exit(0)


def _show_mark(mark: str) -> None:
    """In /proc/PID/environ, in the place of the server's own."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = (int(field) for field in fields[47:49])  # proc(5): env_start, env_end
    name = f"{_MARK}=".encode()
    at = ctypes.string_at(start, end - start).index(name) + len(name)
    ctypes.memmove(start + at, mark.encode().ljust(_MARK_LENGTH)[:_MARK_LENGTH], _MARK_LENGTH)


def _die_with(client: socket.socket) -> None:
    """A kill that nobody can pass on."""
    client.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _run(words: list[str]) -> int:
    sys.argv = words
    try:
        if words[0] == "ckptcoord":
            from ckptcoord.cli import main

            return main()
        _python(words[1:])
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
            return 1
        return end.code or 0
    except BaseException:  # noqa: BLE001 (as the interpreter does)
        traceback.print_exc()
        return 1
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
    return 0


def _python(words: list[str]) -> None:
    import runpy

    words = words[words[0] == "-u" :]
    if words[0] == "-c":
        sys.argv = words
        sys.path.insert(0, "")
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))
    _serve(sys.argv[1], syncs=sys.argv[2] == "syncs")
