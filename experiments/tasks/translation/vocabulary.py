"""Vocabularies: sentences to token ids and back, by words, characters or SentencePiece subwords.

Ids 0 to 3 are PAD, BEGIN, END and UNK, a token that the training text did not have.
"""

import collections
import dataclasses
import functools
import hashlib
import io
import itertools
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.storage import paths
from experiments.tasks.transduction import BEGIN, END, PAD

UNK = 3
SPECIAL = ("<pad>", "<begin>", "<end>", "<unk>")
SUBWORDS = ("unigram", "bpe")
TOKENIZERS = (*SUBWORDS, "word", "char", "none")

_MOST_SUBWORDS = 8000


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A list of words or characters.

    Attributes:
      labels: the token of each id from 4 on.
      tokenizer: 'word' and 'none' split at white space, 'char' into characters; 'none' means that
        the text is in subwords already, "bü@@ sche", which `decode` joins as subword-nmt does.
    """

    labels: tuple[str, ...]
    tokenizer: str

    def encode(self, lines: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all lines in one array, int32, and how many each line has, int64 [n]."""
        split = [_split(line, self.tokenizer) for line in lines]
        counts = np.fromiter(map(len, split), np.int64, len(split))
        ids = self._ids
        flat_ids = (ids.get(token, UNK) for token in itertools.chain.from_iterable(split))
        return np.fromiter(flat_ids, np.int32, counts.sum()), counts

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; PAD, BEGIN and END have no text."""
        tokens = [SPECIAL[UNK] if i == UNK else self.labels[i - 4] for i in ids if i >= UNK]
        if self.tokenizer == "char":
            return "".join(tokens)
        return join_subwords(" ".join(tokens)) if self.tokenizer == "none" else " ".join(tokens)

    @functools.cached_property
    def _ids(self):
        return {label: i for i, label in enumerate(self.labels, 4)}


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A SentencePiece model (Kudo & Richardson 2018, arXiv:1808.06226), serialised.

    `decode` gives back every character of a text whose characters are all known, but NUL.
    """

    model: bytes

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """The piece of each id from 4 on; "▁" stands for a space, or for itself."""
        pieces = self._processor.id_to_piece(list(range(4, len(self._processor))))
        return tuple(map(_unescaped, pieces))

    def encode(self, lines: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `Tokens.encode`."""
        split = self._processor.encode([line.translate(_ESCAPES) for line in lines])
        counts = np.fromiter(map(len, split), np.int64, len(split))
        ids = itertools.chain.from_iterable(split)
        return np.fromiter(ids, np.int32, counts.sum()), counts

    def decode(self, ids: Sequence[int]) -> str:
        """As `Tokens.decode`."""
        return _unescaped(self._processor.decode([int(i) for i in ids if i >= UNK]))

    @functools.cached_property
    def _processor(self) -> Any:
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.model)


# SentencePiece keeps three characters for itself: its space, its unknown and its end of a sentence.
# Unicode keeps these code points from all texts; one that is in a text all the same comes behind
# the first of them.
_RESERVED = {"▁": "\ufdd1", "▅": "\ufdd2", "\x1f": "\ufdd3"}
_ESCAPE = "\ufdd0"
_ESCAPES = str.maketrans(_RESERVED | {code: _ESCAPE + code for code in "\ufdd0\ufdd1\ufdd2\ufdd3"})
_CHARACTERS = {code: character for character, code in _RESERVED.items()}


def _unescaped(text):
    escaped = "\ufdd0([\ufdd0-\ufdd3])|[\ufdd1-\ufdd3]"
    return re.sub(escaped, lambda match: match[1] or _CHARACTERS[match[0]], text)


Vocabulary = Tokens | Pieces


def join_subwords(text: str) -> str:
    """Undoes subword-nmt's segmentation (Sennrich et al. 2016): 'bü@@ sche' is 'büsche'."""
    return re.sub(r"@@( |$)", "", text)


def learn(
    tokenizer: str,
    lines: Sequence[str],
    max_size: int | None,
    min_count: int = 1,
    folder: pathlib.Path | None = None,
) -> Vocabulary:
    """The vocabulary of a text: its most frequent tokens, or subwords learnt from it.

    A SentencePiece model takes seconds to minutes to learn; it is kept in a file whose name has a
    hash of all it depends on, in `folder`, or where that is None or cannot be written in
    `paths.cache_folder`, and read from there the next time.

    Args:
      tokenizer: one of TOKENIZERS.
      lines: the training text.
      max_size: at most so many ids with the four special ones, and exactly so many of subwords;
        None for all words or characters, or as many subwords as there are up to 8000.
      min_count: leave out words and characters that occur less often.
      folder: where to keep the model.

    Raises:
      ValueError: where max_size is more subwords than the text has, or too few for its characters.
    """
    if tokenizer not in SUBWORDS:
        counts = collections.Counter(
            itertools.chain.from_iterable(_split(line, tokenizer) for line in lines)
        )
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        frequent = [token for token, count in ordered if count >= min_count]
        return Tokens(tuple(frequent[: None if max_size is None else max_size - 4]), tokenizer)
    import sentencepiece

    escaped = [line.translate(_ESCAPES) for line in lines]
    size = max_size or _MOST_SUBWORDS
    options = {
        "model_type": tokenizer,
        "vocab_size": size,
        "hard_vocab_limit": max_size is not None,
        "pad_id": PAD,
        "bos_id": BEGIN,
        "eos_id": END,
        "unk_id": UNK,
        # Every character is a piece, unless those of a language that has thousands leave too little
        # room for words: then the rarest, 1 of 2000, are UNK.
        "character_coverage": 1.0 if 4 * len(set().union(*escaped)) <= size else 0.9995,
        # Else a model could not write what the defaults change: １, ﬁ, …, and two spaces.
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        # Else the text's own "<s>", "<unk>", … are left out, and "<" is unknown.
        **{f"{name}_piece": f"{_ESCAPE}{name}" for name in ("pad", "bos", "eos", "unk")},
        "num_threads": 1,  # with more threads the result is not reproducible
        # SentencePiece leaves out longer lines: with this limit, none.
        "max_sentence_length": max(len(line.encode()) for line in escaped),
    }
    digest = hashlib.sha256(repr((sentencepiece.__version__, options)).encode())
    digest.update("\n".join(lines).encode())
    name = f"vocabulary.{tokenizer}.{size}.{digest.hexdigest()[:16]}.model"
    folders = [place for place in (folder, paths.cache_folder("attention")) if place is not None]
    return _cached_pieces(name, folders, lambda: Pieces(_learn_subwords(escaped, options)))


def _learn_subwords(lines, options):
    import sentencepiece

    model, size = io.BytesIO(), options["vocab_size"]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **options
        )
    except RuntimeError as error:
        message = str(error)
        if most := re.search(r"set it to a value <= (\d+)", message):
            raise ValueError(
                f"max_vocab_size={size} is more than the training text has subwords: give at most "
                f"{most[1]}, or another tokenizer"
            ) from error
        if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
            raise ValueError(
                f"max_vocab_size={size} is too few for the characters of the training text: give "
                f"more than {least[1]}"
            ) from error
        raise ValueError(f"SentencePiece cannot learn from the training text: {message}") from error
    return model.getvalue()


def _cached_pieces(
    name: str, folders: Sequence[pathlib.Path], make: Callable[[], Pieces]
) -> Pieces:
    for folder in folders:
        try:
            pieces = Pieces((folder / name).read_bytes())
            if pieces.labels:
                return pieces
        except (OSError, RuntimeError):  # missing or damaged: learn it again
            continue
    pieces = make()
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            paths.replace(folder / name, pieces.model)
            break
        except OSError:  # a folder without write permission
            continue
    return pieces


def _split(line, tokenizer):
    return list(line) if tokenizer == "char" else line.split()
