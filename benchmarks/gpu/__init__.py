"""What ``benchmarks/gpu_check.sh`` runs: a file for each step, and around them

steps.py     the list, most valuable first, each step with its time box and the figures that it gives
records.py   what is known so far, in one file that is written after every step and while it runs
runner.py    one step after the other, each in a process of its own
page.py      all of it as one Markdown page

A step measures through a :class:`~gpu.records.Record`: figures by name, tables by title. It raises
:class:`~gpu.records.NotRun` where it cannot be had.
"""
