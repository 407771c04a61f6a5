"""Paths and small helpers shared by the scripts."""

import json
import re
from pathlib import Path

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def write_json(path, value):
    """Write `value` as readable JSON, lists of numbers on one line each."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    number = r"-?(?:\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|NaN|Infinity)"
    text = re.sub(
        rf"\[\s*{number}(?:,\s*{number})*\s*\]", lambda m: re.sub(r"\s+", " ", m.group(0)).replace("[ ", "[").replace(" ]", "]"), text
    )
    # The pattern must not have touched a string: reading back gives the same value.
    assert json.loads(text) == value, path
    Path(path).write_text(text + "\n", encoding="utf-8")
