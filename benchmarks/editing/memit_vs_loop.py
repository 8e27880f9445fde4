"""Memit beside the one-fact-at-a-time loop of `reference_memit.py`, on the CPU.

    python benchmarks/editing/memit_vs_loop.py                            GPT-2's size, 128 facts
    python benchmarks/editing/memit_vs_loop.py --out benchmarks/results   writes the table, too

A GPT-2 of random weights (124 million parameters by default), a word-level tokenizer of the same
vocabulary, facts as `world.py` makes them, 5 contexts of 10 tokens; the same contexts, statistics,
layers and options for both. With random weights hardly a loss falls below 0.05, so that every fact
takes all of its steps, on both sides. What is gained depends on how many of a prompt's tokens come
after the subject; their number is told.

First both edit a few facts in float64, and their values and updates are compared; the deltas of the
timed runs are compared, too, in float32. Then they take turns. Ours fits all facts; the prior is
factorised anew in every round, and that counts. Of the loop the values of a few facts and the keys
of some are timed, and multiplied: it takes one fact after the other, and costs as much for each.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from editing import reference_memit as loop
from editing.world import facts_of, tokenizer_of, words_of
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from cl_fast.editing import editors, keys
from cl_fast.editing.editors import Memit
from cl_fast.editing.facts import Fact, encode
from cl_fast.editing.stats import KeyStats

STATS_TOKENS = 8192


def model_of(width: int, layers: int, vocabulary: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=max(1, width // 64),
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


now: Callable[[], float] = time.perf_counter
"""Of one thread its processor time, which leaves out what else the machine does."""


class Clock:
    """Seconds in named parts of our fit: functions of its modules, wrapped while it runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inside = False

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            self.inside, start = True, now()
            try:
                return function(*args, **kwargs)
            finally:
                spent = now() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + spent
                self.inside = False

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        parts = (
            ("values", editors, "optimise_values"),
            ("keys", keys.KeyStream, "look"),
            ("keys", keys.KeyStream, "advance"),
            ("factor", editors.WeightEditor, "_prior"),
            ("solves", editors, "solve"),
        )
        kept = [(of, name, getattr(of, name)) for _, of, name in parts]
        for part, of, name in parts:
            setattr(of, name, self.wrapped(part, getattr(of, name)))
        try:
            yield
        finally:
            for of, name, function in kept:
                setattr(of, name, function)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


class Bench:
    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self.tokenizer = tokenizer_of(a.vocabulary)
        self.facts = facts_of(a.facts, a.vocabulary)
        draw = random.Random(1)
        self.contexts = [words_of(draw, a.vocabulary, 10) + " . " for _ in range(5)]
        self.model = model_of(a.width, a.layers, a.vocabulary)
        texts = [words_of(draw, a.vocabulary, 128) for _ in range(-(-a.stats_tokens // 128))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few tokens, in a tiny run
            self.stats = KeyStats.collect(
                self.model, self.tokenizer, texts=texts, layers=a.edit or "auto",
                tokens=a.stats_tokens,
            )  # fmt: skip
        self.layers = list(self.stats.layers)
        self.editor = self.editor_of(self.model, a.steps)
        # A few more tokens than keys have entries, or what the editor adds for the lack of them.
        shrinkage = 0.0 if a.stats_tokens >= self.stats.size(self.layers[0]) else 1e-3
        self.moments = {}
        for layer in self.layers:
            C = self.stats.moment(layer)
            C.diagonal().add_(shrinkage * C.diagonal().mean())
            self.moments[layer] = C

    def editor_of(self, model: GPT2LMHeadModel, steps: int) -> Memit:
        return Memit(
            model, self.tokenizer, self.stats, layers=self.layers, contexts=self.contexts,
            batch=self.a.batch, steps=steps,
        )  # fmt: skip

    def options(self, editor: Memit) -> loop.Options:
        o = editor.values_options
        return loop.Options(
            o.steps, o.lr, o.weight_decay, o.clamp, o.kl_factor, o.stop_loss, o.kl_prompt
        )

    @staticmethod
    def requests(facts: Sequence[Fact]) -> list[loop.Request]:
        return [loop.Request(f.prompt, f.subject, f.target) for f in facts]

    def verify(self, count: int) -> Iterator[str]:
        """Both on a few facts in float64, whole: values and updates."""
        few = self.facts[:count]
        wide = model_of(self.a.width, self.a.layers, self.a.vocabulary).double()
        self.stats.any_model = True
        editor = self.editor_of(wide, min(self.a.steps, 6))
        self.stats.any_model = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = editor.optimise(few)
            patch = editor.fit(few, values=values)
        Z, changes = loop.edit(
            wide, self.tokenizer, self.requests(few), self.layers, self.moments,
            editor.prior_weight, self.contexts, self.options(editor),
        )  # fmt: skip
        start = values[0].start.double()
        wrong = {"delta": relative(values[0].z.double() - start, Z - start)}
        for layer in patch.layers:
            number = int(layer.name.split(".")[2])
            wrong[f"update of block {number}"] = relative(layer.U @ layer.V.T, changes[number])
        steps = editor.values_options.steps
        yield f"{count} facts in float64, {steps} steps, relative differences:"
        yield "  " + ", ".join(f"{name} {value:.1e}" for name, value in wrong.items())
        if max(wrong.values()) > 1e-4:
            raise SystemExit(f"the two do not agree: {wrong}")

    def ours(self) -> tuple[dict[str, float], Any, Any]:
        clock = Clock()
        self.stats.forget()
        with warnings.catch_warnings(), clock.watching():
            warnings.simplefilter("ignore")
            start = now()
            values = self.editor.optimise(self.facts)
            patch = self.editor.fit(self.facts, values=values)
            spent = now() - start
        found = {"all": spent, **clock.seconds}
        found["rest"] = spent - sum(clock.seconds.values())
        return found, values[0], patch

    def theirs(self, turn: int, values: Any, patch: Any) -> tuple[dict[str, float], float]:
        """Seconds for all facts, from some of them; the worst difference of a delta."""
        count = len(self.facts)
        some = [(turn * self.a.loop_facts + i) % count for i in range(self.a.loop_facts)]
        requests = self.requests(self.facts)
        o = self.options(self.editor)
        worst, seconds = 0.0, 0.0
        for i in some:
            start = now()
            _, delta, _ = loop.compute_z(
                self.model, self.tokenizer, requests[i], self.layers[-1], self.contexts, o
            )
            seconds += now() - start
            worst = max(worst, relative(values.delta[i], delta))
        found = {"values": seconds * count / len(some)}
        few = min(count, self.a.loop_keys)
        keys_s = solves_s = 0.0
        for number, layer in enumerate(self.layers):
            start = now()
            loop.compute_ks(self.model, self.tokenizer, requests[:few], layer, self.contexts)
            loop.outputs(self.model, self.tokenizer, requests[:few], self.layers[-1])
            keys_s += now() - start
            made = patch.layers[number]
            start = now()
            loop.update(self.moments[layer], self.editor.prior_weight, made.keys, made.targets)
            solves_s += now() - start
        found["keys"] = keys_s * count / few
        found["solves"] = solves_s
        found["all"] = sum(found.values())
        return found, worst


def spread(values: Sequence[float]) -> str:
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
    return f"{statistics.median(ordered):9.2f} ({low:.2f} - {high:.2f})"


def commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def lines(a: argparse.Namespace) -> Iterator[str]:
    global now
    torch.set_num_threads(a.threads)
    now = time.process_time if a.threads == 1 else time.perf_counter
    yield (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {a.threads} "
        f"threads, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"commit {commit()}"
    )
    bench = Bench(a)
    size = sum(p.numel() for p in bench.model.parameters()) / 1e6
    encoded = [encode(bench.tokenizer, f.text, f.subject_span, f.target) for f in bench.facts]
    lengths = [len(e.prompt) for e in encoded]
    after = statistics.mean(e.targets.start - 1 - e.lookup for e in encoded)
    targets = statistics.mean(len(e.targets) for e in encoded)
    o = bench.editor.values_options
    yield (
        f"GPT-2 shape, random weights, float32: d = {a.width}, {a.layers} blocks, vocabulary "
        f"{a.vocabulary}, {size:.0f}M parameters; blocks {bench.layers} edited"
    )
    yield (
        f"{len(bench.facts)} facts, prompts of {min(lengths)} to {max(lengths)} tokens, mean "
        f"{statistics.mean(lengths):.1f}, of which {after:.1f} after the subject; targets of "
        f"{targets:.1f}; 5 contexts of 10; {o.steps} steps; statistics of {a.stats_tokens} tokens"
    )
    yield from bench.verify(a.verify)
    mine: list[dict[str, float]] = []
    other: list[dict[str, float]] = []
    worst = 0.0
    for turn in range(a.rounds):
        found, values, patch = bench.ours()
        mine.append(found)
        found, wrong = bench.theirs(turn, values, patch)
        other.append(found)
        worst = max(worst, wrong)
    steps = [r["steps"] for r in values.report]
    yield (
        f"{a.rounds} rounds in turns; of the loop the values of {a.loop_facts} facts (others in "
        f"each round) and the keys of {min(a.loop_keys, len(bench.facts))} were run, and "
        f"multiplied"
    )
    yield (
        f"steps of a fact: {min(steps)} to {max(steps)}; the deltas in float32 differ by "
        f"{worst:.1e} at most"
    )
    yield f"seconds for {len(bench.facts)} facts, median (p20 - p80)"
    yield f"  {'':8}{'cl_fast':>28}{'the loop':>28}"
    for part in ("values", "keys", "factor", "solves", "rest", "all"):
        both = [
            spread([r[part] for r in rows]) if part in rows[0] else "" for rows in (mine, other)
        ]
        yield f"  {part:8}{both[0]:>28}{both[1]:>28}"
    ratios = [b["all"] / m["all"] for b, m in zip(other, mine, strict=True)]
    yield f"the loop takes as long, in rounds: {spread(ratios).strip()} times"
    each = 1e3 * statistics.median([r["all"] for r in mine]) / len(bench.facts)
    loops = 1e3 * statistics.median([r["all"] for r in other]) / len(bench.facts)
    yield f"milliseconds per fact: {each:.0f} and {loops:.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--width", type=int, default=768)
    add("--layers", type=int, default=12)
    add("--vocabulary", type=int, default=50_257)
    add("--facts", type=int, default=128)
    add("--steps", type=int, default=20)
    add("--batch", type=int, default=64)
    add("--edit", type=int, nargs="+", help="blocks; by default the preset's")
    add("--stats-tokens", type=int, default=STATS_TOKENS)
    add("--verify", type=int, default=3, help="facts that are compared first")
    add("--loop-facts", type=int, default=4, help="facts of the loop in a round")
    add("--loop-keys", type=int, default=42, help="facts whose keys the loop collects in a round")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--out", type=Path, help="a folder for editing_memit_cpu.txt")
    a = parser.parse_args(arguments)
    words = " ".join(sys.argv[1:] if arguments is None else arguments)
    told = [f"# python benchmarks/editing/memit_vs_loop.py {words}".rstrip()]
    for line in lines(a):
        print(line, flush=True)
        told.append(line)
    if a.out is not None:
        (a.out / "editing_memit_cpu.txt").write_text("\n".join(told) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
