"""Configurations of the draft heads."""

from transformers import PreTrainedConfig


class EagleConfig(PreTrainedConfig):
    """Configuration of an EAGLE head: a small decoder over the target's features and the embedded next token.

    Args:
        vocab_size: size of the target's vocabulary.
        draft_vocab_size: tokens that the head can propose; 0: all of the target's.
        target_hidden_size: width of the target; 0: the head's own.
        target_layer_ids: indices of the target's `hidden_states` to read: 0 the embeddings, i the output of block i, -1
            the output of the final norm. None: for EAGLE-3 (2, n // 2, n - 3) of n blocks, as its authors chose; for
            EAGLE-1 (-1,).
        eagle_version: 3, or 1 for heads of EAGLE-1 and EAGLE-2, which share one architecture.
        own_embeddings: the head has its own embeddings instead of the target's.
        own_lm_head: an EAGLE-3 head has its own LM head; without one it reads out by the rows of the target's that its
            draft vocabulary names, which are neither trained nor saved.
        norm_before_residual: the residual is the normed feature (`speculators`).
        norm_before_fc: one norm over the concatenated features (`speculators`).
        fc_norm: one norm for each feature (`speculators`).
        norm_output: the state that is fed back is the output of the final norm (`speculators`, EAGLE-3.1).
        qk_norm: queries and keys are normed for each attention head, as in Qwen3.
        fc_bias: `fc` has a bias (usual in EAGLE-1).

    The other fields mean the same as in `LlamaConfig`, with 0 in place of None.

    Raises:
        ValueError: the values are inconsistent.
    """

    model_type = "hf_kvopt_eagle"

    vocab_size: int = 32000
    draft_vocab_size: int = 0
    hidden_size: int = 4096
    target_hidden_size: int = 0
    target_layer_ids: list[int] | tuple[int, ...] | None = None
    eagle_version: int = 3
    own_embeddings: bool = False
    own_lm_head: bool = True
    intermediate_size: int = 14336
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rope_parameters: dict | None = None  # type: ignore[type-arg]
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
        """Number of target layers that are read."""
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
    """Configuration of Medusa heads: head i proposes the i-th token after the next one.

    Args:
        vocab_size: size of the target's vocabulary; 0: unknown, allowed with shared_lm_head.
        draft_vocab_size: tokens that the heads can propose; 0: all of the target's.
        hidden_size: width of the target and of the heads.
        medusa_num_heads: number of heads, the depth of a draft.
        medusa_num_layers: residual blocks of each head.
        shared_lm_head: the blocks feed the target's LM head instead of one for each head (Medusa's first layout, whose
            checkpoints hold only blocks).

    Raises:
        ValueError: the values are inconsistent.
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
