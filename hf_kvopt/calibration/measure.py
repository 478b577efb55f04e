"""Measure what formats lose: the same tokens read through the unquantized cache and through each format.

    KL(p_native || p_format)   mean over the second half of each row, where most of the cache is quantized

The KL divergence is what perplexity grows by, in nats, on text that the model itself would write; on other text the
growth has this mean and so much noise that a few hundred tokens say nothing. Tokens are fed in chunks, so that they
attend to what is stored. Layers are measured one at a time, the others unquantized, as in KVTuner, arXiv:2502.04420.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt import compat
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.cache.quantized import QuantizedPagedCache
from hf_kvopt.calibration.record import Calibration, FormatLoss
from hf_kvopt.calibration.text import text_ids
from hf_kvopt.errors import KVOptError, UnsupportedDevice, UnsupportedModel
from hf_kvopt.overrides.attention import our_attention
from hf_kvopt.plan.memory import memory
from hf_kvopt.quant import KV_FORMATS, get_kv_format

CHUNK = 64  # tokens fed at once
_JUDGED_TOKENS = 32 * 1024  # at which bytes are compared
_LEAST_TOKENS = 4 * CHUNK


def calibrate(
    model: PreTrainedModel,
    ids: Tensor | None = None,  # [rows, tokens] int64
    *,
    formats: Sequence[str] | None = None,
    layers_of: Sequence[str] = (),
) -> Calibration:
    """Measure what each storage format loses on `model`, and keep it in the user's cache folder.

    Args:
        model: a decoder-only model, loaded; it is left as it was.
        ids: text to read, at least 256 tokens a row, of which the second half is compared; 2 rows of 512 tokens of
            Python's manual by default, by the tokenizer that lies beside the model's weights.
        formats: names of formats (all that the library has).
        layers_of: formats of which each layer is measured alone too, for `skip_layers`; a forward for each layer.

    Returns:
        The losses. `enable(model, cache="auto", max_loss=...)` chooses by them, in other processes too, and `enable`
        with a format that loses much says so.

    Raises:
        UnsupportedModel: no cache of this library, or an encoder-decoder.
        KVOptError: no tokenizer lies beside the model, and no ids were given.
        ValueError: an unknown format, or too few tokens.
    """
    model = compat.unwrapped(model)
    _require_measurable(model)
    names = [name for name, fmt in KV_FORMATS.items() if not fmt.is_native] if formats is None else [*formats]
    for name in (*names, *layers_of):
        get_kv_format(name)
    ids = text_ids(model) if ids is None else ids
    if ids.ndim != 2 or ids.shape[1] < _LEAST_TOKENS:
        raise ValueError(f"ids must be [rows, tokens] with at least {_LEAST_TOKENS} tokens: got {tuple(ids.shape)}")
    with our_attention(model):
        found = _measured(model, ids, names, layers_of)
    found.save(model)
    return found


def _measured(model: PreTrainedModel, ids: Tensor, names: Sequence[str], layers_of: Sequence[str]) -> Calibration:
    reader = _Reader(model, ids)
    losses: dict[str, FormatLoss] = {}
    skipped: dict[str, str] = {}
    for name in dict.fromkeys((*names, *layers_of)):
        try:
            losses[name] = reader.loss_of(name)
        except (UnsupportedDevice, ValueError) as error:  # a card that cannot read it, a head_dim that cannot be packed
            skipped[name] = str(error)
    layers = {name: reader.layers_of(name) for name in layers_of if name not in skipped}
    return Calibration(
        model=str(model.name_or_path), num_tokens=reader.num_tokens, losses=losses, layers=layers, skipped=skipped
    )


def _require_measurable(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(
            f"calibrate reads plain text: got {name}, an encoder-decoder; use evals.perplexity's way"
        )
    if not compat.uses_standard_cache(type(model), model.config):
        raise UnsupportedModel(f"{name} keeps its past in a cache of its own, or keeps none: nothing to calibrate")


class _Reader:
    """Reads one text through caches, and compares with the unquantized one, whose distributions it keeps."""

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.config = model.config.get_text_config(decoder=True)
        self.native = self._read(PagedCache(self.config))

    @property
    def num_tokens(self) -> int:
        """Distributions that are compared."""
        return self.native.shape[0] * self.native.shape[1]

    def loss_of(self, name: str) -> FormatLoss:
        """Measure one format in all layers."""
        kl, same = self._compare(QuantizedPagedCache(self.config, format=name))
        # Tokens of a stretch are not independent: the interval is over the means of stretches.
        means = torch.cat([part.mean(dim=1) for part in kl.split(CHUNK, dim=1)])
        error = 1.96 * float(means.std()) / len(means) ** 0.5 if len(means) > 1 else 0.0
        question: dict[str, Any] = {"context": _JUDGED_TOKENS, "dtype": "bfloat16", "weights": False}
        own, native = (memory(self.config, format=form, **question).used_bytes for form in (name, "native"))
        return FormatLoss(kl=float(kl.mean()), kl_error=error, top1=float(same), bf16_share=own / native)

    def layers_of(self, name: str) -> Mapping[int, float]:
        """Measure one format in one layer at a time; layers with a window stay native by default, and are left out."""
        kinds, _ = compat.layer_types(self.config)
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        found = {}
        for i in full:
            cache = QuantizedPagedCache(self.config, format="native", layer_formats={i: name})
            found[i] = float(self._compare(cache)[0].mean())
        return found

    def _compare(self, cache: PagedCache) -> tuple[Tensor, Tensor]:
        """Return the KL divergence of each token, [rows, tokens] float64 nats, and the share of equal first choices."""
        own = self._read(cache)
        kl = (self.native.exp() * (self.native - own)).sum(-1).double()
        return kl, (own.argmax(-1) == self.native.argmax(-1)).double().mean()

    @torch.inference_mode()
    def _read(self, cache: PagedCache) -> Tensor:  # [rows, tokens / 2, vocab] log-probabilities, on the CPU
        keyword, tokens = compat.cache_keyword(self.model), self.ids.shape[1]
        half, parts = tokens // 2 // CHUNK * CHUNK, []
        for begin in range(0, tokens, CHUNK):
            chunk = self.ids[:, begin : begin + CHUNK].to(self.model.device)
            logits = self.model(input_ids=chunk, use_cache=True, **{keyword: cache}).logits
            if begin >= half:
                parts.append(F.log_softmax(logits.float(), dim=-1).cpu())
        cache.free()
        read = torch.cat(parts, dim=1)
        if not read.isfinite().all():
            raise KVOptError(f"{type(self.model).__name__} gives logits that are not finite: nothing can be compared")
        return read


def with_layers(calibration: Calibration, name: str, num_skipped: int) -> tuple[FormatLoss, tuple[int, ...]]:
    """Return the loss to expect of a format with its most sensitive layers left native, and those layers.

    Losses of layers are taken to add up, scaled to what all layers together were measured to lose.
    """
    whole, layers = calibration.losses[name], calibration.layers[name]
    ranked = sorted(layers, key=lambda i: -layers[i])
    skipped, total = tuple(sorted(ranked[:num_skipped])), sum(layers.values())
    kept = (total - sum(layers[i] for i in skipped)) / total if total > 0 else 0.0
    share = num_skipped / len(layers)
    expected = replace(
        whole,
        kl=whole.kl * kept,
        kl_error=whole.kl_error * kept,
        bf16_share=whole.bf16_share * (1 - share) + share,
    )
    return expected, skipped
