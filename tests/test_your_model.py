"""A model that nobody tuned for: what cannot be decomposed is refused in one line, before training; the rest works."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import vpd
from conftest import TRANSFORMER, Net, decompose_net, net_refused, rows, two_layers, windows

def changed(change, **options):
    net = Net(**options)
    change(net)
    return net

class LoRA(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x @ torch.ones(self.in_features, self.out_features)

class Cast(nn.Linear):
    """Computes in float32 what comes in bfloat16."""
    def forward(self, x):
        return super().forward(x.float())

def dropout_beside_a_huge_logit(net, x):
    y = net.last(F.dropout(net.first(x), 0.5))
    return torch.cat([y, 0 * y - 1e9], -1)

def in_place(net, x):
    h = net.first(x)
    y = net.last(h)
    h += 1  # after the matrix has read it
    return y

def time_first(net, ids):
    return two_layers(net, F.one_hot(ids.T, 4).float()).transpose(0, 1)

def ids(generator):
    return torch.randint(4, (2, 6), generator=generator)

def sequences(**settings):
    return dict(get_batch=windows, config=vpd.Config(steps=3, **TRANSFORMER | settings))

@pytest.mark.parametrize("message, given", [
    ("no matrix to decompose", dict(sizes={})),
    ("'frist' is not an nn.Linear.*nearest that are: first", dict(sizes={"frist": 4})),
    (r"C\['first'\] is 0.*at least 1", dict(sizes={"first": 0})),
    (r"C\['first'\] is True", dict(sizes={"first": True})),
    ("first has no weights yet, or only zeros", dict(model=Net(first=lambda _, d_out: nn.LazyLinear(d_out)))),
    ("first.weight is torch.float64: call model.float", dict(model=Net().double())),
    ("first has no weights yet, or only zeros: ", dict(model=changed(lambda net: net.first.weight.data.zero_()))),
    ("last is in training mode", dict(model=changed(lambda net: net.last.train()))),
    ("a batch is a dict: make get_batch return one tensor", dict(get_batch=lambda _: {"x": 1})),
    ("a batch is a tuple", dict(get_batch=lambda _: (1, 2))),
    ("changes its batch in place: .* x.clone", dict(model=Net(lambda net, x: two_layers(net, x.add_(1))))),
    ("the model returns a tuple: make it return", dict(model=Net(lambda net, x: (two_layers(net, x), x)))),
    ("output is not finite", dict(model=Net(lambda net, x: two_layers(net, x) / 0))),
    ("first runs twice", dict(model=Net(lambda net, x: net.first(x) + net.first(2 * x)))),
    ("last does not run", dict(model=Net(lambda net, x: net.first(x)))),
    ("see different positions", dict(model=Net(lambda net, x: net.last(net.first(x)[:5])))),
    (r"token ids are \(2, 6\), but matrices see .*\(6, 2\)", dict(model=Net(time_first), get_batch=ids)),
    ("input of first is not float32", dict(model=Net(lambda net, x: two_layers(net, x.bfloat16()), first=Cast))),
    ("first does not compute W x [+] b .*: merge it", dict(model=Net(first=LoRA))),
    ("two passes over one batch differ", dict(model=Net(dropout_beside_a_huge_logit))),
    ("divergence is not one number", dict(divergence=lambda x, y: (x - y) ** 2)),
    ("no gradient reaches first: detach", dict(model=Net(lambda net, x: net.last(net.first(x).detach())))),
    ("a small step fails .*: detach nothing", dict(model=Net(lambda net, x: two_layers(net, x).detach()))),
    (r"modified by an inplace.*write x = x \+ y", dict(model=Net(in_place))),
    (r"G_width is 30 and G_heads 2: .*n \* 2 \* heads", sequences(G_width=30)),
    ("G_heads 0: give a width of", sequences(G_heads=0)),
])
def test_what_cannot_be_decomposed_is_refused_by_its_cause_and_leaves_no_folder(message, given, tmp_path):
    net_refused(message, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()

def test_autocast_inference_mode_and_tensors_in_float64_are_refused_and_not_the_model_blamed():
    with torch.autocast("cpu", torch.bfloat16):
        net_refused("autocast is on", None)
    with torch.inference_mode():
        net_refused("no gradients in inference mode", None)
    torch.set_default_dtype(torch.float64)
    net_refused("set_default_dtype", None, model=Net().float())

class ByKeyword(nn.Linear):
    def __call__(self, x):
        return super().__call__(input=x)

def in_place_between(net, x):
    return net.last(F.relu_(net.first(x).add_(1)))

WORKS = {
    "by keyword": partial(Net, first=ByKeyword),
    "in place between": partial(Net, in_place_between),
    "frozen": partial(changed, lambda net: net.requires_grad_(False)),
    "pruned": partial(changed, lambda net: prune.l1_unstructured(net.first, "weight", 0.5)),
    "spectral": partial(changed, lambda net: parametrizations.spectral_norm(net.first).eval()),
    "compiled before": partial(changed, lambda net: torch.compile(net, backend="eager")(rows(None)))}

@pytest.mark.parametrize("name", WORKS)
def test_whatever_computes_w_x_plus_b_is_decomposed_even_where_the_caller_has_switched_gradients_off(name, tmp_path):
    model = WORKS[name]()
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

@pytest.mark.parametrize("given", [{}, sequences()])
def test_a_run_is_opened_from_its_folder_alone_and_has_the_same_importances(given, tmp_path):
    model = Net()
    found = decompose_net(tmp_path, model=model, **given)
    again = vpd.load_decomposition(str(tmp_path))
    batch = given.get("get_batch", rows)(None)
    _, g = vpd.predict_importances(model, found, batch)
    _, g_again = vpd.predict_importances(model, again, batch)
    assert torch.equal(vpd.side_by_side(g), vpd.side_by_side(g_again))
    assert isinstance(found.G, vpd.ImportanceTransformer) == bool(given)  # by the inputs' shape

def test_what_a_decomposition_cannot_be_read_with_is_refused(tmp_path):
    model = Net()
    found = decompose_net(model=model)
    with pytest.raises(vpd.BadInput, match="evaluation batches differ in shape"):
        vpd.evaluate(model, found, [torch.zeros(8, 4), torch.zeros(7, 4)], vpd.mse)
    with pytest.raises(vpd.BadInput, match="in training mode"):
        vpd.evaluate(model.train(), found, [rows(None)], vpd.mse)
    model.forward = lambda x: x
    with pytest.raises(vpd.BadInput, match="does not run"):  # not silently left whole
        vpd.masked_forward(model, found.U, found.V, {"first": torch.zeros(32, 7)}, rows(None))
    with pytest.raises(vpd.BadInput, match="holds no decomposition"):
        vpd.load_decomposition(tmp_path)

def test_the_verdict_names_what_to_change_for_a_figure_that_is_not_good():
    figures = {"divergence, unmasked": 0.003, "divergence, stochastic": 0.12, "divergence, rounded at 0": 0.17}
    figures |= {"divergence, ablated": 8.0, "L0": 50.0, "alive": 1000, "C": 1600}
    assert vpd.verdict({"figures": figures, "attack": [0.2, 0.3]}).count("good") == 6
    assert "20  over" in vpd.verdict({"figures": figures, "attack": [0.2, 20]})
    worse = {"divergence, unmasked": (0.03, "raise w_delta"), "alive": (1590, "raise C"), "L0": (900, "raise w_imp")}
    for name, (x, remedy) in worse.items():
        judged = vpd.verdict({"figures": figures | {name: x}, "attack": [0.3]})
        (bad,) = [line for line in judged.splitlines() if "good" not in line]
        assert f"{x:.4g}  over" in bad and remedy in bad
