from __future__ import annotations

from pathlib import Path

from pointsman.config.models import ServeConfig
from pointsman.scripts.settings_reference import LIVE, render

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_what_the_model_says() -> None:
    told = "write it anew: python -m pointsman.scripts.settings_reference > docs/settings.md"
    assert PAGE.read_text().splitlines() == render().splitlines(), told


def test_it_names_every_key_once_with_bounds_and_default() -> None:
    rows = [line for line in render().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(ServeConfig.model_fields)
    assert (
        "| `port` | whole number, from 0, to 65535 | `8700` |  | port that clients connect to; 0 = any free one |"
        in rows
    )


def test_what_is_said_to_be_live_exists() -> None:
    assert LIVE.keys() <= ServeConfig.model_fields.keys()
