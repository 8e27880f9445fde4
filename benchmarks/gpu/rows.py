"""The result file of the GPU lane, and the table made from it. Needs the standard library only.

One file per card: `about` (what the rows belong to), `steps` (build, test, sanitize, bench),
`rows` (one per case and provider), `targets` (what was to be reached, and what was), `left` (what
the time did not suffice for). It is written whole after every change, and renamed into place, so
that a reader never sees half of it and a killed run loses one case at most.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["DRY_RUN", "IDENTITY", "Results", "slug", "table"]

DRY_RUN = "cpu, dry run"
"""The device of every row that was not taken on a card."""

IDENTITY = ("device", "card", "driver", "commit", "source", "versions")
"""What must agree for the rows of an earlier call to stay."""

OK, NOT_RUN, FAILED = "ok", "not run", "failed"


def slug(card: str) -> str:
    """The name of a card as part of a file name: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") or "unknown-card"


class Results:
    """One result file in memory and on the disk.

    Args:
        path: the JSON file; the table goes beside it with the suffix .md.
        about: what new rows belong to; the keys of `IDENTITY` at least.
        resume: keep the steps and rows that are in the file already, if they belong to the same.
        retry: of those keep what succeeded, and what could not be run, but nothing that failed.
    """

    def __init__(
        self, path: Path, about: dict[str, Any], *, resume: bool = False, retry: bool = False
    ) -> None:
        self.path = path
        self.steps: dict[str, dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []
        self.targets: list[dict[str, Any]] = []
        self.left: list[str] = []
        self.about = about
        self.note = ""
        if resume:
            self.note = self._resume(retry)

    def _resume(self, retry: bool) -> str:
        try:
            old = json.loads(self.path.read_text(encoding="utf-8"))
            old_about = {key: old["about"][key] for key in IDENTITY}
            old_rows, old_targets, old_steps = old["rows"], old["targets"], old["steps"]
        except FileNotFoundError:
            return f"nothing to resume: {self.path} is not there"
        except (ValueError, OSError, KeyError, TypeError) as error:
            return f"nothing to resume: {self.path} is no result file: {error!r}"
        changed = [key for key in IDENTITY if old_about[key] != self.about[key]]
        if changed:
            return f"nothing to resume: the rows in {self.path} have another {', '.join(changed)}"
        again = {row["case"] for row in old_rows if retry and failed(row)}
        self.rows = [row for row in old_rows if row["case"] not in again]
        self.targets = [t for t in old_targets if t["case"] not in again]
        for name, step in old_steps.items():
            parts = {
                part: record
                for part, record in step.get("parts", {}).items()
                if not (retry and record["status"] == FAILED)
            }
            if parts or not (retry and step["status"] == FAILED):
                self.steps[name] = {**step, "parts": parts}
        return f"resumed: {len(self.rows)} rows and {len(self.steps)} steps kept"

    @property
    def cases(self) -> set[str]:
        """The cases that have their rows."""
        return {row["case"] for row in self.rows}

    def put_case(
        self, case: str, rows: Iterable[dict[str, Any]], targets: Iterable[dict[str, Any]] = ()
    ) -> None:
        """Replace the rows of `case`, and write the file."""
        self.rows = [row for row in self.rows if row["case"] != case] + list(rows)
        self.targets = [t for t in self.targets if t["case"] != case] + list(targets)
        self.save()

    def put_step(self, name: str, record: dict[str, Any]) -> None:
        """Replace the record of a step, and write the file."""
        self.steps[name] = record
        self.save()

    def failures(self) -> list[str]:
        """One line for each step, part of a step, and row that failed."""
        lines = []
        for name, step in self.steps.items():
            parts = step.get("parts", {})
            lines += [
                f"{name} {part}: {record.get('reason', '')}"
                for part, record in parts.items()
                if record["status"] == FAILED
            ]
            if step["status"] == FAILED and not parts:
                lines.append(f"{name}: {step.get('reason', '')}")
        for row in self.rows:
            if failed(row):
                lines.append(f"{row['case']}, {row['provider']}: {reason(row)}")
        return lines

    def save(self) -> None:
        """Write the JSON and the table, each by rename."""
        data = {
            "about": self.about,
            "steps": self.steps,
            "targets": self.targets,
            "left": self.left,
            "rows": self.rows,
        }
        write(self.path, json.dumps(data, indent=1) + "\n")
        write(self.path.with_suffix(".md"), table(data))


def failed(row: dict[str, Any]) -> bool:
    """Whether a row counts as a failure: a graph that should have been captured is one too."""
    return row["status"] == FAILED or bool(row.get("graph_error"))


def reason(row: dict[str, Any]) -> str:
    """Why a row has no number, or lacks one."""
    return str(row.get("reason") or row.get("graph_error") or "")


def write(path: Path, text: str) -> None:
    """The whole of `text`, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------ the table


def table(data: dict[str, Any]) -> str:
    """The Markdown text of a result file."""
    about = data["about"]
    dry = about["device"] == DRY_RUN
    lines = [f"# GPU lane: {about['card']}", ""]
    if dry:
        lines += [f"**{DRY_RUN}: tiny shapes on a processor; no number here says anything.**", ""]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines += [
        f"{about['device']}, driver {about['driver']}; {versions}; commit {about['commit']}, "
        f"sources {about['source']}; {about['date']}.",
        "",
        "Written by `benchmarks/gpu_lane.py`; docs/gpu-lane.md says what a row means.",
        "",
        *_steps(data["steps"]),
        *([] if dry else _targets(data["targets"])),
    ]
    for op in dict.fromkeys(row["op"] for row in data["rows"]):
        lines += _rows(op, [row for row in data["rows"] if row["op"] == op])
    if data["left"]:
        lines += ["## Left", "", *(f"- {item}" for item in data["left"]), ""]
    return "\n".join(lines)


def _steps(steps: dict[str, dict[str, Any]]) -> Iterator[str]:
    if not steps:
        return
    yield from ("| step | part | result | seconds |", "|---|---|---|---|")
    for name, step in steps.items():
        parts = step.get("parts") or {"": step}
        for part, record in parts.items():
            counts = ", ".join(
                f"{record[key]} {key}"
                for key in (
                    "passed",
                    "failed",
                    "skipped",
                    "errors",
                    "hazards",
                    "launches",
                    "refused",
                )
                if isinstance(record.get(key), int) and (record[key] or key == "passed")
            )
            text = f"{record['status']}" + (f": {counts}" if counts else "")
            if record.get("reason"):
                text += f": {_cell(record['reason'])}"
            yield f"| {name} | {part} | {text} | {record.get('seconds', 0.0):.1f} |"
            for why, count in record.get("skips", {}).items():
                yield f"| | | skipped {count}: {_cell(why)} | |"
    yield ""


def _targets(targets: list[dict[str, Any]]) -> Iterator[str]:
    if not targets:
        return
    yield from ("| target | provider | wanted | got | |", "|---|---|---|---|---|")
    for t in targets:
        sign = "at least" if t["at_least"] else "at most"
        got = "no number" if t["value"] is None else f"{t['value']:.3g}"
        met = "met" if t["met"] else "not met"
        yield f"| {t['text']} | {t['provider']} | {sign} {t['limit']:g} | {got} | {met} |"
    yield ""


def _rows(op: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    yield from (f"## {op}", "")
    yield "| case | provider | ms p50 (p20, p80) | graph ms | rate | floor | memory | note |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        name = f"{row['case']}<br>{row['shape']} {row['dtype']}"
        if row["status"] != OK:
            text = f"**{row['status']}**: {_cell(reason(row))}"
            yield f"| {name} | {row['provider']} | | | | | | {text} |"
            continue
        ms = f"{row['ms_p50']:.4g} ({row['ms_p20']:.4g}, {row['ms_p80']:.4g})"
        graph = "" if row["graph_ms_p50"] is None else f"{row['graph_ms_p50']:.4g}"
        rate = []
        if row["gb_per_s"] is not None:
            rate.append(f"{row['gb_per_s']:.4g} GB/s")
        if row["tflop_per_s"] is not None:
            rate.append(f"{row['tflop_per_s']:.4g} TFLOP/s")
        share = "" if row["share_of_floor"] is None else f"{100 * row['share_of_floor']:.0f} %"
        note = _cell("; ".join(filter(None, (row["note"], row["graph_error"]))))
        yield (
            f"| {name} | {row['provider']} | {ms} | {graph} | {', '.join(rate)} | {share} "
            f"| {_memory(row)} | {note} |"
        )
    yield ""


def _memory(row: dict[str, Any]) -> str:
    """Peak memory beyond inputs and output, and its share of the inputs."""
    if row["peak_extra_bytes"] is None:
        return ""
    extra = row["peak_extra_bytes"] - row["output_bytes"]
    return f"{extra / 2**20:.4g} MiB ({100 * extra / max(1, row['input_bytes']):.3g} %)"


def _cell(text: str) -> str:
    """Text that cannot break out of its cell."""
    short = " ".join(str(text).split()).replace("|", "\\|")
    return short if len(short) <= 300 else short[:297] + "..."
