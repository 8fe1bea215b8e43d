"""The Hugging Face hub: downloading an adapter from a repository, and uploading one to it."""

import re
from pathlib import Path

from .version import __version__

DOWNLOADED = ["*.safetensors", "*.json"]
"""All that is read of a repository: no code, nothing pickled."""
UPLOADED = ["adapter.safetensors", "adapter.json", "README.md", "training.json"]
"""All that is sent to one, whatever else lies in the folder."""
_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_repo_id(text: str) -> bool:
    """Whether a text is ``owner/name``."""
    return _ID.fullmatch(text) is not None


def download(source: str, revision: str | None = None) -> Path:
    """The folder of a repository, downloaded now or earlier.

    Args:
        source: ``owner/name``.
        revision: branch, tag or commit. Default: the main branch.

    Raises:
        FileNotFoundError: if this is no such id, or the repository or revision cannot be reached.
    """
    if not is_repo_id(source):
        raise _missing(source)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise _missing(source, " (downloading needs huggingface_hub)") from None
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=DOWNLOADED, ignore_patterns=["*/*"]))
    except Exception as error:  # a network fails in many ways, and its errors share no base class
        at = "" if revision is None else f" at revision={revision!r}"
        raise _missing(source, f"{at} ({_short(error)})") from error


def _missing(source: str, why: str = "") -> FileNotFoundError:
    return FileNotFoundError(f"{source}: no such file or folder, and not a hub repository that can be reached{why}.")


def check_upload(repo_id: str, token: str | None = None) -> None:
    """Raise if nothing can be uploaded, before any work is done for it.

    Raises:
        ImportError: without huggingface_hub.
        ValueError: if this is no repository id, or there is no token.
    """
    if not is_repo_id(repo_id):
        raise ValueError(f"repo_id={repo_id!r}: expected 'owner/name', with your user name or organisation as owner.")
    try:
        from huggingface_hub import get_token
    except ImportError as error:
        raise ImportError(
            "push_adapter needs huggingface_hub, which comes with transformers: pip install transformers."
        ) from error
    if not (token or get_token()):
        raise ValueError(
            "no token of the Hugging Face hub: run `hf auth login`, set HF_TOKEN, or pass token=, with write access."
        )


def upload(
    folder: Path,
    repo_id: str,
    message: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Send the files of an adapter to a repository in one commit; both are made if they are not there.

    Args:
        folder: holds the files.
        repo_id: ``owner/name``.
        message: of the commit.
        private: of a repository that is made now. Default: as your account has it.
        revision: the branch to commit to. Default: the main branch.
        token: with write access. Default: the one that you are logged in with.

    Returns:
        The address of the commit.

    Raises:
        RuntimeError: if the hub cannot be reached or refuses it.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="ahn_layers", library_version=__version__)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            allow_patterns=UPLOADED,
        )
    except Exception as error:
        raise RuntimeError(
            f"{repo_id}: the hub did not take the adapter ({_short(error)}). Check the name, the token's write access "
            "and the network."
        ) from error
    return str(commit.commit_url)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'…' if len(text) > 300 else ''}"
