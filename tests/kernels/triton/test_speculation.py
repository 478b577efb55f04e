"""Whole speculative `generate()` calls through the Triton kernels: target and head, a tree and chains of a batch."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_kvopt
from hf_kvopt.kernels.triton.optional import INTERPRET
from hf_kvopt.speculation.heads.config import EagleConfig
from hf_kvopt.speculation.heads.eagle import EagleHead

SHAPE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "initializer_range": 0.2,
}  # fmt: skip
PLANS = {
    "a tree": (1, {"gamma": 3, "num_nodes": 6, "top_k": 3}),
    "chains of two rows": (2, {"gamma": 3, "num_nodes": 0}),
}


class TrueLevels(EagleHead):
    """A head that is told what the target will say, so that drafts are kept: random weights guess nothing right."""

    truth: torch.Tensor
    prompt_len: int

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        spread = super().logits(hidden)
        return spread + 20 * torch.nn.functional.one_hot(self.truth[self.prompt_len :], 97).amax(0)


@pytest.mark.parametrize(("batch", "plan"), PLANS.values(), ids=PLANS)
def test_speculation_gives_the_eager_tokens(batch, plan):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=2)).eval()
    model.generation_config.eos_token_id = None
    head = TrueLevels(EagleConfig(**SHAPE, draft_vocab_size=97, target_layer_ids=(0, 1, -1))).eval()
    ids, mask = torch.randint(3, 97, (batch, 14)), torch.ones(batch, 14, dtype=torch.long)
    mask[1:, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    model.set_attn_implementation("eager")
    want = model.generate(ids, **options)
    head.truth, head.prompt_len = want[0], 14
    model.set_attn_implementation("hf_kvopt")
    spec = hf_kvopt.speculative(head, **plan, fallback=False)
    got = model.generate(ids, custom_generate=spec, **options)
    assert INTERPRET
    assert torch.equal(got, want)
    assert spec.stats.steps > 0
    assert spec.stats.mean_accepted_length > 1
