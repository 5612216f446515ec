"""torch.compile of a model with a pipeline attached: one graph for all layers, and the tokens and logits of the plain model."""

from __future__ import annotations

from test_faulty_strategies import *  # noqa: F403

