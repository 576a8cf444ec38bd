"""The methods that choose entries, against obvious re-computations."""

import pytest
import torch

from selectune import catalogue
from selectune.errors import UserError
from selectune.merging.delta import Delta
from selectune.merging.graft import BIAS, Mask, graft
from selectune.models import load_base
from selectune.parameters import Selection
from selectune.parameters.factors.allocation import best_of_rows
from selectune.parameters.factors.gradients import each_gradient, gather, rows_of
from selectune.parameters.factors.scores import Settings, find
from selectune.parameters.factors.targets import targets
from selectune.parameters.factors.trial import loss_on, trial
from selectune.parameters.selection import Part
from selectune.parameters.spt import decide
from tests.contracts.test_parameters import RECORDS, chosen, context
from tests.tiny import ARCHITECTURES


def make(text):
    return catalogue.create("parameters", text)


def scores_of(name, base, **settings):
    return find(name)(context(base), targets(base), Settings(**settings))


def rows_by_neuron(target, tensor):
    """A tensor of a weight with one row for each output neuron."""
    return (tensor.transpose(-1, -2) if target.transposed else tensor).reshape(-1, target.shape[-1 - target.transposed])


def are_the_largest(selection, sizes):
    """Whether no entry that was left out is larger than one that was taken."""
    taken, left = [], []
    for name, value in sizes.items():
        mask = selection.mask(name) if selection.covers(name) else torch.zeros_like(value, dtype=torch.bool)
        taken.append(value[mask])
        left.append(value[~mask])
    return torch.cat(taken).min() >= torch.cat(left).max()


def test_the_best_of_each_row_are_so_many_and_ties_go_to_the_first():
    torch.manual_seed(0)
    scores = torch.randint(0, 4, (9, 7)).float()
    scores[3] = 0
    scores[4, 2] = float("nan")
    for count in (1, 3, 7):
        expected = []
        for row in range(9):
            order = sorted(range(7), key=lambda j: (-float(scores[row, j].nan_to_num(float("-inf"))), j))
            expected += sorted(row * 7 + j for j in order[:count])
        assert best_of_rows(scores, count).tolist() == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["neuroada", "gps"])
def test_every_neuron_has_its_k_best_inputs(method, architecture, tiny_folders):
    base = load_base(tiny_folders[architecture])
    found = chosen(method, base, k=3)
    scores = scores_of("magnitude" if method == "neuroada" else "gradient", base, examples=2)
    assert found.names() == sorted(target.name for target in targets(base))
    for target in targets(base):
        taken = rows_by_neuron(target, found.mask(target.name))
        own = rows_by_neuron(target, scores[target.name])
        assert (taken.sum(1) == 3).all()
        threshold = own.masked_fill(~taken, float("inf")).amin(1)
        assert (own.masked_fill(taken, float("-inf")).amax(1) <= threshold).all()


def test_more_inputs_than_there_are_is_refused_and_all_of_them_is_everything(llama_folder):
    base = load_base(llama_folder)
    with pytest.raises(UserError, match="65 inputs"):
        make("neuroada:k=65").select(context(base))
    every = make("neuroada:k=64,targets=attention").select(context(base))
    assert every == Selection.of(base.model, [target.name for target in targets(base, "attention")])


@pytest.mark.parametrize("score", ["gradient", "snip", "force", "taylor", "fisher", "magnitude", "synflow", "grasp"])
def test_speft_is_the_head_of_the_sorted_scores(score, llama_folder):
    base = load_base(llama_folder)
    method = make(f"speft:score={score},density=0.03,examples=2")
    found = method.select(context(base))
    eligible = targets(base)
    flat = torch.cat([value.view(-1) for value in scores_of(score, base, examples=2).values()])
    order = flat.argsort(descending=True, stable=True)[: method.budget(eligible)]
    taken = torch.zeros(len(flat), dtype=torch.bool)
    taken[order] = True
    for target, own in zip(eligible, taken.split([target.count for target in eligible]), strict=True):
        mask = found.mask(target.name) if found.covers(target.name) else torch.zeros(target.shape, dtype=torch.bool)
        assert torch.equal(mask.view(-1), own), target.name
    if score == "taylor":
        assert found == make("speft:score=snip,density=0.03,examples=2").select(context(base))


def test_lift_takes_the_largest_entries_of_the_reduced_matrix(tiny_folders):
    for architecture in ("llama", "gpt2"):
        base = load_base(tiny_folders[architecture])
        found = make("lift:density=0.05,rank=4").select(context(base))
        assert found.count() == round(0.05 * sum(target.count for target in targets(base)))
        for target in targets(base):
            left, values, right = torch.linalg.svd(base.model.get_parameter(target.name).double())
            reduced = (left[:, :4] @ torch.diag(values[:4]) @ right[:4]).abs()
            mask = found.mask(target.name)
            assert abs(int(mask.sum()) - 0.05 * target.count) <= 1
            assert reduced[mask].min() >= reduced[~mask].max() * (1 - 1e-4)


def test_lift_of_full_rank_is_magnitude_and_its_budget_may_be_that_of_lora(tiny_folders):
    for architecture in ("llama", "gpt2", "mixtral"):
        base = load_base(tiny_folders[architecture])
        whole = make("lift:density=0.05,rank=64").select(context(base))
        assert whole == make("scored:score=magnitude,allocation=matrix,density=0.05").select(context(base))
        like_lora = make("lift:lora_rank=2,rank=4").select(context(base))
        for target in targets(base):
            outputs = target.count // target.shape[-1 - target.transposed]
            assert int(like_lora.mask(target.name).sum()) == 2 * (outputs + target.shape[-1 - target.transposed])
    assert make("lift:lora_rank=999,rank=4").select(context(base)).count() == sum(target.count for target in targets(base))
    for other in ("granularity=row", "allocation=row"):
        with pytest.raises(UserError, match="lora_rank counts the entries of each matrix"):
            make(f"lift:lora_rank=2,rank=4,{other}").select(context(base))


@pytest.mark.parametrize("block_score", ["mean_abs", "abs_mean", "L1", "L2"])
def test_smt_squares_are_the_best_by_a_loop(block_score, llama_folder):
    base = load_base(llama_folder)
    gradients = scores_of("signed_gradient", base, examples=2)
    by_hand = {}
    for name, value in gradients.items():
        for number in range(value.shape[0] // 16 * (value.shape[1] // 16)):
            row, column = divmod(number, value.shape[1] // 16)
            square = value[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
            by_hand[name, number] = {"mean_abs": square.mean().abs(), "abs_mean": square.abs().mean(), "L1": square.abs().sum(),
                                     "L2": square.norm()}[block_score].item()  # fmt: skip
    budget = round(0.02 * sum(value.numel() for value in gradients.values()))
    expected = sorted(by_hand, key=by_hand.get, reverse=True)[: budget // 256]
    found = make(f"smt:block_score={block_score},steps=0,side=16,density=0.02,examples=2").select(context(base))
    assert sorted(expected) == [(name, number) for name, part in found.parts.items() for number in part.index.tolist()]


def test_smt_adds_the_gradients_of_its_warm_up_and_at_rate_zero_they_are_the_bases(llama_folder):
    base = load_base(llama_folder)
    method = make("smt:steps=3,learning_rate=0,side=16,density=0.02")
    rows = rows_of(context(base), RECORDS, packed=True)
    total = {target.name: torch.zeros(target.shape) for target in targets(base)}
    tokens = sum(int((row["labels"][1:] != -100).sum()) for row in rows)

    def add(name, gradient, count):
        total[name] += gradient / tokens

    each_gradient(base.model, rows, total, add)
    found = method.score_entries(context(base), targets(base))
    assert len(rows) == 2, "both sequences are in every step"
    assert all(torch.allclose(found[name], 3 * value, rtol=1e-3, atol=1e-6) for name, value in total.items())
    moved = make("smt:steps=3,learning_rate=0.01,side=16").score_entries(context(base), targets(base))
    assert not torch.allclose(moved[next(iter(total))], found[next(iter(total))], rtol=1e-2)


def test_smt_keeps_the_budgets_of_attention_and_mlp_apart(llama_folder):
    base = load_base(llama_folder)
    eligible = targets(base)
    budget = make("smt:density=0.1").budget(eligible)
    for share in (0.0, 0.5, 1.0):
        found = make(f"smt:attention_share={share},steps=0,side=16,density=0.1,examples=2").select(context(base))
        attention = sum(part.count() for name, part in found.parts.items() if "self_attn" in name)
        assert attention == round(budget * share) // 256 * 256
        assert found.count() - attention == (budget - round(budget * share)) // 256 * 256


def test_tr_pts_quotas_follow_the_blocks_shares(tiny_folders):
    for architecture in ("llama", "gpt2"):
        base = load_base(tiny_folders[architecture])
        found = make("tr_pts:k=2,share=0.05,examples=2").select(context(base))
        scores = scores_of("fisher", base, examples=2)
        flat = torch.cat([value.view(-1) for value in scores.values()])
        limit = flat.sort(descending=True).values[round(0.05 * len(flat)) - 1]
        shares = [sum(int((scores[t.name] >= limit).sum()) for t in targets(base) if t.block == block) for block in range(4)]
        least = min(share for share in shares if share)
        for target in targets(base):
            taken = rows_by_neuron(target, found.mask(target.name))
            own = rows_by_neuron(target, scores[target.name])
            quota = min(round(2 * max(shares[target.block], least) / least), own.shape[1])
            assert (taken.sum(1) == quota).all()
            assert (own.masked_fill(taken, -1).amax(1) <= own.masked_fill(~taken, float("inf")).amin(1)).all()
        assert min(int(rows_by_neuron(t, found.mask(t.name)).sum(1).min()) for t in targets(base)) == 2


def test_small_weights_are_the_smallest_of_each_matrix(llama_folder):
    base = load_base(llama_folder)
    found = make("small_weights").select(context(base))
    for target in targets(base):
        weight, mask = base.model.get_parameter(target.name).abs(), found.mask(target.name)
        assert abs(int(mask.sum()) - 0.2 * target.count) <= 1 and weight[mask].max() <= weight[~mask].min()


def test_d_pruner_takes_the_most_important_entries_of_each_matrix(llama_folder):
    base = load_base(llama_folder)
    found = make("d_pruner:density=0.05,examples=2,penalty=2").select(context(base))
    scores = scores_of("dual_importance", base, examples=2, penalty=2)
    for target in targets(base):
        mask = found.mask(target.name)
        assert scores[target.name][mask].min() >= scores[target.name][~mask].max()


def test_spt_decides_by_count():
    structured = torch.tensor([100, 100, 100, 10])
    found = decide(torch.tensor([9, 10, 0, 2]), structured, structured / torch.tensor([10.0, 10, 10, 5]))
    assert found.whole.tolist() == [False, True, False, True]
    assert found.trained == 9 + 100 + 0 + 10


@pytest.mark.parametrize(("limit", "form"), [("1e-9", "elements"), ("1e9", "whole")])
def test_spt_at_its_ends_is_entries_alone_or_an_adapter_wherever_one_was_picked(limit, form, llama_folder):
    base = load_base(llama_folder)
    found = make(f"spt:rank=2,density=0.02,examples=2,alpha={limit},beta={limit}").select(context(base))
    assert found.parts and {part.form for part in found.parts.values()} == {form}


def test_spt_is_nearest_to_its_budget_and_its_picks_are_the_best_anywhere(llama_folder):
    base = load_base(llama_folder)
    made = context(base)
    method = make("spt:rank=2,density=0.02,examples=6")
    found = method.select(made)
    budget, eligible = method.budget(targets(base)), method.tensors(context(base))
    names = [target.name for target in eligible]
    scores = gather(context(base), names, ["squared"], examples=6, packed=True)["squared"]
    flat = torch.cat([scores[name].view(-1) for name in names])
    ends = torch.tensor([target.count for target in eligible]).cumsum(0)
    order = flat.argsort(descending=True, stable=True)[: 4 * budget]
    totals = {}
    for point in range(1, 161):
        count = round(len(order) * point / 160)
        picked = torch.bincount(torch.bucketize(order[:count], ends, right=True), minlength=len(names)).tolist()
        total = 0
        for target, number in zip(eligible, picked):
            form, limit = (2 * sum(target.shape), 10) if len(target.shape) == 2 else (target.count, 5)
            total += form if number and number >= form / limit else number
        totals[count] = (abs(total - budget), count, picked)
    _, count, picked = min(totals.values())
    assert any(part.form == "whole" for part in found.parts.values())
    assert any(part.form == "elements" for part in found.parts.values())
    limit = flat[order[count - 1]]
    for target, number in zip(eligible, picked):
        form, least = (2 * sum(target.shape), 10) if len(target.shape) == 2 else (target.count, 5)
        if number == 0:
            assert not found.covers(target.name)
        elif number >= form / least:
            assert found.parts[target.name].form == "whole"
        else:
            assert found.parts[target.name].count() == number
            assert scores[target.name][found.mask(target.name)].min() >= limit
    assert "adapter" in made.notes[0]


def test_lt_sft_takes_what_a_full_trial_changes_most(llama_folder):
    base = load_base(llama_folder)
    found = make("lt_sft:steps=3,learning_rate=0.001,density=0.02").select(context(base))
    everything = Selection.of(base.model, [target.name for target in targets(base)])
    first = trial(context(base), everything, steps=3, learning_rate=0.001)
    assert found.count() == round(0.02 * everything.count())
    assert are_the_largest(found, {name: first.change(name).abs() for name in everything.names()})


def test_lt_sft_in_rounds_keeps_what_it_found_and_a_pull_changes_the_choice(llama_folder):
    base = load_base(llama_folder)
    budget = make("lt_sft").budget(targets(base))
    half = make(f"lt_sft:steps=2,learning_rate=0.001,entries={budget // 2}").select(context(base))
    both = make(f"lt_sft:steps=2,learning_rate=0.001,entries={2 * (budget // 2)},iterations=2").select(context(base))
    once = make(f"lt_sft:steps=2,learning_rate=0.001,entries={2 * (budget // 2)}").select(context(base))
    assert (half - both).count() == 0 and both.count() == 2 * half.count()
    assert both != once
    pulled = make("lt_sft:steps=3,learning_rate=0.001,l1=1000").select(context(base))
    assert pulled != make("lt_sft:steps=3,learning_rate=0.001").select(context(base))


def test_the_second_round_of_lt_sft_starts_where_the_first_ended(llama_folder):
    base = load_base(llama_folder)
    asked, options = context(base), {"steps": 2, "learning_rate": 0.001}
    one, two = (make(f"lt_sft:steps=2,learning_rate=0.001,entries={500 * n},iterations={n}").select(asked) for n in (1, 2))
    ticket = trial(asked, one, **options).trained

    def there(model):
        for name, part in one.parts.items():
            part.put(model.get_parameter(name).data, ticket[name].detach())

    moved = trial(asked, Selection.of(base.model, [target.name for target in targets(base)]), prepare=there, **options)
    change = {name: moved.change(name).abs() for name in moved.trained}
    for name, part in one.parts.items():
        change[name][part.mask()] = 0
    assert (one - two).count() == 0 and (two - one).count() == 500
    assert are_the_largest(two - one, change)


def test_the_pull_of_lt_sft_is_that_of_the_mean_distance_from_the_base():
    selection = Selection({"w": Part((2, 3), "elements", [0, 1, 3, 5])})
    value = torch.nn.Parameter(torch.tensor([1.0, 2.0, 4.0, 6.0]) + torch.tensor([1.0, -1.0, 0.0, 2.0]))
    value.grad = torch.zeros(4)
    make("lt_sft:l1=0.1")._pull({"w": torch.arange(1.0, 7.0).view(2, 3)}, selection)(0, {"w": value})
    assert torch.allclose(value.grad, 0.1 / 4 * torch.tensor([1.0, -1.0, 0.0, 1.0]))


@pytest.fixture
def tuned(llama_folder):
    """A base, and the delta of a copy that was fine-tuned whole."""
    base = load_base(llama_folder)
    everything = Selection.of(base.model, [target.name for target in targets(base)])
    return base, Delta.of(base, trial(context(base), everything, steps=8, learning_rate=0.003).model)


def test_the_masks_gradient_is_that_of_the_interpolation():
    torch.manual_seed(0)
    change, weight = {"w": torch.randn(5, 6)}, torch.randn(5, 6)
    mask = Mask(change, 7, torch.Generator().manual_seed(0))
    mask.logits["w"] = (BIAS + torch.randn(5, 6)).requires_grad_(True)
    loss = ((weight + mask.share("w") * change["w"]) ** 3).sum()
    loss.backward()
    of_weight = 3 * (weight + mask.share("w") * change["w"]).detach() ** 2
    assert torch.allclose(mask.gradient("w", of_weight), mask.logits["w"].grad, rtol=1e-4)
    expected = set(change["w"].abs().view(-1).topk(7).indices.tolist())
    assert set(mask.patch["w"].view(-1).nonzero().view(-1).tolist()) == expected


def test_a_mask_begins_as_the_base_patch_and_no_learning_leaves_it(tuned):
    base, delta = tuned
    mask = Mask({"w": torch.randn(50, 60)}, 100, torch.Generator().manual_seed(0))
    assert torch.equal(mask.rounded("w"), mask.patch["w"]) and (mask.share("w") - mask.patch["w"].float()).abs().max() < 2e-4
    changes = torch.cat([delta.changes(name).abs().view(-1) for name in delta.selection.names()])
    limit = changes.sort(descending=True).values[199]
    for options in ({"rounds": 0}, {"rounds": 2, "learning_rate": 0.0}):
        found = graft(context(base), delta, entries=200, **options)
        assert found.count() == 200
        assert all((found.changes(name).abs() >= limit * 0.999).all() for name in found.selection.names())
    assert graft(context(base), delta, entries=delta.count(), rounds=0) == delta


def test_graft_and_complement_are_the_specialist_and_learning_lowers_the_loss(tuned):
    base, delta = tuned
    patch = graft(context(base), delta, entries=300, rounds=0)
    found = graft(context(base), delta, entries=300, rounds=6, learning_rate=3.0)
    rest = delta.restrict(delta.selection - found.selection)
    assert found.compose(rest) == delta
    losses = []
    for one in (patch, found):
        one.apply(base)
        losses.append(loss_on(context(base), RECORDS + RECORDS[:2]))
        one.revert(base)
    assert losses[1] < losses[0] and found.selection != patch.selection
    exact = graft(context(base), delta, entries=300, rounds=6, learning_rate=3.0, exact=True)
    assert exact.count() == 300
    assert (exact.selection & found.selection).count() == min(300, found.count())


def test_grafting_chooses_the_grafts_entries(llama_folder):
    base = load_base(llama_folder)
    method = make("grafting:steps=3,density=0.01,rounds=2,examples=2")
    assert method.select(context(base)).count() == method.budget(targets(base))
    everything = Selection.of(base.model, [target.name for target in targets(base)])
    tuned = trial(context(base), everything, steps=3, learning_rate=0.001)
    patch = make("grafting:steps=3,learning_rate=0.001,density=0.01,rounds=0").select(context(base))
    assert patch.count() == method.budget(targets(base))
    assert are_the_largest(patch, {name: tuned.change(name).abs() for name in everything.names()})
