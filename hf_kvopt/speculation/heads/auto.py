"""DraftHead: loads a draft head of any supported kind."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_kvopt.speculation.heads.base import HeadBase
from hf_kvopt.speculation.heads.checkpoints import build
from hf_kvopt.speculation.heads.config import EagleConfig, MedusaConfig
from hf_kvopt.speculation.heads.eagle import EagleHead
from hf_kvopt.speculation.heads.medusa import MedusaHead

_OWN: dict[str, type[EagleHead] | type[MedusaHead]] = {
    EagleConfig.model_type: EagleHead,
    MedusaConfig.model_type: MedusaHead,
}
_FILES = ("model.safetensors", "medusa_lm_head.safetensors", "pytorch_model.bin", "medusa_lm_head.pt")
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class DraftHead:
    """Loader of draft heads: `DraftHead.from_pretrained(path_or_id)` returns an EAGLE or a Medusa head.

    It reads heads saved by `save_pretrained` or `python -m hf_kvopt train-draft`, and published heads of EAGLE-3,
    EAGLE-1/2, `speculators` and Medusa; `hf_kvopt.speculation.heads.checkpoints` documents the layouts.
    """

    def __init__(self) -> None:
        raise TypeError(
            "DraftHead makes no heads by itself: got DraftHead(); call DraftHead.from_pretrained(path_or_id)"
        )

    @staticmethod
    def from_pretrained(
        path_or_id: str | Path,
        *,
        dtype: torch.dtype | None = None,
        target_layer_ids: tuple[int, ...] | None = None,
        **hub_options: Any,
    ) -> HeadBase:
        """Load a head in eval mode, on the CPU.

        Args:
            path_or_id: a folder, or a repository on the hub.
            dtype: dtype of the weights; None keeps the stored one, or the one that the configuration names.
            target_layer_ids: the target's hidden states that an EAGLE-3 head reads, if its configuration does not list
                them or numbers them differently.
            hub_options: passed to `huggingface_hub.snapshot_download`, such as revision, token, cache_dir,
                local_files_only.

        Returns:
            The head, a `Drafter` that `speculative` takes.

        Raises:
            ValueError: the layout is not known, or the weights do not fit their configuration.
            FileNotFoundError: no such folder or repository, no config.json, or no weights.
        """
        folder = Path(path_or_id).expanduser()
        if not folder.is_dir():
            folder = _downloaded(path_or_id, hub_options)
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"a draft head needs a config.json: got {folder}, which has none")
        config = json.loads((folder / "config.json").read_text())
        own = _OWN.get(config.get("model_type"))
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        if target_layer_ids is not None:
            options["target_layer_ids"] = target_layer_ids
        if own is not None:
            return own.from_pretrained(folder, **options).eval()
        if target_layer_ids is not None:
            config["eagle_aux_hidden_state_layer_ids"] = list(target_layer_ids)
            config.pop("eagle_config", None)
        head = build(config, read_weights(folder))
        return head if dtype is None else nn.Module.to(head, dtype)


def _downloaded(path_or_id: str | Path, hub_options: dict[str, Any]) -> Path:
    """Return the folder of a repository's files, downloading them if needed."""
    expected = "expected the folder of a draft head, or the id of a repository on the hub, as in owner/name"
    if isinstance(path_or_id, Path) or not _REPOSITORY.fullmatch(path_or_id):
        raise FileNotFoundError(f"no draft head was found: got {str(path_or_id)!r}, which is no folder; {expected}")
    patterns = ["*.json", *_FILES, "*.safetensors", "pytorch_model*.bin"]
    try:
        return Path(snapshot_download(path_or_id, allow_patterns=patterns, **hub_options))
    # The hub does not know the repository, or cannot be reached and nothing is cached.
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"no draft head was found: got {path_or_id!r}, which is no folder, and of which the hub gave nothing "
            f"({error}); {expected}"
        ) from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all weights of a folder, from one file or from the shards that an index names."""
    for name in _INDEXES:
        if (folder / name).exists():
            shards = sorted(set(json.loads((folder / name).read_text())["weight_map"].values()))
            return {key: x for shard in shards for key, x in _read(folder / shard).items()}
    for name in _FILES:
        if (folder / name).exists():
            return _read(folder / name)
    raise FileNotFoundError(f"a draft head needs weights, as {' or '.join(_FILES)}: got {folder}, which has none")


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
