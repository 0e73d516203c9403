"""Conversion of checkpoints: to other projections (``projections.py``), and from a Llama in Hugging Face's format
(``llama.py``, read by ``hugging_face.py``)."""
