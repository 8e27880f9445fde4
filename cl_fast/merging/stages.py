"""Several recipes in one file: merges that use each other's results (mergekit-multi).

    name: first
    merge_method: linear
    models: [{model: models/one}, {model: models/two}]
    ---
    merge_method: ties
    base_model: models/base
    models: [{model: first}, {model: models/three}]

Each document is a stage. A stage is called by its `name` where another names a model. All stages
are planned before the first byte is written, the later ones over the planned outputs of the
earlier, and carried out in an order in which each comes after those that it uses. Outputs of stages
lie in a folder beside the output; one that is finished is used again only if it was made from the
same plan and all of its bytes are still those that were written.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_fast.checkpoints.checkpoint import Checkpoint, absolute
from cl_fast.checkpoints.remote import is_url, local_path
from cl_fast.checkpoints.safetensors import TensorInfo, strict_json
from cl_fast.documents import kind_of, parse_documents, read_document
from cl_fast.errors import CheckpointError, ClFastError, OutputError, RecipeError
from cl_fast.merging import engine, manifest
from cl_fast.merging.engine import Result
from cl_fast.merging.plan import Plan, make_plan
from cl_fast.merging.recipe import MAX_RECIPE_BYTES, Recipe, map_references, parse_recipe
from cl_fast.merging.references import BadReference, reference_text
from cl_fast.merging.upload import staging
from cl_fast.merging.verify import verify

if TYPE_CHECKING:
    from cl_fast.merging.engine import Progress

__all__ = ["Stage", "load_stages", "merge_stages", "plan_stages"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One merge of several.

    Attributes:
        name: as the file calls it; ``None`` for the one that has no name.
        recipe: its recipe; stages that it uses are named by their folders.
        output: the folder that it makes.
        uses: the outputs of other stages among its models.
        url: where the output goes instead; `output` is where it is built then.
    """

    name: str | None
    recipe: Recipe
    output: Path
    uses: tuple[Path, ...]
    url: str | None = None

    @property
    def title(self) -> str:
        """What messages call it."""
        return "the final merge" if self.name is None else f"stage {self.name!r}"


@dataclass(frozen=True, slots=True)
class _Planned(Checkpoint):
    """The output of a plan that is not carried out yet."""

    beside: Path
    tokenizer: Mapping[str, bytes]

    @property
    def folder(self) -> Path:
        return self.beside

    @property
    def tokenizer_files(self) -> Mapping[str, bytes]:
        return self.tokenizer


def load_stages(
    path: str | Path, output: str | Path, *, intermediate: str | Path | None = None
) -> tuple[Stage, ...]:
    """Read a file of one or several recipes.

    Args:
        path: the file; lines of ``---`` part the recipes.
        output: folder or URL of the final merge: the one without a name, else the last in the file.
        intermediate: the folder of the others' outputs, each under its name; by default
            ``OUTPUT.stages``.

    Returns:
        the stages in the order in which they are merged; the final one last.

    Raises:
        RecipeError: the file cannot be read, a recipe is wrong (the message tells which), a name
            is missing, comes twice or is no folder's name, or stages use each other in a circle.
    """
    file = Path(path)
    text = read_document(file, "recipe", MAX_RECIPE_BYTES)
    documents = [d for d in parse_documents(text, f"{file}: ") if d is not None]
    url = str(output) if is_url(str(output)) and local_path(str(output)) is None else None
    place = staging(url) if url is not None else absolute(local_path(str(output)) or str(output))
    if len(documents) < 2:
        if intermediate is not None:
            raise RecipeError(
                f"{file}: holds one recipe; a folder for intermediate merges has no effect"
            )
        return (Stage(None, parse_recipe(text, source=file), place, (), url),)
    names = [_name(document, f"{file}: document {i}: ") for i, document in enumerate(documents, 1)]
    for i, name in enumerate(names):
        if name in names[:i]:
            words = f"the name {name!r} is taken by another merge of the file"
            if name is None:
                words = "has no name; only one merge, the final one, may have none"
            raise RecipeError(f"{file}: document {i + 1}: {words}")
    final = names.index(None) if None in names else len(names) - 1
    target = place
    folder = target.with_name(f"{target.name}.stages")
    if intermediate is not None:
        folder = absolute(str(intermediate))
    outputs = {name: target if i == final else folder / str(name) for i, name in enumerate(names)}
    stages = {}
    for i, (name, document) in enumerate(zip(names, documents, strict=True)):
        prefix = f"document {i + 1}" + ("" if name is None else f" ({name})")
        stages[name] = _stage(name, document, outputs, file, prefix)
        if i == final:
            stages[name] = replace(stages[name], url=url)
    return tuple(_ordered(stages, names[final], file))


def _name(document: Any, prefix: str) -> str | None:
    if not isinstance(document, Mapping):
        raise RecipeError(f"{prefix}a recipe is a mapping; got {kind_of(document)}")
    name = document.get("name")
    if name is None:
        return None
    if not isinstance(name, str):
        raise RecipeError(f"{prefix}name: must be text; got {kind_of(name)}")
    if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
        raise RecipeError(f"{prefix}name: {name!r} must be fit for a folder's name, without '/'")
    if "+" in name or "@" in name:
        raise RecipeError(
            f"{prefix}name: {name!r} must hold no '+' or '@', which have a meaning in references"
        )
    return name


def _stage(
    name: str | None,
    document: Mapping[str, Any],
    outputs: Mapping[str | None, Path],
    file: Path,
    prefix: str,
) -> Stage:
    content = {key: value for key, value in document.items() if key != "name"}
    used: dict[Path, None] = {}

    def folder(word: str) -> str:
        base, plus, adapter = word.partition("+")
        if base not in outputs:
            return word
        used[outputs[base]] = None
        return f"{outputs[base]}{plus}{adapter}"

    def change(value: Any) -> Any:
        try:
            text = reference_text(value)
        except BadReference:
            return value  # the recipe says it with its key
        return folder(text) if isinstance(text, str) else value

    try:
        parse_recipe(content)  # errors under the names that the file has
        content = map_references(_copied(content), change)
        recipe = parse_recipe(content, source=None)
    except RecipeError as error:
        raise RecipeError(f"{file}: {prefix}: {error}") from None
    return Stage(name, recipe, outputs[name], tuple(used))


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _ordered(stages: Mapping[str | None, Stage], final: str | None, file: Path) -> list[Stage]:
    """Each after those that it uses; else in the order of the file, the final one last."""
    by_output = {stage.output: stage for stage in stages.values()}
    done: dict[Path, Stage] = {}
    open_now: list[Stage] = []

    def visit(stage: Stage) -> None:
        if stage.output in done:
            return
        if stage in open_now:
            circle = [*open_now[open_now.index(stage) :], stage]
            raise RecipeError(
                f"{file}: the merges use each other in a circle: "
                + " -> ".join(str(one.name or "the final merge") for one in circle)
            )
        open_now.append(stage)
        for path in stage.uses:
            visit(by_output[path])
        open_now.pop()
        done[stage.output] = stage

    for name, stage in stages.items():
        if name != final:
            visit(stage)
    visit(stages[final])
    ordered = list(done.values())
    last = stages[final]
    if ordered[-1] is not last:
        user = next(stage for stage in ordered if last.output in stage.uses)
        raise RecipeError(
            f"{file}: {user.title} uses {last.title}, which makes the output and comes last; let "
            "the last recipe of the file be the one whose result is wanted"
        )
    return ordered


def plan_stages(stages: Sequence[Stage], **options: Any) -> list[Plan]:
    """Plan all stages before any is carried out; later ones over the planned outputs.

    Args:
        stages: from `load_stages`.
        options: of `make_plan`.

    Raises:
        CheckpointError, RecipeError: as `make_plan`; the message tells which stage.
    """
    plans: list[Plan] = []
    planned: dict[str, Checkpoint] = {}
    for stage in stages:
        plans.append(_plan(stage, stages, planned=planned, **options))
        planned[str(stage.output)] = _output_of(plans[-1])
    return plans


def _plan(stage: Stage, stages: Sequence[Stage], **options: Any) -> Plan:
    try:
        return make_plan(stage.recipe, stage.url or stage.output, **options)
    except (RecipeError, CheckpointError) as error:
        if len(stages) == 1:
            raise
        hint = ""
        if "does not exist" in str(error) or "not a folder here" in str(error):
            known = [str(other.name) for other in stages if other.name is not None]
            words = [Path(word.strip("'")).name for word in str(error).split()]
            close = [w for word in words for w in difflib.get_close_matches(word, known, 1, 0.75)]
            hint = f"; the file has a merge called {close[0]!r}" if close else ""
        raise type(error)(f"{stage.title}: {error}{hint}") from None


def _output_of(plan: Plan) -> Checkpoint:
    """What a plan will make, as far as its headers tell."""
    tensors = {
        tensor.name: TensorInfo(
            tensor.name,
            tensor.dtype,
            tensor.shape,
            str(plan.output / plan.shards[tensor.shard].filename),
            tensor.offset,
            tensor.nbytes,
        )
        for tensor in plan.tensors
    }
    config = plan.donor.config
    for file in plan.sidecars:
        if file.name == "config.json" and file.content is not None:
            content = strict_json(file.content, "config.json")
            config = content if isinstance(content, dict) else config
    built = plan.vocabulary.files if plan.vocabulary is not None else {}
    tokenizer = {name: content for name, content in built.items() if content is not None}
    folder = plan.tokenizer_donor
    return _Planned(str(plan.output), plan.output, (), tensors, config, folder, tokenizer)


def merge_stages(
    stages: Sequence[Stage],
    *,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    begin: Callable[[Plan], object] | None = None,
    tell: Callable[[Plan, Result | None], object] | None = None,
    planning: Mapping[str, Any] | None = None,
    **options: Any,
) -> Result:
    """Carry out all stages, and return the result of the final one.

    Args:
        stages: from `load_stages`.
        overwrite: replace the final output, if there is one.
        restart: make every stage anew, also those that are finished.
        progress: as of `execute`.
        begin: called with each plan before it is carried out.
        tell: called with each plan and its result; with None for a stage that was finished.
        planning: options of `make_plan`.
        options: of `execute`.

    Raises:
        CheckpointError, RecipeError: as `make_plan`, before anything is written.
        OutputError: as `execute`; the folder of a stage holds something else.
    """
    settings = dict(planning or {})
    if len(stages) > 1:
        *_, last = plan_stages(stages, **settings)
        if not options.get("resume"):
            engine.check_output(last, overwrite=overwrite)
    for stage in stages:
        final = stage is stages[-1]
        plan = _plan(stage, stages, **settings)
        if not final and not restart and _finished(stage, plan, options.get("nan", "refuse")):
            if tell is not None:
                tell(plan, None)
            continue
        if begin is not None:
            begin(plan)
        if not final:
            stage.output.parent.mkdir(parents=True, exist_ok=True)
        result = engine.execute(
            plan,
            overwrite=overwrite or not final,
            restart=restart,
            progress=progress,
            **options,
        )
        if tell is not None:
            tell(plan, result)
    return result


def _finished(stage: Stage, plan: Plan, nan: str) -> bool:
    """Whether a stage's output is there, of this plan and policy of NaN, and sound.

    Raises:
        OutputError: there is something that no merge made.
    """
    if not stage.output.exists() or not any(stage.output.iterdir()):
        return False
    try:
        record = manifest.read(stage.output)
    except ClFastError as error:
        raise OutputError(
            f"{stage.output}: is where {stage.title} goes, and holds something else ({error}); "
            "move it, or give another folder for intermediate merges"
        ) from None
    # What was made under "refuse" had nothing that a policy could change.
    if record["fingerprint"] != plan.fingerprint or record["nan"] not in ("refuse", nan):
        return False
    return verify(stage.output, sample=0, inputs=False).ok
