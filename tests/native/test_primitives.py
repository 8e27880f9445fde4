"""Conversions, checksums and random numbers of the C++ core, against torch and published values."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
import torch

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SMALL = FLOATS | {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def convert(core: ModuleType, x: torch.Tensor, source: str, target: str) -> torch.Tensor:
    out = torch.full((x.numel(),), float("nan"), dtype=FLOATS[target])
    core.convert(source, target, x.data_ptr(), out.data_ptr(), x.numel())
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, where every NaN counts as the same."""
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    equal = (a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())
    return bool(equal.all())


@pytest.mark.parametrize("name", [n for n in SMALL if n != "F32"])
def test_every_narrow_value_widens_exactly(core: ModuleType, name: str) -> None:
    dtype = SMALL[name]
    if dtype.itemsize == 2:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        x = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    assert same(convert(core, x, name, "F32"), x.to(torch.float32))


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_stores_round_to_nearest_even(core: ModuleType, name: str) -> None:
    dtype = FLOATS[name]
    narrow = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    exact = narrow.float()[~narrow.isnan() & ~narrow.isinf()].sort().values.unique()
    ties = (exact[1:].double() + exact[:-1].double()).div(2).float()  # halfway: exact in float32
    generator = torch.Generator().manual_seed(1)
    anything = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator).to(torch.int32)
    x = torch.cat(
        [
            exact,
            ties,
            torch.nextafter(ties, torch.tensor(torch.inf)),
            torch.nextafter(ties, torch.tensor(-torch.inf)),
            anything.view(torch.float32),
            torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.9, 65520.0, 3.4e38]),
        ]
    )
    assert same(convert(core, x, "F32", name), x.to(dtype))


def test_nan_is_stored_the_same_everywhere(core: ModuleType) -> None:
    bits = torch.tensor([0x7F800001, -0x7FFFFF, 0x7FFFFFFF, -1], dtype=torch.int32)
    x = bits.view(torch.float32)
    assert convert(core, x, "F32", "BF16").view(torch.int16).tolist() == [0x7FC0] * 4
    assert convert(core, x, "F32", "F16").view(torch.int16).tolist() == [0x7E00] * 4
    assert convert(core, x, "F32", "F32").view(torch.int32).tolist() == [0x7FC00000] * 4


def test_flush_to_zero_of_the_caller_does_not_reach_the_core(core: ModuleType) -> None:
    x = torch.tensor([1e-40, -3e-39, 1e-45] * 11)
    before = torch.get_flush_denormal() if hasattr(torch, "get_flush_denormal") else False
    assert torch.set_flush_denormal(True), "this processor has no flush-to-zero mode"
    try:
        got = convert(core, x, "F32", "BF16")
    finally:
        torch.set_flush_denormal(before)
    assert same(got, x.to(torch.bfloat16))
    assert got.count_nonzero() > 0


def test_crc_has_the_published_check_value(core: ModuleType) -> None:
    assert core.crc64(b"123456789") == 0xAE8B14860A799888
    assert core.crc64(b"") == 0


def bitwise_crc64(data: bytes) -> int:
    crc = 2**64 - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x9A6C9329AC4BC9B5 if crc & 1 else 0)
    return crc ^ (2**64 - 1)


def test_crc_of_any_length_and_split(core: ModuleType) -> None:
    rng = random.Random(3)
    data = rng.randbytes(5000)
    for n in [*range(70), 127, 128, 129, 255, 256, 511, 512, 513, 1023, 1024, 2049, 5000]:
        want = bitwise_crc64(data[:n])
        assert core.crc64(data[:n]) == want
        cut = rng.randint(0, n)
        first, second = core.crc64(data[:cut]), core.crc64(data[cut:n])
        assert core.crc64(data[cut:n], first) == want
        assert core.crc64_combine(first, second, n - cut) == want


def test_crc_sees_every_single_bit(core: ModuleType) -> None:
    data = bytearray(random.Random(4).randbytes(1024))
    seen = {core.crc64(bytes(data))}
    for bit in range(0, 8 * len(data), 37):
        data[bit // 8] ^= 1 << (bit % 8)
        seen.add(core.crc64(bytes(data)))
        data[bit // 8] ^= 1 << (bit % 8)
    assert len(seen) == 1 + len(range(0, 8 * len(data), 37))


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [  # the known answers that Random123 ships for philox4x32, 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    core: ModuleType, counter: tuple[int, ...], key: tuple[int, ...], want: tuple[int, ...]
) -> None:
    assert tuple(core.philox4x32_10(counter, key)) == want


@pytest.mark.parametrize("threshold", [0, 1, 2**24, 2**31, 429496729, 2**32 - 1, 2**32])
@pytest.mark.parametrize("index0", [0, 5, 256, 2**34 - 100])
def test_masks_follow_the_documented_stream(core: ModuleType, threshold: int, index0: int) -> None:
    key, n = 0x0123456789ABCDEF, 3001
    mask = torch.full((n,), 7, dtype=torch.uint8)
    core.keep_mask(key, index0, n, threshold, mask.data_ptr())
    words = (key & 0xFFFFFFFF, key >> 32)

    def byte(index: int, level: int) -> int:
        group = index >> 4
        block = core.philox4x32_10((group & 0xFFFFFFFF, group >> 32, level, 0), words)
        j = index & 15
        return (block[j >> 2] >> (8 * (j & 3))) & 255

    for i in range(0, n, 1 if threshold == 429496729 else 29):
        uniform = 0
        for level in range(4):
            uniform = uniform << 8 | byte(index0 + i, level)
        assert mask[i] == (uniform < threshold), i


def test_masks_resolve_ties_of_the_leading_bytes(core: ModuleType) -> None:
    """Thresholds taken from the stream itself: one step lower must drop exactly that element."""
    key, n = 99, 4096
    words = (key, 0)
    for i in (0, 17, 2047, 4095):
        uniform = 0
        for level in range(4):
            block = core.philox4x32_10((i >> 4, 0, level, 0), words)
            uniform = uniform << 8 | (block[(i & 15) >> 2] >> (8 * (i & 3))) & 255
        at, above = torch.empty(n, dtype=torch.uint8), torch.empty(n, dtype=torch.uint8)
        core.keep_mask(key, 0, n, uniform, at.data_ptr())
        core.keep_mask(key, 0, n, uniform + 1, above.data_ptr())
        assert at[i] == 0
        assert above[i] == 1
        assert (at != above).sum() == 1


def test_an_unknown_instruction_set_is_refused(core: ModuleType) -> None:
    with pytest.raises(ValueError, match="isa 'sse9' is not available here; choose one of"):
        core.set_isa("sse9")
