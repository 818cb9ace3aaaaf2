"""Load and save models: folders in Hugging Face's layout, the hub, and the models embedded here."""

import json
from pathlib import Path

import huggingface_hub
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model.config import ModelError, Qwen3Config
from model.quantize import plain_state
from model.qwen3 import Qwen3
from model.tokenizer import FILES as TOKENIZER_FILES
from model.tokenizer import Tokenizer

TINY = Path(__file__).parent / "tiny"
EMBEDDED = {name: TINY.with_name(name) for name in ("tiny", "tiny-256", "tiny-calculus")}
INDEX = "model.safetensors.index.json"
NOTES = ("recipe.json", "trainer_state.json")  # of a run of this project: what the model was trained on
WEIGHTS = ("model.safetensors", "model-*.safetensors")
DOWNLOADED = ["config.json", *TOKENIZER_FILES, INDEX, *WEIGHTS, *NOTES]  # no pickle
DTYPES = ("float32", "bfloat16", "float16", "float64")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_model(
    source: str | Path, device="cpu", dtype: torch.dtype | None = None, revision: str | None = None
) -> tuple[Qwen3, Tokenizer]:
    """Load a model and its tokenizer. ModelError: not a complete and consistent Qwen3 checkpoint.

    Args:
        source: an embedded model ("tiny" or "tiny-calculus"), a folder in Hugging Face's layout, or a hub id.
        dtype: of the weights; None keeps the dtype that `config.json` names.
        revision: branch, tag or commit of a hub id.
    """
    folder = resolve_source(source, revision)
    hf_config = read_json(folder / "config.json")
    stored = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    try:
        config = Qwen3Config.from_hf(hf_config)
        if dtype is None and stored not in DTYPES:
            raise ModelError(f"dtype {stored!r} is not one of {', '.join(DTYPES)}")
    except ModelError as error:
        raise ModelError(f"{folder / 'config.json'}: {error}") from error
    tokenizer = Tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise ModelError(f"{folder}: {len(tokenizer)} tokens but only {config.vocab_size} embedding rows")
    with torch.device("meta"):  # no memory is taken before the weights come
        model = Qwen3(config)
    state = read_state(folder, model, device, dtype or getattr(torch, stored))
    model.load_state_dict(state, assign=True, strict=False)  # read_state has checked every name and shape
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.num_tokens = len(tokenizer)
    return model, tokenizer


def save_model(folder: str | Path, model: Qwen3, tokenizer: Tokenizer) -> None:
    """Write a folder that transformers and vLLM load, with adapters merged, all in the model's dtype."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in plain_state(model, device="cpu").items()}
    if model.config.tie_word_embeddings:
        del state[HEAD]
    dtype = str(model.dtype).removeprefix("torch.")
    config = model.config.to_hf(dtype, eos_token_id=tokenizer.end_of_turn_id)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(folder)
    generation = json.loads(tokenizer.files.get("generation_config.json", b"{}"))
    generation["eos_token_id"] = list(tokenizer.stop_token_ids)  # other tools then stop where training did
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def is_embedded(source: str | Path) -> bool:
    """Whether `source` names a model that is part of this repository."""
    return str(source) in EMBEDDED


def resolve_source(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of `source`, downloaded from the hub if it is neither embedded nor a folder here."""
    folder = EMBEDDED.get(str(source), Path(source).expanduser())
    if folder.is_dir():
        return folder
    parts = str(source).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        known = f"a hub id looks like Qwen/Qwen3-1.7B; embedded are {', '.join(EMBEDDED)}"
        raise ModelError(f"no such model folder: {source} ({known})")
    try:
        options = {"allow_patterns": DOWNLOADED, "revision": revision}
        return Path(huggingface_hub.snapshot_download(str(source), **options))
    except Exception as error:  # a dozen kinds: no network, no such repository, gated, disk full
        named = f"{source} at revision {revision}" if revision else source
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        advice = "without a network, name a folder that is there, or --model tiny"
        raise ModelError(f"{named} could not be downloaded from the hub: {reason} ({advice})") from error


def read_state(folder: Path, model: Qwen3, device, dtype: torch.dtype) -> dict[str, Tensor]:
    """All of `model`'s weights from `folder`, single or sharded, with exactly the right names and shapes.

    A tied checkpoint may store a copy of the output head (Qwen3-1.7B does, its Base does not), if it equals
    the embedding. Anything else missing, unexpected or misshapen is refused.
    """
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = model.config.tie_word_embeddings
    state: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():
                    if name.endswith("rotary_emb.inv_freq"):
                        continue  # old checkpoints of Llama hold what follows from config.json
                    if name not in expected:
                        raise ModelError(f"{path}: unexpected weight {name}")
                    shape = file.get_slice(name).get_shape()  # before any memory is taken
                    if shape != expected[name]:
                        raise ModelError(f"{path}: {name} is {shape}, config.json says {expected[name]}")
                    state[name] = file.get_tensor(name).to(dtype)
                    if not torch.isfinite(torch.stack(state[name].aminmax())).all():
                        raise ModelError(f"{path}: {name} holds values that are not finite (NaN or infinity)")
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{path}: cannot be read ({error}); is the file complete?") from error
    missing = [name for name in expected if name not in state and not (tied and name == HEAD)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{folder}: weight {missing[0]}{more} missing")
    if tied and HEAD in state and not torch.equal(state.pop(HEAD), state[EMBEDDING]):
        raise ModelError(f"{folder}: {HEAD} differs from {EMBEDDING}, though config.json ties them")
    return state


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: `model.safetensors`, or else those that the index names."""
    index = folder / INDEX
    names = ["model.safetensors"]  # beside which an index is left over from an earlier save
    if index.is_file() and not (folder / names[0]).is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index}: no weight_map")
        names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index}: {name!r} is not a file name")
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: no {name}")
    return [folder / name for name in names]


def read_json(path: Path) -> dict:
    """Parse a JSON object, with an error that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent}: no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, not {type(content).__name__}")
    return content
