"""The tile engine: exact selection, and results that depend on nothing but their inputs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
SPACE = 65536  # the smallest tile


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(
    core: ModuleType,
    base: torch.Tensor | None,
    models: list[torch.Tensor],
    *,
    weights: list[float] | None = None,
    density: float = 1.0,
    out: torch.dtype = torch.bfloat16,
    threads: int = 1,
    tile: int = SPACE,
    nan: str = "refuse",
    keep: int | None = None,
    **policy: Any,
) -> tuple[torch.Tensor, dict[str, Any]]:
    n = models[0].numel()
    job = core.Job(threads=threads, tile_elements=tile, nan=nan)
    result = torch.full((n,), 7.0, dtype=out)
    task = job.add_task(
        n,
        NAMES[out],
        result.data_ptr(),
        base=None if base is None else (NAMES[base.dtype], base.data_ptr(), -1, 0),
        difference=base is not None,
        **policy,
    )
    for k, x in enumerate(models):
        job.add_term(
            task,
            NAMES[x.dtype],
            x.data_ptr(),
            weight=1.0 if weights is None else weights[k],
            density=density,
            key=100 + k,
            keep_threshold=int(density * 2**32),
            keep_count=max(1, int(density * n)) if keep is None else keep,
        )
    job.run()
    return result, job.result(task)


def distributions(n: int) -> dict[str, torch.Tensor]:
    g = generator(n)
    noise = torch.randn(n, generator=g)
    ramp = torch.linspace(0, 1, n)
    return {
        "normal": noise,
        "heavy tails": noise * torch.exp(3 * torch.randn(n, generator=g)),
        "rounded": (noise * 8).round() / 8,  # thousands of ties at every threshold
        "one value": torch.full((n,), -0.25),
        "zeros": torch.zeros(n),
        "nearly all zeros": torch.where(torch.rand(n, generator=g) < 0.01, noise, 0.0),
        # what a sample of a few runs does not see
        "late outliers": torch.where(torch.arange(n) >= n - n // 3 - 5, noise * 1e4, noise),
        "ramp": ramp.pow(20),
        "denormals": noise * 1e-41,
        "stripes": noise * (1 + 100 * ((torch.arange(n) // 1000) % 7 == 3)),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("n", [1, 7, 1000, 20_000, 70_001, 300_017])
def test_selection_is_exact(core: ModuleType, n: int, dtype: torch.dtype) -> None:
    if core.isa() == "portable" and n > 100_000 and dtype != torch.bfloat16:
        n = 150_000  # the same paths, in less time
    for name, values in distributions(n).items():
        x = values.clamp(-6e4, 6e4).to(dtype)  # within half precision
        codes = x.float().abs().view(torch.int32)
        order = codes.sort(descending=True).values
        for keep in sorted({1, max(1, n // 5), max(1, n // 2), n}):
            want = int(order[keep - 1])
            for ties in ("first", "all", "none"):
                if ties != "first" and keep not in (1, max(1, n // 5)):
                    continue
                out, info = run(
                    core, None, [x], out=torch.float32, sparsify="trim", trim_ties=ties,
                    density=0.5, keep=keep, threads=2,
                )  # fmt: skip
                kept = codes > want
                tied = codes == want
                if ties == "all":
                    kept |= tied
                elif ties == "first":
                    kept |= tied & (tied.cumsum(0) <= keep - int(kept.sum()))
                    assert info["kept"] == [keep]
                assert info["thresholds"] == [want], (name, keep)
                assert info["kept"] == [int(kept.sum())], (name, keep, ties)
                assert torch.equal(out, torch.where(kept, x.float(), 0.0)), (name, keep, ties)


def test_selection_on_deltas_of_other_types(core: ModuleType) -> None:
    g = generator(5)
    base = torch.randn(200_003, generator=g).half()
    x = (base.float() + 0.01 * torch.randn(200_003, generator=g)).bfloat16()
    codes = (x.float() - base.float()).abs().view(torch.int32)
    _, info = run(core, base, [x], density=0.3, sparsify="trim", trim_ties="all")
    assert info["thresholds"] == [int(codes.sort(descending=True).values[int(0.3 * 200_003) - 1])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_selection_over_a_whole_model(core: ModuleType, dtype: torch.dtype) -> None:
    g = generator(6)
    sizes = [1, 300_000, 0, 17, 90_000, 65_536]
    scales = [100.0, 1.0, 1.0, 1e-3, 30.0, 0.1]  # one threshold for all: tensors differ in share
    models = [
        [(torch.randn(n, generator=g) * s).to(dtype) for n, s in zip(sizes, scales, strict=True)]
        for _ in range(2)
    ]
    total = sum(sizes)
    for share in (1 / total, 0.01, 0.2, 1.0):
        job = core.Job(threads=3, tile_elements=SPACE)
        sink = torch.empty(max(sizes), dtype=dtype)
        for i, n in enumerate(sizes):
            task = job.add_task(n, NAMES[dtype], sink.data_ptr(), sparsify="trim")
            for m in models:
                job.add_term(task, NAMES[dtype], m[i].data_ptr())
        keep = max(1, int(share * total))
        got = job.select_model([keep, min(total, keep + 5)])
        for m, k, code in zip(models, (keep, min(total, keep + 5)), got, strict=True):
            everything = torch.cat(m).float().abs().view(torch.int32).sort(descending=True).values
            assert code == int(everything[k - 1])


def policies() -> dict[str, dict[str, Any]]:
    return {
        "soup": {"difference": False, "reduce": "mean"},
        "arithmetic": {},
        "count mean": {"reduce": "mean", "divisor": "count"},
        "trim": {"sparsify": "trim", "density": 0.3},
        "ties": {"sparsify": "trim", "density": 0.2, "elect": "mass", "reduce": "mean"},
        "ties, all": {"sparsify": "trim", "density": 0.2, "trim_ties": "all", "elect": "mass"},
        "ties, l1": {"sparsify": "trim", "density": 0.2, "rescale": "l1", "elect": "mass"},
        "peft": {"sparsify": "trim", "density": 0.4, "elect": "mass", "elect_on": "unweighted",
                 "reduce": "mean", "divisor": "count"},
        "frequency": {"sparsify": "trim", "density": 0.6, "elect": "frequency", "reduce": "mean"},
        "largest": {"sparsify": "trim", "density": 0.6, "elect": "mass", "reduce": "max"},
        "dare": {"sparsify": "drop", "density": 0.1, "rescale": "l1"},
        "dare, keep rate": {"sparsify": "drop", "density": 0.1, "rescale": "keep_rate"},
        "dare ties": {"sparsify": "drop", "density": 0.3, "rescale": "l1", "elect": "mass",
                      "elect_on": "unweighted"},
    }  # fmt: skip


def inputs(n: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    g = generator(seed)
    base = torch.randn(n, generator=g).mul(0.02).to(dtype)
    models = [
        (base.float() + 4e-4 * torch.randn(n, generator=g) * torch.randn(n, generator=g).exp()).to(
            dtype
        )
        for _ in range(3)
    ]
    return base, models


@pytest.mark.parametrize("name", policies())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_threads_tiles_and_instruction_sets_give_the_same_bits(
    core: ModuleType, name: str, dtype: torch.dtype
) -> None:
    n = 3 * SPACE + 4097 + 31
    base, models = inputs(n, dtype)
    policy = {"lam": 0.7, **policies()[name]}
    use_base = policy.pop("difference", True)
    isa = core.isa()
    reference = None
    for threads, tile in ((1, SPACE), (3, SPACE), (2, 2 * SPACE), (1, 8 * SPACE)):
        got, info = run(
            core, base if use_base else None, models, weights=[0.5, -0.3, 1.1], out=dtype,
            threads=threads, tile=tile, **policy,
        )  # fmt: skip
        if reference is None:
            core.set_isa("portable")
            reference, first = run(
                core, base if use_base else None, models, weights=[0.5, -0.3, 1.1], out=dtype,
                **policy,
            )  # fmt: skip
            core.set_isa(isa)
        assert torch.equal(got.view(torch.uint8), reference.view(torch.uint8))
        assert info == first


def test_mixed_types_give_the_bits_of_widened_ones(core: ModuleType) -> None:
    base, models = inputs(70_003, torch.bfloat16)
    mixed = [models[0].float(), models[1], models[2].half()]
    policy = policies()["ties"]
    want, _ = run(core, base.float(), [m.float() for m in mixed], out=torch.float32, **policy)
    got, _ = run(core, base, mixed, out=torch.float32, **policy)
    assert torch.equal(got, want)


@pytest.mark.parametrize("mode", ["mmap", "pread", "direct"])
def test_files_give_the_bits_of_memory(core: ModuleType, mode: str, tmp_path: Path) -> None:
    n = 2 * SPACE + 333
    base, models = inputs(n, torch.bfloat16)
    policy = policies()["ties"]
    density = policy.pop("density")
    want, _ = run(core, base, models, density=density, **policy)
    offset = 1234 + 1  # tensors need not be aligned in any way
    for i, x in enumerate([base, *models]):
        raw = x.view(torch.uint8).numpy().tobytes()
        (tmp_path / f"{i}").write_bytes(b"h" * offset + raw + b"t" * 9)
    (tmp_path / "out").write_bytes(bytes(10 + 2 * n + 5))
    job = core.Job(threads=2, tile_elements=SPACE)
    files = [job.file(str(tmp_path / f"{i}"), mode) for i in range(4)]
    task = job.add_task(
        n, "BF16", out_file=job.output(str(tmp_path / "out")), out_offset=10,
        base=("BF16", 0, files[0], offset), difference=True, **policy,
    )  # fmt: skip
    for f in files[1:]:
        job.add_term(
            task, "BF16", file=f, offset=offset, density=density, keep_count=int(density * n)
        )
    job.run()
    written = (tmp_path / "out").read_bytes()
    assert written[:10] == bytes(10)
    assert written[-5:] == bytes(5)
    assert written[10:-5] == want.view(torch.uint8).numpy().tobytes()
    info = job.result(task)
    assert info["crc_out"] == core.crc64(written[10:-5])
    assert info["crc_in"] == [core.crc64(x.view(torch.uint8).numpy()) for x in [base, *models]]
    done, total = job.progress()
    assert done == total > 0


def test_copies_are_compared(core: ModuleType) -> None:
    x = torch.arange(3 * SPACE + 5, dtype=torch.int64).to(torch.uint8)
    other = x.clone()
    other[-1] += 1
    out = torch.zeros_like(x)
    sources = [x, x.clone(), other]
    job = core.Job(threads=2, tile_elements=SPACE)
    task = job.add_task(x.numel(), "BYTES", out.data_ptr(), kind="copy")
    for source in sources:
        job.add_term(task, "BYTES", source.data_ptr())
    job.run()
    assert torch.equal(out, x)
    assert job.result(task)["mismatch"] == [2]


@pytest.mark.parametrize("name", ["soup", "arithmetic", "ties", "dare", "frequency"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 2047, 2048, 66_000, 70_002])
def test_values_that_are_not_finite_are_counted(
    core: ModuleType, name: str, dtype: torch.dtype, bad: float, position: int
) -> None:
    base, models = inputs(70_003, dtype)
    models[1][position] = bad
    policy = dict(policies()[name])
    if policy.pop("difference", True):
        _, info = run(core, base, models, out=dtype, nan="propagate", **policy)
        assert info["nonfinite"][:4] == [0, 0, 1, 0]
        base = base.clone()
        base[position] = bad
        _, info = run(core, base, models, out=dtype, nan="propagate", **policy)
        assert info["nonfinite"][:4] == [1, 1, 1, 1]  # every delta inherits it
    else:
        _, info = run(core, None, models, out=dtype, nan="propagate", **policy)
        assert info["nonfinite"][:3] == [0, 1, 0]


@pytest.mark.parametrize("name", policies())
def test_policy_zero_takes_a_bad_value_as_no_change(core: ModuleType, name: str) -> None:
    base, models = inputs(140_003, torch.bfloat16)
    spots = [3, 2500, 70_000, 140_002]
    good = [m.clone() for m in models]
    policy = dict(policies()[name])
    use_base = policy.pop("difference", True)
    for i in spots:
        models[2][i] = float("nan")
        good[2][i] = base[i] if use_base else 0.0
    got, info = run(core, base if use_base else None, models, nan="zero", **policy)
    want, _ = run(core, base if use_base else None, good, **policy)
    assert torch.equal(got, want)
    assert info["nonfinite"][3 if use_base else 2] == len(spots)


def test_overflow_of_the_output_is_counted(core: ModuleType) -> None:
    x = torch.full((5000,), 1.0)
    x[[7, 4999]] = 65_520.0  # rounds to infinity in half precision; 65519 does not
    x[8] = 65_519.0
    for size in (5000, 4096):
        y = torch.cat([x[-size:], x[:16]]) if size == 4096 else x
        _, info = run(core, None, [y], out=torch.float16, nan="propagate")
        assert info["nonfinite"] == [0, int((y >= 65_520).sum())]


def test_an_empty_tensor_and_one_element(core: ModuleType) -> None:
    for n in (0, 1):
        base, models = inputs(n, torch.bfloat16)
        out, info = run(core, base, models, **policies()["ties"])
        assert out.numel() == n
        assert info["crc_out"] == core.crc64(out.view(torch.uint8).numpy())


def test_file_errors_name_the_file(core: ModuleType, tmp_path: Path) -> None:
    job = core.Job(threads=1)
    with pytest.raises(FileNotFoundError) as missing:
        job.file(str(tmp_path / "absent"))
    assert missing.value.filename == str(tmp_path / "absent")
    (tmp_path / "short").write_bytes(bytes(100))
    short = job.file(str(tmp_path / "short"))
    out = torch.empty(64, dtype=torch.bfloat16)
    task = job.add_task(64, "BF16", out.data_ptr())
    with pytest.raises(ValueError, match="short: a tensor lies outside the file"):
        job.add_term(task, "BF16", file=short, offset=0)


def test_a_failing_write_reaches_the_caller(core: ModuleType) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    _, models = inputs(4 * SPACE, torch.bfloat16)
    job = core.Job(threads=3, tile_elements=SPACE)
    full = job.output("/dev/full")
    task = job.add_task(4 * SPACE, "BF16", out_file=full)
    for m in models:
        job.add_term(task, "BF16", m.data_ptr())
    with pytest.raises(OSError, match="No space left on device") as error:
        job.run()
    assert error.value.filename == "/dev/full"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"out_dtype": "F64"}, "destination dtype must be one of BF16, F16, F32, got 'F64'"),
        ({"elect": "vote"}, "elect must be one of none, mass, frequency, got 'vote'"),
        ({"difference": True}, "difference needs a base"),
        ({"reduce": "max"}, "reduce max needs an election"),
        ({"n": -1}, "n must not be negative"),
    ],
)
def test_wrong_tasks_are_refused(core: ModuleType, arguments: dict[str, Any], words: str) -> None:
    out = torch.empty(8)
    call = {"n": 8, "out_dtype": "F32", "out_ptr": out.data_ptr(), **arguments}
    with pytest.raises(ValueError, match=words):
        core.Job(threads=1).add_task(**call)


def test_more_than_two_to_the_31_elements(core: ModuleType, tmp_path: Path) -> None:
    """A sparse file: holes on disk, a few values beyond the range of a 32-bit index."""
    if core.isa() == "portable":
        pytest.skip("the offsets are the same code for all, and this path takes a minute")
    n = 2**31 + 70_000
    with (tmp_path / "huge").open("wb") as f:
        f.truncate(2 * n)
        for i, value in enumerate((3.0, -2.0, 1.0, 1.0)):
            f.seek(2 * (n - 10 + i))
            f.write(torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    job = core.Job(threads=2)
    huge = job.file(str(tmp_path / "huge"))
    sink = torch.empty(1, dtype=torch.bfloat16)
    task = job.add_task(n, "BF16", sink.data_ptr(), sparsify="trim")
    job.add_term(task, "BF16", file=huge)
    two = int(torch.tensor([2.0]).view(torch.int32))
    assert job.select_model([2]) == [two]
