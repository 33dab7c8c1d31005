"""FedTune through its public API only: `fedtune.run(Experiment, engine=...)`.

Rounds are timed by what FedTune logs, from the beginning of a round to that of the next: this
includes writing the checkpoint, which the field `seconds` of rounds.jsonl does not. With the option
`profile` the second round is profiled, in one process.
"""

import cProfile
import itertools
import json
import logging
import time
from pathlib import Path
from typing import Any

from competitors.job import Job, Result, SkippedError, main

TARGETS = {"classification": "query,value", "causal_lm": "q_proj,v_proj"}


class _Clock(logging.Handler):
    """When each round began and when the last was committed, told by FedTune's log."""

    def __init__(self, profiled: int) -> None:
        super().__init__()
        self.began: dict[int, float] = {}
        self.ended = 0.0
        self.profile = cProfile.Profile() if profiled else None
        self.profiled = profiled

    def emit(self, record: logging.LogRecord) -> None:
        event: dict[str, Any] = getattr(record, "event", {})
        if event.get("event") == "round":
            self.began[event["round"]] = time.time()
            if self.profile and event["round"] == self.profiled:
                self.profile.enable()
        elif event.get("event") == "committed" and event["record"].round > 0:
            self.ended = time.time()
            if self.profile and event["record"].round == self.profiled:
                self.profile.disable()

    def rounds(self) -> list[float]:
        """Seconds of each round."""
        stamps = [self.began[number] for number in sorted(self.began)] + [self.ended]
        return [after - before for before, after in itertools.pairwise(stamps)]


def experiment_of(job: Job) -> Any:
    """The job as a FedTune experiment."""
    from fedtune import Experiment

    layers: dict[str, Any] = {}
    if job.top_layers:
        if "adapter.layers" not in Experiment().flat():
            raise SkippedError("this FedTune has no recipe key adapter.layers")
        layers["adapter__layers"] = f"top:{job.top_layers}"
    return Experiment().replace(
        name="benchmark",
        output=str(Path(job.folder, "runs")),
        rounds=job.rounds,
        task=job.task,
        model__name=job.model,
        model__dtype=job.dtype,
        model__device=job.device,
        model__max_length=job.max_length,
        adapter__rank=8,
        adapter__alpha=16.0,
        adapter__target_modules=TARGETS[job.task],
        data__source=f"jsonl(train='{job.train}', test='{job.test}')",
        data__partition="by_column(column='client')",
        data__minimum=1,
        train__learning_rate=job.learning_rate,
        train__batch_size=job.batch_size,
        train__group_by_length=bool(job.options.get("grouped", False)),
        evaluation__every=job.rounds,
        **layers,
    )


def compete(job: Job) -> Result:
    """Run the experiment."""
    experiment = experiment_of(job)
    profiled = min(2, job.rounds) if job.options.get("profile") else 0
    clock = _Clock(profiled)
    log = logging.getLogger("fedtune")
    log.setLevel(logging.INFO)
    log.addHandler(clock)

    import fedtune

    wanted: dict[str, Any] = {"engine": job.options["engine"], "overwrite": True}
    if job.options["engine"] == "batched":
        wanted["workers"] = 1 if profiled else job.processes
    fedtune.run(experiment, **wanted)
    folder = Path(experiment.output, experiment.name)
    lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    loss, count = _ratio(last["train"].values(), "loss")
    # A language model's loss is counted by its tokens but the first of a row.
    rows = count if job.task == "classification" else count // (job.max_length - 1)
    if last["rejected"]:
        raise RuntimeError(f"replies were set aside: {last['rejected']}")
    tests = last["evaluation"]["own"].values()
    more: dict[str, Any] = {"workers": wanted.get("workers", 1)}
    if clock.profile:
        from competitors import profile

        more["profile"] = profile.summary(clock.profile)
    if job.device == "cuda":
        import torch

        more["device_bytes"] = torch.cuda.max_memory_allocated()
    accuracy = _ratio(tests, "accuracy")[0] if job.task == "classification" else 0.0
    test_loss = _ratio(tests, "loss")[0]
    return Result(clock.began[1], clock.rounds(), rows, loss, test_loss, accuracy, more)


def _ratio(clients: Any, metric: str) -> tuple[float, int]:
    """(the mean, over how many rows)."""
    totals = [client[metric] for client in clients]
    count = sum(total[1] for total in totals)
    return sum(total[0] for total in totals) / count, int(count)


if __name__ == "__main__":
    main(compete)
