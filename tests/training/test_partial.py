"""Parts of weights train as a masked dense training would, and cost the part."""

import copy

import pytest
import torch

from selectune import catalogue
from selectune.adapters import load_specialist
from selectune.meter import Cost
from selectune.models import Anatomy, load_base
from selectune.models.head import SplitModel
from selectune.parameters.selection import Part, Selection
from selectune.training.partial import _Product, entries, multiplications, release_entries, train_entries
from selectune.training.steps import flops
from tests.tiny import ARCHITECTURES, tiny

FORMS = ["rows", "columns", "blocks", "elements", "few_elements", "vector"]


def choose(model, form, seed=0):
    """A part of every matrix (or vector) of the second block, and of the embedding where it can be."""
    generator = torch.Generator().manual_seed(seed)
    block = Anatomy.of(model).blocks[1]
    parts = {}
    for name, value in model.named_parameters():
        if name not in block.parameters or (form == "vector") != (value.dim() == 1):
            continue
        shape = tuple(value.shape)
        if form == "vector" or (value.dim() > 2 and form != "rows"):
            parts[name] = Part(shape, "elements", torch.randperm(value.numel(), generator=generator)[:5])
        elif form == "rows":
            parts[name] = Part(shape, "rows", torch.randperm(shape[0], generator=generator)[: max(1, shape[0] // 4)])
        elif form == "columns":
            parts[name] = Part(shape, "columns", torch.randperm(shape[1], generator=generator)[:3])
        elif form == "blocks":
            size = 16 if shape[0] % 16 == shape[1] % 16 == 0 else 3
            count = -(-shape[0] // size) * -(-shape[1] // size)
            parts[name] = Part(shape, "blocks", torch.randperm(count, generator=generator)[:3], size)
        elif form == "few_elements":
            parts[name] = Part(shape, "elements", torch.arange(4) * shape[1])  # of one column
        else:
            parts[name] = Part(shape, "elements", torch.randperm(value.numel(), generator=generator)[:40])
    entry = Anatomy.of(model).embeddings[0]
    if form in ("rows", "elements"):
        shape = tuple(model.get_parameter(entry).shape)
        index = [5, 9, 11] if form == "rows" else [5 * shape[1] + 2, 9 * shape[1], 11 * shape[1] + 1]
        parts[entry] = Part(shape, form, index)
    return Selection(dict(sorted(parts.items())))


def loss(model):
    split, objective = SplitModel(model), catalogue.create("objectives", "cross_entropy")
    ids = torch.tensor([[5, 9, 11, 5, 7, 30, 31, 9, 12, 40], [3, 5, 8, 11, 9, 2, 6, 7, 50, 51]])
    return objective.total(split.logits, split.hidden(input_ids=ids), ids)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_the_dense_ones_at_the_part(architecture, form):
    dense = tiny(architecture).requires_grad_(True)
    loss(dense).backward()
    model = tiny(architecture)
    model.load_state_dict(dense.state_dict())
    selection = choose(model, form)
    train_entries(model, selection)
    loss(model).backward()
    found = entries(model)
    assert found.keys() == selection.parts.keys()
    weights = dict(dense.named_parameters())
    for name, values in found.items():
        part = selection.parts[name]
        part = part.flat() if values.dim() == 1 else part
        expected = part.take(weights[name].grad) if weights[name].grad is not None else torch.zeros_like(values)
        mine = values.grad if values.grad is not None else torch.zeros_like(values)
        assert torch.allclose(mine, expected, atol=2e-4, rtol=1e-3), name
    assert sum(v.numel() for v in model.parameters() if v.requires_grad) == selection.count()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_training_a_part_is_masked_dense_training(architecture, form, tiny_folders, tmp_path):
    """Three steps of AdamW with decay: the same weights as dense training with masked updates, the rest bit-identical."""
    base = load_base(tiny_folders[architecture], dtype=torch.float32)
    original = {name: value.clone() for name, value in base.model.named_parameters()}
    selection = choose(base.model, form)
    dense = load_base(tiny_folders[architecture], dtype=torch.float32).model.requires_grad_(True)
    made = catalogue.create("adapters", "full")
    model = made.apply(base, selection, 0)
    ours = torch.optim.AdamW([v for v in model.parameters() if v.requires_grad], lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(dense.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        for one, optimiser in ((model, ours), (dense, theirs)):
            optimiser.zero_grad()
            (loss(one) / 10).backward()
            optimiser.step()
        with torch.no_grad():  # the update is masked, after the optimiser
            for name, value in dense.named_parameters():
                value.copy_(
                    torch.where(selection.mask(name), value, original[name]) if selection.covers(name) else original[name]
                )
    loss(model)  # writes the entries into their weights
    for name, value in dense.named_parameters():
        mine = dict(model.named_parameters())[name]
        mask = selection.mask(name) if selection.covers(name) else torch.zeros(value.shape, dtype=torch.bool)
        assert torch.equal(mine[~mask], original[name][~mask]), name
        assert torch.allclose(mine, value, atol=2e-4), name
    assert any(not torch.equal(dict(model.named_parameters())[name], original[name]) for name in selection.names())
    made.save(model, base, selection, tmp_path)
    loaded = load_specialist(load_base(tiny_folders[architecture], dtype=torch.float32), tmp_path)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4)


@pytest.mark.parametrize("form", ["rows", "columns", "blocks", "elements"])
def test_training_every_part_of_a_matrix_is_training_it_whole(form):
    """Three steps of AdamW: with all rows, columns, squares or entries of the layers as with the layers themselves."""
    blocks = Anatomy.of(tiny("llama")).blocks
    whole = Selection.of(tiny("llama"), [f"{name}.weight" for block in blocks for name in block.linears])
    parts = {}
    for name, part in whole.parts.items():
        down, across = part.shape
        count = {"rows": down, "columns": across, "blocks": down * across // 256, "elements": down * across}[form]
        parts[name] = Part(part.shape, form, range(count), 16)
    ends = []
    for selection in (whole, Selection(parts)):
        model = tiny("llama")
        optimiser = torch.optim.AdamW(train_entries(model, selection).values(), lr=1e-3, weight_decay=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            (loss(model) / 10).backward()
            optimiser.step()
        release_entries(model, torch.float32)
        ends.append(model.state_dict())
    began = tiny("llama").state_dict()
    for name, value in ends[0].items():
        assert torch.equal(value, began[name]) != whole.covers(name), name
        assert torch.allclose(ends[1][name], value, atol=1e-5), name


@pytest.mark.parametrize("form", ["rows", "columns", "blocks", "elements"])
def test_bf16_weights_hold_fp32_entries(form):
    """Updates far below bf16's resolution add up in the entries and reach the weight when they are large enough."""
    model = tiny("llama").to(torch.bfloat16)
    selection = choose(model, form)
    made = train_entries(model, selection)
    name = next(n for n in made if "mlp" in n)
    before = made[name].detach().clone()
    for _ in range(40):
        with torch.no_grad():
            made[name].mul_(1 + 2**-10)
        with torch.autocast("cpu", torch.bfloat16):
            loss(model)
    assert torch.allclose(made[name], before * (1 + 2**-10) ** 40, rtol=1e-5)
    part = selection.parts[name]
    assert torch.equal(part.take(model.get_parameter(name)), made[name].bfloat16())


def test_the_product_has_the_size_of_the_part():
    shape = (96, 64)
    assert _Product(Part(shape, "rows", [1, 5])).multiplications() == 2 * 64
    assert _Product(Part(shape, "columns", [1, 5, 7])).multiplications() == 96 * 3
    assert _Product(Part(shape, "blocks", [0, 9, 20], 16)).multiplications() == 3 * 256
    assert _Product(Part(shape, "elements", [0, 1, 63])).multiplications() == 64  # of one row
    assert _Product(Part(shape, "elements", [0, 64, 64 * 90])).multiplications() == 96  # of one column


@pytest.mark.parametrize("index", [[0, 1, 63], [0, 64, 64 * 90], [5], list(range(3, 96 * 64, 17)), [0, 64 * 96 - 1]])
def test_a_few_scattered_entries_are_summed_one_by_one(index):
    """They cost a product each, whatever rows and columns they lie in, and are those of the whole product."""
    left, right = torch.randn(50, 96), torch.randn(50, 64)
    part = Part((96, 64), "elements", index)
    product = _Product(part, one_by_one=True)
    met = [values if chosen is None else values[:, chosen] for values, chosen in ((left, product.rows), (right, product.columns))]
    assert torch.allclose(product(*met), part.take(left.t() @ right), atol=1e-4)
    few = len(index) * 16 <= met[0].shape[1] * met[1].shape[1]
    assert product.multiplications() == (len(index) if few else met[0].shape[1] * met[1].shape[1])


def test_sums_one_by_one_are_for_fp32_alone():
    """In bf16 the whole product is faster."""
    for dtype, count in ((torch.float32, 2), (torch.bfloat16, 96)):
        layer = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False)).to(dtype)
        train_entries(layer, Selection({"0.weight": Part((96, 64), "elements", [0, 64 * 90])}))
        assert multiplications(layer) == count


def test_operations_count_the_products():
    model = tiny("llama")
    anatomy = Anatomy.of(model)
    name, shape = "model.layers.2.mlp.up_proj.weight", (128, 64)
    train_entries(model, Selection({name: Part(shape, "rows", [1, 5])}))
    assert multiplications(model) == 2 * 64
    block = sum(anatomy.sizes[n] for n in anatomy.blocks[0].parameters)
    cost = Cost(stage="train", forward_tokens=10, backward_tokens=10)
    assert flops(anatomy, model, cost) == 2 * (10 * 4 * block + 10 * (2 * block + 2 * 64))
    train_entries(other := tiny("llama"), Selection({"model.embed_tokens.weight": Part((anatomy.vocabulary, 64), "rows", [3])}))
    assert flops(anatomy, other, cost) == 2 * (10 * 4 * block + 10 * (4 * block + 64))


def test_columns_keep_only_their_inputs():
    """Of a layer's input, training k columns keeps k columns for the backward pass."""
    layer = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    train_entries(layer, Selection({"0.weight": Part((32, 64), "columns", [3, 4])}))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(torch.randn(100, 64)).sum().backward()
    assert (100, 2) in kept and (100, 64) not in kept


def test_gradient_checkpointing_computes_the_same():
    ways = []
    for checkpointed in (False, True):
        model = tiny("llama")
        train_entries(model, choose(model, "blocks"))
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss(model).backward()
        ways.append({name: value.grad for name, value in entries(model).items()})
    assert all(torch.allclose(ways[0][name], ways[1][name], atol=1e-6) for name in ways[0])


@pytest.mark.parametrize("form", [*FORMS, "whole"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_released_entries_leave_a_plain_model_with_their_values(architecture, form):
    model = tiny(architecture)
    kinds = {name: type(module) for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    selection = choose(model, form) if form != "whole" else Selection.of(model, Anatomy.of(model).blocks[1].parameters)
    made = train_entries(model, selection)
    with torch.no_grad():
        for value in made.values():
            value.add_(1.0)
    loss(model).backward()
    expected = loss(model).detach()
    values = release_entries(model, torch.float32)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert model.state_dict().keys() == before.keys() and not any(value.requires_grad for value in model.parameters())
    assert torch.allclose(loss(model), expected, rtol=1e-5)
    tied = {name for name, value in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    for name, value in model.state_dict().items():
        if name in tied:
            continue
        changed = selection.mask(name) if selection.covers(name) else torch.zeros(value.shape, dtype=torch.bool)
        assert torch.equal(value[~changed], before[name][~changed]) and torch.equal(value[changed], before[name][changed] + 1), (
            name
        )
    assert values.keys() == set(selection.names())
    again = train_entries(model, selection)
    assert all(torch.equal(again[name], value) for name, value in values.items())


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_copy_trains_its_own_entries(architecture, tiny_folders):
    model = load_base(tiny_folders[architecture], dtype=torch.float32).model
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    stack = next((name for name, shape in shapes.items() if len(shape) == 3 and ".layers.1." in name), None)
    parts = {
        "model.embed_tokens.weight": ("rows", [5, 9, 17]), "model.layers.2.input_layernorm.weight": ("elements", [1, 4]),
        "model.layers.1.self_attn.q_proj.weight": ("elements", list(range(0, 900, 7))),
    } | ({stack: ("rows", [1, 2])} if stack else {})  # fmt: skip
    made = train_entries(model, Selection({name: Part(shapes[name], form, index) for name, (form, index) in parts.items()}))
    ids = torch.tensor([[5, 9, 17, 30, 21, 8, 60, 61, 62, 63]])
    other = copy.deepcopy(model)
    before = other(input_ids=ids).logits.detach()
    with torch.no_grad():
        for value in made.values():
            value.add_(0.5)
    assert torch.equal(other(input_ids=ids).logits, before) and not torch.allclose(model(input_ids=ids).logits, before, atol=1e-3)
    other(input_ids=ids, labels=ids).loss.backward()
    assert all(value.grad is None for value in made.values())
    own = [value for name, value in other.named_parameters() if "entries_of_" in name and value.requires_grad]
    assert len(own) == len(made) and all(value.grad is not None and value.grad.abs().sum() > 0 for value in own)
