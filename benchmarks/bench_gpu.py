"""The GPU benchmark: kernels and whole models against bare matrix products and against what people use today.

``python benchmarks/bench_gpu.py OUT_DIR`` is meant to take four minutes on one GPU; GPU.md beside this file says how to
read it. ``--device cpu --quick`` runs the same code at small sizes, without what needs a GPU.
"""

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import bench_gpu_attention
import bench_gpu_head
import bench_gpu_models
import torch
from bench_gpu_common import Bench, facts, write
from common import SHARED

# What a section runs, and the seconds after which it begins nothing new.
SECTIONS: dict[str, tuple[Callable[[Bench, Namespace], None], float]] = {
    "memory": (lambda bench, _: bench_gpu_head.memory(bench), 10),
    "scoring_head": (lambda bench, _: bench_gpu_head.scoring(bench), 20),
    "training_head": (lambda bench, _: bench_gpu_head.training(bench), 70),
    "attention": (lambda bench, _: bench_gpu_attention.attention(bench), 30),
    "scorer": (bench_gpu_models.scorer, 40),
    "step": (bench_gpu_models.step, 40),
}


def main(command: Sequence[str] | None = None) -> None:
    """Run the sections; ``command``: options, default those of the command line. Exits with 1 if one of them failed."""
    options = argparse.ArgumentParser(description="Kernels and whole models on a GPU against bare products and peers.")
    options.add_argument("out", type=Path, metavar="OUT_DIR", help="gets a JSON and a CSV file for each section")
    options.add_argument("--sections", nargs="+", choices=SECTIONS, default=[*SECTIONS], help="default: all")
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: cuda")
    options.add_argument("--quick", action="store_true", help="small sizes, compared with no target")
    options.add_argument("--data", type=Path, default=SHARED / "data/sni_core", help="holds tasks/ and manifest.json")
    options.add_argument("--tokenizer", default=str(SHARED / "models/gpt2-tokenizer"), help="folder")
    arguments = options.parse_args(command)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_gpu.py found no CUDA GPU; try the code with: --device cpu --quick")
    arguments.out.mkdir(parents=True, exist_ok=True)
    before = facts(arguments.device)
    failed = [name for name in arguments.sections if not run(name, arguments, before)]
    if failed:
        sys.exit(f"failed: {' '.join(failed)}")


def run(name: str, arguments: Namespace, before: dict) -> bool:
    """One section, recorded also where it breaks off; whether it came to its end."""
    section, budget = SECTIONS[name]
    bench = Bench(arguments.device, arguments.quick, budget)
    print(json.dumps({"section": name}), flush=True)
    try:
        section(bench, arguments)
    except Exception as failure:
        # The others are still worth their time.
        bench.add(name, "broke off", error=f"{type(failure).__name__}: {failure}")
        return False
    finally:
        write(arguments.out, name, bench, before)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    return True


if __name__ == "__main__":
    main()
