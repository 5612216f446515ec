"""Tasks from files, and the folder of a comparison: what is read, what is refused, what survives a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.compare_tools import FAST, read_rows, read_summary, write_clip

from tokenreduce.cli import main
from tokenreduce.compare.files import open_folder
from tokenreduce.compare.settings import open_task
from tokenreduce.compare.store import Store
from tokenreduce.compare.tasks import prompt_with_options, read_choice, read_free
from tokenreduce.errors import MediaError, TokenReduceError

Captured = pytest.CaptureFixture[str]
SETTINGS = {"seed": 1, "arms": [{"name": "dense", "model": "m"}, {"name": "x", "model": "m"}]}


def write_questions(folder: Path, *rows: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_clip(folder / "a.mp4", frames=8)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def unit(index: int) -> list[dict[str, Any]]:
    return [{"model": "m", "index": index, "arm": arm, "right": True} for arm in ("dense", "x")]


# Questions files


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("b. green", "B"),
        ("(C)", "C"),
        ("The answer is A.", "A"),
        ("Option B", "B"),
        ("It is blue", "C"),
        ("red or blue", ""),
        ("D", ""),
        ("Because", ""),
        ("", ""),
    ],
)
def test_choices_are_read_by_letter_or_by_words(reply: str, letter: str) -> None:
    assert read_choice(reply, ("red", "green", "blue")) == letter


def test_free_answers_are_right_where_their_words_stand_in_a_row() -> None:
    assert read_free("There is a Red, car!", "red car") == "red car"
    assert read_free("a scarred car", "car") == "car"
    assert read_free("a scarred cart", "car") == "scarred cart"


def test_options_are_put_to_the_model() -> None:
    assert prompt_with_options("Which?", ["x", "y"]).splitlines()[1:3] == ["A. x", "B. y"]
    assert prompt_with_options("Which?", []) == "Which?"


def test_questions_are_shuffled_by_seed_and_read(tmp_path: Path) -> None:
    rows = [{"video": "a.mp4", "question": f"q{i}", "answer": "B", "options": ["x", "y"]} for i in range(6)]
    folder = write_questions(tmp_path / "v", *rows, "")
    task = open_task(str(folder), 3)
    assert task.size == 6
    asked = [task.item(i).turns[0][0].splitlines()[0] for i in range(6)]
    assert sorted(asked) == [f"q{i}" for i in range(6)]
    assert asked != sorted(asked)
    assert asked == [open_task(str(folder), 3).item(i).turns[0][0].splitlines()[0] for i in range(6)]
    item = task.item(0)
    assert (item.expected, item.read("y"), item.read("A"), item.options) == ("B", "B", "A", ("x", "y"))
    before = task.settings()
    write_questions(folder, *rows[:5], {**rows[5], "question": "another"})
    assert open_task(str(folder), 3).settings() != before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "questions.jsonl:2: not valid JSON"),
        ("[1]", "questions.jsonl:2: expected an object with video, question, answer, found list"),
        ({"video": "a.mp4", "question": "q"}, "questions.jsonl:2: the field 'answer' is missing"),
        ({"video": "b.mp4", "question": "q", "answer": "x"}, "questions.jsonl:2: video: no such file"),
        ({"video": "a.mp4", "question": "q", "answer": "!"}, "no word to look for"),
        (
            {"video": "a.mp4", "question": "q", "answer": "z", "options": ["x", "y"]},
            "'z' is neither one of the options",
        ),
        ({"video": "a.mp4", "question": "q", "answer": "x", "options": "xy"}, "options: expected a list, got 'xy'"),
        ({"video": "a.mp4", "question": "q", "answer": "x", "options": ["x", "x"]}, "2 to 26 different texts"),
    ],
)
def test_bad_questions_name_file_line_and_field(tmp_path: Path, row: Any, message: str) -> None:
    folder = write_questions(tmp_path / "v", {"video": "a.mp4", "question": "q", "answer": "x"}, row)
    with pytest.raises(MediaError) as caught:
        open_folder(folder, 1, None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_without_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"questions\.jsonl: cannot be read"):
        open_folder(tmp_path, 1, None)
    with pytest.raises(MediaError, match="no questions in it"):
        open_folder(write_questions(tmp_path / "v", ""), 1, None)


def test_compare_on_a_folder_of_videos(tmp_path: Path, capsys: Captured) -> None:
    hostile = 'Is it "<script>alert(1)</script>" | `red`?'
    folder = write_questions(
        tmp_path / "v",
        {"video": "a.mp4", "question": hostile, "answer": "no"},
        {"video": "a.mp4", "question": "Which?", "answer": "B", "options": ["x", "y"]},
    )
    command = ["compare", "--task", str(folder), "--arm", "random", "--budget", "0.8", "--max-frames", "2"]
    command += ["--new-tokens", "2", "--output", str(tmp_path / "out"), *FAST]
    assert main([*command, "--examples", "3"]) == 2
    assert "has 2 questions, 3 examples were asked for" in capsys.readouterr().err
    # An arm that cannot run is named before anything is measured, and the others run.
    assert main([*command, "--budget", "0.1", "--output", str(tmp_path / "some")]) == 0
    assert "arm random@0.1 cannot run and is left out" in capsys.readouterr().err
    assert main([*command, "--output", str(tmp_path / "all")]) == 0  # every question, where no number is given
    rows = read_rows(tmp_path / "all")
    assert len(rows) == 4
    assert {row["expected"] for row in rows} == {"no", "B"}
    assert read_summary(tmp_path / "all")["arms"][1]["grid"] == []


@pytest.mark.filterwarnings("ignore")  # those of `datasets` and what it imports are not ours
def test_a_data_set_on_disk(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    try:
        import datasets
    except ImportError:
        with pytest.raises(TokenReduceError, match="pip install datasets"):
            open_folder(tmp_path, 1, None)
        return
    clip = write_clip(tmp_path / "a.mp4", frames=8)
    columns = {"video": [str(clip)] * 2, "question": ["q", "r"], "answer": ["x", "B"], "options": [None, ["x", "y"]]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "plain"))
    with pytest.raises(MediaError, match="leads out of"):
        open_folder(tmp_path / "plain", 1, None)
    task = open_folder(tmp_path / "plain", 1, None, allow_outside=True)
    assert {task.item(i).expected for i in range(2)} == {"x", "B"}
    held = {"video": [{"bytes": clip.read_bytes(), "path": None}], "question": ["q"], "answer": ["x"]}
    features = datasets.Features(
        {
            "video": datasets.Video(decode=False),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    datasets.Dataset.from_dict(held, features=features).save_to_disk(str(tmp_path / "bytes"))
    item = open_folder(tmp_path / "bytes", 1, None).item(0)
    assert isinstance(item.video, Path)
    datasets.Dataset.from_dict({"video": ["a"]}).save_to_disk(str(tmp_path / "short"))
    with pytest.raises(MediaError, match="no column 'question'"):
        open_folder(tmp_path / "short", 1, None)


# The store


def test_lines_are_kept_and_units_are_whole(tmp_path: Path) -> None:
    store = Store.create_or_resume(tmp_path / "o", SETTINGS)
    store.append(unit(0))
    store.append(unit(2))
    assert store.missing(4) == [("m", 1), ("m", 3)]
    with pytest.raises(ValueError, match="one row for each"):
        store.append(unit(1)[:1])
    store.close()
    again = Store.create_or_resume(tmp_path / "o", SETTINGS)
    assert again.rows == unit(0) + unit(2)
    assert again.finished == {("m", 0), ("m", 2)}
    again.close()


def test_every_place_a_kill_may_cut_leaves_the_units_before(tmp_path: Path) -> None:
    store = Store.create_or_resume(tmp_path / "o", SETTINGS)
    for index in range(3):
        store.append(unit(index))
    store.close()
    file = tmp_path / "o" / "results.jsonl"
    data = file.read_bytes()
    size = len(data) // 3
    for cut in range(len(data)):
        file.write_bytes(data[:cut])
        store = Store.create_or_resume(tmp_path / "o", SETTINGS)
        assert store.finished == {("m", index) for index in range(cut // size)}
        assert file.read_bytes() == data[: cut // size * size]
        store.close()


def test_damage_in_the_middle_is_refused_and_left(tmp_path: Path) -> None:
    Store.create_or_resume(tmp_path / "o", SETTINGS).close()
    file = tmp_path / "o" / "results.jsonl"
    lines = [json.dumps(row) + "\n" for row in unit(0) + unit(1)]
    for damaged in ([lines[0], "{\n", *lines[1:]], [lines[0], *lines[2:]], lines + lines[:2]):
        file.write_text("".join(damaged))
        with pytest.raises(TokenReduceError, match=r"results\.jsonl:[0-9]: damaged"):
            Store.create_or_resume(tmp_path / "o", SETTINGS)
        assert file.read_text() == "".join(damaged)


def test_one_folder_has_one_writer(tmp_path: Path) -> None:
    store = Store.create_or_resume(tmp_path / "o", SETTINGS)
    with pytest.raises(TokenReduceError, match="in use by another comparison"):
        Store.create_or_resume(tmp_path / "o", SETTINGS)
    store.close()
    Store.create_or_resume(tmp_path / "o", SETTINGS).close()


def test_a_beginning_without_results_does_not_bind(tmp_path: Path) -> None:
    folder = tmp_path / "o"
    folder.mkdir()
    (folder / ".abc.part").write_text("{")
    (folder / "results.jsonl").touch()
    Store.create_or_resume(folder, SETTINGS).close()
    store = Store.create_or_resume(folder, {**SETTINGS, "seed": 2})
    store.append(unit(0))
    store.close()
    with pytest.raises(TokenReduceError, match="seed is 2 there and 1 here"):
        Store.create_or_resume(folder, SETTINGS)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    for folder in (tmp_path / "f", tmp_path / "f" / "g"):
        with pytest.raises(TokenReduceError, match="not a folder"):
            Store.create_or_resume(folder, SETTINGS)
