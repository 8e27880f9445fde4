"""Log-probs of tokens on a card: no further from float64 than eager, no waiting, graph capture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cl_fast.losses import token_logprobs, token_logprobs_from_logits

pytestmark = pytest.mark.gpu

IGNORE = -100
LOW = (torch.bfloat16, torch.float16)


def ids_of(rows: int, columns: int, device: torch.device) -> Tensor:
    ids = torch.randint(0, columns, (rows,), generator=torch.Generator().manual_seed(rows))
    ids[0], ids[-1] = 0, columns - 1
    ids[1::4] = IGNORE
    return ids.to(device)


def normal(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g).to(device)


def plain(z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    lp = z.log_softmax(-1)
    away = ids == IGNORE
    picked = lp.gather(-1, ids.masked_fill(away, 0)[:, None])[:, 0]
    return torch.where(away, 0, picked), torch.where(away, 0, -(lp.exp() * lp).sum(-1))


def check(ours: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> None:
    for mine, theirs, true in zip(ours, eager, exact, strict=True):
        size = true.abs().max()
        error, allowed = ((x.double() - true).abs().max() for x in (mine, theirs))
        assert error <= 2 * allowed + size * 2.0**-22


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("columns", [1, 2, 1001, 50_257, 262_144])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_rows(device: torch.device, dtype: torch.dtype, columns: int, scale: float) -> None:
    z = (scale * normal(37, columns, device=device)).to(dtype)
    ids = ids_of(37, columns, device)
    up, other = normal(37, device=device, seed=1), normal(37, device=device, seed=2)
    results = []
    for wide in (None, torch.float32, torch.float64):
        leaf = z.double().requires_grad_() if wide == torch.float64 else z.clone().requires_grad_()
        if wide is None:
            made = token_logprobs_from_logits(leaf, ids, entropy=True)
        else:
            made = plain(leaf.to(wide), ids)
        loss = (made[0] * up).sum() + (made[1] * other).sum()
        results.append([*made, *torch.autograd.grad(loss, leaf)])
    check(*results)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_head(device: torch.device, dtype: torch.dtype, scale: float, trained: bool) -> None:
    """Eager: the product of the widened matrices; the op keeps the accumulators of the narrow one.

    The gradient of the logits is rounded once to the dtype of the products, as eager's is where
    autograd multiplies it.
    """
    rows, width, columns = 130, 128, 4099
    x = (scale * normal(rows, width, device=device)).to(dtype)
    w = (normal(columns, width, device=device, seed=1) * width**-0.5).to(dtype)
    ids = ids_of(rows, columns, device)
    up = normal(rows, device=device, seed=2)

    def run(dtype: torch.dtype, op: bool) -> list[Tensor]:
        a, b = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(trained)
        if op:
            lp = token_logprobs(a, b, ids, chunk_tokens=48)
        elif dtype in LOW:
            lp = plain(torch.nn.functional.linear(a, b).float(), ids)[0]
        else:
            lp = plain(a @ b.T, ids)[0]
        return [lp, *torch.autograd.grad((lp * up).sum(), [a, b] if trained else [a])]

    check(run(dtype, True), run(dtype, False), run(torch.float64, False))


def test_rows_wait_for_nothing(device: torch.device) -> None:
    z, ids = normal(64, 1001, device=device).requires_grad_(), ids_of(64, 1001, device)
    token_logprobs_from_logits(z, ids, entropy=True)[0].sum().backward()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        lp, entropy = token_logprobs_from_logits(z, ids, entropy=True)
        (lp.sum() + entropy.sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("trained", [False, True])
def test_graph_capture(device: torch.device, trained: bool) -> None:
    x = normal(64, 32, device=device).bfloat16().requires_grad_()
    w = normal(1001, 32, device=device, seed=1).bfloat16().requires_grad_(trained)
    ids = ids_of(64, 1001, device)
    leaves = [x, w] if trained else [x]

    def step() -> list[Tensor]:
        lp, entropy = token_logprobs(x, w, ids, entropy=True)
        return [lp, *torch.autograd.grad(lp.sum() + 0.1 * entropy.sum(), leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(normal(64, 32, device=device, seed=7))
        ids.copy_(ids_of(64, 1001, device).roll(3))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)


def test_two_runs_are_equal_bit_by_bit(device: torch.device) -> None:
    z, ids = 5 * normal(64, 50_257, device=device).bfloat16(), ids_of(64, 50_257, device)
    runs = []
    for _ in range(2):
        leaf = z.clone().requires_grad_()
        lp, entropy = token_logprobs_from_logits(leaf, ids, entropy=True)
        runs.append([lp, entropy, *torch.autograd.grad(lp.sum() + entropy.sum(), leaf)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_wrong_id_is_named_with_debug(device: torch.device) -> None:
    z, ids = normal(3, 5, device=device), torch.tensor([0, 5, 1], device=device)
    with pytest.raises(ValueError, match="got 5 in row 1"):
        token_logprobs_from_logits(z, ids, debug=True)


def test_compiles_without_a_break(device: torch.device) -> None:
    def step(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        return (token_logprobs(x, w, ids) ** 2).sum()

    x, w = normal(32, 16, device=device).requires_grad_(), normal(101, 16, device=device)
    ids = ids_of(32, 101, device)
    for a, b in zip(
        *(
            [loss, *torch.autograd.grad(loss, x)]
            for loss in (step(x, w, ids), torch.compile(step, fullgraph=True)(x, w, ids))
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
