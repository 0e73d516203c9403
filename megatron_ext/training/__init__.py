"""Training: from a configuration to a trained checkpoint, over Megatron-Core's schedules, DDP and optimizer.

``run.py`` builds the parts (``setup.py`` the model and optimizer) and resumes; ``loop.py`` goes through the iterations,
each of them ``step.py`` with the objective of ``losses.py``; ``checkpoint.py`` saves and loads; ``lifecycle.py`` knows
when to stop and ``bad_steps.py`` what to skip; ``logging.py`` tells.
"""
