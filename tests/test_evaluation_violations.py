"""Every rule of form and scope, obeyed and violated, and the half-listening shares."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpig_fast.data.schema import Constraints, FormatRule
from kpig_fast.evaluation.half_listening import obedience
from kpig_fast.evaluation.violations import violations


def form(kind, **rule) -> Constraints:
    return Constraints(format=(FormatRule(kind=kind, **rule),))


def check(constraints: Constraints, answer: str, obeyed: bool) -> None:
    assert violations(constraints, answer) == {"WFR": not obeyed}


@pytest.mark.parametrize(
    ("answer", "obeyed"),
    [
        ("[1, 2]", True),
        ('["a", "b"]', True),
        ("[[1], [2, 3]]", True),
        ("[]", True),
        (" [1] \n", True),
        ("{[1, 2, 3]}", False),
        ("['a']", False),
        ("[1, 2", False),
        ("[1, 2] ok", False),
        ("[NaN]", False),
        ("[1,]", False),
        ("1, 2", False),
        ('{"a": 1}', False),
        ("3", False),
        ("[" * 100_000, False),
    ],
)
def test_json_list(answer, obeyed):
    check(form("json_list"), answer, obeyed)


@pytest.mark.parametrize(
    ("text", "answer", "obeyed"),
    [
        (", ", "a, b, c", True),
        (", ", "New York, Rome", True),
        (", ", "a", True),
        (", ", "a,b", False),
        (", ", "a,  b", False),
        (", ", "a; b", False),
        (", ", "a, b; c", False),
        (", ", "a | b", False),
        (", ", "a - b", False),
        (", ", "a\nb", False),
        (", ", "a, b,", False),
        (", ", "a, , b", False),
        (", ", "well-known, tick-tock", True),
        (",", "a,b", True),
        (",", "a, b", False),
        (" | ", "a | b", True),
        (" | ", "a|b", False),
        (" - ", "a - b", True),
        (" / ", "a / b - c", False),
        ("->", "a->b", True),
        ("->", "a=>b", False),
        ("\n", "a b\nc", True),
        ("\n", "a\n\nc", False),
        ("", "a b  c", True),
        ("", "a, b", False),
        (" ", "a  b", False),
    ],
)
def test_delimiter(text, answer, obeyed):
    check(form("delimiter", text=text), answer, obeyed)


@pytest.mark.parametrize(
    ("text", "answer", "up", "down"),
    [
        (", ", "a, b, c", True, False),
        (", ", "c, b, a", False, True),
        (", ", "a, b, a", False, False),
        (", ", "a, a", True, True),
        (", ", "Bob, ann", False, True),
        (", ", "ann, Bob", True, False),
        (", ", "9, 10, 100", True, False),
        (", ", "-3, 2.5, 1e3", True, False),
        (", ", "10, 9, x", True, False),
        (",", "a , b", True, False),
        ("", "1 2 10", True, False),
        ("", "[1, 2, 10]", True, False),
        (", ", '["b", "a"]', False, True),
    ],
)
def test_order(text, answer, up, down):
    check(form("order", text=text), answer, up)
    check(form("reverse_order", text=text), answer, down)


@pytest.mark.parametrize(
    ("answer", "upper", "lower", "capitalized"),
    [
        ("USER", True, False, False),
        ("user", False, True, False),
        ("User", False, False, True),
        ("A", True, False, True),
        ("New York", False, False, True),
        ("New york", False, False, False),
        ("NEW York", False, False, False),
        ("McDonald", False, False, False),
        ("ÉTÉ 3!", True, False, False),
        ("straße", False, True, False),
        ("'Tis", False, False, True),
        ("123 - ?", True, True, True),
        ("北京", True, True, True),
    ],
)
def test_letter_case(answer, upper, lower, capitalized):
    check(form("upper"), answer, upper)
    check(form("lower"), answer, lower)
    check(form("capitalized"), answer, capitalized)


@pytest.mark.parametrize(
    ("kind", "answer", "count"),
    [
        ("words", "one", 1),
        ("words", "one two\tthree\nfour", 4),
        ("words", "w " * 10_000, 10_000),
        ("sentences", "One. Two! Three?", 3),
        ("sentences", "No full stop", 1),
        ("sentences", "One. two", 1),
        ("sentences", "It costs 3.50 euros, e.g. here. Right?", 2),
        ("sentences", 'He said "No." Then he left...', 2),
        ("sentences", "今日は。はい。", 2),
        ("sentences", "...", 0),
        ("items", "a, b, c", 3),
        ("items", "a", 1),
        ("items", '["a, b", "c"]', 2),
    ],
)
def test_counts(kind, answer, count):
    rule = {"text": ", "} if kind == "items" else {}
    check(form(kind, minimum=count, maximum=count, **rule), answer, True)
    check(form(kind, minimum=count, **rule), answer, True)
    check(form(kind, maximum=count, **rule), answer, True)
    check(form(kind, minimum=count + 1, **rule), answer, False)
    if count:
        check(form(kind, maximum=count - 1, **rule), answer, False)


def test_items_default_to_white_space():
    check(form("items", minimum=3, maximum=3), "a b\nc", True)


@pytest.mark.parametrize(
    ("answer", "obeyed"),
    [("Mia - 31", True), ("Mia - 31.", False), ("x Mia - 31", False), ("mia - 31", False), ("Mia - 3\n1", False)],
)
def test_regex_takes_the_whole_answer(answer, obeyed):
    check(form("regex", text="[A-Z][a-z]+ - [0-9]+"), answer, obeyed)


def test_all_rules_of_form_must_be_obeyed():
    both = Constraints(format=(FormatRule(kind="delimiter", text="; "), FormatRule(kind="upper")))
    check(both, "A; B", True)
    check(both, "A; b", False)
    check(both, "A, B", False)


@pytest.mark.parametrize(
    ("answer", "inside"),
    [("User", True), (" User\n", True), ("user", False), ("User.", False), ('"User"', False), ("User Agent", False)],
)
def test_labels_are_exact(answer, inside):
    assert violations(Constraints(labels=("User", "Agent")), answer) == {"OOS": not inside}


@pytest.mark.parametrize("answer", ["caf\u00e9", "cafe\u0301"])
@pytest.mark.parametrize("right", ["caf\u00e9", "cafe\u0301"])
def test_scope_does_not_see_how_a_letter_is_composed(answer, right):
    assert violations(Constraints(labels=(right,)), answer) == {"OOS": False}
    assert violations(Constraints(spans_of_context=True), answer, f"the {right} there") == {"OOS": False}
    assert violations(Constraints(labels=(right,)), "cafe") == {"OOS": True}


def test_labels_hold_item_by_item_in_lists():
    steps = Constraints(labels=("WALK", "RUN", "a, b"), format=(FormatRule(kind="delimiter", text=", "),))
    assert violations(steps, "RUN, WALK, RUN") == {"WFR": False, "OOS": False}
    assert violations(steps, "RUN, JUMP")["OOS"]
    assert not violations(steps, "a, b")["OOS"]
    listed = Constraints(labels=("WALK", "RUN"), format=(FormatRule(kind="json_list"),))
    assert violations(listed, '["RUN", "WALK"]') == {"WFR": False, "OOS": False}
    assert violations(listed, '["RUN", "walk"]') == {"WFR": False, "OOS": True}
    assert violations(Constraints(labels=("WALK", "RUN")), "RUN, WALK") == {"OOS": True}


CONTEXT = "The baker thanked the nurse, because she helped."


@pytest.mark.parametrize(
    ("answer", "inside"),
    [("The baker", True), ("the baker", False), ("helped.", True), ("baker nurse", False), ("nurse, because", True)],
)
def test_spans_of_the_context(answer, inside):
    assert violations(Constraints(spans_of_context=True), answer, CONTEXT) == {"OOS": not inside}


def test_spans_of_the_context_hold_item_by_item_in_lists():
    listed = Constraints(spans_of_context=True, format=(FormatRule(kind="items", text="; ", maximum=3),))
    assert violations(listed, "nurse; baker", CONTEXT) == {"WFR": False, "OOS": False}
    assert violations(listed, "nurse; doctor", CONTEXT) == {"WFR": False, "OOS": True}
    ordered = Constraints(spans_of_context=True, format=(FormatRule(kind="order"),))
    assert violations(ordered, "baker nurse", CONTEXT) == {"WFR": False, "OOS": False}


def test_without_context_nothing_is_in_scope():
    assert violations(Constraints(spans_of_context=True), "baker") == {"OOS": True}


def test_labels_and_spans_must_both_hold():
    both = Constraints(labels=("baker", "pilot"), spans_of_context=True)
    assert violations(both, "baker", CONTEXT) == {"OOS": False}
    assert violations(both, "pilot", CONTEXT) == {"OOS": True}
    assert violations(both, "nurse", CONTEXT) == {"OOS": True}


@pytest.mark.parametrize(("answer", "wordy"), [("a b c", False), ("a b c d", True), ("w " * 10_000, True), ("", False)])
def test_wordy(answer, wordy):
    assert violations(Constraints(max_words=3), answer) == {"WR": wordy}


def test_only_defined_constraints_are_reported():
    assert violations(Constraints(), "anything") == {}


ALL_KINDS = [
    FormatRule(kind=kind, text=text)
    for kind, text in [
        ("json_list", ""),
        ("delimiter", ", "),
        ("order", ""),
        ("reverse_order", ""),
        ("upper", ""),
        ("lower", ""),
        ("capitalized", ""),
        ("words", ""),
        ("sentences", ""),
        ("items", ""),
        ("regex", ".*"),
    ]
]


@pytest.mark.parametrize("rule", ALL_KINDS, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("answer", ["", " \n "])
def test_an_empty_answer_has_no_form_and_no_scope(rule, answer):
    everything = Constraints(labels=("", "a"), spans_of_context=True, format=(rule,), max_words=1)
    assert violations(everything, answer, "a") == {"WFR": True, "OOS": True, "WR": False}


def test_every_kind_of_rule_is_covered_here():
    pattern = FormatRule.model_fields["kind"].annotation
    assert [rule.kind for rule in ALL_KINDS] == list(pattern.__args__)


@pytest.mark.parametrize("rule", ALL_KINDS, ids=lambda rule: rule.kind)
@given(answer=st.text(max_size=40), context=st.text(max_size=20))
def test_any_answer_is_judged(rule, answer, context):
    constraints = Constraints(labels=("a",), spans_of_context=True, format=(rule,), max_words=2)
    found = violations(constraints, answer, context)
    assert list(found) == ["WFR", "OOS", "WR"]
    assert all(isinstance(value, bool) for value in found.values())
    assert violations(constraints, f"\n {answer} ", context) == found


words = st.lists(st.text("abcXYZ19", min_size=1, max_size=4), min_size=1, max_size=6)


@given(words=words, used=st.sampled_from([", ", "; ", " | ", " / ", " - ", "\n"]), data=st.data())
def test_only_the_asked_delimiter_separates(words, used, data):
    asked = data.draw(st.sampled_from([", ", "; ", " | ", " / ", " - ", "\n"]))
    check(form("delimiter", text=asked), used.join(words), used == asked or len(words) == 1)


@given(words=words)
def test_sorted_items_are_in_order(words):
    up = sorted(words, key=str.casefold)
    if all(re.fullmatch("[0-9]+", word) for word in words):
        up = sorted(words, key=int)
    check(form("order", text="; "), "; ".join(up), True)
    check(form("reverse_order", text="; "), "; ".join(reversed(up)), True)


OLD, NEW = Constraints(labels=("User", "Agent")), Constraints(labels=("user", "agent"))


def test_half_listening_shares():
    answers = ["user", "agent", "User", "Agent", "Agent", "customer", "", "user."]
    assert obedience(answers, NEW, OLD) == {"asked": 25, "old": 37.5, "neither": 37.5}


def test_what_obeys_both_obeys_what_was_asked():
    assert obedience(["A1"], form("upper"), form("regex", text="A.")) == {"asked": 100, "old": 0, "neither": 0}


def test_half_listening_looks_into_the_context():
    asked, old = Constraints(spans_of_context=True), Constraints(labels=("none",))
    assert obedience(["ant", "none"], asked, old, ["an ant", "a bee"]) == {"asked": 50, "old": 50, "neither": 0}


def test_half_listening_names_bad_input():
    with pytest.raises(ValueError, match="0 answers"):
        obedience([], NEW, OLD)
    with pytest.raises(ValueError, match="1 answers and 2 contexts"):
        obedience(["a"], NEW, OLD, ["b", "c"])
    with pytest.raises(ValueError, match="the old constraints check nothing"):
        obedience(["a"], NEW, Constraints())
    with pytest.raises(ValueError, match="the asked constraints check nothing"):
        obedience(["a"], Constraints(), OLD)
