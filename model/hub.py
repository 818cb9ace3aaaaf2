"""Models from the hub: weights and JSON only, at one revision, and checked against what the hub says of each file."""

import hashlib
from pathlib import Path

from model.config import ModelError

PATTERNS = ["*.safetensors", "*.json"]  # never a pickle


def download(repository: str, revision: str | None = None) -> Path:
    """The local folder of a hub id, from the cache where it is already there.

    Raises:
        ModelError: it cannot be downloaded, or a file is not what the hub says it is.
    """
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=PATTERNS))
    except Exception as error:  # a dozen kinds: no network, no such repository, gated, no such revision, disk full
        reason = str(error).strip().split("\n")[0]
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"{repository}{at} is not a folder here and could not be downloaded from the hub: {reason} "
            "(without a network, use a local folder or --model tiny)"
        ) from error
    try:
        # The cache names a snapshot's folder after its commit: what was downloaded, though a branch may have moved on.
        info = huggingface_hub.HfApi().model_info(repository, revision=folder.name, files_metadata=True, timeout=10)
    except Exception:  # no network, say: the files were checked when they came, and they are the only ones there are
        return folder
    for file in info.siblings or []:
        path = folder / file.rfilename
        if path.is_file() and not is_file_of_hub(path, file):
            raise ModelError(f"{path} is not what the hub has as {file.rfilename}: delete the file, and download it again")
    return folder


def is_file_of_hub(path: Path, file) -> bool:
    """Whether size and hash are those of `file`, an entry of the hub's list; what it does not tell is not asked."""
    if file.size is not None and path.stat().st_size != file.size:
        return False
    if file.lfs is not None:
        with open(path, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == file.lfs.sha256
    if file.blob_id is not None:  # git's own hash
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.blob_id
    return True
