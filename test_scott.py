"""Proofs of the method, of training and evaluation, and of what can go wrong.     pytest -q test_scott.py

No test needs a download, a GPU, or a file from elsewhere. All of them take about 80 seconds on two CPU cores.
"""

import gc
import io
import itertools
import json
import math
import os
import platform
import re
import runpy
import shlex
import signal
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"  # these tensors are so small that several cores would wait for each other

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from torchvision.datasets import Flowers102
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as TF

import eval as probing
import scott
import train
from scott import (
    MIMJEPA, Config, Encoder, InputError, Predictor, Tokenizer, attend, count_visible, jepa_loss, layer_norm,
    load_checkpoint, load_encoder, position_embedding, sample_masks, target_deviation,
)  # fmt: skip

HERE = Path(__file__).resolve().parent
SMALL = Config(image_size=96, dim=32, depth=2, heads=2, predictor_depth=2)
STILL = replace(SMALL, dropout=0.0, attention_dropout=0.0, drop_path=0.0)
CPU = SimpleNamespace(device=torch.device("cpu"), dtype=None, compile=False, autocast=nullcontext)

@pytest.fixture(autouse=True)
def own_folder_and_the_same_numbers_every_time(tmp_path, monkeypatch):
    for folder, rights in zip((tmp_path, *tmp_path.parents), (0o777, 0o755, 0o755)):
        folder.chmod(rights)  # for `another_user`
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

def enlarged(visible, side):
    """A mask [B, N] in pixels: bool [B, 1, side, side]."""
    grid, cell = math.isqrt(visible.shape[1]), side // math.isqrt(visible.shape[1])
    return visible.view(-1, 1, grid, grid).repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)

def batch(config=SMALL, count=4):
    shape = (count, 3, config.image_size, config.image_size)
    return torch.randn(shape), torch.randn(shape), sample_masks(count, config.grid)

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
    for impossible in ((2, 1), (2, 4, -0.5), (2, 4, 0.5, "bloc")):
        with pytest.raises(InputError):
            sample_masks(*impossible)

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
        for layer in (tokenizer.conv1, tokenizer.pool1, tokenizer.conv2, tokenizer.pool2):
            layer.register_forward_hook(lambda layer, inputs, output: maps.append(output))
    images, visible = torch.randn(4, 3, 96, 96), sample_masks(4, 6)
    ours, dense = (tokenizer(images, visible) for tokenizer in tokenizers)
    in_the_hole = [x.masked_fill(enlarged(visible, x.shape[-1]), 0).abs().max() for x in maps]
    assert max(in_the_hole[:4]) == 0 and min(in_the_hole[4:]) > 0.01 < (ours - dense)[visible].abs().max()
    assert torch.equal(*(tokenizer(images) for tokenizer in tokenizers))

def plain_tokenizer(tokenizer, images, visible):
    """The tokenizer written out: multiplications by the mask, a loop for the filter [1 2 1]ᵀ[1 2 1]/16."""
    x = images * enlarged(visible, images.shape[-1])
    for conv in (tokenizer.conv1, tokenizer.conv2):
        x = F.conv2d(x, conv.weight, stride=2, padding=3)
        x = (x * enlarged(visible, x.shape[-1])).relu()
        x = torch.stack([x[..., :-1, :-1], x[..., 1:, :-1], x[..., :-1, 1:], x[..., 1:, 1:]]).amax(0)
        padded, side = F.pad(x, (1, 1, 1, 1)), x.shape[-1] // 2 + 1
        x = torch.zeros(*x.shape[:2], side, side, dtype=x.dtype)
        for i, a in enumerate((1, 2, 1)):
            for j, b in enumerate((1, 2, 1)):
                x += a * b / 16 * padded[..., i : i + 2 * side - 1 : 2, j : j + 2 * side - 1 : 2]
        x = x * enlarged(visible, side)
    return x.flatten(2).transpose(1, 2)

@pytest.mark.parametrize("side", [32, 224])
def test_the_tokenizer_is_the_papers_layer_by_layer_and_that_of_a_plain_vit_cuts_patches(side):
    tokenizer, images = Tokenizer(SMALL).double(), torch.randn(2, 3, side, side, dtype=torch.float64)
    everything = torch.ones(2, (side // 16) ** 2, dtype=torch.bool)
    for visible in (sample_masks(2, side // 16), everything):
        expected = plain_tokenizer(tokenizer, images, visible)
        for training in (True, False):
            with torch.set_grad_enabled(training):
                assert torch.allclose(tokenizer(images, visible), expected, atol=1e-12)
    assert torch.equal(tokenizer(images, everything), tokenizer(images))
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
        with torch.device("meta"):  # as large models are made
            trained_there = Encoder(replace(SMALL, image_size=side)).eval()
        trained_there.to_empty(device="cpu").load_state_dict(encoder.state_dict())
        images = torch.randn(1, 3, side, side)
        assert torch.equal(encoder(images), trained_there(images))

@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_is_the_same_on_a_cpu_and_on_a_gpu(dropout):
    """The products written out and the GPU's single kernel: with the same dropout mask the same numbers."""
    (q, k, v), results = torch.randn(3, 2, 4, 9, 8).unbind(0), []
    for form in (attend, lambda q, k, v, p: F.scaled_dot_product_attention(q, k, v, dropout_p=p)):
        torch.manual_seed(1)
        results.append(form(q, k, v, dropout))
    assert torch.allclose(*results, atol=1e-5)

def plain_block(block, x, heads):
    """A block written out: attention and SwiGLU by their formulas."""
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
    assert target_deviation(healthy) == pytest.approx(1, abs=0.05)
    assert target_deviation(healthy[:1].expand(64, 4, 256)) < 1e-6  # though it tells places apart

def test_the_target_starts_as_a_copy_gets_no_gradient_and_no_dropout_and_follows_as_a_moving_average():
    """target ← m · target + (1 − m) · context, for all parameters"""
    model = MIMJEPA(SMALL).train()
    context, target = model.context_encoder, model.target_encoder
    assert all(map(torch.equal, context.parameters(), target.parameters()))
    model(*batch()).backward()
    assert all(p.grad is None and not p.requires_grad for p in target.parameters())
    assert all(p.grad.abs().sum() > 0 for part in (context, model.predictor) for p in part.parameters())
    assert all(module.training for module in context.modules())
    assert not any(module.training for module in target.modules())
    for parameter in context.parameters():
        parameter.data += torch.randn_like(parameter)
    before = [p.clone() for p in target.parameters()]
    model.update_target(0.9)
    for old, ours, theirs in zip(before, context.parameters(), target.parameters(), strict=True):
        assert torch.allclose(theirs, 0.9 * old + 0.1 * ours, atol=1e-6)

@pytest.mark.parametrize("config, dtype", [(STILL, torch.bfloat16), (SMALL, None)])
def test_training_compiles_to_one_graph(config, dtype):
    """fullgraph=True raises where a graph breaks. Without dropout the gradients are the plain model's."""
    model, data, gradients = MIMJEPA(config).train(), batch(), []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            forward(*data, return_target=True)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert config == SMALL or (gradients[0] - gradients[1]).norm() < 3e-2 * gradients[0].norm()

def test_the_readme_quotes_the_source_and_what_the_demonstration_prints(capsys):
    """`python scott.py`, line by line."""
    readme = (HERE / "README.md").read_text()
    source = "".join((HERE / name).read_text() for name in ("scott.py", "train.py", "eval.py"))
    quotes = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(quotes) > 3 and [quote for quote in quotes if quote not in source] == []
    runpy.run_path(str(HERE / "scott.py"), run_name="__main__")
    assert [line for line in capsys.readouterr().out.splitlines() if line.rstrip() not in readme] == []

# ---- Recipes and critters ----------------------------------------------------------------------------------

TINY = """--image-size 32 --dim 16 --depth 2 --heads 2 --predictor-depth 1 --batch-size 8 --epochs 3
          --device cpu --precision fp32 --cache-side 48 --probe-epochs 2""".split()
CRITTERS = [*TINY, "--pictures", "40"]  # five steps an epoch
NO_DROPOUT = "--dropout 0 --attention-dropout 0 --drop-path 0 "
DROPOUT, FP16 = "--dropout 0.2 --attention-dropout 0.1 --drop-path 0.2 ", "--precision fp16 "

def trained(flags="", out="run", base=CRITTERS):
    """Run train.py with these flags. → what it has saved"""
    assert train.main([*base, *flags.split(), "--out", out]) == 0
    return load_checkpoint(f"{out}/ckpt.pt")

def test_the_papers_recipe_is_the_default_for_the_papers_data_and_costs_51_gflop_an_image():
    paper = dict(epochs=300, batch_size=64, lr=5e-4, momentum=0.996, seed=47, probe_epochs=100)
    for name in ("pets", "flowers", "imagenet100"):
        assert train.RECIPES[name].items() >= (paper | vars(Config())).items()
    assert train.training_flops(Config()) == pytest.approx(51.3e9, rel=0.01)

def test_critters_are_the_same_every_time_balanced_and_not_told_apart_by_colour():
    species, items = len(train.SPECIES), train.critters(600, seed=5)
    assert items == train.critters(600, seed=5) != train.critters(600, seed=6) and len(set(items)) == 600
    both = train.list_pictures("critters", "data", 600)
    assert both.train == 450 and len({seed for _, seed in both.items}) == 600  # no test picture is trained on
    labels = torch.tensor(items)[:, 0]
    assert labels.bincount(minlength=species).min() >= 600 // species
    pictures = np.stack([np.asarray(train.draw_critter(*item, side=32)) // 64 for item in items])
    colours = torch.from_numpy(pictures).long().flatten(1, 2) @ torch.tensor([16, 4, 1])
    histograms = F.one_hot(colours, 64).float().mean(1)
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

@pytest.mark.parametrize("files, labels, classes, training, says", [
    ("1.png a/2.JPG b/c/3.webp cache/4.png", [-1] * 4, [], 4, ""),
    ("1.png .2.png ._3.jpg .thumb/4.png @eaDir/5.png __MACOSX/6.png a/.Trash-1000/7.png", [-1], [], 1, ""),
    ("1.png run/views.png run/ckpt.pt", [-1], [], 1, ""),  # what a run has drawn is no picture to learn from
    ("1.png run/views.png run/metrics.csv", [-1], [], 1, ""),
    ("1.png 2.gif 3.GIF notes.txt .DS_Store", [-1], [], 1, "2 files of type .gif|1 files of type .txt"),
    ("1.png ../b/2.png more->../b ../b/itself->. dead.png->nowhere", [-1] * 3, [], 3, ""),  # links
    ("../b/c/1.png ../b/d/2.png ../b/d/up->.. train->../b test->../b", [0, 0, 1, 1], ["c", "d"], 2, ""),
    ("b/1.png train->b", [-1], [], 1, ""),  # the same picture by two ways
    ("train/1.png bus/2.png car/3.png", [-1] * 3, [], 3, ""),  # an unsplit class that is called train
    ("train/a/1.png train/b/2.png test/a/3.png test/b/4.png", [0, 0, 1, 1], ["a", "b"], 2, ""),
    ("train/a/1.png train/b/c/2.png val/a/3.png val/b/4.png", [0, 0, 1, 1], ["a", "b"], 2, ""),
    ("train/a/1.png val/a/2.png test/a/3.png test/a/4.png", [0] * 4, ["a"], 2, ""),
    ("train/n01/1.png val/n01/3.png test/4.png", [0, 0], ["n01"], 1, "1 files"),  # ImageNet's has no labels
    ("train/a/1.png train/.ipynb_checkpoints/1.png test/a/2.png", [0, 0], ["a"], 1, ""),
    ("train/a/2.png train/1.png test/a/3.png", [-1, 0, 0], ["a"], 2, "1 files beside the class folders"),
    ("train/a/1.png test/a/2.png more/3.png 4.png", [0, 0], ["a"], 1, "2 files outside train"),
    ("notes.txt", None, None, None, "no pictures"), ("train/a/1.png test/1.png", *[None] * 3, "same folders"),
    ("train/a/1.png train/b/1.png test/a/1.png", None, None, None, "same folders"),
])  # fmt: skip
def test_what_counts_as_a_picture_and_what_as_a_class(capsys, files, labels, classes, training, says):
    for name, _, target in (name.partition("->") for name in files.split()):
        path = Path("all", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target) if target else path.touch()
    dataset = "imagenet100" if "n01" in files else "folder"
    if labels is None:
        with pytest.raises(ValueError, match=says):  # as a notebook catches it
            train.list_pictures(dataset, "all")
    else:
        found, said = train.list_pictures(dataset, "all"), capsys.readouterr().out
        assert (sorted(found.labels), list(found.classes), found.train) == (labels, classes, training)
        assert all(said.count(part) == 1 for part in says.split("|") if part) and bool(said) == bool(says)

def test_pets_and_flowers_are_split_as_the_paper_splits_them(monkeypatch):
    """Pets: trainval for training, test for testing. Flowers: train and val, then test."""
    lists, folder = {"trainval": "", "test": ""}, Path("data/oxford-iiit-pet/annotations")
    for i in range(24):
        name = ("Bengal", "Siamese", "great_pyrenees")[i % 3] + f"_{i}"
        lists["trainval" if i < 15 else "test"] += f"{name} {i % 3 + 1} 1 1\n"
        save_picture(f"data/oxford-iiit-pet/images/{name}.jpg")
    folder.mkdir()
    for split, lines in lists.items():
        (folder / f"{split}.txt").write_text(lines)
    pets = train.list_pictures("pets", "data")
    assert list(pets.classes) == ["Bengal", "Siamese", "Great Pyrenees"]
    assert pets.labels == [0, 1, 2] * 8 and (len(pets.items), pets.train) == (24, 15)

    def a_few(self, root, split, **_):
        self._image_files, self._labels = [split] * len(split), [1] * len(split)

    monkeypatch.setattr(Flowers102, "__init__", a_few)
    flowers = train.list_pictures("flowers", "data")
    assert flowers.items == ["train"] * 5 + ["val"] * 3 + ["test"] * 4 and flowers.train == 8

def tiff(values, bits=None, white_is_zero=False, turn=1):
    """An uncompressed grey TIFF, written by hand: the numbers `values` [height, width] as they are."""
    data, (height, width) = values.tobytes(), values.shape
    if bits == 12:  # two numbers in three bytes
        data = np.packbits(np.unpackbits(values.byteswap().view(np.uint8)).reshape(-1, 16)[:, 4:]).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = {256: width, 257: height, 258: bits or 8 * values.itemsize, 259: 1, 262: int(not white_is_zero),
            273: 158, 274: turn, 277: 1, 278: height, 279: len(data), 339: kind}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries).ljust(158, b"\0") + data

def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()

GREY = np.arange(0, 240, 10, np.uint8).reshape(4, 6)
COLOUR = np.dstack([GREY, 255 - GREY, GREY.T.reshape(4, 6)])
DEEP = GREY.astype(np.uint16) * 256 + 77  # 16 bits
CLEAR = np.tile([0, 0, 0, 255, 255, 255], (4, 1)).astype(np.uint8)  # alpha: one half is see-through
FIRST = np.where(GREY == 0, 255, GREY)  # its first pixel, 0, is see-through
BROKEN = b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 282, 5, 1, 10**6, 0)  # points to nowhere
JPEG = np.asarray(Image.open(io.BytesIO(encoded(COLOUR, "JPEG"))))
TEXT = PngInfo()
TEXT.add_text("Comment", "word " * 500_000, zip=True)

@pytest.mark.parametrize("content, expected", [  # None: refused
    (encoded(Image.fromarray(COLOUR).quantize(24)), [COLOUR]),
    (encoded(Image.fromarray(COLOUR).convert("CMYK"), "TIFF"), [COLOUR]),
    (encoded(np.dstack([COLOUR, CLEAR])), [np.where(CLEAR[..., None] == 0, 255, COLOUR)]),
    (encoded(np.dstack([GREY, CLEAR])), [np.where(CLEAR == 0, 255, GREY)]),
    (encoded(GREY, transparency=0), [FIRST]), (encoded(DEEP, transparency=77), [FIRST]),
    (encoded(COLOUR, transparency=(0, 255, 0)), [np.where(GREY[..., None] == 0, 255, COLOUR)]),
    (encoded(DEEP), [GREY]), (tiff(DEEP), [GREY]),
    (tiff(65535 - DEEP, white_is_zero=True), [GREY]), (tiff(255 - GREY, white_is_zero=True), [GREY]),
    (tiff(GREY.astype(np.uint16) * 16, bits=12), [GREY, None]),  # right, or refused
    *((tiff(DEEP.astype(kind)), [None]) for kind in (np.int8, np.int16, np.int32, np.uint32, np.float32)),
    (encoded(GREY, pnginfo=TEXT), [GREY]), (encoded(Image.fromarray(GREY > 99)), [(GREY > 99) * 255]),
    (encoded(COLOUR, "JPEG", exif=BROKEN), [JPEG]), (encoded(COLOUR, "JPEG", exif=BROKEN[:16]), [JPEG]),
    (encoded(COLOUR, "JPEG", exif=b"Exif\0\0" + tiff(GREY, turn=6)), [np.rot90(JPEG, -1)]),
    (encoded(COLOUR, "JPEG")[:400], [None]), (b"", [None]),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_odd_pictures_are_read_right_or_refused_where_their_scale_is_unknown(content, expected):
    Path("picture").write_bytes(content)
    try:
        got = np.asarray(train.open_picture("picture", 32))
    except InputError as error:
        assert expected[-1] is None and "picture: " in str(error)
    else:
        assert np.array_equal(got, expected[0] if expected[0].ndim == 3 else np.dstack([expected[0]] * 3))

@pytest.mark.parametrize("mode, kind", [("L", "TIFF"), ("RGB", "TIFF"), ("I;16", "TIFF"), ("RGB", "PNG")])
def test_pictures_that_lie_on_their_side_come_upright(mode, kind):
    plain = Image.fromarray(DEEP) if mode == "I;16" else Image.fromarray(COLOUR).convert(mode)
    Path("plain").write_bytes(encoded(plain, kind))
    a, exif = np.asarray(train.open_picture("plain", 32)), Image.Exif()
    for turn, upright in enumerate((a, a[:, ::-1], a[::-1, ::-1], a[::-1], a.swapaxes(0, 1), np.rot90(a, -1),
                                    np.rot90(a, 2).swapaxes(0, 1), np.rot90(a)), start=1):  # fmt: skip
        exif[0x0112] = turn
        Path("turned").write_bytes(encoded(plain, kind, exif=exif))
        assert np.array_equal(np.asarray(train.open_picture("turned", 32)), upright), turn

# ---- Cache -------------------------------------------------------------------------------------------------

def load_photos(skip_bad_images=False):
    recipe = dict(cache_side=48, skip_bad_images=skip_bad_images)
    return train.load_pixels(train.list_pictures("folder", "photos"), "folder", "photos", Path("out"), recipe)

@pytest.fixture
def photos():
    """Two pictures in a folder, and where their cache will be."""
    save_picture("photos/a.png", 1, size=(80, 40))
    save_picture("photos/b.png", 2, size=(30, 90))
    os.chmod("photos", 0o777)
    return Path("photos/cache")

@contextmanager
def another_user():
    """Root may read and write everything: what needs a right that is missing, another user has to try."""
    Image.init()  # loads Pillow's formats
    trained("--max-steps 1", "as root")  # loads what torch imports late: the other user may not read it
    become = os.setresuid if os.getuid() == 0 else lambda *_: None
    become(65534, 65534, 0)
    try:
        yield
    finally:
        become(0, 0, 0)

def test_pictures_are_kept_whole_and_decoded_again_only_if_they_or_their_cache_changed(photos, monkeypatch):
    """A central crop of the squeezed picture shows what the same crop of the picture itself would."""
    pixels, sizes = load_photos()
    view = probing.central_views(loader(pixels, sizes), torch.tensor([1]))[0]
    picture = TF.resize(TF.to_image(Image.open("photos/b.png")), [36], T.InterpolationMode.BICUBIC)
    assert (view - TF.center_crop(picture, [32, 32]) / 255).abs().mean() < 0.02
    files = set(photos.iterdir())
    for path in files:
        cut = lambda: path.write_bytes(path.read_bytes()[:99])  # noqa: E731
        for damage in (path.unlink, cut, lambda: np.save(path.open("wb"), [1, 2])):
            damage()
            assert torch.equal(load_photos()[0], pixels)
    os.chmod("photos", 0o555)  # a cache is of use that cannot be written
    with monkeypatch.context() as patch, another_user():
        patch.setattr(train, "open_picture", None)
        assert torch.equal(load_photos()[0], pixels)
    save_picture("photos/b.png", 3, size=(30, 60))
    assert load_photos()[1].tolist() == [[80, 40], [30, 60]]
    assert len(list(photos.iterdir())) == len(files) == len(set(photos.iterdir()) - files)  # no old ones

@pytest.mark.parametrize("trouble", ["no folder", "not writable", "not readable", "a colleague's, umask 077"])
def test_a_cache_that_cannot_be_used_is_put_into_the_runs_own_folder(photos, trouble):
    if trouble == "no folder":
        photos.touch()
    elif trouble == "not writable":
        os.chmod("photos", 0o555)
    else:
        load_photos()
        for path in (*photos.iterdir(), photos):
            os.chmod(path, 0 if path != photos or "077" in trouble else 0o555)
    with another_user():
        assert load_photos()[1].tolist() == [[80, 40], [30, 90]]
    assert len(list(Path("out/cache").iterdir())) == 3

@pytest.mark.parametrize("place, name, fault, says", [
    (os, "posix_fallocate", OSError(28, "No space left"), "No space left.*--cache-side"),
    (train, "open_picture", OSError(5, "Input/output error", "x.png"), "x.png .Input/output error"),
    (Image, "open", MemoryError(), "does not fit into memory"),  # which is no damage to be remembered
])  # fmt: skip
def test_a_build_that_breaks_off_leaves_nothing(photos, monkeypatch, place, name, fault, says):
    with monkeypatch.context() as patch, pytest.raises((ValueError, MemoryError), match=says):
        patch.setattr(place, name, Mock(side_effect=fault), raising=False)
        load_photos()
    assert not list(photos.iterdir()) and load_photos()[1].tolist() == [[80, 40], [30, 90]]

def test_all_bad_files_are_listed_with_their_reasons_or_left_out_on_request(photos, capsys):
    for i in range(6):
        save_picture(f"photos/{i}.jpg", i)
    Path("photos/3.jpg").write_bytes(Path("photos/3.jpg").read_bytes()[:700])
    Path("photos/words.jpg").write_text("not a picture")
    Path("photos/scan.tif").write_bytes(tiff(DEEP.astype(np.int16)))
    Path("photos/lost.png").symlink_to("nowhere.png")
    os.chmod("photos/4.jpg", 0)
    flags = "--dataset folder --data-dir photos --batch-size 6 --max-steps 1 "
    with another_user():
        error = refused(train, *TINY, *flags.split(), "--out", "run")
        for reason in ("3.jpg: [^;]*truncated", "words.jpg: cannot identify", "scan.tif: [^;]*agreed scale",
                       "lost.png: there is no", "4.jpg: Permission denied", "5 of 11", "--skip-bad-"):
            assert re.search(reason, error), reason
        trained(flags + "--skip-bad-images", base=TINY)
    assert re.search(r"left out 5(.*\n)+folder: 6 pictures", capsys.readouterr().out)

def test_two_processes_may_build_the_same_cache_at_once(photos, monkeypatch):
    """The second begins and ends while the first writes: both then hold the same pictures."""
    second = []

    def meanwhile(file, fsync=os.fsync):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            second[:] = load_photos()
        return fsync(file)

    monkeypatch.setattr(os, "fsync", meanwhile)
    assert all(map(torch.equal, load_photos(), second)) and len(list(photos.iterdir())) == 3

def test_names_may_hold_anything():
    names = {"plain.png", "a b.png", "ünï.png", "new\nline.png", "--flag.png", "%s;$(x).png"}
    for i, name in enumerate(names):
        save_picture(f"photos/{name}", i)
    Path("photos/folder.png").mkdir()
    flags = "--dataset folder --data-dir photos --batch-size 6 --max-steps 1"
    assert set(trained(flags, base=TINY)["pictures"].split("\0")) == names
    Path("photos/new\nline.png").write_text("not a picture")
    assert "new" in refused(train, *TINY, *flags.split(), "--out", "other")

# ---- Views -------------------------------------------------------------------------------------------------

def smooth_pictures(count, height, width):
    coarse = torch.rand(count, 3, height // 8 + 1, width // 8 + 1)  # with detail such as photographs have
    fine = F.interpolate(coarse, size=(height, width), mode="bicubic")
    return ((fine + 0.05 * torch.randn(fine.shape)).clamp(0, 1) * 255).byte()

def loader(pixels, sizes=None, batch_size=1, side=32, seed=0, machine=CPU):
    sizes = torch.full((len(pixels), 2), float(pixels.shape[-1])) if sizes is None else sizes
    return train.Loader(pixels, sizes, torch.arange(len(pixels)), batch_size, side, seed, machine)

def batch_of(load, step, views=2, **masks):
    return load.batch(step, load.pick(step), views, **masks)

@pytest.mark.parametrize("out", [32, 144])
def test_crop_and_resize_equals_torchvisions_and_pillows(out):
    pixels, rows = smooth_pictures(5, 96, 96), torch.tensor([3, 0, 2, 4, 1])
    boxes = [(0, 0, 96, 96), (10, 20, 50, 60), (40, 3, 43, 93), (5, 50, 91, 33), (30, 30, 45, 47)]
    ours = train.crop_and_resize(pixels, rows, torch.tensor(boxes), out)
    for row, (left, top, width, height), our in zip(rows, boxes, ours):
        crop = TF.crop(pixels[row], top, left, height, width)
        resize = partial(TF.resize, size=[out, out], interpolation=T.InterpolationMode.BICUBIC)
        pillows = TF.pil_to_tensor(resize(TF.to_pil_image(crop)))
        assert torch.equal(our, resize(crop)) and (our.int() - pillows).abs().max() <= 2  # of 255

@pytest.mark.parametrize("number, theirs, values", [
    (0, TF.adjust_brightness, (0.6, 0.9, 1.0, 1.4)), (1, TF.adjust_contrast, (0.6, 0.9, 1.0, 1.4)),
    (2, TF.adjust_saturation, (0.8, 0.9, 1.0, 1.2)), (3, TF.adjust_hue, (-0.1, -0.03, 0.0, 0.1)),
    (4, lambda image, _: TF.rgb_to_grayscale(image, 3), (0, 0, 0, 0)),
    (5, lambda image, sigma: TF.gaussian_blur(image, [9, 9], [sigma, sigma]), (0.1, 0.7, 1.3, 2.0)),
])  # fmt: skip
def test_each_colour_operation_equals_torchvisions_and_has_a_neutral_factor(number, theirs, values):
    images, operation = smooth_pictures(4, 40, 40) / 255, train.OPERATIONS[number]
    images[0, :, :8] = 0.5  # grey pixels have no hue
    for image, value, our in zip(images, values, operation(images, torch.tensor(values).view(-1, 1, 1, 1))):
        assert (our - theirs(image, value)).abs().max() < 0.5 / 255
    assert torch.allclose(operation(images, train.NEUTRAL[number].expand(4, 1, 1, 1)), images, atol=1e-5)

def test_crops_have_the_distribution_of_random_resized_crop_and_even_of_a_thread_give_numbers():
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
    load = loader(smooth_pictures(3, 320, 320), thin, 3)
    assert batch_of(load, 1)[0][0].shape == probing.central_views(load, load.rows).shape == (3, 3, 32, 32)

def test_colours_are_drawn_as_often_and_as_strong_as_the_paper_says():
    """p 0.6, in random order: jitter (p 0.8; four operations in random order), grey (p 0.1), blur (p 0.3)."""
    factors = train.draw_colours(20000, None)[1]
    active, share = factors != train.NEUTRAL, 0.6 * torch.tensor([0.8, 0.8, 0.8, 0.8, 0.1, 0.3])
    assert torch.allclose(active.float().mean(0), share, atol=0.02) and (active[:, 0] == active[:, 3]).all()
    assert torch.allclose(factors.amin(0), torch.tensor([0.6, 0.6, 0.8, -0.1, 0, 0]), atol=0.01)
    assert torch.allclose(factors.amax(0), torch.tensor([1.4, 1.4, 1.2, 0.1, 1, 2]), atol=0.01)
    assert set(factors[:, 4].tolist()) == {0, 1} and factors[active[:, 5], 5].min() >= 0.1
    orders = ["".join(map(str, itertools.chain(*train.draw_colours(1, None)[0]))) for _ in range(3000)]
    for left_out, count in (("[123]", 6), ("[45]", 24)):  # all orders of the three, and of the four, evenly
        frequency = np.unique([re.sub(left_out, "", order) for order in orders], return_counts=True)[1]
        assert len(frequency) == count and abs(frequency / 3000 * count - 1).max() < 0.35
    assert all(re.search("[0123]{4}", order) for order in orders)  # jitter stays together

def test_colour_operations_are_applied_in_the_order_drawn():
    for _ in range(3):
        images, (order, factors) = smooth_pictures(16, 32, 32) / 255, train.draw_colours(16, None)
        result = train.apply_colours(images.clone(), order, factors)
        for image, own, our in zip(images.split(1), factors, result):
            for number in itertools.chain(*order):
                if own[number] != train.NEUTRAL[number]:
                    image = train.OPERATIONS[number](image, own[number].view(1, 1, 1, 1))
            assert torch.allclose(our, image[0], atol=1e-5)

def test_both_views_share_the_crop_and_half_of_them_are_mirrored_but_each_has_its_own_colours():
    ramp = torch.linspace(0, 127, 64).byte()  # dark on the left
    load = loader(ramp + smooth_pictures(300, 64, 64) // 2, batch_size=300)
    first, second = load.views(*batch_of(load, 1)[0]).chunk(2)
    theirs = TF.normalize(first, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    assert torch.allclose(train.normalise(first), theirs, atol=1e-5)
    flat = torch.stack([first.mean(1).flatten(1), second.mean(1).flatten(1)])
    correlation = F.cosine_similarity(*(flat - flat.mean(2, keepdim=True)), dim=1)
    assert correlation.quantile(0.02) > 0.8 and not torch.equal(first, second)
    mirrored = first[..., :16].mean((1, 2, 3)) > first[..., 16:].mean((1, 2, 3))
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.1)

def test_views_compile_and_are_the_same_views(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # C++ takes long
    pixels, compiled = smooth_pictures(12, 48, 48), SimpleNamespace(**vars(CPU) | {"compile": True})
    plain, fast = (loader(pixels, batch_size=12, machine=machine) for machine in (CPU, compiled))
    for step in (1, 2, 3):
        views, same = (load.views(*batch_of(load, step)[0]) for load in (plain, fast))
        assert torch.allclose(views, same, atol=1e-5)

def test_a_batch_depends_on_seed_and_step_alone_and_an_epoch_takes_every_picture_once():
    pixels = smooth_pictures(20, 32, 32)
    first, same, other = (loader(pixels, batch_size=6, seed=seed) for seed in (1, 1, 2))
    for step in (4, 1, 9):
        draws, again, others = (batch_of(load, step) for load in (first, same, other))
        assert torch.equal(first.views(*draws[0]), same.views(*again[0]))
        assert all(map(torch.equal, draws[1:], again[1:])) and not torch.equal(draws[1], others[1])
    epochs = [torch.cat([batch_of(first, step)[1] for step in steps]) for steps in ((1, 2, 3), (4, 5, 6))]
    assert len(epochs[0].unique()) == len(epochs[1].unique()) == 18 and not torch.equal(*epochs)

def test_pictures_to_pretrain_on_are_chosen_at_random_and_from_the_split_that_was_asked_for():
    labelled_folder("animals")
    command, chosen = ["--dataset", "folder", "--data-dir", "animals", *TINY, "--max-steps", "1"], []
    for out, flags in enumerate(("--pictures 10", "--pictures 10 --seed 1", "", "--pretrain-split train")):
        names = trained(flags, str(out), command)["pictures"].split("\0")
        chosen.append({int(Path(name).stem) for name in names})
    assert len(chosen[0]) == len(chosen[1]) == 10 and chosen[0] != chosen[1]
    assert "holds pictures" in refused(train, *command, "--out", "animals/test/species 1")
    assert max(chosen[0]) > 15 and (chosen[2], chosen[3]) == (set(range(30)), set(range(18)))

# ---- Training ----------------------------------------------------------------------------------------------

def refused(program, *arguments):
    """The line in which a command line is refused."""
    with pytest.raises(InputError) as refusal:
        program.main([str(argument) for argument in arguments])
    assert "\n" not in str(refusal.value)
    return str(refusal.value)

def same_run(first, second):
    """Whether two checkpoints hold the same run, bit for bit (times aside)."""
    kept = []
    for saved in (load_checkpoint(f"{name}/ckpt.pt") for name in (first, second)):
        rows = [[row[name] for name in train.COLUMNS[:7]] for row in saved.pop("history")]
        del saved["seconds"]
        kept.append(tree_leaves((saved, rows)))
    pairs = [torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*kept)]
    return len(kept[0]) == len(kept[1]) and all(pairs)

def at_each_step(monkeypatch, action):
    """After each step of training call action(1), action(2), …"""
    step, number = train.train_step, itertools.count(1)
    monkeypatch.setattr(train, "train_step", lambda *a, **k: (step(*a, **k), action(next(number)))[0])

def test_schedules_at_their_corners_and_a_warm_up_of_40_epochs_or_of_a_short_runs_share():
    T, W = 3000, 400
    flat_end, lr = W + int(0.72 * (T - W)), [train.schedules(step, T, W)[0] for step in range(T + 1)]
    assert lr[1] == pytest.approx(1e-6 + (5e-4 - 1e-6) / W) and lr[W // 2] == pytest.approx((1e-6 + 5e-4) / 2)
    assert lr[W - 1] < lr[W] == lr[flat_end] == 5e-4 > lr[flat_end + 1] and lr[T] == pytest.approx(1e-5)
    assert lr[(flat_end + T) // 2] == pytest.approx((5e-4 + 1e-5) / 2, rel=1e-2)
    for t in (1, T // 2, T):
        assert train.schedules(t, T, W)[1:] == pytest.approx((0.04 + 0.36 * t / T, 0.996 + 0.004 * t / T))
    for epochs in (1, 30, 300, 900):
        first = trained(f"--epochs {epochs} --max-steps 1", str(epochs))["optimizer"]["param_groups"][0]["lr"]
        warmup_steps = 5 * min(epochs * 40 / 300, 40)
        assert first == pytest.approx(min(3e-4, 1e-6 + (3e-4 - 1e-6) / warmup_steps), rel=1e-9)

def test_a_step_of_training_is_the_papers():
    """Three steps of train.py, and the same written out: target, loss, AdamW, schedules, moving average."""
    saved, pictures = trained(NO_DROPOUT + "--max-steps 3"), train.list_pictures("critters", "data", 40)
    pixels, sizes = train.load_pixels(pictures, "critters", "data", "run", saved["recipe"])
    load = loader(pixels, sizes, 8, seed=47)
    torch.manual_seed(47)
    model = MIMJEPA(Config(**saved["config"]))
    learning = [*model.context_encoder.parameters(), *model.predictor.parameters()]
    first, second = ([torch.zeros_like(p) for p in learning] for _ in range(2))
    for t in (1, 2, 3):
        draws, _, visible = batch_of(load, t, masks=(2, 0.5, "block"))
        view1, view2 = load.views(*draws).chunk(2)
        target = layer_norm(model.target_encoder(view2))
        jepa_loss(model.predictor(model.context_encoder(view1, visible)), target, visible).backward()
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

def test_a_run_is_saved_on_the_clock_and_its_speed_is_measured_in_pictures_per_second(monkeypatch):
    """Saved at an epoch's end after a minute, at --keep-every, at the end. Epochs take 35 s, one 98 s."""
    clock, saved, save = SimpleNamespace(now=1000.0), [], train.save
    clock.time = clock.monotonic = clock.perf_counter = lambda: clock.now
    at_each_step(monkeypatch, lambda step: setattr(clock, "now", clock.now + (70 if step == 1 else 7)))
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train, "save", lambda *a, **k: (save(*a, **k), saved.append((clock.now - 1063) / 35)))
    config = trained("--epochs 9 --keep-every 4")["config"]
    assert saved == [1, 3, 4, 6, 8, 9] and load_checkpoint("run/ckpt-0004.pt")["step"] == 20
    rows = np.genfromtxt("run/metrics.csv", delimiter=",", names=True)
    assert rows.dtype.names == train.COLUMNS and np.isfinite(rows.tolist()).all()
    assert rows["epoch"].tolist() == [*range(1, 10)] and np.allclose(rows["step"], 5 * rows["epoch"])
    assert np.allclose(rows["seconds"], 63 + 35 * rows["epoch"]) and np.allclose(rows["images_per_s"], 8 / 7)
    assert np.allclose(rows["tflops"], 8 / 7 * train.training_flops(Config(**config)) / 1e12)

def test_views_png_shows_which_cells_are_hidden():
    """In its middle column these, and only these, have the mean colour."""
    trained("--image-size 64 --max-steps 1")
    assert sorted(os.listdir("run")) == ["ckpt.pt", "curves.png", "metrics.csv", "views.png"]
    views = torch.from_numpy(np.array(Image.open("run/views.png")).astype(int))
    whole, masked = (views[16:, x : x + 64].unflatten(0, (6, 66))[:, :64] for x in (2, 68))
    mean = (masked - torch.tensor([124, 116, 104])).abs().amax(3) < 2
    hidden = F.avg_pool2d(mean[:, None].float(), 16).flatten(1) == 1
    assert (hidden.sum(1) == 8).all() and (whole == masked)[~enlarged(hidden, 64)[:, 0]].all()

@pytest.mark.parametrize("end", ["--max-steps 5", "--max-steps 8", "SIGINT", "SIGTERM", "SIGKILL"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(monkeypatch, end):
    """Asked to stop it saves at once; killed, it goes on from its last save. fp16 scales gradients."""
    number, handlers, flags = getattr(signal, end, 0), [signal.getsignal(n) for n in (2, 15)], DROPOUT + FP16
    command = [*CRITTERS, *flags.split(), "--keep-every", "1", "--out", "run"]
    with ThreadPoolExecutor(1) as other_thread:  # where signals cannot be caught
        other_thread.submit(trained, flags, "whole").result()
    if end == "SIGKILL":
        program = """if True:
            import itertools, os, train
            step, number = train.train_step, itertools.count(1)
            train.train_step = lambda *a: os.kill(os.getpid(), 9) if next(number) == 8 else step(*a)
            train.run(train.main)"""
        assert python("-c", program, *command).returncode == -9
    else:
        at_each_step(monkeypatch, lambda step: number and step == 8 and signal.raise_signal(number))
        assert train.main(command + ([] if number else end.split())) == (128 + number if number else 0)
    assert load_checkpoint("run/ckpt.pt")["step"] == (5 if end in ("--max-steps 5", "SIGKILL") else 8)
    assert not same_run("run", "whole") and [signal.getsignal(n) for n in (2, 15)] == handlers
    trained("--resume --device cpu " + FP16, base=[])
    assert same_run("run", "whole")

def python(*command):
    settings = dict(capture_output=True, text=True, timeout=100, env=os.environ | {"PYTHONPATH": str(HERE)})
    return subprocess.run([sys.executable, *map(str, command)], **settings)

def test_a_run_goes_on_without_its_flags_but_not_as_another_run_nor_with_other_pictures():
    labelled_folder("photos")
    trained("--dataset folder --data-dir photos --max-steps 1", base=TINY)
    resume = "--resume --device cpu --out run --max-steps".split()
    assert train.main([*resume, "2"]) == 0 and load_checkpoint("run/ckpt.pt")["step"] == 2
    before, picture = Path("run/ckpt.pt").read_bytes(), Path("photos/test/species 0/21.png")
    for flags, says in (("", "--resume"), ("--resume --dim 32", "dim"), ("--resume --seed 1", "seed")):
        assert says in refused(train, *flags.split(), "--dataset", "folder", "--out", "run")
    moved = picture.rename(picture.with_name("new.png"))
    assert all(name in refused(train, *resume, "3") for name in ("21.png", "new.png"))
    moved.rename(picture).write_bytes(b"damaged")
    assert "21.png" in refused(train, *resume, "3", "--skip-bad-images")
    assert Path("run/ckpt.pt").read_bytes() == before
    Path("run/ckpt.pt").rename("run/ckpt-0001.pt")  # what was kept is not started over, either
    assert all("0001.pt is" in refused(train, *CRITTERS, *x, "--out", "run") for x in ((), ("--resume",)))

@pytest.mark.parametrize("precision, digits", [("bf16", 8), ("fp16", 11)])
def test_half_precision_trains_like_full_precision(precision, digits):
    """The mean loss of four steps is the same within what numbers of so many binary digits allow."""
    sums = [trained(f"{NO_DROPOUT} --max-steps 4 --precision {p}", p)["sums"] for p in ("fp32", precision)]
    assert 0 < (sums[0] - sums[1]).abs().max() / 4 < 2.0**-digits

def test_a_run_leaves_no_thread_and_no_open_file():
    left = []
    for out in ("first", "second"):
        trained(out=out)
        gc.collect()  # of what other tests have left
        left.append((threading.active_count(), len(os.listdir("/dev/fd"))))
    assert left[0] == left[1]

def test_the_thread_that_makes_batches_computes_on_one_core_and_leaves_the_others_to_training(monkeypatch):
    make, cores, before = train.Loader.batch, [], torch.get_num_threads()
    spy = lambda *a, **k: cores.append(torch.get_num_threads()) or make(*a, **k)  # noqa: E731
    monkeypatch.setattr(train.Loader, "batch", spy)
    torch.set_num_threads(2)
    trained("--max-steps 1")
    with ThreadPoolExecutor(1) as other_thread:
        cores += [torch.get_num_threads(), other_thread.submit(torch.get_num_threads).result()]
    torch.set_num_threads(before)
    assert cores == [1, 2, 2]

def test_a_collapse_is_told_while_training(monkeypatch, capsys):
    tokenize = scott.Tokenizer.forward
    monkeypatch.setattr(scott.Tokenizer, "forward", lambda *a: 0 * tokenize(*a))
    assert trained("--max-steps 5")["history"][0]["target_std"] < 0.01
    assert "warning: target_std is 0.00" in capsys.readouterr().out

@pytest.mark.parametrize("capabilities, asked, dtype", [
    ({}, None, None), ({"avx512_bf16": False}, None, None), ({"avx512_bf16": True}, "fp32", None),
    ({"avx512_bf16": True}, None, torch.bfloat16), ({"amx_bf16": True}, None, torch.bfloat16),
])  # fmt: skip
def test_a_cpu_computes_in_bf16_where_it_has_it_in_hardware(monkeypatch, capabilities, asked, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert train.setup(SimpleNamespace(device="cpu", precision=asked, compile=None)).dtype == dtype

@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_a_cpu_keeps_the_memory_that_a_step_frees():
    train.setup(SimpleNamespace(device="cpu", precision=None, compile=None))
    faults = [(torch.ones(2**24), train.resource.getrusage(0))[1].ru_minflt for _ in range(9)]
    assert np.diff(faults).min() < 1000  # of 16,384 pages

class StandIn(TorchFunctionMode):
    """A device in name only: tensors that are moved to "mps" stay where they are, but neither can numpy read
    them from then on, nor does any operation take them together with tensors that were not moved."""

    moved = WeakTensorKeyDictionary()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.__name__, dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        moved = [self.moved.get(tensor, False) for tensor in tensors]
        if function == torch.Tensor.device.__get__ and moved[0]:
            return torch.device("mps")
        assert not (name in ("numpy", "__array__") and moved[0]), "numpy cannot read what is on a device"
        two_allowed = name in ("to", "copy_", "__getitem__")  # the first one then decides
        there = any(moved[:1] if two_allowed else moved)
        if name == "to" and isinstance((*args, None)[1], (torch.device, str)):
            there, args = str(args[1]) == "mps", (args[0].clone(), "cpu", *args[2:])
        elif name == "cpu":
            there, args = False, (args[0].clone(),)
        elif str(kwargs.get("device")) == "mps" and name != "device":
            there, kwargs["device"] = True, "cpu"
        result = function(*args, **kwargs)
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            alike = not any(moved) or all(m or t.dim() == 0 for m, t in zip(moved, tensors))
            assert alike or two_allowed, f"{name} of tensors on two devices"
            self.moved[tensor] = there
        if name == "__set__":
            self.moved[tensors[0]] = moved[-1]
        return result

def test_all_is_moved_to_the_device_and_fetched_back_before_it_is_drawn_or_written(monkeypatch):
    """Training and resuming there give the CPU's weights, and eval.py can do everything. It needs no GPU."""
    make, device = train.Loader.batch, StandIn()

    def batch(*arguments, **options):
        with device:  # in the loader's thread too
            return make(*arguments, **options)

    monkeypatch.setattr(train.Loader, "batch", batch)
    with device:
        for flags in ("--max-steps 7", "--resume"):
            there = trained(f"{NO_DROPOUT} --device mps {flags}", "mps")["model"]
        probing.main("mps/ckpt.pt --device mps --from-scratch --finetune --epochs 1".split())
        here = trained(NO_DROPOUT)["model"]
    assert all(torch.allclose(value, there[name], atol=1e-6) for name, value in here.items())
    assert {path.stem for path in Path("mps").glob("*.png")} == {"views", "curves", "pca", "leak"}

def test_two_processes_train_what_one_trains_but_drop_out_each_for_itself():
    """Same seed and batch: without dropout the same weights to rounding, also if one process resumes two."""
    Path("spy.py").write_text("""if True:
        import os, torch, train
        step, ones = train.train_step, torch.ones(99)
        def spy(*arguments):
            torch.save(torch.nn.functional.dropout(ones), "dropped" + os.environ["RANK"])
            return step(*arguments)
        train.train_step = spy
        train.run(train.main)""")
    command = [*CRITTERS, *NO_DROPOUT.split(), "--out", "two", "--max-steps", "7"]
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "spy.py", *command)
    assert done.returncode == 0 and done.stdout.count("saved") == 1, done.stderr
    assert not torch.equal(torch.load("dropped0"), torch.load("dropped1"))
    one, two = trained(NO_DROPOUT), trained(NO_DROPOUT + "--resume", "two")
    assert all(torch.allclose(value, two["model"][name], atol=1e-5) for name, value in one["model"].items())
    assert one["history"][0]["loss"] == pytest.approx(two["history"][0]["loss"], rel=1e-5)

def test_the_readmes_lines_turn_pictures_into_features_and_its_commands_are_understood():
    readme = (HERE / "README.md").read_text()
    labelled_folder("photos")
    trained("--dataset folder --data-dir photos/train --max-steps 1", "runs/folder", TINY)
    names = {"paths": sorted(Path("photos").rglob("*.png"))}
    blocks = re.findall(r"```py\n(.*?)```", readme, re.DOTALL)
    exec("\n".join(sorted(blocks, key=lambda block: "encoder(images)" in block)), names)
    assert names["features"].shape == (30, 16) and names["features"].isfinite().all()
    probe = "runs/folder/ckpt.pt --no-baseline --no-pca --encoder target --epochs 1 --device cpu".split()
    assert "train/<class>" in refused(probing, *probe)  # no labels here, but
    assert probing.main([*probe, "--data-dir", "photos"]) == 0 and not Path("runs/folder/pca.png").exists()
    for name, value in [*re.findall(r'^(\w+)="(.*)"$', readme, re.MULTILINE), ("seed", "1")]:
        readme = readme.replace("\\\n", " ").replace(f"${name}", value)  # as a shell would
    commands = re.findall(r"python (train|eval)\.py([^#\n&`;|]*)", readme)
    for program, arguments in commands:
        if not re.search("…|--help", arguments):
            {"train": train, "eval": probing}[program].read_arguments(shlex.split(arguments))
    assert len(commands) > 5

# ---- Evaluation --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, count", [("simple", 14_630), ("multi-head", 313_001), ("cross", 1_786_405)])
def test_a_probe_has_the_papers_layers_and_learns_which_tokens_matter(name, count):
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

def data_of(brightness, labels, training):
    """Plain pictures of some brightness, as probes take them."""
    pixels = torch.tensor(brightness, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 32, 32)
    pictures = train.Pictures([None] * len(labels), labels, ["dark", "light"], training)
    return probing.split_data(pictures, pixels, torch.full((len(labels), 2), 32.0), 32, 0, CPU)

def test_accuracies_by_hand_and_neighbours_that_vote_by_similarity():
    scores = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6]] * 2 + [[0, 9, 0, 0, 0, 0, 0], [5, 4, 9, 0, 0, 0, 0]])
    assert probing.accuracies(scores, torch.tensor([0, 0, 1, 1])) == [75, 100, 75]
    assert probing.accuracies(scores[:3], torch.tensor([0, 1, 1])) == pytest.approx([200 / 3, 200 / 3, 75])
    points = F.normalize(torch.tensor([[1.0, 0.0], [1, 0.5], [1, 0.6], [-1, 0]]), dim=1)
    [scores] = probing.knn(points, torch.tensor([0, 1, 1, 2]), torch.tensor([[2.0, 0.0]]), classes=3, k=3)
    votes = [math.exp(1 / 0.07), sum(math.exp(1 / math.hypot(1, x) / 0.07) for x in (0.5, 0.6)), 0]
    assert scores.tolist() == pytest.approx(votes, rel=1e-3)
    # A dark picture of class 1 has ten dark neighbours, all of class 0: its class is not even in the top 5.
    data, config = data_of([50] * 10 + [200, 50], [0] * 10 + [1, 1], 11), replace(STILL, image_size=32)
    assert probing.evaluate(probing.Features(Encoder(config), CPU), data, config, 0, 0)["k-NN"] == [0, 0, 0]

def test_the_linear_probe_is_the_optimum_of_standardised_logistic_regression_with_weight_decay():
    """There the gradient is zero: Xᵀ(P − Y)/n + decay · W = 0, and for the bias the mean of P − Y."""
    labels, scale = torch.arange(90) % 3, torch.logspace(-2, 2, 5)
    points = (torch.randn(90, 5) + 2 * torch.eye(5)[labels]) * scale + 3 * scale
    scores = probing.linear(points, labels, points, classes=3)
    x = (points - points.mean(0)) / points.std(0)
    weight = torch.linalg.lstsq(torch.cat([x, torch.ones(90, 1)], 1), scores).solution[:5]
    error = scores.softmax(1) - F.one_hot(labels)
    assert torch.allclose(x.T @ error / 90, -1e-3 * weight, atol=1e-4) and weight.abs().max() > 1
    assert error.mean(0).abs().max() < 1e-4 and (scores.argmax(1) == labels).float().mean() > 0.8

def test_probing_reads_normalised_tokens_leaves_the_encoder_alone_and_sees_no_test_label(monkeypatch):
    """With other test labels the figures change, but not one bit of what was learned or drawn."""
    heads, states, results, train_probes = [], [], [], probing.train_probes
    monkeypatch.setattr(probing, "train_probes", lambda *a: heads.append(train_probes(*a)) or heads[-1])
    pictures, config = train.list_pictures("critters", "data", 40), replace(STILL, image_size=32)
    pixels, sizes = train.load_pixels(pictures, "critters", "data", "out", {"image_size": 32})
    encoder, images = Encoder(replace(config, dropout=0.5)), torch.randn(2, 3, 32, 32)
    normalised = layer_norm(encoder.eval()(images))
    features = probing.Features(encoder.train(), CPU)  # which drops nothing out
    for shift in (0, 1):
        pictures.labels[30:] = [(label + shift) % len(pictures.classes) for label in pictures.labels[30:]]
        data = probing.split_data(pictures, pixels, sizes, 32, 47, CPU)
        results.append(probing.evaluate(features, data, config, 2, 47))
        states.append(torch.get_rng_state())
        assert torch.equal(features(images), normalised)
    assert results[0] != results[1] and torch.equal(*states)
    assert all(map(torch.equal, heads[0].parameters(), heads[1].parameters())) and not heads[0].training
    few = probing.split_data(pictures, pixels, sizes, 32, 47, CPU, per_class=2)
    assert set(few.labels[few.train].bincount().tolist()) == {2} and few.train.max() < 30
    others = probing.split_data(pictures, pixels, sizes, 32, 48, CPU, per_class=2)
    assert few.train.tolist() != others.train.tolist()  # chosen at random
    assert few.test.tolist() == data.test.tolist() == list(range(30, 40))

def test_supervised_training_moves_the_encoder_and_learns_after_a_warm_up(monkeypatch):
    """Two classes of brightness are told apart. Warm-up: a fifth of a probe's steps, 40/300 of these."""
    rates, step = [], torch.optim.AdamW.step
    spy = lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))  # noqa: E731
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    data = data_of([80, 180] * 30 + [180, 80] * 10, [0, 1] * 30 + [1, 0] * 10, 60)  # 20 to test on
    config = replace(STILL, image_size=32, depth=1)
    encoder = Encoder(config).requires_grad_(False)  # as load_encoder gives it
    weight = encoder.blocks[0].mlp.w3.weight.clone()
    figures = probing.supervise(encoder, data, config, 30, {"seed": 0, "lr": 3e-3}, CPU)
    assert figures["simple"][0] == 100 and not torch.equal(weight, encoder.blocks[0].mlp.w3.weight)
    assert rates.index(3e-3) + 1 == 4 and max(rates) == 3e-3 and len(rates) == 30
    rates.clear()
    probing.train_probes(probing.Features(encoder, CPU), data, config, 10, 0)
    assert rates.index(5e-4) + 1 == 2 and max(rates) == 5e-4 and len(rates) == 10

def test_the_encoders_that_are_compared_are_the_trained_one_and_that_of_step_0(monkeypatch):
    """From scratch begins where train.py began, fine-tuned at the checkpoint, which stays as it is."""
    saved, seen, before = trained("--max-steps 5"), [], Path("run/ckpt.pt").read_bytes()
    fake = lambda epochs: {"linear": (epochs, 2, 3)}  # noqa: E731
    monkeypatch.setattr(probing, "evaluate", lambda f, d, c, n, *_: seen.append(f.encoder) or fake(n))
    monkeypatch.setattr(probing, "supervise", lambda e, d, c, n, *_: seen.append(e) or fake(n))
    torch.manual_seed(47)
    fresh = MIMJEPA(Config(**saved["config"])).context_encoder.state_dict()
    for which in ("context", "target"):
        probing.main(f"run/ckpt.pt --encoder {which} --no-pca --from-scratch --finetune --device cpu".split())
        seen.append(public := load_encoder("run/ckpt.pt", which))
        assert not public.training and not any(p.requires_grad for p in public.parameters())
        for encoder, learned in zip(seen, (True, False, False, True, True), strict=True):
            for name, value in encoder.state_dict().items():
                expected = saved["model"][f"{which}_encoder.{name}"] if learned else fresh[name]
                assert torch.equal(value, expected)
        seen.clear()
    rows, recipe = json.load(open("run/eval.json"))["results"], saved["recipe"]
    epochs = {"trained": recipe["probe_epochs"], "untrained": recipe["probe_epochs"],
              "from scratch": recipe["epochs"], "fine-tuned": recipe["epochs"]}  # fmt: skip
    assert list(rows.items()) == [(name, {"linear": [number, 2, 3]}) for name, number in epochs.items()]
    assert Path("run/ckpt.pt").read_bytes() == before
    with pytest.raises(ValueError, match="which is 'teacher'"):
        load_encoder("run/ckpt.pt", "teacher")
    saved["model"]["context_encoder.mask_token"][0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        load_encoder(saved)

def test_all_probes_are_shown_and_several_runs_summed_up_at_their_last_checkpoint(capsys, monkeypatch):
    drawn, draw = {}, probing.draw_curves
    monkeypatch.setattr(probing, "draw_curves", lambda p, *a: drawn.update({p.parent.name: draw(p, *a) or a}))
    for seed in "12":
        trained(f"--seed {seed} --keep-every 1", seed)
    files = [f"{run}/ckpt{tag}" for run in "12" for tag in ("", "-0001", "-0003")]
    capsys.readouterr()
    again = os.path.abspath("1/ckpt.pt")  # counts once
    probing.main([*(f"{file}.pt" for file in files), again, "--epochs", "1", "--device", "cpu"])
    single, table = capsys.readouterr().out.split("mean ± standard deviation of 2 runs")
    reports = {file: json.load(open(f"{file.replace('ckpt', 'eval')}.json"))["results"] for file in files}
    for name in ("trained", "untrained"):
        assert list(reports["1/ckpt"][name]) == ["k-NN", "linear", "simple", "multi-head", "cross"]
        for probe, row in reports["1/ckpt"][name].items():
            assert f"{probe:12}{name:14}{row[0]:11.1f}{row[1]:11.1f}{row[2]:11.1f}" in single
            both = np.array([row[0], reports["2/ckpt"][name][probe][0]])
            assert f"{probe:12}{name:14}{f'{both.mean():.1f} ± {both.std(ddof=1):.1f}':>15}" in table
    (steps, curves), early = drawn["1"], reports["1/ckpt-0001"]
    course = [r["linear"][0] for r in (early["untrained"], early["trained"], reports["1/ckpt"]["trained"])]
    assert len(drawn) == 2 and list(steps) == [0, 5, 15] and curves["linear, top-1 in %"] == course
    assert {path.name for path in Path("1").glob("*.png")} >= {"probes.png", "pca.png", "leak-0001.png"}

def test_pca_png_leaves_the_background_black_and_leak_png_shows_a_hole_that_stays_and_one_that_fills():
    """The sign of a component is arbitrary. Whatever it is, the border of a picture counts as background."""
    there = torch.zeros(1, 36, dtype=torch.bool)
    there[:, [14, 15, 20, 21]] = True
    pixels = enlarged(there, 96)[0, 0]
    for _ in range(8):
        tokens = (there.view(36, 1) * 1.0 - 0.5) * torch.randn(8) + 0.01 * torch.randn(3, 36, 8)
        _, colours, without = probing.pca_columns(lambda _: tokens, torch.rand(3, 3, 96, 96)).values()
        assert 0 <= colours.min() < colours.max() <= 1 and (without[..., ~pixels] == 0).all()
        assert torch.equal(without[..., pixels], colours[..., pixels]) and without[..., pixels].max() > 0.9
    _, seen, *layers = probing.leak_columns(Tokenizer(SMALL), torch.rand(1, 3, 96, 96), there).values()
    assert len(layers) == 4 and seen[..., ~pixels].max() == 0
    assert all(masked[:, ~pixels].max() == 0 < dense[:, ~pixels].max() for masked, dense in layers)

# ---- What goes wrong ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("part, shapes", [
    *((Encoder(SMALL), [shape]) for shape in ((2, 3, 96, 64), (2, 1, 96, 96), (3, 96, 96), (2, 3, 16, 16))),
    *((Encoder(SMALL), [(2, 3, 96, 96), shape]) for shape in ((2, 35), (1, 36), (2, 36))),  # no mask is float
    (Predictor(SMALL), [(2, 35, 32)]), (jepa_loss, [(2, 36, 8), (2, 36, 4), (2, 36)]),
])  # fmt: skip
def test_tensors_of_wrong_shapes_or_types_are_refused(part, shapes):
    with pytest.raises(ValueError, match="must be"):
        part(*(torch.randn(shape) for shape in shapes))

@pytest.mark.parametrize("arguments, says", [
    ("--dataset cats", "--dataset"), ("--dataset folder --data-dir nowhere", "nowhere"), ("--what", "--what"),
    ("--epochs 0", "epochs"), ("--epochs many", "--epochs"), ("--lr -1", "lr"), ("--lr nan", "lr"),
    ("--image-size 100", "image_size is"), ("--image-size 16", "image_size is"), ("--dim 30", "dim is"),
    ("--heads 5", "dim is"), ("--depth 0", "depth is"), ("--predictor-depth -1", "predictor_depth is"),
    ("--tokenizer conv", "tokenizer is"), ("--masking bloc", "masking is"), ("--mask-ratio 0", "mask_ratio"),
    ("--mask-ratio 1", "mask_ratio is"), ("--mask-ratio nan", "mask_ratio is"), ("--dropout 1", "dropout is"),
    ("--attention-dropout 2", "attention_dropout"), ("--drop-path -1", "drop_path"), ("--seed -1", "seed"),
    ("--batch-size 1", "batch_size"), ("--batch-size 50000", "--batch-size"), ("--device tpu9", "tpu9"),
    ("--pretrain-split test", "pretrain_split"), ("--pictures 9", "pictures"), ("--max-steps 0", "max_steps"),
    ("--out /dev/null/run", "/dev/null/run"), ("--out /proc/x/y", "/proc/x/y"), (".", "cannot read ."),
    ("none.pt", "cannot read none.pt"), ("none.pt --epochs -1", "epochs"), ("none.pt --labels -1", "labels"),
])  # fmt: skip
def test_wrong_arguments_are_refused_in_one_line_before_anything_is_written(arguments, says):
    program = train if arguments.startswith("--") else probing
    assert says in refused(program, *arguments.split()) and not list(Path(".").iterdir())

@pytest.mark.parametrize("outcome, status, line", [
    ([143], 143, ""), (KeyboardInterrupt(), 130, ""), (RuntimeError("a bug"), None, ""),
    (InputError("a\nline ±"), 2, r"error: a\\nline \\xb1"), (OSError(5, "Bad", "x"), 2, "error: x: Bad"),
    (MemoryError(), 2, "error: .*--batch-size"), (torch.OutOfMemoryError("CUDA"), 2, "error: .*--batch-size"),
])  # fmt: skip
def test_a_program_ends_in_one_line_and_a_status_and_a_bug_in_a_traceback(monkeypatch, outcome, status, line):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(RuntimeError if status is None else SystemExit) as end:
        train.run(Mock(side_effect=outcome))
    text = terminal.buffer.getvalue().decode("ascii")
    assert re.match(line, text) and text.count("\n") == bool(line)
    assert getattr(end.value, "code", None) == status

def test_the_program_as_a_program_with_stderr_closed_and_letters_that_the_terminal_lacks():
    command = [sys.executable, HERE / "train.py", *CRITTERS, "--max-steps", "1", "--out", "rün"]
    command, environment = f"{shlex.join(map(str, command))} 2>&-", os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=100, env=environment)
    assert done.returncode == 0 and done.stdout.endswith(b"python eval.py r\\xfcn/ckpt.pt\n"), done
    assert load_checkpoint("rün/ckpt.pt")["step"] == 1

@pytest.mark.parametrize("locks", [True, False])
def test_two_runs_in_one_folder_do_not_lose_each_others_work_unnoticed(monkeypatch, locks):
    """A second run is refused. Without locks the first one says so, and saves beside the second's files."""
    command, second = [*CRITTERS, "--out", "run"], []

    def files():
        return {path: path.read_bytes() for path in Path("run").glob("[cm]*") if "-of-" not in path.name}

    def start(step):
        if step == 3:
            second.extend((python(HERE / "train.py", *command, "--seed", "1"), files()))

    at_each_step(monkeypatch, start)
    if locks:
        assert train.main(command) == 0
        assert second[0].returncode == 2 and "run/ckpt.pt" in second[0].stderr
    else:
        monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(37, "No locks available")))
        said = refused(train, *command)
        assert second[0].returncode == 0 and files() == second[1] and "run/ckpt.pt" in said
        assert load_checkpoint(said.split()[-1])["step"] == 15

def test_a_checkpoint_that_is_touched_or_moved_away_while_its_run_goes_on_is_not_another_runs(monkeypatch):
    actions = {7: lambda: os.chmod("run/ckpt.pt", 0o600), 12: lambda: os.rename("run/ckpt.pt", "mine.pt")}
    at_each_step(monkeypatch, lambda step: actions.get(step, int)())
    assert trained("--keep-every 1")["step"] == 15 and load_checkpoint("mine.pt")["step"] == 10

@pytest.mark.parametrize("place, name, fault, says", [
    (scott, "jepa_loss", lambda prediction, *_: prediction.sum() * math.inf, "not finite by step 10.*--lr"),
    (os, "fsync", Mock(side_effect=OSError(28, "No space left")), "cannot write .*No space left.*--resume"),
])  # fmt: skip
def test_trouble_in_a_run_is_one_line_and_leaves_what_was_saved_alone(monkeypatch, place, name, fault, says):
    trained("--max-steps 5")
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    monkeypatch.setattr(place, name, fault)
    assert re.search(says, refused(train, *CRITTERS, "--resume", "--out", "run"))
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before

@pytest.mark.parametrize("damage, says", [
    (lambda c: "a weight's bit", "run/ckpt.pt is damaged"), (lambda c: "cut", "run/ckpt.pt is damaged"),
    (lambda c: c.update(format=Path("x")), "run/ckpt.pt is damaged"),  # to unpickle an object can run code
    (lambda c: c.update(format="scott-mim-jepa 0"), "this version"), (lambda c: c.update(model={}), "_token"),
    (lambda c: c["recipe"].update(epochs="3"), "no recipe"), (lambda c: c["recipe"].update(lr=-1.0), "lr is"),
    (lambda c: c.update(optimizer={}), "to go on"), (lambda c: c.update(step="many"), "this version"),
])  # fmt: skip
def test_a_checkpoint_that_is_damaged_or_does_not_fit_is_refused(damage, says):
    checkpoint, file = trained("--max-steps 5"), Path("run/ckpt.pt")
    change = damage(checkpoint)
    torch.save(checkpoint, file)
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-99])
    elif change:
        weight = checkpoint["model"]["predictor.head.weight"].numpy().tobytes()
        file.write_bytes(file.read_bytes().replace(weight, bytes([weight[0] ^ 1]) + weight[1:]))
    assert says == "to go on" or says in refused(probing, file, "--device", "cpu")
    assert says in refused(train, *CRITTERS, "--resume", "--out", "run")
