"""Text to ids and back, and prompts, from a checkpoint's own tokenizer files."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from model.chat import CHATML, PLAIN, ChatTemplate
from model.config import ModelError, read_text

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


class Tokenizer:
    """A tokenizer, read from `tokenizer.json`, `tokenizer_config.json` and what lies beside them in `folder`.

    Attributes:
        stop_token_ids: each ends a completion: those of `generation_config.json`, the tokenizer's end token,
            and the two of ChatML, `<|im_end|>` and `<|endoftext|>`, if it knows them.
        end_of_turn_id: the one that ends an assistant's turn in its chat template.
        knows_thinking: whether `<think>` is a token. If not, prompts have no thinking block.
        has_template: whether it comes with a chat template.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        try:
            self.files = {name: read_text(folder / name) for name in FILES if (folder / name).is_file()}
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}: unreadable tokenizer files: {error}") from error
        for name in FILES[:2]:
            if name not in self.files:
                raise ModelError(f"{folder}: no {name}")
        try:
            config = json.loads(self.files["tokenizer_config.json"])
            self.backend = tokenizers.Tokenizer.from_str(self.files["tokenizer.json"])
            self.backend.no_truncation()  # transformers saves both there, and does not heed them either
            self.backend.no_padding()
            # Tokens that stand only in the configuration, such as <think> in Qwen3-Base.
            self._add_missing_tokens(config.get("added_tokens_decoder", {}))
            special = {}
            for name, value in config.items():
                text = value.get("content") if isinstance(value, dict) else value
                if name.endswith("_token") and isinstance(text, str):
                    special[name] = text
            source = self._template_source(config.get("chat_template"))
            self.has_template = source is not None
            if source is None:
                source = CHATML if self._knows("<|im_start|>") else PLAIN
            self.template = ChatTemplate(source, special)
            stops = self._stops_of_generation(folder)
            eos = special.get("eos_token")
            ends = [token for token in ("<|im_end|>", "<|endoftext|>", eos) if token and self._knows(token)]
        except Exception as error:  # the backend raises bare Exception for a malformed file
            raise ModelError(f"{folder}: unreadable tokenizer files: {error}") from error
        stops.update(map(self.backend.token_to_id, ends))
        if not stops:
            raise ModelError(f"{folder}: no token ends a completion; name one as eos_token in {FILES[1]}")
        self.stop_token_ids = tuple(sorted(stops))
        end_of_turn = "<|im_end|>" if "<|im_end|>" in source else eos
        self.end_of_turn_id = self.backend.token_to_id(end_of_turn) if end_of_turn in ends else min(stops)
        self.knows_thinking = self._knows("<think>") and self._knows("</think>")

    def _knows(self, token: str) -> bool:
        return self.backend.token_to_id(token) is not None

    def _template_source(self, configured) -> str | None:
        """The template of `chat_template.jinja`, or of the configuration, which may name several."""
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"]
        if isinstance(configured, list):
            configured = {entry["name"]: entry["template"] for entry in configured}["default"]
        return configured

    def _stops_of_generation(self, folder: Path) -> set[int]:
        """The end tokens of `generation_config.json`, or where there is none, of `config.json`."""
        text = self.files.get("generation_config.json")
        if text is None and (folder / "config.json").is_file():
            text = read_text(folder / "config.json")
        stops = json.loads(text or "{}").get("eos_token_id")
        stops = set(stops if isinstance(stops, list) else [] if stops is None else [stops])
        if not all(type(stop) is int and 0 <= stop < len(self) for stop in stops):
            raise ValueError(f"eos_token_id {stops} in generation_config.json are no token ids")
        return stops

    def _add_missing_tokens(self, added: dict) -> None:
        for token_id in sorted(added, key=int):
            fields = added[token_id]
            text = fields["content"]
            if not self._knows(text):
                self.backend.add_tokens([tokenizers.AddedToken(**fields)])
            if self.backend.token_to_id(text) != int(token_id):
                raise ValueError(f"token {text!r} should have id {token_id}")

    def __len__(self) -> int:
        """Size of the vocabulary; embedding rows beyond it are padding."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, and no others; chat tokens in it, such as `<|im_end|>`, become single ids."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_answer(self, text: str) -> list[int]:
        """Ids of an assistant's turn with the token that ends it, which `text` may have at its end or not."""
        texts = filter(None, (self.decode([token]) for token in self.stop_token_ids))
        ends = "|".join(map(re.escape, texts))
        return [*self.encode(re.sub(rf"(?:(?:{ends})\s*)+\Z", "", text)), self.end_of_turn_id]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a whole prompt. Plain text gets what the tokenizer begins texts with, such as `<s>`."""
        return self.backend.encode(text, add_special_tokens=self.template.source == PLAIN).ids

    def decode(self, token_ids: list[int]) -> str:
        """Text of `token_ids`, chat tokens included; an id without a text gives nothing."""
        return self.backend.decode(token_ids, skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content.encode())


def prompt_ids(
    tokenizer: Tokenizer, user: str, thinking: bool, examples: Sequence[tuple[str, str]] = ()
) -> list[int]:
    """Ids of a prompt: the user's text in the model's own chat format, up to where the answer begins.

    With `thinking` it ends in an open `<think>`; without, one that the template opens is closed.

    Args:
        examples: (user's text, answer) of earlier turns of the chat.

    Raises:
        ModelError: thinking is asked for and the tokenizer has no `<think>`, or the chat template fails.
    """
    messages = []
    for question, answer in examples:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": user})
    if not tokenizer.knows_thinking:
        if thinking:
            raise ModelError(
                "this model's tokenizer has no <think>, so its prompts cannot open a thinking block: "
                "add --sampling.no-thinking (in eval.py --thinking False)"
            )
        return tokenizer.encode_prompt(tokenizer.template.render(messages))
    text = tokenizer.template.render(messages, enable_thinking=thinking)
    is_open = text.rstrip().endswith("<think>")  # by the template itself, as in models that always think
    if thinking and not is_open:
        text += "<think>\n"
    if is_open and not thinking:
        text = text.rstrip() + "\n\n</think>\n\n"
    return tokenizer.encode_prompt(text)
