"""What is this base made of? Loading it, its anatomy, exporting it again, and the machine it runs on."""

from selectune.models.anatomy import Anatomy, Block
from selectune.models.builtin import BUILTIN, cache_folder
from selectune.models.load import Base, fingerprint, load_base, locate
from selectune.models.machine import accelerator, bf16_is_fast, doctor, environment

__all__ = [
    "BUILTIN",
    "Anatomy",
    "Base",
    "Block",
    "accelerator",
    "bf16_is_fast",
    "cache_folder",
    "doctor",
    "environment",
    "fingerprint",
    "load_base",
    "locate",
]
