"""MEND and MALMEN: an editor that is learnt, by a hypernetwork on the factors of a gradient.

    x_t, delta_t        input of a matrix and gradient of its output, at the tokens of the facts:
                        dL/dW = sum_t delta_t x_t^T,  L = -log p(target | prompt) per token
    x~_t, delta~_t      what the hypernetwork makes of them (`cl_fast.editing.hypernetwork`)

    aggregate           the update of W [d, f]
    "sum"               lr sum_t w_t delta~_t x~_t^T                                        MEND
    "least_squares"     argmin_D sum_t w_t |D x_t - v_t|^2 + e^lambda |D|^2                 MALMEN
                        v_t = -lr (x_t . x~_t) delta~_t

    trained to make small, over facts and texts that shall not change:
    cedit (-log p_edited(target | prompt or paraphrase)) + cloc KL(p || p_edited)

lr and lambda are learnt, one per matrix; w is the weight of the fact. The sign of lr is that of
MEND's code: with "sum" and a network that is still the identity, a positive lr climbs the loss, and
training turns it. Both updates stay factors (rank: the number of tokens), in training too, where
they are hooks on the layers of a `torch.func.functional_call`: neither a gradient nor an edited
weight of the size of W is ever made.

Sources: Mitchell et al. 2022 (arXiv 2110.11309) and its code; Tan et al. 2024 (arXiv 2311.04661).
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cl_fast.checkpoints.writing import write_whole
from cl_fast.editing.factored import Matrix, frozen_call, matrices_of, recorded, updated
from cl_fast.editing.facts import Encoded, Fact, check_facts, encode_many, listed_facts
from cl_fast.editing.hypernetwork import GradientTransform
from cl_fast.editing.patch import LayerPatch, Patch, weight_hash
from cl_fast.editing.rows import padded
from cl_fast.editing.solver import ScaledIdentity, solve
from cl_fast.errors import CheckpointError, NonFiniteError
from cl_fast.losses import linear_divergence, token_logprobs
from cl_fast.losses.cache import model_fingerprint
from cl_fast.models.blocks import decoder_of
from cl_fast.models.heads import IGNORED, Evaluating, head_of, last_hidden
from cl_fast.options import at_least, integer, not_negative, one_of, positive

__all__ = ["Mend", "Trained"]

Aggregate = Literal["sum", "least_squares"]
Tokens = Literal["all", "target"]

FORMAT = "cl_fast mend 1"

DEFAULTS: dict[str, dict[str, Any]] = {
    "sum": {
        "tokens": "all", "edit_lr": 1e-4, "lr": 1e-6, "lr_lr": 1e-4, "cedit": 0.1, "cloc": 1.0,
        "clip": 100.0, "edits_per_step": 1, "accumulate": 10,
    },
    "least_squares": {
        "tokens": "target", "edit_lr": 1e-6, "lr": 1e-5, "lr_lr": 1e-5, "cedit": 1.0, "cloc": 1.0,
        "clip": 1.0, "edits_per_step": 64, "accumulate": 1,
    },
}  # fmt: skip
"""Those of the papers' code. For `edits_per_step` of least squares, which the paper sweeps up to
thousands, a number that a small set of facts can serve."""

_HALF_SCALE = 1024.0
"""Times the loss of a float16 model: its gradients would be flushed to 0."""


@dataclass
class _Rows:
    """Right-padded texts: ids, mask, labels [B, T]; a label is the target token that follows.

    `hidden` is what the first edited block is given: [B, T, d]; None where that is the embedding.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    hidden: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask}


@dataclass
class _Pairs:
    """Of one matrix, a row for each token that counts.

    Attributes:
        x, delta: [N, f] and [N, d].
        alive: the tokens [n] at which neither is 0 throughout: the others take no part.
    """

    x: Tensor
    delta: Tensor
    alive: Tensor


@dataclass(frozen=True, eq=False)
class _Example:
    """A fact with its texts: prompt, paraphrases, neighbours with their answers."""

    fact: Fact
    own: Encoded
    others: list[Encoded]
    neighbours: list[Encoded]


@dataclass(frozen=True)
class Trained:
    """What a training did.

    Attributes:
        steps: of the optimizer, those of earlier calls included.
        history: of each step of this call: step, edit, locality, loss, grad_norm.
        validations: step, edit, locality, loss.
        best_step: whose weights are in use; None without `val_facts`.
        stopped: it ended early, as the loss on `val_facts` fell no more.
    """

    steps: int
    history: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    stopped: bool = False


class _Network(nn.Module):  # type: ignore[misc]
    """All that is learnt: a transform for each shape; lr and lambda of each matrix."""

    edit_lr: nn.Parameter
    log_ridge: nn.Parameter | None

    def __init__(self, matrices: Sequence[Matrix], options: Mapping[str, Any]) -> None:
        super().__init__()
        shapes: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            shapes.setdefault(f"{matrix.inputs}x{matrix.outputs}", []).append(matrix)
        self.places = {m.name: (key, i) for key, ms in shapes.items() for i, m in enumerate(ms)}
        generator = torch.Generator().manual_seed(options["seed"])
        self.dtype: torch.dtype = getattr(torch, options["dtype"])
        self.transforms = nn.ModuleDict(
            {
                key: GradientTransform(
                    ms[0].inputs, ms[0].outputs, modes=len(ms), rank=options["rank"],
                    blocks=options["blocks"], norm=options["norm"],
                    form="mend" if options["aggregate"] == "sum" else "malmen", dtype=self.dtype,
                    generator=generator, chunk_tokens=options["chunk_tokens"],
                )
                for key, ms in shapes.items()
            }
        )  # fmt: skip
        count = len(matrices)
        self.edit_lr = nn.Parameter(torch.full((count,), options["edit_lr"], dtype=self.dtype))
        self.log_ridge = None
        if options["aggregate"] == "least_squares":
            self.log_ridge = nn.Parameter(torch.zeros(count, dtype=self.dtype))

    def transform(self, matrix: Matrix) -> tuple[GradientTransform, int]:
        key, mode = self.places[matrix.name]
        found = self.transforms[key]
        assert isinstance(found, GradientTransform)
        return found, mode


class Mend:
    """An editor that is trained once for a model and then edits by one gradient.

        editor = Mend(model, tokenizer)
        editor.train(facts, locality_texts=texts, steps=5000, val_facts=others)
        patch = editor.fit(new_facts)                 # the model's weights are unchanged
        patch.apply()

    Memory: the hypernetwork of a shape has 2 blocks of 2 (f + d) rank numbers in float32, and the
    optimizer holds three times as much again. `fit` holds (f + d) numbers per token and matrix.

    Args:
        model: a causal decoder of transformers, on its devices as a whole. Its weights are never
            touched, nor are their requires_grad and grad.
        tokenizer: a fast one.
        layers: "auto": the MLP's matrices of the last three blocks; indices of blocks: the MLP's
            matrices of these; or names of modules (nn.Linear or Conv1D).
        aggregate: "sum" (MEND), for one or a few facts at a time, or "least_squares" (MALMEN), for
            many.
        rank: of each block of the hypernetwork; at most f + d is used.
        blocks: of the hypernetwork.
        norm: x and delta are normalised by their means and deviations over the training.
        tokens: "all" tokens of the prompt and the target that have a gradient, or only those that
            predict the "target"; by default what the method's authors use: "all" for "sum",
            "target" for "least_squares".
        edit_lr: of every matrix at the start, not 0; by default 1e-4 or 1e-6. Negative with "sum":
            training begins with descent.
        dtype: of the hypernetwork, float32 or float64, whatever the model's.
        seed: of its first weights.
        batch: facts or texts that go through the model at a time.
        chunk_tokens: tokens that go through the hypernetwork at a time.

    Attributes:
        matrices: that are edited.
        network: what is learnt, an nn.Module.
        steps: of training so far.

    Raises:
        TypeError, ValueError: an option, a layer or the model is wrong; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        layers: str | Sequence[int] | Sequence[str] = "auto",
        *,
        aggregate: Aggregate = "sum",
        rank: int = 1920,
        blocks: int = 2,
        norm: bool = True,
        tokens: Tokens | None = None,
        edit_lr: float | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        batch: int = 32,
        chunk_tokens: int = 4096,
    ) -> None:
        one_of("aggregate", aggregate, get_args(Aggregate))
        defaults = DEFAULTS[aggregate]
        tokens = defaults["tokens"] if tokens is None else tokens
        edit_lr = defaults["edit_lr"] if edit_lr is None else edit_lr
        one_of("tokens", tokens, get_args(Tokens))
        at_least("rank", rank, 1)
        at_least("blocks", blocks, 1)
        at_least("batch", batch, 1)
        at_least("chunk_tokens", chunk_tokens, 1)
        integer("seed", seed)
        if not isinstance(norm, bool):
            raise TypeError(f"norm must be True or False; got {norm!r}")
        positive("the size of edit_lr", abs(edit_lr))
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64; got {dtype}")
        self._decoder = decoder_of(model)
        self.model: Any = self._decoder.model
        self.tokenizer = tokenizer
        self.matrices = matrices_of(self._decoder, layers)
        blocks_of = [
            next((i for i, n in enumerate(self._decoder.names) if m.name.startswith(f"{n}.")), 0)
            for m in self.matrices
        ]
        self._first = min(blocks_of)
        self.batch = batch
        self.options: dict[str, Any] = {
            "aggregate": aggregate, "rank": rank, "blocks": blocks, "norm": norm, "tokens": tokens,
            "edit_lr": float(edit_lr), "dtype": str(dtype).removeprefix("torch."), "seed": seed,
            "chunk_tokens": chunk_tokens,
        }  # fmt: skip
        self.device = self.matrices[0].weight.device
        self.network = _Network(self.matrices, self.options).to(self.device)
        self.steps = 0
        self._optimizer: torch.optim.Adam | None = None
        self._best: dict[str, Any] | None = None
        self._last: dict[str, Tensor] | None = None
        half = any(m.weight.dtype == torch.float16 for m in self.matrices)
        self._scale = _HALF_SCALE if half else 1.0

    # --- texts to rows ---

    def _encoded(self, rows: Sequence[tuple[str, str | None, str]]) -> list[Encoded]:
        """Of (prompt, target, separator)."""
        given = [(text, None, target) for text, target, _ in rows]
        return encode_many(self.tokenizer, given, separator=[s for _, _, s in rows])

    def _rows(self, encoded: Sequence[Encoded]) -> _Rows:
        """Without the last token of a target, after which nothing is predicted."""
        given = [e.ids[:-1] if len(e.targets) else e.ids for e in encoded]
        ids, mask = padded(given, side="right")
        labels = torch.full_like(ids, IGNORED)
        for row, e in enumerate(encoded):
            for at in e.targets:
                labels[row, at - 1] = e.ids[at]
        place = self.model.get_input_embeddings().weight.device
        made = _Rows(ids.to(place), mask.to(place), labels.to(place))
        if self._first:
            with torch.no_grad():
                made.hidden = self._decoder.run(made.inputs, 0, self._first)
        return made

    def _batches(self, encoded: Sequence[Encoded]) -> list[_Rows]:
        """Whatever is done to the edited blocks, those below have worked once and for all here."""
        starts = range(0, len(encoded), self.batch)
        return [self._rows(encoded[start : start + self.batch]) for start in starts]

    def _hidden(self, rows: _Rows) -> Tensor:
        """What the head is given, from the first edited block on."""
        if rows.hidden is None:
            return last_hidden(self.model, **rows.inputs)
        return self._decoder.run_to_head(rows.inputs, self._first, hidden=rows.hidden)

    # --- the gradient, and what becomes of it ---

    def _nll(self, rows: _Rows) -> Tensor:
        """Of each row, the mean over its targets: [B]."""

        def forward(inner: Any) -> Tensor:
            keywords = head_of(inner).keywords(self._hidden(rows))
            labels = rows.labels.to(keywords["hidden"].device)
            logprobs = token_logprobs(**keywords, ids=labels)
            return -logprobs.sum(1) / (labels != IGNORED).sum(1).to(logprobs.device)

        losses: Tensor = frozen_call(self.model, forward)
        return losses

    def _kl(self, rows: _Rows, updates: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum over tokens of KL(p || p_edited): 0-dim."""
        with torch.no_grad():
            before = frozen_call(self.model, lambda _: self._hidden(rows))

        def forward(inner: Any) -> Tensor:
            head = head_of(inner)
            keywords = head.keywords(self._hidden(rows))
            labels = rows.ids.masked_fill(rows.mask == 0, IGNORED)
            return linear_divergence(
                **keywords, teacher=head.teacher(before),
                labels=labels.to(keywords["hidden"].device), reduction="sum",
            )  # fmt: skip

        with updated(self.matrices, updates):
            total: Tensor = frozen_call(self.model, forward)
        return total

    def _counted(self, rows: _Rows) -> Tensor:
        """Which tokens take part: [B, T]."""
        return rows.labels != IGNORED if self.options["tokens"] == "target" else rows.mask != 0

    def _columns(self, encoded: Sequence[Encoded]) -> list[int]:
        """How many tokens of each row take part."""
        if self.options["tokens"] == "target":
            return [len(e.targets) for e in encoded]
        return [len(e.ids) - 1 for e in encoded]

    def _pairs(self, batches: Sequence[_Rows], names: Sequence[str]) -> tuple[list[_Pairs], Tensor]:
        """x and delta of every matrix at the tokens of these facts, in their order; and the losses.

        The loss is a sum over facts, so that no fact's pair depends on the others.
        """
        xs: list[list[Tensor]] = [[] for _ in self.matrices]
        deltas: list[list[Tensor]] = [[] for _ in self.matrices]
        told: list[Tensor] = []
        first = 0
        for rows in batches:
            with torch.enable_grad(), recorded(self.matrices) as records:
                losses = self._nll(rows)
                ys = [r.y for r in records]
                missing = [m.name for m, y in zip(self.matrices, ys, strict=True) if y is None]
                if missing:
                    raise ValueError(f"{missing[0]} takes no part in the model's forward pass")
                _check_finite(losses, names[first : first + self.batch], "the loss of the edit")
                grads = torch.autograd.grad(losses.sum() * self._scale, ys)
            told.append(losses.detach())
            first += self.batch
            counted = self._counted(rows).reshape(-1)
            for i, (record, grad) in enumerate(zip(records, grads, strict=True)):
                assert record.x is not None
                # Some models hand the tokens of a batch to their MLPs as one list.
                x, grad = record.x.flatten(0, -2), grad.flatten(0, -2)
                if len(x) != len(counted):
                    raise ValueError(
                        f"{self.matrices[i].name} is given {len(x)} vectors for {len(counted)} "
                        "tokens: a layer that sees only some of them (an expert) cannot be edited"
                    )
                kept = counted.to(grad.device)
                to = {"device": self.device, "dtype": self.network.dtype}
                xs[i].append(x[kept].to(**to))
                delta = grad[kept].to(**to)
                deltas[i].append(delta / self._scale if self._scale != 1 else delta)
        pairs = []
        for matrix, x_parts, delta_parts in zip(self.matrices, xs, deltas, strict=True):
            x, delta = torch.cat(x_parts), torch.cat(delta_parts)
            if not bool(torch.isfinite(delta).all() & torch.isfinite(x).all()):
                raise NonFiniteError(
                    f"{matrix.name}: its inputs, or the gradient of its outputs, hold NaN or "
                    "infinity on these facts. Use bfloat16 or float32 instead of float16, or look "
                    "at the model's weights"
                )
            alive = ((x != 0).any(1) & (delta != 0).any(1)).nonzero()[:, 0]
            pairs.append(_Pairs(x, delta, alive))
        return pairs, torch.cat(told)

    def _observe(self, pairs: Sequence[_Pairs]) -> None:
        for matrix, pair in zip(self.matrices, pairs, strict=True):
            transform, _ = self.network.transform(matrix)
            transform.observe(pair.x[pair.alive], pair.delta[pair.alive])

    def _targets(self, index: int, pair: _Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """Of the tokens that are alive: x [n, f]; and x~ and lr delta~, or x and v."""
        x, delta = pair.x[pair.alive], pair.delta[pair.alive]
        transform, mode = self.network.transform(self.matrices[index])
        x_new, delta_new = transform(x, delta, mode)
        lr = self.network.edit_lr[index]
        if self.options["aggregate"] == "sum":
            return x, x_new, lr * delta_new
        return x, x, -lr * (x * x_new).sum(1, keepdim=True) * delta_new

    def _updates(self, pairs: Sequence[_Pairs], weight: Tensor) -> list[tuple[Tensor, Tensor]]:
        """U [d, n] and V [f, n] of each matrix, differentiable in what is learnt.

        Args:
            pairs: of the facts.
            weight: [N], of the fact of each token.
        """
        made = []
        for index, pair in enumerate(pairs):
            x, right, left = self._targets(index, pair)
            own = weight[pair.alive]
            if self.network.log_ridge is None:
                made.append(((left * own[:, None]).T, right.T))
                continue
            ridge = self.network.log_ridge[index].to(torch.float64).exp() / own
            solution = solve(ScaledIdentity(x.size(1)), x.T, left.T, ridge)
            made.append((solution.U.to(self.network.dtype), solution.V.to(self.network.dtype)))
        return made

    def _weight(self, examples: Sequence[_Example]) -> Tensor:
        """The weight of the fact of each token: [N]."""
        counts = self._columns([e.own for e in examples])
        values = [e.fact.weight for e, n in zip(examples, counts, strict=True) for _ in range(n)]
        return torch.tensor(values, dtype=self.network.dtype, device=self.device)

    # --- the outer loss ---

    def _edited_nll(self, rows: _Rows, updates: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        with updated(self.matrices, updates):
            return self._nll(rows)

    def _outer(
        self,
        updates: Sequence[tuple[Tensor, Tensor]],
        edits: Sequence[_Rows],
        texts: Sequence[_Rows],
        cedit: float,
        cloc: float,
    ) -> tuple[Tensor, Tensor]:
        """The two terms, without their coefficients; with grad enabled, the gradients of
        cedit edit + cloc locality are added to the leaves that `updates` then must be."""
        leaves = [factor for pair in updates for factor in pair if factor.requires_grad]
        sums = []
        for coefficient, count, batches, loss_of in (
            (cedit, sum(len(rows.ids) for rows in edits), edits, self._edited_nll),
            (cloc, sum(int(rows.mask.sum()) for rows in texts), texts, self._kl),
        ):
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for rows in batches:
                mean = loss_of(rows, updates).sum() / count
                total += mean.detach()
                if leaves and mean.requires_grad and coefficient:
                    (mean * (coefficient * self._scale)).backward(inputs=leaves)
            sums.append(total)
        return sums[0], sums[1]

    def _step(
        self,
        examples: Sequence[_Example],
        others: Sequence[Encoded],
        texts: Sequence[Encoded],
        cedit: float,
        cloc: float,
        share: float,
    ) -> tuple[Tensor, Tensor]:
        """Edits with one batch, and adds `share` of the gradient of the outer loss, on the facts,
        the `others` and the `texts`, to the network's."""
        names, own = [e.fact.id for e in examples], self._batches([e.own for e in examples])
        pairs, _ = self._pairs(own, names)
        self._observe(pairs)
        made = self._updates(pairs, self._weight(examples))
        leaves = [(u.detach().requires_grad_(), v.detach().requires_grad_()) for u, v in made]
        edits = [*own, *self._batches(others)]
        edit, locality = self._outer(leaves, edits, self._batches(texts), cedit, cloc)
        flat = [f for pair in made for f in pair]
        tails = [f for pair in leaves for f in pair]
        whole = [
            (f, leaf.grad * (share / self._scale))
            for f, leaf in zip(flat, tails, strict=True)
            if leaf.grad is not None and f.requires_grad
        ]
        _check_finite(torch.stack([edit, locality]), names, "the loss of training")
        torch.autograd.backward([f for f, _ in whole], [g for _, g in whole])
        return edit, locality

    # --- training ---

    def train(
        self,
        facts: Iterable[Fact],
        *,
        locality_texts: Sequence[str] | None = None,
        steps: int = 10_000,
        val_facts: Iterable[Fact] | None = None,
        edits_per_step: int | None = None,
        texts_per_step: int | None = None,
        accumulate: int | None = None,
        lr: float | None = None,
        lr_lr: float | None = None,
        cedit: float | None = None,
        cloc: float | None = None,
        clip: float | None = None,
        val_every: int = 50,
        patience: int = 2000,
        max_tokens: int = 512,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 500,
        progress: bool = False,
    ) -> Trained:
        """Trains the hypernetwork; the model stays as it is.

        A step edits the untouched model with `edits_per_step` facts, `accumulate` times, and moves
        what is learnt by one step of Adam. What is drawn in a step depends on `seed` and the step
        alone, and `steps` counts from the first call: after an interruption the same call goes on
        (see `checkpoint`) and ends with equal bits.

        Args:
            facts: examples of edits. Two of them may contradict each other: the model is edited
                anew each time. Where a fact has paraphrases, one of them, drawn each time, is asked
                for its target beside its own prompt: this teaches generalisation.
            locality_texts: whole texts that the model shall go on reading as it does: what it is
                used for. Beside them stands, for each fact of a batch that has a neighbourhood, one
                of its prompts with the true answer, drawn each time: this teaches to spare what is
                near the fact. Texts may be left out where facts have neighbourhoods.
            steps: of the optimizer, all calls together.
            val_facts: facts that are not trained on: every `val_every` steps the loss is taken on
                them; the weights of the best step stay, and training ends when `patience` steps
                brought none.
            edits_per_step: facts edited together: as many as will be in use. Default 1, or 64 with
                least squares, or all where there are fewer.
            texts_per_step: locality texts for each batch of facts; by default as many.
            accumulate: batches of facts per step; default 10, or 1.
            lr: of Adam for the network (and lambda); default 1e-6, or 1e-5.
            lr_lr: of Adam for edit_lr; default 1e-4, or 1e-5.
            cedit, cloc: of the two terms; default 0.1 and 1, or 1 and 1.
            clip: the norm of the gradient is at most this; default 100, or 1.
            val_every, patience: in steps.
            max_tokens: texts are cut after as many.
            seed: of what is drawn.
            checkpoint: a file to save to, every `checkpoint_every` steps and at the end. To go on,
                `Mend.load` it and call `train` as before.
            checkpoint_every: in steps.
            progress: show a bar.

        Returns:
            `Trained`.

        Raises:
            TypeError, ValueError: an argument is wrong; it is named.
            NonFiniteError: a loss or gradient is NaN or infinite; its step or facts are named. The
                step is not taken: weights are as they were before it.
        """
        defaults = DEFAULTS[self.options["aggregate"]]

        def chosen(value: float | None, name: str) -> float:
            return float(defaults[name] if value is None else value)

        facts = listed_facts(facts)
        held = [] if val_facts is None else listed_facts(val_facts, "val_facts")
        at_least("steps", steps, 1)
        for name, number in (
            ("val_every", val_every), ("patience", patience), ("max_tokens", max_tokens),
            ("checkpoint_every", checkpoint_every),
        ):  # fmt: skip
            at_least(name, number, 1)
        integer("seed", seed)
        size = edits_per_step
        if size is None:
            size = min(defaults["edits_per_step"], len(facts))
        at_least("edits_per_step", size, 1)
        if size > len(facts):
            raise ValueError(f"edits_per_step must be at most the {len(facts)} facts; got {size}")
        accumulate = defaults["accumulate"] if accumulate is None else accumulate
        at_least("accumulate", accumulate, 1)
        lr, lr_lr, clip = chosen(lr, "lr"), chosen(lr_lr, "lr_lr"), chosen(clip, "clip")
        cedit, cloc = chosen(cedit, "cedit"), chosen(cloc, "cloc")
        for name, value in (("lr", lr), ("lr_lr", lr_lr), ("clip", clip), ("cedit", cedit)):
            positive(name, value)
        not_negative("cloc", cloc)
        texts = self._texts(locality_texts, max_tokens)
        per_step = min(size, len(texts)) if texts_per_step is None else texts_per_step
        at_least("texts_per_step", per_step, 0 if texts_per_step is None else 1)
        if per_step > len(texts):
            raise ValueError(
                f"texts_per_step must be at most the {len(texts)} locality texts; got {per_step}"
            )
        examples, held_out = self._examples(facts, max_tokens), self._examples(held, max_tokens)
        for name, some in (("facts", examples), ("val_facts", held_out)):
            if some and not (texts or all(e.neighbours for e in some)):
                raise ValueError(
                    f"locality_texts is needed, since not all {name} have neighbourhood prompts: "
                    "give texts of the kind that the model is used for, which shall not change"
                )

        if self._last is not None:
            self.network.load_state_dict(self._last)
            self._last = None
        optimizer = self._adam(lr, lr_lr)
        report = Trained(self.steps)
        history, validations = report.history, report.validations
        stopped = False
        bar: Any = nullcontext()
        if progress:
            from tqdm import tqdm

            bar = tqdm(total=steps, initial=self.steps, desc="training the editor")
        with Evaluating(self.model), bar as shown:
            while self.steps < steps and not stopped:
                optimizer.zero_grad(set_to_none=True)  # of a step that an error ended
                edit = locality = 0.0
                for part in range(accumulate):
                    number = self.steps * accumulate + part
                    some = [examples[i] for i in _draw(len(facts), size, number, seed, salt=1)]
                    kept = _draw(len(texts), per_step, number, seed, salt=3)
                    generator = _generator(seed, number, salt=2)
                    a, b = self._step(
                        some,
                        _one_each([e.others for e in some], generator),
                        [texts[i] for i in kept]
                        + _one_each([e.neighbours for e in some], generator),
                        cedit, cloc, 1 / accumulate,
                    )  # fmt: skip
                    edit, locality = edit + float(a) / accumulate, locality + float(b) / accumulate
                norm = nn.utils.clip_grad_norm_(self.network.parameters(), clip)
                if not math.isfinite(float(norm)):
                    raise NonFiniteError(
                        f"the gradient of the hypernetwork is {float(norm)} in step {self.steps}: "
                        "use a smaller lr or lr_lr"
                    )
                optimizer.step()
                self.steps += 1
                loss = cedit * edit + cloc * locality
                history.append(
                    {"step": self.steps, "edit": edit, "locality": locality, "loss": loss,
                     "grad_norm": float(norm)}
                )  # fmt: skip
                if held and self.steps % val_every == 0:
                    with torch.no_grad():
                        found = self._validate(held_out, texts, size, per_step, cedit, cloc)
                    validations.append({"step": self.steps, **found})
                    if self._best is None or found["loss"] < self._best["loss"]:
                        self._best = {
                            "step": self.steps, "loss": found["loss"], "network": self._copy()
                        }  # fmt: skip
                    stopped = self.steps - self._best["step"] >= patience
                if shown is not None:
                    shown.update(1)
                    shown.set_postfix(edit=f"{edit:.3f}", locality=f"{locality:.4f}")
                if checkpoint is not None and self.steps % checkpoint_every == 0:
                    self.save(checkpoint)
        optimizer.zero_grad(set_to_none=True)
        if held and self._best is not None:
            self._last = self._copy()
            self.network.load_state_dict(self._best["network"])
        if checkpoint is not None:
            self.save(checkpoint)
        best = None if not held or self._best is None else int(self._best["step"])
        return Trained(self.steps, history, validations, best, stopped)

    def _texts(self, given: Sequence[str] | None, max_tokens: int) -> list[Encoded]:
        if given is None:
            return []
        if isinstance(given, str) or not all(isinstance(text, str) for text in given):
            raise TypeError("locality_texts must be a list of strings")
        whole = self._encoded([(text, None, "") for text in given])
        made = [Encoded(e.ids[:max_tokens], -1, range(0)) for e in whole if e.ids]
        if not made:
            raise ValueError("locality_texts holds no text: give texts that shall not change")
        return made

    def _prompts(self, facts: Sequence[Fact]) -> list[Encoded]:
        return self._encoded([(f.text, f.target, f.separator) for f in facts])

    def _examples(self, facts: Sequence[Fact], max_tokens: int) -> list[_Example]:
        own = self._prompts(facts)
        others = self._encoded([(p, f.target, f.separator) for f in facts for p in f.paraphrases])
        near = self._encoded(
            [
                (p, f.neighbourhood_target or f.target_true, f.separator)
                for f in facts
                for p in f.neighbourhood
            ]
        )
        texts = iter([Encoded(e.ids[:max_tokens], -1, range(0)) for e in near])
        rest = iter(others)
        return [
            _Example(
                fact, prompt, [next(rest) for _ in fact.paraphrases],
                [next(texts) for _ in fact.neighbourhood],
            )
            for fact, prompt in zip(facts, own, strict=True)
        ]  # fmt: skip

    def _adam(self, lr: float, lr_lr: float) -> torch.optim.Adam:
        if self._optimizer is None:
            rest = [p for n, p in self.network.named_parameters() if n != "edit_lr"]
            groups = [{"params": rest}, {"params": [self.network.edit_lr]}]
            self._optimizer = torch.optim.Adam(groups, lr=lr)
        for group, rate in zip(self._optimizer.param_groups, (lr, lr_lr), strict=True):
            group["lr"] = rate
        return self._optimizer

    def _copy(self) -> dict[str, Tensor]:
        return {k: v.detach().cpu().clone() for k, v in self.network.state_dict().items()}

    def _validate(
        self,
        examples: Sequence[_Example],
        texts: Sequence[Encoded],
        size: int,
        per_step: int,
        cedit: float,
        cloc: float,
    ) -> dict[str, float]:
        """The mean loss over all examples, edited `size` at a time: with all of their paraphrases
        and neighbours."""
        edit = locality = 0.0
        for start in range(0, len(examples), size):
            some = examples[start : start + size]
            own = self._batches([e.own for e in some])
            pairs, _ = self._pairs(own, [e.fact.id for e in some])
            updates = self._updates(pairs, self._weight(some))
            edits = [*own, *self._batches([row for e in some for row in e.others])]
            kept = [texts[(start + i) % len(texts)] for i in range(per_step)]
            kept += [row for e in some for row in e.neighbours]
            a, b = self._outer(updates, edits, self._batches(kept), cedit, cloc)
            edit += float(a) * len(some) / len(examples)
            locality += float(b) * len(some) / len(examples)
        return {"edit": edit, "locality": locality, "loss": cedit * edit + cloc * locality}

    # --- editing ---

    def fit(
        self, facts: Iterable[Fact], after: Patch | None = None, *, progress: bool = False
    ) -> Patch:
        """A patch that writes these facts, from one gradient; the weights are unchanged after it.

        It has a column for each token of each fact. Since every fact's gradient is that of the
        untouched model, facts are independent: `drop` leaves exactly the fit of the others, and `+`
        and `upsert` give the joint one.

        Args:
            facts: to be edited together.
            after: a patch of this editor that is not applied: the result holds its facts as well.
            progress: show a bar.

        Raises:
            TypeError, ValueError: a fact is wrong, contradicts another or is there twice; the
                normaliser has seen nothing, as the editor was never trained; `after` is applied, or
                of another editor or base.
            NonFiniteError: a loss or gradient is NaN or infinite; the fact or matrix is named.
        """
        listed = check_facts(facts, known=None if after is None else after.facts)
        if after is not None and after.applied:
            raise ValueError(
                "after is applied to the model, and facts are fitted on the untouched one: "
                "after.undo() first"
            )
        if not self.steps:
            warnings.warn(
                "this editor was never trained: its update is one step along the "
                f"{'normalised factors of the ' if self.options['norm'] else ''}gradient, with "
                f"lr {self.options['edit_lr']:g}. Call train, or load a trained one",
                stacklevel=2,
            )
        encoded = self._prompts(listed)
        groups = range(0, len(listed), self.batch)
        parts: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]] = [[] for _ in self.matrices]
        before: list[Tensor] = []
        bar: Any = groups
        if progress:
            from tqdm import tqdm

            bar = tqdm(groups, desc="editing")
        with Evaluating(self.model), torch.no_grad():
            for start in bar:
                some = slice(start, start + self.batch)
                pairs, losses = self._pairs(
                    self._batches(encoded[some]), [f.id for f in listed[some]]
                )
                before.append(losses.cpu())
                for index, pair in enumerate(pairs):
                    alive = torch.zeros(len(pair.x), dtype=torch.bool)
                    alive[pair.alive.cpu()] = True
                    made = [x.cpu() for x in self._targets(index, pair)]
                    parts[index].append((alive, made[0], made[1], made[2]))
            patch = self._patch(listed, encoded, parts)
            updates = [
                (layer.U.to(self.device, self.network.dtype),
                 layer.V.to(self.device, self.network.dtype))
                for layer in patch.layers
            ]  # fmt: skip
            after_edit = torch.cat(
                [
                    self._edited_nll(self._rows(encoded[start : start + self.batch]), updates).cpu()
                    for start in groups
                ]
            )
        tokens = self._columns(encoded)
        patch = replace(
            patch,
            report={
                "facts": {
                    fact.id: {"loss_before": float(a), "loss_after": float(b), "tokens": n}
                    for fact, a, b, n in zip(
                        listed, torch.cat(before), after_edit, tokens, strict=True
                    )
                },
                "layers": {
                    matrix.name: {"rank": sum(int(p[0].sum()) for p in part)}
                    for matrix, part in zip(self.matrices, parts, strict=True)
                },
            },
        ).bind(self.model, self)
        return patch if after is None else (after + patch).bind(self.model, self)

    def _patch(
        self,
        facts: Sequence[Fact],
        encoded: Sequence[Encoded],
        parts: Sequence[Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]],
    ) -> Patch:
        """Of the tokens of all facts: which are alive, x, and what `_targets` made of them."""
        counts = self._columns(encoded)
        owners = [fact for fact, n in zip(facts, counts, strict=True) for _ in range(n)]
        alive = [torch.cat([p[0] for p in part]) for part in parts]
        kept = torch.stack(alive).any(0)
        kept[torch.tensor(counts).cumsum(0) - 1] = True  # a fact has a column, even one of zeros
        weight = torch.tensor([f.weight for f in owners], dtype=torch.float64)[kept]
        options = {**self.options, "lookup": "tokens", "steps": self.steps}
        layers, priors = [], {}
        for index, (matrix, part) in enumerate(zip(self.matrices, parts, strict=True)):
            own = alive[index][kept]

            def columns(number: int, own: Tensor = own, part: Any = part) -> Tensor:
                """[size, n], 0 where a token does not take part in this matrix."""
                rows = torch.cat([p[number] for p in part]).to(torch.float64)
                whole = rows.new_zeros(len(own), rows.size(1))
                whole[own] = rows
                return whole.T

            left = columns(3)
            if self.network.log_ridge is None:
                # As a ridge fit: keys of 0, so that U = T (0 + I)^-1 for any part of the columns.
                left = left * weight
                keys = torch.zeros(matrix.inputs, 1, dtype=torch.float64).expand(-1, len(own))
                u, v, ridge, identity = left, columns(2), torch.ones_like(weight), "sum"
            else:
                prior = ScaledIdentity(
                    matrix.inputs, float(self.network.log_ridge[index].double().exp())
                )
                keys, ridge, identity = columns(1), 1 / weight, prior.identity
                place = self.device
                solution = solve(prior, keys.to(place), left.to(place), ridge.to(place))
                u, v = solution.U.cpu(), solution.V.cpu()
            layers.append(
                LayerPatch(
                    matrix.name, matrix.transposed, weight_hash(matrix.weight), u, v, keys, left
                )
            )
            priors[matrix.name] = identity
        return Patch(
            layers=tuple(layers),
            columns=tuple((f.id,) for f, keep in zip(owners, kept.tolist(), strict=True) if keep),
            ridge=ridge,
            facts={fact.id: fact for fact in facts},
            priors=priors,
            method="mend" if self.network.log_ridge is None else "malmen",
            options=options,
        )

    # --- what is kept ---

    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from, and `fit` needs; tensors and plain values."""
        return {
            "format": FORMAT,
            "options": dict(self.options),
            "matrices": [[m.name, m.inputs, m.outputs] for m in self.matrices],
            "base": model_fingerprint(self.model),
            "network": self._copy(),
            "last": self._last,
            "best": self._best,
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, check_base: bool = True) -> None:
        """Takes over what `state_dict` gave.

        Args:
            state: of an editor with the same options and layers.
            check_base: the model must be the one that it was trained for, weight by weight.

        Raises:
            CheckpointError: it is of another format, other options, layers, or another model.
        """
        if state.get("format") != FORMAT:
            raise CheckpointError(
                f"not a state of Mend: its format is {state.get('format')!r}, not {FORMAT!r}"
            )
        for name, value in self.options.items():
            if name not in ("seed", "chunk_tokens") and state["options"].get(name) != value:
                raise CheckpointError(
                    f"the state was made with {name}={state['options'].get(name)!r}; this editor "
                    f"has {value!r}"
                )
        mine = [[m.name, m.inputs, m.outputs] for m in self.matrices]
        if list(map(list, state["matrices"])) != mine:
            raise CheckpointError(
                f"the state is of the layers {[m[0] for m in state['matrices']]}; this editor has "
                f"{[m[0] for m in mine]}"
            )
        if check_base and state["base"] != model_fingerprint(self.model):
            raise CheckpointError(
                "the state was trained for a model with other weights. Load that model, or say "
                "check_base=False to go on with this one"
            )
        self.network.load_state_dict(state["network"])
        self._last, self._best, self.steps = state["last"], state["best"], int(state["steps"])
        self._optimizer = None
        if state["optimizer"] is not None:
            self._adam(1.0, 1.0).load_state_dict(state["optimizer"])

    def save(self, path: str | Path) -> None:
        """The state as one file, written whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        buffer = io.BytesIO()
        torch.save(self.state_dict(), buffer)
        write_whole(Path(path), [buffer.getbuffer()])

    @classmethod
    def load(
        cls, path: str | Path, model: nn.Module, tokenizer: Any, *, batch: int = 32,
        check_base: bool = True,
    ) -> Mend:  # fmt: skip
        """The editor that was saved to `path`.

        Raises:
            CheckpointError: the file is not one of an editor, or of another model.
            OSError: it cannot be read.
        """
        with Path(path).open("rb") as file:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
                if not isinstance(state, dict) or state.get("format") != FORMAT:
                    raise ValueError("it holds something else")
            except Exception as error:
                raise CheckpointError(f"{path}: not a saved Mend ({error})") from None
        options = dict(state["options"])
        options["dtype"] = getattr(torch, options["dtype"])
        names = [name for name, _, _ in state["matrices"]]
        editor = cls(model, tokenizer, names, batch=batch, **options)
        editor.load_state_dict(state, check_base=check_base)
        return editor


def _check_finite(losses: Tensor, names: Sequence[str], what: str) -> None:
    finite = torch.isfinite(losses.detach())
    if bool(finite.all()):
        return
    at = int((~finite).nonzero()[0])
    where = repr(names[at]) if len(names) == losses.numel() else ", ".join(map(repr, names[:3]))
    raise NonFiniteError(
        f"{what} is {float(losses.detach()[at])} for {where}: the model, or what the edit made of "
        "it, gives no finite log-probability. Use bfloat16 or float32, or a smaller lr"
    )


def _one_each(rows: Sequence[Sequence[Encoded]], generator: torch.Generator) -> list[Encoded]:
    """One of each list that is not empty."""
    return [some[int(torch.randint(len(some), (), generator=generator))] for some in rows if some]


def _generator(seed: int, number: int, salt: int) -> torch.Generator:
    mixed = (seed * 1_000_003 + number * 8 + salt) % (1 << 63)
    return torch.Generator().manual_seed(mixed)


def _draw(total: int, size: int, number: int, seed: int, salt: int) -> list[int]:
    """Draw `number` of `size` out of `total` without repetition: epoch by epoch, all but a rest of
    less than `size` come once."""
    if not size:
        return []
    per_epoch = total // size
    epoch, at = divmod(number, per_epoch)
    order = torch.randperm(total, generator=_generator(seed, epoch, salt))
    return [int(i) for i in order[at * size : (at + 1) * size]]
