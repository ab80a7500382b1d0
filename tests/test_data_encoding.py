"""Prompts and responses as token ids: plain and chat templates, with a tokenizer made here and with real ones."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kpig_fast.data.encoding import EncodedPair, PromptEncoder
from kpig_fast.data.schema import Demonstration, Instance

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
BARE = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
COUNTING = CHATML.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' %}{{ messages[0].content | length }} {% endif %}{{ m.content }}"
)

INSTANCE = Instance(
    'Answer "yes" or "no" in capitals.', "YES", "Is it so?", ('"yes" or "no"', "capitals"), task="polar", id="7"
)


def byte_tokenizer(merges=(), chat_template=None, **special) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the given merges; ``special`` may set bos_token, eos_token and closing."""
    closing = special.pop("closing", False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(a + b for a, b in merges)]
    core = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|start|>", "<|end|>", "<s>", "</s>"])
    begin = "<s> " if "bos_token" in special else ""
    core.post_processor = processors.TemplateProcessing(
        single=f"{begin}$A{' </s>' if closing else ''}",
        special_tokens=[(token, core.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = chat_template
    return tokenizer


PLAIN = byte_tokenizer(bos_token="<s>", eos_token="</s>")
TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="<"), max_size=30)


def texts(tokenizer, pair: EncodedPair) -> tuple[str, str, str]:
    return (
        tokenizer.decode(pair.complete_ids),
        tokenizer.decode(pair.masked_ids),
        tokenizer.decode(pair.response_ids),
    )


def test_plain_prompt_with_context():
    complete, masked, response = texts(PLAIN, PromptEncoder(PLAIN).encode(INSTANCE))
    assert complete == '<s>Answer "yes" or "no" in capitals.\n\nInput: Is it so?\n\nOutput:'
    assert masked == "<s>Answer [MASK] in [MASK].\n\nInput: Is it so?\n\nOutput:"
    assert response == " YES</s>"


def test_plain_prompt_without_context_has_no_input_line():
    complete, _, _ = texts(PLAIN, PromptEncoder(PLAIN).encode(Instance("Say hello.", "Hello")))
    assert complete == "<s>Say hello.\n\nOutput:"


def test_own_mask_text():
    _, masked, _ = texts(PLAIN, PromptEncoder(PLAIN, mask_text="___").encode(INSTANCE))
    assert masked.startswith("<s>Answer ___ in ___.")


def test_demonstrations_stand_before_the_question():
    worked = [Demonstration(context="2+2", output="4"), Demonstration(context="", output="none")]
    ids = PromptEncoder(PLAIN).prompt("Add.", "1+2", worked)
    assert PLAIN.decode(ids) == ("<s>Add.\n\nInput: 2+2\n\nOutput: 4\n\nOutput: none\n\nInput: 1+2\n\nOutput:")


def test_prompt_for_generation_is_the_encoded_prompt():
    for tokenizer, template in ((PLAIN, "plain"), (byte_tokenizer(chat_template=CHATML), "chat")):
        encoder = PromptEncoder(tokenizer, template=template)
        assert encoder.prompt(INSTANCE.instruction, INSTANCE.context) == encoder.encode(INSTANCE).complete_ids


def test_closing_token_of_the_tokenizer_does_not_end_the_prompt():
    closing = byte_tokenizer(bos_token="<s>", eos_token="</s>", closing=True)
    assert closing("a").input_ids[-1] == closing.eos_token_id
    assert PromptEncoder(closing).encode(INSTANCE) == PromptEncoder(PLAIN).encode(INSTANCE)


def test_empty_output_is_the_end_token_alone():
    empty = Instance("Say nothing.", "")
    assert PromptEncoder(PLAIN).encode(empty).response_ids == [PLAIN.eos_token_id]
    assert PromptEncoder(PLAIN, end_of_sequence=False).encode(empty).response_ids == []


def test_end_of_sequence_off():
    with_end = PromptEncoder(PLAIN).encode(INSTANCE).response_ids
    without = PromptEncoder(PLAIN, end_of_sequence=False).encode(INSTANCE).response_ids
    assert with_end == [*without, PLAIN.eos_token_id]


def test_missing_end_token_is_an_error_that_names_the_fix():
    endless = byte_tokenizer()
    with pytest.raises(ValueError, match=r"tokenizer\.eos_token or pass end_of_sequence=False"):
        PromptEncoder(endless)
    encoder = PromptEncoder(endless, end_of_sequence=False)
    assert encoder.end_id is None
    assert endless.decode(encoder.encode(INSTANCE).response_ids) == " YES"


def test_tokenizer_that_merges_across_the_border_falls_back_to_the_response_alone():
    # "Ġ" is the byte-level form of the space: ": " becomes one token, so "Output:" is no token prefix.
    merging = byte_tokenizer(merges=[(":", "Ġ")], eos_token="</s>")
    assert merging("Output:").input_ids != merging("Output: x").input_ids[: len("Output:")]
    pair = PromptEncoder(merging).encode(INSTANCE)
    assert merging.decode(pair.response_ids) == " YES</s>"
    assert PromptEncoder(merging).encode(Instance("i", "")).response_ids == [merging.eos_token_id]


def test_unknown_template():
    with pytest.raises(ValueError, match="unknown template 'alpaca'; choose 'plain' or 'chat'"):
        PromptEncoder(PLAIN, template="alpaca")  # pyright: ignore[reportArgumentType]


def test_key_part_that_does_not_occur_names_the_instance():
    with pytest.raises(ValueError, match="instance '9': key part 'absent' does not occur"):
        PromptEncoder(PLAIN).encode(Instance("Say it.", "it", key_parts=("absent",), id="9"))


@pytest.mark.filterwarnings("error")
def test_long_text_gives_no_warning(caplog):
    short = byte_tokenizer(eos_token="</s>", model_max_length=8)
    with caplog.at_level(logging.WARNING):
        PromptEncoder(short).encode(INSTANCE)
    assert not caplog.records


@given(instruction=TEXT, context=TEXT, output=TEXT, masked=st.booleans())
@settings(max_examples=100, deadline=None)
def test_plain_loses_nothing(instruction, context, output, masked):
    key_parts = ((0, len(instruction)),) if masked and instruction else ()
    pair = PromptEncoder(PLAIN).encode(Instance(instruction, output, context, key_parts))
    complete, under_mask, response = texts(PLAIN, pair)
    rest = f"\n\nInput: {context}\n\nOutput:" if context else "\n\nOutput:"
    assert complete == f"<s>{instruction}{rest}"
    assert under_mask == (f"<s>[MASK]{rest}" if key_parts else complete)
    assert response == (f" {output}</s>" if output else "</s>")
    assert (pair.complete_ids == pair.masked_ids) == (not key_parts)


@given(st.lists(st.builds(Instance, TEXT, TEXT, TEXT), max_size=8))
@settings(max_examples=30, deadline=None)
def test_many_at_once_are_one_by_one(instances):
    encoder = PromptEncoder(PLAIN)
    assert encoder.encode_all(instances) == [encoder.encode(instance) for instance in instances]


def test_more_than_one_chunk_keeps_the_order(monkeypatch, capsys):
    monkeypatch.setattr("kpig_fast.data.encoding._CHUNK", 3)
    instances = [Instance("Repeat.", str(n)) for n in range(8)]
    pairs = PromptEncoder(PLAIN).encode_all(instances, progress=True)
    assert [PLAIN.decode(p.response_ids) for p in pairs] == [f" {n}</s>" for n in range(8)]
    assert "tokenizing" in capsys.readouterr().err


def test_pairs_share_no_list():
    first, second = PromptEncoder(PLAIN).encode_all([Instance("i", "o"), Instance("i", "o")])
    first.complete_ids.append(0)
    first.response_ids.append(0)
    assert second == PromptEncoder(PLAIN).encode(Instance("i", "o"))
    assert first.masked_ids == second.masked_ids


def chat(template: str) -> PreTrainedTokenizerFast:
    return byte_tokenizer(chat_template=template, bos_token="<s>", eos_token="</s>")


def test_chat_turns():
    tokenizer = chat(CHATML)
    encoder = PromptEncoder(tokenizer, template="chat")
    complete, masked, response = texts(tokenizer, encoder.encode(INSTANCE))
    assert complete == ('<|start|>user\nAnswer "yes" or "no" in capitals.\n\nIs it so?<|end|>\n<|start|>assistant\n')
    assert masked == "<|start|>user\nAnswer [MASK] in [MASK].\n\nIs it so?<|end|>\n<|start|>assistant\n"
    assert response == "YES<|end|>"
    assert encoder.end_id == tokenizer.convert_tokens_to_ids("<|end|>")


def test_chat_with_end_of_sequence_in_the_template():
    tokenizer = chat(BRACKETS)
    complete, _, response = texts(tokenizer, PromptEncoder(tokenizer, template="chat").encode(INSTANCE))
    assert complete == '<s>[INST] Answer "yes" or "no" in capitals.\n\nIs it so? [/INST]'
    assert response == " YES </s>"


def test_chat_template_without_control_token_ends_with_end_of_sequence():
    tokenizer = chat(BARE)
    assert texts(tokenizer, PromptEncoder(tokenizer, template="chat").encode(INSTANCE))[2] == "YES</s>"
    bare = byte_tokenizer(chat_template=BARE)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        PromptEncoder(bare, template="chat")


def test_first_control_token_after_the_answer_ends_the_turn():
    tokenizer = chat(CHATML.replace("<|end|>", "<|end|></s>"))
    encoder = PromptEncoder(tokenizer, template="chat")
    assert encoder.end_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert texts(tokenizer, encoder.encode(INSTANCE))[2] == "YES<|end|>"


def test_chat_without_end_of_turn():
    tokenizer = chat(CHATML)
    pair = PromptEncoder(tokenizer, template="chat", end_of_sequence=False).encode(INSTANCE)
    assert tokenizer.decode(pair.response_ids) == "YES"


@pytest.mark.parametrize("template", [CHATML, BRACKETS, BARE])
@given(instruction=TEXT, context=TEXT, output=TEXT)
@settings(max_examples=40, deadline=None)
def test_chat_is_a_prefix_of_the_templates_own_conversation(template, instruction, context, output):
    tokenizer = chat(template)
    pair = PromptEncoder(tokenizer, template="chat", end_of_sequence=template != BARE).encode(
        Instance(instruction, output, context)
    )
    user = f"{instruction}\n\n{context}" if context else instruction
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": output}]
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    ids = pair.complete_ids + pair.response_ids
    assert ids == whole[: len(ids)]
    assert tokenizer.decode(whole[len(ids) :]).strip() == ""


def test_chat_demonstrations_are_earlier_turns():
    tokenizer = chat(CHATML)
    ids = PromptEncoder(tokenizer, template="chat").prompt("Add.", "1+2", [Demonstration(context="2+2", output="4")])
    assert tokenizer.decode(ids) == (
        "<|start|>user\nAdd.\n\n2+2<|end|>\n<|start|>assistant\n4<|end|>\n"
        "<|start|>user\nAdd.\n\n1+2<|end|>\n<|start|>assistant\n"
    )


def test_chat_needs_a_chat_template():
    with pytest.raises(ValueError, match=r"no chat template; set tokenizer\.chat_template or use template='plain'"):
        PromptEncoder(PLAIN, template="chat")


def test_chat_prompt_must_be_a_token_prefix():
    with pytest.raises(ValueError, match=r"instance '7': the chat template .* generation prompt; .*template='plain'"):
        PromptEncoder(chat(THINKING), template="chat").encode(INSTANCE)


def test_chat_prefix_broken_by_one_answer_names_that_instance():
    merging = byte_tokenizer(merges=[("Ċ", "Ċ")], chat_template=CHATML)
    encoder = PromptEncoder(merging, template="chat")
    good, bad = Instance("i", "fine", id="good"), Instance("i", "\nbroken", id="bad")
    with pytest.raises(ValueError, match=r"instance 'bad': .* '\\nbroken' .*strip white space around the output"):
        encoder.encode_all([good, bad])


def test_chat_response_must_not_depend_on_the_mask():
    encoder = PromptEncoder(chat(COUNTING), template="chat")
    encoder.encode(Instance("Nothing is masked.", "fine"))
    with pytest.raises(ValueError, match="instance '7': the chat template writes another response under the masked"):
        encoder.encode(INSTANCE)


@pytest.mark.parametrize("name", ["stories260K", "gpt2-tokenizer"])
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_real_tokenizers(shared, name, template):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
    tokenizer.chat_template = BRACKETS
    pair = PromptEncoder(tokenizer, template=template).encode(INSTANCE)
    complete, masked, response = (text.lstrip("<s> ") for text in texts(tokenizer, pair))
    assert INSTANCE.instruction in complete
    assert masked == complete.replace('"yes" or "no"', "[MASK]").replace("capitals", "[MASK]")
    assert response.replace(" ", "") == f"YES{tokenizer.eos_token}"
    assert PromptEncoder(tokenizer, template=template).end_id == tokenizer.eos_token_id


def test_added_end_of_turn_token_on_a_real_tokenizer(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "gpt2-tokenizer")
    tokenizer.add_tokens([AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)])
    tokenizer.chat_template = CHATML
    encoder = PromptEncoder(tokenizer, template="chat")
    assert encoder.end_id == tokenizer.convert_tokens_to_ids("<|end|>") != tokenizer.eos_token_id
    assert encoder.encode(INSTANCE).response_ids == [*tokenizer("YES").input_ids, encoder.end_id]


def test_plain_response_of_a_real_tokenizer_follows_the_prompt_as_one_text(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "gpt2-tokenizer")
    pair = PromptEncoder(tokenizer, end_of_sequence=False).encode(INSTANCE)
    text = f"{INSTANCE.instruction}\n\nInput: {INSTANCE.context}\n\nOutput: {INSTANCE.output}"
    assert pair.complete_ids + pair.response_ids == tokenizer(text).input_ids
