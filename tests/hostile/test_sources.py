"""Files and sources of records, through `load_records`: read to an error, never to a hang."""

import errno
import gzip
import json
import os
import zlib

import pytest

from align_jax.data.builtin import load_builtin, review_openings
from align_jax.data.loader import Loader
from align_jax.data.sources import load_records
from tests.hostile.rows import rows

GOOD = b'{"prompt": "p", "completion": "a"}\n'
DEEP = b'{"prompt": ' + b"[" * 100_000


def gz(content, keep=None):
    return gzip.compress(content)[:keep]


# Name of the file, its bytes, what the message must name beside the file.
FILES = [
    ("a.jsonl", b"", ("is empty",)),
    ("a.jsonl", b"\xef\xbb\xbf", ("is empty",)),
    ("a.jsonl", b"\n\r\n \n", ("is empty",)),
    ("a.json", b"", ("is empty",)),
    ("a.json", b"[]", ("is empty",)),
    ("a.jsonl.gz", gz(b""), ("is empty",)),
    ("a.jsonl", GOOD + b"\x00" * 64, (":2", "broken JSON")),
    ("a.jsonl", GOOD + GOOD[:-5], (":2", "broken JSON")),
    ("a.jsonl", GOOD + b"nonsense\n", (":2", "broken JSON")),
    ("a.jsonl", GOOD * 2 + b'{"prompt": "\x1b[2J"}\n', (":3", "broken JSON")),
    ("a.jsonl", b'{"prompt": "\xff"}\n', (":1", "not UTF-8", "0xff")),
    ("a.jsonl", GOOD.decode().encode("utf-16"), (":1", "not UTF-8")),
    ("a.jsonl", b"\xed\xa0\x80" + GOOD, (":1", "not UTF-8")),
    ("a.jsonl", b"[" + GOOD.strip() + b"]", (":1", "list", ".json")),
    ("a.jsonl", GOOD.strip() + b"," + GOOD, (":1", "broken JSON")),
    ("a.jsonl", GOOD.strip() + b"\r" + GOOD, (":1", "broken JSON")),
    ("a.jsonl", b"3\n", (":1", "int 3")),
    ("a.jsonl", b"NaN\n", (":1", "float nan")),
    ("a.jsonl", b"null\n", (":1", "NoneType")),
    ("a.jsonl", b"1" * 5000, (":1", "broken JSON", "digits")),
    ("a.jsonl", b'{"prompt": "p", "completion": ' + b"1" * 5000 + b"}", (":1", "digits")),
    ("a.json", b'[{"prompt": ' + b"1" * 5000 + b"}]", ("a.json", "digits")),
    ("a.jsonl", DEEP, (":1", "nested too deeply")),
    ("a.jsonl", GOOD + DEEP.replace(b"[", b'{"a":'), (":2", "nested too deeply")),
    ("a.json", b"[" * 100_000, ("nested too deeply",)),
    ("a.json", b'{"a":' * 100_000, ("nested too deeply",)),
    ("a.jsonl", b'{"prompt": "p", "completion": "a", "prompt": "q"}', (":1", "'prompt'", "twice")),
    ("a.jsonl", GOOD + b'{"text": "p", "meta": {"k": 1, "k": 2}}', (":2", "'k'", "twice")),
    ("a.json", b"[\n" + GOOD + b',{"text": "a", "text": "b"}]', (":3", "'text'", "twice")),
    ("a.json", b"[" + GOOD, ("broken JSON",)),
    ("a.json", b'"text"', ("str", "an array")),
    ("a.json", b"3", ("int", "an array")),
    ("a.json", b"[3]", (":1", "int 3")),
    ("a.jsonl", b'{"text": "\\ud800"}', (":1", "'text'", r"\ud800")),
    ("a.jsonl", b'{"text\\ud800": "a"}', (":1", r"\ud800")),
    ("a.jsonl", b'{"text": NaN}', (":1", "'text'", "nan")),
    ("a.jsonl.gz", GOOD, ("no sound gzip",)),
    ("a.jsonl.gz", b"\x1f\x8b", ("cut short",)),
    ("a.jsonl.gz", gz(GOOD * 99, -9), ("cut short",)),
    ("a.jsonl.gz", gz(GOOD * 99, 12), ("cut short",)),
    ("a.jsonl.gz", gz(gz(GOOD)), (":1", "not UTF-8")),
    ("a.jsonl.gz", gz(GOOD) + b"rubbish", ("no sound gzip",)),
    ("a.jsonl", gz(GOOD), (":1", "not UTF-8", ".gz")),
    ("a.jsonl.gz", zlib.compress(GOOD), ("no sound gzip",)),
    ("a.csv", GOOD, ("unknown type of file", ".jsonl")),
    ("a.pkl", b"\x80\x04K\x01.", ("unknown type of file",)),
    ("a.parquet", b"PAR1", ("unknown type of file", "hf:")),
]


@rows("name, content, names", FILES)
def test_a_bad_file(refused, tmp_path, name, content, names):
    path = tmp_path / name
    path.write_bytes(content)
    refused(lambda: load_records(str(path), kind="sft"), str(path), *names)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize("line", [b" " * 2**20, GOOD.replace(b"a", b"a" * 2**20)])
def test_a_gzip_bomb(refused, tmp_path, name, line):
    """70 MiB and more out of some 100 kB, in one line or in many."""
    path = tmp_path / name
    squeeze = zlib.compressobj(9, wbits=31)
    content = b"".join(squeeze.compress(line) for _ in range(2**27 // len(line)))
    path.write_bytes(content + squeeze.flush())
    refused(lambda: load_records(str(path), kind="sft"), str(path), "times its size", "gunzip")


def special(folder, kind):
    path = folder / "a.jsonl"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "terminal":
        path.symlink_to("/dev/tty")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(folder / "gone.jsonl")
    elif kind == "below a file":
        (folder / "file").write_bytes(GOOD)
        path = folder / "file" / "a.jsonl"
    elif kind == "long":
        path = folder / f"{'a' * 300}.jsonl"
    return path


@rows(
    "kind, names",
    [
        ("directory", ("is a directory",)),
        ("fifo", ("a pipe", "a regular file")),
        ("device", ("a device", "a regular file")),
        ("terminal", ("a device", "a regular file")),
        ("loop", ("a link", "nowhere")),
        ("dangling", ("a link", "gone.jsonl")),
        ("below a file", ("no such file",)),
        ("long", ("no such file",)),
        ("missing", ("no such file",)),
    ],
)
def test_a_path_that_is_no_file(refused, tmp_path, kind, names):
    path = special(tmp_path, kind)
    refused(lambda: load_records(str(path), kind="sft"), str(path), *names)


def test_a_file_that_may_not_be_read(refused, tmp_path, unprivileged):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    path.chmod(0)
    with unprivileged():
        refused(lambda: load_records(str(path), kind="sft"), str(path), "Permission denied")


def test_a_directory_that_may_not_be_read(refused, tmp_path, unprivileged):
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(GOOD)
    folder.chmod(0)
    with unprivileged():
        refused(lambda: load_records(str(folder / "a.jsonl"), kind="sft"), str(folder))
        refused(lambda: load_records(str(folder), kind="sft"), str(folder))
    folder.chmod(0o700)


def test_a_read_that_fails(refused, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)

    def broken(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("builtins.open", broken)
    refused(lambda: load_records(str(path), kind="sft"), str(path), "Input/output error")


# Sources that name no file.
SOURCES = [
    ("", ("no source",)),
    (".", ("is a directory",)),
    ("\x00", ("no such file",)),
    ("a\x1b[2J.jsonl", ("no such file",)),
    ("hub:a", ("'hub:'", "hf:")),
    ("builtin:", ("no built-in data set ''", "tiny_sft")),
    ("builtin:tiny", ("'tiny'", "tiny_sft")),
    ("builtin:tiny_sft#test", ("no split 'test'", "train")),
    ("builtin:arithmetic#x", ("no split 'x'", "held_out")),
    ("hf:", ("hf:", "name of a data set")),
    ("hf:./nowhere", ("no such directory",)),
    ("tfds:", ("tfds:",)),
    (":prompt=question", ("no source",)),
    ("builtin:tiny_sft:promt=a", ("'promt'", "'prompt'")),
    ("builtin:tiny_sft:prompt=a,prompt=b", ("'prompt'", "twice")),
    ("builtin:tiny_sft:prompt=prompt@human", ("'human'", "user")),
    ("builtin:tiny_sft:prompt=nothing", ("'nothing'", "missing")),
]


@rows("source, names", SOURCES)
def test_a_bad_source(refused, source, names):
    refused(lambda: load_records(source, kind="sft"), *names)


@rows(
    "arguments, names",
    [
        ({"kind": "sfx"}, ("'sfx'", "preference")),
        ({"kind": "sft", "limit": 0}, ("limit is 0",)),
        ({"kind": "sft", "limit": -1}, ("limit is -1",)),
        ({"kind": "sft", "invalid": "skip"}, ("data.invalid is 'skip'",)),
        ({"kind": "preference"}, ("row 0", "'chosen' and 'rejected'")),
        ({"kind": "preference", "invalid": "drop"}, ("128 of 128",)),
    ],
)
def test_bad_arguments(refused, arguments, names):
    refused(lambda: load_records("builtin:tiny_sft", **arguments), *names)


@rows(
    "call, names",
    [
        (lambda: review_openings("train", 10**9), ("1984", "1000000000")),
        (lambda: review_openings("train", -1), ("-1",)),
        (lambda: review_openings("tests", 1), ("'tests'", "held_out")),
        (lambda: load_builtin("a" * 10**6), ("no built-in data set", "tiny_sft")),
        (lambda: Loader([], batch_size=1, seed=0, collate=list), ("0 examples",)),
        (lambda: Loader([1], batch_size=0, seed=0, collate=list), ("batch_size is 0",)),
        (lambda: Loader([1], batch_size=10**12, seed=0, collate=list), ("batch_size",)),
        (
            lambda: next(Loader([1], batch_size=1, seed=0, collate=list).batches(prefetch=0)),
            ("prefetch is 0",),
        ),
        (
            lambda: next(Loader([1], batch_size=1, seed=0, collate=list).batches(-1)),
            ("example index is -1",),
        ),
    ],
)
def test_what_is_built_in_and_the_loader(refused, call, names):
    refused(call, *names)


def test_a_good_file_is_still_read(tmp_path):
    line = {"prompt": "p\x00 \N{GRINNING FACE} \u202e", "completion": "a" * 2**21}
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(line).encode() + b"\r\n" + GOOD.strip())
    assert load_records(str(path), kind="sft")[0] == line | {"where": f"{path}:1"}
