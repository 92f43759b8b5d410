"""SIGINT and SIGTERM as a request to stop at the next place where nothing is lost."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal; its state is on disk."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name}: the same command with --resume goes on")


class Interruption:
    """Within this context SIGINT and SIGTERM are noted in `signal`, for the run to look at.

    Args:
        patient: also after a second signal. Otherwise that one stops at once, at the last saved state.
    """

    def __init__(self, patient: bool) -> None:
        self.patient = patient
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal and not self.patient:
            raise Interrupted(number)
        self.signal = number

    def check(self) -> None:
        """Raise `Interrupted` if there was a signal."""
        if self.signal:
            raise Interrupted(self.signal)
