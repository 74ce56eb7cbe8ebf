"""The method: each test is a claim about VPD, checked against something independent of vpd.py."""

import copy
import dataclasses
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vpd

class Net(nn.Module):
    """Two linear layers, one with a bias, a nonlinearity in between; any input shape (..., 4) -> (..., 3)."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.last = nn.Linear(5, 3, bias=False)

    def forward(self, x):
        return self.last(F.gelu(self.first(x)))

C = {"first": 6, "last": 7}

def make(seed=0, dtype=torch.float64, shape=(2, 3)):
    """A net, U, V, a batch of `shape` positions, and masks for it."""
    torch.manual_seed(seed)
    model = Net().to(dtype).eval()
    sizes = {path: model.get_submodule(path).weight.shape for path in C}
    U = {path: torch.randn(C[path], d_out, dtype=dtype) for path, (d_out, _) in sizes.items()}
    V = {path: torch.randn(d_in, C[path], dtype=dtype) for path, (_, d_in) in sizes.items()}
    masks = {path: torch.rand(*shape, C[path] + 1, dtype=dtype) for path in C}
    return model, U, V, torch.randn(*shape, 4, dtype=dtype), masks

def explicit_weight(W, U, V, m):
    """W'(m) of one position, term by term from the definition."""
    delta = W - sum(torch.outer(U[c], V[:, c]) for c in range(len(U)))
    return sum(m[c] * torch.outer(U[c], V[:, c]) for c in range(len(U))) + m[-1] * delta

def explicit_output(model, U, V, masks, x, position):
    """The net at one position, with its own weights built for it."""
    weights = {p: explicit_weight(model.get_submodule(p).weight, U[p], V[p], masks[p][position]) for p in C}
    return weights["last"] @ F.gelu(weights["first"] @ x[position] + model.first.bias)

# --- 1  the masked forward pass ---

@pytest.mark.parametrize("routed", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("delta", ["0", "1", "between"])
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_masked_forward_is_the_forward_with_the_explicit_weights(routed, delta, shape):
    model, U, V, x, masks = make(shape=shape)
    for path, on in zip(C, routed):
        if delta != "between":
            masks[path][..., -1] = float(delta)
        if not on:
            masks[path] = torch.ones_like(masks[path])
    output = vpd.masked_forward(model, U, V, masks, x)
    for position in itertools.product(*map(range, shape)):
        torch.testing.assert_close(output[position], explicit_output(model, U, V, masks, x, position), rtol=1e-12, atol=1e-12)

def test_masks_of_one_give_the_target_to_the_last_bit():
    model, U, V, x, masks = make(dtype=torch.float32)
    ones = {path: torch.ones_like(m) for path, m in masks.items()}
    assert torch.equal(vpd.masked_forward(model, U, V, ones, x), model(x))

def test_a_masked_pass_leaves_no_trace_even_if_it_raises():
    model, U, V, x, masks = make(dtype=torch.float32)
    before, weights = model(x), copy.deepcopy(model.state_dict())
    vpd.masked_forward(model, U, V, masks, x)
    for broken in ({**masks, "last": masks["last"][..., :-2]}, {**masks, "nowhere": masks["last"]}):
        with pytest.raises(Exception):
            vpd.masked_forward(model, U, V, broken, x)
    assert torch.equal(model(x), before)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), model.state_dict().values()))
    assert not any(module._forward_hooks for module in model.modules())

# --- 3  leaky hard sigmoids and masks ---

GRID = [-3.0, -1e-3, 0.0, 1e-3, 0.5, 0.999, 1.001, 4.0]

@pytest.mark.parametrize("incoming", [-2.0, 3.0])
def test_lower_leaky_gradient(incoming):
    z = torch.tensor(GRID, dtype=torch.float64, requires_grad=True)
    g = vpd.lower_leaky(z)
    assert g.tolist() == [min(max(x, 0), 1) for x in GRID]
    g.backward(torch.full_like(g, incoming))
    leak = 0.01 * incoming if incoming < 0 else 0.0  # only where descent would raise g
    assert z.grad.tolist() == [leak if x <= 0 else incoming if x <= 1 else 0.0 for x in GRID]

def test_upper_leaky_value_and_gradient():
    z = torch.tensor(GRID, dtype=torch.float64, requires_grad=True)
    g = vpd.upper_leaky(z)
    torch.testing.assert_close(g.detach(), torch.tensor([0.0 if x < 0 else x if x <= 1 else 1 + 0.01 * (x - 1) for x in GRID], dtype=z.dtype))
    h = 1e-6
    inner = [i for i, x in enumerate(GRID) if x != 0]  # finite differences, away from the kink at 0
    slope = (vpd.upper_leaky(z.detach() + h) - vpd.upper_leaky(z.detach() - h)) / (2 * h)
    g.sum().backward()
    torch.testing.assert_close(z.grad[inner], slope[inner], rtol=1e-6, atol=1e-9)

def test_importance_one_pins_a_mask_and_delta_is_always_free():
    U = {"a": torch.zeros(3, 1), "b": torch.zeros(1, 1)}
    z = torch.tensor([[5.0, -5.0, 0.25, 1.0]])
    r = torch.tensor([[0.1, 0.2, 0.5, 0.7, 0.3, 0.6]])  # the 0.7 and the 0.6 are Delta's
    masks = vpd.by_path(vpd.make_masks(vpd.causal_importances(z, U), r), U)
    torch.testing.assert_close(masks["a"], torch.tensor([[1.0, 0.2, 0.625, 0.7]]))
    torch.testing.assert_close(masks["b"], torch.tensor([[1.0, 0.6]]))
    assert torch.equal(vpd.side_by_side(masks)[0, :3], masks["a"][0, :3])

# --- 3  causal importance functions ---

def test_each_importance_mlp_is_its_own_mlp_on_its_own_activation():
    model, U, V, x, _ = make(dtype=torch.float32, shape=(2, 3))
    G = vpd.ImportanceMLPs({p: (V[p].shape[0], C[p]) for p in C}, vpd.Config())
    torch.nn.init.normal_(G.b_in), torch.nn.init.normal_(G.b_out)
    _, inputs = vpd.forward_with_inputs(model, C, x)
    z = dict(zip(C, G(inputs, U, V).split(list(C.values()), -1)))
    index = 0
    for path in C:
        for c in range(C[path]):
            a = (inputs[path] @ V[path][:, c]) * U[path][c].norm()  # ||U_c|| V_c^T x, (2, 3)
            hidden = F.gelu(a[..., None] * G.w_in[index, 0].abs() + G.b_in[index, 0])
            torch.testing.assert_close(z[path][..., c], 4 * hidden @ G.w_out[index, :, 0].abs() + G.b_out[index, 0, 0], rtol=1e-4, atol=1e-5)
            index += 1

def test_rotary_embedding_makes_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    rotated_q, rotated_k = (vpd.rotate(x.expand(1, 1, 12, 8)) for x in (q, k))
    scores = (rotated_q @ rotated_k.mT)[0, 0]  # (12, 12)
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)  # float32 angles
    # the first pair of planes turns by one radian per position, the second by 10000^(-1/4), and so on
    angle = 10000.0 ** (-torch.arange(4) / 4.0).double()
    complex_q, complex_k = torch.complex(q[:4], q[4:]), torch.complex(k[:4], k[4:])
    expected = (complex_q.conj() * complex_k * torch.polar(torch.ones(4).double(), 3 * angle)).real.sum()
    torch.testing.assert_close(scores[2, 5], expected, rtol=1e-5, atol=1e-5)

def test_importance_transformer_sees_both_directions_and_not_the_other_sequences():
    torch.manual_seed(0)
    shapes = {"a": (4, 3), "b": (6, 5)}
    G = vpd.ImportanceTransformer(shapes, vpd.Config(G_width=16, G_blocks=1, G_heads=2, G_activations=False))
    inputs = {p: torch.randn(2, 7, d) for p, (d, _) in shapes.items()}
    before = G(inputs, {}, {})
    assert before.shape == (2, 7, 3 + 5)
    inputs["a"][0, 3] += 1
    changed = (G(inputs, {}, {}) - before)[..., 3:].abs().amax(-1) > 1e-6  # (2, 7), of b
    assert changed[0].all() and not changed[1].any()
    scaled = G({p: 100 * x for p, x in inputs.items()}, {}, {})
    torch.testing.assert_close(scaled, G(inputs, {}, {}), rtol=1e-3, atol=1e-3)  # inputs are RMS-normalised

def test_a_score_of_the_transformer_sees_the_size_of_its_own_activation_and_of_no_other():
    model, U, V, x, _ = make(dtype=torch.float32, shape=(2, 3))
    shapes = {p: (V[p].shape[0], C[p]) for p in C}
    G = vpd.ImportanceTransformer(shapes, vpd.Config(G_width=16, G_blocks=1, G_heads=2))
    _, inputs = vpd.forward_with_inputs(model, C, x)
    before = G(inputs, U, V)  # the gains start at 0
    torch.nn.init.normal_(G.gain)
    added, column = G(inputs, U, V) - before, 0
    for path in C:
        for c in range(C[path]):
            a = (inputs[path] @ V[path][:, c]) * U[path][c].norm()  # (2, 3)
            torch.testing.assert_close(added[..., column], G.gain[column] * a.abs(), rtol=1e-4, atol=1e-5)
            column += 1

# --- 4  the five losses ---

def test_divergences_against_their_definitions():
    torch.manual_seed(0)
    target, output = torch.randn(2, 3, 5, 7, dtype=torch.float64).unbind()
    p, q = target.softmax(-1), output.softmax(-1)
    torch.testing.assert_close(vpd.kl(target, output).double(), (p * (p / q).log()).sum(-1).mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vpd.mse(target, output).double(), ((target - output) ** 2).mean(), rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize("p", [2.0, 1.0, 0.4])
def test_minimality_losses_against_their_definitions_and_over_a_split_batch(p):
    torch.manual_seed(0)
    z = torch.cat([torch.randn(4, 3, 5) + 0.3, torch.randn(4, 3, 2)], -1)
    S, positions = vpd.usage(z, p)
    importance = frequency = 0.0
    for c in range(7):
        g = [max(min(x, 1.0), 0.0) + 0.01 * max(x - 1, 0.0) for x in z[..., c].double().flatten().tolist()]
        used = sum(x**p for x in g)
        importance += used / 12
        frequency += used * math.log2(1 + used) / 12
    assert vpd.importance_minimality(S, positions).item() == pytest.approx(importance, rel=1e-3)
    assert vpd.frequency_minimality(S, positions).item() == pytest.approx(frequency, rel=1e-3)

    parts = [vpd.usage(z[half], p) for half in (slice(0, 1), slice(1, 4))]
    S_parts, positions_parts = parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]
    for loss in (vpd.importance_minimality, vpd.frequency_minimality):
        torch.testing.assert_close(loss(S_parts, positions_parts), loss(S, positions))
        assert loss(*parts[0]) + loss(*parts[1]) != pytest.approx(2 * loss(S, positions).item(), rel=1e-3)

def test_minimality_gradient_is_finite_where_importances_are_zero():
    z = torch.tensor([[0.0, -1.0, 1e-38, 0.5]], requires_grad=True)
    S, positions = vpd.usage(z, 0.4)
    vpd.frequency_minimality(S, positions).backward()
    assert z.grad.isfinite().all() and z.grad[0, 1] == 0 and z.grad[0, 3] > 0

def test_delta_l2_against_the_definition():
    model, U, V, *_ = make()
    total = sum((explicit_weight(model.get_submodule(p).weight, U[p], V[p], torch.tensor([0.0] * C[p] + [1.0])) ** 2).sum() for p in C)
    assert vpd.delta_l2(model, U, V).item() == pytest.approx((total / (20 + 15)).item(), rel=1e-5)

def test_routing_draws_a_uniform_number_of_uniformly_chosen_matrices():
    L, n = 3, 60_000
    U, sources = {str(l): torch.zeros(1, 1) for l in range(L)}, torch.zeros(n, 2 * L)
    vpd.route(sources, U, torch.Generator().manual_seed(0))
    routed = sources[:, ::2] == 0  # (n, L)
    assert torch.equal(sources[:, ::2], sources[:, 1::2])  # Delta's column is routed with the others
    assert torch.equal(vpd.make_masks(torch.rand(n, 2 * L), sources)[sources == 1], torch.ones(int((sources == 1).sum())))
    counts = {}
    for subset in map(tuple, routed.int().tolist()):
        counts[subset] = counts.get(subset, 0) + 1
    for subset in itertools.product([0, 1], repeat=L):
        k = sum(subset)
        expected = n / L / math.comb(L, k) if k else 0  # k ~ Uniform{1..L}, then any of the subsets of size k
        assert abs(counts.get(subset, 0) - expected) <= 5 * math.sqrt(expected), subset

# --- 5, 6  the adversary and the training step ---

def start(config, seed=0, shape=(16,)):
    """A net and a training at step 0, float32."""
    torch.manual_seed(seed)
    model = Net().eval()
    x = torch.randn(*shape, 4)
    vpd.check_target(model, C, x, config)
    training = vpd.initialize(model, C, x, config)
    vpd.fit_weights(model, training.decomposition, config)
    return model, training, x

@pytest.mark.parametrize("shrink", [0.0, 1.0, 2.0])
def test_all_random_sources_of_a_position_shrink_together_and_matrices_left_out_stay_whole(shrink, monkeypatch):
    n, positions, seen = 200, 20_000, []
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    U, V = ({path: torch.ones(shape) for path in "01"} for shape in ((n, 1), (1, n)))
    monkeypatch.setattr(vpd, "make_masks", lambda g, sources: seen.append(sources) or sources)
    x, g = torch.ones(positions, 1), torch.zeros(positions, 2 * (n + 1))
    vpd.stochastic_reconstruction(model, U, V, g, x, x, vpd.mse, torch.Generator().manual_seed(0), shrink)
    left_out = torch.stack([(r == 1).all(-1) for r in vpd.by_path(seen[0], U).values()], -1)  # (positions, 2)
    assert left_out.sum(-1).max() == 1 and left_out.any(-1).float().mean().item() == pytest.approx(0.5, abs=0.02)
    first, second = (r[~left_out.any(-1)] for r in vpd.by_path(seen[0], U).values())
    assert (first.mean(-1) / second.mean(-1) - 1).abs().mean() < 0.1  # one u for both
    mean_square = (1 / 4 + 1 / (12 * n)) / (1 + 2 * shrink)  # E (u^s)^2 E mean(r)^2
    assert first[:, :-1].mean(-1).square().mean().item() == pytest.approx(mean_square, rel=0.05)
    assert second[:, -1].mean().item() == pytest.approx(1 / (2 * (1 + shrink)), rel=0.05)  # Delta's, too

def test_the_adversary_ascends_and_its_sources_stay_between_0_and_1():
    config = vpd.Config(G_type="mlp", adversary_lr=0.05)
    model, training, x = start(config)
    U, V = training.decomposition.U, training.decomposition.V
    target, g = vpd.predict_importances(model, training.decomposition, x)
    g, sources = vpd.side_by_side(g), training.sources
    found = []
    for _ in range(60):
        loss = vpd.adversarial_reconstruction(model, U, V, g, x, target, vpd.mse, sources)
        found.append(loss.item())
        vpd.ascend(training.ascent, sources, *torch.autograd.grad(loss, sources))
        assert ((sources >= 0) & (sources <= 1)).all()
    random = [
        vpd.adversarial_reconstruction(model, U, V, g, x, target, vpd.mse, torch.rand_like(sources)).item()
        for _ in range(50)
    ]
    assert found[-1] > found[0] and found[-1] > max(random)
    assert (sources == 1).any() and (sources == 0).any()  # the clamp was needed

def test_the_gradients_of_a_step_are_those_of_the_total_worked_out_by_hand(monkeypatch):
    """In float64, with weights that are built position by position, as their definition says."""
    config = vpd.Config(G_type="mlp", adversary_steps=0, w_importance=0.3, w_frequency=0.1, w_delta=0.7, clip_UV=1e9, clip_G=1e9, p_start=1.5, price_start=3.0, shrink=2.0)
    model, training, x = start(config)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # so that only rounding of float64 may differ
    model, x, decomposition = model.double(), x.double(), training.decomposition
    decomposition.U, decomposition.V = ({p: t.detach().double().requires_grad_() for p, t in d.items()} for d in (decomposition.U, decomposition.V))
    decomposition.G, training.sources = decomposition.G.double(), training.sources.detach().double()
    training.ascent = vpd.start_ascent(training.sources, config.adversary_lr)
    noise = torch.Generator().set_state(training.noise_generator.get_state())  # the step's own draws
    copied = copy.deepcopy((decomposition, training.sources))
    U, V, G, r = copied[0].U, copied[0].V, copied[0].G, copied[1]

    target, inputs = vpd.forward_with_inputs(model, C, x)
    z = G(inputs, U, V)
    g, charge = vpd.lower_leaky(z), vpd.upper_leaky(z)
    drawn = torch.rand(16, 15, generator=noise, dtype=torch.float64) * torch.rand(16, 1, generator=noise, dtype=torch.float64) ** 2
    vpd.route(drawn, U, noise)

    def error(sources):
        masks, column = {}, 0
        for path, n in C.items():
            own = g[:, column : column + n]
            r_c, r_delta = vpd.by_path(sources, U)[path].split([n, 1], -1)
            masks[path], column = torch.cat([own + (1 - own) * r_c, r_delta], -1), column + n
        outputs = torch.stack([explicit_output(model, U, V, masks, x, i) for i in range(16)])
        return (outputs - target).square().mean()

    S = (charge + 1e-12).pow(1.5).sum(0)
    minimality = 0.3 * S.sum() / 16 + 0.1 * (S * torch.log2(1 + S)).sum() / 16
    deltas = [model.get_submodule(p).weight - sum(torch.outer(U[p][c], V[p][:, c]) for c in range(C[p])) for p in C]
    delta = sum(d.square().sum() for d in deltas) / sum(d.numel() for d in deltas)
    adversarial = error(r)
    total = 0.5 * error(drawn) + 0.5 * adversarial + 3 * minimality + 0.7 * delta  # 3: price_start, at the first step
    expected = torch.autograd.grad(total, [*U.values(), *V.values(), *G.parameters()], retain_graph=True)
    (uphill,) = torch.autograd.grad(0.5 * adversarial, r)

    gradients, ascend = [], vpd.ascend
    monkeypatch.setattr(vpd, "ascend", lambda ascent, sources, gradient: gradients.append(gradient.clone()) or ascend(ascent, sources, gradient))
    vpd.training_step(model, x, vpd.mse, training, config)
    actual = [*decomposition.U.values(), *decomposition.V.values(), *decomposition.G.parameters()]
    for e, leaf in zip(expected, actual):
        torch.testing.assert_close(leaf.grad, e, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients, [uphill], rtol=1e-9, atol=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())  # the target gets none

def test_under_autocast_scores_are_float32_masks_lie_between_0_and_1_and_evaluation_has_the_precision_of_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 4), Net()).eval()
    sizes, batch = {"1.first": 6, "1.last": 7}, torch.randint(11, (3, 5))
    for G_type in ("transformer", "mlp"):
        config = vpd.Config(G_type=G_type, G_width=16, G_blocks=1, G_heads=2, bf16=True)
        decomposition = vpd.initialize(model, sizes, batch, config).decomposition
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            _, inputs = vpd.forward_with_inputs(model, sizes, batch)
            z = decomposition.G(inputs, decomposition.U, decomposition.V)
            g = vpd.causal_importances(z, decomposition.U)
            masks = vpd.make_masks(g, torch.rand_like(g))
        assert z.dtype == g.dtype == masks.dtype == torch.float32
        assert masks.min() >= 0 and masks.max() <= 1
        if G_type == "transformer":  # more than bfloat16's 8 bits: the last product is of float32, too
            assert not torch.equal(z, z.bfloat16().float())
        g = vpd.by_path(g, decomposition.U)
        trained = vpd.predict_importances(model, decomposition, batch)[1]
        other = vpd.predict_importances(model, dataclasses.replace(decomposition, bf16=False), batch)[1]
        assert all(torch.equal(trained[path], g[path]) for path in g)
        assert any(not torch.equal(other[path], g[path]) for path in g)

def test_a_start_leaves_all_random_states_as_they_were(monkeypatch):
    def never(seed):
        raise AssertionError("torch.manual_seed reseeds the generators of all devices")

    model = Net().eval()
    before = torch.get_rng_state()
    monkeypatch.setattr(torch, "manual_seed", never)
    vpd.initialize(model, C, torch.zeros(2, 4), vpd.Config())
    assert torch.equal(torch.get_rng_state(), before)

def test_weights_sources_data_and_noise_draw_from_streams_of_their_own():
    model, x = Net().eval(), torch.zeros(50, 4)
    training = vpd.initialize(model, C, x, vpd.Config())
    streams = [torch.rand(50, 15, generator=generator) for generator in (training.data_generator, training.noise_generator)]
    streams += [training.sources.detach(), torch.rand(50, 15, generator=torch.Generator().manual_seed(0))]  # 0: of weights
    for one, other in itertools.combinations(streams, 2):
        assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 0.15
    second = vpd.initialize(model, C, x, vpd.Config(), process=1)
    assert torch.equal(second.decomposition.U["first"], training.decomposition.U["first"])
    assert not torch.equal(second.sources, training.sources) and second.noise_generator.initial_seed() != training.noise_generator.initial_seed()

def test_u_and_v_step_by_orthogonal_matrices_with_muon_and_by_adamw_without():
    for muon in (2.0, 0.0):
        config = vpd.Config(muon=muon, lr=1e-3, faithfulness_steps=0, steps=100)
        model, training, x = start(config)
        U, V = ({p: t.detach().clone() for p, t in d.items()} for d in (training.decomposition.U, training.decomposition.V))
        vpd.training_step(model, x, vpd.mse, training, config)
        for before, after in ((U, training.decomposition.U), (V, training.decomposition.V)):
            for path in C:
                step = after[path].detach() - before[path]
                if muon:  # all singular values near 0.2 lr sqrt(larger side): the RMS of a step of Adam
                    size = torch.linalg.svdvals(step) / (0.2 * muon * config.lr * max(step.shape) ** 0.5)
                    assert size.min() > 0.4 and size.max() < 1.4
                else:  # the first step of Adam is lr in every entry
                    torch.testing.assert_close(step.abs(), torch.full_like(step, config.lr), rtol=1e-2, atol=1e-7)

def muon_step(gradients, steps=1, lr=0.5):
    """What Muon adds to matrices of zeros for these gradients, divided by its lr and by 0.2 sqrt(the longer side)."""
    matrices = [torch.zeros_like(x).requires_grad_() for x in gradients]
    muon = vpd.Muon(matrices, lr)
    for _ in range(steps):
        for x, gradient in zip(matrices, gradients):
            x.grad = gradient.clone()
        muon.step()
    return [-x.detach() / (0.2 * lr * max(x.shape) ** 0.5) for x in matrices]

def test_a_step_of_muon_has_the_singular_vectors_of_the_gradient_and_singular_values_near_one():
    """By an SVD in float64. Between 0.68 and 1.21: the least and largest value that five rounds of the quintic make of
    numbers between 1/400 and 1."""
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 20), (20, 8), (3, 70), (8, 20), (64, 256), (1, 5)]
    gradients = [torch.randn(shape) * 10.0 ** (3 - n) for n, shape in enumerate(shapes)]
    for gradient, step in zip(gradients, muon_step(gradients)):
        left, size, right = torch.linalg.svd(gradient.double(), full_matrices=False)
        turned = left.mT @ step.double() @ right.mT  # diagonal, if the singular vectors are the same
        torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0, atol=2e-3)
        large = size > size.norm() / 400
        assert large.sum() >= len(size) - 1 and turned.diagonal().min() >= 0
        assert turned.diagonal()[large].min() > 0.68 and turned.diagonal()[large].max() < 1.21

@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
def test_steps_of_muon_are_those_of_torch_up_to_the_rounding_of_bfloat16():
    torch.manual_seed(0)
    gradients = [torch.randn(shape) for shape in ((16, 16), (16, 40), (40, 16), (16, 40))]
    for x, ours in zip(gradients, muon_step(gradients, steps=3)):
        matrix = torch.zeros_like(x).requires_grad_()
        theirs = torch.optim.Muon([matrix], 1.0, weight_decay=0, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            matrix.grad = x.clone()
            theirs.step()
        expected = -matrix.detach() / (0.2 * max(x.shape) ** 0.5)
        assert (ours - expected).norm() < 0.02 * expected.norm()  # bfloat16 rounds by up to 1 / 256

def test_muon_takes_finite_steps_for_gradients_of_lower_rank_and_none_for_zero():
    torch.manual_seed(0)
    low = torch.outer(torch.randn(6), torch.randn(9))
    step, none = muon_step([low, torch.zeros(6, 9)])
    assert step.isfinite().all() and 0.68 < torch.linalg.matrix_norm(step, 2) < 1.21
    assert torch.linalg.matrix_rank(step, rtol=1e-3) == 1 and not none.any()

def test_a_training_step_never_changes_the_target():
    config = vpd.Config(G_type="mlp")
    model, training, x = start(config)
    weights, before = copy.deepcopy(model.state_dict()), model(x)
    for _ in range(3):
        vpd.training_step(model, x, vpd.mse, training, config)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), model.state_dict().values()))
    assert torch.equal(model(x), before)

def test_the_warmup_fits_the_weights_with_u_and_v_alone():
    model, training, x = start(vpd.Config(G_type="mlp", faithfulness_steps=0))
    _, warm, _ = start(vpd.Config(G_type="mlp"))
    before, after = (vpd.delta_l2(model, t.decomposition.U, t.decomposition.V).item() for t in (training, warm))
    assert after < before / 5
    G, warm_G = training.decomposition.G.state_dict(), warm.decomposition.G.state_dict()
    assert all(torch.equal(G[key], warm_G[key]) for key in G)

def test_a_sequence_model_goes_through_the_same_decompose():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 4), Net()).eval()
    paths = {"1.first": 6, "1.last": 7}
    config = vpd.Config(steps=4, G_width=16, G_blocks=1, G_heads=2, w_importance=1e-2)
    decomposition = vpd.decompose(model, paths, lambda generator: torch.randint(11, (3, 5), generator=generator), vpd.kl, config)
    metrics = vpd.evaluate(model, decomposition, [torch.randint(11, (3, 5))], vpd.kl)
    assert metrics["figures"]["C"] == 13 and metrics["figures"]["evaluated positions"] == 15
    assert all(name in vpd.table(metrics) for name in (*metrics["figures"], *paths))

def test_the_readmes_own_model_comes_out_as_it_says(tmp_path, capsys):
    readme = (Path(vpd.__file__).parent / "README.md").read_text()
    code, printed = re.search(r"## Your own model.*?```python\n(.*?)```.*?```\n(.*?)```", readme, re.S).groups()
    torch.manual_seed(0)
    exec(code.replace('"runs/mine"', repr(str(tmp_path))), {})
    found = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    promised = dict(line.rsplit(maxsplit=1) for line in printed.splitlines())
    assert float(found["L0"]) == pytest.approx(float(promised["L0"]), rel=0.15)
    for name in ("divergence, unmasked", "divergence, rounded at 0", "fresh adversary, 80 steps"):
        assert float(found[name]) < 0.01 * float(promised["divergence, ablated"])

# --- 8  evaluation ---

def small_decomposition(model, sizes, seed=0):
    torch.manual_seed(seed)
    shapes = {p: model.get_submodule(p).weight.shape for p in sizes}
    U = {p: torch.randn(sizes[p], d_out) for p, (d_out, _) in shapes.items()}
    V = {p: torch.randn(d_in, sizes[p]) for p, (_, d_in) in shapes.items()}
    G = vpd.ImportanceMLPs({p: (V[p].shape[0], sizes[p]) for p in sizes}, vpd.Config())
    torch.nn.init.normal_(G.b_out)
    return vpd.Decomposition(U, V, G)

def test_evaluation_batches_of_unequal_shape_are_refused():
    model = Net().eval()
    with pytest.raises(vpd.BadInput, match="evaluation batches differ in shape"):
        vpd.evaluate(model, small_decomposition(model, C), [torch.randn(8, 4), torch.randn(7, 4)], vpd.mse)

def test_evaluation_against_explicit_weights_and_counts():
    torch.manual_seed(1)
    model = Net().eval()
    decomposition = small_decomposition(model, C)
    batches = [torch.randn(8, 4), torch.randn(8, 4)]
    metrics = vpd.evaluate(model, decomposition, batches, vpd.mse)
    g = {p: torch.cat([vpd.predict_importances(model, decomposition, x)[1][p] for x in batches]) for p in C}  # (16, C + 1)
    x = torch.cat(batches)

    def divergence(f):  # of the masks f(g), Delta excluded
        masks = {p: torch.cat([f(g[p][:, :-1]), torch.zeros(16, 1)], -1).double() for p in C}
        exact, U, V = copy.deepcopy(model).double(), *({p: t.double() for p, t in d.items()} for d in (decomposition.U, decomposition.V))
        output = torch.stack([explicit_output(exact, U, V, masks, x.double(), i) for i in range(16)])
        return (output - exact(x.double())).square().mean().item()

    expected = {"unmasked": torch.ones_like, "rounded at 0": lambda a: (a > 0).float(), "rounded at 0.1": lambda a: (a > 0.1).float()}
    expected |= {"rounded at 0.5": lambda a: (a > 0.5).float(), "g as masks": lambda a: a, "ablated": torch.zeros_like}
    for name, masking in expected.items():
        assert metrics["figures"][f"divergence, {name}"] == pytest.approx(divergence(masking), rel=1e-4), name
    assert len({round(metrics["figures"][f"divergence, {name}"], 9) for name in expected}) == 6  # they really differ here
    for p in C:
        matrix = metrics["matrices"][p]
        assert matrix["mean_importance"] == pytest.approx(g[p][:, :-1].mean(0).tolist(), abs=1e-6)
        assert matrix["alive"] == sum(mean > 1e-6 for mean in g[p][:, :-1].mean(0).tolist())
        for threshold, key in ((0, "L0"), (0.1, "L0 above 0.1")):
            assert matrix[key] == pytest.approx(sum(v > threshold for row in g[p][:, :-1].tolist() for v in row) / 16)

def test_the_fresh_adversary_beats_chance_and_never_the_worst_corner():
    # One linear layer: the squared error is convex in the sources, so that its maximum over [0, 1]^6 is at one of 64 corners.
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 3)).eval()
        decomposition = small_decomposition(model, {"0": 5}, seed)
        x = torch.randn(32, 4)
        target, U, V = model(x).detach(), decomposition.U, decomposition.V
        g = torch.cat([0.3 * torch.rand(32, 5), torch.zeros(32, 1)], -1)  # low: the sources have much to say

        def loss(r):
            return vpd.adversarial_reconstruction(model, U, V, g, x, target, vpd.mse, r).item()

        corners = [loss(torch.tensor(corner)) for corner in itertools.product([0.0, 1.0], repeat=6)]
        cases = [(x[half], target[half], {"0": g[half]}) for half in (slice(0, 16), slice(16, 32))]
        attack = vpd.fresh_adversary(model, decomposition, cases, vpd.mse, seed=seed)
        assert len(attack) == 81 and max(attack) <= max(corners) * (1 + 1e-5)
        assert max(attack) > sorted(loss(torch.rand(6)) for _ in range(100))[90]  # better than nine in ten by chance
        nothing = torch.zeros(32, 6, dtype=torch.bool)  # what may not be moved stays as it was
        still = vpd.fresh_adversary(model, decomposition, [(x, target, {"0": g})], vpd.mse, (32,), nothing, seed)
        assert len(set(still)) == 1 and still[0] < max(attack)
        short = vpd.fresh_adversary(model, decomposition, cases, vpd.mse, seed=seed, steps=3, size=0.02)
        assert len(short) == 4 and short[0] == attack[0] and short[1] != attack[1]
        assert attack == sorted(attack)  # the largest so far
