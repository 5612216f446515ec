"""The files that a reader of a comparison opens: summary.json, report.html, report.md and, with pyarrow, results.parquet."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from tokenreduce.compare.answer import answer
from tokenreduce.compare.store import Store, writing
from tokenreduce.compare.tables import (
    Table,
    checks_table,
    costs_table,
    grid_table,
    layers_table,
    main_table,
    power_table,
)
from tokenreduce.config.json_source import shown
from tokenreduce.config.outputs import replacing, unwritable, write_file
from tokenreduce.errors import TokenReduceError, one_line

TEMPLATES = Path(__file__).with_name("templates")
SUMMARY, PAGE, MARKDOWN, PARQUET = "summary.json", "report.html", "report.md", "results.parquet"


def save_report(store: Store, summary: Mapping[str, Any]) -> Path:
    """Write the report into the folder of `store`, in the turn of whoever else does; returns the folder that it is in.

    Where that cannot be written, a temporary folder takes it, with a warning that names both.
    """
    try:
        with writing(store.folder):
            write_report(store, summary, store.folder)
        return store.folder
    except (OSError, TokenReduceError) as error:
        reason = unwritable(store.folder, error) if isinstance(error, OSError) else error
    if not isinstance(reason.__cause__, OSError) and not str(reason).startswith(
        f"{shown(store.folder)} cannot be written"
    ):
        raise reason  # What is stored is damaged, and would be elsewhere too.
    elsewhere = Path(tempfile.mkdtemp(prefix="tokenreduce-report-"))
    try:
        write_report(store, summary, elsewhere)
    except OSError:
        shutil.rmtree(elsewhere, ignore_errors=True)
        raise reason from None
    warnings.warn(f"{reason}; the report is in {elsewhere} instead", stacklevel=2)
    return elsewhere


def write_report(store: Store, summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write all of them into `folder`; returns their paths. OSErrors pass."""
    write_file(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    write_file(folder / MARKDOWN, markdown(summary))
    write_file(folder / PAGE, page(summary, store.pictures()))
    written = [folder / name for name in (SUMMARY, PAGE, MARKDOWN)]
    return written + ([folder / PARQUET] if _write_parquet(store.rows, folder / PARQUET) else [])


def markdown(summary: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    parts = [f"# {title(summary)}", *answer(summary), " ".join(facts(summary))]
    for table in tables(summary):
        parts += [f"## {table.title}", table.markdown(), *table.notes]
    return "\n\n".join(parts) + "\n"


def page(summary: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]]) -> str:
    """The report as one HTML page that needs nothing else.

    Tables are in the page itself; plots are drawn by its script from the data in a script tag, and pictures are in it too.
    """
    main, costs, power, checks = tables(summary)
    script = "\n".join(['"use strict";', *(_template(name) for name in ("draw.js", "plots.js", "report.js"))])
    parts = {
        "title": escape(title(summary)),
        "answer": "".join(f"<p>{escape(sentence)}</p>" for sentence in answer(summary)),
        "facts": "".join(f"<li>{escape(fact)}</li>" for fact in facts(summary)),
        "main": main.html("arm"),
        "costs": costs.html("arm"),
        "power": power.html("arm"),
        "checks": checks.html(),
        "layers": layers_table(summary["arms"]).html("arm"),
        "grid": grid_table(summary["arms"]).html("arm"),
        "pictures": "\n".join(_figure(picture) for picture in pictures) or "<p>No pictures were kept.</p>",
        "lost": lost(summary),
        "margin": f"{summary['margin']:.0%}",
        "style": _template("report.css"),
        "script": script,
        # The page's policy lets this one script run and nothing else.
        "digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        "data": embedded_json({"arms": summary["arms"]}),
    }
    # One pass, so that no inserted text is taken for a place to insert into.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _template("report.html"))


def title(summary: Mapping[str, Any]) -> str:
    """What was compared."""
    task = summary["task"]
    what = f"needle, {task['kind']}" if task["task"] == "needle" else str(task["task"])
    return f"Token reduction compared: {what}"


def facts(summary: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the numbers."""
    asked, finished = summary["examples"]["asked"], summary["examples"]["finished"]
    count = f"{finished} examples." if summary["complete"] else f"UNFINISHED: {finished} of {asked} examples."
    task = {name: value for name, value in summary["task"].items() if value not in (None, [None])}
    made_by = ", ".join(f"{name} {version}" for name, version in (summary.get("environment") or {}).items())
    from_code = "; ".join(f"{name} {version}" for name, version in (summary.get("code") or {}).items())
    models = ", ".join(f"{name} ({what[:19]})" if what != name else name for name, what in summary["models"].items())
    return [
        count,
        f"Model: {models}. Run on {'; '.join(summary['ran_on']) or 'a device that was not recorded'}.",
        f"Task: {', '.join(f'{name} {_plain(value)}' for name, value in task.items())}; seed {summary['seed']}.",
        f"Differences are against {summary['baseline']}; p-values are McNemar's exact test with Holm's correction: "
        "*** p < 0.001, ** p < 0.01, * p < 0.05. Intervals are 95 %: Wilson's for shares, Tango's for paired differences.",
        f"Computed by {made_by or 'versions that were not recorded'}. Code: {from_code or 'not recorded'}.",
        f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by tokenreduce {summary['tokenreduce']}.",
    ]


def tables(summary: Mapping[str, Any]) -> tuple[Table, Table, Table, Table]:
    """Accuracy, costs, examples needed, and checks."""
    arms, baseline = summary["arms"], summary["baseline"]
    return main_table(arms, baseline), costs_table(arms), power_table(arms, baseline), checks_table(summary["checks"])


def embedded_json(data: Any) -> str:
    """JSON that can stand inside a script tag: nothing in it can end the tag or begin a comment."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _figure(picture: Mapping[str, Any]) -> str:
    """One example: a strip of frames per arm, each with a text for those who cannot see it."""
    frames = ", ".join(map(str, picture["frames"]))
    strips = []
    for strip in picture["strips"]:
        name = escape(strip["arm"])
        if strip["arm"] == "input":
            caption, spoken = "input", f"The input, frames {frames}"
        else:
            total = sum(strip[state] for state in ("kept", "merged", "dropped"))
            counts = f"{strip['kept']} kept, {strip['merged']} merged, {strip['dropped']} dropped of {total} patches"
            verdict = "right" if strip["right"] else "wrong"
            caption = f"<b>{name}</b> says “{escape(strip['reply'])}” ({verdict})<br>{counts}"
            spoken = f"{strip['arm']}: {counts}"
        strips.append(
            f'<div class="strip" data-arm="{name}"><div class="caption">{caption}</div>'
            f'<img alt="{escape(spoken)}" src="data:image/png;base64,{strip["png"]}"></div>'
        )
    place, words = int(picture["index"]), escape(f"Example {picture['id']}: {picture['question']}")
    answered = f"<i>(expected: {escape(picture['expected'])}; frames {frames})</i>"
    return f'<figure class="example" id="example-{place}"><figcaption>{words} {answered}</figcaption>{"".join(strips)}</figure>'


def lost(summary: Mapping[str, Any]) -> str:
    """Per arm, questions that the baseline alone got right; those with a picture link to it."""
    parts = []
    for arm in summary["arms"]:
        if not arm.get("only_baseline"):
            continue
        items = "".join(
            f"<li>{_linked(one)}: {escape(one['question'])} Expected {escape(one['expected'])}, said "
            f"“{escape(one['reply'])}”.</li>"
            for one in arm["lost"]
        )
        more = arm["only_baseline"] - len(arm["lost"])
        rest = f'<p class="note">And {more} more; results.jsonl has all.</p>' if more > 0 else ""
        parts.append(
            f'<details data-arm="{escape(arm["name"])}"><summary>{escape(arm["name"])}: {arm["only_baseline"]} that '
            f'{escape(summary["baseline"])} alone got right</summary><ul class="lost">{items}</ul>{rest}</details>'
        )
    return "".join(parts) or f"<p>No arm lost a question that {escape(summary['baseline'])} got right.</p>"


def _linked(one: Mapping[str, Any]) -> str:
    name = f"Example {escape(str(one['id']))}"
    return f'<a href="#example-{one["index"]}">{name}</a>' if one["drawn"] else name


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _plain(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, dict):
        return ", ".join(f"{Path(name).name} ({_plain(item)[:19]})" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return "any" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """The rows as Parquet, where pyarrow is installed; lists and groups as nested columns."""
    try:
        pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        return False
    # A Parquet struct needs a field, and tasks without conditions have an empty cell.
    plain = [{**row, "cell": json.dumps(row["cell"])} for row in rows]
    try:
        table = pyarrow.Table.from_pylist(plain)
    except (
        pyarrow.ArrowException,
        OverflowError,
    ) as error:  # Fields of another version, which differ in kind from row to row.
        warnings.warn(f"{path.name} is left out: {one_line(error, 200)}", stacklevel=2)
        return False
    with replacing(path) as part:
        parquet.write_table(table, part)
    return True
