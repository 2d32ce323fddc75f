import gzip
import json
import logging
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from align_jax.data.sources import load_records
from align_jax.errors import DataError

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(30)]
BROKEN = '{"prompt": "a", "completion" "b"}'


def load(source, **arguments):
    return load_records(source, kind="sft", **arguments)


def contents(records):
    return [{"prompt": r["prompt"], "completion": r["completion"]} for r in records]


def test_importing_the_package_loads_numpy_only():
    code = (
        "import sys;"
        "from align_jax.data import batching, builtin, dataset, loader, records, sources, tokenise;"
        "heavy = {'jax', 'transformers', 'datasets', 'tensorflow_datasets'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    root = pathlib.Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "lines.json"])
def test_json_lines(write_jsonl, name):
    path = write_jsonl(ROWS, name)
    records = load(path)
    assert contents(records) == ROWS
    assert records[16]["where"] == f"{path}:17"
    assert load(path, limit=3) == records[:3]


@pytest.mark.parametrize("name", ["array.json", "array.json.gz"])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_arrays_know_their_lines(tmp_path, name, indent):
    text = "\n" + json.dumps(ROWS, indent=indent)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    records = load(str(path))
    assert contents(records) == ROWS
    for record in records[::7]:
        line = int(record["where"].rsplit(":", 1)[1])
        expected = text[: text.index(json.dumps(record["prompt"]))].count("\n") + 1
        assert line == (expected - 1 if indent else expected)


def test_blank_lines_and_a_byte_order_mark_are_no_records(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode(), b"", json.dumps(ROWS[1]).encode()]
    path.write_bytes(b"\r\n".join([*lines, b""]))
    assert [r["where"].rsplit(":", 1)[1] for r in load(str(path))] == ["1", "3"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (BROKEN, r":17: broken JSON: .* column 30"),
        ('{"prompt": "a"', r":17: broken JSON"),
        ("[" * 100_000, r":17: "),
        ("3", r":17: found int 3, expected an object"),
        ({"prompt": "a"}, r":17: field 'completion' is missing"),
        ({"prompt": "a", "completion": 4}, r":17: field 'completion': found int 4"),
        ({"prompt": "a", "completoin": "b"}, r":17: .*did you mean 'completoin'"),
    ],
)
@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_a_bad_row_17_is_named(write_jsonl, name, row, expected):
    path = write_jsonl([*ROWS[:16], row, *ROWS[17:]], name)
    with pytest.raises(DataError, match=f"{path}{expected}"):
        load(path)
    assert contents(load(path, limit=16)) == ROWS[:16]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[\n{"prompt": "a", "completion": "b"},\n{"prompt"\n]', ":4: broken JSON"),
        ('[\n{"prompt": "a", "completion": "b"},\n{"prompt": "a"}\n]', ":3: field 'completion'"),
        ('[{"prompt": "a", "completion": "b"}] x', ":1: broken JSON: Extra data"),
        ('"text"', ": found str, expected an array"),
        ("[]", ": the data set is empty"),
        (" \n", ": the data set is empty"),
    ],
)
def test_bad_arrays(tmp_path, text, expected):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"{path}{expected}"):
        load(str(path))


def test_invalid_records_can_be_left_out_but_broken_files_cannot(write_jsonl, caplog):
    path = write_jsonl([*ROWS[:2], {"prompt": "a"}, *ROWS[2:]])
    with caplog.at_level(logging.WARNING):
        records = load(path, invalid="drop")
    assert contents(records) == ROWS
    assert f"1 of 31 records of {path} are invalid; the first: {path}:3: field" in caplog.text
    assert contents(load(path, invalid="drop", limit=3)) == ROWS[:3]
    with pytest.raises(DataError, match="2 of 2 records .* are invalid"):
        load(write_jsonl([{"prompt": "a"}] * 2), invalid="drop")
    with pytest.raises(DataError, match=":2: broken JSON"):
        load(write_jsonl([ROWS[0], BROKEN]), invalid="drop")
    with pytest.raises(DataError, match="data.invalid is 'skip'"):
        load(path, invalid="skip")


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.jsonl.gz", "empty.json"])
def test_an_empty_data_set(write_jsonl, name):
    path = write_jsonl([], name)
    with pytest.raises(DataError, match=f"{path}: the data set is empty"):
        load(path)


def test_text_that_is_not_utf_8(tmp_path):
    path = tmp_path / "data.jsonl"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(good + b'\n{"prompt": "\xe9t\xe9"}\n')
    with pytest.raises(DataError, match=f"{path}:2: not UTF-8: byte 0xe9 at column 13"):
        load(str(path))
    path.write_bytes(gzip.compress(good))
    with pytest.raises(DataError, match=":1: not UTF-8.*must be named .gz"):
        load(str(path))


def test_damaged_gzip_files(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    rows = [
        {"prompt": str(np.random.default_rng(i).bytes(40)), "completion": ""} for i in range(99)
    ]
    whole = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    for keep in (len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:keep])
        with pytest.raises(DataError, match=f"{path}: is cut short.*fetch it again"):
            load(str(path))
    path.write_bytes(json.dumps(ROWS[0]).encode())
    with pytest.raises(DataError, match=f"{path}: is no sound gzip file"):
        load(str(path))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    path.write_bytes(flipped)
    with pytest.raises(DataError, match="data.jsonl.gz"):
        load(str(path))


def test_a_wrong_path_says_what_is_near(write_jsonl, tmp_path):
    path = pathlib.Path(write_jsonl(ROWS, "pairs.jsonl.gz"))
    with pytest.raises(DataError, match=f"no such file; did you mean '{path}'"):
        load(str(tmp_path / "pair.jsonl.gz"))
    with pytest.raises(DataError, match=f"no such file; {tmp_path} holds pairs.jsonl.gz"):
        load(str(tmp_path / "zzz"))
    with pytest.raises(DataError, match=f"directory is missing too; {tmp_path} is there"):
        load(str(tmp_path / "a" / "b" / "pairs.jsonl"))
    with pytest.raises(DataError, match="is a directory.*holds pairs.jsonl.gz.*write hf:"):
        load(str(tmp_path))
    (tmp_path / "pairs.csv").write_text("a,b")
    with pytest.raises(DataError, match="unknown type of file.*jsonl.gz"):
        load(str(tmp_path / "pairs.csv"))
    with pytest.raises(DataError, match="no kind of source is called 'hub:'.*hf:, tfds:, builtin:"):
        load("hub:someone/data")
    with pytest.raises(DataError, match="limit is 0"):
        load(str(path), limit=0)


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(module.config, "HF_HUB_OFFLINE", True)
    module.disable_progress_bars()
    return module


def test_huggingface_directories(datasets, tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    splits = datasets.DatasetDict({"train": table, "test": table.select(range(5))})
    splits.save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "parquet").mkdir()
    table.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    (tmp_path / "lines").mkdir()
    table.to_json(str(tmp_path / "lines" / "train.jsonl"))
    for name in ("one", "splits", "parquet", "lines"):
        records = load(f"hf:{tmp_path}/{name}")
        assert contents(records) == ROWS
        assert records[17]["where"] == f"hf:{tmp_path}/{name}: row 17"
    assert contents(load(f"hf:{tmp_path}/splits#test", limit=2)) == ROWS[:2]
    assert len(load(f"hf:{tmp_path}/parquet#train[:20%]")) == 6
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        load(f"hf:{tmp_path}/splits#dev")
    with pytest.raises(DataError, match="`datasets` cannot load it: .*dev"):
        load(f"hf:{tmp_path}/parquet#dev")
    with pytest.raises(DataError, match=f"no such directory; did you mean '{tmp_path}/splits'"):
        load(f"hf:{tmp_path}/split")
    with pytest.raises(DataError, match="is a file; expected a directory"):
        load(f"hf:{tmp_path}/lines/train.jsonl")
    datasets.Dataset.from_list([{"question": "a"}]).save_to_disk(str(tmp_path / "wrong"))
    with pytest.raises(DataError, match="wrong: row 0: none of messages .* is there"):
        load(f"hf:{tmp_path}/wrong")


def test_huggingface_names_and_configs(datasets, monkeypatch):
    calls = []

    def load_dataset(path, name=None, split=None):
        calls.append((path, name, split))
        if path == "nobody/nothing":
            raise ConnectionError("cannot reach the hub\nand more")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert contents(load("hf:someone/data@config#test")) == ROWS
    assert contents(load("hf:someone/data")) == ROWS
    assert calls == [("someone/data", "config", "test"), ("someone/data", None, "train")]
    with pytest.raises(
        DataError, match="hf:nobody/nothing: .*cannot load it: cannot reach the hub$"
    ):
        load("hf:nobody/nothing")


def test_tfds(monkeypatch):
    rows = [
        {"prompt": b"caf\xc3\xa9", "completion": np.str_("b")},
        {"messages": {"role": np.array([b"user", b"assistant"]), "content": ["q", b"a"]}},
    ]

    def data_source(name, split):
        if name != "made":
            raise ValueError("not found")
        assert split == "test"
        return rows

    module = types.SimpleNamespace(data_source=data_source)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    records = load("tfds:made#test")
    assert records[0]["prompt"] == "café"
    assert [m["role"] for m in records[1]["messages"]] == ["user", "assistant"]
    assert records[1]["where"] == "tfds:made#test: row 1"
    with pytest.raises(DataError, match="tfds:other: `tfds` cannot load it: not found"):
        load("tfds:other")
    rows.append({"prompt": b"\xff", "completion": b""})
    with pytest.raises(DataError, match="row 2: not UTF-8"):
        load("tfds:made#test")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match="needs the package tensorflow-datasets"):
        load("tfds:made")


QUESTIONS = [
    {"question": f"How much is {i} + 1?", "answer": f"So:\n#### {i + 1}"} for i in range(5)
]


@pytest.mark.parametrize("name", ["train.jsonl.gz", "a:b=c.json"])
def test_fields_of_other_names(write_jsonl, name):
    path = write_jsonl(QUESTIONS, name)
    records = load_records(f"{path}:prompt=question", kind="prompt")
    assert records[2] == {
        "prompt": "How much is 2 + 1?",
        "answer": "So:\n#### 3",
        "where": f"{path}:3",
    }
    both = load(f"{path}:prompt=question,completion=answer", limit=2)
    assert contents(both)[1] == {"prompt": "How much is 1 + 1?", "completion": "So:\n#### 2"}
    with pytest.raises(DataError, match="'prompt' is missing.*did you mean 'question'"):
        load_records(path, kind="prompt")


def test_a_string_becomes_the_message_of_a_role(write_jsonl):
    path = write_jsonl(QUESTIONS)
    prompt = [{"role": "user", "content": "How much is 2 + 1?"}]
    assert load_records(f"{path}:prompt=question@user", kind="prompt")[2]["prompt"] == prompt
    both = load(f"{path}:prompt=question@user,completion=answer@assistant")
    answer = [{"role": "assistant", "content": "So:\n#### 3"}]
    assert contents(both)[2] == {"prompt": prompt, "completion": answer}
    path = write_jsonl([{"prompt": prompt}], "chat.jsonl")
    with pytest.raises(DataError, match="chat.jsonl:1: field 'prompt': found list, .*@user"):
        load_records(f"{path}:prompt=prompt@user", kind="prompt")


def test_fields_that_change_places(write_jsonl):
    path = write_jsonl([{"prompt": "p", "chosen": "worse", "rejected": "better"}])
    record = load_records(f"{path}:chosen=rejected,rejected=chosen", kind="preference")[0]
    assert (record["chosen"], record["rejected"]) == ("better", "worse")


def test_fields_of_saved_data_sets_are_renamed_behind_the_split(tmp_path):
    import datasets

    datasets.DatasetDict({"test": datasets.Dataset.from_list(QUESTIONS)}).save_to_disk(tmp_path)
    records = load_records(f"hf:{tmp_path}#test:prompt=question", kind="prompt")
    assert [record["prompt"] for record in records] == [row["question"] for row in QUESTIONS]
    assert records[1]["where"] == f"hf:{tmp_path}#test: row 1"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("promt=question", "kind 'prompt' has no field 'promt'; did you mean 'prompt'"),
        (
            "completion=answer",
            "kind 'prompt' has no field 'completion'; it has answer, prompt, saf",
        ),
        ("prompt=question,prompt=answer", "field 'prompt' is renamed twice"),
        ("prompt=querstion", "data.jsonl:1: field 'querstion' is missing, .* as 'prompt'"),
        ("prompt=question@human", "no role 'human'; expected one of system, developer, user"),
        ("prompt=", "no such file"),
    ],
)
def test_wrong_names_of_fields(write_jsonl, fields, message):
    path = write_jsonl(QUESTIONS)
    with pytest.raises(DataError, match=message):
        load_records(f"{path}:{fields}", kind="prompt")
