"""The picture world: procedural scenes with captions and questions, for training and testing on a laptop.

``world.py`` what there is in a picture; ``render.py`` its pixels; ``captions.py`` and ``questions.py`` what can be
said and asked of it; ``write.py`` data sets in the forms of real data; ``sheet.py`` a page to look at.

``benchmarks.py`` (and ``multiple_choice.py``) the test split in the files of real benchmarks. The way back:
``look.py`` what is in a picture, by its pixels; ``facts.py`` what a caption says; ``check.py`` the one against the
other.
"""
