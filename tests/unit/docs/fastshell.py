"""`ckptcoord`, `python` and `torchrun` for a shell, without their start: forks of one warm process.

That process has imported torch and the whole CLI. A command of a page then takes some 50 ms in the
place of 0.4 s, or of 5 s with torch; what it runs is the same. This `torchrun` starts its ranks in
the environment that the real one gives them, and neither watches nor restarts them.
"""

from __future__ import annotations

import marshal
import os
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
sys.exit(int(code or b"70"))
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


class FastShell:
    """A folder `bin` of such commands, while it is open."""

    def __init__(self, folder: Path) -> None:
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
            [sys.executable, __file__, self._address], stdout=subprocess.PIPE
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


def _serve(address: str) -> None:
    from importlib import import_module

    from typer.main import get_command

    for name in ("torch._dynamo", "ckptcoord.engine", "ckptcoord.trainers.hybrid"):
        import_module(name)
    from ckptcoord.cli.app import app
    from ckptcoord.codec import kernels

    kernels.warm()
    os.fsync = lambda _: None  # nobody cuts the power
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
        data += connection.recv(1 << 16)
    folder, words, environ = marshal.loads(data)
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
        import logging

        logging.shutdown()
    return 0


def _python(words: list[str]) -> None:
    import runpy

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
    _serve(sys.argv[1])
