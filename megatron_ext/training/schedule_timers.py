"""What Megatron-Core's schedules tell about themselves: their ``timers``, here for the watch and for the comparison of
the ranks' speeds. Nothing waits for the device."""

import time

import torch

from megatron_ext.training import watch


class ScheduleTimers:
    """The ``timers`` of a model's configuration: Megatron-Core starts and stops ``timers(name, log_level)`` around each
    forward and backward pass, each message between stages, and the reduction of gradients.

    The start of a pass, and of the reduction, says to the watch where the process is. :meth:`measure` adds up the time
    of passes, without the waiting for messages between stages (but with the tensor-parallel ones inside of passes): of
    the device between events, or on CPUs, which other processes use too, the CPU time of the training thread.
    """

    def __init__(self):
        self._measuring = False
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._timers = {f"{phase}-compute": _Pass(self, phase) for phase in ("forward", "backward")}
        self._timers["all-grads-sync"] = _Reduction()

    def __call__(self, name: str, log_level: int | None = None) -> "_Timer":
        return self._timers.get(name, _OTHER)

    def measure(self) -> None:
        """Add up the time of passes from now on."""
        self._measuring, self._seconds = True, 0.0
        self._events.clear()

    def busy_seconds(self) -> float:
        """The time of the passes since :meth:`measure`, which ends. Waits for the device."""
        self._measuring = False
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(start.elapsed_time(stop) for start, stop in self._events) / 1000
            self._events.clear()
        return self._seconds

    def _now(self) -> "float | torch.cuda.Event | None":
        if not self._measuring:
            return None
        if not torch.cuda.is_available():
            return time.thread_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, start: "float | torch.cuda.Event", stop: "float | torch.cuda.Event | None") -> None:
        if isinstance(stop, float):
            self._seconds += stop - start
        elif stop is not None:
            self._events.append((start, stop))


class _Timer:
    def start(self, barrier: bool = False) -> None:
        """Megatron-Core asks for barriers by default; there are none."""

    def stop(self, barrier: bool = False) -> None:
        pass


class _Pass(_Timer):
    def __init__(self, timers: ScheduleTimers, phase: str):
        self._timers, self._phase = timers, phase
        self._start = None

    def start(self, barrier: bool = False) -> None:
        watch.enter_pass(self._phase)
        self._start = self._timers._now()

    def stop(self, barrier: bool = False) -> None:
        if self._start is not None:
            self._timers._add(self._start, self._timers._now())
            self._start = None


class _Reduction(_Timer):
    def start(self, barrier: bool = False) -> None:
        watch.enter("reduce")


_OTHER = _Timer()
