"""Measured losses of one model, and the file that keeps them: `<home>/calibration/<fingerprint>.json`.

A file is found again by a digest of the model's config and samples of all its weights, and of the storage formats of
this version, so that what was measured on other weights or with other formats is never taken for it.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_kvopt.errors import CacheStateError
from hf_kvopt.files import home_folder, write_whole
from hf_kvopt.prefix.identity import fingerprint
from hf_kvopt.quant import KV_FORMATS


@dataclass(frozen=True, kw_only=True)
class FormatLoss:
    """Loss of one format.

    kl: mean KL divergence of the next token from the unquantized cache's, nats.
    kl_error: half of its 95 % interval.
    top1: share of tokens where both would choose the same next one.
    bf16_share: bytes of the cache over those of bfloat16, at 32k tokens.
    """

    kl: float
    kl_error: float
    top1: float
    bf16_share: float

    @property
    def percent(self) -> float:
        """Growth of perplexity, per cent, that this KL divergence means on text as the model would write it."""
        return 100 * math.expm1(self.kl)

    @property
    def most_percent(self) -> float:
        """The upper end of the interval of `percent`."""
        return 100 * math.expm1(self.kl + self.kl_error)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The losses of a model's formats.

    model: name or folder that it was loaded from.
    num_tokens: how many next-token distributions were compared.
    losses: by name of the format.
    layers: KL divergence with one layer alone in a format, by format, then by number of the layer; where it was asked.
    skipped: formats that were not measured, and why.
    """

    model: str
    num_tokens: int
    losses: Mapping[str, FormatLoss]
    layers: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    def save(self, model: PreTrainedModel) -> Path:
        """Write the file of `model`, whole or not at all, and return its path.

        Raises:
            CacheStateError: hooks, replaced methods or offloaded weights, by which no model can be told from others.
        """
        return write_whole(_path(model), json.dumps(asdict(self), indent=1))


def stored(model: PreTrainedModel) -> Calibration | None:
    """Return what was measured of `model` before; None where nothing was, or where it cannot be told from others."""
    if not _folder().is_dir():
        return None
    try:
        fields = json.loads(_path(model).read_text(encoding="utf8"))
        return _from_fields(fields)
    except (OSError, CacheStateError, ValueError, TypeError, KeyError):
        return None


def _from_fields(fields: dict[str, Any]) -> Calibration:
    losses = {name: FormatLoss(**loss) for name, loss in fields.pop("losses").items()}
    layers = {name: {int(i): kl for i, kl in found.items()} for name, found in fields.pop("layers").items()}
    return Calibration(losses=losses, layers=layers, **fields)


def _folder() -> Path:
    return home_folder() / "calibration"


def _path(model: PreTrainedModel) -> Path:
    formats = hashlib.sha256(repr(KV_FORMATS).encode()).hexdigest()
    return _folder() / f"{fingerprint(model)[:40]}-{formats[:8]}.json"
