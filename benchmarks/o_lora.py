"""O-LoRA on the CPU: what a step of it costs, with one past task and with fifteen.

    python benchmarks/o_lora.py            # both tables
    python benchmarks/o_lora.py --quick    # small sizes

Penalty: the gradient of the L1 penalty for the 144 adapted layers of a T5-large (q and v, rank 8,
1024 columns), by providers that run in turns in one process, on one thread; its processor time.

    name matching   nested loops over named_parameters() that look for the past of each layer by its
                    name, with autograd; then the loop over the new factors for their norm, as in
                    scripts that are modelled on the authors'. Once per micro-batch.
    autograd loop   one plain loop over the layers, with autograd
    op              cl_fast.ops.orthogonal_penalty, with autograd
    keep            Orthogonal("l1").on_gradients, once per step of the optimizer
    projection      Orthogonal("project").on_update, once per step: it is exact, and no gradient

The model has the modules, and so the names, of a T5-large in transformers with PEFT; its base
weights have one row, since only the adapters matter here. Gradients are compared before they are
timed.

Steps: real training steps of a small Llama (forward, backward, AdamW, and the keep) at its first
task and with past tasks folded, in turns, on one thread; its processor time. The two models are of
equal size; what the later one has more are the 8 x 14 rows of its past.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from cl_fast.models.adapters import lora_layers
from cl_fast.ops import orthogonal_penalty
from cl_fast.training.keeping import Task
from cl_fast.training.orthogonal import Orthogonal

RANK, COLUMNS, WEIGHT = 8, 1024, 0.5


def t5(layers: int, columns: int) -> Any:
    """The modules of T5-large; heads and feed-forward layers have the width 1."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=8, d_model=columns, num_layers=layers, num_heads=1, d_kv=1, d_ff=1)
    model = T5ForConditionalGeneration(config)
    lora = LoraConfig(r=RANK, lora_alpha=32, target_modules=["q", "v"])
    return get_peft_model(model, lora)


def with_past(model: Any, keep: Orthogonal, tasks: int) -> None:
    """Finished tasks, whose factors are random; then one more begins."""
    for i in range(tasks):
        keep.before_task(model, Task(f"task {i}"))
        for layer in lora_layers(model, "default"):
            layer.down.data.normal_(generator=torch.Generator().manual_seed(i))
            layer.up.data.normal_().mul_(1e-3)
        keep.after_task(model, Task(f"task {i}"))
    keep.before_task(model, Task("now"))


def name_matching(model: Any) -> Tensor:
    loss = torch.zeros(())
    for past_name, past in model.named_parameters():
        if "lora_A.past" not in past_name:
            continue
        for name, new in model.named_parameters():
            if "lora_A.default" in name and name.split("lora_A")[0] == past_name.split("lora_A")[0]:
                loss = loss + (past @ new.t()).abs().sum()
                break
    norms = torch.zeros(())
    for name, new in model.named_parameters():
        if ".default." in name and "lora_" in name:
            norms = norms + new.norm()
    return WEIGHT * loss + 0.0 * norms


def in_turns(
    ways: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float], warm: int = 2
) -> dict[str, list[float]]:
    """Times of each in ms, one of each in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + warm):
        for name, run in ways.items():
            start = clock()
            run()
            if repeat >= warm:
                times[name].append(1e3 * (clock() - start))
    return times


def spread(times: list[float]) -> tuple[float, float, float]:
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], statistics.median(times), cuts[7]


def penalty_rows(tasks: int, layers: int, columns: int, repeats: int) -> list[dict[str, Any]]:
    model, keep = t5(layers, columns), Orthogonal("l1", weight=WEIGHT)
    with_past(model, keep, tasks)
    listed = lora_layers(model, "default")
    new: list[Tensor] = [layer.down for layer in listed]
    past = [keep.past_rows(model)[layer.name] for layer in listed]
    for x in new:
        x.grad = torch.zeros_like(x)

    hard, other = t5(layers, columns), Orthogonal()
    with_past(hard, other, tasks)

    # The reference finds the past as one more adapter, stacked.
    config = LoraConfig(r=RANK * tasks, target_modules=["q", "v"])
    model.add_adapter("past", config)
    for layer, rows in zip(lora_layers(model, "past"), past, strict=True):
        layer.down.data = rows
        layer.down.requires_grad_(False)

    def loop() -> Tensor:
        loss = torch.zeros(())
        for a, p in zip(new, past, strict=True):
            loss = loss + (a @ p.t()).abs().sum()
        return WEIGHT * loss

    ways: dict[str, Callable[[], Any]] = {
        "name matching": lambda: torch.autograd.grad(name_matching(model), new),
        "autograd loop": lambda: torch.autograd.grad(loop(), new),
        "op": lambda: torch.autograd.grad(WEIGHT * orthogonal_penalty(new, past), new),
        "keep": lambda: keep.on_gradients(model),
        "projection": lambda: other.on_update(hard),
    }
    ways["keep"]()
    mine = [x.grad.clone() for x in new if x.grad is not None]
    for name in ("name matching", "autograd loop", "op"):
        for x, y in zip(ways[name](), mine, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-3)
    assert other.measures()["orthogonal/overlap"] < 1e-6

    times = in_turns(ways, repeats, time.process_time)
    base = statistics.median(times["name matching"])
    rows = []
    for name, found in times.items():
        low, middle, high = spread(found)
        rows.append({
            "modules": len(new), "past tasks": tasks, "provider": name, "p20 ms": round(low, 2),
            "p50 ms": round(middle, 2), "p80 ms": round(high, 2),
            "name matching /": round(base / middle, 1),
        })  # fmt: skip
    return rows


def small_llama(width: int, layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    return get_peft_model(LlamaForCausalLM(config), lora)


def step_rows(
    form: Any, past: int, width: int, layers: int, tokens: int, repeats: int
) -> list[dict[str, Any]]:
    ids = torch.randint(0, 256, (2, tokens // 2), generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[[], None]] = {}
    for label, tasks in (("task 1", 0), (f"task {past + 1}", past)):
        model, keep = small_llama(width, layers), Orthogonal(form)
        with_past(model, keep, tasks)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)

        def step(model: Any = model, keep: Any = keep, optimizer: Any = optimizer) -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            keep.on_gradients(model)
            optimizer.step()
            keep.on_update(model)
            optimizer.zero_grad()

        ways[label] = step
    times = in_turns(ways, repeats, time.process_time)
    first = statistics.median(times["task 1"])
    # Steps come in pairs, so that what the machine does meanwhile meets both.
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    rows = []
    for name, found in times.items():
        low, middle, high = spread(found)
        rows.append({
            "form": form, "step at": name, "width": width, "layers": layers, "tokens": tokens,
            "p20 ms": round(low, 1), "p50 ms": round(middle, 1), "p80 ms": round(high, 1),
            "/ task 1": round(middle / first, 3),
            "median of pairs": round(statistics.median(ratios), 3) if name != "task 1" else 1.0,
        })  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"| {' | '.join(rows[0])} |")
    print(f"|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(str(x) for x in row.values())} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--json", help="write the rows here too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread\n")
    if given.quick:
        penalty = [r for t in (1, 3) for r in penalty_rows(t, 2, 64, 3)]
    else:
        penalty = [r for t in (1, 15) for r in penalty_rows(t, 24, COLUMNS, 11)]
    show(penalty)
    steps = []
    for form in ("project", "squared"):
        sizes = (form, 2, 64, 2, 32, 3) if given.quick else (form, 14, 512, 4, 512, 31)
        steps += step_rows(*sizes)
    show(steps)
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump({"penalty": penalty, "steps": steps}, file, indent=1)


if __name__ == "__main__":
    main()
