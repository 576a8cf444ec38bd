"""Every way of laying questions out gives what the plain one gives, and is taken only where it does."""

import pytest
import torch

from selectune.evaluation.engine import END_TO_END, PLAIN, SIDE_BY_SIDE, Engine
from selectune.evaluation.rows import Question, by_prefix, questions_of
from selectune.models import attention_of_choices
from selectune.models.attention_of_choices import _blocks
from selectune.models.products import fast_fp32_products
from tests.tiny import ARCHITECTURES, tiny


def few_shot(shared=40, seed=0):
    """Two subjects with a beginning of their own each, six questions of four choices behind either."""
    generator = torch.Generator().manual_seed(seed)

    def text(length):
        return torch.randint(3, 250, (length,), generator=generator).tolist()

    pairs = []
    for _ in range(2):
        start = text(shared)
        for number in range(6):
            context = start + text(3 + number)
            pairs += [(context, text(1 + (number + choice) % 3)) for choice in range(4)]
    return dict(enumerate(pairs))


def totals(engine, pairs):
    found = dict.fromkeys(pairs, 0.0)
    for forward in engine.predict(questions_of(pairs)):
        batch = forward()
        for owner, value in zip(batch.owners, batch.values, strict=True):
            found[owner] += value
    return torch.tensor(list(found.values()))


@pytest.mark.parametrize("row_tokens", [64, 2048])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ways_agree(architecture, row_tokens):
    engine = Engine(tiny(architecture), False, row_tokens)
    assert engine.way == (SIDE_BY_SIDE if architecture == "gemma2" else END_TO_END)
    fast = totals(engine, few_shot())
    engine.way = PLAIN
    assert torch.allclose(fast, totals(engine, few_shot()), atol=1e-3)


def test_sliding_windows():
    """Questions that fit in the window share a row; the others are left to the model's own mask."""
    model = tiny("mistral", sliding_window=48)
    engine = Engine(model, False, 2048)
    assert engine.way == END_TO_END and engine.fits(48) and not engine.fits(49)
    pairs = few_shot()
    assert any(engine.fits(question.reach) != engine.fits(40) for question in questions_of(pairs))
    for (context, continuation), total in zip(pairs.values(), totals(engine, pairs), strict=True):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([[*context, *continuation]]), use_cache=False).logits[0].log_softmax(-1)
        alone = scores[len(context) - 1 : -1].gather(-1, torch.tensor(continuation)[:, None]).sum()
        assert total == pytest.approx(alone.item(), abs=1e-3)


def test_wrong_attention_is_not_taken(monkeypatch):
    def blind(begin, lengths):
        for block in _blocks(begin, lengths):
            block.added.zero_()
            yield block

    monkeypatch.setattr(attention_of_choices, "_blocks", blind)
    assert Engine(tiny("llama"), False, 2048).way == SIDE_BY_SIDE


def test_positions_that_depend_on_the_row():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert Engine(tiny("llama", rope_parameters=rope), False, 2048).way == PLAIN


def test_shared_beginnings_are_found():
    groups = {tuple(prefix): members for prefix, members in by_prefix(questions_of(few_shot(200)))}
    assert sorted(map(len, groups)) == [200, 200]
    assert all(len(members) == 6 and all(q.shared == 200 for q in members) for members in groups.values())
    assert [len(prefix) for prefix, _ in by_prefix(questions_of(few_shot(8)))] == [0]


def test_a_context_keeps_a_token_of_its_own():
    questions = [Question(list(range(300)) + [number] * (number > 0), {number: [5]}) for number in range(4)]
    groups = by_prefix(questions)
    assert sum(len(members) for _, members in groups) == 4
    for prefix, members in groups:
        assert all(len(question.context) > len(prefix) and question.context[: len(prefix)] == prefix for question in members)


def test_a_small_family_inside_a_large_one():
    common = [1] * 20
    contexts = [[*common, 2 + subject, *[9] * 400, 20 + number] for subject in range(3) for number in range(5)]
    groups = by_prefix([Question(context, {number: [5]}) for number, context in enumerate(contexts)])
    assert sorted(len(prefix) for prefix, _ in groups) == [421, 421, 421]


def test_long_contexts_are_cut_into_blocks():
    """Masks of blocks together are the dense mask."""
    lengths, size = [600, 3, 0, 7], 610
    part = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    order = torch.arange(size)
    expected = (order[None] <= order[:, None]) & ((part[None] == part[:, None]) | (part[None] == 0))
    found = torch.zeros(size, size, dtype=torch.bool)
    for block in _blocks(50, lengths):
        rows = slice(block.start - 50, block.stop - 50)
        found[rows, : block.first - 50] = True
        found[rows, block.first - 50 : block.stop - 50] = block.added == 0
    assert torch.equal(found, expected)


def test_fast_products_are_exact_and_leave_no_trace():
    left, right = torch.randn(100, 300), torch.randn(200, 300)
    before = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None)
    with fast_fp32_products():
        found = left @ right.T
    assert getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None) == before
    exact = left.double() @ right.double().T
    assert (found - exact).norm() < 2e-6 * exact.norm()
