"""titan schema

Prints the JSON Schema of a config. Editors that know TOML schemas (Even Better TOML, taplo) complete and check keys by it:

  titan schema > titan.schema.json
"""

from __future__ import annotations

import json

from titan import toml


def run(words: list[str]) -> int:
    """Print the schema."""
    if words:
        raise toml.ConfigError(f"command line: titan schema takes nothing, found {' '.join(words)}")
    print(json.dumps(toml.schema(), indent=2))
    return 0
