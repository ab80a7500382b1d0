"""Predictive entropy on token trees against the model's own logits; vectors of texts."""

import numpy as np
import pytest
import torch
from training_cases import INSTANCES, TOKENIZER, tiny

from kpig_fast import KeyPartScorer
from kpig_fast import entropy as entropy_module
from kpig_fast.entropy import predictive_entropies
from kpig_fast.training.embedding import embed, load_embedder


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("elements", [2**24, 1])
def test_entropy_is_that_of_the_models_own_logits(family, elements, monkeypatch):
    monkeypatch.setattr(entropy_module, "ELEMENTS", elements)
    model = tiny(family)
    scorer = KeyPartScorer(model, TOKENIZER)
    pairs = scorer.encoder.encode_all(INSTANCES)
    found = predictive_entropies(scorer, pairs)
    for pair, value in zip(pairs, found, strict=True):
        ids = torch.tensor([[*pair.complete_ids, *pair.response_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(pair.complete_ids) - 1 : -1].double()
        expected = torch.distributions.Categorical(logits=logits).entropy().mean()
        assert value == pytest.approx(float(expected), rel=1e-5)
    assert len(set(found)) > 1


def test_vectors_are_means_of_hidden_states_without_dropout():
    model = tiny().train()
    texts = ["ab", "a longer text"]
    found = embed(texts, model, TOKENIZER)
    assert model.training
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([TOKENIZER(text)["input_ids"]])).last_hidden_state[0]
        np.testing.assert_allclose(vector, hidden.mean(0).numpy(), rtol=1e-5, atol=1e-6)


def test_an_embedder_loads_from_a_folder(tmp_path):
    model = tiny()
    model.base_model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    np.testing.assert_allclose(
        embed(["ab"], *load_embedder(str(tmp_path))), embed(["ab"], model, TOKENIZER), rtol=1e-5, atol=1e-6
    )
