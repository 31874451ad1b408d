"""Pretrain a SCOTT encoder by MIM-JEPA.

    python train.py                       little drawn animals: nothing to download, minutes on a CPU
    python train.py --dataset pets        the paper's recipe on Oxford-IIIT Pet (downloaded on first use)
    python train.py --dataset folder --data-dir my/pictures

`train_step` comes first, then what feeds it, in order; `main`, at the end, joins the pieces.
All that is random in step t is drawn from generators seeded with the run's seed and t (crops, colours, masks,
dropout) or t's epoch (order of the pictures). So a thread can prepare it ahead, and a resumed run repeats it.
"""

import argparse
import ctypes
import errno
import hashlib
import inspect
import io
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path

try:
    import fcntl  # locks
    import resource  # memory use
except ImportError:  # Windows does without
    fcntl = resource = None

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin, TiffImagePlugin
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets
from torchvision.transforms.v2.functional import rgb_to_grayscale, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from scott import FORMAT, MIMJEPA, Config, InputError, hide, load_checkpoint, sample_masks, target_deviation

# ---- One step of training, on which all the rest waits -----------------------------------------------------

def train_step(model, network, optimizer, scaler, views, visible, schedule, machine):
    """One step of MIM-JEPA on two views [B, 3, H, H] of the same pictures.  → loss, target_std
    network: the model, or what wraps it under torchrun. scaler: of losses in fp16, idle otherwise. schedule:
    (learning rate, weight decay, momentum). machine: what `setup` returns."""
    lr, weight_decay, momentum = schedule
    set_schedule(optimizer, lr, weight_decay)
    with machine.autocast():
        # The target from the whole of view 2 (no gradient), its prediction from the visible part of view 1,
        # and how far they are apart in the hidden places: MIMJEPA.forward, in scott.py.
        loss, target = network(*views, visible, return_target=True)
    scaler.scale(loss).backward()  # gradients of the context encoder and the predictor
    scaler.step(optimizer)  # AdamW moves their weights
    scaler.update()
    optimizer.zero_grad()
    model.update_target(momentum)  # the target encoder follows slowly
    return loss.detach(), target_deviation(target)

# ---- Recipes: every entry is also a flag (--batch-size overrides batch_size) -------------------------------

TRAINING = dict(  # the default of each entry (the paper's), the least and the most it may be, and what it is
    epochs=(300, 1, 10**9, "times each picture is seen"),
    batch_size=(64, 2, 10**9, "pictures in a step"),
    lr=(5e-4, 1e-5, 1e3, "peak learning rate"),
    momentum=(0.996, 0, 1, "of the target's moving average, at the start; it rises to 1"),
    seed=(47, 0, 2**63 - 1, "of everything random"),
    pretrain_split=("all", "all", "train", "'all': on the test pictures too (no labels); or 'train'"),
    pictures=(0, 0, 10**7, "how many to pretrain on, chosen at random; 0: all (critters: how many to draw)"),
    probe_epochs=(100, 1, 10**9, "epochs of the attentive probes of eval.py"),
    cache_side=(320, 16, 8192, "side at which decoded pictures are kept, in pixels (not for critters)"),
)
ABOUT = {name: about for name, (*_, about) in TRAINING.items()}
ABOUT |= re.findall(r"^    (\w+): .*?  # (.*)", inspect.getsource(Config), re.MULTILINE)  # the comments there
PAPER = {name: value for name, (value, *_) in TRAINING.items()} | asdict(Config())
RECIPES = dict.fromkeys(("critters", "pets", "flowers", "imagenet100", "folder"), PAPER)
RECIPES["critters"] = PAPER | dict(  # small enough for a CPU; chosen on critters drawn from a third seed
    pictures=8000, epochs=13, batch_size=32, lr=3e-4, momentum=0.99, mask_ratio=0.5, probe_epochs=4,
    image_size=64, dim=128, depth=4, dropout=0.0, attention_dropout=0.0, drop_path=0.0,
)  # fmt: skip
PLACE = dict(dataset="critters", data_dir="data", skip_bad_images=False)  # kept with the recipe of a run

# ---- Small tools -------------------------------------------------------------------------------------------

def say(text):
    """Print a line above whatever bar is being drawn. Under torchrun the first process speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text)

def generator_for(*key):
    """A torch.Generator for a key of whole numbers: the same key, the same draws. Keys: (seed, 0, epoch)
    order of pictures; (seed, 1, step) crops, colours, masks; (seed, 2) which pictures; (seed, 3, step, rank)
    dropout; in eval.py (seed, 4) labels, (seed, 5) examples."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

def stamp(path):
    """Changes when the file does, or another takes its place. None if there is none."""
    info = os.stat(path) if os.path.exists(path) else None
    return info and (info.st_size, info.st_mtime_ns, info.st_ctime_ns)

def writable(folder):
    """Whether files can be made in `folder`, which is made first if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError):  # ValueError: characters that no name can have
        return False
    return os.access(folder, os.W_OK)

def write_whole(path, write, tag=""):
    """Save what `write(file)` writes, under another name until it is whole: nobody ever finds half a file.
    tag: tells apart processes that may write it at the same time."""
    content, building = io.BytesIO(), path.with_name(f"{path.name}{tag}.tmp")
    write(content)  # into memory, so that only the disk can fail below
    try:
        with open(building, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(building, path)
    except OSError as error:
        building.unlink(missing_ok=True)
        text = f"cannot write {path} ({error.strerror}): make room, or make it writable"
        raise InputError(f"{text}; train.py goes on by --resume") from None

# ---- Critters: a data set drawn by the computer ------------------------------------------------------------

# A species is a plan of six parts, drawn at random, seeded with its name. Add your name, and see yourself.
# Colours, place, size and pose come from the picture's seed, whatever the species, so no colour tells species
# apart. But each of three colours dresses two parts, and which two belongs to the species: who recognises it
# by what is in sight knows that hidden legs have, say, the colour of the ears. That is what predicting hidden
# places should teach: to predict one part from another.

SPECIES = "tigrot mousen puffit foxel cyclox zebbit moodle bumbear dashel wuffle".split()
COLOURS = "black gray brown red orange gold olive green turquoise skyblue blue purple violet pink".split()
CANVAS = 256  # critters are drawn this large, then shrunk, which smooths their edges

def plan(name):
    """A species facing right, from back to front: for each part its ovals (x, y, rx, ry, colour)."""
    rng = random.Random(name)
    tail, legs, body, spots, ears, head = rng.sample((0, 0, 1, 1, 2, 2), 6)  # the numbers of their colours
    rx, ry, r = rng.uniform(40, 64), rng.uniform(32, 54), rng.uniform(28, 46)  # the body's radii, the head's
    neck = rng.uniform(0.2, 1.2)  # where the head sits: 0 is in front, π/2 on top
    x, y = 0.9 * rx * math.cos(neck), -1.1 * ry * math.sin(neck) - 10
    ear, wide, long = rng.uniform(0.2, 0.9) * r, rng.uniform(8, 20), rng.uniform(16, 50)
    leg, leg_count = rng.uniform(8, 14), rng.randint(2, 4)
    spot, spot_count = rng.uniform(0.5, 0.9), rng.randint(1, 3)
    tail_x, tail_y = rng.uniform(10, 34), rng.uniform(10, 44)
    return [
        [(-rx - tail_x / 2, -tail_y / 2, tail_x, tail_y, tail)],
        [(rx * (1.5 * (i + 0.5) / leg_count - 0.75), ry + 6, leg, 32, legs) for i in range(leg_count)],
        [(0, 0, rx, ry, body)],
        [(rx * (1.6 * (i + 0.5) / spot_count - 0.8), 0, 0.8 * rx * spot / spot_count, ry * spot, spots)
         for i in range(spot_count)],
        [(at, y - 0.8 * r - 0.4 * long, wide, long, ears) for at in (x - ear, x + ear)],
        [(x, y, r, r, head), (x - 6, y - 4, 9, 9, 3), (x - 3, y - 4, 4, 4, 4),
         (x + 14, y - 4, 9, 9, 3), (x + 17, y - 4, 4, 4, 4)],
    ]  # fmt: skip

def draw_critter(species, seed, side=64):
    """One critter, side × side px, RGB. The same seed dresses and poses all species alike, every time."""
    rng = random.Random(seed)
    background, *colours = rng.sample(COLOURS, 4)
    colours += ["white", "black"]  # of the eyes
    zoom, flip, tilt = rng.uniform(1, 1.3), rng.choice((-1, 1)), rng.uniform(-14, 14)
    place_x, place_y = rng.uniform(108, 148), rng.uniform(124, 148)
    canvas = Image.new("RGB", (CANVAS, CANVAS), background)
    pen = ImageDraw.Draw(canvas)
    for part in plan(SPECIES[species]):
        pose_x, pose_y = rng.uniform(-6, 6), rng.uniform(-6, 6)
        for x, y, rx, ry, colour in part:
            x, y = place_x + zoom * flip * (x + pose_x), place_y + zoom * (y + pose_y)
            rx, ry = zoom * rx, zoom * ry
            pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colours[colour])
    return canvas.rotate(tilt, fillcolor=background).resize((side, side), Image.Resampling.BOX)

def critters(count, seed):
    """`count` pictures for draw_critter, as (species, picture seed), the species in turn."""
    rng = random.Random(seed)
    return [(i % len(SPECIES), rng.getrandbits(32)) for i in range(count)]

# ---- Pictures: what there is to train on -------------------------------------------------------------------

Image.MAX_IMAGE_PIXELS = 10**9  # the pictures are the user's own: a large one is no attack
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30  # nor is a long comment or profile
TiffImagePlugin.READ_LIBTIFF = True  # Pillow's own reader scrambles some planar and subsampled TIFFs
ENDINGS = datasets.folder.IMG_EXTENSIONS
LIBRARY = {  # torchvision's class, its list of files, its splits; from where to where to copy them by hand
    "pets": (datasets.OxfordIIITPet, "_images", ("trainval", "test"), "pets", "oxford-iiit-pet"),
    "flowers": (datasets.Flowers102, "_image_files", ("train", "val", "test"), "flowers/102", "flowers-102"),
}

@dataclass
class Pictures:
    """A data set as a list. The first `train` items are its training split, the rest its test split."""

    items: list  # what open_picture opens: a path, or the (species, seed) of a critter
    labels: list  # the class of each item, −1 where nobody says
    classes: list  # the names of the classes
    train: int

def list_pictures(dataset, data_dir, count=0):
    """Find a data set's pictures; torchvision downloads pets and flowers first. count: how many critters.
    InputError if they are not there, or not in the folders that they should be in."""
    if dataset == "critters":
        if count < 20:
            raise InputError(f"pictures is {count}, critters need 20 or more")
        drawn, classes = (critters(count - count // 4, seed=0), critters(count // 4, seed=1)), SPECIES
        splits = [[(critter, critter[0]) for critter in split] for split in drawn]
    elif dataset in LIBRARY:
        kind, files, names, page, folder = LIBRARY[dataset]
        try:
            parts = [kind(data_dir, name, download=True) for name in names]
        except (OSError, RuntimeError) as error:  # no network, no room, or not the files that were expected
            by_hand = f"unpack the files of www.robots.ox.ac.uk/~vgg/data/{page} into {data_dir}/{folder}"
            raise InputError(f"cannot get {kind.__name__} ({error}). By hand: {by_hand}") from None
        splits, classes = [[*zip(getattr(part, files), part._labels)] for part in parts], parts[0].classes
    else:  # ImageNet's own test folder has no labels: it is left alone
        names = ("train", "val") if dataset == "imagenet100" else ("train", "val", "test")
        splits, classes = list_folder(Path(data_dir), names)
    items, labels = map(list, zip(*sum(splits, [])))
    return Pictures(items, labels, classes, len(items) - (len(splits[-1]) if len(splits) > 1 else 0))

def list_folder(data_dir, names):
    """Read train/<class>/… and val/<class>/… or test/<class>/…, or else any folder of unlabelled pictures.
    Returns the (path, label) pairs of each split, the last one for testing, and the names of the classes.
    Links are followed, but no folder is visited twice. Names that begin with . or @, and __MACOSX, belong to
    programs, and what lies beside a checkpoint is what a run has drawn: none of it is to learn from."""

    def fail(error):
        if error.filename != os.path.join(data_dir, "cache"):  # of somebody else's run
            raise InputError(f"cannot list {error.filename} ({error.strerror}): see --data-dir")

    found, passed = {name: [] for name in ("", *names)}, Counter()  # "": outside the splits
    visited = {(name, os.path.realpath(data_dir)) for name in names}
    for parent, folders, files in os.walk(data_dir, followlinks=True, onerror=fail):
        split, label, *_ = *Path(parent).relative_to(data_dir).parts, "", ""
        here = split if split in names else "", os.path.realpath(parent)  # two splits may share a folder
        if here in visited:
            folders.clear()
            continue
        visited.add(here)
        folders[:] = [name for name in sorted(folders) if name[0] not in ".@" and name != "__MACOSX"]
        drawn = "ckpt.pt" in files or {"metrics.csv", "views.png"} <= {*files}  # by a run
        for name in [] if drawn else files:
            ending = Path(name).suffix.lower()
            if ending in ENDINGS and name[0] not in ".@":
                found[here[0]].append((os.path.join(parent, name), label))
            elif name[0] not in ".@" and os.path.basename(parent) != "cache":
                passed[f"of type {ending or '?'}"] += 1
    parts = [sorted(found[name]) for name in names if found[name]]
    classes = [sorted({label for _, label in part} - {""}) for part in parts]
    if len(parts) == 1 or not found["train"] or not classes[0]:  # unlabelled; `train` alone is an album
        once = {os.path.realpath(path): (path, "") for path, _ in sorted(sum(found.values(), []))}
        parts, classes = [sorted(once.values())], [[]]
    else:
        passed[f"outside {', '.join(names)}"] = len(found[""])
        loose = sum(label == "" for part in parts for _, label in part)
        passed["beside the class folders, by probes only"] = loose
    if any(passed.values()):
        say("passed over " + "; ".join(f"{count} files {why}" for why, count in passed.items() if count))
    if classes.count(classes[0]) < len(parts):
        raise InputError(f"{', '.join(names)} in {data_dir} need pictures in the same folders, one per class")
    if not parts[0]:
        raise InputError(f"no pictures in {data_dir} (their names must end in {' '.join(ENDINGS)})")
    number = {name: i for i, name in enumerate(classes[0])}
    return [[(path, number.get(label, -1)) for path, label in part] for part in parts], classes[0]

def open_picture(item, side):
    """A picture as a Pillow RGB image, upright, on white where transparent. side: of a critter, in pixels.
    InputError if the file cannot be read as a picture, or holds numbers of which nobody knows the scale."""
    if isinstance(item, tuple):
        return draw_critter(*item, side)
    try:
        if not os.path.isfile(item):  # a link to nowhere, or a pipe
            raise ValueError("there is no such file")
        # Opened by name, Pillow would map a file into memory, and scramble TIFFs that lie on their side.
        with open(item, "rb") as file, Image.open(file) as image:
            depth = image.tile[0].args if image.format == "PNG" and image.tile else None
            image.load()
            if depth in ("L;2", "L;4", "RGB;16B") and "transparency" in image.info:  # which Pillow misreads
                raise ValueError("a transparent colour of 2, 4 or 48 bits: convert it to 8 bits a channel")
            with suppress(Exception):  # where the rest of the EXIF block is broken, it is of no interest
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except Exception as error:  # a damaged file can lead Pillow to any error
        code = getattr(error, "errno", None)  # a damaged file can also ask for what is invalid
        if isinstance(error, MemoryError) or code not in (None, errno.EACCES, errno.EPERM, errno.EINVAL):
            raise  # the file may be whole
        reason = getattr(error, "strerror", None) or str(error).partition(" <")[0]  # without Python's object
        raise InputError(f"{item}: {reason}") from None

def to_rgb(image):
    """8 bits for each colour. ValueError if the numbers have no agreed scale."""
    tags = getattr(image, "tag_v2", {})  # a TIFF's: 258 is the number of bits, 262 what is zero, 339 the kind
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    signed = any(kind != 1 for kind in tags.get(339, ()))  # or float
    packed = deep and tags.get(258, (16,)) != (16,)
    if signed or packed or (image.mode in ("I", "F") and not deep):
        raise ValueError("signed, packed, 32-bit and float numbers have no agreed scale: convert it")
    if deep:
        values = np.asarray(image)
        values = np.where(values == image.info.get("transparency"), 65535, values)  # white where transparent
        values = (values >> 8).astype(np.uint8)
        image = Image.fromarray(255 - values if tags.get(262) == 0 else values)
    image = image.convert("LA") if image.mode == "La" else image  # Pillow knows no other way from there
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

# ---- Cache: every picture decoded once ---------------------------------------------------------------------

def load_pixels(pictures, dataset, data_dir, out, recipe):
    """All pictures as one array, uint8 [n, 3, S, S], and their true (width, height), float [n, 2].

    Decoding a JPEG costs more than a GPU's step on it. So it happens once: the array is a file in
    data_dir/cache (or out/cache), mapped into memory, and rebuilt when files change. A picture is squeezed
    to a square; its crops get their true proportions back. Detail is lost, little of it up to sides of 8:1.
    InputError names the files that are no pictures. With skip_bad_images they get size 0 × 0 instead."""
    items, side = pictures.items, recipe["image_size" if dataset == "critters" else "cache_side"]
    shape = len(items), 3, side, side
    if dataset == "critters":  # drawn at the size they are used at, in seconds: nothing to keep
        pixels = np.empty(shape, np.uint8)
        return torch.from_numpy(pixels), torch.from_numpy(fill(pixels, items, "drawing critters")[0])
    files = repr([(os.path.relpath(path, data_dir), stamp(path)) for path in items])
    name = f"{dataset}-{side}-{hashlib.sha256(files.encode()).hexdigest()[:16]}.npy"
    home, away = (Path(folder) / "cache" / name for folder in (data_dir, out))
    cache = open_cache(home, shape) or open_cache(away, shape)
    pixels, sizes, bad = cache or build_cache(home if writable(home.parent) else away, items, shape)
    if bad:
        more = [f"and {len(bad) - 40} more, in the cache's {name[:-4]}.bad.txt"] if len(bad) > 40 else []
        text = f"{len(bad)} of {len(items)} files, which cannot be used: {'; '.join(bad[:40] + more)}"
        if not recipe["skip_bad_images"]:
            raise InputError(f"{text}. Mend or remove them, or leave them out by --skip-bad-images")
        say(f"left out {text}")
    with warnings.catch_warnings(action="ignore"):  # the cache is read-only, and torch has no such tensors
        return torch.from_numpy(pixels), torch.from_numpy(sizes)

def open_cache(place, shape):
    """(pixels, sizes, what is wrong with bad files); None if they are not all there, whole and readable."""
    try:
        pixels = np.load(place, mmap_mode="r")
        sizes = np.load(place.with_suffix(".sizes.npy"))
        bad = place.with_suffix(".bad.txt").read_text("utf-8").splitlines()
        kinds = (pixels.shape, pixels.dtype), (sizes.shape, sizes.dtype)
        return (pixels, sizes, bad) if kinds == ((shape, np.uint8), ((shape[0], 2), np.float32)) else None
    except Exception:  # whatever a damaged file can lead to
        return None

def build_cache(place, items, shape):
    """Decode all pictures into one file, which gets its name only when it is whole, and open it."""
    if not writable(place.parent):
        raise InputError(f"cannot write to {place.parent}, where decoded pictures are kept")
    with suppress(OSError):  # another process may be cleaning as well
        for old in place.parent.glob(place.stem[:-16] + "?" * 16 + ".*"):
            half_built = old.suffix == ".tmp"
            if time.time() - old.stat().st_mtime > 86400 if half_built else place.stem not in old.name:
                old.unlink()
    tag = "." + os.urandom(4).hex()  # two processes may build the same
    need, building = math.prod(shape) / 1e9, place.with_suffix(tag + ".tmp")
    say(f"decoding {len(items):,} pictures once, to {need:.2f} GB in {place.parent}")
    try:
        pixels = np.lib.format.open_memmap(building, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):  # a full disk must show here, not while memory is written back
            with open(building, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, building.stat().st_size)
        sizes, bad = fill(pixels, items, "decoding")
        pixels.flush()
        del pixels  # Windows renames no file that is mapped
        write_whole(place.with_suffix(".sizes.npy"), lambda file: np.save(file, sizes), tag)
        write_whole(place.with_suffix(".bad.txt"), lambda file: file.write("\n".join(bad).encode()), tag)
        os.replace(building, place)
        return np.load(place, mmap_mode="r"), sizes, bad
    except OSError as error:
        free = shutil.disk_usage(place.parent).free / 1e9
        text = f"cannot keep {need:.3f} GB of pictures in {place.parent} ({error.strerror}; {free:.3f} free)"
        raise InputError(f"{text}: make room, or lower --cache-side") from None
    finally:
        with suppress(OSError):
            building.unlink()

def fill(pixels, items, what):
    """Decode every item into its row of `pixels`, by all cores. Returns the true sizes, float32 [n, 2], 0 × 0
    for what is no whole picture, and what is wrong with these."""
    side, bad = pixels.shape[-1], {}

    def decode(i):
        try:
            image = open_picture(items[i], side)
        except InputError as error:
            bad[i] = ascii(str(error))[1:-1]  # a name may hold anything
            return 0, 0
        except (OSError, MemoryError) as error:
            why = getattr(error, "strerror", "it does not fit into memory")
            name = getattr(error, "filename", None) or items[i]
            raise InputError(f"cannot read {name} ({why}), which may be whole") from None
        pixels[i] = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        return image.size

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and resizes outside Python's lock
        sizes = list(tqdm(pool.map(decode, range(len(items))), what, len(items), leave=False, disable=None))
    return np.array(sizes, np.float32), [bad[i] for i in sorted(bad)]

# ---- Views: crops and colours, drawn for each picture, computed for all at once ----------------------------

def to_device(tensor, device):
    """The tensor on the device. A GPU's copy is not waited for, which is safe from pinned memory only."""
    pin = device.type == "cuda"
    return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=pin)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which everyone uses

def draw_crops(sizes, side, generator, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), tries=10):
    """Random resized crops, as torchvision's: uniform in their share of the area, log-uniform in aspect.
    sizes [B, 2]: true width, height  →  long [B, 4]: left, top, width, height, in pixels of the cache"""
    B, shape = len(sizes), sizes[:, :1] / sizes[:, 1:]  # [B, 1], width / height of the whole picture
    area = torch.empty(B, tries).uniform_(*scale, generator=generator)
    aspect = torch.empty(B, tries).uniform_(*map(math.log, ratio), generator=generator).exp() / shape
    crop = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=-1)  # [B, tries, 2], shares
    fits = (crop <= 1).all(-1)  # [B, tries]
    crop = crop[torch.arange(B), fits.int().argmax(1)]  # [B, 2], the first try that fits
    any_fits = fits.any(1, keepdim=True)
    # If no try fits into the picture, the crop is the largest centred one of an allowed ratio.
    largest = torch.cat([ratio[1] / shape, shape / ratio[0]], dim=1).clamp(max=1)
    crop = (torch.where(any_fits, crop, largest) * side).round().clamp(min=1)
    place = torch.where(any_fits, torch.rand(B, 2, generator=generator), 0.5)
    return torch.cat([(place * (side - crop + 1)).floor(), crop], dim=1).long()

def crop_and_resize(pixels, rows, crops, out):
    """Cut a crop out of each picture and scale it by antialiased bicubic interpolation, Pillow's.
    pixels uint8 [n, 3, S, S]; rows [B]: of which pictures; crops long [B, 4]  →  uint8 [B, 3, out, out]"""
    images = torch.empty(len(rows), 3, out, out, dtype=torch.uint8)
    for i, (row, (left, top, width, height)) in enumerate(zip(rows.tolist(), crops.tolist())):
        crop = pixels[row, None, :, top : top + height, left : left + width]
        images[i] = F.interpolate(crop, (out, out), mode="bicubic", antialias=True)[0]
    return images

def blend(images, other, factor):
    return (images * factor + other * (1 - factor)).clamp(0, 1)

def hue(images, shift):
    """Turn the colour wheel by `shift` of a full turn: RGB to hue, saturation, value, and back."""
    red, green, blue = images.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    turn = torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    turn = torch.where(value == red, green - blue, turn) / chroma.clamp(min=1e-12) + 6 * shift  # in sixths
    gap = torch.cat([turn, turn - 2, turn - 4], dim=1).abs()  # to pure red, green and blue on the wheel
    gap = torch.minimum(gap, (6 - gap).abs())  # the short way round
    return value - chroma * (gap - 1).clamp(0, 1)

def blur(images, sigma):
    """9×9 Gaussian blur with reflected borders, one sigma per picture: along the rows, then the columns."""
    offset = torch.arange(-4, 5, device=images.device)
    weight = torch.softmax(-0.5 * (offset / sigma.view(-1, 1).clamp(min=1e-3)) ** 2, dim=1)  # [B, 9]
    weight = weight.repeat_interleave(3, dim=0)[:, None, None]  # [3B, 1, 1, 9]
    x = F.pad(images, (4, 4, 4, 4), mode="reflect").flatten(0, 1)[None]  # [1, 3B, H + 8, W + 8]
    x = F.conv2d(F.conv2d(x, weight, groups=x.shape[1]), weight.mT, groups=x.shape[1])
    return x.view_as(images)

OPERATIONS = (  # the first four, colour jitter, stay together
    lambda images, factor: blend(images, 0, factor),  # brightness
    lambda images, factor: blend(images, rgb_to_grayscale(images).mean((2, 3), True), factor),  # contrast
    lambda images, factor: blend(images, rgb_to_grayscale(images), factor),  # saturation
    hue,
    lambda images, factor: blend(images, rgb_to_grayscale(images), factor),  # grey, at 0
    blur,
)
# From where to where the factor of each is drawn, and the factor that changes nothing.
LOW, HIGH = torch.tensor([[0.6, 0.6, 0.8, -0.1, 0.0, 0.1], [1.4, 1.4, 1.2, 0.1, 0.0, 2.0]])
NEUTRAL = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])

def draw_colours(count, generator):
    """The colours of `count` views: (order of the operations, factors [count, 6]). With probability 0.6, in
    random order: colour jitter (p 0.8), grey (p 0.1), blur (p 0.3). The order is the same for all views."""
    chosen = torch.rand(count, 3, generator=generator) < torch.tensor([0.8, 0.1, 0.3])
    chosen &= torch.rand(count, 1, generator=generator) < 0.6
    factors = LOW + (HIGH - LOW) * torch.rand(count, 6, generator=generator)
    groups = [torch.randperm(4, generator=generator).tolist(), [4], [5]]
    order = [groups[i] for i in torch.randperm(3, generator=generator).tolist()]
    return order, torch.where(chosen[:, [0, 0, 0, 0, 1, 2]], factors, NEUTRAL)

def apply_colours(images, order, factors, operations=OPERATIONS):
    """Apply to each image [B, 3, H, W] its own share of each operation, in the order drawn; in place."""
    for group in order:
        parts = [slice(None)]  # a GPU is fastest with all at once
        if images.device.type == "cpu":  # with those that change, few enough to fit the processor's cache
            rows = (factors[:, group] != NEUTRAL[group]).any(1).nonzero().squeeze(1)
            parts = [rows[i : i + 8] for i in range(0, len(rows), 8)]
        for rows in parts:
            part, shares = images[rows], factors[rows, :, None, None, None]
            for number in group:
                part = operations[number](part, shares[:, number])
            images[rows] = part
    return images

def normalise(images):
    """Subtract the mean and divide by the deviation of ImageNet's colours."""
    return torch.cat([(c - mean) / std for c, mean, std in zip(images.split(1, dim=1), MEAN, STD)], dim=1)

class Loader:
    """Makes the batch of a step: picks its pictures, draws crops, colours and masks, all from (seed, step).
    Threads crop ahead of training; the colours that they draw are applied by `views`, on the device.
    rows: which pictures to use, long [n]. Each epoch takes them in a new random order, without what does not
    fill a batch. Under torchrun each of `ranks` processes makes its own share of each batch."""

    def __init__(self, pixels, sizes, rows, batch_size, image_size, seed, machine, rank=0, ranks=1):
        self.pixels, self.sizes, self.rows, self.seed = pixels, sizes, rows, seed
        self.batch_size, self.image_size, self.device = batch_size, image_size, machine.device
        self.share = torch.arange(rank, batch_size, ranks)
        self.steps_per_epoch, self.epoch = len(rows) // batch_size, None
        if self.steps_per_epoch == 0:
            raise InputError(f"{len(rows)} pictures do not fill a batch of {batch_size}: lower --batch-size")
        self.waited = 0.0  # seconds, for batches that were not ready
        functions = normalise, *OPERATIONS
        if machine.compile:  # the dozens of small steps of an operation become a kernel or two
            functions = [torch.compile(function, fullgraph=True) for function in functions]
        self.normalise, *self.operations = functions

    def pick(self, step):
        """The rows of step 1, 2, …: a slice of the epoch's random order."""
        epoch, i = divmod(step - 1, self.steps_per_epoch)
        if epoch != self.epoch:
            order = torch.randperm(len(self.rows), generator=generator_for(self.seed, 0, epoch))
            self.epoch, self.order = epoch, self.rows[order]
        return self.order[i * self.batch_size : (i + 1) * self.batch_size]

    def batch(self, step, rows, views, masks=(2, 0.5)):
        """All that a step needs: a tuple for `views`, the rows, the masks. rows: what pick(step) says; views:
        how many of each picture; masks: grid, mask_ratio, masking for sample_masks (eval.py needs none)."""
        generator = generator_for(self.seed, 1, step)
        crops = draw_crops(self.sizes[rows], self.pixels.shape[-1], generator)[self.share]
        flip = torch.rand(len(rows), 1, 1, 1, generator=generator)[self.share] < 0.5
        order, factors = draw_colours(views * len(rows), generator)
        visible = sample_masks(len(rows), *masks, generator=generator)[self.share]
        factors, rows = factors.view(views, -1, 6)[:, self.share].flatten(0, 1), rows[self.share]
        images = crop_and_resize(self.pixels, rows, crops, self.image_size)
        images = torch.where(flip, images.flip(3), images)
        images, factors, visible = (to_device(tensor, self.device) for tensor in (images, factors, visible))
        return (images, factors, order), rows, visible

    def batches(self, first, last, **options):
        """Yield (step, its batch), first to last. Threads make them ahead. Where the CPU trains, a single
        one keeps to one core: if both used all, they would wait for each other."""
        cores = torch.get_num_threads()  # asked first: what a thread sets, those that come later start with
        ahead = min(8, os.cpu_count() or 1) if self.device.type == "cuda" else 1
        with ThreadPoolExecutor(ahead, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            coming = (threads.submit(self.batch, step, self.pick(step), **options)
                      for step in range(first, last + 1))  # fmt: skip
            queue = deque(islice(coming, ahead))
            for step in range(first, last + 1):
                asked = time.perf_counter()
                batch = queue.popleft().result()
                self.waited += time.perf_counter() - asked
                queue.extend(islice(coming, 1))
                torch.set_num_threads(cores)
                yield step, batch

    def views(self, images, factors, order):
        """Normalised views [V·B, 3, H, H] of uint8 [B, 3, H, H]: V times, each with its own colours."""
        images = images.repeat(len(factors) // len(images), 1, 1, 1) / 255
        return self.normalise(apply_colours(images, order, factors, self.operations))

# ---- Optimisation ------------------------------------------------------------------------------------------

def schedules(step, total_steps, warmup_steps, *, start_lr=1e-6, peak_lr=5e-4, end_lr=1e-5, flat=0.72,
              start_decay=0.04, end_decay=0.4, start_momentum=0.996, end_momentum=1.0):  # fmt: skip
    """(learning rate, weight decay, EMA momentum) of step 1 … total_steps. The learning rate climbs in a
    line, is at its peak for `flat` of the steps left, and falls along half a cosine. The others are lines."""
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

def make_optimizer(parameters, device):
    """AdamW in two groups: matrices, whose weight decay is scheduled, and vectors, which have none."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1]},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=device.type != "mps")

def set_schedule(optimizer, lr, weight_decay):
    optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay)
    optimizer.param_groups[1].update(lr=lr)

def training_flops(config):
    """Floating-point operations to train on one image, a multiply and an add being two: 51.3e9 by default."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # counts without computing
        model, image = MIMJEPA(config), torch.zeros(1, 3, config.image_size, config.image_size)
        model(image, image, torch.ones(1, config.tokens, dtype=torch.bool)).backward()
    return counter.get_total_flops()

# ---- Records: what a run says about itself -----------------------------------------------------------------

COLUMNS = ("epoch", "step", "loss", "learning_rate", "weight_decay", "momentum", "target_std",
           "images_per_s", "seconds", "wait", "tflops", "memory_gb")  # fmt: skip

class Record:
    """The numbers of a run: on the bar while it goes, and in a row of metrics.csv for each epoch.
    Reading a number waits for the device. So what each step reports stays there until somebody looks.
    saved: the stamp of ckpt.pt, by which `save` knows its own file."""

    def __init__(self, config, loader, ranks, saved):
        self.loader, self.ranks, self.saved, self.flops = loader, ranks, saved, training_flops(config)
        self.history = []  # rows of whole epochs
        self.sums = torch.zeros(2, device=loader.device)  # of loss and target_std, since the last of them
        self.started = self.shown = time.perf_counter()
        self.lap = None  # since when speed is measured: (time, step, seconds waited)

    def add(self, step, loss, deviation, lr, bar):
        """Take in a step; once a second, put the latest numbers on the bar."""
        numbers = torch.stack([loss, deviation])
        self.sums += numbers
        now = time.perf_counter()
        self.lap = self.lap or (now, step, self.loader.waited)  # the first step compiles: it is not measured
        if now - self.shown > 1:
            text = "loss {:.4f}, target_std {:.2f}".format(*numbers.tolist())
            bar.set_postfix_str(f"step {step:,}, {text}, learning rate {lr:.1e}", refresh=False)
            self.shown = now
        bar.update(self.loader.batch_size)

    def rows(self, step, lr, weight_decay, momentum):
        """All rows, the last one up to this step of its epoch. InputError if a loss is not finite."""
        rest = step % self.loader.steps_per_epoch
        if self.ranks > 1:
            dist.all_reduce(self.sums)
            self.sums /= self.ranks
        loss, deviation = (self.sums / (rest or self.loader.steps_per_epoch)).tolist()
        if not math.isfinite(loss):
            raise InputError(f"the loss is not finite by step {step:,}: lower --lr, or try --precision fp32")
        if deviation < 0.1:
            say(f"warning: target_std is {deviation:.3f}, it collapses: try more --momentum or less --lr")
        (lap_start, lap_step, waited), now = self.lap, time.perf_counter()
        speed = self.loader.batch_size * (step - lap_step) / (now - lap_start)  # images/s
        wait, tflops = (self.loader.waited - waited) / (now - lap_start), speed * self.flops / 1e12
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else math.nan
        memory /= 1e9 if sys.platform == "darwin" else 1e9 / 1024  # macOS counts bytes, Linux kilobytes
        if self.loader.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.loader.device) / 1e9
        epoch, seconds = step / self.loader.steps_per_epoch, now - self.started
        row = epoch, step, loss, lr, weight_decay, momentum, deviation, speed, seconds, wait, tflops, memory
        rows = [*self.history, dict(zip(COLUMNS, row))]
        if rest == 0:
            self.history, self.sums = rows, torch.zeros_like(self.sums)
        self.lap = now, step, self.loader.waited
        return rows

def save_metrics(out, rows):
    """Save metrics.csv and curves.png."""
    table, names = [[*row.values()] for row in rows], ",".join(COLUMNS)
    save_table = partial(np.savetxt, X=table, fmt="%.9g", delimiter=",", header=names, comments="")
    write_whole(out / "metrics.csv", save_table)
    curves = {name: [row[name] for row in rows] for name in ("loss", "target_std", "learning_rate")}
    draw_curves(out / "curves.png", [row["step"] for row in rows], curves)

def save_grid(path, columns):
    """Save a picture of columns of images: columns is {title: [B, 3, H, H] from 0 to 1}."""
    images = torch.stack([column.cpu() for column in columns.values()], dim=1).flatten(0, 1)
    images = F.interpolate(images.nan_to_num().clamp(0, 1), scale_factor=math.ceil(64 / images.shape[-1]))
    grid = make_grid(images, len(columns), pad_value=1)
    canvas = to_pil_image(F.pad(grid, (0, 0, 14, 0), value=1))  # room for the titles
    for i, title in enumerate(columns):
        ImageDraw.Draw(canvas).text((2 + i * (images.shape[-1] + 2), 2), title, "black")
    write_whole(path, lambda file: canvas.save(file, "PNG"))

def save_views(path, context, target, visible):
    """Save what the model sees, six rows."""
    grid, (mean, std) = math.isqrt(visible.shape[1]), torch.tensor([MEAN, STD]).view(2, 3, 1, 1)
    shown = hide(context, visible.view(-1, 1, grid, grid))  # 0, the mean colour, in the hidden cells
    columns = {"view 1": context, "visible": shown, "view 2": target}
    save_grid(path, {title: column[:6].cpu() * std + mean for title, column in columns.items()})

def draw_curves(path, steps, curves):
    """Save a picture of numbers over steps, a panel each: curves is {title: one number for each step}."""
    left, right, height = 70, 610, 130  # of a panel, in pixels
    canvas = Image.new("RGB", (right + 30, height * len(curves)), "white")
    pen, across = ImageDraw.Draw(canvas), np.interp(steps, (steps[0], steps[-1]), (left, right))
    for i, (title, values) in enumerate(curves.items()):
        top, bottom, low, high = height * i + 20, height * (i + 1) - 20, min(values), max(values)
        pen.rectangle((left, top, right, bottom), outline="lightgrey")
        pen.text((left, top - 14), f"{title}, over the steps of training", "black")
        for y, value in zip(np.linspace(top, bottom, 3), np.linspace(high, low, 3)):
            pen.text((left - 6, y), f"{value:.3g}", "black", anchor="rm")
        for x, step in zip(np.linspace(left, right, 5), np.linspace(steps[0], steps[-1], 5)):
            pen.line((x, top, x, bottom), fill="lightgrey")
            pen.text((x, bottom + 4), f"{step:,.0f}", "black", anchor="mt")
        pen.line(list(zip(across, np.interp(values, (low, high), (bottom, top)))), fill="black", width=2)
    write_whole(path, lambda file: canvas.save(file, "PNG"))

# ---- Checkpoints: save and restore mirror each other -------------------------------------------------------

def save(paths, step, names, model, optimizer, scaler, record, **about):
    """Write the run as it is after this step. names: of its pictures; about: its config and recipe."""
    there, other = stamp(paths[0]), paths[0].with_name(f"ckpt-of-{os.getpid()}.pt")
    foreign = there and there[:2] != (record.saved or ())[:2]  # the third changes when it is only moved
    state = dict(
        format=FORMAT, step=step, pictures=names, model=model.state_dict(), optimizer=optimizer.state_dict(),
        scaler=scaler.state_dict(), history=record.history, sums=record.sums,
        seconds=time.perf_counter() - record.started, **about,
    )  # fmt: skip
    for path in [other] if foreign else paths:
        write_whole(path, lambda file: torch.save(state, file))
    if foreign:
        raise InputError(f"another run has saved to {paths[0]}: this one is saved as {other}")
    record.saved = stamp(paths[0])

def restore(saved, names, model, optimizer, scaler, record):
    """Put all that changes in training back to where `save` found it, and return the step."""
    try:
        step, before, now = saved["step"], set(saved["pictures"].split("\0")), set(names.split("\0"))
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        record.sums = saved["sums"].to(record.loader.device)
        record.history, record.started = saved["history"], record.started - saved["seconds"]
    except Exception as error:  # whatever a changed file can lead to
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the checkpoint does not hold what it takes to go on ({reason})") from None
    if names and before != now:
        gone, new = sorted(before - now), sorted(now - before)
        raise InputError(f"the run had other pictures: {len(gone)} are gone {gone[:3]}, {len(new)} are new "
                         f"{new[:3]}. Put them back, or begin anew in another --out")  # fmt: skip
    return step

# ---- Command line ------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """The flags that train.py and eval.py share, and one way to fail."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.add_argument("--data-dir", help="where the pictures are, or will be (data, or as in training)")
        self.add_argument("--skip-bad-images", action="store_true", help="leave out what cannot be read")
        self.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
        self.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="(default: by device)")
        self.add_argument("--compile", action=argparse.BooleanOptionalAction, help="(default: on cuda only)")

    def error(self, message):
        raise InputError(f"{message} (see --help)")

def read_arguments(argv):
    """Parse the command line: (all flags, and those of the recipe that were given)."""
    parser = Parser(prog="train.py", description="Pretrain a SCOTT encoder by MIM-JEPA.")
    parser.add_argument("--dataset", choices=RECIPES, help="(default: critters)")
    parser.add_argument("--out", help="where the run's files go (default: runs/DATASET)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--max-steps", type=int, default=10**12, help="stop there; the schedules stay")
    parser.add_argument("--keep-every", type=int, default=10**12, help="also keep every Nth epoch")
    rule = "Every entry of a recipe is a flag. In brackets: the paper's value (critters has its own)."
    group = parser.add_argument_group("recipe", rule)
    for name, value in PAPER.items():
        flag, kind = f"--{name.replace('_', '-')}", type(value)
        group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=f"{ABOUT[name]} [{value}]")
    args = parser.parse_args(argv)
    for name in ("max_steps", "keep_every"):
        if getattr(args, name) < 1:
            raise InputError(f"{name} is {getattr(args, name)}, it must be 1 or more")
    return args, {name: value for name in ("dataset", *PAPER) if (value := getattr(args, name)) is not None}

def check_recipe(recipe):
    """The Config of the recipe's model. InputError if an entry is missing, unknown or cannot work."""
    recipe = recipe if isinstance(recipe, dict) else {}
    kinds = [{name: type(value) for name, value in table.items()} for table in (recipe, PAPER | PLACE)]
    if kinds[0] != kinds[1] or recipe["dataset"] not in RECIPES:
        raise InputError("the checkpoint holds no recipe of this version of train.py")
    for name, (_, least, most, _) in TRAINING.items():
        fits = recipe[name] in (least, most) if isinstance(most, str) else least <= recipe[name] <= most
        if not fits:
            word = "or" if isinstance(most, str) else "to"
            raise InputError(f"{name} is {recipe[name]!r}, it must be {least} {word} {most}")
    return Config(**{name: recipe[name] for name in asdict(Config())})

def open_run(args, given, path):
    """The recipe of a new run, and None; or the recipe and the checkpoint of the run that is to go on."""
    recipe, saved = RECIPES[args.dataset or "critters"] | PLACE | given, None
    there = sorted(path.parent.glob("ckpt*.pt"))
    if there and not (args.resume and path.exists()):
        raise InputError(f"{there[-1]} is there: --resume goes on from {path}; or name another --out folder")
    if path.exists():
        saved = load_checkpoint(path)
        recipe = saved.get("recipe")
        check_recipe(recipe)
        for name, value in given.items():
            if value != recipe[name]:
                raise InputError(f"{path} has {name} {recipe[name]}, not {value}: name another --out folder")
    elif args.resume:
        say(f"there is no {path} yet: starting from the beginning")
    skip, data_dir = args.skip_bad_images or recipe["skip_bad_images"], recipe["data_dir"]
    data_dir = data_dir if args.data_dir is None else args.data_dir
    return recipe | dict(data_dir=data_dir, skip_bad_images=skip), saved

def setup(args):
    """Choose, and print, what to compute on, the best or as asked: device, dtype (of autocast), compile,
    autocast(). InputError if it cannot be had."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = args.device or best
    try:  # under torchrun each process has a GPU of its own
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"cannot use device {name} ({reason}): leave --device out for the best") from None
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
    if device.type == "cpu" and sys.platform == "linux":
        with suppress(AttributeError):  # glibc alone has it. Freed memory is kept: to get it anew from the
            mallopt = ctypes.CDLL(None).mallopt  # system costs 5 % of a step, and a third of the views.
            mallopt(-4, 0)  # M_MMAP_MAX: no block lives outside the heap
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
    cuda, features = device.type == "cuda", getattr(torch.cpu, "get_capabilities", dict)()
    has_bf16 = device.type == "cpu" and any(features.get(f) for f in ("avx512_bf16", "amx_bf16", "bf16"))
    if cuda:
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    precision = args.precision or ("bf16" if has_bf16 else "fp16" if cuda else "fp32")
    compile = cuda if args.compile is None else args.compile
    say(f"{device} (bf16 in hardware: {has_bf16}), {precision}, {'compiled' if compile else 'not compiled'}")
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
    return argparse.Namespace(device=device, dtype=dtype, compile=compile, autocast=autocast)

def read_data(recipe, out):
    """What to pretrain on: (pixels, sizes, the rows of both to use, the names of these pictures)."""
    dataset, data_dir, count = recipe["dataset"], recipe["data_dir"], recipe["pictures"]
    pictures = list_pictures(dataset, data_dir, count)
    rows = torch.arange(pictures.train if recipe["pretrain_split"] == "train" else len(pictures.items))
    if 0 < count < len(rows):
        rows = rows[torch.randperm(len(rows), generator=generator_for(recipe["seed"], 2))[:count]]
    homes = {os.path.dirname(item) for item in pictures.items if dataset != "critters"}
    if os.path.realpath(out) in map(os.path.realpath, homes):  # its ckpt.pt would hide them from list_folder
        raise InputError(f"{out} holds pictures to train on: name another folder by --out")
    pixels, sizes = load_pixels(pictures, dataset, data_dir, out, recipe)
    rows = rows[sizes[rows, 0] > 0]
    items = [pictures.items[row] for row in rows if dataset != "critters"]  # a recipe says which critters
    return pixels, sizes, rows, "\0".join(os.path.relpath(item, data_dir) for item in items)

def hold(out, at_end):
    """Keep `out` for this run until it ends. InputError if another run has it, or it cannot be written to."""
    if not writable(out):
        raise InputError(f"cannot write to {out}: make it writable, or name another folder by --out")
    try:
        folder = os.open(out, os.O_RDONLY)
        at_end.callback(os.close, folder)  # which unlocks it
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another run saves to {out / 'ckpt.pt'}: name another folder by --out") from None
    except (OSError, AttributeError):  # some file systems have no locks, nor has Windows: `save` looks again
        pass

def join_processes(device, batch_size, at_end):
    """(this process's number, how many there are): (0, 1) unless torchrun started several."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if batch_size % ranks or batch_size < 2 * ranks:
        raise InputError(f"batch_size is {batch_size}, it must be {2 * ranks} or more, in steps of {ranks}")
    if ranks > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        wait = timedelta(hours=6)  # rank 0 may have much to decode
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=wait)
        at_end.callback(dist.destroy_process_group)
    return rank, ranks

def listen(at_end):
    """A list that will hold the number of the first Ctrl-C or SIGTERM. A second one does not wait."""
    heard = []

    def remember(number, frame):
        heard.append(number)
        signal.signal(number, signal.default_int_handler)  # raises KeyboardInterrupt

    with suppress(ValueError):  # only the main thread may ask for signals
        for number in (signal.SIGINT, signal.SIGTERM):
            at_end.callback(signal.signal, number, signal.signal(number, remember))
    return heard

def run(program):
    """Start `program`, a main. The one place that knows a terminal: what a user can put right is one line."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # some terminals know ASCII only
    try:
        raise SystemExit(program())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        message = str(error).replace("\n", "\\n")
        if isinstance(error, OSError):
            message = f"{error.filename or 'the system says'}: {error.strerror or error}"
        elif "C++ compiler" in message or "C compiler" in message:
            message = "torch.compile finds no C++ compiler: install one, or use --no-compile"
        elif isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in message:
            message = f"out of memory; what was saved is whole. Try a lower --batch-size ({message})"
        elif isinstance(error, RuntimeError):
            raise  # a bug shows
    tqdm.write(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)

# ---- The program -------------------------------------------------------------------------------------------

def main(argv=None):
    """Train as the command line says. Returns the exit status: 0, or 128 + the signal that ended the run."""
    args, given = read_arguments(argv)
    out = Path(args.out or f"runs/{args.dataset or 'critters'}")
    path, stamp_before = out / "ckpt.pt", stamp(out / "ckpt.pt")
    recipe, saved = open_run(args, given, path)
    config, machine, seed = check_recipe(recipe), setup(args), recipe["seed"]
    with ExitStack() as at_end:  # what is to be undone, however the run ends
        rank, ranks = join_processes(machine.device, recipe["batch_size"], at_end)
        if rank > 0:
            dist.barrier()  # until rank 0 has downloaded and decoded the pictures
        pixels, sizes, rows, names = read_data(recipe, out)
        shape = recipe["batch_size"], config.image_size
        loader = Loader(pixels, sizes, rows, *shape, seed, machine, rank, ranks)
        if rank == 0:
            hold(out, at_end)  # only now: what was refused until here has left no folder
            if ranks > 1:
                dist.barrier()
        total_steps = recipe["epochs"] * loader.steps_per_epoch
        warmup_steps = min(total_steps * 40 // 300, 40 * loader.steps_per_epoch)  # 40 of the paper's 300
        last_step = min(total_steps, args.max_steps)

        record = Record(config, loader, ranks, stamp_before)
        torch.manual_seed(seed)
        model = MIMJEPA(config).to(machine.device).train()
        optimizer = make_optimizer(model.parameters(), machine.device)
        scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        parts = names, model, optimizer, scaler, record
        step = restore(saved, *parts) if saved else 0
        saved = None  # the memory is needed
        if machine.compile:  # CUDA graphs: to launch hundreds of kernels takes longer than to run them
            model.compile(fullgraph=True, mode="reduce-overhead" if ranks == 1 else "default")
        network = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model

        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        say(f"{recipe['dataset']}: {len(rows):,} pictures, {total_steps:,} steps of {loader.batch_size}, "
            f"{parameters:.1f} M parameters\nThe loss falls, rises and falls again: the target gets harder "
            "to predict. Watch target_std: 1 is healthy, near 0 the encoder has collapsed.")  # fmt: skip
        pause = 0.5 if sys.stderr.isatty() else 30  # seconds: a log file needs no animation
        size = loader.batch_size
        bar = tqdm(None, "training", last_step * size, initial=step * size, unit=" images", unit_scale=True,
                   mininterval=pause, disable=rank > 0)  # fmt: skip
        at_end.enter_context(bar)
        signals = listen(at_end) if ranks == 1 else []  # several processes would stop at different steps
        masks, saved_at = (config.grid, config.mask_ratio, config.masking), time.monotonic()
        for step, (draws, _, visible) in loader.batches(step + 1, last_step, views=2, masks=masks):
            views = loader.views(*draws).chunk(2)
            schedule = schedules(step, total_steps, warmup_steps, peak_lr=recipe["lr"],
                                 start_momentum=recipe["momentum"])  # fmt: skip
            torch.manual_seed(generator_for(seed, 3, step, rank).initial_seed())  # what dropout draws from
            loss, deviation = train_step(model, network, optimizer, scaler, views, visible, schedule, machine)
            record.add(step, loss, deviation, schedule[0], bar)
            epoch, rest = divmod(step, loader.steps_per_epoch)
            end = signals or step == last_step
            if rest and not end:
                continue
            metrics = record.rows(step, *schedule)
            keep = rest == 0 and epoch % args.keep_every == 0
            if rank == 0 and (end or keep or time.monotonic() - saved_at > 60):
                paths = [path] + [out / f"ckpt-{epoch:04}.pt"] * keep
                save(paths, step, *parts, config=asdict(config), recipe=recipe)
                save_metrics(out, metrics)
                save_views(out / "views.png", *views, visible)
                saved_at = time.monotonic()
            if end:
                break
    if signals and step < last_step:
        say(f"stopped and saved at step {step:,}; go on with --resume")
        return 128 + signals[0]
    say(f"saved: {path} is at step {step:,} of {total_steps:,}. Next: python eval.py {path}")
    return 0

if __name__ == "__main__":
    run(main)
