"""The general benchmarks: lm-eval's tasks, from the hub or from local files, and the built-in probe.

Knows: which lm-eval task stands behind a benchmark's name and which of its metrics counts; items as values that can be paired.
Does not know: prompts and metrics, which are lm-eval's, and how texts are scored.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from selectune.errors import UserError, nearest
from selectune.evaluation.local_files import MMLU_CS, READERS
from selectune.evaluation.scorer import Scorer
from selectune.run import Benchmark, Item

Items = int | Mapping[str, int] | None
"""How many items of each benchmark: a number for all, numbers by name, or None for every item there is."""


@dataclass(frozen=True)
class _Source:
    tasks: tuple[str, ...]
    metric: str


BENCHMARKS: dict[str, _Source] = {
    "hellaswag": _Source(("hellaswag",), "acc_norm"),
    "gsm8k": _Source(("gsm8k",), "exact_match"),
    "mmlu_cs": _Source(tuple(f"mmlu_{subject}" for subject in MMLU_CS), "acc"),
    "mmlu_computer_science": _Source(("mmlu_college_computer_science",), "acc"),
    "arc_easy": _Source(("arc_easy",), "acc_norm"),
    "arc_challenge": _Source(("arc_challenge",), "acc_norm"),
    "piqa": _Source(("piqa",), "acc_norm"),
    "winogrande": _Source(("winogrande",), "acc"),
    "boolq": _Source(("boolq",), "acc"),
    "lambada": _Source(("lambada_openai",), "acc"),
}
_METRIC_NAMES = {"acc": "accuracy", "acc_norm": "accuracy_normalised", "exact_match": "exact_match"}
PROBE = "probe"


def known_benchmarks() -> list[str]:
    """Return the names that a recipe may use."""
    return [PROBE, *BENCHMARKS]


def check_names(names: list[str]) -> None:
    """Refuse an unknown benchmark, with the nearest known one."""
    for name in names:
        if name not in known_benchmarks():
            raise UserError(f"unknown benchmark '{name}'{nearest(name, known_benchmarks())}", field="evaluation.benchmarks",
                            expected=f"one of {', '.join(known_benchmarks())}")  # fmt: skip


def run_benchmarks(
    names: list[str], scorer: Scorer, data_root: str | None = None, items: Items = 200, few_shot: int | None = None
) -> list[Benchmark]:
    """Measure a model on some benchmarks.

    Args:
        names: see :func:`known_benchmarks`. data_root: folder with local copies; the hub when left out.
        items: at most this many of each benchmark (of each task of a group), the first in the file; or a number for some by
            name, and 200 for the others.
        few_shot: examples before each question; the task's own default when left out.

    Raises:
        UserError: an unknown benchmark, a missing local file, or no hub.
    """
    check_names([*names, *(items if isinstance(items, Mapping) else ())])
    results = []
    for name in names:
        results += _probe(scorer) if name == PROBE else _lm_eval(name, scorer, data_root, _limit(items, name), few_shot)
    return results


def _limit(items: Items, name: str) -> int | None:
    return items.get(name, 200) if isinstance(items, Mapping) else items


def benchmark_texts(names: list[str], data_root: str | None = None, items: Items = 200) -> dict[str, list[str]]:
    """Return what each benchmark asks, item by item, for the contamination check."""
    check_names(names)
    texts: dict[str, list[str]] = {}
    for name in names:
        if name == PROBE:
            from selectune.evaluation.probe import load_questions

            texts[name] = [f"{question.context} {question.choices[question.answer]}" for question in load_questions()]
            continue
        texts[name] = []
        for task in _load_tasks(BENCHMARKS[name], data_root, None):
            documents = list(task.test_docs() if task.has_test_docs() else task.validation_docs())
            for document in documents[: _limit(items, name)]:
                asked = task.doc_to_text(document)
                texts[name].append(asked if isinstance(asked, str) else str(document["sentence"]))  # WinoGrande asks by index
    return texts


def _lm_eval(name: str, scorer: Scorer, data_root: str | None, items: int | None, few_shot: int | None) -> list[Benchmark]:
    from lm_eval.evaluator import evaluate

    from selectune.evaluation.lm import ScorerLM

    source = BENCHMARKS[name]
    tasks = _load_tasks(source, data_root, few_shot)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):  # lm-eval's own bars; the scorer draws one
        found = evaluate(
            lm=ScorerLM(scorer),
            task_dict={"tasks": {task.config.task: task for task in tasks}, "groups": {}, "group_map": {}},
            limit=items,
            log_samples=True,
            bootstrap_iters=0,
        )
    results, answers, losses = [], [], []
    for task in tasks:
        samples = found["samples"][task.config.task]  # type: ignore[index]
        if any("filter" in sample for sample in samples) and source.metric == "exact_match":
            samples = [sample for sample in samples if sample["filter"] == "flexible-extract"]
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            results.append(_item(task.config.task, sample, source.metric))
            if name == "gsm8k":
                answers.append((sample, results[-1]))
            elif isinstance(sample["target"], int) and len(sample["arguments"]) > 1:
                losses.append(_loss_of_right_choice(scorer, sample, results[-1]))
    settings = {"tasks": list(source.tasks), "few_shot": tasks[0].config.num_fewshot or 0, "from": data_root or "hub"}
    benchmarks = [_benchmark(name, _METRIC_NAMES[source.metric], True, results, settings)]
    if answers:
        losses = _loss_of_solutions(scorer, answers)
    if losses:  # moves where accuracy lies on the floor
        benchmarks.append(_benchmark(f"{name}/answer_nll", "answer_nll", False, losses, settings))
    return benchmarks


def _item(task: str, sample: dict[str, Any], metric: str) -> Item:
    prompt = str(sample["arguments"][0][0]) if sample.get("arguments") else ""
    replies = sample["filtered_resps"]
    if metric == "exact_match":
        prediction = str(replies[0])
    else:
        scores = [float(reply[0] if isinstance(reply, list | tuple) else reply) for reply in replies]
        if metric == "acc_norm":
            scores = [score / len(arguments[1]) for score, arguments in zip(scores, sample["arguments"], strict=True)]
        prediction = str(max(range(len(scores)), key=lambda index: scores[index]))
    document = json.dumps(sample["doc"], sort_keys=True, default=str)
    return Item(
        id=f"{task}-{hashlib.sha256(document.encode()).hexdigest()[:12]}",
        value=float(sample[metric]),
        prediction=prediction[:200],
        target=str(sample["target"])[-200:],
        prompt=prompt[-400:],
    )


def _loss_of_right_choice(scorer: Scorer, sample: dict[str, Any], item: Item) -> Item:
    """Return the loss of the right choice, in nats per token, from the scores that decided the item."""
    right = int(sample["target"])
    tokens = len(scorer.tokenizer(str(sample["arguments"][right][1]), add_special_tokens=False)["input_ids"])
    return Item(
        id=item.id, value=-float(sample["filtered_resps"][right][0]) / max(tokens, 1), prompt=item.prompt, target=item.target
    )


def _loss_of_solutions(scorer: Scorer, answers: list[tuple[dict[str, Any], Item]]) -> list[Item]:
    """Return the loss of each written solution after its question alone, in nats per token."""
    pairs = []
    for sample, _ in answers:
        context = scorer.tokenizer(f"Question: {sample['doc']['question']}\nAnswer:")["input_ids"]
        pairs.append((context, scorer.tokenizer(f" {sample['doc']['answer']}", add_special_tokens=False)["input_ids"]))
    losses = scorer.token_nll([[*context, *answer] for context, answer in pairs])
    return [
        Item(id=item.id, value=sum(loss[-len(pair[1]) :]) / len(pair[1]), prompt=item.prompt, target=item.target)
        for (_, item), pair, loss in zip(answers, pairs, losses, strict=True)
    ]


def _benchmark(name: str, metric: str, higher: bool, items: list[Item], settings: dict[str, Any]) -> Benchmark:
    score = sum(item.value for item in items) / max(len(items), 1)
    return Benchmark(name=name, role="general", metric=metric, higher_is_better=higher, items=_distinct(items), score=score,
                     settings=settings)  # fmt: skip


def _distinct(items: list[Item]) -> list[Item]:
    """Number items that ask the same thing, so that ids are unique and stay paired."""
    seen: dict[str, int] = {}
    for item in items:
        seen[item.id] = seen.get(item.id, 0) + 1
        if seen[item.id] > 1:
            item.id = f"{item.id}-{seen[item.id]}"
    return items


def _probe(scorer: Scorer) -> list[Benchmark]:
    from selectune.evaluation.probe import load_questions

    questions = load_questions()
    pairs, lengths = [], []
    for question in questions:
        context = scorer.tokenizer(question.context)["input_ids"]
        for choice in question.choices:
            pairs.append((context, scorer.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]))
            lengths.append(len(choice))
    scores = scorer.loglikelihoods(pairs, lengths)
    items, areas, start = [], [], 0
    for question in questions:
        normalised = [scores[start + i][0] / max(lengths[start + i], 1) for i in range(len(question.choices))]
        start += len(question.choices)
        best = max(range(len(normalised)), key=lambda index: normalised[index])
        items.append(Item(id=question.id, value=float(best == question.answer), prediction=question.choices[best],
                          target=question.choices[question.answer], prompt=question.context[-400:]))  # fmt: skip
        areas.append(question.area)
    settings = {"few_shot": 0, "from": "built in"}
    benchmarks = [_benchmark(PROBE, "accuracy_normalised", True, items, settings)]
    for area in dict.fromkeys(areas):
        inside = [item for item, its in zip(items, areas, strict=True) if its == area]
        benchmarks.append(_benchmark(f"{PROBE}/{area}", "accuracy_normalised", True, inside, settings))
    return benchmarks


@cache
def _task_manager() -> Any:
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load_tasks(source: _Source, data_root: str | None, few_shot: int | None) -> list[Any]:
    """Load lm-eval's tasks, with the documents of local files where a data root is given."""
    import datasets

    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    tasks = []
    for name in source.tasks:
        spec: dict[str, Any] = {"task": name}
        if data_root is not None:
            rows = READERS[name](Path(data_root).expanduser())
            spec["custom_dataset"] = _documents(rows)
            if "train" not in rows:
                spec["training_split"] = None
            if "validation" not in rows:
                spec["validation_split"] = None
        try:
            task = next(iter(_task_manager().load([{"group": f"{name}_here", "task": [spec]}])["tasks"].values()))
        except UserError:
            raise
        except Exception as error:
            if data_root is not None:
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise UserError(f"benchmark '{name}' cannot be read from the hub ({reason})", field="evaluation.benchmarks",
                            mend="name local copies with --data-root, or use the built-in 'probe'") from None  # fmt: skip
        if few_shot is not None:
            task.set_config(key="num_fewshot", value=few_shot)
        task.set_fewshot_seed(seed=1234)
        tasks.append(task)
    return tasks


def _documents(rows: dict[str, list[dict[str, Any]]]) -> Any:
    import datasets

    def give(**_: Any) -> Any:
        return datasets.DatasetDict({split: datasets.Dataset.from_list(values) for split, values in rows.items()})

    return give
