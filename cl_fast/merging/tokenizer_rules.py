"""What a recipe says about the tokenizer of the output and the rows of its tokens.

``tokenizer_source: base | union | MODEL``, or the longer form::

    tokenizer:
      source: union
      tokens:
        <|im_start|>: {source: MODEL}              # for the models that lack it
        <|pad|>: {source: {kind: zero}}
        <|end|>: {source: {kind: model_token, model: MODEL, token: </s>}, force: true}
      pad_to_multiple_of: 64

The meaning of each is told in docs/tokenizers.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cl_fast.documents import kind_of
from cl_fast.errors import RecipeError
from cl_fast.merging.methods import suggest
from cl_fast.merging.references import BadReference, reference_text

__all__ = ["TokenRule", "TokenizerRules", "parse_tokenizer"]

_KEYS = ("source", "tokens", "pad_to_multiple_of")
_LARGEST_PAD = 1 << 20


@dataclass(frozen=True, slots=True)
class TokenRule:
    """Where the row of a token comes from in models that lack it, or (``force``) in all.

    kind: "default" (no source is given), "model" (the row that ``model`` has for the token),
    "zero", or "model_token" (the row that ``model`` has for ``token``, or its row ``token_id``).
    ``key`` is its path in the recipe.
    """

    key: str
    kind: Literal["default", "model", "zero", "model_token"]
    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerRules:
    """``source`` is "base", "union" or a reference; ``key`` the recipe key that gave it."""

    source: str
    key: str = "tokenizer_source"
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


def parse_tokenizer(block: Any) -> TokenizerRules:
    """The checked ``tokenizer`` block of a recipe.

    Raises:
        RecipeError: anything in it is wrong; the message begins with the key's path.
    """
    if not isinstance(block, Mapping):
        raise RecipeError(f"tokenizer: must be a mapping with 'source'; got {kind_of(block)}")
    for key in block:
        if key not in _KEYS:
            hint = suggest(key, _KEYS) if isinstance(key, str) else ""
            raise RecipeError(f"tokenizer.{key}: unknown key{hint}")
    source = _reference(block.get("source", "union"), "tokenizer.source")
    if not isinstance(source, str):
        raise RecipeError(
            f"tokenizer.source: must be 'base', 'union' or a model reference; got {kind_of(source)}"
        )
    if not source.strip():
        raise RecipeError("tokenizer.source: is empty; write base, union or a model")
    pad = block.get("pad_to_multiple_of")
    if pad is not None and (type(pad) is not int or not 1 <= pad <= _LARGEST_PAD):
        raise RecipeError(
            "tokenizer.pad_to_multiple_of: must be a whole number of at least 1 and at most "
            f"{_LARGEST_PAD}; got {pad if isinstance(pad, int | float) else kind_of(pad)}"
        )
    tokens = block.get("tokens")
    if tokens is not None and not isinstance(tokens, Mapping):
        raise RecipeError(
            f"tokenizer.tokens: must be a mapping of tokens to their source; got {kind_of(tokens)}"
        )
    rules = {}
    for token, rule in (tokens or {}).items():
        if not isinstance(token, str) or not token:
            raise RecipeError(
                f"tokenizer.tokens: a token must be text; got {kind_of(token)} (quote it)"
            )
        rules[token] = _rule(f"tokenizer.tokens.{token}", rule)
    return TokenizerRules(source, "tokenizer.source", rules, pad)


def _rule(key: str, rule: Any) -> TokenRule:
    if not isinstance(rule, Mapping):
        raise RecipeError(
            f"{key}: must be a mapping with 'source' and 'force'; got {kind_of(rule)}"
        )
    for name in rule:
        if name not in ("source", "force"):
            hint = suggest(name, ("source", "force")) if isinstance(name, str) else ""
            raise RecipeError(f"{key}.{name}: unknown key{hint}")
    force = rule.get("force", False)
    if not isinstance(force, bool):
        raise RecipeError(f"{key}.force: must be true or false; got {kind_of(force)}")
    source = rule.get("source")
    if source is None:
        if force:
            raise RecipeError(f"{key}.force: needs a source to force on the models")
        return TokenRule(key, "default")
    if not (isinstance(source, Mapping) and "kind" in source):
        source = _reference(source, f"{key}.source")
    if isinstance(source, str):
        if not source.strip():
            raise RecipeError(f"{key}.source: is empty; name a model")
        return TokenRule(key, "model", source, force=force)
    if not isinstance(source, Mapping):
        raise RecipeError(
            f"{key}.source: must be a model, or a mapping with kind: zero or kind: model_token; "
            f"got {kind_of(source)}"
        )
    return _made_rule(f"{key}.source", key, source, force)


def _reference(value: Any, key: str) -> Any:
    try:
        return reference_text(value)
    except BadReference as error:
        raise RecipeError(f"{key}: {error}") from None


def _made_rule(path: str, key: str, source: Mapping[Any, Any], force: bool) -> TokenRule:
    kind = source.get("kind")
    known = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}
    if not isinstance(kind, str) or kind not in known:
        hint = suggest(kind, known) if isinstance(kind, str) else ""
        got = repr(kind) if isinstance(kind, str) else kind_of(kind)
        raise RecipeError(f"{path}.kind: must be zero or model_token; got {got}{hint}")
    for name in source:
        if name not in known[kind]:
            hint = suggest(name, known[kind]) if isinstance(name, str) else ""
            raise RecipeError(f"{path}.{name}: unknown key{hint}")
    if kind == "zero":
        return TokenRule(key, "zero", force=force)
    model = _reference(source.get("model"), f"{path}.model")
    token, token_id = source.get("token"), source.get("token_id")
    if not isinstance(model, str) or not model.strip():
        raise RecipeError(f"{path}.model: must name a model; got {kind_of(model)}")
    if (token is None) == (token_id is None):
        raise RecipeError(f"{path}: give either token or token_id, to say which row of {model!r}")
    if token is not None and not isinstance(token, str):
        raise RecipeError(f"{path}.token: must be text; got {kind_of(token)} (quote it)")
    if token_id is not None and (type(token_id) is not int or token_id < 0):
        raise RecipeError(f"{path}.token_id: must be a whole number of at least 0")
    return TokenRule(key, "model_token", model, token, token_id, force)
