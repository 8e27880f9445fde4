"""A plan in words, for `--dry-run` and for those who read logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_fast.checkpoints.sidecar import TORCH_NAMES
from cl_fast.merging.inputs import Derived
from cl_fast.merging.rules import Blend, Rule
from cl_fast.merging.sources import made

if TYPE_CHECKING:
    from cl_fast.merging.plan import Plan

__all__ = ["bytes_text", "describe"]


def describe(plan: Plan, bandwidth: float | None = None) -> list[str]:
    """The plan as plain text lines; ``bandwidth`` in bytes per second adds the predicted time."""
    numel = sum(tensor.numel for tensor in plan.tensors)
    copied = sum(tensor.kind == "copy" and not made(tensor) for tensor in plan.tensors)
    lines = [f"method   {plan.recipe.merge_method}: {_policy_words(plan)}"]
    roles = ["base"] * plan.bases + list(plan.models)
    for k, (role, checkpoint) in enumerate(zip(roles, plan.inputs, strict=True)):
        label = "base   " if k < plan.bases else "model  "
        line = f"{label}  {checkpoint.reference}: "
        if isinstance(checkpoint, Derived):
            line += f"{checkpoint.words}, {bytes_text(checkpoint.nbytes)}"
        else:
            line += f"{bytes_text(checkpoint.nbytes)} "
            count = len(checkpoint.files)
            line += f"in {_counted(count, 'file')}" if count else "that is made first"
        if k >= plan.bases:
            line += f", {_term_words(plan, k)}"
            drawn = not isinstance(checkpoint, Derived) or checkpoint.role != "delta"
            if plan.seed is not None and drawn:
                line += f", random stream {role!r}"
        lines.append(line)
    if plan.vocabulary is not None and plan.vocabulary.tokens is not None:
        lines.append(f"tokens   {plan.vocabulary.words}")
    lines += _slice_lines(plan)
    dtypes = sorted({TORCH_NAMES.get(t.dtype, t.dtype) for t in plan.tensors})
    built = "" if plan.url is None else f", built in {plan.output.parent}"
    lines.append(f"output   {plan.url or plan.output}{built}")
    tensors = (
        f"tensors  {len(plan.tensors)} with {_count_text(numel)} elements ({', '.join(dtypes)})"
    )
    lines.append(tensors + (f"; {copied} of them copied unchanged" if copied else ""))
    weights = sum(shard.size for shard in plan.shards)
    lines.append(
        f"files    {_counted(len(plan.shards), 'shard')}, {bytes_text(weights)}, and "
        + (", ".join(file.name for file in plan.sidecars) or "nothing else")
    )
    times = {1: "once", 2: "up to twice"}.get(plan.passes, f"up to {plan.passes} times")
    lines.append(f"read     {bytes_text(plan.bytes_read)} (each input {times})")
    lines.append(f"written  {bytes_text(plan.bytes_written)}")
    lines.append(f"memory   about {bytes_text(plan.memory)}")
    if bandwidth is not None and bandwidth > 0:
        seconds = (plan.bytes_read + plan.bytes_written) / bandwidth
        lines.append(
            f"time     about {_time_text(seconds)} at {bytes_text(bandwidth)}/s read and written"
        )
    if plan.seed is not None:
        lines.append(f"seed     {plan.seed}")
    lines += [f"note     {note}" for note in plan.notes]
    return lines


def _slice_lines(plan: Plan) -> list[str]:
    """Which layers of whom become which of the output."""
    lines, start = [], dict[str | None, int]()
    for part in plan.recipe.parts:
        listed = [*(() if part.base is None else (part.base,)), *part.entries]
        layers = listed[0].layers
        if layers is None:
            continue
        first = start.get(part.module, 0)
        end = start[part.module] = first + layers[1] - layers[0]
        words = ", ".join(
            f"{entry.layers[0]} to {entry.layers[1] - 1} of {entry.model}"
            for entry in listed
            if entry.layers is not None
        )
        module = "" if part.module is None else f"{part.module} "
        lines.append(f"layers   {module}{first} to {end - 1}: {words}")
    return lines


def _rule_words(rules: list[Rule]) -> str:
    first = rules[0]
    words = ["weights from inner products in float64" if isinstance(first, Blend) else "in torch"]
    for place, (name, value) in enumerate(first.settings):
        if isinstance(value, bool):
            words.append(f"{name} {str(value).lower()}")
        elif isinstance(value, float):
            words.append(f"{name} {_range_text({float(r.settings[place][1]) for r in rules})}")
    return ", ".join(words)


def _policy_words(plan: Plan) -> str:
    policy = plan.tensors[0].policy
    if plan.recipe.method.one_as_it_is:
        return "the tensors of one model, as they are or scaled"
    rules = [tensor.rule for tensor in plan.tensors if tensor.rule is not None]
    if rules:
        return ("deltas, " if policy.difference else "the models themselves, ") + _rule_words(rules)
    steps = ["deltas" if policy.difference else "the models themselves"]
    if policy.sparsify == "trim":
        scope = "over the whole model" if policy.trim_scope == "model" else "per tensor"
        steps.append(f"trimmed {scope} (count {policy.trim_count}, ties {policy.trim_ties})")
    if policy.sparsify == "drop":
        steps.append("dropped at random")
    if policy.sparsify == "band":
        steps.append(f"outliers and small entries dropped per tensor (count {policy.trim_count})")
    if policy.sparsify == "magprune":
        steps.append("dropped at random, by the rank in the row")
    if policy.rescale != "none":
        steps.append(f"rescaled by {policy.rescale}")
    if policy.elect != "none":
        steps.append(f"sign elected by {policy.elect} of the {policy.elect_on} deltas")
    reduce = {"sum": "summed", "max": "largest taken", "mean": f"averaged over {policy.divisor}"}
    steps.append(reduce[policy.reduce])
    lams = {tensor.lam for tensor in plan.tensors if tensor.kind == "combine"}
    if lams - {1.0}:
        steps.append(f"lambda {_range_text(lams)}")
    return ", ".join(steps)


def _term_words(plan: Plan, k: int) -> str:
    name, factor = plan.models[k - plan.bases], plan.recipe.method.factor
    combined = [
        term
        for tensor in plan.tensors
        if tensor.kind == "combine"
        for term in tensor.terms
        if term.model == name
    ]
    if not combined:
        if any(made(tensor) for tensor in plan.tensors):
            return "applied to the base with one rounding"
        return "copied unchanged"
    if not plan.recipe.method.weighted:
        return f"one of {len(plan.models)}"
    words = f"{factor} {_range_text({term.weight for term in combined})}"
    if any(tensor.policy.sparsify != "none" for tensor in plan.tensors):
        words += f", density {_range_text({term.density for term in combined})}"
    if any(tensor.policy.sparsify == "band" for tensor in plan.tensors):
        words += f", gamma {_range_text({term.gamma for term in combined})}"
    if any(tensor.policy.sparsify == "magprune" for tensor in plan.tensors):
        words += f", epsilon {_range_text({term.epsilon for term in combined})}"
    return words


def _range_text(values: set[float]) -> str:
    if not values:
        return "unused"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")


def _count_text(count: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:g}"


def bytes_text(count: float) -> str:
    """``1.23 GB``, in powers of ten."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def _time_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
