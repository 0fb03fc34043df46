"""A command as a child of this process: signals go on to it, and its exit code comes back."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ckptcoord.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

PASSED_ON = frozenset(
    {
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
    }
)
_WATCHED = PASSED_ON | {signal.SIGCHLD}
_NOT_STARTED = 127
_STDOUT, _STDERR = 1, 2
_LOOK_EVERY_S = 0.5  # a library's thread may have taken the SIGCHLD
_BY_KERNEL = 0x80  # SI_KERNEL of Linux: a terminal sends it, to its whole foreground group
_AS_AT_START = (signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores them, and so would the child


def find_command(words: Sequence[str], environ: Mapping[str, str]) -> str:
    """The file that a command's first word means.

    Raises:
        CommandError: there is none that can be started.
    """
    name = words[0]
    try:
        found = shutil.which(name, path=environ.get("PATH"))
        if found is not None:
            return found
        file = Path(name)
        why = "there is no such command"
        if "/" in name and file.exists():
            why = "it is a folder" if file.is_dir() else "it is not executable"
    except (OSError, ValueError) as error:  # a name that no file can have
        raise CommandError(command=name[:200], why=str(error)[:200]) from error
    raise CommandError(command=name[:200], why=why)


def run_child(
    file: str, words: Sequence[str], environ: Mapping[str, str], *, prepare: Callable[[], None]
) -> int:
    """Run a command to its end; its exit code, or 128 + n where signal n ended it.

    It has this process's stdin, stdout, stderr and group. Signals that come meanwhile go on to it,
    but for those that a terminal has sent it already.

    Args:
        file: what `find_command` found.
        words: the command.
        environ: its environment.
        prepare: called once it is sure that the command starts, and before it runs on. What this
            raises ends the command.

    Raises:
        CommandError: it cannot be started; `prepare` was not called.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with _held_back() as mask:
        child = _start_stopped(file, words, environ, mask)
        try:
            prepare()
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        os.kill(child, signal.SIGCONT)
        return _wait(child)


@contextmanager
def stdout_is_stderr() -> Iterator[None]:
    """For a child: its stdout, where this process's own is for one answer."""
    sys.stdout.flush()
    kept = os.dup(_STDOUT)
    try:
        os.dup2(_STDERR, _STDOUT)
        yield
    finally:
        os.dup2(kept, _STDOUT)
        os.close(kept)


def _start_stopped(
    file: str, words: Sequence[str], environ: Mapping[str, str], mask: set[signal.Signals]
) -> int:
    """A process that the system has made the command, and stopped before its first instruction.

    Starting a program closes a pipe's end that is marked so (O_CLOEXEC); nothing else does it only
    where the start succeeds. The other end is told to send SIGSTOP to the process when that happens
    (fcntl(2), F_SETSIG). All others who have that end must have closed it by then.
    """
    end, closes = os.pipe()
    ready, says_ready = os.pipe()
    fcntl.fcntl(end, fcntl.F_SETSIG, signal.SIGSTOP)
    fcntl.fcntl(end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_ASYNC)
    with os.fdopen(end, "rb") as pipe:
        try:
            child = _fork()
            if not child:
                os.close(says_ready)
                _become(file, words, environ, mask, pipes=(end, closes, ready))
        finally:
            for descriptor in (closes, ready, says_ready):
                os.close(descriptor)
        failed = pipe.read().decode()
    if failed:
        os.waitpid(child, 0)
        raise CommandError(command=words[0][:200], why=failed)
    os.kill(child, signal.SIGSTOP)  # a kernel that knows no F_SETSIG
    return child


def _fork() -> int:
    with warnings.catch_warnings():  # Python >= 3.12: what other threads hold, exec lets go of
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return os.fork()
        except OSError as error:  # no memory, or too many processes
            raise CommandError(command="fork", why=error.strerror or str(error)) from error


def _become(
    file: str,
    words: Sequence[str],
    environ: Mapping[str, str],
    mask: set[signal.Signals],
    *,
    pipes: tuple[int, int, int],
) -> NoReturn:
    """In the child: be the command, or say why not."""
    end, closes, ready = pipes
    try:
        fcntl.fcntl(end, fcntl.F_SETOWN, os.getpid())
        os.read(ready, 1)  # until our parent has closed its pipes
        for number in _AS_AT_START:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execve(file, list(words), dict(environ))
    except (OSError, ValueError, KeyboardInterrupt) as error:  # ValueError: a NUL
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if isinstance(error, FileNotFoundError):  # the file itself was found
            why = "what its first line names, or its loader, is not there"
        why = why or "it was interrupted"
        fcntl.fcntl(end, fcntl.F_SETFL, 0)  # what is written would stop us, too
        os.write(closes, why.encode())
    finally:
        os._exit(_NOT_STARTED)


@contextmanager
def _held_back() -> Iterator[set[signal.Signals]]:
    """Signals wait to be asked for; gives the mask from before, which is the child's."""
    old = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or a child that has ended would vanish
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    try:
        yield {signal.Signals(one) for one in mask}
    finally:
        # What came for the child, and after its end, is not for this process either.
        while signal.sigtimedwait(_WATCHED, 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if old is None else old)


def _wait(child: int) -> int:
    while True:
        came = signal.sigtimedwait(_WATCHED, _LOOK_EVERY_S)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if came is not None and came.si_signo in PASSED_ON and not _has_it(child, came):
            os.kill(child, came.si_signo)


def _has_it(child: int, came: signal.struct_siginfo) -> bool:
    """Whether a terminal has sent it to the child, too."""
    return came.si_code == _BY_KERNEL and os.getpgid(child) == os.getpgrp()
