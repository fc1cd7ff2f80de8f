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

from titan.cores import cores
from titan.data import train_tokenizer
from titan.data.corpora import CorpusError, is_rows
from titan.data.crew import Job, Task, make
from titan.data.encode import Made, must_change, read_marker, refuse
from titan.data.held_out import bound_of, place_of, texts
from titan.data.left_out import all_lines, listed, total, words
from titan.data.pieces import pieces
from titan.data.prepare import LEFT_OUT, SUMMARY, TRAIN, PieceShare, Plan
from titan.data.tokenizer import load_tokenizer
from titan.files import fsync, publish, remove_leftovers, write_atomically, write_bytes_atomically
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
        self.empty = plan.corpus.texts.keys() - {segment.name for piece in self.every for segment in piece}

    def run(self, workers: int | None) -> None:
        """Make this process' share, unless somebody else did. workers: one a core. Raises CorpusError, CrewError, ValueError,
        OSError."""
        workers = cores() if workers is None else workers
        if self.share.count == 1:
            with self._alone(""):
                if not self.folder.is_dir():
                    self.make_own(workers)
                    self.finish(workers)
            return
        with self._alone(f".{self.share.number}-of-{self.share.count}"):
            if not self.folder.is_dir():
                self.make_own(workers)
        with self._alone(""):
            if not self.folder.is_dir():
                self.finish(workers)

    @contextlib.contextmanager
    def _alone(self, who: str) -> Iterator[None]:
        """Hold a lock, once whoever has it is done. What is left of a failure is what the next start can go on from."""
        self.unfinished.parent.mkdir(parents=True, exist_ok=True)
        path = self.folder.with_name(f".{self.folder.name}{who}.lock")
        try:
            held = hold(path, 0)
        except HeldError as holder:
            self.report(f"data: waiting for {holder}, which prepares the same")
            held = hold(path, float("inf"))
        try:
            yield
        finally:
            locks = list(path.parent.glob(f".{self.folder.name}*.lock"))
            done = any(self.unfinished.glob("piece-*.json")) or (self.unfinished / SUMMARY).is_file()
            if locks in ([], [path]) and not done:
                shutil.rmtree(self.unfinished, ignore_errors=True)
            if not self.unfinished.is_dir():
                for lock in locks:
                    lock.unlink(missing_ok=True)
            if held is not None:
                held.close()

    def make_own(self, workers: int) -> None:
        """Make the pieces of this process' share that are not there."""
        if not self.every:
            raise CorpusError(f"{self.plan.path} holds no text, only {plural(len(self.empty), 'empty document')}")
        self.unfinished.mkdir(exist_ok=True)
        if (self.unfinished / SUMMARY).is_file():  # killed at the very end: the markers may be gone
            return
        remove_leftovers(self.unfinished)
        files = [name for name in self.corpus.texts if name not in self.empty]
        what = plural(len(files), "file") if is_rows(self.corpus.texts[files[0]]) else plural(len(files), "document")
        left = f" ({len(self.empty)} empty left out)" if self.empty else ""
        size = sum(segment.size for piece in self.every for segment in piece)
        self.report(f"data: making tokens of {self.plan.path}, {what}{left}, {size_words(size)}")
        self._put_tokenizer()
        bound = self.plan.validation_share
        if not any(map(is_rows, self.corpus.texts.values())):  # then the names, and so the bound, are known beforehand
            places = [place_of(name) for name in files]
            bound = bound_of(min(places), max(places), bound)
        own = [number for number in range(len(self.every)) if number % self.share.count == self.share.number]
        there = [number for number in own if read_marker(self.unfinished, number)]
        if there:
            self.report(f"data: {len(there):,} of {plural(len(own), 'piece')} are there from an earlier start")
        self._make([Task(number, self.every[number], bound) for number in own if number not in there], workers, own)

    def _put_tokenizer(self) -> None:
        """The tokenizer's files into the folder; a tokenizer trained on the text, where none is given."""
        if self.tokenizer is None and (self.unfinished / "tokenizer.model").is_file():
            self.tokenizer = load_tokenizer(str(self.unfinished))
        if self.tokenizer is None:
            size = int(self.plan.tokenizer_spec.removeprefix(TRAIN))
            self.report(f"data: training a tokenizer of {size:,} tokens")
            ignored = (lambda *_: None) if self.plan.skip_bad else refuse
            own = texts(self.corpus, self.plan.column, self.plan.validation_share, held_out=False, bad=ignored)
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

    def finish(self, workers: int) -> None:
        """If all pieces are there, look them over and put the folder in its place."""
        if not (self.unfinished / SUMMARY).is_file():  # else it was killed at the very end
            made = [one for number in range(len(self.every)) if (one := read_marker(self.unfinished, number))]
            if len(made) < len(self.every):
                return
            if self.corpus.fingerprint() != self.plan.fingerprint:
                shutil.rmtree(self.unfinished)
                raise CorpusError(f"{self.plan.path} was changed while it was made into tokens; start again")
            self._sum_up(self._with_both_sides(made, workers))
        for file in self.unfinished.iterdir():
            if file.name.startswith((".", "piece-")):  # what killed processes left, and markers
                file.unlink(missing_ok=True)
        fsync(self.unfinished)
        publish(self.unfinished, self.folder)

    def _with_both_sides(self, made: list[Made], workers: int) -> list[Made]:
        """The pieces, those made again where a side had no document, though there are enough for both."""
        lowest, highest = min(one.lowest for one in made), max(one.highest for one in made)
        bound = bound_of(lowest, highest, self.plan.validation_share)
        wrong = [number for number, one in enumerate(made) if must_change(one, bound)]
        if not wrong:
            return made
        self._make([Task(number, self.every[number], bound) for number in wrong], workers, wrong)
        return [one for number in range(len(made)) if (one := read_marker(self.unfinished, number))]

    def _sum_up(self, made: list[Made]) -> None:
        """Say what there is, and write it down."""
        sums = total(made, len(self.empty))
        if not any(sums["documents"].values()):
            shutil.rmtree(self.unfinished)
            raise CorpusError(f"{self.plan.path} holds no text: {sums['empty']} empty, left out {sums['left_out'] or 'none'}")
        rows = [*((name, "is empty") for name in sorted(self.empty)), *listed(self.every, made)]
        for line in words(sums, rows, str(self.folder / LEFT_OUT)):
            self.report(line)
        if self.plan.validation_share > 0 and not sums["documents"]["validation"]:
            self.report("data: one document cannot be shared out, so nothing is held out for validation; give two or more")
        if rows:
            write_atomically(self.unfinished / LEFT_OUT, all_lines(sums, rows))
        write_atomically(self.unfinished / SUMMARY, json.dumps(sums, indent=2) + "\n")
