"""Conversion of published draft heads to the heads of this library.

The layouts, how each is recognized, and the source that defines it:

EAGLE-3 by its authors (yuhuili/EAGLE3-*), SpecForge, AngelSlim, NVIDIA: weights named `midlayer.*`
    pytorch_model.bin or model.safetensors:
        midlayer.self_attn.{q,k,v}_proj.weight   [heads * head_dim, 2 * hidden_size]
        midlayer.self_attn.o_proj.weight, midlayer.mlp.{gate,up,down}_proj.weight
        midlayer.{hidden_norm,input_layernorm,post_attention_layernorm}.weight
        fc.weight                                [hidden_size, 3 * target hidden_size]
        norm.weight, lm_head.weight              [draft_vocab_size, hidden_size]
        d2t [draft_vocab_size] int64, target id minus draft id; t2d [vocab_size] bool
        embed_tokens.weight                      only if the head is not as wide as the target
    config.json: a Llama config with `draft_vocab_size`, `target_hidden_size`
    SafeAILab/EAGLE eagle/model/cnets.py, eagle/traineagle3/cnets.py; vLLM llama_eagle3.py
speculators (RedHatAI, neuralmagic): `speculators_model_type: eagle3`
    the same weights with `layers.0.` for `midlayer.`
    config.json: the Llama config in `transformer_layer_config`; beside it `draft_vocab_size`, `target_hidden_size`,
    `norm_before_residual`, `norm_before_fc`, `fc_norm`, `norm_output`, `eagle_aux_hidden_state_layer_ids`
    vllm-project/speculators models/eagle3/{config,core,model_definitions}.py, convert/eagle/eagle3_converter.py
EAGLE-1 and EAGLE-2 (yuhuili/EAGLE-*): `fc.weight` [hidden_size, 2 * hidden_size] and no `lm_head.weight`
    `layers.0.*` of a Llama layer without input_layernorm, fc.bias, embed_tokens.weight
    SafeAILab/EAGLE eagle/model/cnets1.py
Medusa (FasterDecoding/medusa-*): `0.0.linear.weight`
    medusa_lm_head.pt or .safetensors: i.j.linear.{weight,bias} of block j of head i, and, except in the first layout,
    i.<number of blocks>.weight [vocab_size, hidden_size]
    config.json: `medusa_num_heads`, `medusa_num_layers` (some say 2 heads and hold 5: the weights decide)
    FasterDecoding/Medusa medusa/model/medusa_model.py, medusa_model_legacy.py, train/train_legacy.py
Medusa for vLLM: `blocks.0.layers.0.weight`
    blocks.i.layers.j.weight, lm_heads.i.weight (or one for all), token_map [draft vocabulary] int64
    vLLM model_executor/models/medusa.py

Layer numbers of the target: `eagle_aux_hidden_state_layer_ids` at the top level follows vLLM, where i is the input of
block i, `hidden_states[i]`; inside `eagle_config` (SpecForge, NVIDIA) i is the output of block i,
`hidden_states[i + 1]`. Without either it is (2, n // 2, n - 3) for n blocks.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_kvopt.speculation.heads.base import HeadBase
from hf_kvopt.speculation.heads.config import EagleConfig, MedusaConfig
from hf_kvopt.speculation.heads.eagle import EagleHead
from hf_kvopt.speculation.heads.medusa import MedusaHead

Weights = dict[str, Tensor]
_OF_THE_TARGET = re.compile(r"(^|\.)(verifier_|rotary_emb\.)|inv_freq$")
_LLAMA_FIELDS = (
    "hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "hidden_act",
)
_ROPE_FIELDS = ("rope_parameters", "rope_theta", "rope_scaling")
_NORM_FIELDS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def build(config: dict[str, Any], weights: Weights) -> HeadBase:
    """Build the head that a published configuration and its weights describe, in the dtype of the weights.

    Raises:
        ValueError: the layout is not known, or weights are missing, superfluous or of another shape.
    """
    weights = {name.removeprefix("model."): x for name, x in weights.items() if not _OF_THE_TARGET.search(name)}
    for is_it, convert in _LAYOUTS:
        if is_it(config, weights):
            try:
                head_config, converted = convert(config, weights)
            except KeyError as error:
                raise ValueError(
                    f"a draft head of this layout needs {error}, in its weights or in config.json: got neither; "
                    "download the checkpoint again"
                ) from error
            return _fill(head_config, converted)
    raise ValueError(
        "no draft head of a known layout (EAGLE-3, speculators, EAGLE-1/2, Medusa): got weights named "
        f"{sorted(weights)[:4]} and model_type={config.get('model_type')!r}; see hf_kvopt.speculation.heads.checkpoints"
    )


def _fill(config: EagleConfig | MedusaConfig, weights: Weights) -> HeadBase:
    head: HeadBase = EagleHead(config) if isinstance(config, EagleConfig) else MedusaHead(config)
    floating = [x.dtype for x in weights.values() if x.is_floating_point()]
    nn.Module.to(head, floating[0])
    expected = {name: tuple(x.shape) for name, x in head.state_dict().items()}
    given = {name: tuple(x.shape) for name, x in weights.items()}
    wrong = [f"{n} {given.get(n, 'missing')} instead of {s}" for n, s in expected.items() if given.get(n) != s]
    wrong += [f"{n} {given[n]} not expected" for n in given if n not in expected]
    if wrong:
        raise ValueError(f"weights do not fit the configuration of this {type(head).__name__}: got {'; '.join(wrong)}")
    head.load_state_dict(weights)
    config.dtype = head.dtype
    return head.eval()


def _eagle3(config: dict[str, Any], weights: Weights) -> tuple[EagleConfig, Weights]:
    """Convert the authors' layout; `_speculators` calls it with the nested fields lifted to the top."""
    if "mask_hidden" in weights:
        raise ValueError("a head for parallel drafting (P-EAGLE) is not supported: got weights with mask_hidden")
    weights = {name.replace("midlayer.", "layers.0."): x for name, x in weights.items()}
    fields = _llama_fields(config, weights)
    draft_vocab, vocab = weights["lm_head.weight"].shape[0], config.get("target_vocab_size", config["vocab_size"])
    if "t2d" in weights:
        vocab = len(weights["t2d"])
    if draft_vocab == vocab:
        weights = {name: x for name, x in weights.items() if name not in ("d2t", "t2d")}
    elif "d2t" in weights and "t2d" not in weights:
        weights["t2d"] = torch.zeros(vocab, dtype=torch.bool)
        weights["t2d"][weights["d2t"] + torch.arange(draft_vocab)] = True
    if "t2d" in weights:
        weights["t2d"] = weights["t2d"].bool()
    fields |= {name: config[name] for name in _NORM_FIELDS if name in config}
    layers = _target_layers(config)
    parts = 3 if layers is None else len(layers)
    fields |= {
        "vocab_size": vocab,
        "draft_vocab_size": draft_vocab,
        "target_hidden_size": weights["fc.weight"].shape[1] // parts,
        "target_layer_ids": layers,
    }
    return EagleConfig(**fields), weights


def _speculators(config: dict[str, Any], weights: Weights) -> tuple[EagleConfig, Weights]:
    kind = config["speculators_model_type"]
    if kind != "eagle3":
        raise ValueError(f"of speculators' models only eagle3 is supported: got {kind!r}")
    layer = config["transformer_layer_config"]
    if "sliding_attention" in (layer.get("layer_types") or []):
        raise ValueError("a head with sliding layers is not supported: got layer_types with sliding_attention")
    return _eagle3({**layer, **config}, weights)


def _eagle1(config: dict[str, Any], weights: Weights) -> tuple[EagleConfig, Weights]:
    fields = _llama_fields(config, weights)
    return EagleConfig(**fields, eagle_version=1, vocab_size=config["vocab_size"]), weights


def _llama_fields(config: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """Return the fields common to all EAGLE heads, from weight shapes if possible; fuse `weights` in place."""
    fields = {name: config[name] for name in (*_LLAMA_FIELDS, *_ROPE_FIELDS) if config.get(name) is not None}
    first = "layers.0.self_attn."
    head_dim = weights[first + "q_proj.weight"].shape[0] // config["num_attention_heads"]
    fields |= {
        "head_dim": head_dim,
        "num_key_value_heads": weights[first + "k_proj.weight"].shape[0] // head_dim,
        "intermediate_size": weights["layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": 1 + max(int(n.split(".")[1]) for n in weights if n.startswith("layers.")),
        "attention_bias": first + "q_proj.bias" in weights,
        "mlp_bias": "layers.0.mlp.gate_proj.bias" in weights,
        "fc_bias": "fc.bias" in weights,
        "qk_norm": first + "q_norm.weight" in weights,
        "own_embeddings": "embed_tokens.weight" in weights,
    }
    for idx in range(fields["num_hidden_layers"]):
        _fuse(weights, f"layers.{idx}.")
    return fields


def _fuse(weights: Weights, layer: str) -> None:
    """Fuse q, k and v into one matrix, gate and up into another; add a zero output bias if only q, k and v have one."""
    for fused, parts in (
        ("qkv_proj", [f"self_attn.{n}_proj" for n in "qkv"]),
        ("gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]),
        ("o_proj", ["self_attn.o_proj"]),
        ("down_proj", ["mlp.down_proj"]),
        ("q_norm", ["self_attn.q_norm"]),
        ("k_norm", ["self_attn.k_norm"]),
    ):
        for kind in ("weight", "bias"):
            given = [weights.pop(f"{layer}{part}.{kind}") for part in parts if f"{layer}{part}.{kind}" in weights]
            if given:
                weights[f"{layer}{fused}.{kind}"] = torch.cat(given)
    if layer + "qkv_proj.bias" in weights and layer + "o_proj.bias" not in weights:
        o = weights[layer + "o_proj.weight"]
        weights[layer + "o_proj.bias"] = o.new_zeros(o.shape[0])


def _target_layers(config: dict[str, Any]) -> tuple[int, ...] | None:
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if nested:
        return tuple(layer + 1 for layer in nested)
    return tuple(config.get("eagle_aux_hidden_state_layer_ids") or ()) or None


def _medusa(config: dict[str, Any], weights: Weights) -> tuple[MedusaConfig, Weights]:
    blocks = _grid(weights, r"(\d+)\.(\d+)\.linear\.weight")
    biases = _grid(weights, r"(\d+)\.(\d+)\.linear\.bias")
    lm_heads = _grid(weights, r"(\d+)\.(\d+)\.weight")
    return _medusa_of(config, blocks, biases, [lm_heads[key] for key in sorted(lm_heads)], None)


def _medusa_vllm(config: dict[str, Any], weights: Weights) -> tuple[MedusaConfig, Weights]:
    weights = {name.removeprefix("medusa_heads."): x for name, x in weights.items()}
    blocks = _grid(weights, r"blocks\.(\d+)\.layers\.(\d+)\.weight")
    biases = _grid(weights, r"blocks\.(\d+)\.layers\.(\d+)\.bias")
    num_heads = 1 + max(head for head, _ in blocks)
    names = [f"lm_heads.{i}.weight" for i in range(num_heads)]
    lm_heads = [weights[n] for n in names if n in weights] or [weights["lm_head.weight"]]
    if len(lm_heads) == 1:
        lm_heads = lm_heads * num_heads
    token_map = weights.get("token_map")
    if token_map is not None:
        order = token_map.argsort()
        token_map = token_map[order]
        lm_heads = [x[token_map] if len(x) > len(order) else x[order] for x in lm_heads]
    return _medusa_of(config, blocks, biases, lm_heads, token_map)


def _medusa_of(
    config: dict[str, Any],
    blocks: dict[tuple[int, int], Tensor],
    biases: dict[tuple[int, int], Tensor],
    lm_heads: list[Tensor],
    token_map: Tensor | None,
) -> tuple[MedusaConfig, Weights]:
    num_heads, num_layers = (1 + max(key[i] for key in blocks) for i in range(2))
    hidden = blocks[0, 0].shape[0]
    order = [[(head, layer) for head in range(num_heads)] for layer in range(num_layers)]
    missing = [key for keys in order for key in keys if key not in blocks]
    if missing or len(lm_heads) not in (0, num_heads):
        raise ValueError(f"Medusa weights must be complete: got {num_heads} heads, without {missing or 'LM heads'}")
    zeros = blocks[0, 0].new_zeros(hidden)
    converted: Weights = {
        "block_weight": torch.stack([torch.stack([blocks[key] for key in keys]) for keys in order]),
        "block_bias": torch.stack([torch.stack([biases.get(key, zeros)[None] for key in keys]) for keys in order]),
    }
    draft_vocab = len(lm_heads[0]) if lm_heads else 0
    if lm_heads:
        converted["lm_weight"] = torch.stack(lm_heads)
    vocab = config.get("vocab_size") or draft_vocab
    if token_map is not None and draft_vocab < vocab:
        converted["d2t"] = token_map - torch.arange(draft_vocab)
        converted["t2d"] = torch.zeros(vocab, dtype=torch.bool)
        converted["t2d"][token_map] = True
    return (
        MedusaConfig(
            vocab_size=vocab,
            draft_vocab_size=draft_vocab,
            hidden_size=hidden,
            medusa_num_heads=num_heads,
            medusa_num_layers=num_layers,
            shared_lm_head=not lm_heads,
        ),
        converted,
    )


def _grid(weights: Weights, pattern: str) -> dict[tuple[int, int], Tensor]:
    """Return weights by the two numbers in their names."""
    found = ((re.fullmatch(pattern, name), x) for name, x in weights.items())
    return {(int(match[1]), int(match[2])): x for match, x in found if match}


Convert = Callable[[dict[str, Any], Weights], tuple[EagleConfig | MedusaConfig, Weights]]
_LAYOUTS: tuple[tuple[Callable[[dict[str, Any], Weights], bool], Convert], ...] = (
    (lambda config, _: "speculators_model_type" in config, _speculators),
    (lambda _, weights: "0.0.linear.weight" in weights, _medusa),
    (lambda _, weights: any(n.endswith("blocks.0.layers.0.weight") for n in weights), _medusa_vllm),
    (lambda _, weights: {"lm_head.weight", "fc.weight", "norm.weight"} <= weights.keys(), _eagle3),
    (lambda _, weights: {"layers.0.self_attn.q_proj.weight", "fc.weight"} <= weights.keys(), _eagle1),
)
