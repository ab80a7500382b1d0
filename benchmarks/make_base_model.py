"""Make the small base model of the demo: ``python benchmarks/make_base_model.py`` (about 20 minutes on one core).

A Llama of about one million parameters learns from scratch to follow short instructions (``base_model_text``). Each
sequence holds one instruction and several questions that see the instruction but not one another; only the tokens of
the answers are trained. The seeds are fixed, and so is the result on one machine.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from base_model_text import Exercise, random_exercise
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kpig_fast.data.base_model import base_model_path
from kpig_fast.data.encoding import PromptEncoder
from kpig_fast.data.schema import Instance, Row, Task
from kpig_fast.data.suite import bundled_suite
from kpig_fast.evaluation.generation import generate_answers

VOCABULARY = 2048
ROWS = 8
WIDTH = 320
QUESTIONS = 6
LEARNING_RATE = 1e-2
SPECIAL = ("<pad>", "<s>", "</s>")


def make_tokenizer(seed: int = 0, n_texts: int = 30_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for the words of the exercises in every letter case."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(seed)
    tokenizer.train_from_iterator((text for _ in range(n_texts) for text in _texts(random_exercise(rng, 2))), trainer)
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def _texts(exercise: Exercise) -> list[str]:
    return [exercise.instruction, *(f"\n\nInput: {q.context}\n\nOutput: {q.output}" for q in exercise.questions)]


def make_model(vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    """The untrained model."""
    torch.manual_seed(seed)
    pad, bos, eos = range(len(SPECIAL))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=pad,
            bos_token_id=bos,
            eos_token_id=eos,
        )
    )


class Layout(NamedTuple):
    """Token ids of an exercise, their positions, the question each belongs to (0: all), and targets (-100: none)."""

    ids: list[int]
    positions: list[int]
    branches: list[int]
    targets: list[int]


def lay_out(encoder: PromptEncoder, exercise: Exercise) -> Layout:
    """One sequence for all questions: the tokens that they share, then what each one has of its own."""
    shown = exercise.demonstrations
    prompts = [encoder.prompt(exercise.instruction, q.context, shown) for q in exercise.questions]
    answers = encoder.encode_all([Instance("", q.output) for q in exercise.questions])
    shared = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts)))
    ids, positions, branches, targets = prompts[0][:shared], [*range(shared)], [0] * shared, [-100] * shared
    for number, (prompt, pair) in enumerate(zip(prompts, answers), start=1):
        own = prompt[shared:] + pair.response_ids[:-1]
        ids += own
        positions += range(shared, shared + len(own))
        branches += [number] * len(own)
        targets += [-100] * (len(own) - len(pair.response_ids)) + pair.response_ids
    return Layout(ids, positions, branches, targets)


def collate(rows: Sequence[Sequence[Layout]]) -> dict[str, torch.Tensor]:
    """A padded batch with an additive attention bias: a token sees what its exercise shares and its own question."""
    ids, positions, branches, targets = (
        pad_sequence([torch.tensor([value for layout in row for value in layout[field]]) for row in rows], True, fill)
        for field, fill in enumerate((0, 0, -1, -100))
    )
    lengths = [torch.tensor([len(layout.ids) for layout in row]) for row in rows]
    owners = pad_sequence([torch.arange(len(n)).repeat_interleave(n) for n in lengths], True, -1)
    same = (branches[:, :, None] == branches[:, None, :]) | (branches[:, None, :] == 0)
    same &= owners[:, :, None] == owners[:, None, :]
    bias = torch.zeros(same.shape).masked_fill(~same.tril(), torch.finfo(torch.float32).min)[:, None]
    return {"input_ids": ids, "position_ids": positions, "attention_mask": bias, "targets": targets}


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of ``ROWS`` rows of at most ``WIDTH`` tokens, each filled with whole exercises."""
    encoder, rng = PromptEncoder(tokenizer), random.Random(seed)
    rows: list[list[Layout]] = [[] for _ in range(ROWS)]
    while True:
        layout = lay_out(encoder, random_exercise(rng, QUESTIONS))
        room = [WIDTH - sum(len(other.ids) for other in row) for row in rows]
        roomy = next((i for i, free in enumerate(room) if free >= len(layout.ids)), None)
        if roomy is None:
            yield collate(rows)
            rows, roomy = [[] for _ in range(ROWS)], 0
        rows[roomy].append(layout)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, out: Path) -> None:
    """Train in place for ``steps`` batches; ``out`` always holds the newest weights."""
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not model.lm_head.weight]
    others = [p for p in model.parameters() if p.ndim < 2 or p is model.lm_head.weight]
    optimizers = [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    data = batches(tokenizer, seed=1)
    started = time.process_time()
    model.train()
    for step in (bar := trange(steps, desc="training", mininterval=30)):
        scale = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = next(data)
        targets = batch.pop("targets")
        rows = targets != -100
        hidden = model.model(**batch, use_cache=False).last_hidden_state[rows]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), targets[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * scale
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 0:
            right = (model.lm_head(hidden).argmax(-1) == targets[rows]).float().mean()
            bar.write(f"step {step} loss {loss:.3f} tokens right {right:.3f} cpu {time.process_time() - started:.0f} s")
        if step % 500 == 499 or step == steps - 1:
            model.save_pretrained(out)


def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, rows: list[Row]) -> float:
    """Percent of ``rows`` that the model answers to the letter, greedily; held-out tasks show their demonstrations."""
    encoder = PromptEncoder(tokenizer)
    prompts = [encoder.prompt(task.instructions[0].text, row.context, task.demonstrations) for row in rows]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=24)
    return 100 * sum(answer in row.outputs for answer, row in zip(answers, rows)) / len(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=base_model_path(), help="folder for the model and its tokenizer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(arguments.out)
    model = make_model(len(tokenizer))
    train(model, tokenizer, arguments.steps, arguments.out)
    suite = bundled_suite(n_train=0, n_validation=0)
    for name, task in suite.tasks.items():
        print(f"| {name} | {exact_match(model, tokenizer, task, suite.of_task(name)):.0f} |")


if __name__ == "__main__":
    main()
