"""Checks of a base model's directory: whether it is safe to load, and its digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from moorline.errors import MoorlineError

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class ModelInvalid(MoorlineError):
    """A model directory is missing, incomplete, or holds pickled weights only."""


def check_model_dir(model_dir: Path | None) -> Path:
    """Return ``model_dir`` if it can be loaded without running code from it.

    Raises:
        ModelInvalid: with what is wrong and what to do.
    """
    if model_dir is None:
        raise ModelInvalid("no model is configured: set MOORLINE_MODEL__PATH to a model directory")
    if not (model_dir / "config.json").is_file():
        raise ModelInvalid(f"{model_dir} is not a model directory: it has no config.json")
    if not any(model_dir.glob("*.safetensors")):
        pickled = any(any(model_dir.glob(pattern)) for pattern in _PICKLED)
        what = "only pickled weights, which can run code when loaded" if pickled else "no weights"
        raise ModelInvalid(f"{model_dir} holds {what}: convert the model to *.safetensors")
    return model_dir


def generation_defaults(model_dir: Path) -> dict[str, Any]:
    """What the model's `generation_config.json` says; nothing where there is none, or no object."""
    try:
        found = json.loads((model_dir / "generation_config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def model_digest(model_dir: Path) -> str:
    """sha256 over the names and contents of the configuration and the weights.

    Servers and the updater compare it, so that an adapter never meets a base model it was not
    trained on. Takes about a second per 500 MB.
    """
    digest = hashlib.sha256()
    for path in sorted([*model_dir.glob("*.safetensors"), model_dir / "config.json"]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
