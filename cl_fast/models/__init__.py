"""What losses, training and editing must know of a model that they did not make.

    heads      the output head, what it is given, and functions of ours within DDP and FSDP
    adapters   low-rank adapters: on the head, and on every layer
    blocks     the decoder's blocks, the matrix each MLP writes with, and runs of a part of them
    sharding   the part of a tensor that lies on this rank

Everything is found from modules and config, never from the names of paths. Importing this package
imports none of them: name the module that you need.
"""
