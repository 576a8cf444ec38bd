"""Every kind of bad input is told in one line that names the place and how to mend it; exit status 2, nothing lost."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from selectune import cli, pipeline
from selectune.errors import UserError

GOOD = [{"question": f"What is part {i}?", "answer": f"Part {i} is a wheel of size {i * 3}."} for i in range(60)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def put(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def chat_row(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


CHOICE = {"question": "Which?", "choices": ["a", "b"], "answer": "c"}
# name -> (file name, content, extra recipe values, what the message must say)
DATA = {
    "empty file": ("a.jsonl", "", {}, ["a.jsonl", "empty"]),
    "only white space": ("a.csv", " \n\n", {}, ["a.csv", "empty"]),
    "broken line in the middle": ("a.jsonl", lines(GOOD[:3]) + '{"question": \n' + lines(GOOD[3:]), {}, ["a.jsonl:4", "broken JSON"]),
    "line that is no object": ("a.jsonl", lines(GOOD[:2]) + "[1, 2]\n", {}, ["a.jsonl:3", "a list"]),
    "json that is a number": ("a.json", "42", {}, ["a.json", "a number"]),
    "broken json": ("a.json", '[{"question": "x",]', {}, ["a.json:1", "broken JSON"]),
    "record that is no object": ("a.json", '[{"text": "x"}, 3]', {}, ["record 2"]),
    "wrong encoding": ("a.jsonl", b'{"question": "x", "answer": "y"}\n{"question": "caf\xe9"}\n', {}, ["a.jsonl:2", "UTF-8", "iconv"]),
    "binary file": ("a.txt", b"ab\x00\x01cd", {}, ["a.txt", "binary"]),
    "mixed shapes": ("a.jsonl", lines([GOOD[0], {"text": "raw"}]), {}, ["a.jsonl:2", "one shape"]),
    "columns of no shape": ("a.jsonl", lines([{"x": 1, "y": 2}]), {}, ["'x', 'y'", "data.columns"]),
    "every answer empty": ("a.jsonl", lines([{"question": "Why?", "answer": ""}] * 3), {}, ["every response is empty"]),
    "answer outside the choices": ("a.jsonl", lines([CHOICE]), {}, ["a.jsonl:1", "'answer'", "not among the 2 choices"]),
    "answer index too large": ("a.jsonl", lines([{**CHOICE, "answer": 7}]), {}, ["not among the 2 choices"]),
    "label not allowed": ("a.jsonl", lines([{"text": f"t{i}", "label": "god" if i == 3 else "good"} for i in range(20)]),
                          {"data": {"labels": ["good", "bad"]}}, ["a.jsonl:4", "'god'", "did you mean 'good'"]),
    "unknown role": ("a.jsonl", lines([chat_row(("usr", "Hi"), ("assistant", "Hello"))]), {}, ["a.jsonl:1", "messages[0]", "role"]),
    "nobody answers": ("a.jsonl", lines([chat_row(("user", "Hi"))]), {}, ["no assistant message"]),
    "content that is no text": ("a.jsonl", lines([chat_row(("user", 3), ("assistant", "x"))]), {}, ["not text"]),
    "messages that are no list": ("a.jsonl", lines([{"messages": [1, 2]}]), {}, ["a.jsonl:1", "list of turns"]),
    "field that is no text": ("a.jsonl", lines([{"question": ["a"], "answer": "b"}]), {}, ["question", "not text"]),
    "row with too many columns": ("a.csv", "question,answer\nx,y\nx,y,z\n", {}, ["a.csv:3", "2 columns"]),
    "not really gzipped": ("a.jsonl.gz", lines(GOOD), {}, ["not gzipped"]),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(lines(GOOD * 50).encode())[:-40], {}, ["truncated"]),
    "truncated parquet": ("a.parquet", b"PAR1 and nothing more", {}, ["parquet", "damaged"]),
    "unknown suffix": ("a.docx", "x", {}, [".docx", "jsonl"]),
    "mapped column missing": ("a.jsonl", lines(GOOD), {"data": {"columns": {"question": "Question", "answer": "answer"}}},
                              ["data.columns.question", "did you mean 'question'"]),
    "column with two roles": ("a.jsonl", lines(GOOD), {"data": {"columns": {"question": "answer", "answer": "answer"}}}, ["two roles"]),
    "nothing left after contamination": ("a.jsonl", lines(GOOD), {"data": {"test": "SAME"}}, ["nothing is left", "contamination"]),
    "records longer than the context": ("a.jsonl", lines([{"question": "w " * 90, "answer": "y " * 90}]),
                                        {"data": {"max_length": 32, "long_records": "drop", "test_fraction": 0.0, "dev_fraction": 0.0}},
                                        ["longer than the context", "data.max_length"]),
    "unknown form": ("a.jsonl", lines(GOOD), {"form": "lorra"}, ["form", "did you mean 'lora'"]),
    "unknown setting of a form": ("a.jsonl", lines(GOOD), {"form": "lora:ranks=3"}, ["form.ranks", "did you mean 'rank'"]),
    "wrong value of a setting": ("a.jsonl", lines(GOOD), {"form": "lora:rank=-3"}, ["form.rank"]),
    "more blocks than there are": ("a.jsonl", lines(GOOD), {"form": "full", "parameters": "last_blocks:k=99"}, ["parameters.k", "at most 4"]),
    "unknown benchmark": ("a.jsonl", lines(GOOD), {"evaluation": {"benchmarks": ["hellaswagg"]}}, ["did you mean 'hellaswag'"]),
    "benchmark file missing": ("a.jsonl", lines(GOOD), {"evaluation": {"benchmarks": ["hellaswag"], "data_root": "FOLDER"}},
                               ["hellaswag", "not there", "data_root"]),
    "metric that does not fit": ("a.jsonl", lines(GOOD), {"evaluation": {"target": "choice"}}, ["needs records with choices"]),
    "unknown base": ("a.jsonl", lines(GOOD), {"base": "smollm2"}, ["no such base", "smollm2-135m-instruct"]),
    "base is a text file": ("a.jsonl", lines(GOOD), {"base": "SAME"}, ["not a model"]),
    "budget too small": ("a.jsonl", lines(GOOD), {"budget": {"tokens": 5}}, ["budget", "one step"]),
    "loss not finite": ("a.jsonl", lines(GOOD), {"training": {"learning_rate": 1e30, "clip_norm": None, "warmup_fraction": 0.0}},
                        ["step", "halve the learning rate"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_bad_input(name, tmp_path, llama_folder, monkeypatch):
    monkeypatch.setenv("SELECTUNE_CACHE", str(tmp_path / "cache"))
    file, content, values, expected = DATA[name]
    path = put(tmp_path, file, content)
    values = json.loads(json.dumps(values).replace("SAME", path).replace("FOLDER", str(tmp_path)))
    evaluation = {"benchmarks": [], "forgetting": False, "target_items": 2, "samples": 0, "max_new_tokens": 4}
    base = {"base": str(llama_folder), "output": str(tmp_path / "runs"), "form": "full",
            "training": {"epochs": 1, "batch_sequences": 2}, "data": {"max_length": 128}, "evaluation": evaluation}  # fmt: skip
    with pytest.raises(UserError) as caught:
        pipeline.specialize(path, recipe=pipeline.merge(base, values), quiet=True)
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message or ", " in message  # says more than what is wrong
    for part in expected:
        assert part in message, message
    assert Path(path).read_bytes() == (content if isinstance(content, bytes) else content.encode())


RECIPES = {
    "wrong key": ("data:\n  trian: x\n", ["recipe.yaml:2", "data.trian", "did you mean 'train'"]),
    "wrong section": ("trainning: {}\n", ["recipe.yaml:1", "did you mean 'training'"]),
    "wrong value": ("training:\n  epochs: -1\n", ["recipe.yaml:2", "training.epochs", "greater than 0"]),
    "wrong type": ("training:\n  epochs: many\n", ["training.epochs", "number"]),
    "unknown schedule": ("training:\n  schedule: cosin\n", ["training.schedule", "cosine"]),
    "not YAML": ("data: [1,\n", ["recipe.yaml", "not valid YAML"]),
    "no recipe": ("just words\n", ["holds no recipe"]),
    "no data": ("seed: 1\n", ["no training data"]),
    "no seed": ("seed: -1\n", ["seed", "greater than or equal to 0"]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_bad_recipe(name, tmp_path, monkeypatch, capsys):
    content, expected = RECIPES[name]
    path = put(tmp_path, "recipe.yaml", content)
    monkeypatch.setattr("sys.argv", ["selectune", "specialize", "--recipe", path, "--output", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    shown = capsys.readouterr().err
    assert caught.value.code == 2 and shown.count("\n") == 1 and "Traceback" not in shown
    for part in expected:
        assert part in shown, shown


COMMANDS = {
    "no such recipe": (["specialize", "--recipe", "none.yaml"], ["none.yaml", "selectune init"]),
    "no such data": (["specialize", "none.jsonl"], ["none.jsonl", "no such file"]),
    "pattern without a match": (["specialize", "none*.jsonl"], ["none*.jsonl", "no file matches"]),
    "folder without data": (["specialize", "empty"], ["empty", "no file that can be read"]),
    "no such records of a policy": (
        ["specialize", "good.jsonl", "--policy", "replay:source=none.jsonl"],
        ["none.jsonl", "policy.source"],
    ),
    "no records of a policy": (["specialize", "good.jsonl", "--policy", "replay:source=nothing.jsonl"], ["nothing.jsonl"]),
    "column without role": (["specialize", "good.jsonl", "--column", "question"], ["role=column"]),
    "no run to resume": (["resume", "empty"], ["empty", "holds no run"]),
    "no runs to list": (["runs", "empty"], ["empty", "holds no runs"]),
    "no run to export": (["export", "empty", "out"], ["holds no run"]),
    "no run to compare": (["compare", "empty"], ["holds no run"]),
    "recipe that is there": (["init", "good.jsonl"], ["already", "--force"]),
    "unknown axis": (["methods", "parameter"], ["unknown axis"]),
    "output that is a file": (["specialize", "good.jsonl", "--output", "good.jsonl"], ["good.jsonl"]),
    "name of another run": (["specialize", "good.jsonl", "--name", "taken", "--output", "."], ["taken", "another --output"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_command(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    put(tmp_path, "good.jsonl", lines(GOOD))
    put(tmp_path, "nothing.jsonl", "")
    put(tmp_path, "taken/other.txt", "a file of somebody's")
    arguments, expected = COMMANDS[name]
    monkeypatch.setattr("sys.argv", ["selectune", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    shown = capsys.readouterr().err
    assert caught.value.code == 2 and "Traceback" not in shown
    for part in expected:
        assert part in shown.replace("\n", " "), shown
    assert (tmp_path / "taken/other.txt").read_text() == "a file of somebody's"


def test_no_permission(tmp_path, monkeypatch):
    path = put(tmp_path, "a.jsonl", lines(GOOD))
    os.chmod(path, 0)
    if os.geteuid() == 0:  # who may read everything: the refusal is the file system's, made here in its place
        real = open

        def refuse(file, *args, **kwargs):
            if str(file) == path:
                raise PermissionError(13, "Permission denied", path)
            return real(file, *args, **kwargs)

        monkeypatch.setattr("builtins.open", refuse)
        monkeypatch.setattr("io.open", refuse)
    with pytest.raises(UserError, match="may not be read"):
        pipeline.specialize(path, quiet=True, output=str(tmp_path))


def test_no_room_on_the_disk(tmp_path, llama_folder, monkeypatch):
    monkeypatch.setenv("SELECTUNE_CACHE", str(tmp_path / "cache"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("selectune.training.trainer.shutil.disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(UserError, match=r"MiB are free on the disk.*selectune resume"):
        pipeline.specialize(put(tmp_path, "a.jsonl", lines(GOOD)), base=str(llama_folder), output=str(tmp_path / "runs"), quiet=True,
                            evaluation={"benchmarks": [], "target": "off", "samples": 0})  # fmt: skip


def test_there_are_more_than_forty_kinds():
    assert len(DATA) + len(RECIPES) + len(COMMANDS) + 2 >= 60


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    from selectune.examples import select

    def stopped(*given, **asked):
        raise KeyboardInterrupt

    monkeypatch.setattr(select, "choose_examples", stopped)
    monkeypatch.setattr("sys.argv", ["selectune", "select", str(tmp_path / "pool.jsonl")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130 and "stopped; a run goes on with `selectune resume RUN`" in capsys.readouterr().err


def test_out_of_memory_is_one_line_wherever_it_happens(monkeypatch, capsys):
    def full():
        raise MemoryError

    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "or take fewer records" in shown


def test_memory_that_is_used_up_is_told_from_other_errors_of_memory():
    from selectune.errors import out_of_memory

    cpu = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
    for said in ("CUDA out of memory. Tried to allocate 2.00 GiB.", "CUDA error: out of memory", cpu):
        assert out_of_memory(RuntimeError(said))
    assert out_of_memory(MemoryError())
    for said in ("CUDA error: an illegal memory access was encountered", "unsupported memory format option Preserve"):
        assert not out_of_memory(RuntimeError(said))


def test_a_full_disk_is_known_in_the_words_of_every_library(tmp_path):
    """Two of PyTorch's, one of safetensors', one of Python's."""
    from safetensors import SafetensorError

    from selectune.errors import unwritable
    from selectune.experiment.forked import reason

    full = "No space left on device"
    for error in (
        RuntimeError("basic_ios::clear: iostream error"), OSError(28, full),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):  # fmt: skip
        assert unwritable(error) == full
        told = UserError("a checkpoint could not be written")
        told.__context__ = error
        for one in (error, told):
            with pytest.raises(OSError, match=full):
                reason(one, tmp_path / "details.txt")
    assert (
        unwritable(RuntimeError("mat1 and mat2 cannot be multiplied")) is None
        and unwritable(FileNotFoundError(2, "gone")) is None
    )
