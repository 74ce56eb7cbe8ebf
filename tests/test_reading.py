"""Attributions, against finite differences and sums. (Graph and pruning of a known circuit: see test_toy_models.py.)"""

import pytest
import torch
from torch import nn

import train_gpt2 as gpt
import vpd
from conftest import Net
from test_vpd import random_parts

EMBEDDINGS = ("tokens", "positions")

def random_decomposition(model, n):
    """A random decomposition, n parts a matrix, of all matrices of a model."""
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    U, V = random_parts(model, dict.fromkeys(linears, n))
    return vpd.Decomposition(U, V, nn.Identity())  # whose importance function is never asked

def random_gpt():
    """In float64, for 5 positions and 7 tokens."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.Shape(layers=2, width=8, heads=2, context=5, vocabulary=7)).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model

def frozen_forward(model, writes, batch):
    """The inputs of all matrices, and the output, when every matrix and embedding writes what is given."""
    inputs = {}
    handles = []
    for path, write in writes.items():
        def hook(module, args, output, path=path, write=write):
            inputs[path] = args[0]
            return write
        handles.append(model.get_submodule(path).register_forward_hook(hook))
    output = model(batch)
    for handle in handles:
        handle.remove()
    return inputs, output

def test_an_edge_is_the_change_of_its_target_per_change_of_its_sources_write_with_all_else_frozen():
    model = random_gpt()
    decomposition = random_decomposition(model, 6)
    U, V = decomposition.U, decomposition.V
    batch = torch.randint(7, (1, 5))
    g = {path: nn.functional.pad(torch.rand(1, 5, 6) * (torch.rand(1, 5, 6) < 0.6), (0, 1)).double() for path in U}
    graph = vpd.attribution_graph(model, decomposition, g, batch, lambda logits: logits[0, -1, 3], EMBEDDINGS)
    masked, _, writes = vpd.cut_forward(model, decomposition, g, batch, EMBEDDINGS)
    torch.testing.assert_close(masked, vpd.masked_forward(model, U, V, g, batch))
    inputs, output = frozen_forward(model, writes, batch)
    torch.testing.assert_close(output, masked)

    def value(node, writes):
        inputs, output = frozen_forward(model, writes, batch)
        path, c = node["matrix"], node["subcomponent"]
        if path == "outcome":
            return output[0, -1, 3]
        return inputs[path][0, node["position"]] @ V[path][:, c] * U[path][c].norm()

    assert len(graph["edges"]) > 150
    for number in torch.randperm(len(graph["edges"]))[:150].tolist():
        edge = graph["edges"][number]
        source = graph["nodes"][edge["source"]]
        target = graph["nodes"][edge["target"]]
        path, t, c = source["matrix"], source["position"], source["subcomponent"]
        if path in EMBEDDINGS:
            own = writes[path].reshape(-1, 8)[t]
        else:
            own = g[path][0, t, c] * (inputs[path][0, t] @ V[path][:, c]) * U[path][c]
        changed = []
        for sign in (1, -1):
            write = writes[path].detach().clone()
            write.reshape(-1, write.shape[-1])[t] += sign * 1e-5 * own
            changed.append(value(target, {**writes, path: write}))
        slope = ((changed[0] - changed[1]) / 2e-5).item()
        assert edge["attribution"] == pytest.approx(slope, rel=1e-4, abs=1e-8), (source, target)

def test_on_a_linear_model_attributions_with_those_of_bias_and_delta_add_up_to_what_is_attributed():
    torch.manual_seed(0)
    linear = Net(lambda net, x: net.last(net.first(x)) + x[..., :3])
    model = nn.Sequential(nn.Embedding(7, 4), linear).double()
    decomposition = random_decomposition(model, 5)
    masks = {path: torch.rand(1, 4, 6).double() for path in ("1.first", "1.last")}  # Delta's mask too
    output, activations, writes = vpd.cut_forward(model, decomposition, masks, torch.randint(7, (1, 4)), ("0",))
    for value in (output[0, 2, 1], *activations["1.last"].flatten()):
        found = vpd.attributions(value, decomposition, masks, activations, writes)
        assert sum(x.sum() for x in found.values()).item() == pytest.approx(value.item(), rel=1e-9)
