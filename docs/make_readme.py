"""The parts of README.md that are taken from the code: `python -m docs.make_readme` writes them again.

Each stands between `<!-- name -->` and `<!-- end -->`.
"""

import inspect
import re
from pathlib import Path

from rl.grpo import grpo_step

README = Path(__file__).parent.parent / "README.md"
READING = {  # what to read first, and why
    "rl/grpo.py": "the step above and `grpo_update`",
    "rl/batch.py": "shifting and masking",
    "rl/loss.py": "the clipped loss",
    "rl/advantage.py": "comparing with the group",
    "rl/rollout.py": "problems to completions with rewards",
    "model/qwen3.py": "the decoder",
    "model/sampler.py": "`sample_completion`; `generate` is the same, batched",
    "data/countdown.py": "problems, prompt, verdict",
}


def reading_list() -> str:
    rows = []
    for path, what in READING.items():
        lines = (README.parent / path).read_text().count("\n")
        rows.append(f"- [{path}]({path}), {lines} lines: {what}")
    return "\n".join(rows)


PARTS = {"grpo_step": lambda: f"```python\n{inspect.getsource(grpo_step)}```", "reading": reading_list}


def filled(text: str) -> str:
    """README's `text` with each part as the code has it now."""
    for name, part in PARTS.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda m, part=part: f"{m[1]}{part()}\n{m[2]}", text, flags=re.DOTALL)
        assert count == 1, f"README.md has no place for {name}"
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
