"""`titan explain`: every number on the page from its formula or its source, for several plans and both models."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from titan.arguments import read_config
from titan.cli import main
from titan.commands.verify import with_plan
from titan.config import Config, least_ranks
from titan.drawing.memory import KINDS, amount
from titan.drawing.mesh import places
from titan.dryrun.cluster import Cluster, read_cluster
from titan.dryrun.plan import JobPlan, plan_job
from titan.dryrun.words import as_json, busiest
from titan.explaining.numbers import DRY_RUN, evaluate, figure, shown
from titan.explaining.page import page
from titan.holdings import holdings
from titan.parallel.context import pieces

CONFIG = str(Path(__file__).parents[2] / "train_configs" / "debug.toml")
SMALL = ["--model.n_layers=2", "--training.seq_len=64", "--training.global_batch_size=8", "--training.micro_batch_size=1"]
GPT2 = ["--model.name=gpt2", "--model.size=debug"]
PLANS = {
    "pipeline": ("pp=2,tp=2,dp_shard=2", [], 0),
    "context": ("cp=2,dp_shard=2,dp_replicate=2", ["--precision.param=bfloat16"], 0),
    "uneven": ("dp_shard=3", ["--training.global_batch_size=6"], 0),
    "alone": ("tp=1", [], 0),
    "shared-heads": ("tp=8", ["--recompute.mode=full"], 0),
    "kept": ("dp_shard=16", ["--parallel.reshard_after_forward=8", "--training.global_batch_size=16"], 0),
    "gpt2": ("tp=2,dp_replicate=2,cp=2,cp_method=ulysses", GPT2, 0),
    "gpt2-v": ("pp=2,pp_schedule=ZBVZeroBubble", [*GPT2, "--model.n_layers=4"], 0),
    "eight-bits": ("tp=2,dp_shard=2,async_tp=true,precision.float8=tensorwise,offload.activations=true", [], 0),
    "offloaded": ("dp_shard=2,cp=2,cp_method=allgather,offload.states=true,recompute.mode=selective", [], 0),
    "large": ("dp_replicate=-1,tp=2", ["--training.global_batch_size=128"], 256),
}
VOID = ("meta", "br")
SCALES: dict[str, float] = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "bytes": 1}
SCALES |= {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "s": 1, "ms": 1e-3, "µs": 1e-6, "%": 0.01}
SCALES |= {f"{letter}FLOP": 10.0**power for letter, power in zip("MGTPEZY", range(6, 27, 3), strict=True)}


@dataclass
class Node:
    """An element."""

    tag: str
    data: dict[str, str]
    above: Node | None = None
    inside: list[Node | str] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        yield self
        for item in self.inside:
            if isinstance(item, Node):
                yield from item.walk()

    @property
    def text(self) -> str:
        return "".join(item if isinstance(item, str) else item.text for item in self.inside)

    @property
    def kinds(self) -> set[str]:
        """Its tag and classes, and those of all above it."""
        own = {self.tag, *self.data.get("class", "").split()}
        return own | (self.above.kinds if self.above else set())

    @property
    def numbers(self) -> list[Node]:
        return [node for node in self.walk() if "data-value" in node.data]

    @property
    def value(self) -> float:
        return float(self.data["data-value"])


class Tree(HTMLParser):
    """Of a page."""

    def __init__(self, written: str) -> None:
        super().__init__()
        self.at = self.root = Node("", {})
        self.feed(written)
        assert self.at is self.root, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {key: value or "" for key, value in attrs}, self.at)
        self.at.inside.append(node)
        if tag not in VOID:
            self.at = node

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.at.inside.append(Node(tag, {key: value or "" for key, value in attrs}, self.at))

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.at.tag, (tag, self.at.tag)
        assert self.at.above
        self.at = self.at.above

    def handle_data(self, data: str) -> None:
        self.at.inside.append(data)


@dataclass
class Told:
    """A plan and its page."""

    config: Config
    cluster: Cluster
    plan: JobPlan
    written: str
    root: Node

    def said(self, lead: str) -> Node:
        """The first number of the innermost element whose text begins so."""
        found = [node for node in self.root.walk() if node.text.startswith(lead) and node.numbers]
        return min(found, key=lambda node: len(node.text)).numbers[0]


@pytest.fixture(scope="module", params=PLANS)
def told(request: pytest.FixtureRequest) -> Told:
    plan, more, world = PLANS[request.param]
    config, cluster = read_config(with_plan(plan, [CONFIG, *SMALL, *more])), read_cluster("h100")
    job = plan_job(config, world or least_ranks(config.parallel), cluster)
    written = page(config, job, cluster)
    return Told(config, cluster, job, written, Tree(written).root)


def arithmetic(formula: str) -> float:
    """A filled-in formula's value, without the page's own code."""
    bare = re.sub(r"\([a-z ,_A-Z-]*\)|\b(?:bytes|byte|GiB)\b", "", formula).replace(",", "").replace(" x ", "*")
    assert re.fullmatch(r"(?:[\d.+\-*/() ]|ceil|floor)+", bare), formula
    signs: dict[type, Any] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node: Any) -> float:
        if isinstance(node, ast.BinOp):
            return signs[type(node.op)](value(node.left), value(node.right))  # type: ignore[no-any-return]
        if isinstance(node, ast.Call):
            return getattr(math, node.func.id)(value(node.args[0]))  # type: ignore[attr-defined, no-any-return]
        return float(node.value)

    return value(ast.parse(bare.strip(), mode="eval").body)


def test_every_formula_gives_the_number_that_is_shown(told: Told) -> None:
    numbers = told.root.numbers
    assert len(numbers) > 50
    assert sum("data-formula" in node.data for node in numbers) > len(numbers) / 2
    for node in numbers:
        bold, *behind = (item for item in node.inside if isinstance(item, Node))
        figures, unit = re.fullmatch(r"([\d,.]+) ?(.*)", bold.text).groups()  # type: ignore[union-attr]
        scale = SCALES.get(unit, 1) if node.data["data-unit"] in ("memory", "sent", "seconds", "flop", "share") else 1
        half = 0.5 * 10 ** -len(figures.partition(".")[2]) * scale
        assert abs(float(figures.replace(",", "")) * scale - node.value) <= half * 1.001 + 1e-9 * node.value, node.data
        if formula := node.data.get("data-formula"):
            assert arithmetic(formula) == pytest.approx(node.value, rel=1e-12, abs=1e-12)
            assert all(shown.text == f"= {formula}" for shown in behind)
        else:
            assert not behind
            assert node.data["data-from"], "a number without a formula says where it comes from"


def test_what_has_no_formula_is_what_the_plan_or_a_file_says(told: Told) -> None:
    rank_numbers = {rank.parameters for rank in told.plan.ranks}
    found = {float(size) for rank in told.plan.ranks for size in rank.peak.values()} | set(told.plan.time.spent.values())
    found |= {told.plan.bubble}
    for node in told.root.numbers:
        source = node.data.get("data-from", "")
        table, _, key = source.rpartition(".")
        if source == "holdings":
            assert node.value in rank_numbers
        elif source == DRY_RUN and node.data["data-unit"] in ("memory", "seconds", "share"):
            assert node.value in found
        elif source == DRY_RUN:
            assert node.data["data-unit"] in ("ranks", "messages", "message", ""), node.data
        elif source.startswith("cluster."):
            assert node.value == getattr(getattr(told.cluster, source.split(".")[1]), key)
        elif source:
            assert node.value == getattr(told.plan.plan if table == "plan" else getattr(told.config, table), key)


def test_no_digit_stands_alone(told: Told) -> None:
    """Text with digits is a number's, a name (a rank, a layer), a formula in letters, or a picture's."""
    for node in told.root.walk():
        for item in node.inside:
            if isinstance(item, str) and re.search(r"\d", item):
                kinds = node.kinds
                assert kinds & {"number", "name", "letters", "svg", "style", "script", "title"}, (node.tag, item)


def test_inputs_are_the_plan_s(told: Told) -> None:
    training, plan = told.config.training, told.plan.plan
    known: dict[str, float] = {key: getattr(plan, key) for key in ("tp", "cp", "pp", "dp_shard", "dp_replicate")}
    known |= {key: getattr(training, key) for key in ("seq_len", "global_batch_size", "micro_batch_size", "steps")}
    known |= {"T": plan.tp, "n": plan.cp, "B": training.micro_batch_size, "s": training.seq_len // plan.cp, "GPUs": plan.world}
    known |= {"M": training.global_batch_size // (plan.data_parallel * training.micro_batch_size)}
    known |= {"d": told.config.model.config.dim, "layers": told.config.model.config.n_layers}
    known |= {"dp_shard x cp": plan.dp_shard * plan.cp, "blocks": told.config.model.config.n_layers}
    seen = set()
    for node in told.root.numbers:
        for figures, label in re.findall(r"([\d,.]+) \(([a-zA-Z_ ]+)\)", node.data.get("data-formula", "")):
            if label in known:
                assert float(figures.replace(",", "")) == known[label], (label, node.data)
                seen.add(label)
    assert seen >= {"seq_len", "global_batch_size", "steps"}
    assert all(getattr(plan, key) == 1 or key in seen for key in ("tp", "cp", "dp_replicate"))


def test_the_page_says_what_the_plan_says(told: Told) -> None:
    known = as_json(told.config, told.plan, told.cluster)
    near = lambda value: pytest.approx(value, rel=1e-4)  # noqa: E731
    assert told.said("parameters of the model").value == told.plan.parameters
    assert told.said("operations in a step").value == told.plan.flops
    assert told.said("in all").value == near(known["memory_gib"])
    assert told.said("speed").value == near(known["tokens_per_second_per_gpu"])
    assert told.said("MFU").value == near(known["mfu"])
    assert told.said("the whole run").value == near(known["step_seconds"] * told.config.training.steps / 3600)
    assert ("It fits" in told.root.text) == known["fits"]
    if told.plan.plan.pp > 1:
        assert told.said("share of the passes' time").value == pytest.approx(known["bubble"], abs=1e-4)
        assert told.said("if all stages were alike").value == near(known["bubble_if_alike"])
    for kind, size in told.plan.fullest.peak.items():
        bars = [node for node in told.root.walk() if node.data.get("class") == "what" and node.text.startswith(kind)]
        assert [bar.numbers[0].value for bar in bars] == ([size] if size else [])
    kinds = {kind: told.said(kind) for kind in ("parameters", "optimizer") if told.plan.fullest.peak[kind]}
    assert all("data-formula" in node.data for node in kinds.values())


def test_traffic_is_the_plan_s_by_formula(told: Told) -> None:
    (section,) = [node for node in told.root.walk() if node.data.get("id") == "traffic"]
    cards = [node for node in section.walk() if node.data.get("class") == "card"]
    sends = [sent for sent in busiest(told.plan).sent if sent.ranks > 1]
    assert len(cards) == len(sends)
    for sent in sends:
        title = f"{sent.dimension} {sent.op} among {sent.ranks:,} ranks"
        (card,) = [card for card in cards if card.text.startswith(title)]
        lines = [node for node in card.walk() if node.tag == "li"]
        *flows, total, inside, between = [line.numbers for line in lines]
        assert sum(count.value for count, _ in flows) == sent.messages
        assert sum(size.value for _, size in flows) == total[0].value == sent.message_bytes
        assert all("data-formula" in size.data for _, size in flows)
        assert abs(inside[0].value - sent.inside) <= 2
        assert abs(between[0].value - sent.between) <= 2
    if sends:
        assert told.said("to GPUs of its node").value == pytest.approx(sum(s.inside for s in sends), abs=len(sends) * 2)
        assert told.said("to other nodes").value == pytest.approx(sum(s.between for s in sends), abs=len(sends) * 2)


def test_shards_are_what_the_code_cuts(told: Told) -> None:
    (section,) = [node for node in told.root.walk() if node.data.get("id") == "parameters"]
    cards = {node.text.split("whole: ")[0]: node for node in section.walk() if node.data.get("class") == "card"}
    for rank in told.plan.ranks:
        total = 0
        for name, held in holdings(told.config, rank.rank, told.plan.plan.world).items():
            card = cards[re.sub(r"^layers\.\d+", "layers.*", name)]
            lines = {line.text.split(": ")[0]: line.numbers for line in card.walk() if line.tag == "li"}
            assert lines["whole"][0].value == 4 * math.prod(held.shape)
            assert [node.value for node in lines["its shape"]] == list(held.size)
            assert lines["shard"][0].value == 4 * math.prod(held.size)
            total += math.prod(held.size)
        assert total == rank.parameters


def test_the_mesh_tells_of_each_rank_its_samples_tokens_and_neighbours(told: Told) -> None:
    plan, training = told.plan.plan, told.config.training
    by_rank = {at.rank: at for at in places(plan)}
    buttons = [int(node.data["data-rank"]) for node in told.root.walk() if node.tag == "button"]
    panels = {int(node.data["id"][5:]): node for node in told.root.walk() if node.data.get("id", "").startswith("rank-")}
    assert buttons == list(panels) == sorted(set(buttons))
    assert len(buttons) == min(64, plan.world)
    assert ("Not all ranks are drawn" in told.root.text) == (plan.world > 64)
    seen = set()
    for rank, panel in panels.items():
        lines = {line.text.split(": ")[0]: line for line in panel.walk() if line.tag == "li" and line is not panel}
        first, last = (round(lines[key].numbers[0].value) for key in ("first of its samples in a batch", "last"))
        seen |= set(range(first, last + 1))
        at = by_rank[rank]
        each = training.global_batch_size // plan.data_parallel
        assert (first, last + 1) == tuple(each * (at.replicate * plan.dp_shard + at.shard + i) for i in (0, 1))
        if plan.cp > 1:
            begin, middle, tail, end = (
                n.value for key in ("tokens of a sequence, from", "and from") for n in lines[key].numbers
            )
            assert ((begin, middle + 1), (tail, end + 1)) == pieces(training.seq_len, at.cp, plan.cp)
        for line in panel.walk():
            if key := line.data.get("data-neighbours"):
                axis = key.removeprefix("dp_")
                others = [other for other in by_rank.values() if apart(at, other) <= {axis}]
                assert numbers_in(line.text) == [other.rank for other in others]
                assert len(others) == getattr(plan, key)
    assert plan.world > 64 or seen == set(range(training.global_batch_size))


def apart(a: Any, b: Any) -> set[str]:
    return {axis for axis in ("pp", "replicate", "shard", "cp", "tp") if getattr(a, axis) != getattr(b, axis)}


def numbers_in(said: str) -> list[int]:
    """0-2, 5 -> 0, 1, 2, 5"""
    spans = [[int(end) for end in part.split("-")] for part in said.split(", ")]
    return [n for span in spans for n in range(span[0], span[-1] + 1)]


def test_the_picture_of_memory_has_the_fullest_moment(told: Told) -> None:
    stories = [(rank, rank.story) for rank in told.plan.ranks if rank.story is not None]
    assert stories
    for rank, story in stories:
        assert dict(zip(KINDS, story.peak[1], strict=True)) == rank.peak
        assert [when for when, _ in story.points] == sorted({when for when, _ in story.points})
    assert any(f"peak {amount(rank.device_bytes)}" in told.written for rank, _ in stories)


def test_the_page_needs_nothing_else_and_works_without_a_script(told: Told) -> None:
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|<link|<img|\bsrc=|@import|url\(", told.written)
    assert told.written.count("<style>") == told.written.count("<script>") == 1
    assert len(re.findall(r"<svg", told.written)) == 1 + (told.plan.plan.pp > 1), "memory, and the pipeline"
    (details,) = [node for node in told.root.walk() if node.tag == "details" and "in words" in node.text.split("rank 0")[0]]
    assert all(node.kinds & {"details"} for node in told.root.walk() if node.data.get("id", "").startswith("rank-"))
    assert details.inside[0].tag == "summary"  # type: ignore[union-attr]
    for word in ("width=device-width", "prefers-color-scheme: dark", "@media print", 'lang="en"'):
        assert word in told.written
    ids = [node.data["id"] for node in told.root.walk() if "id" in node.data]
    assert len(ids) == len(set(ids))
    links = [node.data["href"][1:] for node in told.root.walk() if node.tag == "a"]
    assert links == [node.data["id"] for node in told.root.walk() if node.tag == "section"]


def test_the_command_writes_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a<b>&.toml").write_text(Path(CONFIG).read_text())
    assert main(["explain", "a<b>&.toml", *SMALL, "--world-size=2"]) == 0
    assert capsys.readouterr().out == "written: a<b>&.html\n"
    assert [path.name for path in tmp_path.glob("*.html")] == ["a<b>&.html"]
    written = (tmp_path / "a<b>&.html").read_text()
    assert "a&lt;b&gt;&amp;.toml" in written
    assert "a<b>" not in written


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out=page.svg"], "what is written is HTML; name it page.html"),
        (["--out=nowhere/page.html"], "there is no folder nowhere"),
        (["--world-size=3", "--plan=tp=2"], "do not multiply up to 3 ranks"),
        (["--world-size=0"], "--world-size is a whole number"),
        (["--cluster=h10"], "no cluster 'h10'; did you mean 'h100'?"),
        (["--plan=tp=3"], "command line: parallel.tp: 3 ranks cannot share"),
        (["--worldsize=2"], "unknown '--worldsize=2'"),
    ],
)
def test_what_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", CONFIG, *SMALL, *words]) == 2
    assert said in capsys.readouterr().err


def test_formulas_are_arithmetic_alone() -> None:
    assert evaluate("4,096 x 14,336 / 8 (tp) / 8 (dp_shard) x 4 bytes") == 3.5 * 2**20
    assert evaluate("ceil(10 / 4 (tp)) x (2 (T) - 1)") == 3
    assert isinstance(evaluate("8,030,261,248 x 2,097,152 x 6 / 3"), int)
    for wrong in ("2 ** 9", "", "1 +", "2 (tp", "ceil(1, 2)[0]", "1 if 2 else 3"):
        with pytest.raises(ValueError, match="no arithmetic"):
            evaluate(wrong)


def test_figures_for_people() -> None:
    assert shown(3.5 * 2**20, "memory") == "3.50 MiB"
    assert shown(224_847_000_000, "sent") == "225 GB"
    assert shown(0, "sent") == "0 bytes"
    assert shown(0.0019, "seconds") == "1.90 ms"
    assert shown(0.44, "share") == "44.0%"
    assert shown(8_030_261_248, "") == "8,030,261,248"
    assert figure(0.000123456789) == "0.000123457"
    assert figure(3.5) == "3.5"
