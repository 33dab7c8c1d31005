"""Sequence classification: one label a row.

A sentence encoder is read by mean pooling: the mean over tokens, L2-normalised, times 16, then one
    linear layer. (An encoder of sentence-transformers was never trained to put a sentence into its
    first token: with that stock head all-MiniLM-L6-v2 reaches .70 on ten banking77 intents, with
    this one .96.) Every other model keeps the head that transformers gives it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from fedtune.errors import RecipeError
from fedtune.records import Sums
from fedtune.tasks.task import Base, Batch, Example, Scores, Task, mask_of, pad_right, texts

NORM = 16.0  # of a pooled sentence; a unit vector leaves the softmax nearly flat
SENTENCE_ENCODER_FILES = ("modules.json", "sentence_bert_config.json", "1_Pooling")


class SentenceClassifier(PreTrainedModel):  # type: ignore[misc]
    """An encoder with mean pooling and one linear layer over `config.num_labels` classes."""

    base_model_prefix = "backbone"
    config_class = PretrainedConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.backbone = AutoModel.from_config(config)
        if getattr(self.backbone, "pooler", None) is not None:
            self.backbone.pooler = None  # the mean replaces it; it would only attract adapters
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, **options: Any
    ) -> SequenceClassifierOutput:
        """Logits of shape (batch, labels) for ids and mask of shape (batch, tokens)."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return SequenceClassifierOutput(logits=self.classifier(NORM * F.normalize(mean, dim=-1)))


@dataclass(frozen=True)
class Classification(Task):
    """One label a row.

    Attributes:
        text: the column of text.
        label: the column of labels, text or whole numbers.
        head: what becomes of the classifier: average (federated as the adapter is), local (each
            client keeps its own) or frozen (as the seed made it).
        pooling: auto (mean for a sentence encoder, else the model's own head), mean or model.
        classes: all labels, "refund,delivery"; needed where no simulation can read them from the
            training rows, because a coordinator must know the head's size before any client
            speaks.
    """

    text: str = "text"
    label: str = "label"
    head: str = "average"
    pooling: str = "auto"
    classes: str = ""

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        names = [name.strip() for name in self.classes.split(",")] if self.classes else []
        if self.classes and (len(set(names)) < len(names) or len(names) < 2 or "" in names):
            raise ValueError("classes must be two or more different names, as in 'refund,delivery'")
        for name, words in (
            ("head", ("average", "local", "frozen")),
            ("pooling", ("auto", "mean", "model")),
        ):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}")

    @property
    def head_policy(self) -> str:  # type: ignore[override]
        return self.head

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.text, self.label)

    @property
    def label_column(self) -> str:
        return self.label

    def labels(self, train: Dataset | None) -> tuple[str, ...]:
        if self.classes:
            return tuple(name.strip() for name in self.classes.split(","))
        if train is None:
            raise RecipeError(
                "An institution's rows cannot be read before the run, so the recipe must name the "
                "labels: task = \"classification(classes='refund,delivery')\"."
            )
        if self.label not in train.column_names:
            have = ", ".join(train.column_names)
            raise RecipeError(
                f"The rows have no label column '{self.label}'; they have {have}. "
                "Write task = \"classification(label='...')\"."
            )
        found = set(train[self.label])
        if len(found) < 2:
            raise RecipeError(f"Column '{self.label}' has {len(found)} label; two are needed.")
        return tuple(str(value) for value in sorted(found))

    def configure(self, config: PretrainedConfig, path: str | Path, labels: Sequence[str]) -> None:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: index for index, name in enumerate(labels)}
        config.fedtune_pooling = self._pooling(config, path)

    def _pooling(self, config: PretrainedConfig, path: str | Path) -> str:
        if self.pooling != "auto":
            return self.pooling
        bare = (config.architectures or ["Model"])[0].endswith("Model") and not getattr(
            config, "is_decoder", False
        )
        marked = any((Path(path) / name).exists() for name in SENTENCE_ENCODER_FILES)
        return "mean" if marked or (bare and _is_encoder(config)) else "model"

    def load(self, path: str | Path, config: PretrainedConfig, **options: Any) -> Base:
        mean = config.fedtune_pooling == "mean"
        kind = SentenceClassifier if mean else AutoModelForSequenceClassification
        module, info = kind.from_pretrained(
            path, config=config, output_loading_info=True, **options
        )
        heads = _heads(module)
        fresh = any(key.split(".")[0] in heads for key in info["missing_keys"])
        fresh = fresh or bool(info.get("mismatched_keys"))
        return Base(module, heads, fresh)

    def skeleton(self, config: PretrainedConfig) -> Base:
        if config.fedtune_pooling == "mean":
            module: PreTrainedModel = SentenceClassifier(config)
        else:
            module = AutoModelForSequenceClassification.from_config(config)
        return Base(module, _heads(module))

    def encode(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
    ) -> list[Example]:
        if not len(rows):
            return []
        index = {name: number for number, name in enumerate(labels)}
        ids = tokenizer(texts(rows, self.text), truncation=True, max_length=max_length)["input_ids"]
        examples = []
        for number, (tokens, label) in enumerate(zip(ids, rows[self.label], strict=True), start=1):
            if str(label) not in index:
                raise RecipeError(
                    f"Row {number}: its label does not occur in training. "
                    f"Known: {', '.join(labels[:20])}. "
                    "Correct the row, or name every label: classification(classes='...')."
                )
            examples.append({"input_ids": tokens, "label": [index[str(label)]]})
        return examples

    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        ids = [example["input_ids"] for example in examples]
        return {
            "input_ids": pad_right(ids, pad),
            "attention_mask": mask_of(ids),
            "labels": torch.tensor([example["label"][0] for example in examples]),
        }

    def metrics(self, labels: Sequence[str]) -> dict[str, int]:
        classes = dict.fromkeys(("true_positive", "predicted", "actual"), len(labels))
        return {"loss": 2, "accuracy": 2, **classes}

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        logits, labels = output.logits, batch["labels"]
        # Half precision is too coarse for a log-softmax; float64 stays itself.
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(logits, labels, reduction="none")
        return {"loss": loss, "predicted": logits.detach().argmax(-1), "actual": labels}

    def sums(self, scores: Scores, labels: Sequence[str]) -> Sums:
        predicted, actual, classes = scores["predicted"], scores["actual"], len(labels)
        right = predicted[predicted == actual]
        return {
            "loss": [float(scores["loss"].detach().double().sum()), float(len(actual))],
            "accuracy": [float(len(right)), float(len(actual))],
            "true_positive": right.bincount(minlength=classes).tolist(),
            "predicted": predicted.bincount(minlength=classes).tolist(),
            "actual": actual.bincount(minlength=classes).tolist(),
        }


def _is_encoder(config: PretrainedConfig) -> bool:
    return not getattr(config, "is_encoder_decoder", False) and hasattr(config, "hidden_size")


def _heads(module: PreTrainedModel) -> tuple[str, ...]:
    return tuple(
        name
        for name, child in module.named_children()
        if name != module.base_model_prefix and any(True for _ in child.parameters())
    )
