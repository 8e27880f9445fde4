"""A merge on a Ray cluster whose nodes share storage: the same plan, journal and bytes.

    execute(plan, engine=RayEngine("auto"))           cl-fast merge --engine ray recipe.yml out

The driver keeps all that `execute` promises (checks, lock, journal, resume, one rename at the end)
and sends out units of work: some tensors of one output file, whose places are known before the
first byte. A task reads its inputs from, and writes its tensors to, the shared storage; what
travels is the slice of the plan and, back, one record of checksums per tensor. A model-wide trim
sends back histograms of magnitude codes, which the driver sums.

A unit that is lost with its node or worker is done again, by any other; it writes the same bytes to
the same places, so it does not matter how far the lost one came, or whether it is still at it.
Ray: Moritz et al. 2018, https://arxiv.org/abs/1712.05889.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import socket
import time
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from cl_fast._version import __version__
from cl_fast.checkpoints.remote import State, is_url, state_of
from cl_fast.errors import CheckpointError, ClFastError, OutputError
from cl_fast.merging.description import bytes_text
from cl_fast.merging.executors import (
    CodeRange,
    Executor,
    Io,
    Nan,
    ShardJob,
    Tick,
    make_executor,
    sources,
    thresholds_by_counts,
)
from cl_fast.merging.journal import TensorRecord
from cl_fast.merging.output import sync_file, write_failure

if TYPE_CHECKING:
    from cl_fast.merging.plan import Plan, TensorPlan

__all__ = ["RayEngine", "RayExecutor"]

_UNIT_BYTES = (16 << 20, 256 << 20)
"""Least and most that one task reads and writes, where there is a choice: a task of the most takes
a fraction of a second, far more than sending it."""

_ANSWER_SECONDS = 60.0
"""How long a node may take to look at the shared storage."""

_PATIENCE_SECONDS = 60.0
"""How long to wait for a node that can take a task, once none is left."""


class RayEngine:
    """The `engine` of `cl_fast.merging.execute` that spreads a merge over a Ray cluster.

    Args:
        address: ``HOST:PORT`` of the cluster's head; ``auto``: the cluster that this machine
            belongs to, or to which this process is connected already; ``local``: a cluster of this
            machine alone, started for the occasion.
        unit: bytes that one task reads and writes; None: chosen by the size of merge and cluster.
        retries: how often one unit of work may be lost with its node before the merge gives up.

    `execute`'s ``threads`` are the CPUs that one task takes, by default half of the smallest
    node's, so that one task computes while another begins or ends; ``memory`` bounds the working
    memory of one task. A context manager: at its end a connection that it made itself is closed.
    """

    def __init__(self, address: str = "auto", *, unit: int | None = None, retries: int = 3) -> None:
        if not isinstance(address, str) or not address.strip():
            raise ValueError(f"address must be 'auto', 'local' or HOST:PORT; got {address!r}")
        if unit is not None and unit < 1:
            raise ValueError(f"unit must be at least 1 byte; got {unit}")
        if retries < 0:
            raise ValueError(f"retries must not be negative; got {retries}")
        self.address = address.strip()
        self.unit = unit
        self.retries = retries
        self._ours = False

    def __call__(
        self,
        plan: Plan,
        *,
        backend: str | None,
        threads: int | None,
        memory: int | None,
        io: Io,
        nan: Nan,
    ) -> RayExecutor:
        """See `cl_fast.merging.executors.Engine`.

        Raises:
            OutputError: Ray is not installed, no cluster is at the address, or no backend here.
        """
        ray = self._connect()
        # What this machine would do: the backend is chosen, and what it cannot do refused, once.
        here = make_executor(plan, backend=backend, threads=threads, memory=memory, io=io, nan=nan)
        settings = _Settings(
            backend=here.name, threads=threads or 0, memory=memory, io=io, nan=nan, fsync=True
        )
        return RayExecutor(ray, here, settings, unit=self.unit, retries=self.retries)

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection to the cluster, if it was made here."""
        if self._ours:
            import ray

            ray.shutdown()
            self._ours = False

    def _connect(self) -> ModuleType:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise OutputError(
                "engine ray: Ray is not installed; pip install 'cl_fast[ray]', here and on the "
                "nodes"
            ) from error
        if ray.is_initialized():
            at = str(ray.get_runtime_context().gcs_address)
            if self.address not in ("auto", "local", at):
                raise OutputError(
                    f"engine ray: this process is connected to the cluster at {at} already, not to "
                    f"{self.address}; call ray.shutdown() first, or give address 'auto'"
                )
            return ray  # type: ignore[no-any-return]
        if "://" in self.address:
            raise OutputError(
                f"engine ray: {self.address} is the address of a Ray client; the merge is driven "
                "from a machine that sees the shared storage: run it on a node of the cluster and "
                "give HOST:PORT or 'auto'"
            )
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.address == "local":
            options["include_dashboard"] = False
        else:
            self._check_reachable()
        try:
            ray.init(address=self.address, **options)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            told = str(error).strip().splitlines()
            raise OutputError(
                f"engine ray: no Ray cluster at {self.address}: {told[0] if told else error!r}; "
                "start one (ray start --head, and on the other nodes ray start "
                "--address=HOST:PORT) or give --ray-address HOST:PORT"
            ) from error
        self._ours = True
        return ray  # type: ignore[no-any-return]

    def _check_reachable(self) -> None:
        """Ray itself would try an address where nothing listens for minutes."""
        if self.address == "auto":
            return
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise OutputError(
                f"engine ray: {self.address!r} is no address of a cluster; give HOST:PORT of its "
                "head (as ray start --head says it), 'auto' or 'local'"
            )
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise OutputError(
                f"engine ray: no Ray cluster at {self.address}: {error.strerror or error}; is its "
                "head running, and is the port that of 'ray start --head'?"
            ) from error


@dataclass(frozen=True, slots=True)
class _Settings:
    """How a task works. `backend`: "native" or "eager"; `threads`: 0 until the cluster is known."""

    backend: str
    threads: int
    memory: int | None
    io: Io
    nan: Nan
    fsync: bool

    def executor(self, tensors: Sequence[TensorPlan]) -> Executor:
        return make_executor(
            _Slice(tuple(tensors)),
            backend=self.backend,
            threads=self.threads,
            memory=self.memory,
            io=self.io,
            nan=self.nan,
        )


@dataclass(frozen=True, slots=True)
class _Slice:
    """What a task knows of the plan."""

    tensors: tuple[TensorPlan, ...]


@dataclass(frozen=True, slots=True)
class _Token:
    """A file in the working folder whose content only a machine with the same storage sees."""

    path: Path
    text: str

    def check(self, where: str) -> None:
        try:
            seen = self.path.read_text()
        except OSError:
            seen = ""
        if seen != self.text:
            raise OutputError(
                f"engine ray: {where} does not see {self.path.parent}, which this merge writes to: "
                "a Ray cluster without shared storage; put inputs and output on storage that every "
                "node mounts at the same path, or merge on one machine"
            )


@dataclass(frozen=True, slots=True)
class _Unit:
    """Some tensors of one output file. `size`: bytes that they read and write."""

    number: int
    tensors: tuple[TensorPlan, ...]
    path: Path
    size: int


class RayExecutor:
    """See `cl_fast.merging.executors.SpreadExecutor`. `lost`: units that had to be done again."""

    def __init__(
        self,
        ray: ModuleType,
        here: Executor,
        settings: _Settings,
        *,
        unit: int | None,
        retries: int,
    ) -> None:
        self.name = f"{here.name} on Ray"
        self.lost = 0
        self._ray = ray
        self._here = here
        self._settings = settings
        self._unit = unit
        self._retries = retries
        self._token: _Token | None = None
        self._slots = 1

    # ------------------------------------------------------------------------- before any work

    def prepare(self, plan: Plan, work: Path, *, fsync: bool) -> None:
        """See `SpreadExecutor`: every node must see the working folder and the same inputs.

        Raises:
            OutputError: there is no node for the tasks; one does not see the working folder or may
                not write there, or runs another version of cl_fast, or not the same backend.
            CheckpointError: a node sees another file, or none, where an input is.
        """
        nodes = self._nodes()
        largest = max((cpus for _, _, cpus in nodes), default=0)
        asked = self._settings.threads
        if largest < max(asked, 1):
            raise OutputError(
                f"engine ray: no node of the cluster has {asked} CPUs, the largest has {largest}; "
                "give fewer --threads"
                if largest
                else "engine ray: the cluster has no node with a CPU for tasks"
            )
        threads = asked or max(1, min(cpus for _, _, cpus in nodes) // 2)
        nodes = [node for node in nodes if node[2] >= threads]
        self._settings = dataclasses.replace(self._settings, threads=threads, fsync=fsync)
        self._token = _Token(work / f"shared-{secrets.token_hex(8)}", secrets.token_hex(16))
        try:
            self._token.path.write_text(self._token.text)
            sync_file(self._token.path)
        except OSError as error:
            raise write_failure(self._token.path, error) from error
        count = self._look_from(nodes, plan)
        self._slots = self._count_slots()
        nodes_text = "1 Ray node" if count == 1 else f"{count} Ray nodes"
        self.name = f"{self._here.name} on {nodes_text}"

    def _nodes(self) -> list[tuple[str, str, int]]:
        """Id, name and whole CPUs of every node that can take a task."""
        return [
            (str(node["NodeID"]), str(node["NodeManagerAddress"]), int(node["Resources"]["CPU"]))
            for node in self._ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
        ]

    def _look_from(self, nodes: Sequence[tuple[str, str, int]], plan: Plan) -> int:
        """Asks every node what it sees; the number of those that are there and see all."""
        from ray.exceptions import GetTimeoutError, RayError, RayTaskError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from cl_fast.merging.plan import NUMERICS

        files = {
            header.path: State(header.file_size, header.mtime_ns, header.version)
            for checkpoint in plan.inputs
            for header in checkpoint.files
        }
        assert self._token is not None
        look = self._ray.remote(_look)
        answers = []
        for node, name, _ in nodes:
            where = f"node {name} ({node[:8]})"
            pinned = NodeAffinitySchedulingStrategy(node, soft=False)
            task = look.options(num_cpus=0, max_retries=0, scheduling_strategy=pinned)
            answers.append((where, task.remote(self._token, where, files, self._settings.backend)))
        seen, lost = 0, None
        for where, answer in answers:
            try:
                found = self._ray.get(answer, timeout=_ANSWER_SECONDS)
            except GetTimeoutError as error:
                raise OutputError(
                    f"engine ray: {where} did not answer within {_ANSWER_SECONDS:.0f} s; is its "
                    "storage mounted, and does it have a CPU and memory free?"
                ) from error
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, Exception) else error
                raise OutputError(
                    f"engine ray: {where} cannot run cl_fast ({type(cause).__name__}: "
                    f"{_first_line(cause)}); install cl_fast {__version__} there"
                ) from error
            except RayError as error:  # dead, and the cluster has not noticed yet
                lost = error
                continue
            seen += 1
            if isinstance(found, Exception):
                raise found
            if (found["cl_fast"], found["numerics"]) != (__version__, NUMERICS):
                raise OutputError(
                    f"engine ray: {where} has cl_fast {found['cl_fast']} (arithmetic "
                    f"{found['numerics']}), this machine {__version__} (arithmetic {NUMERICS}); "
                    "install one version everywhere"
                )
            if found["backend"] is not None:
                raise OutputError(
                    f"engine ray: backend {self._settings.backend!r} is not available on {where}: "
                    f"{found['backend']}; install cl_fast there as here, or give --backend eager"
                )
        if not seen:
            raise OutputError(
                "engine ray: every node was lost before the merge began "
                f"({_first_line(lost) if lost else 'none answered'}); start the nodes again"
            ) from lost
        return seen

    # ------------------------------------------------------------------------------- the work

    def model_thresholds(self, plan: Plan, tick: Tick) -> list[int]:
        """See `Executor`: two rounds of histograms, summed here. Each reads all inputs once."""
        import numpy as np

        combined = [tensor for tensor in plan.tensors if tensor.kind == "combine"]
        units = self._cut([ShardJob(0, tuple(combined), plan.output)])

        def count(ranges: Sequence[CodeRange]) -> list[Any]:
            totals: list[Any] = [0] * len(ranges)
            for unit, counts in self._carry_out(units, _count, list(ranges)):
                for position, part in enumerate(counts):
                    totals[position] = totals[position] + np.frombuffer(part, dtype=np.uint64)
                tick((unit.size - sum(tensor.nbytes for tensor in unit.tensors)) // 2)
            return totals

        return thresholds_by_counts(plan, count)

    def write(
        self, tensors: Sequence[TensorPlan], path: Path, codes: Sequence[int] | None, tick: Tick
    ) -> list[TensorRecord]:
        """See `Executor`."""
        [(_, records)] = self.write_shards([ShardJob(0, tuple(tensors), path)], codes, tick)
        return records

    def write_shards(
        self, jobs: Sequence[ShardJob], codes: Sequence[int] | None, tick: Tick
    ) -> Iterator[tuple[int, list[TensorRecord]]]:
        """See `SpreadExecutor`."""
        units = self._cut(jobs)
        left: dict[int, int] = {}
        for unit in units:
            left[unit.number] = left.get(unit.number, 0) + 1
        done: dict[int, dict[str, TensorRecord]] = {job.number: {} for job in jobs}
        order = {job.number: job for job in jobs}
        with contextlib.closing(self._carry_out(units, _write, codes)) as finished:
            for unit, records in finished:
                done[unit.number].update({record.name: record for record in records})
                left[unit.number] -= 1
                tick(unit.size)
                if left[unit.number] == 0:
                    found = done.pop(unit.number)
                    yield unit.number, [found[t.name] for t in order[unit.number].tensors]

    def compute(
        self, tensor: TensorPlan, codes: Sequence[int] | None
    ) -> tuple[bytearray, TensorRecord]:
        """See `Executor`; one tensor into memory is done here."""
        return self._here.compute(tensor, codes)

    def count_codes(
        self, tensors: Sequence[TensorPlan], ranges: Sequence[CodeRange]
    ) -> list[bytes]:
        """See `Executor`; done here."""
        return self._here.count_codes(tensors, ranges)

    def gram(self, tensors: Sequence[TensorPlan], tick: Tick) -> list[list[float]]:
        """See `Executor`; done here."""
        return self._here.gram(tensors, tick)

    def _count_slots(self) -> int:
        """How many tasks can run at once."""
        threads = self._settings.threads
        return sum(cpus // threads for _, _, cpus in self._nodes())

    def _cut(self, jobs: Sequence[ShardJob]) -> list[_Unit]:
        """Units of work: neighbours in one file; many for each task that can run at once."""
        sized = [[(tensor, _moved(tensor)) for tensor in job.tensors] for job in jobs]
        total = sum(size for tensors in sized for _, size in tensors)
        least, most = _UNIT_BYTES
        limit = self._unit or min(most, max(least, total // (8 * max(self._slots, 1))))
        units = []
        for job, tensors in zip(jobs, sized, strict=True):
            group: list[TensorPlan] = []
            filled = 0
            for tensor, size in tensors:
                if group and filled + size > limit:
                    units.append(_Unit(job.number, tuple(group), job.path, filled))
                    group, filled = [], 0
                group.append(tensor)
                filled += size
            units.append(_Unit(job.number, tuple(group), job.path, filled))
        return units

    def _carry_out(
        self, units: Sequence[_Unit], function: Any, argument: Any
    ) -> Generator[tuple[_Unit, Any], None, None]:
        """Runs ``function(token, settings, driver, unit, argument)`` for every unit, anywhere.

        Yields each with its answer as they come; what is lost with a node or worker is run again.
        """
        from ray.exceptions import RayError, RayTaskError

        ray, token = self._ray, self._token
        assert token is not None
        here = ray.get_runtime_context().get_node_id()
        remote = ray.remote(function).options(
            num_cpus=self._settings.threads, max_retries=0, scheduling_strategy="SPREAD"
        )
        argument = ray.put(argument)
        waiting: deque[tuple[_Unit, int]] = deque((unit, 0) for unit in units)
        running: dict[Any, tuple[_Unit, int]] = {}
        idle_since: float | None = None
        try:
            while waiting or running:
                while waiting and len(running) < 2 * self._slots:
                    unit, losses = waiting.popleft()
                    task = remote.remote(token, self._settings, here, unit, argument)
                    running[task] = unit, losses
                ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
                if not ready:
                    idle_since = self._check_alive(idle_since)
                    continue
                idle_since = None
                for task in ready:
                    unit, losses = running.pop(task)
                    try:
                        answer = ray.get(task)
                    except RayTaskError as error:
                        cause = error.cause if isinstance(error.cause, Exception) else error
                        raise cause from None
                    except RayError as error:
                        waiting.appendleft((unit, self._lose(unit, losses, error)))
                        continue
                    if isinstance(answer, Exception):
                        raise answer
                    yield unit, answer
        finally:
            self._cancel(list(running))

    def _lose(self, unit: _Unit, losses: int, error: Exception) -> int:
        """A unit was lost with whoever did it."""
        self.lost += 1
        if losses >= self._retries:
            raise OutputError(
                f"engine ray: a part of {unit.path.name} ({bytes_text(unit.size)}, from tensor "
                f"{unit.tensors[0].name} on) was lost {losses + 1} times with its node or worker: "
                f"{_first_line(error)}; see the logs of the nodes (memory?)"
            ) from error
        warnings.warn(
            f"Ray lost a node or a worker ({type(error).__name__}); its part of {unit.path.name} "
            "is done again",
            RuntimeWarning,
            stacklevel=2,
        )
        self._slots = max(1, self._count_slots())
        return losses + 1

    def _check_alive(self, since: float | None) -> float | None:
        """Gives up when for a while no node has been there that could take a task."""
        slots = self._count_slots()
        if slots:
            self._slots = slots
            return None
        now = time.monotonic()
        if since is not None and now - since > _PATIENCE_SECONDS:
            raise OutputError(
                f"engine ray: no node with {self._settings.threads} CPUs has been in the cluster "
                f"for {_PATIENCE_SECONDS:.0f} s; start the nodes again"
            )
        return since or now

    def _cancel(self, tasks: list[Any]) -> None:
        """Ends tasks: asked to at first, so that threads of the core end in order, then killed."""
        from ray.exceptions import RayError

        if not tasks:
            return
        for force, seconds in ((False, 10.0), (True, 5.0)):
            for task in tasks:
                with contextlib.suppress(RayError, ValueError):
                    self._ray.cancel(task, force=force)
            _, tasks = self._ray.wait(tasks, num_returns=len(tasks), timeout=seconds)
            if not tasks:
                return


def _moved(tensor: TensorPlan) -> int:
    return tensor.nbytes + sum(source.nbytes for _, source in sources(tensor))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ------------------------------------------------------------------------------- on the nodes


def _look(
    token: _Token, where: str, files: dict[str, State], backend: str
) -> dict[str, Any] | Exception:
    """What a node sees: versions and backend, or the error about its storage."""
    from cl_fast.backends import native
    from cl_fast.merging.plan import NUMERICS

    try:
        token.check(where)
        mark = token.path.with_name(f"{token.path.name}-{secrets.token_hex(4)}")
        try:
            mark.write_text(where)
            mark.unlink()
        except OSError as error:
            raise OutputError(
                f"engine ray: {where} may not write to {token.path.parent} "
                f"({error.strerror or error}), which this merge writes to"
            ) from error
        for path, state in files.items():
            _look_at(path, state, where)
    except ClFastError as error:
        return error
    reason = None
    if backend == "native" and native.load() is None:
        reason = native.reason()
    return {"cl_fast": __version__, "numerics": NUMERICS, "backend": reason}


def _look_at(path: str, state: State, where: str) -> None:
    """Raises CheckpointError where a node does not see an input as the driver does."""
    if is_url(path):
        try:
            seen = state_of(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error} (on {where})") from None
    else:
        try:
            status = Path(path).stat()
        except OSError as error:
            raise CheckpointError(
                f"{path}: {where} does not see this input ({error.strerror or error}): a Ray "
                "cluster without shared storage; put it on storage that every node mounts at the "
                "same path"
            ) from error
        seen = State(status.st_size, status.st_mtime_ns, "")
    if seen != state:
        raise CheckpointError(
            f"{path}: {where} sees another file there (size {seen.size}, here {state.size}): a Ray "
            "cluster without shared storage; put it on storage that every node mounts at the same "
            "path"
        )


def _where() -> str:
    import ray

    return f"node {ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:8]})"


def _write(
    token: _Token,
    settings: _Settings,
    driver: str,
    unit: _Unit,
    codes: Sequence[int] | None,
) -> list[TensorRecord] | Exception:
    """Computes the tensors of a unit into their file; returns their records, or our error."""
    import ray

    try:
        token.check(_where())
        executor = settings.executor(unit.tensors)
        records = executor.write(unit.tensors, unit.path, codes, lambda _: None)
        # The driver's fsync reaches the pages of its own machine only.
        if settings.fsync and ray.get_runtime_context().get_node_id() != driver:
            try:
                sync_file(unit.path)
            except OSError as error:
                raise write_failure(unit.path, error) from error
    except (ClFastError, OSError) as error:
        return error
    return records


def _count(
    token: _Token,
    settings: _Settings,
    driver: str,
    unit: _Unit,
    ranges: Sequence[CodeRange],
) -> list[bytes] | Exception:
    """Histograms of the magnitude codes of a unit's tensors."""
    try:
        token.check(_where())
        return settings.executor(unit.tensors).count_codes(unit.tensors, ranges)
    except (ClFastError, OSError) as error:
        return error
