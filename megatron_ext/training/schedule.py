"""The learning rate over a run: Megatron-Core's own scheduler, set up from an ``OptimizerConfig``."""

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.config import OptimizerConfig

_STYLES = {"cosine": "cosine", "wsd": "WSD", "constant": "constant"}


def build_scheduler(
    optimizer, config: OptimizerConfig, iterations: int, done_iterations: int = 0
) -> OptimizerParamScheduler:
    """A scheduler that has already set the learning rate for iteration ``done_iterations + 1``.

    Call ``step(1)`` after each iteration. The rate rises linearly over ``warmup_iterations`` (starting at 1/warmup of
    the peak in the first iteration). Then it is constant, or falls along a cosine to ``min_lr`` at the last iteration,
    or (wsd) stays at its peak and falls by 1 - sqrt in the last ``wsd_decay_iterations``.

    The rate depends only on the iteration and the configuration, so checkpoints do not store it: a run resumed with
    more iterations follows the longer schedule. Build the scheduler after loading the optimizer's state, whose
    parameter groups hold an old rate.
    """
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_iterations,
        lr_decay_steps=iterations,
        lr_decay_style=_STYLES[config.schedule],
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=iterations,
        wd_incr_style="constant",
        wsd_decay_steps=config.wsd_decay_iterations,
        lr_wsd_decay_style="minus_sqrt",
    )
    scheduler.step(done_iterations + 1)
    return scheduler
