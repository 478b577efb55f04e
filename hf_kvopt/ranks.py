"""Agreement of ranks that read the same texts together, each with a part of the model (tensor parallel).

    every layer of every forward meets the other ranks: all must run equally many forwards over equally many tokens
    decided by time          rank 0 measures and decides, the others follow             `follow_first`
    asked for by a caller    all ranks compare what they were asked for before a forward  `require_alike`

Both wait for a limited time: a rank that ended, or went another way, is an error on all others and no hang. The limit
is 600 seconds, or HF_KVOPT_RANK_TIMEOUT_S of the environment; it must cover the slowest loading and compilation.
"""

import os
import zlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch import distributed as dist
from transformers import PreTrainedModel

from hf_kvopt.compat_ranks import text_group
from hf_kvopt.errors import CacheStateError

_TIMEOUT = "HF_KVOPT_RANK_TIMEOUT_S"
_DEFAULT_S = 600.0
_SAID_BYTES = 512  # of what a rank says of itself; longer texts are told apart by their end, which is a checksum


def follow_first(model: PreTrainedModel, values: Sequence[float]) -> list[float]:
    """Return the values of the first rank on every rank; those of this rank where the model is whole.

    Args:
        model: the model whose ranks are asked.
        values: float64 numbers, equally many on every rank.

    Raises:
        CacheStateError: the ranks did not meet in time.
    """
    group = text_group(model)
    if group is None:
        return list(values)
    told = torch.tensor(values, dtype=torch.float64, device=_device(model))
    work = dist.broadcast(told, dist.get_global_rank(group, 0), group=group, async_op=True)
    _wait(work, group, "the size of a draft")
    return told.tolist()


def require_alike(model: PreTrainedModel, what: str, said: str) -> None:
    """Raise CacheStateError on every rank unless all ranks say the same; do nothing where the model is whole.

    Args:
        model: the model whose ranks are asked.
        what: names what is compared, for the message.
        said: the text of this rank.

    Raises:
        CacheStateError: ranks differ, or did not meet in time.
    """
    group = text_group(model)
    if group is None:
        return
    own = _encoded(said, _device(model))
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    _wait(dist.all_gather(found, own, group=group, async_op=True), group, what)
    texts = [bytes(text.tolist()).rstrip(b"\0").decode(errors="replace") for text in found]
    if len(set(texts)) > 1:
        shown = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
        raise CacheStateError(
            f"ranks that share a model must be asked for the same: got {what} that differ ({shown}); call hf_kvopt and "
            "generate alike on every rank"
        )


def _encoded(text: str, device: torch.device) -> Tensor:
    """Return `text` as uint8 [_SAID_BYTES]; one that is too long ends with the checksum of the whole."""
    raw = text.encode()
    if len(raw) > _SAID_BYTES:
        checksum = f"... {zlib.crc32(raw):08x}".encode()
        raw = raw[: _SAID_BYTES - len(checksum)] + checksum
    return torch.tensor(list(raw.ljust(_SAID_BYTES, b"\0")), dtype=torch.uint8, device=device)


def _wait(work: Any, group: Any, what: str) -> None:
    limit = float(os.environ.get(_TIMEOUT) or _DEFAULT_S)
    try:
        is_done = work.wait(timedelta(seconds=limit))
    except RuntimeError as error:
        _refuse(group, what, limit, error)
    if is_done is False:
        _refuse(group, what, limit, None)


def _refuse(group: Any, what: str, limit: float, error: RuntimeError | None) -> NoReturn:
    raise CacheStateError(
        f"ranks that share a model must take every step together: rank {dist.get_rank(group)} of "
        f"{dist.get_world_size(group)} compared {what} and got no answer from the others within {limit:g} s, so one "
        f"of them ended or went another way; look at the first error of the other ranks, start all of them again, or "
        f"raise {_TIMEOUT}"
    ) from error


def _device(model: PreTrainedModel) -> torch.device:
    """Return the device on which the ranks of `model` exchange tensors."""
    return model.device
