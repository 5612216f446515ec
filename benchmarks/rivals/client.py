"""The workers of the case `rivals`, seen from the benchmark: what it needs for them, and processes that are killed at the end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).parent
NEEDS = {
    "kvpress": ("TOKENREDUCE_KVPRESS_PYTHON",),
    "FrameFusion": ("TOKENREDUCE_FRAMEFUSION_PYTHON", "TOKENREDUCE_FRAMEFUSION_CODE"),
}
"""Variables that name a rival's interpreter, and what else it needs."""
HELP = (
    "rivals: no other environment is named. Make some and name them: "
    "`python -m venv KV && KV/bin/pip install kvpress==0.5.5` and TOKENREDUCE_KVPRESS_PYTHON=KV/bin/python; "
    "`python -m venv FF && FF/bin/pip install torch transformers==4.45.2`, TOKENREDUCE_FRAMEFUSION_PYTHON=FF/bin/python, "
    "`git clone https://github.com/thu-nics/FrameFusion` and TOKENREDUCE_FRAMEFUSION_CODE=FrameFusion"
)


class WorkerError(RuntimeError):
    """A worker failed; the message has the end of what it printed."""


class Worker:
    """`python rivals/SCRIPT FOLDER DESCRIPTOR arguments`, as a context: it does not outlive it, whatever happens."""

    def __init__(self, name: str, python: str, script: str, folder: Path, *arguments: str, **environment: str) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        # What this interpreter finds in PYTHONPATH is not for others.
        inherited = {key: value for key, value in os.environ.items() if python == sys.executable or key != "PYTHONPATH"}
        source, target = os.pipe()
        self.answers = os.fdopen(source, encoding="utf-8")
        try:
            with self.log.open("w", encoding="utf-8") as log:
                self.process = subprocess.Popen(
                    [python, str(HERE / script), str(folder), str(target), *arguments],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(target,),
                    text=True,
                    env=inherited | environment,
                )
        except OSError as error:
            self.answers.close()
            raise WorkerError(f"{name}: {python} does not start: {error}") from None
        finally:
            os.close(target)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.answers.close()

    def hello(self) -> dict[str, Any]:
        """What it says when it is ready: its arms, its versions, the dense logits of the short video."""
        line = self.answers.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"it ended with code {self.process.wait()}"}
        if "error" in answer:
            log = self.log.read_text(encoding="utf-8", errors="replace").strip()
            raise WorkerError(f"{self.name}: {answer['error']}\n{log[-2000:]}")
        return answer

    def ask(self, **request: str) -> dict[str, Any]:
        """One prefill of a `video` by an `arm`, and decode steps after it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.hello()


def environments(variables: Mapping[str, str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Interpreter and arguments of each rival that is named, and why the others are left out."""
    named, left_out = {}, {}
    for rival, needed in NEEDS.items():
        missing = [variable for variable in needed if not variables.get(variable)]
        if missing:
            left_out[rival] = f"{' and '.join(missing)} not set"
            continue
        # Not resolved: a virtual environment's Python is a link, and is the environment's by its place.
        named[rival] = [str(Path(variables[variable]).expanduser().absolute()) for variable in needed]
        for variable, path in zip(needed, named[rival], strict=True):
            if not Path(path).exists():
                fail(f"rivals: {variable}: there is no {path}")
    return named, left_out


def fail(message: str) -> NoReturn:
    """End with code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)
