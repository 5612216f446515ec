"""The answer at the top of a report is made from the numbers: other numbers, other words."""

from __future__ import annotations

import re
from typing import Any

from tokenreduce.compare.answer import answer, forewarning
from tokenreduce.compare.arms import Arm
from tokenreduce.compare.summary import summarise

PLAIN = {"vision": 0.1, "prefill": 1.0, "selector": 0.0, "turns": 0.0, "decode_per_token": 0.01}


class Held:
    """A store of rows: `right` tells, per arm, which of the examples are right; `flops`, what each arm costs."""

    def __init__(self, right: dict[str, list[bool]], flops: dict[str, float]) -> None:
        examples = len(next(iter(right.values())))
        self.settings: dict[str, Any] = {
            "tokenreduce": "0", "task": {"task": "t"}, "seed": 1, "baseline": "dense", "models": {}, "new_tokens": 1,
            "examples": examples,
        }  # fmt: skip
        self.rows = [
            {
                "arm": arm, "index": i, "right": ok, "agrees": None, "relative_tokens": flops[arm], "relative_flops": flops[arm],
                "flops": 1, "selector_flops": 0, "kv_bytes": 1, "input_tokens": 1, "new_tokens": 1, "tokens": [1],
                "layer_flops": [1], "seconds": PLAIN, "cell": {}, "said": "a" if ok else "b", "expected": "a", "chance": None,
                "id": str(i), "question": f"q{i}", "reply": "b",
            }
            for arm, answers in right.items()
            for i, ok in enumerate(answers)
        ]  # fmt: skip

    def checks(self) -> list[dict[str, Any]]:
        return []

    def pictures(self) -> list[dict[str, Any]]:
        return [{"index": 499}]


def said(right: dict[str, list[bool]], flops: dict[str, float]) -> str:
    arms = [Arm(name, name, "m", None) for name in right]
    return " ".join(answer(summarise(Held(right, flops), arms)))  # type: ignore[arg-type]


def rights(right: int, of: int) -> list[bool]:
    return [i < right for i in range(of)]


COSTS = {"dense": 1.0, "cheap": 0.2, "dear": 0.5, "bad": 0.1}


def test_the_cheapest_arm_that_keeps_the_accuracy_is_named() -> None:
    text = said(
        {"dense": rights(490, 500), "cheap": rights(489, 500), "dear": rights(490, 500), "bad": rights(100, 500)}, COSTS
    )
    assert "cheap keeps the accuracy of dense at the lowest cost: 20.0% of the FLOPs" in text
    assert "So do, at higher cost: dear." in text
    assert "Worse than dense: bad (−78.0 points)." in text
    assert "Not to be told apart by accuracy here: dear and cheap." in text
    assert "This task separates 3 of 6 pairs" in text
    assert "To settle" not in text


def test_questions_that_an_arm_lost_are_listed_those_with_a_picture_first() -> None:
    summary = summarise(
        Held({"dense": rights(500, 500), "bad": rights(100, 500)}, COSTS),
        [Arm(n, n, "m", None) for n in ("dense", "bad")],
    )  # type: ignore[arg-type]
    lost = summary["arms"][1]["lost"]
    assert [(one["index"], one["drawn"]) for one in lost] == [(499, True), *((i, False) for i in range(100, 111))]


def test_other_numbers_give_another_answer() -> None:
    text = said(
        {"dense": rights(490, 500), "cheap": rights(440, 500), "dear": rights(489, 500), "bad": rights(430, 500)}, COSTS
    )
    assert "dear keeps the accuracy of dense at the lowest cost" in text
    assert "Worse than dense: cheap (−10.0 points) and bad (−12.0 points)." in text


def test_too_few_examples_are_said_to_be_too_few() -> None:
    text = said({"dense": rights(20, 20), "cheap": rights(20, 20), "dear": rights(19, 20)}, COSTS)
    assert "No arm is shown to keep the accuracy of dense" in text
    assert "This task separates none of the 3 pairs" in text
    assert re.search("cheap about [0-9]+ more", text)


def test_what_can_be_decided_is_said_beforehand() -> None:
    assert forewarning(20, 1) == (
        "20 examples can exclude losses of 20.1% at best, and a difference can be significant from 7 answers (35.0%) on; "
        "to exclude 3% takes 163 examples or more."
    )
    assert "no difference can be significant" in forewarning(4, 1)
    assert "takes" not in forewarning(500, 2)
