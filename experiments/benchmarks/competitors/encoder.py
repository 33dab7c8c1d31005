"""The one model and training step of all competitors that do not bring their own.

A sentence encoder read by its mean over tokens, normalised, times 16, then one linear layer; LoRA
of rank 8 on query and value through PEFT; AdamW at a constant rate, gradients clipped to norm 1.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from competitors.job import Job

RANK, ALPHA = 8, 16
TARGETS = ["query", "value"]
NORM = 16.0
MAX_GRAD_NORM = 1.0
EVALUATION_ROWS = 64

Example = dict[str, Any]  # "input_ids", "attention_mask": lists; "label": int


def folder_of(model: str) -> str:
    """The folder of an installed model package, or `model` itself."""
    spec = importlib.util.find_spec(model) if model.isidentifier() else None
    if spec is None or spec.origin is None:
        return model
    configs = Path(spec.origin).parent.rglob("config.json")
    return str(min(configs, key=lambda path: len(path.parts)).parent)


class Classifier(nn.Module):
    """A PEFT encoder and a linear layer; returns logits, and the loss where labels are given."""

    def __init__(self, encoder: nn.Module, width: int, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Logits (batch, labels) of ids and mask (batch, tokens)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        logits = self.head(NORM * F.normalize(mean, dim=-1))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def build(job: Job, labels: int) -> Classifier:
    """The base model from disk with the adapter and head that all begin with."""
    path = folder_of(job.model)
    config = AutoConfig.from_pretrained(path)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    base = AutoModel.from_pretrained(path, config=config, add_pooling_layer=False)
    layers = config.num_hidden_layers
    top = list(range(layers - job.top_layers, layers)) if job.top_layers else None
    torch.manual_seed(0)
    adapter = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=TARGETS,
        layers_to_transform=top,
    )
    model = Classifier(get_peft_model(base, adapter), config.hidden_size, labels)
    if job.start:
        put(model, load_file(job.start), _saved_name)
    return model


def _saved_name(name: str) -> str:
    """A parameter's name in a PEFT folder of FedTune's."""
    if name.startswith("head."):
        return name.replace("head.", "base_model.model.classifier.")
    name = name.replace("encoder.base_model.model.", "base_model.model.backbone.", 1)
    return name.replace(".default.", ".")


def put(model: nn.Module, tensors: Mapping[str, Tensor], key: Callable[[str], str] = str) -> None:
    """Copy a tensor into every trained parameter; `key` makes its name from the parameter's."""
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(tensors[key(name)])


def tokenizer_of(job: Job) -> Any:
    """The base model's tokenizer."""
    return AutoTokenizer.from_pretrained(folder_of(job.model))


def shards(job: Job, tokenizer: Any, split: str = "train") -> dict[str, list[Example]]:
    """Client -> its encoded rows, clients sorted by name."""
    lines = Path(getattr(job, split)).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    number = {label: i for i, label in enumerate(labels_of(job))}
    encoded = tokenizer([r["text"] for r in rows], truncation=True, max_length=job.max_length)
    held: dict[str, list[Example]] = {name: [] for name in sorted({r["client"] for r in rows})}
    for row, ids, mask in zip(rows, encoded["input_ids"], encoded["attention_mask"], strict=True):
        held[row["client"]].append(
            {"input_ids": ids, "attention_mask": mask, "label": number[row["label"]]}
        )
    return held


def labels_of(job: Job) -> list[str]:
    """The classes in order."""
    lines = Path(job.train).read_text(encoding="utf-8").splitlines()
    return sorted({json.loads(line)["label"] for line in lines})


def batches(
    examples: Sequence[Example], size: int, draws: torch.Generator
) -> Iterator[list[Example]]:
    """One epoch in random order."""
    order = torch.randperm(len(examples), generator=draws).tolist()
    for start in range(0, len(order), size):
        yield [examples[i] for i in order[start : start + size]]


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Tensors, padded to the longest row of the batch."""

    def padded(key: str) -> Tensor:
        rows = [torch.tensor(example[key]) for example in examples]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    return {
        "input_ids": padded("input_ids"),
        "attention_mask": padded("attention_mask"),
        "labels": torch.tensor([example["label"] for example in examples]),
    }


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that receive gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(
    model: Classifier, examples: Sequence[Example], job: Job, draws: torch.Generator
) -> float:
    """One client's epoch; returns its mean loss over rows."""
    parameters = list(trained(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0)
    model.train()
    total = 0.0
    for batch in batches(examples, job.batch_size, draws):
        loss = model(**collate(batch))["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        total += float(loss.detach()) * len(batch)
    return total / len(examples)


def evaluate(model: Classifier, held: dict[str, list[Example]]) -> tuple[float, float]:
    """(loss, accuracy) over the rows of all clients, batched by length."""
    examples = sorted(
        (example for rows in held.values() for example in rows), key=lambda e: len(e["input_ids"])
    )
    model.eval()
    loss, right = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(examples), EVALUATION_ROWS):
            batch = collate(examples[start : start + EVALUATION_ROWS])
            output = model(**batch)
            loss += float(output["loss"]) * len(batch["labels"])
            right += int((output["logits"].argmax(-1) == batch["labels"]).sum())
    return loss / len(examples), right / len(examples)
