"""The chat template of an output: where it comes from, and where it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import write_checkpoint

from cl_fast.errors import RecipeError
from cl_fast.merging.chat_templates import BUILTIN
from cl_fast.merging.plan import Plan, make_plan
from cl_fast.merging.recipe import parse_recipe

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Who?"},
]

#: What each format's own documentation shows for TALK, with the prompt of an answer.
RENDERED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s> [INST] Be brief.\n\nHi [/INST] Hello</s> [INST] Who? [/INST]",
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n"
        "[|user|]Who?\n[|assistant|]"
    ),
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nWho?\n\n"
        "### Response:\n"
    ),
}


def render(text: str, messages: list[dict[str, str]], prompt: bool = True) -> str:
    jinja2 = pytest.importorskip("jinja2")
    # as transformers renders
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)

    def fail(message: str) -> None:
        raise ValueError(message)

    environment.globals["raise_exception"] = fail
    rendered: str = environment.from_string(text).render(
        messages=messages, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
    )
    return rendered


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_builtin_templates(name: str) -> None:
    assert render(BUILTIN[name], TALK) == RENDERED[name]


def test_roles_out_of_turn_are_refused_by_mistral() -> None:
    with pytest.raises(ValueError, match="got assistant"):
        render(BUILTIN["mistral"], TALK[2:])


@pytest.mark.peers
@pytest.mark.parametrize("name", ["chatml", "mistral"])
def test_mergekit_renders_the_same(name: str) -> None:
    """Its alpaca, exaone and llama3 add indents and line breaks that the formats do not have."""
    templates = pytest.importorskip("mergekit._data.chat_templates")
    from importlib.resources import files

    theirs = files(templates).joinpath(f"{name}.jinja").read_text()
    for talk in (TALK, TALK[1:]):
        assert render(BUILTIN[name], talk) == render(theirs, talk)


class Models:
    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("base", "a", "b"):
            write_checkpoint(root / name)

    def template(self, name: str, text: Any, *, legacy: bool = False) -> None:
        if legacy:
            content = json.dumps({"chat_template": text, "eos_token": "t1"})
            (self.root / name / "tokenizer_config.json").write_text(content)
        else:
            (self.root / name / "chat_template.jinja").write_text(text)

    def plan(self, template: Any, **changes: Any) -> Plan:
        return make_plan(
            parse_recipe(
                {
                    "merge_method": "task_arithmetic",
                    "base_model": str(self.root / "base"),
                    "models": [{"model": str(self.root / name)} for name in ("a", "b")],
                    "chat_template": template,
                    **changes,
                }
            ),
            self.root / "out",
        )


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def written(plan: Plan) -> str | None:
    found = [file for file in plan.sidecars if file.name == "chat_template.jinja"]
    if not found:
        return None
    content = found[0].content
    return (content if content is not None else found[0].source.read_bytes()).decode()


def test_auto_takes_what_most_models_have(models: Models) -> None:
    models.template("base", "{{ one }}")
    models.template("a", "\n{{ two }} ", legacy=True)
    models.template("b", [{"name": "default", "template": "{{ two }}"}], legacy=True)
    assert written(models.plan("auto")) == "{{ two }}"
    models.template("b", "{{ three }}")  # the file counts before the config; now all differ
    assert written(models.plan("auto")) == "{{ one }}"


def test_a_template_that_is_lost_is_told(models: Models) -> None:
    def lost(**options: Any) -> list[str]:
        return [n for n in models.plan(None, **options).notes if "the output has none" in n]

    assert not lost()
    models.template("a", "{{ one }}")
    models.template("b", "{{ two }}", legacy=True)
    told = f"{models.root / 'a'} has a chat template and the output has none; write "
    assert lost() == [f"{told}chat_template: auto"]
    assert not [n for n in models.plan("auto").notes if "the output has none" in n]
    models.template("base", "{{ three }}", legacy=True)
    assert not lost()


def test_tokens_that_a_builtin_template_misses_are_told(models: Models) -> None:
    def write(*tokens: str) -> None:
        model = {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(("?", *tokens))}}
        content = json.dumps({"model": model, "added_tokens": []})
        (models.root / "base" / "tokenizer.json").write_text(content)

    write("<|im_end|>")
    told = "chat_template: chatml: the output's tokenizer has no <|im_start|>, and "
    assert [n.startswith(told) for n in models.plan("chatml").notes if "has no <" in n] == [True]
    assert not [n for n in models.plan("alpaca").notes if "has no <" in n]
    write("<|im_end|>", "<|im_start|>")
    assert not [n for n in models.plan("chatml").notes if "has no <" in n]


def test_auto_without_any(models: Models) -> None:
    plan = models.plan("auto")
    assert written(plan) is None
    assert "chat_template: auto finds no chat template in any of the models" in plan.notes


def test_a_given_template_takes_the_place_of_the_others(models: Models) -> None:
    models.template("base", "{{ old }}", legacy=True)
    (models.root / "base" / "chat_template.json").write_text("{}")
    more = models.root / "base" / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("{{ tools }}")
    plan = models.plan("chatml")
    assert written(plan) == BUILTIN["chatml"]
    files = {file.name: file for file in plan.sidecars}
    assert not {"chat_template.json", "additional_chat_templates/tool_use.jinja"} & files.keys()
    assert json.loads(files["tokenizer_config.json"].content or b"") == {"eos_token": "t1"}
    assert any("takes the place of additional_chat" in note for note in plan.notes)
    assert plan.fingerprint != models.plan("llama3").fingerprint


def test_text_and_files(models: Models) -> None:
    assert written(models.plan("{{ bos_token }}")) == "{{ bos_token }}"
    path = models.root / "mine.jinja"
    path.write_text("{% generation %}{{ x }}{% endgeneration %}")
    assert written(models.plan(str(path))) == path.read_text()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("chatlm", "chat_template: must be auto, one of alpaca.*did you mean 'chatml'"),
        ("", "chat_template: must be auto"),
        (3, "chat_template: must be text"),
        ("{% for x %}", "chat_template: line 1 is not a Jinja template"),
        ("/nowhere/x.jinja", "chat_template: /nowhere/x.jinja cannot be read"),
    ],
)
def test_bad_templates(models: Models, template: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        models.plan(template)


def test_bad_files(models: Models) -> None:
    path = models.root / "x.jinja"
    for text, words in (("", "is empty"), ("{{", "line 1 is not a Jinja template")):
        path.write_text(text)
        with pytest.raises(RecipeError, match=words):
            models.plan(str(path))
