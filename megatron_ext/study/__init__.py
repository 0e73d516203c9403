"""A study: many runs from one file, and their comparison.

::

    STUDY.yaml -> study_file.Study          base configuration, sizes, methods, seeds, budgets, benchmarks; claims.py:
                                            whether its runs can decide its hypotheses
               -> grid.runs                 every run with its configuration; iterations from budget.py
               -> learning_rates.py         trials of learning rates, before the runs
               -> execution.py | slurm.py   both in order, by scheduler.py:
                                            pretrain_unified.py, then evaluation, each run in its own folder
               -> outcome.py                the figures of a finished run, RUN/result.json
               -> collect.py                all of them in the form of analysis/results.py, OUT/results.json
               -> report.py                 synergy, its losses in parts, tests, hypotheses, fits: OUT/report.md

The state of a run is read from its folder alone (:mod:`.state`), so a study can be killed at any moment and restarted,
and several machines can work on it at once.
"""
