"""A number of tokens is written alike wherever one is taken, and what is none says what was expected."""

import re
from typing import Any

import pytest

import hf_kvopt
from hf_kvopt import CacheConfig, OutOfBlocks, PagedCache, PrefixStore, QuantizedPagedCache
from hf_kvopt.__main__ import main
from hf_kvopt.config import BadInput, parse_tokens
from tests.helpers import generate, prompt, tiny_config, tiny_model

WRITTEN = {"32k": 32768, "32K": 32768, "1M": 2**20, "32000": 32000, "32,000": 32000, "1.5k": 1536, 7: 7}
WRONG = ["", "k", "-5", "0", "32q", "32GB", "1.5", "nan", "1e5", "0.3k", True, 2.5, 0, -1, [32]]


@pytest.mark.parametrize(("written", "tokens"), WRITTEN.items(), ids=map(repr, WRITTEN))
def test_tokens_are_read_as_context_lengths_are_written(written: str | int, tokens: int) -> None:
    assert parse_tokens(written) == tokens
    assert CacheConfig(max_tokens=written).max_tokens == tokens
    assert CacheConfig(max_tokens=written, block_size=32).max_blocks == -(-tokens // 32)


def caps() -> dict[str, Any]:
    """What takes `max_tokens`, each as a function of it."""
    config = tiny_config("full")
    return {
        "CacheConfig": lambda cap: CacheConfig(max_tokens=cap),
        "PagedCache": lambda cap: PagedCache(max_tokens=cap),
        "fixed capacity": lambda cap: PagedCache(max_tokens=cap, compileable=True),
        "QuantizedPagedCache": lambda cap: QuantizedPagedCache(config, format="int8", max_tokens=cap),
        "PrefixStore": lambda cap: PrefixStore(config, max_tokens=cap),
        "enable": lambda cap: hf_kvopt.enable(tiny_model(), cache="int8", max_tokens=cap),
        "prefix_sharing": lambda cap: hf_kvopt.enable(tiny_model(), prefix_sharing=True, max_tokens=cap),
        "memory": lambda cap: hf_kvopt.plan.memory(config, context=8, max_tokens=cap, weights=False),
    }


@pytest.mark.parametrize("where", caps())
@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_what_is_no_number_of_tokens_is_refused_alike_everywhere(where: str, wrong: Any) -> None:
    said = f"max_tokens must be a positive number of tokens such as 32000 or '32k': got {wrong!r}"
    with pytest.raises(BadInput, match=re.escape(said)):
        caps()[where](wrong)


def test_the_command_line_refuses_it_in_the_same_words(capsys: pytest.CaptureFixture[str]) -> None:
    for option, field in (("--max-tokens", "max_tokens"), ("--context", "context")):
        with pytest.raises(SystemExit):
            main(["memory", "evals/reference_model/model", option, "32q"])
        said = (
            f"{field} must be a positive number of tokens such as 32000 or '32k': got '32q', whose unit 'q' is unknown"
        )
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("cache", [{"cache": "paged"}, {"cache": "int8"}, {"prefix_sharing": True}], ids=str)
def test_a_cap_in_words_is_the_cap_in_numbers(cache: dict[str, Any]) -> None:
    model = hf_kvopt.enable(tiny_model(), max_tokens="0.0625k", **cache)
    assert generate(model, prompt(9, 6)).shape[0] == 2
    with pytest.raises(OutOfBlocks, match=r"got \d+ of 64 left"):
        generate(model, prompt(40, 40))


def test_a_store_knows_its_cap_as_a_number() -> None:
    store = PrefixStore(tiny_model(), max_tokens="1k")
    assert store.max_tokens == 1024
    assert store.new_cache().cache_config.max_tokens == 1024


def test_a_fixed_cache_of_a_capacity_in_words_holds_it() -> None:
    cache = PagedCache(tiny_config("full"), max_tokens="0.125k", compileable=True)
    generate(tiny_model(), prompt(9, 6), cache, disable_compile=True)
    assert {layer.get_max_length() for layer in cache.layers} == {64}
