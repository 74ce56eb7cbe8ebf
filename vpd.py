"""VPD: adversarial parameter decomposition of a trained network, in one file.

Every chosen weight matrix W of a frozen *target model* is written as a sum of rank-one *subcomponents* and a remainder,

    W = sum_c U_c V_c^T + Delta,

trained so that on any one input only a few subcomponents matter, and the others can be ablated there, fully or partly,
in any combination, without changing the output. In pseudo-code:

    for batch in data:
        target = model(batch)                            # on the way, x: the inputs of all matrices
        g = clamp(G(x), 0, 1)                            # causal importances, at each position
        r = random numbers, or an adversary's, in [0, 1] # sources
        m = g + (1 - g) * r                              # masks; Delta has one, too, with g = 0
        output = model(batch) with every W replaced by sum_c m_c U_c V_c^T + m_Delta Delta
        loss = difference(target, output)                # losses 1 and 2: for random r, and for the adversary's r
             + how many g are above 0, and how often     # 3 and 4: few matter at a position, each for one small thing
             + |Delta|^2 / |W|^2                         # 5: the subcomponents make up W
        the adversary's r steps up the gradient of the loss; U, V and G step down

One mask by hand: three subcomponents have importances g = (1, 0.8, 0) and sources r = (0.3, 0.25, 0.3). Their masks are
m = (1, 0.85, 0.3). The first is needed: it stays whole, whatever its source. The second can lose at most a fifth of
itself, here 0.8 + 0.2 * 0.25 = 0.85. The third is not needed: its mask is its source.

Read from top to bottom; Config is in section 6, helpers such as `reject_if` are in 10. A learner can stop after 9:

    1  Subcomponents: the forward pass with masked weights     6  Settings, the start, the training step: the heart
    2  From scores to masks                                    7  decompose: the loop
    3  Causal importance functions: who predicts the scores    8  Evaluation: how we know that it worked
    4  The five losses                                         9  Reading: attribution graphs, pruning
    5  Two optimizers: the adversary's, and Muon              10  Running it: processes, checks, checkpoints, pictures

Shapes: B = batch, T = length of a sequence, C = subcomponents of a matrix, L = number of decomposed matrices. "..."
stands for all positions: (B, T), or (B,) for inputs without a sequence, where each is one position. K = sum of (C + 1)
over all matrices (section 2). Dicts of tensors are keyed by the path of a matrix, as in `model.get_submodule(path)`.

The method is that of "Interpreting Language Model Parameters" (Bushnaq et al., 2026), cited as [VPD]. It builds on
"Stochastic Parameter Decomposition" (arXiv 2506.20790), cited as [SPD]. The tag `ours:` marks what departs from them.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, Iterable, Iterator

try:
    import fcntl
except ImportError:  # Windows: there, nobody notices two runs in one folder
    fcntl = None

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor, nn

Divergence = Callable[[Tensor, Tensor], Tensor]  # (target output, masked output) -> scalar, a mean over positions

# ---- 1  Subcomponents: the forward pass with masked weights ---------------------------------------------------------
@contextlib.contextmanager
def _hooked(model: nn.Module, paths, hook: Callable):
    """Inside, hook(path, module, input, output) runs after each path's module; what it returns, unless None, replaces
    the output. No hook stays, whatever happens. Raises BadInput unless each module runs once."""
    idle = list(paths)
    def adapted(path, module, args, kwargs, output):
        reject_if(path not in idle, f"{path} runs twice in a pass: leave it out, a matrix must run once")
        idle.remove(path)
        return hook(path, module, (*args, *kwargs.values())[0], output)
    with contextlib.ExitStack() as handles:
        for path in paths:
            register = model.get_submodule(path).register_forward_hook
            handles.enter_context(register(functools.partial(adapted, path), with_kwargs=True))
        yield
    reject_if(idle, f"{', '.join(idle)} does not run in a forward pass: leave it out, or undo torch.compile")

@torch.no_grad()
def forward_with_inputs(model: nn.Module, paths, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The plain forward pass: the target model's output, and the input (..., d_in) of every matrix in `paths`, in that
    order."""
    inputs = {}
    def record(path, module, x, output):
        inputs[path] = x
    with _hooked(model, paths, record):
        output = model(batch)
    return output, {path: inputs[path] for path in paths}

def masked_forward(model: nn.Module, U: dict, V: dict, masks: dict[str, Tensor], batch: Tensor) -> Tensor:
    """The model's output with each matrix W replaced, position by position, by

        W'(m) = sum_c m_c U_c V_c^T + m_Delta Delta          ([VPD] section 2)

    masks[path]: (..., C + 1), the last column is m_Delta. U[path]: (C, d_out), V[path]: (d_in, C).
    Because Delta = W - sum_c U_c V_c^T, Delta need never be built:

        W'(m) x = m_Delta W x + sum_c (m_c - m_Delta) U_c V_c^T x

    A mask of ones gives exactly the target (in float32): that is how a position is left out of the decomposition. The
    model's parameters are not touched; the masks live only in the hooks of this one call."""
    def replace(path, module, x, output):
        return masked_linear(module, x, output, U[path], V[path], masks[path])
    with _hooked(model, masks, replace):
        return model(batch)

def masked_linear(module: nn.Linear, x: Tensor, output: Tensor, U: Tensor, V: Tensor, mask: Tensor) -> Tensor:
    """The masked output of one matrix: input x (..., d_in), plain output (..., d_out), mask (..., C + 1)."""
    m, m_delta = mask.split([V.shape[1], 1], -1)  # (..., C), (..., 1)
    Wx = output if module.bias is None else output - module.bias
    # written so that masks of 1 add exact zeros: the output is then the target's, to the last bit
    return output + (m_delta - 1) * Wx + ((m - m_delta) * (x @ V)) @ U

# ---- 2  From scores to masks ----------------------------------------------------------------------------------------
# A causal importance function (section 3) gives every subcomponent a raw score z at every position. A hard sigmoid
# turns it into a causal importance g in [0, 1]: 0 = "can be ablated here, in any combination", 1 = "cannot". There are
# two of them, because two forces act on g, and each has to reach a score that has left [0, 1]:
#   lower_leaky  is used in the masks. Reconstruction raises g: its gradient leaks through where z < 0.
#   upper_leaky  is used in the minimality losses. They lower g: their gradient leaks through where z > 1.
# Only lower_leaky(z) is called g. Losses 3 and 4 count upper_leaky(z), *upper-leaky g*, which can exceed 1.

class _LowerLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        revive = 0.01 * grad.clamp(max=0)  # where descent would raise g: let a hundredth through
        return torch.where(z > 0, grad, revive).masked_fill_(z > 1, 0.0)

def lower_leaky(z: Tensor) -> Tensor:
    """The hard sigmoid for masks: clamp(z, 0, 1), any shape ([VPD] section 2; [SPD] appendix).

    Below 0 a hundredth of the gradient passes, and only where descent would raise g. Without it, a subcomponent at
    g = 0 could never come back; if it passed both ways, it would push dead subcomponents ever further down. Only the
    gradient leaks (a straight-through estimator): a mask never leaves [0, 1]."""
    return _LowerLeaky.apply(z)

def upper_leaky(z: Tensor) -> Tensor:
    """The hard sigmoid for the minimality losses: clamp(z, 0, 1), but with slope 0.01 above 1, any shape."""
    return z.clamp(0, 1) + 0.01 * (z - 1).clamp(min=0)

# All matrices stand side by side in one tensor, so that an operation is done once and not per matrix. Scores have sum C
# columns. Importances, sources and masks have K: each matrix's C, then one for its Delta.

def by_path(x: Tensor, U: dict[str, Tensor]) -> dict[str, Tensor]:
    """(..., K) as {path: (..., C + 1)}; no numbers are copied."""
    return dict(zip(U, x.split([len(u) + 1 for u in U.values()], -1)))

def side_by_side(tensors: dict[str, Tensor]) -> Tensor:
    """{path: (..., C + 1)} as (..., K)."""
    return torch.cat(list(tensors.values()), -1)

def causal_importances(z: Tensor, U: dict[str, Tensor]) -> Tensor:
    """Scores (..., sum C) to causal importances g (..., K) in [0, 1]. Those of Delta are 0, by definition."""
    of_matrices = lower_leaky(z).split([len(u) for u in U.values()], -1)
    return torch.cat([F.pad(g, (0, 1)) for g in of_matrices], -1)

def make_masks(g: Tensor, sources: Tensor) -> Tensor:
    """m = g + (1 - g) r ([VPD] section 2), all (..., K); the sources r in [0, 1] are random, or an adversary's."""
    return g + (1 - g) * sources

def route(sources: Tensor, U: dict[str, Tensor], generator: torch.Generator) -> None:
    """Subset routing ([VPD] section 4): each position draws k ~ Uniform{1..L}; a random k of L matrices stay masked.

    The sources (..., K) of the others become 1, in place, and so do their masks: that is the target's own weight. So
    one loss covers all cases from all matrices masked, where errors add up, to one matrix alone."""
    L = len(U)
    positions = sources.shape[:-1]
    order = torch.rand(*positions, L, generator=generator, device=generator.device).argsort(-1)  # a random permutation
    k = torch.randint(1, L + 1, (*positions, 1), generator=generator, device=generator.device)
    left_out = (order >= k).split(1, -1)  # one (..., 1) for each matrix
    for of_matrix, out in zip(by_path(sources, U).values(), left_out):
        of_matrix.masked_fill_(out, 1.0)

# ---- 3  Causal importance functions: who predicts the scores --------------------------------------------------------
# Both turn the inputs of the decomposed matrices on the plain forward pass, {path: (..., d_in)}, into raw scores
# (..., sum C). Both are made from shapes = {path: (d_in, C)} and the settings. Sequences, whose matrices see inputs
# (B, T, d_in), get the transformer; all others the MLPs.

def subcomponent_activations(inputs: dict[str, Tensor], U: dict[str, Tensor], V: dict[str, Tensor]) -> Tensor:
    """||U_c|| V_c^T x of every subcomponent, (..., sum C), for inputs x of the matrices {path: (..., d_in)}."""
    # U is detached, so that no loss moves a score by resizing what is written. V is not: it may turn to what tells
    # best whether its subcomponent is needed
    return torch.cat([x @ V[path] * U[path].detach().norm(dim=-1) for path, x in inputs.items()], -1)

class ImportanceMLPs(nn.Module):
    """One tiny MLP per subcomponent, from its own activation to its score ([SPD] appendix).

    ours: 4 GELUs instead of 16; their sum is multiplied by 4, so that scores learn as fast. The MLP reads
    ||U_c|| V_c^T x, and not V_c^T x: the score of a subcomponent with tiny weights stays constant.
    ours: all weights enter by their absolute values: a score rises with the activation (but for the dip of GELU), so
    that no subcomponent serves two features of almost opposite directions, which training could not part again."""
    def __init__(self, shapes: dict[str, tuple[int, int]], config: Config):
        super().__init__()
        hidden = 4
        C = sum(C for _, C in shapes.values())
        self.w_in = nn.Parameter(torch.randn(C, 1, hidden))
        self.b_in = nn.Parameter(torch.zeros(C, 1, hidden))
        self.w_out = nn.Parameter(torch.randn(C, hidden, 1) / 16**0.5)  # the mean score starts as with 16
        self.b_out = nn.Parameter(torch.zeros(C, 1, 1))

    def forward(self, inputs: dict[str, Tensor], U: dict[str, Tensor], V: dict[str, Tensor]) -> Tensor:
        a = subcomponent_activations(inputs, U, V)  # (..., sum C)
        a_by_c = a.reshape(-1, a.shape[-1]).T[..., None]  # (sum C, positions, 1)
        h = F.gelu(torch.baddbmm(self.b_in, a_by_c, self.w_in.abs()))  # (sum C, positions, 4)
        z = torch.baddbmm(self.b_out, h, self.w_out.abs(), alpha=4)  # (sum C, positions, 1)
        return z.squeeze(-1).T.reshape(a.shape).float()  # (..., sum C)

def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding (RoPE, arXiv 2104.09864), base 10,000. x: (B, heads, T, d), d even; same shape out."""
    T = x.shape[-2]
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(T, device=x.device)[:, None] * frequency  # (T, d / 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

class ImportanceBlock(nn.Module):
    """Pre-norm transformer block, (B, T, width): RMSNorm -> attention with RoPE; RMSNorm -> GELU MLP."""
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(B, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, width / heads)
        # Attention sees later positions, too: whether a weight matters here may depend on what they do with it.
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, width))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))

class ImportanceTransformer(nn.Module):
    """One shared bidirectional transformer over all matrices' inputs (B, T, d_in) ([VPD] section 3). ours: to a score
    it adds a learned multiple of the size of the subcomponent's own activation; so attacks (section 8) get less far."""
    def __init__(self, shapes: dict[str, tuple[int, int]], config: Config):
        super().__init__()
        width = config.G_width
        uneven = config.G_heads < 1 or width < 1 or width % (2 * config.G_heads)
        reject_if(uneven, f"G_width is {width} and G_heads {config.G_heads}: give a width of n * 2 * heads")
        sum_C = sum(C for _, C in shapes.values())
        self.project = nn.Linear(sum(d_in for d_in, _ in shapes.values()), width)
        self.blocks = nn.Sequential(*(ImportanceBlock(width, config.G_heads) for _ in range(config.G_blocks)))
        self.read_out = nn.Linear(width, sum_C)
        nn.init.constant_(self.read_out.bias, 0.5)  # every subcomponent starts half important
        self.gain = nn.Parameter(torch.zeros(sum_C)) if config.G_activations else None

    def forward(self, inputs: dict[str, Tensor], U: dict[str, Tensor], V: dict[str, Tensor]) -> Tensor:
        x = torch.cat([F.rms_norm(x, x.shape[-1:]) for x in inputs.values()], -1)  # (B, T, sum d_in)
        x = self.blocks(self.project(x).float())  # under autocast a product is bfloat16, the residual stream float32
        with torch.autocast(x.device.type, enabled=False):  # scores in float32: bfloat16 has only 8 bits
            z = self.read_out(x)  # (B, T, sum C)
        return z if self.gain is None else z + self.gain * subcomponent_activations(inputs, U, V).abs().float()

# ---- 4  The five losses ([VPD] section 4) ---------------------------------------------------------------------------
def mse(target: Tensor, output: Tensor) -> Tensor:
    """A divergence for regression: the mean squared error over all entries. Both (..., d); scalar."""
    return F.mse_loss(output.float(), target.float())

def kl(target: Tensor, output: Tensor) -> Tensor:
    """A divergence for logits (..., vocabulary): KL(target || output) in nats, the mean over positions; scalar."""
    target, output = target.float().log_softmax(-1), output.float().log_softmax(-1)
    return F.kl_div(output, target, reduction="none", log_target=True).sum(-1).mean()

def stochastic_reconstruction(model, U, V, g, batch, target, divergence: Divergence, generator, shrink=0.0) -> Tensor:
    """Loss 1. The divergence from the target for sources ~ U(0, 1) under subset routing: one sample; scalar. ours: all
    sources of a position times one u^shrink, u ~ U(0, 1): else about half of what is not needed always stays."""
    sources = torch.rand(g.shape, generator=generator, device=g.device, dtype=g.dtype)
    if shrink:
        sources *= torch.rand(*g.shape[:-1], 1, generator=generator, device=g.device, dtype=g.dtype) ** shrink
    route(sources, U, generator)
    return divergence(target, masked_forward(model, U, V, by_path(make_masks(g, sources), U), batch))

def adversarial_reconstruction(model, U, V, g, batch, target, divergence: Divergence, sources) -> Tensor:
    """Loss 2. The divergence from the target for the adversary's sources (section 5); scalar. ours: all matrices are
    masked, as in [VPD]'s configuration; a sentence of its appendix has subset routing here, too."""
    return divergence(target, masked_forward(model, U, V, by_path(make_masks(g, sources), U), batch))

def usage(z: Tensor, p: float) -> tuple[Tensor, int]:
    """What losses 3 and 4 share: S_c = sum of (upper-leaky g_c)^p over the positions of the GLOBAL batch, (sum C,), and
    how many positions these are. Where z <= 0, it and its slope are 0: only the other scores, soon a few in a hundred,
    are raised to the power."""
    z = z.flatten(0, -2)  # (positions, sum C)
    position, c = (z > 0).nonzero(as_tuple=True)
    powers = (upper_leaky(z[position, c]) + 1e-12).pow(p)  # 1e-12: for p < 1 the slope at 0 is infinite
    S = z.new_zeros(z.shape[1]).index_add(0, c, powers)
    return all_reduce_sum(S), world_size() * len(z)

def importance_minimality(S: Tensor, positions: int) -> Tensor:
    """Loss 3. sum_c S_c / positions: few subcomponents shall matter on any one input; scalar."""
    return S.sum() / positions

def frequency_minimality(S: Tensor, positions: int) -> Tensor:
    """Loss 4. sum_c S_c log2(1 + S_c) / positions: one subcomponent with two jobs costs more than two; scalar."""
    return (S * torch.log2(1 + S)).sum() / positions

def relative_delta(model: nn.Module, U: dict, V: dict) -> Tensor:
    """Loss 5. The mean over matrices of ||Delta||^2 / ||W||^2; scalar. The only place where Delta is built. ours: as in
    the authors' newer code. [VPD] has the mean of all Delta^2, whose scale, and so whose weight, differs by model."""
    ratios = []
    for path in U:
        W = model.get_submodule(path).weight.detach()
        ratios.append((W - (V[path] @ U[path]).T).square().sum() / W.square().sum())
    return torch.stack(ratios).mean()

# ---- 5  Two optimizers: the adversary's, and Muon --------------------------------------------------------------------
# Random sources rarely find the worst ablation, and a new search at every step would be too slow. So the sources, one
# for each mask at each place in the batch, persist over the whole training, and every step moves them a little uphill
# on the loss. The data at a place changes, so that the adversary becomes good at what hurts on many inputs.

def start_ascent(sources: Tensor, lr: float) -> torch.optim.Adam:
    """The optimizer that moves the sources (..., K) uphill."""
    fused = sources.device.type in ("cpu", "cuda")
    # ours: eps = 1e-20, not 1e-8: the gradient of one source shrinks with the batch (on toys it makes no difference)
    return torch.optim.Adam([sources.requires_grad_()], lr, (0.5, 0.99), eps=1e-20, maximize=True, fused=fused)

@torch.no_grad()
def ascend(ascent: torch.optim.Optimizer, sources: Tensor, gradient: Tensor) -> None:
    """One step of the adversary along the gradient of the sources, which are then clamped to [0, 1]."""
    sources.grad = gradient
    ascent.step()
    sources.grad = None
    sources.clamp_(0, 1)

def orthogonalize(X: Tensor) -> Tensor:
    """For each X (n, m), n <= m, of a stack: about A B^T, the nearest orthogonal matrix, where A S B^T is the SVD of X.
    A singular value above 1/400 of X's Frobenius norm becomes 0.68 to 1.21, and not exactly 1.

    Each round maps every singular value s to 3.4445 s - 4.7750 s^3 + 2.0315 s^5, which raises small ones fast and holds
    large ones near 1; these coefficients do so in five rounds. (Newton-Schulz iteration; Jordan et al., 2024,
    kellerjordan.github.io/posts/muon.) No SVD is needed, only products of matrices."""
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) + 1e-7)  # no singular value above 1; 1e-7: X may be 0
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X

class Muon(torch.optim.Optimizer):
    """Momentum (0.95, Nesterov's), orthogonalized: every direction of a matrix moves about equally far, also those with
    a small gradient. A step (n, m) has n singular values near 1, so that the root mean square of its entries is
    1 / sqrt(m). Times 0.2 sqrt(m) that is 0.2, as in a step of AdamW with lr 1: one lr serves both (Liu et al., 2025,
    arXiv 2502.16982).

    ours: in float32, as only some processors multiply bfloat16; matrices of one shape, or its transpose, in a stack."""
    def __init__(self, matrices: list[Tensor], lr: float):
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        stacks = collections.defaultdict(list)
        for x in group["params"]:
            if x.grad is not None:
                stacks[tuple(sorted(x.shape))].append(x)
        for (_, m), matrices in stacks.items():
            updates = []
            for x in matrices:
                momentum = self.state[x].setdefault("momentum", torch.zeros_like(x))
                momentum.lerp_(x.grad, 0.05)
                update = x.grad.lerp(momentum, 0.95)
                updates.append(update if x.shape[1] == m else update.T)
            for x, step in zip(matrices, orthogonalize(torch.stack(updates))):
                x.sub_(step if x.shape[1] == m else step.T, alpha=0.2 * m**0.5 * group["lr"])

# ---- 6  Settings, the start, and the training step: the heart -------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a decomposition. In brackets: the value of the published run on a 4-layer language model. Other
    comments name toys of toy_models.py. L0: the mean number of g > 0 at a position.
    On a new model tune what `verdict` names, then lr and adversary_lr."""
    steps: int = 3000  # [400,000] training steps
    seed: int = 0  # fixes everything: on CPU bit for bit, with equal threads and an equal version of torch
    lr: float = 3e-3  # [5e-5] AdamW, for G; on TMS 0.06 / sqrt(features) serves every size
    muon: float = 1.0  # [0] U and V step by Muon with muon * lr; 0: by AdamW with lr; ours: L0 a fifth lower
    average: float = 0.0  # [0] over which share of the steps U, V and G are averaged; ours: 0.1 for sequences
    lr_final: float = 0.0  # [0.1] the share of lr that is left at the end of its cosine; ours, without a measured gain
    beta2: float = 0.99  # [0.999] of AdamW; ours: old gradients damp late steps less (resid_mlp1: L0 0.79, not 0.87)
    clip_UV: float = 0.01  # [0.01] largest gradient norm of U and V together; Muon normalizes its steps: little effect
    clip_G: float = 1.0  # [none] largest gradient norm of G; ours: it can explode as p falls below 1 (toys: never did)
    w_stochastic: float = 0.5  # [0.5] the weights of the five losses
    w_adversarial: float = 0.5  # [0.5]
    w_importance: float = 1e-4  # [2e-4] too high: importances sink below 1, reconstruction fails; too low: all on
    w_frequency: float = 2e-3  # [1e-4] the logarithm grows with the batch: tune it again when the batch changes much
    w_delta: float = 0.1  # [1e7, of another form of loss 5] in the divergence's scale: for a language model's KL 100
    shrink: float = 0.0  # [0] random sources times one u^shrink a position, u ~ U(0, 1); ours: 2 for sequences
    price_start: float = 1.0  # [1] a factor on losses 3 and 4, falls geometrically to 1; ours: resid_mlp1 needs 120
    p_start: float = 2.0  # [2.0] the exponent of losses 3 and 4; falls linearly to p_end until the average
    p_end: float = 0.5  # [0.4] ours, without a measured gain; at 1, almost all stay alive
    adversary_lr: float = 0.01  # [0.01] of the ascent on the sources, after a linear warm-up over 2.5 % of the run
    adversary_steps: int = 2  # [2] inner ascent steps; the loss adds one; 0 was enough on all toys and sequences
    G_width: int = 128  # [2048] the width of G, if it is a transformer: more than the target's residual stream
    G_blocks: int = 2  # [8] its depth: 0.5 to 2 times the target's
    G_heads: int = 4  # [16] its attention heads
    G_activations: bool = True  # [False] the transformer's scores see the size of their own activation, too
    bf16: bool = False  # [True] matrix products in bfloat16 (autocast), for GPUs

def sequence_config(model: nn.Module, C: dict[str, int], **settings) -> Config:
    """Where to start with sequences and a divergence of logits; else start with `Config()`. settings: fields to be set
    otherwise. From the sizes: G is 1.5 times as wide as the residual stream (the most common d_in), and has a block for
    every 12 matrices: half the layers of a target with six in each. lr goes with 1 / sqrt(width), as V's first entries.

    ours: adversary_steps=0, at four times the rate: the ascent that comes with the loss is enough. lr is 7e-3 at width
    64, where above 5e-3 cross-entropy trades against L0. shrink 0, 1, 2: rounded KL 0.21, 0.18, 0.17, cross-entropy
    0.20, 0.17, 0.15 above the target's, L0 47, 49, 50. w_delta 100, not 1000: subcomponents move sooner, and seeds
    agree better; the average takes off the noise in Delta that this leaves."""
    check_matrices(model, C)
    width = statistics.mode(model.get_submodule(path).in_features for path in C)
    sizes = {"lr": 0.056 / width**0.5, "G_width": 8 * math.ceil(1.5 * width / 8), "G_blocks": max(1, len(C) // 12)}
    tuned = {"steps": 2500, "muon": 2.0, "lr_final": 0.1, "average": 0.1, "p_end": 0.4, "w_importance": 6.5e-4,
             "w_frequency": 3.5e-4, "w_delta": 100.0, "shrink": 2.0, "adversary_steps": 0, "adversary_lr": 0.04}
    return Config(**sizes | tuned | settings)

@dataclasses.dataclass
class Decomposition:
    """What training finds."""
    U: dict[str, Tensor]  # {path: (C, d_out)}
    V: dict[str, Tensor]  # {path: (d_in, C)}
    G: nn.Module  # the causal importance function
    bf16: bool = False  # the precision that G was trained in, and must be evaluated in

def parameters(decomposition: Decomposition) -> list[Tensor]:
    """All that is trained: U, V and the parameters of G."""
    return [*decomposition.U.values(), *decomposition.V.values(), *decomposition.G.parameters()]

@dataclasses.dataclass
class Training:
    """Everything that changes while training, and that a checkpoint holds."""
    decomposition: Decomposition
    average: Decomposition  # of the last steps, which is the result
    optimizer_UV: torch.optim.Optimizer
    optimizer_G: torch.optim.Optimizer
    sources: Tensor  # the persistent adversary's, (..., K): one for each mask at each place of a batch
    ascent: torch.optim.Optimizer  # of the sources, uphill
    data_generator: torch.Generator  # for batches, on the CPU
    noise_generator: torch.Generator  # for stochastic sources and routing, on the model's device
    step: int = 0  # steps taken
    seconds: float = 0.0  # spent so far

def split(W: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """U (C, d_out) and V (d_in, C) whose subcomponents add up to W (d_out, d_in), if C is at least min(d_in, d_out).
    On the side of fewer dimensions they are random, of mean square length 1 (a tight frame: Q^T Q = 1). Where each
    points on the other side follows from W. ours: [VPD] starts at random, and first fits U and V to W in 400 steps."""
    d_out, d_in = W.shape
    d = min(d_in, d_out)
    Q = nn.init.orthogonal_(torch.empty(C, d))
    length = max(1, C / d) ** 0.5
    if d_in <= d_out:
        return Q @ W.T / length, length * Q.T
    return length * Q, (Q @ W).T / length

def initialize(model: nn.Module, C: dict[str, int], batch: Tensor, config: Config) -> Training:
    """A run at step 0: U and V from `split`, sources ~ U(0, 1) for batches like this one. A seed gives the same numbers
    on every device, but for the last digits. Processes that train together share U, V and G; sources, data and noise
    are each one's own. G: a transformer for sequences, else MLPs."""
    device = model.get_submodule(next(iter(C))).weight.device
    _, inputs = forward_with_inputs(model, C, batch.to(device))
    positions = next(iter(inputs.values())).shape[:-1]
    with torch.random.fork_rng(devices=[]):  # leaves the user's random state as it was
        torch.default_generator.manual_seed(config.seed)  # the CPU's alone; torch.manual_seed would seed every device
        U = {}
        V = {}
        for path, number in C.items():
            U[path], V[path] = split(model.get_submodule(path).weight.detach().cpu(), number)
        function = ImportanceTransformer if len(positions) == 2 else ImportanceMLPs
        G = function({path: tuple(v.shape) for path, v in V.items()}, config).to(device)
    for path in C:
        U[path] = U[path].to(device).requires_grad_()
        V[path] = V[path].contiguous().to(device).requires_grad_()
    UV = [*U.values(), *V.values()]
    adamw = {"lr": config.lr, "betas": (0.9, config.beta2), "weight_decay": 0, "fused": device.type in ("cpu", "cuda")}
    optimizer_UV = Muon(UV, config.lr) if config.muon else torch.optim.AdamW(UV, **adamw)
    optimizer_G = torch.optim.AdamW(G.parameters(), **adamw)

    def stream(n: int, on) -> torch.Generator:
        """A generator of its own for each use and process; none has the seed of the weights."""
        return torch.Generator(on).manual_seed(config.seed + 1_000_003 * (4 * rank() + n))
    sources = torch.rand(*positions, sum(C.values()) + len(C), generator=stream(1, "cpu")).to(device)
    ascent = start_ascent(sources, config.adversary_lr)
    decomposition = Decomposition(U, V, G, config.bf16)
    broadcast(parameters(decomposition))  # the last digits of several processes may differ
    return Training(decomposition, copy.deepcopy(decomposition), optimizer_UV, optimizer_G, sources, ascent,
                    stream(2, "cpu"), stream(3, device))

def precision(device: torch.device | str, bf16: bool):
    """A context in which matrix products run in bfloat16, if `bf16`, and else in float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)

def predict_scores(model, decomposition: Decomposition, batch: Tensor) -> tuple[Tensor, Tensor]:
    """On a batch: the target's output, and the scores z (..., sum C)."""
    reject_if(model.training, "the model is in training mode: call model.eval()")
    with precision(batch.device, decomposition.bf16):
        target, inputs = forward_with_inputs(model, decomposition.U, batch)
        z = decomposition.G(inputs, decomposition.U, decomposition.V)
    return target, z

def set_learning_rates(training: Training, config: Config) -> None:
    """U, V and G: a cosine from the full rate to `lr_final` of it. The sources: a linear warm-up, then constant."""
    cosine = 0.5 * (1 + math.cos(math.pi * training.step / config.steps))
    lr = config.lr * (config.lr_final + (1 - config.lr_final) * cosine)
    training.optimizer_G.param_groups[0]["lr"] = lr
    training.optimizer_UV.param_groups[0]["lr"] = lr * (config.muon or 1)
    warm = min(1, (training.step + 1) / (0.025 * config.steps))
    training.ascent.param_groups[0]["lr"] = config.adversary_lr * warm

@torch.no_grad()
def update_average(training: Training, config: Config) -> None:
    """U, V and G, exponentially averaged over some of the last steps. ours: the noise of single steps averages out."""
    rate = 1 / max(1, min(training.step + 1, config.average * config.steps))
    for average, x in zip(parameters(training.average), parameters(training.decomposition)):
        average.lerp_(x, rate)

def training_step(model, batch: Tensor, divergence: Divergence, training: Training, config: Config) -> dict[str, float]:
    """One step of VPD ([VPD] section 5) on one batch. Changes `training`; returns losses, L0 and gradient norms. Raises
    BadInput if one of them is not finite, before U, V and G are changed."""
    U, V = training.decomposition.U, training.decomposition.V
    parameters_UV = [*U.values(), *V.values()]
    parameters_G = list(training.decomposition.G.parameters())
    sources = training.sources
    set_learning_rates(training, config)
    changing = max(1, (1 - config.average) * config.steps)  # ours: after these steps p and the price rest
    elapsed = min(1, training.step / changing)
    p = config.p_start + (config.p_end - config.p_start) * elapsed
    price = config.price_start ** (1 - elapsed)

    target, z = predict_scores(model, training.decomposition, batch)
    g = causal_importances(z, U)
    reject_if(g.shape != sources.shape, "the matrices see other positions than in the first batch: give equal ones")
    with precision(batch.device, config.bf16):
        for _ in range(config.adversary_steps):
            loss = adversarial_reconstruction(model, U, V, g, batch, target, divergence, sources)
            # weighted as in the total: Adam's moments mix it with the gradient of the loss below
            (uphill,) = torch.autograd.grad(config.w_adversarial * loss, sources)
            ascend(training.ascent, sources, uphill)
        noise = training.noise_generator
        loss_stochastic = stochastic_reconstruction(model, U, V, g, batch, target, divergence, noise, config.shrink)
        loss_adversarial = adversarial_reconstruction(model, U, V, g, batch, target, divergence, sources)
    S, positions = usage(z, p)
    loss_importance = importance_minimality(S, positions)
    loss_frequency = frequency_minimality(S, positions)
    loss_delta = relative_delta(model, U, V)
    total = (config.w_stochastic * loss_stochastic + config.w_adversarial * loss_adversarial
             + price * (config.w_importance * loss_importance + config.w_frequency * loss_frequency)
             + config.w_delta * loss_delta)
    training.optimizer_UV.zero_grad()
    training.optimizer_G.zero_grad()
    total.backward(inputs=[*parameters_UV, *parameters_G, sources])
    all_reduce_mean([x.grad for x in [*parameters_UV, *parameters_G]])
    norm_UV = nn.utils.clip_grad_norm_(parameters_UV, config.clip_UV)
    norm_G = nn.utils.clip_grad_norm_(parameters_G, config.clip_G)

    values = {"stochastic": loss_stochastic, "adversarial": loss_adversarial, "importance_minimality": loss_importance,
              "frequency_minimality": loss_frequency, "relative_delta": loss_delta,
              "L0": (g > 0).sum(-1).float().mean(),
              "gradient of U and V": norm_UV, "gradient of G": norm_G}
    numbers = finite_numbers(values, target, training.step)
    ascend(training.ascent, sources, sources.grad)  # one more step up: its gradient is there anyway
    training.optimizer_UV.step()
    training.optimizer_G.step()
    update_average(training, config)
    training.step += 1
    return numbers

# ---- 7  decompose: the loop -----------------------------------------------------------------------------------------
@torch.enable_grad()
def decompose(model: nn.Module, C: dict[str, int], get_batch: Callable[[torch.Generator], Tensor],
              divergence: Divergence, config: Config = Config(), out: str | Path | None = None,
              checkpoint_seconds: float = 60) -> Decomposition:
    """Decompose the `nn.Linear`s named by the keys of C into C[path] subcomponents each.

    model: in eval mode, on the device to be used; called as model(batch). Its parameters are never changed.
    C: too many is better than too few. 0.7 (d_in + d_out) for each matrix comes to about what [VPD] has in all.
    get_batch(generator): a batch of inputs, all of one shape, drawn with nothing but the given CPU generator.
    divergence: `kl` or `mse`, or any function (target output, masked output) -> scalar, a mean over positions.
    config: to start with `Config()`, or for sequences `sequence_config(model, C)`.
    out: a folder (section 10) for run.json, log.jsonl, and every `checkpoint_seconds` and at the end checkpoint.pt. If
        it holds a run of the same settings and target, that run goes on from its checkpoint, and on CPU, with equal
        threads and version of torch, ends bit for bit as if it had never stopped. A finished run is loaded.
    Raises BadInput: see `check_target`, `own_folder`, `write_settings`, `load_checkpoint`; if batches differ in shape,
    or a loss is not finite."""
    first = get_batch(torch.Generator().manual_seed(config.seed))
    check_target(model, C, first, divergence)
    training = initialize(model, C, first, config)
    device = training.noise_generator.device
    folder = Path(out).expanduser() if out else None
    with own_folder(folder):
        if folder:
            with rank_0_first():
                write_settings(folder, model, C, config, training)
            load_checkpoint(folder, training, config)
        start = time.monotonic() - training.seconds
        saved = training.seconds
        while training.step < config.steps:
            batch = get_batch(training.data_generator)
            differs = f"batch {training.step} has shape {tuple(batch.shape)}, the first had {tuple(first.shape)}"
            reject_if(batch.shape != first.shape, f"{differs}: give batches of one shape")
            values = training_step(model, batch.to(device), divergence, training, config)
            training.seconds = time.monotonic() - start
            log_step(values, training, config, folder)
            last = training.step == config.steps
            due = torch.tensor(float(last or training.seconds - saved > checkpoint_seconds), device=device)
            broadcast([due])  # all processes save when the first does
            if folder and due:
                save_checkpoint(folder, training)
                saved = training.seconds
    return training.average

# ---- 8  Evaluation: how we know that it worked ([VPD] section 6) ----------------------------------------------------
ALIVE = 1e-6  # a subcomponent is alive if its mean causal importance over the evaluation set exceeds this (as in [VPD])
MASKINGS = ("unmasked", "stochastic", "rounded at 0", "rounded at 0.1", "rounded at 0.5", "g as masks", "ablated")

@torch.no_grad()
def predict_importances(model, decomposition: Decomposition, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The target's output on a batch, and the causal importances {path: (..., C + 1)} of the subcomponents there."""
    target, z = predict_scores(model, decomposition, batch)
    return target, by_path(causal_importances(z, decomposition.U), decomposition.U)

def count_subcomponents(importances: list[dict[str, Tensor]]) -> dict[str, dict]:
    """Per matrix, on the importances of equal batches, {path: {"C"; "alive": mean g above ALIVE; "L0": how many have
    g > 0 at a position, on average; "L0 above 0.1": g > 0.1; "mean_importance": C numbers}}."""
    matrices = {}
    for path in importances[0]:
        g = torch.cat([of_batch[path][..., :-1].flatten(0, -2) for of_batch in importances])  # (positions, C)
        mean = g.mean(0)
        l0 = (g > 0).sum(-1).float().mean().item()
        l0_above = (g > 0.1).sum(-1).float().mean().item()
        matrices[path] = {"C": len(mean), "alive": int((mean > ALIVE).sum()), "L0": l0, "L0 above 0.1": l0_above,
                          "mean_importance": mean.tolist()}
    return matrices

def evaluation_masks(masking: str, g: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """One of MASKINGS for importances g: masks {path: (..., C + 1)}. "stochastic": independent sources ~ U(0, 1), also
    if training had `shrink`. "rounded at h": 1 where g > h, else 0. Delta's mask is 0 in all, also in "unmasked": the
    subcomponents alone are judged."""
    masks = {}
    for path, x in g.items():
        m = x[..., :-1]
        if masking == "unmasked":
            m = torch.ones_like(m)
        elif masking == "ablated":
            m = torch.zeros_like(m)
        elif masking == "stochastic":
            m = make_masks(m, torch.rand(m.shape, generator=generator, device=m.device))
        elif masking != "g as masks":
            m = (m > float(masking.removeprefix("rounded at "))).to(m)
        masks[path] = F.pad(m, (0, 1))
    return masks

@torch.enable_grad()  # `evaluate` runs without gradients
def fresh_adversary(model, decomposition: Decomposition, cases: list[tuple], divergence: Divergence, positions=(),
                    movable=None, seed=0, steps=80, size=0.1) -> list[float]:
    """The attack ([VPD] section 6): random sources take `steps` steps of `size` along the sign of the gradient. Returns
    the largest divergence so far, after 0, 1, ... steps: a step can overshoot, so the last need not be the largest.
    cases: (batch, target output, g), of one shape. movable: bools (*positions, K), which sources move; None: all.
    positions: () for ONE source per mask, the same at all positions, which finds systematic flaws and not the noise of
    single inputs; the shape of the positions for one at each. Delta's mask is its source, as in training."""
    U, V = decomposition.U, decomposition.V
    device = next(iter(U.values())).device
    K = sum(len(u) + 1 for u in U.values())
    sources = torch.rand(*positions, K, generator=torch.Generator(device).manual_seed(seed), device=device)
    sources.requires_grad_()
    reached = []
    for _ in with_progress(range(1 + steps), "fresh adversary"):
        total = 0.0
        gradient = torch.zeros_like(sources)
        for batch, target, g in cases:
            with precision(device, decomposition.bf16):
                loss = adversarial_reconstruction(model, U, V, side_by_side(g), batch, target, divergence, sources)
            (of_case,) = torch.autograd.grad(loss, sources)
            gradient += of_case
            total += loss.item()
        reached.append(total / len(cases))
        step = size * gradient.sign()
        sources.data.add_(step if movable is None else step * movable).clamp_(0, 1)
    return torch.tensor(reached, dtype=torch.float64).cummax(0).values.tolist()  # NaN, if one is

@torch.no_grad()
def evaluate(model, decomposition, batches: list[Tensor], divergence: Divergence, seed: int = 0, loss=None,
             attack_steps: int = 80) -> dict:
    """What every decomposition reports, as a dict for JSON: {"figures": {name: number}, "matrices": see
    `count_subcomponents`, "attack": see `fresh_adversary`}. batches: the evaluation set, of one shape and on the
    model's device. The figures: sums over all matrices, the divergence from the target by masking and under attack, and
    how large Delta is. With loss(batch, output) -> scalar (the target's training loss), also how far it is above that
    of the target.

    The attack sees a quarter of the batches, which saves more than half of the time. On the default text its figure is
    a little higher than on all, on C headers lower (0.95, not 1.41). Keeps outputs and importances of all batches.
    Raises BadInput if there are none, or their shapes differ."""
    shapes = {batch.shape for batch in batches}
    reject_if(len(shapes) != 1, "give at least one evaluation batch, and all of one shape")
    cases = [(batch, *predict_importances(model, decomposition, batch)) for batch in batches]
    matrices = count_subcomponents([g for _, _, g in cases])
    figures = collections.defaultdict(float)
    for name in ("C", "alive", "L0", "L0 above 0.1"):
        figures[name] = sum(of_matrix[name] for of_matrix in matrices.values())
    figures["evaluated positions"] = len(batches) * side_by_side(cases[0][2]).shape[:-1].numel()
    generator = torch.Generator(batches[0].device).manual_seed(seed)
    for batch, target, g in cases:
        if loss:
            target_loss = loss(batch, target)
            figures["loss of the target"] += target_loss.item() / len(cases)
        for masking in MASKINGS:
            masks = evaluation_masks(masking, g, generator)
            with precision(batch.device, decomposition.bf16):
                output = masked_forward(model, decomposition.U, decomposition.V, masks, batch)
            figures[f"divergence, {masking}"] += divergence(target, output).item() / len(cases)
            if loss:
                figures[f"loss above target, {masking}"] += (loss(batch, output) - target_loss).item() / len(cases)
    attacked = cases[: math.ceil(len(cases) / 4)]
    attack = fresh_adversary(model, decomposition, attacked, divergence, seed=seed, steps=attack_steps)
    for steps in (20, 40, 80):
        if steps <= attack_steps:
            figures[f"fresh adversary, {steps} steps"] = attack[steps]
    figures["||Delta||^2 / ||W||^2"] = relative_delta(model, decomposition.U, decomposition.V).item()
    return {"figures": dict(figures), "matrices": matrices, "attack": attack}

def table(metrics: dict) -> str:
    """What `evaluate` returns, with what was added to it, as text: a line for each figure, then one for each matrix."""
    lines = []
    for name, x in metrics["figures"].items():
        number = f"{x:10,}" if isinstance(x, int) else f"{x:10.4g}"
        lines.append(f"{name:40s} {number}")
    columns = {}  # name: width
    for of in metrics["matrices"].values():
        columns |= {name: max(10, len(name) + 2) for name in of if name != "mean_importance"}
    lines.append(" " * 20 + "".join(f"{name:>{width}s}" for name, width in columns.items()))
    for path, of in metrics["matrices"].items():
        cells = [f"{of[name]:{width}.4g}" if name in of else " " * width for name, width in columns.items()]
        lines.append(f"{path:20s}" + "".join(cells))
    return "\n".join(lines)

def verdict(metrics: dict) -> str:
    """Can the decomposition of these metrics (of `evaluate`) be trusted? A line for each figure, in the order to mend
    them: its value, then "good", or the largest good value and the setting to change."""
    figures = metrics["figures"]
    ablated = figures["divergence, ablated"]
    stochastic = figures["divergence, stochastic"]
    attack = metrics["attack"][-1]
    checks = (
        ("unmasked divergence", figures["divergence, unmasked"], 0.05 * stochastic, "raise w_delta"),
        ("stochastic divergence", stochastic, 0.05 * ablated, "take more steps, then lower w_importance, w_frequency"),
        ("rounded divergence", figures["divergence, rounded at 0"], 2 * stochastic, "raise shrink, or adversary_lr"),
        ("L0", figures["L0"], 0.2 * figures["alive"], "raise w_importance and w_frequency, or take more steps"),
        ("alive", figures["alive"], 0.9 * figures["C"], "raise C, or w_frequency"),
        ("adversary's divergence", attack, 0.1 * ablated, "take more steps; lower w_importance, w_frequency"))
    lines = []
    for name, x, most, remedy in checks:
        lines.append(f"{name:23s} {x:10.4g}  {'good' if x <= most else f'over {most:.4g}: {remedy}'}")
    return "\n".join(lines)

# ---- 9  Reading a decomposition ([VPD] section 8) -------------------------------------------------------------------
def cut_forward(model, decomposition: Decomposition, masks: dict, batch: Tensor, embeddings=()) -> tuple:
    """A masked forward pass in which what each decomposed matrix and embedding *writes* is cut off from what it reads:
    the gradient with respect to a write is then its direct effect, not one through other decomposed matrices.

    embeddings: paths of modules that write, but are not decomposed. Returns the output; the activations a_c =
    ||U_c|| V_c^T x, {path: (..., C)}; and the writes, {path: (..., d_out)}, in the order in which they run. In float32,
    also for a run in bfloat16: attributions are small differences."""
    U, V = decomposition.U, decomposition.V
    activations = {}
    writes = {}
    def cut(path, module, x, output):
        if path in U:
            activations[path] = subcomponent_activations({path: x}, U, V)
            output = masked_linear(module, x, output, U[path], V[path], masks[path])
        writes[path] = output.detach().requires_grad_()
        return writes[path]
    with _hooked(model, (*embeddings, *U), cut):
        output = model(batch)
    return output, activations, writes

def attributions(value: Tensor, decomposition: Decomposition, masks: dict, activations: dict, writes: dict) -> dict:
    """How much every subcomponent adds directly to `value`, a scalar of a `cut_forward`: {path: (..., C + 1)}.

    The gradient of value at the write, times what c adds to the write, m_c a_c U_c / ||U_c||. The last column is of the
    bias and Delta. For an embedding: (..., 1). If value is linear in the writes (no constant), they add up to it."""
    if not value.requires_grad:  # it depends on no write
        return {}
    gradients = torch.autograd.grad(value, [*writes.values()], retain_graph=True, allow_unused=True)
    attributed = {}
    for (path, write), gradient in zip(writes.items(), gradients):
        if gradient is None:
            continue  # value does not depend on it
        of_write = (gradient * write).sum(-1, keepdim=True)
        attributed[path] = of_write
        if path in decomposition.U:
            unit = F.normalize(decomposition.U[path].detach(), dim=-1)  # U_c / ||U_c||
            of_c = masks[path][..., :-1] * activations[path].detach() * (gradient @ unit.T)  # (..., C)
            attributed[path] = torch.cat([of_c, of_write - of_c.sum(-1, keepdim=True)], -1)
    return attributed

@torch.enable_grad()
def attribution_graph(model, decomposition: Decomposition, g: dict, batch: Tensor, outcome: Callable, embeddings=(),
                      share: float = 0.0) -> dict:
    """The attribution graph of one input (1, T): who contributes directly to whom, and to outcome(output), a scalar of
    the last position. Masks: the importances g themselves, without Delta.

    Nodes, in the order in which they run: every subcomponent at every position with g > 0, every embedding at every
    position, and the outcome. Edges: attributions with at least this share of the sum of all (absolute) into a target.
    Returns {"nodes": [{"matrix", "position", "subcomponent", "importance", "activation"}, ...],
    "edges": [{"source", "target" (numbers of nodes), "attribution", "share"}, ...]}."""
    output, activations, writes = cut_forward(model, decomposition, g, batch, embeddings)
    nodes = []
    values = {}  # number of a node: the scalar that is attributed. Nothing goes into an embedding
    number = {}
    for path, write in writes.items():
        if path in g:
            places = g[path][0, :, :-1].nonzero().tolist()
        else:
            places = [(t, 0) for t in range(write.shape[-2])]
        for t, c in places:
            node = {"matrix": path, "position": t, "subcomponent": c}
            if path in g:
                values[len(nodes)] = activations[path][0, t, c]
                node |= {"importance": g[path][0, t, c].item(), "activation": activations[path][0, t, c].item()}
            number[path, t, c] = len(nodes)
            nodes.append(node)
    values[len(nodes)] = outcome(output)
    nodes.append({"matrix": "outcome", "position": batch.shape[1] - 1, "subcomponent": 0})
    edges = []
    for target, value in values.items():
        attributed = attributions(value, decomposition, g, activations, writes)
        total = max(1e-30, sum(x.abs().sum().item() for x in attributed.values()))
        for path, x in attributed.items():
            x = x.reshape(-1, x.shape[-1])  # (T, C + 1), or (T, 1)
            for t, c in (x.abs() >= max(share, 1e-9) * total).nonzero().tolist():
                if (path, t, c) in number:  # bias, Delta and what is inactive are no nodes
                    size = x[t, c].item()
                    source = number[path, t, c]
                    edges.append({"source": source, "target": target, "attribution": size, "share": abs(size) / total})
    return {"nodes": nodes, "edges": edges}

@torch.enable_grad()
def prune(model, decomposition: Decomposition, g: dict, batch: Tensor, loss: Callable, cost_per_node: float,
          stochastic=True, adversarial=True, steps: int = 300, seed: int = 0) -> dict[str, Tensor]:
    """Which of the subcomponents that are active on `batch` does one behaviour need? New causal importances, like g.

    They stay 0 where g is 0. Where g > 0 (a node) they start at g, and learn to keep loss(output), a scalar, low, at
    cost_per_node * sqrt(g) for each. Masks: m = g + (1 - g) r as ever. The sources r of nodes are random (stochastic)
    or an adversary's (adversarial); if both, the mean of both losses. All other sources are random. With neither, the
    importances themselves are the masks. AdamW on raw scores, lr 0.05, warm-up over 20 steps and cosine."""
    z = side_by_side(g).requires_grad_()  # the scores, (1, T, K)
    active = z.detach() > 0
    optimizer = torch.optim.AdamW([z], lr=0.05, weight_decay=0)
    generator = torch.Generator(batch.device).manual_seed(seed)
    sources = torch.rand(z.shape, generator=generator, device=batch.device)
    ascent = start_ascent(sources, lr=0.1)
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 0.05 * min(1, (step + 1) / 20) * cosine
        pruned = lower_leaky(z) * active
        random = torch.rand(z.shape, generator=generator, device=batch.device)
        maskings = []
        if stochastic:
            maskings.append(make_masks(pruned, random))
        if adversarial:
            maskings.append(make_masks(pruned, torch.where(active, sources, random)))
        losses = []
        with precision(batch.device, decomposition.bf16):
            for masks in maskings or [pruned]:
                by_matrix = by_path(masks, decomposition.U)
                losses.append(loss(masked_forward(model, decomposition.U, decomposition.V, by_matrix, batch)))
        kept = (upper_leaky(z) * active + 1e-12).sqrt().sum()  # as in loss 3, p = 0.5: few stay, near 1
        total = sum(losses) / len(losses) + cost_per_node * kept
        z.grad = None
        total.backward(inputs=[z, sources])
        optimizer.step()
        if adversarial:
            ascend(ascent, sources, sources.grad)
    return by_path((lower_leaky(z) * active).detach(), decomposition.U)

# ---- 10  Running it: several processes, checks, the run folder, checkpoints, progress, pictures ---------------------
# Under torchrun several processes train together. Each has its own share of the global batch, its own noise and its own
# sources; U, V and G are equal in all of them. A process that is alone is number 0 of 1, and nothing is exchanged.

class BadInput(ValueError):
    """Something the user can put right. The message is one line: what was wrong, and what to do."""

def reject_if(wrong, message: str) -> None:
    """Raise BadInput with this message if something is wrong."""
    if wrong:
        raise BadInput(message)

@contextlib.contextmanager
def refusing(errors, what: str, advice: str):
    """Inside, each of these errors becomes BadInput: what went wrong, how the error begins, and what to do."""
    try:
        yield
    except BadInput:
        raise
    except torch.cuda.OutOfMemoryError as error:
        raise BadInput("the memory of the device is full: take a smaller batch, or a smaller C") from error
    except errors as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        raise BadInput(f"{what} ({reason}): {advice}") from error

def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1

def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0

def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over all processes; gradients flow back to all of them."""
    return dist.nn.functional.all_reduce(x) if world_size() > 1 else x

@torch.no_grad()
def all_reduce_mean(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over all processes."""
    if world_size() > 1:
        for x in tensors:
            dist.all_reduce(x)
            x /= world_size()

def broadcast(tensors: list[Tensor]) -> None:
    """Give all processes the values that process 0 has."""
    if world_size() > 1:
        for x in tensors:
            dist.broadcast(x.data, 0)

@contextlib.contextmanager
def rank_0_first():
    """What is inside is done by process 0 alone, and then by the others, who find what it left."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        dist.barrier()

def keep_memory() -> None:
    """Keep freed blocks of up to 32 MB (glibc): to ask Linux for them again took a tenth of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and mallopt(-3, 2**25):  # M_MMAP_THRESHOLD; M_TRIM_THRESHOLD alone slows
        mallopt(-1, 2**31 - 1)

def finite_numbers(values: dict[str, Tensor], target: Tensor, step: int) -> dict[str, float]:
    """Scalars as numbers, the mean over all processes. Raises BadInput, which names the first that is not finite."""
    stacked = torch.stack([x.detach() for x in values.values()])  # one transfer from the device for all
    all_reduce_mean([stacked])
    numbers = dict(zip(values, stacked.tolist()))
    for name, number in numbers.items():
        if not math.isfinite(number):
            name = name if target.isfinite().all() else "target model's output"
            raise BadInput(f"the {name} is not finite at step {step}: lower lr, or look at the data")
    return numbers

def check_matrices(model: nn.Module, C: dict[str, int]) -> None:
    """Raise BadInput unless each key of C is the path of a matrix that can be decomposed, and each value a number."""
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    reject_if(not C, f"no matrix to decompose: give C = {{path: number}} for some of {', '.join(linears)}")
    for path, number in C.items():
        nearest = ", ".join(difflib.get_close_matches(path, linears, n=3, cutoff=0.0)) or "none"
        reject_if(path not in linears, f"{path!r} is not an nn.Linear of the model; the nearest that are: {nearest}")
        wrong = type(number) is not int or number < 1
        reject_if(wrong, f"C[{path!r}] is {number!r}: the number of subcomponents must be a whole one of at least 1")
        W = model.get_submodule(path).weight
        empty = isinstance(W, nn.UninitializedParameter) or not W.any()
        reject_if(empty, f"{path} has no weights yet, or only zeros: call model(batch) once, train it, or leave it out")
        reject_if(W.dtype != torch.float32, f"{path}.weight is {W.dtype}: call model.float() first, as U and V are")

def check_target(model: nn.Module, C: dict[str, int], batch: Tensor, divergence: Divergence) -> None:
    """Refuse, before any training, what cannot be decomposed: measured on one batch, not assumed. Raises BadInput."""
    dtype = torch.get_default_dtype()
    reject_if(dtype != torch.float32, f"new tensors are {dtype}: call torch.set_default_dtype(torch.float32) first")
    reject_if(torch.is_inference_mode_enabled(), "there are no gradients in inference mode: decompose outside of it")
    autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    reject_if(autocast, "autocast is on: decompose outside of it, with Config(bf16=True)")
    check_matrices(model, C)
    for path, module in model.named_modules():
        reject_if(module.training, f"{path or 'the model'} is in training mode: call model.eval()")
    type_name = type(batch).__name__
    reject_if(not isinstance(batch, Tensor), f"a batch is a {type_name}: make get_batch return one tensor")
    batch = batch.to(model.get_submodule(next(iter(C))).weight.device)
    before = batch.clone()
    target, inputs = forward_with_inputs(model, C, batch)
    reject_if(not batch.equal(before), "the model changes its batch in place: let it work on a copy, x = x.clone()")
    reject_if(not isinstance(target, Tensor), f"the model returns a {type(target).__name__}: make it return one tensor")
    reject_if(not target.isfinite().all(), "the target model's output is not finite: look at the model and the data")
    positions = {tuple(x.shape[:-1]) for x in inputs.values()}
    reject_if(len(positions) > 1, f"the matrices see different positions, {positions}: decompose those with equal ones")
    ids_moved = batch.dim() == 2 and not batch.is_floating_point() and positions != {tuple(batch.shape)}
    reject_if(ids_moved, f"token ids are {tuple(batch.shape)}, but matrices see {positions}: give them (B, T, d)")
    cast = ", ".join(path for path, x in inputs.items() if x.dtype != torch.float32)
    reject_if(cast, f"the input of {cast} is not float32: use no autocast in the model, but Config(bf16=True)")

    def differ(x, y):  # entry by entry, as one may be huge; NaN differs
        return not ((x - y).abs() <= 1e-3 * (y.abs() + y.abs().float().median())).all()
    def compare(path, module, x, output):
        other = differ(output, F.linear(x, module.weight, module.bias))
        reject_if(other, f"{path} does not compute W x + b (adapter, hook?): merge it into W, or leave it out")
    with torch.no_grad(), _hooked(model, C, compare):
        again = model(batch)
    reject_if(differ(again, target), "two passes over one batch differ (dropout, cache?): make the model repeat itself")
    U = {path: torch.ones(1, model.get_submodule(path).out_features).to(batch.device).requires_grad_() for path in C}
    V = {path: x.new_ones(x.shape[-1], 1).requires_grad_() for path, x in inputs.items()}
    ones = {path: x.new_ones(*x.shape[:-1], 2) for path, x in inputs.items()}
    half = {path: mask / 2 for path, mask in ones.items()}
    loss = divergence(target, target.clone().requires_grad_())
    scalar = isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad
    reject_if(not scalar, "the divergence is not one number with a gradient: make it a tensor, the mean over positions")
    advice = "detach nothing, leave out no_grad, and write x = x + y, not x += y"
    with refusing(RuntimeError, "a small step fails", advice):  # two masked passes, then one backward, as in training
        again = masked_forward(model, U, V, ones, batch)
        loss = divergence(target, masked_forward(model, U, V, half, batch)) + divergence(target, again)
        loss.backward(inputs=[*U.values(), *V.values()])
    reject_if(differ(again, target), "with all masks 1 the output is not the target's: is a matrix used twice?")
    cut_off = ", ".join(path for path in C if U[path].grad is None or V[path].grad is None)
    reject_if(cut_off, f"no gradient reaches {cut_off}: detach nothing, undo torch.compile, or leave it out")

def versions(device: torch.device) -> dict:
    """What a result depends on to the last bit, beside the settings."""
    return {"python": sys.version.split()[0], "torch": str(torch.__version__), "device": device.type,
            "threads": torch.get_num_threads(), "precision": torch.get_float32_matmul_precision()}

@contextlib.contextmanager
def own_folder(folder: Path | None, name: str = "training.lock"):
    """Inside, the folder, which is made, belongs to this process: another gets BadInput. A kill frees it."""
    if not folder or rank() > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as at_end:
            if fcntl:
                lock = at_end.enter_context(open(folder / name, "a"))
                with refusing(BlockingIOError, f"{folder} is in use by another process", "wait, or choose another"):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                at_end.callback(os.unlink, lock.name)
            yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing came of it

def write_settings(folder: Path, model: nn.Module, C: dict[str, int], config: Config, training: Training) -> None:
    """Write run.json: settings, versions and a fingerprint of the target model. Raises BadInput if the folder holds a
    run with other settings or another target."""
    path = folder / "run.json"
    digest = hashlib.sha256()
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(name.encode() + x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    run = dataclasses.asdict(config) | {f"C of {name}": number for name, number in C.items()}
    run |= {"order of the matrices": list(C), "number of processes": world_size()}
    run["positions in a batch"] = list(training.sources.shape[:-1])
    run["target model"] = digest.hexdigest()[:16]
    if not path.exists():
        now = versions(training.sources.device)
        with atomic_write(path) as file:
            file.write(json.dumps({"run": run, "versions": now}, indent=1).encode())
    old = json.loads(path.read_text())["run"]
    differ = ", ".join(key for key in run | old if run.get(key) != old.get(key))
    reject_if(differ, f"{folder} holds another run (it differs in: {differ}): choose another folder, or delete it")

@contextlib.contextmanager
def atomic_write(path: Path):
    """A binary file that replaces `path` only when it is complete and on disk: a kill leaves the old one whole."""
    unfinished = path.with_name(path.name + ".unfinished")
    with refusing((OSError, RuntimeError), f"{path} cannot be written", "make room there"):  # torch.save: RuntimeError
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

def state_of(decomposition: Decomposition) -> dict:
    """A decomposition as a checkpoint holds it."""
    return {"U": decomposition.U, "V": decomposition.V, "G": decomposition.G.state_dict()}

def save_checkpoint(folder: Path, training: Training) -> None:
    """Write all of `training` to checkpoint.pt, and the length of the log, so that a resumed run continues it. Process
    0 writes for all of them."""
    own = {"sources": training.sources, "ascent": training.ascent.state_dict(),
           "data": training.data_generator.get_state(), "noise": training.noise_generator.get_state()}
    each = [own]
    if world_size() > 1:
        each = [None] * world_size() if rank() == 0 else None
        dist.gather_object(own, each)
    if rank() == 0:
        state = {"training": state_of(training.decomposition), "average": state_of(training.average),
                 "optimizer_UV": training.optimizer_UV.state_dict(), "optimizer_G": training.optimizer_G.state_dict(),
                 "each process": each, "versions": versions(training.sources.device),
                 "step": training.step, "seconds": training.seconds,
                 "log_bytes": (folder / "log.jsonl").stat().st_size}
        with atomic_write(folder / "checkpoint.pt") as file:
            torch.save(state, file)

def load_checkpoint(folder: Path, training: Training, config: Config) -> None:
    """Continue `training` from checkpoint.pt, if there is one; of a finished run load U, V and G alone, which works on
    any device. Raises BadInput if the file is damaged or not of this run, or if the unfinished run stopped on another
    device. Warns if it stopped with other versions or threads: then its last digits may differ."""
    path = folder / "checkpoint.pt"
    log = folder / "log.jsonl"
    if not path.exists():
        log.write_bytes(b"")  # without what a run wrote that was killed before its first checkpoint
        return
    now = versions(training.sources.device)
    with refusing(Exception, f"{path} is damaged or is not of this run", "delete it to begin anew"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        old = state["versions"]
        unfinished = state["step"] < config.steps
        elsewhere = f"{folder} stopped on {old['device']}; {now['device']} draws other numbers: resume it there"
        reject_if(unfinished and old["device"] != now["device"], elsewhere)
        if unfinished:
            own = state["each process"][rank()]
            training.optimizer_UV.load_state_dict(state["optimizer_UV"])
            training.optimizer_G.load_state_dict(state["optimizer_G"])
            training.ascent.load_state_dict(own["ascent"])
            training.data_generator.set_state(own["data"])
            training.noise_generator.set_state(own["noise"])
            training.sources.data.copy_(own["sources"])
        for name, decomposition in (("training", training.decomposition), ("average", training.average)):
            decomposition.G.load_state_dict(state[name]["G"])
            for key in decomposition.U:
                decomposition.U[key].data.copy_(state[name]["U"][key])
                decomposition.V[key].data.copy_(state[name]["V"][key])
        training.step = state["step"]
        training.seconds = state["seconds"]
    if unfinished and rank() == 0:
        changed = ", ".join(f"{key} {old.get(key)}" for key in now if old.get(key) != now[key])
        if changed:
            print(f"warning: {folder} stopped with {changed}; the last digits may differ", file=sys.stderr)
        os.truncate(log, state["log_bytes"])  # what follows the checkpoint will be logged again

def load_decomposition(folder: str | Path, device="cpu") -> Decomposition:
    """What a run found, from its run.json and last checkpoint.pt, to be read and not to be trained on. Raises BadInput
    if the folder, the `out` of `decompose`, has none."""
    folder = Path(folder).expanduser()
    advice = "give the `out` of `decompose`, whole and made by this version"
    with refusing(Exception, f"{folder} holds no decomposition", advice):
        run = json.loads((folder / "run.json").read_text())["run"]
        state = torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)["average"]
        config = Config(**{field.name: run[field.name] for field in dataclasses.fields(Config)})
        function = ImportanceTransformer if len(run["positions in a batch"]) == 2 else ImportanceMLPs
        G = function({path: tuple(v.shape) for path, v in state["V"].items()}, config).to(device)
        G.load_state_dict(state["G"])
    return Decomposition(state["U"], state["V"], G, config.bf16)

def progress(line: str, milestone: bool) -> None:
    """Show a line of progress: on a terminal over the last, unless that was a milestone; elsewhere milestones alone."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a full disk or closed stderr must not end a run
        if sys.stderr.isatty():  # a line that wraps could not be written over: cut it
            cut = shutil.get_terminal_size().columns - 1
            print("\r\033[K" + (f"{line}\n" if milestone else line[:cut]), end="", file=sys.stderr, flush=True)
        elif milestone:
            print(line, file=sys.stderr, flush=True)

def with_progress(items: Iterable, what: str) -> Iterator:
    """The items one by one; after 5 seconds with a line of progress and the time left."""
    items = list(items)
    start = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        spent = time.monotonic() - start
        if rank() == 0 and spent > 5:
            line = f"{what}: {number}/{len(items)}  {spent / number * (len(items) - number):.0f} s left"
            progress(line, number == len(items) or number % max(1, len(items) // 4) == 0)

def log_step(values: dict[str, float], training: Training, config: Config, folder: Path | None) -> None:
    """Now and then a line of progress, with the time left; the same numbers, in full, go to log.jsonl."""
    step = training.step
    often = max(1, config.steps // 200)
    if rank() > 0 or (step % often and step < config.steps):
        return
    rate = step / training.seconds
    line = f"step {step}/{config.steps}  {(config.steps - step) / rate:.0f} s left  {rate:.3g} steps/s"
    for name, x in values.items():
        if not name.startswith("gradient"):
            line += f"  {name.replace('_', ' ')} {x:.4g}"
    if folder:
        with open(folder / "log.jsonl", "a") as log:
            log.write(json.dumps({"step": step, "seconds": training.seconds, **values}) + "\n")
    progress(line, step == config.steps or step % (20 * often) == 0)

def draw_run(metrics: dict, log: Path, file: Path) -> None:
    """Left, the losses (without their weights) and L0 over the training, from log.jsonl. Right, the spectrum: all mean
    causal importances, sorted, per matrix; a cliff separates the alive from the dead."""
    from matplotlib.figure import Figure  # here, so that the method itself runs without it
    figure = Figure(figsize=(15, max(4, 0.2 * len(metrics["matrices"]))), layout="constrained")  # as high as its legend
    left, right = figure.subplots(1, 2)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for name in rows[0]:
        if name not in ("step", "seconds", "gradient of U and V", "gradient of G"):
            left.plot([row["step"] for row in rows], [row[name] for row in rows], label=name.replace("_", " "))
    for n, (path, matrix) in enumerate(metrics["matrices"].items()):
        mean = [max(x, 1e-8) for x in sorted(matrix["mean_importance"], reverse=True)]
        label = f"{path}: {matrix['alive']} alive of {matrix['C']}"
        right.plot(range(1, len(mean) + 1), mean, ("-", "--", ":")[n % 3], marker=".", markersize=3, label=label)
    right.axhline(ALIVE, color="gray", linewidth=1, label=f"alive above {ALIVE:g}")
    left.set(yscale="log", xlabel="step", ylabel="loss, or L0", title="Losses and L0 over the training")
    right.set(yscale="log", xlabel="subcomponent, sorted", ylabel="mean importance (at least 1e-8)", title="Spectrum")
    for axis in (left, right):
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the curves
    figure.savefig(file, dpi=110)
