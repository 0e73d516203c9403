"""Checkpoints: complete or absent, for any layout, optionally written in the background.

``checkpointer.py`` saves and loads a run; ``folder.py`` defines the files of a complete checkpoint; ``state.py`` turns
a run into tensors to store; ``writer.py`` writes them.
"""
