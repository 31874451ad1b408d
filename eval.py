"""Probe a frozen encoder: how much of what the labels say can be read off its features?

    python eval.py runs/pets/ckpt.pt
    python eval.py runs/critters/ckpt.pt --dataset folder --data-dir my/pictures

Two probes look at one averaged vector a picture: k nearest neighbours, and a linear classifier. Three
attentive probes look at all tokens and learn which of them matter: simple, multi-head and cross.

Every row of the table stands there twice, for the trained encoder and for the same encoder before training. A
random convolutional tokenizer is a surprisingly good feature extractor, and what pretraining taught is the
difference. Nothing is chosen by looking at the test split: the number of epochs is fixed, the last epoch's
figures are reported, and every probe is shown.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from scott import MIMJEPA, SwiGLU, init_linear, layer_norm, load_encoder
from train import (
    RECIPES, Loader, Parser, add_device_arguments, centre_crops, choose_device, choose_precision,
    crop_and_resize, generator_for, list_pictures, load_pixels, load_run, make_optimizer, make_views, normalise,
    run, save_image, schedules, set_schedule, stop, write_whole,
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


def train_probes(features, loader, labels, classes, config, epochs, seed):
    """Train the three attentive probes together, on the same augmented views of the training pictures."""
    torch.manual_seed(seed)
    device = features.device
    probes = nn.ModuleDict({name: probe(config.dim, classes) for name, probe in PROBES.items()}).to(device)
    optimizer = make_optimizer(probes.parameters(), device)
    total_steps = epochs * loader.steps_per_epoch
    worker = ThreadPoolExecutor(1)
    upcoming = worker.submit(loader.batch, 1, views=1)
    for step in tqdm(range(1, total_steps + 1), "training probes", leave=False, disable=None):
        draws, rows, _ = upcoming.result()
        if step < total_steps:
            upcoming = worker.submit(loader.batch, step + 1, views=1)
        lr, weight_decay, _ = schedules(step, total_steps, total_steps // 5)
        set_schedule(optimizer, lr, weight_decay)
        tokens = features(make_views(*draws, config.image_size))
        target = labels[rows].to(device)
        # One sum of three losses: the probes share no weights, so each gets the gradient it would get alone.
        sum(F.cross_entropy(probe(tokens), target) for probe in probes.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    worker.shutdown()
    return probes.eval()


def evaluate(features, pictures, pixels, sizes, recipe, config, epochs):
    """All probes of one encoder: {probe: (top-1, top-5, mean per class)} in percent, on the test split."""
    device, classes = features.device, len(pictures.classes)
    labels = torch.tensor(pictures.labels)
    rows = torch.arange(len(labels)).tensor_split([pictures.train])
    train_rows, test_rows = (part[sizes[part, 0] > 0] for part in rows)
    batch_size = min(64, len(train_rows))
    loader = Loader(pixels, sizes, train_rows, batch_size, recipe["seed"], device)

    def averages(rows):
        batches = features.of_test_views(loader, rows, config.image_size)
        batches = tqdm(batches, "extracting features", len(rows.split(64)), leave=False, disable=None)
        return torch.cat([tokens.mean(1) for tokens in batches])

    train, test = averages(train_rows), averages(test_rows)
    train_labels, test_labels = labels[train_rows].to(device), labels[test_rows].to(device)
    results = {
        "k-NN": accuracies(knn(train, train_labels, test, classes), test_labels),
        "linear": accuracies(linear(train, train_labels, test, classes), test_labels),
    }
    probes = train_probes(features, loader, labels, classes, config, epochs, recipe["seed"])
    scores = {name: [] for name in PROBES}
    with torch.no_grad():
        for tokens in features.of_test_views(loader, test_rows, config.image_size):
            for name, probe in probes.items():
                scores[name].append(probe(tokens))
    return results | {name: accuracies(torch.cat(parts), test_labels) for name, parts in scores.items()}


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


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = Parser("eval.py", description="Probe a frozen encoder, and the same encoder untrained.")
    parser.add_argument("checkpoint", help="what train.py saved, such as runs/pets/ckpt.pt")
    parser.add_argument("--dataset", choices=RECIPES, help="probe on this (default: what it was trained on)")
    parser.add_argument("--data-dir", help="where it is (default: as in training; data for another data set)")
    parser.add_argument("--skip-bad-images", action="store_true", help="leave out files that cannot be read")
    parser.add_argument("--encoder", choices=("context", "target"), default="context", help="(context)")
    parser.add_argument("--epochs", type=int, help="for the attentive probes (default: the recipe's)")
    parser.add_argument("--no-baseline", action="store_true", help="skip the untrained encoder")
    parser.add_argument("--no-pca", action="store_true", help="skip pca.png")
    add_device_arguments(parser)
    args = parser.parse_args(argv)

    torch.set_float32_matmul_precision("high")
    device = choose_device(args.device)
    dtype, _ = choose_precision(args.precision, device)
    use_compile = device.type == "cuda" if args.compile is None else args.compile
    saved = load_run(args.checkpoint)
    trained = load_encoder(args.checkpoint, args.encoder)
    recipe, config = saved["recipe"], trained.config
    dataset, same = args.dataset or recipe["dataset"], args.dataset in (None, recipe["dataset"])
    data_dir = args.data_dir or (recipe["data_dir"] if same else "data")
    recipe = recipe | {"skip_bad_images": args.skip_bad_images or recipe["skip_bad_images"]}
    epochs = recipe["probe_epochs"] if args.epochs is None else args.epochs
    if epochs < 1:
        stop(f"epochs is {epochs}, it must be 1 or more")
    pictures = list_pictures(dataset, data_dir, recipe["pictures"] if same else RECIPES[dataset]["pictures"])
    if len(pictures.classes) < 2 or pictures.train == len(pictures.items):
        stop(
            f"{data_dir} has no labelled train and test pictures of two classes or more; probes need "
            "train/<class>/… and test/<class>/…"
        )
    pixels, sizes = load_pixels(pictures, dataset, data_dir, Path(args.checkpoint).parent, recipe)
    test_count = len(pictures.items) - pictures.train
    print(
        f"{dataset}: {pictures.train:,} training and {test_count:,} test pictures of "
        f"{len(pictures.classes)} classes; {args.encoder} encoder at step {saved['step']:,}"
    )

    torch.manual_seed(recipe["seed"])  # what train.py starts from: this is the encoder of step 0
    encoders = {"trained": trained, "untrained": MIMJEPA(config).context_encoder}
    if args.no_baseline:
        del encoders["untrained"]
    features = {name: Features(encoder, device, dtype, use_compile) for name, encoder in encoders.items()}
    data = pictures, pixels, sizes
    results = {name: evaluate(f, *data, recipe, config, epochs) for name, f in features.items()}

    print(f"\n{'probe':12}{'encoder':12}{'top-1':>8}{'top-5':>8}{'per class':>11}   (%, test split)")
    for probe in results["trained"]:
        for name, figures in results.items():
            top1, top5, per_class = figures[probe]
            print(f"{probe:12}{name:12}{top1:8.1f}{top5:8.1f}{per_class:11.1f}")

    folder = Path(args.checkpoint).parent
    report = dict(
        checkpoint=args.checkpoint, encoder=args.encoder, step=saved["step"], dataset=dataset,
        probe_epochs=epochs, columns=["top-1", "top-5", "mean-per-class"], results=results,
    )  # fmt: skip
    write_whole(folder / "eval.json", lambda file: file.write(json.dumps(report, indent=1).encode()))
    written = [folder / "eval.json"]
    if not args.no_pca:
        rows = pictures.train + (sizes[pictures.train :, 0] > 0).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator_for(recipe["seed"], 3))[:6]]
        images = crop_and_resize(pixels[rows], centre_crops(sizes[rows]), None, config.image_size).to(device)
        save_image(folder / "pca.png", pca_picture(features["trained"], images))
        written.append(folder / "pca.png")
    print(f"\nwrote {' and '.join(map(str, written))}")


if __name__ == "__main__":
    run(main)
