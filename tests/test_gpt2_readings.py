"""What train_gpt2.py reads off a finished run: the page, circuits, another decomposition of the same target."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import train_gpt2 as gpt
import vpd
from conftest import TEXT

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

class Page(HTMLParser):
    """The ids and links of a page; its entries; tags that are open, to see that they fit."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.tags, self.inside, self.open_details = [], [], set(), set(), 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.open_details += tag == "details"
        if "id" in attributes:
            self.ids.append(attributes["id"])
            if self.open_details:
                self.inside.add(attributes["id"])
        if tag == "a":
            self.links.append(attributes["href"])

    def handle_endtag(self, tag):
        self.open_details -= tag == "details"

def test_the_page_has_an_entry_for_every_subcomponent_that_fires_and_no_token_breaks_it(run, command):
    printed = command("--out", run.folder, "--report", "def first(", "'<b>'")
    text = (run.folder / "report.html").read_text()
    page = Page(text)
    ids, g, _ = gpt.observe(run)
    firing = {f"{path}:{c}" for path in g for c in range(6) if (g[path][..., c] > 0.1).any()}
    assert page.inside == firing  # the anchors are inside the entries: a link opens them
    assert sorted(page.ids) == sorted(firing | set(g)) and f"the page of {len(firing)} subcomponents" in printed
    assert {link for link in page.links if ":" in link} <= {f"#{name}" for name in firing}
    assert {f"#{path}" for path in g} <= set(page.links)
    assert page.tags.isdisjoint({"script", "b>", "link", "img"}) and page.open_details == 0
    assert "http" not in text and "<code>&#x27;&lt;b&gt;&#x27;</code>" in text  # as a text

    metrics = json.loads((run.folder / "metrics.json").read_text())["matrices"]
    for path, c in ((name.split(":")[0], int(name.split(":")[1])) for name in firing):
        entry = text.split(f'<div id="{path}:{c}">')[1].split("</details>")[0]
        fires = g[path][..., c] > 0.1
        mean = metrics[path]["mean_importance"][c]
        assert f"at {fires.float().mean():.2%} of all tokens; mean importance {mean:.2g}" in entry
        assert ("<dt>raises" in entry) == path.endswith(("attn.o", "mlp.down"))
        lines = [html.unescape(re.sub("<.*?>", "", line)) for line in re.findall("<p>.*?</p>", entry)]
        assert len(lines) == min(10, int(fires.sum()))
        for line in lines:
            assert line in TEXT.replace("\n", "⏎").replace("\t", "→")  # a real passage
        marked = re.findall(r"<mark[^>]*><code>(.*?)</code></mark>", entry)
        at = {run.tokenizer.decode([i]) for i in ids[fires].tolist()}
        assert {html.unescape(token) for token in marked} <= {x.replace("\n", "⏎").replace("\t", "→") for x in at}

def test_entries_of_a_matrix_are_in_the_order_of_clearness_and_say_what_the_write_direction_raises(run, command):
    command("--out", run.folder, "--report")
    text = (run.folder / "report.html").read_text()
    ids, g, a = gpt.observe(run)
    usual = torch.bincount(ids.flatten(), minlength=280) / ids.numel()
    path = "h.1.mlp.down"
    order = [int(c) for c in re.findall(rf'<div id="{path}:(\d)">', text)]
    scores = [max(gpt.clearness(x, usual, g[path][..., c] > 0.1) for x in gpt.neighbours(ids).values()) for c in order]
    assert scores == sorted(scores, reverse=True) and len(scores) > 2
    # independently: the logits of the model rise most when U_c is added to the stream behind its last block
    c = order[0]
    sign = a[path][..., c][g[path][..., c] > 0.1].float().mean().sign()
    E, w, b = run.model.tokens.weight, run.model.norm.weight, run.model.norm.bias
    stream = torch.zeros(16, requires_grad=True)
    x = stream + torch.randn(16, generator=torch.Generator().manual_seed(0)) * 100  # far from 0: the length is constant
    centred = x - x.mean()
    logits = (centred / centred.norm().detach() * w + b) @ E.T
    slopes = [torch.autograd.grad(logit, stream, retain_graph=True)[0] @ run.decomposition.U[path][c] for logit in logits]
    best = (torch.stack(slopes) * sign).topk(6).indices.tolist()
    entry = text.split(f'<div id="{path}:{c}">')[1]
    assert "<dt>raises<dd>" + " ".join(gpt.code(run, i) for i in best) in entry

def test_a_page_with_too_many_subcomponents_keeps_the_most_important(run, monkeypatch):
    means = json.loads((run.folder / "metrics.json").read_text())["matrices"]
    ids, g, _ = gpt.observe(run)
    monkeypatch.setattr(gpt, "SHOWN", 2 * len(g))
    monkeypatch.setattr(gpt, "FLOWS", 0)
    gpt.report(run, [])
    text = (run.folder / "report.html").read_text()
    for path in g:
        fire = [c for c in range(6) if (g[path][..., c] > 0.1).any()]
        kept = sorted(fire, key=lambda c: -means[path]["mean_importance"][c])[:2]
        assert {int(c) for c in re.findall(rf'<div id="{path}:(\d)">', text)} == set(kept)
    assert "at most 2" in text

def test_a_circuit_is_written_with_its_graph_and_three_prunings(run, command):
    printed = command("--out", run.folder, "--circuit", "def first(")
    assert "importances alone" in printed and (run.folder / "circuit.png").exists()
    made = json.loads((run.folder / "circuit.json").read_text())
    assert set(made["prunings"]) == {"not pruned", *gpt.PRUNINGS}
    assert made["prunings"]["importances alone"]["nodes"] <= made["prunings"]["not pruned"]["nodes"]
    assert made["token"] == run.model(torch.tensor([made["ids"]]))[0, -1].argmax()
    graph = made["pruned_graph"]
    assert graph["nodes"][-1]["matrix"] == "outcome" and graph["edges"]
    active = [node for node in graph["nodes"] if "importance" in node]
    assert len(active) == made["prunings"]["stochastic and adversarial"]["nodes"]

def test_the_numbers_of_a_pruning_are_those_of_its_masks(run, command):
    ids = gpt.encoded(run, "def first(")
    target, g = vpd.predict_importances(run.model, run.decomposition, ids)
    ones = {path: torch.ones_like(x) for path, x in g.items()}

    def loss(logits):
        return logits[0, -1, 5]

    judged = gpt.judge(run, ids, target, ones, loss, vpd.side_by_side(ones) > 0)  # all ones: the target
    for name in ("g as masks", "rounded", "attack 20", "attack 80"):
        assert judged[name] == pytest.approx(target[0, -1, 5].item(), rel=1e-4)
    assert judged["nodes"] == sum(x.numel() for x in ones.values())

def test_a_run_in_bfloat16_can_be_read(run, command, monkeypatch):
    monkeypatch.setattr(run.decomposition, "bf16", True)
    gpt.report(run, ["def"])
    assert gpt.circuits(run, ["def"], None) and not gpt.observe(run)[1]["h.0.attn.q"].isnan().any()

def test_the_readmes_section_on_python_runs_as_it_stands(run, capsys):
    readme = (Path(gpt.__file__).parent / "README.md").read_text()
    code = re.search(r"## In Python.*?```python\n(.*?)```", readme, re.S)[1]
    exec(code.replace('"runs/laptop"', repr(str(run.folder))), {})
    for line, done in zip(capsys.readouterr().out.strip().splitlines(), ("ablated", "edited"), strict=True):
        assert re.fullmatch(rf"h.0.mlp.down:\d {done}: \{{.+\}}", line)

def test_another_decomposition_of_the_same_target_is_made_from_its_folder(run, tmp_path, command):
    half = tmp_path / "half"
    command("--init-from", run.folder, "--C", "0.5", "--steps", "3", "--batch", "2", "--seed", "1", "--out", half)
    target, same = (torch.load(folder / "target.pt", weights_only=True)["model"] for folder in (run.folder, half))
    assert all(x.equal(same[name]) for name, x in target.items())
    metrics = json.loads((half / "metrics.json").read_text())
    assert all(matrix["C"] == 3 for matrix in metrics["matrices"].values()) and metrics["data"].endswith("text.txt")
    made = json.loads((half / "decomposition" / "run.json").read_text())["run"]
    assert made["steps"] == 3 and made["seed"] == 1
    original = json.loads((run.folder / "decomposition" / "run.json").read_text())["run"]
    assert made["target model"] == original["target model"]
    own = json.loads((run.folder / "metrics.json").read_text())["figures"]  # judged on the same text
    assert metrics["figures"]["loss of the target"] == own["loss of the target"]
    assert metrics["figures"]["evaluated positions"] == own["evaluated positions"] == 256

    with pytest.raises(SystemExit, match="brings its preset and data"):
        command("--init-from", run.folder, "--preset", "laptop", "--out", tmp_path / "new")
    with pytest.raises(SystemExit, match="no run with a finished target"):
        command("--init-from", tmp_path, "--out", tmp_path / "new")
    for setting, value in (("--C", "0"), ("--steps", "0"), ("--seed", "-1")):
        with pytest.raises(SystemExit, match=f"{setting} is {value}"):
            command(setting, value, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (half / "target.pt").write_bytes(b"cut")
    with pytest.raises(SystemExit, match="target.pt is damaged"):
        command("--out", half, "--report")

@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--circuit", "x" * 100], "the model takes 1 to 16"),
        (["--circuit", ""], "has 0 tokens"),
        (["--circuit", "def", "--token", "def first("], "is not one token but"),
        (["--circuit", "def", "--token", ""], "has 0 tokens"),
        (["--token", ""], "--token needs --circuit PROMPT"),
        (["--report", "--token", "def"], "--token needs --circuit PROMPT"),
        (["--report", "--device", "warp"], "there is no device 'warp'"),
        (["--report", "--seed", "5"], "made with another --seed"),
        (["--report", "--out", "nowhere"], "holds no finished decomposition"),
    ],
)
def test_bad_questions_end_in_one_line(run, arguments, message, command):
    with pytest.raises(SystemExit, match=message) as stopped:
        command("--out", run.folder, *arguments)
    assert stopped.value.code.startswith("error: ") and "\n" not in stopped.value.code
