"""Megatron-Core's Transformer over tokens with roles.

``model.py`` the model; ``layer.py``, ``attention.py`` and ``core_attention.py`` a layer; ``projection.py`` its split
projections; ``norm.py``, ``rotary.py``, ``activation.py`` and ``permute.py`` its mathematics in plain torch;
``code_vectors.py``, ``projector.py``, ``depth_layer.py`` and ``depth_head.py`` image tokens of several codes;
``kernels/`` the same for speed, on CPUs and GPUs; ``specs.py`` Megatron-Core's configuration.
"""
