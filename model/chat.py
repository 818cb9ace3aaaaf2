"""From a chat to the text of a prompt, by the template that a model was trained with.

A chat template is a small Jinja program that comes with the tokenizer. It comes from outside, so it runs in
the same sandbox as in transformers: it cannot reach internal attributes or change its inputs.
"""

import jinja2
import jinja2.ext
import jinja2.sandbox

from model.config import ModelError

# For tokenizers without a template: ChatML if they know its tokens, as Qwen3's does, else plain text.
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
PLAIN = "{% for message in messages %}{{ message.content }}\n\n{% endfor %}"

Message = dict[str, str]  # "role": "user" or "assistant"; "content": the text


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, by which trainers mark an assistant's text; here it changes nothing."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str):
    """Templates call this by the name `raise_exception`."""
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """A compiled chat template. `names` are what it may refer to, such as `bos_token`.

    It has no clock, unlike in transformers: a prompt must not change from one day to the next. Templates that
    write the date then write their default.
    """

    def __init__(self, source: str, names: dict[str, str]):
        sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationTag]
        )
        sandbox.globals["raise_exception"] = refuse
        self.source = source
        self.names = names
        self.template = sandbox.from_string(source)

    def render(self, messages: list[Message], **options) -> str:
        """A chat as text, up to where the assistant's next answer begins. ModelError: the template fails."""
        try:
            text = self.template.render(
                messages=messages, tools=None, add_generation_prompt=True, **self.names, **options
            )
            text.encode()  # half a surrogate pair cannot be tokenized
            return text
        except Exception as error:  # whatever a program from outside may do
            raise ModelError(f"the model's chat template fails: {error or type(error).__name__}") from error
