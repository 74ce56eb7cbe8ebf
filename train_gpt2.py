"""Train a small GPT-2 written by hand, decompose all its attention and MLP matrices with VPD, and report how good that is.

    python train_gpt2.py                                    # everything, on the source text of Python's standard library
    python train_gpt2.py --data my.txt --out runs/mine      # any UTF-8 text
    python train_gpt2.py --data corpus.bin                  # uint16 token ids (nanoGPT's format), memory-mapped
    python train_gpt2.py --out runs/mine --resume           # go on where a killed run stopped

    python train_gpt2.py --out runs/laptop --report         # read a finished run: the page of all parts
    python train_gpt2.py --out runs/laptop --circuit "def __init__(" [--token self]
    python train_gpt2.py --out runs/laptop --attention 1 [--prompt "..."]
    python train_gpt2.py --out runs/laptop --edit [h.1.mlp.down:37 --to None --alpha 3]

    python train_gpt2.py --init-from runs/laptop --C 2 --out runs/C-2           # decompose the same target differently
    python train_gpt2.py --out runs/laptop --compare runs/C-2                   # do the two decompositions agree?

    torchrun --standalone --nproc_per_node=8 train_gpt2.py --preset paper --data pile.bin

Three stages, each with its product in the run folder: the target model (target.pt), its decomposition (decomposition/), and the
evaluation (metrics.json, pictures). From top to bottom: the model, the tokenizer, the data, training the target, the evaluation,
a run; then what a person reads off a finished run: the page of all parts, circuits, attention, an edit, whether two runs agree;
and the command.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import dataclasses
import difflib
import functools
import heapq
import html
import json
import math
import os
import re
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vpd
from vpd import BadInput

# ---------------------------------------------------------------------------------------------------------------------
# The model: GPT-2 (B = batch, T = positions)
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-2."""

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int


class Attention(nn.Module):
    """Causal self-attention. q, k, v and o are four matrices, so that each is decomposed on its own."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.heads = shape.heads
        self.q, self.k, self.v, self.o = (nn.Linear(shape.width, shape.width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, T, width = x.shape
        q, k, v = (matrix(x).view(B, T, self.heads, -1).transpose(1, 2) for matrix in (self.q, self.k, self.v))  # (B, heads, T, d)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
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
        self.norm_attn, self.attn = nn.LayerNorm(shape.width), Attention(shape)
        self.norm_mlp, self.mlp = nn.LayerNorm(shape.width), MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_attn(x))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """GPT-2: token ids (B, T) -> logits (B, T, vocabulary). The unembedding is the embedding, transposed."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.tokens, self.positions = nn.Embedding(shape.vocabulary, shape.width), nn.Embedding(shape.context, shape.width)
        self.h = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
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
        return self.norm(x) @ self.tokens.weight.T


def cross_entropy(ids: Tensor, logits: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats; ids (B, T), logits (B, T, vocabulary); scalar. The last position has no next token."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def load_gpt2(file: Path) -> GPT:
    """A GPT-2 of any size from a checkpoint in Hugging Face's layout (pytorch_model.bin).

    There, matrices lie transposed (Conv1D), q, k and v are one, and names may begin with "transformer.".
    Raises BadInput, naming the tensor, if one is missing, too many, or of a wrong shape.
    """
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
        found = {name.removeprefix("transformer."): x.float() for name, x in found.items()}
    except Exception as error:
        raise BadInput(f"{file} is not a PyTorch checkpoint ({type(error).__name__}): give a pytorch_model.bin of GPT-2") from error
    found = {name: x for name, x in found.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}  # causal masks
    found.pop("lm_head.weight", None)  # the embedding once more
    for name in ("wte.weight", "wpe.weight"):
        if name not in found or found[name].dim() != 2:
            raise BadInput(f"{file} lacks the matrix {name}: it is not a GPT-2 checkpoint")
    vocabulary, width = found["wte.weight"].shape
    layers = 1 + max((int(match[1]) for name in found if (match := re.match(r"h\.(\d+)\.", name))), default=-1)
    if width % 64:
        raise BadInput(f"{file} is of width {width}: only GPT-2s with heads of 64, as in all published sizes, can be read")
    heads = width // 64
    model = GPT(Shape(layers, width, heads, len(found["wpe.weight"]), vocabulary))

    def take(name: str, *shape: int) -> Tensor:
        if name not in found:
            raise BadInput(f"{file} lacks the tensor {name}: it is not a whole GPT-2 checkpoint")
        if tuple(found[name].shape) != shape:
            raise BadInput(f"{file}: {name} has shape {tuple(found[name].shape)}, and should have {shape}")
        return found.pop(name)

    state = {"tokens.weight": take("wte.weight", vocabulary, width), "positions.weight": take("wpe.weight", model.shape.context, width)}
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = take(f"ln_f.{kind}", width)
        for i in range(layers):
            state[f"h.{i}.norm_attn.{kind}"] = take(f"h.{i}.ln_1.{kind}", width)
            state[f"h.{i}.norm_mlp.{kind}"] = take(f"h.{i}.ln_2.{kind}", width)
            rows = {"weight": (width,), "bias": ()}[kind]  # Conv1D: (d_in, d_out)
            qkv = take(f"h.{i}.attn.c_attn.{kind}", *rows, 3 * width)
            state |= {f"h.{i}.attn.{m}.{kind}": part.T if rows else part for m, part in zip("qkv", qkv.chunk(3, -1))}
            for ours, theirs, d_in, d_out in (
                ("attn.o", "attn.c_proj", width, width),
                ("mlp.up", "mlp.c_fc", width, 4 * width),
                ("mlp.down", "mlp.c_proj", 4 * width, width),
            ):
                x = take(f"h.{i}.{theirs}.{kind}", *((d_in,) if rows else ()), d_out)
                state[f"h.{i}.{ours}.{kind}"] = x.T if rows else x
    if found:
        raise BadInput(f"{file} holds a tensor that GPT-2 has not: {sorted(found)[0]}")
    model.load_state_dict(state)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer: byte-pair encoding, learned from the text
# ---------------------------------------------------------------------------------------------------------------------

# Pieces that merges never cross: a word or a number with the space before it, indentation, a run of signs. Together they cover
# every text, and nothing is lost.
PIECES = re.compile(r" ?[^\W\d_]+| ?\d+| ?[^\w\s]+| ?_+|\s+(?=\S)|\s+")


class Tokenizer:
    """256 bytes, and after them one token for each merge of two tokens. Lossless on any text."""

    def __init__(self, merges: list[tuple[int, int]]):
        self.merges = [tuple(pair) for pair in merges]
        self.order = {pair: 256 + i for i, pair in enumerate(self.merges)}  # of a pair: the token that it becomes
        self.bytes = [bytes([i]) for i in range(256)]
        for a, b in self.merges:
            self.bytes.append(self.bytes[a] + self.bytes[b])

    @staticmethod
    def learn(text: str, vocabulary: int) -> Tokenizer:
        """Merge the most frequent pair of neighbours, again and again, until there are `vocabulary` tokens (or no pair is left)."""
        count = collections.Counter(PIECES.findall(text))
        words = [list(piece.encode()) for piece in count]
        times = list(count.values())
        pairs, where = collections.Counter(), collections.defaultdict(set)  # how often is each pair, in which words
        for w, word in enumerate(words):
            for pair in zip(word, word[1:]):
                pairs[pair] += times[w]
                where[pair].add(w)
        queue = [(-n, pair) for pair, n in pairs.items()]
        heapq.heapify(queue)
        merges = []
        while len(merges) < vocabulary - 256 and queue:
            n, pair = heapq.heappop(queue)
            if -n != pairs[pair] or not n:  # out of date: its present count is elsewhere in the queue
                continue
            token, changed = 256 + len(merges), set()
            merges.append(pair)
            for w in where.pop(pair):
                word = words[w]
                for old in zip(word, word[1:]):
                    pairs[old] -= times[w]
                    changed.add(old)
                words[w] = word = merge(word, pair, token)
                for new in zip(word, word[1:]):
                    pairs[new] += times[w]
                    where[new].add(w)
                    changed.add(new)
            for pair in changed:
                heapq.heappush(queue, (-pairs[pair], pair))
        return Tokenizer(merges)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, uint16. Every distinct piece is worked out once."""
        known = {}
        for piece in set(PIECES.findall(text)):
            word = list(piece.encode())
            while len(word) > 1:
                pair = min(zip(word, word[1:]), key=lambda pair: self.order.get(pair, math.inf))
                if pair not in self.order:
                    break
                word = merge(word, pair, self.order[pair])
            known[piece] = np.array(word, dtype=np.uint16)
        pieces = [known[piece] for piece in PIECES.findall(text)]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)

    def decode(self, ids) -> str:
        """The text of token ids; bytes that are not UTF-8 (a character cut in two) become the replacement character."""
        return b"".join(self.bytes[i] for i in ids if i < len(self.bytes)).decode(errors="replace")  # a small text has fewer tokens


def merge(word: list[int], pair: tuple[int, int], token: int) -> list[int]:
    """The word with every occurrence of the pair, from the left, replaced by the token."""
    merged, i = [], 0
    while i < len(word):
        together = i + 1 < len(word) and (word[i], word[i + 1]) == pair
        merged.append(token if together else word[i])
        i += 2 if together else 1
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# The data
# ---------------------------------------------------------------------------------------------------------------------

STRETCH = 2048  # tokens; every tenth stretch of the corpus is for validation, so that both parts are spread over all of it


def standard_library() -> str:
    """The source text of Python's own standard library, without its tests and tables. Raises BadInput if it is not on this machine."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}  # encodings: tables of characters
    files = [file for file in sorted(folder.rglob("*.py")) if not skipped & set(file.relative_to(folder).parts)]
    if len(files) < 100:
        raise BadInput(f"the standard library's source files are not in {folder}: give a text with --data FILE")
    return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def read_text(file: Path) -> str:
    """Raises BadInput if there is no such file, or it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8 text (byte {error.start}): convert it, or give token ids as FILE.bin") from None
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error.strerror}): give a UTF-8 text or a .bin of token ids") from None


def read_bin(file: Path, vocabulary: int) -> np.ndarray:
    """A memory-mapped file of uint16 token ids. Raises BadInput if it is of odd length or holds an id outside the vocabulary."""
    if not file.is_file():
        raise BadInput(f"{file} is no file: give a UTF-8 text or a .bin of uint16 token ids")
    if file.stat().st_size % 2 or not file.stat().st_size:
        raise BadInput(f"{file} has {file.stat().st_size} bytes: a .bin holds uint16 token ids, two bytes each")
    ids = np.memmap(file, dtype=np.uint16, mode="r")
    for start in range(0, len(ids), 1 << 24):  # in parts: the file may be larger than memory
        if (largest := int(ids[start : start + (1 << 24)].max())) >= vocabulary:
            raise BadInput(f"{file} holds the token id {largest}, outside the vocabulary of {vocabulary}")
    return ids


@functools.lru_cache
def windows(tokens: int, T: int, validation: bool) -> tuple[np.ndarray, int]:
    """Where windows of T tokens may be cut: the starts of the training or the validation stretches, and the offsets in each.

    Raises BadInput if the corpus is too short to have both.
    """
    stretch = min(STRETCH, tokens // 10)
    if stretch < T:
        raise BadInput(f"the corpus has {tokens} tokens; with windows of {T} it must have at least {10 * T}: give a longer one")
    starts = np.arange(0, tokens - stretch + 1, stretch)
    return starts[(np.arange(len(starts)) % 10 == 9) == validation], stretch - T + 1


def sample(ids: np.ndarray, T: int, B: int, validation: bool, generator: torch.Generator) -> Tensor:
    """(B, T) token ids, windows that lie wholly in training or in validation stretches."""
    starts, offsets = windows(len(ids), T, validation)
    at = starts[torch.randint(len(starts), (B,), generator=generator).numpy()] + torch.randint(offsets, (B,), generator=generator).numpy()
    return torch.from_numpy(np.stack([ids[i : i + T] for i in at]).astype(np.int64))


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: the target
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """What fits a machine: the target and how it is trained, subcomponents per matrix, the settings of the decomposition."""

    shape: Shape
    batch: int  # windows, for target and decomposition; of all processes together
    target_steps: int
    target_lr: float
    C: dict[str, int]  # for each kind of matrix, in every layer
    config: vpd.Config


ALL = {"lr_final": 0.1, "p_end": 0.4, "G_type": "transformer"}  # what the presets have in common, as published

PRESETS = {
    "laptop": Preset(
        Shape(layers=2, width=64, heads=4, context=64, vocabulary=1024),
        batch=8,
        target_steps=10_000,
        target_lr=3e-3,
        C={"attn.q": 64, "attn.k": 64, "attn.v": 128, "attn.o": 128, "mlp.up": 224, "mlp.down": 224},
        # One inner ascent step, not two: a step is 14 % cheaper, and over so many the adversary goes as far.
        config=vpd.Config(
            steps=6500, lr=7e-3, clip_UV=0.1, w_importance=6.5e-4, w_frequency=3.5e-4, w_delta=1e6, adversary_steps=1, **ALL
        ),
    ),
    # About an hour on one GPU of the H100 class, by its operations; not measured.
    "gpu": Preset(
        Shape(layers=4, width=256, heads=4, context=256, vocabulary=4096),
        batch=64,
        target_steps=20_000,
        target_lr=1e-3,
        C={"attn.q": 256, "attn.k": 256, "attn.v": 512, "attn.o": 512, "mlp.up": 1024, "mlp.down": 1024},
        config=vpd.Config(
            steps=20_000, lr=5e-4, clip_UV=0.1, w_importance=5e-4, w_frequency=2.5e-4, w_delta=1e6, G_width=512, G_blocks=4, G_heads=8, bf16=True, **ALL
        ),
    ),
    # The published run ([VPD]; its target was trained elsewhere). 8 GPUs, days; not measured.
    "paper": Preset(
        Shape(layers=4, width=768, heads=6, context=512, vocabulary=50_304),
        batch=64,
        target_steps=100_000,
        target_lr=6e-4,
        C={"attn.q": 512, "attn.k": 512, "attn.v": 1024, "attn.o": 1024, "mlp.up": 3072, "mlp.down": 3584},
        config=vpd.Config(  # clip_UV as in vpd.Config
            steps=400_000, lr=5e-5, clip_G=math.inf, w_importance=2e-4, w_frequency=1e-4, w_delta=1e7, G_width=2048, G_blocks=8, G_heads=16, bf16=True, **ALL
        ),
    ),
}
EVALUATED = 16_384  # positions of validation text, at least
CHECKPOINT_SECONDS = 60  # what a kill costs at most


def validation_batches(ids: np.ndarray, preset: Preset, device: str) -> list[Tensor]:
    """The evaluation set, the same for the target's curve and for the decomposition."""
    generator = torch.Generator().manual_seed(12345)
    number = -(-EVALUATED // (preset.batch * preset.shape.context))
    return [sample(ids, preset.shape.context, preset.batch, True, generator).to(device) for _ in range(number)]


@torch.no_grad()
def validation_loss(model: GPT, batches: list[Tensor]) -> float:
    """Mean next-token cross-entropy in nats over all batches (B, T)."""
    return sum(cross_entropy(batch, model(batch)).item() for batch in batches) / len(batches)


def saved_state(file: Path, device: str) -> dict:
    """What a run saved; raises BadInput if the file is damaged."""
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises almost anything on a file that is not its own
        raise BadInput(f"{file} is damaged ({type(error).__name__}): delete it, and go on with --resume") from error


def train_target(model: GPT, ids: np.ndarray, preset: Preset, seed: int, folder: Path, device: str) -> dict:
    """Train the model (AdamW, warm-up, cosine to a tenth), or go on where a killed run stopped. Writes target.pt.

    Returns {"curve": [(step, validation cross-entropy), ...], "seconds": ...}.
    """
    parameters, kind = list(model.parameters()), torch.device(device).type
    optimizer = torch.optim.AdamW(parameters, lr=preset.target_lr, betas=(0.9, 0.95), weight_decay=0.1, fused=kind == "cuda")
    generator, step, record = torch.Generator(), 0, {"curve": [], "seconds": 0.0}
    unfinished, steps, validation = folder / "target_unfinished.pt", preset.target_steps, validation_batches(ids, preset, device)
    if unfinished.exists():
        state = saved_state(unfinished, device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, record = state["step"], state["record"]
    if not record["curve"]:
        record["curve"].append((0, validation_loss(model, validation)))
    began = time.monotonic() - record["seconds"]
    saved = time.monotonic()
    while step < steps:
        lr = preset.target_lr * min(1, (step + 1) / 100, 0.55 + 0.45 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr
        generator.manual_seed((seed * 10**9 + step) * vpd.processes() + vpd.rank())  # from the step alone: nothing to save
        batch = sample(ids, preset.shape.context, preset.batch // vpd.processes(), False, generator).to(device)
        with torch.autocast(kind, torch.bfloat16, enabled=preset.config.bf16):
            loss = cross_entropy(batch, model(batch))
        if not loss.isfinite():
            raise BadInput(f"the target's loss is not finite at step {step}: lower target_lr in the preset")
        optimizer.zero_grad()
        loss.backward()
        vpd.global_mean([parameter.grad for parameter in parameters])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        record["seconds"] = time.monotonic() - began
        if step % max(1, steps // 50) == 0 or step == steps:
            record["curve"].append((step, validation_loss(model, validation)))
            left = record["seconds"] / step * (steps - step)
            line = f"target: step {step}/{steps}  validation loss {record['curve'][-1][1]:.3f}  {left:.0f} s left"
            if vpd.rank() == 0:
                vpd.progress(line, step == steps, step == steps or step % max(1, steps // 5) == 0)
        if vpd.rank() == 0 and time.monotonic() - saved > CHECKPOINT_SECONDS:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            with vpd.replacing(unfinished) as file:
                torch.save({**state, "step": step, "record": record}, file)
            saved = time.monotonic()
    if vpd.rank() == 0:
        with vpd.replacing(folder / "target.pt") as file:
            torch.save({"shape": dataclasses.asdict(model.shape), "model": model.state_dict(), "record": record}, file)
        unfinished.unlink(missing_ok=True)
    return record


def operations(model: GPT, C: dict[str, int], config: vpd.Config) -> float:
    """Floating-point operations of the decomposition per position and step, of the matrix products alone.

    A pass through a matrix is 2 operations per weight; backward, 2 for the gradient of its input and 2 for that of the weights.
    Once through the plain target; once through G, forward and backward; and with masks, forward and backward, for each of the two
    losses and of the inner ascent steps. Gradients of weights: of G, and of U and V in the two losses.
    """
    sizes = {path: model.get_submodule(path).weight.shape for path in C}
    target = sum(parameter.numel() for parameter in model.parameters())
    UV = sum(C[path] * (d_out + d_in) for path, (d_out, d_in) in sizes.items())
    G = config.G_blocks * 12 * config.G_width**2 + config.G_width * sum(C[path] + d_in for path, (_, d_in) in sizes.items())
    masked = 2 + config.adversary_steps
    return 2.0 * (target * (1 + 2 * masked) + UV * (2 * masked + 2) + 3 * G)


def matrix_rate(device: str, bf16: bool) -> float:
    """Operations per second of this device on one large matrix product."""
    n = 2048 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    for _ in range(3):  # the last is warm
        began = time.monotonic()
        (a @ a)[0, 0].item()
    return 2 * n**3 / (time.monotonic() - began)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 3: the evaluation (stage 2 is vpd.decompose)
# ---------------------------------------------------------------------------------------------------------------------


def compute_recovered(curve: list, ce: float) -> float:
    """The share of its training at which the target itself first had this validation cross-entropy ([VPD] section 6).

    Between the points of the curve [(step, cross-entropy), ...] linearly; 0 if it began as good, 1 if it never became as good.
    """
    if curve[0][1] <= ce:
        return 0.0
    for (step, value), (next_step, next_value) in zip(curve, curve[1:]):
        if next_value <= ce:
            return (step + (next_step - step) * (value - ce) / (value - next_value)) / curve[-1][0]
    return 1.0


@torch.no_grad()
def continued(logits_of, prompt: Tensor, new: int, context: int) -> list[int]:
    """The prompt (1, T) and `new` tokens sampled after it at temperature 0.8, always with the same luck."""
    ids, luck = prompt, torch.Generator().manual_seed(0)
    for _ in range(new):
        logits = logits_of(ids[:, -context:])[:, -1].float().cpu() / 0.8
        noise = -(-torch.rand(logits.shape, generator=luck).clamp(min=1e-9).log()).log()  # Gumbel: argmax then samples
        ids = torch.cat([ids, (logits + noise).argmax(-1, keepdim=True).to(ids.device)], 1)
    return ids[0].tolist()


def continuations(model: GPT, decomposition: vpd.Decomposition, prompt: Tensor, new: int) -> dict[str, list[int]]:
    """The prompt (1, T) continued by the target and by the decomposition under each masking."""

    def masked(name):
        def logits_of(ids):
            _, g = vpd.predict_importances(model, decomposition, ids)
            masks = dict(vpd.evaluation_masks(g, torch.Generator(ids.device).manual_seed(0)))[name]
            return vpd.masked_forward(model, decomposition.U, decomposition.V, masks, ids)

        return logits_of

    models = {"target": model} | {name: masked(name) for name in ("unmasked", "stochastic", "rounded_0", "g")}
    return {name: continued(logits_of, prompt, new, model.shape.context) for name, logits_of in models.items()}


def side_by_side(model: GPT, decomposition: vpd.Decomposition, prompt: Tensor, tokenizer: Tokenizer) -> str:
    """The prompt (1, T), and under it how the target and each masking go on."""
    lines = [f"--- the prompt\n{tokenizer.decode(prompt[0].tolist())}"]
    for name, ids in continuations(model, decomposition, prompt, 60).items():
        lines.append(f"--- {name}\n{tokenizer.decode(ids[prompt.shape[1] :])}")
    return "\n".join(lines)


def measure(model: GPT, decomposition: vpd.Decomposition, batches: list[Tensor], curve: list, tokenizer: Tokenizer | None, seed: int) -> dict:
    """What `vpd.evaluate` finds, by the names that language models use, and what only they have.

    Bits per byte need the tokenizer, compute recovered needs the curve of the target's training (empty: left out).
    """
    found = vpd.evaluate(model, decomposition, batches, vpd.kl, seed, cross_entropy)
    losses = found.pop("loss")
    ce, bits_per_byte = losses.pop("target"), None
    above = {masking: loss - ce for masking, loss in losses.items()}
    if tokenizer:
        ids = torch.cat([batch.flatten() for batch in batches]).tolist()
        bits_per_byte = ce / math.log(2) * len(ids) / sum(len(tokenizer.bytes[i]) for i in ids)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "target": {"ce": ce, "bits_per_byte": bits_per_byte, "parameters": parameters, "curve": curve},
        "ce_above_target": above,
        **({"compute_recovered": {name: compute_recovered(curve, ce + x) for name, x in above.items()}} if curve else {}),
        "kl": found.pop("divergence"),
        **found,
    }


def draw_masking(metrics: dict, file: Path) -> None:
    """KL by masking, and under the fresh adversary by its number of steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    names = [name for name in metrics["kl"] if name != "ablated"]
    left.barh(names[::-1], [metrics["kl"][name] for name in names[::-1]])
    left.set(xlabel="KL from the target (nats per position)", title=f"by masking (all ablated: {metrics['kl']['ablated']:.2g})")
    right.plot([int(steps) for steps in metrics["adversary"]], list(metrics["adversary"].values()), marker="o")
    right.set(xlabel="steps of the fresh adversary", ylabel="KL from the target", title="under attack", ylim=(0, 1.2 * max(metrics["adversary"].values())))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def table(metrics: dict) -> str:
    """What a person wants to see at the end."""
    lines = [
        f"target: {metrics['target']['parameters']:,} parameters, validation cross-entropy {metrics['target']['ce']:.3f}"
        + (f", {metrics['target']['bits_per_byte']:.2f} bits per byte" if metrics["target"]["bits_per_byte"] else ""),
        "masking        cross-entropy above target      KL   compute recovered",
    ]
    for name, kl in metrics["kl"].items():
        recovered = f"{metrics['compute_recovered'][name]:18.1%}" if "compute_recovered" in metrics else "unknown".rjust(18)
        lines.append(f"{name:12s} {metrics['ce_above_target'][name]:27.3f} {kl:7.3f} {recovered}")
    lines.append("fresh adversary, KL:  " + "  ".join(f"{steps} steps {value:.2f}" for steps, value in metrics["adversary"].items()))
    lines.append("matrix            C  alive      L0")
    for path, m in [*metrics["matrices"].items(), ("total", metrics["total"])]:
        lines.append(f"{path:12s} {m['C']:6d} {m['alive']:6d} {m['l0']:7.2f}")
    lines.append(f"L0 is {metrics['total']['l0_per_alive']:.1%} of the alive")
    speed = metrics["speed"]
    lines.append(
        f"{sum(metrics['seconds'].values()) / 60:.0f} minutes; a step of the decomposition {speed['seconds_per_step']:.3g} s,"
        f" {speed['tokens_per_second']:,.0f} tokens per second, {speed['operations_per_second'] / speed['matrix_rate']:.0%} of the matrix rate"
    )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# A run: the three stages
# ---------------------------------------------------------------------------------------------------------------------


def corpus(data: str, preset: Preset, folder: Path) -> tuple[np.ndarray, Tokenizer | None]:
    """Token ids and the tokenizer that made them (None for a .bin), from the run folder if it has them already.

    Raises BadInput, and leaves no folder behind, if the data cannot serve.
    """
    if data.endswith(".bin"):
        ids = read_bin(Path(data), preset.shape.vocabulary)
        windows(len(ids), preset.shape.context, True)  # is it long enough?
        return ids, None
    merges, tokens = folder / "tokenizer.json", folder / "tokens.npy"
    if merges.exists() and tokens.exists():
        return np.load(tokens, mmap_mode="r"), Tokenizer(json.loads(merges.read_text()))
    text = read_text(Path(data)) if data else standard_library()
    if not text:
        raise BadInput(f"{data} is empty: give a UTF-8 text")
    print("learning the tokens", file=sys.stderr, flush=True)
    tokenizer = Tokenizer.learn(text, preset.shape.vocabulary)
    ids = tokenizer.encode(text)
    windows(len(ids), preset.shape.context, True)
    folder.mkdir(parents=True, exist_ok=True)
    with vpd.replacing(tokens) as file:
        np.save(file, ids)
    with vpd.replacing(merges) as file:
        file.write(json.dumps(tokenizer.merges).encode())
    return ids, tokenizer


def adopted(source: Path, folder: Path) -> dict:
    """Let a new run folder begin with the target and the tokens of another run; returns the settings that come with them."""
    try:
        settings = json.loads((source / "settings.json").read_text())
    except (OSError, ValueError):
        settings = {}
    if not {"preset", "data", "init_from"} <= settings.keys() or not (settings["init_from"] or (source / "target.pt").exists()):
        raise BadInput(f"{source} is no run with a finished target: give the folder of one, or a pytorch_model.bin of GPT-2")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("target.pt", "tokenizer.json", "tokens.npy"):
        if (source / name).exists():  # a target from a checkpoint, and token ids from a .bin, lie where they were
            with vpd.replacing(folder / name) as file:
                file.write((source / name).read_bytes())
    return {key: settings[key] for key in ("preset", "data", "init_from")}


@dataclass
class Run:
    """A run folder, open: all that its stages have left."""

    folder: Path
    preset: Preset
    model: GPT
    ids: np.ndarray  # the corpus
    tokenizer: Tokenizer | None
    record: dict  # of the target's training
    C: dict[str, int]
    decomposition: vpd.Decomposition
    device: str


def target_and_decomposition(settings: dict, folder: Path, device: str) -> Run:
    """The first two stages; what is already in the folder is loaded and not repeated.

    settings: preset, data (a file name, or "" for the standard library), init_from (a checkpoint, or ""), seed, steps of the
    decomposition (0: as many as the preset's), C (times the preset's).
    """
    preset, data, init_from, seed = PRESETS[settings["preset"]], settings["data"], settings["init_from"], settings["seed"]
    if init_from and not data.endswith(".bin"):
        raise BadInput("--init-from needs --data FILE.bin with GPT-2's own token ids: its tokenizer is not part of the checkpoint")
    if preset.batch % vpd.processes():
        raise BadInput(f"a batch of {preset.batch} does not divide over {vpd.processes()} processes: choose a number that divides it")
    torch.manual_seed(seed)
    model = load_gpt2(Path(init_from)) if init_from else GPT(preset.shape)
    shape = dataclasses.replace(model.shape, context=min(model.shape.context, preset.shape.context))
    config = dataclasses.replace(preset.config, seed=seed, steps=settings["steps"] or preset.config.steps)
    preset = dataclasses.replace(preset, shape=shape, config=config)
    with vpd.rank_0_first():
        ids, tokenizer = corpus(data, preset, folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "settings.json").exists():
            with vpd.replacing(folder / "settings.json") as file:
                file.write(json.dumps(settings).encode())
    model.to(device)
    C = {f"h.{i}.{kind}": max(1, round(number * settings["C"])) for i in range(model.shape.layers) for kind, number in preset.C.items()}
    finished = (folder / "metrics.json").exists()
    if settings["preset"] != "laptop" and not device.startswith("cuda") and vpd.rank() == 0 and not finished:
        steps, per_step = preset.config.steps, preset.batch * shape.context * operations(model, C, preset.config)
        hours = steps * per_step / matrix_rate(device, preset.config.bf16) / 3600
        print(f"warning: the preset {settings['preset']} is for GPUs; here its decomposition takes over {hours:,.0f} hours", file=sys.stderr)

    if (folder / "target.pt").exists():
        saved = saved_state(folder / "target.pt", device)
        model.load_state_dict(saved["model"])
        record = saved["record"]
    elif init_from:
        record = {"curve": [], "seconds": 0.0}
    else:
        record = train_target(model, ids, preset, seed, folder, device)
    model.eval()

    def get_batch(generator):
        return sample(ids, shape.context, preset.batch // vpd.processes(), False, generator)

    if finished:  # whatever the number of processes that made it
        decomposition = vpd.load_decomposition(folder / "decomposition", preset.config, device)
    else:
        decomposition = vpd.decompose(model, C, get_batch, vpd.kl, preset.config, folder / "decomposition", CHECKPOINT_SECONDS)
    return Run(folder, preset, model, ids, tokenizer, record, C, decomposition, device)


def evaluation(run: Run, settings: dict) -> dict:
    """The third stage: metrics.json, which is returned, the pictures and the continuations."""
    began, log, config = time.monotonic(), run.folder / "decomposition" / "log.jsonl", run.preset.config
    batches = validation_batches(run.ids, run.preset, run.device)
    metrics = settings | measure(run.model, run.decomposition, batches, run.record["curve"], run.tokenizer, config.seed)
    seconds = json.loads(log.read_text().splitlines()[-1])["seconds"]
    positions = config.steps * run.preset.batch * run.preset.shape.context  # seen while training
    metrics["seconds"] = {"target": run.record["seconds"], "decomposition": seconds, "evaluation": time.monotonic() - began}
    metrics["speed"] = {
        "seconds_per_step": seconds / config.steps,
        "tokens_per_second": positions / seconds,
        "operations_per_second": positions * operations(run.model, run.C, config) / seconds,
        "matrix_rate": vpd.processes() * matrix_rate(run.device, config.bf16),  # the same devices on one large matrix product
    }
    vpd.draw_run(metrics, log, run.folder / "training.png")
    draw_masking(metrics, run.folder / "masking.png")
    if run.tokenizer:
        text = side_by_side(run.model, run.decomposition, batches[0][:1, : run.preset.shape.context // 2], run.tokenizer)
        (run.folder / "continuations.txt").write_text(text, encoding="utf-8")
        print(text)
    with vpd.replacing(run.folder / "metrics.json") as file:  # last: it says that the run is finished
        file.write(json.dumps(metrics, indent=1).encode())
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# Reading the decomposition: the page of all parts
# ---------------------------------------------------------------------------------------------------------------------

FIRES = 0.1  # a subcomponent fires where its causal importance exceeds this ([VPD] section 8)
EXAMPLES, AROUND = 8, 10  # per subcomponent; tokens on either side


@torch.no_grad()
def observe(run: Run) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The evaluation set (N, T), and what every subcomponent does on it: causal importances and activations {path: (N, T, C)}.

    The activation is ||U_c|| V_c^T x, signed: how much of its write direction a subcomponent adds.
    """
    U, V, g, a = run.decomposition.U, run.decomposition.V, collections.defaultdict(list), collections.defaultdict(list)
    batches = validation_batches(run.ids, run.preset, run.device)
    for batch in batches:
        _, inputs = vpd.forward_with_inputs(run.model, U, batch)
        for path, x in vpd.causal_importances(run.decomposition.G(inputs, U, V)).items():
            g[path].append(x[..., :-1].half())
            a[path].append((inputs[path] @ V[path] * U[path].norm(dim=-1)).half())
    return torch.cat(batches), {path: torch.cat(x) for path, x in g.items()}, {path: torch.cat(x) for path, x in a.items()}


def clearness(ids: Tensor, fires: Tensor, vocabulary: int) -> tuple[float, str, list[tuple[int, float]]]:
    """How clearly one sees when a subcomponent fires: (score, by which token, that token's commonest values with their shares).

    For the token at the position, the one before and the one after: the share of positions where it fires, (N, T) bool, that have
    one of the three commonest values there, less the share of these values in all text; the best of the three, times n / (n + 20)
    for n positions, because chance makes few of them look alike. 1 is the clearest.
    """
    best = (-1.0, "", [])
    for name, shift in (("this token", 0), ("the token before", -1), ("the token after", 1)):
        seen, where = (ids, fires) if not shift else (ids[:, :-1], fires[:, 1:]) if shift < 0 else (ids[:, 1:], fires[:, :-1])
        if where.any():
            share, base = (torch.bincount(x, minlength=vocabulary) / len(x) for x in (seen[where], seen.flatten()))
            top = share.topk(3).indices
            top = top[share[top] > 0]
            score = (share[top] - base[top]).sum().item() * (n := int(where.sum())) / (n + 20)
            best = max(best, (score, name, [(i, share[i].item()) for i in top.tolist()]))
    return best


def examples(ids: Tensor, g: Tensor, a: Tensor, fires: Tensor, generator: torch.Generator) -> list[list[list[int]]]:
    """Random windows around positions where a subcomponent fires: [tokens, importances 0 to 9, activations -9 to 9] each."""
    places, largest, found = fires.nonzero(), a[fires].abs().max().clamp(min=1e-6), []
    for n, t in places[torch.randperm(len(places), generator=generator)[:EXAMPLES].to(places.device)].tolist():
        window = slice(max(0, t - AROUND), t + AROUND + 1)
        strength = (9 * a[n, window] / largest).round().clamp(-9, 9)
        found.append([ids[n, window].tolist(), (9 * g[n, window]).ceil().int().tolist(), strength.int().tolist()])
    return found


def readout(model: GPT) -> Tensor:
    """What a direction in the residual stream adds to each logit, (vocabulary, width): the unembedding behind the last norm.

    Without the norm's division by the length of the stream, which depends on the input.
    """
    E = model.tokens.weight.detach() * model.norm.weight.detach()
    return E - E.mean(1, keepdim=True)  # the norm takes off the mean


def moved_tokens(run: Run, path: str, c: int, sign: float) -> list[int]:
    """The tokens whose logits a subcomponent raises most where it fires: its write direction through the unembedding.

    Only for matrices that write to the residual stream; else none. sign: of its activation there.
    """
    if not path.endswith(("attn.o", "mlp.down")):
        return []
    return (readout(run.model) @ run.decomposition.U[path][c].detach() * sign).topk(6).indices.tolist()


def parts_of(run: Run, ids: Tensor, g: dict[str, Tensor], a: dict[str, Tensor]) -> list[dict]:
    """All subcomponents that fire on what was observed, with what a person needs to judge them, the clearest first.

    contrast: the mean size of the activation where it fires over its root mean square elsewhere.
    """
    generator, parts = torch.Generator().manual_seed(0), []
    for path in g:
        for c in (g[path].amax((0, 1)) > FIRES).nonzero()[:, 0].tolist():
            fires = g[path][..., c] > FIRES
            importance, activation = g[path][..., c].float(), a[path][..., c].float()  # (N, T)
            score, by, tokens = clearness(ids, fires, run.preset.shape.vocabulary)
            part = {"matrix": path, "c": c, "fires": int(fires.sum()), "density": fires.float().mean().item()}
            part |= {"importance": importance[fires].mean().item(), "clearness": score, "by": by, "tokens": tokens}
            elsewhere = activation[~fires].square().mean().sqrt().item() if not fires.all() else math.inf
            part["contrast"] = activation[fires].abs().mean().item() / max(elsewhere, 1e-3)
            part["moves"] = moved_tokens(run, path, c, activation[fires].mean().sign().item())
            part["examples"] = examples(ids, importance, activation, fires, generator)
            parts.append(part)
    return sorted(parts, key=lambda part: -part["clearness"])


def clearest(parts: list[dict]) -> list[dict]:
    """The first 20 parts, at most two from one matrix."""
    taken, chosen = collections.Counter(), []
    for part in parts:
        taken[part["matrix"]] += 1
        if taken[part["matrix"]] <= 2:
            chosen.append(part)
    return chosen[:20]


def shown(run: Run, token: int) -> str:
    """A token as people can see it; without a tokenizer its number."""
    return repr(run.tokenizer.decode([token])) if run.tokenizer else str(token)


def described(run: Run, part: dict) -> str:
    """A part in a line: where it fires, and which tokens it raises."""
    tokens = ", ".join(f"{shown(run, token)} {share:.0%}" for token, share in part["tokens"])
    moves = "; raises " + " ".join(shown(run, token) for token in part["moves"][:4]) if part["moves"] else ""
    return f"{part['matrix'] + ':' + str(part['c']):18s} fires {part['fires']:4d} times; {part['by']}: {tokens}{moves}"


def report(run: Run) -> str:
    """Write report.html, and return the clearest parts as text for the terminal."""
    parts = parts_of(run, *observe(run))
    vocabulary = [run.tokenizer.decode([i]) if run.tokenizer else f" {i}" for i in range(run.preset.shape.vocabulary)]
    metrics = json.loads((run.folder / "metrics.json").read_text())
    pictures = [base64.b64encode((run.folder / name).read_bytes()).decode() for name in ("masking.png", "training.png")]
    data = json.dumps({"vocabulary": vocabulary, "parts": parts}, separators=(",", ":"), allow_nan=False)
    data = data.replace("<", "\\u003c")  # no tag inside
    page = PAGE.replace("@@TABLE@@", html.escape(table(metrics)))
    page = page.replace("@@PICTURES@@", "".join(f'<img src="data:image/png;base64,{picture}">' for picture in pictures)).replace("@@DATA@@", data)
    with vpd.replacing(run.folder / "report.html") as file:
        file.write(page.encode())
    return "\n".join(f"clearness {part['clearness']:.2f}  {described(run, part)}" for part in clearest(parts))


PAGE = """<!doctype html><meta charset="utf-8"><title>The parts of a language model</title>
<style>
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222 }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto } img { max-width: 32%; margin-right: 1% }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: 2px 8px; border-bottom: 1px solid #ddd; vertical-align: top }
th, .row { cursor: pointer } .row:hover { background: #f4f4f4 } input { font: inherit; width: 30em; padding: 4px }
.example, code { font: 13px/2 ui-monospace, monospace; white-space: pre-wrap } .example { border-left: 3px solid #ddd; margin: 6px 0; padding-left: 8px }
code { background: #eee; padding: 0 2px; margin-right: 5px }
</style>
<h1>The parts of a language model</h1>
<details><summary>How good is the decomposition?</summary><pre>@@TABLE@@</pre>@@PICTURES@@</details>
<p>Each row is a <em>subcomponent</em>, a rank-one part of a weight matrix. It <em>fires</em> where its causal importance exceeds 0.1: there it cannot be
ablated without changing the output, says the causal importance function. <em>Clearness</em>: of the positions where it fires, the share with one of the three commonest tokens there (this one,
the one before or the one after), less the share of these tokens in all text, and less if it fires rarely. <em>Raises</em>: tokens whose logits its write direction raises most.
Click a row for examples: orange = causal importance, underline = activation (blue positive, red negative).</p>
<p><input id="search" placeholder="search: a matrix (h.1.mlp), a part (h.1.attn.q:3) or a token" autofocus> <span id="count"></span></p>
<table><thead><tr id="head"></tr></thead><tbody id="body"></tbody></table><p><button id="more">more</button></p>
<script type="application/json" id="data">@@DATA@@</script>
<script>
const data = JSON.parse(document.getElementById('data').textContent), get = id => document.getElementById(id)
const visible = text => text.replace(/\\n/g, '\\u23ce\\n').replace(/\\t/g, '\\u2192\\t')
const columns = [['part', p => p.matrix + ':' + String(p.c).padStart(5)], ['fires on', p => p.density], ['importance', p => p.importance],
                 ['clearness', p => p.clearness], ['where it fires', p => p.by], ['raises', p => p.moves.length]]
const element = (tag, text, parent, name) => { const e = document.createElement(tag); e.textContent = text; if (name) e.className = name; parent.append(e); return e }
for (const p of data.parts) p.text = [p.matrix + ':' + p.c, ...p.tokens.map(t => data.vocabulary[t[0]]), ...p.moves.map(t => data.vocabulary[t])].join('\\n').toLowerCase()
let sorted = 3, up = false, limit = 100
columns.forEach(([name], i) => element('th', name, get('head')).onclick = () => { up = sorted == i ? !up : i == 0; sorted = i; draw() })
function draw() {
  const wanted = get('search').value.toLowerCase(), key = columns[sorted][1], body = get('body')
  const found = data.parts.filter(p => p.text.includes(wanted)).sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) * (up ? 1 : -1))
  get('count').textContent = found.length + ' of ' + data.parts.length + ' parts'
  get('more').hidden = found.length <= limit
  body.replaceChildren()
  for (const p of found.slice(0, limit)) {
    const row = element('tr', '', body, 'row')
    element('td', p.matrix + ':' + p.c, row)
    element('td', (100 * p.density).toPrecision(2) + ' %', row)
    element('td', p.importance.toFixed(2), row)
    element('td', p.clearness.toFixed(2), row)
    const where = element('td', p.by + ': ', row), moves = element('td', '', row)
    for (const [token, share] of p.tokens) { element('code', visible(data.vocabulary[token]), where); where.append(Math.round(100 * share) + ' % ') }
    for (const token of p.moves) element('code', visible(data.vocabulary[token]), moves)
    let opened = null
    row.onclick = () => { if (opened) { opened.remove(); opened = null } else { opened = document.createElement('tr'); row.after(opened); examples(p, opened) } }
  }
}
function examples(p, row) {
  const cell = element('td', '', row); cell.colSpan = columns.length
  for (const [ids, g, a] of p.examples) {
    const line = element('div', '', cell, 'example')
    ids.forEach((id, i) => {
      const span = element('span', visible(data.vocabulary[id]), line)
      span.style.background = `rgba(255, 150, 0, ${g[i] / 9})`
      span.style.borderBottom = `3px solid rgba(${a[i] > 0 ? '0, 90, 200' : '200, 0, 40'}, ${Math.abs(a[i]) / 9})`
      span.title = `importance ${(g[i] / 9).toFixed(1)}, activation ${(a[i] / 9).toFixed(1)} of the largest`
    })
  }
}
get('search').oninput = () => { limit = 100; draw() }
get('more').onclick = () => { limit += 400; draw() }
draw()
</script>
"""


# ---------------------------------------------------------------------------------------------------------------------
# Reading the decomposition: circuits
# ---------------------------------------------------------------------------------------------------------------------

EMBEDDINGS = ("tokens", "positions")
PRICE = 2e-3  # of a node while pruning, in nats of cross-entropy
PRUNINGS = {  # of the masks while pruning: random ones, an adversary's
    "importances alone": (False, False),
    "stochastic": (True, False),
    "stochastic and adversarial": (True, True),
}


def encoded(run: Run, text: str) -> Tensor:
    """A prompt as (1, T) token ids. Raises BadInput if the run has no tokenizer, or the prompt is empty or too long."""
    if not run.tokenizer:
        raise BadInput(f"{run.folder} was made from token ids, without a tokenizer: prompts need a run on text")
    try:
        ids = run.tokenizer.encode(text)
    except UnicodeEncodeError:
        raise BadInput(f"{text!r} is not UTF-8 text") from None
    if not 1 <= len(ids) <= run.preset.shape.context:
        raise BadInput(f"the prompt {text[:40]!r} has {len(ids)} tokens: the model takes 1 to {run.preset.shape.context}")
    return torch.from_numpy(ids.astype(np.int64))[None].to(run.device)


def one_token(run: Run, text: str) -> int:
    """The id of a text that is one token; raises BadInput, with its pieces, if it is not."""
    ids = encoded(run, text)[0].tolist()
    if len(ids) != 1:
        raise BadInput(f"{text!r} is not one token but {len(ids)}: {' '.join(shown(run, i) for i in ids)}; give one of them")
    return ids[0]


def name_of(run: Run, node: dict, ids: Tensor) -> str:
    """A node as people read it: part@position, with the token there."""
    where = f"@{node['position']} {shown(run, int(ids[0, node['position']]))}"
    part = f":{node['subcomponent']}" if "importance" in node else ""
    return f"{node['matrix']}{part}{where}"


def edges_into(graph: dict) -> dict[int, list[dict]]:
    """The edges into every node, the strongest first."""
    into = collections.defaultdict(list)
    for edge in sorted(graph["edges"], key=lambda edge: -edge["share"]):
        into[edge["target"]].append(edge)
    return into


def strongest_paths(run: Run, graph: dict, ids: Tensor, number: int = 8) -> str:
    """Down from the outcome: its strongest sources, and below each always the strongest, to an embedding. <- raises, |- lowers."""
    into, lines = edges_into(graph), []
    for edge in into[len(graph["nodes"]) - 1][:number]:
        line, below = f"{edge['share']:6.1%}  outcome", [edge]
        while below:
            line += (" <- " if below[0]["attribution"] > 0 else " |- ") + name_of(run, graph["nodes"][below[0]["source"]], ids)
            below = into[below[0]["source"]]
        lines.append(line)
    return "\n".join(lines)


def draw_circuit(run: Run, graph: dict, ids: Tensor, outcome: str, file: Path) -> None:
    """What goes most into every node: positions across, layers up; node colour = matrix, edge colour and width = signed attribution."""
    last = len(graph["nodes"]) - 1
    edges = [edge for target, found in edges_into(graph).items() for edge in found[: 20 if target == last else 3]]
    used = sorted({edge[end] for edge in edges for end in ("source", "target")})
    rows = [[*EMBEDDINGS]]
    for i in range(run.model.shape.layers):
        rows += [[f"h.{i}.attn.{m}" for m in "qkv"], [f"h.{i}.attn.o"], [f"h.{i}.mlp.up"], [f"h.{i}.mlp.down"]]
    height = {path: y for y, paths in enumerate([*rows, ["outcome"]]) for path in paths}
    matrices, cells, at = [path for paths in rows for path in paths], collections.defaultdict(list), {}
    for n in used:
        cells[graph["nodes"][n]["position"], height[graph["nodes"][n]["matrix"]]].append(n)
    for (position, y), inside in cells.items():
        for i, n in enumerate(inside):  # side by side, and in a zigzag, within the cell
            at[n] = position + 0.8 * ((i + 0.5) / len(inside) - 0.5), y + 0.25 * (i % 2) * (len(inside) > 2)
    T = ids.shape[1]
    figure, axis = plt.subplots(figsize=(max(7, 1.15 * T), 7.5), layout="constrained")
    for edge in edges:
        (x0, y0), (x1, y1) = at[edge["source"]], at[edge["target"]]
        colour = "#1f6fb4" if edge["attribution"] > 0 else "#c85200"
        axis.plot([x0, x1], [y0, y1], color=colour, linewidth=0.3 + 5 * edge["share"], alpha=0.6, zorder=1)
    for path in [*matrices, "outcome"]:
        points = [at[n] for n in used if graph["nodes"][n]["matrix"] == path]
        colour = "black" if path == "outcome" else plt.get_cmap("tab20")(matrices.index(path) % 20)
        axis.scatter([x for x, _ in points], [y for _, y in points], s=45, color=colour, edgecolors="white", linewidths=0.5, zorder=2)
    layers = [", ".join([row[0], *(path[-1] for path in row[1:])]) for row in rows]  # "h.0.attn.q, k, v" and so on
    layers = ["tokens, positions", *layers[1:], f"outcome: {outcome}"]
    axis.set_xticks(range(T), [shown(run, i) for i in ids[0].tolist()], parse_math=False)  # a dollar in a token is a dollar
    axis.set_yticks(range(len(layers)), layers, parse_math=False)
    axis.set(xlabel="position", title="what goes most into every part that is left (blue raises, orange lowers)", xlim=(-0.6, T - 0.4))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def circuit(run: Run, prompt: str, token_text: str | None) -> dict:
    """The attribution graph of one prediction, and what is left of it when it is pruned in three ways; see `circuits`."""
    model, decomposition, ids = run.model, run.decomposition, encoded(run, prompt)
    target, g = vpd.predict_importances(model, decomposition, ids)
    token = one_token(run, token_text) if token_text else int(target[0, -1].argmax())

    wanted = torch.tensor([token], device=ids.device)

    def loss(output):
        return F.cross_entropy(output[:, -1].float(), wanted)

    shapes, active = {path: x.shape for path, x in g.items()}, {path: x > 0 for path, x in g.items()}

    def judged(importances):
        rounded = {path: (x > 0).float() for path, x in importances.items()}
        with torch.no_grad():
            under = [loss(vpd.masked_forward(model, decomposition.U, decomposition.V, masks, ids)).item() for masks in (importances, rounded)]
        case = [(ids, target, importances)]  # the adversary moves what was active before pruning; all else stays random
        attacked = vpd.fresh_adversary(model, decomposition, case, lambda _, output: loss(output), shapes, active)
        nodes = sum(int((x > 0).sum()) for x in importances.values())
        return {"nodes": nodes, "ce": under[0], "ce_rounded": under[1], "attacked": attacked}

    def outcome(logits):  # the softmax does not see what all logits have in common
        return logits[0, -1, token] - logits[0, -1].mean()

    def graph(importances):
        return vpd.attribution_graph(model, decomposition, importances, ids, outcome, EMBEDDINGS, share=0.005)

    prunings = {"not pruned": judged(g)}
    for name, (stochastic, adversarial) in PRUNINGS.items():
        pruned = vpd.prune(model, decomposition, g, ids, loss, PRICE, stochastic, adversarial)
        prunings[name] = judged(pruned)
    found = {"prompt": prompt, "token": token, "ids": ids[0].tolist(), "target_ce": loss(target).item(), "prunings": prunings}
    return {**found, "graph": graph(g), "pruned_graph": graph(pruned)}  # pruned: in the last way


def circuits(run: Run, prompts: list[str], token_text: str | None) -> str:
    """For every prompt circuit.json and circuit.png (numbered from the second on); the strongest paths of each and a table of all.

    circuit.json: the attribution graph of all active subcomponents, and that of those left by the last pruning, which is drawn.
    """
    lines, found = [], []
    for prompt in [*prompts, *([token_text] if token_text else [])]:
        encoded(run, prompt)  # refuse what cannot serve before anything is computed
    began = time.monotonic()
    for number, prompt in enumerate(prompts, 1):
        file = run.folder / ("circuit" if number == 1 else f"circuit_{number}")
        found.append(result := circuit(run, prompt, token_text))
        with vpd.replacing(file.with_suffix(".json")) as out:
            out.write(json.dumps(result).encode())
        ids, token = torch.tensor([result["ids"]]), shown(run, result["token"])
        draw_circuit(run, result["pruned_graph"], ids, token, file.with_suffix(".png"))
        lines += [f"{prompt!r} then {token} (cross-entropy of the target {result['target_ce']:.3f}); the strongest paths after pruning:"]
        lines += [strongest_paths(run, result["pruned_graph"], ids)]
        left = (time.monotonic() - began) / number * (len(prompts) - number)
        vpd.progress(f"circuit {number}/{len(prompts)}  {left:.0f} s left", number == len(prompts), len(prompts) > 1)

    def mean(values) -> str:
        return f"{np.mean(list(values)):10.3f}"

    lines += [f"cross-entropy of the token, mean of {len(found)} prompts; target: {mean(result['target_ce'] for result in found).strip()}"]
    lines += ["pruning                      nodes  as masks   rounded  under a fresh adversary of 20, 40, 80 steps"]
    for name in found[0]["prunings"]:
        each = [result["prunings"][name] for result in found]
        attacked = "".join(mean(x["attacked"][steps] for x in each) for steps in each[0]["attacked"])
        nodes = np.mean([x["nodes"] for x in each])
        lines.append(f"{name:26s} {nodes:7.0f}{mean(x['ce'] for x in each)}{mean(x['ce_rounded'] for x in each)}{attacked}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Reading the decomposition: attention
# ---------------------------------------------------------------------------------------------------------------------


PAIRS = 100  # of a q and a k subcomponent, shown per head


@torch.no_grad()
def score_parts(model: GPT, decomposition: vpd.Decomposition, layer: int, ids: Tensor) -> dict[str, Tensor]:
    """The attention scores of a layer on ids (1, T), before the causal mask, as a sum over pairs of a q and a k subcomponent.

    Of head h from position t to t': score = sum_{c,c'} a_q[t, c] static[h, c, c'] a_k[t', c'] + rest[h, t, t'], where a = V_c^T x,
    static = U_qc^h . U_kc'^h / sqrt(d), and rest is all that involves a bias or Delta.
    """
    paths, heads = [f"h.{layer}.attn.{m}" for m in "qk"], model.shape.heads
    _, inputs = vpd.forward_with_inputs(model, paths, ids)
    a, writes, others = [], [], []
    for path in paths:
        x, U, V, linear = inputs[path][0], decomposition.U[path], decomposition.V[path], model.get_submodule(path)
        a.append(x @ V)  # (T, C)
        writes.append(U.view(len(U), heads, -1).transpose(0, 1))  # (heads, C, d)
        others.append((linear(x) - x @ V @ U).view(len(x), heads, -1).transpose(0, 1))  # bias and Delta: (heads, T, d)
    scale = writes[0].shape[-1] ** -0.5
    by_parts = [torch.einsum("tc,hcd->htd", *pair) for pair in zip(a, writes)]  # (heads, T, d)
    rest = by_parts[0] @ others[1].mT + others[0] @ by_parts[1].mT + others[0] @ others[1].mT
    return {"a_q": a[0], "a_k": a[1], "static": writes[0] @ writes[1].mT * scale, "rest": rest * scale}


def attention(run: Run, layer: int, prompt: str) -> str:
    """How a layer's subcomponents spread over its heads, and which pairs of them make its attention scores on a prompt.

    Writes attention_LAYER.png (norms) and attention_LAYER_pairs.png, and returns the strongest pairs.
    """
    if not 0 <= layer < run.model.shape.layers:
        raise BadInput(f"there is no layer {layer}: the model has layers 0 to {run.model.shape.layers - 1}")
    if (ids := encoded(run, prompt)).shape[1] < 2:
        raise BadInput(f"the prompt {prompt!r} has one token: attention needs two")
    metrics = json.loads((run.folder / "metrics.json").read_text())["matrices"]
    heads, lines = run.model.shape.heads, []
    figure, axes = plt.subplots(1, 4, figsize=(10, 4), layout="constrained")
    for axis, m in zip(axes, "qkvo"):
        path = f"h.{layer}.attn.{m}"
        U, V = run.decomposition.U[path].detach(), run.decomposition.V[path].detach()
        by_head, other = (V.T, U) if m == "o" else (U, V.T)  # o reads from the heads, the others write to them
        norm = by_head.view(len(U), heads, -1).norm(dim=-1) * other.norm(dim=-1, keepdim=True)  # (C, heads)
        norm = norm[torch.tensor(metrics[path]["mean_importance"]) > vpd.ALIVE].cpu()
        several = ((norm > 0.5 * norm.amax(1, keepdim=True)).sum(1) > 1).float().mean()
        lines.append(f"{path}: {several:.0%} of {len(norm)} alive have over half their largest norm in another head too")
        image = axis.imshow(norm[norm.argmax(1).argsort(stable=True)], aspect="auto", cmap="viridis", interpolation="nearest")
        axis.set(title=path, xlabel="head", ylabel="alive subcomponent" if m == "q" else "", xticks=range(heads))
        figure.colorbar(image, ax=axis)
    figure.suptitle("norm of each subcomponent per head")
    figure.savefig(run.folder / f"attention_{layer}.png", dpi=110)
    plt.close(figure)

    parts = score_parts(run.model, run.decomposition, layer, ids)
    a_q, a_k, static, T = parts["a_q"], parts["a_k"], parts["static"], ids.shape[1]
    V_q, V_k = (run.decomposition.V[f"h.{layer}.attn.{m}"].detach().norm(dim=0) for m in "qk")
    signed = V_q[:, None] * static * V_k * a_q.mean(0).sign()[:, None] * a_k.mean(0).sign()  # (heads, C_q, C_k)
    allowed = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()

    def centred(scores):  # the softmax does not see what all allowed positions have in common
        scores = torch.where(allowed, scores, 0.0)
        return torch.where(allowed, scores - scores.sum(-1, keepdim=True) / allowed.sum(-1, keepdim=True), 0.0)

    pairs = torch.einsum("tc,hcd,sd->hts", a_q, static, a_k)
    true = centred(pairs + parts["rest"])  # (heads, T, T)
    figure, axes = plt.subplots(heads, 5, figsize=(13, 2.5 * heads), squeeze=False, layout="constrained")
    for h in range(heads):
        z = signed[h] / signed[h].std()
        best = z.abs().flatten().topk(3).indices
        lines.append(f"head {h}, strongest static pairs: " + ", ".join(f"q:{i // len(V_k)} k:{i % len(V_k)} ({z.flatten()[i]:.1f} sd)" for i in best.tolist()))
        size = torch.einsum("tc,td->cd", a_q.square(), (a_k.square().cumsum(0) / torch.arange(1, T + 1, device=ids.device)[:, None]))
        top = (size * static[h].square()).flatten().topk(min(PAIRS, static[h].numel())).indices.tolist()  # pairs with the largest mean square on this prompt
        each = [centred(static[h, i // len(V_k), i % len(V_k)] * a_q[:, i // len(V_k), None] * a_k[:, i % len(V_k)]) for i in top]
        explained = 1 - (true[h] - sum(each)).square().sum() / true[h].square().sum()
        lines.append(f"head {h}, on the prompt: {PAIRS} of {static[h].numel()} pairs explain {explained:.0%} of the scores' variance")
        pattern = torch.where(allowed, true[h], -torch.inf).softmax(-1)
        panels = [("attention", pattern), ("scores", true[h]), (f"{PAIRS} pairs: {explained:.0%}", sum(each))]
        panels += [(f"q:{i // len(V_k)} k:{i % len(V_k)}", x) for i, x in zip(top[:2], each)]
        limit = true[h].abs().max().item()
        for axis, (title, matrix) in zip(axes[h], panels):
            colours = {"cmap": "viridis", "vmin": 0, "vmax": 1} if title == "attention" else {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
            axis.imshow(matrix.cpu(), interpolation="nearest", **colours)
            axis.set(title=f"head {h}: {title}", xticks=[], yticks=[])
        axes[h, 0].set_yticks(range(T), [shown(run, i) for i in ids[0].tolist()], fontsize=7, parse_math=False)
    figure.suptitle(f"layer {layer}: from each position (down) to those before (across)")
    figure.savefig(run.folder / f"attention_{layer}_pairs.png", dpi=110)
    plt.close(figure)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Reading the decomposition: an edit by hand
# ---------------------------------------------------------------------------------------------------------------------

ALPHAS = (0.5, 1.0, 2.0, 3.0, 5.0)


def chosen_part(run: Run, name: str) -> tuple[str, int]:
    """MATRIX:NUMBER as (path, c). Raises BadInput, naming the nearest, if there is none, or it is dead, or it cannot be edited."""
    path, _, number = name.partition(":")
    editable = [path for path in run.C if path.endswith(("attn.o", "mlp.down"))]
    if path not in run.C:
        nearest = difflib.get_close_matches(path, editable, n=2, cutoff=0.0)
        raise BadInput(f"{path!r} is no matrix of this run; the nearest that can be edited: {', '.join(nearest)}")
    if path not in editable:
        raise BadInput(f"{path} does not write to the residual stream, where tokens have directions: choose one of {', '.join(editable)}")
    mean = json.loads((run.folder / "metrics.json").read_text())["matrices"][path]["mean_importance"]
    alive = [c for c, x in enumerate(mean) if x > vpd.ALIVE]
    if not alive:
        raise BadInput(f"{path} has no alive subcomponent: choose another of {', '.join(editable)}")
    if not number.isdecimal() or int(number) not in alive:
        nearest = min(alive, key=lambda c: abs(c - int(number))) if number.isdecimal() else alive[0]
        raise BadInput(f"{name!r} is no alive subcomponent of {path} (it has {len(mean)}, {len(alive)} alive): the nearest is {path}:{nearest}")
    return path, int(number)


@contextlib.contextmanager
def edited(run: Run, path: str, c: int, token: int, strength: float):
    """Within, the model's matrix writes the direction of `token` where subcomponent c wrote its own, `strength` times U_c's length."""
    weight, U, V = run.model.get_submodule(path).weight, run.decomposition.U[path][c].detach(), run.decomposition.V[path][:, c].detach()
    direction = F.normalize(readout(run.model)[token], dim=0)
    original = weight.detach().clone()
    try:
        weight.data += torch.outer(strength * U.norm() * direction - U, V)
        yield
    finally:
        weight.data.copy_(original)


@torch.no_grad()
def effect(run: Run, path: str, c: int, token: int, alpha: float, batches: list[Tensor], fires: list[Tensor], sign: float) -> dict[str, float]:
    """An edit on the evaluation set: the token's probability where c fires, before and after; KL near (20 tokens around) and elsewhere."""
    seen = []
    for batch, where in zip(batches, fires):
        plain = run.model(batch).float().log_softmax(-1)
        with edited(run, path, c, token, sign * alpha):
            changed = run.model(batch).float().log_softmax(-1)
        near = F.max_pool1d(where.float()[:, None], 41, stride=1, padding=20)[:, 0] > 0
        kl = (plain.exp() * (plain - changed)).sum(-1)
        seen.append((plain[..., token].exp(), changed[..., token].exp(), kl, where, near))
    before, after, kl, where, near = (torch.cat(x) for x in zip(*seen))  # (N, T) each
    means = {"before": before[where], "after": after[where], "kl_near": kl[near], "kl_elsewhere": kl[~near]}
    return {"alpha": alpha} | {name: x.mean().item() if len(x) else 0.0 for name, x in means.items()}


def edit(run: Run, name: str, token_text: str, alpha: float) -> str:
    """Make a subcomponent write another token; measure it for several alphas, beside the same edit of a random part of the matrix that fires."""
    path, c = chosen_part(run, name)
    token, batches = one_token(run, token_text), validation_batches(run.ids, run.preset, run.device)
    ids, g, a = observe(run)
    fires = {i: g[path][..., i] > FIRES for i in (g[path].amax((0, 1)) > FIRES).nonzero()[:, 0].tolist()}
    if c not in fires:
        raise BadInput(f"{name} fires nowhere in the evaluation set; of {path} these do: {', '.join(map(str, list(fires)[:8])) or 'none'}")
    others = [i for i in fires if i != c] or [c]
    control = others[int(torch.randint(len(others), (1,), generator=torch.Generator().manual_seed(0)))]
    lines, results = [f"{name} -> {token_text!r}: where it fires, {int(fires[c].sum())} of {ids.numel()} positions"], {}
    for which in (c, control):
        sign = a[path][..., which][fires[which]].float().mean().sign().item()
        split = list(fires[which].split([len(batch) for batch in batches]))
        results[f"{path}:{which}"] = [effect(run, path, which, token, x, batches, split, sign) for x in sorted({*ALPHAS, alpha})]
        lines.append(f"{path}:{which}{' (control, at random)' if which != c else ''}")
        lines.append("  alpha   probability before    after    KL within 20 tokens   KL elsewhere")
        for x in results[f"{path}:{which}"]:
            lines.append(f"  {x['alpha']:5.1f} {x['before']:20.5f} {x['after']:8.5f} {x['kl_near']:22.5f} {x['kl_elsewhere']:14.6f}")
    with vpd.replacing(run.folder / "edit.json") as file:
        file.write(json.dumps({"part": name, "token": token_text, "control": f"{path}:{control}", "effects": results}, indent=1).encode())
    sign = a[path][..., c][fires[c]].float().mean().sign().item()
    for n, t in fires[c].nonzero()[torch.randperm(int(fires[c].sum()), generator=torch.Generator().manual_seed(1))[:5]].tolist():
        prompt = ids[n : n + 1, : t + 1]
        plain = continued(run.model, prompt, 15, run.model.shape.context)
        with edited(run, path, c, token, sign * alpha):
            changed = continued(run.model, prompt, 15, run.model.shape.context)
        start = run.tokenizer.decode(prompt[0, -25:].tolist())
        goes_on = [run.tokenizer.decode(x[t + 1 :]) for x in (plain, changed)]
        lines.append(f"--- {start!r}\n    before: {goes_on[0]!r}\n    after:  {goes_on[1]!r}")
    return "\n".join(lines)


def proposals(run: Run) -> str:
    """Five subcomponents that look most editable: far more active where they fire than elsewhere, and clear."""
    parts = [part for part in parts_of(run, *observe(run)) if part["moves"] and part["fires"] >= 20]
    lines = ["clear, and active where they fire far more than elsewhere (contrast: mean activation there over root mean square elsewhere),"]
    lines += ["so that an edit changes what happens there and leaves other text alone:"]
    for part in sorted(parts, key=lambda part: -part["contrast"] * max(0, part["clearness"]))[:5]:
        lines.append(f"contrast {part['contrast']:4.1f}  {described(run, part)}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Reading the decomposition: do two of them agree?
# ---------------------------------------------------------------------------------------------------------------------


def alive_and_untrained(run: Run) -> list[vpd.Decomposition]:
    """The alive subcomponents of a run, and all of them as they were before any training."""
    matrices, found = json.loads((run.folder / "metrics.json").read_text())["matrices"], run.decomposition
    alive = {path: torch.tensor(matrices[path]["mean_importance"], device=run.device) > vpd.ALIVE for path in run.C}
    _, inputs = vpd.forward_with_inputs(run.model, run.C, validation_batches(run.ids, run.preset, run.device)[0])
    untrained = vpd.start(run.model, run.C, inputs, run.preset.config).decomposition
    U, V = {path: found.U[path][alive[path]] for path in run.C}, {path: found.V[path][:, alive[path]] for path in run.C}
    return [vpd.Decomposition(U, V, found.G), untrained]


def compare(run: Run, folder: Path) -> str:
    """How like the alive subcomponents of a run are to those of another run on the same target, and how like all were before training.

    Writes compare.json, {"trained": {matrix: {"U", "V", "product"}}, "untrained": the same}, and returns it as a table.
    """
    if not (folder / "metrics.json").exists():
        raise BadInput(f"{folder} holds no finished decomposition: compare with a run that has one")
    other = target_and_decomposition(json.loads((folder / "settings.json").read_text()), folder, run.device)
    mine, others = run.model.state_dict(), other.model.state_dict()
    if mine.keys() != others.keys() or any(x.shape != others[name].shape or not x.equal(others[name]) for name, x in mine.items()):
        raise BadInput(f"{folder} decomposes another target: make a run on this one's with --init-from {run.folder}")
    lines, found = ["mean largest cosine   before training: U, V, product    trained: U, V, product"], {"other": str(folder)}
    for name, one, two in zip(("trained", "untrained"), alive_and_untrained(run), alive_and_untrained(other)):
        each = vpd.similarity(one, two)  # {path: {"U": (C,), ...}}
        each["all"] = {part: torch.cat([x[part] for x in each.values()]) for part in ("U", "V", "product")}
        found[name] = {path: {part: x.sum().item() / max(1, len(x)) for part, x in of.items()} for path, of in each.items()}
    for path in [*run.C, "all"]:
        before, after = ("  ".join(f"{x:.2f}" for x in found[name][path].values()) for name in ("untrained", "trained"))
        lines.append(f"{path:20s} {before:>30s} {after:>25s}")
    with vpd.replacing(run.folder / "compare.json") as file:
        file.write(json.dumps(found, indent=1).encode())
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def read(run: Run, options: argparse.Namespace) -> str:
    """What the command line asks of a finished run."""
    if options.report:
        return report(run) + f"\nall parts are in {run.folder / 'report.html'}"
    if options.circuit:
        return circuits(run, options.circuit, options.token) + f"\npictures and graphs are in {run.folder}/circuit*"
    if options.attention is not None:
        return attention(run, options.attention, options.prompt) + f"\npictures are in {run.folder}/attention_{options.attention}*.png"
    if options.compare:
        return compare(run, options.compare)
    if not options.edit:
        return proposals(run)
    if not options.to:
        raise BadInput("--edit needs --to TOKEN, the token that the subcomponent shall write")
    return edit(run, options.edit, options.to, options.alpha)


def main() -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu if there is one, else laptop")
    parser.add_argument("--data", default="", help="a UTF-8 text, or FILE.bin of uint16 token ids (default: Python's standard library)")
    parser.add_argument("--init-from", default="", metavar="FILE", help="decompose this GPT-2 (pytorch_model.bin), or the target of this run's folder")
    parser.add_argument("--steps", type=int, default=0, help="of the decomposition (default: the preset's)")
    parser.add_argument("--C", type=float, default=1, metavar="FACTOR", help="this many times the preset's subcomponents (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="run folder (default: runs/PRESET)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own preset, data and seed")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: the best there is)")
    reading = parser.add_argument_group("read a finished run (--out)")
    reading.add_argument("--report", action="store_true", help="write report.html, the page of all parts, and print the clearest")
    reading.add_argument("--circuit", nargs="+", metavar="PROMPT", help="the attribution graph of the prediction after each prompt, and its prunings")
    reading.add_argument("--token", help="with --circuit: the token to explain (default: what the target predicts)")
    reading.add_argument("--attention", type=int, metavar="LAYER", help="which pairs of q and k subcomponents make the scores of a layer")
    reading.add_argument("--prompt", default="def __init__(self, name):\n        self.name = name\n", help="with --attention: the text")
    reading.add_argument("--edit", nargs="?", const="", metavar="MATRIX:NUMBER", help="write another token; without an argument: propose five")
    reading.add_argument("--compare", type=Path, metavar="FOLDER", help="how like are the subcomponents to those of another run on the same target")
    reading.add_argument("--to", metavar="TOKEN", help="with --edit: the token")
    reading.add_argument("--alpha", type=float, default=3.0, help="with --edit: how strongly, in lengths of the original (default: 3)")
    options = parser.parse_args()
    reads = options.report or options.circuit or options.attention is not None or options.edit is not None or options.compare
    preset, device = options.preset or ("gpu" if options.device.startswith("cuda") else "laptop"), options.device
    folder = options.out or Path("runs") / preset
    settings = {"preset": preset, "data": options.data, "init_from": options.init_from, "seed": options.seed}
    settings |= {"steps": options.steps, "C": options.C}
    if "LOCAL_RANK" in os.environ:  # under torchrun
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError):
            raise BadInput(f"there is no device {device!r} here: give --device cpu, or leave it out") from None
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"{folder} is a file: choose a folder with --out")
        if not 0 <= options.seed < 10**9:
            raise BadInput(f"the seed is {options.seed}: it must be at least 0 and under a billion")
        if options.steps < 0 or not 0 < options.C <= 100:
            raise BadInput(f"--steps {options.steps} --C {options.C:g}: steps must be at least 1 (0: the preset's), and C (a factor) above 0 and at most 100")
        if reads and vpd.processes() > 1:
            raise BadInput("a run is read by one process: leave out torchrun")
        with vpd.rank_0_first():
            if reads and not (folder / "metrics.json").exists():
                raise BadInput(f"{folder} holds no finished decomposition: make one first, or go on with --resume")
            if options.resume and not (folder / "settings.json").exists():
                raise BadInput(f"{folder} holds no run to resume: leave out --resume, or give its folder with --out")
            if reads or options.resume:
                settings |= json.loads((folder / "settings.json").read_text())
            elif vpd.rank() == 0 and folder.exists() and any(folder.iterdir()):
                raise BadInput(f"{folder} holds a run already: go on with it with --resume, or choose another folder with --out")
            elif Path(options.init_from or "-").is_dir():
                if options.preset or options.data:
                    raise BadInput("a run given to --init-from brings its preset and data: leave out --preset and --data")
                settings |= adopted(Path(options.init_from), folder)
        run = target_and_decomposition(settings, folder, device)
        if reads:
            print(read(run, options))
        elif vpd.rank() == 0:
            print(table(evaluation(run, settings)))
            print(f"pictures and metrics.json are in {folder}")
    except BadInput as error:
        sys.exit(f"error: {error}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
