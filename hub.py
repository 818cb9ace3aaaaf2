"""Files from the hub, for models and problems alike: at one revision, and checked against what the hub says of each."""

import hashlib
from pathlib import Path


class HubError(ValueError):
    """A repository that cannot be downloaded, or a file that is not what the hub says it is."""


def download(
    repository: str, patterns: list[str], otherwise: str, repo_type: str = "model", revision: str | None = None
) -> Path:
    """The local folder of a repository, from the cache where it is already there.

    Args:
        patterns: the files that are wanted; the folder may hold others.
        otherwise: what to do without a network, for the error.
        repo_type: "model" or "dataset".
        revision: branch, tag or commit; None is the main branch.

    Raises:
        HubError: see there.
    """
    import huggingface_hub

    at = {"repo_type": repo_type, "revision": revision}
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns, **at))
    except Exception as error:  # a dozen kinds: no network, no such repository, gated, no such revision, disk full
        named = f"{repository} at revision {revision}" if revision else repository
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise HubError(f"{named} could not be downloaded from the hub: {reason} (without a network, {otherwise})") from error
    try:
        # The cache names a snapshot's folder after its commit: what was downloaded, though a branch may have moved on.
        at["revision"] = folder.name
        info = huggingface_hub.HfApi().repo_info(repository, files_metadata=True, timeout=10, **at)
    except Exception:  # no network, say: the files were checked when they came, and they are the only ones there are
        return folder
    for file in info.siblings or []:
        path = folder / file.rfilename
        if path.is_file() and not is_file_of_hub(path, file):
            raise HubError(f"{path} is not what the hub has as {file.rfilename}: delete the file, and download it again")
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
