"""Editing a model of the shape of Llama-3-8B: statistics, facts, a patch on and off.

    stats        KeyStats of 5 layers over 143,360 tokens: one pass, ended after the deepest
    priors       their Cholesky factors in float64: once, for as many edits as one likes
    fit          MEMIT of 100 and of 1,000 facts with warm priors, 5 layers, 25 steps
    apply, undo  a patch of 100 facts: from the untouched weights with one rounding, and back

Weights are random, bfloat16, made on the card; words are made up. Hardly a loss falls below its
limit then, so that every fact takes all of its steps. One call takes seconds: it is verified and
timed at once, and its peak is that of the same call. Of 1,000 facts as many are optimised as
start within `CAP_S`; keys and solves are for all of them, the rest with the values of others, and
seconds per fact count the optimised ones alone. The model, its statistics and the patch are kept
from case to case.
"""

from __future__ import annotations

import functools
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .harness import (
    Case,
    Machine,
    Mismatch,
    Provider,
    Target,
    Work,
    absent,
    copy_floor,
    matmul_floor,
    module_or_reason,
)

__all__ = ["CASES"]

CAP_S = 75.0
CHUNK = 128
FULL = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rope_theta": 500_000.0,
}  # fmt: skip
TINY = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
}  # fmt: skip
LENGTH = 512


class _Scene:
    """What the cases share."""

    def __init__(self, machine: Machine) -> None:
        from editing.world import facts_of, tokenizer_of, words_of
        from transformers import LlamaConfig, LlamaForCausalLM

        self.machine = machine
        sizes = machine.pick(FULL, TINY)
        vocabulary = sizes["vocab_size"]
        before = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(machine.device):
                self.model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
        finally:
            torch.set_default_dtype(before)
        self.model.eval().requires_grad_(False)
        self.tokenizer = tokenizer_of(vocabulary)
        self.layers: list[int] = machine.pick([4, 5, 6, 7, 8], [1, 2])
        self.facts = facts_of(machine.pick(1000, 12), vocabulary)
        draw = random.Random(1)
        self.contexts = [words_of(draw, vocabulary, 10) + " . " for _ in range(5)]
        length = machine.pick(LENGTH, 64)
        self.texts = [words_of(draw, vocabulary, length) for _ in range(machine.pick(280, 4))]
        self.tokens = length * len(self.texts)
        self.found: dict[str, float] = {}
        self._stats: Any = None
        self._patch: Any = None

    def collect(self) -> Any:
        from cl_fast.editing import KeyStats

        self._stats = KeyStats.collect(
            self.model, self.tokenizer, texts=self.texts, layers=self.layers, tokens=self.tokens
        )
        return self._stats

    @property
    def stats(self) -> Any:
        return self.collect() if self._stats is None else self._stats

    def priors(self) -> list[Any]:
        place = self.machine.device
        return [self.stats.prior(layer, device=place) for layer in self.layers]

    def editor(self, steps: int | None = None) -> Any:
        from cl_fast.editing import Memit

        return Memit(
            self.model, self.tokenizer, self.stats, layers=self.layers, contexts=self.contexts,
            batch=CHUNK, steps=steps, prior_weight=15_000.0,
        )  # fmt: skip

    @property
    def patch(self) -> Any:
        """Of 100 facts; of a case before, or with values of few steps."""
        if self._patch is None:
            self._patch = self.editor(3).fit(self.facts[: self.machine.pick(100, 6)])
        return self._patch

    def weights(self) -> list[Tensor]:
        return [self.model.model.layers[i].mlp.down_proj.weight for i in self.layers]

    def bytes_of(self, blocks: int) -> int:
        some = self.model.model.layers[:blocks]
        return sum(p.numel() * p.element_size() for block in some for p in block.parameters())


_SCENES: dict[torch.device, _Scene] = {}


def _scene(machine: Machine) -> _Scene:
    if machine.device not in _SCENES:
        _SCENES[machine.device] = _Scene(machine)
    return _SCENES[machine.device]


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few tokens, in a tiny run
        yield


def _needs_transformers(work: Callable[..., Work]) -> Callable[..., Work]:
    @functools.wraps(work)
    def made(*args: Any) -> Work:
        _, why = module_or_reason("transformers")
        if why:
            floor = copy_floor(args[-1], 1 << 20)
            return Work("", "bfloat16", 1, 1, [absent("cl_fast", why), floor])
        with _quiet():
            return work(*args)

    return made


def _long(name: str, run: Callable[[], Any], check: Callable[[Any, Any], str]) -> Provider:
    def call(_: int) -> Any:
        with _quiet():
            return run()

    return Provider(name, "ours", call, check, once=True)


# ------------------------------------------------------------------------------------ statistics


@_needs_transformers
def _stats_work(machine: Machine) -> Work:
    scene = _scene(machine)

    def direct() -> tuple[Tensor, list[Tensor]]:
        """(x, the mean of (k x)^2 of each layer), by hooks on the model's own forward."""
        f = scene.weights()[0].size(1)
        generator = torch.Generator(device=machine.device).manual_seed(0)
        x = torch.randn(f, generator=generator, device=machine.device, dtype=torch.float64)
        sums = [torch.zeros((), dtype=torch.float64, device=machine.device) for _ in scene.layers]

        def add(i: int) -> Any:
            def hook(_: Any, args: Any) -> None:
                keys = args[0].reshape(-1, f)
                for part in keys.split(4096):
                    sums[i] += (part.double() @ x).square().sum()

            return hook

        blocks = scene.model.model.layers
        hooks = [
            blocks[layer].mlp.down_proj.register_forward_pre_hook(add(i))
            for i, layer in enumerate(scene.layers)
        ]
        try:
            with torch.no_grad():
                for first in range(0, len(scene.texts), 16):
                    some = scene.tokenizer(scene.texts[first : first + 16], return_tensors="pt")
                    ids = some["input_ids"].to(machine.device)
                    scene.model.model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return x, [s / scene.tokens for s in sums]

    def check(stats: Any, expected: tuple[Tensor, list[Tensor]]) -> str:
        x, means = expected
        if stats.tokens != scene.tokens:
            raise Mismatch(f"{stats.tokens} tokens were seen, of {scene.tokens}")
        for layer, mean in zip(scene.layers, means, strict=True):
            C = stats.moment(layer, machine.device)
            error = abs(float(x @ C @ x) / float(mean) - 1)
            if not error < 1e-2:  # keys in bfloat16, of batches that are cut otherwise
                raise Mismatch(f"x^T C x of block {layer} is off by {error:.3g} of itself")
        return "x^T C x against a pass of its own"

    blocks = scene.layers[-1] + 1
    weights = scene.bytes_of(blocks)
    f = scene.weights()[0].size(1)
    flops = scene.tokens * weights + len(scene.layers) * scene.tokens * f * f
    return Work(
        shape=f"{scene.tokens} tokens, {len(scene.layers)} layers, f = {f}",
        dtype="bfloat16",
        bytes=weights,
        flops=flops,
        input_bytes=weights,
        providers=[_long("cl_fast", scene.collect, check), matmul_floor(machine)],
        expected=direct,
        targets=[
            Target(
                "KeyStats of 5 layers, 143,360 tokens: seconds", "cl_fast",
                lambda r: r["cl_fast"]["ms_p50"] / 1e3, 120.0, at_least=False,
            )
        ],
    )  # fmt: skip


@_needs_transformers
def _priors_work(machine: Machine) -> Work:
    scene = _scene(machine)
    scene.stats  # noqa: B018, made before the clock runs

    def run() -> list[Any]:
        scene.stats.forget()
        return scene.priors()

    def check(priors: list[Any], _: Any) -> str:
        for layer, prior in zip(scene.layers, priors, strict=True):
            C = scene.stats.moment(layer, machine.device)
            x = torch.sin(torch.arange(1.0, len(C) + 1, device=machine.device).double())[:, None]
            back = prior.inverse(prior.weight * (C @ x)) if not prior.jitter else None
            if back is not None and not float((back - x).norm() / x.norm()) < 1e-4:
                raise Mismatch(f"C0^-1 C0 x of block {layer} is not x")
        return "C0^-1 C0 x is x, float64"

    f = scene.weights()[0].size(1)
    held = len(scene.layers) * 8 * f * f
    return Work(
        shape=f"{len(scene.layers)} layers, f = {f}",
        dtype="float64",
        bytes=2 * held,
        flops=len(scene.layers) * f**3 // 3,
        input_bytes=held,
        providers=[_long("cl_fast", run, check), copy_floor(machine, 2 * held)],
    )


# ------------------------------------------------------------------------------------ facts


@_needs_transformers
def _fit_work(count: int, machine: Machine) -> Work:
    from cl_fast.editing import Values
    from cl_fast.editing.values import group_facts

    scene = _scene(machine)
    scene.priors()
    facts = scene.facts[: machine.pick(count, 6 if count == 100 else 12)]
    editor = scene.editor(machine.pick(None, 3))
    before = [weight.detach().clone() for weight in scene.weights()]
    provider = _long("cl_fast", lambda: run(), lambda patch, _: check(patch))

    def run() -> Any:
        start, parts, done = time.perf_counter(), [], 0
        while done < len(facts) and time.perf_counter() - start < CAP_S:
            parts += editor.optimise(facts[done : done + CHUNK])
            done = min(len(facts), done + CHUNK)
        machine.synchronize()
        values_s = time.perf_counter() - start
        groups = [group for part in parts for group in part.groups]
        rest = facts[done:]
        again = [i % len(groups) for i in range(len(rest))]
        delta, begun = (torch.cat([getattr(p, n) for p in parts]) for n in ("delta", "start"))
        report = [one for part in parts for one in part.report]
        if rest:
            groups = groups + group_facts(rest, scene.tokenizer)
            delta, begun = torch.cat([delta, delta[again]]), torch.cat([begun, begun[again]])
            report = report + [report[i] for i in again]
        values = Values(groups, delta, begun, report, parts[0].layer)
        patch = editor.fit(facts, values=[values])
        machine.synchronize()
        solve_s = time.perf_counter() - start - values_s
        each = values_s / done, solve_s / len(facts)
        scene.found[f"fit {count}"] = sum(each)
        provider.note = (
            f"{done} of {len(facts)} facts optimised; seconds per fact {sum(each):.4g}: values "
            f"{each[0]:.4g}, keys and solves {each[1]:.4g}"
        )
        if count == 100:
            scene._patch = patch
        return patch

    def check(patch: Any) -> str:
        """The weights are untouched; the change solves its equations, at the last layer's size."""
        for weight, was in zip(scene.weights(), before, strict=True):
            if not torch.equal(weight, was):
                raise Mismatch("fit has changed the model's weights")
        layer = patch.layers[-1]
        U, V, K, T = (x.to(machine.device) for x in (layer.U, layer.V, layer.keys, layer.targets))
        ridge = patch.ridge.to(machine.device)
        # U (K^T V + diag(ridge)) = T: the normal equations in their dual form.
        error = float((U @ (K.T @ V) + U * ridge - T).norm() / T.norm())
        if not error < 1e-8:
            raise Mismatch(f"the normal equations are off by {error:.3g}")
        return "weights untouched; normal equations, float64"

    spent = scene.bytes_of(len(scene.model.model.layers))
    return Work(
        shape=f"{len(facts)} facts, {len(scene.layers)} layers, "
        f"{editor.values_options.steps} steps",
        dtype="bfloat16",
        bytes=spent,
        input_bytes=spent,
        providers=[provider, matmul_floor(machine)],
        targets=[
            Target(
                f"MEMIT of {count} facts: seconds per fact", "cl_fast",
                lambda r: scene.found[f"fit {count}"], 0.15 if count == 100 else 0.12,
                at_least=False,
            )
        ],
    )  # fmt: skip


@_needs_transformers
def _patch_work(machine: Machine) -> Work:
    scene = _scene(machine)
    patch = scene.patch
    before = [weight.detach().clone() for weight in scene.weights()]

    def applied(_: Any, __: Any) -> str:
        for weight, was, layer in zip(scene.weights(), before, patch.layers, strict=True):
            rows = slice(0, None, 61)
            U, V = layer.U[rows].to(machine.device), layer.V.to(machine.device)
            exact = was[rows].double() + U @ V.T
            terms = was[rows].double().abs() + U.abs() @ V.abs().T
            limit = 2.0**-8 * exact.abs() + (U.size(1) + 2) * 2.0**-22 * terms
            if not bool(((weight[rows].double() - exact).abs() <= limit).all()):
                raise Mismatch(f"{layer.name} is not W0 + U V^T, rounded once")
        return "float64, within one rounding"

    def undone(_: Any, __: Any) -> str:
        for weight, was in zip(scene.weights(), before, strict=True):
            if not torch.equal(weight, was):
                raise Mismatch("a weight is not what it was before the patch")
        return "bit for bit"

    size = sum(weight.numel() * weight.element_size() for weight in before)
    return Work(
        shape=f"{len(patch.layers)} matrices of {tuple(before[0].shape)}, rank {patch.rank}",
        dtype="bfloat16",
        bytes=2 * size,
        input_bytes=size,
        providers=[
            _long("cl_fast", lambda: patch.apply(scene.model), applied),
            _long("cl_fast undo", patch.undo, undone),
            copy_floor(machine, 2 * size),
        ],
        note="apply compares hashes of the weights with those of the patch first, on the host",
    )


CASES = [
    Case("editing", "editing/stats", _stats_work, 40.0, 240.0),
    Case("editing", "editing/priors", _priors_work, 15.0, 240.0),
    Case("editing", "editing/fit 100", functools.partial(_fit_work, 100), 30.0, 240.0),
    Case("editing", "editing/patch", _patch_work, 15.0, 180.0),
    Case("editing", "editing/fit 1000", functools.partial(_fit_work, 1000), 120.0, 300.0),
]
