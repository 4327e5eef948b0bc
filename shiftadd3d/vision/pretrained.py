"""timm's pretrained weights: where they come from, and, within seconds, whether they are available."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch

from shiftadd3d._errors import UserError

WAIT = 15.0  # seconds until a server that says nothing counts as out of reach
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # in timm's order


def describe_source(model: str) -> str:
    """The place of timm's weights for a model, with their licence; empty if there are none."""
    found = _config(model)
    if found is None:
        return ""
    place = f"{found.hf_hub_id} on the Hugging Face hub" if found.hf_hub_id else str(found.url)
    return place + (f" ({found.license})" if found.license else "")


def fetch(model: str, wait: float = WAIT) -> Path | None:
    """Get the pretrained weights of a model into the cache, unless they are there.

    The download libraries retry for minutes if a server cannot be reached. So this first finds out whether it answers
    at all. Weights in the cache need no server.

    Args:
        model: timm's name.
        wait: seconds to wait for an answer. The download itself has no limit.

    Returns:
        The file; None if only timm itself can load the weights, from another kind of address.

    Raises:
        UserError: the weights are not available. The message says why in one line.
    """
    found = _config(model)
    if found is None:
        raise UserError(f"timm has none for {model}")
    if found.hf_hub_id:
        return _fetch_from_hub(found.hf_hub_id, found.hf_hub_filename, wait)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(str(found.url))
    if not cached.is_file():
        _check_answer(str(found.url), wait)
    return None


def _config(model: str) -> Any:
    import timm

    found = timm.get_pretrained_cfg(model)
    return found if found is not None and found.has_weights and (found.hf_hub_id or found.url) else None


def _fetch_from_hub(repository: str, file: str | None, wait: float) -> Path:
    import huggingface_hub
    from huggingface_hub import constants

    files = (file,) if file else _HUB_FILES
    for name in files:
        cached = huggingface_hub.try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    if constants.HF_HUB_OFFLINE:
        raise UserError("they are not in the cache, and HF_HUB_OFFLINE is set")
    _check_answer(huggingface_hub.hf_hub_url(repository, files[0]), wait)
    reason = ""
    for name in files:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name))
        except Exception as error:  # whatever the server and the libraries between have to say
            reason = reason or first_line(error)
    raise UserError(reason)


def _check_answer(url: str, wait: float) -> None:
    """Ask a server for a file's head. Any answer will do, also a refusal, which the download will tell more about.

    Raises:
        UserError: there is none.
    """

    def ask() -> str | None:
        try:
            urlopen(Request(url, method="HEAD"), timeout=wait).close()
        except HTTPError:
            return None
        except (OSError, ValueError) as error:
            return first_line(getattr(error, "reason", None) or error)
        return None

    reason = _within(wait, ask, f"no answer in {wait:g} s")
    if reason is not None:
        raise UserError(f"{urlsplit(url).hostname} cannot be reached: {reason}")


def _within(seconds: float, ask: Callable[[], str | None], otherwise: str) -> str | None:
    """The answer of `ask`, or `otherwise` if it takes longer: looking up a name knows no time limit of its own."""
    answer: list[str | None] = [otherwise]
    thread = threading.Thread(target=lambda: answer.__setitem__(0, ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0]


def first_line(error: Any) -> str:
    """What an error says, in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
