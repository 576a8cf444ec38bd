"""Every way of laying questions out gives what the plain one gives, and is taken only where it does."""

import pytest
import torch

from selectune.evaluation import engine as module
from selectune.evaluation.engine import END_TO_END, OWN, PLAIN, SHORT, SIDE_BY_SIDE, Engine
from selectune.evaluation.rows import Question, by_prefix, questions_of
from selectune.models import attention_of_choices
from selectune.models.attention_of_choices import BLOCK, Row, _group
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
    def blind(length, members):
        group = _group(length, members)
        for block in group.blocks:
            block.added.zero_()
        return group

    monkeypatch.setattr(attention_of_choices, "_group", blind)
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


@pytest.mark.parametrize("before", [0, 5])
def test_attention_is_that_of_the_dense_mask(before):
    """Questions of several lengths, one of them longer than a block, behind a beginning or none."""
    parts, heads, shared, size = [[BLOCK + 90, 3, 0, 7], [9, 2], [11], [4, 3, 3], [60, 1]], 4, 2, 8
    tokens = sum(map(sum, parts))
    generator = torch.Generator().manual_seed(0)

    def states(count, length):
        return torch.randn(length, count, size, generator=generator)

    query, key, value = states(heads, tokens + 6), states(shared, tokens + 6), states(shared, tokens + 6)  # six fill up the row
    first = [states(shared, before).transpose(0, 1) for _ in range(2)]
    question = torch.cat([torch.full((sum(lengths),), number) for number, lengths in enumerate(parts)])
    part = torch.cat([torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)) for lengths in parts])
    seen = (part[None] == part[:, None]) | (part[None] == 0)
    seen = torch.tril(seen & (question[None] == question[:, None]))
    seen = torch.cat([torch.ones(tokens, before, dtype=torch.bool), seen], 1)
    keys, values = (
        torch.cat([x, y[:tokens].transpose(0, 1)], 1).repeat_interleave(2, 0) for x, y in zip(first, (key, value), strict=True)
    )
    scores = (query[:tokens].transpose(0, 1) @ keys.transpose(1, 2)).masked_fill(~seen, float("-inf"))
    expected = (scores.softmax(-1) @ values).transpose(0, 1)
    row = Row(parts, {0: tuple(first)} if before else None, keep=True)
    found = row.attend(0, query, key, value)
    assert found.shape == query.shape and torch.allclose(found[:tokens], expected, atol=1e-5)
    assert torch.equal(row.kept[0][0], key[:tokens].transpose(0, 1)) and torch.equal(
        row.kept[0][1], value[:tokens].transpose(0, 1)
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_blocks_are_taken_and_agree(architecture, dtype):
    model = tiny(architecture, dtype=dtype)
    short = Engine(model, dtype == torch.bfloat16, 2048)
    assert short._form == SHORT
    own = Engine(model, dtype == torch.bfloat16, 2048)
    own._take(OWN)
    pairs = few_shot()
    found, expected = totals(short, pairs), totals(own, pairs)
    assert (found - expected).norm() < (1e-5 if dtype == torch.float32 else 3e-2) * expected.norm()


def test_short_blocks_see_adapters():
    """Modules are called as they are, so an adapter around one counts."""
    from peft import LoraConfig, get_peft_model

    model = tiny("llama")
    before = totals(Engine(model, False, 2048), few_shot())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    engine = Engine(adapted.eval(), False, 2048)
    after = totals(engine, few_shot())
    engine.way = PLAIN
    assert engine._form == SHORT and not torch.allclose(before, after, atol=1e-2)
    assert torch.allclose(after, totals(engine, few_shot()), atol=1e-3)


def test_other_blocks_are_left_to_the_model():
    assert Engine(tiny("gpt2"), False, 2048)._form == OWN
    assert Engine(tiny("qwen3"), False, 2048)._form == OWN  # norms on queries and keys, which short blocks do not know


@pytest.mark.parametrize("words", [64, 4096])
@pytest.mark.parametrize("margins", [False, True])
def test_some_words_at_a_time(monkeypatch, words, margins):
    """Log-probabilities and leads are those of the whole vocabulary, also where one state is asked several words."""
    monkeypatch.setattr(module, "WORDS", words)
    model = tiny("llama")
    engine = Engine(model, False, 2048)
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    logits = engine.split.logits(states).detach()
    row, wanted = torch.tensor([0, 0, 1, 2, 3, 4]), torch.tensor([3, 300, int(logits[1].argmax()), 5, int(logits[3].argmax()), 7])
    with torch.no_grad():
        values, leads = engine._of_words(states, row, wanted, margins)
    chosen = logits[row, wanted]
    assert torch.allclose(values, logits.log_softmax(-1)[row, wanted], atol=1e-4)
    others = logits[row].scatter(1, wanted[:, None], float("-inf")).amax(-1)
    assert torch.equal(leads > 0, chosen > others) and (leads > 0).any()
    if margins:
        assert torch.allclose(leads, chosen - others, atol=1e-5)


def test_fast_products_are_exact_and_leave_no_trace():
    left, right = torch.randn(100, 300), torch.randn(200, 300)
    before = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None)
    with fast_fp32_products():
        found = left @ right.T
    assert getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None) == before
    exact = left.double() @ right.double().T
    assert (found - exact).norm() < 2e-6 * exact.norm()
