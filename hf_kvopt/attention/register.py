"""Registration of `attn_implementation="hf_kvopt"` with transformers: the attention and its mask together."""

from hf_kvopt import compat
from hf_kvopt.attention.forward import attention_forward
from hf_kvopt.attention.mask import lazy_mask

ATTENTION_NAME = "hf_kvopt"


def register() -> None:
    """Register the attention and its mask, unless the name is taken."""
    compat.register_attention(ATTENTION_NAME, attention_forward, lazy_mask)
