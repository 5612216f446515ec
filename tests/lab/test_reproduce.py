"""The reproduction: its plan, its bookkeeping, its statistics and its report, on two examples."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab.reproduce import plan
from lab.reproduce.__main__ import main
from lab.reproduce.markdown import label, points
from lab.reproduce.measure import Unit, Worker
from lab.reproduce.paper import CLAIMS, PAPER, SAYS
from lab.reproduce.plan import CHAIN, FIRST, ONE_HOP, SECOND, TABLES, Condition, pipeline, wanted
from lab.reproduce.results import entry, judge, paired, verdict
from lab.reproduce.rows import Rows
from tokenreduce.compare.statistics import mcnemar, wilson
from tokenreduce.errors import TokenReduceError
from tokenreduce.planning.cost import DecoderShape, prefill_flops
from tokenreduce.testbed.embedded import EMBEDDED, build_config, build_tokenizer

SMALL = (Condition(frames=8), Condition("second_turn", frames=8), Condition("chain", frames=8))


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(EMBEDDED, seed=1)


@pytest.fixture(scope="module")
def rows(worker: Worker) -> list[dict[str, Any]]:
    arms = ("dense", "framefusion@0.3", "fastv@0.3", "streaming_llm@0.3", "noncascaded_merge@0.3")
    return [row for condition in SMALL for row in worker.run(Unit(condition, (0, 1), arms))]


# --- the plan


def test_each_table_has_claims_and_what_the_paper_says() -> None:
    keys = {table.key for table in TABLES}
    assert keys == set(CLAIMS) == {*SAYS, "depth"}
    assert set(PAPER) == keys - {"fig7", "fig12", "depth"}
    for head, lines in PAPER.values():
        assert all(len(line) == len(head) for line in lines)


def test_each_claim_is_about_arms_that_its_table_runs() -> None:
    for table in TABLES:
        ran = {(panel.condition, arm) for panel in table.panels for arm in panel.arms}
        for claim in CLAIMS[table.key]:
            assert {(claim.condition, claim.better), (claim.condition, claim.worse)} <= ran


def test_table_1_has_500_examples_per_needle_type() -> None:
    table = next(table for table in TABLES if table.key == "table1")
    assert all(panel.examples >= 500 for panel in table.panels)
    assert {panel.condition.kind for panel in table.panels} == {"one_hop", "second_turn", "chain"}
    assert {panel.condition.placement for panel in table.panels} == {"edit", "insert"}


def test_every_arm_is_a_pipeline_of_its_own() -> None:
    for condition, arms in wanted(TABLES, None).items():
        made = {arm: plan.digest(arm, condition.frames) for arm in arms}
        assert len(set(made.values())) == len(made)
        assert pipeline("dense", condition.frames) is None


def test_tables_share_examples_and_the_most_demanding_decides() -> None:
    needs = wanted(TABLES, None)
    assert needs[ONE_HOP]["framefusion@0.3"] == 500
    assert needs[ONE_HOP]["framefusion@0.1"] == 200
    assert set(wanted(TABLES, 2)[CHAIN].values()) == {2}


def test_flops_without_a_cache_are_projections_and_ffn_alone() -> None:
    shape = DecoderShape.from_config(build_config(build_tokenizer()))
    n = plan.PROMPT + 16 * plan.PER_FRAME
    d, m, kv = 128, 256, 64
    by_hand = 12 * n * (2 * d * (2 * d + 2 * kv) + 2 * d * 3 * m) + 2 * d * shape.vocab
    assert plan.cacheless_flops(16) == by_hand / prefill_flops(shape, [n] * 12, [n] * 12)


# --- what is run


def test_an_arm_meets_its_budget_and_dense_holds_everything(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["arm"] == "dense":
            assert row["relative_tokens"] == row["relative_flops"] == 1
            assert row["needle"] == "kept"
        else:
            assert 0.28 < row["relative_tokens"] <= 0.3
            assert row["relative_flops"] < 1


def test_the_prompt_is_as_long_as_the_plan_takes_it(rows: list[dict[str, Any]]) -> None:
    lengths = {row["condition"]: row["input_tokens"] for row in rows}
    assert lengths["one_hop-edit-8"] == plan.PROMPT + 8 * plan.PER_FRAME


def test_right_is_the_answer_word_for_word(rows: list[dict[str, Any]]) -> None:
    assert all(row["right"] == (row["reply"] == row["answer"]) for row in rows)
    assert all(len(row["answer"].split()) == (2 if row["condition"].startswith("chain") else 1) for row in rows)


def test_the_needle_is_where_the_tile_is(worker: Worker) -> None:
    condition = Condition(frames=8)
    item = condition.task(1).item(0)
    needle = worker._example(condition, condition.task(1), 0).needle
    frame, slot = divmod(needle - _first_video_column(worker, item), plan.PER_FRAME)
    row, column = divmod(slot, 7)
    assert item.shown == (frame,)
    cell = np.asarray(item.video)[frame, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
    assert len({tuple(pixel) for pixel in cell.reshape(-1, 3)}) == 2  # a digit on a plain tile: two colours


def _first_video_column(worker: Worker, item: Any) -> int:
    ids = worker.inputs(item)["input_ids"][0]
    return int((ids == worker.bench.model.config.video_token_id).nonzero()[0])


def test_pipelines_left_on_the_model_do_what_fresh_ones_do(worker: Worker, rows: list[dict[str, Any]]) -> None:
    condition = SMALL[1]
    arms = ("framefusion@0.3", "streaming_llm@0.3", "dense")
    alone = [row for index in (1, 0) for arm in arms for row in worker.run(Unit(condition, (index,), (arm,)))]
    known = {(row["arm"], row["index"]): row for row in rows if row["condition"] == condition.key}
    for row in alone:
        assert replace_time(row) == replace_time(known[row["arm"], row["index"]])


def replace_time(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "cpu_seconds": 0}


def test_a_budget_that_cannot_be_met_is_noted_and_the_next_arm_runs(worker: Worker) -> None:
    refused, dense = worker.run(Unit(SMALL[0], (0,), ("fastv@0.1", "dense")))
    assert "smallest feasible budget" in refused["refused"]
    assert "right" not in refused
    assert dense["relative_tokens"] == 1


def test_both_orders_of_table_3_hold_the_same_tokens_in_every_layer(worker: Worker) -> None:
    one, other = worker.run(Unit(ONE_HOP, (0,), ("prune_then_merge@0.3", "merge_then_prune@0.3")))
    assert one["tokens"] == other["tokens"]
    assert one["tokens"][1] > one["tokens"][2] > one["tokens"][3]


# --- rows on disk


def _row(arm: str, index: int, right: bool = True) -> dict[str, Any]:
    return {
        "condition": ONE_HOP.key,
        "arm": arm,
        "pipeline": plan.digest(arm, 16),
        "index": index,
        "position": 0.5,
        "right": right,
        "needle": "kept",
        "tokens": [3, 3],
        "relative_tokens": 1.0,
        "relative_flops": 1.0,
        "cpu_seconds": 0.1,
    }


def test_what_is_on_disk_is_not_run_again(tmp_path: Path) -> None:
    needs = {ONE_HOP: {"dense": 3, "fastv@0.3": 2}}
    with Rows(tmp_path) as held:
        assert sum(unit.rows for unit in held.missing(needs)) == 5
        held.append([_row("dense", 0), _row("fastv@0.3", 0), _row("dense", 2)])
    with Rows(tmp_path) as held:
        (unit,) = held.missing(needs)
        assert (unit.indices, unit.arms) == ((1,), ("dense", "fastv@0.3"))


def test_a_line_that_a_kill_cut_short_is_run_again(tmp_path: Path) -> None:
    with Rows(tmp_path) as held:
        held.append([_row("dense", 0), _row("dense", 1)])
    file = tmp_path / "rows.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    with Rows(tmp_path) as held:
        assert [row["index"] for row in held.rows] == [0]
        assert held.missing({ONE_HOP: {"dense": 2}}) == [Unit(ONE_HOP, (1,), ("dense",))]
        held.append([_row("dense", 1)])
    with Rows(tmp_path) as held:
        assert not held.missing({ONE_HOP: {"dense": 2}})


def test_rows_of_another_pipeline_do_not_count(tmp_path: Path) -> None:
    with Rows(tmp_path) as held:
        held.append([{**_row("fastv@0.3", 0), "pipeline": "older"}])
        assert held.missing({ONE_HOP: {"fastv@0.3": 1}})
        assert held.of(ONE_HOP, "fastv@0.3", 10) == {}


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with Rows(tmp_path), pytest.raises(TokenReduceError, match="in use by another run"):
        Rows(tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    with pytest.raises(TokenReduceError, match="not rows of a reproduction"):
        Rows(tmp_path)


def test_an_early_stop_leaves_all_conditions_equally_far(tmp_path: Path) -> None:
    needs = {ONE_HOP: {"dense": 120}, SECOND: {"dense": 60}}
    with Rows(tmp_path) as held:
        order = [(unit.condition.kind, unit.indices[0]) for unit in held.missing(needs)]
    assert order.index(("second_turn", 0)) < order.index(("one_hop", 50)) < order.index(("one_hop", 110))


# --- numbers and verdicts


def test_an_entry_counts_intervals_and_discordant_pairs() -> None:
    dense = {i: _row("dense", i) for i in range(10)}
    arm = {i: _row("fastv@0.3", i, right=i >= 6) for i in range(10)}
    made = entry("fastv@0.3", arm, dense)
    assert (made["right"], made["accuracy"], made["interval"]) == (4, 0.4, list(wilson(4, 10)))
    assert (made["difference"], made["only_this"], made["only_other"], made["p"]) == (-0.6, 0, 6, mcnemar(0, 6))


def test_refused_examples_are_left_out_of_pairs_and_counted() -> None:
    dense = {i: _row("dense", i) for i in range(4)}
    refused = {key: value for key, value in _row("fastv@0.3", 0).items() if key != "right"} | {"refused": "too small"}
    arm = {0: refused, **{i: _row("fastv@0.3", i) for i in range(1, 4)}}
    made = entry("fastv@0.3", arm, dense)
    assert (made["examples"], made["refused"], made["pairs"]) == (3, 1, 3)
    assert paired({0: refused}, dense) == {}


@pytest.mark.parametrize(
    ("right_of", "within", "expected"),
    [
        ((100, 60), None, "holds"),
        ((60, 100), None, "reversed"),
        ((100, 98), None, "not settled"),
        ((80, 83), None, "absent"),
        ((60, 100), 0.03, "fails"),
        ((100, 100), 0.05, "holds"),
        ((100, 100), 0.03, "not settled"),  # nothing lost in 100 examples does not exclude a loss of 3 %
        ((98, 100), 0.03, "not settled"),
    ],
)
def test_verdicts(right_of: tuple[int, int], within: float | None, expected: str) -> None:
    one, other = (
        {i: _row(arm, i, right=i < n) for i in range(100)} for arm, n in zip(FIRST[1:3], right_of, strict=True)
    )
    claim = replace(CLAIMS["table1"][1], within=within)
    answers = {(claim.condition.key, claim.better): one, (claim.condition.key, claim.worse): other}
    (made,) = judge((claim,), answers)
    assert made["verdict"] == expected


def test_a_claim_without_data_is_not_run() -> None:
    assert verdict({"within": None}) == "not run"


def test_words_for_readers() -> None:
    assert label("framefusion@0.5") == "FrameFusion, C = 0.5"
    assert label("merge_at_3@0.5") == "merged at layer 3"
    assert [points(x) for x in (-0.123, 0.05, 0.0, -0.0001)] == ["−12.3", "+5.0", "0.0", "0.0"]


# --- the whole command


def test_one_example_from_command_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, cache = tmp_path / "docs", tmp_path / "cache"
    command = ["--tables", "table3", "--examples", "1", "--workers", "1"]
    command += ["--output", str(output), "--cache", str(cache)]
    assert main(command) == 0
    data = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert [table["key"] for table in data["tables"]] == ["table3"]
    assert all(check["passed"] for check in data["checks"])
    text = (output / "README.md").read_text(encoding="utf-8")
    assert data["setting"]["weights"] in text
    assert "Table 3" in text
    assert "Table 1" not in text
    with (output / "results.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    arms = [entry for table in data["tables"] for panel in table["panels"] for entry in panel["arms"]]
    assert [line["right"] for line in lines] == [str(arm["right"]) for arm in arms]
    (file,) = cache.glob("*/rows.jsonl")
    before = file.read_bytes()
    monkeypatch.setattr("lab.reproduce.__main__.honesty", lambda model, seed: [])
    assert main(command) == 0
    assert file.read_bytes() == before
    assert main([*command, "--examples", "2", "--report-only"]) == 0
    assert file.read_bytes() == before
    assert "1 of 2 examples" in (output / "README.md").read_text(encoding="utf-8").partition("## Table 3")[2]


def test_every_arm_of_table_1_is_tried_by_the_honesty_checks() -> None:
    assert FIRST[0] == "dense"
    assert {arm.partition("@")[2] for arm in FIRST[1:]} == {"0.3"}
