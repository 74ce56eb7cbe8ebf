"""What people really have: token ids of any width and with headers, GPT-2s of any origin, texts without spaces."""

import codecs
import json
import random

import numpy as np
import pytest
import torch

import train_gpt2 as gpt
import vpd
from test_train_gpt2 import (
    GPT2_TOKENS,
    checkpoint,
    gpt2_folder,
    logits_by_hand,
    merge,
    tokenizer_files,
    write_safetensors,
)

IDS = [3, 1, 4, 1, 5, 9, 2, 6]

def logits_of(folder):
    model, _ = gpt.load_target(folder)
    return model(torch.tensor([IDS]))[0].detach().numpy()

LLM_C = {20240520: np.uint16, 20240801: np.uint32}  # the number of the format -> its tokens

def header_of_llm_c(magic, tokens):
    header = np.zeros(256, np.int32)
    header[:3] = magic, 1, tokens
    return header.tobytes()

@pytest.mark.parametrize("vocabulary", [4, 1024, 50_257, 128_256])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64", "uint64"])
def test_ids_of_any_width_are_read_as_the_ids_that_they_are(dtype, vocabulary, tmp_path):
    ids = np.random.default_rng(0).integers(0, min(vocabulary, np.iinfo(dtype).max), 5001)
    ids.astype(dtype).tofile(tmp_path / "ids.bin")
    read = gpt.read_bin(tmp_path / "ids.bin")
    assert read.tolist() == ids.tolist()
    assert gpt.sample(read, 8, 4, False, torch.Generator()).max() < vocabulary

@pytest.mark.parametrize("magic", LLM_C)
def test_the_header_of_llm_c_is_no_tokens(magic, tmp_path):
    ids = np.random.default_rng(0).integers(0, 50_257, 3000)
    content = ids.astype(LLM_C[magic]).tobytes()
    file = tmp_path / "ids.bin"
    file.write_bytes(header_of_llm_c(magic, 3000) + content)
    assert gpt.read_bin(file).tolist() == ids.tolist()

def bytes_of(dtype, cut):
    ids = np.random.default_rng(0).integers(0, 50_257, 3000)
    return ids.astype(dtype).tobytes()[: -cut or None]

BAD_BINS = {
    "empty": (b"", "has 0 bytes"),
    "half an id of 16 bits": (bytes_of(np.uint16, 1), "has 5999 bytes"),
    "padding of -100": (np.array([5, 17, 1000, -100] * 500, np.int32).tobytes(), "negative"),
    "padding of -1": (np.array([5, 17, 1000, -1] * 500, np.int64).tobytes(), "negative"),
}

@pytest.mark.parametrize("case", BAD_BINS)
def test_a_damaged_bin_is_refused_by_what_is_true_of_it(case, tmp_path):
    content, message = BAD_BINS[case]
    (tmp_path / "ids.bin").write_bytes(content)
    with pytest.raises(vpd.BadInput, match=message) as refused:
        gpt.read_bin(tmp_path / "ids.bin")
    assert "\n" not in str(refused.value)

def test_a_byte_order_mark_is_no_part_of_a_text_and_of_no_file_of_a_gpt2(tmp_path):
    state = checkpoint(layers=1)
    gpt2_folder(tmp_path, state)
    names = tokenizer_files(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    for file in ("config.json", "vocab.json", "merges.txt", "text.txt"):
        (tmp_path / file).write_bytes(codecs.BOM_UTF8 + (tmp_path / file).read_bytes())
    assert gpt.read_text(tmp_path / "text.txt") == "text"
    assert abs(logits_of(tmp_path) - logits_by_hand(state, IDS, heads=2, epsilon=1e-5)).max() < 1e-3
    for text, tokens in GPT2_TOKENS.items():
        assert [names[i] for i in gpt.gpt2_tokenizer(tmp_path).encode(text)] == tokens.split(" ")

def write_shards(folder, state):
    """As Hugging Face cuts large models: two files and their index."""
    names = sorted(state)
    files = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        write_safetensors(folder / file, {name: state[name] for name in part}, "F32")
        files |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "model.safetensors").unlink()

def prefixed(prefix):
    def change(folder, state):
        write_safetensors(folder / "model.safetensors", {prefix + name: x for name, x in state.items()}, "F32")
    return change

def only_lm_head(folder, state):
    others = {name: x for name, x in state.items() if name != "wte.weight"}
    write_safetensors(folder / "model.safetensors", others | {"lm_head.weight": state["wte.weight"]}, "F32")

def as_nanogpt(folder, state, bias=True):
    """nanoGPT's checkpoint after torch.compile: nn.Linear, whose weights are (d_out, d_in)."""
    model = {"_orig_mod.lm_head.weight": state["wte.weight"]}
    for name, x in state.items():
        if bias or not name.endswith("bias"):
            model[f"_orig_mod.transformer.{name}"] = x.T if name.startswith("h.") and x.dim() == 2 else x
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 10, "bias": bias, "vocab_size": 11, "dropout": 0.0}
    saved = {"model": model, "model_args": sizes, "iter_num": 5, "best_val_loss": torch.tensor(1.0), "config": {}}
    torch.save(saved, folder / "ckpt.pt")
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()

def as_nanogpt_without_bias(folder, state):
    for name, x in state.items():
        if name.endswith("bias"):
            x.zero_()  # what it must be computed as
    as_nanogpt(folder, state, bias=False)

GPT2S = [write_shards, only_lm_head, as_nanogpt, as_nanogpt_without_bias]
GPT2S += [prefixed(prefix) for prefix in ("transformer.", "_orig_mod.", "module.", "module._orig_mod.transformer.")]

@pytest.mark.parametrize("change", GPT2S)
def test_a_gpt2_of_any_origin_gives_the_logits_computed_by_hand(change, tmp_path):
    state = checkpoint()
    change(gpt2_folder(tmp_path, state), state)
    assert abs(logits_of(tmp_path) - logits_by_hand(state, IDS, heads=2, epsilon=1e-5)).max() < 1e-3

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 548105171\n"
CUT = "model.safetensors is not whole, but half a download or a pointer of git-lfs"
BAD_FILES = {  # file, what becomes of its content, message
    "a pointer": ("model.safetensors", lambda _: POINTER, CUT),
    "half a download": ("model.safetensors", lambda content: content[: len(content) // 2], CUT),
    "less than a header": ("model.safetensors", lambda content: content[:100], CUT),
    "empty weights": ("model.safetensors", lambda _: b"", "holds no model that can be read"),
    "another model": ("model.safetensors", lambda content: content.replace(b"wpe", b"wxe"), "'wpe.weight'"),
    "a word as a number": ("config.json", lambda content: content.replace(b'd": 2', b'd": "2"'), "TypeError"),
    "no heads": ("config.json", lambda content: content.replace(b'd": 2', b'd": 0'), "ZeroDivisionError"),
    "three heads": ("config.json", lambda content: content.replace(b'd": 2', b'd": 3'), "n_head = 3 does not divide 128: mend it"),
    "half a layer": ("config.json", lambda content: content.replace(b'r": 1', b'r": 0.5'), "TypeError"),
    "a list": ("config.json", lambda _: b"[]", "holds no model that can be read"),
    "half a config": ("config.json", lambda content: content[:-5], "holds no model that can be read: JSONDecodeError"),
}

@pytest.mark.parametrize("case", BAD_FILES)
def test_a_damaged_gpt2_is_refused_in_one_line_by_what_is_wrong(case, tmp_path):
    name, damage, message = BAD_FILES[case]
    file = gpt2_folder(tmp_path, checkpoint(layers=1)) / name
    before = file.read_bytes()
    file.write_bytes(damage(before))
    assert file.read_bytes() != before
    with pytest.raises(vpd.BadInput, match=message) as refused:
        gpt.load_target(tmp_path)
    assert "\n" not in str(refused.value)

def test_a_damaged_checkpoint_of_nanogpt_is_refused_in_one_line(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"damaged")
    with pytest.raises(vpd.BadInput, match="holds no model that can be read") as refused:
        gpt.load_target(tmp_path)
    assert "\n" not in str(refused.value)

def random_letters(letters, n):
    return "".join(random.Random(0).choices(letters, k=n))

@pytest.mark.parametrize("letters", ["ACGT", "a", "0123456789", "-=", "字母", " \n"])
def test_no_piece_of_a_text_without_spaces_is_long(letters):
    text = random_letters(letters, 5000)
    pieces = gpt.PIECES.findall(text)
    assert "".join(pieces) == text and max(map(len, pieces)) <= 101

def gpt2_that_learned(text):
    """A tokenizer with GPT-2's order of bytes, whose merges are learned from the text."""
    number = {byte: i for i, byte in enumerate(gpt.gpt2_bytes().values())}
    merges = gpt.Tokenizer.learn(text, 400).merges
    return gpt.Tokenizer([(number.get(a, a), number.get(b, b)) for a, b in merges], gpt2=True)

def test_a_long_piece_of_gpt2_gets_the_tokens_of_merging_one_pair_after_the_other():
    tokenizer = gpt2_that_learned(random_letters("abcd", 3000))
    text = random_letters("abcd", 2000)
    assert gpt.GPT2_PIECES.findall(text) == [text]
    word = [ord(letter) - 33 for letter in text]  # GPT-2's first token is "!"
    for i, pair in enumerate(tokenizer.merges):
        word = merge(word, pair, 256 + i)
    assert len(word) < 1000 and tokenizer.encode(text).tolist() == word

class Counted(dict):
    """A dict that counts how often it is asked."""
    asked = 0

    def get(self, *arguments):
        self.asked += 1
        return super().get(*arguments)

def test_the_choice_of_merges_in_a_piece_takes_no_longer_in_a_longer_piece():
    tokenizer = gpt2_that_learned(random_letters("ACGT", 5000))
    asked = []
    for n in (4000, 40_000):
        tokenizer.merged = Counted(tokenizer.merged)
        tokenizer.encode(random_letters("ACGT", n))
        asked.append(tokenizer.merged.asked)
    assert 0 < asked[1] < 2 * asked[0]  # a look-up at every letter would make it ten times as many
