"""What is refused or not paged, with reasons; whatever is not listed gives the eager tokens from blocks."""


def _all(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


OWN_CACHE = "keeps its past in a cache of its own, or keeps none"
WRITTEN_IN = "attention written into the model"
SPARSE = "a sparse selection of keys"

# Refused by `hf_kvopt.enable(model, cache="paged")`, whatever is said of the attention.
REFUSED = _all("falcon_mamba mamba mamba2 minimax openai-gpt reformer rwkv xlm xlnet xlstm", OWN_CACHE)

# `enable` keeps the model's own attention, and refuses `attention=True`.
OWN_ATTENTION = {
    **_all("axk2 deepseek_v32 dots3_note dots3_note_text glm_moe_dsa hy_v4 minimax_m3_vl_text", SPARSE),
    **_all(
        "big_bird bloom codegen cpmant falcon gpt_neo gpt_neox_japanese gptj megatron-bert mpt mvp prophetnet rembert "
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

# Layers that slide by what their cache forgets, so that the cache must know the configuration.
NEED_CONFIG = {"moshi"}
