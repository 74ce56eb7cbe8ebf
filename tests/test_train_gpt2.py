"""The language model, its tokenizer and data, and a whole run in small."""

import collections
import dataclasses
import json
import math
import shutil
import sys
import unicodedata

import numpy as np
import pytest
import torch

import train_gpt2 as gpt
import vpd
from test_vpd import PeakMemory

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


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_hugging_face_checkpoint_gives_the_logits_of_gpt2_computed_by_hand(prefix, tmp_path):
    state = checkpoint()
    extras = {"lm_head.weight": state["wte.weight"], f"{prefix}h.0.attn.bias": torch.ones(1, 1, 10, 10)}
    torch.save({prefix + name: x for name, x in state.items()} | extras, tmp_path / "pytorch_model.bin")
    model = gpt.load_gpt2(tmp_path / "pytorch_model.bin")
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    expected = torch.from_numpy(logits_by_hand(state, ids, heads=2)).float()
    torch.testing.assert_close(model(torch.tensor([ids]))[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "untied"])
def test_a_checkpoint_that_is_not_gpt2_is_refused_by_the_name_of_its_tensor(change, tmp_path):
    state, name = checkpoint(layers=1), "h.0.mlp.c_fc.weight"
    if change == "missing":
        del state[name]
    elif change == "extra":
        state[name := "h.0.mlp.gate.weight"] = torch.zeros(2)
    elif change == "untied":  # dropped, it would give other logits than the checkpoint's
        state[name := "lm_head.weight"] = state["wte.weight"] + 1
    else:
        state[name] = state[name].T
    torch.save(state, tmp_path / "model.bin")
    with pytest.raises(vpd.BadInput, match=name) as refused:
        gpt.load_gpt2(tmp_path / "model.bin")
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


def gpt2_files(folder):
    """vocab.json and merges.txt of a GPT-2 that knows GPT2_MERGES alone."""
    pairs = [pair.split(" ") for pair in GPT2_MERGES.split(",")]
    names = [*gpt.gpt2_bytes(), *(a + b for a, b in pairs), "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in pairs), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return names


def test_gpt2s_tokens_are_those_of_another_implementation(tmp_path):
    names = gpt2_files(tmp_path)
    tokenizer = gpt.gpt2_tokenizer(tmp_path)
    for text, tokens in GPT2_TOKENS.items():
        ids = tokenizer.encode(text)
        assert [names[i] for i in ids] == tokens.split(" ")
        assert tokenizer.decode(ids) == text


HARD_FOR_GPT2 = ["\u0663\u0664 x\u00b2\u2167", "\U0001f600\U0001f1e9", "\x00\x1c\x7f\x85 \u3000", "It's 'S \u2019s", ""]


@pytest.mark.parametrize("text", HARD_FOR_GPT2)
def test_gpt2s_pieces_hold_the_whole_text_and_part_letters_numbers_and_space(text, tmp_path):
    pieces = gpt.gpt2_pieces().findall(text)
    assert "".join(pieces) == text
    for piece in pieces:
        kinds = {max("LNZ".find(unicodedata.category(x)[0]), -1) for x in piece.lstrip(" ")}
        assert len(kinds) <= 1 or piece.isspace() or piece.startswith("'")
    gpt2_files(tmp_path)
    tokenizer = gpt.gpt2_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_half_a_surrogate_pair_and_files_of_another_tokenizer_are_refused_in_one_line(tmp_path):
    gpt2_files(tmp_path)
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


def write_safetensors(file, state, kind):
    """A .safetensors file, written by hand: float32, or float16 or bfloat16 rounded to zero from its bits."""
    header, raw = {"__metadata__": {"format": "pt"}}, b""
    for name, x in state.items():
        bits = x.contiguous().numpy()
        if kind == "BF16":
            bits = (bits.view(np.uint32) >> 16).astype(np.uint16)
        elif kind == "F16":
            bits = bits.astype(np.float16)
        header[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [len(raw), len(raw) + bits.nbytes]}
        raw += bits.tobytes()
    header = json.dumps(header).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw)


@pytest.mark.parametrize("kind, tolerance", [("F32", 1e-3), ("F16", 0.02), ("BF16", 0.1)])
def test_a_folder_as_it_is_downloaded_gives_the_logits_of_gpt2_with_its_heads(kind, tolerance, tmp_path):
    state, ids = checkpoint(), [3, 1, 4, 1, 5, 9, 2, 6]
    write_safetensors(tmp_path / "model.safetensors", state, kind)
    (tmp_path / "config.json").write_text(json.dumps({"n_head": 4, "layer_norm_epsilon": 1e-5}))
    logits = gpt.load_gpt2(tmp_path)(torch.tensor([ids]))[0].detach().numpy()
    assert abs(logits - logits_by_hand(state, ids, heads=4)).max() < tolerance
    assert abs(logits - logits_by_hand(state, ids, heads=2)).max() > 0.15  # the heads are those of config.json
    (tmp_path / "config.json").write_text(json.dumps({"n_head": 4, "layer_norm_epsilon": 0.5}))
    assert abs(gpt.load_gpt2(tmp_path)(torch.tensor([ids]))[0].detach().numpy() - logits).max() > 0.1  # read, too


@pytest.mark.parametrize("data", ["text.txt", "ids.bin"])
def test_a_gpt2_folder_is_decomposed_and_asked_about_prompts_after_it_is_gone(data, command, tmp_path):
    folder, out = tmp_path / "gpt2", tmp_path / "run"
    names = gpt2_files(folder)
    np.random.default_rng(0).integers(0, len(names), 4000).astype(np.uint16).tofile(tmp_path / "ids.bin")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')  # as downloaded: of another kind
    write_safetensors(folder / "model.safetensors", checkpoint(layers=1, width=64, vocabulary=len(names)), "F32")
    (folder / "config.json").write_text(json.dumps({"n_head": 2}))
    command("--init-from", folder, "--data", tmp_path / data, "--out", out)
    metrics = json.loads((out / "metrics.json").read_text())
    C = [metrics["matrices"][f"h.0.{m}"]["C"] for m in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")]
    assert C == [43, 43, 85, 85, 256, 299]  # 2/3, 2/3, 4/3, 4/3, 4 and 14/3 of the width, as published
    assert (out / "tokens.npy").exists() == (data == "text.txt")  # a .bin is not copied
    shutil.rmtree(folder)
    command("--out", out, "--circuit", "def main", "--token", " this")
    circuit = json.loads((out / "circuit.json").read_text())
    assert [names[i] for i in circuit["ids"]] == ["def", "Ġmain"] and names[circuit["token"]] == "Ġthis"


def test_a_bin_takes_the_tokenizer_of_a_gpt2_folder_only_if_the_model_has_as_many_tokens(tmp_path):
    names, preset = gpt2_files(tmp_path / "gpt2"), gpt.PRESETS["laptop"]
    np.zeros(4000, np.uint16).tofile(tmp_path / "ids.bin")
    for vocabulary, serves in ((len(names), True), (len(names) - 2, False)):
        small = dataclasses.replace(preset, shape=dataclasses.replace(preset.shape, vocabulary=vocabulary))
        ids, tokenizer = gpt.corpus(str(tmp_path / "ids.bin"), small, [tmp_path / "run", tmp_path / "gpt2"])
        assert len(ids) == 4000 and (tokenizer is not None) == serves
    assert gpt.Tokenizer([], gpt2=True).decode([39, 72, 50256]) == "Hi<50256>"


HARD_TEXTS = ["", " ", "\r\n\t x", "naïve 字 \U0001f600 e\u0301", "a\x00b", "____init____(self)", "٣٤ x²"]
HARD_TEXTS += ["\n\n\n    \n"]


@pytest.mark.parametrize("text", HARD_TEXTS)
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
    # and encoding applies them in that order
    assert [t for word in words for t in word] == tokenizer.encode(TEXT).tolist()


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
    C = {"attn.q": 4, "attn.o": 4, "mlp.up": 6, "mlp.down": 6}
    return gpt.Preset(gpt.Shape(2, 16, 2, 8, 270), 4, 30, 3e-3, C, config)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command line in this process, with the small preset as `laptop` and a text in text.txt."""
    monkeypatch.setitem(gpt.PRESETS, "laptop", small_preset())
    monkeypatch.setattr(gpt, "EVALUATED", 64)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", "--device", "cpu", *map(str, arguments)])
        gpt.main()

    return run


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
    metrics = gpt.evaluate(gpt.open_run(settings, tmp_path, "cpu"))
    last = json.loads((tmp_path / "decomposition" / "log.jsonl").read_text().splitlines()[-1])
    for name, of in (("L0", "l0"), ("L0 above 0.1", "l0_above_0.1"), ("alive", "alive")):  # on all 4 validation batches
        assert last[f"validation {name}"] == pytest.approx(metrics["total"][of])
    assert last["validation KL rounded at 0"] == pytest.approx(metrics["kl"]["rounded_0"], rel=1e-4)
    assert metrics["target"]["curve"][-1][1] < metrics["target"]["curve"][0][1]  # it learned
    assert metrics["total"]["C"] == 2 * 20 and set(metrics["matrices"]) >= {"h.0.attn.q", "h.1.mlp.down"}
    assert json.loads((tmp_path / "metrics.json").read_text())["kl"] == metrics["kl"]

    # independently: the cross-entropy of the target, and above it of the model with sums of subcomponents as weights
    ids, _ = gpt.corpus(str(tmp_path / "text.txt"), small, [tmp_path])
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
    again = gpt.evaluate(gpt.open_run(settings, tmp_path, "cpu"))
    assert again["kl"] == metrics["kl"]


LAPTOP = gpt.PRESETS["laptop"]


@pytest.mark.parametrize(
    "shape, C, batch, changes",
    [
        (LAPTOP.shape, LAPTOP.C, 8, {}),
        (dataclasses.replace(LAPTOP.shape, layers=4, width=128, vocabulary=4096), LAPTOP.C, 4, {"muon": 0.0, "G_width": 256, "G_blocks": 3}),
        (dataclasses.replace(LAPTOP.shape, context=128), {m: 3 * n for m, n in LAPTOP.C.items()}, 8, {"accumulate": 4, "adversary_steps": 2}),
    ],
)
def test_the_memory_of_a_step_is_within_a_fifth_of_the_formula(shape, C, batch, changes):
    model, config = gpt.GPT(shape).eval(), dataclasses.replace(LAPTOP.config, **changes)
    C = {f"h.{i}.{matrix}": number for i in range(shape.layers) for matrix, number in C.items()}
    ids = torch.randint(shape.vocabulary, (batch, shape.context))
    with PeakMemory() as memory:
        training = vpd.start(model, C, vpd.check(model, C, ids, config), config)
        vpd.training_step(model, ids, vpd.kl, training, config)  # Adam's moments are there from the first step on
        memory.peak = 0
        vpd.training_step(model, ids, vpd.kl, training, config)
    measured = memory.peak + 4 * sum(x.numel() for x in model.parameters())  # the model was there before
    assert 1e9 * gpt.peak_memory(model, C, ids.numel(), config) == pytest.approx(measured, rel=0.2)


def test_a_step_that_does_not_fit_is_refused_before_anything_is_computed_and_a_batch_named_that_fits(tmp_path, command, monkeypatch):
    preset = gpt.PRESETS["laptop"]
    C = {f"h.{i}.{matrix}": n for i in range(preset.shape.layers) for matrix, n in preset.C.items()}

    def takes(batch, n):
        config = dataclasses.replace(preset.config, accumulate=n)
        return gpt.peak_memory(gpt.GPT(preset.shape), C, batch * preset.shape.context, config)

    B = preset.batch
    assert B % 2 == 0 and takes(B, 1) > takes(B, 2) > takes(B, B) > takes(B // 2, B // 2)
    cases = [(takes(B, 2), f"give --batch {B} --accumulate 2"), (takes(B // 2, B // 2), f"give --batch {B // 2} --accumulate {B // 2}"), (0, "give fewer subcomponents with --C")]
    monkeypatch.setattr(gpt, "corpus", lambda *_: pytest.fail("computed"))
    for has, advice in cases:
        monkeypatch.setattr(gpt.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1.001, "SC_PHYS_PAGES": has * 1e9}[name])
        with pytest.raises(SystemExit, match=f"error: a step takes about .* GB, and cpu has .*: {advice}$"):
            command("--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()


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
        state = [*training.decomposition.U.values(), *training.decomposition.G.parameters()]
        assert all(x.dtype == x.grad.dtype == torch.float32 for x in state)
    assert found[True]["delta_l2"] == found[False]["delta_l2"]  # never in bfloat16
    assert found[True]["stochastic"] != found[False]["stochastic"]  # the forward passes are
    assert found[True] == pytest.approx(found[False], rel=0.1)
    with torch.no_grad(), vpd.precision("cpu", True):
        logits = model(batch)
    assert logits.dtype == torch.float32 and not logits.equal(model(batch))  # the products are, the logits are not


def test_a_gpu_preset_without_a_gpu_warns_in_one_line_and_runs(command, tmp_path, monkeypatch, capsys):
    small = small_preset()
    small = dataclasses.replace(small, config=dataclasses.replace(small.config, bf16=True))
    monkeypatch.setitem(gpt.PRESETS, "gpu", small)
    command("--preset", "gpu", "--data", tmp_path / "text.txt", "--out", tmp_path / "run")
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "the preset gpu is for GPUs; on cpu it takes very long" in warning
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["speed"]["tokens_per_second"] * metrics["speed"]["seconds_per_step"] == pytest.approx(4 * 8)
    command("--out", tmp_path / "run", "--report")  # a run in bfloat16 can be read
    command("--out", tmp_path / "run", "--circuit", "a text")
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "circuit.png").exists()


def test_the_preset_is_laptop_by_default_also_on_a_machine_with_a_gpu(command, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="runs/laptop holds no finished decomposition"):
        command("--report")


def results(folder):
    """What a run computed, without how long it took."""
    metrics = json.loads((folder / "metrics.json").read_text())
    log = [json.loads(line) for line in (folder / "decomposition" / "log.jsonl").read_text().splitlines()]
    for x in (metrics, *log):
        [x.pop(key, None) for key in ("seconds", "speed")]
    return metrics, log, torch.load(folder / "decomposition" / "checkpoint.pt", weights_only=True)["U"]


def test_a_run_killed_in_either_stage_goes_on_with_resume_and_ends_the_same(command, tmp_path, monkeypatch):
    monkeypatch.setattr(gpt, "CHECKPOINT_SECONDS", -1)  # after every step
    settings = ("--data", tmp_path / "text.txt", "--seed", "3", "--C", "0.5", "--accumulate", "2")
    command(*settings, "--out", tmp_path / "whole")

    def dies(module, name, after):
        function, calls = getattr(module, name), iter(range(10_000))

        def mortal(*arguments, **options):
            if next(calls) == after:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return module, name, mortal

    deaths = [dies(np, "save", 0), dies(gpt, "sample", 20), dies(vpd, "training_step", 3), dies(vpd, "evaluate", 0)]
    for number, death in enumerate(deaths):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*death)
            command("--out", tmp_path / "killed", *(("--resume",) if number else settings))
    with pytest.raises(SystemExit, match="made with another --seed, --C: leave it out"):
        command("--out", tmp_path / "killed", "--resume", "--seed", "4", "--C", "2", "--preset", "laptop")
    with pytest.raises(SystemExit, match="made with another --data"):
        command("--out", tmp_path / "killed", "--resume", "--data", "other.txt")
    command("--out", tmp_path / "killed", "--resume", "--seed", "3")  # its own setting
    (metrics, log, U), (whole_metrics, whole_log, whole_U) = results(tmp_path / "killed"), results(tmp_path / "whole")
    assert metrics == whole_metrics and log == whole_log and all(x.equal(whole_U[path]) for path, x in U.items())
    with pytest.raises(SystemExit, match="made with another --steps"):
        command("--out", tmp_path / "whole", "--report", "--steps", "7")


def test_an_imported_gpt2_is_decomposed_by_command_and_read_after_its_file_is_gone(command, tmp_path):
    file, data, out = tmp_path / "pytorch_model.bin", tmp_path / "ids.bin", tmp_path / "run"
    state = checkpoint(layers=1, vocabulary=270)
    np.random.default_rng(0).integers(0, 270, 4000).astype(np.uint16).tofile(data)
    torch.save(state | {"lm_head.weight": state["wte.weight"] + 1}, file)
    with pytest.raises(SystemExit, match="lm_head.weight is not wte.weight"):
        command("--init-from", file, "--data", data, "--out", out)
    torch.save(state, file)
    with pytest.raises(SystemExit, match="needs --data FILE.bin"):
        command("--init-from", file, "--out", out)
    assert not out.exists()
    command("--init-from", file, "--data", data, "--out", out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["total"]["C"] == 1621 and "compute_recovered" not in metrics  # one layer; no curve of its training
    original = gpt.load_gpt2(file)
    file.unlink()
    command("--out", out, "--report")
    assert '"vocabulary":[" 0"," 1",' in (out / "report.html").read_text()  # without a tokenizer: token ids
    opened = gpt.open_run(json.loads((out / "settings.json").read_text()), out, "cpu")
    ids = torch.randint(270, (2, 8))
    assert opened.model(ids).equal(original(ids))


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(vpd, "processes", lambda: 3)
    settings = gpt.SETTINGS | {"preset": "laptop"}
    with pytest.raises(vpd.BadInput, match="batch of 8 does not divide over 3 processes"):
        gpt.open_run(settings, tmp_path / "run", "cpu")
    assert not (tmp_path / "run").exists()
