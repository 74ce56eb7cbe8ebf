"""The method: each test is a claim about VPD, checked against something independent of vpd.py."""

import collections
import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vpd
from conftest import TRANSFORMER, C, Net, code_blocks, decompose_net, same

def random_parts(model, sizes):
    """Random U and V for these matrices of a model, in its dtype."""
    U = {}
    V = {}
    for path, n in sizes.items():
        W = model.get_submodule(path).weight
        d_out, d_in = W.shape
        U[path] = torch.randn(n, d_out, dtype=W.dtype)
        V[path] = torch.randn(d_in, n, dtype=W.dtype)
    return U, V

def make(dtype=torch.float64):
    """A net, U, V, a batch of 2 * 3 positions, and masks for it."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    U, V = random_parts(model, C)
    masks = {path: torch.rand(2, 3, n + 1, dtype=dtype) for path, n in C.items()}
    return model, U, V, torch.randn(2, 3, 4, dtype=dtype), masks

def explicit_weight(W, U, V, m):
    """W'(m) of one position, term by term from the definition."""
    parts = [torch.outer(u, v) for u, v in zip(U, V.T)]
    kept = sum(m_c * part for m_c, part in zip(m, parts))
    return kept + m[-1] * (W - sum(parts))

def explicit_output(model, U, V, masks, x):
    """The net's output for x (..., 4), (positions, 3): at each position with weights that are built for it."""
    x = x.flatten(0, -2)
    masks = {path: m.flatten(0, -2) for path, m in masks.items()}
    outputs = []
    for i in range(len(x)):
        W = {path: explicit_weight(model.get_submodule(path).weight, U[path], V[path], masks[path][i]) for path in C}
        outputs.append(W["last"] @ F.gelu(W["first"] @ x[i] + model.first.bias))
    return torch.stack(outputs)

# --- 1  the masked forward pass ---

def test_masked_forward_is_the_forward_with_the_explicit_weights():
    model, U, V, x, masks = make()
    output = vpd.masked_forward(model, U, V, masks, x)
    expected = explicit_output(model, U, V, masks, x)
    torch.testing.assert_close(output.flatten(0, -2), expected, rtol=1e-12, atol=1e-12)

def test_masks_of_one_give_the_target_to_the_last_bit():
    model, U, V, x, masks = make(dtype=torch.float32)
    ones = {path: torch.ones_like(m) for path, m in masks.items()}
    assert torch.equal(vpd.masked_forward(model, U, V, ones, x), model(x))

def test_a_masked_pass_leaves_no_trace_even_if_it_raises():
    model, U, V, x, masks = make(dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    vpd.masked_forward(model, U, V, masks, x)
    with pytest.raises(RuntimeError):
        vpd.masked_forward(model, U, V, {**masks, "last": masks["last"][..., :-2]}, x)
    assert same(model.state_dict(), before)
    assert not any(module._forward_hooks for module in model.modules())

# --- 2  leaky hard sigmoids and routing ---

GRID = [-3.0, -1e-3, 0.0, 1e-3, 0.5, 0.999, 1.001, 4.0]

@pytest.mark.parametrize("incoming, below_0", [(-2.0, -0.02), (3.0, 0.0)])
def test_the_gradient_of_g_leaks_below_0_and_only_where_descent_would_raise_it(incoming, below_0):
    z = torch.tensor(GRID, dtype=torch.float64, requires_grad=True)
    g = vpd.lower_leaky(z)
    assert g.tolist() == [0, 0, 0, 1e-3, 0.5, 0.999, 1, 1]
    g.backward(torch.full_like(g, incoming))
    assert z.grad.tolist() == [below_0] * 3 + [incoming] * 3 + [0, 0]

def test_upper_leaky_g_and_its_gradient_leak_above_1():
    z = torch.tensor(GRID, dtype=torch.float64, requires_grad=True)
    g = vpd.upper_leaky(z)
    assert g.tolist() == pytest.approx([0, 0, 0, 1e-3, 0.5, 0.999, 1.00001, 1.03])
    g.sum().backward()
    slopes = z.grad.tolist()
    del slopes[2]  # at 0 is a kink
    assert slopes == [0, 0, 1, 1, 1, 0.01, 0.01]

def test_routing_draws_a_uniform_number_of_uniformly_chosen_matrices():
    L = 3
    n = 60_000
    U = {str(i): torch.zeros(1, 1) for i in range(L)}
    sources = torch.zeros(n, 2 * L)
    vpd.route(sources, U, torch.Generator().manual_seed(0))
    assert torch.equal(sources[:, ::2], sources[:, 1::2])  # Delta's column is routed with the others
    routed = sources[:, ::2] == 0  # (n, L)
    counts = collections.Counter(map(tuple, routed.tolist()))
    for subset in itertools.product([False, True], repeat=L):
        k = sum(subset)
        expected = n / L / math.comb(L, k) if k else 0  # k ~ Uniform{1..L}, then any of the subsets of size k
        assert abs(counts[subset] - expected) <= 5 * math.sqrt(expected), subset

# --- 3  causal importance functions ---

def shapes_of(V):
    return {path: tuple(v.shape) for path, v in V.items()}

def activations(inputs, U, V):
    """||U_c|| V_c^T x of every subcomponent, one by one."""
    found = []
    for path in C:
        for u, v in zip(U[path], V[path].T):
            found.append((inputs[path] @ v) * u.norm())
    return found

def test_each_importance_mlp_is_its_own_mlp_on_its_own_activation():
    model, U, V, x, _ = make(dtype=torch.float32)
    G = vpd.ImportanceMLPs(shapes_of(V), vpd.Config())
    nn.init.normal_(G.b_in)
    nn.init.normal_(G.b_out)
    _, inputs = vpd.forward_with_inputs(model, C, x)
    z = G(inputs, U, V)
    for n, a in enumerate(activations(inputs, U, V)):
        hidden = F.gelu(a[..., None] * G.w_in[n, 0].abs() + G.b_in[n, 0])
        expected = 4 * hidden @ G.w_out[n, :, 0].abs() + G.b_out[n, 0, 0]
        torch.testing.assert_close(z[..., n], expected, rtol=1e-4, atol=1e-5)

def test_rotary_embedding_turns_each_plane_by_an_angle_in_proportion_to_the_position():
    torch.manual_seed(0)
    x = torch.randn(12, 8, dtype=torch.float64)
    angle = torch.arange(12.0)[:, None] * 10000.0 ** (-torch.arange(4) / 4)  # one radian, 10000^(-1/4), and so on
    turned = torch.complex(x[:, :4], x[:, 4:]) * torch.polar(torch.ones(12, 4), angle)
    rotated = vpd.rotate(x[None, None])[0, 0]
    torch.testing.assert_close(rotated, torch.cat([turned.real, turned.imag], -1), rtol=1e-5, atol=1e-5)

def test_importance_transformer_sees_both_directions_and_not_the_other_sequences():
    torch.manual_seed(0)
    shapes = {"a": (4, 3), "b": (6, 5)}
    G = vpd.ImportanceTransformer(shapes, vpd.Config(**TRANSFORMER, G_activations=False))
    inputs = {"a": torch.randn(2, 7, 4), "b": torch.randn(2, 7, 6)}
    before = G(inputs, {}, {})
    assert before.shape == (2, 7, 3 + 5)
    inputs["a"][0, 3] += 1
    after = G(inputs, {}, {})
    changed = (after - before)[..., 3:].abs().amax(-1) > 1e-6  # (2, 7), of b
    assert changed[0].all() and not changed[1].any()

def test_a_score_of_the_transformer_sees_the_size_of_its_own_activation_and_of_no_other():
    model, U, V, x, _ = make(dtype=torch.float32)
    G = vpd.ImportanceTransformer(shapes_of(V), vpd.Config(**TRANSFORMER))
    _, inputs = vpd.forward_with_inputs(model, C, x)
    before = G(inputs, U, V)  # the gains start at 0
    nn.init.normal_(G.gain)
    added = G(inputs, U, V) - before
    for n, a in enumerate(activations(inputs, U, V)):
        torch.testing.assert_close(added[..., n], G.gain[n] * a.abs(), rtol=1e-4, atol=1e-5)

# --- 4  the losses: those of a whole step are worked out in 6 ---

def test_kl_against_its_definition():
    torch.manual_seed(0)
    target, output = torch.randn(2, 3, 5, 7).unbind()
    p = target.softmax(-1)
    q = output.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    assert vpd.kl(target, output).item() == pytest.approx(expected.item(), rel=1e-5)

def explicit_relative_delta(model, U, V):
    ratios = []
    for path, n in C.items():
        W = model.get_submodule(path).weight
        delta = explicit_weight(W, U[path], V[path], torch.tensor([0.0] * n + [1.0]))
        ratios.append(delta.square().sum() / W.square().sum())
    return sum(ratios) / len(ratios)

# --- 5  Muon ---

def test_a_step_of_muon_has_the_singular_vectors_of_the_momentum_and_singular_values_near_one():
    """By an SVD in float64. Between 0.68 and 1.21: the least and largest value that five rounds of the quintic make of
    numbers between 1/400 and 1."""
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 20), (20, 8), (3, 70), (8, 20), (64, 256), (1, 5)]
    matrices = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    muon = vpd.Muon(matrices, lr=0.5)
    for number in (1, 2):
        before = [x.detach().clone() for x in matrices]
        for n, x in enumerate(matrices):
            x.grad = torch.randn(x.shape) * 10.0 ** (3 - n)
        gradients = [x.grad.clone() for x in matrices]
        muon.step()
        if number == 1:
            first_gradients = gradients
    for old, x, first, second in zip(before, matrices, first_gradients, gradients):
        momentum = 0.95 * 0.05 * first + 0.05 * second
        nesterov = 0.95 * momentum + 0.05 * second
        left, size, right = torch.linalg.svd(nesterov.double(), full_matrices=False)
        step = (old - x).detach() / (0.2 * 0.5 * max(x.shape) ** 0.5)
        turned = left.mT @ step.double() @ right.mT  # diagonal, if the singular vectors are the same
        torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0, atol=2e-3)
        large = size > size.norm() / 400
        assert large.sum() >= len(size) - 1 and turned.diagonal().min() >= 0
        assert turned.diagonal()[large].min() > 0.68 and turned.diagonal()[large].max() < 1.21

def test_muon_takes_finite_steps_for_gradients_of_lower_rank_and_none_for_zero():
    torch.manual_seed(0)
    low = torch.outer(torch.randn(6), torch.randn(9))
    step, none = vpd.orthogonalize(torch.stack([low, torch.zeros(6, 9)]))
    assert step.isfinite().all() and 0.68 < torch.linalg.matrix_norm(step, 2) < 1.21
    assert torch.linalg.matrix_rank(step, rtol=1e-3) == 1 and not none.any()

# --- 6  the start and the training step ---

def start(config, shape=(16,)):
    """A net and its training, on a batch of this shape."""
    torch.manual_seed(0)
    model = Net()
    x = torch.randn(*shape, 4)
    training = vpd.initialize(model, C, x, config)
    for U in training.decomposition.U.values():
        U.data += 0.1 * torch.randn_like(U)  # so that Delta is not 0
    return model, training, x

def to_float64(model, training, config):
    model.double()
    for decomposition in (training.decomposition, training.average):
        decomposition.G.double()
        for tensors in (decomposition.U, decomposition.V):
            for path in C:
                tensors[path] = tensors[path].detach().double().requires_grad_()
    training.sources = training.sources.detach().double()
    training.ascent = vpd.start_ascent(training.sources, config.adversary_lr)

@pytest.mark.parametrize("shape, settings, step, p, price", [
    ((16,), {"shrink": 2.0}, 45, 1.5, 3),  # halfway: p from 2 to 1, the price (a geometric mean) from 9 to 1
    ((4, 4), TRANSFORMER, 95, 1.0, 1),  # in the last tenth, which is averaged, both rest
])
def test_losses_gradients_and_ascents_of_a_step_are_as_worked_out_by_hand(shape, settings, step, p, price, monkeypatch):
    """In float64, with weights that are built position by position, as their definition says."""
    weights = {"w_importance": 0.3, "w_frequency": 0.1, "w_delta": 0.7, "p_end": 1.0, "price_start": 9.0}
    adversary = {"adversary_steps": 1, "adversary_lr": 0.3}
    config = vpd.Config(steps=100, average=0.1, clip_UV=math.inf, clip_G=math.inf, **weights, **adversary, **settings)
    model, training, x = start(config, shape)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # so that only rounding of float64 may differ
    to_float64(model, training, config)
    x = x.double()
    training.step = step
    found = training.decomposition
    leaves = [*found.U.values(), *found.V.values(), *found.G.parameters()]
    target, inputs = vpd.forward_with_inputs(model, C, x)
    z = found.G(inputs, found.U, found.V).flatten(0, -2)  # (16, 6 + 7)
    g = vpd.lower_leaky(z)
    def error(sources):
        r = sources.flatten(0, -2)  # (16, 6 + 1 + 7 + 1)
        first = g[:, :6] + (1 - g[:, :6]) * r[:, :6]
        last = g[:, 6:] + (1 - g[:, 6:]) * r[:, 7:14]
        masks = {"first": torch.cat([first, r[:, 6:7]], -1), "last": torch.cat([last, r[:, 14:]], -1)}
        return (explicit_output(model, found.U, found.V, masks, x) - target.flatten(0, -2)).square().mean()
    noise = torch.Generator().set_state(training.noise_generator.get_state())  # the step's own draws
    drawn = torch.rand(*shape, 15, generator=noise, dtype=torch.float64)
    if config.shrink:
        drawn *= torch.rand(*shape, 1, generator=noise, dtype=torch.float64) ** 2
    vpd.route(drawn, found.U, noise)
    # the adversary's Adam: its first step is lr along the sign of the gradient
    r = training.sources.detach().clone().requires_grad_()
    (uphill,) = torch.autograd.grad(0.5 * error(r), r, retain_graph=True)
    once = (r + 0.3 * uphill.sign()).clamp(0, 1).detach().requires_grad_()
    S = (vpd.upper_leaky(z) + 1e-12).pow(p).sum(0)
    losses = {
        "stochastic": error(drawn),
        "adversarial": error(once),
        "importance_minimality": S.sum() / 16,
        "frequency_minimality": (S * torch.log2(1 + S)).sum() / 16,
        "relative_delta": explicit_relative_delta(model, found.U, found.V),
    }
    factors = (0.5, 0.5, price * 0.3, price * 0.1, 0.7)
    total = sum(factor * loss for factor, loss in zip(factors, losses.values()))
    *expected, again = torch.autograd.grad(total, [*leaves, once])
    momentum = (0.25 * uphill + 0.5 * again) / 0.75
    square = (0.0099 * uphill**2 + 0.01 * again**2) / 0.0199
    twice = (once + 0.3 * momentum / (square.sqrt() + 1e-20)).clamp(0, 1)

    before = copy.deepcopy(model.state_dict())
    values = vpd.training_step(model, x, vpd.mse, training, config)
    for name, loss in losses.items():
        assert values[name] == pytest.approx(loss.item(), rel=1e-9), name
    torch.testing.assert_close([leaf.grad for leaf in leaves], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(training.sources.detach(), twice.detach(), rtol=1e-7, atol=1e-9)
    assert same(model.state_dict(), before)  # the target stays as it was
    assert all(parameter.grad is None for parameter in model.parameters())

@pytest.mark.parametrize("shape, settings", [((12,), {}), ((3, 5), {**TRANSFORMER, "G_activations": False})])
def test_in_bfloat16_losses_are_those_of_float32_and_delta_and_parameters_stay_in_float32(shape, settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 4), Net()).eval()
    batch = torch.randint(11, shape)
    values = {}
    for bf16 in (False, True):
        config = vpd.Config(bf16=bf16, **settings)
        training = vpd.initialize(model, {"1.first": 6, "1.last": 7}, batch, config)
        values[bf16] = vpd.training_step(model, batch, vpd.mse, training, config)
    assert values[True]["relative_delta"] == values[False]["relative_delta"]  # never in bfloat16
    assert values[True]["stochastic"] != values[False]["stochastic"]  # the forward passes are
    assert values[True] == pytest.approx(values[False], rel=0.1)
    found = training.decomposition
    for x in (*found.U.values(), *found.V.values(), *found.G.parameters()):
        assert x.dtype == x.grad.dtype == torch.float32

def test_weights_sources_data_and_noise_draw_from_streams_of_their_own():
    first = vpd.initialize(Net(), C, torch.zeros(50, 4), vpd.Config())
    streams = [first.sources.detach()]
    for generator in (first.data_generator, first.noise_generator, torch.Generator().manual_seed(0)):  # 0: of weights
        streams.append(torch.rand(50, 15, generator=generator))
    assert (torch.corrcoef(torch.stack(streams).flatten(1)) - torch.eye(4)).abs().max() < 0.15

@pytest.mark.parametrize("muon", [2.0, 0.0])
def test_u_and_v_step_by_orthogonal_matrices_with_muon_and_by_adamw_without(muon):
    config = vpd.Config(muon=muon, lr=1e-3, w_delta=0)  # else one direction is 400 times another
    model, training, x = start(config)
    UV = [*training.decomposition.U.values(), *training.decomposition.V.values()]
    before = [matrix.detach().clone() for matrix in UV]
    vpd.training_step(model, x, vpd.mse, training, config)
    for old, new in zip(before, UV):
        step = new.detach() - old
        if muon:  # all singular values near 0.2 lr sqrt(larger side): the RMS of a step of Adam
            size = torch.linalg.svdvals(step) / (0.2 * muon * config.lr * max(step.shape) ** 0.5)
            assert size.min() > 0.4 and size.max() < 1.4
        else:  # the first step of Adam is lr in every entry, less where the gradient is near eps
            expected = -config.lr * new.grad / (new.grad.abs() + 1e-8)
            torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-7)

@pytest.mark.parametrize("d_in, d_out, C", [(4, 6, 9), (6, 4, 9), (5, 5, 5), (6, 4, 3)])
def test_a_run_starts_with_unit_directions_that_add_up_to_the_weights(d_in, d_out, C):
    torch.manual_seed(0)
    W = torch.randn(d_out, d_in)
    U, V = vpd.split(W, C)
    total = sum(torch.outer(U[c], V[:, c]) for c in range(C))
    if C >= 4:
        torch.testing.assert_close(total, W)
    else:  # too few: what they add up to is a projection of W
        assert total.square().sum() + (W - total).square().sum() == pytest.approx(W.square().sum().item(), rel=1e-5)
    lengths = V.norm(dim=0) if d_in <= d_out else U.norm(dim=1)
    assert lengths.square().mean() == pytest.approx(1, rel=1e-5)

def test_the_result_is_the_average_of_the_last_steps(monkeypatch):
    """At first of all, then exponentially: over a tenth of 40 steps, each step counts a quarter."""
    config = vpd.Config(steps=40, average=0.1)
    step = vpd.training_step
    trained = []
    def recorded(model, batch, divergence, training, config):
        values = step(model, batch, divergence, training, config)
        trained.append(training.decomposition.U["first"].detach().clone())
        return values
    monkeypatch.setattr(vpd, "training_step", recorded)
    found = decompose_net(config=config)
    expected = trained[0]
    for n, U in enumerate(trained, 1):
        expected = expected + (U - expected) / min(n, 4)
    torch.testing.assert_close(found.U["first"].detach(), expected)
    assert not torch.allclose(expected, trained[-1])

def test_the_readmes_own_model_comes_out_as_it_says(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vpd, "fcntl", None)  # as on Windows
    code, promised, *_ = code_blocks("Your own model")
    torch.manual_seed(0)
    exec(code.replace('"runs/mine"', repr(str(tmp_path / "new"))), {})
    found = capsys.readouterr().out.splitlines()[-6:]
    for line, promised_line in zip(found, promised.splitlines(), strict=True):
        assert line.split()[0] == promised_line.split()[0] and line.endswith("good") and promised_line.endswith("good")
        if line.startswith("L0"):
            assert float(line.split()[1]) == pytest.approx(float(promised_line.split()[1]), rel=0.15)

# --- 8  evaluation ---

def random_decomposition(model, sizes, seed=0):
    torch.manual_seed(seed)
    U, V = random_parts(model, sizes)
    G = vpd.ImportanceMLPs(shapes_of(V), vpd.Config())
    nn.init.normal_(G.b_out)
    return vpd.Decomposition(U, V, G)

def test_evaluation_against_explicit_weights_and_counts():
    model, *_ = make(dtype=torch.float32)
    decomposition = random_decomposition(model, C, seed=1)
    x = torch.randn(16, 4)
    metrics = vpd.evaluate(model, decomposition, [x[:8], x[8:]], vpd.mse)
    _, importances = vpd.predict_importances(model, decomposition, x)
    g = {path: importances[path][:, :-1].double() for path in C}
    U = {path: u.double() for path, u in decomposition.U.items()}
    V = {path: v.double() for path, v in decomposition.V.items()}
    exact = copy.deepcopy(model).double()
    def divergence(rule):  # for masks rule(g), Delta excluded
        masks = {path: F.pad(rule(g[path]), (0, 1)) for path in C}
        return (explicit_output(exact, U, V, masks, x.double()) - exact(x.double())).square().mean().item()
    expected = {
        "unmasked": divergence(torch.ones_like),
        "rounded at 0": divergence(lambda g: (g > 0).double()),
        "rounded at 0.1": divergence(lambda g: (g > 0.1).double()),
        "rounded at 0.5": divergence(lambda g: (g > 0.5).double()),
        "g as masks": divergence(lambda g: g),
        "ablated": divergence(torch.zeros_like),
    }
    for name, value in expected.items():
        assert metrics["figures"][f"divergence, {name}"] == pytest.approx(value, rel=1e-4), name
    assert len({round(value, 9) for value in expected.values()}) == 6  # they really differ here
    first = (x[:8], *vpd.predict_importances(model, decomposition, x[:8]))  # a quarter of two batches is one
    assert metrics["attack"] == pytest.approx(vpd.fresh_adversary(model, decomposition, [first], vpd.mse))
    for path, matrix in metrics["matrices"].items():
        mean = [sum(column) / 16 for column in g[path].T.tolist()]
        assert matrix["mean_importance"] == pytest.approx(mean, abs=1e-6)
        assert matrix["alive"] == sum(x > 1e-6 for x in mean)
        values = g[path].flatten().tolist()
        assert matrix["L0"] == pytest.approx(sum(x > 0 for x in values) / 16)
        assert matrix["L0 above 0.1"] == pytest.approx(sum(x > 0.1 for x in values) / 16)

@pytest.mark.parametrize("seed", range(5))
def test_the_fresh_adversary_beats_chance_and_never_the_worst_corner(seed):
    """One linear layer: the squared error is convex in the sources, its maximum over [0, 1]^6 at one of 64 corners."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    decomposition = random_decomposition(model, {"0": 5}, seed)
    x = torch.randn(32, 4)
    target = model(x).detach()
    g = F.pad(0.3 * torch.rand(32, 5), (0, 1))  # low: the sources have much to say
    def loss(r):
        output = vpd.masked_forward(model, decomposition.U, decomposition.V, {"0": g + (1 - g) * r}, x)
        return (output - target).square().mean().item()
    corners = [loss(torch.tensor(corner)) for corner in itertools.product([0.0, 1.0], repeat=6)]
    chance = sorted(loss(torch.rand(6)) for _ in range(100))
    halves = [(x[:16], target[:16], {"0": g[:16]}), (x[16:], target[16:], {"0": g[16:]})]
    attack = vpd.fresh_adversary(model, decomposition, halves, vpd.mse, seed=seed)
    assert len(attack) == 81 and attack == sorted(attack)  # the largest so far
    assert chance[90] < attack[-1] <= max(corners) * (1 + 1e-5)  # better than nine in ten by chance
    nothing = torch.zeros(32, 6, dtype=torch.bool)  # what may not be moved stays as it was
    still = vpd.fresh_adversary(model, decomposition, [(x, target, {"0": g})], vpd.mse, (32,), nothing, seed)
    assert len(set(still)) == 1 and still[0] < attack[-1]
