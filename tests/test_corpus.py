"""Corpora: every format, every refusal, the content hash, the halves, and the laws of token batches."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import itertools
import json
import subprocess
import sys
import tempfile
import tracemalloc
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from obce import corpus as corpus_module
from obce.corpus import MIN_TEXTS, Corpus, CorpusNotFoundError, FileTexts, TokenBatches, read_corpus, tokenize

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "examples" / "wikipedia-2500.tsv.gz"

# A quote that opens a field, a comma, white space around, two scripts, and separators that end no line.
RAW = [
    '"They are," he said, "alike".',
    "  a text with space around \t",
    "naïve café, 東京",
    "one\u2028text\x85with\x0bodd\x0cseparators",
    "",
    "plain",
    "naïve café, 東京",
    "   ",
]
TEXTS = (RAW[0], RAW[1].strip(), RAW[2], RAW[3], "plain")


def write_txt(path: Path) -> None:
    path.write_bytes("\n".join(RAW).encode())


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(RAW)))


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *enumerate(RAW)])


def write_tsv(path: Path) -> None:
    rows = [f"{i}\t{text.strip()}\n" for i, text in enumerate(RAW)]
    path.write_bytes("".join(["id\ttext\n", *rows]).encode())


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"id": range(len(RAW)), "text": RAW}), path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "corpus": write_txt,
    "corpus.txt": write_txt,
    "corpus.jsonl": write_jsonl,
    "corpus.ndjson": write_jsonl,
    "corpus.csv": write_csv,
    "corpus.TSV": write_tsv,
    "corpus.parquet": write_parquet,
}


def file_of(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Reading


@pytest.mark.parametrize("as_str", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_texts(tmp_path: Path, name: str, as_str: bool) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    corpus = read_corpus(str(path) if as_str else path)
    assert corpus == Corpus(TEXTS, str(path), dropped_empty=2, dropped_duplicate=1)
    assert len(corpus) == 5


@pytest.mark.parametrize("zipped_name", ["{}.gz", "{}"])
@pytest.mark.parametrize("name", ["corpus.txt", "corpus.jsonl", "corpus.csv", "corpus.TSV"])
def test_gzip_is_known_by_content(tmp_path: Path, name: str, zipped_name: str) -> None:
    plain = tmp_path / ("plain-" + name)
    WRITERS[name](plain)
    packed = file_of(tmp_path, zipped_name.format(name), gzip.compress(plain.read_bytes()))
    assert read_corpus(packed).texts == TEXTS


def test_gz_name_with_plain_content(tmp_path: Path) -> None:
    write_txt(tmp_path / "corpus.gz")
    assert read_corpus(tmp_path / "corpus.gz").texts == TEXTS


@pytest.mark.parametrize("name", ["corpus.txt", "corpus.jsonl", "corpus.csv", "corpus.TSV"])
def test_byte_order_mark_and_crlf(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    unix = path.read_bytes().replace(b"\r\n", b"\n")
    path.write_bytes(b"\xef\xbb\xbf" + unix.replace(b"\n", b"\r\n"))
    assert read_corpus(path).texts == TEXTS


def test_last_line_needs_no_end(tmp_path: Path) -> None:
    with_end = read_corpus(file_of(tmp_path, "a.txt", "a\nb\nc\nd\n"))
    without = read_corpus(file_of(tmp_path, "b.txt", "a\nb\nc\nd"))
    assert with_end.texts == without.texts == ("a", "b", "c", "d")
    assert with_end.dropped_empty == without.dropped_empty == 0


@pytest.mark.parametrize(
    "make",
    [list, tuple, iter, lambda raw: (text for text in raw), lambda raw: np.array(raw, dtype=object)],
    ids=["list", "tuple", "iterator", "generator", "array"],
)
def test_iterables(make: Callable[[list[str]], Any]) -> None:
    corpus = read_corpus(make(RAW))
    assert (corpus.texts, corpus.dropped_empty, corpus.dropped_duplicate) == (TEXTS, 2, 1)
    assert corpus.source.endswith("in memory")


def test_subclasses_of_str_become_str() -> None:
    corpus = read_corpus(np.array(["a", "b", "c", "d"]))
    assert {type(text) for text in corpus.texts} == {str}


def test_a_corpus_passes_through_and_can_be_cut() -> None:
    corpus = read_corpus(RAW)
    assert read_corpus(corpus) == corpus
    assert read_corpus(corpus, limit=4).texts == TEXTS[:4]
    assert read_corpus(corpus, limit=400).texts == TEXTS


@pytest.mark.parametrize("name", WRITERS)
def test_a_corpus_says_how_to_read_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    WRITERS[name](tmp_path / name)
    monkeypatch.chdir(tmp_path)
    column = "text" if name.endswith(("csv", "TSV", "jsonl", "ndjson", "parquet")) else None
    found = read_corpus(Path(name), column=column, limit=4)
    monkeypatch.chdir("/")
    assert found.reading is not None
    again = read_corpus(**json.loads(json.dumps(found.reading)))
    assert (again.texts, again.hash, again.dropped_empty) == (found.texts, found.hash, found.dropped_empty)
    assert len(again) == 4
    assert again.reading == found.reading


def test_what_was_in_memory_cannot_be_read_again(tmp_path: Path) -> None:
    assert read_corpus(RAW).reading is None
    write_txt(tmp_path / "a.txt")
    whole = read_corpus(tmp_path / "a.txt")
    assert read_corpus(whole) is whole
    assert read_corpus(whole, limit=4).reading is None, "the limit is none of the file's"


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts go into a file almost at once, a few at a time."""
    monkeypatch.setattr(corpus_module, "_MEMORY_BYTES", 20)
    monkeypatch.setattr(corpus_module, "_AT_ONCE", 7)
    monkeypatch.setattr(corpus_module, "_AT_ONCE_BYTES", 40)
    monkeypatch.setattr(corpus_module, "_CHUNK", 5)


@given(
    entries=st.lists(
        st.one_of(st.none(), st.text(max_size=12), st.sampled_from(["ab", "c\ud800", "é", ""])), max_size=80
    ),
    limit=st.one_of(st.none(), st.integers(4, 40)),
    alike=st.booleans(),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_corpus_in_a_file_is_the_one_in_memory(
    entries: list[str | None], limit: int | None, alike: bool, small_memory: None, tmp_path: Path
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": entry}) + "\n" for entry in entries), encoding="utf-8")

    def read() -> Corpus | str:
        try:
            return read_corpus(path, limit=limit)
        except ValueError as error:
            return str(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "_MEMORY_BYTES", 1 << 30)
        expected = read()
    with pytest.MonkeyPatch.context() as patch:
        if alike:  # digests that fall together
            few = corpus_module._short_digests
            patch.setattr(corpus_module, "_short_digests", lambda contents: few(contents) & np.uint64(1))
        found = read()
    assert found == expected
    if isinstance(expected, str) or isinstance(found, str):
        return
    assert isinstance(expected.texts, tuple)
    assert hash(found.texts) == hash(expected.texts)
    assert (found.hash, found.digests().tolist()) == (expected.hash, expected.digests().tolist())
    assert found.order(3).tolist() == expected.order(3).tolist()
    assert found.entries([2, 0]) == expected.entries([2, 0])
    assert [one.texts.tolist() for one in found.shards()] == [one.texts.tolist() for one in expected.shards()]
    for part in (slice(None), slice(1, 3), slice(3, 1), slice(-2, None), slice(None, None, -2)):
        assert found.texts[part] == expected.texts[part]
    assert found.texts[-1] == expected.texts[-1]
    assert copy.deepcopy(found).texts == expected.texts
    assert found.texts != expected.texts[1:]
    with pytest.raises(IndexError):
        found.texts[len(expected)]


def test_a_large_corpus_takes_few_bytes_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 60_000
    path = tmp_path / "texts.txt"
    path.write_text(
        "".join(f"text {i} of many, {'as long as a sentence is ' * 6}\n" for i in range(n)), encoding="utf-8"
    )
    monkeypatch.setattr(corpus_module, "_MEMORY_BYTES", 1 << 18)
    monkeypatch.setattr(corpus_module, "_AT_ONCE", 1 << 10)
    tracemalloc.start()
    try:
        corpus = read_corpus(path)
        held, read = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        shards = corpus.shards()
        assert len(corpus.hash) == 32
        used = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(corpus) == n
    assert sum(len(shard.texts) for shard in shards) == n
    assert isinstance(corpus.texts, FileTexts)
    # where the texts are, while reading their digests and numbers, and while they are put in order 32 bytes more
    assert held < 12 * n
    assert read < 60 * n
    assert used < 100 * n


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_no_room_for_a_large_corpus(small_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda buffering: io.FileIO("/dev/full", "wb"))
    refused(
        (f"text {i} of many" for i in range(50)),
        r"texts of generator in memory cannot be put into a temporary file \(No space left on device\), which a corpus "
        r"of more than 0 MB needs; free space there, or name another directory in TMPDIR",
    )


def test_limit_counts_distinct_texts_and_stops_reading() -> None:
    source = (str(n // 2) for n in itertools.count())
    corpus = read_corpus(source, limit=10)
    assert corpus.texts == tuple(str(n) for n in range(10))
    assert corpus.dropped_duplicate == 9
    assert next(source) == "9"  # nothing beyond the tenth distinct text was taken


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.tsv"])
def test_limit_stops_before_a_broken_tail(tmp_path: Path, name: str) -> None:
    head = {"a.txt": "{}\n", "a.jsonl": '"{}"\n', "a.csv": "{}\n", "a.tsv": "{}\n"}[name]
    content = "".join(head.format(n) for n in range(6)).encode() + b"\xff\n"
    path = file_of(tmp_path, name, content)
    assert read_corpus(path, limit=6).texts == tuple("012345")
    with pytest.raises(ValueError, match=f"byte {len(content) - 2} is 0xff"):
        read_corpus(path, strict=True)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_column_by_name(tmp_path: Path, suffix: str) -> None:
    table = {"text": list("abcd"), "other": list("efgh")}
    path = tmp_path / f"table{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(table), path)
    elif suffix == ".jsonl":
        rows = zip(*table.values(), strict=True)
        path.write_text("".join(json.dumps(dict(zip(table, row, strict=True))) + "\n" for row in rows))
    else:
        separator = "," if suffix == ".csv" else "\t"
        rows = zip(*table.values(), strict=True)
        path.write_text("\n".join(separator.join(row) for row in [tuple(table), *rows]))
    assert read_corpus(path).texts == tuple("abcd")
    assert read_corpus(path, column="other").texts == tuple("efgh")
    with pytest.raises(ValueError, match=r"column 'absent' is not in .*table.*expected one of 'text', 'other'\."):
        read_corpus(path, column="absent")


@pytest.mark.parametrize(
    ("content", "column", "texts"),
    [
        ("a\nb\nc\nd\n", None, "abcd"),  # no header: the first row is a text
        ("Sentence\na\nb\nc\nd\n", None, "abcd"),
        ("body\na\nb\nc\nd\n", "body", "abcd"),
        ('"text"\tid\na\t1\nb\t2\nc\t3\nd\t4\n', '"text"', "abcd"),  # one bare field: nothing is quoted
        ("id\tText\n1\ta\n2\tb\n\n3\tc\n4\td\n", None, "abcd"),
        (
            '"id"\t"text"\n"1"\t"a ""b"""\n"2"\t"c"\n"3"\t"d\te"\n"4"\t"f\n"\n',
            None,
            ['a "b"', "c", "d\te", "f"],
        ),
        ('id\ttext\n1\t"a"\n2\t"b\n3\tc""\n4\t"\n', None, ['"a"', '"b', 'c""', '"']),
    ],
)
def test_tsv_rules(tmp_path: Path, content: str, column: str | None, texts: Any) -> None:
    assert read_corpus(file_of(tmp_path, "a.tsv", content), column=column).texts == tuple(texts)


def test_csv_texts_may_span_lines(tmp_path: Path) -> None:
    path = file_of(tmp_path, "a.csv", 'text,id\n"a\nb",1\n"c, d",2\n"e ""f""",3\ng,4\n')
    assert read_corpus(path).texts == ("a\nb", "c, d", 'e "f"', "g")


def test_jsonl_strings_nulls_and_blank_lines(tmp_path: Path) -> None:
    lines = '"a"\n\nnull\n{"sentence": "b"}\n{"sentence": null, "n": 1}\n{"sentence": "c"}\n"d"\n'
    corpus = read_corpus(file_of(tmp_path, "a.jsonl", lines))
    assert (corpus.texts, corpus.dropped_empty) == (("a", "b", "c", "d"), 3)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_string_types_nulls_and_the_sole_column_of_strings(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array(["a", None, "b", "c", "c", "d"]).cast(kind)
    pq.write_table(pa.table({"n": range(6), "body": values}), tmp_path / "a.parquet", row_group_size=2)
    corpus = read_corpus(tmp_path / "a.parquet")
    assert (corpus.texts, corpus.dropped_empty, corpus.dropped_duplicate) == (("a", "b", "c", "d"), 1, 1)


def test_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_txt(tmp_path / "corpus.txt")
    assert read_corpus("~/corpus.txt").texts == TEXTS


def test_sample_has_2500_distinct_texts() -> None:
    corpus = read_corpus(SAMPLE)
    assert len(set(corpus.texts)) == len(corpus) == 2500
    assert corpus.dropped_empty == corpus.dropped_duplicate == 0
    assert corpus.hash in (SAMPLE.parent / "README.md").read_text(encoding="utf-8")


def test_sample_names_the_licence_of_each_row() -> None:
    readme = (SAMPLE.parent / "README.md").read_text(encoding="utf-8")
    with gzip.open(SAMPLE, "rt", encoding="utf-8", newline="\n") as lines:
        sources = [line.split("\t")[0] for line in lines][1:]
    for source in set(sources):
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{source}` |"))
        assert f"| {sources.count(source):,} |" in row
        assert "creativecommons.org/licenses/by-sa/" in row


def test_sample_is_what_its_script_makes(tmp_path: Path) -> None:
    table = gzip.compress(b"source\tsentence\nwt2\ta\nnews\tb\nqnli\tc\nwikisplit\td\n")
    made = tmp_path / "made.tsv.gz"
    script = [sys.executable, str(ROOT / "examples" / "make_sample.py"), "--rows", "2"]
    subprocess.run([*script, str(file_of(tmp_path, "table.gz", table)), str(made)], check=True, timeout=60)
    assert gzip.decompress(made.read_bytes()) == b"source\tsentence\nwt2\ta\nqnli\tc\n"
    assert made.read_bytes()[4:8] == SAMPLE.read_bytes()[4:8] == bytes(4)  # no time


# Refusals


def refused(source: Any, match: str, error: type[Exception] = ValueError, **options: Any) -> None:
    """`read_corpus` raises exactly `error`, in one sentence."""
    with pytest.raises(error, match=match) as caught:
        read_corpus(source, **options)
    assert caught.type is error
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message


def test_missing_file(tmp_path: Path) -> None:
    assert issubclass(CorpusNotFoundError, FileNotFoundError)
    assert issubclass(CorpusNotFoundError, ValueError)
    refused(tmp_path / "absent.txt", r"there is no file .*absent\.txt; check the path", CorpusNotFoundError)
    refused(tmp_path / "absent.parquet", r"there is no file .*absent\.parquet", CorpusNotFoundError)
    refused(tmp_path / "absent.odt", r"there is no file .*absent\.odt", CorpusNotFoundError)
    write_txt(tmp_path / "file")
    refused(tmp_path / "file" / "in.txt", r"there is no file", CorpusNotFoundError)


@pytest.mark.parametrize("source", ["absent.txt", "./absent", "~/absent", "a/b/c", "absent.gz", "a\\b", "dir/"])
def test_a_str_that_looks_like_a_path_is_never_a_dataset(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(source, "there is no file", CorpusNotFoundError)


def test_a_str_that_is_no_source(tmp_path: Path) -> None:
    refused(
        "One sentence is no corpus.",
        "'One sentence is no corpus.', which is neither a file nor a dataset name",
    )
    refused("x " * 400, r"the str 'x x .*\.\.\.', which is neither a file nor")
    refused(" ", "source is an empty str")
    refused("hf:", r"source is 'hf:', expected hf:\[owner/\]name\[:configuration\]")
    refused(str(tmp_path), "is a directory, expected a file; a dataset of that name is 'hf:")
    refused(tmp_path, "is a directory, expected a file")


def test_unknown_extension(tmp_path: Path) -> None:
    refused(file_of(tmp_path, "a.docx", "x"), r"a\.docx has the extension '\.docx', expected \.txt, \.jsonl")
    refused(file_of(tmp_path, "a.json.gz", "x"), r"has the extension '\.json'")
    refused(file_of(tmp_path, "a.parquet.gz", "x"), "is a parquet file inside gzip, expected plain parquet")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.tsv", "a"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    refused(file_of(tmp_path, name, ""), "no text is left in .*a.*, 0 empty entries were dropped; give texts")
    refused(file_of(tmp_path, name, "\n \n\n"), "no text is left in .*, 3 empty entries were dropped")


def test_too_few_texts() -> None:
    refused([], "no text is left in list in memory, 0 empty entries")
    refused(["", " "], "no text is left in list in memory, 2 empty entries")
    refused(["a"], f"list in memory has 1 distinct text, expected at least {MIN_TEXTS}, since a score is a gap")
    refused(
        ["a", "b", "c", "a"],
        "has 3 distinct texts, expected at least 4, .* compares two halves of the corpus",
    )
    refused([" a", "a ", "a"], "all 3 texts of list in memory are equal")
    refused(Corpus(("a", "b"), "somewhere", 0, 0), "somewhere has 2 distinct texts")
    assert len(read_corpus(["a", "b", "c", "d"])) == MIN_TEXTS


def test_text_that_is_no_utf8_is_replaced_and_counted(tmp_path: Path) -> None:
    for name, data in {
        "a.txt": b"one\nt\xe9\xe9o\nthree\nfour\xff\n",
        "a.csv": b"text,x\none,1\nt\xe9\xe9o,2\nthree,3\nfour\xff,4\n",
        "a.jsonl": b'"one"\n"t\xe9\xe9o"\n"three"\n"four\\ud800"\n',
    }.items():
        corpus = read_corpus(file_of(tmp_path, name, data))
        assert corpus.texts == ("one", "t\ufffdo", "three", "four\ufffd")
        assert corpus.replaced == 2
    listed = read_corpus(["one", "t\ud800o", "three", "a \ufffd of its own"])
    assert listed.texts == ("one", "t\ufffdo", "three", "a \ufffd of its own")
    assert listed.replaced == 1
    # what becomes equal is one text
    assert len(read_corpus(["a\ud800", "a\ud801", "b", "c", "d"])) == 4


def test_binary_files(tmp_path: Path) -> None:
    strict = {"strict": True}
    refused(file_of(tmp_path, "a.txt", b"ab\ncd\0ef\n"), "not a text file, byte 5 is NUL; save it as UTF-8 text")
    refused(
        file_of(tmp_path, "b.txt", b"ab\nc\xe9d\n"), "is not UTF-8, byte 4 is 0xe9; save it as UTF-8 text", **strict
    )
    refused(file_of(tmp_path, "c.txt", b"\xef\xbb\xbfab\nc\xe9d\n"), "byte 7 is 0xe9", **strict)
    refused(file_of(tmp_path, "d.txt", b"\xef\xbb\xbf\xe9d\n"), "byte 3 is 0xe9", **strict)
    refused(file_of(tmp_path, "e.csv", "text\nä\n".encode("utf-16")), "not a text file, byte 3 is NUL")
    refused(file_of(tmp_path, "f.txt", gzip.compress(b"ab\n\0")), "byte 3 of its unpacked content is NUL")


def test_truncated_and_damaged_gzip(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(97, 123, 30_000, dtype=np.uint8)
    noise[::50] = 10
    whole = gzip.compress(noise.tobytes())
    refused(file_of(tmp_path, "a.txt.gz", whole[: len(whole) // 2]), "is a truncated gzip file; copy it again")
    damaged = bytearray(whole)
    damaged[-6] ^= 0xFF  # the checksum
    refused(file_of(tmp_path, "b.txt.gz", bytes(damaged)), r"is a damaged gzip file \(CRC check failed")
    damaged = bytearray(whole)
    damaged[10] = 0xFF  # the first block's type
    refused(file_of(tmp_path, "c.txt.gz", bytes(damaged)), r"is a damaged gzip file \(.*invalid block type")


def test_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "_MAX_LINE_BYTES", 100)
    refused(
        file_of(tmp_path, "a.txt", "ab\n" + "x" * 200),
        "has a line of 100 bytes or more at byte 3, expected one",
    )


def test_malformed_jsonl(tmp_path: Path) -> None:
    good = '{"text": "a"}\n\n'
    refused(
        file_of(tmp_path, "a.jsonl", good + "{text\n"),
        r"line 3 of .*a\.jsonl is not JSON \(Expecting property",
    )
    refused(file_of(tmp_path, "b.jsonl", "[" * 100_000), r"line 1 of .* is not JSON")
    refused(file_of(tmp_path, "c.jsonl", good + "7\n"), "line 3 of .* is an int, expected an object", TypeError)
    refused(
        file_of(tmp_path, "d.jsonl", good + '{"text": ["b"]}\n'),
        r"column 'text' of line 3 of .*d\.jsonl is a list, expected a string",
        TypeError,
    )
    refused(
        file_of(tmp_path, "e.jsonl", good + '{"body": "b"}\n'),
        "'text' is not in line 3 .*, found only 'body'",
    )
    refused(file_of(tmp_path, "f.jsonl", "{}\n"), "not clear which column of line 1 .*, found no columns")
    refused(file_of(tmp_path, "g.jsonl", '"a"\n'), "line 1 of .*, a string, which has no columns", column="x")


def test_malformed_tables(tmp_path: Path) -> None:
    ragged = "id,text\n1,a\n2,b,c\n"
    refused(file_of(tmp_path, "a.csv", ragged), r"line 3 of .*a\.csv has 3 fields, expected 2 as in the first row")
    refused(file_of(tmp_path, "a.tsv", ragged.replace(",", "\t")), r"line 3 of .*a\.tsv has 3 fields, expected 2")
    refused(file_of(tmp_path, "b.csv", 'text\n"a\nb\n'), r"line 3 of .* cannot be read as a row \(unexpected end")
    refused(file_of(tmp_path, "c.csv", 'text\n"a"b\n'), r"line 2 of .* cannot be read as a row \(',' expected")
    refused(file_of(tmp_path, "d.csv", "text\n" + "x" * 200_000), r"line 2 of .*field larger than field limit")


def test_ambiguous_columns(tmp_path: Path) -> None:
    refused(
        file_of(tmp_path, "a.tsv", "sentence1\tsentence2\nx\ty\n"),
        r"which column of the header \(line 1\) of .* holds the texts, found 'sentence1', 'sentence2'",
    )
    refused(file_of(tmp_path, "a.csv", "text,sentence\nx,y\n"), "found 'text', 'sentence'; name one")
    refused(file_of(tmp_path, "b.csv", "a,b,a\nx,y,z\n"), "column 'a' stands 2 times in", column="a")
    refused(
        file_of(tmp_path, "c.csv", ",".join("c" * n for n in range(1, 31))),
        "'c+', 'c+' and 10 more; name one",
    )
    pq.write_table(pa.table({"a": ["x"], "b": ["y"]}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", r"which column of .*a\.parquet holds the texts, found 'a', 'b'")


def test_parquet_refusals(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1, 2], "text": ["a", "b"]}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "column 'n' of .* holds int64, expected strings", TypeError, column="n")
    refused(file_of(tmp_path, "b.parquet", "not parquet"), "is not a readable parquet file")
    refused(file_of(tmp_path, "c.parquet", ""), "is not a readable parquet file")
    broken = (tmp_path / "a.parquet").read_bytes()
    refused(file_of(tmp_path, "d.parquet", broken[: len(broken) // 2]), "is not a readable parquet file")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(tmp_path / "a.parquet", "needs the package pyarrow")


@pytest.mark.parametrize("name", ["a.txt", "a.parquet"])
def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = file_of(tmp_path, name, "x")

    def no_entry(*_: Any) -> None:  # the administrator, who may run the tests, is refused nothing
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", no_entry)
    refused(path, r"cannot be opened \(Permission denied\); check its permissions")


def test_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BytesIO):
        def peek(self, _: int) -> bytes:
            return b"x"

        def readline(self, _: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", lambda *_: Failing())
    refused(tmp_path / "a.txt", r"a\.txt cannot be read \(.*Input/output error\)")


def test_entries_that_are_no_texts() -> None:
    refused(["a", 7], "entry 1 of the list is an int, expected a str", TypeError)
    refused(["a", "b", None], "entry 2 of the list is a NoneType, expected a str", TypeError)
    refused(iter([b"a"]), "entry 0 of the list_iterator is a bytes", TypeError)
    refused(["a", "b", "c\ud800"], "entry 2 of list in memory has half a surrogate pair at character 1", strict=True)


class Frame:
    columns = ("text", "label")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


@pytest.mark.parametrize("source", [None, 7, b"texts.txt", {"text": ["a"]}, Frame()])
def test_sources_of_the_wrong_type(source: Any) -> None:
    refused(source, f"source is an? {type(source).__name__}, expected a path", TypeError)


def test_sets_have_no_order() -> None:
    refused({"a", "b"}, r"source is a set, whose order changes from run to run; pass sorted\(source\)", TypeError)


def test_options_of_the_wrong_kind(tmp_path: Path) -> None:
    refused(["a"], "limit is 3, expected at least 4; leave it out to read all", limit=3)
    refused(["a"], "limit is a bool, expected an int", TypeError, limit=True)
    refused(["a"], "limit is a float, expected an int", TypeError, limit=10.0)
    refused(["a"], "column is an int, expected the name of a column", TypeError, column=1)
    refused(["a"], "split is a NoneType, expected the name of a split", TypeError, split=None)
    refused(["a"], "column is 'x', but the source is a list, which has no columns", column="x")
    refused(read_corpus(RAW), "the source is a Corpus, which has no columns", column="x")
    refused(file_of(tmp_path, "a.txt", "a"), r"the source is the text file .*a\.txt, which has no", column="x")


# Datasets


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[types.SimpleNamespace]:
    """A stand-in for the package `datasets` that records its calls and how many records were taken."""
    fake = types.SimpleNamespace(calls=[], taken=0, records=[{"id": i, "text": t} for i, t in enumerate(RAW)])

    def load_dataset(*args: Any, **options: Any) -> Iterator[Any]:
        fake.calls.append((args, options))
        if isinstance(fake.records, Exception):
            raise fake.records
        for record in fake.records:
            fake.taken += 1
            yield record

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("imdb", ("imdb", None)),
        ("hf:imdb", ("imdb", None)),
        ("owner/name", ("owner/name", None)),
        ("glue:sst2", ("glue", "sst2")),
        ("hf:owner/name:20231101.en", ("owner/name", "20231101.en")),
    ],
)
def test_dataset_names(datasets: Any, source: str, arguments: tuple[str, str | None]) -> None:
    corpus = read_corpus(source, split="validation")
    assert datasets.calls == [(arguments, {"split": "validation", "streaming": True})]
    assert corpus.texts == TEXTS
    assert corpus.source == ":".join(filter(None, arguments)) + "[validation]"
    assert corpus.reading is not None
    assert read_corpus(**corpus.reading) == corpus
    assert datasets.calls[1] == datasets.calls[0]


def test_a_dataset_is_streamed(datasets: Any) -> None:
    datasets.records = ({"body": str(n)} for n in itertools.count())
    assert len(read_corpus("endless", limit=7)) == 7
    assert datasets.taken == 7
    assert datasets.calls[0][1]["split"] == "train"


def test_a_file_goes_before_a_dataset_unless_prefixed(datasets: Any, tmp_path: Path) -> None:
    write_txt(tmp_path / "imdb")
    assert read_corpus("imdb").source == "imdb"
    assert not datasets.calls
    assert read_corpus("hf:imdb").source == "imdb[train]"
    assert datasets.calls


def test_dataset_columns(datasets: Any) -> None:
    refused(
        "name",
        r"column 'body' is not in record 0 of name\[train\], expected one of 'id', 'text'",
        column="body",
    )
    refused(
        "name",
        r"column 'id' of record 0 of name\[train\] is an int, expected a string",
        TypeError,
        column="id",
    )
    datasets.records = [{"a": "x", "b": "y"}]
    refused("name", r"not clear which column of record 0 of name\[train\] holds the texts, found 'a', 'b'")


def test_a_dataset_that_cannot_be_loaded(datasets: Any) -> None:
    datasets.records = ConnectionError("no route to host\nsecond line")
    refused(
        "name",
        r"the dataset name\[train\] could not be read \(ConnectionError: no route to host\); check its name",
    )


def test_datasets_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(
        "imdb",
        "'imdb' is not a file here, and reading it as a dataset needs the optional package datasets; install",
    )


def test_importing_needs_numpy_and_the_standard_library_only() -> None:
    heavy = ("torch", "transformers", "pyarrow", "datasets", "scipy")
    code = f"import sys, obce.corpus; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


# Hash and halves

distinct_texts = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).map(str.strip).filter(bool),
    unique=True,
    min_size=MIN_TEXTS,
    max_size=40,
)


def corpus_of(texts: list[str]) -> Corpus:
    return Corpus(tuple(texts), "here", 0, 0)


@given(distinct_texts, st.randoms(use_true_random=False))
def test_hash_is_of_the_set_of_texts(texts: list[str], random: Any) -> None:
    shuffled = random.sample(texts, len(texts))
    assert Corpus(tuple(shuffled), "there", 5, 6).hash == corpus_of(texts).hash


@given(distinct_texts, st.data())
def test_hash_changes_with_any_text(texts: list[str], data: Any) -> None:
    corpus = corpus_of(texts)
    assert len(corpus.hash) == 32
    assert int(corpus.hash, 16) >= 0
    place = data.draw(st.integers(0, len(texts) - 1))
    changed = [*texts[:place], texts[place] + "x", *texts[place + 1 :]]
    shorter = texts[:place] + texts[place + 1 :]
    assert corpus_of(shorter).hash != corpus.hash
    assert (corpus_of(changed).hash == corpus.hash) == (set(changed) == set(texts))


def test_hash_sees_where_texts_end() -> None:
    assert corpus_of(["ab", "c", "d", "e"]).hash != corpus_of(["a", "bc", "d", "e"]).hash


def test_hash_and_halves_are_the_same_in_every_process_and_version() -> None:
    corpus = corpus_of(["a", "b", "c", "d", "naïve"])
    assert corpus.hash == "7b822454005b60ed9292c8033e370b39"
    assert [half.tolist() for half in corpus.halves(7)] == [[0, 2, 4], [1, 3]]


@given(distinct_texts, st.integers(0, 2**64 - 1), st.randoms(use_true_random=False))
def test_halves_are_decided_by_content(texts: list[str], seed: int, random: Any) -> None:
    first, second = corpus_of(texts).halves(seed)
    for half in (first, second):
        assert half.dtype == np.int64
        assert (np.diff(half) > 0).all()
    assert sorted([*first, *second]) == list(range(len(texts)))
    assert len(first) - len(second) == len(texts) % 2

    shuffled = random.sample(texts, len(texts))
    again = corpus_of(shuffled).halves(seed)
    assert {shuffled[i] for i in again[0]} == {texts[i] for i in first}
    assert {shuffled[i] for i in again[1]} == {texts[i] for i in second}


def test_halves_depend_on_the_seed_and_not_on_the_place() -> None:
    corpus = corpus_of([f"text {n}" for n in range(400)])
    first = [set(corpus.halves(seed)[0].tolist()) for seed in range(5)]
    assert corpus.halves()[0].tolist() == sorted(first[0])
    for a, b in itertools.combinations(first, 2):
        assert 60 < len(a & b) < 140  # 100 expected of two random halves, standard deviation 5
    assert all(60 < sum(i < 200 for i in half) < 140 for half in first)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed is {seed}, expected 0 to 2\^64 - 1"):
        read_corpus(RAW).halves(seed)


def test_halves_refusals() -> None:
    with pytest.raises(TypeError, match="seed is a float, expected an int"):
        read_corpus(RAW).halves(0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="here has 3 distinct texts, expected at least 4"):
        corpus_of(["a", "b", "c"]).halves()
    assert read_corpus(RAW).halves(np.uint8(3))[0].tolist() == read_corpus(RAW).halves(3)[0].tolist()  # type: ignore[arg-type]


# Token batches

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", *("##" + c for c in "abcdefgh")]
CLS, SEP, A, B, C = 2, 3, 5, 6, 7


@pytest.fixture(scope="module", params=["fast", "slow"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import BertTokenizer
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n")
    make: Callable[[str], Any] = BertTokenizer if request.param == "fast" else BertTokenizerLegacy
    made = make(str(path))
    assert made.is_fast == (request.param == "fast")
    return made


@pytest.fixture
def own_tokenizer(tokenizer: Any) -> Any:
    """A copy for tests that change it."""
    return copy.deepcopy(tokenizer)


word_texts = st.lists(
    st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=9).map(" ".join),
    min_size=1,
    max_size=25,
)


def alone(tokenizer: Any, text: str, max_length: int) -> list[int]:
    """The tokens of one text: the pieces, cut to leave room for [CLS] and [SEP]."""
    pieces = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
    return [CLS, *pieces[: max_length - 2], SEP]


def test_ranks_share_batches(tiny_tokenizer: Any) -> None:
    whole = tokenize([f"text {'of ' * (i % 7)}{i}" for i in range(40)], tiny_tokenizer, batch_size=3, max_length=16)
    for size in (1, 2, 5, 30):
        parts = [whole.share(rank, size) for rank in range(size)]
        assert [part.n_texts for part in parts] == [40] * size
        assert sum(map(len, parts)) == len(whole) == 14
        given = [[batch.indices.tolist() for batch in part] for part in parts]
        assert [len(one) for one in given] == [len(part) for part in parts]
        every = [batch.indices.tolist() for batch in whole]
        assert given == [every[rank::size] for rank in range(size)]


@settings(max_examples=40, deadline=None)
@given(texts=word_texts, max_length=st.integers(3, 14), batch_size=st.integers(1, 7))
def test_batching_laws(tokenizer: Any, texts: list[str], max_length: int, batch_size: int) -> None:
    import torch

    batches = tokenize(texts, tokenizer, max_length=max_length, batch_size=batch_size)
    rows = [alone(tokenizer, text, max_length) for text in texts]
    listed = list(batches)
    assert len(listed) == len(batches) == -(-len(texts) // batch_size)
    assert all(len(batch.indices) == batch_size for batch in listed[:-1])

    order = np.concatenate([batch.indices for batch in listed])
    assert order.dtype == np.int64
    assert order.tolist() == sorted(range(len(texts)), key=lambda i: (-len(rows[i]), i))
    for batch in listed:
        expected = [rows[i] for i in batch.indices]
        longest = max(map(len, expected))
        assert set(batch.inputs) - {"token_type_ids"} == {"input_ids", "attention_mask"}
        assert ("token_type_ids" in batch.inputs) == tokenizer.is_fast
        for tensor in batch.inputs.values():
            assert tensor.dtype == torch.int64
            assert tensor.shape == (len(expected), longest)
        assert batch.inputs["input_ids"].tolist() == [row + [0] * (longest - len(row)) for row in expected]
        assert batch.inputs["attention_mask"].tolist() == [
            [1] * len(row) + [0] * (longest - len(row)) for row in expected
        ]
        if tokenizer.is_fast:
            assert not batch.inputs["token_type_ids"].any()

    assert batches.n_texts == len(texts)
    assert batches.n_tokens == sum(map(len, rows))
    assert batches.truncated == sum(len(tokenizer.tokenize(text)) + 2 > max_length for text in texts)
    assert batches.max_length == max_length

    budget = batch_size * 5
    whole = [
        batch.inputs["attention_mask"]
        for batch in tokenize(texts, tokenizer, max_length=max_length, batch_tokens=budget)
    ]
    assert sum(len(mask) for mask in whole) == len(texts)
    for mask, after in zip(whole, [*whole[1:], None], strict=True):
        assert mask.numel() <= budget or len(mask) == 1
        # another text of that length would not have fitted
        assert after is None or (len(mask) + 1) * mask.shape[1] > budget


def same(first: TokenBatches, second: TokenBatches) -> bool:
    return len(first) == len(second) and all(
        a.indices.tolist() == b.indices.tolist()
        and {k: v.tolist() for k, v in a.inputs.items()} == {k: v.tolist() for k, v in b.inputs.items()}
        for a, b in zip(first, second, strict=True)
    )


def test_truncation_by_hand(tokenizer: Any) -> None:
    # With [CLS] and [SEP]: 3, 5, 6 and 5 tokens ("abcd" is four pieces, "abc" three); two are exactly full.
    texts = ["a", "abc", "abcd", "a b c"]
    batches = tokenize(texts, tokenizer, max_length=5, batch_size=4)
    assert (batches.truncated, batches.n_tokens) == (1, 18)
    (batch,) = batches
    assert batch.indices.tolist() == [1, 2, 3, 0]
    piece = len("abcdefgh")
    assert batch.inputs["input_ids"].tolist() == [
        [CLS, A, B + piece, C + piece, SEP],
        [CLS, A, B + piece, C + piece, SEP],
        [CLS, A, B, C, SEP],
        [CLS, A, SEP, 0, 0],
    ]
    assert tokenize(texts, tokenizer, max_length=6).truncated == 0
    assert tokenize(texts, tokenizer, max_length=4).truncated == 3
    assert tokenize(texts, tokenizer, max_length=3).truncated == 3


def test_iterating_again_gives_the_same_and_shares_nothing(tokenizer: Any) -> None:
    texts = ["a b", "c", "d e f", "g h"]
    batches = tokenize(texts, tokenizer, batch_size=2)
    for batch in batches:
        batch.indices[:] = -1
        for tensor in batch.inputs.values():
            tensor.fill_(9)
    assert same(batches, tokenize(texts, tokenizer, batch_size=2))
    assert sorted(i for batch in batches for i in batch.indices.tolist()) == [0, 1, 2, 3]


def test_chunks_do_not_show(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join("abcdefgh"[: 1 + n % 8]) for n in range(50)]
    whole = tokenize(texts, tokenizer, max_length=7, batch_size=8)
    monkeypatch.setattr(corpus_module, "_CHUNK", 7)
    chunked = tokenize(texts, tokenizer, max_length=7, batch_size=8)
    assert same(whole, chunked)
    assert whole.truncated == chunked.truncated == sum(1 + n % 8 > 5 for n in range(50))


def test_a_corpus_and_its_texts_are_the_same(tokenizer: Any) -> None:
    corpus = read_corpus(["a b", "c", "d e f", "g h"])
    assert same(tokenize(corpus, tokenizer), tokenize(corpus.texts, tokenizer))


def test_padding_is_on_the_right_whatever_the_tokenizer_says(tokenizer: Any, own_tokenizer: Any) -> None:
    texts = ["a", "b c d"]
    own_tokenizer.padding_side = "left"
    assert same(tokenize(texts, own_tokenizer), tokenize(texts, tokenizer))
    assert own_tokenizer.padding_side == "left"


def test_the_tokenizers_own_padding_values_are_used(own_tokenizer: Any) -> None:
    own_tokenizer.pad_token = "[MASK]"  # noqa: S105
    own_tokenizer._pad_token_type_id = 3
    (batch,) = tokenize(["a", "b c"], own_tokenizer)
    assert batch.inputs["input_ids"].tolist() == [[CLS, B, C, SEP], [CLS, A, SEP, VOCABULARY.index("[MASK]")]]
    if own_tokenizer.is_fast:
        assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0], [0, 0, 0, 3]]


def pairs_of(firsts: list[str], seconds: list[str]) -> Corpus:
    return Corpus(tuple(firsts), "here", 0, 0, pairs=tuple(seconds))


FIRSTS, SECONDS = ["a b", "c", "d e f", "a b", "h"], ["c", "a", "g", "h", "c c c"]


def test_a_pair_is_neither_of_its_texts_nor_both_joined() -> None:
    pairs = pairs_of(FIRSTS, SECONDS)
    others = [
        pairs_of(SECONDS, FIRSTS),
        Corpus(tuple(FIRSTS), "here", 0, 0),
        *(Corpus(tuple(f"{a}{gap}{b}" for a, b in zip(FIRSTS, SECONDS, strict=True)), "", 0, 0) for gap in ("", " ")),
        # the place between the two counts
        pairs_of([f"{a} {b}"[:-1] for a, b in zip(FIRSTS, SECONDS, strict=True)], [b[-1] for b in SECONDS]),
    ]
    for other in others:
        assert other.hash != pairs.hash
        assert not np.isin(other.digests(), pairs.digests()).any()
    assert len(np.unique(pairs.digests())) == 5, "two pairs share their first text"
    order = [4, 2, 0, 3, 1]
    turned = pairs_of([FIRSTS[i] for i in order], [SECONDS[i] for i in order])
    assert turned.hash == pairs.hash
    assert turned.digests().tolist() == pairs.digests()[order].tolist()
    assert turned.entries(turned.order(5)) == pairs.entries(pairs.order(5))
    assert pairs.entries([3, 0]) == [("a b", "h"), ("a b", "c")]
    assert pairs.entries() == list(zip(FIRSTS, SECONDS, strict=True))
    assert others[1].entries([1]) == ["c"]
    assert read_corpus(pairs, limit=4) == pairs_of(FIRSTS[:4], SECONDS[:4])


def test_pairs_are_tokenised_as_the_tokenizer_does(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = pairs_of(FIRSTS, SECONDS)
    for max_length in (4, 6, 9):
        batches = tokenize(pairs, tokenizer, max_length=max_length, batch_size=2)
        assert same(batches, tokenize(pairs.entries(), tokenizer, max_length=max_length, batch_size=2))
        for batch in batches:
            # one by one, which even slow tokenizers can
            for row, text in enumerate(batch.indices):
                entry = tokenizer(FIRSTS[text], SECONDS[text], truncation=True, max_length=max_length)
                for name, tensor in batch.inputs.items():
                    if name in entry:
                        real = tensor[row, : len(entry["input_ids"])].tolist()
                        assert real == entry[name]
                        assert (tensor[row, len(real) :] == 0).all()
        lengths = [len(tokenizer(*pair)["input_ids"]) for pair in pairs.entries()]
        assert batches.truncated == sum(length > max_length for length in lengths)
    if tokenizer.is_fast:
        (batch,) = tokenize([("a b", "c")], tokenizer)
        assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]
    monkeypatch.setattr(corpus_module, "_CHUNK", 2)
    assert same(tokenize(pairs, tokenizer, batch_size=2), tokenize(pairs.entries(), tokenizer, batch_size=2))
    with pytest.raises(ValueError, match="max_length is 3, expected at least 4: the special tokens and one of the te"):
        tokenize(pairs, tokenizer, max_length=3)


def test_texts_and_pairs_do_not_mix(tokenizer: Any) -> None:
    for entries, sentence in (
        ([("a", "b"), "c"], "texts: entry 1 is a str, expected a pair of strings as the first one"),
        ([("a", "b"), ("a",)], "texts: entry 1 is a tuple, expected a pair of strings"),
        ([("a", "b", "c")], "texts: entry 0 is a tuple, expected a pair of strings"),
        ([("a", 1)], "texts: entry 0 is a tuple, expected a pair of strings"),
        (["a", ("a", "b")], "texts: entry 1 is a tuple, expected a str"),
    ):
        with pytest.raises(TypeError, match=sentence):
            tokenize(entries, tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="texts is empty, expected at least one text"):
        tokenize([], tokenizer)


def test_control_characters_leave_the_special_tokens(tokenizer: Any) -> None:
    (batch,) = tokenize(["\x01"], tokenizer)
    assert batch.inputs["input_ids"].tolist() == [[CLS, SEP]]


def test_tokenize_refusals(tokenizer: Any, own_tokenizer: Any) -> None:
    texts = ["a", "b"]
    for length in (2, 0, -1):
        with pytest.raises(ValueError, match=f"max_length is {length}, expected at least 3: the special tokens"):
            tokenize(texts, tokenizer, max_length=length)
    with pytest.raises(TypeError, match="max_length is a bool, expected an int"):
        tokenize(texts, tokenizer, max_length=True)
    with pytest.raises(ValueError, match="batch_size is 0, expected at least 1"):
        tokenize(texts, tokenizer, batch_size=0)
    with pytest.raises(TypeError, match="batch_size is a float"):
        tokenize(texts, tokenizer, batch_size=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="texts is empty, expected at least one text"):
        tokenize([], tokenizer)
    with pytest.raises(TypeError, match="texts is a str, expected a Corpus or a list"):
        tokenize("a", tokenizer)
    with pytest.raises(TypeError, match="texts is a generator, expected a Corpus or a list"):
        tokenize((t for t in texts), tokenizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="texts: entry 1 is an int, expected a str"):
        tokenize(["a", 1], tokenizer)  # type: ignore[list-item]
    with pytest.raises(
        TypeError, match=r"tokenizer is a str, expected a tokenizer of transformers; make one with Auto"
    ):
        tokenize(texts, "bert-base-uncased")
    own_tokenizer.model_max_length = 64
    assert tokenize(texts, own_tokenizer, max_length=64).max_length == 64
    with pytest.raises(ValueError, match="max_length is 65, expected at most 64, the tokenizer's model_max_l"):
        tokenize(texts, own_tokenizer, max_length=65)


def test_a_tokenizer_without_padding(own_tokenizer: Any) -> None:
    """Its end-of-text token or 0 fills the places that the attention mask covers."""
    import torch

    texts = ["a b", "abc", "a"]
    given = [batch.inputs for batch in tokenize(texts, own_tokenizer)]
    own_tokenizer.pad_token = None
    for end in (None, "[SEP]"):
        own_tokenizer.eos_token = end
        filled = 0 if end is None else own_tokenizer.sep_token_id
        for before, batch in zip(given, tokenize(texts, own_tokenizer), strict=True):
            assert torch.equal(batch.inputs["attention_mask"], before["attention_mask"])
            real = before["attention_mask"].bool()
            assert not real.all()
            assert torch.equal(batch.inputs["input_ids"], torch.where(real, before["input_ids"], filled))


def test_a_text_without_tokens() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2}, unk_token="[UNK]"))  # noqa: S106
    bare.pre_tokenizer = Whitespace()
    make: Callable[..., Any] = PreTrainedTokenizerFast
    plain = make(tokenizer_object=bare, pad_token="[PAD]", unk_token="[UNK]")  # noqa: S106
    assert [b.inputs["input_ids"].tolist() for b in tokenize(["a", "a b"], plain)] == [[[2, 1], [2, 0]]]
    with pytest.raises(ValueError, match="texts: entry 1 gives no token, expected at least one; leave that text out"):
        tokenize(["a", " "], plain)
