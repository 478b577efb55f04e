"""Heads on their own: logits, saving, sharing with the target, and the targets that they refuse."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import hf_kvopt
from hf_kvopt.speculation.heads.config import EagleConfig, MedusaConfig
from hf_kvopt.speculation.heads.eagle import EagleHead, default_layers, draft_vocab_of
from hf_kvopt.speculation.heads.layer import RotaryTable, rotate
from tests.helpers import VOCAB, prompt, tiny_model
from tests.speculation.heads import DRAFT_VOCAB, HIDDEN, KINDS, features_of, tiny_head

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_head_is_found_out_and_computes_the_same(kind, tmp_path):
    target, head = tiny_model(), tiny_head(kind)
    ids = prompt(12)["input_ids"]
    head.bind(target)
    head.save_pretrained(tmp_path)
    again = hf_kvopt.DraftHead.from_pretrained(tmp_path)
    again.bind(target)
    assert type(again) is type(head)
    assert not again.training
    features = features_of(head, target, ids)
    with torch.no_grad():
        for a, b in zip(head.rollout(features, ids, 3), again.rollout(features, ids, 3), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_s_weights_are_not_saved_copied_or_trained(kind):
    target, head = tiny_model(), tiny_head(kind)
    names = set(head.state_dict())
    head.bind(target)
    assert set(head.state_dict()) == names
    assert not {id(p) for p in head.parameters()} & {id(p) for p in target.parameters()}
    twin = copy.deepcopy(head)
    with pytest.raises(ValueError, match=r"bind\(target\)"):
        _ = twin.shared


def test_dtype_can_be_chosen(tmp_path):
    tiny_head().save_pretrained(tmp_path)
    assert hf_kvopt.DraftHead.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert hf_kvopt.DraftHead.from_pretrained(tmp_path).dtype == torch.float32


def test_an_eagle3_step_is_the_papers_equation():
    """Compare with the equation written out with transformers' own modules, for one position without a past."""
    target, head = tiny_model(), tiny_head()
    head.bind(target)
    layer, ids = head.layers[0], prompt(2)["input_ids"]
    features = features_of(head, target, ids)[:, :1]
    with torch.no_grad():
        logits = head.rollout(torch.cat([features, features], 1), ids, 1)[0][0, 0]
        g = features[0, 0] @ head.fc.weight.T
        e = target.get_input_embeddings()(ids[0, 1])
        x = torch.cat([layer.input_layernorm(e), layer.hidden_norm(g)])
        v = (layer.qkv_proj.weight @ x)[-2 * 8 :].view(2, 8)  # one key: attention is its value
        h = g + layer.o_proj.weight @ v.repeat_interleave(2, 0).flatten()
        gate, up = (layer.gate_up_proj.weight @ layer.post_attention_layernorm(h)).chunk(2)
        h = h + layer.down_proj.weight @ (torch.nn.functional.silu(gate) * up)
        expected = head.lm_head.weight @ head.norm(h)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_draft_ids_map_to_the_targets_and_back():
    head = tiny_head()
    tokens = head.to_target(torch.arange(DRAFT_VOCAB))
    assert torch.equal(head.t2d.nonzero()[:, 0], tokens)
    full = head.spread(torch.arange(DRAFT_VOCAB, dtype=torch.float32)[None])
    assert full.shape == (1, VOCAB)
    assert torch.equal(full[0, tokens], torch.arange(DRAFT_VOCAB, dtype=torch.float32))
    assert full[0, ~head.t2d].eq(float("-inf")).all()


def test_the_most_frequent_tokens_are_taken_in_ascending_order():
    counts = torch.tensor([5, 0, 9, 7, 1])
    assert draft_vocab_of(counts, 3).tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    "tokens", [range(DRAFT_VOCAB - 1), [1, 0, *range(2, DRAFT_VOCAB)]], ids=["too few", "unsorted"]
)
def test_a_vocabulary_that_the_layout_cannot_hold_is_refused(tokens):
    with pytest.raises(ValueError, match="ascending order: got"):
        tiny_head().set_draft_vocab(torch.tensor(list(tokens)))


def test_the_rotary_table_is_transformers_own():
    config = EagleConfig(hidden_size=32, num_attention_heads=4, head_dim=8, rope_theta=123.0)
    llama = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8, rope_theta=123.0)
    positions = torch.tensor([[0, 5, 9000]])
    q = torch.randn(1, 3, 2, 8)
    cos, sin = LlamaRotaryEmbedding(llama)(q, positions)
    expected, _ = apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), cos, sin)
    table = RotaryTable(config)
    torch.testing.assert_close(rotate(q, table(positions, torch.float32)).transpose(1, 2), expected)


def _llama(**changes):
    shape = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**{**shape, "num_hidden_layers": 6, **changes}))


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("eagle3", {"hidden_size": 64}, "hidden_size 32: got one with hidden_size 64"),
        ("medusa", {"hidden_size": 64}, "hidden_size 32: got one with hidden_size 64"),
        ("eagle3", {"vocab_size": 98}, "vocab_size 97: got one with vocab_size 98"),
        ("medusa", {"vocab_size": 98}, "vocab_size 97: got one with vocab_size 98"),
        ("eagle1", {"vocab_size": 98}, "vocab_size 97: got one with vocab_size 98"),
    ],
)
def test_a_head_of_another_model_is_refused_with_what_differs(kind, changes, named):
    with pytest.raises(ValueError, match=named):
        tiny_head(kind).check(_llama(**changes))


def test_layers_that_the_target_does_not_have_are_refused():
    shape = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_attention_heads": 4}
    with pytest.raises(ValueError, match=r"target_layer_ids \(2, 5, 7\): got one with num_hidden_layers 6"):
        EagleHead(EagleConfig(**shape, target_layer_ids=(2, 5, 7))).check(_llama())
    with pytest.raises(ValueError, match="at least 4 layers"):
        EagleHead(EagleConfig(**shape)).check(_llama(num_hidden_layers=3))


def test_without_numbers_the_layers_are_the_authors():
    head = EagleHead(EagleConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_attention_heads=4))
    head.check(_llama())
    assert head.feature_layers == default_layers(6) == (2, 3, 3)


@pytest.mark.parametrize(
    ("config", "options", "named"),
    [
        (EagleConfig, {"eagle_version": 2}, "eagle_version must be 3, or 1"),
        (EagleConfig, {"eagle_version": 1, "target_layer_ids": (1, 2)}, "reads one layer"),
        (EagleConfig, {"eagle_version": 1, "draft_vocab_size": 7}, "proposes all 32000 tokens"),
        (EagleConfig, {"draft_vocab_size": 40000}, "at most the target's vocab_size 32000"),
        (EagleConfig, {"norm_before_fc": True, "fc_norm": True}, "exclude each other"),
        (EagleConfig, {"num_attention_heads": 6, "num_key_value_heads": 4}, "multiple of num_key_value_heads"),
        (MedusaConfig, {"shared_lm_head": True, "draft_vocab_size": 7}, "just that with shared_lm_head"),
        (MedusaConfig, {"medusa_num_heads": 0}, "at least one head"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, options, named):
    with pytest.raises(ValueError, match=named):
        config(**options)


def test_a_folder_without_a_head_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        hf_kvopt.DraftHead.from_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no draft head of a known layout"):
        hf_kvopt.DraftHead.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="from_pretrained"):
        hf_kvopt.DraftHead()
