"""What training adds on a card: the pull to anchors, the gated layer, a projection."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cl_fast.ops import anchor_gradient_, anchor_pull_, gated_low_rank
from cl_fast.training import Project, Task

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def tensors(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3,), (257, 129), (1024, 1024), (0, 4), (5, 7, 11)]
    return [torch.randn(shape, generator=generator).to(dtype).cuda() for shape in shapes]


@pytest.mark.parametrize("with_fisher", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_pull_to_anchors_is_that_of_the_reference(
    dtype: torch.dtype, with_fisher: bool
) -> None:
    weights, anchors = tensors(dtype, 1), tensors(torch.float32, 2)
    fisher = [x.abs() for x in tensors(torch.float32, 3)] if with_fisher else None
    grads, expected = tensors(dtype, 4), tensors(dtype, 4)
    anchor_gradient_(grads, weights, anchors, fisher, strength=0.3)
    anchor_gradient_(expected, weights, anchors, fisher, strength=0.3, backend="eager")
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    pulled, other = tensors(dtype, 5), tensors(dtype, 5)
    anchor_pull_(pulled, anchors, fisher, amount=0.2)
    anchor_pull_(other, anchors, fisher, amount=0.2, backend="eager")
    assert all(torch.equal(a, b) for a, b in zip(pulled, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gated_layer_is_the_loop_over_experts(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    n, r, d_in, d_out = 8, 4, 512, 1408

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype).cuda()

    x, down, gate = drawn(300, d_in) * d_in**0.5, drawn(n * r, d_in), drawn(n, d_in)
    up = drawn(d_out, n * r)
    y, p = gated_low_rank(x, down, gate, up, scale=2.0)
    wide = [t.double() for t in (x, down, gate, up)]
    q = (wide[0] @ wide[2].T).softmax(-1)
    expected = sum(
        2.0 * q[:, i : i + 1] * (wide[0] @ wide[1][i * r : i * r + r].T)
        @ wide[3][:, i * r : i * r + r].T
        for i in range(n)
    )  # fmt: skip
    bits = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    assert float((p.double() - q).abs().max()) <= bits
    assert isinstance(expected, Tensor)
    assert float((y.double() - expected).norm() / expected.norm()) <= bits


def test_no_update_reaches_protected_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Tanh(), nn.Linear(512, 8)).cuda()
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(64, 256, generator=generator).cuda()
    layers = {"0": model[0]}
    keep = Project(layers="0", energy=1.0)
    moments = {"0": (old.T @ old).double()}
    from cl_fast.training import extend_basis

    keep.bases = {name: extend_basis(None, moments[name], energy=1.0) for name in layers}
    before = model[0].weight.detach().clone()
    keep.before_task(model, Task("new", 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(32, 256, generator=generator).cuda()).square().mean().backward()
        optimizer.step()
        keep.on_update(model)
    update = (model[0].weight.detach() - before).double()
    assert float(update.norm()) > 0
    assert float((update @ old.double().T).norm() / (update.norm() * old.double().norm())) < 1e-6
