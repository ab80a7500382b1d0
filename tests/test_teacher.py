"""What is kept of the frozen model: the same gains and hidden states again, and nothing that is not its own."""

import json
from pathlib import Path

import pytest
import torch
from evaluation_models import byte_tokenizer
from families import make_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from kpig_fast import Instance, KeyPartScorer
from kpig_fast.teacher import Teacher, make_teacher, model_hash

TOKENIZER = byte_tokenizer()
INSTANCES = [
    Instance("Answer yes or no.", "yes", "Is 4 even?", ("yes or no",)),
    Instance("Answer yes or no.", "no, never", "Is 7 even?", ("yes or no",)),
    Instance("Say hello.", "hello"),
]


def make_scorer(family: str = "llama", **options: float) -> KeyPartScorer:
    return KeyPartScorer(make_model(family, vocab_size=len(TOKENIZER)), TOKENIZER, **options)  # type: ignore[arg-type]


@pytest.fixture
def scorer() -> KeyPartScorer:
    return make_scorer()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "teacher.safetensors"


def test_round_trip(scorer: KeyPartScorer, path: Path) -> None:
    pairs = scorer.encoder.encode_all(INSTANCES)
    made = make_teacher(path, scorer, pairs)
    scores = scorer.score_pairs(pairs, keep_hidden=True)
    for teacher in (made, Teacher(path)):
        assert teacher.gain.dtype == torch.float64
        assert torch.equal(teacher.gain, scores.gain)
        assert teacher.offsets.tolist() == [0, 5, 16, 23]
        for i, hidden in enumerate(scores.hidden):
            rows = torch.arange(int(teacher.offsets[i]), int(teacher.offsets[i + 1]))
            assert torch.equal(teacher.hidden(rows), hidden)
    assert float(made.gain[2]) == 0.0
    assert float(made.gain[:2].abs().min()) > 0


def test_rows_in_any_order(scorer: KeyPartScorer, path: Path) -> None:
    teacher = make_teacher(path, scorer, scorer.encoder.encode_all(INSTANCES))
    every = teacher.hidden(torch.arange(23))
    rows = torch.tensor([22, 3, 3, 0, 17])
    assert torch.equal(teacher.hidden(rows), every[rows])
    assert teacher.hidden(torch.tensor([], dtype=torch.int64)).shape == (0, 32)


def test_hidden_states_and_head_give_the_old_distributions(scorer: KeyPartScorer, path: Path) -> None:
    pairs = scorer.encoder.encode_all(INSTANCES)
    teacher = make_teacher(path, scorer, pairs)
    with torch.no_grad():
        old = [scorer.model(input_ids=torch.tensor([[*p.masked_ids, *p.response_ids]])).logits[0] for p in pairs]
        scorer.model.lm_head.weight.add_(1)  # type: ignore[union-attr]
    assert teacher.weight is not None
    found = teacher.hidden(torch.arange(23)) @ teacher.weight.T
    exact = torch.cat([logits[len(p.masked_ids) - 1 : -1] for logits, p in zip(old, pairs)])
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_an_empty_response_has_no_rows(path: Path) -> None:
    model = make_model("llama", vocab_size=len(TOKENIZER))
    scorer = KeyPartScorer(model, TOKENIZER, end_of_sequence=False)
    pairs = scorer.encoder.encode_all([INSTANCES[0], Instance("Say nothing.", ""), INSTANCES[1]])
    teacher = make_teacher(path, scorer, pairs)
    assert teacher.offsets.tolist() == [0, 4, 4, 14]
    assert float(teacher.gain[1]) == 0.0


@pytest.mark.parametrize(
    ("trained", "kept"),
    [(["weight", "bias"], ["weight", "bias"]), (["weight"], ["weight"]), (["bias"], ["bias"]), ([], [])],
)
def test_only_what_is_trained_of_the_head_is_kept(path: Path, trained: list[str], kept: list[str]) -> None:
    scorer = make_scorer("phi")
    for name in ("weight", "bias"):
        getattr(scorer.model.lm_head, name).requires_grad_(name in trained)
    teacher = make_teacher(path, scorer, scorer.encoder.encode_all(INSTANCES))
    assert [name for name in ("weight", "bias") if getattr(teacher, name) is not None] == kept
    for name in kept:
        assert torch.equal(getattr(teacher, name), getattr(scorer.model.lm_head, name))
        assert not getattr(teacher, name).requires_grad


def test_an_adapter_leaves_the_head_out(path: Path) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(make_model("llama", vocab_size=len(TOKENIZER)), settings)
    scorer = KeyPartScorer(model, TOKENIZER)
    teacher = make_teacher(path, scorer, scorer.encoder.encode_all(INSTANCES))
    assert teacher.weight is None


def test_half_precision_stays_half(path: Path) -> None:
    model = make_model("llama", vocab_size=len(TOKENIZER), dtype=torch.bfloat16)
    scorer = KeyPartScorer(model, TOKENIZER)
    teacher = make_teacher(path, scorer, scorer.encoder.encode_all(INSTANCES))
    assert teacher.hidden(torch.arange(4)).dtype == torch.bfloat16
    assert teacher.weight is not None
    assert torch.equal(teacher.weight, model.lm_head.weight)  # type: ignore[union-attr]


def test_hidden_states_are_mapped_from_the_file(scorer: KeyPartScorer, path: Path) -> None:
    teacher = make_teacher(path, scorer, scorer.encoder.encode_all(INSTANCES))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list its mappings")
    address = teacher._hidden.data_ptr()
    for line in maps.read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= address < last:
            assert line.endswith(str(path))
            return
    pytest.fail("the hidden states lie in no mapping")


# An equal file is used again, another one never


def test_an_equal_file_is_used_again(scorer: KeyPartScorer, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = scorer.encoder.encode_all(INSTANCES)
    made = make_teacher(path, scorer, pairs)
    written = path.stat().st_mtime_ns
    monkeypatch.setattr(KeyPartScorer, "score_pairs", lambda *_, **__: pytest.fail("scored again"))
    again = make_teacher(path, scorer, pairs)
    assert torch.equal(again.gain, made.gain)
    assert path.stat().st_mtime_ns == written
    # A new scorer of an equal model is the same teacher; how trees are cut does not matter.
    assert torch.equal(make_teacher(path, make_scorer(max_tokens=50), pairs).gain, made.gain)


def test_another_model_other_data_or_another_measure_is_refused(scorer: KeyPartScorer, path: Path) -> None:
    pairs = scorer.encoder.encode_all(INSTANCES)
    make_teacher(path, scorer, pairs)
    message = "belongs to another model or other data; delete it to make it again"
    with pytest.raises(ValueError, match=message):
        make_teacher(path, scorer, pairs[:2])
    with pytest.raises(ValueError, match=message):
        make_teacher(path, scorer, pairs[::-1])
    with pytest.raises(ValueError, match=message):
        make_teacher(path, make_scorer(alpha=0.6), pairs)
    with pytest.raises(ValueError, match=message):
        make_teacher(path, make_scorer(tail_tol=0.1), pairs)
    with torch.no_grad():
        scorer.model.model.norm.weight[3] += 1e-3  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=message):
        make_teacher(path, scorer, pairs)
    with pytest.raises(ValueError, match=message):
        Teacher(path, key="another")


def test_nothing_half_written_is_ever_read(scorer: KeyPartScorer, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = scorer.encoder.encode_all(INSTANCES)

    def interrupted(tensors: dict[str, Tensor], target: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, target, metadata)
        target.write_bytes(target.read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr("kpig_fast.teacher.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_teacher(path, scorer, pairs)
    monkeypatch.undo()
    assert not path.exists()
    make_teacher(path, scorer, pairs)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# Files that are no teacher


@pytest.mark.parametrize("where", [-1, -500])
def test_a_changed_byte_is_noticed(scorer: KeyPartScorer, path: Path, where: int) -> None:
    make_teacher(path, scorer, scorer.encoder.encode_all(INSTANCES))
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is damaged \(checksum differs\); delete it to make it again"):
        Teacher(path)


@pytest.mark.parametrize("size", [0, 7, 60, -1])
def test_a_cut_file_is_noticed(scorer: KeyPartScorer, path: Path, size: int) -> None:
    make_teacher(path, scorer, scorer.encoder.encode_all(INSTANCES))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"cannot be read as a teacher \(.+\); delete it to make it again"):
        Teacher(path)


def test_what_is_no_teacher_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read as a teacher"):
        Teacher(path)
    path.write_text(json.dumps({"gain": [1, 2]}))
    with pytest.raises(ValueError, match="cannot be read as a teacher"):
        Teacher(path)
    save_file({"hidden": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="is no teacher of this version; delete it to make it again"):
        Teacher(path)


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
