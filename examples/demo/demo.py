"""Makes a base language model and three finetuned ones, merges them by five methods through the
command line, and shows what each model can do.

    python examples/demo/demo.py --out demo_out

Everything is made here: no download, no data set. The recipes are in examples/demo/recipes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from evaluation import Score, evaluate
from report import draw_picture, print_table
from rich.console import Console
from tasks import TASKS, make_corpus
from training import Schedule, finetune, make_tokenizer, save, train_base

RECIPES = Path(__file__).resolve().parent / "recipes"
METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
MARK = ".cl_fast_demo"


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out.resolve()
    began = time.perf_counter()
    sys.stdout.reconfigure(line_buffering=True)
    # Plain prints for the lines, so that pipes and logs get them unwrapped.
    say = Console(soft_wrap=True, highlight=False).print
    empty_folder(out)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")

    corpus = make_corpus(arguments.seed)
    tokenizer = make_tokenizer(corpus)
    schedule = Schedule(arguments.base_steps, arguments.finetune_steps)

    def done(what: str, since: float) -> None:
        say(f"{time.perf_counter() - since:6.1f} s  {what}")

    start = time.perf_counter()
    base = train_base(corpus, tokenizer, schedule, arguments.seed)
    save(base, tokenizer, out / "models" / "base")
    size = sum(parameter.numel() for parameter in base.parameters())
    done(f"base language model, {size:,} parameters: {schedule.base_steps} steps", start)
    for task in TASKS.values():
        start = time.perf_counter()
        model = finetune(base, task, corpus, tokenizer, schedule, arguments.seed)
        save(model, tokenizer, out / "models" / task.name)
        done(f"finetuned on {task.name}: {schedule.finetune_steps} steps", start)

    for method in METHODS:
        start = time.perf_counter()
        merge(method, out)
        done(f"cl-fast merge {shlex.quote(f'{method}.yml')} merged/{method}", start)

    start = time.perf_counter()

    def scores(folder: str, names: tuple[str, ...]) -> dict[str, Score]:
        return {name: evaluate(out / folder / name, corpus, arguments.questions) for name in names}

    groups = {
        "base": scores("models", ("base",)),
        "finetuned": scores("models", tuple(TASKS)),
        "merged": scores("merged", METHODS),
    }
    done(f"evaluated {sum(map(len, groups.values()))} checkpoints with transformers", start)

    write_scores(groups, out / "scores.json")
    draw_picture(groups, out / "scores.png")
    print()
    print_table(groups, Console())
    say(f"\npicture  {out / 'scores.png'}\nrecipes  {RECIPES}\nmodels   {out / 'merged'}")
    say(f"total    {time.perf_counter() - began:.0f} s")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder to make anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base-steps", type=int, default=220)
    parser.add_argument("--finetune-steps", type=int, default=60)
    parser.add_argument("--questions", type=int, default=200, help="asked per task, at most 200")
    return parser.parse_args()


def empty_folder(out: Path) -> None:
    """Makes `out`, or empties it if an earlier demo made it; any other folder is left alone."""
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            sys.exit(f"{out} is not empty and was not made by this demo: choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def merge(method: str, out: Path) -> None:
    """Runs the command line in `out`; the recipes name the models relative to it."""
    command = [sys.executable, "-m", "cl_fast", "merge", str(RECIPES / f"{method}.yml")]
    command += [f"merged/{method}", "--out-shard-size", "256KB", "--quiet"]
    subprocess.run(command, cwd=out, check=True)


def write_scores(groups: dict[str, dict[str, Score]], path: Path) -> None:
    rows = {
        group: {model: asdict(score) for model, score in scores.items()}
        for group, scores in groups.items()
    }
    rows["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
