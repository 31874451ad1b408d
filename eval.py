"""Probe a frozen encoder: how much of what the labels say can be read off its features?

    python eval.py runs/pets/ckpt.pt
    python eval.py runs/critters/ckpt.pt --data-dir my/pictures
    python eval.py "runs/pets/ckpt*.pt"                     one run at several times: also curves
    python eval.py runs/pets/ckpt.pt --from-scratch         and the same encoder trained on the labels alone

Two probes look at one averaged vector per picture: k nearest neighbours, and a linear classifier. Three
attentive probes look at all tokens and learn which of them matter: simple, multi-head and cross.

Each probe reads the trained encoder, and the same one untrained: random convolutions are surprisingly good
features, and what pretraining taught is the difference. Nothing is chosen on the test split: epochs are
fixed, the last one counts, and every probe is shown.
"""

import glob
import json
import math
import os
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from scott import MIMJEPA, InputError, SwiGLU, attend, hide, init_linear, layer_norm, load_checkpoint
from scott import load_encoder, sample_masks
from train import LAYOUT, PLACES, Loader, Parser, Recipe, choose_machine
from train import default_recipe, generator_for, load_pictures, make_optimizer, run, schedules
from train import set_schedule, write_file

# ---- Attentive probes: tokens [B, N, D] → logits [B, classes] ----------------------------------------------

class SimpleProbe(nn.Module):
    """One learned direction says how much each token counts; their weighted sum is classified."""

    def __init__(self, dim, classes):
        super().__init__()
        self.dropout = nn.Dropout(0.2)
        self.score = nn.Linear(dim, 1)
        self.classify = nn.Linear(dim, classes)

    def forward(self, tokens):
        weights = self.score(self.dropout(tokens)).softmax(dim=1)  # [B, N, 1], over the tokens
        return self.classify((self.dropout(weights) * tokens).sum(dim=1))

class MultiHeadProbe(nn.Module):
    """Four such directions, each for a quarter of the channels of the projected tokens; then an MLP."""

    def __init__(self, dim, classes, heads=4):
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(0.2)
        self.score = nn.Linear(dim, heads)
        self.value = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.classify = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim), nn.LayerNorm(dim), nn.SiLU(),
                                      nn.Linear(dim, classes))

    def forward(self, tokens):
        B, N, D = tokens.shape
        weights = self.dropout(self.score(self.dropout(tokens)).softmax(dim=1))  # [B, N, heads]
        values = self.value(self.dropout(tokens)).view(B, N, self.heads, D // self.heads)
        pooled = (weights[..., None] * values).sum(dim=1).flatten(1)  # [B, D]
        return self.classify(pooled)

class CrossProbe(nn.Module):
    """A learned query attends to the tokens, as a class token would; then a feed-forward layer."""

    def __init__(self, dim, classes, heads=4):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(0.02 * torch.randn(dim))
        self.norm_tokens = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(0.2)
        self.norm_query = nn.LayerNorm(dim)
        self.mlp = SwiGLU(dim)
        self.norm = nn.LayerNorm(dim)
        self.classify = nn.Linear(dim, classes)
        self.apply(init_linear)

    def forward(self, tokens):
        B, N, D = tokens.shape
        query = self.query.expand(B, 1, D)
        q = self.q(query).view(B, 1, self.heads, -1).transpose(1, 2)  # [B, heads, 1, D/heads]
        k, v = self.kv(self.norm_tokens(tokens)).view(B, N, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = attend(q, k, v, 0.2 if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, 1, D)
        x = self.norm_query(query + self.dropout(self.proj(y)))
        x = x + self.mlp(x)
        return self.classify(self.norm(x)).squeeze(1)

PROBES = {"simple": SimpleProbe, "multi-head": MultiHeadProbe, "cross": CrossProbe}

# ---- Features and figures ----------------------------------------------------------------------------------

def central_views(loader, rows):
    """The central square of each picture, 224/256 of its shorter side: [B, 3, H, H] from 0 to 1."""
    sizes, side = loader.pictures.sizes[rows], loader.pictures.pixels.shape[-1]
    crop = (sizes.amin(1, keepdim=True) * 224 / 256 / sizes * side).round().clamp(min=1)
    drawn = torch.cat([rows[:, None], ((side - crop) / 2).floor(), crop, torch.zeros(len(rows), 1)], dim=1)
    return loader.crop(rows, loader.to_device(drawn))

class Features:
    """An encoder as a function: normalised images [B, 3, H, H] → normalised tokens [B, N, D]. It is frozen,
    unless it is for training."""

    def __init__(self, encoder, loader, machine, training=False):
        self.machine, self.loader = machine, loader
        self.encoder = encoder.to(machine.device).train(training).requires_grad_(training)
        if machine.compile:
            self.encoder.compile(fullgraph=True)

    def __call__(self, views):
        with torch.set_grad_enabled(self.encoder.training), self.machine.autocast():
            return layer_norm(self.encoder(views)).float()

    def of(self, rows, what, result):
        """result(tokens of the central views) for these pictures, [n, …], batch by batch."""
        size, results = min(64, len(rows)), None
        padded = torch.cat([rows, rows[:1].expand(-len(rows) % size)])  # one size: compiled once
        for i, part in enumerate(tqdm(padded.split(size), what, leave=False, disable=None)):
            images = central_views(self.loader, part)
            batch = result(self(self.loader.normalise(images)))
            if results is None:  # all room at once: pieces would leave holes in memory
                results = batch.new_empty(len(padded), *batch.shape[1:])
            results[i * size : (i + 1) * size] = batch
        return results[: len(rows)]

def accuracies(scores, labels):
    """(top-1, top-5, mean per class) in percent; scores [n, classes], −∞ for no guess at all; labels [n]."""
    scores, labels = scores.cpu(), labels.cpu()
    guesses = scores.topk(min(5, scores.shape[1]), dim=1)
    hits = (guesses.indices == labels[:, None]) & guesses.values.isfinite()
    first, classes = hits[:, 0].double(), labels.unique()
    per_class = [first[labels == label].mean() for label in classes]
    figures = first.mean(), hits.any(1).double().mean(), torch.stack(per_class).mean()
    return [100 * value.item() for value in figures]

def knn(train, train_labels, test, classes, k=10, temperature=0.07):
    """Weighted k nearest neighbours: each votes for its class with exp(cosine similarity / temperature)."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    scores = []
    for part in test.split(1024):
        similarity, index = (part @ train.T).topk(min(k, len(train)), dim=1)  # [b, k]
        votes = F.one_hot(train_labels[index], classes) * (similarity / temperature).exp()[:, :, None]
        scores.append(votes.sum(1))
    return torch.cat(scores)

def linear(train, train_labels, test, classes, decay=1e-3):
    """Logistic regression on standardised features, 300 L-BFGS iterations at most.  → scores [n, classes]"""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(classes, train.shape[1] + 1, device=train.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(train, weight[:, :-1], weight[:, -1]), train_labels)
        value = value + decay / 2 * weight[:, :-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return F.linear(test, weight[:, :-1], weight[:, -1]).detach()

# loader: of the training pictures; labels [n]: of all pictures; train, test: rows; classes: how many
Data = namedtuple("Data", "loader labels train test classes")

def split_data(pictures, recipe, machine, per_class=0):
    """The pictures that have labels; per_class: how many of each class to train on, 0 for all."""
    labels, rows = pictures.labels, torch.arange(len(pictures.labels)).tensor_split([pictures.train])
    train, test = (part[labels[part] >= 0] for part in rows)
    if len(labels[train].unique()) < 2 or len(test) == 0:
        raise InputError(f"{recipe.data_dir} has no labelled pictures of two classes. {LAYOUT}")
    if per_class:
        if per_class > labels[train].bincount().max():
            raise InputError(f"labels is {per_class}, but no class has so many training pictures")
        train = train[torch.randperm(len(train), generator=generator_for(recipe.seed, 4))]
        train = torch.cat([train[labels[train] == label][:per_class] for label in labels[train].unique()])
    recipe = replace(recipe, batch_size=min(64, len(train)))
    loader = Loader(pictures, train, recipe, machine, views=1)
    return Data(loader, labels, train, test, int(labels.max()) + 1)

def train_on_labels(features, names, data, epochs, warmup, seed, peak_lr=5e-4):
    """Train probes of these names together, on the same augmented views, and the encoder if it is not frozen,
    by AdamW and the schedules of pretraining; warmup: share of the steps.
    → {probe: (top-1, top-5, mean per class)} in percent, on the test split"""
    torch.manual_seed(seed)
    dim, device = features.encoder.config.dim, features.machine.device
    probes = nn.ModuleDict({name: PROBES[name](dim, data.classes) for name in names}).to(device)
    optimizer = make_optimizer([*features.encoder.parameters(), *probes.parameters()])
    total_steps = epochs * data.loader.steps_per_epoch
    for step in tqdm(range(1, total_steps + 1), "on labels", leave=False, disable=None):
        views, _, rows = data.loader.batch(step)
        set_schedule(optimizer, *schedules(step, total_steps, int(warmup * total_steps), peak_lr=peak_lr)[:2])
        tokens, target = features(views[0]), data.loader.to_device(data.labels[rows])
        # The probes share no weights, so from the sum of their losses each gets the gradient of its own.
        sum(F.cross_entropy(probe(tokens), target) for probe in probes.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    features.encoder.eval()
    probes.eval()
    with torch.no_grad():
        scores = features.of(data.test, "test", lambda x: torch.stack([p(x) for p in probes.values()], dim=1))
    return {name: accuracies(scores[:, i], data.labels[data.test]) for i, name in enumerate(probes)}

def evaluate(features, data, epochs, seed):
    """All probes of one frozen encoder: {probe: (top-1, top-5, mean per class)} in percent; and the averaged
    features [n, D] of training and test pictures, on the CPU, which gives the same figures everywhere."""
    both = data.train, data.test
    train, test = (features.of(rows, "features", lambda tokens: tokens.mean(1)).cpu() for rows in both)
    labels, truth = data.labels[data.train], data.labels[data.test]
    votes = knn(train, labels, test, data.classes)
    results = {"k-NN": accuracies(votes.log(), truth),  # a class without votes is not even the fifth guess
               "linear": accuracies(linear(train, labels, test, data.classes), truth)}
    if epochs > 0:
        results |= train_on_labels(features, PROBES, data, epochs, 0.2, seed)
    return results, train, test

def supervise(encoder, data, recipe, machine):
    """Train the encoder itself, with a simple probe on top, on the labels: the alternative to pretraining,
    for as many epochs and at its learning rate."""
    if machine.dtype == torch.float16:  # its gradients would need scaling: float32 is safe
        machine = machine._replace(autocast=nullcontext)
    features = Features(encoder, data.loader, machine, training=True)
    return train_on_labels(features, ["simple"], data, recipe.epochs, 40 / 300, recipe.seed, recipe.lr)

# ---- Pictures ----------------------------------------------------------------------------------------------

WORDS, INK = ImageFont.load_default(15), "#222222"
COLOURS = "#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b"

def save_grid(path, titles, rows, notes=(), tile=132):
    """Rows of tiles under titles: rows is {label: images [n, 3, H, H], 0 to 1}; notes: a text under each."""
    left, top, foot = 150, 26, 34 if notes else 4
    canvas = Image.new("RGB", (left + len(titles) * (tile + 4), top + len(rows) * (tile + foot)), "white")
    pen = ImageDraw.Draw(canvas)
    for x, title in enumerate(titles):
        pen.text((left + x * (tile + 4), 5), title, INK, WORDS)
    for y, (label, images) in enumerate(rows.items()):
        pen.text((6, top + y * (tile + foot)), label, INK, WORDS)
        for x, image in enumerate(images.cpu().nan_to_num().clamp(0, 1)):
            place = left + x * (tile + 4), top + y * (tile + foot)
            canvas.paste(to_pil_image(image).resize((tile, tile), Image.Resampling.NEAREST), place)
            if notes:
                colour = "#d00000" if notes[y][x] == "WRONG" else INK
                pen.text((place[0], place[1] + tile + 1), notes[y][x], colour, WORDS)
    write_file(path, partial(canvas.save, format="PNG"))

def round_ticks(high):
    """A few round numbers from 0 to high."""
    unit = 10 ** math.floor(math.log10(high / 6))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= high / 6)
    return [step * n for n in range(math.floor(high / step + 1e-9) + 1)]

def save_curves(path, panels, across):
    """A panel for each {title: {name: (xs, ys)}}, over one axis with the title `across`. Axes begin at 0."""
    left, right, height = 80, 820, 230
    canvas = Image.new("RGB", (right + 150, height * len(panels) + 30), "white")
    pen = ImageDraw.Draw(canvas)
    longest = max(x for lines in panels.values() for xs, _ in lines.values() for x in xs)
    for number, (title, lines) in enumerate(panels.items()):
        top, bottom = height * number + 34, height * (number + 1) - 22
        high = 1.05 * max(max(ys) for _, ys in lines.values()) or 1.0

        def place(x, y):
            return left + x / longest * (right - left), bottom - y / high * (bottom - top)

        pen.text((left, top - 24), title, INK, WORDS)
        for y in round_ticks(high):
            pen.line((place(0, y), place(longest, y)), "#dddddd")
            pen.text((left - 8, place(0, y)[1]), f"{y:.4g}", INK, WORDS, anchor="rm")
        for x in round_ticks(longest):
            pen.line((place(x, 0), place(x, high)), "#dddddd")
            pen.text((place(x, 0)[0], bottom + 4), f"{x:,g}", INK, WORDS, anchor="mt")
        label_at = bottom + 100
        ranked = sorted(zip(COLOURS * 2, lines.items()), key=lambda pair: pair[1][1][1][-1])
        for colour, (name, (xs, ys)) in ranked:
            points = [*map(place, xs, ys)]
            pen.line(points, colour, min(3, len(xs) - 1))
            label_at = min(points[-1][1], label_at - 16)  # from the lowest up: they must not overlap
            pen.text((right + 8, label_at), name, colour, WORDS, anchor="lm")
    pen.text((right, height * len(panels) + 8), across, INK, WORDS, anchor="rt")
    write_file(path, partial(canvas.save, format="PNG"))

def enlarged(visible, side):
    """A mask [B, N] in pixels: bool [B, 1, side, side]."""
    grid = math.isqrt(visible.shape[1])
    return F.interpolate(visible.view(-1, 1, grid, grid).float(), size=(side, side)) > 0.5

def draw_views(path, loader, step):
    """What a step of training sees: both views of six pictures, and what of the first is visible."""
    views, visible, _ = loader.batch(max(1, step))
    first, second = views[:, :6] * loader.std + loader.mean  # [6, 3, H, H] each, from 0 to 1
    stripes = torch.arange(first.shape[-1], device=loader.device)
    hatched = ((stripes[:, None] + stripes) % 8 < 2) * 0.4 + 0.6  # no picture looks like that
    seen = torch.where(enlarged(visible[:6], first.shape[-1]), first, hatched)
    names = "view 1", "what the context\nencoder sees of it", "view 2: the target\nencoder sees all"
    save_grid(path, [""] * len(first), dict(zip(names, (first, seen, second))))

def draw_components(path, loader, features, images):
    """The first three principal components of the tokens as red, green and blue: the paper's figure 1."""
    rows = {"picture": images}
    for name, encode in features.items():
        tokens = encode(loader.normalise(images)).cpu()  # [B, N, D]
        centred = tokens - tokens.mean((0, 1))
        axes = torch.linalg.svd(centred.flatten(0, 1).double(), full_matrices=False)[2][:3].float()
        colours = centred @ axes.T  # [B, N, 3]
        colours = colours - colours.amin((0, 1))
        shades = (colours / colours.amax((0, 1))).mT  # [B, 3, N]
        rows[f"tokens of the\n{name} encoder"] = shades.unflatten(2, [loader.recipe.grid] * 2)
    save_grid(path, [""] * len(images), rows)

def draw_neighbours(path, loader, data, averages):
    """Two test pictures, each with its five nearest training pictures by the features of each encoder.
    averages: {encoder: (training features [n, D], test features)}"""
    rows, notes = {}, []
    for i in torch.linspace(0, len(data.test) - 1, 2).long().tolist():
        for name, (train, test) in averages.items():
            likeness = F.normalize(train, dim=1) @ F.normalize(test[i], dim=0)
            shown = torch.cat([data.test[i, None], data.train[likeness.topk(min(5, len(train))).indices]])
            rows[f"{name}\nencoder{' ' * len(rows)}"] = central_views(loader, shown)
            right = data.labels[shown[1:]] == data.labels[shown[0]]
            notes.append([""] + ["right" if same else "WRONG" for same in right])
    save_grid(path, ["test picture", "nearest", "second", "third", "fourth", "fifth"], rows, notes)

@torch.no_grad()
def draw_leak(path, tokenizer, loader, image, visible):
    """Where each layer of the tokenizer is active, masked again after every layer and masked once: grey where
    it was seen, the darker the more; orange where it is made up. image [1, 3, H, H], visible bool [1, N]"""
    side, grid = image.shape[-1], math.isqrt(visible.shape[1])
    cells, seen = visible.view(1, 1, grid, grid), enlarged(visible, side)
    rim = F.max_pool2d(seen.float(), 3, 1, 1).bool() & ~seen  # of the hole, which is outlined
    orange, rows, notes = image.new_tensor([1.0, 0.55, 0.1]).view(3, 1, 1), {}, []
    for label, mask in (("masked again after\nevery layer", cells), ("masked once,\nbefore the first", None)):
        x = hide(loader.normalise(image), cells)
        tiles, texts = [image, torch.where(seen, image, 1.0)], ["", ""]
        for layer in (tokenizer.conv1, tokenizer.pool1, tokenizer.conv2, tokenizer.pool2):
            x = layer(x, mask).relu()  # which changes nothing after a pool
            active = x.mean(1, keepdim=True)
            made_up = active[~enlarged(visible, active.shape[-1])] > 0
            texts.append(f"hole: {made_up.float().mean():.0%} filled")
            active = F.interpolate(active, size=(side, side))
            grey = torch.where(seen, 1 - (active / active.max()).sqrt(), 1.0)
            tiles.append(torch.where((active > 0) & ~seen, orange, grey))
        rows[label] = torch.cat([torch.where(rim, 0.0, tile) for tile in tiles])
        notes.append(texts)
    titles = "picture", "its visible part", "convolution 1", "pool 1", "convolution 2", "pool 2"
    save_grid(path, titles, rows, notes)

# ---- Command line ------------------------------------------------------------------------------------------

def read_arguments(argv):
    parser = Parser(("dataset", *PLACES), prog="eval.py", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="file, or pattern with *")
    parser.add_argument("--encoder", choices=("context", "target"), default="context", help="(context)")
    parser.add_argument("--epochs", type=int, default=None, help="of attentive probes (the recipe's)")
    parser.add_argument("--labels", type=int, default=0, help="labelled pictures per class; 0: all (0)")
    off = dict(action="store_true", default=False)
    parser.add_argument("--from-scratch", help="also train on the labels alone", **off)
    parser.add_argument("--finetune", help="also train on from the checkpoint by labels", **off)
    parser.add_argument("--no-baseline", help="skip the untrained encoder", **off)
    parser.add_argument("--no-pca", help="draw no pictures", **off)
    return parser.read(argv)

def print_table(results):
    print(f"\n{'probe':12}{'encoder':14}{'top-1':>11}{'top-5':>11}{'per class':>11}   (%, test split)")
    for probe in ("k-NN", "linear", *PROBES):
        for encoder, figures in results.items():
            if probe in figures:
                print(f"{probe:12}{encoder:14}" + "".join(f"{figure:>11.1f}" for figure in figures[probe]))

def choose_data(recipe, given):
    """The recipe of the pictures to probe on: the run's own, elsewhere perhaps, or another data set."""
    elsewhere = "data_dir" in given and recipe.dataset == "critters"
    if given.get("dataset", recipe.dataset) == recipe.dataset and not elsewhere:
        return replace(recipe, **given)
    own = "image_size", "mask_ratio", "masking", "seed"
    return replace(default_recipe(given), **{name: getattr(recipe, name) for name in own})

def draw_run(place, saved, loader, features):
    """The pictures of a run that need no labels. place("pca.png"): where that one belongs."""
    recipe, generator = loader.recipe, generator_for(loader.recipe.seed, 10)
    epochs, columns = [row["epoch"] for row in saved["history"]], ("loss", "target_std", "learning_rate")
    if len(epochs) > 1:
        curves = {name: {name: (epochs, [row[name] for row in saved["history"]])} for name in columns}
        save_curves(place("curves.png"), curves, "epochs")
    draw_views(place("views.png"), loader, saved["step"])
    images = central_views(loader, loader.rows[torch.randperm(len(loader.rows), generator=generator)[:6]])
    draw_components(place("pca.png"), loader, features, images)
    encoder = features["trained"].encoder
    if encoder.config.tokenizer != "patch":
        visible = sample_masks(1, recipe.grid, recipe.mask_ratio, recipe.masking, generator)
        draw_leak(place("leak.png"), encoder.tokenizer, loader, images[:1], loader.to_device(visible))

def probe_checkpoint(path, args, given, machine):
    """All about one checkpoint: table, eval.json, pictures.  → epoch, history, {encoder: {probe: figures}}"""
    torch.compiler.reset()  # of the graphs of other checkpoints only a few would be kept
    saved = load_checkpoint(path)
    recipe = Recipe(**saved["recipe"])
    source = choose_data(recipe, given)
    pictures = load_pictures(source, device=machine.device)
    epochs = recipe.probe_epochs if args.epochs is None else args.epochs
    results, averages, tag = {}, {}, Path(path).stem.removeprefix("ckpt")

    def place(name):  # of ckpt-0005.pt the table is eval-0005.json
        return Path(path).with_name(f"{Path(name).stem}{tag}{Path(name).suffix}")

    def untrained():
        torch.manual_seed(recipe.seed)  # what train.py starts from: this is the encoder of step 0
        return MIMJEPA(recipe).context_encoder

    def report():
        """Called after each long part: if the next one is stopped, this much is there."""
        print_table(results)
        about = dict(step=saved["step"], dataset=source.dataset, encoder=args.encoder, labels=args.labels,
                     probe_epochs=epochs, columns=["top-1", "top-5", "mean-per-class"], results=results)
        write_file(place("eval.json"), lambda file: file.write(json.dumps(about, indent=1).encode()))

    rows = pictures.sizes[:, 0].nonzero()[:, 0]  # without bad files, whose size is 0
    loader = Loader(pictures, rows, replace(source, batch_size=min(64, len(rows))), machine)
    features = {"trained": Features(load_encoder(saved, args.encoder), loader, machine)}
    if not args.no_baseline:
        features["untrained"] = Features(untrained(), loader, machine)
    if not args.no_pca:
        draw_run(place, saved, loader, features)
    data = split_data(pictures, source, machine, args.labels)
    print(f"{source.dataset}: {len(data.train):,} training and {len(data.test):,} test pictures of "
          f"{data.classes} classes; {args.encoder} encoder of {path} at step {saved['step']:,}")
    for name, encode in features.items():
        results[name], *averages[name] = evaluate(encode, data, epochs, recipe.seed)
    if not args.no_pca:
        draw_neighbours(place("neighbours.png"), loader, data, averages)
    report()
    if args.from_scratch:
        results["from scratch"] = supervise(untrained(), data, recipe, machine)
        report()
    if args.finetune:
        results["fine-tuned"] = supervise(load_encoder(saved, args.encoder), data, recipe, machine)
        report()
    print(f"\nwrote {place('eval.json')}")
    return saved["epoch"], saved["history"], results

def draw_course(path, times):
    """How a run's probes fare as it goes on, below its loss. times: {epoch: (history, results)}"""
    history, last = times[max(times)]
    epochs, probes = sorted(times), last["trained"]
    curves = {name: (epochs, [times[t][1]["trained"][name][0] for t in epochs]) for name in probes}
    start = {f"{name}, untrained": ([0, max(times)], [row[0]] * 2)  # a line to compare with
             for name, row in last.get("untrained", {}).items()}
    loss = [row["epoch"] for row in history], [row["loss"] for row in history]
    save_curves(path, {"loss": {"loss": loss}, "accuracy, top-1 in %": curves | start}, "epochs")

def main(argv=None, stop=None):
    """Probe as the command line says. Returns the exit status, 0."""
    args, given = read_arguments(argv)
    machine, runs, paths = choose_machine(args), {}, []  # by folder: {epoch: (history, results)}
    for pattern in map(os.path.expanduser, args.checkpoints):  # not every shell expands runs/a/ckpt*.pt
        paths += [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern)) or [pattern]
    for path in {Path(path).resolve(): path for path in paths}.values():
        epoch, history, results = probe_checkpoint(path, args, given, machine)
        runs.setdefault(Path(path).resolve().parent, {})[epoch] = history, results
    for folder, times in runs.items():
        if len(times) > 1:
            draw_course(folder / "probes.png", times)
    return 0

if __name__ == "__main__":
    run(main)
