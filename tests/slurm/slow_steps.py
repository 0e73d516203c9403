"""A callback that makes every step of a tiny run take a while, so that there is time to stop it."""

import os
import time

from megatron_ext.training.callback import Callback


class SlowSteps(Callback):
    """``STEP_SECONDS`` (0.2) before every step."""

    def before_step(self, run, step) -> None:
        time.sleep(float(os.environ.get("STEP_SECONDS", 0.2)))
