"""Toy models with known mechanisms: train one, decompose it with VPD, score it against the truth, and draw it.

    python toy_models.py                                  # tms_5-2, into runs/tms_5-2; a minute or two on a laptop
    python toy_models.py tms_40-10 --seed 3 --out runs/tms40
    python toy_models.py tms_5-2 --without adversarial    # one loss removed: what breaks?

Models, after section 3 of Stochastic Parameter Decomposition (arXiv 2506.20790):
    tms_N-M       toy model of superposition, N features in M dimensions: ReLU(W^T W x + b). One mechanism per feature.
    tms_N-M-id    the same with a fixed M x M identity in between: M further mechanisms, all needed on every input.
    resid_mlp1..3 residual MLP of 1 to 3 layers that computes x + ReLU(x) for more features than it has neurons.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vpd

plt.style.use("tableau-colorblind10")

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
        self.layers = nn.ModuleList(
            nn.ModuleDict({"in": nn.Linear(width, neurons, bias=False), "out": nn.Linear(neurons, width, bias=False)})
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.embedding  # (B, width)
        for layer in self.layers:
            h = h + layer["out"](F.relu(layer["in"](h)))
        return h @ self.embedding.T

def feature_batch(n: int, features: int, density: float, low: float, generator: torch.Generator) -> Tensor:
    """(n, features): each feature is present with probability `density`, with a value from U(low, 1), and else 0."""
    value = low + (1 - low) * torch.rand(n, features, generator=generator)
    return value * (torch.rand(n, features, generator=generator) < density)

@dataclasses.dataclass(frozen=True)
class Toy:
    """A toy model: what its name says, its data, and how many subcomponents each matrix gets."""

    name: str
    features: int
    dimensions: int  # TMS: the bottleneck M; residual MLP: the width of the residual stream
    identity: bool = False
    layers: int = 0  # of a residual MLP; 0 means TMS
    neurons: int = 0  # per layer

    def model(self) -> nn.Module:
        """A new target model, not yet trained."""
        if self.layers:
            return ResidualMLP(self.features, self.dimensions, self.neurons, self.layers)
        return TMS(self.features, self.dimensions, self.identity)

    @property
    def density(self) -> float:
        """The probability that a feature is present. Residual MLP: one on average, as in the paper (100 at 0.01)."""
        return 1 / self.features if self.layers else 0.05

    def batch(self, generator: torch.Generator, n: int | None = None) -> Tensor:
        """(n, features) inputs, with the density and range of values that the target is trained on. n: by default as
        many as a step of the decomposition takes. With 256, more features of a residual MLP share a subcomponent."""
        n = n or (512 if self.layers else 256)
        return feature_batch(n, self.features, self.density, -1.0 if self.layers else 0.0, generator)

    def config(self, seed: int, without: tuple[str, ...] = ()) -> vpd.Config:
        """The setting of a toy model: one for each kind; what depends on its size follows from the size.

        lr: Adam and Muon move every entry by about lr a step, and those of V start at 1 / sqrt(d_in). With much less,
        subcomponents that do the same do not merge in time. Price: MSE is a mean over N outputs, so a feature's share
        in it is 1 / N. price_start: from a high price down, a feature is more often found as one part, and seldom as
        the sum of its two neighbours' parts."""
        config = vpd.Config(
            seed=seed,
            lr=0.04 / self.features**0.5,
            w_importance=1e-4 / self.features,
            w_frequency=2e-3 / self.features,
            price_start=7.5,
            adversary_steps=0,  # ours: the ascent that comes with the loss is enough
        )
        if self.identity:
            # An identity is needed, and paid for, whenever any feature is present. At the price above, that of
            # tms_40-10-id comes apart into 64 pieces. So the price is lower, the more features are present at once.
            # (Not for all models: with it, tms_40-10 finds 39 features of 40.)
            price = 1e-3 / self.features / (self.density * self.features) ** 0.5
            steps = 3000 if self.features < 20 else 5000
            new = {"w_importance": price / 2, "w_frequency": price, "price_start": 6.0, "steps": steps}
            config = dataclasses.replace(config, **new)
        if self.layers:
            # Two features whose columns of W_in have a cosine over 0.5 easily come to share a subcomponent, and
            # training seldom parts them again. Large batches, a price that starts high and p from 2 keep them apart
            # (with p from 1, a third of the features was found). A price that ends low finds the weak columns. Trials:
            # .github/experiments.md
            config = dataclasses.replace(
                config,
                lr=0.07 / self.dimensions**0.5,
                w_importance=1e-5 / self.features,
                w_frequency=2e-4 / self.features,
                price_start=120.0,
            )
        return dataclasses.replace(config, **{f"w_{loss}": 0.0 for loss in without})

    def C(self) -> dict[str, int]:
        """Subcomponents per matrix, several times what the truth needs: with half as many, some features of TMS
        share."""
        N, M = self.features, self.dimensions
        if self.layers:
            return {f"layers.{i}.{m}": 2 * N for i in range(self.layers) for m in ("in", "out")}
        return {"W": 8 * N, **({"identity": 8 * M} if self.identity else {}), "WT": 8 * N}

    def target_steps(self, published: bool) -> int:
        """Training steps of the target model."""
        return 10_000 if published or not self.layers else 3_000

LOSSES = ("stochastic", "adversarial", "importance", "frequency", "delta")

def parse_name(name: str, published: bool = False) -> Toy:
    """The toy model of a name; raises BadInput, listing those there are, for an unknown one."""
    if match := re.fullmatch(r"tms_(\d+)-(\d+)(-id)?", name):
        if published:
            raise vpd.BadInput(f"--published is for the residual MLPs: leave it out, {name} says its own size")
        features, dimensions = int(match[1]), int(match[2])
        if 1 <= dimensions <= features:
            return Toy(name, features, dimensions, identity=bool(match[3]))
    if match := re.fullmatch(r"resid_mlp([123])", name):
        layers = int(match[1])
        features, width, neurons = (100, 1000, 50 // layers) if published else (40 * layers, 200 * layers, 20)
        return Toy(name, features, width, layers=layers, neurons=neurons)
    raise vpd.BadInput(f"unknown model {name!r}: give tms_N-M or tms_N-M-id (N >= M >= 1), or resid_mlp1, 2 or 3")

def train_target(toy: Toy, model: nn.Module, seed: int, steps: int) -> None:
    """Train the model from scratch to compute x (TMS, with W and W^T tied) or x + ReLU(x) (residual MLP).

    AdamW, weight decay 0.01, cosine to 0, batches of 1,024; learning rates as in the paper."""
    device, data = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    trained = list(model.parameters()) if toy.layers else [model.W.weight, model.WT.bias]
    optimizer = torch.optim.AdamW(trained, lr=3e-3 if toy.layers else 5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x = toy.batch(data, 1024).to(device)
        if toy.layers:
            loss = F.mse_loss(model(x), x + F.relu(x))
        else:
            loss = F.mse_loss(F.relu(F.linear(model.W(x), model.W.weight.T, model.WT.bias)), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            vpd.progress(f"target model: step {step + 1}/{steps}  loss {loss.item():.2g}", False, False)
    if not toy.layers:
        with torch.no_grad():
            model.WT.weight.copy_(model.W.weight.T)

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

def subcomponents(decomposition: vpd.Decomposition, path: str) -> Tensor:
    """All rank-one matrices U_c V_c^T of a path, (C, d_out, d_in)."""
    return torch.einsum("co,ic->coi", decomposition.U[path].detach(), decomposition.V[path].detach())

def superposition_score(columns: Tensor, parts: Tensor) -> dict:
    """MMCS and ML2R of the ALIVE subcomponents `parts` (alive, M, N) for true columns (M, N).

    MMCS: mean over features of the largest cosine between the column of a subcomponent and the true one. ML2R: mean
    norm ratio of that column to the true one. Features that the target itself does not represent (norm under a tenth
    of the largest) have no mechanism to be found, and are left out; `represented` counts the rest."""
    norm = columns.norm(dim=0)  # (N,)
    represented = norm > 0.1 * norm.max()
    if not len(parts):
        return {"mmcs": 0.0, "ml2r": 0.0, "represented": int(represented.sum())}
    best, which = F.cosine_similarity(parts, columns[None], dim=1).max(0)  # (N,), (N,)
    ratio = parts.norm(dim=1).gather(0, which[None])[0] / norm
    return {
        "mmcs": best[represented].mean().item(),
        "ml2r": ratio[represented].mean().item(),
        "represented": int(represented.sum()),
    }

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

def score(toy: Toy, model: nn.Module, decomposition: vpd.Decomposition, metrics: dict) -> dict[str, tuple]:
    """Add the scores to metrics["matrices"]. Returns, for the pictures, {path: (alive subcomponents, g on one-hot
    probes)}, ordered by the feature that a subcomponent serves most. Probes: 0.75 times each feature alone."""
    probes = 0.75 * torch.eye(toy.features, device=next(model.parameters()).device)
    _, g = vpd.predict_importances(model, decomposition, probes)
    drawn = {}
    for path, matrix in metrics["matrices"].items():
        alive = (torch.tensor(matrix["mean_importance"]) > vpd.ALIVE).nonzero()[:, 0]
        probe = g[path][:, alive]  # (features, alive)
        order = probe.argmax(0).add(toy.features * (probe.amax(0) < 0.1)).argsort(stable=True)
        alive, probe = alive[order], probe[:, order]
        parts = in_features(toy, model, path, subcomponents(decomposition, path)[alive])
        if toy.layers:
            matrix.update(residual_score(path, parts, probe))
        elif path != "identity":
            columns = in_features(toy, model, path, model.get_submodule(path).weight.detach())
            matrix.update(superposition_score(columns, parts))
        drawn[path] = parts, probe
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
    figure, axes = plt.subplots(down, across, figsize=(1.7 * across, 1.8 * down), squeeze=False, layout="constrained")
    limit = target.abs().max().item() * 1.1
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, matrix) in zip(axes.flat, shown):
        axis.set_axis_on()
        axis.set(title=title, xticks=[], yticks=[])
        axis.title.set_size(9)
        matrix = matrix.cpu().numpy()
        if len(matrix) == 2:
            for feature, (x, y) in enumerate(matrix.T):
                if abs(x) + abs(y) < 0.02 * limit:
                    continue  # nothing but an arrowhead, which has a size of its own
                axis.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": f"C{feature % 10}", "lw": 2})
            axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        else:
            axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    more = "" if len(panels) == len(shown) else f" (the first {len(shown) - 2} of {len(parts)})"
    figure.suptitle(f"{toy.name}, {path}: one arrow or column per feature{more}", size=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)

def draw_importances(toy: Toy, drawn: dict[str, tuple[Tensor, Tensor]], file: Path) -> None:
    """Causal importances of the alive subcomponents when one feature alone is present."""
    figure, axes = plt.subplots(1, len(drawn), figsize=(1 + 3 * len(drawn), 3.4), squeeze=False, layout="constrained")
    for axis, (path, (_, probe)) in zip(axes[0], drawn.items()):
        image = axis.imshow(probe.cpu().numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set(title=path, xlabel="alive subcomponent", ylabel="the one feature present")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes[0], label="causal importance g")
    figure.suptitle(f"{toy.name}: causal importances on one-hot probes", size=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)

# ---- The command ----------------------------------------------------------------------------------------------------

def table(metrics: dict) -> str:
    """What a person wants to see at the end."""
    lines = ["matrix           C  alive     L0   score against the known mechanisms"]
    for path, m in metrics["matrices"].items():
        known = [(k, m[k]) for k in ("mmcs", "ml2r", "features_recovered", "rank", "dense") if k in m]
        scores = "  ".join(f"{k} {x:.3f}" if isinstance(x, float) else f"{k} {x}" for k, x in known)
        lines.append(f"{path:12s} {m['C']:5d} {m['alive']:6d} {m['l0']:6.2f}   {scores}")
    lines.append("divergence (MSE):  " + "  ".join(f"{name} {x:.2g}" for name, x in metrics["divergence"].items()))
    lines.append("fresh adversary:   " + "  ".join(f"{n} steps {x:.2g}" for n, x in metrics["adversary"].items()))
    return "\n".join(lines)

def run(name: str, seed: int, out: Path, without: tuple[str, ...], device: str, published: bool) -> dict:
    """Train, decompose, score and draw one toy model; returns what is saved in metrics.json."""
    toy = parse_name(name, published)
    config = toy.config(seed, without)
    model, target_seconds = target_of_run(toy, seed, toy.target_steps(published), out, device)
    decomposition = vpd.decompose(model, toy.C(), toy.batch, vpd.mse, config, out)
    log = (out / "log.jsonl").read_text().splitlines()
    seconds = {"target": target_seconds, "decomposition": json.loads(log[-1])["seconds"]}  # of all sessions of the run
    evaluation = [toy.batch(torch.Generator().manual_seed(10_000 + seed), 20_000).to(device)]  # data never trained on
    metrics = {"model": name, "seed": seed, "without": without, "seconds": seconds}
    metrics |= vpd.evaluate(model, decomposition, evaluation, vpd.mse, seed)
    drawn = score(toy, model, decomposition, metrics)
    with vpd.replacing(out / "metrics.json") as file:
        file.write(json.dumps(metrics, indent=1).encode())
    for path, (parts, _) in drawn.items():
        draw_subcomponents(toy, model, decomposition, path, parts, out / f"subcomponents_{path}.png")
    draw_importances(toy, drawn, out / "importances.png")
    vpd.draw_run(metrics, out / "log.jsonl", out / "training.png")
    return metrics

def main() -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tms_5-2", help="default: tms_5-2")
    parser.add_argument("--seed", type=int, default=0, help="of the target, its data and the decomposition")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/MODEL with what differs from the default)")
    losses = {"nargs": "+", "choices": LOSSES, "default": (), "metavar": "LOSS"}
    parser.add_argument("--without", **losses, help=f"train without one or more of {', '.join(LOSSES)}")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or mps")
    parser.add_argument("--published", action="store_true", help="residual MLP in the published size, much slower")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more do not pay for such small matrices, and would change the last digits
    differs = f"-seed-{options.seed}" * (options.seed != 0) + "".join(f"-without-{loss}" for loss in options.without)
    out = options.out or Path("runs") / (options.model + differs + "-published" * options.published)
    try:
        metrics = run(options.model, options.seed, out, options.without, options.device, options.published)
    except vpd.BadInput as error:
        sys.exit(f"error: {error}")
    print(table(metrics))
    print(f"pictures and metrics.json are in {out}")

if __name__ == "__main__":
    main()
