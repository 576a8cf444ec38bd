"""Everyday requests, and the base's own answers to them: mixed into the demonstration's training data, they keep the base itself.

Knows: the requests, and how `everyday.jsonl` is written from the base's greedy answers: `python -m selectune.demo.everyday`.
Does not know: the invented manual, or how retention is measured (none of the requests stands among its prompts).
"""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).with_name("everyday.jsonl")
ANSWER_TOKENS = 96

EXPLAIN = (
    "how a bicycle stays upright", "what a library is for", "how bread rises", "why leaves change colour", "how a lock works",
    "what inflation means", "how rain forms", "why people dream", "what a password manager does", "how a thermometer works",
    "why the sea is salty", "what a verb is", "how bees make honey", "what a mortgage is", "how vaccines protect people",
    "why ships float", "what an atom is", "how a refrigerator cools", "what democracy means", "why exercise is useful",
    "how glass is made", "what a search engine does", "why we have seasons", "how a violin makes sound", "what an echo is",
)  # fmt: skip
ADVISE = (
    "keeping a house plant alive", "preparing for a job interview", "saving money on groceries", "reading more books",
    "running a good meeting", "cleaning a kitchen quickly", "staying calm before a speech", "choosing a used car",
    "packing a small suitcase", "taking better photographs", "writing a clear letter", "walking a young dog",
    "studying for a mathematics exam", "making new neighbours feel welcome", "growing tomatoes on a balcony",
    "repairing a flat bicycle tyre", "planning a birthday party for a child", "using less electricity at home",
    "keeping a diary", "cooking rice",
)  # fmt: skip
WRITE = (
    "a short story about a lighthouse", "a paragraph about a train journey", "a description of an old market",
    "a few lines about a winter morning", "a short letter to a grandparent", "a paragraph about learning to swim",
    "a description of a quiet village", "a short dialogue between a baker and a customer", "a paragraph about a lost umbrella",
    "a few lines about friendship", "a description of a mountain path", "a short story about a brave mouse",
    "a paragraph about a football match", "a few sentences about a rainy Sunday", "a short speech for a retiring teacher",
)  # fmt: skip
ASKED = (
    "Who was Isaac Newton?", "What is the largest animal on Earth?", "Where does coffee come from?", "What is 23 plus 58?",
    "If a pen costs two euros, what do six pens cost?", "Which language is spoken in Brazil?", "What happened in 1969 on the Moon?",
    "What is the plural of goose?", "How many minutes are there in three hours?", "Which is heavier, iron or wood?",
    "What is the chemical symbol for gold?", "Which continent is Egypt in?", "What do carpenters use a plane for?",
    "Why do cats purr?", "Which month comes after August?", "What is a haiku?", "What is the square root of 81?",
    "Name four musical instruments.", "What is a compass used for?", "Sort these words: pear, apple, fig.",
)  # fmt: skip


def requests() -> list[str]:
    """Return every request, in order."""
    return [
        *(f"Please explain {topic}." for topic in EXPLAIN),
        *(f"Give me some advice on {topic}." for topic in ADVISE),
        *(f"Write {wish}." for wish in WRITE),
        *ASKED,
    ]


def main() -> None:
    """Ask the base and write the file."""
    from selectune.data import Encoder, Message
    from selectune.evaluation import Scorer
    from selectune.models import load_base

    base = load_base("smollm2-135m-instruct")
    encoder = Encoder(base.tokenizer, 512)
    prompts = [encoder.prompt_ids((Message("user", request),)) for request in requests()]
    answers = Scorer(base.model, base.tokenizer, progress=True).generate(prompts, ANSWER_TOKENS)
    lines = [{"question": request, "answer": _whole(answer)} for request, answer in zip(requests(), answers, strict=True)]
    FILE.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8", newline="\n")


def _whole(answer: str) -> str:
    """Cut an answer that ran into the limit after its last whole sentence."""
    answer = answer.strip()
    ends = [answer.rfind(mark) for mark in (". ", ".\n", "! ", "? ")]
    return answer if answer.endswith((".", "!", "?")) or max(ends) < 20 else answer[: max(ends) + 1]


if __name__ == "__main__":
    main()
