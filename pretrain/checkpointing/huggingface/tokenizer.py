"""A SentencePiece model as the files that transformers loads with ``AutoTokenizer``.

Our own tokenizers with BPE give the same ids there on every text. What cannot be the same everywhere:

- unigram: where two cuts of a text have the same score, each library takes its own (SentencePiece adds up in float32);
- given models that normalize the text: tokenizers normalizes some combined characters and CR LF differently;
- decoding: SentencePiece writes the unknown token as U+2047, transformers as ``<unk>`` or, without special tokens, not.

:func:`write_tokenizer` compares the two on many texts and says where they differ.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.checkpointing.huggingface.files import missing_packages
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import UserError
from pretrain.files import write_json

BLANK = "\u2581"  # SentencePiece's sign for a blank
_NEVER = -1e4  # log-probability of pieces that no text may become
_SAMPLE = (
    "",
    " ",
    "   two  and three   blanks ",
    "line\n\n\nafter line\r\n\ttab",
    "1234567890 3.14 1,000 0x41 <0x41> <s> </s> <unk> <pad>",
    "Ünïcode, ﬁne: 漢字かな交じり文 — Ω ≈ ∑ «quoted» Ελληνικά Кириллица العربية עברית",
    "👩‍👩‍👧 family 😀 and \u200b zero width \u00a0 no break \ufeff mark \x00 nul \x7f",
    "e\u0301 combined, A\u030angstrom, \ufb01\u0301 ligature, \uff21 wide, \u0130 \u1e9e _\u0301\u0301",
    f"{BLANK} the sign for a blank {BLANK}{BLANK}",
    *(sign * length for sign in "a0 -=_*.\n" for length in (3, 17, 40, 61, 97)),
)


def write_tokenizer(tokenizer_file: Path, folder: Path) -> str:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and a copy of ``tokenizer.model``.

    Returns:
        An example of what differs; empty if nothing was found.

    Raises:
        UserError: packages are missing, or the model is neither BPE nor unigram.
    """
    ours = Tokenizer.load(tokenizer_file)
    content = tokenizer_file.read_bytes()
    converted = convert(content)
    text = converted.to_str(pretty=True)  # not its save(), which tells a full disk as no OSError
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    shutil.copyfile(tokenizer_file, folder / "tokenizer.model")
    ends = {"bos_token": ours.piece(ours.eos_id), "eos_token": ours.piece(ours.eos_id)}  # see special_ids of the config
    if ours.pad_id >= 0:
        ends["pad_token"] = ours.piece(ours.pad_id)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **ends,
            "unk_token": ours.piece(ours.unk_id),
            "split_special_tokens": True,  # "</s>" in a text is text, as with SentencePiece
            "clean_up_tokenization_spaces": False,
        },
    )
    return _difference(ours, converted)


def convert(model: bytes) -> Any:
    """A ``tokenizers.Tokenizer`` that does what the SentencePiece model does.

    Raises:
        UserError: packages are missing, or the model is neither BPE nor unigram.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2 as protobuf  # needs protobuf
        from tokenizers import AddedToken, Regex, decoders, normalizers
        from tokenizers import Tokenizer as FastTokenizer
    except ImportError as error:
        raise missing_packages(error) from error
    proto = protobuf.ModelProto.FromString(model)
    kinds, rule = protobuf.ModelProto.SentencePiece, proto.normalizer_spec
    fast = FastTokenizer(_model(proto, kinds))
    fast.add_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == kinds.USER_DEFINED])
    special = (kinds.CONTROL, kinds.UNKNOWN)
    fast.add_special_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type in special])
    fast.encode_special_tokens = True
    steps: list[Any] = []
    if rule.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rule.precompiled_charsmap))
    if rule.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", BLANK))
    if rule.add_dummy_prefix:
        steps.append(normalizers.Prepend(BLANK))
    fast.normalizer = normalizers.Sequence(steps)
    undo = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence(undo + ([decoders.Strip(" ", 1, 0)] if rule.add_dummy_prefix else []))
    return fast


def _model(proto: Any, kinds: Any) -> Any:
    from tokenizers import models

    byte_fallback, unk_id = proto.trainer_spec.byte_fallback, proto.trainer_spec.unk_id
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
        scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == kinds.NORMAL}
        unk = proto.pieces[unk_id].piece
        return models.BPE(ids, list(_merges(scores)), unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback)
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        may_occur = (kinds.NORMAL, kinds.USER_DEFINED)
        pieces = [(piece.piece, piece.score if piece.type in may_occur else _NEVER) for piece in proto.pieces]
        return models.Unigram(pieces, unk_id, byte_fallback)
    raise UserError("only SentencePiece models of type bpe and unigram can be written for Hugging Face")


def _merges(scores: dict[str, float]) -> Iterator[tuple[str, str]]:
    """SentencePiece joins the neighbours that make the best piece: all cuts of each piece in two, best pieces first."""
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        cuts = ((piece[:place], piece[place:]) for place in range(1, len(piece)))
        yield from ((left, right) for left, right in cuts if left in scores and right in scores)


def _difference(ours: Tokenizer, converted: Any) -> str:
    """The first text of many, fixed ones and random pieces, that gets other ids."""
    draw = random.Random(0)
    pieces = (ours.decode([draw.randrange(ours.vocab_size) for _ in range(draw.randint(1, 40))]) for _ in range(1000))
    for text in (*_SAMPLE, *pieces):
        here, there = ours.encode(text), converted.encode(text, add_special_tokens=False).ids
        if here != there:
            return f"{text!r} is {here} in tokenizer.model and {there} in tokenizer.json"
    return ""
