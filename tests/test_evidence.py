"""What evidence.py computes, against brute force; and every claim on a tiny run."""

import math

import pytest
import torch
from torch import nn

import evidence
import train_gpt2 as gpt
import transcoders
import vpd
from test_reading import random_decomposition, random_gpt

def test_without_bias_and_delta_the_pairs_of_subcomponents_add_up_to_the_attention_scores():
    model = random_gpt()
    decomposition = random_decomposition(model, 6)
    U, V = decomposition.U, decomposition.V
    for path in U:
        model.get_submodule(path).weight.data = (V[path] @ U[path]).T
        model.get_submodule(path).bias.data.zero_()
    ids = torch.randint(7, (1, 5))
    for layer in (0, 1):
        terms = evidence.score_terms(model, decomposition, layer, ids)
        _, inputs = vpd.forward_with_inputs(model, U, ids)
        q = model.h[layer].attn.q(inputs[f"h.{layer}.attn.q"][0])
        k = model.h[layer].attn.k(inputs[f"h.{layer}.attn.k"][0])
        assert terms["rest"].abs().max() < 1e-9
        for h in range(2):
            true = q[:, 4 * h : 4 * h + 4] @ k[:, 4 * h : 4 * h + 4].T / 2  # d = 4
            total = torch.zeros_like(true)
            for c in range(6):
                for other in range(6):
                    total += terms["a_q"][:, c, None] * terms["static"][h, c, other] * terms["a_k"][:, other]
            torch.testing.assert_close(total, true, rtol=1e-9, atol=1e-9)

def test_what_a_pair_explains_alone_is_the_variance_that_goes_when_its_scores_are_taken_off():
    torch.manual_seed(0)
    static = torch.randn(3, 4).double()
    a_q = torch.randn(6, 3).double()
    a_k = torch.randn(6, 4).double()

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

def test_similarity_is_the_largest_cosine_between_explicit_rank_one_matrices():
    torch.manual_seed(0)
    one = vpd.Decomposition({"W": torch.randn(5, 3).double()}, {"W": torch.randn(4, 5).double()}, nn.Identity())
    other = vpd.Decomposition({"W": torch.randn(5, 3).double()}, {"W": torch.randn(4, 5).double()}, nn.Identity())
    matrices = [torch.einsum("co,ic->coi", x.U["W"], x.V["W"]).flatten(1) for x in (one, other)]
    found = evidence.similarity(one, other)["W"]
    for c in range(5):
        cosines = [nn.functional.cosine_similarity(matrices[0][c], m, dim=0) for m in matrices[1]]
        assert found["product"][c].item() == pytest.approx(max(0, max(cosines).item()), rel=1e-12)
        cosines = [nn.functional.cosine_similarity(one.U["W"][c], u, dim=0).abs() for u in other.U["W"]]
        assert found["U"][c].item() == pytest.approx(max(cosines).item(), rel=1e-12)

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

@pytest.mark.parametrize("claim", ["losses", "frontier", "transcoders", "seeds", "attack", "attention", "edit"])
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

def test_planted_components_are_found_and_cost_what_is_said_and_what_is_never_active_is_left_out():
    torch.manual_seed(0)
    jobs = torch.rand(4000, 7) < torch.tensor([0.02, 0.02, 0.05, 0.1, 0.1, 0.3, 0.0])
    of_job = torch.randint(7, (20,))
    active = jobs[:, of_job]
    found = evidence.cluster(active.reshape(40, 100, 20))
    expected = {tuple((of_job == job).nonzero()[:, 0].tolist()) for job in range(6)} - {()}
    assert {tuple(sorted(group)) for group in found["groups"]} == expected
    assert found["bits_after"] == pytest.approx(description_length(active, expected, 3), rel=1e-6)
    alone = [[c] for c in sum(expected, ())]
    assert found["bits_before"] == pytest.approx(description_length(active, alone, 3), rel=1e-6)
