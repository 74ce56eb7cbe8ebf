"""A model that nobody tuned for: what cannot be decomposed is refused in one line, before training; the rest works."""

import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import vpd

SMALL = vpd.Config(steps=2)

def numbers(generator):
    return torch.randn(8, 4, generator=generator)

def ids(generator):
    return torch.randint(0, 10, (2, 6), generator=generator)

class Net(nn.Module):
    """Two matrices with `between` after the first; `before` changes the inputs, `after` the output."""
    def __init__(self, first=nn.Linear, between=F.relu, before=lambda x: x, after=lambda x: x):
        super().__init__()
        self.first = first(4, 8)
        self.second = nn.Linear(8, 3)
        self.between = between
        self.before = before
        self.after = after

    def forward(self, x):
        return self.after(self.second(self.between(self.first(self.before(x)))))

class LoRA(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x @ torch.ones(self.in_features, self.out_features)

class Quantised(nn.Linear):
    def forward(self, x):
        return F.linear(x, (4 * self.weight).round() / 4, self.bias)

class ExtraState(nn.Linear):
    def get_extra_state(self):
        return {"not": "a tensor"}

class ByKeyword(nn.Linear):
    def __call__(self, x):
        return super().__call__(input=x)

def changed(change, **options):
    net = Net(**options).eval()
    change(net)
    return net

def add_in_place(x):
    x += 1
    return x

def hook(net):
    net.first.register_forward_hook(lambda module, args, output: 1.01 * output)

def zero_weights(net):
    net.first.weight.data.zero_()

def weight_normed_after_eval(net):
    nn.utils.parametrizations.weight_norm(net.first)

class Shifting(nn.Module):
    """A language model that shifts its ids in place, and so its inputs at each further pass."""
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.first = nn.Linear(4, 10)

    def forward(self, ids):
        ids[:, 1:] = ids[:, :-1].clone()
        return self.first(self.embed(ids))

class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.first = nn.Linear(4, 10)

    def forward(self, ids):
        return self.first(self.embed(ids.T)).transpose(0, 1)

class Cast(nn.Linear):
    """Computes in float32 what comes in bfloat16."""
    def forward(self, x):
        return super().forward(x.float())

REFUSED = {  # a model, what else is given to `decompose`, and what the refusal says
    "adapter": (partial(Net, LoRA), {}, "first does not compute W x [+] b .*: merge it"),
    "quantised": (partial(Net, Quantised), {}, "first does not compute W x [+] b"),
    "hook": (partial(changed, hook), {}, "first does not compute W x [+] b"),
    "dropout in eval": (partial(Net, between=lambda x: F.dropout(x, 0.1)), {}, "two passes over one batch differ"),
    "part in training mode": (partial(changed, lambda net: net.second.train()), {}, "second is in training mode"),
    "weight-normed after eval": (partial(changed, weight_normed_after_eval), {}, r"call model.eval\(\)"),
    "ids shifted in place": (Shifting, {"get_batch": ids}, "changes its batch in place: .* x.clone"),
    "batch changed in place": (partial(Net, before=add_in_place), {}, "changes its batch in place"),
    "nan": (partial(Net, after=lambda x: x / 0 * 0), {}, "output is not finite"),
    "zeros": (partial(changed, zero_weights), {}, "first.weight is all zeros: leave it out"),
    "lazy": (partial(Net, lambda _, d_out: nn.LazyLinear(d_out)), {}, r"first has no weights yet: call model\(batch\)"),
    "double": (partial(changed, nn.Module.double), {}, r"first.weight is torch.float64: call model.float\(\)"),
    "detached": (partial(Net, between=torch.Tensor.detach), {}, "no gradient reaches first: detach nothing"),
    "no gradient": (partial(Net, after=torch.Tensor.detach), {}, "the model has no gradient .*: detach nothing"),
    "two outputs": (partial(Net, after=lambda x: (x, x)), {}, "the model returns a tuple: make it return one tensor"),
    "dict": (Net, {"get_batch": lambda _: {"x": 1}}, "a batch is a dict: make get_batch return one tensor"),
    "tuple": (Net, {"get_batch": lambda _: (1, 2)}, "a batch is a tuple"),
    "no scalar": (Net, {"divergence": lambda x, y: (x - y) ** 2}, "the divergence is not one number"),
    "no tensor": (Net, {"divergence": lambda x, y: 1.0}, "the divergence is not one number"),
    "dropout behind a huge logit": (
        partial(Net, between=lambda x: F.dropout(x, 0.5), after=lambda x: torch.cat([x, 0 * x - 1e9], -1)),
        {},
        "two passes over one batch differ"),
    "time first": (TimeFirst, {"get_batch": ids}, r"token ids are \(2, 6\), but matrices see .*\(6, 2\)"),
    "autocast inside": (partial(Net, before=lambda x: x.bfloat16(), first=Cast), {}, "input of first is not float32")}

@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_decomposed_is_refused_by_its_cause_in_one_line(name, tmp_path):
    make, options, message = REFUSED[name]
    model = make()
    if name not in ("part in training mode", "weight-normed after eval"):
        model.eval()
    arguments = {"get_batch": numbers, "divergence": vpd.mse, "config": SMALL, "out": tmp_path / "run"} | options
    with pytest.raises(vpd.BadInput, match=message) as refusal:
        vpd.decompose(model, {"first": 3}, **arguments)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()

def compiled_before(net):
    torch.compile(net, backend="eager")(numbers(None))

WORKS = {
    "extra state": partial(Net, ExtraState),
    "by keyword": partial(Net, ByKeyword),
    "in place between": partial(Net, between=lambda x: F.relu_(add_in_place(x))),
    "frozen": partial(changed, lambda net: net.requires_grad_(False)),
    "pruned": partial(changed, lambda net: prune.l1_unstructured(net.first, "weight", 0.5)),
    "weight-normed": partial(changed, lambda net: nn.utils.parametrizations.weight_norm(net.first)),
    "spectral": partial(changed, lambda net: nn.utils.parametrizations.spectral_norm(net.first)),
    "orthogonal": partial(changed, lambda net: nn.utils.parametrizations.orthogonal(net.first)),
    "compiled before": partial(changed, compiled_before)}

@pytest.mark.parametrize("name", WORKS)
def test_whatever_computes_w_x_plus_b_is_decomposed_even_where_the_caller_has_switched_gradients_off(name, tmp_path):
    model = WORKS[name]().eval()
    x = numbers(None)
    with torch.no_grad():
        target = model(x)
        found = vpd.decompose(model, {"first": 3}, numbers, vpd.mse, SMALL, tmp_path)
        ones = {"first": torch.ones(8, 4)}
        torch.testing.assert_close(vpd.masked_forward(model, found.U, found.V, ones, x), target)
        assert torch.equal(model(x), target)

def test_new_tensors_in_float64_and_inference_mode_are_refused_and_not_the_model_blamed():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(vpd.BadInput, match="autocast is on"):
        vpd.decompose(Net().eval(), {"first": 3}, numbers, vpd.mse, SMALL)
    with torch.inference_mode(), pytest.raises(vpd.BadInput, match="no gradients in inference mode"):
        vpd.decompose(Net().eval(), {"first": 3}, numbers, vpd.mse, SMALL)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(vpd.BadInput, match="set_default_dtype"):
            vpd.decompose(Net().eval().float(), {"first": 3}, numbers, vpd.mse, SMALL)
    finally:
        torch.set_default_dtype(torch.float32)

OWNER = """
import sys, time, torch, vpd
with vpd.own_folder(vpd.Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""

def test_a_folder_in_use_is_refused_with_its_owner_and_a_killed_owner_frees_it(tmp_path):
    with subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"mine\n"
        with pytest.raises(vpd.BadInput, match="is in use by another process"):
            vpd.decompose(Net().eval(), {"first": 3}, numbers, vpd.mse, SMALL, tmp_path)
        owner.kill()
    vpd.decompose(Net().eval(), {"first": 3}, numbers, vpd.mse, SMALL, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"run.json", "log.jsonl", "checkpoint.pt"}

@pytest.mark.parametrize("make, get_batch", [(Net, numbers), (lambda: nn.Sequential(nn.Embedding(10, 4), Net()), ids)])
def test_a_run_is_opened_from_its_folder_alone_and_has_the_same_importances(make, get_batch, tmp_path):
    model = make().eval()
    path = "first" if get_batch is numbers else "1.first"
    found = vpd.decompose(model, {path: 3}, get_batch, vpd.mse, SMALL, tmp_path)
    again = vpd.load_decomposition(str(tmp_path))
    batch = get_batch(None)
    _, g = vpd.predict_importances(model, found, batch)
    _, g_again = vpd.predict_importances(model, again, batch)
    assert torch.equal(g[path], g_again[path])
    assert isinstance(found.G, vpd.ImportanceTransformer) == (get_batch is ids)  # by the inputs' shape

def test_a_decomposition_is_read_with_the_model_in_eval_mode_and_from_its_own_folder_alone(tmp_path):
    model = Net().eval()
    found = vpd.decompose(model, {"first": 3}, numbers, vpd.mse, SMALL)
    with pytest.raises(vpd.BadInput, match="in training mode"):
        vpd.evaluate(model.train(), found, [numbers(None)], vpd.mse)
    with pytest.raises(vpd.BadInput, match="has no run.json and checkpoint.pt"):
        vpd.load_decomposition(tmp_path)

def test_a_matrix_that_no_longer_runs_is_named_and_not_silently_left_whole():
    model = Net().eval()
    found = vpd.decompose(model, {"first": 3}, numbers, vpd.mse, SMALL)
    model.forward = lambda x: x
    with pytest.raises(vpd.BadInput, match="did not run"):
        vpd.masked_forward(model, found.U, found.V, {"first": torch.zeros(8, 4)}, numbers(None))

def test_the_settings_for_sequences_follow_the_sizes_of_the_model():
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(24)], nn.Linear(256, 1024), nn.Linear(1024, 256))
    C = {str(i): 5 for i in range(26)}
    config = vpd.sequence_config(model, C, steps=7)
    assert (config.G_width, config.G_blocks, config.steps) == (384, 2, 7)
    assert config.lr == pytest.approx(0.007 / 2)  # four times the width of 64

def test_the_verdict_names_what_to_change_for_each_figure_that_is_not_good():
    figures = {"divergence, unmasked": 0.003, "divergence, stochastic": 0.12, "divergence, rounded at 0": 0.17}
    figures |= {"divergence, ablated": 8.0, "L0": 50.0, "alive": 1000, "C": 1600, "fresh adversary, 80 steps": 0.3}
    assert vpd.verdict({"figures": figures}).count("good") == 6
    worse = {"divergence, unmasked": ("raise w_delta", 0.03), "fresh adversary, 80 steps": ("take more steps", 20.0),
             "alive": ("raise C", 1590), "L0": ("raise w_importance", 900.0)}  # fmt: skip
    for name, (remedy, x) in worse.items():
        lines = vpd.verdict({"figures": figures | {name: x}}).splitlines()
        bad = [line for line in lines if not line.endswith("good")]
        assert len(bad) == 1
        assert remedy in bad[0]

def test_an_attack_of_fewer_steps_is_the_beginning_of_a_longer_one():
    model = Net().eval()
    found = vpd.decompose(model, {"first": 3}, numbers, vpd.mse, SMALL)
    x = numbers(torch.Generator().manual_seed(1))
    long = vpd.evaluate(model, found, [x], vpd.mse)["figures"]
    short = vpd.evaluate(model, found, [x], vpd.mse, attack_steps=20)["figures"]
    assert short["fresh adversary, 20 steps"] == long["fresh adversary, 20 steps"]
    assert "fresh adversary, 80 steps" in long
    assert "fresh adversary, 80 steps" not in short
