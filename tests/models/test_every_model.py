"""Every model gives exactly the eager tokens from the paged cache, or refuses with one clear error."""

from collections.abc import Container
from contextlib import suppress

import pytest

from hf_kvopt.errors import CacheStateError
from tests.models import expected, routes
from tests.models.cases import Case, covered_cases
from tests.models.kinds import is_pure_attention

ALL = pytest.mark.parametrize("case", covered_cases(), ids=lambda case: case.name)


@ALL
def test_enable_gives_the_eager_tokens_or_refuses(case: Case) -> None:
    if case.name in expected.MISMASKED:
        with pytest.raises(CacheStateError, match="attention_mask covers 1 keys"):
            routes.by_enable(case)
        return
    got = routes.by_enable(case)
    assert got.result == _expected(case, expected.REFUSED), got.detail


@ALL
def test_the_cache_alone_gives_the_eager_tokens_or_is_refused(case: Case) -> None:
    got = routes.by_cache_alone(case)
    assert got.result == _expected(case, expected.REFUSED_ALONE), got.detail


@ALL
def test_a_handed_over_cache_gives_the_eager_tokens_or_is_refused(case: Case) -> None:
    _check_handed_over(case, routes.by_construction(case))


@ALL
def test_switched_attention_gives_the_eager_tokens_or_is_refused(case: Case) -> None:
    _check_handed_over(case, routes.by_switching(case))


@ALL
def test_a_cache_without_a_config_gives_the_eager_tokens_or_an_error(case: Case) -> None:
    if case.name in expected.NEED_CONFIG:
        assert routes.without_config(case).result == "refused"
    elif is_pure_attention(case):
        _check_handed_over(case, routes.without_config(case))
    else:
        # States, indexers and the like cannot be guessed; transformers' own DynamicCache() fails on them as well.
        got = None
        with suppress(Exception):
            got = routes.without_config(case)
        assert got is None or got.result != "wrong", got.detail


def _expected(case: Case, refused: Container[str]) -> str:
    if case.name in refused:
        return "refused"
    return "unused" if case.name in expected.NOT_PAGED else "exact"


def _check_handed_over(case: Case, got: routes.Outcome) -> None:
    """What `enable` refuses may still work here, and transformers may refuse by itself; never a wrong token."""
    assert got.result != "wrong", got.detail
    if got.result == "refused":
        is_known = case.name in expected.REFUSED or case.name in expected.MISMASKED
        assert is_known or got.detail.startswith("transformers"), got.detail
    if got.result == "unused":
        assert case.name in expected.NOT_PAGED or case.name in expected.REFUSED
