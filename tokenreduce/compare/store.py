"""The folder of a comparison: settings, one line per finished example and arm, and what is made from them.

settings.json    everything that decides the results
results.jsonl    one line per example and arm; the lines of one example are written at once and synced
checks.json      what the honesty checks found
pictures/        example videos with their kept patches
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenreduce.errors import TokenReduceError

Row = dict[str, Any]
Unit = tuple[str, int]
"""A model and the index of an example: what is run, written and resumed as one."""
SETTINGS, RESULTS, CHECKS, PICTURES = "settings.json", "results.jsonl", "checks.json", "pictures"


class Store:
    """An open folder. rows: every finished line. finished: the units they make up.

    Make it with `create_or_resume`, or `read` to look only; `close` gives the folder free.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], file: int | None) -> None:
        self.folder, self.settings, self._file = folder, settings, file
        self._arms: dict[str, set[str]] = {}
        for arm in settings["arms"]:
            self._arms.setdefault(arm["model"], set()).add(arm["name"])
        self.rows, self._good = _read_rows(folder / RESULTS, self._arms)
        self.finished: set[Unit] = {(row["model"], row["index"]) for row in self.rows}

    @classmethod
    def create_or_resume(cls, folder: Path, settings: Mapping[str, Any]) -> Store:
        """A new folder, or an old one whose settings are equal. TokenReduceError otherwise; nothing is overwritten."""
        settings = json.loads(json.dumps(settings))
        held, results = folder / SETTINGS, folder / RESULTS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not held.is_file() and _foreign(folder):
                raise TokenReduceError(f"{folder} exists and holds no comparison; give another --output")
            file = os.open(results, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except (FileExistsError, NotADirectoryError):
            raise TokenReduceError(f"{folder} is not a folder; give another --output") from None
        except OSError as error:
            raise TokenReduceError(f"{folder} cannot be written: {error.strerror}") from None
        try:
            _lock(file, folder)
            # A comparison that failed before its first result holds nothing that other settings could spoil.
            if held.is_file() and results.stat().st_size:
                _refuse_other(folder, _read_json(held), settings)
            else:
                write_file(held, json.dumps(settings, indent=1) + "\n")
            store = cls(folder, settings, file)
        except BaseException:
            os.close(file)
            raise
        os.ftruncate(file, store._good)
        return store

    @classmethod
    def read(cls, folder: Path) -> Store:
        """A folder as it is, for a report of it."""
        if not (folder / SETTINGS).is_file():
            raise TokenReduceError(f"{folder} holds no comparison ({SETTINGS} is missing)")
        return cls(folder, _read_json(folder / SETTINGS), None)

    def append(self, rows: Sequence[Row]) -> None:
        """Add the rows of one unit, one for each of its model's arms; they are on disk on return."""
        assert self._file is not None
        (unit,) = {(row["model"], row["index"]) for row in rows}
        if {row["arm"] for row in rows} != self._arms[unit[0]] or len(rows) != len(self._arms[unit[0]]):
            raise ValueError(f"example {unit} needs one row for each of {sorted(self._arms[unit[0]])}")
        data = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)
        self.rows += rows
        self.finished.add(unit)

    def missing(self, examples: int) -> list[Unit]:
        """Units still to run, model by model."""
        units = [(model, index) for model in self._arms for index in range(examples)]
        return [unit for unit in units if unit not in self.finished]

    def save_checks(self, model: str, checks: Iterable[Mapping[str, Any]]) -> None:
        """Note the checks of one model."""
        file = self.folder / CHECKS
        held = _read_json(file) if file.is_file() else {}
        write_file(file, json.dumps({**held, model: list(checks)}, indent=1) + "\n")

    def checks(self) -> list[dict[str, Any]]:
        """The checks of all models."""
        file = self.folder / CHECKS
        return [check for found in _read_json(file).values() for check in found] if file.is_file() else []

    def save_picture(self, picture: Mapping[str, Any]) -> None:
        """Keep the pictures of one example; see `tokenreduce.compare.patches`."""
        folder = self.folder / PICTURES
        folder.mkdir(exist_ok=True)
        place = list(self._arms).index(picture["model"])
        write_file(folder / f"{place}-{picture['index']:06d}.json", json.dumps(picture))

    def pictures(self) -> list[dict[str, Any]]:
        """All of them, in order."""
        return [_read_json(file) for file in sorted((self.folder / PICTURES).glob("*.json"))]

    def close(self) -> None:
        """Give the folder free."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def write_file(path: Path, text: str) -> None:
    """Write a file so that whoever reads it finds the old one or the new one, whole."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _read_rows(path: Path, arms: Mapping[str, set[str]]) -> tuple[list[Row], int]:
    """Rows of all whole units, and the bytes they take. What a kill left of the last unit is passed over."""
    data = path.read_bytes() if path.is_file() else b""
    rows: list[Row] = []
    good = place = 0
    pending: list[Row] = []
    seen: set[Unit] = set()
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        row = _parse(line, path, number, last=place + len(line) == len(data))
        if row is None:
            break
        place += len(line)
        unit = (row["model"], row["index"])
        if (pending and (pending[0]["model"], pending[0]["index"]) != unit) or unit in seen:
            raise TokenReduceError(
                f"{path}:{number}: damaged: example {unit[1]} of {unit[0]} is out of place; give another --output"
            )
        pending.append(row)
        if {each["arm"] for each in pending} == arms.get(row["model"]):
            rows, pending, good = rows + pending, [], place
            seen.add(unit)
    return rows, good


def _parse(line: bytes, path: Path, number: int, last: bool) -> Row | None:
    """The row of a line; None for a last line that was cut off."""
    try:
        row = json.loads(line)
        if line.endswith(b"\n") and isinstance(row, dict) and {"model", "index", "arm"} <= row.keys():
            return row
    except ValueError:
        pass
    if last:
        return None
    raise TokenReduceError(f"{path}:{number}: damaged: not a row of a comparison; give another --output")


def _foreign(folder: Path) -> bool:
    """Whether the folder holds other things than what a kill may leave of a comparison that has just begun."""
    left = [name for name in os.listdir(folder) if not name.endswith(".part")]
    return any(name != RESULTS or (folder / name).stat().st_size for name in left)


def _lock(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise TokenReduceError(
            f"{folder} is in use by another comparison; wait for it or give another --output"
        ) from None


def _refuse_other(folder: Path, held: Any, asked: Mapping[str, Any]) -> None:
    """TokenReduceError naming what differs between two settings."""
    for name in {**asked, **held}:
        if held.get(name) != asked.get(name):
            there, here = (_brief(settings.get(name)) for settings in (held, asked))
            if name == "arms":
                there, here = (", ".join(arm["name"] for arm in settings.get(name, ())) for settings in (held, asked))
                if there == here:
                    there, here = "other pipelines", "the same names"
            raise TokenReduceError(
                f"{folder} holds a comparison with other settings: {name} is {there} there and {here} here; "
                "give another --output, or the same settings to go on with it"
            )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenReduceError(f"{path}: cannot be read ({error}); give another --output") from None
