"""The small pretrained model of the demo: ``README.md`` beside this file says how it was made and what it can do."""

from pathlib import Path


def base_model_path() -> Path:
    """The folder with the model's weights, configuration and tokenizer, as ``from_pretrained`` takes it."""
    return Path(__file__).parent


def resolve_model(name: str) -> str:
    """What ``from_pretrained`` is to load: the bundled model for ``bundled``, else ``name`` itself."""
    return str(base_model_path()) if name == "bundled" else name
