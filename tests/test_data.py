"""Sources read what is there, and tell the line of what is wrong."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from fedtune.components import build
from fedtune.data import SOURCES, Csv, Jsonl, Parquet
from fedtune.errors import RecipeError
from fedtune.files import (
    MAX_CHARACTERS,
    read_csv,
    read_file,
    read_jsonl,
    read_parquet,
    require,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
GOOD = '{"text": "where is my parcel", "label": "status"}\n'


def written(folder: Path, content: str | bytes, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def refusal(file: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        read_file(file)
    assert str(file) in str(caught.value)
    return str(caught.value)


@given(
    st.lists(
        st.fixed_dictionaries({"text": TEXT, "n": st.integers(-(2**63), 2**63 - 1)}), min_size=1
    )
)
def test_jsonl_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]
) -> None:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read_jsonl(file).to_list() == rows


@given(st.lists(st.fixed_dictionaries({"text": TEXT.filter(bool), "label": TEXT}), min_size=1))
def test_csv_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]
) -> None:
    """Line breaks, commas and quotes inside a text included; every value stays text."""
    file = tmp_path_factory.mktemp("rows") / "rows.csv"
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", "label"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    assert read_csv(file).to_list() == rows


def test_csv_does_not_guess_types(tmp_path: Path) -> None:
    file = written(tmp_path, "text,label\na,01\nb,2\n", "rows.csv")
    assert list(read_csv(file)["label"]) == ["01", "2"]


def test_parquet_round_trip(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert read_file(tmp_path / "rows.parquet").to_list() == rows


def test_parquet_reads_pandas_categories_as_their_values(tmp_path: Path) -> None:
    table = pa.table({"label": pa.array(["x", "y", "x"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert list(read_parquet(tmp_path / "rows.parquet")["label"]) == ["x", "y", "x"]


def test_parquet_takes_no_columns_from_folder_names(tmp_path: Path) -> None:
    (tmp_path / "client=north").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "client=north" / "rows.parquet")
    assert read_file(tmp_path / "client=north" / "rows.parquet").column_names == ["text"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_byte_order_mark_and_windows_line_ends_are_no_part_of_the_rows(
    tmp_path: Path, name: str
) -> None:
    content = GOOD if name.endswith("jsonl") else "text,label\nwhere is my parcel,status\n"
    file = written(tmp_path, b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode(), name)
    assert read_file(file).to_list() == [{"text": "where is my parcel", "label": "status"}]


def test_blank_lines_count_but_hold_no_rows(tmp_path: Path) -> None:
    assert len(read_file(written(tmp_path, f"\n{GOOD}\n \n{GOOD}\n"))) == 2
    assert "line 4" in refusal(written(tmp_path, f"\n{GOOD}\n[1]\n"))


BAD_JSONL: dict[str, tuple[str | bytes, list[str]]] = {
    "no json": (GOOD * 2 + "{text: 1}\n", ["line 3", "no JSON", "object"]),
    "cut off": (GOOD + '{"text": "a', ["line 2", "no JSON"]),
    "deep": (GOOD + "[" * 100_000, ["line 2", "no JSON"]),
    "a list": (GOOD * 3 + '["a"]\n', ["line 4", "a list", "object"]),
    "null": (GOOD + "null\n", ["line 2", "null"]),
    "text": (GOOD + '"text"\n', ["line 2", "text"]),
    "no columns": (GOOD + "{}\n", ["line 2", "empty object"]),
    "utf-8": (GOOD.encode() * 4 + b'{"text": "caf\xe9", "label": "x"}\n', ["line 5", "UTF-8"]),
    "utf-16": (GOOD.encode("utf-16"), ["line 1", "UTF-8"]),
    "missing": (GOOD * 2 + '{"text": "a"}\n', ["line 3", "'label' is missing", "line 1 has"]),
    "missing first": ('{"text": "a"}\n' + GOOD, ["line 1", "'label' is missing", "line 2 has"]),
    "misspelt": (
        GOOD + '{"text": "a", "lable": "b"}\n',
        ["line 2", "'label' is missing", "Did you mean 'lable'"],
    ),
    "mixed": (GOOD * 2 + '{"text": "a", "label": 3}\n', ["line 3", "'label'", "number", "text in"]),
    "boolean": (
        '{"a": 1}\n{"a": true}\n',
        ["line 2", "'a'", "true or false", "a number in line 1"],
    ),
    "inside": ('{"a": [1]}\n{"a": [2]}\n\n{"a": ["x"]}\n{"a": [1]}\n', ["line 4", "'a'"]),
    "beyond 64 bits": ('{"a": 1}\n{"a": 2}\n{"a": 9223372036854775808}\n', ["line 3", "64 bits"]),
    "half a character": (
        GOOD + '{"text": "\\ud800", "label": "x"}\n',
        ["line 2", "'text'", "half"],
    ),
    "empty": ("", ["no rows"]),
    "blank": (" \n\n", ["no rows"]),
}


@pytest.mark.parametrize("case", BAD_JSONL)
def test_bad_jsonl_is_refused_with_its_line(tmp_path: Path, case: str) -> None:
    content, expected = BAD_JSONL[case]
    message = refusal(written(tmp_path, content))
    assert all(part in message for part in expected), message


BAD_CSV: dict[str, tuple[str | bytes, list[str]]] = {
    "empty": ("", ["no rows"]),
    "header only": ("text,label\n", ["no rows"]),
    "numbers": ("12,0\nabc,1\n", ["line 1", "no header"]),
    "twice": ("text,text\na,b\n", ["line 1", "no header"]),
    "nameless": ("text,\na,b\n", ["line 1", "no header"]),
    "a text": (f"{'where is my parcel ' * 9},status\na,b\n", ["line 1", "no header"]),
    "semicolons": ("text;label\na;b\n", ["line 1", "';'", "commas"]),
    "tabs": ("text\tlabel\na\tb\n", ["line 1", "tabs"]),
    "short": ("text,label\na,b\n\nc\n", ["line 4", "1 fields", "2"]),
    "long": ('text,label\n"two\nlines",b\na,b,c\n', ["line 4", "3 fields", "2"]),
    "open quote": ('text,label\na,b\n"c,d\ne,f\n', ["line 3", "quotes"]),
    "after quote": ('text,label\n"a"b,c\n', ["line 2", "quotes"]),
    "utf-8": (b"text,label\na,b\ncaf\xe9,c\n", ["line 3", "UTF-8"]),
    "huge": (f"text,label\na,b\n{'x' * (MAX_CHARACTERS + 1)},c\n", ["line 3", "1000000"]),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_bad_csv_is_refused_with_its_line(tmp_path: Path, case: str) -> None:
    content, expected = BAD_CSV[case]
    before = csv.field_size_limit()
    message = refusal(written(tmp_path, content, "rows.csv"))
    assert all(part in message for part in expected), message
    assert csv.field_size_limit() == before  # another library's limit is left as it was


def test_bad_parquet_is_refused(tmp_path: Path) -> None:
    assert "Parquet" in refusal(written(tmp_path, "PAR1 no more than that", "a.parquet"))
    assert "Parquet" in refusal(written(tmp_path, "", "b.parquet"))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    assert "no rows" in refusal(tmp_path / "c.parquet")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_a_row_may_have_a_million_characters_and_no_more(tmp_path: Path, name: str) -> None:
    def save(length: int) -> Path:
        rows = Dataset.from_dict({"text": ["a", "b" * (length - 1)], "label": ["x", "y"]})
        file = tmp_path / name
        if name.endswith("jsonl"):
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif name.endswith("csv"):
            file.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
        else:
            rows.to_parquet(file)
        return file

    assert len(read_file(save(MAX_CHARACTERS))) == 2
    where = "line 3" if name.endswith("csv") else "row 2" if name.endswith("parquet") else "line 2"
    message = refusal(save(MAX_CHARACTERS + 1))
    assert where in message
    assert "1,000,001" in message


@pytest.mark.parametrize("content", [case[0] for case in BAD_JSONL.values()])
def test_no_message_quotes_a_row(tmp_path: Path, content: str | bytes) -> None:
    """An institution's errors are read by the coordinator; its text must not be."""
    secret = b"where is my parcel"
    raw = content if isinstance(content, bytes) else content.encode()
    message = refusal(written(tmp_path, raw.replace(b': "a"', b': "' + secret + b'"')))
    assert secret.decode() not in message


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no file" in refusal(tmp_path / "none.jsonl")
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    assert "is a folder" in refusal(folder)
    assert ".jsonl, .csv, .parquet" in refusal(written(tmp_path, "a", "rows.xlsx"))
    monkeypatch.setenv("FEDTUNE_FOLDER", str(tmp_path / "elsewhere"))
    with pytest.raises(RecipeError, match=r"elsewhere/none\.jsonl"):
        read_file("none.jsonl")


def test_relative_paths_begin_at_fedtune_folder_or_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    written(tmp_path, GOOD * 2)
    written(tmp_path / "here", GOOD)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("FEDTUNE_FOLDER", raising=False)
    assert len(Jsonl("rows.jsonl").load().train) == 1
    monkeypatch.setenv("FEDTUNE_FOLDER", str(tmp_path))
    assert len(Jsonl("rows.jsonl").load().train) == 2


def test_one_row_is_enough_to_read(tmp_path: Path) -> None:
    assert len(read_file(written(tmp_path, GOOD))) == 1


def test_file_sources_have_test_rows_only_where_a_file_is_named(tmp_path: Path) -> None:
    jsonl = written(tmp_path, GOOD)
    table = written(tmp_path, "text,label\na,b\n", "rows.csv")
    read_jsonl(jsonl).to_parquet(tmp_path / "rows.parquet")
    for source, file in ((Jsonl, jsonl), (Csv, table), (Parquet, tmp_path / "rows.parquet")):
        assert source(str(file)).load().test is None
        both = source(str(file), test=str(file)).load()
        assert both.test is not None
        assert both.test.to_list() == both.train.to_list()


def test_every_source_is_built_from_recipe_text() -> None:
    texts = {
        "quickstart": "quickstart(language='en')",
        "docstrings": "docstrings(packages='rich', kind='class', largest=3, limit=10)",
        "jsonl": "jsonl(train='a.jsonl')",
        "csv": "csv(train='a.csv', test='b.csv')",
        "parquet": "parquet(train='a.parquet')",
        "hub": "hub(path='a/b', config='c', revision='main', split='train', test_split='test')",
    }
    assert texts.keys() == SOURCES.keys()
    for name, text in texts.items():
        assert type(build(text, SOURCES, "data.source")) is SOURCES[name]
    with pytest.raises(RecipeError, match="kind must be one of"):
        build("docstrings(kind='method')", SOURCES, "data.source")
    with pytest.raises(RecipeError, match="at least 1"):
        build("docstrings(limit=0)", SOURCES, "data.source")


def test_hub_offline_says_what_was_wanted_and_what_to_do() -> None:
    """The suite runs with HF_HUB_OFFLINE=1."""
    source = build("hub(path='fedtune/none', config='c', split='dev')", SOURCES, "data.source")
    with pytest.raises(RecipeError) as caught:
        source.load()
    for part in ("'dev'", "'fedtune/none'", "'c'", "'main'", "HF_HUB_OFFLINE=1", "jsonl(train="):
        assert part in str(caught.value)


def test_hub_reads_a_folder_as_the_hub_lays_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for split, count in (("train", 3), ("test", 1)):
        written(folder, GOOD * count, f"{split}.jsonl")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = build(f"hub(path='{folder}', test_split='test')", SOURCES, "data.source").load()
    assert rows.test is not None
    assert (len(rows.train), len(rows.test)) == (3, 1)
    assert build(f"hub(path='{folder}')", SOURCES, "data.source").load().test is None
    with pytest.raises(RecipeError, match="'dev'"):
        build(f"hub(path='{folder}', split='dev')", SOURCES, "data.source").load()


def test_quickstart_holds_the_corpus() -> None:
    corpus = pytest.importorskip("fedtune.corpus")
    rows = build("quickstart", SOURCES, "data.source").load()
    assert rows.test is not None
    train, test = corpus.rows("en")
    assert rows.train.to_list() == list(train)
    assert rows.test.to_list() == list(test)
    assert {*rows.train.column_names} == {"text", "label", "client"}


def test_require_names_the_missing_column_and_a_near_one() -> None:
    rows = Dataset.from_dict({"text": ["a"], "labels": ["b"]})
    require(rows, ["text"], "The rows")
    with pytest.raises(RecipeError) as caught:
        require(rows, ["text", "label"], "The rows of north")
    for part in ("rows of north", "'label'", "Did you mean 'labels'?", "text, labels"):
        assert part in str(caught.value)


def test_a_limit_keeps_the_same_rows_always_and_every_test_row(tmp_path: Path) -> None:
    rows = "".join(f'{{"text": "t{n}", "label": "{n // 25}"}}\n' for n in range(100))
    file = written(tmp_path, rows)

    def kept(limit: int) -> list[str]:
        loaded = Jsonl(str(file), str(file), limit).load()
        assert loaded.test is not None
        assert len(loaded.test) == 100
        return list(loaded.train["text"])

    assert kept(0) == kept(100) == kept(1000) == [f"t{n}" for n in range(100)]
    few = kept(40)
    assert few == kept(40)
    assert len(set(few)) == 40
    assert few == sorted(few, key=lambda text: int(text[1:]))  # in the file's order
    assert {int(text[1:]) // 25 for text in few} == {0, 1, 2, 3}  # and not its beginning
    with pytest.raises(RecipeError, match="limit must be at least 0"):
        build("jsonl(train='a.jsonl', limit=-1)", SOURCES, "data.source")
