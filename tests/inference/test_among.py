"""Of several runs the one whose training a question is like: chosen, kept, told, refused."""

import json

import pytest

from selectune import cli
from selectune.data import Message, Record, records_to_file
from selectune.errors import UserError
from selectune.evaluation.probe import general_conversations
from selectune.inference import among
from selectune.inference.among import Among
from selectune.models import cache_folder
from selectune.run import Run
from tests.inference.test_test_time import specialist

LAMPS = [
    Record("chat", (Message("user", f"Which lamp belongs to fault {i}?"), Message("assistant", f"Lamp {i}."))) for i in range(40)
]
SONGS = [
    Record("chat", (Message("user", f"sing sing sing song song {i} la la la la la"), Message("assistant", "la")))
    for i in range(40)
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, llama_folder):
    folder = tmp_path_factory.mktemp("among")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELECTUNE_CACHE", str(folder / "cache"))
        found = []
        for name, records in (("lamps", LAMPS), ("songs", SONGS)):
            found.append(specialist(folder / name, llama_folder, "lora"))
            found[-1].path("data").mkdir(exist_ok=True)
            records_to_file(records, found[-1].path("data", "train.jsonl"))
        yield found


def test_a_question_goes_to_the_run_that_trained_on_its_like(runs, monkeypatch):
    several = Among(runs, quiet=True)
    assert several.choose("Which lamp belongs to fault 77?").name == "lamps"
    assert several.choose("sing song 77 la la la la").name == "songs"
    general = [several.choose(one.question) for one in general_conversations()]
    assert sum(one is None for one in general) >= 36  # 43 of 64 (this base knows no words); by chance 21 +- 4
    kept = list((cache_folder() / "routers").glob("*"))
    assert len(kept) == 1 and kept[0].suffix == ".safetensors"
    monkeypatch.setattr(among, "learn", None)  # it is not learnt twice
    assert Among(runs, quiet=True).choose("Which lamp belongs to fault 5?").name == "lamps"


def test_the_command_says_who_answers(runs, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["selectune", "ask", str(runs[0].folder), *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        return caught.value.code or 0, said.out, said.err

    told = {}
    for question in (
        "Which lamp belongs to fault 3?",
        "sing song 3 la la la",
        general_conversations()[0].question,
    ):
        status, out, _ = call(question, "--among", runs[1].folder, "--json")
        assert status == 0
        told[json.loads(out)["from"]] = json.loads(out)["text"]
    assert told.keys() == {"lamps", "songs", "base"}
    status, out, err = call("sing song 3 la la la", "--among", runs[1].folder)
    assert status == 0 and out.strip() == told["songs"] and "songs answers:" in err
    status, _, err = call("  ", "--among", runs[1].folder)
    assert status == 2 and "empty" in err and err.count("\n") == 1


def test_what_cannot_be_told_apart_is_refused_in_one_line(runs, tmp_path, llama_folder):
    with pytest.raises(UserError, match="cannot be told apart"):
        Among([runs[0], runs[0]])
    bare = specialist(tmp_path / "bare", llama_folder, "lora")
    with pytest.raises(UserError, match="too few questions"):
        Among([runs[0], bare])
    other = Run.create(tmp_path / "other", bare.recipe.model_copy(update={"base": "another"}))
    with pytest.raises(UserError, match="different bases"):
        Among([runs[0], other])
