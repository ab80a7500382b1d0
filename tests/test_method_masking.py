"""Key parts to spans, spans to the masked instruction: by hand, by property, and on real instruction pools."""

import json
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kpig_fast.data.schema import Instance
from kpig_fast.method.masking import MASK_TEXT, find_spans, mask_instruction

TEXT = 'Answer with "User" or "Agent". Use at most 3 words.'

texts = st.text(alphabet="ab [MASK]é😀\n", min_size=1, max_size=40)


@st.composite
def instructions_with_spans(draw):
    """An instruction and any spans of it, overlapping or not."""
    text = draw(texts)
    cuts = st.integers(0, len(text))
    spans = draw(st.lists(st.tuples(cuts, cuts).filter(lambda s: s[0] < s[1]), max_size=6))
    return text, spans


def masked_characters(spans) -> set[int]:
    return {index for start, end in spans for index in range(start, end)}


def walk(text: str, spans, mask_text: str) -> str:
    """The masked instruction built character by character, knowing only which are masked and where spans begin."""
    starts, inside = {start for start, _ in spans}, masked_characters(spans)
    return "".join(mask_text if i in starts else "" if i in inside else character for i, character in enumerate(text))


def test_each_key_part_becomes_one_mask():
    assert mask_instruction(TEXT, ['"User" or "Agent"', "at most 3 words"]) == "Answer with [MASK]. Use [MASK]."


def test_texts_and_offsets_may_be_mixed():
    assert mask_instruction(TEXT, [(0, 6), "3"]) == '[MASK] with "User" or "Agent". Use at most [MASK] words.'


def test_without_key_parts_the_instruction_stays():
    assert mask_instruction(TEXT, []) == TEXT
    assert Instance(TEXT, "User").masked_instruction() == TEXT


def test_an_equal_text_takes_the_next_occurrence():
    assert find_spans("no yes no yes no", ["no", "yes", "no"]) == ((0, 2), (3, 6), (7, 9))


def test_occurrences_of_one_text_do_not_overlap():
    assert find_spans("aaaa", ["aa", "aa"]) == ((0, 2), (2, 4))
    with pytest.raises(ValueError, match="'aa' does not occur once more"):
        find_spans("aaa", ["aa", "aa"])


def test_overlapping_parts_merge_and_touching_ones_do_not():
    assert find_spans("abcdef", [(0, 3), (2, 5)]) == ((0, 5),)
    assert find_spans("abcdef", [(0, 6), (2, 3)]) == ((0, 6),)
    assert find_spans("abcdef", ["abc", "bcd", "de"]) == ((0, 5),)
    assert mask_instruction("abcdef", [(0, 3), (3, 5)]) == "[MASK][MASK]f"


def test_another_mask_text_and_unicode_offsets():
    assert mask_instruction("sag «über» 😀!", ["«über»", (11, 12)], mask_text="___") == "sag ___ ___!"


@given(instructions_with_spans())
def test_spans_are_sorted_disjoint_and_cover_what_was_given(case):
    text, given_spans = case
    spans = find_spans(text, given_spans)
    assert masked_characters(spans) == masked_characters(given_spans)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert find_spans(text, spans) == spans


@given(instructions_with_spans(), st.sampled_from([MASK_TEXT, "_", ""]))
def test_everything_outside_the_spans_is_kept(case, mask_text):
    text, given_spans = case
    assert mask_instruction(text, given_spans, mask_text=mask_text) == walk(
        text, find_spans(text, given_spans), mask_text
    )


@given(instructions_with_spans())
def test_masking_is_idempotent(case):
    text, given_spans = case
    masked = mask_instruction(text, given_spans)
    assert mask_instruction(masked, []) == masked
    assert mask_instruction(masked, [MASK_TEXT] * len(find_spans(text, given_spans))) == masked


@given(instructions_with_spans(), st.randoms(use_true_random=False))
def test_the_order_of_key_parts_does_not_matter(case, random):
    text, given_spans = case
    parts = [text[start:end] if random.random() < 0.5 else (start, end) for start, end in dict.fromkeys(given_spans)]
    try:
        spans = find_spans(text, parts)
    except ValueError:
        assume(False)
    random.shuffle(parts)
    assert find_spans(text, parts) == spans


@given(texts, texts)
def test_a_text_is_found_exactly_where_it_first_stands(before, part):
    text = before + part
    ((start, end),) = find_spans(text, [part])
    assert text[start:end] == part
    assert part not in text[: end - 1]


@pytest.mark.parametrize("part", ["user", "Use  at", "", '"User" or "Agent". '])
def test_a_missing_key_part_names_the_instance(part):
    missing = "nowhere" if part.startswith('"') else part
    instance = Instance(TEXT, "User", key_parts=(missing,), id="q17")
    with pytest.raises(ValueError, match=rf"instance 'q17': key part '{missing}' does not occur in .*copy it verbatim"):
        instance.masked_instruction()


def test_an_instance_without_id_is_named_by_its_task():
    with pytest.raises(ValueError, match="an instance of task 'intent': key part 'x'"):
        Instance("ab", "c", key_parts=("x",), task="intent").masked_instruction()


@pytest.mark.parametrize("span", [(-1, 2), (2, 2), (3, 2), (0, 5)])
def test_offsets_outside_the_instruction_are_named(span):
    with pytest.raises(ValueError, match=r"row: key part .* is no span .*0 <= start < end <= 4") as error:
        find_spans("abcd", [span], where="row")
    assert str(span) in str(error.value)


def test_a_long_instruction_is_shortened_in_the_message():
    with pytest.raises(ValueError, match="does not occur") as error:
        find_spans("word " * 1000, ["sentence"])
    assert len(str(error.value)) < 300


def test_real_instruction_pools_have_the_spans_that_were_marked(shared):
    lines = (shared / "data" / "sni_core" / "pools.jsonl").read_text(encoding="utf-8").splitlines()
    wordings = [wording for line in lines for wording in json.loads(line)["instructions"]]
    assert len(wordings) == 180
    for wording in wordings:
        spans = find_spans(wording["text"], wording["key_parts"])
        assert spans == tuple(tuple(span) for span in wording["key_part_spans"])
        assert mask_instruction(wording["text"], spans) == walk(wording["text"], spans, MASK_TEXT)
