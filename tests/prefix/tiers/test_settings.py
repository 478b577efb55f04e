"""Bad settings of the tiers: one clear error each, before anything is made."""

from pathlib import Path

import pytest

from hf_kvopt import PrefixStore, UnsupportedModel
from hf_kvopt.prefix.tiers import settings, tiers
from tests.helpers import tiny_config, tiny_model


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"host_tier": "much"}, ValueError, r"host_tier must be bytes such as 24GiB.*got 'much'"),
        ({"host_tier": 0}, ValueError, "host_tier must be bytes such as"),
        ({"host_tier": True}, ValueError, "host_tier must be bytes such as"),
        ({"host_tier": "4000 TiB"}, ValueError, r"host_tier must fit the machine's memory of .* GiB: got '4000 TiB'"),
        ({"disk_limit": "1GiB"}, ValueError, "disk_limit caps the files of disk_tier"),
        ({"disk_tier": 5}, TypeError, "disk_tier must be a folder"),
        ({"disk_tier": ""}, TypeError, "disk_tier must be a folder"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PrefixStore(tiny_model(), **options)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(ValueError, match=r"disk_tier must be a folder that can be written: got .*drop disk_tier"):
            PrefixStore(tiny_model(), disk_tier=folder)


def test_a_disk_needs_the_model() -> None:
    assert PrefixStore(tiny_config("full"), host_tier="1MiB").stats().host_bytes == 0
    with pytest.raises(ValueError, match="disk_tier needs the model"):
        PrefixStore(tiny_config("full"), disk_tier="/tmp")


def test_a_divided_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "text_group", lambda model: object())
    with pytest.raises(UnsupportedModel, match="ranks must know the same texts"):
        PrefixStore(tiny_model(), host_tier="1MiB")


def test_memory_is_that_of_this_machine_at_most() -> None:
    assert 2**28 < settings.memory_bytes() < 2**50
