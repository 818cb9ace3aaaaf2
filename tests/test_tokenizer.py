"""The tokenizer and prompts against transformers on models' own files, and broken files."""

import functools
import json
import shutil
import unicodedata

import pytest
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

from data import Problem, score
from model import ModelError, Tokenizer, prompt_ids
from model.chat import ChatTemplate

KINDS = pytest.mark.parametrize("kind", ["instruct", "base"])
END_OF_TEXT, IM_END = 151643, 151645
TEXTS = [
    " ",
    "Using the numbers [79, 60, 17], make 36. 1234567890 12.5",
    "<think>\nso 79 - 60\n</think>\n<answer>(79 - 60) + 17 = 36</answer>",
    "naïve café e\u0301 ﬁ 中文 日本語 한국어 العربية 🙂👩‍👩‍👧 \u200b\ufeff\u00a0x",
    "tabs\t\tand \r\n lines\n\n\n  trailing   ",
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "<think><think></think></ think> <|im_end|x <|endoftext|><tool_call>{}</tool_call><|fim_pad|>",
    "don't we'LL they've I'm  x²+y³≠z½ \\frac{1}{2} `a_b` 0x1F\x00\x07",
]
ADDED = dict(content="<new>", lstrip=False, normalized=False, rstrip=False, single_word=False, special=False)


@functools.cache
def pair(kind: str) -> tuple[Tokenizer, transformers.PreTrainedTokenizerBase]:
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
    assert all(ours.encode(token)[0] in ours.stop_token_ids for token in ("<|im_end|>", "<|endoftext|>"))

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        st.lists(
            st.one_of(st.text(max_size=12), st.sampled_from(TEXTS + ["<think>", "</think>", "<|im_end|>"]))
        )
    )
    def any_text(pieces):
        assert ours.encode("".join(pieces)) == theirs.encode("".join(pieces), add_special_tokens=False)

    any_text()


@KINDS
def test_thinking_and_chat_tokens_are_one_id_each(kind):
    """For base models too; ids without a text decode to nothing."""
    ours, _ = pair(kind)
    texts = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    for text, token_id in zip(texts, (END_OF_TEXT, 151644, IM_END, 151667, 151668), strict=True):
        assert ours.encode(text) == [token_id]
        assert ours.decode([token_id]) == text
    assert (len(ours), len(ours.encode("<answer>")), len(ours.encode("1234567890"))) == (151669, 3, 10)
    assert ours.decode(list(range(151669, 151936))) == ""
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
    {{- '<|im_start|>assistant\\n' }}
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


def chat(user: str, examples) -> list[dict]:
    turns = [
        {"role": role, "content": text}
        for pair in examples
        for role, text in zip(("user", "assistant"), pair)
    ]
    return [*turns, {"role": "user", "content": user}]


@KINDS
@pytest.mark.parametrize("examples", [[], EXAMPLES], ids=len)
@pytest.mark.parametrize("thinking", [True, False])
def test_prompts_of_qwen3_equal_its_official_template(kind, thinking, examples):
    ours, theirs = pair(kind)
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    expected = theirs.apply_chat_template(chat(USER, examples), **options) + "<think>\n" * thinking
    assert prompt_ids(ours, USER, thinking, examples) == theirs.encode(expected, add_special_tokens=False)


@pytest.mark.parametrize("template", [QWEN25, SMOLLM2, LLAMA2], ids=["qwen2.5", "smollm2", "llama2"])
@pytest.mark.parametrize("place", ["config", "named", "file"])
def test_a_prompt_is_what_the_models_own_template_makes_of_it(template, place, tmp_path):
    """In the configuration, among several there, or in a file of its own, which takes precedence."""
    ours = changed_tokenizer(
        tmp_path,
        NO_THINKING,
        chat_template=template,
        bos_token=ADDED | {"__type": "AddedToken", "content": "<|im_start|>"},
    )
    if place == "named":
        named = [{"name": "tools", "template": "no"}, {"name": "default", "template": template}]
        ours = changed_tokenizer(tmp_path, NO_THINKING, chat_template=named, bos_token="<|im_start|>")
    elif place == "file":
        (tmp_path / "chat_template.jinja").write_text(template)
        ours = changed_tokenizer(tmp_path, NO_THINKING, chat_template="no", bos_token="<|im_start|>")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for examples in ([], EXAMPLES):
        options = {"tokenize": False, "add_generation_prompt": True}
        expected = theirs.apply_chat_template(chat(USER, examples), **options)
        assert ours.decode(prompt_ids(ours, USER, False, examples)) == expected
        assert prompt_ids(ours, USER, False, examples) == theirs.encode(expected, add_special_tokens=False)
    assert ours.has_template
    assert not ours.knows_thinking


def test_smollm2s_own_files_give_its_prompts_and_stops():
    folder = smollm2_folder()
    ours, theirs = Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    options = {"tokenize": False, "add_generation_prompt": True}
    expected = theirs.apply_chat_template(chat(USER, EXAMPLES), **options)
    assert "named SmolLM" in expected
    assert prompt_ids(ours, USER, False, EXAMPLES) == theirs.encode(expected, add_special_tokens=False)
    assert (ours.stop_token_ids, ours.end_of_turn_id, ours.knows_thinking) == ((0, 2), 2, False)
    assert (len(ours.encode("<answer>")), len(ours.encode("</think>")), len(ours.encode("1234"))) == (3, 3, 4)


def test_without_think_in_the_vocabulary_thinking_is_refused(tmp_path):
    """The error says how to go on."""
    tokenizer = changed_tokenizer(tmp_path, NO_THINKING)
    assert "think" not in tokenizer.decode(prompt_ids(tokenizer, "U", thinking=False))
    with pytest.raises(ModelError, match="no <think>.* add --sampling.no-thinking .*--thinking False"):
        prompt_ids(tokenizer, "U", thinking=True)


@pytest.mark.parametrize("thinking", [True, False])
def test_a_template_that_opens_the_thinking_has_it_opened_once(thinking, tmp_path):
    """Without thinking it is closed at once."""
    template = "{{ messages[0].content + ':<think>\n' }}"
    tokenizer = changed_tokenizer(tmp_path, {}, chat_template=template)
    text = tokenizer.decode(prompt_ids(tokenizer, "U", thinking))
    assert text == ("U:<think>\n" if thinking else "U:<think>\n\n</think>\n\n")


def test_without_a_template_prompts_are_chatml_or_plain_text(tmp_path):
    """The tokenizer knows that it has none."""
    chatml = changed_tokenizer(tmp_path / "a", {}, chat_template=None)
    assert not chatml.has_template
    for thinking in (True, False):
        assert prompt_ids(chatml, USER, thinking, EXAMPLES) == prompt_ids(
            pair("tiny")[0], USER, thinking, EXAMPLES
        )
    renamed = NO_THINKING | {"<|im_start|>": "<|a|>", "<|im_end|>": "<|b|>"}
    plain = changed_tokenizer(tmp_path / "b", renamed, chat_template=None, eos_token="<|endoftext|>")
    assert not plain.has_template
    assert plain.decode(prompt_ids(plain, "Q", False, [("E", "A")])) == "E\n\nA\n\nQ\n\n"
    assert plain.stop_token_ids == (plain.end_of_turn_id,) == tuple(plain.encode("<|endoftext|>"))
    # A text of such a model begins with what its tokenizer puts there.
    path = tmp_path / "b" / "tokenizer.json"
    bos = {"<|a|>": {"id": "<|a|>", "ids": plain.encode("<|a|>"), "tokens": ["<|a|>"]}}
    single = [{"SpecialToken": {"id": "<|a|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": bos}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": processor}))
    assert Tokenizer(tmp_path / "b").decode(prompt_ids(Tokenizer(tmp_path / "b"), "Q", False)) == "<|a|>Q\n\n"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{{ raise_exception('roles must alternate') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[7].content.x }}",
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
    assert "template" in str(error.value) or str(tmp_path) in str(error.value)
    if template == "{{ raise_exception('roles must alternate') }}":
        assert "roles must alternate" in str(error.value)


def test_a_template_has_no_clock():
    date = "{{ strftime_now('%d') if strftime_now is defined else 'no date' }}"
    assert ChatTemplate(date, {}).render([]) == "no date"


@KINDS
def test_saving_keeps_the_published_files_byte_for_byte(kind, tmp_path):
    """Both ends stop a completion."""
    ours, _ = pair(kind)
    ours.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == qwen3_file(f"{kind}/{name}").read_bytes()
    shutil.copy(qwen3_file(f"configs/{kind}.generation_config.json"), tmp_path / "generation_config.json")
    assert set(ours.stop_token_ids) == set(Tokenizer(tmp_path).stop_token_ids) == {IM_END, END_OF_TEXT}
    assert ours.end_of_turn_id == IM_END


@pytest.mark.parametrize(("eos", "added"), [(None, set()), ("absent", set()), (5, {5}), ([5, 9], {5, 9})])
def test_stop_ids_add_those_of_the_generation_config(eos, added, tmp_path):
    copy_tokenizer(tmp_path)
    own = set(Tokenizer(tmp_path).stop_token_ids)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({} if eos == "absent" else {"eos_token_id": eos})
    )
    assert set(Tokenizer(tmp_path).stop_token_ids) == own | added


def refusal(folder) -> str:
    with pytest.raises(ModelError) as error:
        Tokenizer(folder)
    return str(error.value)


def test_stop_ids_without_generation_config_are_the_configs(tmp_path):
    copy_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert {5, 6} < set(Tokenizer(tmp_path).stop_token_ids)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert 7 in Tokenizer(tmp_path).stop_token_ids
    assert 5 not in Tokenizer(tmp_path).stop_token_ids


def test_the_end_of_a_turn_is_that_of_the_template(tmp_path):
    """Qwen2.5's base model has another end token, but its template ends turns with `<|im_end|>`."""
    own = changed_tokenizer(tmp_path / "a", {}, eos_token="<|endoftext|>")
    assert own.end_of_turn_id == own.encode("<|im_end|>")[0]
    other = changed_tokenizer(
        tmp_path / "b", {}, eos_token="<|endoftext|>", chat_template="{{ messages[0].content }}"
    )
    assert other.end_of_turn_id == other.encode("<|endoftext|>")[0]


def test_a_tokenizer_in_which_nothing_ends_is_refused(tmp_path):
    renamed = {"<|im_start|>": "<|a|>", "<|im_end|>": "<|b|>", "<|endoftext|>": "<|c|>"}
    with pytest.raises(ModelError, match=f"{tmp_path}: no token ends a completion"):
        changed_tokenizer(tmp_path, renamed, eos_token=None)


def test_the_verdict_does_not_depend_on_the_tokenization(tmp_path):
    """The bundled tokenizer joins digits and has a token for each tag; the other one has bytes for both."""
    numbers = {str(number): f"<{number}>" for number in range(10, 101)}
    apart = changed_tokenizer(tmp_path, numbers | {"<answer>": "<x>", "</answer>": "</x>"})
    joined = pair("tiny")[0]
    text = "79-60=19 19+17=36\n</think>\n<answer>79 - 60 + 17</answer>"
    assert len(joined.encode("<answer>")) == 1 < len(apart.encode("<answer>"))
    for tokenizer in (apart, joined):
        assert score(tokenizer.decode(tokenizer.encode(text)), Problem((79, 60, 17), 36)).outcome == "correct"


def test_an_added_token_takes_its_own_id_or_is_refused(tmp_path):
    def with_added(added):
        (copy_tokenizer(tmp_path) / "tokenizer_config.json").write_text(
            json.dumps({"added_tokens_decoder": added})
        )
        return tmp_path

    tokenizer = Tokenizer(with_added({str(TINY_TOKENS): ADDED}))
    assert (tokenizer.encode("a<new>")[1:], len(tokenizer)) == ([TINY_TOKENS], TINY_TOKENS + 1)
    assert "'<new>' should have id 900" in refusal(with_added({"900": ADDED}))
    for broken in ({str(TINY_TOKENS): {"lstrip": False}}, {"x": ADDED}, {str(TINY_TOKENS): "<new>"}, [ADDED]):
        assert str(tmp_path) in refusal(with_added(broken))
