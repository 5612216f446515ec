"""The report of a comparison: complete in one file, safe with hostile text, and alive in a real browser."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.browser import Page, find_browser

from tokenreduce.compare.arms import Arm, expand
from tokenreduce.compare.patches import _strip
from tokenreduce.compare.report import embedded_json, markdown, page, write_report
from tokenreduce.compare.statistics import power
from tokenreduce.compare.store import Store
from tokenreduce.compare.summary import grid, mark, summarise

HOSTILE = "</script><img src=x onerror=alert(1)><svg onload=alert(2)>\"'&|`{{data}}"
LAYERS = 4


def rows(index: int, arms: list[Arm], right: dict[str, bool]) -> list[dict[str, Any]]:
    """Rows of one example as `Bench` makes them."""
    made = []
    for place, arm in enumerate(arms):
        share = arm.share or 1.0
        made.append(
            {
                "model": arm.model, "index": index, "id": str(index), "question": HOSTILE, "expected": "7", "chance": 0.1,
                "cell": {"frames": 8 + 8 * (index % 2), "position": (index // 2 % 3) / 2}, "input_tokens": 100, "worker": "w",
                "arm": arm.name, "reply": HOSTILE, "said": "7" if right[arm.name] else "1", "right": right[arm.name],
                "fired": share < 1, "agrees": None if share == 1 else right[arm.name], "kl": None if share == 1 else 0.25,
                "tokens": [int(100 * share)] * LAYERS, "relative_tokens": share, "layer_flops": [int(1e6 * share)] * LAYERS,
                "flops": int(4e6 * share), "relative_flops": share, "selector_flops": 0,
                "kv_bytes": int(1e5 * share), "new_tokens": 2,
                "seconds": {"vision": 0.02, "prefill": 0.1 * share + 0.001 * place, "selector": 0.001 * place, "turns": 0.0,
                            "decode_per_token": None if index == 0 else 0.005},
                "peak_bytes": 5e8, "growth_bytes": 1e7,
            }
        )  # fmt: skip
    return made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    arms = expand(["framefusion", "random"], ["0.3", "0.5"], ["embedded"])
    settings = {
        "tokenreduce": "0", "task": {"task": "needle", "kind": HOSTILE, "positions": [0, 0.5, 1]}, "seed": 1, "examples": 40,
        "baseline": "dense", "new_tokens": 8, "models": {"embedded": HOSTILE}, "arms": [arm.settings() for arm in arms],
    }  # fmt: skip
    made = Store.create_or_resume(tmp_path / "out", settings)
    for index in range(30):
        right = {arm.name: arm.method != "random" or index % 3 == 0 for arm in arms}
        made.append(rows(index, arms, right | {"framefusion@0.5": index != 4}))
    made.save_checks("embedded", [{"name": "check", "subject": HOSTILE, "passed": True, "detail": HOSTILE}])
    strip = _strip(np.zeros((2, 8, 8, 3), dtype=np.uint8))
    counts = {"kept": 1, "merged": 2, "dropped": 3}
    strips = [{"arm": "input", "png": strip}]
    strips += [{"arm": arm.name, "reply": HOSTILE, "right": True, "png": strip, **counts} for arm in arms]
    data = {"model": "embedded", "index": 0, "id": HOSTILE, "question": HOSTILE, "expected": HOSTILE, "frames": [0, 1]}
    made.save_picture({**data, "strips": strips})
    return made


def arms_of(store: Store) -> list[Arm]:
    return expand(["framefusion", "random"], ["0.3", "0.5"], ["embedded"])


def test_a_summary_by_hand(store: Store) -> None:
    summary = summarise(store, arms_of(store))
    assert summary["examples"] == {"asked": 40, "finished": 30}
    assert not summary["complete"]
    dense, fusion, better, random, _ = summary["arms"]
    assert (dense["accuracy"], fusion["accuracy"], random["accuracy"]) == (1, 1, 1 / 3)
    assert fusion["difference"] == 0
    assert (better["only_arm"], better["only_baseline"], better["p"], better["p_holm"]) == (0, 1, 1.0, 1.0)
    assert (random["only_arm"], random["only_baseline"]) == (0, 20)
    assert random["p"] == 2 / 2**20
    # Four arms, and of each whether it differs and whether it keeps the accuracy.
    assert random["p_holm"] == 8 * random["p"]
    assert [arm["verdict"] for arm in summary["arms"][1:]] == ["not settled", "not settled", "loses", "loses"]
    assert random["mark"] == "***"
    assert random["power"]["0.1"] == pytest.approx(power(30, (2 / 3 + 0.1) / 2, (2 / 3 - 0.1) / 2))
    assert random["difference_interval"][1] < 0
    assert [arm["pareto"] for arm in summary["arms"]] == [False, True, False, False, False]
    assert fusion["prefill_speedup"] == pytest.approx(0.1 / 0.031)
    assert dense["seconds"]["decode_per_token"] == 0.005
    assert len(dense["grid"]) == 6
    assert sum(cell["right"] for cell in random["grid"]) == 10
    names = [check["name"] for check in summary["checks"]]
    assert names == ["check", "shuffled labels give chance"]


def test_arms_without_examples_are_told_so(tmp_path: Path) -> None:
    arms = expand(["random"], ["0.5"], ["embedded"])
    settings = {
        "tokenreduce": "0", "task": {"task": "videos"}, "seed": 1, "examples": 4, "baseline": "dense", "new_tokens": 8,
        "models": {}, "arms": [arm.settings() for arm in arms],
    }  # fmt: skip
    store = Store.create_or_resume(tmp_path / "o", settings)
    summary = summarise(store, arms)
    assert "UNFINISHED: 0 of 4 examples." in markdown(summary)
    assert "UNFINISHED: 0 of 4 examples." in page(summary, [])


def test_places_left_to_chance_are_put_into_ranges() -> None:
    rows = [{"cell": {"frames": 4, "position": p}, "right": p < 0.5} for p in (0.0, 0.1, 0.5, 1.0)]
    found = [(cell["label"], cell["right"], cell["examples"]) for cell in grid(rows, placed=False)]
    assert found == [("0.0–0.2", 2, 2), ("0.4–0.6", 0, 1), ("0.8–1.0", 0, 1)]
    assert grid([{"cell": {}, "right": True}], placed=False) == []


def test_marks() -> None:
    assert [mark(p) for p in (0.0009, 0.001, 0.04, 0.05)] == ["***", "**", "*", "n.s."]


def test_embedded_json_cannot_end_its_tag() -> None:
    data = {"a": HOSTILE, "b": "<!--"}
    text = embedded_json(data)
    assert not set("<>&") & set(text)
    assert json.loads(text) == data


def test_markdown_cells_stay_in_their_cells(store: Store) -> None:
    text = markdown(summarise(store, arms_of(store)))
    table = [line for line in text.splitlines() if line.startswith("| check")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in table)
    assert "\\<img" in text


class Tags(HTMLParser):
    """Tags with their attributes, and where they point to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_is_one_file_and_text_stays_text(store: Store) -> None:
    written = write_report(store, summarise(store, arms_of(store)), store.folder)
    assert [path.name for path in written[:3]] == ["summary.json", "report.html", "report.md"]
    try:
        from pyarrow import parquet
    except ImportError:
        assert len(written) == 3
    else:
        assert parquet.read_table(written[3]).num_rows == len(store.rows)
    text = written[1].read_text()
    parser = Tags()
    parser.feed(text)
    for tag, attributes in parser.seen:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert attributes.get("src", "data:").startswith("data:"), tag  # type: ignore[union-attr]
        assert (attributes.get("href") or "#").startswith("#"), tag
    images = [attributes for tag, attributes in parser.seen if tag == "img"]
    assert len(images) == 6
    assert all(attributes["alt"] for attributes in images)
    assert [tag for tag, _ in parser.seen].count("script") == 2
    assert "{{data}}" in text  # the hostile text's own, not a place left open
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


def test_the_page_in_a_browser(store: Store, tmp_path: Path) -> None:
    browser = find_browser()
    if browser is None:
        pytest.skip("no Chromium on this machine")
    file = write_report(store, summarise(store, arms_of(store)), store.folder)[1]
    with Page(browser, file.as_uri()) as page:
        assert page.evaluate("document.querySelectorAll('#arms input').length") == 5
        plots = "[...document.querySelectorAll('.plots figure:not([hidden])')].filter((f) => f.querySelector('svg'))"
        assert page.evaluate(f"{plots}.map((f) => f.id)") == [
            "flops",
            "speed",
            "space",
            "budget",
            "agreement",
            "layers",
            "time",
            "memory",
            "grid",
        ]
        count = "document.querySelectorAll('#flops svg .hit').length"
        assert page.evaluate(count) == 5
        # Choosing arms: the last one goes from plots, tables and pictures, and comes back.
        box = "document.querySelectorAll('#arms input')[4]"
        page.evaluate(f"{box}.click()")
        assert page.evaluate(count) == 4
        gone = "[...document.querySelectorAll('[data-arm=\"random@0.5\"]')].every((e) => e.getBoundingClientRect().height === 0)"
        assert page.evaluate(gone)
        page.evaluate("document.querySelectorAll('#arms input').forEach((e) => e.checked && e.click())")
        assert page.evaluate(count) == 0
        page.evaluate("document.querySelectorAll('#arms input').forEach((e) => e.click())")
        assert page.evaluate(count) == 5
        # Pointing and the keyboard show the same words.
        at = page.evaluate(
            "(() => { const e = document.querySelector('#flops .hit'); e.scrollIntoView({block: 'center'});"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2, e.ariaLabel]; })()"
        )
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])
        tip = "(() => { const t = document.getElementById('tip'); return t.hidden ? null : t.textContent; })()"
        assert page.evaluate(tip).replace("\n", ", ") == at[2]
        assert "accuracy 100.0 %" in at[2]
        page.evaluate("document.querySelectorAll('#flops .hit')[3].focus()")
        assert "random@0.3" in page.evaluate(tip)
        # Every plotted point and bar has a name for a screen reader, every table a header.
        assert page.evaluate(
            "[...document.querySelectorAll('.hit')].every((e) => e.ariaLabel && e.getAttribute('role') === 'img')"
        )
        assert page.evaluate("[...document.querySelectorAll('table')].every((t) => t.querySelector('th[scope=col]'))")
        # A head sorts its table, numbers as numbers, and again the other way; a table comes out as CSV.
        first = "document.querySelector('main table tbody th').textContent"
        head = (
            "[...document.querySelectorAll('main table')[0].tHead.rows[0].cells].find((c) => c.textContent === 'FLOPs')"
        )
        page.evaluate(f"{head}.querySelector('button').click()")
        assert page.evaluate(f"{head}.getAttribute('aria-sort')") == "ascending"
        assert page.evaluate(first) in ("framefusion@0.3", "random@0.3")
        page.evaluate(f"{head}.querySelector('button').click()")
        assert page.evaluate(first) == "dense"
        page.evaluate(
            "window.saved = []; URL.createObjectURL = (blob) => { blob.text().then((t) => saved.push(t)); return '#'; }"
        )
        page.evaluate("document.querySelector('button.csv').click()")
        page.evaluate("new Promise((done) => setTimeout(done, 100))")
        lines = page.evaluate("saved[0]").splitlines()
        assert lines[0].startswith('"arm","budget","accuracy"')
        assert len(lines) == 6
        # The first thing that the keyboard reaches leads past the chooser; what was lost leads to its picture.
        assert page.evaluate("document.querySelector('a').getAttribute('href')") == "#main"
        links = "[...document.querySelectorAll('.lost a')].every((a) => document.querySelector(a.getAttribute('href')))"
        assert page.evaluate(links)
        assert page.evaluate("document.querySelectorAll('.lost li').length") > 12
        wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        assert page.evaluate(wide)
        page.screenshot(tmp_path / "report.png")
        page.call("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=False)
        assert page.evaluate(wide)
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        dark = "getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(dark) == "rgb(20, 24, 29)"
        page.screenshot(tmp_path / "dark.png")
        # The hostile question is there to read and has done nothing.
        assert page.evaluate("document.body.textContent.includes('<img src=x onerror=alert(1)>')")
        assert page.evaluate("document.querySelectorAll('img[src=x], svg[onload]').length") == 0
        # Nor would it, had it been markup: the page's policy runs its own script alone.
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(1)>')")
        page.evaluate("new Promise((done) => setTimeout(done, 200))")
        assert page.dialogs == []
        assert page.evaluate("getComputedStyle(document.getElementById('tip')).position") == "fixed"
        blocked = [line for line in page.console if "Content Security Policy" not in line]
        assert blocked == []
        assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
        page.screenshot(tmp_path / "narrow.png")
        assert len(page.call("Page.printToPDF")["data"]) > 10_000
