"""The Hugging Face hub: a repository's files on this machine, or one sentence that says why not."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rrm_engine.errors import RrmError

TIMEOUT_S = 10.0  # for the hub's first answer


def download(repository: str, patterns: Sequence[str], kind: str = "model") -> Path:
    """The folder of a repository's newest files whose names match ``patterns``.

    ``kind`` is ``model``, of which only what lies at the top is taken, or ``dataset``. Without the hub what an earlier
    download left on this machine will do.
    Raises RrmError, whose message begins with a verb: the caller says what was wanted.
    """
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()  # what it would say is in our sentence
    if not sys.stderr.isatty():
        disable_progress_bars()
    wanted: Any = {
        "repo_type": kind,
        "allow_patterns": list(patterns),
        "ignore_patterns": ["*/*"] if kind == "model" else None,
    }
    # The client raises its own errors, those of its HTTP library and the system's: all of them mean "not there".
    try:
        revision = huggingface_hub.HfApi().repo_info(repository, repo_type=kind, timeout=TIMEOUT_S).sha
    except Exception as unreachable:
        try:
            return Path(huggingface_hub.snapshot_download(repository, local_files_only=True, **wanted))
        except Exception:
            raise RrmError(_reason(repository, unreachable)) from unreachable
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, **wanted))
    except Exception as error:
        raise RrmError(_reason(repository, error)) from error


def _reason(repository: str, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    page = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, HFValidationError):
        return "is no hub id either: those are written owner/name, in letters, digits, '-', '_' and '.'"
    if isinstance(error, GatedRepoError):
        return f"is gated: accept its terms at {page}, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"is not on the hub, or private: look for it at {page}; private ones need `hf auth login`"
    if isinstance(error, HfHubHTTPError):
        return f"cannot be downloaded: the hub answers {error.response.status_code}; try again later"
    if constants.HF_HUB_OFFLINE:
        return "is not on this machine, and HF_HUB_OFFLINE keeps it from being downloaded"
    if isinstance(error, OSError) and error.strerror:  # a full disk, a cache that cannot be written
        return f"cannot be downloaded to {constants.HF_HUB_CACHE}: {error.strerror}"
    return f"is not on this machine, and the hub cannot be reached ({type(error).__name__})"
