"""Real public data sets, read as a user would: the shape is found, everything is counted.

The sets are not the project's to hand out (licences), so a machine without them skips this file; a folder that lacks one of them fails.
"""

import pytest

from selectune.data import prepare
from selectune.errors import UserError
from selectune.recipe import DataRecipe
from tests.shared_data import ROOT, needs_data

pytestmark = needs_data


# file or folder, shape, records read
EXPECTED = [
    ("gsm8k/train.jsonl.gz", "question_answer", 7473),
    ("pubmedqa/ori_pqal.json.gz", "classification", 1000),
    ("financial_phrasebank/all-data.csv", "classification", 4846),
    ("teleqna/TeleQnA.json.gz", "choice", 10000),
    ("medquad", "question_answer", None),
    ("legalbench/ssla_individual_defendants_test_old.tsv.gz", "question_answer", 1012),
    ("alpaca_pool", "instruction", None),
    ("loghub_2k/BGL/BGL_2k.log_structured.csv", "classification", 2000),
    ("ner_ncbi_disease/train.tsv", None, None),
]


@pytest.mark.parametrize(("source", "shape", "read"), EXPECTED)
def test_shapes_of_real_files(source, shape, read):
    summary = prepare(DataRecipe(train=str(ROOT / source), limit=200)).summary
    assert shape is None or summary.shape == shape
    assert read is None or summary.read == read
    assert summary.splits["train"] > 100 and summary.example


def test_a_rewritten_test_set_is_recognised():
    """GSM8K asked backwards keeps most of each test question's words."""
    recipe = DataRecipe(train=str(ROOT / "gsm8k_backward"), test=str(ROOT / "gsm8k/test.jsonl"))
    found = prepare(recipe).summary.contamination
    assert sum(found.values()) > 1000


def test_several_tasks_in_one_file_are_refused_by_line():
    with pytest.raises(UserError, match=r"train\.jsonl:136, field 'text'.*keep one shape in a run"):
        prepare(DataRecipe(train=str(ROOT / "legalbench/train.jsonl")))
