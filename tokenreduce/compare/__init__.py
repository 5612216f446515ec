"""A/B comparison of arms (pipelines × budgets × models) on a task, with paired statistics and a report.

`arms` and `tasks` (`needles`, `files`) say what is compared on what, `measure` runs one example through all arms, `run`
and `cluster` go through the examples, `store` keeps each as it ends, `summary`, `tables` and `report` say what came of
them; `prefill` reads off what one prefill did, and `side_by_side` is the small comparison of `tokenreduce run`. A user
calls the names below, the command line and the laboratory any module. It stands on testbed, models, engine, planning
and media, and none of them knows it.
"""

from tokenreduce.compare.arms import BASELINE, Arm, expand
from tokenreduce.compare.run import compare
from tokenreduce.compare.settings import Settings, open_task
from tokenreduce.compare.store import Store
from tokenreduce.compare.tasks import Item, Task

__all__ = ["BASELINE", "Arm", "Item", "Settings", "Store", "Task", "compare", "expand", "open_task"]
