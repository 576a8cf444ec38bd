"""Path patching and the heads it finds: the faithful-if lines of the card, against whole prompts run again."""

import pytest
import torch

from selectune import catalogue
from selectune.data import Encoder, Message, Record
from selectune.errors import UserError
from selectune.meter import Meter
from selectune.models import load_base
from selectune.models.head import SplitModel
from selectune.parameters import Context
from selectune.parameters.factors.patching import (
    Pair,
    _instead,
    _look,
    _patched,
    effects,
    made_pairs,
    mlp_of,
    output_of,
    without_heads,
)
from tests.contracts.test_forms_and_parameters import RECORDS, logits, train_a_little
from tests.tiny import ARCHITECTURES, save_tiny

PAIR = Pair((5, 9, 17, 30, 21, 8), (5, 40, 31, 12, 77, 8), 60)


def context(base):
    return Context(base, Encoder(base.tokenizer, 128), RECORDS, [], torch.Generator().manual_seed(0), Meter("choose"), quiet=True)


def slow(base, head=None, mlp=None):
    """The answer's probability with one head's or MLP's last output patched, by running the whole prompt again with all other heads held."""
    model, blocks = base.model, base.anatomy.blocks
    seen = {}
    for which, prompt in (("own", PAIR.reference), ("other", PAIR.counterfactual)):
        handles = []
        for b, block in enumerate(blocks):
            layer, part = model.get_submodule(output_of(block)), model.get_submodule(mlp_of(model, block))
            handles.append(
                layer.register_forward_pre_hook(
                    lambda _, x, b=b, which=which: seen.__setitem__((which, "heads", b), x[0].clone())
                )
            )
            handles.append(
                part.register_forward_hook(lambda _, __, y, b=b, which=which: seen.__setitem__((which, "mlp", b), y.clone()))
            )
        model(input_ids=torch.tensor([prompt]))
        [handle.remove() for handle in handles]
    handles = []
    for b, block in enumerate(blocks):
        held = seen["own", "heads", b].clone()
        if head is not None and head[0] == b:
            span = slice(head[1] * block.head_size, (head[1] + 1) * block.head_size)
            held[0, -1, span] = seen["other", "heads", b][0, -1, span]
        handles.append(model.get_submodule(output_of(block)).register_forward_pre_hook(lambda _, x, held=held: (held,)))
        if mlp == b:
            theirs = seen["other", "mlp", b]

            def patch(_, __, y, theirs=theirs):
                y = y.clone()
                y.view(-1, 64)[-1] = theirs.view(-1, 64)[-1]
                return y

            handles.append(model.get_submodule(mlp_of(model, block)).register_forward_hook(patch))
    found = model(input_ids=torch.tensor([PAIR.reference])).logits[0, -1].softmax(-1)[PAIR.answer]
    [handle.remove() for handle in handles]
    return float(found)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_effects_are_those_of_running_whole_prompts_again(architecture, tiny_folders):
    base = load_base(tiny_folders[architecture])
    plain = slow(base)
    heads, mlps = effects(context(base), [PAIR])
    for block in range(4):
        for head in range(4):
            expected = (slow(base, head=(block, head)) - plain) / plain
            assert float(heads[block, head]) == pytest.approx(expected, rel=1e-2, abs=1e-4)
        assert float(mlps[block]) == pytest.approx((slow(base, mlp=block) - plain) / plain, rel=1e-2, abs=1e-4)
    assert heads.abs().min() > 1e-4


@torch.no_grad()
def test_the_same_prompt_has_no_effect_and_everything_patched_is_the_other_prompt(llama_folder):
    base = load_base(llama_folder)
    heads, mlps = effects(context(base), [Pair(PAIR.reference, PAIR.reference, 60)])
    assert heads.abs().max() < 1e-4 and mlps.abs().max() < 1e-4
    split = SplitModel(base.model)
    own, other = (_look(context(base), split, prompt, 60) for prompt in (PAIR.reference, PAIR.counterfactual))
    everything = [(b, h) for b in range(4) for h in [*range(4), None]]
    assert float(_patched(context(base), split, PAIR, own, other, [everything])) == pytest.approx(other.probability, rel=1e-3)
    assert other.probability != pytest.approx(own.probability, rel=1e-2)


def test_pairs_are_of_equal_length_and_end_alike(llama_folder):
    base = load_base(llama_folder)
    pairs = made_pairs(context(base), 6)
    assert len(pairs) == 6
    for pair in pairs:
        assert len(pair.reference) == len(pair.counterfactual) and pair.reference[-1] == pair.counterfactual[-1]
        assert pair.reference != pair.counterfactual
    with pytest.raises(UserError, match="3 and 2 tokens"):
        Pair((1, 2, 3), (1, 3), 0)


def test_pairs_come_from_a_file(llama_folder, tmp_path):
    base = load_base(llama_folder)
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"reference": "fault 3?", "counterfactual": "fault 4?", "answer": "lamp"}\n')
    assert catalogue.create("parameters", f"precise_sft:k=2,pairs={file}").select(context(base)).count() > 0
    for wrong, why in (
        ("nothing", "no pair"),
        ('{"reference": "a b c d", "counterfactual": "a", "answer": "x"}', ":1, .*17 and 11 tokens"),
    ):
        file.write_text(wrong)
        with pytest.raises(UserError, match=why):
            catalogue.create("parameters", f"precise_sft:pairs={file}").select(context(base))
    with pytest.raises(UserError, match="no such file"):
        catalogue.create("parameters", "precise_sft:pairs=/nowhere").select(context(base))


@pytest.mark.parametrize("key_value", ["any", "frozen"])
def test_a_head_is_its_slices_and_grouped_keys_train_as_said(key_value, llama_folder):
    base = load_base(llama_folder)
    method = catalogue.create("parameters", f"precise_sft:k=3,key_value={key_value}")
    selection = method.select(context(base))
    heads, _ = method.found(context(base))
    worst = sorted((float(heads[b, h]), b, h) for b in range(4) for h in range(4))[:3]
    size = 16
    for block in range(4):
        mine = [h for _, b, h in worst if b == block]
        rows = sorted(h * size + i for h in mine for i in range(size))
        groups = sorted({h // 2 for h in mine})
        shared = sorted(g * size + i for g in groups for i in range(size)) if key_value == "any" else []
        prefix = f"model.layers.{block}.self_attn"
        for name, form, lines in (
            ("q_proj", "rows", rows),
            ("o_proj", "columns", rows),
            ("k_proj", "rows", shared),
            ("v_proj", "rows", shared),
        ):
            part = selection.parts.get(f"{prefix}.{name}.weight")
            assert (part.index.tolist() if part else []) == lines
            assert part is None or part.form == form
    assert not any(".mlp." in name for name in selection.names())


@pytest.mark.parametrize("key_value", ["any", "frozen"])
@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_of_a_fused_matrix_a_heads_lines_are_those_of_its_query_key_and_value(architecture, key_value, tmp_path):
    base = load_base(save_tiny(architecture, tmp_path))
    method = catalogue.create("parameters", f"precise_sft:k=3,key_value={key_value}")
    selection, (heads, _) = method.select(context(base)), method.found(context(base))
    worst = sorted((float(heads[b, h]), b, h) for b in range(4) for h in range(4))[:3]
    for block in base.anatomy.blocks:
        mine = [h for _, b, h in worst if b == block.index]
        groups = {h * block.key_value_heads // 4 for h in mine} if key_value == "any" else set()
        begins = [(0, mine), (64, groups), (64 + 16 * block.key_value_heads, groups)]  # four heads of 16, then keys, then values
        lines = sorted(begin + unit * 16 + place for begin, units in begins for unit in units for place in range(16))
        fused = next(name for name, role in block.linears.items() if role == "query_key_value")
        part = selection.parts.get(f"{fused}.weight")
        assert (part.index.tolist() if part else []) == lines
        assert part is None or part.form == ("columns" if architecture == "gpt2" else "rows")


def test_slices_outside_stay_bit_for_bit(llama_folder):
    base = load_base(llama_folder)
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    selection = catalogue.create("parameters", "precise_sft:k=3,mlps=1").select(context(base))
    model = catalogue.create("adapters", "full").apply(base, selection, 0)
    train_a_little(model, base)
    logits(model)
    for key, value in before.items():
        mask = selection.mask(key) if selection.covers(key) else torch.zeros_like(value, dtype=torch.bool)
        if not mask.all():
            assert torch.equal(model.state_dict()[key][~mask], value[~mask])
    whole = catalogue.create("parameters", "precise_sft:k=16").select(context(load_base(llama_folder)))
    attention = catalogue.create("parameters", "random:targets=attention,density=1").select(context(load_base(llama_folder)))
    assert whole.count() == attention.count()
    with pytest.raises(UserError, match="the base has 16"):
        catalogue.create("parameters", "precise_sft:k=17").select(context(load_base(llama_folder)))


def test_a_knocked_out_head_says_nothing_of_the_token(llama_folder):
    base = load_base(llama_folder)
    plain, found = logits(base.model), {}
    layer = base.model.get_submodule(output_of(base.anatomy.blocks[1]))
    with without_heads(base.model, base.anatomy, {1: [0, 3]}):
        handle = layer.register_forward_pre_hook(lambda _, x: found.__setitem__("heads", x[0].view(27, 4, 16)))
        changed = logits(base.model)
        handle.remove()
    assert not torch.allclose(changed, plain, atol=1e-3) and torch.equal(logits(base.model), plain)
    spread = found["heads"].std(0).amax(-1)
    assert spread[[0, 3]].max() < 1e-6 < spread[[1, 2]].min()


def test_records_without_room_and_prompts_that_begin_others_make_no_pair(llama_folder):
    base = load_base(llama_folder)
    asked = context(base)
    unread = Record("chat", (Message("user", "lamp " * 300), Message("assistant", "on")))
    asked.train = [unread, *RECORDS]
    assert len(made_pairs(asked, 10)) == len(made_pairs(context(base), 10))
    assert _instead((1, 2), (1, 2, 3)) is None and _instead((1, 2, 9), (1, 7, 8, 9)) == (1, 7, 9)
    texts = [
        Record("text", text=text)
        for text in ("The lamp is on.", "The lamp is on. The lamp is on. The lamp is on. The lamp is on.")
    ]
    asked.train = texts
    assert all(len(pair.reference) == len(pair.counterfactual) for pair in made_pairs(asked, 2))


def test_a_file_of_pairs_that_cannot_be_read_is_one_line(llama_folder, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        catalogue.create("parameters", f"precise_sft:pairs={file}").select(context(load_base(llama_folder)))
