"""Proofs of the method, of training and evaluation, and of what can go wrong: pytest -q test_scott.py, a
minute or so on a CPU. No test needs a download, a GPU, or a file from elsewhere."""

import io
import itertools
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"  # these tensors are so small that several cores would wait for each other

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as TF

import eval as probing
import scott
import train
from eval import enlarged
from scott import MIMJEPA, Config, Encoder, InputError, Predictor, Tokenizer, count_visible, jepa_loss
from scott import layer_norm, load_checkpoint, load_encoder, position_embedding, sample_masks

HERE = Path(__file__).resolve().parent
SMALL = Config(image_size=96, dim=32, depth=2, heads=2, predictor_depth=2)
STILL = replace(SMALL, dropout=0.0, attention_dropout=0.0, drop_path=0.0)
CPU = train.Machine(torch.device("cpu"), None, False, nullcontext)

@pytest.fixture(autouse=True)
def own_folder_and_the_same_numbers_every_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

def batch():
    return torch.randn(4, 3, 96, 96), torch.randn(4, 3, 96, 96), sample_masks(4, 6)

# ---- Masks -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("masking", ["block", "random"])
def test_masks_have_the_same_number_of_visible_tokens_and_come_from_the_generator_alone(masking):
    for grid in (2, 3, 4, 5, 7, 14, 28):
        for ratio in (0.001, 0.1, 0.3, 0.5, 0.6, 0.75, 0.9, 0.999):
            masks = sample_masks(4, grid, ratio, masking)
            assert masks.shape == (4, grid**2) and masks.dtype == torch.bool
            assert (masks.sum(1) == count_visible(grid**2, ratio)).all()
    assert count_visible(196, 0.6) == 79  # the paper's
    assert [count_visible(100, ratio / 100) for ratio in range(1, 100)] == list(range(99, 0, -1))
    draws = [sample_masks(8, 14, 0.6, masking, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and len(torch.cat(draws).unique(dim=0)) == 16

def test_block_masks_have_the_papers_shape():
    """The border of the hidden part is 41 ± 8 cells long; the centre 4×4 is visible 73 % of the time."""
    masks = sample_masks(2000, 14).view(-1, 14, 14)
    across, down = masks[:, :, 1:] != masks[:, :, :-1], masks[:, 1:] != masks[:, :-1]
    border = (across.sum((1, 2)) + down.sum((1, 2))).float()
    assert abs(border.mean() - 41) < 1 and abs(border.std() - 8) < 1
    assert abs(masks[:, 5:9, 5:9].float().mean() - 0.73) < 0.02

# ---- Tokenizer: no peeking, no filling ---------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["scott", "dense"])
@pytest.mark.parametrize("side, masking", [(32, "random"), (96, "block"), (96, "random"), (224, "block")])
def test_no_peeking_hidden_pixels_do_not_move_visible_tokens_by_one_bit(kind, side, masking):
    tokenizer, images = Tokenizer(replace(SMALL, tokenizer=kind)), torch.randn(2, 3, side, side)
    visible = sample_masks(2, side // 16, 0.6, masking)
    for other in (5 * torch.randn(2, 3, side, side), torch.full((2, 3, side, side), math.nan)):
        other = torch.where(enlarged(visible, side), images, other)
        assert torch.equal(tokenizer(images, visible)[visible], tokenizer(other, visible)[visible])

def test_no_filling_every_convolution_and_every_pool_is_masked_again():
    """Without that ("dense") the hole fills, and visible tokens change: they take what fills it for seen."""
    tokenizers, maps = [Tokenizer(replace(SMALL, tokenizer=kind)) for kind in ("scott", "dense")], []
    tokenizers[0].load_state_dict(tokenizers[1].state_dict())
    for tokenizer in tokenizers:
        for layer in {tokenizer.conv1, tokenizer.pool1, tokenizer.conv2, tokenizer.pool2}:  # one pool, twice
            layer.register_forward_hook(lambda layer, inputs, output: maps.append(output))
    images, visible = torch.randn(4, 3, 96, 96), sample_masks(4, 6)
    ours, dense = (tokenizer(images, visible) for tokenizer in tokenizers)
    in_the_hole = [x.masked_fill(enlarged(visible, x.shape[-1]), 0).abs().max() for x in maps]
    assert max(in_the_hole[:4]) == 0 and min(in_the_hole[4:]) > 0.01
    assert (ours - dense)[visible].abs().max() > 0.01
    assert torch.equal(*(tokenizer(images) for tokenizer in tokenizers))

def plain_tokenizer(tokenizer, images, visible):
    """The tokenizer written out: multiplications by the mask, maxima, the filter [1 2 1]ᵀ[1 2 1]/16."""
    x = images * enlarged(visible, images.shape[-1])
    for conv in (tokenizer.conv1, tokenizer.conv2):
        x = F.conv2d(x, conv.weight, stride=2, padding=3)
        x = (x * enlarged(visible, x.shape[-1])).relu()
        x = torch.stack([x[..., :-1, :-1], x[..., 1:, :-1], x[..., :-1, 1:], x[..., 1:, 1:]]).amax(0)
        x = F.pad(x, (1, 1, 1, 1))
        x = (x[..., :-2:2, :] + 2 * x[..., 1:-1:2, :] + x[..., 2::2, :]) / 4
        x = (x[..., :-2:2] + 2 * x[..., 1:-1:2] + x[..., 2::2]) / 4
        x = x * enlarged(visible, x.shape[-1])
    return x.flatten(2).transpose(1, 2)

@pytest.mark.parametrize("side", [32, 224])
def test_the_tokenizer_is_the_papers_layer_by_layer_and_that_of_a_plain_vit_cuts_patches(side):
    tokenizer, images = Tokenizer(SMALL).double(), torch.randn(2, 3, side, side, dtype=torch.float64)
    everything = torch.ones(2, (side // 16) ** 2, dtype=torch.bool)
    for visible in (sample_masks(2, side // 16), everything):
        expected = plain_tokenizer(tokenizer, images, visible)
        assert torch.allclose(tokenizer(images, visible), expected, atol=1e-12)
    assert torch.equal(tokenizer(images, everything), tokenizer(images)) and len(tokenizer.state_dict()) == 2
    vit = Tokenizer(replace(SMALL, tokenizer="patch")).double()
    token = F.linear(images[:, :, :16, 16:32].flatten(1), vit.conv.weight.flatten(1), vit.conv.bias)
    assert torch.allclose(vit(images)[:, 1], token, atol=1e-12)  # the second of the first row

# ---- Transformer blocks ------------------------------------------------------------------------------------

def test_positions_entry_by_entry_are_computed_for_any_image_size_and_not_stored():
    """First D/2 channels from the row, last D/2 from the column; each half is [sin(p·ω), cos(p·ω)]."""
    table, omega = position_embedding(5, 16), [10000 ** (-k / 4) for k in range(4)]
    for row, column in itertools.product(range(5), range(5)):
        expected = [f(p * w) for p in (row, column) for f in (math.sin, math.cos) for w in omega]
        assert torch.allclose(table[row * 5 + column], torch.tensor(expected), atol=1e-6)
    encoder = Encoder(SMALL).eval()
    for side in (32, 96, 192):
        trained_there = Encoder(replace(SMALL, image_size=side)).eval()
        trained_there.load_state_dict(encoder.state_dict())
        images = torch.randn(1, 3, side, side)
        assert torch.equal(encoder(images), trained_there(images))

def test_attention_drops_weights_and_is_the_same_on_a_cpu_and_on_a_gpu():
    """The products written out and the GPU's single kernel: with the same dropout mask the same numbers."""
    (q, k, v), results = torch.randn(3, 2, 4, 9, 8).unbind(0), []
    for form in (scott.attend, lambda q, k, v, p: F.scaled_dot_product_attention(q, k, v, dropout_p=p)):
        torch.manual_seed(1)
        results.append(form(q, k, v, 0.3))
    assert torch.allclose(*results, atol=1e-5)

def plain_block(block, x, heads):
    D, outputs = x.shape[-1], []
    q, k, v = (F.layer_norm(x, (D,)) @ block.attention.qkv.weight.T).split(D, dim=-1)
    for q, k, v in zip(q.split(D // heads, -1), k.split(D // heads, -1), v.split(D // heads, -1)):
        outputs.append((q @ k.transpose(1, 2) / math.sqrt(D // heads)).softmax(-1) @ v)
    x = F.layer_norm(x + torch.cat(outputs, -1) @ block.attention.proj.weight.T, (D,))
    a, b = (x @ block.mlp.w12.weight.T).chunk(2, -1)
    return x + (a * a.sigmoid() * b) @ block.mlp.w3.weight.T

def test_encoder_and_predictor_are_the_papers_formula():
    model = MIMJEPA(SMALL).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # leave the start, where much is near zero
    images, visible = torch.randn(2, 3, 96, 96, dtype=torch.float64), sample_masks(2, 6)
    encoder, predictor, positions = model.context_encoder, model.predictor, position_embedding(6, 32).double()
    x = plain_tokenizer(encoder.tokenizer, images, visible)
    x = torch.where(visible[..., None], x, encoder.mask_token) + positions
    for block in encoder.blocks:
        x = plain_block(block, x, heads=2)
    assert torch.allclose(encoder(images, visible), x, atol=1e-9)
    y = x + positions
    for block in predictor.blocks:
        y = plain_block(block, y, heads=2)
    y = F.layer_norm(y * y.sigmoid(), (32,), predictor.norm.weight, predictor.norm.bias)
    y = y @ predictor.head.weight.T + predictor.head.bias
    assert torch.allclose(predictor(x), y, atol=1e-9)

def test_parameters_are_as_many_as_the_papers_and_the_first_ones_shrink_with_depth():
    """Block i divides its proj and W₃ by √(2i); the predictor's once more, by √(2(depth + i))."""
    model, approx = MIMJEPA(Config()), partial(pytest.approx, rel=0.03)
    encoder, predictor = model.context_encoder, model.predictor
    sizes = [sum(p.numel() for p in part.parameters()) for part in (encoder.tokenizer, encoder, predictor)]
    assert sizes == [1_213_632, 22_447_680, 5_457_024]
    for blocks, shrink in ((encoder.blocks, lambda i: 2 * i), (predictor.blocks, lambda i: 4 * i * (12 + i))):
        for i, block in enumerate(blocks, start=1):
            assert block.attention.qkv.weight.std().item() == approx(0.02)
            for weight in (block.attention.proj.weight, block.mlp.w3.weight):
                assert weight.std().item() * math.sqrt(shrink(i)) == approx(0.02)
    assert encoder.tokenizer.conv1.weight.std().item() == approx(math.sqrt(2 / (3 * 49)))  # Kaiming, fan-in
    assert encoder.mask_token.abs().max() < 1e-5

def test_dropout_acts_in_training_only_and_drop_path_rises_in_a_line():
    for name in ("dropout", "attention_dropout", "drop_path"):
        encoder, images = Encoder(replace(STILL, **{name: 0.5})), torch.randn(4, 3, 96, 96)
        assert not torch.equal(encoder.train()(images), encoder(images))
        assert torch.equal(encoder.eval()(images), encoder(images))
    config = Config(image_size=32, dim=16, depth=5, heads=2, drop_path=0.2, predictor_depth=3)
    rates = [[block.drop_path.p for block in part(config).blocks] for part in (Encoder, Predictor)]
    assert rates[0] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2]) and rates[1] == pytest.approx([0, 0.1, 0.2])

def test_drop_path_drops_each_branch_for_whole_samples_and_scales_it_up_for_the_others():
    block, x = Encoder(replace(STILL, drop_path=0.5)).blocks[-1].train(), torch.randn(400, 9, 32)
    branch, result = block.attention(layer_norm(x)), block(x)
    for first, second in itertools.product((0, 2), (0, 2)):
        y = layer_norm(x + first * branch)
        alike = torch.isclose(result, y + second * block.mlp(y), atol=1e-5).all(2).all(1)
        assert alike.float().mean().item() == pytest.approx(1 / 4, abs=0.1)

def test_dropout_stands_after_positions_in_encoder_and_predictor_and_on_what_attention_adds():
    """There each number is either dropped or scaled up to keep the mean: at dropout ½, 0 or twice itself."""
    model, found = MIMJEPA(replace(STILL, dropout=0.5)), []
    encoder, predictor = model.context_encoder, model.predictor
    for blocks in (encoder.blocks, predictor.blocks):
        blocks[0].register_forward_pre_hook(lambda block, inputs: found.append(inputs[0]))
    attention, tokens = predictor.blocks[1].attention, torch.randn(8, 36, 32)
    for module, data in ((encoder, torch.randn(8, 3, 96, 96)), (predictor, tokens), (attention, tokens)):
        outputs = [module.train(mode)(data) for mode in (False, True)]
        plain, dropped = outputs if module is attention else found[-2:]
        assert torch.allclose(dropped, torch.where(dropped == 0, 0, 2 * plain), atol=1e-6)
        assert (dropped == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)

# ---- Encoder, loss and model -------------------------------------------------------------------------------

def test_the_loss_by_hand_and_a_collapse_that_the_watch_sees():
    """|e| < 1 costs e²/2, more costs |e| − ½; mean over D, hidden tokens, images. Collapse: all are alike."""
    prediction = torch.tensor([[[9.0, 9], [1, 0], [3, 0], [0, 0]], [[0.5, 0.5], [7, 7], [7, 7], [7, 7]]])
    visible = torch.tensor([[True, False, False, False], [False, True, True, True]])
    loss = jepa_loss(prediction, torch.zeros(2, 4, 2), visible).item()
    assert loss == pytest.approx((((0.5 + 0) / 2 + (2.5 + 0) / 2 + 0) / 3 + 0.125) / 2)
    assert jepa_loss(prediction.bfloat16(), torch.zeros(2, 4, 2).bfloat16(), visible).dtype == torch.float32
    healthy = layer_norm(torch.randn(64, 4, 256))
    assert scott.target_deviation(healthy) == pytest.approx(1, abs=0.05)
    assert scott.target_deviation(healthy[:1].expand(64, 4, 256)) < 1e-6  # though it tells places apart

def test_the_target_starts_as_a_copy_gets_no_gradient_and_no_dropout_and_follows_as_a_moving_average():
    """target ← m · target + (1 − m) · context, for all parameters"""
    model = MIMJEPA(SMALL).train()
    context, target = model.context_encoder, model.target_encoder
    assert all(map(torch.equal, context.parameters(), target.parameters()))
    model(*batch()).backward()
    assert all(p.grad is None and not p.requires_grad for p in target.parameters())
    assert all(p.grad.abs().sum() > 0 for part in (context, model.predictor) for p in part.parameters())
    assert all(m.training for m in context.modules()) and not any(m.training for m in target.modules())
    for parameter in context.parameters():
        parameter.data += torch.randn_like(parameter)
    before = [p.clone() for p in target.parameters()]
    model.update_target(0.9)
    for old, ours, theirs in zip(before, context.parameters(), target.parameters(), strict=True):
        assert torch.allclose(theirs, 0.9 * old + 0.1 * ours, atol=1e-6)

def test_training_compiles_to_one_graph_with_the_same_gradients():
    """fullgraph=True raises where a graph breaks."""
    model, data, gradients = MIMJEPA(SMALL).train(), batch(), []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            forward(*data, return_target=True)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert (gradients[0] - gradients[1]).norm() < 3e-2 * gradients[0].norm()

def test_the_readme_quotes_the_source_and_what_the_demonstration_prints(capsys):
    readme = (HERE / "README.md").read_text()
    source = "".join((HERE / name).read_text() for name in ("scott.py", "train.py", "eval.py"))
    quotes = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(quotes) > 3 and [quote for quote in quotes if quote not in source] == []
    runpy.run_path(str(HERE / "scott.py"), run_name="__main__")
    assert [line for line in capsys.readouterr().out.splitlines() if line.rstrip() not in readme] == []

# ---- Recipes and critters ----------------------------------------------------------------------------------

TINY = """--image-size 32 --dim 16 --depth 2 --heads 2 --predictor-depth 1 --batch-size 8 --epochs 3
          --device cpu --precision fp32 --cache-side 48 --probe-epochs 2""".split()
CRITTERS = [*TINY, "--pictures", "40"]  # five steps an epoch, no dropout

def trained(flags="", out="run", base=CRITTERS):
    """Run train.py with these flags. → what it has saved"""
    assert train.main([*base, *flags.split(), "--out", out]) == 0
    return load_checkpoint(f"{out}/ckpt.pt")

def test_the_papers_recipe_is_the_default_and_small_data_sets_say_what_differs():
    paper = dict(epochs=300, batch_size=64, lr=5e-4, momentum=0.996, seed=47, probe_epochs=100)
    for name in ("pets", "flowers", "imagenet100", "folder"):
        assert vars(train.default_recipe({"dataset": name})).items() >= (paper | vars(Config())).items()
    for name in ("critters", "imagenette"):
        recipe = train.default_recipe({"dataset": name, "lr": 7e-4})
        assert (recipe.dim, recipe.batch_size, recipe.lr) == (128, 32, 7e-4)

def test_critters_are_the_same_every_time_balanced_and_not_told_apart_by_colour():
    species, critters = len(train.SPECIES), train.critters(600, seed=5, side=32)
    drawn, same, others = ([draw.args for draw, _ in train.critters(600, seed, 32)] for seed in (5, 5, 6))
    assert drawn == same != others
    both = train.open_datasets(train.Recipe(pictures=600))
    assert [len(part) for part in both] == [450, 150]
    assert len({draw.args[1] for part in both for draw, _ in part}) == 600  # tested on other pictures
    labels = torch.tensor([label for _, label in critters])
    assert labels.bincount(minlength=species).min() >= 600 // species
    pictures = torch.from_numpy(np.stack([np.asarray(draw()) // 64 for draw, _ in critters])).long()
    histograms = F.one_hot(pictures.flatten(1, 2) @ torch.tensor([16, 4, 1]), 64).float().mean(1)
    nearest = torch.cdist(histograms[300:], histograms[:300]).argmin(1)
    assert (labels[nearest] == labels[300:]).float().mean() < 1 / species + 0.08  # hardly better than chance

# ---- Pictures: what is found, and how it is read -----------------------------------------------------------

def save_picture(path, seed=0, size=(60, 48)):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    train.draw_critter(seed % 3, seed, 64).resize(size).save(path)

def labelled_folder(root):
    """Three species: six training pictures of each, then four test pictures."""
    for i in range(30):
        save_picture(f"{root}/{'train' if i < 18 else 'test'}/species {i % 3}/{i:02}.png", i)

def load(data_dir="photos", dataset="folder", **settings):
    recipe = train.Recipe(dataset=dataset, data_dir=data_dir, cache_side=48, **settings)
    return train.load_pictures(recipe)

@pytest.mark.parametrize("files, labels, training, says", [
    ("1.png ../b/2.png more->../b ../b/itself->. dead.png->nowhere twin.png->1.png", [-1] * 3, 3, ""),
    ("1.png a/2.JPG b/c/3.webp cache/4.png cache/5.pictures d.pictures/6.png", [-1] * 5, 5, ""),
    ("1.png run/views.png run/ckpt.pt", [-1], 1, ""),  # what a run has drawn is no picture to learn from
    ("1.png .2.png ._3.jpg .thumb/4.png @eaDir/5.png __MACOSX/6.png a/.Trash-1000/7.png", [-1], 1, ""),
    ("1.png 2.gif notes.txt .DS_Store", [-1], 1, "passed over 2 files"),
    ("train/a/1.png train/b/c/2.png train/3.png test/a/4.png test/b/5.png", [-1, 0, 0, 1, 1], 3, ""),
    ("train/a/1.png val/a/2.png test/a/3.png test/a/4.png", [0] * 4, 2, ""),
    ("train/a/1.png test/a/2.png more/3.png 4.png", [0, 0], 1, "2 files outside train, val, test"),
    ("train/n01/1.png val/n01/2.png test/3.png", [0, 0], 1, "1 files outside train, val"),  # ImageNet-100
    ("train.X1/n01/1.png val.X/n01/2.png", None, None, "train/<class>"),  # the same, as Kaggle has it
    ("train/a/1.png train/b/2.png test/a/3.png", None, None, "same folders"),
])
def test_what_counts_as_a_picture_and_what_as_a_class(capsys, files, labels, training, says):
    for name, _, target in (name.partition("->") for name in files.split()):
        path = Path("all", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target) if target else path.touch()
    dataset = "imagenet100" if "n01" in files else "folder"
    if labels is None:
        assert says in refused(train, "--dataset", dataset, "--data-dir", "all")
        return
    parts, said = train.open_datasets(train.Recipe(dataset=dataset, data_dir="all")), capsys.readouterr().out
    assert sorted(label for part in parts for _, label in part) == labels
    assert {*parts[0].classes} <= {"a", "b", "n01"}
    assert sum(map(len, parts[:-1] or parts)) == training and says in said and bool(said) == bool(says)

def test_pets_flowers_and_imagenette_are_split_as_torchvision_has_them(monkeypatch, capsys):
    """Pets: trainval for training, test for testing. Flowers: train and val, then test. All with labels."""
    for i in range(24):
        split, wnid = "train" if i < 15 else "val", ("n01440764", "n02102040", "n03888257")[i % 3]
        save_picture(f"data/imagenette2-160/{split}/{wnid}/{i:02}.JPEG")
    found = load("data", "imagenette")
    assert (len(found.pixels), found.train, found.sizes[0].tolist()) == (24, 15, [60, 48])
    assert found.labels.bincount().tolist() == [8, 8, 8]
    assert "warning: of the 13,394 pictures of imagenette, data has 24" in capsys.readouterr().out
    for name, splits in (("pets", ["trainval", "test"]), ("flowers", ["train", "val", "test"])):
        fake = lambda root, split, download: [split]
        monkeypatch.setitem(train.LIBRARY, name, (fake, *train.LIBRARY[name][1:]))
        assert [part[0] for part in train.open_datasets(train.Recipe(dataset=name))] == splits

def test_a_download_that_fails_is_one_line(monkeypatch):
    download = Mock(side_effect=RuntimeError("File not found\nor corrupted."))
    monkeypatch.setitem(train.LIBRARY, "flowers", (download, ("train", "test"), 8189))
    assert "File not found or corrupted" in refused(train, "--dataset", "flowers")
    monkeypatch.setitem(sys.modules, "scipy", None)  # asked for before the download
    assert "scipy" in refused(train, "--dataset", "flowers") and download.call_count == 1

def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()

GREY = np.arange(0, 240, 10, np.uint8).reshape(4, 6)
COLOUR = np.dstack([GREY, 255 - GREY, GREY.T.reshape(4, 6)])
DEEP = GREY.astype(np.uint16) * 256 + 77  # 16 bits
DEEP_32 = encoded(DEEP.astype(np.int32), "TIFF")
CLEAR = np.tile([0, 0, 0, 255, 255, 255], (4, 1)).astype(np.uint8)  # alpha: one half is see-through
ON_ITS_SIDE = Image.Exif()
ON_ITS_SIDE[0x0112] = 6
BLACK_IS_0, WHITE_IS_0 = (b"\x06\x01\3\0\1\0\0\0%c\0" % value for value in (1, 0))  # TIFF's tag 262

@pytest.mark.parametrize("content, expected", [  # None: refused
    (encoded(Image.fromarray(COLOUR).quantize(24)), COLOUR),
    (encoded(Image.fromarray(COLOUR).convert("CMYK"), "TIFF"), COLOUR),
    (encoded(np.dstack([COLOUR, CLEAR])), np.where(CLEAR[..., None] == 0, 255, COLOUR)),
    (encoded(np.dstack([GREY, CLEAR])), np.where(CLEAR == 0, 255, GREY)),
    (encoded(DEEP, transparency=77), np.where(GREY == 0, 255, GREY)),  # its first pixel is see-through
    (encoded(DEEP), GREY), (encoded(DEEP, "TIFF"), GREY), (encoded(DEEP, "PPM"), GREY),
    (encoded(GREY, exif=ON_ITS_SIDE), np.rot90(GREY, -1)), (encoded(GREY, exif=b"Exif\0\0broken"), GREY),
    (encoded(COLOUR, "TIFF", exif=ON_ITS_SIDE), np.rot90(COLOUR, -1)),
    (encoded(DEEP, "TIFF", exif=ON_ITS_SIDE), np.rot90(GREY, -1)),
    (encoded(65535 - DEEP, "TIFF").replace(BLACK_IS_0, WHITE_IS_0), GREY),
    (DEEP_32, None), (encoded(DEEP.astype(np.float32), "TIFF"), None),
    (encoded(GREY, "TIFF", tiffinfo={339: 2}), None), (encoded(COLOUR, "JPEG")[:400], None), (b"", None),
])
def test_odd_pictures_are_read_right_and_upright_or_refused_where_their_scale_is_unknown(content, expected):
    Path("picture").write_bytes(content)
    if expected is None:
        with pytest.raises(InputError, match="picture: "):
            train.open_picture("picture")
    else:
        expected = expected if expected.ndim == 3 else np.dstack([expected] * 3)
        assert np.array_equal(np.asarray(train.open_picture("picture")), expected)

# ---- One file of decoded pictures --------------------------------------------------------------------------

@pytest.fixture
def photos():
    save_picture("photos/a.png", 1, size=(80, 40))
    save_picture("photos/b.png", 2, size=(30, 90))
    return Path("photos/cache")

def test_pictures_are_kept_whole_and_decoded_again_only_if_they_or_their_file_changed(photos, monkeypatch):
    """A central crop of the squeezed picture shows what the same crop of the picture itself would."""
    monkeypatch.setattr(train, "open_picture", decode := Mock(side_effect=train.open_picture))
    pictures = load()
    assert (pictures.sizes.tolist(), pictures.labels.tolist()) == ([[80, 40], [30, 90]], [-1, -1])
    view = probing.central_views(loader(pictures.pixels, pictures.sizes), torch.tensor([1]))[0]
    picture = TF.resize(TF.to_image(Image.open("photos/b.png")), [36], T.InterpolationMode.BICUBIC)
    assert (view - TF.center_crop(picture, [32, 32]) / 255).abs().mean() < 0.02
    [file] = photos.iterdir()
    size = file.stat().st_size
    cuts = (partial(os.truncate, file, cut) for cut in (0, size // 2, size - 1))  # or between two records
    touch = partial(os.utime, "photos/b.png", (1, 1))
    for number, damage in enumerate((file.exists, file.unlink, *cuts, touch), start=1):
        damage()
        assert torch.equal(load().pixels, pictures.pixels) and decode.call_count == 2 * number
    save_picture("photos/b.png", 3, size=(30, 60))
    assert load().sizes.tolist() == [[80, 40], [30, 60]]

@pytest.mark.parametrize("error, says", [(OSError(5, "Full"), "Full.*-dir"), (KeyboardInterrupt(), "^$")])
def test_a_build_that_breaks_off_leaves_nothing_and_another_folder_may_do(photos, monkeypatch, error, says):
    with monkeypatch.context() as patch, pytest.raises((InputError, KeyboardInterrupt), match=says):
        patch.setattr(os, "fsync", Mock(side_effect=error))
        load()
    assert not list(photos.iterdir())
    assert load(cache_dir="other").sizes.tolist() == [[80, 40], [30, 90]] and len(os.listdir("other")) == 1

@pytest.mark.parametrize("name, content, reason", [
    ("new\nline.jpg", b"not a picture", r"new\\nline.jpg: cannot identify"),
    ("scan.tif", DEEP_32, "scan.tif: .*agreed scale"), ("lost.png", None, "lost.png: No such"),
])
def test_a_bad_file_is_refused_with_its_reason_or_left_out_on_request(photos, capsys, name, content, reason):
    Path("photos", name).write_bytes(content) if content else Path("photos", name).symlink_to("nowhere.png")
    for _ in range(2):
        with pytest.raises(InputError, match=f"picture 2: .*/{reason}.*--skip-bad-images"):
            load()
        found = load(skip_bad_images=True)
        assert found.sizes.tolist() == [[80, 40], [30, 90], [0, 0]] and found.labels.tolist() == [-1] * 3
    assert re.search(f"left out picture 2: .*/{reason}", capsys.readouterr().out)
    load(skip_bad_images=True)
    assert capsys.readouterr().out.startswith("1 bad files are left out")  # at every start

# ---- Views -------------------------------------------------------------------------------------------------

def smooth_pictures(count, height, width):
    coarse = torch.rand(count, 3, height // 8 + 1, width // 8 + 1)  # with detail such as photographs have
    fine = F.interpolate(coarse, size=(height, width), mode="bicubic")
    return ((fine + 0.05 * torch.randn(fine.shape)).clamp(0, 1) * 255).byte()

def loader(pixels, sizes=None, batch_size=2, side=32, seed=0, machine=CPU, **settings):
    sizes = torch.full((len(pixels), 2), float(pixels.shape[-1])) if sizes is None else sizes
    pictures = train.Pictures(pixels, sizes, torch.zeros(len(pixels)).long(), len(pixels))
    recipe = replace(train.Recipe(pictures=20), batch_size=batch_size, image_size=side, seed=seed, **settings)
    return train.Loader(pictures, torch.arange(len(pixels)), recipe, machine)

@pytest.mark.parametrize("out", [32, 144])
def test_crops_equal_torchvisions_and_pillows(out):
    """A CPU's are torchvision's to the bit, a GPU's within rounding; Pillow rounds twice."""
    boxes = [(0, 0, 96, 96), (10, 20, 50, 60), (40, 3, 43, 93), (5, 50, 91, 33), (30, 30, 45, 47)]
    pixels, drawn = smooth_pictures(5, 96, 96), torch.tensor([(4 - i, *boxes[i], i % 2.0) for i in range(5)])
    ours = [crop(pixels, drawn, out, 2) * 255 for crop in (train.crop_and_resize, train.crop_by_products)]
    for i, ((left, top, width, height), cpu, gpu) in enumerate(zip(boxes, *ours)):
        crop = TF.crop(pixels[4 - i], top, left, height, width)
        resize = partial(TF.resize, size=[out, out], interpolation=T.InterpolationMode.BICUBIC)
        theirs, pillows = resize(crop), TF.pil_to_tensor(resize(TF.to_pil_image(crop)))
        cpu, gpu = (image.flip(2) if i % 2 else image for image in (cpu, gpu))  # every second is mirrored
        assert torch.equal(cpu.round(), theirs.float()) and (gpu - theirs).abs().max() < 1.2
        assert (gpu - pillows).abs().max() < 2.001

@pytest.mark.parametrize("number, theirs, values", [
    (0, TF.adjust_brightness, (0.6, 0.9, 1.0, 1.4)),
    (1, TF.adjust_contrast, (0.6, 0.9, 1.0, 1.4)),
    (2, TF.adjust_saturation, (0.8, 0.9, 1.0, 1.2)),
    (3, TF.adjust_hue, (-0.1, -0.03, 0.0, 0.1)),
    (4, lambda image, _: TF.rgb_to_grayscale(image, 3), (0.0,) * 4),
    (5, lambda image, sigma: TF.gaussian_blur(image, [9, 9], [sigma, sigma]), (0.1, 0.7, 1.3, 2.0)),
])
def test_each_colour_operation_equals_torchvisions_and_has_a_neutral_factor(number, theirs, values):
    images, (_, operation, neutral, *_) = smooth_pictures(4, 40, 40) / 255, train.OPERATIONS[number]
    images[0, :, :8] = 0.5  # grey pixels have no hue
    for image, value, our in zip(images, values, operation(images, torch.tensor(values).view(-1, 1, 1, 1))):
        assert (our - theirs(image, value)).abs().max() < 0.5 / 255
    assert torch.allclose(operation(images, torch.full((4, 1, 1, 1), neutral)), images, atol=1e-5)

def test_crops_have_the_distribution_of_random_resized_crop():
    sizes, scale = torch.tensor([[500.0, 375.0]]).repeat(4000, 1), torch.tensor([500, 375, 500, 375]) / 320
    ours, theirs = train.draw_crops(sizes, 320, None), T.RandomResizedCrop(224, (0.2, 1))
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= 320).all()
    theirs = [theirs.make_params([torch.zeros(3, 375, 500)]) for _ in range(4000)]
    theirs = torch.tensor([[p["left"], p["top"], p["width"], p["height"]] for p in theirs]).float()
    for level in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert ((ours * scale).quantile(level, dim=0) - theirs.quantile(level, dim=0)).abs().max() < 15
    thin = torch.tensor([[1000.0, 10.0], [10.0, 1000.0], [3, 2000]])
    largest = train.draw_crops(thin, 320, None)  # no crop of an allowed ratio and a fifth of the area fits
    assert largest.tolist() == [[158, 0, 4, 320], [0, 158, 320, 4], [0, 160, 320, 1]]

def test_colours_are_drawn_as_often_and_as_strong_as_the_paper_says():
    """p 0.6, in random order: jitter (p 0.8; four operations in random order), grey (p 0.1), blur (p 0.3)."""
    factors = train.draw_colours(20000, None)[1]
    active, share = factors != train.NEUTRAL, 0.6 * torch.tensor([0.8, 0.8, 0.8, 0.8, 0.1, 0.3])
    assert torch.allclose(active.float().mean(0), share, atol=0.02) and (active[:, 0] == active[:, 3]).all()
    assert torch.allclose(factors.amin(0), torch.tensor([0.6, 0.6, 0.8, -0.1, 0, 0.001]), atol=0.01)
    assert torch.allclose(factors.amax(0), torch.tensor([1.4, 1.4, 1.2, 0.1, 1, 2]), atol=0.01)
    assert set(factors[:, 4].tolist()) == {0, 1} and factors[active[:, 5], 5].min() >= 0.1
    orders = ["".join(map(str, itertools.chain(*train.draw_colours(1, None)[0]))) for _ in range(3000)]
    for left_out, count in (("[123]", 6), ("[45]", 24)):  # all orders of the three, and of the four, evenly
        frequency = np.unique([re.sub(left_out, "", order) for order in orders], return_counts=True)[1]
        assert len(frequency) == count and abs(frequency / 3000 * count - 1).max() < 0.35
    assert all(re.search("[0123]{4}", order) for order in orders)  # jitter stays together

def test_colour_operations_are_applied_in_the_order_drawn():
    functions = [operation[1] for operation in train.OPERATIONS]
    for _ in range(3):
        images, (order, factors) = smooth_pictures(16, 32, 32) / 255, train.draw_colours(16, None)
        drawn = order, factors, functions
        cpu, gpu = (train.apply_colours(images.clone(), *drawn, at_once) for at_once in (False, True))
        for image, own, *ours in zip(images.split(1), factors, cpu, gpu):
            for number in itertools.chain(*order):
                if own[number] != train.NEUTRAL[number]:
                    image = functions[number](image, own[number].view(1, 1, 1, 1))
            assert all(torch.allclose(our, image[0], atol=1e-5) for our in ours)

def test_both_views_share_the_crop_and_half_of_them_are_mirrored_but_each_has_its_own_colours():
    ramp = torch.linspace(0, 127, 64).byte()  # dark on the left
    load = loader(ramp + smooth_pictures(300, 64, 64) // 2, batch_size=300)
    first, second = load.batch(1)[0]
    plain = first * load.std + load.mean
    assert (train.MEAN, train.STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert -1e-5 < plain.min() < 0.1 < 0.9 < plain.max() < 1 + 1e-5  # so they were normalised by these
    flat = torch.stack([first.mean(1).flatten(1), second.mean(1).flatten(1)])
    correlation = F.cosine_similarity(*(flat - flat.mean(2, keepdim=True)), dim=1)
    assert correlation.quantile(0.02) > 0.8 and not torch.equal(first, second)
    mirrored = first[..., :16].mean((1, 2, 3)) > first[..., 16:].mean((1, 2, 3))
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.1)

def test_views_compile_and_are_the_same_views(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # C++ takes long
    pixels, compiled = smooth_pictures(12, 48, 48), CPU._replace(compile=True)
    plain, fast = (loader(pixels, batch_size=12, machine=machine) for machine in (CPU, compiled))
    for step in (1, 2, 3):
        assert torch.allclose(plain.batch(step)[0], fast.batch(step)[0], atol=1e-5)

@pytest.mark.parametrize("held", ["meta", "cpu"])  # pictures, on the device, which has no numbers, or beside
def test_all_is_moved_to_the_device(held, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    meta = CPU._replace(device=torch.device("meta"), compile=True)
    load = loader(smooth_pictures(8, 48, 48).to(held), batch_size=8, machine=meta)
    views, visible, _ = load.batch(1)
    (loss := MIMJEPA(load.recipe).to("meta")(*views, visible)).backward()
    assert {x.device.type for x in (views, visible, loss)} == {"meta"} and views.shape == (2, 8, 3, 32, 32)

def test_a_batch_depends_on_seed_and_step_alone_and_an_epoch_takes_every_picture_once():
    pixels = smooth_pictures(20, 32, 32)
    first, same, other = (loader(pixels, batch_size=6, seed=seed) for seed in (1, 1, 2))
    for step in (4, 1, 9):
        batch, again, others = (load.batch(step) for load in (first, same, other))
        assert all(map(torch.equal, batch, again)) and not torch.equal(batch[0], others[0])
        assert (batch[1].sum(1) == count_visible(4, first.recipe.mask_ratio)).all()
    epochs = [torch.cat([first.batch(step)[2] for step in steps]) for steps in ((1, 2, 3), (4, 5, 6))]
    assert len(epochs[0].unique()) == len(epochs[1].unique()) == 18 and not torch.equal(*epochs)

# ---- Training ----------------------------------------------------------------------------------------------

def refused(program, *arguments):
    with pytest.raises((InputError, OSError)) as refusal:
        program.main([str(argument) for argument in arguments])
    assert "\n" not in str(refusal.value)
    return str(refusal.value)

def kept(run):
    saved = load_checkpoint(f"{run}/ckpt.pt")
    rows = [{**row, "images_per_s": 0} for row in saved["history"]]
    return [rows, *(saved[name] for name in ("model", "optimizer", "scaler", "step", "recent"))]

def test_schedules_at_their_corners_and_a_warm_up_of_40_epochs_or_of_a_short_runs_share():
    T, W = 3000, 400
    flat_end, lr = W + int(0.72 * (T - W)), [train.schedules(step, T, W)[0] for step in range(T + 1)]
    assert lr[1] == pytest.approx(1e-6 + (5e-4 - 1e-6) / W) and lr[W // 2] == pytest.approx((1e-6 + 5e-4) / 2)
    assert lr[W - 1] < lr[W] == lr[flat_end] == 5e-4 > lr[flat_end + 1] and lr[T] == pytest.approx(1e-5)
    assert lr[(flat_end + T) // 2] == pytest.approx((5e-4 + 1e-5) / 2, rel=1e-2)
    for t in (1, T // 2, T):
        assert train.schedules(t, T, W)[1:] == pytest.approx((0.04 + 0.36 * t / T, 0.996 + 0.004 * t / T))
    for epochs in (1, 30, 300, 900):
        first, other = trained(f"--epochs {epochs} --max-steps 1", str(epochs))["optimizer"]["param_groups"]
        warmup_steps = 5 * min(epochs * 40 / 300, 40)
        assert first["lr"] == pytest.approx(min(3e-4, 1e-6 + (3e-4 - 1e-6) / warmup_steps), rel=1e-9)
        assert other["lr"] == first["lr"] and other["weight_decay"] == 0 < first["weight_decay"]

def test_a_step_of_training_is_the_papers():
    """Three steps of train.py, and the same written out: target, loss, AdamW, schedules, moving average."""
    saved = trained("--max-steps 3")
    recipe = train.Recipe(**saved["recipe"])
    load = train.Loader(train.load_pictures(recipe), torch.arange(40), recipe, CPU)
    torch.manual_seed(47)
    model = MIMJEPA(recipe)
    learning = [*model.context_encoder.parameters(), *model.predictor.parameters()]
    first, second = ([torch.zeros_like(p) for p in learning] for _ in range(2))
    for t in (1, 2, 3):
        (view1, view2), seen, _ = load.batch(t)
        target = layer_norm(model.target_encoder(view2))
        (loss := jepa_loss(model.predictor(model.context_encoder(view1, seen)), target, seen)).backward()
        assert saved["recent"][t - 1].tolist() == pytest.approx([loss.item(), target.std(0).mean().item()])
        lr, decay, momentum = train.schedules(t, 15, 2, peak_lr=3e-4, start_momentum=0.99)
        for p, m, v in zip(learning, first, second):
            m.mul_(0.9).add_(0.1 * p.grad)
            v.mul_(0.999).add_(0.001 * p.grad**2)
            p.data *= 1 - lr * decay * (p.ndim > 1)
            p.data -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            p.grad = None
        for slow, fast in zip(model.target_encoder.parameters(), model.context_encoder.parameters()):
            slow.data = momentum * slow.data + (1 - momentum) * fast.data
    for name, value in model.state_dict().items():
        assert torch.allclose(value, saved["model"][name], atol=1e-6), name

def test_a_run_is_saved_on_the_clock_and_a_row_is_the_mean_of_its_steps_and_their_speed(monkeypatch):
    """Saved once a minute, at --keep-every, at the end. Rows after step 4 and 5 of each epoch, its last."""
    clock, saved, losses, save, step = Mock(now=1000.0), [], [], train.save, train.train_step
    clock.perf_counter = lambda: clock.now

    def slow_step(*arguments):
        clock.now += 7 if losses else 70  # seconds
        loss, deviation = step(*arguments)
        losses.append(loss.item())
        return loss, deviation

    def slow_save(*arguments, **state):
        clock.now += 100
        saved.append(state["step"])
        save(*arguments, **state)

    for name, value in dict(time=clock, ROW=4, train_step=slow_step, save=slow_save).items():
        monkeypatch.setattr(train, name, value)
    trained("--epochs 9 --keep-every 4")
    assert saved == [1, 10, 19, 20, 29, 38, 40, 45] and load_checkpoint("run/ckpt-0004.pt")["step"] == 20
    rows = np.genfromtxt("run/metrics.csv", delimiter=",", names=True)
    ends = [end for epoch in range(9) for end in (5 * epoch + 4, 5 * epoch + 5)]
    means = [np.mean(losses[start:end]) for start, end in itertools.pairwise([0, *ends])]
    assert rows["step"].tolist() == ends and np.allclose(rows["epoch"] * 5, ends)
    assert np.allclose(rows["loss"], means) and np.isfinite(rows.tolist()).all()
    assert np.allclose(rows["images_per_s"], 8 / 7)  # neither the first step nor saving counts

@pytest.mark.parametrize("name, step", [("SIGINT", 9), ("SIGTERM", 9), ("SIGHUP", 9), ("SIGKILL", 5)])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(name, step):
    """Asked to stop it saves at once; killed, it goes on from its last save. fp16 scales gradients."""
    flags, program = "--dropout 0.2 --attention-dropout 0.1 --drop-path 0.2 --precision fp16", """if True:
        import itertools, signal, sys, train
        for number in (1, 2, 15):
            signal.signal(number, signal.SIG_DFL)  # nohup and & ignore some
        step, number = train.train_step, itertools.count(1)
        def one_step(*arguments):
            if next(number) == 9:
                signal.raise_signal(getattr(signal, sys.argv[1]))
            return step(*arguments)
        train.train_step = one_step
        train.run(lambda stop: train.main(sys.argv[2:], stop))"""
    trained(flags, "whole")
    done = python("-c", program, name, *CRITTERS, *flags.split(), "--keep-every", "1", "--out", "run")
    assert done.returncode in (-9, 128 + getattr(signal, name))
    assert load_checkpoint("run/ckpt.pt")["step"] == step
    trained("--resume --device cpu --precision fp16", base=[])
    torch.testing.assert_close(kept("run"), kept("whole"), rtol=0, atol=0)

def python(*command):
    settings = dict(capture_output=True, text=True, timeout=100, env=os.environ | {"PYTHONPATH": str(HERE)})
    return subprocess.run([sys.executable, *map(str, command)], **settings)

@pytest.mark.parametrize("heeded", [False, True])
def test_a_signal_ends_at_once_before_training_heeds_it_and_when_it_comes_twice(monkeypatch, heeded):
    def main(stop):
        stop.heeded, main.stop = heeded, stop
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.raise_signal(number)
            noted.append(stop.signal)

    noted = []
    monkeypatch.setattr(signal, "getsignal", Mock())  # nohup and & have some ignored
    with pytest.raises(SystemExit, match="130"):
        train.run(main)
    assert noted == [signal.SIGTERM, signal.SIGTERM] * heeded and not main.stop.heeded  # a notebook goes on

def test_a_run_goes_on_without_its_flags_but_not_as_another_run_nor_with_other_pictures(monkeypatch, capsys):
    labelled_folder("photos")
    trained("--dataset folder --data-dir photos --max-steps 1", base=TINY)
    some = trained("--dataset folder --data-dir photos --max-steps 1 --pretrain-split train", "some", TINY)
    assert some["pictures"].startswith("18 pictures")  # of 30: the test pictures are left out
    assert "train/<class>" in refused(train, *"--data-dir photos/test --pretrain-split train".split())
    resume = "--resume --device cpu --max-steps "
    assert trained(resume + "2", base=[])["step"] == 2
    Path("photos").rename("moved")
    assert trained(resume + "3 --data-dir moved", base=[])["step"] == 3
    before, picture = Path("run/ckpt.pt").read_bytes(), Path("moved/test/species 0/21.png")
    for flags, says in (("", "--resume"), ("--resume --dim 32", "dim"), ("--resume --seed 1", "seed")):
        assert says in refused(train, *flags.split(), "--dataset", "folder", "--out", "run")
    save_picture(picture, size=(99, 9))
    assert "30 pictures" in refused(train, *resume.split(), "4", "--out", "run")
    picture.write_bytes(b"damaged")
    assert "29 pictures" in refused(train, *resume.split(), "4", "--out", "run", "--skip-bad-images")
    assert Path("run/ckpt.pt").read_bytes() == before
    monkeypatch.setattr(probing, "draw_run", draw := Mock())
    probing.main("run/ckpt.pt --data-dir moved --skip-bad-images --epochs 0 --device cpu".split())
    assert "18 training and 11 test" in capsys.readouterr().out and len(draw.call_args.args[2].rows) == 29
    save_picture(picture, 21)
    assert trained(resume + "4", base=[])["step"] == 4  # put back, all is well
    for split in ("train", "test"):  # no file is another, but two classes are one
        Path(f"moved/{split}/species 1").rename(f"moved/{split}/species 0/x")
    assert "30 pictures" in refused(train, *resume.split(), "4", "--out", "run")

@pytest.mark.parametrize("precision, digits", [("bf16", 8), ("fp16", 11)])
def test_half_precision_trains_like_full_precision_and_a_run_may_change_to_it(precision, digits):
    """The mean loss of four steps is the same within what numbers of so many binary digits allow."""
    means = [trained(f"--max-steps 4 --precision {p}", p)["recent"].mean(0) for p in ("fp32", precision)]
    assert 0 < (means[0] - means[1]).abs().max() < 2.0**-digits
    changed, whole = (trained(f"--resume --precision {precision}", run) for run in ("fp32", precision))
    assert changed["history"][-1]["loss"] == pytest.approx(whole["history"][-1]["loss"], abs=0.02)

def test_the_readmes_lines_turn_pictures_into_features_and_its_commands_are_understood():
    readme = (HERE / "README.md").read_text().replace("\\\n", " ")  # long lines joined, as by a shell
    labelled_folder("photos")
    trained("--dataset folder --data-dir photos/train --max-steps 1", "runs/folder", TINY)
    names = {"paths": sorted(Path("photos").rglob("*.png"))}
    exec("\n".join(re.findall(r"```py\n(.*?)```", readme, re.DOTALL)), names)
    assert names["features"].shape == (30, 16) and names["features"].isfinite().all()
    probe = "runs/folder/ckpt.pt --no-baseline --no-pca --encoder target --epochs 1 --device cpu".split()
    assert "train/<class>" in refused(probing, *probe)  # no labels here, but
    assert probing.main([*probe, "--data-dir", "photos"]) == 0 and not Path("runs/folder/pca.png").exists()
    assert [*json.load(open("runs/folder/eval.json"))["results"]] == ["trained"]
    commands = re.findall(r"python (train|eval)\.py([^#\n&`;|]*)", readme)
    for program, arguments in commands:
        if "--help" not in arguments:
            {"train": train, "eval": probing}[program].read_arguments(arguments.split())
    assert len(commands) > 5

# ---- Evaluation --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, count, drops", [
    ("simple", 14_630, 2), ("multi-head", 313_001, 3), ("cross", 1_786_405, 2)])
def test_a_probe_has_the_papers_layers_and_learns_which_tokens_matter(monkeypatch, name, count, drops):
    """One token in nine says the class, the others are noise: only attention to it solves the task."""
    assert sum(p.numel() for p in probing.PROBES[name](384, 37).parameters()) == count
    probe = probing.PROBES[name](16, 4)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=5e-3)
    for _ in range(201):
        labels, tokens = torch.randint(4, (64,)), torch.randn(64, 9, 16)
        tokens[torch.arange(64), torch.randint(9, (64,))] = 3 * torch.eye(16)[labels] + 3 * torch.eye(16)[15]
        tokens = layer_norm(tokens)
        optimizer.zero_grad()
        F.cross_entropy(probe(tokens), labels).backward()
        optimizer.step()
    scores = probe.eval()(tokens)
    assert scores.shape == (64, 4) and (scores.argmax(1) == labels).float().mean() > 0.8
    assert torch.allclose(probe(tokens.flip(1)), scores, atol=1e-4)  # a set of tokens has no order
    monkeypatch.setattr(F, "dropout", dropout := Mock(side_effect=lambda x, *_: x))
    probe.train()(tokens)
    assert [call.args[1] for call in dropout.call_args_list] == [0.2] * drops

def data_of(brightness, labels, training):
    pixels = torch.tensor(brightness, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 32, 32)
    pictures = train.Pictures(pixels, torch.full((len(labels), 2), 32.0), torch.tensor(labels), training)
    return probing.split_data(pictures, train.Recipe(pictures=20, image_size=32, seed=0), CPU)

def test_accuracies_by_hand_and_neighbours_that_vote_by_similarity():
    scores = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6]] * 2 + [[0, 9, 0, 0, 0, 0, 0], [5, 4, 9, 0, 0, 0, 0]])
    assert probing.accuracies(scores, torch.tensor([0, 0, 1, 1])) == [75, 100, 75]
    assert probing.accuracies(scores[:3], torch.tensor([0, 1, 1])) == pytest.approx([200 / 3, 200 / 3, 75])
    points = F.normalize(torch.tensor([[1.0, 0.0], [1, 0.5], [1, 0.6], [-1, 0]]), dim=1)
    [scores] = probing.knn(points, torch.tensor([0, 1, 1, 2]), torch.tensor([[2.0, 0.0]]), classes=3, k=3)
    votes = [math.exp(1 / 0.07), sum(math.exp(1 / math.hypot(1, x) / 0.07) for x in (0.5, 0.6)), 0]
    assert scores.tolist() == pytest.approx(votes, rel=1e-3)
    circle = torch.tensor([[1.0, 0.1 * i] for i in range(12)])  # by default ten vote: one for 0, nine for 1
    assert probing.knn(circle, torch.tensor([0] + 9 * [1] + 2 * [2]), circle[:1], classes=3).argmax() == 1
    # A dark picture of class 1 has ten dark neighbours, all of class 0: its class is not even in the top 5.
    data, config = data_of([50] * 10 + [200, 50], [0] * 10 + [1, 1], 11), replace(STILL, image_size=32)
    features = probing.Features(Encoder(config), data.loader, CPU)
    assert probing.evaluate(features, data, 0, 0)[0]["k-NN"] == [0, 0, 0]

def test_the_linear_probe_is_the_optimum_of_standardised_logistic_regression_with_weight_decay():
    """There the gradient is zero: Xᵀ(P − Y)/n + decay · W = 0, and for the bias the mean of P − Y."""
    labels, scale = torch.arange(90) % 3, torch.logspace(-2, 2, 5)
    points = (torch.randn(90, 5) + 2 * torch.eye(5)[labels]) * scale + 3 * scale
    scores = probing.linear(points, labels, points, classes=3)
    assert torch.allclose(probing.linear(points, labels, points[:9], classes=3), scores[:9], atol=1e-4)
    x = (points - points.mean(0)) / points.std(0)
    weight = torch.linalg.lstsq(torch.cat([x, torch.ones(90, 1)], 1), scores).solution[:5]
    error = scores.softmax(1) - F.one_hot(labels)
    assert torch.allclose(x.T @ error / 90, -1e-3 * weight, atol=1e-4) and weight.abs().max() > 1
    assert error.mean(0).abs().max() < 1e-4 and (scores.argmax(1) == labels).float().mean() > 0.8

def test_probing_reads_normalised_tokens_leaves_the_encoder_alone_and_sees_no_test_label(monkeypatch):
    """With other test labels the figures change, but not one bit of what was learned or drawn."""
    states, results, optimizer = [], [], Mock(side_effect=train.make_optimizer)
    monkeypatch.setattr(probing, "make_optimizer", optimizer)
    recipe = train.Recipe(image_size=32, dim=16, heads=2, depth=1, pictures=40, cache_side=32, dropout=0.5)
    pictures = train.load_pictures(recipe)
    encoder, images = Encoder(recipe), torch.randn(2, 3, 32, 32)
    normalised = layer_norm(encoder.eval()(images))
    for shift in (0, 1):
        pictures.labels[30:] = (pictures.labels[30:] + shift) % 10
        data = probing.split_data(pictures, recipe, CPU)
        features = probing.Features(encoder.train(), data.loader, CPU)  # which drops nothing out
        assert torch.equal(features(images), normalised)
        results.append(probing.evaluate(features, data, 2, 47))
        states.append(torch.get_rng_state())
    assert results[0][0] != results[1][0] and torch.equal(*states)
    first = features(data.loader.normalise(probing.central_views(data.loader, data.train[:1])))
    assert torch.allclose(results[0][1][0], first.mean(1), atol=1e-5)
    assert all(map(torch.equal, *(call.args[0] for call in optimizer.call_args_list)))
    recipes = recipe, recipe, replace(recipe, seed=48)
    few, same, others = (probing.split_data(pictures, recipe, CPU, per_class=2) for recipe in recipes)
    assert set(few.labels[few.train].bincount().tolist()) == {2} and few.train.max() < 30
    assert few.train.tolist() == same.train.tolist() != others.train.tolist()  # chosen by the seed
    assert few.test.tolist() == data.test.tolist() == list(range(30, 40))

def test_features_of_many_pictures_are_those_of_each_one_whatever_the_last_batch():
    load = loader(smooth_pictures(70, 32, 32), batch_size=8)
    features = probing.Features(Encoder(replace(STILL, image_size=32)), load, CPU)
    rows, result = torch.randperm(70)[:67], Mock(side_effect=lambda tokens: tokens.mean(1))
    found = features.of(rows, "", result)
    one = features(load.normalise(probing.central_views(load, rows[66:]))).mean(1)
    assert found.shape == (67, 32) and torch.allclose(found[66:], one, atol=1e-5)
    assert [len(call.args[0]) for call in result.call_args_list] == [64, 64]  # so it is compiled once

def test_supervised_training_moves_the_encoder_and_learns_after_a_warm_up(monkeypatch):
    """Two classes of brightness are told apart. Warm-up: a fifth of a probe's steps, 40/300 of these."""
    rates, step = [], torch.optim.AdamW.step
    spy = lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    data = data_of([80, 180] * 38 + [180, 80] * 2, [0, 1] * 30 + [0, 1] * 10, 60)  # 20 to test on, 4 are odd
    recipe = train.Recipe(**vars(STILL) | dict(image_size=32, depth=1, pictures=20, epochs=30, lr=3e-3))
    encoder, modes = Encoder(recipe).requires_grad_(False), []  # as load_encoder gives it
    monkeypatch.setattr(F, "dropout", lambda x, p, training=True, *_: (modes.append(training), x)[1])
    weight = encoder.blocks[0].mlp.w3.weight.clone()
    figures = probing.supervise(encoder, data, recipe, CPU)
    assert modes[0] and not modes[-1] and not encoder.training  # tested without dropout
    assert figures["simple"][0] == 80 and not torch.equal(weight, encoder.blocks[0].mlp.w3.weight)
    assert rates.index(3e-3) + 1 == 4 and max(rates) == 3e-3 and len(rates) == 30
    rates.clear()
    probing.evaluate(probing.Features(encoder, data.loader, CPU), data, 10, 0)
    assert rates.index(5e-4) + 1 == 2 and max(rates) == 5e-4 and len(rates) == 10

def test_the_encoders_that_are_compared_are_the_trained_one_and_that_of_step_0(monkeypatch):
    """From scratch begins where train.py began, fine-tuned at the checkpoint, which stays as it is."""
    saved, seen, before = trained("--max-steps 5"), [], Path("run/ckpt.pt").read_bytes()

    def supervise(encoder, data, recipe, machine):
        seen.append(encoder)
        rows = json.load(open("run/eval.json"))["results"]  # kept, should this long part be stopped
        return {"linear": (recipe.epochs, 2, len(rows))}

    def evaluate(features, data, epochs, seed):
        seen.append(features.encoder)
        return {"linear": (epochs, 2, 3)}, 0, 0

    monkeypatch.setattr(probing, "evaluate", evaluate)
    monkeypatch.setattr(probing, "supervise", supervise)
    torch.manual_seed(47)
    fresh = MIMJEPA(train.Recipe(**saved["recipe"])).context_encoder.state_dict()
    for which in ("context", "target"):
        probing.main(f"run/ckpt.pt --encoder {which} --no-pca --from-scratch --finetune --device cpu".split())
        seen.append(public := load_encoder("run/ckpt.pt", which))
        assert not public.training and not any(p.requires_grad for p in public.parameters())
        for encoder, learned in zip(seen, (True, False, False, True, True), strict=True):
            for name, value in encoder.state_dict().items():
                expected = saved["model"][f"{which}_encoder.{name}"] if learned else fresh[name]
                assert torch.equal(value, expected)
        seen.clear()
    assert json.load(open("run/eval.json"))["results"] == {
        "trained": {"linear": [2, 2, 3]}, "untrained": {"linear": [2, 2, 3]},  # of probes
        "from scratch": {"linear": [3, 2, 2]}, "fine-tuned": {"linear": [3, 2, 3]}}
    assert Path("run/ckpt.pt").read_bytes() == before
    saved["model"]["context_encoder.mask_token"][0] = math.nan
    for which, says in (("teacher", "which is 'teacher'"), ("context", "not finite")):
        with pytest.raises(InputError, match=says):
            load_encoder(saved, which)

def test_all_probes_are_shown_for_every_checkpoint_and_how_they_fare_as_a_run_goes_on(capsys, monkeypatch):
    trained("--keep-every 1")
    capsys.readouterr()
    monkeypatch.setattr(probing, "save_curves", curves := Mock(side_effect=probing.save_curves))
    probing.main("run/ckpt*.pt ./run/ckpt.pt --epochs 1 --device cpu".split())  # one of them twice
    table, reports = capsys.readouterr().out, {}
    for path in sorted(Path("run").glob("eval*.json")):
        reports[path.stem] = json.load(open(path))["results"]
        for name, rows in reports[path.stem].items():
            assert list(rows) == ["k-NN", "linear", "simple", "multi-head", "cross"]
            for probe, row in rows.items():
                assert f"{probe:12}{name:14}{row[0]:11.1f}{row[1]:11.1f}{row[2]:11.1f}" in table
    assert list(reports) == ["eval-0001", "eval-0002", "eval-0003", "eval"]
    panels = curves.call_args.args[1]  # of probes.png
    accuracy, course = panels["accuracy, top-1 in %"], [reports[name] for name in list(reports)[:3]]
    assert accuracy["linear"] == ([1, 2, 3], [report["trained"]["linear"][0] for report in course])
    assert accuracy["linear, untrained"][1] == [reports["eval"]["untrained"]["linear"][0]] * 2
    assert panels["loss"]["loss"][0] == [1, 2, 3]
    assert {"curves", "views", "pca", "leak", "probes"} <= {path.stem for path in Path("run").glob("*.png")}

def test_leak_png_shows_a_hole_that_stays_and_one_that_fills_and_views_png_what_is_hidden(monkeypatch):
    monkeypatch.setattr(probing, "save_grid", grid := Mock())
    load = loader(smooth_pictures(8, 96, 96), batch_size=8, side=96)
    there = torch.zeros(1, 36, dtype=torch.bool)
    there[:, [14, 15, 20, 21]] = True
    probing.draw_leak("leak", Tokenizer(SMALL), load, probing.central_views(load, load.rows[:1]), there)
    (masked, dense), (stays, fills) = grid.call_args.args[2].values(), grid.call_args.args[3]
    orange = [((tiles[2:, 0] > 0.9) & (tiles[2:, 2] < 0.2)).any() for tiles in (masked, dense)]
    assert stays[2:] == ["hole: 0% filled"] * 4 and fills[-1] == "hole: 100% filled"
    assert orange == [False, True]
    probing.draw_views("views", load, 1)
    whole, seen, _ = grid.call_args.args[2].values()
    hidden = ~enlarged(load.batch(1)[1][:6], 96).expand(-1, 3, -1, -1)
    assert torch.equal(whole[~hidden], seen[~hidden]) and len(seen[hidden].unique()) == 2

# ---- What goes wrong ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("part, shapes", [
    *((Encoder(SMALL), [shape]) for shape in ((2, 3, 96, 64), (2, 1, 96, 96), (3, 96, 96), (2, 3, 16, 16))),
    *((Encoder(SMALL), [(2, 3, 96, 96), shape]) for shape in ((2, 35), (1, 36), (2, 36))),  # no mask is float
    (Predictor(SMALL), [(2, 35, 32)]), (jepa_loss, [(2, 36, 8), (2, 36, 4), (2, 36)]),
])
def test_tensors_of_wrong_shapes_or_types_are_refused(part, shapes):
    with pytest.raises(ValueError, match="must be"):
        part(*(torch.randn(shape) for shape in shapes))

@pytest.mark.parametrize("arguments, says", [
    ("--dataset cats", "dataset is 'cats'"), ("--dataset folder", "no folder data"), ("--lr nan", "lr is"),
    ("--data-dir .", "no pictures in"), ("--dataset critters --data-dir .", "leave out"),
    ("--epochs 0", "epochs is"), ("--seed -1", "seed is"), ("--depth 0", "depth is"), ("--dim 30", "dim is"),
    ("--heads 5", "dim is"), ("--image-size 100", "image_size is"), ("--tokenizer conv", "tokenizer is"),
    ("--masking bloc", "masking is"), ("--mask-ratio 0", "mask_ratio is"), ("--mask-ratio 1", "mask_ratio"),
    ("--dropout 1", "dropout is"), ("--pretrain-split test", "pretrain_split"), ("--pictures 9", "pictures"),
    ("--batch-size 50000", "batch_size is"), ("--device tpu9", "tpu9"), ("--max-steps -1", "max_steps is"),
    ("--out .", "is there"), ("pictures", "unrecognized"), ("none.pt", "cannot read none.pt"),
])
def test_wrong_arguments_are_refused_in_one_line_before_anything_is_written(arguments, says):
    program = train if arguments.startswith(("--", "pictures")) else probing
    assert says in refused(program, *arguments.split()) and not list(Path(".").iterdir())

def test_the_programs_as_programs_end_with_a_status_and_what_is_wrong_is_one_line():
    done = python(HERE / "train.py", *CRITTERS, "--max-steps", "1")
    assert done.stdout.endswith("eval.py runs/critters/ckpt.pt\n"), done
    done = python(HERE / "eval.py", "runs/critters/ckpt.pt", "--epochs", "0", "--labels", "2")
    assert "20 training" in done.stdout and "linear" in done.stdout and "cross" not in done.stdout, done
    done = python(HERE / "train.py", "--data-dir", "a\nb")
    assert done.returncode == 2 and re.fullmatch("error: no folder a.*b,.*\n", done.stderr), done

def test_a_folder_belongs_to_one_run_and_a_tilde_is_ones_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    train.main([*CRITTERS, "--max-steps", "1", "--out=~/runs/mine"])
    before = {path: path.read_bytes() for path in Path("runs/mine").iterdir()}
    assert "--resume goes on" in refused(train, *CRITTERS, "--out", "runs/mine") and not Path("~").exists()
    Path("runs/mine/ckpt.pt").rename("runs/mine/ckpt-0005.pt")  # is no reason to begin anew in that folder
    assert "cannot read" in refused(train, *CRITTERS, "--resume", "--out", "runs/mine")
    Path("runs/mine/ckpt-0005.pt").rename("runs/mine/ckpt.pt")
    open_run = lambda args, given: (train.default_recipe(given), Path("runs/mine"), None)
    monkeypatch.setattr(train, "open_run", open_run)  # two look for the folder at the same moment
    with pytest.raises(FileExistsError):
        train.main(CRITTERS)
    assert {path: path.read_bytes() for path in before} == before

def test_a_table_that_is_open_elsewhere_is_a_warning_and_a_checkpoint_is_tried_again(monkeypatch, capsys):
    """As on Windows: a spreadsheet holds metrics.csv, a virus scanner ckpt.pt for a moment."""
    tries, replace_file = [], os.replace

    def busy(source, target):
        tries.append(target.name)
        if target.name == "metrics.csv" or len(tries) < 3:
            raise PermissionError(13, "Permission denied", str(target))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(train.time, "sleep", int)
    assert trained("--max-steps 2")["step"] == 2 and tries[:3] == ["ckpt.pt"] * 3
    assert "warning: cannot write run/metrics.csv" in capsys.readouterr().out
    assert os.listdir("run") == ["ckpt.pt"]

@pytest.mark.parametrize("place, name, fault, says", [
    (scott, "jepa_loss", lambda prediction, *_: prediction.sum() * math.inf, "at step 10 the loss is .*--lr"),
    (os, "fsync", Mock(side_effect=OSError(28, "No space left")), "cannot write .*No space left.*--resume"),
])
def test_trouble_in_a_run_is_one_line_and_leaves_what_was_saved_alone(monkeypatch, place, name, fault, says):
    trained("--max-steps 5")
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    monkeypatch.setattr(place, name, fault)
    assert re.search(says, refused(train, *CRITTERS, "--resume", "--out", "run"))
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before

@pytest.mark.parametrize("change, says", [
    ({}, "run/ckpt.pt is damaged"),  # a bit of a weight is another
    (dict(format=Path("x")), "run/ckpt.pt is damaged"),  # to unpickle an object can run code
    (dict(format="scott-mim-jepa 0"), "this version"), (dict(recipe=dict(pictures=1)), "pictures is"),
])
def test_a_checkpoint_that_is_damaged_or_does_not_fit_is_refused(change, says):
    checkpoint, file = trained("--max-steps 5"), Path("run/ckpt.pt")
    torch.save(checkpoint | change, file)
    if not change:
        content = bytearray(file.read_bytes())
        content[content.index(checkpoint["model"]["predictor.head.weight"].numpy().tobytes())] ^= 1
        file.write_bytes(content)
    assert says in refused(probing, file, "--device", "cpu")
    assert says in refused(train, *CRITTERS, "--resume", "--out", "run")
