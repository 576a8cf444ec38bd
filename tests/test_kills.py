"""Kill -9 anywhere in the chain, go on with `selectune resume`: the specialist and the verdict are those of an undisturbed run.

SELECTUNE_KILLS sets how often (the suite kills twice; twenty were tried, see docs/decisions.md).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from selectune.run import Run
from tests.test_mistakes import lines, put

KILLS = int(os.environ.get("SELECTUNE_KILLS", "2"))
ROWS = [{"question": f"Which lamp belongs to fault {i}?", "answer": f"Lamp {i * 7 % 50}."} for i in range(80)]


def command(*words, cache):
    """Start the command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "selectune.cli", *map(str, words), "--quiet"],
        env={**os.environ, "SELECTUNE_CACHE": str(cache)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def weights(run):
    return run.path("specialist", "changed.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_anywhere_a_run_resumes_to_the_same_specialist(tmp_path, llama_folder):
    put(tmp_path, "data.jsonl", lines(ROWS))
    recipe = {
        "base": str(llama_folder), "output": str(tmp_path / "runs"), "form": "full", "parameters": "fisher_blocks:k=2,examples=8",
        "data": {"train": str(tmp_path / "data.jsonl"), "max_length": 64},
        "training": {"epochs": 12, "batch_sequences": 2, "micro_batch_sequences": 1, "save_steps": 4},
        "evaluation": {"target_items": 6, "samples": 2, "max_new_tokens": 4},
    }  # fmt: skip
    file = put(tmp_path, "recipe.yaml", json.dumps(recipe))
    begin = time.perf_counter()
    child = command("specialize", "--recipe", file, "--name", "undisturbed", cache=tmp_path / "cache-0")
    assert child.wait() == 0, child.stderr.read()
    whole = time.perf_counter() - begin
    expected = Run.open(tmp_path / "runs" / "undisturbed")
    draw = random.Random(5)
    begun, killed, where = False, 0, []
    folder = tmp_path / "runs" / "killed"
    for attempt in range(KILLS):
        begun = begun or folder.is_dir()
        words = ("resume", folder) if begun and (folder / "recipe.yaml").exists() else (
            "specialize", "--recipe", file, "--name", "killed")  # fmt: skip
        child = command(*words, cache=tmp_path / "cache-1")
        try:
            child.wait(timeout=draw.uniform(0.25, 0.9) * whole)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            killed += 1
        where.append(sorted(path.stem for path in (folder / "stages").glob("*.json")) if folder.is_dir() else [])
        if child.returncode == 0 and attempt + 1 < KILLS:  # finished between kills: once more from the beginning
            assert weights(Run.open(folder)) == weights(expected)
            folder.rename(folder.with_name(f"killed-{attempt}"))
    if not folder.is_dir() or not Run.open(folder).finished("report"):
        words = ("resume", folder) if (folder / "recipe.yaml").exists() else ("specialize", "--recipe", file, "--name", "killed")
        child = command(*words, cache=tmp_path / "cache-1")
        assert child.wait() == 0, child.stderr.read()
    found = Run.open(folder)
    assert killed >= 1, where
    assert weights(found) == weights(expected)
    verdicts = [json.loads(run.path("verdict.json").read_text()) for run in (found, expected)]
    assert verdicts[0] == verdicts[1]
