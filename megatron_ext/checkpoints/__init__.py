"""Checkpoints: complete or absent, loadable under any layout, optionally written in the background.

``checkpointer.py``   saves and loads a run
``folder.py``         the files, and when they count as a checkpoint
``state.py``          the parts of a run that are stored
``writer.py``         writes them
``checks.py``         what a checkpoint must be for a run to load it
``errors.py``         a checkpoint that cannot be written, or is damaged
``replica.py``        copies at a second place; ``storage.py``: that place, a folder or a URL
``local.py``          checkpoints on the disks of the nodes; ``local_state.py``: what is in them; ``local_files.py``:
                      the files, and how they travel
``stored_weights.py`` the weights in a checkpoint, one by one, without a model
"""
