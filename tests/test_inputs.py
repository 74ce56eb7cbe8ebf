"""What people really have: token ids of any width and with headers, GPT-2s of any origin, texts of all kinds."""

import collections
import functools
import json
import math
import unicodedata

import numpy as np
import pytest
import torch

import train_gpt2 as gpt
import vpd
from conftest import TEXT

# --- A GPT-2's files ---

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
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
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

def rewritten(folder, state, dtype, prefix=""):
    """With an older file's masks of attention, and the embedding once more as lm_head."""
    extras = {"lm_head.weight": state["wte.weight"], f"{prefix}h.0.attn.bias": torch.ones(1, 1, 10, 10)}
    renamed = {prefix + name: x for name, x in state.items()}
    write_safetensors(folder / "model.safetensors", renamed | extras, dtype)

def in_shards(folder, state):
    """As Hugging Face cuts large models; with the embedding as lm_head alone."""
    tensors = [(name.replace("wte", "lm_head"), x) for name, x in sorted(state.items())]
    for i, part in enumerate((tensors[::2], tensors[1::2]), 1):
        write_safetensors(folder / f"model-0000{i}-of-00002.safetensors", dict(part), "F32")
    (folder / "model.safetensors").unlink()

def as_nanogpt(folder, state, bias=True):
    """nanoGPT's checkpoint after torch.compile: nn.Linear, whose weights are (d_out, d_in)."""
    model = {"_orig_mod.lm_head.weight": state["wte.weight"]}
    for name, x in state.items():
        if name.endswith("bias") and not bias:
            x.zero_()  # what it must be computed as
        else:
            model[f"_orig_mod.transformer.{name}"] = x.T if name.startswith("h.") and x.dim() == 2 else x
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 10, "bias": bias, "vocab_size": 11, "dropout": 0.0}
    saved = {"model": model, "model_args": sizes, "iter_num": 5, "best_val_loss": torch.tensor(1.0), "config": {}}
    torch.save(saved, folder / "ckpt.pt")
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()

@pytest.mark.parametrize("change, epsilon, tolerance", [  # epsilon: of the norms
    (functools.partial(rewritten, dtype="F16"), 0.5, 0.02),
    (functools.partial(rewritten, dtype="BF16", prefix="module._orig_mod.transformer."), 0.5, 0.1),
    (in_shards, 0.5, 1e-3),
    (as_nanogpt, 1e-5, 1e-3),
    (functools.partial(as_nanogpt, bias=False), 1e-5, 1e-3),
])
def test_a_gpt2_of_any_origin_gives_the_logits_computed_by_hand(change, epsilon, tolerance, tmp_path):
    state = checkpoint()
    change(gpt2_folder(tmp_path, state, n_head=4, layer_norm_epsilon=epsilon), state)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    model, _ = gpt.load_target(tmp_path)
    logits = model(torch.tensor([ids]))[0].detach().numpy()
    assert abs(logits - logits_by_hand(state, ids, heads=4, epsilon=epsilon)).max() < tolerance

@pytest.mark.parametrize("file, damage, message", [
    ("model.safetensors", lambda _: b"version https://git-lfs.github.com/spec/v1", "that can be read .*git-lfs"),
    ("model.safetensors", lambda content: content[:-2] + b"AA", "lm_head.weight is not wte.weight"),
    ("config.json", lambda content: content.replace(b"gelu_new", b"relu"), "its activation or its scale"),
    ("config.json", lambda content: content.replace(b'd": 2', b'd": 3'), "n_head = 3 does not divide 128"),
])
def test_a_damaged_gpt2_and_another_model_are_refused_in_one_line(file, damage, message, tmp_path):
    state = checkpoint(layers=1)
    gpt2_folder(tmp_path, state | {"lm_head.weight": state["wte.weight"]})
    (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    with pytest.raises(vpd.BadInput, match=message) as refused:
        gpt.load_target(tmp_path)
    assert "\n" not in str(refused.value)

# --- Token ids ---

@pytest.mark.parametrize("vocabulary", [4, 1024, 50_257, 128_256])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64", "uint64"])
def test_ids_of_any_width_are_read_as_the_ids_that_they_are(dtype, vocabulary, tmp_path):
    ids = np.random.default_rng(0).integers(0, min(vocabulary, np.iinfo(dtype).max), 5001)
    ids.astype(dtype).tofile(tmp_path / "ids.bin")
    read = gpt.read_bin(tmp_path / "ids.bin")
    assert read.tolist() == ids.tolist()
    assert gpt.sample(read, 8, 4, False, torch.Generator()).max() < vocabulary

@pytest.mark.parametrize("magic, dtype", [(20240520, np.uint16), (20240801, np.uint32)])
def test_the_header_of_llm_c_is_no_tokens(magic, dtype, tmp_path):
    ids = np.random.default_rng(0).integers(0, 50_257, 3000)
    header = np.zeros(256, np.int32)
    header[:3] = magic, 1, 3000
    (tmp_path / "ids.bin").write_bytes(header.tobytes() + ids.astype(dtype).tobytes())
    assert gpt.read_bin(tmp_path / "ids.bin").tolist() == ids.tolist()

# --- Texts ---

# Those of GPT-2's 50,000 merges that can act on the texts below, in their order (a merge of "a" and "b" is "a b").
GPT2_MERGES = (
    "Ġ t,h e,i n,o n,Ġ s,Ġ w,Ġ o,Ġ c,i s,a n,o r,e s,in g,o u,Ġo f,Ġ d,Ġt h,l l,s t,v e,a c,l d,c e,i l,Ġ R,u l,"
    "es t,t h,e l,ou ld,Ġs h,Ġth is,r a,â Ģ,Ġc an,Ġd o,' t,Ġw or,on e,ac e,Ġs p,a il,t e,e ll,n e,Ġ $,n g,Ġsh ould,"
    "Ġd on,Ġwor ld,' ve,' ll,Ġc a,Ġ #,l ing,âĢ ¦,t o,s h,Y ou,o f,Ġd one,or ld,Â ł,a i,t r,Ġsp ace,Ġ â,il i,s p,"
    "l in,ou l,he l,! !,¿ ½,ï ¿½,il ing,l i,d o,Âł Âł,t es,Ġ !,c an,h i,l o,th is,y ou,c a,w orld,' ',Ġsh o,y o,"
    "? ',ð Ł,h o,Ĥ ¬,p a,d on,t est,t ra,p ace,Ġâ Ĥ¬,ell o,ail ing,Ġ ðŁ,he ll,sp ace,h is,h ou,ll o,w o,sh ould,"
    "Ġw o,â Ĥ¬,d one,ra il,hell o,u ld,p ac,Ġsp ac,Ġ !!,Y o,ðŁ ĳ,Ġsp a,r l,ĠðŁ ĳ"
)
# What transformers.js makes of texts (tests/models/gpt2/test_tokenization_gpt2.js, "Xenova/gpt2"): the tokens in the
# spelling of vocab.json.
GPT2_TOKENS = {
    "You should've done this": "You Ġshould 've Ġdone Ġthis",
    "A\n'll !!to?'d''d of, can't.": "A Ċ 'll Ġ!! to ?' d '' d Ġof , Ġcan 't .",
    "1\x002\ufffd3": "1 Ā 2 ï¿½ 3",
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

def kind(x):
    """Letter, number, white space or another sign, as Unicode has it."""
    category = unicodedata.category(x)[0]
    return "Z" if x in "\t\n\v\f\r\x85" else category if category in "LNZ" else "other"

def test_gpt2s_pieces_part_all_characters_of_unicode_by_their_kind():
    text = "".join(chr(i) for i in range(33, 0x110000) if not 0xD800 <= i < 0xE000)
    pieces = gpt.gpt2_pieces(text)
    assert "".join(pieces) == text
    kinds = [{kind(x) for x in piece} for piece in pieces]
    assert all(len(of_one) == 1 for of_one in kinds)
    apart = [one != other or one == {"Z"} for one, other in zip(kinds, kinds[1:])]  # the last space goes to a word
    assert all(apart)
