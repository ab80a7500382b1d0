"""The benchmarks run, refuse to time a wrong result, and the README's figures are those of the committed records."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_scorer
import bench_training_step
import common
import pytest
import torch
from baseline_trainers import PackedTrainer, as_tensors, pack
from bench_training_step import KPIG, PACKED, STRAIGHTFORWARD

from kpig_fast import EncodedPair
from kpig_fast.data.encoding import PromptEncoder

HERE = Path(__file__).parent
SMALL = ["--quick", "--layers", "1", "--hidden", "32", "--tasks", "2", "--instances", "3", "--threads", "1"]

needs_data = pytest.mark.skipif(not common.SHARED.is_dir(), reason="the real tasks do not lie beside this checkout")


@pytest.fixture(scope="module")
def small() -> common.Setting:
    """Six instances of two tasks and a model of one layer."""
    return common.setting(common.parser("", tasks=1, instances=1).parse_args(SMALL))


@pytest.fixture(scope="module")
def pairs(small: common.Setting) -> list[EncodedPair]:
    """The instances' token ids."""
    return PromptEncoder(small.tokenizer).encode_all(small.instances)


@pytest.mark.parametrize("clock", ["perf_counter", "process_time"])
def test_race_times_runs_alone_and_starts_each_round_with_another(monkeypatch, clock: str) -> None:
    prepared: list[str] = []
    done: list[str] = []
    clocks = {"perf_counter": lambda: 0.0, "process_time": lambda: 0.0, clock: lambda: float(len(done))}
    monkeypatch.setattr(common, "time", SimpleNamespace(**clocks))

    def contestant(name: str, cost: int) -> common.Contestant:
        def prepare() -> Any:
            prepared.append(name)
            return lambda: done.extend(name * cost)

        return prepare

    all_three = {"a": contestant("a", 1), "b": contestant("b", 2), "c": contestant("c", 3)}
    seconds = common.race(all_three, rounds=4, processor_time=clock == "process_time")
    assert seconds == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [3.0] * 4}
    assert "".join(prepared) == "abcbcacababc"
    assert common.ratios(seconds, "c", "b") == [1.5] * 4


def test_require_refuses_nan_and_what_is_above_the_limit() -> None:
    common.require("x differs by", 1.0, 1.0)
    for value in (1.1, float("nan")):
        with pytest.raises(ValueError, match="do not compute the same"):
            common.require("x differs by", value, 1.0)


def test_record_holds_every_round_and_what_it_was_run_on(tmp_path: Path) -> None:
    arguments = common.parser("", tasks=3, instances=4).parse_args(["--out", str(tmp_path / "new" / "run.json")])
    common.report(arguments, {"a": [3.0, 1.0, 2.0]}, {"a of b": [0.3, 0.1, 0.2]}, parameters=7)
    run = json.loads(arguments.out.read_text())
    assert run["median_ratios"] == {"a of b": 0.2}
    assert run["ratios"] == {"a of b": [0.3, 0.1, 0.2]}
    assert run["seconds"] == {"a": [3.0, 1.0, 2.0]}
    assert (run["parameters"], run["options"]["tasks"], run["options"]["rounds"]) == (7, 3, 7)
    assert run["environment"]["packages"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{40}( with changes)?|unknown", run["commit"])


def test_packs_keep_sequences_whole_and_count_positions_anew() -> None:
    sequences = [common.labelled([1, 2], [3]), common.labelled([4], [5]), common.labelled([6] * 7, [7])]
    packs = pack(sequences, 5)
    assert [p["input_ids"] for p in packs] == [[1, 2, 3, 4, 5], [6] * 7 + [7]]
    assert [p["position_ids"] for p in packs] == [[0, 1, 2, 0, 1], list(range(8))]
    assert packs[0]["labels"] == [-100, -100, 3, -100, 5]
    assert as_tensors(packs[:1])["labels"].tolist() == [packs[0]["labels"]]


@needs_data
def test_instances_are_the_first_of_each_task(small: common.Setting) -> None:
    tasks = [instance.task for instance in small.instances]
    assert tasks == [tasks[0]] * 3 + [tasks[3]] * 3
    assert tasks[0] != tasks[3]
    assert all(instance.key_parts for instance in small.instances)
    with pytest.raises(ValueError, match="ask for fewer"):
        common.load_instances(common.SHARED / "data/sni_core", 2, 100_000)


@needs_data
def test_model_is_the_same_every_time_and_of_the_stated_size(small: common.Setting) -> None:
    again = common.make_model(small.tokenizer, 32, 1)
    assert torch.equal(again.model.embed_tokens.weight, small.model.model.embed_tokens.weight)
    with torch.device("meta"):
        assert common.make_model(small.tokenizer, 512, 8).num_parameters() == 77_161_984


@needs_data
@pytest.mark.parametrize("log_probs", [bench_scorer.full_logits, bench_scorer.response_rows])
@pytest.mark.parametrize("by_length", [False, True])
def test_padded_scores_are_those_of_single_sequences(small, pairs, log_probs, by_length) -> None:
    complete, masked = bench_scorer.padded(small, pairs, log_probs, batch=4, by_length=by_length)
    for pair, *scores in zip(pairs, complete, masked, strict=True):
        for prompt, score in zip((pair.complete_ids, pair.masked_ids), scores, strict=True):
            with torch.no_grad():
                logits = small.model(torch.tensor([[*prompt, *pair.response_ids]])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(logits)), pair.response_ids]
            torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-5)


def test_check_refuses_other_log_probs_and_other_gains() -> None:
    one, other, longer = [torch.full((14,), -2.0)], [torch.full((14,), -1.0)], [torch.full((20,), -2.0)]
    # Ours leaves out the tail, which moves no gain by more than its tolerance.
    bench_scorer.check((one, other), (longer, [torch.cat([other[0], longer[0][14:]])]))
    with pytest.raises(ValueError, match="log-probs differ"):
        bench_scorer.check((one, other), ([one[0] + 2e-4], other))
    with pytest.raises(ValueError, match="gains differ"):
        bench_scorer.check((one, other), (one, [other[0] + 9e-5]))


@needs_data
def test_check_refuses_another_loss_and_another_divergence(small, tmp_path, monkeypatch) -> None:
    makers, others = (bench_training_step.makers(small, batch=4, pack_tokens=256, lam=lam) for lam in (100.0, 101.0))
    with pytest.raises(ValueError, match="divergence differs"):
        bench_training_step.check({**makers, STRAIGHTFORWARD: others[STRAIGHTFORWARD]}, tmp_path / "run")
    own = PackedTrainer.compute_loss
    monkeypatch.setattr(PackedTrainer, "compute_loss", lambda *args, **kwargs: own(*args, **kwargs) * 1.001)
    with pytest.raises(ValueError, match=f"first loss of '{PACKED}'"):
        bench_training_step.check(makers, tmp_path / "run")


@needs_data
def test_no_pre_pass_is_used_again(small, tmp_path) -> None:
    maker = bench_training_step.makers(small, batch=4, pack_tokens=256, lam=1.0)[KPIG]
    for _ in range(2):
        trainer = bench_training_step.trainer(maker, tmp_path / "run", max_steps=1)
        assert not list(tmp_path.rglob("*.safetensors"))
        trainer.prepare_teacher()
        assert list(tmp_path.rglob("*.safetensors"))


@needs_data
@pytest.mark.parametrize(
    ("main", "ours", "others"),
    [
        (bench_scorer.main, bench_scorer.OURS, 4),
        (bench_training_step.main, KPIG, 3),
    ],
    ids=["scorer", "training step"],
)
def test_whole_run(main, ours, others, tmp_path, capsys) -> None:
    main([*SMALL, "--out", str(tmp_path / "run.json")])
    run = json.loads((tmp_path / "run.json").read_text())
    assert len(run["median_ratios"]) == others
    assert run["seconds"][ours][0] > 0
    assert all(len(values) == 1 for values in run["seconds"].values())
    printed = capsys.readouterr().out
    assert all(f"| {name} | {value:.2f} |" in printed for name, value in run["median_ratios"].items())


@pytest.mark.parametrize("path", sorted((HERE / "results").glob("*.json")), ids=lambda path: path.stem)
def test_readme_shows_the_committed_figures(path: Path) -> None:
    run, readme = json.loads(path.read_text()), (HERE / "README.md").read_text()
    for name, value in run["median_ratios"].items():
        assert f"| {name} | {value:.2f} |" in readme
