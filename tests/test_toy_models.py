"""Toy models: the score against decompositions whose quality is known, the command, and a short real recovery."""

import math
import sys

import pytest
import torch
from torch import nn

import toy_models
import vpd

def test_the_score_of_the_true_mechanisms_is_perfect_and_of_others_is_not():
    torch.manual_seed(0)
    columns = torch.randn(3, 5)  # (M, N)
    truth = torch.stack([columns * (torch.arange(5) == j) for j in range(5)])
    assert toy_models.superposition_score(columns, truth)[0] == pytest.approx({"mmcs": 1.0, "ml2r": 1.0, "true": 5}, rel=1e-5)
    half, _ = toy_models.superposition_score(columns, truth / 2)
    assert half["mmcs"] == pytest.approx(1.0) and half["ml2r"] == pytest.approx(0.5)
    # without the mechanism of one feature, that feature has nothing to match
    missing, _ = toy_models.superposition_score(columns, truth[1:])
    assert missing["mmcs"] == pytest.approx(0.8) and missing["ml2r"] == pytest.approx(0.8)
    # two features a and b in one rank-one subcomponent: the cosine is that with the direction they share
    u, v = columns[:, 0] + columns[:, 1], torch.tensor([1.0, 1, 0, 0, 0])
    shared, _ = toy_models.superposition_score(columns, torch.cat([truth[2:], torch.outer(u, v)[None]]))
    cosines = [max(0, torch.dot(columns[:, j], u) / columns[:, j].norm() / u.norm()) for j in (0, 1)]  # 0: another's empty column
    assert shared["mmcs"] == pytest.approx((3 + float(sum(cosines))) / 5, rel=1e-5)
    assert toy_models.superposition_score(columns, truth[:0])[0]["mmcs"] == 0


def test_features_that_the_target_does_not_represent_are_not_scored():
    columns = torch.eye(3, 4)  # the fourth column is zero
    parts = torch.stack([columns * (torch.arange(4) == j) for j in range(3)])
    assert toy_models.superposition_score(columns, parts)[0] == pytest.approx({"mmcs": 1.0, "ml2r": 1.0, "true": 3})


def test_a_feature_is_recovered_only_by_one_subcomponent_that_serves_no_other():
    probe = torch.tensor([[0.9, 0.0, 0.0, 0.0], [0.0, 0.9, 0.5, 0.0], [0.0, 0.0, 0.0, 0.9], [0.0, 0.0, 0.0, 0.9]])
    parts = torch.zeros(4, 2, 3)
    score = toy_models.residual_score("layers.0.in", parts, probe)
    assert score == {"features_recovered": 0.25}  # the second has two, the third and the fourth share one


def test_an_out_matrix_is_scored_by_the_rank_of_the_sum_and_by_how_many_are_on():
    torch.manual_seed(0)
    one = torch.outer(torch.randn(5), torch.randn(4))
    other = torch.outer(torch.randn(5), torch.randn(4))
    parts = torch.stack([one, 2 * one, other])  # three subcomponents, of rank two together
    probe = torch.tensor([[0.9, 0.0, 0.0], [0.9, 0.5, 0.0]])  # the third is on for none: it does not count as sparse
    assert toy_models.residual_score("layers.0.out", parts, probe) == {"rank": 2, "dense": 0.75}


def test_residual_mlp_computes_its_blocks_on_the_residual_stream():
    torch.manual_seed(0)
    toy = toy_models.parse_name("resid_mlp2")
    model, x = toy.model(), torch.randn(3, toy.features)
    h = x @ model.embedding
    for layer in model.layers:
        h = h + (h @ layer["in"].weight.T).clamp(min=0) @ layer["out"].weight.T
    torch.testing.assert_close(model(x), h @ model.embedding.T)
    torch.testing.assert_close(model.embedding.norm(dim=-1), torch.ones(toy.features))


@pytest.mark.parametrize("layers", [1, 2])
def test_the_published_residual_mlps_have_the_size_and_density_of_the_paper(layers):
    toy = toy_models.parse_name(f"resid_mlp{layers}", published=True)
    assert (toy.features, toy.dimensions, toy.neurons * layers, toy.density) == (100, 1000, 50, 0.01)


def test_features_are_present_with_their_density_and_range():
    for name, least, density in (("tms_5-2", 0.0, 0.05), ("resid_mlp1", -1.0, 1 / 40)):
        x = toy_models.parse_name(name).batch(torch.Generator().manual_seed(0), 20_000)
        present = x[x != 0]
        assert abs(len(present) / x.numel() - density) < 0.003
        assert abs(present.min() - least) < 0.01 and present.max() > 0.99 and abs(present.mean() - (1 + least) / 2) < 0.03


@pytest.mark.parametrize("name", ["tms", "tms_5", "tms_2-5", "resid_mlp4", "gpt2", "induction_8", "induction_3-9", "induction_4-5-5"])
def test_an_unknown_model_is_refused_and_those_there_are_listed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy_models.py", name, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match=f"^error: unknown model {name!r}.*tms_N-M") as stopped:
        toy_models.main()
    assert "\n" not in stopped.value.code and not (tmp_path / "run").exists()


def test_a_folder_of_another_toy_run_is_refused(tmp_path):
    toy = toy_models.parse_name("tms_5-2")
    toy_models.target_of_run(toy, 0, 2, tmp_path, "cpu")
    with pytest.raises(vpd.BadInput, match="holds tms_5-2 of seed 0"):
        toy_models.target_of_run(toy, 1, 2, tmp_path, "cpu")
    (tmp_path / "target.pt").write_bytes(b"damaged")
    with pytest.raises(vpd.BadInput, match="target.pt is damaged"):
        toy_models.target_of_run(toy, 0, 2, tmp_path, "cpu")


def test_the_five_mechanisms_of_tms_5_2_are_found():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    toy = toy_models.parse_name("tms_5-2")
    model, angle = toy.model().eval(), torch.arange(5) * (2 * math.pi / 5)
    model.W.weight.data = torch.stack([angle.cos(), angle.sin()])  # where its training ends: a regular pentagon ...
    model.WT.weight.data, model.WT.bias.data = model.W.weight.data.T.clone(), torch.full((5,), -math.cos(2 * math.pi / 5))
    decomposition = vpd.decompose(model, toy.C(), toy.batch, vpd.mse, toy.config(0))  # ... and a bias that hides neighbours
    data = toy.batch(torch.Generator().manual_seed(1), 4_000)
    metrics = vpd.evaluate(model, decomposition, [data], vpd.mse)
    drawn = toy_models.score(toy, model, decomposition, data, metrics)
    assert metrics["groups"] == {"found": 5, "true": 5, "exact": 5}  # of a feature its parts of W and of W^T
    for path in ("W", "WT"):
        assert metrics["matrices"][path]["alive"] == 5 and metrics["matrices"][path]["mmcs"] > 0.98
        _, probe = drawn[path]
        assert torch.equal((probe > 0.5).float()[:, :5], torch.eye(5))  # each feature its own
    # and the maskings are ordered as they must be: nothing ablated best, everything ablated worst
    d = metrics["divergence"]
    assert d["unmasked"] < d["stochastic"] < d["g"] < d["ablated"] / 5


# ---- induction: the truth is known in weights and in importances ------------------------------------------------------


def second_places(ids):
    """(position, first place of its token) of every token that was there before, in one sequence."""
    return [(t, s) for t in range(len(ids)) for s in range(1, t) if ids[s] == ids[t]]


@pytest.mark.parametrize("name, right", [("induction", 1.0), ("induction_5-9", 1.0), ("induction_16-9-12", 0.9)])
def test_the_induction_transformer_copies_what_followed_the_last_time_and_else_predicts_nothing(name, right):
    torch.manual_seed(0)
    toy = toy_models.parse_name(name)
    model, ids = toy.model(), toy.batch(torch.Generator().manual_seed(0), 200)
    logits, copies = model(ids).detach(), []
    for sequence, at in zip(ids.tolist(), logits):
        second = dict(second_places(sequence))
        assert len(set(second.values())) == len(second)  # no token stands more than twice
        copies += [int(at[t].argmax()) == sequence[s + 1] for t, s in second.items()]
        for t in set(range(len(sequence))) - set(second):
            assert right < 1 or at[t].abs().max() < 0.7  # vectors in superposition overlap, and err
    assert len(copies) > 100 and sum(copies) / len(copies) >= right


def planted(model):
    """A decomposition into the true mechanisms: U {path: (n, d_out)}, V {path: (d_in, n)}, by singular vectors."""
    U, V = {}, {}
    for path, parts in toy_models.mechanisms(model).items():
        left, values, right = torch.linalg.svd(parts)
        assert (values[:, 1:] < 1e-6).all()  # each is of rank one
        assert torch.allclose(parts.sum(0), model.get_submodule(path).weight)
        U[path], V[path] = left[:, :, 0] * values[:, :1], right[:, 0].T
    return U, V


def test_the_mechanisms_of_induction_are_needed_where_it_is_said_and_nowhere_else():
    """Brute force: ablate all that is not needed, and nothing happens; then any one that is, and the copy is lost."""
    toy = toy_models.parse_name("induction")
    model, ids = toy.model(), toy.batch(torch.Generator().manual_seed(0), 64)
    U, V = planted(model)
    masks = {path: torch.zeros(*ids.shape, len(u) + 1) for path, u in U.items()}
    for path, (_, place) in toy_models.needed(ids).items():
        masks[path][place] = 1.0
    with torch.no_grad():
        target = model(ids).log_softmax(-1)
        kept = vpd.masked_forward(model, U, V, masks, ids).log_softmax(-1)
        assert (target.exp() * (target - kept)).sum(-1).max() < 0.05
        for path, (_, (sequence, position, mechanism)) in toy_models.needed(ids).items():
            for b, t, n in list(zip(sequence.tolist(), position.tolist(), mechanism.tolist()))[:20]:
                one_less = {p: m.clone() for p, m in masks.items()}
                one_less[path][b, t, n] = 0.0
                lost = vpd.masked_forward(model, U, V, one_less, ids)[b].log_softmax(-1)
                assert (target[b].exp() * (target[b] - lost)).sum(-1).max() > 0.2, (path, b, t, n)


def test_the_graph_of_the_true_decomposition_is_the_induction_path_and_nothing_else():
    toy = toy_models.parse_name("induction")
    model, checked = toy.model(), 0
    true = vpd.Decomposition(*planted(model), nn.Identity())
    for ids in toy.batch(torch.Generator().manual_seed(1), 40):
        second = second_places(ids.tolist())
        if len(second) != 1 or second[0][0] != len(ids) - 1:
            continue  # one copy, at the last position
        (t, s), checked = second[0], checked + 1
        token = int(ids[s + 1])
        g = {path: torch.zeros(1, len(ids), len(u) + 1) for path, u in true.U.items()}
        for path, (_, place) in toy_models.needed(ids[None]).items():
            g[path][place] = 1.0
        outcome = lambda logits: logits[0, -1, token] - logits[0, -1].mean()
        graph = vpd.attribution_graph(model, true, g, ids[None], outcome, share=0.005)
        places = [(node["matrix"].removeprefix("layers."), node["position"]) for node in graph["nodes"]]
        edges = {(places[edge["source"]], places[edge["target"]]) for edge in graph["edges"]}
        o0, o1 = ("0.o", s + 1), ("1.o", t)
        before = {(("0.q", s + 1), o0), (("0.k", s), o0), (("0.v", s), o0), (o0, ("1.k", s + 1))}
        after = {(("1.q", t), o1), (("1.k", s + 1), o1), (("1.v", s + 1), o1), (o1, ("outcome", t))}
        assert edges == before | after
    assert checked >= 3
