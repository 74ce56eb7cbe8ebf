"""The paper's claims at the scale of a language model, one command each; not collected by pytest.

    python train_gpt2.py                                  # the target, and the decomposition that all claims start from
    python tests/evidence.py losses --from runs/laptop    # into runs/laptop/evidence: losses.json, losses.png; a table
    python tests/evidence.py components --from runs/tms_5-2    # the one claim about a toy

    losses       a decomposition without each of the five losses: what breaks? (two seeds, a quarter of the length)
    frontier     L0 against KL at five prices, at half the length
    transcoders  sparse transcoders instead of the MLPs, against the MLPs' subcomponents at five prices
    seeds        three seeds: how much of what one finds does another find?
    sizes        half, twice and four times the subcomponents
    attack       20 to 320 steps of the fresh adversary, on the run and on one trained without an adversary
    attention    the pairs of subcomponents that make attention scores
    edit         a subcomponent is made to write another token, beside a random one
    components   which subcomponents are active together, and do they belong together? (a run of toy_models.py)

`attention`, `edit` and `components` take seconds, the others up to an hour of one thread. Repeated, a killed
one goes on. One at a time: claims share decompositions.
[VPD] is "Interpreting Language Model Parameters" (2026); its figures are those of another, larger model."""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_gpt2  # isort: skip  # before torch, because it sets how idle threads wait
import matplotlib.style
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import toy_models
import vpd
from transcoders import attack_transcoders, best_transcoders, judged, latents_as_decomposition, mlps_masked, replaced

matplotlib.style.use("tableau-colorblind10")

# ---- What the claims share ------------------------------------------------------------------------------------------
def batches(run: train_gpt2.Run) -> list[Tensor]:
    """The evaluation set, as everywhere: 16,384 positions of validation text."""
    return train_gpt2.validation_batches(run.ids, run.preset, run.device)

def cached(file: Path, compute):
    """What compute() returns, from the file if it is there."""
    if not file.exists():
        result = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        with vpd.atomic_write(file) as opened:
            opened.write(json.dumps(result).encode())
    return json.loads(file.read_text())

def decomposed(run, out: Path, name: str, C: float = 1, **changes) -> tuple[vpd.Decomposition, dict]:
    """A decomposition of the run's target with other settings, and its figures (`vpd.evaluate`). From the folder
    out/name, if it is there. Without changes: that of the run."""
    decomposition = run.decomposition
    if changes or C != 1:
        print(name, file=sys.stderr)
        numbers = {path: max(1, round(C * len(u))) for path, u in run.decomposition.U.items()}
        batch = functools.partial(train_gpt2.sample, run.ids, run.preset.shape.context, run.preset.batch, False)
        config = replace(run.config, **changes)
        decomposition = vpd.decompose(run.model, numbers, batch, vpd.kl, config, out / name)
    evaluate = functools.partial(vpd.evaluate, run.model, decomposition, batches(run), vpd.kl)
    return decomposition, cached(out / name / "metrics.json", lambda: evaluate(0, train_gpt2.cross_entropy))

HEADLINE = ["L0", "L0 above 0.1", "alive", "divergence, stochastic", "divergence, rounded at 0"]
HEADLINE += ["fresh adversary, 80 steps", "loss above target, rounded at 0", "||Delta||^2 / ||W||^2"]

def headline(metrics: dict) -> dict[str, float]:
    """The figures that the tables show."""
    return {name: metrics["figures"][name] for name in HEADLINE}

def mean_importances(metrics: dict) -> dict[str, Tensor]:
    """Of all subcomponents over the evaluation set, {path: (C,)}."""
    return {path: torch.tensor(matrix["mean_importance"]) for path, matrix in metrics["matrices"].items()}

def alive_only(decomposition: vpd.Decomposition, metrics: dict, least: float = vpd.ALIVE) -> vpd.Decomposition:
    """A decomposition without the subcomponents whose mean importance is at most `least`, to be compared."""
    U, V = {}, {}
    for path, mean in mean_importances(metrics).items():
        alive = mean > least
        U[path] = decomposition.U[path][alive]
        V[path] = decomposition.V[path][:, alive]
    return vpd.Decomposition(U, V, decomposition.G)

def similarity(one: vpd.Decomposition, other: vpd.Decomposition) -> dict[str, dict[str, Tensor]]:
    """For each subcomponent of one decomposition, its largest cosine with a subcomponent of another, {path: {"U", "V",
    "product": (C,)}}. Absolute values of U_c and V_c, whose signs alone are arbitrary; the product's is at least 0.
    Dead subcomponents point anywhere."""
    largest = {}
    for path in one.U:
        u = F.normalize(one.U[path].detach(), dim=-1) @ F.normalize(other.U[path].detach(), dim=-1).T  # (C, C of other)
        v = F.normalize(one.V[path].detach(), dim=0).T @ F.normalize(other.V[path].detach(), dim=0)
        largest[path] = {}
        for name, cosines in {"U": u.abs(), "V": v.abs(), "product": u * v}.items():
            largest[path][name] = F.pad(cosines, (0, 1)).amax(1)  # at least 0, also if the other has none
    return largest

def mean_cosines(one: vpd.Decomposition, other: vpd.Decomposition, weights: Tensor | None = None,
                 least: float | None = None) -> dict[str, float]:
    """MMCS of U, V and product between two decompositions ([VPD] section 6). weights: of all subcomponents of one.
    least: instead of the mean, the share of cosines above it."""
    largest = similarity(one, other)
    means = {}
    for name in ("U", "V", "product"):
        cosines = torch.cat([of_matrix[name] for of_matrix in largest.values()])
        if least is not None:
            cosines = (cosines > least).float()
        share = torch.ones_like(cosines) if weights is None else weights
        means[name] = ((cosines * share).sum() / share.sum()).item()
    return means

def table(rows: dict[str, dict]) -> str:
    """{name: {column: number}} as text."""
    widths = {}
    for row in rows.values():
        widths |= {column: max(9, len(column)) for column in row}
    longest = max(len(name) for name in rows)
    lines = [" " * longest + "".join(f"  {column:>{width}s}" for column, width in widths.items())]
    for name, row in rows.items():
        cells = [f"{row[column]:{width}.5g}" if column in row else " " * width for column, width in widths.items()]
        lines.append("  ".join([f"{name:{longest}s}", *cells]))
    return "\n".join(lines)

def axes(*titles: str) -> tuple[Figure, list]:
    """A figure with a panel for each title."""
    figure = Figure(figsize=(5 * len(titles), 4), layout="constrained")
    panels = [figure.add_subplot(1, len(titles), place, title=title) for place, title in enumerate(titles, 1)]
    return figure, panels

# ---- The claims: each returns rows for the table, what else belongs in its json, and its figure ---------------------
LOSSES = ("stochastic", "adversarial", "importance", "frequency", "delta")

def losses(run, out: Path):
    """What is each of the five losses for? (U and V start as a split of W.) The picture: how far an attack gets, by
    its steps, without each loss; means of two seeds. [VPD] shows, with and without the adversary, masks g + (1 - g) r
    with one r for all, which here move the output little either way."""
    without = {"all five": ()} | {f"no {loss}": (loss,) for loss in LOSSES}
    without["no minimality"] = ("importance", "frequency")
    rows = {}
    figure, (axis,) = axes("KL under attack (nats)")
    for name, gone in without.items():
        changes = {f"w_{loss}": 0.0 for loss in gone} | {"steps": run.config.steps // 4}
        one, metrics = decomposed(run, out, f"losses {name} 0", seed=0, **changes)
        other, its_metrics = decomposed(run, out, f"losses {name} 1", seed=1, **changes)
        its = headline(its_metrics)
        rows[name] = {column: (number + its[column]) / 2 for column, number in headline(metrics).items()}
        cosines = mean_cosines(alive_only(one, metrics), alive_only(other, its_metrics))
        rows[name] |= {f"MMCS {what}": cosine for what, cosine in cosines.items()}
        attack = (torch.tensor(metrics["attack"]) + torch.tensor(its_metrics["attack"])) / 2
        if name != "no minimality":  # all is on, so that nothing can be attacked: 4e-6
            axis.plot(attack, ("-", "--", ":")[len(rows) % 3], label=name)
    axis.set(xlabel="steps of the attack", yscale="log")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the curves
    figure.set_size_inches(8, 4)
    return rows, {}, figure

PRICES = (0.25, 0.5, 1, 2, 4)  # times the preset's

def at_price(run, out: Path, price: float) -> tuple[vpd.Decomposition, dict]:
    """A decomposition at a multiple of the preset's price, of half the length, and its figures."""
    config = run.config
    changes = {"w_importance": price * config.w_importance, "w_frequency": price * config.w_frequency}
    return decomposed(run, out, f"price {price:g}", steps=config.steps // 2, **changes)

def frontier(run, out: Path):
    """Any single pair of KL and L0 lies on a curve, which the price moves along."""
    rows = {}
    for price in PRICES:
        _, metrics = at_price(run, out, price)
        rows[f"price x {price:g}"] = headline(metrics)
    figure, (axis,) = axes("five prices, one target")
    for key in ("divergence, stochastic", "divergence, rounded at 0", "fresh adversary, 80 steps"):
        axis.plot([row["L0"] for row in rows.values()], [row[key] for row in rows.values()], marker="o", label=key)
    axis.set(xlabel="L0: g > 0 at a position", ylabel="KL from the target (nats)", xscale="log", ylim=0)
    axis.set_xticks([20, 50, 100, 200], [20, 50, 100, 200])
    axis.minorticks_off()  # their labels overlap
    axis.legend(fontsize=8)
    return rows, {}, figure

KS = (4, 8, 16, 32, 64)  # latents that are on at a position

def transcoders(run, out: Path):
    """What one would do instead: replace each MLP by a sparse transcoder. [VPD]: layer by layer the two are close, but
    the errors of transcoders pile up when all are replaced."""
    rows = {}
    layers = range(run.model.shape.layers)
    which = {f"MLP {i}": [i] for i in layers} | {"all": list(layers)}
    for price in PRICES:
        decomposition, _ = at_price(run, out, price)
        for name, chosen in which.items():
            rows[f"subcomponents, price x {price:g}, {name}"] = mlps_masked(run, decomposition, batches(run), chosen)
    steps = run.config.steps // 2  # as long as the decompositions
    _, metrics = decomposed(run, out, "run")
    for k in KS:
        coders = best_transcoders(run, metrics, batches(run), out, k, steps)
        for name, chosen in which.items():
            used = {f"h.{i}.mlp": coders[i] for i in chosen}
            attacked = attack_transcoders(run, used, batches(run))
            row = judged(run, batches(run), functools.partial(replaced, run, used), attacked)
            dead = torch.cat([coder.dead() for coder in used.values()]).float().mean().item()
            rows[f"transcoder, k {k}, {name}"] = {"on per MLP": k, **row, "dead": dead}
    figure, panels = axes(*which)
    for axis, name in zip(panels, which):
        for kind, marker in (("subcomponents", "o"), ("transcoder", "s")):
            mine = [row for key, row in rows.items() if key.startswith(kind) and key.endswith(name)]
            on = [row["on per MLP"] for row in mine]
            axis.plot(on, [row["KL"] for row in mine], f"{marker}-", label=kind)
            axis.plot(on, [row["attacked"] for row in mine], f"{marker}:", label=f"{kind}, attacked")
        axis.set(xscale="log", yscale="log", xlabel="on at a position, per MLP", ylabel="KL from the target (nats)")
        axis.set_xticks((2, *KS), (2, *KS))
        axis.set_yticks([0.03, 0.05, 0.1, 0.2, 0.5], [0.03, 0.05, 0.1, 0.2, 0.5])
        axis.minorticks_off()  # their labels overlap
        axis.legend(fontsize=8)
    return rows, {}, figure

def untrained(run, seed: int) -> vpd.Decomposition:
    """A decomposition of the run's target before any training."""
    C = {path: len(u) for path, u in run.decomposition.U.items()}
    config = replace(run.config, seed=seed)
    return vpd.initialize(run.model, C, next(iter(batches(run))), config).decomposition

def seeds(run, out: Path):
    """How much of what one seed finds does another find? Mean largest cosines of the alive; of those with a mean
    importance above 1e-4; of the alive, weighted by mean importance, because the rarely used are the least determined,
    and so weighted the share of cosines above 0.5; of all before the training; and of the latents of transcoders.
    [VPD], five seeds, alive above 1e-6: U 0.48, V 0.52, product 0.28; transcoders 0.35 to 0.81."""
    seed = run.config.seed
    steps = run.config.steps
    decomposition, of_run = decomposed(run, out, "run")
    others = [decomposed(run, out, f"seed {n}", seed=n) for n in (seed + 1, seed + 2)]
    alive = []
    frequent = []
    importances = []
    coders = []
    for n, (decomposition, metrics) in enumerate([(decomposition, of_run), *others]):
        alive.append(alive_only(decomposition, metrics))
        frequent.append(alive_only(decomposition, metrics, 1e-4))
        mean = torch.cat(list(mean_importances(metrics).values()))
        importances.append(mean[mean > vpd.ALIVE])
        coders.append(latents_as_decomposition(best_transcoders(run, of_run, batches(run), out, 16, steps, n)))
    rows = {}
    for i, j in itertools.combinations(range(3), 2):
        pair = f"seeds {i}, {j}"
        rows[f"subcomponents, {pair}"] = mean_cosines(alive[i], alive[j])
        rows[f"above 1e-4, {pair}"] = mean_cosines(frequent[i], frequent[j])
        rows[f"weighted, {pair}"] = mean_cosines(alive[i], alive[j], importances[i])
        rows[f"share above 0.5, weighted, {pair}"] = mean_cosines(alive[i], alive[j], importances[i], 0.5)
        rows[f"before training, {pair}"] = mean_cosines(untrained(run, seed + i), untrained(run, seed + j))
        rows[f"transcoders, {pair}, k 16"] = mean_cosines(coders[i], coders[j])
    figure, (axis,) = axes("mean largest cosine between two seeds")
    for n, kind in enumerate(("subcomponents", "above 1e-4", "weighted", "before training", "transcoders")):
        mine = torch.tensor([list(row.values()) for key, row in rows.items() if key.startswith(kind)])
        axis.bar([x + 0.16 * n for x in range(3)], mine.mean(0).tolist(), 0.15, label=kind)
    axis.scatter([0, 1, 2], [0.48, 0.52, 0.28], color="black", zorder=3, label="published, subcomponents")
    axis.set_xticks([x + 0.32 for x in range(3)], ["U (decoder)", "V (encoder)", "product"])
    axis.set(ylim=(0, 1))
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the bars
    figure.set_size_inches(8, 4)
    return rows, {}, figure

def sizes(run, out: Path):
    """Are there more subcomponents alive when there is more room? [VPD]: from 0.5 to 4 times, alive stays at 6,500 to
    7,000."""
    factors = (0.5, 1, 2, 4)
    rows = {}
    for C in factors:
        _, metrics = decomposed(run, out, f"sizes {C:g}", C)
        rows[f"C x {C:g}"] = headline(metrics)
    figure, panels = axes("alive", "L0", "divergence, stochastic", "fresh adversary, 80 steps")
    for axis in panels:
        heights = [row[axis.get_title()] for row in rows.values()]
        axis.plot(factors, heights, marker="o")
        axis.set(xlabel="subcomponents, times the preset's", ylim=(0, 1.1 * max(heights)))
        axis.set_xscale("log", base=2)
    figure.set_size_inches(13, 3)
    return rows, {}, figure

def attack(run, out: Path):
    """How far does a longer attack get? [VPD], 20, 40, 80, 160, 320 steps: 0.83, 1.35, 3.84, 25, 40; all ablated 67."""
    rows = {}
    curves = {}
    steps = (20, 40, 80, 160, 320)
    figure, (axis,) = axes("the largest so far, one source per subcomponent")
    for name, changes in (("run", {}), ("no adversarial", {"w_adversarial": 0.0})):
        decomposition, _ = decomposed(run, out, name, **changes)
        some = batches(run)[: len(batches(run)) // 4]  # as `vpd.evaluate`
        cases = [(batch, *vpd.predict_importances(run.model, decomposition, batch)) for batch in some]
        climb = functools.partial(vpd.fresh_adversary, run.model, decomposition, cases, vpd.kl, steps=320)
        for size in (0.1, 0.02):
            curve = cached(out / f"attack {name} {size:g}.json", functools.partial(climb, size=size))
            label = f"{name}, steps of {size:g}"
            curves[label] = curve
            rows[label] = {str(n): curve[n] for n in steps}
            axis.plot(range(1, 321), curve[1:], label=label)
    axis.plot(steps, [0.83, 1.35, 3.84, 25, 40], "k.", label="published (another model)")
    axis.set(xlabel="steps", ylabel="KL from the target (nats)", xscale="log", yscale="log")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the curves
    figure.set_size_inches(8, 4)
    return rows, {"curves": curves}, figure

@torch.no_grad()
def score_terms(model: train_gpt2.GPT, decomposition: vpd.Decomposition, layer: int, ids: Tensor) -> dict[str, Tensor]:
    """The attention scores of a layer on ids (1, T), before the causal mask, as a sum over pairs of subcomponents.
    Of head h from position t to t': score = sum_{c,c'} a_q[t, c] static[h, c, c'] a_k[t', c'] + rest[h, t, t'], where
    a = V_c^T x, static = U_qc^h . U_kc'^h / sqrt(d), and rest is what involves a bias or Delta ([VPD] section 8)."""
    q, k = f"h.{layer}.attn.q", f"h.{layer}.attn.k"
    U, V = decomposition.U, decomposition.V
    _, inputs = vpd.forward_with_inputs(model, [q, k], ids)
    def by_head(x):  # (n, width) -> (heads, n, d)
        return x.view(len(x), model.shape.heads, -1).transpose(0, 1)
    x_q, x_k = inputs[q].squeeze(0), inputs[k].squeeze(0)
    a_q, a_k = x_q @ V[q], x_k @ V[k]  # (T, C)
    static = by_head(U[q]) @ by_head(U[k]).mT  # (heads, C_q, C_k)
    total = by_head(model.get_submodule(q)(x_q)) @ by_head(model.get_submodule(k)(x_k)).mT  # (heads, T, T)
    scale = (model.shape.heads / model.shape.width) ** 0.5
    return {"a_q": a_q, "a_k": a_k, "static": static * scale, "rest": (total - a_q @ static @ a_k.mT) * scale}

def centred(scores: Tensor) -> Tensor:
    """Scores (..., T, T) less their mean over the positions up to each, 0 beyond: what the softmax sees of them."""
    allowed = torch.ones_like(scores).tril()
    return (scores - (scores * allowed).sum(-1, keepdim=True) / allowed.sum(-1, keepdim=True)) * allowed

def explained(static: Tensor, a_q: Tensor, a_k: Tensor, scores: Tensor) -> Tensor:
    """The share of the variance of a head's scores (T, T), centred, that each pair explains alone, (C_q, C_k).
    static (C_q, C_k), a_q (T, C_q), a_k (T, C_k). 1 - |scores - X|^2 / |scores|^2, X a pair's centred scores."""
    counts = torch.arange(1, len(scores) + 1, device=scores.device).unsqueeze(1)
    spread = a_k.square().cumsum(0) - a_k.cumsum(0).square() / counts  # of a_k over the positions up to each, (T, C_k)
    gain = 2 * static * (a_q.mT @ scores @ a_k) - static.square() * (a_q.square().mT @ spread)  # 2 scores . X - |X|^2
    return gain / scores.square().sum()

def share_in_a_second_head(run, alive: vpd.Decomposition, path: str) -> float:
    """Of the alive subcomponents of an attention matrix, the share that has over half of its largest norm in a head
    also in another. o reads from the heads, the others write to them."""
    in_heads = alive.V[path].T if path.endswith("o") else alive.U[path]
    norm = in_heads.unflatten(1, (run.model.shape.heads, -1)).norm(dim=-1)
    large = norm > 0.5 * norm.amax(1, keepdim=True)
    return (large.sum(1) > 1).float().mean().item()

@torch.no_grad()
def attention(run, out: Path):
    """Which pairs of subcomponents of q and k make the attention scores of a text? Per head, the share of the variance
    that each of the three best pairs explains alone; per matrix, how many of the alive have over half of their largest
    norm in a second head. The text is the first of the evaluation set; the picture shows the last layer."""
    rows = {}
    ids = torch.cat(batches(run)).narrow(0, 0, 1)
    heads = run.model.shape.heads
    alive = alive_only(run.decomposition, json.loads((run.folder / "metrics.json").read_text()))
    for layer in range(run.model.shape.layers):
        for path in (f"h.{layer}.attn.{m}" for m in "qkvo"):
            rows[path] = {"in a second head": share_in_a_second_head(run, alive, path)}
        figure = Figure(figsize=(13, 2.5 * heads), layout="constrained")
        grid = figure.subplots(heads, 5, squeeze=False)
        terms = score_terms(run.model, run.decomposition, layer, ids)
        a_q, a_k = terms["a_q"], terms["a_k"]
        scores = centred(torch.einsum("tc,hcd,sd->hts", a_q, terms["static"], a_k) + terms["rest"])  # (heads, T, T)
        for h, (true, static) in enumerate(zip(scores, terms["static"])):
            share = explained(static, a_q, a_k, true)
            shares, pairs = share.flatten().topk(3)
            rows[f"layer {layer}, head {h}"] = {f"pair {n}": x for n, x in enumerate(shares.tolist(), 1)}
            pattern = true.masked_fill(torch.ones_like(true).triu(1) > 0, -torch.inf).softmax(-1)
            panels = {"attention": pattern, "scores": true}
            for pair in pairs.tolist():
                c_q, c_k = divmod(pair, share.shape[1])
                panels[f"q:{c_q} k:{c_k}"] = centred(static[c_q, c_k] * torch.outer(a_q[:, c_q], a_k[:, c_k]))
            for axis, (title, matrix) in zip(grid[h], panels.items()):
                high = matrix.abs().max().item()  # a pair is too faint to be seen on the scale of all
                axis.imshow(matrix.cpu().numpy(), cmap="RdBu_r", vmin=-high, vmax=high, interpolation="nearest")
                axis.set(title=f"head {h}: {title}", xticks=[], yticks=[])
    return rows, {"text": ids.flatten().tolist()}, figure

STRENGTHS = (0.5, 1.0, 2.0, 3.0, 5.0)  # in lengths of what the subcomponent wrote
WRITTEN = "raise"

@contextlib.contextmanager
def edited(run, path: str, c: int, token: int, strength: float):
    """Within, subcomponent c writes the direction of `token`, `strength` times as long as U_c, in place of U_c."""
    U = run.decomposition.U[path][c].detach()
    V = run.decomposition.V[path][:, c].detach()
    readout = train_gpt2.readout(run.model)
    direction = F.normalize(readout[token], dim=0)
    weight = run.model.get_submodule(path).weight
    original = weight.detach().clone()
    try:
        weight.data += torch.outer(strength * U.norm() * direction - U, V)
        yield
    finally:
        weight.data.copy_(original)

@torch.no_grad()
def effect(run, path: str, c: int, token: int, strength: float, ids: Tensor, fires: Tensor) -> dict[str, float]:
    """What an edit does on token ids (N, T). fires: bools (N, T), where c fires. "before", "after": the mean
    probability of the token there. "KL near", "KL elsewhere": mean KL from the target in nats per position, on the 20
    tokens either side of such a position, and on all others (0 if there are none)."""
    values = collections.defaultdict(list)
    for batch, where in zip(ids.split(8), fires.split(8)):
        with vpd.precision(run.device, run.decomposition.bf16):
            plain = run.model(batch).log_softmax(-1)
        # in a context of its own: autocast keeps its copies of the weights until the end
        with edited(run, path, c, token, strength), vpd.precision(run.device, run.decomposition.bf16):
            changed = run.model(batch).log_softmax(-1)
        near = F.max_pool1d(where.float(), 41, stride=1, padding=20) > 0
        kl = (plain.exp() * (plain - changed)).sum(-1)
        values["before"].append(plain[where][:, token].exp())
        values["after"].append(changed[where][:, token].exp())
        values["KL near"].append(kl[near])
        values["KL elsewhere"].append(kl[~near])
    return {name: torch.cat(x).mean().nan_to_num().item() for name, x in values.items()}

def clearest_at_line_breaks(run, ids: Tensor, g: dict[str, Tensor]) -> tuple[str, int]:
    """The subcomponent (path, c) that fires most clearly at line breaks, of those that write to the residual stream:
    where it fires and where line breaks are agree best (both, in the mean of the two numbers). g: {path: (N, T, C)}."""
    has_break = ["\n" in run.tokenizer.decode([token]) for token in range(run.preset.shape.vocabulary)]
    breaks = F.embedding(ids, torch.tensor(has_break).unsqueeze(1).to(ids.device))  # (N, T, 1)
    best = (-1.0, "", 0)
    for path, x in g.items():
        if path.endswith(train_gpt2.WRITERS):
            fires = x > train_gpt2.FIRES
            agreement = (fires & breaks).sum((0, 1)) / ((fires.sum((0, 1)) + breaks.sum()) / 2)
            best = max(best, (agreement.max().item(), path, int(agreement.argmax())))
    _, path, c = best
    return path, c

def edit(run, out: Path):
    """Can one edit what a subcomponent does, and nothing else? The one that fires most clearly at line breaks is made
    to write "raise" (or the commonest token, if the tokenizer does not know it), beside a random one of its matrix."""
    vpd.reject_if(not run.tokenizer, f"{run.folder} has no tokenizer to know line breaks: make a run on text")
    of = train_gpt2.reading(run)
    ids = torch.cat(of.batches)
    g, a = train_gpt2.observe(of)
    path, c = clearest_at_line_breaks(run, ids, g)
    encoded = run.tokenizer.encode(WRITTEN).tolist()
    token = encoded.pop() if len(encoded) == 1 else int(ids.flatten().mode().values)
    fires = g[path] > train_gpt2.FIRES
    others = [i for i in fires.any(0).any(0).nonzero().flatten().tolist() if i != c]
    vpd.reject_if(not others, f"no other subcomponent of {path} fires: there is no control")
    pick = torch.randint(len(others), (1,), generator=torch.Generator().manual_seed(0))
    rows = {}
    figure, (chance, harm) = axes("probability of the token where it fires", "KL from the target (nats)")
    for i, name in ((c, f"{path}:{c}"), (others[pick], f"{path}:{others[pick]}, at random")):
        where = fires[..., i]
        sign = a[path][..., i][where].float().mean().sign().item()
        for x in STRENGTHS:
            row = effect(run, path, i, token, sign * x, ids, where)
            rows[f"{name}, x {x:g}"] = {"fires at": int(where.sum()), **row}
        mine = [rows[f"{name}, x {x:g}"] for x in STRENGTHS]
        (line,) = chance.plot(STRENGTHS, [row["after"] for row in mine], marker="o", label=name)
        chance.axhline(row["before"], linestyle=":", color=line.get_color(), label=f"{name}, not edited")
        harm.plot(STRENGTHS, [row["KL near"] for row in mine], marker="o", label=f"{name}, within 20 tokens")
        harm.plot(STRENGTHS, [row["KL elsewhere"] for row in mine], marker="o", label=f"{name}, elsewhere")
    for axis in (chance, harm):
        axis.set(xlabel="strength, in lengths of what it wrote")
        axis.legend(fontsize=8)
    return rows, {"written": run.tokenizer.decode([token])}, figure

def cluster(active: Tensor, alpha: float = 3.0) -> dict:
    """Which subcomponents are one component, because they are active together? By minimum description length.

    active: bools (positions, C), for example g > 0.01. A group is active where any member is. What is active at a
    position takes log2(k) + alpha * members bits for each group that is active there: its name, one of k groups, and
    alpha to write out each member. The higher alpha, the more alike members must be: two equally frequent ones merge if
    each is active where the other is with a probability of about 2 alpha / (2 alpha + log2(k)), 0.38 for 3 and k = 900.
    Greedy: all begin alone; the pair whose merger costs least is merged, down to one group; the cheapest grouping on
    the way is the result. ours: [VPD] draws the pair among the cheapest, and stops where the cost would rise.

    Returns {"groups": lists of columns of `active`, without those that are never active, the most often active first;
    "bits_before", "bits_after": the mean cost of a position with all alone, and of the result}."""
    active = active.flatten(0, -2)
    positions = max(1, len(active))
    groups = [[c] for c in active.any(0).nonzero()[:, 0].tolist()]
    active = active[:, active.any(0)]  # (positions, k), a copy
    both = active.float().T @ active.float()  # both[i, j]: where i and j are active; s = both[i, i]
    members = torch.ones(len(groups), device=active.device)  # how many each group has
    if not groups:
        return {"groups": [], "bits_before": 0.0, "bits_after": 0.0}
    costs = []
    best = []
    while True:
        k = len(groups)
        s = both.diagonal()
        costs.append((s * (math.log2(k) + alpha * members)).sum().item())
        if costs[-1] <= min(costs):
            best = [(n, list(group)) for n, group in zip(s.tolist(), groups)]
        if k == 1:
            break
        # What a merger changes, without what is the same for all pairs: where only one of the two is active, the other
        # is written out, too; where both are, one name is saved.
        written = alpha * (s[:, None] * members + members[:, None] * s)
        change = written - both * (math.log2(k - 1) + alpha * (members[:, None] + members))
        i, j = sorted(divmod(int(change.fill_diagonal_(math.inf).argmin()), k))
        groups[i] += groups.pop(j)
        members[i] += members[j]
        active[:, i] |= active[:, j]
        others = torch.arange(k, device=active.device) != j
        members = members[others]
        active = active[:, others]
        both = both[others][:, others]
        both[i] = active[active[:, i]].sum(0)  # where i, now merged, and each other are active
        both[:, i] = both[i]
    often_first = [group for _, group in sorted(best, reverse=True)]
    return {"groups": often_first, "bits_before": costs[0] / positions, "bits_after": min(costs) / positions}

def load_toy(folder: Path) -> tuple:
    """A finished run of toy_models.py: toy, target model, decomposition, metrics. Raises BadInput if there is none."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        toy = toy_models.Toy(**torch.load(folder / "target.pt", weights_only=True)["wanted"]["toy"])
    except Exception as error:  # torch.load raises almost anything on a file that is not its own
        raise vpd.BadInput(f"{folder} holds no finished toy: give the folder of a run of toy_models.py") from error
    model, _ = toy_models.target_of_run(toy, metrics["seed"], 0, folder, "cpu")
    return toy, model, vpd.load_decomposition(folder), metrics

def groups_of_features(toy: toy_models.Toy, alive: dict[str, toy_models.Alive]) -> list[set[str]]:
    """What serves a feature (g > 0.1 if it is alone), for each; all of an identity; all of each W_out."""
    groups = [set() for _ in range(toy.features)]
    for path, of_matrix in alive.items():
        names = [f"{path}:{c}" for c in of_matrix.numbers.tolist()]
        if path.endswith(("identity", "out")):
            groups.append(set(names))
            continue
        for feature, i in (of_matrix.on_probes > 0.1).nonzero().tolist():
            groups[feature].add(names[i])
    return groups

def groups_of_induction(model, alive: dict[str, toy_models.Alive]) -> list[set[str]]:
    """What serves a token, a copied token or a position best, by the weights, for each."""
    serves = {"0.q": "position", "0.k": "position", "1.v": "copied", "1.o": "copied"}  # the other matrices: the token
    groups = collections.defaultdict(set)
    for path, true in toy_models.mechanisms(model).items():
        what = serves.get(path.removeprefix("layers."), "token")
        found = alive[path].matrices.flatten(1).unsqueeze(1)
        cosines = F.cosine_similarity(found, true.flatten(1), dim=2)  # (alive, n)
        best = cosines.argmax(0).tolist() if len(found) else []
        for n, i in enumerate(best):
            groups[what, n].add(f"{path}:{alive[path].numbers[i]}")
    return list(groups.values())

@torch.no_grad()
def components(folder: Path, out: Path):
    """Which subcomponents are one component, because they are active together (g > 0.01)? On a toy, whose groups are
    known: how many are found, how many are true, and how many of these are found exactly?"""
    toy, model, decomposition, metrics = load_toy(folder)
    data = toy.evaluation_data(metrics["seed"])
    alive = toy_models.alive_subcomponents(toy, model, decomposition, data, metrics["matrices"])
    true = groups_of_induction(model, alive) if toy.length else groups_of_features(toy, alive)
    _, g = vpd.predict_importances(model, decomposition, data)
    active = vpd.side_by_side(g) > 0.01  # Delta's never is
    active = active.any(1) if toy.length else active  # of induction anywhere in a sequence
    names = []
    for path, x in g.items():
        names += [f"{path}:{c}" for c in range(x.shape[-1])]
    clusters = cluster(active)
    found = []
    for columns in clusters["groups"]:
        found.append([names[c] for c in columns])
    exact = [group for group in found if true.count(set(group)) == 1]  # not two features with the same subcomponents
    row = {"found": len(found), "true": len(true), "exact": len(exact)}
    row |= {"bits, each alone": clusters["bits_before"], "bits, grouped": clusters["bits_after"]}
    on = active[:, list(itertools.chain(*clusters["groups"]))].float()
    figure, (axis,) = axes("subcomponents, group by group")
    image = axis.imshow((on.T @ on / on.sum(0)).cpu().numpy(), vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, label="how often the row is on, if the column is")
    return {metrics["model"]: row}, {"groups": found}, figure

# ---- The command line -----------------------------------------------------------------------------------------------
CLAIMED = (losses, frontier, transcoders, seeds, sizes, attack, attention, edit, components)
CLAIMS = {claim.__name__: claim for claim in CLAIMED}

def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="the folder of a finished run")
    parser.add_argument("--out", type=Path, help="default: evidence in that folder; for one run alone")
    options = parser.parse_args()
    claim = CLAIMS[options.claim]
    out = options.out or options.source / "evidence"
    train_gpt2.choose_precision("cpu")
    vpd.keep_memory()
    try:
        run = options.source if claim is components else train_gpt2.load(options.source)
        out.mkdir(parents=True, exist_ok=True)
        rows, more, figure = claim(run, out)
    except vpd.BadInput as error:
        sys.exit(f"error: {error}")
    content = json.dumps({"claim": claim.__doc__, "rows": rows, **more}, indent=1)
    train_gpt2.write(out / f"{options.claim}.json", content)
    figure.savefig(out / f"{options.claim}.png", dpi=110)
    print(f"{claim.__doc__}\n\n{table(rows)}\n\n{options.claim}.json and {options.claim}.png are in {out}")

if __name__ == "__main__":
    main()
