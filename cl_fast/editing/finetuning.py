"""Fine-tuning of one matrix: the plain baseline that every editor must be compared with.

    patch = LocFT(model, tokenizer).fit(facts)
    patch.apply(); patch.undo()

LocFT-BF (Yang et al. 2025, arXiv 2509.22072): facts are shuffled and gone through in mini-batches,
epoch by epoch, while only the matrix with which the MLP of one block writes is trained:

    loss of fact i     = mean over its target's tokens, and the end token, of -log p
    loss of a batch    = sum_i w_i loss_i / sum_i w_i                          w: the facts' weights

A batch whose loss is below `stop` makes no step, and an epoch whose mean loss is below it is the
last one. What is trained is a float32 copy of the matrix, which the model sees rounded to its own
dtype.

The result is W' - W0, a matrix of full rank. As factors of a patch it is held exactly, as I (W' -
W0)^T with an identity of the smaller side, which costs min(d, f) (d + f) numbers; or, with `rank`,
as its best approximation of that rank (SVD), whose error the report tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from cl_fast.editing.applying import patch_on, weight_hash
from cl_fast.editing.facts import Encoded, Fact, check_facts, encode_many
from cl_fast.editing.patch import LayerPatch, Patch
from cl_fast.editing.rows import check_length, padded_inputs
from cl_fast.errors import NonFiniteError
from cl_fast.models.blocks import Site, decoder_of
from cl_fast.models.heads import Evaluating, head_of, last_hidden
from cl_fast.options import at_least, integer, not_negative, one_of, positive

__all__ = ["LocFT"]

_DEPTHS = {"llama": (22, 32), "qwen2": (6, 28)}
"""Block and number of blocks of the models of the paper's configs that train this matrix."""


class LocFT:
    """Plain fine-tuning of the MLP's output matrix of one block (LocFT-BF, arXiv 2509.22072).

    Args:
        model: a causal language model of transformers. Its weights are as before after `fit`.
        tokenizer: its tokenizer, a fast one.
        layer: the block, from the end where negative. "auto" takes the relative depth of the
            paper's configs: 22 of 32 blocks for Llama, 6 of 28 for Qwen 2; for other models that
            of Llama, which nobody has measured there.
        lr: 5e-4 in the paper's configs.
        epochs: at most so many.
        batch_size: facts of a mini-batch.
        stop: the loss below which a batch makes no step and training ends; 0 to go on.
        optimizer: "adam" as in the paper's code, or "adamw".
        weight_decay: of the optimizer: towards 0, not towards the base.
        eos: whether the end token is learnt after each target, so that answers end there.
        rank: of the factors in the patch; None for the exact difference.
        keep_prefix: the hidden states below the block are computed once and kept: per token d
            numbers of the model's dtype. False computes them again in each step; the results
            differ by rounding.
        seed: of the orders.

    Raises:
        TypeError, ValueError: naming the argument; a block that cannot be edited, see
            `cl_fast.models.blocks.Decoder.site`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        layer: int | Literal["auto"] = "auto",
        lr: float = 5e-4,
        epochs: int = 25,
        batch_size: int = 100,
        stop: float = 1e-2,
        optimizer: Literal["adam", "adamw"] = "adam",
        weight_decay: float = 0.0,
        eos: bool = True,
        rank: int | None = None,
        keep_prefix: bool = True,
        seed: int = 0,
    ) -> None:
        positive("lr", lr)
        at_least("epochs", epochs, 1)
        at_least("batch_size", batch_size, 1)
        not_negative("stop", stop)
        one_of("optimizer", optimizer, ("adam", "adamw"))
        not_negative("weight_decay", weight_decay)
        integer("seed", seed)
        self.decoder = decoder_of(model)
        if layer == "auto":
            config = self.decoder.config
            block, blocks = _DEPTHS.get(getattr(config, "model_type", ""), _DEPTHS["llama"])
            layer = len(self.decoder) * block // blocks
        self.layer = self.decoder.layer(layer, "layer")
        self.site: Site = self.decoder.site(self.layer)
        if rank is not None:
            at_least("rank", rank, 1)
            most = min(self.site.key_size, self.site.value_size)
            if rank > most:
                raise ValueError(f"rank must be at most {most}, that of the matrix; got {rank}")
        if eos and tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token to learn: give eos=False")
        self.model, self.tokenizer = model, tokenizer
        self.lr, self.epochs, self.batch_size, self.stop = lr, epochs, batch_size, stop
        self.optimizer, self.weight_decay = optimizer, weight_decay
        self.eos, self.rank, self.keep_prefix, self.seed = eos, rank, keep_prefix, seed

    # --- the data ---

    def _encoded(self, facts: Sequence[Fact]) -> list[Encoded]:
        rows = encode_many(
            self.tokenizer,
            [(fact.text, None, fact.target) for fact in facts],
            separator=[fact.separator for fact in facts],
        )
        if self.eos:
            end = int(self.tokenizer.eos_token_id)
            rows = [
                Encoded([*row.ids, end], -1, range(row.targets.start, row.targets.stop + 1))
                for row in rows
            ]
        for fact, row in zip(facts, rows, strict=True):
            check_length(self.decoder.model, len(row.ids), 0, f"the fact {fact.id!r}")
        return rows

    def _inputs(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        return padded_inputs([row.ids for row in rows], side="right", device=self.decoder.device)

    def _prefixes(self, rows: Sequence[Encoded]) -> list[Tensor] | None:
        """What the block is given of each fact: [length, d]."""
        if not self.keep_prefix or self.layer == 0:
            return None
        kept: list[Tensor] = []
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            with torch.no_grad():
                hidden = self.decoder.run(self._inputs(some), 0, self.layer)
            kept += [hidden[i, : len(row.ids)].clone() for i, row in enumerate(some)]
        return kept

    def _losses(self, rows: Sequence[Encoded], prefixes: Sequence[Tensor] | None) -> Tensor:
        """The mean loss of each fact: [n]."""
        inputs = self._inputs(rows)
        if prefixes is None:
            hidden = last_hidden(self.decoder.model, **inputs)
        else:
            below = nn.utils.rnn.pad_sequence(list(prefixes), batch_first=True)
            hidden = self.decoder.run_to_head(inputs, self.layer, hidden=below)
        at = [(i, j) for i, row in enumerate(rows) for j in row.targets]
        which = torch.tensor([i for i, _ in at], device=hidden.device)
        where = torch.tensor([j for _, j in at], device=hidden.device)
        given = head_of(self.decoder.model).keywords(hidden[which, where - 1])
        logits = F.linear(given["hidden"], given["weight"], given["bias"])
        if given["logit_scale"] != 1.0:
            logits = logits * given["logit_scale"]
        if given["softcap"] is not None:
            logits = torch.tanh(logits / given["softcap"]) * given["softcap"]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        wanted = inputs["input_ids"][which, where].to(logits.device)
        each = F.cross_entropy(logits, wanted, reduction="none")
        counts = torch.tensor([len(row.targets) for row in rows], device=each.device)
        return each.new_zeros(len(rows)).index_add(0, which.to(each.device), each) / counts

    # --- the fit ---

    def fit(
        self, facts: Iterable[Fact], after: Patch | None = None, progress: bool = False
    ) -> Patch:
        """Trains the matrix on the facts; the model is as before when it returns.

        Args:
            facts: to be learnt, together.
            after: a patch of this editor to go on from; its facts are in the result, too, and are
                not trained on again.
            progress: show a bar.

        Returns:
            a patch of one layer, which is not joint: single facts cannot be dropped. Its report
            has `losses` of the epochs, `steps`, `stopped`, `truncation` (the part of the
            difference that `rank` leaves out, by its Frobenius norm) and, of each fact, the `loss`
            in the last epoch, before that epoch's steps on it.

        Raises:
            TypeError, ValueError: the facts contradict each other, a patch is on the matrix, or
                `after` is of another model or layer.
            NonFiniteError: the loss is not finite; the message names facts of the batch.
        """
        weight = self.site.weight
        words = patch_on(self.site.module)
        if words is not None:
            raise ValueError(
                f"{self.site.weight_name} has a patch on it ({words}): undo it first, and give it "
                "as after= to train on top of it"
            )
        base_hash = weight_hash(weight)
        listed = check_facts(facts, known=None if after is None else after.facts)
        if after is not None:
            self._check_after(after, base_hash)
        encoded = self._encoded(listed)
        base = weight.detach().clone()
        wide = torch.float64 if base.dtype == torch.float64 else torch.float32
        master = base.to(wide, copy=True)
        if after is not None:
            delta = after.layers[0].delta.to(base.device)
            master = (base.double() + delta).to(wide)
        with _one_trained(self.decoder.model, weight), Evaluating(self.decoder.model):
            try:
                report = self._train(weight, master, listed, encoded, progress)
            finally:
                with torch.no_grad():
                    weight.copy_(base)
        delta = master.double() - base.double()
        u, v, lost = self._factors(delta.T if self.site.transposed else delta)
        made = listed if after is None else [*after.facts.values(), *listed]
        columns = (tuple(fact.id for fact in made), *[()] * (u.size(1) - 1))
        layer = LayerPatch(self.site.name, self.site.transposed, base_hash, u, v)
        patch = Patch(
            layers=(layer,),
            columns=columns,
            ridge=torch.zeros(u.size(1), dtype=torch.float64),
            facts={fact.id: fact for fact in made},
            joint=False,
            method="LocFT",
            options=self.options(),
            report={**report, "truncation": lost},
        )
        return patch.bind(self.model, self)

    def options(self) -> dict[str, Any]:
        """Everything that decides the result, beside model and facts."""
        names = ("layer", "lr", "epochs", "batch_size", "stop", "optimizer", "weight_decay", "eos",
                 "rank", "keep_prefix", "seed")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def _check_after(self, after: Patch, base_hash: str) -> None:
        if [layer.name for layer in after.layers] != [self.site.name]:
            raise ValueError(
                f"after edits {[layer.name for layer in after.layers]}; only a patch of "
                f"{self.site.name!r} alone can be trained on. Apply it to the model and fit on that"
            )
        if after.layers[0].base_hash != base_hash:
            raise ValueError(
                f"after was fitted on another base: the weight of {self.site.name!r} has the hash "
                f"{base_hash}, the patch says {after.layers[0].base_hash}"
            )

    def _train(
        self,
        weight: nn.Parameter,
        master: Tensor,
        facts: Sequence[Fact],
        encoded: Sequence[Encoded],
        progress: bool,
    ) -> dict[str, Any]:
        """Trains `master`, in place, through `weight`."""
        generator = torch.Generator().manual_seed(self.seed)
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        optimizer = kinds[self.optimizer]([master], lr=self.lr, weight_decay=self.weight_decay)
        prefixes = self._prefixes(encoded)
        weights = torch.tensor([float(fact.weight) for fact in facts])
        losses: list[float] = []
        last: dict[str, float] = {}
        steps, stopped = 0, False
        with tqdm(total=self.epochs, desc="fine-tuning", disable=not progress) as bar:
            for _ in range(self.epochs):
                total = 0.0
                order = torch.randperm(len(facts), generator=generator).tolist()
                for start in range(0, len(order), self.batch_size):
                    some = order[start : start + self.batch_size]
                    with torch.no_grad():
                        weight.copy_(master)
                    with torch.enable_grad():
                        each = self._losses(
                            [encoded[i] for i in some],
                            None if prefixes is None else [prefixes[i] for i in some],
                        )
                        w = weights[some].to(each)
                        loss = (w * each).sum() / w.sum()
                    value = float(loss.detach())
                    if not math.isfinite(value):
                        bad = [facts[i].id for i, x in zip(some, each.tolist(), strict=True)
                               if not math.isfinite(x)]  # fmt: skip
                        raise NonFiniteError(
                            f"the loss of the facts {bad[:5]} is not finite after {steps} steps: "
                            "the model gives NaN there, or lr is too large"
                        )
                    last.update({facts[i].id: x for i, x in zip(some, each.tolist(), strict=True)})
                    total += value * float(w.sum())
                    if value >= self.stop:
                        weight.grad = None
                        loss.backward()
                        assert weight.grad is not None
                        master.grad = weight.grad.to(master.dtype)
                        optimizer.step()
                        steps += 1
                losses.append(total / float(weights.sum()))
                bar.update(1)
                bar.set_postfix_str(f"loss {losses[-1]:.4f}")
                if losses[-1] < self.stop:
                    stopped = True
                    break
        return {
            "losses": losses,
            "steps": steps,
            "stopped": stopped,
            "facts": {name: {"loss": x} for name, x in last.items()},
        }

    def _factors(self, delta: Tensor) -> tuple[Tensor, Tensor, float]:
        """U [d, r], V [f, r] of a difference [d, f], and the part of its norm that they lack."""
        if self.rank is not None:
            left, sizes, right = torch.linalg.svd(delta, full_matrices=False)
            kept, whole = sizes[: self.rank], float(sizes.norm())
            lost = float(sizes[self.rank :].norm()) / whole if whole else 0.0
            return left[:, : self.rank] * kept, right[: self.rank].T, lost
        d, f = delta.shape
        if d <= f:
            return torch.eye(d, dtype=delta.dtype), delta.T, 0.0
        return delta, torch.eye(f, dtype=delta.dtype), 0.0


@contextmanager
def _one_trained(model: nn.Module, weight: nn.Parameter) -> Iterator[None]:
    """Only `weight` requires grad, and has none yet; everything is put back afterwards."""
    before: Mapping[nn.Parameter, bool] = {p: p.requires_grad for p in model.parameters()}
    grad = weight.grad
    try:
        for parameter in before:
            parameter.requires_grad_(parameter is weight)
        weight.grad = None
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)
        weight.grad = grad
