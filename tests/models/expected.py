"""What is refused or not paged, with reasons; whatever is not listed gives the eager tokens from blocks."""

import inspect

from transformers import PreTrainedModel

import hf_kvopt
from tests.models.cases import causal_cases
from tests.models.kinds import layer_kinds


def _all(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


OWN_CACHE = "keeps its past in a cache of its own, or keeps none"
WRITTEN_IN = "attention written into the model"
SPARSE = "a sparse selection of keys"


def _class_of(name: str) -> type[PreTrainedModel]:
    return next(case.model_class for case in causal_cases() if case.name == name)


# What transformers changed over the versions is asked of its classes.
_XLM_TAKES_A_CACHE = hf_kvopt.CACHE_KEYWORD in inspect.signature(_class_of("xlm").forward).parameters
_ONCE_WRITTEN_IN = [name for name in ("codegen", "gptj") if not _class_of(name)._can_set_attn_implementation()]

# Refused by `hf_kvopt.enable(model, cache="paged")`, whatever is said of the attention.
REFUSED = _all("falcon_mamba mamba mamba2 minimax openai-gpt reformer rwkv xlnet xlstm", OWN_CACHE) | (
    {} if _XLM_TAKES_A_CACHE else {"xlm": OWN_CACHE}
)

# `enable` keeps the model's own attention, and refuses `attention=True`.
OWN_ATTENTION = {
    **_all("axk2 deepseek_v32 dots3_note dots3_note_text glm_moe_dsa hy_v4 minimax_m3_vl_text", SPARSE),
    **({"xlm": WRITTEN_IN} if _XLM_TAKES_A_CACHE else {}),
    **dict.fromkeys(_ONCE_WRITTEN_IN, WRITTEN_IN),
    **_all(
        "big_bird bloom cpmant falcon gpt_neo gpt_neox_japanese megatron-bert mpt mvp prophetnet rembert "
        "roformer trocr xglm LEDForConditionalGeneration MvpForConditionalGeneration "
        "ProphetNetForConditionalGeneration",
        WRITTEN_IN,
    ),
}

# Exact tokens, but keys and values stay in transformers' own layers.
NOT_PAGED = {
    **_all("axk2 deepseek_v32 glm_moe_dsa hy_v4 qwen4_exp qwen4_exp_text", "layers with an indexer"),
    **_all("deepseek_v4", "compressed layers"),
    **_all("musicgen_melody", "`generate` leaves the cache to the model; hand one over"),
}

# Refused by the first decode step: where the config does not tell recurrent blocks from sliding ones, transformers 5.19
# asks an empty layer of the cache for the sizes of its mask.
_TELLS_STATES = "states" in layer_kinds(next(case for case in causal_cases() if case.name == "recurrent_gemma"))
MISMASKED = set() if _TELLS_STATES else {"recurrent_gemma"}

# Layers that slide by what their cache forgets, so that the cache must know the configuration.
NEED_CONFIG = {"moshi"}


# Models whose layers can be taken back, but which keep their past elsewhere, for which reading several tokens at once
# is not what reading them one by one is, or of which transformers feeds more than tokens at every step.
NOT_DRAFTED = {
    **_all("openai-gpt reformer rwkv xlm xlnet xlstm cpmant falcon_mamba mamba mamba2 minimax", OWN_CACHE),
    **_all("recurrent_gemma", "keeps states in its modules"),
    **_all("moshi", "slides by what its cache forgets"),
    **_all("doge", "chooses among equal values by how many there are"),
    **_all("prophetnet", "takes one token at a time"),
    **_all("Qwen2VLForConditionalGeneration", "positions along several axes"),
    **_all("MllamaForConditionalGeneration", "a mask over the image that grows with the text"),
}


# Models with states of which `PrefixStore` shares no prefixes.
NOT_SHARED = {
    **_all("falcon_mamba mamba mamba2 minimax", OWN_CACHE),
    **_all("recurrent_gemma", "keeps states in its modules"),
    **_all("jamba zamba", "forgets its states where several tokens are read at once"),
    **_all("qwen4_exp qwen4_exp_text", "layers with an indexer"),
}
