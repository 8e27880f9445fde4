"""The combine kernel against the reference, bit for bit: every policy, dtype, shape and layout."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from cl_fast.triton_kernels import combine as kernel
from cl_fast.triton_kernels import tables
from torch import Tensor

from cl_fast.ops import Policy, combine_reference, combining, keep_mask, keep_threshold, stream_key
from cl_fast.ops.magnitude import kept_by_code, magnitude_codes, select_code
from cl_fast.ops.policy import trim_keep_count

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
import nasty

POLICIES = {
    "linear": Policy(difference=False, reduce="mean"),
    "linear sum": Policy(difference=False),
    "linear count": Policy(difference=False, reduce="mean", divisor="count"),
    "task arithmetic": Policy(),
    "task arithmetic mean": Policy(reduce="mean"),
    "elect, no trim": Policy(elect="mass", reduce="mean"),
    "ties": Policy(sparsify="trim", elect="mass", reduce="mean"),
    "ties, whole model": Policy(
        sparsify="trim",
        trim_scope="model",
        trim_ties="all",
        elect="mass",
        elect_on="unweighted",
        reduce="mean",
        divisor="count",
    ),
    "ties, none": Policy(sparsify="trim", trim_ties="none", elect="mass"),
    "ties, frequency": Policy(
        sparsify="trim", elect="frequency", elect_on="unweighted", reduce="mean"
    ),
    "ties, max": Policy(sparsify="trim", trim_ties="all", elect="mass", reduce="max"),
    "trim": Policy(sparsify="trim", rescale="l1"),
    "trim of few": Policy(sparsify="trim", trim_count="floor", rescale="keep_rate", reduce="mean"),
    "dare linear": Policy(sparsify="drop", rescale="l1"),
    "dare plain": Policy(sparsify="drop", difference=False),
    "dare ties": Policy(
        sparsify="drop",
        rescale="keep_rate",
        elect="mass",
        elect_on="unweighted",
        reduce="mean",
        divisor="count",
    ),
    "dare, frequency, max": Policy(
        sparsify="drop", rescale="l1", elect="frequency", elect_on="unweighted", reduce="max"
    ),
}
DENSITIES = (0.2, 0.37, 1.0, 0.5, 1e-4)
WEIGHTS = (0.7, 0.5, -0.25, 1.0, 0.3)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def bits(tensor: Tensor) -> Tensor:
    """The bits, every NaN alike."""
    tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def cycle(values: tuple[Any, ...], count: int, first: int = 0) -> list[Any]:
    return list(itertools.islice(itertools.cycle(values), first, first + count))


class Case:
    """Rows of models, what the orchestrator derives for them, and what must come out."""

    def __init__(
        self, name: str, bases: list[Tensor], rows: list[list[Tensor]], *, lam: float = 0.7
    ) -> None:
        self.policy = policy = POLICIES[name]
        self.bases = bases if policy.difference else []
        self.rows, self.lam = rows, lam
        self.models = models = len(rows[0])
        self.weights = cycle(WEIGHTS, models)
        self.densities = cycle(DENSITIES, models)
        if policy.sparsify == "none":
            self.densities = [1.0] * models
        self.keys = [
            [stream_key(7, f"model{k}", f"row{r}") for k in range(models)] for r in range(len(rows))
        ]
        self.thresholds = [-1] * models
        if policy.trim_scope == "model":
            self.thresholds = combining.model_thresholds(
                bases, rows, policy=policy, density=self.densities
            )

    def want(self, out_dtype: torch.dtype | None) -> list[Tensor]:
        return [
            combine_reference(
                self.bases[r] if self.bases else None,
                row,
                weights=self.weights,
                policy=self.policy,
                density=self.densities,
                keys=self.keys[r],
                thresholds=self.thresholds,
                lam=self.lam,
                out_dtype=out_dtype,
            )
            for r, row in enumerate(self.rows)
        ]

    def entry(self, r: int, k: int) -> tuple[float, int, int]:
        """Factor, code and cut."""
        policy, density = self.policy, self.densities[k]
        base = self.bases[r] if self.bases else None
        delta = combining._delta(base, self.rows[r][k], policy, torch.float32)
        codes = magnitude_codes(delta)
        _, factor = combining._sparsify(
            delta, lambda: codes, policy, 0, density, 0.0, 0.0, self.keys[r][k], self.thresholds[k]
        )
        if policy.sparsify != "trim" or density >= 1.0:
            return factor, -1, 0
        n = delta.numel()
        code, wanted = self.thresholds[k], n
        if code < 0:
            wanted = trim_keep_count(density, n, policy.trim_count)
            if wanted == 0:
                return factor, 0x7FFFFFFF, 0
            code = select_code([codes], wanted)
        keep, _ = kept_by_code(codes, code, wanted, policy.trim_ties)
        last = (keep & (codes == code)).nonzero()
        if policy.trim_ties == "all":
            return factor, code, n
        return factor, code, int(last.max()) + 1 if last.numel() else 0

    def arguments(self, *, on_device: bool = False) -> dict[str, Any]:
        policy = self.policy
        entries = [(r, k) for r in range(len(self.rows)) for k in range(self.models)]
        found = [self.entry(r, k) for r, k in entries]
        weights = [self.weights[k] for _, k in entries]
        scales = [weight * factor for weight, (factor, _, _) in zip(weights, found, strict=True)]
        rescales = [factor for factor, _, _ in found]
        by = sum(self.weights) if policy.divisor == "weights" else float(self.models)
        return {
            "weights": weights,
            "scales": torch.tensor(scales) if on_device else scales,
            "rescales": torch.tensor(rescales) if on_device else rescales,
            "sparsify": policy.sparsify,
            "codes": torch.tensor([code for _, code, _ in found], dtype=torch.int32),
            "cuts": torch.tensor([cut for _, _, cut in found], dtype=torch.int64),
            "keys": [self.keys[r][k] for r, k in entries],
            "keeps": [keep_threshold(self.densities[k]) for _, k in entries],
            "elect": policy.elect,
            "elect_on": policy.elect_on,
            "reduce": policy.reduce,
            "divisor": policy.divisor,
            "denominators": [1.0 if abs(by) < 1e-8 else by] * len(self.rows),
            "lam": self.lam,
        }

    def got(self, outs: list[Tensor], **more: Any) -> list[Tensor]:
        tensors = [tensor for row in self.rows for tensor in row]
        kernel.combine_rows(self.bases, tensors, outs, self.models, **self.arguments(**more))
        return outs

    def check(self, out_dtype: torch.dtype | None, **more: Any) -> None:
        want = self.want(out_dtype)
        got = self.got([torch.full_like(x, 77.0) for x in want], **more)
        for r, (one, other) in enumerate(zip(got, want, strict=True)):
            assert torch.equal(bits(one), bits(other)), (r, one - other)


def rows_of(
    lengths: tuple[int, ...], models: int, kind: str = "normal", dtype: torch.dtype = torch.bfloat16
) -> tuple[list[Tensor], list[list[Tensor]]]:
    made = [nasty.models(kind, n, models, dtype, seed=r) for r, n in enumerate(lengths)]
    return [base for base, _ in made], [tensors for _, tensors in made]


@pytest.mark.parametrize("models", [1, 3, 8])
@pytest.mark.parametrize("name", POLICIES)
def test_policies(name: str, models: int) -> None:
    Case(name, *rows_of((700, 1, 0, 515), models)).check(torch.float32, on_device=models == 3)


@pytest.mark.parametrize("name", ["task arithmetic", "elect, no trim", "ties", "dare ties"])
def test_many_models(name: str) -> None:
    for models, n in ((9, 520), (32, 20 if name == "dare ties" else 520)):
        Case(name, *rows_of((n,), models)).check(torch.float32)
    Case("dare linear", *rows_of((20,), 32)).check(torch.float32)
    Case("trim", *rows_of((530,), 7)).check(torch.float32)
    Case("dare plain", *rows_of((530,), 6)).check(torch.float32)


@pytest.mark.parametrize("kind", nasty.KINDS)
def test_kinds(kind: str) -> None:
    names = ["task arithmetic", "ties", "ties, none", "ties, max", "ties, frequency", "trim"]
    for name in names:
        # The interpreter reads a denormal bfloat16 wrongly.
        for dtype in (torch.float32, torch.float16 if kind == "denormal" else torch.bfloat16):
            Case(name, *rows_of((600, 17), 3, kind, dtype), lam=1.0).check(torch.float32)
    # A sum that begins with -0 by a loop, and one that is unrolled.
    for models in (1, 9):
        Case("linear sum", *rows_of((530,), models, kind, torch.float32), lam=1.0).check(
            torch.float32
        )


def test_not_a_number() -> None:
    for name in ("task arithmetic", "elect, no trim", "ties", "ties, max", "dare ties"):
        bases, rows = rows_of((600,), 3, dtype=torch.float32)
        for k, (value, count) in enumerate(
            ((float("nan"), 300), (float("inf"), 40), (-float("inf"), 250))
        ):
            rows[0][k][7 : 7 + count] = value  # more than are kept: a threshold that is no number
        Case(name, bases, rows).check(torch.float32)


def test_mixtures() -> None:
    names = ("task arithmetic", "ties", "dare linear")
    for name, base_dtype, out_dtype in zip(names, DTYPES, (*DTYPES[:2], DTYPES[0]), strict=True):
        for models in (1, 2, 3, 10):
            bases, rows = rows_of((520, 30), models, dtype=torch.float32)
            for r, row in enumerate(rows):  # a signature for each row
                row[:] = [
                    x.to(dtype) for x, dtype in zip(row, cycle(DTYPES, models, r), strict=True)
                ]
            Case(name, [base.to(base_dtype) for base in bases], rows).check(out_dtype)
    for dtype in DTYPES[:2]:
        Case("ties", *rows_of((520,), 9, dtype=dtype)).check(None)


def test_bfloat16_output() -> None:
    """The interpreter truncates this cast instead of rounding it: one spacing is free."""
    for name in ("linear", "ties", "dare linear"):
        case = Case(name, *rows_of((520, 3), 3))
        want = case.want(None)
        for one, other in zip(case.got([torch.empty_like(x) for x in want]), want, strict=True):
            assert one.dtype == torch.bfloat16
            torch.testing.assert_close(one, other, rtol=2.0**-7, atol=0.0)


def test_views_that_start_anywhere() -> None:
    for name in ("task arithmetic", "ties", "dare linear"):
        bases, rows = rows_of((601, 515), 2)
        for shift in (0, 1, 8):
            cut = Case(name, [b[shift:] for b in bases], [[x[shift:] for x in r] for r in rows])
            cut.check(torch.float32)
        assert bases[0][1:].data_ptr() % 16
    out = torch.full((530,), 77.0)
    case = Case("linear", *rows_of((526,), 3))
    case.got([out[3:-1]])
    assert torch.equal(out[3:-1], case.want(torch.float32)[0])
    assert out[:3].eq(77).all()
    assert out[-1] == 77


def test_shapes() -> None:
    bases, rows = rows_of((24, 1), 3)
    bases = [bases[0].view(2, 3, 4), bases[1].view(())]
    rows = [[x.view(2, 3, 4) for x in rows[0]], [x.view(()) for x in rows[1]]]
    Case("ties", bases, rows).check(torch.float32)


def test_in_place() -> None:
    for name in ("task arithmetic", "ties", "dare ties"):
        for models in (3, 9):
            case = Case(name, *rows_of((600,), models, dtype=torch.float32))
            want = case.want(None)
            case.got(case.bases)
            assert torch.equal(bits(case.bases[0]), bits(want[0]))


def test_spans_of_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_PROGRAMS", 4)  # 12 tiles: programs of three
    for name in ("task arithmetic", "ties", "dare linear"):
        Case(name, *rows_of((512 * 7 + 100, 512 * 4, 5), 2)).check(torch.float32)


def test_more_rows_than_the_fan() -> None:
    lengths = tuple(1 + r % 3 for r in range(70))
    Case("task arithmetic", *rows_of(lengths, 2)).check(torch.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _find_kernel(table, rows, width, programs_ptr, o_ptr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0)
    tl.store(o_ptr + i, kernel._find_row(table, rows, width, tl.load(programs_ptr + i)))


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 4095, 4096, 4097, 5000])
def test_search(rows: int) -> None:
    sizes = 1 + torch.arange(rows) % 5 * (torch.arange(rows) % 7)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))
    places = torch.tensor([0, rows // 3, rows // 2, rows - 1])
    programs = torch.cat((starts[places], starts[places + 1] - 1))
    out = torch.empty_like(programs)
    _find_kernel[(8,)](starts[:-1].contiguous(), rows, kernel._width(rows), programs, out)
    assert out.tolist() == [*places.tolist(), *places.tolist()]


def pack(x: Tensor, key: int, threshold: int) -> tuple[Tensor, Tensor]:
    """Values and offsets of a drop, by plain torch."""
    keep = keep_mask(key, x.numel(), threshold)
    counts = torch.tensor([int(part.sum()) for part in keep.split(2048)], dtype=torch.int64)
    return x[keep], torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))


@pytest.mark.parametrize("elect", ["none", "mass"])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("lengths", [(2048 + 700,), (2048, 1, 0, 40)])
def test_packed(lengths: tuple[int, ...], with_base: bool, elect: str) -> None:
    for models in (1, 3, 5) if len(lengths) > 1 else (2,):
        bases, rows = rows_of(lengths, models)
        deltas = Policy(difference=False, sparsify="drop", elect=elect, reduce="sum")
        weights = cycle(WEIGHTS, models)
        tensors: list[Tensor] = []
        packed: list[Tensor | None] = []
        kinds, keys, keeps, want = [], [], [], []
        for r, (base, row) in enumerate(zip(bases, rows, strict=True)):
            sent = []
            for k, x in enumerate(row):
                keys.append(stream_key(1, f"model{k}", f"{r}"))
                density = (0.3, 0.9, 1.0)[(r + k) % 3]
                keeps.append(keep_threshold(density))
                kinds.append((r + k) % 2)
                x = x.to(DTYPES[k % 3])
                values, offsets = pack(x, keys[-1], keeps[-1])
                dense = k == 1  # it lies beside packed ones and is dropped on the way
                tensors.append(x if dense else values)
                packed.append(None if dense else offsets)
                subtracts = with_base and kinds[-1] == 0
                sent.append(x.float() - base.float() if subtracts else x.float())
            densities = [(0.3, 0.9, 1.0)[(r + k) % 3] for k in range(models)]
            total = combine_reference(
                None,
                sent,
                weights=weights,
                policy=deltas,
                density=densities,
                keys=keys[-models:],
                lam=0.7,
            )
            want.append(base.float() + total if with_base else total)
        outs = [torch.full((n,), 77.0) for n in lengths]
        kernel.combine_rows(
            bases if with_base else [],
            tensors,
            outs,
            models,
            weights=weights * len(rows),
            scales=weights * len(rows),
            sparsify="drop",
            keys=keys,
            keeps=keeps,
            packed=packed,
            kinds=kinds,
            elect=elect,
            lam=0.7,
        )
        for one, other in zip(outs, want, strict=True):
            assert torch.equal(bits(one), bits(other))


def test_offsets_of_another_stream_read_nothing_outside() -> None:
    memory = torch.full((3000,), float("nan"))
    memory[1000:1100] = 1.0
    out = torch.full((2500,), 77.0)
    for wrong in (5000, -5000, 50):
        kernel.combine_rows(
            [],
            [memory[1000:1100]],
            [out],
            1,
            weights=[1.0],
            scales=[2.0],
            sparsify="drop",
            keys=[1],
            keeps=[1 << 31],
            packed=[torch.tensor([wrong, wrong, wrong])],
            kinds=[0],
        )
        assert set(out.unique().tolist()) <= {0.0, 2.0}


def test_no_packed_entry_is_dense() -> None:
    case = Case("dare linear", *rows_of((100,), 2))
    arguments = case.arguments()
    outs = case.got([torch.empty(100)])
    again = [torch.empty(100)]
    kernel.combine_rows(
        case.bases, case.rows[0], again, 2, **arguments, packed=[None, None], kinds=[0, 0]
    )
    assert torch.equal(outs[0], again[0])


def test_floats_share_words() -> None:
    values = [0.1, -2.5, 1e-40]
    words = tables.upload(kernel._words(values), "cpu").view(torch.float32)
    assert torch.equal(words, torch.tensor([*values, 0.0]))


def test_bad_arguments() -> None:
    x = torch.ones(4)
    for models in (0, 33):
        with pytest.raises(ValueError, match=r"models must be in 1 \.\. 32"):
            kernel.combine_rows([], [x] * models, [x], models, weights=[], scales=[])
    with pytest.raises(ValueError, match="packed entries cannot be trimmed"):
        kernel.combine_rows(
            [], [x], [x], 1, weights=[1.0], scales=[1.0], sparsify="trim", packed=[x]
        )
