"""Who takes part in which layer. Pure functions of (layer, task, modality); no communication in here.

``plan.py`` says what each class of token does in each layer; ``route.py`` turns one micro-batch into the index data
that the layers use.
"""
