"""Rows of sealed blocks begin with their own first token: what the mask tells of left padding goes into the table."""

from torch import Tensor

from hf_kvopt.attention.mask import LazyMask
from hf_kvopt.kernels.sealed_view import SealedView
from hf_kvopt.pool.handle import KVHandle, view_of


def aligned(key: KVHandle, value: Tensor, mask: Tensor | None) -> tuple[KVHandle, Tensor]:
    """Return the handles once rows without a token so far begin behind their left padding.

    Only the mask tells what is padding. Where it was taken for text, the step of this layer is written anew, so that a
    row's blocks begin with its own first token, whatever it is padded with. That is done at the first layer of a table,
    before the others write; where its blocks are not sealed, padding is stored.
    """
    table = key.table
    if not isinstance(value, KVHandle) or key.reads is None or not key.reads.is_first:
        return key, value
    k, v = view_of(key), view_of(value)
    if not isinstance(k, SealedView) or not isinstance(v, SealedView) or table is None:
        return key, value
    is_young = k.arrived is not None and any(lag >= table.step_start for lag in table.lags)
    if not is_young or not isinstance(mask, LazyMask) or mask.padding is None:
        return key, value
    k.check_valid()
    num_pads = (~mask.padding).int().cumprod(-1).sum(-1).tolist()
    first = table.base + k.skip
    lags = [
        max(lag, first + pads) if lag >= table.step_start else lag
        for lag, pads in zip(table.lags, num_pads, strict=True)
    ]
    if lags == table.lags:
        return key, value
    table.begin_later(lags)
    return _rewritten(key, k), _rewritten(value, v)


def _rewritten(handle: KVHandle, view: SealedView) -> KVHandle:
    """The handle of a layer whose last step is written to other places."""
    new, table, source = view.arrived, view.table, view.source
    assert new is not None
    source.write(new, table, table.clock - new.shape[2], table.clock)
    twin = KVHandle(source.view(table, view.spec.shape[2], view.skip, view.states, new), handle.reads, handle.is_fresh)
    twin.guard = handle.guard
    return twin
