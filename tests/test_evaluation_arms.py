"""Names of arms: which runs belong together, and what is said of the difference."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpig_fast.evaluation.arms import arm_names


def names(*settings, strategy="kpig"):
    return arm_names([(strategy, one) for one in settings])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([{"seed": 0, "output_dir": "a"}, {"seed": 1, "output_dir": "b"}], ["kpig", "kpig"]),
        ([{"ablate": []}, {"ablate": ["masks"]}], ["kpig", "kpig -masks"]),
        ([{"ablate": ["masks", "diversity"]}, {"ablate": ()}], ["kpig -masks -diversity", "kpig"]),
        ([{"training": {"lam": 0.1}}, {"training": {}}], ["kpig lam=0.1", "kpig"]),
        ([{"training": {"lam": 0.1}}, {"training": {"lam": 0.02}}], ["kpig lam=0.1", "kpig lam=0.02"]),
        ([{"lora": None}, {"lora": {"r": 8}}], ["kpig", "kpig r=8"]),
        (
            [{"model": "small", "dtype": "float32"}, {"model": "large", "dtype": "float32"}],
            ["kpig model=small", "kpig model=large"],
        ),
        ([{"data": {"strict": False}}, {"data": {"strict": True}}], ["kpig strict=false", "kpig strict=true"]),
        ([{"replay": {"tasks": 0}}, {"replay": {}}], ["kpig tasks=0", "kpig"]),
        # The last parts of these two names are the same.
        (
            [
                {"replay": {"instances": 1}, "penalty": {"instances": 2}},
                {"replay": {"instances": 2}, "penalty": {"instances": 1}},
            ],
            ["kpig replay.instances=1 penalty.instances=2", "kpig replay.instances=2 penalty.instances=1"],
        ),
        ([{"stream": {"order": ["a", "b"]}}, {"stream": {"order": None}}], ['kpig order=["a", "b"]', "kpig"]),
    ],
)
def test_names(settings, expected):
    assert names(*settings) == expected


def test_what_differs_between_strategies_alone_is_not_shown():
    runs = [("sft", {"replay": {"tasks": 0}}), ("kpig", {"replay": {"tasks": 4}}), ("kpig", {"replay": {"tasks": 4}})]
    assert arm_names(runs) == ["sft", "kpig", "kpig"]


def test_a_text_and_a_number_are_told_apart_from_nothing():
    assert names({"x": {"y": None}}, {"x": {"y": 0}}, {"x": {"y": "a"}}) == ["kpig", "kpig y=0", "kpig y=a"]


values = st.none() | st.integers(-3, 3) | st.lists(st.integers(0, 2), max_size=2)
settings = st.fixed_dictionaries(
    {"seed": st.integers(0, 3), "output_dir": st.text(max_size=3)},
    optional={"lam": values, "replay": st.dictionaries(st.sampled_from(["tasks", "lam"]), values), "penalty": values},
)


def meaning(one):
    """The settings that count, without what says nothing."""
    flat = {name: value for name, value in one.items() if name not in ("seed", "output_dir", "replay")}
    flat |= {("replay", name): value for name, value in one.get("replay", {}).items()}
    return {name: value for name, value in flat.items() if value not in (None, [])}


@given(st.lists(settings, min_size=2, max_size=4))
def test_names_are_equal_where_the_settings_are_and_only_there(runs):
    found = names(*runs)
    for name, one in zip(found, runs):
        for other_name, other in zip(found, runs):
            assert (name == other_name) is (meaning(one) == meaning(other))


@given(st.lists(settings, min_size=2, max_size=4), st.randoms())
def test_names_do_not_depend_on_the_order_of_runs_but_for_that_of_their_words(runs, random):
    order = list(range(len(runs)))
    random.shuffle(order)
    shuffled = names(*[runs[n] for n in order])
    found = names(*runs)
    assert [set(shuffled[k].split()) for k in range(len(order))] == [set(found[n].split()) for n in order]
