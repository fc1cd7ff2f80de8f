"""What a field of the config may hold: a type, a condition, and the words that say what was expected.

`titan.toml` checks a value by it and refuses it in its words; `titan.schema` gives the same condition to editors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any


@dataclass(frozen=True)
class Check:
    """A condition on one value, and the words that say what was expected ("a whole number, 1 or more").

    `keywords` are the same condition in JSON Schema, for editors.
    """

    expected: str
    holds: Callable[[Any], bool]
    keywords: dict[str, Any] = field(hash=False)


FAULT = "((raise|kill|hang|nan|nan-batch|spike|save)@[1-9][0-9]*(:[0-9]+)?)?"
Count = Annotated[int, Check("a whole number, 1 or more", lambda v: v >= 1, {"minimum": 1})]
CountOrZero = Annotated[int, Check("a whole number, 0 or more", lambda v: v >= 0, {"minimum": 0})]
CountOrRest = Annotated[
    int,
    Check(
        "a whole number, 1 or more, or -1 for what is left",
        lambda v: v >= 1 or v == -1,
        {"anyOf": [{"minimum": 1}, {"const": -1}]},
    ),
]
Seed = Annotated[
    int, Check("a whole number from 0 to 2**63 - 1", lambda v: 0 <= v < 2**63, {"minimum": 0, "maximum": 2**63 - 1})
]
Positive = Annotated[float, Check("a number above 0", lambda v: v > 0, {"exclusiveMinimum": 0})]
PositiveOrZero = Annotated[float, Check("a number, 0 or more", lambda v: v >= 0, {"minimum": 0})]
Share = Annotated[float, Check("a number from 0 to 1", lambda v: 0 <= v <= 1, {"minimum": 0, "maximum": 1})]
PositiveShare = Annotated[
    float, Check("a number above 0, up to 1", lambda v: 0 < v <= 1, {"exclusiveMinimum": 0, "maximum": 1})
]
Text = Annotated[str, Check("a text that is not empty", lambda v: v.strip() != "", {"pattern": r"\S"})]
FaultText = Annotated[
    str,
    Check(
        'empty, or KIND@STEP or KIND@STEP:RANK with raise, kill, hang, nan, nan-batch, spike or save, such as "kill@5:1"',
        lambda v: re.fullmatch(FAULT, v) is not None,
        {"pattern": f"^({FAULT})$"},
    ),
]
Reshard = Annotated[
    str,
    Check(
        '"auto", "always", "never", or a number of ranks above 1 in quotes, such as "8"',
        lambda v: re.fullmatch("auto|always|never|[2-9]|[1-9][0-9]+", v) is not None,
        {"pattern": "^(auto|always|never|[2-9]|[1-9][0-9]+)$"},
    ),
]
Betas = Annotated[
    list[float],
    Check(
        "two numbers, each from 0 up to (not including) 1",
        lambda v: len(v) == 2 and all(0 <= b < 1 for b in v),
        {"minItems": 2, "maxItems": 2, "items": {"minimum": 0, "exclusiveMaximum": 1}},
    ),
]
SourceName = Annotated[
    str,
    Check(
        "a name of letters, digits, - and _",
        lambda v: re.fullmatch("[A-Za-z0-9_-]+", v) is not None,
        {"pattern": "^[A-Za-z0-9_-]+$"},
    ),
]
Weights = Annotated[
    list[float],
    Check("a list of numbers, 0 or more, such as [0.5, 0.1]", lambda v: all(n >= 0 for n in v), {"items": {"minimum": 0}}),
]
Counts = Annotated[
    list[int],
    Check("a list of whole numbers, 1 or more, such as [3, 5]", lambda v: all(n >= 1 for n in v), {"items": {"minimum": 1}}),
]
Ranks = Annotated[
    list[int],
    Check(
        "a list of ranks, such as [0, 7]",
        lambda v: v != [] and all(n >= 0 for n in v),
        {"minItems": 1, "items": {"minimum": 0}},
    ),
]
SAVED = ("mm", "attention")
Saved = Annotated[
    list[str],
    Check(
        'a list out of "mm", "attention" and ATen operations such as "aten.silu"',
        lambda v: all(word in SAVED or (word.startswith("aten.") and len(word) > len("aten.")) for word in v),
        {"items": {"anyOf": [{"enum": list(SAVED)}, {"pattern": r"^aten\..+"}]}},
    ),
]
ACCEPTABLE = ("data.path", "data.tokenizer", "data.packing", "data.sources", "training.seq_len", "training.seed")
Accepted = Annotated[
    list[str],
    Check(
        "a list out of " + ", ".join(f'"{key}"' for key in ACCEPTABLE),
        lambda v: set(v) <= set(ACCEPTABLE),
        {"items": {"enum": list(ACCEPTABLE)}},
    ),
]
TRACKERS = ("tensorboard", "wandb", "mlflow")
Trackers = Annotated[
    list[str],
    Check(
        "a list without repeats out of " + ", ".join(f'"{name}"' for name in TRACKERS),
        lambda v: len(set(v)) == len(v) and set(v) <= set(TRACKERS),
        {"uniqueItems": True, "items": {"enum": list(TRACKERS)}},
    ),
]
