"""A sentencepiece model as a tokenizer.json.

Byte pair encoding. Sentencepiece joins the two neighbours whose concatenation is the piece of the highest score, the
leftmost first, over the whole text. So every way to cut a piece in two pieces is a merge, and merges are in order of the
pieces' scores. What no merge leads to (a control token's spelling, a byte's name) cannot come out of a text.

Unigram. The same search for the best sum of scores, except that sentencepiece adds in 32 bits: where two cuts of a long
text score all but the same, it may take the other. tokenizers also looks for control tokens and the names of bytes in the
text; they get a score so low that any other cut is better, and characters that no piece has, which would leave no other
cut, are words of their own.

The normalizer's table, where there is one (nmt_nfkc), is carried over. tokenizers applies it to a character with its
combining marks at once, sentencepiece to the longest match: a mark after a character that the table itself replaces may differ.
A model trained with normalization_rule_name="identity" has no table.
"""

from __future__ import annotations

import base64
import re
from typing import Any

from titan.data.tokenizer_json import added_token, bpe, whole

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # piece types; 6 is a byte
UNIGRAM, BPE = 1, 2
NEVER = -1e6
NOT_MIRRORED = "no tokenizer.json gives the ids of a sentencepiece model"


def sentencepiece_json(content: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """(tokenizer.json, names of the special tokens for tokenizer_config.json) of a serialized sentencepiece model.

    ValueError where a setting cannot be mirrored, naming it and what to train with instead.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when the module is imported
    proto.ParseFromString(content)
    _refuse(proto)
    symbols = _symbols(proto)
    added = [added_token(i, piece.piece, special=True) for i, piece in enumerate(proto.pieces) if piece.type == CONTROL]
    # Sentencepiece does not normalize such a symbol, but finds it in the normalized text.
    by_table = bool(proto.normalizer_spec.precompiled_charsmap)
    added += [added_token(i, symbol, special=False, normalized=not by_table) for i, symbol in symbols.items()]
    steps = {"normalizer": _normalizer(proto), "decoder": _decoder(proto)}
    if proto.trainer_spec.model_type == BPE:
        model = _bpe(proto)
    else:
        model, steps["pre_tokenizer"] = _unigram(proto)
    controls = {piece.piece for piece in proto.pieces if piece.type == CONTROL}
    spec = proto.trainer_spec
    names = {"eos_token": spec.eos_piece, "bos_token": spec.bos_piece, "pad_token": spec.pad_piece}
    return whole(model, sorted(added, key=lambda token: int(token["id"])), **steps), {
        key: name for key, name in names.items() if name in controls
    }


def _refuse(proto: Any) -> None:
    """ValueError for settings that no tokenizer.json can mirror."""
    spec, normalizer = proto.trainer_spec, proto.normalizer_spec
    settings = {
        "another model than bpe and unigram; train it with one of these": spec.model_type not in (BPE, UNIGRAM),
        "treat_whitespace_as_suffix; train it without": spec.treat_whitespace_as_suffix,
        "escape_whitespaces=False; train it without": not normalizer.escape_whitespaces,
        "a denormalizer; train it without": proto.denormalizer_spec.precompiled_charsmap,
        "unused pieces; mark them as normal": any(piece.type == UNUSED for piece in proto.pieces),
        "a control symbol of one character; give it a longer name": any(
            len(piece.piece) == 1 and piece.type in (UNKNOWN, CONTROL) for piece in proto.pieces
        ),
    }
    for setting, found in settings.items():
        if found:
            raise ValueError(f"{NOT_MIRRORED} with {setting}")


def _symbols(proto: Any) -> dict[int, str]:
    """The user-defined symbols that must be found in the text before all else, id -> symbol.

    One character that is in no other piece is a piece like others. A longer one cuts the text before it is normalized,
    so that a prefix would come before each part, and spaces would be removed at both ends of each.
    """
    normalizer = proto.normalizer_spec
    in_pieces = {character for piece in proto.pieces if piece.type == NORMAL for character in piece.piece}
    symbols = {i: piece.piece for i, piece in enumerate(proto.pieces) if piece.type == USER_DEFINED}
    if not normalizer.precompiled_charsmap:
        symbols = {i: symbol for i, symbol in symbols.items() if len(symbol) > 1 or symbol in in_pieces}
    if symbols and (normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces):
        raise ValueError(
            f"{NOT_MIRRORED} with add_dummy_prefix or remove_extra_whitespaces and the user-defined symbol "
            f"{next(iter(symbols.values()))!r}; train it with both settings False, or without the symbol"
        )
    return symbols


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _normalizer(proto: Any) -> dict[str, Any]:
    spec = proto.normalizer_spec
    steps = []
    if spec.precompiled_charsmap:
        table = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": table})
    if spec.remove_extra_whitespaces:
        steps += [_replace({"Regex": r"\A +"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append(_replace({"String": " "}, SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(_replace({"Regex": SPACE + r"+\z"}, ""))
    return {"type": "Sequence", "normalizers": steps}


def _decoder(proto: Any) -> dict[str, Any]:
    spec, normalizer = proto.trainer_spec, proto.normalizer_spec
    unknown = _replace({"Regex": rf"\A{re.escape(spec.unk_piece)}\z"}, spec.unk_surface)
    steps = [unknown, _replace({"String": SPACE}, " ")]
    if spec.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces:
        # With bytes for the unknown, all at the start; else only the prefix, since the unknown's text starts with a space.
        start = 1_000_000 if normalizer.remove_extra_whitespaces and spec.byte_fallback else 1
        steps.append({"type": "Strip", "content": " ", "start": start, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _bpe(proto: Any) -> dict[str, Any]:
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    longer = sorted((piece for piece in normal if len(piece) > 1), key=lambda piece: -normal[piece])
    if len({normal[piece] for piece in longer}) < len(longer):
        raise ValueError(f"{NOT_MIRRORED} of type bpe in which pieces have equal scores; train another")
    merges = [
        (piece[:cut], piece[cut:])
        for piece in longer
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    spec = proto.trainer_spec
    return bpe(vocab, merges, unk_token=spec.unk_piece, fuse_unk=True, byte_fallback=spec.byte_fallback)


def _unigram(proto: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the model, the pre-tokenizer that keeps characters without a piece apart)."""
    textual = [piece.piece for piece in proto.pieces if piece.type in (NORMAL, USER_DEFINED)]
    known = {piece for piece in textual if len(piece) == 1}
    byte_fallback = proto.trainer_spec.byte_fallback
    others = [piece.piece for piece in proto.pieces if piece.type not in (NORMAL, USER_DEFINED)]
    if any(set(piece.piece) - known for piece in proto.pieces if piece.type == NORMAL) or (
        not byte_fallback and any(known.isdisjoint(piece) for piece in others)
    ):
        raise ValueError(
            f"{NOT_MIRRORED} of type unigram some of whose characters are no pieces; "
            'train it with byte_fallback=True, or with model_type="bpe"'
        )
    scores = [[piece.piece, piece.score if piece.type in (NORMAL, USER_DEFINED) else NEVER] for piece in proto.pieces]
    model = {"type": "Unigram", "unk_id": proto.trainer_spec.unk_id, "vocab": scores, "byte_fallback": byte_fallback}
    characters = "".join(f"\\x{{{ord(character):X}}}" for character in sorted(known))
    # A run of unknown characters is one unknown token; with byte_fallback each is its bytes.
    unknown = f"[^{characters}]" + ("" if byte_fallback else "+")
    return model, {"type": "Split", "pattern": {"Regex": unknown}, "behavior": "Isolated", "invert": False}
