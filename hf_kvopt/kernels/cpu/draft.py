"""Drafting with an EAGLE-3 layer on a CPU, in machine code made at first use (kernels/cpu/jit/draft.py).

A drafted token takes some 25 operations of torch on small tensors, most of whose time is not arithmetic; here the
tokens that the target has read and a whole chain behind them are one call. Weights are read as they are stored, sums
are float32. `can_draft` says whether a layer can be taken; speculation/heads/ computes the others with torch.
"""

from array import array
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_kvopt.kernels.cpu.address import PoolAddress
from hf_kvopt.kernels.cpu.jit.spec import (
    ARGUMENTS,
    CHUNK,
    DRAFT_ARGUMENTS,
    NO_WINDOW,
    PARTIAL,
    DraftSpec,
    Spec,
    part_items,
)
from hf_kvopt.kernels.cpu.program import MAX_DIM, NAMES, bits_of, can_compile, compiled, lanes, num_threads
from hf_kvopt.kernels.pattern import LOG2E

# Tokens of a first read at most: inputs are kept for each thread. 256 tokens of 8 rows still take 0.4x of torch's time.
MAX_FIRST = 128
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MULTIPLE = 32  # of all sizes: halves of a head are whole vectors


class DraftWeights(NamedTuple):
    """An EAGLE-3 head of one layer; matrices are [out, in] in one dtype, without biases."""

    input_norm: Tensor  # [hidden]: of embeddings
    hidden_norm: Tensor  # [hidden]: of features
    qkv: Tensor  # [(num_heads + 2 * num_kv_heads) * head_dim, 2 * hidden]
    o: Tensor
    post_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * inner, hidden]
    down: Tensor
    norm: Tensor  # [hidden]
    lm_head: Tensor  # [draft vocabulary, hidden]
    embeds: Tensor  # [vocabulary, hidden] of any dtype
    fc: Tensor | None  # [hidden, features]: None where features come combined
    d2t: Tensor | None  # [draft vocabulary] int64: target token less draft token
    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_normed_residual: bool
    eps: float

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """Tensors of a head that are stored in one dtype."""
        return self[:9] if self.fc is None else (*self[:9], self.fc)


class Entries(NamedTuple):
    """Tokens that are read before anything is drafted, contiguous; n may be several axes."""

    features: Tensor  # [n, width] float32, of the target or combined
    tokens: Tensor  # [n] int64: the token behind each
    positions: Tensor  # [n] int64
    slots: Tensor  # [n] int64
    last: Tensor  # [rows] int64: the last entry of each row


class Held(NamedTuple):
    """The head's cache, with room for all that is read and drafted."""

    k: PoolAddress
    v: PoolAddress
    block_table: Tensor  # [rows, max_blocks] int32
    seq_lens: Tensor  # [rows] int32: tokens of each row behind the first entries


def can_draft(weights: DraftWeights) -> bool:
    """Return whether `Drafting` takes such a head here."""
    matrices = weights.matrices
    sizes = (*(size for matrix in matrices for size in matrix.shape), weights.head_dim)
    if not can_compile() or any(size % _MULTIPLE for size in sizes) or len({x.dtype for x in matrices}) > 1:
        return False
    if weights.head_dim > MAX_DIM or not _is_within(weights):
        return False
    tensors = (*matrices, weights.embeds)
    return all(x.dtype in _DTYPES and _is_readable(x) for x in tensors)


def _is_within(weights: DraftWeights) -> bool:
    """Return whether all that is looked up is there: torch would raise, a kernel reads behind the tensor."""
    hidden, vocab, d2t = weights.embeds.shape[1], len(weights.lm_head), weights.d2t
    if weights.lm_head.shape[1] != hidden or len(weights.norm) != hidden:
        return False
    if d2t is None:
        return vocab <= len(weights.embeds)
    if d2t.dtype != torch.int64 or d2t.shape != (vocab,) or not _is_readable(d2t):
        return False
    least, most = (d2t + torch.arange(vocab, device="cpu")).aminmax()
    return int(least) >= 0 and int(most) < len(weights.embeds)


def _is_readable(x: Tensor) -> bool:
    """Return whether its numbers lie where it says: those of another class, as of quantized weights, need not."""
    return type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.is_contiguous()


class Drafting:
    """The rows of one generate() call: owns the hidden state behind the last token of each row."""

    def __init__(self, weights: DraftWeights, num_rows: int) -> None:
        self._weights = weights
        hidden, vocab = weights.embeds.shape[1], len(weights.lm_head)
        inner, width = weights.down.shape[1], weights.num_heads * weights.head_dim
        self.states, self._drafted = _floats(num_rows, hidden), _floats(num_rows, hidden)
        self.logits = _floats(num_rows, vocab)
        self._queries, self._attended = _floats(num_rows, width), _floats(num_rows, width)
        self._middle, self._activated = _floats(num_rows, hidden), _floats(num_rows, inner)
        self._joint = _floats(num_rows)
        self._identity = torch.arange(num_rows, device="cpu")
        self._threads = num_threads()
        self._partials = _floats(self._threads, num_rows, PARTIAL)
        self._grown: dict[str, Tensor] = {}  # by what they are for
        self._attention, self._arguments = dict.fromkeys(ARGUMENTS, 0), dict.fromkeys(DRAFT_ARGUMENTS, 0)
        self._describe()

    def run(
        self,
        held: Held,
        rotations: Tensor,  # [positions, 2, head_dim] float32: cosines and sines, see speculation/heads/layer.py
        first: Entries | None,
        steps: int = 0,
        positions: Tensor | None = None,  # [steps - 1, rows] int64: of the tokens drafted
        slots: Tensor | None = None,  # [steps - 1, rows] int64
        min_confidence: float = 0.0,
    ) -> Tensor:
        """Read `first`, then draft a chain of up to `steps` tokens, shorter where its mean probability falls below.

        `states` are then those behind the last token of `first`, `logits` what the last choice was made from.

        Returns:
            [tokens made, rows] int64 likeliest tokens, in the target's ids.
        """
        num_rows = len(self.states)
        seq_lens = held.seq_lens.clone()
        tokens = torch.empty((max(1, steps), num_rows), dtype=torch.int64, device="cpu")
        count = num_rows if first is None else first.tokens.numel()
        # Of each thread: inputs, and one head of them.
        mine = max(count, num_rows) * (2 * self.states.shape[1] + self._weights.head_dim)
        scratch = self._reserve("scratch", self._threads * mine)
        self._joint.fill_(1.0)
        spec = self._spec(held.k.code)
        attention = self._attend_with(held, seq_lens, spec.attention)
        changing: dict[str, Any] = {
            "num_threads": self._threads if num_threads() > 1 else 1,
            "num_first": 0 if first is None else count,
            "steps": steps,
            "made": 0,
            "is_over": 0,
            "limit": bits_of(min_confidence),
            "tokens": tokens.data_ptr(),
            "positions": 0 if positions is None else positions.data_ptr(),
            "slots": 0 if slots is None else slots.data_ptr(),
            "rotations": rotations.data_ptr(),
            "scratch": scratch.data_ptr(),
            "scratch_thread": 4 * mine,
            "attention": attention.buffer_info()[0],
            "seq_lens": seq_lens.data_ptr(),
        }
        if first is not None:
            fc = self._weights.fc
            if fc is not None and first.features is not self.states:
                combined = self._reserve("combined", count * self.states.shape[1])
                changing |= {"fc": fc.data_ptr(), "combined": combined.data_ptr()}
            names = ("features", "first_tokens", "first_positions", "first_slots", "last")
            changing |= {name: x.data_ptr() for name, x in zip(names, first, strict=True)}
        arguments = array("q", (self._arguments | changing).values())
        _program(spec).run(arguments.buffer_info()[0])
        return tokens[: arguments[DRAFT_ARGUMENTS.index("made")]]

    def _spec(self, store: str) -> DraftSpec:
        w = self._weights
        return DraftSpec(
            0 if w.fc is None else w.fc.shape[1], w.embeds.shape[1], w.down.shape[1],
            w.num_heads, w.num_kv_heads, w.head_dim, len(w.lm_head),
            NAMES[w.qkv.dtype], NAMES[w.embeds.dtype], store, w.is_normed_residual, w.eps, lanes(),
        )  # fmt: skip

    def _describe(self) -> None:
        """The arguments that stay."""
        w = self._weights
        names = ("input_norm", "hidden_norm", "qkv", "o", "post_norm", "gate_up", "down", "norm", "lm_head", "embeds")
        buffers = (
            "states", "logits", "_drafted", "_queries", "_attended", "_middle", "_activated", "_joint", "_partials",
            "_identity",
        )  # fmt: skip
        self._arguments |= {name: x.data_ptr() for name, x in zip(names, (*w[:9], w.embeds), strict=True)}
        self._arguments |= {name.strip("_"): getattr(self, name).data_ptr() for name in buffers}
        self._arguments |= {
            "num_rows": len(self.states),
            "embeds_row": w.embeds.stride(0) * w.embeds.element_size(),
            "d2t": 0 if w.d2t is None else w.d2t.data_ptr(),
        }
        self._attention |= {
            "num_threads": 1,
            "num_kv_heads": w.num_kv_heads,
            "group": w.num_heads // w.num_kv_heads,
            "q_len": 1,
            "run": 1,
            "q": self._queries.data_ptr(),
            "q_batch": w.num_heads * w.head_dim,
            "q_head": w.head_dim,
            "window": NO_WINDOW,
            "is_causal": 1,
            "scale": bits_of(w.head_dim**-0.5 * LOG2E),
            "out": self._attended.data_ptr(),
        }

    def _reserve(self, name: str, size: int) -> Tensor:
        """At least `size` float32 values that stay until more are asked for."""
        known = self._grown.get(name)
        if known is None or known.numel() < size:
            known = self._grown[name] = _floats(size)
        return known

    def _attend_with(self, held: Held, seq_lens: Tensor, spec: Spec) -> "array[int]":
        """The arguments of attention."""
        w, table = self._weights, held.block_table
        splits = -(-(table.shape[1] << held.k.block_shift) // CHUNK)
        num_tasks = len(table) * w.num_kv_heads * splits
        group = w.num_heads // w.num_kv_heads
        padded = -(-group // spec.rows) * spec.rows
        parts = self._reserve("parts", num_tasks * padded * part_items(spec))
        for plane, address in (("k", held.k), ("v", held.v)):
            names = (f"{plane}{axis}" for axis in ("", "_block", "_token", "_head"))
            described = dict(zip(names, address.arguments[:4], strict=True))
            self._attention |= described
            self._arguments |= described
        self._arguments["block_shift"] = held.k.block_shift
        self._attention |= {
            "num_tasks": num_tasks,
            "splits": splits,
            "padded": padded,
            "table": table.data_ptr(),
            "table_row": table.stride(0),
            "block_shift": held.k.block_shift,
            "seq_lens": seq_lens.data_ptr(),
            "parts": parts.data_ptr(),
        }
        return array("q", self._attention.values())


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


@cache
def _program(spec: DraftSpec) -> Any:
    return compiled("draft", spec)
