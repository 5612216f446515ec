"""A/B comparison of arms (pipelines × budgets × models) on a task, with statistics and a report."""

from tokenreduce.compare.arms import BASELINE, Arm, expand
from tokenreduce.compare.run import compare
from tokenreduce.compare.settings import Settings, open_task
from tokenreduce.compare.store import Store
from tokenreduce.compare.tasks import Item, Task

__all__ = ["BASELINE", "Arm", "Item", "Settings", "Store", "Task", "compare", "expand", "open_task"]
