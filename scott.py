"""SCOTT (a sparse convolutional tokenizer for transformers) and MIM-JEPA (masked image modelling in feature
space): a vision transformer that learns from a few thousand unlabelled images.

    Vélez-García, Cazorla, Pomares, "Escaping The Big Data Paradigm in Self-Supervised Representation
    Learning", arXiv 2502.18056. "The paper", below, is this one.

The whole model, in the order in which an image passes through it:

    view 1 ─ Encoder (Tokenizer ─ Blocks) ─────── Predictor ─┐
             sees the visible part                           ├─ loss, on the hidden part only
    view 2 ─ Encoder (the same, averaged weights) ───────────┘
             sees everything

Two networks look at one picture, in two colourings. The *context encoder* gets to see 40 % of it; a small
*predictor* then guesses, for each hidden place, what the *target encoder*, which saw all, says about it. The
guess is not pixels but a vector of features. So there is nothing to gain from getting the texture of fur
right, and much from knowing that what has pointed ears and whiskers here has a tail over there.

Letters used for sizes all along:

    B  images in a batch                 N = g²  tokens of an image (196)
    H  side of the square image (224)    D       width: channels of a token (384)
    g = H/16  tokens along a side (14)

`visible` is a bool tensor [B, N]: True where the context encoder may look.
"""

import math
import random
import zipfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

PATCH = 16  # pixels along the side of the cell that one token stands for

# ------------------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------------------


def count_visible(tokens, mask_ratio):
    """How many of an image's tokens stay visible: ⌈(1 − mask_ratio) · N⌉, and at least one."""
    # The 1e-9 keeps rounding from adding a token: in floating point (1 − 0.7) · 100 is a little more than 30.
    return max(1, math.ceil((1 - mask_ratio) * tokens - 1e-9))


@dataclass(frozen=True)
class Config:
    """Everything that fixes the model's shape and behaviour. The defaults are the paper's SCOTT-12/16
    (12 blocks, cells of 16 px).

    Raises ValueError, naming the value and what it must be, for a combination that cannot work.
    """

    image_size: int = 224  # H, pixels
    dim: int = 384  # D
    depth: int = 12  # blocks of the encoder
    heads: int = 4  # attention heads, in encoder and predictor alike
    predictor_depth: int = 3
    # "scott": masked convolutions. To compare: "dense", the same but not masked again; "patch", a plain ViT's
    tokenizer: str = "scott"
    dropout: float = 0.2  # after adding positions, and on what attention adds to the tokens
    attention_dropout: float = 0.1  # on the attention weights
    drop_path: float = 0.1  # chance to skip what the last block adds; rises linearly from 0 at the first
    mask_ratio: float = 0.6  # share of the tokens that is hidden from the context encoder
    masking: str = "block"  # "block": the visible part is made of rectangles; "random": of single tokens

    def __post_init__(self):
        def require(holds, name, must_be):
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}, it must be {must_be}")

        for name in ("image_size", "dim", "depth", "heads", "predictor_depth"):
            value = getattr(self, name)
            most = 8192 if name in ("image_size", "dim") else 1024  # nobody means more than this
            require(isinstance(value, int) and 1 <= value <= most, name, f"a whole number from 1 to {most}")
        for name in ("dropout", "attention_dropout", "drop_path", "mask_ratio"):
            require(isinstance(getattr(self, name), (int, float)), name, "a number")
        for name in ("dropout", "attention_dropout", "drop_path"):
            require(0 <= getattr(self, name) < 1, name, "at least 0 and less than 1")
        require(
            self.image_size >= 2 * PATCH and self.image_size % PATCH == 0,
            "image_size",
            f"a multiple of {PATCH}, {2 * PATCH} or more",
        )
        require(self.dim % self.heads == 0, "dim", f"divisible by heads ({self.heads})")
        require(self.dim % 4 == 0, "dim", "divisible by 4 (sine and cosine of row and of column)")
        require(self.tokenizer in ("scott", "dense", "patch"), "tokenizer", "'scott', 'dense' or 'patch'")
        require(self.masking in ("block", "random"), "masking", "'block' or 'random'")
        require(0 < self.mask_ratio < 1, "mask_ratio", "more than 0 and less than 1")
        require(
            count_visible(self.tokens, self.mask_ratio) < self.tokens,
            "mask_ratio",
            f"at least 1/{self.tokens}, to hide at least one of an image's {self.tokens} tokens",
        )

    @property
    def grid(self):
        """g, tokens along a side of the image."""
        return self.image_size // PATCH

    @property
    def tokens(self):
        """N = g², tokens of an image."""
        return self.grid**2


# ------------------------------------------------------------------------------------------------------------
# Masks: what the context encoder may see
# ------------------------------------------------------------------------------------------------------------


def sample_masks(batch, grid, mask_ratio=0.6, masking="block", generator=None):
    """Draw a fresh mask for every image: bool [batch, grid²], True = visible, the same number in each row.

    "block" lays rectangles of random size and shape on the grid until enough is visible. What stays hidden is
    then made of large connected pieces, which cannot be guessed by carrying on the texture next door: the
    model has to know what it is looking at. "random" picks single tokens.

    generator: a CPU torch.Generator; None uses torch's global one.
    """
    if masking not in ("block", "random"):
        raise ValueError(f"masking is {masking!r}, it must be 'block' or 'random'")
    count = count_visible(grid**2, mask_ratio)
    if masking == "random":
        rank = torch.rand(batch, grid**2, generator=generator).argsort(dim=1)  # each row: 0 … N − 1, shuffled
        return rank < count
    # Rectangles are drawn number by number: Python's own generator has no tensor to make for each.
    rng = random.Random(torch.randint(2**62, (), generator=generator).item())
    digits = "".join(f"{block_mask(grid, count, rng):0{grid**2}b}" for _ in range(batch))
    return (torch.frombuffer(bytearray(digits, "ascii"), dtype=torch.uint8) == ord("1")).view(batch, grid**2)


def block_mask(grid, count, rng):
    """One mask with exactly `count` visible cells, a union of rectangles, as a whole number of grid² bits.

    Each rectangle covers about 16 cells or more, until fewer are missing, and is at most 3.3 times as wide as
    high or as high as wide. A cell is a bit, the next row's is `grid` bits on: to set and count bits is
    cheaper than to fill arrays, and a GPU needs thousands of masks a second.
    """
    # column[h] is h cells, one above the other. Times a row of `width` bits, it has that row h times.
    column = [sum(1 << grid * row for row in range(height)) for height in range(grid)]
    visible, missing = 0, count
    # A rectangle is at most grid − 1 on a side. On the smallest grids 16 cells are more than can fit: without
    # this bound no draw would be accepted there, and the loop would not end.
    smallest = min(16, (grid - 1) ** 2)
    while missing > 0:
        area = rng.uniform(min(smallest, missing), max(16, missing))
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= grid or width >= grid:
            continue
        top, left = int(rng.random() * (grid - height + 1)), int(rng.random() * (grid - width + 1))
        rectangle = (column[height] * ((1 << width) - 1)) << (grid * top + left)
        new = (rectangle & ~visible).bit_count()
        if 0 < new <= missing:  # never overshoot: every image gets the same number of visible tokens
            visible |= rectangle
            missing -= new
    return visible


# ------------------------------------------------------------------------------------------------------------
# Tokenizer: convolutions that cannot see what is hidden
# ------------------------------------------------------------------------------------------------------------


def hide(x, visible):
    """Set a feature map to zero wherever its cell is hidden.

    x [B, C, S, S], visible bool [B, 1, g, g] with g a divisor of S  →  [B, C, S, S]
    With visible=None everything is visible, and x is returned as it is.
    """
    if visible is None:
        return x
    cell = x.shape[-1] // visible.shape[-1]  # pixels of this feature map along the side of one token's cell
    visible = visible.repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)  # [B, 1, S, S]
    return torch.where(visible, x, 0)  # not x · visible: 0 · NaN is NaN, and nothing hidden may come through


class MaskedConv2d(nn.Conv2d):
    """A convolution whose output knows the same places as its input, and no more.

    Along the mask's edge a 7×7 kernel computes something for hidden places too, from the visible pixels it
    reaches. If that stayed, the next layer would read it back as if those places had been seen, and layer by
    layer the hole would fill up. Setting it to zero again keeps the hole's exact shape. This is submanifold
    sparse convolution (Graham et al. 2017), done with dense kernels as in SparK (Tian et al. 2023).

    x [B, C, S, S], visible [B, 1, g, g] or None  →  [B, C', S/2, S/2]
    """

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x, visible=None):
        return hide(super().forward(x), visible)


class MaskedMaxBlurPool(nn.Module):
    """Halve a feature map: the maximum of each 2×2 window, then a blur, then drop every second pixel.

    The blur makes dropping pixels less harmful: without it the result changes when the image moves by one
    pixel (Zhang 2019, "Making Convolutional Networks Shift-Invariant Again"). Both steps look past the mask's
    edge, so the hidden places are set to zero again afterwards.

    x [B, C, S, S], visible [B, 1, g, g] or None  →  [B, C, S/2, S/2]
    """

    def __init__(self, channels):
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        # One 3×3 binomial filter per channel; fixed, so neither a parameter nor part of the checkpoint.
        self.register_buffer("kernel", (row[:, None] * row).repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x, visible=None):
        x = F.max_pool2d(x, kernel_size=2, stride=1)  # [B, C, S-1, S-1]
        x = F.conv2d(x, self.kernel.to(x.dtype), stride=2, padding=1, groups=x.shape[1])  # [B, C, S/2, S/2]
        return hide(x, visible)


def check_images(images, visible):
    """Return the grid side g of a batch of images; ValueError if the shapes can't be right."""
    B, C, H, W = images.shape if images.dim() == 4 else (0, 0, 0, 0)
    if C != 3 or H != W or H % PATCH or H < 2 * PATCH:
        raise ValueError(
            f"images are {tuple(images.shape)}, they must be [B, 3, H, H] with H a multiple of "
            f"{PATCH}, {2 * PATCH} or more"
        )
    grid = H // PATCH
    if visible is not None and (visible.shape != (B, grid**2) or visible.dtype != torch.bool):
        raise ValueError(
            f"visible is {visible.dtype} {tuple(visible.shape)}, it must be torch.bool {(B, grid**2)}"
        )
    return grid


class Tokenizer(nn.Module):
    """Cut an image into N tokens, each a vector of D features of one 16×16 px cell and what lies around it.

    A plain ViT cuts with one big linear map a patch ("patch"), and has to learn from data that neighbouring
    pixels belong together. Two stages of convolution and pooling ("scott") know it from the start, which is
    what a few thousand images are too few to teach. Overlapping kernels would however carry hidden pixels
    into visible tokens, so the mask is an argument, and stands after every layer that looks around.

    images [B, 3, H, H], visible bool [B, N] or None (everything is visible)  →  [B, N, D]
    Hidden places come out as zeros ("patch" ignores the mask, for its cells do not overlap).
    """

    def __init__(self, config):
        super().__init__()
        self.kind = config.tokenizer
        if self.kind == "patch":
            self.conv = nn.Conv2d(3, config.dim, kernel_size=PATCH, stride=PATCH)
            nn.init.kaiming_normal_(self.conv.weight)
        else:
            self.conv1, self.pool1 = MaskedConv2d(3, 64), MaskedMaxBlurPool(64)
            self.conv2, self.pool2 = MaskedConv2d(64, config.dim), MaskedMaxBlurPool(config.dim)

    def forward(self, images, visible=None):
        grid = check_images(images, visible)
        x = images.contiguous(memory_format=torch.channels_last)  # the order convolutions are fastest in
        if self.kind == "patch":
            x = self.conv(x)  # [B, D, g, g]
        else:
            if visible is not None:
                visible = visible.view(-1, 1, grid, grid)
            x = hide(x, visible)  # [B, 3, H, H]: no hidden pixel gets any further than here
            if self.kind == "dense":
                visible = None  # ordinary convolutions from here on, to measure what re-masking is worth
            x = F.relu(self.conv1(x, visible))  # [B, 64, H/2, H/2]
            x = self.pool1(x, visible)  # [B, 64, H/4, H/4]
            x = F.relu(self.conv2(x, visible))  # [B, D, H/8, H/8]
            x = self.pool2(x, visible)  # [B, D, g, g]
        return x.flatten(2).transpose(1, 2)  # [B, N, D], row by row


# ------------------------------------------------------------------------------------------------------------
# Transformer blocks
# ------------------------------------------------------------------------------------------------------------


def position_embedding(grid, dim):
    """Fixed 2-D sine-cosine positions, float [grid², dim]: half the channels tell the row, half the column.

    Each half is [sin(p·ω), cos(p·ω)] with ω_k = 10000^(−k/(dim/4)), k = 0 … dim/4 − 1. Nothing here is
    learned, so the same encoder can be run on a grid of another size.
    """
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # [g, D/4]
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [g, D/2], the places along one axis
    rows, columns = line.repeat_interleave(grid, dim=0), line.repeat(grid, 1)  # [N, D/2] each
    return torch.cat([rows, columns], dim=1).float()


def layer_norm(x):
    """LayerNorm over the channels, no weight, no bias, eps 1e-5: every token gets mean 0 and variance 1."""
    return F.layer_norm(x, x.shape[-1:])


def init_linear(module):
    """The start of every Linear in the blocks: truncated normal with standard deviation 0.02, bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Attention(nn.Module):
    """Multi-head self-attention: each token gathers what it needs from all.  [B, N, D] → [B, N, D]"""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.attention_dropout = config.attention_dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.proj = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, D/heads]
        dropout = self.attention_dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # [B, heads, N, D/heads]
        x = x.transpose(1, 2).reshape(B, N, D)
        return self.dropout(self.proj(x))


def swiglu_width(dim):
    """Hidden channels of the feed-forward layer: about 8D/3, so three matrices cost what two of 4D would."""
    return 128 * max(1, round(8 * dim / 3 / 128))  # multiples of 128 are what GPUs multiply fastest


class SwiGLU(nn.Module):
    """The feed-forward layer: W₃(silu(a) · b) with [a, b] = W₁₂ x (Shazeer 2020).  [..., D] → [..., D]"""

    def __init__(self, dim):
        super().__init__()
        hidden = swiglu_width(dim)
        self.w12 = nn.Linear(dim, 2 * hidden, bias=False)
        self.w3 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a whole branch for some samples, and scale it up for the others."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - self.rate)  # [B, 1, 1]
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """One transformer block.  [B, N, D] → [B, N, D]

    Attention and feed-forward layer are branches: each adds to what passes by them, the residual stream x.
    Unlike in most transformers the second LayerNorm stands on the stream itself, not only on the branch: what
    leaves the attention is normalised and *then* added to. That keeps its scale in bounds through all blocks.

    place: which block this is, 1 to depth. It sets the drop-path rate and the scale of the initial weights.
    """

    def __init__(self, config, place, depth):
        super().__init__()
        self.attention = Attention(config)
        self.mlp = SwiGLU(config.dim)
        self.drop_path = DropPath(config.drop_path * (place - 1) / max(1, depth - 1))
        self.apply(init_linear)
        # Each block adds to the stream twice; the deeper it stands the less, so that the sum grows slowly.
        with torch.no_grad():
            self.attention.proj.weight /= math.sqrt(2 * place)
            self.mlp.w3.weight /= math.sqrt(2 * place)

    def forward(self, x):
        x = x + self.drop_path(self.attention(layer_norm(x)))
        x = layer_norm(x)
        return x + self.drop_path(self.mlp(x))


# ------------------------------------------------------------------------------------------------------------
# Encoder
# ------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Tokenizer and transformer. Context and target encoder are both of this class; you keep one of them.

    images [B, 3, H, H], visible bool [B, N] or None  →  [B, N, D]. No class token, no final norm: features
    for other tasks are `layer_norm` of these tokens.

    The transformer always sees N tokens. Hidden places carry a learned mask token plus their position (as in
    BEiT), so the encoder knows *where* something is missing, and shapes never change. H may be any multiple
    of 16 from 32 up, whatever size the encoder was trained at: run it at 448 px for features twice as dense
    (the places beyond those it was trained on are new to it).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(config)
        self.mask_token = nn.Parameter(torch.empty(config.dim))
        nn.init.trunc_normal_(self.mask_token, std=1e-6)
        positions = position_embedding(config.grid, config.dim)  # [N, D]
        self.register_buffer("positions", positions, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i + 1, config.depth) for i in range(config.depth))

    def forward(self, images, visible=None):
        x = self.tokenizer(images, visible)  # [B, N, D]
        if visible is not None:
            x = torch.where(visible[:, :, None], x, self.mask_token.to(x.dtype))
        positions = self.positions
        if x.shape[1] != len(positions):  # an image of another size than in training
            positions = position_embedding(math.isqrt(x.shape[1]), x.shape[2]).to(positions)
        x = self.dropout(x + positions)
        for block in self.blocks:
            x = block(x)
        return x


# ------------------------------------------------------------------------------------------------------------
# Predictor
# ------------------------------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """Guess the target encoder's tokens from the context encoder's.  [B, N, D] → [B, N, D]

    It is much smaller than the encoder on purpose. It is thrown away after training, and what it could work
    out by itself the encoder would not have to learn.
    """

    def __init__(self, config):
        super().__init__()
        positions = position_embedding(config.grid, config.dim)  # [N, D]
        self.register_buffer("positions", positions, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        depth = config.predictor_depth
        self.blocks = nn.ModuleList(Block(config, i + 1, depth) for i in range(depth))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.dim)
        # These blocks follow the encoder's, so their initial weights shrink once more, by their place in the
        # whole chain.
        with torch.no_grad():
            for place, block in enumerate(self.blocks, start=config.depth + 1):
                block.attention.proj.weight /= math.sqrt(2 * place)
                block.mlp.w3.weight /= math.sqrt(2 * place)

    def forward(self, tokens):
        if tokens.dim() != 3 or tokens.shape[1:] != self.positions.shape:
            raise ValueError(
                f"tokens are {tuple(tokens.shape)}, they must be [B, N, D] with N, D = "
                f"{tuple(self.positions.shape)}"
            )
        x = self.dropout(tokens + self.positions)  # once more: a hidden place must know which one it is
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(F.silu(x)))  # the SiLU before the norm is the paper's


# ------------------------------------------------------------------------------------------------------------
# Loss and model
# ------------------------------------------------------------------------------------------------------------


def jepa_loss(prediction, target, visible):
    """How far the prediction is from the target, in feature space and at the hidden places only.  → scalar

    Smooth-L1 (β = 1), mean over the D channels and the hidden tokens of an image, then over the batch.
    Visible places do not count: the context encoder saw them, so matching them would teach it to copy.

    prediction, target [B, N, D]; visible bool [B, N], with at least one hidden token in each image.
    """
    shapes = prediction.shape == target.shape and visible.shape == prediction.shape[:2]
    if not shapes or visible.dtype != torch.bool:
        raise ValueError(
            f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)} and visible {visible.dtype} "
            f"{tuple(visible.shape)} must be [B, N, D], [B, N, D] and torch.bool [B, N]"
        )
    error = F.smooth_l1_loss(prediction.float(), target.float(), reduction="none").mean(dim=2)  # [B, N]
    return (error.masked_fill(visible, 0).sum(dim=1) / (~visible).sum(dim=1)).mean()


class MIMJEPA(nn.Module):
    """Masked image modelling with a joint-embedding predictive architecture: the parts tied together.

    Why doesn't it collapse? If both encoders said the same about every picture, the loss could be zero.
    Nothing in the loss forbids that, and with bad settings it happens: train.py watches for it. In practice
    this prevents it: no gradient reaches the target encoder, so the two cannot agree on a constant by moving
    towards each other. It only follows the context encoder, slowly, as a moving average of its weights (EMA),
    and to get closer to something that hardly moves one has to predict it. The LayerNorm on the targets rules
    out the cheapest way down, which is to shrink them.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.context_encoder = Encoder(config)
        self.predictor = Predictor(config)
        self.target_encoder = Encoder(config)
        self.target_encoder.load_state_dict(self.context_encoder.state_dict())  # starts as a copy
        self.target_encoder.requires_grad_(False).eval()

    def train(self, mode=True):
        """As usual, but the target encoder stays in eval mode: a target is no place for dropout's noise."""
        super().train(mode)
        self.target_encoder.eval()
        return self

    def forward(self, context_images, target_images, visible, return_target=False):
        """The loss of one batch: two views [B, 3, H, H] of the same images, and the mask [B, N] of the first.

        With return_target=True also the target tokens [B, N, D], to watch them for collapse.
        """
        with torch.no_grad():
            target = layer_norm(self.target_encoder(target_images))  # [B, N, D], from the whole image
        context = self.context_encoder(context_images, visible)  # [B, N, D], from the visible part
        loss = jepa_loss(self.predictor(context), target, visible)
        return (loss, target) if return_target else loss

    @torch.no_grad()
    def update_target(self, momentum):
        """After each optimiser step, for all parameters: target ← m · target + (1 − m) · context."""
        targets, contexts = list(self.target_encoder.parameters()), list(self.context_encoder.parameters())
        torch._foreach_lerp_(targets, contexts, 1 - momentum)  # one call for all tensors, not one each


# ------------------------------------------------------------------------------------------------------------
# Using a trained encoder
# ------------------------------------------------------------------------------------------------------------


FORMAT = "scott-mim-jepa 1"  # what a checkpoint of this code says it is


def load_checkpoint(path):
    """Read what train.py saved: a dict of tensors and plain types. ValueError if it is anything else.

    `weights_only` is what makes opening a stranger's checkpoint safe: a full unpickling would run code from
    the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not look at the checksums
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # a damaged file can lead the unpickler to any error
        raise ValueError(f"{path} is damaged, or not a checkpoint of train.py") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version of train.py")
    try:
        with torch.device("meta"):  # the shapes without the memory
            expected = MIMJEPA(Config(**checkpoint["config"])).state_dict()
        found = checkpoint["model"]
        for name in expected.keys() | found.keys():
            if name not in expected or name not in found or found[name].shape != expected[name].shape:
                raise ValueError(f"tensor {name} is missing, unknown or of the wrong shape")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} does not hold the model it says it holds ({error})") from None
    return checkpoint


def load_encoder(checkpoint, which="context", device="cpu"):
    """A trained encoder, in eval mode and without gradients.

        encoder = load_encoder("runs/pets/ckpt.pt")
        tokens = encoder(images)  # images [B, 3, H, H], normalised with ImageNet's mean and deviation
        features = layer_norm(tokens).mean(dim=1)  # [B, D]

    checkpoint is a path, or what load_checkpoint returned; which is "context" or "target". Raises ValueError
    for another `which`, or a file that is no checkpoint.
    """
    if which not in ("context", "target"):
        raise ValueError(f"which is {which!r}, it must be 'context' or 'target'")
    saved = checkpoint if isinstance(checkpoint, dict) else load_checkpoint(checkpoint)
    encoder = Encoder(Config(**saved["config"]))
    prefix = f"{which}_encoder."
    weights = {name.removeprefix(prefix): w for name, w in saved["model"].items() if name.startswith(prefix)}
    encoder.load_state_dict(weights)
    return encoder.to(device).requires_grad_(False).eval()
