"""Drift: conversations are compared many at a time and do not see each other; what is known of the base is not read again."""

import pytest

from selectune.data import Encoder
from selectune.data.records import Message, Record
from selectune.evaluation import forgetting
from tests.tiny import ARCHITECTURES, tiny, tokenizer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_conversations_of_a_row_do_not_see_each_other(architecture):
    base, specialist = tiny(architecture), tiny(architecture, seed=1)
    encoder = Encoder(tokenizer(), 1024)
    said = [(Message("user", f"Fault {i * 13}?"), Message("assistant", f"Lamp {i}, " * (i + 1))) for i in range(5)]
    pieces = [encoder.encode(Record("chat", messages))[0] for messages in said]
    rows = list(forgetting._rows(pieces, 120))
    assert [piece for row in rows for piece in row] == pieces and 1 < len(rows) < len(pieces)
    together = [pair for row in rows for pair in forgetting._compare(base, specialist, row, False)]
    alone = [forgetting._compare(base, specialist, [piece], False)[0] for piece in pieces]
    assert all(pair == pytest.approx(one, abs=1e-3) for pair, one in zip(together, alone, strict=True))
    assert all(divergence > 0.01 for divergence, _ in alone)
    assert forgetting._compare(base, base, pieces[:2], False) == [(0.0, 1.0)] * 2


def test_a_known_base_is_not_read_again():
    base, specialist = tiny("llama"), tiny("llama", seed=1)
    before, after = forgetting.measure_forgetting(base, specialist, tokenizer())
    known = [item.model_copy(update={"score": 7.0}) for item in before]
    again, same = forgetting.measure_forgetting(base, specialist, tokenizer(), known=known)
    assert again[0].score == 7.0 and same == after
