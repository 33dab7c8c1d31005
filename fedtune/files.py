"""Files of rows, read strictly: every row has the same columns and a column has one type.

What is wrong is told with the file and its line, and without quoting a row: the error of an
institution is read by the coordinator and its text must not be.
"""

import bisect
import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from fedtune.components import nearest
from fedtune.errors import RecipeError

MAX_CHARACTERS = 1_000_000  # of all texts of a row; more is a broken file rather than a text
KINDS = {
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def require(rows: Dataset, columns: Sequence[str], source: str) -> None:
    """Refuse rows without one of `columns`; `source` says in the message which rows these are.

    Raises:
        RecipeError: a column is missing.
    """
    for column in columns:
        if column not in rows.column_names:
            hint = nearest(column, rows.column_names)
            have = ", ".join(rows.column_names)
            raise RecipeError(f"{source} have no column '{column}'.{hint} They have: {have}.")


def base_folder() -> Path:
    """Where a recipe's relative paths begin: FEDTUNE_FOLDER, or the working directory."""
    return Path(os.environ.get("FEDTUNE_FOLDER") or Path.cwd()).absolute()


def _located(path: str | Path) -> Path:
    file = base_folder() / Path(path).expanduser()
    if file.is_dir():
        raise RecipeError(f"{file} is a folder; name a .jsonl, .csv or .parquet file.")
    if not file.exists():
        raise RecipeError(
            f"There is no file {file}. Correct the path; a relative one begins at {base_folder()}."
        )
    return file


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                # Excel marks UTF-8 with a byte order mark.
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{file}, line {number}: not UTF-8. Save the file with the encoding UTF-8."
        ) from error
    except OSError as error:
        raise RecipeError(f"Cannot read {file}: {error.strerror}.") from error


def _json_rows(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            where = f" (at character {error.pos + 1})" if hasattr(error, "pos") else ""
            raise RecipeError(
                f"{file}, line {number}: no JSON{where}; expected one object a line, as in "
                '{"text": "...", "label": "..."}.'
            ) from error
        if not isinstance(row, dict) or not row:
            kind = KINDS.get(type(row), "null") if row != {} else "an empty object"
            raise RecipeError(
                f"{file}, line {number}: {kind}; expected an object with columns, as in "
                '{"text": "...", "label": "..."}.'
            )
        yield number, row


def _header(file: Path, names: list[str]) -> list[str]:
    names = [name.strip() for name in names]
    for separator, called in ((";", "';'"), ("\t", "tabs")):
        if len(names) == 1 and separator in names[0]:
            raise RecipeError(
                f"{file}, line 1: columns separated by {called}; save it with commas."
            )
    numeric = [name for name in names if name.lstrip("+-").replace(".", "", 1).isdigit()]
    if numeric or "" in names or len(set(names)) < len(names) or max(map(len, names)) > 64:
        raise RecipeError(
            f"{file}, line 1: no header; expected the columns' names, all different, as in "
            "text,label. Add that line at the top."
        )
    return names


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    reader = csv.reader(_lines(file), strict=True)
    names: list[str] = []
    while True:
        number = reader.line_num + 1  # where the row begins: a quoted text may have several lines
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise RecipeError(
                f"{file}, line {number}: no CSV row ({error}). Expected commas between fields and "
                "double quotes around a text that has commas, quotes or line breaks."
            ) from error
        if fields is None:
            return
        if not any(fields):
            continue
        if not names:
            names = _header(file, fields)
        elif len(fields) != len(names):
            raise RecipeError(
                f"{file}, line {number}: {len(fields)} fields; the header has {len(names)}. "
                "Put double quotes around a text that has commas."
            )
        else:
            yield number, dict(zip(names, fields, strict=True))


def _characters(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _too_long(file: Path, where: str, characters: int) -> RecipeError:
    return RecipeError(
        f"{file}, {where}: {characters:,} characters; at most {MAX_CHARACTERS:,} are read in a "
        "row. Cut the text, or look for a missing line break or quote."
    )


def _no_rows(file: Path) -> RecipeError:
    return RecipeError(f"{file} has no rows; expected at least one.")


def _collected(file: Path, rows: Iterable[tuple[int, dict[str, object]]]) -> Dataset:
    columns: dict[str, list[object]] = {}
    kinds: dict[str, tuple[str, int]] = {}  # of a column, and the line that first showed it
    numbers: list[int] = []
    for number, row in rows:
        columns = columns or {name: [] for name in row}
        if row.keys() != columns.keys():
            _refuse_columns(file, numbers[0], columns.keys(), number, row.keys())
        if (characters := _characters(row)) > MAX_CHARACTERS:
            raise _too_long(file, f"line {number}", characters)
        numbers.append(number)
        for name, value in row.items():
            columns[name].append(value)
            if value is None:  # a gap; whoever needs the column refuses it
                continue
            kind = KINDS[type(value)]
            first, line = kinds.setdefault(name, (kind, number))
            if kind != first:
                raise RecipeError(
                    f"{file}, line {number}: column '{name}' is {kind}, but {first} in line "
                    f"{line}. Write it the same way in every row."
                )
    if not numbers:
        raise _no_rows(file)
    for name, values in columns.items():
        if not _fits_arrow(values):
            # The shortest beginning that does not fit ends with the row to blame.
            count = bisect.bisect_left(
                range(len(values)), True, key=lambda n: not _fits_arrow(values[: n + 1])
            )
            raise RecipeError(
                f"{file}, line {numbers[count]}: column '{name}' holds a value that does not fit "
                "the rows above it: another type inside a list or object, a number beyond 64 bits "
                "or half a character (\\ud800). Correct that value."
            )
    return Dataset.from_dict(columns)


def _fits_arrow(values: list[object]) -> bool:
    try:
        pa.array(values)
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def _refuse_columns(
    file: Path, first: int, columns: Iterable[str], number: int, found: Iterable[str]
) -> None:
    missing, extra = sorted({*columns} - {*found}), sorted({*found} - {*columns})
    if missing:
        fault = f"{file}, line {number}: column '{missing[0]}' is missing, which line {first} has."
        hint = nearest(missing[0], extra)
    else:
        fault = f"{file}, line {first}: column '{extra[0]}' is missing, which line {number} has."
        hint = ""
    raise RecipeError(f"{fault}{hint} Give every row the same columns.")


def read_jsonl(path: str | Path) -> Dataset:
    """The rows of a file with one JSON object a line; blank lines are passed over.

    Raises:
        RecipeError: no such file, or a line that is not as its neighbours are.
    """
    file = _located(path)
    return _collected(file, _json_rows(file))


def read_csv(path: str | Path) -> Dataset:
    """The rows of a comma-separated file with a header; every value is text.

    Types are not guessed: a label column of digits would else be numbers at one institution and
    text at the next.

    Raises:
        RecipeError: no such file, no header, or a row with more or fewer fields.
    """
    file = _located(path)
    limit = csv.field_size_limit(MAX_CHARACTERS)
    try:
        return _collected(file, _csv_rows(file))
    finally:
        csv.field_size_limit(limit)


def read_parquet(path: str | Path) -> Dataset:
    """The rows of a Parquet file.

    Raises:
        RecipeError: no such file, no Parquet, or no rows.
    """
    file = _located(path)
    try:
        table = pq.ParquetFile(file).read()
        for place, field in enumerate(table.schema):
            if pa.types.is_dictionary(field.type):  # pandas' categories; datasets knows only values
                values = table.column(place).cast(field.type.value_type)
                table = table.set_column(place, field.name, values)
        rows = Dataset(table)
    except (pa.ArrowException, OSError, ValueError, NotImplementedError) as error:
        raise RecipeError(
            f"{file} cannot be read as Parquet ({type(error).__name__}). Write it again, with "
            "pandas' to_parquet for instance, or use .jsonl."
        ) from error
    if not len(rows):
        raise _no_rows(file)
    texts = [c for c in table.columns if pa.types.is_string(c.type) or _is_large(c.type)]
    characters = sum(pc.fill_null(pc.utf8_length(column), 0).to_numpy() for column in texts)
    if texts and characters.max() > MAX_CHARACTERS:
        row = int(characters.argmax())
        raise _too_long(file, f"row {row + 1}", int(characters[row]))
    return rows


def _is_large(kind: pa.DataType) -> bool:
    return bool(pa.types.is_large_string(kind))


READERS: dict[str, Callable[[str | Path], Dataset]] = {
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def read_file(path: str | Path) -> Dataset:
    """The rows of a .jsonl, .csv or .parquet file.

    Raises:
        RecipeError: another extension, no such file, or a row that is wrong.
    """
    extension = Path(path).suffix.lower()
    if extension not in READERS:
        file = _located(path)
        raise RecipeError(f"{file}: files end in {', '.join(READERS)}, not '{extension}'.")
    return READERS[extension](path)
