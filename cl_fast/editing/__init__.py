"""Knowledge editing: facts are written into a model, judged there, and taken back.

    Fact, load_facts                what a model shall say; from .jsonl, CounterFact, zsRE
    KeyStats                        what a model's keys look like, so that an edit leaves them alone
    Memit, Rome, Emmet, AlphaEdit   editors of weights: one ridge problem, with history
    Patch                           what they find: apply, undo, drop, upsert, +, save, PEFT
    Mend                            an editor that is learnt, MALMEN with it
    FactStore, Grace                facts outside the weights: a gate, a codebook
    Serac, InContext                facts as text: routed by a classifier, put into the prompt
    LocFT                           plain fine-tuning of one matrix, to compare with
    evaluate, Reference, Report     success, paraphrases, neighbours, what is really written
    causal_trace                    at which tokens and layers a fact is remembered
    solve, refit, priors            the ridge problem itself

docs/editing.md says which one when. Torch is imported when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_fast.editing.contexts import own_contexts
    from cl_fast.editing.datasets import load_facts, without_conflicts
    from cl_fast.editing.editors import AlphaEdit, Emmet, Memit, Rome, WeightEditor
    from cl_fast.editing.evaluation import Reference, evaluate
    from cl_fast.editing.facts import Fact, check_facts, encode, read_facts
    from cl_fast.editing.finetuning import LocFT
    from cl_fast.editing.grace import Grace
    from cl_fast.editing.mend import Mend, Trained
    from cl_fast.editing.patch import LayerPatch, Patch, undo_patches, weight_hash
    from cl_fast.editing.presets import Preset, preset_of
    from cl_fast.editing.report import Report, compared
    from cl_fast.editing.retrieval import InContext, TextEmbedding
    from cl_fast.editing.serac import ScopeClassifier, ScopeReport, Serac
    from cl_fast.editing.solver import (
        CholeskyPrior,
        NullSpace,
        Prior,
        ScaledIdentity,
        Solution,
        refit,
        solve,
    )
    from cl_fast.editing.stats import KeyStats
    from cl_fast.editing.store import FactStore
    from cl_fast.editing.tracing import CausalTrace, average_effects, causal_trace
    from cl_fast.editing.values import ValueOptions, Values

__all__ = [
    "AlphaEdit",
    "CausalTrace",
    "CholeskyPrior",
    "Emmet",
    "Fact",
    "FactStore",
    "Grace",
    "InContext",
    "KeyStats",
    "LayerPatch",
    "LocFT",
    "Memit",
    "Mend",
    "NullSpace",
    "Patch",
    "Preset",
    "Prior",
    "Reference",
    "Report",
    "Rome",
    "ScaledIdentity",
    "ScopeClassifier",
    "ScopeReport",
    "Serac",
    "Solution",
    "TextEmbedding",
    "Trained",
    "ValueOptions",
    "Values",
    "WeightEditor",
    "average_effects",
    "causal_trace",
    "check_facts",
    "compared",
    "encode",
    "evaluate",
    "load_facts",
    "own_contexts",
    "preset_of",
    "read_facts",
    "refit",
    "solve",
    "undo_patches",
    "weight_hash",
    "without_conflicts",
]

_HOMES = {
    "AlphaEdit": "editors",
    "CausalTrace": "tracing",
    "CholeskyPrior": "solver",
    "Emmet": "editors",
    "Fact": "facts",
    "FactStore": "store",
    "Grace": "grace",
    "InContext": "retrieval",
    "KeyStats": "stats",
    "LayerPatch": "patch",
    "LocFT": "finetuning",
    "Memit": "editors",
    "Mend": "mend",
    "NullSpace": "solver",
    "Patch": "patch",
    "Preset": "presets",
    "Prior": "solver",
    "Reference": "evaluation",
    "Report": "report",
    "Rome": "editors",
    "ScaledIdentity": "solver",
    "ScopeClassifier": "serac",
    "ScopeReport": "serac",
    "Serac": "serac",
    "Solution": "solver",
    "TextEmbedding": "retrieval",
    "Trained": "mend",
    "ValueOptions": "values",
    "Values": "values",
    "WeightEditor": "editors",
    "average_effects": "tracing",
    "causal_trace": "tracing",
    "check_facts": "facts",
    "compared": "report",
    "encode": "facts",
    "evaluate": "evaluation",
    "load_facts": "datasets",
    "own_contexts": "contexts",
    "preset_of": "presets",
    "read_facts": "facts",
    "refit": "solver",
    "solve": "solver",
    "undo_patches": "patch",
    "weight_hash": "patch",
    "without_conflicts": "datasets",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"cl_fast.editing.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'cl_fast.editing' has no attribute {name!r}")
