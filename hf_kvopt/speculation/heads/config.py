"""Configurations of the draft heads: what a head needs to know about itself and about the model it drafts for."""

from transformers import PreTrainedConfig


class EagleConfig(PreTrainedConfig):
    """An EAGLE head: a decoder of one layer (or few) over the target's features and the embedded next token.

    Args:
        vocab_size: the target's vocabulary.
        draft_vocab_size: tokens that the head can propose; 0: all of the target's.
        target_hidden_size: width of the target; 0: the head's own.
        target_layer_ids: which of the target's `hidden_states` are read: 0 the embeddings, i what leaves block i,
            -1 what leaves the final norm. None: for EAGLE-3 the authors' choice, (2, n // 2, n - 3) of a target with n
            blocks; for EAGLE-1 (-1,).
        eagle_version: 3, or 1 for the heads of EAGLE-1 and EAGLE-2, which are the same network.
        own_embeddings: the head has embeddings of its own; else it looks up the target's.
        norm_before_residual: the residual is taken behind the norm of the feature (`speculators`).
        norm_before_fc: one norm over the concatenated features (`speculators`).
        fc_norm: one norm for each of the features (`speculators`).
        norm_output: what is fed back is behind the final norm (`speculators`, EAGLE-3.1).
        qk_norm: queries and keys are normed by head, as in Qwen3.
        fc_bias: whether `fc` has a bias (EAGLE-1: usually).

    The other fields mean what they mean in `LlamaConfig`, with 0 for its None.

    Raises:
        ValueError: values that do not go together.
    """

    model_type = "hf_kvopt_eagle"

    vocab_size: int = 32000
    draft_vocab_size: int = 0
    hidden_size: int = 4096
    target_hidden_size: int = 0
    target_layer_ids: list[int] | tuple[int, ...] | None = None
    eagle_version: int = 3
    own_embeddings: bool = False
    intermediate_size: int = 14336
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    fc_bias: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        self.draft_vocab_size = self.draft_vocab_size or self.vocab_size
        self.target_hidden_size = self.target_hidden_size or self.hidden_size
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.eagle_version == 1 and self.target_layer_ids is None:
            self.target_layer_ids = (-1,)
        super().__post_init__(**kwargs)
        self._check()

    @property
    def num_features(self) -> int:
        """Layers of the target that are read."""
        return 3 if self.target_layer_ids is None else len(self.target_layer_ids)

    def _check(self) -> None:
        if self.eagle_version not in (1, 3):
            raise ValueError(f"eagle_version must be 3, or 1 for EAGLE-1 and EAGLE-2: got {self.eagle_version}")
        if self.eagle_version == 1 and self.num_features != 1:
            raise ValueError(
                f"an EAGLE-1 head reads one layer of the target: got target_layer_ids={self.target_layer_ids}; pass "
                "(-1,), or eagle_version=3"
            )
        if self.eagle_version == 1 and self.draft_vocab_size != self.vocab_size:
            raise ValueError(
                f"an EAGLE-1 head proposes all {self.vocab_size} tokens by the target's LM head: got "
                f"draft_vocab_size={self.draft_vocab_size}; drop it, or use eagle_version=3"
            )
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"draft_vocab_size must be at most the target's vocab_size {self.vocab_size}: got "
                f"{self.draft_vocab_size}"
            )
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm exclude each other: got both; keep one")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads: got {self.num_attention_heads} and "
                f"{self.num_key_value_heads}"
            )


class MedusaConfig(PreTrainedConfig):
    """Medusa: head i proposes the i-th token behind the next one, all from the last hidden state of the target.

    Args:
        vocab_size: the target's vocabulary; 0: not known, with shared_lm_head.
        draft_vocab_size: tokens that the heads can propose; 0: all of the target's.
        hidden_size: width of the target and of the heads.
        medusa_num_heads: tokens that are proposed.
        medusa_num_layers: residual blocks a head.
        shared_lm_head: the blocks are followed by the target's own LM head instead of one a head (Medusa's first
            layout, whose checkpoints hold blocks alone).

    Raises:
        ValueError: values that do not go together.
    """

    model_type = "hf_kvopt_medusa"

    vocab_size: int = 32000
    draft_vocab_size: int = 0
    hidden_size: int = 4096
    medusa_num_heads: int = 4
    medusa_num_layers: int = 1
    shared_lm_head: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: object) -> None:
        self.draft_vocab_size = self.draft_vocab_size or self.vocab_size
        super().__post_init__(**kwargs)
        if self.draft_vocab_size > self.vocab_size or (self.shared_lm_head and self.draft_vocab_size < self.vocab_size):
            raise ValueError(
                f"draft_vocab_size must be at most the target's vocab_size {self.vocab_size}, and just that with "
                f"shared_lm_head: got {self.draft_vocab_size} and shared_lm_head={self.shared_lm_head}"
            )
        if self.medusa_num_heads < 1 or self.medusa_num_layers < 1:
            raise ValueError(
                f"Medusa needs at least one head of one layer: got {self.medusa_num_heads} heads of "
                f"{self.medusa_num_layers}"
            )
