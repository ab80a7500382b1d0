"""What is kept of the frozen model, by one process or by several: its gains, hidden states and head, and no others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import make_model
from hypothesis import given
from hypothesis import strategies as st
from teacher_cases import FIVE_PARTS, INSTANCES, OFFSETS, TOKENIZER, every_row, make_scorer, names
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from kpig_fast import EncodedPair, Instance, KeyPartScorer
from kpig_fast import teacher as module
from kpig_fast.teacher import Teacher, make_teacher, model_hash


@pytest.fixture
def scorer() -> KeyPartScorer:
    return make_scorer()


@pytest.fixture
def pairs(scorer: KeyPartScorer) -> list[EncodedPair]:
    return scorer.encoder.encode_all(INSTANCES)


# What is kept


def test_gains_and_hidden_states_are_the_scorers(scorer: KeyPartScorer, pairs: list, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path, scorer, pairs)
    scores = scorer.score_pairs(pairs, keep_hidden=True)
    assert teacher.gain.dtype == torch.float64
    assert torch.equal(teacher.gain, scores.gain)
    assert float(teacher.gain[2]) == 0.0
    assert float(teacher.gain[:2].abs().min()) > 0
    assert teacher.starts.tolist() == OFFSETS[:-1]
    assert torch.equal(every_row(teacher), torch.cat(scores.hidden))
    assert names(tmp_path) == ["head", "part-0"]


def test_parts_are_one_teacher(
    scorer: KeyPartScorer, pairs: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_ROWS", FIVE_PARTS)
    teacher = make_teacher(tmp_path, scorer, pairs)
    assert names(tmp_path) == ["head", "part-0", "part-1", "part-3"]
    scores = scorer.score_pairs(pairs, keep_hidden=True)
    torch.testing.assert_close(teacher.gain, scores.gain, rtol=0, atol=1e-6)
    torch.testing.assert_close(every_row(teacher), torch.cat(scores.hidden), rtol=1e-4, atol=1e-5)


def test_what_a_plan_has_gone_through_is_read(
    scorer: KeyPartScorer, pairs: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = scorer.encoder.encode_all([replace(INSTANCES[0], context="Is 9 even?"), INSTANCES[1]])
    make_teacher(tmp_path, scorer, planned)
    asked: list[EncodedPair] = []
    score_pairs = scorer.score_pairs
    monkeypatch.setattr(scorer, "score_pairs", lambda x, **options: (asked.extend(x), score_pairs(x, **options))[1])
    teacher = make_teacher(tmp_path, scorer, pairs, planned=planned)
    assert asked == [pairs[0], pairs[2]]
    scores = score_pairs(pairs, keep_hidden=True)
    torch.testing.assert_close(teacher.gain, scores.gain, rtol=0, atol=1e-6)
    for start, hidden in zip(teacher.starts.tolist(), scores.hidden):
        torch.testing.assert_close(teacher.hidden(start + torch.arange(len(hidden))), hidden, rtol=1e-4, atol=1e-5)


def test_hidden_states_and_head_give_the_old_distributions(scorer: KeyPartScorer, pairs: list, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path, scorer, pairs)
    with torch.no_grad():
        old = [scorer.model(input_ids=torch.tensor([[*p.masked_ids, *p.response_ids]])).logits[0] for p in pairs]
        scorer.model.lm_head.weight.add_(1)  # type: ignore[union-attr]
    assert teacher.weight is not None
    exact = torch.cat([logits[len(p.masked_ids) - 1 : -1] for logits, p in zip(old, pairs)])
    torch.testing.assert_close(every_row(teacher) @ teacher.weight.T, exact, rtol=1e-4, atol=1e-5)


@given(st.data())
def test_rows_in_any_order_from_any_parts(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
    whole = torch.randn(sum(lengths), 3)
    teacher = Teacher(torch.zeros(0), torch.zeros(1), whole.split(lengths))
    rows = data.draw(st.lists(st.integers(0, sum(lengths) - 1), max_size=9) if sum(lengths) else st.just([]))
    assert torch.equal(teacher.hidden(torch.tensor(rows, dtype=torch.int64)), whole[rows])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 40), st.integers(1, 4))
def test_parts_are_balanced_and_in_order(lengths: list[int], most: int, processes: int) -> None:
    pairs = [EncodedPair([1], [1], [i] * length) for i, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART_ROWS", most)
        patch.setattr(module, "world", lambda: processes)
        parts = module._cut(pairs)
    assert [pair for part in parts for pair in part] == pairs
    assert len(parts) % processes == 0
    share = min(most, sum(lengths) / processes)
    assert all(sum(len(pair.response_ids) for pair in part) < share + max(1, *lengths) for part in parts)
    # No more rounds than the rows need.
    assert (len(parts) // processes - 1) * most * processes < max(sum(lengths), 1)


def test_an_empty_response_has_no_rows(tmp_path: Path) -> None:
    scorer = KeyPartScorer(make_model("llama", vocab_size=len(TOKENIZER)), TOKENIZER, end_of_sequence=False)
    pairs = scorer.encoder.encode_all([INSTANCES[0], Instance("Say nothing.", ""), INSTANCES[1]])
    teacher = make_teacher(tmp_path, scorer, pairs)
    assert teacher.starts.tolist() == [0, 4, 4]
    assert float(teacher.gain[1]) == 0.0
    nothing = make_teacher(tmp_path, scorer, pairs[1:2])
    assert every_row(nothing).shape == (0, 32)
    assert scorer.score_pairs([], keep_hidden=True).hidden == []


@pytest.mark.parametrize(
    ("trained", "kept"),
    [(["weight", "bias"], ["weight", "bias"]), (["weight"], ["weight"]), (["bias"], ["bias"]), ([], [])],
)
def test_only_what_is_trained_of_the_head_is_kept(tmp_path: Path, trained: list[str], kept: list[str]) -> None:
    scorer = make_scorer("phi")
    for name in ("weight", "bias"):
        getattr(scorer.model.lm_head, name).requires_grad_(name in trained)
    teacher = make_teacher(tmp_path, scorer, scorer.encoder.encode_all(INSTANCES))
    assert [name for name in ("weight", "bias") if getattr(teacher, name) is not None] == kept
    assert names(tmp_path) == (["head", "part-0"] if kept else ["part-0"])
    for name in kept:
        assert torch.equal(getattr(teacher, name), getattr(scorer.model.lm_head, name))
        assert not getattr(teacher, name).requires_grad


def test_half_precision_stays_half(tmp_path: Path) -> None:
    model = make_model("llama", vocab_size=len(TOKENIZER), dtype=torch.bfloat16)
    scorer = KeyPartScorer(model, TOKENIZER)
    pairs = scorer.encoder.encode_all(INSTANCES)
    teacher, asked = make_teacher(tmp_path, scorer, pairs), make_teacher(tmp_path, scorer, pairs, dtype=torch.bfloat16)
    assert every_row(teacher).dtype == torch.bfloat16
    assert torch.equal(teacher.weight, model.lm_head.weight)  # type: ignore[arg-type]
    # Asking for what the model computes anyway changes nothing.
    assert torch.equal(every_row(asked), every_row(teacher))


# Several processes


def work(rank: int, folder: Path) -> None:
    """One of two processes; what it has seen goes into ``folder / rank``."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    scorer = make_scorer()
    pairs = scorer.encoder.encode_all(INSTANCES)
    scored: list[int] = []
    own = KeyPartScorer.score_pairs

    def counted(self: KeyPartScorer, some: list[EncodedPair], **options: bool) -> object:
        scored.append(len(some))
        return own(self, some, **options)

    KeyPartScorer.score_pairs = counted  # type: ignore[method-assign]
    teacher = make_teacher(folder / "shared", scorer, pairs)
    seen = {"hash": model_hash(scorer.model), "gain": teacher.gain.tolist(), "hidden": every_row(teacher).tolist()}
    try:
        make_teacher(folder / f"apart-{rank}", scorer, pairs)
    except ValueError as error:
        seen["error"] = str(error)
    before = model_hash(scorer.model)
    fully_shard(scorer.model, mesh=init_device_mesh("cpu", (2,)))
    sharded = make_teacher(folder / "sharded", scorer, pairs)
    assert sharded.weight is not None
    seen |= {"sharded": every_row(sharded).tolist(), "weight": sharded.weight.tolist(), "scored": scored}
    seen["same hash"] = model_hash(scorer.model) == before
    (folder / str(rank)).write_text(json.dumps(seen), "utf-8")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_share_the_work_and_the_files(scorer: KeyPartScorer, pairs: list, tmp_path: Path) -> None:
    spawn(work, (tmp_path,), nprocs=2)
    first, second = (json.loads((tmp_path / str(rank)).read_text("utf-8")) for rank in range(2))
    alone = make_teacher(tmp_path / "alone", scorer, pairs)
    for seen in (first, second):
        assert seen["hash"] == model_hash(scorer.model)
        assert seen["same hash"]
        torch.testing.assert_close(torch.tensor(seen["gain"]).double(), alone.gain, rtol=0, atol=1e-6)
        for name in ("hidden", "sharded"):
            torch.testing.assert_close(torch.tensor(seen[name]), every_row(alone), rtol=1e-4, atol=1e-5)
        assert torch.equal(torch.tensor(seen["weight"]), scorer.model.lm_head.weight)  # type: ignore[union-attr]
        assert "output_dir must be a folder that all machines share" in seen["error"]
    assert (first["scored"], second["scored"]) == ([2, 2, 2], [1, 1, 1])
    for folder in ("shared", "sharded"):
        assert names(tmp_path / folder) == ["head", "part-0", "part-1"]
    assert names(tmp_path / "apart-0") == ["head", "part-0"]
    assert names(tmp_path / "apart-1") == ["part-1"]


# Names of models


def test_model_hash_depends_on_every_weight_and_name() -> None:
    first = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    same = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    same.load_state_dict(first.state_dict())
    assert model_hash(first) == model_hash(same)
    assert len(model_hash(first)) == 64
    renamed = nn.ModuleDict({"0": first[0], "2": first[1]})
    assert model_hash(renamed) != model_hash(first)
    same[1].running_mean[1] = 1.0  # type: ignore[index]
    assert model_hash(same) != model_hash(first)
    same[1].running_mean[1] = 0.0  # type: ignore[index]
    assert model_hash(same.double()) != model_hash(first)
