"""Writes ``results/engine.md`` from what the engine's benchmarks have measured.

python -m benchmarks.engine_table
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from selectune.reporting import charts

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5
"""Newest rounds whose ratios the table shows; older ones were older code."""


def read(name: str) -> dict[str, Any]:
    """Return one result file, or nothing where it was not measured."""
    file = RESULTS / name
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def ratio(cells: dict[str, Any], ours: str, peer: str, key: str = "tokens_per_second") -> str:
    """Return the median ratio over the newest rounds, and its spread."""
    theirs = {cell["round"]: cell[key] for cell in cells.get(peer, [])}
    pairs = [cell[key] / theirs[cell["round"]] for cell in cells.get(ours, []) if cell["round"] in theirs][-ROUNDS:]
    if not pairs:
        return "not measured"
    return f"**{statistics.median(pairs):.2f}** ({min(pairs):.2f} to {max(pairs):.2f})"


def median(cells: dict[str, Any], name: str, key: str) -> float:
    """Return the median over rounds."""
    return float(statistics.median(cell[key] for cell in cells[name]))


def headline(engine: dict[str, Any], time_to_quality: str, items: str) -> list[str]:
    """Return the table of the figures that were aimed at."""
    cells = engine["cells"]
    limit = engine["matrix_flops_per_second"] / 6 / 134_515_008
    share = [
        f"{median(cells, name, 'tokens_per_second') / limit:.0%}" for name in ("full", "full, two processes") if name in cells
    ]
    rows = [
        ("tokens/s, LoRA r16 all linear, ours / TRL + PEFT", "2.5", "4",
         f"{ratio(cells, 'LoRA', 'TRL LoRA')}; two processes {ratio(cells, 'LoRA, two processes', 'TRL LoRA')}"),
        ("tokens/s, full, ours / TRL full", "2.5", "4",
         f"{ratio(cells, 'full', 'TRL full')}; two processes {ratio(cells, 'full, two processes', 'TRL full')}"),
        ("tokens/s, 6 of 30 blocks, first epoch, ours / TRL LoRA", "6", "8",
         f"{ratio(cells, '6 of 30 blocks', 'TRL LoRA')}; two processes {ratio(cells, '6 of 30 blocks, two processes', 'TRL LoRA')}"),
        ("the same from the second epoch on (prefix cache)", "12", "20",
         f"{ratio(cells, '6 of 30 blocks, remembered', 'TRL LoRA')}; two processes "
         f"{ratio(cells, '6 of 30 blocks, remembered, two processes', 'TRL LoRA')}"),
        ("share of the measured matrix-product limit, full fine-tuning", "30 %", "50 %",
         f"{'; two processes '.join(share)} (of {limit:,.0f} tokens/s at 6 operations a parameter and token; prompt tokens never meet the head)"),
        ("time to quality, theirs / ours", "3", "6", time_to_quality),
        ("peak memory of 5 % selected weights / TRL LoRA", "0.6", "0.4", "; ".join(
            f"{name.split(': ')[1]} {ratio(cells, name, 'TRL LoRA', 'peak_memory_bytes')}" for name in cells if name.startswith("5 %"))),
        ("items/s, HellaSwag + MMLU, ours / lm-eval `hf` at its best", "4", "8", items),
    ]  # fmt: skip
    table = ["| what | at least | aim | measured: median of the newest five rounds (lowest to highest) |", "|---|---|---|---|"]
    return table + [f"| {what} | {least} | {aim} | {found} |" for what, least, aim, found in rows]


def cells_table(cells: dict[str, Any]) -> list[str]:
    """Return every cell's speed and memory."""
    table = ["| cell | tokens/s | spread | peak memory, GiB | trained weights |", "|---|---|---|---|---|"]
    for name, rounds in cells.items():
        speeds = [item["tokens_per_second"] for item in rounds]
        trained = rounds[0].get("trained")
        table.append(f"| {name} | {statistics.median(speeds):,.0f} | {min(speeds):,.0f} to {max(speeds):,.0f} "
                     f"| {median(cells, name, 'peak_memory_bytes') / 2**30:.1f} | {f'{trained:,}' if trained else ''} |")  # fmt: skip
    return table


def draw(name: str, points: list[list[float]], title: str, across: str) -> str:
    """Write a curve with the straight line through its ends, and return the line that shows it."""
    ends = [points[0], points[-1]]
    series = {"straight": [tuple(p) for p in ends], "measured": [tuple(p) for p in points]}
    (RESULTS / name).write_text(charts.standalone(charts.lines(series, title, across, "seconds")), encoding="utf-8")  # type: ignore[arg-type]
    return f"![{title}]({name})"


def quality_table(peers: dict[str, Any], ours: dict[str, Any], engine: dict[str, Any]) -> tuple[list[str], str]:
    """Return the runs, and the ratio of the times to the mark."""
    cells = engine["cells"]
    table = ["| run | one epoch's development loss | forgetting, nats | KL |", "|---|---|---|---|"]
    done = {name: cell for name, cell in peers.items() if name != "base"}
    for name, cell in done.items():
        table.append(f"| TRL {name} | {cell['dev_loss']:.4f} | {cell['forgetting']:+.3f} | {cell['kl']:.2f} |")
    best = min(done, key=lambda name: done[name]["dev_loss"])
    mark = done[best]["dev_loss"]
    peer = "TRL LoRA" if best.startswith("lora") else "TRL full"
    theirs = done[best]["steps"] * median(cells, peer, "seconds_per_step")
    each = median(cells, peer, "seconds_per_step")
    table += [
        "",
        f"The mark: {mark:.4f}, reached by TRL {best} in {theirs:,.0f} s ({done[best]['steps']} steps of {each:.2f} s).",
        "",
    ]
    table += [
        "| ours | reaches it at step | seconds a step | seconds | theirs / ours | forgetting at the end |",
        "|---|---|---|---|---|---|",
    ]
    ratios = []
    for name, run in ours.items():
        step = next((step for step, loss in run["dev_loss"] if loss <= mark), None)
        speed = run.get("cell", "LoRA")
        for kind in (speed, f"{speed}, two processes"):
            if kind not in cells:
                continue
            seconds = run["tokens_per_step"] / median(cells, kind, "tokens_per_second")
            lowest = min(loss for _, loss in run["dev_loss"])
            if step is None:
                table.append(f"| {name} | not reached ({lowest:.4f}) | {seconds:.2f} | | | {run['end']['forgetting']:+.3f} |")
                break
            ratios.append((theirs / (step * seconds), f"{name}, {'two processes' if 'two' in kind else 'one process'}"))
            table.append(f"| {name} ({'two processes' if 'two' in kind else 'one process'}) | {step} of {run['steps']} | {seconds:.2f} | "
                         f"{step * seconds:,.0f} | {ratios[-1][0]:.1f} | {run['end']['forgetting']:+.3f} |")  # fmt: skip
    said = f"**{max(ratios)[0]:.1f}** ({max(ratios)[1]})" if ratios else "not reached"
    return table, said


def together(tasks: list[dict[str, Any]]) -> str:
    """Return how many times as fast HellaSwag and MMLU with five examples are, one after the other."""
    wanted = [task for task in tasks if task["task"].startswith("HellaSwag") or task["task"].endswith("5-shot")]
    ours, theirs = (sum(task["items"] / statistics.median(task[whose]) for task in wanted) for whose in ("ours", "lm_eval"))
    items = " and ".join(f"{task['items']} of {task['task']}" for task in wanted)
    return f"**{theirs / ours:.1f}** ({items}); each: " if wanted else ""


def main() -> None:
    """Write the page."""
    engine, evaluation = read("engine.json"), read("evaluation_speed.json")
    quality, said = quality_table(read("time_to_quality_peers.json"), read("time_to_quality_ours.json"), engine)
    items = together(evaluation.get("tasks", []))
    items += "; ".join(f"{row['task']} **{row['ratio']:.1f}** ({min(row['ratios']):.1f} to {max(row['ratios']):.1f})"
                      for row in evaluation.get("tasks", []))  # fmt: skip
    notes = (RESULTS / "engine_notes.md").read_text(encoding="utf-8") if (RESULTS / "engine_notes.md").exists() else ""
    page = ["# The engine, measured", "", notes.strip(), "", "## Against the aims", "", *headline(engine, said, items or "not measured"), "",
            "## Every cell", "",
            *cells_table(engine["cells"]), "", "## Time to quality", "", *quality, ""]  # fmt: skip
    if "growth" in engine:
        tokens = draw("engine_tokens.svg", engine["growth"]["tokens"], "Seconds of a LoRA step by tokens in it", "tokens")
        blocks = draw(
            "engine_blocks.svg", engine["growth"]["blocks"], "Seconds of a step by trained blocks", "trained blocks of 30"
        )
        page += ["## Growth", "", tokens, "", blocks, ""]
    (RESULTS / "engine.md").write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
