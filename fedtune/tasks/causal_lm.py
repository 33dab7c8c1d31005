"""Language modelling: the next token of a text, or of an answer to an instruction.

A text is learnt whole, cut into consecutive windows where it is longer than `model.max_length`, and
ends with the EOS token. An instruction is written with the tokenizer's chat template, or with the
template below where there is none, and only the answer and its EOS are learnt. Which tokens belong
to the answer is decided by the characters they stand for, so it is right for any tokenizer that
knows offsets, whatever it merges or prepends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from fedtune.errors import RecipeError
from fedtune.records import Sums
from fedtune.tasks.next_token import likelihoods
from fedtune.tasks.task import Base, Batch, Example, Scores, Task, mask_of, pad_right, texts

IGNORED = -100
INSTRUCTION = "### Instruction:\n{instruction}\n\n### Response:\n"
INSTRUCTION_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


@dataclass(frozen=True)
class CausalLM(Task):
    """Every token of a text.

    Attributes:
        text: the column of text.
    """

    text: str = "text"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.text,)

    def configure(self, config: PretrainedConfig, path: str | Path, labels: Sequence[str]) -> None:
        config.use_cache = False

    def load(self, path: str | Path, config: PretrainedConfig, **options: Any) -> Base:
        return Base(AutoModelForCausalLM.from_pretrained(path, config=config, **options))

    def skeleton(self, config: PretrainedConfig) -> Base:
        return Base(AutoModelForCausalLM.from_config(config))

    def encode(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
    ) -> list[Example]:
        if not len(rows):
            return []
        eos = _eos(tokenizer)
        examples = []
        for number, tokens in enumerate(tokenizer(texts(rows, self.text))["input_ids"]):
            if tokens[-1] != eos:
                tokens = [*tokens, eos]
            for start in range(0, len(tokens), max_length):
                window = tokens[start : start + max_length]
                if len(window) > 1:  # a single token predicts nothing
                    examples.append({"input_ids": window, "labels": window, "row": [number]})
        return examples

    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        ids = [example["input_ids"] for example in examples]
        return {
            "input_ids": pad_right(ids, pad),
            "attention_mask": mask_of(ids),
            "labels": pad_right([example["labels"] for example in examples], IGNORED),
        }

    def metrics(self, labels: Sequence[str]) -> dict[str, int]:
        return {"loss": 2, "token_accuracy": 2}

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        """The loss is the mean negative log-likelihood of a row's learnt tokens, in nats."""
        rows, positions = (batch["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
        targets = batch["labels"][rows, positions + 1]
        nll, right = likelihoods(model, batch, rows, positions, targets)
        count = len(batch["labels"])
        zeros = torch.zeros(count, dtype=torch.float64, device=nll.device)
        total = zeros.to(nll.dtype).index_add(0, rows, nll)
        tokens = rows.bincount(minlength=count)
        return {
            "loss": total / tokens.clamp(min=1),
            "nll": zeros.index_add(0, rows, nll.detach().double()),
            "tokens": tokens,
            "right": rows[right].bincount(minlength=count),
        }

    def sums(self, scores: Scores, labels: Sequence[str]) -> Sums:
        tokens = float(scores["tokens"].sum())
        return {
            "loss": [float(scores["nll"].sum()), tokens],
            "token_accuracy": [float(scores["right"].sum()), tokens],
        }


@dataclass(frozen=True)
class Instruction(CausalLM):
    """The answer to an instruction.

    Attributes:
        instruction: the column of instructions.
        input: the column of inputs that may stand beside them; rows without it are fine.
        output: the column of answers.
    """

    text: str = ""
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    generates: ClassVar[bool] = True

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.instruction, self.output)

    def _written(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[str, str, str]]:
        """(prompt, prompt and answer, answer) of each row; chat templates end the answer."""
        questions, answers = texts(rows, self.instruction), texts(rows, self.output)
        if self.input != "input" and self.input not in rows.column_names:
            have = ", ".join(rows.column_names)
            raise RecipeError(
                f"The rows have no column '{self.input}'; they have {have}. Set input in task."
            )
        inputs = rows[self.input] if self.input in rows.column_names else [""] * len(rows)
        written = []
        for question, extra, answer in zip(questions, inputs, answers, strict=True):
            if tokenizer.chat_template:
                user = [
                    {"role": "user", "content": f"{question}\n\n{extra}" if extra else question}
                ]
                prompt = tokenizer.apply_chat_template(
                    user, tokenize=False, add_generation_prompt=True
                )
                whole = tokenizer.apply_chat_template(
                    [*user, {"role": "assistant", "content": answer}], tokenize=False
                )
                if not whole.startswith(prompt):
                    # Some templates think before they answer; the prompt of generation decides.
                    whole = prompt + answer + tokenizer.eos_token
            else:
                template = INSTRUCTION_WITH_INPUT if extra else INSTRUCTION
                prompt = template.format(instruction=question, input=extra)
                whole = prompt + answer
            written.append((prompt, whole, answer))
        return written

    def encode(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
    ) -> list[Example]:
        if not len(rows):
            return []
        if not tokenizer.is_fast:
            raise RecipeError(
                "This model's tokenizer cannot tell which characters a token stands for, so the "
                "answer cannot be found. Choose a model that has a fast tokenizer."
            )
        eos = _eos(tokenizer)
        written = self._written(rows, tokenizer)
        encoded = tokenizer(
            [whole for _, whole, _ in written],
            return_offsets_mapping=True,
            # A chat template writes its own special tokens.
            add_special_tokens=not tokenizer.chat_template,
        )
        examples = []
        for number, (prompt, _, _) in enumerate(written):
            tokens = list(encoded["input_ids"][number])
            learnt = [start >= len(prompt) for start, _ in encoded["offset_mapping"][number]]
            if not (learnt[-1] and tokens[-1] == eos):
                if tokens[-1] == eos:  # appended by the tokenizer, standing for no characters
                    tokens, learnt = tokens[:-1], learnt[:-1]
                tokens, learnt = [*tokens, eos], [*learnt, True]
            kept = _kept(learnt.index(True), len(tokens), max_length)
            tokens, learnt = [tokens[i] for i in kept], [learnt[i] for i in kept]
            targets = [token if own else IGNORED for token, own in zip(tokens, learnt, strict=True)]
            examples.append({"input_ids": tokens, "labels": targets})
        return examples

    def prompts(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[list[int], str, str]]:
        special = not tokenizer.chat_template
        return [
            (
                _without_eos(tokenizer, tokenizer(prompt, add_special_tokens=special)["input_ids"]),
                prompt,
                answer,
            )
            for prompt, _, answer in self._written(rows, tokenizer)
        ]


def _kept(prompt: int, total: int, max_length: int) -> list[int]:
    """Which tokens of a row stay, when its first `prompt` tokens are no answer.

    The answer may fill what the prompt leaves, and half of the room in any case. A prompt that is
    longer loses its middle: its beginning and the mark after which the answer starts stay.
    """
    answer = min(total - prompt, max(max_length - prompt, max_length // 2))
    room = min(prompt, max_length - answer)
    head = (room + 1) // 2
    return [*range(head), *range(prompt - (room - head), prompt + answer)]


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise RecipeError("This model's tokenizer has no EOS token, so no text can end.")
    return int(tokenizer.eos_token_id)


def _without_eos(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token_id else tokens
