"""TOML and command line: right ones round-trip, wrong ones get their sentence, quickly and without torch."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from titan import toml
from titan.check import problems
from titan.cli import main

ROOT = Path(__file__).parents[2]

WRONG = [
    # (name, TOML or None for the file as it is, command line, what the sentence must hold)
    ("unknown table", "[trainin]\nsteps = 1", [], ["x.toml:1", "[trainin]", "did you mean 'training'?"]),
    ("unknown key", "[training]\n\nstesp = 1", [], ["x.toml:3", "training.stesp", "did you mean 'steps'?"]),
    ("far key", "[metrics]\nqqq = 1", [], ["metrics.qqq", "[metrics] has interval, trackers"]),
    ("text for number", '[training]\nsteps = "10"', [], ["training.steps", "a whole number, 1 or more", '"10"']),
    ("float for int", "[training]\nsteps = 10.5", [], ["training.steps", "a whole number", "10.5"]),
    ("bool for int", "[training]\nsteps = true", [], ["training.steps", "a whole number", "true"]),
    ("int for bool", "[model]\ntied_embeddings = 1", [], ["model.tied_embeddings", "true or false"]),
    ("unknown tracker", '[metrics]\ntrackers = ["tensorbord"]', [], ["metrics.trackers", '"tensorboard", "wandb", "mlflow"']),
    ("negative steps", "[training]\nsteps = -5", [], ["training.steps", "1 or more", "-5"]),
    ("nan", "[optimizer]\nlr = nan", [], ["optimizer.lr", "a number, 0 or more", "nan"]),
    ("1e999", "[optimizer]\nlr = 1e999", [], ["optimizer.lr", "a number, 0 or more", "inf"]),
    ("duplicate key", "[training]\nsteps = 1\nsteps = 2", [], ["x.toml", "line 3", "twice"]),
    ("duplicate table", "[training]\nsteps = 1\n[training]\nseed = 2", [], ["x.toml", "line 3", "twice"]),
    ("byte order mark", "\ufeff[training]\nsteps = 1", [], ["x.toml", "byte order mark", "UTF-8"]),
    ("not TOML", "[training\nsteps = 1", [], ["x.toml", "not valid TOML", "line 1"]),
    ("key outside a table", "steps = 1", [], ["x.toml:1", "steps", "training"]),
    ("bad literal", '[schedule]\nname = "cosin"', [], ["schedule.name", "did you mean 'cosine'?"]),
    ("bad list", "[optimizer]\nbetas = [0.9]", [], ["optimizer.betas", "two numbers"]),
    ("unknown model", '[model]\nname = "llama33"', [], ["model.name", "did you mean 'llama3'?"]),
    ("unknown size", '[model]\nsize = "8bb"', [], ["model.size", "did you mean '8b'?"]),
    ("unknown model field", "[model]\nn_layer = 2", [], ["model.n_layer", "did you mean 'n_layers'?"]),
    ("impossible model", "[model]\nn_heads = 7", [], ["model", "n_heads 7"]),
    ("override without =", None, ["--training.steps"], ["--training.steps", "--table.key=value"]),
    ("override of nothing", None, ["--training.step=3"], ["command line", "training.step", "did you mean 'steps'?"]),
    ("override, wrong type", None, ["--training.steps=many"], ["training.steps", "a whole number", "'many'"]),
    ("override, infinite", None, ["--optimizer.lr=1e999"], ["optimizer.lr", "a number"]),
    ("two configs", None, ["other.toml"], ["expected one CONFIG", "found 2"]),
    ("degrees", None, ["--parallel.dp_replicate=3"], ["do not multiply up to 4", "dp_replicate = 2, dp_shard = 2"]),
    ("two times the rest", None, ["--parallel.dp_replicate=-1"], ["only one degree can be -1"]),
    ("batch", None, ["--training.global_batch_size=18"], ["training.global_batch_size", "16 or 32"]),
    ("batch, nearest micro", None, ["--training.micro_batch_size=3"], ["12 or 24", "micro_batch_size to 1, 2 or 4"]),
    ("warm-up", None, ["--schedule.warmup_steps=300"], ["schedule.warmup_steps", "training.steps = 100"]),
    ("decay without wsd", None, ["--schedule.decay_steps=3"], ["schedule.decay_steps", "only wsd"]),
    ("small vocabulary", None, ["--model.vocab_size=256", "--data.tokenizer=bytes"], ["model.vocab_size", "257"]),
    ("missing data", None, ["--data.path=nowhere"], ["data.path", "'nowhere' does not exist"]),
    ("built-in data", None, ["--data.path=builtin:topic"], ["did you mean 'builtin:topics'?"]),
    ("missing tokenizer", None, ["--data.tokenizer=t.model"], ["data.tokenizer", "path"]),
    ("tokens to train", None, ["--data.tokenizer=train:many"], ["data.tokenizer", "train:4096"]),
    ("more tokens than rows", None, ["--data.tokenizer=train:4096"], ["model.vocab_size", "4096"]),
    ("samples without validation", "[sample]\nprompts = ['a']\ninterval = 1", [], ["sample.interval", "validation.interval"]),
    ("norms for nobody", "[metrics]\ntrackers = []\ngradient_norms = 5", [], ["metrics.gradient_norms", "trackers is empty"]),
    ("too long for the model", None, ["--model.context_length=128"], ["training.seq_len", "256 tokens are more than the 128"]),
    ("nothing held out", None, ["--data.validation_share=0"], ["validation.interval", "held out"]),
    ("unwritable output", None, ["--job.output=/proc/run"], ["command line: job.output: /proc cannot be written", "name a"]),
    ("two mistakes", None, ["--job.output=pyproject.toml/x", "--data.path=x.txt"], ["runs through a file", "'x.txt' does not"]),
    ("space for =", None, ["--training.steps", "20"], ["--training.steps=20", "no space"]),
    ("space before a negative", None, ["--parallel.dp_shard", "-1"], ["--parallel.dp_shard=-1"]),
    ("not a list", None, ["--metrics.trackers=wandbb"], ["""did you mean '--metrics.trackers=["wandb"]'"""]),
    ("list without its quotes", None, ["--sample.prompts=[The, def]"], ["""'--sample.prompts=["The", "def"]', all quotes"""]),
    ("one text for a list", None, ["--sample.prompts=The cat, a dog"], ["""'--sample.prompts=["The cat, a dog"]'"""]),
    ("text for a list", "[sample]\nprompts = 1", [], ['a list of texts in quotes, such as ["The", "def"], not 1']),
    ("tracker in TOML", '[metrics]\ntrackers = ["wandbb"]', [], ['did you mean ["wandb"]?']),
    ("nearly a tokenizer", None, ["--data.tokenizer=tests/conftest.pi"], ["did you mean 'tests/conftest.py'?"]),
    ("unknown style", '[parallel.sharding]\n\n"a.b" = "sec"', [], ['x.toml:3: parallel.sharding."a.b"', "did you mean 'seq'?"]),
    ("style, inline", '[parallel]\nsharding = {"a.b" = "sec"}', [], ['x.toml:2: parallel.sharding."a.b"', "'gather'"]),
    ("style, dotted", '[parallel]\ntp = 1\nsharding."a.b" = 3', [], ['x.toml:3: parallel.sharding."a.b"', "not 3"]),
    ("style, no quotes", '[parallel.sharding]\na.b = "seq"', [], ["x.toml:2", 'a name with dots stands in quotes: "a.b"']),
    ("style override", None, ['--parallel.sharding={"a.b"="sec"}'], ['command line: parallel.sharding."a.b"', "'seq'?"]),
    ("style unquoted", None, ["--parallel.sharding={a.*=seq}"], ["""'--parallel.sharding={"a.*" = "seq"}', all quotes"""]),
    ("style for nothing", None, ["--parallel.sharding=seq"], ["parallel.sharding: expected a table", "not 'seq'"]),
    ("style of no module", None, ['--parallel.sharding={"head.x" = "seq"}'], ["command line: parallel.sharding: ", "head.x"]),
    ("style twice", '[parallel.sharding]\n"a.b" = "seq"\n"a.b" = "col"', [], ["line 3", '"a.b" stands twice, first on line 2']),
    ("styles twice", "[parallel]\nsharding = {}\n[parallel.sharding]", [], ["line 3: [parallel.sharding] stands twice"]),
    ("unknown table in a table", '[parallel.shardin]\na = "seq"', [], ["x.toml:1: parallel.shardin", "'sharding'?"]),
    ("table for a number", "[job]\n[training.steps]\nx = 1", [], ["x.toml:2: training.steps", "a whole number", '{"x" = 1}']),
    ("split without brackets", None, ["--parallel.pp_split=3,5"], ["did you mean '--parallel.pp_split=[3, 5]'?"]),
    ("split into nothing", "[parallel]\npp_split = [8, 0]", [], ["x.toml:2: parallel.pp_split", "1 or more", "not [8, 0]"]),
    ("saved operation", '[recompute]\nsave = ["atten"]', [], ["x.toml:2: recompute.save", 'did you mean ["attention"]?']),
    ("missing checkpoint", None, ["--checkpoint.load=nowhere"], ["checkpoint.load", "committed"]),
]


def write(folder: Path, text: str | None) -> Path:
    path = folder / "x.toml"
    path.write_text((ROOT / "train_configs" / "debug.toml").read_text() if text is None else text)
    return path


@pytest.mark.parametrize(("text", "words", "said"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_mistake_is_an_exit_2_with_its_sentence(
    tmp_path: Path,
    text: str | None,
    words: list[str],
    said: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NPROC", "4")
    monkeypatch.chdir(ROOT)
    path = write(tmp_path, text)
    code = main(["train", str(path), *words])
    message = capsys.readouterr().err
    assert code == 2
    for part in said:
        assert part in message
    assert "Traceback" not in message
    assert all(line.startswith("titan: ") for line in message.splitlines())


def test_a_wrong_toml_is_answered_in_half_a_second(tmp_path: Path) -> None:
    path = write(tmp_path, "[training]\nstesp = 1")
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "titan.cli", "train", str(path)], cwd=ROOT, capture_output=True, timeout=30
        )
        times.append(time.perf_counter() - started)
        assert done.returncode == 2
    assert min(times) < 0.5


def test_the_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    words = ["--job.stop_after=7", "--optimizer.betas=[0.8, 0.9]", '--job.output=a "quoted" \\ name', "--model.n_layers=3"]
    config = toml.load(write(tmp_path, None), words)
    assert (config.job.stop_after, config.optimizer.betas, config.model.config.n_layers) == (7, [0.8, 0.9], 3)
    for describe in (True, False):
        again = tmp_path / "x.toml"
        again.write_text(toml.dump(config, describe))
        assert toml.load(again) == config


@pytest.mark.parametrize(
    "text",
    [
        '[parallel.sharding]\n"layers.*.ffn" = "seq"\n\'layers.*.ffn.*\' = "seq"',
        '[parallel]\nsharding = {"layers.*.ffn" = "seq", "layers.*.ffn.*" = "seq"}',
        '[parallel]\nsharding."layers.*.ffn" = "seq"\nsharding."layers.*.ffn.*" = "seq"',
    ],
)
def test_a_table_in_a_table(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    styles = {"layers.*.ffn": "seq", "layers.*.ffn.*": "seq"}
    config = toml.load(write(tmp_path, f"{text}\n[training]\nsteps = 77"))
    assert list(config.parallel.sharding.items()) == list(styles.items()), "the order counts: later ones win"
    assert config.training.steps == 77
    assert main(["config", str(tmp_path / "x.toml")]) == 0
    assert toml.load(write(tmp_path, capsys.readouterr().out)) == config
    words = ['--parallel.sharding={"head" = "seq"}', "--parallel.pp_split=[3, 5]"]
    config = toml.load(write(tmp_path, text), words)
    assert config.parallel.sharding == {"head": "seq"}
    assert config.parallel.pp_split == [3, 5]
    with pytest.raises(toml.ConfigError, match=r'^command line: parallel\.sharding\."layers'):
        toml.load(write(tmp_path, text), ['--parallel.sharding={"layers.*.ffn" = "sec"}'])


def test_overrides_of_every_kind(tmp_path: Path) -> None:
    path = write(tmp_path, "[job]\nstop_after = 3")
    config = toml.load(
        path, ["--metrics.trackers=[]", "--optimizer.lr=1", "--job.stop_after=none", "--schedule.name=wsd"]
    )
    assert config.metrics.trackers == []
    assert config.optimizer.lr == 1.0
    assert isinstance(config.optimizer.lr, float)
    assert config.job.stop_after is None
    assert config.schedule.name == "wsd"
    assert config.job.output == "outputs/x"


def test_rules_that_need_a_world_hold_their_tongue_without_one(tmp_path: Path) -> None:
    config = toml.load(write(tmp_path, None), ["--training.global_batch_size=17"])
    assert problems(config) == []
    assert [p.key for p in problems(config, 2)] == ["training.global_batch_size"]


def test_a_refusal_names_where_the_key_was_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, '[data]\npath = "gone.txt"')
    words = ["--schedule.warmup_steps=300", "--validation.interval=0"]
    assert main(["config", str(path), *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[:3] for line in lines] == [
        ["titan", "command line", "schedule.warmup_steps"],
        ["titan", str(path), "data.path"],
    ]
    monkeypatch.setenv("NPROC", "2")
    (tmp_path / "tiny.txt").write_text("tiny")
    debug = str(ROOT / "train_configs" / "debug.toml")
    monkeypatch.chdir(tmp_path)
    words = ["--data.path=tiny.txt", "--data.tokenizer=bytes", "--data.cache=cache", "--validation.interval=10"]
    assert main(["train", debug, *words]) == 2
    assert "titan: command line: validation.interval: " in capsys.readouterr().err
    assert main(["train", debug, *words, "--validation.interval=0"]) == 2
    assert f"titan: {debug}: training.seq_len: the train split holds 5 tokens" in capsys.readouterr().err
    assert main(["train", debug, *words, "--data.cache=tiny.txt/cache"]) == 2
    assert "titan: command line: data.cache: tiny.txt/cache cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_a_missing_file_names_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, None)
    assert main(["config", str(tmp_path / "y.toml")]) == 2
    assert "did you mean" not in capsys.readouterr().err
    assert main(["config", str(tmp_path / "x1.toml")]) == 2
    assert f"did you mean {tmp_path / 'x.toml'}?" in capsys.readouterr().err
    monkeypatch.chdir(ROOT)
    for name, meant in (("debgu.toml", "train_configs/debug.toml"), ("pyprojec.toml", None)):
        assert main(["config", name]) == 2
        message = capsys.readouterr().err
        assert f"did you mean {meant}?" in message if meant else "did you mean" not in message


def test_an_interrupt_is_quiet_from_the_first_import_on() -> None:
    code = """if True:
        import builtins, os, signal, sys
        own = builtins.__import__
        def importing(name, *rest):
            if name == sys.argv[1]:
                os.kill(os.getpid(), signal.SIGINT)
            return own(name, *rest)
        builtins.__import__ = importing
        from titan.cli import main
        sys.exit(main(["config", "train_configs/debug.toml"]))
    """
    for module in ("importlib", "titan.arguments", "titan.toml", "tomli", "titan.config"):
        done = subprocess.run([sys.executable, "-c", code, module], cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ntitan: interrupted\n"), module
    code = "import sys; before = set(sys.modules); import titan.cli; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert set(done.stdout.split()) <= {"__future__", "titan", "titan.cli"}, "an interrupt in these imports is not caught"


def test_help_is_for_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["data", "info", "--help"], ["export", "gguf", "--help"]):
        assert main(words) == 2
        assert words[1] in capsys.readouterr().err
    for words in (["data", "--help"], ["data", "prepare", "--help"], ["export", "--dtype", "-h"], ["train", "x", "--help"]):
        assert main(words) == 0
        assert capsys.readouterr().out.startswith(f"titan {words[0]} ")
    assert main(["--help"]) == 0
    assert "130 interrupted" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("words", [["trian"], [], ["train"], ["config", "--help"], ["--version"]])
def test_the_command_line_teaches(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(words)
    out, err = capsys.readouterr()
    assert code == (0 if words and words[-1].startswith("--") else 2)
    assert (out + err).strip()
