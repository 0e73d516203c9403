"""The beats of all ranks, through a store that may not answer."""

import json
import queue
import threading
from collections.abc import Callable

import torch.distributed as dist

PATIENCE = 2.0
"""Seconds to wait for the store. Its own timeout does not cover a server that is stopped."""

_JUDGES = 3  # ranks that read the beats of all at once


class Beats:
    """Writes this rank's beat and reads those of all, plain dictionaries.

    No call takes longer than ``PATIENCE`` seconds: a thread of its own talks to the store.

    Args:
        store: of this object alone.
    """

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.rank, self.size = rank, size
        self._store = store
        self._calls: queue.Queue = queue.Queue()
        self._waiting: threading.Event | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True, name="beats")
        self._thread.start()
        self._call(lambda: store.set(str(rank), "{}"))

    def write(self, beat: dict) -> bool:
        """Write the own beat; whether a rank has declared a hang."""
        text = json.dumps(beat)

        def write() -> bool:
            self._store.set(str(self.rank), text)
            return self._store.check(["hang"])

        return bool(self._call(write))

    def read(self) -> list[dict] | None:
        """The beat of every rank; None: the store does not answer."""
        keys = [str(rank) for rank in range(self.size)]

        def read() -> list[dict]:
            there = keys if self._store.check(keys) else [key for key in keys if self._store.check([key])]
            texts = dict(zip(there, self._store.multi_get(there)))
            beats = [json.loads(texts.get(key, "{}")) for key in keys]
            return [{"rank": rank, "step": 0, "phase": "start", "number": 0} | beat for rank, beat in enumerate(beats)]

        return self._call(read)

    def may_judge(self, place: tuple[int, str, int], late: bool) -> bool:
        """Whether this rank is one of the few at its place that judge all; ``late``: they did not, so any may."""
        return late or (self._call(lambda: self._store.add(f"judges/{place}", 1)) or 1) <= _JUDGES

    def declare(self) -> None:
        """Tell all ranks that the run hangs."""
        self._call(lambda: self._store.set("hang", "1"))

    def _call(self, function: Callable):
        """The result of a function of the store; None: it did not answer in time, or is gone."""
        busy = self._waiting is not None and not self._waiting.is_set()
        if busy or not self._thread.is_alive():
            return None
        result, done = [], threading.Event()
        self._waiting = done
        self._calls.put((function, result, done))
        done.wait(PATIENCE)
        return result[0] if result else None

    def _serve(self) -> None:
        while True:
            function, result, done = self._calls.get()
            try:
                result.append(function())
            except RuntimeError:  # such as torch's DistError: the server has ended
                return  # every further call would print a warning
            finally:
                done.set()
