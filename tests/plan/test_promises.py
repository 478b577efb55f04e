"""The code of a plan runs, batch after batch, and takes the predicted memory."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_kvopt
from hf_kvopt.plan import Device, Plan, plan
from hf_kvopt.plan.model_config import load_config
from tests.models.routes import _spy_on_cache
from tests.plan.published import PUBLISHED
from tests.plan.test_planner import CPU

GPU = Device("pretended", 2 * 10**9, 2e12, 1e14, (9, 0), "made up")
SMALL = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "sliding_window": 24,
    "sliding_window_pattern": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
}
VISION = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "image_size": 28,
}


def shrink(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the config with few and narrow layers."""
    known = fields.get("text_config", fields)
    small = {name: value for name, value in SMALL.items() if name in known or name.endswith("token_id")}
    small["dtype"] = small["torch_dtype"] = "float32"
    if "kv_lora_rank" in known:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "layer_types" in known:
        small["layer_types"] = known["layer_types"][:4]
    text = {name: value for name, value in known.items() if name not in ("quantization_config", "head_dim")} | small
    if "text_config" not in fields:
        return text
    vision = fields["vision_config"] | VISION
    return fields | {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4, "torch_dtype": "float32"}


@pytest.fixture(scope="module", params=list(PUBLISHED))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    config = load_config(copy.deepcopy(shrink(PUBLISHED[request.param])))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def rows(batch: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 120, (batch, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run(made: Plan, folder: Path, inputs: dict[str, torch.Tensor]) -> tuple[PreTrainedModel, list[Any], dict[str, Any]]:
    """Run the lines of a plan on a CPU; return the model, the caches that it made, and the defined names."""
    lines = [line.replace('device_map="cuda"', 'device_map="cpu"') for line in made.code]
    scope: dict[str, Any] = {"name": str(folder), "inputs": inputs}
    at = next(i for i, line in enumerate(lines) if "hf_kvopt.enable" in line) + 1
    exec("\n".join(lines[:at]), scope)
    caches = _spy_on_cache(scope["model"])
    # transformers asks for a pad token if no text ends.
    exec("\n".join(lines[at:]).replace("generate(", "generate(pad_token_id=0, "), scope)
    return scope["model"], caches, scope


@pytest.mark.parametrize(
    ("context", "batch", "workload"),
    [(38, 1, "chat"), (45, 3, "document"), (32, 2, "agent"), (41, 3, "batch"), (21, 9, "code")],
)
def test_the_lines_of_a_plan_take_what_it_predicts(folder: Path, context: int, batch: int, workload: str) -> None:
    for device in (CPU, GPU):
        made = plan(str(folder), device=device, context=context, batch=batch, workload=workload, dtype="float32")
        new = int(made.code[-1].split("max_new_tokens=")[1].split(",")[0].rstrip(")"))
        inputs = rows(batch, context - new, seed=1)
        model, caches, scope = run(made, folder, inputs)
        assert scope["out"].shape == (batch, context)
        if made.option.shares_prefix:
            _hold_store(made, model, context - new, new)
        else:
            stats = caches[0].stats()
            assert stats.reserved_bytes <= made.predicted.most_kv_bytes
            is_exact = made.option.is_compiled or not any("sliding" in kind for kind in _kinds(model))
            if is_exact and made.option.draft == "none":
                assert stats.reserved_bytes == made.predicted.most_kv_bytes
        hf_kvopt.disable(model)


def _kinds(model: PreTrainedModel) -> list[str]:
    return getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []


def _hold_store(made: Plan, model: PreTrainedModel, length: int, new: int) -> None:
    """Fill the store up to its cap with other batches, and with texts that diverge in the middle of a block."""
    store = hf_kvopt.prefix_store(model)
    for seed in (1, 2, 3, 4, 5, 6):
        inputs = rows(made.batch, length, seed)
        if seed == 3:
            inputs = rows(made.batch, length, seed=2)
            inputs["input_ids"][:, -length // 3 :] = 7
        out = model.generate(**inputs, max_new_tokens=new, pad_token_id=0)
        assert out.shape == (made.batch, length + new)
        stats = store.stats()
        assert stats.reserved_bytes <= made.predicted.most_kv_bytes
    # A full store took the predicted bytes, and shared what was repeated.
    assert stats.reserved_bytes == made.predicted.most_kv_bytes
    assert stats.hits > 0
