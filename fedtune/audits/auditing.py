"""Run audits of a run by their names, and keep what they find in its folder.

An audit is a module of this package with a function `audit(audited) -> Finding`. It is imported
when it is asked for; one that has no meaning for a run says so, and the others go on.
"""

import importlib
from collections.abc import Iterator, Sequence

from fedtune.audits import kept
from fedtune.audits.audited import Audited
from fedtune.audits.finding import INAPPLICABLE, Finding, NotApplicableError
from fedtune.components import nearest
from fedtune.errors import RecipeError

AUDITS = kept.ORDER


def chosen(text: str) -> tuple[str, ...]:
    """The audits that `text` names, "mechanism,tokens"; all of them for "".

    Raises:
        RecipeError: one is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in AUDITS:
            raise RecipeError(
                f"There is no audit '{name}'.{nearest(name, AUDITS)} Known: {', '.join(AUDITS)}."
            )
    return tuple(name for name in AUDITS if name in names or not names)


def audit(audited: Audited, names: Sequence[str]) -> Iterator[Finding]:
    """What each audit finds, one after another; each is in the run's folder when it is told."""
    folder = audited.run.folder
    for name in names:
        function = importlib.import_module(f"fedtune.audits.{name}").audit
        try:
            found: Finding = function(audited)
        except NotApplicableError as reason:
            found = Finding(name, "", "", (), "none", INAPPLICABLE, str(reason), "")
        kept.add(folder, found)
        yield found
