"""Cut the sample corpus from the table of 20,000 Wikipedia sentences described in README.md.

    python examples/make_sample.py sentences.tsv.gz examples/wikipedia-2500.tsv.gz

The table is shuffled, so its first rows are a random sample. The gzip header holds neither a time nor a name:
the same input gives the same file with the same zlib.
"""

from __future__ import annotations

import argparse
import gzip
from itertools import islice
from pathlib import Path

SOURCES = ("qnli", "wikisplit", "wt2")  # all CC BY-SA


def cut(table: Path, sample: Path, rows: int) -> int:
    """Write the header and the first `rows` rows of `table` with a source in `SOURCES`; returns how many."""
    with gzip.open(table, "rt", encoding="utf-8", newline="\n") as lines:
        header = next(lines)
        kept = list(islice((line for line in lines if line.split("\t")[0] in SOURCES), rows))
    with sample.open("wb") as file, gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=0) as stream:
        stream.write("".join([header, *kept]).encode())
    return len(kept)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="gzip table with the columns source and sentence")
    parser.add_argument("sample", type=Path, help="file to write")
    parser.add_argument("--rows", type=int, default=2500)
    arguments = parser.parse_args()
    print(cut(arguments.table, arguments.sample, arguments.rows), "rows")
