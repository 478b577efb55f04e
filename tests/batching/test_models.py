"""Which models are batched, with equal tokens, and which are refused by one clear error."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_kvopt import UnsupportedModel, generate_many
from tests.batching.texts import alone
from tests.models.cases import covered_cases
from tests.models.tiny import build

ROOT = Path(__file__).parents[2]
CASES = {case.name: case for case in covered_cases()}
# Full, sliding, chunked and latent attention, sinks, soft caps, shared keys, experts, learned and rotary positions.
PACKED = (
    "llama", "gpt2", "mistral", "qwen3_moe", "gemma2", "gemma3_text", "gemma3n_text", "gpt_oss", "deepseek_v3",
    "llama4_text", "cohere2", "roberta", "phi3",
)  # fmt: skip
REFUSED = {
    "bloom": "takes no position_ids",
    "qwen3_next": "linear_attention",
    "lfm2": "conv",
    "falcon_h1": "hybrid",
    "mamba": "keeps its past in a cache of its own",
    "deepseek_v32": "indexed_attention",
    "dory": "several times",
    "xglm": "attention written into the model",
    "moshi": "leaves it to its cache",
    "diffllama": "outside of its attention",
    "gemma4_unified": "neither causal",
}


@pytest.mark.parametrize("name", [name for name in PACKED if name in CASES])
def test_models_are_batched_with_equal_tokens(name: str) -> None:
    model = build(CASES[name], "eager")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 100, (n,), generator=generator).tolist() for n in (5, 23, 9, 17)]
    want = [alone(model, prompt, max_new_tokens=14) for prompt in prompts]
    assert generate_many(model, prompts, max_new_tokens=14, do_sample=False, max_rows=3, prefill_chunk=8) == want


@pytest.mark.parametrize("name", [name for name in REFUSED if name in CASES])
def test_models_that_cannot_be_packed_are_refused_at_once(name: str) -> None:
    model = build(CASES[name], "eager")
    with pytest.raises(UnsupportedModel, match=REFUSED[name]):
        generate_many(model, [[5, 6, 7]])
    assert model.config._attn_implementation == "eager"


def test_coarse_formats_are_not_taken_for_neighbours_that_matter() -> None:
    model = AutoModelForCausalLM.from_pretrained(ROOT / "evals/reference_model/model", dtype="float32")
    assert generate_many(model, [[5, 6, 7]], cache="int8", max_new_tokens=2, do_sample=False)
