"""Training: from a configuration to a trained checkpoint, over Megatron-Core's schedules, DDP and optimizer.

========================  ==========================================================================================
``run.py``                a run's parts, built from the configuration, and resumption
``validation.py``         the checks of a configuration, before anything is built
``setup.py``              the model and the optimizer
``prepare.py``            the input of a step, made on the host ahead of training
``loop.py``               the training loop
``step.py, losses.py``    one step, and the objective
``schedule.py``           the learning rate
``callback.py``           hooks around a step; the callbacks are in ``megatron_ext/callbacks``
``bad_steps.py``          steps that are skipped: a loss that is not finite, or jumps
``lifecycle.py``          when to stop: signals, time limits, the end of a Slurm job
``stop_signals.py``       signals that arrive before training begins
``resuming.py``           where checkpoints are, and resuming from the newest one that is intact
``output_lock.py``        ``OUTPUT/LOCK``: one run at a time in an output folder
``watch.py``              hangs: where every rank is, who holds up the others (``beats.py``, ``hang_report.py``)
``schedule_timers.py``    what the schedules tell the watch, and the time of passes
``non_finite.py``         the ranks and parameters that numbers that are not finite come from
``finished.py``           ``OUTPUT/FINISHED``, the mark of a complete run
``starts.py``             ``OUTPUT/starts.jsonl``, ``OUTPUT/REFUSED``: runs that a launcher starts again
``launcher.py``           torchrun for runs that are told to stop
``metrics.py``            ``metrics.jsonl``
``environment.py``        ``environment.json``
``devices.py``            peak FLOP/s, for the MFU
========================  ==========================================================================================
"""
