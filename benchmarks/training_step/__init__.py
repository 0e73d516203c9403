"""Whole training steps that ``benchmarks/step_time.py`` times: rows, the cases and their bases, our step, those of
other libraries, masking, and how seconds and memory are measured."""
