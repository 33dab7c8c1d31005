"""pfl-research (`pfl` on PyPI) with the same PEFT model: see pfl_app.py.

This is the starter: several processes are started as its documentation says, by torchrun, and
reduce through torch.distributed.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

from competitors.job import Job, Result, SkippedError, main


def compete(job: Job) -> Result:
    """Run all rounds, in one process or in several."""
    if importlib.util.find_spec("pfl") is None:
        raise SkippedError("pfl is not installed: pip install 'fedtune[bench]'")
    folder = Path(job.folder)
    job.write(folder / "pfl.json")
    command = [sys.executable]
    if job.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(job.processes)]
    command += ["-m", "competitors.pfl_app"]
    subprocess.run([*command, str(folder / "pfl.json"), str(folder / "result.json")], check=True)
    return Result.read(folder / "result.json")


if __name__ == "__main__":
    main(compete)
