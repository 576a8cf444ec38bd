"""Costs: what is counted, and that a stage's earlier attempts count too."""

import json
import time

from selectune.meter import Cost, Meter
from tests.tiny import tiny


def test_earlier_attempts_count(tmp_path):
    kept = tmp_path / "train.part"
    kept.write_text(Cost(stage="train", seconds=100.0, backward_tokens=7, peak_memory_bytes=1).model_dump_json())
    with Meter("train", kept) as meter:
        meter.count(forward=3, backward=2)
        time.sleep(0.01)
    assert 100.0 < meter.cost.seconds < 101 and meter.cost.backward_tokens == 9 and meter.cost.forward_tokens == 3
    assert meter.cost.peak_memory_bytes > 2**20


def test_the_cost_so_far_is_written(tmp_path):
    kept = tmp_path / "train.part"
    with Meter("train", kept, interval=0.05) as meter:
        meter.count(written=5)
        time.sleep(3.4)
    assert json.loads(kept.read_text())["bytes_written"] == 5


def test_tokens_and_operations_of_a_model_are_counted():
    import torch

    model = tiny("llama")
    meter = Meter("measure_base")
    parameters = sum(value.numel() for value in model.parameters())
    meter.watch(model, parameters)
    model(input_ids=torch.arange(10)[None])
    embedding = model.get_input_embeddings().weight.numel()
    assert meter.cost.forward_tokens == 10
    assert meter.cost.flops == 2 * 10 * (parameters - embedding) + 2 * 10 * embedding  # tied: the head is the embedding
