"""From a trained model to text and pictures: decoding with a cache of keys and values, under any routing plan.

``cache.py`` keys and values of what was read; ``decoder.py`` the model over rows that grow; ``sampling.py`` the next
token; ``generate.py`` whole answers and pictures.
"""
