"""Runs a command so that all its processes end with the process that started it, however that ends.

A program of its own, ``python supervisor.py PID COMMAND...``, which imports nothing of this package: see
config.supervised. Without it, the compilers of a killed build would run on beside the next build.

It is two processes. The builder starts the first: it waits for the second, and dies with the builder, or when the
builder kills it. The second has a session of its own, in which it starts the command. When the first dies, by any
signal, the second kills everything in that session. ninja puts each compiler in a process group of its own, so only the
session has them all.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    # A kernel that refuses this, e.g. in a sandbox, must not prevent the build.
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with(parent: int, by_signal: int) -> None:
    """Asks the kernel for a signal at the parent's death; exits if the parent is dead already."""
    _prctl(_PR_SET_PDEATHSIG, by_signal)
    if os.getppid() != parent:
        sys.exit(1)


def _end_session() -> None:
    """Kills and reaps all other processes of this session; orphans of killed processes become children of this one."""
    own = os.getpid()
    while True:
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            try:
                if pid != own and os.getsid(pid) == own:
                    os.kill(pid, signal.SIGKILL)
            except OSError:  # it is gone
                pass
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _supervise(watched: int, command: list[str]) -> int:
    waited_for = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    os.setsid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _die_with(watched, signal.SIGTERM)
    # Python ignores SIGPIPE, and the command must not inherit that.
    try:
        child = os.posix_spawnp(command[0], command, os.environ, setsigmask=[], setsigdef=[signal.SIGPIPE])
    except OSError as error:
        print(f"{command[0]}: error: {error.strerror}", file=sys.stderr)
        return 127
    code = None
    while code is None and signal.sigwait(waited_for) == signal.SIGCHLD:
        while code is None:  # one signal may stand for several children
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
    _end_session()
    if code is None:
        return 1
    return code if code >= 0 else 128 - code


def main(builder: int, command: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback in the compiler's output
    _die_with(builder, signal.SIGKILL)
    watched = os.getpid()
    supervisor = os.fork()
    if supervisor == 0:
        return _supervise(watched, command)
    return os.waitstatus_to_exitcode(os.waitpid(supervisor, 0)[1])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
