"""What benchmarks/gpu_lane.py runs on the card.

rows.py           the result file: identity, atomic writing, the Markdown table; free of torch
harness.py        machine, cases, verification, timing
worker.py         the process that runs cases and reports each one
sanitized.py      every CUDA C++ kernel once, for compute-sanitizer
merge.py          combine and combine_many
selection.py      magnitude_threshold
packing.py        pack, unpack, combine from packed deltas
low_rank.py       rank updates and gram matrices
nearest.py        nearest_key, in a step of decoding and over a long prompt
orthogonality.py  penalty with gradient, projection
divergence.py     divergences and log-probs with their gradients, from logits and from hidden states
"""
