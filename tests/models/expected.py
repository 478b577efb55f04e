"""What is refused or not paged, with reasons; whatever is not listed gives the eager tokens from blocks."""


def _all(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


OWN_CACHE = "keeps its past in a cache of its own, or keeps none"
WRITTEN_IN = "attention is written into the model; `enable(model, attention=False)` pages its cache"
SPARSE = "attends to a sparse selection of keys"

# Refused by `hf_kvopt.enable(model, cache="paged")`.
REFUSED = {
    **_all("axk2 deepseek_v32 dots3_note dots3_note_text glm_moe_dsa hy_v4 minimax_m3_vl_text", SPARSE),
    **_all("falcon_mamba mamba mamba2 minimax openai-gpt reformer rwkv xlm xlnet xlstm", OWN_CACHE),
    **_all(
        "big_bird bloom codegen cpmant falcon gpt_neo gpt_neox_japanese gptj megatron-bert mpt mvp prophetnet rembert "
        "roformer trocr xglm LEDForConditionalGeneration MvpForConditionalGeneration "
        "ProphetNetForConditionalGeneration",
        WRITTEN_IN,
    ),
}

# Refused by `hf_kvopt.enable(model, cache="paged", attention=False)`.
REFUSED_ALONE = {name: reason for name, reason in REFUSED.items() if reason == OWN_CACHE}

# Exact tokens, but keys and values stay in transformers' own layers.
NOT_PAGED = {
    **_all("axk2 deepseek_v32 glm_moe_dsa hy_v4 qwen4_exp qwen4_exp_text", "layers with an indexer"),
    **_all("deepseek_v4", "compressed layers"),
    **_all("musicgen_melody", "`generate` leaves the cache to the model; hand one over"),
}

# Layers that slide by what their cache forgets, so that the cache must know the configuration.
NEED_CONFIG = {"moshi"}


# Models of keys and values alone for which reading several tokens at once is not what reading them one by one is, or
# of which transformers feeds more than tokens at every step.
NOT_DRAFTED = {
    **_all("openai-gpt reformer rwkv xlm xlnet xlstm cpmant", OWN_CACHE),
    **_all("moshi", "slides by what its cache forgets"),
    **_all("doge", "chooses among equal values by how many there are"),
    **_all("prophetnet", "takes one token at a time"),
    **_all("Qwen2VLForConditionalGeneration", "positions along several axes"),
    **_all("MllamaForConditionalGeneration", "a mask over the image that grows with the text"),
}
