"""A whole run of the language model in small, of one process and of two, on any corpus and target."""

import dataclasses
import functools
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch import nn

import train_gpt2 as gpt
import vpd
from conftest import TEXT, dies, logged, same, tiny_preset, use_preset
from test_inputs import checkpoint, gpt2_folder, tokenizer_files

def write_ids(folder, vocabulary):
    """Random token ids in a .bin, the last one the largest."""
    ids = np.random.default_rng(0).integers(0, vocabulary, 4000).astype(np.uint16)
    ids[-1] = vocabulary - 1
    ids.tofile(folder / "ids.bin")
    return folder / "ids.bin"

def test_validation_windows_never_overlap_training_windows_and_lie_all_over_the_corpus():
    ids = np.arange(50_000, dtype=np.uint16)
    generator = torch.Generator().manual_seed(0)
    training = set(gpt.sample(ids, 16, 20_000, False, generator).flatten().tolist())
    validation = set(gpt.sample(ids, 16, 20_000, True, generator).flatten().tolist())
    assert not training & validation
    assert len(training) > 35_000 and len(validation) > 3_500
    assert min(validation) < 25_000 and max(validation) > 40_000

def test_the_share_of_compute_recovered_is_read_off_the_targets_curve():
    curve = [(0, 6.0), (100, 4.0), (200, 3.0), (400, 2.0)]
    assert gpt.compute_recovered(curve, 7.0) == 0.0
    assert gpt.compute_recovered(curve, 3.5) == pytest.approx(150 / 400)
    assert gpt.compute_recovered(curve, 2.0) == 1.0
    assert gpt.compute_recovered(curve, 1.9) == 1.0

@pytest.mark.parametrize("content, message", [
    (None, "cannot be read"),
    (b"hello world", "at least 640"),
    (b"na\xefve text" * 1000, "utf-8"),
])
def test_a_text_that_cannot_serve_ends_in_one_line_and_leaves_no_folder(content, message, refused, tmp_path):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    refused(message, "--data", tmp_path / "text.txt", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()

def test_a_bin_of_any_ids_gets_an_embedding_that_holds_them(refused, small, tmp_path):
    data = write_ids(tmp_path, 50_257)
    opened = gpt.prepare_run(gpt.SETTINGS | {"data": str(data)}, tmp_path / "run", "cpu")
    assert opened.model.tokens.num_embeddings == 50_304  # 786 * 64
    model = gpt.GPT(dataclasses.replace(small.shape, vocabulary=50_000))
    gpt.save_target(model, {"curve": [(0, 1.0)]}, tmp_path / "run")
    message = "token id 50256, but the target's vocabulary has 50000"
    refused(message, "--init-from", tmp_path / "run", "--out", tmp_path / "other")

@pytest.fixture
def small(tmp_path, monkeypatch):
    """A preset of few steps, as `laptop`, and a text in text.txt; a checkpoint after every step."""
    preset = tiny_preset(steps=6)
    use_preset(monkeypatch, preset)
    monkeypatch.setattr(gpt, "CHECKPOINT_SECONDS", -1)
    (tmp_path / "text.txt").write_text(TEXT.replace("Name", "Näme"), encoding="utf-8")
    return preset

def results(folder):
    """What a run computed, without how long it took."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in ("minutes, target", "minutes, decomposition", "minutes, evaluation", "tokens per second"):
        assert metrics["figures"].pop(name) > 0
    saved = torch.load(folder / "decomposition" / "checkpoint.pt", weights_only=True)["average"]
    return {"metrics": metrics, "log": logged(folder / "decomposition"), "U": saved["U"], "V": saved["V"]}

def test_a_whole_run_in_small_is_what_its_files_say(command, small, tmp_path, monkeypatch):
    settings = ("--data", tmp_path / "text.txt", "--out", tmp_path / "run")
    command(*settings)
    made = results(tmp_path / "run")
    metrics = made["metrics"]
    figures = metrics["figures"]
    assert figures["C"] == 2 * (4 * 22 + 2 * 56) and figures["evaluated positions"] == 256
    (_, first), *_, (_, last) = metrics["curve"]
    assert last < first  # it learned

    # independently: the cross-entropy of the target, and above it of the model with sums of subcomponents as weights
    ids, tokenizer = gpt.load_corpus(metrics["data"], 280, tmp_path / "run")
    model, _ = gpt.load_target(tmp_path / "run")
    batches = gpt.validation_batches(ids, small, "cpu")
    ce = gpt.validation_loss(model, batches)
    assert ce == pytest.approx(figures["loss of the target"], rel=1e-5)
    text = tokenizer.decode(torch.cat(batches).flatten().tolist())
    bits = ce / math.log(2) * 256 / len(text.encode())
    assert bits == pytest.approx(figures["bits per byte"], rel=0.01 if "\ufffd" in text else 1e-5)
    for path, U in made["U"].items():
        model.get_submodule(path).weight.data = (made["V"][path] @ U).T.detach()
    above = gpt.validation_loss(model, batches) - ce
    assert above == pytest.approx(figures["loss above target, unmasked"], abs=1e-4)

    # what is there is not done again
    monkeypatch.delattr(gpt, "open_run")
    assert "loss of the target" in command(*settings)

def test_a_run_killed_in_any_stage_goes_on_when_its_command_is_repeated_and_ends_the_same(
    command, refused, small, tmp_path, monkeypatch
):
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    settings = ("--data", tmp_path / "text.txt", "--seed", "3", "--C", "0.5")
    command(*settings, "--out", whole)
    for death in ((gpt, "write", 1), (gpt, "sample", 20), (vpd, "training_step", 3), (vpd, "evaluate", 0)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            dies(patch, *death)
            command(*settings, "--out", killed)
        assert (killed / "target_unfinished.pt").exists() == (death == (gpt, "sample", 20))
    for name, value in (("--seed", 4), ("--C", 2), ("--steps", 7), ("--data", "other.txt")):
        refused(f"made with another {name}: .* choose another --out", *settings, name, value, "--out", killed)
    command(*settings, "--out", killed)
    assert same(results(killed), results(whole))
    refused("holds something else than a run", "--out", tmp_path)

def one_of_two(rank, folder):
    """What each of two processes of torchrun does: a whole run, the same run interrupted, and continued."""
    preset = dataclasses.replace(tiny_preset(steps=10), target_steps=5)
    start = torch.distributed.init_process_group
    for number, (out, after) in enumerate((("whole", None), ("killed", 6), ("killed", None))):
        with pytest.MonkeyPatch.context() as patch:
            use_preset(patch, preset)
            patch.setattr(gpt, "CHECKPOINT_SECONDS", -1)
            patch.setattr(sys, "argv", f"_ --device cpu --data {folder}/text.txt --out {folder}/{out}".split())
            patch.setenv("LOCAL_RANK", str(rank))
            meeting = {"init_method": f"file://{folder}/meeting{number}", "rank": rank, "world_size": 2}
            patch.setattr(torch.distributed, "init_process_group", functools.partial(start, **meeting))
            dies(patch, vpd, "training_step", after)
            try:
                gpt.main()
            except KeyboardInterrupt:
                torch.distributed.destroy_process_group()

def test_two_processes_of_torchrun_go_on_where_they_were_stopped_and_end_the_same(small, tmp_path, capfd):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), 2)
    printed, _ = capfd.readouterr()
    assert printed.count("loss of the target") == 2  # of two finished runs, each printed by one process
    assert same(results(tmp_path / "whole"), results(tmp_path / "killed"))
    checkpoint = torch.load(tmp_path / "whole" / "decomposition" / "checkpoint.pt", weights_only=True)
    first, second = checkpoint["each process"]
    for key in ("sources", "data", "noise"):
        assert not same(first[key], second[key])  # each draws its own

def test_a_gpt2_folder_is_decomposed_and_asked_about_prompts_after_it_is_gone(command, small, tmp_path):
    folder = tmp_path / "gpt2"
    out = tmp_path / "run"
    names = tokenizer_files(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')  # as downloaded: of another kind
    gpt2_folder(folder, checkpoint(layers=1, width=64, vocabulary=len(names)))
    command("--init-from", folder, "--data", tmp_path / "text.txt", "--out", out)
    metrics = json.loads((out / "metrics.json").read_text())
    numbers = {path: of["C"] for path, of in metrics["matrices"].items()}
    assert numbers == {f"h.0.{name}": 224 if "mlp" in name else 90 for name in gpt.MATRICES}  # 0.7 (d_in + d_out)
    assert metrics["curve"] == [] and not any("recovered" in name for name in metrics["figures"])
    original, _ = gpt.load_target(folder)
    shutil.rmtree(folder)
    command("--out", out, "--circuit", "You should", "--token", " this")
    circuit = json.loads((out / "circuit.json").read_text())
    assert [names[i] for i in circuit["ids"]] == ["You", "Ġshould"] and names[circuit["token"]] == "Ġthis"
    ids = torch.randint(len(names), (2, 8))
    assert gpt.load(out).model(ids).equal(original(ids))

def test_a_gpt2_without_tokenizer_is_decomposed_on_ids_and_its_page_shows_numbers(command, refused, small, tmp_path):
    folder = gpt2_folder(tmp_path / "gpt2", checkpoint(layers=1, width=64, vocabulary=280))
    out = tmp_path / "run"
    refused("lacks vocab.json and merges.txt", "--init-from", folder, "--data", tmp_path / "text.txt", "--out", out)
    assert not out.exists()
    command("--init-from", folder, "--data", write_ids(tmp_path, 280), "--out", out)
    command("--out", out, "--report")
    shown = set(re.findall("<code>(.*?)</code>", (out / "report.html").read_text()))
    assert shown and shown <= {f" {i}" for i in range(280)}
    refused("has no tokenizer for prompts", "--out", out, "--report", "def")

class Gated(gpt.MLP):
    """An MLP with a gate."""
    def __init__(self, shape):
        super().__init__(shape)
        self.gate = nn.Linear(shape.width, 4 * shape.width)

    def forward(self, x):
        return self.down(self.gate(x).sigmoid() * self.up(x))

def test_another_architecture_runs_and_is_read_when_only_its_class_and_names_are_changed(
    command, small, tmp_path, monkeypatch
):
    monkeypatch.setattr(gpt, "MLP", Gated)
    monkeypatch.setattr(gpt, "MATRICES", (*gpt.MATRICES, "mlp.gate"))
    command("--data", tmp_path / "text.txt", "--out", tmp_path / "run")
    assert "h.1.mlp.gate" in json.loads((tmp_path / "run" / "metrics.json").read_text())["matrices"]
    command("--out", tmp_path / "run", "--report", "def first")
    assert 'id="h.0.mlp.gate:' in (tmp_path / "run" / "report.html").read_text()
