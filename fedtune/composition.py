"""Which parts of a recipe go together: everything without meaning is refused here, by both keys.

A part says what it is in class attributes (`Strategy.combines`, `Combine.family`, ...), and this
file compares them. What concerns one strategy's own parameters is left to its `check`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fedtune.attacks import Attack
from fedtune.cohorts import Cohort, Fixed, Poisson
from fedtune.combine import Combine
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.optimizers import ServerOptimizer
from fedtune.privacy.mechanism import CENTRAL, DISTRIBUTED, LOCAL
from fedtune.privacy.secure import Aggregation, Masked
from fedtune.strategies import STRATEGIES, Strategy
from fedtune.tasks import Task

WHY_NOT = {
    "distances": "it would choose clients by distances, but the strategy needs the sum of all",
    "coordinates": "it would look at each entry by itself, but the entries of two trained factors "
    "mean something else at every client: (B R)(R^-1 A) is the same model",
}


@dataclass(frozen=True)
class Parts:
    """What an experiment's component texts stand for."""

    task: Task
    strategy: Strategy
    combine: Combine
    server_optimizer: ServerOptimizer
    attack: Attack
    cohort: Cohort
    secure: Aggregation


def check(experiment: Experiment, parts: Parts) -> None:
    """Refuse combinations without meaning.

    Raises:
        RecipeError: the first of them, naming both keys and what to do.
    """
    for refusals in (_strategy, _combine, _attack, _task, _privacy, _secure, _audit):
        for reason in refusals(experiment, parts):
            raise RecipeError(reason)
    parts.strategy.check(experiment)


def _strategy(e: Experiment, parts: Parts) -> Iterator[str]:
    strategy, family = parts.strategy, parts.combine.family
    named = f"strategy = '{e.strategy}'"
    if e.adapter.dora and not strategy.admits_dora:
        yield (
            f"adapter.dora = true does not go with {named}, which is exact for what is linear in "
            "the factors only: DoRA's norm is not. Set adapter.dora = false, or strategy = 'fedit'."
        )
    if e.model.quantization != "none" and strategy.changes_base:
        yield (
            f"model.quantization = '{e.model.quantization}' does not go with {named}, which "
            "changes the frozen weights. Set model.quantization = 'none', or a strategy that "
            "leaves them, such as 'fedit'."
        )
    if e.adapter.init != "default" and strategy.begins == "principal":
        yield (
            f"{named} begins from the principal factors of the weights, so adapter.init = "
            f"'{e.adapter.init}' has no meaning. Set adapter.init = 'default'."
        )
    if e.adapter.ranks and not strategy.mixed_ranks:
        able = ", ".join(sorted(name for name, kind in STRATEGIES.items() if kind.mixed_ranks))
        yield (
            f"adapter.ranks = '{e.adapter.ranks}' does not go with {named}, which cannot join "
            f"adapters of different ranks. Set adapter.ranks = '', or strategy to one of {able}."
        )
    if not strategy.joins:
        for key, value, off in (
            ("combine", e.combine, "mean"),
            ("server_optimizer", e.server_optimizer, "none"),
            ("attack", e.attack, "none"),
        ):
            if value != off:
                yield (
                    f"{key} = '{value}' does not go with {named}, which joins nothing. "
                    f"Set {key} = '{off}', or another strategy."
                )
    if family not in strategy.combines:
        why = WHY_NOT[family]
        if family == "coordinates" and "distances" not in strategy.combines:
            why = "the strategy needs the sum of all"
        admitted = " or ".join(f"'{name}'" for name in _rules(strategy))
        yield (
            f"combine = '{e.combine}' does not go with {named}: {why}. Set combine = {admitted}, "
            "or a strategy that freezes a factor, such as 'ffa_lora'."
        )
    if parts.server_optimizer.groups and (why := _unsteppable(strategy)):
        yield (
            f"server_optimizer = '{e.server_optimizer}' does not go with {named}, which {why}. "
            "Set server_optimizer = 'none', or a strategy with a fixed frame, such as 'fedit'."
        )


def _unsteppable(strategy: Strategy) -> str:
    """Why a server optimizer has nothing to step, "" where it has."""
    if strategy.sends == "adapter":
        return "joins whole factors, so that there is no delta to step with"
    if not strategy.fixed_frame:
        return "has factors whose entries mean something else every round, or sends none"
    if strategy.changes_base:
        return "puts into the frozen weights what its factors lack, which another step would undo"
    return ""


def _rules(strategy: Strategy) -> list[str]:
    """A rule of each family that a strategy admits."""
    examples = {"mean": "mean", "distances": "multi_krum", "coordinates": "median"}
    return [rule for family, rule in examples.items() if family in strategy.combines]


def _combine(e: Experiment, parts: Parts) -> Iterator[str]:
    rule, cohort = parts.combine, parts.cohort
    most = cohort.size if isinstance(cohort, Fixed) else rule.fewest
    if rule.fewest > 1 and (isinstance(cohort, Poisson) or most < rule.fewest):
        yield (
            f"combine = '{e.combine}' needs {rule.fewest} clients in every round, but cohort = "
            f"'{e.cohort}' may draw fewer. Set cohort = 'fixed(size={rule.fewest})' or larger."
        )
    if rule.trusted and e.cohort != "all":
        yield (
            f"combine = '{e.combine}' trusts a client that must be in every round, but cohort = "
            f"'{e.cohort}' may leave it out. Set cohort = 'all'."
        )


def _attack(e: Experiment, parts: Parts) -> Iterator[str]:
    attack, strategy = parts.attack, parts.strategy
    named = f"attack = '{e.attack}'"
    if attack.needs_labels and not parts.task.label_column:
        yield (
            f"{named} changes labels, but task = '{e.task}' has none. Set attack to one on "
            "replies, such as 'sign_flip', or task = 'classification'."
        )
    if attack.needs_factors and (strategy.personal or not _sends_both(strategy)):
        yield (
            f"{named} rewrites both factors, but strategy = '{e.strategy}' does not send both, and "
            "nothing else of them, in one round. Set another attack, or strategy = 'fedit'."
        )
    if attack.forges and e.adapter.ranks:
        yield (
            f"{named} takes the mean of replies, but adapter.ranks = '{e.adapter.ranks}' gives "
            "them different shapes. Set attack = 'sign_flip', or adapter.ranks = ''."
        )
    if attack.forges and strategy.sends != "delta":
        yield (
            f"{named} forges changes, but strategy = '{e.strategy}' sends whole factors. Set "
            "attack = 'sign_flip', or strategy = 'fedit'."
        )


def _sends_both(strategy: Strategy) -> bool:
    return all(strategy.shares(f"layer.lora_{factor}.weight", 1) for factor in ("A", "B"))


def _task(e: Experiment, parts: Parts) -> Iterator[str]:
    if e.evaluation.samples and not parts.task.generates:
        yield (
            f"evaluation.samples = {e.evaluation.samples} needs a task that generates text, but "
            f"task = '{e.task}'. Set it to 0, or task = 'instruction'."
        )
    if e.adapter.init == "orthogonal" and e.adapter.rank % 2:
        yield (
            f"adapter.init = 'orthogonal' needs an even adapter.rank, not {e.adapter.rank}. Set "
            "adapter.rank to an even number, or adapter.init = 'default'."
        )


def _secure(e: Experiment, parts: Parts) -> Iterator[str]:
    """What needs more than the sum of updates, or clients that were sent different things."""
    if not parts.secure.masks:
        return
    named = f"secure_aggregation = '{e.secure_aggregation}'"
    if not parts.strategy.sums_only or parts.strategy.pools:
        able = ", ".join(
            sorted(name for name, kind in STRATEGIES.items() if kind.sums_only and not kind.pools)
        )
        yield (
            f"{named} does not go with strategy = '{e.strategy}', which needs each client's "
            f"update. Set secure_aggregation = 'none', or strategy to one of {able}."
        )
    if parts.combine.family != "mean":
        yield (
            f"{named} does not go with combine = '{e.combine}', which compares clients. Set "
            "combine = 'mean', or secure_aggregation = 'none'."
        )
    if e.adapter.ranks:
        yield (
            f"{named} does not go with adapter.ranks = '{e.adapter.ranks}': only equal tensors add "
            "up behind masks. Set adapter.ranks = '', or secure_aggregation = 'none'."
        )
    if parts.attack.forges:
        yield (
            f"{named} does not go with attack = '{e.attack}', which forges replies from others "
            "that are masked. Set attack = 'sign_flip', or secure_aggregation = 'none'."
        )
    if e.privacy.mode == "client":
        yield (
            f"{named} does not go with privacy.mode = 'client', whose noise is added to changes "
            "that the coordinator sees one by one. Set privacy.mode = 'client-distributed', or "
            "secure_aggregation = 'none'."
        )
    if e.privacy.mode == DISTRIBUTED and isinstance(parts.secure, Masked) and parts.secure.clip:
        yield (
            f"{named} has a clip beside privacy.clip = {e.privacy.clip}, which already bounds each "
            "update. Set its clip = 0.0."
        )


def _audit(e: Experiment, parts: Parts) -> Iterator[str]:
    if e.data.audit_canaries and parts.attack.count:
        yield (
            f"data.audit_canaries = {e.data.audit_canaries} does not go with attack = "
            f"'{e.attack}': what malicious clients do to their canaries says nothing of honest "
            "ones. Set data.audit_canaries = 0, or attack = 'none'."
        )


def _privacy(e: Experiment, parts: Parts) -> Iterator[str]:
    p, mode = e.privacy, f"privacy.mode = '{e.privacy.mode}'"
    if p.unit and p.mode != "record":
        yield (
            f"privacy.unit = '{p.unit}' needs privacy.mode = 'record', not '{p.mode}'. Set it to "
            "'', or privacy.mode = 'record'."
        )
    if p.clip_quantile and p.mode != "client":
        yield (
            f"privacy.clip_quantile = {p.clip_quantile} needs privacy.mode = 'client', not "
            f"'{p.mode}'. Set it to 0.0, or privacy.mode = 'client'."
        )
    if p.unit_rows and not p.unit:
        yield (
            f"privacy.unit_rows = {p.unit_rows} bounds the rows of one unit, but privacy.unit = "
            "'': every row is one. Set it to 0, or privacy.unit to a column."
        )
    if p.mode == "record":
        yield from _record(e)
    if p.mode not in (CENTRAL, DISTRIBUTED, LOCAL):
        return
    if p.mode == DISTRIBUTED and not parts.secure.masks:
        yield (
            f"{mode} does not go with secure_aggregation = '{e.secure_aggregation}': a client adds "
            "only its share of the noise, which hides nothing before all shares are summed behind "
            "masks. Set secure_aggregation = 'masked', or privacy.mode = 'client'."
        )
    if e.weighting != "uniform":
        yield (
            f"{mode} does not go with weighting = '{e.weighting}': a client with many examples "
            "would move the mean further than the clip allows. Set weighting = 'uniform'."
        )
    if not parts.strategy.joins:
        yield (
            f"{mode} does not go with strategy = '{e.strategy}', which joins nothing. Set "
            "privacy.mode = 'none' or 'record', or another strategy."
        )
    if p.mode == LOCAL:
        return
    if parts.attack.forges:
        yield (
            f"{mode} does not go with attack = '{e.attack}', whose replies are made of others': "
            "one client would move the sum further than the clip. Set attack = 'sign_flip', or "
            "'none'."
        )
    if e.combine != "mean":
        yield (
            f"{mode} does not go with combine = '{e.combine}': only of a sum is it known how far "
            "one client moves it. Set combine = 'mean'."
        )
    if parts.strategy.sends != "delta" or not parts.strategy.sums_only:
        yield (
            f"{mode} does not go with strategy = '{e.strategy}', which needs more of the clients "
            "than the sum of their changes. Set privacy.mode = 'record', or a strategy such as "
            "'ffa_lora' or 'fedsvd'."
        )
    if not parts.strategy.one_sum:
        yield (
            f"{mode} does not go with strategy = '{e.strategy}': what it sends beside the change "
            "would pass without noise. Set privacy.mode = 'record', or a strategy such as "
            "'ffa_lora' or 'fedsvd'."
        )


def _record(e: Experiment) -> Iterator[str]:
    mode = "privacy.mode = 'record'"
    if e.adapter.dropout:
        yield (
            f"adapter.dropout = {e.adapter.dropout} does not go with {mode}: a step that is "
            "repeated must meet the same noise with the same gradients. Set adapter.dropout = 0.0."
        )
    if e.adapter.dora:
        yield (
            f"adapter.dora = true does not go with {mode}: the norm of the merged weights is no "
            "linear layer's, and what one record does to it cannot be told. Set adapter.dora = "
            "false."
        )
    if e.train.group_by_length:
        yield (
            f"train.group_by_length = true does not go with {mode}, which draws every record by "
            "itself: a batch by length would tell who was drawn. Set train.group_by_length = false."
        )
