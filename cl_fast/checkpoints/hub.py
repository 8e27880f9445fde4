"""Models of the Hugging Face hub by their id: found in the hub's cache, or downloaded into it.

``org/name`` or ``org/name@revision`` (branch, tag or commit). Everything that a merge may need is
taken (safetensors, config, tokenizer, code), nothing else: no pickles, no other formats. The
library's own settings hold: ``HF_HOME``, ``HF_HUB_OFFLINE=1`` (the cache alone), ``HF_TOKEN`` or
``hf auth login`` for models that are not public.
"""

from __future__ import annotations

import re

from cl_fast.errors import CheckpointError

__all__ = ["is_hub_id", "snapshot"]

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@([\w./-]+))?", re.ASCII)

_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.jinja", "*.py")
_UNWANTED = ("consolidated*.safetensors", "original/*", "onnx/*", "openvino/*", "coreml/*")


def is_hub_id(reference: str) -> bool:
    """Whether this looks like an id of the hub; a path may look so too."""
    return _ID.fullmatch(reference) is not None and not reference.endswith(
        (".safetensors", ".yml", ".yaml", ".json")
    )


def snapshot(reference: str) -> str:
    """The local folder of a model of the hub.

    Raises:
        CheckpointError: the hub does not have it, or not for this user; it cannot be reached and
            the cache does not hold the model; huggingface_hub is not installed.
    """
    found = _ID.fullmatch(reference)
    if found is None:
        raise CheckpointError(f"{reference!r} is no id of a model (org/name or org/name@revision)")
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError as missing:
        raise CheckpointError(
            f"{reference!r} is not a folder here. If it is a model of the Hugging Face hub, pip "
            "install huggingface_hub, or download it by other means and give its folder"
        ) from missing
    name, revision = found[1], found[2]
    words = ""
    try:
        return str(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(_WANTED),
                ignore_patterns=list(_UNWANTED),
            )
        )
    except errors.GatedRepoError:
        words = (
            "is open only to those who accepted its terms: accept them on its page and log in (hf "
            "auth login, or HF_TOKEN)"
        )
    except errors.RevisionNotFoundError:
        words = f"has no revision {revision!r} on the hub"
    except errors.RepositoryNotFoundError:
        words = (
            "is not on the Hugging Face hub, or is private and needs a login (hf auth login, or "
            "HF_TOKEN)"
        )
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        part = " whole" if type(error).__name__ == "IncompleteSnapshotError" else ""
        words = (
            f"is not{part} in the hub's cache, and {why}; download it where the hub can be reached "
            f"(hf download {name}{f' --revision {revision}' if revision else ''})"
        )
    except Exception as error:
        # Not its text: a library may repeat a request there, and a request carries a token.
        words = f"cannot be had from the Hugging Face hub ({type(error).__name__})"
    raise CheckpointError(f"{reference!r} is not a folder here, and as a model it {words}")
