"""Two steps of KPIG in a script of one's own: a dataset in Alpaca form, a LoRA model, transformers' Trainer underneath.

The first step trains one task. The second one trains another; there the divergence holds the answers to masked
instructions near those of the first step's adapter.
"""

from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from kpig_fast import KPIGConfig, KPIGTrainer
from kpig_fast.data.base_model import base_model_path

# Rows of instruction, input, output and key_parts; task tells the rows of the two steps apart.
DATA = Path(__file__).with_name("alpaca.json")

path = base_model_path()  # or the folder or hub name of any causal language model
tokenizer = AutoTokenizer.from_pretrained(path)
set_seed(0)
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(path, dtype="float32"), LoraConfig(target_modules=["q_proj", "v_proj"])
)
rows = load_dataset("json", data_files=str(DATA), split="train")
for step, task in enumerate(("reverse", "last")):
    arguments = KPIGConfig(
        output_dir=f"runs/lora/step-{step}",
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=2e-3,
        lam=0.02,
        alpha=0.3,
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=step,
    )
    # The model as it is now is the frozen model of this step; the trainer keeps what it needs of it in output_dir.
    trainer = KPIGTrainer(model, arguments, [row for row in rows if row["task"] == task], tokenizer)
    trainer.train()
    print(f"{task}: mean gain before training {float(trainer.teacher.gain.mean()):.4f}")
    for entry in trainer.state.log_history[:-1]:
        print("  epoch {epoch:.0f}: cross-entropy {cross_entropy:.3f} nats, divergence {jsd:.5f} bits".format(**entry))
model.save_pretrained("runs/lora/adapter")
