"""Where all competitors begin: FedTune's own initial adapter and head, before a measurement.

With the same start, rows and steps the training losses must agree, which is the check that the
work was equal. The tensors are what FedTune saves of a run at a learning rate of nearly zero, on
one row of each label.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

from competitors import fedtune_run
from competitors.job import Job

NEARLY_ZERO = 1e-30


def main(job: Job, target: Path) -> None:
    """Write the tensors, under the names of a PEFT folder."""
    lines = Path(job.train).read_text(encoding="utf-8").splitlines()
    rows = {json.loads(line)["label"]: json.loads(line) for line in lines}
    text = "".join(json.dumps({**row, "client": "one"}) + "\n" for row in rows.values())
    path = Path(job.folder, "few.jsonl")
    path.write_text(text, encoding="utf-8")
    few = dataclasses.replace(job, train=str(path), test=str(path), rounds=1, batch_size=64)
    experiment = fedtune_run.experiment_of(few).replace(train__learning_rate=NEARLY_ZERO)

    import fedtune

    fedtune.run(experiment, overwrite=True)
    saved = Path(experiment.output, experiment.name, "adapter", "adapter_model.safetensors")
    shutil.copy(saved, target)


if __name__ == "__main__":
    main(Job.read(sys.argv[1]), Path(sys.argv[2]))
