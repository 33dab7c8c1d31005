"""The demonstration set: customer messages of a bank, a hospital, a shop and a telecom company.

It was written for FedTune and describes no real customer. A message is a wording, filled with its
institution's own nouns; its label is what the customer wants. A quarter of the wordings occur in
test rows only, so a model is asked about sentences that it never saw. As in life, an institution
knows a part of the wordings, and some intents hardly or not at all; in its test rows, next year's
messages, every intent occurs.
"""

import itertools
import json
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from fedtune.errors import RecipeError
from fedtune.seeds import seed_of

LANGUAGES = ("en", "zh")
INSTITUTIONS = ("bank", "hospital", "shop", "telecom")
# Training rows of each intent, in the order of INSTITUTIONS.
MIX = {
    "track_item": (34, 0, 66, 18),
    "wrong_charge": (62, 2, 0, 38),
    "explain_charge": (52, 30, 0, 16),
    "book_visit": (12, 62, 3, 10),
    "cancel_visit": (0, 54, 6, 14),
    "login_problem": (50, 6, 18, 0),
    "change_details": (42, 24, 3, 2),
    "lost_item": (46, 0, 24, 8),
    "request_paper": (28, 44, 20, 3),
    "report_fault": (2, 3, 56, 34),
    "complain_service": (0, 26, 32, 22),
    "praise_service": (12, 20, 14, 0),
}
RARE = 8  # an institution with fewer training rows of an intent meets it less often in tests, too
KNOWN = 14  # training wordings of an intent that one institution knows
TEST_ROWS, RARE_TEST_ROWS = 7, 5
_SLOT = re.compile(r"\{(\w+)\}")


@cache
def text(language: str) -> dict[str, Any]:
    """What the file of a language holds: "institutions", "slots", "wordings".

    Raises:
        RecipeError: there is no such language.
    """
    if language not in LANGUAGES:
        raise RecipeError(
            f"The demonstration set has no language '{language}'; it has {', '.join(LANGUAGES)}."
        )
    raw = files(__package__).joinpath(f"{language}.json").read_text(encoding="utf-8")
    return dict(json.loads(raw))


def rows(language: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and test rows, always the same ones: text, label, client.

    No text occurs twice, and no wording of a training row is a wording of a test row.

    Raises:
        RecipeError: there is no such language.
    """
    train, test = [], []
    for number, client in enumerate(INSTITUTIONS):
        for label, wordings in text(language)["wordings"].items():
            draws = random.Random(seed_of("corpus", language, client, label))
            old, new = split(wordings)
            wanted = MIX[label][number]
            known = draws.sample(old, KNOWN)
            train += _filled(language, client, label, known, wanted, draws)
            wanted = TEST_ROWS if wanted >= RARE else RARE_TEST_ROWS
            test += _filled(language, client, label, new, wanted, draws)
    return train, test


def split(wordings: Sequence[str]) -> tuple[list[str], list[str]]:
    """The wordings of training rows, and every fourth one, of test rows only."""
    return [w for i, w in enumerate(wordings) if i % 4 != 3], list(wordings[3::4])


def _filled(
    language: str,
    client: str,
    label: str,
    wordings: Sequence[str],
    count: int,
    draws: random.Random,
) -> list[dict[str, str]]:
    """`count` different texts, as evenly as can be from the wordings."""
    slots = text(language)["slots"] | text(language)["institutions"][client]["slots"]
    piles = [_fillings(wording, slots, draws) for wording in draws.sample(wordings, len(wordings))]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*piles))
    chosen = itertools.islice((turn for turn in turns if turn), count)
    return [{"text": filling, "label": label, "client": client} for filling in chosen]


def _fillings(wording: str, slots: Mapping[str, Sequence[str]], draws: random.Random) -> list[str]:
    """Every filling of a wording, shuffled."""
    names = _SLOT.findall(wording)
    values = itertools.product(*(slots[name] for name in names))
    found = [wording.format(**dict(zip(names, value, strict=True))) for value in values]
    draws.shuffle(found)
    return found
