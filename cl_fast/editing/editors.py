"""Editors that write facts into weights: MEMIT, ROME, EMMET, AlphaEdit, and MEMIT at the edges.

All are one ridge problem per edited matrix W [d, f] (cl_fast.editing.solver),

    min_D  sum_i |D k_i - t_i|^2 / ridge_i  +  tr(D C0 D^T)          W becomes W + D

and differ in layers, in the prior C0, in the ridge and in where the values come from:

                layers     C0                         ridge   value of a fact
    Memit       several    lambda C                   1       stream after the last of them
    Rome        one        C, or I                    0       output of its MLP
    Emmet       one        lambda C                   0.1     stream after it
    AlphaEdit   several    onto the null space of C   1       stream after the last of them
    spread="ends" (BLUE)   the first and the last, each with values of its own

C = E[k k^T] is what the model's keys look like (`KeyStats`). What is left to reach is spread over
the layers that are still to come: t = (z - h) / (layers left), h measured after the edits below.

With history (the default) the facts of the patch that is given as `after` stay in the problem, so
that editing batch after batch equals editing all facts at once, per layer. Without it, each batch
forgets those before it, as MEMIT's own code does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from cl_fast.editing.applying import patch_on, weight_hash, write_factors
from cl_fast.editing.contexts import STARTS, own_contexts
from cl_fast.editing.facts import LOOKUPS, Fact, Lookup, check_facts, unknown_ids
from cl_fast.editing.keys import Averaging, KeyStream
from cl_fast.editing.memory import refuse_attached
from cl_fast.editing.patch import LayerPatch, Patch
from cl_fast.editing.presets import Method, preset_of
from cl_fast.editing.solver import Prior, ScaledIdentity, solve
from cl_fast.editing.values import Group, ValueOptions, Values, group_facts, optimise_values
from cl_fast.models.blocks import Decoder, Site, decoder_of
from cl_fast.models.heads import Evaluating
from cl_fast.options import at_least, integer, not_negative, one_of, positive

if TYPE_CHECKING:
    from cl_fast.editing.stats import KeyStats

__all__ = ["AlphaEdit", "Emmet", "Memit", "Rome", "WeightEditor"]

Spread = Literal["even", "sqrt", "ends"]
PriorKind = Literal["covariance", "nullspace", "identity"]
Progress = Callable[[str, int, int], None]
"""Called with what is being done ("values", "layers"), how much is done, and of how much."""


class WeightEditor:
    """What Memit, Rome, Emmet and AlphaEdit share. Use one of these.

    Args:
        model: a causal language model of transformers, on one device, not quantised.
        tokenizer: its fast tokenizer.
        stats: `KeyStats` of this model; None only where the prior is the identity.
        layers: blocks to edit, or "auto": those of the preset of the model's family.
        history: facts of `after` stay in the problem.
        ridge: what it costs to miss a value; a fact's is ridge / weight. 0: none is missed.
        prior: "covariance", "nullspace" or "identity".
        prior_weight: lambda of the covariance; "auto": the preset's.
        threshold, energy, l2: of the null space, see `NullSpace`.
        spread: how what is left is spread over the layers that remain: "even" (divided by their
            number), "sqrt" (by its root, PMET), or "ends": only the first and last of `layers` are
            edited, each with values of its own (BLUE).
        contexts: texts before the prompts; "auto": five that the model writes (`own_contexts`);
            () for none.
        lookup: which token is looked up.
        averaging: of keys over contexts, "kinds" (MEMIT) or "all" (ROME).
        steps, lr, weight_decay, clamp, kl_factor, stop_loss, kl_prompt, where, suffix: of the
            values, see `ValueOptions`; None: the preset's.
        batch: facts whose values are optimised at a time.
        low_memory: prompts wait for their layers in main memory, and the factors of `stats` are let
            go layer by layer, so that one at a time is on the device: 8 f^2 bytes instead of that
            for each layer, computed again in the next fit.
        seed: of the contexts.

    Raises:
        TypeError, ValueError: an option, a layer or the model is not what it must be.
    """

    method: Method = "memit"
    defaults: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        stats: KeyStats | None = None,
        *,
        layers: Sequence[int] | Literal["auto"] = "auto",
        history: bool = True,
        ridge: float | None = None,
        prior: PriorKind | None = None,
        prior_weight: float | Literal["auto"] = "auto",
        threshold: float | None = None,
        energy: float | None = None,
        l2: float | None = None,
        spread: Spread | None = None,
        contexts: Sequence[str] | Literal["auto"] = "auto",
        lookup: Lookup = "subject_last",
        averaging: Averaging | None = None,
        steps: int | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        clamp: float | None = None,
        kl_factor: float | None = None,
        stop_loss: float | None = None,
        kl_prompt: str | None = None,
        where: Literal["stream", "mlp"] | None = None,
        suffix: bool = True,
        batch: int = 64,
        low_memory: bool = False,
        seed: int = 0,
    ) -> None:
        self.decoder: Decoder = decoder_of(model)
        self.model, self.tokenizer, self.stats = model, tokenizer, stats
        devices = sorted({str(p.device) for p in model.parameters()})
        if len(devices) > 1:
            raise ValueError(
                f"the model is spread over {', '.join(devices)}: put it on one device to edit it; "
                "the patch can be applied to it as it is"
            )
        preset = preset_of(self.decoder, self.method)
        own = self.defaults

        def chosen(name: str, given: Any, otherwise: Any) -> Any:
            return own.get(name, otherwise) if given is None else given

        self.spread: Spread = chosen("spread", spread, "even")
        one_of("spread", self.spread, ("even", "sqrt", "ends"))
        self.layers = self._layers(preset.layers if layers == "auto" else layers)
        self.prior: PriorKind = chosen("prior", prior, "covariance")
        if prior is None and stats is None and own.get("without_stats"):
            self.prior = own["without_stats"]
        one_of("prior", self.prior, ("covariance", "nullspace", "identity"))
        self.ridge = float(chosen("ridge", ridge, 1.0))
        not_negative("ridge", self.ridge)
        self.averaging: Averaging = chosen("averaging", averaging, "kinds")
        one_of("averaging", self.averaging, ("kinds", "all"))
        one_of("lookup", lookup, LOOKUPS)
        at_least("batch", batch, 1)
        integer("seed", seed)
        self.lookup: Lookup = lookup
        self.history, self.batch, self.seed = bool(history), batch, seed
        self.low_memory = bool(low_memory)
        if prior_weight != "auto" and self.prior != "covariance":
            raise ValueError(f"prior_weight has no effect with prior={self.prior!r}")
        self.prior_weight = float(preset.prior_weight if prior_weight == "auto" else prior_weight)
        positive("prior_weight", self.prior_weight)
        self._null_space(threshold, energy, l2, preset.threshold, preset.l2)
        given = {
            "steps": steps, "lr": lr, "weight_decay": weight_decay, "clamp": clamp,
            "kl_factor": kl_factor, "stop_loss": stop_loss, "kl_prompt": kl_prompt, "where": where,
        }  # fmt: skip
        self.values_options = ValueOptions(
            **{
                **preset.values,
                "where": own.get("where", "stream"),
                "suffix": suffix,
                **{name: value for name, value in given.items() if value is not None},
            }
        )
        if self.values_options.where == "mlp" and len(self.layers) > 1 and self.spread != "ends":
            raise ValueError(
                "where='mlp' has values for the output of one MLP: give one layer, or spread='ends'"
            )
        if contexts != "auto":
            if isinstance(contexts, str) or not all(isinstance(c, str) for c in contexts):
                raise TypeError(f"contexts must be a list of texts or 'auto'; got {contexts!r}")
            contexts = tuple(c if not c or c[-1].isspace() else c + " " for c in contexts)
        self._contexts: tuple[str, ...] | Literal["auto"] = contexts
        for layer in self.layers:
            self.decoder.site(layer)
        self._check_stats()

    # --- options ---

    def _layers(self, given: Any) -> tuple[int, ...]:
        if isinstance(given, int) and not isinstance(given, bool):
            given = [given]
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise TypeError(f"layers must be a list of blocks or 'auto'; got {given!r}")
        layers = [self.decoder.layer(i) for i in given]
        if not layers:
            raise ValueError("layers is empty: name at least one block")
        if sorted(set(layers)) != layers:
            raise ValueError(f"layers must ascend, each once; got {list(given)}")
        if self.spread == "ends" and len(layers) > 2:
            layers = [layers[0], layers[-1]]
        return tuple(layers)

    def _null_space(
        self,
        threshold: float | None,
        energy: float | None,
        l2: float | None,
        preset_threshold: float | None,
        preset_l2: float,
    ) -> None:
        named = {"threshold": threshold, "energy": energy, "l2": l2}
        if self.prior != "nullspace":
            for name, value in named.items():
                if value is not None:
                    raise ValueError(f"{name} has no effect with prior={self.prior!r}")
        if threshold is not None and energy is not None:
            raise ValueError("threshold and energy say the same in two ways: give one")
        if threshold is None and energy is None:
            threshold, energy = preset_threshold, None if preset_threshold else 0.99
        self.threshold, self.energy = threshold, energy
        self.l2 = preset_l2 if l2 is None else float(l2)

    def _check_stats(self) -> None:
        if self.stats is not None and not hasattr(self.stats, "prior"):
            raise TypeError(
                f"stats must be KeyStats; got {type(self.stats).__name__}. "
                "KeyStats.load(folder, model) reads saved ones"
            )
        if self.stats is None:
            if self.prior != "identity":
                raise ValueError(
                    f"stats is needed for prior={self.prior!r}: KeyStats.collect(model, tokenizer, "
                    f"texts=..., layers={list(self.layers)}), or texts='self' without any text"
                )
            return
        if self.prior == "identity":
            return
        missing = [layer for layer in self.layers if layer not in self.stats.layers]
        if missing:
            raise ValueError(
                f"stats has no moments of the layers {missing}, only of {list(self.stats.layers)}: "
                f"collect them with layers={list(self.layers)}, or name others"
            )
        self.stats.check(self.model)

    def options(self) -> dict[str, Any]:
        """All that decides the result, besides model, stats and facts; plain values."""
        return {
            "layers": list(self.layers),
            "history": self.history,
            "ridge": self.ridge,
            "prior": self.prior,
            "prior_weight": self.prior_weight,
            "threshold": self.threshold,
            "energy": self.energy,
            "l2": self.l2,
            "spread": self.spread,
            "contexts": list(self.contexts),
            "lookup": self.lookup,
            "averaging": self.averaging,
            **self.values_options.to_dict(),
        }

    @property
    def contexts(self) -> tuple[str, ...]:
        """The texts before the prompts; the model writes them when they are first needed."""
        if self._contexts == "auto":
            self._contexts = tuple(self._own_contexts())
        return self._contexts

    def _own_contexts(self) -> list[str]:
        return own_contexts(self.model, self.tokenizer, STARTS, length=10, seed=self.seed)

    def __repr__(self) -> str:
        shown: dict[str, Any] = {"layers": list(self.layers), "prior": self.prior}
        if self.prior == "covariance":
            shown["prior_weight"] = round(self.prior_weight, 3)
        o = self.values_options
        shown |= {"lr": o.lr, "steps": o.steps, "clamp": o.clamp, "history": self.history}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    # --- fitting ---

    def fit(
        self,
        facts: Iterable[Fact],
        after: Patch | None = None,
        *,
        values: Sequence[Values] | None = None,
        progress: bool | Progress = False,
    ) -> Patch:
        """A patch that makes the model say these facts; its weights are the same afterwards.

        Args:
            facts: what it shall say. Facts whose prompts agree up to the subject are fitted as
                one value; those of `after` that share it are fitted anew with them.
            after: what it was edited with before, by an editor with the same options. The result
                holds its facts, too.
            values: from `optimise`, for the same facts and `after`: only keys and solves are left,
                to try other priors, ridges or layers below the same last one.
            progress: True for a bar, or a function, see `Progress`.

        Returns:
            The patch, bound to the model and this editor; not applied.

        Raises:
            ValueError: facts are twice or contradict each other, a patch is applied, `after` is
                of other layers, priors or another base, a number is not finite.
        """
        with self._progress(progress) as tell, self._working(after) as bench:
            new, kept = self._split(facts, after)
            groups = group_facts(new, self.tokenizer, self.lookup)
            self._check_weights(new)
            self._use(kept, bench)
            found = self._given(values, groups) or self._optimise(groups, tell)
            layers, priors, told = self._solve(groups, kept, found, bench, tell)
        columns = [] if kept is None else list(kept.columns)
        facts_of = {} if kept is None else dict(kept.facts)
        facts_of.update((fact.id, fact) for fact in new)
        ridge = [] if kept is None else [kept.ridge]
        ridge.append(self._ridges(groups))
        report = {"facts": dict(_dict(kept, "facts")), "layers": told}
        report["facts"].update(self._told(groups, found, bench.left))
        patch = Patch(
            layers=tuple(layers),
            columns=(*columns, *(group.ids for group in groups)),
            ridge=torch.cat(ridge),
            facts=facts_of,
            joint=self.history if kept is not None and len(kept) else True,
            priors=priors,
            method=self.method,
            options=self.options(),
            report=report,
        )
        if kept is not None and len(kept) and not kept.joint:
            patch = replace(patch, joint=False)
        _warn_of_doubts(patch, [fact.id for fact in new], self.values_options)
        return patch.bind(self.model, self)

    def optimise(
        self,
        facts: Iterable[Fact],
        after: Patch | None = None,
        *,
        progress: bool | Progress = False,
    ) -> list[Values]:
        """The values of the facts, by far the most expensive part of `fit`, to be used again.

        Returns:
            One `Values`, or two (of the first and the last layer) with spread="ends".
        """
        with self._progress(progress) as tell, self._working(after) as bench:
            new, kept = self._split(facts, after)
            self._use(kept, bench)
            return self._optimise(group_facts(new, self.tokenizer, self.lookup), tell)

    def drop(self, patch: Patch, ids: Iterable[str], *, progress: bool | Progress = False) -> Patch:
        """`patch` without these facts, also where they share a value with others.

        `patch.drop` needs no model and is exact, and refuses to tear facts apart that were fitted
        as one value. Here the others of such a value are fitted anew.
        """
        gone = set(unknown_ids(ids, patch.facts))
        torn = [column for column in patch.columns if gone & set(column)]
        again = [patch.facts[i] for column in torn for i in column if i not in gone]
        rest = patch.drop([i for column in torn for i in column])
        return self.fit(again, after=rest, progress=progress) if again else rest

    # --- its parts ---

    @contextmanager
    def _working(self, after: Patch | None) -> Iterator[_Bench]:
        """The model in eval mode, without gradients of its own; all of it put back at the end."""
        refuse_attached(self.decoder)
        bench = _Bench([self.decoder.site(layer) for layer in self.layers])
        if after is not None:
            self._check_after(after, bench)
        wanted = [p for p in self.model.parameters() if p.requires_grad]
        with torch.inference_mode(False), Evaluating(self.model):  # values need gradients
            try:
                for parameter in wanted:
                    parameter.requires_grad_(False)
                yield bench
            finally:
                bench.restore()
                for parameter in wanted:
                    parameter.requires_grad_(True)

    def _use(self, kept: Patch | None, bench: _Bench) -> None:
        _ = self.contexts  # the bare model writes them, so that they are the same after any patch
        bench.use(kept)

    def _check_after(self, after: Patch, bench: _Bench) -> None:
        if not isinstance(after, Patch):
            raise TypeError(f"after must be a Patch; got {type(after).__name__}")
        names = [site.name for site in bench.sites]
        if [layer.name for layer in after.layers] != names:
            raise ValueError(
                f"after edits {[layer.name for layer in after.layers]}, this editor {names}: use "
                "the layers that it was made with"
            )
        for layer, have in zip(after.layers, bench.hashes(), strict=True):
            if layer.base_hash != have:
                raise ValueError(
                    f"after was fitted on another base: {layer.weight_name} differs from the one "
                    "that it names. Load the model that it was made for, without the patch applied"
                )
        if after.slim:
            raise ValueError(
                "after was saved slim, without the keys and targets that further edits need: use "
                "the patch as it was fitted, or saved whole"
            )

    def _split(self, facts: Iterable[Fact], after: Patch | None) -> tuple[list[Fact], Patch | None]:
        """The facts to fit, and the patch that they come after.

        Facts of the patch that share a key with a new one move from the patch to the facts: one
        key can only have one value.
        """
        if after is None or not len(after):
            new = check_facts(facts)
            return new, after
        new = check_facts(facts, known=after.facts)
        if not (self.history and after.joint):
            return new, after
        keys = {group.key for group in group_facts(new, self.tokenizer, self.lookup)}
        held = group_facts(list(after.facts.values()), self.tokenizer, self.lookup)
        shared = [fact for group in held if group.key in keys for fact in group.facts]
        if not shared:
            return new, after
        return [*shared, *new], after.drop([fact.id for fact in shared])

    def _check_weights(self, facts: Sequence[Fact]) -> None:
        if self.ridge == 0:
            odd = [fact.id for fact in facts if fact.weight != 1.0]
            if odd:
                raise ValueError(
                    f"the weight of the fact {odd[0]!r} has no effect with ridge=0, where every "
                    "value is reached: give a ridge, or leave the weights at 1"
                )

    def _ridges(self, groups: Sequence[Group]) -> Tensor:
        """ridge / weight of each group; of facts with one value the mean weight counts."""
        weights = [sum(f.weight for f in g.facts) / len(g.facts) for g in groups]
        return self.ridge / torch.tensor(weights, dtype=torch.float64)

    def _value_layers(self) -> tuple[int, ...]:
        return self.layers if self.spread == "ends" else self.layers[-1:]

    def _given(
        self, values: Sequence[Values] | None, groups: Sequence[Group]
    ) -> list[Values] | None:
        if values is None:
            return None
        layers = [v.layer for v in values]
        if layers != list(self._value_layers()):
            raise ValueError(
                f"values are of the layers {layers}; needed are {list(self._value_layers())}"
            )
        for v in values:
            if [g.facts for g in v.groups] != [g.facts for g in groups]:
                raise ValueError("values are of other facts: they must be of these, in this order")
        return list(values)

    def _optimise(self, groups: Sequence[Group], tell: Progress) -> list[Values]:
        found = []
        layers = self._value_layers()
        total = len(layers) * sum(len(group.facts) for group in groups)
        done = 0

        def step(count: int) -> None:
            nonlocal done
            done += count
            tell("values", done, total)

        tell("values", 0, total)
        for layer in layers:
            found.append(
                optimise_values(
                    self.decoder, self.tokenizer, groups, layer, contexts=self.contexts,
                    options=self.values_options, lookup=self.lookup, batch=self.batch,
                    progress=step,
                )
            )  # fmt: skip
        return found

    def _prior(self, site: Site) -> Prior:
        if self.prior == "identity":
            return ScaledIdentity(site.key_size, 1.0)
        assert self.stats is not None
        device = self.decoder.device
        if self.prior == "covariance":
            return self.stats.prior(
                site.layer, kind="covariance", weight=self.prior_weight, device=device
            )
        return self.stats.prior(
            site.layer, kind="nullspace", threshold=self.threshold, energy=self.energy,
            l2=self.l2, device=device,
        )  # fmt: skip

    def _solve(
        self,
        groups: list[Group],
        kept: Patch | None,
        found: list[Values],
        bench: _Bench,
        tell: Progress,
    ) -> tuple[list[LayerPatch], dict[str, str], dict[str, Any]]:
        """Layer after layer: keys, what is left to reach, the ridge solve, the new weight."""
        stream = KeyStream(
            self.decoder, self.tokenizer, groups, self.contexts, lookup=self.lookup,
            averaging=self.averaging, batch=max(8, 4 * self.batch),
            waiting="cpu" if self.low_memory else None,
        )  # fmt: skip
        new_ridge = self._ridges(groups).to(self.decoder.device)
        made: list[LayerPatch] = []
        priors: dict[str, str] = {}
        told: dict[str, Any] = {}
        tell("layers", 0, len(bench.sites))
        for number, site in enumerate(bench.sites):
            prior = self._prior(site)
            priors[site.name] = prior.identity
            held = None if kept is None else kept.layers[number]
            before = kept.priors.get(site.name) if kept is not None and len(kept) else None
            if self.history and before is not None and before != prior.identity:
                raise ValueError(
                    f"after was fitted with another prior at {site.name}: use the same stats, "
                    "weight and kind of prior as the editor that made it"
                )
            values = found[number] if self.spread == "ends" else found[0]
            keys, output, ahead = stream.look(site.layer, values.layer)
            change = self._change(site, values, keys, output, ahead, len(bench.sites) - number)
            new_k, new_t = keys, change.double().T
            if not bool(torch.isfinite(new_k).all() and torch.isfinite(new_t).all()):
                raise ValueError(f"keys or values at {site.name} are not finite (NaN or infinity)")
            made.append(
                self._layer(site, prior, held, new_k, new_t, new_ridge, kept, bench.base_hash(site))
            )
            del prior
            if self.low_memory and self.stats is not None:
                self.stats.forget()
            bench.write(site, made[-1])
            told[site.name] = {
                "asked": _rms(change), "delta_norm": _delta_norm(made[-1]),
                "weight_norm": bench.base_norm(site),
            }  # fmt: skip
            stream.advance(min(site.layer + 1, len(self.decoder) - 1))
            tell("layers", number + 1, len(bench.sites))
        bench.left = self._left(groups, found[-1], bench)
        return made, priors, told

    def _change(
        self,
        site: Site,
        values: Values,
        keys: Tensor,
        output: Tensor,
        ahead: Tensor,
        layers_left: int,
    ) -> Tensor:
        """What W shall add to its output for each group: [groups, d], float32 or float64."""
        z = values.z.to(output.device)
        if self.values_options.where == "mlp":
            return z - site.output(keys.T)  # of the mean key, which shall get z (r-ROME)
        share = {"even": float(layers_left), "sqrt": math.sqrt(layers_left), "ends": 1.0}
        rest = (z - ahead) / share[self.spread]
        # Not in 16 bits, whose rounding of y is as large as some changes of it.
        wide = torch.promote_types(site.weight.dtype, torch.float32)
        return site.needed(output.to(wide), rest.to(wide))

    def _layer(
        self,
        site: Site,
        prior: Prior,
        held: LayerPatch | None,
        keys: Tensor,
        rest: Tensor,
        ridge: Tensor,
        kept: Patch | None,
        base_hash: str,
    ) -> LayerPatch:
        if held is None or kept is None or not len(kept):
            solution = solve(prior, keys, rest, ridge)
            return LayerPatch(
                site.name, site.transposed, base_hash, solution.U, solution.V, keys, rest
            )
        assert held.keys is not None
        assert held.targets is not None
        old_u, old_v, old_k, old_t = (
            x.to(keys.device) for x in (held.U, held.V, held.keys, held.targets)
        )
        targets = rest + old_u @ (old_v.T @ keys)
        all_keys = torch.cat([old_k, keys], 1)
        all_targets = torch.cat([old_t, targets], 1)
        if self.history:
            ridges = torch.cat([kept.ridge.to(keys.device), ridge])
            known = old_v if kept.joint else None  # batches of another prior may be among them
            solution = solve(prior, all_keys, all_targets, ridges, known_v=known)
            u, v = solution.U, solution.V
        else:
            solution = solve(prior, keys, rest, ridge)
            u, v = torch.cat([old_u, solution.U], 1), torch.cat([old_v, solution.V], 1)
        return LayerPatch(site.name, site.transposed, base_hash, u, v, all_keys, all_targets)

    def _left(self, groups: list[Group], values: Values, bench: _Bench) -> list[float]:
        """|z - h| / |delta| of each group after all edits: 0 where its value is reached."""
        site = bench.sites[-1]
        stream = KeyStream(
            self.decoder, self.tokenizer, groups, (), lookup=self.lookup,
            batch=max(8, 4 * self.batch),
        )  # fmt: skip
        _, output, ahead = stream.look(site.layer, values.layer)
        now = output if self.values_options.where == "mlp" else ahead
        missed = (values.z - now.cpu()).norm(dim=1)
        shares = missed / values.delta.norm(dim=1).clamp_min(1e-30)
        return [float(share) for share in shares]

    def _told(
        self, groups: Sequence[Group], found: Sequence[Values], left: Sequence[float]
    ) -> dict[str, Any]:
        told: dict[str, Any] = {}
        for i, group in enumerate(groups):
            for fact in group.facts:
                told[fact.id] = {**found[-1].report[i], "left": left[i]}
                if len(group.facts) > 1:
                    told[fact.id]["shares_value_with"] = [o for o in group.ids if o != fact.id]
        return told

    @contextmanager
    def _progress(self, progress: bool | Progress) -> Iterator[Progress]:
        if callable(progress):
            yield progress
            return
        from tqdm import tqdm

        bars: list[Any] = []

        def tell(what: str, done: int, total: int) -> None:
            if not bars or bars[-1].desc != what:
                if bars:
                    bars[-1].close()
                bars.append(tqdm(desc=what, total=total, disable=not progress, leave=False))
                bars[-1].desc = what
            bars[-1].update(done - bars[-1].n)

        try:
            yield tell
        finally:
            if bars:
                bars[-1].close()


class _Bench:
    """The weights that are edited: what they were, and what is in them meanwhile."""

    def __init__(self, sites: list[Site]) -> None:
        for site in sites:
            words = patch_on(site.module)
            if words is not None:
                raise ValueError(
                    f"{site.weight_name} has a patch on it ({words}): undo it first, and give it "
                    "as after= to edit on top of it"
                )
        self.sites = sites
        self._hashes: dict[str, str] = {}
        self._bases: dict[str, Tensor] = {}
        self.left: list[float] = []

    def base_hash(self, site: Site) -> str:
        if site.name not in self._hashes:
            weight = self._bases.get(site.name, site.weight.detach())
            self._hashes[site.name] = weight_hash(weight)
        return self._hashes[site.name]

    def base_norm(self, site: Site) -> float:
        return float(self._bases.get(site.name, site.weight.detach()).float().norm())

    def hashes(self) -> list[str]:
        return [self.base_hash(site) for site in self.sites]

    def use(self, patch: Patch | None) -> None:
        """The weights with `patch`; its base was checked."""
        if patch is None or not len(patch):
            return
        for site, layer in zip(self.sites, patch.layers, strict=True):
            self.write(site, layer)

    def write(self, site: Site, layer: LayerPatch) -> None:
        weight = site.weight.detach()
        if site.name not in self._bases:
            self._bases[site.name] = weight.clone()
        write_factors(weight, self._bases[site.name], layer)

    def restore(self) -> None:
        for site in self.sites:
            if site.name in self._bases:
                with torch.no_grad():
                    site.weight.copy_(self._bases[site.name])
        self._bases.clear()


def _dict(patch: Patch | None, name: str) -> dict[str, Any]:
    if patch is None:
        return {}
    given = patch.report.get(name, {})
    return {k: v for k, v in given.items() if name != "facts" or k in patch.facts}


def _warn_of_doubts(patch: Patch, ids: Sequence[str], options: ValueOptions) -> None:
    """Says so where a fit has hardly edited anything, or has changed weights beyond recognition."""
    rows = [patch.report["facts"][i] for i in ids]
    missed = [i for i, row in zip(ids, rows, strict=True) if row["nll"] > 1.0]
    clamped = sum(bool(row["clamped"]) for row in rows)
    if 2 * len(missed) > len(rows):
        warnings.warn(
            f"the values of {len(missed)} of {len(rows)} facts leave their targets unlikely (nll "
            f"above 1; {clamped} are at the clamp): try an earlier layer, a larger clamp than "
            f"{options.clamp:g}, or more steps with a smaller lr than {options.lr:g}",
            stacklevel=3,
        )
    else:
        far = sum(row["left"] > 0.5 for row in rows)
        if 2 * far > len(rows):
            warnings.warn(
                f"the edited weights reach less than half of the change that {far} of {len(rows)} "
                "facts ask for (`left` in the report): the prior holds them back. Try a smaller "
                "prior_weight (AlphaEdit: a larger threshold or smaller energy)",
                stacklevel=3,
            )
    for name, row in patch.report["layers"].items():
        if row["delta_norm"] > row["weight_norm"]:
            warnings.warn(
                f"the change of {name} is larger than the weight itself ({row['delta_norm']:.3g} "
                f"against {row['weight_norm']:.3g}): other answers will suffer. Evaluate the "
                "neighbourhood, and try a smaller lr or clamp, or a larger prior_weight",
                stacklevel=3,
            )
            break


def _rms(rows: Tensor) -> float:
    return float(rows.double().norm(dim=1).square().mean().sqrt())


def _delta_norm(layer: LayerPatch) -> float:
    """||U V^T||_F without the product."""
    return float(((layer.U.T @ layer.U) * (layer.V.T @ layer.V)).sum().clamp_min(0).sqrt())


class Memit(WeightEditor):
    """MEMIT (Meng et al. 2023, arXiv 2210.07229) with history; spread="ends" is BLUE.

    Thousands of facts at a time, over several layers. See `WeightEditor` for the arguments.
    """

    method: Method = "memit"


class Rome(WeightEditor):
    """ROME (Meng et al. 2022, arXiv 2202.05262): one layer, values reached exactly.

    The mean key over contexts is used throughout (r-ROME, Gupta et al. 2024, arXiv 2403.07175);
    the first code mixed it with the plain one, which now and then broke the model. Several facts
    are fitted together. Without `stats` the prior is the identity, as in EasyEdit's settings for
    Llama.
    """

    method: Method = "rome"
    defaults = {  # noqa: RUF012
        "ridge": 0.0, "where": "mlp", "averaging": "all", "without_stats": "identity",
    }  # fmt: skip

    def _own_contexts(self) -> list[str]:
        """Twenty, of 5 and of 10 tokens, from the beginning of a text."""
        begun = [
            self.tokenizer.bos_token is not None, self.tokenizer.eos_token is not None
        ]  # fmt: skip
        starts = [""] * 10 if any(begun) else list(STARTS) * 2
        texts = []
        for length in (5, 10):
            texts += own_contexts(
                self.model, self.tokenizer, starts, length=length, seed=self.seed + length
            )
        return list(dict.fromkeys(texts))


class Emmet(WeightEditor):
    """EMMET (Gupta et al. 2024, arXiv 2403.14236): ROME's equality for many facts in one layer.

    ridge=0.1 is that of its code, ridge=0 the equality itself.
    """

    method: Method = "emmet"
    defaults = {"ridge": 0.1}  # noqa: RUF012


class AlphaEdit(WeightEditor):
    """AlphaEdit (Fang et al. 2025, arXiv 2410.02355): edits in the null space of what is known.

    Directions in which keys have more than `threshold` (or that together hold the share `energy`
    of all) are not touched at all; in the others the norm of the change costs l2.
    """

    method: Method = "alphaedit"
    defaults = {"prior": "nullspace"}  # noqa: RUF012
