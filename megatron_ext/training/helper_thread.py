"""Calls that may never return, made in a thread of their own: to a store whose host is gone, to a file system that
does not answer."""

import threading
import time
from collections.abc import Callable


class HelperThread:
    """Makes one call at a time. One that does not return leaves the thread behind, busy."""

    def __init__(self, name: str):
        self._name = name
        self._thread: threading.Thread | None = None
        self._began = 0.0
        self.error: Exception | None = None

    def call(self, function: Callable, seconds: float):
        """The result of a function; None: it takes longer than ``seconds``, or failed, or the thread is busy.

        ``self.error`` is the exception of the last call that failed.
        """
        if self.busy_seconds():
            return None
        result: list = []

        def run() -> None:
            try:
                result.append(function())
            except Exception as error:  # of any kind: the caller goes on without a result
                self.error = error

        self._began = time.monotonic()
        self._thread = threading.Thread(target=run, daemon=True, name=self._name)
        self._thread.start()
        self._thread.join(seconds)
        return result[0] if result else None

    def busy_seconds(self) -> float:
        """For how long the last call has been going on; 0: it has returned."""
        alive = self._thread is not None and self._thread.is_alive()
        return time.monotonic() - self._began if alive else 0.0
