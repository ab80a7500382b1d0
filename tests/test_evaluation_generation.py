"""Greedy generation: the batch, the padding and the model's own settings must not show in the answers."""

import json
import logging
import random

import pytest
import torch
from evaluation_models import POSITIONS, byte_tokenizer, small_model, teach
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from kpig_fast.data.encoding import PromptEncoder
from kpig_fast.evaluation.generation import generate_answers

TOKENIZER = byte_tokenizer()
NEW = 12


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    lengths = [1, 40, 7, 7, 23, 90, 2, 31, 64, 5, 12, 3]
    return [[rng.randrange(256) for _ in range(length)] for length in lengths]


def argmax_ids(model, prompt: list[int], new: int = NEW) -> list[int]:
    """What greedy means: the likeliest next token, one full forward each, no cache, no padding."""
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def argmax_text(model, prompt: list[int], ends: tuple[int, ...] = (257,)) -> str:
    ids = argmax_ids(model, prompt)
    stop = next((k for k, token in enumerate(ids) if token in ends), NEW)
    return TOKENIZER.decode(ids[:stop], skip_special_tokens=True).strip()


def answer(model, prompts, tokenizer=TOKENIZER, **settings) -> list[str]:
    return generate_answers(model, tokenizer, prompts, **{"max_new_tokens": NEW, **settings})


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_batched_answers_are_the_argmax_of_separate_forwards(family, prompts):
    model = small_model(family)
    expected = [argmax_text(model, prompt) for prompt in prompts]
    assert len(set(expected)) == len(prompts), "the model must answer every prompt differently"
    assert answer(model, prompts) == expected


@pytest.mark.parametrize("batch_tokens", [1, 60, 150, 100_000])
def test_answers_do_not_depend_on_the_batch_size(model, prompts, batch_tokens):
    assert answer(model, prompts, batch_tokens=batch_tokens) == [answer(model, [p])[0] for p in prompts]


def test_batches_respect_the_budget_and_come_longest_first(model, prompts, monkeypatch):
    shapes = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **inputs: shapes.append(tuple(inputs["input_ids"].shape)) or generate(**inputs)
    )
    answer(model, prompts, batch_tokens=120)
    assert sum(rows for rows, _ in shapes) == len(prompts)
    assert [width for _, width in shapes] == sorted((width for _, width in shapes), reverse=True)
    assert all(rows == 1 or rows * (width + NEW) <= 120 for rows, width in shapes)
    assert any(rows > 2 for rows, _ in shapes)
    assert shapes[0] == (1, 90)


def test_an_answer_ends_at_any_end_token(model, prompts):
    ids = argmax_ids(model, prompts[1])
    end = ids[5]
    first = ids.index(end)
    expected = TOKENIZER.decode(ids[:first]).strip()
    assert answer(model, [prompts[1]], end_ids=[end]) == [expected] != [argmax_text(model, prompts[1])]
    model.generation_config.eos_token_id = [257, end]
    try:
        assert answer(model, [prompts[1]]) == [expected]
    finally:
        model.generation_config.eos_token_id = 257


def test_end_token_of_the_tokenizer_counts_too(model, prompts):
    ids = argmax_ids(model, prompts[4])
    other = byte_tokenizer(eos_token=TOKENIZER.convert_ids_to_tokens(ids[3]))
    assert answer(model, [prompts[4]], tokenizer=other) == [TOKENIZER.decode(ids[: ids.index(ids[3])]).strip()]


def test_padding_token_of_the_tokenizer_changes_nothing(model, prompts):
    padded = byte_tokenizer(pad_token="</s>")
    assert TOKENIZER.pad_token_id is None
    assert padded.pad_token_id == 257
    assert answer(model, prompts, tokenizer=padded) == answer(model, prompts)


def test_answers_without_any_end_token_run_to_their_full_length(prompts):
    model = small_model(eos_token_id=None)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    assert answer(model, prompts, tokenizer=tokenizer) == [argmax_text(model, prompt, ends=()) for prompt in prompts]


def test_sampling_settings_of_the_model_neither_change_answers_nor_warn(prompts, caplog, recwarn):
    plain = answer(small_model(), prompts)
    model = small_model()
    settings = {"do_sample": True, "temperature": 0.3, "top_p": 0.5, "top_k": 7, "repetition_penalty": 5.0}
    for name, value in {**settings, "max_length": 30, "num_beams": 3}.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            assert answer(model, prompts) == plain
    finally:
        transformers_logging.disable_propagation()
    assert not caplog.records
    assert not [warning for warning in recwarn if "generation" in str(warning.message)]
    assert model.generation_config is before
    assert before.do_sample is True
    assert before.repetition_penalty == 5.0


def test_the_cache_is_used_even_if_training_switched_it_off(prompts):
    model = small_model()
    model.config.use_cache = False
    widths = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    answers = answer(model, prompts[1:2])
    assert widths == [len(prompts[1])] + [1] * (NEW - 1)
    assert answers == [argmax_text(model, prompts[1])]
    assert model.config.use_cache is False


@pytest.mark.parametrize("fails", [False, True])
def test_training_flags_are_restored_module_by_module(prompts, fails, monkeypatch):
    model = small_model()
    model.train()
    model.model.layers[1].mlp.eval()
    flags = [module.training for module in model.modules()]
    assert len(set(flags)) == 2
    seen = []
    generate = model.generate

    def watched(**inputs):
        seen.append(any(module.training for module in model.modules()))
        if fails:
            raise RuntimeError("out of memory")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", watched)
    settings = model.generation_config
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            answer(model, prompts)
    else:
        answer(model, prompts)
    assert seen
    assert not any(seen)
    assert [module.training for module in model.modules()] == flags
    assert model.generation_config is settings


def test_dropout_is_off(prompts):
    model = small_model(attention_dropout=0.9)
    model.train()
    assert answer(model, prompts) == answer(small_model(), prompts)


def test_a_model_under_peft_answers_with_its_adapter(prompts):
    base = small_model()
    plain = answer(base, prompts)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    base.generation_config.repetition_penalty = 5.0
    adapted = answer(model, prompts)
    model.eval()
    assert adapted == [argmax_text(model, prompt) for prompt in prompts]
    assert adapted != plain
    assert base.generation_config.repetition_penalty == 5.0
    assert model.generation_config.repetition_penalty == 5.0


def test_gradients_flow_after_generation(prompts):
    model = small_model()
    answer(model, prompts[:2])
    ids = torch.tensor([prompts[1]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_cut_at_the_first_new_line():
    model = small_model()
    asked, said = TOKENIZER("Say it.").input_ids, TOKENIZER("\n one two \nthree").input_ids
    teach(model, [(asked, [*said, 257])])
    assert generate_answers(model, TOKENIZER, [asked], max_new_tokens=40) == ["one two \nthree"]
    assert generate_answers(model, TOKENIZER, [asked], max_new_tokens=40, stop_at_newline=True) == ["one two"]


def test_no_prompts_no_answers(model):
    assert answer(model, []) == []


def test_equal_prompts_get_equal_answers(model, prompts):
    assert len(set(answer(model, [prompts[2]] * 9, batch_tokens=50))) == 1


def test_prompts_may_use_every_position_and_no_more(model):
    longest = [65] * (POSITIONS - NEW)
    assert len(answer(model, [[66], longest])) == 2
    with pytest.raises(
        ValueError, match=rf"prompt 1 has {POSITIONS - NEW + 1} prompt tokens.*room for {POSITIONS - NEW} "
    ):
        answer(model, [[66], [*longest, 65]])
    with pytest.raises(ValueError, match=r"^second has"):
        answer(model, [[66], [*longest, 65]], names=["first", "second"])


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        answer(model, [[1], [2], []])
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        answer(model, [[1]], max_new_tokens=0)


def test_progress_bar_counts_answers(model, prompts, capsys):
    answer(model, prompts, progress=True)
    shown = capsys.readouterr()
    assert f"{len(prompts)}/{len(prompts)}" in shown.err
    assert not shown.out
    answer(model, prompts)
    assert not capsys.readouterr().err


@pytest.fixture(scope="module")
def alike() -> list[list[int]]:
    """Prompts of four tasks, two of which begin alike, and others: short, equal, the beginning of another."""
    rng = random.Random(1)

    def some(n: int) -> list[int]:
        return [rng.randrange(256) for _ in range(n)]

    tasks = [some(40), some(25), some(60)]
    tasks.append(tasks[0][:20] + some(15))
    prompts = [task + some(rng.randrange(1, 14)) for task in tasks for _ in range(5)]
    prompts += [some(5), some(30), tasks[1], prompts[7]]
    rng.shuffle(prompts)
    return prompts


# What four tasks begin with, in 60 tokens at most, and one more prompt of over 13 tokens; then the last 13 of all.
ALIKE_ONCE = [(5, 60), (24, 13)]


def embedded(model) -> list[tuple[int, ...]]:
    """A list that fills with the shapes of token ids that ``model`` is called with."""
    shapes: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(lambda _, ids, __: shapes.append(tuple(ids[0].shape)))
    return shapes


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("mistral", {"num_key_value_heads": 2, "sliding_window": 8}),
        ("cohere2", {"num_key_value_heads": 2, "sliding_window": 8}),
        ("qwen3", {"num_key_value_heads": 4, "head_dim": 8}),
        ("phi3", {"sliding_window": 8}),
        ("gpt_neox", {}),
        ("gpt2", {}),
        ("opt", {}),
    ],
)
def test_what_prompts_begin_with_alike_is_computed_once(family, changes, alike):
    model = small_model(family, **changes).double()
    expected = [argmax_text(model, prompt) for prompt in alike]
    assert len(set(expected)) > 10
    shapes = embedded(model)
    assert answer(model, alike) == expected
    assert shapes[:2] == ALIKE_ONCE


# Their attention is hidden by the least float64, which is lost in its float32 softmax: nothing to compare in float64.
@pytest.mark.parametrize(("family", "changes"), [("gemma2", {"head_dim": 8, "sliding_window": 8}), ("bloom", {})])
def test_eager_attention_shares_too(family, changes, alike):
    model = small_model(family, **changes)
    expected = [argmax_text(model, prompt) for prompt in alike]
    shapes = embedded(model)
    assert answer(model, alike) == expected
    assert shapes[:2] == ALIKE_ONCE


@pytest.mark.parametrize(("family", "changes"), [("mamba", {"state_size": 4}), ("openai-gpt", {})])
def test_models_that_keep_something_else_answer_without_sharing(family, changes, alike):
    model = small_model(family, **changes)
    shapes = embedded(model)
    answers = answer(model, alike)
    assert shapes[0] == (len(alike), max(map(len, alike)))
    assert answers == [answer(model, [prompt])[0] for prompt in alike]


def test_the_longest_own_ending_decides_what_is_shared(model):
    start = list(range(20))
    prompts = [[*start, 101, 102], [*start, 111, 112, 113], [*start, 121, 122, 123, 124, 125], [1, 2, 3]]
    expected = [argmax_text(model, prompt) for prompt in prompts]
    shapes = embedded(model)
    assert answer(model, prompts) == expected
    # Without their last three, the others are the beginning of the longest: 22 + 4 · 3 tokens. With the last five of
    # each it were 20 + 4 · 5, with the last two two beginnings, 2 · 23 + 4 · 2.
    assert shapes[:3] == [(1, 22), (4, 3), (4, 1)]


def test_little_in_common_is_no_reason_for_a_further_call(model):
    prompts = [[256, *range(n, n + 30)] for n in (1, 50, 100)]
    shapes = embedded(model)
    answer(model, prompts)
    assert shapes[0] == (3, 31)


@given(prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_any_prompts_are_answered_as_alone(prompts):
    model = small_model().double()
    assert answer(model, prompts, max_new_tokens=4) == [
        answer(model, [prompt], max_new_tokens=4)[0] for prompt in prompts
    ]


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_adapters_share_and_virtual_tokens_do_not(alike):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(small_model().double(), lora).eval()
    expected = [argmax_text(adapted, prompt) for prompt in alike]
    shapes = embedded(adapted)
    assert answer(adapted, alike) == expected
    assert shapes[:2] == ALIKE_ONCE
    tuned = get_peft_model(small_model(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    # Of one length, because PEFT counts padding as positions.
    equal = [prompt[:25] for prompt in alike if len(prompt) >= 25]
    assert answer(tuned, equal) == [answer(tuned, [prompt])[0] for prompt in equal]


def test_real_model_answers_the_same_in_batches_and_alone(shared):
    folder = shared / "models" / "stories260K-sni"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (shared / "data/sni_core/eval.jsonl").read_text().splitlines()[::40]]
    encoder = PromptEncoder(tokenizer)
    prompts = [encoder.prompt(row["definition"], row["input"]) for row in rows]
    prompts = [prompt for prompt in prompts if len(prompt) + 16 <= 512]
    assert len(prompts) > 20
    together = generate_answers(model, tokenizer, prompts, max_new_tokens=16)
    assert together == [generate_answers(model, tokenizer, [prompt], max_new_tokens=16)[0] for prompt in prompts]
    assert len(set(together)) > 5
    assert not any("</s>" in text or text != text.strip() for text in together)
