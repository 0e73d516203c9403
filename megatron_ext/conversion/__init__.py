"""Checkpoints from other checkpoints: of another kind of projections (``projections.py``), or of a Llama in Hugging
Face's format (``llama.py``, read by ``hugging_face.py``)."""
