"""Toy models: the score against decompositions whose quality is known, the command, and a short real recovery."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import toy_models
import vpd

SCRIPT = Path(toy_models.__file__)


def test_the_score_of_the_true_mechanisms_is_perfect_and_of_others_is_not():
    torch.manual_seed(0)
    columns = torch.randn(3, 5)  # (M, N)
    truth = torch.stack([columns * (torch.arange(5) == j) for j in range(5)])
    assert toy_models.superposition_score(columns, truth) == pytest.approx({"mmcs": 1.0, "ml2r": 1.0, "represented": 5}, rel=1e-5)
    half = toy_models.superposition_score(columns, truth / 2)
    assert half["mmcs"] == pytest.approx(1.0) and half["ml2r"] == pytest.approx(0.5)
    # without the mechanism of one feature, that feature has nothing to match
    missing = toy_models.superposition_score(columns, truth[1:])
    assert missing["mmcs"] == pytest.approx(0.8) and missing["ml2r"] == pytest.approx(0.8)
    # two features a and b in one rank-one subcomponent: the cosine is that with the direction they share
    u, v = columns[:, 0] + columns[:, 1], torch.tensor([1.0, 1, 0, 0, 0])
    shared = toy_models.superposition_score(columns, torch.cat([truth[2:], torch.outer(u, v)[None]]))
    cosines = [max(0, torch.dot(columns[:, j], u) / columns[:, j].norm() / u.norm()) for j in (0, 1)]  # 0: another's empty column
    assert shared["mmcs"] == pytest.approx((3 + float(sum(cosines))) / 5, rel=1e-5)
    assert toy_models.superposition_score(columns, truth[:0])["mmcs"] == 0


def test_features_that_the_target_does_not_represent_are_not_scored():
    columns = torch.eye(3, 4)  # the fourth column is zero
    parts = torch.stack([columns * (torch.arange(4) == j) for j in range(3)])
    assert toy_models.superposition_score(columns, parts) == pytest.approx({"mmcs": 1.0, "ml2r": 1.0, "represented": 3})


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
    x = toy_models.feature_batch(20_000, 5, 0.05, -1.0, torch.Generator().manual_seed(0))
    present = x[x != 0]
    assert abs(len(present) / x.numel() - 0.05) < 0.003
    assert present.min() < -0.99 and present.max() > 0.99 and abs(present.mean()) < 0.03


@pytest.mark.parametrize("name", ["tms", "tms_5", "tms_2-5", "tms_5-0", "resid_mlp4", "gpt2"])
def test_an_unknown_model_is_refused_and_those_there_are_listed(name, tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, name, "--out", tmp_path / "run"], capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: unknown model {name!r}") and "tms_N-M" in done.stderr


def test_a_folder_of_another_toy_run_is_refused(tmp_path):
    toy = toy_models.parse_name("tms_5-2")
    toy_models.target_of_run(toy, 0, 2, tmp_path, "cpu")
    with pytest.raises(vpd.BadInput, match="holds tms_5-2 of seed 0"):
        toy_models.target_of_run(toy, 1, 2, tmp_path, "cpu")
    (tmp_path / "target.pt").write_bytes(b"damaged")
    with pytest.raises(vpd.BadInput, match="target.pt is damaged"):
        toy_models.target_of_run(toy, 0, 2, tmp_path, "cpu")


def test_the_default_run_finds_the_five_mechanisms_of_tms_5_2(tmp_path):
    torch.set_num_threads(1)
    toy = toy_models.parse_name("tms_5-2")
    model, _ = toy_models.target_of_run(toy, 0, toy.target_steps(False), tmp_path, "cpu")
    decomposition = vpd.decompose(model, toy.C(), toy.batch, vpd.mse, toy.config(0))
    metrics = vpd.evaluate(model, decomposition, [toy.batch(torch.Generator().manual_seed(1), 4_000)], vpd.mse)
    drawn = toy_models.score(toy, model, decomposition, metrics)
    for path in ("W", "WT"):
        assert metrics["matrices"][path]["alive"] == 5 and metrics["matrices"][path]["mmcs"] > 0.98
        _, probe = drawn[path]
        assert torch.equal((probe > 0.5).float()[:, :5], torch.eye(5))  # each feature its own
    # and the maskings are ordered as they must be: nothing ablated best, everything ablated worst
    d = metrics["divergence"]
    assert d["unmasked"] < d["stochastic"] < d["g"] < d["ablated"] / 5
