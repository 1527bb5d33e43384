"""Training of the embedded model from scratch: model, optimisers, schedule, progress, checkpoints."""

import os
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from embedded.data import NODE_WEIGHTS, Batch, TrainingStream, cut_batches, encode, held_out_transcripts
from embedded.tokenizer import build_tokenizer
from embedded.transcripts import Transcript

CHECK_SEED = 2**31  # of the held-out transcripts for checks during training
FIRST_SCALE = 0.4  # leaf length at the start, as a share of the full length


@dataclass(frozen=True, slots=True)
class Settings:
    """What one training run is given. ``hours`` caps the time: the schedule ends at whichever comes first."""

    out: Path
    tokens: int
    hours: float
    seed: int
    device: str
    batch_tokens: int
    peak_lr: float
    layers: int
    hidden: int
    mlp: int
    leaves: float = NODE_WEIGHTS["leaf"]  # share of transcripts that are single leaves
    init: Path | None = None  # a model folder to continue from; the leaves have full length at once
    decay_from: float = 0.35  # share of the run after which the learning rate falls linearly to zero
    warmup_steps: int = 40
    growth_share: float = 0.25  # share of the run in which the leaves grow to full length
    checks: int = 16
    check_tasks: int = 12  # tasks per kind and check


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=settings.hidden // 4,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},  # Qwen3's; slow enough to copy from afar
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def learned_logits(model: Qwen3ForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [N, V] and targets [N] of the N learned tokens of a batch, and the row of each [N].

    Right padding with causal attention needs no mask: no learned token sees a padding token.
    """
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    learn = batch.learn[:, 1:]
    rows = learn.nonzero()[:, 0]
    return model.lm_head(hidden[:, :-1][learn]), batch.ids[:, 1:][learn], rows


def to_device(batch: Batch, device: str) -> Batch:
    return Batch(batch.ids.to(device), batch.learn.to(device))


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a bf16 copy of the model and its tokenizer; the folder is replaced as a whole."""
    fresh = out.with_name(f".{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    copy = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    copy.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh, save_jinja_files=False)
    for file in fresh.iterdir():
        file.chmod(0o644)
    if out.exists():
        stale = out.with_name(f".{out.name}.old")
        shutil.rmtree(stale, ignore_errors=True)
        os.rename(out, stale)
        os.rename(fresh, out)
        shutil.rmtree(stale)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        os.rename(fresh, out)


@torch.no_grad()
def exact_match(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, transcripts: list[Transcript], batch_tokens: int
) -> dict[str, tuple[int, int]]:
    """(right, all) per ``node family``: transcripts whose every learned token is the most probable one.

    For a deterministic scratchpad that is the same as a correct greedy run.
    """
    groups: dict[str, list[Transcript]] = defaultdict(list)
    for transcript in transcripts:
        groups[f"{transcript.kind} {transcript.family}"].append(transcript)
    out = {}
    for name, members in sorted(groups.items()):
        right = 0
        rows = [encode(tokenizer, transcript) for transcript in members]
        for batch in cut_batches(rows, batch_tokens, tokenizer.pad_token_id):
            batch = to_device(batch, str(model.device))
            logits, targets, index = learned_logits(model, batch)
            wrong = torch.zeros(len(batch.ids), device=model.device)
            wrong.index_add_(0, index, (logits.argmax(-1) != targets).float())
            right += int((wrong == 0).sum())
        out[name] = (right, len(members))
    return out


class Trainer:
    """One uninterrupted run; :meth:`run` trains, prints progress and writes checkpoints to ``settings.out``."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.tokenizer = build_tokenizer()
        self.model = self._first_model().to(settings.device)
        self.stream = TrainingStream(self.tokenizer, settings.seed, settings.batch_tokens, settings.leaves)
        self.held_out = held_out_transcripts(CHECK_SEED, settings.check_tasks)
        embedding = self.model.model.embed_tokens.weight
        matrices = [p for p in self.model.parameters() if p.ndim == 2 and p is not embedding]
        others = [p for p in self.model.parameters() if p.ndim != 2 or p is embedding]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.started = time.monotonic()
        self.tokens = 0
        self.steps = 0

    def _first_model(self) -> Qwen3ForCausalLM:
        if self.settings.init is None:
            return build_model(self.settings, self.tokenizer)
        model = Qwen3ForCausalLM.from_pretrained(self.settings.init, dtype=torch.float32)
        known = PreTrainedTokenizerFast.from_pretrained(self.settings.init)
        if known.get_vocab() != self.tokenizer.get_vocab():
            raise ValueError(f"{self.settings.init} has another vocabulary")
        return model.train()

    def progress(self) -> float:
        """0..1 of the run, by tokens or by time, whichever is further."""
        hours = (time.monotonic() - self.started) / 3600
        return min(1.0, max(self.tokens / self.settings.tokens, hours / self.settings.hours))

    def learning_rate(self, progress: float) -> float:
        warmup = min(1.0, (self.steps + 1) / self.settings.warmup_steps)
        decay = min(1.0, (1 - progress) / (1 - self.settings.decay_from))
        return self.settings.peak_lr * warmup * decay

    def step(self, batch: Batch, lr: float) -> float:
        batch = to_device(batch, self.settings.device)
        device = self.settings.device.split(":")[0]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits, targets, _ = learned_logits(self.model, batch)
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.tokens += batch.tokens
        self.steps += 1
        return loss.item()

    def run(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        print(f"{parameters / 1e6:.2f} M parameters, vocabulary {len(self.tokenizer)}", flush=True)
        losses: list[float] = []
        checks_done = 0
        batches = iter(self.stream)
        while (progress := self.progress()) < 1:
            grown = 1.0 if self.settings.init else min(1.0, progress / self.settings.growth_share)
            self.stream.scale = FIRST_SCALE + (1 - FIRST_SCALE) * grown
            losses.append(self.step(next(batches), self.learning_rate(progress)))
            if self.steps % 25 == 0:
                self.report(losses[-25:], progress)
            if self.progress() * self.settings.checks >= checks_done + 1:
                checks_done += 1
                self.check()
                save(self.model, self.tokenizer, self.settings.out)
        save(self.model, self.tokenizer, self.settings.out)
        print(f"done: {self.tokens} tokens, {(time.monotonic() - self.started) / 60:.1f} minutes", flush=True)

    def report(self, losses: list[float], progress: float) -> None:
        seconds = time.monotonic() - self.started
        eta = seconds / max(self.progress(), 1e-9) - seconds
        print(
            f"step {self.steps} tokens {self.tokens / 1e6:.2f}M loss {sum(losses) / len(losses):.4f} "
            f"lr {self.learning_rate(progress):.5f} {self.tokens / seconds:.0f} tok/s eta {eta / 60:.1f} min",
            flush=True,
        )

    def check(self) -> None:
        """Print the held-out exact-match share per transcript kind and family."""
        self.model.eval()
        scores = exact_match(self.model, self.tokenizer, self.held_out, self.settings.batch_tokens)
        self.model.train()
        print("held out: " + ", ".join(f"{k} {r}/{n}" for k, (r, n) in scores.items()), flush=True)
