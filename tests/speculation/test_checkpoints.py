"""Published layouts, as synthetic files with exactly their names, shapes and configuration fields."""

import json
from fnmatch import fnmatch

import pytest
import torch
from safetensors.torch import save_file

import hf_kvopt
from hf_kvopt.speculation.heads.eagle import EagleHead
from hf_kvopt.speculation.heads.medusa import MedusaHead
from tests.helpers import VOCAB, eager_tokens, generate, prompt, tiny_model
from tests.speculation.heads import DRAFT_VOCAB, HIDDEN, features_of, tiny_head

pytestmark = pytest.mark.usefixtures("one_thread")

# The configuration of yuhuili/EAGLE3-*: a Llama config with two more fields.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": VOCAB,
}


def unfused(head: EagleHead, prefix: str) -> dict[str, torch.Tensor]:
    """Return the weights of a head under the published names, layer 0 under `prefix`."""
    published = {}
    for name, x in head.state_dict().items():
        if name.startswith("layers."):
            _, idx, rest = name.split(".", 2)
            module, kind = rest.rsplit(".", 1)
            where = f"{prefix}." if idx == "0" else f"layers.{idx}."
            if module == "qkv_proj":
                for part, rows in zip("qkv", x.split([32, 16, 16]), strict=True):
                    published[f"{where}self_attn.{part}_proj.{kind}"] = rows.clone()
            elif module == "gate_up_proj":
                for part, rows in zip(("gate", "up"), x.chunk(2), strict=True):
                    published[f"{where}mlp.{part}_proj.{kind}"] = rows.clone()
            elif module in ("o_proj", "q_norm", "k_norm"):
                published[f"{where}self_attn.{rest}"] = x.clone()
            elif module == "down_proj":
                published[f"{where}mlp.{rest}"] = x.clone()
            else:
                published[where + rest] = x.clone()
        else:
            published[name] = x.clone()
    return published


def write(folder, config, weights, file="model.safetensors"):
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file({name: x.contiguous() for name, x in weights.items()}, folder / file)
    else:
        torch.save(weights, folder / file)


def assert_same(folder, head, **options):
    """Check that the head in `folder` computes the logits of `head`."""
    loaded = hf_kvopt.DraftHead.from_pretrained(folder, **options)
    target, ids = tiny_model(), prompt(12)["input_ids"]
    head.bind(target)
    loaded.bind(target)
    features = features_of(head, target, ids)
    with torch.no_grad():
        for a, b in zip(head.rollout(features, ids, 3), loaded.rollout(features, ids, 3), strict=True):
            assert torch.equal(a, b)
    return loaded


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_the_eagle3_authors_layout(file, tmp_path):
    head = tiny_head()
    weights = unfused(head, "midlayer")
    assert {"midlayer.hidden_norm.weight", "midlayer.self_attn.q_proj.weight", "fc.weight", "d2t"} < weights.keys()
    assert weights["midlayer.self_attn.q_proj.weight"].shape == (32, 2 * HIDDEN)
    assert weights["fc.weight"].shape == (HIDDEN, 3 * HIDDEN)
    write(tmp_path, {**LLAMA, "draft_vocab_size": DRAFT_VOCAB}, weights, file)
    loaded = assert_same(tmp_path, head, target_layer_ids=(0, 1, -1))
    assert loaded.config.draft_vocab_size == DRAFT_VOCAB
    assert hf_kvopt.DraftHead.from_pretrained(tmp_path).config.target_layer_ids is None


def test_eagle3_of_another_width_brings_its_embeddings(tmp_path):
    head = tiny_head("eagle3 of two layers")
    weights = unfused(head, "midlayer")
    config = {**LLAMA, "num_hidden_layers": 2, "draft_vocab_size": DRAFT_VOCAB, "target_hidden_size": HIDDEN}
    write(tmp_path, config, weights)
    assert assert_same(tmp_path, head, target_layer_ids=(0, 1, -1)).config.own_embeddings


def test_biases_of_queries_keys_and_values_alone(tmp_path):
    head = tiny_head("eagle3 of two layers")
    weights = {n: x for n, x in unfused(head, "midlayer").items() if not n.endswith("o_proj.bias")}
    write(tmp_path, {**LLAMA, "num_hidden_layers": 2, "draft_vocab_size": DRAFT_VOCAB}, weights)
    for layer in head.layers:
        torch.nn.init.zeros_(layer.o_proj.bias)
    assert_same(tmp_path, head, target_layer_ids=(0, 1, -1))


def test_sharded_files(tmp_path):
    head = tiny_head()
    weights = unfused(head, "midlayer")
    names = sorted(weights)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in shards.items():
        save_file({n: weights[n].contiguous() for n in part}, tmp_path / file)
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "draft_vocab_size": DRAFT_VOCAB}))
    assert_same(tmp_path, head, target_layer_ids=(0, 1, -1))


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({}, None),
        ({"eagle_aux_hidden_state_layer_ids": [2, 3, 5]}, (2, 3, 5)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 4]}}, (2, 3, 5)),
    ],
    ids=["not said", "what enters", "what leaves"],
)
def test_the_two_ways_to_count_layers(fields, layers, tmp_path):
    write(tmp_path, {**LLAMA, "draft_vocab_size": DRAFT_VOCAB, **fields}, unfused(tiny_head(), "midlayer"))
    assert hf_kvopt.DraftHead.from_pretrained(tmp_path).config.target_layer_ids == layers


def speculators_config(**changes):
    return {
        "architectures": ["Eagle3Speculator"],
        "auto_map": {"": "eagle3.Eagle3SpeculatorConfig"},
        "draft_vocab_size": DRAFT_VOCAB,
        "eagle_aux_hidden_state_layer_ids": [0, 1, -1],
        "norm_before_residual": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "meta-llama/Llama-3.1-8B-Instruct"},
        },
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "target_hidden_size": None,
        "torch_dtype": "bfloat16",
        "transformer_layer_config": LLAMA,
        **changes,
    }


def test_the_speculators_layout(tmp_path):
    head = tiny_head()
    weights = unfused(head, "layers.0")
    weights["verifier_lm_head.weight"] = torch.zeros(DRAFT_VOCAB, HIDDEN)
    write(tmp_path, speculators_config(), weights)
    assert_same(tmp_path, head)


def test_the_speculators_norms(tmp_path):
    head = tiny_head("eagle3 with norms")
    config = speculators_config(norm_before_residual=True, fc_norm=True, norm_output=True)
    write(tmp_path, config, unfused(head, "layers.0"))
    loaded = assert_same(tmp_path, head)
    assert loaded.config.qk_norm


def publish(layout, folder):
    """Write a tiny EAGLE-3 head in the layout of `speculators` or of SpecForge, and return its weights."""
    weights = unfused(tiny_head(), "layers.0" if layout == "speculators" else "midlayer")
    specforge = {
        **LLAMA,
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": DRAFT_VOCAB,
        # Numbers of blocks whose output is read: hidden states 0, 1 and 2.
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [-1, 0, 1], "use_aux_hidden_state": True},
    }
    write(folder, speculators_config() if layout == "speculators" else specforge, weights)
    return weights


@pytest.mark.parametrize("lengths", [(9,), (9, 6, 14)], ids=["batch 1", "batch 3, padded"])
@pytest.mark.parametrize("layout", ["speculators", "specforge"])
def test_a_published_head_gives_the_tokens_of_plain_decoding(layout, lengths, tmp_path):
    publish(layout, tmp_path)
    spec = hf_kvopt.speculative(hf_kvopt.DraftHead.from_pretrained(tmp_path), gamma=3, fallback=False)
    tokens = generate(tiny_model(), prompt(*lengths), custom_generate=spec, max_new_tokens=24)
    assert torch.equal(tokens, eager_tokens("full", *lengths, max_new_tokens=24))
    assert sum(spec.stats.proposed_by_depth) > 0


@pytest.mark.parametrize("layout", ["speculators", "specforge"])
def test_a_head_without_one_of_its_weights_is_a_value_error(layout, tmp_path):
    weights = publish(layout, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in weights.keys() - {"t2d"}:
        write(tmp_path, config, {n: x for n, x in weights.items() if n != name})
        with pytest.raises(ValueError, match=r"needs|missing|known layout|EagleHead"):
            hf_kvopt.DraftHead.from_pretrained(tmp_path)


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_eagle1_layout(has_bias, tmp_path):
    head = tiny_head("eagle1")
    if not has_bias:
        torch.nn.init.zeros_(head.fc.bias)
    weights = unfused(head, "layers.0")
    weights["embed_tokens.weight"] = tiny_model().get_input_embeddings().weight.detach().clone()
    if not has_bias:
        del weights["fc.bias"]
    write(tmp_path, {**LLAMA, "bias": has_bias}, weights, "pytorch_model.bin")
    loaded = assert_same(tmp_path, head)
    assert loaded.config.eagle_version == 1
    assert loaded.feature_layers == (-1,)


def medusa_weights(head: MedusaHead) -> dict[str, torch.Tensor]:
    """Return the weights of Medusa's own modules: blocks, then the LM head, numbered in each head."""
    layers, heads = head.block_weight.shape[:2]
    weights = {}
    for i in range(heads):
        for j in range(layers):
            weights[f"{i}.{j}.linear.weight"] = head.block_weight[j, i].detach().clone()
            weights[f"{i}.{j}.linear.bias"] = head.block_bias[j, i, 0].detach().clone()
        if head.lm_weight is not None:
            weights[f"{i}.{layers}.weight"] = head.lm_weight[i].detach().clone()
    return weights


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_the_medusa_layout_believes_the_weights(file, tmp_path):
    head = MedusaHead(tiny_head("medusa").config.__class__(hidden_size=HIDDEN, vocab_size=VOCAB, medusa_num_layers=2))
    torch.nn.init.normal_(head.block_weight)
    # As in FasterDecoding/medusa-vicuna-7b-v1.3, whose configuration says 2 heads.
    config = {"base_model_name_or_path": "lmsys/vicuna-7b-v1.3", "medusa_num_heads": 2, "medusa_num_layers": 1}
    write(tmp_path, config, medusa_weights(head), file)
    loaded = assert_same(tmp_path, head)
    assert (loaded.config.medusa_num_heads, loaded.config.medusa_num_layers) == (4, 2)


def test_the_first_medusa_layout_shares_the_lm_head(tmp_path):
    head = tiny_head("medusa with the target's lm head")
    config = {"base_model_name_or_path": "x", "medusa_num_heads": 4, "medusa_num_layers": 1, "version": "1"}
    write(tmp_path, config, medusa_weights(head), "medusa_lm_head.pt")
    # Such a checkpoint does not store the vocabulary size: the target's is used.
    assert_same(tmp_path, head)


def test_the_vllm_medusa_layout_with_a_token_map(tmp_path):
    head = tiny_head("medusa")
    layers, heads = head.block_weight.shape[:2]
    weights = {
        f"blocks.{i}.layers.{j}.weight": head.block_weight[j, i].detach().clone()
        for i in range(heads)
        for j in range(layers)
    }
    order = torch.randperm(DRAFT_VOCAB, generator=torch.Generator().manual_seed(3))
    for i in range(heads):
        weights[f"lm_heads.{i}.weight"] = head.lm_weight[i].detach()[order].clone()
    weights["token_map"] = head.to_target(torch.arange(DRAFT_VOCAB))[order]
    config = {"model_type": "medusa", "hidden_size": HIDDEN, "vocab_size": VOCAB, "truncated_vocab_size": DRAFT_VOCAB}
    write(tmp_path, config, weights)
    assert_same(tmp_path, head)


def test_missing_surplus_and_misshapen_weights_are_named(tmp_path):
    weights = unfused(tiny_head(), "midlayer")
    del weights["midlayer.hidden_norm.weight"]
    weights["surplus.weight"] = torch.zeros(3)
    weights["norm.weight"] = torch.zeros(HIDDEN + 1)
    write(tmp_path, {**LLAMA, "draft_vocab_size": DRAFT_VOCAB}, weights)
    with pytest.raises(ValueError, match="do not fit the configuration") as caught:
        hf_kvopt.DraftHead.from_pretrained(tmp_path)
    for named in (
        r"hidden_norm.weight missing",
        "surplus.weight (3,) not expected",
        "norm.weight (33,) instead of (32,)",
    ):
        assert named in str(caught.value)


@pytest.mark.parametrize(
    ("config", "extra", "named"),
    [
        (speculators_config(speculators_model_type="dflash"), {}, "got 'dflash'"),
        (speculators_config(transformer_layer_config={**LLAMA, "layer_types": ["sliding_attention"]}), {}, "sliding"),
        (speculators_config(), {"mask_hidden": torch.zeros(1, HIDDEN)}, "parallel drafting"),
    ],
    ids=["another algorithm", "sliding layers", "parallel drafting"],
)
def test_what_is_not_supported_is_refused_by_name(config, extra, named, tmp_path):
    write(tmp_path, config, {**unfused(tiny_head(), "layers.0"), **extra})
    with pytest.raises(ValueError, match=named):
        hf_kvopt.DraftHead.from_pretrained(tmp_path)


def test_a_published_head_of_another_model_is_refused(tmp_path):
    write(tmp_path, {**LLAMA, "draft_vocab_size": DRAFT_VOCAB}, unfused(tiny_head(), "midlayer"))
    with pytest.raises(ValueError, match="at least 4 layers"):
        hf_kvopt.DraftHead.from_pretrained(tmp_path).check(tiny_model())


def test_a_repository_on_the_hub_is_fetched_without_what_is_not_needed(tmp_path, monkeypatch):
    write(tmp_path, {**LLAMA, "draft_vocab_size": DRAFT_VOCAB}, unfused(tiny_head(), "midlayer"))
    asked = {}

    def fetch(repo_id, allow_patterns, **options):
        asked.update(repo_id=repo_id, patterns=allow_patterns, **options)
        return str(tmp_path)

    monkeypatch.setattr("hf_kvopt.speculation.heads.auto.snapshot_download", fetch)
    head = hf_kvopt.DraftHead.from_pretrained("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", revision="abc")
    assert isinstance(head, EagleHead)
    assert (asked["repo_id"], asked["revision"]) == ("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", "abc")
    wanted = [
        "config.json",
        "pytorch_model.bin",
        "model.safetensors",
        "medusa_lm_head.pt",
        "model-00001-of-00002.safetensors",
    ]
    assert all(any(fnmatch(name, pattern) for pattern in asked["patterns"]) for name in wanted)
