"""The command line: help, exit codes, one-line errors, and the commands that need no model."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import tokenreduce
from tokenreduce import pipeline, plugins
from tokenreduce.cli import main
from tokenreduce.errors import PluginError, TokenReduceError

ROOT = Path(__file__).parents[2]
SCRIPT = "import sys; from tokenreduce.cli import main; sys.exit(main())"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'adapters'}"}

Captured = pytest.CaptureFixture[str]


def fails(capsys: Captured, *arguments: str) -> str:
    """The one line of an error with exit code 2; nothing on stdout."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").strip()


def test_help_has_examples_and_lists_the_commands(capsys: Captured) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "tokenreduce validate my_pipeline.yaml" in text
    for command in ("validate", "schema", "strategies", "models"):
        assert re.search(rf"^  {command} +\S", text, re.MULTILINE)
        assert main([command, "--help"]) == 0
        assert f"  tokenreduce {command}" in capsys.readouterr().out
    assert main([]) == 0
    assert capsys.readouterr().out == text


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tokenreduce {tokenreduce.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["strategis"], "No such command 'strategis'. Did you mean 'strategies'?"),
        (["--nope"], "No such option: --nope"),
        (["schema", "--nope"], "No such option: --nope"),
        (["schema", "extra"], "Got unexpected extra argument"),
        (["schema", "--output"], "requires an argument"),
        (["validate"], "Missing argument 'FILE...'"),
    ],
)
def test_wrong_usage_is_one_line(capsys: Captured, arguments: list[str], message: str) -> None:
    assert message in fails(capsys, *arguments)


def test_validate_says_ok_or_what_is_wrong(capsys: Captured, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("name: x\nstages:\n  - strategy: fastv\n")
    bad.write_text("name: x\nstages:\n  - strategy: fastv\n    keep: 1.5\n  - strategy: fastvv\n")
    assert main(["validate", str(good), "framefusion"]) == 0
    assert capsys.readouterr().out == f"{good}: ok\nframefusion: ok\n"
    assert main(["validate", str(bad), str(good), str(tmp_path / "none.yaml")]) == 2
    out, err = capsys.readouterr()
    assert out == f"{good}: ok\n"
    lines = err.splitlines()
    assert lines[0].startswith(f"error: {bad}:4:11: stages[0].keep: expected a whole number or a number of at most 1.0")
    assert lines[1].startswith(
        f"error: {bad}:5:15: stages[1].strategy: unknown strategy 'fastvv'; did you mean 'fastv'?"
    )
    assert lines[2] == f"error: {tmp_path}/none.yaml: no such file"
    assert len(lines) == 3


def test_schema_goes_to_stdout_or_to_a_new_file(capsys: Captured, tmp_path: Path) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    Draft202012Validator.check_schema(schema)
    assert "fastv" in schema["$defs"]
    file = tmp_path / "schema.json"
    assert main(["schema", "--output", str(file)]) == 0
    assert capsys.readouterr().out == f"wrote {file}\n"
    assert json.loads(file.read_text()) == schema


def test_schema_does_not_overwrite_unasked(capsys: Captured, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text("mine")
    assert fails(capsys, "schema", "--output", str(file)).endswith("--force to overwrite it")
    assert file.read_text() == "mine"
    assert main(["schema", "--output", str(file), "--force"]) == 0
    assert json.loads(file.read_text())["title"] == "Pipeline"


def test_schema_to_an_impossible_file(capsys: Captured, tmp_path: Path) -> None:
    assert "cannot be written: No such file or directory" in fails(capsys, "schema", "-o", str(tmp_path / "no" / "x"))
    assert "cannot be written: Is a directory" in fails(capsys, "schema", "--force", "-o", str(tmp_path))


def test_strategies_table_and_json(capsys: Captured) -> None:
    assert main(["strategies"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "description", "sites", "capabilities", "origin"]
    fastv = next(line for line in lines if line.startswith("fastv "))
    assert fastv.split()[-4:] == ["pre_attention", "attention,", "chooses_count", "tokenreduce"]
    assert "keep the vision tokens of highest attention" in fastv
    assert main(["strategies", "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found] == list(plugins.strategies())
    merge = next(entry for entry in found if entry["name"] == "similarity_merge")
    assert merge["sites"] == ["pre_attention", "pre_ffn", "kv"]
    assert "merges" in merge["capabilities"]
    assert all(entry["description"] for entry in found)


def test_models_table_and_json(capsys: Captured) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["family", "notes", "checkpoints", "origin"]
    assert main(["models", "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    families = [entry["family"] for entry in found]
    assert "qwen2_vl" in families
    assert [line.split()[0] for line in lines[1:]] == families


def test_presets_are_listed_with_their_paper_and_shown_to_start_from(capsys: Captured, tmp_path: Path) -> None:
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "description", "paper", "stages", "origin"]
    assert [line.split()[0] for line in lines[1:]] == list(plugins.presets())
    fastv = next(line for line in lines if line.startswith("fastv "))
    assert "Chen et al., An Image is Worth 1/2 Tokens After Layer 2 (2024)" in fastv
    assert main(["presets", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert found["framefusion"]["stages"] == ["similarity_merge", "importance_prune"]
    for name in plugins.presets():
        assert main(["presets", "show", name]) == 0
        mine = tmp_path / "mine.yaml"
        mine.write_text(capsys.readouterr().out)
        assert pipeline.load_pipeline(mine) == pipeline.load_pipeline(name)
    assert "did you mean 'fastv'" in fails(capsys, "presets", "show", "fastvv")
    assert "expected nothing, or `show NAME`" in fails(capsys, "presets", "fastv")


def test_a_strategy_given_as_a_pipeline_is_explained(capsys: Captured, tmp_path: Path) -> None:
    line = fails(capsys, "plan", "importance_prune")
    assert "'importance_prune' is a strategy; a pipeline is a list of them" in line
    assert "prune_only" in line
    one = re.findall(r"`([^`]*)`", line)
    (tmp_path / "mine.yaml").write_text("\n".join(one))
    assert main(["plan", str(tmp_path / "mine.yaml")]) == 0


def test_quiet_and_verbose(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def talk(_: object) -> list[str]:
        warnings.warn("to be heard", UserWarning, stacklevel=1)
        logging.getLogger("tokenreduce.talk").info("a detail of %s", "something")
        logging.getLogger("tokenreduce.talk").warning("odd")
        return []

    monkeypatch.setattr(pipeline, "pipeline_problems", talk)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for flags, heard in (
            ([], "warning: to be heard\nwarning: odd\n"),
            (["--quiet"], ""),
            (["--verbose"], "warning: to be heard\ninfo: a detail of something\nwarning: odd\n"),
        ):
            assert main(["validate", "x", *flags]) == 0
            assert capsys.readouterr() == ("x: ok\n", heard)
    logging.getLogger("tokenreduce.talk").warning("a library without handlers is not heard here")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (TokenReduceError("two\nlines"), 2, "error: two lines\n"),
        (PluginError("bad"), 2, "error: bad\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_and_interrupts_end_a_command_without_a_traceback(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail(_: object) -> list[str]:
        raise error

    monkeypatch.setattr(pipeline, "pipeline_problems", fail)
    assert main(["validate", "x"]) == code
    assert capsys.readouterr() == ("", message)


def test_warnings_are_one_line(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(_: object) -> list[str]:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("plugin 'x'\nis left out", plugins.PluginWarning, stacklevel=1)
        return []

    monkeypatch.setattr(pipeline, "pipeline_problems", warn)
    assert main(["validate", "x"]) == 0
    assert capsys.readouterr() == ("x: ok\n", "warning: plugin 'x' is left out\n")


def test_help_is_plain_and_does_not_load_torch() -> None:
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); {SCRIPT}"
    run = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, env=ENVIRONMENT)
    assert (run.returncode, run.stderr) == (0, "False\n")
    assert run.stdout.isascii()
    assert "\x1b" not in run.stdout


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-c", SCRIPT, "schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_an_interrupt_from_the_keyboard_exits_130(tmp_path: Path) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import signal, time, tokenreduce.pipeline as p\n"
        # A shell's background jobs, such as a CI's, are started with the signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait(_):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "p.pipeline_problems = wait\n" + SCRIPT + "\n"
    )
    command = [sys.executable, str(slow), "validate", "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b"interrupted\n"
        assert process.wait() == 130


def test_the_library_logs_what_it_loads_and_attaches(caplog: pytest.LogCaptureFixture) -> None:
    from support.tiny import layout, tiny_model

    with (
        caplog.at_level("DEBUG", logger="tokenreduce"),
        tokenreduce.reduce(tiny_model(), "fastv", budget=0.8, layout=layout()),
    ):
        pass
    assert "pipeline fastv is on a Qwen2ForCausalLM, adapter decoder" in caplog.messages
    library = [file for place in ("tokenreduce", "adapters") for file in (ROOT / place).rglob("*.py")]
    printing = [
        str(file) for file in library if "cli" not in file.parts and re.search(r"^\s*print\(", file.read_text(), re.M)
    ]
    assert printing == []
