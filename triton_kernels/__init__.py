"""Triton kernels on raw tensors, installed as `cl_fast.triton_kernels`.

    combine.py        base and K tensors in one pass, many tensors in one launch
    dare.py           drop and rescale: combine of one model
    magnitude.py      exact selection by magnitude, many tensors at once
    sums.py           absolute sums in float64, in the one order of all backends
    packing.py        the kept values of a drop: count, pack, unpack
    low_rank.py       low-rank updates of many matrices, and second moments of keys
    nearest.py        the nearest key of each query: one running maximum, no matrix of scores
    orthogonality.py  O-LoRA's penalty and the projection, all modules of a model at once
    philox.py         the random stream of the drop masks, as device functions
    rows.py           which tensor a program works on
    tables.py         numbers of many tensors to the device, without a host sync

The folder sits at the top level, but its import name lies inside `cl_fast`: another project owns
the top-level name `triton_kernels`. Modules here import each other relatively, know nothing of the
rest of cl_fast, and are imported one by one, because each of them needs triton.
"""
