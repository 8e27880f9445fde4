"""What training an editor brings on facts that it never saw, on tiny models of made-up people.

    python benchmarks/editing/learnt_editor.py              3 seeds
    python benchmarks/editing/learnt_editor.py --seeds 1 --out benchmarks/results

    edit    -log p(new answer) per token, over prompts and held-out templates, after the edit
    KL      KL(before || after) per token on texts and on neighbours (the facts' relation and old
            answer, other people)
    ES PS   share where the new answer is likelier than the old: of prompts, of held-out templates
    NS      share of neighbours whose old answer is still the likelier one

"gradient" is a step of the given length along the normalised factors of the gradient: what the
network of MEND is before it is trained. It is a toy: 0.6 million parameters, 160 facts to learn
from, seconds of training.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import torch
from fact_models import FactModel, fact_model

from cl_fast.editing import Fact, Mend

ROOT = Path(__file__).resolve().parents[2]
SEEN, NEW, TOGETHER = 160, 40, 8
LENGTHS = (0.7e-3, 1e-3, 1.4e-3, 2e-3)


def likelihood(made: FactModel, prompt: str, target: str) -> float:
    ids = made.tokenizer(prompt)["input_ids"]
    answer = torch.tensor(made.tokenizer(target, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        given = torch.tensor([[*ids, *answer.tolist()]])
        logits = made.model(input_ids=given).logits[0, len(ids) - 1 : -1]
    return -float(torch.nn.functional.cross_entropy(logits, answer))


def measured(mend: Mend, made: FactModel, facts: list[Fact], texts: list[str], size: int) -> Any:
    """The numbers of a row; facts are edited `size` at a time."""
    with torch.no_grad():
        loss = mend._validate(
            mend._examples(facts, 64), mend._texts(texts, 64), size, size, 1.0, 1.0
        )
    better: dict[str, list[bool]] = {"ES": [], "PS": [], "NS": []}
    for start in range(0, len(facts), size):
        some = facts[start : start + size]
        with mend.fit(some):
            for fact in some:
                old = str(fact.target_true)
                for name, prompts, first, second in (
                    ("ES", (fact.text,), fact.target, old),
                    ("PS", fact.paraphrases, fact.target, old),
                    ("NS", fact.neighbourhood, old, fact.target),
                ):
                    for prompt in prompts:
                        pair = (likelihood(made, prompt, target) for target in (first, second))
                        better[name].append(next(pair) > next(pair))
    shares = {name: statistics.fmean(values) for name, values in better.items()}
    return {"edit": loss["edit"], "KL": loss["locality"], **shares}


def rows_of(seed: int) -> dict[str, dict[str, float]]:
    made = fact_model(seed, "llama")
    facts = made.world.edits(SEEN + NEW, seed=1)
    seen, new, texts = facts[:SEEN], facts[SEEN:], made.world.texts(300, seed=3)
    rows: dict[str, dict[str, float]] = {}

    def train(label: str, size: int, steps: int, **options: Any) -> Mend:
        mend = Mend(made.model, made.tokenizer, rank=64, **options)
        began = time.process_time()
        mend.train(
            seen, locality_texts=texts, steps=steps, lr=3e-4, lr_lr=3e-4, edits_per_step=size,
            accumulate=2 if size == 1 else 1,
        )  # fmt: skip
        seconds = time.process_time() - began
        rows[label] = {**measured(mend, made, new, texts, size), "s": seconds}
        return mend

    train("one by one: MEND, 80 steps", 1, 80)
    mend = train("one by one: MEND, 250 steps", 1, 250)
    plain = Mend(made.model, made.tokenizer, rank=1)
    moments = {n: v for n, v in mend.network.state_dict().items() if "moments" in n}
    plain.network.load_state_dict(moments, strict=False)
    for length in LENGTHS:
        plain.network.edit_lr.data.fill_(-length)
        rows[f"one by one: gradient, {length:g}"] = measured(plain, made, new, texts, 1)
    least: dict[str, Any] = {"aggregate": "least_squares", "edit_lr": 1e-3}
    train("8 together: MALMEN, 1 step", TOGETHER, 1, **least)
    train("8 together: MALMEN, 100 steps", TOGETHER, 100, **least)
    train("8 together: MALMEN, 250 steps", TOGETHER, 250, **least)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a folder for learnt_editor_cpu.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="this editor was never trained")
    found = [rows_of(seed) for seed in range(arguments.seeds)]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    lines = [
        f"Median [lowest, highest] of {arguments.seeds} seeds, {NEW} facts each; commit {commit}, "
        f"torch {torch.__version__}, {platform.machine()}, one thread.",
        "",
        "| | edit | KL | ES | PS | NS | s of training |",
        "|---|---|---|---|---|---|---|",
    ]
    for label in found[0]:
        cells = []
        for name in ("edit", "KL", "ES", "PS", "NS"):
            values = [rows[label][name] for rows in found]
            digits = 3 if name == "KL" else 2
            middle, low, high = statistics.median(values), min(values), max(values)
            cells.append(f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
        seconds = [rows[label]["s"] for rows in found if "s" in rows[label]]
        cells.append(f"{statistics.median(seconds):.1f}" if seconds else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out is not None:
        (arguments.out / "learnt_editor_cpu.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
