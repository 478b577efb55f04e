"""Run a command for as long as it works, judged by the processor time that its processes take and not by the clock.

A machine that is loaded makes everything slow, and nothing hang. What takes no processor time at all for minutes waits
for something that will not come.
"""

import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil

IDLE_S = 180.0
"""Seconds without any work after which a process is taken to hang."""
_POLL_S = 0.5
_TICK_S = 0.02  # less than this is what a process takes to look whether it may go on


class IdleGuard:
    """Tells when work has stopped: `is_idle(work_s)` where the figure has not grown for `idle_s` seconds."""

    def __init__(self, idle_s: float = IDLE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._idle_s, self._clock = idle_s, clock
        self._work_s, self._since = 0.0, clock()

    def is_idle(self, work_s: float) -> bool:
        """Take note of the work done so far, in seconds of processor time or any figure that grows with it."""
        if abs(work_s - self._work_s) > _TICK_S:
            self._work_s, self._since = work_s, self._clock()
        return self._clock() - self._since > self._idle_s


def run_while_busy(
    command: Sequence[Any], *, idle_s: float = IDLE_S, **options: Any
) -> "subprocess.CompletedProcess[str] | None":
    """Run a command to its end and return what it printed; None where it hung, and was ended with all its children.

    Args:
        command: program and arguments.
        idle_s: seconds without work of any of its processes that are taken for a hang.
        options: of `subprocess.Popen`, such as `cwd` and `env`.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(words, stdout=out, stderr=err, text=True, **options)
        guard = IdleGuard(idle_s)
        while process.poll() is None:
            try:
                process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                if guard.is_idle(work_of(process.pid)):
                    _end(process.pid)
                    process.wait()
                    return None
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(words, process.returncode, out.read(), err.read())


def work_of(pid: int) -> float:
    """Return the seconds of processor time that a process and those that it started have taken."""
    work_s = 0.0
    for process in _family(pid):
        try:
            work_s += sum(process.cpu_times()[:4])  # of its own, and of its children that ended
        except psutil.Error:
            continue
    return work_s


def _end(pid: int) -> None:
    for process in _family(pid):
        try:
            process.kill()
        except psutil.Error:
            continue


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []
