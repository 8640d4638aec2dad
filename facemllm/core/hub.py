"""Checkpoints by name: a folder of the project, or what the Hugging Face hub holds under an id."""

from __future__ import annotations

import os
from pathlib import Path

from facemllm.core import digests
from facemllm.errors import UserError, one_line
from facemllm.settings import root

_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_WHOLE = 2000  # characters: the hub's reasons end with what to do


def fetched(name: str, setting: str) -> Path:
    """The folder `name`, relative to the project, or that of a hub id, fetched unless HF_HUB_OFFLINE.

    Raises UserError when there is neither; `setting` is where it was named.
    """
    folder = (root() / name).resolve()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES), local_files_only=offline)).resolve()
    except Exception as error:  # a dozen kinds, from a malformed name to a broken connection
        reason = one_line(error, _WHOLE)
        raise UserError(f"{setting}: {name} is no folder, nor a model of the hub: {reason}") from None


def content_of(name: str, setting: str) -> str:
    """What decides a checkpoint `fetched` by name: a hub id's commit, or the digest of a folder's own files.

    Reads the files of a folder whole: some seconds for every ten gigabytes.
    """
    folder = fetched(name, setting)
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):  # huggingface_hub's cache
        return folder.name
    files = sorted({file for pattern in _FILES for file in folder.glob(pattern)})
    return digests.of_json([[file.name, digests.of_file(file)] for file in files])
