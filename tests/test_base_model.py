"""The small pretrained model: size, tokenizer, what it can do; and the script that makes it."""

import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kpig_fast.data.base_model import base_model_path
from kpig_fast.data.encoding import PromptEncoder
from kpig_fast.data.schema import make_instance
from kpig_fast.data.suite import bundled_suite
from kpig_fast.data.suite.lexicon import KIND_OF, NAMES
from kpig_fast.data.suite.tasks import HELD_OUT, SEEN

# The maker is a script beside its text module, not part of the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import base_model_text
import make_base_model

SUITE = bundled_suite(n_train=20, n_validation=0)
WORDINGS = {wording.text for task in SUITE.tasks.values() for wording in task.instructions}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(base_model_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(base_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def card() -> str:
    return (base_model_path() / "README.md").read_text()


def _exact_match(model: Any, tokenizer: Any, name: str, n_rows: int) -> float:
    rows = SUITE.of_task(name, "test")[:n_rows]
    return make_base_model.exact_match(model, tokenizer, SUITE.tasks[name], rows)


def test_all_files_together_are_small():
    files = [path for path in base_model_path().rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= {
        path.name for path in files
    }
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20


def test_model_is_a_small_tied_llama(model):
    assert model.config.model_type == "llama"
    assert sum(parameter.numel() for parameter in model.parameters()) <= 4_000_000
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_tokenizer_and_model_agree(model, tokenizer):
    assert len(tokenizer) == model.config.vocab_size <= 2048
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name) is not None
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


@pytest.mark.parametrize(
    "text", ["Ünïcödé ✓\n\ttab", "horse | owl; [MASK]", " two  blanks ", "", *sorted(WORDINGS)[:5]]
)
def test_tokenizer_is_lossless(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_words_are_single_tokens(tokenizer):
    for word in (*KIND_OF, *NAMES):
        for form in (word.lower(), word.upper(), word.capitalize()):
            assert len(tokenizer(f" {form}").input_ids) == 1, form


def test_sequences_are_short(tokenizer):
    encoder = PromptEncoder(tokenizer)
    for name, task in SUITE.tasks.items():
        for number in range(len(task.instructions)):
            for row in SUITE.of_task(name)[:20]:
                pair = encoder.encode(make_instance(task, row, number))
                prompt = encoder.prompt(task.instructions[number].text, row.context, task.demonstrations)
                assert max(len(pair.complete_ids), len(prompt)) + len(pair.response_ids) < 160


def test_it_beats_the_most_common_answer(model, tokenizer):
    names = SUITE.names("seen")
    reached = [_exact_match(model, tokenizer, name, 20) for name in names]
    blind = []
    for name in names:
        answers = Counter(row.outputs[0] for row in SUITE.of_task(name, "test")[:20])
        blind.append(100 * answers.most_common(1)[0][1] / answers.total())
    assert sum(reached) / len(names) >= sum(blind) / len(names) + 10


def test_it_reads_how_many_items_are_asked_for(model, tokenizer):
    assert _exact_match(model, tokenizer, "first_two", 20) >= 90
    assert _exact_match(model, tokenizer, "first_three", 20) >= 90


def test_the_card_says_how_it_was_made_and_is_licensed(card):
    assert "python benchmarks/make_base_model.py" in card
    assert "apache-2.0" in card.lower()


def test_the_card_tells_the_truth(model, tokenizer, card):
    table = {name: float(value) for name, value in re.findall(r"\| (\w+) \| (\d+) \|", card)}
    assert list(table) == list(SUITE.tasks)
    for name in ("keep_colours", "animal_or_food", "age_and_name"):
        # Float rounding of another machine may flip an answer that is close.
        assert _exact_match(model, tokenizer, name, 50) == pytest.approx(table[name], abs=4)


def test_training_text_is_reproducible_and_right():
    first, second = (random.Random(3) for _ in range(2))
    for _ in range(50):
        exercise = base_model_text.random_exercise(first, 2)
        assert exercise == base_model_text.random_exercise(second, 2)
        assert len(exercise.questions) == 2
        assert all(question.output for question in (*exercise.demonstrations, *exercise.questions))


def test_training_text_avoids_the_suite():
    rng = random.Random(4)
    recipes = {design.recipe for design in (*SEEN, *HELD_OUT)}
    assert recipes == base_model_text.SUITE_RECIPES
    texts = [base_model_text.random_exercise(rng, 1).instruction for _ in range(3000)]
    assert not WORDINGS & set(texts)
    assert not any("[MASK]" in text or "{" in text or "None" in text for text in texts)
    assert len(set(texts)) > 2900


def test_every_recipe_of_the_training_text_has_words():
    rng = random.Random(5)
    operations = set()
    for _ in range(2000):
        recipe = base_model_text.random_recipe(rng)
        context = recipe.context(rng)
        assert recipe.answer(context)
        assert base_model_text.instruction_of(rng, recipe)
        operations.add(recipe.operation)
    assert operations >= {design.recipe.operation for design in SEEN}


def test_questions_share_their_instruction_without_seeing_one_another(model, tokenizer):
    """The log-probs of the shared layout are those of the separate sequences."""
    exercise = base_model_text.random_exercise(random.Random(6), 3)
    row = make_base_model.lay_out(PromptEncoder(tokenizer), exercise)
    other = make_base_model.Layout([5, 6], [0, 1], [0, 0], [-100, -100])
    # The exercise stands after another one in its row, and the row before it is shorter.
    batch = make_base_model.collate([[other], [other, row]])
    targets = batch.pop("targets")
    with torch.no_grad():
        shared = model(**batch).logits[targets != -100].log_softmax(-1)
        separate = []
        for question in exercise.questions:
            encoder = PromptEncoder(tokenizer)
            prompt = encoder.prompt(exercise.instruction, question.context, exercise.demonstrations)
            answer = [*tokenizer(f" {question.output}").input_ids, tokenizer.eos_token_id]
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            separate.append(logits.log_softmax(-1))
    torch.testing.assert_close(shared, torch.cat(separate), rtol=1e-4, atol=1e-4)


def test_batches_hold_whole_exercises(tokenizer):
    data = make_base_model.batches(tokenizer, seed=7)
    for batch in (next(data) for _ in range(3)):
        rows, width = batch["input_ids"].shape
        assert rows == make_base_model.ROWS
        assert width <= make_base_model.WIDTH
        ends = (batch["targets"] == tokenizer.eos_token_id).sum(1)
        assert (ends % make_base_model.QUESTIONS == 0).all()
        assert (ends > 0).all()


def test_training_repeats_to_the_bit(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(make_base_model, "ROWS", 1)
    weights = []
    for run in ("a", "b"):
        model = make_base_model.make_model(len(tokenizer))
        start = model.lm_head.weight.detach().clone()
        make_base_model.train(model, tokenizer, 3, tmp_path / run)
        assert not torch.equal(model.lm_head.weight, start)
        weights.append((tmp_path / run / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
