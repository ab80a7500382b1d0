"""Token limits: which instances and rows are too long, counted with the encoder that training uses."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kpig_fast.data.encoding import PromptEncoder
from kpig_fast.data.lengths import check_collection_lengths, check_lengths
from kpig_fast.data.schema import Instance, PoolInstruction, Row, Task, TaskCollection
from kpig_fast.data.validation import DataError, ValidationReport


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="module")
def encoder(tokenizer) -> PromptEncoder:
    return PromptEncoder(tokenizer)


def test_the_limit_itself_fits(encoder):
    instance = Instance("one two three", "four five", id="7")
    assert check_lengths([instance], encoder, 7, report := ValidationReport()) == [instance]
    assert (report.kept, report.problems) == (1, {})
    assert check_lengths([instance], encoder, 6, report) == []
    assert (report.kept, report.dropped) == (0, 1)
    assert report.problems["too long"].examples == [
        "instance '7': prompt and response: 7 tokens; shorten the row or raise the limit of 6"
    ]


def test_a_mask_that_is_longer_counts(tokenizer, encoder):
    glued = Instance("a-b", "c", key_parts=("-",))
    assert check_lengths([glued], encoder, 4, ValidationReport()) == [glued]
    spaced = PromptEncoder(tokenizer, mask_text=" [MASK] ")
    assert check_lengths([glued], spaced, 4, ValidationReport()) == []
    assert check_lengths([glued], spaced, 6, ValidationReport()) == [glued]


def test_order_is_kept_and_earlier_problems_stay(encoder):
    report = ValidationReport(kept=3, dropped=2)
    instances = [Instance("a", "b"), Instance("a " * 20, "b"), Instance("c", "d")]
    assert check_lengths(instances, encoder, 10, report) == [instances[0], instances[2]]
    assert (report.kept, report.dropped) == (2, 3)


def test_strict(encoder):
    with pytest.raises(DataError, match=r"instance 'x': prompt and response: 24 tokens; shorten the row"):
        check_lengths([Instance("a " * 21, "b", id="x")], encoder, 10, ValidationReport(), strict=True)


def test_rows_are_checked_under_the_longest_wording(encoder):
    short, long = (PoolInstruction(text=text) for text in ("a", "a b c d e"))
    tasks = [Task(task="both", instructions=(short, long)), Task(task="short", instructions=(short,))]
    rows = [
        Row(task=task, id=f"{task}-{n}", context="w " * n, outputs=("y",)) for task in ("both", "short") for n in (1, 5)
    ]
    collection = TaskCollection.of(tasks, rows)
    report = ValidationReport()
    # Longest: 5 + "Input:" + 5 + "Output:" + 1 + end = 14; the same row under the short wording has 10.
    kept = check_collection_lengths(collection, encoder, 13, report)
    assert [row.id for row in kept.rows] == ["both-1", "short-1", "short-5"]
    assert kept.tasks == collection.tasks
    assert (report.kept, report.dropped) == (3, 1)
    assert report.problems["too long"].examples[0].startswith("instance 'both-5': prompt and response: 14 tokens")
    with pytest.raises(DataError):
        check_collection_lengths(collection, encoder, 13, ValidationReport(), strict=True)


def test_progress_bar(encoder, capsys):
    check_lengths([Instance("a", "b")], encoder, 9, ValidationReport(), progress=True)
    assert "tokenizing" in capsys.readouterr().err
