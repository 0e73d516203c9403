"""The memory-bound steps of a layer: norms, moving rows, rotary positions, the gated activation.

::

    functions.py           autograd functions: what the layers call, the same for every backend
    backend.py             which backend a device has
    torch_backend.py       forward and backward of each step in plain torch: the reference, and the CPU's path
    torch_rotary.py          of it: queries, keys and values
    triton_backend.py      the same steps as registered operators that launch one kernel each
    triton_kernels.py        their kernels
    triton_rotary.py         of it: queries, keys and values

Both backends have the same functions, ``NAME_forward`` and ``NAME_backward``, on contiguous tensors.
"""
