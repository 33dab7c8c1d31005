"""The plain PEFT loop for a causal language model, in one process, on one device.

The base stays in its own precision and is read in mixed precision where that is bfloat16; adapters
and AdamW are float32. Rows have equal lengths, so that nothing is padded.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from competitors import encoder
from competitors.job import Job, Result, main


def _build(job: Job) -> nn.Module:
    base = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
    base.config.use_cache = False
    config = LoraConfig(
        r=encoder.RANK,
        lora_alpha=encoder.ALPHA,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    model: nn.Module = get_peft_model(base, config).to(job.device)
    if job.start:
        encoder.put(model, load_file(job.start), lambda name: name.replace(".default.", "."))
    return model


def _rows(job: Job, tokenizer: Any, split: str) -> dict[str, Tensor]:
    """Client -> (rows, tokens)."""
    lines = Path(getattr(job, split)).read_text(encoding="utf-8").splitlines()
    texts: dict[str, list[str]] = {}
    for row in map(json.loads, lines):
        texts.setdefault(row["client"], []).append(row["text"])
    return {
        name: torch.tensor(tokenizer(own)["input_ids"]).to(job.device)
        for name, own in sorted(texts.items())
    }


def _loss(job: Job, model: nn.Module, ids: Tensor) -> Tensor:
    mixed = job.dtype == "bfloat16"
    with torch.autocast(torch.device(job.device).type, torch.bfloat16, enabled=mixed):
        logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _train(job: Job, model: nn.Module, rows: Tensor, draws: torch.Generator) -> float:
    parameters = list(encoder.trained(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0)
    order = torch.randperm(len(rows), generator=draws)
    model.train()
    total = torch.zeros((), device=rows.device)
    for start in range(0, len(rows), job.batch_size):
        batch = rows[order[start : start + job.batch_size].to(rows.device)]
        loss = _loss(job, model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, encoder.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach() * len(batch)
    return float(total) / len(rows)


def _average(states: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    whole = sum(weights)
    return {
        name: sum(
            (w * state[name] for w, state in zip(weights, states, strict=True)),
            start=torch.zeros_like(states[0][name]),
        )
        / whole
        for name in states[0]
    }


def compete(job: Job) -> Result:
    """Run all rounds."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    held, model = _rows(job, tokenizer, "train"), _build(job)
    live = encoder.trained(model)
    tensors = {name: p.detach().clone() for name, p in live.items()}
    weights = [float(len(rows)) for rows in held.values()]
    draws = torch.Generator().manual_seed(0)
    began, seconds, loss = time.time(), [], 0.0
    for _ in range(job.rounds):
        start, losses, states = time.perf_counter(), [], []
        for rows in held.values():
            encoder.put(model, tensors)
            losses.append(_train(job, model, rows, draws))
            states.append({name: p.detach().clone() for name, p in live.items()})
        tensors = _average(states, weights)
        loss = sum(w * part for w, part in zip(weights, losses, strict=True)) / sum(weights)
        seconds.append(time.perf_counter() - start)
    encoder.put(model, tensors)
    model.eval()
    with torch.no_grad():
        tests = [float(_loss(job, model, rows)) for rows in _rows(job, tokenizer, "test").values()]
    more = {"device_bytes": torch.cuda.max_memory_allocated()} if job.device == "cuda" else {}
    test = sum(tests) / len(tests)
    return Result(began, seconds, int(sum(weights)), loss, test, 0.0, more)


if __name__ == "__main__":
    main(compete)
