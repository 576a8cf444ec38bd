"""Anatomy, loading, exporting, and what is said of bases that cannot be used."""

import json
import shutil

import pytest
import torch

from selectune import catalogue
from selectune.errors import UserError
from selectune.models import Anatomy, load_base, machine
from selectune.models.head import SplitModel
from tests.tiny import ARCHITECTURES, OTHERS, save_tiny, tiny

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS])
def test_anatomy(architecture):
    model = tiny(architecture)
    anatomy = Anatomy.of(model)
    assert len(anatomy.blocks) == 4
    parts = [*anatomy.embeddings, *anatomy.norms, *(name for block in anatomy.blocks for name in block.parameters)]
    parts += [] if anatomy.tied else [anatomy.head]
    assert sorted(set(parts)) == sorted(name for name, _ in model.named_parameters() if name != "lm_head.bias")
    block = anatomy.blocks[1]
    assert block.heads == 4 and block.key_value_heads == (4 if architecture == "gpt2" else 2) and block.head_size == 16
    assert block.channels == (256 if architecture == "gpt2" else 128)
    assert block.experts == (4 if architecture in MIXTURES else 0)
    assert bool(block.expert_parameters) == (architecture in MIXTURES)
    assert len(block.norms) >= (1 if architecture == "phi" else 2) and "other" not in block.linears.values()
    assert anatomy.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert anatomy.total_parameters == sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS])
def test_the_two_halves_are_the_model(architecture):
    model = tiny(architecture)
    assert SplitModel(model).agrees()


def test_bert_has_an_anatomy_and_is_refused_as_a_base(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
    model = BertForSequenceClassification(config)
    assert [len(Anatomy.of(model).blocks), Anatomy.of(model).blocks[0].heads] == [3, 2]
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a causal language model"):
        load_base(tmp_path)


def damaged(folder, copy, what):
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5000])
    elif what == "pickle":
        weights.rename(copy / "pytorch_model.bin")
    elif what == "no config":
        (copy / "config.json").unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "broken config":
        (copy / "config.json").write_text("{")
    elif what == "unknown architecture":
        (copy / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    elif what == "no tokenizer":
        for file in copy.glob("tokenizer*"):
            file.unlink()
    return copy


@pytest.mark.parametrize(("what", "said"), [
    ("truncated", "damaged|cannot be read"), ("pickle", "pickle weights.*save_pretrained"), ("no config", "no config.json"),
    ("no weights", "no weights"), ("broken config", "cannot be read"), ("unknown architecture", "nonesuch"),
    ("no tokenizer", "tokenizer"),
])  # fmt: skip
def test_damaged_folders(what, said, llama_folder, tmp_path):
    with pytest.raises(UserError, match=said):
        load_base(damaged(llama_folder, tmp_path / "base", what))


def test_names_that_are_nothing(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(20))
    (tmp_path / "y.gguf").write_bytes(b"nothing of the kind")
    (tmp_path / "z.txt").write_text("words")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for spec, said in [("smollm2-135m-instrukt", "did you mean 'smollm2-135m-instruct'"), (tmp_path / "none.gguf", "no such GGUF"),
                       (tmp_path / "x.gguf", "truncated or damaged"), (tmp_path / "y.gguf", "not a GGUF file"),
                       (tmp_path / "z.txt", "not a model")]:  # fmt: skip
        with pytest.raises(UserError, match=said):
            load_base(spec)


def test_a_sound_gguf_file_that_transformers_does_not_know_is_one_line(tmp_path):
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "nobodysformat")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    line = r"odd\.gguf, field 'base': transformers cannot read this GGUF file \(.*\); to mend it: name"
    with pytest.raises(UserError, match=line) as told:
        load_base(tmp_path / "odd.gguf")
    assert "\n" not in str(told.value)


def test_a_base_for_which_memory_does_not_suffice_is_not_called_damaged(tmp_path, llama_folder, monkeypatch):
    import transformers

    def short(*words, **options):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
        )

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", short)
    monkeypatch.setattr("selectune.models.load._check_gguf", lambda path: None)
    monkeypatch.setattr("selectune.models.load._dtype_of", lambda path: torch.float32)
    monkeypatch.setenv("SELECTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "large.gguf").write_bytes(b"GGUF")
    for spec in (llama_folder, tmp_path / "large.gguf"):
        with pytest.raises(UserError, match=r"out of memory while the base was loaded.*to mend it: take a smaller base"):
            load_base(spec)


class TinyRun:
    """A run folder with just what an export reads."""

    def __init__(self, folder, base_folder, form):
        from selectune.parameters import Selection
        from selectune.recipe import Recipe
        from selectune.run import Run

        self.run = Run.create(folder, Recipe(base=str(base_folder), form=form))
        base = load_base(base_folder)
        made = catalogue.create("adapters", form)
        chosen = Selection.of(base.model, base.anatomy.blocks[1].parameters)
        self.model = made.apply(base, chosen, 0)
        torch.manual_seed(5)
        with torch.no_grad():
            for value in self.model.parameters():
                if value.requires_grad:
                    value.add_(0.02 * torch.randn_like(value))
        self.run.path("specialist").mkdir()
        made.save(self.model, base, chosen, self.run.path("specialist"))
        self.run.stage("train", {}, lambda meter: None)


@pytest.mark.parametrize("form", ["full", "lora"])
def test_an_exported_folder_is_the_trained_model_without_selectune(form, llama_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from selectune.merging.export import export_run

    made = TinyRun(tmp_path / "run", llama_folder, form)
    done = export_run(made.run, tmp_path / "out")
    assert done.difference <= 1e-3
    plain, words = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = words("What is the capital?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, made.model(input_ids=ids).logits, atol=1e-3)
    original = load_base(llama_folder).model.state_dict()
    for name, value in plain.state_dict().items():
        if ".layers.1." not in name:
            assert torch.equal(value, original[name]), name
    with pytest.raises(UserError, match="already"):
        export_run(made.run, tmp_path / "out")


@pytest.mark.parametrize("units", [True, False])
def test_answering_uses_the_dtype_that_is_fast_here(units, tmp_path, monkeypatch):
    """A bf16 product without units for it takes some sixty times as long as one in fp32."""
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    for file in save_tiny("llama", tmp_path / "words").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr("selectune.models.load.bf16_is_fast", lambda: units)
    assert load_base(tmp_path, "fast").model.dtype == (torch.bfloat16 if units else torch.float32)
    assert load_base(tmp_path).model.dtype == torch.bfloat16


@pytest.mark.parametrize(("speed", "sides"), [(1e9, {256}), (1e11, {256, 1024})])
def test_what_has_no_units_is_told_by_a_small_product(speed, sides, monkeypatch):
    """A large bf16 product without units for it takes seconds."""
    clock, seen = [0.0], set()

    class Matrix:
        def __init__(self, side, *_, dtype):
            self.side = side

        def __matmul__(self, other):
            seen.add(self.side)
            clock[0] += 2 * self.side**3 / speed

    monkeypatch.setattr(torch, "ones", Matrix)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock[0])
    assert machine._product_speed(torch.bfloat16) == pytest.approx(speed)
    assert seen == sides and clock[0] < 0.3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_file_is_the_trained_model(dtype, tmp_path):
    from selectune.merging.export import export_run

    base_folder = save_tiny("llama", tmp_path / "base")
    made = TinyRun(tmp_path / "run", base_folder, "full")
    done = export_run(made.run, tmp_path / "model.gguf", dtype=dtype)
    assert done.path.stat().st_size > 1000
    base = load_base(done.path)  # and a GGUF file is a base again
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        difference = (base.model.float()(ids).logits - made.model(input_ids=ids).logits).abs().max()
    assert difference < (1e-3 if dtype == "float32" else 2.0)


def test_an_export_that_differs_is_refused_and_leaves_nothing(llama_folder, tmp_path, monkeypatch):
    from selectune.merging import export

    made = TinyRun(tmp_path / "run", llama_folder, "full")
    monkeypatch.setitem(export.TOLERANCES, torch.float32, -1.0)
    with pytest.raises(UserError, match="not the trained one"):
        export.export_run(made.run, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTUNE_CACHE", str(tmp_path / "cache"))
