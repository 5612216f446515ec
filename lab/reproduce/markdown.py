"""docs/reproduction/README.md, written from the results so that no number is typed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lab.reproduce.figures import NAMES
from lab.reproduce.paper import PAPER, SAYS
from lab.reproduce.results import ABSENT, FAILS, HOLDS, NOT_RUN, OPEN, REVERSED
from tokenreduce.compare.arms import BASELINE

Data = Mapping[str, Any]

HEAD = """# FrameFusion's tables and figures on the embedded model

This file is written by the command below; every number in it comes from `results.json`.

| | |
|---|---|
"""

READING = """
## How to read it

One model of two million parameters and twelve layers, trained for needles in a video ([docs/testbed.md](../testbed.md)),
answers questions about digits hidden in real clips that it was not trained on. It is not LLaVA-Video-7B, and its videos are
not VideoNIAH: accuracies are not comparable with the paper's, only orderings are, and an ordering found here is evidence
about this model and this task alone.

- A needle is one vision token large. A right answer is: greedy decoding says exactly the words of the answer. *One hop*: the
  digit on a tile of a given colour. *Second turn*: the same about another tile, on the cache that the first turn left.
  *Chain*: the colour of a spot on one tile, then the digit on the tile of that colour. *Edit*: tiles are drawn over frames of
  the clip; *insert*: each has a grey frame of its own.
- Intervals are 95 %: Wilson's for accuracies, Tango's for paired differences (which has a width even where no answer differs).
  *p* is the exact McNemar test against dense on the same examples, corrected by Holm within the panel.
- *C* is the measured mean over layers of the tokens held, over the input length. *FLOPs* are those of the decoder's prefill,
  full squares, relative to dense. Budgets are never exceeded; *fewer frames* is rounded down to whole frames.
- *Needle kept* is how often the one token that shows the decisive tile was still there as itself after the last layer;
  *merged*: averaged into another token. With StreamingLLM and non-cascaded merging, *kept* is what the last layer's cache holds.
- An ordering **holds** or is **reversed** where the paired test says so at 5 %, and is **absent** where it does not and a score
  test excludes an advantage of three points, after correction of both for all orderings of the table (Holm). A bound (“loses at
  most x %”) **holds** or **fails** where the whole interval of the loss, relative to the dense accuracy, lies on one side of it.
  All else is **not settled**: these examples cannot tell.
- *Random tokens* are the same places in all videos of one length; the needle's place varies.
- In Table 4 the cascaded arm has the FLOPs of a prefill whose caches are empty. Attention weighs more in this narrow model than
  in the paper's, so its C is lower there.
- The paper's layers 12 to 14 of 28 have one counterpart in 12 layers, layer 5: at layer 6 a budget of a half cannot be met,
  because text and the first frame cannot be merged.
"""


LOST = """How often the needle's token was gone after the last layer, and how often the answer was right nevertheless (Table 1). A
needle dropped before layer 0 can only be guessed; where answers stay right without the token, the model had read it by then."""


def readme(data: Data) -> str:
    """The whole file."""
    parts = [HEAD + setting(data["setting"]), READING, found(data["tables"])]
    parts += [section(table) for table in data["tables"]]
    parts.append(files(data))
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def setting(values: Mapping[str, Any]) -> str:
    """Command, seed, date, machine, weights."""
    rows = {
        "command": f"`{values['command']}` (or `make reproduce`)",
        "seed": values["seed"],
        "date": values["date"],
        "machine": f"{values['machine']}; {values['workers']} processes of one thread",
        "weights": values["weights"],
        "versions": f"tokenreduce {values['tokenreduce']}, torch {values['torch']}, transformers {values['transformers']}, "
        f"Python {values['python']}",
        "work": f"{values['arms_times_examples']:,} answers, {values['cpu_minutes']:g} minutes of CPU time",
    }
    return "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def found(tables: Sequence[Data]) -> str:
    """Losses against dense, how many of the paper's claims hold, and why."""
    head = ("", "claims of the paper", "hold", "reversed, absent or fail", "not settled", "not run")
    kinds = ((HOLDS,), (REVERSED, ABSENT, FAILS), (OPEN,), (NOT_RUN,))
    rows = []
    for table in tables:
        claims = [claim for claim in table["claims"] if claim["source"] == "paper"]
        if claims:
            counts = [sum(claim["verdict"] in kind for claim in claims) for kind in kinds]
            rows.append((table["title"].partition(":")[0], str(len(claims)), *map(str, counts)))
    return "\n".join(["## What was found", "", *_losses(tables), grid_table(head, rows), "", *_explain(tables)])


def _losses(tables: Sequence[Data]) -> list[str]:
    """What each method of Table 1 loses of dense, relative, as the paper counts it."""
    first = next((table for table in tables if table["key"] == "table1"), None)
    if first is None:
        return []
    said = {"framefusion@0.3": "under 3 %", "fastv@0.3": "24 %", "streaming_llm@0.3": "70 %"}
    cells: dict[str, list[str]] = {}
    for panel in first["panels"]:
        for arm in panel["arms"]:
            if arm.get("of"):
                ends = sorted(min(-end / arm["of"], 1.0) for end in arm["difference_interval"])
                text = f"{_percent(-arm['difference'] / arm['of'])} ({_percent(ends[0])} to {_percent(ends[1])})"
                cells.setdefault(arm["arm"], []).append(text)
    head = ("loss relative to dense, C = 0.3", *(panel["label"] for panel in first["panels"]), "paper, VideoNIAH")
    rows = [(label(arm), *row, said.get(arm, "–")) for arm, row in cells.items() if len(row) == len(first["panels"])]
    return [grid_table(head, rows), "", "Negative is a gain. 95 % intervals in brackets.", ""]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %".replace("-", "−") if round(100 * share, 1) else "0.0 %"


def _explain(tables: Sequence[Data]) -> list[str]:
    """Where the needle's token went under each method of Table 1, and how often the answer was right without it."""
    first = next((table for table in tables if table["key"] == "table1"), None)
    if first is None:
        return []
    head = ("method", *(panel["label"] for panel in first["panels"]))
    cells = {arm["arm"]: ["–"] * len(first["panels"]) for arm in first["panels"][0]["arms"] if arm["arm"] != BASELINE}
    for column, panel in enumerate(first["panels"]):
        for arm in panel["arms"]:
            if arm["examples"] and arm["arm"] != BASELINE:
                gone = arm["needle_dropped"]
                right = f", right in {gone['right']} of {gone['examples']}" if gone["examples"] else ""
                cells[arm["arm"]][column] = f"{gone['examples'] / arm['examples']:.0%}{right}"
    return [LOST, "", grid_table(head, [(label(arm), *row) for arm, row in cells.items()])]


def section(table: Data) -> str:
    """One table: found here, the paper's numbers beside it, and the orderings."""
    parts = [f"## {table['title']}"]
    picture = {"fig7": "fig7.png", "table7": "fig10.png", "fig12": "fig12.png"}.get(table["key"])
    if picture:
        parts.append(f"![{table['title']}]({picture})")
    if table["key"] == "fig12":
        parts += [_grid(panel) for panel in table["panels"]]
    else:
        parts += [f"**{panel['label']}**\n\n{_panel(panel)}{_short(panel)}" for panel in table["panels"]]
    if table["key"] in SAYS:
        parts.append(f"The paper: {SAYS[table['key']]}")
    if table["key"] in PAPER:
        head, rows = PAPER[table["key"]]
        parts.append(grid_table(head, rows))
    if table["claims"]:
        parts.append("Does it hold here?\n\n" + claims(table["claims"]))
    return "\n\n".join(parts)


def _panel(panel: Data) -> str:
    head = (
        "method",
        "accuracy",
        "95 % interval",
        "minus dense",
        "interval",
        "*p* (Holm)",
        "C",
        "FLOPs",
        "needle kept",
        "merged",
        "n",
    )
    return grid_table(head, [_line(entry) for entry in panel["arms"]]) + _refusals(panel)


def _line(entry: Data) -> tuple[str, ...]:
    if not entry["examples"]:
        return (label(entry["arm"]), "refused" if entry["refused"] else "not run", *["–"] * 8, "0")
    low, high = entry["interval"]
    against = ("–", "–", "–")
    if "difference" in entry:
        ends = entry["difference_interval"]
        against = (points(entry["difference"]), f"{points(ends[0])} to {points(ends[1])}", p_value(entry["p_holm"]))
    return (
        label(entry["arm"]),
        f"{entry['accuracy']:.1%}",
        f"{low:.1%}–{high:.1%}",
        *against,
        f"{entry['relative_tokens']:.3f}",
        f"{entry['relative_flops']:.3f}",
        f"{entry['needle']['kept']:.0%}",
        f"{entry['needle']['merged']:.0%}",
        str(entry["examples"]),
    )


def _refusals(panel: Data) -> str:
    told = [
        f"{label(e['arm'])} refused {e['refused']} of {e['refused'] + e['examples']} examples: “{e['refusal']}”."
        for e in panel["arms"]
        if e["refused"]
    ]
    return "\n\n" + "\n\n".join(told) if told else ""


def _short(panel: Data) -> str:
    """A note where the run was stopped before the panel's end."""
    done = min(entry["examples"] + entry["refused"] for entry in panel["arms"])
    return (
        f"\n\nStopped before its end: {done} of {panel['planned']} examples in every arm."
        if done < panel["planned"]
        else ""
    )


def claims(made: Sequence[Data]) -> str:
    """Claims with their verdicts."""
    rows = []
    for claim in made:
        one, other = label(claim["better"]), label(claim["worse"])
        text = (
            f"{one} above {other}"
            if claim["within"] is None
            else f"{one} loses at most {claim['within']:.1%} of {other}"
        )
        if claim["source"] == "control":
            text += " (control)"
        if "difference" not in claim:
            rows.append((claim["condition"], text, "–", "–", "–", claim["verdict"]))
            continue
        low, high = claim["difference_interval"]
        rows.append(
            (
                claim["condition"],
                text,
                points(claim["difference"]),
                f"{points(low)} to {points(high)}",
                p_value(claim["p_holm"]) if "p_holm" in claim else "–",
                f"**{claim['verdict']}**",
            )
        )
    return grid_table(("condition", "claim", "difference", "95 % interval", "*p* (Holm)", "here"), rows)


def _grid(panel: Data) -> str:
    found = panel["grid"]
    if not found:
        return ""
    places = [cell["position"] for cell in next(iter(found.values()))]
    rows = [
        (label(arm), *(f"{c['right']}/{c['examples']} ({c['interval'][0]:.0%}–{c['interval'][1]:.0%})" for c in cells))
        for arm, cells in found.items()
    ]
    return f"**{panel['label']}**\n\n" + grid_table(("method", *(f"position {place:g}" for place in places)), rows)


def files(data: Data) -> str:
    """What else lies beside the report, and the honesty checks."""
    passed = sum(check["passed"] is True for check in data["checks"])
    return f"""## Files

`results.json` has everything above with unrounded numbers, `results.csv` the arms as one line each, `outcomes.csv` every answer
(1 right, 0 wrong, - refused, in the order of the stream), from which all statistics can be made again.
Before the run {passed} of {len(data["checks"])} honesty checks passed: dense equals the unattached model, and each method at
budget 1 equals dense, bit for bit.
"""


def grid_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
    )


def label(arm: str) -> str:
    """An arm's name for readers; the budget only where it is not the usual 0.3."""
    method, _, share = arm.partition("@")
    name = (
        f"merged at layer {method.removeprefix('merge_at_')}"
        if method.startswith("merge_at_")
        else NAMES.get(method, method)
    )
    if share == "equal_flops":
        return name
    return f"{name}, C = {share}" if share and not method.startswith(("merge_", "prune_then")) else name


def points(share: float) -> str:
    """A difference in percentage points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−") if round(100 * share, 1) else "0.0"


def p_value(p: float) -> str:
    """A p-value, short."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
