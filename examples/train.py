"""One step of KPIG in a script of one's own: Alpaca rows, a LoRA model, transformers' Trainer underneath."""

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from kpig_fast import KPIGConfig, KPIGTrainer
from kpig_fast.data.base_model import base_model_path

path = base_model_path()  # or the folder or hub name of any causal language model
rows = [
    {
        "instruction": "Join the words with a dash.",
        "input": f"{first} {second}",
        "output": f"{first} - {second}",
        "key_parts": ["with a dash"],
    }
    for first in ("ant", "bee", "cat", "dog")
    for second in ("red", "blue", "green", "pink")
]
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(path, dtype="float32"), LoraConfig(target_modules=["q_proj", "v_proj"])
)
arguments = KPIGConfig(
    output_dir="runs/lora", per_device_train_batch_size=8, learning_rate=1e-3, lam=0.02, report_to="none"
)
trainer = KPIGTrainer(model, arguments, rows, AutoTokenizer.from_pretrained(path))
trainer.train()
model.save_pretrained("runs/lora/adapter")
