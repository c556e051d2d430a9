"""What `conftest.py` promises to every test."""

import importlib

import pytest


@pytest.mark.parametrize("value", [1, 2])
def test_a_module_that_a_test_wrote_is_its_own(value, tmp_path, monkeypatch):
    (tmp_path / "same_name.py").write_text(f"VALUE = {value}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("same_name")
    assert value == module.VALUE
