"""Which tokens take part in which layer: pure functions of (layer, task, modality), without communication.

``plan.py`` says what each class of token does in each layer; ``route.py`` turns one micro-batch into the index data
that the layers use.
"""
