"""Load and save models: folders in Hugging Face's layout, the hub, and the models bundled here."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model.config import ModelError, Qwen3Config, read_text, refuse_pointer
from model.quantize import plain_state
from model.qwen3 import Qwen3
from model.tokenizer import FILES as TOKENIZER_FILES
from model.tokenizer import Tokenizer

TINY = Path(__file__).parent / "tiny"
BUNDLED = {name: TINY.with_name(name) for name in ("tiny", "tiny-256", "tiny-calculus")}
# Of a run of this project: what the model was trained on and how
NOTES = ("recipe.json", "trainer_state.json", "adapters.safetensors")
WEIGHTS = ("model.safetensors", "model-*.safetensors")
DOWNLOADED = ["config.json", "adapter_config.json", *TOKENIZER_FILES, *WEIGHTS, *NOTES]  # no pickle
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class ModelFolder:
    """The folder of a model, opened by `open_model`."""

    path: Path
    config: Qwen3Config
    dtype: torch.dtype | None  # that config.json names
    tokenizer: Tokenizer
    weight_files: list[Path]


def open_model(source: str | Path, revision: str | None = None) -> ModelFolder:
    """Check all of a model but its weights. Arguments and ModelError are those of `load_model`."""
    path = resolve_source(source, revision)
    hf_config = read_json(path / "config.json")
    try:
        config = Qwen3Config.from_hf(hf_config)
    except ModelError as error:
        raise ModelError(f"{path / 'config.json'}: {error}") from error
    tokenizer = Tokenizer(path)
    if len(tokenizer) > config.vocab_size:
        raise ModelError(f"{path}: {len(tokenizer)} tokens but only {config.vocab_size} embedding rows")
    named = hf_config.get("dtype") or hf_config.get("torch_dtype")
    dtype = DTYPES.get(str(named).removeprefix("torch."))
    if named and dtype is None:
        wrong = f"dtype {named!r} is not one of {', '.join(DTYPES)}"
        raise ModelError(f"{path / 'config.json'}: {wrong}")
    return ModelFolder(path, config, dtype, tokenizer, weight_files(path))


def load_weights(folder: ModelFolder, device="cpu", dtype: torch.dtype | None = None) -> Qwen3:
    """The model in `folder`, as in `load_model`."""
    with torch.device("meta"):  # no memory is taken before the weights come
        model = Qwen3(folder.config)
    state = read_state(folder, model, device, dtype or folder.dtype)
    model.load_state_dict(state, assign=True, strict=False)  # read_state has checked every name and shape
    if folder.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.num_tokens = len(folder.tokenizer)
    return model


def load_model(
    source: str | Path, device="cpu", dtype: torch.dtype | None = None, revision: str | None = None
) -> tuple[Qwen3, Tokenizer]:
    """Load a model and its tokenizer. ModelError: not a complete checkpoint of a known family.

    Args:
        source: a bundled model, such as "tiny", a folder in Hugging Face's layout, or a hub id.
        dtype: of the weights; None keeps the dtype that `config.json` names, or else that of the embedding.
        revision: branch, tag or commit of a hub id.
    """
    folder = open_model(source, revision)
    return load_weights(folder, device, dtype), folder.tokenizer


def save_model(folder: str | Path, model: Qwen3, tokenizer: Tokenizer) -> None:
    """Write a folder that transformers and vLLM load, with adapters merged, all in the model's dtype."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in plain_state(model).items()}
    if model.config.tie_word_embeddings:
        del state[HEAD]
    dtype = str(model.dtype).removeprefix("torch.")
    config = model.config.to_hf(dtype, eos_token_id=tokenizer.end_of_turn_id)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(folder)
    generation = json.loads(tokenizer.files.get("generation_config.json", "{}"))
    generation["eos_token_id"] = list(tokenizer.stop_token_ids)  # other tools then stop where training did
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def is_bundled(source: str | Path) -> bool:
    """Whether `source` names a model that is part of this repository, by its name or its folder."""
    return local_folder(source).resolve() in [folder.resolve() for folder in BUNDLED.values()]


def local_folder(source: str | Path) -> Path:
    return BUNDLED.get(str(source), Path(os.path.expanduser(source)))


def resolve_source(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of `source`, downloaded from the hub if it is neither bundled nor a folder here.

    ModelError: there is none, or it holds a run or adapters, not a model.
    """
    folder = local_folder(source)
    if not folder.is_dir():
        folder = download(str(source), revision)
    if any(folder.glob("model*.safetensors*")):
        return folder
    steps = sorted([*folder.glob("step_*[0-9]"), *folder.glob("checkpoints/step_*[0-9]")])
    if steps:
        raise ModelError(f"{folder} holds checkpoints: name one of them, such as {steps[-1]}")
    if any(folder.glob("adapter*")):
        advice = "merge them into their base (in PEFT by merge_and_unload), save that, and name its folder"
        raise ModelError(f"{folder} holds adapters, not a model: {advice}")
    return folder


def download(source: str, revision: str | None) -> Path:
    """The local folder of a hub id, from the cache if it is there already."""
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        known = f"a hub id looks like Qwen/Qwen3-1.7B; bundled are {', '.join(BUNDLED)}"
        raise ModelError(f"no such model folder: {source} ({known})")
    try:
        folder = huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=DOWNLOADED)
    except Exception as error:  # a dozen kinds: no network, no such repository, gated, disk full
        named = f"{source} at revision {revision}" if revision else source
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        advice = "without a network, name a folder that is there, or --model tiny"
        failed = f"{named} is no folder here, and could not be downloaded from the hub"
        raise ModelError(f"{failed}: {reason} ({advice})") from error
    return Path(folder)


def read_state(folder: ModelFolder, model: Qwen3, device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """All of `model`'s weights from `folder`, single or sharded, with exactly the right names and shapes.

    A tied checkpoint may store a copy of the output head (Qwen3-1.7B does, its Base does not), if it equals
    the embedding. Anything else missing, unexpected, repeated or misshapen is refused. They all get `dtype`,
    or that of the embedding.
    """
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = model.config.tie_word_embeddings
    state: dict[str, Tensor] = {}
    for path in folder.weight_files:
        try:
            with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():
                    if name.endswith("rotary_emb.inv_freq"):
                        continue  # old checkpoints of Llama hold what follows from config.json
                    if name not in expected:
                        raise ModelError(f"{path}: unexpected weight {name}")
                    if name in state:
                        raise ModelError(
                            f"{path}: {name} is in another file too; remove files of earlier saves"
                        )
                    shape = file.get_slice(name).get_shape()  # before any memory is taken
                    if shape != expected[name]:
                        raise ModelError(f"{path}: {name} is {shape}, config.json says {expected[name]}")
                    tensor = file.get_tensor(name)
                    if tensor.dtype not in DTYPES.values():
                        known = f"only {', '.join(DTYPES)}; take unquantized weights"
                        raise ModelError(f"{path}: {name} is in {tensor.dtype}: {known}")
                    state[name] = tensor if dtype is None else tensor.to(dtype)
                    if not torch.isfinite(torch.stack(state[name].aminmax())).all():
                        raise ModelError(f"{path}: {name} holds values that are not finite (NaN or infinity)")
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{path}: cannot be read ({error}); is the file complete?") from error
    missing = [name for name in expected if name not in state and not (tied and name == HEAD)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{folder.path}: weight {missing[0]}{more} missing")
    if dtype is None:
        dtype = state[EMBEDDING].dtype
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    if tied and HEAD in state and not torch.equal(state.pop(HEAD), state[EMBEDDING]):
        raise ModelError(f"{folder.path}: {HEAD} differs from {EMBEDDING}, though config.json ties them")
    return state


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or shards. ModelError: there is none."""
    single = folder / WEIGHTS[0]
    shards = sorted(folder.glob(WEIGHTS[1]))
    files = shards if shards and not single.is_file() else [single]
    for path in files:
        if not path.is_file():
            raise ModelError(f"{folder}: no {path.name}")
        refuse_pointer(path)
    return files


def content_digest(files: list[Path]) -> str:
    """The SHA-256 of all weights in safetensors files, however they are divided among these."""
    digests = {}
    for path in files:
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():
                content = file.get_tensor(name).flatten().view(torch.uint8)  # mapped, not read
                digests[name] = hashlib.sha256(content.numpy()).hexdigest()
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict:
    """Parse a JSON object, with an error that names the file."""
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError:
        raise ModelError(f"{path.parent}: no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, not {type(content).__name__}")
    return content
