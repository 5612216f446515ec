"""`tokenreduce schema`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tokenreduce.cli._output import print_prose, write_new


def schema_command(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: stdout.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")] = False,
) -> None:
    """Print the JSON Schema of a pipeline, for editors.

    It includes the strategies of installed plugins.

    \b
    Example:
      tokenreduce schema --output pipeline.schema.json
    and as the first line of a pipeline:
      # yaml-language-server: $schema=./pipeline.schema.json
    """
    from tokenreduce.pipeline import pipeline_schema

    text = json.dumps(pipeline_schema(), indent=2)
    if output is None:
        print(text)
    else:
        write_new(output, text + "\n", force=force)
        print_prose(f"wrote {output}")
