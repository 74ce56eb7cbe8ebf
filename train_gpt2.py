"""Train a small GPT-2 written by hand, decompose all its attention and MLP matrices with VPD, and measure the result.

    python train_gpt2.py                                    # everything, on the source of Python's standard library
    python train_gpt2.py --data my.txt --out runs/mine      # any UTF-8 text
    python train_gpt2.py --data ids.bin --out runs/ids      # token ids (nanoGPT's format), memory-mapped
    python train_gpt2.py --init-from runs/laptop --C 2 --out runs/C-2           # decompose the same target differently
    python train_gpt2.py --init-from gpt2 --data my.txt --out runs/gpt2         # a GPT-2 from its folder, as downloaded
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --preset paper --data pile.bin
    python train_gpt2.py --report "def __init__("           # read the finished run: the page of all subcomponents
    python train_gpt2.py --circuit "def __init__(" [--token self]

A run leaves a target (target.pt), its decomposition (decomposition/), and metrics.json with a picture. A killed run
goes on when its command is repeated. [VPD] is "Interpreting Language Model Parameters" (2026). B = batch,
T = positions of a window, N = windows of the evaluation set, C = subcomponents of a matrix."""

from __future__ import annotations

import argparse
import collections
import functools
import html
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
from typing import Callable

# A thread that waits for another first spins (GNU's OpenMP), by default for milliseconds: beside one busy program a
# step then takes 3.3 times as long. 2000 is some 50 microseconds, about what a wake-up costs: 2.6 times. (Without
# spinning, OMP_WAIT_POLICY=PASSIVE, 1.5; but two threads are then slower than one.) Read as torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# A notebook's names a module that is not here, and matplotlib then fails at its import. Pictures only go to files.
os.environ["MPLBACKEND"] = "agg"

import matplotlib.figure
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vpd

# ---- The model: GPT-2 -----------------------------------------------------------------------------------------------
# For another architecture change the names that follow, and what stands from Shape to `readout`.
# The decomposed matrices of each layer h.0, h.1, ...
MATRICES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
WRITERS = ("attn.o", "mlp.down")  # the matrices that write to the residual stream, where tokens have directions
EMBEDDINGS = ("tokens", "positions")  # the modules that write to it, but are not decomposed

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
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))

class Block(nn.Module):
    """Attention and MLP, each on the normalised residual stream and added to it. (B, T, width) to the same."""
    def __init__(self, shape: Shape):
        super().__init__()
        self.norm_attn = nn.LayerNorm(shape.width, shape.epsilon)
        self.attn = Attention(shape)
        self.norm_mlp = nn.LayerNorm(shape.width, shape.epsilon)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_attn(x))
        return x + self.mlp(self.norm_mlp(x))

class GPT(nn.Module):
    """GPT-2: token ids (B, T) -> logits (B, T, vocabulary). The unembedding is the embedding, transposed."""
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.h = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, shape.epsilon)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:  # as GPT-2: the matrices that write to the residual stream start smaller
                smaller = name.removesuffix(".weight").endswith(WRITERS)
                nn.init.normal_(parameter, std=0.02 / (2 * shape.layers) ** 0.5 if smaller else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))  # (B, T, width)
        for block in self.h:
            x = block(x)
        return (self.norm(x) @ self.tokens.weight.T).to(x.dtype)  # float32 as the stream, under autocast too

def subcomponents(model: GPT, factor: float) -> dict[str, int]:
    """Into how many subcomponents each matrix is decomposed, {path: C}. Factor 1: 0.7 (d_in + d_out) into each."""
    C = {}
    for path, module in model.named_modules():
        if path.endswith(MATRICES):
            C[path] = max(1, round(0.7 * factor * (module.in_features + module.out_features)))
    return C

def readout(model: GPT) -> Tensor:
    """What a direction in the residual stream adds to each logit, (vocabulary, width): the unembedding behind the norm.
    It leaves out the norm's division by the length of the stream, which depends on the input."""
    E = model.tokens.weight.detach() * model.norm.weight.detach()
    return E - E.mean(1, keepdim=True)  # the norm takes off the mean

# ---- The tokenizer: byte-pair encoding, learned from the text, or GPT-2's ------------------------------------------
# The text is cut into pieces: a word with the space before it, a number, signs, white space. No token spans two pieces.
# At most 100 characters each: `learn` recounts a piece after every merge in it, and DNA would else be a single piece.
PIECES = re.compile(r" ?[^\W\d_]{1,100}| ?\d{1,100}| ?[^\w\s]{1,100}| ?_{1,100}|\s{1,100}")
GPT2_PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d]+| ?\d+| ?[^\w\s]+|\s+(?!\S)|\s+")

def gpt2_pieces(text: str) -> list[str]:
    """GPT-2's pieces. Characters that are newer than GPT-2 may be split otherwise than by its tokenizer."""
    numbers = [x for x in set(text) if unicodedata.category(x) in ("Nl", "No")]  # letters to `re`, as is "_"
    of_its_kind = str.maketrans("_\x1c\x1d\x1e\x1f" + "".join(numbers), "!!!!!" + "0" * len(numbers))
    return [text[slice(*found.span())] for found in GPT2_PIECES.finditer(text.translate(of_its_kind))]

def gpt2_bytes() -> dict[str, int]:
    """GPT-2's files write a byte as one visible character: {character: byte}, in the order of the tokens 0 to 255."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [i for i in range(256) if i not in visible]
    return {chr(i): i for i in visible} | {chr(256 + n): i for n, i in enumerate(others)}

class Tokenizer:
    """256 bytes, and after them one token for each merge of two tokens. Lossless on any text. gpt2: with the pieces and
    the order of bytes of GPT-2; its <|endoftext|> is made from no text."""
    def __init__(self, merges: list[tuple[int, int]], gpt2: bool = False):
        self.gpt2 = gpt2
        self.merges = [tuple(pair) for pair in merges]
        # While tokens are merged, a token is the character of its number: a merge is then a replacement in a string.
        self.merged = {chr(a) + chr(b): chr(256 + i) for i, (a, b) in enumerate(self.merges)}
        self.bytes = [bytes([i]) for i in (gpt2_bytes().values() if gpt2 else range(256))]  # of each token
        self.token_of_byte = bytes.maketrans(b"".join(self.bytes), bytes(range(256)))
        for a, b in self.merges:
            self.bytes.append(self.bytes[a] + self.bytes[b])

    @staticmethod
    def learn(text: str, vocabulary: int) -> Tokenizer:
        """Merge the most frequent pair of neighbours, until there are `vocabulary` tokens or no pair is left."""
        count = collections.Counter(PIECES.findall(text))
        words = [piece.encode().decode("latin-1") for piece in count]  # a character for each byte
        times = list(count.values())  # of each word
        pairs = collections.Counter()  # pair -> how often
        where = collections.defaultdict(set)  # pair -> in which words
        def recount(w, sign):
            for a, b in zip(words[w], words[w][1:]):
                pairs[a + b] += sign * times[w]
                where[a + b].add(w)
        for w in range(len(words)):
            recount(w, 1)
        merges = []
        for token in vpd.with_progress(range(256, vocabulary), "learning the tokens"):
            most = max(pairs.values(), default=0)
            if most == 0:
                break  # no pair is left
            commonest_pair = min(pair for pair, n in pairs.items() if n == most)
            merges.append(tuple(map(ord, commonest_pair)))
            for w in where.pop(commonest_pair):
                recount(w, -1)
                words[w] = words[w].replace(commonest_pair, chr(token))
                recount(w, 1)
        return Tokenizer(merges)

    def encode(self, text: str) -> np.ndarray:
        """Token ids: uint16, or uint32 if there are more than 65,536."""
        pieces = gpt2_pieces(text) if self.gpt2 else PIECES.findall(text)
        dtype = np.uint16 if len(self.bytes) <= 1 << 16 else np.uint32
        encoded = {}
        for piece in vpd.with_progress(set(pieces), "encoding the text"):  # every distinct piece once
            word = piece.encode().translate(self.token_of_byte).decode("latin-1")
            while known := self.merged.keys() & {a + b for a, b in zip(word, word[1:])}:
                first = min(known, key=self.merged.get)
                word = word.replace(first, self.merged[first])
            encoded[piece] = np.array([ord(token) for token in word], dtype=dtype)
        return np.concatenate([np.zeros(0, dtype), *(encoded[piece] for piece in pieces)])

    def decode(self, ids) -> str:
        """The text of token ids, with U+FFFD for half a character. An id that no merge has made is shown as <50256>."""
        return b"".join(self.bytes[i] if i < len(self.bytes) else b"<%d>" % i for i in ids).decode(errors="replace")

def gpt2_tokenizer(folder: Path) -> Tokenizer:
    """GPT-2's tokenizer from vocab.json and merges.txt, as downloaded. Raises BadInput if they cannot serve."""
    with vpd.refusing(Exception, f"{folder} lacks vocab.json or merges.txt of a GPT-2", "give --data FILE.bin"):
        numbers = json.loads(read_text(folder / "vocab.json"))
        lines = read_text(folder / "merges.txt").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        merges = [(numbers[a], numbers[b]) for a, b in pairs]
        names = [*gpt2_bytes(), *(a + b for a, b in pairs)]
        in_order = [numbers[name] for name in names] == list(range(len(names)))
    vpd.reject_if(not in_order, f"{folder}/vocab.json does not number tokens as GPT-2 does: give --data FILE.bin")
    return Tokenizer(merges, gpt2=True)

# ---- The data -------------------------------------------------------------------------------------------------------
STRETCH = 2048  # tokens; every tenth stretch of the corpus is for validation: both kinds are spread over all of it

def standard_library() -> str:
    """The source text of Python's own standard library, without tests and tables. Raises BadInput if it is not here."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}  # encodings: only tables
    files = [file for file in sorted(folder.rglob("*.py")) if not skipped & set(file.relative_to(folder).parts)]
    vpd.reject_if(len(files) < 100, f"the standard library's source is not in {folder}: give a text with --data FILE")
    return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)

def read_text(file: Path) -> str:
    """The text of a file. Raises BadInput if there is no such file, or it is empty or not UTF-8."""
    try:
        text = file.read_text(encoding="utf-8-sig")  # without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise vpd.BadInput(f"{file} cannot be read ({error}): give a UTF-8 text or a .bin of token ids") from None
    vpd.reject_if(not text, f"{file} is empty: give a UTF-8 text")
    return text

def read_bin(file: Path) -> np.ndarray:
    """Token ids, memory-mapped: uint16, as nanoGPT writes them, or int32 or int64, announced on stderr; without the
    header of llm.c, if there is one. Raises BadInput if there are none or one of the first is negative, and OSError."""
    size = file.stat().st_size
    vpd.reject_if(size % 2 or not size, f"{file} has {size} bytes: give a file of uint16, int32 or int64 token ids")
    ids = np.memmap(file, dtype=np.uint16, mode="r")
    if int.from_bytes(ids[:2].tobytes(), "little") in (20240520, 20240801):
        ids = ids[512:]  # after the header of llm.c, which begins with the number of its format
    for wider in (np.int32, np.int64):
        in_pairs = ids[: len(ids) // 2 * 2].view(wider)
        largest = float(np.abs(in_pairs[: 1 << 22]).max(initial=0))
        if largest >= 2.0 ** (8 * ids.itemsize - 4) * ids[: 1 << 23].max(initial=0):
            break  # two ids that are read as one are thousands of times as large as each
        ids = in_pairs
    if ids.itemsize > 2 and vpd.rank() == 0:
        print(f"{file} is read as {ids.dtype}", file=sys.stderr)
    vpd.reject_if(ids[: 1 << 23].min(initial=0) < 0, f"{file} holds negative token ids: make it without them")
    return ids

def sample(ids: np.ndarray, T: int, B: int, validation: bool, generator: torch.Generator) -> Tensor:
    """(B, T) token ids, windows that lie wholly in training or in validation stretches. Raises BadInput if the corpus
    is too short to have both."""
    stretch = min(max(STRETCH, T), len(ids) // 10)
    vpd.reject_if(stretch < T, f"the corpus has {len(ids)} tokens; for windows of {T} give one of at least {10 * T}")
    number = len(ids) // stretch
    of_validation = number // 10
    if validation:
        which = 10 * torch.randint(of_validation, (B,), generator=generator) + 9
    else:
        which = torch.randint(number - of_validation, (B,), generator=generator)
        which = which + which // 9  # nine of training, one left out
    at = which * stretch + torch.randint(stretch - T + 1, (B,), generator=generator)
    return torch.from_numpy(np.stack([ids[i : i + T] for i in at.tolist()]).astype(np.int64))

# ---- The target, stage 1 --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Preset:
    """What fits a machine: the target and its training, and what is to be otherwise than in `vpd.sequence_config`."""
    shape: Shape
    batch: int  # windows, of all processes together; the target takes twice as many
    target_steps: int
    target_lr: float
    settings: dict

PRESETS = {
    "laptop": Preset(  # 6 minutes on two cores; many small steps beat few large ones (but not with batch=4)
        Shape(layers=2, width=64, heads=4, context=64, vocabulary=1024), batch=8,
        target_steps=3500, target_lr=5e-3, settings={}),
    "gpu": Preset(  # for one GPU; not measured
        Shape(layers=4, width=256, heads=4, context=256, vocabulary=4096), batch=64,
        target_steps=10_000, target_lr=1e-3, settings={"steps": 20_000, "bf16": True}),
    "paper": Preset(  # the published run, whose target was trained elsewhere; 8 GPUs, days; not measured
        Shape(layers=4, width=768, heads=6, context=512, vocabulary=50_304), batch=64,
        target_steps=50_000, target_lr=6e-4,
        settings={"steps": 400_000, "lr": 5e-5, "muon": 0, "average": 0, "beta2": 0.999, "clip_G": math.inf,
                  "w_importance": 2e-4, "w_frequency": 1e-4, "shrink": 0, "adversary_steps": 2, "adversary_lr": 0.01,
                  "G_width": 2048, "G_blocks": 8, "G_heads": 16, "G_activations": False, "bf16": True})}
EVALUATED = 16_384  # positions of validation text
SOME = 2048  # the first of them, for attributions
WINDOWS = 8  # in a batch of validation text
CHECKPOINT_SECONDS = 60  # of training, which a kill costs at most

def validation_batches(ids: np.ndarray, preset: Preset, device: str) -> list[Tensor]:
    """The evaluation set, for the target's curve and all its decompositions: (WINDOWS, T) each. It depends on the
    corpus and on the length T of a window alone, so that all are judged on the same text."""
    T = preset.shape.context
    generator = torch.Generator().manual_seed(12345)
    number = math.ceil(EVALUATED / (WINDOWS * T))
    return [sample(ids, T, WINDOWS, True, generator).to(device) for _ in range(number)]

def cross_entropy(ids: Tensor, logits: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats, scalar. ids (B, T), logits (B, T, vocabulary)."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())

@torch.no_grad()
def validation_loss(model: GPT, batches: list[Tensor], bf16: bool = False) -> float:
    """Mean next-token cross-entropy in nats over all batches (B, T), in the precision of training."""
    with vpd.precision(batches[0].device, bf16):
        return sum(cross_entropy(batch, model(batch)).item() for batch in batches) / len(batches)

def load_target(place: Path | None) -> tuple[GPT | None, dict | None]:
    """The model that the folder of a run or of a GPT-2 holds, on the CPU, and the record of its training; None twice if
    there is none. Raises BadInput if a file is damaged or of another model; see `read_gpt2`."""
    advice = "get it again, whole, with model.safetensors and not a pointer of git-lfs, or choose another folder"
    with vpd.refusing(Exception, f"{place} holds no model that can be read", advice):
        if place and (place / "target.pt").exists():
            saved = torch.load(place / "target.pt", map_location="cpu", weights_only=True)
        elif place and ((place / "config.json").exists() or (place / "ckpt.pt").exists()):
            saved = read_gpt2(place)
        else:
            return None, None
        model = GPT(Shape(**saved["shape"]))
        biases = {name: x for name, x in model.state_dict().items() if name.endswith(".bias")}
        if biases.keys().isdisjoint(saved["model"]):  # nanoGPT's bias=False; those of a new model are 0
            saved["model"] |= biases
        model.load_state_dict(saved["model"])
    return model, saved["record"]

def write(file: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with vpd.atomic_write(file) as opened:
        opened.write(text.encode())

def save_target(model: GPT, record: dict, folder: Path) -> None:
    """Write target.pt: the model, its shape, and the record of its training (see `train_target`)."""
    with vpd.atomic_write(folder / "target.pt") as file:
        torch.save({"shape": asdict(model.shape), "model": model.state_dict(), "record": record}, file)

def train_target(run: Run) -> dict:
    """Train the model (AdamW, warm-up, cosine to a tenth), or go on where a killed run stopped; writes target.pt.
    Returns {"curve": [(step, validation cross-entropy)], "seconds"}. Raises BadInput if the loss is not finite."""
    model = run.model
    preset = run.preset
    bf16 = run.config.bf16
    steps = preset.target_steps
    parameters = list(model.parameters())
    fused = not run.device.startswith("mps")
    # not Muon: its matrices have a higher rank, so that an attack on the decomposition gets three times as far
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    generator = torch.Generator()
    validation = validation_batches(run.ids, preset, run.device)
    record = {"curve": [(0, validation_loss(model, validation, bf16))], "seconds": 0.0}
    unfinished = run.folder / "target_unfinished.pt"
    first = 0
    if unfinished.exists():
        state = torch.load(unfinished, map_location=run.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        record = state["record"]
    start = time.monotonic() - record["seconds"]
    saved = record["seconds"]
    for step in range(first + 1, steps + 1):
        warmup = step / 100
        cosine = 0.55 + 0.45 * math.cos(math.pi * (step - 1) / steps)
        optimizer.param_groups[0]["lr"] = preset.target_lr * min(1, warmup, cosine)
        # from the step alone, so that there is nothing to save
        generator.manual_seed((run.config.seed * 10**9 + step - 1) * vpd.world_size() + vpd.rank())
        windows = 2 * preset.batch // vpd.world_size()
        batch = sample(run.ids, preset.shape.context, windows, False, generator).to(run.device)
        with vpd.precision(run.device, bf16):
            loss = cross_entropy(batch, model(batch))
        vpd.reject_if(not loss.isfinite(), f"the target's loss is not finite at step {step}: lower target_lr")
        optimizer.zero_grad()
        loss.backward()
        vpd.all_reduce_mean([parameter.grad for parameter in parameters])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        record["seconds"] = time.monotonic() - start
        if step % max(1, steps // 50) == 0 or step == steps:
            ce = validation_loss(model, validation, bf16)
            record["curve"].append((step, ce))
            left = record["seconds"] / step * (steps - step)
            line = f"target: step {step}/{steps}  validation loss {ce:.3f}  {left:.0f} s left"
            if vpd.rank() == 0:
                vpd.progress(line, step == steps or step % max(1, steps // 5) == 0)
        if vpd.rank() == 0 and record["seconds"] - saved > CHECKPOINT_SECONDS:
            saved = record["seconds"]
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "record": record}
            with vpd.atomic_write(unfinished) as file:
                torch.save(state, file)
    if vpd.rank() == 0:
        save_target(model, record, run.folder)
        unfinished.unlink(missing_ok=True)
    return record

GPT2_NAMES = {"wte": "tokens", "wpe": "positions", "ln_f": "norm", "ln_1": "norm_attn", "ln_2": "norm_mlp",
              "attn.c_proj": "attn.o", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}  # Hugging Face's names -> ours

def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file: 8 bytes, the length of the header; the header, JSON; the tensors. Raises if
    it is cut."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            raw = torch.frombuffer(bytearray(content[start + begin : start + end]), dtype=dtypes[entry["dtype"]])
            tensors[name] = raw.reshape(entry["shape"])
    return tensors

def read_gpt2(folder: Path) -> dict:
    """A GPT-2 of any size, as downloaded, or nanoGPT's ckpt.pt (with GPT-2's GELU), as `save_target` saves a target:
    {"shape": sizes, "model": {name in `GPT`: weights}, "record"}. Raises BadInput if config.json says that it computes
    otherwise than `GPT` (ckpt.pt does not name its GELU), and almost any other error if a file is damaged."""
    if (folder / "ckpt.pt").exists():
        saved = torch.load(folder / "ckpt.pt", map_location="cpu", weights_only=True)
        config = saved["model_args"]
        given = saved["model"]
    else:
        config = json.loads(read_text(folder / "config.json"))
        given = collections.ChainMap(*map(read_safetensors, folder.glob("model*.safetensors")))  # one, or shards
    gelu = config.get("activation_function", "gelu_new") in ("gelu_new", "gelu_pytorch_tanh")  # one, by two names
    unscaled = not config.get("scale_attn_weights", True)
    other = not gelu or unscaled or config.get("scale_attn_by_inverse_layer_idx")
    vpd.reject_if(other, f"{folder}: its activation or its scale of attention is not GPT-2's: give one like GPT-2")
    given = {re.sub(r"^((_orig_mod|module|transformer)\.)+", "", name): x.float() for name, x in given.items()}
    given = {"wte.weight": given.get("lm_head.weight")} | given  # files may hold the one, the other or both
    context, width = given["wpe.weight"].shape
    heads = config["n_head"]
    vpd.reject_if(width % heads, f"{folder}: n_head = {heads} does not divide {width}: mend it")
    shape = {"layers": config["n_layer"], "width": width, "heads": heads, "context": context,
             "vocabulary": len(given["wte.weight"]), "epsilon": config.get("layer_norm_epsilon", 1e-5)}
    transposed = given["h.0.attn.c_attn.weight"].shape[0] == width  # Hugging Face's Conv1D stores (d_in, d_out)
    tied = given.pop("lm_head.weight", given["wte.weight"]).equal(given["wte.weight"])
    vpd.reject_if(not tied, f"{folder}: lm_head.weight is not wte.weight; give a GPT-2 where they are the same")
    state = {}
    for name, x in given.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # masks of attention, in older files
        if transposed and name.startswith("h.") and x.dim() == 2:
            x = x.T
        for theirs, ours in GPT2_NAMES.items():
            name = name.replace(f"{theirs}.", f"{ours}.")
        if "c_attn" in name:  # q, k and v beside each other
            for matrix, third in zip("qkv", x.chunk(3)):
                state[name.replace("c_attn", matrix)] = third
        else:
            state[name] = x
    return {"shape": shape, "model": state, "record": {"curve": [], "seconds": 0.0}}  # trained elsewhere

# ---- A run: the target, its decomposition (stage 2 is vpd.decompose), and what they leave in a folder ---------------
# Of a run, by default: the standard library, a target of its own, the preset's steps and batch; C is a factor.
SETTINGS = {"preset": "laptop", "data": "", "init_from": "", "seed": 0, "steps": 0, "batch": 0, "C": 1}

@dataclass
class Run:
    """A run folder, open: what its first two stages have left."""
    folder: Path
    settings: dict  # see SETTINGS
    preset: Preset
    C: dict[str, int]  # subcomponents, {path: number}
    config: vpd.Config
    model: GPT  # the target
    ids: np.ndarray  # the corpus
    tokenizer: Tokenizer | None  # None: the corpus was given as token ids, without a GPT-2's folder
    record: dict  # of the target's training
    decomposition: vpd.Decomposition | None  # None: before stage 2
    device: str

def load_corpus(data: str, vocabulary: int, place: Path | None) -> tuple[np.ndarray, Tokenizer | None]:
    """Token ids (tokens,) and their tokenizer. data: a text, or a .bin of ids. place: the folder of a run or a GPT-2,
    whose tokenizer is used; a run has the tokens, too. A .bin brings none. Raises BadInput: see the readers."""
    tokenizer = None
    if place and (place / "vocab.json").exists():  # a GPT-2, whose tokenizer.json is of another kind
        tokenizer = gpt2_tokenizer(place)
    elif place and (place / "tokenizer.json").exists() and (place / "settings.json").exists():
        tokenizer = Tokenizer(**json.loads((place / "tokenizer.json").read_text()))
    if data.endswith(".bin"):
        return read_bin(Path(data)), tokenizer
    if place and (place / "tokens.npy").exists():
        return np.load(place / "tokens.npy", mmap_mode="r"), tokenizer
    text = read_text(Path(data)) if data else standard_library()
    if not tokenizer:
        vpd.reject_if(place, f"{place} lacks vocab.json and merges.txt of a GPT-2: give --data FILE.bin")
        tokenizer = Tokenizer.learn(text, vocabulary)
    return tokenizer.encode(text), tokenizer

INPUTS = {"target.pt", "tokenizer.json", "tokens.npy", "settings.json", "run.lock"}  # there before the first stage

def save_inputs(run: Run) -> None:
    """Make the run folder, and keep in it what the run starts from. settings.json, the last, says that all is there."""
    run.folder.mkdir(parents=True, exist_ok=True)
    if run.record:  # --init-from brought the target
        save_target(run.model, run.record, run.folder)
    if run.tokenizer:
        write(run.folder / "tokenizer.json", json.dumps({"merges": run.tokenizer.merges, "gpt2": run.tokenizer.gpt2}))
    if not run.settings["data"].endswith(".bin"):
        with vpd.atomic_write(run.folder / "tokens.npy") as file:
            np.save(file, run.ids)
    write(run.folder / "settings.json", json.dumps(run.settings))

def prepare_run(settings: dict, folder: Path, device: str) -> Run:
    """A run before its stages: what its folder holds is loaded, or else what --init-from holds, or made anew. Raises
    BadInput, and leaves no folder behind, if the settings cannot serve."""
    preset = PRESETS[settings["preset"]]
    batch = settings["batch"] or preset.batch
    n = vpd.world_size()
    vpd.reject_if(batch % n, f"a batch of {batch} does not divide over {n} processes: choose another number")
    begun = (folder / "settings.json").exists()
    source = Path(settings["init_from"]) if settings["init_from"] else None
    place = folder if begun else source
    model, record = load_target(place)
    vpd.reject_if(source and not model, f"{place} is no run with a finished target, and no GPT-2: give another folder")
    shape = model.shape if model else preset.shape
    ids, tokenizer = load_corpus(settings["data"], shape.vocabulary, place)
    context = min(shape.context, preset.shape.context)
    sample(ids, context, 1, True, torch.Generator())  # raises if the corpus is too short
    too_many = model and tokenizer and len(tokenizer.bytes) > shape.vocabulary
    vpd.reject_if(too_many, f"{place}: its tokenizer has more tokens than the model: give its own")
    if not model:
        if settings["data"].endswith(".bin"):
            shape = replace(shape, vocabulary=64 * (int(ids.max()) // 64 + 1))
        torch.manual_seed(settings["seed"])
        model = GPT(shape)
    elif not begun:
        wrong = f"the corpus has the token id {ids.max()}, but the target's vocabulary has {shape.vocabulary}"
        vpd.reject_if(ids.max() >= shape.vocabulary, f"{wrong}: give ids of its own tokenizer")
    preset = replace(preset, shape=replace(shape, context=context), batch=batch)
    C = subcomponents(model, settings["C"])
    config = vpd.sequence_config(model, C, **preset.settings | {"seed": settings["seed"]})
    config = replace(config, steps=settings["steps"] or config.steps)
    run = Run(folder, settings, preset, C, config, model.to(device).eval(), ids, tokenizer, record, None, device)
    if not begun:
        save_inputs(run)
    return run

def open_run(settings: dict, folder: Path, device: str) -> Run:
    """The first two stages of a run. What is already in the folder is loaded, and not computed again. settings: see
    SETTINGS. Raises BadInput: see `prepare_run`."""
    with vpd.rank_0_first():  # the others load what process 0 has saved
        run = prepare_run(settings, folder, device)
    if not run.record:
        run.record = train_target(run)
    preset = run.preset
    out = folder / "decomposition"
    if (folder / "metrics.json").exists():  # finished: read by one process, whatever the number that made it
        run.decomposition = vpd.load_decomposition(out, device)
        return run
    get_batch = functools.partial(sample, run.ids, preset.shape.context, preset.batch // vpd.world_size(), False)
    run.decomposition = vpd.decompose(run.model, run.C, get_batch, vpd.kl, run.config, out, CHECKPOINT_SECONDS)
    return run

def load(folder: str | Path, device: str = "cpu") -> Run:
    """A finished run, to work with in Python: its model, decomposition, tokenizer, corpus (`ids`). Raises BadInput."""
    return open_run(choose_settings({}, Path(folder), reads=True), Path(folder), device)

# ---- The evaluation, stage 3 ----------------------------------------------------------------------------------------
def compute_recovered(curve: list, ce: float) -> float:
    """The share of its training at which the target itself first had this validation cross-entropy ([VPD] section 6).
    Linearly between the best so far at the points of the curve, [(step, cross-entropy), ...]; 0 if it began as good, 1
    if it never was."""
    steps, losses = np.array(curve).T
    best_so_far = np.minimum.accumulate(losses)
    return float(np.interp(-ce, -best_so_far, steps) / steps[-1])

def evaluate(run: Run) -> dict:
    """The third stage: metrics.json, which is returned, and training.png. Adds to `vpd.evaluate` the cross-entropy in
    bits per byte, the compute recovered if the target has a curve, and times."""
    began = time.monotonic()
    preset = run.preset
    curve = run.record["curve"]
    batches = validation_batches(run.ids, preset, run.device)
    metrics = vpd.evaluate(run.model, run.decomposition, batches, vpd.kl, run.config.seed, cross_entropy)
    figures = metrics["figures"]
    ce = figures["loss of the target"]
    if curve:  # empty: the target was trained elsewhere
        for masking in vpd.MASKINGS:
            above = figures[f"loss above target, {masking}"]
            figures[f"compute recovered, {masking}"] = compute_recovered(curve, ce + above)
    if run.tokenizer:
        ids = torch.cat(batches).flatten().tolist()
        lengths = [len(run.tokenizer.bytes[i]) for i in ids if i < len(run.tokenizer.bytes)]  # not of <|endoftext|>
        figures["bits per byte"] = ce / math.log(2) * len(ids) / max(1, sum(lengths))
    figures["parameters of the target"] = sum(x.numel() for x in run.model.parameters())
    log = run.folder / "decomposition" / "log.jsonl"
    seconds = json.loads(log.read_text().splitlines()[-1])["seconds"]
    figures["tokens per second"] = run.config.steps * preset.batch * preset.shape.context / seconds
    figures["minutes, target"] = run.record["seconds"] / 60
    figures["minutes, decomposition"] = seconds / 60
    figures["minutes, evaluation"] = (time.monotonic() - began) / 60
    metrics = run.settings | metrics | {"curve": curve}
    vpd.draw_run(metrics, log, run.folder / "training.png")
    write(run.folder / "metrics.json", json.dumps(metrics, indent=1))  # last: it says that the run is finished
    return metrics

# ---- Reading: the page of all subcomponents -------------------------------------------------------------------------
FIRES = 0.1  # a subcomponent fires where its causal importance exceeds this ([VPD] section 8)
SHOWN = 3000  # subcomponents on the page, an equal share for each matrix: its most important
FLOWS = 18_000  # divided by the number of matrices: so many of all, the clearest, are traced to their sources
EXAMPLES = 10  # of each
AROUND = 12  # tokens on either side of an example
VISIBLE = {i: 0x2400 + i for i in range(32)} | {9: "→", 10: "⏎"}  # signs for control characters

@dataclass
class Reading:
    """What the page and the circuit need of a language model, of any architecture."""
    model: nn.Module  # token ids (B, T) -> logits (B, T, vocabulary)
    decomposition: vpd.Decomposition
    batches: list[Tensor]  # text to read it on, token ids (B, T), all of one shape
    decode: Callable[[list[int]], str]  # token ids -> text
    readout: Tensor | None = None  # (vocabulary, width), what a direction in the residual stream adds to each logit
    writers: tuple[str, ...] = WRITERS  # how the paths of matrices end that write to the residual stream
    embeddings: tuple[str, ...] = ()  # modules that write to it, but are not decomposed

def reading(run: Run) -> Reading:
    """A run, to be read."""
    batches = validation_batches(run.ids, run.preset, run.device)
    def decode(ids):  # without a tokenizer, as numbers
        return run.tokenizer.decode(ids) if run.tokenizer else "".join(f" {i}" for i in ids)
    return Reading(run.model, run.decomposition, batches, decode, readout(run.model), WRITERS, EMBEDDINGS)

def encoded(run: Run, text: str) -> Tensor:
    """A prompt as (1, T) token ids. Raises BadInput if the run has no tokenizer, or the prompt is empty or too long."""
    vpd.reject_if(not run.tokenizer, f"{run.folder} has no tokenizer for prompts: make a run on text, or from a GPT-2")
    ids = run.tokenizer.encode(text).astype(np.int64)
    wrong = f"the prompt {text[:40]!r} has {len(ids)} tokens: this run takes 1 to {run.preset.shape.context}"
    vpd.reject_if(not 1 <= len(ids) <= run.preset.shape.context, wrong)
    return torch.from_numpy(ids)[None].to(run.device)

@torch.no_grad()
def observe(of: Reading) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What every subcomponent does on the N windows: importances and activations, {path: (N, T, C)}. The activation is
    ||U_c|| V_c^T x, signed: how much of its write direction a subcomponent adds."""
    U, V = of.decomposition.U, of.decomposition.V
    g = {path: [] for path in U}
    a = {path: [] for path in U}
    for batch in vpd.with_progress(of.batches, "importances"):
        with vpd.precision(batch.device, of.decomposition.bf16):
            _, inputs = vpd.forward_with_inputs(of.model, U, batch)
            z = of.decomposition.G(inputs, U, V)
            for path, x in vpd.by_path(vpd.causal_importances(z, U), U).items():
                g[path].append(x[..., :-1].half())
                a[path].append((inputs[path] @ V[path] * U[path].norm(dim=-1)).half())
    g = {path: torch.cat(g.pop(path)) for path in U}  # pop: each list is freed
    a = {path: torch.cat(a.pop(path)) for path in U}
    return g, a

def neighbours(ids: Tensor) -> dict[str, Tensor]:
    """The tokens before, at and after every position of ids (N, T); -1 where none is."""
    padded = F.pad(ids, (1, 1), value=-1)
    return {"before": padded[:, :-2], "at": ids, "after": padded[:, 2:]}

def commonest(tokens: Tensor, fires: Tensor) -> list[tuple[int, float]]:
    """The three commonest tokens (N, T), -1 for none, where a subcomponent fires (N, T): [(id, share)]."""
    ids = sorted(tokens[fires & (tokens >= 0)].tolist())  # of equally common ones the smallest come first
    return [(i, n / len(ids)) for i, n in collections.Counter(ids).most_common(3)]

def clearness(tokens: Tensor, usual: Tensor, fires: Tensor) -> float:
    """How clearly tokens (N, T) say where a subcomponent fires (N, T), at most 1: of the positions where it fires, the
    share that has one of the three commonest tokens, less the share of these in all text, `usual` (vocabulary,). Times
    n / (n + 20) for n positions, because chance makes few of them look alike."""
    n = int((fires & (tokens >= 0)).sum())
    return sum(share - usual[i].item() for i, share in commonest(tokens, fires)) * n / (n + 20)

@torch.enable_grad()
def flows(of: Reading, parts: list[tuple[str, int]]) -> dict[str, dict]:
    """How much subcomponents (path, c) add directly to each other's activation, summed over where the target fires, of
    the first SOME tokens ([VPD]'s dataset-aggregated attributions), strongest first: {name: {"sources": [(sum, name)],
    "targets"}}."""
    U = of.decomposition.U
    total = collections.defaultdict(float)  # (path of the source, name of the target) -> (C,)
    some = SOME * 12 // len(U) // of.batches[0].numel()  # SOME for 12 matrices; for more matrices less text
    for batch in vpd.with_progress(of.batches[: max(1, some)], "attributions"):
        _, g = vpd.predict_importances(of.model, of.decomposition, batch)
        _, activations, writes = vpd.cut_forward(of.model, of.decomposition, g, batch)
        for path, c in parts[: FLOWS // len(U)]:
            fires = g[path][..., c] > FIRES
            if fires.any():
                value = activations[path][..., c][fires].sum()
                for source_path, x in vpd.attributions(value, of.decomposition, g, activations, writes).items():
                    total[source_path, f"{path}:{c}"] += x[..., :-1].sum((0, 1))
    edges = []
    for (source_path, target), x in total.items():
        for c in x.abs().topk(min(20, len(x))).indices.tolist():
            edges.append((x[c].item(), f"{source_path}:{c}", target))
    edges.sort(key=lambda edge: -abs(edge[0]))
    strongest = {f"{path}:{c}": {"sources": [], "targets": []} for path, c in parts}
    for x, source, target in edges:
        if source in strongest and x != 0:  # some are not on the page
            strongest[target]["sources"].append((x, source))
            strongest[source]["targets"].append((x, target))
    return strongest

def code(of: Reading, *tokens: int) -> str:
    """Tokens in HTML."""
    return "".join(f"<code>{html.escape(of.decode([i]).translate(VISIBLE))}</code>" for i in tokens)

def examples(of: Reading, ids: Tensor, g: Tensor) -> str:
    """Random places where a subcomponent fires, one a line, in HTML; shaded by its importance g (N, T) there."""
    places = (g > FIRES).nonzero().cpu()
    chosen = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:EXAMPLES]
    lines = []
    for n, t in places[chosen].tolist():
        before = code(of, *ids[n, max(0, t - AROUND) : t].tolist())
        after = code(of, *ids[n, t + 1 : t + 1 + AROUND].tolist())
        token = f'<mark style="--g:{g[n, t].item():.0%}">{code(of, ids[n, t].item())}</mark>'
        lines.append(f"<p><span><bdi>{before}</bdi></span><span>{token}{after}</span></p>")
    return "\n".join(lines)

def entry(of: Reading, path: str, c: int, side: str, seen: tuple, raised: Tensor | None, edges: dict) -> str:
    """A subcomponent on the page, in HTML. side: the neighbour that its line shows; seen: ids (N, T), and g and a of
    `observe`; raised: what its write direction adds to each logit; edges: its sources and targets."""
    ids, g, a = seen
    fires = g[path][..., c] > FIRES
    mean = g[path][..., c].float().mean().item()
    facts = {"fires": f"at {fires.float().mean().item():.2%} of all tokens; mean importance {mean:.2g}"}
    for where, tokens in neighbours(ids).items():
        facts[where] = " ".join(f"{code(of, token)} {share:.0%}" for token, share in commonest(tokens, fires))
    if raised is not None:
        raised = raised * a[path][..., c][fires].float().mean().sign()
        facts["raises"] = " ".join(code(of, token) for token in raised.topk(6).indices.tolist())
        facts["lowers"] = " ".join(code(of, token) for token in raised.neg().topk(6).indices.tolist())
    for end, others in edges.items():
        facts[end] = ", ".join(f'<a href="#{name}">{name}</a> {x:.2g}' for x, name in others[:5]) or "none traced"
    rows = "".join(f"<dt>{title}<dd>{fact}" for title, fact in facts.items())
    lines = examples(of, ids, g[path][..., c])
    inside = f'<div id="{path}:{c}"><dl>{rows}</dl>{lines}</div>'  # the anchor is inside: a link to it opens the entry
    return f"<details><summary><b>{path}:{c}</b>{side} {facts[side]}</summary>{inside}</details>"

def answer(of: Reading, ids: Tensor, shown: dict) -> str:
    """The tokens (1, T) of a prompt with the subcomponents that fire there, in HTML; links to those that are shown."""
    _, g = vpd.predict_importances(of.model, of.decomposition, ids)
    rows = []
    for t, token in enumerate(ids[0].tolist()):
        rows.append(f"<dt>{code(of, token)}<dd>")
        for path, x in g.items():
            fire = (x[0, t, :-1] > FIRES).nonzero()[:, 0].tolist()
            links = " ".join(f'<a href="#{path}:{c}">{c}</a>' if (path, c) in shown else str(c) for c in fire)
            rows.append(f"<span><i>{path}</i> {links}</span> " if fire else "")
    return f"<h2><code>{html.escape(of.decode(ids[0].tolist()))}</code></h2><dl>{''.join(rows)}</dl>"

def report(of: Reading, file: str | Path, prompts: list[Tensor] = ()) -> str:
    """Write a page: what fires on prompts (1, T), and the subcomponents that fire (of each matrix at most SHOWN divided
    by the number of matrices), the clearest first. Returns a line for the terminal."""
    g, a = observe(of)
    ids = torch.cat(of.batches)
    usual = torch.bincount(ids.flatten()) / ids.numel()
    clear = {}  # (path, c) -> (its clearness, by which neighbour)
    for path in vpd.with_progress(g, "subcomponents, by matrix"):
        by_use = g[path].sum((0, 1), dtype=torch.float32).argsort(descending=True, stable=True)
        ever = g[path].amax((0, 1)) > FIRES
        firing = by_use[ever[by_use]]
        for c in firing[: SHOWN // len(g)].tolist():
            fires = g[path][..., c] > FIRES
            clear[path, c] = max((clearness(x, usual, fires), side) for side, x in neighbours(ids).items())
    order = sorted(clear, key=clear.get, reverse=True)
    flow = flows(of, order)
    sections = [answer(of, prompt, clear) for prompt in prompts]
    rows = []
    for path in vpd.with_progress(g, "the page, by matrix"):
        mean = g[path].mean((0, 1), dtype=torch.float32)
        L0 = (g[path] > 0).sum(-1).float().mean().item()
        alive = int((mean > vpd.ALIVE).sum())
        rows.append(f'<tr><td><a href="#{path}">{path}</a><td>{alive}<td>{len(mean)}<td>{L0:.1f}')
        sections.append(f'<h2 id="{path}">{path}</h2>')
        for c in [number for other, number in order if other == path]:
            raised = None
            if of.readout is not None and path.endswith(of.writers):
                raised = of.readout @ of.decomposition.U[path][c].detach()
            _, side = clear[path, c]
            sections.append(entry(of, path, c, side, (ids, g, a), raised, flow[f"{path}:{c}"]))
    head = PAGE.replace("ROWS", "\n".join(rows)).replace("MOST", str(SHOWN // len(g)))
    write(Path(file), head + "\n".join(sections))
    return f"the page of the {len(order)} subcomponents that fire is {file}"

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>The parts of a language model</title><style>
:root { color-scheme: light dark; --ink: light-dark(#222, #ddd); --soft: light-dark(#6d6a65, #a09d98);
  --line: light-dark(#e8e5df, #363532) }
body { font: 17px/1.6 Charter, Georgia, serif; max-width: 46rem; margin: 4rem auto; padding: 0 1rem;
  color: var(--ink); background: light-dark(#fffefb, #1b1b1a); overflow-wrap: break-word }
h1, h2, th, b, i { font-weight: normal; font-style: normal } dd span { margin-right: .8rem }
h1, h2 { line-height: 1.2 } h2 { margin: 3.5rem 0 1rem } h2 code { font-size: 1.2rem }
a { color: light-dark(#1d4f91, #8db8ee); text-decoration: none } a:hover { text-decoration: underline }
table, dd, summary { font-variant-numeric: tabular-nums; border-collapse: collapse }
th, td { text-align: right; padding: .15rem 0 .15rem 1.5rem; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left; padding-left: 0 } th, summary, dt, i { color: var(--soft) }
code { font: .8rem/1.7 ui-monospace, Menlo, monospace; white-space: pre-wrap }
dl code, summary code { display: inline-block; max-width: 8em; overflow: hidden; vertical-align: middle;
  white-space: pre; background: var(--line); color: var(--ink); border-radius: 3px; padding: 0 3px; line-height: 1.4 }
details { border-top: 1px solid var(--line) } details[open] { padding-bottom: 2rem } div { scroll-margin-top: 3rem }
summary { cursor: pointer; padding: .35rem 0; font-size: .9rem } b { color: var(--ink); margin-right: 1rem }
dl { display: grid; grid-template-columns: 4.5rem 1fr; gap: .1rem 1rem; font-size: .9rem } dd { margin: 0 }
details p { display: grid; grid-template-columns: 2fr 3fr; margin: 0 } details p code { white-space: pre }
p span { overflow: hidden; white-space: nowrap } p span:first-child { text-align: right; direction: rtl }
mark { background: color-mix(in srgb, light-dark(#ff9a1f, #a85d00) var(--g), transparent); color: inherit }
</style><h1>The parts of a language model</h1>
<p>Every weight matrix of this model was written as a sum of <em>parts</em>, each of which reads one direction and
writes one. A part is <em>on</em> at a token where its causal importance exceeds 0, and <em>fires</em> where it exceeds
0.1. Those that are off can be taken away there, in any combination, and the prediction hardly changes; L0 is how many
are on at a token. Of those that ever fire here, at most MOST of each matrix follow, first those whose tokens say most
clearly when.</p>
<table><tr><th>matrix<th>alive<th>of<th>L0
ROWS</table>
"""

# ---- Reading: circuits ----------------------------------------------------------------------------------------------
COST = 2e-3  # of a node while pruning, in nats of cross-entropy
PRUNINGS = {  # whether masks are random while pruning, and whether an adversary chooses them
    "importances alone": (False, False), "stochastic": (True, False), "stochastic and adversarial": (True, True)}

def judge(of: Reading, ids: Tensor, g: dict[str, Tensor], loss, movable: Tensor) -> dict[str, float]:
    """How many nodes importances g keep, and the loss (logits -> scalar) of the prediction: with g as masks, with those
    above 0 at 1, and under a fresh adversary that moves what is movable (1, T, K); all else stays random."""
    U, V = of.decomposition.U, of.decomposition.V
    rounded = {path: (x > 0).float() for path, x in g.items()}
    result = {"nodes": sum(int(x.sum()) for x in rounded.values())}
    with torch.no_grad(), vpd.precision(ids.device, of.decomposition.bf16):
        result["g as masks"] = loss(vpd.masked_forward(of.model, U, V, g, ids)).item()
        result["rounded"] = loss(vpd.masked_forward(of.model, U, V, rounded, ids)).item()
    case = (ids, None, g)  # the loss needs no target
    attack = vpd.fresh_adversary(of.model, of.decomposition, [case], lambda _, x: loss(x), ids.shape, movable)
    return result | {f"attack {steps}": attack[steps] for steps in (20, 40, 80)}

def circuit(of: Reading, ids: Tensor, token: int | None = None) -> dict:
    """Prune in three ways to what predicts a token after ids (1, T), by default the target's best; judge each, and take
    the attribution graph of the last. A dict for JSON."""
    target, g = vpd.predict_importances(of.model, of.decomposition, ids)
    token = int(target[0, -1].argmax()) if token is None else token
    def loss(logits):
        return F.cross_entropy(logits[:, -1].float(), torch.tensor([token], device=ids.device))
    def outcome(logits):
        return logits[0, -1, token] - logits[0, -1].mean()  # the mean, because the softmax ignores it
    active = vpd.side_by_side(g) > 0
    prunings = {"not pruned": judge(of, ids, g, loss, active)}
    for name, (stochastic, adversarial) in PRUNINGS.items():
        pruned = vpd.prune(of.model, of.decomposition, g, ids, loss, COST, stochastic, adversarial)
        prunings[name] = judge(of, ids, pruned, loss, active)
    graph = vpd.attribution_graph(of.model, of.decomposition, pruned, ids, outcome, of.embeddings, share=0.005)
    return {"token": token, "ids": ids[0].tolist(), "target": loss(target).item(),
            "prunings": prunings, "pruned_graph": graph}

def draw_circuit(of: Reading, result: dict, file: Path) -> None:
    """The attributions of a `circuit` with over 5 % of all into their target. Positions across, matrices up; a part is
    its number, an embedding or the outcome an empty box."""
    nodes = result["pruned_graph"]["nodes"]
    edges = [edge for edge in result["pruned_graph"]["edges"] if edge["share"] > 0.05]
    texts = [repr(of.decode([i])) for i in result["ids"]]
    rows = list(dict.fromkeys(node["matrix"] for node in nodes))  # in the order in which they run
    cells = collections.defaultdict(list)  # (matrix, position) -> its nodes
    for n in sorted({edge["source"] for edge in edges} | {edge["target"] for edge in edges}):
        cells[nodes[n]["matrix"], nodes[n]["position"]].append(n)
    across = max(1.5, 0.18 * max((len(inside) for inside in cells.values()), default=0))  # inches of a position
    figure = matplotlib.figure.Figure((max(7, across * len(texts)), 1 + 0.45 * len(rows)), layout="constrained")
    axis = figure.subplots()
    place = {}  # of each node
    for (path, position), inside in cells.items():
        row = rows.index(path)
        for i, n in enumerate(inside):  # side by side within the cell; many in two lines
            line = 0.5 * (i % 2 - 0.5) if len(inside) > 4 else 0
            place[n] = (position + 0.8 * ((i + 0.5) / len(inside) - 0.5), row + line)
            number = nodes[n]["subcomponent"] if path in of.decomposition.U else " "
            box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "gray"}
            axis.text(*place[n], number, fontsize=7, ha="center", va="center", bbox=box, zorder=2)
    for edge in edges:
        colour = "#1f6fb4" if edge["attribution"] > 0 else "#c85200"
        ends = zip(place[edge["source"]], place[edge["target"]])  # both x, both y
        axis.plot(*ends, color=colour, linewidth=0.3 + 5 * edge["share"], alpha=0.6, zorder=1)
    rows[-1] = f"outcome: {of.decode([result['token']])!r}"
    axis.set_xticks(range(len(texts)), texts, parse_math=False)  # a dollar is a dollar
    axis.set_yticks(range(len(rows)), rows, parse_math=False)
    axis.set(xlabel="position", title="what each part that is left gets from others (blue raises it, orange lowers it)")
    figure.savefig(file, dpi=110)

def circuits(run: Run, prompts: list[str], token_text: str | None) -> str:
    """For every prompt circuit.json and circuit.png (numbered from the second on), of `circuit` and its graph.
    Returns tables of the prunings. Raises BadInput if the token is more than one; see `encoded`."""
    inputs = [encoded(run, prompt) for prompt in prompts]
    token = None
    if token_text is not None:
        token, *more = encoded(run, token_text)[0].tolist()
        vpd.reject_if(more, f"{token_text!r} is not one token but {1 + len(more)}: give one")
    of = reading(run)
    lines = []
    for number, ids in vpd.with_progress(enumerate(inputs, 1), "circuits"):
        result = circuit(of, ids, token)
        file = run.folder / ("circuit" if number == 1 else f"circuit_{number}")
        write(file.with_suffix(".json"), json.dumps(result))
        draw_circuit(of, result, file.with_suffix(".png"))
        prompt = of.decode(result["ids"])
        predicted = of.decode([result["token"]])
        target = f"cross-entropy of the target {result['target']:.3f}"
        lines.append(f"{prompt!r}, then {predicted!r}: {target}; that of what pruning leaves (the last is drawn):")
        lines.append(" " * 27 + "".join(f"{column:>12s}" for column in result["prunings"]["not pruned"]))
        for name, judged in result["prunings"].items():
            lines.append(f"{name:27s}" + "".join(f"{x:12.4g}" for x in judged.values()))
    return "\n".join([*lines, f"pictures and graphs are in {run.folder}/circuit*"])

# ---- The command line -----------------------------------------------------------------------------------------------
def choose_settings(given: dict, folder: Path, reads: bool = False) -> dict:
    """The settings of the run in the folder, or of a new one. given: those on the command line. Raises BadInput if they
    cannot serve, or if the folder holds something else than is asked for."""
    finished = (folder / "metrics.json").exists()
    vpd.reject_if(reads and not finished, f"{folder} holds no finished decomposition: give the folder of one to --out")
    limits = {"seed": (0, 10**9 - 1), "steps": (1, 10**9), "batch": (1, 10**6), "C": (0.001, 100)}
    for name, (least, most) in limits.items():
        value = given.get(name, least)
        vpd.reject_if(not least <= value <= most, f"--{name} is {value}: give {least} to {most}")
    for name in {"data", "init_from"} & given.keys():  # the command may be repeated from another folder
        given[name] = str(Path(given[name]).expanduser().resolve())
    settings = given if reads else SETTINGS | given
    source = Path(given.get("init_from", folder)) / "settings.json"
    if "init_from" in given and source.exists():
        brings = "a run given to --init-from brings its preset and data: leave out --preset and --data"
        vpd.reject_if({"preset", "data"} & given.keys(), brings)
        of_source = json.loads(source.read_text())
        settings |= {"preset": of_source["preset"], "data": of_source["data"]}
    if (folder / "settings.json").exists():
        own = json.loads((folder / "settings.json").read_text())
        differ = ", ".join(f"--{name.replace('_', '-')}" for name in settings if settings[name] != own[name])
        vpd.reject_if(differ, f"{folder} was made with another {differ}: give its own, or choose another --out")
        return own
    inside = {file.name.removesuffix(".unfinished") for file in folder.glob("*")}
    # a kill may have come while process 0 wrote its inputs; the others may find what it is just making there
    taken = vpd.rank() == 0 and inside - INPUTS
    vpd.reject_if(taken, f"{folder} holds something else than a run: choose another folder with --out")
    return settings

def choose_precision(device: str) -> None:
    """On a CPU with AVX-512 bfloat16, let oneDNN multiply: on some AMD EPYC twice as fast, and still in float32. Not if
    there is AMX, which may round the factors to bfloat16 (nobody has measured it). For this process: only a command
    calls it."""
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch < 2.10 has none
    exact = features.get("avx512_bf16") and not features.get("amx_tile")
    if device == "cpu" and exact and torch.backends.cpu.get_cpu_capability() == "AVX512":
        torch.set_float32_matmul_precision("medium")
        torch.backends.cuda.enable_flash_sdp(False)  # the CPU's, too: with oneDNN ten times slower

def start_process(device: str) -> str:
    """Make this process ready, under torchrun one of several. Returns its device. Raises BadInput if there is none."""
    local_rank = os.environ.get("LOCAL_RANK")  # set by torchrun
    try:
        if device == "cuda" and local_rank:
            device = f"cuda:{local_rank}"
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise vpd.BadInput(f"there is no device {device!r} here: give --device cpu, or leave it out") from None
    if local_rank:
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    choose_precision(device)
    vpd.keep_memory()
    return device

def command(options: argparse.Namespace) -> None:
    """Make a run, go on with one, or read one. Raises BadInput."""
    reads = options.report is not None or options.circuit is not None
    vpd.reject_if(options.token is not None and options.circuit is None, "--token needs --circuit PROMPT to explain")
    vpd.reject_if(reads and "LOCAL_RANK" in os.environ, "a run is read by one process: leave out torchrun")
    given = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    folder = (options.out or Path("runs") / given.get("preset", SETTINGS["preset"])).expanduser()
    device = start_process(options.device)
    with vpd.rank_0_first():
        settings = choose_settings(given, folder, reads)
    if reads:
        run = open_run(settings, folder, device)
        if options.circuit:
            print(circuits(run, options.circuit, options.token))
        if options.report is not None:
            prompts = [encoded(run, prompt) for prompt in options.report]
            print(report(reading(run), folder / "report.html", prompts))
        return
    if not (folder / "metrics.json").exists():
        with vpd.own_folder(folder, "run.lock"):
            run = open_run(settings, folder, device)
            if vpd.rank() == 0:
                evaluate(run)
    if vpd.rank() == 0:
        metrics = json.loads((folder / "metrics.json").read_text())
        print(f"{vpd.table(metrics)}\n{vpd.verdict(metrics)}\nmetrics.json and training.png are in {folder}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

def main() -> None:
    """The command line; see the top of this file."""
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a sign must not end a run
    best_device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="default: laptop; gpu and paper are for GPUs")
    add("--data", help="a UTF-8 text, or FILE.bin of token ids (default: the source of Python's standard library)")
    add("--init-from", metavar="FOLDER", help="decompose the target of this run, or a GPT-2 as downloaded")
    add("--steps", type=int, help="of the decomposition (default: the preset's)")
    add("--batch", type=int, help="windows in a step, of all processes together (default: the preset's)")
    add("--C", type=float, metavar="FACTOR", help="this many times 0.7 (d_in + d_out) subcomponents (default: 1)")
    add("--seed", type=int, help="of the target and the decomposition (default: 0)")
    add("--out", type=Path, help="run folder (default: runs/PRESET)")
    add("--device", default=best_device, help="cpu, cuda or mps (default: the best there is)")
    add("--report", nargs="*", metavar="PROMPT", help="read the run: write report.html, a page of its subcomponents")
    add("--circuit", nargs="+", metavar="PROMPT", help="read the run: what makes the prediction after each prompt")
    add("--token", help="with --circuit: the token to explain (default: what the target predicts)")
    try:
        command(parser.parse_args())
    except (vpd.BadInput, OSError, UnicodeError) as error:
        sys.exit(f"error: {error}")

if __name__ == "__main__":
    main()
