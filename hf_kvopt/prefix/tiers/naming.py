"""Names under which blocks lie on a disk: what computed them must be the same to the last weight.

model   SHA-256 of every element of every weight, the settings of all modules, the storage format, attention,
        precision, kind of device, and the versions of torch, transformers and the file format
text    SHA-256 of the namespace and of the digest of the block
"""

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Hashable
from functools import cache
from typing import TYPE_CHECKING

import torch
import transformers
from transformers import PreTrainedModel

from hf_kvopt.errors import CacheStateError
from hf_kvopt.prefix.identity import fingerprint, modes
from hf_kvopt.prefix.tiers.disk import VERSION

if TYPE_CHECKING:
    from hf_kvopt.prefix.shared_blocks import SharedBlocks

logger = logging.getLogger(__name__)
_KEPT = 8  # states of a model whose names are remembered


class DiskNames:
    """Names of one store's blocks. A model's name is found once a state of its weights, and reads all of them.

    Args:
        blocks: of the store.
    """

    def __init__(self, blocks: "SharedBlocks") -> None:
        self.blocks = blocks
        self._models: OrderedDict[Hashable, str | None] = OrderedDict()

    def learn(self, key: Hashable) -> None:
        """Find the name of the model that `key`, of `SharedBlocks.key_of`, was made for, unless it is known."""
        model = self.blocks.model
        state, namespace = key if isinstance(key, tuple) else (None, None)
        if model is None or state is None or state in self._models:
            return
        name = _name_of(model, self.blocks)
        if self.blocks.key_of(namespace) == key:  # else it was changed while it was read
            self._models[state] = name
            while len(self._models) > _KEPT:
                self._models.popitem(last=False)

    def of(self, key: Hashable, digest: bytes) -> tuple[str, str] | None:
        """Return the names of a model and of a text; None where the block cannot lie on a disk."""
        state, namespace = key if isinstance(key, tuple) else (None, None)
        model = self._models.get(state)
        if model is None:
            return None
        if not isinstance(namespace, str | int | None):
            _say_once(f"namespaces must be text or numbers: got {namespace!r}")
            return None
        space = f"{type(namespace).__name__} {namespace!r}".encode()
        return model, hashlib.sha256(hashlib.sha256(space).digest() + digest).hexdigest()

    def known(self) -> list[str]:
        """Return the names of all states of the model that were asked for, and forget them."""
        names = [name for name in self._models.values() if name is not None]
        self._models.clear()
        return names


def _name_of(model: PreTrainedModel, blocks: "SharedBlocks") -> str | None:
    try:
        identity = fingerprint(model, whole=True)
    except CacheStateError as error:
        _say_once(str(error))
        return None
    formats = blocks.formats
    said = [
        VERSION, torch.__version__, transformers.__version__, identity, model.config._attn_implementation,
        model.device.type, modes(model.device), blocks.block_size, formats.format,
        sorted(map(str, formats.skip_layers)), sorted(formats.layer_formats.items(), key=str),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:32]


@cache
def _say_once(reason: str) -> None:
    logger.warning("nothing is kept on the disk: %s", reason)
