"""VPD: adversarial parameter decomposition of a trained network, in one file.

Every chosen weight matrix W of a frozen *target model* is written as a sum of rank-one *subcomponents* and a remainder,

    W = sum_c U_c V_c^T + Delta,

trained so that on any one input only a few subcomponents matter, and the rest can be ablated, fully or partly, in any
combination -- also one chosen by an adversary -- without changing the output. Read from top to bottom:

    1  Settings
    2  Subcomponents, and the forward pass with masked weights
    3  Causal importances: from raw scores to masks
    4  Causal importance functions: who predicts the scores
    5  The five losses
    6  The adversary
    7  The training step
    8  decompose: checks, faithfulness warm-up, the loop, checkpoints
    9  Evaluation: how we know that it worked
   10  Reading a decomposition: attribution graphs, pruning to one behaviour, comparing two

Shapes: B = batch, T = positions in a sequence (absent for models without one), C = subcomponents of a matrix, L = number of
decomposed matrices. "..." stands for all positions: (B,) or (B, T). Every dict is keyed by the path of the matrix in the
model, as in `model.get_submodule(path)`.

The method is that of "Interpreting Language Model Parameters" (Bushnaq et al., 2026), cited below as [VPD]; it builds on
"Stochastic Parameter Decomposition" (arXiv 2506.20790), cited as [SPD].

Not here, on purpose: matrices that are not `nn.Linear` (embeddings, convolutions), clustering of subcomponents into larger
components, experiment trackers, and any knowledge of which model is being decomposed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

ALIVE = 1e-6  # a subcomponent is alive if its mean causal importance over the evaluation set exceeds this (as in [VPD])

Divergence = Callable[[Tensor, Tensor], Tensor]  # (target output, masked output) -> scalar, averaged over positions


class BadInput(ValueError):
    """Something the user can put right. The message is one line: what was wrong, and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# 1  Settings
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """All settings of a decomposition. In brackets: the value of the published 4-layer language model run.

    To adapt to a new model, tune in this order: importance, lr, adversary_lr, frequency, the C given to `decompose`, delta.
    G is the causal importance function (section 4), U and V are the subcomponents (section 2).
    """

    steps: int = 3000  # [400,000] training steps
    seed: int = 0  # fixes everything, bit for bit on CPU
    lr: float = 3e-3  # [5e-5] AdamW, for U, V and G, cosine decay; on TMS 0.04 / sqrt(features) serves every size
    lr_final: float = 0.0  # [0.1] the share of lr that is left at the end
    warmup_steps: int = 400  # [400] faithfulness warm-up: Delta-L2 alone, U and V only, lr 1e-3
    clip_UV: float = 0.01  # [0.01] largest gradient norm of U and V together
    clip_G: float = 1.0  # [none] the same for G: as p falls below 1 its gradient can explode

    # Coefficients of the five losses. The two reconstruction losses are not computed where theirs is 0.
    stochastic: float = 0.5  # [0.5]
    adversarial: float = 0.5  # [0.5]
    importance: float = 1e-4  # [2e-4] too high: importances fall below 1, reconstruction collapses; too low: all active
    frequency: float = 2e-3  # [1e-4] its logarithm grows with the batch: retune it when the batch changes much
    price_start: float = 1.0  # [1] importance and frequency start this many times higher and decay geometrically to the above
    delta: float = 0.5  # [1e7] too high: subcomponents do not merge (on tms_5-2, 100 times this left most alive)

    p_start: float = 2.0  # [2.0] the exponent of both minimality losses, annealed linearly over the run
    p_end: float = 0.5  # [0.4]
    adversary_lr: float = 0.01  # [0.01] Adam ascent on the sources, after a linear warm-up over 2.5 % of the run
    adversary_steps: int = 2  # [2] inner ascent steps; one more comes free with the main backward pass

    # The causal importance function: "mlp" for inputs without a sequence, "transformer" for sequences.
    G: str = "mlp"  # [transformer]
    G_width: int = 128  # [2048] the transformer's width: more than the target's residual stream
    G_blocks: int = 2  # [8] the transformer's depth: 0.5 to 2 times the target's
    G_heads: int = 4  # [16] the transformer's attention heads

    bf16: bool = False  # [True] matrix products in bfloat16 (autocast), for GPUs; the losses stay in float32


# ---------------------------------------------------------------------------------------------------------------------
# 2  Subcomponents, and the forward pass with masked weights
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _hooked(model: nn.Module, hooks: dict[str, Callable]):
    """Attach a forward hook to each path, and take all of them off again whatever happens in between."""
    handles = []
    try:
        for path, hook in hooks.items():
            handles.append(model.get_submodule(path).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def forward_with_inputs(model: nn.Module, paths, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The target model as it is: its output, and the input (..., d_in) of every decomposed matrix."""
    inputs = {}

    def recorder(path):
        def hook(module, args, output):
            if path in inputs:
                raise BadInput(f"{path} runs more than once in a forward pass; only matrices that run once can be decomposed")
            inputs[path] = args[0]

        return hook

    with _hooked(model, {path: recorder(path) for path in paths}):
        output = model(batch)
    return output, {path: inputs[path] for path in paths if path in inputs}  # in the order of `paths`


def masked_forward(model: nn.Module, U: dict, V: dict, masks: dict[str, Tensor], batch: Tensor) -> Tensor:
    """The model's output with each matrix W replaced, position by position, by

        W'(m) = sum_c m_c U_c V_c^T + m_Delta Delta          ([VPD] section 2)

    masks[path]: (..., C + 1), the last column is m_Delta. U[path]: (C, d_out), V[path]: (d_in, C).
    Because Delta = W - sum_c U_c V_c^T, Delta need never be built:

        W'(m) x = m_Delta W x + sum_c (m_c - m_Delta) U_c V_c^T x

    so a mask of ones gives exactly the target: that is how a position is left out of the decomposition.
    The model's parameters are not touched; the masks live only in the hooks of this one call.
    """

    def replacer(path):
        return lambda module, args, output: masked_linear(module, args[0], output, U[path], V[path], masks[path])

    with _hooked(model, {path: replacer(path) for path in masks}):
        return model(batch)


def masked_linear(module: nn.Linear, x: Tensor, output: Tensor, U: Tensor, V: Tensor, mask: Tensor) -> Tensor:
    """One matrix under a mask (..., C + 1): its input x (..., d_in) and plain output (..., d_out) to its masked output."""
    m, m_delta = mask.split([V.shape[1], 1], -1)  # (..., C), (..., 1)
    Wx = output if module.bias is None else output - module.bias
    # output + (m_delta - 1) Wx, and not m_delta Wx + bias: exact, to the last bit, where m_delta = 1
    return output + (m_delta - 1) * Wx + ((m - m_delta) * (x @ V)) @ U


# ---------------------------------------------------------------------------------------------------------------------
# 3  Causal importances: from raw scores to masks
# ---------------------------------------------------------------------------------------------------------------------


class _LowerLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        revive = torch.where(grad < 0, 0.01 * grad, 0.0)  # descent would raise g: let a little through
        return torch.where(z <= 0, revive, torch.where(z <= 1, grad, 0.0))


def lower_leaky(z: Tensor) -> Tensor:
    """Hard sigmoid clamp(z, 0, 1) for masks, any shape ([VPD] section 2; [SPD] appendix).

    Below 0 a hundredth of the gradient passes, and only where descent would raise g: without it a subcomponent at g = 0
    could never come back; letting it pass both ways would push dead ones ever further down. A straight-through
    estimator: the masks themselves never leave [0, 1].
    """
    return _LowerLeaky.apply(z)


def upper_leaky(z: Tensor) -> Tensor:
    """Hard sigmoid for the minimality losses: clamp(z, 0, 1), but with slope 0.01 above 1, any shape.

    So a causal importance that has saturated at 1 still feels the pressure to come down.
    """
    return z.clamp(0, 1) + 0.01 * (z - 1).clamp(min=0)


def causal_importances(z: dict[str, Tensor]) -> dict[str, Tensor]:
    """Raw scores (..., C) to causal importances (..., C + 1) in [0, 1]; the last column is Delta's, 0 by definition."""
    return {path: F.pad(lower_leaky(score), (0, 1)) for path, score in z.items()}


def make_masks(g: dict[str, Tensor], r: dict[str, Tensor]) -> dict[str, Tensor]:
    """m = g + (1 - g) r ([VPD] section 2), all (..., C + 1), the sources r in [0, 1].

    g = 1 pins a mask to 1; g = 0 leaves it to the source: chance (stochastic loss) or an adversary.
    """
    return {path: g[path] + (1 - g[path]) * r[path] for path in g}


# ---------------------------------------------------------------------------------------------------------------------
# 4  Causal importance functions: who predicts the scores
#
# Both take the inputs of the decomposed matrices on the plain forward pass, {path: (..., d_in)}, with U and V, and return raw
# scores {path: (..., C)}. Which is used is `Config.G`.
# ---------------------------------------------------------------------------------------------------------------------


class ImportanceMLPs(nn.Module):
    """One tiny MLP (16 GELUs) per subcomponent, from its own activation to its score ([SPD] appendix). For toy models.

    The input is the subcomponent activation ||U_c|| V_c^T x, and not V_c^T x: then a subcomponent whose weights have shrunk to
    nothing sees nothing and stays off, where it otherwise goes on firing a little on rare inputs. All weights enter by their
    absolute values, so that a score rises with the activation but for the little dip of GELU: a subcomponent detects one sign of
    it. Otherwise two features that point in almost opposite directions are often caught by one subcomponent, which training
    cannot part again. All subcomponents of all matrices are evaluated in two batched matrix products.
    """

    def __init__(self, shapes: dict[str, tuple[int, int]], config: Config):
        super().__init__()
        self.sizes, hidden = [C for _, C in shapes.values()], 16
        C = sum(self.sizes)
        self.w_in = nn.Parameter(torch.randn(C, 1, hidden))
        self.b_in = nn.Parameter(torch.zeros(C, 1, hidden))
        self.w_out = nn.Parameter(torch.randn(C, hidden, 1) / hidden**0.5)
        self.b_out = nn.Parameter(torch.zeros(C, 1, 1))

    def forward(self, inputs: dict[str, Tensor], U: dict[str, Tensor], V: dict[str, Tensor]) -> dict[str, Tensor]:
        norms = {path: U[path].detach().norm(dim=-1) for path in inputs}  # (C,), a scale to read by, not a thing to train
        a = torch.cat([x @ V[path] * norms[path] for path, x in inputs.items()], -1)  # (..., sum C)
        a_by_c = a.reshape(-1, a.shape[-1]).T[..., None]  # (sum C, positions, 1)
        h = F.gelu(torch.baddbmm(self.b_in, a_by_c, self.w_in.abs()))  # (sum C, positions, 16)
        z = torch.baddbmm(self.b_out, h, self.w_out.abs()).squeeze(-1).T.reshape(a.shape)  # (..., sum C)
        return dict(zip(inputs, z.split(self.sizes, -1)))


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding (RoPE, arXiv 2104.09864), base 10,000. x: (B, heads, T, d) with d even, same shape out."""
    T, half = x.shape[-2], x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(T, device=x.device)[:, None] * frequency  # (T, d / 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class ImportanceBlock(nn.Module):
    """Pre-norm transformer block: RMSNorm -> attention with RoPE, no causal mask; RMSNorm -> GELU MLP. (B, T, width)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(B, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, width / heads)
        # No causal mask: whether a weight matters here may depend on what later positions do with it.
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, width))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class ImportanceTransformer(nn.Module):
    """One shared bidirectional transformer over all matrices' inputs ([VPD] section 3). For inputs (B, T, d_in).

    Each input is RMS-normalised, all are concatenated, projected to the width, and read out to all scores at once.
    """

    def __init__(self, shapes: dict[str, tuple[int, int]], config: Config):
        super().__init__()
        width = config.G_width
        self.sizes = [C for _, C in shapes.values()]
        self.project = nn.Linear(sum(d_in for d_in, _ in shapes.values()), width)
        self.blocks = nn.Sequential(*(ImportanceBlock(width, config.G_heads) for _ in range(config.G_blocks)))
        self.read_out = nn.Linear(width, sum(self.sizes))
        nn.init.constant_(self.read_out.bias, 0.5)  # every subcomponent starts half important

    def forward(self, inputs: dict[str, Tensor], U: dict[str, Tensor], V: dict[str, Tensor]) -> dict[str, Tensor]:
        x = torch.cat([F.rms_norm(x, x.shape[-1:]) for x in inputs.values()], -1)  # (B, T, sum d_in)
        z = self.read_out(self.blocks(self.project(x)))  # (B, T, sum C)
        return dict(zip(inputs, z.split(self.sizes, -1)))


def importance_function(V: dict[str, Tensor], config: Config) -> nn.Module:
    """A new causal importance function for matrices with the read directions V {path: (d_in, C)}."""
    kind = {"mlp": ImportanceMLPs, "transformer": ImportanceTransformer}[config.G]
    return kind({path: tuple(v.shape) for path, v in V.items()}, config)


# ---------------------------------------------------------------------------------------------------------------------
# 5  The five losses ([VPD] section 4)
# ---------------------------------------------------------------------------------------------------------------------


def mse(target: Tensor, output: Tensor) -> Tensor:
    """Mean squared error over all entries, for regression. Both (..., d); scalar."""
    return F.mse_loss(output.float(), target.float())


def kl(target: Tensor, output: Tensor) -> Tensor:
    """KL(target || output) in nats, averaged over positions, for logits (..., vocabulary); scalar."""
    target, output = target.float().log_softmax(-1), output.float().log_softmax(-1)
    return F.kl_div(output, target, reduction="none", log_target=True).sum(-1).mean()


def route(masks: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Subset routing: at each position on its own, k ~ Uniform{1..L}, and a uniformly random k of the L matrices stay masked.

    The other matrices get masks of ones there, which is the target's own weight. It unifies masking all matrices at once
    (do errors add up?) and one at a time (is each one right by itself?).
    """
    L, some = len(masks), next(iter(masks.values()))
    order = torch.rand(*some.shape[:-1], L, generator=generator, device=some.device).argsort(-1)  # (..., L), at random
    k = torch.randint(1, L + 1, (*some.shape[:-1], 1), generator=generator, device=some.device)  # (..., 1)
    return {path: torch.where((order < k)[..., l, None], m, 1.0) for l, (path, m) in enumerate(masks.items())}


def stochastic_reconstruction(model, U, V, g, batch, target, divergence: Divergence, generator) -> Tensor:
    """Loss 1. Divergence from the target under r ~ U(0, 1) and subset routing: one sample, one forward pass; scalar."""
    r = {path: torch.rand(x.shape, generator=generator, device=x.device) for path, x in g.items()}
    return divergence(target, masked_forward(model, U, V, route(make_masks(g, r), generator), batch))


def adversarial_reconstruction(model, U, V, g, batch, target, divergence: Divergence, sources) -> Tensor:
    """Loss 2. Divergence from the target under the adversary's sources (section 6), all matrices masked; scalar.

    (One sentence of the paper's appendix says subset routing here too; its configuration says all matrices, as we do.)
    """
    return divergence(target, masked_forward(model, U, V, make_masks(g, sources), batch))


def importance_sums(z: dict[str, Tensor], p: float) -> tuple[Tensor, int]:
    """What losses 3 and 4 share: S_c = sum over positions of |g_c|^p, (sum C,), and the number of positions.

    S is a sum over the GLOBAL batch: add the S (and the numbers) of the parts of a split batch before taking the losses.
    """
    # upper-leaky here, lower-leaky in the masks: above 1 only these losses push (down), below 0 only reconstruction does (up)
    g = torch.cat([upper_leaky(score.float()).flatten(0, -2) for score in z.values()], -1)  # (positions, sum C)
    return (g + 1e-12).pow(p).sum(0), len(g)  # 1e-12: for p < 1 the slope at g = 0 is infinite


def importance_minimality(S: Tensor, positions: int) -> Tensor:
    """Loss 3. |g|^p, summed over subcomponents, averaged over positions; scalar. Few subcomponents on any one input."""
    return S.sum() / positions


def frequency_minimality(S: Tensor, positions: int) -> Tensor:
    """Loss 4. sum_c S_c log2(1 + S_c) / positions; scalar. Superlinear in how often a subcomponent is used: one that
    serves two unrelated inputs costs more than two that serve one each."""
    return (S * torch.log2(1 + S)).sum() / positions


def delta_l2(model: nn.Module, U: dict, V: dict) -> Tensor:
    """Loss 5. The mean of Delta^2 over all decomposed weights; scalar. The only place where Delta is built."""
    weights = {path: model.get_submodule(path).weight.detach().float() for path in U}
    squares = [(W - (V[path] @ U[path]).T).square().sum() for path, W in weights.items()]
    return sum(squares) / sum(W.numel() for W in weights.values())


# ---------------------------------------------------------------------------------------------------------------------
# 6  The adversary
#
# Random sources rarely find the worst ablation; searching for it anew at every step would be too slow. So one tensor of
# sources persists over the whole training, an entry for each mask at each place in the batch, and every step moves it a
# little uphill on the reconstruction loss. The data at a place changes from step to step: what such an adversary gets good
# at is what hurts on many inputs. Its memory: four times the batch's causal importances (value, gradient, Adam's moments).
# ---------------------------------------------------------------------------------------------------------------------


def start_adversary(shapes: dict[str, tuple[int, ...]], device, config: Config) -> tuple[dict[str, Tensor], torch.optim.Adam]:
    """Sources ~ U(0, 1) of the given shapes {path: (..., C + 1)}, and the optimizer that moves them uphill."""
    sources = {path: torch.rand(shape).to(device).requires_grad_() for path, shape in shapes.items()}
    # eps is far below the gradient of one source, which shrinks with the batch that the divergence is averaged over
    ascent = torch.optim.Adam(sources.values(), lr=config.adversary_lr, betas=(0.5, 0.99), eps=1e-20, maximize=True)
    return sources, ascent


@torch.no_grad()
def ascend(ascent: torch.optim.Optimizer, gradients: list[Tensor]) -> None:
    """One step of the adversary along the given gradients of its sources, which then go back into [0, 1]."""
    (group,) = ascent.param_groups
    for source, gradient in zip(group["params"], gradients):
        source.grad = gradient
    ascent.step()
    for source in group["params"]:
        source.clamp_(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# 7  The training step
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Decomposition:
    """What training finds: U {path: (C, d_out)}, V {path: (d_in, C)}, and the causal importance function G."""

    U: dict[str, Tensor]
    V: dict[str, Tensor]
    G: nn.Module


@dataclass
class Training:
    """Everything that changes while training, and so everything that a checkpoint holds."""

    decomposition: Decomposition
    optimizer: torch.optim.Optimizer  # of U, V and G
    sources: dict[str, Tensor]  # the persistent adversary's, {path: (..., C + 1)}
    ascent: torch.optim.Optimizer  # of the sources, uphill
    data: torch.Generator  # for batches, on the CPU
    noise: torch.Generator  # for stochastic sources and routing, on the model's device
    step: int = 0  # steps done
    seconds: float = 0.0  # spent so far


# Under torchrun, several processes train together. Each has its own share of the global batch, its own noise and its own
# sources; U, V and G are alike on all. Alone, a process is number 0 of 1.


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def global_sum(S: Tensor) -> Tensor:
    """The sum of S over all processes. Its gradient is scaled by their number, because gradients are averaged afterwards."""
    if processes() == 1:
        return S
    total = S.detach().clone()
    dist.all_reduce(total)
    return total + processes() * (S - S.detach())


@torch.no_grad()
def average(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over all processes."""
    if processes() > 1:
        for x in tensors:
            dist.all_reduce(x)
            x /= processes()


def barrier() -> None:
    """Wait until all processes are here."""
    if processes() > 1:
        dist.barrier()


@contextlib.contextmanager
def rank_0_first():
    """What is inside is done by process 0 alone, and then by the others, who find what it left."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values, as constants: no gradient is computed for them."""
    return {path: x.detach() for path, x in tensors.items()}


def training_step(model, batch: Tensor, divergence: Divergence, training: Training, config: Config) -> dict[str, float]:
    """One step of VPD ([VPD] section 5) on one batch. Changes `training`; returns the losses and the gradient norms.

    Raises BadInput, before anything is changed but the sources, if a loss or a gradient is not finite.
    """
    U, V, G = training.decomposition.U, training.decomposition.V, training.decomposition.G
    sources, noise, done = training.sources, training.noise, training.step / config.steps
    UV, G_parameters, r = [*U.values(), *V.values()], list(G.parameters()), list(sources.values())

    # Schedules
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    training.optimizer.param_groups[0]["lr"] = config.lr * (config.lr_final + (1 - config.lr_final) * cosine)
    training.ascent.param_groups[0]["lr"] = config.adversary_lr * min(1, (training.step + 1) / (0.025 * config.steps))
    p = config.p_start + (config.p_end - config.p_start) * done
    price = config.price_start ** (1 - done)

    with torch.autocast(batch.device.type, torch.bfloat16, enabled=config.bf16):
        # The target, and what G thinks is needed of it here
        target, inputs = forward_with_inputs(model, U, batch)
        z = G(inputs, U, V)  # {path: (..., C)}
        g = causal_importances(z)  # {path: (..., C + 1)}

        # The adversary's inner ascent: all but the sources is constant, so that no gradient is computed to be thrown away
        fixed = detached(U), detached(V), detached(g)
        for _ in range(config.adversary_steps if config.adversarial else 0):
            loss = adversarial_reconstruction(model, *fixed, batch, target, divergence, sources)
            ascend(training.ascent, torch.autograd.grad(loss, r))

        # The reconstruction losses. The gradient of each is taken as soon as it is known, and ends at a copy of g that is cut off
        # from G: so only one graph of masked weights is in memory at a time. Later G is gone through once, with the sum.
        for x in UV + G_parameters + r:
            x.grad = None
        losses, cut = {}, {path: x.detach().requires_grad_() for path, x in g.items()}
        if config.stochastic:
            losses["stochastic"] = stochastic_reconstruction(model, U, V, cut, batch, target, divergence, noise)
            torch.autograd.backward(config.stochastic * losses["stochastic"], inputs=[*UV, *cut.values()])
        if config.adversarial:
            losses["adversarial"] = adversarial_reconstruction(model, U, V, cut, batch, target, divergence, sources)
            torch.autograd.backward(config.adversarial * losses["adversarial"], inputs=[*UV, *cut.values(), *r])
    S, positions = importance_sums(z, p)
    S, all_positions = global_sum(S), positions * processes()
    losses["importance"] = importance_minimality(S, all_positions)
    losses["frequency"] = frequency_minimality(S, all_positions)
    losses["delta"] = delta_l2(model, U, V)
    rest = price * config.importance * losses["importance"] + price * config.frequency * losses["frequency"] + config.delta * losses["delta"]
    reconstruction = [(x, cut[path].grad) for path, x in g.items() if cut[path].grad is not None]
    torch.autograd.backward([rest, *(x for x, _ in reconstruction)], [None, *(grad for _, grad in reconstruction)], inputs=UV + G_parameters)
    losses = {name: x.detach() for name, x in losses.items()}
    average([x.grad for x in UV + G_parameters])  # over processes; the sources are each one's own
    l0 = {"L0": sum((score > 0).sum() for score in z.values()) / positions}
    norms = {
        "gradient of U and V": nn.utils.clip_grad_norm_(UV, config.clip_UV),
        "gradient of G": nn.utils.clip_grad_norm_(G_parameters, config.clip_G),
    }
    values = finite_or_stop({**losses, **l0, **norms}, target, training.step)
    training.optimizer.step()
    if config.adversarial:  # the third ascent step comes free; undo the coefficient, for one scale in Adam's moments
        ascend(training.ascent, [x.grad / config.adversarial for x in r])
    training.step += 1
    return values


def finite_or_stop(values: dict[str, Tensor], target: Tensor, step: int) -> dict[str, float]:
    """The values as numbers, averaged over processes, or BadInput that names the first that is not finite."""
    stacked = torch.stack(list(values.values()))  # one synchronisation with the device for all
    average([stacked])
    numbers = dict(zip(values, stacked.tolist()))
    for name, number in numbers.items():
        if not math.isfinite(number):
            if not target.isfinite().all():
                name = "target model's output"
            raise BadInput(f"the {name} is not finite at step {step}; the last checkpoint is kept. Lower lr, or look at the data")
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# 8  decompose: checks, faithfulness warm-up, the loop, checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def decompose(
    model: nn.Module,
    C: dict[str, int],
    get_batch: Callable[[torch.Generator], Tensor],
    divergence: Divergence,
    config: Config = Config(),
    out: str | Path | None = None,
    checkpoint_seconds: float = 60,
) -> Decomposition:
    """Decompose the `nn.Linear`s named by the keys of C into C[path] subcomponents each.

    model: in eval mode, on the device to be used; called as model(batch). Its parameters are never changed.
    get_batch(generator): a batch of inputs, all of one shape, drawn with nothing but the given CPU generator.
    divergence: `kl` or `mse`, or any function (target output, masked output) -> scalar averaged over positions.
    out: a folder for run.json (what made the run), log.jsonl (a line of losses every 1/200 of the run) and checkpoint.pt.
        If it holds this same run, unfinished, the run goes on from its last checkpoint, and on CPU ends bit for bit as if
        it had never stopped; if finished, it is loaded. A checkpoint is written every `checkpoint_seconds` and at the end.

    Raises BadInput before any training: see `check`, `claim_folder`, `load_checkpoint`; while training: see `training_step`.
    """
    batch = get_batch(torch.Generator().manual_seed(config.seed))
    inputs = check(model, C, batch, config)
    with rank_0_first():
        folder = out and claim_folder(Path(out), model, C, config)
    training = start(model, C, inputs, config)
    if folder and (folder / "checkpoint.pt").exists():
        load_checkpoint(folder, training)
    elif folder and rank() == 0:
        (folder / "log.jsonl").unlink(missing_ok=True)  # of a run killed before its first checkpoint
    if training.step == 0:
        faithfulness_warmup(model, training.decomposition, config)

    device, shape = next(iter(inputs.values())).device, batch.shape
    began, saved = time.monotonic() - training.seconds, time.monotonic()
    every = max(1, config.steps // 200)  # steps between lines of the log
    began_step, began_here = training.step, time.monotonic()
    while training.step < config.steps:
        batch = get_batch(training.data)
        if batch.shape != shape:
            raise BadInput(f"batch {training.step} has shape {tuple(batch.shape)}, the first had {tuple(shape)}: all must be alike")
        values = training_step(model, batch.to(device), divergence, training, config)
        training.seconds = time.monotonic() - began
        last = training.step == config.steps
        if rank() == 0 and (last or training.step % every == 0):
            report(values, training, config, (time.monotonic() - began_here) / (training.step - began_step), folder)
        due = torch.tensor(float(last or time.monotonic() - saved > checkpoint_seconds), device=device)
        average([due])  # all processes save at the same step: as soon as it is due for one of them
        if folder and due > 0:
            save_checkpoint(folder, training)
            saved = time.monotonic()
    return training.decomposition


def best_device() -> str:
    """cuda, mps or cpu, the first that there is."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def check(model: nn.Module, C: dict[str, int], batch: Tensor, config: Config) -> dict[str, Tensor]:
    """Refuse, in one line and before any training, what cannot be decomposed. Returns the inputs {path: (..., d_in)}."""
    if config.steps < 1:
        raise BadInput(f"steps is {config.steps}: there must be at least 1")
    if config.G_width % (2 * config.G_heads):
        raise BadInput(f"G_width is {config.G_width}: it must be a multiple of 2 * G_heads = {2 * config.G_heads}")
    if config.G not in ("mlp", "transformer"):
        raise BadInput(f"G is {config.G!r}: there are 'mlp' and 'transformer'")
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not C:
        raise BadInput(f"no matrix to decompose: give C = {{path: number of subcomponents}}; the model's nn.Linears are {', '.join(linears)}")
    for path, number in C.items():
        if path not in linears:
            nearest = difflib.get_close_matches(path, linears, n=3, cutoff=0.0)
            raise BadInput(f"{path!r} is not an nn.Linear of the model; the nearest that are: {', '.join(nearest) or 'none'}")
        if not isinstance(number, int) or number < 1:
            raise BadInput(f"C[{path!r}] is {number!r}: the number of subcomponents must be a whole number of at least 1")
        if (dtype := model.get_submodule(path).weight.dtype) != torch.float32:
            raise BadInput(f"{path}.weight is {dtype}: call model.float() first, U and V are float32 too")
    storage = {}  # of each parameter, to find those that share memory (also as a view, such as a transpose)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        storage.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
    for path in C:
        others = [name for names in storage.values() if f"{path}.weight" in names for name in names if name != f"{path}.weight"]
        if others:
            raise BadInput(f"{path}.weight is tied to {', '.join(others)}: give the matrix a copy of its own, or leave it out")
    if model.training:
        raise BadInput("the model is in training mode, where dropout and the like change its output: call model.eval() first")

    device = model.get_submodule(next(iter(C))).weight.device
    target, inputs = forward_with_inputs(model, C, batch.to(device))
    if not target.isfinite().all():
        raise BadInput("the target model's output is not finite on the first batch: look at its weights and at the data")
    for path in C:
        if path not in inputs:
            raise BadInput(f"{path} does not run in the model's forward pass: leave it out")
    shapes = {path: tuple(x.shape[:-1]) for path, x in inputs.items()}
    if len(set(shapes.values())) > 1:
        raise BadInput(f"the decomposed matrices see inputs of different shapes {shapes}: decompose those with equal ones together")
    shape = tuple(next(iter(inputs.values())).shape)
    if config.G == "transformer" and len(shape) != 3:
        raise BadInput(f"the decomposed matrices see inputs {shape}, not (batch, positions, width): set G='mlp'")
    return inputs


def start(model: nn.Module, C: dict[str, int], inputs: dict[str, Tensor], config: Config) -> Training:
    """A run at step 0: V ~ N(0, 1/d_in), U ~ N(0, 1/C), sources ~ U(0, 1). The same on every device, for one seed."""
    device = next(iter(inputs.values())).device
    weights = {path: model.get_submodule(path).weight for path in C}  # (d_out, d_in)
    with torch.random.fork_rng(devices=[]):  # leaves the user's random state alone
        torch.manual_seed(config.seed)
        V = {path: torch.randn(W.shape[1], C[path]) / W.shape[1] ** 0.5 for path, W in weights.items()}
        U = {path: torch.randn(C[path], W.shape[0]) / C[path] ** 0.5 for path, W in weights.items()}
        G = importance_function(V, config).to(device)
        shapes = {path: (*x.shape[:-1], C[path] + 1) for path, x in inputs.items()}
        torch.manual_seed(config.seed + 2_000_003 * rank())  # from here on every process has its own luck
        sources, ascent = start_adversary(shapes, device, config)
    U, V = ({path: x.to(device).requires_grad_() for path, x in tensors.items()} for tensors in (U, V))
    # betas[1] = 0.99: with 0.999, gradients from when everything was active still damp the last steps that switch things off
    parameters, fused = [*U.values(), *V.values(), *G.parameters()], device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0, fused=fused)
    data = torch.Generator().manual_seed(config.seed + 2_000_003 * rank())
    noise = torch.Generator(device).manual_seed(config.seed + 1_000_003 + 2_000_003 * rank())  # another stream than the data's
    return Training(Decomposition(U, V, G), optimizer, sources, ascent, data, noise)


def faithfulness_warmup(model: nn.Module, decomposition: Decomposition, config: Config) -> None:
    """Before the training: U and V alone are fitted to the weights (AdamW, lr 1e-3, on Delta-L2)."""
    U, V = decomposition.U, decomposition.V
    optimizer = torch.optim.AdamW([*U.values(), *V.values()], lr=1e-3, weight_decay=0)
    for _ in range(config.warmup_steps):
        optimizer.zero_grad()
        delta_l2(model, U, V).backward()
        optimizer.step()


def claim_folder(folder: Path, model: nn.Module, C: dict[str, int], config: Config) -> Path:
    """Make the run folder and write run.json: settings, versions and a fingerprint of the target model.

    Raises BadInput if the folder already holds a run with other settings or another target.
    """
    digest = hashlib.sha256()
    for name, x in model.state_dict().items():
        digest.update(name.encode() + x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    run = {"config": dataclasses.asdict(config), "C": C, "target": digest.hexdigest()[:16], "processes": processes()}
    path = folder / "run.json"
    if path.exists():
        try:
            found = json.loads(path.read_text())
            differences = [k for part in ("config", "C") for k in run[part] | found[part] if run[part].get(k) != found[part].get(k)]
            differences += ["order of the matrices"] if list(C) != list(found["C"]) else []
            differences += [name for key, name in (("target", "target model"), ("processes", "number of processes")) if found[key] != run[key]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{path} cannot be read: choose another folder, or delete {folder}") from None
        if differences:
            raise BadInput(f"{folder} holds another run (it differs in: {', '.join(differences)}): choose another folder, or delete it")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "threads": torch.get_num_threads()}
        with replacing(path) as file:
            file.write(json.dumps({**run, "versions": versions}, indent=1).encode())
    return folder


@contextlib.contextmanager
def replacing(path: Path):
    """A binary file that takes the place of `path` only when it is complete and on disk: a kill leaves the old one whole."""
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def save_checkpoint(folder: Path, training: Training) -> None:
    """Write all of `training` to checkpoint.pt, and how long the log is, so that a resumed run continues it without a seam.

    Of several processes, each but the first writes its own part to a file named by the step, before checkpoint.pt is replaced,
    and deletes the one before, after it: at any moment checkpoint.pt finds the files of its step.
    """
    own = {"sources": training.sources, "ascent": training.ascent.state_dict()}
    own |= {"data": training.data.get_state(), "noise": training.noise.get_state()}
    mine, log = own_checkpoint(folder, training.step), folder / "log.jsonl"
    if rank() > 0:
        with replacing(mine) as file:
            torch.save(own, file)
    barrier()
    if rank() == 0:
        found, log_bytes = training.decomposition, log.stat().st_size if log.exists() else 0
        shared = {"U": found.U, "V": found.V, "G": found.G.state_dict(), "optimizer": training.optimizer.state_dict()}
        shared |= {"step": training.step, "seconds": training.seconds, "log_bytes": log_bytes}
        with replacing(folder / "checkpoint.pt") as file:
            torch.save(shared | own, file)
    barrier()
    for old in set(folder.glob(f"checkpoint_{rank()}_*.pt")) - {mine}:
        old.unlink()


def own_checkpoint(folder: Path, step: int) -> Path:
    """Where a process that is not the first saves its sources and random states."""
    return folder / f"checkpoint_{rank()}_{step}.pt"


def load_checkpoint(folder: Path, training: Training) -> None:
    """Continue `training` from checkpoint.pt. Raises BadInput if the file is damaged or not of this run."""
    path = folder / "checkpoint.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if rank() > 0:
            state |= torch.load(own_checkpoint(folder, state["step"]), map_location="cpu", weights_only=True)
        for name, mine in (("U", training.decomposition.U), ("V", training.decomposition.V), ("sources", training.sources)):
            if {k: x.shape for k, x in mine.items()} != {k: x.shape for k, x in state[name].items()}:
                raise ValueError("matrices or shapes differ")
            for key, x in mine.items():
                x.data.copy_(state[name][key])
        training.decomposition.G.load_state_dict(state["G"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.ascent.load_state_dict(state["ascent"])
        training.data.set_state(state["data"])
        training.noise.set_state(state["noise"])
        training.step, training.seconds = state["step"], state["seconds"]
        log_bytes = state["log_bytes"]
    except Exception as error:  # torch.load raises almost anything on a file that is not its own
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise BadInput(f"{path} is damaged or is not of this run ({reason}): delete it to start this run anew") from error
    if rank() == 0 and (folder / "log.jsonl").exists():
        os.truncate(folder / "log.jsonl", log_bytes)  # steps after the checkpoint will be logged again


def load_decomposition(folder: Path, config: Config, device="cpu") -> Decomposition:
    """What a finished run found, from its checkpoint.pt, to be read and not to be trained on."""
    state = torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)
    G = importance_function(state["V"], config).to(device)
    G.load_state_dict(state["G"])
    return Decomposition(state["U"], state["V"], G)


def progress(line: str, last: bool, milestone: bool) -> None:
    """Show a line of progress on the terminal, over the one before; in a file or a pipe only the milestones, a line each."""
    if sys.stderr.isatty():
        print(f"\r{line}\033[K", end="\n" if last else "", file=sys.stderr, flush=True)
    elif milestone:
        print(line, file=sys.stderr, flush=True)


def report(values: dict[str, float], training: Training, config: Config, seconds_per_step: float, folder: Path | None) -> None:
    """One line of progress, with the time left, on the terminal; the same numbers, in full, appended to log.jsonl."""
    left = (config.steps - training.step) * seconds_per_step
    numbers = "  ".join(f"{name} {value:.2g}" for name, value in values.items() if not name.startswith("gradient"))
    line = f"step {training.step}/{config.steps}  {numbers}  {1 / seconds_per_step:.0f} steps/s  {left:.0f} s left"
    last = training.step == config.steps
    progress(line, last, last or training.step % (20 * max(1, config.steps // 200)) == 0)
    if folder:
        with open(folder / "log.jsonl", "a") as log:
            log.write(json.dumps({"step": training.step, "seconds": training.seconds, **values}) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# 9  Evaluation: how we know that it worked ([VPD] section 6)
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict_importances(model: nn.Module, decomposition: Decomposition, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The target's output on a batch, and the causal importances {path: (..., C + 1)} of the subcomponents there."""
    target, inputs = forward_with_inputs(model, decomposition.U, batch)
    return target, causal_importances(decomposition.G(inputs, decomposition.U, decomposition.V))


def evaluation_masks(g: dict[str, Tensor], generator: torch.Generator) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The maskings under which a decomposition is judged, (name, {path: (..., C + 1)}) one by one.

    Delta's mask is 0 in all, also in "unmasked": what is judged are the subcomponents alone. No routing.
    """
    maskings = {
        "unmasked": torch.ones_like,
        "stochastic": lambda x: x + (1 - x) * torch.rand(x.shape, generator=generator, device=x.device),
        "rounded_0": lambda x: (x > 0).to(x),
        "rounded_0.1": lambda x: (x > 0.1).to(x),
        "rounded_0.5": lambda x: (x > 0.5).to(x),
        "importance": lambda x: x,
        "ablated": torch.zeros_like,
    }
    for name, f in maskings.items():
        yield name, {path: F.pad(f(x[..., :-1]), (0, 1)) for path, x in g.items()}


@torch.no_grad()
def evaluate(
    model: nn.Module, decomposition: Decomposition, batches: list[Tensor], divergence: Divergence, seed=0, loss: Callable | None = None
) -> dict:
    """All figures that every decomposition reports, as a dict for JSON; batches: the evaluation set, on the model's device.

    "matrices", of each, and "total": "C"; "alive", how many subcomponents have a mean causal importance above ALIVE; "l0", how many
    have g > 0 at a position, on average; of each matrix also "mean_importance" (sorted, it is the spectrum). "divergence" from the
    target, by masking. "adversary": the same under a fresh one. "delta": the mean of Delta^2. With loss(batch, output) -> scalar,
    what the target was trained on, "loss": that of the target, and how far each masking lies above it.
    """
    U, V, n = decomposition.U, decomposition.V, len(batches)
    device = next(iter(U.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    means = {path: torch.zeros(len(u), device=device) for path, u in U.items()}  # of g, (C,)
    l0, divergences, losses, cases = dict.fromkeys(U, 0.0), collections.Counter(), collections.Counter(), []
    for batch in batches:
        target, g = predict_importances(model, decomposition, batch)
        cases.append((batch, target, g))
        for path, x in g.items():
            x = x[..., :-1].flatten(0, -2)  # (positions, C)
            means[path] += x.mean(0) / n
            l0[path] += (x > 0).sum(-1).float().mean().item() / n
        for name, masks in evaluation_masks(g, generator):
            output = masked_forward(model, U, V, masks, batch)
            divergences[name] += divergence(target, output).item() / n
            losses[name] += loss(batch, output).item() / n if loss else 0
        losses["target"] += loss(batch, target).item() / n if loss else 0
    matrices = {}
    for path, mean in means.items():
        alive = int((mean > ALIVE).sum())
        matrices[path] = {"C": len(mean), "alive": alive, "l0": l0[path], "l0_per_alive": l0[path] / max(1, alive)}
        matrices[path]["mean_importance"] = mean.tolist()
    total = {key: sum(matrix[key] for matrix in matrices.values()) for key in ("C", "alive", "l0")}
    with torch.enable_grad():
        adversary = fresh_adversary(model, decomposition, cases, divergence, {path: (len(u) + 1,) for path, u in U.items()}, seed=seed)
    return {
        "alive_threshold": ALIVE,
        "matrices": matrices,
        "total": {**total, "l0_per_alive": total["l0"] / max(1, total["alive"])},
        "divergence": dict(divergences),
        **({"loss": {name: x - (name != "target") * losses["target"] for name, x in losses.items()}} if loss else {}),
        "adversary": adversary,
        "delta": delta_l2(model, U, V).item(),
    }


def fresh_adversary(model, decomposition, cases, divergence: Divergence, shapes: dict, movable=None, seed: int = 0) -> dict[str, float]:
    """Attack ([VPD] section 6): divergence after 20, 40 and 80 steps of sign ascent from chance, {"20": ..., "40": ..., "80": ...}.

    cases: [(batch, target output, g), ...], attacked together. shapes {path: ...} of the sources: (C + 1,) for ONE source per mask
    shared by all positions of all cases, so that what is found is a systematic flaw and not the noise of single inputs; (..., C + 1)
    for each position its own. movable: bools of these shapes, what the adversary may move (default: all, also Delta's).
    """
    U, V = detached(decomposition.U), detached(decomposition.V)
    device = next(iter(U.values())).device
    generator, found = torch.Generator(device).manual_seed(seed), {}
    sources = {path: torch.rand(shape, generator=generator, device=device).requires_grad_() for path, shape in shapes.items()}
    began = time.monotonic()
    for step in range(81):
        total, gradients = 0.0, [torch.zeros_like(r) for r in sources.values()]
        for batch, target, g in cases:
            loss = adversarial_reconstruction(model, U, V, g, batch, target, divergence, sources) / len(cases)
            gradients = [a + b for a, b in zip(gradients, torch.autograd.grad(loss, list(sources.values())))]
            total += loss.item()
        if step in (20, 40, 80):
            found[str(step)] = total
        if (spent := time.monotonic() - began) > 5:
            left = spent / (step + 1) * (80 - step)
            progress(f"fresh adversary: step {step}/80  divergence {total:.2g}  {left:.0f} s left", step == 80, step == 20)
        for (path, r), gradient in zip(sources.items(), gradients):
            r.data.add_(0.1 * gradient.sign() * (movable[path] if movable else 1)).clamp_(0, 1)
    return found


def draw_spectrum(metrics: dict, file: Path) -> None:
    """The spectrum: all mean causal importances, sorted, per matrix. A cliff separates the alive from the dead."""
    import matplotlib.pyplot as plt  # here, so that the method itself runs without it

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for number, (path, matrix) in enumerate(metrics["matrices"].items()):
        mean = sorted(matrix["mean_importance"], reverse=True)
        label = f"{path}: {matrix['alive']} alive of {matrix['C']}"
        axis.plot(range(1, len(mean) + 1), [max(x, 1e-8) for x in mean], marker=".", linestyle=("-", "--", ":")[number % 3], label=label)
    axis.axhline(ALIVE, color="gray", linewidth=1, label=f"alive above {ALIVE:g}")
    axis.set(yscale="log", xlabel="subcomponent, sorted", ylabel="mean causal importance (at least 1e-8)", title="Spectrum")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_losses(log: Path, file: Path) -> None:
    """The five losses, without their coefficients, and L0 over the training steps, from log.jsonl."""
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name in lines[0]:
        if name not in ("step", "seconds") and not name.startswith("gradient"):
            axis.plot([line["step"] for line in lines], [line[name] for line in lines], label=name)
    axis.set(yscale="log", xlabel="step", ylabel="loss, or L0", title="Losses and L0 over the training")
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# 10  Reading a decomposition ([VPD] section 8)
# ---------------------------------------------------------------------------------------------------------------------


def cut_forward(model, decomposition: Decomposition, masks: dict, batch: Tensor, embeddings=()) -> tuple[Tensor, dict, dict]:
    """A masked forward pass in which the output of every decomposed matrix and embedding, its *write*, is cut off from its input.

    So the gradient of anything later with respect to a write is its direct effect, not one through further decomposed matrices.
    embeddings: paths of modules that are no decomposed matrices, but whose outputs are writes too.
    Returns the output; the subcomponent activations a_c = ||U_c|| V_c^T x, {path: (..., C)}; and the writes, leaves of the graph
    of gradients, {path: (..., d_out)}, in the order in which they run.
    """
    U, V = detached(decomposition.U), detached(decomposition.V)
    activations, writes = {}, {}

    def cutter(path):
        def hook(module, args, output):
            if path in U:
                activations[path] = args[0] @ V[path] * U[path].norm(dim=-1)
                output = masked_linear(module, args[0], output, U[path], V[path], masks[path])
            writes[path] = output.detach().requires_grad_()
            return writes[path]

        return hook

    with _hooked(model, {path: cutter(path) for path in (*embeddings, *U)}):
        output = model(batch)
    return output, activations, writes


def attributions(value: Tensor, decomposition: Decomposition, masks: dict, activations: dict, writes: dict) -> dict[str, Tensor]:
    """How much every subcomponent adds directly to `value`, a scalar of a `cut_forward`: {path: (..., C + 1)}.

    (d value / d a_c) a_c m_c; the last column is of the matrix's bias and Delta. For an embedding: (..., 1). Linearised at this
    input: where value depends linearly on what is written, all of them add up to it.
    """
    found = {}
    if not value.requires_grad:  # of the first matrix: nothing writes to what it reads
        return found
    gradients = torch.autograd.grad(value, list(writes.values()), retain_graph=True, allow_unused=True)
    for (path, write), gradient in zip(writes.items(), gradients):
        if gradient is None:
            continue  # it runs after what value depends on
        found[path] = (gradient * write).sum(-1, keepdim=True)
        if path in decomposition.U:
            unit = F.normalize(decomposition.U[path].detach(), dim=-1)  # U_c / ||U_c||
            parts = masks[path][..., :-1] * activations[path].detach() * (gradient @ unit.T)  # (..., C)
            found[path] = torch.cat([parts, found[path] - parts.sum(-1, keepdim=True)], -1)
    return found


def attribution_graph(model, decomposition: Decomposition, g: dict, batch: Tensor, outcome: Callable, embeddings=(), share: float = 0.0) -> dict:
    """The attribution graph of one input (1, T): who contributes directly to whom, and to outcome(output), a scalar.

    Nodes: every subcomponent at every position with g > 0, every embedding at every position, and the outcome, in the order in
    which they run. Edges: those whose attribution has at least this share of all that (in absolute value) goes into their target.
    Returns {"nodes": [{"matrix", "position", "subcomponent", "importance", "activation"}, ...],
    "edges": [{"source", "target" (numbers of nodes), "attribution", "share"}, ...]}.
    """
    output, activations, writes = cut_forward(model, decomposition, g, batch, embeddings)
    nodes, number, values = [], {}, []
    for path, write in writes.items():
        for t, c in g[path][0, :, :-1].nonzero().tolist() if path in g else [(t, 0) for t in range(write.shape[-2])]:
            number[path, t, c] = len(nodes)
            values.append(activations[path][0, t, c] if path in g else None)
            known = {"importance": g[path][0, t, c].item(), "activation": values[-1].item()} if path in g else {}
            nodes.append({"matrix": path, "position": t, "subcomponent": c, **known})
    nodes.append({"matrix": "outcome", "position": batch.shape[1] - 1, "subcomponent": 0})
    edges = []
    for target, value in enumerate([*values, outcome(output)]):
        if value is None:
            continue  # an embedding: nothing goes into it
        found = attributions(value, decomposition, g, activations, writes)
        total = max(1e-30, sum(x.abs().sum().item() for x in found.values()))
        for path, x in found.items():
            x = x.reshape(-1, x.shape[-1])  # (T, C + 1), or (T, 1)
            for t, c in (x.abs() >= max(share, 1e-9) * total).nonzero().tolist():
                if (source := number.get((path, t, c))) is not None:
                    edges.append({"source": source, "target": target, "attribution": x[t, c].item(), "share": x[t, c].abs().item() / total})
    return {"nodes": nodes, "edges": edges}


def prune(
    model, decomposition: Decomposition, g: dict, batch: Tensor, loss: Callable, price: float, stochastic=True, adversarial=True, steps=300, seed=0
) -> dict[str, Tensor]:
    """Which of the subcomponents that are active on `batch` does one behaviour need? New causal importances, of the shape of g.

    They start at g and stay 0 where g is; where g > 0 (a node) they are trained to keep loss(output), a scalar, low, at `price` nats
    or the like for each node that is kept. Masks while training: m = g + (1 - g) r as ever, with the sources r of nodes random
    (stochastic) or an adversary's (adversarial), the mean of both losses if both; all other sources are random. With neither,
    the importances themselves are the masks, and all else is 0. AdamW on raw scores, lr 0.05, short warm-up and cosine.
    """
    U, V = detached(decomposition.U), detached(decomposition.V)
    active = {path: x > 0 for path, x in g.items()}
    generator, device = torch.Generator(batch.device).manual_seed(seed), batch.device
    z = {path: x.clone().requires_grad_() for path, x in g.items()}
    optimizer = torch.optim.AdamW(z.values(), lr=0.05, weight_decay=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sources, ascent = start_adversary({path: x.shape for path, x in g.items()}, device, Config(adversary_lr=0.1))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        pruned = {path: lower_leaky(x) * active[path] for path, x in z.items()}
        if stochastic or adversarial:
            random = {path: torch.rand(x.shape, generator=generator, device=device) for path, x in g.items()}
            chosen = {path: torch.where(active[path], sources[path], random[path]) for path in g}
            kinds = [make_masks(pruned, r) for r, wanted in ((random, stochastic), (chosen, adversarial)) if wanted]
        else:
            kinds = [pruned]
        kept = sum((upper_leaky(x) * active[path] + 1e-12).sqrt().sum() for path, x in z.items())  # p = 0.5: few, and decided
        total = sum(loss(masked_forward(model, U, V, masks, batch)) for masks in kinds) / len(kinds) + price * kept
        gradients = torch.autograd.grad(total, [*z.values(), *(sources.values() if adversarial else ())])
        for x, gradient in zip(z.values(), gradients):
            x.grad = gradient
        optimizer.step()
        if adversarial:
            ascend(ascent, list(gradients[len(z) :]))
    return {path: (lower_leaky(x) * active[path]).detach() for path, x in z.items()}


def similarity(one: Decomposition, other: Decomposition) -> dict[str, dict[str, Tensor]]:
    """For each subcomponent of one decomposition, how like it the most similar one of another is, {path: {"U", "V", "product": (C,)}}.

    Their means are the MMCS of [VPD] section 6. Cosines: of the directions U_c and V_c without their signs, which mean nothing alone, and
    of U_c V_c^T with its sign, or 0 if that is higher. Leave out dead subcomponents: they point anywhere.
    """
    found = {}
    for path, U in one.U.items():
        u = F.normalize(U.detach(), dim=-1) @ F.normalize(other.U[path].detach(), dim=-1).T  # (C, C of the other)
        v = F.normalize(one.V[path].detach(), dim=0).T @ F.normalize(other.V[path].detach(), dim=0)
        found[path] = {name: F.pad(x, (0, 1)).amax(1) for name, x in (("U", u.abs()), ("V", v.abs()), ("product", u * v))}
    return found
