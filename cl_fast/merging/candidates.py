"""Merged models for evaluation, without a checkpoint on disk.

A candidate has the very bits that `cl-fast merge` writes for its recipe. On the CPU each tensor is
computed into memory by the engine's executor, from inputs that stay in the page cache between
candidates. On a GPU the inputs are loaded once and stay there, and each candidate is combined
there; what only the executor does (methods over whole tensors, a trim over the whole model) is
computed on the CPU and moved.

A command is given a folder in memory-backed storage (/dev/shm) where that has room.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_fast.errors import ClFastError, NonFiniteError, OutputError, RecipeError
from cl_fast.merging.description import bytes_text
from cl_fast.merging.plan import Plan, make_plan
from cl_fast.merging.recipe import parse_recipe
from cl_fast.merging.sources import Made, Packed, Source

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cl_fast.merging.plan import TensorPlan

__all__ = ["Maker", "Workspace"]

_SHARED = Path("/dev/shm")
_ROOM = 1.05


class Maker:
    """Makes candidates in memory.

    Args:
        device: where they are wanted, as torch names it; None: a GPU if there is one.
        threads: of the executor.
    """

    def __init__(self, device: str | None = None, threads: int | None = None) -> None:
        import torch

        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
            torch.empty(0, device=self.device)
        except Exception as error:  # of each backend another one
            raise RecipeError(f"device: {device!r} cannot be used here: {error}") from None
        self._threads = threads
        self._loaded: dict[Source, Tensor] = {}
        self._model: nn.Module | None = None
        self._built = b""

    def state_dict(self, plan: Plan) -> dict[str, Tensor]:
        """The merged tensors by name, on the device.

        Raises:
            NonFiniteError, CheckpointError: as the merge to disk would.
        """
        from cl_fast.merging.engine import check_inputs
        from cl_fast.merging.executors import make_executor

        check_inputs(plan)
        executor = make_executor(
            plan, backend=None, threads=self._threads, memory=None, io="auto", nan="refuse"
        )
        codes = None
        if plan.model_keep:
            codes = executor.model_thresholds(plan, lambda _: None)
        state = {}
        for tensor in plan.tensors:
            if self.device.type != "cpu" and codes is None and self._combines(tensor):
                state[tensor.name] = self.combined(tensor)
            else:
                data, _ = executor.compute(tensor, codes)
                state[tensor.name] = self._tensor(tensor, data).to(self.device)
        return state

    def _combines(self, tensor: TensorPlan) -> bool:
        inputs = [tensor.base, *(term.source for term in tensor.terms)]
        packed = any(isinstance(source, Packed) for source in inputs)
        return tensor.kind == "combine" and tensor.rule is None and not packed

    def _tensor(self, tensor: TensorPlan, data: bytearray) -> Tensor:
        import torch

        dtype = _torch_dtype(tensor.dtype)
        if not data:
            return torch.empty(tensor.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(tensor.shape)

    def combined(self, tensor: TensorPlan) -> Tensor:
        """A tensor combined where its inputs are kept: on the device."""
        import torch

        from cl_fast.ops import combine

        policy = tensor.policy
        sparse = policy.sparsify != "none"
        given: dict[str, Any] = {}
        if sparse:
            given["density"] = [term.density for term in tensor.terms]
        for word in ("gamma", "epsilon"):
            values = [getattr(term, word) for term in tensor.terms]
            if any(values):
                given[word] = values
        if any(term.key for term in tensor.terms):
            given["keys"] = [term.key for term in tensor.terms]
        with torch.no_grad():
            base = None
            if policy.difference and tensor.base is not None:
                base = self._source(tensor.base, tensor)
            merged = combine(
                base,
                [self._source(term.source, tensor) for term in tensor.terms],
                weights=[term.weight for term in tensor.terms],
                policy=policy,
                lam=tensor.lam,
                out_dtype=_torch_dtype(tensor.dtype),
                **given,
            )
            if not bool(torch.isfinite(merged).all()):
                raise NonFiniteError(
                    f"tensor {tensor.name}: NaN or infinity in an input, or the merge overflows "
                    f"{tensor.dtype}"
                )
        return merged

    def _source(self, source: Source, tensor: TensorPlan) -> Tensor:
        import torch

        from cl_fast.merging.executors import read_stored

        if source not in self._loaded:
            data = source.make(self._threads) if isinstance(source, Made) else read_stored(source)
            stored = torch.frombuffer(data, dtype=_torch_dtype(source.dtype))
            self._loaded[source] = stored.to(self.device)
        return self._loaded[source].reshape(tensor.shape)

    def model(self, plan: Plan) -> nn.Module:
        """The merged model, of transformers, in evaluation mode; the same object while it fits.

        Raises:
            ClFastError: transformers is missing, or the tensors are not those of the model.
        """
        try:
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError as error:
            raise ClFastError(
                "gives: model needs transformers: pip install 'cl_fast[hf]'"
            ) from error
        state = self.state_dict(plan)
        written = next((f.content for f in plan.sidecars if f.name == "config.json"), None)
        if written is None:
            written = (plan.donor.folder / "config.json").read_bytes()
        if self._model is None or written != self._built:
            settings = json.loads(written)
            config = AutoConfig.for_model(settings.pop("model_type"), **settings)
            floats = [t.dtype for t in state.values() if t.is_floating_point()]
            with torch.device(self.device):
                built: nn.Module = AutoModelForCausalLM.from_config(
                    config, dtype=max(set(floats), key=floats.count)
                )
            self._model, self._built = built.eval().requires_grad_(False), written
        model = self._model
        own = model.state_dict()
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        named = {
            name if name in own or prefix + name not in own else prefix + name: value
            for name, value in state.items()
        }
        result = model.load_state_dict(named, strict=False)
        tied = {own[name].data_ptr() for name in own if name in named}
        missing = [name for name in result.missing_keys if own[name].data_ptr() not in tied]
        unknown = [name for name in result.unexpected_keys if not name.endswith("lm_head.weight")]
        if missing or unknown:
            raise ClFastError(
                f"the merged tensors are not those of {type(model).__name__}: "
                f"{(missing or unknown)[0]!r} is {'missing' if missing else 'unknown'}; let the "
                "function take the state dict, or evaluate by a command"
            )
        return model


def _torch_dtype(name: str) -> torch.dtype:
    from cl_fast.merging.factors import any_dtype

    return any_dtype(name)


class Workspace:
    """Where candidates for commands are written: memory-backed storage, or beside the study.

    Args:
        beside: a path whose folder is taken where there is no room in memory; it also names the
            workspace, so that what a killed run left is removed by the next one.
        say: called with a sentence where the disk must serve.
    """

    def __init__(self, beside: Path, say: Any) -> None:
        self._beside = beside.absolute()
        self._say = say
        self._told = False
        name = hashlib.blake2b(str(self._beside).encode(), digest_size=8).hexdigest()
        user = os.getuid() if hasattr(os, "getuid") else 0
        self._memory = _SHARED / f"cl_fast-search-{user}-{name}"
        self._disk = self._beside.parent / f".{self._beside.name}.candidates"
        self.clear()

    def clear(self) -> None:
        """Removes all that is in it."""
        for folder in (self._memory, self._disk):
            shutil.rmtree(folder, ignore_errors=True)

    def nowhere(self) -> Path:
        """A path for plans that write nothing."""
        return self._disk / "candidate"

    @contextlib.contextmanager
    def folder(self, recipe: Mapping[str, Any], threads: int | None) -> Iterator[Path]:
        """The checkpoint of a recipe, removed afterwards."""
        from cl_fast.merging.engine import execute
        from cl_fast.merging.output import free_bytes

        plan = make_plan(parse_recipe(recipe), self.nowhere(), threads=threads)
        need = int(plan.bytes_written * _ROOM) + (64 << 20)
        root = self._memory
        room = free_bytes(_SHARED) if _SHARED.is_dir() and os.access(_SHARED, os.W_OK) else 0
        if room < need:
            if not self._told:
                self._told = True
                self._say(
                    f"{_SHARED} has {bytes_text(room)} free and a candidate takes "
                    f"{bytes_text(need)}: candidates are written to {self._disk}"
                )
            root = self._disk
        self.clear()
        try:
            root.mkdir(mode=0o700, parents=True)
            place = Path(tempfile.mkdtemp(dir=root)) / "candidate"
            yield execute(
                make_plan(parse_recipe(recipe), place, threads=threads),
                threads=threads,
                fsync=False,
            ).output
        except OSError as error:
            if isinstance(error, ClFastError):
                raise
            raise OutputError(f"{root}: cannot be written ({error.strerror or error})") from error
        finally:
            self.clear()
