"""The tokenizer against transformers on Qwen3's own files, and broken files."""

import functools
import json
import shutil
import unicodedata

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TINY, TINY_TOKENS, copy_tokenizer, qwen3_file

from model import ModelError, Tokenizer, prompt_ids, render_chat

KINDS = pytest.mark.parametrize("kind", ["instruct", "base"])
END_OF_TEXT, IM_END = 151643, 151645
TEXTS = [
    " ",
    "Using the numbers [79, 60, 17], make 36. 1234567890 12.5",
    "<think>\nso 79 - 60\n</think>\n<answer>(79 - 60) + 17 = 36</answer>",
    "naïve café e\u0301 ﬁ 中文 日本語 한국어 العربية 🙂👩‍👩‍👧 \u200b\ufeff\u00a0x",
    "tabs\t\tand \r\n lines\n\n\n  trailing   ",
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
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
    @given(st.lists(st.one_of(st.text(max_size=12), st.sampled_from(TEXTS + ["<think>", "</think>", "<|im_end|>"]))))
    def any_text(pieces):
        assert ours.encode("".join(pieces)) == theirs.encode("".join(pieces), add_special_tokens=False)

    any_text()


@KINDS
def test_thinking_and_chat_tokens_are_one_id_each_for_base_too_and_ids_without_a_text_decode_to_nothing(kind):
    ours, _ = pair(kind)
    texts = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    for text, token_id in zip(texts, (END_OF_TEXT, 151644, IM_END, 151667, 151668), strict=True):
        assert ours.encode(text) == [token_id] and ours.decode([token_id]) == text
    assert (len(ours), len(ours.encode("<answer>")), len(ours.encode("1234567890"))) == (151669, 3, 10)
    assert ours.decode(list(range(151669, 151936))) == ""
    assert ours.decode([16, 151700, 17, 151935]) == "12"


@KINDS
@pytest.mark.parametrize("system", [None, "", "Be brief.\n"])
@pytest.mark.parametrize("thinking", [None, True, False])
def test_chats_and_prompts_equal_the_official_template(kind, system, thinking):
    ours, theirs = pair(kind)
    user = "Make 36 from [79, 60, 17]. <b>1</b> & {x}\n"
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": user})
    options = {} if thinking is None else {"enable_thinking": thinking}
    options |= {"chat_template": pair("instruct")[1].chat_template, "tokenize": False, "add_generation_prompt": True}
    expected = theirs.apply_chat_template(messages, **options)
    assert render_chat(user, system=system, thinking=thinking) == expected
    assert ours.encode(expected) == theirs.encode(expected, add_special_tokens=False)
    if system is None and thinking is not None:  # a prompt opens the thinking itself, or leaves it closed
        prompt = theirs.encode(expected + "<think>\n" * thinking, add_special_tokens=False)
        assert prompt_ids(ours, user, thinking) == prompt


@KINDS
def test_saving_keeps_the_published_files_byte_for_byte_and_both_ends_stop_a_completion(kind, tmp_path):
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
    (tmp_path / "generation_config.json").write_text(json.dumps({} if eos == "absent" else {"eos_token_id": eos}))
    assert set(Tokenizer(tmp_path).stop_token_ids) == own | added


def refusal(folder) -> str:
    with pytest.raises(ModelError) as error:
        Tokenizer(folder)
    return str(error.value)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>"])
def test_a_missing_token_is_named(token, tmp_path):
    path = copy_tokenizer(tmp_path) / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace(token, "<|other|>"), encoding="utf-8")
    assert refusal(tmp_path) == f"{tmp_path}: no {token}, so this is not a Qwen3 chat tokenizer"


def test_an_added_token_takes_its_own_id_or_is_refused(tmp_path):
    def with_added(added):
        (copy_tokenizer(tmp_path) / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
        return tmp_path

    tokenizer = Tokenizer(with_added({str(TINY_TOKENS): ADDED}))
    assert (tokenizer.encode("a<new>")[1:], len(tokenizer)) == ([TINY_TOKENS], TINY_TOKENS + 1)
    assert "'<new>' should have id 900" in refusal(with_added({"900": ADDED}))
    for broken in ({str(TINY_TOKENS): {"content": "<new>"}}, {"x": ADDED}, {str(TINY_TOKENS): "<new>"}, [ADDED]):
        assert str(tmp_path) in refusal(with_added(broken))
