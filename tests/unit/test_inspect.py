"""What `titan data inspect` says, against what was written and what training reads."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from titan.cli import main
from titan.config import Config, Model, Parallel, Training, degrees
from titan.data import dataset as module
from titan.data.dataset import TokenDataset
from titan.data.inspect import length_counts, place, sample
from titan.data.loader import loader
from titan.data.mixture import Samples
from titan.data.shard_writer import write_shard
from titan.data.tokenizer import BytesTokenizer
from titan.data.windows import Contiguous

ROOT = Path(__file__).parents[2]


def write(folder: Path, lengths: np.ndarray, files: int = 1) -> np.ndarray:
    """Documents of these lengths; their tokens."""
    draw = np.random.default_rng(0)
    documents = [np.append(draw.integers(97, 123, length - 1), 256) for length in lengths]
    for i, part in enumerate(np.array_split(np.arange(len(documents)), files)):
        chosen = [(documents[j], len(documents[j]) - 1) for j in part]
        for split in ("train", "validation"):
            write_shard(folder / f"{split}-{i:05d}.tokens", chosen, vocab_size=257, tokenizer=BytesTokenizer.fingerprint)
    return np.concatenate(documents)


@pytest.mark.parametrize("chunk", [2, 3, 7, 1 << 22])
def test_documents_are_counted_by_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    lengths = np.random.default_rng(chunk).integers(1, 40, 60)
    write(tmp_path, lengths, files=3)
    data = TokenDataset(tmp_path, "train")
    assert np.concatenate(list(data.document_lengths())).tolist() == lengths.tolist()
    counts = length_counts(data, lambda tokens: None)
    for kind in range(64):
        chosen = lengths[(lengths >= 2**kind) & (lengths < 2 ** (kind + 1))]
        assert counts[:, kind].tolist() == [len(chosen), chosen.sum()]


@pytest.mark.parametrize("seed", range(5))
def test_a_sample_is_where_it_says(tmp_path: Path, seed: int) -> None:
    """Its place against the mesh's layout, and its text against what that rank's loader gives."""
    draw = np.random.default_rng(seed)
    write(tmp_path, draw.integers(1, 40, 50))
    samples = Samples({"data": Contiguous(TokenDataset(tmp_path, "train"), 16, document_mask=True)}, seed)
    replicate, shard, tp, cp, pp = draw.integers(1, 4, 5).tolist()
    per_rank = int(draw.integers(1, 4))
    batch, micro = per_rank * 2 * replicate * shard, per_rank
    training = Training(seq_len=16, global_batch_size=batch, micro_batch_size=micro, seed=seed)
    config = Config(model=Model(), training=training, parallel=Parallel(replicate, shard, tp=tp, cp=cp, pp=pp))
    world = degrees(config.parallel, 1).world
    layout = np.arange(world).reshape(pp, replicate, shard, cp, tp)
    for number in draw.integers(0, 3 * batch, 10).tolist():
        said = place(number, config, world, held_out=False)
        figures = re.search(r"step (\d+) .*row (\d+) of .*: ranks? ([\d, ]+) of .*micro batch (\d) of 2", said)
        assert figures
        step, row, ranks, part = figures.groups()
        first = int(ranks.split(",")[0])
        _, r, s, _, _ = np.argwhere(layout == first)[0]
        assert ranks == ", ".join(map(str, layout[:, r, s].flatten()))
        batches = loader(
            samples,
            global_batch_size=batch,
            dp_rank=int(r * shard + s),
            dp_degree=replicate * shard,
            start_sample=(int(step) - 1) * batch,
            workers=0,
        )
        own = number - (int(step) - 1) * batch - int(r * shard + s) * 2 * per_rank
        assert (int(row) - 1, own // micro) == (number % batch, int(part) - 1)
        text = "".join(sample(samples, BytesTokenizer(), number))
        assert text == BytesTokenizer().decode(next(batches)["tokens"][own].numpy())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = write(tmp_path, np.array([5, 40, 41, 300]))
    config = [str(ROOT / "train_configs" / "debug.toml"), f"--data.path={tmp_path}", "--data.tokenizer=bytes"]
    sizes = ["--training.seq_len=64", "--training.global_batch_size=2", "--training.micro_batch_size=1"]
    words = ["data", "inspect", *config, *sizes]
    assert main([*words, "--sample", "0", "--held-out", "--verify"]) == 0
    said = capsys.readouterr().out
    for expected in ("tokens      386", "documents   4, 96 tokens on average", " 32 -  63", "batch 1, row 1 of 2: rank 0"):
        assert expected in said
    shown = "".join(re.findall(r"\| (\w*)$", said, re.MULTILINE))
    assert shown in BytesTokenizer().decode(tokens)
    assert len(shown) > 50
    shard = tmp_path / "train-00000.tokens"
    data = bytearray(shard.read_bytes())
    data[4096] ^= 1
    shard.write_bytes(data)
    assert main([*words, "--verify"]) == 1
    assert f"DAMAGED  {shard}: does not match its checksum" in capsys.readouterr().out
    assert main([*words, "--sampel", "0"]) == 2
    assert "did you mean '--sample'?" in capsys.readouterr().err
