"""After `enable(model, prefix_sharing=True)` plain `generate()` computes a prompt once and gives the same tokens."""

import copy
import pickle
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)
from transformers.generation.streamers import BaseStreamer

import hf_kvopt
from hf_kvopt import PrefixSharedCache, PrefixStore, UnsupportedModel
from tests.helpers import KINDS, NEW_TOKENS, VOCAB, generate, tiny_config, tiny_model
from tests.prefix.prefixes import batch, counted, eager, text

SYSTEM = text(70, seed=7)


@pytest.fixture(autouse=True)
def _quick(one_thread: None) -> None:
    """Small tensors all over."""


def sharing_model(kind: str = "full", **options: object) -> PreTrainedModel:
    return hf_kvopt.enable(tiny_model(kind), prefix_sharing=True, **options)


@pytest.mark.smoke
@pytest.mark.parametrize("attention", [True, False], ids=["our attention", "the model's"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_second_call_computes_one_token_of_the_prompt(kind: str, attention: bool) -> None:
    model = sharing_model(kind, attention=attention)
    inputs = batch(SYSTEM, SYSTEM[:41])
    for is_known in (False, True):
        with counted() as forwards:
            assert torch.equal(generate(model, inputs), eager(kind, inputs))
        assert (forwards[0] == 2) == is_known
    hf_kvopt.prefix_store(model).check_integrity()


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_computes_what_is_new(kind: str) -> None:
    model, history = sharing_model(kind), SYSTEM
    for seed in range(4):
        history = history + text(9, seed=seed)
        with counted() as forwards:
            output = generate(model, batch(history))
        assert torch.equal(output, eager(kind, batch(history)))
        assert forwards[0] <= (10 if seed else len(history))
        history = output[0].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"num_return_sequences": 3, "do_sample": True},
        {"do_sample": True}, {"prefill_chunk_size": 16}, {"return_dict_in_generate": True, "output_logits": True},
    ],
    ids=["beams", "returned beams", "samples", "sampled", "chunked", "dict"],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_gives_the_tokens_of_fresh_caches(kind: str, options: dict[str, object]) -> None:
    model, inputs = sharing_model(kind), batch(SYSTEM, SYSTEM[:30] + text(8))
    for _ in range(3):
        torch.manual_seed(0)
        expected = eager(kind, inputs, **options)
        torch.manual_seed(0)
        output = generate(model, inputs, **options)
        if not isinstance(output, Tensor):
            assert torch.allclose(torch.stack(output.logits), torch.stack(expected.logits), atol=1e-4)
            output, expected = output.sequences, expected.sequences
        assert torch.equal(output, expected)
    hf_kvopt.prefix_store(model).check_integrity()


def test_beams_compute_a_cold_prompt_once() -> None:
    model = sharing_model()
    with counted() as forwards:
        generate(model, batch(SYSTEM), num_beams=4)
    assert sum(forwards[:2]) < 2 * len(SYSTEM)


def test_a_cold_batch_computes_its_common_prompt_once() -> None:
    model = sharing_model()
    rows = batch(*(SYSTEM + text(n, seed=n) for n in (4, 7, 5, 6)))
    with counted() as forwards:
        assert torch.equal(generate(model, rows), eager("full", rows))
    assert sum(forwards[: -(NEW_TOKENS - 1)]) < 2 * len(SYSTEM)


@pytest.mark.parametrize("cache", ["int8", "int4", "k8v4"])
def test_quantized_caches_share_too(cache: str) -> None:
    model = hf_kvopt.enable(tiny_model(), cache=cache, prefix_sharing=True, block_size=16)
    plain = hf_kvopt.enable(tiny_model(), cache=cache, block_size=16)
    inputs = batch(SYSTEM)
    first, second = generate(model, inputs), generate(model, inputs)
    assert torch.equal(first, second)
    assert torch.equal(first, generate(plain, inputs))
    assert hf_kvopt.prefix_store(model).stats().hits == 1


class Streamed(BaseStreamer):
    """Keeps what it is given; raises after a number of calls."""

    def __init__(self, calls: int = 10**6) -> None:
        self.calls, self.tokens = calls, []

    def put(self, value: Tensor) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        """Nothing to do."""


def test_streamers_see_every_token() -> None:
    model = sharing_model()
    for _ in range(2):
        streamer = Streamed()
        output = generate(model, batch(SYSTEM), streamer=streamer)
        assert streamer.tokens == output[0].tolist()


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_an_interrupt_loses_no_block_and_keeps_the_prompt(calls: int) -> None:
    model = sharing_model()
    store = hf_kvopt.prefix_store(model)
    with pytest.raises(KeyboardInterrupt):
        generate(model, batch(SYSTEM), streamer=Streamed(calls))
    store.check_integrity()
    assert store.match_length(SYSTEM) == len(SYSTEM)
    assert torch.equal(generate(model, batch(SYSTEM)), eager("full", batch(SYSTEM)))


def test_a_failing_forward_keeps_nothing_half_done() -> None:
    model = sharing_model()
    store = hf_kvopt.prefix_store(model)
    last = model.model.layers[-1]

    def fail(*_: object) -> None:
        raise RuntimeError("device gone")

    for is_ragged in (False, True):
        rows = batch(SYSTEM, SYSTEM) if is_ragged else batch(SYSTEM)
        hook = last.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="device gone"):
            generate(model, rows)
        hook.remove()
        store.check_integrity()
        assert store.match_length(SYSTEM) == 0
    assert torch.equal(generate(model, batch(SYSTEM)), eager("full", batch(SYSTEM)))


def test_an_output_that_carries_the_cache_leaves_it_usable() -> None:
    model = sharing_model()
    first = generate(model, batch(SYSTEM), return_dict_in_generate=True)
    cache = first[hf_kvopt.CACHE_KEYWORD]
    assert isinstance(cache, PrefixSharedCache)
    longer = torch.cat([first.sequences, torch.tensor([text(5)])], dim=1)
    inputs = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    assert torch.equal(generate(model, inputs, cache), eager("full", inputs))
    # What is written behind a shared block changes no other text.
    assert torch.equal(generate(model, batch(SYSTEM)), eager("full", batch(SYSTEM)))
    hf_kvopt.prefix_store(model).check_integrity()


def test_what_is_more_than_tokens_shares_nothing() -> None:
    model, inputs = sharing_model(), batch(SYSTEM)
    store = hf_kvopt.prefix_store(model)
    positions = torch.arange(70)[None] * 2
    expected = generate(tiny_model(attention="eager"), {**inputs, "position_ids": positions})
    for _ in range(2):
        assert torch.equal(generate(model, {**inputs, "position_ids": positions}), expected)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(generate(model, given), eager("full", inputs)[:, 70:])
    assert store.stats().num_blocks == store.stats().rows == 0


OUTPUTS = ("sequences", "scores", "logits", "hidden_states", "attentions")


def tensors_in(part: object) -> list[Tensor]:
    """All tensors of nested tuples, in order."""
    if part is None or isinstance(part, Tensor):
        return [] if part is None else [part]
    return [tensor for each in part for tensor in tensors_in(each)]


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 16}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["greedy", "beams", "chunked", "samples"],
)  # fmt: skip
@pytest.mark.parametrize(
    "wanted", [("hidden_states",), ("attentions",), ("logits", "scores"), ("scores", "logits", "hidden_states")],
    ids=" and ".join,
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_every_output_is_that_of_a_whole_prompt(kind: str, wanted: tuple[str, ...], options: dict[str, object]) -> None:
    # Rows without padding: what stands at pads is nobody's, and differs.
    inputs = batch(SYSTEM, SYSTEM[:40] + text(30, seed=1))
    options = {f"output_{name}": True for name in wanted} | {"return_dict_in_generate": True, **options}
    torch.manual_seed(0)
    want = generate(tiny_model(kind, "eager"), inputs, **options)
    model = hf_kvopt.enable(tiny_model(kind, "eager"), attention=False, prefix_sharing=True)
    for turn in ("cold", "kept by this call", "kept by a plain one"):
        torch.manual_seed(0)
        got = generate(model, inputs, **options)
        for name in OUTPUTS:
            mine, theirs = tensors_in(getattr(got, name)), tensors_in(getattr(want, name))
            assert [x.shape for x in mine] == [x.shape for x in theirs], (turn, name)
            assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(mine, theirs, strict=True)), (turn, name)
        if turn == "kept by this call":
            generate(model, inputs)
    assert hf_kvopt.prefix_store(model).stats().rows > 0


def test_logits_and_scores_alone_go_on_hitting() -> None:
    model, inputs = sharing_model(), batch(SYSTEM)
    generate(model, inputs)
    generate(model, inputs, return_dict_in_generate=True, output_logits=True, output_scores=True)
    assert hf_kvopt.prefix_store(model).stats().hits == 1


HOLE = torch.ones(2, 70, dtype=torch.long)
HOLE[0, 9] = HOLE[1, :5] = 0
RIGHT = torch.ones(2, 70, dtype=torch.long)
RIGHT[1, 60:] = 0
NOT_LEFT_PADDED = {
    "a hole": HOLE, "a hole, bool": HOLE.bool(), "a hole, float": HOLE.float(), "a hole, uint8": HOLE.byte(),
    "right": RIGHT, "both sides": HOLE.roll(-3, 1) * RIGHT, "twos": torch.full((2, 70), 2), "halves": HOLE * 0.5,
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("mask", NOT_LEFT_PADDED.values(), ids=NOT_LEFT_PADDED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_more_than_left_padding_shares_nothing(kind: str, mask: Tensor, options: dict[str, int]) -> None:
    model, plain = sharing_model(kind), batch(SYSTEM, SYSTEM[:40] + text(30, seed=1))
    masked = {**plain, "attention_mask": mask}
    for inputs in (masked, masked, plain, masked, plain):
        assert torch.equal(generate(model, inputs, **options), eager(kind, inputs, **options))
    store = hf_kvopt.prefix_store(model)
    assert store.stats().rows == 4 * options.get("num_beams", 1)  # of the two plain calls
    store.check_integrity()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32, torch.float16], ids=str)
def test_left_padding_is_shared_whatever_the_dtype_of_its_mask(dtype: torch.dtype) -> None:
    model, inputs = sharing_model(), batch(SYSTEM, SYSTEM[:41])
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    for _ in range(2):
        assert torch.equal(generate(model, inputs), eager("full", inputs))
    assert hf_kvopt.prefix_store(model).stats().hits == 2


def test_token_types_share_nothing() -> None:
    config = GPT2Config(vocab_size=VOCAB, n_positions=96, n_embd=32, n_layer=2, n_head=4, initializer_range=0.25)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    inputs = batch(SYSTEM)
    typed = {**inputs, "token_type_ids": torch.arange(70)[None] // 20 % 2}
    want = [generate(model, each, max_new_tokens=5) for each in (typed, inputs)]
    hf_kvopt.enable(model, prefix_sharing=True)
    for _ in range(2):
        for each, expected in zip((typed, inputs), want, strict=True):
            assert torch.equal(generate(model, each, max_new_tokens=5), expected)


def test_an_assistant_and_a_cache_of_ones_own_are_left_alone() -> None:
    model, inputs = sharing_model(), batch(SYSTEM)
    generate(model, inputs)
    assert torch.equal(generate(model, inputs, assistant_model=tiny_model(seed=1)), eager("full", inputs))
    assert torch.equal(generate(model, inputs, hf_kvopt.PagedCache()), eager("full", inputs))
    assert torch.equal(generate(model, inputs, use_cache=False), eager("full", inputs))
    hf_kvopt.prefix_store(model).check_integrity()


def test_an_explicit_cache_goes_with_an_enabled_model() -> None:
    model, inputs = sharing_model(), batch(SYSTEM)
    store = hf_kvopt.prefix_store(model)
    for _ in range(2):
        cache = store.cache(**inputs)
        output = generate(model, inputs, cache)
        assert torch.equal(output, eager("full", inputs))
        store.commit(cache, output)
    assert store.stats().hits == 1


def test_disable_puts_generate_back() -> None:
    model = sharing_model()
    store = hf_kvopt.prefix_store(model)
    hf_kvopt.disable(model)
    assert "generate" not in model.__dict__
    assert "_prefill" not in model.__dict__
    assert torch.equal(generate(model, batch(SYSTEM)), eager("full", batch(SYSTEM)))
    assert store.stats().rows == 0
    with pytest.raises(ValueError, match="shares no prefixes"):
        hf_kvopt.prefix_store(model)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_model_has_a_store_of_its_own(way: object) -> None:
    model = sharing_model()
    generate(model, batch(SYSTEM))
    twin = way(model)
    with torch.no_grad():
        twin.lm_head.weight.neg_()
        twin.model.layers[0].self_attn.v_proj.weight.mul_(-1)
    plain = hf_kvopt.disable(copy.deepcopy(twin))
    assert torch.equal(generate(twin, batch(SYSTEM)), generate(plain, batch(SYSTEM)))
    assert hf_kvopt.prefix_store(twin) is not hf_kvopt.prefix_store(model)
    assert hf_kvopt.prefix_store(twin).stats().rows == 1


def test_training_in_between_makes_old_texts_unknown() -> None:
    model, inputs = sharing_model(), batch(SYSTEM)
    generate(model, inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    optimizer.step()
    model.eval()
    plain = hf_kvopt.disable(copy.deepcopy(model))
    assert torch.equal(generate(model, inputs), generate(plain, inputs))


def test_one_store_is_shared_by_name() -> None:
    model = tiny_model()
    store = PrefixStore(model, max_tokens=4096)
    hf_kvopt.enable(model, prefix_sharing=store)
    generate(model, batch(SYSTEM))
    assert hf_kvopt.prefix_store(model) is store
    assert store.match_length(SYSTEM) == len(SYSTEM)


def encoder_decoder() -> PreTrainedModel:
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return BartForConditionalGeneration(BartConfig(vocab_size=VOCAB, **shape))


@pytest.mark.parametrize(
    ("make", "options", "error", "word"),
    [
        (tiny_model, {"cache": None}, ValueError, "cache=None"),
        (tiny_model, {"compileable": True, "max_tokens": 64}, TypeError, "compileable"),
        (tiny_model, {"block_size": 3}, ValueError, "block_size"),
        (encoder_decoder, {}, UnsupportedModel, "encoder-decoder"),
    ],
    ids=["no cache", "fixed capacity", "bad size", "encoder-decoder"],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused_and_the_model_is_as_it_was(make, options, error, word) -> None:
    model = make()
    before = dict(model.__dict__)
    with pytest.raises(error, match=word):
        hf_kvopt.enable(model, prefix_sharing=True, **options)
    assert model.__dict__ == before


def test_a_store_of_another_model_is_refused() -> None:
    other = tiny_model()
    with pytest.raises(ValueError, match="this very model"):
        hf_kvopt.enable(tiny_model(), prefix_sharing=PrefixStore(other))


def in_threads(work: list) -> None:
    errors: list[BaseException] = []

    def guarded(job) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@pytest.fixture
def _switching_often() -> Iterator[None]:
    """Threads change places at nearly every bytecode."""
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_switching_often")
@pytest.mark.parametrize("max_tokens", [None, 16 * 60], ids=["growing", "evicting"])
@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_threads_on_one_store_give_the_serial_tokens(kind: str, max_tokens: int | None) -> None:
    model = sharing_model(kind, max_tokens=max_tokens)
    store = hf_kvopt.prefix_store(model)
    prompts = [
        batch(SYSTEM + text(3 + n, seed=n), SYSTEM[: 20 + 5 * n]) if n % 2 else batch(SYSTEM[:30] + text(20, seed=n))
        for n in range(6)
    ]
    prompts += [batch(text(60, seed=100 + n)) for n in range(12)]
    expected = [eager(kind, inputs, max_new_tokens=5) for inputs in prompts]
    stop = threading.Event()

    def work(first: int) -> None:
        for turn in range(len(prompts)):
            n = (first + turn) % len(prompts)
            assert torch.equal(generate(model, prompts[n], max_new_tokens=5), expected[n])

    def watch() -> None:
        while not stop.wait(0.01):
            store.check_integrity()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        in_threads([lambda n=n: work(5 * n) for n in range(4)])
    finally:
        stop.set()
        watcher.join()
    store.check_integrity()
    assert store.stats().hits > 0
    assert (store.stats().evictions > 0) == (max_tokens is not None)


def test_a_model_with_learned_positions_is_not_asked_beyond_its_table() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=96, n_embd=32, n_layer=2, n_head=4, initializer_range=0.25)
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    inputs = batch(SYSTEM + text(20), text(36, seed=2), SYSTEM[:5])
    expected = generate(model, inputs, max_new_tokens=5)
    hf_kvopt.enable(model, prefix_sharing=True)
    generate(model, batch(SYSTEM), max_new_tokens=5)
    for _ in range(2):
        assert torch.equal(generate(model, inputs, max_new_tokens=5), expected)


def test_latents_are_shared() -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8,
        first_k_dense_replace=1, initializer_range=0.25, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    inputs = batch(SYSTEM, SYSTEM[:40] + text(9), text(12, seed=1))
    expected = generate(model, inputs)
    hf_kvopt.enable(model, prefix_sharing=True)
    for _ in range(2):
        assert torch.equal(generate(model, inputs), expected)
    assert hf_kvopt.prefix_store(model).stats().hits == 3


def test_a_config_alone_is_enough_to_refuse_a_bad_one() -> None:
    assert PrefixStore(tiny_config("full")).model is None
    with pytest.raises(TypeError, match="model or config"):
        PrefixStore("llama")


@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_an_early_exit_leaves_no_text_without_its_later_layers(kind: str) -> None:
    model, inputs = sharing_model(kind), batch(SYSTEM)
    for options in ({"assistant_early_exit": 1}, {}):
        assert torch.equal(generate(model, inputs, **options), eager(kind, inputs))
    hf_kvopt.prefix_store(model).check_integrity()
