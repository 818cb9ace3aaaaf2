"""The tokenizer and prompts against transformers on models' own files, and broken files."""

import functools
import json
import unicodedata

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    NO_THINKING,
    TINY,
    TINY_TOKENS,
    changed_tokenizer,
    copy_tokenizer,
    qwen3_file,
    smollm2_folder,
)

from model import ModelError, Tokenizer, prompt_ids
from model.chat import ChatTemplate

KINDS = pytest.mark.parametrize("kind", ["instruct", "base"])
TEXTS = [
    " ",
    "<think>\nso 79 - 60 = 1234567890 12.5\n</think>\n<answer>(79 - 60) + 17 = 36</answer>",
    "naïve café e\u0301 ﬁ 中文 日本語 한국어 العربية 🙂👩‍👩‍👧 \u200b\ufeff\u00a0x",
    "tabs\t\tand \r\n lines\n\n\n  trailing   ",
    "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "<think><think></think></ think> <|im_end|x <|endoftext|><tool_call>{}</tool_call><|fim_pad|>",
    "don't we'LL they've I'm  x²+y³≠z½ \\frac{1}{2} `a_b` 0x1F\x00\x07",
]
NEW = {"content": "<new>", "special": False, "lstrip": False, "rstrip": False, "normalized": False}
NEW |= {"single_word": False}
START = "<|im_start|>"


@functools.cache
def pair(kind):
    """Ours, and transformers'."""
    folder = TINY if kind == "tiny" else qwen3_file(f"{kind}/tokenizer.json").parent
    return Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["instruct", "base", "tiny"])
def test_ids_equal_transformers_and_give_the_text_back(kind):
    ours, theirs = pair(kind)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("kind", ["base", "tiny"])
@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.text(max_size=12), st.sampled_from([*TEXTS, "<think>", "<|im_end|>"]))))
def test_ids_of_any_text_equal_transformers(kind, pieces):
    ours, theirs = pair(kind)
    text = "".join(pieces)
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


@KINDS
def test_ids_without_a_text_decode_to_nothing(kind):
    ours, _ = pair(kind)
    assert len(ours) == 151669
    assert ours.decode([16, 151700, 17, 151935]) == "12"


# Written like the templates of Qwen2.5-Instruct and SmolLM2-Instruct, with their default system messages.
QWEN25 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. '
        + 'You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""  # fmt: skip
SMOLLM2 = """{% for message in messages %}{%
if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
LLAMA2 = """{% for message in messages %}{% if message.role == 'user' %}
{{- bos_token + '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}{% endif %}{%
endfor %}"""
USER = "Make 36 from [79, 60, 17]. <b>1</b> & {x}\n"
EXAMPLES = [
    ("Make 3.", "1 + 2 <answer>1 + 2</answer>"),
    ("Make 7.\n", "<think>\n3 + 4\n</think>\n<answer>3 + 4</answer>"),
]


def prompt_of_transformers(theirs, examples, **options) -> str:
    turns = []
    for question, answer in examples:
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer})
    turns.append({"role": "user", "content": USER})
    return theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)


@KINDS
@pytest.mark.parametrize("thinking", [True, False])
def test_prompts_of_qwen3_equal_its_official_template(kind, thinking):
    ours, theirs = pair(kind)
    for examples in ([], EXAMPLES):
        expected = prompt_of_transformers(theirs, examples, enable_thinking=thinking)
        expected += "<think>\n" * thinking
        assert prompt_ids(ours, USER, thinking, examples) == theirs.encode(expected)


@pytest.mark.parametrize(("place", "template"), [("config", QWEN25), ("named", LLAMA2), ("file", SMOLLM2)])
def test_a_prompt_is_what_the_models_own_template_makes_of_it(place, template, tmp_path):
    """In the configuration, among several there, or in a file of its own, which takes precedence."""
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": template}]
    configured = {"config": template, "named": named, "file": "no"}[place]
    bos = START if place == "named" else NEW | {"__type": "AddedToken", "content": START}
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(template)
    ours = changed_tokenizer(tmp_path, NO_THINKING, chat_template=configured, bos_token=bos)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for examples in ([], EXAMPLES):
        expected = prompt_of_transformers(theirs, examples)
        ids = prompt_ids(ours, USER, False, examples)
        assert ours.decode(ids) == expected
        assert ids == theirs.encode(expected, add_special_tokens=False)
    assert ours.has_template
    assert not ours.knows_thinking


def test_smollm2s_own_files_give_its_prompts_and_stops():
    folder = smollm2_folder()
    ours, theirs = Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    expected = prompt_of_transformers(theirs, EXAMPLES)
    assert "named SmolLM" in expected
    assert prompt_ids(ours, USER, False, EXAMPLES) == theirs.encode(expected, add_special_tokens=False)
    assert ours.stop_token_ids == (0, 2)
    assert ours.end_of_turn_id == 2


def test_without_think_in_the_vocabulary_thinking_is_refused(tmp_path):
    """The error says how to go on."""
    tokenizer = changed_tokenizer(tmp_path, NO_THINKING)
    assert "think" not in tokenizer.decode(prompt_ids(tokenizer, "U", thinking=False))
    with pytest.raises(ModelError, match="no <think>.* add --sampling.no-thinking .*--thinking False"):
        prompt_ids(tokenizer, "U", thinking=True)


def test_a_template_that_opens_the_thinking_has_it_opened_once(tmp_path):
    """Without thinking it is closed at once."""
    template = "{{ messages[0].content + ':<think>\n' }}"
    tokenizer = changed_tokenizer(tmp_path, {}, chat_template=template)
    assert tokenizer.decode(prompt_ids(tokenizer, "U", True)) == "U:<think>\n"
    assert tokenizer.decode(prompt_ids(tokenizer, "U", False)) == "U:<think>\n\n</think>\n\n"


@pytest.mark.parametrize("thinking", [True, False])
def test_without_a_template_prompts_are_chatml(thinking, tmp_path):
    chatml = changed_tokenizer(tmp_path, {}, chat_template=None)
    assert not chatml.has_template
    expected = prompt_ids(Tokenizer(TINY), USER, thinking, EXAMPLES)
    assert prompt_ids(chatml, USER, thinking, EXAMPLES) == expected


def test_without_the_tokens_of_chatml_prompts_are_plain_text(tmp_path):
    """They begin with what the tokenizer puts before a text."""
    renamed = {START: "<|a|>", "<|im_end|>": "<|b|>"}
    plain = changed_tokenizer(tmp_path, renamed, chat_template=None, eos_token="<|endoftext|>")
    assert plain.decode(prompt_ids(plain, "Q", False, [("E", "A")])) == "E\n\nA\n\nQ\n\n"
    assert plain.stop_token_ids == (plain.end_of_turn_id,) == tuple(plain.encode("<|endoftext|>"))
    plain.backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|a|> $0", special_tokens=[("<|a|>", plain.encode("<|a|>")[0])]
    )
    plain.backend.save(str(tmp_path / "tokenizer.json"))
    plain = Tokenizer(tmp_path)
    assert plain.decode(prompt_ids(plain, "Q", False)) == "<|a|>Q\n\n"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{{ raise_exception('the template says why') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "\ud800",
        "{% for %}",
        7,
        [{"name": "tools", "template": "x"}],
    ],
)
def test_a_hostile_or_broken_template_is_one_line(template, tmp_path):
    with pytest.raises(ModelError) as error:
        prompt_ids(changed_tokenizer(tmp_path, {}, chat_template=template), "U", thinking=True)
    message = str(error.value)
    assert "template" in message or str(tmp_path) in message
    assert "raise_exception" not in str(template) or "the template says why" in message


def test_a_template_has_no_clock():
    date = "{{ strftime_now('%d') if strftime_now is defined else 'no date' }}"
    assert ChatTemplate(date, {}).render([]) == "no date"


@KINDS
def test_saving_keeps_the_published_files_byte_for_byte(kind, tmp_path):
    pair(kind)[0].save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == qwen3_file(f"{kind}/{name}").read_bytes()


@KINDS
def test_both_ends_stop_a_completion_of_qwen3(kind):
    """The published generation configurations name no others."""
    ours, _ = pair(kind)
    published = json.loads(qwen3_file(f"configs/{kind}.generation_config.json").read_text())
    assert set(np.ravel(published["eos_token_id"])) <= set(ours.stop_token_ids) == {151643, 151645}
    assert ours.end_of_turn_id == 151645


@pytest.mark.parametrize(
    ("config", "generation", "added"),
    [
        (7, None, {7}),
        ([5, 6], {"eos_token_id": 7}, {7}),
        (7, {"eos_token_id": [5, 9]}, {5, 9}),
        (7, {"eos_token_id": None}, set()),
        (7, {}, set()),
    ],
)
def test_stop_ids_add_those_of_the_generation_config_or_config(config, generation, added, tmp_path):
    (copy_tokenizer(tmp_path) / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    own = Tokenizer(TINY).stop_token_ids
    assert set(Tokenizer(tmp_path).stop_token_ids) == added.union(own)


def test_the_end_of_a_turn_is_that_of_the_template(tmp_path):
    """Qwen2.5's base model has another end token, but its template ends turns with `<|im_end|>`."""
    own = changed_tokenizer(tmp_path, {}, eos_token="<|endoftext|>")
    assert own.decode([own.end_of_turn_id]) == "<|im_end|>"
    other = changed_tokenizer(tmp_path, {}, eos_token="<|endoftext|>", chat_template="{{ 1 }}")
    assert other.decode([other.end_of_turn_id]) == "<|endoftext|>"


def test_a_tokenizer_in_which_nothing_ends_is_refused(tmp_path):
    renamed = {START: "<|a|>", "<|im_end|>": "<|b|>", "<|endoftext|>": "<|c|>"}
    with pytest.raises(ModelError, match=f"{tmp_path}: no token ends a completion"):
        changed_tokenizer(tmp_path, renamed, eos_token=None)


def test_an_added_token_takes_its_own_id_or_is_refused(tmp_path):
    config = copy_tokenizer(tmp_path) / "tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": {TINY_TOKENS: NEW}}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("a<new>")[1:] == [TINY_TOKENS]
    assert len(tokenizer) == TINY_TOKENS + 1
    config.write_text(json.dumps({"added_tokens_decoder": {"900": NEW}}))
    with pytest.raises(ModelError, match=f"{tmp_path}: .*'<new>' should have id 900"):
        Tokenizer(tmp_path)
