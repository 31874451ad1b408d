"""Pretrain a SCOTT encoder by MIM-JEPA.

    python train.py                       little drawn animals: nothing to download, minutes on a CPU
    python train.py --dataset pets        the paper's recipe on Oxford-IIIT Pet (downloaded on first use)
    python train.py --dataset folder --data-dir my/pictures

The file in the order of a run: recipes, pictures, the cache that decodes them once, views (crops and colours,
in batches on the device), schedules, checkpoints, and the training loop, which is where to start reading.

One idea carries reproducibility. Everything random about the input of step t is drawn from generators seeded
with the run's seed and t (crops, colours, masks) or t's epoch (the order of the pictures). A batch is thus a
pure function of its step: a thread can prepare it ahead, and a resumed run sees what it would have seen.
"""

import argparse
import atexit
import hashlib
import io
import math
import os
import random
import shutil
import signal
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

try:
    import fcntl  # locks on files
    import resource  # how much memory the process takes
except ImportError:  # Windows has neither, and does without
    fcntl = resource = None

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torchvision.datasets import Flowers102, ImageFolder, OxfordIIITPet
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from scott import FORMAT, MIMJEPA, PATCH, Config, hide, load_checkpoint, sample_masks, swiglu_width

# ------------------------------------------------------------------------------------------------------------
# Recipes: every entry is also a flag (--batch-size overrides batch_size)
# ------------------------------------------------------------------------------------------------------------

RECIPE = dict(  # the paper's value of each entry, and what it is
    epochs=(300, "times each picture is seen"),
    batch_size=(64, "pictures in a step"),
    lr=(5e-4, "peak learning rate"),
    momentum=(0.996, "of the target's moving average, at the start; it rises to 1"),
    seed=(47, "of everything random"),
    pretrain_split=("all", "'all': on the test pictures too (no labels), as in the paper; or 'train'"),
    pictures=(0, "how many pictures to pretrain on, chosen at random; 0: all (critters: how many to draw)"),
    probe_epochs=(100, "epochs that eval.py trains its attentive probes for"),
    image_size=(224, "side H of the model's input, pixels"),
    cache_side=(320, "side at which decoded pictures are kept, pixels (critters: drawn at image_size)"),
    dim=(384, "width D of a token"),
    depth=(12, "blocks of the encoder"),
    heads=(4, "attention heads"),
    predictor_depth=(3, "blocks of the predictor"),
    tokenizer=("scott", "'scott' (masked convolutions), 'dense' (not masked again) or 'patch' (plain ViT)"),
    dropout=(0.2, "on the tokens and on the output of attention"),
    attention_dropout=(0.1, "on the attention weights"),
    drop_path=(0.1, "chance to skip the branches of the last block, rising from 0 at the first"),
    mask_ratio=(0.6, "share of the tokens hidden from the context encoder"),
    masking=("block", "'block' (visible rectangles) or 'random' (visible tokens)"),
)
PAPER = {name: value for name, (value, _) in RECIPE.items()}
RECIPES = {
    # Small enough for a CPU: the sizes and epochs fit into ten minutes. Pictures, batch size, learning rate,
    # momentum and mask ratio were picked by the linear probe on critters drawn from a third seed.
    "critters": PAPER | dict(
        pictures=8000, epochs=13, batch_size=32, lr=3e-4, momentum=0.99, mask_ratio=0.5, probe_epochs=4,
        image_size=64, dim=128, depth=4, dropout=0.0, attention_dropout=0.0, drop_path=0.0,
    ),
    "pets": PAPER,
    "flowers": PAPER,
    "imagenet100": PAPER,
    "folder": PAPER,
}  # fmt: skip
# What a checkpoint keeps beside these: which pictures, where, and whether some may be left out.
PLACE = dict(dataset="critters", data_dir="data", skip_bad_images=False)


def stop(message):
    """End the program over something its user can put right: one line on stderr, exit status 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, whatever bar is being drawn
    raise SystemExit(2)


def generator_for(*key):
    """A torch.Generator for a key of whole numbers: the same key, the same draws.

    The keys: (seed, 0, epoch) order of the pictures; (seed, 1, step) crops, colours, masks; (seed, 2) which
    pictures; (seed, 3, step, rank) dropout under torchrun; in eval.py (seed, 4) labels, (seed, 5) examples.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def write_whole(path, write):
    """Save what `write(file)` writes, under another name until it is whole: nobody ever finds half a file."""
    content = io.BytesIO()  # so that only the disk can fail below
    write(content)
    building = path.with_name(f"{path.name}.tmp")
    try:
        with open(building, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(building, path)
    except OSError as error:
        building.unlink(missing_ok=True)
        stop(
            f"cannot write {path} ({error.strerror}); what was saved before is whole. Make room or mend the "
            "folder, and start again (train.py: with --resume)"
        )


def memory(device):
    """All the memory the device has, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


# ------------------------------------------------------------------------------------------------------------
# Critters: a data set drawn by the computer
# ------------------------------------------------------------------------------------------------------------

# A species is a form: proportions, ears, eyes, pattern, tail, legs, and which of these parts match. Colours,
# place, size and pose come from the picture's seed, whatever the species, so no colour tells species apart.
# But who knows the species knows that hidden legs have the colour of the head in sight, and not that of the
# tail. That is what predicting hidden places should teach: to foretell one part from another.

CANVAS = 320  # critters are drawn this large, facing right, then shrunk, which smooths their edges

Species = namedtuple("Species", "name body head ears eyes pattern tail legs paint")
SPECIES = (  # body: half its width and height, head: its radius, in canvas pixels
    # paint: which of three colours head, ears, pattern, tail and legs have; the body has number 0
    Species("tigrot",  (56, 34), 34, "pointed", 2, "stripes", "long", 4, (0, 1, 1, 2, 1)),
    Species("mousen",  (50, 40), 36, "round",   2, "plain",   "long", 4, (1, 0, 0, 1, 2)),
    Species("puffit",  (40, 44), 44, "none",    3, "dots",    "puff", 2, (2, 0, 2, 0, 1)),
    Species("foxel",   (66, 36), 30, "long",    2, "plain",   "puff", 4, (1, 1, 0, 2, 0)),
    Species("cyclox",  (44, 44), 42, "horns",   1, "stripes", "none", 2, (1, 2, 2, 0, 2)),
    Species("zebbit",  (66, 40), 30, "none",    1, "dots",    "long", 6, (2, 0, 1, 2, 0)),
    Species("moodle",  (38, 54), 32, "long",    3, "plain",   "none", 2, (1, 2, 0, 0, 1)),
    Species("bumbear", (52, 44), 44, "round",   1, "dots",    "puff", 6, (0, 2, 2, 1, 1)),
    Species("dashel",  (56, 34), 32, "horns",   2, "dots",    "long", 4, (2, 1, 1, 1, 2)),
    Species("wuffle",  (42, 40), 38, "pointed", 3, "stripes", "puff", 6, (1, 0, 2, 0, 0)),
)  # fmt: skip

# Parts are strings of beads (x, y, radius), y pointing down; draw_beads fills the gaps between the beads.
EARS = {  # the right ear, in radii of the head
    "none": [],
    "pointed": [(0.5, -0.6, 0.5), (0.9, -1.6, 0.1)],
    "round": [(0.85, -0.8, 0.55)],
    "long": [(0.4, -0.8, 0.3), (0.5, -2.0, 0.35)],
    "horns": [(0.6, -0.7, 0.3), (1.3, -1.6, 0.1)],
}
PATTERNS = {  # several strings each, in radii of the body
    "plain": [],
    "dots": [[(x, y, 0.17)] for x in (-0.5, 0, 0.45) for y in (-0.35, 0.35)],
    "stripes": [
        [(x, -y, 0.12), (x, y, 0.12)] for x, y in ((-0.5, 0.6), (-0.17, 0.7), (0.17, 0.7), (0.5, 0.6))
    ],
}
TAILS = {  # in pixels, from the left end of the body
    "none": [],
    "long": [(8, 4, 14), (-16, -6, 14), (-28, -32, 14), (-30, -64, 14)],
    "puff": [(-10, -8, 30)],
}


def draw_oval(pen, x, y, rx, ry, colour):
    pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)


def draw_beads(pen, x, y, beads, colour, scale_x=1, scale_y=1):
    beads = [(x + scale_x * dx, y + scale_y * dy, scale_y * r) for dx, dy, r in beads]
    for start, end in zip(beads, beads[1:] + beads[-1:]):  # the last bead ends in itself
        steps = 1 + round(math.dist(start, end) / 3)
        for step in range(steps):
            at_x, at_y, r = (a + (b - a) * step / steps for a, b in zip(start, end))
            draw_oval(pen, at_x, at_y, r, r, colour)


def distinct_colours(rng, count):
    colours = []
    while len(colours) < count:
        colour = tuple(rng.randbytes(3))
        if all(math.dist(colour, other) > 90 for other in colours):
            colours.append(colour)
    return colours


def draw_critter(species, seed, side=64):
    """One critter, side × side px, RGB. The same seed dresses and poses all species alike, every time."""
    form, rng = SPECIES[species], random.Random(seed)
    background, *colours = distinct_colours(rng, 4)
    head, ears, pattern, tail, legs = (colours[number] for number in form.paint)
    swing, tilt, flip = rng.uniform(-10, 10), rng.uniform(-14, 14), rng.random() < 0.5
    window = rng.uniform(197, 256)  # how much of the canvas is seen
    left, top = (CANVAS - window) / 2 + rng.uniform(-30, 30), (CANVAS - window) / 2 + rng.uniform(-15, 15)

    canvas = Image.new("RGB", (CANVAS, CANVAS), background)
    pen = ImageDraw.Draw(canvas)
    x, y, (rx, ry) = CANVAS / 2 - 6, CANVAS / 2, form.body
    for leg in range(form.legs):
        hip = 1.6 * rx * ((leg + 0.5) / form.legs - 0.5)
        draw_beads(pen, x, y, [(hip, 0, 10), (hip + swing, ry + 36, 10)], legs)
    draw_beads(pen, x - rx, y, TAILS[form.tail], tail)
    draw_oval(pen, x, y, rx, ry, colours[0])
    for beads in PATTERNS[form.pattern]:
        draw_beads(pen, x, y, beads, pattern, rx, ry)

    x, y, r = x + 0.85 * rx, y - 0.7 * ry, form.head
    draw_beads(pen, x, y, EARS[form.ears], ears, r, r)
    draw_beads(pen, x, y, EARS[form.ears], ears, -r, r)
    draw_oval(pen, x, y, r, r, head)
    eye = 12 / math.sqrt(form.eyes)  # the more, the smaller: the amount of white doesn't count them
    for i in range(form.eyes):
        eye_x = x + 3 + 2.1 * eye * (i - (form.eyes - 1) / 2)
        draw_oval(pen, eye_x, y - 4, eye, eye, "white")
        draw_oval(pen, eye_x + 0.3 * eye, y - 4, eye / 2, eye / 2, "black")

    canvas = canvas.rotate(tilt, fillcolor=background)
    if flip:
        canvas = ImageOps.mirror(canvas)
    box = left, top, left + window, top + window
    picture = canvas.resize((side, side), Image.Resampling.BOX, box)
    grain = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
    return Image.blend(picture, grain, 0.04)


def critters(count, seed):
    """`count` pictures for draw_critter, as (species, picture seed), the species in turn."""
    rng = random.Random(seed)
    return [(i % len(SPECIES), rng.getrandbits(32)) for i in range(count)]


# ------------------------------------------------------------------------------------------------------------
# Pictures: what there is to train on
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Pictures:
    """A data set as a list. The first `train` items are its training split, the rest its test split."""

    items: list  # what open_picture opens: a path, or the (species, seed) of a critter
    labels: list  # the class of each item, −1 where nobody says
    classes: list  # the names of the classes
    train: int


def list_pictures(dataset, data_dir, count=0):
    """Find a data set's pictures; torchvision downloads pets and flowers first. count: how many critters."""
    data_dir = Path(data_dir)
    if dataset == "critters":
        if count < 20:
            stop(f"pictures is {count}, critters need 20 or more")
        test = count // 4
        parts = [critters(count - test, seed=0), critters(test, seed=1)]
        parts = [(part, [species for species, _ in part]) for part in parts]
        classes = [form.name for form in SPECIES]
    elif dataset == "pets":
        splits = download(OxfordIIITPet, data_dir, ("trainval", "test"))
        parts, classes = [(split._images, split._labels) for split in splits], splits[0].classes
    elif dataset == "flowers":
        splits = download(Flowers102, data_dir, ("train", "val", "test"))
        parts, classes = [(split._image_files, split._labels) for split in splits], splits[0].classes
    else:
        # ImageNet's own test folder has no labels: it is left alone.
        names = ("train", "val") if dataset == "imagenet100" else ("train", "val", "test")
        parts, classes = list_folder(data_dir, names)
    items, labels = [sum(map(list, column), []) for column in zip(*parts)]
    return Pictures(items, labels, classes, len(items) - len(parts[-1][0]) if len(parts) > 1 else len(items))


def download(dataset, data_dir, splits):
    """All splits of one of torchvision's data sets, which it downloads and checks on first use."""
    try:
        return [dataset(data_dir, split, download=True) for split in splits]
    except (OSError, RuntimeError) as error:  # no network, no room, or not the files that were expected
        pets = "images.tar.gz and annotations.tar.gz, unpacked, of www.robots.ox.ac.uk/~vgg/data/pets"
        flowers = "102flowers.tgz, imagelabels.mat, setid.mat of www.robots.ox.ac.uk/~vgg/data/flowers/102"
        files, folder = (pets, "oxford-iiit-pet") if dataset is OxfordIIITPet else (flowers, "flowers-102")
        stop(f"cannot get {dataset.__name__} ({error}). By hand: put {files} into {Path(data_dir) / folder}")


def list_folder(data_dir, names):
    """Read train/<class>/… and val/<class>/… or test/<class>/…, or else any folder of unlabelled pictures.

    names: of the folders that are splits, where they exist. Returns one (paths, labels) for each split, and
    the names of the classes. The last split is for testing, all before it are for training.
    """
    if not data_dir.is_dir():
        stop(f"there is no folder {data_dir}: name the folder of your pictures by --data-dir")
    splits = [data_dir / name for name in names if (data_dir / name).is_dir()]
    if data_dir / "train" not in splits or not any(path.is_dir() for path in (data_dir / "train").iterdir()):
        names = (path for path in data_dir.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        # What lies beside a checkpoint is what a run has drawn, not what it is to learn from.
        paths = sorted(path for path in names if not path.is_dir() and not (path.parent / "ckpt.pt").exists())
        if not paths:
            stop(f"no pictures in {data_dir} (their names must end in {' '.join(IMG_EXTENSIONS)})")
        return [(paths, [-1] * len(paths))], []
    try:
        splits = [ImageFolder(split) for split in splits]
    except FileNotFoundError as error:  # a class without pictures, or a split without classes
        stop(f"{data_dir}: {str(error).splitlines()[0]}")
    if any(split.classes != splits[0].classes for split in splits):
        stop(f"{' and '.join(split.root for split in splits)} must have the same folders, one a class")
    return [tuple(zip(*split.samples)) for split in splits], splits[0].classes


def open_picture(item, side):
    """A picture as a Pillow RGB image, turned as a viewer shows it. side: pixels to draw a critter at."""
    if isinstance(item, tuple):
        return draw_critter(*item, side)
    with Image.open(item) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits: Pillow would cut off all that is brighter than 255
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


# ------------------------------------------------------------------------------------------------------------
# Cache: every picture decoded once
# ------------------------------------------------------------------------------------------------------------


def check_writable(folder):
    """Stop unless `folder` can be written to, or made: told before hours of work, not after."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        fine = there.is_dir() and os.access(there, os.W_OK)
    except (OSError, ValueError):  # a name too long, or with characters that no name can have
        fine = False
    if not fine:
        stop(f"cannot write to {folder}: make it writable, or name another folder (--out, --data-dir)")


def load_pixels(pictures, dataset, data_dir, out, recipe):
    """All pictures as one array, uint8 [n, 3, S, S], and their true (width, height), float [n, 2].

    Decoding a JPEG costs more than a GPU's training step on it, so it happens once: the array is a file in
    data_dir/cache (out/cache if data_dir is read-only), mapped into memory, and rebuilt when the files, their
    sizes or dates have changed. Each picture is squeezed to a square. That loses no geometry: crops are drawn
    in its true proportions, and crop_and_resize, which scales the two axes separately, undoes the squeeze.
    With a side of 320 the smallest crop (a fifth of the area) still has 143 px for the model's 224, and
    ImageNet-100 takes 40 GB. Files that are not pictures stop the program, or get size 0 × 0 with
    skip_bad_images.
    """
    if dataset == "critters":  # drawn at the size they are used at, in seconds: nothing to keep
        shape = len(pictures.items), 3, recipe["image_size"], recipe["image_size"]
        if math.prod(shape) > memory(torch.device("cpu")):
            stop(f"{shape[0]:,} critters of {shape[2]} px do not fit into memory: lower --pictures")
        pixels = np.empty(shape, np.uint8)
        return torch.from_numpy(pixels), fill(pixels, pictures.items, "drawing critters")
    side = recipe["cache_side"]
    try:
        files = [(os.path.relpath(path, data_dir), os.stat(path)) for path in pictures.items]
    except OSError as error:  # such as a link to nowhere
        stop(f"cannot read {error.filename} ({error.strerror}): mend it, remove it, or unpack it again")
    stamp = repr([(path, info.st_size, info.st_mtime_ns) for path, info in files])
    name = f"{dataset}-{side}-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}.npy"
    folder = Path(data_dir) / "cache"
    if not (folder / name).exists() and not os.access(data_dir, os.W_OK):
        folder = Path(out) / "cache"
    target = folder / name
    sizes_file = target.with_suffix(".sizes.npy")
    if not target.exists():
        check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:  # let go of even by a killed process
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once: one builds, the other waits here
            if not target.exists():
                # What is there is of other pictures, or of a build that was killed.
                for old in folder.glob(f"{dataset}-{side}-{'?' * 16}.*"):
                    old.unlink()
                build_cache(target, sizes_file, pictures.items, side)
    pixels = np.load(target, mmap_mode="c")  # copy on write: writable for torch, the file stays as it is
    sizes = torch.from_numpy(np.load(sizes_file))
    bad = (sizes[:, 0] == 0).nonzero().flatten().tolist()
    if bad and not recipe["skip_bad_images"]:
        others = f", nor are {len(bad) - 1} others" if len(bad) > 1 else ""
        stop(f"{pictures.items[bad[0]]} is not a readable picture{others}: mend, remove or --skip-bad-images")
    return torch.from_numpy(pixels), sizes


def build_cache(target, sizes_file, items, side):
    """Decode all pictures into one file, which gets its name only when it is whole."""
    need, room = len(items) * 3 * side**2, shutil.disk_usage(target.parent).free
    if need > room:
        stop(
            f"the decoded pictures need {need / 1e9:.1f} GB in {target.parent}, where {room / 1e9:.1f} are "
            "free: make room, or lower --cache-side"
        )
    print(f"decoding {len(items):,} pictures once, to {need / 1e9:.2f} GB in {target.parent}")
    building = target.with_suffix(".tmp")
    pixels = np.lib.format.open_memmap(building, mode="w+", dtype=np.uint8, shape=(len(items), 3, side, side))
    sizes = fill(pixels, items, "decoding")
    pixels.flush()
    write_whole(sizes_file, lambda file: np.save(file, sizes.numpy()))
    os.replace(building, target)


def fill(pixels, items, what):
    """Decode every item into its row of `pixels`, by all cores; returns their true sizes, float [n, 2].

    A file that is not a whole picture has size 0 × 0.
    """
    side = pixels.shape[-1]

    def decode(i):
        try:
            image = open_picture(items[i], side)
        except Exception as error:  # a damaged file can lead Pillow to any error
            if isinstance(error, OSError) and error.errno:  # but this is the system's: the file may be whole
                error.filename = error.filename or items[i]  # a failed read, unlike open, does not say
                raise
            return 0, 0
        pixels[i] = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        return image.size

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and resizes outside Python's lock
        sizes = tqdm(pool.map(decode, range(len(items))), what, len(items), leave=False, disable=None)
        try:
            return torch.tensor(list(sizes), dtype=torch.float32)
        except OSError as error:
            stop(f"cannot read {error.filename} ({error.strerror}): make it readable or remove it")


# ------------------------------------------------------------------------------------------------------------
# Views: crops and colours, drawn for each picture, computed for all at once
# ------------------------------------------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which everyone uses


def draw_crops(sizes, generator, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), tries=10):
    """Random resized crops, drawn as torchvision draws them.

    sizes [B, 2] width, height in pixels  →  [B, 4] left, top, width, height as shares of the picture.
    A crop covers a uniform share of the area and has a log-uniform aspect ratio. If ten tries do not fit into
    the picture, it is the largest centred crop of an allowed ratio.
    """
    B = len(sizes)
    size = sizes[:, None]  # [B, 1, 2]
    area = size.prod(-1) * torch.empty(B, tries).uniform_(*scale, generator=generator)
    aspect = torch.empty(B, tries).uniform_(*map(math.log, ratio), generator=generator).exp()
    crop = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=-1).round()  # [B, tries, 2]
    fits = ((crop > 0) & (crop <= size)).all(-1)  # [B, tries]
    first = fits.int().argmax(1)  # the first try that fits
    crop = crop[torch.arange(B), first]  # [B, 2]
    corner = (torch.rand(B, 2, generator=generator) * (sizes - crop + 1)).floor()

    largest = torch.minimum(sizes, torch.stack([sizes[:, 1] * ratio[1], sizes[:, 0] / ratio[0]], -1).round())
    fits = fits.any(1)[:, None]
    crop = torch.where(fits, crop, largest)
    corner = torch.where(fits, corner, ((sizes - largest) / 2).floor())
    return torch.cat([corner / sizes, crop / sizes], dim=1)


def centre_crops(sizes):
    """The test-time crop, [B, 4] as above: the central square, 224/256 of the shorter side."""
    side = sizes.amin(1, keepdim=True) * 224 / 256 / sizes  # [B, 2] shares
    return torch.cat([(1 - side) / 2, side], dim=1)


# How much of each operation: brightness, contrast, saturation, hue, grey (no choice), blur (sigma in pixels).
RANGES = ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), (0.0, 0.0), (0.1, 2.0))


def draw_colours(count, generator):
    """Which colour operations each of `count` views gets, in which order, and how much: tensors [count, 6].

    With probability 0.6, in random order: colour jitter (itself four operations in random order), grey, blur.
    order[i, k] is view i's k-th operation, active[i, o] whether it gets operation o, factor[i, o] how much.
    """
    group = torch.tensor([0, 0, 0, 0, 1, 2])  # jitter's four operations stay together
    rank = torch.rand(count, 3, generator=generator).argsort(1)  # which group comes when
    order = (rank[:, group] + torch.rand(count, 6, generator=generator)).argsort(1)
    chance = torch.tensor([0.8, 0.1, 0.3])
    active = (torch.rand(count, 3, generator=generator) < chance)[:, group]
    active &= torch.rand(count, 1, generator=generator) < 0.6
    low, high = torch.tensor(RANGES).T
    return order, active, low + (high - low) * torch.rand(count, 6, generator=generator)


def resize_matrix(start, length, source, out):
    """One axis of crop-and-resize as a matrix: [B, out, source] weights, rows summing to 1.

    This is antialiased bicubic interpolation (Keys, a = −1/2), the same as Pillow's: every output pixel is a
    weighted mean of the source pixels around it, over a wider range when shrinking. As a matrix it costs
    little beside the model, runs anywhere, and lets each picture of a batch have its own crop.
    start, length [B]: the crop, in source pixels
    """
    scale = (length / out)[:, None]  # source pixels for each output pixel
    centre = start[:, None] + (torch.arange(out, device=start.device) + 0.5) * scale  # [B, out]
    pixel = torch.arange(source, device=start.device) + 0.5  # [source]
    x = (pixel - centre[:, :, None]).abs() / scale.clamp(min=1)[:, :, None]  # [B, out, source]
    near, far = 1 + x * x * (1.5 * x - 2.5), 2 + x * (-4 + x * (2.5 - 0.5 * x))
    weight = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    slack = (1.02 - length).clamp(min=0) / 2  # a crop thinner than a pixel must still hold one's centre
    first, last = (start - slack)[:, None], (start + length + slack)[:, None]
    inside = (pixel > first) & (pixel < last)  # nothing from beyond the crop
    weight = weight * inside[:, None]
    return weight / weight.sum(dim=2, keepdim=True)


def crop_and_resize(pixels, crops, flip, out):
    """Cut a crop out of each picture and scale it: uint8 [B, 3, S, S] → float [B, 3, out, out] from 0 to 1.

    crops [B, 4]: left, top, width, height as shares of the picture. flip bool [B] or None: mirror it?
    """
    side = pixels.shape[-1]
    left, top, width, height = (crops * side).unbind(1)
    across, down = resize_matrix(left, width, side, out), resize_matrix(top, height, side, out)  # [B, out, S]
    if flip is not None:
        across = torch.where(flip[:, None, None], across.flip(1), across)
    images = down[:, None] @ (pixels.float() / 255) @ across.transpose(1, 2)[:, None]
    return images.clamp(0, 1)  # bicubic weights can be negative and overshoot


def to_device(tensor, device):
    """A copy on the device. A GPU's is made without waiting for it, which is safe from pinned memory only."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def luminance(images):
    """[B, 3, H, W] → [B, 1, H, W]"""
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def brightness(images, factor):
    return (images * factor).clamp(0, 1)


def contrast(images, factor):
    return (images * factor + luminance(images).mean((2, 3), keepdim=True) * (1 - factor)).clamp(0, 1)


def saturation(images, factor):
    return (images * factor + luminance(images) * (1 - factor)).clamp(0, 1)


def hue(images, shift):
    """Turn the colour wheel by `shift` of a full turn: RGB to hue, saturation, value, and back."""
    value, least = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - least
    red, green, blue = images.split(1, dim=1)
    turn = torch.where(value == red, green - blue, torch.where(value == green, blue - red, red - green))
    turn = turn / chroma.clamp(min=1e-12) + torch.where(value == red, 0, torch.where(value == green, 2, 4))
    turn = turn + 6 * shift  # the hue, in sixths of a turn
    k = torch.cat([turn + 5, turn + 3, turn + 1], dim=1) % 6  # [B, 3, H, W]
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def grey(images, factor):
    return luminance(images).expand_as(images)


def blur(images, sigma):
    """9×9 Gaussian blur with reflected borders, one sigma a picture, as one banded matrix on either side."""
    H = images.shape[-1]
    offset = torch.arange(-4, 5, device=images.device)
    weight = torch.softmax(-0.5 * (offset / sigma.view(-1, 1)) ** 2, dim=1)  # [B, 9]
    place = torch.arange(-4, H + 4, device=images.device).abs()
    place = torch.where(place < H, place, 2 * H - 2 - place)  # mirrored at both ends: [H + 8]
    pixel = torch.arange(H, device=images.device)
    taps = (place[:, None] == pixel).float().unfold(0, 9, 1)  # [H, H, 9]: which pixel each output's taps read
    matrix = (taps @ weight.T).permute(2, 0, 1)[:, None]  # [B, 1, H, H]
    return matrix @ images @ matrix.transpose(2, 3)


OPERATIONS = (brightness, contrast, saturation, hue, grey, blur)


def apply_colours(images, order, active, factor, operations=OPERATIONS):
    """Apply to each image its own operations, in its own order. Changes `images` [B, 3, H, W] in place.

    order and active (from draw_colours) stay on the CPU, where the rows that an operation touches are found
    without asking the device.
    """
    factor = to_device(factor, images.device)
    for step in range(order.shape[1]):
        for number, operation in enumerate(operations):
            rows = (active[:, number] & (order[:, step] == number)).nonzero().squeeze(1)
            if len(rows):
                if len(rows) == 1:  # rare, and would be compiled anew
                    operation = OPERATIONS[number]
                rows = to_device(rows, images.device)
                images[rows] = operation(images[rows], factor[rows, number].view(-1, 1, 1, 1))
    return images


def normalise(images):
    """Subtract the mean and divide by the deviation of ImageNet's colours."""
    return torch.cat([(c - mean) / std for c, mean, std in zip(images.split(1, dim=1), MEAN, STD)], dim=1)


def worker(device):
    """A thread to work beside the training.

    If that runs on the CPU too, the thread keeps to one core: where both spread over all of them, they wait
    for each other (on two, 180 critters a second instead of 250).
    """
    cores = torch.get_num_threads()  # to ask settles this thread's own number, before another's is set
    cores = 1 if device.type == "cpu" else cores
    return ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(cores,))


class Loader:
    """Makes the batch of a step: picks its pictures, draws crops, colours and masks, all from (seed, step).

    `batches` yields them one by one, `views` then makes on the device what the model sees.

    rows: which pictures to use, long [n]. Each epoch takes them in a new random order, and leaves out what
    does not fill a batch.
    """

    def __init__(self, pixels, sizes, rows, batch_size, seed, device, rank=0, ranks=1, use_compile=False):
        self.sizes, self.rows, self.batch_size, self.seed, self.device = sizes, rows, batch_size, seed, device
        self.share = torch.arange(rank, batch_size, ranks)  # of each batch; all of it unless under torchrun
        # A small data set lives on the GPU, next to where it is used.
        fits = device.type == "cuda" and pixels.numel() < torch.cuda.mem_get_info(device)[0] / 4
        self.pixels = pixels.to(device) if fits else pixels
        self.steps_per_epoch = len(rows) // batch_size
        self.waited = 0.0  # seconds, for batches that were not ready
        # Compiled, the dozens of small steps of an operation become a kernel or two.
        functions = crop_and_resize, normalise, *OPERATIONS
        if use_compile:
            functions = [torch.compile(function, fullgraph=True) for function in functions]
        self.crop_and_resize, self.normalise, *self.operations = functions

    def pick(self, step):
        """The rows of step 1, 2, …: a slice of the epoch's random order."""
        epoch, i = divmod(step - 1, self.steps_per_epoch)
        order = torch.randperm(len(self.rows), generator=generator_for(self.seed, 0, epoch))
        return self.rows[order[i * self.batch_size : (i + 1) * self.batch_size]]

    def read(self, rows):
        """The pictures' pixels on the device, uint8 [B, 3, S, S]."""
        return to_device(self.pixels[to_device(rows, self.pixels.device)], self.device)

    def batch(self, step, views, masks=None):
        """Everything that step needs, drawn and read: a tuple for `views`, the rows, and the masks.

        views: how many to make of each picture; masks: (grid, mask_ratio, masking) for sample_masks.
        """
        rows, generator = self.pick(step), generator_for(self.seed, 1, step)
        crops = draw_crops(self.sizes[rows], generator)
        flip = torch.rand(len(rows), generator=generator) < 0.5
        colours = draw_colours(views * len(rows), generator)
        visible = sample_masks(len(rows), *masks, generator) if masks else None

        rows, crops, flip = rows[self.share], crops[self.share], flip[self.share]
        colours = [drawn.view(views, -1, 6)[:, self.share].flatten(0, 1) for drawn in colours]
        visible = to_device(visible[self.share], self.device) if masks else None
        crops, flip = to_device(crops, self.device), to_device(flip, self.device)
        return (self.read(rows), crops, flip, colours), rows, visible

    def batches(self, first, last, **options):
        """Yield (step, what `batch` makes of it), first to last: a thread makes each one step ahead."""
        with worker(self.device) as thread:
            upcoming = thread.submit(self.batch, first, **options)
            for step in range(first, last + 1):
                asked = time.perf_counter()
                batch = upcoming.result()
                self.waited += time.perf_counter() - asked
                if step < last:
                    upcoming = thread.submit(self.batch, step + 1, **options)
                yield step, batch

    def views(self, pixels, crops, flip, colours, image_size):
        """Normalised views [V·B, 3, H, H]: one crop of each picture, V times, each with its own colours."""
        images = self.crop_and_resize(pixels, crops, flip, image_size)
        images = images.repeat(len(colours[0]) // len(images), 1, 1, 1)
        return self.normalise(apply_colours(images, *colours, self.operations))


# ------------------------------------------------------------------------------------------------------------
# Optimisation
# ------------------------------------------------------------------------------------------------------------


def schedules(step, total_steps, warmup_steps, *, start_lr=1e-6, peak_lr=5e-4, end_lr=1e-5, flat=0.72,
              start_decay=0.04, end_decay=0.4, start_momentum=0.996, end_momentum=1.0):  # fmt: skip
    """(learning rate, weight decay, EMA momentum) of step 1 … total_steps.

    The learning rate climbs in a line, stays at its peak for `flat` of the steps that are left, and falls
    along half a cosine. Weight decay and momentum change in a line over the whole run: the target slows down
    until, at the end, it stands still.
    """
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


def training_flops(config):
    """Floating-point operations to train on one image, a multiply and an add being two: 51.4e9 by default.

    The target encoder runs forward only. Context encoder and predictor run forward and backward, which costs
    twice as much again: one product for the gradient of the weights, one for that of the input. The image
    needs no gradient, so the first layer is spared the second.
    """
    H, D, N = config.image_size, config.dim, config.tokens

    def transformer(depth):
        return depth * (2 * N * D * (4 * D + 3 * swiglu_width(D)) + 4 * N * N * D)

    if config.tokenizer == "patch":
        first, rest = 2 * N * 3 * PATCH**2 * D, 0
    else:
        first = 2 * 49 * 3 * 64 * (H // 2) ** 2
        rest = 2 * 49 * 64 * D * (H // 8) ** 2 + 2 * 9 * (64 * (H // 4) ** 2 + D * (H // 16) ** 2)
    encoder = first + rest + transformer(config.depth)
    predictor = transformer(config.predictor_depth) + 2 * N * D * D
    return encoder + 3 * (encoder + predictor) - first


def make_optimizer(parameters, device):
    """AdamW in two groups: matrices, whose weight decay is scheduled, and vectors, which have none."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1]},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=device.type != "mps")


def set_schedule(optimizer, lr, weight_decay):
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def choose_device(name=None):
    """The device called `name`, or the best there is."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.split(":")[0] not in ("cuda", "mps", "cpu"):
        stop(f"device is {name!r}, it must be cuda, mps or cpu")
    if name == "cuda":  # under torchrun each process has a GPU of its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        stop(f"device {name} is not there; leave --device out to use the best there is")
    return device


def choose_precision(name, device):
    """(dtype for autocast or None for plain float32, whether gradients need scaling)"""
    on_gpu = device.type == "cuda"
    has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if name is None:
        name = "fp32" if not on_gpu else "bf16" if has_bf16 else "fp16"
    if name == "bf16" and not has_bf16:
        stop("this GPU cannot do bf16; use --precision fp16")
    # In fp16 small gradients would round to zero: they are scaled up, and down again before the step.
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name], name == "fp16"


# ------------------------------------------------------------------------------------------------------------
# What a run leaves behind
# ------------------------------------------------------------------------------------------------------------

COLUMNS = (
    "epoch step loss learning_rate weight_decay momentum target_std "
    "images_per_s seconds wait tflops memory_gb"
).split()


def save_metrics(path, rows):
    lines = [",".join(COLUMNS)] + [",".join(f"{row[name]:.9g}" for name in COLUMNS) for row in rows]
    write_whole(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))


def peak_memory_gb(device):
    """The most memory this run has used so far: the GPU's, or the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def copied(value):
    """The same dicts and lists with their tensors copied to the CPU, while the originals train on."""
    if isinstance(value, dict):
        return {name: copied(item) for name, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def save_checkpoint(state, *paths):
    for path in paths:
        write_whole(path, lambda file: torch.save(state, file))


def target_deviation(target):
    """The collapse watch: how much a channel varies from image to image, mean over channels and places.

    [B, N, D] normalised target tokens → scalar. Near 1 all images are told apart; at 0 the encoder says the
    same about every image, even if it still tells one place from another.
    """
    return target.float().std(dim=0).mean()


def save_image(path, image):
    """Save float [3, H, W] from 0 to 1 as a PNG."""
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    write_whole(path, lambda file: Image.fromarray(array).save(file, "PNG"))


def save_views(path, context_images, target_images, visible, count=6):
    """Save what the model sees, a row an image: context view, the same with its mask, target view."""
    context, target, grid = context_images[:count], target_images[:count], math.isqrt(visible.shape[1])
    shown = hide(context, visible[:count].view(-1, 1, grid, grid))  # 0, the mean colour, in the hidden cells
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    columns = [F.pad(x.cpu() * std + mean, (2, 2, 2, 2), value=1.0) for x in (context, shown, target)]
    save_image(path, torch.cat(list(torch.cat(columns, dim=3)), dim=1))


def draw_curves(path, steps, curves):
    """Save a picture of figures over steps, a panel each: curves is {title: one number a step}."""
    width, height, edge = 640, 120, 20
    canvas = Image.new("RGB", (width, height * len(curves)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (title, values) in enumerate(curves.items()):
        low, high = min(values), max(values)
        top, bottom = height * i + edge, height * (i + 1) - edge
        across = np.interp(steps, (steps[0], steps[-1]), (edge, width - edge))
        points = list(zip(across, np.interp(values, (low, high), (bottom, top))))
        pen.rectangle((edge, top, width - edge, bottom), outline="lightgrey")
        pen.line(points, fill="black", width=2)
        title = f"{title}: {low:.4g} to {high:.4g}; steps {steps[0]} to {steps[-1]}"
        pen.text((edge, top - 16), title, "black")
    write_whole(path, lambda file: canvas.save(file, "PNG"))


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        stop(f"{message} (see --help)")


def add_device_arguments(parser):
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="(default: by device)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="(default: on cuda only)")


def read_arguments(argv):
    """Parse the command line: (all that is not part of the recipe, the recipe's entries that were given)."""
    parser = Parser("train.py", description="Pretrain a SCOTT encoder by MIM-JEPA.")
    parser.add_argument("--dataset", choices=RECIPES, default="critters", help="(default: critters)")
    parser.add_argument("--data-dir", help="where it is, or will be (default: data)")
    parser.add_argument("--skip-bad-images", action="store_true", help="leave out files that cannot be read")
    parser.add_argument("--out", help="where the run's files go (default: runs/DATASET)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    never = dict(type=int, default=math.inf)
    parser.add_argument("--max-steps", **never, help="stop after so many; the schedules stay as they are")
    parser.add_argument("--keep-every", **never, help="also keep every Nth epoch, as ckpt-EPOCH.pt")
    add_device_arguments(parser)
    rule = "Every entry of a recipe is a flag. In brackets: the paper's value (critters has its own)."
    group = parser.add_argument_group("recipe", rule)
    for name, (value, about) in RECIPE.items():
        flag, kind = f"--{name.replace('_', '-')}", type(value)
        group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=f"{about} [{value}]")
    args = parser.parse_args(argv)
    for name in ("max_steps", "keep_every"):
        if getattr(args, name) < 1:
            stop(f"{name} is {getattr(args, name)}, it must be 1 or more")
    given = {name: getattr(args, name) for name in PAPER if getattr(args, name) is not None}
    return args, given


def check_recipe(recipe):
    """Stop at the first entry that cannot work; returns the model's Config."""
    for name, holds, must_be in [
        ("epochs", recipe["epochs"] >= 1, "1 or more"),
        ("probe_epochs", recipe["probe_epochs"] >= 1, "1 or more"),
        ("batch_size", recipe["batch_size"] >= 2, "2 or more: target_std compares images"),
        ("cache_side", 16 <= recipe["cache_side"] <= 8192, "from 16 to 8192"),
        ("lr", 0 < recipe["lr"] < math.inf, "more than 0"),
        ("momentum", 0 <= recipe["momentum"] <= 1, "from 0 to 1"),
        ("seed", 0 <= recipe["seed"] < 2**63, "0 or more"),
        ("pictures", 0 <= recipe["pictures"] <= 10**7, "0 (all) or up to ten million"),
        ("pretrain_split", recipe["pretrain_split"] in ("all", "train"), "'all' or 'train'"),
    ]:
        if not holds:
            stop(f"{name} is {recipe[name]!r}, it must be {must_be}")
    try:
        return Config(**{name: recipe[name] for name in Config.__dataclass_fields__})
    except ValueError as error:
        stop(error)


def check_memory(config, recipe, device, ranks):
    """Stop a run that is sure not to fit, before it brings the machine to a halt.

    A lower bound: a weight, its gradient and AdamW's two moments; the target's weights; of each token in each
    block, what the gradient needs to be there still: some 12 numbers a channel, in 16 bits at least.
    """
    D = config.dim
    block = 4 * D * D + 3 * D * swiglu_width(D)
    blocks = config.depth + config.predictor_depth
    tokens = recipe["batch_size"] // ranks * config.tokens
    need = 16 * block * blocks + 4 * block * config.depth + 2 * 12 * D * tokens * blocks
    room = memory(device)
    if need > room:
        stop(
            f"this run needs {need / 1e9:,.0f} GB of memory or more, {device} has {room / 1e9:.0f}: lower "
            "--batch-size, --image-size, --dim or --depth"
        )


def load_run(path):
    """A checkpoint of train.py; stop unless it is one, with a recipe that has all its entries."""
    try:
        saved = load_checkpoint(path)
    except ValueError as error:
        stop(error)

    def kinds(recipe):
        return {name: type(value) for name, value in recipe.items()}

    recipe = saved.get("recipe")
    known = isinstance(recipe, dict) and kinds(recipe) == kinds(PAPER | PLACE)
    if not known or recipe["dataset"] not in RECIPES:
        stop(f"{path} holds no recipe of this version of train.py")
    check_recipe(recipe)
    return saved


def join_processes(device, batch_size):
    """(this process's number, how many there are): (0, 1) unless torchrun started several."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if batch_size % ranks or batch_size < 2 * ranks:
        stop(f"batch_size is {batch_size}, it must be a multiple of {ranks} (processes), 2 or more for each")
    if ranks > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))  # rank 0 may have much to decode
        atexit.register(dist.destroy_process_group)
    return rank, ranks


def open_run(args, given, checkpoint_file):
    """The recipe of a new run, and None; or the recipe and the checkpoint of the run that is to go on."""
    given = given | {"dataset": args.dataset}
    saved, recipe = None, RECIPES[args.dataset] | PLACE | given
    check_writable(checkpoint_file.parent)
    if checkpoint_file.exists():
        if not args.resume:
            stop(f"{checkpoint_file} is there already: go on with --resume, or name another folder by --out")
        saved = load_run(checkpoint_file)
        recipe = saved["recipe"]
        for name, value in given.items():
            if value != recipe[name]:
                stop(f"{checkpoint_file} has {name} {recipe[name]}, not {value}: name another --out folder")
    recipe["data_dir"] = args.data_dir or recipe["data_dir"]
    recipe["skip_bad_images"] |= args.skip_bad_images
    return recipe, saved


def check_batch(pictures, batch_size):
    if pictures < batch_size:
        stop(f"{pictures} pictures do not fill a batch of {batch_size}: lower --batch-size")


def asked_to_stop():
    """A list that will hold the number of the first Ctrl-C or SIGTERM. A second one ends the program."""
    numbers = []

    def remember(number, frame):
        numbers.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, remember)
    return numbers


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


class Journal:
    """What a run says about itself: on the bar while it goes, and in a row of metrics.csv an epoch.

    Reading a number waits for the device. So what each step reports stays there until somebody looks.
    """

    def __init__(self, config, loader, ranks):
        self.loader, self.ranks, self.flops = loader, ranks, training_flops(config)
        self.history = []  # a row for each whole epoch
        self.log = []  # loss and target_std of each step of the epoch under way, as tensors on the device
        self.started, self.shown = time.perf_counter(), 0.0

    def lap(self, step):
        """Measure speed from here on: after the first step, which compiles, and from epoch to epoch."""
        self.lap_start, self.lap_step, self.loader.waited = time.perf_counter(), step, 0.0

    def speed(self, step):
        """(images/s, TFLOP/s, share of the time that was spent waiting for pictures) since the last lap."""
        elapsed = time.perf_counter() - self.lap_start
        speed = self.loader.batch_size * (step - self.lap_step) / elapsed
        return speed, speed * self.flops / 1e12, self.loader.waited / elapsed

    def show(self, bar, step, lr):
        """Once a second, put the latest numbers on the bar."""
        if time.perf_counter() - self.shown > 1:
            loss, deviation = self.log[-1].tolist()
            speed, tflops, wait = self.speed(step)
            bar.set_postfix_str(
                f"loss {loss:.4f}, lr {lr:.1e}, target_std {deviation:.2f}, {speed:.0f} images/s, "
                f"wait {wait:.0%}, {tflops:.3g} TFLOP/s",
                refresh=False,
            )
            self.shown = time.perf_counter()
        bar.update()

    def numbers(self, step):
        """(loss, target_std) of each step of this epoch so far, [steps, 2]; stop if one is not finite."""
        numbers = torch.stack(self.log)
        if self.ranks > 1:
            dist.all_reduce(numbers)
        numbers = numbers.cpu() / self.ranks
        if not numbers.isfinite().all():
            bad = step - len(numbers) + 1 + (~numbers.isfinite()).any(1).int().argmax().item()
            stop(
                f"the loss is not finite at step {bad:,}; nothing was saved since the last epoch. "
                "Try a lower --lr, or --precision fp32"
            )
        return numbers

    def row(self, step, numbers, lr, weight_decay, momentum):
        """One row of metrics.csv. What comes after, saving for one, counts for the next lap."""
        loss, deviation = numbers.mean(0).tolist()
        speed, tflops, wait = self.speed(step)
        self.lap(step)
        return dict(
            epoch=step / self.loader.steps_per_epoch, step=step, loss=loss, learning_rate=lr,
            weight_decay=weight_decay, momentum=momentum, target_std=deviation, images_per_s=speed,
            seconds=time.perf_counter() - self.started, wait=wait, tflops=tflops,
            memory_gb=peak_memory_gb(self.loader.device),
        )  # fmt: skip


def gather(recipe, out, rank, ranks):
    """Find the pictures and open the cache: (pixels, sizes, the rows to pretrain on, how many were found)."""
    if rank > 0:
        dist.barrier()  # until rank 0 has downloaded and decoded them
    dataset, data_dir = recipe["dataset"], recipe["data_dir"]
    pictures = list_pictures(dataset, data_dir, recipe["pictures"])
    rows = torch.arange(pictures.train if recipe["pretrain_split"] == "train" else len(pictures.items))
    if 0 < recipe["pictures"] < len(rows):
        order = torch.randperm(len(rows), generator=generator_for(recipe["seed"], 2))
        rows = rows[order[: recipe["pictures"]]]
    check_batch(len(rows), recipe["batch_size"])
    pixels, sizes = load_pixels(pictures, dataset, data_dir, out, recipe)
    if rank == 0 and ranks > 1:
        dist.barrier()
    found, rows = len(rows), rows[sizes[rows, 0] > 0]
    check_batch(len(rows), recipe["batch_size"])
    return pixels, sizes, rows, found


def restore(saved, path, found, model, optimizer, scaler, journal):
    """Put everything that changes while training back to where the checkpoint at `path` has it.  → step"""
    device = journal.loader.device
    try:
        if saved["found"] != found:
            stop(f"the run in {path} had {saved['found']} pictures, now there are {found}")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        for weights, state in optimizer.state.items():
            if not weights.shape == state["exp_avg"].shape == state["exp_avg_sq"].shape:
                raise ValueError("the optimiser's moments are not those of this model")
        if saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["random"]["cpu"])  # dropout goes on where it was
        if device.type == "cuda" and "cuda" in saved["random"]:
            torch.cuda.set_rng_state(saved["random"]["cuda"], device)
        journal.history, journal.log = saved["history"], list(saved["log"].to(device))
        [float(row[name]) for row in journal.history for name in COLUMNS]  # raises if it is no such table
        journal.started -= saved["seconds"]
        return int(saved["step"])
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        stop(f"{path} does not hold what it takes to go on ({reason})")


def main(argv=None):
    args, given = read_arguments(argv)
    device = choose_device(args.device)
    dtype, scale_gradients = choose_precision(args.precision, device)
    out = Path(args.out or f"runs/{args.dataset}")
    checkpoint_file = out / "ckpt.pt"
    recipe, saved = open_run(args, given, checkpoint_file)
    config = check_recipe(recipe)
    # Under torchrun `ranks` processes share each batch and average their gradients; rank 0 prints and writes.
    rank, ranks = join_processes(device, recipe["batch_size"])
    check_memory(config, recipe, device, ranks)
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it

    use_compile = device.type == "cuda" if args.compile is None else args.compile
    pixels, sizes, rows, found = gather(recipe, out, rank, ranks)
    seed = recipe["seed"]
    loader = Loader(pixels, sizes, rows, recipe["batch_size"], seed, device, rank, ranks, use_compile)
    total_steps = recipe["epochs"] * loader.steps_per_epoch
    # The paper's 40 of 300 epochs; a shorter run keeps the share.
    warmup_steps = min(total_steps * 40 // 300, 40 * loader.steps_per_epoch)
    last_step = min(total_steps, args.max_steps)

    # The model, its optimiser, and all else that changes while training.
    torch.manual_seed(seed)
    model = MIMJEPA(config).to(device).train()
    optimizer = make_optimizer(model.parameters(), device)
    scaler = torch.amp.GradScaler(device.type, enabled=scale_gradients)
    journal = Journal(config, loader, ranks)
    step = restore(saved, checkpoint_file, found, model, optimizer, scaler, journal) if saved else 0
    forward = torch.compile(model, fullgraph=True) if use_compile else model
    if ranks > 1:
        # Each process drops out what it likes.
        torch.manual_seed(generator_for(seed, 3, step, rank).initial_seed())
        forward = DistributedDataParallel(forward)

    say = print if rank == 0 else lambda *_: None
    if step >= last_step:
        say(f"{checkpoint_file} is at step {step:,} of {last_step:,}. Next: python eval.py {checkpoint_file}")
        return
    if args.resume and not saved:
        say(f"there is no {checkpoint_file} yet: starting from the beginning")
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bad = f"; left out {found - len(rows)} bad files" if found > len(rows) else ""
    say(f"{args.dataset}: {len(rows):,} pictures, {total_steps:,} steps of {loader.batch_size}, "
          f"{parameters / 1e6:.1f} M parameters; {device}, {dtype or torch.float32}"
          f"{', compiled' if use_compile else ''}{bad}")  # fmt: skip
    say(
        "The loss falls, rises and falls again, because the target gets harder to predict as it learns. "
        "Watch target_std: 1 is healthy, near 0 the encoder has collapsed."
    )
    out.mkdir(parents=True, exist_ok=True)

    signals = asked_to_stop() if ranks == 1 else []
    disk = worker(device)  # a thread that writes a checkpoint while training goes on
    saving = disk.submit(lambda: None)
    interval = 0.5 if sys.stderr.isatty() else 30  # seconds: a log file needs no animation
    bar = tqdm(total=last_step, initial=step, unit="step", mininterval=interval, disable=rank > 0)
    journal.lap(step)
    first_step, masks = step + 1, (config.grid, config.mask_ratio, config.masking)
    for step, (draws, _, visible) in loader.batches(first_step, last_step, views=2, masks=masks):
        context_images, target_images = loader.views(*draws, config.image_size).chunk(2)
        if step == 1 and rank == 0:
            save_views(out / "views.png", context_images, target_images, visible)

        lr, weight_decay, momentum = schedules(
            step, total_steps, warmup_steps, peak_lr=recipe["lr"], start_momentum=recipe["momentum"]
        )
        set_schedule(optimizer, lr, weight_decay)

        # The step. The model makes the target (no gradient), predicts it from the visible part, compares …
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss, target = forward(context_images, target_images, visible, return_target=True)
        # … the gradient moves the context encoder and the predictor …
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        # … and the target encoder follows slowly.
        model.update_target(momentum)

        if saving.done():
            saving.result()  # ends the program if the disk is full
        journal.log.append(torch.stack([loss.detach(), target_deviation(target)]))
        journal.show(bar, step, lr)
        epoch_ends = step % loader.steps_per_epoch == 0
        if not (epoch_ends or step == last_step or signals):
            if step == first_step:
                journal.lap(step)
            continue

        numbers = journal.numbers(step)
        row = journal.row(step, numbers, lr, weight_decay, momentum)
        if row["target_std"] < 0.1 and rank == 0:
            bar.write(
                f"warning: target_std is {row['target_std']:.3f}, the encoder is collapsing: all "
                "images look alike to it. Try a --momentum nearer to 1, or a lower --lr."
            )
        metrics = journal.history + [row]
        if epoch_ends:
            journal.history, journal.log, numbers = metrics, [], numbers[:0]
        if rank == 0:
            saving.result()  # the last checkpoint must be whole before the next one is begun
            save_metrics(out / "metrics.csv", metrics)
            shown = "loss", "target_std", "learning_rate"
            curves = {name: [row[name] for row in metrics] for name in shown}
            draw_curves(out / "curves.png", [row["step"] for row in metrics], curves)
            generators = {"cpu": torch.get_rng_state()}  # what dropout draws from
            if device.type == "cuda":
                generators["cuda"] = torch.cuda.get_rng_state(device)
            state = dict(
                format=FORMAT, config=asdict(config), recipe=recipe, found=found, step=step,
                model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                random=generators, history=journal.history, log=numbers, seconds=row["seconds"],
            )  # fmt: skip
            paths = [checkpoint_file]
            if epoch_ends and len(metrics) % args.keep_every == 0:  # never, if it is infinite
                paths.append(out / f"ckpt-{len(metrics):04}.pt")
            saving = disk.submit(save_checkpoint, copied(state), *paths)
        if signals:
            break
    bar.close()
    saving.result()
    disk.shutdown()
    if signals and step < last_step:
        tqdm.write(f"stopped and saved at step {step:,}; go on with --resume", file=sys.stderr)
        raise SystemExit(128 + signals[0])
    say(f"saved {checkpoint_file}. Next: python eval.py {checkpoint_file}")


def run(program):
    """Start `program`. To run out of memory is for its user to put right; all else is a bug, and shows."""
    try:
        program()
    except (RuntimeError, MemoryError) as error:  # torch has no error of its own for a CPU out of memory
        if any(missing in str(error) for missing in ("No working C++ compiler", "Failed to find C compiler")):
            stop("torch.compile finds no C++ compiler: install one, or use --no-compile")
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
        if not full:
            raise
        stop(
            "out of memory; what was saved is whole. Lower train.py's --batch-size or --image-size, or try "
            "--precision bf16"
        )


if __name__ == "__main__":
    run(main)
