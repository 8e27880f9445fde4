"""Two ranks of gloo as forks of the test's process: nothing is imported again."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def _rank(function: Callable[..., Any], rank: int, port: int, args: Any, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        results[rank] = function(rank, *args)
    finally:
        dist.destroy_process_group()


def on_two_ranks(function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(rank, *args)` returns on each rank; fails where one of them does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    with context.Manager() as manager:
        results = manager.dict()
        ranks = [
            context.Process(target=_rank, args=(function, rank, port, args, results), daemon=True)
            for rank in range(2)
        ]
        for one in ranks:
            one.start()
        for one in ranks:
            one.join(120)
        assert [one.exitcode for one in ranks] == [0, 0]
        return [results[0], results[1]]
