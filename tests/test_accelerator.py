"""Where the base lies on an accelerator, everything is measured, chosen and trained as on the CPU; on a pretended one, see pretended.py."""

import shutil
from dataclasses import astuple

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from selectune import catalogue
from selectune.data import Encoder, pack
from selectune.evaluation import forgetting
from selectune.evaluation.drift_probe import mass_on
from selectune.evaluation.novelty import Novelty, novelties
from selectune.evaluation.scorer import Scorer
from selectune.examples import Pool
from selectune.examples.factors.last_block import Effort
from selectune.examples.factors.signals import GradientSketch, ResponseLoss
from selectune.examples.factors.store import measure
from selectune.models import load_base
from selectune.parameters import Selection
from selectune.parameters.factors.gradients import batch_of
from selectune.parameters.overlap import overlap, total
from selectune.training.loss import LossOfModel
from selectune.training.partial import train_entries
from tests.contracts.test_parameters import RECORDS, context, make
from tests.pretended import Pretended, moved, pretended_accelerator
from tests.tiny import tiny, tokenizer
from tests.training.policies import running
from tests.training.policies.running import run
from tests.training.test_partial import choose

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bases lie on a real accelerator here")
WORDS = tokenizer()
PROMPTS = [[5, 9, 30], [77, 12, 200, 31], [77, 12, 200, 31, 4, 5, 6]]
PAIRS = [(prompt, continuation) for prompt in PROMPTS for continuation in ([4], [8, 9, 10], [3, 44])]
PIECES = [piece for record in RECORDS for piece in Encoder(WORDS, 128).encode(record)]


def model(seed=0, **changes):
    return tiny("llama", seed, num_hidden_layers=2, **changes)


def base_there(folder):
    """Return a base that lies on the accelerator; to be called outside of it, where files are read."""
    base = load_base(folder)
    moved(base.model)
    return base


def close(one, other):
    """Whether what was measured twice is the same, but for the last digits."""
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(close, one, other))
    return one == pytest.approx(other, rel=1e-4, abs=1e-4) if isinstance(one, float) else one == other


# -- the accelerator itself ------------------------------------------------------------------------------------------


def test_the_pretended_accelerator_computes_what_the_cpu_does():
    ids = torch.arange(3, 40)[None]
    expected = model()(input_ids=ids, use_cache=False).logits
    with pretended_accelerator() as device:
        there = moved(model())
        assert there.lm_head.weight is there.model.embed_tokens.weight
        found = there(input_ids=ids.to(device), use_cache=False).logits
        assert isinstance(found, Pretended) and found.device == device
        assert torch.allclose(found.cpu(), expected, atol=1e-4)
        made = torch.tensor([1.0, 2.0, 3.0], device=device)
        made[[0, 2]] = 5.0
        made[torch.tensor([False, True, False])] = torch.tensor([4.0], device=device)
        made.data = made.data.double()
        assert made.tolist() == [5.0, 4.0, 5.0] and made.dtype == torch.float64


REFUSED = {
    "a sum of two devices": lambda near, far: near + far,
    "a product of two devices": lambda near, far: far[:, None] @ near[None],
    "a result on the CPU": lambda near, far: torch.add(far, far, out=near),
    "a sum into the CPU's": lambda near, far: near.add_(far),
    "a sum into a number of the CPU": lambda near, far: near[0].add_(far[0]),
    "parts of two devices": lambda near, far: torch.cat([near, far]),
    "CPU indices in gather": lambda near, far: far.gather(0, near.long()),
    "CPU tokens in an embedding": lambda near, far: torch.nn.functional.embedding(near.long(), far[:, None]),
    "a CPU tensor by indices on the device": lambda near, far: near[far.long()],
    "a CPU tensor by a mask on the device": lambda near, far: near.__setitem__(far > 1, 0.0),
    "CPU values at places": lambda near, far: far.__setitem__(near.long(), near),
    "CPU values by where": lambda near, far: torch.where(far > 1, far, near),
    "a CPU generator": lambda near, far: far.bernoulli_(0.5, generator=torch.Generator()),
    "a CPU generator for new numbers": lambda near, far: torch.randn(3, generator=torch.Generator(), device=far.device),
    "numpy": lambda near, far: far.numpy(),
    "numpy's own way": lambda near, far: np.asarray(far),
}
ALLOWED = {
    "a number from the CPU": lambda near, far: far * torch.tensor(2.0),
    "CPU indices": lambda near, far: far[near.long()],
    "a CPU mask": lambda near, far: far[near > 1],
    "a copy from the CPU": lambda near, far: far.copy_(near),
    "a copy to the CPU": lambda near, far: near.copy_(far).numpy(),
    "numbers": lambda near, far: (far.tolist(), float(far.sum()), len(far), bool((far > 1).any())),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses(what):
    with pretended_accelerator() as device, pytest.raises((RuntimeError, TypeError)):
        REFUSED[what](torch.arange(3.0), torch.arange(3.0).to(device))


@pytest.mark.parametrize("what", ALLOWED)
def test_it_allows(what):
    with pretended_accelerator() as device:
        ALLOWED[what](torch.arange(3.0), torch.arange(3.0).to(device))


# -- evaluation ------------------------------------------------------------------------------------------------------

MEASURED = {
    "log-likelihoods": lambda base, other: Scorer(base, WORDS).loglikelihoods(PAIRS),
    "log-likelihoods in fp32 of a base in bf16": lambda base, other: Scorer(base.bfloat16(), WORDS).loglikelihoods(PAIRS),
    "token losses": lambda base, other: Scorer(base, WORDS).token_nll([piece.input_ids for piece in PIECES]),
    "answers": lambda base, other: Scorer(base, WORDS).generate(PROMPTS * 2, 9, ["x"]),
    "forgetting": lambda base, other: forgetting.compare(Scorer(base, WORDS), Scorer(other, WORDS), PAIRS),
    "drift": lambda base, other: astuple(mass_on(base, PROMPTS, [7, 8, 9], steps=4)),
    "novelty": lambda base, other: [astuple(one) for one in novelties(other, base, WORDS, Novelty(rounds=2, tokens=5))],
}


@pytest.mark.parametrize("what", MEASURED)
def test_evaluation_measures_the_same(what):
    expected = MEASURED[what](model(), model(seed=1))
    with pretended_accelerator():
        found = MEASURED[what](moved(model()), moved(model(seed=1)))
    assert close(found, expected)


# -- choosing weights ------------------------------------------------------------------------------------------------

CHOSEN = [
    ("llama", "random", {}),
    ("llama", "speft", {"score": "magnitude"}),
    ("llama", "speft", {"score": "gradient"}),
    ("llama", "gps", {}),
    ("llama", "scored", {"score": "true_fisher"}),
    ("llama", "fisher_blocks", {"labels": "sampled"}),
    ("llama", "lt_sft", {}),
    ("llama", "smt", {}),
    ("llama", "weak_columns", {}),
    ("llama", "conductance", {"unit": "block"}),
    ("llama", "scored", {"granularity": "head", "density": 0.3}),
    ("mixtral", "esft", {}),
]


@pytest.mark.parametrize(("architecture", "name", "values"), CHOSEN)
def test_the_same_weights_are_chosen(architecture, name, values, tiny_folders):
    expected = make(name, **values).select(context(load_base(tiny_folders[architecture])))
    base = base_there(tiny_folders[architecture])
    with pretended_accelerator():
        found = make(name, **values).select(context(base))
    assert not any(isinstance(part.index, Pretended) for part in found.parts.values())
    assert total(overlap(found, expected).values()).jaccard > 0.99  # attention is computed in another order


# -- training --------------------------------------------------------------------------------------------------------


def gradients(trained):
    """Return the loss of a batch of packed records, and the gradients of all that trains."""
    rows = pack(PIECES, 96)
    whole = LossOfModel(trained, catalogue.create("objectives", "cross_entropy"), False)
    with whole.attending(rows):
        loss = whole(**batch_of(trained, rows[:2]))
        loss.backward()
    found = {name: value.grad for name, value in trained.named_parameters() if value.grad is not None}
    return {name: value.detach().cpu() for name, value in {"loss": loss, **found}.items()}


def alike(one, other):
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-4) for name in one)


@pytest.mark.parametrize("form", ["rows", "columns", "blocks", "elements"])
def test_parts_have_the_same_gradients(form):
    def found(base):
        made = train_entries(base, choose(base, form))
        measured = gradients(base)
        assert len(measured) == len(made) + 1
        return measured

    expected = found(model())
    with pretended_accelerator():
        assert alike(found(moved(model())), expected)


def test_an_adapter_has_the_same_gradients(llama_folder):
    def found(base):
        return gradients(catalogue.create("adapters", "lora").apply(base, Selection.all(base.model), 0))

    expected, base = found(load_base(llama_folder)), base_there(llama_folder)
    assert len(expected) > 1
    with pretended_accelerator():
        assert alike(found(base), expected)


def test_a_run_trains_the_same_and_goes_on_from_a_checkpoint_made_on_a_cpu(monkeypatch, tmp_path, llama_folder):
    policy = {"method": "soft_mask", "examples": 2}
    expected = run(tmp_path / "cpu", llama_folder, policy, steps=2).after
    shutil.copytree(tmp_path / "cpu/checkpoints/checkpoint-1", tmp_path / "resumed/checkpoints/checkpoint-1")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    for folder in ("whole", "resumed"):
        base = base_there(llama_folder)
        monkeypatch.setattr(running, "load_base", lambda folder, dtype, base=base: base)
        with pretended_accelerator():
            found = run(tmp_path / folder, llama_folder, policy, steps=2).after
        assert all(isinstance(value, Pretended) for value in found.values())
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name].cpu(), expected[name], atol=1e-3) for name in expected)  # a tenth of a step
    AcceleratorState._reset_state(True)


# -- choosing examples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "signal", [ResponseLoss(), GradientSketch(dimension=64, rank=2), Effort()], ids=lambda one: type(one).__name__
)
def test_signals_are_the_same(signal, llama_folder):
    def found(base):
        return measure(Pool(RECORDS, lambda: base, lambda words: Encoder(words, 128), quiet=True), signal)

    expected, base = found(load_base(llama_folder)), base_there(llama_folder)
    with pretended_accelerator():
        assert np.allclose(found(base), expected, rtol=1e-3, atol=1e-5)
