"""Ending a run at the next safe point: Ctrl-C and SIGTERM ask for it, a second Ctrl-C ends at once."""

import signal
import threading
from types import FrameType
from typing import Any


class Stopping:
    """Holds whether the user asked to end; a context manager that takes the signals over while it is entered.

    Signals are only taken over in the main thread; elsewhere they do what they did before.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self.signal = signal.SIGINT
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked, self.signal = True, signal.Signals(number)
