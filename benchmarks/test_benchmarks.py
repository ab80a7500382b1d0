"""The benchmarks run, refuse to time a wrong result, and the README's figures are those of the committed records."""

import json
import re
import sys
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import baseline_scorers
import bench_kernels
import bench_scorer
import bench_training_step
import common
import pytest
import torch
from baseline_trainers import PackedTrainer, as_tensors, pack
from bench_kernels import OURS, PLAIN, PRODUCTS
from bench_training_step import KPIG, PACKED, STRAIGHTFORWARD
from torch.utils.flop_counter import FlopCounterMode

from kpig_fast import EncodedPair
from kpig_fast.data.encoding import PromptEncoder

HERE = Path(__file__).parent
TINY = ["--quick", "--threads", "1", "--sizes", "16x300", "--rows", "8", "--tree", *"6435", "--heads", "2"]
SCORERS = 4 + (find_spec("trl") is not None)
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
    seconds = common.race(all_three, rounds=4, processor_time=clock == "process_time", slow={"b"})
    assert seconds == {"a": [1.0] * 4, "b": [2.0] * 3, "c": [3.0] * 4}
    assert "".join(prepared[12:]) == "abcbcacabca"
    assert common.ratios(seconds, "c", "b") == [1.5] * 3


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


def test_responses_stand_last_and_positions_start_at_each_prompt() -> None:
    batch = baseline_scorers.responses_last([common.labelled([1, 2], [3]), common.labelled([4], [5, 6])], pad=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [9, 4, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2], [0, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, -100, 3, -100], [-100, -100, 5, 6]]


@needs_data
def test_padded_scores_are_those_of_single_sequences(small, pairs) -> None:
    def single(prompt, response) -> torch.Tensor:
        with torch.no_grad():
            logits = small.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[range(len(logits)), response]

    complete = [single(pair.complete_ids, pair.response_ids) for pair in pairs]
    masked = [single(pair.masked_ids, pair.response_ids) for pair in pairs]
    runs = baseline_scorers.padded_runs(small, pairs, batch=4)
    assert len(runs) == SCORERS
    for run in runs.values():
        torch.testing.assert_close(run(), (complete, masked), rtol=1e-5, atol=1e-5)


@needs_data
def test_padded_contestants_project_the_rows_that_they_claim(small, pairs) -> None:
    rows: list[int] = []
    handle = small.model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0][..., 0].numel()))
    runs = baseline_scorers.padded_runs(small, pairs, batch=len(pairs))
    projected = {}
    for name, run in runs.items():
        rows.clear()
        run()
        projected[name] = list(rows)
    handle.remove()
    lengths = [len(pair.response_ids) for pair in pairs]
    widths = [
        max(len(ids) + n for ids, n in zip(side, lengths))
        for side in ([pair.complete_ids for pair in pairs], [pair.masked_ids for pair in pairs])
    ]
    assert projected[baseline_scorers.FULL] == [len(pairs) * width for width in widths]
    assert projected["padded, logits_to_keep, in given order"] == [len(pairs) * (max(lengths) + 1)] * 2
    assert projected["padded, response rows, sorted by length"] == [sum(lengths)] * 2


@needs_data
def test_fused_head_leaves_the_model_alone_and_is_left_out_without_trl(small, pairs, monkeypatch, capsys) -> None:
    baseline_scorers.with_fused_head(small.model)
    assert "forward" not in vars(small.model)
    monkeypatch.setitem(sys.modules, "trl.trainer", None)
    assert len(baseline_scorers.padded_runs(small, pairs, batch=4)) == 4
    assert "trl>=1.16" in capsys.readouterr().out


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
        (bench_scorer.main, bench_scorer.OURS, SCORERS),
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


def test_bare_products_are_all_that_the_operators_need() -> None:
    n, d, v = 8, 16, 300
    for runs, products in ((bench_kernels.scoring_runs(n, d, v), 1), (bench_kernels.training_runs(n, d, v), 7)):
        with FlopCounterMode(display=False) as counter:
            runs[PRODUCTS]()
        assert counter.get_total_flops() == products * 2 * n * d * v


def test_instance_tree_has_the_stated_shape() -> None:
    tree = bench_kernels.instance_tree(256, 120, 30, 60)
    assert len(tree) == 4096
    sizes = (tree.subtree_end - torch.arange(4096)).tolist()
    assert sizes[:256] == list(range(4096, 3840, -1))
    assert (sizes[256], sizes[256 + 120], sizes[256 + 1920]) == (1920, 60, 1920)
    assert int(tree.position_ids.max()) == 256 + 120 + 60 - 1


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
def test_memory_is_that_of_the_peak_without_what_is_returned() -> None:
    def run() -> tuple[torch.Tensor, ...]:
        lost = torch.ones(30 * 2**18)
        return (lost[: 10 * 2**18].clone(),)

    assert bench_kernels.extra_megabytes(run) == pytest.approx(30, abs=1)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_kernels_with_another_result_are_not_timed(factor: float) -> None:
    arguments, figures = SimpleNamespace(rounds=1, processor_time=False), bench_kernels.Figures()
    right, wrong = torch.ones(3), torch.tensor([1.0, factor, 1.0])
    runs = {OURS: lambda: (right, right), PLAIN: lambda: (right, wrong)}
    with pytest.raises(ValueError, match="'plain PyTorch' differ"):
        bench_kernels.measure("a title", runs, arguments, figures)
    assert not figures.seconds
    bench_kernels.measure("a title", runs | {PLAIN: lambda: (right, right)}, arguments, figures)
    assert list(figures.shares) == [f"a title: as fast as {PLAIN}"]


def test_whole_run_of_the_kernels(tmp_path, capsys) -> None:
    bench_kernels.main([*TINY, "--out", str(tmp_path / "run.json")])
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["options"]["sizes"], run["options"]["tree"]) == ([[16, 300]], [6, 4, 3, 5])
    assert all(value > 0 for values in run["ratios"].values() for (value,) in [values])
    assert len(run["ratios"]) == 6 + 2 * hasattr(torch.nn.functional, "linear_cross_entropy")
    assert set(run["seconds"]) >= {f"scoring head, D = 16, V = 300: {OURS}", f"attention on 44 tokens, forward: {OURS}"}
    assert run["megabytes"]["training head, D = 16, V = 300: MB of a chunk"] == 4 * 2 * 8 * 300 / 2**20
    assert sys.platform != "linux" or all(isfinite(value) and value >= 0 for value in run["megabytes"].values())
    printed = capsys.readouterr().out
    assert all(f"| {name} | {value:.2f} |" in printed for name, value in run["median_ratios"].items())
    assert all(f"| {name} | {value:.1f} |" in printed for name, value in run["megabytes"].items())


# tests/test_kernel_resources.py holds the table of the kernels' resources to its own page.
RECORDS = [path for path in sorted((HERE / "results").glob("*.json")) if path.stem != "kernel_resources"]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_readme_shows_the_committed_figures(path: Path) -> None:
    run, readme = json.loads(path.read_text()), (HERE / "README.md").read_text()
    for name, value in run["median_ratios"].items():
        assert f"| {name} | {value:.2f} |" in readme
    for name, value in run.get("megabytes", {}).items():
        assert f"| {name} | {value:.1f} |" in readme
