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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import RootModel

from tokenreduce.compare.identity import difference
from tokenreduce.compare.stored import ReportedSettings, StoredCheck, StoredPicture, StoredRow, StoredSettings
from tokenreduce.config.json_source import exists, parse_json, read_bytes, read_json, shown, validated
from tokenreduce.config.outputs import PART, unwritable, write_file
from tokenreduce.config.versions import FOLDER, too_new
from tokenreduce.errors import TokenReduceError

Row = dict[str, Any]
Unit = tuple[str, int]
"""A model and the index of an example: what is run, written and resumed as one."""
RESULT_BYTES = 8 * 2**30
"""Of results.jsonl, at most."""
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
            with writing(folder):
                for part in folder.glob(f".*{PART}"):  # What kills left; nobody else writes here now.
                    part.unlink()
            # A comparison that failed before its first result holds nothing that other settings could spoil.
            if held.is_file() and results.stat().st_size:
                there = _read_json(held)
                if "version" in settings and isinstance(there, dict) and "version" not in there:
                    raise TokenReduceError(
                        f"{shown(folder)} holds a comparison of an older tokenreduce; --report-only reports it, and to run one "
                        "give another --output"
                    )
                _refuse_newer(there, held)
                validated(StoredSettings, there, shown(held), TokenReduceError)
                _refuse_other(folder, there, settings)
            else:
                _write(held, json.dumps(settings, indent=1) + "\n")
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
        settings = _read_json(folder / SETTINGS)
        _refuse_newer(settings, folder / SETTINGS)
        validated(ReportedSettings, settings, shown(folder / SETTINGS), TokenReduceError)
        return cls(folder, settings, None)

    def check_rows(self) -> None:
        """TokenReduceError for a row that a report cannot read."""
        depth: dict[str, int] = {}
        for number, row in enumerate(self.rows, start=1):
            place = f"{shown(self.folder / RESULTS)}:{number}"
            validated(StoredRow, row, place, TokenReduceError)
            if {len(row["tokens"]), len(row["layer_flops"])} != {depth.setdefault(row["arm"], len(row["tokens"]))}:
                raise TokenReduceError(f"{place}: damaged: not as many layers as in other rows of {row['arm']}")

    def append(self, rows: Sequence[Row]) -> None:
        """Add the rows of one unit, one for each of its model's arms; they are on disk on return."""
        assert self._file is not None
        (unit,) = {(row["model"], row["index"]) for row in rows}
        if {row["arm"] for row in rows} != self._arms[unit[0]] or len(rows) != len(self._arms[unit[0]]):
            raise ValueError(f"example {unit} needs one row for each of {sorted(self._arms[unit[0]])}")
        data = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, self._good)
            raise TokenReduceError(
                f"{shown(self.folder / RESULTS)} cannot be written: {error.strerror or error}; all {len(self.finished)} examples "
                "finished before are safe: make room, and the same command goes on with them"
            ) from None
        self._good = os.fstat(self._file).st_size
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
        _write(file, json.dumps({**held, model: list(checks)}, indent=1) + "\n")

    def checks(self) -> list[dict[str, Any]]:
        """The checks of all models."""
        file = self.folder / CHECKS
        if not file.is_file():
            return []
        held = validated(RootModel[dict[str, list[StoredCheck]]], _read_json(file), shown(file), TokenReduceError)
        return [check.model_dump() for found in held.root.values() for check in found]

    def save_picture(self, picture: Mapping[str, Any]) -> None:
        """Keep the pictures of one example; see `tokenreduce.compare.patches`."""
        folder = self.folder / PICTURES
        with suppress(FileExistsError):
            folder.mkdir()
        place = list(self._arms).index(picture["model"])
        _write(folder / f"{place}-{picture['index']:06d}.json", json.dumps(picture))

    def pictures(self) -> list[dict[str, Any]]:
        """All of them, in order."""
        found = []
        for file in sorted((self.folder / PICTURES).glob("*.json")):
            picture = _read_json(file)
            validated(StoredPicture, picture, shown(file), TokenReduceError)
            found.append(picture)
        return found

    def close(self) -> None:
        """Give the folder free."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """The turn to write a report into `folder`: a comparison and others that report on it wait for each other."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        with suppress(OSError):  # Where a file system has no locks, every file is still whole.
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(path: Path, text: str) -> None:
    try:
        write_file(path, text)
    except OSError as error:
        raise unwritable(path, error) from None


def _read_rows(path: Path, arms: Mapping[str, set[str]]) -> tuple[list[Row], int]:
    """Rows of all whole units, and the bytes they take. What a kill left of the last unit is passed over."""
    data = read_bytes(path, TokenReduceError, RESULT_BYTES) if exists(path) else b""
    rows: list[Row] = []
    good = place = 0
    pending: list[Row] = []
    seen: set[Unit] = set()
    for number, line in enumerate(_lines(data), start=1):
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


def _lines(data: bytes) -> list[bytes]:
    """Lines with their ends; of the last one the end may be missing."""
    whole = data.split(b"\n")
    return [line + b"\n" for line in whole[:-1]] + [line for line in whole[-1:] if line]


def _parse(line: bytes, path: Path, number: int, last: bool) -> Row | None:
    """The row of a line; None for a last line that was cut off."""
    try:
        row = parse_json(line, f"{shown(path)}:{number}", TokenReduceError)
        named = isinstance(row, dict) and all(isinstance(row.get(name), str) for name in ("model", "arm"))
        if line.endswith(b"\n") and named and isinstance(row.get("index"), int):
            return row  # type: ignore[no-any-return]
    except TokenReduceError:
        pass
    if last:
        return None
    raise TokenReduceError(f"{path}:{number}: damaged: not a row of a comparison; give another --output")


def _foreign(folder: Path) -> bool:
    """Whether the folder holds other things than what a kill may leave of a comparison that has just begun."""
    left = [name for name in os.listdir(folder) if not name.endswith(".part")]
    return any(name != RESULTS or (folder / name).stat().st_size for name in left)


def _refuse_newer(settings: Any, file: Path) -> None:
    """TokenReduceError for settings that a newer tokenreduce wrote; those without a version are older than versions."""
    wrong = too_new(settings.get("version", 1), FOLDER) if isinstance(settings, dict) else ""
    if wrong:
        raise TokenReduceError(f"{shown(file)}: {wrong}")


def _lock(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise TokenReduceError(
            f"{folder} is in use by another comparison; wait for it or give another --output"
        ) from None


def _refuse_other(folder: Path, held: Any, asked: Mapping[str, Any]) -> None:
    """TokenReduceError naming what differs between two settings."""
    found = difference(held, {**asked})
    if found is None:
        return
    name, there, here = found
    if name == "arms":
        names = [", ".join(arm["name"] for arm in settings["arms"]) for settings in (held, asked)]
        there, here = names if names[0] != names[1] else ("other pipelines", "the same names")
    else:
        there, here = _brief(there), _brief(here)
    kind = name.partition(" ")[0]
    remedy = {
        "files": "put the file back to go on with it",
        "task": "put the data back, or ask the same, to go on with it",
        "code": "install that version of the code to go on with it",
        "environment": "go on with it where it was begun",
    }.get(kind, "the same settings to go on with it")
    raise TokenReduceError(
        f"{shown(folder)} holds a comparison with other settings: {name} is {there} there and {here} here; "
        f"give another --output, or {remedy}"
    )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _read_json(path: Path) -> Any:
    try:
        return read_json(path, TokenReduceError)
    except TokenReduceError as error:
        raise TokenReduceError(f"{error}; give another --output") from None
