"""SCOTT (a sparse convolutional tokenizer for transformers) and MIM-JEPA (masked image modelling in feature
space): a vision transformer that learns from a few thousand unlabelled images.

    Vélez-García, Cazorla, Pomares, "Escaping The Big Data Paradigm in Self-Supervised Representation
    Learning", arXiv 2502.18056. "The paper", below, is this one.

The whole model, in the order in which an image passes through it:

    view 1 ─ Encoder (Tokenizer ─ Blocks) ─────── Predictor ─┐
             sees the visible part                           ├─ loss, on the hidden part only
    view 2 ─ Encoder (the same, averaged weights) ───────────┘
             sees everything

A *view* is a crop of a picture. Both views are the same crop, in other colours. The *context encoder* sees
a part of it, the *target encoder* all of it. A small *predictor* takes what the context encoder says and
guesses, for each hidden place, what the target encoder says there: a vector of features, not pixels. So it
helps little to get the texture of fur right. It helps to know what goes with pointed ears: a tail, perhaps.

Letters used for sizes:

    B  images in a batch                 N = g²  tokens of an image (196)
    H  side of the square image (224)    D       width: channels of a token (384)
    g = H/16  tokens along a side (14)

`visible` [B, N] is True where the context encoder may look. `python scott.py` shows a batch on its way.
"""

import math
import random
import zipfile
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

PATCH = 16  # pixels along the side of the cell that one token stands for

class InputError(ValueError):
    """Something that the user can put right. Its text is one line: what is wrong, and what to do."""

# ---- Config ------------------------------------------------------------------------------------------------

def count_visible(tokens, mask_ratio):
    """How many of an image's tokens stay visible: ⌈(1 − mask_ratio) · N⌉, and at least one."""
    # The 1e-9 keeps rounding from adding a token: in floating point (1 − 0.7) · 100 is a little more than 30.
    return max(1, math.ceil((1 - mask_ratio) * tokens - 1e-9))

@dataclass(frozen=True)
class Config:
    """Sizes, dropout and masking: by default the paper's. InputError names a value that cannot work."""

    image_size: int = 224  # H, pixels
    dim: int = 384  # D
    depth: int = 12  # blocks of the encoder
    heads: int = 4  # attention heads, in encoder and predictor alike
    predictor_depth: int = 3  # blocks of the predictor
    tokenizer: str = "scott"  # masked convolutions; to compare: "dense" (masked once), "patch" (a plain ViT)
    dropout: float = 0.2  # after adding positions, and on what attention adds to the tokens
    attention_dropout: float = 0.1  # on the attention weights
    drop_path: float = 0.1  # chance to skip a branch of the last block; rises in a line from 0 at the first
    mask_ratio: float = 0.6  # share of the tokens that is hidden from the context encoder
    masking: str = "block"  # "block": the visible part is made of rectangles; "random": of single tokens

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            fits = type(value) is kind or (kind is float and type(value) is int)
            self.require(field.name, fits, f"of type {kind.__name__}")
        self.between(1, 8192, "depth", "heads", "predictor_depth")
        self.between(0, 0.999, "dropout", "attention_dropout", "drop_path", "mask_ratio")
        self.require("image_size", self.image_size in range(32, 8193, PATCH), "a multiple of 16 from 32 up")
        widths = range(math.lcm(4, self.heads), 8193, math.lcm(4, self.heads))
        self.require("dim", self.dim in widths, f"divisible by 4 and by heads ({self.heads})")
        self.require("tokenizer", self.tokenizer in ("scott", "dense", "patch"), "scott, dense or patch")
        self.require("masking", self.masking in ("block", "random"), "block or random")
        hidden = self.tokens - count_visible(self.tokens, self.mask_ratio)
        self.require("mask_ratio", hidden >= 1, f"large enough to hide one of {self.tokens} tokens")

    def require(self, name, holds, must_be):
        if not holds:
            raise InputError(f"{name} is {getattr(self, name)!r}, it must be {must_be}")

    def between(self, least, most, *names):
        for name in names:
            self.require(name, least <= getattr(self, name) <= most, f"from {least} to {most}")

    @property
    def grid(self):  # g, tokens along a side of the image
        return self.image_size // PATCH

    @property
    def tokens(self):  # N
        return self.grid**2

# ---- Masks: what the context encoder may see ---------------------------------------------------------------

def sample_masks(batch, grid, mask_ratio=0.6, masking="block", generator=None):
    """Draw a fresh mask for every image: bool [batch, grid²], True = visible, the same number in each row.

    "block" lays rectangles of random size and shape on the grid until enough is visible. The hidden part is
    then mostly made of large connected pieces. Continuing the texture next door does not tell what is in
    them: the model has to know what it looks at. "random" picks single tokens. InputError if none can be.
    generator: a CPU torch.Generator; None uses torch's global one.
    """
    count = count_visible(grid**2, mask_ratio)
    if masking not in ("block", "random") or grid < 2 or count > grid**2:
        raise InputError(f"no {masking!r} mask for grid {grid} and mask_ratio {mask_ratio}: see Config")
    if masking == "random":
        rank = torch.rand(batch, grid**2, generator=generator).argsort(dim=1)  # each row: 0 … N − 1, shuffled
        return rank < count
    # Rectangles are drawn one number at a time. Python's own generator makes no tensor for each of them.
    rng = random.Random(torch.randint(2**62, (), generator=generator).item())
    masks = np.stack([block_mask(grid, count, rng) for _ in range(batch)])  # [B, g, g]
    return torch.from_numpy(masks).flatten(1)

def block_mask(grid, count, rng):
    """One mask, a union of rectangles with exactly `count` visible cells: bool array [grid, grid].

    Before rounding, a rectangle has 16 cells or more (at last what is missing), and sides of at most 1 : 3.3.
    """
    visible, missing = np.zeros((grid, grid), dtype=bool), count
    # A side is at most grid − 1: on the smallest grids 16 cells may not fit, and the loop would not end.
    smallest = min(16, (grid - 1) ** 2)
    while missing > 0:
        area = rng.uniform(min(smallest, missing), max(16, missing))
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= grid or width >= grid:
            continue
        top, left = int(rng.random() * (grid - height + 1)), int(rng.random() * (grid - width + 1))
        rectangle = visible[top : top + height, left : left + width]  # a view: writing here changes the mask
        new = rectangle.size - np.count_nonzero(rectangle)
        if 0 < new <= missing:  # never too many: every image gets the same number of visible tokens
            rectangle[:] = True
            missing -= new
    return visible

# ---- Tokenizer: convolutions that cannot see what is hidden ------------------------------------------------

def hide(x, visible):
    """Set a feature map to zero wherever its cell is hidden. visible=None leaves it as it is.

    x [B, C, S, S] with S its side, visible bool [B, 1, g, g] with g a divisor of S  →  [B, C, S, S]
    """
    if visible is None:
        return x
    cell = x.shape[-1] // visible.shape[-1]  # pixels of this feature map along the side of one token's cell
    visible = visible[:, :, :, None, :, None].expand(-1, -1, -1, cell, -1, cell)  # [B, 1, g, cell, g, cell]
    return torch.where(visible.flatten(4).flatten(2, 3), x, 0)  # not x · visible: 0 · NaN is NaN

class MaskedConv2d(nn.Conv2d):
    """A convolution that forgets what it smeared across the mask.

    At the mask's edge a 7×7 kernel mixes visible pixels into hidden places. If that stayed there, the next
    layer would take it for something seen and mix it back into visible places; layer by layer the hole would
    fill up. So every output in a hidden place is set to zero again: the hole keeps its exact shape. The idea
    is submanifold sparse convolution (Graham et al. 2017), with dense kernels as in SparK (Tian et al. 2023).

    x [B, C, S, S], visible [B, 1, g, g] or None  →  [B, C', S/2, S/2]
    """

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x, visible=None):
        return hide(super().forward(x), visible)

class MaskedMaxBlurPool(nn.Module):
    """Halve a feature map: the maximum of each 2×2 window, then a blur, of which every second pixel is kept.

    The blur makes the result change less when the image moves by one pixel (Zhang 2019, "Making
    Convolutional Networks Shift-Invariant Again"). Both steps look past the mask's edge, so `hide` again.

    x [B, C, S, S], visible [B, 1, g, g] or None  →  [B, C, S/2, S/2]
    """

    def __init__(self, most_channels):
        super().__init__()
        blur = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16  # fixed: neither learned nor saved
        self.register_buffer("blur", blur.repeat(most_channels, 1, 1, 1), persistent=False)  # one a channel

    def forward(self, x, visible=None):
        x = F.max_pool2d(x, kernel_size=2, stride=1)  # [B, C, S-1, S-1]
        x = F.conv2d(x, self.blur.to(x.dtype)[: x.shape[1]], stride=2, padding=1, groups=x.shape[1])
        return hide(x, visible)  # [B, C, S/2, S/2]

class Tokenizer(nn.Module):
    """Turn an image into N tokens. Each has D features of one 16×16 px cell and of what lies around it.

    A plain ViT ("patch") maps each patch by one big matrix. It has to learn from data that neighbouring
    pixels belong together, and a few thousand images cannot teach that. Two stages of convolution and pooling
    ("scott") have it built in. But overlapping kernels carry hidden pixels into visible tokens (*peeking*),
    and fill the hole from its rim, which reaches visible tokens in the next layer (*filling*). Masking the
    image stops the first, masking each layer the second.

    images [B, 3, H, H], visible bool [B, N] or None (everything is visible)  →  [B, N, D]
    Hidden places come out as zeros ("scott"), as filled from their rim ("dense": masked once, to compare
    with), or as if nothing were hidden ("patch": no kernel overlaps; Encoder then replaces them).
    """

    def __init__(self, config):
        super().__init__()
        self.kind = config.tokenizer
        if self.kind == "patch":
            self.conv = nn.Conv2d(3, config.dim, kernel_size=PATCH, stride=PATCH)
            nn.init.kaiming_normal_(self.conv.weight)
        else:
            self.conv1, self.conv2 = MaskedConv2d(3, 64), MaskedConv2d(64, config.dim)
            self.pool1 = self.pool2 = MaskedMaxBlurPool(max(64, config.dim))  # nothing to learn: one for both

    def forward(self, images, visible=None):
        B, H = len(images), images.shape[-1]
        if images.shape != (B, 3, H, H) or H % PATCH or H < 2 * PATCH:
            raise InputError(f"images are {tuple(images.shape)}, they must be [B, 3, H, H], H = 32, 48, 64 …")
        grid = H // PATCH
        if visible is not None and (visible.shape != (B, grid**2) or visible.dtype != torch.bool):
            raise InputError(f"visible is {visible.dtype} {[*visible.shape]}, it must be bool {[B, grid**2]}")
        # Convolutions are fastest in this order, with channels last; pools on MPS crash in it.
        x = images if images.device.type == "mps" else images.contiguous(memory_format=torch.channels_last)
        if self.kind == "patch":
            x = self.conv(x)  # [B, D, g, g]
        else:
            if visible is not None:
                visible = visible.view(-1, 1, grid, grid)
            x = hide(x, visible)  # [B, 3, H, H]: no hidden pixel gets past this line, so no layer can peek
            if self.kind == "dense":
                visible = None  # for comparison: ordinary convolutions from here on; the hole fills
            x = F.relu(self.conv1(x, visible))  # [B, 64, H/2, H/2]
            x = self.pool1(x, visible)  # [B, 64, H/4, H/4]
            x = F.relu(self.conv2(x, visible))  # [B, D, H/8, H/8]
            x = self.pool2(x, visible)  # [B, D, g, g]
        return x.flatten(2).transpose(1, 2)  # [B, N, D], row by row

# ---- Transformer blocks ------------------------------------------------------------------------------------

def position_embedding(grid, dim):
    """Fixed 2-D sine-cosine positions, float [grid², dim]: half the channels tell the row, half the column.

    Each half is [sin(p·ω), cos(p·ω)] with ω_k = 10000^(−k/(dim/4)), k = 0 … dim/4 − 1: no weights.
    """
    n = dim // 4
    exponents = torch.linspace(0, (1 / n - 1) * math.log(10000), n, dtype=torch.float64)
    angles = torch.arange(grid)[:, None] * exponents.exp()  # p·ω: [g, D/4]
    line = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # [g, D/2], the places along one axis
    rows, columns = line[:, None].expand(-1, grid, -1), line.expand(grid, -1, -1)  # [g, g, D/2] each
    return torch.cat([rows, columns], dim=2).flatten(0, 1)

def layer_norm(x):
    """LayerNorm over the channels, no weight, no bias, eps 1e-5: every token gets mean 0 and variance 1."""
    return F.layer_norm(x, x.shape[-1:])

def init_linear(module):
    """First weights of a Linear: truncated normal with standard deviation 0.02; its bias, if any, 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

def attend(q, k, v, dropout):
    """softmax(q kᵀ / √d) v; dropout: 0 outside training.  Each [B, heads, N, d = D/heads] → like q"""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # the GPU's single fused kernel
    # On a CPU the plain form is faster: up to 10 times in bf16, with so few tokens.
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=3)  # [B, heads, N, N]
    return F.dropout(weights, dropout) @ v

class Attention(nn.Module):
    """Multi-head self-attention: each token gathers what it needs from all tokens.  [B, N, D] → [B, N, D]"""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.attention_dropout = config.attention_dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.proj = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        x = attend(q, k, v, self.attention_dropout if self.training else 0.0)  # [B, heads, N, D/heads]
        x = x.transpose(1, 2).reshape(B, N, D)
        return self.dropout(self.proj(x))

class SwiGLU(nn.Module):
    """The feed-forward layer: W₃(silu(a) · b) with [a, b] = W₁₂ x (Shazeer 2020).  [..., D] → [..., D]"""

    def __init__(self, dim):
        super().__init__()
        # About 8D/3 channels: three matrices then cost what two of 4D would. GPUs like multiples of 128.
        hidden = 128 * max(1, round(8 * dim / 3 / 128))
        self.w12 = nn.Linear(dim, 2 * hidden, bias=False)
        self.w3 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)

class Block(nn.Module):
    """One transformer block.  [B, N, D] → [B, N, D]

    Attention and feed-forward layer are branches: each adds to the residual stream x that passes by them.
    In most transformers each LayerNorm stands on a branch. Here the second one stands on the stream itself: x
    is normalised, *then* the feed-forward layer adds to it. So x cannot pile up.
    number: which block this is, 1 to depth. It sets the drop-path rate and the scale of the first weights.
    """

    def __init__(self, config, number, depth):
        super().__init__()
        self.attention = Attention(config)
        self.mlp = SwiGLU(config.dim)
        # In training, drop the whole branch for some samples, and scale it up for the others.
        self.drop_path = StochasticDepth(config.drop_path * (number - 1) / max(1, depth - 1), mode="row")
        self.apply(init_linear)
        self.shrink(number)  # each block adds to the stream twice: at first, deeper blocks add less

    @torch.no_grad()
    def shrink(self, number):
        self.attention.proj.weight /= math.sqrt(2 * number)
        self.mlp.w3.weight /= math.sqrt(2 * number)

    def forward(self, x):
        x = x + self.drop_path(self.attention(layer_norm(x)))
        x = layer_norm(x)
        return x + self.drop_path(self.mlp(x))

# ---- Encoder -----------------------------------------------------------------------------------------------

class Encoder(nn.Module):
    """Tokenizer and transformer. Context and target encoder are both of this class; you keep one of them.

    images [B, 3, H, H], visible bool [B, N] or None  →  [B, N, D]. There is no class token and no final norm:
    features for other tasks are `layer_norm` of these tokens.

    The transformer always sees N tokens. Hidden places carry a learned mask token plus their position (as in
    BEiT): the encoder knows *where* something is missing, and shapes never change. H may be any multiple of
    16 from 32 up, whatever size the encoder was trained at: 448 px give 28² tokens instead of 14².
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(config)
        self.mask_token = nn.Parameter(torch.empty(config.dim))
        nn.init.trunc_normal_(self.mask_token, std=1e-6)  # at first a hidden place only says where it is
        self.register_buffer("positions", position_embedding(config.grid, config.dim), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i + 1, config.depth) for i in range(config.depth))

    def forward(self, images, visible=None):
        x = self.tokenizer(images, visible)  # [B, N, D]
        if visible is not None:
            x = torch.where(visible[:, :, None], x, self.mask_token.to(x.dtype))  # whatever stands there
        positions = self.positions  # [N, D]
        if positions.shape != x.shape[1:]:  # the images have another size
            positions = position_embedding(images.shape[-1] // PATCH, x.shape[2]).to(positions)
        x = self.dropout(x + positions.to(self.mask_token.dtype))
        for block in self.blocks:
            x = block(x)
        return x

# ---- Predictor ---------------------------------------------------------------------------------------------

class Predictor(nn.Module):
    """Guess the target encoder's tokens from the context encoder's.  [B, N, D] → [B, N, D]

    It is thrown away after training. It has a quarter of the encoder's blocks, which have to do the work.
    """

    def __init__(self, config):
        super().__init__()
        self.register_buffer("positions", position_embedding(config.grid, config.dim), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        numbers = range(1, config.predictor_depth + 1)
        self.blocks = nn.ModuleList(Block(config, number, len(numbers)) for number in numbers)
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.dim)
        # Scaled twice, as the authors do: in Block by number 1, 2, 3, here by number in the whole chain.
        for number, block in enumerate(self.blocks, start=config.depth + 1):
            block.shrink(number)

    def forward(self, tokens):
        if tokens.shape[1:] != self.positions.shape:
            raise InputError(f"tokens are {[*tokens.shape]}, they must be [B] + {[*self.positions.shape]}")
        x = self.dropout(tokens + self.positions)  # again: a guess depends on the place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(F.silu(x)))  # the SiLU before the norm is the paper's

# ---- Loss and model ----------------------------------------------------------------------------------------

def jepa_loss(prediction, target, visible):
    """How far the prediction is from the target, in feature space and at the hidden places only.  → scalar

    Smooth-L1 (β = 1), mean over the D channels and the hidden tokens of an image, then over the batch.
    Visible places do not count: the context encoder saw them, so matching them would teach it to copy.

    prediction, target [B, N, D]; visible bool [B, N], with at least one hidden token in each image.
    """
    shapes = tuple(prediction.shape), tuple(target.shape), tuple(visible.shape)
    if shapes[0] != shapes[1] or shapes[2] != shapes[0][:2] or visible.dtype != torch.bool:
        raise InputError(f"shapes are {shapes} ({visible.dtype}), must be [B, N, D] twice and bool [B, N]")
    error = F.smooth_l1_loss(prediction.float(), target.float(), reduction="none").mean(dim=2)  # [B, N]
    # As float the count is kept for the backward pass; compiled, an integer one would be computed again.
    return (torch.where(visible, 0, error).sum(dim=1) / (~visible).float().sum(dim=1)).mean()

@torch.no_grad()
def target_deviation(target):
    """target_std, to notice collapse: the deviation over the images, mean over places and channels.  → scalar

    target [B, N, D]: normalised tokens of two images or more. At 0 the encoder says the same of every image.
    In training it dips while the learning rate climbs, then stays at 0.6 to 0.9; below 0.1 is a collapse.
    """
    return target.float().std(dim=0).mean()

class MIMJEPA(nn.Module):
    """Masked image modelling with a joint-embedding predictive architecture: the parts tied together.

    If both encoders said the same about every image, the loss could be zero: they would have *collapsed*.
    With bad settings that happens: `target_deviation` shows it. Three things prevent it in practice. No
    gradient reaches the target encoder, so the loss cannot push it to a constant. And the target encoder
    follows slowly, as a moving average (EMA) of the context encoder's weights: to agree with something that
    hardly moves, one has to predict it. The targets' LayerNorm rules out the easiest way: to shrink them.
    """

    def __init__(self, config):
        super().__init__()
        self.context_encoder = Encoder(config)
        self.predictor = Predictor(config)
        self.target_encoder = Encoder(config)
        self.target_encoder.load_state_dict(self.context_encoder.state_dict())  # starts as a copy
        self.target_encoder.requires_grad_(False).eval()

    def train(self, mode=True):
        """As usual, but the target encoder stays in eval mode: dropout would add noise to the targets."""
        super().train(mode)
        self.target_encoder.eval()
        return self

    def forward(self, context_images, target_images, visible, return_target=False):
        """The loss of one batch: two views [B, 3, H, H], same crops, and the mask [B, N] of the first. With
        return_target=True also the target tokens [B, N, D], to watch them for collapse."""
        with torch.no_grad():
            target = layer_norm(self.target_encoder(target_images))  # [B, N, D], from the whole image
        context = self.context_encoder(context_images, visible)  # [B, N, D], from the visible part
        loss = jepa_loss(self.predictor(context), target, visible)
        return (loss, target) if return_target else loss

    @torch.no_grad()
    def update_target(self, momentum):
        """After each optimiser step, for all parameters: target ← m · target + (1 − m) · context."""
        targets, contexts = list(self.target_encoder.parameters()), list(self.context_encoder.parameters())
        torch._foreach_lerp_(targets, contexts, 1 - momentum)  # target.lerp_(context, 1 − m), for all at once

# ---- Using a trained encoder -------------------------------------------------------------------------------

FORMAT = "scott-mim-jepa 5"  # what a checkpoint of this code says it is

def load_checkpoint(path):
    """Read what train.py saved: a dict of tensors and plain types. InputError if it is anything else."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not look at the checksums
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        # A full unpickling would run code from the file: `weights_only` makes a stranger's checkpoint safe.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # a damaged file can lead the unpickler to any error
        raise InputError(f"{path} is damaged, or not a checkpoint of train.py") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of this version of train.py")
    return checkpoint

def load_encoder(checkpoint, which="context", device="cpu"):
    """A trained encoder, in eval mode and without gradients, for images normalised as train.py does.
    checkpoint: a path, or what load_checkpoint returned. InputError if it does not hold such an encoder."""
    if which not in ("context", "target"):
        raise InputError(f"which is {which!r}, it must be 'context' or 'target'")
    saved = checkpoint if isinstance(checkpoint, dict) else load_checkpoint(checkpoint)
    prefix = f"{which}_encoder."
    try:
        encoder = Encoder(Config(**{field.name: saved["recipe"][field.name] for field in fields(Config)}))
        weights = {n.removeprefix(prefix): w for n, w in saved["model"].items() if n.startswith(prefix)}
        encoder.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError):
        raise InputError("the checkpoint does not hold the encoder that its recipe describes") from None
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise InputError("some of the checkpoint's weights are not finite: its training has failed")
    return encoder.to(device).requires_grad_(False).eval()

# ---- A demonstration: one step of training, on noise -------------------------------------------------------

def show(stage, tensor, about):
    print(f"{stage:15} {str([*tensor.shape]):15} {about}")

if __name__ == "__main__":
    torch.manual_seed(0)
    model = MIMJEPA(Config(image_size=96, dim=64, depth=2, dropout=0, attention_dropout=0, drop_path=0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    images, visible = torch.randn(8, 3, 96, 96), sample_masks(8, grid=6)
    show("images", images, "noise; both views are the same here")
    rows = ["".join("#" if cell else "." for cell in row) for row in visible[0].view(6, 6).tolist()]
    show("visible", visible, f"{visible[0].sum()} of 36 tokens; in the first image: {' '.join(rows)}")
    tokens = model.context_encoder.tokenizer(images, visible)
    show("tokens", tokens, f"largest number in a hidden place: {tokens[~visible].abs().max():g}")
    context = model.context_encoder(images, visible)
    show("context", context, "in all places: the hidden ones carry the mask token")
    show("prediction", model.predictor(context), "the guess, for every place")
    loss, target = model(images, images, visible, return_target=True)
    show("target", target, f"the answer, from the whole image; target_std {target_deviation(target):.2f}")
    loss.backward()
    optimizer.step()
    after = model(images, images, visible)
    show("loss", loss, f"{loss:.2f}, over the hidden places; {after:.2f} after one gradient step")
    model.update_target(momentum=0.996)  # and the target encoder follows
