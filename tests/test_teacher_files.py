"""The teacher's files: mapped, used again for what they were made of and for nothing else, and named when damaged."""

import errno
import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import make_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from teacher_cases import FIVE_PARTS, INSTANCES, TOKENIZER, every_row, make_scorer, names
from torch import Tensor

from kpig_fast import EncodedPair, KeyPartScorer
from kpig_fast import teacher as module
from kpig_fast.teacher import Teacher, make_teacher

AGAIN = "; delete it to make it again"


@pytest.fixture
def scorer() -> KeyPartScorer:
    return make_scorer()


@pytest.fixture
def pairs(scorer: KeyPartScorer) -> list[EncodedPair]:
    return scorer.encoder.encode_all(INSTANCES)


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_ROWS", FIVE_PARTS)


# Memory


def test_hidden_states_are_mapped_from_the_file(scorer: KeyPartScorer, pairs: list, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path, scorer, pairs)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list its mappings")
    assert teacher.weight is not None
    for tensor, kind in ((teacher.parts[0], "part-0"), (teacher.weight, "head")):
        for line in maps.read_text().splitlines():
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            if first <= tensor.data_ptr() < last:
                assert Path(line.split()[-1]).name.startswith(kind)
                break
        else:
            pytest.fail(f"{kind} lies in no mapping")


def test_only_the_rows_that_are_read_take_memory(tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system does not tell how much memory is resident")

    def resident() -> int:
        """Bytes."""
        return sum(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("Rss")) * 1024

    path = tmp_path / "part-0-x.safetensors"
    module._save(path, {"hidden": torch.ones(2**16, 512)})
    before = resident()
    teacher = Teacher(torch.zeros(0), torch.zeros(1), [module._open(path)["hidden"]])
    assert float(teacher.hidden(torch.tensor([*range(16), *range(2**16 - 16, 2**16)])).sum()) == 32 * 512
    assert resident() - before < path.stat().st_size / 8


# A file is used again for what it was made of, and for nothing else


def test_equal_files_are_used_again(
    scorer: KeyPartScorer, pairs: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_teacher(tmp_path, scorer, pairs)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr("kpig_fast.scorer.KeyPartScorer._branch", lambda *_: pytest.fail("scored again"))
    # A new scorer of an equal model is the same teacher; how trees are cut does not matter.
    for again in (make_teacher(tmp_path, scorer, pairs), make_teacher(tmp_path, make_scorer(max_tokens=50), pairs)):
        assert torch.equal(again.gain, made.gain)
        assert torch.equal(every_row(again), every_row(made))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written


@pytest.mark.usefixtures("many_parts")
def test_a_stopped_pre_pass_goes_on(
    scorer: KeyPartScorer, pairs: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[list[EncodedPair]] = []
    own = KeyPartScorer.score_pairs

    def stopped(self: KeyPartScorer, some: list[EncodedPair], **options: bool) -> object:
        scored.append(list(some))
        if len(scored) == 4:
            raise KeyboardInterrupt
        return own(self, some, **options)

    monkeypatch.setattr(KeyPartScorer, "score_pairs", stopped)
    with pytest.raises(KeyboardInterrupt):
        make_teacher(tmp_path, scorer, pairs)
    assert names(tmp_path) == ["head", "part-0", "part-1"]
    teacher = make_teacher(tmp_path, scorer, pairs)
    # Every round calls the model, for what is there with nothing to do.
    assert scored[4:] == [[], [], [], pairs[2:], []]
    whole = make_teacher(tmp_path / "whole", scorer, pairs)
    assert torch.equal(every_row(teacher), every_row(whole))


def adapted(alpha: int) -> KeyPartScorer:
    settings = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return KeyPartScorer(get_peft_model(make_model("llama", vocab_size=len(TOKENIZER)), settings), TOKENIZER)


def content(teacher: Teacher) -> tuple[float, ...]:
    return (*teacher.gain.tolist(), *every_row(teacher).flatten().tolist())


def test_another_model_other_data_or_another_measure_has_files_of_its_own(tmp_path: Path) -> None:
    scorer = make_scorer()
    pairs = scorer.encoder.encode_all(INSTANCES)
    longer = [*pairs[:2], EncodedPair(pairs[2].complete_ids, pairs[2].masked_ids, [*pairs[2].response_ids, 5])]
    changed = make_scorer()
    with torch.no_grad():
        changed.model.model.norm.weight[3] += 1e-3  # type: ignore[union-attr]
    makes: list[Callable[[], Teacher]] = [
        lambda: make_teacher(tmp_path, scorer, pairs),
        lambda: make_teacher(tmp_path, scorer, pairs[:2]),
        lambda: make_teacher(tmp_path, scorer, pairs[::-1]),
        lambda: make_teacher(tmp_path, scorer, longer),
        lambda: make_teacher(tmp_path, make_scorer(tail_tol=0.1), pairs),
        lambda: make_teacher(tmp_path, make_scorer(tail_tol=0, alpha=0.6), pairs),
        lambda: make_teacher(tmp_path, make_scorer(tail_tol=0, alpha=0.7), pairs),
        lambda: make_teacher(tmp_path, scorer, pairs, dtype=torch.bfloat16),
        lambda: make_teacher(tmp_path, changed, pairs),
        lambda: make_teacher(tmp_path, adapted(2), pairs),
        # The same weights, used otherwise.
        lambda: make_teacher(tmp_path, adapted(4), pairs),
    ]
    contents = []
    for count, make in enumerate(makes, start=1):
        contents.append(content(make()))
        assert len(list(tmp_path.glob("part-0-*.safetensors"))) == count
    # The first and the changed model train their head; an adapter does not.
    assert len(list(tmp_path.glob("head-*.safetensors"))) == 2
    assert len(set(contents)) == len(makes)
    assert [content(make()) for make in makes] == contents


@pytest.mark.parametrize("write", [save_file, None])
def test_nothing_half_written_is_ever_read(
    scorer: KeyPartScorer, pairs: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object
) -> None:
    def interrupted(tensors: dict[str, Tensor], target: Path, metadata: dict[str, str]) -> None:
        if write:
            save_file(tensors, target, metadata)
            target.write_bytes(target.read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_teacher(tmp_path, scorer, pairs)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.safetensors"))
    make_teacher(tmp_path, scorer, pairs)
    assert names(tmp_path) == ["head", "part-0"]


# What cannot be read or written


def flip(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["part-0", "head"])
@pytest.mark.parametrize("where", [*range(0, 200, 7), -1, -50, -500])
def test_a_changed_byte_is_noticed(scorer: KeyPartScorer, pairs: list, tmp_path: Path, kind: str, where: int) -> None:
    make_teacher(tmp_path, scorer, pairs)
    (path,) = tmp_path.glob(f"{kind}-*")
    flip(path, where)
    with pytest.raises(ValueError, match=rf"{path.name} (is damaged \(checksum|cannot be read \().*{AGAIN}"):
        make_teacher(tmp_path, scorer, pairs)
    path.unlink()
    make_teacher(tmp_path, scorer, pairs)


@pytest.mark.parametrize("size", [0, 7, 60, -1])
def test_a_cut_file_is_noticed(scorer: KeyPartScorer, pairs: list, tmp_path: Path, size: int) -> None:
    make_teacher(tmp_path, scorer, pairs)
    (path,) = tmp_path.glob("part-*")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read \(.+\){AGAIN}"):
        make_teacher(tmp_path, scorer, pairs)


def test_a_file_of_other_content_is_noticed(scorer: KeyPartScorer, pairs: list, tmp_path: Path) -> None:
    make_teacher(tmp_path, scorer, pairs)
    make_teacher(tmp_path / "other", scorer, pairs[::-1])
    (path,), (other,) = tmp_path.glob("part-*"), (tmp_path / "other").glob("part-*")
    for content in (other.read_bytes(), json.dumps({"gain": [1, 2]}).encode()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=AGAIN):
            make_teacher(tmp_path, scorer, pairs)
    save_file({"hidden": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=rf"is damaged \(checksum differs\){AGAIN}"):
        make_teacher(tmp_path, scorer, pairs)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=rf"cannot be read \(.+\){AGAIN}"):
        make_teacher(tmp_path, scorer, pairs)


@pytest.mark.usefixtures("many_parts")
def test_a_full_disk_is_named_and_loses_nothing(scorer: KeyPartScorer, pairs: list, tmp_path: Path) -> None:
    scorer.model.lm_head.weight.requires_grad_(False)  # type: ignore[union-attr]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for 5 rows of 32 float32 numbers, and not for 11.
    size = 11 * 32 * 4 + 8
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(OSError, match=f"{tmp_path} did not take part-1-") as caught:
            make_teacher(tmp_path, scorer, pairs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"which needs {size} bytes (" in str(caught.value)
    assert "free space there, choose another output_dir, or halve" in str(caught.value)
    assert "File too large" in str(caught.value)
    assert names(tmp_path) == ["part-0"]
    make_teacher(tmp_path, scorer, pairs)
    assert names(tmp_path) == ["part-0", "part-1", "part-3"]


def test_a_disk_that_is_full_in_the_end_is_named_too(
    scorer: KeyPartScorer, pairs: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Network disks take what is written, and say only when it is flushed that they have no room for it.
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"did not take head-.* \(\[Errno 28\] No space left on device\); free space"):
        make_teacher(tmp_path, scorer, pairs)
    assert names(tmp_path) == []


def test_a_folder_that_others_do_not_see_is_named(
    scorer: KeyPartScorer, pairs: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "wait", lambda: [path.unlink() for path in tmp_path.glob("part-*")])
    with pytest.raises(ValueError, match=r"is missing, .*output_dir must be a folder that all machines share"):
        make_teacher(tmp_path, scorer, pairs)


def test_instances_that_cannot_be_run_are_named(scorer: KeyPartScorer, pairs: list, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pairs is empty; a teacher needs at least one instance"):
        make_teacher(tmp_path / "new", scorer, [])
    long = EncodedPair([5] * 200, [5] * 200, [6])
    with pytest.raises(ValueError, match="instance 3 needs 200 positions"):
        make_teacher(tmp_path / "new", scorer, [*pairs, long])
    assert not (tmp_path / "new").exists()
