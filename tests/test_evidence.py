"""What evidence.py computes, against brute force; and every claim on a tiny run."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import evidence
import toy_models
import train_gpt2 as gpt
import transcoders
import vpd

def random_decomposition(seed=0):
    """A random GPT in float64, and a random decomposition of q and k of both layers."""
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.Shape(layers=2, width=8, heads=2, context=5, vocabulary=7)).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    paths = [f"h.{layer}.attn.{m}" for layer in (0, 1) for m in "qk"]
    U = {path: torch.randn(6, 8).double() for path in paths}
    V = {path: torch.randn(8, 6).double() / 8**0.5 for path in paths}
    return model, vpd.Decomposition(U, V, nn.Identity())

def test_all_pairs_with_biases_and_delta_give_the_attention_scores():
    model, decomposition = random_decomposition()
    ids = torch.randint(7, (1, 5))
    for layer in (0, 1):
        terms = evidence.score_terms(model, decomposition, layer, ids)
        _, inputs = vpd.forward_with_inputs(model, decomposition.U, ids)
        q = model.h[layer].attn.q(inputs[f"h.{layer}.attn.q"][0])
        k = model.h[layer].attn.k(inputs[f"h.{layer}.attn.k"][0])
        for h in range(2):
            true = q[:, 4 * h : 4 * h + 4] @ k[:, 4 * h : 4 * h + 4].T / 2  # d = 4
            total = terms["rest"][h].clone()
            for c in range(6):
                for other in range(6):
                    total += terms["a_q"][:, c, None] * terms["static"][h, c, other] * terms["a_k"][:, other]
            torch.testing.assert_close(total, true, rtol=1e-4, atol=1e-4)

def test_the_rest_of_the_scores_is_that_of_bias_and_delta():
    model, decomposition = random_decomposition()
    for path, U in decomposition.U.items():  # without both nothing is left
        model.get_submodule(path).weight.data = (decomposition.V[path] @ U).T
        model.get_submodule(path).bias.data.zero_()
    terms = evidence.score_terms(model, decomposition, 0, torch.randint(7, (1, 5)))
    assert terms["static"].abs().max() > 1 and terms["rest"].abs().max() < 1e-9

def test_what_a_pair_explains_alone_is_the_variance_that_goes_when_its_scores_are_taken_off():
    torch.manual_seed(0)
    static, a_q, a_k = torch.randn(3, 4).double(), torch.randn(6, 3).double(), torch.randn(6, 4).double()

    def seen_by_softmax(scores):  # row by row: what is left of a row after its mean over the positions up to it
        rows = [row[: t + 1] - row[: t + 1].mean() for t, row in enumerate(scores)]
        return torch.stack([nn.functional.pad(row, (0, 6 - len(row))) for row in rows])

    scores = seen_by_softmax(a_q @ static @ a_k.T + torch.randn(6, 6))
    torch.testing.assert_close(evidence.centred(scores + torch.randn(6, 1)), scores)
    share = evidence.explained(static, a_q, a_k, scores)
    for c in range(3):
        for other in range(4):
            left = scores - seen_by_softmax(static[c, other] * a_q[:, c, None] * a_k[:, other])
            expected = 1 - left.square().sum() / scores.square().sum()
            assert share[c, other].item() == pytest.approx(expected.item(), abs=1e-9)

def test_the_attention_claim_has_the_spread_and_the_pairs_of_every_head(run, tmp_path):
    rows, _, figure = evidence.attention(run, tmp_path)
    # independently: the subcomponents of v whose norm in the second of two heads is over half that in the first
    U = run.decomposition.U["h.1.attn.v"]
    mean = json.loads((run.folder / "metrics.json").read_text())["matrices"]["h.1.attn.v"]["mean_importance"]
    norms = [sorted((U[c, :8].norm(), U[c, 8:].norm())) for c in range(len(mean)) if mean[c] > vpd.ALIVE]
    share = sum(bool(small > large / 2) for small, large in norms) / len(norms)
    assert rows["h.1.attn.v"]["in a second head"] == pytest.approx(share)
    for layer in range(2):
        for h in range(2):
            shares = list(rows[f"layer {layer}, head {h}"].values())
            assert len(shares) == 3 and shares == sorted(shares, reverse=True)
    assert len(figure.axes) == 10

def test_similarity_is_the_largest_cosine_between_explicit_rank_one_matrices():
    torch.manual_seed(0)
    one = ({"W": torch.randn(5, 3).double()} for _ in range(2))
    other = ({"W": torch.randn(4, 5).double()} for _ in range(2))
    one, other = (vpd.Decomposition(U, V, nn.Identity()) for U, V in zip(one, other))
    matrices = [torch.einsum("co,ic->coi", x.U["W"], x.V["W"]).flatten(1) for x in (one, other)]
    found = evidence.similarity(one, other)["W"]
    for c in range(5):
        cosines = [nn.functional.cosine_similarity(matrices[0][c], m, dim=0) for m in matrices[1]]
        assert found["product"][c].item() == pytest.approx(max(0, max(cosines).item()), rel=1e-12)
        cosines = [nn.functional.cosine_similarity(one.U["W"][c], u, dim=0).abs() for u in other.U["W"]]
        assert found["U"][c].item() == pytest.approx(max(cosines).item(), rel=1e-12)
    # in another order and scale, and with both signs turned, they are the same; with one sign turned they are not
    order = torch.tensor([3, 1, 4, 0, 2])
    for sign in (1, -1):
        again = vpd.Decomposition({"W": -2 * one.U["W"][order]}, {"W": -sign * one.V["W"][:, order]}, nn.Identity())
        found = evidence.similarity(one, again)["W"]
        assert all(found[name].allclose(torch.ones(5).double()) for name in "UV")
        assert (found["product"] > 0.999999).all() == (sign == 1)

def test_mean_cosines_are_weighted_and_compare_the_alive_alone():
    U = {"A": torch.eye(3), "B": torch.eye(3)[:1]}
    V = {"A": torch.eye(3), "B": torch.eye(3)[:, :1]}
    one = vpd.Decomposition(U, V, nn.Identity())
    other = vpd.Decomposition(U | {"A": torch.eye(3)[1:]}, V | {"A": torch.eye(3)[:, 1:]}, nn.Identity())
    # the first of A is not in the other
    assert evidence.mean_cosines(one, other) == pytest.approx({"U": 0.75, "V": 0.75, "product": 0.75})
    weights = torch.tensor([0.1, 0.1, 0.2, 0.4])
    assert evidence.mean_cosines(one, other, weights)["product"] == pytest.approx(0.7 / 0.8)
    metrics = {"matrices": {"A": {"mean_importance": [0.0, 0.5, 0.1]}, "B": {"mean_importance": [0.1]}}}
    alive = evidence.alive_only(one, metrics)
    for path, u in other.U.items():
        assert torch.equal(alive.U[path], u) and torch.equal(alive.V[path], other.V[path])

def test_an_edit_writes_the_tokens_direction_and_is_taken_back_even_after_an_error(run):
    path, c, token = "h.1.mlp.down", 2, 7
    module = run.model.get_submodule(path)
    U = run.decomposition.U[path][c]
    V = run.decomposition.V[path][:, c]
    before = module.weight.clone()
    x = torch.randn(64)
    u = run.model.tokens.weight[token] * run.model.norm.weight
    u = u - u.mean()
    with torch.no_grad():
        expected = module(x) - U * (V @ x) - 3 * U.norm() * u / u.norm() * (V @ x)
        with pytest.raises(KeyboardInterrupt), evidence.edited(run, path, c, token, -3.0):
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
            raise KeyboardInterrupt
    assert torch.equal(module.weight, before)

def test_the_effect_of_an_edit_is_measured_where_it_fires_near_and_elsewhere(run):
    path, c, token = "h.1.attn.o", 1, 5
    batch = gpt.validation_batches(run.ids, run.preset, "cpu")[0]
    fires = torch.zeros_like(batch, dtype=torch.bool)
    fires[1, 3] = fires[2, 15] = True
    found = evidence.effect(run, path, c, token, 4.0, batch, fires)
    with torch.no_grad():
        plain = run.model(batch).double().softmax(-1)
        with evidence.edited(run, path, c, token, 4.0):
            changed = run.model(batch).double().softmax(-1)
    kl = (plain * (plain / changed).log()).sum(-1)
    others = [n for n in range(len(batch)) if n not in (1, 2)]
    assert found["before"] == pytest.approx((plain[1, 3, token] + plain[2, 15, token]).item() / 2, rel=1e-4)
    assert found["after"] == pytest.approx((changed[1, 3, token] + changed[2, 15, token]).item() / 2, rel=1e-4)
    assert found["KL near"] == pytest.approx(kl[1:3].mean().item(), rel=1e-3, abs=1e-7)  # 16 positions: all near
    assert found["KL elsewhere"] == pytest.approx(kl[others].mean().item(), rel=1e-3, abs=1e-7)

def test_the_edited_subcomponent_is_the_one_that_fires_where_line_breaks_are(run):
    ids = torch.cat(gpt.validation_batches(run.ids, run.preset, "cpu"))
    text = [[run.tokenizer.decode([token]) for token in sequence] for sequence in ids.tolist()]
    breaks = torch.tensor([["\n" in token for token in sequence] for sequence in text])
    assert 0.02 < breaks.float().mean() < 0.5
    half = breaks & (torch.arange(len(ids))[:, None] % 2 == 0)
    often = breaks | (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.8)
    other = ~breaks
    g = {
        "h.0.mlp.up": torch.stack([breaks, other], -1).float(),  # it does not write to the residual stream
        "h.0.mlp.down": torch.stack([other, half, often], -1).float(),
        "h.1.attn.o": torch.stack([other, breaks, torch.zeros_like(breaks)], -1).float(),
    }
    assert evidence.clearest_at_line_breaks(run, ids, g) == ("h.1.attn.o", 1)

def test_an_edit_is_shown_beside_a_control_of_the_same_matrix(run, tmp_path):
    weights = {name: x.clone() for name, x in run.model.state_dict().items()}
    rows, more, _ = evidence.edit(run, tmp_path)
    assert len(rows) == 2 * len(evidence.STRENGTHS) and more["written"]
    name, control = dict.fromkeys(row.split(",")[0] for row in rows)
    path = name.split(":")[0]
    assert name != control and control.startswith(f"{path}:") and path.endswith(gpt.WRITERS)
    assert rows[f"{name}, x 5"]["KL near"] > rows[f"{name}, x 0.5"]["KL near"]  # the stronger, the more it changes
    assert all(torch.equal(x, weights[key]) for key, x in run.model.state_dict().items())

def test_a_transcoder_writes_with_its_k_largest_latents_and_its_attack_adds_the_others_back():
    torch.manual_seed(0)
    coder = transcoders.Transcoder(width=5, latents=7, k=2)
    x = torch.randn(20, 5)
    a = (x @ coder.encode.weight.T + coder.encode.bias).clamp(min=0)
    sources = torch.rand(7)
    for n in range(20):
        largest = a[n].argsort(descending=True)[:2]
        on = torch.zeros(7).index_fill(0, largest, 1.0)
        for r in (torch.zeros(7), sources, torch.ones(7)):
            expected = coder.decode(a[n] * torch.maximum(on, r))
            torch.testing.assert_close(coder(x, r)[n], expected, rtol=1e-4, atol=1e-5)
    coder.silent[3] = 30_000
    latents = transcoders.latents_as_decomposition([coder])
    alive = [0, 1, 2, 4, 5, 6]
    assert torch.equal(latents.U[0], coder.decode.weight.T[alive])
    assert torch.equal(latents.V[0], coder.encode.weight.T[:, alive])

@pytest.mark.parametrize("claim", ["losses", "frontier", "transcoders", "seeds", "attack"])
def test_a_claim_ends_with_a_table_and_repeated_it_computes_nothing_anew(claim, run, tmp_path, monkeypatch):
    monkeypatch.setattr(vpd, "fresh_adversary", lambda *_, steps=80, **__: [0.5] * (steps + 1))
    monkeypatch.setattr(evidence, "PRICES", (1,))
    monkeypatch.setattr(evidence, "LOSSES", ("delta",))
    monkeypatch.setattr(evidence, "KS", (2,))
    monkeypatch.setattr(transcoders, "RATES", (1e-2,))
    rows, _, _ = evidence.CLAIMS[claim](run, tmp_path)
    printed = evidence.table(rows)
    assert len(printed.splitlines()) == 1 + len(rows)
    monkeypatch.delattr(vpd, "training_step")
    monkeypatch.delattr(transcoders, "train_transcoder")
    again, _, _ = evidence.CLAIMS[claim](run, tmp_path)
    assert evidence.table(again) == printed

# ---- components: which subcomponents are active together -------------------------------------------------------------

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
        result = evidence.cluster(active, alpha)
        columns = active.any(0).nonzero()[:, 0].tolist()
        assert sorted(c for group in result["groups"] for c in group) == columns  # each once
        cost = description_length(active, result["groups"], alpha)
        assert result["bits_after"] == pytest.approx(cost, rel=1e-6)
        alone = description_length(active, [[c] for c in columns], alpha)
        assert result["bits_before"] == pytest.approx(alone, rel=1e-6)
        best = min(description_length(active, grouping, alpha) for grouping in groupings(columns))
        assert best - 1e-9 < cost + 1e-6 and cost < 1.15 * best
        best_found += cost < best + 1e-6
    assert best_found >= 9  # greedy merging cannot take a merger back

def test_planted_components_are_found_and_what_is_never_active_is_left_out():
    torch.manual_seed(0)
    jobs = torch.rand(4000, 7) < torch.tensor([0.02, 0.02, 0.05, 0.1, 0.1, 0.3, 0.0])
    of_job = torch.randint(7, (20,))
    groups = evidence.cluster(jobs[:, of_job].reshape(40, 100, 20))["groups"]
    expected = {tuple((of_job == job).nonzero()[:, 0].tolist()) for job in range(6)} - {()}
    assert {tuple(sorted(group)) for group in groups} == expected
    nothing = evidence.cluster(torch.zeros(10, 3, dtype=torch.bool))
    assert nothing == {"groups": [], "bits_before": 0.0, "bits_after": 0.0}

def alive(numbers, on_probes):
    """`toy_models.Alive` of subcomponents with these numbers and these importances (probes, alive)."""
    return toy_models.Alive(torch.tensor(numbers), torch.zeros(len(numbers), 2, 3), torch.tensor(on_probes))

def test_a_true_group_serves_one_feature_and_an_identity_or_w_out_is_one_group():
    toy = toy_models.Toy("", features=3, dimensions=8, layers=1)
    on_in = [[0.9, 0.0, 0.0], [0.0, 0.9, 0.5], [0.0, 0.9, 0.05]]
    found = {"layers.0.in": alive([7, 8, 9], on_in), "layers.0.out": alive([3, 1, 0], [[0.9, 0.0, 0.0]] * 3)}
    of_features = [{"layers.0.in:7"}, {"layers.0.in:8", "layers.0.in:9"}, {"layers.0.in:8"}]
    assert evidence.groups_of_features(toy, found) == [*of_features, {f"layers.0.out:{c}" for c in (0, 1, 3)}]
    found = {"identity": alive([0, 5], [[0.9, 0.9]] * 3), "W": alive([2], [[0.0], [0.0], [0.3]])}
    assert evidence.groups_of_features(toy, found) == [set(), set(), {"W:2"}, {"identity:0", "identity:5"}]

def test_the_true_groups_of_induction_serve_one_position_token_or_copied_token():
    model = toy_models.parse_name("induction_4-5").model()
    found = {}
    for path, true in toy_models.mechanisms(model).items():
        found[path] = toy_models.Alive(torch.arange(len(true)) + 10, true.flip(0), None)  # 10 is the last mechanism
    groups = evidence.groups_of_induction(model, found)
    expected = []
    for n in range(2):
        expected.append({f"layers.0.{m}:{11 - n}" for m in "qk"})
    for n in range(4):
        expected.append({f"layers.{m}:{13 - n}" for m in ("0.v", "0.o", "1.q", "1.k")})
        expected.append({f"layers.1.{m}:{13 - n}" for m in "vo"})
    assert len(groups) == len(expected) and all(group in groups for group in expected)

@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    """A finished run of a toy, whose importances a test replaces."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    config = toy_models.Toy.config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_models, "train_target", lambda toy, model, seed, steps: None)
        patch.setattr(toy_models.Toy, "config", lambda *_: replace(config(*_), steps=3))
        toy_models.run("tms_3-2", 1, folder, (), "cpu", False)
    return folder

def test_a_component_is_exact_only_if_all_its_members_are_found_and_no_other_has_the_same(
    toy_folder, tmp_path, monkeypatch
):
    jobs = (torch.arange(60)[:, None] % 3 == torch.arange(3)).float()  # (inputs, jobs), one job at a time
    g = {"W": jobs[:, [0, 1, 2]], "WT": jobs[:, [0, 1]]}
    g = {path: nn.functional.pad(x, (0, 1)) for path, x in g.items()}  # Delta's
    together = [{"W:0", "WT:0"}, {"W:1", "WT:1"}, {"W:2"}]
    monkeypatch.setattr(vpd, "predict_importances", lambda *_: (None, g))
    monkeypatch.setattr(toy_models, "alive_subcomponents", lambda *_: None)
    for true, exact in ((together, 3), ([*together, {"W:2"}], 2), ([{"W:0"}, *together[1:]], 2), ([], 0)):
        monkeypatch.setattr(evidence, "groups_of_features", lambda *_, true=true: true)
        rows, more, _ = evidence.components(toy_folder, tmp_path)
        row = rows["tms_3-2"]
        assert (row["found"], row["true"], row["exact"]) == (3, len(true), exact)
        assert all(set(group) in together for group in more["groups"])
    # a position has one job: two subcomponents at two positions of three, one at the third; then two names less
    assert row["bits, each alone"] == pytest.approx((5 * 20 * (math.log2(5) + 3)) / 60)
    assert row["bits, grouped"] == pytest.approx((60 * math.log2(3) + 5 * 20 * 3) / 60)

def test_the_components_of_a_toy_are_written_by_the_command_and_another_folder_is_refused(
    toy_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["evidence.py", "components", "--from", str(toy_folder), "--out", str(tmp_path)])
    evidence.main()
    assert "tms_3-2" in capsys.readouterr().out
    row = json.loads((tmp_path / "components.json").read_text())["rows"]["tms_3-2"]
    assert row["true"] == 3 and (tmp_path / "components.png").stat().st_size > 2_000
    (tmp_path / "metrics.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["evidence.py", "components", "--from", str(tmp_path)])
    with pytest.raises(SystemExit, match="^error: .* holds no finished toy"):
        evidence.main()
