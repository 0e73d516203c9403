"""A study: many runs from one file, and what they say together.

::

    STUDY.yaml -> study_file.Study        base configuration, sizes, methods, seeds, budgets, benchmarks
               -> grid.runs               every run with its configuration; iterations from budget.py
               -> execute.py | slurm.py   pretrain_unified.py, then tools/evaluate.py, each run in its own folder
               -> outcome.py              a finished run's figures, RUN/result.json
               -> collect.py              all of them as analysis/results.py has them, OUT/results.json
               -> report.py               gains, synergy losses, fits over size, uncertainty: OUT/report.md

What a run's state is, is read from its folder alone (:mod:`.state`), so a study can be killed at any moment and started
again, and several machines can work on it at once.
"""
