"""The command on sources: ``selectune domains``.

Knows: its options, and what a person is shown of a ranking. Does not know: how sources are ranked.
"""

from __future__ import annotations

from typing import Annotated

import typer


def domains(
    sources: Annotated[list[str], typer.Argument(help="Sources to choose among, each a file, folder, glob or hub id.", show_default=False)],
    target: Annotated[str, typer.Option(help="Records of the target; their answers are only needed with --steps.")],
    by: Annotated[
        str, typer.Option(help="Rankers, separated by commas: mmd, cosine, coral, energy, wasserstein, jensen_shannon, renyi, "
                               "kullback_leibler, text_embedding, sentence_embedding, task_embedding, few_shot, size; or all.")
    ] = "mmd",
    steps: Annotated[int, typer.Option(min=0, help="Also try: so many steps on each source, then on the target; Regret@k of each ranker.")] = 0,
    sample: Annotated[int, typer.Option(min=2, help="Records of each source that are looked at.")] = 500,
    base: Annotated[
        str, typer.Option(help="The base that reads: built-in name, folder, .gguf file or hub id.")
    ] = "smollm2-135m-instruct",
    column: Annotated[list[str] | None, typer.Option(help="A column's role: question=COLUMN. May be repeated.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:  # fmt: skip
    """Say which sources are worth training on before a target: nearest first.

    ```
    selectune domains medicine.jsonl law.jsonl code.jsonl --target my-task.jsonl
    selectune domains *.jsonl --target my-task.jsonl --by all --steps 60
    ```
    """
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from selectune.cli.options import pairs
    from selectune.examples.domains import rank_sources
    from selectune.examples.sources import NONE

    found = rank_sources(sources, target, by=by.split(","), steps=steps, sample=sample, base=base, columns=pairs(column), seed=seed,
                         quiet=quiet or as_json)  # fmt: skip
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1, ensure_ascii=False))
        return
    table = Table("source", "records", *(ranking.by for ranking in found.rankings), *(["after it"] if found.transfer else []))
    for name in found.rankings[0].order:
        cells = [f"{ranking.distances[name]:.4g} ({ranking.order.index(name) + 1})" for ranking in found.rankings]
        table.add_row(name, f"{found.records[name]:,}", *cells, *([f"{found.transfer[name]:.4f}"] if found.transfer else []))
    if found.transfer:
        table.add_row(NONE, "", *[""] * len(found.rankings), f"{found.transfer[NONE]:.4f}", end_section=True)
        for k in found.rankings[0].regret:
            table.add_row(f"Regret@{k}, %", "", *(f"{ranking.regret[k]:.2f}" for ranking in found.rankings), "")
        table.add_row("NDCG", "", *(f"{ranking.ndcg:.3f}" for ranking in found.rankings), "")
    Console().print(table)
    typer.echo(
        "A ranker's number is a distance, the rank in brackets; low is near." + "".join(f" {note}" for note in found.notes)
    )
