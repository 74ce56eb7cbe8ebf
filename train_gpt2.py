"""Train a small GPT-2 written by hand, decompose all its attention and MLP matrices with VPD, and report how good that is.

    python train_gpt2.py                                    # everything, on the source text of Python's standard library
    python train_gpt2.py --data my.txt --out runs/mine      # any UTF-8 text
    python train_gpt2.py --data corpus.bin                  # uint16 token ids (nanoGPT's format), memory-mapped
    python train_gpt2.py --out runs/mine --resume           # go on where a killed run stopped
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --preset paper --data pile.bin

Three stages, each with its product in the run folder: the target model (target.pt), its decomposition (decomposition/), and the
evaluation (metrics.json, pictures). From top to bottom: the model, the tokenizer, the data, training the target, the evaluation,
the command.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import heapq
import json
import math
import os
import re
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

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
    heads = max(1, width // 64)  # so in every published size
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
        return b"".join(self.bytes[i] for i in ids).decode(errors="replace")


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
    if not file.exists():
        raise BadInput(f"{file} does not exist: give a UTF-8 text or a .bin of uint16 token ids")
    if file.stat().st_size % 2 or not file.stat().st_size:
        raise BadInput(f"{file} has {file.stat().st_size} bytes: a .bin holds uint16 token ids, two bytes each")
    ids = np.memmap(file, dtype=np.uint16, mode="r")
    for start in range(0, len(ids), 1 << 24):  # in parts: the file may be larger than memory
        if (largest := int(ids[start : start + (1 << 24)].max())) >= vocabulary:
            raise BadInput(f"{file} holds the token id {largest}, outside the vocabulary of {vocabulary}")
    return ids


def windows(ids: np.ndarray, T: int, validation: bool) -> tuple[np.ndarray, int]:
    """Where windows of T tokens may be cut: the starts of the training or the validation stretches, and the offsets in each.

    Raises BadInput if the corpus is too short to have both.
    """
    stretch = min(STRETCH, len(ids) // 10)
    if stretch < T:
        raise BadInput(f"the corpus has {len(ids)} tokens; with windows of {T} it must have at least {10 * T}: give a longer one")
    starts = np.arange(0, len(ids) - stretch + 1, stretch)
    return starts[(np.arange(len(starts)) % 10 == 9) == validation], stretch - T + 1


def sample(ids: np.ndarray, T: int, B: int, validation: bool, generator: torch.Generator) -> Tensor:
    """(B, T) token ids, windows that lie wholly in training or in validation stretches."""
    starts, offsets = windows(ids, T, validation)
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


PRESETS = {
    "laptop": Preset(
        Shape(layers=2, width=64, heads=4, context=64, vocabulary=1024),
        batch=16,
        target_steps=6000,
        target_lr=3e-3,
        C={"attn.q": 64, "attn.k": 64, "attn.v": 128, "attn.o": 128, "mlp.up": 224, "mlp.down": 224},
        config=vpd.Config(
            steps=2500, lr=2e-3, lr_final=0.1, clip_UV=0.1, importance=1e-3, frequency=5e-4, delta=1e6, p_end=0.4, G="transformer"
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
            steps=20_000,
            lr=5e-4,
            lr_final=0.1,
            clip_UV=0.1,
            importance=5e-4,
            frequency=2.5e-4,
            delta=1e6,
            p_end=0.4,
            G="transformer",
            G_width=512,
            G_blocks=4,
            G_heads=8,
            bf16=True,
        ),
    ),
    # The published run ([VPD]; its target was trained elsewhere). 8 GPUs, days; not measured.
    "paper": Preset(
        Shape(layers=4, width=768, heads=6, context=512, vocabulary=50_304),
        batch=64,
        target_steps=100_000,
        target_lr=6e-4,
        C={"attn.q": 512, "attn.k": 512, "attn.v": 1024, "attn.o": 1024, "mlp.up": 3072, "mlp.down": 3584},
        config=vpd.Config(
            steps=400_000,
            lr=5e-5,
            lr_final=0.1,
            clip_UV=0.01,
            clip_G=math.inf,
            importance=2e-4,
            frequency=1e-4,
            delta=1e7,
            p_end=0.4,
            G="transformer",
            G_width=2048,
            G_blocks=8,
            G_heads=16,
            bf16=True,
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


def train_target(model: GPT, ids: np.ndarray, preset: Preset, seed: int, folder: Path, device: str) -> dict:
    """Train the model (AdamW, warm-up, cosine to a tenth), or go on where a killed run stopped. Writes target.pt.

    Returns {"curve": [(step, validation cross-entropy), ...], "seconds": ...}.
    """
    parameters, kind = list(model.parameters()), torch.device(device).type
    optimizer = torch.optim.AdamW(parameters, lr=preset.target_lr, betas=(0.9, 0.95), weight_decay=0.1, fused=kind == "cuda")
    generator, step, record = torch.Generator(), 0, {"curve": [], "seconds": 0.0}
    unfinished, steps, validation = folder / "target_unfinished.pt", preset.target_steps, validation_batches(ids, preset, device)
    if unfinished.exists():
        state = torch.load(unfinished, map_location=device, weights_only=True)
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
        vpd.average([parameter.grad for parameter in parameters])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        record["seconds"] = time.monotonic() - began
        if step % max(1, steps // 50) == 0 or step == steps:
            record["curve"].append((step, validation_loss(model, validation)))
            left = record["seconds"] / step * (steps - step)
            line = f"target: step {step}/{steps}  validation loss {record['curve'][-1][1]:.3f}  {left:.0f} s left"
            if vpd.rank() == 0 and sys.stderr.isatty():
                print(f"\r{line}\033[K", end="\n" if step == steps else "", file=sys.stderr, flush=True)
            elif vpd.rank() == 0 and (step == steps or step % (steps // 5) == 0):
                print(line, file=sys.stderr, flush=True)
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


def continuations(model: GPT, decomposition: vpd.Decomposition, prompt: Tensor, new: int) -> dict[str, list[int]]:
    """The prompt (1, T) continued by the target and by the decomposition under each masking, with the same luck for all."""

    def continued(logits_of) -> list[int]:
        ids, luck = prompt, torch.Generator().manual_seed(0)
        for _ in range(new):
            logits = logits_of(ids[:, -model.shape.context :])[:, -1].float().cpu() / 0.8
            noise = -(-torch.rand(logits.shape, generator=luck).clamp(min=1e-9).log()).log()  # Gumbel: argmax then samples
            ids = torch.cat([ids, (logits + noise).argmax(-1, keepdim=True).to(ids.device)], 1)
        return ids[0].tolist()

    def masked(name):
        def logits_of(ids):
            _, g = vpd.predict_importances(model, decomposition, ids)
            masks = vpd.evaluation_masks(g, torch.Generator(ids.device).manual_seed(0))[name]
            return vpd.masked_forward(model, decomposition.U, decomposition.V, masks, ids)

        return logits_of

    with torch.no_grad():
        names = ("unmasked", "stochastic", "rounded_0", "importance")
        return {"target": continued(model)} | {name: continued(masked(name)) for name in names}


def side_by_side(model: GPT, decomposition: vpd.Decomposition, prompt: Tensor, tokenizer: Tokenizer) -> str:
    """The prompt (1, T), and under it how the target and each masking go on."""
    start = tokenizer.decode(prompt[0].tolist())
    shown = [f"--- the prompt\n{start}"]
    for name, ids in continuations(model, decomposition, prompt, 60).items():
        shown.append(f"--- {name}\n{tokenizer.decode(ids)[len(start) :]}")
    return "\n".join(shown)


def measure(model: GPT, decomposition: vpd.Decomposition, batches: list[Tensor], curve: list, tokenizer: Tokenizer | None, seed: int) -> dict:
    """What `vpd.evaluate` finds, by the names that language models use, and what only they have.

    Bits per byte need the tokenizer, compute recovered needs the curve of the target's training (empty: left out).
    """
    found = vpd.evaluate(model, decomposition, batches, vpd.kl, seed, cross_entropy)
    above = found.pop("loss")
    ce, bits_per_byte = above.pop("target"), None
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
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    names = [name for name in metrics["kl"] if name != "ablated"]
    left.barh(names[::-1], [metrics["kl"][name] for name in names[::-1]])
    left.set(xlabel="KL from the target (nats per position)", title=f"by masking (all ablated: {metrics['kl']['ablated']:.2g})")
    right.plot([int(steps) for steps in metrics["adversary"]], list(metrics["adversary"].values()), marker="o")
    right.set(xlabel="steps of the fresh adversary", ylabel="KL from the target", title="under attack", ylim=(0, None))
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
# The command
# ---------------------------------------------------------------------------------------------------------------------


def corpus(data: str, preset: Preset, folder: Path) -> tuple[np.ndarray, Tokenizer | None]:
    """Token ids and the tokenizer that made them (None for a .bin), from the run folder if it has them already.

    Raises BadInput, and leaves no folder behind, if the data cannot serve.
    """
    if data.endswith(".bin"):
        ids = read_bin(Path(data), preset.shape.vocabulary)
        windows(ids, preset.shape.context, True)  # is it long enough?
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
    windows(ids, preset.shape.context, True)
    folder.mkdir(parents=True, exist_ok=True)
    with vpd.replacing(tokens) as file:
        np.save(file, ids)
    with vpd.replacing(merges) as file:
        file.write(json.dumps(tokenizer.merges).encode())
    return ids, tokenizer


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

    settings: preset, data (a file name, or "" for the standard library), init_from (a checkpoint, or ""), seed.
    """
    preset, data, init_from, seed = PRESETS[settings["preset"]], settings["data"], settings["init_from"], settings["seed"]
    if init_from and not data.endswith(".bin"):
        raise BadInput("--init-from needs --data FILE.bin with GPT-2's own token ids: its tokenizer is not part of the checkpoint")
    if preset.batch % vpd.processes():
        raise BadInput(f"a batch of {preset.batch} does not divide over {vpd.processes()} processes: choose a number that divides it")
    torch.manual_seed(seed)
    model = load_gpt2(Path(init_from)) if init_from else GPT(preset.shape)
    shape = dataclasses.replace(model.shape, context=min(model.shape.context, preset.shape.context))
    preset = dataclasses.replace(preset, shape=shape, config=dataclasses.replace(preset.config, seed=seed))
    with vpd.rank_0_first():
        ids, tokenizer = corpus(data, preset, folder)
        folder.mkdir(parents=True, exist_ok=True)
        with vpd.replacing(folder / "settings.json") as file:
            file.write(json.dumps(settings).encode())
    model.to(device)
    C = {f"h.{i}.{kind}": number for i in range(model.shape.layers) for kind, number in preset.C.items()}
    finished = (folder / "metrics.json").exists()
    if settings["preset"] != "laptop" and not device.startswith("cuda") and vpd.rank() == 0 and not finished:
        steps, per_step = preset.config.steps, preset.batch * shape.context * operations(model, C, preset.config)
        hours = steps * per_step / matrix_rate(device, preset.config.bf16) / 3600
        print(f"warning: the preset {settings['preset']} is for GPUs; here its decomposition takes over {hours:,.0f} hours", file=sys.stderr)

    if (folder / "target.pt").exists():
        saved = torch.load(folder / "target.pt", map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        record = saved["record"]
    elif init_from:
        record = {"curve": [], "seconds": 0.0}
    else:
        record = train_target(model, ids, preset, seed, folder, device)
    model.eval()

    def get_batch(generator):
        return sample(ids, shape.context, preset.batch // vpd.processes(), False, generator)

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
    with vpd.replacing(run.folder / "metrics.json") as file:
        file.write(json.dumps(metrics, indent=1).encode())
    vpd.draw_spectrum(metrics, run.folder / "spectrum.png")
    vpd.draw_losses(log, run.folder / "losses.png")
    draw_masking(metrics, run.folder / "masking.png")
    if run.tokenizer:
        text = side_by_side(run.model, run.decomposition, batches[0][:1, : run.preset.shape.context // 2], run.tokenizer)
        (run.folder / "continuations.txt").write_text(text, encoding="utf-8")
        print(text)
    return metrics


def main() -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu if there is one, else laptop")
    parser.add_argument("--data", default="", help="a UTF-8 text, or FILE.bin of uint16 token ids (default: Python's standard library)")
    parser.add_argument("--init-from", default="", metavar="FILE", help="decompose this GPT-2 (pytorch_model.bin) instead of training one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="run folder (default: runs/PRESET)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own preset, data and seed")
    parser.add_argument("--device", default=vpd.best_device(), help="cpu, cuda or mps (default: the best there is)")
    options = parser.parse_args()
    preset, device = options.preset or ("gpu" if options.device.startswith("cuda") else "laptop"), options.device
    folder = options.out or Path("runs") / preset
    settings = {"preset": preset, "data": options.data, "init_from": options.init_from, "seed": options.seed}
    if "LOCAL_RANK" in os.environ:  # under torchrun
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        with vpd.rank_0_first():
            if options.resume:
                if not (folder / "settings.json").exists():
                    raise BadInput(f"{folder} holds no run to resume: leave out --resume, or give its folder with --out")
                settings = json.loads((folder / "settings.json").read_text())
            elif vpd.rank() == 0 and folder.exists() and any(folder.iterdir()):
                raise BadInput(f"{folder} holds a run already: go on with it with --resume, or choose another folder with --out")
        run = target_and_decomposition(settings, folder, device)
        if vpd.rank() == 0:
            print(table(evaluation(run, settings)))
            print(f"pictures and metrics.json are in {folder}")
    except BadInput as error:
        sys.exit(f"error: {error}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
