"""Honesty checks: what must be true of any comparison before its numbers are worth reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tokenreduce.compare.arms import Arm
from tokenreduce.compare.measure import NOTHING, Bench
from tokenreduce.compare.statistics import shuffled_agreement, wilson
from tokenreduce.compare.tasks import Item
from tokenreduce.errors import NotFiredError, TokenReduceError
from tokenreduce.pipeline import Pipeline, build
from tokenreduce.plugin_checks import flag

FIRED_WITHIN = 3
"""Examples in which every arm must have reduced something at least once."""
SURE = 0.999
"""Level of the interval in which shuffled labels must lie."""


@dataclass(frozen=True)
class Check:
    """What one honesty check found."""

    name: str
    """What must be true."""
    subject: str
    """The model, method or arm it was checked on."""
    passed: bool | None
    """Whether it holds; None where the check does not apply."""
    detail: str
    """The finding in words, with numbers."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@torch.inference_mode()
def check_model(bench: Bench, item: Item) -> list[Check]:
    """Dense equals the unattached model, before and after all arms have run; budget 1 equals dense, bit for bit.

    Call it before anything is attached to the model. Raises TokenReduceError where a check fails.
    """
    inputs = bench.prepare(item)

    def forward() -> Tensor:
        return bench.model(**inputs, use_cache=True, logits_to_keep=1).logits[0, -1]  # type: ignore[no-any-return]

    plain = forward()
    with bench.attached(NOTHING):
        dense = forward()
    checks = [_equal("dense equals the unattached model", bench.name, plain, dense)]
    methods: dict[str, Arm] = {arm.method: arm for arm in bench.arms if arm.pipeline is not None}
    for method, arm in methods.items():
        assert arm.pipeline is not None
        checks.append(_keep_all(bench, method, arm.pipeline, inputs, plain, forward))
    checks.append(_equal("the model is as before when all arms are off", bench.name, plain, forward()))
    failed = next((check for check in checks if check.passed is False), None)
    if failed is not None:
        raise TokenReduceError(
            f"honesty check failed on {bench.name}: {failed.name} ({failed.subject}): {failed.detail}"
        )
    return checks


def _equal(name: str, subject: str, one: Tensor, other: Tensor) -> Check:
    if torch.equal(one, other):
        return Check(name, subject, True, "all logits equal, bit for bit")
    if torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num()):
        return Check(name, subject, True, "all logits equal, bit for bit, NaN among them")
    if one.isnan().any() or other.isnan().any():
        return Check(
            name, subject, False, f"{int((one.isnan() != other.isnan()).sum())} logits are NaN in one of them alone"
        )
    return Check(name, subject, False, f"logits differ by up to {float((one - other).abs().max()):.3g}")


def _keep_all(
    bench: Bench, method: str, pipeline: Pipeline, inputs: Mapping[str, Any], plain: Tensor, forward: Any
) -> Check:
    name = "keep all equals dense"
    width = int(inputs["input_ids"].shape[1])
    if not any(flag(strategy, "needs_budget") for strategy in build(pipeline)):
        return Check(name, method, None, "no stage takes its count from a budget")
    with bench.attached(pipeline.with_budget(1)) as run:
        logits = forward()
        tokens = [int(layer.tokens[0]) for layer in run.trace.layers]
        fixed = [strategy.name for strategy in run.strategies if not flag(strategy, "needs_budget")]
        if run.vision:
            return Check(name, method, None, f"{run.vision[0].name} does not take its count from the budget")
    if all(count == width for count in tokens):
        return _equal(name, method, plain, logits)
    held = f"holds {min(tokens)} of {width} tokens at budget 1"
    if fixed:
        return Check(name, method, None, f"{held}, because {fixed[0]} does not take its count from the budget")
    return Check(name, method, False, held)


def check_fired(arms: Sequence[Arm], rows: Sequence[Mapping[str, Any]], finished: bool) -> None:
    """Raise NotFiredError for an arm that, in all its examples, left every layer with every token.

    finished: no more examples come; before that an arm has FIRED_WITHIN examples.
    """
    for arm in arms:
        if arm.pipeline is None or arm.share == 1.0:
            continue
        own = [row for row in rows if row["arm"] == arm.name]
        if not own or (len(own) < FIRED_WITHIN and not finished):
            continue
        if not any(row["fired"] for row in own):
            raise NotFiredError(
                f"arm {arm.name} reduced nothing in {len(own)} example{'s' * (len(own) > 1)}: every layer worked on every token; "
                "mend its stages or their thresholds, or leave it out"
            )


def check_finite(arm: str, rows: Sequence[Mapping[str, Any]]) -> list[Check]:
    """A failed check where logits of an arm were NaN or infinite in some example."""
    odd = [row["id"] for row in rows if not row.get("finite", True)]
    if not odd:
        return []
    which = f"{', '.join(map(str, odd[:5]))}{' …' if len(odd) > 5 else ''}"
    detail = f"NaN or infinite in {len(odd)} of {len(rows)} examples, which count as not right: {which}"
    return [Check("logits are finite", arm, False, detail)]


def check_shuffled(arm: str, rows: Sequence[Mapping[str, Any]], seed: int) -> Check:
    """The answers in `rows` against expected ones dealt out at random: what an arm gets that does not look."""
    examples = len(rows)
    right, mean = shuffled_agreement([row["said"] for row in rows], [row["expected"] for row in rows], seed)
    low, high = wilson(right, examples, SURE)
    chances = [row["chance"] for row in rows]
    guess = "" if None in chances else f"; a guess among the options: {sum(chances) / examples:.3f}"
    detail = (
        f"{right / examples:.3f} right with shuffled labels ({SURE:.1%} interval {low:.3f} to {high:.3f}), "
        f"mean of all shuffles {mean / examples:.3f}{guess}"
    )
    return Check("shuffled labels give chance", arm, low <= mean / examples <= high, detail)
