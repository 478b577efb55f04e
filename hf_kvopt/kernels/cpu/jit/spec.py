"""Specialisation of a compiled attention, and the arguments that it takes at run time."""

from typing import NamedTuple

from hf_kvopt.quant.sealed_formats import BlockCodec


class Spec(NamedTuple):
    """One compiled kernel.

    Args:
        rows: queries that share the reads of a key, 1 to 4: as many as stay in registers with four keys.
        k_dim: channels of a key.
        v_dim: channels of a value.
        k_code: how keys are stored, a name in codec.CODECS.
        v_code: how values are stored.
        scale_bits: of a stored scale, 16 or 32.
        lanes: float32 values in a vector register: 16 (AVX-512) or 8 (AVX2).
        is_shared: whether it attends to what rows have in common, for all of them.
    """

    rows: int
    k_dim: int
    v_dim: int
    k_code: str
    v_code: str
    scale_bits: int
    lanes: int
    is_shared: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of what the kernel is given."""
        return ARGUMENTS + SHARED_ARGUMENTS if self.is_shared else ARGUMENTS


class SealedSpec(NamedTuple):
    """One compiled kernel over blocks of which the old ones are sealed.

    Args:
        rows: see `Spec`, as are the other fields that it has.
        k_dim: see `Spec`.
        v_dim: see `Spec`.
        k_code: how exact keys are stored.
        v_code: how exact values are stored.
        k: the codec of sealed keys.
        v: the codec of sealed values.
        block_size: tokens a block.
        lanes: see `Spec`.
    """

    rows: int
    k_dim: int
    v_dim: int
    k_code: str
    v_code: str
    k: BlockCodec
    v: BlockCodec
    block_size: int
    lanes: int
    scale_bits: int = 16

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of what the kernel is given."""
        return ARGUMENTS + SEALED_ARGUMENTS


# Tokens that are scored, weighed and added up together: their keys and values stay in the first-level cache.
TILE = 64
# Tokens of one task. Fixed, so that sums are made in the same order whatever the number of threads and of rows.
CHUNK = 1024

# An int64 each; addresses, counts, strides. Strides of k, v, their scales and the mask are in bytes, others in items.
# `padded` are the queries of a KV head, rounded up to what is computed together. `run` rows after another have the same
# blocks for their first `shared[row // run]` tokens (int32, multiples of TILE), which were attended to before.
ARGUMENTS = (
    "next_task", "num_tasks", "num_threads", "splits", "num_kv_heads", "group", "q_len", "padded",
    "q", "q_batch", "q_head", "q_token",
    "k", "k_block", "k_token", "k_head", "k_scale", "k_scale_block", "k_scale_head",
    "v", "v_block", "v_token", "v_head", "v_scale", "v_scale_block", "v_scale_head",
    "table", "table_row", "block_shift", "seq_lens", "starts", "lags", "skip",
    "shared", "run", "is_causal", "window", "scale", "softcap",
    "mask_kind", "mask", "mask_batch", "mask_head", "mask_token",
    "sinks", "sinks_batch", "sinks_head", "sinks_token",
    "out", "parts",
)  # fmt: skip
# What the kernel that attends to shared tokens is given besides: rows of a task, and the tasks of the longest run.
SHARED_ARGUMENTS = ("piece", "shared_splits")
# What a kernel over sealed blocks is given besides; strides are in bytes.
SEALED_ARGUMENTS = (
    "exact_table", "exact_table_row", "first_block", "depths",
    *(
        f"{plane}_{part}{stride}"
        for plane in "kv"
        for part, strides in (("codes", ("", "_block", "_token", "_head")), ("params", ("", "_block", "_head")),
                              ("mean", ("", "_block", "_head")))
        for stride in strides
    ),
)  # fmt: skip
NO_WINDOW = 1 << 40
# Kinds of masks.
NO_MASK, BOOL_MASK, FLOAT_MASK = 0, 1, 2


def part_items(spec: Spec | SealedSpec) -> int:
    """float32 values that a task keeps of one row: the weighted sum of values, the greatest score, the denominator."""
    return -(-spec.v_dim // spec.lanes) * spec.lanes + spec.lanes  # so that rows are aligned alike


class StoreSpec(NamedTuple):
    """One compiled kernel that quantizes and stores.

    Args:
        dim: channels of a vector.
        source: how states come, a name in codec.CODECS.
        code: how they are stored, a name in coder.CODERS.
        rotates: whether they are rotated before.
        is_centred: whether a centre is taken from them before.
        lanes: see `Spec`.
    """

    dim: int
    source: str
    code: str
    rotates: bool
    is_centred: bool
    lanes: int


# Tokens of one task.
STORE_CHUNK = 64
# An int64 each; strides are in bytes. `outside` becomes a slot that the pool does not have.
STORE_ARGUMENTS = (
    "next_task", "num_tasks", "num_threads", "outside", "chunks", "num_heads", "tokens",
    "states", "states_row", "states_head", "states_token",
    "centre", "centre_row", "centre_head",
    "slots", "num_slots", "block_shift",
    "codes", "codes_block", "codes_token", "codes_head", "scale", "scale_block", "scale_head",
)  # fmt: skip


class SealSpec(NamedTuple):
    """One compiled kernel that seals blocks.

    Args:
        dim: channels of a vector.
        source: how states come, a name in codec.CODECS.
        codec: how they are stored.
        block_size: tokens a block.
        lanes: see `Spec`.
    """

    dim: int
    source: str
    codec: BlockCodec
    block_size: int
    lanes: int


# An int64 each; strides are in bytes. `sources` are addresses of the blocks' states, `blocks` their numbers.
SEAL_ARGUMENTS = (
    "next_task", "num_tasks", "num_threads", "num_heads", "sources", "blocks", "source_token", "source_head",
    "codes", "codes_block", "codes_token", "codes_head", "params", "params_block", "params_head",
    "mean", "mean_block", "mean_head",
)  # fmt: skip


class DraftSpec(NamedTuple):
    """One compiled drafting layer: EAGLE-3's, see speculation/heads/layer.py.

    Args:
        features: of the target, as they come.
        hidden: width.
        inner: width of the MLP.
        num_heads: of queries.
        num_kv_heads: of keys and values.
        head_dim: channels of a head.
        vocab: tokens that can be proposed.
        weights: how they are stored, a name in codec.CODECS.
        embeds: how the embeddings are.
        store: how keys and values are: float32, bfloat16 or float16.
        is_normed_residual: whether the residual is the normed feature.
        eps: of the norms.
        lanes: see `Spec`.
    """

    features: int
    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    weights: str
    embeds: str
    store: str
    is_normed_residual: bool
    eps: float
    lanes: int

    @property
    def attention(self) -> Spec:
        """Arguments of an attention of one query a row."""
        rows = min(self.num_heads // self.num_kv_heads, 4)
        return Spec(rows, self.head_dim, self.head_dim, self.store, self.store, 16, self.lanes)


# An int64 each; strides are in bytes. `first_` belongs to the tokens that are read before anything is drafted.
DRAFT_ARGUMENTS = (
    "num_threads", "num_rows", "num_first", "steps", "made", "is_over", "limit",
    "features", "fc", "combined", "first_tokens", "first_positions", "first_slots", "last",
    "tokens", "positions", "slots", "identity",
    "input_norm", "hidden_norm", "qkv", "o", "post_norm", "gate_up", "down", "norm", "lm_head",
    "embeds", "embeds_row", "rotations", "d2t",
    "k", "k_block", "k_token", "k_head", "v", "v_block", "v_token", "v_head", "block_shift",
    "attention", "seq_lens",
    "queries", "attended", "middle", "activated", "states", "drafted", "logits", "partials", "joint",
    "scratch", "scratch_thread",
)  # fmt: skip
# float32 values that a thread leaves of its share of a row's logits: the greatest, its token, and the sum of exp.
PARTIAL = 4
