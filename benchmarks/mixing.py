"""What replay costs in the data loader: `python benchmarks/mixing.py` (CPU, under half a minute).

    resume       making the mixture anew, skipping 10**6 steps, and the first batch
    throughput   batches of the mixture against those of the plain map-style dataset

Samples are 512 to 2048 token ids as tokenisers give them (input_ids, attention_mask, labels),
tensors, collated by torch. The plain dataset is read with shuffle=True, the mixture in its own
order, which is as random. Both are read to the same number of batches, in turns, in one process;
what comes out of the mixture is compared with its sources before anything is timed. Times are
medians of the rounds, with the 20th and 80th percentile; the ratio is that of the medians and,
beside it, the median of the ratios within a round. Without workers they are the processor's time
of this process, so that what else runs on the machine does not enter; with workers they are the
clock's.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cl_fast.training.mixing import Mixture, mix

BATCH = 8
STEPS = 10**6


class Tokens(Dataset):
    """Blocks of token ids."""

    def __init__(self, count: int, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, 50_000, (count, length), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Virtual(Dataset):
    """As many samples as one likes; only their number costs nothing."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.row = torch.arange(1024)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.row + index, "labels": self.row}


def spread(times: list[float], digits: int = 2) -> str:
    low, high = np.quantile(times, [0.2, 0.8])
    return f"{statistics.median(times):.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def read(loader: Any, batches: int) -> float:
    """Microseconds per batch, the start of the sampler included, that of workers left out."""
    clock = time.perf_counter if loader.num_workers else time.process_time
    start = clock()
    it = iter(loader)
    if loader.num_workers:
        for _ in range(4 * loader.num_workers):
            next(it)
        start = clock()
    for _ in range(batches):
        next(it)
    return 1e6 * (clock() - start) / batches


def timed(run: Callable[[], object]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def resume(repeats: int) -> None:
    new, old = Virtual(20 * STEPS), {f"old{i}": Virtual(10**6) for i in range(3)}
    uneven = {"old0": 0.03, "old1": 0.015, "old2": 0.005}

    def at(ratio: Any, world: int) -> Callable[[], object]:
        def run() -> object:
            mixture = mix(new, old, ratio, seed=3)
            if world > 1:
                mixture = mixture.shard(1, world)
            per_rank = STEPS * BATCH // world
            return next(iter(DataLoader(mixture.skip(per_rank), batch_size=BATCH)))

        return run

    straight = mix(new, old, 0.05, seed=3)
    ids = at(0.05, 1)()["input_ids"][:, 0].tolist()  # type: ignore[index]
    assert ids == [straight.source(STEPS * BATCH + i)[1] for i in range(BATCH)]

    print(f"resume at step {STEPS:,}, batches of {BATCH}: ms until the first batch")
    for name, run in (
        ("one ratio, 3 old sources", at(0.05, 1)),
        ("three ratios", at(uneven, 1)),
        ("one ratio, rank 1 of 2", at(0.05, 2)),
    ):
        print(f"  {name:<42} {spread([timed(run) for _ in range(repeats)])}")

    count = 10**6
    lengths = {
        "new": np.random.default_rng(0).integers(64, 2048, count),
        "old": np.random.default_rng(1).integers(64, 2048, count),
    }
    made = [
        timed(
            lambda: mix(
                Virtual(count), Virtual(count), 0.05, unit="tokens", lengths=lengths, seed=3
            )
        )
        for _ in range(3)
    ]
    print(f"  {'by tokens: 10**6 new samples, the mixture made':<42} {spread(made, 0)}")
    whole = mix(Virtual(count), Virtual(count), 0.05, unit="tokens", lengths=lengths, seed=3)
    went = [timed(lambda: whole.skip(10**6)[0]) for _ in range(repeats)]
    print(f"  {'by tokens: skip(10**6)[0]':<42} {spread(went)}")


def throughput(seconds: float) -> None:
    cases = [(512, 0), (1024, 0), (2048, 0), (1024, 2)]
    print("throughput: microseconds per batch")
    print(f"  {'':<24} {'plain':>22} {'mixture':>22} {'ratio':>8} {'in rounds':>10}")
    for length, workers in cases:
        count, batches = 4000, 400
        new, old = Tokens(count, length, 0), Tokens(count // 4, length, 1)
        mixture = mix(new, old, 0.05)
        plain = DataLoader(new, batch_size=BATCH, shuffle=True, num_workers=workers)

        def mixed(
            mixture: Mixture = mixture, workers: int = workers
        ) -> DataLoader[dict[str, torch.Tensor]]:
            # Made anew, so that it finds its places again, as in a first epoch.
            return DataLoader(mixture.skip(0), batch_size=BATCH, num_workers=workers)

        for n, batch in zip(range(3), mixed(), strict=False):
            for i, ids in enumerate(batch["input_ids"]):
                name, at = mixture.source(n * BATCH + i)
                assert torch.equal(ids, (old if name == "old" else new).ids[at])
        times: tuple[list[float], list[float]] = [], []
        began = time.perf_counter()
        while time.perf_counter() - began < seconds or len(times[0]) < 3:
            order = (0, 1) if len(times[0]) % 2 else (1, 0)
            for which in order:
                times[which].append(read(mixed() if which else plain, batches))
        ratio = statistics.median(times[1]) / statistics.median(times[0])
        paired = statistics.median(b / a for a, b in zip(*times, strict=True))
        label = f"{BATCH} x {length}, {workers} workers"
        told = f"{spread(times[0], 0):>22} {spread(times[1], 0):>22}"
        print(f"  {label:<24} {told} {ratio:>8.3f} {paired:>10.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.5, help="for each row of throughput")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, 1 thread")
    resume(repeats=15)
    throughput(given.seconds)


if __name__ == "__main__":
    main()
