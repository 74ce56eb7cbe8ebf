"""Toy models with known mechanisms: train one, decompose it with VPD, score it against the truth, and draw it.

    python toy_models.py                                  # tms_5-2, into runs/tms_5-2; 20 seconds
    python toy_models.py tms_40-10 --seed 3 --out runs/tms40
    python toy_models.py tms_5-2 --without adversarial    # one loss removed: what breaks?

Repeated, a killed command goes on. Models, after section 3 of Stochastic Parameter Decomposition (arXiv 2506.20790):
    tms_N-M       toy model of superposition, N features in M dimensions: ReLU(W^T W x + b). One mechanism per feature.
    tms_N-M-id    the same with a fixed M x M identity in between: M further mechanisms, all needed on every input.
    resid_mlp1..3 residual MLP of 1 to 3 layers that computes x + ReLU(x) for more features than it has neurons.
    induction     ours: a transformer, set by hand, that copies what followed a token the last time. Other sizes:
                  induction_TOKENS-LENGTH, and with token vectors in superposition induction_TOKENS-LENGTH-DIMENSIONS.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # a notebook names its own, which may not be there: then the import would fail
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
        self.identity = nn.Linear(dimensions, dimensions, bias=False) if identity else nn.Identity()
        self.WT = nn.Linear(dimensions, features)  # weight: N x M
        self.W.weight.data = F.normalize(torch.randn(dimensions, features), dim=0)  # training drops smaller columns
        nn.init.zeros_(self.WT.bias)
        if identity:
            nn.init.eye_(self.identity.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.WT(self.identity(self.W(x))))

class ResidualMLP(nn.Module):
    """x (B, features) -> fixed random embedding -> residual ReLU blocks -> unembedding (B, features)."""
    def __init__(self, features: int, width: int, neurons: int, layers: int):
        super().__init__()
        self.register_buffer("embedding", F.normalize(torch.randn(features, width), dim=-1))  # unit norm, not trained
        self.layers = nn.ModuleList()
        for _ in range(layers):
            block = {"in": nn.Linear(width, neurons, bias=False), "out": nn.Linear(neurons, width, bias=False)}
            self.layers.append(nn.ModuleDict(block))

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.embedding  # (B, width)
        for layer in self.layers:
            h = h + layer["out"](F.relu(layer["in"](h)))
        return h @ self.embedding.T

class Head(nn.Module):
    """One attention head with given weights (d_out, d_in). q, k and v each read a block of the stream (B, T, d_in)."""
    def __init__(self, sink: float, **weights: Tensor):
        super().__init__()
        self.sink = sink  # added to the scores of position 0
        for name, weight in weights.items():  # q, k, v, o
            self.add_module(name, nn.Linear(*weight.T.shape, bias=False))
            self.get_submodule(name).weight.data.copy_(weight)

    def pattern(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention (B, T, T) for the inputs of q and k."""
        offset = torch.full((q.shape[1], q.shape[1]), -torch.inf, device=q.device).triu(1)
        offset[:, 0] += self.sink
        return (self.q(q) @ self.k(k).mT + offset).softmax(-1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.o(self.pattern(q, k) @ self.v(v))

class InductionTransformer(nn.Module):
    """Tokens (B, T), a BOS of number 0 first -> logits (B, T, tokens + 1): attention only, no norm, weights by hand.
    Layer 0 writes the token before (if that is of the first half; else a mean of tokens, which does no harm). Where a
    token stands for the second time, layer 1 attends to the position after its first place and copies the token there
    to the logits; elsewhere mostly to BOS, which has no vector. Each matrix reads one block of the stream (if it read
    all, it could trade tokens for positions), and attention and logits are far from saturated, so that sizes count."""
    def __init__(self, tokens: int, length: int, dimensions: int):
        super().__init__()
        vectors = torch.eye(tokens) if dimensions == tokens else F.normalize(torch.randn(tokens, dimensions), dim=1)
        self.register_buffer("vectors", torch.cat([torch.zeros(1, dimensions), vectors]))  # of BOS, and of the tokens
        at = torch.arange(1, 1 + (length - 1) // 2)  # the first half, from which tokens are copied
        q, k = torch.zeros(2, length, length)
        q[at + 1, at + 1] = 5**0.5
        k[at + 1, at] = 5**0.5
        match = 6**0.5 * vectors  # a match scores 6; where nothing matches, BOS has the largest score
        first = Head(0.0, q=q, k=k, v=vectors, o=vectors.T)
        second = Head(4.5, q=match, k=match, v=vectors, o=3 * vectors.T)
        self.layers = nn.ModuleList([first, second])

    def forward(self, ids: Tensor) -> Tensor:
        token = self.vectors[ids]
        position = torch.eye(ids.shape[1], device=ids.device).expand(*ids.shape, -1)
        before = self.layers[0](position, position, token)
        return self.layers[1](token, before, token) @ self.vectors.T

@dataclass(frozen=True)
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

    def batch(self, generator: torch.Generator, n: int | None = None) -> Tensor:
        """(n, features) inputs; n: by default of a step. A feature is present with probability 0.05, with a value from
        U(0, 1); of a residual MLP 1 / features (as in the paper: 100 at 0.01) and U(-1, 1). Induction: (n, length)
        tokens, a BOS and two halves, each of different tokens in random order, so that some stand in both halves."""
        if self.length:
            order = torch.rand(2, n or 64, self.features, generator=generator).argsort(-1) + 1  # of all tokens, twice
            half = (self.length - 1) // 2
            tokens = torch.cat([order[0, :, :half], order[1, :, : self.length - 1 - half]], 1)
            return F.pad(tokens, (1, 0))
        n = n or (512 if self.layers else 256)  # with 256, more features of a residual MLP share a subcomponent
        value = torch.rand(n, self.features, generator=generator)
        present = torch.rand(n, self.features, generator=generator)
        return (2 * value - 1) * (present < 1 / self.features) if self.layers else value * (present < 0.05)

    def evaluation_data(self, seed: int) -> Tensor:
        """Inputs from a generator that training does not use."""
        return self.batch(torch.Generator().manual_seed(10_000 + seed), 1_024 if self.length else 20_000)

    def config(self, seed: int, without: tuple[str, ...] = ()) -> vpd.Config:
        """The setting of a toy model: one for each kind; what depends on its size follows from the size.
        lr: Adam and Muon move every entry in proportion to lr, and the entries of a direction of length 1 shrink with
        the root of their number. At two thirds of it, duplicates of a subcomponent do not merge in time. Price: MSE is
        a mean over N outputs, so a feature's share in it is 1 / N. price_start: from a high price down, a feature is
        more often found as one subcomponent."""
        N = self.features
        # ours: adversary_steps=0, because the ascent that comes with the loss is enough
        config = vpd.Config(steps=2000, seed=seed, lr=0.06 / N**0.5, w_importance=1e-4 / N, w_frequency=2e-3 / N,
                            price_start=7.5, adversary_steps=0)
        if self.identity:
            # An identity is needed, and paid for, whenever any feature is present. At the price above it comes apart
            # where many are present at once; without an identity the price below is too low.
            price = 1e-3 / N / (0.05 * N) ** 0.5
            config = replace(config, w_importance=price / 2, w_frequency=price, price_start=6.0)
            config = replace(config, steps=2000 if N < 20 else 3500)
        if self.layers:
            # Two features whose columns of W_in have a cosine over 0.5 easily come to share a subcomponent for good. A
            # price that starts high keeps them apart, as large batches do; one that ends low finds the weak columns.
            config = replace(config, w_importance=1e-5 / N, w_frequency=2e-4 / N, price_start=120.0)
            config = replace(config, steps=3000, lr=0.07 / self.dimensions**0.5)
        if self.length:
            # price_start: with 4, mechanisms often come to share a subcomponent; with 2, more are on than need be
            config = replace(config, w_importance=3e-4, w_frequency=3e-4, w_delta=10.0, price_start=3.0)
            config = replace(config, steps=8000, lr=0.005, muon=4.0, G_width=64)
        return replace(config, **{f"w_{loss}": 0.0 for loss in without})

    def C(self) -> dict[str, int]:
        """Subcomponents per matrix, several times what the truth needs: with half as many, mechanisms share some."""
        model = self.model()
        if self.length:
            return {path: 8 * len(true) for path, true in mechanisms(model).items()}
        weights = {name.removesuffix(".weight"): x for name, x in model.named_parameters() if x.dim() == 2}
        if self.layers:
            return dict.fromkeys(weights, 2 * self.features)
        return {path: 8 * max(weight.shape) for path, weight in weights.items()}

def parse_name(name: str, published: bool = False) -> Toy:
    """The toy model of a name; raises BadInput, listing those there are, for an unknown one."""
    vpd.reject_if(published and not name.startswith("resid"), "--published is for residual MLPs: leave it out")
    if match := re.fullmatch(r"tms_(\d+)-(\d+)(-id)?", name):
        features = int(match[1])
        dimensions = int(match[2])
        if 1 <= dimensions <= features:
            return Toy(name, features, dimensions, identity=bool(match[3]))
    if match := re.fullmatch(r"resid_mlp([123])", name):
        layers = int(match[1])
        if published:
            return Toy(name, features=100, dimensions=1000, layers=layers, neurons=50 // layers)
        return Toy(name, features=40 * layers, dimensions=200 * layers, layers=layers, neurons=20)
    if match := re.fullmatch(r"induction(?:_(\d+)-(\d+)(?:-(\d+))?)?", name):
        tokens = int(match[1] or 8)
        length = int(match[2] or 9)
        dimensions = int(match[3] or tokens)
        if 3 <= length < 2 * tokens and 1 <= dimensions <= tokens:
            return Toy(name, tokens, dimensions, length=length)
    known = "tms_N-M or tms_N-M-id (N >= M >= 1), resid_mlp1, 2 or 3, induction or induction_TOKENS-LENGTH"
    raise vpd.BadInput(f"unknown model {name!r}: give {known} (3 <= LENGTH < 2 TOKENS)")

def train_target(toy: Toy, model: nn.Module, seed: int, steps: int) -> None:
    """Train the model from scratch to compute x (TMS, with W and W^T tied) or x + ReLU(x) (residual MLP).
    AdamW, weight decay 0.01, cosine to 0, batches of 1,024; learning rates as in the paper."""
    data_generator = torch.Generator().manual_seed(seed)
    trained = list(model.parameters()) if toy.layers else [model.W.weight, model.WT.bias]
    optimizer = torch.optim.AdamW(trained, lr=3e-3 if toy.layers else 5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in vpd.with_progress(range(steps), "target model"):
        x = toy.batch(data_generator, 1024).to(trained[0].device)
        output = model(x) if toy.layers else F.relu(F.linear(model.W(x), model.W.weight.T, model.WT.bias))
        wanted = x + F.relu(x) if toy.layers else x
        loss = F.mse_loss(output, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not toy.layers:
        model.WT.weight.data.copy_(model.W.weight.T)

def target_of_run(toy: Toy, seed: int, steps: int, out: Path, device: str) -> tuple[nn.Module, float]:
    """The trained target model of a run folder, made and saved there (target.pt) if it is not, and the seconds that its
    training took. Raises BadInput if there is no such device, or the folder holds another run or a damaged file."""
    path = out / "target.pt"
    wanted = {"toy": asdict(toy), "seed": seed}
    torch.manual_seed(seed)
    model = toy.model()
    with vpd.refusing((RuntimeError, AssertionError), f"there is no device {device!r} here", "give --device cpu"):
        model.to(device)
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        with vpd.atomic_write(path) as file:  # opened before the training: a folder that takes no file ends it here
            began = time.monotonic()
            if not toy.length:  # the weights of induction are set by hand
                train_target(toy, model, seed, steps)
            torch.save({"wanted": wanted, "model": model.state_dict(), "seconds": time.monotonic() - began}, file)
    with vpd.refusing(Exception, f"{path} is damaged or no toy model", "choose another --out, or delete it"):
        saved = torch.load(path, map_location=device, weights_only=True)
        held = f"{saved['wanted']['toy']['name']} of seed {saved['wanted']['seed']}"
    vpd.reject_if(saved["wanted"] != wanted, f"{out} holds {held}: choose another --out, or delete it")
    model.load_state_dict(saved["model"])
    return model.eval().requires_grad_(False), saved["seconds"]

# ---- The score: did VPD find the mechanisms that are there? ---------------------------------------------------------
@dataclass
class Alive:
    """The alive subcomponents of a matrix, ordered by the probe that each serves most."""
    numbers: Tensor  # (alive,), c as in U[path][c]
    matrices: Tensor  # (alive, d_out, d_in), or (alive, d_in, d_out): see `in_features`
    on_probes: Tensor  # (probes, alive), causal importances

def in_features(toy: Toy, model: nn.Module, path: str, weights: Tensor) -> Tensor:
    """Matrices (..., d_out, d_in) of a path, changed so that the last dimension counts features where it can: W as it
    is, W^T transposed; W_in times the embedding, W_out transposed times it."""
    if toy.layers:
        return weights @ model.embedding.T if path.endswith("in") else weights.mT @ model.embedding.T
    return weights.mT if path == "WT" else weights

def alive_subcomponents(toy: Toy, model, decomposition: vpd.Decomposition, data: Tensor, matrices: dict) -> dict:
    """{path: Alive}; those that serve no probe come last. matrices: of `vpd.evaluate` on data, the evaluation set.
    Probes: 0.75 times each feature alone; for induction the first sequence of the data."""
    probes = data[:1] if toy.length else 0.75 * torch.eye(toy.features, device=data.device)
    _, g = vpd.predict_importances(model, decomposition, probes)
    alive = {}
    for path, matrix in matrices.items():
        on_probes = g[path][..., :-1].flatten(0, -2)  # (probes, C)
        idle = on_probes.amax(0) < 0.1
        order = (on_probes.argmax(0) + len(on_probes) * idle).argsort(stable=True)
        mean = torch.tensor(matrix["mean_importance"], device=data.device)
        numbers = order[mean[order] > vpd.ALIVE]
        products = torch.einsum("co,ic->coi", decomposition.U[path][numbers], decomposition.V[path][:, numbers])
        alive[path] = Alive(numbers, in_features(toy, model, path, products), on_probes[:, numbers])
    return alive

def superposition_score(columns: Tensor, subcomponents: Tensor) -> tuple[dict, Tensor]:
    """MMCS and ML2R of alive subcomponents (alive, M, N) for true columns (M, N): the mean largest cosine of a
    subcomponent's column with the true one, and the mean ratio of their norms; and which is the best of each (N,).
    "true": how many the target represents; those with a norm under a tenth of the largest are left out."""
    if not len(subcomponents):
        subcomponents = torch.zeros_like(columns).unsqueeze(0)
    true_norm = columns.norm(dim=0)  # (N,)
    represented = true_norm > 0.1 * true_norm.max()
    cosine, best = F.cosine_similarity(subcomponents, columns, dim=1).max(0)  # (N,), (N,)
    ratio = subcomponents.norm(dim=1).gather(0, best.unsqueeze(0)).squeeze(0) / true_norm
    means = {"mmcs": cosine[represented].mean().item(), "ml2r": ratio[represented].mean().item()}
    return {"true": int(represented.sum()), **means}, best

def score_residual_mlp(alive: dict[str, Alive], matrices: dict) -> None:
    """Add the scores of a residual MLP to `matrices`. W_in: features_recovered = share of features whose probe has
    exactly one subcomponent with g > 0.1, which serves no other. W_out: rank of the sum of the subcomponents, without
    singular values under 1 % of the largest (truth: the number of neurons); dense = of the subcomponents with g > 0.1
    on some probe, the share on the average probe (truth: 1)."""
    for path, of_matrix in alive.items():
        on = of_matrix.on_probes > 0.1
        if path.endswith("in"):
            only_one_serves = on.sum(1, keepdim=True) == 1  # (features, 1)
            serves_only_one = on.sum(0, keepdim=True) == 1  # (1, alive)
            recovered = (on & only_one_serves & serves_only_one).any(1)
            matrices[path]["features_recovered"] = recovered.float().mean().item()
        else:
            used = on.any(0)
            matrices[path]["rank"] = int(torch.linalg.matrix_rank(of_matrix.matrices.sum(0), rtol=0.01))
            matrices[path]["dense"] = on[:, used].float().mean().item() if used.any() else 0.0

def mechanisms(model: InductionTransformer) -> dict[str, Tensor]:
    """What each matrix was made of, {path: (n, d_out, d_in)}: its rows (of o: columns) that are not zero, each alone.
    They stand for the tokens, or for the positions that a token can be copied from."""
    true = {}
    for name, weight in model.named_parameters():
        path = name.removesuffix(".weight")
        eye = torch.eye(weight.shape[1]).unsqueeze(1) if path.endswith("o") else torch.eye(len(weight)).unsqueeze(2)
        alone = weight.data * eye.to(weight.device)
        true[path] = alone[alone.flatten(1).any(1)]
    return true

def needed(ids: Tensor) -> dict[str, tuple]:
    """Where the mechanisms are needed on ids (B, T), by construction: {path: (sequences, positions, mechanisms)}, three
    lists with one place for every token that stands twice."""
    twice = ids.unsqueeze(2) == ids.unsqueeze(1)
    sequence, first, second = twice.triu(1).nonzero().T
    after = first + 1
    token = ids[sequence, first] - 1
    copied = ids[sequence, after] - 1
    places = {"0.q": (sequence, after, first - 1), "0.k": (sequence, first, first - 1)}
    places |= {"0.v": (sequence, first, token), "0.o": (sequence, after, token)}
    places |= {"1.q": (sequence, second, token), "1.k": (sequence, after, token)}
    places |= {"1.v": (sequence, after, copied), "1.o": (sequence, second, copied)}
    return {f"layers.{matrix}": place for matrix, place in places.items()}

def score_induction(model: InductionTransformer, ids: Tensor, g: dict, alive: dict, metrics: dict) -> None:
    """Add to metrics the scores of the mechanisms of each matrix, and precision and recall of g > 0.1 against what is
    `needed` on ids (B, T), of the subcomponents that are best by the weights. g: {path: (B, T, C + 1)}."""
    right = on = wanted = 0
    true = mechanisms(model)
    for path, (sequence, position, mechanism) in needed(ids).items():
        columns = true[path].flatten(1).T  # (d_out d_in, n): compared as TMS's columns are
        candidates = alive[path].matrices.flatten(1).unsqueeze(2).expand(-1, -1, columns.shape[1])
        scores, best = superposition_score(columns, candidates)
        metrics["matrices"][path] |= scores
        is_on = g[path] > 0.1
        on += int(is_on.sum())
        wanted += len(mechanism)
        if len(alive[path].numbers):
            right += int(is_on[sequence, position, alive[path].numbers[best[mechanism]]].sum())
    metrics["figures"] |= {"importances precision": right / max(1, on), "importances recall": right / max(1, wanted)}

@torch.no_grad()
def score(toy: Toy, model, decomposition: vpd.Decomposition, data: Tensor, metrics: dict) -> dict[str, Alive]:
    """Add the scores to metrics, which has "figures" and "matrices" of `vpd.evaluate` on data, the evaluation set.
    Returns {path: Alive} for the pictures."""
    alive = alive_subcomponents(toy, model, decomposition, data, metrics["matrices"])
    if toy.length:
        _, g = vpd.predict_importances(model, decomposition, data)
        score_induction(model, data, g, alive, metrics)
    elif toy.layers:
        score_residual_mlp(alive, metrics["matrices"])
    else:  # the identity has no features of its own
        for path in ("W", "WT"):
            columns = in_features(toy, model, path, model.get_submodule(path).weight)
            scores, _ = superposition_score(columns, alive[path].matrices)
            metrics["matrices"][path] |= scores
    return alive

# ---- The pictures ---------------------------------------------------------------------------------------------------
@torch.no_grad()
def draw_subcomponents(toy: Toy, model, decomposition: vpd.Decomposition, path: str, alive: Alive, file: Path) -> None:
    """The target's matrix, the sum of all subcomponents, and each alive one, at most 60: as arrows (one per feature) in
    two dimensions, else as colours. Features keep their colour or column."""
    target = in_features(toy, model, path, model.get_submodule(path).weight)
    total = in_features(toy, model, path, (decomposition.V[path] @ decomposition.U[path]).T)
    panels = {"target": target, "sum of all": total}
    panels |= {f"subcomponent {c}": matrix for c, matrix in zip(alive.numbers.tolist(), alive.matrices[:60])}
    limit = 1.1 * target.abs().max().item()
    across = min(7, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(1.7 * across, 1.8 * down), layout="constrained")
    for place, (title, matrix) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(down, across, place, xticks=[], yticks=[])
        axis.set_title(title, size=9)
        if len(matrix) != 2:
            axis.imshow(matrix.cpu().numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
            continue
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        for feature, (x, y) in enumerate(matrix.T.tolist()):
            if abs(x) + abs(y) > 0.05 * limit:  # else nothing but an arrowhead, which has a size of its own
                axis.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": f"C{feature % 10}", "lw": 2})
    figure.suptitle(f"{toy.name}, {path}: {len(alive.numbers)} alive; one arrow or column per feature", size=10)
    figure.savefig(file, dpi=110)

def draw_importances(toy: Toy, alive: dict[str, Alive], file: Path) -> None:
    """Causal importances of the alive subcomponents on the probes: one feature alone; for induction one sequence."""
    across = min(4, len(alive))
    down = math.ceil(len(alive) / across)
    figure = Figure(figsize=(1 + 3 * across, 3.4 * down), layout="constrained")
    rows = "position" if toy.length else "the one feature that is present"
    for place, (path, of_matrix) in enumerate(alive.items(), 1):
        axis = figure.add_subplot(down, across, place, title=path, xlabel="alive subcomponent", ylabel=rows)
        image = axis.imshow(of_matrix.on_probes.cpu().numpy(), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.locator_params(integer=True)
    figure.colorbar(image, ax=figure.axes, label="causal importance g")
    figure.savefig(file, dpi=110)

def draw_attention(model: nn.Module, alive: dict[str, Alive], ids: Tensor, file: Path) -> None:
    """Induction: the attention of both layers on one sequence (1, T), with the subcomponents of q and k that are on."""
    _, inputs = vpd.forward_with_inputs(model, alive, ids)
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    for layer, axis in enumerate(figure.subplots(1, 2)):
        q, k = f"layers.{layer}.q", f"layers.{layer}.k"
        pattern = model.layers[layer].pattern(inputs[q], inputs[k]).squeeze(0)
        axis.imshow(pattern.cpu().numpy(), cmap="Blues", vmin=0, vmax=1)
        axis.set(title=f"layer {layer}: attention", xlabel="to (with what is on of k)", ylabel="from (with q)")
        for path, set_ticks, separator in ((k, axis.set_xticks, "\n"), (q, axis.set_yticks, "  ")):
            labels = ["BOS", *(chr(64 + token) for token in ids[0, 1:].tolist())]  # A is token 1
            for t, i in (alive[path].on_probes > 0.1).nonzero().tolist():
                labels[t] += f"{separator}{path[-1]}:{alive[path].numbers[i]}"
            set_ticks(range(len(labels)), labels)
    figure.savefig(file, dpi=110)

# ---- The command ----------------------------------------------------------------------------------------------------
def run(name: str, seed: int, out: Path, without: tuple[str, ...], device: str, published: bool) -> dict:
    """Train, decompose, score and draw one toy model; returns what is saved in metrics.json."""
    toy = parse_name(name, published)
    target_steps = 10_000 if published or not toy.layers else 3_000
    model, target_seconds = target_of_run(toy, seed, target_steps, out, device)
    divergence = vpd.kl if toy.length else vpd.mse
    decomposition = vpd.decompose(model, toy.C(), toy.batch, divergence, toy.config(seed, without), out)
    last = json.loads((out / "log.jsonl").read_text().splitlines().pop())
    seconds = {"target": target_seconds, "decomposition": last["seconds"]}  # of all sessions of the run
    data = toy.evaluation_data(seed).to(device)
    metrics = {"model": name, "seed": seed, "without": without, "seconds": seconds}
    metrics |= vpd.evaluate(model, decomposition, [data], divergence, seed)
    alive = score(toy, model, decomposition, data, metrics)
    with vpd.atomic_write(out / "metrics.json") as file:
        file.write(json.dumps(metrics, indent=1).encode())
    vpd.draw_run(metrics, out / "log.jsonl", out / "training.png")
    draw_importances(toy, alive, out / "importances.png")
    if toy.length:
        draw_attention(model, alive, data[:1], out / "attention.png")
        return metrics
    for path, of_matrix in alive.items():
        draw_subcomponents(toy, model, decomposition, path, of_matrix, out / f"subcomponents_{path}.png")
    return metrics

def main() -> None:
    """The command line; see the top of this file."""
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # a terminal of another encoding must not end a finished run
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tms_5-2", help="default: tms_5-2")
    parser.add_argument("--seed", type=int, default=0, help="of the target, its data and the decomposition")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/MODEL with what differs from the default)")
    losses = ("stochastic", "adversarial", "importance", "frequency", "delta")
    one_or_more = f"train without one or more of {', '.join(losses)}"
    parser.add_argument("--without", nargs="+", choices=losses, default=(), metavar="LOSS", help=one_or_more)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or mps")
    parser.add_argument("--published", action="store_true", help="residual MLP in the published size, much slower")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more do not pay for such small matrices, and would change the last digits
    vpd.keep_memory()
    differs = [f"-seed-{options.seed}"] if options.seed else []
    differs += [f"-without-{loss}" for loss in options.without]
    differs += ["-published"] if options.published else []
    out = (options.out or Path("runs") / "".join([options.model, *differs])).expanduser()
    try:
        with vpd.own_folder(out, "run.lock"):
            metrics = run(options.model, options.seed, out, options.without, options.device, options.published)
    except (vpd.BadInput, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{vpd.table(metrics)}\n{vpd.verdict(metrics)}\npictures and metrics.json are in {out}")

if __name__ == "__main__":
    main()
