"""The model card of a merge: README.md with the front matter that the hub reads, and the facts.

What was merged, how, with which seed, from which bytes; enough for a reader to do it again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["card"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def card(title: str, manifest: Mapping[str, Any]) -> str:
    """The text of README.md.

    `title` is the name of the output folder, `manifest` what `manifest.build` made. References
    stand as the recipe wrote them; the absolute paths of this machine stay in the manifest.
    """
    import yaml

    recipe = manifest["recipe"]
    method = recipe["merge_method"]
    front: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["merge", "cl_fast", method],
    }
    hub = [i["reference"] for i in manifest["inputs"] if _HUB_ID.fullmatch(i["reference"])]
    if hub:
        front["base_model"] = list(dict.fromkeys(hub))
        front["base_model_relation"] = "merge"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {title}",
        "",
        f"Merged by `{method}` with cl_fast {manifest['cl_fast']}.",
        "",
        "| role | model | digest of its tensors |",
        "|---|---|---|",
        *(
            f"| {entry['role']} | {_cell(entry['reference'])} | `{entry['digest']}` |"
            for entry in manifest["inputs"]
        ),
        f"| output | {_cell(title)} | `{manifest['digest']}` |",
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip(),
        "```",
        "",
    ]
    if manifest["seed"] is not None:
        lines += [
            f"Random stream: seed {manifest['seed']}, one stream for each model "
            f"({', '.join(f'`{name}`' for name in manifest['streams'])}) and tensor.",
            "",
        ]
    lines += [
        "`cl_fast_merge.json` records the checksum of every tensor; `cl-fast verify FOLDER` checks "
        "them and computes a sample again from the inputs.",
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text in a Markdown table: a name with pipes or line breaks must not break the table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
