"""Texts from files, iterables and datasets; their content hash and halves; token batches bucketed by length.

Readers are chains of generators, so a corpus is never in memory twice, a large one not at all (`FileTexts`), and
reading stops as soon as `limit` texts are found. Each reader yields `str | None`, `None` standing for a text the format
itself calls absent (a JSON or parquet null); one function, `_gather`, strips, drops and counts.
"""

from __future__ import annotations

import copy
import csv
import gzip
import json
import operator
import os
import re
import tempfile
import threading
import zlib
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from io import BufferedReader, FileIO
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np

from obce.images import ENDINGS, Picture, a_type, check_processor, is_picture_directory, other_files
from obce.images import read_pictures as _each_picture

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

MIN_TEXTS = 4
"""Fewest distinct texts a corpus may hold: stability compares two halves, and a gap takes two texts."""

TEXT_COLUMNS = ("text", "sentence")
"""Columns of a table that are read when none is named (compared without regard to case)."""

FORMATS = (".txt", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")

_Values = Generator[str | None, None, None]

_MAX_LINE_BYTES = 1 << 26  # a longer "line" is a file without lines, and must not fill the memory
_MEMORY_BYTES = 64 << 20  # characters of a corpus that stays in memory
_AT_ONCE, _AT_ONCE_BYTES = 1 << 16, 1 << 24  # texts, and their characters, that are looked up together
_MESSAGE = 200  # characters of another library's message that a sentence quotes
_CHUNK = 1024  # texts a call: enough for a fast tokenizer's threads, small beside a corpus
_DATASET = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?", re.ASCII)


_SURROGATES = re.compile("[\ud800-\udfff]+")


class CorpusNotFoundError(FileNotFoundError, ValueError):
    """There is no such file; caught as what it is, or as the `ValueError` that every bad corpus is."""


GROUP = 20
"""Texts in a group of bagged r_f; groups are consecutive texts of `Corpus.order`."""


@dataclass(frozen=True, eq=False)
class Shard:
    """Some texts of a corpus that are scored as one piece of work.

    Attributes:
        number: Position among the shards, from 0.
        half: 0 or 1, the half of the corpus that all its texts are in.
        texts: int64 [m], positions in the corpus, in the order of `Corpus.order`.
    """

    number: int
    half: int
    texts: NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """Distinct texts in order of first appearance; `read_corpus` makes one, `read_pictures` one of pictures.

    Attributes:
        texts: Distinct, stripped, non-empty texts; a tuple, or, of a large corpus, `FileTexts`.
        source: What they were read from, for people.
        dropped_empty: Entries left out because nothing but white space was in them.
        dropped_duplicate: Entries left out because the same text came before.
        replaced: Texts in which bytes that are no UTF-8, or halves of surrogate pairs, became U+FFFD.
        pairs: Second text of each, as in tasks on pairs of sentences, or None; then a "text" is the pair of both.
        pictures: The pictures whose names stand in `texts`, or None; then a "text" is a picture, known by its bytes.
        reading: What to call `read_corpus` with to read it again, or None if it was not read from a file or dataset.
    """

    texts: Sequence[str]
    source: str
    dropped_empty: int
    dropped_duplicate: int
    replaced: int = 0
    pairs: tuple[str, ...] | None = None
    reading: dict[str, Any] | None = field(default=None, compare=False)
    pictures: tuple[Picture, ...] | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.texts)

    def entries(self, positions: Iterable[int] | None = None) -> list[str] | list[tuple[str, str]] | list[Picture]:
        """What `tokenize` takes, of all texts or of those at some positions."""
        chosen = range(len(self)) if positions is None else positions
        if self.pictures is not None:
            return [self.pictures[i] for i in chosen]
        if self.pairs is None:
            return [self.texts[i] for i in chosen]
        return [(self.texts[i], self.pairs[i]) for i in chosen]

    def _contents(self) -> Iterator[bytes]:
        """Each text as bytes; the byte between the two of a pair is in no UTF-8. Of a picture its digest."""
        if self.pictures is not None:
            yield from (picture.digest for picture in self.pictures)
            return
        for i, text in enumerate(self.texts):
            yield text.encode() if self.pairs is None else text.encode() + b"\xff" + self.pairs[i].encode()

    def _digests(self, size: int, person: bytes = b"", key: bytes = b"") -> NDArray[np.bytes_]:
        """S[size] [n], BLAKE2b of each text; they sort as the bytes do, since all are as long."""
        found = np.empty(len(self), f"S{size}")
        contents = self._contents()
        for start in range(0, len(self), _CHUNK):
            some = [
                blake2b(content, digest_size=size, person=person, key=key).digest()
                for content in islice(contents, _CHUNK)
            ]
            found[start : start + len(some)] = np.frombuffer(b"".join(some), found.dtype)
        return found

    @cached_property
    def hash(self) -> str:
        """Content hash of the set of texts, 32 hex digits, whatever their order or source.

        It is the BLAKE2b of the sorted BLAKE2b digests (32 bytes each) of the UTF-8 texts. Digests have one
        length, so different sets of digests are different bytes for the outer hash.
        """
        digests = self._digests(32)
        digests.sort()
        return blake2b(digests.data, digest_size=16, person=b"obce.corpus").hexdigest()

    def digests(self) -> NDArray[np.uint64]:
        """uint64 [n], a digest of each text in the order of `texts`: equal texts have equal ones."""
        return self._digests(8, b"obce.text").view(np.uint64)

    def order(self, seed: int = 0) -> NDArray[np.int64]:
        """Order the texts by their content.

        Texts are ordered by a digest keyed with `seed`: the same set of texts comes in the same order however the
        source was ordered, and no order of the source (by topic, by length) shows.

        Args:
            seed: Which of the possible orders, 0 to 2^64 - 1.

        Returns:
            int64 [n] positions in `texts`.

        Raises:
            TypeError: `seed` is not an integer.
            ValueError: `seed` is out of range, or there are fewer than `MIN_TEXTS` texts.
        """
        seed = _integer("seed", seed)
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed is {seed}, expected 0 to 2^64 - 1.")
        if len(self) < MIN_TEXTS:
            raise ValueError(_too_few(len(self), self.source))
        return np.argsort(self._digests(32, b"obce.halves", seed.to_bytes(8, "little")), kind="stable")

    def halves(self, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Split the texts in two by their content: the two halves of `order`.

        Args:
            seed: Which of the possible splits, 0 to 2^64 - 1.

        Returns:
            Two disjoint int64 arrays of positions in `texts`, ascending, which cover all; the first has one
            more when the number of texts is odd.

        Raises:
            TypeError: `seed` is not an integer.
            ValueError: `seed` is out of range, or there are fewer than `MIN_TEXTS` texts.
        """
        order = self.order(seed)
        middle = (len(self) + 1) // 2
        return np.sort(order[:middle]), np.sort(order[middle:])

    def shards(self, seed: int = 0, size: int = 1000) -> list[Shard]:
        """Cut the two halves of `order` into shards of nearly equal size.

        Args:
            seed: As in `order`.
            size: Most texts a shard; a multiple of 20, so that groups of 20 texts lie in one shard.

        Returns:
            Shards in order; those of the first half come first. Every shard but the last of its half has a multiple
            of 20 texts.

        Raises:
            TypeError: An argument is not an integer.
            ValueError: `seed` as in `order`; `size` is not a positive multiple of 20.
        """
        size = _integer("size", size)
        if size < GROUP or size % GROUP:
            raise ValueError(f"size is {size}, expected a positive multiple of {GROUP} texts a shard.")
        order = self.order(seed)
        middle = (len(self) + 1) // 2
        found: list[Shard] = []
        for half, texts in enumerate((order[:middle], order[middle:])):
            parts = -(-len(texts) // size)
            each = -(-len(texts) // parts)
            each = -(-each // GROUP) * GROUP
            found += [
                Shard(len(found) + i, half, texts[start : start + each])
                for i, start in enumerate(range(0, len(texts), each))
            ]
        return found


def joined_hash(hashes: Iterable[str]) -> str:
    """Hash of a corpus that was scored in parts, from the parts' hashes; 32 hex digits, whatever their order."""
    return blake2b("".join(sorted(hashes)).encode(), digest_size=16, person=b"obce.joined").hexdigest()


def read_corpus(
    source: str | os.PathLike[str] | Corpus | Iterable[str],
    *,
    column: str | None = None,
    split: str = "train",
    limit: int | None = None,
    strict: bool = False,
) -> Corpus:
    r"""Read distinct texts from a file, an iterable or a dataset.

    Texts are stripped of surrounding white space; empty ones and duplicates are dropped and counted.

    A path is read by its extension, and gzip is recognised by content, whatever the name:

    * `.txt` or no extension: one text a line. Only `\n` and `\r\n` end a line, here and in the formats below.
    * `.jsonl`, `.ndjson`: on each line an object with a column of texts, or a JSON string.
    * `.csv`: comma separated, quoted with `"`.
    * `.tsv`: tab separated and **not** quoted, as most corpora are, a `"` being part of the text; only when
      every field of the first line stands in double quotes is the file read as quoted.
    * `.parquet`: a column of strings, read batch by batch.

    All text is UTF-8, with or without a byte order mark; what is not becomes U+FFFD and is counted, or is refused with
    `strict`. The column is `column`, else the one called "text"
    or "sentence", else the only one there is (in parquet the only one of strings). The first line of a `.csv`
    or `.tsv` is its header, except that in a table of one column, none being named, it counts as a text
    unless it reads "text" or "sentence".

    A `str` that names no file, has none of the extensions above and does not look like a path, is the name of
    a dataset for `datasets.load_dataset`, streamed: `[hf:][owner/]name[:configuration]`, for instance
    `hf:Salesforce/wikitext:wikitext-2-raw-v1`. With `hf:` it is a dataset even where a file has that name.

    A directory of picture files is read by `read_pictures`.

    Args:
        source: Path, dataset name, or iterable of strings (a list, a generator, another `Corpus`).
        column: Column of a table; for a source that is no table it must be left out.
        split: Split of a dataset; used for nothing else.
        limit: Stop after so many distinct texts (the first ones); what was dropped is counted up to there.
        strict: Refuse bytes that are no UTF-8, and halves of surrogate pairs, instead of replacing them.

    Returns:
        The corpus, at least `MIN_TEXTS` texts.

    Raises:
        CorpusNotFoundError: There is no such file.
        TypeError: `source` or an entry of it is not of a usable type.
        ValueError: The file cannot be read or is malformed, the column is absent or ambiguous, too few
            distinct texts are left, or `datasets` is not installed or could not load the dataset.
    """
    if column is not None and not isinstance(column, str):
        raise TypeError(f"column is {a_type(column)}, expected the name of a column as a str.")
    if not isinstance(split, str):
        raise TypeError(f"split is {a_type(split)}, expected the name of a split as a str.")
    limit = _checked_limit(limit)
    if isinstance(source, Corpus):
        _refuse_column(column, "a Corpus")
        if len(source) < MIN_TEXTS:
            raise ValueError(_too_few(len(source), source.source))
        if limit is None or limit >= len(source):
            return source
        pairs = None if source.pairs is None else source.pairs[:limit]
        pictures = None if source.pictures is None else source.pictures[:limit]
        return replace(source, texts=source.texts[:limit], pairs=pairs, pictures=pictures, reading=None)

    dataset = _dataset_name(source) if isinstance(source, str) else None
    if dataset is not None:
        name, configuration = dataset
        label = f"{name}:{configuration}[{split}]" if configuration else f"{name}[{split}]"
        values = _read_dataset(name, configuration, split, column, label)
    elif isinstance(source, str | os.PathLike):
        path = Path(os.path.expanduser(source))
        if is_picture_directory(path):
            _refuse_column(column, "a directory of pictures")
            return read_pictures(source, limit=limit)
        label = str(source)
        values = _reader(path)(path, column, strict)
    else:
        label = f"{_kind(source)} in memory"
        _refuse_column(column, f"{a_type(source)}")
        values = _read_iterable(source)
    with closing(values):
        corpus = _gather(values, label, limit, strict)
    if not isinstance(source, str | os.PathLike):
        return corpus
    place = str(source) if dataset is not None else str(Path(os.path.expanduser(source)).resolve())
    return replace(
        corpus, reading={"source": place, "column": column, "split": split, "limit": limit, "strict": strict}
    )


def _checked_limit(limit: int | None) -> int | None:
    if limit is not None:
        limit = _integer("limit", limit)
        if limit < MIN_TEXTS:
            raise ValueError(f"limit is {limit}, expected at least {MIN_TEXTS}; leave it out to read all.")
    return limit


def read_pictures(source: Any, *, limit: int | None = None) -> Corpus:
    """Read distinct pictures from a directory or a list, for a model that reads pictures.

    A picture is known by its bytes: its name decides nothing, and equal ones are dropped and counted. Files are decoded
    when their batch comes.

    Args:
        source: As for `obce.images.read_pictures`: a directory, an iterable of paths, of PIL images, or of arrays or
            tensors [channels, height, width] that are processed already, or one of all of these; or a `Corpus` of
            pictures.
        limit: Stop after so many distinct pictures.

    Returns:
        The corpus, at least `MIN_TEXTS` pictures; `texts` are their names.

    Raises:
        TypeError: `source` or an entry of it is not of a usable type.
        ValueError: A file is missing, damaged or no picture, an array is of another form, or too few distinct pictures
            are left.
        ImportError: Pillow is not installed.
    """
    limit = _checked_limit(limit)
    if isinstance(source, Corpus):
        return read_corpus(corpus_of(source, pictures=True), limit=limit)
    file = isinstance(source, str | os.PathLike)
    label = str(source) if file else f"{_kind(source)} in memory"
    found: dict[bytes, Picture] = {}
    duplicate = 0
    for picture in _each_picture(source):
        if picture.digest in found:
            duplicate += 1
            continue
        found[picture.digest] = picture
        if len(found) == limit:
            break
    if len(found) < MIN_TEXTS:
        raise ValueError(
            f"source: {label} has {len(found)} distinct pictures, expected at least {MIN_TEXTS}, since a score is a "
            f"gap between two of them and its stability compares two halves; give more ({', '.join(ENDINGS)})."
        )
    reading = None
    if file:
        reading = {
            "source": str(Path(os.path.expanduser(source)).resolve()),
            "column": None,
            "split": "train",
            "limit": limit,
            "strict": False,
        }
        if others := other_files(source):
            label += f" ({others} files of other kinds left out)"
    names = tuple(picture.name for picture in found.values())
    return Corpus(names, label, 0, duplicate, reading=reading, pictures=tuple(found.values()))


def corpus_of(source: Any, *, pictures: bool) -> Corpus:
    """What a caller gave as texts, or as pictures, read; a `Corpus` as it is.

    Raises:
        ValueError: A `Corpus` is of the other kind, or as `read_corpus` or `read_pictures`.
    """
    if not isinstance(source, Corpus):
        source = read_pictures(source) if pictures else read_corpus(source)
    if (source.pictures is not None) != pictures:
        kinds = ("texts", "pictures")
        raise ValueError(
            f"the corpus {source.source} holds {kinds[not pictures]}, but the model reads {kinds[pictures]}: give it "
            f"{'a directory or a list of pictures' if pictures else 'a file or a list of texts'}."
        )
    return cast("Corpus", source)


def _gather(values: Iterator[str | None], label: str, limit: int | None, strict: bool) -> Corpus:
    distinct = _Distinct(label)
    empty = duplicate = replaced = 0
    entries = enumerate(values)
    while limit is None or len(distinct) < limit:
        # never more than may be new, so that nothing is read beyond the last text
        most = _AT_ONCE if limit is None else min(_AT_ONCE, limit - len(distinct))
        texts: list[str] = []
        mended: list[bool] = []
        n_bytes = read = 0
        for index, value in islice(entries, most):
            read += 1
            given = "" if value is None else value.strip()
            text = _without_surrogates(given, index, label, strict)
            if text:
                texts.append(text)
                mended.append(text != given)
                n_bytes += len(text)
            if n_bytes > _AT_ONCE_BYTES:
                break
        if not read:
            break
        new = distinct.add(texts)
        empty += read - len(texts)
        duplicate += len(new) - sum(new)
        replaced += sum(some and is_new for some, is_new in zip(mended, new, strict=True))
    found = distinct.texts()
    if not found:
        raise ValueError(f"source: no text is left in {label}, {empty} empty entries were dropped; give texts.")
    if len(found) == 1 and duplicate:
        raise ValueError(
            f"source: all {duplicate + 1} texts of {label} are equal, expected at least {MIN_TEXTS} distinct "
            "ones; give other texts."
        )
    if len(found) < MIN_TEXTS:
        raise ValueError(_too_few(len(found), label))
    return Corpus(found, label, empty, duplicate, replaced)


def _too_few(found: int, label: str) -> str:
    noun = "text" if found == 1 else "texts"
    return (
        f"source: {label} has {found} distinct {noun}, expected at least {MIN_TEXTS}, since a score is a gap "
        "between two texts and its stability compares two halves of the corpus; give more texts."
    )


def _without_surrogates(text: str, index: int, label: str, strict: bool) -> str:
    """The text with U+FFFD for what cannot be written as UTF-8; `_lines` brings bad bytes as surrogates, too."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if not strict:
            return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text)
        raise ValueError(
            f"source: entry {index} of {label} has half a surrogate pair at character {error.start}, "
            "expected text that can be written as UTF-8; decode it again."
        ) from None
    return text


def _refuse_column(column: str | None, found: str) -> None:
    if column is not None:
        raise ValueError(f"column is {column!r}, but the source is {found}, which has no columns; leave it out.")


# Texts that are not in memory


class FileTexts(Sequence[str]):
    """Texts in a file without a name, read when they are asked for; it goes when nothing refers to it any more.

    Equal to a tuple of the same texts.
    """

    def __init__(self, file: FileIO, bounds: NDArray[np.int64]) -> None:
        """The file, and int64 [n + 1], where each text begins and the last one ends, in bytes."""
        self._file = file
        self._bounds = bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[str]: ...
    def __getitem__(self, at: int | slice) -> str | Sequence[str]:
        if isinstance(at, slice):
            places = range(len(self))[at]
            if places.step == 1:
                return FileTexts(self._file, self._bounds[places.start : max(places.start, places.stop) + 1])
            return tuple(self[i] for i in places)
        at = range(len(self))[at]
        return _read_bytes(self._file, int(self._bounds[at]), int(self._bounds[at + 1])).decode()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _CHUNK):
            bounds = self._bounds[start : start + _CHUNK + 1].tolist()
            block = _read_bytes(self._file, bounds[0], bounds[-1])
            for begin, end in pairwise(bounds):
                yield block[begin - bounds[0] : end - bounds[0]].decode()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, tuple | FileTexts):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (list(self),)


def _read_bytes(file: FileIO, begin: int, end: int) -> bytes:
    parts = []
    while begin < end:
        if hasattr(os, "pread"):  # moves nothing that a thread or a forked process shares
            part = os.pread(file.fileno(), end - begin, begin)
        else:
            with _SEEKING:
                file.seek(begin)
                part = file.read(end - begin)
        if not part:
            raise OSError(f"a temporary file of texts ends at byte {begin}, expected {end} bytes")
        parts.append(part)
        begin += len(part)
    return b"".join(parts)


_SEEKING = threading.Lock()


class _Distinct:
    """Distinct texts in order of first appearance: in memory up to `_MEMORY_BYTES` of them, then in a file.

    Of texts in the file a digest of 8 bytes is kept, sorted, with the text's number. Texts with equal digests are
    read and compared.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._memory: dict[str, None] = {}
        self._bytes = 0
        self._file: FileIO | None = None
        self._digests = np.empty(0, np.uint64)
        self._numbers = np.empty(0, np.int64)
        self._bounds = array("q", [0])
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def texts(self) -> Sequence[str]:
        if self._file is None:
            return tuple(self._memory)
        return FileTexts(self._file, np.array(self._bounds, np.int64))

    def add(self, texts: list[str]) -> list[bool]:
        """Adds some texts; which of them are new."""
        if self._file is not None:
            return self._add_to_file(texts)
        new = []
        for text in texts:
            new.append(text not in self._memory)
            self._memory[text] = None
            self._bytes += len(text)
        self._count = len(self._memory)
        if self._bytes > _MEMORY_BYTES:
            self._file = _unnamed_file(self.label)
            held, self._memory, self._count = list(self._memory), {}, 0
            for start in range(0, len(held), _AT_ONCE):
                self._add_to_file(held[start : start + _AT_ONCE])
        return new

    def _add_to_file(self, texts: list[str]) -> list[bool]:
        contents = [text.encode() for text in texts]
        digests = _short_digests(contents)
        first = np.searchsorted(self._digests, digests)
        last = np.searchsorted(self._digests, digests, side="right")
        here: dict[int, list[bytes]] = {}  # new ones among these, by digest
        new = []
        for content, digest, begin, end in zip(contents, digests.tolist(), first.tolist(), last.tolist(), strict=True):
            alike = here.setdefault(digest, [])
            known = content in alike or any(self._content(int(self._numbers[i])) == content for i in range(begin, end))
            new.append(not known)
            if not known:
                alike.append(content)
        self._write([content for content, is_new in zip(contents, new, strict=True) if is_new])
        added = digests[new]
        order = np.argsort(added, kind="stable")
        at = np.searchsorted(self._digests, added[order], side="right")
        self._digests = np.insert(self._digests, at, added[order])
        self._numbers = np.insert(self._numbers, at, self._count + order)
        self._count += len(added)
        return new

    def _content(self, number: int) -> bytes:
        return _read_bytes(cast("FileIO", self._file), self._bounds[number], self._bounds[number + 1])

    def _write(self, contents: list[bytes]) -> None:
        block = memoryview(b"".join(contents))
        try:
            while block:
                block = block[cast("FileIO", self._file).write(block) :]
        except OSError as error:
            raise _no_file(self.label, error) from error
        for content in contents:
            self._bounds.append(self._bounds[-1] + len(content))


def _short_digests(contents: Sequence[bytes]) -> NDArray[np.uint64]:
    whole = b"".join(blake2b(content, digest_size=8, person=b"obce.distinct").digest() for content in contents)
    return np.frombuffer(whole, np.uint64)


def _unnamed_file(label: str) -> FileIO:
    try:
        return tempfile.TemporaryFile(buffering=0)
    except OSError as error:
        raise _no_file(label, error) from error


def _no_file(label: str, error: OSError) -> ValueError:
    return ValueError(
        f"source: the texts of {label} cannot be put into a temporary file ({error.strerror}), which a corpus of more "
        f"than {_MEMORY_BYTES >> 20} MB needs; free space there, or name another directory in TMPDIR."
    )


# Where the texts are


def _dataset_name(source: str) -> tuple[str, str | None] | None:
    """(name, configuration) of a dataset, or None when `source` is to be opened as a file."""
    prefixed = source.startswith("hf:")
    if not prefixed:
        if os.path.exists(os.path.expanduser(source)) or _looks_like_path(source):
            return None
        if not source.strip():
            raise ValueError("source is an empty str, expected a path, a dataset name or an iterable of texts.")
    match = _DATASET.fullmatch(source.removeprefix("hf:"))
    if match is not None:
        return match["name"], match["config"]
    if prefixed:
        raise ValueError(
            f"source is {shortened(source)}, expected hf:[owner/]name[:configuration], for instance "
            "'hf:Salesforce/wikitext:wikitext-2-raw-v1'."
        )
    raise ValueError(
        f"source is the str {shortened(source)}, which is neither a file nor a dataset name; to give the "
        "texts themselves pass a list of them."
    )


def _looks_like_path(source: str) -> bool:
    return (
        source.startswith((".", "~", "/", os.sep))
        or source.endswith(("/", os.sep))
        or "\\" in source
        or source.count("/") > 1
        or source.lower().removesuffix(".gz").endswith(FORMATS)
        or source.lower().endswith(".gz")
    )


def _reader(path: Path) -> Callable[[Path, str | None, bool], _Values]:
    if os.path.isdir(path):
        raise ValueError(f"source: {path} is a directory, expected a file; a dataset of that name is 'hf:{path.name}'.")
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    zipped = suffixes[-1:] == [".gz"]
    suffix = "".join(suffixes[:-1][-1:] if zipped else suffixes[-1:])
    if suffix == ".parquet" and zipped:
        raise ValueError(f"source: {path} is a parquet file inside gzip, expected plain parquet; unpack it first.")
    readers = {
        "": _read_lines,
        ".txt": _read_lines,
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".csv": _read_csv,
        ".tsv": _read_tsv,
        ".parquet": _read_parquet,
    }
    if suffix not in readers:
        if not os.path.exists(path):
            raise CorpusNotFoundError(_missing(path))
        raise ValueError(
            f"source: {path} has the extension {suffix!r}, expected {', '.join(FORMATS)} (the text formats "
            "also with .gz); rename or convert it."
        )
    return readers[suffix]


def _missing(path: Path) -> str:
    return f"source: there is no file {path}; check the path (a dataset name is written 'hf:owner/name')."


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """`path` for reading, a refusal of the operating system being told in a sentence."""
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusNotFoundError(_missing(path)) from None
    except OSError as error:
        raise ValueError(f"source: {path} cannot be opened ({error.strerror}); check its permissions.") from error
    with file:
        yield file


# Text formats


def _lines(path: Path, strict: bool) -> Generator[str, None, None]:
    r"""Lines with their `\n`; bad bytes are refused at their place in the unpacked content, or come as surrogates."""
    with _opened(path) as file:
        zipped = file.peek(2)[:2] == b"\x1f\x8b"
        inside = " of its unpacked content" if zipped else ""
        start = 0  # offset of the line in the content
        with gzip.open(file) if zipped else nullcontext(file) as stream:
            while raw := _line_bytes(stream, path, zipped):
                null = raw.find(0)
                if null >= 0:
                    raise ValueError(
                        f"source: {path} is not a text file, byte {start + null}{inside} is NUL; save it as UTF-8 text."
                    )
                if len(raw) == _MAX_LINE_BYTES:
                    raise ValueError(
                        f"source: {path} has a line of {_MAX_LINE_BYTES} bytes or more at byte {start}"
                        f"{inside}, expected one text a line; break it into texts."
                    )
                mark = 3 if start == 0 and raw.startswith(b"\xef\xbb\xbf") else 0
                try:
                    line = raw[mark:].decode(errors="strict" if strict else "surrogateescape")
                except UnicodeDecodeError as error:
                    bad = mark + error.start
                    raise ValueError(
                        f"source: {path} is not UTF-8, byte {start + bad}{inside} is 0x{raw[bad]:02x}; save "
                        "it as UTF-8 text."
                    ) from None
                start += len(raw)
                yield line


def _line_bytes(stream: BufferedReader | gzip.GzipFile, path: Path, zipped: bool) -> bytes:
    try:
        return stream.readline(_MAX_LINE_BYTES)
    except EOFError:
        raise ValueError(f"source: {path} is a truncated gzip file; copy it again.") from None
    except (OSError, zlib.error) as error:
        what = "is a damaged gzip file" if zipped else "cannot be read"
        raise ValueError(f"source: {path} {what} ({error}); copy it again.") from error


def _read_lines(path: Path, column: str | None, strict: bool) -> _Values:
    _refuse_column(column, f"the text file {path}")
    yield from _lines(path, strict)


def _read_jsonl(path: Path, column: str | None, strict: bool) -> _Values:
    return _read_records(_json_records(path, strict), column, f"of {path}", "line", first=1)


def _json_records(path: Path, strict: bool) -> Iterator[object]:
    for number, line in enumerate(_lines(path, strict), start=1):
        if not line.strip():
            yield None
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"source: line {number} of {path} is not JSON ({error}), expected an object or a string on "
                "each line; mend that line."
            ) from None


def _read_csv(path: Path, column: str | None, strict: bool) -> _Values:
    return _read_table(_csv_rows(_lines(path, strict), ",", path), column, path)


def _read_tsv(path: Path, column: str | None, strict: bool) -> _Values:
    rest = _lines(path, strict)
    first = next(rest, "")
    quoted = all(len(field) > 1 and field[0] == field[-1] == '"' for field in _fields(first))
    lines = chain([first] if first else [], rest)
    rows = _csv_rows(lines, "\t", path) if quoted else enumerate(map(_fields, lines), start=1)
    yield from _read_table(rows, column, path)


def _fields(line: str) -> list[str]:
    return line.removesuffix("\n").removesuffix("\r").split("\t")


def _csv_rows(lines: Iterator[str], delimiter: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"source: line {reader.line_num} of {path} cannot be read as a row ({error}); mend its "
                "quotes, or save the texts as .jsonl."
            ) from None
        if row is None:
            return
        yield reader.line_num, row


def _read_table(rows: Iterator[tuple[int, list[str]]], column: str | None, path: Path) -> _Values:
    """Texts of numbered rows, of which the first is the header unless it is the only column's first text."""
    width = position = -1
    for number, row in rows:
        if not any(row):
            yield None
        elif width < 0:
            width = len(row)
            names = [cell.strip() for cell in row]
            if width == 1 and column is None and names[0].casefold() not in TEXT_COLUMNS:
                position = 0
                yield row[0]
            else:
                position = _pick_column(names, column, f"the header (line {number}) of {path}")
        elif len(row) != width:
            raise ValueError(
                f"source: line {number} of {path} has {len(row)} fields, expected {width} as in the first "
                "row; check its separators and quotes."
            )
        else:
            yield row[position]


# Tables with typed columns


def _pick_column(names: Sequence[str], column: str | None, where: str) -> int:
    if column is not None:
        found = [i for i, name in enumerate(names) if name == column]
    else:
        found = [i for i, name in enumerate(names) if name.casefold() in TEXT_COLUMNS]
        if not found and len(names) == 1:
            found = [0]
    if len(found) == 1:
        return found[0]
    if column is None:
        raise ValueError(
            f"column: it is not clear which column of {where} holds the texts, found {_listed(names)}; name one."
        )
    if not found:
        raise ValueError(f"column {column!r} is not in {where}, expected one of {_listed(names)}.")
    raise ValueError(f"column {column!r} stands {len(found)} times in {where}, expected once; rename one.")


def _read_records(records: Iterator[object], column: str | None, where: str, unit: str, first: int) -> _Values:
    """Texts of JSON-like records; the first object settles the column, and every later one must have it."""
    name: str | None = None
    for number, record in enumerate(records, start=first):
        place = f"{unit} {number} {where}"
        if record is None:
            yield None
        elif isinstance(record, str):
            _refuse_column(column, f"{place}, a string")
            yield record
        elif not isinstance(record, Mapping):
            raise TypeError(f"source: {place} is {a_type(record)}, expected an object with a text, or a string.")
        else:
            if name is None:
                names = [str(key) for key in record]
                name = names[_pick_column(names, column, place)]
            if name not in record:
                raise ValueError(f"column {name!r} is not in {place}, found only {_listed(list(record))}.")
            yield _text(record[name], f"column {name!r} of {place}")


def _read_parquet(path: Path, column: str | None, strict: bool) -> _Values:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"source: reading {path} needs the package pyarrow; install it with pip.") from error

    def holds_texts(kind: Any) -> bool:
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))

    with _opened(path) as file:
        try:
            table = pq.ParquetFile(file)
            schema = table.schema_arrow
            names = list(schema.names)
            of_strings = [name for name in names if holds_texts(schema.field(names.index(name)).type)]
            if column is None and len(of_strings) == 1:
                column = of_strings[0]
            position = _pick_column(names, column, str(path))
            if not holds_texts(schema.field(position).type):
                raise TypeError(
                    f"column {names[position]!r} of {path} holds {schema.field(position).type}, expected "
                    "strings; name another column."
                )
            for batch in table.iter_batches(batch_size=_CHUNK, columns=[names[position]]):
                yield from batch.column(0).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"source: {path} is not a readable parquet file ({first_line(error)}); write it again."
            ) from error


def _read_dataset(name: str, configuration: str | None, split: str, column: str | None, label: str) -> _Values:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"source: {name!r} is not a file here, and reading it as a dataset needs the optional package "
            "datasets; install it with `pip install datasets`, or give the path of a file."
        ) from error

    def records() -> Iterator[object]:
        # A dataset fails in its own ways (offline, unknown name, unknown split, a broken loader), and lazily.
        try:
            yield from datasets.load_dataset(name, configuration, split=split, streaming=True)
        except Exception as error:
            raise ValueError(
                f"source: the dataset {label} could not be read ({_kind(error)}: {first_line(error)}); "
                "check its name, its split and the connection, or give the path of a file."
            ) from error

    yield from _read_records(records(), column, f"of {label}", "record", first=0)


def _read_iterable(source: Iterable[str]) -> _Values:
    kind = _kind(source)
    if isinstance(source, bytes | bytearray | Mapping) or hasattr(source, "columns"):
        raise TypeError(
            f"source is {a_type(source)}, expected a path or an iterable of strings; pass one column or list."
        )
    if isinstance(source, set | frozenset):
        raise TypeError(f"source is {a_type(source)}, whose order changes from run to run; pass sorted(source).")
    try:
        entries = iter(source)
    except TypeError:
        raise TypeError(
            f"source is {a_type(source)}, expected a path, a dataset name or an iterable of strings."
        ) from None
    for index, entry in enumerate(entries):
        if not isinstance(entry, str):
            raise TypeError(f"source: entry {index} of the {kind} is {a_type(entry)}, expected a str.")
        yield entry


def _text(value: object, place: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise TypeError(f"source: {place} is {a_type(value)}, expected a string.")


def _kind(value: object) -> str:
    return type(value).__name__


def _listed(names: Sequence[object], most: int = 20) -> str:
    shown = ", ".join(shortened(str(name)) for name in names[:most]) or "no columns"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def shortened(text: str, most: int = 40) -> str:
    """A text as errors quote it."""
    return repr(text if len(text) <= most else text[: most - 3] + "...")


def first_line(error: Exception) -> str:
    """What an error of another library says, as far as it fits into a sentence."""
    return (str(error).strip().splitlines() or ["no message"])[0][:_MESSAGE]


def _integer(name: str, value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]  # the call is the check
    except TypeError:
        raise TypeError(f"{name} is {a_type(value)}, expected an int.") from None


# Tokens


@dataclass(frozen=True, eq=False)
class Batch:
    """Some texts as the model takes them.

    Attributes:
        indices: int64 [b], positions of the texts in the corpus.
        inputs: `input_ids`, `attention_mask` and, if the tokenizer makes them, `token_type_ids`: int64 [b, T]
            on the CPU, padded on the right to the longest text of the batch, so that [CLS] is at position 0. Of
            pictures `pixel_values`, float32 [b, channels, height, width].
        tokens: Tokens of each picture, [CLS] the first of them; 0 for texts.
    """

    indices: NDArray[np.int64]
    inputs: dict[str, torch.Tensor]
    tokens: int = 0

    @property
    def real(self) -> torch.Tensor:
        """int64 [b, T], 1 where a place is no padding."""
        import torch

        if not self.tokens:
            return self.inputs["attention_mask"]
        return torch.ones((len(self.indices), self.tokens), dtype=torch.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [b], tokens of each text."""
        if not self.tokens:
            return cast("NDArray[np.int64]", self.inputs["attention_mask"].sum(1).numpy())
        return np.full(len(self.indices), self.tokens, np.int64)

    def entered(self) -> Batch:
        """The batch when its hidden states are at hand: pictures are let go, which are as large as these."""
        return replace(self, inputs={}) if self.tokens else self


@dataclass(frozen=True)
class Pack:
    """Texts one after another, without padding.

    Attributes:
        indices: int64 [b], positions of the texts.
        lengths: int64 [b], tokens of each.
        inputs: int64 [1, T] each: `input_ids`, `position_ids` (from 0 in every text) and, where the tokenizer makes
            them, `token_type_ids`.
    """

    indices: NDArray[np.int64]
    lengths: NDArray[np.int64]
    inputs: dict[str, torch.Tensor]


class TokenBatches:
    """Tokenised texts in batches of similar length; every iteration builds the same batches anew.

    Batches run from the longest texts to the shortest, so that what does not fit in memory fails at once;
    equal lengths keep the order of the corpus.

    Attributes:
        n_texts: Number of texts; each is in exactly one batch.
        n_tokens: Number of tokens over all texts, special tokens included, padding not.
        truncated: Number of texts that were longer than `max_length` and lost their end.
        max_length: Most tokens a text may have, special tokens included.
        batch_tokens: Most places a batch, padding included, if that was asked for.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        ids: NDArray[np.int32],
        types: NDArray[np.int32] | None,
        *,
        truncated: int,
        max_length: int,
        batch_size: int,
        batch_tokens: int | None,
        pad_id: int,
        pad_type: int,
    ) -> None:
        # The tokens of all texts lie one after another; those of text i begin at starts[i].
        self._lengths = lengths
        self._starts = np.cumsum(lengths) - lengths
        self._order = np.argsort(-lengths, kind="stable").astype(np.int64)
        self._ids = ids
        self._types = None if types is None else types.astype(np.min_scalar_type(int(types.max())))
        self._pad_id = pad_id
        self._pad_type = pad_type
        self.n_texts = len(lengths)
        self.n_tokens = len(ids)
        self.truncated = truncated
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        self._mine = slice(None)  # of the batches
        self._bounds = [0]
        while (first := self._bounds[-1]) < self.n_texts:
            longest = int(lengths[self._order[first]])
            size = batch_size if batch_tokens is None else max(1, batch_tokens // longest)
            self._bounds.append(min(self.n_texts, first + size))

    def __len__(self) -> int:
        return len(self._given())

    def _given(self) -> list[tuple[int, int]]:
        """Where each batch that is given begins and ends, in the order of batches."""
        return list(pairwise(self._bounds))[self._mine]

    def share(self, rank: int, of: int) -> TokenBatches:
        """The same batches, of which every `of`-th is given, beginning with number `rank`; `n_texts` counts all."""
        some = copy.copy(self)
        some._mine = slice(rank, None, of)
        return some

    def tokens_of_first(self) -> NDArray[np.int64]:
        """int64 [n_texts + 1], tokens in the first texts that batches bring, from none to all."""
        return np.concatenate([[0], np.cumsum(self._lengths[self._order])])

    def __iter__(self) -> Iterator[Batch]:
        import torch

        for first, end in self._given():
            indices = self._order[first:end].copy()
            lengths = self._lengths[indices]
            columns = np.arange(lengths[0])  # the first text is the longest
            real = columns < lengths[:, None]  # [b, T]
            places = (self._starts[indices, None] + columns)[real]
            padded = {
                "input_ids": np.full(real.shape, self._pad_id, dtype=np.int64),
                "attention_mask": real.astype(np.int64),
            }
            padded["input_ids"][real] = self._ids[places]
            if self._types is not None:
                padded["token_type_ids"] = np.full(real.shape, self._pad_type, dtype=np.int64)
                padded["token_type_ids"][real] = self._types[places]
            yield Batch(indices, {name: torch.from_numpy(array) for name, array in padded.items()})

    def packs(self, tokens: int) -> Iterator[Pack]:
        """The same texts in the same order without padding, in packs of nearly equal size and about so many tokens."""
        import torch

        ends = np.cumsum(self._lengths[self._order])
        parts = max(1, -(-self.n_tokens // tokens))
        cuts = np.searchsorted(ends, self.n_tokens / parts * np.arange(1, parts)) + 1
        for first, end in pairwise(np.unique([0, *cuts, self.n_texts]).tolist()):
            indices = self._order[first:end].copy()
            lengths = self._lengths[indices]
            starts = np.cumsum(lengths) - lengths
            position = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
            places = np.repeat(self._starts[indices], lengths) + position
            arrays = {"input_ids": self._ids[places].astype(np.int64), "position_ids": position}
            if self._types is not None:
                arrays["token_type_ids"] = self._types[places].astype(np.int64)
            yield Pack(indices, lengths, {name: torch.from_numpy(array[None]) for name, array in arrays.items()})


class PictureBatches(TokenBatches):
    """Pictures in batches, in the order of the corpus; each iteration decodes them anew, a batch at a time.

    All have `max_length` tokens, and none is truncated.
    """

    def __init__(
        self, pictures: Sequence[Picture], processor: Any, *, tokens: int, batch_size: int, batch_tokens: int | None
    ) -> None:
        check_processor(pictures, processor)
        lengths = np.full(len(pictures), tokens, np.int64)
        super().__init__(
            lengths,
            np.empty(0, np.int32),
            None,
            truncated=0,
            max_length=tokens,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            pad_id=0,
            pad_type=0,
        )
        self.n_tokens = int(lengths.sum())
        self._pictures = pictures
        self._processor = processor

    def __iter__(self) -> Iterator[Batch]:
        import torch

        for first, end in self._given():
            chosen = self._pictures[first:end]
            pixels = [picture.pixels(self._processor) for picture in chosen]
            for picture, own in zip(chosen, pixels, strict=True):
                if own.shape != pixels[0].shape:
                    raise ValueError(
                        f"picture '{picture.name}' has the shape {tuple(own.shape)} where '{chosen[0].name}' has "
                        f"{tuple(pixels[0].shape)}, expected one shape: give a processor that resizes and crops."
                    )
            yield Batch(np.arange(first, end), {"pixel_values": torch.stack(pixels)}, self.max_length)

    def packs(self, tokens: int) -> Iterator[Pack]:
        """Pictures have no padding that packs could leave out.

        Raises:
            ValueError: Always.
        """
        raise ValueError("pictures have no padding, expected batches of texts to pack")


def tokenize(
    texts: Corpus | Sequence[str] | Sequence[tuple[str, str]] | Sequence[Picture],
    tokenizer: Any,
    *,
    max_length: int = 128,
    batch_size: int = 32,
    batch_tokens: int | None = None,
    vocabulary: int | None = None,
) -> TokenBatches:
    """Tokenise texts once and keep them as batches of similar length.

    Args:
        texts: A corpus, or a sequence of strings, or of pairs of strings, taken as they are; or of pictures, as
            `Corpus.entries` gives them.
        tokenizer: A tokenizer of transformers, fast or slow. Its own padding side plays no part: batches are padded
            on the right. Where it has no padding token, as many of decoders, its end-of-text token or 0 fills the
            places that the attention mask covers. For pictures an image processor.
        max_length: Most tokens a text may have, special tokens included; longer texts are cut by the
            tokenizer, which keeps the special tokens, and counted. Of pictures the tokens of each, as
            `obce.sites.usable_max_length` says.
        batch_size: Texts a batch.
        batch_tokens: Most places a batch, padding included, instead of a number of texts; a text longer than
            that is a batch of its own.
        vocabulary: Tokens that the model has embeddings for; a text with another one is refused.

    Returns:
        Batches that can be iterated any number of times.

    Raises:
        TypeError: An argument is of the wrong type, or an entry of `texts` is neither a string nor a pair of them
            as the others are.
        ValueError: There is no text, a text gives no token or one beyond `vocabulary`, `max_length` leaves no room
            beside the special tokens or is above the tokenizer's own, or `batch_size` or `batch_tokens` is below 1.
    """
    entries = _entries(texts)
    if isinstance(entries[0], Picture):
        return PictureBatches(
            entries,
            tokenizer,
            tokens=_at_least_one("max_length", max_length),
            batch_size=_at_least_one("batch_size", batch_size),
            batch_tokens=None if batch_tokens is None else _at_least_one("batch_tokens", batch_tokens),
        )
    if not callable(tokenizer) or not hasattr(tokenizer, "num_special_tokens_to_add"):
        raise TypeError(
            f"tokenizer is {a_type(tokenizer)}, expected a tokenizer of transformers; make one with "
            "AutoTokenizer.from_pretrained(...)."
        )
    max_length = _integer("max_length", max_length)
    least = tokenizer.num_special_tokens_to_add(pair=isinstance(entries[0], tuple)) + 1
    if max_length < least:
        raise ValueError(
            f"max_length is {max_length}, expected at least {least}: the special tokens and one of the text."
        )
    # Tokenizers that know no limit say 10^30, or another number no model has.
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_length is {max_length}, expected at most {tokenizer.model_max_length}, the tokenizer's "
            "model_max_length."
        )
    batch_size = _at_least_one("batch_size", batch_size)
    if batch_tokens is not None:
        batch_tokens = _at_least_one("batch_tokens", batch_tokens)

    lengths: list[int] = []
    ids: list[NDArray[np.int32]] = []
    types: list[NDArray[np.int32]] = []
    truncated = 0
    for start in range(0, len(entries), _CHUNK):
        rows, cut = _encode(tokenizer, entries[start : start + _CHUNK], max_length)
        truncated += cut
        lengths += map(len, rows["input_ids"])
        ids.append(np.fromiter(chain.from_iterable(rows["input_ids"]), np.int32))
        if "token_type_ids" in rows:
            types.append(np.fromiter(chain.from_iterable(rows["token_type_ids"]), np.int32))
    if 0 in lengths:
        raise ValueError(f"texts: entry {lengths.index(0)} gives no token, expected at least one; leave that text out.")
    every = np.concatenate(ids)
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    if vocabulary is not None and (greatest := max(int(every.max()), pad_id)) >= vocabulary:
        raise ValueError(
            f"tokenizer gives token {greatest}, but the model has embeddings for {vocabulary} tokens: give the "
            "tokenizer that belongs to the model, or call model.resize_token_embeddings(len(tokenizer)) first."
        )
    return TokenBatches(
        np.array(lengths, dtype=np.int64),
        every,
        np.concatenate(types) if types else None,
        truncated=truncated,
        max_length=max_length,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        pad_id=pad_id,
        pad_type=getattr(tokenizer, "pad_token_type_id", 0),
    )


def _at_least_one(name: str, value: object) -> int:
    number = _integer(name, value)
    if number < 1:
        raise ValueError(f"{name} is {number}, expected at least 1.")
    return number


def _entries(
    texts: Corpus | Sequence[str] | Sequence[tuple[str, str]] | Sequence[Picture],
) -> list[str] | list[tuple[str, str]] | list[Picture]:
    if isinstance(texts, Corpus):
        entries: list[Any] = texts.entries()
    elif isinstance(texts, Sequence) and not isinstance(texts, str | bytes | bytearray):
        entries = list(texts)
        if entries and all(isinstance(entry, Picture) for entry in entries):
            return entries
        pairs = bool(entries) and isinstance(entries[0], tuple)
        for index, entry in enumerate(entries):
            if pairs and not (isinstance(entry, tuple) and [isinstance(part, str) for part in entry] == [True, True]):
                raise TypeError(
                    f"texts: entry {index} is {a_type(entry)}, expected a pair of strings as the first one."
                )
            if not pairs and not isinstance(entry, str):
                raise TypeError(f"texts: entry {index} is {a_type(entry)}, expected a str.")
    else:
        raise TypeError(f"texts is {a_type(texts)}, expected a Corpus or a list of strings.")
    if not entries:
        raise ValueError("texts is empty, expected at least one text.")
    return entries


def _encode(
    tokenizer: Any, entries: list[str] | list[tuple[str, str]], max_length: int
) -> tuple[dict[str, list[list[int]]], int]:
    """Token rows of at most `max_length`, and how many of them lost tokens."""
    keep = {"padding": False, "return_attention_mask": False, "verbose": False}

    def columns(rows: Iterable[Any]) -> list[list[str]]:
        """The texts, and the second texts if there are any."""
        chosen = list(rows)
        return [list(column) for column in zip(*chosen, strict=True)] if isinstance(chosen[0], tuple) else [chosen]

    if tokenizer.is_fast:
        encoded = tokenizer(*columns(entries), truncation=True, max_length=max_length, **keep)
        # What was cut off hangs on each row; a full row with nothing cut off had exactly max_length tokens.
        full = (row for row in encoded.encodings if len(row) == max_length)
        return dict(encoded), sum(bool(row.overflowing) for row in full)
    # A slow tokenizer does not tell which rows of a batch it cut: long ones are found first, then cut by it.
    encoded = dict(tokenizer(*columns(entries), **keep))
    long = [i for i, row in enumerate(encoded["input_ids"]) if len(row) > max_length]
    if long:
        cut = tokenizer(*columns(entries[i] for i in long), truncation=True, max_length=max_length, **keep)
        for name, rows in encoded.items():
            for i, row in zip(long, cut[name], strict=True):
                rows[i] = row
    return encoded, len(long)
