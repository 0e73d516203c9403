"""Whole training steps to be timed: rows, the cases and their bases, our step, other libraries', masking, and how
seconds and memory are taken. ``benchmarks/step_time.py`` is the program over them."""
