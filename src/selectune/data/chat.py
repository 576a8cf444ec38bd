"""Records into tokens: the base's chat template, with labels on responses only.

Knows: which tokens of a rendered conversation are the assistant's (its content and the end of its turn), found by rendering
the conversation turn by turn; what happens to records that are too long. Does not know: packing or training.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from selectune.data.records import Message, Record
from selectune.errors import UserError

IGNORE = -100


@dataclass(frozen=True)
class Encoded:
    """Tokens of one record; ``labels`` are the same tokens, or -100 where nothing is learnt; ``weight`` is that of their losses."""

    input_ids: list[int]
    labels: list[int]
    weight: float = 1.0


@dataclass
class Encoder:
    """Turns records into tokens.

    Args:
        tokenizer: with a chat template. max_length: tokens of the longest record.
        long_records: ``"split"`` raw text (conversations are truncated), ``"truncate"``, or ``"drop"``.
        system: put before conversations that have no system message.
    """

    tokenizer: Any
    max_length: int = 512
    long_records: str = "split"
    system: str | None = None
    too_long: int = field(default=0, init=False)

    def prompt_ids(self, messages: tuple[Message, ...]) -> list[int]:
        """Return the tokens up to where the assistant begins to answer."""
        return self._ids(self._render(messages, generate=True))

    def response_ids(self, text: str) -> list[int]:
        """Return the tokens of an answer, without the end of the turn."""
        return self._ids(text)

    def encode(self, record: Record) -> list[Encoded]:
        """Return the record's tokens: several pieces for a long text, none when it is too long and dropped."""
        encoded = self._text(record) if record.kind == "text" else [self._conversation(record)]
        kept = []
        for piece in encoded:
            if len(piece.input_ids) > self.max_length:
                self.too_long += 1
                if self.long_records == "drop":
                    continue
                piece = Encoded(piece.input_ids[: self.max_length], piece.labels[: self.max_length])
            if any(label != IGNORE for label in piece.labels[1:]):
                kept.append(piece if record.weight == 1 else replace(piece, weight=record.weight))
        return kept

    def _conversation(self, record: Record) -> Encoded:
        ids: list[int] = []
        labels: list[int] = []
        done = ""
        for index, message in enumerate(record.messages):
            if message.role != "assistant":
                continue
            before = self._render(record.messages[:index], generate=True)
            after = self._render(record.messages[: index + 1], generate=False)
            if not before.startswith(done) or not after.startswith(before):
                raise UserError(
                    "the base's chat template changes earlier turns when a turn is added", file=record.source,
                    line=record.line, field="base", mend="use records with a single answer, or another chat template",
                )  # fmt: skip
            asked, answered = self._ids(before[len(done) :]), self._ids(after[len(before) :])
            ending = self._trailing(after[len(before) :], message.content)
            ids += asked + answered
            labels += [IGNORE] * len(asked) + answered[: len(answered) - ending] + [IGNORE] * ending
            done = after
        return Encoded(ids, labels)

    def _trailing(self, turn: str, content: str) -> int:
        """How many tokens after the end-of-turn token the template adds (ChatML's newline): nothing to learn."""
        end = self.tokenizer.eos_token or ""
        rest = turn.rpartition(end)[2] if end and end in turn else ""
        return len(self._ids(rest)) if rest and not rest.strip() else 0

    def _text(self, record: Record) -> list[Encoded]:
        ids = [*self._ids(record.text), self.tokenizer.eos_token_id]
        if self.long_records != "split":
            return [Encoded(ids, list(ids))]
        pieces = [ids[start : start + self.max_length] for start in range(0, len(ids), self.max_length)]
        return [Encoded(piece, list(piece)) for piece in pieces if len(piece) > 1]

    def _render(self, messages: tuple[Message, ...], generate: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        if self.system and (not turns or turns[0]["role"] != "system"):
            turns.insert(0, {"role": "system", "content": self.system})
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
