"""`tokenreduce models`"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tokenreduce.cli._output import print_json, print_table


def models_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List supported model families, with checkpoints known to fit.

    \b
    Example:
      tokenreduce models
    """
    from tokenreduce.plugins import offered_adapters

    found: list[dict[str, Any]] = [
        {
            "family": name,
            "origin": offer.origin,
            "model_types": list(offer.item.model_types),
            "checkpoints": list(offer.item.checkpoints),
            "notes": offer.item.notes,
        }
        for name, offer in offered_adapters().items()
    ]
    if as_json:
        print_json(found)
        return
    columns = ("family", "notes", "checkpoints", "origin")
    print_table(columns, [[_cell(entry[column]) for column in columns] for entry in found])


def _cell(value: str | list[str]) -> str:
    return (value if isinstance(value, str) else ", ".join(value)) or "-"
