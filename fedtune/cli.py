"""The command line: `fedtune run | compare | plan | list | report | export | audit | keys`.

Errors are for the person who must act: one line, exit code 2 for a recipe or usage, 1 for a failed
    run, and a traceback only with --debug. With --json, standard output is one JSON value.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedtune.components import signature
from fedtune.config import Experiment
from fedtune.errors import FedTuneError, RecipeError

app = typer.Typer(
    help="Fine-tune language models across private text, without pooling a row of it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(
    help="A client's identity key for secure aggregation, and its line in everybody's roster.",
    no_args_is_help=True,
)
app.add_typer(keys, name="keys")
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Recipe = Annotated[Path, typer.Argument(help="A recipe, a TOML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value, as in train.learning_rate=1e-3", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
RunFolder = Annotated[Path, typer.Argument(help="A run's folder, runs/NAME.", show_default=False)]


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    engine: Annotated[
        str, typer.Option(help="batched, sequential, ray, or a SuperLink connection's name.")
    ] = "batched",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on, or show the result of a finished run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run's folder first.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=0, help="Worker processes, 0: as many as cores or GPUs.")
    ] = 0,
    threads: Annotated[
        int, typer.Option(min=1, help="torch threads of each process; may change the last bits.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Run a recipe to its end; the same command again goes on after an interruption."""
    experiment = Experiment.load(recipe, overrides or ())
    # torch and transformers take seconds to import; a wrong recipe is told before that.
    from fedtune import launch, parts
    from fedtune.progress import ProgressHandler

    with ProgressHandler(err if as_json else out, experiment.strategy):
        done = launch.run(
            experiment,
            engine=engine,
            resume=resume,
            overwrite=overwrite,
            workers=workers,
            threads=threads,
        )
    _show(done, parts.folder_of(experiment), as_json)


def _show(done: Any, folder: Path, as_json: bool) -> None:
    from fedtune import report, tables

    result = report.result(done)
    if as_json:
        _print_json({"folder": str(folder), **result.to_json()})
        return
    for table in [*tables.of_result(result), *tables.of_aggregation(done.records)]:
        out.print(table)
    out.print(f"\n{result.verdict}")
    out.print(f"Adapter: {folder / 'adapter'}   Report: {folder / 'report.html'}", soft_wrap=True)


@app.command()
def compare(
    study: Annotated[
        Path, typer.Argument(help="A study, or a recipe with the options.", show_default=False)
    ],
    overrides: Overrides = None,
    strategies: Annotated[
        str, typer.Option(help="Instead of the study's: fedit,ffa_lora.", show_default=False)
    ] = "",
    seeds: Annotated[
        str, typer.Option(help="Instead of the study's: 0-4 or 0,1,7.", show_default=False)
    ] = "",
    baseline: Annotated[
        str, typer.Option(help="The arm that others are compared with.", show_default=False)
    ] = "",
    output: Annotated[
        str, typer.Option(help="The folder of all studies and runs.", show_default=False)
    ] = "",
    workers: Annotated[
        int, typer.Option(min=0, help="Cells at a time, 0: as many as cores or GPUs.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Run a study's grid of strategies and seeds, then compare; the same command again goes on."""
    from fedtune.studies import comparing, study_file
    from fedtune.studies import files as comparison_files
    from fedtune.studies.progress import StudyProgress

    given = [*(overrides or ()), *([f"output={output}"] if output else [])]
    asked = study_file.load(study, given, strategies, seeds, baseline)
    with StudyProgress(err if as_json else out) as view:
        done = comparing.compare(asked, view, workers)
    paths = comparison_files.write(done, asked.folder)
    if as_json:
        sys.stdout.write(done.to_json() + "\n")
    else:
        _show_comparison(done, paths)
    if done.failures:
        err.print(
            f"error: {len(done.failures)} cells have no result; {asked.folder}/comparison.md says "
            "why. The same command tries them again.",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(1)


def _show_comparison(done: Any, paths: list[Path]) -> None:
    from fedtune import tables
    from fedtune.report import human_time
    from fedtune.studies import tables as comparison_tables

    for title, table in comparison_tables.terminal(done):
        out.print(tables.titled(title, table))
    found = len(done.seeds)
    out.print(
        f"\n{done.cells} cells, {human_time(done.seconds)} of their time. Differences are paired "
        f"by seed; p: paired t over {found} seed{'s' if found > 1 else ''}, Holm over all "
        "strategies. comparison.md has every table and how the numbers were made."
    )
    out.print("\n".join(map(str, paths)), markup=False, soft_wrap=True)


@app.command()
def plan(recipe: Recipe, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show the resolved recipe and what it will cost; loads no weights."""
    experiment = Experiment.load(recipe, overrides or ())
    from fedtune import planning, tables
    from fedtune.report import human_bytes

    cost = planning.forecast(experiment)
    if as_json:
        _print_json(planning.as_json(cost, experiment))
        return
    out.print(experiment.text(), markup=False, soft_wrap=True)
    table = Table(show_header=False, box=None, pad_edge=False)
    trainable = ", ".join(f"{n:,} ({group})" for group, n in cost.trainable.items())
    up, down = human_bytes(cost.bytes_up), human_bytes(cost.bytes_down)
    for key, value in (
        ("run", experiment.run_id),
        ("clients", f"{cost.clients:,}"),
        ("rows", f"{cost.examples:,} to train on, {cost.test_examples:,} to test on"),
        ("classes", f"{cost.classes:,}" if cost.classes else "none"),
        ("frozen parameters", f"{cost.base_parameters:,}"),
        ("trainable parameters", trainable),
        ("tokens a row", f"{cost.tokens:.1f} on average, {cost.truncated:.1%} of rows cut"),
        ("padding in batches", f"{cost.padding:.1%}, computed by --engine sequential only"),
        ("frozen layers", _frozen(cost)),
        ("a client and round", f"{down} down, {up} up"),
        ("all rounds", human_bytes(cost.bytes_total)),
        ("memory (estimate)", human_bytes(cost.memory_bytes)),
        ("time (estimate)", f"{cost.seconds:.0f} s on one CPU thread, references not counted"),
    ):
        table.add_row(key, value)
    out.print(table)
    if cost.mix:
        out.print(tables.mix_table(cost.mix))
    if cost.privacy:
        out.print(tables.privacy_table(cost.privacy))


def _frozen(cost: Any) -> str:
    """What `plan` says of the layers below the first adapter."""
    from fedtune.report import human_bytes

    if not cost.frozen_layers:
        return "none below the first adapter"
    sizes = [human_bytes(n) for n in (cost.kept_bytes, cost.cached_bytes, cost.cache_bytes)]
    return (
        f"{cost.frozen_layers}, computed once a row: {sizes[0]} kept; {sizes[1]} of {sizes[2]} used"
    )


@app.command(name="list")
def list_(
    kind: Annotated[
        str, typer.Argument(help="Of one kind: strategies, combine ...", show_default=False)
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List strategies, tasks, sources, partitions, cohorts: whatever a recipe can name."""
    from fedtune import tables
    from fedtune.parts import REGISTRIES

    chosen = "strategy" if kind == "strategies" else kind.removesuffix("s")
    if kind and chosen not in REGISTRIES and kind not in REGISTRIES:
        raise RecipeError(f"Nothing is called '{kind}' here. Kinds: {', '.join(REGISTRIES)}.")
    listed = {
        key: {
            name: {"parameters": signature(part), "about": _first_line(part)}
            for name, part in registry.items()
        }
        for key, registry in REGISTRIES.items()
        if key in (chosen, kind) or not kind
    }
    if as_json:
        _print_json(listed)
        return
    for key, registry in listed.items():
        table = Table(box=None, pad_edge=False)
        table.add_column("name", no_wrap=True)
        table.add_column("what it is")
        for name, about in registry.items():
            parameters = f"\n[dim]{about['parameters']}[/dim]" if about["parameters"] else ""
            table.add_row(name, f"{about['about']}{parameters}")
        out.print(tables.titled(key, table))


def _first_line(part: type) -> str:
    return (part.__doc__ or "").strip().splitlines()[0]


@app.command()
def report(folder: RunFolder, as_json: AsJson = False) -> None:
    """Show a run's tables and write its report.html again."""
    from fedtune import page
    from fedtune import report as reports

    found = reports.read(folder)
    page.write(found, folder / "report.html")
    _show(found, folder, as_json)


@app.command()
def audit(
    folder: RunFolder,
    only: Annotated[
        str, typer.Option(help="Some of them: mechanism,tokens.", show_default=False)
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Attack a finished run, and set what leaks beside what its ledger claims.

    Exit code 1: a claim is broken.
    """
    from fedtune import page
    from fedtune import report as reports
    from fedtune.audits import auditing, kept, shown
    from fedtune.audits.audited import open_run
    from fedtune.audits.finding import BROKEN

    names = auditing.chosen(only)
    audited = open_run(folder)
    found = []
    with err.status("") as status:
        for name in names:
            status.update(f"auditing: {name}")
            found += auditing.audit(audited, [name])
    page.write(reports.read(folder), folder / "report.html")
    if as_json:
        _print_json([finding.to_json() for finding in found])
    else:
        for table in shown.tables(found):
            out.print(table)
        out.print(f"\nWrote {folder / kept.FILE} and {folder / 'report.html'}", soft_wrap=True)
    broken = [finding.audit for finding in found if finding.verdict == BROKEN]
    if broken:
        err.print(f"error: what {folder} claims is broken by: {', '.join(broken)}.", markup=False)
        raise typer.Exit(1)


@app.command()
def export(
    folder: RunFolder,
    target: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole model, the adapter merged into it.")
    ] = False,
) -> None:
    """Copy a run's adapter as a PEFT folder, or merge it into a full model."""
    from fedtune.exporting import export as export_

    export_(folder, target, merge=merge)
    out.print(f"Wrote {target}", soft_wrap=True)


KeyFile = Annotated[Path, typer.Argument(help="NAME.key, a file.", show_default=False)]


@keys.command("new")
def keys_new(path: KeyFile) -> None:
    """Make the key of client NAME in NAME.key, which stays there, and print its roster line."""
    from fedtune.privacy import identity

    out.print(identity.line_of(path.stem, identity.new_key(path)), soft_wrap=True, markup=False)


@keys.command("show")
def keys_show(path: KeyFile) -> None:
    """Print the roster line of the client NAME whose key is in NAME.key."""
    from fedtune.privacy import identity

    out.print(identity.line_of(path.stem, identity.read_key(path)), soft_wrap=True, markup=False)


privacy = typer.Typer(help="What a run has promised, checked.", no_args_is_help=True)
app.add_typer(privacy, name="privacy")


@privacy.command()
def verify(folder: RunFolder, as_json: AsJson = False) -> None:
    """Recompute epsilon from a run's ledger and check its chain, signatures and rounds."""
    from fedtune.privacy import certificate, verifying

    verified = verifying.verify(folder)
    made = certificate.of(folder, verified)
    if as_json:
        _print_json(made)
        return
    out.print(f"The ledger holds: {len(verified.lines)} lines, key {made['ledger']['public_key']}.")
    out.print(made["statement"], soft_wrap=True)


@privacy.command(name="report")
def privacy_report(folder: RunFolder, as_json: AsJson = False) -> None:
    """Write a run's privacy certificate, privacy.md and privacy.json, into its folder."""
    from fedtune.privacy import certificate, verifying

    made = certificate.of(folder, verifying.verify(folder))
    text = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
    (folder / "privacy.json").write_text(text, encoding="utf-8")
    (folder / "privacy.md").write_text(certificate.markdown(made), encoding="utf-8")
    if as_json:
        _print_json(made)
        return
    out.print(certificate.markdown(made), markup=False, soft_wrap=True)
    out.print(f"Wrote {folder / 'privacy.md'} and {folder / 'privacy.json'}", soft_wrap=True)


def guarded(command: Callable[[], None], debug: bool) -> int:
    """Run a command; print a FedTuneError as one line and return its exit code."""
    try:
        command()
    except FedTuneError as error:
        if debug:
            raise
        err.print(f"error: {error}", markup=False, soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        err.print("Interrupted. The same command again goes on from the last committed round.")
        return 130
    except OSError as error:
        if debug:
            raise
        err.print(f"error: {error}", markup=False, soft_wrap=True)
        return 1
    return 0


def main() -> None:
    """The entry point; `--debug` anywhere shows tracebacks."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR)
    logging.getLogger("fedtune").propagate = debug
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(guarded(lambda: app(args=arguments, standalone_mode=True), debug))


if __name__ == "__main__":
    main()
