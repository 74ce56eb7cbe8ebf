"""The language model, its tokenizer and data, and a whole run in small."""

import collections
import dataclasses
import functools
import itertools
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
from conftest import logged, same, tiny_preset, use_preset

TEXT = "def first(self, x):\n    return self.first(x) + 12\n\n\nclass Näme:\n\tdef second(self): return 'ß' \n" * 40

def checkpoint(layers=2, width=128, context=10, vocabulary=11):
    """A random GPT-2 checkpoint in Hugging Face's layout."""
    torch.manual_seed(0)
    shapes = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}
    matrices = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    norms = ["ln_f"]
    for i in range(layers):
        for name, (d_in, d_out) in matrices.items():
            shapes |= {f"h.{i}.{name}.weight": (d_in, d_out), f"h.{i}.{name}.bias": (d_out,)}
        norms += [f"h.{i}.ln_1", f"h.{i}.ln_2"]
    for norm in norms:
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}

def logits_by_hand(state, ids, heads, epsilon):
    """GPT-2 of one sequence in float64, position by position and head by head, straight from the checkpoint."""
    state = {name: x.double().numpy() for name, x in state.items()}
    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        return x * state[name + ".weight"] + state[name + ".bias"]
    def linear(x, name):
        return x @ state[name + ".weight"] + state[name + ".bias"]
    x = state["wte.weight"][ids] + state["wpe.weight"][: len(ids)]
    d = x.shape[1] // heads
    for i in range(sum(name.endswith("ln_1.bias") for name in state)):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").reshape(len(ids), 3, heads, d)
        y = np.zeros((len(ids), heads, d))
        for head in range(heads):
            for t in range(len(ids)):
                q = qkv[t, 0, head]
                weights = [math.exp(q @ qkv[s, 1, head] / math.sqrt(d)) for s in range(t + 1)]
                for s, weight in enumerate(weights):
                    y[t, head] += weight / sum(weights) * qkv[s, 2, head]
        x = x + linear(y.reshape(x.shape), f"h.{i}.attn.c_proj")
        u = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + linear(u, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ state["wte.weight"].T

def write_safetensors(file, state, dtype):
    """A .safetensors file, written by hand."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    header = {"__metadata__": {"format": "pt"}}
    raw = b""
    for name, x in state.items():
        content = x.to(dtypes[dtype]).contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [len(raw), len(raw) + len(content)]}
        raw += content
    header = json.dumps(header).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw)

def gpt2_folder(folder, state, dtype="F32", **changes):
    """A GPT-2's weights and config.json, as downloaded."""
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", state, dtype)
    layers = sum(name.endswith("ln_1.bias") for name in state)
    config = {"n_layer": layers, "n_head": 2, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder

AS_DOWNLOADED = [("", "F32", 1e-3), ("", "F16", 0.02), ("transformer.", "BF16", 0.1)]

@pytest.mark.parametrize("prefix, dtype, tolerance", AS_DOWNLOADED)
def test_a_folder_as_it_is_downloaded_gives_the_logits_of_gpt2_computed_by_hand(prefix, dtype, tolerance, tmp_path):
    state = checkpoint()
    extras = {"lm_head.weight": state["wte.weight"], f"{prefix}h.0.attn.bias": torch.ones(1, 1, 10, 10)}
    renamed = {prefix + name: x for name, x in state.items()}
    gpt2_folder(tmp_path, renamed | extras, dtype, n_head=4, layer_norm_epsilon=0.5)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    model, _ = gpt.load_target(tmp_path)
    logits = model(torch.tensor([ids])).detach().numpy()
    assert abs(logits - logits_by_hand(state, ids, heads=4, epsilon=0.5)).max() < tolerance

NOT_GPT2 = {  # what is wrong: tensors, settings in config.json
    "h.0.mlp.gate.weight": ({"h.0.mlp.gate.weight": torch.zeros(2)}, {}),
    "h.0.mlp.up.weight": ({"h.0.mlp.c_fc.weight": torch.zeros(4, 4)}, {}),
    "lm_head.weight": ({"lm_head.weight": torch.zeros(11, 128)}, {}),  # dropped, it would give other logits
    "activation": ({}, {"activation_function": "relu"}),
}

@pytest.mark.parametrize("wrong", NOT_GPT2)
def test_a_checkpoint_that_is_not_gpt2_is_refused_by_the_name_of_what_is_wrong(wrong, tmp_path):
    tensors, settings = NOT_GPT2[wrong]
    folder = gpt2_folder(tmp_path, checkpoint(layers=1) | tensors, **settings)
    with pytest.raises(vpd.BadInput, match=wrong) as refusal:
        gpt.load_target(folder)
    assert "\n" not in str(refusal.value)

# Those of GPT-2's 50,000 merges that can act on the texts below, in their order (a merge of "a" and "b" is "a b").
GPT2_MERGES = (
    "Ġ t,h e,i n,o n,Ġ s,Ġ w,Ġ o,Ġ c,i s,a n,o r,e s,in g,o u,Ġ m,Ġo f,Ġ d,a s,Ġt h,l l,s t,v e,a c,l d,c e,i l,"
    "Ġ 1,Ġ R,u l,a in,es t,t h,0 0,e l,ou ld,Ġs h,Ġth is,r a,â Ģ,Ġc an,Ġd o,' t,Ġw or,0 1,on e,ac e,as s,Ġs p,"
    "a il,Ġ 0,t e,e ll,n e,Ġ $,n g,Ġsh ould,s s,00 0,Ġd on,Ġ1 0,e f,1 0,Ġwor ld,' ve,1 2,' ll,Ġc a,Ġ #,l ing,"
    "Ġm ain,âĢ ¦,t o,s h,Y ou,o f,Ġd one,or ld,Ġ1 00,Â ł,a i,2 3,t r,4 5,Ġsp ace,Ġ â,il i,) :,m a,3 4,s p,l in,"
    "ou l,d e,he l,1 00,6 7,! !,( ),7 8,5 6,¿ ½,ï ¿½,d ef,il ing,l i,8 9,d o,Âł Âł,t es,Ġ !,c an,h i,l o,th is,"
    "y ou,p ass,c a,w orld,' ',Ġsh o,y o,? ',Ġ1 000,ð Ł,h o,Ĥ ¬,p a,d on,t est,t ra,12 3,p ace,Ġâ Ĥ¬,ell o,"
    "ail ing,m ain,Ġ ðŁ,he ll,1 000,sp ace,h is,h ou,Ġm a,ç Ķ,ll o,ç ļ,çļ Ħ,w o,sh ould,æ ĺ,23 4,Ġw o,â Ĥ¬,3 45,"
    "d one,45 6,01 2,ra il,67 8,hell o,u ld,( ):,p ac,Ġsp ac,Ġ !!,çĶ Ł,Y o,ç ľ,78 9,ðŁ ĳ,Ġsp a,æĺ ¯,p as,r l,"
    "ĠðŁ ĳ"
)
# What transformers.js makes of texts (tests/models/gpt2/test_tokenization_gpt2.js, "Xenova/gpt2"): the tokens in the
# spelling of vocab.json. Numbers of other scripts are bytes alone: the merges above know none of theirs.
GPT2_TOKENS = {
    "You should've done this": "You Ġshould 've Ġdone Ġthis",
    "0123456789 0 10 100 1000": "01 23 45 67 89 Ġ0 Ġ10 Ġ100 Ġ1000",
    "A\n'll !!to?'d''d of, can't.": "A Ċ 'll Ġ!! to ?' d '' d Ġof , Ġcan 't .",
    "def main():\n\tpass": "def Ġmain (): Ċ ĉ pass",
    "1\x002\ufffd3": "1 Ā 2 ï¿½ 3",
    "\u751f\u6d3b\u7684\u771f\u8c1b\u662f": "çĶŁ æ ´ » çļĦ çľ Ł è ° Ľ æĺ¯",
    "trailing space   ": "tra iling Ġspace Ġ Ġ Ġ",
    "test $1 R2 #3 \u20ac4": "test Ġ$ 1 ĠR 2 Ġ# 3 ĠâĤ¬ 4",
    "you\u2026\u00a0\u00a0you\u2026\u00a0\u00a0": "you âĢ¦ Âł Âł you âĢ¦ ÂłÂł",
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
        assert [names[i] for i in tokenizer.encode(text)] == tokens.split(" ")

HARD_TEXTS = [*GPT2_TOKENS, "", " ", "\r\n\t x", "\n\n\n    \n", "a\x00b", "____init____(self)", "naïve e\u0301"]
HARD_TEXTS += ["\u0663\u0664 x\u00b2\u2167", "\U0001f600\U0001f1e9", "\x00\x1c\x7f\x85 \u3000", "It's 'S \u2019s"]

def test_both_tokenizers_lose_nothing(tmp_path):
    tokenizer_files(tmp_path)
    for tokenizer in (gpt.gpt2_tokenizer(tmp_path), gpt.Tokenizer.learn(TEXT, 300)):
        for text in HARD_TEXTS:
            assert tokenizer.decode(tokenizer.encode(text)) == text

def test_files_of_another_tokenizer_are_refused_in_one_line(tmp_path):
    tokenizer_files(tmp_path)
    numbers = json.loads((tmp_path / "vocab.json").read_text())
    swapped = {"!": numbers["a"], "a": numbers["!"]}
    (tmp_path / "vocab.json").write_text(json.dumps(numbers | swapped))
    with pytest.raises(vpd.BadInput, match="does not number tokens as GPT-2 does"):
        gpt.gpt2_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(vpd.BadInput, match="lacks vocab.json or merges.txt"):
        gpt.gpt2_tokenizer(tmp_path)

def write_ids(folder, vocabulary):
    """Random token ids in a .bin, the last one the largest."""
    ids = np.random.default_rng(0).integers(0, vocabulary, 4000).astype(np.uint16)
    ids[-1] = vocabulary - 1
    ids.tofile(folder / "ids.bin")
    return folder / "ids.bin"

def test_a_bin_takes_the_tokenizer_of_a_gpt2_folder(tmp_path):
    names = tokenizer_files(tmp_path / "gpt2")
    ids, tokenizer = gpt.load_corpus(str(write_ids(tmp_path, 4000)), len(names), tmp_path / "gpt2")
    assert len(ids) == 4000 and tokenizer.decode([0]) == "!"
    assert gpt.Tokenizer([], gpt2=True).decode([39, 72, 50256]) == "Hi<50256>"

def merge(word, pair, token):
    """The word with every occurrence of the pair, from the left, replaced by the token."""
    merged = []
    i = 0
    while i < len(word):
        together = tuple(word[i : i + 2]) == pair
        merged.append(token if together else word[i])
        i += 2 if together else 1
    return merged

def test_the_tokenizer_learns_the_merges_of_byte_pair_encoding_done_from_scratch_each_time():
    tokenizer = gpt.Tokenizer.learn(TEXT, 320)
    words = [list(piece.encode()) for piece in gpt.PIECES.findall(TEXT)]
    for i, pair in enumerate(tokenizer.merges):
        count = collections.Counter()
        for word in words:
            count.update(zip(word, word[1:]))
        assert count[pair] == max(count.values())
        words = [merge(word, pair, 256 + i) for word in words]
    # and encoding applies them in that order
    assert sum(words, []) == tokenizer.encode(TEXT).tolist()

def test_white_space_before_a_word_is_one_piece_but_for_one_space_that_belongs_to_the_word():
    pieces = gpt.PIECES.findall("a b\n\n    c  d __e(3) \t")
    assert pieces == ["a", " b", "\n\n    ", "c", "  ", "d", " __", "e", "(", "3", ")", " \t"]

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

BAD_DATA = [
    ("missing.txt", None, "cannot be read"),
    ("empty.txt", b"", "is empty"),
    ("short.txt", b"hello world", "at least 640"),
    ("latin.txt", b"na\xefve text" * 1000, "utf-8"),
    ("odd.bin", b"abc", "uint16 or uint32"),
]

@pytest.mark.parametrize("name, content, message", BAD_DATA)
def test_bad_data_ends_in_one_line_and_leaves_no_folder(name, content, message, refused, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(message, "--data", tmp_path / name, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()

@pytest.mark.parametrize("vocabulary, dtype", [(4, "uint16"), (4, "uint32"), (65_536, "uint16"), (262_144, "uint32")])
def test_a_bin_is_read_as_what_it_is_uint16_or_uint32(vocabulary, dtype, tmp_path, capsys):
    ids = np.random.default_rng(0).integers(0, vocabulary, 5000).astype(dtype)
    ids.tofile(tmp_path / "ids.bin")
    assert gpt.read_bin(tmp_path / "ids.bin").tolist() == ids.tolist()
    assert ("is read as int32" in capsys.readouterr().err) == (dtype == "uint32")

def test_ids_beyond_uint16_are_kept_from_text_to_model():
    tokenizer = gpt.Tokenizer([(97, 98)] * 66_000)  # all are the same merge: the last number counts
    ids = tokenizer.encode("ab" * 4000)
    assert (gpt.sample(ids, 8, 2, False, torch.Generator()) == 256 + 65_999).all()

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
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return preset

def test_the_evaluation_set_depends_on_the_target_alone(small):
    ids = np.arange(50_000, dtype=np.uint16)
    expected = gpt.validation_batches(ids, small, "cpu")
    assert sum(batch.numel() for batch in expected) == 256
    changed = dataclasses.replace(tiny_preset(steps=100), batch=64)
    assert same(gpt.validation_batches(ids, changed, "cpu"), expected)

def test_under_autocast_products_are_bfloat16_and_logits_are_not():
    torch.manual_seed(0)
    model = gpt.GPT(tiny_preset().shape)
    batch = torch.randint(280, (4, 16))
    with vpd.precision("cpu", True):
        logits = model(batch)
    assert logits.dtype == torch.float32 and not logits.equal(model(batch))

def results(folder):
    """What a run computed, without how long it took."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in ("minutes, target", "minutes, decomposition", "minutes, evaluation", "tokens per second"):
        assert metrics["figures"].pop(name) > 0
    saved = torch.load(folder / "decomposition" / "checkpoint.pt", weights_only=True)
    return {"metrics": metrics, "log": logged(folder / "decomposition"), "U": saved["U"], "V": saved["V"]}

def test_a_whole_run_in_small_is_what_its_files_say(command, small, tmp_path, monkeypatch):
    settings = ("--data", tmp_path / "text.txt", "--out", tmp_path / "run")
    printed = command(*settings)
    made = results(tmp_path / "run")
    metrics = made["metrics"]
    figures = metrics["figures"]
    assert figures["C"] == 2 * (4 * 22 + 2 * 56) and figures["evaluated positions"] == 256
    last_line = made["log"][-1]
    for name in ("L0", "L0 above 0.1", "alive"):  # the log's on all of the evaluation set, too
        assert last_line[f"validation {name}"] == pytest.approx(figures[name])
    assert last_line["validation divergence, rounded at 0"] == pytest.approx(figures["divergence, rounded at 0"], rel=1e-4)
    for name, x in figures.items():
        assert f"{name} " in printed and (isinstance(x, int) or f"{x:.4g}" in printed)
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

def dies(patch, module, name, after):
    """Let a function be interrupted when it is called for the so-many-th time."""
    function = getattr(module, name)
    calls = itertools.count()
    def mortal(*arguments, **options):
        if next(calls) == after:
            raise KeyboardInterrupt
        return function(*arguments, **options)
    patch.setattr(module, name, mortal)

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

def test_a_run_that_another_process_makes_is_refused_and_a_refused_run_leaves_no_folder(refused, small, tmp_path):
    text = tmp_path / "text.txt"
    with vpd.own_folder(tmp_path / "run", "run.lock"):
        refused("is in use by another process", "--data", text, "--out", tmp_path / "run")
    refused("cannot be read", "--data", tmp_path / "none.txt", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()

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
    command("--out", out, "--circuit", "def main", "--token", " this")
    circuit = json.loads((out / "circuit.json").read_text())
    assert [names[i] for i in circuit["ids"]] == ["def", "Ġmain"] and names[circuit["token"]] == "Ġthis"
    ids = torch.randint(len(names), (2, 8))
    assert gpt.load(out).model(ids).equal(original(ids))

def test_a_gpt2_without_tokenizer_is_decomposed_on_ids_and_its_page_shows_numbers(command, refused, small, tmp_path):
    folder = gpt2_folder(tmp_path / "gpt2", checkpoint(layers=1, width=64, vocabulary=280))
    out = tmp_path / "run"
    refused("lacks vocab.json and merges.txt", "--init-from", folder, "--data", tmp_path / "text.txt", "--out", out)
    assert not out.exists()
    command("--init-from", folder, "--data", write_ids(tmp_path, 280), "--out", out)
    assert not (out / "tokens.npy").exists()  # a .bin is not copied
    command("--out", out, "--report")
    shown = set(re.findall("<code>(.*?)</code>", (out / "report.html").read_text()))
    assert shown and shown <= {f" {i}" for i in range(280)}
    refused("has no tokenizer for prompts", "--out", out, "--report", "def")

def test_a_batch_that_does_not_divide_over_the_processes_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr(vpd, "world_size", lambda: 3)
    with pytest.raises(vpd.BadInput, match="batch of 4 does not divide over 3 processes"):
        gpt.prepare_run(gpt.SETTINGS | {"data": str(tmp_path / "text.txt")}, tmp_path / "run", "cpu")

class Variant(nn.Module):
    """Gates beside attention, RMSNorm, and no positions table."""
    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.norm = nn.RMSNorm(shape.width)
        self.h = nn.ModuleList()
        for _ in range(shape.layers):
            gate = nn.Linear(shape.width, shape.width)
            up = nn.Linear(shape.width, shape.width)
            self.h.append(nn.ModuleDict({"attn": gpt.Attention(shape), "gate": gate, "up": up}))

    def forward(self, ids):
        x = self.tokens(ids)
        for layer in self.h:
            normed = nn.functional.rms_norm(x, x.shape[-1:])
            x = x + layer["attn"](normed) + layer["gate"](normed).sigmoid() * layer["up"](normed)
        return self.norm(x) @ self.tokens.weight.T

def test_another_architecture_runs_and_is_read_when_only_the_class_and_its_names_are_changed(
    command, small, tmp_path, monkeypatch
):
    names = ("attn.q", "attn.k", "attn.v", "attn.o", "gate", "up")
    monkeypatch.setattr(gpt, "MATRICES", names)
    monkeypatch.setattr(gpt, "GPT", Variant)
    monkeypatch.setattr(gpt, "EMBEDDINGS", ("tokens",))
    monkeypatch.setattr(gpt, "readout", lambda model: (model.tokens.weight * model.norm.weight).detach())
    out = tmp_path / "run"
    command("--data", tmp_path / "text.txt", "--out", out)
    matrices = json.loads((out / "metrics.json").read_text())["matrices"]
    assert set(matrices) == {f"h.{layer}.{name}" for layer in range(2) for name in names}
    command("--out", out, "--report", "def first", "--circuit", "def first")
    page = (out / "report.html").read_text()
    assert 'id="h.0.gate:' in page and 'id="h.1.attn.o:' in page
    graph = json.loads((out / "circuit.json").read_text())["pruned_graph"]
    assert graph["edges"] and "positions" not in {node["matrix"] for node in graph["nodes"]}
