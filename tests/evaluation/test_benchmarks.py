"""The benchmarks are lm-eval's own tasks: predictions equal those of its ``hf`` backend, item by item."""

import json

import pytest

from benchmarks.lm_eval_equality import compare
from selectune.evaluation import Scorer, benchmark_texts, known_benchmarks, run_benchmarks
from selectune.evaluation.local_files import READERS
from selectune.models import load_base
from tests.shared_data import ROOT, needs_data
from tests.tiny import save_tiny, tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A data root in the layout of the local files, with invented items."""
    root = tmp_path_factory.mktemp("root")
    for folder in ("hellaswag", "gsm8k", "mmlu/dev", "mmlu/val", "mmlu/test"):
        (root / folder).mkdir(parents=True)
    rows = [{"ind": i, "activity_label": "Cooking", "ctx_a": f"A cook takes {i} eggs.", "ctx_b": "he", "ctx": f"A cook takes {i} eggs. he",
             "endings": ["breaks them.", "flies [step] away.", "sings to the moon.", "is a fox."], "label": i % 4} for i in range(6)]  # fmt: skip
    (root / "hellaswag/val_1k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in ("train", "test"):
        rows = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(8)]
        (root / f"gsm8k/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for subject in ("college_computer_science", "computer_security", "high_school_computer_science", "machine_learning"):
        for split in ("dev", "val", "test"):
            text = "".join(f'"What is bit {i}, if any?",0,1,2,{i},{"ABCD"[i % 4]}\n' for i in range(5))
            (root / f"mmlu/{split}/{subject}_{split}.csv").write_text(text)
    others = {
        "arc/arc_easy_test": {"query": "Question: Which is hot?", "choices": ["ice", "fire", "snow"], "gold": 1},
        "arc/arc_challenge_test": {"query": "Question: Which is cold?", "choices": ["ice", "fire"], "gold": 0},
        "piqa/val": {"query": "Question: Boil an egg.", "choices": ["Use hot water.", "Use hot sand."], "gold": 0},
        "winogrande/val": {"context_options": ["The pot met the lid and the pot", "The pot met the lid and the lid"],
                           "continuation": "fell.", "gold": 1},
        "boolq/dev": {"question": "is ice hot", "passage": "Ice is cold.", "answer": "false"},
        "lambada/lambada_openai": {"context": "The cook broke an ", "continuation": " egg"},
    }  # fmt: skip
    for name, row in others.items():
        first = next(iter(row))
        rows = [
            row,
            *(
                {**row, first: [f"{text} {i}" for text in row[first]] if isinstance(row[first], list) else f"{row[first]} {i} "}
                for i in (1, 2)
            ),
        ]
        (root / name).parent.mkdir(exist_ok=True)
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.parametrize(("name", "few_shot"), [("hellaswag", None), ("mmlu_cs", 2), ("gsm8k", 2)])
def test_predictions_are_those_of_lm_eval(name, few_shot, files, tmp_path):
    folder = save_tiny("llama", tmp_path / "base", max_position_embeddings=2048)
    found = compare(load_base(folder), name, files, 5, few_shot)
    assert found["items"] == (20 if name == "mmlu_cs" else 5)
    assert found["equal"] == found["items"], found["different"]


@pytest.mark.parametrize("name", known_benchmarks())
def test_every_benchmark_reads_its_file(name, files):
    reads_its_file(name, files)


@needs_data
def test_every_benchmark_reads_its_real_file():
    for name in known_benchmarks():
        reads_its_file(name, ROOT)


def reads_its_file(name, root):
    found = run_benchmarks([name], Scorer(load_base_of_tiny(), tokenizer()), str(root), items=2, few_shot=0)[0]
    assert found.items and 0 <= found.score <= 1 and len({item.id for item in found.items}) == len(found.items)
    assert len(benchmark_texts([name], str(root), 2)[name]) >= 2


def test_rows_of_local_files_become_the_fields_of_lm_eval(files):
    read = {
        name: next(iter(READERS[name](files).values()))[0]
        for name in ("arc_easy", "piqa", "winogrande", "boolq", "lambada_openai")
    }
    assert read["arc_easy"] == {"question": "Which is hot?", "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
                                "answerKey": "B"}  # fmt: skip
    assert read["piqa"] == {"goal": "Boil an egg.", "sol1": "Use hot water.", "sol2": "Use hot sand.", "label": 0}
    assert read["winogrande"] == {
        "sentence": "The pot met the lid and the _ fell.",
        "option1": "pot",
        "option2": "lid",
        "answer": "2",
    }
    assert read["boolq"] == {"question": "is ice hot", "passage": "Ice is cold.", "label": 0}
    assert read["lambada_openai"] == {"text": "The cook broke an egg"}


def load_base_of_tiny():
    from tests.tiny import tiny

    return tiny("llama", max_position_embeddings=4096)


def test_the_probe_is_large_balanced_and_reproducible():
    from selectune.evaluation.probe import load_general_prompts, load_general_text, load_questions
    from selectune.evaluation.probe.build import questions

    loaded = load_questions()
    assert [{**vars(q), "choices": list(q.choices)} for q in loaded] == questions()
    assert len(loaded) >= 300 and len({q.id for q in loaded}) == len(loaded)
    for question in loaded:
        assert len(set(question.choices)) == len(question.choices) >= 2 and 0 <= question.answer < len(question.choices)
    first = sum(q.answer == 0 for q in loaded) / len(loaded)
    assert 0.2 < first < 0.45
    assert len(load_general_text()) >= 30 and len(load_general_prompts()) >= 40


def test_nothing_is_measured_on_the_conversations_that_methods_may_use():
    from selectune.data.duplicates import normalise
    from selectune.evaluation.probe import general_conversations, load_general_prompts, load_questions

    used = {normalise(text) for record in general_conversations() for text in (record.question, record.response)}
    measured = {normalise(text) for one in load_general_prompts() for text in (one.prompt, one.response)}
    assert len(general_conversations()) == 64 and len(used) == 128
    assert not used & (measured | {normalise(one.context) for one in load_questions()})
