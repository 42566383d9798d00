"""Ctrl-C (and SIGTERM) during training: finish the step, save, leave; a second one stops at once."""

import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from accelerate import Accelerator


class Interrupt:
    """Within the context the first signal is only noted. In a thread other than the main one signals are left alone."""

    def __init__(self, accelerator: "Accelerator") -> None:
        self._accelerator = accelerator
        self._seen = False
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether to stop now; all processes get the same answer, that of any of them."""
        if self._accelerator.num_processes == 1:
            return self._seen
        if self._seen:
            self._accelerator.set_trigger()
        return bool(self._accelerator.check_trigger())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._seen:
            raise KeyboardInterrupt
        self._seen = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
