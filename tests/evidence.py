"""The paper's claims at the scale of a language model, one command each; not collected by pytest.

    python train_gpt2.py                                  # the target, and the decomposition that all claims start from
    python tests/evidence.py losses --from runs/laptop    # into runs/laptop/evidence: losses.json, losses.png; a table

    losses       a decomposition without each of the five losses: what breaks? (two seeds, a quarter of the length)
    frontier     L0 against KL at five prices, at half the length
    transcoders  sparse transcoders instead of the MLPs, against the MLPs' subcomponents at five prices
    seeds        three seeds: how much of what one finds does another find?
    sizes        half, twice and four times the subcomponents
    attack       20 to 320 steps of the fresh adversary, on the run and on one trained without an adversary
    attention    the pairs of subcomponents that make attention scores

`attention` takes seconds, the others take up to an hour and a half of one thread. A killed command goes on when it is
repeated.
[VPD] is "Interpreting Language Model Parameters" (2026); its figures are those of another, larger model."""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import train_gpt2
import vpd

# ---- What the claims share ------------------------------------------------------------------------------------------

def batches(run: train_gpt2.Run) -> list[Tensor]:
    """The evaluation set, as everywhere: 16,384 positions of validation text."""
    return train_gpt2.validation_batches(run.ids, run.preset, run.device)

def decomposed(run, out: Path, name: str, C: float = 1, **changes) -> tuple[vpd.Decomposition, dict]:
    """A decomposition of the run's target with other settings, and its figures (`vpd.evaluate`). From the folder
    out/name, if it is there. Without changes: that of the run."""
    decomposition, file = run.decomposition, out / name / "metrics.json"
    if changes or C != 1:
        print(name, file=sys.stderr)
        numbers = {path: max(1, round(C * len(u))) for path, u in run.decomposition.U.items()}
        batch = functools.partial(train_gpt2.sample, run.ids, run.preset.shape.context, run.preset.batch, False)
        config = replace(run.preset.config, **changes)
        decomposition = vpd.decompose(run.model, numbers, batch, vpd.kl, config, out / name)
    if not file.exists():
        metrics = vpd.evaluate(run.model, decomposition, batches(run), vpd.kl, 0, train_gpt2.cross_entropy)
        file.parent.mkdir(parents=True, exist_ok=True)
        with vpd.replacing(file) as opened:
            opened.write(json.dumps(metrics).encode())
    return decomposition, json.loads(file.read_text())

def headline(metrics: dict) -> dict:
    """The figures that the tables show."""
    kl, total, ce = metrics["divergence"], metrics["total"], metrics["loss"]
    figures = {"KL stochastic": kl["stochastic"], "KL rounded": kl["rounded_0"]}
    figures |= {"adversary": metrics["adversary"]["80"], "CE rounded": ce["rounded_0"] - ce["target"]}
    figures |= {"L0": total["l0"], "L0 above 0.1": total["l0_above_0.1"]}
    return figures | {"alive": total["alive"], "delta": metrics["delta"]}

def agreement(one: tuple, other: tuple) -> dict[str, float]:
    """MMCS of U, V and product between the alive subcomponents of two decompositions, (decomposition, metrics) each."""
    def alive(decomposition, metrics):
        kept = {path: torch.tensor(m["mean_importance"]) > vpd.ALIVE for path, m in metrics["matrices"].items()}
        U, V = decomposition.U, decomposition.V
        return vpd.Decomposition({path: U[path][mask] for path, mask in kept.items()},
                                 {path: V[path][:, mask] for path, mask in kept.items()}, None)  # fmt: skip
    of = vpd.similarity(alive(*one), alive(*other)).values()
    return {part: torch.cat([x[part] for x in of]).mean().item() for part in ("U", "V", "product")}

def table(rows: dict[str, dict]) -> str:
    """{name: {column: number}} as text."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    width, cells = max(map(len, rows)), {c: max(9, len(c)) for c in columns}
    lines = [" " * width + "".join(f"  {c:>{cells[c]}}" for c in columns)]
    for name, row in rows.items():
        shown = [f"{row[c]:.3g}" if abs(row.get(c, 1e9)) < 1000 else f"{row.get(c, math.nan):.0f}" for c in columns]
        lines.append(f"{name:{width}}" + "".join(f"  {x:>{cells[c]}}" for c, x in zip(columns, shown)))
    return "\n".join(lines)

def axes(*titles: str) -> tuple[Figure, list]:
    """A figure with a panel for each title."""
    figure = Figure(figsize=(5 * len(titles), 4), layout="constrained")
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for axis, title in zip(panels, titles):
        axis.set_title(title)
    return figure, list(panels)

# ---- The claims: each returns rows for the table, what else belongs in its json, and its figure ---------------------

def losses(run, out: Path):
    """What is each of the five losses for? (The warm-up on Delta-L2 stays.) Cross-entropy under masks g + (1 - g) r,
    with one r for all subcomponents: a faithful decomposition does not depend on it. [VPD] shows this curve with and
    without the adversary."""
    without = {"all five": (), "no stochastic": ("stochastic",), "no adversarial": ("adversarial",),
               "no importance": ("importance",), "no frequency": ("frequency",), "no delta": ("delta",),
               "no minimality": ("importance", "frequency")}  # fmt: skip
    rows, curves, grid = {}, {}, [r / 10 for r in range(11)]
    figure, (axis,) = axes("masks g + (1 - g) r: mean of two seeds")
    for name, gone in without.items():
        changes = {f"w_{loss}": 0.0 for loss in gone} | {"steps": run.preset.config.steps // 4}
        pair = [decomposed(run, out, f"losses {name} {seed}", seed=seed, **changes) for seed in (0, 1)]
        mean = [headline(metrics) for _, metrics in pair]
        rows[name] = {key: (mean[0][key] + mean[1][key]) / 2 for key in mean[0]}
        rows[name] |= {f"MMCS {part}": x for part, x in agreement(*pair).items()}
        curves[name] = [sum(constant_source(run, x, r) for x, _ in pair) / 2 for r in grid]
        axis.plot(grid, curves[name], marker="o", markersize=3, label=name)
    axis.set(xlabel="r, the source of every subcomponent", ylabel="cross-entropy above target (nats)")
    axis.legend(fontsize=8)
    return rows, {"r": grid, "cross-entropy above target": curves}, figure

@torch.no_grad()
def constant_source(run, decomposition: vpd.Decomposition, r: float) -> float:
    """Cross-entropy above target under masks g + (1 - g) r, without Delta."""
    above = 0.0
    for batch in batches(run):
        target, g = vpd.predict_importances(run.model, decomposition, batch)
        masks = {path: F.pad((x + (1 - x) * r)[..., :-1], (0, 1)) for path, x in g.items()}
        output = vpd.masked_forward(run.model, decomposition.U, decomposition.V, masks, batch)
        above += (train_gpt2.cross_entropy(batch, output) - train_gpt2.cross_entropy(batch, target)).item()
    return above / len(batches(run))

PRICES = (0.25, 0.5, 1, 2, 4)  # times the preset's

def at_price(run, out: Path, price: float) -> tuple[vpd.Decomposition, dict]:
    """A decomposition at a multiple of the preset's price, of half the length."""
    config = run.preset.config
    changes = {"w_importance": price * config.w_importance, "w_frequency": price * config.w_frequency}
    return decomposed(run, out, f"price {price:g}", steps=config.steps // 2, **changes)

def frontier(run, out: Path):
    """Any single pair of KL and L0 lies on a curve, which the price moves along."""
    rows = {f"price x {price:g}": headline(at_price(run, out, price)[1]) for price in PRICES}
    figure, (axis,) = axes("five prices, one target")
    for key in ("KL stochastic", "KL rounded", "adversary"):
        axis.plot([row["L0"] for row in rows.values()], [row[key] for row in rows.values()], marker="o", label=key)
    axis.set(xlabel="L0: g > 0 at a position", ylabel="KL from the target (nats)", xscale="log", ylim=0)
    axis.legend(fontsize=8)
    return rows, {}, figure

class Transcoder(nn.Module):
    """A sparse stand-in for an MLP, (..., width) to the same: of `latents` ReLUs the k largest at a position are on."""
    def __init__(self, width: int, latents: int, k: int):
        super().__init__()
        self.k, self.fired = k, torch.zeros(latents)  # positions since each latent was on
        self.encode, self.decode = nn.Linear(width, latents), nn.Linear(latents, width)
        nn.init.normal_(self.decode.weight, std=width**-0.5)
        self.encode.weight.data.copy_(self.decode.weight.T)

    def forward(self, x: Tensor, sources: Tensor | None = None) -> Tensor:
        """sources (latents,) in [0, 1]: how much of each latent is added back where it is positive, but not on."""
        a = F.relu(self.encode(x))
        on = torch.zeros_like(a).scatter_(-1, a.topk(self.k, -1).indices, 1.0)
        return self.decode(a * on if sources is None else a * (on + (1 - on) * sources))

def train_transcoder(run, layer: int, latents: int, k: int, lr: float, steps: int, seed: int) -> Transcoder:
    """Fit a transcoder to the MLP of a layer: mean squared error, Adam, cosine; as many positions as a decomposition
    sees. Latents that were off for 20,000 positions are helped: the 32 largest of them are fitted to the error."""
    torch.manual_seed(seed)
    coder, path = Transcoder(run.model.shape.width, latents, k).to(run.device), f"h.{layer}.mlp"
    optimizer = torch.optim.Adam(coder.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    data = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = train_gpt2.sample(run.ids, run.preset.shape.context, run.preset.batch, False, data).to(run.device)
        inputs, outputs = mlp_io(run, path, batch)
        a = F.relu(coder.encode(inputs))
        top = a.topk(coder.k, -1)
        code = torch.zeros_like(a).scatter_(-1, top.indices, top.values)
        rest = outputs - coder.decode(code)
        loss = rest.square().mean()
        coder.fired = torch.where((code > 0).any(0), 0.0, coder.fired + len(a))
        dead = coder.fired > 20_000
        if dead.any():
            helped = F.relu(coder.encode(inputs) * dead).topk(min(32, latents), -1)
            extra = torch.zeros_like(a).scatter_(-1, helped.indices, helped.values) @ coder.decode.weight.T
            loss = loss + (rest.detach() - extra).square().mean() / 32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return coder

@torch.no_grad()
def mlp_io(run, path: str, batch: Tensor) -> tuple[Tensor, Tensor]:
    """What an MLP reads and writes at all positions of a batch, (positions, width) each."""
    seen = []
    with vpd._hooked(run.model, [path], lambda path, module, args, output: seen.extend((args[0], output))):
        run.model(batch)
    return seen[0].flatten(0, 1), seen[1].flatten(0, 1)

def replaced(run, coders: dict[str, Transcoder], batch: Tensor, sources: dict | None = None) -> Tensor:
    """The model's output with transcoders in place of MLPs, {path: transcoder}."""
    swap = lambda path, module, args, output: coders[path](args[0], sources and sources[path])
    with vpd._hooked(run.model, coders, swap):
        return run.model(batch)

def judged(run, forward, attacked: float) -> dict[str, float]:
    """KL and cross-entropy above target of forward(batch) on the evaluation set, beside the attacked KL."""
    kl = ce = 0.0
    with torch.no_grad():
        for batch in batches(run):
            target, output = run.model(batch), forward(batch)
            kl += vpd.kl(target, output).item() / len(batches(run))
            above = train_gpt2.cross_entropy(batch, output) - train_gpt2.cross_entropy(batch, target)
            ce += above.item() / len(batches(run))
    return {"KL": kl, "CE": ce, "attacked": attacked}

def attack_transcoders(run, coders: dict[str, Transcoder]) -> float:
    """The largest KL in 80 steps of sign ascent on what is added back of latents that are off, one source each."""
    generator = torch.Generator().manual_seed(0)
    sources = {path: torch.rand(len(c.fired), generator=generator).requires_grad_() for path, c in coders.items()}
    largest, some = 0.0, batches(run)[:8]
    for _ in range(81):
        total = sum(vpd.kl(run.model(b).detach(), replaced(run, coders, b, sources)) for b in some) / len(some)
        largest = max(largest, total.item())
        for x, gradient in zip(sources.values(), torch.autograd.grad(total, list(sources.values()))):
            x.data.add_(0.1 * gradient.sign()).clamp_(0, 1)
    return largest

def mlps_masked(run, decomposition, layers) -> tuple[dict, float]:
    """The decomposition with only the MLPs of some layers masked, rounded (1 where g > 0, else 0): its figures, and how
    many subcomponents are on at a position, the mean over these layers. The adversary adds back what is off, and
    Delta."""
    paths, on = [f"h.{i}.mlp.{m}" for i in layers for m in ("up", "down")], 0.0
    def masks(batch, delta):
        _, g = vpd.predict_importances(run.model, decomposition, batch)
        rounded = {path: F.pad((x[..., :-1] > 0).float(), (0, 1), value=delta) for path, x in g.items()}
        return {path: x if path in paths else torch.ones_like(x) for path, x in rounded.items()}
    forward = lambda b: vpd.masked_forward(run.model, decomposition.U, decomposition.V, masks(b, 0.0), b)
    with torch.no_grad():
        cases = [(batch, run.model(batch), masks(batch, 0.0)) for batch in batches(run)[:8]]
        on = sum(g[path][..., :-1].sum(-1).mean().item() for _, _, g in cases for path in paths)
    attacked = max(vpd.fresh_adversary(run.model, decomposition, lambda: cases, vpd.kl))
    return judged(run, forward, attacked), on / len(cases) / len(layers)

RATES, KS = (1e-3, 3e-3, 1e-2), (4, 8, 16, 32, 64)

def best_transcoders(run, out: Path, k: int, steps: int, seed: int = 0) -> list[Transcoder]:
    """One transcoder for each layer's MLP; its learning rate is the best of RATES on the evaluation set."""
    coders, (_, metrics) = [], decomposed(run, out, "run")
    for layer in range(run.model.shape.layers):
        latents = sum(metrics["matrices"][f"h.{layer}.mlp.{m}"]["alive"] for m in ("up", "down"))
        k, file = min(k, latents), out / f"transcoder {layer} {k} {steps} {seed}.pt"
        if not file.exists():
            found = []
            for lr in RATES:
                coder = train_transcoder(run, layer, latents, k, lr, steps, seed)
                inputs, outputs = (torch.cat(x) for x in zip(*(mlp_io(run, f"h.{layer}.mlp", b) for b in batches(run))))
                with torch.no_grad():
                    found.append(((coder(inputs) - outputs).square().mean().item(), lr, coder))
            error, lr, coder = min(found, key=lambda x: x[0])
            print(f"transcoder of layer {layer}, k {k}: lr {lr:g}, error {error:.2e}", file=sys.stderr)
            with vpd.replacing(file) as opened:
                torch.save(coder.state_dict() | {"fired": coder.fired}, opened)
        saved = torch.load(file, weights_only=True)
        (coder := Transcoder(run.model.shape.width, latents, k)).fired = saved.pop("fired")
        coder.load_state_dict(saved)
        coders.append(coder.requires_grad_(False))
    return coders

def transcoders(run, out: Path):
    """What one would do instead: replace each MLP by a sparse transcoder. [VPD]: layer by layer the two are close, but
    the errors of transcoders pile up when all are replaced."""
    rows, layers = {}, range(run.model.shape.layers)
    which = {f"MLP {i}": [i] for i in layers} | {"all": list(layers)}
    for price in PRICES:
        decomposition, _ = at_price(run, out, price)
        for name, chosen in which.items():
            figures, on = mlps_masked(run, decomposition, chosen)
            rows[f"subcomponents, price x {price:g}, {name}"] = {"on per MLP": on, **figures}
    for k in KS:
        coders = best_transcoders(run, out, k, run.preset.config.steps // 2)  # as long as the decompositions
        dead = [(coder.fired > 20_000).sum().item() for coder in coders]
        for name, chosen in which.items():
            used = {f"h.{i}.mlp": coders[i] for i in chosen}
            figures = judged(run, functools.partial(replaced, run, used), attack_transcoders(run, used))
            dead_share = sum(dead[i] for i in chosen) / sum(len(coders[i].fired) for i in chosen)
            rows[f"transcoder, k {k}, {name}"] = {"on per MLP": k, **figures, "dead": dead_share}
    figure, panels = axes(*which)
    for axis, name in zip(panels, which):
        for kind, style in (("subcomponents", "o"), ("transcoder", "s")):
            mine = [row for key, row in rows.items() if key.startswith(kind) and key.endswith(name)]
            for figure_of, line in (("KL", "-"), ("attacked", ":")):
                label = f"{kind}{', attacked' * (figure_of == 'attacked')}"
                axis.plot([x["on per MLP"] for x in mine], [x[figure_of] for x in mine], style + line, label=label)
        axis.set(xscale="log", yscale="log", xlabel="on at a position, per MLP", ylabel="KL from the target (nats)")
    panels[0].legend(fontsize=8)
    return rows, {}, figure

def seeds(run, out: Path):
    """How much of what one seed finds does another find? [VPD], five seeds: U 0.48, V 0.52, product 0.28; transcoders
    0.35 to 0.81."""
    first = run.preset.config.seed
    found = [decomposed(run, out, "run"), *(decomposed(run, out, f"seed {s}", seed=s) for s in (first + 1, first + 2))]
    coders = [best_transcoders(run, out, 16, run.preset.config.steps, seed) for seed in range(3)]
    rows = {}
    for i, j in ((0, 1), (0, 2), (1, 2)):
        rows[f"subcomponents of seeds {i}, {j}"] = agreement(found[i], found[j])
        parts = []
        for one, other in zip(coders[i], coders[j]):  # a latent writes U_c and reads V_c, as a subcomponent does
            pair = [vpd.Decomposition({"": c.decode.weight.T[alive]}, {"": c.encode.weight.T[:, alive]}, None)
                    for c in (one, other) for alive in [c.fired <= 20_000]]  # fmt: skip
            parts.append(vpd.similarity(*pair)[""])
        rows[f"transcoders of seeds {i}, {j}, k 16"] = {
            part: torch.cat([x[part] for x in parts]).mean().item() for part in ("U", "V", "product")}  # fmt: skip
    figure, (axis,) = axes("mean largest cosine between two seeds")
    published = {"subcomponents": (0.48, 0.52, 0.28)}
    for n, kind in enumerate(("subcomponents", "transcoders")):
        mine = [list(row.values()) for key, row in rows.items() if key.startswith(kind)]
        axis.bar([x + 0.3 * n for x in range(3)], [sum(x) / len(x) for x in zip(*mine)], 0.28, label=kind)
    axis.scatter([0, 1, 2], published["subcomponents"], color="black", zorder=3, label="published, subcomponents")
    axis.set_xticks([x + 0.15 for x in range(3)], ["U (decoder)", "V (encoder)", "product"])
    axis.set(ylim=(0, 1))
    axis.legend(fontsize=8)
    return rows, {}, figure

def sizes(run, out: Path):
    """Are there more subcomponents alive when there is more room? [VPD]: from 0.5 to 4 times, alive stays at 6,500 to
    7,000."""
    rows = {f"C x {C:g}": headline(decomposed(run, out, f"sizes {C:g}", C)[1]) for C in (0.5, 1, 2, 4)}
    figure, panels = axes("alive", "L0", "KL, stochastic masks", "KL, fresh adversary")
    for axis, key in zip(panels, ("alive", "L0", "KL stochastic", "adversary")):
        found = [row[key] for row in rows.values()]
        axis.plot([0.5, 1, 2, 4], found, marker="o")
        axis.set(xscale="log", xlabel="subcomponents, times the preset's", ylim=(0, 1.1 * max(found)))
        axis.minorticks_off()
        axis.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    figure.set_size_inches(13, 3)
    return rows, {}, figure

def attack(run, out: Path):
    """How far does a longer attack get? [VPD], 20, 40, 80, 160, 320 steps: 0.83, 1.35, 3.84, 25, 40; all ablated 67."""
    which = {"run": decomposed(run, out, "run")[0]}
    which["no adversary"] = decomposed(run, out, "no adversarial", w_adversarial=0.0)[0]
    rows, curves, steps = {}, {}, (20, 40, 80, 160, 320)
    figure, (axis,) = axes("the largest so far, one source per subcomponent")
    for name, decomposition in which.items():
        cases = [(batch, *vpd.predict_importances(run.model, decomposition, batch)) for batch in batches(run)]
        for size in (0.1, 0.02):
            climb = functools.partial(vpd.fresh_adversary, run.model, decomposition, lambda: cases, vpd.kl)
            curve = cached(out / f"attack {name} {size:g}.json", lambda: climb(steps=320, size=size))
            curves[f"{name}, steps of {size:g}"] = curve
            rows[f"{name}, steps of {size:g}: last"] = {str(n): curve[n] for n in steps}
            rows[f"{name}, steps of {size:g}: largest"] = vpd.largest_within(curve, steps)
            so_far = vpd.largest_within(curve, range(1, 321))
            axis.plot(range(1, 321), so_far.values(), label=f"{name}, steps of {size:g}")
    axis.plot(steps, [0.83, 1.35, 3.84, 25, 40], "k.", label="published (another model)")
    axis.set(xlabel="steps", ylabel="KL from the target (nats)", xscale="log", yscale="log")
    axis.legend(fontsize=8)
    return rows, {"curves": curves}, figure

def cached(file: Path, compute):
    """What compute() returns, from the file if it is there."""
    if not file.exists():
        result = compute()
        with vpd.replacing(file) as opened:
            opened.write(json.dumps(result).encode())
    return json.loads(file.read_text())

@torch.no_grad()
def score_parts(model: train_gpt2.GPT, decomposition: vpd.Decomposition, layer: int, ids: Tensor) -> dict[str, Tensor]:
    """The attention scores of a layer on ids (1, T), before the causal mask, as a sum over pairs of subcomponents.
    Of head h from position t to t': score = sum_{c,c'} a_q[t, c] static[h, c, c'] a_k[t', c'] + rest[h, t, t'], where
    a = V_c^T x, static = U_qc^h . U_kc'^h / sqrt(d), and rest is what involves a bias or Delta ([VPD] section 8)."""
    paths, heads = [f"h.{layer}.attn.{m}" for m in "qk"], model.shape.heads
    _, inputs = vpd.forward_with_inputs(model, paths, ids)
    a, writes, others = [], [], []
    for path in paths:
        x, U, V, linear = inputs[path][0], decomposition.U[path], decomposition.V[path], model.get_submodule(path)
        a.append(x @ V)  # (T, C)
        writes.append(U.view(len(U), heads, -1).transpose(0, 1))  # (heads, C, d)
        others.append((linear(x) - x @ V @ U).view(len(x), heads, -1).transpose(0, 1))  # bias, Delta: (heads, T, d)
    scale = writes[0].shape[-1] ** -0.5
    by_parts = [torch.einsum("tc,hcd->htd", *pair) for pair in zip(a, writes)]  # (heads, T, d)
    rest = by_parts[0] @ others[1].mT + others[0] @ by_parts[1].mT + others[0] @ others[1].mT
    return {"a_q": a[0], "a_k": a[1], "static": writes[0] @ writes[1].mT * scale, "rest": rest * scale}

def centred(scores: Tensor) -> Tensor:
    """Scores (..., T, T) less their mean over the positions up to each, 0 beyond: what the softmax sees of them."""
    allowed = torch.ones_like(scores).tril()
    return (scores - (scores * allowed).sum(-1, keepdim=True) / allowed.sum(-1, keepdim=True)) * allowed

def explained(static: Tensor, a_q: Tensor, a_k: Tensor, scores: Tensor) -> Tensor:
    """The share of the variance of a head's scores (T, T), centred, that each pair explains alone, (C_q, C_k).
    static (C_q, C_k), a_q (T, C_q), a_k (T, C_k). 1 - |scores - X|^2 / |scores|^2, X a pair's centred scores."""
    counts = torch.arange(1, len(scores) + 1, device=scores.device)[:, None]
    spread = a_k.square().cumsum(0) - a_k.cumsum(0).square() / counts  # of a_k over the positions up to each, (T, C_k)
    gain = 2 * static * (a_q.mT @ scores @ a_k) - static.square() * (a_q.square().mT @ spread)  # 2 scores . X - |X|^2
    return gain / scores.square().sum()

@torch.no_grad()
def attention(run, out: Path):
    """Which pairs of subcomponents of q and k make the attention scores of a text? Per head, the share of the variance
    that each of the three best pairs explains alone; per matrix, how many of the alive have over half of their largest
    norm in a second head. The text is the first of the evaluation set; the picture shows the last layer."""
    rows, ids, shape, kept = {}, batches(run)[0][:1], run.model.shape, train_gpt2.alive(run)
    figure = Figure(figsize=(13, 2.5 * shape.heads), layout="constrained")
    grid = figure.subplots(shape.heads, 5, squeeze=False)
    for layer in range(shape.layers):
        for path in (f"h.{layer}.attn.{m}" for m in "qkvo"):
            U, V = run.decomposition.U[path][kept[path]], run.decomposition.V[path].T[kept[path]]
            by_head, other = (V, U) if path.endswith("o") else (U, V)  # o reads from the heads
            norm = by_head.view(len(U), shape.heads, -1).norm(dim=-1) * other.norm(dim=-1, keepdim=True)
            several = (norm > 0.5 * norm.amax(1, keepdim=True)).sum(1) > 1
            rows[path] = {"in a second head": several.float().mean().item()}
        parts = score_parts(run.model, run.decomposition, layer, ids)
        a_q, a_k, static = parts["a_q"], parts["a_k"], parts["static"]
        scores = centred(torch.einsum("tc,hcd,sd->hts", a_q, static, a_k) + parts["rest"])  # (heads, T, T)
        for h, true in enumerate(scores):
            share = explained(static[h], a_q, a_k, true)
            best = [divmod(i, share.shape[1]) for i in share.flatten().topk(3).indices.tolist()]
            rows[f"layer {layer}, head {h}"] = {f"pair {n}": share[pair].item() for n, pair in enumerate(best, 1)}
            pattern = torch.where(torch.ones_like(true).tril() > 0, true, -torch.inf).softmax(-1)
            panels = [("attention", pattern), ("scores", true)]
            for c, other in best:
                outer = static[h, c, other] * torch.outer(a_q[:, c], a_k[:, other])
                panels.append((f"q:{c} k:{other}", centred(outer)))
            for axis, (title, matrix) in zip(grid[h], panels):
                axis.clear()  # the last layer stays
                high = matrix.abs().max().item()  # a pair is too faint to be seen on the scale of all
                style = {"vmin": 0} if title == "attention" else {"vmin": -high, "vmax": high, "cmap": "RdBu_r"}
                axis.imshow(matrix.numpy(), interpolation="nearest", **style)
                axis.set(title=f"head {h}: {title}", xticks=[], yticks=[])
    return rows, {"text": ids[0].tolist()}, figure

# ---- The command line -----------------------------------------------------------------------------------------------

CLAIMS = {claim.__name__: claim for claim in (losses, frontier, transcoders, seeds, sizes, attack, attention)}

def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="the folder of a finished run")
    parser.add_argument("--out", type=Path, help="default: evidence in that folder; for one run alone")
    options = parser.parse_args()
    vpd.keep_memory()
    try:
        run = train_gpt2.load(options.source)
        (out := options.out or options.source / "evidence").mkdir(parents=True, exist_ok=True)
        rows, more, figure = CLAIMS[options.claim](run, out)
    except vpd.BadInput as error:
        sys.exit(f"error: {error}")
    claim = CLAIMS[options.claim]
    with vpd.replacing(out / f"{options.claim}.json") as file:
        file.write(json.dumps({"claim": claim.__doc__, "rows": rows, **more}, indent=1).encode())
    figure.savefig(out / f"{options.claim}.png", dpi=110)
    print(f"{claim.__doc__}\n\n{table(rows)}\n\n{options.claim}.json and {options.claim}.png are in {out}")

if __name__ == "__main__":
    main()
