"""The language model, its tokenizer and data, and a whole run in small."""

import collections
import dataclasses
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_gpt2 as gpt
import vpd

TEXT = "def first(self, x):\n    return self.first(x) + 12\n\n\nclass Näme:\n\tdef second(self): return 'ß' \n" * 40


def checkpoint(layers=2, width=128, context=10, vocabulary=11):
    """A random GPT-2 checkpoint in Hugging Face's layout."""
    torch.manual_seed(0)
    shapes = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width), "ln_f.weight": (width,), "ln_f.bias": (width,)}
    for i in range(layers):
        for name, d_in, d_out in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            shapes |= {f"h.{i}.{name}.weight": (d_in, d_out), f"h.{i}.{name}.bias": (d_out,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (width,), f"h.{i}.{name}.bias": (width,)}
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def logits_by_hand(state, ids, heads):
    """GPT-2 of one sequence in float64, position by position and head by head, straight from the checkpoint."""
    state = {name: x.double().numpy() for name, x in state.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * state[name + ".weight"] + state[name + ".bias"]

    x = state["wte.weight"][ids] + state["wpe.weight"][: len(ids)]
    width = x.shape[1]
    for i in range(sum(name.endswith("ln_1.bias") for name in state)):
        qkv = norm(x, f"h.{i}.ln_1") @ state[f"h.{i}.attn.c_attn.weight"] + state[f"h.{i}.attn.c_attn.bias"]
        y, d = np.zeros_like(x), width // heads
        for head in range(heads):
            q, k, v = (qkv[:, part * width + head * d : part * width + (head + 1) * d] for part in range(3))
            for t in range(len(ids)):
                score = np.array([q[t] @ k[s] / math.sqrt(d) for s in range(t + 1)])
                weight = np.exp(score - score.max())
                y[t, head * d : (head + 1) * d] = (weight / weight.sum()) @ v[: t + 1]
        x = x + y @ state[f"h.{i}.attn.c_proj.weight"] + state[f"h.{i}.attn.c_proj.bias"]
        u = norm(x, f"h.{i}.ln_2") @ state[f"h.{i}.mlp.c_fc.weight"] + state[f"h.{i}.mlp.c_fc.bias"]
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + u @ state[f"h.{i}.mlp.c_proj.weight"] + state[f"h.{i}.mlp.c_proj.bias"]
    return norm(x, "ln_f") @ state["wte.weight"].T


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_hugging_face_checkpoint_gives_the_logits_of_gpt2_computed_by_hand(prefix, tmp_path):
    state = checkpoint()
    extras = {"lm_head.weight": state["wte.weight"], f"{prefix}h.0.attn.bias": torch.ones(1, 1, 10, 10)}
    torch.save({prefix + name: x for name, x in state.items()} | extras, tmp_path / "pytorch_model.bin")
    model = gpt.load_gpt2(tmp_path / "pytorch_model.bin")
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    expected = torch.from_numpy(logits_by_hand(state, ids, heads=2)).float()
    torch.testing.assert_close(model(torch.tensor([ids]))[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_checkpoint_that_is_not_gpt2_is_refused_by_the_name_of_its_tensor(change, tmp_path):
    state, name = checkpoint(layers=1), "h.0.mlp.c_fc.weight"
    if change == "missing":
        del state[name]
    elif change == "extra":
        state[name := "h.0.mlp.gate.weight"] = torch.zeros(2)
    else:
        state[name] = state[name].T
    torch.save(state, tmp_path / "model.bin")
    with pytest.raises(vpd.BadInput, match=name):
        gpt.load_gpt2(tmp_path / "model.bin")


@pytest.mark.parametrize("text", ["", " ", "\r\n\t x", "naïve 字 \U0001f600 e\u0301", "a\x00b", "____init____(self)", "٣٤ x²", "\n\n\n    \n"])
def test_the_tokenizer_loses_nothing(text):
    tokenizer = gpt.Tokenizer.learn(TEXT, 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_tokenizer_learns_the_merges_of_byte_pair_encoding_done_from_scratch_each_time():
    tokenizer = gpt.Tokenizer.learn(TEXT, 320)
    words = [list(piece.encode()) for piece in gpt.PIECES.findall(TEXT)]
    for i, pair in enumerate(tokenizer.merges):
        count = collections.Counter(p for word in words for p in zip(word, word[1:]))
        overlapping = count[pair] / max(count.values())  # "aaa" counts the pair twice, in both ways of counting
        assert overlapping == 1.0
        words = [gpt.merge(word, pair, 256 + i) for word in words]
    assert [t for word in words for t in word] == tokenizer.encode(TEXT).tolist()  # and encoding applies them in that order


def test_validation_windows_never_overlap_training_windows_and_lie_all_over_the_corpus():
    ids, T = np.arange(50_000, dtype=np.uint16), 16
    generator = torch.Generator().manual_seed(0)
    seen = [set(gpt.sample(ids, T, 20_000, validation, generator).flatten().tolist()) for validation in (False, True)]
    assert not seen[0] & seen[1]
    assert len(seen[0]) > 35_000 and len(seen[1]) > 3_500
    long = np.zeros(100_000, dtype=np.uint16)
    starts, _ = gpt.windows(len(long), T, True)
    assert starts.min() < 0.25 * len(long) and starts.max() > 0.75 * len(long) and len(starts) >= 4


def test_the_share_of_compute_recovered_is_read_off_the_targets_curve():
    curve = [(0, 6.0), (100, 4.0), (200, 3.0), (400, 2.0)]
    assert gpt.compute_recovered(curve, 7.0) == 0.0
    assert gpt.compute_recovered(curve, 3.5) == pytest.approx(150 / 400)
    assert gpt.compute_recovered(curve, 2.0) == 1.0
    assert gpt.compute_recovered(curve, 1.9) == 1.0


BAD = {
    "no such file": ("missing.txt", None, "cannot be read"),
    "empty": ("empty.txt", b"", "is empty"),
    "too short": ("short.txt", b"hello world", "at least 640"),
    "not UTF-8": ("latin.txt", b"na\xefve text" * 1000, "not UTF-8"),
    "odd length": ("odd.bin", b"abc", "two bytes each"),
    "an id outside": ("big.bin", np.array([5, 60_000] * 900, np.uint16).tobytes(), "token id 60000"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_ends_in_one_line_and_leaves_no_folder(case, tmp_path, monkeypatch):
    name, content, message = BAD[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", "--data", str(tmp_path / name), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match=message) as stopped:
        gpt.main()
    assert stopped.value.code.startswith("error: ") and "\n" not in stopped.value.code
    assert not (tmp_path / "run").exists()


def small_preset():
    config = vpd.Config(steps=6, warmup_steps=5, G_type="transformer", G_width=32, G_blocks=1, G_heads=2)
    return gpt.Preset(gpt.Shape(2, 16, 2, 8, 270), 4, 30, 3e-3, {"attn.q": 4, "attn.o": 4, "mlp.up": 6, "mlp.down": 6}, config)


def test_a_target_interrupted_while_training_ends_bit_identical_to_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(gpt, "EVALUATED", 64)
    monkeypatch.setattr(gpt, "CHECKPOINT_SECONDS", -1)  # after every step
    preset, ids = small_preset(), gpt.Tokenizer.learn(TEXT, 270).encode(TEXT)

    def train(folder, steps_until_death=None):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        draws, sample = iter(range(10_000)), gpt.sample

        def mortal(ids, T, B, validation, generator):
            if not validation and next(draws) == steps_until_death:
                raise KeyboardInterrupt
            return sample(ids, T, B, validation, generator)

        with monkeypatch.context() as patch:
            patch.setattr(gpt, "sample", mortal)
            gpt.train_target(gpt.GPT(preset.shape), ids, preset, 0, folder, "cpu")

    train(tmp_path / "whole")
    for death in (7, 11):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", death)
    train(tmp_path / "killed")
    whole, killed = (torch.load(tmp_path / run / "target.pt", weights_only=True) for run in ("whole", "killed"))
    assert whole["record"]["curve"] == killed["record"]["curve"]
    assert all(torch.equal(x, killed["model"][name]) for name, x in whole["model"].items())


def test_a_whole_run_in_small_and_what_is_there_is_not_done_again(tmp_path, monkeypatch):
    small = small_preset()
    monkeypatch.setitem(gpt.PRESETS, "laptop", small)
    monkeypatch.setattr(gpt, "EVALUATED", 64)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    settings = {"preset": "laptop", "data": str(tmp_path / "text.txt"), "init_from": "", "seed": 0, "steps": 0, "C": 1}
    metrics = gpt.evaluation(gpt.target_and_decomposition(settings, tmp_path, "cpu"), settings)
    assert metrics["target"]["curve"][-1][1] < metrics["target"]["curve"][0][1]  # it learned
    assert metrics["total"]["C"] == 2 * 20 and set(metrics["matrices"]) >= {"h.0.attn.q", "h.1.mlp.down"}
    assert json.loads((tmp_path / "metrics.json").read_text())["kl"] == metrics["kl"]

    # independently: the cross-entropy of the target, and above it of the model whose weights are the sums of subcomponents
    ids, _ = gpt.corpus(str(tmp_path / "text.txt"), small, tmp_path)
    model = gpt.GPT(small.shape)
    model.load_state_dict(torch.load(tmp_path / "target.pt", weights_only=True)["model"])
    batches = gpt.validation_batches(ids, small, "cpu")
    assert gpt.validation_loss(model, batches) == pytest.approx(metrics["target"]["ce"], rel=1e-5)
    saved = torch.load(tmp_path / "decomposition" / "checkpoint.pt", weights_only=True)
    for path, U in saved["U"].items():
        model.get_submodule(path).weight.data = (saved["V"][path] @ U).T.detach()
    above = gpt.validation_loss(model, batches) - metrics["target"]["ce"]
    assert above == pytest.approx(metrics["ce_above_target"]["unmasked"], abs=1e-4)

    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(gpt, "train_target", never)
    monkeypatch.setattr(vpd, "training_step", never)
    again = gpt.evaluation(gpt.target_and_decomposition(settings, tmp_path, "cpu"), settings)
    assert again["kl"] == metrics["kl"]


def test_operations_agree_with_those_that_torch_counts():
    preset = dataclasses.replace(small_preset(), batch=64)
    config = dataclasses.replace(preset.config, G_width=64)
    model = gpt.GPT(preset.shape).eval()
    C = {f"h.{i}.{kind}": 40 for i in range(2) for kind in ("attn.q", "mlp.up", "mlp.down")}
    batch = torch.randint(270, (64, 8))
    training = vpd.start(model, C, vpd.check(model, C, batch, config), config)
    with FlopCounterMode(display=False) as counter:
        vpd.training_step(model, batch, vpd.kl, training, config)
    # torch counts the little attention scores and Delta too, and no backward pass below the lowest masked matrix
    assert gpt.operations(model, C, config) * 64 * 8 == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_a_step_in_bfloat16_has_the_losses_of_float32_and_keeps_delta_and_parameters_in_float32():
    preset = small_preset()
    torch.manual_seed(0)
    model = gpt.GPT(preset.shape).eval()
    C = {f"h.{i}.{kind}": number for i in range(2) for kind, number in preset.C.items()}
    batch, found = torch.randint(270, (4, 8)), {}
    for bf16 in (False, True):
        config = dataclasses.replace(preset.config, bf16=bf16)
        training = vpd.start(model, C, vpd.check(model, C, batch, config), config)
        found[bf16] = vpd.training_step(model, batch, vpd.kl, training, config)
        state = [*training.decomposition.U.values(), *training.decomposition.G.parameters(), *training.sources.values()]
        assert all(x.dtype == x.grad.dtype == torch.float32 for x in state)
    assert found[True]["delta_l2"] == found[False]["delta_l2"]  # never in bfloat16
    assert found[True]["stochastic"] != found[False]["stochastic"]  # the forward passes are
    assert found[True] == pytest.approx(found[False], rel=0.1)


def test_a_gpu_preset_without_a_gpu_warns_with_the_time_it_would_take_and_runs(tmp_path, monkeypatch, capsys):
    small = small_preset()
    monkeypatch.setitem(gpt.PRESETS, "gpu", dataclasses.replace(small, config=dataclasses.replace(small.config, bf16=True)))
    monkeypatch.setattr(gpt, "EVALUATED", 64)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    command = ["train_gpt2.py", "--preset", "gpu", "--device", "cpu", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", command)
    gpt.main()
    assert re.search(r"warning: the preset gpu is for GPUs; here its decomposition takes over \d+ hours", capsys.readouterr().err)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["speed"]["tokens_per_second"] > 0


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(vpd, "processes", lambda: 3)
    settings = {"preset": "laptop", "data": "", "init_from": "", "seed": 0, "steps": 0, "C": 1}
    with pytest.raises(vpd.BadInput, match="batch of 8 does not divide over 3 processes"):
        gpt.target_and_decomposition(settings, tmp_path / "run", "cpu")
    assert not (tmp_path / "run").exists()
