"""The steps that ``benchmarks/gpu_check.sh`` runs, a file for each, and around them

steps.py     the list, most valuable first, each step with its time box and its figures
records.py   the results so far, in one file that is written after every step and during it
runner.py    runs one step after the other, each in a process of its own
page.py      the results as one Markdown page

A step measures through a :class:`~gpu.records.Record`: figures by name, tables by title. It raises
:class:`~gpu.records.NotRun` on a machine that cannot run it.
"""
