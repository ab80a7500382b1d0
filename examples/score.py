"""The information gain of the key parts of one instance, in one forward pass."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from kpig_fast import Instance, KeyPartScorer
from kpig_fast.data.base_model import base_model_path

path = base_model_path()  # or the folder or hub name of any causal language model
scorer = KeyPartScorer(AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path))
ask = "Sort the words and join them with commas."
scores = scorer.score([Instance(ask, "ant, bee, cat", "cat bee ant", key_parts=("Sort", "with commas"))])
print(scores.gain, scores.stats)
