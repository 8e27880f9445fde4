#!/usr/bin/env python3
"""The GPU lane: build, test, sanitize and time on a machine with a card, in one call.

    python benchmarks/gpu_lane.py                           everything, at most 570 s
    python benchmarks/gpu_lane.py --resume                  go on where the time ran out
    python benchmarks/gpu_lane.py --steps bench --cases ties
    python benchmarks/gpu_lane.py --dry-run DIR             on a processor, to try the lane itself
    python benchmarks/gpu_lane.py --table benchmarks/results/nvidia-h200.json

Steps, in this order:

    build     the C++ core and the CUDA kernels, for this card, into cl_fast/
    test      pytest -m gpu tests/gpu, one process per file
    sanitize  compute-sanitizer, memcheck and racecheck, over every CUDA C++ kernel
    bench     every case of benchmarks/gpu, verified, then timed

Uses the Python that it is started with, no network, and installs nothing: a folder of links under
build/ lets that Python import the checkout. Results go to benchmarks/results/<card>.json after
every step, part of a step and case, and a table beside it; docs/gpu-lane.md says what they mean.

Ends with 0 if everything was done and nothing failed, 1 if something failed, 2 if there is no card
or the command is wrong, 3 if work is left for a call with --resume.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from gpu.rows import FAILED, NOT_RUN, OK, Results, slug, table  # noqa: E402

ROOT = HERE.parent
STEPS = ("build", "test", "sanitize", "bench")
LEFT = "left"
# Of the calls of gpu.sanitized each N-th is made: races do not depend on a policy, and watching
# for them takes long. N shares no factor with the variants, so that each of them has its turn.
EVERY = {"memcheck": 3, "racecheck": 5}
TOOLS = tuple(EVERY)
ERROR_EXIT = 86  # of compute-sanitizer, if it has found anything
CRASHES_PER_CASE = 3

# Whether the built modules load, in the words of the package.
LOADED = """
import json
from cl_fast.backends import cuda, native
modules = {"cuda": cuda.load(), "native": native.load()}
print(json.dumps({name: module and module.build_info() for name, module in modules.items()}
                 | {"why": cuda.reason() or native.reason()}))
"""

# Not started with less time than this left, and stopped after that; seconds.
BUILD_S, TEST_S, SANITIZE_S = (25.0, 480.0), (15.0, 240.0), (30.0, 180.0)


def say(text: str) -> None:
    print(f"[gpu lane] {text}", flush=True)


# ------------------------------------------------------------------------------------ processes


@dataclass
class Ended:
    """A process that was waited for."""

    code: int | None
    """None: it was stopped, because its time was over."""
    output: str
    seconds: float

    def tail(self, lines: int = 12) -> str:
        return "\n".join(self.output.strip().splitlines()[-lines:])

    def how(self) -> str:
        return how_it_ended(self.code)


def how_it_ended(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "stopped: its time was over"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"ended with {code}"


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process and what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def call(
    command: Sequence[str], log: Path, limit_s: float, env: dict[str, str] | None = None
) -> Ended:
    """Run a command in the root of the checkout; its output goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as sink:
        sink.write(" ".join(command) + "\n")
        sink.flush()
        try:
            process = subprocess.Popen(
                command, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT, env=env,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Ended(127, f"{command[0]} cannot be started: {error}", 0.0)
        code: int | None
        try:
            code = process.wait(timeout=max(0.1, limit_s))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
    text = log.read_text(encoding="utf-8", errors="replace")
    return Ended(code, text, time.monotonic() - start)


def tool(name: str, *folders: Path) -> str | None:
    """A program in the given folders, beside this Python, or on PATH."""
    for folder in (*folders, Path(sys.executable).parent):
        if os.access(folder / name, os.X_OK) and (folder / name).is_file():
            return str(folder / name)
    return shutil.which(name)


def cuda_folders() -> list[Path]:
    """Where a CUDA toolkit may keep its programs."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(home) / "bin" for home in homes if home]
    nvcc = shutil.which("nvcc")
    if nvcc:
        folders += [Path(nvcc).parent, Path(nvcc).resolve().parent]
    folders.append(Path("/usr/local/cuda/bin"))
    return [*folders, *(folder.parent / "compute-sanitizer" for folder in folders)]


# ------------------------------------------------------------------------------------ the lane


@dataclass
class Lane:
    """One call of the lane."""

    dry: bool
    out: Path
    deadline: float
    resume: bool
    retry: bool
    pattern: str = ""
    cases_from: str = ""
    arch: str = ""
    commit: str = ""
    sanitizer: str | None = None
    results: Results = field(init=False)
    cases: list[dict[str, Any]] = field(init=False, default_factory=list)

    @property
    def work(self) -> Path:
        """Where build files, logs and the folder of links go."""
        return self.out / "work" if self.dry else ROOT / "build" / "gpu_lane"

    @property
    def modules(self) -> Path:
        """Where the built module goes; a dry run leaves that of the checkout alone."""
        return self.work / "module" if self.dry else ROOT / "cl_fast"

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def log(self, name: str) -> Path:
        return self.work / "logs" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.log"

    def environment(self, **more: str) -> dict[str, str]:
        """For a process that imports the checkout, without an installation."""
        path = [str(self.site()), str(HERE), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            # The folder that a process is started in has a cl_fast without its Triton kernels.
            "PYTHONSAFEPATH": "1",
            **more,
        }

    def site(self) -> Path:
        """A folder with the package `cl_fast` as an installation would lay it out, made of links.

        The Triton kernels are `cl_fast.triton_kernels`, but lie beside `cl_fast` in the checkout.
        """
        site = self.work / "site"
        package = site / "cl_fast"
        package.mkdir(parents=True, exist_ok=True)
        wanted = {"triton_kernels": ROOT / "triton_kernels"}
        for entry in (ROOT / "cl_fast").iterdir():
            if entry.name != "__pycache__":
                wanted[entry.name] = entry
        for built in self.modules.glob("_*.so"):
            wanted[built.name] = built
        for old in package.iterdir():
            if old.is_symlink() and old.readlink() != wanted.get(old.name):
                old.unlink()
        for name, target in wanted.items():
            with contextlib.suppress(FileExistsError):
                (package / name).symlink_to(target)
        return site

    # -------------------------------------------------------------------------------- beginning

    def begin(self) -> int:
        """Ask a process about the machine and the cases; 0, or how the lane ends at once."""
        asked = call(
            [sys.executable, "-m", "gpu.worker", "about", *self.worker_options()],
            self.log("about"), min(180.0, max(30.0, self.seconds_left())), self.environment(),
        )  # fmt: skip
        if asked.code != 0:
            say(f"torch, or a family of cases, cannot be imported: {asked.how()}\n{asked.tail()}")
            return 1
        found = json.loads(asked.output.strip().splitlines()[-1])
        if not found["device"]:
            say(f"no card: {found['why']}; --dry-run DIR tries the lane on a processor")
            return 2
        known = found.pop("cases")
        self.cases = [c for c in known if self.pattern in c["name"]]
        if not self.cases:
            say(f"--cases {self.pattern!r} is in the name of no case; some are: "
                + ", ".join(c["name"] for c in known[:5]))  # fmt: skip
            return 2
        arch = found.pop("arch")
        self.arch = self.arch or arch
        nvcc = tool("nvcc", *cuda_folders())
        found["versions"]["nvcc"] = (
            "not found" if nvcc is None else nvcc_version(nvcc, self.log("nvcc"))
        )
        about = {
            **found,
            "commit": self.commit or commit(),
            "source": source_digest(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }
        path = self.out / f"{slug(about['card'])}.json"
        self.results = Results(path, about, resume=self.resume, retry=self.retry)
        say(f"{about['device']}, driver {about['driver']}; commit {about['commit']}; {path}")
        if self.results.note:
            say(self.results.note)
        return 0

    def worker_options(self) -> list[str]:
        more = ["--cases-from", self.cases_from] if self.cases_from else []
        return ["--device", "cpu" if self.dry else "cuda", *more]

    def leave(self, what: str) -> None:
        """Write down work that the time does not suffice for."""
        say(f"left: {what}")
        self.results.left.append(what)

    def put(self, step: str, record: dict[str, Any]) -> None:
        self.results.put_step(step, record)
        words = f"{step}: {record['status']}, {record.get('seconds', 0.0):.1f} s"
        say(words + (f", {record['reason']}" if record.get("reason") else ""))

    # -------------------------------------------------------------------------------- build

    def build(self) -> None:
        """Configure and compile the core and the CUDA kernels."""
        done = self.results.steps.get("build")
        if done and done["status"] == OK and list(self.modules.glob("_cuda*.so")):
            return
        if self.dry and not self.arch:
            reason = "a dry run uses the module of the checkout; --arch 90 builds one beside it"
            self.put("build", {"status": NOT_RUN, "reason": reason, "seconds": 0.0})
            return
        if self.seconds_left() < BUILD_S[0]:
            self.leave("build")
            return
        start = time.monotonic()
        record = self._compile()
        record["seconds"] = time.monotonic() - start
        if record["status"] == LEFT:
            self.leave("build: stopped at the end of the time")
            return
        self.put("build", record)

    def _compile(self) -> dict[str, Any]:
        folders = cuda_folders()
        cmake, nvcc = tool("cmake"), tool("nvcc", *folders)
        for name, found in (("cmake", cmake), ("nvcc", nvcc)):
            if found is None:
                return {"status": FAILED, "reason": f"{name} is not on PATH"}
        assert cmake is not None
        folder = self.work / "cmake"
        ninja = tool("ninja")
        command = [
            cmake, "-S", str(ROOT), "-B", str(folder), "-DCL_FAST_CUDA=ON",
            f"-DCL_FAST_OUTPUT_DIR={self.modules}", f"-DCMAKE_CUDA_ARCHITECTURES={self.arch}",
            f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DPython_EXECUTABLE={sys.executable}",
            "-DCMAKE_BUILD_TYPE=Release",
            *(("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}") if ninja else ()),
        ]  # fmt: skip
        # A cache made by another interpreter or generator would be believed.
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        for name, step in (
            ("configure", command),
            ("compile", [cmake, "--build", str(folder), "--parallel", str(cpus())]),
        ):
            limit = min(BUILD_S[1], self.seconds_left())
            ended = call(step, self.log(f"build {name}"), limit)
            if ended.code is None and limit < BUILD_S[1]:
                return {"status": LEFT}
            if ended.code != 0:
                tail = ended.tail(25)
                return {"status": FAILED, "reason": f"{name} {ended.how()}", "output": tail}
        check = call([sys.executable, "-c", LOADED], self.log("build check"), 60.0,
                     self.environment())  # fmt: skip
        if check.code != 0:
            reason = f"the modules cannot be imported: {check.how()}"
            return {"status": FAILED, "reason": reason, "output": check.tail()}
        found = json.loads(check.output.strip().splitlines()[-1])
        if not found["cuda"] or found["cuda"].get("on_cpu"):
            why = found["why"] or "they are built for a processor"
            return {"status": FAILED, "reason": f"the CUDA kernels are not there: {why}"}
        return {"status": OK, "arch": self.arch, **found}

    # -------------------------------------------------------------------------------- test

    def test(self) -> None:
        """Each file of tests/gpu in a process of its own."""
        parts = dict(self.results.steps.get("test", {}).get("parts", {}))
        files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
        for file in files:
            if file.name in parts:
                continue
            if self.seconds_left() < TEST_S[0]:
                self.leave(f"test {file.name}")
                continue
            record = self._test_file(file)
            if record["status"] == LEFT:
                self.leave(f"test {file.name}: stopped at the end of the time")
                continue
            parts[file.name] = record
            self._put_parts("test", parts)
        if not files:
            self.put("test", {"status": FAILED, "reason": "no files in tests/gpu"})

    def _test_file(self, file: Path) -> dict[str, Any]:
        report = self.work / "logs" / f"{file.stem}.xml"
        report.unlink(missing_ok=True)
        limit = min(TEST_S[1], self.seconds_left())
        ended = call(
            [sys.executable, "-m", "pytest", "-m", "gpu", str(file), "-q", "-rs",
             "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", f"--junitxml={report}"],
            self.log(f"test {file.stem}"), limit,
            self.environment(**({} if self.dry else {"CL_FAST_REQUIRE_GPU": "1"})),
        )  # fmt: skip
        if ended.code is None and limit < TEST_S[1]:
            return {"status": LEFT}
        record: dict[str, Any] = {"seconds": ended.seconds, **read_junit(report)}
        wrong = record.get("failed", 0) + record.get("errors", 0)
        if ended.code == 0 and "passed" in record and not wrong:
            return {"status": OK, **record}
        reason = f"{wrong} tests failed" if wrong else f"pytest {ended.how()}"
        if ended.code == 5:
            reason = "no tests were found"
        return {"status": FAILED, "reason": reason, **record, "output": ended.tail(25)}

    def _put_parts(self, step: str, parts: dict[str, dict[str, Any]]) -> None:
        """Write a step whose result is that of its parts."""
        bad = [name for name, part in parts.items() if part["status"] == FAILED]
        idle = all(part["status"] == NOT_RUN for part in parts.values())
        record: dict[str, Any] = {
            "status": FAILED if bad else NOT_RUN if idle else OK,
            "seconds": sum(part.get("seconds", 0.0) for part in parts.values()),
            "parts": parts,
        }
        if bad:
            record["reason"] = ", ".join(bad)
        self.put(step, record)

    # -------------------------------------------------------------------------------- sanitize

    def sanitize(self) -> None:
        """compute-sanitizer over a run of each CUDA C++ kernel, by each tool."""
        parts = dict(self.results.steps.get("sanitize", {}).get("parts", {}))
        program = self.sanitizer or tool("compute-sanitizer", *cuda_folders())
        for name in ("no tool",) if self.dry and not self.sanitizer else TOOLS:
            if name in parts:
                continue
            if self.seconds_left() < SANITIZE_S[0]:
                self.leave(f"sanitize {name}")
                continue
            if program is None and not self.dry:
                why = "compute-sanitizer is not on PATH, in CUDA_HOME/bin or next to nvcc"
                record: dict[str, Any] = {"status": NOT_RUN, "reason": why, "seconds": 0.0}
            else:
                record = self._sanitize(name, program)
            if record["status"] == LEFT:
                self.leave(f"sanitize {name}: stopped at the end of the time")
                continue
            parts[name] = record
            self._put_parts("sanitize", parts)

    def _sanitize(self, name: str, program: str | None) -> dict[str, Any]:
        backend = "native" if self.dry else "cuda"
        command = [sys.executable, "-m", "gpu.sanitized", "--backend", backend]
        every = 25 if self.dry else EVERY[name]
        command += ["--every", str(every)]
        if name in TOOLS:
            assert program is not None
            command = [program, "--tool", name, "--error-exitcode", str(ERROR_EXIT), *command]
        limit = min(SANITIZE_S[1], self.seconds_left())
        ended = call(
            command, self.log(f"sanitize {name}"), limit,
            # Memory of its own for each tensor, so that an access beyond one is seen.
            self.environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        )  # fmt: skip
        if ended.code is None and limit < SANITIZE_S[1]:
            return {"status": LEFT}
        return {"seconds": ended.seconds, "every": every, **read_sanitizer(name, ended)}

    # -------------------------------------------------------------------------------- bench

    def bench(self) -> None:
        """Every case that has no rows yet, in worker processes."""
        start = time.monotonic()
        before = float(self.results.steps.get("bench", {}).get("seconds", 0.0))
        done = self.results.cases
        todo: dict[str, dict[str, str]] = {
            c["name"]: {} for c in self.cases if c["name"] not in done
        }
        workers = 0
        while todo:
            shortest = min(c["seconds"] for c in self.cases if c["name"] in todo)
            if self.seconds_left() < shortest:
                for name in todo:
                    self.leave(f"bench {name}")
                break
            workers += 1
            if not self._work(todo, workers):
                break
        bad = len({row["case"] for row in self.results.rows if row["status"] == FAILED})
        record: dict[str, Any] = {
            "status": FAILED if bad or (todo and not self.results.left) else OK,
            "seconds": before + time.monotonic() - start,
        }
        if bad:
            record["reason"] = f"{bad} cases with a failure"
        elif record["status"] == FAILED:
            record["reason"] = "the worker cannot be started: " + self._worker_tail()
        self.put("bench", record)

    def _work(self, todo: dict[str, dict[str, str]], number: int) -> bool:
        """One worker, until it has done everything or ended. False: it never began."""
        read_end, write_end = os.pipe()
        log = self.log("bench")
        with log.open("a" if number > 1 else "w", encoding="utf-8") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "gpu.worker", "run", "--events", str(write_end),
                 *self.worker_options()],
                stdin=subprocess.PIPE, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT,
                env=self.environment(), pass_fds=(write_end,), start_new_session=True,
            )  # fmt: skip
        os.close(write_end)
        assert process.stdin is not None
        order = {
            "todo": [{"case": name, "skip": skip} for name, skip in todo.items()],
            "until": time.time() + self.seconds_left(),
            "about": self.results.about,
        }
        # A worker that ends at once does not read; what it says in its log is what counts.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(order).encode())
            process.stdin.close()
        watch = _Watch(self, todo)
        try:
            for event in events(read_end, watch.patience):
                watch.take(event)
        finally:
            os.close(read_end)
            ended = process.poll() is not None or _ends_soon(process)
            stop(process)
        watch.over(process.returncode if ended else None)
        return watch.began

    def _worker_tail(self) -> str:
        log = self.log("bench")
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return " ".join(text.strip().splitlines()[-1:])

    # -------------------------------------------------------------------------------- end

    def end(self) -> int:
        """Say what came out; the exit code."""
        self.results.save()
        failures = self.results.failures()
        for line in failures:
            say(f"FAILED {line}")
        for target in self.results.targets:
            if not target["met"] and not self.dry:
                got = "no number" if target["value"] is None else f"{target['value']:.3g}"
                say(f"target not met: {target['text']}, {target['provider']}: {got}")
        say(f"{len(self.results.rows)} rows; {self.results.path.with_suffix('.md')}")
        if failures:
            return 1
        if self.results.left:
            say(f"{len(self.results.left)} items left: call again with --resume")
            return 3
        return 0


@dataclass
class _Watch:
    """What a worker is doing, from its events."""

    lane: Lane
    todo: dict[str, dict[str, str]]
    began: bool = False
    case: str = ""
    provider: str = ""
    what: str = ""
    until: float = 0.0
    poisoned: str = ""
    over_time: bool = False

    def patience(self) -> float:
        """Seconds that the worker may still be silent. Start-up has two minutes."""
        if not self.until:
            self.until = time.monotonic() + 120.0
        left = min(self.until - time.monotonic(), self.lane.seconds_left() + 10.0)
        self.over_time = left <= 0
        return left

    def take(self, event: dict[str, Any]) -> None:
        self.began = True
        kind, case = event["event"], event["case"]
        if kind == "start":
            self.case, self.provider, self.what = case, "", "start"
            self.until = time.monotonic() + event["limit_s"]
        elif kind == "at":
            self.provider, self.what = event["provider"], event["what"]
        elif kind == "rows":
            self.todo.pop(case)
            self.lane.results.put_case(case, event["rows"], event["targets"])
            self.case = ""
            say(f"{case}: {summary(event['rows'])}")
        elif kind == "left":
            self.todo.pop(case)
            self.lane.leave(f"bench {case}")
        elif kind == "poisoned":
            self.provider, self.poisoned = event["provider"], event["reason"]

    def over(self, code: int | None) -> None:
        """The worker is gone: what it was doing failed, and is not tried again."""
        if not self.case:
            return
        if self.over_time and self.lane.seconds_left() <= 0:
            self.todo.pop(self.case)
            self.lane.leave(f"bench {self.case}: stopped at the end of the time")
            return
        reason = self.poisoned or (
            f"stopped: {self.what} took too long" if self.over_time else
            f"the process {how_it_ended(code)} at: {self.what}"
        )  # fmt: skip
        say(f"{self.case}, {self.provider or 'inputs'}: {reason}")
        skip = self.todo[self.case]
        if self.provider and self.provider not in skip and len(skip) + 1 < CRASHES_PER_CASE:
            skip[self.provider] = reason
            return
        # Without a provider to leave out, the whole case is given up.
        self.todo.pop(self.case)
        about = self.lane.results.about
        op = next(c["op"] for c in self.lane.cases if c["name"] == self.case)
        rows = [
            {
                "op": op, "case": self.case, "provider": provider, "role": "ours",
                "status": FAILED, "reason": why, "shape": "", "dtype": "",
                **{key: about[key] for key in ("device", "card", "driver", "versions", "commit",
                                               "source", "date")},
            }
            for provider, why in {**skip, self.provider: reason}.items()
        ]  # fmt: skip
        self.lane.results.put_case(self.case, rows)


def _ends_soon(process: subprocess.Popen[Any]) -> bool:
    """Whether a process that has closed its pipe ends by itself."""
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        return False
    return True


def events(pipe: int, patience: Any) -> Iterator[dict[str, Any]]:
    """The JSON lines of a pipe, until it is closed or `patience()` is over."""
    buffer = b""
    while True:
        left = patience()
        if left <= 0:
            return
        ready, _, _ = select.select([pipe], [], [], left)
        if not ready:
            continue
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            return
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a case in one line."""
    words = []
    for row in rows:
        if row["status"] != OK:
            words.append(f"{row['provider'] or 'inputs'} {row['status'].upper()}")
        else:
            share = row["share_of_floor"]
            more = "" if share is None else f" ({100 * share:.0f} %)"
            words.append(f"{row['provider']} {row['ms_p50']:.3g} ms{more}")
    return ", ".join(words)


# ------------------------------------------------------------------------------------ reading


def read_junit(path: Path) -> dict[str, Any]:
    """Counts, failures by name, and skips by reason; nothing if the report cannot be read."""
    try:
        root = ET.parse(path).getroot()
    except (OSError, ET.ParseError):
        return {}
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "errors": 0, "skipped": 0}
    failures: dict[str, str] = {}
    skips: dict[str, int] = {}
    for case in root.iter("testcase"):
        kinds = {child.tag: child.get("message", "") for child in case}
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        if "error" in kinds:
            counts["errors"] += 1
            failures[name] = kinds["error"][:500]
        elif "failure" in kinds:
            counts["failed"] += 1
            failures[name] = kinds["failure"][:500]
        elif "skipped" in kinds:
            counts["skipped"] += 1
            skips[kinds["skipped"]] = skips.get(kinds["skipped"], 0) + 1
        else:
            counts["passed"] += 1
    return {**counts, "failures": failures, "skips": skips}


def read_sanitizer(name: str, ended: Ended) -> dict[str, Any]:
    """What a run of `gpu.sanitized` found, with or without a tool around it."""
    launches = re.search(r"^launches: (\d+), wrong: (\d+)$", ended.output, re.M)
    record: dict[str, Any] = {"launches": int(launches[1]) if launches else 0}
    refused = re.findall(r"^refused (\d+) of \d+ calls: (.*)$", ended.output, re.M)
    if refused:
        counts = [int(count) for count, _ in refused]
        record |= {"refused": sum(counts), "refusals": [why for _, why in refused]}
    if ended.code == 77 or "Device not supported" in ended.output:
        why = re.search(r"^refused .*|.*Device not supported.*", ended.output, re.M)
        reason = f"{why[0].strip('= ')}" if why else "every call was refused"
        return {"status": NOT_RUN, "reason": reason, **record}
    if launches and int(launches[2]):
        wrong = f"{launches[2]} wrong results"
        return {"status": FAILED, "reason": wrong, **record, "output": ended.tail(40)}
    if name in TOOLS:
        found = re.search(
            r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", ended.output
        )
        if found is None:
            reason = f"no summary: {ended.how()}"
            return {"status": FAILED, "reason": reason, **record, "output": ended.tail(40)}
        count = int(found[1] or found[2])
        # torch asks the driver for what it may not have; what our launches return is looked at.
        asked = len(re.findall(r"^=+ Program hit ", ended.output, re.M)) if found[1] else 0
        if asked:
            record["api_errors"] = asked
        count = max(0, count - asked)
        record["errors" if found[1] else "hazards"] = count
        if count:
            reason = f"{name} found {count}"
            return {"status": FAILED, "reason": reason, **record, "output": ended.tail(60)}
        if asked and launches and ended.code == ERROR_EXIT:
            return {"status": OK, **record}
    if ended.code != 0 or not launches:
        return {"status": FAILED, "reason": ended.how(), **record, "output": ended.tail(40)}
    return {"status": OK, **record}


def nvcc_version(nvcc: str, log: Path) -> str:
    asked = call([nvcc, "--version"], log, 30.0)
    found = re.search(r"\bV(\d+(\.\d+)+)", asked.output)
    return found[1] if found else "unknown"


def git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def commit() -> str:
    """The commit of the checkout; a copy without its history has none."""
    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no")
    return head.strip() + ("+changes" if changed else "")


def source_digest() -> str:
    """A digest of what the rows depend on: it tells apart trees of one commit."""
    digest = hashlib.sha256()
    files = [ROOT / "CMakeLists.txt", HERE / "editing" / "world.py"]
    for folder, kinds in {
        "cl_fast": "py", "triton_kernels": "py", "csrc": "cpp cu h cuh", "benchmarks/gpu": "py",
    }.items():  # fmt: skip
        files += [f for kind in kinds.split() for f in (ROOT / folder).rglob(f"*.{kind}")]
    for file in sorted(files):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------------------------ command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", default=",".join(STEPS), help="which of build,test,sanitize,bench")
    add("--resume", action="store_true", help="keep what the file has for this card and source")
    add("--retry", action="store_true", help="with --resume: run again what had failed")
    add("--budget", type=float, default=570.0, metavar="SECONDS", help="start nothing later")
    add("--cases", default="", metavar="TEXT", help="only cases whose name holds TEXT")
    add("--cases-from", default="", metavar="FILE", help="add the CASES of a Python file")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    add("--dry-run", type=Path, metavar="DIR", help="on a processor, tiny shapes, into DIR")
    add("--arch", default="", help="CUDA architecture to build for (default: the card's)")
    add("--commit", default="", help="the commit, for a copy without its history")
    add("--sanitizer", metavar="PROGRAM", help="compute-sanitizer, if it is not found")
    add("--table", type=Path, metavar="FILE", help="print the table of a result file, and end")
    a = parser.parse_args(arguments)
    a.steps = [step for step in a.steps.split(",") if step]
    unknown = [step for step in a.steps if step not in STEPS]
    if unknown or not a.steps:
        parser.error(f"--steps must name some of {','.join(STEPS)}; got {','.join(unknown)!r}")
    if a.retry and not a.resume:
        parser.error("--retry has no effect without --resume")
    if a.dry_run is not None:
        a.out = a.dry_run
        kept = ROOT / "benchmarks" / "results"
        if a.out.resolve() == kept or kept in a.out.resolve().parents:
            parser.error(f"--dry-run must not write to {kept}: its numbers say nothing")
    return a


def main(arguments: Sequence[str] | None = None) -> int:
    a = parse(arguments)
    if a.table is not None:
        if not a.table.is_file():
            say(f"--table {a.table}: there is no such file; the lane writes one for each card")
            return 2
        print(table(json.loads(a.table.read_text(encoding="utf-8"))))
        return 0
    lane = Lane(
        dry=a.dry_run is not None,
        out=a.out.resolve(),
        deadline=time.monotonic() + a.budget,
        resume=a.resume,
        retry=a.retry,
        pattern=a.cases,
        cases_from=a.cases_from,
        arch=a.arch,
        commit=a.commit,
        sanitizer=a.sanitizer,
    )
    code = lane.begin()
    if code:
        return code
    for step in STEPS:
        if step in a.steps:
            getattr(lane, step)()
    return lane.end()


if __name__ == "__main__":
    sys.exit(main())
