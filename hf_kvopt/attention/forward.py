"""The attention function behind `attn_implementation="hf_kvopt"`.

It takes the arguments that a model passes to any attention (dense tensors or `KVHandle`s, a mask in one of several
forms, and the model's own extras), reduces the mask to a pattern and a remainder, and calls the kernel.
"""

from typing import Any

from torch import Tensor, nn

from hf_kvopt.attention.checks import check_ownership, check_weights, check_window
from hf_kvopt.attention.eviction import check_eviction, choose_prompt, mask_of_layer
from hf_kvopt.attention.headwise import attend_headwise
from hf_kvopt.attention.masking import add_bias, hide_before, select_keys, take_apart
from hf_kvopt.attention.mla import LatentKV, attend_latent, is_absorbable
from hf_kvopt.attention.packed import attend_packed
from hf_kvopt.attention.sealed import aligned
from hf_kvopt.attention.selection import select_blocks
from hf_kvopt.errors import KVOptError, UnsupportedModel
from hf_kvopt.kernels.attention import attend
from hf_kvopt.kernels.calls import AttentionCall
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.pool.handle import KVHandle, view_of
from hf_kvopt.pool.headwise import HeadwiseKV
from hf_kvopt.pool.packed import PackedKV


def attention_forward(
    module: nn.Module,
    query: Tensor,  # [batch, num_heads, q_len, head_dim]
    key: Tensor,  # [batch, num_kv_heads, kv_len, head_dim]
    value: Tensor,  # [batch, num_kv_heads, kv_len, v_head_dim]
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention over dense keys and values or over a paged cache; never returns attention weights.

    Returns:
        [batch, q_len, num_heads, v_head_dim] contiguous, and None.

    Raises:
        UnsupportedModel: the model passes a selection of whole blocks of keys (`block_indices`).
        ValueError: weights were asked for, dropout outside of training, or a mask of an invalid shape.
        CacheStateError: the cache belongs to another model, or already holds this prompt.
    """
    if isinstance(key, PackedKV | HeadwiseKV):  # and so are the values
        kwargs |= {"is_causal": is_causal, "sliding_window": sliding_window, "position_bias": position_bias}
        kwargs |= {"dropout": dropout, "scaling": scaling, "softcap": softcap, "s_aux": s_aux}
        attend_parts: Any = attend_packed if isinstance(key, PackedKV) else attend_headwise
        out: tuple[Tensor, None] = attend_parts(attention_forward, module, query, key, value, attention_mask, **kwargs)
        return out
    handle = key.latent if isinstance(key, LatentKV) else key
    if isinstance(handle, KVHandle) and handle.mask is not None:
        attention_mask = handle.mask
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    table = handle.table if isinstance(handle, KVHandle) else None
    scoring = Pattern(scale, True, None, softcap, s_aux if s_aux is not None else kwargs.get("sinks"))
    try:
        _refuse_what_is_wrong(module, handle, attention_mask, dropout, sliding_window, kwargs)
        if isinstance(key, KVHandle) and key.table is not None and key.table.allocator.tails is not None:
            key, value = handle, _ = aligned(key, value, attention_mask)
        if table is not None and table.policy is not None:
            check_eviction(module, handle, attention_mask, position_bias, kwargs)  # type: ignore[arg-type]
            attention_mask = mask_of_layer(handle, attention_mask)  # type: ignore[arg-type]
        if kwargs.get("indices") is not None:
            attention_mask = select_keys(attention_mask, kwargs["indices"], query.shape[2], key.shape[2])
        pattern = take_apart(module, query, key, attention_mask, is_causal, sliding_window, scoring)
        if table is not None and table.is_ragged:
            pattern = hide_before(handle, pattern, key.shape[2])  # type: ignore[arg-type]
        if table is not None and table.policy is not None:
            choose_prompt(module, query, key, value, scale)
    except (KVOptError, ValueError):
        if isinstance(handle, KVHandle) and handle.guard is not None and table is not None:
            handle.guard.undo(table)
        raise
    if position_bias is not None:
        bias = position_bias[..., -key.shape[2] :]
        pattern = pattern._replace(mask=add_bias(bias, pattern.mask))
    if isinstance(key, LatentKV) and is_absorbable(query, key):
        return attend_latent(query, key, pattern), None
    if isinstance(key, LatentKV) and isinstance(value, LatentKV):
        key, value = key.expand_both()
    if table is not None and table.policy is not None and table.policy.selects_blocks:
        selected = select_blocks(module, query, key, value, pattern)
        if selected is not None:
            return attend(AttentionCall(query, *selected, dropout)), None
    k = view_of(key) if isinstance(key, KVHandle) else key
    v = view_of(value) if isinstance(value, KVHandle) else value
    return attend(AttentionCall(query, k, v, pattern, dropout)), None


def _refuse_what_is_wrong(
    module: nn.Module,
    handle: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    sliding_window: int | None,
    kwargs: dict[str, Any],
) -> None:
    """Raise on any call that would give a wrong token; the cache then undoes the step."""
    if kwargs.get("block_indices") is not None:
        # With padded rows the selection depends on the states of padding, which differ between attentions.
        raise UnsupportedModel(
            f"{type(module).__name__} selects blocks of keys (`block_indices`), which hf_kvopt's attention does not "
            "read: load this model with attn_implementation='eager' or 'sdpa', and pass the cache alone"
        )
    if kwargs.get("output_attentions"):
        check_weights(True)
    if dropout and not module.training:
        raise ValueError(
            f"attention dropout must be 0 outside of training: got {dropout}; call model.train() or set it to 0"
        )
    if isinstance(handle, KVHandle):
        check_ownership(module, handle, kwargs, attention_mask)
        if handle.reads is not None and handle.reads.slides is not False:
            check_window(module, handle, attention_mask, sliding_window)
