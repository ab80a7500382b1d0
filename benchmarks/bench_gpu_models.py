"""Whole models of the GPU benchmark: scoring, and one training step, on real text with random weights."""

import copy
import math
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import baseline_scorers
import torch
from baseline_scorers import LogProbs, Scores, padded, with_fused_head
from baseline_trainers import PackedTrainer, as_tensors, pack
from baseline_trainers_gpu import fused_trainers
from bench_gpu_common import Bench
from bench_training_step import ALPHA, LAM
from common import ANSWER_SPREAD, SPECIAL_TOKENS, Setting, labelled, load_instances
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from kpig_fast import Instance, KeyPartScorer, KPIGConfig, KPIGTrainer, warmup
from kpig_fast.data.base_model import base_model_path
from kpig_fast.data.encoding import PromptEncoder
from kpig_fast.data.schema import make_instance
from kpig_fast.data.suite import bundled_suite

# hidden, intermediate, layers, heads, kv heads, vocabulary: Llama-3.2-1B and Llama-3.1-8B.
MODELS = {"1B": (2048, 8192, 16, 32, 8, 128256), "8B": (4096, 14336, 32, 32, 8, 128256)}
SMALL = {"tiny": (64, 128, 1, 4, 2, None)}
# Of log-probs of a bf16 model, in the mean: they are rounded in other places. In float32 the largest.
BF16_TOLERANCE, TOLERANCE = 0.1, 1e-4
# Of the first loss of a step, relative.
LOSS_TOLERANCE = {"cuda": 2e-2, "cpu": 1e-4}
PACK_TOKENS, BATCH = 2048, 8


def instances(arguments: Namespace, tasks: int, per_task: int) -> list[Instance]:
    """Natural Instructions where the folder is there, else the bundled suite."""
    if (arguments.data / "tasks").is_dir():
        return load_instances(arguments.data, tasks, per_task)
    suite = bundled_suite(n_train=per_task)
    print(f"without {arguments.data}: the bundled suite instead of Natural Instructions")
    rows = [row for name in suite.names("seen")[:tasks] for row in suite.of_task(name, "train")]
    return [make_instance(suite.tasks[row.task], row) for row in rows]


def setting(bench: Bench, arguments: Namespace, sizes: tuple, tasks: int, per_task: int) -> Setting:
    """A Llama of these sizes with random weights on the device, a tokenizer, and real instances."""
    found = Path(arguments.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(found if found.is_dir() else base_model_path())
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    hidden, intermediate, layers, heads, kv_heads, vocabulary = sizes
    special: dict[str, Any] = {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer), hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=8192, tie_word_embeddings=False, dtype=bench.dtype, **special,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)
    try:
        with torch.device(bench.device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    rows = instances(arguments, tasks, per_task)
    answers = tokenizer([f" {instance.output}" for instance in rows])["input_ids"]
    model.lm_head.weight.data[sorted({token for answer in answers for token in answer})] *= ANSWER_SPREAD
    return Setting(model, tokenizer, rows)


def on_device(log_probs: LogProbs, device: str) -> LogProbs:
    """A contestant that takes batches from the CPU."""
    return lambda inputs, labels: log_probs({name: x.to(device) for name, x in inputs.items()}, labels.to(device))


def padded_contestants(s: Setting, pairs: list, device: str) -> dict[str, Callable[[], Scores]]:
    """Two forwards over padded batches, sorted by length: with full logits, response rows only, and TRL's head."""
    collate: Any = DataCollatorForSeq2Seq(s.tokenizer)
    ways = {
        "padded, full logits": partial(baseline_scorers.full_logits, s.model),
        "padded, response rows": partial(baseline_scorers.response_rows, s.model),
    }
    if (patched := with_fused_head(s.model)) is not None:
        ways["padded, TRL's fused head"] = partial(baseline_scorers.fused_head, patched)
    return {
        name: partial(padded, pairs, collate, on_device(way, device), batch=BATCH, by_length=True)
        for name, way in ways.items()
    }


def log_prob_error(bench: Bench, ours: Scores, other: Scores) -> float:
    """How far log-probs are apart: in the mean in bf16, the largest in float32; over the tokens that ours scores."""
    sides = [(a.cpu(), b.float().cpu()) for one, two in zip(ours, other) for a, b in zip(one, two, strict=True)]
    errors = torch.cat([(a - b[: len(a)]).abs() for a, b in sides])
    return float(errors.mean() if bench.device == "cuda" else errors.max())


def once(bench: Bench, run: Callable[[], Any]) -> float:
    """Milliseconds of one run, to its end on the device; the device's own timer is for kernels."""
    bench.sync()
    started = time.perf_counter()
    run()
    bench.sync()
    return 1e3 * (time.perf_counter() - started)


def fastest(bench: Bench, run: Callable[[], Any]) -> float:
    """Milliseconds of the faster of two runs."""
    return min(once(bench, run) for _ in range(2))


def scorer(bench: Bench, arguments: Namespace) -> None:
    """The whole scorer against two padded forwards, at the shapes of two Llamas."""
    for name, sizes in bench.pick(MODELS, SMALL).items():
        if bench.over:
            bench.add(f"scorer, {name}", "all", skipped="the section's time is used up")
            continue
        s = setting(bench, arguments, sizes, *bench.pick((20, 10), (2, 3)))
        warmup(s.model)
        case = f"scorer, {name}, {len(s.instances)} instances"
        ours = KeyPartScorer(s.model, s.tokenizer, alpha=ALPHA)
        pairs = ours.encoder.encode_all(s.instances)
        found = ours.score_pairs(pairs)
        took = fastest(bench, lambda ours=ours, pairs=pairs: ours.score_pairs(pairs))
        bench.add(case, "token trees", ms=took, tokens=found.stats.tokens, tokens_naive=found.stats.tokens_naive)
        times: dict[str, float] = {}
        tolerance = BF16_TOLERANCE if bench.device == "cuda" else TOLERANCE
        for other, run in padded_contestants(s, pairs, bench.device).items():
            error = log_prob_error(bench, (found.complete, found.masked), run())
            if error <= tolerance:
                times[other] = fastest(bench, run)
                bench.add(case, other, ms=times[other], error=error)
            else:
                bench.add(case, other, skipped=f"log-probs differ by {error:.2e}", error=error)
        full, fused = times.get("padded, full logits"), times.get("padded, TRL's fused head")
        bench.target(case, "as fast as padded, full logits", full and full / took, at_least=5)
        bench.target(case, "as fast as padded, TRL's fused head", fused and fused / took, at_least=3)
        del s, ours
        if bench.device == "cuda":
            torch.cuda.empty_cache()


def step_makers(s: Setting) -> dict[str, Callable[..., Trainer]]:
    """What makes a trainer for one step over all instances: KPIG, padded fine-tuning, fine-tuning on packs."""
    pairs = PromptEncoder(s.tokenizer).encode_all(s.instances)
    pairs.sort(key=lambda pair: len(pair.complete_ids) + len(pair.response_ids))
    rows = [labelled(pair.complete_ids, pair.response_ids) for pair in pairs]
    packs = pack(rows, PACK_TOKENS)

    def make(kind: Callable[..., Trainer], data: list, collate: Callable, size: int, **arguments: Any) -> Trainer:
        arguments |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": math.ceil(len(data) / size)}
        args = TrainingArguments(**arguments, remove_unused_columns=False, train_sampling_strategy="sequential")
        return kind(copy.deepcopy(s.model), args=args, data_collator=collate, train_dataset=data)

    def kpig(**arguments: Any) -> Trainer:
        args = KPIGConfig(per_device_train_batch_size=len(pairs), alpha=ALPHA, lam=LAM, **arguments)
        return KPIGTrainer(copy.deepcopy(s.model), args, s.instances, s.tokenizer)

    packed = {"response rows": PackedTrainer, **fused_trainers()}
    return {
        "KPIG on token trees, with its pre-pass": kpig,
        "fine-tuning, padded": partial(make, Trainer, rows, DataCollatorForSeq2Seq(s.tokenizer), BATCH),
        **{f"fine-tuning, packed, {name}": partial(make, kind, packs, as_tensors, 1) for name, kind in packed.items()},
    }


def step(bench: Bench, arguments: Namespace) -> None:
    """One optimizer step of KPIG, its pre-pass included, against fine-tuning; loss for loss checked before."""
    name, sizes = next(iter(bench.pick(MODELS, SMALL).items()))
    s = setting(bench, arguments, sizes, *bench.pick((8, 12), (2, 3)))
    warmup(s.model)
    case, losses, times = f"step, {name}, {len(s.instances)} instances", {}, {}
    with TemporaryDirectory() as folder:
        for number, (other, maker) in enumerate(step_makers(s).items()):
            if bench.over:
                bench.add(case, other, skipped="the section's time is used up")
                continue
            runs = []
            # The first run compiles, and its loss is checked.
            for attempt in range(2):
                made = trainer(maker, Path(folder, f"{number}-{attempt}"), bench.device)
                runs.append(once(bench, made.train))
                losses[other] = made.state.log_history[0]["loss"]
                del made
                torch.cuda.empty_cache()
            ours = next(iter(losses.values()))
            error = abs(losses[other] / ours - 1)
            if error <= LOSS_TOLERANCE[bench.device]:
                times[other] = min(runs)
                bench.add(case, other, ms=times[other], loss=losses[other])
            else:
                bench.add(case, other, skipped=f"its loss is {losses[other]}, ours {ours}")
    took, plain = times.pop("KPIG on token trees, with its pre-pass", None), times.pop("fine-tuning, padded", None)
    if took is not None:
        bench.target(case, "the time of padded fine-tuning", plain and took / plain, at_most=0.45)
        bench.target(case, "the time of packed fine-tuning", took / min(times.values()) if times else None, at_most=0.9)


def trainer(maker: Callable[..., Trainer], folder: Path, device: str) -> Trainer:
    """A silent trainer for one step on the device."""
    arguments = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "max_steps": 1}
    made = maker(output_dir=str(folder), use_cpu=device == "cpu", **arguments)
    made.remove_callback(PrinterCallback)
    return made
