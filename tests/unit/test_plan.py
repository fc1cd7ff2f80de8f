"""`titan plan`: what it prints, what it refuses, what it knows of clusters. That it is true: tests/parity/test_dryrun.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from titan import toml
from titan.cli import main
from titan.config import Degrees
from titan.dryrun.cluster import DATA_SHEETS, FOLDER, read_cluster
from titan.dryrun.plan import ends, look, typical_ranks
from titan.dryrun.prices import leaving
from titan.dryrun.words import usable
from titan.metrics.peaks import PEAKS
from titan.toml import ConfigError

CONFIGS = Path(__file__).parents[2] / "train_configs"
SMALL = [str(CONFIGS / "debug.toml"), "--model.n_layers=4", "--training.seq_len=64"]
SMALLER = [str(CONFIGS / "debug.toml"), "--model.n_layers=2", "--training.seq_len=64"]


def test_a_job_s_plan_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL, "--world-size=16", "--plan=pp=2,tp=2,dp_shard=4"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("16 GPUs (H100 SXM): dp_shard 4 x tp 2 x pp 2, ")
    assert "It fits: " in said
    assert "layers 2-3, norm, head" in said
    assert "Of the passes' time pipeline ranks idle " in said
    (step,) = [line for line in said.splitlines() if line.startswith("A step takes ")]
    assert re.fullmatch(r"A step takes [\d.]+ ms: [\d,]+ tokens a second and GPU\.", step)
    rate = float(re.search(r"([\d,]+) tokens a second and GPU", step)[1].replace(",", ""))  # type: ignore[index]
    (read,) = re.findall(r"data-parallel rank has to read ([\d,]+) tokens a second", said)
    assert float(read.replace(",", "")) == pytest.approx(rate * 4, rel=1e-3), "2 stages x 2 tp"
    (gathers,) = [line.split() for line in said.splitlines() if "all_gather" in line]
    assert gathers[:3] == ["dp_shard", "all_gather", "4"]
    assert float(gathers[-2]) > 0 == float(gathers[-1]), "eight GPUs in a row are a node: 4 x 2"
    (sends,) = [line.split() for line in said.splitlines() if line.startswith("  pp            send")]
    assert float(sends[-2]) == 0
    assert max(map(len, said.splitlines())) <= 100


def test_a_job_s_plan_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL, "--world-size=4", "--plan=pp=2,dp_shard=2", "--cluster=h200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["plan"] == {"dp_replicate": 1, "dp_shard": 2, "tp": 1, "cp": 1, "pp": 2}
    assert len(found["memory"]) == 2
    most = max(sum(size for kind, size in rank.items() if kind != "host") for rank in found["memory"])
    assert found["memory_gib"] == pytest.approx(most, abs=1e-3)
    assert set(found["traffic"]) == {"dp_shard", "pp", "all"}
    assert 0 < found["bubble_if_alike"] < found["bubble"] < 1, "the head is no block"
    assert sum(found["spent_seconds"].values()) == pytest.approx(found["step_seconds"])
    tokens = 16 * 64 / found["step_seconds"]
    assert found["tokens_per_second_per_gpu"] == pytest.approx(tokens / 4)
    assert found["mfu"] == pytest.approx(found["flops"] / 4 / found["step_seconds"] / 989e12)


def test_what_is_too_much_is_said_with_what_would_help(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny = (FOLDER / "h100.toml").read_text().replace("memory_gib = 79.1", "memory_gib = 0.003")
    (tmp_path / "tiny.toml").write_text(tiny.replace("reserved_gib = 1.5", "reserved_gib = 0.0"))
    assert main(["plan", *SMALLER, "--world-size=2", f"--cluster={tmp_path / 'tiny.toml'}", "--savings"]) == 0
    said = capsys.readouterr().out
    assert "It does not fit: " in said
    assert "GiB too many" in said
    lines = said.splitlines()
    begin = lines.index("What would save most, each by itself:")
    tried = [line.split() for line in lines[begin + 1 : begin + 4]]
    assert [float(words[-4]) for words in tried] == sorted(float(words[-4]) for words in tried)
    assert all(words[0].startswith("--") for words in tried)


def test_two_configs_side_by_side(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = (CONFIGS / "debug.toml").read_text() + '\n[recompute]\nmode = "full"\n'
    (tmp_path / "b.toml").write_text(other)
    words = [SMALLER[0], str(tmp_path / "b.toml"), *SMALLER[1:], "--parallel.dp_shard=2"]
    assert main(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert 'recompute.mode = "none" and "full"' in said
    rows = {line[2:38].strip(): line[38:].replace(",", "").split() for line in said.splitlines() if line.startswith("  ")}
    assert rows["parameters"][2] == "+0.000"
    assert "On H100 SXM, 79.1 GiB: A fits, B fits." in said
    assert float(rows["in all, with reserved"][0]) >= float(rows["in all, with reserved"][1])
    assert float(rows["sent, dp_shard, in a node"][2]) == 0
    assert main(["plan", SMALL[0], str(CONFIGS / "gpt2_124m.toml"), "--training.micro_batch_size=1", "--plan=dp_shard=2"]) == 0
    said = capsys.readouterr().out
    assert "model.dropout = - and" in said
    assert "model.rope_theta = 500000.0 and -" in said
    assert main(["plan", *words, "--json"]) == 0
    a, b = json.loads(capsys.readouterr().out)
    assert a["memory_gib"] > b["memory_gib"]
    assert main(["plan", *words, "--savings"]) == 2


def test_data_that_is_elsewhere_does_not_matter(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data.path=/nowhere/shards", "--data.tokenizer=/nowhere/tokenizer.json", "--job.output=/nowhere"]
    assert main(["plan", *SMALL, *words, "--plan=dp_shard=2"]) == 0
    assert "2 GPUs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--world-size=3", "--plan=tp=2"], "do not multiply up to 3 ranks"),
        (["--cluster=h10"], "no cluster 'h10'; did you mean 'h100'?"),
        (["--cluster=nowhere.toml"], "nowhere.toml: no such file"),
        (["--world-size=-1"], "--world-size is a whole number"),
        (["--world-size=0"], "--world-size is a whole number"),
        (["--plan=tp=3"], "command line: parallel.tp: 3 ranks cannot share"),
        (["--model.name=gpt2", "--model.size=debug", "--kernels.swiglu=triton"], "gpt2 has no SwiGLU"),
        (["--plan=dp_shard=2,recompute.mode=selective,recompute.save=[\"aten.sillu\"]"], "did you mean 'aten.silu'?"),
    ],
)
def test_what_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL, *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", DATA_SHEETS)
def test_clusters_say_what_peaks_say(name: str) -> None:
    path = FOLDER / f"{name}.toml"
    cluster = read_cluster(path.stem)
    assert cluster.gpu.bfloat16_tflops == PEAKS[path.stem.upper()][0]
    assert cluster == read_cluster(str(path))
    assert "data sheet" in path.read_text().split("[gpu]")[0]


def test_a_cluster_s_file_is_checked(tmp_path: Path) -> None:
    good = (FOLDER / "h100.toml").read_text()
    for old, new, said in (
        ("memory_gib = 79.1", "memory_gb = 79.1", "gpu.memory_gb: unknown key; did you mean 'memory_gib'?"),
        ("memory_gib = 79.1", "", "gpu.memory_gib: missing; expected a number above 0"),
        ("gpus_per_node = 8", "gpus_per_node = 0", "links.gpus_per_node: expected a whole number, 1 or more, not 0"),
        ("[links]", "[link]", "[link]: unknown table; did you mean 'links'?"),
    ):
        path = tmp_path / "own.toml"
        path.write_text(good.replace(old, new))
        with pytest.raises(ConfigError) as error:
            read_cluster(str(path))
        assert said in str(error.value), said


SHIPPED = [path for path in sorted(CONFIGS.glob("*.toml")) if re.search(r"GPUs: \d+ x", path.read_text())]
STATED = {80: "h100", 141: "h200"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_fits_the_gpus_that_it_names(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = path.read_text().split("[")[0]
    gpus = re.search(r"GPUs: (\d+) x (\d+) GB", head)
    assert gpus
    words = [str(path), f"--world-size={gpus[1]}", f"--cluster={STATED[int(gpus[2])]}", "--json"]
    assert main(["plan", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"], found["memory_gib"]
    said = re.search(r"(\d+) GiB on the fullest GPU", head)
    assert said is None or abs(int(said[1]) - found["memory_gib"]) <= 1
    between = re.search(r"bubble of (\d+)%", head)
    assert between is None or abs(int(between[1]) / 100 - found["bubble_if_alike"]) <= 0.006


def test_which_ranks_take_a_step() -> None:
    assert typical_ranks(Degrees(1, 2, 4, 1, 3)) == [3, 11, 19]
    alike: list[object] = ["first", "a", "a", "a", "a", "last"]
    assert ends(alike, [6, 5, 4, 3, 2, 1]) == [0, 1, 4, 5]
    assert ends(alike, [6, 5, 4, 5, 2, 1]) == [0, 1, 2, 3, 4, 5], "a rank that holds more than the one before"
    assert ends(["a", "b", "a", "b"], [4, 3, 2, 1]) == [0, 1, 2, 3]
    assert ends(["only"], [1]) == [0]


def test_what_leaves_a_rank() -> None:
    assert leaving("all_gather", 800, 8, near=8) == leaving("all_to_all", 800, 8, near=8) == (700, 0)
    assert leaving("all_gather", 800, 8, near=1) == leaving("all_to_all", 800, 8, near=1) == (0, 700)
    assert leaving("reduce_scatter", 800, 8, near=4) == (525, 175)
    assert leaving("all_to_all", 800, 8, near=4) == (300, 400)
    assert leaving("all_reduce", 800, 8, near=8) == (1400, 0)
    assert leaving("send", 800, 8, near=1) == (0, 800)
    assert leaving("recv", 800, 8, near=1) == leaving("all_gather", 800, 1, near=1) == (0, 0)


def test_a_copy_that_is_kept_within_a_node_is_gathered_there() -> None:
    words = ["--parallel.reshard_after_forward=8", "--training.global_batch_size=64", "--training.micro_batch_size=1"]
    config = toml.load(SMALL[0], [*SMALL[1:], *words])
    again, first = sorted((s for s in look(config, 9, 64, 8).sent if s.op == "all_gather"), key=lambda s: s.ranks)
    assert (again.ranks, again.between, first.ranks) == (8, 0, 64)
    assert first.between > 0


def test_savings_are_the_job_s(capsys: pytest.CaptureFixture[str]) -> None:
    """The fullest rank after a change may be another one."""
    words = ["--plan=pp=2", "--model.vocab_size=8192", "--training.micro_batch_size=1", "--training.global_batch_size=4"]
    assert main(["plan", *SMALL, *words, "--savings"]) == 0
    (said,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  --recompute.mode=full")]
    assert main(["plan", *SMALL, *words, "--recompute.mode=full", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(found["memory_gib"] - 1.5, abs=0.01)


def test_room_is_left_for_fragments() -> None:
    assert usable(read_cluster("h100")) == pytest.approx(79.1 * 0.95)
