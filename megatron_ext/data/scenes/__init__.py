"""The picture world: procedural scenes with captions and questions, for training and testing on a laptop.

``world.py`` what there is in a picture; ``render.py`` its pixels; ``captions.py`` and ``questions.py`` what can be
said and asked of it; ``write.py`` data sets in the forms of real data; ``sheet.py`` a page to look at.
"""
