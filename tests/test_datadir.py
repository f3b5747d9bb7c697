"""A data directory: one identity for life, one process at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ddb.datadir import DataDirectory
from ddb.errors import StartupError


def test_the_identity_is_made_once_and_kept(tmp_path: Path) -> None:
    first = DataDirectory.open(tmp_path / "n1")
    id = first.identity.id
    first.change(cluster="c")
    first.close()
    again = DataDirectory.open(tmp_path / "n1")
    assert (again.identity.id, again.identity.cluster) == (id, "c")
    again.close()


def test_a_wiped_directory_is_somebody_else(tmp_path: Path) -> None:
    first = DataDirectory.open(tmp_path / "n1")
    first.close()
    shutil.rmtree(tmp_path / "n1")
    again = DataDirectory.open(tmp_path / "n1")
    assert again.identity.id != first.identity.id
    again.close()


def test_a_second_process_is_refused_until_the_first_has_closed(tmp_path: Path) -> None:
    first = DataDirectory.open(tmp_path)
    with pytest.raises(StartupError, match="in use by another process"):
        DataDirectory.open(tmp_path)
    first.close()
    first.close()
    DataDirectory.open(tmp_path).close()


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StartupError, match=r"can't be used: .*\.$"):
        DataDirectory.open(tmp_path / "file" / "n1")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"id": 7}', '{"id": ""}', '{"id": "a", "stranger": 1}', "\x00"])
def test_an_identity_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "identity.json").write_text(text)
    with pytest.raises(StartupError, match=r"identity\.json"):
        DataDirectory.open(tmp_path)


def test_data_without_an_identity_is_not_given_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    with pytest.raises(StartupError, match=r"no identity\.json"):
        DataDirectory.open(tmp_path)


def test_a_log_that_has_gone_missing_is_noticed(tmp_path: Path) -> None:
    directory = DataDirectory.open(tmp_path)
    directory.log_path.mkdir()
    directory.change(born=True)
    directory.close()
    shutil.rmtree(tmp_path / "log")
    with pytest.raises(StartupError, match=r"log of .* is missing"):
        DataDirectory.open(tmp_path)


def test_the_identity_file_is_readable_json(tmp_path: Path) -> None:
    directory = DataDirectory.open(tmp_path)
    found = json.loads((tmp_path / "identity.json").read_text())
    assert found["id"] == directory.identity.id
    directory.close()
