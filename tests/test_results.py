"""README quotes results/ and nothing else: its generated blocks equal what results/update.py makes of the files."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("update", ROOT / "results" / "update.py")
update = importlib.util.module_from_spec(spec)
spec.loader.exec_module(update)


def test_readme_agrees_with_results():
    text = (ROOT / "README.md").read_text()
    assert update.readme(text) == text, "run .venv/bin/python results/update.py"


def test_a_changed_number_is_noticed():
    text = (ROOT / "README.md").read_text()
    if "<!-- results:" not in text:
        pytest.skip("README quotes no results yet")
    block = text.split("<!-- results:")[1].split("<!-- end -->")[0]
    changed = text.replace(block, block.replace("+0.", "+0.9", 1))
    assert changed != text and update.readme(changed) != changed


@pytest.mark.parametrize(("low", "high", "verdict"),
                         [(0.1, 0.2, "supported"), (-0.1, 0.1, "undecided"), (-2, -1, "contradicted")])
def test_verdicts(low, high, verdict):
    assert update._verdict(low, high) == verdict
