"""titan schema [--markdown]

Prints the JSON Schema of a config. Editors that know TOML schemas (Even Better TOML, taplo) complete
and check keys by it where a file's first line names it: #:schema ../docs/config.schema.json

  titan schema > docs/config.schema.json
  titan schema --markdown > docs/config.md            the same as a page to read
  check-jsonschema --schemafile docs/config.schema.json train_configs/*.toml
"""

from __future__ import annotations

import json

from titan.arguments import Parser
from titan.reference import markdown
from titan.schema import schema


def run(words: list[str]) -> int:
    """Print the schema, or the reference."""
    parser = Parser("schema")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(words)
    print(markdown() if options.markdown else json.dumps(schema(), indent=2) + "\n", end="")
    return 0
