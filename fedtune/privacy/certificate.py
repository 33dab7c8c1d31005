"""The certificate: what a run promises, in words and numbers that a review board can check.

It is made from a ledger that was verified, and holds nothing that the ledger does not. Its
checklist follows NIST SP 800-226, "Guidelines for Evaluating Differential Privacy Guarantees"
(2025): the guarantee and its unit, the algorithms and their implementation, and what they rest on.
"""

import hashlib
from pathlib import Path
from typing import Any

from fedtune.privacy import ledger, spending
from fedtune.privacy.ledger import Line
from fedtune.privacy.mechanism import DISTRIBUTED, Mechanism
from fedtune.privacy.verifying import Verified

Certificate = dict[str, Any]


def of(folder: Path, verified: Verified) -> Certificate:
    """The certificate of a run, as JSON."""
    mechanisms = spending.mechanisms_of(verified.begin)
    ever = spending.ever(verified.lines)
    worst = ever[verified.worst] if verified.accounts else next(iter(mechanisms.values()))
    account = verified.accounts.get(verified.worst, spending.Account())
    cost = spending.told(account.cost)
    data = (folder / ledger.FILE).read_bytes()
    return {
        "schema": 1,
        "run": verified.begin["run"],
        "statement": _statement(worst, cost, verified),
        "mode": worst.mode,
        "unit": worst.unit,
        "neighbouring": f"{worst.neighbouring} {worst.unit}",
        "adversary": worst.adversary,
        "budget": worst.budget or None,
        "rounds": verified.rounds,
        "rounds_charged": account.rounds,
        **cost,
        "sampling": {"type": worst.sampling, "rate": worst.rate, "units": worst.units},
        "clip": worst.clip,
        "noise_multiplier": worst.noise,
        "sigma": worst.sigma,
        "denominator": worst.denominator,
        "clients": _clients(verified, mechanisms) if "" not in mechanisms else [],
        "not_covered": verified.begin["not_covered"],
        "selection_charged": verified.begin["selection_charged"],
        "checklist": _checklist(worst, verified),
        "ledger": {
            "lines": len(verified.lines),
            "sha256": hashlib.sha256(data).hexdigest(),
            "public_key": verified.begin["public_key"],
        },
        "software": {
            key: verified.begin[key] for key in ("fedtune", "code", "accountant", "noise")
        },
    }


def _statement(worst: Mechanism, cost: dict[str, float | None], verified: Verified) -> str:
    whose = f" of client '{verified.worst}', the worst off," if verified.worst else ""
    return (
        f"The models of all {verified.rounds} rounds together are "
        f"({cost['eps_final_model_only']:.3f}, {cost['delta']:.2g})-differentially private for "
        f"each {worst.unit}{whose} under the relation '{worst.neighbouring}', against "
        f"{worst.adversary}."
    )


def _clients(verified: Verified, mechanisms: dict[str, Mechanism]) -> list[dict[str, Any]]:
    """Each client's own promise: its number of records decides its noise and its epsilon."""
    rows = []
    for name, own in sorted(mechanisms.items()):
        account = verified.accounts.get(name, spending.Account())
        rows.append(
            {
                "client": name,
                "units": own.units,
                "rate": own.rate,
                "noise_multiplier": own.noise,
                "steps_a_round": own.steps,
                "rounds": account.rounds,
                "epsilon": account.epsilon,
                "delta": own.delta,
            }
        )
    return rows


def _checklist(worst: Mechanism, verified: Verified) -> list[dict[str, str]]:
    """NIST SP 800-226's questions, from the top of its pyramid down."""
    begin = verified.begin
    trust = {
        "record": "distributed over the clients: each adds its own noise before anything leaves it",
        "client": "central: the coordinator sees single clients' changes and adds the noise",
        "client-distributed": "distributed: the coordinator sees noisy sums; each client adds a "
        "share of the noise before its change is masked",
        "local": "local: each client adds its own noise",
    }[worst.mode]
    law, sampling, accounting, exact = _noise(worst, begin)
    answers = [
        ("Epsilon and delta", "in the statement above; delta is below one over the units"),
        ("Unit of privacy", f"one {worst.unit}"),
        ("Neighbouring data sets", f"{worst.neighbouring} {worst.unit}"),
        ("Several releases", "all rounds and steps are composed, aborted ones included"),
        ("Trust model", trust),
        ("Mechanism", f"{law} noise on a sum of contributions clipped to one L2 norm"),
        ("Sensitivity", f"{worst.sensitivity:.4g}, from the clip {worst.clip:.4g}"),
        ("Sampling", sampling),
        ("Accounting", f"{begin['accountant']['name']}, {accounting}"),
        ("Randomness", f"{begin['noise']['generator']}, keyed by 32 secret bytes"),
        ("Floating point", exact),
        ("Timing and other side channels", "not covered"),
        ("Hyper-parameter selection", "not charged"),
        ("Utility and bias", "in the report: quality of the released model, client by client"),
        ("Access to raw data", "rows stay at the clients; see each institution's own policy"),
        ("Security of the secret", f"{ledger.KEY}, readable by its owner only; in no checkpoint"),
    ]
    return [{"item": item, "answer": answer} for item, answer in answers]


def _noise(worst: Mechanism, begin: Line) -> tuple[str, str, str, str]:
    """Its law, how units are sampled, how it is accounted, and how it is kept exact."""
    told = begin["noise"]
    if worst.mode == DISTRIBUTED:
        return (
            "Skellam, in shares that add up,",
            "none counted: who takes part is seen, and each is charged for its own rounds",
            "Renyi divergences of integer orders",
            f"integers from the first, {told['least_steps']} or more of which make up the clip",
        )
    return (
        "Gaussian",
        f"{worst.sampling}, rate {worst.rate:.4g} of {worst.units} {worst.unit}s, drawn from a "
        "secret key"
        if worst.sampling != "all"
        else "none: every unit is in every sum",
        "privacy loss distributions; RDP beside it",
        f"sums of 4 draws, on a grid 2^-{told['grid_bits']} of sigma",
    )


def markdown(certificate: Certificate) -> str:
    """The certificate for people."""
    c = certificate
    lines = [f"# Privacy certificate of {c['run']}", "", c["statement"], ""]
    lines += ["| | |", "|---|---|"]
    for title, key in (
        ("Epsilon, of the models alone", "eps_final_model_only"),
        ("Epsilon, to who also sees which units were sampled", "eps_observes_participation"),
        ("Epsilon by PLD / RDP", ""),
        ("Rho of zero-concentrated DP, without sampling", "rho_zcdp"),
        ("Delta", "delta"),
        ("Budget", "budget"),
        ("Noise multiplier z", "noise_multiplier"),
        ("Clip C", "clip"),
    ):
        value = _number(c[key]) if key else f"{_number(c['eps_pld'])} / {_number(c['eps_rdp'])}"
        lines.append(f"| {title} | {value} |")
    if c["clients"]:
        lines += ["", "## Every client", "", "| client | units | rate | z | rounds | epsilon |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in c["clients"]:
            numbers = (row["rate"], row["noise_multiplier"])
            shown = " | ".join(_number(number) for number in numbers)
            epsilon = _number(row["epsilon"])
            lines.append(
                f"| {row['client']} | {row['units']} | {shown} | {row['rounds']} | {epsilon} |"
            )
    lines += ["", "## What is not covered", ""]
    lines += [f"- {item}" for item in c["not_covered"]]
    lines += ["", "## Checklist (NIST SP 800-226)", "", "| | |", "|---|---|"]
    lines += [f"| {row['item']} | {row['answer']} |" for row in c["checklist"]]
    own = c["ledger"]
    lines += [
        "",
        f"Ledger: {own['lines']} lines, SHA-256 `{own['sha256']}`, signed with Ed25519 key "
        f"`{own['public_key']}`. Check it with `fedtune privacy verify`.",
        "",
    ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
