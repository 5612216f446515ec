"""Foreign files of every kind, damaged at random places: each ends in success or in one line and exit code 2."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from support.attacks import BYTES, ODD, TEXTS, Attacks, mutants, write_json
from support.compare_tools import write_clip
from transformers import Qwen2Config, Qwen2ForCausalLM

from tokenreduce.cli import main
from tokenreduce.compare.files import open_folder
from tokenreduce.compare.run import report_only
from tokenreduce.errors import MediaError, TokenReduceError
from tokenreduce.models import load_model

SIZES = [30, pytest.param(600, marks=pytest.mark.slow)]
"""Cases in the quick and in the slow tests."""
CONFIG = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "hidden_act": "silu",
    "head_dim": 8, "max_position_embeddings": 4096, "torch_dtype": "float32", "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "layer_types": ["full_attention"] * 6,
}  # fmt: skip
NESTED = {
    "model_type": "llava_onevision",
    "text_config": CONFIG,
    "vision_config": {"num_hidden_layers": 2, "hidden_size": 32},
}


@pytest.mark.parametrize("number", SIZES)
@pytest.mark.parametrize("config", [CONFIG, NESTED], ids=["decoder", "composite"])
def test_config_json_for_a_plan(attacks: Attacks, tmp_path: Path, number: int, config: dict[str, Any]) -> None:
    file = tmp_path / "config.json"
    write_json(file, config)
    assert attacks.run("plan", "fastv", "--model", tmp_path, "--frames", 4, "--budget", 0.9)[0] == 0
    for damaged in mutants(config, number, 1):
        write_json(file, damaged)
        attacks.run("plan", "fastv", "--model", tmp_path, "--frames", 4, "--budget", 0.9, what=damaged)
    for text in TEXTS:
        file.write_text(text)
        attacks.run("plan", "fastv", "--model", file, what=text[:50])
    for data in BYTES:
        file.write_bytes(data)
        attacks.run("plan", "fastv", "--model", file, what=data[:50])
    attacks.done(number)


@pytest.mark.parametrize("number", [12, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.json", CONFIG),
        ("generation_config.json", {"eos_token_id": [1, 2], "pad_token_id": 0, "max_length": 20}),
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}),
    ],
)
def test_checkpoint_folders(attacks: Attacks, tmp_path: Path, number: int, name: str, data: dict[str, Any]) -> None:
    write_json(tmp_path / "config.json", CONFIG)
    for damaged in [*mutants(data, number, 2), *ODD]:
        write_json(tmp_path / name, damaged)
        attacks.count += 1
        with pytest.raises(TokenReduceError) as caught:  # It has no weights.
            load_model(tmp_path, device="cpu")
        assert "\n" not in str(caught.value), damaged
        attacks.refused += 1
    attacks.done(number)


@pytest.mark.parametrize("number", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_configs_beside_real_weights(attacks: Attacks, tmp_path: Path, number: int) -> None:
    """A damaged config.json either loads, or is refused in one line; it neither fills the memory nor ends in a traceback."""
    Qwen2ForCausalLM(Qwen2Config.from_dict(CONFIG)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert loading_fault(tmp_path) is None
    for damaged in [{**saved, "hidden_act": "nope"}, {**saved, "vocab_size": 10**8}, *mutants(saved, number, 6)]:
        write_json(tmp_path / "config.json", damaged)
        attacks.count += 1
        said = loading_fault(tmp_path)
        attacks.refused += said is not None
        assert said is None or "\n" not in said, damaged
    attacks.done(number)


def loading_fault(folder: Path) -> str | None:
    try:
        load_model(folder, device="cpu")
    except TokenReduceError as error:
        return str(error)
    return None


def test_a_text_model_cannot_be_asked_about_a_video(attacks: Attacks, tmp_path: Path) -> None:
    Qwen2ForCausalLM(Qwen2Config.from_dict(CONFIG)).save_pretrained(tmp_path / "model")
    code, err = attacks.run("run", "demo", "--model", tmp_path / "model", "--output", tmp_path / "o")
    assert code == 2
    assert "model" in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("number", SIZES)
def test_questions_files(attacks: Attacks, tmp_path: Path, number: int) -> None:
    write_clip(tmp_path / "a.mp4", frames=4)
    row = {"video": "a.mp4", "question": "Which?", "answer": "x", "options": ["x", "y"]}
    file = tmp_path / "questions.jsonl"
    texts = [json.dumps(damaged) for damaged in mutants(row, number, 3)] + list(TEXTS)
    for text in texts:
        file.write_text(json.dumps(row) + "\n" + text + "\n")
        attacks.count += 1
        said = refusal(tmp_path)
        if said is not None:
            attacks.refused += 1
            assert "\n" not in said, text
            assert "questions.jsonl:2" in said, text
    attacks.done(number)


def refusal(folder: Path) -> str | None:
    try:
        open_folder(folder, 1, None)
    except MediaError as error:
        return str(error)
    return None


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", frames=4)
    row = {"video": "a.mp4", "question": "one\u2028two\u0085three\x0c", "answer": "x"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert open_folder(tmp_path, 1, None).size == 1


def test_media_stay_in_their_folder(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "set"
    blobs = tmp_path / "hub" / "datasets--a--b" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0f"
    for each in (outside, folder, blobs, snapshot):
        each.mkdir(parents=True)
    write_clip(outside / "a.mp4", frames=4)
    (folder / "link.mp4").symlink_to(outside / "a.mp4")
    (folder / "in.mp4").write_bytes((outside / "a.mp4").read_bytes())
    (folder / "inlink.mp4").symlink_to("in.mp4")
    (blobs / "ab12").write_bytes((outside / "a.mp4").read_bytes())
    (snapshot / "a.mp4").symlink_to("../../blobs/ab12")
    (folder / "hub.mp4").symlink_to(blobs / "ab12")

    def ask(where: Path, video: str, allow: bool = False) -> None:
        (where / "questions.jsonl").write_text(json.dumps({"video": video, "question": "q", "answer": "x"}))
        open_folder(where, 1, None, allow)

    for video in ("link.mp4", "../outside/a.mp4", str(outside / "a.mp4"), "../set/../outside/a.mp4"):
        with pytest.raises(MediaError, match=r"questions\.jsonl:1: video: .* leads out of .* --allow-outside"):
            ask(folder, video)
        ask(folder, video, allow=True)
    inside = (
        (folder, "in.mp4"),
        (folder, "inlink.mp4"),
        (snapshot, "a.mp4"),
        (folder, "hub.mp4"),
        (folder, "./in.mp4"),
    )
    for where, video in inside:
        ask(where, video)


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "/dev/null", "folder", "dangling", "loop"])
def test_things_that_are_no_files(attacks: Attacks, tmp_path: Path, kind: str) -> None:
    thing = tmp_path / "thing"
    if kind == "fifo":
        os.mkfifo(thing)
    elif kind == "folder":
        thing.mkdir()
    else:
        thing.symlink_to({"dangling": "nowhere", "loop": "thing"}.get(kind, kind))
    (tmp_path / "config.json").symlink_to("thing")
    for arguments in (
        ("plan", "fastv", "--model", thing), ("plan", "fastv", "--model", tmp_path), ("plan", thing), ("validate", thing),
        ("run", thing, "--output", tmp_path / "o"), ("run", "demo", "--model", tmp_path, "--output", tmp_path / "o"),
        ("compare", "--task", thing, "--output", tmp_path / "o"), ("compare", "--output", thing, "--report-only"),
        ("compare", "--task", tmp_path, "--questions", thing, "--output", tmp_path / "o"),
        ("compare", "--clip", thing, "--output", tmp_path / "o"), ("compare", "--arm", thing, "--output", tmp_path / "o"),
    ):  # fmt: skip
        code, _ = attacks.run(*arguments)
        assert code == 2, arguments
    attacks.done(11)


NUMBERS = (
    *(
        "0",
        "-1",
        "1e9",
        "1000000000",
        "1" * 400,
        "nan",
        "inf",
        "-inf",
        "1e-320",
        "1e308",
        "0.5",
        "",
        "x",
        "١",
        "0x10",
        "1_000",
    ),
)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (("plan", "fastv", "--json"), ("--frames", "--budget", "--similar", "--memory", "--dtype")),
        (("run", "absent.mp4"), ("--fps", "--max-frames", "--repeats", "--new-tokens", "--budget")),
        (
            ("compare", "--task", "absent", "--output", "o"),
            ("--examples", "--seed", "--frames", "--positions", "--size", "--resolution", "--grid", "--max-frames", "--fps",
             "--new-tokens", "--pictures", "--budget", "--kind", "--placement", "--baseline", "--ray"),
        ),
    ],
    ids=["plan", "run", "compare"],
)  # fmt: skip
def test_numbers(attacks: Attacks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any, options: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for option in options:
        for value in NUMBERS:
            attacks.run(*command, f"{option}={value}")
    assert not (tmp_path / "o").exists()
    attacks.done(len(options) * len(NUMBERS))


NAMES = (
    *(
        "",
        ".",
        "..",
        "a\nb",
        "\x1b[31mred\x1b[0m",
        "\u202egpj.mp4",
        "~nosuchuser/a",
        "~",
        "a" * 300,
        "a/" * 2500,
        "a\x00b",
        "\udcff",
    ),
    *("-", "--", "'\"", "é.mp4", "con", "http://x/y", "file:///x", "%s{}"),
)


def test_names(attacks: Attacks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        for arguments in (
            ("validate", "--", name), ("plan", "--", name), ("plan", "fastv", f"--model={name}"),
            ("plan", "absent", f"--output={name}"), ("run", "--", name), ("run", "absent.mp4", f"--output={name}"),
            ("run", "absent.mp4", f"--pipeline={name}"), ("compare", f"--task={name or 'absent'}", "--output", "o"),
            ("compare", f"--output={name or 'o'}", "--report-only"), ("compare", f"--arm={name}", "--output", "o"),
            ("compare", f"--clip={name}", "--output", "o"), ("schema", f"--output={name}"),
        ):  # fmt: skip
            attacks.run(*arguments)
    attacks.done(12 * len(NAMES))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small comparison that has ended."""
    work = tmp_path_factory.mktemp("finished")
    clip = write_clip(work / "a.mp4")
    command = ["compare", "--arm", "random", "--budget", "0.5", "--examples", "2", "--frames", "4", "--new-tokens", "1"]
    assert main([*command, "--clip", str(clip), "--pictures", "1", "--output", str(work / "out")]) == 0
    return work / "out"


def test_many_reports_at_once(finished: Path) -> None:
    faults: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(3):
                report_only(finished)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert json.loads((finished / "summary.json").read_text())["complete"]
    assert not list(finished.glob("*.part")) + list(finished.glob(".*"))


@pytest.mark.parametrize("number", SIZES)
@pytest.mark.parametrize("name", ["settings.json", "checks.json", "results.jsonl", "pictures/0-000000.json"])
def test_stored_files_that_a_hand_damaged(attacks: Attacks, finished: Path, name: str, number: int) -> None:
    file = finished / name
    whole = file.read_text()
    try:
        if name.endswith("l"):
            lines = whole.splitlines()
            for damaged in mutants(json.loads(lines[0]), number, 4):
                file.write_text("\n".join([json.dumps(damaged), *lines[1:]]) + "\n")
                attacks.run("compare", "--report-only", "--output", finished, what=damaged)
        else:
            for damaged in mutants(json.loads(whole), number, 5):
                write_json(file, damaged)
                attacks.run("compare", "--report-only", "--output", finished, what=damaged)
            for text in TEXTS:
                file.write_text(text)
                attacks.run("compare", "--report-only", "--output", finished, what=text[:40])
    finally:
        file.write_text(whole)
    attacks.done(number)
