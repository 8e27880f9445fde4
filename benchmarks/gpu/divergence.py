"""divergence_from_logits, linear_divergence and token_logprobs, each with its gradient.

    from logits   both rows are read for the loss and again for the gradient, which is written once:
                  4 reads and 1 write; kinds that need the normalisers first read them once more
    linear        2 N V (2 H + H_t) operations with a frozen head, 2 N V (3 H + H_t) with a trained
                  one: the floor is a bf16 matrix product
    log-probs     2 N V 3 H operations; their mean is the cross-entropy

Results are compared with float64, gradients by their norm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
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
    ours,
)

__all__ = ["CASES"]

BF16 = torch.bfloat16
_CHECKED = 16
"""Rows at either end of the logits that are compared with float64."""


def _normal(machine: Machine, *shape: int, scale: float, seed: int) -> Tensor:
    generator = torch.Generator(device=machine.device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=machine.device, dtype=BF16).mul_(scale)


def _losses(student: Tensor, teacher: Tensor, kind: str, wide: torch.dtype) -> Tensor:
    """[M], in plain torch; the mixture of "jsd" is even."""
    lp, lq = (F.log_softmax(x, -1, dtype=wide) for x in (student, teacher))
    if kind == "forward_kl":
        return F.kl_div(lp, lq, reduction="none", log_target=True).sum(-1)
    if kind == "reverse_kl":
        return F.kl_div(lq, lp, reduction="none", log_target=True).sum(-1)
    lm = torch.logaddexp(lp, lq) - torch.log(torch.tensor(2.0, dtype=wide, device=lp.device))
    both = F.kl_div(lm, lq, reduction="none", log_target=True) + F.kl_div(
        lm, lp, reduction="none", log_target=True
    )
    return both.sum(-1) / 2


def _far(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def _close(limit_loss: float, limit_grad: float) -> Callable[[list[Tensor], list[Tensor]], str]:
    def check(out: list[Tensor], exact: list[Tensor]) -> str:
        loss = _far(out[0], exact[0])
        grad = max(_far(x, y) for x, y in zip(out[1:], exact[1:], strict=True))
        if not (loss < limit_loss and grad < limit_grad):
            raise Mismatch(f"relative error {loss:.3g} of losses, {grad:.3g} of gradients")
        return f"float64, relative error {loss:.2g} of losses, {grad:.2g} of gradients"

    return check


# ------------------------------------------------------------------------------------ from logits


def _rows_work(kind: str, machine: Machine) -> Work:
    from cl_fast.losses import Logits, divergence_from_logits

    rows, columns = machine.pick((8192, 128256), (40, 97))
    each = 2 * 2 * rows * columns
    student = _normal(machine, rows, columns, scale=3.0, seed=0).requires_grad_()
    teacher = _normal(machine, rows, columns, scale=3.0, seed=1)
    upstream = torch.full((rows,), 1.0 / rows, device=machine.device)
    plain = functools.partial(_losses, kind=kind, wide=torch.float32)

    def stepped(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int], list[Tensor]]:
        def step(i: int) -> list[Tensor]:
            losses = loss(student, teacher)
            return [losses.detach(), *torch.autograd.grad(losses, [student], [upstream])]

        return step

    def run(**more: Any) -> Callable[[int], list[Tensor]]:
        return stepped(
            lambda s, t: divergence_from_logits(s, Logits(t), kind=kind, reduction="none", **more)
        )

    def ends(x: Tensor) -> Tensor:
        return torch.cat([x[:_CHECKED], x[-_CHECKED:]])

    def expected() -> list[Tensor]:
        wide = ends(student.detach()).double().requires_grad_()
        losses = _losses(wide, ends(teacher), kind, torch.float64)
        return [losses.detach(), *torch.autograd.grad(losses, [wide], [ends(upstream).double()])]

    def check(limit_loss: float, limit_grad: float) -> Callable[[list[Tensor], list[Tensor]], str]:
        compare = _close(limit_loss, limit_grad)
        return lambda out, exact: compare([ends(x) for x in out], exact)

    passes = 5 if kind in ("forward_kl", "reverse_kl") else 7
    moved = passes * 2 * rows * columns
    return Work(
        shape=f"{rows} x {columns}",
        dtype="bfloat16",
        bytes=moved,
        input_bytes=each,
        providers=[
            *ours(machine, divergence_from_logits, run, check(1e-5, 2.0**-8)),
            copy_floor(machine, moved),
            Provider("torch eager", "peer", stepped(plain), check(1e-4, 2.0**-7)),
            Provider("torch.compile", "peer", stepped(torch.compile(plain)), check(1e-4, 2.0**-7))
            if not machine.dry
            else absent("torch.compile", "torch.compile cannot be imported: a dry run"),
        ],
        note=f"{passes} passes over one tensor",
        expected=expected,
        output_elements=rows * columns,
        targets=[
            Target(
                f"{kind} from logits, loss and gradient: share of a copy",
                "cl_fast",
                lambda r: float(r["cl_fast"]["share_of_floor"]),
                0.8,
            )
        ],
    )


# ------------------------------------------------------------------------------------ linear


def _head(machine: Machine, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hidden states and a head whose logits have a deviation of 3."""
    width, columns = machine.pick((4096, 128256), (32, 97))
    return (
        _normal(machine, rows, width, scale=1.0, seed=seed),
        _normal(machine, columns, width, scale=3.0 * width**-0.5, seed=seed + 1),
    )


def _by_rows(
    hidden: Tensor, weight: Tensor, trained: bool, loss: Callable[[Tensor, slice], Tensor]
) -> list[Tensor]:
    """Mean loss and gradients in float64, some rows of logits at a time."""
    wide, head = hidden.detach().double(), weight.detach().double().requires_grad_(trained)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    grads = []
    for first in range(0, len(wide), 128):
        part = slice(first, first + 128)
        x = wide[part].clone().requires_grad_()
        mean = loss(x @ head.T, part).sum() / len(wide)
        mean.backward()
        total += mean.detach()
        grads.append(x.grad)
    return [total, torch.cat(grads), *([head.grad] if trained else [])]


def _times_floor(rows: Mapping[str, Mapping[str, Any]]) -> float:
    return 1 / float(rows["cl_fast"]["share_of_floor"])


def _times_eager(rows: Mapping[str, Mapping[str, Any]]) -> float:
    return float(rows["torch eager"]["ms_p50"]) / float(rows["cl_fast"]["ms_p50"])


def _liger(
    hidden: Tensor, weight: Tensor, teacher: tuple[Tensor, Tensor], wanted: list[Tensor]
) -> Provider:
    module, why = module_or_reason("liger_kernel.ops.fused_linear_jsd")
    if module is None:
        return absent("Liger", why)

    def step(i: int) -> list[Tensor]:
        loss = module.LigerFusedLinearJSDFunction.apply(
            hidden, weight, *teacher, None, 0.5, -100, 1.0
        )
        return [loss.detach(), *torch.autograd.grad(loss, wanted)]

    # Versions before 0.8.5 round the logits to bfloat16.
    return Provider("Liger", "peer", step, _close(1e-2, 0.3), note="fused_linear_jsd")


def _linear_work(rows: int, trained: bool, machine: Machine) -> Work:
    from cl_fast.losses import Hidden, linear_divergence

    tokens = machine.pick(rows, rows // 64)
    hidden, weight = _head(machine, tokens, 0)
    teacher = _head(machine, tokens, 2)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    wanted = [hidden, weight] if trained else [hidden]

    def run(**more: Any) -> Callable[[int], list[Tensor]]:
        def step(i: int) -> list[Tensor]:
            loss = linear_divergence(hidden, weight, Hidden(*teacher), kind="jsd", **more)
            return [loss.detach(), *torch.autograd.grad(loss, wanted)]

        return step

    def eager(i: int) -> list[Tensor]:
        with torch.no_grad():
            t = teacher[0] @ teacher[1].T
        loss = _losses(hidden @ weight.T, t, "jsd", torch.float32).mean()
        return [loss.detach(), *torch.autograd.grad(loss, wanted)]

    def expected() -> list[Tensor]:
        other = teacher[1].double()

        def loss(z: Tensor, part: slice) -> Tensor:
            return _losses(z, teacher[0][part].double() @ other.T, "jsd", torch.float64)

        return _by_rows(hidden, weight, trained, loss)

    width, columns = hidden.size(1), weight.size(0)
    name = f"jsd, {rows} tokens, head {'trained' if trained else 'frozen'}"
    targets = [Target(f"{name}: times faster than eager", "cl_fast", _times_eager, 1.0)]
    if rows >= 8192:
        targets.append(
            Target(f"{name}: times the matrix products", "cl_fast", _times_floor, 1.25, False)
        )
    return Work(
        shape=f"{tokens} x {width} x {columns}",
        dtype="bfloat16",
        bytes=width * (6 * tokens + (6 if trained else 4) * columns),
        flops=2 * tokens * columns * width * (4 if trained else 3),
        input_bytes=4 * width * (tokens + columns),
        providers=[
            *ours(machine, linear_divergence, run, _close(1e-4, 2.0**-7)),
            matmul_floor(machine),
            Provider("torch eager", "peer", eager, _close(1e-2, 0.3)),
            _liger(hidden, weight, teacher, wanted),
        ],
        note="jsd",
        expected=expected,
        output_elements=tokens * columns,
        targets=targets,
    )


def _logprobs_work(machine: Machine) -> Work:
    """The mean of -log-probs is the cross-entropy that others have."""
    from cl_fast.losses import token_logprobs

    rows = machine.pick(8192, 64)
    hidden, weight = _head(machine, rows, 0)
    generator = torch.Generator(device=machine.device).manual_seed(5)
    ids = torch.randint(weight.size(0), (rows,), generator=generator, device=machine.device)
    wanted = [hidden.requires_grad_(), weight.requires_grad_()]

    def stepped(loss: Callable[[], Tensor]) -> Callable[[int], list[Tensor]]:
        def step(i: int) -> list[Tensor]:
            mean = loss()
            return [mean.detach(), *torch.autograd.grad(mean, wanted)]

        return step

    def run(**more: Any) -> Callable[[int], list[Tensor]]:
        return stepped(lambda: -token_logprobs(hidden, weight, ids, **more).mean())

    core = getattr(F, "linear_cross_entropy", None)
    return Work(
        shape=f"{rows} x {hidden.size(1)} x {weight.size(0)}",
        dtype="bfloat16",
        bytes=2 * hidden.size(1) * (2 * rows + weight.size(0)),
        flops=2 * rows * weight.size(0) * hidden.size(1) * 3,
        input_bytes=2 * hidden.size(1) * (rows + weight.size(0)),
        providers=[
            *ours(machine, token_logprobs, run, _close(1e-4, 2.0**-7)),
            matmul_floor(machine),
            Provider(
                "torch eager", "peer",
                stepped(lambda: F.cross_entropy((hidden @ weight.T).float(), ids)),
                _close(1e-2, 0.3),
            ),
            absent(
                "F.linear_cross_entropy",
                f"F.linear_cross_entropy cannot be imported from torch {torch.__version__}",
            )
            if core is None
            else Provider(
                "F.linear_cross_entropy", "peer", stepped(lambda: core(hidden, weight, ids)),
                _close(1e-2, 0.3),
            ),
        ],
        note="mean cross-entropy",
        expected=lambda: _by_rows(
            hidden, weight, True, lambda z, part: F.cross_entropy(z, ids[part], reduction="none")
        ),
        output_elements=rows * weight.size(0),
        targets=[Target("log-probs: times faster than eager", "cl_fast", _times_eager, 1.0)],
    )  # fmt: skip


CASES = [
    *(
        Case(
            "divergence_from_logits",
            f"divergence_from_logits/{kind}",
            functools.partial(_rows_work, kind),
            8.0,
        )
        for kind in ("forward_kl", "reverse_kl", "jsd")
    ),
    *(
        Case(
            "linear_divergence",
            f"linear_divergence/{rows} {'trained' if trained else 'frozen'}",
            functools.partial(_linear_work, rows, trained),
            8.0,
        )
        for rows in (8192, 4096, 1024)
        for trained in (False, True)
    ),
    Case("token_logprobs", "token_logprobs/8192", _logprobs_work, 8.0),
]
