"""Probe a frozen encoder: how much of what the labels say can be read off its features?

    python eval.py runs/pets/ckpt.pt
    python eval.py runs/critters/ckpt.pt --dataset folder --data-dir my/pictures
    python eval.py runs/a/ckpt.pt runs/b/ckpt.pt            several runs: also their mean and deviation
    python eval.py runs/a/ckpt*.pt                          one run at several times: also curves
    python eval.py runs/pets/ckpt.pt --from-scratch         and the same encoder trained on the labels alone

Two probes look at one averaged vector a picture: k nearest neighbours, and a linear classifier. Three
attentive probes look at all tokens and learn which of them matter: simple, multi-head and cross.

Every row of the table stands there twice, for the trained encoder and for the same encoder before training. A
random convolutional tokenizer is a surprisingly good feature extractor, and what pretraining taught is the
difference. Nothing is chosen by looking at the test split: the number of epochs is fixed, the last epoch's
figures are reported, and every probe is shown.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from scott import MIMJEPA, SwiGLU, hide, init_linear, layer_norm, load_encoder, sample_masks
from train import (
    RECIPES, Loader, Parser, add_device_arguments, centre_crops, check_writable, choose_device,
    choose_precision, crop_and_resize, draw_curves, generator_for, list_pictures, load_pixels, load_run,
    make_optimizer, normalise, run, save_image, schedules, set_schedule, stop, write_whole,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------
# Attentive probes: tokens [B, N, D] → logits [B, classes]
# ------------------------------------------------------------------------------------------------------------


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
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2 if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, 1, D)
        x = self.norm_query(query + self.dropout(self.proj(y)))
        x = x + self.mlp(x)
        return self.classify(self.norm(x)).squeeze(1)


PROBES = {"simple": SimpleProbe, "multi-head": MultiHeadProbe, "cross": CrossProbe}

# ------------------------------------------------------------------------------------------------------------
# Features and figures
# ------------------------------------------------------------------------------------------------------------


class Features:
    """The frozen encoder as a function: images [B, 3, H, H] → normalised tokens [B, N, D], no gradient."""

    def __init__(self, encoder, device, dtype=None, use_compile=False):
        self.encoder = encoder.to(device).eval().requires_grad_(False)
        self.forward = torch.compile(self.encoder, fullgraph=True) if use_compile else self.encoder
        self.device, self.dtype = device, dtype

    @torch.no_grad()
    def __call__(self, images):
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            return layer_norm(self.forward(images)).float()

    def of_test_views(self, loader, rows, image_size, batch_size=64):
        """Tokens of the central crops of `rows`, batch by batch."""
        for part in rows.split(batch_size):
            crops = centre_crops(loader.sizes[part]).to(self.device)
            yield self(normalise(crop_and_resize(loader.read(part), crops, None, image_size)))


def accuracies(scores, labels):
    """(top-1, top-5, mean per class) in percent; scores [n, classes], labels [n]."""
    scores, labels = scores.cpu(), labels.cpu()
    hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
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
class Labelled:
    """The pictures that probes are trained and tested on."""

    loader: Loader  # of the training rows
    labels: torch.Tensor  # long [n], of all pictures
    train: torch.Tensor  # rows, long
    test: torch.Tensor
    classes: int


def labelled(pictures, pixels, sizes, seed, device, per_class=0, use_compile=False):
    """Split the readable pictures; per_class: keep so many labelled ones of each class, 0 for all."""
    labels = torch.tensor(pictures.labels)
    rows = torch.arange(len(labels)).tensor_split([pictures.train])
    train, test = (part[sizes[part, 0] > 0] for part in rows)
    if per_class:
        train = train[torch.randperm(len(train), generator=generator_for(seed, 4))]
        train = torch.cat([train[labels[train] == label][:per_class] for label in labels[train].unique()])
    if len(labels[train].unique()) < 2 or len(test) == 0:
        stop("no readable pictures of two classes or more to train probes on, or none to test them on")
    loader = Loader(pixels, sizes, train, min(64, len(train)), seed, device, use_compile=use_compile)
    return Labelled(loader, labels, train, test, len(pictures.classes))


def train_on_labels(forward, parameters, data, image_size, epochs, warmup, what, seed, peak_lr=5e-4):
    """The supervised loop, for probes and whole networks: AdamW and the schedules of pretraining.

    forward: views [B, 3, H, H] → a list of logits [B, classes], whose losses are added up
    warmup: share of the steps
    """
    torch.manual_seed(seed)
    loader = data.loader
    optimizer = make_optimizer(parameters, loader.device)
    total_steps = epochs * loader.steps_per_epoch
    batches = tqdm(loader.batches(1, total_steps, views=1), what, total_steps, leave=False, disable=None)
    for step, (draws, rows, _) in batches:
        lr, weight_decay, _ = schedules(step, total_steps, int(warmup * total_steps), peak_lr=peak_lr)
        set_schedule(optimizer, lr, weight_decay)
        target = data.labels[rows].to(loader.device)
        losses = [F.cross_entropy(logits, target) for logits in forward(loader.views(*draws, image_size))]
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_probes(features, data, config, epochs, seed):
    """Train the three attentive probes together, on the same augmented views of the training pictures."""
    torch.manual_seed(seed)
    probes = nn.ModuleDict({name: probe(config.dim, data.classes) for name, probe in PROBES.items()})
    probes.to(features.device)

    def forward(images):
        tokens = features(images)
        # The probes share no weights, so from the sum of their losses each gets the gradient of its own.
        return [probe(tokens) for probe in probes.values()]

    train_on_labels(
        forward, probes.parameters(), data, config.image_size, epochs, 1 / 5, "training probes", seed
    )
    return probes.eval()


@torch.no_grad()
def test_probes(features, probes, data, image_size):
    """{probe: (top-1, top-5, mean per class)} in percent, on the test split."""
    scores = {name: [] for name in probes}
    for tokens in features.of_test_views(data.loader, data.test, image_size):
        for name, probe in probes.items():
            scores[name].append(probe(tokens))
    return {name: accuracies(torch.cat(parts), data.labels[data.test]) for name, parts in scores.items()}


def evaluate(features, data, config, epochs, seed):
    """All probes of one frozen encoder: {probe: (top-1, top-5, mean per class)} in percent."""

    def averages(rows):
        batches = features.of_test_views(data.loader, rows, config.image_size)
        batches = tqdm(batches, "extracting features", len(rows.split(64)), leave=False, disable=None)
        return torch.cat([tokens.mean(1) for tokens in batches])

    train, test = averages(data.train), averages(data.test)
    labels, truth = data.labels[data.train].to(features.device), data.labels[data.test]
    results = {"k-NN": accuracies(knn(train, labels, test, data.classes), truth),
               "linear": accuracies(linear(train, labels, test, data.classes), truth)}  # fmt: skip
    if epochs == 0:
        return results
    probes = train_probes(features, data, config, epochs, seed)
    return results | test_probes(features, probes, data, config.image_size)


def supervise(encoder, data, config, epochs, recipe, device, dtype=None, use_compile=False):
    """Train the encoder itself, with a simple probe on top, on the labels: the alternative to pretraining."""
    if dtype == torch.float16:
        dtype = None  # half precision's gradients would need scaling, and this is the yardstick
    torch.manual_seed(recipe["seed"])
    probe = SimpleProbe(config.dim, data.classes).to(device).train()
    encoder = encoder.to(device).requires_grad_(True).train()
    network = torch.compile(encoder, fullgraph=True) if use_compile else encoder

    def forward(images):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return [probe(layer_norm(network(images))).float()]

    parameters = [*encoder.parameters(), *probe.parameters()]
    settings = config.image_size, epochs, 40 / 300, "training on labels", recipe["seed"], recipe["lr"]
    train_on_labels(forward, parameters, data, *settings)
    features = Features(encoder, device, dtype)
    return test_probes(features, {"simple": probe.eval()}, data, config.image_size)


# ------------------------------------------------------------------------------------------------------------
# What the tokens look like
# ------------------------------------------------------------------------------------------------------------


def pca_picture(features, images):
    """Images, their tokens' first three principal components as colours, and these without the background.

    images [B, 3, H, H] from 0 to 1  →  [3, H', W'] from 0 to 1, one row a picture (the paper's figure 1)
    """
    tokens = features(normalise(images)).cpu()  # [B, N, D]
    B, N, D = tokens.shape
    H, grid = images.shape[-1], int(N**0.5)
    flat = tokens.flatten(0, 1) - tokens.mean((0, 1))
    _, _, axes = torch.linalg.svd(flat.double(), full_matrices=False)
    components = (flat @ axes[:3].T.float()).view(B, grid, grid, 3)
    # A component's sign is arbitrary. The border of a photograph is mostly background: let that be negative.
    border = torch.ones(grid, grid, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    if components[:, border, 0].mean() > 0:
        components[..., 0] *= -1
    foreground = (components[..., :1] > 0).float()
    low, high = components.amin((0, 1, 2)), components.amax((0, 1, 2))
    colours = (components - low) / (high - low)
    maps = [colours, colours * foreground]
    maps = [F.interpolate(m.permute(0, 3, 1, 2), size=(H, H)) for m in maps]
    columns = [F.pad(column, (2, 2, 2, 2), value=1.0) for column in (images.cpu(), *maps)]
    return torch.cat([torch.cat(list(column), dim=1) for column in columns], dim=2)


@torch.no_grad()
def leak_picture(tokenizer, images, visible):
    """What a mask is worth: an image, its visible part, and how active each layer is at each place, twice.

    Upper row: the masked convolutions. Lower row: the same convolutions and pools without the mask, on the
    same visible part. images [B, 3, H, H] from 0 to 1, visible bool [B, N]  →  [3, H', W'] from 0 to 1
    """
    H, grid = images.shape[-1], int(visible.shape[1] ** 0.5)
    cells = visible.view(-1, 1, grid, grid)
    shown = hide(images, cells)
    rows = []
    for mask in (cells, None):
        x, maps = hide(normalise(images), cells), [images, shown]
        for layer in (tokenizer.conv1, tokenizer.pool1, tokenizer.conv2, tokenizer.pool2):
            x = layer(x, mask)
            x = x.relu() if layer in (tokenizer.conv1, tokenizer.conv2) else x
            activity = x.abs().mean(1, keepdim=True).sqrt()  # the root, for faint traces to show
            activity = activity / activity.amax((1, 2, 3), keepdim=True)
            maps.append(F.interpolate(activity, size=(H, H)).expand(-1, 3, -1, -1))
        rows.append(torch.cat([F.pad(column, (2, 2, 2, 2), value=1.0) for column in maps], dim=3))
    return torch.cat([row for pair in zip(*rows) for row in pair], dim=1)


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def read_arguments(argv):
    parser = Parser("eval.py", description="Probe a frozen encoder, and the same encoder untrained.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="such as runs/pets/ckpt.pt")
    parser.add_argument("--dataset", choices=RECIPES, help="probe on this (default: what it was trained on)")
    parser.add_argument("--data-dir", help="where it is (default: as in training; data for another data set)")
    parser.add_argument("--skip-bad-images", action="store_true", help="leave out files that cannot be read")
    parser.add_argument("--encoder", choices=("context", "target"), default="context", help="(context)")
    parser.add_argument("--epochs", type=int, help="of the attentive probes, 0: none (default: the recipe's)")
    parser.add_argument("--labels", type=int, default=0, help="so many labelled pictures a class; 0: all (0)")
    parser.add_argument("--from-scratch", action="store_true", help="also train on the labels alone")
    parser.add_argument("--finetune", action="store_true", help="also train on from the checkpoint by labels")
    parser.add_argument("--no-baseline", action="store_true", help="skip the untrained encoder")
    parser.add_argument("--no-pca", action="store_true", help="skip the pictures pca.png and leak.png")
    add_device_arguments(parser)
    args = parser.parse_args(argv)
    for name in ("epochs", "labels"):
        if (getattr(args, name) or 0) < 0:
            stop(f"{name} is {getattr(args, name)}, it must be 0 or more")
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


def probe_checkpoint(path, args, device, dtype, use_compile):
    """All about one checkpoint: table, eval.json, pictures.  → (step, {encoder: {probe: figures}})"""
    saved = load_run(path)
    trained = load_encoder(saved, args.encoder)
    recipe, config, seed = saved["recipe"], trained.config, saved["recipe"]["seed"]
    dataset, same = args.dataset or recipe["dataset"], args.dataset in (None, recipe["dataset"])
    data_dir = args.data_dir or (recipe["data_dir"] if same else "data")
    recipe = recipe | {"skip_bad_images": args.skip_bad_images or recipe["skip_bad_images"]}
    epochs = recipe["probe_epochs"] if args.epochs is None else args.epochs
    folder, tag = Path(path).parent, Path(path).stem.removeprefix("ckpt")  # ckpt-0005.pt: eval-0005.json
    check_writable(folder)
    pictures = list_pictures(dataset, data_dir, recipe["pictures"] if same else RECIPES[dataset]["pictures"])
    if len(pictures.classes) < 2 or pictures.train == len(pictures.items):
        stop(
            f"{data_dir} has no labelled train and test pictures of two classes or more; probes need "
            "train/<class>/… and test/<class>/…"
        )
    pixels, sizes = load_pixels(pictures, dataset, data_dir, folder, recipe)
    data = labelled(pictures, pixels, sizes, seed, device, args.labels, use_compile)
    print(
        f"{dataset}: {len(data.train):,} training and {len(data.test):,} test pictures of {data.classes} "
        f"classes; {args.encoder} encoder of {path} at step {saved['step']:,}"
    )

    def untrained():
        torch.manual_seed(seed)  # what train.py starts from: this is the encoder of step 0
        return MIMJEPA(config).context_encoder

    encoders = {"trained": trained} if args.no_baseline else {"trained": trained, "untrained": untrained()}
    features = {name: Features(encoder, device, dtype, use_compile) for name, encoder in encoders.items()}
    results = {name: evaluate(f, data, config, epochs, seed) for name, f in features.items()}
    # As many epochs as pretraining had, of the labelled pictures.
    settings = data, config, recipe["epochs"], recipe, device, dtype, use_compile
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
        images = crop_and_resize(pixels[rows], centre_crops(sizes[rows]), None, config.image_size).to(device)
        written.append(folder / f"pca{tag}.png")
        save_image(written[-1], pca_picture(features["trained"], images))
        if config.tokenizer != "patch":
            mask = config.grid, config.mask_ratio, config.masking, generator
            visible = sample_masks(2, *mask).to(device)
            written.append(folder / f"leak{tag}.png")
            save_image(written[-1], leak_picture(trained.tokenizer, images[:2], visible[: len(images)]))
    print(f"\nwrote {', '.join(map(str, written))}")
    return saved["step"], results


def main(argv=None):
    args = read_arguments(argv)
    torch.set_float32_matmul_precision("high")
    device = choose_device(args.device)
    dtype, _ = choose_precision(args.precision, device)
    use_compile = device.type == "cuda" if args.compile is None else args.compile
    runs = [probe_checkpoint(path, args, device, dtype, use_compile) for path in args.checkpoints]
    if len(runs) == 1:
        return
    folders = {Path(path).parent for path in args.checkpoints}
    if len(folders) == 1:  # one run: how its probes fare as it goes on
        runs.sort(key=lambda run: run[0])
        if not args.no_baseline:
            runs.insert(0, (0, {"trained": runs[0][1]["untrained"]}))  # what training started from
        steps, results = zip(*runs)
        probes = results[0]["trained"]
        curves = {f"{probe}, top-1 in %": [run["trained"][probe][0] for run in results] for probe in probes}
        path = folders.pop() / "probes.png"
        draw_curves(path, steps, curves)
        print(f"wrote {path}")
    else:
        print(f"\nmean ± standard deviation of {len(runs)} runs")
        first = runs[0][1]
        gathered = {e: {p: [results[e][p] for _, results in runs] for p in first[e]} for e in first}
        print_table(gathered, several_runs)


if __name__ == "__main__":
    run(main)
