"""Faults that are injected into real runs, and what each run does about them: one file per kind of fault."""
