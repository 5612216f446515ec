"""Logs each applied stage. Turn it on with `logging.getLogger("tokenreduce_example_plugin").setLevel("INFO")`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenreduce.plugin import StageTrace

_log = logging.getLogger("tokenreduce_example_plugin")


def log_stage(event: StageTrace) -> None:
    """Write one line about what a stage did to one sequence."""
    _log.info("%s at %s: %d to %d tokens", event.strategy, event.site, event.before, event.after)
