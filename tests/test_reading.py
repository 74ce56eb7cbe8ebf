"""Reading a decomposition: attributions, graphs and pruning, against finite differences and planted circuits."""

import functools
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import evidence
import train_gpt2 as gpt
import vpd

EMBEDDINGS = ("tokens", "positions")
MATRICES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")


class Silent(nn.Module):
    """A causal importance function that is never asked."""


def small(seed=0, linear=False):
    """A random GPT in float64, a random decomposition of all its matrices, importances (some 0) and a prompt."""
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.Shape(layers=2, width=8, heads=2, context=5, vocabulary=7)).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    U, V, g = {}, {}, {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            d_out, d_in = module.weight.shape
            U[path], V[path] = torch.randn(6, d_out).double(), torch.randn(d_in, 6).double() / d_in**0.5
            g[path] = (torch.rand(1, 5, 7) * (torch.rand(1, 5, 7) < 0.6)).double()
            g[path][..., -1] = 0
    return model, vpd.Decomposition(U, V, Silent()), g, torch.randint(7, (1, 5))


def frozen_forward(model, writes, batch):
    """The inputs of all matrices, and the output, when every matrix and embedding writes what is given."""
    inputs, handles = {}, []
    for path, write in writes.items():

        def hook(module, args, output, path=path, write=write):
            inputs[path] = args[0]
            return write

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    output = model(batch)
    [handle.remove() for handle in handles]
    return inputs, output


def test_an_edge_is_the_change_of_its_target_per_change_of_its_sources_write_with_all_else_frozen():
    model, decomposition, g, batch = small()
    U, V = decomposition.U, decomposition.V
    graph = vpd.attribution_graph(model, decomposition, g, batch, lambda logits: logits[0, -1, 3], EMBEDDINGS)
    writes, order = {}, ["tokens", "positions", *(f"h.{i}.{matrix}" for i in (0, 1) for matrix in MATRICES)]

    def remember(module, args, output, path):
        writes[path] = output.detach()

    handles = []
    for path in EMBEDDINGS:
        hook = functools.partial(remember, path=path)
        handles.append(model.get_submodule(path).register_forward_hook(hook))
    model(batch)
    [handle.remove() for handle in handles]
    for path in order[2:]:  # each matrix's masked output, from those before it
        later = {p: torch.zeros(1, 5, U[p].shape[1]).double() for p in order[2:] if p not in writes}
        inputs, _ = frozen_forward(model, writes | later, batch)
        parts = (g[path][..., c, None] * (inputs[path] @ V[path][:, c])[..., None] * U[path][c] for c in range(6))
        writes[path] = sum(parts) + model.get_submodule(path).bias

    def value(node, writes):
        inputs, output = frozen_forward(model, writes, batch)
        if node["matrix"] == "outcome":
            return output[0, -1, 3]
        c = node["subcomponent"]
        return inputs[node["matrix"]][0, node["position"]] @ V[node["matrix"]][:, c] * U[node["matrix"]][c].norm()

    generator = torch.Generator().manual_seed(0)
    inputs, _ = frozen_forward(model, writes, batch)
    for number in torch.randperm(len(graph["edges"]), generator=generator)[:150].tolist():
        edge = graph["edges"][number]
        source, target = graph["nodes"][edge["source"]], graph["nodes"][edge["target"]]
        path, t, c = source["matrix"], source["position"], source["subcomponent"]
        if path in EMBEDDINGS:
            own = writes[path].reshape(-1, 8)[t]
        else:
            own = g[path][0, t, c] * (inputs[path][0, t] @ V[path][:, c]) * U[path][c]
        changed = []
        for sign in (1, -1):
            write = writes[path].clone()
            write.reshape(-1, write.shape[-1])[t] += sign * 1e-5 * own
            changed.append(value(target, {**writes, path: write}))
        slope = ((changed[0] - changed[1]) / 2e-5).item()
        assert edge["attribution"] == pytest.approx(slope, rel=1e-4, abs=1e-8), (source, target)


def test_no_edge_runs_from_a_later_position_or_layer_and_only_attention_moves_between_positions():
    model, decomposition, g, batch = small()
    graph = vpd.attribution_graph(model, decomposition, g, batch, lambda logits: logits[0, -1, 3], EMBEDDINGS)

    def depth(node):
        if node["matrix"] in EMBEDDINGS:
            return -1
        if node["matrix"] == "outcome":
            return 99
        _, layer, _, kind = node["matrix"].split(".")
        return {"q": 0, "k": 0, "v": 0, "o": 1, "up": 2, "down": 3}[kind] + 4 * int(layer)

    assert len(graph["edges"]) > 100
    for edge in graph["edges"]:
        source, target = graph["nodes"][edge["source"]], graph["nodes"][edge["target"]]
        assert depth(source) < depth(target)
        if source["matrix"][-1] in "kv" and target["matrix"].endswith("attn.o"):
            assert source["position"] <= target["position"]
        else:
            assert source["position"] == target["position"]


def test_on_a_linear_model_attributions_add_up_to_the_activation():
    torch.manual_seed(0)

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.first, self.second = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, ids):
            x = self.embedding(ids)  # (1, T, 4)
            h = self.first(x)
            return self.second(h + torch.cat([x, x[..., :2]], -1))

    model = Linear().double().eval()
    shapes = {"first": (6, 4), "second": (3, 6)}
    U = {p: torch.randn(5, d_out).double() for p, (d_out, _) in shapes.items()}
    V = {p: torch.randn(d_in, 5).double() for p, (_, d_in) in shapes.items()}
    masks = {p: torch.rand(1, 4, 6).double() for p in shapes}  # Delta's mask too
    decomposition = vpd.Decomposition(U, V, Silent())
    output, activations, writes = vpd.cut_forward(model, decomposition, masks, torch.randint(7, (1, 4)), ("embedding",))
    for t in range(4):
        for c in range(5):
            value = activations["second"][0, t, c]
            found = vpd.attributions(value, decomposition, masks, activations, writes)
            assert sum(x.sum() for x in found.values()).item() == pytest.approx(value.item(), rel=1e-9)
    value = output[0, 2, 1]
    found = vpd.attributions(value, decomposition, masks, activations, writes)
    assert sum(x.sum() for x in found.values()).item() == pytest.approx(value.item(), rel=1e-9)


def test_without_embeddings_the_first_matrix_has_no_sources_and_the_graph_is_still_made():
    model, decomposition, g, batch = small()
    graph = vpd.attribution_graph(model, decomposition, g, batch, lambda logits: logits[0, -1, 3])
    into = {graph["nodes"][edge["target"]]["matrix"] for edge in graph["edges"]}
    assert "h.0.attn.q" not in into and {"h.0.attn.o", "h.1.mlp.down", "outcome"} <= into


def previous_token_model():
    """One attention layer that predicts, at every position, the token before, one subcomponent per mechanism.

    The residual stream holds the token (0-3), the position (4-9) and the prediction (10-13).
    """
    model = gpt.GPT(gpt.Shape(layers=1, width=14, heads=1, context=6, vocabulary=4)).eval()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    block = model.h[0]
    block.norm_attn, block.norm_mlp, model.norm = nn.Identity(), nn.Identity(), nn.Identity()
    eye = torch.eye(14)
    # the prediction is read from dimensions of its own, and the token is written there too
    model.tokens.weight.data = eye[:4] + eye[10:14]
    model.positions.weight.data = eye[4:10]
    read = {  # (read direction, write direction) of each subcomponent
        "h.0.attn.q": [(eye[4 + t], 40 * eye[4 + t - 1]) for t in range(1, 6)],
        "h.0.attn.k": [(eye[4 + t], eye[4 + t]) for t in range(6)],
        "h.0.attn.v": [(eye[i], eye[i]) for i in range(4)],
        "h.0.attn.o": [(eye[i], 5 * eye[10 + i]) for i in range(4)],
    }
    U = {path: torch.stack([write for _, write in parts]) for path, parts in read.items()}
    V = {path: torch.stack([direction for direction, _ in parts], 1) for path, parts in read.items()}
    for path in U:
        model.get_submodule(path).weight.data = (V[path] @ U[path]).T
    return model, vpd.Decomposition(U, V, Silent())


def test_the_planted_previous_token_circuit_comes_out_on_top():
    model, decomposition = previous_token_model()
    batch = torch.tensor([[0, 1, 2, 3, 1, 2]])
    assert model(batch)[0, 1:].argmax(-1).tolist() == batch[0, :-1].tolist()
    _, inputs = vpd.forward_with_inputs(model, decomposition.U, batch)
    active = {path: (inputs[path] @ V).abs() > 0.5 for path, V in decomposition.V.items()}
    g = {path: nn.functional.pad(x.float(), (0, 1)) for path, x in active.items()}
    graph = vpd.attribution_graph(model, decomposition, g, batch, lambda logits: logits[0, -1, 1], EMBEDDINGS)

    def into(target):
        edges = [e for e in graph["edges"] if graph["nodes"][e["target"]] == target]
        return graph["nodes"][max(edges, key=lambda e: abs(e["attribution"]))["source"]]

    o = into(graph["nodes"][-1])
    assert (o["matrix"], o["position"], o["subcomponent"]) == ("h.0.attn.o", 5, 1)
    v = into(o)
    assert (v["matrix"], v["position"], v["subcomponent"]) == ("h.0.attn.v", 4, 1)
    token = into(v)
    assert (token["matrix"], token["position"]) == ("tokens", 4)

    # pruned to this one prediction: the value read from the previous position stays, those of all others go
    def loss(logits):
        return nn.functional.cross_entropy(logits[:, -1], torch.tensor([1]))

    for adversarial in (False, True):
        kept = vpd.prune(model, decomposition, g, batch, loss, price_per_node=1e-3, adversarial=adversarial, steps=200)
        assert all((x[g[path] == 0] == 0).all() for path, x in kept.items())
        values = [(t, c) for t, c in kept["h.0.attn.v"][0].nonzero().tolist()]
        assert values == [(4, 1)], values
        assert kept["h.0.attn.o"][0].nonzero().tolist() == [[5, 1]]


def description_length(active, groups, alpha):
    """Bits per position, by counting: of each position's active groups the name and all members."""
    bits = 0.0
    for position in active.tolist():
        for group in groups:
            if any(position[c] for c in group):
                bits += math.log2(len(groups)) + alpha * len(group)
    return bits / len(active)


def groupings(items):
    """All ways to part a list into groups."""
    if not items:
        yield []
        return
    for rest in groupings(items[1:]):
        yield [[items[0]], *rest]
        for i, group in enumerate(rest):
            yield [*rest[:i], [items[0], *group], *rest[i + 1 :]]


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_clusters_cost_what_they_say_and_seldom_more_than_the_best_of_all_groupings(alpha):
    best_found = 0
    for seed in range(12):
        torch.manual_seed(seed)
        active = torch.rand(60, 3).lt(0.2)[:, torch.randint(3, (6,))] ^ torch.rand(60, 6).lt(0.05)
        result, columns = vpd.cluster(active, alpha), active.any(0).nonzero()[:, 0].tolist()
        assert sorted(c for group in result["groups"] for c in group) == columns  # each once
        cost = description_length(active, result["groups"], alpha)
        assert result["bits_after"] == pytest.approx(cost, rel=1e-6)
        assert result["bits_before"] == pytest.approx(description_length(active, [[c] for c in columns], alpha), rel=1e-6)
        best = min(description_length(active, grouping, alpha) for grouping in groupings(columns))
        assert best - 1e-9 < cost + 1e-6 and cost < 1.15 * best
        best_found += cost < best + 1e-6
    assert best_found >= 9  # greedy merging cannot take a merger back


def test_planted_components_are_found_and_what_is_never_active_is_left_out():
    torch.manual_seed(0)
    jobs = torch.rand(4000, 7) < torch.tensor([0.02, 0.02, 0.05, 0.1, 0.1, 0.3, 0.0])
    of_job = torch.randint(7, (20,))
    groups = vpd.cluster(jobs[:, of_job].reshape(40, 100, 20))["groups"]
    expected = {tuple((of_job == job).nonzero()[:, 0].tolist()) for job in range(6)} - {()}
    assert {tuple(sorted(group)) for group in groups} == expected
    assert vpd.cluster(torch.zeros(10, 3, dtype=torch.bool)) == {"groups": [], "bits_before": 0.0, "bits_after": 0.0}


def test_similarity_is_the_largest_cosine_between_explicit_rank_one_matrices():
    torch.manual_seed(0)
    one = ({"W": torch.randn(5, 3).double()} for _ in range(2))
    other = ({"W": torch.randn(4, 5).double()} for _ in range(2))
    one, other = (vpd.Decomposition(U, V, Silent()) for U, V in zip(one, other))
    matrices = [torch.einsum("co,ic->coi", x.U["W"], x.V["W"]).flatten(1) for x in (one, other)]
    found = vpd.similarity(one, other)["W"]
    for c in range(5):
        cosines = [nn.functional.cosine_similarity(matrices[0][c], m, dim=0) for m in matrices[1]]
        assert found["product"][c].item() == pytest.approx(max(0, max(cosines).item()), rel=1e-12)
        cosines = [nn.functional.cosine_similarity(one.U["W"][c], u, dim=0).abs() for u in other.U["W"]]
        assert found["U"][c].item() == pytest.approx(max(cosines).item(), rel=1e-12)
    # in another order and scale, and with both signs turned, they are the same; with one sign turned they are not
    order = torch.tensor([3, 1, 4, 0, 2])
    for sign in (1, -1):
        again = vpd.Decomposition({"W": -2 * one.U["W"][order]}, {"W": -sign * one.V["W"][:, order]}, Silent())
        found = vpd.similarity(one, again)["W"]
        assert all(found[name].allclose(torch.ones(5).double()) for name in "UV")
        assert (found["product"] > 0.999999).all() == (sign == 1)


# --- What train_gpt2.py reads off a finished run ---

TEXT = "def first(self, x):\n    return '<b>' & x\n\n\nclass Name:\n\tdef second(self): return \"</script>\" \n" * 60


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a tiny model on TEXT."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT)
    config = vpd.Config(steps=30, warmup_steps=50, lr=5e-3, G_type="transformer", G_width=32, G_blocks=1, G_heads=2)
    preset = gpt.Preset(gpt.Shape(2, 16, 2, 16, 280), 4, 60, 1e-2, dict.fromkeys(MATRICES, 6), config)
    settings = {"preset": "laptop", "data": str(folder / "text.txt"), "init_from": "", "seed": 0, "steps": 0, "C": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpt.PRESETS, "laptop", preset)
        patch.setattr(gpt, "EVALUATED", 256)
        opened = gpt.open_run(settings, folder, "cpu")
        gpt.evaluate(opened)
        yield opened


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line in this process, and returns what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", "--device", "cpu", *map(str, arguments)])
        gpt.main()
        return capsys.readouterr().out

    return run


def test_all_pairs_with_biases_and_delta_give_the_attention_scores():
    model, decomposition, _, batch = small()
    for layer in (0, 1):
        parts = evidence.score_parts(model, decomposition, layer, batch)
        _, inputs = vpd.forward_with_inputs(model, decomposition.U, batch)
        attn = model.h[layer].attn
        q, k = (matrix(inputs[f"h.{layer}.attn.{m}"][0]) for m, matrix in (("q", attn.q), ("k", attn.k)))
        for h in range(2):
            true = q[:, 4 * h : 4 * h + 4] @ k[:, 4 * h : 4 * h + 4].T / 2  # d = 4
            total = parts["rest"][h].clone()
            for c in range(6):
                for other in range(6):
                    total += parts["a_q"][:, c, None] * parts["static"][h, c, other] * parts["a_k"][:, other]
            torch.testing.assert_close(total, true, rtol=1e-4, atol=1e-4)


def test_what_a_pair_explains_alone_is_the_variance_that_goes_when_its_scores_are_taken_off():
    torch.manual_seed(0)
    T, static, a_q, a_k = 6, torch.randn(3, 4).double(), torch.randn(6, 3).double(), torch.randn(6, 4).double()

    def seen_by_softmax(scores):  # row by row: what is left of a row after its mean over the positions up to it
        rows = [row[: t + 1] - row[: t + 1].mean() for t, row in enumerate(scores)]
        return torch.stack([nn.functional.pad(row, (0, T - len(row))) for row in rows])

    scores = seen_by_softmax(a_q @ static @ a_k.T + torch.randn(T, T))
    share = evidence.explained(static, a_q, a_k, scores)
    for c in range(3):
        for other in range(4):
            left = scores - seen_by_softmax(static[c, other] * a_q[:, c, None] * a_k[:, other])
            expected = 1 - left.square().sum() / scores.square().sum()
            assert share[c, other].item() == pytest.approx(expected.item(), abs=1e-9)


def test_the_attention_claim_has_the_spread_and_the_pairs_of_every_head(run, tmp_path):
    rows, _, figure = evidence.attention(run, tmp_path)
    # independently: the subcomponents of v whose norm in the second of two heads is over half that in the first
    U, V = run.decomposition.U["h.1.attn.v"], run.decomposition.V["h.1.attn.v"]
    mean = json.loads((run.folder / "metrics.json").read_text())["matrices"]["h.1.attn.v"]["mean_importance"]
    alive = [c for c in range(6) if mean[c] > vpd.ALIVE]
    norms = [sorted((U[c, :8].norm() * V[:, c].norm(), U[c, 8:].norm() * V[:, c].norm())) for c in alive]
    share = sum(bool(small > large / 2) for small, large in norms) / len(alive)
    assert rows["h.1.attn.v"]["in a second head"] == pytest.approx(share)
    for layer in range(2):
        for h in range(2):
            shares = list(rows[f"layer {layer}, head {h}"].values())
            assert len(shares) == 3 and shares == sorted(shares, reverse=True)
    assert len(figure.axes) == 10


def test_an_edit_by_command_is_measured_beside_a_control_of_the_same_matrix(run, command):
    path = "h.1.mlp.down"
    parts = [part["name"] for part in gpt.describe_all(run, *gpt.observe(run)) if part["matrix"] == path]
    before = run.model.state_dict()[path + ".weight"].clone()
    text = command("--out", run.folder, "--edit", parts[0], "--to", "def", "--alpha", "2.5")
    written = json.loads((run.folder / "edit.json").read_text())
    assert [x["alpha"] for x in written["effects"][parts[0]]] == [0.5, 1, 2, 2.5, 3, 5]
    (control,) = (name for name in written["effects"] if name != parts[0])
    assert control in parts
    assert all(f"{x['after']:8.5f}" in text for effects in written["effects"].values() for x in effects)
    assert 1 <= text.count("    before: ") == text.count("    after: ") <= 5
    assert run.model.state_dict()[path + ".weight"].equal(before)


def test_an_edit_writes_the_tokens_direction_and_is_taken_back_even_after_an_error(run):
    path, c, token = "h.1.mlp.down", 2, 7
    module, U, V = run.model.get_submodule(path), run.decomposition.U[path][c], run.decomposition.V[path][:, c]
    before, x = module.weight.clone(), torch.randn(64)
    u = run.model.tokens.weight[token] * run.model.norm.weight
    u = u - u.mean()
    with torch.no_grad():
        expected = module(x) - U * (V @ x) - 3 * U.norm() * u / u.norm() * (V @ x)
        with pytest.raises(KeyboardInterrupt), gpt.edited(run, path, c, token, -3.0):
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
            raise KeyboardInterrupt
    assert torch.equal(module.weight, before)


def test_the_effect_of_an_edit_is_measured_where_it_fires_near_and_elsewhere(run):
    path, c, token = "h.1.attn.o", 1, 5
    batch = gpt.validation_batches(run.ids, run.preset, "cpu")[0]
    fires = torch.zeros_like(batch, dtype=torch.bool)
    fires[1, 3] = fires[2, 15] = True
    found = gpt.effect(run, path, c, token, 4.0, [batch], [fires])
    with torch.no_grad():
        plain = run.model(batch).double().softmax(-1)
        with gpt.edited(run, path, c, token, 4.0):
            changed = run.model(batch).double().softmax(-1)
    kl = (plain * (plain / changed).log()).sum(-1)
    assert found["before"] == pytest.approx((plain[1, 3, token] + plain[2, 15, token]).item() / 2, rel=1e-4)
    assert found["after"] == pytest.approx((changed[1, 3, token] + changed[2, 15, token]).item() / 2, rel=1e-4)
    assert found["kl_near"] == pytest.approx(kl[1:3].mean().item(), rel=1e-3, abs=1e-7)  # 16 positions: all near
    assert found["kl_elsewhere"] == pytest.approx(kl[[0, 3]].mean().item(), rel=1e-3, abs=1e-7)


def test_clearness_is_the_share_of_the_three_commonest_tokens_beyond_chance():
    ids = torch.arange(100).repeat(4, 1)  # every token equally often
    fires = torch.zeros(4, 100, dtype=torch.bool)
    fires[:, [10, 11]] = True  # 8 times, on two tokens
    score, by, tokens = gpt.clearness(gpt.neighbourhood(ids, 100), fires)
    assert score == pytest.approx((1 - 0.02) * 8 / 28)
    assert by == "this token" and sorted(tokens) == [(10, 0.5), (11, 0.5)]
    fires = torch.zeros(4, 100, dtype=torch.bool)
    fires[torch.arange(4), [5, 20, 50, 80]] = True
    ids = torch.randperm(400, generator=torch.Generator().manual_seed(0)).view(4, 100) % 100
    ids[torch.arange(4), torch.tensor([5, 20, 50, 80]) - 1] = 42  # whatever the token, the one before is 42
    assert gpt.clearness(gpt.neighbourhood(ids, 100), fires)[1:] == ("the token before", [(42, 1.0)])


def test_the_page_holds_every_part_that_fires_and_no_token_breaks_it(run):
    text = gpt.report(run, [])
    page = (run.folder / "report.html").read_text()
    data = page.split('id="data">')[1].split("</script>")[0]  # up to the first closing tag: none may be inside
    data = json.loads(data)
    ids, g, a = gpt.observe(run)
    expected = {(path, c) for path in g for c in range(6) if (g[path][..., c] > 0.1).any()}
    assert {(part["matrix"], part["c"]) for part in data["parts"]} == expected
    assert any("<" in token for token in data["vocabulary"]) and text
    for part in data["parts"]:
        fires = g[part["matrix"]][..., part["c"]] > 0.1
        assert part["fires"] == fires.sum()
        for tokens, importance, activation, at in part["examples"]:
            assert len(tokens) == len(importance) == len(activation) and importance[at] >= 1  # there it fires
            passage = "".join(data["vocabulary"][i] for i in tokens)
            assert passage.isascii() and passage in TEXT
    assert len(page) < 10_000_000 and "http" not in page and "left out" not in page + text


def test_the_groups_of_a_run_hold_every_alive_part_once_and_stand_on_the_page(run):
    gpt.report(run, [])
    result = json.loads((run.folder / "groups.json").read_text())
    alive = {f"{path}:{c}" for path, mask in gpt.alive(run).items() for c in mask.nonzero()[:, 0].tolist()}
    members = [name for group in result["groups"] for name in group["members"]]
    sometimes = {f"{path}:{c}" for path, x in gpt.observe(run)[1].items() for c in (x > 0.01).flatten(0, 1).any(0).nonzero()[:, 0].tolist()}
    assert members and sorted(members) == sorted(alive & sometimes)
    assert result["found"] == len(result["groups"]) and result["bits_after"] <= result["bits_before"]
    page = (run.folder / "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    for part in data["parts"]:
        name = f"{part['matrix']}:{part['c']}"
        assert part["group"] == -1 or name in result["groups"][part["group"]]["members"]


def test_a_page_with_too_many_parts_keeps_the_most_important_and_says_how_many_it_leaves_out(run, monkeypatch):
    everything, means = {(part["matrix"], part["c"]) for part in gpt.describe_all(run, *gpt.observe(run))}, gpt.mean_importances(run)
    monkeypatch.setattr(gpt, "PARTS", 2 * len(means))
    text, page = gpt.report(run, []), (run.folder / "report.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    kept = {(part["matrix"], part["c"]) for part in data["parts"]}
    for path in run.decomposition.U:
        order = sorted((c for matrix, c in everything if matrix == path), key=lambda c: -means[path][c].item())
        assert {c for matrix, c in kept if matrix == path} == set(order[:2])
    said = f"{len(everything) - len(kept)} of {len(everything)} are left out"
    assert len(kept) < len(everything) and said in text and said in page


def test_a_circuit_is_written_with_its_graph_and_three_prunings(run):
    text = gpt.circuits(run, ["def first("], None)
    assert "importances alone" in text and (run.folder / "circuit.png").exists()
    found = json.loads((run.folder / "circuit.json").read_text())
    assert set(found["prunings"]) == {"not pruned", *gpt.PRUNINGS}
    assert found["prunings"]["importances alone"]["nodes"] <= found["prunings"]["not pruned"]["nodes"]
    graph = found["pruned_graph"]
    assert graph["nodes"][-1]["matrix"] == "outcome" and graph["edges"]
    active = [node for node in graph["nodes"] if "importance" in node]
    assert len(active) == found["prunings"]["stochastic and adversarial"]["nodes"]
    assert len(gpt.asked(run, "def first(")["circuit"]) > 0


def test_means_are_weighted_within_and_over_matrices():
    values = {"a": {"U": torch.tensor([1.0, 0.0])}, "b": {"U": torch.tensor([0.5])}}
    means = gpt.weighted_means(values, {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([4.0])})
    assert [means[path]["U"] for path in ("a", "b", "all")] == pytest.approx([0.75, 0.5, (3 + 2) / 8])


def test_the_correlation_of_importances_against_numpy():
    torch.manual_seed(0)
    one, other = torch.rand(50, 3), torch.rand(50, 3)
    other[:, 1] = 0.3  # a constant
    found = gpt.correlations(one, other)
    for c in (0, 2):
        assert found[c].item() == pytest.approx(np.corrcoef(one[:, c], other[:, c])[0, 1], abs=1e-5)
    assert found[1].item() == pytest.approx(0, abs=1e-3)


def test_the_readmes_section_on_python_runs_as_it_stands(run, capsys):
    readme = (Path(gpt.__file__).parent / "README.md").read_text()
    code = re.search(r"## In Python.*?```python\n(.*?)```", readme, re.S)[1]
    assert len(code.splitlines()) <= 25
    exec(code.replace('"runs/laptop"', repr(str(run.folder))), {})
    fires, *moves = capsys.readouterr().out.strip().splitlines()
    assert fires.startswith("h.1.mlp.down:") and len(moves) == 5 and all(" -> " in line for line in moves)


def test_another_decomposition_of_the_same_target_is_made_from_its_folder_and_compared(run, tmp_path, command):
    command("--init-from", run.folder, "--C", "0.5", "--steps", "3", "--seed", "1", "--out", tmp_path / "half")
    folders = (run.folder, tmp_path / "half")
    target, same = (torch.load(folder / "target.pt", weights_only=True)["model"] for folder in folders)
    assert all(x.equal(same[name]) for name, x in target.items())
    metrics = json.loads((tmp_path / "half" / "metrics.json").read_text())
    assert all(matrix["C"] == 3 for matrix in metrics["matrices"].values()) and metrics["data"].endswith("text.txt")
    made = json.loads((tmp_path / "half" / "decomposition" / "run.json").read_text())
    assert made["config"]["steps"] == 3 and made["config"]["seed"] == 1
    original = json.loads((run.folder / "decomposition" / "run.json").read_text())
    assert made["target model"] == original["target model"]

    command("--out", run.folder, "--compare", run.folder)
    found = json.loads((run.folder / "compare.json").read_text())
    same = [found[kind]["all"][part] for kind in ("trained", "weighted", "untrained") for part in ("U", "V", "product")]
    assert same == pytest.approx([1] * 9)  # with itself
    kept, g = gpt.alive(run), gpt.observe(run)[1]
    varies = torch.cat([g[path].float().flatten(0, 1)[:, kept[path]].std(0) > 0 for path in g]).float()
    assert found["trained"]["all"]["function"] == pytest.approx(varies.mean().item(), abs=0.01)
    printed = command("--out", run.folder, "--compare", tmp_path / "half")
    found = json.loads((run.folder / "compare.json").read_text())
    assert 0 < found["untrained"]["all"]["product"] < 0.9
    (row,) = (line.split() for line in printed.splitlines() if line.startswith("all "))
    shown = [x for kind in ("untrained", "trained", "weighted") for x in found[kind]["all"].values()]
    assert len(shown) == 3 + 4 + 4
    assert [float(x) for x in row[1:]] == pytest.approx(shown, abs=0.0051)

    with pytest.raises(SystemExit, match="brings its preset and data"):
        command("--init-from", run.folder, "--preset", "laptop", "--out", tmp_path / "new")
    with pytest.raises(SystemExit, match="no run with a finished target"):
        command("--init-from", tmp_path, "--out", tmp_path / "new")
    for setting, value in (("--C", "0"), ("--steps", "0"), ("--seed", "-1")):
        with pytest.raises(SystemExit, match=f"{setting} is {value}"):
            command(setting, value, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    other = torch.load(tmp_path / "half" / "target.pt", weights_only=True)
    other["model"]["tokens.weight"] += 1
    torch.save(other, tmp_path / "half" / "target.pt")
    with pytest.raises(SystemExit, match="decomposes another target"):
        command("--out", run.folder, "--compare", tmp_path / "half")


def test_a_run_that_is_loaded_leaves_the_precision_of_the_process_as_it_was(run):
    gpt.load(run.folder)
    assert torch.get_float32_matmul_precision() == "highest" and torch.backends.cuda.flash_sdp_enabled()


def test_a_damaged_target_is_refused_in_one_line(run, tmp_path, command):
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "target.pt").write_bytes(b"cut")
    with pytest.raises(SystemExit, match="target.pt is damaged"):
        command("--out", tmp_path / "run", "--report")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--circuit", "x" * 100], "the model takes 1 to 16"),
        (["--circuit", ""], "has 0 tokens"),
        (["--circuit", "def", "--token", "def first("], "is not one token but"),
        (["--report", "--device", "warp"], "there is no device 'warp'"),
        (["--report", "--seed", "5"], "made with another --seed"),
        (["--report", "--compare", "x"], "ask for one of them at a time"),
        (["--edit", "h.1.mlp.dow:1", "--to", "x"], "the nearest: h.1.mlp.down"),
        (["--edit", "h.1.mlp.up:1", "--to", "x"], "writes to the residual stream"),
        (["--edit", "h.1.mlp.down:77", "--to", "x"], "is no alive subcomponent"),
        (["--edit", "h.1.mlp.down:1"], "needs --to TOKEN"),
        (["--compare", "nowhere"], "nowhere holds no finished decomposition"),
        (["--report", "--out", "nowhere"], "holds no finished decomposition"),
    ],
)
def test_bad_questions_end_in_one_line(run, arguments, message, command):
    with pytest.raises(SystemExit, match=message) as stopped:
        command("--out", run.folder, *arguments)
    assert stopped.value.code.startswith("error: ") and "\n" not in stopped.value.code
