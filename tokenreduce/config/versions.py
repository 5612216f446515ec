"""Versions of what is written down and read again: pipelines, and the folders of comparisons and runs.

A number goes up when something that was written can no longer be read as it was meant. `docs/commands.md` says what is read.
"""

from __future__ import annotations

from typing import Any

PIPELINE = 1
"""Of a pipeline's fields, `version:` in its YAML; left out, it is 1."""
FOLDER = 1
"""Of the folder of a comparison or of a run, `version` in its settings.json or summary.json."""


def too_new(version: Any, known: int) -> str:
    """What to say of something of another version than `known` and those before it; "" for one of these."""
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        return f"expected a whole number from 1 to {known} as its version, got {version!r:.40}"
    if version > known:
        return f"of version {version}, which a newer tokenreduce wrote; this one reads up to version {known}: install a newer one"
    return ""
