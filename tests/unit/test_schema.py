"""The JSON Schema: an editor's validator accepts what we ship and refuses what titan refuses; its copies are current."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli
from jsonschema import Draft7Validator

from titan import fields, toml, zoo
from titan.cli import main
from titan.fields import Check
from titan.schema import schema, type_schema

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "train_configs").glob("*.toml"))
KINDS = {name: kind for name, kind in vars(fields).items() if isinstance((getattr(kind, "__metadata__", ()) or (0,))[0], Check)}

BROKEN = {
    "unknown table": "[trainin]\nsteps = 1",
    "unknown key": "[training]\nstesp = 1",
    "key outside a table": "steps = 1",
    "text for a number": '[training]\nsteps = "10"',
    "a fraction for a whole number": "[training]\nsteps = 10.5",
    "true for a number": "[training]\nsteps = true",
    "a number for a text": "[job]\noutput = 3",
    "a list for a text": '[data]\npath = ["a"]',
    "a text for a list": '[sample]\nprompts = "a"',
    "a number in a list of texts": "[sample]\nprompts = [1]",
    "no steps": "[training]\nsteps = 0",
    "a negative interval": "[checkpoint]\ninterval = -1",
    "degree 0": "[parallel]\ndp_shard = 0",
    "degree -2": "[parallel]\ndp_shard = -2",
    "a share above 1": "[schedule]\nmin_lr_ratio = 1.5",
    "top_p 0": "[sample]\ntop_p = 0",
    "one beta": "[optimizer]\nbetas = [0.9]",
    "beta 1": "[optimizer]\nbetas = [0.9, 1.0]",
    "an empty path": '[data]\npath = " "',
    "an unknown schedule": '[schedule]\nname = "cosin"',
    "an unknown precision": '[precision]\nparam = "float16"',
    "an unknown tracker": '[metrics]\ntrackers = ["tensorbord"]',
    "a tracker twice": '[metrics]\ntrackers = ["wandb", "wandb"]',
    "an unknown style": '[parallel.sharding]\n"layers.*.ffn" = "sec"',
    "a number for a style": '[parallel]\nsharding = {"layers.*.ffn" = 1}',
    "a style without a name": '[parallel]\nsharding = "seq"',
    "a name with dots and without quotes": '[parallel.sharding]\nlayers.ffn = "seq"',
    "a stage without blocks": "[parallel]\npp_split = [8, 0]",
    "a fraction of a block": "[parallel]\npp_split = [7.5, 0.5]",
    "a number for a list of numbers": "[parallel]\npp_split = 8",
    "an unknown operation": '[recompute]\nsave = ["attn"]',
    "a table for a number": "[training.steps]\nx = 1",
    "an unknown model": '[model]\nname = "llama33"',
    "an unknown size": '[model]\nname = "llama3"\nsize = "8bb"',
    "an unknown size of the default model": '[model]\nsize = "8bb"',
    "an unknown field of the model": '[model]\nname = "llama3"\nn_layer = 2',
    "a wrong type in the model": '[model]\nsize = "8b"\ntied_embeddings = 1',
    "what is not a key": "[model]\nconfig = {}",
}


@pytest.fixture(scope="module")
def validator() -> Draft7Validator:
    Draft7Validator.check_schema(schema())
    return Draft7Validator(schema())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_what_we_ship_is_accepted(path: Path, validator: Draft7Validator) -> None:
    assert [error.message for error in validator.iter_errors(tomli.loads(path.read_text()))] == []


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_config_is_refused_by_both(text: str, validator: Draft7Validator, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    assert not validator.is_valid(tomli.loads(text))
    with pytest.raises(toml.ConfigError):
        toml.load(path)


def test_a_resolved_config_is_accepted(validator: Draft7Validator) -> None:
    for path in CONFIGS:
        resolved = tomli.loads(toml.dump(toml.load(path)))
        assert [error.message for error in validator.iter_errors(resolved)] == []


def test_tables_in_tables_are_accepted(validator: Draft7Validator, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    tables = '[parallel]\npp_split = [3, 5]\n[parallel.sharding]\n"layers.*.ffn" = "seq"'
    path.write_text(f'{tables}\n[recompute]\nsave = ["aten.silu"]')
    for text in (path.read_text(), toml.dump(toml.load(path))):
        assert validator.is_valid(tomli.loads(text))


def test_an_editors_validator_agrees(tmp_path: Path) -> None:
    """check-jsonschema, as one runs it by hand, reads the committed schema and TOML files."""
    broken = tmp_path / "broken.toml"
    broken.write_text(BROKEN["an unknown field of the model"])
    command = [sys.executable, "-m", "check_jsonschema", "--schemafile", str(ROOT / "docs" / "config.schema.json")]
    good = subprocess.run([*command, *map(str, CONFIGS)], capture_output=True, text=True, timeout=60)
    assert good.returncode == 0, good.stdout
    bad = subprocess.run([*command, str(broken)], capture_output=True, text=True, timeout=60)
    assert bad.returncode == 1
    assert "n_layer" in bad.stdout


def a_value(name: str, draw: random.Random) -> Any:
    """A value of the kind's type: borders, their neighbours, and anything."""
    kind, _ = toml.unwrap(KINDS[name])
    number = draw.choice([-2, -1, 0, 1, 2, 2**63 - 1, 2**63, draw.randint(-10, 10), draw.randint(-(2**70), 2**70)])
    near = draw.choice([0.0, -0.0, 1.0, -1.0, 0.5])
    fraction = draw.choice([near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf), draw.uniform(-2, 2)])
    text = draw.choice(["", " ", "\n\t", "a", " a ", "\u00a0", "\u00e9", "auto", "never", "0", "1", "2", "08", "10", "8a"])
    if kind is int:
        return number
    if kind is float:
        return fraction
    if kind is str:
        return text
    length = draw.randint(0, 4)
    if kind == list[float]:
        return [draw.choice([0.0, 0.9, 1.0, -0.1, draw.uniform(0, 1)]) for _ in range(length)]
    if kind == list[int]:
        return [draw.choice([-1, 0, 1, 1, 2, 2**70]) for _ in range(length)]
    assert kind == list[str], f"{name}: draw values of {kind} here"
    words = [*fields.TRACKERS, *fields.TRACKERS] if name == "Trackers" else [*fields.SAVED, "aten.silu", "aten.a b", "aten."]
    return [draw.choice([*words, "other", ""]) for _ in range(length)]


@pytest.mark.parametrize("name", KINDS)
def test_a_checks_keywords_say_what_the_check_says(name: str) -> None:
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    check = toml.unwrap(KINDS[name])[1]
    assert check is not None
    validator = Draft7Validator(type_schema(KINDS[name]))
    seen = set()
    for _ in range(500):
        value = a_value(name, draw)
        holds = check.holds(value)
        seen.add(holds)
        assert validator.is_valid(value) == holds, f"seed {seed}: {name}: {value!r}"
    assert seen == {True, False}, f"seed {seed}: nothing drawn on one side"


def test_every_key_has_its_meaning_and_its_default() -> None:
    tables = schema()["properties"]
    for table, kind in toml.table_kinds().items():
        properties = tables[table]["properties"]
        for key, default in vars(kind()).items():
            if table == "model" and key == "config":
                continue
            assert properties[key]["description"], f"{table}.{key} has no docstring"
            assert properties[key].get("default") == default
            assert default is None or Draft7Validator(properties[key]).is_valid(default)
    for name, rule in zip(zoo.names(), tables["model"]["allOf"], strict=True):
        then = rule["then"]["properties"]
        assert then["size"]["enum"] == list(zoo.sizes(name))
        assert set(then) == {"name", "size", *(f.name for f in dataclasses.fields(zoo.config_class(name)))}
        assert all(entry["description"].split("\nBy size")[0] for key, entry in then.items() if key != "name")


@pytest.mark.parametrize(("words", "file"), [(["schema"], "config.schema.json"), (["schema", "--markdown"], "config.md")])
def test_the_committed_copies_are_current(words: list[str], file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert (ROOT / "docs" / file).read_text() == printed, f"renew it: titan {' '.join(words)} > docs/{file}"


def test_the_reference_names_every_key() -> None:
    text = (ROOT / "docs" / "config.md").read_text()
    for table, entry in json.loads((ROOT / "docs" / "config.schema.json").read_text())["properties"].items():
        part = text.split(f"## [{table}]")[1].split("\n## ")[0]
        assert all(f"| `{key}` |" in part for key in entry["properties"])
        assert "<" not in part.replace("\\<", ""), "Markdown would swallow it"


def test_the_schema_needs_no_torch() -> None:
    code = "import sys; from titan.cli import main; main(['schema']); assert not {'torch', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
