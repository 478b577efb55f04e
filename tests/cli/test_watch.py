"""A command is ended where it does nothing, and never because a machine is slow."""

import sys

from hf_kvopt.cli.watch import IdleGuard, run_while_busy


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_work_however_slow_is_no_hang_and_no_work_is_one() -> None:
    clock = Clock()
    guard = IdleGuard(60.0, clock)
    for minute in range(100):
        clock.now_s = 59.0 * minute
        assert not guard.is_idle(0.1 * minute)
    clock.now_s += 59.0
    assert not guard.is_idle(9.9)
    clock.now_s += 2.0
    assert guard.is_idle(9.901)  # what it takes to look whether it may go on


def test_what_a_command_prints_and_how_it_ends_is_returned() -> None:
    done = run_while_busy(
        [sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"]
    )
    assert done is not None
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


def test_a_command_that_hangs_is_ended_with_its_children() -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(10**6)'])"
    assert run_while_busy([sys.executable, "-c", child], idle_s=3.0) is None
