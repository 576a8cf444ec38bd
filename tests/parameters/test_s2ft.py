"""S2FT: units drawn from all blocks together, right under grouped queries and fused matrices."""

import pytest
import torch

from selectune import catalogue
from selectune.errors import UserError
from selectune.models import load_base
from selectune.parameters import Selection
from selectune.parameters.factors.gradients import first
from selectune.parameters.factors.scores import Settings, find
from selectune.parameters.factors.targets import Target, targets
from selectune.parameters.s2ft import _has_units
from tests.contracts.test_parameters import RECORDS, context
from tests.tiny import save_tiny, tiny


def choose(base, **values):
    return catalogue.create("parameters", {"method": "s2ft", "down": 0, "examples": 2} | values).select(context(base))


def test_channels_are_drawn_from_all_blocks_and_are_columns_of_down_and_rows_of_up(llama_folder):
    base = load_base(llama_folder)
    found = choose(base, down=0.05, up=0.1)
    down = {name: part for name, part in found.parts.items() if "down_proj" in name}
    up = {name: part for name, part in found.parts.items() if "up_proj" in name}
    assert {part.form for part in down.values()} == {"columns"} and {part.form for part in up.values()} == {"rows"}
    assert sum(len(part.index) for part in down.values()) == int(0.05 * 4 * 128)
    assert sum(len(part.index) for part in up.values()) == int(0.1 * 4 * 128)
    assert len({len(part.index) for part in up.values()}) > 1  # not the same number in each block


def test_a_value_head_is_a_group_and_an_output_head_a_query_head(llama_folder):
    base = load_base(llama_folder)
    found = choose(base, value=0.5, output=0.25)
    value = [part for name, part in found.parts.items() if "v_proj" in name]
    output = [part for name, part in found.parts.items() if "o_proj" in name]
    assert sum(len(part.index) for part in value) == 4 * 2 // 2 * 16 and sum(len(part.index) for part in output) == 4 * 16
    for part in value + output:
        heads = part.index.view(-1, 16)
        assert (heads % 16 == torch.arange(16)).all() and (heads // 16 == heads[:, :1] // 16).all()


def test_all_units_are_the_four_matrices_whole(llama_folder):
    base = load_base(llama_folder)
    found = choose(base, value=1, output=1, up=1, down=1)
    assert found == Selection.of(base.model, [target.name for target in targets(base, "value+attention_output+up+down")])


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_fused_matrices_train_where_the_value_and_the_up_projection_lie(architecture, tmp_path):
    from selectune.models.anatomy import Anatomy
    from selectune.parameters.s2ft import _slice

    model = tiny(architecture)

    class Base:
        pass

    base = Base()
    base.model, base.anatomy = model, Anatomy.of(model)
    (target, *_) = targets(base, "value")
    block = base.anatomy.blocks[0]
    part = _slice(target, "value", block).part(torch.arange(block.key_value_heads))
    queries = block.heads * 16 + block.key_value_heads * 16
    assert part.index.tolist() == list(range(queries, queries + block.key_value_heads * 16))
    assert part.form == ("columns" if target.transposed else "rows")
    (up, *_) = targets(base, "up")
    part = _slice(up, "up", block).part(torch.tensor([0, 3]))
    assert part.index.tolist() == ([0, 3] if architecture == "gpt2" else [128, 131])


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("rank_by", ["weight", "activation", "weight_activation", "gradient"])
def test_units_are_ranked_as_a_loop_would(rank_by, smallest, llama_folder):
    base = load_base(llama_folder, dtype=torch.float32)
    found = choose(base, down=0.05, output=0.25, rank_by=rank_by, smallest=smallest)
    gradients = find("signed_gradient")(context(base), targets(base), Settings(examples=2))
    for role, width in (("down", 1), ("attention_output", 16)):
        scores = {}
        for target in targets(base, role):
            weight, kept = base.model.get_parameter(target.name), []
            handle = base.model.get_submodule(target.name[:-7]).register_forward_pre_hook(lambda m, x, k=kept: k.append(x[0][0]))
            for record in first(RECORDS, 2):
                (piece,) = context(base).encoder.encode(record)
                base.model(input_ids=torch.tensor([piece.input_ids]), use_cache=False)
            handle.remove()
            states = torch.cat(kept).detach()
            for unit in range(target.shape[1] // width):
                columns = slice(unit * width, unit * width + width)
                norm, size = weight[:, columns].norm().item(), states[:, columns].norm().item()
                scores[target.name, unit] = {"weight": norm, "activation": size, "weight_activation": norm * size,
                                             "gradient": gradients[target.name][:, columns].norm().item()}[rank_by]  # fmt: skip
        count = int((0.05 if role == "down" else 0.25) * len(scores))
        expected = sorted(sorted(scores, key=scores.get, reverse=not smallest)[:count])
        ours = [(name, int(i) // width) for name, part in found.parts.items() if role[:4] in name or
                (role != "down" and "o_proj" in name) for i in part.index[::width]]  # fmt: skip
        assert sorted(ours) == expected


def test_nothing_and_less_than_one_are_refused_and_so_are_experts(llama_folder, tiny_folders):
    base = load_base(llama_folder)
    with pytest.raises(UserError, match="no heads"):
        choose(base)
    with pytest.raises(UserError, match="less than one"):
        choose(base, down=0.0001)
    with pytest.raises(UserError, match="no dense down"):
        choose(load_base(tiny_folders["mixtral"]), down=0.1)


def test_a_wider_expert_that_all_share_has_no_channels_of_the_block_and_mixed_rows_are_refused(tmp_path):
    blocks = load_base(save_tiny("qwen2_moe", tmp_path, shared_expert_intermediate_size=192)).anatomy.blocks
    shared = Target("model.layers.0.mlp.shared_expert.down_proj.weight", (64, 192), "down", 0)
    assert not _has_units(shared, "down", blocks[0]) and _has_units(Target("down", (64, 128), "down", 0), "down", blocks[0])
    with pytest.raises(UserError, match="laid out in a way of their own"):
        _has_units(Target("model.layers.0.attention.query_key_value.weight", (128, 64), "query_key_value", 0), "value", blocks[0])
