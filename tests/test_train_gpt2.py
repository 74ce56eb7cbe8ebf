"""The language model, its tokenizer and data, and a whole run in small."""

import collections
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import train_gpt2 as gpt
import vpd

TEXT = "def first(self, x):\n    return self.first(x) + 12\n\n\nclass Näme:\n\tdef second(self): return 'ß' \n" * 40

def checkpoint(layers=2, width=128, context=10, vocabulary=11):
    """A random GPT-2 checkpoint in Hugging Face's layout."""
    torch.manual_seed(0)
    shapes = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
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

def write_safetensors(file, state, dtype):
    """A .safetensors file, written by hand: float32, or float16 or bfloat16 rounded to zero from its bits."""
    header, raw = {"__metadata__": {"format": "pt"}}, b""
    for name, x in state.items():
        bits = x.contiguous().numpy()
        if dtype == "BF16":
            bits = (bits.view(np.uint32) >> 16).astype(np.uint16)
        elif dtype == "F16":
            bits = bits.astype(np.float16)
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [len(raw), len(raw) + bits.nbytes]}
        raw += bits.tobytes()
    header = json.dumps(header).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw)

def gpt2_folder(folder, state, dtype="F32", **changes):
    """A GPT-2's weights and config.json, as downloaded."""
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", state, dtype)
    layers = len({name.split(".")[1] for name in state if ".ln_1.bias" in name})
    config = {"n_layer": layers, "n_head": 2, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder

IDS = [3, 1, 4, 1, 5, 9, 2, 6]

def logits_of(folder):
    model, _ = gpt.load_target(folder)
    return model(torch.tensor([IDS]))[0].detach().numpy()

@pytest.mark.parametrize("dtype, tolerance", [("F32", 1e-3), ("F16", 0.02), ("BF16", 0.1)])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_folder_as_it_is_downloaded_gives_the_logits_of_gpt2_computed_by_hand(prefix, dtype, tolerance, tmp_path):
    state = checkpoint()
    extras = {"lm_head.weight": state["wte.weight"], f"{prefix}h.0.attn.bias": torch.ones(1, 1, 10, 10)}
    gpt2_folder(tmp_path, {prefix + name: x for name, x in state.items()} | extras, dtype, n_layer=2, n_head=4)
    logits = logits_of(tmp_path)
    assert abs(logits - logits_by_hand(state, IDS, heads=4)).max() < tolerance
    assert abs(logits - logits_by_hand(state, IDS, heads=2)).max() > 0.15  # the heads are those of config.json
    gpt2_folder(tmp_path, state, n_head=4, layer_norm_epsilon=0.5)
    assert abs(logits_of(tmp_path) - logits).max() > 0.1  # read, too

@pytest.mark.parametrize("change", ["missing", "extra", "shape", "untied", "activation"])
def test_a_checkpoint_that_is_not_gpt2_is_refused_by_the_name_of_what_is_wrong(change, tmp_path):
    state, changes, wrong = checkpoint(layers=1), {}, "h.0.mlp.up.weight"
    if change == "missing":
        del state["h.0.mlp.c_fc.weight"]
    elif change == "extra":
        state[wrong := "h.0.mlp.gate.weight"] = torch.zeros(2)
    elif change == "untied":  # dropped, it would give other logits than the checkpoint's
        state[wrong := "lm_head.weight"] = state["wte.weight"] + 1
    elif change == "activation":
        wrong, changes = "activation", {"activation_function": "relu"}
    else:
        state["h.0.mlp.c_fc.weight"] = state["h.0.mlp.c_fc.weight"].T
    with pytest.raises(vpd.BadInput, match=wrong) as refused:
        gpt.load_target(gpt2_folder(tmp_path, state, **changes))
    assert "\n" not in str(refused.value)

# Those of GPT-2's 50,000 merges that can act on the texts below, in their order (a merge of "a" and "b" is "a b").
GPT2_MERGES = (
    'Ġ t,h e,i n,o n,Ġ s,Ġ w,Ġ o,Ġ c,i s,a n,o r,e s,e d,in g,o u,Ġ m,Ġo f,Ġ d,a s,l e,Ġt h,l l,Ġ l,s t,v e,'
    'Ġ e,a d,s e,a c,l d,i r,c e,i l,Ġ 1,Ġ R,u l,a in,es t,t h,u n,0 0,an t,e l,ou ld,Ġs h,Ġth is,n t,r a,'
    "Ġ le,â Ģ,Ġc an,Ġd o,g e,' t,Ġw or,0 1,on e,ac e,as s,as e,Ġs p,a il,r u,Ġ 0,t e,e ll,n e,Ġ $,w e,n ing,"
    "n g,Ġsh ould,s s,00 0,Ġd on,Ġ1 0,e f,1 0,Ġwor ld,' ve,1 2,Ġle ad,' ll,Ġ ed,Ġc a,Ġ #,e ad,Ġc ase,l ing,"
    'Ġm ain,âĢ ¦,ir d,t o,s h,Y ou,o f,Ġd one,or ld,Ġ1 00,Â ł,a i,2 3,t r,4 5,Ġsp ace,Ġ â,il i,) :,m a,Ã ©,'
    '3 4,s p,l in,ou l,d e,he l,1 00,6 7,! !,( ),7 8,Ġlead ing,5 6,¿ ½,ï ¿½,d ef,r d,il ing,l i,8 9,d o,'
    "Âł Âł,t es,U N,ad ing,r un,Ġ !,c an,h i,l o,th is,Ġed ge,y ou,Ġc as,p ass,c a,w orld,' ',Ġsh o,c ase,"
    "w an,y o,? ',n i,Ġ1 000,ð Ł,h o,Ĥ ¬,p a,d on,ad i,t est,t ra,12 3,p ace,w a,Ġâ Ĥ¬,d i,ell o,ail ing,"
    'd ing,le ading,m ain,Ġ ðŁ,he ll,1 000,sp ace,h is,ed ge,h ou,un ning,ad in,Ġm a,e a,ç Ķ,ll o,ç ļ,'
    'run ning,e i,n n,un n,çļ Ħ,w o,sh ould,æ ĺ,23 4,Ġw o,d in,â Ĥ¬,Ġ ï,3 45,d one,le ad,45 6,01 2,ra il,'
    '67 8,hell o,u ld,( ):,p ac,c as,Ġsp ac,n in,Ġ !!,çĶ Ł,Y o,ç ľ,78 9,ðŁ ĳ,Ġsp a,æĺ ¯,w ant,we i,p as,r l,'
    'ĠðŁ ĳ'
)
# What transformers.js makes of texts (its tests/models/gpt2/test_tokenization_gpt2.js, "Xenova/gpt2"): the tokens in the
# spelling of vocab.json. Numbers of other scripts are bytes alone: the merges above know none of theirs.
GPT2_TOKENS = {
    "You should've done this": "You Ġshould 've Ġdone Ġthis",
    "0123456789 0 10 100 1000": "01 23 45 67 89 Ġ0 Ġ10 Ġ100 Ġ1000",
    "A\n'll !!to?'d''d of, can't.": "A Ċ 'll Ġ!! to ?' d '' d Ġof , Ġcan 't .",
    "def main():\n\tpass": "def Ġmain (): Ċ ĉ pass",
    "UNwant\u00e9d,running": "UN want Ã© d , running",
    "1\x002\ufffd3": "1 Ā 2 ï¿½ 3",
    "\u751f\u6d3b\u7684\u771f\u8c1b\u662f": "çĶŁ æ ´ » çļĦ çľ Ł è ° Ľ æĺ¯",
    "   leading space": "Ġ Ġ Ġleading Ġspace",
    "trailing space   ": "tra iling Ġspace Ġ Ġ Ġ",
    "test $1 R2 #3 \u20ac4": "test Ġ$ 1 ĠR 2 Ġ# 3 ĠâĤ¬ 4",
    "you\u2026\u00a0\u00a0you\u2026\u00a0\u00a0": "you âĢ¦ Âł Âł you âĢ¦ ÂłÂł",
    "weird \uff5e edge \uff5e case": "we ird Ġï ½ ŀ Ġedge Ġï ½ ŀ Ġcase",
    "hello \U0001f44b world \U0001f30d": "hello ĠðŁĳ ĭ Ġworld ĠðŁ Į į",  # of GPT-3-Encoder (Encoder.test.js)
}

def tokenizer_files(folder):
    """vocab.json and merges.txt of a GPT-2 that knows GPT2_MERGES alone."""
    pairs = [pair.split(" ") for pair in GPT2_MERGES.split(",")]
    names = [*gpt.gpt2_bytes(), *(a + b for a, b in pairs), "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in pairs), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return names

def test_gpt2s_tokens_are_those_of_another_implementation(tmp_path):
    names = tokenizer_files(tmp_path)
    tokenizer = gpt.gpt2_tokenizer(tmp_path)
    for text, tokens in GPT2_TOKENS.items():
        ids = tokenizer.encode(text)
        assert [names[i] for i in ids] == tokens.split(" ")
        assert tokenizer.decode(ids) == text

HARD_FOR_GPT2 = ["\u0663\u0664 x\u00b2\u2167", "\U0001f600\U0001f1e9", "\x00\x1c\x7f\x85 \u3000", "It's 'S \u2019s", ""]

@pytest.mark.parametrize("text", HARD_FOR_GPT2)
def test_gpt2s_pieces_hold_the_whole_text_and_part_letters_numbers_and_space(text, tmp_path):
    pieces = gpt.gpt2_pieces(text)
    assert "".join(pieces) == text
    for piece in pieces:
        kinds = {max("LNZ".find(unicodedata.category(x)[0]), -1) for x in piece.lstrip(" ")}
        assert len(kinds) <= 1 or piece.isspace() or piece.startswith("'")
    tokenizer_files(tmp_path)
    tokenizer = gpt.gpt2_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text

def test_half_a_surrogate_pair_and_files_of_another_tokenizer_are_refused_in_one_line(tmp_path):
    tokenizer_files(tmp_path)
    with pytest.raises(vpd.BadInput, match=r"half a surrogate pair, '\\ud83d'"):
        gpt.gpt2_tokenizer(tmp_path).encode("a\ud83db")
    numbers = json.loads((tmp_path / "vocab.json").read_text())
    numbers["!"], numbers["a"] = numbers["a"], numbers["!"]
    (tmp_path / "vocab.json").write_text(json.dumps(numbers))
    with pytest.raises(vpd.BadInput, match="does not number tokens as GPT-2 does"):
        gpt.gpt2_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(vpd.BadInput, match="lacks vocab.json or merges.txt"):
        gpt.gpt2_tokenizer(tmp_path)

def test_a_bin_takes_the_tokenizer_of_a_gpt2_folder_only_if_the_model_has_as_many_tokens(tmp_path):
    names = tokenizer_files(tmp_path / "gpt2")
    np.arange(4000, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    for vocabulary, serves in ((len(names), True), (len(names) - 2, False)):
        ids, tokenizer = gpt.load_corpus(str(tmp_path / "ids.bin"), vocabulary, tmp_path / "gpt2")
        assert len(ids) == 4000 and (tokenizer is not None) == serves
    assert gpt.Tokenizer([], gpt2=True).decode([39, 72, 50256]) == "Hi<50256>"

HARD_TEXTS = ["", " ", "\r\n\t x", "naïve 字 \U0001f600 e\u0301", "a\x00b", "____init____(self)", "٣٤ x²"]
HARD_TEXTS += ["\n\n\n    \n"]

@pytest.mark.parametrize("text", HARD_TEXTS)
def test_the_tokenizer_loses_nothing(text):
    tokenizer = gpt.Tokenizer.learn(TEXT, 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text

def merge(word, pair, token):
    """The word with every occurrence of the pair, from the left, replaced by the token."""
    merged, i = [], 0
    while i < len(word):
        together = tuple(word[i : i + 2]) == pair
        merged.append(token if together else word[i])
        i += 2 if together else 1
    return merged

def test_the_tokenizer_learns_the_merges_of_byte_pair_encoding_done_from_scratch_each_time():
    tokenizer = gpt.Tokenizer.learn(TEXT, 320)
    words = [list(piece.encode()) for piece in gpt.PIECES.findall(TEXT)]
    for i, pair in enumerate(tokenizer.merges):
        count = collections.Counter(p for word in words for p in zip(word, word[1:]))
        overlapping = count[pair] / max(count.values())  # "aaa" counts the pair twice, in both ways of counting
        assert overlapping == 1.0
        words = [merge(word, pair, 256 + i) for word in words]
    # and encoding applies them in that order
    assert [t for word in words for t in word] == tokenizer.encode(TEXT).tolist()

def test_white_space_before_a_word_is_one_piece_but_for_one_space_that_belongs_to_the_word():
    assert gpt.PIECES.findall("a b\n\n    c  d __e(3) \t") == ["a", " b", "\n\n    ", "c", "  ", "d", " __", "e", "(", "3", ")", " \t"]

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
    "not UTF-8": ("latin.txt", b"na\xefve text" * 1000, "utf-8"),
    "odd length": ("odd.bin", b"abc", "uint16 or uint32"),
}

@pytest.mark.parametrize("case", BAD)
def test_bad_data_ends_in_one_line_and_leaves_no_folder(case, command, tmp_path):
    name, content, message = BAD[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=message) as stopped:
        command("--data", tmp_path / name, "--out", tmp_path / "run")
    assert stopped.value.code.startswith("error: ") and "\n" not in stopped.value.code
    assert not (tmp_path / "run").exists()

@pytest.mark.parametrize("vocabulary", [4, 200, 50_257, 65_536, 100_000, 262_144])
def test_a_bin_is_read_as_what_it_is_uint16_or_uint32(vocabulary, tmp_path, capsys):
    ids = np.random.default_rng(0).integers(0, vocabulary, 5000)
    for dtype in (np.uint16, np.uint32)[vocabulary > 1 << 16 :]:
        ids.astype(dtype).tofile(tmp_path / "ids.bin")
        assert gpt.read_bin(tmp_path / "ids.bin").tolist() == ids.tolist()
        assert ("is read as int32" in capsys.readouterr().err) == (dtype is np.uint32)

def test_ids_beyond_uint16_are_kept_from_text_to_model(tmp_path, monkeypatch):
    tokenizer = gpt.Tokenizer([(97, 98)] * 66_000)  # all are the same merge: the last number counts
    assert tokenizer.encode("ab").tolist() == [256 + 65_999]
    batch = gpt.sample(np.full(4000, 66_255, np.uint32), 8, 2, False, torch.Generator())
    assert (batch == 66_255).all()

def test_a_bin_of_any_ids_gets_an_embedding_that_holds_them(command, small, tmp_path, capsys):
    ids = np.random.default_rng(0).integers(0, 50_257, 4000)
    ids[7] = 50_256
    ids.astype(np.uint16).tofile(tmp_path / "ids.bin")
    settings = gpt.SETTINGS | {"data": str(tmp_path / "ids.bin")}
    opened = gpt.prepare_run(settings, tmp_path / "run", "cpu")
    assert opened.model.tokens.num_embeddings == 50_304  # 786 * 64
    assert "embedding has 50304 tokens" in capsys.readouterr().err
    gpt.save_target(gpt.GPT(dataclasses.replace(small.shape, vocabulary=50_000)), {"curve": [(0, 1.0)]}, tmp_path / "run")
    with pytest.raises(SystemExit, match="token id 50256, but the target's vocabulary has 50000"):
        command("--init-from", tmp_path / "run", "--out", tmp_path / "other")

def small_preset(**changes):
    config = vpd.Config(steps=6, faithfulness_steps=5, G_type="transformer", G_width=32, G_blocks=1, G_heads=2)
    C = {"attn.q": 4, "attn.o": 4, "mlp.up": 6, "mlp.down": 6}
    config = dataclasses.replace(config, **changes)
    return gpt.Preset(gpt.Shape(2, 16, 2, 8, 270), 4, 30, 3e-3, C, config)

@pytest.fixture
def small(tmp_path, monkeypatch):
    """The small preset, as `laptop`, and a text in text.txt."""
    monkeypatch.setitem(gpt.PRESETS, "laptop", small_preset())
    monkeypatch.setattr(gpt, "EVALUATED", 128)
    monkeypatch.setattr(gpt, "CHECKPOINT_SECONDS", -1)  # after every step
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return small_preset()

def test_the_evaluation_set_depends_on_the_target_alone(small):
    ids = np.arange(50_000, dtype=np.uint16)
    expected = gpt.validation_batches(ids, small, "cpu")
    assert sum(batch.numel() for batch in expected) == 128
    for steps, batch in ((1, 4), (100, 1), (6, 64)):
        changed = dataclasses.replace(small_preset(steps=steps), batch=batch)
        assert all(map(torch.equal, expected, gpt.validation_batches(ids, changed, "cpu")))
    some = gpt.validation_batches(ids, small, "cpu", 64)
    assert len(some) == 1 and some[0].equal(expected[0])

def test_a_step_in_bfloat16_has_the_losses_of_float32_and_keeps_delta_and_parameters_in_float32():
    torch.manual_seed(0)
    model = gpt.GPT(small_preset().shape).eval()
    C = {f"h.{i}.{matrix}": number for i in range(2) for matrix, number in small_preset().C.items()}
    batch, values = torch.randint(270, (4, 8)), {}
    for bf16 in (False, True):
        config = small_preset(bf16=bf16).config
        training = vpd.initialize(model, C, batch, config)
        values[bf16] = vpd.training_step(model, batch, vpd.kl, training, config)
        state = [*training.decomposition.U.values(), *training.decomposition.G.parameters()]
        assert all(x.dtype == x.grad.dtype == torch.float32 for x in state)
    (delta,) = [name for name in values[True] if name.startswith("delta")]
    assert values[True][delta] == values[False][delta]  # never in bfloat16
    assert values[True]["stochastic"] != values[False]["stochastic"]  # the forward passes are
    assert values[True] == pytest.approx(values[False], rel=0.1)
    with torch.no_grad(), vpd.precision("cpu", True):
        logits = model(batch)
    assert logits.dtype == torch.float32 and not logits.equal(model(batch))  # the products are, the logits are not

def results(folder):
    """What a run computed, without how long it took."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in ("minutes, target", "minutes, decomposition", "minutes, evaluation", "tokens per second"):
        assert metrics["figures"].pop(name) > 0
    log = [json.loads(line) for line in (folder / "decomposition" / "log.jsonl").read_text().splitlines()]
    for line in log:
        del line["seconds"]
    return metrics, log, torch.load(folder / "decomposition" / "checkpoint.pt", weights_only=True)["U"]

def equal(one, other):
    (metrics, log, U), (its_metrics, its_log, its_U) = results(one), results(other)
    return metrics == its_metrics and log == its_log and all(x.equal(its_U[path]) for path, x in U.items())

def test_a_whole_run_in_small_is_what_its_files_say(command, small, tmp_path, monkeypatch):
    printed = command("--data", tmp_path / "text.txt", "--out", tmp_path / "run")
    metrics, log, _ = results(tmp_path / "run")
    figures = metrics["figures"]
    assert figures["C"] == 2 * 20 and set(metrics["matrices"]) >= {"h.0.attn.q", "h.1.mlp.down"}
    assert figures["evaluated positions"] == 128
    for name in ("L0", "L0 above 0.1", "alive"):  # the log's on all of the evaluation set, too
        assert log[-1][f"validation {name}"] == pytest.approx(figures[name])
    assert log[-1]["validation KL rounded at 0"] == pytest.approx(figures["divergence, rounded at 0"], rel=1e-4)
    assert metrics["curve"][-1][1] < metrics["curve"][0][1]  # it learned
    for name, x in figures.items():
        assert f"{name} " in printed and (isinstance(x, int) or f"{x:.4g}" in printed)
    assert metrics["seed"] == 0 and metrics["data"].endswith("text.txt")

    # independently: the cross-entropy of the target, and above it of the model with sums of subcomponents as weights
    ids, tokenizer = gpt.load_corpus(metrics["data"], 270, tmp_path / "run")
    model, _ = gpt.load_target(tmp_path / "run")
    batches = gpt.validation_batches(ids, small, "cpu")
    ce = gpt.validation_loss(model, batches)
    assert ce == pytest.approx(figures["loss of the target"], rel=1e-5)
    text = "".join(tokenizer.decode(row) for batch in batches for row in batch.tolist())
    bits = ce / math.log(2) * 128 / len(text.encode())
    assert bits == pytest.approx(figures["bits per byte"], rel=0.01 if "\ufffd" in text else 1e-5)
    saved = torch.load(tmp_path / "run" / "decomposition" / "checkpoint.pt", weights_only=True)
    for path, U in saved["U"].items():
        model.get_submodule(path).weight.data = (saved["V"][path] @ U).T.detach()
    above = gpt.validation_loss(model, batches) - ce
    assert above == pytest.approx(figures["loss above target, unmasked"], abs=1e-4)

    # what is there is not done again
    monkeypatch.setattr(gpt, "open_run", lambda *_: pytest.fail("done again"))
    assert "loss of the target" in command("--data", tmp_path / "text.txt", "--out", tmp_path / "run")

def test_a_run_killed_in_any_stage_goes_on_when_its_command_is_repeated_and_ends_the_same(
    command, small, tmp_path, monkeypatch
):
    monkeypatch.setattr(gpt, "CHECKPOINT_SECONDS", -1)  # after every step
    settings = ("--data", tmp_path / "text.txt", "--seed", "3", "--C", "0.5")
    command(*settings, "--out", tmp_path / "whole")

    def dies(module, name, after):
        function, calls = getattr(module, name), iter(range(10_000))

        def mortal(*arguments, **options):
            if next(calls) == after:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return module, name, mortal

    deaths = [dies(gpt, "write", 1), dies(gpt, "sample", 20), dies(vpd, "training_step", 3), dies(vpd, "evaluate", 0)]
    for death in deaths:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*death)
            command(*settings, "--out", tmp_path / "killed")
        assert (tmp_path / "killed" / "target_unfinished.pt").exists() == (death[1] == "sample")
    for name, value in (("--seed", 4), ("--C", 2), ("--steps", 7), ("--data", "other.txt")):
        with pytest.raises(SystemExit, match=f"made with another {name}: .* choose another --out"):
            command(*settings, name, value, "--out", tmp_path / "killed")
    command(*settings, "--out", tmp_path / "killed")
    assert equal(tmp_path / "killed", tmp_path / "whole")
    with pytest.raises(SystemExit, match="made with another --steps"):
        command("--out", tmp_path / "whole", "--report", "--steps", "7")
    with pytest.raises(SystemExit, match="holds something else than a run"):
        command("--out", tmp_path)

DRIVER = """
import dataclasses, functools, sys
import train_gpt2 as gpt, vpd
from test_train_gpt2 import small_preset
distributed = gpt.torch.distributed
distributed.init_process_group = functools.cache(distributed.init_process_group)  # once for three commands
destroy, distributed.destroy_process_group = distributed.destroy_process_group, lambda: None

gpt.EVALUATED = 64
gpt.CHECKPOINT_SECONDS = -1
gpt.PRESETS["laptop"] = dataclasses.replace(small_preset(steps=10), target_steps=5)
vpd.draw_run = lambda *_: None
step = vpd.training_step

def mortal(model, batch, divergence, training, config):
    if training.step == 6:
        raise KeyboardInterrupt
    return step(model, batch, divergence, training, config)

data, folder = sys.argv[1:]
for out, vpd.training_step in (("whole", step), ("killed", mortal), ("killed", step)):
    sys.argv[1:] = ["--device", "cpu", "--data", data, "--out", f"{folder}/{out}"]
    try:
        gpt.main()
    except KeyboardInterrupt:
        pass
distributed.barrier()
destroy()
"""

def test_two_processes_of_torchrun_go_on_where_they_were_stopped_and_end_the_same(small, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    here = Path(gpt.__file__).parent
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = {"PYTHONPATH": f"{here}:{here}/tests", "OMP_NUM_THREADS": "1"}
    arguments = [*launch, tmp_path / "driver.py", tmp_path / "text.txt", tmp_path]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=os.environ | paths)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("loss of the target") == 2  # of two finished runs, each printed by one process
    made = json.loads((tmp_path / "killed" / "decomposition" / "run.json").read_text())
    assert made["run"]["number of processes"] == 2
    assert equal(tmp_path / "whole", tmp_path / "killed")

def test_a_gpt2_folder_is_decomposed_and_asked_about_prompts_after_it_is_gone(command, small, tmp_path):
    folder, out = tmp_path / "gpt2", tmp_path / "run"
    names = tokenizer_files(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')  # as downloaded: of another kind
    gpt2_folder(folder, checkpoint(layers=1, width=64, vocabulary=len(names)))
    command("--init-from", folder, "--data", tmp_path / "text.txt", "--out", out)
    metrics = json.loads((out / "metrics.json").read_text())
    C = [metrics["matrices"][f"h.0.{matrix}"]["C"] for matrix in small.C]
    assert C == [16, 16, 24, 24]  # of width 64, where the preset has 16: four times as many
    assert metrics["curve"] == [] and not any("recovered" in name for name in metrics["figures"])
    original, _ = gpt.load_target(folder)
    shutil.rmtree(folder)
    command("--out", out, "--circuit", "def main", "--token", " this")
    circuit = json.loads((out / "circuit.json").read_text())
    assert [names[i] for i in circuit["ids"]] == ["def", "Ġmain"] and names[circuit["token"]] == "Ġthis"
    ids = torch.randint(len(names), (2, 8))
    assert gpt.load(out).model(ids).equal(original(ids))

def test_a_gpt2_without_tokenizer_is_decomposed_on_ids_and_its_page_shows_numbers(command, small, tmp_path):
    folder, out = gpt2_folder(tmp_path / "gpt2", checkpoint(layers=1, width=64, vocabulary=270)), tmp_path / "run"
    np.random.default_rng(0).integers(0, 270, 4000).astype(np.uint16).tofile(tmp_path / "ids.bin")
    with pytest.raises(SystemExit, match="lacks vocab.json and merges.txt"):
        command("--init-from", folder, "--data", tmp_path / "text.txt", "--out", out)
    assert not out.exists()
    command("--init-from", folder, "--data", tmp_path / "ids.bin", "--out", out)
    assert not (out / "tokens.npy").exists()  # a .bin is not copied
    command("--out", out, "--report")
    page = (out / "report.html").read_text()
    shown = set(re.findall("<code>(.*?)</code>", page))
    assert shown and shown <= {f" {i}" for i in range(270)}
    with pytest.raises(SystemExit, match="has no tokenizer for prompts"):
        command("--out", out, "--report", "def")

def test_a_batch_that_does_not_divide_over_the_processes_is_refused(small, monkeypatch):
    monkeypatch.setattr(vpd, "world_size", lambda: 3)
    with pytest.raises(vpd.BadInput, match="batch of 4 does not divide over 3 processes"):
        gpt.fit_preset(gpt.SETTINGS, small.shape)

class GatedMLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, 24), nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

class Variant(nn.Module):
    """A gated MLP, RMSNorm, and no positions table."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.tokens = shape, nn.Embedding(shape.vocabulary, shape.width)
        self.h = nn.ModuleList(nn.Module() for _ in range(shape.layers))
        for layer in self.h:
            layer.norms = nn.ModuleList([nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)])
            layer.attn, layer.mlp = gpt.Attention(shape), GatedMLP(shape.width)
        self.norm = nn.RMSNorm(shape.width)

    def forward(self, ids):
        x = self.tokens(ids)
        for layer in self.h:
            x = x + layer.attn(layer.norms[0](x))
            x = x + layer.mlp(layer.norms[1](x))
        return self.norm(x) @ self.tokens.weight.T

def test_another_architecture_runs_and_is_read_when_only_the_class_and_its_names_are_changed(
    command, small, tmp_path, monkeypatch
):
    C = {"attn.q": 4, "attn.k": 4, "attn.v": 4, "attn.o": 4, "mlp.gate": 5, "mlp.up": 5, "mlp.down": 5}
    monkeypatch.setitem(gpt.PRESETS, "laptop", dataclasses.replace(small, C=C))
    monkeypatch.setattr(gpt, "GPT", Variant)
    monkeypatch.setattr(gpt, "EMBEDDINGS", ("tokens",))
    monkeypatch.setattr(gpt, "readout", lambda model: (model.tokens.weight * model.norm.weight).detach())
    command("--data", tmp_path / "text.txt", "--out", tmp_path / "run")
    matrices = json.loads((tmp_path / "run" / "metrics.json").read_text())["matrices"]
    assert {path: of["C"] for path, of in matrices.items()} == {f"h.{i}.{m}": n for i in (0, 1) for m, n in C.items()}
    command("--out", tmp_path / "run", "--report", "def first", "--circuit", "def first")
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'id="h.0.mlp.gate:' in page and 'id="h.1.mlp.down:' in page
    graph = json.loads((tmp_path / "run" / "circuit.json").read_text())["pruned_graph"]
    assert graph["edges"] and "positions" not in {node["matrix"] for node in graph["nodes"]}
