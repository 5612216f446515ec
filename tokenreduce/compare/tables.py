"""The tables of a report, once, for HTML and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A table of plain text."""

    title: str
    """Heading."""
    columns: tuple[str, ...]
    """Heads of the columns."""
    rows: tuple[tuple[str, ...], ...]
    """Cells, one tuple per row, as long as `columns`."""
    notes: tuple[str, ...] = ()
    """Sentences below the table."""

    def markdown(self) -> str:
        """A Markdown table; what Markdown would take for its own is escaped."""
        lines = [self.columns, ("---",) + ("---:",) * (len(self.columns) - 1), *self.rows]
        return "\n".join("| " + " | ".join(_markdown(cell) for cell in line) + " |" for line in lines)

    def html(self, mark: str = "") -> str:
        """An HTML table. mark: name of a data attribute that repeats the first cell on each row."""
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in self.columns)
        body = []
        for row in self.rows:
            attribute = f' data-{mark}="{escape(row[0])}"' if mark else ""
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
            body.append(f'<tr{attribute}><th scope="row">{escape(row[0])}</th>{cells}</tr>')
        notes = "".join(f'<p class="note">{escape(note)}</p>' for note in self.notes)
        kind = "" if mark else ' class="text"'
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(self.title)}"><table{kind}>'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{notes}"
        )


def main_table(arms: Sequence[Entry], baseline: str) -> Table:
    """Accuracy, difference from the baseline, agreement with dense, tokens and FLOPs."""
    columns: tuple[str, ...] = (
        "arm", "budget", "accuracy", "95 % interval", f"difference from {baseline}", "its interval", "p (Holm)", "",
        "same first token", "KL, nats", "tokens", "FLOPs",
    )  # fmt: skip
    odd = any(arm.get("not_finite") for arm in arms)
    columns = (*columns, "not finite") if odd else columns
    rows = []
    for arm in arms:
        if not arm["examples"]:
            rows.append((arm["name"], arm["budget"], *["–"] * (len(columns) - 2)))
            continue
        rows.append(
            (
                arm["name"],
                arm["budget"],
                f"{arm['accuracy']:.3f}",
                between(arm["interval"]),
                signed(arm.get("difference")),
                between(arm.get("difference_interval"), sign=True),
                probability(arm.get("p_holm")),
                arm.get("mark", ""),
                number(arm.get("agreement"), "{:.3f}"),
                number(arm.get("kl"), "{:.3g}"),
                f"{arm['relative_tokens']:.3f}",
                f"{arm['relative_flops']:.3f}",
                *([f"{arm.get('not_finite', 0)} of {arm['examples']}"] if odd else []),
            )
        )
    notes = (
        "Tokens and FLOPs are shares of the dense prefill: tokens as a mean over layers; FLOPs with attention over full "
        "squares, importance included. Agreement and KL(dense ‖ arm) are with the dense arm of the same model; the KL is the "
        "mean over the answer's tokens up to where the two part.",
        *(
            ["Not finite: examples whose logits were NaN or infinite; they count as not right, and have no KL."]
            if odd
            else []
        ),
    )
    return Table("Accuracy", columns, tuple(rows), notes)


def costs_table(arms: Sequence[Entry]) -> Table:
    """Times and memory."""
    columns = (
        "arm", "vision ms", "prefill ms", "of it selector ms", "speedup", "with vision", "later turns ms", "decode ms/token",
        "GFLOP", "KV cache MiB", "peak MiB", "growth MiB",
    )  # fmt: skip
    rows = []
    for arm in arms:
        if not arm["examples"]:
            continue
        seconds = arm["seconds"]
        rows.append(
            (
                arm["name"],
                milliseconds(seconds["vision"]),
                milliseconds(seconds["prefill"]),
                milliseconds(seconds["selector"]),
                number(arm.get("prefill_speedup"), "{:.2f}×"),
                number(arm.get("whole_speedup"), "{:.2f}×"),
                milliseconds(seconds["turns"]),
                milliseconds(seconds["decode_per_token"]),
                f"{arm['flops'] / 1e9:,.2f}",
                f"{arm['kv_bytes'] / 2**20:,.2f}",
                number(arm["peak_bytes"], "{:,.1f}", 2**-20),
                number(arm["growth_bytes"], "{:,.1f}", 2**-20),
            )
        )
    notes = (
        "Times are medians over examples, arms in turns, after a warm-up. Vision is everything before the decoder; prefill is "
        "the decoder; selector is the time inside the strategies' decisions, part of the prefill. Peak is the process's "
        "resident set (on CUDA: torch's own account), growth what came on top of the level before, both on one untimed "
        "example per session.",
    )
    return Table("Time and memory", columns, tuple(rows), notes)


def power_table(arms: Sequence[Entry], baseline: str) -> Table:
    """Discordant pairs and the examples that a given difference needs."""
    compared = [arm for arm in arms if "examples_needed" in arm]
    wanted = list(compared[0]["examples_needed"]) if compared else []
    columns = ("arm", "right alone", f"{baseline} right alone", *(f"to see {float(d) * 100:g} points" for d in wanted))
    rows = [
        (
            arm["name"],
            str(arm["only_arm"]),
            str(arm["only_baseline"]),
            *(f"{arm['examples_needed'][d]:,} ({arm['power'][d]:.0%})" for d in wanted),
        )
        for arm in compared
    ]
    notes = (
        "Examples at which McNemar's test sees a true difference of so much with 80 % power (Connor 1987), and in brackets the "
        "power of the examples there are; at α = 0.05, before correction, if pairs disagree as often as here.",
    )
    return Table("Examples needed", columns, tuple(rows), notes)


def layers_table(arms: Sequence[Entry]) -> Table:
    """Mean tokens that each layer holds."""
    held = [arm for arm in arms if arm["examples"]]
    depth = max((len(arm["tokens_per_layer"]) for arm in held), default=0)
    rows = [(arm["name"], *(f"{count:,.1f}".removesuffix(".0") for count in arm["tokens_per_layer"])) for arm in held]
    rows = [(*row, *["–"] * (depth + 1 - len(row))) for row in rows]
    return Table("Tokens per layer", ("arm", *map(str, range(depth))), tuple(rows))


def grid_table(arms: Sequence[Entry]) -> Table:
    """Right answers of all examples, per length of the video and place of the needle."""
    held = [arm for arm in arms if arm.get("grid")]
    cells = {(cell["frames"], cell["label"]): None for arm in held for cell in arm["grid"]}
    columns = ("arm", *(f"{frames:g} frames, {label}" for frames, label in cells))
    rows = []
    for arm in held:
        found = {(cell["frames"], cell["label"]): f"{cell['right']}/{cell['examples']}" for cell in arm["grid"]}
        rows.append((arm["name"], *(found.get(cell, "–") for cell in cells)))
    return Table("Accuracy by length and place", columns, tuple(rows))


def checks_table(checks: Sequence[Entry]) -> Table:
    """Honesty checks."""
    verdict = {True: "holds", False: "FAILS", None: "does not apply"}
    rows = [(check["name"], check["subject"], verdict[check["passed"]], check["detail"]) for check in checks]
    return Table("Honesty checks", ("check", "of", "", "detail"), tuple(rows))


def number(value: float | None, form: str, scale: float = 1) -> str:
    """A value in a form, or a dash."""
    return "–" if value is None else form.format(value * scale)


def milliseconds(value: float | None) -> str:
    """Seconds as milliseconds with three digits."""
    if value is None:
        return "–"
    return f"{value * 1e3:,.0f}" if value >= 0.1 else f"{value * 1e3:.3g}"


def signed(value: float | None) -> str:
    """+0.010, or a dash."""
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def between(ends: Sequence[float] | None, sign: bool = False) -> str:
    """An interval, or a dash."""
    if ends is None:
        return "–"
    low, high = (signed(end) if sign else f"{end:.3f}" for end in ends)
    return f"{low} to {high}" if sign else f"{low}–{high}"


def probability(p: float | None) -> str:
    """A p-value, or a dash."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _markdown(cell: str) -> str:
    for sign in "\\|<>*_`[]":
        cell = cell.replace(sign, f"\\{sign}")
    return " ".join(cell.split())
