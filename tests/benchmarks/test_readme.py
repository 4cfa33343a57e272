"""The README's tables are those that the code and the records make."""

from __future__ import annotations

import pytest

from benchmarks import readme


def test_the_readme_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["readme", "--check"])
    assert readme.main() == 0


def test_a_table_without_its_markers_is_missed() -> None:
    with pytest.raises(ValueError, match="one pair of markers 'models'"):
        readme.fill("<!-- reasons -->\n<!-- /reasons -->\n", "models", "| a |")
