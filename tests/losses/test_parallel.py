"""A vocabulary that is split over ranks, and models that are: against one rank with all of it.

Two processes run all checks, one after the other, with gloo; each check is a test of its own here.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import itertools
import json
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cl_fast.losses import (
    Hidden,
    Logits,
    Probs,
    TopK,
    divergence_from_logits,
    linear_divergence,
    parallel,
    token_logprobs,
)
from cl_fast.ops.vocabulary_rows import KINDS

RANKS = 2
SIZES = (7, 4)
"""Uneven, and the whole is odd."""
V, H, HT, LEAD = sum(SIZES), 5, 3, (3, 4)

CHECKS: dict[str, Callable[[int], None]] = {}


def check(function: Callable[[int], None]) -> Callable[[int], None]:
    CHECKS[function.__name__] = function
    return function


def _run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    found = {}
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS,
            timeout=datetime.timedelta(seconds=60),
        )  # fmt: skip
        for name, function in CHECKS.items():
            torch.manual_seed(len(found))
            try:
                function(rank)
            except BaseException:
                # The other rank may wait for this one: leave, so that it notices.
                found[name] = traceback.format_exc()
                break
            found[name] = ""
    finally:
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
    if any(found.values()):
        os._exit(1)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("ranks")
    with contextlib.suppress(torch.multiprocessing.ProcessExitedException):
        torch.multiprocessing.spawn(_run, args=(str(folder),), nprocs=RANKS)
    return [
        json.loads(path.read_text()) if (path := folder / f"{rank}.json").exists() else {}
        for rank in range(RANKS)
    ]


# --- the whole, and this rank's part -----------------------------------------------------------


def mine(x: Tensor, rank: int, dim: int = 0) -> Tensor:
    first = SIZES[0] * x.size(dim) // V
    return x.split((first, x.size(dim) - first), dim)[rank]


def leaf(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def teachers(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    logits = torch.randn(*LEAD, V, dtype=torch.float64).to(dtype) * 3
    logprobs, ids = logits.log_softmax(-1).topk(4)
    return {
        "hidden": Hidden(
            torch.randn(*LEAD, HT, dtype=torch.float64).to(dtype),
            torch.randn(V, HT, dtype=torch.float64).to(dtype),
            torch.randn(V, dtype=torch.float64).to(dtype), logit_scale=1.5, softcap=5.0,
        ),
        "logits": Logits(logits),
        "probs": Probs(logits.softmax(-1)),
        "bucket": TopK(ids, logprobs),
        "renorm": TopK(ids.int(), logprobs, tail="renorm"),
        "none": TopK(ids, logprobs, tail="none"),
        "all": TopK(*(y for y in reversed(logits.log_softmax(-1).topk(V))), tail="bucket"),
    }  # fmt: skip


def part_of(teacher: Any, rank: int) -> Any:
    if isinstance(teacher, Hidden):
        bias = None if teacher.bias is None else mine(teacher.bias, rank)
        return Hidden(
            teacher.hidden, mine(teacher.weight, rank), bias, teacher.logit_scale, teacher.softcap
        )
    if isinstance(teacher, Logits):
        return Logits(mine(teacher.logits, rank, -1))
    if isinstance(teacher, Probs):
        return Probs(mine(teacher.probs, rank, -1))
    return teacher


def options() -> dict[str, dict[str, Any]]:
    labels = torch.randint(0, V, LEAD)
    labels[0, 1] = labels[2, 3] = -100
    token_weight = torch.rand(LEAD, dtype=torch.float64)
    token_weight[1] = 0
    return {
        "plain": {"reduction": "mean"},
        "all": {
            "labels": labels, "token_weight": token_weight, "temperature": 1.7,
            "teacher_temperature": 0.8, "logit_scale": 1.3, "softcap": 4.0, "ce_weight": 0.5,
            "reduction": "none", "chunk_tokens": 2,
        },
        "labels": {
            "labels": labels, "ce_weight": 0.3, "reduction": "mean", "denom": torch.tensor(7.0),
            "chunk_tokens": 5,
        },
    }  # fmt: skip


def close(ours: Tensor | None, whole: Tensor | None, what: str, bound: float = 1e-12) -> None:
    assert (ours is None) == (whole is None), what
    if ours is not None and whole is not None:
        assert ours.shape == whole.shape, what
        assert ours.dtype == whole.dtype, what
        torch.testing.assert_close(
            ours.detach(), whole.detach(), rtol=bound, atol=bound,
            msg=lambda text: f"{what}: {text}",
        )  # fmt: skip


def at_temperature(teacher: Any, given: dict[str, Any]) -> Any:
    """A tail is known at one temperature only: that of the call."""
    if not isinstance(teacher, TopK) or teacher.tail == "renorm":
        return teacher
    heat = given.get("teacher_temperature") or given.get("temperature", 1.0)
    return replace(teacher, temperature=heat)


def compare_linear(
    rank: int, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Any, what: str,
    bound: float = 1e-12, **given: Any,
) -> None:  # fmt: skip
    """Loss and gradients of one rank with the whole and of two with their parts."""
    teacher = at_temperature(teacher, given)
    leaves = [None if x is None else x.detach().clone() for x in (hidden, weight, bias)]
    for copied, x in zip(leaves, (hidden, weight, bias), strict=True):
        if copied is not None and x is not None:
            copied.requires_grad_(x.requires_grad)
    x, w, b = leaves
    whole = linear_divergence(x, w, teacher, bias=b, **given)
    upstream = torch.randn_like(whole)
    whole.backward(upstream)
    ours_x = hidden.detach().clone().requires_grad_(hidden.requires_grad)
    ours_w = mine(weight, rank).detach().clone().requires_grad_(weight.requires_grad)
    ours_b = None
    if bias is not None:
        ours_b = mine(bias, rank).detach().clone().requires_grad_(bias.requires_grad)
    loss = linear_divergence(
        ours_x, ours_w, part_of(teacher, rank), bias=ours_b, process_group=dist.group.WORLD, **given
    )
    loss.backward(upstream)
    close(loss, whole, f"{what}: loss", bound)
    close(ours_x.grad, x.grad, f"{what}: hidden", bound)
    close(ours_w.grad, None if w.grad is None else mine(w.grad, rank), f"{what}: weight", bound)
    if b is not None:
        close(ours_b.grad, None if b.grad is None else mine(b.grad, rank), f"{what}: bias", bound)


@check
def every_kind_and_teacher(rank: int) -> None:
    sides, given = teachers(), options()
    for kind, (form, teacher), name in itertools.product(KINDS, sides.items(), given):
        if form == "all" and name == "all":
            continue  # the tail of a tempered whole is none
        compare_linear(
            rank, leaf(*LEAD, H, scale=2), leaf(V, H), leaf(V), teacher, f"{kind} {form} {name}",
            kind=kind, **given[name],
        )  # fmt: skip


@check
def frozen_parts(rank: int) -> None:
    sides = teachers()
    for form, grads in itertools.product(("hidden", "bucket"), itertools.product((0, 1), repeat=3)):
        if any(grads):
            x, w, b = leaf(*LEAD, H), leaf(V, H), leaf(V)
            for tensor, needed in zip((x, w, b), grads, strict=True):
                tensor.requires_grad_(bool(needed))
            compare_linear(rank, x, w, b, sides[form], f"{form} {grads}", reduction="none")
    with torch.no_grad():
        x, w = torch.randn(*LEAD, H), torch.randn(V, H)
        for kind, form in itertools.product(("forward_kl", "jsd"), ("probs", "renorm")):
            teacher = teachers(torch.float32)[form]
            ours = linear_divergence(
                x, mine(w, rank), part_of(teacher, rank), kind=kind, process_group=dist.group.WORLD
            )
            close(ours, linear_divergence(x, w, teacher, kind=kind), f"no_grad {form}", 1e-5)


@check
def dtypes_and_backends(rank: int) -> None:
    """float32 and bfloat16 through whatever kernels there are: as near as one rank is to itself
    in another order of summation."""
    for dtype, kind in itertools.product((torch.float32, torch.bfloat16), KINDS):
        for form, teacher in teachers(dtype).items():
            if form == "all":
                continue
            # A gradient in bfloat16 may be rounded to its neighbour.
            bound = 2e-5 if dtype == torch.float32 else 2**-7
            compare_linear(
                rank, leaf(*LEAD, H, dtype=dtype), leaf(V, H, dtype=dtype),
                leaf(V, dtype=dtype), teacher, f"{dtype} {kind} {form}", bound, kind=kind,
                temperature=1.5,
            )  # fmt: skip


@check
def autocast(rank: int) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for form, teacher in teachers(torch.float32).items():
            if form != "all":
                x, w, b = (leaf(*n, dtype=torch.float32) for n in ((*LEAD, H), (V, H), (V,)))
                compare_linear(rank, x, w, b, teacher, form, 2**-7, kind="jsd")


@check
def from_logits(rank: int) -> None:
    given = {
        name: {k: v for k, v in some.items() if k not in ("ce_weight", "chunk_tokens")}
        for name, some in options().items()
    }
    for kind, (form, teacher), name in itertools.product(KINDS, teachers().items(), given):
        if form == "hidden" or (form == "all" and name == "all"):
            continue
        teacher = at_temperature(teacher, given[name])
        z = leaf(*LEAD, V, scale=3)
        whole = divergence_from_logits(z, teacher, kind=kind, **given[name])
        upstream = torch.randn_like(whole)
        whole.backward(upstream)
        for inplace in (False, True):
            what = f"{kind} {form} {name} {inplace}"
            part = mine(z.detach(), rank, -1).clone().requires_grad_()
            loss = parallel.divergence_from_logits(
                part.clone() if inplace else part, part_of(teacher, rank), kind=kind,
                process_group=dist.group.WORLD, inplace=inplace, **given[name],
            )  # fmt: skip
            loss.backward(upstream)
            close(loss, whole, f"{what}: loss")
            close(part.grad, mine(z.grad, rank, -1), f"{what}: gradient")
    public = divergence_from_logits(
        mine(z.detach(), rank, -1), part_of(teacher, rank), process_group=dist.group.WORLD
    )
    close(public, divergence_from_logits(z.detach(), teacher), "public")


def reference_logprobs(z: Tensor, ids: Tensor, how: dict[str, Any]) -> tuple[Tensor, Tensor]:
    z = z * how.get("logit_scale", 1.0)
    if how.get("softcap"):
        z = how["softcap"] * torch.tanh(z / how["softcap"])
    lp = (z / how.get("temperature", 1.0)).log_softmax(-1)
    kept = ids != -100
    picked = lp.gather(-1, ids.clamp(min=0)[..., None])[..., 0]
    return torch.where(kept, picked, 0), torch.where(kept, -(lp.exp() * lp).sum(-1), 0)


@check
def logprobs(rank: int) -> None:
    ids = torch.randint(0, V, LEAD)
    ids[1, 2] = ids[0, 0] = -100
    group = dist.group.WORLD
    for how, entropy, frozen in itertools.product(
        ({}, {"temperature": 1.4, "softcap": 3.0, "logit_scale": 0.7}), (False, True), (False, True)
    ):
        x, w, b = leaf(*LEAD, H, scale=2), leaf(V, H), leaf(V)
        w.requires_grad_(not frozen)
        b.requires_grad_(not frozen)
        z = x @ w.t() + b
        z.retain_grad()
        lp, ent = reference_logprobs(z, ids, how)
        up, up_entropy = torch.randn_like(lp), torch.randn_like(ent) * entropy
        (lp * up + ent * up_entropy).sum().backward()
        ours_x = x.detach().clone().requires_grad_()
        ours_w = mine(w, rank).detach().clone().requires_grad_(not frozen)
        ours_b = mine(b, rank).detach().clone().requires_grad_(not frozen)
        found = token_logprobs(
            ours_x, ours_w, ids, bias=ours_b, entropy=entropy, process_group=group,
            chunk_tokens=4, **how,
        )  # fmt: skip
        part = mine(z, rank, -1).detach().requires_grad_()
        direct = parallel.token_logprobs_from_logits(
            part, ids, entropy=entropy, process_group=group, **how
        )
        for result in (found, direct):
            ours, ours_entropy = result if entropy else (result, torch.zeros_like(ent))
            close(ours, lp, "log-probs")
            if entropy:
                close(ours_entropy, ent, "entropy")
            (ours * up + ours_entropy * up_entropy).sum().backward()
        close(ours_x.grad, x.grad, "hidden")
        close(ours_w.grad, None if frozen else mine(w.grad, rank), "weight")
        close(ours_b.grad, None if frozen else mine(b.grad, rank), "bias")
        close(part.grad, mine(z.grad, rank, -1), "logits")


@check
def a_teacher_that_is_the_student(rank: int) -> None:
    for kind, dtype in itertools.product(KINDS, (torch.float32, torch.bfloat16, torch.float64)):
        x, w = leaf(*LEAD, H, dtype=dtype, scale=20), leaf(V, H, dtype=dtype)
        part = mine(w, rank).detach().requires_grad_()
        loss = linear_divergence(
            x, part, Hidden(x.detach(), part.detach()), kind=kind, process_group=dist.group.WORLD
        )
        loss.backward()
        assert loss == 0, kind
        assert (x.grad == 0).all(), kind
        assert (part.grad == 0).all(), kind


@check
def peaked_and_excluded(rank: int) -> None:
    """Logits with a deviation of 30; a rank all of whose ids the teacher excludes."""
    for kind in ("forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"):
        for excluded in (slice(0, SIZES[0]), slice(SIZES[0], V), slice(3, 5)):
            logits = torch.randn(*LEAD, V, dtype=torch.float64) * 30
            logits[..., excluded] = -torch.inf
            for teacher in (Logits(logits), Probs(logits.softmax(-1))):
                compare_linear(
                    rank, leaf(*LEAD, H, scale=10), leaf(V, H, scale=3), None, teacher,
                    f"{kind} {excluded}", kind=kind,
                )  # fmt: skip
    support = torch.arange(SIZES[0]).expand(*LEAD, -1)
    logprobs = torch.randn(support.shape, dtype=torch.float64).log_softmax(-1) - 0.1
    for tail in ("bucket", "renorm", "none"):
        compare_linear(
            rank, leaf(*LEAD, H, scale=10), leaf(V, H, scale=3), None,
            TopK(support, logprobs, tail=tail), f"support of one rank {tail}", kind="reverse_kl",
        )  # fmt: skip


@check
def vocabularies_that_differ_by_padding(rank: int) -> None:
    for lacks, pad, kind in itertools.product(
        ("teacher", "student"), ("zero", "shared"), ("forward_kl", "jsd", "tvd")
    ):
        teacher: Any = teachers()["hidden"]
        x, w = leaf(*LEAD, H), leaf(V, H)
        if lacks == "student":
            grown = torch.cat([teacher.weight, torch.randn(2, HT, dtype=torch.float64)])
            part = grown[:7] if rank == 0 else grown[7:]
            teacher = Hidden(teacher.hidden, grown)
        else:
            cut = teacher.weight[:-1]
            part = cut[:7] if rank == 0 else cut[7:]
            teacher = Hidden(teacher.hidden, cut)
        whole = linear_divergence(x, w, teacher, kind=kind, pad_vocab=pad)
        whole.backward()
        ours_x, ours_w = x.detach().requires_grad_(), mine(w, rank).detach().requires_grad_()
        loss = linear_divergence(
            ours_x, ours_w, Hidden(teacher.hidden, part), kind=kind, pad_vocab=pad,
            process_group=dist.group.WORLD,
        )  # fmt: skip
        loss.backward()
        close(loss, whole, f"{lacks} {pad}: loss")
        close(ours_x.grad, x.grad, f"{lacks} {pad}: hidden")
        close(ours_w.grad, mine(w.grad, rank), f"{lacks} {pad}: weight")


@check
def nothing_counts(rank: int) -> None:
    labels = torch.full(LEAD, -100)
    for form, teacher in teachers().items():
        for reduction in ("mean", "none"):
            x, w = leaf(*LEAD, H), leaf(V, H)
            part = mine(w, rank).detach().requires_grad_()
            loss = linear_divergence(
                x, part, part_of(teacher, rank), labels=labels, reduction=reduction,
                process_group=dist.group.WORLD,
            )  # fmt: skip
            loss.sum().backward()
            assert (loss == 0).all(), form
            assert (x.grad == 0).all(), form
            assert (part.grad == 0).all(), form
    z = torch.full((*LEAD, SIZES[rank]), torch.nan, requires_grad=True)
    loss = divergence_from_logits(
        z, Logits(z.detach()), labels=labels, process_group=dist.group.WORLD
    )
    loss.backward()
    assert loss == 0
    assert (z.grad == 0).all()


@check
def few_rows_of_a_large_head(rank: int) -> None:
    """A renormalised support for which no product with the whole head is made."""
    ids = torch.rand(*LEAD, 10 * V).topk(3).indices
    teacher = TopK(ids, torch.randn(*LEAD, 3, dtype=torch.float64), tail="renorm")
    given = options()["all"] | {"ce_weight": 0.0}
    for kind, some in itertools.product(("forward_kl", "jsd"), (given, {}, {"chunk_tokens": 5})):
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
            x, w, b = (leaf(*n, dtype=dtype) for n in ((*LEAD, H), (10 * V, H), (10 * V,)))
            compare_linear(rank, x, w, b, teacher, f"{kind} {dtype}", bound, kind=kind, **some)
    z = torch.randn(*LEAD, 10 * V, requires_grad=True)
    whole = divergence_from_logits(z, teacher)
    part = mine(z.detach(), rank, -1).clone().requires_grad_()
    ours = divergence_from_logits(part, teacher, process_group=dist.group.WORLD)
    whole.backward()
    ours.backward()
    close(ours, whole, "from logits", 1e-5)
    close(part.grad, mine(z.grad, rank, -1), "from logits", 1e-5)


@check
def messages(rank: int) -> None:
    """How many there are: none in a backward pass, and few before."""
    sent: list[str] = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}
    for name, original in originals.items():

        def counted(*args: Any, _n: str = name, _o: Any = original, **kwargs: Any) -> Any:
            sent.append(_n)
            return _o(*args, **kwargs)

        setattr(dist, name, counted)
    try:
        for form, kind, expected in (
            # Sizes; per chunk the normalisers, and sums where K is needed; the losses; dX.
            ("logits", "forward_kl", {"all_gather": 1 + 3, "all_reduce": 2}),
            ("logits", "jsd", {"all_gather": 1 + 3, "all_reduce": 3 + 1}),
            ("bucket", "jsd", {"all_gather": 1, "all_reduce": 3 + 1}),
        ):
            x, w = leaf(*LEAD, H), leaf(SIZES[rank], H)
            loss = linear_divergence(
                x, w, part_of(teachers()[form], rank), kind=kind, chunk_tokens=4,
                reduction="none", process_group=dist.group.WORLD,
            )  # fmt: skip
            assert {name: sent.count(name) for name in originals} == expected, (form, kind, sent)
            sent.clear()
            loss.square().sum().backward()
            assert not sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@contextlib.contextmanager
def refused(error: type[Exception], *words: str) -> Iterator[None]:
    with pytest.raises(error) as found:
        yield
    for word in words:
        assert word in str(found.value)


@check
def bad_input_is_refused_on_all_ranks(rank: int) -> None:
    group = dist.group.WORLD
    teacher = part_of(teachers(torch.float32)["logits"], rank)
    x, w = torch.randn(*LEAD, H), torch.randn(SIZES[rank], H)
    first = rank == 0
    call = functools.partial(linear_divergence, process_group=group)
    other = "rank 0 of process_group refused"

    with refused(ValueError, "bias must have one entry per token id" if first else other):
        call(x, w, teacher, bias=torch.randn(3 if first else SIZES[rank]))
    with refused(ValueError, "must have 5 columns" if first else other):
        call(x, w[:, :4] if first else w, teacher)
    with refused(ValueError, "at least one row on each rank" if first else other):
        call(x, w[:0] if first else w, teacher)
    with refused(ValueError, "temperature must be positive"):
        call(x, w, teacher, temperature=0.0)
    with refused(ValueError, "chunk_tokens"):
        call(x, w, teacher, chunk_tokens=0)
    with refused(ValueError, "leading shape"):
        call(x[:2], w, teacher)
    with refused(ValueError, "agree on the number of tokens that count"):
        labels = torch.zeros(LEAD, dtype=torch.int64)
        labels[0, 0] = -100 if first else 1
        call(x, w, teacher, labels=labels)
    with refused(ValueError, "agree on labels, token_weight and ids"):
        call(x, w, teacher, debug=True, labels=torch.full(LEAD, 1 + rank))
    with refused(ValueError, "agree on which of hidden states, logits or head require grad"):
        call(x.clone().requires_grad_(first), w, teacher)
    with refused(ValueError, "agree on whether float64"):
        call(x.double() if first else x, w, teacher)
    with refused(ValueError, f"labels must be in [0, {V})"):
        call(x, w, teacher, labels=torch.full(LEAD, V))
    with refused(ValueError, "one vocabulary; got 11 and 10"):
        call(x, w, Logits(teacher.logits[..., : 7 - first]))
    with refused(ValueError, "same token ids", "rank 0 holds 7 and 4"):
        call(x, w, Logits(torch.randn(*LEAD, SIZES[1 - rank])))
    with refused(ValueError, "finite" if first else other):
        bad = torch.where(torch.tensor(first), torch.nan, w)
        call(x, bad, teacher, debug=True)
    with refused(ValueError, "infinite"):
        call(
            x, w, Logits(teacher.logits[..., : 7 if first else 3]), kind="reverse_kl",
            pad_vocab="zero",
        )  # fmt: skip
    ids = torch.full((*LEAD, 2), V) - torch.arange(2)
    with refused(ValueError, "teacher.ids must be in 0 .. 10"):
        call(x, w, TopK(ids, torch.full(ids.shape, -2.0)))
    with refused(TypeError, "ids must be integers"):
        parallel.token_logprobs(x, w, torch.zeros(LEAD), process_group=group)
    with refused(ValueError, "leading shape of hidden"):
        parallel.token_logprobs(x, w, torch.zeros(2, dtype=torch.int64), process_group=group)
    with refused(TypeError, "Hidden"):
        divergence_from_logits(teacher.logits, teachers()["hidden"], process_group=group)
    only_first = dist.new_group([0])
    if not first:
        with refused(ValueError, "process_group must hold the process"):
            linear_divergence(x, w, teacher, process_group=only_first)
    x = torch.randn(*LEAD, H, requires_grad=True)
    loss = call(x, w, teacher)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with refused(RuntimeError, "not differentiable twice"):
        grad.sum().backward()


@check
def compiled(rank: int) -> None:
    x, w = torch.randn(*LEAD, H), torch.randn(SIZES[rank], H)
    teacher = part_of(teachers(torch.float32)["logits"], rank)

    def step(x: Tensor) -> Tensor:
        hidden = torch.tanh(x)
        return 2 * linear_divergence(hidden, w, teacher, process_group=dist.group.WORLD)

    grads = []
    for function in (step, torch.compile(step, backend="eager")):
        x = x.detach().requires_grad_()
        function(x).backward()
        grads.append(x.grad)
    close(*grads, "gradient", 1e-6)


# --- models ------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, 8)
        self.layer = nn.Linear(8, H)
        self.lm_head = nn.Linear(H, V)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embedding(ids)))


def batches() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and teacher logits of both ranks; they have different numbers of tokens."""
    ids = torch.randint(0, V, (RANKS, 3, 4))
    labels = torch.randint(0, V, (RANKS, 3, 4))
    labels[0, 1:] = -100
    labels[1, 0, 0] = -100
    return ids, labels, torch.randn(RANKS, 3, 4, V)


def one_process(model: Model) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Gradients of the whole batch."""
    ids, labels, logits = batches()
    head = model.lm_head
    loss = linear_divergence(
        model(ids), head.weight, Logits(logits), labels=labels, bias=head.bias, kind="jsd"
    )
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return grads, (ids, labels, logits)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def same_gradients(model: nn.Module, grads: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        close(whole(p.grad), grads[name.removeprefix("module.")], name, 1e-5)


def denominator(labels: Tensor) -> float:
    """DDP and FSDP2 divide the sum of the gradients by the number of ranks."""
    return int((labels != -100).sum()) / RANKS


@check
def data_parallel(rank: int) -> None:
    model = Model()
    grads, (ids, labels, logits) = one_process(model)
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    head = wrapped.module.lm_head
    loss = linear_divergence(
        wrapped(ids[rank]), head.weight, Logits(logits[rank]), labels=labels[rank], bias=head.bias,
        kind="jsd", denom=denominator(labels),
    )  # fmt: skip
    loss.backward()
    same_gradients(wrapped, grads)


@check
def fully_sharded(rank: int) -> None:
    """The head in the root's group, whose weights stay gathered after the forward pass, and in a
    group of its own, whose weight is a DTensor by then."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    model = Model()
    grads, (ids, labels, logits) = one_process(model)
    for own_group in (False, True):
        sharded = copy.deepcopy(model)
        fully_shard(sharded.layer, mesh=mesh)
        if own_group:
            fully_shard(sharded.lm_head, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        hidden = sharded(ids[rank])
        head = sharded.lm_head
        assert hasattr(head.weight, "device_mesh") == own_group
        loss = linear_divergence(
            hidden, head.weight, Logits(logits[rank]), labels=labels[rank], bias=head.bias,
            kind="jsd", denom=denominator(labels),
        )  # fmt: skip
        loss.backward()
        same_gradients(sharded, grads)


@check
def tensor_parallel(rank: int) -> None:
    """A head that is a DTensor gives its part; hidden states of a sequence that is split, too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp", "tp"))
    x, w, b = leaf(*LEAD, H), leaf(V, H), leaf(V)
    teacher = teachers()["hidden"]
    loss = linear_divergence(x, w, teacher, bias=b, kind="jsd")
    loss.backward()
    parts = [
        distribute_tensor(y.detach(), mesh["tp"], [p]).requires_grad_()
        for y, p in ((x, Shard(1)), (w, Shard(0)), (b, Shard(0)))
    ]
    side = Hidden(
        distribute_tensor(teacher.hidden, mesh["tp"], [Replicate()]),
        *(distribute_tensor(y, mesh["tp"], [Shard(0)]) for y in (teacher.weight, teacher.bias)),
        logit_scale=1.5, softcap=5.0,
    )  # fmt: skip
    for group in (mesh["tp"], mesh.get_group("tp")):
        for y in parts:
            y.grad = None
        ours = linear_divergence(
            parts[0], parts[1], side, bias=parts[2], kind="jsd", process_group=group
        )
        ours.backward()
        close(ours, loss, "loss")
        for y, full in zip(parts, (x, w, b), strict=True):
            assert y.grad.placements == y.placements
            close(y.grad.full_tensor(), full.grad, "gradient")
    both = distribute_tensor(w.detach(), mesh, [Shard(0), Shard(0)]).requires_grad_()
    linear_divergence(
        x.detach(), both, side, bias=parts[2], kind="jsd", process_group=mesh.get_group("tp")
    ).backward()
    close(both.grad.full_tensor(), w.grad, "FSDP and TP")

    with refused(ValueError, "weight is a DTensor", "'tp'", "process_group=mesh.get_group('tp')"):
        linear_divergence(x, parts[1], teacher)
    logits = distribute_tensor(torch.randn(*LEAD, V), mesh["tp"], [Shard(2)])
    with refused(ValueError, "logits is a DTensor", "the vocabulary", "process_group="):
        divergence_from_logits(logits, teachers()["logits"])
    with refused(ValueError, "teacher.logits is a DTensor", "process_group="):
        linear_divergence(x, w, Logits(logits))
    with refused(ValueError, "weight is a DTensor that is not split by the vocabulary"):
        columns = distribute_tensor(w.detach(), mesh["tp"], [Shard(1)])
        linear_divergence(x, columns, side, process_group=mesh.get_group("tp"))
    divergence_from_logits(logits, Logits(logits), process_group=mesh.get_group("tp"))


@check
def gathered(rank: int) -> None:
    """The gradient of a weight is the mean over the ranks, whatever its placements."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",))
    w = torch.randn(V, H)
    for placement in (Shard(0), Shard(1), Replicate()):
        sharded = distribute_tensor(w, mesh, [placement]).requires_grad_()
        out = parallel.plain("weight", sharded)
        close(out, w, "gathered")
        (out * (rank + 1.0)).sum().backward()
        assert sharded.grad.placements == (placement,)
        close(sharded.grad.full_tensor(), torch.full_like(w, 1.5), f"gradient {placement}")
    frozen = parallel.plain("weight", distribute_tensor(w, mesh, [Shard(0)]))
    assert not frozen.requires_grad
    x = distribute_tensor(torch.randn(*LEAD, H), mesh, [Shard(1)]).requires_grad_()
    parallel.plain("hidden", x).sum().backward()
    close(x.grad.full_tensor(), torch.ones(*LEAD, H), "hidden")
    same = torch.randn(2)
    assert parallel.plain("hidden", same) is same


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(name: str, results: list[dict[str, str]]) -> None:
    for rank, found in enumerate(results):
        assert name in found, f"rank {rank} did not come to it: {list(found.values())[-1:]}"
        assert not found[name], f"rank {rank}: {found[name]}"


def test_without_ranks() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        linear_divergence(
            torch.randn(2, H), torch.randn(V, H), Logits(torch.randn(2, V)), process_group=object()
        )
