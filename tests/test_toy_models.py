"""Toy models: the score against decompositions whose quality is known, the command, and a short real recovery."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import toy_models
import vpd

def test_the_score_of_the_true_mechanisms_is_perfect_and_of_others_is_not():
    torch.manual_seed(0)
    columns = torch.randn(3, 5)  # (M, N)
    truth = torch.stack([columns * (torch.arange(5) == j) for j in range(5)])
    perfect, best = toy_models.superposition_score(columns, truth.flip(0))
    assert perfect == pytest.approx({"mmcs": 1.0, "ml2r": 1.0, "true": 5}, rel=1e-5)
    assert best.tolist() == [4, 3, 2, 1, 0]
    half, _ = toy_models.superposition_score(columns, truth / 2)
    assert half["mmcs"] == pytest.approx(1.0) and half["ml2r"] == pytest.approx(0.5)
    missing, _ = toy_models.superposition_score(columns, truth[1:])  # one feature has nothing to match
    assert missing["mmcs"] == pytest.approx(0.8) and missing["ml2r"] == pytest.approx(0.8)
    columns[:, 0] = 0
    left_out, _ = toy_models.superposition_score(columns, truth)  # what the target does not represent is not scored
    assert left_out == pytest.approx({"mmcs": 1.0, "ml2r": 1.0, "true": 4})

def test_a_feature_is_recovered_only_by_one_subcomponent_of_its_own_and_an_out_matrix_is_scored_by_its_sum():
    on_in = torch.tensor([[0.9, 0.0, 0.0, 0.0], [0.0, 0.9, 0.5, 0.0], [0.0, 0.0, 0.0, 0.9], [0.0, 0.0, 0.0, 0.9]])
    torch.manual_seed(0)
    one = torch.outer(torch.randn(5), torch.randn(4))
    other = torch.outer(torch.randn(5), torch.randn(4))
    matrices = torch.stack([one, 2 * one, other])  # three subcomponents, of rank two together
    on_out = torch.tensor([[0.9, 0.0, 0.0], [0.9, 0.5, 0.0]])
    found = {
        "layers.0.in": toy_models.Alive(torch.arange(4), torch.zeros(4, 2, 3), on_in),
        "layers.0.out": toy_models.Alive(torch.arange(3), matrices, on_out),
    }
    scores = {"layers.0.in": {}, "layers.0.out": {}}
    toy_models.score_residual_mlp(found, scores)
    assert scores["layers.0.in"] == {"features_recovered": 0.25}  # the second has two, the last two share one
    assert scores["layers.0.out"] == {"rank": 2, "dense": 0.75}  # the third is on for none: it does not count

def test_an_unknown_model_and_a_folder_that_cannot_be_made_are_refused_before_any_training(tmp_path, monkeypatch):
    monkeypatch.delattr(toy_models, "train_target")
    (tmp_path / "file").touch()
    for name, folder in (("gpt2", "run"), ("tms_2-5", "run"), ("tms_5-2", "file/run")):
        monkeypatch.setattr(sys, "argv", ["toy_models.py", name, "--out", str(tmp_path / folder)])
        with pytest.raises(SystemExit, match="^error: .*(unknown model|file/run)"):
            toy_models.main()
    assert not (tmp_path / "run").exists()

def test_a_folder_of_another_toy_run_is_refused(tmp_path):
    toy = toy_models.parse_name("tms_5-2")
    toy_models.target_of_run(toy, 0, 2, tmp_path, "cpu")
    with pytest.raises(vpd.BadInput, match="holds tms_5-2 of seed 0"):
        toy_models.target_of_run(toy, 1, 2, tmp_path, "cpu")

@pytest.mark.parametrize("name, last_picture", [("tms_2-1", "subcomponents_WT"), ("induction_2-3", "attention")])
def test_a_command_writes_metrics_and_pictures_and_repeated_it_trains_nothing_anew(
    name, last_picture, tmp_path, monkeypatch, capsys
):
    config = replace(toy_models.parse_name(name).config(1), steps=3)
    monkeypatch.setattr(toy_models.Toy, "config", lambda toy, seed, without: config)
    monkeypatch.setattr(toy_models, "train_target", lambda toy, model, seed, steps: None)
    monkeypatch.setattr(sys, "argv", ["toy_models.py", name, "--seed", "1", "--out", str(tmp_path)])
    toy_models.main()
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["model"], metrics["seed"], metrics["without"]) == (name, 1, [])
    assert f"{metrics['figures']['divergence, unmasked']:.4g}" in printed and "divergence, unmasked" in printed
    for picture in ("training", last_picture):
        assert (tmp_path / f"{picture}.png").stat().st_size > 5_000
    monkeypatch.delattr(toy_models, "train_target")
    monkeypatch.delattr(vpd, "training_step")
    toy_models.main()
    assert capsys.readouterr().out == printed

def test_the_five_mechanisms_of_tms_5_2_are_found():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    toy = toy_models.parse_name("tms_5-2")
    model = toy.model().eval().requires_grad_(False)
    angle = torch.arange(5) * (2 * math.pi / 5)
    model.W.weight.copy_(torch.stack([angle.cos(), angle.sin()]))  # where its training ends: a regular pentagon
    model.WT.weight.copy_(model.W.weight.T)
    model.WT.bias.fill_(-math.cos(2 * math.pi / 5))  # hides neighbours
    decomposition = vpd.decompose(model, toy.C(), toy.batch, vpd.mse, toy.config(0))
    data = toy.batch(torch.Generator().manual_seed(1), 4_000)
    metrics = vpd.evaluate(model, decomposition, [data], vpd.mse)
    scored = toy_models.score(toy, model, decomposition, data, metrics)
    figures = metrics["figures"]
    for path in ("W", "WT"):
        assert metrics["matrices"][path]["alive"] == 5 and metrics["matrices"][path]["mmcs"] > 0.98
        on = scored[path].on_probes > 0.5
        assert torch.equal(on[:, :5].float(), torch.eye(5))  # each feature its own
        weight = model.get_submodule(path).weight
        total = scored[path].matrices.sum(0)
        torch.testing.assert_close(total, weight if path == "W" else weight.T, rtol=0, atol=0.03)
    # and the maskings are ordered as they must be: nothing ablated best, everything ablated worst
    order = [figures[f"divergence, {masking}"] for masking in ("unmasked", "stochastic", "g as masks", "ablated")]
    assert order == sorted(order) and order[2] < order[3] / 5

# ---- induction: the truth is known in weights and in importances ---------------------------------------------------

def second_places(ids):
    """{position: first place of its token} of every token that was there before, in one sequence."""
    places = {}
    for t, token in enumerate(ids):
        if token in ids[1:t]:
            places[t] = ids.index(token, 1)
    return places

@pytest.mark.parametrize("name, right", [("induction", 1.0), ("induction_16-9-12", 0.9)])
def test_the_induction_transformer_copies_what_followed_the_last_time_and_else_predicts_nothing(name, right):
    torch.manual_seed(0)
    toy = toy_models.parse_name(name)
    model = toy.model()
    ids = toy.batch(torch.Generator().manual_seed(0), 200)
    copies = []
    for sequence, logits in zip(ids.tolist(), model(ids)):
        second = second_places(sequence)
        assert len(set(second.values())) == len(second)  # no token stands more than twice
        copies += [int(logits[t].argmax()) == sequence[s + 1] for t, s in second.items()]
        for t in set(range(len(sequence))) - set(second):
            assert right < 1 or logits[t].abs().max() < 0.7  # vectors in superposition overlap, and err
    assert len(copies) > 100 and sum(copies) / len(copies) >= right

def planted(model):
    """A decomposition into the true mechanisms: U {path: (n, d_out)}, V {path: (d_in, n)}, by singular vectors."""
    U = {}
    V = {}
    for path, true in toy_models.mechanisms(model).items():
        left, values, right = torch.linalg.svd(true)
        assert (values[:, 1:] < 1e-6).all()  # each is of rank one
        assert torch.allclose(true.sum(0), model.get_submodule(path).weight)
        U[path] = left[:, :, 0] * values[:, :1]
        V[path] = right[:, 0].T
    return U, V

def importances(U, ids):
    """{path: (B, T, n + 1)}: 1 for every mechanism where it is needed, else 0."""
    g = {path: torch.zeros(*ids.shape, len(u) + 1) for path, u in U.items()}
    for path, place in toy_models.needed(ids).items():
        g[path][place] = 1.0
    return g

def test_the_mechanisms_of_induction_are_needed_where_it_is_said_and_nowhere_else():
    """Brute force: ablate all that is not needed, and nothing happens; then any one that is, and the copy is lost."""
    toy = toy_models.parse_name("induction")
    model = toy.model()
    ids = toy.batch(torch.Generator().manual_seed(0), 64)
    U, V = planted(model)
    masks = importances(U, ids)
    target = model(ids).log_softmax(-1)

    def largest_kl(masks):
        output = vpd.masked_forward(model, U, V, masks, ids).log_softmax(-1)
        return (target.exp() * (target - output)).sum(-1).amax(1)  # of each sequence

    assert largest_kl(masks).max() < 0.05
    for path, place in toy_models.needed(ids).items():
        for b, t, n in torch.stack(place, 1)[:20].tolist():
            one_less = masks | {path: masks[path].clone()}
            one_less[path][b, t, n] = 0.0
            assert largest_kl(one_less)[b] > 0.2, (path, b, t, n)

def test_precision_and_recall_of_induction_count_what_is_on_and_what_is_needed():
    toy = toy_models.parse_name("induction_4-5")
    model = toy.model()
    ids = toy.batch(torch.Generator().manual_seed(0), 64)
    U, V = planted(model)
    g = {path: x[..., :-1] for path, x in importances(U, ids).items()}
    found = {}
    for path, u in U.items():
        matrices = torch.einsum("co,ic->coi", u, V[path])
        found[path] = toy_models.Alive(torch.arange(len(u)), matrices, g[path][0])
    needed = sum(int(x.sum()) for x in g.values())
    places = sum(x.numel() for x in g.values())
    everything = {path: torch.ones_like(x) for path, x in g.items()}
    nothing = {path: torch.zeros_like(x) for path, x in g.items()}
    for on, precision, recall in ((g, 1, 1), (everything, needed / places, 1), (nothing, 0, 0)):
        metrics = {"figures": {}, "matrices": {path: {} for path in U}}
        toy_models.score_induction(model, ids, on, found, metrics)
        assert metrics["figures"]["importances precision"] == pytest.approx(precision)
        assert metrics["figures"]["importances recall"] == pytest.approx(recall)
    assert all(matrix["mmcs"] == pytest.approx(1, abs=1e-5) for matrix in metrics["matrices"].values())

def test_graph_and_pruning_of_the_true_decomposition_are_the_induction_path_and_nothing_else():
    toy = toy_models.parse_name("induction")
    model = toy.model().requires_grad_(False)  # frozen, without embeddings: the first matrices have no sources
    U, V = planted(model)
    true = vpd.Decomposition(U, V, nn.Identity())
    checked = 0
    for ids in toy.batch(torch.Generator().manual_seed(1), 40):
        second = second_places(ids.tolist())
        if list(second) != [len(ids) - 1]:
            continue  # one copy, at the last position
        checked += 1
        ((t, s),) = second.items()
        token = ids[s + 1]
        g = importances(U, ids[None])

        def outcome(logits):
            return logits[0, -1, token] - logits[0, -1].mean()

        graph = vpd.attribution_graph(model, true, g, ids[None], outcome, share=0.005)
        places = [(node["matrix"].removeprefix("layers."), node["position"]) for node in graph["nodes"]]
        edges = {(places[edge["source"]], places[edge["target"]]) for edge in graph["edges"]}
        o0 = ("0.o", s + 1)
        o1 = ("1.o", t)
        before = {(("0.q", s + 1), o0), (("0.k", s), o0), (("0.v", s), o0), (o0, ("1.k", s + 1))}
        after = {(("1.q", t), o1), (("1.k", s + 1), o1), (("1.v", s + 1), o1), (o1, ("outcome", t))}
        assert edges == before | after

        def loss(logits):
            return nn.functional.cross_entropy(logits[:, -1], token[None])

        everything = {path: nn.functional.pad(torch.ones_like(x[..., :-1]), (0, 1)) for path, x in g.items()}
        adversarial = checked % 2 == 0
        kept = vpd.prune(model, true, everything, ids[None], loss, 1e-2, adversarial=adversarial, steps=200)
        for path, x in kept.items():
            assert torch.equal(x > 0, g[path] > 0), path
    assert checked >= 3
