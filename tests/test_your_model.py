"""A model that nobody tuned for: what cannot be decomposed is refused in one line, before training; the rest works."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import vpd
from conftest import Net, decompose_net, net_refused, rows, two_layers

def changed(change):
    net = Net()
    change(net)
    return net

class LoRA(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x @ torch.ones(self.in_features, self.out_features)

@pytest.mark.parametrize("message, given", [
    ("no matrix to decompose", dict(sizes={})),
    ("'frist' is not an nn.Linear.*nearest that are: first", dict(sizes={"frist": 4})),
    (r"C\['first'\] is 0.*at least 1", dict(sizes={"first": 0})),
    ("first.weight is torch.float64: call model.float", dict(model=Net().double())),
    ("first has no weights yet, or only zeros: ", dict(model=changed(lambda net: net.first.weight.data.zero_()))),
    ("last is in training mode", dict(model=changed(lambda net: net.last.train()))),
    ("a batch is a tuple: make get_batch return one tensor", dict(get_batch=lambda _: (1, 2))),
    ("the model returns a tuple: make it return", dict(model=Net(lambda net, x: (two_layers(net, x), x)))),
    ("output is not finite", dict(model=Net(lambda net, x: two_layers(net, x) / 0))),
    ("first runs twice", dict(model=Net(lambda net, x: net.first(x) + net.first(2 * x)))),
    ("last does not run", dict(model=Net(lambda net, x: net.first(x)))),
    ("see different positions", dict(model=Net(lambda net, x: net.last(net.first(x)[:5])))),
    ("first does not compute W x [+] b .*: merge it", dict(model=Net(first=LoRA))),
    ("two passes over one batch differ", dict(model=Net(lambda net, x: F.dropout(two_layers(net, x))))),
    ("divergence is not one number", dict(divergence=lambda x, y: (x - y) ** 2)),
    ("no gradient reaches first: detach", dict(model=Net(lambda net, x: net.last(net.first(x).detach())))),
    ("a small step fails .*: detach nothing", dict(model=Net(lambda net, x: two_layers(net, x).detach()))),
    ("G_width is 30 and G_heads 4", dict(get_batch=lambda _: torch.randn(8, 4, 4), config=vpd.Config(G_width=30))),
])
def test_what_cannot_be_decomposed_is_refused_by_its_cause_and_leaves_no_folder(message, given, tmp_path):
    net_refused(message, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()

@pytest.mark.parametrize("make", [
    partial(Net, lambda net, x: net.last(F.relu_(net.first(x)))),
    partial(changed, lambda net: net.requires_grad_(False)),
    partial(changed, lambda net: prune.l1_unstructured(net.first, "weight", 0.5)),
    partial(changed, lambda net: torch.compile(net, backend="eager")(rows(None))),
])
def test_whatever_computes_w_x_plus_b_is_decomposed_even_where_the_caller_has_switched_gradients_off(make, tmp_path):
    model = make()
    x = rows(None)
    with torch.no_grad():
        target = model(x)
        found = decompose_net(tmp_path, model=model, sizes={"first": 3})
        ones = {"first": torch.ones(32, 4)}
        torch.testing.assert_close(vpd.masked_forward(model, found.U, found.V, ones, x), target)
        assert torch.equal(model(x), target)

def test_a_folder_in_use_is_refused_with_its_owner(tmp_path):
    with vpd.own_folder(tmp_path):
        net_refused("is in use by another process", tmp_path)
    decompose_net(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"run.json", "log.jsonl", "checkpoint.pt"}

def test_a_run_is_opened_from_its_folder_alone_and_has_the_same_importances(tmp_path):
    model = Net()
    found = decompose_net(tmp_path, model=model)
    again = vpd.load_decomposition(str(tmp_path))
    batch = rows(None)
    _, g = vpd.predict_importances(model, found, batch)
    _, g_again = vpd.predict_importances(model, again, batch)
    assert torch.equal(vpd.side_by_side(g), vpd.side_by_side(g_again))

def test_a_matrix_that_does_not_run_is_refused_and_not_silently_left_whole():
    model = Net()
    found = decompose_net(model=model)
    model.forward = lambda x: x
    with pytest.raises(vpd.BadInput, match="does not run"):
        vpd.masked_forward(model, found.U, found.V, {"first": torch.zeros(32, 7)}, rows(None))

def test_the_verdict_names_what_to_change_for_a_figure_that_is_not_good():
    figures = {"divergence, unmasked": 0.003, "divergence, stochastic": 0.12, "divergence, rounded at 0": 0.17}
    figures |= {"divergence, ablated": 8.0, "L0": 50.0, "alive": 1000, "C": 1600}
    assert vpd.verdict({"figures": figures, "attack": [0.2, 0.3]}).count("good") == 6
    assert "20  over" in vpd.verdict({"figures": figures, "attack": [0.2, 20]})
    judged = vpd.verdict({"figures": figures | {"alive": 1590}, "attack": [0.3]})
    (bad,) = [line for line in judged.splitlines() if "good" not in line]
    assert "1590  over" in bad and "raise C" in bad
