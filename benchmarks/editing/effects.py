"""What each editor does to models that know something: a table over seeds.

    python benchmarks/editing/effects.py                           all editors, 3 seeds
    python benchmarks/editing/effects.py --only MEMIT --seeds 1
    python benchmarks/editing/effects.py --out benchmarks/results

Fifty facts at once, and two hundred in batches of ten, scored after the last batch:

    ES       share where the new answer is likelier than the old one after the prompt
    PS       the same, after a template in which the person never had a value
    NS       share of prompts about others with the old answer, where it still is the likelier one
    greedy   share of prompts after which the model writes the new answer
    oldest   ES of the first twenty of the two hundred

Models and people are those of tests/fact_models.py: 0.3 million parameters, 240 people. It is a
toy. Settings were looked for by hand, on seed 0, for every editor alike; what loses here may win
elsewhere. Statistics, and the texts of gates, leave out the people who are edited, as the texts of
a large model nearly do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import torch
import transformers
from fact_models import FactModel, fact_model

from cl_fast.editing import (
    AlphaEdit,
    Emmet,
    Fact,
    FactStore,
    Grace,
    InContext,
    KeyStats,
    LocFT,
    Memit,
    Mend,
    Patch,
    Report,
    Rome,
    ValueOptions,
    evaluate,
)

ROOT = Path(__file__).resolve().parents[2]
TOGETHER, IN_ALL, BATCH, COHORTS = 50, 200, 10, 10
SUITE = ("es", "ps", "ns", "greedy")
COLUMNS = {"es": "ES", "ps": "PS", "ns": "NS", "greedy": "greedy"}
VALUES: dict[str, Any] = {"lr": 0.1, "steps": 25, "clamp": 1.2}


class Run:
    """What the editors of a seed are given."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.made: FactModel = fact_model(seed)
        self.model, self.tokenizer = self.made.model, self.made.tokenizer
        world = self.made.world
        self.facts = world.edits(IN_ALL, seed)
        self.texts = world.texts(2000, 0, without=self.facts)
        self.stats = KeyStats.collect(self.model, self.tokenizer, texts=self.texts, layers=[0, 1])
        edited = {fact.subject for fact in self.facts}
        self.examples: list[Fact] = []
        """Of people who are not edited, to train an editor with; some contradict one another."""
        for number in range(1, 9):
            drawn = world.edits(120, 1000 + number)
            self.examples += [fact for fact in drawn if fact.subject not in edited]

    def scored(self, facts: list[Fact], cohorts: int = 1, **options: Any) -> Report:
        return evaluate(self.model, self.tokenizer, facts, SUITE, cohorts=cohorts, **options)


class Nothing:
    def __init__(self, run: Run) -> None:
        self.run = run

    def add(self, facts: list[Fact]) -> None: ...

    def scored(self, facts: list[Fact], cohorts: int) -> Report:
        return self.run.scored(facts, cohorts)


class InWeights(Nothing):
    """An editor whose patch grows; `one_by_one`: by a fact at a time."""

    def __init__(self, run: Run, editor: Any, one_by_one: bool = False) -> None:
        super().__init__(run)
        self.editor, self.one_by_one = editor, one_by_one
        self.patch: Patch | None = None

    def add(self, facts: list[Fact]) -> None:
        size = 1 if self.one_by_one else len(facts)
        for i in range(0, len(facts), size):
            self.patch = self.editor.fit(facts[i : i + size], after=self.patch)

    def scored(self, facts: list[Fact], cohorts: int) -> Report:
        assert self.patch is not None
        with self.patch:
            return self.run.scored(facts, cohorts)


class Outside(Nothing):
    """A store or a codebook."""

    def __init__(self, run: Run, store: Any) -> None:
        super().__init__(run)
        self.store = store

    def add(self, facts: list[Fact]) -> None:
        self.store.insert(facts)

    def scored(self, facts: list[Fact], cohorts: int) -> Report:
        with self.store:
            return self.run.scored(facts, cohorts)


class AsText(Nothing):
    """Facts that are put before prompts."""

    def __init__(self, run: Run, editor: InContext) -> None:
        super().__init__(run)
        self.editor = editor

    def add(self, facts: list[Fact]) -> None:
        self.editor.insert(facts)

    def scored(self, facts: list[Fact], cohorts: int) -> Report:
        return self.run.scored(facts, cohorts, in_context=self.editor.before)


def weights(kind: Any, one_by_one: bool = False, **options: Any) -> Callable[[Run], Nothing]:
    given = {"layers": [0], "prior_weight": 75.0, "contexts": (), **VALUES, **options}

    def start(run: Run) -> Nothing:
        return InWeights(run, kind(run.model, run.tokenizer, run.stats, **given), one_by_one)

    return start


def mend(run: Run) -> Nothing:
    editor = Mend(
        run.model, run.tokenizer, rank=64, aggregate="least_squares", edit_lr=1e-3, seed=run.seed
    )
    editor.train(
        run.examples, locality_texts=run.texts[:300], steps=250, lr=3e-4, lr_lr=3e-4,
        edits_per_step=BATCH, seed=run.seed,
    )  # fmt: skip
    return InWeights(run, editor)


def store(gate: Any) -> Callable[[Run], Nothing]:
    def start(run: Run) -> Nothing:
        given: dict[str, Any] = {"gate": gate, "options": ValueOptions(**VALUES)}
        if gate == "calibrated":
            given.update(stats_texts=run.texts, stats_tokens=100_000)
        return Outside(run, FactStore(run.model, run.tokenizer, layer=0, contexts=(), **given))

    return start


def fine_tuning(run: Run) -> Nothing:
    return InWeights(run, LocFT(run.model, run.tokenizer, layer=0, lr=3e-3, eos=False))


@dataclass
class Method:
    name: str
    note: str
    start: Callable[[Run], Nothing]
    few: bool = True
    """Fifty at once make sense."""
    many: bool = True


METHODS = [
    Method("unedited", "", Nothing),
    Method("ROME", "a fact after the other", weights(Rome, True, clamp=2.0, history=False)),
    Method("MEMIT", "history", weights(Memit)),
    Method("MEMIT", "no history", weights(Memit, history=False), few=False),
    Method("MEMIT", "history, lambda 200", weights(Memit, prior_weight=200.0)),
    Method("MEMIT", "blocks 0 and 1, history", weights(Memit, layers=[0, 1])),
    Method("MEMIT-BLUE", "blocks 0 and 1, each its own values, history",
           weights(Memit, layers=[0, 1], spread="ends")),
    Method("EMMET", "history", weights(Emmet)),
    Method("AlphaEdit", "history", weights(AlphaEdit, prior_weight="auto", energy=0.9, l2=0.3)),
    Method("MALMEN", "MEND with least squares", mend),
    Method("FactStore", "gate 0.9", store(0.9)),
    Method("FactStore", "calibrated gate", store("calibrated")),
    Method("GRACE", "", lambda run: Outside(run, Grace(run.model, run.tokenizer))),
    Method("IKE", "the model never learnt to read facts",
           lambda run: AsText(run, InContext(run.model, run.tokenizer, demonstrations=2))),
    Method("LocFT-BF", "block 0", fine_tuning),
]  # fmt: skip


def measured(method: Method, run: Run) -> dict[str, Any]:
    """One seed. What an editor needs before its first fact, training included, is `prepared`."""
    found: dict[str, Any] = {}
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    if method.few:
        began = time.process_time()
        state = method.start(run)
        found["prepared"] = time.process_time() - began
        began = time.process_time()
        state.add(run.facts[:TOGETHER])
        found["seconds"] = time.process_time() - began
        report = state.scored(run.facts[:TOGETHER], 1)
        found["together"] = {name: report.mean(name) for name in COLUMNS}
    if method.many:
        state = method.start(run)
        began = time.process_time()
        for i in range(0, IN_ALL, BATCH):
            state.add(run.facts[i : i + BATCH])
        found["seconds_in_all"] = time.process_time() - began
        report = state.scored(run.facts, COHORTS)
        found["in_all"] = {name: report.mean(name) for name in COLUMNS}
        found["in_all"]["oldest"] = report.mean("es", 0)
        found["in_all"]["newest"] = report.mean("es", COHORTS - 1)
    changed = [n for n, x in run.model.state_dict().items() if not torch.equal(x, before[n])]
    if changed:
        raise SystemExit(f"{method.name} left {changed} changed")
    return found


def text(values: list[float], digits: int = 2) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def cells(rows: list[dict[str, Any]], part: str, names: list[str]) -> list[str]:
    if part not in rows[0]:
        return ["-"] * len(names)
    return [text([row[part][name] for row in rows]) for name in names]


def table(results: list[dict[str, Any]], part: str) -> str:
    names = [*COLUMNS] if part == "together" else [*COLUMNS, "oldest", "newest"]
    heads = [COLUMNS.get(name, name) for name in names]
    what = f"{TOGETHER} at once" if part == "together" else f"{IN_ALL}, {BATCH} at a time"
    seconds = "seconds" if part == "together" else "seconds_in_all"
    ahead = ["s before"] if part == "together" else []
    lines = [
        "| " + " | ".join([what, *heads, *ahead, "s"]) + " |",
        "|---" * (len(heads) + len(ahead) + 2) + "|",
    ]
    for result in results:
        rows = result["seeds"]
        if part not in rows[0]:
            continue
        name = result["method"] + (f" ({result['note']})" if result["note"] else "")
        took = [f"{statistics.fmean(row[s] for row in rows):.1f}"
                for s in (["prepared"] if ahead else []) + [seconds]]  # fmt: skip
        lines.append("| " + " | ".join([name, *cells(rows, part, names), *took]) + " |")
    return "\n".join(lines)


def commit() -> str:
    words = ["git", "-C", str(ROOT), "describe", "--always"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="editors whose name contains this")
    parser.add_argument("--out", type=Path, help="folder for editing_effects.json and .md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # the models are too small for more
    chosen = [method for method in METHODS if options.only in method.name]
    if not chosen:
        parser.error(f"--only {options.only!r}: there are {[m.name for m in METHODS]}")
    made_of = commit()  # now, while what is imported is what lies there
    runs = [Run(seed) for seed in range(options.seeds)]
    results = []
    for method in chosen:
        rows = [measured(method, run) for run in runs]
        results.append({"method": method.name, "note": method.note, "seeds": rows})
        told = {n: cells(rows, "together", [n])[0] for n in COLUMNS}
        print(f"{method.name:<11}{method.note:<46}", told, flush=True)
        if method.many:
            names = [*COLUMNS, "oldest", "newest"]
            told = dict(zip(names, cells(rows, "in_all", names), strict=True))
            print(f"{'':<57}", told, f"{rows[0]['seconds_in_all']:.1f} s", flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread used"
    head = (
        f"Mean [lowest, highest] of {options.seeds} seeds; seconds of CPU, statistics and models "
        f"not counted. {machine}, torch {torch.__version__}, commit {made_of}."
    )
    written = f"{head}\n\n{table(results, 'together')}\n\n{table(results, 'in_all')}\n"
    print("\n" + written)
    if options.out:
        content = {
            "machine": machine, "torch": torch.__version__, "commit": made_of, "results": results
        }  # fmt: skip
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "editing_effects.json").write_text(json.dumps(content, indent=1) + "\n")
        (options.out / "editing_effects.md").write_text(written)


if __name__ == "__main__":
    main()
