"""Cases of the GPU lane: what they are, how they are verified, how they are timed.

A case is one piece of work at one shape. Its providers do the same work: this library by each
backend, plain torch, other libraries, and a floor, which is a copy of as many bytes or a large
matrix product in the same minute on the same card. For each case

1. the inputs are made: as many sets as it takes to leave the L2 cache behind;
2. every provider runs once and its result is compared with what must come out; one that does not
   verify is a row with the difference and is not timed;
3. one more run gives the peak of the memory that it takes;
4. the providers take turns, one measurement each per round, rotating among the input sets; CUDA
   events around as many calls as fill a millisecond; the row holds the 20th, 50th and 80th
   percentile of one call;
5. where launches may weigh, the work is captured as a CUDA graph, and its replays are timed alike.

Of a provider whose call takes many seconds the one that is verified gives time and peak, too.

On a CPU (the dry run) a clock takes the place of the events, and there are no graphs and no peaks.
"""

from __future__ import annotations

import gc
import inspect
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .rows import DRY_RUN, FAILED, NOT_RUN, OK

__all__ = [
    "Case",
    "Machine",
    "Mismatch",
    "NotOffered",
    "Poisoned",
    "Provider",
    "Target",
    "Work",
    "absent",
    "copy_floor",
    "equal",
    "matmul_floor",
    "module_or_reason",
    "ours",
    "run_case",
]

GIB = 1 << 30
CALL_MS = 1.0  # what the calls between two events should take together
MOST_CALLS = 50
CAP_S = 1.2  # after this much measured time a provider has enough rounds
ROUNDS = 25
FEWEST = 3


class Mismatch(Exception):
    """A result is not what it must be."""


class NotOffered(Exception):
    """A provider is not there; the text says why."""


class Poisoned(Exception):
    """The device takes no more work from this process."""


@dataclass(frozen=True)
class Machine:
    """Where the cases run."""

    device: torch.device
    l2_bytes: int = 0

    @classmethod
    def find(cls, kind: str) -> Machine:
        """The card, or the processor for a dry run."""
        if kind == "cpu":
            torch.set_num_threads(1)
            return cls(torch.device("cpu"))
        device = torch.device("cuda", torch.cuda.current_device())
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        return cls(device, int(l2) or 64 << 20)

    @property
    def dry(self) -> bool:
        return bool(self.device.type == "cpu")

    @property
    def backends(self) -> tuple[str, ...]:
        """What `backend=` can be here."""
        return ("native", "eager") if self.dry else ("triton", "cuda")

    def free_bytes(self) -> int:
        """Memory that a case may fill; a tenth stays free."""
        if self.dry:
            return 1 << 40
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(0.9 * free)

    def pick(self, full: Any, tiny: Any) -> Any:
        """A size: `full` on a card, `tiny` in the dry run."""
        return tiny if self.dry else full

    def sets(self, bytes_each: int, most: int = 8) -> int:
        """Input sets to rotate among, so that none is left in the cache when it comes again."""
        if self.dry:
            return 2
        return max(1, min(most, -(-4 * self.l2_bytes // max(1, bytes_each))))

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize(self.device)

    def poison(self, count: int) -> None:
        """Leave NaN in memory that the allocator is about to give away again."""
        if not self.dry:
            torch.full((count,), math.nan, dtype=torch.bfloat16, device=self.device)


@dataclass
class Provider:
    """One way to do the work of a case.

    Attributes:
        name, role: who it is; "ours", "peer" or "floor".
        run: the work on the input set of that number; returns what was made.
        check: raises Mismatch unless its first argument is what the work must give; the second is
            `Work.expected()`. Returns what was compared, in words.
        missing: why it cannot run here; then there is a row with this reason.
        bytes, flops: where they differ from those of the work.
        graph: whether to capture it as a CUDA graph as well.
        once: a call takes many seconds, or cannot be repeated: there is one, verified and timed.
    """

    name: str
    role: str
    run: Callable[[int], Any]
    check: Callable[[Any, Any], str]
    missing: str = ""
    bytes: int | None = None
    flops: int | None = None
    graph: bool = False
    once: bool = False
    note: str = ""


@dataclass(frozen=True)
class Target:
    """What a case must reach: `value` of its rows, at least or at most `limit`."""

    text: str
    provider: str
    value: Callable[[Mapping[str, Mapping[str, Any]]], float]
    limit: float
    at_least: bool = True


@dataclass
class Work:
    """A case with its inputs in memory.

    Attributes:
        shape, dtype, note: for the row.
        bytes, flops: what the work must move and compute, however it is done.
        input_bytes: of one input set.
        sets: how many input sets there are.
        expected: what the checks compare with; called once, and dropped before timing.
        output_elements: of the output, to poison memory of that size before the checked run.
    """

    shape: str
    dtype: str
    bytes: int
    input_bytes: int
    providers: Sequence[Provider]
    flops: int = 0
    sets: int = 1
    note: str = ""
    expected: Callable[[], Any] = lambda: None
    output_elements: int = 0
    targets: Sequence[Target] = ()


@dataclass(frozen=True)
class Case:
    """A case before its inputs are made.

    Attributes:
        name: unique, "op/variant".
        make: makes the inputs.
        seconds: what it should take; it is not started with less time left.
        limit_s: a case that runs longer is stopped, and counts as failed.
    """

    op: str
    name: str
    make: Callable[[Machine], Work]
    seconds: float = 10.0
    limit_s: float = 120.0


# ------------------------------------------------------------------------------------ providers


def absent(name: str, why: str) -> Provider:
    """A peer that cannot run here."""
    return Provider(name, "peer", lambda i: None, lambda out, expected: "", missing=why)


def ours(
    machine: Machine,
    function: Callable[..., Any],
    run: Callable[..., Callable[[int], Any]],
    check: Callable[[Any, Any], str],
    **more: Any,
) -> list[Provider]:
    """This library: as a user calls it, then by each backend that `function` lets one choose.

    Args:
        run: makes the work from the keyword arguments that choose the backend.
        more: further fields of the providers.
    """
    providers = [Provider("cl_fast", "ours", run(), check, **more)]
    if "backend" in inspect.signature(function).parameters:
        providers += [
            Provider(f"cl_fast {backend}", "ours", run(backend=backend), check, **more)
            for backend in machine.backends
        ]
    return providers


def copy_floor(machine: Machine, work_bytes: int) -> Provider:
    """A copy on the device that reads and writes as many bytes as the work, at most 2 GiB."""
    half = max(16, min(work_bytes // 2, GIB))
    sets = machine.sets(2 * half)
    pairs = []
    for _ in range(sets):
        source = torch.randint(-128, 127, (half,), dtype=torch.int8, device=machine.device)
        pairs.append((source, torch.empty_like(source)))

    def run(i: int) -> Tensor:
        source, target = pairs[i % sets]
        return target.copy_(source)

    def check(out: Tensor, _: Any) -> str:
        equal(out, pairs[0][0])
        return "equal bytes"

    return Provider("copy", "floor", run, check, bytes=2 * half, flops=0, graph=True)


def matmul_floor(machine: Machine) -> Provider:
    """A bf16 matrix product of 8192 x 8192 x 8192."""
    size = machine.pick(8192, 64)
    a, b = (torch.randn(size, size, device=machine.device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def check(out: Tensor, _: Any) -> str:
        exact = a[:4].double() @ b.double()
        error = ((out[:4].double() - exact).norm() / exact.norm()).item()
        if not error < 1e-2:
            raise Mismatch(f"relative error {error:.3g} of the first rows")
        return "first rows against float64"

    return Provider(
        "matmul", "floor", lambda i: torch.mm(a, b, out=out), check, bytes=6 * size * size,
        flops=2 * size**3,
    )  # fmt: skip


def module_or_reason(name: str) -> tuple[Any, str]:
    """An optional import: the module and "", or None and why it is not there."""
    try:
        return __import__(name, fromlist=["_"]), ""
    except Exception as error:  # a peer that does not load must not end the run
        return None, f"{name} cannot be imported: {_words(error)}"


def equal(out: Any, expected: Any) -> str:
    """Bit for bit, for tensors and for lists of them."""
    if isinstance(expected, Tensor):
        if not isinstance(out, Tensor):
            raise Mismatch(f"a tensor was expected, got {type(out).__name__}")
        _equal(out, expected, "")
        return "bit for bit"
    if len(out) != len(expected):
        raise Mismatch(f"{len(expected)} tensors were expected, got {len(out)}")
    for number, (one, other) in enumerate(zip(out, expected, strict=True)):
        _equal(one, other, f" in tensor {number}")
    return "bit for bit"


def _equal(out: Tensor, expected: Tensor, where: str) -> None:
    if out.shape != expected.shape or out.dtype != expected.dtype:
        raise Mismatch(
            f"{tuple(expected.shape)} {expected.dtype} was expected{where}, "
            f"got {tuple(out.shape)} {out.dtype}"
        )
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[out.element_size()]
    a, b = out.contiguous().view(bits), expected.to(out.device).contiguous().view(bits)
    if torch.equal(a, b):
        return
    wrong = (a != b).reshape(-1)
    first = int(wrong.to(torch.uint8).argmax())
    raise Mismatch(
        f"{int(wrong.sum())} of {wrong.numel()} elements differ{where}, the first at {first}: "
        f"{out.reshape(-1)[first].item()!r} instead of {expected.reshape(-1)[first].item()!r}"
    )


# ------------------------------------------------------------------------------------ one case


@dataclass
class _Measured:
    """What has been found out about a provider."""

    provider: Provider
    status: str = OK
    reason: str = ""
    verified: str = ""
    calls: int = 1
    spent_ms: float = 0.0
    times: list[float] = field(default_factory=list)
    graph: Any = None
    graph_error: str = ""
    graph_times: list[float] = field(default_factory=list)
    peak: int | None = None
    output: int | None = None


def run_case(
    case: Case,
    machine: Machine,
    about: Mapping[str, Any],
    *,
    at: Callable[[str, str], None] = lambda provider, what: None,
    skip: Mapping[str, str] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Verify and time every provider of a case.

    Args:
        at: told what is about to happen, so that a crash has a name.
        skip: providers that ended the process before, and how.

    Returns:
        The rows and the targets.

    Raises:
        Poisoned: the device is of no use to this process any more; `args` are the provider and
            the words.
    """
    common = {
        "op": case.op,
        "case": case.name,
        "device": about["device"],
        "card": about["card"],
        "driver": about["driver"],
        "versions": about["versions"],
        "commit": about["commit"],
        "source": about["source"],
        "date": about["date"],
    }
    at("", "make the inputs")
    try:
        work = case.make(machine)
    except Exception as error:
        _still_healthy(machine, "", error)
        row = _empty_row(common, "", "ours", FAILED, f"no inputs: {_words(error)}")
        return [row], []

    measured = [_Measured(provider) for provider in work.providers]
    for m in measured:
        if m.provider.name in (skip or {}):
            m.status, m.reason = FAILED, (skip or {})[m.provider.name]
        elif m.provider.missing:
            m.status, m.reason = NOT_RUN, m.provider.missing
    _verify(work, machine, measured, at)
    for m in _repeating(measured):
        at(m.provider.name, "take the peak of its memory")
        _guard(machine, m, lambda m=m: _peak(machine, m, lambda: m.provider.run(0)))  # type: ignore[misc]
    _time(work, machine, measured, at)
    _time_graphs(work, machine, measured, at)

    rows = [_row(common, work, m) for m in measured]
    floors = [row["gb_per_s"] for row in rows if row["role"] == "floor" and row["gb_per_s"]]
    flop_floors = [row["tflop_per_s"] for row in rows if row["role"] == "floor"]
    for row in rows:
        if row["status"] == OK and row["role"] != "floor":
            _share(row, floors, [f for f in flop_floors if f])
    return rows, [_target(case, t, rows) for t in work.targets]


def _running(measured: Sequence[_Measured]) -> Iterator[_Measured]:
    return (m for m in measured if m.status == OK)


def _repeating(measured: Sequence[_Measured]) -> Iterator[_Measured]:
    return (m for m in _running(measured) if not m.provider.once)


def _guard(machine: Machine, m: _Measured, action: Callable[[], Any]) -> None:
    """Carry out `action`; an exception becomes the status of the provider."""
    try:
        action()
    except Poisoned:
        raise
    except Exception as error:
        _still_healthy(machine, m.provider.name, error)
        m.status, m.reason = _verdict(m.provider, error)
        # A traceback would keep the tensors of the failed call alive.
        traceback.clear_frames(error.__traceback__)
    if m.status != OK and not machine.dry:
        gc.collect()
        torch.cuda.empty_cache()


def _verdict(provider: Provider, error: Exception) -> tuple[str, str]:
    words = _words(error)
    if isinstance(error, NotOffered):
        return NOT_RUN, words
    if isinstance(error, torch.OutOfMemoryError):
        # Another library's thirst is a finding; ours is a failure.
        return FAILED if provider.role == "ours" else NOT_RUN, f"out of memory: {words}"
    if isinstance(error, Mismatch):
        return FAILED, f"does not verify: {words}"
    refused = isinstance(error, (ValueError, RuntimeError)) and (
        "backend must be one of" in str(error) or "cannot be used" in str(error)
    )
    chosen = provider.role == "ours" and provider.name != "cl_fast"
    return (NOT_RUN if refused and chosen else FAILED), words


def _words(error: BaseException) -> str:
    """An exception in one line, with the place that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}{place}"


def _still_healthy(machine: Machine, provider: str, error: Exception) -> None:
    """Raise Poisoned if the device has failed for good."""
    try:
        machine.synchronize()
    except Exception:
        raise Poisoned(provider, _words(error)) from error


def _verify(
    work: Work, machine: Machine, measured: Sequence[_Measured], at: Callable[[str, str], None]
) -> None:
    at("", "compute what must come out")
    try:
        expected = work.expected()
    except Exception as error:
        _still_healthy(machine, "", error)
        for m in _running(measured):
            m.status, m.reason = FAILED, f"nothing to verify with: {_words(error)}"
        return
    for m in _running(measured):
        at(m.provider.name, "verify")

        def verify(m: _Measured = m) -> None:
            made: list[Any] = []

            def keep(i: int) -> None:
                made.append(m.provider.run(i))

            # Peers draw their masks from the global stream.
            torch.manual_seed(0)
            machine.poison(work.output_elements)
            if m.provider.once:
                _peak(machine, m, lambda: m.times.append(_once(machine, keep, 0, 1)))
                out = made.pop()
            else:
                out = m.provider.run(0)
            machine.synchronize()
            m.verified = m.provider.check(out, expected)

        _guard(machine, m, verify)
    gc.collect()


def _peak(machine: Machine, m: _Measured, call: Callable[[], Any]) -> None:
    if machine.dry:
        call()
        return
    gc.collect()
    machine.synchronize()
    torch.cuda.reset_peak_memory_stats(machine.device)
    before = torch.cuda.memory_allocated(machine.device)
    out = call()
    machine.synchronize()
    m.peak = torch.cuda.max_memory_allocated(machine.device) - before
    m.output = torch.cuda.memory_allocated(machine.device) - before
    del out


def _once(machine: Machine, run: Callable[[int], Any], first: int, calls: int) -> float:
    """Milliseconds per call of `calls` calls in a row."""
    if machine.dry:
        start = time.perf_counter()
        for i in range(calls):
            run(first + i)
        return (time.perf_counter() - start) * 1e3 / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for i in range(calls):
        run(first + i)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / calls


def _time(
    work: Work, machine: Machine, measured: Sequence[_Measured], at: Callable[[str, str], None]
) -> None:
    for m in _repeating(measured):
        at(m.provider.name, "warm up")

        def warm(m: _Measured = m) -> None:
            # The second of two calls: the first may still load or compile.
            _once(machine, m.provider.run, 0, 1)
            ms = _once(machine, m.provider.run, 1, 1)
            m.calls = max(1, min(MOST_CALLS, round(CALL_MS / max(ms, 1e-3))))

        _guard(machine, m, warm)
    for turn in range(machine.pick(ROUNDS, FEWEST)):
        for m in _repeating(measured):
            if len(m.times) >= FEWEST and m.spent_ms > 1e3 * CAP_S:
                continue
            at(m.provider.name, "time")

            def measure(m: _Measured = m, turn: int = turn) -> None:
                ms = _once(machine, m.provider.run, turn, m.calls)
                m.times.append(ms)
                m.spent_ms += ms * m.calls

            _guard(machine, m, measure)


def _time_graphs(
    work: Work, machine: Machine, measured: Sequence[_Measured], at: Callable[[str, str], None]
) -> None:
    """Capture one call per input set, and time the replays: the work without its launches."""
    if machine.dry:
        return
    for m in _running(measured):
        if not m.provider.graph:
            continue
        at(m.provider.name, "capture a graph")
        try:
            m.graph = _capture(m.provider.run, work.sets)
        except Exception as error:
            _still_healthy(machine, m.provider.name, error)
            if m.provider.role == "ours":
                m.graph_error = f"no graph: {_words(error)}"
    for _ in range(ROUNDS):
        for m in _running(measured):
            if m.graph is not None:
                at(m.provider.name, "replay its graph")
                _guard(
                    machine,
                    m,
                    lambda m=m: m.graph_times.append(  # type: ignore[misc]
                        _once(machine, lambda i: m.graph.replay(), 0, 3) / work.sets
                    ),
                )
    for m in measured:
        m.graph = None


def _capture(run: Callable[[int], Any], sets: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(sets):
            run(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(sets):
            run(i)
    graph.replay()
    torch.cuda.synchronize()
    return graph


# ------------------------------------------------------------------------------------ rows


def quantile(values: Sequence[float], q: float) -> float:
    """The q-th quantile, between the two nearest values."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def _empty_row(
    common: Mapping[str, Any], provider: str, role: str, status: str, reason: str
) -> dict[str, Any]:
    return {
        **common,
        "provider": provider,
        "role": role,
        "status": status,
        "reason": reason,
        "shape": "",
        "dtype": "",
        "verified": "",
        "ms_p20": None,
        "ms_p50": None,
        "ms_p80": None,
        "repeats": 0,
        "graph_ms_p50": None,
        "graph_error": "",
        "bytes": 0,
        "flops": 0,
        "gb_per_s": None,
        "tflop_per_s": None,
        "share_of_floor": None,
        "input_bytes": 0,
        "output_bytes": None,
        "peak_extra_bytes": None,
        "input_sets": 0,
        "note": "",
    }


def _row(common: Mapping[str, Any], work: Work, m: _Measured) -> dict[str, Any]:
    row = _empty_row(common, m.provider.name, m.provider.role, m.status, m.reason)
    moved = work.bytes if m.provider.bytes is None else m.provider.bytes
    flops = work.flops if m.provider.flops is None else m.provider.flops
    row |= {
        "shape": work.shape,
        "dtype": work.dtype,
        "verified": m.verified,
        "bytes": moved,
        "flops": flops,
        "input_bytes": work.input_bytes,
        "input_sets": work.sets,
        "note": "; ".join(filter(None, (work.note, m.provider.note))),
        "graph_error": m.graph_error,
    }
    if m.status == OK and m.times:
        row |= {f"ms_p{q}": quantile(m.times, q / 100) for q in (20, 50, 80)}
        row |= {"repeats": len(m.times), "peak_extra_bytes": m.peak, "output_bytes": m.output}
        if m.graph_times:
            row["graph_ms_p50"] = quantile(m.graph_times, 0.5)
        fastest = _fastest(row)
        row["gb_per_s"] = moved / fastest / 1e6 if moved else None
        row["tflop_per_s"] = flops / fastest / 1e9 if flops else None
    return row


def _fastest(row: Mapping[str, Any]) -> float:
    """The time that rates are taken from: the replayed graph where there is one."""
    graph = row["graph_ms_p50"]
    return float(max(1e-9, row["ms_p50"] if graph is None else graph))


def _share(row: dict[str, Any], copies: Sequence[float], matmuls: Sequence[float]) -> None:
    """Share of the floor: the larger of the shares of bytes and of arithmetic."""
    shares = []
    if copies and row["gb_per_s"]:
        shares.append(row["gb_per_s"] / max(copies))
    if matmuls and row["tflop_per_s"]:
        shares.append(row["tflop_per_s"] / max(matmuls))
    row["share_of_floor"] = max(shares, default=None)


def _target(case: Case, target: Target, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by_name = {row["provider"]: row for row in rows if row["status"] == OK}
    try:
        value: float | None = float(target.value(by_name))
    except (KeyError, TypeError, ZeroDivisionError):  # one of the rows has no number
        value = None
    reached = value is not None and (
        value >= target.limit if target.at_least else value <= target.limit
    )
    return {
        "case": case.name,
        "text": target.text,
        "provider": target.provider,
        "value": value,
        "limit": target.limit,
        "at_least": target.at_least,
        "met": reached,
    }


def on_machine(machine: Machine) -> str:
    """The `device` of rows."""
    return DRY_RUN if machine.dry else str(torch.cuda.get_device_name(machine.device))
