"""Which layer gets which format, and what is refused."""

import pytest

from hf_kvopt.quant import FORMATS, KV_FORMATS, NATIVE_KV, FormatPolicy, KVFormat, get_kv_format

INT8, INT4, TOKENS = (get_kv_format(name) for name in ("int8", "int4", "int8/int4"))


def test_a_pair_has_keys_and_values_of_their_own() -> None:
    assert KVFormat(FORMATS["int8"], FORMATS["int4"]) == TOKENS
    assert TOKENS.name == "int8/int4"
    assert get_kv_format("int8/int8") == INT8
    assert get_kv_format("fp8_e4m3/native").name == "fp8_e4m3/native"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("itn4", "int4"), ("INT8", "int8"), ("fp8", "fp8_e4m3"), ("int8/itn4", "int4"), ("q4/int8", None), ("zip", None)],
)
def test_an_unknown_format_suggests_what_was_meant(name: str, meant: str | None) -> None:
    with pytest.raises(ValueError, match="format must be one of") as caught:
        get_kv_format(name)
    assert str(caught.value).endswith(f"got {name!r}" + (f"; did you mean {meant!r}?" if meant else ""))


@pytest.mark.parametrize("name", ["int2", "int8/", "int8/int3", "int8/int4/int4", "", None, 8], ids=str)
def test_an_unknown_format_lists_the_known(name: object) -> None:
    with pytest.raises(ValueError, match=r"native, int8, fp8_e4m3, fp8_e5m2, int4, k8v4") as caught:
        get_kv_format(name)  # type: ignore[arg-type]
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", KV_FORMATS)
def test_a_format_goes_by_its_name(name: str) -> None:
    assert get_kv_format(name).name == name


def test_sliding_layers_stay_native_unless_asked() -> None:
    assert FormatPolicy(format="int8").at(3, is_sliding=True) == NATIVE_KV
    assert FormatPolicy(format="int8").at(3, is_sliding=False) == INT8
    assert FormatPolicy(format="int8", skip_layers=()).at(3, is_sliding=True) == INT8


def test_first_and_last_are_those_that_hold_keys_and_values() -> None:
    policy = FormatPolicy(format="int8", skip_layers=("first", "last")).resolve(6, first=1, last=4)
    assert [policy.at(i, is_sliding=False) == NATIVE_KV for i in range(6)] == [False, True, False, False, True, False]


def test_first_is_known_without_a_model() -> None:
    policy = FormatPolicy(format="int8", skip_layers=("first",))
    assert not policy.needs_layer_count
    assert [policy.at(i, is_sliding=False) for i in range(2)] == [NATIVE_KV, INT8]


def test_a_layer_format_goes_before_a_skip_and_a_number_before_a_place() -> None:
    formats = {-1: "k8v4", "sliding": "int4", "last": "int4", 1: "int4"}
    policy = FormatPolicy(format="int8", skip_layers=(0, 1, "sliding"), layer_formats=formats)
    policy = policy.resolve(4, first=0, last=3)
    assert policy.at(0, is_sliding=False) == NATIVE_KV
    assert policy.at(1, is_sliding=False) == INT4
    assert policy.at(2, is_sliding=True) == INT4
    assert policy.at(2, is_sliding=False) == INT8
    assert policy.at(3, is_sliding=True) == get_kv_format("k8v4")


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_does_not_exist_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer {layer} does not exist: got a model of 4 layers"):
        FormatPolicy(skip_layers=(layer,)).resolve(4, 0, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_layers": ("frist",)}, "first, last, sliding: got 'frist'"),
        ({"skip_layers": (True,)}, "got True"),
        ({"skip_layers": "first"}, "put it in a tuple"),
        ({"skip_layers": None}, r"got None; put it in a tuple, or pass \(\) for none"),
        ({"layer_formats": ["int8"]}, r"must map layers to formats.*got \['int8'\]"),
        ({"exact_prefill": "yes"}, "exact_prefill must be True or False: got 'yes'"),
        ({"layer_formats": {1.5: "int8"}}, "got 1.5"),
        ({"layer_formats": {1: "int9"}}, "got 'int9'"),
    ],
    ids=["unknown place", "a bool", "a bare place", "none", "a list", "a word", "a fraction", "unknown format"],
)
def test_what_names_no_layer_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FormatPolicy(**options)
