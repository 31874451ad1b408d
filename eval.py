"""Probe a frozen encoder: how much of what the labels say can be read off its features?

    python eval.py runs/pets/ckpt.pt
    python eval.py runs/critters/ckpt.pt --dataset folder --data-dir my/pictures
    python eval.py runs/a/ckpt.pt runs/b/ckpt.pt            several runs: also their mean and deviation
    python eval.py runs/a/ckpt*.pt                          one run at several times: also curves
    python eval.py runs/pets/ckpt.pt --from-scratch         and the same encoder trained on the labels alone

Two probes look at one averaged vector per picture: k nearest neighbours, and a linear classifier. Three
attentive probes look at all tokens and learn which of them matter: simple, multi-head and cross.

Every row of the table stands there twice, for the trained encoder and for the same encoder before training. A
random convolutional tokenizer is a surprisingly good feature extractor, and what pretraining taught is the
difference. Nothing is chosen by looking at the test split: the number of epochs is fixed, the last epoch's
figures are reported, and every probe is shown.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from scott import MIMJEPA, InputError, SwiGLU, attend, hide, init_linear, layer_norm, load_checkpoint
from scott import load_encoder, sample_masks
from train import RECIPES, Loader, Parser, check_recipe, crop_and_resize, draw_curves, generator_for
from train import list_pictures, load_pixels, make_optimizer, normalise, run, save_grid, schedules
from train import set_schedule, setup, writable, write_whole

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
                                      nn.Linear(dim, classes))  # fmt: skip

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
    sizes, side = loader.sizes[rows], loader.pixels.shape[-1]
    crop = (sizes.amin(1, keepdim=True) * 224 / 256 / sizes * side).round().clamp(min=1)
    crops = torch.cat([((side - crop) / 2).floor(), crop], dim=1).long()  # left, top, width, height
    return crop_and_resize(loader.pixels, rows, crops, loader.image_size).to(loader.device) / 255

class Features:
    """The frozen encoder as a function: images [B, 3, H, H] → normalised tokens [B, N, D], no gradient."""

    def __init__(self, encoder, machine):
        self.machine, self.encoder = machine, encoder.to(machine.device).eval().requires_grad_(False)
        if machine.compile:
            self.encoder.compile(fullgraph=True)

    @torch.no_grad()
    def __call__(self, images):
        with self.machine.autocast():
            return layer_norm(self.encoder(images)).float()

    def of_central_views(self, loader, rows, batch_size=64):
        """Tokens of `rows`, batch by batch."""
        for part in rows.split(batch_size):
            yield self(normalise(central_views(loader, part)))

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

@dataclass
class Data:
    """The pictures that probes are trained and tested on."""

    loader: Loader  # of the training rows
    labels: torch.Tensor  # long [n], of all pictures
    train: torch.Tensor  # rows, long
    test: torch.Tensor
    classes: int

def split_data(pictures, pixels, sizes, image_size, seed, machine, per_class=0):
    """The readable pictures that have labels; per_class: how many of each class to train on, 0 for all."""
    labels = torch.tensor(pictures.labels)
    rows = torch.arange(len(labels)).tensor_split([pictures.train])
    train, test = (part[(sizes[part, 0] > 0) & (labels[part] >= 0)] for part in rows)
    if per_class:
        train = train[torch.randperm(len(train), generator=generator_for(seed, 4))]
        train = torch.cat([train[labels[train] == label][:per_class] for label in labels[train].unique()])
    if len(labels[train].unique()) < 2 or len(test) == 0:
        raise InputError("no readable pictures of two classes to train probes on, or none to test them on")
    loader = Loader(pixels, sizes, train, min(64, len(train)), image_size, seed, machine)
    return Data(loader, labels, train, test, len(pictures.classes))

def train_on_labels(forward, parameters, data, epochs, warmup, what, seed, peak_lr=5e-4):
    """The supervised loop, for probes and whole networks: AdamW and the schedules of pretraining.

    forward: views [B, 3, H, H] → logits [B, classes] of each head; losses are added. warmup: share of steps
    """
    torch.manual_seed(seed)
    loader = data.loader
    optimizer = make_optimizer(parameters, loader.device)
    total_steps = epochs * loader.steps_per_epoch
    batches = tqdm(loader.batches(1, total_steps, views=1), what, total_steps, leave=False, disable=None)
    for step, (draws, rows, _) in batches:
        set_schedule(optimizer, *schedules(step, total_steps, int(warmup * total_steps), peak_lr=peak_lr)[:2])
        target = data.labels[rows].to(loader.device)
        losses = [F.cross_entropy(logits, target) for logits in forward(loader.views(*draws))]
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()

def train_probes(features, data, config, epochs, seed):
    """Train the three attentive probes together, on the same augmented views of the training pictures."""
    torch.manual_seed(seed)
    probes = nn.ModuleDict({name: probe(config.dim, data.classes) for name, probe in PROBES.items()})
    probes.to(features.machine.device)

    def forward(images):
        tokens = features(images)
        # The probes share no weights, so from the sum of their losses each gets the gradient of its own.
        return [probe(tokens) for probe in probes.values()]

    train_on_labels(forward, probes.parameters(), data, epochs, 0.2, "probes", seed)
    return probes.eval()

@torch.no_grad()
def score_probes(features, probes, data):
    """{probe: (top-1, top-5, mean per class)} in percent, on the test split."""
    scores = {name: [] for name in probes}
    for tokens in features.of_central_views(data.loader, data.test):
        for name, probe in probes.items():
            scores[name].append(probe(tokens))
    return {name: accuracies(torch.cat(parts), data.labels[data.test]) for name, parts in scores.items()}

def evaluate(features, data, config, epochs, seed):
    """All probes of one frozen encoder: {probe: (top-1, top-5, mean per class)} in percent."""

    def averages(rows):
        batches = features.of_central_views(data.loader, rows)
        batches = tqdm(batches, "extracting features", len(rows.split(64)), leave=False, disable=None)
        return torch.cat([tokens.mean(1) for tokens in batches])

    train, test = averages(data.train), averages(data.test)
    labels, truth = data.labels[data.train].to(features.machine.device), data.labels[data.test]
    votes = knn(train, labels, test, data.classes)
    results = {"k-NN": accuracies(votes.log(), truth),  # a class without votes is not even the fifth guess
               "linear": accuracies(linear(train, labels, test, data.classes), truth)}  # fmt: skip
    if epochs > 0:
        results |= score_probes(features, train_probes(features, data, config, epochs, seed), data)
    return results

def supervise(encoder, data, config, epochs, recipe, machine):
    """Train the encoder itself, with a simple probe on top, on the labels: the alternative to pretraining."""
    torch.manual_seed(recipe["seed"])
    probe = SimpleProbe(config.dim, data.classes).to(machine.device).train()
    encoder.to(machine.device).requires_grad_(True).train()
    if machine.compile:
        encoder.compile(fullgraph=True)

    def forward(images):
        # In half precision gradients would need scaling, and this is the yardstick: then without.
        with machine.autocast() if machine.dtype == torch.bfloat16 else nullcontext():
            return [probe(layer_norm(encoder(images))).float()]

    parameters = [*encoder.parameters(), *probe.parameters()]
    train_on_labels(forward, parameters, data, epochs, 40 / 300, "on labels", recipe["seed"], recipe["lr"])
    return score_probes(Features(encoder, machine), {"simple": probe.eval()}, data)

# ---- What the tokens look like -----------------------------------------------------------------------------

def pca_columns(features, images):
    """Images, their tokens' first three principal components as colours, and these without the background.

    images [B, 3, H, H] from 0 to 1  →  {title: three of the same}, the paper's figure 1
    """
    tokens = features(normalise(images)).cpu()  # [B, N, D]
    B, N, D = tokens.shape
    H, grid = images.shape[-1], int(N**0.5)
    flat = (tokens - tokens.mean((0, 1))).flatten(0, 1)
    _, _, axes = torch.linalg.svd(flat.double(), full_matrices=False)
    components = (flat @ axes[:3].T.float()).view(B, grid, grid, 3)
    # A component's sign is arbitrary. The border of a photograph is mostly background: let that be negative.
    border = torch.ones(grid, grid, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    if components[:, border, 0].mean() > 0:
        components[..., 0] *= -1
    low, high = components.amin((0, 1, 2)), components.amax((0, 1, 2))
    colours = (components - low) / (high - low)
    maps = {"components": colours, "foreground": colours * (components[..., :1] > 0)}
    maps = {title: F.interpolate(m.permute(0, 3, 1, 2), size=(H, H)) for title, m in maps.items()}
    return {"picture": images} | maps

@torch.no_grad()
def leak_columns(tokenizer, images, visible):
    """What a mask is worth: an image, its visible part, and how active each layer is at each place, twice.

    Upper row: the masked convolutions. Lower row: the same convolutions and pools without the mask, on the
    same visible part. images [B, 3, H, H] from 0 to 1, visible bool [B, N]  →  {title: [2B, 3, H, H]}, six
    """
    H, grid = images.shape[-1], int(visible.shape[1] ** 0.5)
    cells = visible.view(-1, 1, grid, grid)
    rows = []
    for mask in (cells, None):
        x, maps = hide(normalise(images), cells), [images, hide(images, cells)]
        for layer in (tokenizer.conv1, tokenizer.pool1, tokenizer.conv2, tokenizer.pool2):
            x = layer(x, mask)
            x = x.relu() if layer in (tokenizer.conv1, tokenizer.conv2) else x
            activity = x.abs().mean(1, keepdim=True).sqrt()  # the root, for faint traces to show
            activity = activity / activity.amax((1, 2, 3), keepdim=True)
            maps.append(F.interpolate(activity, size=(H, H)).expand(-1, 3, -1, -1))
        rows.append(maps)
    titles = "picture", "visible", "conv 1", "pool 1", "conv 2", "pool 2"
    return {title: torch.stack(pair, dim=1).flatten(0, 1) for title, *pair in zip(titles, *rows)}

# ---- Command line ------------------------------------------------------------------------------------------

def read_arguments(argv):
    parser = Parser(prog="eval.py", description="Probe a frozen encoder, and the same encoder untrained.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="such as runs/pets/ckpt.pt")
    parser.add_argument("--dataset", choices=RECIPES, help="probe on this (default: what it was trained on)")
    parser.add_argument("--encoder", choices=("context", "target"), default="context", help="(context)")
    parser.add_argument("--epochs", type=int, help="of the attentive probes, 0: none (default: the recipe's)")
    parser.add_argument("--labels", type=int, default=0, help="labelled pictures per class; 0: all (0)")
    parser.add_argument("--from-scratch", action="store_true", help="also train on the labels alone")
    parser.add_argument("--finetune", action="store_true", help="also train on from the checkpoint by labels")
    parser.add_argument("--no-baseline", action="store_true", help="skip the untrained encoder")
    parser.add_argument("--no-pca", action="store_true", help="skip the pictures pca.png and leak.png")
    args = parser.parse_args(argv)
    for name in ("epochs", "labels"):
        if (getattr(args, name) or 0) < 0:
            raise InputError(f"{name} is {getattr(args, name)}, it must be 0 or more")
    return args

def print_table(results, text):
    """A line for each probe and encoder; `text(figures)` makes the three columns."""
    print(f"\n{'probe':12}{'encoder':14}{text(('top-1', 'top-5', 'per class'))}   (%, test split)")
    for probe in ("k-NN", "linear", *PROBES):
        for encoder, figures in results.items():
            if probe in figures:
                print(f"{probe:12}{encoder:14}{text(figures[probe])}")

def one_run(figures):
    return "".join(f"{value:>11}" if isinstance(value, str) else f"{value:11.1f}" for value in figures)

def several_runs(figures):
    """Columns of mean ± standard deviation; figures: one row of three for each run."""
    if isinstance(figures[0], str):
        return "".join(f"{value:>15}" for value in figures)
    std, mean = torch.std_mean(torch.tensor(figures), dim=0)
    return "".join(f"{f'{m:.1f} ± {s:.1f}':>15}" for m, s in zip(mean.tolist(), std.tolist()))

def probe_checkpoint(path, args, machine):
    """All about one checkpoint: table, eval.json, pictures.  → (step, {encoder: {probe: figures}})"""
    torch.compiler.reset()  # of the graphs of other checkpoints only a few would be kept
    saved = load_checkpoint(path)
    config, recipe = check_recipe(saved.get("recipe")), saved["recipe"]
    trained, seed = load_encoder(saved, args.encoder), recipe["seed"]
    dataset, same = args.dataset or recipe["dataset"], args.dataset in (None, recipe["dataset"])
    data_dir = (recipe["data_dir"] if same else "data") if args.data_dir is None else args.data_dir
    recipe = recipe | {"skip_bad_images": args.skip_bad_images or recipe["skip_bad_images"]}
    epochs = recipe["probe_epochs"] if args.epochs is None else args.epochs
    folder, tag = Path(path).parent, Path(path).stem.removeprefix("ckpt")  # ckpt-0005.pt: eval-0005.json
    if not writable(folder):
        raise InputError(f"cannot write to {folder}: copy the checkpoint to where you can")
    pictures = list_pictures(dataset, data_dir, recipe["pictures"] if same else RECIPES[dataset]["pictures"])
    if len(pictures.classes) < 2 or pictures.train == len(pictures.items):
        need = "labelled pictures of two classes or more, in train/<class>/… and test/<class>/…"
        raise InputError(f"{data_dir} is not enough for probes, which need {need}")
    pixels, sizes = load_pixels(pictures, dataset, data_dir, folder, recipe)
    data = split_data(pictures, pixels, sizes, config.image_size, seed, machine, args.labels)
    counts = f"{len(data.train):,} training and {len(data.test):,} test pictures of {data.classes} classes"
    print(f"{dataset}: {counts}; {args.encoder} encoder of {path} at step {saved['step']:,}")

    def untrained():
        torch.manual_seed(seed)  # what train.py starts from: this is the encoder of step 0
        return MIMJEPA(config).context_encoder

    encoders = {"trained": trained} if args.no_baseline else {"trained": trained, "untrained": untrained()}
    features = {name: Features(encoder, machine) for name, encoder in encoders.items()}
    results = {name: evaluate(f, data, config, epochs, seed) for name, f in features.items()}
    settings = data, config, recipe["epochs"], recipe, machine  # as many epochs as pretraining had
    if args.from_scratch:
        results["from scratch"] = supervise(untrained(), *settings)
    if args.finetune:
        results["fine-tuned"] = supervise(load_encoder(saved, args.encoder), *settings)
    print_table(results, one_run)

    report = dict(
        checkpoint=path, encoder=args.encoder, step=saved["step"], dataset=dataset, labels=args.labels,
        probe_epochs=epochs, columns=["top-1", "top-5", "mean-per-class"], results=results,
    )  # fmt: skip
    written = [folder / f"eval{tag}.json"]
    write_whole(written[0], lambda file: file.write(json.dumps(report, indent=1).encode()))
    if not args.no_pca:
        generator = generator_for(seed, 5)
        rows = data.test[torch.randperm(len(data.test), generator=generator)[:6]]
        images = central_views(data.loader, rows)
        written.append(folder / f"pca{tag}.png")
        save_grid(written[-1], pca_columns(features["trained"], images))
        if config.tokenizer != "patch":
            visible = sample_masks(len(images[:2]), config.grid, config.mask_ratio, config.masking, generator)
            written.append(folder / f"leak{tag}.png")
            save_grid(written[-1], leak_columns(trained.tokenizer, images[:2], visible.to(machine.device)))
    print(f"\nwrote {', '.join(map(str, written))}")
    return saved["step"], results

def main(argv=None):
    args = read_arguments(argv)
    machine, runs = setup(args), {}  # by folder: {step: results}
    for path in {Path(path).resolve(): path for path in args.checkpoints}.values():
        step, results = probe_checkpoint(path, args, machine)
        runs.setdefault(Path(path).parent.resolve(), {})[step] = results
    for folder, times in runs.items():
        if len(times) > 1:  # how the probes of a run fare as it goes on, from what training started from
            start = {} if args.no_baseline else {0: {"trained": next(iter(times.values()))["untrained"]}}
            steps = sorted(start | times)
            series = [(start | times)[step]["trained"] for step in steps]
            curves = {f"{probe}, top-1 in %": [row[probe][0] for row in series] for probe in series[0]}
            draw_curves(folder / "probes.png", steps, curves)
            print(f"wrote {folder / 'probes.png'}")
    if len(runs) > 1:
        print(f"\nmean ± standard deviation of {len(runs)} runs, each at its last checkpoint")
        last = [times[max(times)] for times in runs.values()]
        print_table({e: {p: [run[e][p] for run in last] for p in last[0][e]} for e in last[0]}, several_runs)
    return 0

if __name__ == "__main__":
    run(main)
