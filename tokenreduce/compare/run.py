"""A comparison from its settings to its report: runs what is missing, keeps what is done."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenreduce.compare.arms import Arm
from tokenreduce.compare.checks import FIRED_WITHIN, check_fired
from tokenreduce.compare.cluster import run_on_ray
from tokenreduce.compare.identity import Say
from tokenreduce.compare.report import save_report
from tokenreduce.compare.settings import Settings
from tokenreduce.compare.store import Store, Unit
from tokenreduce.compare.summary import summarise
from tokenreduce.compare.tasks import Task
from tokenreduce.compare.worker import Done, Worker
from tokenreduce.config.yaml_source import parse_yaml
from tokenreduce.errors import TokenReduceError
from tokenreduce.pipeline import load_pipeline
from tokenreduce.testbed.embedded import EMBEDDED, unread

_log = logging.getLogger(__name__)

REPORT_EVERY = 60.0
"""Seconds between two reports while a comparison runs."""
Tell = Callable[[int, int], None]


def compare(
    settings: Settings,
    folder: Path,
    *,
    pictures: int = 2,
    ray: str | None = None,
    gpus_per_worker: int = 1,
    tell: Tell = lambda done, asked: None,
    say: Say = lambda line: None,
    warn: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run what `folder` does not hold yet, write the report, and return the summary.

    pictures: examples whose kept patches are drawn. ray: address of a Ray cluster to run on, `local` to start one.
    gpus_per_worker: that each worker on a cluster with GPUs reserves. tell: called with (units finished, units in all).
    say: told in a line of long work before it.
    warn: called with a line of warning before anything is measured. An arm that cannot run on the first example is named there
    and left out (not with `ray`, whose workers hold the models); later examples end the comparison where an arm refuses them.
    A comparison that is broken off leaves a folder that `compare` goes on with.
    Raises TokenReduceError where settings, data or an honesty check do not hold; NotFiredError after the report is written,
    where an arm reduced nothing.
    """
    task = settings.open_task()
    if ray is None:
        settings = runnable(settings, task, warn)
    store = Store.create_or_resume(folder, settings.to_dict(task, say))
    try:
        store.check_rows()
        units = store.missing(settings.examples)
        _log.info("%s: %d examples are done, %d to run", folder, len(store.finished), len(units))
        total, last = len(units) + len(store.finished), time.monotonic()
        tell(len(store.finished), total)
        try:
            for done in _results(settings, task, units, pictures, ray, gpus_per_worker):
                if done.checks:
                    store.save_checks(done.unit[0], [check.to_dict() for check in done.checks])
                if done.picture is not None:
                    store.save_picture(done.picture)
                store.append(done.rows)
                tell(len(store.finished), total)
                if sum(model == done.unit[0] for model, _ in store.finished) == FIRED_WITHIN:
                    check_fired(settings.arms, store.rows, finished=False)
                if time.monotonic() - last > REPORT_EVERY:
                    save_report(store, summarise(store, settings.arms))
                    last = time.monotonic()
        finally:
            if store.rows:
                summary = summarise(store, settings.arms)
                summary["report"] = str(save_report(store, summary))
        check_fired(settings.arms, store.rows, finished=True)
        return summary
    finally:
        store.close()


def runnable(settings: Settings, task: Task, warn: Callable[[str], None]) -> Settings:
    """`settings` without the arms that cannot run on the first example, of which `warn` is told.

    Raises the arm's error where it is the baseline, or where no arm but dense ones would be left.
    """
    item, refused = task.item(0), {}
    for model in settings.models:
        if model == EMBEDDED:
            for line in dict.fromkeys(filter(None, (unread(question) for question, _ in item.turns))):
                warn(f"warning: {line}")
        arms = [arm for arm in settings.arms if arm.model == model and arm.pipeline is not None]
        if not arms:
            continue
        bench = settings.bench(
            model, task
        )  # Given back: the worker's checks need a model that nothing was attached to.
        for arm in arms:
            error = bench.refusal(arm, item)
            if error is not None:
                refused[arm.name] = error
                if arm.name == settings.baseline:
                    raise type(error)(f"arm {arm.name}, the baseline, cannot run: {error}")
    left = tuple(arm for arm in settings.arms if arm.name not in refused)
    if refused and all(arm.pipeline is None for arm in left):
        name, error = next(iter(refused.items()))
        raise type(error)(f"arm {name}, example {item.id}: {error}")
    for name, error in refused.items():
        warn(f"arm {name} cannot run and is left out: {error}")
    return replace(settings, arms=left)


def _results(
    settings: Settings, task: Task, units: Sequence[Unit], pictures: int, ray: str | None, gpus_per_worker: int
) -> Iterator[Done]:
    if not units:
        return
    if ray is not None:
        yield from run_on_ray(settings, units, pictures, ray, gpus_per_worker)
        return
    worker = Worker(settings, task, pictures)
    for unit in units:
        yield worker.run(unit)


def report_only(folder: Path) -> dict[str, Any]:
    """Write the report of what `folder` holds, finished or not, without running anything; returns the summary, and under `report`
    the folder that it is in."""
    store = Store.read(folder)
    store.check_rows()
    held = folder / "settings.json"
    for place, arm in enumerate(store.settings["arms"]):
        for field in ("name", "method", "model", "pipeline"):
            dense = field == "pipeline" and field in arm and arm[field] is None
            if not dense and not isinstance(arm.get(field), str):
                raise TokenReduceError(
                    f"{held}: arms[{place}].{field}: expected text, got {arm.get(field)!r:.60}; restore the file from a copy, or "
                    "begin a new comparison"
                )
    names = [arm["name"] for arm in store.settings["arms"]]
    if store.settings["baseline"] not in names:
        raise TokenReduceError(
            f"{held}: baseline: {store.settings['baseline']!r:.60} is none of the arms: {', '.join(names)}; "
            "restore the file from a copy, or begin a new comparison"
        )
    summary = summarise(store, [stored_arm(arm) for arm in store.settings["arms"]])
    return {**summary, "report": str(save_report(store, summary))}


def stored_arm(arm: dict[str, Any]) -> Arm:
    """An arm from its settings."""
    text = arm["pipeline"]
    pipeline = None if text is None else load_pipeline(parse_yaml(text, arm["name"]).data)
    return Arm(arm["name"], arm["method"], arm["model"], pipeline)
