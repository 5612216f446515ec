"""The worker of the case `rivals` in an environment with kvpress."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from worker import Arm, Facts, serve

PRESSES = ("SnapKVPress", "StreamingLLMPress", "ExpectedAttentionPress")


def arms(model: Any, facts: Facts) -> dict[str, Arm]:
    """Presses that remove what is beyond the budget from the cache of each layer; as in kvpress's pipeline, off when decoding."""
    import kvpress

    presses = {name: getattr(kvpress, name)(compression_ratio=1 - facts["budget"]) for name in PRESSES}
    return {name: Arm(model, lambda video, press=press: press(model)) for name, press in presses.items()}


if __name__ == "__main__":
    serve(arms, kvpress=version("kvpress") if find_spec("kvpress") else "none")
