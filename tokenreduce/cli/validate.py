"""`tokenreduce validate`"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tokenreduce.errors import plain


def validate_command(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="YAML files, or names of presets.")],
) -> None:
    """Check pipelines; say with line and column what is wrong.

    \b
    Example:
      tokenreduce validate framefusion my_pipeline.yaml
    """
    from tokenreduce.pipeline import pipeline_problems
    from tokenreduce.planning.feasibility import problems_without_model

    failed = False
    for file in files:
        problems = pipeline_problems(file) or problems_without_model(file)
        for problem in problems:
            where = "" if str(file) in problem else f"{file}: "
            print(f"error: {plain(where + problem)}", file=sys.stderr)
        if not problems:
            print(f"{plain(file)}: ok")
        failed = failed or bool(problems)
    if failed:
        raise typer.Exit(2)
