"""What is learnt from a row, on tokenizers of different habits."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedtune.errors import RecipeError
from fedtune.tasks import CausalLM, Classification, Instruction
from fedtune.tasks.causal_lm import IGNORED
from fedtune.tasks.task import mask_of, pad_right

CHAT = (
    "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant :{% endif %}"
)


def learnt(example: dict[str, list[int]]) -> list[int]:
    return [token for token in example["labels"] if token != IGNORED]


def test_the_answer_alone_is_learnt_and_ends_with_eos(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = Dataset.from_list(
        [
            {"instruction": "where is my card", "input": "", "output": "late"},
            {"instruction": "help now", "input": "slow phone", "output": "please order again"},
        ]
    )
    examples = Instruction().encode(rows, tokenizer, (), 64)
    assert [tokenizer.decode(learnt(e)) for e in examples] == [
        "late </s>",
        "please order again </s>",
    ]
    for example in examples:
        assert example["input_ids"][-1] == tokenizer.eos_token_id
        assert example["input_ids"].count(tokenizer.eos_token_id) == 1
        assert len(example["input_ids"]) == len(example["labels"])
    assert "slow phone" in tokenizer.decode(examples[1]["input_ids"])


def test_a_chat_template_is_used_where_there_is_one(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = CHAT
    rows = Dataset.from_list([{"instruction": "where", "output": "lost today"}])
    (example,) = Instruction().encode(rows, tokenizer, (), 64)
    assert tokenizer.decode(learnt(example)) == "lost today </s>"
    assert "Instruction" not in tokenizer.decode(example["input_ids"])
    assert example["input_ids"].count(tokenizer.bos_token_id) == 2  # the template's own, no third


def test_a_prompt_is_what_an_example_begins_with(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = Dataset.from_list([{"instruction": "where is my card", "output": "late"}])
    (example,) = Instruction().encode(rows, tokenizer, (), 64)
    ((prompt, _, answer),) = Instruction().prompts(rows, tokenizer)
    assert example["input_ids"][: len(prompt)] == prompt
    assert len(learnt(example)) == len(example["input_ids"]) - len(prompt)
    assert answer == "late"


@given(st.integers(1, 30), st.integers(1, 30), st.integers(16, 48))
def test_a_row_too_long_loses_the_middle_of_its_instruction(
    tiny_llama: Path, asked: int, answered: int, limit: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    words = ["where", *["card"] * asked, "phone"]
    answer = " ".join(["late", *["order"] * answered])
    rows = Dataset.from_list([{"instruction": " ".join(words), "output": answer}])
    (whole,) = Instruction().encode(rows, tokenizer, (), 1000)
    (cut,) = Instruction().encode(rows, tokenizer, (), limit)
    assert len(cut["input_ids"]) == min(limit, len(whole["input_ids"]))
    full, kept = learnt(whole), learnt(cut)
    assert kept == full[: len(kept)]
    assert len(kept) >= min(len(full), limit // 2)
    prompt = [t for t, label in zip(cut["input_ids"], cut["labels"], strict=True) if label < 0]
    asking = whole["input_ids"][: len(whole["input_ids"]) - len(full)]
    head = (len(prompt) + 1) // 2
    tail = len(prompt) - head
    assert prompt == [*asking[:head], *asking[len(asking) - tail :]]
    if len(kept) < len(full):
        assert len(cut["input_ids"]) == limit


@given(st.integers(1, 30), st.integers(2, 9))
def test_a_long_text_is_cut_into_windows_and_nothing_is_lost(words: int, length: int) -> None:
    rows = Dataset.from_list([{"text": " ".join(["card"] * words)}])
    examples = CausalLM().encode(rows, _Words(), (), length)
    together = [token for e in examples for token in e["input_ids"]]
    whole = [1, *[7] * words, 2]
    # A last window of one token predicts nothing and is left out.
    assert together == (whole[:-1] if len(whole) % length == 1 else whole)
    assert all(2 <= len(e["input_ids"]) <= length for e in examples)


class _Words:
    """BOS, one token a word, no EOS: what most causal tokenizers do."""

    eos_token_id = 2

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1, *[7] * len(text.split())] for text in texts]}


def test_the_loss_of_a_row_is_the_mean_over_its_own_tokens() -> None:
    """Against transformers' loss, row by row: padding and other rows do not matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                num_hidden_layers=1,
                intermediate_size=16,
                num_attention_heads=2,
                bos_token_id=1,
                eos_token_id=2,
            )
        ).eval()
    examples = [
        {"input_ids": [1, 5, 6, 7, 2], "labels": [1, 5, 6, 7, 2]},
        {"input_ids": [1, 9, 2], "labels": [IGNORED, IGNORED, 2]},
    ]
    task = CausalLM()
    scores = task.scores(model, task.collate(examples, 0))
    losses, sums = scores["loss"], task.sums(scores, ())
    for example, loss in zip(examples, losses, strict=True):
        alone = task.collate([example], 0)
        assert loss.item() == pytest.approx(model(**alone).loss.item(), rel=1e-5)
    assert sums["loss"] == pytest.approx(
        [float((losses[0] * 4 + losses[1]).detach()), 5.0], rel=1e-5
    )
    assert sums["token_accuracy"][1] == 5.0
    assert {name: len(values) for name, values in sums.items()} == task.metrics(())


def test_classification_sums_by_hand() -> None:
    """Three rows, two right: class 0 is predicted twice and right once, class 2 right once."""

    class Fixed(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
            self.logits = torch.tensor([[5.0, 0, 0], [5.0, 0, 0], [0, 0, 5.0]])
            return self

    task = Classification()
    batch = task.collate([{"input_ids": [1, 2], "label": [k]} for k in (0, 1, 2)], 0)
    scores = task.scores(Fixed(), batch)
    losses, sums = scores["loss"], task.sums(scores, ("a", "b", "c"))
    assert sums["accuracy"] == [2, 3]
    assert {k: len(v) for k, v in sums.items()} == task.metrics(("a", "b", "c"))
    assert (sums["true_positive"], sums["predicted"], sums["actual"]) == (
        [1, 0, 1],
        [2, 0, 1],
        [1, 1, 1],
    )
    expected = F.cross_entropy(torch.tensor([[5.0, 0, 0]]), torch.tensor([1]))
    assert losses[1].item() == pytest.approx(expected.item())
    assert sums["loss"][0] == pytest.approx(float(losses.detach().double().sum()))


def test_labels_are_read_in_order_or_named() -> None:
    rows = Dataset.from_list([{"text": "a", "label": 10}, {"text": "b", "label": 9}])
    assert Classification().labels(rows) == ("9", "10")
    assert Classification(classes="b, a").labels(None) == ("b", "a")
    with pytest.raises(RecipeError, match="must name the labels"):
        Classification().labels(None)
    with pytest.raises(RecipeError, match="1 label; two are needed"):
        Classification().labels(rows.select([0]))
    with pytest.raises(RecipeError, match="no label column 'kind'; they have text, label"):
        Classification(label="kind").labels(rows)


def test_a_row_that_cannot_be_encoded_is_named(tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    rows = Dataset.from_list([{"text": "card", "label": "late"}, {"text": "bill", "label": "lats"}])
    with pytest.raises(RecipeError, match=r"Row 2: its label does not occur.*Known: late, lost"):
        Classification().encode(rows, tokenizer, ("late", "lost"), 8)
    empty = Dataset.from_list([{"text": "card", "label": "late"}, {"text": " ", "label": "late"}])
    with pytest.raises(RecipeError, match="Row 2: column 'text' must be text"):
        Classification().encode(empty, tokenizer, ("late", "lost"), 8)
    with pytest.raises(RecipeError, match="no column 'body'; they have text, label"):
        Classification(text="body").encode(rows, tokenizer, ("late", "lost"), 8)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5))
def test_padding_is_on_the_right_and_masked(rows: list[list[int]]) -> None:
    padded, mask = pad_right(rows, 99), mask_of(rows)
    assert padded.shape == mask.shape == (len(rows), max(map(len, rows)))
    for row, ids, on in zip(rows, padded.tolist(), mask.tolist(), strict=True):
        assert ids == row + [99] * (len(ids) - len(row))
        assert on == [1] * len(row) + [0] * (len(ids) - len(row))
