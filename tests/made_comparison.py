"""A small finished comparison, made up: what it says of strategies means nothing."""

import math
import random
import statistics

from fedtune.studies.comparison import (
    GLOBAL,
    PERSONAL,
    UNTUNED,
    Arm,
    Audit,
    ClientScore,
    Comparison,
    Condition,
    Cost,
    Curve,
    Difference,
    Failure,
    Interval,
    Rank,
    Ranking,
    Score,
    Trial,
    Tuning,
)

METRICS = ["accuracy", "macro_f1", "loss"]
SEEDS = [0, 1, 2]
ROUNDS = 4
CLIENTS = ["client-0", "client-1", "client-2", "client-3"]
PARTITIONS = ["dirichlet(alpha=0.1)", "iid"]
T = 4.302652729911275  # 97.5 % quantile of Student's t with two degrees of freedom
# name, role, kind, accuracy after the last round, protocols that it has scores of
ARMS = [
    (UNTUNED, "reference", "global", 0.02, (GLOBAL, PERSONAL)),
    ("centralized", "reference", "global", 0.92, (GLOBAL, PERSONAL)),
    ("local_only", "reference", "personal", 0.55, (PERSONAL,)),
    ("fedit", "strategy", "global", 0.81, (GLOBAL, PERSONAL)),
    ("ffa_lora", "strategy", "global", 0.78, (GLOBAL,)),
    ("fed_<b>&_%$#(scale=0.5)", "strategy", "global", 0.83, (GLOBAL,)),
    ("fedsa_lora", "strategy", "personal", 0.84, (PERSONAL,)),
]


def example(conditions: int = 2, clients: int = 4) -> Comparison:
    """A comparison of seven arms, three seeds; a name in it needs escaping everywhere."""
    partitions = PARTITIONS[:conditions] if conditions > 1 else [""]
    made = [_condition(name, [f"client-{k}" for k in range(clients)]) for name in partitions]
    tuning = [
        Tuning(
            condition=made[0].name,
            arm="fedit",
            key="train.learning_rate",
            chosen=0.005,
            metric="accuracy",
            sampler="grid",
            rounds=2,
            seeds=[0],
            validation_fraction=0.2,
            trials=[
                Trial(0.001, 0.61, 12.5),
                Trial(0.005, 0.72, 12.1),
                Trial(0.05, None, 3.0, "RunError: the loss is not finite"),
            ],
        )
    ]
    return Comparison(
        study="example",
        question="Which aggregation is best under label skew? <script>alert('no')</script>",
        metric="accuracy",
        direction="higher",
        metrics=METRICS,
        baseline="fedit",
        seeds=SEEDS,
        target=0.7,
        conditions=made,
        tuning=tuning,
        failures=[Failure(made[0].name, "ffa_lora", 2, "RunError: Round 2: 1 of 4 & no more")],
        cells=36,
        seconds=1234.5,
        notes=["Intervals of a mean are Student's t over seeds.", "p values: paired t over seeds."],
        recipe='[study]\nbaseline = "fedit"\n',
        code="0123456789abcdef",
    )


def _condition(partition: str, clients: list[str]) -> Condition:
    draw = random.Random(f"{partition}{len(clients)}")
    arms = [_arm(draw, *row, clients) for row in ARMS]
    rankings = [
        Ranking(
            protocol=GLOBAL,
            metric="accuracy",
            method="bootstrap over seeds and clients",
            ranks=[
                Rank("fed_<b>&_%$#(scale=0.5)", 1.2, 1.0, 2.0, 0.8),
                Rank("fedit", 1.9, 1.0, 3.0, 0.2),
                Rank("ffa_lora", 2.9, 2.0, 3.0, 0.0),
            ],
        )
    ]
    name = f"data.partition={partition}" if partition else ""
    return Condition(name, {"data.partition": partition} if partition else {}, arms, rankings)


def _arm(
    draw: random.Random,
    name: str,
    role: str,
    kind: str,
    accuracy: float,
    protocols: tuple[str, ...],
    clients: list[str],
) -> Arm:
    federated = name not in (UNTUNED, "centralized", "local_only")
    last = 0 if name == UNTUNED else ROUNDS
    rounds = list(range(last + 1))
    curves, held, values = [], [], []
    for seed in SEEDS:
        value = accuracy + draw.uniform(-0.02, 0.02)
        values.append(value)
        shares = [1 - math.exp(-2 * k) if last else 1.0 for k in rounds]
        errors = [None, *(0.1 / k for k in rounds[1:])]
        path = [0.02 + (value - 0.02) * share for share in shares]
        curves.append(
            Curve(
                seed=seed,
                rounds=rounds,
                values={"accuracy": list(path), "loss": [3 * (1 - v) for v in path]},
                bytes=[1_500_000 * k if federated else 0 for k in rounds],
                seconds=[2.0 * k + 1 for k in rounds],
                aggregation={"relative_error": errors} if federated else {},
            )
        )
        if name != "centralized":
            for number, client in enumerate(clients):
                own = min(1.0, max(0.0, value + draw.uniform(-0.1, 0.1)))
                held.append(ClientScore(seed, client, 30 + number, 20, {"accuracy": own}))
    reached = [3] * len(SEEDS) if accuracy > 0.7 else [None] * len(SEEDS)
    cost = Cost(
        rounds=[last] * len(SEEDS),
        bytes_up=[3_000_000] * len(SEEDS) if federated else None,
        bytes_down=[3_000_000] * len(SEEDS) if federated else None,
        seconds=[2.0 * last + 1] * len(SEEDS),
        rounds_to_target=list(reached),
        bytes_to_target=[k and 1_500_000 * k for k in reached],
        seconds_to_target=[k and 2.0 * k + 1 for k in reached],
    )
    scores = [_score(p, m, values, name) for p in protocols for m in METRICS]
    settings = {"train.learning_rate": 0.005} if name == "fedit" else {}
    aggregation = {"relative_error": 0.05, "effective_rank": 3.2} if federated else {}
    audits = [_audit(name)] if role == "strategy" else []
    return Arm(name, role, kind, scores, cost, held, curves, aggregation, dict(settings), audits)


def _audit(name: str) -> Audit:
    """One that was measured in all seeds but the last."""
    interval = Interval(0.4, 0.7, "Student t over 2 seeds")
    verdicts = {"holds": 2, "not applicable": 1}
    return Audit(
        *("membership", "AUC of the loss ratio", SEEDS[:2], [0.5, 0.6], 0.55, interval, None),
        verdicts,
        f"{name} sends nothing",
    )


def _score(protocol: str, metric: str, accuracies: list[float], name: str) -> Score:
    values = [3 * (1 - v) if metric == "loss" else v for v in accuracies]
    mean, half = statistics.fmean(values), T * statistics.stdev(values) / math.sqrt(len(values))
    interval = Interval(mean - half, mean + half, "Student t over 3 seeds")
    bootstrap = Interval(mean - 0.02, mean + 0.02, "bootstrap over seeds and clients")
    difference = None
    if name != "fedit":
        gap = mean - (0.57 if metric == "loss" else 0.81)
        difference = Difference(
            seeds=SEEDS,
            values=[gap - 0.01, gap, gap + 0.01],
            mean=gap,
            interval=Interval(gap - 0.025, gap + 0.025, "Student t over 3 seeds"),
            bootstrap=Interval(gap - 0.015, gap + 0.015, "bootstrap over seeds and clients"),
            p=0.04,
            p_holm=0.2,
            family=5,
            p_permutation=0.25,
            p_smallest=0.25,
        )
    return Score(
        protocol=protocol,
        metric=metric,
        seeds=SEEDS,
        values=values,
        mean=mean,
        interval=interval,
        bootstrap=None if name == "centralized" else bootstrap,
        worst=None if name == "centralized" else mean - 0.09,
        spread=None if name == "centralized" else 0.05,
        difference=difference,
    )
