"""Bursts train what moved most, at the right moments, and nothing else."""

import torch

from selectune.training.policies import bursts
from tests.training.policies.running import blocks, run, same


def test_what_moved_most_is_the_mean_absolute_change_within_the_share():
    draw = torch.Generator().manual_seed(0)
    before = {name: torch.randn(size, generator=draw) for name, size in (("a", 10), ("b", 50), ("c", 20), ("d", 20))}
    now = {name: value.clone() for name, value in before.items()}
    now["a"] += 0.1
    now["b"][0] += 20.0  # 0.4 in the mean
    now["c"] -= 0.3
    assert bursts.most_moved(now, before, 0.30) == ["b"]  # the first in any case
    assert bursts.most_moved(now, before, 0.80) == ["a", "b", "c"]  # d did not move
    assert bursts.most_moved(now, before, 0.70) == ["b", "c"]

    def split(values):  # two tensors in place of one: each moved as the whole did
        return {"a": values["a"], "b": values["b"], "c0": values["c"][:10], "c1": values["c"][10:], "d": values["d"]}

    assert bursts.most_moved(split(now), split(before), 0.70) == ["b", "c0", "c1"]


def test_bursts_come_when_they_should_and_train_only_what_they_should(tmp_path, llama_folder, monkeypatch):
    seen, plain = [], bursts.Bursts.burst

    def spy(self, stage, names):
        before = stage.values()
        plain(self, stage, names)
        changed = sorted(name for name, value in stage.values().items() if not torch.equal(value, before[name]))
        seen.append((stage.step, names, changed, before))

    monkeypatch.setattr(bursts.Bursts, "burst", spy)
    policy = {"method": "bursts", "every": 2, "steps": 3, "share": 0.1, "buffer": 4, "learning_rate": 1e-2}
    run(tmp_path, llama_folder, policy, choose=blocks, steps=7, evaluations=0)
    assert [step for step, *_ in seen] == [1, 3, 5]
    for _, names, changed, before in seen:
        assert names == changed and names
        assert sum(before[name].numel() for name in names) <= 0.1 * sum(value.numel() for value in before.values())


def test_a_burst_is_adamw_on_the_buffer(tmp_path, llama_folder, monkeypatch):
    def check(self, stage, names):
        rows, values = self.rows(stage), {name: stage.parameters[name] for name in names}
        before = stage.values()
        plain(self, stage, names)
        found = stage.values()
        for name, value in stage.parameters.items():
            value.data.copy_(before[name])
        optimiser = torch.optim.AdamW(values.values(), lr=1e-2, weight_decay=0.0)
        for number in range(2):
            order = torch.randperm(len(rows), generator=stage.generator(f"burst/{number}"))[:4].tolist()
            stage.whole.zero_grad()
            with torch.enable_grad():
                (sum(stage.mean_loss(rows[place]) for place in order) / len(order)).backward()
            optimiser.step()
        stage.clear()
        assert all(torch.allclose(stage.parameters[name], found[name], atol=1e-4) for name in names)
        checked.append(names)

    plain, checked = bursts.Bursts.burst, []
    monkeypatch.setattr(bursts.Bursts, "burst", check)
    run(tmp_path, llama_folder, {"method": "bursts", "every": 3, "steps": 2, "buffer": 4, "learning_rate": 1e-2}, choose=blocks, steps=3,
        evaluations=0)  # fmt: skip
    assert len(checked) == 1


def test_the_buffer_is_half_general_half_training(tmp_path, llama_folder, monkeypatch):
    texts = []
    plain = bursts.Bursts.rows

    def spy(self, stage):
        rows = plain(self, stage)
        texts.extend(stage.context.base.tokenizer.decode(row["input_ids"][0]) for row in rows)
        return rows

    monkeypatch.setattr(bursts.Bursts, "rows", spy)
    one = run(tmp_path, llama_folder, {"method": "bursts", "every": 2, "steps": 1, "buffer": 3}, steps=2, evaluations=0)
    assert any("fault" in text for text in texts) and any("fault" not in text for text in texts)
    assert not same(one.after, one.base)
