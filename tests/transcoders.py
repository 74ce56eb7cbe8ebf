"""Sparse transcoders, the usual alternative to a decomposition of an MLP, for `evidence.py`; not collected by pytest.

A transcoder is trained to write what the MLP writes, given what it reads, with few latents on at a position. It is
judged beside a decomposition whose MLPs alone are masked; both are attacked on the first 8 batches."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt2
import vpd

RATES = (1e-3, 3e-3, 1e-2)  # learning rates, of which the best is taken

class Transcoder(nn.Module):
    """A sparse stand-in for an MLP, (..., width) to the same: of `latents` ReLUs the k largest at a position are on."""
    def __init__(self, width: int, latents: int, k: int):
        super().__init__()
        self.k = k
        self.register_buffer("silent", torch.zeros(latents))  # positions since each latent was on
        self.encode = nn.Linear(width, latents)
        self.decode = nn.Linear(latents, width)
        nn.init.normal_(self.decode.weight, std=width**-0.5)
        self.encode.weight.data.copy_(self.decode.weight.T)

    def dead(self) -> Tensor:
        """Which latents have not been on for 20,000 positions, (latents,)."""
        return self.silent > 20_000

    def forward(self, x: Tensor, sources: Tensor | float = 0.0) -> Tensor:
        """sources (latents,) in [0, 1]: how much of each latent is added back where it is positive, but not on."""
        a = F.relu(self.encode(x))
        on = keep_largest(torch.ones_like(a), a, self.k)
        return self.decode(a * (on + (1 - on) * sources))

def keep_largest(x: Tensor, by: Tensor, k: int) -> Tensor:
    """x (..., n), 0 except where `by` (..., n) has one of its k largest."""
    largest = by.topk(k, -1).indices
    return torch.zeros_like(x).scatter(-1, largest, x.gather(-1, largest))

@torch.no_grad()
def mlp_io(run, path: str, batch: Tensor) -> tuple[Tensor, Tensor]:
    """What an MLP reads and writes at all positions of a batch, (positions, width) each."""
    seen = []
    def record(path, module, x, output):
        seen.extend((x.flatten(0, 1), output.flatten(0, 1)))
    with vpd._hooked(run.model, [path], record):
        run.model(batch)
    inputs, outputs = seen
    return inputs, outputs

def replaced(run, coders: dict[str, Transcoder], batch: Tensor, sources: dict | None = None) -> Tensor:
    """The model's output with transcoders in place of MLPs, {path: transcoder}."""
    def swap(path, module, x, output):
        return coders[path](x, sources[path] if sources else 0.0)
    with vpd._hooked(run.model, coders, swap):
        return run.model(batch)

def train_transcoder(run, layer: int, latents: int, k: int, lr: float, steps: int, seed: int) -> Transcoder:
    """Fit a transcoder to the MLP of a layer: mean squared error, Adam, cosine; as many positions as a decomposition
    sees. Dead latents are helped: the 32 largest of them are fitted to the error."""
    torch.manual_seed(seed)
    coder = Transcoder(run.model.shape.width, latents, k).to(run.device)
    optimizer = torch.optim.Adam(coder.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    data_generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = train_gpt2.sample(run.ids, run.preset.shape.context, run.preset.batch, False, data_generator)
        inputs, outputs = mlp_io(run, f"h.{layer}.mlp", batch.to(run.device))
        a = F.relu(coder.encode(inputs))
        code = keep_largest(a, a, k)
        error = outputs - coder.decode(code)
        loss = error.square().mean()
        coder.silent = torch.where((code > 0).any(0), 0.0, coder.silent + len(a))
        if coder.dead().any():
            helped = a * coder.dead()
            extra = keep_largest(helped, helped, min(32, latents)) @ coder.decode.weight.T
            loss = loss + (error.detach() - extra).square().mean() / 32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return coder

def best_transcoder(run, batches: list[Tensor], layer: int, latents: int, k: int, steps: int, seed: int):
    """A transcoder of a layer's MLP; its learning rate is the best of RATES on these batches."""
    pairs = [mlp_io(run, f"h.{layer}.mlp", batch) for batch in batches]
    least = float("inf")
    for lr in RATES:
        coder = train_transcoder(run, layer, latents, k, lr, steps, seed).requires_grad_(False)
        error = sum((coder(inputs) - outputs).square().mean().item() for inputs, outputs in pairs) / len(pairs)
        print(f"transcoder of layer {layer}, k {k}: lr {lr:g}, error {error:.2e}", file=sys.stderr)
        if error < least:
            least = error
            best = coder
    return best

def best_transcoders(run, metrics: dict, batches: list[Tensor], out: Path, k: int, steps: int, seed: int = 0) -> list:
    """One transcoder for each layer's MLP, with as many latents as the MLP has alive subcomponents in the metrics of a
    decomposition. From files in `out`, if they are there."""
    coders = []
    for layer in range(run.model.shape.layers):
        mlp = [metrics["matrices"][f"h.{layer}.mlp.{matrix}"] for matrix in ("up", "down")]
        latents = sum(matrix["alive"] for matrix in mlp)
        few = min(k, latents)
        file = out / f"transcoder {layer} {few} {steps} {seed}.pt"
        if not file.exists():
            coder = best_transcoder(run, batches, layer, latents, few, steps, seed)
            with vpd.atomic_write(file) as opened:
                torch.save(coder.state_dict(), opened)
        coder = Transcoder(run.model.shape.width, latents, few).requires_grad_(False)
        coder.load_state_dict(torch.load(file, weights_only=True))
        coders.append(coder)
    return coders

def attack_transcoders(run, coders: dict[str, Transcoder], batches: list[Tensor]) -> float:
    """The largest KL in 80 steps of sign ascent on what is added back of latents that are off, one source each."""
    generator = torch.Generator().manual_seed(0)
    sources = {path: torch.rand(len(coder.silent), generator=generator) for path, coder in coders.items()}
    leaves = [x.requires_grad_() for x in sources.values()]
    largest = 0.0
    for _ in range(81):
        total = sum(vpd.kl(run.model(batch).detach(), replaced(run, coders, batch, sources)) for batch in batches[:8])
        largest = max(largest, total.item() / len(batches[:8]))
        for x, gradient in zip(leaves, torch.autograd.grad(total, leaves)):
            x.data.add_(0.1 * gradient.sign()).clamp_(0, 1)
    return largest

def latents_as_decomposition(coders: list[Transcoder]) -> vpd.Decomposition:
    """Transcoders, without dead latents, as a decomposition: a latent reads V_c and writes U_c, as a subcomponent."""
    U, V = {}, {}
    for layer, coder in enumerate(coders):
        U[layer] = coder.decode.weight.T[~coder.dead()]
        V[layer] = coder.encode.weight.T[:, ~coder.dead()]
    return vpd.Decomposition(U, V, nn.Identity())

@torch.no_grad()
def judged(run, batches: list[Tensor], forward, attacked: float) -> dict[str, float]:
    """KL and cross-entropy above target of forward(batch) on these batches, beside the attacked KL."""
    kl = ce = 0.0
    for batch in batches:
        target = run.model(batch)
        output = forward(batch)
        kl += vpd.kl(target, output).item()
        ce += (train_gpt2.cross_entropy(batch, output) - train_gpt2.cross_entropy(batch, target)).item()
    return {"KL": kl / len(batches), "CE": ce / len(batches), "attacked": attacked}

def mlps_masked(run, decomposition: vpd.Decomposition, batches: list[Tensor], layers) -> dict[str, float]:
    """The decomposition with only the MLPs of some layers masked, rounded (1 where g > 0, else 0): how many
    subcomponents are on at a position, the mean over these layers, and its figures. The adversary adds back what is
    off, and Delta."""
    masked = tuple(f"h.{i}.mlp." for i in layers)
    def masks(batch):
        _, g = vpd.predict_importances(run.model, decomposition, batch)
        for path, x in g.items():
            g[path] = F.pad((x[..., :-1] > 0).float(), (0, 1)) if path.startswith(masked) else torch.ones_like(x)
        return g
    on = 0.0
    cases = [(batch, run.model(batch).detach(), masks(batch)) for batch in batches[:8]]
    for _, _, rounded in cases:
        on += sum(x.sum(-1).mean().item() for path, x in rounded.items() if path.startswith(masked))
    attacked = vpd.fresh_adversary(run.model, decomposition, cases, vpd.kl).pop()
    forward = functools.partial(vpd.masked_forward, run.model, decomposition.U, decomposition.V)
    figures = judged(run, batches, lambda batch: forward(masks(batch), batch), attacked)
    return {"on per MLP": on / len(cases) / len(layers)} | figures
