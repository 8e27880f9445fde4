"""Triton kernels of cl_fast, installed as ``cl_fast.triton_kernels``.

The folder sits at the top level, but its import name lies inside ``cl_fast``: another project owns
the top-level name ``triton_kernels``. Modules here use relative imports only and know nothing of
the rest of cl_fast. This release ships no kernel yet.
"""
