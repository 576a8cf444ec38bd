"""Records: shapes, chat template, splits, duplicates, contamination."""

import csv
import gzip
import json

import pytest

from selectune.data import Encoder, Message, Record, prepare, records_from_file, records_to_file
from selectune.data.contamination import ContaminationIndex
from selectune.data.duplicates import drop_exact, drop_near
from selectune.data.prepare import split
from selectune.data.read import read_rows
from selectune.data.shapes import find_shape, to_records
from selectune.errors import UserError
from selectune.recipe import DataRecipe
from tests.tiny import tokenizer

SHAPES = {
    "chat": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
    "instruction": {"instruction": "Greet", "input": "", "output": "Hello"},
    "question_answer": {"Question": "What greets?", "Answer": "Hello is what one says to greet."},
    "choice": {"question": "Which?", "choices": ["no", "Hello"], "answer": 1},
    "text": {"text": "Hello"},
}


def qa(question, answer):
    return Record("chat", (Message("user", question), Message("assistant", answer)))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_found_and_round_trip(shape, tmp_path):
    rows = read_rows(str(write(tmp_path / "a.jsonl", [SHAPES[shape]])))
    found = find_shape(rows)
    assert found.name == shape
    records = to_records(rows, found)
    assert "Hello" in records[0].response
    records_to_file(records, tmp_path / "b.jsonl")
    assert records_from_file(tmp_path / "b.jsonl") == records


def test_labels_letters_and_options(tmp_path):
    rows = [{"text": f"line {i}", "label": "good" if i % 2 else "bad"} for i in range(40)]
    shape = find_shape(read_rows(str(write(tmp_path / "a.jsonl", rows))))
    assert (shape.name, shape.labels) == ("classification", ("bad", "good"))
    file = tmp_path / "mmlu.csv"
    with file.open("w", newline="") as handle:
        csv.writer(handle).writerows([["What, then?", "1", "2", "3", "4", "C"], ["And now?", "5", "6", "7", "8", "A"]])
    records = to_records(read_rows(str(file)), find_shape(read_rows(str(file))))
    assert [record.response for record in records] == ["3", "5"]
    option = {"question": "Which?", "option 1": "x", "option 2": "y", "answer": "option 2: y"}
    rows = read_rows(str(write(tmp_path / "b.jsonl", [option])))
    assert to_records(rows, find_shape(rows))[0].answer == 1


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet", "txt", "md"])
@pytest.mark.parametrize("zipped", [False, True])
def test_every_format(suffix, zipped, tmp_path):
    import pandas

    frame = pandas.DataFrame(
        {"question": ["Why is it?", "How is it?"], "answer": ["Because it is so here.", "As it is, just fine."]}
    )
    file = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        frame.to_json(file, orient="records", lines=True)
    elif suffix == "json":
        frame.to_json(file, orient="records")
    elif suffix == "parquet":
        frame.to_parquet(file)
    elif suffix in ("csv", "tsv"):
        frame.to_csv(file, index=False, sep="," if suffix == "csv" else "\t")
    else:
        file.write_text("# One\n\nFirst words.\n\n# Two\n\nSecond words.\n")
    if zipped:
        file.with_suffix(f".{suffix}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    rows = read_rows(str(tmp_path))
    assert len(rows) == {"txt": 4}.get(suffix, 2)
    assert find_shape(rows).name == ("text" if suffix in ("txt", "md") else "question_answer")


def test_a_mapping_wins(tmp_path):
    rows = read_rows(str(write(tmp_path / "a.jsonl", [{"question": "not this", "Frage": "Why?", "Antwort": "So it is."}])))
    shape = find_shape(rows, mapping={"question": "Frage", "answer": "Antwort"})
    assert to_records(rows, shape)[0].question == "Why?"


def test_labels_cover_exactly_the_responses():
    words = tokenizer()
    turns = [
        ("system", "Be kind."),
        ("user", "What is the capital?"),
        ("assistant", "Paris."),
        ("user", "And?"),
        ("assistant", "42."),
    ]
    record = Record("chat", tuple(Message(*turn) for turn in turns))
    encoded = Encoder(words, 256).encode(record)[0]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert words.decode(encoded.input_ids) == text
    learnt = [token for token, label in zip(encoded.input_ids, encoded.labels) if label != -100]
    assert words.decode(learnt) == "Paris.<|im_end|>42.<|im_end|>"


def test_long_texts_are_split_and_long_conversations_cut():
    words = tokenizer()
    text = Record("text", text="fox jumps over the lazy dog " * 40)
    pieces = Encoder(words, 32).encode(text)
    assert all(len(piece.input_ids) <= 32 for piece in pieces)
    assert [token for piece in pieces for token in piece.input_ids][:-1] == words(text.text, add_special_tokens=False)[
        "input_ids"
    ]
    assert len(Encoder(words, 32).encode(qa("Why?", "dog " * 100))[0].input_ids) == 32
    assert Encoder(words, 32, "drop").encode(qa("Why?", "dog " * 100)) == []


def test_adding_records_never_moves_others():
    records = [qa(f"question {i}", f"answer {i}") for i in range(400)]
    first, second = split(records[:200], 0.1, 0.2), split(records, 0.1, 0.2)
    for name in first:
        assert set(r.key for r in first[name]) <= set(r.key for r in second[name])
    assert 40 < len(second["test"]) < 120 and 15 < len(second["dev"]) < 75


def test_duplicates_drop_and_templates_stay():
    long = "the manual says that the lamp on the left side of the cabinet must be checked every single morning before"
    records = [qa(f"{long} work", "yes"), qa(f"{long}  WORK", "Yes"), qa(f"{long} work starts", "yes"),
               qa(f"{long} shift 1", "yes"), qa(f"{long} shift 2", "yes"), qa(f"{long} work ends", "no")]  # fmt: skip
    kept, exact = drop_exact(records)
    kept, near = drop_near(kept)
    assert (len(exact), len(near), len(kept)) == (1, 1, 4)
    assert near[0].question.endswith("starts")


def test_contamination_is_found_by_sequence_or_by_the_whole_question():
    item = "a train leaves the station at nine and travels for three hours at sixty miles per hour to the coast"
    index = ContaminationIndex({"exam": [item, "short one?"], "other": ["nothing of the kind"]})
    assert index.overlaps(qa(f"Well: {item} now", "180")) == ["exam"]
    assert index.overlaps(qa("Short one", "x")) == ["exam"]
    assert index.overlaps(qa("a train leaves the station at ten", "x")) == []
    template = "list all of the named entities in the sentence that follows here and separate them by commas"
    train = [qa(f"{template} number {i}", "x") for i in range(20)]
    index = ContaminationIndex({"exam": [f"{template} number 99"]}, train)
    assert not any(index.overlaps(record) for record in train)


def test_preparing_counts_everything(tmp_path):
    rows = [{"question": f"What is part {i}?", "answer": f"Part {i} is a wheel of size {i}."} for i in range(100)]
    rows += [rows[0], {"question": "Empty?", "answer": ""}]
    test = [{"question": "What is part 7?", "answer": "A wheel."}]
    recipe = DataRecipe(train=str(write(tmp_path / "a.jsonl", rows)), test=str(write(tmp_path / "t.jsonl", test)), limit=50)
    prepared = prepare(recipe)
    dropped = {d.reason: d.count for d in prepared.summary.dropped}
    assert dropped["exact duplicate"] == 1 and dropped["empty response"] == 1 and dropped["contamination"] in (0, 1)
    assert len(prepared.train) == 50 and len(prepared.test) == 1
    assert prepared.summary.read == 102
    assert prepare(recipe).train == prepared.train
    with pytest.raises(UserError, match="nothing is left"):
        prepare(DataRecipe(train=str(tmp_path / "t.jsonl"), test=str(tmp_path / "t.jsonl")))
