"""`tokenreduce presets`"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tokenreduce.cli._output import print_json, print_table


def presets_command(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[show NAME]", help="Print one preset's YAML. Default: list all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the presets, with the paper of each, or print one to start from.

    \b
    Examples:
      tokenreduce presets
      tokenreduce presets show framefusion > mine.yaml
    """
    from tokenreduce.errors import TokenReduceError, nearest
    from tokenreduce.plugins import offered_presets

    offers = offered_presets()
    match words or []:
        case []:
            _list(as_json)
        case ["show", name] if name in offers:
            print(offers[name].item.read_text(encoding="utf-8").rstrip())
        case ["show", name]:
            raise TokenReduceError(
                f"no preset is called '{name}'{nearest(name, offers)}; `tokenreduce presets` lists them"
            )
        case other:
            raise TokenReduceError(f"presets {' '.join(other)}: expected nothing, or `show NAME`")


def _list(as_json: bool) -> None:
    from tokenreduce.errors import PipelineError
    from tokenreduce.pipeline import load_pipeline
    from tokenreduce.plugins import offered_presets

    found: list[dict[str, Any]] = []
    for name, offer in offered_presets().items():
        entry: dict[str, Any] = {
            "name": name,
            "description": "",
            "paper": "",
            "budget": None,
            "stages": [],
            "origin": offer.origin,
        }
        try:
            pipeline = load_pipeline(name)
        except PipelineError as error:
            entry["description"] = f"cannot be used: {error}"
        else:
            entry["description"], entry["paper"] = pipeline.description, pipeline.source
            entry["budget"] = str(pipeline.budget or "")
            entry["stages"] = [stage.strategy for stage in pipeline.stages]
        found.append(entry)
    if as_json:
        print_json(found)
        return
    rows = [[e["name"], e["description"], e["paper"] or "-", ", ".join(e["stages"]), e["origin"]] for e in found]
    print_table(("name", "description", "paper", "stages", "origin"), rows)
