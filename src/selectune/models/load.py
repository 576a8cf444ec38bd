"""Loads a base model, whatever form it comes in.

Knows: the built-in base, transformers folders, GGUF files (converted once, into the user's cache) and hub ids; that weights
are safetensors or GGUF and never pickle; what can be wrong with each and how to say it.
Does not know: what the model is for.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selectune.errors import UserError, nearest, out_of_memory
from selectune.hub import hub_is_there
from selectune.models.anatomy import Anatomy
from selectune.models.builtin import BUILTIN, GGUF_SHA256, cache_folder, fetch_gguf
from selectune.models.machine import accelerator, bf16_is_fast
from selectune.run import folder_atomically, hash_file

PLAIN_CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)  # for bases that bring no chat template


@dataclass
class Base:
    """A loaded base model."""

    model: Any
    """A transformers causal language model in evaluation mode."""
    tokenizer: Any
    """With a chat template and a padding token."""
    anatomy: Anatomy
    fingerprint: str
    """Hash of the weights and the configuration."""
    source: Path
    """The transformers folder it was loaded from."""
    spec: str
    """How the user named it."""
    dtype: torch.dtype = torch.float32
    """Of the weights on disk; the model in memory may be in another."""
    quantised: bool = False
    notes: list[str] = field(default_factory=list)
    """Things a user should know, such as a chat template that was supplied."""


def load_base(
    spec: str | Path,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    quantised: bool = False,
    device: torch.device | str | None = None,
) -> Base:
    """Load a base.

    Args:
        spec: the built-in name, a transformers folder, a ``.gguf`` file, or a hub id.
        dtype: of the weights; ``"auto"`` keeps the base's own, ``"fast"`` too, but for fp32 in place of bf16 on a machine without units for it.
        trust_remote_code: let a model run code of its own.
        quantised: load the linear layers in 4 bits (NF4, double quantisation), on a CPU too.
        device: where the model lies; left out, where models compute here, see :func:`selectune.models.machine.accelerator`.

    Raises:
        UserError: it is not there, not readable, damaged, not a causal model, or in pickle format.
    """
    spec = str(spec)
    source = locate(spec)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": source.exists() or not hub_is_there()}
    try:
        config = AutoConfig.from_pretrained(str(source), **options)
    except (ValueError, KeyError, OSError) as error:
        raise _explain(error, spec, source, "config.json") from None
    _check_causal(config, spec)
    own = getattr(config, "dtype", None) or torch.float32
    own = getattr(torch, own) if isinstance(own, str) else own
    if dtype in ("auto", "fast"):
        slow = own == torch.float16 or (dtype == "fast" and own == torch.bfloat16 and not bf16_is_fast())
        dtype = torch.float32 if slow else own  # fp16 has no products worth using on a CPU
    if quantised:
        options["quantization_config"] = _nf4(torch.float32 if dtype in (torch.float32, "float32") else torch.bfloat16)
    try:
        with _quietly():
            model: Any = AutoModelForCausalLM.from_pretrained(str(source), dtype=dtype, use_safetensors=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(
                str(source), trust_remote_code=trust_remote_code, local_files_only=options["local_files_only"]
            )
    except (ValueError, KeyError, OSError, RuntimeError, TypeError, ImportError) as error:
        raise _explain(error, spec, source, "the model") from None
    except Exception as error:  # safetensors raises its own kind, which is no subclass of anything above
        if type(error).__name__ not in ("SafetensorError", "SafetensorsError"):
            raise
        raise UserError(f"the weights are damaged ({error})", file=source, mend="copy or download them again") from None
    if quantised:
        _keep_layout(model)
    else:
        model.to(accelerator() if device is None else device)
    notes = _complete(tokenizer)
    model.eval()
    model.requires_grad_(False)
    return Base(model, tokenizer, Anatomy.of(model), fingerprint(source, spec), source, spec, own, quantised, notes)


def locate(spec: str) -> Path:
    """Return the transformers folder of a base (a hub id is returned as it is), converting a GGUF file if need be."""
    if spec == BUILTIN:
        return _converted(GGUF_SHA256, None)
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError("no such GGUF file", file=path, field="base")
        _check_gguf(path)
        return _converted(hash_file(path), path)
    if path.is_dir():
        _check_folder(path)
        return path
    if path.exists():
        raise UserError("is not a model", file=path, field="base", expected="a transformers folder or a .gguf file")
    parts = spec.split("/")
    if len(parts) != 2 or spec.startswith((".", "/", "~")) or not all(parts):
        raise UserError(
            f"no such base '{spec}'{nearest(spec, [BUILTIN])}", field="base",
            expected=f"'{BUILTIN}', a transformers folder, a .gguf file, or a hub id such as owner/name",
        )  # fmt: skip
    return Path(spec)


def fingerprint(source: Path, spec: str = "") -> str:
    """Return a hash of a base's configuration and weights (of the hub id, where the files are the hub's)."""
    if not source.is_dir():
        return f"hub:{spec}"
    hashes = {p.name: hash_file(p) for p in sorted(source.glob("*.safetensors"))}
    config = (source / "config.json").read_text(encoding="utf-8")
    from selectune.run import fingerprint as of

    return of({"weights": hashes, "config": json.loads(config)})


def _converted(sha256: str, gguf: Path | None) -> Path:
    """Return the cached conversion of a GGUF file (of the built-in one, when ``gguf`` is None)."""
    folder = cache_folder() / "bases" / sha256[:16]
    if (folder / "config.json").exists():
        return folder
    try:
        with folder_atomically(folder) as temporary:
            file = gguf or fetch_gguf(temporary)
            _convert(file, temporary)
            for rest in [*temporary.glob("*.gguf"), *temporary.glob("*.whl")]:
                rest.unlink()
    except OSError as error:
        if (folder / "config.json").exists():  # another process was faster
            return folder
        raise UserError(
            f"the cache cannot be written ({error})", file=folder, mend="free space, or set SELECTUNE_CACHE"
        ) from None
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with _quietly():
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=_dtype_of(gguf), quantization_config=GgufConfig(dequantize=True)
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # a damaged or unknown file meets transformers' and gguf's readers anywhere: they have no error of their own for it
    except (ValueError, KeyError, OSError, RuntimeError, NotImplementedError, IndexError, TypeError) as error:
        _check_memory(error, gguf)
        raise UserError(f"transformers cannot read this GGUF file ({_first_line(error)})", file=gguf, field="base",
                        mend="name a transformers folder of the same model") from None  # fmt: skip
    model.config.name_or_path = gguf.stem
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with _quietly():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _dtype_of(gguf: Path) -> torch.dtype:
    """Return the dtype that holds a GGUF file's matrices: their own for fp32 and fp16 (as fp32), bf16 for 4-bit and the like."""
    from gguf import GGMLQuantizationType, GGUFReader

    kinds = {tensor.tensor_type for tensor in GGUFReader(gguf).tensors if len(tensor.shape) > 1}
    return torch.float32 if kinds <= {GGMLQuantizationType.F32, GGMLQuantizationType.F16} else torch.bfloat16


def _check_gguf(path: Path) -> None:
    """Refuse a file that is not GGUF, or ends before its last tensor."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except PermissionError:
        raise UserError("may not be read", file=path, field="base", mend="change its permissions") from None
    if magic != b"GGUF":
        raise UserError("is not a GGUF file", file=path, field="base", expected="a file that begins with 'GGUF'")
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        end = max(int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"the GGUF file is truncated or damaged ({_first_line(error)})", file=path, field="base",
                        mend="copy or download it again") from None  # fmt: skip
    if end > path.stat().st_size:
        raise UserError(f"the GGUF file is truncated: {path.stat().st_size:,} bytes", file=path, field="base",
                        expected=f"at least {end:,} bytes", mend="copy or download it again")  # fmt: skip


def _check_folder(path: Path) -> None:
    try:
        names = {item.name for item in path.iterdir()}
    except PermissionError:
        raise UserError("may not be read", file=path, field="base", mend="change its permissions") from None
    if "config.json" not in names:
        hint = next((name for name in sorted(names) if name.endswith(".gguf")), None)
        raise UserError("holds no model (no config.json)", file=path, field="base",
                        expected="a transformers folder", mend=f"name the file {path / hint}" if hint else None)  # fmt: skip
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in sorted(names) if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        raise UserError(
            f"holds only pickle weights ({pickles[0]}), which can run code when loaded" if pickles else "holds no weights",
            file=path, field="base", expected="model.safetensors",
            mend="convert them where you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)",
        )  # fmt: skip


def _check_causal(config: Any, spec: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = getattr(config, "model_type", "?")
    names = getattr(config, "architectures", None) or []
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(config, "auto_map", None)
    if not causal or (names and not any("Causal" in n or "LMHead" in n or "Conditional" in n for n in names)):
        raise UserError(f"is not a causal language model (it is {names[0] if names else kind})", file=spec, field="base",
                        expected="a model that continues text, such as a Llama, Qwen, Gemma or GPT-2")  # fmt: skip


def _complete(tokenizer: Any) -> list[str]:
    notes = []
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.pad_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_CHAT
        notes.append("the base brings no chat template; a plain 'role: content' one is used")
    return notes


def _nf4(compute: torch.dtype) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError("QLoRA needs bitsandbytes", field="form", mend="pip install bitsandbytes") from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _keep_layout(model: Any) -> None:
    """Keep 4-bit weights in their own layout.

    On a CPU with bf16 instructions bitsandbytes lays them out anew at the first forward pass in evaluation mode, and its product
    in that layout has no backward pass: gradients would be silently wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dequantise(model: Any) -> None:
    """Give 4-bit layers the weights that they stand for, in the dtype they compute in: more memory, the same products, faster."""
    from bitsandbytes.functional import dequantize_4bit

    layers = [(name, module) for name, module in model.named_modules() if hasattr(getattr(module, "weight", None), "quant_state")]
    for name, layer in layers:
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, dtype=weight.dtype, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    model.config.quantization_config = None
    for flag in ("is_loaded_in_4bit", "is_quantized"):
        if hasattr(model, flag):
            setattr(model, flag, False)


def _check_memory(error: Exception, file: Path) -> None:
    """Refuse a base for which memory does not suffice: its files are sound."""
    if out_of_memory(error):
        raise UserError("out of memory while the base was loaded", file=file, field="base",
                        mend="take a smaller base, or free memory") from None  # fmt: skip


def _explain(error: Exception, spec: str, source: Path, what: str) -> UserError:
    _check_memory(error, source)
    text = _first_line(error)
    if not source.exists():
        return UserError(f"no hub is reachable, or it has no such model ({text[:160]})", field="base", file=spec,
                         mend="check the name and the connection, or name a local folder or GGUF file")  # fmt: skip
    if "tokenizer" in str(error).lower():
        return UserError(f"has no usable tokenizer ({text[:160]})", file=source, field="base",
                         expected="tokenizer.json beside the weights")  # fmt: skip
    return UserError(f"{what} cannot be read ({text[:200]})", file=source, field="base", mend="check the folder's files")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the loaders' own progress bars and notices."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def clear_cache() -> None:
    """Remove every converted base."""
    shutil.rmtree(cache_folder() / "bases", ignore_errors=True)


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
