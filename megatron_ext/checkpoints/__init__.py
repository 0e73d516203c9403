"""Checkpoints: complete or absent, loadable under any layout, optionally written in the background.

``checkpointer.py`` saves and loads a run; ``folder.py`` defines the files and when they count as a checkpoint;
``state.py`` the parts of a run that are stored; ``writer.py`` writes them.
"""
