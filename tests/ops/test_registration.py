"""The ops as torch sees them: schema, fake, autograd, torch.compile."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import nasty
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cl_fast import backends
from cl_fast.backends import device_ops, native
from cl_fast.ops import Policy, combine, combine_many, dare, magnitude_threshold, stream_key
from cl_fast.ops.dropping import _Drop

TIES = Policy(sparsify="trim", elect="mass", reduce="mean")
DARE = Policy(sparsify="drop", rescale="l1")
BAND = Policy(sparsify="band", trim_count="floor")
MAGPRUNE = Policy(sparsify="magprune", rescale="keep_rate", elect="mass")
LINEAR = Policy(difference=False, reduce="mean")
KEYS = [stream_key(0, f"m{k}", "w") for k in range(3)]


def numbers(policy: Policy, entries: int, density: float = 0.5) -> list:
    """What follows the tensors in the schemas."""
    fields = [getattr(policy, name) for name in Policy.__dataclass_fields__]
    keys = [key - (1 << 64) if key >= 1 << 63 else key for key in KEYS[:entries]]
    halves = [0.25 if policy.sparsify == "magprune" else 0.0] * entries
    gammas = [0.0] * entries
    settings = [[1.0] * entries, [density] * entries, gammas, halves, keys, [-1] * entries]
    return [*settings, *fields, 0.5, None]


@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize(
    "policy", [TIES, DARE, BAND, MAGPRUNE], ids=["ties", "dare", "breadcrumbs", "della"]
)
def test_opcheck_combine(policy: Policy, dtype: torch.dtype) -> None:
    base, tensors = nasty.models("normal", 40, 3, dtype)
    arguments = (base.view(5, 8), [t.view(5, 8) for t in tensors], *numbers(policy, 3))
    torch.library.opcheck(torch.ops.cl_fast.combine, arguments)
    many = ([base], tensors, 3, *numbers(policy, 3))
    torch.library.opcheck(torch.ops.cl_fast.combine_many, many)


def test_opcheck_combine_without_base() -> None:
    _, tensors = nasty.models("normal", 40, 2)
    arguments = (None, tensors, *numbers(LINEAR, 2, 1.0))
    torch.library.opcheck(torch.ops.cl_fast.combine, arguments)


@pytest.mark.parametrize("rescale", ["none", "keep_rate", "l1"])
@pytest.mark.parametrize("dtype", [*nasty.DTYPES, torch.float64])
def test_opcheck_dare(dtype: torch.dtype, rescale: str) -> None:
    x = torch.randn(5, 8).to(dtype).t()
    for requires_grad in (False, True):
        delta = x.detach().requires_grad_(requires_grad)
        torch.library.opcheck(torch.ops.cl_fast.dare, (delta, 0.5, -3, "m", "t", rescale))


@pytest.mark.parametrize("ties", ["first", "all", "none"])
def test_opcheck_magnitude_threshold(ties: str) -> None:
    x = torch.randn(5, 8).bfloat16()
    op = torch.ops.cl_fast.magnitude_threshold
    torch.library.opcheck(op, (x, None, 7, ties))
    torch.library.opcheck(op, (x, x.float() + 1.0, 7, ties))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(compiler: str) -> None:
    def step(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        merged = combine(base * 1.0, [a, b], weights=[1.0, 0.5], policy=TIES, density=0.3)
        (soup,) = combine_many(None, [[a, b]], weights=1.0, policy=LINEAR)
        threshold, _ = magnitude_threshold(a, density=0.25, base=base)
        return merged + soup + dare(b, density=0.5, seed=3) + threshold

    base, (a, b) = nasty.models("normal", 1000, 2, torch.float32)
    if compiler == "inductor":
        try:
            compiled = torch.compile(step, fullgraph=True, backend="inductor")
            got = compiled(base, a, b)
        except torch._inductor.exc.InductorError as error:
            pytest.skip(f"inductor cannot compile here: {str(error).splitlines()[0]}")
    else:
        got = torch.compile(step, fullgraph=True, backend=compiler)(base, a, b)
    # what surrounds the ops may be fused; the ops themselves give the same bits
    torch.testing.assert_close(got, step(base, a, b), rtol=1e-6, atol=1e-7)


def test_compile_with_gradient() -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return (dare(x, density=0.5, rescale="l1") ** 2).sum()

    x = torch.randn(100, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    loss(x).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(y).backward()
    torch.testing.assert_close(y.grad, x.grad)


def test_compile_once_for_all_seeds() -> None:
    torch._dynamo.reset()
    step = torch.compile(
        lambda x, seed: dare(x, density=0.5, seed=seed), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(100)
    for seed in range(4):
        assert torch.equal(step(x, seed), dare(x, density=0.5, seed=seed))


def test_compile_says_the_same_words() -> None:
    def bad(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.cl_fast.dare(x, 2.0, 0, "m", "t", "none")

    with pytest.raises(Exception, match=r"density must be in \(0, 1\]; got 2.0"):
        torch.compile(bad, fullgraph=True, backend="aot_eager")(torch.zeros(3))


def test_fake_shapes_and_dtypes() -> None:
    with FakeTensorMode():
        base, x = torch.empty(3, 4, dtype=torch.bfloat16), torch.empty(3, 4)
        out = combine(base, [x, x], weights=1.0)
        assert (out.shape, out.dtype) == ((3, 4), torch.bfloat16)
        assert combine(base, [x], weights=1.0, out_dtype=torch.float16).dtype == torch.float16
        assert dare(x.t(), density=0.5).shape == (4, 3)
        threshold, keep = magnitude_threshold(base, k=3)
        assert (threshold.shape, threshold.dtype, keep.dtype) == ((), torch.float32, torch.int64)
    meta = torch.empty(3, 4, device="meta")
    outs = combine_many([meta], [[meta]], weights=1.0)
    assert outs[0].device.type == "meta"


def test_combine_has_no_gradient_and_says_so() -> None:
    x = torch.randn(4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"backward.*cl_fast[.:]+combine"):
        combine(torch.zeros(4), [x], weights=1.0).sum().backward()
    with pytest.raises(RuntimeError, match=r"backward.*cl_fast[.:]+combine_many"):
        combine_many([torch.zeros(4)], [[x]], weights=1.0)[0].sum().backward()


def test_a_missing_core_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_module", None)
    monkeypatch.setattr(native, "_failure", "the C++ core is not built")
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.delenv("CL_FAST_NATIVE", raising=False)
    with pytest.warns(RuntimeWarning, match="eager reference: the C\\+\\+ core is not built"):
        dare(torch.zeros(3), density=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dare(torch.zeros(3), density=0.5)
    with pytest.raises(RuntimeError, match="backend='native' cannot be used: the C"):
        dare(torch.zeros(3), density=0.5, backend="native")


def test_a_core_switched_off_is_not_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CL_FAST_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dare(torch.zeros(3), density=0.5)
    assert native.load() is None
    assert native.reason() == "CL_FAST_NATIVE=0 switches the C++ core off"


def test_without_kernels_for_a_gpu_the_reference_serves_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for kernels in ("magnitude", "sums", "combine"):
        monkeypatch.setitem(sys.modules, f"cl_fast.triton_kernels.{kernels}", None)
    monkeypatch.setattr(backends, "_said", set())
    x = torch.randn(100)
    with pytest.warns(RuntimeWarning, match=r"eager reference on CUDA tensors.*cl_fast\[triton\]"):
        by = device_ops.engine(x.device)
    assert by is None
    out = _Drop(0.5, 0, "", "", "none").device(x, by)
    assert torch.equal(out, dare(x, density=0.5, rescale="none"))
    with pytest.raises(RuntimeError, match="backend='triton' cannot be used: triton is not"):
        device_ops.require("triton", x.device)


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CL_FAST_THREADS", raising=False)
    assert native.threads() >= 1
    monkeypatch.setenv("CL_FAST_THREADS", "3")
    assert native.threads() == 3
    for bad in ("0", "-1", "two", ""):
        monkeypatch.setenv("CL_FAST_THREADS", bad)
        with pytest.raises(ValueError, match="CL_FAST_THREADS must be a positive integer"):
            native.threads()


def test_import_needs_no_torch() -> None:
    code = (
        "import sys, cl_fast, cl_fast.ops, cl_fast.ops.policy, cl_fast.ops.streams, "
        "cl_fast.backends.native; "
        "assert not {'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules), sys.modules.keys()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-S", "-c", code], check=True, env=environment)
