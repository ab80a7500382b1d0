"""The performance metrics against hand-computed scores and hostile answers."""

import math
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpig_fast.evaluation.metrics import items, mean_tally, normalise, score, tally

AUTOMATIC = ["acc", "match", "f1", "rougeL", "bleu"]


def one(metric, answer: str, *references: str) -> float:
    value = score(metric, [answer], [references])
    assert value is not None
    return value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Yes \n", "yes"),
        ("Yes.", "yes"),
        ("yes...", "yes"),
        ('"Yes."', "yes"),
        ('"Yes".', "yes"),
        ("“Yes”", "yes"),
        ("'`Yes`.'", "yes"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("e\u0301t\u00e9", "\u00e9t\u00e9"),
        ("a \t b\u00a0c", "a b c"),
        ("3.14", "3.14"),
        ("'tis", "'tis"),
        ("don't", "don't"),
        ("U.S.", "u.s"),
        (".", "."),
        ('"', '"'),
        ('""', '""'),
        ("", ""),
        ("Yes!", "yes!"),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2]", ["1", "2"]),
        ("['A', \"b.\"]", ["a", "b"]),
        ("(x, y)", ["x", "y"]),
        ("the, Baker, she", ["the", "baker", "she"]),
        ("a; b | c\nd", ["a", "b", "c", "d"]),
        ("I_WALK I_RUN", ["i_walk", "i_run"]),
        ("New York, Rome", ["new york", "rome"]),
        ("[['3', '2'], ['N']]", [("3", "2"), ("n",)]),
        ("[]", []),
        ("", [""]),
        (",", [","]),
        ("a,,b,", ["a", "b"]),
        ("[true, null]", ["true", "null"]),
        ("{[1, 2, 3]}", ["[1", "2", "3]"]),
        ("[007, 8]", ["007", "8"]),
        ("{}", ["{}"]),
        ("5", ["5"]),
        ("(5)", ["5"]),
    ],
)
def test_items(text, expected):
    assert items(text) == expected


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("Yes", ["yes"], 100),
        ("yes.", ["no", "Yes"], 100),
        ('"YES"', ["yes"], 100),
        ("yes, it is", ["yes"], 0),
        ("", ["yes"], 0),
        ("", ["."], 0),
        ("", [""], 100),
        ("caf\u00e9", ["cafe\u0301"], 100),
        ("cafe", ["caf\u00e9"], 0),
        ("y" * 5, ["yes"], 0),
        ("yes " * 10_000, ["yes"], 0),
    ],
)
def test_acc(answer, references, expected):
    assert one("acc", answer, *references) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("[2, 1]", "[1, 2]", 100),
        ("[1, 1, 2]", "[1, 2]", 100),
        ("[1, 2, 3]", "[1, 2]", 0),
        ("{[1, 2, 3]}", "[1, 2]", 0),
        ("{[1, 2, 3]}", "[1, 2, 3]", 0),
        ("[1]", "[1, 2]", 0),
        ("1, 2", "[1, 2]", 100),
        ("[[1, 2]]", "[1, 2]", 0),
        ("[['a'], ['b']]", "[['b'], ['a']]", 100),
        ("[['a', 'b']]", "[['b', 'a']]", 0),
        ("Dog, cat.", "cat, dog", 100),
        ("", "[]", 0),
        ("[", "[]", 0),
        (",", "[]", 0),
        ("[ ]", "[]", 100),
        ("12", "1, 2", 0),
        ("a, b, " * 5_000, "a, b", 100),
    ],
)
def test_match(answer, reference, expected):
    assert one("match", answer, reference) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("a, b", "b, a", 100),
        # One of one found, one of two wanted: 2 · 1 / (1 + 2).
        ("a", "a, b", 200 / 3),
        # A repeated word is found as often as it is wanted: 2 · 1 / (3 + 1).
        ("a, a, a", "a", 50),
        ("1B-adrenoceptor", "alpha 1B-adrenoceptor", 200 / 3),
        ("c", "a, b", 0),
        ("", "a", 0),
        ("", "", 100),
        ("[]", "[]", 100),
        ("", "[]", 0),
        ("[['a', 'b'], 'c']", "a, b, c", 100),
        # 10,000 words of which one is wanted.
        ("a " + "x " * 9_999, "a", 200 / 10_001),
    ],
)
def test_f1(answer, reference, expected):
    assert one("f1", answer, reference) == pytest.approx(expected, rel=1e-12)


def test_f1_takes_the_best_reference_and_the_mean_over_answers():
    assert one("f1", "a, b", "c", "a", "b, a") == 100
    assert score("f1", ["a", "x"], [["a, b"], ["y"]]) == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The cat sat.", "the cat sat", 100),
        # Longest common subsequence "police the gunman", 3 of 4 words on both sides.
        ("police kill the gunman", "police the gunman killed", 75),
        # 2 of 3 words of the answer, 2 of 2 of the reference.
        ("a b c", "a c", 80),
        ("c b a", "a b c", 100 / 3),
        ("", "a", 0),
        ("...", "a", 0),
        ("Привет, мир", "привет мир!", 100),
        ("été", "ete", 0),
        ("snake_case", "snake case", 100),
        # 1 of 10,000 words of the answer, 1 of 1 of the reference.
        ("a " + "x " * 9_999, "a", 200 / 10_001),
    ],
)
def test_rouge_l(answer, reference, expected):
    assert one("rougeL", answer, reference) == pytest.approx(expected, rel=1e-12)


def test_rouge_l_is_the_library_on_plain_english():
    from rouge_score.rouge_scorer import RougeScorer

    answer, reference = "It's the 2nd of May - 30% off!", "30% off on the 2nd of May, it is."
    expected = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert one("rougeL", answer, "nothing alike", reference) == pytest.approx(100 * expected)
    assert 0 < expected < 1


def test_bleu_by_hand():
    # Precisions 4/5, 2/4, 1/3 of one, two and three words; no four words fit, smoothed to (1/2)/2; same length.
    answer, reference = "a b c x d", "a b c y d"
    expected = 100 * math.prod([4 / 5, 2 / 4, 1 / 3, 1 / 4]) ** (1 / 4)
    assert one("bleu", answer, reference) == pytest.approx(expected)
    # Four words of six: all precisions are 1, brevity penalty e^(1 − 6/4).
    assert one("bleu", "a b c d", "a b c d e f") == pytest.approx(100 * math.exp(1 - 6 / 4))


def test_bleu_counts_over_the_whole_corpus():
    # Unigrams 2 of 4, bigrams 1 of 2, longer ones do not exist.
    assert score("bleu", ["a b", "x y"], [["a b"], ["p q"]]) == pytest.approx(50)


def test_bleu_takes_different_numbers_of_references():
    answers = ["the cat sat on the mat", "a dog ran far away"]
    assert score("bleu", answers, [["no", "The cat sat on the mat"], ["a dog ran far away"]]) == 100
    assert score("bleu", answers, [["no"], ["a dog ran far away"]]) < 60


def test_bleu_gives_short_right_answers_everything_and_empty_ones_nothing():
    assert score("bleu", ["yes", "in June"], [["Yes"], ["in june"]]) == 100
    assert score("bleu", ["", ""], [["yes"], ["no"]]) == 0


def test_bleu_never_passes_100():
    text = "the cat sat on the mat now"
    assert score("bleu", [text] * 150, [[text]] * 150) == 100


sentences = st.lists(st.text("abc .,'X\u00e9", max_size=25), min_size=1, max_size=5)


@given(answers=sentences, data=st.data())
def test_bleu_from_counts_is_the_library_on_the_whole_corpus(answers, data):
    from sacrebleu.metrics import BLEU

    n_references = data.draw(st.integers(1, 2))
    streams = [
        data.draw(st.lists(st.text("abc .,'X\u00e9", max_size=25), min_size=len(answers), max_size=len(answers)))
        for _ in range(n_references)
    ]
    expected = BLEU(lowercase=True, effective_order=True, force=True).corpus_score(answers, streams).score
    assert score("bleu", answers, list(zip(*streams))) == pytest.approx(expected, abs=1e-9)


ANSWERS = ["the cat sat on the mat", "a dog", "", "a, b and c", "the cat"]
REFERENCES = [["the cat sat on a mat"], ["a dog", "dogs"], ["x"], ["c, b, a"], ["The cat."]]


@pytest.mark.parametrize("metric", AUTOMATIC)
@given(chosen=st.lists(st.integers(0, 4), min_size=5, max_size=5))
def test_a_tally_gives_the_score_of_any_choice_of_answers(metric, chosen):
    found = tally(metric, ANSWERS, REFERENCES)
    assert found is not None
    expected = score(metric, [ANSWERS[n] for n in chosen], [REFERENCES[n] for n in chosen])
    assert found.of_sums(found.counts[chosen].sum(0)) == pytest.approx(expected, abs=1e-9)


def test_a_tally_takes_many_choices_at_once():
    for metric in AUTOMATIC:
        found = tally(metric, ANSWERS, REFERENCES)
        assert found is not None
        many = found.of_sums(found.counts[[[0] * 5, [1] * 5, [0, 1, 2, 3, 4]]].sum(1))
        assert many.shape == (3,)
        assert many[2] == pytest.approx(found.value)


def test_a_tally_of_values_is_their_mean():
    assert mean_tally([0.0, 100.0, 50.0, 50.0]).value == 50
    assert tally("gpt", ["a"], [["a"]]) is None


def test_mean_over_answers():
    assert score("acc", ["a", "b", "c", "d"], [["a"], ["b"], ["x"], ["d"]]) == 75


def test_a_judge_is_not_configured():
    assert score("gpt", ["anything"], [["anything"]]) is None


@pytest.mark.parametrize("metric", AUTOMATIC)
@pytest.mark.parametrize(
    "answer",
    [
        "[" * 50_000,
        "[" + "-" * 50_000 + "1]",
        "[" + "1+" * 50_000 + "1]",
        "(" + "9" * 20_000 + ",)",
        "['\\d', 'a\0b']",
        "[{}: 1]",
        "\ud800",
        "🎉" * 1_000,
        "{[1, 2, 3]}",
        "__import__('os').system('x')",
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_hostile_answers_score_nothing_and_raise_nothing(metric, answer, recwarn):
    assert one(metric, answer, "the right words") == 0
    assert not recwarn.list


@pytest.mark.parametrize("metric", AUTOMATIC)
def test_bad_input_is_named(metric):
    with pytest.raises(ValueError, match="0 answers and 0 references"):
        score(metric, [], [])
    with pytest.raises(ValueError, match="2 answers and 1 references"):
        score(metric, ["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="references 1 are \\[\\]"):
        score(metric, ["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="references 0 are 'yes'"):
        score(metric, ["a"], ["yes"])


def test_unknown_metric_is_named():
    with pytest.raises(ValueError, match=r"unknown metric 'f2'; choose one of acc, f1, rougeL, bleu, match, gpt"):
        score("f2", ["a"], [["a"]])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("metric", "package"), [("rougeL", "rouge_score"), ("bleu", "sacrebleu")])
def test_a_missing_library_is_named_with_its_installation(metric, package, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"'{package}'.*pip install 'kpig-fast\[eval\]'"):
        score(metric, ["a"], [["a"]])


texts = st.text(max_size=30)
references = st.lists(texts, min_size=1, max_size=3)


@pytest.mark.parametrize("metric", AUTOMATIC)
@given(data=st.data())
def test_scores_stay_in_range(metric, data):
    answers = data.draw(st.lists(texts, min_size=1, max_size=4))
    right = [data.draw(references) for _ in answers]
    assert 0 <= score(metric, answers, right) <= 100


@pytest.mark.parametrize("metric", ["acc", "match", "f1"])
@given(answer=texts)
def test_an_answer_equals_itself(metric, answer):
    assert one(metric, answer, "other", answer) == 100


words = st.lists(st.text("abcde\u00e9ж19", min_size=1, max_size=5), min_size=1, max_size=6)


@given(words=words, data=st.data())
def test_match_and_f1_do_not_see_order(words, data):
    shuffled = data.draw(st.permutations(words))
    for wrap in (", ".join, repr):
        assert one("match", wrap(shuffled), wrap(words)) == 100
        assert one("f1", wrap(shuffled), wrap(words)) == 100


@given(words=words, extra=st.text("xyz", min_size=1, max_size=3))
def test_an_item_too_many_breaks_match_and_lowers_f1(words, extra):
    assert one("match", repr([*words, extra]), repr(words)) == 0
    # Every wanted word is found among one more.
    assert one("f1", repr([*words, extra]), repr(words)) == pytest.approx(100 * 2 * len(words) / (2 * len(words) + 1))


@pytest.mark.parametrize("metric", AUTOMATIC)
@given(words=words)
def test_letter_case_never_counts(metric, words):
    text = " ".join(words)
    assert one(metric, text.upper(), text) == one(metric, text, text)
    assert unicodedata.is_normalized("NFC", normalise(text))
