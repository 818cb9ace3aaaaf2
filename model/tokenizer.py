"""Text to ids and back, and the chat format, from a checkpoint's own tokenizer files."""

import json
from pathlib import Path

import tokenizers

from model.config import ModelError

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


class Tokenizer:
    """A Qwen3 tokenizer, read from `tokenizer.json` and `tokenizer_config.json` in `folder`.

    Tokens that are only in the latter are added, such as `<think>` in Qwen3-Base. `stop_token_ids` end a
    completion: those of `generation_config.json`, `<|endoftext|>`, and `<|im_end|>` (`end_of_turn_id`).
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        for name in FILES[:2]:
            if name not in self.files:
                raise ModelError(f"{folder}: no {name}")
        try:
            config = json.loads(self.files["tokenizer_config.json"])
            generation = json.loads(self.files.get("generation_config.json", b"{}"))
            self.backend = tokenizers.Tokenizer.from_buffer(self.files["tokenizer.json"])
            self.backend.no_truncation()  # transformers saves both there, and does not heed them either
            self.backend.no_padding()
            self._add_missing_tokens(config.get("added_tokens_decoder", {}))
            stops = generation.get("eos_token_id")
            stops = set(stops if isinstance(stops, list) else [] if stops is None else [stops])
            if not all(type(stop) is int and 0 <= stop < len(self) for stop in stops):
                raise ValueError(f"eos_token_id {stops} in generation_config.json are no token ids")
        except Exception as error:  # the backend raises bare Exception for a malformed file
            raise ModelError(f"{folder}: unreadable tokenizer files: {error}") from error
        ends = {token: self.backend.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")}
        for token, token_id in ends.items():
            if token_id is None:
                raise ModelError(f"{folder}: no {token}, so this is not a Qwen3 chat tokenizer")
        self.stop_token_ids = tuple(sorted(stops.union(ends.values())))
        self.end_of_turn_id = ends["<|im_end|>"]

    def _add_missing_tokens(self, added: dict) -> None:
        for token_id, fields in sorted(added.items(), key=lambda item: int(item[0])):
            if self.backend.token_to_id(fields["content"]) is None:
                flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
                token = tokenizers.AddedToken(fields["content"], **{flag: fields[flag] for flag in flags})
                self.backend.add_tokens([token])
            if self.backend.token_to_id(fields["content"]) != int(token_id):
                raise ValueError(f"token {fields['content']!r} should have id {token_id}")

    def __len__(self) -> int:
        """Size of the vocabulary; embedding rows beyond it are padding."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; chat tokens in it, such as `<|im_end|>`, become single ids."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: list[int]) -> str:
        """Text of `token_ids`, chat tokens included; an id without a text gives nothing."""
        return self.backend.decode(list(token_ids), skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


def render_chat(user: str, system: str | None = None, thinking: bool | None = None) -> str:
    """One user turn in Qwen3's chat format, ready for the assistant's answer, as the official template gives.

    None and True leave it to the model to open `<think>`; False adds an empty, closed one.
    """
    text = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    text += f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    return text + ("<think>\n\n</think>\n\n" if thinking is False else "")


def prompt_ids(tokenizer: Tokenizer, user: str, thinking: bool) -> list[int]:
    """Ids of a prompt. It ends in an open `<think>` with `thinking`, else in an empty, closed one."""
    text = render_chat(user, thinking=thinking)
    return tokenizer.encode(text + "<think>\n" if thinking else text)
