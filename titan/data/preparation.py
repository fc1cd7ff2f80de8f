"""A preparation: a plan becomes its folder.

It is made as NAME.unfinished, piece by piece (`titan.data.pieces`), by all cores (`titan.data.crew`), and appears under its
name in one rename, whole. What a killed run has finished of it is there for the next one. Of two processes on one machine the
second waits for the first; several that share the pieces out, as tasks of a SLURM job, each make their own, and the last one
out puts the folder in its place. Since a piece's contents follow from the input alone, it does not matter who made it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator

from titan.data import train_tokenizer
from titan.data.corpora import CorpusError, is_rows
from titan.data.crew import Job, Task, cores, make
from titan.data.encode import Made, must_change, read_marker
from titan.data.held_out import bound_of, place_of, texts
from titan.data.left_out import listed, total, words
from titan.data.pieces import pieces
from titan.data.prepare import LEFT_OUT, SUMMARY, TRAIN, PieceShare, Plan
from titan.data.tokenizer import load_tokenizer
from titan.files import fsync, publish, write_atomically, write_bytes_atomically
from titan.lock import HeldError, hold
from titan.progress import ProgressBar, size_words
from titan.terminal import plural


class Preparation:
    """The work. share: which of the pieces are this process' own."""

    def __init__(self, plan: Plan, report: Callable[[str], None], share: PieceShare) -> None:
        self.plan, self.report, self.share = plan, report, share
        self.corpus, self.tokenizer = plan.corpus, plan.tokenizer
        self.folder, self.unfinished = plan.folder, plan.unfinished
        self.every = pieces(plan.corpus)
        of = f".{share.number}-of-{share.count}" if share.count > 1 else ""
        self.lock = self.folder.with_name(f".{self.folder.name}{of}.lock")

    def run(self, workers: int | None) -> None:
        """Make this process' share, unless somebody else did. workers: one a core. Raises CorpusError, ValueError, OSError."""
        with self.alone():
            if not self.folder.is_dir():
                self.do(cores() if workers is None else workers)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock, once whoever has it is done. What is left of a failure is what the next start can go on from."""
        self.unfinished.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = hold(self.lock, 0)
        except HeldError as who:
            self.report(f"data: waiting for {who}, which prepares the same")
            held = hold(self.lock, float("inf"))
        try:
            yield
        finally:
            if self.share.count == 1 and not any(self.unfinished.glob("piece-*.json")):
                shutil.rmtree(self.unfinished, ignore_errors=True)
            if not self.unfinished.is_dir():
                for lock in self.lock.parent.glob(f".{self.folder.name}*.lock"):
                    lock.unlink(missing_ok=True)
            if held is not None:
                held.close()

    def do(self, workers: int) -> None:
        """Make this process' pieces; if then all are there, finish."""
        empty = sum(not self.corpus.size(name) for name in self.corpus.texts)
        if not self.every:
            raise CorpusError(f"{self.plan.path} holds no text, only {plural(empty, 'empty document')}")
        self.unfinished.mkdir(exist_ok=True)
        if (self.unfinished / SUMMARY).is_file():  # killed at the very end
            self._put_in_place()
            return
        files = [name for name in self.corpus.texts if self.corpus.size(name)]
        size = sum(map(self.corpus.size, files))
        what = plural(len(files), "file") if is_rows(self.corpus.texts[files[0]]) else plural(len(files), "document")
        left = f" ({empty} empty left out)" if empty else ""
        self.report(f"data: making tokens of {self.plan.path}, {what}{left}, {size_words(size)}")
        self._put_tokenizer()
        bounds = [self.plan.validation_share] * len(self.every)
        if not any(map(is_rows, self.corpus.texts.values())):  # then the names, and so the bound, are known beforehand
            places = [place_of(name) for name in files]
            bounds = [bound_of(min(places), max(places), self.plan.validation_share)] * len(self.every)
        own = [number for number in range(len(self.every)) if number % self.share.count == self.share.number]
        there = [number for number in own if read_marker(self.unfinished, number)]
        if there:
            self.report(f"data: {len(there):,} of {plural(len(own), 'piece')} are there from an earlier start")
        self._make([Task(number, self.every[number], bounds[number]) for number in own if number not in there], workers, own)
        made = [one for number in range(len(self.every)) if (one := read_marker(self.unfinished, number))]
        if len(made) < len(self.every):
            return
        try:
            self._finish(made, workers)
        except FileNotFoundError:  # of several last ones out, another was first
            if not self.folder.is_dir():
                raise

    def _put_tokenizer(self) -> None:
        """The tokenizer's files into the folder; a tokenizer trained on the text, where none is given."""
        if self.tokenizer is None and (self.unfinished / "tokenizer.model").is_file():
            self.tokenizer = load_tokenizer(str(self.unfinished))
        if self.tokenizer is None:
            size = int(self.plan.tokenizer_spec.removeprefix(TRAIN))
            self.report(f"data: training a tokenizer of {size:,} tokens")
            own = texts(self.corpus, self.plan.column, self.plan.validation_share, held_out=False)
            try:
                model = train_tokenizer.train_tokenizer(own, size)
            except CorpusError:
                raise
            except ValueError as error:
                raise ValueError(f"data.tokenizer: {error}") from error
            write_bytes_atomically(self.unfinished / "tokenizer.model", model)
            self.tokenizer = load_tokenizer(str(self.unfinished))
        for name, content in self.tokenizer.files.items():
            write_bytes_atomically(self.unfinished / name, content)

    def _make(self, tasks: list[Task], workers: int, own: list[int]) -> None:
        if not tasks:
            return
        assert self.tokenizer is not None
        spec = str(self.unfinished) if self.tokenizer.files else self.plan.tokenizer_spec
        job = Job(self.unfinished, spec, self.plan.chat_template, self.plan.column, self.plan.skip_bad)
        sizes = {number: sum(segment.size for segment in self.every[number]) for number in own}
        todo = sum(sizes[task.number] for task in tasks)
        progress = ProgressBar(sum(sizes.values()), "data", self.report, made="tokens", done=sum(sizes.values()) - todo)
        try:
            make(job, tasks, workers, progress)
        finally:
            progress.close()

    def _finish(self, made: list[Made], workers: int) -> None:
        """Look over what there is, and put it in its place."""
        lowest, highest = min(one.lowest for one in made), max(one.highest for one in made)
        bound = bound_of(lowest, highest, self.plan.validation_share)
        wrong = [number for number, one in enumerate(made) if must_change(one, bound)]
        self._make([Task(number, self.every[number], bound) for number in wrong], workers, wrong)
        for number in wrong:
            again = read_marker(self.unfinished, number)
            assert again is not None
            made[number] = again
        sums = total(made)
        if not any(sums["documents"].values()):
            raise CorpusError(f"{self.plan.path} holds no text: {sums['empty']} empty, left out {sums['left_out'] or 'none'}")
        rows = [(where, why) for where, why in listed(self.every, made)]
        for line in words(sums, rows, str(self.folder / LEFT_OUT)):
            self.report(line)
        if self.plan.validation_share > 0 and not sums["documents"]["validation"]:
            self.report("data: one document cannot be shared out, so nothing is held out for validation; give two or more")
        if rows:
            write_atomically(self.unfinished / LEFT_OUT, "".join(f"{where} {why}\n" for where, why in rows))
        write_atomically(self.unfinished / SUMMARY, json.dumps(sums, indent=2) + "\n")
        self._put_in_place()

    def _put_in_place(self) -> None:
        for file in self.unfinished.iterdir():
            if file.name.startswith((".", "piece-")):  # what killed processes left, and markers
                file.unlink(missing_ok=True)
        fsync(self.unfinished)
        publish(self.unfinished, self.folder)
