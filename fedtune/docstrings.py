"""Docstrings of installed packages: real text whose owners really differ, on every machine.

Files are parsed, never imported. Each row is the first paragraph of one docstring, and its client
is the distribution that wrote it. Parsing thousands of files takes seconds, so the rows are kept as
JSONL in the cache folder, under the packages' names, versions and the parameters.
"""

import ast
import functools
import hashlib
import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

from fedtune.cache import cache_folder
from fedtune.components import nearest
from fedtune.errors import RecipeError
from fedtune.seeds import seed_of

KINDS = ("all", "module", "class", "function")
FORMAT = 1  # of the rows; another number makes old caches unused
SHORTEST = 20  # characters
SURPLUS = 4  # docstrings looked at for each row kept, so that rows come from many files
# Tests, and code of other owners that was copied in.
PASSED_OVER = re.compile(
    r"(^|/)(tests?|testing|conftest\.py|test_[^/]*|[^/]*_test\.py|_?vendor(ed)?|third_party)(/|$)"
)
PARAMETER = re.compile(r"\S+ ?\(`|\S+ : |\S+: `")  # the first of a list of parameters
MARKUP = (">>>", "..", ":", "@", "#", "<", "{", "[", "|", "+-", "--", "==", "$ ")

Row = dict[str, str]


def canonical(name: str) -> str:
    """A distribution's name as the package index compares it: Ruamel.Yaml is ruamel-yaml."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, Distribution]:
    """The installed distributions by canonical name; the first on the path counts, as for Python.

    A distribution whose metadata are damaged has no name and is left out.
    """
    found: dict[str, Distribution] = {}
    for distribution in distributions():
        if name := distribution.metadata["Name"]:
            found.setdefault(canonical(name), distribution)
    return dict(sorted(found.items()))


def sources(distribution: Distribution) -> dict[str, Path]:
    """The Python files of a distribution by module path, without tests and vendored code."""
    files = {}
    for file in distribution.files or ():
        inside = file.as_posix()
        if file.suffix == ".py" and ".." not in file.parts and not PASSED_OVER.search(inside):
            files[inside] = Path(str(distribution.locate_file(file)))
    return {inside: path for inside, path in sorted(files.items()) if path.is_file()}


def _most(found: Mapping[str, Distribution], largest: int) -> list[str]:
    """The packages with the most triple quotes: counting them is a hundred times faster."""
    counts = {
        name: sum(path.read_bytes().count(b'"""') for path in sources(distribution).values())
        for name, distribution in found.items()
    }
    return sorted(counts, key=lambda name: (-counts[name], name))[:largest]


def paragraph(docstring: str) -> str:
    """The first paragraph on one line, or "" where it is too short or no text."""
    text = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    letters = sum(character.isalpha() or character == " " for character in text)
    if text.startswith(MARKUP) or PARAMETER.match(text) or not text.isprintable():
        return ""
    return text if len(text) >= SHORTEST and letters >= 0.7 * len(text) else ""


def _walk(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[Row]:
    kinds = {ast.Module: "module", ast.ClassDef: "class"}
    if text := paragraph(ast.get_docstring(node) or ""):
        yield {"name": name, "kind": kinds.get(type(node), "function"), "text": text}
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _walk(child, f"{name}.{child.name}")


def of_file(path: Path, inside: str) -> list[Row]:
    """The rows of one file: its module, classes, functions and methods, in the file's order.

    A file that is no Python of this version (a template, Python 2) has none.
    """
    module = inside.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's escapes, \d without r""
        try:
            tree = ast.parse(path.read_bytes())
            return list(_walk(tree, module))
        except (SyntaxError, ValueError, RecursionError):
            return []


def of_package(name: str, distribution: Distribution, kind: str, limit: int) -> list[Row]:
    """At most `limit` rows of a package, the same on every machine with the same version.

    Files are looked at in an order keyed by their names until there is a surplus of rows; those
    kept are then drawn by their own names.
    """
    files = sources(distribution)
    rows: dict[str, Row] = {}
    for inside in sorted(files, key=functools.partial(seed_of, "docstrings", name)):
        for row in of_file(files[inside], inside):
            if kind in ("all", row["kind"]):
                rows.setdefault(row["text"], row)
        if len(rows) >= SURPLUS * limit:
            break
    kept = sorted(rows.values(), key=lambda row: seed_of("docstrings", row["name"], row["text"]))
    return [
        {"client": name, **row}
        for row in sorted(kept[:limit], key=lambda r: (r["name"], r["text"]))
    ]


def harvest(
    found: Mapping[str, Distribution], packages: Sequence[str], kind: str, limit: int
) -> list[Row]:
    """The rows of several packages; a text that two of them have stays with the first.

    Raises:
        RecipeError: a package has no docstrings.
    """
    rows: dict[str, Row] = {}
    for name in sorted(packages):
        own = of_package(name, found[name], kind, limit)
        if not own:
            of_kind = "" if kind == "all" else f" of kind '{kind}'"
            raise RecipeError(
                f"data.source: package '{name}' has no docstrings{of_kind} that could be read from "
                "its .py files. Choose another package."
            )
        for row in own:
            rows.setdefault(row["text"], row)
    return list(rows.values())


def cached(packages: Sequence[str], kind: str, largest: int, limit: int) -> Path:
    """The JSONL file of these rows, made if it is not there.

    Raises:
        RecipeError: a package is not installed or has no docstrings, or the cache is not writable.
    """
    found = installed()
    wanted = sorted({canonical(name) for name in packages})
    for name in wanted:
        if name not in found:
            raise RecipeError(
                f"data.source: package '{name}' is not installed.{nearest(name, found)} "
                f"Install it, or choose from: {', '.join(found)}."
            )
    versions = {name: found[name].version for name in wanted or found}
    key = json.dumps([FORMAT, versions, kind, 0 if wanted else largest, limit])
    file = cache_folder() / f"docstrings-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"
    if not file.exists():
        rows = harvest(found, wanted or _most(found, largest), kind, limit)
        _write(file, rows)
    return file


def _write(file: Path, rows: Sequence[Row]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, suffix=".part", delete=False
        ) as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path(stream.name).replace(file)  # whole or not at all, whoever else writes it too
    except OSError as error:
        raise RecipeError(
            f"Cannot write {file} ({error.strerror}). Set FEDTUNE_CACHE to a folder that can be "
            "written."
        ) from error
