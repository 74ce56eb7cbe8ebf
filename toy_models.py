"""Toy models with known mechanisms: train one, decompose it with VPD, score it against the truth, and draw it.

    python toy_models.py                                  # tms_5-2, into runs/tms_5-2; 15 seconds on a laptop
    python toy_models.py tms_40-10 --seed 3 --out runs/tms40
    python toy_models.py tms_5-2 --without adversarial    # one loss removed: what breaks?

Models, after section 3 of Stochastic Parameter Decomposition (arXiv 2506.20790):
    tms_N-M       toy model of superposition, N features in M dimensions: ReLU(W^T W x + b). One mechanism per feature.
    tms_N-M-id    the same with a fixed M x M identity in between: M further mechanisms, all needed on every input.
    resid_mlp1..3 residual MLP of 1 to 3 layers that computes x + ReLU(x) for more features than it has neurons.
    induction     ours: a transformer, set by hand, that copies what followed a token the last time. Other sizes:
                  induction_TOKENS-LENGTH, and with token vectors in superposition induction_TOKENS-LENGTH-DIMENSIONS.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import re
import sys
import time
from pathlib import Path

import matplotlib.style
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import vpd

matplotlib.style.use("tableau-colorblind10")

# ---- The target models and their data -------------------------------------------------------------------------------
class TMS(nn.Module):
    """Toy model of superposition: x (B, N) -> ReLU(W^T [I] W x + b) (B, N), through M < N dimensions."""
    def __init__(self, features: int, dimensions: int, identity: bool):
        super().__init__()
        self.W = nn.Linear(features, dimensions, bias=False)  # weight: M x N, one column per feature
        self.identity = nn.Linear(dimensions, dimensions, bias=False) if identity else None
        self.WT = nn.Linear(dimensions, features)  # weight: N x M
        with torch.no_grad():  # columns of unit norm: training drops features that start smaller
            self.W.weight.copy_(F.normalize(torch.randn(dimensions, features), dim=0))
            self.WT.bias.zero_()
            if identity:
                nn.init.eye_(self.identity.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.W(x)
        if self.identity is not None:
            h = self.identity(h)
        return F.relu(self.WT(h))

class ResidualMLP(nn.Module):
    """x (B, features) -> fixed random embedding -> residual ReLU blocks -> unembedding (B, features)."""
    def __init__(self, features: int, width: int, neurons: int, layers: int):
        super().__init__()
        self.register_buffer("embedding", F.normalize(torch.randn(features, width), dim=-1))  # unit norm, not trained
        linear = functools.partial(nn.Linear, bias=False)
        blocks = ({"in": linear(width, neurons), "out": linear(neurons, width)} for _ in range(layers))
        self.layers = nn.ModuleList(nn.ModuleDict(block) for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.embedding  # (B, width)
        for layer in self.layers:
            h = h + layer["out"](F.relu(layer["in"](h)))
        return h @ self.embedding.T

class Head(nn.Module):
    """One attention head. q, k and v each read a block of the stream, (B, T, d) to (B, T, d_out)."""
    def __init__(self, d_qk: int, scores: int, d_v: int, values: int, sink: float):
        super().__init__()
        self.q, self.k = nn.Linear(d_qk, scores, bias=False), nn.Linear(d_qk, scores, bias=False)
        self.v, self.o = nn.Linear(d_v, values, bias=False), nn.Linear(values, d_v, bias=False)
        self.sink = sink  # added to the scores of position 0

    def pattern(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention (B, T, T) for the inputs of q and k."""
        offset = torch.full((q.shape[1], q.shape[1]), -torch.inf, device=q.device).triu(1)
        offset[:, 0] += self.sink
        return (self.q(q) @ self.k(k).mT + offset).softmax(-1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.o(self.pattern(q, k) @ self.v(v))

class InductionTransformer(nn.Module):
    """Tokens (B, T), a BOS of number 0 first -> logits (B, T, tokens + 1): attention only, no norm, weights by hand.

    Layer 0 writes the token before (behind the first half; elsewhere a mean of tokens, which does no harm). Where a
    token stands for the second time, layer 1 attends to the position after its first place and copies the token there
    to the logits; elsewhere mostly to BOS, which has no vector. Each matrix reads one block of the stream: token,
    position or token before. (Parts of a matrix that read all could trade weight on all tokens for weight on all
    positions: not unique.) Attention and logits are far from saturated, so that the size of a part counts."""
    def __init__(self, tokens: int, length: int, dimensions: int):
        super().__init__()
        vectors = torch.eye(tokens) if dimensions == tokens else F.normalize(torch.randn(tokens, dimensions), dim=1)
        self.register_buffer("vectors", torch.cat([torch.zeros(1, dimensions), vectors]))  # of BOS, and of the tokens
        first = Head(length, length, dimensions, tokens, 0.0)  # layer 0
        second = Head(dimensions, tokens, dimensions, tokens, 4.5)  # where nothing matches, BOS has the largest score
        self.layers = nn.ModuleList([first, second])
        with torch.no_grad():
            first.q.weight.zero_(), first.k.weight.zero_()
            at = torch.arange(1, 1 + (length - 1) // 2)  # the first half, from which tokens are copied
            first.q.weight[at + 1, at + 1] = first.k.weight[at + 1, at] = 5**0.5
            first.v.weight.copy_(vectors), first.o.weight.copy_(vectors.T)
            second.q.weight.copy_(6**0.5 * vectors), second.k.weight.copy_(6**0.5 * vectors)  # a match scores 6
            second.v.weight.copy_(vectors), second.o.weight.copy_(3 * vectors.T)

    def forward(self, ids: Tensor) -> Tensor:
        token, T = self.vectors[ids], ids.shape[1]
        position = torch.eye(T, device=ids.device).expand(len(ids), T, T)
        before = self.layers[0](position, position, token)
        return self.layers[1](token, before, token) @ self.vectors.T

@dataclasses.dataclass(frozen=True)
class Toy:
    """A toy model: what its name says, its data, and how many subcomponents each matrix gets."""
    name: str
    features: int  # induction: the tokens
    dimensions: int  # TMS: the bottleneck M; residual MLP: the width of the stream; induction: of a token's vector
    identity: bool = False
    layers: int = 0  # of a residual MLP; 0 means TMS
    neurons: int = 0  # per layer
    length: int = 0  # of a sequence; 0 means no induction

    def model(self) -> nn.Module:
        """A new target model, not yet trained."""
        if self.length:
            return InductionTransformer(self.features, self.length, self.dimensions)
        if self.layers:
            return ResidualMLP(self.features, self.dimensions, self.neurons, self.layers)
        return TMS(self.features, self.dimensions, self.identity)

    @property
    def density(self) -> float:
        """The probability that a feature is present. Residual MLP: one on average, as in the paper (100 at 0.01)."""
        return 1 / self.features if self.layers else 0.05

    def batch(self, generator: torch.Generator, n: int | None = None) -> Tensor:
        """(n, features) inputs, n by default as many as a step of the decomposition takes (with 256, more features of a
        residual MLP share a subcomponent). Each feature is present with probability `density`, with a value from U(0,
        1), or for a residual MLP U(-1, 1), and else 0. Induction: (n, length) tokens, a BOS and two halves, each of
        tokens in random order, none twice: a token of the first half is needed in some sequences, not in others."""
        n = n or (64 if self.length else 512 if self.layers else 256)
        if self.length:
            first, second = (torch.rand(n, self.features, generator=generator).argsort(-1) + 1 for _ in range(2))
            half, bos = (self.length - 1) // 2, torch.zeros(n, 1, dtype=torch.int64)
            return torch.cat([bos, first[:, :half], second[:, : self.length - 1 - half]], 1)
        value = torch.rand(n, self.features, generator=generator)
        value = 2 * value - 1 if self.layers else value
        return value * (torch.rand(n, self.features, generator=generator) < self.density)

    def config(self, seed: int, without: tuple[str, ...] = ()) -> vpd.Config:
        """The setting of a toy model: one for each kind; what depends on its size follows from the size.

        lr: Adam and Muon move every entry by about lr a step, and those of V start at 1 / sqrt(d_in). With two thirds
        of it, subcomponents that do the same do not merge in time. Price: MSE is a mean over N outputs, so a feature's
        share in it is 1 / N. price_start: from a high price down, a feature is more often found as one part, and seldom
        as the sum of its two neighbours' parts."""
        # ours: adversary_steps=0, because the ascent that comes with the loss is enough
        config = vpd.Config(steps=2000, seed=seed, lr=0.06 / self.features**0.5, w_importance=1e-4 / self.features,
                            w_frequency=2e-3 / self.features, price_start=7.5, adversary_steps=0)  # fmt: skip
        if self.identity:
            # An identity is needed, and paid for, whenever any feature is present. At the price above, that of
            # tms_40-10-id came apart into 64 pieces. So the price is lower, the more features are present at once.
            # (Not for all models: with it, tms_40-10 found 39 features of 40.)
            price = 1e-3 / self.features / (self.density * self.features) ** 0.5
            steps = 2000 if self.features < 20 else 3500
            new = {"w_importance": price / 2, "w_frequency": price, "price_start": 6.0, "steps": steps}
            config = dataclasses.replace(config, **new)
        if self.layers:
            # Two features whose columns of W_in have a cosine over 0.5 easily come to share a subcomponent, and
            # training seldom parts them again. Large batches, a price that starts high and p from 2 keep them apart
            # (with p from 1, a third of the features was found). A price that ends low finds the weak columns.
            new = {"w_importance": 1e-5 / self.features, "w_frequency": 2e-4 / self.features, "price_start": 120.0}
            config = dataclasses.replace(config, steps=3000, lr=0.07 / self.dimensions**0.5, **new)
        if self.length:
            # price_start: with 4 or more, two mechanisms of a matrix often come to share a part (with 3 on one seed of
            # five); with 2, more are on than need be. What else was tried: .github/experiments.md
            new = {"lr": 0.005, "muon": 4.0, "w_importance": 3e-4, "w_frequency": 3e-4, "w_delta": 3.0, "steps": 8000}
            config = dataclasses.replace(config, price_start=3.0, G_type="transformer", G_width=64, **new)
        return dataclasses.replace(config, **{f"w_{loss}": 0.0 for loss in without})

    def C(self) -> dict[str, int]:
        """Subcomponents per matrix, several times what the truth needs: with half as many, some features of TMS (and
        positions of induction) come to share one."""
        N, M = self.features, self.dimensions
        if self.length:
            return {path: 8 * len(parts) for path, parts in mechanisms(self.model()).items()}
        if self.layers:
            return {f"layers.{i}.{m}": 2 * N for i in range(self.layers) for m in ("in", "out")}
        return {"W": 8 * N, **({"identity": 8 * M} if self.identity else {}), "WT": 8 * N}

def parse_name(name: str, published: bool = False) -> Toy:
    """The toy model of a name; raises BadInput, listing those there are, for an unknown one."""
    wrong = published and not name.startswith("resid")
    vpd.refuse(wrong, f"--published is for the residual MLPs: leave it out, {name} says its own size")
    if match := re.fullmatch(r"tms_(\d+)-(\d+)(-id)?", name):
        features, dimensions = int(match[1]), int(match[2])
        if 1 <= dimensions <= features:
            return Toy(name, features, dimensions, identity=bool(match[3]))
    if match := re.fullmatch(r"resid_mlp([123])", name):
        layers = int(match[1])
        features, width, neurons = (100, 1000, 50 // layers) if published else (40 * layers, 200 * layers, 20)
        return Toy(name, features, width, layers=layers, neurons=neurons)
    if match := re.fullmatch(r"induction(?:_(\d+)-(\d+)(?:-(\d+))?)?", name):
        tokens, length = int(match[1] or 8), int(match[2] or 9)
        if 3 <= length < 2 * tokens and 1 <= (dimensions := int(match[3] or tokens)) <= tokens:
            return Toy(name, tokens, dimensions, length=length)
    known = "tms_N-M or tms_N-M-id (N >= M >= 1), resid_mlp1, 2 or 3, induction or induction_TOKENS-LENGTH"
    raise vpd.BadInput(f"unknown model {name!r}: give {known} (3 <= LENGTH < 2 TOKENS)")

def train_target(toy: Toy, model: nn.Module, seed: int, steps: int) -> None:
    """Train the model from scratch to compute x (TMS, with W and W^T tied) or x + ReLU(x) (residual MLP).

    AdamW, weight decay 0.01, cosine to 0, batches of 1,024; learning rates as in the paper."""
    device, data = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    trained = list(model.parameters()) if toy.layers else [model.W.weight, model.WT.bias]
    optimizer = torch.optim.AdamW(trained, lr=3e-3 if toy.layers else 5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x = toy.batch(data, 1024).to(device)
        output = model(x) if toy.layers else F.relu(F.linear(model.W(x), model.W.weight.T, model.WT.bias))
        loss = F.mse_loss(output, x + F.relu(x) if toy.layers else x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(), schedule.step()
        if step % 100 == 99:
            vpd.progress(f"target model: step {step + 1}/{steps}  loss {loss.item():.2g}", False)
    if not toy.layers:
        model.WT.weight.data.copy_(model.W.weight.T)

def target_of_run(toy: Toy, seed: int, steps: int, out: Path, device: str) -> tuple[nn.Module, float]:
    """The trained target model of a run folder, made and saved there (target.pt) if it is not yet; and its seconds.

    Raises BadInput if the folder holds another run or a damaged target.pt."""
    path, wanted = out / "target.pt", {"toy": dataclasses.asdict(toy), "seed": seed}
    torch.manual_seed(seed)
    model = toy.model()
    if path.exists():
        try:
            saved = torch.load(path, map_location=device, weights_only=True)
            held = saved["wanted"]
            model.load_state_dict(saved["model"]) if held == wanted else None
        except Exception as error:
            raise vpd.BadInput(f"{path} is damaged or no toy model: delete it, or choose another --out") from error
        other = f"{held['toy']['name']} of seed {held['seed']}"
        vpd.refuse(held != wanted, f"{out} holds {other}: choose another --out, or delete it")
        return model.to(device).eval(), saved["seconds"]
    vpd.refuse((out / "run.json").exists(), f"{out} holds another run: choose another --out, or delete it")
    began = time.monotonic()
    if not toy.length:  # the weights of induction are set by hand
        train_target(toy, model.to(device), seed, steps)
    seconds = time.monotonic() - began
    out.mkdir(parents=True, exist_ok=True)
    with vpd.replacing(path) as file:
        torch.save({"wanted": wanted, "model": model.state_dict(), "seconds": seconds}, file)
    return model.eval(), seconds

# ---- The score: did VPD find the mechanisms that are there? ---------------------------------------------------------
def in_features(toy: Toy, model: nn.Module, path: str, weights: Tensor) -> Tensor:
    """Matrices (..., d_out, d_in) of a path, changed so that the last dimension counts features where it can: W as it
    is, W^T transposed; W_in times the embedding, W_out transposed times it."""
    if toy.layers:
        return weights @ model.embedding.T if path.endswith("in") else weights.mT @ model.embedding.T
    return weights.mT if path == "WT" else weights

def subcomponents(found: vpd.Decomposition, path: str) -> Tensor:
    """All rank-one matrices U_c V_c^T of a path, (C, d_out, d_in)."""
    return torch.einsum("co,ic->coi", found.U[path].detach(), found.V[path].detach())

def superposition_score(columns: Tensor, parts: Tensor) -> tuple[dict, Tensor]:
    """MMCS and ML2R of the ALIVE subcomponents `parts` (alive, M, N) for columns (M, N); and the best part of each.

    MMCS: mean over features of the largest cosine of a subcomponent's column with the true one. ML2R: mean norm ratio
    of these two. What the target itself does not represent (norm under a tenth of the largest) is no mechanism, and is
    left out; "true" counts the rest."""
    norm = columns.norm(dim=0)  # (N,)
    represented = norm > 0.1 * norm.max()
    parts = parts if len(parts) else torch.zeros_like(columns)[None]  # none is alive
    best, which = F.cosine_similarity(parts, columns[None], dim=1).max(0)  # (N,), (N,)
    ratio = parts.norm(dim=1).gather(0, which[None])[0] / norm
    means = {"mmcs": best[represented].mean().item(), "ml2r": ratio[represented].mean().item()}
    return {"true": int(represented.sum()), **means}, which

def mechanisms(model: InductionTransformer) -> dict[str, Tensor]:
    """The parts that each matrix was made of, {path: (n, d_out, d_in)}. One for each of its rows (of o: columns) that
    is not zero: for each token, or for each position that a token can be copied from."""
    parts = {}
    for name, weight in model.named_parameters():
        by_row = weight.detach().T if name.endswith("o.weight") else weight.detach()
        rows = by_row.new_ones(len(by_row)).diag()[..., None] * by_row  # row r alone, for each r
        rows = rows[rows.flatten(1).any(1)]
        parts[name.removesuffix(".weight")] = rows.mT if name.endswith("o.weight") else rows
    return parts

def needed(ids: Tensor) -> dict[str, tuple]:
    """Where each mechanism is needed on sequences `ids` (B, T), by construction. {path: (what its mechanisms serve,
    (sequences, positions, mechanisms))}: three lists, with one place for every token that stands twice."""
    sequence, first, second = (ids[:, :, None] == ids[:, None]).triu(1).nonzero().T  # its places
    after, token, copied = first + 1, ids[sequence, first] - 1, ids[sequence, first + 1] - 1
    places = {"0.q": ("position", after, first - 1), "0.k": ("position", first, first - 1)}
    places |= {"0.v": ("token", first, token), "0.o": ("token", after, token), "1.q": ("token", second, token)}
    places |= {"1.k": ("token", after, token), "1.v": ("copy", after, copied), "1.o": ("copy", second, copied)}
    return {f"layers.{matrix}": (kind, (sequence, *place)) for matrix, (kind, *place) in places.items()}

def residual_score(path: str, parts: Tensor, probe: Tensor) -> dict:
    """The score of a residual MLP's matrix: its alive subcomponents (alive, ...), their g on one-hot probes (features,
    alive).

    in-matrix: features_recovered = share of features for which exactly one subcomponent has g > 0.1, one that serves no
    other. out-matrix: rank of the sum of the subcomponents, without singular values under 1 % of the largest (truth:
    the number of neurons); dense = of the subcomponents with g > 0.1 on some probe, the share on the average probe
    (truth: 1)."""
    on = probe > 0.1
    if path.endswith("in"):
        alone = (on.sum(1, keepdim=True) == 1) & (on.sum(0, keepdim=True) == 1)  # in its row and column
        return {"features_recovered": (on & alone).any(1).float().mean().item()}
    used = on.any(0)
    rank = int(torch.linalg.matrix_rank(parts.sum(0), rtol=0.01)) if len(parts) else 0
    return {"rank": rank, "dense": on[:, used].float().mean().item() if used.any() else 0.0}

def score(toy: Toy, model: nn.Module, decomposition: vpd.Decomposition, data: Tensor, metrics: dict) -> dict:
    """Add the scores to metrics: "matrices", "groups", and for induction "importances". Returns, for the pictures,
    {path: (alive subcomponents, g on probes)}, ordered by the probe that a subcomponent serves most. Probes: 0.75 times
    each feature alone; for induction the positions of one sequence. data: the evaluation set.

    "importances": precision and recall of g > 0.1 against what is `needed`. "groups": how many `vpd.cluster` finds (on
    g > 0.01; for induction anywhere in a sequence), how many are true, how many of these it finds exactly. True: for
    each feature what serves it on the probes; all of the identity, or of a W_out; for induction, by the weights, what
    serves each token, copied token and position."""
    probes = data[:1] if toy.length else 0.75 * torch.eye(toy.features, device=data.device)
    (_, on_probes), (_, g) = (vpd.predict_importances(model, decomposition, x) for x in (probes, data))
    g = {path: x[..., :-1] for path, x in g.items()}
    drawn, groups, right, on, wanted = {}, collections.defaultdict(set), 0, 0, 0  # groups: {(what for, number): parts}
    for path, matrix in metrics["matrices"].items():
        alive = (torch.tensor(matrix["mean_importance"], device=data.device) > vpd.ALIVE).nonzero()[:, 0]
        probe = on_probes[path].flatten(0, -2)[:, alive]  # (probes, alive)
        order = probe.argmax(0).add(len(probe) * (probe.amax(0) < 0.1)).argsort(stable=True)
        alive, probe = alive[order], probe[:, order]
        parts = in_features(toy, model, path, subcomponents(decomposition, path)[alive])
        drawn[path] = parts, probe
        places = [(n, len(alive)) for n in range(len(probe))] + (probe > 0.1).nonzero().tolist()  # none: still a group
        serves = [("feature", *place) for place in places]  # (what for, number, subcomponent)
        if path == "identity" or path.endswith("out"):
            serves = [(path, 0, c) for c in range(len(alive))]
        if toy.layers:
            matrix.update(residual_score(path, parts, probe))
        elif toy.length:
            true = mechanisms(model)[path].flatten(1).T  # (d_out d_in, n): compared as TMS's columns are
            scores, best = superposition_score(true, parts.flatten(1)[..., None].expand(-1, -1, true.shape[1]))
            matrix.update(scores)
            kind, (sequence, position, mechanism) = needed(data)[path]
            serves = [(kind, n, c) for n, c in enumerate(best.tolist())]
            right += int((g[path][..., alive] > 0.1)[sequence, position, best[mechanism]].sum()) if len(alive) else 0
            on, wanted = on + int((g[path] > 0.1).sum()), wanted + len(sequence)
        elif path != "identity":
            weight = in_features(toy, model, path, model.get_submodule(path).weight.detach())
            matrix.update(superposition_score(weight, parts)[0])
        for kind, n, c in serves:
            groups[kind, n].update((path, number) for number in alive[c : c + 1].tolist())
    if toy.length:
        metrics["importances"] = {"precision": right / max(1, on), "recall": right / max(1, wanted)}
        g = {path: x.amax(1) for path, x in g.items()}
    names = [(path, c) for path, x in g.items() for c in range(x.shape[-1])]
    found = [{names[c] for c in group} for group in vpd.cluster(vpd.side_by_side(g) > 0.01)["groups"]]
    exact = sum(list(groups.values()).count(group) == 1 for group in found)  # two features with one part are not found
    metrics["groups"] = {"found": len(found), "true": len(groups), "exact": exact}
    return drawn

# ---- The pictures ---------------------------------------------------------------------------------------------------
def draw_subcomponents(toy: Toy, model: nn.Module, decomposition, path: str, parts: Tensor, file: Path) -> None:
    """The target's matrix, the sum of all subcomponents, and each alive one: as arrows (one per feature) in two
    dimensions, else as colours. Features keep their colour or column."""
    target = in_features(toy, model, path, model.get_submodule(path).weight.detach())
    total = in_features(toy, model, path, subcomponents(decomposition, path).sum(0))
    panels = [("target", target), ("sum of all", total)] + [(f"subcomponent {c}", part) for c, part in enumerate(parts)]
    shown, across = panels[:62], min(7, len(panels))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(1.7 * across, 1.8 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    limit = target.abs().max().item() * 1.1
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (title, matrix) in zip(axes.flat, shown):
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, size=9)
        if len(matrix) == 2:
            for feature, (x, y) in enumerate(matrix.T.tolist()):
                arrow = {"arrowstyle": "->", "color": f"C{feature % 10}", "lw": 2}
                if abs(x) + abs(y) > 0.05 * limit:  # else nothing but an arrowhead, which has a size of its own
                    axis.annotate("", (x, y), (0, 0), arrowprops=arrow)
            axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        else:
            axis.imshow(matrix.cpu(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    more = f" (the first 60 of {len(parts)})" * (len(parts) > 60)
    figure.suptitle(f"{toy.name}, {path}: one arrow or column per feature{more}", size=10)
    figure.savefig(file, dpi=110)

def draw_importances(toy: Toy, drawn: dict[str, tuple[Tensor, Tensor]], file: Path) -> None:
    """Causal importances of the alive subcomponents when one feature alone is present; for induction, on a sequence."""
    across, down = min(4, len(drawn)), -(-len(drawn) // 4)
    figure = Figure(figsize=(1 + 3 * across, 3.4 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    rows, probes = ("position", "one sequence") if toy.length else ("the one feature present", "one-hot probes")
    for axis, (path, (_, probe)) in zip(axes.flat, drawn.items()):
        image = axis.imshow(probe.cpu(), cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set(title=path, xlabel="alive subcomponent", ylabel=rows)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, label="causal importance g")
    figure.suptitle(f"{toy.name}: causal importances on {probes}", size=10)
    figure.savefig(file, dpi=110)

def draw_attention(model: nn.Module, decomposition: vpd.Decomposition, ids: Tensor, file: Path) -> None:
    """Induction: the attention of both layers on one sequence (1, T), with the subcomponents of q and k that are on."""
    _, inputs = vpd.forward_with_inputs(model, decomposition.U, ids)
    _, g = vpd.predict_importances(model, decomposition, ids)
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    for layer, axis in enumerate(figure.subplots(1, 2)):
        q, k = f"layers.{layer}.q", f"layers.{layer}.k"
        pattern = model.layers[layer].pattern(inputs[q], inputs[k])[0].detach().cpu()
        axis.imshow(pattern, cmap="Blues", vmin=0, vmax=1)
        for path, set_ticks in ((k, axis.set_xticks), (q, axis.set_yticks)):
            labels = ["BOS" if i == 0 else chr(64 + i) if i <= 26 else str(i) for i in ids[0].tolist()]
            for t, c in (g[path][0, :, :-1] > 0.1).nonzero().tolist():
                labels[t] += ("  " if path == q else "\n") + f"{path[-1]}:{c}"
            set_ticks(range(len(labels)), labels)
        axis.set(title=f"layer {layer}: attention", xlabel="to (with the parts of k that are on)", ylabel="from (q)")
    figure.savefig(file, dpi=110)

# ---- The command ----------------------------------------------------------------------------------------------------
def table(metrics: dict) -> str:
    """What a person wants to see at the end."""
    lines = ["matrix           C  alive     L0   score against the known mechanisms"]
    for path, m in metrics["matrices"].items():
        known = [(k, m[k]) for k in ("true", "mmcs", "ml2r", "features_recovered", "rank", "dense") if k in m]
        scores = "  ".join(f"{k} {x:.3f}" if isinstance(x, float) else f"{k} {x}" for k, x in known)
        lines.append(f"{path:12s} {m['C']:5d} {m['alive']:6d} {m['l0']:6.2f}   {scores}")
    for title in ("divergence", "adversary", "importances", "groups"):
        if title in metrics:
            shown = (f"{name} {x:.3g}" if isinstance(x, float) else f"{name} {x}" for name, x in metrics[title].items())
            lines.append(f"{title + ':':14s}" + "  ".join(shown))
    return "\n".join(lines)

def run(name: str, seed: int, out: Path, without: tuple[str, ...], device: str, published: bool) -> dict:
    """Train, decompose, score and draw one toy model; returns what is saved in metrics.json."""
    toy = parse_name(name, published)
    config = toy.config(seed, without)
    target_steps = 10_000 if published or not toy.layers else 3_000
    model, target_seconds = target_of_run(toy, seed, target_steps, out, device)
    divergence = vpd.kl if toy.length else vpd.mse
    decomposition = vpd.decompose(model, toy.C(), toy.batch, divergence, config, out)
    log = (out / "log.jsonl").read_text().splitlines()
    seconds = {"target": target_seconds, "decomposition": json.loads(log[-1])["seconds"]}  # of all sessions of the run
    data = torch.Generator().manual_seed(10_000 + seed)
    data = toy.batch(data, 1_024 if toy.length else 20_000).to(device)  # never trained on
    figures = vpd.evaluate(model, decomposition, [data], divergence, seed)
    metrics = {"model": name, "seed": seed, "without": without, "seconds": seconds} | figures
    drawn = score(toy, model, decomposition, data, metrics)
    with vpd.replacing(out / "metrics.json") as file:
        file.write(json.dumps(metrics, indent=1).encode())
    for path, (parts, _) in drawn.items() if not toy.length else ():
        draw_subcomponents(toy, model, decomposition, path, parts, out / f"subcomponents_{path}.png")
    draw_importances(toy, drawn, out / "importances.png")
    if toy.length:
        draw_attention(model, decomposition, data[:1], out / "attention.png")
    vpd.draw_run(metrics, out / "log.jsonl", out / "training.png")
    return metrics

def main() -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tms_5-2", help="default: tms_5-2")
    parser.add_argument("--seed", type=int, default=0, help="of the target, its data and the decomposition")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/MODEL with what differs from the default)")
    known = ("stochastic", "adversarial", "importance", "frequency", "delta")
    losses = {"nargs": "+", "choices": known, "default": (), "metavar": "LOSS"}
    parser.add_argument("--without", **losses, help=f"train without one or more of {', '.join(known)}")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or mps")
    parser.add_argument("--published", action="store_true", help="residual MLP in the published size, much slower")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more do not pay for such small matrices, and would change the last digits
    vpd.keep_memory()
    differs = f"-seed-{options.seed}" * (options.seed != 0) + "".join(f"-without-{loss}" for loss in options.without)
    out = options.out or Path("runs") / (options.model + differs + "-published" * options.published)
    try:
        metrics = run(options.model, options.seed, out, options.without, options.device, options.published)
    except vpd.BadInput as error:
        sys.exit(f"error: {error}")
    print(f"{table(metrics)}\npictures and metrics.json are in {out}")

if __name__ == "__main__":
    main()
