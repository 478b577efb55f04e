"""Models divided over two processes: tokens equal those of one process, and what ranks do unlike is an error on all."""

from pathlib import Path

import pytest
from transformers import DynamicCache

from tests.devices import jobs
from tests.devices.conftest import Groups
from tests.devices.ranks import errors, returned
from tests.helpers import generate, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
# Jobs after which the ranks can go on together share one group of processes.
TOGETHER = (
    "heads,policies,batch,batch_errors,local_heads,slow_rank,unlike_options,unlike_prompts,unlike_stores,saved_store,pipeline,"
    "pipeline_cache"
)


@pytest.mark.parametrize("name", jobs.MODELS)
def test_two_ranks_give_the_tokens_of_one_process(name: str, group: Groups, models: Path) -> None:
    want = jobs.matrix_of(models / name, 1)
    plain = jobs.load(models / name)
    tokens = generate(plain, jobs.INPUTS, DynamicCache(config=plain.config)).tolist()
    assert want["paged"] == [tokens, tokens]
    for rank, got in enumerate(returned(group("matrix"), "matrix")):
        assert [case for case in want if got[name][case] != want[case]] == [], f"rank {rank}"


def test_four_ranks_give_the_tokens_of_one_process(group: Groups, models: Path) -> None:
    want = jobs.four_heads(models, 0, 1)
    for rank, got in enumerate(returned(group("four_heads", num_ranks=4), "four_heads")):
        assert [case for case in want if got[case] != want[case]] == [], f"rank {rank}"


def test_policies_drop_on_each_rank_what_they_drop_in_one_process(group: Groups, models: Path) -> None:
    want = jobs.policies(models, 0, 1)
    assert all(evicted > 0 for _, evicted in want.values())
    assert returned(group(TOGETHER), "policies") == [want, want]


def test_draft_heads_share_the_embeddings_of_a_divided_target(group: Groups, models: Path) -> None:
    want = jobs.heads(models, 0, 1)
    assert returned(group(TOGETHER), "heads") == [want, want]


def test_a_running_batch_of_two_ranks_gives_the_tokens_of_one_process(group: Groups, models: Path) -> None:
    want = jobs.batch(models, 0, 1)
    assert returned(group(TOGETHER), "batch") == [want, want]


def test_what_ranks_could_not_decide_alike_is_refused_for_a_running_batch(group: Groups) -> None:
    for batcher, time_limit, prompts, tokens in returned(group(TOGETHER), "batch_errors"):
        assert batcher.startswith("UnsupportedModel: ")
        assert "generate_many on every rank" in batcher
        assert time_limit.startswith("ValueError: max_time ")
        assert "got prompts that differ" in prompts
        assert tokens == returned(group(TOGETHER), "batch_errors")[0][3]


def test_each_rank_keeps_the_keys_of_its_own_heads(group: Groups, models: Path) -> None:
    whole = jobs.local_heads(models, 0, 1)
    for shape in returned(group(TOGETHER), "local_heads"):
        assert [*shape[:2], 2 * shape[2], *shape[3:]] == whole


def test_a_slow_rank_drafts_what_the_first_rank_decided(group: Groups) -> None:
    first, second = returned(group(TOGETHER), "slow_rank")
    plain = tiny_model("full", "eager")
    tokens = generate(plain, jobs.INPUTS, max_new_tokens=96).tolist()
    assert first["tokens"] == second["tokens"] == tokens
    assert first["fed"] == second["fed"]
    assert max(first["fed"][1:]) > 1  # drafts were made
    assert first["own"] != second["own"]  # and the slow rank would have made others


@pytest.mark.parametrize("job", ["unlike_options", "unlike_prompts"])
def test_what_ranks_are_asked_for_unlike_is_an_error_on_all(job: str, group: Groups) -> None:
    found = returned(group(TOGETHER), job)
    for said, _ in found:
        assert {"unlike_options": "options of enable", "unlike_prompts": "prompts"}[job] in said
        assert "rank 0: " in said
        assert "rank 1: " in said
    # The ranks still follow each other.
    assert found[0][1] == found[1][1]


def test_prefix_stores_that_differ_are_an_error_on_all(group: Groups) -> None:
    for error in errors(group(TOGETHER), "unlike_stores"):
        assert error.startswith("CacheStateError: ")
        assert "prefix stores that differ" in error


def test_a_store_of_a_divided_model_is_not_saved(group: Groups) -> None:
    for error in errors(group(TOGETHER), "saved_store"):
        assert error.startswith("CacheStateError: ")
        assert "divided over ranks" in error


def test_a_rank_that_does_not_come_is_an_error_and_no_hang(group: Groups) -> None:
    first = group("absent_rank", HF_KVOPT_RANK_TIMEOUT_S="3")[0]["absent_rank"]
    assert first["error"].startswith("CacheStateError: ")
    assert "no answer from the others within 3 s" in first["error"]


def test_a_rank_that_dies_is_an_error_and_no_hang(group: Groups) -> None:
    first, second = group("dead_rank", HF_KVOPT_RANK_TIMEOUT_S="30")
    assert not second
    assert "error" in first["dead_rank"]


def test_fewer_heads_than_ranks_are_refused_on_all(group: Groups) -> None:
    for error in errors(group("too_few_heads", num_ranks=4), "too_few_heads"):
        assert "got 2 heads" in error
        assert "over 4 ranks" in error


# Pipelines.


def test_a_pipeline_is_refused_on_all_ranks_and_works_as_before(group: Groups) -> None:
    found = returned(group(TOGETHER), "pipeline")
    for said, _ in found:
        assert "pp_size" in said
    plain = tiny_model("full", "eager")
    row = {name: tensor[:1] for name, tensor in jobs.INPUTS.items()}
    assert found[0][1] == found[1][1] == generate(plain, row).tolist()


def test_a_cache_that_is_handed_to_a_pipeline_is_refused_on_all_ranks(group: Groups) -> None:
    for error in errors(group(TOGETHER), "pipeline_cache"):
        assert error.startswith("UnsupportedModel: ")
        assert "pp_size" in error
