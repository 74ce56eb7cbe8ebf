"""Train a small GPT-2 written by hand, decompose all its attention and MLP matrices with VPD, and measure the result.

    python train_gpt2.py                                    # everything, on the source of Python's standard library
    python train_gpt2.py --data my.txt --out runs/mine      # any UTF-8 text
    python train_gpt2.py --data corpus.bin                  # uint16 token ids (nanoGPT's format), memory-mapped
    python train_gpt2.py --out runs/mine --resume           # go on where a killed run stopped
    python train_gpt2.py --init-from runs/laptop --C 2 --out runs/C-2           # decompose the same target differently
    python train_gpt2.py --init-from gpt2 --data my.txt     # decompose a GPT-2 from its folder, as downloaded
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --preset paper --data pile.bin

    python train_gpt2.py --out runs/laptop --report         # read a finished run: the page of all subcomponents
    python train_gpt2.py --out runs/laptop --circuit "def __init__(" [--token self]
    python train_gpt2.py --out runs/laptop --edit h.1.mlp.down:37 --to None [--alpha 3]
    python train_gpt2.py --out runs/laptop --compare runs/C-2                   # do the two decompositions agree?

A run leaves a target model (target.pt), its decomposition (decomposition/), and metrics.json with pictures. For a model
of your own, change what stands in the first 350 lines. [VPD] is "Interpreting Language Model Parameters" (2026).
B = batch, T = positions of a window, N = windows of the evaluation set, C = subcomponents of a matrix."""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import difflib
import functools
import heapq
import html
import itertools
import json
import math
import os
import re
import sys
import sysconfig
import time
import unicodedata
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# A thread that waits for another spins some 50 microseconds (GNU's OpenMP), about what it costs to wake it, and then
# sleeps. By default it spins for milliseconds, and beside one busy program a step takes 4 times as long; so, 2.6 times.
# (OMP_WAIT_POLICY=PASSIVE, no spinning: 1.0 times, but two threads are then as slow as one.) Read as torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import matplotlib.figure
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vpd

# ---- The model: GPT-2 -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-2."""
    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int
    epsilon: float = 1e-5  # of the layer norms

class Attention(nn.Module):
    """Causal self-attention, (B, T, width) to the same. Four matrices, so that each is decomposed by itself."""
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads = shape.heads
        self.q, self.k, self.v, self.o = (nn.Linear(shape.width, shape.width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, T, width = x.shape
        q, k, v = (matrix(x).view(B, T, self.heads, -1).transpose(1, 2) for matrix in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # all (B, heads, T, width / heads)
        return self.o(y.transpose(1, 2).reshape(B, T, width))

class MLP(nn.Module):
    """Two matrices with the tanh form of GELU between, as in GPT-2. (B, T, width) to the same."""
    def __init__(self, shape: Shape):
        super().__init__()
        self.up, self.down = nn.Linear(shape.width, 4 * shape.width), nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))

class Block(nn.Module):
    """Attention and MLP, each on the normalised residual stream and added to it. (B, T, width) to the same."""
    def __init__(self, shape: Shape):
        super().__init__()
        self.norm_attn, self.attn = nn.LayerNorm(shape.width, shape.epsilon), Attention(shape)
        self.norm_mlp, self.mlp = nn.LayerNorm(shape.width, shape.epsilon), MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_attn(x))
        return x + self.mlp(self.norm_mlp(x))

class GPT(nn.Module):
    """GPT-2: token ids (B, T) -> logits (B, T, vocabulary). The unembedding is the embedding, transposed."""
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.tokens, self.positions = (nn.Embedding(n, shape.width) for n in (shape.vocabulary, shape.context))
        self.h = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, shape.epsilon)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:  # as GPT-2: the matrices that write to the residual stream start smaller
                writes = name.endswith(("attn.o.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * shape.layers) ** 0.5 if writes else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))  # (B, T, width)
        for block in self.h:
            x = block(x)
        return (self.norm(x) @ self.tokens.weight.T).to(x.dtype)  # float32 as the stream, under autocast too

def cross_entropy(ids: Tensor, logits: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats, scalar. ids (B, T), logits (B, T, vocabulary)."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())

# ---- The tokenizer: byte-pair encoding, learned from the text, or GPT-2's ------------------------------------------
# No merge crosses a border of pieces (a word with the space before it, indentation, signs), which hold the whole text.
PIECES = re.compile(r" ?[^\W\d_]+| ?\d+| ?[^\w\s]+| ?_+|\s+(?=\S)|\s+")

@functools.cache
def gpt2_pieces() -> re.Pattern:
    """GPT-2's pieces. Its expression names classes that `re` lacks: letters, numbers and white space of Unicode. They
    are taken from `unicodedata`: characters that are newer than GPT-2 may be split otherwise than by its tokenizer."""
    def characters(kind):
        numbers = (i for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)).startswith(kind))
        runs = [list(run) for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
        return "".join(f"\\U{run[0][1]:08x}-\\U{run[-1][1]:08x}" for run in runs)
    L, N, space = characters("L"), characters("N"), r"\t-\r\x85\u2028\u2029" + characters("Zs")
    words = rf"'(?:s|t|re|ve|m|ll|d)| ?[{L}]+| ?[{N}]+| ?[^{space}{L}{N}]+"
    return re.compile(rf"{words}|[{space}]+(?![^{space}])|[{space}]+")

def gpt2_bytes() -> dict[str, int]:
    """GPT-2's files write a byte as one visible character: {character: byte}, in the order of the tokens 0 to 255."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [i for i in range(256) if i not in visible]
    return {chr(i): i for i in visible} | {chr(256 + n): i for n, i in enumerate(others)}

class Tokenizer:
    """256 bytes, and after them one token for each merge of two tokens. Lossless on any text. gpt2: with the pieces and
    the order of bytes of GPT-2; its <|endoftext|> is made from no text."""
    def __init__(self, merges: list[tuple[int, int]], gpt2: bool = False):
        self.merges, self.gpt2 = [tuple(pair) for pair in merges], gpt2
        self.merged = {pair: 256 + i for i, pair in enumerate(self.merges)}  # pair -> the token that it becomes
        self.bytes = [bytes([i]) for i in (gpt2_bytes().values() if gpt2 else range(256))]  # of each token
        self.first = {byte[0]: i for i, byte in enumerate(self.bytes)}  # the token of each byte
        for a, b in self.merges:
            self.bytes.append(self.bytes[a] + self.bytes[b])

    @staticmethod
    def learn(text: str, vocabulary: int) -> Tokenizer:
        """Merge the most frequent pair of neighbours, until there are `vocabulary` tokens or no pair is left."""
        count = collections.Counter(PIECES.findall(text))
        words, times = [list(piece.encode()) for piece in count], list(count.values())
        pairs, where = collections.Counter(), collections.defaultdict(set)  # pair -> how often, and in which words
        queue, changed, merges = [], set(), []  # queue: (-how often, pair); changed: pairs to be queued anew
        def recount(w, sign):
            for pair in zip(words[w], words[w][1:]):
                pairs[pair] += sign * times[w]
                where[pair].add(w)
                changed.add(pair)
        for w in range(len(words)):
            recount(w, 1)
        for token in vpd.with_progress(range(256, vocabulary), "learning the tokens"):
            while changed:
                heapq.heappush(queue, (-pairs[pair := changed.pop()], pair))
            while queue and (not queue[0][0] or -queue[0][0] != pairs[queue[0][1]]):
                heapq.heappop(queue)  # out of date: the present count of this pair is elsewhere in the queue
            if not queue:
                break
            merges.append(pair := heapq.heappop(queue)[1])
            for w in where.pop(pair):
                recount(w, -1)
                words[w] = merge(words[w], pair, token)
                recount(w, 1)
        return Tokenizer(merges)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, uint16. Every distinct piece is encoded once. Raises BadInput for half a surrogate pair."""
        broken = re.search("[\ud800-\udfff]", text)
        vpd.refuse(broken, f"the text holds half a surrogate pair, {broken and ascii(broken[0])}: give valid Unicode")
        pieces, encoded = (gpt2_pieces() if self.gpt2 else PIECES).findall(text), {}
        for piece in vpd.with_progress(set(pieces), "encoding the text"):
            word = [self.first[byte] for byte in piece.encode()]
            while len(word) > 1:
                pair = min(zip(word, word[1:]), key=lambda pair: self.merged.get(pair, math.inf))
                if pair not in self.merged:
                    break
                word = merge(word, pair, self.merged[pair])
            encoded[piece] = np.array(word, dtype=np.uint16)
        return np.concatenate([encoded[piece] for piece in pieces]) if pieces else np.zeros(0, np.uint16)

    def decode(self, ids) -> str:
        """The text of token ids, with U+FFFD for half a character. An id that no merge has made is shown as <50256>."""
        known = len(self.bytes)
        return b"".join(self.bytes[i] if i < known else b"<%d>" % i for i in ids).decode(errors="replace")

def gpt2_tokenizer(folder: Path) -> Tokenizer:
    """GPT-2's tokenizer from vocab.json and merges.txt, as downloaded. Raises BadInput if they cannot serve."""
    try:
        numbers = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        merges = [(numbers[a], numbers[b]) for a, b in pairs]
        wanted = [*gpt2_bytes(), *(a + b for a, b in pairs)]
        in_order = [numbers[name] for name in wanted] == list(range(len(wanted)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise vpd.BadInput(f"{folder} lacks vocab.json or merges.txt of a GPT-2 ({reason}): give a .bin") from None
    vpd.refuse(not in_order, f"{folder}/vocab.json does not number tokens as GPT-2 does: give --data FILE.bin")
    return Tokenizer(merges, gpt2=True)

def merge(word: list[int], pair: tuple[int, int], token: int) -> list[int]:
    """The word with every occurrence of the pair, from the left, replaced by the token."""
    merged, i = [], 0
    while i < len(word):
        together = i + 1 < len(word) and (word[i], word[i + 1]) == pair
        merged.append(token if together else word[i])
        i += 2 if together else 1
    return merged

# ---- The data -------------------------------------------------------------------------------------------------------
STRETCH = 2048  # tokens; every tenth stretch of the corpus is for validation: both parts are spread over all of it

def standard_library() -> str:
    """The source text of Python's own standard library, without tests and tables. Raises BadInput if it is not here."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}  # encodings: only tables
    files = [file for file in sorted(folder.rglob("*.py")) if not skipped & set(file.relative_to(folder).parts)]
    vpd.refuse(len(files) < 100, f"the standard library's source is not in {folder}: give a text with --data FILE")
    return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)

def read_text(file: Path) -> str:
    """The text of a file. Raises BadInput if there is no such file, or it is empty or not UTF-8."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise vpd.BadInput(f"{file} cannot be read ({error}): give a UTF-8 text or a .bin of token ids") from None
    vpd.refuse(not text, f"{file} is empty: give a UTF-8 text")
    return text

def read_bin(file: Path, vocabulary: int) -> np.ndarray:
    """Uint16 token ids, memory-mapped. Raises BadInput if the length is odd or an id is outside the vocabulary."""
    size = file.stat().st_size if file.is_file() else 0
    vpd.refuse(size % 2 or not size, f"{file} has {size} bytes: give a file of uint16 token ids, two bytes each")
    ids, part = np.memmap(file, dtype=np.uint16, mode="r"), 1 << 24
    for start in vpd.with_progress(range(0, len(ids), part), f"checking {file}"):  # it may be larger than memory
        largest = int(ids[start : start + part].max())
        vpd.refuse(largest >= vocabulary, f"{file} holds the token id {largest}, but the vocabulary has {vocabulary}")
    return ids

@functools.cache
def windows(tokens: int, T: int, validation: bool) -> tuple[np.ndarray, int]:
    """Where windows of T tokens may be cut: the starts of training or validation stretches, and the offsets in each.
    Raises BadInput if the corpus is too short to have both."""
    stretch = min(STRETCH, tokens // 10)
    vpd.refuse(stretch < T, f"the corpus has {tokens} tokens; for windows of {T} give one with at least {10 * T}")
    starts = np.arange(0, tokens - stretch + 1, stretch)
    return starts[(np.arange(len(starts)) % 10 == 9) == validation], stretch - T + 1

def sample(ids: np.ndarray, T: int, B: int, validation: bool, generator: torch.Generator) -> Tensor:
    """(B, T) token ids, windows that lie wholly in training or in validation stretches."""
    starts, offsets = windows(len(ids), T, validation)
    at = starts[torch.randint(len(starts), (B,), generator=generator).numpy()]
    at = at + torch.randint(offsets, (B,), generator=generator).numpy()
    return torch.from_numpy(np.stack([ids[i : i + T] for i in at]).astype(np.int64))

# ---- The target, stage 1 --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Preset:
    """What fits a machine: the target and its training, the subcomponents, the settings of the decomposition."""
    shape: Shape
    batch: int  # windows, for target and decomposition; of all processes together
    target_steps: int
    target_lr: float
    C: dict[str, int]  # subcomponents of each of these matrices, in every layer
    config: vpd.Config

COMMON = {"lr_final": 0.1, "p_end": 0.4, "G_type": "transformer"}  # as published
PRESETS = {
    "laptop": Preset(  # 6 to 15 minutes on two cores; many small steps beat few large ones (but not with batch=4)
        Shape(layers=2, width=64, heads=4, context=64, vocabulary=1024), batch=8, target_steps=10_000, target_lr=3e-3,
        C={"attn.q": 64, "attn.k": 64, "attn.v": 128, "attn.o": 128, "mlp.up": 224, "mlp.down": 224},
        # ours: adversary_steps=0, at four times the rate: the ascent that is free with the loss is enough, and saves a
        # fifth of the time. lr: from 5e-3 on, cross-entropy trades against L0. shrink 0, 1, 2 (one thread): rounded KL
        # 0.21, 0.18, 0.17, its cross-entropy 0.20, 0.17, 0.15 above the target's, L0 47, 49, 50.
        config=vpd.Config(steps=4000, lr=7e-3, muon=2.0, w_importance=6.5e-4, w_frequency=3.5e-4, w_delta=1e4,
                          shrink=2.0, adversary_steps=0, adversary_lr=0.04, G_width=96, G_blocks=1, **COMMON)),
    "gpu": Preset(  # for one GPU; not measured
        Shape(layers=4, width=256, heads=4, context=256, vocabulary=4096), batch=64,
        target_steps=20_000, target_lr=1e-3,
        C={"attn.q": 256, "attn.k": 256, "attn.v": 512, "attn.o": 512, "mlp.up": 1024, "mlp.down": 1024},
        config=vpd.Config(steps=20_000, lr=5e-4, w_importance=5e-4, w_frequency=2.5e-4, w_delta=1e4,
                          shrink=2.0, G_width=512, G_blocks=4, G_heads=8, bf16=True, **COMMON)),
    "paper": Preset(  # the published run, whose target was trained elsewhere; 8 GPUs, days; not measured
        Shape(layers=4, width=768, heads=6, context=512, vocabulary=50_304), batch=64,
        target_steps=100_000, target_lr=6e-4,
        C={"attn.q": 512, "attn.k": 512, "attn.v": 1024, "attn.o": 1024, "mlp.up": 3072, "mlp.down": 3584},
        config=vpd.Config(steps=400_000, lr=5e-5, muon=0, beta2=0.999, clip_G=math.inf, w_importance=2e-4,
                          w_frequency=1e-4, w_delta=1e7, G_width=2048, G_blocks=8, G_heads=16, G_activations=False,
                          bf16=True, **COMMON))}  # fmt: skip
EVALUATED, SOME = 16_384, 2048  # positions of validation text, SOME for quick looks; short runs: a batch for ten steps
CHECKPOINT_SECONDS = 60  # what a kill costs at most, but for the warm-up; five times that where checkpoints are large

def validation_batches(ids: np.ndarray, preset: Preset, device: str, positions: int = 0) -> list[Tensor]:
    """The evaluation set, or its first positions, for the target's curve and the decomposition alike: (n, T), n no more
    than 8 and than in a micro-batch, so that it fits where a step does."""
    T, B, generator = preset.shape.context, preset.batch, torch.Generator().manual_seed(12345)
    number = max(1, min(math.ceil((positions or EVALUATED) / (B * T)), preset.config.steps // 10))
    rows = torch.cat([sample(ids, T, B, True, generator) for _ in range(number)]).to(device)
    return list(rows.split(math.gcd(8, B // preset.config.accumulate // vpd.processes())))

@torch.no_grad()
def validation_loss(model: GPT, batches: list[Tensor], bf16: bool = False) -> float:
    """Mean next-token cross-entropy in nats over all batches (B, T), in the precision of training."""
    with vpd.precision(batches[0].device, bf16):
        return sum(cross_entropy(batch, model(batch)).item() for batch in batches) / len(batches)

def load_saved(file: Path, device: str) -> dict:
    """What a run saved; raises BadInput if the file is damaged."""
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises almost anything on a file that is not its own
        raise vpd.BadInput(f"{file} is damaged ({type(error).__name__}): delete it, and go on with --resume") from error

def write(file: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with vpd.replacing(file) as opened:
        opened.write(text.encode())

def save_target(model: GPT, record: dict, folder: Path) -> None:
    """Write target.pt: the model, its shape, and the record of its training (see `train_target`)."""
    with vpd.replacing(folder / "target.pt") as file:
        torch.save({"shape": asdict(model.shape), "model": model.state_dict(), "record": record}, file)

def train_target(model: GPT, ids: np.ndarray, preset: Preset, seed: int, folder: Path, device: str) -> dict:
    """Train the model (AdamW, warm-up, cosine to a tenth), or go on where a killed run stopped. Writes target.pt.
    Returns {"curve": [(step, validation cross-entropy)], "seconds"}. Raises BadInput if the loss is not finite."""
    parameters, bf16, steps = list(model.parameters()), preset.config.bf16, preset.target_steps
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.1, fused=not device.startswith("mps"))
    generator, step, record = torch.Generator(), 0, {"curve": [], "seconds": 0.0}
    unfinished, validation = folder / "target_unfinished.pt", validation_batches(ids, preset, device)
    if unfinished.exists():
        state = load_saved(unfinished, device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, record = state["step"], state["record"]
    if not record["curve"]:
        record["curve"].append((0, validation_loss(model, validation, bf16)))
    began, saved = time.monotonic() - record["seconds"], time.monotonic()
    while step < steps:
        schedule = min(1, (step + 1) / 100, 0.55 + 0.45 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = preset.target_lr * schedule
        generator.manual_seed((seed * 10**9 + step) * vpd.processes() + vpd.rank())  # from the step: nothing to save
        batch = sample(ids, preset.shape.context, preset.batch // vpd.processes(), False, generator).to(device)
        optimizer.zero_grad()
        for part in batch.chunk(preset.config.accumulate):
            with vpd.precision(device, bf16):
                loss = cross_entropy(part, model(part)) / preset.config.accumulate
            vpd.refuse(not loss.isfinite(), f"the target's loss is not finite at step {step}: lower target_lr")
            loss.backward()
        vpd.global_mean([parameter.grad for parameter in parameters])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        record["seconds"] = time.monotonic() - began
        if step % max(1, steps // 50) == 0 or step == steps:
            ce, left = validation_loss(model, validation, bf16), record["seconds"] / step * (steps - step)
            record["curve"].append((step, ce))
            line = f"target: step {step}/{steps}  validation loss {ce:.3f}  {left:.0f} s left"
            if vpd.rank() == 0:
                vpd.progress(line, step == steps or step % max(1, steps // 5) == 0)
        if vpd.rank() == 0 and time.monotonic() - saved > CHECKPOINT_SECONDS * (5 if preset.shape.width > 500 else 1):
            saved, state = time.monotonic(), {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            with vpd.replacing(unfinished) as file:
                torch.save(state | {"step": step, "record": record}, file)
    if vpd.rank() == 0:
        save_target(model, record, folder)
        unfinished.unlink(missing_ok=True)
    return record

GPT2_NAMES = {  # our modules -> those of Hugging Face's GPT-2, where q, k and v are one matrix
    "tokens": "wte", "positions": "wpe", "norm": "ln_f", "norm_attn": "ln_1", "norm_mlp": "ln_2",
    "attn.q": "attn.c_attn", "attn.k": "attn.c_attn", "attn.v": "attn.c_attn", "attn.o": "attn.c_proj",
    "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}  # fmt: skip
MASKS = (".attn.bias", ".attn.masked_bias")  # of attention, in older files: no weights

def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file: the length of a header, 8 bytes; the header, JSON; raw tensors."""
    kinds, content = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}, file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__" and not name.endswith(MASKS):
            begin, end = entry["data_offsets"]
            raw = torch.frombuffer(bytearray(content[start + begin : start + end]), dtype=kinds[entry["dtype"]])
            tensors[name] = raw.reshape(entry["shape"])
    return tensors

def load_gpt2(source: Path) -> GPT:
    """A GPT-2 of any size in Hugging Face's layout, in eval mode, on the CPU: from a folder as it is downloaded, with
    config.json and model.safetensors or pytorch_model.bin, or from such a file alone (then heads are of width 64).
    Raises BadInput, naming the tensor, if one is missing, too many or of a wrong shape, or lm_head is not wte."""
    file, config = source, {}
    try:
        if source.is_dir():
            config, file = json.loads((source / "config.json").read_text()), source / "model.safetensors"
            file = file if file.exists() else source / "pytorch_model.bin"
        safe = file.suffix == ".safetensors"
        given = read_safetensors(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        given = {name.removeprefix("transformer."): x.float() for name, x in given.items() if not name.endswith(MASKS)}
    except Exception as error:  # torch.load raises almost anything on a file that is not its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise vpd.BadInput(f"{file} is no checkpoint that can be read ({reason}): give a GPT-2") from error
    vpd.refuse(not {"wte.weight", "wpe.weight"} <= given.keys(), f"{file} lacks wte.weight or wpe.weight: give a GPT-2")
    (vocabulary, width), context = given["wte.weight"].shape, len(given["wpe.weight"])
    tied = given.pop("lm_head.weight", given["wte.weight"]).equal(given["wte.weight"])
    vpd.refuse(not tied, f"{file}: lm_head.weight is not wte.weight; give a GPT-2 whose unembedding is its embedding")
    heads, epsilon = config.get("n_head", width // 64), config.get("layer_norm_epsilon", 1e-5)
    vpd.refuse(not heads or width % heads, f"{file}: {heads} heads do not divide the width {width}: give its folder")
    usual = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
             "scale_attn_by_inverse_layer_idx": (False,)}  # fmt: skip
    unusual = [f"{name} {config[name]}" for name, known in usual.items() if config.get(name, known[0]) not in known]
    vpd.refuse(unusual, f"{source}/config.json has {', '.join(unusual)}: give a GPT-2 as it was published")
    layers = 1 + max((int(match[1]) for name in given if (match := re.match(r"h\.(\d+)\.", name))), default=-1)
    model, state, used = GPT(Shape(layers, width, heads, context, vocabulary, epsilon)), {}, set()
    for name, ours in model.state_dict().items():
        layer, path, tensor = re.fullmatch(r"(h\.\d+\.)?(.+)\.(weight|bias)", name).groups(default="")
        theirs, transposed = f"{layer}{GPT2_NAMES[path]}.{tensor}", layer and ours.dim() == 2  # Conv1D: (d_in, d_out)
        thirds = 3 if theirs.endswith(f"c_attn.{tensor}") else 1
        *rows, last = ours.T.shape if transposed else ours.shape
        actual, expected = tuple(given[theirs].shape) if theirs in given else "missing", (*rows, thirds * last)
        vpd.refuse(actual != expected, f"{file}: {theirs} is {actual}, and should be of shape {expected}")
        part = given[theirs].chunk(thirds, -1)["qkv".index(path[-1]) if thirds == 3 else 0]
        state[name] = part.T if transposed else part
        used.add(theirs)
    vpd.refuse(extra := sorted(given.keys() - used), f"{file} holds a tensor that GPT-2 does not have: {extra[:1]}")
    model.load_state_dict(state)
    return model.eval()

# ---- A run: the target, its decomposition (stage 2 is vpd.decompose), and what they leave in a folder ---------------
# Of a run, by default: the standard library, a target of its own, the preset's steps and batch; C is a factor.
SETTINGS = {"preset": "laptop", "data": "", "init_from": "", "seed": 0, "steps": 0, "batch": 0, "accumulate": 1, "C": 1}

@dataclass
class Run:
    """A run folder, open: what its first two stages have left."""
    folder: Path
    settings: dict  # see SETTINGS
    preset: Preset
    model: GPT  # the target
    ids: np.ndarray  # the corpus
    tokenizer: Tokenizer | None  # None: the corpus was given as token ids, without a GPT-2's folder
    record: dict  # of the target's training
    decomposition: vpd.Decomposition
    device: str

def sized(preset: Preset, shape: Shape) -> Preset:
    """The preset for this shape: C in the published proportions; G twice as wide and half as deep as the model."""
    parts = {"attn.q": 2 / 3, "attn.k": 2 / 3, "attn.v": 4 / 3, "attn.o": 4 / 3, "mlp.up": 4, "mlp.down": 14 / 3}
    heads = max(1, shape.width // 64)
    C = {matrix: max(1, round(part * shape.width)) for matrix, part in parts.items()}
    G = {"G_width": 2 * heads * (shape.width // heads), "G_blocks": max(1, shape.layers // 2), "G_heads": heads}
    return replace(preset, C=C, config=replace(preset.config, **G))

def peak_memory(model: GPT, C: dict[str, int], positions: int, config: vpd.Config) -> float:
    """Gigabytes that a step takes, for C {path: number} and so many positions in a process; fitted to measurements on
    the CPU. U, V and G have gradients and moments, the sources moments; all else is of a micro-batch."""
    sizes = {path: sum(model.get_submodule(path).weight.shape) for path in C}  # d_in + d_out
    K, UV = sum(C.values()) + len(C), sum(n * sizes[path] for path, n in C.items())
    G = config.G_width * (sum(sizes.values()) / 2 + 12 * config.G_width * config.G_blocks + K)
    here = 15 * K + 6 * model.shape.vocabulary + 3 * sum(sizes.values()) + 13 * config.G_width * config.G_blocks
    lasting = sum(x.numel() for x in model.parameters()) + (3 if config.muon else 4) * UV + 4 * G + 3 * K * positions
    return 4e-9 * (lasting + here * positions / config.accumulate)

def check_memory(model: GPT, C: dict[str, int], preset: Preset, device: str) -> None:
    """Say what a step takes, and what the device has. Raises BadInput if it does not fit, with a batch that would."""
    B, n, has = preset.batch // vpd.processes(), preset.config.accumulate, math.inf
    with contextlib.suppress(ValueError, AttributeError):  # Windows does not say
        shared = lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / vpd.processes()
        has = (torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else shared()) / 1e9
    takes = lambda b, n: peak_memory(model, C, b * preset.shape.context, replace(preset.config, accumulate=n))
    others = ((b, n) for b in (B >> i for i in range(B.bit_length())) for n in range(1, b + 1) if b % n == 0)
    b, parts = next((other for other in others if takes(*other) < has), (0, 0))
    advice = f"give --batch {b * vpd.processes()} --accumulate {parts}" if b else "give fewer subcomponents with --C"
    line = f"a step takes about {takes(B, n):.1f} GB, and {device} has {has:.1f}"
    vpd.refuse(takes(B, n) > has, f"{line}: {advice}")
    if vpd.rank() == 0:
        print(line, file=sys.stderr)

def corpus(data: str, preset: Preset, places: list[Path]) -> tuple[np.ndarray, Tokenizer | None]:
    """Token ids (tokens,) and their tokenizer, from the first run folder that has them. Else the data are encoded. A
    .bin holds ids; their tokenizer is then that of the run, or of a GPT-2's folder, or None. Raises BadInput: see
    `read_text`, `read_bin`, `windows`."""
    made = [place for place in places if (place / "settings.json").exists() and (place / "tokenizer.json").exists()]
    tokenizer = Tokenizer(**json.loads((made[0] / "tokenizer.json").read_text())) if made else None
    if data.endswith(".bin"):
        ids = read_bin(Path(data), preset.shape.vocabulary)
        with contextlib.suppress(vpd.BadInput):  # the folder may hold no tokenizer that serves: no prompts then
            found = tokenizer or gpt2_tokenizer(places[-1])
            tokenizer = found if len(found.bytes) <= preset.shape.vocabulary else None
    elif made and (made[0] / "tokens.npy").exists():
        ids = np.load(made[0] / "tokens.npy", mmap_mode="r")
    else:
        text, of_gpt2 = read_text(Path(data)) if data else standard_library(), (places[-1] / "config.json").exists()
        if not tokenizer:
            tokenizer = gpt2_tokenizer(places[-1]) if of_gpt2 else Tokenizer.learn(text, preset.shape.vocabulary)
        n, vocabulary = len(tokenizer.bytes), preset.shape.vocabulary
        vpd.refuse(n > vocabulary, f"the tokenizer has {n} tokens, but the model {vocabulary}: give its own")
        ids = tokenizer.encode(text)
    windows(len(ids), preset.shape.context, True)  # is it long enough?
    return ids, tokenizer

def open_run(settings: dict, folder: Path, device: str) -> Run:
    """The first two stages of a run. What is already in the folder is loaded, and not computed again.
    settings: see SETTINGS. Raises BadInput, and leaves no folder behind, if they cannot serve."""
    settings = SETTINGS | settings
    preset, data, seed, n = PRESETS[settings["preset"]], settings["data"], settings["seed"], vpd.processes()
    preset = replace(preset, batch=settings["batch"] or preset.batch)
    parts, what = n * settings["accumulate"], f"{n} processes and {settings['accumulate']} micro-batches"
    vpd.refuse(preset.batch % parts, f"a batch of {preset.batch} does not divide over {what}: choose another number")
    places = [folder, Path(settings["init_from"])] if settings["init_from"] else [folder]
    torch.manual_seed(seed)
    with vpd.rank_0_first():  # the others load what process 0 has saved
        if targets := [place / "target.pt" for place in places if (place / "target.pt").exists()]:
            saved = load_saved(targets[0], device)
            model, record = GPT(Shape(**saved["shape"])), saved["record"]
            model.load_state_dict(saved["model"])
        elif settings["init_from"]:
            alone = places[1].is_file() and not data.endswith(".bin")
            vpd.refuse(alone, "--init-from FILE needs --data FILE.bin of its token ids: or give its folder")
            model, record = load_gpt2(places[1]), {"curve": [], "seconds": 0.0}
        else:
            model, record = GPT(preset.shape), None
        if record and not record["curve"]:  # a GPT-2 that was trained elsewhere
            preset = sized(preset, model.shape)
        shape = replace(model.shape, context=min(model.shape.context, preset.shape.context))
        steps = settings["steps"] or preset.config.steps
        warmup = min(preset.config.warmup_steps, steps)  # never longer than the training
        config = replace(preset.config, seed=seed, steps=steps, warmup_steps=warmup, accumulate=settings["accumulate"])
        preset = replace(preset, shape=shape, config=config)
        numbers = [(matrix, max(1, round(number * settings["C"]))) for matrix, number in preset.C.items()]
        C = {f"h.{i}.{matrix}": number for i in range(shape.layers) for matrix, number in numbers}
        if not (finished := (folder / "metrics.json").exists()):
            check_memory(model, C, preset, device)
        ids, tokenizer = corpus(data, preset, places)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "settings.json").exists():  # first: with the settings alone a killed run can be resumed
            write(folder / "settings.json", json.dumps(settings))
        if record and not (folder / "target.pt").exists():  # --init-from brought it
            save_target(model, record, folder)
        if tokenizer and not (folder / "tokenizer.json").exists():
            if not data.endswith(".bin"):
                with vpd.replacing(folder / "tokens.npy") as file:  # first: tokenizer.json says that it is whole
                    np.save(file, ids)
            write(folder / "tokenizer.json", json.dumps({"merges": tokenizer.merges, "gpt2": tokenizer.gpt2}))
    model = model.to(device).eval()
    if settings["preset"] != "laptop" and not device.startswith("cuda") and vpd.rank() == 0 and not finished:
        print(f"warning: the preset {settings['preset']} is for GPUs; on {device} it takes very long", file=sys.stderr)
    record = record or train_target(model, ids, preset, seed, folder, device)
    out, get_batch = folder / "decomposition", functools.partial(sample, ids, shape.context, preset.batch // n, False)
    if finished:  # whatever the number of processes that made it
        try:
            decomposition = vpd.load_decomposition(out, config, device)
        except Exception:  # G has other parts, or the file is not its own
            raise vpd.BadInput(f"{out}/checkpoint.pt is damaged or of other code: make the run anew") from None
    else:
        look = functools.partial(glance, model, validation_batches(ids, preset, device, SOME))
        pause = CHECKPOINT_SECONDS * (5 if peak_memory(model, C, preset.batch // n * shape.context, config) > 2 else 1)
        decomposition = vpd.decompose(model, C, get_batch, vpd.kl, config, out, pause, look)
    return Run(folder, settings, preset, model, ids, tokenizer, record, decomposition, device)

def glance(model: GPT, batches: list[Tensor], found: vpd.Decomposition) -> dict[str, float]:
    """How good a decomposition is by now, on a few validation batches: KL, L0 and alive, for the log."""
    counts = vpd.count_subcomponents(vpd.predict_importances(model, found, batch)[1] for batch in batches)["total"]
    kl = collections.Counter()
    for batch in batches:  # predicted anew: a large model's importances of all batches would take more than a step
        target, g = vpd.predict_importances(model, found, batch)
        for name, masks in vpd.evaluation_masks(g, torch.Generator(batch.device).manual_seed(0)):
            if name in ("stochastic", "rounded_0"):
                with torch.no_grad(), vpd.precision(batch.device, found.bf16):
                    output = vpd.masked_forward(model, found.U, found.V, masks, batch)
                kl["validation KL " + label(name)] += vpd.kl(target, output).item() / len(batches)
    names = {"l0": "L0", "l0_above_0.1": "L0 above 0.1", "alive": "alive"}
    return dict(kl) | {f"validation {name}": counts[key] for key, name in names.items()}

def load(folder: str | Path, device: str = "cpu") -> Run:
    """A finished run, to work with in Python: its model, decomposition, tokenizer, corpus (`ids`). Raises BadInput."""
    return open_run(chosen_settings({}, Path(folder), resume=False, reading=True), Path(folder), device)

# ---- The evaluation, stage 3 ----------------------------------------------------------------------------------------
def compute_recovered(curve: list, ce: float) -> float:
    """The share of its training at which the target itself first had this validation cross-entropy ([VPD] section 6).
    Between the points of the curve [(step, cross-entropy), ...] linearly; 0 if it began as good, 1 if it never was."""
    if curve[0][1] <= ce:
        return 0.0
    for (step, value), (next_step, next_value) in zip(curve, curve[1:]):
        if next_value <= ce:
            return (step + (next_step - step) * (value - ce) / (value - next_value)) / curve[-1][0]
    return 1.0

@torch.no_grad()
def continuation(run: Run, prompt: Tensor, tokens: int, masking: str = "target") -> str:
    """The text of `tokens` tokens, sampled after the prompt (1, T) at temperature 0.8, with the same noise always.
    By the target, or by the decomposition under a masking of `vpd.evaluation_masks`."""
    ids, generator, (U, V) = prompt, torch.Generator().manual_seed(0), (run.decomposition.U, run.decomposition.V)
    for _ in range(tokens):
        window = ids[:, -run.model.shape.context :]
        logits, g = vpd.predict_importances(run.model, run.decomposition, window)
        if masking != "target":
            masks = dict(vpd.evaluation_masks(g, torch.Generator(ids.device).manual_seed(0)))[masking]
            with vpd.precision(run.device, run.decomposition.bf16):
                logits = vpd.masked_forward(run.model, U, V, masks, window)
        # Gumbel noise: the largest sum is a sample from the softmax
        noise = -(-torch.rand(logits[:, -1].shape, generator=generator).clamp(min=1e-9).log()).log()
        ids = torch.cat([ids, (logits[:, -1].cpu() / 0.8 + noise).argmax(-1, keepdim=True).to(ids.device)], 1)
    return run.tokenizer.decode(ids[0, prompt.shape[1] :].tolist())

def label(masking: str) -> str:
    """A masking of `vpd.evaluation_masks` as people read it."""
    return "g as masks" if masking == "g" else masking.replace("_", " at ")

def evaluate(run: Run) -> dict:
    """The third stage: metrics.json, which is returned, the pictures, and continuations.txt, which is printed.
    Adds to `vpd.evaluate`: cross-entropy (nats per token), bits per byte and, for a known curve, compute recovered."""
    began, folder, config, curve = time.monotonic(), run.folder, run.preset.config, run.record["curve"]
    batches = validation_batches(run.ids, run.preset, run.device)
    figures = vpd.evaluate(run.model, run.decomposition, batches, vpd.kl, config.seed, cross_entropy)
    losses, bits_per_byte = figures.pop("loss"), None
    ce = losses.pop("target")
    above = {masking: x - ce for masking, x in losses.items()}
    if run.tokenizer:
        ids = torch.cat([batch.flatten() for batch in batches]).tolist()
        lengths = [len(run.tokenizer.bytes[i]) for i in ids if i < len(run.tokenizer.bytes)]  # not of <|endoftext|>
        bits_per_byte = ce / math.log(2) * len(ids) / max(1, sum(lengths))
        prompt = batches[0][:1, : run.preset.shape.context // 2]
        lines = [f"--- the prompt\n{run.tokenizer.decode(prompt[0].tolist())}"]
        for masking in vpd.with_progress(("target", "unmasked", "stochastic", "rounded_0", "g"), "continuations"):
            lines.append(f"--- {label(masking)}\n{continuation(run, prompt, 60, masking)}")
        write(folder / "continuations.txt", "\n".join(lines))
        print("\n".join(lines))
    target = {"ce": ce, "bits_per_byte": bits_per_byte, "parameters": sum(x.numel() for x in run.model.parameters())}
    metrics = run.settings | {"target": target | {"curve": curve}, "ce_above_target": above}
    if curve and abs(curve[-1][1] - ce) < 1e-3:  # measured on the same text
        metrics["compute_recovered"] = {masking: compute_recovered(curve, ce + x) for masking, x in above.items()}
    metrics |= {"kl": figures.pop("divergence")} | figures
    vpd.draw_run(metrics, log := folder / "decomposition" / "log.jsonl", folder / "training.png")
    seconds = json.loads(log.read_text().splitlines()[-1])["seconds"]
    spent = {"target": run.record["seconds"], "decomposition": seconds, "evaluation": time.monotonic() - began}
    step, tokens = seconds / config.steps, run.preset.batch * run.preset.shape.context  # of a step
    metrics |= {"seconds": spent, "speed": {"seconds_per_step": step, "tokens_per_second": tokens / step}}
    write(folder / "metrics.json", json.dumps(metrics, indent=1))  # last: it says that the run is finished
    return metrics

def table(metrics: dict) -> str:
    """The metrics of a run as text for the terminal."""
    target, speed, recovered = metrics["target"], metrics["speed"], metrics.get("compute_recovered", {})
    bits = f", {target['bits_per_byte']:.2f} bits per byte" if target["bits_per_byte"] else ""
    lines = [f"target: {target['parameters']:,} parameters, validation cross-entropy {target['ce']:.3f}{bits}"]
    lines.append("masking        cross-entropy above target      KL   compute recovered")
    for masking, kl in metrics["kl"].items():
        share = f"{recovered[masking]:.1%}" if recovered else "unknown"
        lines.append(f"{label(masking):14s} {metrics['ce_above_target'][masking]:25.3f} {kl:7.3f} {share:>19s}")
    attack = "  ".join(f"{steps} steps {kl:.2f}" for steps, kl in metrics["adversary"].items())
    lines += [f"fresh adversary, KL:  {attack}", "matrix            C  alive      L0"]
    for path, m in [*metrics["matrices"].items(), ("total", metrics["total"])]:
        lines.append(f"{path:12s} {m['C']:6d} {m['alive']:6d} {m['l0']:7.2f}")
    lines.append(f"L0 is {metrics['total']['l0_per_alive']:.1%} of the alive")
    rate = f"{speed['seconds_per_step']:.3g} s per step, {speed['tokens_per_second']:,.0f} tokens per second"
    return "\n".join([*lines, f"{sum(metrics['seconds'].values()) / 60:.0f} minutes; the decomposition: {rate}"])

# ---- Reading: what every subcomponent does, and the page of all of them ---------------------------------------------
FIRES = 0.1  # a subcomponent fires where its causal importance exceeds this ([VPD] section 8)
PARTS, EXAMPLES, AROUND = 3000, 8, 10  # subcomponents on the page at most; examples of each; tokens on either side
FLOWS = 18_000  # divided by the number of matrices: how many parts, the clearest, get sources and targets
TO_STREAM = ("attn.o", "mlp.down")  # matrices that write to the residual stream, where tokens have directions

@torch.no_grad()
def observe(run: Run) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The evaluation set (N, T), and what every subcomponent does on it: importances and activations {path: (N, T, C)}.
    The activation is ||U_c|| V_c^T x, signed: how much of its write direction a subcomponent adds."""
    U, V, batches = run.decomposition.U, run.decomposition.V, validation_batches(run.ids, run.preset, run.device)
    g, a = ({path: [] for path in U} for _ in range(2))
    for batch in vpd.with_progress(batches, "importances"):
        with vpd.precision(run.device, run.decomposition.bf16):
            _, inputs = vpd.forward_with_inputs(run.model, U, batch)
            importances = vpd.causal_importances(run.decomposition.G(inputs, U, V), U)
            for path, x in vpd.by_path(importances, U).items():
                g[path].append(x[..., :-1].half())
                a[path].append((inputs[path] @ V[path] * U[path].norm(dim=-1)).half())
    g, a = ({path: torch.cat(each.pop(path)) for path in U} for each in (g, a))  # pop: it is freed
    return torch.cat(batches), g, a

def mean_importances(run: Run) -> dict[str, Tensor]:
    """Of every subcomponent over the evaluation set, {path: (C,)}, from metrics.json."""
    matrices = json.loads((run.folder / "metrics.json").read_text())["matrices"].items()
    return {path: torch.tensor(matrix["mean_importance"], device=run.device) for path, matrix in matrices}

def alive(run: Run) -> dict[str, Tensor]:
    """Which subcomponents are alive, {path: (C,) bool}."""
    return {path: mean > vpd.ALIVE for path, mean in mean_importances(run).items()}

def firing(g: Tensor, most: int | None = None) -> dict[int, Tensor]:
    """Where each subcomponent of a matrix fires, {c: (N, T) bool}, of those that fire at all; of more than `most` those
    of the largest mean importance. g: (N, T, C)."""
    order = g.sum((0, 1), dtype=torch.float32).argsort(descending=True, stable=True)
    fired = order[(g.amax((0, 1)) > FIRES)[order]][:most]
    return {c: g[..., c] > FIRES for c in sorted(fired.tolist())}

def neighbourhood(ids: Tensor, vocabulary: int) -> dict[str, tuple[Tensor, Tensor]]:
    """{side: (ids (N, T), -1 where none is; share of each id (vocabulary,))}, of a token and its two neighbours."""
    padded = F.pad(ids, (1, 1), value=-1)
    sides = {"this token": ids, "the token before": padded[:, :-2], "the token after": padded[:, 2:]}
    return {side: (x, torch.bincount(x[x >= 0], minlength=vocabulary) / (x >= 0).sum()) for side, x in sides.items()}

def commonest(seen: Tensor, fires: Tensor) -> list[tuple[int, float]]:
    """The three commonest of the ids `seen` (N, T), -1 for none, where a subcomponent fires (N, T): [(id, share)]."""
    ids = sorted(seen[fires & (seen >= 0)].tolist())  # of equally common ones the smallest come first
    return [(i, n / len(ids)) for i, n in collections.Counter(ids).most_common(3)]

def clearness(sides: dict, fires: Tensor) -> tuple[float, str, list[tuple[int, float]]]:
    """How clearly one sees when a subcomponent fires, (N, T): (score, by which of `sides`, its commonest ids, shares).
    Of the positions where it fires, the share that has one of the three commonest ids, less the share of these ids in
    all text; times n / (n + 20) for n positions, because chance makes few of them look alike. At most 1."""
    best = (-1.0, "", [])
    for side, (seen, base) in sides.items():
        if top := commonest(seen, fires):
            n = int((fires & (seen >= 0)).sum())
            score = sum(share - base[i].item() for i, share in top) * n / (n + 20)
            best = max(best, (score, side, top))
    return best

def examples(ids: Tensor, g: Tensor, a: Tensor, fires: Tensor, generator: torch.Generator) -> list[list]:
    """Random windows where c fires, from (N, T): [ids, importances 0 to 9, activations -9 to 9, the firing token]."""
    places, largest, chosen = fires.nonzero(), a[fires].abs().max().clamp(min=1e-6), []
    for n, t in places[torch.randperm(len(places), generator=generator)[:EXAMPLES].to(places.device)].tolist():
        window = slice(max(0, t - AROUND), t + AROUND + 1)
        importance, strength = (9 * g[n, window]).ceil(), (9 * a[n, window] / largest).round().clamp(-9, 9)
        chosen.append([ids[n, window].tolist(), importance.int().tolist(), strength.int().tolist(), t - window.start])
    return chosen

def readout(model: GPT) -> Tensor:
    """What a direction in the residual stream adds to each logit, (vocabulary, width): the unembedding behind the norm.
    It leaves out the norm's division by the length of the stream, which depends on the input."""
    E = model.tokens.weight.detach() * model.norm.weight.detach()
    return E - E.mean(1, keepdim=True)  # the norm takes off the mean

def describe_all(run: Run, ids: Tensor, g: dict[str, Tensor], a: dict[str, Tensor]) -> list[dict]:
    """The subcomponents that fire, in each matrix at most PARTS / matrices, the most important, with what one needs to
    judge them, the clearest first. ids, g, a: of `observe`. "density": share of positions where it fires; "importance":
    mean there; "raises", "lowers": the tokens that it raises and lowers most there, for matrices of TO_STREAM."""
    sides, E, parts = neighbourhood(ids, run.preset.shape.vocabulary), readout(run.model), []
    for path in vpd.with_progress(g, "subcomponents, by matrix"):
        for c, fires in firing(g[path], PARTS // len(g)).items():
            raises, lowers, (score, by, tokens) = [], [], clearness(sides, fires)
            importance, activation = (x[path][..., c][fires].float().mean() for x in (g, a))
            if path.endswith(TO_STREAM):
                raised = E @ run.decomposition.U[path][c].detach() * activation.sign()  # (vocabulary,)
                raises, lowers = raised.topk(6).indices.tolist(), raised.neg().topk(6).indices.tolist()
            parts.append({"name": f"{path}:{c}", "matrix": path, "c": c, "fires": int(fires.sum()),
                          "density": fires.float().mean().item(), "importance": importance.item(), "clearness": score,
                          "by": by, "tokens": tokens, "raises": raises, "lowers": lowers})  # fmt: skip
    return sorted(parts, key=lambda part: -part["clearness"])

def shown(run: Run, token: int) -> str:
    """A token as people can see it; without a tokenizer its number."""
    return repr(run.tokenizer.decode([token])) if run.tokenizer else str(token)

def components(run: Run, ids: Tensor, g: dict[str, Tensor]) -> dict:
    """Which alive subcomponents are active together (`vpd.cluster`, g > 0.01), among the 1,500 of the largest mean
    importance; on ids (N, T), g {path: (N, T, C)}. Writes groups.json: "found"; "span": how many have
    members in several layers; "bits_before", "bits_after": per token; "groups": [{"members": ["MATRIX:NUMBER", ...],
    "active": share of positions, "by", "tokens": the commonest there, see `clearness`}, ...], the largest first."""
    means, sides = mean_importances(run), neighbourhood(ids, run.preset.shape.vocabulary)
    least = max(vpd.ALIVE, torch.cat(list(means.values())).sort(descending=True).values[:1500].min().item())
    kept = {path: mean >= least for path, mean in means.items()}
    names = [f"{path}:{c}" for path, mask in kept.items() for c in mask.nonzero()[:, 0].tolist()]
    active = torch.cat([g[path][..., mask] for path, mask in kept.items()], -1) > 0.01  # (N, T, kept)
    found, groups = vpd.cluster(active), []
    for columns in sorted(found["groups"], key=len, reverse=True):
        where = active[..., columns].any(-1)
        _, by, tokens = clearness(sides, where)
        members, share = [names[c] for c in columns], where.float().mean().item()
        groups.append({"members": members, "active": share, "by": by, "tokens": tokens})
    span = sum(len({name.split(".")[1] for name in group["members"]}) > 1 for group in groups)
    result = found | {"found": len(groups), "span": span, "groups": groups}
    write(run.folder / "groups.json", json.dumps(result, indent=1))
    return result

def flows(run: Run, parts: list[dict]) -> dict[str, dict]:
    """How much parts add directly to each other's activation, summed over where the target fires; masks: importances
    ([VPD]'s dataset-aggregated attributions). {name: {"sources", "targets": [(name, sum), ...]}}, the 5 strongest."""
    model, found = run.model, run.decomposition
    total, strongest = collections.defaultdict(float), {part["name"]: {"sources": [], "targets": []} for part in parts}
    some = SOME * 12 // len(found.U)  # of more matrices less text, down to one batch
    for batch in vpd.with_progress(validation_batches(run.ids, run.preset, run.device, some), "attributions"):
        _, g = vpd.predict_importances(model, found, batch)
        _, activations, writes = vpd.cut_forward(model, found, g, batch)
        for target in parts[: FLOWS // len(found.U)]:
            path, c = target["matrix"], target["c"]
            if (fires := g[path][..., c] > FIRES).any():
                into = vpd.attributions(activations[path][..., c][fires].sum(), found, g, activations, writes)
                for source, x in into.items():
                    total[source, target["name"]] += x[..., :-1].sum((0, 1))  # (C,)
    pairs = [(f"{source}:{i}", target, x[i].item()) for (source, target), x in total.items()
             for i in x.abs().topk(min(20, len(x))).indices.tolist()]  # fmt: skip
    for source, target, x in sorted(pairs, key=lambda pair: -abs(pair[2])):
        if x and source in strongest:  # some sources are not on the page
            strongest[target]["sources"].append((source, x))
            strongest[source]["targets"].append((target, x))
    return {name: {side: others[:5] for side, others in sides.items()} for name, sides in strongest.items()}

def asked(run: Run, prompt: str) -> dict:
    """A prompt for the page: its tokens, the parts that fire at each, and its circuit if there is one."""
    ids = encoded(run, prompt)
    _, g = vpd.predict_importances(run.model, run.decomposition, ids)
    active = [[] for _ in ids[0]]
    for path, x in g.items():
        for t, c in (x[0, :, :-1] > FIRES).nonzero().tolist():
            active[t].append((f"{path}:{c}", x[0, t, c].item()))
    result = {"ids": ids[0].tolist(), "active": [sorted(parts, key=lambda part: -part[1])[:200] for parts in active]}
    saved = [json.loads(file.read_text()) for file in sorted(run.folder.glob("circuit*.json"), key=os.path.getmtime)]
    if matching := [made for made in saved if made["prompt"] == prompt]:
        graph = matching[-1]["pruned_graph"]  # the newest
        nodes = [(node["position"], f"{node['matrix']}:{node['subcomponent']}") for node in graph["nodes"]]
        rows = [(*nodes[n], [(nodes[edge["source"]][1], edge["attribution"]) for edge in edges[:3]])
                for n, edges in edges_into(graph).items() if edges]  # fmt: skip
        result |= {"token": matching[-1]["token"], "circuit": rows[::-1]}
    return result

def report(run: Run, prompts: list[str]) -> str:
    """Write report.html, and return the clearest subcomponents as text for the terminal, two of each matrix at most."""
    answers = [asked(run, prompt) for prompt in prompts]
    ids, g, a = observe(run)
    parts, generator = describe_all(run, ids, g, a), torch.Generator().manual_seed(0)
    groups = components(run, ids, g)
    group_of = {name: n for n, group in enumerate(groups["groups"]) for name in group["members"]}
    seen = {side: tokens for side, (tokens, _) in neighbourhood(ids, run.preset.shape.vocabulary).items()}
    with torch.no_grad():
        seen["predicted"] = torch.cat([run.model(batch).argmax(-1) for batch in ids.split(8)])
    compared, flow = run.folder / "compare.json", flows(run, parts)
    matches = json.loads(compared.read_text()).get("matches", {}) if compared.exists() else {}
    for part in vpd.with_progress(parts, "examples"):
        importance, activation = (x[part["matrix"]][..., part["c"]].float() for x in (g, a))
        name, fires = part["name"], importance > FIRES
        part["examples"] = examples(ids, importance, activation, fires, generator)
        around = {side: commonest(tokens, fires) for side, tokens in seen.items()}
        values = {"activation": activation[fires], "importance": importance[importance > 0]}
        bars = {of: [x.min().item(), x.max().item(), x.cpu().histc(20).int().tolist()] for of, x in values.items()}
        group = group_of.get(name, -1)  # -1: its mean importance is too low
        part |= {"around": around, "bars": bars, "match": matches.get(name), "group": group, **flow[name]}
    all_firing, most = sum(int((x.amax((0, 1)) > FIRES).sum()) for x in g.values()), PARTS // len(g)
    lost = f"{all_firing - len(parts)} of {all_firing} are left out: of each matrix the {most} most important are here."
    left_out = lost if all_firing > len(parts) else ""
    words = [run.tokenizer.decode([i]) if run.tokenizer else f" {i}" for i in range(run.preset.shape.vocabulary)]
    metrics = json.loads((run.folder / "metrics.json").read_text())
    matrices = {path: [m["alive"], m["C"], m["l0"]] for path, m in metrics["matrices"].items()}
    data = {"vocabulary": words, "matrices": matrices, "parts": parts, "prompts": answers, "groups": groups["groups"]}
    data = json.loads(json.dumps(data), parse_float=lambda x: float(f"{float(x):.3g}"))  # three digits: half as large
    data = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")  # no tag inside
    picture = base64.b64encode((run.folder / "training.png").read_bytes()).decode()
    page = PAGE.replace("@@TABLE@@", html.escape(table(metrics))).replace("@@PICTURE@@", picture)
    write(run.folder / "report.html", page.replace("@@LEFT_OUT@@", left_out).replace("@@DATA@@", data))
    lines, clearest = [], {path: [part for part in parts if part["matrix"] == path][:2] for path in g}
    for part in [part for part in parts if part in clearest[part["matrix"]]][:20]:
        tokens = ", ".join(f"{shown(run, token)} {share:.0%}" for token, share in part["tokens"])
        raises = "; raises " + " ".join(shown(run, token) for token in part["raises"][:4]) if part["raises"] else ""
        where = f"{part['name']:18s} fires {part['fires']:4d} times; {part['by']}: {tokens}{raises}"
        lines.append(f"clearness {part['clearness']:.2f}  {where}")
    lines.append("groups: {found}, {span} of them over several layers; to say what is active at a token takes "
                 "{bits_before:.0f} bits by subcomponent, {bits_after:.0f} by group".format(**groups))  # fmt: skip
    return "\n".join([*lines, f"the page is {run.folder / 'report.html'}", left_out]).rstrip()

PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>The parts of a language model</title><style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --fire: 255, 150, 0 }
body { font: 14px/1.5 system-ui, sans-serif; margin: 1em auto; max-width: 1200px; padding: 0 1em }
pre, section, .wide { overflow-x: auto } img { max-width: min(100%, 27em) } table { border-collapse: collapse }
input, button, select { font: inherit; padding: 4px } #search { width: min(30em, 90%) } .list { width: 100% }
th, td { text-align: left; padding: 2px 8px; border-bottom: 1px solid var(--line); vertical-align: top }
.row, .cell, a, .token { cursor: pointer } .row:hover, .row:focus, .cell:hover, .on { background: var(--soft) }
code, .bars, .example { font: 13px/1.8 ui-monospace, monospace; white-space: pre }
code { background: var(--soft); margin-right: 4px } .cell, #body td:nth-child(2) { white-space: nowrap }
.example { display: grid; grid-template-columns: 1fr auto 1fr; width: min(1130px, 80vw) }
.example > * { overflow: hidden; min-width: 0 } .example > :first-child { text-align: right; direction: rtl }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); gap: 0 2em }
@media (max-width: 600px) { .late { display: none } code, .bars { white-space: pre-wrap; overflow-wrap: anywhere } }
</style><h1>The parts of a language model</h1>
<p>Every weight matrix of this model was written as a sum of <em>parts</em>, each of which reads one direction and
writes one. A part <em>fires</em> at a token where it is needed for the output: its causal importance exceeds 0.1. All
others can be taken away there, in any combination, and the prediction hardly changes.</p>
<details><summary>How good is it?</summary><pre>@@TABLE@@</pre><img src="data:image/png;base64,@@PICTURE@@"></details>
<p><button data-tab="parts">Parts</button> <button data-tab="groups">Groups</button>
<button data-tab="prompts">Prompts</button></p>
<section id="parts"><p>Click a matrix to see its parts: alive of all, and how many are needed at a token.</p>
<div class="wide"><table id="model"></table></div>
<p><input id="search" placeholder="search: a token, a matrix or a part (press /)" aria-label="search">
<span id="count"></span> @@LEFT_OUT@@</p>
<table class="list"><thead><tr id="head"></tr></thead><tbody id="body"></tbody></table>
<p><button id="more">more</button></p></section>
<section id="groups"><p>Parts that are active together, by minimum description length; what they have in common are the
commonest tokens where they are active.</p><table class="list" id="grouped"></table></section>
<section id="prompts"><p>Click a token to see the parts that fire there. Ask with --report "PROMPT" ...</p>
</section><script type="application/json" id="data">@@DATA@@</script><script>
const get = id => document.getElementById(id), data = JSON.parse(get('data').textContent), words = data.vocabulary
const visible = text => text.replace(/\n/g, '\u23ce').replace(/\t/g, '\u2192') // one line each
const named = new Set(data.parts.map(p => p.name))
function add(parent, tag, text = '', style = '', click = null) {
  const e = document.createElement(tag); e.textContent = text; e.className = style; parent.append(e)
  if (click) Object.assign(e, { onclick: click, tabIndex: 0, onkeydown: k => k.key == 'Enter' && click(k) })
  return e
}
function tokens(parent, list, title = '') {
  const e = add(parent, 'div', title)
  for (const t of list) {
    add(e, 'code', visible(words[t[0] ?? t]))
    if (t[1]) e.append(Math.round(100 * t[1]) + ' % ')
  }
}
function links(parent, title, list) {
  const e = add(parent, 'div', list.length ? title : '')
  for (const [name, x] of list) {
    const a = add(e, named.has(name) ? 'a' : 'span', name); if (named.has(name)) a.href = '#' + name
    e.append(x == null ? ' ' : ' ' + x + ', ')
  }
}
const bars = ([least, most, n]) => least + ' ' + n.map(x => ' \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588'[
  Math.ceil(8 * x / Math.max(...n))]).join('') + ' ' + most
const columns = [['part', p => p.name.replace(/\d+/g, n => n.padStart(5))], ['fires on', p => p.density],
  ['importance', p => p.importance], ['clearness', p => p.clearness], ['where it fires', p => p.by],
  ['raises (attn.o, mlp.down)', p => p.raises.length]]
for (const p of data.parts)
  p.text = [p.name, ...p.tokens.map(t => words[t[0]]), ...p.raises.map(t => words[t])].join('\n').toLowerCase()
let sorted = 3, up = false, limit = 100
columns.forEach(([title], i) => add(get('head'), 'th', title, i == 2 || i == 5 ? 'late' : '',
  () => { up = sorted == i ? !up : i == 0; sorted = i; draw() }))
function draw(open = '') {
  const wanted = get('search').value.toLowerCase(), key = columns[sorted][1], body = get('body')
  const found = data.parts.filter(p => p.text.includes(wanted) || p.name == open)
    .sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) * (up ? 1 : -1))
  get('count').textContent = found.length + ' of ' + data.parts.length + ' parts'
  get('more').hidden = found.length <= limit; body.replaceChildren()
  found.filter((p, i) => i < limit || p.name == open).forEach(p => {
    let opened = null
    const toggle = () => { opened = opened ? opened.remove() : show(p, row) }, row = add(body, 'tr', '', 'row', toggle)
    add(row, 'td', p.name), add(row, 'td', (100 * p.density).toPrecision(2) + ' %')
    add(row, 'td', p.importance.toFixed(2), 'late'), add(row, 'td', p.clearness.toFixed(2))
    tokens(add(row, 'td'), p.tokens, p.by + ': '), tokens(add(row, 'td', '', 'late'), p.raises)
    if (p.name == open) { toggle(); row.scrollIntoView() }
  })
}
function show(p, row) {
  const opened = document.createElement('tr'), cell = add(opened, 'td'), facts = add(cell, 'div', '', 'facts')
  cell.colSpan = columns.length; row.after(opened)
  for (const [side, list] of Object.entries(p.around)) tokens(facts, list, side + ': ')
  for (const [of, x] of Object.entries(p.bars)) add(facts, 'div', of + ': ' + bars(x), 'bars')
  if (p.raises.length) tokens(facts, p.raises, 'raises: '), tokens(facts, p.lowers, 'lowers: ')
  links(facts, 'strongest sources, summed over some text: ', p.sources), links(facts, 'strongest targets: ', p.targets)
  if (p.match) add(facts, 'div', 'best match in the compared run: ' + p.match.join(', cosine '))
  if (p.group >= 0) links(facts, 'group ' + p.group + ': ', data.groups[p.group].members.map(name => [name]))
  for (const [ids, g, a, at] of p.examples) {
    const line = add(cell, 'div', '', 'example'), sides = [0, 1, 2].map(() => add(add(line, 'span'), 'bdi'))
    ids.forEach((id, i) => {
      const span = add(sides[i < at ? 0 : i == at ? 1 : 2], 'span', visible(words[id]))
      span.style.background = `rgba(var(--fire), ${g[i] / 9})`; if (g[i] > 6) span.style.color = 'black'
      span.style.borderBottom = `3px solid rgba(${a[i] > 0 ? '0, 110, 230' : '220, 0, 60'}, ${Math.abs(a[i]) / 9})`
      span.title = `importance ${(g[i] / 9).toFixed(1)}, activation ${(a[i] / 9).toFixed(1)} of the largest`
    })
  }
  return opened
}
const layers = {}
for (const [path, x] of Object.entries(data.matrices)) (layers[path.split('.')[1]] ??= []).push([path, x])
for (const cells of Object.values(layers)) {
  const row = add(get('model'), 'tr')
  for (const [path, [alive, C, l0]] of cells)
    add(row, 'td', `${path}: ${alive} of ${C}, ${l0.toFixed(1)}`, 'cell',
      () => { get('search').value = path + ':'; draw() }).style.background = `rgba(var(--fire), ${l0 / 40})`
}
data.groups.forEach((group, n) => {
  if (group.members.length < 2) return
  const row = add(get('grouped'), 'tr'); add(row, 'td', 'group ' + n), add(row, 'td', group.members.length + ' parts')
  tokens(add(row, 'td'), group.tokens, group.by + ': '), links(add(row, 'td'), '', group.members.map(name => [name]))
})
for (const prompt of data.prompts) {
  const line = add(get('prompts'), 'p'), box = add(get('prompts'), 'div', '', 'facts')
  prompt.ids.forEach((id, t) => add(line, 'code', visible(words[id]), 'token', () => {
    box.replaceChildren(); const matrices = {}
    for (const [name, x] of prompt.active[t]) (matrices[name.split(':')[0]] ??= []).push([name, x])
    for (const [path, list] of Object.entries(matrices)) links(box, path + ': ', list)
  }))
  if (prompt.circuit) add(get('prompts'), 'p', 'Its circuit, pruned, from ' + visible(words[prompt.token]) + ' down:')
  for (const [t, name, from] of prompt.circuit ?? []) {
    const row = add(get('prompts'), 'div'); links(row, 'at ' + visible(words[prompt.ids[t]]) + ' ', [[name]])
    links(row, '\u2190 ', from)
  }
}
function go() {
  const wanted = decodeURIComponent(location.hash.slice(1))
  const tab = ['groups', 'prompts'].find(t => t == wanted) ?? 'parts'
  for (const e of document.querySelectorAll('section')) e.hidden = e.id != tab
  for (const e of document.querySelectorAll('[data-tab]')) e.className = e.dataset.tab == tab ? 'on' : ''
  if (tab == 'parts') draw(wanted)
}
for (const e of document.querySelectorAll('[data-tab]')) e.onclick = () => { location.hash = e.dataset.tab }
onkeydown = k => {
  if (k.key == '/' && document.activeElement != get('search')) get('search').focus(), k.preventDefault()
}
get('search').oninput = () => { limit = 100; draw() }; get('more').onclick = () => { limit += 400; draw() }
onhashchange = go; go()
</script>"""

# ---- Reading: circuits ----------------------------------------------------------------------------------------------
EMBEDDINGS = ("tokens", "positions")
PRICE = 2e-3  # of a node while pruning, in nats of cross-entropy
PRUNINGS = {  # whether masks are random while pruning, and whether an adversary chooses them
    "importances alone": (False, False), "stochastic": (True, False), "stochastic and adversarial": (True, True)}

def encoded(run: Run, text: str) -> Tensor:
    """A prompt as (1, T) token ids. Raises BadInput if the run has no tokenizer, or the prompt is empty or too long."""
    vpd.refuse(not run.tokenizer, f"{run.folder} has no tokenizer: prompts need a run on text or with a GPT-2's folder")
    n, context = len(ids := run.tokenizer.encode(text)), run.preset.shape.context
    vpd.refuse(not 1 <= n <= context, f"the prompt {text[:40]!r} has {n} tokens: the model takes 1 to {context}")
    return torch.from_numpy(ids.astype(np.int64))[None].to(run.device)

def one_token(run: Run, text: str) -> int:
    """The id of a text that is one token. Raises BadInput, with its tokens, if it is more than one."""
    ids = encoded(run, text)[0].tolist()
    vpd.refuse(len(ids) > 1, f"{text!r} is not one token but {[run.tokenizer.decode([i]) for i in ids]}: give one")
    return ids[0]

def edges_into(graph: dict) -> dict[int, list[dict]]:
    """The edges into every node, the strongest first."""
    into = {node: [] for node in range(len(graph["nodes"]))}
    for edge in sorted(graph["edges"], key=lambda edge: -edge["share"]):
        into[edge["target"]].append(edge)
    return into

def strongest_paths(run: Run, graph: dict, ids: Tensor) -> list[str]:
    """From the outcome to its 8 strongest sources, and from each on to its strongest. <- raises, |- lowers."""
    into, lines = edges_into(graph), []
    for edge in into[len(graph["nodes"]) - 1][:8]:
        lines.append(f"{edge['share']:6.1%}  outcome")
        while edge:
            node, arrow = graph["nodes"][edge["source"]], "<-" if edge["attribution"] > 0 else "|-"
            part = f":{node['subcomponent']}" if "importance" in node else ""
            token = shown(run, int(ids[0, node["position"]]))
            lines[-1] += f" {arrow} {node['matrix']}{part}@{node['position']} {token}"
            edge = next(iter(into[edge["source"]]), None)
    return lines

def draw_circuit(run: Run, graph: dict, ids: Tensor, outcome: str, file: Path) -> None:
    """The largest attributions into every node. Positions across, layers up; colour of a node: its matrix."""
    nodes, T, rows, cells, at = graph["nodes"], ids.shape[1], [[*EMBEDDINGS]], collections.defaultdict(list), {}
    for i in range(run.model.shape.layers):
        rows += [[f"h.{i}.attn.{m}" for m in "qkv"], [f"h.{i}.attn.o"], [f"h.{i}.mlp.up"], [f"h.{i}.mlp.down"]]
    height = {path: y for y, paths in enumerate([*rows, ["outcome"]]) for path in paths}
    edges = [e for n, into in edges_into(graph).items() for e in into[: 20 if n == len(nodes) - 1 else 3]]
    for n in sorted({edge[end] for edge in edges for end in ("source", "target")}):
        cells[nodes[n]["position"], height[nodes[n]["matrix"]]].append(n)
    for (position, y), inside in cells.items():
        for i, n in enumerate(inside):  # side by side, and in a zigzag, within the cell
            at[n] = position + 0.8 * ((i + 0.5) / len(inside) - 0.5), y + 0.25 * (i % 2) * (len(inside) > 2)
    axis = (figure := matplotlib.figure.Figure((max(7, 1.15 * T), 7.5), layout="constrained")).subplots()
    for edge in edges:
        colour, width = "#1f6fb4" if edge["attribution"] > 0 else "#c85200", 0.3 + 5 * edge["share"]
        axis.plot(*zip(at[edge["source"]], at[edge["target"]]), color=colour, linewidth=width, alpha=0.6, zorder=1)
    for n, point in at.items():
        path = nodes[n]["matrix"]
        colour = "black" if path == "outcome" else matplotlib.colormaps["tab20"](list(height).index(path) % 20)
        axis.scatter(*point, s=45, color=colour, edgecolors="white", linewidths=0.5, zorder=2)
    labels = [", ".join(row).replace(", " + row[0][:-1], ", ") for row in rows]  # "h.0.attn.q, k, v" and so on
    axis.set_xticks(range(T), [shown(run, i) for i in ids[0].tolist()], parse_math=False)  # a dollar is a dollar
    axis.set_yticks(range(len(rows) + 1), [*labels, f"outcome: {outcome}"], parse_math=False)
    title = "largest attributions into each part that is left\n(blue raises, orange lowers)"
    axis.set(xlabel="position", title=title, xlim=(-0.6, T - 0.4))
    figure.savefig(file, dpi=110)

def circuit(run: Run, prompt: str, token_text: str | None) -> dict:
    """What three ways of pruning leave of one prediction, and the attribution graph after the last, as a dict for JSON.
    Predicted: token_text, or the target's best. "prunings": the nodes and the cross-entropy of the token in nats, with
    the importances as masks ("ce"), with those above 0 at 1 ("ce_rounded"), under a fresh adversary ("attacked")."""
    model, found, ids = run.model, run.decomposition, encoded(run, prompt)
    target, g = vpd.predict_importances(model, found, ids)
    token = one_token(run, token_text) if token_text else int(target[0, -1].argmax())
    loss = lambda output: F.cross_entropy(output[:, -1].float(), torch.tensor([token], device=ids.device))
    active = vpd.side_by_side(g) > 0
    def judged(importances):
        rounded = {path: (x > 0).float() for path, x in importances.items()}
        with torch.no_grad(), vpd.precision(run.device, found.bf16):
            ce = [loss(vpd.masked_forward(model, found.U, found.V, x, ids)).item() for x in (importances, rounded)]
        case = lambda: [(ids, target, importances)]  # it moves what was active before pruning; all else stays random
        attacked = vpd.fresh_adversary(model, found, case, lambda _, output: loss(output), ids.shape, active)
        nodes = sum(int((x > 0).sum()) for x in importances.values())
        return {"nodes": nodes, "ce": ce[0], "ce_rounded": ce[1], "attacked": vpd.largest_within(attacked)}
    prunings = {"not pruned": judged(g)}
    for name, (stochastic, adversarial) in PRUNINGS.items():
        prunings[name] = judged(pruned := vpd.prune(model, found, g, ids, loss, PRICE, stochastic, adversarial))
    result = {"prompt": prompt, "token": token, "ids": ids[0].tolist(), "target_ce": loss(target).item()}
    outcome = lambda logits: logits[0, -1, token] - logits[0, -1].mean()  # the mean, because the softmax ignores it
    graph = vpd.attribution_graph(model, found, pruned, ids, outcome, EMBEDDINGS, share=0.005)
    return result | {"prunings": prunings, "pruned_graph": graph}

def circuits(run: Run, prompts: list[str], token_text: str | None) -> str:
    """For every prompt circuit.json and circuit.png (numbered from the second on), of `circuit` and its graph.
    Returns the strongest paths of each, and a table of the prunings, as means over the prompts."""
    lines, results = [], []
    every_ids = [encoded(run, prompt) for prompt in prompts]  # refuses what cannot serve before anything is computed
    for prompt, ids in vpd.with_progress(zip(prompts, every_ids), "circuits"):
        results.append(result := circuit(run, prompt, token_text))
        file = run.folder / ("circuit" if len(results) == 1 else f"circuit_{len(results)}")
        write(file.with_suffix(".json"), json.dumps(result))
        token = shown(run, result["token"])
        draw_circuit(run, result["pruned_graph"], ids, token, file.with_suffix(".png"))
        lines.append(f"{prompt!r} then {token}, cross-entropy of the target {result['target_ce']:.3f}; after pruning:")
        lines += strongest_paths(run, result["pruned_graph"], ids)
    target = np.mean([result["target_ce"] for result in results])
    lines.append(f"cross-entropy of the token, mean of {len(results)} prompts; target: {target:.3f}")
    lines.append("pruning                      nodes  as masks   rounded  under a fresh adversary of 20, 40, 80 steps")
    for name in results[0]["prunings"]:
        rows = [result["prunings"][name] for result in results]
        nodes, *ces = np.mean([[x["nodes"], x["ce"], x["ce_rounded"], *x["attacked"].values()] for x in rows], 0)
        lines.append(f"{name:26s} {nodes:7.0f}" + "".join(f"{ce:10.3f}" for ce in ces))
    return "\n".join([*lines, f"pictures and graphs are in {run.folder}/circuit*"])

# ---- Reading: an edit by hand ---------------------------------------------------------------------------------------
@contextlib.contextmanager
def edited(run: Run, path: str, c: int, token: int, strength: float):
    """Within, subcomponent c writes the direction of `token`, `strength` times as long as U_c, in place of U_c."""
    U, V = run.decomposition.U[path][c].detach(), run.decomposition.V[path][:, c].detach()
    weight, direction = run.model.get_submodule(path).weight, F.normalize(readout(run.model)[token], dim=0)
    original = weight.detach().clone()
    try:
        weight.data += torch.outer(strength * U.norm() * direction - U, V)
        yield
    finally:
        weight.data.copy_(original)

@torch.no_grad()
def effect(run: Run, path: str, c: int, token: int, strength: float, batches: list, fires: list) -> dict[str, float]:
    """What an edit does on batches of (B, T) token ids. fires: bools of the same shapes, where c fires.
    "before", "after": the mean probability of the token where c fires. "kl_near", "kl_elsewhere": mean KL from the
    target in nats per position, on the 20 tokens either side of such a position, and on all others."""
    measured = []
    for batch, where in zip(batches, fires):
        with vpd.precision(run.device, run.decomposition.bf16):
            plain = run.model(batch).log_softmax(-1)
        # in a context of its own: autocast keeps its copies of the weights until the end
        with edited(run, path, c, token, strength), vpd.precision(run.device, run.decomposition.bf16):
            changed = run.model(batch).log_softmax(-1)
        near = F.max_pool1d(where.float()[:, None], 41, stride=1, padding=20)[:, 0] > 0
        kl = (plain.exp() * (plain - changed)).sum(-1)
        measured.append((plain[..., token].exp(), changed[..., token].exp(), kl, where, near))
    before, after, kl, where, near = (torch.cat(x) for x in zip(*measured))  # (N, T) each
    means = {"before": before[where], "after": after[where], "kl_near": kl[near], "kl_elsewhere": kl[~near]}
    return {name: x.mean().item() if len(x) else 0.0 for name, x in means.items()}

def edit(run: Run, name: str, token_text: str | None, alpha: float) -> str:
    """Make a subcomponent write another token, for several alphas, beside a random one that fires. Writes edit.json.
    Returns a table and five continuations. Raises BadInput if the subcomponent cannot be edited or is silent."""
    vpd.refuse(not token_text, "--edit needs --to TOKEN, the token that the subcomponent shall write")
    parts = {f"{path}:{c}": (path, c) for path, mask in alive(run).items() if path.endswith(TO_STREAM)
             for c in mask.nonzero()[:, 0].tolist()}  # fmt: skip
    why = f"is no alive subcomponent of a matrix that writes to the residual stream ({', '.join(TO_STREAM)})"
    nearest = ", ".join(difflib.get_close_matches(name, parts, n=3, cutoff=0.0))
    vpd.refuse(name not in parts, f"{name!r} {why}; the nearest: {nearest}")
    (path, c), token = parts[name], one_token(run, token_text)
    ids, g, a = observe(run)
    fires = firing(g[path])
    vpd.refuse(c not in fires, f"{name} fires nowhere in the evaluation set; of {path} these do: {list(fires)[:8]}")
    others = [i for i in fires if i != c]
    pick = int(torch.randint(max(1, len(others)), (1,), generator=torch.Generator().manual_seed(0)))
    signs = {i: a[path][..., i][fires[i]].float().mean().sign().item() for i in [c, *others[pick : pick + 1]]}
    results = {f"{path}:{i}": [] for i in signs}
    for i, x in vpd.with_progress([(i, x) for i in signs for x in sorted({0.5, 1.0, 2.0, 3.0, 5.0, alpha})], "edits"):
        where, batches = fires[i].split(8), ids.split(8)
        results[f"{path}:{i}"].append({"alpha": x, **effect(run, path, i, token, signs[i] * x, batches, where)})
    write(run.folder / "edit.json", json.dumps({"part": name, "token": token_text, "effects": results}, indent=1))
    lines = [f"{name} -> {token_text!r}: it fires at {int(fires[c].sum())} of {ids.numel()} positions"]
    row = "  {alpha:5.1f} {before:20.5f} {after:8.5f} {kl_near:22.5f} {kl_elsewhere:14.6f}"
    for part, effects in results.items():
        lines.append(part if part == name else f"{part} (control, at random)")
        lines.append("  alpha   probability before    after    KL within 20 tokens   KL elsewhere")
        lines += [row.format(**x) for x in effects]
    order = torch.randperm(int(fires[c].sum()), generator=torch.Generator().manual_seed(1))
    for n, t in fires[c].nonzero()[order[:5].to(ids.device)].tolist():
        prompt = ids[n : n + 1, : t + 1]
        start, before = run.tokenizer.decode(prompt[0, -25:].tolist()), continuation(run, prompt, 15)
        with edited(run, path, c, token, signs[c] * alpha):
            after = continuation(run, prompt, 15)
        lines.append(f"--- {start!r}\n    before: {before!r}\n    after:  {after!r}")
    return "\n".join(lines)

# ---- Reading: do two decompositions agree? --------------------------------------------------------------------------
def untrained(run: Run) -> vpd.Decomposition:
    """A run's decomposition as it was before any training."""
    C = {path: len(u) for path, u in run.decomposition.U.items()}
    _, inputs = vpd.forward_with_inputs(run.model, C, torch.zeros(1, 1, dtype=torch.int64, device=run.device))
    return vpd.start(run.model, C, inputs, run.preset.config).decomposition

def correlations(one: Tensor, other: Tensor) -> Tensor:
    """The correlation of each column of one with the same of the other; both (positions, C); 0 for a constant; (C,)."""
    one, other = (F.normalize(x - x.mean(0), dim=0) for x in (one, other))
    return (one * other).sum(0)

def weighted_means(values: dict, weights: dict[str, Tensor]) -> dict:
    """Of values {matrix: {part: (C,)}} the means {matrix or "all": {part: mean}}, weighted by {matrix: (C,)}."""
    parts, weights = next(iter(values.values())), weights | {"all": torch.cat(list(weights.values()))}
    values = values | {"all": {part: torch.cat([of[part] for of in values.values()]) for part in parts}}
    share = {path: w / w.sum().clamp(min=1e-9) for path, w in weights.items()}
    return {path: {part: (x * share[path]).sum().item() for part, x in of.items()} for path, of in values.items()}

def compare(run: Run, folder: Path) -> str:
    """How similar a run's alive subcomponents are to those of another run on the same target: the mean largest cosine
    of U, V and product ([VPD] section 6, see `vpd.similarity`), "trained"; "weighted" by mean importance, because the
    rarely used are the least determined; "untrained", of all before training. "function": the correlation, over the
    evaluation set, of the importances of a subcomponent and of its match (by product). Raises BadInput if the targets
    differ. Returns a table; writes compare.json: {"trained": {matrix: {"U", "V", "product", "function"}}, ...}."""
    other = load(folder, run.device)
    mine, its = run.model.state_dict(), other.model.state_dict()
    equal = mine.keys() == its.keys() and all(x.equal(its[name]) for name, x in mine.items())
    vpd.refuse(not equal, f"{folder} decomposes another target: make a run on this one's with --init-from {run.folder}")
    its_text = replace(other, ids=run.ids, preset=run.preset)  # on the same text
    both, kept, g = (run, other), (alive(run), alive(other)), (observe(run)[1], observe(its_text)[1])
    alive_only = [vpd.Decomposition({path: u[mask[path]] for path, u in x.decomposition.U.items()},
                                    {path: v[:, mask[path]] for path, v in x.decomposition.V.items()},
                                    x.decomposition.G) for x, mask in zip(both, kept)]  # fmt: skip
    trained, before, matches = vpd.similarity(*alive_only), vpd.similarity(*map(untrained, both)), {}
    for path, of in trained.items():
        mine, its = (x[path].flatten(0, 1)[:, mask[path]].float() for x, mask in zip(g, kept))
        match, _ = of.pop("match"), before[path].pop("match")
        of["function"] = correlations(mine, F.pad(its, (0, 1))[:, match])
        numbers = [mask[path].nonzero()[:, 0].tolist() for mask in kept]
        found = zip(numbers[0], match.tolist(), of["product"].tolist())
        matches |= {f"{path}:{c}": (f"{path}:{numbers[1][i]}", x) for c, i, x in found if x > 0}
    equally = lambda values: {path: torch.ones_like(of["U"]) for path, of in values.items()}
    by_use = {path: x[kept[0][path]] for path, x in mean_importances(run).items()}
    means = {"untrained": weighted_means(before, equally(before)), "trained": weighted_means(trained, equally(trained)),
             "weighted": weighted_means(trained, by_use)}  # fmt: skip
    lines = ["mean largest cosine   before training: U, V, product    trained: U, V, product, function    weighted"]
    for path in means["trained"]:
        row = ["  ".join(f"{x:.2f}" for x in of[path].values()) for of in means.values()]
        lines.append("{:20s} {:>30s} {:>35s} {:>26s}".format(path, *row))
    write(run.folder / "compare.json", json.dumps({"other": str(folder), **means, "matches": matches}, indent=1))
    return "\n".join(lines)

# ---- The command line -----------------------------------------------------------------------------------------------
READINGS = {  # of a finished run, by the option that asks for it; each returns what is printed, for all options alike
    "report": lambda run, options: report(run, options.report),
    "circuit": lambda run, options: circuits(run, options.circuit, options.token),
    "edit": lambda run, options: edit(run, options.edit, options.to, options.alpha),
    "compare": lambda run, options: compare(run, options.compare)}

def chosen_settings(given: dict, folder: Path, resume: bool, reading: bool) -> dict:
    """The settings of the run in the folder, or of a new one. given: those on the command line. Raises BadInput if the
    folder does not hold what is asked for, if given settings are not its own, or if they cannot serve."""
    if reading or resume:
        file, what = ("metrics.json", "finished decomposition") if reading else ("settings.json", "run to resume")
        vpd.refuse(not (folder / file).exists(), f"{folder} holds no {what}: make one, or give its folder with --out")
        own = SETTINGS | json.loads((folder / "settings.json").read_text())
        other = ", ".join(f"--{name.replace('_', '-')}" for name, value in given.items() if value != own[name])
        vpd.refuse(other, f"{folder} was made with another {other}: leave it out, or make a new run with another --out")
        return own
    limits = {"seed": (0, 1e9 - 1), "steps": (1, math.inf), "batch": (1, 1e6), "accumulate": (1, 1e6), "C": (1e-3, 100)}
    for name, (least, most) in limits.items():
        value = given.get(name, least)
        vpd.refuse(not least <= value <= most, f"--{name} is {value:g}: give {least:g} to {most:g}")
    if vpd.rank() == 0:  # the other processes come after process 0, which has claimed the folder
        vpd.refuse(folder.exists() and not folder.is_dir(), f"{folder} is a file: choose a folder with --out")
        taken = folder.exists() and any(folder.iterdir())
        vpd.refuse(taken, f"{folder} holds a run already: go on with it with --resume, or choose another with --out")
    settings, source = SETTINGS | given, Path(given.get("init_from", "-"))
    if source.is_dir() and not (source / "config.json").exists():
        brought = "a run given to --init-from brings its preset and data: leave out --preset and --data"
        vpd.refuse({"preset", "data"} & given.keys(), brought)
        whole = (source / "target.pt").exists() and (source / "settings.json").exists()
        vpd.refuse(not whole, f"{source} is no run with a finished target: give the folder of one, or a GPT-2")
        settings |= {name: json.loads((source / "settings.json").read_text())[name] for name in ("preset", "data")}
    return settings

def main() -> None:
    """The command line; see the top of this file."""
    best_device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="default: laptop; gpu and paper are for GPUs")
    add("--data", help="a UTF-8 text, or FILE.bin of uint16 token ids (default: Python's standard library)")
    add("--init-from", metavar="FOLDER", help="decompose the target in a run's folder, or a GPT-2 (folder or file)")
    add("--steps", type=int, help="of the decomposition (default: the preset's)")
    add("--batch", type=int, help="windows in a step, of all processes together (default: the preset's)")
    add("--accumulate", type=int, metavar="N", help="N micro-batches in a step, for less memory (default: 1)")
    add("--C", type=float, metavar="FACTOR", help="this many times the preset's subcomponents (default: 1)")
    add("--seed", type=int, help="of the target and the decomposition (default: 0)")
    add("--out", type=Path, help="run folder (default: runs/PRESET)")
    add("--resume", action="store_true", help="go on with the run in --out, with its own settings")
    add("--device", default=best_device, help="cpu, cuda or mps (default: the best there is)")
    add = parser.add_argument_group("read a finished run (--out)").add_argument
    add("--report", nargs="*", metavar="PROMPT", help="write report.html, a page of all subcomponents and prompts")
    add("--circuit", nargs="+", metavar="PROMPT", help="what makes the prediction after each prompt, and its prunings")
    add("--token", help="with --circuit: the token to explain (default: what the target predicts)")
    add("--edit", metavar="MATRIX:NUMBER", help="let this subcomponent write another token (--to)")
    add("--to", metavar="TOKEN", help="with --edit: the token")
    add("--alpha", type=float, default=3.0, help="with --edit: how strongly, in lengths of the original (default: 3)")
    add("--compare", type=Path, metavar="FOLDER", help="do the subcomponents agree with those of this run's folder?")
    try:
        command(parser.parse_args())
    except vpd.BadInput as error:
        sys.exit(f"error: {error}")

def choose_precision(device: str) -> None:
    """On a CPU with AVX-512 bfloat16, let oneDNN multiply: on an AMD EPYC twice as fast, and still in float32. Not where
    there is AMX, which may round the factors to bfloat16 (nobody has measured it). For this process: only a command
    calls it."""
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch < 2.10 has none
    exact = features.get("avx512_bf16") and not features.get("amx_tile")
    if device == "cpu" and exact and torch.backends.cpu.get_cpu_capability() == "AVX512":
        torch.set_float32_matmul_precision("medium")
        torch.backends.cuda.enable_flash_sdp(False)  # it is the CPU's, too, and ten times slower so

def command(options: argparse.Namespace) -> None:
    """Make a run, go on with one, or read one. Raises BadInput."""
    readings = [name for name in READINGS if getattr(options, name) is not None]
    vpd.refuse(len(readings) > 1, f"--{' --'.join(readings)}: ask for one of them at a time")
    given = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    folder, device = options.out or Path("runs") / given.get("preset", SETTINGS["preset"]), options.device
    if "LOCAL_RANK" in os.environ:  # under torchrun
        vpd.refuse(readings, "a run is read by one process: leave out torchrun")
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    choose_precision(device)
    vpd.keep_memory()
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise vpd.BadInput(f"there is no device {device!r} here: give --device cpu, or leave it out") from None
    with vpd.rank_0_first():
        settings = chosen_settings(given, folder, options.resume, bool(readings))
    run = open_run(settings, folder, device)
    if readings:
        print(READINGS[readings[0]](run, options))
    elif vpd.rank() == 0:
        print(f"{table(evaluate(run))}\npictures and metrics.json are in {folder}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

if __name__ == "__main__":
    main()
