"""Steps of an EAGLE-3 head in the compiled CPU kernel: read new tokens, then draft a chain after them.

The results differ from torch's by rounding only, and only drafts depend on them.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.kernels.cpu.draft import Drafting, DraftWeights, Entries, Held, can_draft
from hf_kvopt.speculation.drafters.base import Draft, Plan, Read, Sampler
from hf_kvopt.speculation.heads.growth import ChainGrowth

if TYPE_CHECKING:
    from hf_kvopt.speculation.heads.eagle import EagleHead


def weights_of(head: "EagleHead") -> DraftWeights | None:
    """Return the weights for the kernel, or None if the head needs torch."""
    layer: Any = head.layers[0]
    embedding: Any = head.embed_tokens or head.shared.embeddings
    is_plain = len(head.layers) == 1 and layer.is_wide and layer.q_norm is None and layer.act is F.silu
    lm_weight = head.lm_weight
    if not is_plain or head.norm is None or lm_weight is None or head.norms_output:
        return None
    linears = [layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj]
    if head.lm_head is not None:
        linears.append(head.lm_head)
    # A subclass, a bias or a hook changes the computation.
    if not all(_is_plain(linear) for linear in linears) or not _is_lookup(embedding):
        return None
    if any(_has_hooks(module) for module in (head, layer, embedding)):
        return None
    has_plain_fc = _is_plain(head.fc) and head.input_norm is None and head.fc_norm is None
    weights = DraftWeights(
        layer.input_layernorm.weight,
        layer.hidden_norm.weight,
        layer.qkv_proj.weight,
        layer.o_proj.weight,
        layer.post_attention_layernorm.weight,
        layer.gate_up_proj.weight,
        layer.down_proj.weight,
        head.norm.weight,
        lm_weight,
        embedding.weight,
        head.fc.weight if has_plain_fc else None,
        head.d2t,
        layer.num_heads,
        layer.num_kv_heads,
        layer.head_dim,
        layer.norm_before_residual,
        head.config.rms_norm_eps,
    )
    # Detach now: a head that is cast or moved while it drafts gets new memory and frees this one.
    weights = DraftWeights._make(x.detach() if isinstance(x, Tensor) else x for x in weights)
    return weights if can_draft(weights) else None


def _is_plain(linear: nn.Module) -> bool:
    return type(linear) is nn.Linear and linear.bias is None and not _has_hooks(linear)


def _is_lookup(embedding: nn.Module) -> bool:
    return type(embedding) is nn.Embedding and embedding.max_norm is None


def _has_hooks(module: nn.Module) -> bool:
    return hasattr(module, "_hf_hook") or bool(module._forward_hooks) or bool(module._forward_pre_hooks)


class CompiledSteps:
    """Runs an EAGLE head in the compiled kernel; owns noted tokens and the last hidden states.

    The session removes the columns that this adds to its cache, except `read.counts` tokens of each row.

    Args:
        head: the head, bound to its target.
        weights: its weights, from `weights_of`.
        cache: the session's cache, with one layer that holds tokens.
        num_rows: rows of the batch.
    """

    def __init__(self, head: "EagleHead", weights: DraftWeights, cache: PagedCache, num_rows: int) -> None:
        self._head, self._weights, self._num_rows = head, weights, num_rows
        self._layer: Any = cache.layers[0]
        self._drafting = Drafting(weights, num_rows)
        self._identity = torch.arange(num_rows, device="cpu")
        self._read: Read | None = None

    def note(self, read: Read) -> None:
        """Remember tokens to read with the next draft."""
        self._read = read

    @property
    def has_read(self) -> bool:
        """Return whether noted tokens were not computed yet."""
        return self._read is not None

    def settle(self) -> tuple[Tensor, int]:
        """Read the noted tokens; return the last hidden states [batch, 1, hidden_size] and the columns added."""
        read, self._read = self._read, None
        width = 0 if read is None else read.tokens.shape[1]
        if read is not None:
            counts = _counts_of(read)
            held, slots = self._room_for(width, counts)
            self._drafting.run(held, self._rotations(read.positions, 1), self._entries(read, slots, counts))
        return self._drafting.states[:, None].to(self._head.dtype, copy=True), width

    def chain(self, hidden: Tensor | None, position: Tensor, plan: Plan, sample: Sampler) -> tuple[Draft, int]:
        """Draft a chain after the root of each row; return it with the number of columns it added.

        `hidden` [batch, 1, hidden_size] is the state to continue from if torch read the last tokens, else None;
        `position` [batch, 1] is the position of the last token.
        """
        gamma = min(plan.gamma, plan.num_nodes)
        read, self._read = self._read, None
        width = 0 if read is None else read.tokens.shape[1]
        counts = None if read is None else _counts_of(read)
        held, slots = self._room_for(width + gamma - 1, counts)
        # Padding also gets positions, after that of the last token.
        rotations = self._rotations(position, gamma + width)
        positions = (position + torch.arange(1, gamma, device="cpu")).T.contiguous()
        entries = None
        if hidden is not None:
            self._drafting.states.copy_(hidden[:, 0])
        if read is not None and counts is not None:
            entries = self._entries(read, slots, counts)
            slots = slots.gather(1, counts[:, None] + torch.arange(gamma - 1, device="cpu"))
        drafted = slots.T.contiguous()
        if sample.is_greedy:
            tokens = self._drafting.run(held, rotations, entries, gamma, positions, drafted, plan.min_confidence)
            return Draft(tokens.T), width + gamma - 1
        chain = ChainGrowth(self._head, self._num_rows, plan.min_confidence, sample)
        for depth in range(gamma):
            self._drafting.run(held, rotations, entries, 1)
            if depth == 0:
                states = self._drafting.states.clone()
            if not chain.add(self._drafting.logits) or depth + 1 == gamma:
                break
            given = chain.tokens[-1].contiguous(), positions[depth], drafted[depth]
            entries = Entries(self._drafting.states, *given, self._identity)
            held = held._replace(seq_lens=held.seq_lens + 1)
        self._drafting.states.copy_(states)
        draft = chain.draft(position.device)
        return draft, width + gamma - 1

    def _room_for(self, num_tokens: int, counts: Tensor | None) -> tuple[Held, Tensor]:
        """Reserve `num_tokens` columns for each row; return the cache, less what is read first, and the slots."""
        layer, device = self._layer, self._identity.device
        layer.claim(self._num_rows, num_tokens)
        blocks, lens, _ = layer.table.rows_on(device)
        lens = lens - num_tokens
        if counts is not None:
            lens += counts
        held = Held(layer.pool.keys.stored.address, layer.pool.values.stored.address, blocks, lens)
        return held, layer.table.slots(layer.clock - num_tokens, layer.clock, device)

    def _entries(self, read: Read, slots: Tensor, counts: Tensor) -> Entries:
        """Return all of `read`, padding included: what padding writes is overwritten or cropped before it is read."""
        assert read.features is not None  # as in EagleSession.extend
        width = read.tokens.shape[1]
        features = read.features if self._weights.fc is not None else self._head.combine(read.features)
        last = self._identity * width + counts - 1
        return Entries(
            features.float().contiguous(),
            read.following.contiguous(),
            read.positions.contiguous(),
            slots[:, :width].contiguous(),
            last,
        )

    def _rotations(self, positions: Tensor, more: int) -> Tensor:
        """Return rotations [positions, 2, head_dim] float32 that cover `positions` and `more` after them."""
        length = int(positions.max()) + more
        return self._head.rotary.reserve(length, self._identity.device, torch.float32)


def _counts_of(read: Read) -> Tensor:
    """Return the token counts as a CPU tensor [batch] int64."""
    return torch.tensor(read.counts, device="cpu")
