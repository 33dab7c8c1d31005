"""The ServerApp: reads the run-config, builds a Coordinator, runs it."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune import page, parts, report
from fedtune.config import Experiment
from server.coordinator import Coordinator

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the recipe's strategy and its references, then write the report.

    The launcher may name other arms in the ServerApp's own node-config ("arms"), when it runs them
    in several processes; "" is the recipe's own strategy.
    """
    experiment = Experiment.from_flat(context.run_config)
    if not experiment.name:
        experiment = experiment.replace(name=f"run-{context.run_id}")
    everything = ["", *parts.reference_names(experiment)]
    chosen = context.node_config.get("arms")
    for arm in everything if chosen is None else str(chosen).split(","):
        Coordinator(experiment, arm, grid).run()
    if chosen is None:
        folder = parts.folder_of(experiment)
        page.write(report.read(folder), folder / "report.html")
