"""The chat template of an output: the models' own, one of the usual formats, or the user's.

``chat_template: auto`` takes the template that most of the models have (of equals the first, the
base before the models); ``alpaca``, ``chatml``, ``exaone``, ``llama3`` and ``mistral`` are written
here after the formats that these models publish; anything with a ``{`` is Jinja text, and a path
that ends in ``.jinja`` is a file of it. It is written to ``chat_template.jinja``, where
transformers looks first, and removed from every other place of the output's tokenizer.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_fast.checkpoints.checkpoint import Checkpoint, absolute
from cl_fast.checkpoints.safetensors import strict_json
from cl_fast.checkpoints.sidecar import Sidecar
from cl_fast.checkpoints.vocabulary import VocabularyReader
from cl_fast.errors import CheckpointError, RecipeError
from cl_fast.merging.inputs import Derived
from cl_fast.merging.methods import suggest

if TYPE_CHECKING:
    from cl_fast.merging.recipe import Recipe

__all__ = ["BUILTIN", "check_chat_template", "with_chat_template"]

_FILE = "chat_template.jinja"
_MAX_BYTES = 1_000_000

BUILTIN: Mapping[str, str] = {
    # instruction following as Stanford Alpaca: sections with headings, a blank line between
    "alpaca": (
        "{%- for message in messages -%}\n"
        "{%- if message['role'] == 'user' -%}\n"
        "{{- '### Instruction:\\n' -}}\n"
        "{%- elif message['role'] == 'assistant' -%}\n"
        "{{- '### Response:\\n' -}}\n"
        "{%- elif message['role'] == 'user_context' -%}\n"
        "{{- '### Input:\\n' -}}\n"
        "{%- endif -%}\n"
        "{{- message['content'] | trim -}}\n"
        "{{- '\\n' if loop.last and message['role'] != 'system' else '\\n\\n' -}}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}\n"
        "{{- '\\n### Response:\\n' -}}\n"
        "{%- endif -%}"
    ),
    # every message between <|im_start|>role and <|im_end|>
    "chatml": (
        "{%- for message in messages -%}\n"
        "{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' -}}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
    # [|role|] before a message; turns of the system and the assistant end with [|endofturn|]
    "exaone": (
        "{%- if messages and messages[0]['role'] != 'system' -%}\n"
        "{{- '[|system|][|endofturn|]\\n' -}}\n"
        "{%- endif -%}\n"
        "{%- for message in messages -%}\n"
        "{{- '[|' ~ message['role'] ~ '|]' ~ message['content'] -}}\n"
        "{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' -}}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}{{- '[|assistant|]' -}}{%- endif -%}"
    ),
    # a header with the role, an empty line, the message, <|eot_id|>
    "llama3": (
        "{{- bos_token -}}\n"
        "{%- for message in messages -%}\n"
        "{{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' -}}\n"
        "{{- message['content'] | trim ~ '<|eot_id|>' -}}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}\n"
        "{%- endif -%}"
    ),
    # the user between [INST] and [/INST], the system message with the first of them
    "mistral": (
        "{%- set ns = namespace(system='', user=true) -%}\n"
        "{{- bos_token -}}\n"
        "{%- for message in messages -%}\n"
        "{%- if loop.first and message['role'] == 'system' -%}\n"
        "{%- set ns.system = message['content'] ~ '\\n\\n' -%}\n"
        "{%- elif message['role'] == ('user' if ns.user else 'assistant') -%}\n"
        "{%- if ns.user -%}\n"
        "{{- ' [INST] ' ~ ns.system ~ message['content'] ~ ' [/INST]' -}}\n"
        "{%- set ns.system = '' -%}\n"
        "{%- else -%}\n"
        "{{- ' ' ~ message['content'] ~ eos_token -}}\n"
        "{%- endif -%}\n"
        "{%- set ns.user = not ns.user -%}\n"
        "{%- else -%}\n"
        "{{- raise_exception('after an optional system message, the roles must be user and '"
        " ~ 'assistant in turn; got ' ~ message['role']) -}}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}"
    ),
}

#: The tokens that a builtin template needs as such: cut into pieces they are but text.
_TOKENS: Mapping[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "exaone": ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}


def check_chat_template(value: str) -> None:
    """What can be told of the key's value without a look at the disk.

    Raises:
        RecipeError: it is neither auto, a builtin name, a .jinja file, nor Jinja text.
    """
    if value == "auto" or value in BUILTIN:
        return
    if "{" in value:
        _check_syntax(value, "chat_template")
    elif not value.strip().endswith(".jinja"):
        hint = suggest(value, ("auto", *BUILTIN))
        raise RecipeError(
            f"chat_template: must be auto, one of {', '.join(BUILTIN)}, Jinja text, or a file that "
            f"ends in .jinja; got {value[:80]!r}{hint}"
        )


def _check_syntax(text: str, where: str) -> None:
    try:
        import jinja2
    except ImportError:
        return  # transformers will say it
    if "generation" in text:
        return  # its own tag for masks of the assistant's tokens
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise RecipeError(
            f"{where}: line {error.lineno} is not a Jinja template: {error.message}"
        ) from None


def with_chat_template(
    recipe: Recipe,
    inputs: Sequence[Checkpoint],
    files: tuple[Sidecar, ...],
    folder: Path,
    notes: list[str],
    *,
    copied: bool = True,
) -> tuple[Sidecar, ...]:
    """The files beside the weights with the chat template that the recipe asks for.

    Args:
        inputs: asked, in this order, for their templates by ``auto``.
        files: as they are without that key.
        folder: where the tokenizer comes from.
        notes: gets sentences that the user should be told.
        copied: whether the output gets a tokenizer at all, and so may miss a template.

    Raises:
        RecipeError: the file is not there, or holds no template.
        CheckpointError: a model's template cannot be read.
    """
    value = recipe.chat_template
    if value is None:
        if copied:
            _note_lost(inputs, files, notes)
        return files
    if value == "auto":
        text = _most_common(inputs)
        if text is None:
            notes.append("chat_template: auto finds no chat template in any of the models")
            return files
    elif value in BUILTIN:
        text = BUILTIN[value]
        _note_missing(value, files, folder, notes)
    elif "{" in value:
        text = value
    else:
        text = _read(value.strip())
    found = {
        file.name: file
        for file in files
        if file.name != "chat_template.json" and not file.name.startswith("additional_chat_")
    }
    gone = sorted({file.name for file in files} - found.keys())
    if gone:
        notes.append(f"chat_template: takes the place of {', '.join(gone)}")
    raw = text.encode()
    found[_FILE] = Sidecar(_FILE, folder / _FILE, raw, len(raw))
    name = "tokenizer_config.json"
    if name in found:
        file = found[name]
        held = _held(file)
        config = strict_json(held, str(file.source))
        if isinstance(config, dict) and "chat_template" in config:
            del config["chat_template"]
            held = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
            found[name] = Sidecar(name, file.source, held, len(held))
    return tuple(found[name] for name in sorted(found))


def _held(file: Sidecar) -> bytes:
    return file.content if file.content is not None else file.source.read_bytes()


def _note_lost(inputs: Sequence[Checkpoint], files: Sequence[Sidecar], notes: list[str]) -> None:
    """Tell if a model has a chat template and the output gets none."""
    for file in files:
        if file.name == "tokenizer_config.json":
            config = strict_json(_held(file), str(file.source))
            if isinstance(config, dict) and config.get("chat_template"):
                return
        elif file.name.startswith(("chat_template.", "additional_chat_")):
            return
    for checkpoint in inputs:
        with contextlib.suppress(CheckpointError):  # a file that the output does not get
            if not isinstance(checkpoint, Derived) and _template_of(checkpoint.folder):
                notes.append(
                    f"{checkpoint.path} has a chat template and the output has none; write "
                    "chat_template: auto"
                )
                return


def _note_missing(name: str, files: Sequence[Sidecar], folder: Path, notes: list[str]) -> None:
    """Tell which tokens of a builtin template the output's tokenizer does not have."""
    found = {file.name: file for file in files if file.name.endswith(".json")}
    if name not in _TOKENS or "tokenizer.json" not in found:
        return
    with contextlib.suppress(CheckpointError):  # whoever loads that tokenizer is told
        read = VocabularyReader().read(folder, {key: _held(file) for key, file in found.items()})
        missing = [token for token in _TOKENS[name] if read and token not in read.tokens]
        if missing:
            notes.append(
                f"chat_template: {name}: the output's tokenizer has no {', '.join(missing)}, and "
                "cuts them into pieces like text; take the tokenizer of a model that has them "
                "(tokenizer_source), or another template"
            )


def _read(path: str) -> str:
    file = absolute(path)
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise RecipeError(f"chat_template: {file} is too large for a template")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise RecipeError(f"chat_template: {file} cannot be read ({reason})") from error
    if not text.strip():
        raise RecipeError(f"chat_template: {file} is empty")
    _check_syntax(text, f"chat_template: {file}")
    return text


def _most_common(inputs: Sequence[Checkpoint]) -> str | None:
    asked = {checkpoint.reference: checkpoint for checkpoint in inputs}
    texts = []
    for checkpoint in asked.values():
        while isinstance(checkpoint, Derived):
            checkpoint = checkpoint.base
        text = _template_of(checkpoint.folder)
        if text:
            texts.append(text)
    return Counter(texts).most_common(1)[0][0] if texts else None


def _template_of(folder: Path) -> str | None:
    """A model's default template, without white space around it."""
    try:
        if (folder / _FILE).is_file():
            return (folder / _FILE).read_text(encoding="utf-8").strip() or None
        path = folder / "tokenizer_config.json"
        config: Any = strict_json(path.read_bytes(), str(path)) if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder}: its chat template cannot be read ({error})") from error
    value = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(value, list):
        value = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }
    if isinstance(value, dict):
        value = value.get("default")
    return value.strip() or None if isinstance(value, str) else None
