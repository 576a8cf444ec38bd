"""How good is a model at the target?

Knows: the four metrics of a target (the right choice by log-likelihood, exact match of an extracted answer, classification with
macro-F1, the loss of the answers) and how one is chosen from the shape of the records. Prompts are those of training.
Does not know: files, training, or how two models are compared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from selectune.data.chat import Encoder
from selectune.data.records import Record
from selectune.errors import UserError
from selectune.run import Benchmark, Item

if TYPE_CHECKING:
    from selectune.evaluation.scorer import Scorer

SHORT_ANSWER_WORDS = 5
Answer = tuple[str, str, str, str]
"""Item id, prompt, what was wanted, what the model said."""


def choose_metric(records: Sequence[Record]) -> str:
    """Return the metric for records: by their kind; questions with mostly short or numbered answers are matched exactly."""
    kinds = {record.kind for record in records}
    if kinds == {"choice"}:
        return "choice"
    if kinds == {"classification"}:
        return "classification"
    if "text" in kinds:
        return "perplexity"
    short = sum(len(record.response.split()) <= SHORT_ANSWER_WORDS or "####" in record.response for record in records)
    return "exact_match" if short >= 0.8 * len(records) else "perplexity"


def evaluate_target(
    records: Sequence[Record],
    metric: str,
    scorer: Scorer,
    encoder: Encoder,
    max_new_tokens: int = 64,
    items: int | None = None,
) -> list[Benchmark]:
    """Measure a model on the target: the chosen metric, and the loss of the answers beside it.

    Args:
        records: the test set. metric: ``auto``, ``choice``, ``exact_match``, ``classification`` or ``perplexity``.
        items: at most so many, the first by hash of their content.

    Raises:
        UserError: the records have not what the metric needs, or none fits the context.
    """
    chosen = _first(records, items)
    metric = choose_metric(chosen) if metric == "auto" else metric
    if metric in ("choice", "classification") and not all(record.choices for record in chosen):
        raise UserError(f"the metric '{metric}' needs records with choices or labels", field="evaluation.target",
                        expected="auto, exact_match or perplexity for these records")  # fmt: skip
    results = []
    if metric in ("choice", "classification"):
        results.append(_by_choices(chosen, metric, scorer, encoder))
    elif metric == "exact_match":
        results.append(_by_match(chosen, scorer, encoder, max_new_tokens))
    losses = _answer_losses(chosen, scorer, encoder)
    if losses:
        name = "target" if metric == "perplexity" else "target/answer_nll"
        results.append(_benchmark(name, "answer_nll", False, losses, len(records)))
    if not results:
        raise UserError(f"none of the {len(chosen)} test records can be measured: each is longer than the context, or has no answer",
                        field="data.max_length", mend="raise it, or give shorter test records")  # fmt: skip
    return results


def sample_answers(records: Sequence[Record], scorer: Scorer, encoder: Encoder, count: int, max_new_tokens: int) -> list[Answer]:
    """Return a model's own answers to the first ``count`` questions (by hash)."""
    asked = [record for record in _first(records, None) if record.messages][:count]
    answers = scorer.generate([encoder.prompt_ids(record.prompt) for record in asked], max_new_tokens)
    return [
        (record.key[:12], record.question, record.response, answer.strip()) for record, answer in zip(asked, answers, strict=True)
    ]


def extract_answer(text: str) -> str:
    """Return the answer that a text ends in: after ``####``, in a box, after "answer is", or the whole, normalised.

    White space and case do not count, nor do commas in numbers, a currency sign, or a full stop at the end.
    """
    for pattern in (r"####\s*(.+)", r"\\boxed\{([^}]*)\}", r"(?i)\banswer(?:\s+is|:)\s*(.+)"):
        found = re.findall(pattern, text)
        if found:
            text = found[-1]
            break
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.strip().lower())
    return re.sub(r"\s+", " ", text).strip(" .$\"'")


def answers_match(said: str, wanted: str) -> bool:
    """Whether an answer is the wanted one: equal after extraction; for a number, the last one said."""
    said_answer, wanted_answer = extract_answer(said), extract_answer(wanted)
    if re.fullmatch(r"-?\d+(\.\d+)?", wanted_answer):
        numbers = re.findall(r"-?\d+(?:\.\d+)?", said_answer)
        return bool(numbers) and float(numbers[-1]) == float(wanted_answer)
    return said_answer == wanted_answer


def macro_f1(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the unweighted mean over the wanted labels of the harmonic mean of precision and recall."""
    from sklearn.metrics import f1_score

    return float(f1_score(wanted, predicted, labels=sorted(set(wanted)), average="macro", zero_division=0))


def _first(records: Sequence[Record], items: int | None) -> list[Record]:
    unique = {record.key: record for record in records}
    return [unique[key] for key in sorted(unique)][:items]


def _by_choices(records: list[Record], metric: str, scorer: Scorer, encoder: Encoder) -> Benchmark:
    """Choose by the log-likelihood of each choice as the answer, per character."""
    pairs, lengths = [], []
    for record in records:
        context = encoder.prompt_ids(record.prompt)
        for choice in record.choices:
            pairs.append((context, encoder.response_ids(choice)))
            lengths.append(len(choice))
    scores = scorer.loglikelihoods(pairs, lengths)
    items, start = [], 0
    for record in records:
        count = len(record.choices)
        normalised = [scores[start + i][0] / max(lengths[start + i], 1) for i in range(count)]
        start += count
        best = max(range(count), key=lambda index: normalised[index])
        items.append(_item(record, float(best == record.answer), record.choices[best], record.choices[record.answer]))
    if metric == "choice":
        return _benchmark("target", "accuracy_normalised", True, items, len(records))
    result = _benchmark("target", "macro_f1", True, items, len(records))
    result.score = macro_f1([item.prediction for item in items], [item.target for item in items])
    return result


def _by_match(records: list[Record], scorer: Scorer, encoder: Encoder, max_new_tokens: int) -> Benchmark:
    answers = scorer.generate([encoder.prompt_ids(record.prompt) for record in records], max_new_tokens)
    items = [
        _item(record, float(answers_match(answer, record.response)), answer, record.response)
        for record, answer in zip(records, answers, strict=True)
    ]
    return _benchmark("target", "exact_match", True, items, len(records))


def _answer_losses(records: list[Record], scorer: Scorer, encoder: Encoder) -> list[Item]:
    kept, texts = [], []
    for record in records:
        pieces = encoder.encode(record)
        if pieces:
            kept.append((record, pieces[0]))
            texts.append(pieces[0].input_ids)
    items = []
    for (record, piece), losses in zip(kept, scorer.token_nll(texts), strict=True):
        counted = [loss for loss, label in zip(losses, piece.labels[1:], strict=True) if label != -100]
        if record.choices:  # a choice is judged as it stands; whoever learnt to say more after it does not end there
            counted = counted[: len(encoder.response_ids(record.response))]
        items.append(_item(record, sum(counted) / len(counted), "", record.response))
    return items


def _item(record: Record, value: float, prediction: str, target: str) -> Item:
    return Item(id=record.key[:16], value=value, prediction=prediction[:400], target=target[:400],
                prompt=record.question[-400:])  # fmt: skip


def _benchmark(name: str, metric: str, higher: bool, items: list[Item], whole: int) -> Benchmark:
    score = sum(item.value for item in items) / max(len(items), 1)
    return Benchmark(name=name, role="target", metric=metric, higher_is_better=higher, items=items, score=score,
                     settings={"of": whole})  # fmt: skip
