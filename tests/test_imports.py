"""The import rules of the architecture, read from the source with `ast`."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for top in ("fedtune", "clients", "server") for p in (ROOT / top).rglob("*.py"))
# Who may be imported by whom: a module imports only from layers before its own.
LAYERS = [
    {"allocator", "errors"},
    {"adapter", "cache", "components", "packing", "records", "seeds"},
    {"config", "lowrank", "processes"},
    {"combine", "cores", "corpus", "docstrings", "files"},
    {"dealing"},
    {"cohorts", "data", "optimizers", "partitions", "strategies", "tasks"},
    {"privacy"},
    {"aggregation", "prefix", "shards", "tokens"},
    {"adapted", "attacks", "bases", "composition", "heads", "models", "wire", "parts"},
    {"per_example"},
    {"products", "training", "trunk", "report"},
    {"resident", "stacked", "exporting", "planning", "progress", "tables"},
    {"vectorized"},
    {"audits"},
    {"page", "page_audits", "page_style", "page_template", "pages"},
    {"flower", "launch"},
    {"studies"},
    {"cli"},
]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def outside(allowed: set[str], package: str) -> list[str]:
    """Files that import `package` without being among `allowed` (paths or top folders)."""
    return [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(name.split(".")[0] == package for name in imports(path))
        and not any(str(path.relative_to(ROOT)).startswith(prefix) for prefix in allowed)
    ]


def test_there_are_sources() -> None:
    assert len(SOURCES) > 30


def test_only_wire_clients_and_server_know_flower() -> None:
    assert outside({"fedtune/wire.py", "clients/", "server/"}, "flwr") == []


def test_only_models_what_writes_them_and_tasks_know_transformers_and_peft() -> None:
    allowed = {
        "fedtune/adapted.py",
        "fedtune/bases.py",
        "fedtune/exporting.py",
        "fedtune/models.py",
        "fedtune/tasks/",
        "fedtune/trunk.py",
    }
    assert outside(allowed, "transformers") == []
    assert outside(allowed, "peft") == []


def test_clients_and_server_meet_in_messages_only() -> None:
    # Audits play both sides: a client's message, a coordinator's release.
    played = {"clients/", "fedtune/launch.py", "fedtune/audits/payloads.py"}
    assert outside(played, "clients") == []
    assert outside({"server/", "fedtune/launch.py", "fedtune/audits/paths.py"}, "server") == []


def test_strategies_know_adapters_and_the_experiment_only() -> None:
    allowed = {"adapter", "config", "cores", "errors", "combine", "lowrank", "seeds", "strategies"}
    for path in (ROOT / "fedtune" / "strategies").glob("*.py"):
        own = {name.split(".")[1] for name in imports(path) if name.startswith("fedtune.")}
        assert own <= allowed, path


def test_imports_go_down() -> None:
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    for path in (ROOT / "fedtune").rglob("*.py"):
        own = path.relative_to(ROOT / "fedtune").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in layer, f"{own} is in no layer"
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "fedtune" and len(parts) > 1 and parts[1] != own and parts[1] in layer:
                assert layer[parts[1]] <= layer[own], f"{own} imports {parts[1]}"
