"""Checkpoints: complete or absent, under any layout, in the background if asked.

``checkpointer.py`` saves and loads a run; ``folder.py`` the files, and when they count as a checkpoint; ``state.py``
what of a run is stored; ``writer.py`` writes it.
"""
