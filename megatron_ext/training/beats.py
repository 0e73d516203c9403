"""The beats of all ranks, through a store that may not answer."""

import json
import time
from collections.abc import Callable

import torch.distributed as dist

from megatron_ext.training.helper_thread import HelperThread

PATIENCE = 2.0
"""Seconds to wait for the store. Its own timeout does not cover a server that is stopped."""

_JUDGES = 3  # ranks that read the beats of all at once
_RECONNECT = 20.0  # seconds until the next attempt to connect, doubled each time


class Beats:
    """Writes this rank's beat and reads those of all, plain dictionaries.

    No call takes longer than ``PATIENCE`` seconds: a thread of its own talks to the store. A connection that breaks,
    or over which no answer comes, is made anew.

    Args:
        connect: gives a store of this object alone. Called again for a new connection.
    """

    def __init__(self, connect: Callable[[], dist.Store], rank: int, size: int):
        self.rank, self.size = rank, size
        self._connect, self._store = connect, connect()
        self._helper = HelperThread("beats")
        self._delay, self._next_connect = _RECONNECT, 0.0
        self._failing_since: float | None = None
        self._call(lambda store: store.set(str(rank), "{}"))

    def write(self, beat: dict) -> bool:
        """Write the own beat; whether a rank has declared a hang."""
        text = json.dumps(beat)

        def write(store: dist.Store) -> bool:
            store.set(str(self.rank), text)
            return store.check(["hang"])

        return bool(self._call(write))

    def read(self) -> list[dict] | None:
        """The beat of every rank; None: the store does not answer."""
        keys = [str(rank) for rank in range(self.size)]

        def read(store: dist.Store) -> list[dict]:
            there = keys if store.check(keys) else [key for key in keys if store.check([key])]
            texts = dict(zip(there, store.multi_get(there)))
            beats = [json.loads(texts.get(key, "{}")) for key in keys]
            return [{"rank": rank, "step": 0, "phase": "start", "number": 0} | beat for rank, beat in enumerate(beats)]

        return self._call(read)

    def may_judge(self, place: tuple[int, str, int], late: bool) -> bool:
        """Whether this rank is one of the few at its place that judge all; ``late``: they did not, so any may."""
        return late or (self._call(lambda store: store.add(f"judges/{place}", 1)) or 1) <= _JUDGES

    def declare(self) -> bool | None:
        """Tell all ranks that the run hangs; whether this rank is the first to do so. None: no answer."""

        def declare(store: dist.Store) -> bool:
            store.set("hang", "1")
            return store.add("declared", 1) == 1

        return self._call(declare)

    def failing_seconds(self) -> float:
        """For how long every call has been without an answer."""
        return 0.0 if self._failing_since is None else time.monotonic() - self._failing_since

    def _call(self, function: Callable[[dist.Store], object]):
        """The result of a function of the store; None: it did not answer in time, or is gone."""
        if self._helper.busy_seconds() > self._delay:
            self._store, self._helper = None, HelperThread("beats")  # the old thread keeps its connection
        answer = self._helper.call(lambda: (self._ask(function),), PATIENCE)
        if answer is not None:
            self._failing_since, self._delay = None, _RECONNECT
            return answer[0]
        if self._failing_since is None:
            self._failing_since = time.monotonic()
        return None

    def _ask(self, function: Callable[[dist.Store], object]):
        if self._store is None:
            self._store = self._connected()
        store = self._store
        try:
            return function(store)
        except RuntimeError:  # such as torch's DistError: the server has ended, or the connection
            if self._store is store:  # and not one that was made since
                self._store = None
            raise

    def _connected(self) -> dist.Store:
        """A new connection. An attempt in vain prints warnings, so attempts become rarer."""
        now = time.monotonic()
        if now < self._next_connect:
            raise ConnectionError("waiting")
        self._next_connect = now + self._delay
        self._delay *= 2
        return self._connect()
