"""What train_gpt2.py reads off a finished run: the page, circuits, another decomposition of the same target."""

import html
import json
import re
import shlex

import numpy as np
import pytest
import torch

import train_gpt2 as gpt
import vpd
from conftest import TEXT, code_blocks, same

def test_clearness_is_the_share_of_the_three_commonest_tokens_beyond_chance():
    ids = torch.arange(100).repeat(4, 1)  # every token equally often
    usual = torch.full((100,), 0.01)
    fires = torch.zeros(4, 100, dtype=torch.bool)
    fires[:, [10, 11]] = True  # 8 times, on two tokens
    sides = gpt.neighbours(ids)
    assert gpt.clearness(sides["at"], usual, fires) == pytest.approx((1 - 0.02) * 8 / 28)
    assert gpt.commonest(sides["before"], fires) == [(9, 0.5), (10, 0.5)]
    assert gpt.commonest(sides["after"], fires) == [(11, 0.5), (12, 0.5)]
    first = torch.zeros(4, 100, dtype=torch.bool)
    first[:, 0] = True
    assert gpt.commonest(sides["before"], first) == []  # nothing is before the first token
    assert gpt.clearness(sides["before"], usual, first) == 0

def entries(run):
    """{path:c of every subcomponent: its entry on the page}, in their order."""
    text = (run.folder / "report.html").read_text()
    # the anchor is inside the entry: a link opens it
    return dict(re.findall(r'<details><summary>.*?</summary><div id="(.*?)">(.*?)</details>', text, re.S))

def visible(text):
    return text.replace("\n", "⏎").replace("\t", "→")

def test_the_page_has_an_entry_for_every_subcomponent_that_fires_and_no_token_breaks_it(run, command):
    printed = command("--out", run.folder, "--report", "def first(", "'<b>'")
    text = (run.folder / "report.html").read_text()
    of = gpt.reading(run)
    ids = torch.cat(of.batches)
    g, _ = gpt.observe(of)
    names = []
    for path in g:
        names += [f"{path}:{c}" for c in range(g[path].shape[-1]) if (g[path][..., c] > 0.1).any()]
    assert entries(run).keys() == set(names) and f"the page of the {len(names)} subcomponents" in printed
    assert {link.removeprefix("#") for link in re.findall('href="(.*?)"', text)} <= {*names, *g}
    for shown in re.findall("<code>(.*?)</code>", text):
        assert html.escape(html.unescape(shown)) == shown
    assert "http" not in text and "<code>&#x27;&lt;b&gt;&#x27;</code>" in text  # as a text

    metrics = json.loads((run.folder / "metrics.json").read_text())["matrices"]
    for name, entry in entries(run).items():
        path, c = name.split(":")
        fires = g[path][..., int(c)] > 0.1
        _, rest = entry.split(f"at {fires.float().mean():.2%} of all tokens; mean importance ")
        assert float(rest.split("<")[0]) == pytest.approx(metrics[path]["mean_importance"][int(c)], rel=0.06)
        lines = re.findall("<p>.*?</p>", entry)
        assert len(lines) == min(10, int(fires.sum()))
        for line in lines:
            assert html.unescape(re.sub("<.*?>", "", line)) in visible(TEXT)  # a real passage
        at = {visible(run.tokenizer.decode([i])) for i in ids[fires].tolist()}
        marked = re.findall(r"<mark[^>]*><code>(.*?)</code></mark>", entry)
        assert {html.unescape(token) for token in marked} <= at

def test_entries_of_a_matrix_are_in_the_order_of_clearness_and_say_what_the_write_direction_raises(run, command):
    command("--out", run.folder, "--report")
    of = gpt.reading(run)
    ids = torch.cat(of.batches)
    g, a = gpt.observe(of)
    usual = torch.bincount(ids.flatten(), minlength=280) / ids.numel()
    for path in g:
        order = [name for name in entries(run) if name.startswith(f"{path}:")]
        scores = []
        for name in order:
            fires = g[path][..., int(name.removeprefix(f"{path}:"))] > 0.1
            scores.append(max(gpt.clearness(tokens, usual, fires) for tokens in gpt.neighbours(ids).values()))
        assert scores == sorted(scores, reverse=True)
    # independently: the logits of the model rise most when U_c is added to the stream behind its last block
    clearest = order[0]  # of the last matrix
    c = int(clearest.removeprefix(f"{path}:"))
    sign = a[path][..., c][g[path][..., c] > 0.1].float().mean().sign()
    x = torch.randn(16, generator=torch.Generator().manual_seed(0)) * 100  # far from 0: the length is constant
    norm = run.model.norm
    def logits(stream):
        centred = stream - stream.mean()
        return run.model.tokens.weight @ (centred / (x - x.mean()).norm() * norm.weight + norm.bias)
    _, slopes = torch.autograd.functional.jvp(logits, x, run.decomposition.U[path][c].detach())
    best = (slopes * sign).topk(6).indices.tolist()
    assert "<dt>raises<dd>" + " ".join(gpt.code(of, i) for i in best) in entries(run)[clearest]

@pytest.mark.parametrize("bf16", [False, True])
def test_a_circuit_is_written_with_its_graph_and_three_prunings(bf16, run, command, monkeypatch):
    monkeypatch.setattr(run.decomposition, "bf16", bf16)
    printed = gpt.circuits(run, ["def first("], None)
    assert "importances alone" in printed and (run.folder / "circuit.png").exists()
    made = json.loads((run.folder / "circuit.json").read_text())
    assert set(made["prunings"]) == {"not pruned", *gpt.PRUNINGS}
    assert made["prunings"]["importances alone"]["nodes"] <= made["prunings"]["not pruned"]["nodes"]
    assert bf16 or made["token"] == run.model(torch.tensor([made["ids"]]))[0, -1].argmax()
    graph = made["pruned_graph"]
    assert graph["nodes"][-1]["matrix"] == "outcome" and graph["edges"]
    active = [node for node in graph["nodes"] if "importance" in node]
    assert len(active) == made["prunings"]["stochastic and adversarial"]["nodes"]

def test_the_readmes_section_on_python_runs_as_it_stands(run, capsys):
    (code,) = code_blocks("In Python")
    exec(code.replace('"runs/laptop"', repr(str(run.folder))).replace(", 207", ", 28"), {})  # a part of a small run
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(re.fullmatch(r"(['\"]).+\1 -?[\d.e-]+", line) for line in lines)

def test_the_readmes_language_model_of_your_own_is_decomposed_and_read(run, tmp_path, monkeypatch):
    *_, code = code_blocks("Your own model")
    monkeypatch.chdir(tmp_path)
    short = code.replace("sequence_config(model, C)", "sequence_config(model, C, steps=3)")
    ids = torch.cat(gpt.validation_batches(run.ids, run.preset, "cpu")[:2])
    def batch(generator):
        return gpt.sample(run.ids, 16, 4, False, generator)
    names = {"torch": torch, "vpd": vpd, "model": run.model, "batch": batch, "ids": ids, "decode": run.tokenizer.decode}
    exec(short, names)
    assert "h.1.mlp.down" in (tmp_path / "runs" / "gpt" / "report.html").read_text()
    saved = np.load(tmp_path / "runs" / "gpt" / "batch.npz")
    assert saved["importances"].shape == saved["activations"].shape == (*ids.shape, sum(run.C.values()))

def test_another_decomposition_of_the_same_target_is_made_from_its_folder(run, tmp_path, command):
    half = tmp_path / "half"
    command("--init-from", run.folder, "--C", "0.5", "--steps", "3", "--batch", "2", "--seed", "1", "--out", half)
    model, _ = gpt.load_target(half)
    assert same(model.state_dict(), run.model.state_dict())
    metrics = json.loads((half / "metrics.json").read_text())
    assert {matrix["C"] for matrix in metrics["matrices"].values()} == {11, 28}  # half as many
    assert metrics["data"].endswith("text.txt")
    made = json.loads((half / "decomposition" / "run.json").read_text())["run"]
    assert made["steps"] == 3 and made["seed"] == 1
    own = json.loads((run.folder / "metrics.json").read_text())["figures"]  # judged on the same text
    for name in ("loss of the target", "evaluated positions"):
        assert metrics["figures"][name] == pytest.approx(own[name], rel=1e-6)

@pytest.mark.parametrize("words, message", [
    ("--circuit ''", "this run takes 1 to 16"),
    ("--circuit def --token 'def first('", "is not one token but"),
    ("--report --device warp", "there is no device 'warp'"),
    ("--report --out nowhere", "holds no finished decomposition"),
    ("--out new --init-from RUN --preset laptop", "brings its preset and data"),
    ("--out new --init-from nowhere", "no run with a finished target"),
    ("--out new --C 0", "--C is 0"),
])
def test_bad_questions_end_in_one_line_and_leave_no_folder(run, words, message, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(message, "--out", run.folder, *shlex.split(words.replace("RUN", str(run.folder))))
    assert not (tmp_path / "new").exists()
