"""Whether somebody has asked the run to stop.

Owns SIGTERM and SIGINT. Does not own what is done then (`trainer.step_end`).
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType


class StopFlag:
    """Set by SIGTERM or SIGINT; ranks agree on it at a step boundary. A second signal
    ends the process at once, but for the copies that a terminal and the launcher send
    of one and the same Ctrl-C. Never set where a launcher runs the trainer in a thread,
    in which Python takes no signals.
    """

    _ONE_REQUEST_S = 5.0

    def __init__(self) -> None:
        self.asked = False
        self._first = 0.0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self._first = time.monotonic()
        elif time.monotonic() - self._first > self._ONE_REQUEST_S:
            raise KeyboardInterrupt
        self.asked = True
