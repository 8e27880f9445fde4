"""Top-k teachers on a card: against the same losses in float64 on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cl_fast.ops.supports import TAILS, linear_topk, topk_from_logits, topk_logprobs
from cl_fast.ops.vocabulary_rows import KINDS, How

pytestmark = pytest.mark.gpu

HOWS = [How(), How(scale=0.5, softcap=20.0, temperature=2.0)]


def case(rows: int, width: int, columns: int, k: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(rows + columns)
    hidden = 3 * torch.randn(rows, width, generator=g)
    weight = torch.randn(columns, width, generator=g) * width**-0.5
    noisy = hidden + torch.randn(rows, width, generator=g)
    logprobs, ids = (noisy @ weight.T).log_softmax(-1).topk(k)
    return {"hidden": hidden, "weight": weight, "ids": ids, "logprobs": logprobs}


def run(given: dict[str, Tensor], device: Any, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    hidden, weight = (
        given[name].to(device, dtype).requires_grad_() for name in ("hidden", "weight")
    )
    loss, *_ = linear_topk(
        hidden, weight, None, given["ids"].to(device), given["logprobs"].to(device), **options
    )
    loss.mean().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [x.detach().double().cpu() for x in (loss, hidden.grad, weight.grad)]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_head(device: torch.device, tail: str, kind: str, how: How, dtype: torch.dtype) -> None:
    """5,003 ids: "renorm" of 20 gathers rows of the head."""
    given = {k: v.to(dtype) if v.is_floating_point() and k != "logprobs" else v
             for k, v in case(70, 64, 5003, 20).items()}  # fmt: skip
    options = {"tail": tail, "kind": kind, "how": how, "uniform": True}
    exact = run({**given, "logprobs": given["logprobs"].double()}, "cpu", torch.float64, **options)
    got = run(given, device, dtype, **options)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got[0], exact[0], rtol=1e-4, atol=2e-5)
    for a, b in zip(got[1:], exact[1:], strict=True):
        # The gradient of the logits is rounded once to the dtype of the product.
        assert (a - b).abs().max() <= 4 * max(eps, 1e-6) * b.abs().max()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits(device: torch.device, tail: str, inplace: bool, dtype: torch.dtype) -> None:
    given = case(33, 64, 5003, 20)
    x = (given["hidden"] @ given["weight"].T).to(dtype)
    results = []
    for at, wide in ((torch.device("cpu"), torch.float64), (device, dtype)):
        leaf = x.to(at, wide).requires_grad_()
        loss, *_ = topk_from_logits(
            leaf * 1, given["ids"].to(at), given["logprobs"].to(at), tail=tail, inplace=inplace
        )
        loss.sum().backward()
        assert leaf.grad is not None
        results.append((loss.detach().double().cpu(), leaf.grad.double().cpu()))
    (want, slope), (got, grad) = results
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert ((grad - slope).abs() <= torch.finfo(dtype).eps * slope.abs() + 1e-6).all()


def test_at_rest(device: torch.device) -> None:
    x = 30 * torch.randn(40, 9001, device=device)
    ids, logs = topk_logprobs(x, 50)
    for tail in ("bucket", "renorm"):
        leaf = x.clone().requires_grad_()
        loss, *_ = topk_from_logits(leaf, ids, logs, tail=tail)
        loss.sum().backward()
        assert not loss.any()
        assert leaf.grad is not None
        assert not leaf.grad.any()


@pytest.mark.parametrize("tail", TAILS)
def test_graph_capture(device: torch.device, tail: str) -> None:
    given = {k: v.to(device) for k, v in case(64, 32, 4001, 8).items()}
    weights = (torch.arange(64, device=device) % 3 > 0).float()
    hidden = given["hidden"].requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss, *_ = linear_topk(
            hidden, given["weight"], None, given["ids"], given["logprobs"], tail=tail,
            row_weight=weights, uniform=True,
        )  # fmt: skip
        return loss.detach(), torch.autograd.grad(loss.sum(), hidden)[0]

    want = step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
