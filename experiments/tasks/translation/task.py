"""Translation from one language to another, of any parallel text."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from experiments.tasks import hashing
from experiments.tasks.ranges import at_least, between, check_fields, each, one_of, ranged
from experiments.tasks.transduction import END
from experiments.tasks.translation import bleu, buckets, corpora, phrases, vocabulary
from experiments.tasks.translation.sequences import Examples, with_end
from experiments.tasks.translation.vocabulary import SPECIAL, UNK

# Each is a program to compile; compiling must not take longer than a short training.
_MOST_BUCKETS = {"text": 6, "generated": 3}


@dataclasses.dataclass(frozen=True)
class Translation:
    """Translate sentences; arrays as those of `experiments.tasks.transduction.Transduction`.

        source   x₁ x₂ x₃ END PAD     source_lengths 4
        inputs   BEGIN y₁ y₂  ·  ·
        targets  y₁ y₂ END PAD PAD
        weights  1  1  1   0   0

    The text is that of `path`, or of `tfds`, or else a generated one (see `phrases.generate`),
    which needs no files.  Ids 0 to 3 are PAD, BEGIN, END and UNK.

    Training batches are bucketed by max(source, target) length, see `step_batch`.  Training pairs
    longer than `length` are left out; of evaluation pairs none is, only their `targets` are cut to
    `length` tokens.  `summary` counts both.

    Attributes:
      path: a folder of files `<stem>.<language>`, plain or compressed, a sentence a line, or what
        their paths begin with; see `corpora.read_files`.
      tfds: name of a TFDS translation set, 'ted_hrlr_translate/pt_to_en'; downloaded and prepared
        if it is not there yet.  TensorFlow is not needed.
      data_dir: where TFDS data sets live; None for TFDS's own default.
      source, target: codes of the languages, 'de' and 'en'; None for a TFDS set's own direction.
      train, validation, test: stem of the split's files, 'test_2016_flickr', or its name in TFDS;
        None for the only one that begins with train, with valid, val or dev, or with test.
      synthetic: 'dates' or 'numbers', which text to generate; None for dates.
      synthetic_pairs, synthetic_eval, synthetic_seed: how many pairs to generate for training, how
        many for each of validation and test, and which.
      tokenizer: 'unigram' or 'bpe' (SentencePiece), 'word' (at spaces), 'char', or 'none': the text
        has subwords at spaces already, 'bü@@ sche', and BLEU is of the words.  None for characters
        of a generated text, 'unigram' of any other.
      max_vocab_size: at most so many ids in each vocabulary, and exactly so many of subwords; None
        for all words or characters, or as many subwords as there are up to 8000.
      min_count: words and characters that occur less often in training are UNK.
      joint: one vocabulary of both languages; else each has its own, and ids, the target's first,
        of one table of both: `vocab_size` is their sum less the special tokens.
      length: the longest sentence that is trained on, in tokens with END.
      buckets: up to which lengths training pairs share a batch, ascending, the last one `length`;
        () for those that pad them the least, at most six, or three of a generated text.
      bleu_tokenize: sacreBLEU's tokenizer, one of `bleu.TOKENIZERS`.  None: 'none' where words are
        split at spaces already (tokenizer 'word' or 'none', or files named '.tok.'), 'char' for
        generated text and for languages without spaces, 'zh' for Chinese, else '13a'.

    Raises ValueError for fields that are out of their range or make no sense together.  Everything
    that needs the text raises FileNotFoundError, OSError or ValueError as `corpora.read_files`,
    `corpora.read_tfds` and `vocabulary.learn` do.
    """

    path: str | None = None
    tfds: str | None = None
    data_dir: str | None = None
    source: str | None = None
    target: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    synthetic: str | None = ranged(None, one_of(*phrases.KINDS))
    synthetic_pairs: int = ranged(20_000, at_least(1))
    synthetic_eval: int = ranged(500, at_least(1))
    synthetic_seed: int = ranged(0, between(0, 2**32 - 1))
    tokenizer: str | None = ranged(None, one_of(*vocabulary.TOKENIZERS))
    max_vocab_size: int | None = ranged(None, at_least(5))
    min_count: int = ranged(1, at_least(1))
    joint: bool = True
    length: int = ranged(64, at_least(2))
    buckets: tuple[int, ...] = ranged((), each(at_least(2)))
    bleu_tokenize: str | None = ranged(None, one_of(*bleu.TOKENIZERS))

    architecture: ClassVar[str] = "encoder_decoder"
    primary: ClassVar[str] = "validation/bleu"
    lower_is_better: ClassVar[bool] = False
    texts: ClassVar[str] = "translations"

    def __post_init__(self):
        check_fields(self)
        places = {name: getattr(self, name) for name in ("path", "tfds", "synthetic")}
        sources = [f"{name}={value!r}" for name, value in places.items() if value is not None]
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)}: give one of them")
        if self.data_dir is not None and self.tfds is None:
            raise ValueError(f"data_dir={self.data_dir!r} says where a tfds set is: give tfds")
        for name in ("source", "target", "train", "validation", "test"):
            value = getattr(self, name)
            if value is not None and self._generated:
                raise ValueError(f"{name}={value!r} is about a text of yours: give path or tfds")
        if self.min_count > 1 and self._tokenizer in vocabulary.SUBWORDS:
            raise ValueError(
                f"min_count={self.min_count} is for whole words and characters; subwords "
                f"(tokenizer {self._tokenizer!r}) are chosen by max_vocab_size"
            )
        lengths = self.buckets
        if lengths and (list(lengths) != sorted(set(lengths)) or lengths[-1] != self.length):
            raise ValueError(f"buckets={lengths} must ascend to length={self.length}")

    @property
    def vocab_size(self) -> int:
        """How many token ids there are, of both languages together."""
        return 4 + len(self._data.labels)

    @property
    def max_length(self) -> int:
        """The longest of `length` and of the sources of all evaluation splits."""
        longest = [int(pairs.source.counts.max()) for pairs in self._data.evaluation.values()]
        return max(self.length, *longest)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any text or with the vocabulary."""
        return self._data.fingerprint

    @property
    def signature(self) -> str:
        """sacreBLEU's signature of the BLEU of `score`."""
        return bleu.signature(self._bleu_tokenize)

    def summary(self) -> str:
        """How many pairs there are, what was left out, and how little of a batch is padding."""
        data = self._data
        total = len(data.train)
        long = total - len(data.rows)
        parts = [f"{total:,} pairs ({long:,} longer than {self.length} tokens left out)"]
        parts += [f"vocabulary {self.vocab_size:,}", f"{data.real:.0%} of batch tokens real"]
        for split, pairs in data.evaluation.items():
            cut = int(np.count_nonzero(pairs.target.counts > self.length))
            parts.append(
                f"{len(pairs):,} for {split}"
                + (f" ({cut:,} cut to {self.length} tokens in the loss)" if cut else "")
            )
        empty = sum(data.corpus.empty.values())
        return ", ".join(parts + ([f"{empty:,} with an empty side left out"] if empty else []))

    def batch(self, seed: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Training pairs padded to `length`; each once per pass, in an order by seed."""
        rows = self._data.rows
        examples = rows[buckets.shuffled(seed, 0, len(rows), indices)]
        return self._data.train.arrays(examples, self.length, self.length)

    def step_batch(self, seed: int, step: int, batch_size: int) -> dict[str, np.ndarray]:
        """The batch of a step: a pure function of its arguments, its shape one of step alone.

        A bucket of length l has batch_size · length // l rows, so all batches hold about as many
        tokens; sources and targets are padded to the longest of each in the bucket.  The bucket is
        hashed from the step, in proportion to the buckets' numbers of examples (`buckets.turn`);
        within a bucket every example comes once per pass, in an order hashed from the seed.
        """
        data = self._data
        rows = self._rows(batch_size)
        number, batch = buckets.turn([len(b) for b in data.buckets], rows, step)
        places = np.arange(batch * rows[number], (batch + 1) * rows[number])
        members = data.buckets[number]
        examples = members[buckets.shuffled(seed, number + 1, len(members), places)]
        return data.train.arrays(examples, *data.widths[number])

    def bucket_shapes(self, batch_size: int) -> list[dict[str, tuple[tuple[int, ...], str]]]:
        """(shape, dtype) by name of each kind of batch that `step_batch` returns."""
        # Of real rows, so that names, order and types can only be those of `step_batch`.
        data = self._data
        rows = [data.train.arrays(data.rows[:1], *widths) for widths in data.widths]
        return [
            {name: ((count, *x.shape[1:]), str(x.dtype)) for name, x in row.items()}
            for count, row in zip(self._rows(batch_size), rows, strict=True)
        ]

    def eval_splits(self) -> dict[str, dict[str, np.ndarray]]:
        """'validation' and where there is one 'test', each padded to its longest sentences."""
        return {
            split: pairs.arrays(
                np.arange(len(pairs)),
                int(pairs.source.counts.max()),
                min(int(pairs.target.counts.max()), self.length),
            )
            for split, pairs in self._data.evaluation.items()
        }

    def tokens(self, ids: np.ndarray) -> list[str]:
        """Words or pieces; a space as ␣ or ▁, and what cannot be printed by its escape."""
        labels = (*SPECIAL, *self._data.labels)
        text = [labels[i] for i in np.asarray(ids).tolist()]
        escaped = [t if t.isprintable() else t.encode("unicode_escape").decode() for t in text]
        return ["␣" if t == " " else t for t in escaped]

    def sources(self, split: str) -> list[str]:
        """The source sentences of 'validation' or 'test' as `encode_source` takes them."""
        return list(self._split(split).source)

    def references(self, split: str) -> list[str]:
        """The right translations of `sources`, as words: of subword text, joined again."""
        return [self._words(text) for text in self._split(split).target]

    def encode_source(self, text: str) -> np.ndarray:
        """Ids of a sentence, with END: int32 [S]; as in files, without white space at its ends."""
        return with_end(*self._data.encode_source([text.strip()])).ids

    def detokenize(self, ids: np.ndarray) -> str:
        """The text of target ids [T] up to the first END, or all where there is none."""
        tokens = np.asarray(ids).tolist()
        tokens = tokens[: tokens.index(END)] if END in tokens else tokens
        # A model can name a word of the source where the table holds both vocabularies.
        size = 4 + len(self._data.target.labels)
        return self._data.target.decode([i if i < size else UNK for i in tokens])

    def score(self, hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """'bleu', 'chrf' and 'exact_match': see `bleu.score`."""
        return bleu.score(hypotheses, references, self._bleu_tokenize)

    def bleu_by_length(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str]
    ) -> dict[str, float]:
        """BLEU of sources of 1 to 10 tokens, END left out, 11 to 20, ...: see `bleu.by_length`."""
        lengths = np.maximum(self._data.encode_source(sources)[1], 1)
        return bleu.by_length(hypotheses, references, lengths, self._bleu_tokenize)

    @property
    def _generated(self):
        return self.path is None and self.tfds is None

    @property
    def _tokenizer(self):
        return self.tokenizer or ("char" if self._generated else "unigram")

    @property
    def _bleu_tokenize(self):
        corpus = self._data.corpus
        if self.bleu_tokenize is not None:
            return self.bleu_tokenize
        if self._generated:
            return "char"
        if self._tokenizer in ("word", "none") or corpus.tokenised:
            return "none"
        language = corpus.languages[1].replace("_", "-").split("-")[0]
        return {"zh": "zh", **dict.fromkeys(("ja", "th", "lo", "km", "my"), "char")}.get(
            language, "13a"
        )

    @property
    def _data(self):
        return _load(self)

    def _rows(self, batch_size):
        return [batch_size * self.length // max(widths) for widths in self._data.widths]

    def _words(self, text):
        return vocabulary.join_subwords(text) if self._tokenizer == "none" else text

    def _split(self, split):
        names = [name for name in self._data.corpus.splits if name != "train"]
        if split not in names:
            raise ValueError(f"there is no split {split!r}; choose from {', '.join(names)}")
        return self._data.corpus.splits[split]


class _TaskData(NamedTuple):
    """What `Translation` computes once from the text.

    `rows` are the training pairs that are short enough, `buckets` those of each bucket, `widths`
    what its sources and targets are padded to; `real` is the share of batches that is not padding.
    """

    corpus: corpora.Corpus
    target: vocabulary.Vocabulary
    encode_source: functools.partial
    labels: tuple[str, ...]
    train: Examples
    evaluation: dict[str, Examples]
    rows: np.ndarray
    buckets: list[np.ndarray]
    widths: list[tuple[int, int]]
    real: float
    fingerprint: str


@functools.lru_cache(maxsize=4)
def _load(task):
    """Everything that depends on the text, once per process."""
    corpus = _read(task)
    source, target = _learn(task, corpus)
    shift = 0 if task.joint else len(target.labels)
    encode_source = functools.partial(_encode, source, shift)
    labels = target.labels if task.joint else (*target.labels, *source.labels)
    encoded = {
        split: Examples(
            with_end(*encode_source(pairs.source)), with_end(*target.encode(pairs.target))
        )
        for split, pairs in corpus.splits.items()
    }
    train = encoded.pop("train")
    counts = np.stack([train.source.counts, train.target.counts])
    lengths = counts.max(axis=0)
    rows = np.flatnonzero(lengths <= task.length)
    if not len(rows):
        raise ValueError(
            f"all {len(lengths)} training pairs are longer than length={task.length} tokens, the "
            f"shortest has {lengths.min()}: give a larger length"
        )
    most = _MOST_BUCKETS["generated" if task._generated else "text"]
    edges = np.array(task.buckets or buckets.choose(lengths[rows], most))
    which = np.searchsorted(edges, lengths[rows])
    members = [rows[which == bucket] for bucket in np.unique(which)]
    widths = [tuple(counts[:, m].max(axis=1).tolist()) for m in members]
    padded = sum(len(m) * sum(width) for m, width in zip(members, widths, strict=True))
    return _TaskData(
        corpus=corpus,
        target=target,
        encode_source=encode_source,
        labels=labels,
        train=train,
        evaluation=encoded,
        rows=rows,
        buckets=members,
        widths=widths,
        real=float(counts[:, rows].sum() / padded),
        fingerprint=_fingerprint(corpus, labels),
    )


def _read(task):
    stems = {name: getattr(task, name) for name in ("train", "validation", "test")}
    if task.path is not None:
        return corpora.read_files(task.path, task.source, task.target, stems)
    if task.tfds is not None:
        return corpora.read_tfds(task.tfds, task.data_dir, task.source, task.target, stems)
    streams = {
        "train": (hashing.TRAIN, task.synthetic_pairs),
        "validation": (hashing.VALIDATION, task.synthetic_eval),
        "test": (hashing.TEST, task.synthetic_eval),
    }
    kind = task.synthetic or "dates"
    splits = {
        split: corpora.Pairs(*phrases.generate(kind, stream, task.synthetic_seed, np.arange(count)))
        for split, (stream, count) in streams.items()
    }
    return corpora.Corpus(("words", "digits"), splits, {}, None, False)


def _learn(task, corpus):
    """The vocabularies of source and target, from the training text alone."""
    learn = functools.partial(
        vocabulary.learn,
        task._tokenizer,
        max_size=task.max_vocab_size,
        min_count=task.min_count,
        folder=corpus.folder,
    )
    train = corpus.splits["train"]
    if task.joint:
        both = learn([*train.source, *train.target])
        return both, both
    return learn(train.source), learn(train.target)


def _encode(source, shift, lines):
    ids, counts = source.encode(lines)
    return np.where(ids > UNK, ids + shift, ids).astype(np.int32), counts


def _fingerprint(corpus, labels):
    digest = hashlib.sha256(repr((corpus.languages, labels)).encode())
    for split, pairs in sorted(corpus.splits.items()):
        for lines in pairs:
            text = "\n".join(lines)
            digest.update(f"{split} {len(lines)} {len(text)}\n".encode() + text.encode())
    return digest.hexdigest()[:16]
