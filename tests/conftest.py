"""Shared by all tests: one thread, so that parallel workers do not fight over two cores."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
