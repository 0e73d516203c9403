"""From a trained model to text and pictures: decoding with a cache of keys and values, under any plan.

``cache.py`` keys and values of the tokens read so far, and attention to them; ``decoder.py`` the model over documents
that grow; ``sampling.py`` the next token; ``guidance.py`` classifier-free guidance; ``generator.py`` whole answers and
pictures; ``session.py`` the same from captions, questions and picture files; ``checkpoint.py`` the model of a
checkpoint.
"""
