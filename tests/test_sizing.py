"""What sizes say against what small trainings hold and compute, and against the plan that the documentation shows."""

import math
import re
import runpy
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from families import SUPPORTED, make_model
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import ops_module
from sizing_measured import (
    CASES,
    PROCESSES,
    SIZES,
    TREE,
    WAYS,
    Case,
    Reference,
    peak_bytes,
    peaks_in_processes,
    saved_bytes,
)
from torch.distributed.run import get_args_parser
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from kpig_fast.cli import _parser
from kpig_fast.training import sizing
from kpig_fast.training.run_config import RunConfig
from kpig_fast.training.sizing import ModelShape, Setup, flops_per_step, forward_flops, largest_tree, memory

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text("utf-8")
COMMANDS = re.findall(r"^(?:accelerate|torchrun) .*$", PAGE, re.MULTILINE)

LLAMA_8B = ModelShape(
    parameters=8_030_261_248, head_parameters=525_336_576, hidden=4096, layers=32, intermediate=14336, heads=32,
    kv_heads=8, head_dim=128, vocabulary=128256, tied=False,
)  # fmt: skip
FULL = Setup(**TREE, processes=8, sharding="full", compute_bytes=2, device_bytes=80 * 10**9)


def small_shape(family: str = "llama") -> ModelShape:
    return ModelShape.of(make_model(family, **SIZES).config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", SUPPORTED)
def test_shape_of_a_family(family: str, tied: bool) -> None:
    # These two give their experts the width that others give their layers, whatever else a config says.
    experts: dict[str, Any] = {"moe_intermediate_size": None} if family in ("mixtral", "gpt_oss") else {}
    model: Any = make_model(family, tie_word_embeddings=tied, **experts)
    shape = ModelShape.of(model.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    sizes = (shape.vocabulary, shape.hidden, shape.layers, shape.heads, shape.head_dim)
    assert sizes == (97, 32, 2, 4, 8)
    assert shape.head_parameters == 97 * 32
    # A token passes two of four experts.
    chosen = {"qwen2_moe": 2 * 24 + 24, "qwen3_moe": 2 * 24, "mixtral": 2 * 48, "gpt_oss": 2 * 48}
    assert shape.intermediate == chosen.get(family, 48)


def test_key_value_heads_and_default_widths() -> None:
    assert ModelShape.of(make_model("llama").config).kv_heads == 2
    gpt2 = ModelShape.of(AutoConfig.for_model("gpt2", n_embd=32, n_head=4, n_layer=2))
    assert (gpt2.kv_heads, gpt2.head_dim, gpt2.intermediate) == (4, 8, 4 * 32)


def test_the_published_sizes_of_llama_3() -> None:
    sizes = {"num_key_value_heads": 8, "vocab_size": 128256}
    small = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336}
    large = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672}
    assert ModelShape.of(AutoConfig.for_model("llama", **sizes, **small)) == LLAMA_8B
    assert ModelShape.of(AutoConfig.for_model("llama", **sizes, **large)).parameters == 70_553_706_496


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "qwen3_moe"])
def test_weights_gradients_and_optimizer_of_a_real_step(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype=dtype, tie_word_embeddings=True)
    optimizer = torch.optim.AdamW(model.parameters())
    # Every parameter gets a gradient, experts that no token has chosen included.
    torch.stack([p.float().sum() for p in model.parameters()]).sum().backward()
    optimizer.step()
    state = [x for values in optimizer.state.values() for x in values.values() if x.dim()]
    size = dtype.itemsize
    parts = memory(
        ModelShape.of(model.config), Setup(**TREE, weight_bytes=size, compute_bytes=size, optimizer_bytes=2 * size)
    )
    assert parts.weights == sum(p.nbytes for p in model.parameters())
    assert parts.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert parts.optimizer == sum(x.nbytes for x in state)


def test_adapters_beside_a_frozen_model() -> None:
    case = WAYS["LoRA on bfloat16"]
    model = case.model()
    setup = case.measured_setup(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    parts = memory(small_shape(), setup)
    assert parts.weights == pytest.approx(sum(p.nbytes for p in model.parameters()))
    assert parts.gradients == pytest.approx(sum(p.nbytes for p in trained))
    assert parts.optimizer == pytest.approx(2 * sum(p.nbytes for p in trained))


def test_what_processes_share() -> None:
    p, layer, head = LLAMA_8B.parameters, LLAMA_8B.layer_parameters, LLAMA_8B.head_parameters
    # Matrices, biases that there are none of, two norms; and a part of the last norm.
    assert layer == 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 2 * 4096 + 4096 / 32
    full = memory(LLAMA_8B, FULL)
    assert full.weights == 4 * p / 8 + 2 * (head + 3 * layer)
    assert full.gradients == 4 * p / 8 + 2 * 2 * layer
    assert full.optimizer == 8 * p / 8
    ddp = memory(LLAMA_8B, Setup(**TREE, processes=8))
    assert (ddp.weights, ddp.gradients, ddp.optimizer) == (4 * p, 2 * 4 * p, 8 * p)
    zero = Setup(**TREE, processes=8, sharding="gradients", weight_bytes=2, compute_bytes=2, optimizer_bytes=12)
    parts = memory(LLAMA_8B, zero)
    assert (parts.weights, parts.gradients, parts.optimizer) == (2 * p, 2 * p / 8 + 2 * 2 * layer, 12 * p / 8)


@pytest.mark.parametrize("case", CASES)
def test_activations_are_what_autograd_saves(case: Case) -> None:
    measured, setup = saved_bytes(case)
    # Left out: a norm's one number a token, sines and cosines, adapters' inner products.
    assert memory(small_shape(case.family), setup).activations == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_a_training(case: Case) -> None:
    measured, setup = peak_bytes(case)
    assert memory(small_shape(case.family), setup).total == pytest.approx(measured, rel=0.15)


@pytest.fixture(scope="module")
def in_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ways = {
        "DDP": Setup(**TREE, processes=PROCESSES),
        "FSDP2": Setup(**TREE, processes=PROCESSES, sharding="full"),
        "FSDP2 in bfloat16": Setup(
            **TREE, processes=PROCESSES, sharding="full", compute_bytes=2, gradient_checkpointing=True
        ),
    }
    return peaks_in_processes({name: Case(setup, 24) for name, setup in ways.items()}, tmp_path_factory.mktemp("group"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DDP", "FSDP2", "FSDP2 in bfloat16"])
def test_two_processes(name: str, in_processes: dict[str, Any]) -> None:
    measured, shape = in_processes[name], small_shape()
    setup = Setup(**measured["setup"])
    stored = 4 * shape.parameters / (1 if name == "DDP" else PROCESSES)
    assert measured["weights"] == pytest.approx(stored, rel=0.001)
    # How exchanges and frees of two threads fall together differs from run to run by a few percent.
    assert memory(shape, setup).total == pytest.approx(measured["peak"], rel=0.2)


def test_activations_of_8b_by_hand() -> None:
    # Two norms: float32 input, half-precision factor. Then what attention and the gated network keep, all in bf16.
    norm = (4 + 2) * 4096
    attention = 2 * 4096 + 2 * (4096 + 4096 + 1024 + 1024) + 4 * 32
    feed_forward = 2 * 4096 + 4 * 2 * 14336
    assert 2 * norm + attention + feed_forward == 200_832
    rows = 0.3
    expected = 31 * 200_832 + 2 * norm + attention + rows * (feed_forward + 2 * 4096) + norm + rows * 2 * 4096
    assert sizing.activation_bytes_per_token(LLAMA_8B, FULL) == pytest.approx(expected)
    again = replace(FULL, gradient_checkpointing=True)
    assert sizing.activation_bytes_per_token(LLAMA_8B, again) == pytest.approx(32 * 8192 + norm + rows * 8192)
    # What a layer keeps then comes back, one layer at a time.
    assert memory(LLAMA_8B, again).backward - memory(LLAMA_8B, FULL).backward == pytest.approx(1000 * 200_832)


def test_the_head_by_hand() -> None:
    v, d = 128256, 4096
    # 150 rows of two sides; FSDP's head is in bf16, the old one in float32 is copied; gradient in float32, then bf16.
    expected = 2 * 150 * 4 * v + 2 * v * d + (4 + 2) * v * d + 1000 * 2 * d
    assert memory(LLAMA_8B, FULL).head == expected
    assert memory(LLAMA_8B, replace(FULL, distils=False)).head == expected - 2 * v * d
    lora = replace(FULL, sharding="none", weight_bytes=2, trained=0.01)
    assert memory(LLAMA_8B, lora).head == 2 * 150 * 4 * v + 1000 * 2 * d
    assert memory(LLAMA_8B, FULL).teacher == 4 * v * d + 150 * 2 * d
    assert memory(LLAMA_8B, lora).teacher == 150 * 2 * d
    assert memory(LLAMA_8B, replace(FULL, distils=False)).teacher == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("rows", [1, 3, 4000, 200_000])
def test_the_chunk_is_that_of_the_loss(rows: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_gpu = 24 * 2**30
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=of_gpu))
    setup = Setup(max_tokens=2 * rows, response_rows=rows, device_bytes=None if device == "cpu" else of_gpu)
    shape = replace(small_shape(), vocabulary=50257, head_parameters=0)
    chunk = memory(shape, setup).head - setup.max_tokens * 4 * shape.hidden
    # No GPU is needed to see what would be allocated there.
    like = SimpleNamespace(
        device=torch.device(device), element_size=lambda: 4, new_empty=partial(torch.empty, device="meta")
    )
    head = SimpleNamespace(dweight=like, weight=range(50257))
    assert chunk == ops_module("head").chunk_space(head, (rows + 1) // 2, sides=2).nbytes


@given(
    tokens=st.integers(1, 50_000), share=st.floats(0, 1), sharding=st.sampled_from(["none", "gradients", "full"]),
    free=st.integers(10**9, 200 * 10**9), again=st.booleans(),
)  # fmt: skip
def test_the_largest_tree_fits_and_the_next_does_not(
    tokens: int, share: float, sharding: Any, free: int, again: bool
) -> None:
    rows = math.ceil(tokens * share)
    setup = replace(FULL, max_tokens=tokens, response_rows=rows, sharding=sharding, gradient_checkpointing=again)
    largest = largest_tree(LLAMA_8B, setup, free)

    def fits(size: int) -> bool:
        tree = replace(setup, max_tokens=size, response_rows=math.ceil(rows / tokens * size))
        return memory(LLAMA_8B, tree).total <= 0.9 * free

    assert largest % 256 == 0
    assert largest >= 256
    assert fits(largest) or largest == 256
    assert not fits(largest + 256)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_operations_are_those_of_the_plain_step(family: str, again: bool) -> None:
    step = Reference(Case(Setup(**TREE, gradient_checkpointing=again), 10, family=family))
    sizes = len(step.tree), len(step.complete), len(step.masked)
    assert flops_per_step(small_shape(family), *sizes, gradient_checkpointing=again) == step.flops()


@pytest.mark.parametrize("again", [False, True])
def test_operations_with_adapters(again: bool) -> None:
    case = Case(Setup(**TREE, gradient_checkpointing=again), 10, lora=True)
    step = Reference(case)
    sizes, trained = (len(step.tree), len(step.complete), len(step.masked)), case.measured_setup(step.model).trained
    found = flops_per_step(small_shape(), *sizes, trained=trained, gradient_checkpointing=again)
    assert found == pytest.approx(step.flops(), rel=0.03)


def test_operations_of_attention() -> None:
    # Plain attention of one sequence multiplies every query with every key, seen or not.
    tokens, model = 96, make_model("llama", attn_implementation="eager", **SIZES)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), labels=torch.zeros(1, tokens, dtype=torch.int64))
    shape = small_shape()
    forward = counter.get_total_flops() - 2 * shape.head_parameters * tokens
    assert forward_flops(shape, tokens, tokens, depth=tokens) == forward
    # Two products forward; five backward, of which one forms the scores again.
    products, step = forward_flops(shape, tokens, tokens), flops_per_step(shape, tokens, tokens, 0, depth=tokens)
    assert step - flops_per_step(shape, tokens, tokens, 0) == 3.5 * (forward - products)


def test_operations_of_the_head() -> None:
    product = 2 * 128256 * 4096
    step = flops_per_step(LLAMA_8B, 1000, 100, 50)
    # Rows in the loss are those of the last feed-forward network, too.
    row = 3 * (2 * 3 * 4096 * 14336)
    assert flops_per_step(LLAMA_8B, 1000, 101, 50) - step == pytest.approx(3 * product + row)
    assert flops_per_step(LLAMA_8B, 1000, 100, 51) - step == pytest.approx(4 * product + row)
    frozen = (flops_per_step(LLAMA_8B, 1000, 100 + n, 50, trained=0.01) for n in (0, 1))
    assert -next(frozen) + next(frozen) == pytest.approx(2 * product + 2 * row / 3)


def test_time_of_a_step() -> None:
    work = (8192, 1400, 1400)
    flops = flops_per_step(LLAMA_8B, *work, depth=100)
    seconds = sizing.step_seconds
    one = replace(FULL, processes=1, sharding="none", max_tokens=8192)
    assert seconds(LLAMA_8B, one, *work, depth=100, flops_per_second=1e14, bytes_per_second=1e9) == flops / 1e14
    p, slow = LLAMA_8B.parameters, {"flops_per_second": math.inf, "bytes_per_second": 1e9}
    # Float32 gradients, summed and spread; in bf16 the weights twice and the gradients once.
    assert seconds(LLAMA_8B, replace(one, processes=8), *work, **slow) == pytest.approx(2 * 4 * p * 7 / 8 / 1e9)
    full = replace(FULL, max_tokens=8192)
    assert seconds(LLAMA_8B, full, *work, **slow) == pytest.approx(3 * 2 * p * 7 / 8 / 1e9)
    # Each tree exchanges with full sharding.
    two = replace(full, max_tokens=8191)
    assert seconds(LLAMA_8B, two, *work, **slow) == 2 * seconds(LLAMA_8B, full, *work, **slow)
    both = {"flops_per_second": 1e14, "bytes_per_second": 1e12}
    assert seconds(LLAMA_8B, full, *work, **both) == flops_per_step(LLAMA_8B, *work) / 1e14


# The command would find the module as a new one.
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_plan_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module(sizing.__name__, run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("\n") > 10
    assert printed in PAGE


def test_the_page_links_to_what_there_is() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert {Path(target).name for target in targets} == {"ddp.yaml", "fsdp2.yaml", "zero2.yaml", "zero3.yaml"}
    for target in targets:
        assert "distributed_type" in (ROOT / "docs" / target).read_text("utf-8")


def test_the_commands_of_the_page_are_understood() -> None:
    (of_kpig,) = {command.split(" -m ")[1] for command in COMMANDS}
    assert shlex.split(of_kpig)[0] == "kpig_fast.cli"
    assert str(_parser().parse_args(shlex.split(of_kpig)[1:]).config) == "CONFIG"
    for command in COMMANDS:
        program, *words = shlex.split(command)
        if program == "accelerate":
            assert words.pop(0) == "launch"
            launched = launch_command_parser().parse_args(words)
            assert (ROOT / launched.config_file).is_file()
            assert launched.num_processes == 8 * (launched.num_machines or 1)
        else:
            launched = get_args_parser().parse_args(words)
            assert launched.nproc_per_node == "8"
        assert launched.module
        assert launched.training_script == "kpig_fast.cli"
    assert len(COMMANDS) == 6


def test_torchrun_gets_the_settings_of_the_file() -> None:
    values = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text("utf-8"))["fsdp_config"]
    (line,) = re.findall(r"^export (.*)$", PAGE, re.MULTILINE)
    exported = dict(word.split("=") for word in line.split())
    assert exported.pop("ACCELERATE_USE_FSDP") == "true"
    named = {name.upper(): str(value) for name, value in values.items() if value is not False}
    assert {name: value.lower() for name, value in exported.items()} == {n: v.lower() for n, v in named.items()}


def test_the_settings_and_the_code_of_the_page_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (settings,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    RunConfig.model_validate({"model": "m", "output_dir": "o", "data": {"source": "suite"}, **yaml.safe_load(settings)})
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    make_model("llama").config.save_pretrained(tmp_path)
    exec(code.replace("path/to/model", str(tmp_path)), {})
    assert capsys.readouterr().out.startswith("Memory(weights=")
