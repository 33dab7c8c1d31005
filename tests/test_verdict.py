"""What is said of a comparison: better and worse only where a corrected test says so."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_comparison import example

from fedtune.studies.comparison import GLOBAL, PERSONAL, Comparison, Difference, Score
from fedtune.studies.verdict import BETTER, NOISE, UNTESTED, WORSE, competitors, reading, verdict


def score(gap: float | None, p_holm: float | None = 0.2, mean: float = 0.8) -> Score:
    difference = None
    if gap is not None:
        difference = Difference(
            seeds=[0, 1, 2],
            values=[gap] * 3,
            mean=gap,
            interval=None,
            bootstrap=None,
            p=p_holm,
            p_holm=p_holm,
            family=3,
            p_permutation=0.25,
            p_smallest=0.25,
        )
    return Score(GLOBAL, "accuracy", [0, 1, 2], [mean] * 3, mean, difference=difference)


def with_scores(scores: dict[str, Score], conditions: int = 1) -> Comparison:
    """The example with these scores of strategies on the global model, and no other strategy."""
    made = example(conditions)
    changed = []
    for condition in made.conditions:
        references = [arm for arm in condition.arms if arm.role == "reference"]
        model = condition.arms[3]
        arms = [replace(model, name=name, scores=[s]) for name, s in scores.items()]
        changed.append(replace(condition, arms=[*references, *arms], rankings=[]))
    return replace(made, conditions=changed, tuning=[], failures=[])


@pytest.mark.parametrize(
    ("gap", "p", "direction", "word"),
    [
        (0.1, 0.049, "higher", BETTER),
        (-0.1, 0.049, "higher", WORSE),
        (-0.1, 0.049, "lower", BETTER),
        (0.1, 0.049, "lower", WORSE),
        (0.5, 0.05, "higher", NOISE),
        (0.5, None, "higher", UNTESTED),
        (None, None, "higher", UNTESTED),
    ],
)
def test_only_a_corrected_test_tells_a_difference(
    gap: float | None, p: float | None, direction: str, word: str
) -> None:
    assert reading(score(gap, p), direction) == word


def test_a_lead_within_noise_is_called_noise() -> None:
    made = with_scores(
        {"fedit": score(None, mean=0.8), "a": score(0.1, 0.3, 0.9), "b": score(-0.1, 0.06, 0.7)}
    )
    said = verdict(made).overall
    assert "the highest mean accuracy is that of a." in said
    assert "None can be told from the baseline fedit: all 2 differences are within noise." in said
    assert "better" not in said


def test_what_is_more_than_noise_is_named_with_its_side() -> None:
    """In two conditions: a better in both, b worse in both, c within noise in both."""
    scores = {
        "fedit": score(None, mean=0.8),
        "a": score(0.1, 0.01, 0.9),
        "b": score(-0.1, 0.02, 0.7),
        "c": score(0.01, 0.9, 0.81),
    }
    said = verdict(with_scores(scores, conditions=2)).overall
    assert "the highest mean accuracy is that of a (2 of 2 conditions)." in said
    assert (
        "Against the baseline fedit, a (2 conditions) is better; b (2 conditions) is worse; "
        "the other 2 of 6 differences are within noise." in said
    )


def test_the_lower_loss_is_the_better_one() -> None:
    scores = {
        "fedit": score(None, mean=0.8),
        "a": score(0.1, 0.01, 0.9),
        "b": score(-0.1, 0.01, 0.7),
    }
    made = replace(with_scores(scores), direction="lower")
    [condition] = made.conditions
    assert [arm.name for arm, _ in competitors(made, condition, GLOBAL)] == ["b", "fedit", "a"]
    assert "the lowest mean accuracy is that of b." in verdict(made).overall
    assert "b is better; a is worse." in verdict(made).overall


def test_one_seed_claims_nothing() -> None:
    made = with_scores({"fedit": score(None), "a": score(0.3, None, 0.9)})
    said = verdict(replace(made, seeds=[0])).overall
    assert "No difference to the baseline fedit could be tested, so none is claimed." in said
    assert "One seed shows no spread" in said


@given(st.integers(2, 8))
def test_what_few_seeds_can_show_is_told(count: int) -> None:
    """The sign-flip test has 2 ** seeds arrangements, two of them extreme: p >= 2 / 2 ** seeds."""
    made = replace(with_scores({"fedit": score(None)}), seeds=list(range(count)))
    assert ("cannot go below" in verdict(made).overall) == (2 / 2**count >= 0.05)


def test_protocols_are_never_mixed_and_failures_are_told() -> None:
    made = example()
    said = verdict(made)
    for condition, sentences in zip(made.conditions, said.conditions, strict=True):
        assert list(sentences) == [GLOBAL, PERSONAL]
        assert "fedsa_lora" not in " ".join(sentences[GLOBAL])
        assert "ffa_lora" not in " ".join(sentences[PERSONAL])
        assert sentences[GLOBAL][-1].startswith("For orientation: untuned")
        best = competitors(made, condition, GLOBAL)[0][0].name
        assert sentences[GLOBAL][0].startswith(f"{best} has the highest mean accuracy")
    assert "1 of 36 cells failed and is missing here." in said.overall
