"""Registration of `attn_implementation="hf_kvopt"` with transformers: the attention and its mask together."""

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from hf_kvopt.attention.forward import attention_forward
from hf_kvopt.attention.mask import lazy_mask

ATTENTION_NAME = "hf_kvopt"


def register() -> None:
    """Register the attention and its mask, unless the name is taken."""
    if ATTENTION_NAME not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(ATTENTION_NAME, attention_forward)
    if ATTENTION_NAME not in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(ATTENTION_NAME, lazy_mask)
