"""combine and combine_many: one pass over base and K finetuned tensors, against a copy and peers.

Bytes that the work must move: base and K tensors read once, one output written. The methods:

    linear           mean of the tensors, no base
    task_arithmetic  base + 0.4 sum (x_k - base)
    dare_linear      task_arithmetic of deltas that keep 10 %, divided by the keep rate
    dare_ties        the same, with an elected sign per element
    ties             trim to 20 %, elect a sign by mass, mean of those that agree

The peers of a method run the same formula on the same tensors: plain torch in float32, eager and
compiled, and the functions of PEFT and mergekit, which compute in bfloat16. Random masks of a peer
are its own, so those results are compared in the mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .harness import (
    GIB,
    Case,
    Machine,
    Mismatch,
    Provider,
    Target,
    Work,
    absent,
    copy_floor,
    equal,
    module_or_reason,
    ours,
)

__all__ = ["CASES", "inputs", "llama_shapes"]

BF16 = torch.bfloat16
CHUNK = 1 << 24
PEER_MODELS = 3  # peers run at this K
SEED = 7


@dataclass(frozen=True)
class Method:
    """A merge method in the words of this library, and its numbers."""

    policy: dict[str, Any]
    weight: float
    density: float = 1.0

    @property
    def base(self) -> bool:
        return bool(self.policy.get("difference", True))

    @property
    def drops(self) -> bool:
        return self.policy.get("sparsify") == "drop"

    @property
    def trims(self) -> bool:
        return self.policy.get("sparsify") == "trim"


METHODS = {
    "linear": Method({"difference": False, "reduce": "mean"}, 1.0),
    "task_arithmetic": Method({}, 0.4),
    "dare_linear": Method({"sparsify": "drop", "rescale": "keep_rate"}, 0.4, 0.1),
    "dare_ties": Method({"sparsify": "drop", "rescale": "keep_rate", "elect": "mass"}, 0.4, 0.1),
    "ties": Method({"sparsify": "trim", "elect": "mass", "reduce": "mean"}, 1.0, 0.2),
    "ties_global": Method(
        {
            "sparsify": "trim",
            "trim_scope": "model",
            "trim_ties": "all",
            "elect": "mass",
            "reduce": "mean",
        },
        1.0,
        0.2,
    ),
}


# ------------------------------------------------------------------------------------ inputs


def inputs(
    machine: Machine, shape: Sequence[int], models: int, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """A base like trained weights, and `models` finetuned versions: bfloat16, heavy-tailed deltas.

    Made in chunks, so that the float32 temporaries stay small.
    """
    generator = torch.Generator(device=machine.device).manual_seed(seed)
    n = 1
    for size in shape:
        n *= size
    base = torch.empty(n, dtype=BF16, device=machine.device)
    tensors = [torch.empty_like(base) for _ in range(models)]

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator, device=machine.device)

    for first in range(0, n, CHUNK):
        part = slice(first, min(n, first + CHUNK))
        count = part.stop - part.start
        base[part] = normal(count).mul_(0.02)
        for x in tensors:
            delta = normal(count).mul_(normal(count).mul_(0.7).exp_()).mul_(4e-4)
            x[part] = delta.add_(base[part].float())
    return base.view(*shape), [x.view(*shape) for x in tensors]


def llama_shapes(
    layers: int, hidden: int = 4096, intermediate: int = 11008, vocabulary: int = 32000
) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama-2 model by name; the defaults and 32 layers are the 7B model."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name in "qkvo":
            shapes[f"{at}self_attn.{name}_proj.weight"] = (hidden, hidden)
        for name in ("gate", "up"):
            shapes[f"{at}mlp.{name}_proj.weight"] = (intermediate, hidden)
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, intermediate)
        for name in ("input", "post_attention"):
            shapes[f"{at}{name}_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def keys(method: Method, tensor: str, models: int) -> list[int] | None:
    from cl_fast.ops import stream_key

    if not method.drops:
        return None
    return [stream_key(SEED, f"model{k}", tensor) for k in range(models)]


# ------------------------------------------------------------------------------------ peers


def torch_linear(base: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].float()
    for x in tensors[1:]:
        total = total + x.float()
    return (total / len(tensors)).to(base.dtype)


def torch_task_arithmetic(base: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    b = base.float()
    total = (tensors[0].float() - b) * 0.4
    for x in tensors[1:]:
        total = total + (x.float() - b) * 0.4
    return (b + total).to(base.dtype)


def torch_dare_linear(base: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    b = base.float()
    total = torch.zeros_like(b)
    for x in tensors:
        kept = torch.rand_like(b) < 0.1
        total = total + torch.where(kept, x.float() - b, 0.0) * (0.4 / 0.1)
    return (b + total).to(base.dtype)


def torch_dare_ties(base: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    b = base.float()
    values = [
        torch.where(torch.rand_like(b) < 0.1, x.float() - b, 0.0) * (0.4 / 0.1) for x in tensors
    ]
    plus = sum(values[1:], values[0]) >= 0
    total = torch.zeros_like(b)
    for v in values:
        total = total + torch.where((v > 0) == plus, v, 0.0)
    return (b + total).to(base.dtype)


def torch_ties(base: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    b = base.float()
    values = []
    for x in tensors:
        d = x.float() - b
        k = max(1, int(0.2 * d.numel()))
        cut = d.abs().reshape(-1).topk(k, sorted=False).values.min()
        values.append(torch.where(d.abs() >= cut, d, 0.0))
    plus = sum(values[1:], values[0]) >= 0
    total, count = torch.zeros_like(b), torch.zeros_like(b)
    for v in values:
        agree = torch.where(plus, v > 0, v < 0)
        total = total + torch.where(agree, v, 0.0)
        count = count + agree
    return (b + total / count.clamp(min=1.0)).to(base.dtype)


FORMULAS: dict[str, Callable[[Tensor, Sequence[Tensor]], Tensor]] = {
    "linear": torch_linear,
    "task_arithmetic": torch_task_arithmetic,
    "dare_linear": torch_dare_linear,
    "dare_ties": torch_dare_ties,
    "ties": torch_ties,
}


def peft_function(method: str) -> tuple[Callable[[Tensor, Sequence[Tensor]], Tensor] | None, str]:
    """PEFT's function of that name on deltas; None and "" where it has no such function."""
    if method not in ("task_arithmetic", "dare_linear", "ties"):
        return None, ""
    module, why = module_or_reason("peft.utils.merge_utils")
    if module is None:
        return None, why
    function = getattr(module, method)
    numbers = METHODS[method]
    more = {} if method == "task_arithmetic" else {"density": numbers.density}

    def run(base: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        weights = torch.full((len(tensors),), numbers.weight, dtype=base.dtype, device=base.device)
        return base + function([x - base for x in tensors], weights, **more)

    return run, ""


def mergekit_function(
    method: str,
) -> tuple[Callable[[Tensor, Sequence[Tensor]], Tensor] | None, str]:
    """mergekit's method of that name; None and why, where it is not there."""
    api, why = module_or_reason("mergekit.merge_methods.api")
    if api is None or not hasattr(api, "merge_tensors"):
        return None, why or "this mergekit has no merge_tensors (0.1.5 has)"
    numbers = METHODS[method]
    parameters: dict[str, Any] = {"weight": numbers.weight}
    if numbers.density < 1.0:
        parameters["density"] = numbers.density

    def run(base: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        if not numbers.base:
            out = api.merge_tensors(list(tensors), method, parameters=parameters)
        else:
            listed = [base, *tensors]
            out = api.merge_tensors(listed, method, parameters=parameters, base_index=0)
        assert isinstance(out, Tensor)
        return out

    return run, ""


def close_to(method: Method, base: Tensor, tensors: Sequence[Tensor], wide: bool) -> Any:
    """A check for peers, whose rounding and choice among equals are their own.

    Deterministic methods: element by element. With K models of deltas d_k, a peer that computes
    in float32 may differ by a spacing of bfloat16 in the output; one that computes in bfloat16 by
    2^-7 of sum |d_k| more (a rounding of 2^-9 in each difference, product and partial sum, and
    half again for the rest). Elements whose delta is so near to the threshold of a trim, or whose
    votes so near to a draw, that this rounding decides are left out and counted.

    Random methods: the coefficient of the merged delta along the expected one, which drops leave
    unchanged in the mean.
    """

    def statistical(out: Tensor, expected: Tensor) -> str:
        # The slope of what came out along the dense deltas: that of ours and theirs agree.
        along = torch.zeros(2, dtype=torch.float64, device=out.device)
        squares = 0.0
        for part, b, xs in parts(base, tensors):
            dense = sum((x.double() - b for x in xs), torch.zeros_like(b))
            along[0] += (dense * (out.reshape(-1)[part].double() - b)).sum()
            along[1] += (dense * (expected.reshape(-1)[part].double() - b)).sum()
            squares += float((dense * dense).sum())
        got, want = (along / squares).tolist()
        n = base.numel()
        # A drop to 10 % of these deltas (kurtosis 21) spreads the slope by 3 sqrt(21 / n) of it;
        # two draws differ by 20 / sqrt(n), and 60 / sqrt(n) is three standard deviations. The
        # hundredth is for factors that a peer rounds to bfloat16.
        limit = 60.0 / n**0.5 + 0.01
        if not abs(got - want) <= limit * abs(want):
            raise Mismatch(f"slope {got:.4g} along the deltas instead of {want:.4g}")
        return f"own random masks; slope along the deltas within {limit:.2g}"

    def elementwise(out: Tensor, expected: Tensor) -> str:
        left_out = wrong = 0
        worst = 0.0
        cuts = _cuts(base, tensors, method) if method.trims else []
        rounding = 0.0 if wide else 2.0**-7
        for part, b, xs in parts(base, tensors):
            deltas = [x.double() - b for x in xs] if method.base else [x.double() for x in xs]
            size = sum((d.abs() for d in deltas), torch.zeros_like(b)) * abs(method.weight)
            undecided = torch.zeros_like(b, dtype=torch.bool)
            kept = []
            for d, cut in zip(deltas, cuts, strict=False):
                undecided |= (d.abs() - cut).abs() <= max(rounding, 2.0**-20) * cut
                kept.append(torch.where(d.abs() >= cut, d, 0.0))
            if kept:
                mass = sum(kept[1:], kept[0]).abs()
                spread = sum((v.abs() for v in kept), torch.zeros_like(b))
                undecided |= (mass <= max(rounding, 2.0**-20) * spread) & (spread > 0)
            e = expected.reshape(-1)[part].double()
            spacing = 2.0**-7 * torch.maximum(e.abs(), b.abs())
            off = (out.reshape(-1)[part].double() - e).abs()
            bad = ~(off <= spacing + rounding * size) & ~undecided
            wrong += int(bad.sum())
            left_out += int(undecided.sum())
            worst = max(worst, float(torch.where(bad, off, 0.0).max()) if bad.numel() else 0.0)
        if wrong:
            raise Mismatch(f"{wrong} of {base.numel()} elements are off, by up to {worst:.3g}")
        share = 100.0 * left_out / max(1, base.numel())
        return f"element by element but for {share:.2g} % that rounding decides"

    return statistical if method.drops else elementwise


def parts(base: Tensor, tensors: Sequence[Tensor]) -> Any:
    flat, rest = base.reshape(-1), [x.reshape(-1) for x in tensors]
    for first in range(0, flat.numel(), CHUNK):
        part = slice(first, min(flat.numel(), first + CHUNK))
        yield part, flat[part].double(), [x[part] for x in rest]


def _cuts(base: Tensor, tensors: Sequence[Tensor], method: Method) -> list[float]:
    from cl_fast.ops import magnitude_threshold

    return [
        float(magnitude_threshold(x, base=base, density=method.density, backend="eager")[0])
        for x in tensors
    ]


# ------------------------------------------------------------------------------------ one tensor


def combine_case(name: str, models: int) -> Case:
    method = METHODS[name]
    peers = models == PEER_MODELS
    seconds = 12.0 + (25.0 if peers else 0.0)
    return Case(
        "combine",
        f"combine/{name}/K{models}",
        functools.partial(_combine_work, name, method, models, peers),
        seconds,
        180.0,
    )


def _combine_work(name: str, method: Method, models: int, peers: bool, machine: Machine) -> Work:
    from cl_fast.ops import Policy, combine, combine_reference

    n, note = _elements(machine, models)
    base, tensors = inputs(machine, (n,), models)
    policy = Policy(**method.policy)
    given: dict[str, Any] = {
        "weights": method.weight,
        "policy": policy,
        "density": method.density,
        "keys": keys(method, "weight", models),
    }
    the_base = base if method.base else None

    def run(**more: Any) -> Callable[[int], Tensor]:
        return lambda i: combine(the_base, tensors, out_dtype=BF16, **given, **more)

    def expected() -> Tensor:
        return combine_reference(the_base, tensors, out_dtype=BF16, **given)

    moved = 2 * n * (models + 1 + method.base)
    providers = [
        *ours(machine, combine, run, equal),
        copy_floor(machine, moved),
    ]
    text = f"combine {name}, K = {models}"
    targets = _pass_targets(text, method, 0.9)
    if method.drops or method.trims:
        # What the same tensors cost without a drop or a trim, in turn with it.
        one_pass: dict[str, Any] = {"weights": 0.4, "policy": Policy()}
        providers.append(
            Provider(
                "cl_fast one pass",
                "ours",
                lambda i: combine(base, tensors, **one_pass),
                lambda out, _: equal(out, combine_reference(base, tensors, **one_pass)),
                note="task_arithmetic on the same tensors",
            )
        )
        limit, word = (2.2, "times one pass") if method.trims else (1.1, "times task_arithmetic")
        if name != "dare_ties":
            targets.append(_ratio(f"{text}: {word}", "cl_fast one pass", limit, False))
    if peers:
        providers += _peers(machine, name, method, base, tensors)
        fold = 5.0 if method.trims else 3.0
        if method.drops or method.trims:
            targets += [
                _ratio(f"{name}: times faster than {peer.name}", peer.name, fold, True)
                for peer in providers
                if peer.role == "peer" and not peer.missing
            ]
    return Work(
        shape=f"{n}, K = {models}",
        dtype="bfloat16",
        bytes=moved,
        input_bytes=2 * n * (models + method.base),
        providers=providers,
        sets=1,
        note=note,
        expected=expected,
        output_elements=n,
        targets=targets,
    )


def _pass_targets(text: str, method: Method, share: float) -> list[Target]:
    """Share of the copy, where it is one pass, and memory beyond inputs and output."""

    def memory(rows: Any) -> float:
        row = rows["cl_fast"]
        return float(row["peak_extra_bytes"] - row["output_bytes"]) / float(row["input_bytes"])

    targets = [Target(f"{text}: extra memory of the inputs", "cl_fast", memory, 0.01, False)]
    if not method.trims:
        targets.append(
            Target(
                f"{text}: share of the copy",
                "cl_fast",
                lambda rows: rows["cl_fast"]["share_of_floor"],
                share,
            )
        )
    return targets


def _ratio(text: str, other: str, limit: float, faster: bool) -> Target:
    def value(rows: Any) -> float:
        mine, theirs = float(rows["cl_fast"]["ms_p50"]), float(rows[other]["ms_p50"])
        return theirs / mine if faster else mine / theirs

    return Target(text, "cl_fast", value, limit, faster)


def _elements(machine: Machine, models: int) -> tuple[int, str]:
    """Elements per tensor: 1 GiB of bfloat16, or what fits with the reference beside it."""
    n = int(machine.pick(GIB // 2, 5003))
    note = ""
    while n * (2 * (models + 2) + 4 * (models + 10)) + 2 * GIB > machine.free_bytes() and n > 4096:
        n //= 2
        note = f"memory is short: {2 * n / GIB:.3g} GiB per tensor instead of 1 GiB"
    return n, note


def _peers(
    machine: Machine, name: str, method: Method, base: Tensor, tensors: Sequence[Tensor]
) -> list[Provider]:
    formula = FORMULAS[name]
    # In the dry run the graph is traced, and run by torch itself.
    compiled = torch.compile(
        formula, fullgraph=True, dynamic=False, backend=machine.pick("inductor", "eager")
    )
    check = close_to(method, base, tensors, wide=True)
    found = [
        Provider("torch eager", "peer", lambda i: formula(base, tensors), check),
        Provider("torch.compile", "peer", lambda i: compiled(base, tensors), check),
    ]
    loose = close_to(method, base, tensors, wide=False)
    for who, find in (("PEFT", peft_function), ("mergekit", mergekit_function)):
        function, why = find(name)
        if function is not None:
            found.append(Provider(who, "peer", _always(function, base, tensors), loose))
        elif why:
            found.append(absent(who, why))
    return found


def _always(
    function: Callable[[Tensor, Sequence[Tensor]], Tensor], base: Tensor, tensors: Sequence[Tensor]
) -> Callable[[int], Tensor]:
    return lambda i: function(base, tensors)


# ------------------------------------------------------------------------------------ a model


def model_case(name: str) -> Case:
    return Case(
        "combine_many",
        f"combine_many/{name}/7B",
        functools.partial(_model_work, name, METHODS[name]),
        25.0,
        180.0,
    )


def _model_work(name: str, method: Method, machine: Machine) -> Work:
    from cl_fast.ops import Policy, combine_many, combine_reference, model_thresholds

    models = 3
    layers, note = 32, ""
    sizes = machine.pick({}, {"hidden": 16, "intermediate": 40, "vocabulary": 50})
    while (
        layers > 1
        and _parameters(llama_shapes(layers, **sizes)) * 2 * (models + 2) + 4 * GIB
        > machine.free_bytes()
    ):
        layers -= 1
        note = f"memory is short: {layers} layers instead of 32"
    shapes = llama_shapes(machine.pick(layers, 2), **sizes)
    names = list(shapes)
    bases, rows = [], []
    for number, shape in enumerate(shapes.values()):
        base, tensors = inputs(machine, shape, models, seed=number)
        bases.append(base)
        rows.append(tensors)
    policy = Policy(**method.policy)
    given: dict[str, Any] = {
        "weights": method.weight,
        "policy": policy,
        "density": method.density,
    }
    row_keys: Any = [keys(method, tensor, models) for tensor in names]
    the_bases = bases if method.base else None

    def run(**more: Any) -> Callable[[int], list[Tensor]]:
        return lambda i: combine_many(
            the_bases,
            rows,
            keys=row_keys if method.drops else None,
            out_dtype=BF16,
            **given,
            **more,
        )

    whole_model = policy.trim_scope == "model" and method.trims
    # The reference of a whole model would take minutes: some rows of each shape, and where a
    # threshold spans the model, a call with those rows only.
    seen: dict[tuple[int, ...], list[int]] = {}
    for number, shape in enumerate(shapes.values()):
        seen.setdefault(shape, []).append(number)
    sample = sorted({at for found in seen.values() for at in (found[0], found[-1])})

    def expected() -> dict[int, Tensor]:
        codes = None
        if whole_model:
            codes = model_thresholds(
                [bases[r] for r in sample],
                [rows[r] for r in sample],
                policy=policy,
                density=method.density,
            )
        return {
            r: combine_reference(
                bases[r] if method.base else None,
                rows[r],
                keys=row_keys[r],
                thresholds=codes,
                out_dtype=BF16,
                **given,
            )
            for r in sample
        }

    def check(more: dict[str, Any]) -> Callable[[Any, Any], str]:
        def compare(out: list[Tensor], expected: dict[int, Tensor]) -> str:
            if len(out) != len(shapes):
                raise Mismatch(f"{len(shapes)} tensors were expected, got {len(out)}")
            if not whole_model:
                for r, tensor in expected.items():
                    equal(out[r], tensor)
                return f"{len(expected)} of {len(out)} tensors bit for bit"
            part = combine_many(
                [bases[r] for r in sample],
                [rows[r] for r in sample],
                out_dtype=BF16,
                **given,
                **more,
            )
            equal(part, [expected[r] for r in sample])
            return f"a call of {len(sample)} of {len(shapes)} tensors bit for bit"

        return compare

    count = _parameters(shapes)
    moved = 2 * count * (models + 1 + method.base)
    providers = [
        Provider("cl_fast", "ours", run(), check({})),
        *(
            Provider(
                f"cl_fast {backend}", "ours", run(backend=backend), check({"backend": backend})
            )
            for backend in machine.backends
        ),
        copy_floor(machine, moved),
    ]
    if name in ("linear", "task_arithmetic"):
        formula = FORMULAS[name]
        providers.append(
            Provider(
                "torch eager",
                "peer",
                lambda i: [formula(b, xs) for b, xs in zip(bases, rows, strict=True)],
                lambda out, e: _sampled(method, bases, rows, out, e),
            )
        )
    return Work(
        shape=f"{len(shapes)} tensors, {count / 1e9:.2f} G elements, K = {models}",
        dtype="bfloat16",
        bytes=moved,
        input_bytes=2 * count * (models + method.base),
        providers=providers,
        note=note,
        expected=expected,
        output_elements=max(map(_product, shapes.values())),
        targets=_pass_targets(f"7B shapes, {name}", method, 0.8),
    )


def _sampled(
    method: Method,
    bases: Sequence[Tensor],
    rows: Sequence[Sequence[Tensor]],
    out: Sequence[Tensor],
    expected: dict[int, Tensor],
) -> str:
    for r, tensor in expected.items():
        close_to(method, bases[r], rows[r], wide=True)(out[r], tensor)
    return f"{len(expected)} of {len(out)} tensors element by element"


def _product(shape: Sequence[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def _parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(_product, shapes.values()))


CASES = [
    *(
        combine_case(name, models)
        for name in ("linear", "task_arithmetic", "dare_linear", "ties")
        for models in (3, 1, 8)
    ),
    combine_case("dare_ties", 3),
    *(
        model_case(name)
        for name in ("linear", "task_arithmetic", "dare_linear", "ties", "ties_global")
    ),
]
