"""Reading a decomposition: attributions, graphs and pruning, against finite differences and planted circuits."""

import functools

import pytest
import torch
from torch import nn

import train_gpt2 as gpt
import vpd

EMBEDDINGS = ("tokens", "positions")
MATRICES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")

class Silent(nn.Module):
    """A causal importance function that is never asked."""

def small(seed=0, linear=False):
    """A random GPT in float64, a random decomposition of all its matrices, importances (some 0) and a prompt."""
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.Shape(layers=2, width=8, heads=2, context=5, vocabulary=7)).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    U, V, g = {}, {}, {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            d_out, d_in = module.weight.shape
            U[path], V[path] = torch.randn(6, d_out).double(), torch.randn(d_in, 6).double() / d_in**0.5
            g[path] = (torch.rand(1, 5, 7) * (torch.rand(1, 5, 7) < 0.6)).double()
            g[path][..., -1] = 0
    return model, vpd.Decomposition(U, V, Silent()), g, torch.randint(7, (1, 5))

def frozen_forward(model, writes, batch):
    """The inputs of all matrices, and the output, when every matrix and embedding writes what is given."""
    inputs, handles = {}, []
    for path, write in writes.items():

        def hook(module, args, output, path=path, write=write):
            inputs[path] = args[0]
            return write

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    output = model(batch)
    [handle.remove() for handle in handles]
    return inputs, output

def test_an_edge_is_the_change_of_its_target_per_change_of_its_sources_write_with_all_else_frozen():
    model, decomposition, g, batch = small()
    U, V = decomposition.U, decomposition.V
    graph = vpd.attribution_graph(model, decomposition, g, batch, lambda logits: logits[0, -1, 3], EMBEDDINGS)
    writes, order = {}, ["tokens", "positions", *(f"h.{i}.{matrix}" for i in (0, 1) for matrix in MATRICES)]

    def remember(module, args, output, path):
        writes[path] = output.detach()

    handles = []
    for path in EMBEDDINGS:
        hook = functools.partial(remember, path=path)
        handles.append(model.get_submodule(path).register_forward_hook(hook))
    model(batch)
    [handle.remove() for handle in handles]
    for path in order[2:]:  # each matrix's masked output, from those before it
        later = {p: torch.zeros(1, 5, U[p].shape[1]).double() for p in order[2:] if p not in writes}
        inputs, _ = frozen_forward(model, writes | later, batch)
        parts = (g[path][..., c, None] * (inputs[path] @ V[path][:, c])[..., None] * U[path][c] for c in range(6))
        writes[path] = sum(parts) + model.get_submodule(path).bias

    def value(node, writes):
        inputs, output = frozen_forward(model, writes, batch)
        if node["matrix"] == "outcome":
            return output[0, -1, 3]
        c = node["subcomponent"]
        return inputs[node["matrix"]][0, node["position"]] @ V[node["matrix"]][:, c] * U[node["matrix"]][c].norm()

    generator = torch.Generator().manual_seed(0)
    inputs, _ = frozen_forward(model, writes, batch)
    for number in torch.randperm(len(graph["edges"]), generator=generator)[:150].tolist():
        edge = graph["edges"][number]
        source, target = graph["nodes"][edge["source"]], graph["nodes"][edge["target"]]
        path, t, c = source["matrix"], source["position"], source["subcomponent"]
        if path in EMBEDDINGS:
            own = writes[path].reshape(-1, 8)[t]
        else:
            own = g[path][0, t, c] * (inputs[path][0, t] @ V[path][:, c]) * U[path][c]
        changed = []
        for sign in (1, -1):
            write = writes[path].clone()
            write.reshape(-1, write.shape[-1])[t] += sign * 1e-5 * own
            changed.append(value(target, {**writes, path: write}))
        slope = ((changed[0] - changed[1]) / 2e-5).item()
        assert edge["attribution"] == pytest.approx(slope, rel=1e-4, abs=1e-8), (source, target)

def test_no_edge_runs_from_a_later_position_or_layer_and_only_attention_moves_between_positions():
    model, decomposition, g, batch = small()
    graph = vpd.attribution_graph(model, decomposition, g, batch, lambda logits: logits[0, -1, 3], EMBEDDINGS)

    def depth(node):
        if node["matrix"] in EMBEDDINGS:
            return -1
        if node["matrix"] == "outcome":
            return 99
        _, layer, _, kind = node["matrix"].split(".")
        return {"q": 0, "k": 0, "v": 0, "o": 1, "up": 2, "down": 3}[kind] + 4 * int(layer)

    assert len(graph["edges"]) > 100
    for edge in graph["edges"]:
        source, target = graph["nodes"][edge["source"]], graph["nodes"][edge["target"]]
        assert depth(source) < depth(target)
        if source["matrix"][-1] in "kv" and target["matrix"].endswith("attn.o"):
            assert source["position"] <= target["position"]
        else:
            assert source["position"] == target["position"]

def test_on_a_linear_model_attributions_add_up_to_the_activation():
    torch.manual_seed(0)

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.first, self.second = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, ids):
            x = self.embedding(ids)  # (1, T, 4)
            h = self.first(x)
            return self.second(h + torch.cat([x, x[..., :2]], -1))

    model = Linear().double().eval()
    shapes = {"first": (6, 4), "second": (3, 6)}
    U = {p: torch.randn(5, d_out).double() for p, (d_out, _) in shapes.items()}
    V = {p: torch.randn(d_in, 5).double() for p, (_, d_in) in shapes.items()}
    masks = {p: torch.rand(1, 4, 6).double() for p in shapes}  # Delta's mask too
    decomposition = vpd.Decomposition(U, V, Silent())
    output, activations, writes = vpd.cut_forward(model, decomposition, masks, torch.randint(7, (1, 4)), ("embedding",))
    for t in range(4):
        for c in range(5):
            value = activations["second"][0, t, c]
            found = vpd.attributions(value, decomposition, masks, activations, writes)
            assert sum(x.sum() for x in found.values()).item() == pytest.approx(value.item(), rel=1e-9)
    value = output[0, 2, 1]
    found = vpd.attributions(value, decomposition, masks, activations, writes)
    assert sum(x.sum() for x in found.values()).item() == pytest.approx(value.item(), rel=1e-9)

def test_without_embeddings_the_first_matrix_has_no_sources_and_the_graph_is_still_made():
    model, decomposition, g, batch = small()
    graph = vpd.attribution_graph(model, decomposition, g, batch, lambda logits: logits[0, -1, 3])
    into = {graph["nodes"][edge["target"]]["matrix"] for edge in graph["edges"]}
    assert "h.0.attn.q" not in into and {"h.0.attn.o", "h.1.mlp.down", "outcome"} <= into

def previous_token_model():
    """One attention layer that predicts, at every position, the token before, one subcomponent per mechanism.

    The residual stream holds the token (0-3), the position (4-9) and the prediction (10-13).
    """
    model = gpt.GPT(gpt.Shape(layers=1, width=14, heads=1, context=6, vocabulary=4)).eval()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    block = model.h[0]
    block.norm_attn, block.norm_mlp, model.norm = nn.Identity(), nn.Identity(), nn.Identity()
    eye = torch.eye(14)
    # the prediction is read from dimensions of its own, and the token is written there too
    model.tokens.weight.data = eye[:4] + eye[10:14]
    model.positions.weight.data = eye[4:10]
    read = {  # (read direction, write direction) of each subcomponent
        "h.0.attn.q": [(eye[4 + t], 40 * eye[4 + t - 1]) for t in range(1, 6)],
        "h.0.attn.k": [(eye[4 + t], eye[4 + t]) for t in range(6)],
        "h.0.attn.v": [(eye[i], eye[i]) for i in range(4)],
        "h.0.attn.o": [(eye[i], 5 * eye[10 + i]) for i in range(4)],
    }
    U = {path: torch.stack([write for _, write in parts]) for path, parts in read.items()}
    V = {path: torch.stack([direction for direction, _ in parts], 1) for path, parts in read.items()}
    for path in U:
        model.get_submodule(path).weight.data = (V[path] @ U[path]).T
    return model, vpd.Decomposition(U, V, Silent())

def test_the_planted_previous_token_circuit_comes_out_on_top():
    model, decomposition = previous_token_model()
    batch = torch.tensor([[0, 1, 2, 3, 1, 2]])
    assert model(batch)[0, 1:].argmax(-1).tolist() == batch[0, :-1].tolist()
    _, inputs = vpd.forward_with_inputs(model, decomposition.U, batch)
    active = {path: (inputs[path] @ V).abs() > 0.5 for path, V in decomposition.V.items()}
    g = {path: nn.functional.pad(x.float(), (0, 1)) for path, x in active.items()}
    graph = vpd.attribution_graph(model, decomposition, g, batch, lambda logits: logits[0, -1, 1], EMBEDDINGS)

    def into(target):
        edges = [e for e in graph["edges"] if graph["nodes"][e["target"]] == target]
        return graph["nodes"][max(edges, key=lambda e: abs(e["attribution"]))["source"]]

    o = into(graph["nodes"][-1])
    assert (o["matrix"], o["position"], o["subcomponent"]) == ("h.0.attn.o", 5, 1)
    v = into(o)
    assert (v["matrix"], v["position"], v["subcomponent"]) == ("h.0.attn.v", 4, 1)
    token = into(v)
    assert (token["matrix"], token["position"]) == ("tokens", 4)

    # pruned to this one prediction: the value read from the previous position stays, those of all others go
    def loss(logits):
        return nn.functional.cross_entropy(logits[:, -1], torch.tensor([1]))

    for adversarial in (False, True):
        kept = vpd.prune(model, decomposition, g, batch, loss, cost_per_node=1e-3, adversarial=adversarial, steps=200)
        assert all((x[g[path] == 0] == 0).all() for path, x in kept.items())
        values = [(t, c) for t, c in kept["h.0.attn.v"][0].nonzero().tolist()]
        assert values == [(4, 1)], values
        assert kept["h.0.attn.o"][0].nonzero().tolist() == [[5, 1]]
