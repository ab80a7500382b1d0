"""``KeyPartScorer`` against separate float64 forwards of small random models."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_models import byte_tokenizer
from families import make_model
from peft import LoraConfig, get_peft_model
from separate import apart, largest_error, score_apart
from torch import nn
from transformers import PreTrainedModel

from kpig_fast import GainScores, Instance, KeyPartScorer
from kpig_fast.method.gain import gain_bound
from kpig_fast.tree import scoring

TOKENIZER = byte_tokenizer()
YES_NO = 'Answer "yes" or "no" in capitals: is the number even?'
PARTS = ('"yes" or "no"', "capitals")
INSTANCES = [
    Instance(YES_NO, "NO", "17", PARTS, id="a"),
    Instance(
        "List the words in reverse order, split by commas.", "a, fox, the", "the fox a", ("reverse order", (38, 44))
    ),
    Instance(YES_NO, "YES", "4", PARTS),
    Instance("Say hello.", "hello", "", ("hello",)),
    Instance(YES_NO, "NO, IT IS NOT EVEN, AND NEVER WAS", "99", PARTS),
    Instance("Nothing is masked here.", "indeed"),
]


def model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same random model in either precision, its logits spread like those of a trained one."""
    lm = make_model("llama", dtype=dtype, vocab_size=len(TOKENIZER), max_position_embeddings=256)
    with torch.no_grad():
        lm.lm_head.weight.mul_(2)  # type: ignore[union-attr]
    return lm


@pytest.fixture(scope="module")
def scorer() -> KeyPartScorer:
    return KeyPartScorer(model(), TOKENIZER)


def assert_same(found: GainScores, expected: GainScores, tolerance: float = 1e-5) -> None:
    """Equal up to float32 rounding, in the same order."""
    torch.testing.assert_close(found.gain, expected.gain, rtol=0, atol=tolerance)
    for a, b in zip([*found.complete, *found.masked], [*expected.complete, *expected.masked], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("tail_tol", [0.0, 1e-7, 0.01])
def test_equals_separate_float64_forwards(alpha: float, tail_tol: float) -> None:
    scorer = KeyPartScorer(model(), TOKENIZER, alpha=alpha, tail_tol=tail_tol)
    scores = scorer.score(INSTANCES)
    exact = score_apart(model(torch.float64), scorer.encoder.encode_all(INSTANCES), alpha)
    assert largest_error(scores.complete, exact.complete) <= 2e-5
    assert largest_error(scores.masked, exact.masked) <= 2e-5
    assert float((scores.gain - exact.gain).abs().max()) <= 1e-5 + tail_tol
    assert float(scores.gain.abs().max()) < gain_bound(alpha)
    assert float(scores.gain[:5].abs().min()) > 1e-9


def test_only_the_tokens_that_count_are_scored() -> None:
    # A space before the answer, and the end token.
    responses = [len(i.output) + 2 for i in INSTANCES]
    assert [len(v) for v in KeyPartScorer(model(), TOKENIZER, tail_tol=0).score(INSTANCES).complete] == responses
    cut = KeyPartScorer(model(), TOKENIZER).score(INSTANCES)
    assert [len(v) for v in cut.complete] == [min(n, 14) for n in responses]
    assert [len(v) for v in cut.masked] == [min(n, 14) for n in responses]
    assert max(responses) > 14


def test_form_of_the_result(scorer: KeyPartScorer) -> None:
    scores = scorer.score(INSTANCES)
    assert scores.gain.dtype == torch.float64
    assert scores.gain.shape == (len(INSTANCES),)
    assert all(v.dtype == torch.float32 and v.dim() == 1 for v in scores.complete + scores.masked)
    assert all(float(v.max()) <= 0 for v in scores.complete + scores.masked)
    assert scores.hidden == []
    assert not any(v.requires_grad for v in [scores.gain, *scores.complete, *scores.masked])


def test_zero_exactly_when_nothing_is_masked(scorer: KeyPartScorer) -> None:
    plain = [replace(instance, key_parts=()) for instance in INSTANCES]
    # Among others, whose rounding must not matter.
    scores = scorer.score([*INSTANCES, *plain])
    assert scores.gain[len(INSTANCES) :].tolist() == [0.0] * len(INSTANCES)
    for a, b in zip(scores.complete[len(INSTANCES) :], scores.masked[len(INSTANCES) :]):
        assert torch.equal(a, b)


def test_input_order_is_kept(scorer: KeyPartScorer) -> None:
    scores = scorer.score(INSTANCES)
    order = [3, 0, 5, 2, 4, 1]
    assert_same(
        scorer.score([INSTANCES[i] for i in order]),
        GainScores(
            scores.gain[order], [scores.complete[i] for i in order], [scores.masked[i] for i in order], scores.stats
        ),
        1e-6,
    )
    assert len(scores.gain.unique()) == len(INSTANCES)


def test_dicts_are_instances_too(scorer: KeyPartScorer) -> None:
    rows = [
        {"instruction": YES_NO, "input": "17", "output": "NO", "key_parts": list(PARTS)},
        {"prompt": "Say hello.", "completion": "hello", "key_parts": ["hello"]},
        {
            "messages": [
                {"role": "user", "content": "Say hello."},
                {"role": "assistant", "content": "hello"},
            ],
            "key_parts": [[4, 9]],
        },
    ]
    scores = scorer.score(rows)
    assert_same(scores, scorer.score([INSTANCES[0], INSTANCES[3], INSTANCES[3]]), 1e-6)
    assert scorer.encode(rows[0]) == scorer.encode(INSTANCES[0])


@pytest.mark.parametrize("max_tokens", [1, 40, 100, 300])
def test_any_budget_gives_the_same(scorer: KeyPartScorer, max_tokens: int) -> None:
    whole = scorer.score(INSTANCES)
    cut = KeyPartScorer(model(), TOKENIZER, max_tokens=max_tokens).score(INSTANCES)
    assert_same(cut, whole)
    assert whole.stats.trees == 1
    assert cut.stats.trees > 1
    assert cut.stats.tokens > whole.stats.tokens or max_tokens == 300


def test_statistics(scorer: KeyPartScorer) -> None:
    instances = INSTANCES[:4]
    pairs = [scorer.encode(instance) for instance in instances]
    stats = scorer.score(instances).stats
    prompts = [(ids, pair.response_ids) for pair in pairs for ids in (pair.complete_ids, pair.masked_ids)]
    assert stats.tokens_naive == sum(len(prompt) + len(response) for prompt, response in prompts)
    # A token is laid out once for each distinct prefix that it ends; a sequence's last scored token needs no row.
    sequences = [tuple([*prompt, *response[:14]][:-1]) for prompt, response in prompts]
    assert stats.tokens == len({s[:n] for s in sequences for n in range(1, len(s) + 1)})
    assert stats.trees == 1
    assert stats.seconds > 0


def test_duplicates_cost_nothing(scorer: KeyPartScorer) -> None:
    once, thrice = scorer.score(INSTANCES), scorer.score(INSTANCES * 3)
    assert thrice.stats.tokens == once.stats.tokens
    assert thrice.stats.tokens_naive == 3 * once.stats.tokens_naive
    assert torch.equal(thrice.gain[:6], thrice.gain[6:12])
    torch.testing.assert_close(thrice.gain[12:], once.gain, rtol=0, atol=1e-6)


def test_no_instances(scorer: KeyPartScorer) -> None:
    scores = scorer.score([])
    assert (scores.gain.tolist(), scores.complete, scores.masked, scores.hidden) == ([], [], [], [])
    assert (scores.stats.tokens, scores.stats.tokens_naive, scores.stats.trees) == (0, 0, 0)


def test_empty_responses() -> None:
    scorer = KeyPartScorer(model(), TOKENIZER, end_of_sequence=False)
    empty = Instance(YES_NO, "", "17", PARTS)
    pairs = scorer.encoder.encode_all([empty, INSTANCES[0], empty])
    scores = scorer.score_pairs(pairs, keep_hidden=True)
    assert scores.gain[[0, 2]].tolist() == [0.0, 0.0]
    assert [len(v) for v in scores.complete] == [0, 3, 0]
    assert [h.shape for h in scores.hidden] == [(0, 32), (3, 32), (0, 32)]
    only = scorer.score([empty])
    assert (only.gain.tolist(), only.stats.tokens) == ([0.0], 0)


def test_an_empty_output_is_the_end_token_alone(scorer: KeyPartScorer) -> None:
    scores = scorer.score([Instance(YES_NO, "", "17", PARTS)])
    assert [len(v) for v in scores.complete] == [1]
    assert float(scores.gain.abs()) > 0


def test_kept_hidden_states_predict_the_whole_masked_response(scorer: KeyPartScorer) -> None:
    pairs = scorer.encoder.encode_all(INSTANCES)
    scores = scorer.score_pairs(pairs, keep_hidden=True)
    assert_same(scores, scorer.score(INSTANCES))
    exact = apart(model(torch.float64), [p.masked_ids for p in pairs], [p.response_ids for p in pairs])
    head = scorer.model.lm_head.weight  # type: ignore[union-attr]
    for hidden, pair, log_p in zip(scores.hidden, pairs, exact, strict=True):
        assert hidden.shape == (len(pair.response_ids), 32)
        found = (hidden @ head.detach().T).log_softmax(-1).gather(1, torch.tensor(pair.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(found.double(), log_p, rtol=0, atol=2e-5)


def test_adapters() -> None:
    torch.manual_seed(3)
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model(), settings)
    scorer = KeyPartScorer(adapted, TOKENIZER)
    scores = scorer.score(INSTANCES)
    exact = score_apart(adapted, scorer.encoder.encode_all(INSTANCES))
    assert largest_error(scores.complete, exact.complete) <= 4e-5
    plain = KeyPartScorer(model(), TOKENIZER).score(INSTANCES)
    assert float((scores.gain - plain.gain).abs().max()) > 1e-4


def test_the_model_is_left_as_it_was() -> None:
    lm = model()
    lm.train()
    lm.model.layers[1].eval()  # type: ignore[union-attr]
    flags = [module.training for module in lm.modules()]
    ids = torch.tensor([[5, 9, 40, 7]])
    before = lm(input_ids=ids).logits
    KeyPartScorer(lm, TOKENIZER).score(INSTANCES)
    assert [module.training for module in lm.modules()] == flags
    assert torch.equal(lm(input_ids=ids).logits, before)
    assert all(p.grad is None for p in lm.parameters())


def test_quiet_unless_asked(scorer: KeyPartScorer, capfd: pytest.CaptureFixture[str]) -> None:
    scorer.score(INSTANCES)
    assert capfd.readouterr() == ("", "")
    scorer.score(INSTANCES, progress=True)
    assert "scoring" in capfd.readouterr().err


# What goes wrong


@pytest.mark.parametrize("limit", [1000, 100, 30])
def test_out_of_memory_halves_the_budget(scorer: KeyPartScorer, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scorer.score(INSTANCES)
    own, refused = scoring.run_tree, []

    def run_tree(lm: nn.Module, tree, compute):
        if len(tree) > limit and len(tree.sequences) > 1:
            refused.append(len(tree))
            raise torch.OutOfMemoryError("not enough memory")
        return own(lm, tree, compute)

    monkeypatch.setattr(scoring, "run_tree", run_tree)
    scores = scorer.score(INSTANCES)
    assert_same(scores, expected)
    assert bool(refused) == (limit < 1000)
    # What had been scored before memory ran out is not scored, nor counted, again.
    laid_out = sum(len(i.complete_ids) + len(i.masked_ids) + 28 for i in map(scorer.encode, INSTANCES))
    assert expected.stats.tokens <= scores.stats.tokens <= laid_out


def test_out_of_memory_for_a_single_sequence_is_an_error(
    scorer: KeyPartScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_tree(*_: object) -> None:
        raise torch.OutOfMemoryError("not enough memory")

    monkeypatch.setattr(scoring, "run_tree", run_tree)
    with pytest.raises(torch.OutOfMemoryError):
        scorer.score(INSTANCES)
    monkeypatch.undo()
    assert scorer.score(INSTANCES).stats.trees == 1


def test_too_long_instances_are_named(scorer: KeyPartScorer) -> None:
    fits = Instance("x" * 100, "y", "", ("x" * 10,))
    prompt = len(scorer.encode(fits).complete_ids)
    longest = Instance("x" * (100 + 254 - prompt), "y", "", ("x" * 10,), id="edge")
    assert [len(scorer.encode(longest).complete_ids), len(scorer.encode(longest).response_ids)] == [254, 3]
    assert scorer.score([longest]).gain.isfinite().all()
    with pytest.raises(ValueError, match=r"instance 'long' needs 258 positions, but the model has 256; shorten its"):
        scorer.score([fits, replace(longest, output="yyy", id="long")])
    with pytest.raises(ValueError, match=r"^instance 1 needs 258 positions"):
        scorer.score([fits, replace(longest, output="yyy", id="")])
    with pytest.raises(ValueError, match=r"^instance 0 needs 258 positions"):
        scorer.score_pairs([scorer.encode(replace(longest, output="yyy"))])


def test_a_long_response_behind_a_fitting_start_is_scored(scorer: KeyPartScorer) -> None:
    pair = scorer.encode(Instance(YES_NO, "y" * 300, "17", PARTS))
    assert len(scorer.score_pairs([pair]).complete[0]) == 14
    with pytest.raises(ValueError, match=r"instance 0 needs .* positions, but the model has 256"):
        scorer.score_pairs([pair], keep_hidden=True)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"alpha": 0.0}, r"alpha is 0\.0; the decay must lie in \(0, 1\]"),
        ({"alpha": 1.5}, r"alpha is 1\.5"),
        ({"tail_tol": -1.0}, r"tail_tol is -1\.0; give a finite number >= 0"),
        ({"max_tokens": 0}, "max_tokens is 0; a tree needs room for at least one token"),
        ({"template": "poem"}, "unknown template 'poem'"),
    ],
)
def test_wrong_arguments_are_named(argument: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyPartScorer(model(), TOKENIZER, **argument)


def test_a_key_part_that_does_not_occur_is_named(scorer: KeyPartScorer) -> None:
    with pytest.raises(ValueError, match="instance '9': key part 'purple' does not occur"):
        scorer.score([Instance(YES_NO, "NO", "17", ("purple",), id="9")])


def packed(lengths: tuple[int, int], n: int, device: str = "cpu") -> list[int]:
    """Sizes of the trees for n sequences that share ``lengths[0]`` tokens and have ``lengths[1]`` of their own."""
    shared, own = lengths
    sequences = [np.arange(shared, dtype=np.int32)] * n
    sequences = [np.append(s, np.arange(own, dtype=np.int32) + (i + 1) * 10_000) for i, s in enumerate(sequences)]
    trees = scoring._pack(sequences, [shared + 1] * n, 8192, torch.device(device))
    return [len(tree) for tree in trees]


def test_trees_on_a_cpu_stay_small_unless_that_repeats_many_tokens() -> None:
    assert max(packed((10, 101), 60)) <= scoring.CACHED_TOKENS < packed((10, 101), 60, "meta")[0]
    # Here each further tree would repeat a tenth of its tokens.
    assert len(packed((200, 101), 60)) == 1
