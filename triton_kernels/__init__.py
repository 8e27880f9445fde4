"""Triton kernels on raw tensors, installed as `cl_fast.triton_kernels`.

    philox.py    the random stream of the drop masks, as device functions, and the mask itself
    dare.py      drop and rescale

The folder sits at the top level, but its import name lies inside `cl_fast`: another project owns
the top-level name `triton_kernels`. Modules here import each other relatively, know nothing of the
rest of cl_fast, and are imported one by one, because each of them needs triton.
"""
