"""Kernels for the memory-bound steps of a layer: norms, permutations of rows, rotary positions, SwiGLU.

The plain mathematics stands one folder up: ``norm.py``, ``permute.py``, ``rotary.py``, ``activation.py``. ::

    functions.py           autograd functions that the layers call, on every device
    backend.py             chooses the backend of a device
    cpu_backend.py         forward and backward of each step in torch operators, for CPUs
    cpu_head_norm.py         its norm of queries and keys
    cpu_permutation.py       its permutations of rows
    cpu_rotary.py            its queries, keys and values
    triton_backend.py      the same steps for GPUs: torch operators that launch one Triton kernel each
    triton_kernels.py        its kernels
    triton_head_norm.py      its kernels of the norm of queries and keys
    triton_rotary.py         its kernels of queries, keys and values

Both backends have the same functions, most of them pairs ``NAME_forward`` and ``NAME_backward``, on contiguous tensors.
"""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton interprets its kernels on CPUs, one operation at a time: for tests."""
