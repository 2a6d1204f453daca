"""The keys of JSON output, as documented and as printed."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs/reference/command-line.md"


def documented_keys(verb: str, part: int = 0) -> set[str]:
    """Keys in the first columns of a verb's tables; `part` counts its tables."""
    section = PAGE.read_text(encoding="utf-8").partition(f"### lungddpm {verb}\n")[2].partition("\n### ")[0]
    tables = section.split("| key | meaning |")[1:]
    cells = [line.split(" | ")[0] for line in tables[part].splitlines() if line.startswith("| `")]
    return {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}


def keys_of(value: object, path: str = "") -> set[str]:
    """Keys of nested values as the docs write them: `stages[].jobs`, `total.jobs`; of text in lists, the list."""
    if isinstance(value, dict):
        own = {f"{path}.{key}" if path else key: each for key, each in value.items()}
        return set().union(*(keys_of(each, key) for key, each in own.items()))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set().union(*(keys_of(each, f"{path}[]") for each in value))
    return {path}
