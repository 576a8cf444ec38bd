"""Scores, granularities and allocations against obvious re-computations."""

import copy
from dataclasses import replace

import pytest
import torch

from selectune import catalogue
from selectune.data import Encoder
from selectune.errors import UserError
from selectune.models import load_base
from selectune.parameters import Selection
from selectune.parameters.factors.allocation import allocate, apportion, best
from selectune.parameters.factors.gradients import first, gather, rows_of
from selectune.parameters.factors.scores import SCORES, Settings, find, low_rank, top
from selectune.parameters.factors.search import Trials
from selectune.parameters.factors.targets import Target, targets
from selectune.parameters.factors.trial import loss_on, trial
from selectune.parameters.factors.units import Units, gathered, unit_slices, units
from selectune.parameters.scored import Scored
from tests.contracts.test_parameters import RECORDS, context
from tests.tiny import ARCHITECTURES, save_tiny

find("random")  # from here on all scores are known


def group(scores, size=1, block=0, row=1):
    return Units(torch.tensor(scores, dtype=torch.float32), size, block, lambda index: {}, row=row)


def test_best_takes_exactly_so_many_and_breaks_ties_by_place():
    torch.manual_seed(0)
    for _ in range(50):
        scores = torch.randint(0, 5, (40,)).float()
        for count in (0, 1, 7, 39, 40, 50):
            expected = sorted(sorted(range(40), key=lambda i: (-scores[i], i))[:count])
            assert best(scores, count).tolist() == expected
    assert best(torch.tensor([float("nan"), 1.0, 2.0]), 2).tolist() == [1, 2]


def test_apportion_is_exact_and_respects_what_there_is():
    assert apportion(10, [1, 1, 1], [100, 100, 100]) == [4, 3, 3]
    assert apportion(10, [1, 1, 8], [10, 10, 2]) == [4, 4, 2]
    assert apportion(5, [0, 0], [3, 3]) == [3, 2]
    assert apportion(50, [1, 2], [3, 4]) == [3, 4]
    assert apportion(4, [0, 5], [3, 3]) == [1, 3]


def test_apportion_gives_what_whole_numbers_leave_to_the_largest_remainders_once():
    assert apportion(5, [60, 25, 15], [60, 25, 15]) == [3, 1, 1]
    sizes = [30] + [4] * 19
    given = apportion(19, sizes, sizes)
    assert sum(given) == 19 and given[0] == 5 and given[1:15] == [1] * 14
    torch.manual_seed(0)
    for _ in range(200):
        sizes = torch.randint(1, 40, (int(torch.randint(1, 30, ())),)).tolist()
        total = int(torch.randint(0, sum(sizes) + 1, ()))
        given = apportion(total, sizes, sizes)
        assert sum(given) == total
        assert all(abs(some - total * size / sum(sizes)) < 1 for some, size in zip(given, sizes, strict=True))


def test_global_takes_the_best_anywhere_and_fills_the_budget_with_what_fits():
    groups = [group([5, 1, 3]), group([4, 9])]
    assert [index.tolist() for index in allocate(groups, 3)] == [[0], [0, 1]]
    mixed = [group([9, 1], size=10), group([5, 4], size=3)]
    assert [index.tolist() for index in allocate(mixed, 16)] == [[0], [0, 1]]
    assert [index.tolist() for index in allocate(mixed, 9)] == [[], [0, 1]]


def test_matrix_and_layer_share_the_budget_exactly():
    groups = [group(range(10), block=0), group(range(20), block=0), group(range(30), block=1)]
    assert [len(index) for index in allocate(groups, 30, "matrix")] == [5, 10, 15]
    layered = allocate(groups, 30, "layer")
    assert [len(layered[0]) + len(layered[1]), len(layered[2])] == [15, 15]
    assert layered[0].tolist() == [7, 8, 9] and len(layered[1]) == 12  # the best of the block's own thirty; ties by place


def test_rows_have_the_same_number_and_the_rest_goes_to_the_best_next():
    torch.manual_seed(0)
    scores = torch.rand(6, 8)
    made = [Units(scores.view(-1), 1, 0, lambda index: {}, row=8)]
    for budget in (6, 12, 15, 48):
        (index,) = allocate(made, budget, "row")
        per_row = torch.bincount(index // 8, minlength=6)
        assert len(index) == budget and int(per_row.max() - per_row.min()) <= 1
        for row in range(6):
            own = index[index // 8 == row] % 8
            assert set(own.tolist()) == set(scores[row].topk(len(own)).indices.tolist())
    (index,) = allocate(made, 8, "row")
    second = scores.topk(2, dim=1).values[:, 1]
    assert set((torch.bincount(index // 8, minlength=6) == 2).nonzero().view(-1).tolist()) == set(second.topk(2).indices.tolist())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("granularity", ["element", "row", "column", "square", "matrix", "block", "head", "channel", "expert"])
def test_units_are_disjoint_and_together_everything(granularity, architecture, tiny_folders):
    base = load_base(tiny_folders[architecture])
    which = {"head": "attention", "channel": "mlp", "expert": "mlp"}.get(granularity, "linear")
    eligible = targets(base, which)
    if granularity in ("row", "column", "square", "channel"):
        eligible = [target for target in eligible if len(target.shape) == 2]
    if granularity == "expert":
        eligible = [target for target in eligible if len(target.shape) == 3]
    if not eligible:
        return
    torch.manual_seed(0)
    scores = {target.name: torch.rand(target.shape) for target in eligible}
    made = units(granularity, eligible, scores, base.anatomy.blocks, side=16)
    everything = gathered([(one, torch.arange(len(one.scores))) for one in made])
    assert everything == Selection.of(base.model, [target.name for target in eligible])
    for one in made[:3]:
        masks = [Selection(one.parts(torch.tensor([i]))) for i in range(min(len(one.scores), 4))]
        assert all(mask.count() == one.size for mask in masks)
        assert all(not (a & b).parts for i, a in enumerate(masks) for b in masks[:i])
        for i, mask in enumerate(masks):
            by_hand = torch.cat([scores[name][mask.mask(name)] for name in mask.names()]).mean()
            assert one.scores[i] == pytest.approx(float(by_hand), rel=1e-4)


def test_a_row_is_an_output_neuron_also_where_the_weight_lies_the_other_way_round(tiny_folders):
    base = load_base(tiny_folders["gpt2"])
    target = next(target for target in targets(base, "mlp") if target.transposed)
    made = units("row", [target], {target.name: torch.rand(target.shape)}, base.anatomy.blocks)[0]
    assert len(made.scores) == target.shape[1]
    assert made.parts(torch.tensor([3]))[target.name].form == "columns"


def test_a_side_that_does_not_divide_is_refused(llama_folder):
    base = load_base(llama_folder)
    with pytest.raises(UserError, match="side"):
        Scored(granularity="square", side=24, density=0.1, examples=1).select(context(base))


def test_unknown_scores_and_weights_are_refused_with_the_nearest(llama_folder):
    base = load_base(llama_folder)
    with pytest.raises(UserError, match="gradient"):
        find("gradeint")
    with pytest.raises(UserError, match="attention"):
        targets(base, "atention")
    with pytest.raises(UserError, match="no weights of the kind"):
        targets(base, "router")


def by_hand(base, loss):
    """Each record's gradient by itself, through the model's own forward pass."""
    made = []
    for record in first(RECORDS, 3):
        base.model.requires_grad_(True)
        (piece,) = Encoder(base.tokenizer, 128).encode(record)
        labels = torch.tensor(piece.labels)
        logits = base.model(input_ids=torch.tensor([piece.input_ids]), use_cache=False).logits[0, :-1]
        total = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction=loss)
        made.append({name: value for name, value in base.model.named_parameters()})
        grads = torch.autograd.grad(total, list(made[-1].values()))
        made[-1] = dict(zip(made[-1], grads, strict=True))
    base.model.requires_grad_(False)
    return made


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_gathered_gradients_equal_a_loop(architecture, tiny_folders):
    base = load_base(tiny_folders[architecture])
    names = [target.name for target in targets(base)]
    found = gather(context(base), names, ["mean", "absolute", "squared"], examples=3)
    expected = by_hand(base, "mean")
    for name in names:
        stacked = torch.stack([one[name] for one in expected])
        assert torch.allclose(found["mean"][name], stacked.mean(0), atol=1e-5)
        assert torch.allclose(found["absolute"][name], stacked.abs().mean(0), atol=1e-5)
        assert torch.allclose(found["squared"][name], stacked.square().mean(0), atol=1e-5)


def test_every_saliency_is_its_formula(llama_folder):
    base = load_base(llama_folder)
    eligible = targets(base)
    gradients = by_hand(base, "mean")
    logs = by_hand(base, "sum")
    for target in eligible:
        weight = base.model.get_parameter(target.name).detach()
        g = torch.stack([one[target.name] for one in gradients]).mean(0)
        formulas = {
            "magnitude": weight.abs(),
            "gradient": g.abs(),
            "snip": (weight * g).abs(),
            "force": -weight * g,
            "taylor": (weight * g) ** 2,
            "fisher": torch.stack([one[target.name] ** 2 for one in logs]).mean(0),
            "absolute_gradient": torch.stack([one[target.name].abs() for one in gradients]).mean(0),
        }
        for name, formula in formulas.items():
            found = SCORES[name](context(base), [target], Settings(examples=3))[target.name]
            assert torch.allclose(found, formula, rtol=1e-3, atol=1e-5 * float(formula.abs().max())), name


@pytest.mark.parametrize("score", sorted(SCORES.keys() - {"random"}))
def test_a_bf16_base_ranks_entries_as_its_fp32_copy_does(score, llama_folder):
    rounded = load_base(llama_folder, dtype=torch.bfloat16)
    exact = replace(rounded, model=copy.deepcopy(rounded.model).float())
    low, high = (torch.cat([value.flatten() for value in find(score)(context(base), targets(base), Settings(examples=4)).values()])
                 for base in (rounded, exact))  # fmt: skip
    ranks = torch.stack([values.argsort().argsort().double() for values in (low, high)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.99
    assert int((low == 0).sum()) <= int((high == 0).sum()) + len(low) // 1000
    assert (
        low.unique().numel() > 0.7 * high.unique().numel()
    )  # of one record a gradient has the 8 bits of its weight; of many, more


def test_low_rank_is_the_best_approximation_and_full_rank_the_matrix():
    torch.manual_seed(0)
    weight = torch.randn(12, 8)
    left, values, right = torch.linalg.svd(weight)
    assert torch.allclose(low_rank(weight, 3), left[:, :3] @ torch.diag(values[:3]) @ right[:3], atol=1e-5)
    assert low_rank(weight, 8) is weight


def test_packed_and_single_records_give_the_same_mean_of_sums(llama_folder):
    base = load_base(llama_folder)
    names = [target.name for target in targets(base, "value")]
    single = gather(context(base), names, ["mean"], examples=4, loss="sum")["mean"]
    packed = gather(context(base), names, ["mean"], examples=4, loss="sum", packed=True)["mean"]
    rows = len(rows_of(context(base), first(RECORDS, 4), packed=True))
    for name in names:
        assert torch.allclose(single[name] * 4, packed[name] * rows, atol=1e-4)


def test_a_trial_leaves_the_base_alone_and_learns(llama_folder):
    base = load_base(llama_folder)
    before = {name: value.clone() for name, value in base.model.named_parameters()}
    selection = Scored(score="magnitude", density=0.3).select(context(base))
    tried = trial(context(base), selection, steps=20, learning_rate=3e-3)
    assert all(torch.equal(value, before[name]) for name, value in base.model.named_parameters())
    assert loss_on(context(base), RECORDS, tried.model) < loss_on(context(base), RECORDS) - 0.1
    assert all(float(tried.change(name).abs().sum()) > 0 for name in tried.trained)
    again = trial(context(base), selection, steps=20, learning_rate=3e-3)
    assert tried.losses == again.losses


def test_targets_know_their_role_and_block(llama_folder):
    found = targets(load_base(llama_folder))
    assert len(found) == 4 * 7
    assert found[0] == Target("model.layers.0.self_attn.q_proj.weight", (64, 64), "query", 0)


def test_rows_are_shares_of_single_entries_and_not_a_number_comes_last():
    with pytest.raises(UserError, match="single entries"):
        allocate([group([1, 2, 3], size=10)], 10, "row")
    nan = float("nan")
    assert [index.tolist() for index in allocate([group([nan, 1], size=10), group([5, 4], size=3)], 10)] == [[], [0, 1]]
    assert allocate([Units(torch.tensor([nan, 1.0, 2.0, nan]), 1, 0, lambda index: {}, row=2)], 2, "row")[0].tolist() == [1, 2]
    assert top({0: 1.0, 1: 3.0, 2: 3.0, 3: 2.0}, 2) == [1, 2] and top({0: 1.0, 1: 3.0, 2: 3.0, 3: 2.0}, 1) == [1]
    assert top({0: nan, 1: 1.0, 2: 2.0}, 2) == [1, 2]


@pytest.mark.parametrize(
    "choice", ["scored:granularity=block,score=magnitude", "scored:granularity=square,side=32,score=magnitude,allocation=matrix"]
)
def test_a_budget_below_one_unit_is_refused(choice, llama_folder):
    with pytest.raises(UserError, match=r"parameters\.density.* hold no "):
        catalogue.create("parameters", choice).select(context(load_base(llama_folder)))


def test_a_stack_of_experts_has_no_rows(tiny_folders):
    with pytest.raises(UserError, match="have no rows"):
        catalogue.create("parameters", "scored:granularity=row,targets=mlp,score=magnitude").select(
            context(load_base(tiny_folders["mixtral"]))
        )


def test_channels_are_those_of_the_blocks_experts_and_not_of_a_wider_one(tmp_path):
    base = load_base(save_tiny("qwen2_moe", tmp_path, shared_expert_intermediate_size=192))
    block = base.anatomy.blocks[0]
    shared = [target for target in targets(base, "mlp") if "shared" in target.name and target.block == 0]
    assert len(shared) == 3 and unit_slices("channel", block, shared) == (block.channels, [])


def test_records_of_which_nothing_is_learnt_and_gradients_that_are_not_finite_are_told(llama_folder):
    asked = context(load_base(llama_folder))
    asked.encoder.max_length = 4
    for choice in ("speft:examples=4", "fisher_blocks:k=1", "weak_columns:k=1,examples=2", "federated_layers:k=1"):
        with pytest.raises(UserError, match="response to learn from"):
            catalogue.create("parameters", choice).select(asked)
    asked = context(load_base(llama_folder))
    with torch.no_grad():
        asked.base.model.get_input_embeddings().weight[:] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        catalogue.create("parameters", "speft:examples=2").select(asked)


def test_a_trial_that_diverges_is_told_and_worth_nothing(llama_folder):
    asked = context(load_base(llama_folder))
    chosen = Selection.of(asked.base.model, asked.base.anatomy.blocks[1].parameters)
    with pytest.raises(UserError, match=r"parameters\.learning_rate.*diverged"):
        trial(asked, chosen, steps=4, learning_rate=1e30)
    assert Trials(asked, steps=4, learning_rate=1e30, examples=6)(chosen) == -float("inf")
    with pytest.raises(UserError, match="2 rounds"):
        catalogue.create("parameters", "lt_sft:entries=1,iterations=2,steps=1").select(asked)
