#!/usr/bin/env python3
"""Train a protein language model: masked residues of real proteins, augmented on the CPU, learned on the GPU.

The proteins are pyhmmer's 2,122 real ones. Batches are cropped, mutated and masked on the CPU; a transformer learns
on the GPU to fill the masks, with AdamW. Checkpoints are written whole; a run that is interrupted and resumed ends with
the same weights, bit by bit, as one that ran through.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

if TYPE_CHECKING or __package__:
    from .fasta import bundled_proteins, read_fasta
    from .masked_proteins import MaskedProteins
    from .program import InputError, Parser, Stopwatch, count, output_directory, positive, run, write_summary
    from .protein_language_model import ProteinLanguageModel
    from .torch_device import choose_device
else:
    from fasta import bundled_proteins, read_fasta
    from masked_proteins import MaskedProteins
    from program import InputError, Parser, Stopwatch, count, output_directory, positive, run, write_summary
    from protein_language_model import ProteinLanguageModel
    from torch_device import choose_device

CHECKPOINT = "checkpoint.pt"
SHAPING = ("width", "layers", "length", "batch", "rate", "warmup", "seed")
"""The options that decide on the numbers: a checkpoint can be continued only with the same."""


def parser() -> Parser:
    """Return the command line."""
    lines = Parser("train.py", __doc__)
    lines.add_argument("--out", type=Path, default=Path("train-out"), help="directory for the checkpoint")
    lines.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is a GPU, otherwise cpu")
    lines.add_argument("--steps", type=count(), default=60, help="optimizer steps in all, resumed ones included")
    lines.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    lines.add_argument("--checkpoint-every", type=count(), default=20, help="steps between checkpoints")
    lines.add_argument("--log-every", type=count(), default=10, help="steps between lines of output")
    lines.add_argument("--seed", type=count(0), default=0, help="of the weights, the batches and the dropout")
    lines.add_argument("--threads", type=count(), default=1, help="CPU threads of PyTorch")
    lines.add_argument("--workers", type=count(0), default=0, help="processes that prepare batches; 0: this one")
    lines.add_argument("--database", type=Path, help="FASTA file to learn from, instead of pyhmmer's 2,122 proteins")
    model = lines.add_argument_group(
        "model and optimizer; GPU memory is about 192 bytes x width² x layers + activations"
    )
    model.add_argument("--width", type=count(32), default=128, help="channels, a multiple of 32")
    model.add_argument("--layers", type=count(), default=3, help="transformer layers")
    model.add_argument("--length", type=count(8), default=64, help="residues in a crop")
    model.add_argument("--batch", type=count(), default=16, help="crops in a batch")
    model.add_argument("--rate", type=positive, default=1e-3, help="peak learning rate")
    model.add_argument("--warmup", type=count(), default=20, help="steps until the peak; then 1 / sqrt(step)")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    lines = parser()
    options = lines.parse_args(arguments)
    return run(lambda: train(options), lines)


def train(options: argparse.Namespace) -> None:
    """Train for the steps asked for, from the start or from the checkpoint."""
    watch = Stopwatch()
    if options.width % 32:
        raise InputError(f"--width {options.width} is not a multiple of 32")
    device = choose_device(options.device)
    out = output_directory(options.out)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    shaping = {name: getattr(options, name) for name in SHAPING}

    with watch.step("read proteins", "cpu"):
        paths = [options.database] if options.database else bundled_proteins()
        proteins = [protein for path in paths for protein in read_fasta(path)]
        batches = MaskedProteins(proteins, options.batch, options.length, options.seed)
    with watch.step("build model", "cpu"):
        model = ProteinLanguageModel(options.width, options.layers, options.length)
        saved = _load(out / CHECKPOINT, shaping) if options.resume else None
        done: int = saved["step"] if saved else 0
        if done > options.steps:
            raise InputError(f"--resume: the checkpoint is at step {done} already, beyond --steps {options.steps}")
        if saved:
            model.load_state_dict(saved["model"])
    with watch.step("model to device", "gpu"):
        model = model.to(device)
    with watch.step("build optimizer", "cpu"):
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.01)
    if saved:
        with watch.step("restore optimizer", "gpu"):
            optimizer.load_state_dict(saved["optimizer"])
    losses: list[float] = saved["losses"] if saved else []
    print(f"training on {device} from step {done} to {options.steps}: {len(proteins)} proteins", flush=True)

    loader = iter(DataLoader(batches, batch_size=None, sampler=range(done, options.steps), num_workers=options.workers))
    for step in range(done, options.steps):
        with watch.step("augment", "cpu", str(step)):
            tokens, targets = next(loader)
        with watch.step("train", "gpu", str(step)):
            for group in optimizer.param_groups:
                group["lr"] = options.rate * min((step + 1) / options.warmup, (options.warmup / (step + 1)) ** 0.5)
            torch.manual_seed(_mixed(options.seed, step))  # dropout after a resume as without it
            losses.append(_step(model, optimizer, tokens.to(device), targets.to(device)))
        if (step + 1) % options.log_every == 0 or step + 1 == options.steps:
            print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)
        if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
            with watch.step("checkpoint", "cpu", str(step)):
                _save(out / CHECKPOINT, model, optimizer, step + 1, losses, shaping)
    write_summary(
        out, "train", watch, device=str(device), first_step=done, last_step=options.steps, losses=losses, **shaping
    )
    rate = (options.steps - done) / max(watch.total("gpu") + watch.total("cpu"), 1e-9)
    print(f"{options.steps - done} steps, {rate:.1f} a second; checkpoint in {out / CHECKPOINT}")


def _step(model: ProteinLanguageModel, optimizer: torch.optim.Optimizer, tokens: Tensor, targets: Tensor) -> float:
    optimizer.zero_grad()
    logits = model(tokens)
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=MaskedProteins.IGNORED)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.item())


def _mixed(seed: int, step: int) -> int:
    """Return one seed for a pair of seed and step; PyTorch takes 64 bits."""
    return (seed * 0x9E3779B97F4A7C15 + step) % 2**63


def _save(
    path: Path,
    model: ProteinLanguageModel,
    optimizer: torch.optim.Optimizer,
    step: int,
    losses: list[float],
    shaping: dict[str, Any],
) -> None:
    """Write the checkpoint, with every tensor in host memory so that it loads anywhere; whole or not at all."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    draft = path.with_name(path.name + ".part")
    torch.save(_on_host(state) | {"step": step, "losses": losses, "options": shaping}, draft)
    draft.replace(path)


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_host(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_on_host(inner) for inner in value]
    return value


def _load(path: Path, shaping: dict[str, Any]) -> dict[str, Any]:
    """Load a checkpoint into host memory; raise InputError for one that is missing, damaged or made otherwise."""
    if not path.is_file():
        raise InputError(f"--resume: there is no checkpoint {path}; start without --resume")
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        made_with = saved["options"]
    except Exception as error:  # torch.load raises many types for damaged files
        reason = type(error).__name__
        raise InputError(f"--resume: {path} is no checkpoint of this program, or damaged ({reason})") from error
    for name, value in shaping.items():
        if made_with.get(name) != value:
            raise InputError(f"--resume: {path} was made with --{name} {made_with.get(name)}, not {value}")
    return saved


if __name__ == "__main__":
    sys.exit(main())
