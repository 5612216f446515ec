"""`tokenreduce compare`: arms, measures, resuming after a kill, and the honesty checks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compare_tools import FAST, read_rows, read_summary, write_clip

from tokenreduce.cli import main
from tokenreduce.compare import run as running
from tokenreduce.compare.arms import Arm, expand
from tokenreduce.compare.checks import check_fired, check_model, check_shuffled
from tokenreduce.compare.conversation import Reply, converse, kl_divergence
from tokenreduce.compare.measure import NOTHING, Bench
from tokenreduce.compare.memory import PeakMemory
from tokenreduce.compare.needles import Needles, needles
from tokenreduce.errors import BudgetError, NotFiredError, PipelineError, TokenReduceError
from tokenreduce.pipeline import load_pipeline

ROOT = Path(__file__).parents[2]
SCRIPT = "import sys; from tokenreduce.cli import main; sys.exit(main())"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'adapters'}", "OMP_NUM_THREADS": "1"}

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_clip(tmp_path_factory.mktemp("clips") / "square.mp4"))


def task(clip: str, kind: str = "one_hop", **options: Any) -> Needles:
    plain = {"frames": (4,), "positions": None, "size": 1, "placement": "edit", "seed": 1, "clips": (clip,)}
    return needles(kind=kind, **{**plain, **options})


@pytest.fixture(scope="module")
def bench(clip: str) -> Bench:
    arms = expand(["framefusion", "fastv", "streaming_llm"], ["0.5"], ["embedded"])
    return Bench("embedded", arms, 4, frame_times=False)


# Arms


def test_arms_are_pipelines_times_budgets_times_models(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: framefusion\nstages: [{strategy: random}]\n")
    arms = expand(["dense", "framefusion", str(tmp_path / "mine.yaml")], ["0.3", "0.5"], ["embedded", "other"])
    assert [arm.name for arm in arms[:5]] == [
        "dense@embedded",
        "framefusion@0.3@embedded",
        "framefusion@0.5@embedded",
        "framefusion-2@0.3@embedded",
        "framefusion-2@0.5@embedded",
    ]
    assert len(arms) == 10
    assert [arm.share for arm in arms[:3]] == [1.0, 0.3, 0.5]
    assert [arm.name for arm in expand(["framefusion"], ["0.3"], ["embedded"])] == ["dense", "framefusion"]


def test_arms_that_cannot_be_are_refused() -> None:
    with pytest.raises(PipelineError, match="framefusion"):
        expand(["framefusio"], [], ["embedded"])
    with pytest.raises(BudgetError):
        expand(["framefusion"], ["0"], ["embedded"])
    with pytest.raises(PipelineError, match="one budget twice"):
        expand(["framefusion"], ["0.3", "0.30"], ["embedded"])


# Measures


def test_answers_are_those_of_generate(bench: Bench, clip: str) -> None:
    item = task(clip).item(0)
    inputs = bench.prepare(item)
    for arm in bench.arms:
        outcome = bench.outcome(arm, inputs, [])
        with torch.inference_mode(), bench.attached(arm.pipeline or NOTHING):
            ids = bench.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :] if ids.shape[1] > 4 else ids[0]
        assert outcome.reply.ids == new.tolist(), arm.name


def test_a_second_turn_is_what_one_long_prompt_would_be(bench: Bench, clip: str) -> None:
    """Dense: the first answer and the second question on the cache give the logits of everything at once."""
    item = task(clip, "second_turn").item(0)
    assert len(item.turns) == 2
    inputs, turns = bench.prepare(item), bench.turns(item)
    text = bench.speaker.tokenizer.decode(turns[0])
    assert item.turns[0][1] in text
    assert item.turns[1][0].split()[-2] in text
    reply = bench.outcome(bench.arms[0], inputs, turns).reply
    with torch.inference_mode():
        ids = torch.cat([inputs["input_ids"], torch.tensor(turns)], 1)
        whole = bench.model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, logits_to_keep=1)
    torch.testing.assert_close(reply.logits[0], whole.logits[0, -1], atol=2e-5, rtol=1e-4)
    assert reply.turn > 0


def test_rows_say_what_each_arm_did(bench: Bench, clip: str) -> None:
    item = task(clip, "second_turn").item(3)
    bench.warm_up(item)
    rows, outcomes = bench.rows(item, 3)
    assert [row["arm"] for row in rows] == [arm.name for arm in bench.arms]
    dense, *reduced = rows
    assert dense["agrees"] is None
    assert dense["relative_flops"] == dense["relative_tokens"] == 1
    assert dense["flops"] == pytest.approx(sum(dense["layer_flops"]), rel=0.05)
    for row in rows:
        assert row["right"] == (row["said"] == row["expected"])
        assert min(row["seconds"][name] for name in ("vision", "prefill", "turns")) > 0
        assert row["peak_bytes"] >= row["growth_bytes"] >= 0
        assert len(row["tokens"]) == len(row["layer_flops"]) == 12
    for row in reduced:
        assert row["relative_tokens"] <= 0.5
        assert row["relative_flops"] < 1
        assert row["kv_bytes"] < dense["kv_bytes"]
        assert 0 < row["seconds"]["selector"] < row["seconds"]["prefill"]
        assert row["kl"] >= 0
        assert row["kl"] == kl_divergence(outcomes["dense"].reply, outcomes[row["arm"]].reply)
    json.dumps(rows)


def test_kl_ends_where_the_answers_part() -> None:
    one, two = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    p, q = one.double().softmax(0), two.double().softmax(0)
    expected = float((p * (p / q).log()).sum())
    left = Reply(ids=[0, 0, 0], logits=[one, one, one])
    assert kl_divergence(left, left) == 0
    forbidden = torch.tensor([2.0, -torch.inf])
    assert 0 < kl_divergence(left, Reply(ids=[0], logits=[forbidden])) < 1e4
    assert kl_divergence(Reply(ids=[0], logits=[forbidden]), Reply(ids=[0], logits=[forbidden])) == 0
    assert kl_divergence(left, Reply(ids=[1, 0], logits=[two, one])) == pytest.approx(expected)
    assert kl_divergence(left, Reply(ids=[0, 1, 0], logits=[one, two, two])) == pytest.approx(expected / 2)


def test_peak_sees_memory_that_is_gone_again() -> None:
    with PeakMemory(torch.device("cpu")) as peak:
        held = torch.ones(40 * 2**20, dtype=torch.uint8)
        time.sleep(0.05)
        del held
    assert 36 * 2**20 < peak.growth < 200 * 2**20
    assert peak.peak > peak.growth


def test_conditions_of_a_grid_come_in_turns(clip: str) -> None:
    grid = task(clip, frames=(4, 8), positions=3)
    cells = [grid.item(index).cell for index in range(6)]
    assert {(cell["frames"], cell["position"]) for cell in cells} == {(f, p) for f in (4, 8) for p in (0.0, 0.5, 1.0)}
    assert grid.item(5).video.shape[0] == cells[5]["frames"]  # type: ignore[union-attr]
    assert "position" not in task(clip, "count").item(0).cell


# The command


def test_compare_runs_and_goes_on(tmp_path: Path, clip: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, folder = tmp_path / "my.yaml", tmp_path / "out"
    mine.write_text("name: mine\nstages: [{strategy: random, seed: 3}]\n")
    command = [
        "compare",
        "--task",
        "needle",
        "--arm",
        "dense",
        "--arm",
        "framefusion",
        "--arm",
        str(mine),
        "--budget",
        "0.5",
    ]
    command += ["--examples", "3", "--clip", clip, "--output", str(folder), *FAST]
    assert main(command) == 0
    summary = read_summary(folder)
    assert [arm["name"] for arm in summary["arms"]] == ["dense", "framefusion", "mine"]
    assert summary["complete"]
    for arm in summary["arms"]:
        low, high = arm["interval"]
        assert low <= arm["accuracy"] <= high
        assert arm["examples"] == 3
    assert summary["arms"][2]["p_holm"] <= 1
    names = {check["name"] for check in summary["checks"]}
    assert {"dense equals the unattached model", "keep all equals dense", "shuffled labels give chance"} <= names
    assert all(check["passed"] for check in summary["checks"])
    assert {"report.html", "report.md", "settings.json"} <= {file.name for file in folder.iterdir()}
    assert "accuracy" in capsys.readouterr().out

    # The same again runs nothing; other settings are refused and change nothing.
    def never(*_: Any) -> None:
        raise AssertionError("an example that was finished is run again")

    monkeypatch.setattr(running, "Worker", never)
    before = (folder / "results.jsonl").read_bytes()
    assert main(command) == 0
    capsys.readouterr()
    held = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for other, named in (
        (["--seed", "2"], "seed is 1 there and 2 here"),
        (["--budget", "0.4"], "arms is"),
        (["--size", "2"], "task size is 1 there and 2 here"),
    ):
        assert main(command + other) == 2
        captured = capsys.readouterr()
        assert named in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == held
    assert (folder / "results.jsonl").read_bytes() == before


def test_a_killed_comparison_goes_on(tmp_path: Path, clip: str) -> None:
    folder = tmp_path / "out"
    command = [sys.executable, "-c", SCRIPT, "compare", "--arm", "random", "--budget", "0.5", "--examples", "16"]
    command += ["--clip", clip, "--output", str(folder), "--new-tokens", "2", *FAST]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    results = folder / "results.jsonl"
    deadline = time.monotonic() + 100
    while not (results.is_file() and results.read_bytes().count(b"\n") >= 6):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    whole = results.read_bytes().count(b"\n") // 2
    assert 3 <= whole < 16
    with results.open("ab") as file:
        file.write(b'{"model": "embedded", "index": 15, "ar')  # what a kill within a write leaves
    assert main(["compare", "--output", str(folder), "--report-only"]) == 0
    assert read_summary(folder)["examples"] == {"asked": 16, "finished": whole}
    assert not read_summary(folder)["complete"]
    before = results.read_bytes().splitlines()[: 2 * whole]

    assert main(command[3:]) == 0
    assert results.read_bytes().splitlines()[: 2 * whole] == before
    rows = read_rows(folder)
    assert sorted((row["index"], row["arm"]) for row in rows) == [
        (i, a) for i in range(16) for a in ("dense", "random")
    ]
    assert read_summary(folder)["complete"]


def test_folders_of_others_are_left_alone(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["compare", "--output", str(tmp_path), "--examples", "1"]) == 2
    assert "holds no comparison" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    assert main(["compare", "--output", str(tmp_path), "--report-only"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "one_hopp"], "did you mean 'one_hop'?"),
        (["--arm", "framefusin"], "framefusion"),
        (["--budget", "1.5"], "above 1"),
        (["--clip", "absent.mp4"], "absent.mp4: no such video"),
        (["--task", "absent"], "absent: no such task"),
        (["--baseline", "fastv"], "baseline fastv is none of the arms: dense, framefusion"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(
    tmp_path: Path, capsys: Captured, arguments: list[str], message: str
) -> None:
    assert main(["compare", "--output", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# Honesty


def test_an_arm_that_never_fires_is_an_error(tmp_path: Path, clip: str, capsys: Captured) -> None:
    idle = tmp_path / "idle.yaml"
    idle.write_text("name: idle\nstages: [{strategy: similarity_merge, threshold: 1.0, from: 10, until: 10}]\n")
    command = [
        "compare",
        "--arm",
        str(idle),
        "--examples",
        "2",
        "--clip",
        clip,
        "--output",
        str(tmp_path / "out"),
        *FAST,
    ]
    assert main(command) == 2
    assert "arm idle reduced nothing in 2 examples" in capsys.readouterr().err


def test_idle_arms_are_found_early_and_keep_all_is_not_one() -> None:
    idle = Arm("x", "x", "m", load_pipeline("random").with_budget(0.5))
    row = {"arm": "x", "fired": False}
    check_fired([idle], [row] * 2, finished=False)
    with pytest.raises(NotFiredError, match="3 examples"):
        check_fired([idle], [row] * 3, finished=False)
    check_fired([idle], [row, row, {**row, "fired": True}], finished=True)
    check_fired([Arm("x", "x", "m", load_pipeline("random").with_budget(1.0))], [row] * 5, finished=True)


def test_checks_hold_for_the_shipped_arms(bench: Bench, clip: str) -> None:
    checks = check_model(bench, task(clip).item(0))
    assert [check.passed for check in checks] == [True] * 5


def test_a_model_that_attaching_changes_is_found(bench: Bench, clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Bench.attached

    @contextmanager
    def leaky(self: Bench, pipeline: Any) -> Iterator[Any]:
        with honest(self, pipeline) as run:
            self.model.lm_head.weight.data[0] += 1e-3
            yield run

    held = bench.model.lm_head.weight.data.clone()
    monkeypatch.setattr(Bench, "attached", leaky)
    try:
        with pytest.raises(TokenReduceError, match="honesty check failed on embedded: dense equals the unattached"):
            check_model(bench, task(clip).item(0))
    finally:
        bench.model.lm_head.weight.data.copy_(held)


def test_shuffled_labels_find_answers_that_need_no_video() -> None:
    def rows(said: str) -> list[dict[str, Any]]:
        return [{"said": said or str(i % 10), "expected": str(i % 10), "chance": 0.1} for i in range(200)]

    assert check_shuffled("dense", rows(""), 1).passed
    assert "mean of all shuffles 0.100" in check_shuffled("dense", rows("3"), 1).detail


def test_converse_stops_at_the_end_token(bench: Bench, clip: str) -> None:
    inputs = bench.prepare(task(clip).item(0))
    first = converse(bench.model, bench.decoder, inputs, [], set(), 3)
    assert len(first.ids) == 3
    assert len(first.decode) == 2
    stopped = converse(bench.model, bench.decoder, inputs, [], {first.ids[0]}, 3)
    assert stopped.ids == first.ids[:1]
    assert stopped.decode == []
