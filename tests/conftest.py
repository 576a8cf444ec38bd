"""What all tests share: tiny random models of several architectures, and the built-in base where it is in the cache."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.tiny import ARCHITECTURES, save_tiny

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))  # results are the same to the bit at one number only


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """Architecture -> a saved tiny base."""
    return {name: save_tiny(name, tmp_path_factory.mktemp(name)) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def llama_folder(tiny_folders):
    return tiny_folders["llama"]


def pytest_collection_finish():
    """Leave what was imported out of garbage collections: every training begins with one, which would take half a second each time."""
    gc.collect()
    gc.freeze()
