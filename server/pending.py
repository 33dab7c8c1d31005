"""What secure aggregation must not lose in a crash: the attempt's number, and a sum yet masked."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune.errors import RunError
from fedtune.privacy.letters import RefusedError, body_of, read
from fedtune.privacy.masks import Words
from fedtune.privacy.unmasking import Pending
from server import checkpoint


@dataclass(frozen=True)
class Kept:
    """A sum that has been signed for and not been opened, or opened and not committed."""

    pending: Pending
    words: bytes  # SHA-256 of the file beside it


@dataclass(frozen=True)
class Journal:
    """Files of one arm.

    Attributes:
        folder: where they lie; made when needed.
    """

    folder: Path

    def attempt(self, round: int) -> int:
        """A number above that of every earlier attempt at the round.

        Raises:
            RunError: it cannot be written down.
        """
        path, last = self.folder / "attempt.json", 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                found = json.loads(path.read_text(encoding="utf-8"))
                last = int(found["attempt"]) if found["round"] == round else 0
            checkpoint.write_json(path, {"round": round, "attempt": last + 1})
        except OSError as error:
            raise checkpoint.unwritable(self.folder, error, round - 1) from error
        return last + 1

    def keep(self, pending: Pending, total: Words) -> None:
        """Write down what opens the sum.

        Raises:
            RunError: the disk is full or cannot be written.
        """
        body, path = total.astype("<u4").tobytes(), self.folder / "sum"
        try:
            path.write_bytes(body)
            checkpoint.flush(path)
            kept = Kept(pending, hashlib.sha256(body).digest())
            checkpoint.replace_text(self.folder / "pending.json", body_of(kept).decode())
        except OSError as error:
            last = pending.opening.session.round - 1
            raise checkpoint.unwritable(self.folder, error, last) from error

    def pending(self, run: str, round: int) -> tuple[Pending, Words] | None:
        """What was kept of this round, None where nobody was asked to reveal yet.

        Raises:
            RunError: it is damaged.
        """
        path = self.folder / "pending.json"
        if not path.exists():
            return None
        try:
            kept, body = read(Kept, path.read_bytes()), (self.folder / "sum").read_bytes()
        except (OSError, RefusedError) as error:
            raise RunError(f"{path} cannot be read: {error}.") from error
        session = kept.pending.opening.session
        if (session.run, session.round) != (run, round):
            return None
        if hashlib.sha256(body).digest() != kept.words:
            raise RunError(f"{self.folder / 'sum'} is not what was written.")
        return kept.pending, np.frombuffer(body, "<u4")
