"""Pretrain a SCOTT encoder by MIM-JEPA.

    python train.py                         little drawn animals: nothing to download, minutes on a CPU
    python train.py --dataset imagenette    ten classes of photographs, a download of 94 MB
    python train.py --dataset pets          the paper's recipe on Oxford-IIIT Pet
    python train.py --data-dir my/pictures

Part 1 is the method, part 2 plumbing. Sizes (B, N, H): see scott.py. What is random in a step is drawn from
its own seeds (`generator_for`). So a run that was stopped goes on as if it had not been.
"""

import argparse
import ctypes
import hashlib
import io
import math
import os
import random
import signal
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin, TiffImagePlugin
from torch.utils.data import ConcatDataset
from torchvision import datasets
from torchvision.transforms.v2.functional import rgb_to_grayscale
from tqdm import tqdm

from scott import FORMAT, MIMJEPA, Config, InputError, load_checkpoint, sample_masks, target_deviation

# ---- Part 1: the method. A recipe defines a run; each entry is a flag (batch_size is --batch-size) --------

@dataclass(frozen=True)
class Recipe(Config):
    """Config's settings and these: kept with a run. Defaults are the paper's, but for those in DIFFERS."""

    dataset: str = "critters"  # "critters", a name in LIBRARY (part 2), "imagenet100" or "folder"
    data_dir: str = "data"  # where the pictures are, or will be downloaded to
    cache_dir: str = ""  # where decoded pictures are kept; by default the folder "cache" in data_dir
    cache_side: int = 320  # pixels: a decoded picture is kept squeezed to a square of this side
    skip_bad_images: bool = False  # leave out files that cannot be read, instead of stopping
    pretrain_split: str = "all"  # "all": the test pictures too (never their labels), as the paper; or "train"
    pictures: int = 0  # how many critters to draw; 0 where pictures are read
    epochs: int = 300  # how often each picture is seen
    batch_size: int = 64  # pictures in a step
    lr: float = 5e-4  # the learning rate's peak
    momentum: float = 0.996  # of the target's moving average, at the start; it rises to 1
    seed: int = 47  # of everything random
    probe_epochs: int = 100  # how long eval.py trains its attentive probes

    def __post_init__(self):
        super().__post_init__()
        self.between(1, 10**9, "epochs", "probe_epochs")
        self.between(2, 10**9, "batch_size")
        count = range(20, 10**7) if self.dataset == "critters" else [0]
        self.require("pictures", self.pictures in count, "20 or more for critters, and only for them")
        self.between(16, 8192, "cache_side")
        self.between(1e-5, 1e3, "lr")
        self.between(0, 1, "momentum")
        self.between(0, 2**63 - 1, "seed")
        names = "critters", *LIBRARY, "imagenet100", "folder"
        self.require("dataset", self.dataset in names, f"one of {', '.join(names)}")
        self.require("pretrain_split", self.pretrain_split in ("all", "train"), "all or train")

SMALL = dict(image_size=64, dim=128, depth=4, dropout=0.0, attention_dropout=0.0, drop_path=0.0,
             batch_size=32, lr=3e-4, momentum=0.99)
DIFFERS = {  # where the defaults of a data set are not the paper's, but what two CPU cores can do
    "critters": SMALL | dict(cache_side=64, mask_ratio=0.5, pictures=8000, epochs=13, probe_epochs=4),
    "imagenette": SMALL | dict(cache_side=160, pretrain_split="train", epochs=120, probe_epochs=10),
}
PLACES = "data_dir", "cache_dir", "skip_bad_images"  # these settings may change when a run goes on

# ---- One step of training: all the rest serves it ----------------------------------------------------------

def train_step(model, optimizer, scaler, views, visible, schedule, autocast):
    """One step of MIM-JEPA.  → loss and target_std, two scalars on the device

    views [2, B, 3, H, H]: both of the same pictures; visible bool [B, N]: what the context encoder sees of
    the first; schedule: (learning rate, weight decay, momentum); scaler: lets no fp16 gradient round to 0.
    """
    lr, weight_decay, momentum = schedule
    set_schedule(optimizer, lr, weight_decay)
    with autocast():  # matrix products in half precision, if it is on
        # The target from the whole of view 2 (no gradient), its prediction from the visible part of view 1,
        # and how far they are apart in the hidden places: MIMJEPA.forward, in scott.py.
        loss, target = model(views[0], views[1], visible, return_target=True)
    scaler.scale(loss).backward()  # gradients of the context encoder and the predictor
    scaler.step(optimizer)  # AdamW moves their weights
    scaler.update()
    optimizer.zero_grad()
    model.update_target(momentum)  # the target encoder follows slowly
    return loss.detach().clone(), target_deviation(target)  # CUDA graphs write each loss to the same place

# ---- Schedules and optimiser -------------------------------------------------------------------------------

def schedules(step, total_steps, warmup_steps, *, start_lr=1e-6, peak_lr=5e-4, end_lr=1e-5, flat=0.72,
              start_decay=0.04, end_decay=0.4, start_momentum=0.996, end_momentum=1.0):
    """(learning rate, weight decay, EMA momentum) of step 1 … total_steps. The first climbs in a line, keeps
    its peak for a share `flat` of the steps after warm-up, falls by half a cosine. The others are lines."""
    done = step / total_steps
    weight_decay = start_decay + done * (end_decay - start_decay)
    momentum = start_momentum + done * (end_momentum - start_momentum)
    flat_end = warmup_steps + int(flat * (total_steps - warmup_steps))
    if step < warmup_steps:
        lr = start_lr + step / warmup_steps * (peak_lr - start_lr)
    elif step <= flat_end:
        lr = peak_lr
    else:
        fall = (step - flat_end) / (total_steps - flat_end)
        lr = end_lr + (peak_lr - end_lr) * (1 + math.cos(math.pi * fall)) / 2
    return lr, weight_decay, momentum

def make_optimizer(parameters):
    """AdamW in two groups: matrices, whose weight decay is scheduled, and vectors, which have none."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1]},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=True)  # its own β are the paper's, 0.9 and 0.999

def set_schedule(optimizer, lr, weight_decay):
    optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay)
    optimizer.param_groups[1].update(lr=lr)

# ---- Views: crops. Drawn on the CPU, for each picture its own ----------------------------------------------

def draw_crops(sizes, side, generator, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), tries=10):
    """Random resized crops, as torchvision's: uniform in their share of the area, log-uniform in aspect. They
    are drawn in true proportions, and given in pixels of the square of `side` that a picture is kept as.
    sizes [B, 2]: true width, height  →  long [B, 4]: left, top, width, height"""
    B, wide = len(sizes), sizes[:, :1] / sizes[:, 1:]  # [B, 1]: width / height of the whole picture
    area = torch.empty(B, tries).uniform_(*scale, generator=generator)
    # The picture is kept as a square: there, a crop's aspect is its true one over the picture's.
    skew = torch.empty(B, tries).uniform_(*map(math.log, ratio), generator=generator).exp() / wide
    crop = torch.stack([(area * skew).sqrt(), (area / skew).sqrt()], dim=-1)  # [B, tries, 2], shares
    fits = (crop <= 1).all(-1)  # [B, tries]
    crop = crop[torch.arange(B), fits.int().argmax(1)]  # [B, 2], the first try that fits
    any_fits = fits.any(1, keepdim=True)
    # If no try fits into the picture, the crop is the largest centred one of an allowed ratio.
    largest = torch.cat([ratio[1] / wide, wide / ratio[0]], dim=1).clamp(max=1)
    crop = (torch.where(any_fits, crop, largest) * side).round().clamp(min=1)
    place = torch.where(any_fits, torch.rand(B, 2, generator=generator), 0.5)
    return torch.cat([(place * (side - crop + 1)).floor(), crop], dim=1).long()

def crop_and_resize(pixels, drawn, out, copies):
    """Crops of `pixels`, uint8 [n, 3, S, S], resized and from 0 to 1: [B, 3, out, out], `copies` times over.
    drawn float [B, 6]: which of `pixels`; its crop's left, top, width and height; 1 to mirror it, 0 not to.
    Antialiased bicubic interpolation, picture by picture: fastest on a CPU. It rounds to whole levels."""
    images = []
    for row, x, y, w, h, mirrored in drawn.long().tolist():
        image = pixels[row, None, :, y : y + h, x : x + w]  # [1, 3, h, w]
        image = F.interpolate(image, size=(out, out), mode="bicubic", antialias=True)
        images.append(image.flip(3) if mirrored else image)
    return torch.cat(images).repeat(copies, 1, 1, 1) / 255

def crop_by_products(pixels, drawn, out, copies):
    """As `crop_and_resize`, but without rounding: for each picture a matrix product along x and one along y,
    for all pictures at once. For a GPU."""
    images = pixels[drawn[:, 0].long()] / 255  # [B, 3, S, S]
    mirrored = drawn[:, 5, None, None, None] == 1  # [B, 1, 1, 1]
    start, length = drawn[:, 1:5].T.reshape(2, 2, -1, 1, 1)  # [2, B, 1, 1] each: of x, then of y
    pixel, sample = (torch.arange(0.5, n, device=drawn.device) for n in (pixels.shape[-1], out))  # places
    scale = length / out  # pixels per sample
    d = (pixel - start - sample[:, None] * scale).abs() / scale.clamp(min=1)  # [2, B, out, S]: distances,
    d = d.clamp(max=2)  # in pixels, or in samples where these are wider; from 2 on the kernel is 0
    near, far = (1.5 * d - 2.5) * d**2 + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2  # the cubic kernel, a = −½
    inside = (pixel > start) & (pixel < start + length)  # [2, B, 1, S]
    weights = torch.where(d < 1, near, far) * inside
    across, down = weights / weights.sum(3, keepdim=True)  # [B, out, S] each
    images = torch.einsum("bcyx,bjx->bcyj", images, across).clamp(0, 1)  # as Pillow, between its passes
    images = torch.einsum("biy,bcyj->bcij", down, images).clamp(0, 1)  # [B, 3, out, out]
    return torch.where(mirrored, images.flip(3), images).repeat(copies, 1, 1, 1)

# ---- Views: colours. Images [B, 3, H, H] from 0 to 1, a factor [B, 1, 1, 1] for each -----------------------

def brightness(images, factor):
    return (images * factor).clamp(0, 1)

def contrast(images, factor):
    return torch.lerp(rgb_to_grayscale(images.mean((2, 3), keepdim=True)), images, factor).clamp(0, 1)

def saturation(images, factor):
    return torch.lerp(rgb_to_grayscale(images), images, factor).clamp(0, 1)

def hue(images, shift):
    """Turn the colour wheel by `shift` of a full turn: RGB to hue, chroma, value, and back."""
    red, green, blue = images.split(1, dim=1)
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    turn = torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    turn = torch.where(value == red, green - blue, turn) / chroma.clamp(min=1e-12) + 6 * shift  # in sixths
    place = torch.cat([turn + 5, turn + 3, turn + 1], dim=1) % 6  # of red, green and blue on the wheel
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)

def blur(images, sigma):
    """9×9 Gaussian blur, a sigma for each image. Borders are reflected. A matrix product along each axis."""
    images = F.pad(images, (4, 4, 4, 4), mode="reflect")  # [B, 3, H + 8, H + 8]
    pixel = torch.arange(0.0, images.shape[-1], device=images.device)
    distance = pixel - pixel[4:-4, None]  # [H, H + 8]
    weights = -0.5 * (distance / sigma.expand(-1, 3, 1, 1)) ** 2  # 3 channels: @ would copy to broadcast
    weights = torch.where(distance.abs() > 4, -math.inf, weights).softmax(dim=3)  # [B, 3, H, H + 8]
    return weights @ images @ weights.mT

# A view is changed with probability CHANGED; if so, each group of operations acts with its own.
CHANGED, GROUPS = 0.6, {"jitter": 0.8, "grey": 0.1, "blur": 0.3}
OPERATIONS = (  # group, function, the factor that changes nothing, the least and the most that is drawn
    ("jitter", brightness, 1.0, 0.6, 1.4),
    ("jitter", contrast, 1.0, 0.6, 1.4),
    ("jitter", saturation, 1.0, 0.8, 1.2),
    ("jitter", hue, 0.0, -0.1, 0.1),
    ("grey", saturation, 1.0, 0.0, 0.0),
    ("blur", blur, 0.001, 0.1, 2.0),  # 0 would divide by 0
)
NEUTRAL = torch.tensor([operation[2] for operation in OPERATIONS])

def draw_colours(count, generator):
    """The colours of `count` views: (order, factors [count, operations]). The order, one for the batch, lists
    the groups, each as a list of indices into OPERATIONS."""
    group_of, _, _, least, most = zip(*OPERATIONS)
    least, most, names = torch.tensor(least), torch.tensor(most), [*GROUPS]
    chosen = torch.rand(count, len(names), generator=generator) < torch.tensor([*GROUPS.values()])
    chosen &= torch.rand(count, 1, generator=generator) < CHANGED
    chosen = chosen[:, [names.index(group) for group in group_of]]  # [count, operations]
    factors = least + (most - least) * torch.rand(count, len(OPERATIONS), generator=generator)
    groups = [[number for number, group in enumerate(group_of) if group == name] for name in names]
    groups = [[group[i] for i in torch.randperm(len(group), generator=generator)] for group in groups]
    order = [groups[i] for i in torch.randperm(len(groups), generator=generator)]  # [[4], [2, 0, 3, 1], [5]]
    return order, torch.where(chosen, factors, NEUTRAL)

def apply_colours(images, order, factors, functions, at_once):
    """Apply functions[i], the one of OPERATIONS[i], by each image's own factors, in the order drawn. at_once:
    to all images (fastest on a GPU), else only to those it changes (on a CPU). It may overwrite `images`."""
    for group in order:
        changed = slice(None) if at_once else (factors[:, group] != NEUTRAL[group]).any(1)
        part = images[changed]
        for number in group:
            part = functions[number](part, factors[changed, number].view(-1, 1, 1, 1))
        images = part if at_once else images.index_put_((changed,), part)
    return images

# ---- Loader: the batch of a step ---------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, which everyone uses
Pictures = namedtuple("Pictures", "pixels sizes labels train")  # see load_pictures, in part 2
Machine = namedtuple("Machine", "device dtype compile autocast")  # see choose_machine, in part 2

def generator_for(*key):
    """A torch.Generator for a key: (seed, 0, epoch) order of pictures; (seed, 1, step) crops, colours, masks;
    (seed, 3, step) dropout; in eval.py (seed, 4) labels, (seed, 10) examples."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

class Loader:
    """Makes batches of `pictures`: of the `rows`, long [n], in a new random order for each epoch. A last,
    incomplete one is dropped. views: how many of each picture: two and a mask to pretrain, one for probes."""

    def __init__(self, pictures, rows, recipe, machine, views=2):
        self.pictures, self.rows, self.recipe, self.device = pictures, rows, recipe, machine.device
        self.views, self.steps_per_epoch = views, len(rows) // recipe.batch_size
        recipe.require("batch_size", self.steps_per_epoch > 0, f"at most {len(rows)}, the pictures there are")
        mean, std = self.mean, self.std = torch.tensor([MEAN, STD], device=self.device).view(2, 3, 1, 1)
        # One by one these functions are dozens of small steps each; compiled they are a few kernels.
        compiled = partial(torch.compile, fullgraph=True) if machine.compile else lambda function: function
        self.make_crops = crop_and_resize if self.device.type == "cpu" else compiled(crop_by_products)
        self.operations = [compiled(operation[1]) for operation in OPERATIONS]
        # It must not hold `self`: in such a circle the pictures would stay in memory for a while.
        self.normalise = compiled(lambda images: (images - mean) / std)

    def batch(self, step):
        """(views [V, B, 3, H, H]; visible bool [B, N], for the first view, or None; which pictures, [B]). All
        that is random is drawn on the CPU; a GPU gets it in two transfers, for which nobody waits."""
        recipe, B, generator = self.recipe, self.recipe.batch_size, generator_for(self.recipe.seed, 1, step)
        epoch, i = divmod(step - 1, self.steps_per_epoch)
        shuffle = torch.randperm(len(self.rows), generator=generator_for(recipe.seed, 0, epoch))
        rows = self.rows[shuffle[i * B : (i + 1) * B]]
        crops = draw_crops(self.pictures.sizes[rows], self.pictures.pixels.shape[-1], generator)
        mirrored = torch.rand(B, 1, generator=generator) < 0.5  # all views share crop and mirror
        order, factors = draw_colours(self.views * B, generator)
        kind = recipe.grid, recipe.mask_ratio, recipe.masking, generator
        visible = self.to_device(sample_masks(B, *kind)) if self.views > 1 else None
        drawn = torch.cat([rows[:, None], crops, mirrored], dim=1).repeat(self.views, 1)
        drawn = self.to_device(torch.cat([drawn, factors], dim=1))  # one transfer: [V·B, 6 + operations]
        images = self.crop(rows, drawn[:B, :6], self.views)  # cropped once: below B the same rows repeat
        images = apply_colours(images, order, drawn[:, 6:], self.operations, self.device.type != "cpu")
        return self.normalise(images).unflatten(0, (self.views, B)), visible, rows

    def crop(self, rows, drawn, copies=1):
        """[copies · B, 3, H, H]: crops of these rows. drawn: see `crop_and_resize`, [B, 6] on the device."""
        pixels = self.pictures.pixels
        if pixels.device != drawn.device:  # all stayed in the CPU's memory: only the batch goes over
            pixels = self.to_device(pixels.index_select(0, rows))
            drawn = torch.cat([torch.arange(len(rows), device=drawn.device)[:, None], drawn[:, 1:]], dim=1)
        return self.make_crops(pixels, drawn, self.recipe.image_size, copies)

    def to_device(self, tensor):
        pin = self.device.type == "cuda"  # only from pinned memory a GPU copies while we go on
        return (tensor.pin_memory() if pin else tensor).to(self.device, non_blocking=pin)

# ---- The program -------------------------------------------------------------------------------------------
ROW, SAVE = 50, 60  # a row of metrics.csv every 50 steps of an epoch and at its end; a save after 60 seconds
COLUMNS = "epoch step loss learning_rate weight_decay momentum target_std images_per_s".split()

def main(argv=None, stop=None):
    """Train as the command line says.  → exit status: 0, or 128 + the signal that `run` noted in `stop`"""
    args, given = read_arguments(argv)  # given: those of the recipe
    stop = stop or SimpleNamespace(signal=0)
    recipe, out, saved = open_run(args, given)
    machine = choose_machine(args)
    pictures = load_pictures(recipe, device=machine.device)
    rows = pictures.sizes[:, 0].nonzero()[:, 0]  # without bad files, whose size is 0
    if recipe.pretrain_split == "train":
        recipe.require("pretrain_split", pictures.train < len(pictures.labels), f"all: no splits. {LAYOUT}")
        rows = rows[rows < pictures.train]
    loader = Loader(pictures, rows, recipe, machine)
    per_epoch, size = loader.steps_per_epoch, recipe.batch_size
    total_steps = recipe.epochs * per_epoch
    warmup_steps = min(recipe.epochs, 300) * per_epoch * 40 // 300  # the paper's 40 of 300 epochs, at most 40
    last_step = min(total_steps, args.max_steps or total_steps)

    torch.manual_seed(recipe.seed)
    model = MIMJEPA(recipe).to(machine.device).train()
    optimizer = make_optimizer(model.parameters())
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    parts = dict(model=model, optimizer=optimizer, scaler=scaler)
    digest = hashlib.sha256(pictures.sizes[rows].numpy().tobytes() + pictures.labels[rows].numpy().tobytes())
    identity = f"{len(rows)} pictures, {digest.hexdigest()[:16]}"  # who resumes must have the same
    step, history, recent = restore(saved, parts, identity)
    recent, saved = [*map(tuple, recent.to(machine.device))], None  # the checkpoint's memory is needed
    if machine.compile:  # CUDA graphs: to launch hundreds of kernels takes longer than to run them
        model.compile(fullgraph=True, mode="reduce-overhead")
    out.mkdir(parents=True, exist_ok=args.resume)  # a folder belongs to one run: a second cannot make it
    print(f"{recipe.dataset}: {len(rows):,} pictures, {total_steps:,} steps of {recipe.batch_size}\n"
          "target_std dips while the learning rate climbs, then stays at 0.6 to 0.9. Below 0.1: a collapse.")

    stop.heeded = True  # from here on a signal waits until its step is whole
    first, saved_at, row_step = step + 1, time.perf_counter(), step - (step % per_epoch) % ROW
    lap = step, math.nan  # step and time that speed counts from: not from the first row, which compiles
    with tqdm(None, "training", last_step * size, initial=step * size, unit=" images", unit_scale=True,
              mininterval=1, maxinterval=1) as bar:
        for step in range(first, last_step + 1):
            views, visible, _ = loader.batch(step)
            schedule = schedules(step, total_steps, warmup_steps, peak_lr=recipe.lr,
                                 start_momentum=recipe.momentum)
            torch.manual_seed(generator_for(recipe.seed, 3, step).initial_seed())  # what dropout draws from
            recent.append(train_step(model, optimizer, scaler, views, visible, schedule, machine.autocast))
            if bar.update(size):  # when it is drawn, once a second
                bar.set_postfix_str("step {:,}, loss {:.4f}, target_std {:.2f}".format(step, *recent[-1]))
            epoch, rest = divmod(step, per_epoch)
            keep = rest == 0 and args.keep_every and epoch % args.keep_every == 0
            end = stop.signal or step == last_step
            due = end or keep or time.perf_counter() - saved_at > SAVE
            if rest % ROW and not due:
                continue
            # Only now: to read a number is to wait for the device.
            loss, deviation = (torch.stack(values).mean().item() for values in zip(*recent))
            if not math.isfinite(loss):
                raise InputError(f"at step {step:,} the loss is {loss}: lower --lr, or --precision fp32")
            speed = (step - lap[0]) * size / (time.perf_counter() - lap[1])
            row = dict(zip(COLUMNS, (step / per_epoch, step, loss, *schedule, deviation, speed)))
            # A save within a row's steps has left a row of some of them: this one takes its place.
            history = [old for old in history if old["step"] <= row_step] + [row]
            if rest % ROW == 0:
                row_step, recent = step, []
            if due:
                names = ["ckpt.pt", f"ckpt-{epoch:04}.pt"] if keep else ["ckpt.pt"]
                save(out, names, parts, recipe=asdict(recipe), step=step, epoch=step / per_epoch,
                     history=history, recent=torch.tensor(recent), pictures=identity)
                saved_at = time.perf_counter()
            if end:
                break
            lap = step, time.perf_counter()
    if stop.signal and step < last_step:
        print(f"stopped and saved at step {step:,}; go on with --resume")
        return 128 + stop.signal
    print(f"saved: {out / 'ckpt.pt'}, step {step:,}/{total_steps:,}. Next: python eval.py {out / 'ckpt.pt'}")
    return 0

# ---- Part 2: plumbing, skip it on a first reading. Critters: a data set drawn by the computer --------------

# A species is a plan of six parts, drawn at random from its name: add yours. Each of three colours dresses
# two parts, which two belongs to the species, and all else comes from the picture's seed. So who recognises a
# species by what is in sight knows, say, that its hidden legs are coloured like the ears.
SPECIES = "tigrot mousen puffit foxel cyclox zebbit moodle bumbear dashel wuffle".split()
COLOURS = "black gray brown red orange gold olive green turquoise skyblue blue purple violet pink".split()

def plan(name):
    """A species facing right, from back to front: for each part its ovals (x, y, rx, ry, colour)."""
    rng = random.Random(name)
    tail, legs, body, spots, ears, head = rng.sample((0, 0, 1, 1, 2, 2), 6)  # the numbers of their colours
    rx, ry, r = rng.uniform(40, 64), rng.uniform(32, 54), rng.uniform(28, 46)  # the body's radii, the head's
    neck = rng.uniform(0.2, 1.2)  # where the head sits: 0 is in front, π/2 on top
    x, y = 0.9 * rx * math.cos(neck), -1.1 * ry * math.sin(neck) - 10
    ear, wide, long = rng.uniform(0.2, 0.9) * r, rng.uniform(8, 20), rng.uniform(16, 50)
    leg, leg_count, spot = rng.uniform(8, 14), rng.randint(2, 4), rng.uniform(0.5, 0.9)
    spot_count, tail_x, tail_y = rng.randint(1, 3), rng.uniform(10, 34), rng.uniform(10, 44)
    spots_at = [rx * (1.6 * (i + 0.5) / spot_count - 0.8) for i in range(spot_count)]
    eyes = (-6, 9, 3), (-3, 4, 4), (14, 9, 3), (17, 4, 4)  # place, radius, colour
    return [
        [(-rx - tail_x / 2, -tail_y / 2, tail_x, tail_y, tail)],
        [(rx * (1.5 * (i + 0.5) / leg_count - 0.75), ry + 6, leg, 32, legs) for i in range(leg_count)],
        [(0, 0, rx, ry, body)],
        [(at, 0, 0.8 * rx * spot / spot_count, ry * spot, spots) for at in spots_at],
        [(at, y - 0.8 * r - 0.4 * long, wide, long, ears) for at in (x - ear, x + ear)],
        [(x, y, r, r, head), *((x + at, y - 4, size, size, colour) for at, size, colour in eyes)],
    ]

def draw_critter(species, seed, side=64):
    """One critter, side × side px, RGB. The same seed dresses and poses all species alike, every time."""
    rng = random.Random(seed)
    background, *colours = *rng.sample(COLOURS, 4), "white", "black"  # the last two for the eyes
    zoom, flip, tilt = rng.uniform(1, 1.3), rng.choice((-1, 1)), rng.uniform(-14, 14)
    place_x, place_y = rng.uniform(108, 148), rng.uniform(124, 148)
    canvas = Image.new("RGB", (256, 256), background)  # large, then shrunk, which smooths the edges
    for part in plan(SPECIES[species]):
        pose_x, pose_y = rng.uniform(-6, 6), rng.uniform(-6, 6)
        for x, y, rx, ry, colour in part:
            x, y = place_x + zoom * flip * (x + pose_x), place_y + zoom * (y + pose_y)
            oval = x - zoom * rx, y - zoom * ry, x + zoom * rx, y + zoom * ry
            ImageDraw.Draw(canvas).ellipse(oval, colours[colour])
    return canvas.rotate(tilt, fillcolor=background).resize((side, side), Image.Resampling.BOX)

def critters(count, seed, side):
    """A data set of `count` critters, side × side px, the species in turn."""
    rng, kinds = random.Random(seed), len(SPECIES)
    return [(partial(draw_critter, i % kinds, rng.getrandbits(32), side), i % kinds) for i in range(count)]

# ---- Data sets: pictures[i] → (picture or a function that makes it, label) ---------------------------------

LIBRARY = {  # class(root, split, download=True), its splits, the last for testing, how many pictures it has
    "imagenette": (partial(datasets.Imagenette, size="160px"), ("train", "val"), 13_394),
    "pets": (datasets.OxfordIIITPet, ("trainval", "test"), 7_349),
    "flowers": (datasets.Flowers102, ("train", "val", "test"), 8_189),
}
LAYOUT = "Labelled pictures lie in train/<class>/… and val/<class>/… (or test/<class>/…), below --data-dir"

def open_datasets(recipe):
    """The data sets that a recipe names. The last of several is for testing; a single one has no labels."""
    name, root, test = recipe.dataset, Path(recipe.data_dir).expanduser(), recipe.pictures // 4
    if name == "critters":
        return [critters(recipe.pictures - test, 0, recipe.cache_side), critters(test, 1, recipe.cache_side)]
    if name not in LIBRARY:
        return open_folder(root, ("train", "val") if name == "imagenet100" else ("train", "val", "test"))
    kind, splits, count = LIBRARY[name]
    try:
        if name == "flowers":
            import scipy  # torchvision wants it, but only after the download
        parts = [kind(root, split, download=True) for split in splits]
    except Exception as error:  # no network, no room, a broken archive or list: whatever it leads to
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"cannot get {name} into {root} ({reason}): delete what is there of it, try again")
    if (found := sum(map(len, parts))) != count:
        print(f"warning: of the {count:,} pictures of {name}, {root} has {found:,}")
    return parts

def find_files(folder, seen):
    """Files below a folder, in one order everywhere, but programs' own. What was `seen` is taken once."""
    paths = sorted(folder.iterdir(), key=lambda path: path.name) if folder.is_dir() else []
    for path in () if folder / "ckpt.pt" in paths else paths:  # figures of a run are no pictures
        real, hidden = os.path.realpath(path), path.name[0] in ".@" or path.name == "__MACOSX"
        if not hidden and real not in seen and (path.suffix != ".pictures" or path.is_dir()):
            seen.add(real)
            yield from find_files(path, seen) if path.is_dir() else [path]

class Folder(list):
    """Pictures below a folder. Folders in it are classes; those beside them, or all, have the label −1."""

    def __init__(self, root, labelled=True):
        self.files = [*find_files(root, {os.path.realpath(root)})]
        paths = [path for path in self.files if datasets.folder.is_image_file(path.name)]
        parts = [path.relative_to(root).parts[:-1] if labelled else () for path in paths]
        self.classes = sorted({part[0] for part in parts if part})
        labels = [self.classes.index(part[0]) if part else -1 for part in parts]
        super().__init__((partial(open_picture, path), label) for path, label in zip(paths, labels))

def open_folder(root, splits):
    """[train/<class>/…, val/<class>/… or test/<class>/…], or all pictures in one, without labels."""
    everything = Folder(root, labelled=False)
    if not everything:
        raise InputError(f"no folder {root}, or no pictures in it (.jpg, .png and so on): see --data-dir")
    train, *rest = (Folder(root / split) for split in splits)
    parts = [train, *filter(None, rest)]
    if len(parts) == 1 or not train.classes:
        if "test" not in splits:
            raise InputError(f"{root} has no labels. {LAYOUT}")
        parts = [everything]
    if any(part.classes != parts[0].classes for part in parts):
        raise InputError(f"{', '.join(splits)} in {root} need pictures in the same folders, one per class")
    if (passed := len(everything.files) - sum(map(len, parts))) > 0:
        print(f"passed over {passed} files outside {', '.join(splits)}, or of other types")
    return parts

Image.MAX_IMAGE_PIXELS = 10**9  # the pictures are the user's own: a large one is no attack
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30  # nor is a long comment or profile
TiffImagePlugin.READ_LIBTIFF = True  # Pillow's own reader scrambles some planar and subsampled TIFFs

def open_picture(path):
    """A picture as a Pillow RGB image, upright, on white where transparent. InputError if the file cannot be
    read as a picture, or holds numbers of which nobody knows the scale."""
    try:
        # Opened by name, Pillow would map a file into memory, and scramble TIFFs that lie on their side.
        with open(path, "rb") as file, Image.open(file) as image:
            if "transparency" in image.info and image.tile[0].args in ("L;2", "L;4", "RGB;16B"):
                raise ValueError("Pillow misreads transparent colours of this depth: convert it to 8 bits")
            image.load()
            with suppress(Exception):  # where the rest of the EXIF block is broken, it is of no interest
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except Exception as error:  # a damaged file can lead Pillow to any error
        reason = getattr(error, "strerror", None) or str(error).partition(" <")[0]  # without Python's object
        raise InputError(f"{path}: {reason or type(error).__name__}") from None

def to_rgb(image):
    """8 bits for each colour. ValueError if the numbers have no agreed scale."""
    tags = getattr(image, "tag_v2", {})  # a TIFF's: 258 is the number of bits, 262 what is zero, 339 the kind
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")  # unsigned, 16 bits
    packed, signed = deep and tags.get(258, (16,)) != (16,), any(kind != 1 for kind in tags.get(339, ()))
    if packed or signed or (image.mode in ("I", "F", "LAB") and not deep):
        raise ValueError("signed, packed, 32-bit and float numbers and Lab have no agreed scale: convert it")
    if deep:
        values = np.asarray(image)
        values = np.where(values == image.info.get("transparency"), 65535, values) >> 8  # clear is white
        image = Image.fromarray((255 - values if tags.get(262) == 0 else values).astype(np.uint8))
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")

# ---- One file of decoded pictures --------------------------------------------------------------------------
# Decoding a JPEG costs more than a GPU's step on it, so it happens once. Each picture is squeezed to a
# square; its crops get their true proportions back. Detail is lost, little of it up to sides of 8:1.

def load_pictures(recipe, folder=None, device=torch.device("cpu")):
    """All pictures of a recipe: pixels uint8 [n, 3, S, S]; sizes float [n, 2], true width and height; labels
    long [n], −1 for none; train: how many, the first, are for training. A GPU holds the pixels if a third of
    its free memory takes them. InputError names a bad file; with skip_bad_images it gets size 0, label −1."""
    parts, side, skip = open_datasets(recipe), recipe.cache_side, recipe.skip_bad_images
    record = np.dtype([("label", "i8"), ("size", "f4", 2), ("pixels", "u1", (3, side, side))])
    decode = partial(decode_all, pictures := ConcatDataset(parts), record, skip)
    if recipe.dataset == "critters":  # drawn in seconds: nothing to keep
        decode(file := io.BytesIO())
        records = np.frombuffer(file.getbuffer(), record)
    else:
        folder = Path(folder or recipe.cache_dir or os.path.join(recipe.data_dir, "cache")).expanduser()
        path = folder / f"{recipe.dataset}-{side}-{make_stamp(parts, skip)}.pictures"
        if not path.exists() or path.stat().st_size != len(pictures) * record.itemsize:
            print(f"decoding {len(pictures):,} pictures once, to {path}. Delete older ones as you like")
            write_file(path, decode, "free some room, lower --cache-side, or name another --cache-dir")
        records = np.memmap(path, record, "r+" if os.access(path, os.W_OK) else "r")
    sizes, labels = (torch.from_numpy(records[name].copy()) for name in ("size", "label"))
    if bad := int((sizes[:, 0] == 0).sum()):
        print(f"{bad} bad files are left out; if they are mended, delete {path}")
    pixels = torch.from_numpy(records["pixels"])
    if device.type == "cuda" and pixels.numel() < torch.cuda.mem_get_info(device)[0] / 3:
        pixels = torch.cat([part.to(device) for part in pixels.split(256)])
    return Pictures(pixels, sizes, labels, len(pictures) - len(parts[-1]) * (len(parts) > 1))

def make_stamp(parts, skip):
    """A name for these pictures: another if a file of one's own folder is changed, added, removed or given
    another class. Of a downloaded data set only the numbers of pictures count."""
    known = [skip, *map(len, parts)]
    for read, label in sum((part for part in parts if isinstance(part, Folder)), []):
        [path] = read.args
        info = path.stat() if path.exists() else None
        known.append((path.name, label, info and (info.st_size, info.st_mtime_ns, info.st_ctime_ns)))
    return hashlib.sha256(ascii(known).encode()).hexdigest()[:16]

def decode_all(pictures, record, skip, file):
    """Write a record for each picture. Threads decode, ahead of the writer by no more than 256 pictures."""

    def decode(i):
        try:
            picture, label = pictures[i]
            picture = picture() if callable(picture) else picture  # torchvision's are opened
            pixels = picture.resize(record["pixels"].shape[1:], Image.Resampling.BICUBIC)
            return np.array((label, picture.size, np.asarray(pixels).transpose(2, 0, 1)), record).tobytes()
        except Exception as error:  # whatever a damaged file leads to
            reason = ascii(f"picture {i}: {str(error) or type(error).__name__}")[1:-1]  # names hold anything
            if not skip:
                raise InputError(f"{reason}. Repair or remove it, or use --skip-bad-images") from None
            tqdm.write(f"left out {reason}")
            return np.array((-1, 0, 0), record).tobytes()

    with ThreadPoolExecutor(min(16, torch.get_num_threads())) as pool:  # Pillow works outside Python's lock
        for part in tqdm(torch.arange(len(pictures)).split(256), "decoding", leave=False, disable=None):
            file.writelines(pool.map(decode, part.tolist()))

# ---- What a run leaves: checkpoints and records ------------------------------------------------------------

def write_file(path, write, advice="make room, or make it writable; train.py goes on by --resume"):
    """Save what `write(file)` writes, under another name until it is whole: nobody ever finds half a file."""
    building = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another process may build the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(building, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        for pause in (0.1, 0.3, 1, 3):  # seconds: on Windows another program may have it open for a moment
            with suppress(PermissionError):
                return os.replace(building, path)
            time.sleep(pause)
        os.replace(building, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): {advice}") from None
    finally:
        with suppress(OSError):
            building.unlink()

def save(out, names, parts, history, **state):
    """Write the run as it is, to checkpoints of these names, and its rows to metrics.csv."""
    state |= {name: part.state_dict() for name, part in parts.items()} | dict(format=FORMAT, history=history)
    content = io.BytesIO()
    torch.save(state, content)  # into memory: then only the disk can fail
    for name in names:
        write_file(out / name, lambda file: file.write(content.getbuffer()))
    rows, form = [[*row.values()] for row in history], dict(fmt="%.10g", delimiter=",", comments="")
    try:
        write_file(out / "metrics.csv", partial(np.savetxt, X=rows, header=",".join(history[0]), **form))
    except InputError as error:  # a spreadsheet has it open, say: no reason to stop
        tqdm.write(f"warning: {error}")

def restore(saved, parts, identity):
    """Put back what `save` saved.  → step; metrics.csv's rows; loss, target_std [n, 2] of the steps after"""
    if saved is None:
        return 0, [], torch.zeros(0, 2)
    if (had := saved["pictures"]) != identity:
        raise InputError(f"the run had {had}, not {identity}: put them back, or name another --out")
    for name, part in parts.items():
        if name != "scaler" or saved[name]:  # bf16 and fp32 leave none: fp16 then begins its own
            part.load_state_dict(saved[name])
    return saved["step"], saved["history"], saved["recent"]

# ---- Command line and machine ------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Flags for these fields of Recipe, and for the machine. Only what is given appears in the result."""

    def __init__(self, names, **settings):
        about = "In brackets: the paper's value. Recipe (train.py) and Config (scott.py) explain these flags."
        super().__init__(argument_default=argparse.SUPPRESS, allow_abbrev=False, epilog=about, **settings)
        self.names = names
        for name in names:
            kind = type(default := getattr(Recipe, name))
            how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)
            self.add_argument(f"--{name.replace('_', '-')}", help=f"[{default}]", **how)
        self.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
        self.add_argument("--precision", default=None, choices=("fp32", "bf16", "fp16"), help="(by device)")
        self.add_argument("--compile", default=None, action=argparse.BooleanOptionalAction, help="(on a GPU)")

    def error(self, message):
        raise InputError(f"{message} (see --help)")

    def read(self, argv):
        """(all flags, those of the recipe that were given)"""
        args = self.parse_args(argv)
        for name, value in vars(args).items():
            if type(value) is int and value < 0:
                self.error(f"{name} is {value}, it must be 0 or more")
        return args, {name: getattr(args, name) for name in self.names if hasattr(args, name)}

def read_arguments(argv):
    parser = Parser([f.name for f in fields(Recipe)], prog="train.py", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="", help="the run's folder, a new one (default: runs/DATASET)")
    parser.add_argument("--resume", action="store_true", default=False, help="go on in the folder --out")
    parser.add_argument("--max-steps", type=int, default=0, help="stop there; the schedules stay")
    parser.add_argument("--keep-every", type=int, default=0, help="also keep every Nth epoch")
    return parser.read(argv)

def default_recipe(given):
    """The recipe with these settings. Whoever names a folder, and no data set, means the folder."""
    dataset = given.get("dataset", "folder" if "data_dir" in given else "critters")
    if dataset == "critters" and {"data_dir", "cache_dir"} & {*given}:
        raise InputError("critters are drawn: leave out --data-dir and --cache-dir, or name a --dataset")
    return Recipe(**DIFFERS.get(dataset, {}) | given | {"dataset": dataset})

def open_run(args, given):
    """(recipe, folder, None) of a new run, or with the checkpoint of the one that is to go on."""
    out = Path(args.out or f"runs/{default_recipe(given).dataset}").expanduser()
    if out.exists() and not args.resume:
        raise InputError(f"{out} is there: --resume goes on with its run, another --out begins a new one")
    if not any(out.glob("*.pt")):
        print(f"a new run, in {out}")
        return default_recipe(given), out, None
    saved = load_checkpoint(out / "ckpt.pt")
    recipe = Recipe(**saved["recipe"])
    for name, value in given.items():
        if value != getattr(recipe, name) and (name not in PLACES or recipe.dataset == "critters"):
            raise InputError(f"{out} has {name} {getattr(recipe, name)}, not {value}: name another --out")
    return replace(recipe, **given), out, saved

def choose_machine(args):
    """Choose, and print, what to compute on, the best or as asked. InputError if it cannot be had."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = args.device or next(filter(there.get, there))
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device has its own
        raise InputError(f"cannot use {name} ({str(error)[:80]}): name another --device, as cpu") from None
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
    precision, compile = "fp32", False  # compiling needs Triton, which Windows and old GPUs lack
    if device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        compile = bool(find_spec("triton")) and torch.cuda.get_device_capability(device) >= (7, 0)
    elif device.type == "cpu":
        features = getattr(torch.cpu, "get_capabilities", dict)()
        precision = "bf16" if any(map(features.get, ("avx512_bf16", "amx_bf16", "bf16"))) else "fp32"
        with suppress(AttributeError, TypeError):  # glibc has it. Freed memory is kept: to get it anew from
            mallopt = ctypes.CDLL(None).mallopt  # the system costs 8 to 13 % of a step.
            mallopt(-4, 0)  # M_MMAP_MAX: no block lives outside the heap
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
    precision = args.precision or precision
    compile = compile if args.compile is None else args.compile
    print(f"{device}, {precision}, {'compiled' if compile else 'not compiled'}")
    dtype = dict(fp32=None, bf16=torch.bfloat16, fp16=torch.float16)[precision]
    return Machine(device, dtype, compile, partial(torch.autocast, device.type, dtype, enabled=bool(dtype)))

def run(program):
    """Start a main as a process. What a user can put right is one line, a bug a traceback. Ctrl-C, SIGTERM
    and a closed terminal end it at once, but training first ends its step and saves."""
    stop = SimpleNamespace(heeded=False, signal=0)

    def hear(number, frame):
        if not stop.heeded or (stop.signal and number == signal.SIGINT):
            raise KeyboardInterrupt
        stop.signal = stop.signal or number  # a closing terminal may say so twice

    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & {*dir(signal)}:  # Windows has two of them
        if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # nohup's
            signal.signal(getattr(signal, name), hear)
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")  # some terminals know few letters
    try:
        raise SystemExit(program(stop=stop))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (InputError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print("error:", str(error).replace("\n", "\\n") or "out of memory", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        stop.heeded = False  # a notebook goes on: its Ctrl-C interrupts again

if __name__ == "__main__":
    run(main)
