"""Screen of a training run: a bar with tokens a second and accepted length; plain lines where there is no terminal."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_S = 30.0  # seconds between lines where there is no terminal


class Screen:
    """A bar on stderr; a context manager.

    Args:
        is_shown: False shows nothing, as in all processes but the first.
    """

    def __init__(self, is_shown: bool) -> None:
        self._console, self.is_shown = Console(stderr=True), is_shown
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        self._is_terminal = self._console.is_terminal
        self._bar = Progress(*columns, console=self._console, disable=not (is_shown and self._is_terminal))
        self._task: TaskID | None = None
        self._what, self._total, self._done, self._lined = "", 0, 0, 0.0
        self._began, self._began_at = time.perf_counter(), 0

    def __enter__(self) -> "Screen":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Begin a stage of `total` pieces, `done` of them before."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(what, total=total, completed=done, facts="")
        self._what, self._total, self._done, self._lined = what, total, done, 0.0
        self._began, self._began_at = time.perf_counter(), done

    def show(self, done: int, tokens_each: int, **facts: object) -> None:
        """Show that `done` pieces are done, of `tokens_each` tokens."""
        passed = max(1e-9, time.perf_counter() - self._began)
        rate = (done - self._began_at) * tokens_each / passed
        text = " ".join([f"{rate:.0f} tokens/s", *(f"{name} {value}" for name, value in facts.items())])
        if self._task is not None:
            self._bar.update(self._task, completed=done, facts=text)
        is_due = time.monotonic() - self._lined >= _LINE_S or done >= self._total
        if self.is_shown and not self._is_terminal and is_due:
            left = passed / max(1, done - self._began_at) * (self._total - done) / 60
            self.say(f"{self._what}: {done} of {self._total}, {text}, {left:.0f} min left")
            self._lined = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.is_shown:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
            sys.stderr.flush()
