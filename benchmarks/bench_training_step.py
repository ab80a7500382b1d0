"""One optimizer step of KPIG, its pre-pass included, against fine-tuning and against KPIG as its formulas read.

``python benchmarks/bench_training_step.py --quick``; README.md beside this file says how to read it.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

from baseline_trainers import PackedTrainer, PairCollator, StraightforwardTrainer, as_tensors, pack
from common import Contestant, Setting, labelled, parser, race, ratios, report, require, setting
from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

from kpig_fast import KPIGConfig, KPIGTrainer
from kpig_fast.data.encoding import PromptEncoder

ALPHA, LAM = 0.3, 0.02
# Far above the method's, so that an error of the divergence cannot hide behind the cross-entropy.
CHECK_LAM = 100.0
KPIG, PREPASS = "KPIG on token trees, with its pre-pass", "its pre-pass alone"
SFT, PACKED = "fine-tuning, padded", "fine-tuning, packed, response rows"
STRAIGHTFORWARD = "KPIG as its formulas read, padded"

# Makes a trainer of a copy of the model; takes further training arguments.
Maker = Callable[..., Any]


def makers(s: Setting, *, batch: int, pack_tokens: int, lam: float) -> dict[str, Maker]:
    """The contestants. Each trains on all instances in one optimizer batch.

    Args:
        s: the model, its tokenizer and the instances.
        batch: sequences of a padded micro-batch; similar lengths stand together, so that little is padded.
        pack_tokens: tokens of a pack.
        lam: weight of the divergence.
    """
    pairs = PromptEncoder(s.tokenizer).encode_all(s.instances)
    pairs.sort(key=lambda pair: len(pair.complete_ids) + len(pair.response_ids))
    complete = [labelled(pair.complete_ids, pair.response_ids) for pair in pairs]
    masked = [labelled(pair.masked_ids, pair.response_ids) for pair in pairs]

    def make(kind: Callable[..., Trainer], data: list, collator: Callable, size: int, **arguments: Any) -> Trainer:
        arguments |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": math.ceil(len(data) / size)}
        args = TrainingArguments(**arguments, remove_unused_columns=False, train_sampling_strategy="sequential")
        return kind(copy.deepcopy(s.model), args=args, data_collator=collator, train_dataset=data)

    def kpig(**arguments: Any) -> Trainer:
        args = KPIGConfig(per_device_train_batch_size=len(pairs), alpha=ALPHA, lam=lam, **arguments)
        return KPIGTrainer(copy.deepcopy(s.model), args, s.instances, s.tokenizer)

    as_written = partial(StraightforwardTrainer, lam=lam, alpha=ALPHA)
    return {
        KPIG: kpig,
        SFT: partial(make, Trainer, complete, DataCollatorForSeq2Seq(s.tokenizer), batch),
        PACKED: partial(make, PackedTrainer, pack(complete, pack_tokens), as_tensors, 1),
        STRAIGHTFORWARD: partial(make, as_written, list(zip(complete, masked)), PairCollator(s.tokenizer), batch),
    }


def trainer(maker: Maker, folder: Path, **arguments: Any) -> Any:
    """A silent trainer that writes to ``folder``; emptied, so that no pre-pass of an earlier run is used again."""
    rmtree(folder, ignore_errors=True)
    common = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    made = maker(output_dir=str(folder), **common, **arguments)
    made.remove_callback(PrinterCallback)
    return made


def check(contestants: Mapping[str, Maker], folder: Path) -> None:
    """Require that all have one loss at the first step, and that both forms of KPIG have one divergence after it.

    The first student is its own teacher: no divergence, and no gradient of it. So all take the same first step, and at
    the second the divergence is what KPIG's loss has more than that of fine-tuning.
    """
    losses: dict[str, list[float]] = {}
    for name, maker in tqdm(contestants.items(), desc="checking", unit="contestant"):
        made = trainer(maker, folder, max_steps=2, logging_steps=1, optim="sgd", learning_rate=0.03)
        made.train()
        losses[name] = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    for name in (SFT, PACKED, STRAIGHTFORWARD):
        require(f"first loss of {name!r} differs by", abs(losses[name][0] / losses[KPIG][0] - 1), 1e-5)
    (_, ours), (_, other), (_, base) = losses[KPIG], losses[STRAIGHTFORWARD], losses[SFT]
    require("second loss of KPIG differs by", abs(other / ours - 1), 1e-4)
    require("its divergence differs by", abs((other - base) / (ours - base) - 1), 1e-3)


def main(command: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``command``: its options, default those of the command line."""
    options = parser("A step of KPIG against fine-tuning and KPIG as written.", tasks=8, instances=12)
    options.add_argument("--pack", type=int, default=512, help="tokens of a pack (default: 512)")
    arguments = options.parse_args(command)
    s = setting(arguments)
    contestants = partial(makers, s, batch=arguments.batch, pack_tokens=arguments.pack)
    with TemporaryDirectory() as name:
        folder = Path(name) / "run"
        check(contestants(lam=CHECK_LAM), folder)
        timed = {key: partial(trainer, maker, folder, max_steps=1) for key, maker in contestants(lam=LAM).items()}
        runs: dict[str, Contestant] = {key: lambda make=make: make().train for key, make in timed.items()}
        runs[PREPASS] = lambda: timed[KPIG]().prepare_teacher
        seconds = race(runs, arguments.rounds, processor_time=arguments.processor_time)
    shares = {f"the time of {name}": ratios(seconds, KPIG, name) for name in (SFT, PACKED, STRAIGHTFORWARD)}
    report(arguments, seconds, shares, parameters=s.model.num_parameters())


if __name__ == "__main__":
    main()
