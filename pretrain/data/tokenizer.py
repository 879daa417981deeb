"""SentencePiece: training on the train split, and one small class around a trained model.

The text is kept as it is: no normalization, no added or removed blanks, and a piece of its own for the newline. With
byte fallback ``decode(encode(text)) == text`` for all text without U+2581, which SentencePiece uses for blanks.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from pretrain.errors import UserError
from pretrain.files import write_bytes
from pretrain.recipe import TokenizerRecipe

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
CHARACTER_COVERAGE = 0.9995  # of the training text; rarer characters become bytes, or unknown without byte fallback
LONGEST_LINE_BYTES = 16_384
_LONGEST_LINE_CHARACTERS = LONGEST_LINE_BYTES // 4  # a character is at most 4 bytes of UTF-8


def training_lines(documents: Iterable[str]) -> Iterator[str]:
    """Lines that SentencePiece accepts for training: no blank ones, none longer than LONGEST_LINE_BYTES."""
    for document in documents:
        for line in document.replace("\0", "\n").split("\n"):
            for start in range(0, len(line), _LONGEST_LINE_CHARACTERS):
                part = line[start : start + _LONGEST_LINE_CHARACTERS]
                if part.strip():
                    yield part


def sample_lines(lines: Iterable[str], count: int, seed: int) -> list[str]:
    """At most ``count`` lines, each as likely as any other (Vitter's algorithm R); all of them, in order, if they fit.

    SentencePiece samples by itself, but with a seed that cannot be set.
    """
    kept: list[str] = []
    generator = random.Random(seed)
    for number, line in enumerate(lines):
        if number < count:
            kept.append(line)
        elif (place := generator.randrange(number + 1)) < count:
            kept[place] = line
    return kept


def train_tokenizer(lines: Iterable[str], recipe: TokenizerRecipe, model_path: Path, seed: int) -> None:
    """Train and write ``model_path``; the same lines and seed give the same bytes.

    Args:
        lines: training text, see :func:`training_lines`.
        seed: of the sample of ``recipe.training_sentences`` lines, where there are more.

    Raises:
        UserError: the vocabulary is larger or smaller than this text supports.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample_lines(lines, recipe.training_sentences, seed)),
            model_writer=model,
            model_type=recipe.model_type,
            vocab_size=recipe.vocab_size,
            hard_vocab_limit=True,
            byte_fallback=recipe.byte_fallback,
            character_coverage=CHARACTER_COVERAGE,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            max_sentence_length=LONGEST_LINE_BYTES,
            num_threads=1,  # sums of floats depend on how many threads there are
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:  # the second: a size that no C int holds
        raise UserError(_training_problem(str(error), recipe)) from error
    write_bytes(model_path, model.getvalue())


def _training_problem(message: str, recipe: TokenizerRecipe) -> str:
    size = f"data.tokenizer.vocab_size is {recipe.vocab_size}"
    if largest := re.search(r"value <= (\d+)", message):
        return f"{size}, more than this corpus supports: the largest size that works is {largest[1]}"
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"{size}, less than the characters, bytes and special tokens need: the smallest size is {smallest[1]}"
    return f"the tokenizer could not be trained ({size}): {message}"


class Tokenizer:
    """A trained SentencePiece model. Nothing is added to a text: no bos, no eos.

    Attributes:
        vocab_size: number of ids.
        unk_id, bos_id, eos_id, pad_id: ids of the special tokens; -1 where the model has none.
        sha256: of the model file.
    """

    def __init__(self, model: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.sha256: str = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.unk_id: int = self._processor.unk_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.pad_id: int = self._processor.pad_id()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a ``.model`` file.

        Raises:
            UserError: it cannot be read, is not a SentencePiece model, or has no end-of-sequence token.
        """
        try:
            model = Path(path).read_bytes()
            if not model:
                raise UserError(f"the tokenizer {path} is an empty file; copy it again")
            tokenizer = cls(model)
        except OSError as error:
            raise UserError(f"the tokenizer {path} cannot be read: {error.strerror}") from error
        except RuntimeError as error:
            raise UserError(f"{path} is not a SentencePiece model") from error
        if tokenizer.eos_id < 0:
            raise UserError(f"the tokenizer {path} has no end-of-sequence token to end documents with; use another")
        return tokenizer

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids of bos, eos, pad and unk that exist, ascending."""
        return tuple(sorted({i for i in (self.bos_id, self.eos_id, self.pad_id, self.unk_id) if i >= 0}))

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens leave no text, except unk."""
        text: str = self._processor.decode(list(map(int, ids)))
        return text

    def piece(self, token_id: int) -> str:
        """The piece of an id as SentencePiece writes it, with U+2581 for a blank."""
        piece: str = self._processor.id_to_piece(int(token_id))
        return piece
