"""Proofs of the method, one property a test.     pytest -q test_scott.py

They need no download, no GPU and no files from elsewhere, and take about a minute on two CPU cores.
"""

import csv
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as TF

import eval as probing
import scott
import train
from scott import (
    MIMJEPA, Config, Encoder, MaskedConv2d, MaskedMaxBlurPool, Predictor, SwiGLU, Tokenizer, count_visible,
    jepa_loss, layer_norm, load_checkpoint, load_encoder, position_embedding, sample_masks,
)  # fmt: skip

SMALL = Config(image_size=96, dim=32, depth=2, heads=2, predictor_depth=2)


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blown_up(visible, side):
    """A mask [B, N] in pixels: bool [B, 1, side, side]."""
    grid = math.isqrt(visible.shape[1])
    return (
        visible.view(-1, 1, grid, grid).repeat_interleave(side // grid, 2).repeat_interleave(side // grid, 3)
    )


# ------------------------------------------------------------------------------------------------------------
# The tokenizer sees nothing hidden
# ------------------------------------------------------------------------------------------------------------


def leak(tokenizer, images, visible):
    """How much the visible tokens move when all hidden pixels are replaced by something else."""
    hidden = ~blown_up(visible, images.shape[-1])
    other = torch.where(hidden, 5 * torch.randn_like(images), images)
    return (tokenizer(images, visible) - tokenizer(other, visible))[visible].abs().max().item()


@pytest.mark.parametrize("image_size", [32, 48, 96, 224])
@pytest.mark.parametrize("masking", ["block", "random"])
def test_hidden_pixels_do_not_move_visible_tokens_by_one_bit(image_size, masking):
    tokenizer = Tokenizer(replace(SMALL, image_size=image_size))
    images, visible = (
        torch.randn(4, 3, image_size, image_size),
        sample_masks(4, image_size // 16, 0.6, masking),
    )
    assert leak(tokenizer, images, visible) == 0


def test_each_single_hidden_pixel_moves_no_visible_token():
    tokenizer, image = Tokenizer(replace(SMALL, image_size=32)), torch.randn(1, 3, 32, 32)
    visible = torch.tensor([[True, False, False, True]])
    rows, columns = (~blown_up(visible, 32))[0, 0].nonzero().T
    changed = image.repeat(len(rows), 1, 1, 1)
    changed[torch.arange(len(rows)), :, rows, columns] += 100
    tokens = tokenizer(changed, visible.expand(len(rows), 4))
    # all of one batch against its first: which hidden pixel was changed makes no difference to visible tokens
    assert (tokens[:, visible[0]] == tokens[:1, visible[0]]).all()
    assert len(rows) == 512


def test_no_gradient_reaches_a_hidden_pixel():
    images = torch.randn(2, 3, 96, 96, requires_grad=True)
    visible = sample_masks(2, 6)
    Encoder(SMALL)(images, visible).square().sum().backward()
    pixels = blown_up(visible, 96).expand(2, 3, 96, 96)
    assert (images.grad[~pixels] == 0).all() and (images.grad[pixels] != 0).float().mean() > 0.9


def test_a_nan_under_the_mask_stays_there():
    images, visible = torch.randn(2, 3, 96, 96), sample_masks(2, 6)
    encoder = Encoder(SMALL).eval()
    tokens = encoder(images, visible)
    images[~blown_up(visible, 96).expand_as(images)] = float("nan")
    assert torch.equal(encoder(images, visible), tokens)


def test_a_single_visible_token_gives_no_nan():
    visible = torch.zeros(1, 36, dtype=torch.bool)
    visible[0, 14] = True
    assert Tokenizer(SMALL)(torch.randn(1, 3, 96, 96), visible).isfinite().all()


def test_the_leak_is_found_when_the_masking_of_the_image_is_removed(monkeypatch):
    monkeypatch.setattr(scott, "hide", lambda x, visible: x)
    assert leak(Tokenizer(SMALL), torch.randn(4, 3, 96, 96), sample_masks(4, 6)) > 0.01


def residue(tokenizer, images, visible):
    """The largest value found under the mask, after each convolution and after each pool."""
    found = []

    def look(module, inputs, output):
        found.append(output.masked_fill(blown_up(visible, output.shape[-1]), 0).abs().max().item())

    hooks = [
        m.register_forward_hook(look)
        for m in (tokenizer.conv1, tokenizer.pool1, tokenizer.conv2, tokenizer.pool2)
    ]
    tokenizer(images, visible)
    for hook in hooks:
        hook.remove()
    return found


def test_every_convolution_and_every_pool_is_masked_again():
    assert residue(Tokenizer(SMALL), torch.randn(4, 3, 96, 96), sample_masks(4, 6)) == [0, 0, 0, 0]


def test_without_re_masking_the_hole_fills_up_though_hidden_pixels_stay_out():
    """tokenizer="dense", what re-masking is measured against: the same layers, on the visible part alone."""
    dense, ours = Tokenizer(replace(SMALL, tokenizer="dense")), Tokenizer(SMALL)
    ours.load_state_dict(dense.state_dict())
    images, visible = torch.randn(4, 3, 96, 96), sample_masks(4, 6)
    assert torch.equal(dense(images), ours(images)) and leak(dense, images, visible) == 0
    assert min(residue(dense, images, visible)) > 0.01
    assert (dense(images, visible) - ours(images, visible))[visible].abs().max() > 0.01  # and is read back


@pytest.mark.parametrize("kind, broken", [(MaskedConv2d, (0, 2)), (MaskedMaxBlurPool, (1, 3))])
def test_a_removed_re_mask_is_found(monkeypatch, kind, broken):
    masked = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, visible=None: masked(self, x))
    found = residue(Tokenizer(SMALL), torch.randn(4, 3, 96, 96), sample_masks(4, 6))
    assert all((found[i] > 0.01) == (i in broken) for i in range(4))


def literal_tokenizer(tokenizer, images, visible):
    """Section by section what the tokenizer should do, with multiplications by a mask and plain loops."""

    def times_mask(x):
        return x * blown_up(visible, x.shape[-1])

    x = times_mask(images)
    for conv in (tokenizer.conv1, tokenizer.conv2):
        x = times_mask(F.conv2d(x, conv.weight, stride=2, padding=3)).relu()
        x = torch.stack([x[..., :-1, :-1], x[..., 1:, :-1], x[..., :-1, 1:], x[..., 1:, 1:]]).amax(0)
        padded = F.pad(x, (1, 1, 1, 1))
        out = x.shape[-1] // 2 + 1
        blurred = torch.zeros(*x.shape[:2], out, out, dtype=x.dtype)
        for i, a in enumerate((1, 2, 1)):
            for j, b in enumerate((1, 2, 1)):
                blurred += a * b / 16 * padded[..., i : i + 2 * out - 1 : 2, j : j + 2 * out - 1 : 2]
        x = times_mask(blurred)
    return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("image_size", [32, 96, 224])
def test_the_tokenizer_is_the_papers_layer_by_layer(image_size):
    tokenizer = Tokenizer(replace(SMALL, image_size=image_size)).double()
    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    for visible in (
        sample_masks(2, image_size // 16),
        torch.ones(2, (image_size // 16) ** 2, dtype=torch.bool),
    ):
        assert torch.allclose(
            tokenizer(images, visible), literal_tokenizer(tokenizer, images, visible), atol=1e-12
        )


def test_with_everything_visible_the_masked_tokenizer_is_the_dense_one():
    tokenizer, images = Tokenizer(SMALL), torch.randn(2, 3, 96, 96)
    assert torch.equal(tokenizer(images, torch.ones(2, 36, dtype=torch.bool)), tokenizer(images))


def test_the_patch_tokenizer_cuts_separate_patches_row_by_row():
    tokenizer, images = Tokenizer(replace(SMALL, tokenizer="patch")), torch.randn(1, 3, 96, 96)
    token = F.linear(
        images[0, :, 16:32, 32:48].flatten(), tokenizer.conv.weight.flatten(1), tokenizer.conv.bias
    )
    assert torch.allclose(tokenizer(images)[0, 1 * 6 + 2], token, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Masks
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masking", ["block", "random"])
def test_every_mask_has_the_same_number_of_visible_tokens_on_any_grid_at_any_ratio(masking):
    for grid in (2, 3, 4, 5, 7, 14, 28):
        for ratio in (0.001, 0.1, 0.3, 0.5, 0.6, 0.75, 0.9, 0.999):
            masks = sample_masks(4, grid, ratio, masking)
            assert masks.shape == (4, grid**2) and masks.dtype == torch.bool
            assert (masks.sum(1) == count_visible(grid**2, ratio)).all()


def test_visible_counts_are_the_papers_and_free_of_rounding():
    assert count_visible(196, 0.6) == 79
    # 100 · 0.3 is 30; in floating point (1 − 0.7) · 100 is a little more
    assert [count_visible(100, ratio / 100) for ratio in range(1, 100)] == list(range(99, 0, -1))


@pytest.mark.parametrize("masking", ["block", "random"])
def test_masks_come_from_the_generator_alone(masking):
    first, second, other = (sample_masks(8, 14, 0.6, masking, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 8


def test_block_masks_have_the_papers_shape():
    """Border between visible and hidden 41 ± 8 cell sides, centre 4×4 visible 73 % of the time."""
    masks = sample_masks(2000, 14, generator=generator()).view(-1, 14, 14)
    border = (
        (masks[:, 1:] != masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] != masks[:, :, :-1]).sum((1, 2))
    ).float()
    assert abs(border.mean() - 41) < 1 and abs(border.std() - 8) < 1
    assert abs(masks[:, 5:9, 5:9].float().mean() - 0.73) < 0.02


# ------------------------------------------------------------------------------------------------------------
# Transformer
# ------------------------------------------------------------------------------------------------------------


def trainable(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_parameter_counts_are_the_papers():
    model = MIMJEPA(Config())
    assert trainable(model.context_encoder.tokenizer) == 1_213_632
    assert trainable(model.context_encoder) == 22_447_680
    assert trainable(model.predictor) == 5_457_024
    assert trainable(model.target_encoder) == 0


def test_position_embedding_entry_by_entry():
    table = position_embedding(5, 16)
    for row in range(5):
        for column in range(5):
            omega = [10000 ** (-k / 4) for k in range(4)]
            expected = [f(p * w) for p in (row, column) for f in (math.sin, math.cos) for w in omega]
            assert torch.allclose(table[row * 5 + column], torch.tensor(expected), atol=1e-6)


def plain_block(block, x, heads):
    """A block written out: softmax, LayerNorm and SwiGLU by their formulas."""

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()

    B, N, D = x.shape
    q, k, v = (norm(x) @ block.attention.qkv.weight.T).split(D, dim=-1)
    outputs = []
    for q, k, v in zip(q.split(D // heads, -1), k.split(D // heads, -1), v.split(D // heads, -1)):
        outputs.append((q @ k.transpose(1, 2) / math.sqrt(D // heads)).softmax(-1) @ v)
    x = norm(x + torch.cat(outputs, -1) @ block.attention.proj.weight.T)
    a, b = (x @ block.mlp.w12.weight.T).chunk(2, -1)
    return x + (a * a.sigmoid() * b) @ block.mlp.w3.weight.T


def test_encoder_and_predictor_are_the_papers_formula():
    model = MIMJEPA(SMALL).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # leave the start, where much is near zero
    images, visible = torch.randn(2, 3, 96, 96, dtype=torch.float64), sample_masks(2, 6)
    encoder, predictor = model.context_encoder, model.predictor
    positions = position_embedding(6, 32).double()

    x = literal_tokenizer(encoder.tokenizer, images, visible)
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


def test_swiglu_width_is_a_multiple_of_128():
    assert [SwiGLU(dim).w3.in_features for dim in (16, 128, 192, 384, 768)] == [128, 384, 512, 1024, 2048]


def test_the_first_weights_shrink_with_depth():
    model = MIMJEPA(Config(depth=4, predictor_depth=2))
    for i, block in enumerate(model.context_encoder.blocks, start=1):
        for weight in (block.attention.proj.weight, block.mlp.w3.weight):
            assert abs(weight.std().item() * math.sqrt(2 * i) / 0.02 - 1) < 0.02
        assert abs(block.attention.qkv.weight.std().item() / 0.02 - 1) < 0.02
    for i, block in enumerate(model.predictor.blocks, start=1):
        for weight in (block.attention.proj.weight, block.mlp.w3.weight):
            assert abs(weight.std().item() * math.sqrt(2 * i) * math.sqrt(2 * (4 + i)) / 0.02 - 1) < 0.02
    assert model.context_encoder.mask_token.abs().max() < 1e-5
    conv1 = model.context_encoder.tokenizer.conv1.weight
    assert abs(conv1.std().item() / math.sqrt(2 / (3 * 49)) - 1) < 0.05  # Kaiming, fan-in


def test_drop_path_rises_in_a_line_and_keeps_the_mean():
    encoder = Encoder(Config(image_size=32, dim=16, depth=5, heads=2, drop_path=0.2))
    assert [block.drop_path.rate for block in encoder.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    drop = encoder.blocks[-1].drop_path.train()
    x = drop(torch.ones(20000, 1, 1))
    assert set(x.unique().tolist()) == {0.0, 1.25} and abs(x.mean() - 1) < 0.02
    assert torch.equal(drop.eval()(torch.ones(9, 1, 1)), torch.ones(9, 1, 1))


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "drop_path"])
def test_each_kind_of_dropout_acts_in_training_only(name):
    config = replace(SMALL, **{"dropout": 0.0, "attention_dropout": 0.0, "drop_path": 0.0, name: 0.5})
    encoder, images = Encoder(config), torch.randn(4, 3, 96, 96)
    assert not torch.equal(encoder.train()(images), encoder(images))
    assert torch.equal(encoder.eval()(images), encoder(images))


@pytest.mark.parametrize("image_size", [32, 64, 112, 192])
def test_an_encoder_runs_at_any_image_size(image_size):
    encoder, images = Encoder(SMALL).eval(), torch.randn(1, 3, image_size, image_size)
    trained_there = Encoder(replace(SMALL, image_size=image_size)).eval()
    trained_there.load_state_dict(encoder.state_dict())
    assert torch.equal(encoder(images), trained_there(images))


# ------------------------------------------------------------------------------------------------------------
# Objective
# ------------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand():
    """|e| < 1 costs e²/2, more costs |e| − 1/2; D, then hidden tokens, then images are averaged."""
    target = torch.zeros(2, 4, 2)
    prediction = torch.tensor([[[9.0, 9], [1, 0], [3, 0], [0, 0]], [[0.5, 0.5], [7, 7], [7, 7], [7, 7]]])
    visible = torch.tensor([[True, False, False, False], [False, True, True, True]])
    first = ((0.5 + 0) / 2 + (2.5 + 0) / 2 + 0) / 3
    second = 0.125
    assert jepa_loss(prediction, target, visible).item() == pytest.approx((first + second) / 2)


def test_the_loss_depends_on_hidden_tokens_only():
    prediction = torch.randn(2, 36, 8, requires_grad=True)
    visible = sample_masks(2, 6)
    jepa_loss(prediction, torch.randn(2, 36, 8), visible).backward()
    assert (prediction.grad[visible] == 0).all() and (prediction.grad[~visible] != 0).all()


def batch(config=SMALL, count=4):
    shape = (count, 3, config.image_size, config.image_size)
    return torch.randn(shape), torch.randn(shape), sample_masks(count, config.grid)


def test_the_model_ties_its_parts_as_the_paper_does():
    model = MIMJEPA(SMALL).eval()
    context_images, target_images, visible = batch()
    target = layer_norm(model.target_encoder(target_images))
    prediction = model.predictor(model.context_encoder(context_images, visible))
    loss, seen = model(context_images, target_images, visible, return_target=True)
    assert torch.equal(loss, jepa_loss(prediction, target, visible)) and torch.equal(seen, target)
    assert torch.equal(loss, model(context_images, target_images, visible))


def test_the_target_gets_no_gradient_and_no_dropout_and_starts_as_a_copy():
    model = MIMJEPA(SMALL).train()
    context, target = model.context_encoder.state_dict(), model.target_encoder.state_dict()
    assert context.keys() == target.keys() and all(
        torch.equal(context[name], target[name]) for name in context
    )
    model(*batch()).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.target_encoder.parameters())
    for name, parameter in [*model.context_encoder.named_parameters(), *model.predictor.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert not any(module.training for module in model.target_encoder.modules())
    assert all(module.training for module in model.context_encoder.modules())


def test_the_target_is_a_moving_average_of_all_parameters():
    model = MIMJEPA(SMALL)
    before = {name: p.clone() for name, p in model.target_encoder.named_parameters()}
    for parameter in model.context_encoder.parameters():
        parameter.data += torch.randn_like(parameter)
    model.update_target(0.9)
    for name, context in model.context_encoder.named_parameters():
        now = model.target_encoder.get_parameter(name)
        assert torch.allclose(now, 0.9 * before[name] + 0.1 * context, atol=1e-6)
    before = {name: p.clone() for name, p in model.target_encoder.named_parameters()}
    model.update_target(1.0)
    assert all(torch.equal(before[name], p) for name, p in model.target_encoder.named_parameters())


def test_state_dict_round_trip():
    first, second = MIMJEPA(SMALL), MIMJEPA(SMALL)
    second.load_state_dict(first.state_dict())
    data = batch()
    assert torch.equal(first.eval()(*data), second.eval()(*data))


@pytest.mark.parametrize(
    "config", [SMALL, replace(SMALL, tokenizer="patch"), replace(SMALL, image_size=64, depth=3)]
)
def test_the_cost_of_training_is_what_torch_counts(config):
    model, (context_images, target_images, visible) = MIMJEPA(config), batch(config, count=1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(context_images, target_images, visible).backward()
    assert train.training_flops(config) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert train.training_flops(Config()) == pytest.approx(51.3e9, rel=0.01)


def test_training_with_every_kind_of_dropout_compiles_to_one_graph():
    model = MIMJEPA(replace(SMALL, drop_path=0.5)).train()
    torch.compile(model, fullgraph=True, backend="aot_eager")(*batch()).backward()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_forward_and_backward_compile_to_one_graph(dtype):
    """fullgraph=True raises on any graph break; the gradients are those of the plain model."""
    config = replace(SMALL, dropout=0.0, attention_dropout=0.0, drop_path=0.0)
    model, data = MIMJEPA(config).train(), batch()
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss, _ = run(*data, return_target=True)
        model.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert difference < (1e-5 if dtype is None else 3e-2)


# ------------------------------------------------------------------------------------------------------------
# What cannot work is refused, in words
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value", [
    ("image_size", 100), ("image_size", 16), ("image_size", 224.0), ("image_size", -32), ("dim", 30),
    ("dim", 0), ("heads", 5), ("depth", 0), ("predictor_depth", -1), ("tokenizer", "conv"),
    ("masking", "blocks"), ("mask_ratio", 0), ("mask_ratio", 1), ("mask_ratio", 1.5), ("mask_ratio", 0.001),
    ("mask_ratio", "half"), ("mask_ratio", float("nan")), ("dropout", 1.0), ("dropout", -0.1),
    ("attention_dropout", 2), ("drop_path", 1),
])  # fmt: skip
def test_a_config_that_cannot_work_says_which_value(name, value):
    with pytest.raises(ValueError, match=rf"{'dim' if name == 'heads' else name} is .*must be"):
        replace(SMALL, **{name: value})


def test_config_defaults_and_sizes():
    config = Config()
    assert (config.grid, config.tokens) == (14, 196)
    with pytest.raises(AttributeError):
        config.dim = 5


@pytest.mark.parametrize(
    "shape", [(2, 3, 96, 64), (2, 1, 96, 96), (3, 96, 96), (2, 3, 100, 100), (2, 3, 16, 16)]
)
def test_wrong_image_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="images are .*must be"):
        Encoder(SMALL)(torch.randn(shape))


@pytest.mark.parametrize("visible", [torch.ones(2, 35).bool(), torch.ones(1, 36).bool(), torch.ones(2, 36)])
def test_wrong_masks_are_refused(visible):
    with pytest.raises(ValueError, match="visible is .*must be"):
        Encoder(SMALL)(torch.randn(2, 3, 96, 96), visible)


def test_wrong_tokens_are_refused():
    with pytest.raises(ValueError, match="tokens are .*must be"):
        Predictor(SMALL)(torch.randn(2, 35, 32))
    with pytest.raises(ValueError, match="must be"):
        jepa_loss(torch.randn(2, 36, 8), torch.randn(2, 36, 4), torch.ones(2, 36).bool())


# ------------------------------------------------------------------------------------------------------------
# Schedules and optimiser
# ------------------------------------------------------------------------------------------------------------


def test_schedules_at_their_corners():
    T, W = 3000, 400
    flat_end = W + int(0.72 * (T - W))
    lr = [None] + [train.schedules(step, T, W)[0] for step in range(1, T + 1)]
    assert lr[1] == pytest.approx(1e-6 + (5e-4 - 1e-6) / W)
    assert lr[W // 2] == pytest.approx((1e-6 + 5e-4) / 2)
    assert lr[W - 1] < lr[W] == lr[flat_end] == 5e-4 > lr[flat_end + 1]
    assert lr[(flat_end + T) // 2] == pytest.approx((5e-4 + 1e-5) / 2, rel=1e-2)
    assert lr[T] == pytest.approx(1e-5)
    assert train.schedules(1, T, W)[1:] == pytest.approx((0.04 + 0.36 / T, 0.996 + 0.004 / T))
    assert train.schedules(T // 2, T, W)[1:] == pytest.approx((0.22, 0.998))
    assert train.schedules(T, T, W)[1:] == pytest.approx((0.4, 1.0))


@pytest.mark.parametrize("total, warmup", [(1, 0), (1, 1), (2, 1), (5, 5), (7, 0)])
def test_schedules_of_the_shortest_runs(total, warmup):
    for step in range(1, total + 1):
        lr, weight_decay, momentum = train.schedules(step, total, warmup)
        assert 1e-6 <= lr <= 5e-4 and 0.04 < weight_decay <= 0.4 + 1e-9 and 0.996 < momentum <= 1


def test_weight_decay_spares_vectors():
    model = MIMJEPA(SMALL)
    optimizer = train.make_optimizer(model.parameters(), torch.device("cpu"))
    train.set_schedule(optimizer, 0.1, 0.3)
    matrices, vectors = optimizer.param_groups
    assert {p.ndim for p in vectors["params"]} == {1} and min(p.ndim for p in matrices["params"]) == 2
    assert (matrices["weight_decay"], vectors["weight_decay"], matrices["lr"], vectors["lr"]) == (
        0.3,
        0.0,
        0.1,
        0.1,
    )
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == trainable(model)


# ------------------------------------------------------------------------------------------------------------
# Views
# ------------------------------------------------------------------------------------------------------------


def smooth_pictures(count, height, width):
    """Pictures with the kind of detail photographs have: bytes [count, 3, height, width]."""
    coarse = torch.rand(count, 3, height // 8 + 1, width // 8 + 1, generator=generator())
    fine = F.interpolate(coarse, size=(height, width), mode="bicubic")
    return ((fine + 0.05 * torch.randn(fine.shape, generator=generator())).clamp(0, 1) * 255).byte()


@pytest.mark.parametrize("out", [32, 64, 144])
def test_crop_and_resize_equals_torchvisions(out):
    """Each picture has its own crop, shrunk or enlarged, and half of them are mirrored."""
    pixels = smooth_pictures(5, 96, 96)
    boxes = [(0, 0, 96, 96), (10, 20, 50, 60), (40, 3, 43, 93), (5, 50, 91, 33), (30, 30, 45, 47)]
    flip = torch.tensor([False, True, False, True, True])
    ours = train.crop_and_resize(pixels, torch.tensor(boxes) / 96, flip, out)
    for picture, (left, top, width, height), mirrored, our in zip(pixels, boxes, flip, ours):
        their = TF.crop(picture / 255, top, left, height, width)
        their = TF.resize(their, [out, out], T.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        their = TF.horizontal_flip(their) if mirrored else their
        assert (our - their).abs().max() < 0.1 / 255


@pytest.mark.parametrize("ours, theirs, values", [
    (train.brightness, TF.adjust_brightness, (0.6, 0.9, 1.0, 1.4)),
    (train.contrast, TF.adjust_contrast, (0.6, 0.9, 1.0, 1.4)),
    (train.saturation, TF.adjust_saturation, (0.8, 0.9, 1.0, 1.2)),
    (train.hue, TF.adjust_hue, (-0.1, -0.03, 0.0, 0.1)),
    (train.grey, lambda image, _: TF.rgb_to_grayscale(image, 3), (0, 0, 0, 0)),
    (train.blur, lambda image, sigma: TF.gaussian_blur(image, [9, 9], [sigma, sigma]), (0.1, 0.7, 1.3, 2.0)),
])  # fmt: skip
def test_each_colour_operation_equals_torchvisions(ours, theirs, values):
    images = smooth_pictures(4, 40, 40) / 255
    images[0, :, :8] = 0.5  # grey pixels have no hue
    result = ours(images, torch.tensor(values).view(-1, 1, 1, 1))
    for image, value, our in zip(images, values, result):
        assert (our - theirs(image, value)).abs().max() < 0.5 / 255


def test_crops_have_the_distribution_of_random_resized_crop():
    sizes = torch.tensor([[500.0, 375.0]]).repeat(4000, 1)
    ours = train.draw_crops(sizes, generator()) * torch.tensor([500, 375, 500, 375])
    blank = torch.zeros(3, 375, 500)
    theirs = [
        T.RandomResizedCrop.make_params(T.RandomResizedCrop(224, (0.2, 1)), [blank]) for _ in range(4000)
    ]
    theirs = torch.tensor([[p["left"], p["top"], p["width"], p["height"]] for p in theirs]).float()
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= torch.tensor([500, 375])).all()
    for column in range(4):
        for level in (0.05, 0.25, 0.5, 0.75, 0.95):
            assert abs(ours[:, column].quantile(level) - theirs[:, column].quantile(level)) < 15


def test_a_crop_that_never_fits_is_the_largest_in_the_centre():
    crops = train.draw_crops(torch.tensor([[1000.0, 10.0], [10.0, 1000.0]]), generator()) * 1000
    assert torch.allclose(crops, torch.tensor([[493.0, 0, 13, 1000], [0, 493, 1000, 13]]), atol=1)


def test_colours_are_drawn_as_often_and_as_strong_as_the_paper_says():
    order, active, factor = train.draw_colours(20000, generator())
    share = active.float().mean(0)
    assert torch.allclose(share, 0.6 * torch.tensor([0.8, 0.8, 0.8, 0.8, 0.1, 0.3]), atol=0.02)
    assert (active[:, 0] == active[:, 3]).all()
    low, high = torch.tensor([[0.6, 0.6, 0.8, -0.1, 0, 0.1], [1.4, 1.4, 1.2, 0.1, 0, 2]])
    assert torch.allclose(factor.amin(0), low, atol=0.01) and torch.allclose(factor.amax(0), high, atol=0.01)
    assert (order.sort(1).values == torch.arange(6)).all()
    # jitter stays together; jitter, grey, blur come in all 6 orders and jitter's own four in all 24, evenly
    place = order.argsort(1)
    assert (place[:, :4].amax(1) - place[:, :4].amin(1) == 3).all()
    groups, inner = place[:, [0, 4, 5]].argsort(1), place[:, :4].argsort(1)
    for orders, count in ((groups, 6), (inner, 24)):
        frequency = orders.unique(dim=0, return_counts=True)[1]
        assert len(frequency) == count and (frequency / 20000 * count - 1).abs().max() < 0.15


def test_colour_operations_are_applied_in_the_order_drawn():
    images = smooth_pictures(16, 32, 32) / 255
    order, active, factor = train.draw_colours(16, generator())
    active |= torch.rand(16, 6, generator=generator()) < 0.5
    result = train.apply_colours(images.clone(), order, active, factor)
    for i in range(16):
        image = images[i : i + 1]
        for operation in order[i].tolist():
            if active[i, operation]:
                image = train.OPERATIONS[operation](image, factor[i, operation].view(1, 1, 1, 1))
        assert torch.allclose(result[i], image[0], atol=1e-5)


def test_a_worker_computes_on_one_core_and_leaves_the_others_to_training():
    program = """if True:
        import torch, train
        worker = train.worker(torch.device("cpu"))
        print(worker.submit(torch.get_num_threads).result(), torch.get_num_threads())"""
    command = [sys.executable, "-c", program]  # its own process: here, the number has been settled long ago
    settings = dict(cwd=Path(__file__).parent, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert subprocess.run(command, capture_output=True, text=True, **settings).stdout.split() == ["1", "2"]


def test_views_compile_and_are_the_same_views(monkeypatch):
    """Each function to one graph, for any number of pictures and for many sizes in one process.

    (Building C++ code from the graphs would take a minute.)
    """
    monkeypatch.setattr(train.torch, "compile", partial(torch.compile, backend="eager"))
    data = (
        smooth_pictures(12, 48, 48),
        torch.full((12, 2), 48.0),
        torch.arange(12),
        12,
        0,
        torch.device("cpu"),
    )
    for side in range(32, 176, 16):
        loaders = [train.Loader(*data, use_compile=use_compile) for use_compile in (False, True)]
        for step in (1, 2):  # other numbers of pictures for each operation
            views, compiled = (loader.views(*loader.batch(step, 2)[0], side) for loader in loaders)
            assert torch.allclose(views, compiled, atol=1e-5)


def test_a_batch_depends_on_seed_and_step_alone_and_an_epoch_takes_every_picture_once():
    pixels, sizes = smooth_pictures(20, 32, 32), torch.full((20, 2), 32.0)
    loaders = [
        train.Loader(pixels, sizes, torch.arange(20), 6, seed, torch.device("cpu")) for seed in (1, 1, 2)
    ]
    for step in (4, 1, 9):
        (first, *_), (again, *_), (other, *_) = (
            loader.batch(step, 2, (2, 0.6, "block")) for loader in loaders
        )
        assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3]))
        assert all(torch.equal(a, b) for a, b in zip(first[3], again[3]))
        assert not torch.equal(first[1], other[1])
    assert loaders[0].steps_per_epoch == 3
    epochs = [torch.cat([loaders[0].pick(step) for step in steps]) for steps in ((1, 2, 3), (4, 5, 6))]
    assert len(epochs[0].unique()) == len(epochs[1].unique()) == 18 and not torch.equal(*epochs)


def test_both_views_share_the_crop_but_not_the_colours():
    loader = train.Loader(
        smooth_pictures(8, 64, 64), torch.full((8, 2), 64.0), torch.arange(8), 8, 0, torch.device("cpu")
    )
    draws, _, visible = loader.batch(1, 2, (2, 0.6, "block"))
    first, second = loader.views(*draws, 32).chunk(2)
    assert first.shape == second.shape == (8, 3, 32, 32) and visible.shape == (8, 4)
    # luminance patterns agree wherever no blur was drawn; colours differ
    flat = torch.stack([first.mean(1).flatten(1), second.mean(1).flatten(1)])
    correlation = F.cosine_similarity(*(flat - flat.mean(2, keepdim=True)), dim=1)
    assert correlation.min() > 0.8 and not torch.equal(first, second)


def test_critters_are_deterministic_balanced_and_not_told_apart_by_colour():
    items = train.critters(400, seed=5)
    assert items == train.critters(400, seed=5) and len(set(items)) == 400
    assert [species for species, _ in items] == [i % 10 for i in range(400)]
    pictures = np.stack([np.asarray(train.draw_critter(*item)) for item in items])
    assert (pictures[7] == np.asarray(train.draw_critter(*items[7]))).all()
    # a nearest neighbour by 4×4×4 colour histogram: chance is 10 %
    bins = torch.from_numpy(pictures // 64).long() @ torch.tensor([16, 4, 1])
    histograms = F.one_hot(bins.flatten(1), 64).float().mean(1)
    nearest = torch.cdist(histograms[200:], histograms[:200]).argmin(1)
    assert (nearest % 10 == torch.arange(200) % 10).float().mean() < 0.17


# ------------------------------------------------------------------------------------------------------------
# Runs, from the command line
# ------------------------------------------------------------------------------------------------------------

TINY = """--image-size 32 --dim 16 --depth 2 --heads 2 --predictor-depth 1 --batch-size 8 --epochs 3
          --dropout 0.2 --drop-path 0.1 --device cpu --probe-epochs 2""".split()
CRITTERS = [*TINY, "--pictures", "40"]


@pytest.fixture(autouse=True)
def own_folder_and_signals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def refused(capsys, program, *arguments):
    """The one line on stderr with which a command line is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        program.main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")
    errors = [line for line in lines if "error" in line.lower()]
    assert stopped.value.code == 2 and len(errors) == 1 and "error: " in errors[0]
    return errors[0]


def save_picture(path, seed, size=(60, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    train.draw_critter(seed % 3, seed, 64).resize(size).save(path)


def same_state(first, second):
    """Whether two checkpoints hold the same run, bit for bit (times aside)."""
    first, second = load_checkpoint(first), load_checkpoint(second)
    for name in ("model", "random", "log"):
        pairs = (
            [(first[name], second[name])]
            if name == "log"
            else zip(first[name].values(), second[name].values())
        )
        if not all(torch.equal(a, b) for a, b in pairs):
            return False
    moments = [[v for s in c["optimizer"]["state"].values() for v in s.values()] for c in (first, second)]
    rows = [
        [{name: row[name] for name in train.COLUMNS[:7]} for row in c["history"]] for c in (first, second)
    ]
    return all(map(torch.equal, *moments)) and rows[0] == rows[1] and first["step"] == second["step"]


def test_train_and_eval_from_end_to_end(capsys):
    train.main(CRITTERS)
    files = {path.name for path in Path("runs/critters").iterdir()}
    assert files == {"ckpt.pt", "metrics.csv", "curves.png", "views.png"}
    rows = list(csv.DictReader(open("runs/critters/metrics.csv")))
    assert list(rows[0]) == train.COLUMNS and [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["step"] for row in rows] == ["5", "10", "15"] and float(rows[-1]["momentum"]) == 1
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert Image.open("runs/critters/views.png").size == (3 * 36, 6 * 36)

    checkpoint = load_checkpoint("runs/critters/ckpt.pt")
    assert checkpoint["step"] == 15 and checkpoint["recipe"]["batch_size"] == 8
    for which in ("context", "target"):
        encoder = load_encoder("runs/critters/ckpt.pt", which)
        assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, checkpoint["model"][f"{which}_encoder.{name}"])

    capsys.readouterr()
    probing.main(["runs/critters/ckpt.pt"])
    table = capsys.readouterr().out
    report = json.load(open("runs/critters/eval.json"))
    assert set(report["results"]) == {"trained", "untrained"}
    for name, results in report["results"].items():
        assert list(results) == ["k-NN", "linear", "simple", "multi-head", "cross"]
        for probe, figures in results.items():
            assert all(0 <= figure <= 100 for figure in figures) and figures[0] <= figures[1]
            assert f"{probe:12}{name:14}{figures[0]:11.1f}" in table
    assert Image.open("runs/critters/pca.png").size == (3 * 36, 6 * 36)


def test_resume_goes_on_bit_for_bit_from_an_epochs_end_and_from_within_one():
    train.main([*CRITTERS, "--out", "whole"])
    for stop_at in (5, 7):
        out = ["--out", f"parts{stop_at}"]
        train.main([*CRITTERS, *out, "--max-steps", str(stop_at)])
        assert load_checkpoint(f"parts{stop_at}/ckpt.pt")["step"] == stop_at
        train.main([*CRITTERS, *out, "--resume"])
        assert same_state("whole/ckpt.pt", f"parts{stop_at}/ckpt.pt")
    train.main([*CRITTERS, "--out", "other", "--seed", "1"])
    assert not same_state("whole/ckpt.pt", "other/ckpt.pt")


def test_a_step_of_training_is_the_papers():
    """Three steps of train.py against the same written out: loss, AdamW on two groups, schedules, EMA."""
    flags = "--dropout 0 --drop-path 0 --attention-dropout 0 --max-steps 3".split()
    train.main([*CRITTERS, *flags, "--out", "run"])
    saved = load_checkpoint("run/ckpt.pt")
    pictures = train.list_pictures("critters", "data", 40)
    pixels, sizes = train.load_pixels(pictures, "critters", "data", "run", saved["recipe"])
    loader = train.Loader(pixels, sizes, torch.arange(40), 8, 47, torch.device("cpu"))
    torch.manual_seed(47)
    model = MIMJEPA(Config(**saved["config"]))
    peaks = dict(peak_lr=saved["recipe"]["lr"], start_momentum=saved["recipe"]["momentum"])
    trained = [p for p in model.parameters() if p.requires_grad]
    first, second = ([torch.zeros_like(p) for p in trained] for _ in range(2))
    for t in (1, 2, 3):
        draws, _, visible = loader.batch(t, 2, (2, 0.6, "block"))
        model(*loader.views(*draws, 32).chunk(2), visible).backward()
        lr, decay, momentum = train.schedules(t, 15, 2, **peaks)
        for p, m, v in zip(trained, first, second):
            m.mul_(0.9).add_(0.1 * p.grad)
            v.mul_(0.999).add_(0.001 * p.grad**2)
            p.data *= 1 - lr * decay * (p.ndim > 1)
            p.data -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            p.grad = None
        for target, context in zip(model.target_encoder.parameters(), model.context_encoder.parameters()):
            target.data = momentum * target.data + (1 - momentum) * context.data
    for name, value in model.state_dict().items():
        assert torch.allclose(value, saved["model"][name], atol=1e-6), name


def test_the_collapse_watch_sees_a_collapse(capsys, monkeypatch):
    """Tokens that tell only their place, the same for every image, count as collapsed."""
    healthy = layer_norm(torch.randn(64, 4, 256))
    assert train.target_deviation(healthy) == pytest.approx(1, abs=0.05)
    assert train.target_deviation(healthy[:1].expand(64, 4, 256)) < 1e-6
    tokenize = scott.Tokenizer.forward
    monkeypatch.setattr(
        scott.Tokenizer, "forward", lambda self, images, visible=None: 0 * tokenize(self, images)
    )
    train.main([*CRITTERS, "--max-steps", "5"])
    assert "collapsing" in "".join(capsys.readouterr())


def test_two_processes_train_what_one_trains():
    """Same seed and global batch, no dropout: the same weights to rounding, also if one resumes two."""
    program, flags = (
        Path(__file__).with_name("train.py"),
        "--dropout 0 --drop-path 0 --attention-dropout 0".split(),
    )
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program]
    command = [*several, *CRITTERS, *flags, "--out", "two", "--max-steps", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.count("saved") == 1, done.stderr
    train.main([*CRITTERS, *flags, "--out", "two", "--resume"])
    train.main([*CRITTERS, *flags, "--out", "one"])
    one, two = load_checkpoint("one/ckpt.pt"), load_checkpoint("two/ckpt.pt")
    assert all(torch.allclose(value, two["model"][name], atol=1e-5) for name, value in one["model"].items())
    assert one["history"][0]["loss"] == pytest.approx(two["history"][0]["loss"], rel=1e-5)


def test_a_run_is_not_overwritten_nor_resumed_as_something_else(capsys):
    train.main([*CRITTERS, "--max-steps", "1"])
    before = Path("runs/critters/ckpt.pt").read_bytes()
    assert "--resume" in refused(capsys, train, *CRITTERS)
    assert "dim" in refused(capsys, train, "--resume", "--dim", 32)
    assert "dataset" in refused(capsys, train, "--dataset", "folder", "--out", "runs/critters", "--resume")
    assert Path("runs/critters/ckpt.pt").read_bytes() == before


def test_the_program_runs_as_a_program():
    command = [sys.executable, Path(__file__).with_name("train.py"), *CRITTERS, "--max-steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "python eval.py runs/critters/ckpt.pt" in done.stdout
    done = subprocess.run(
        [*command[:2], "--mask-ratio", "2", "--out", "x"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert done.stderr == "error: mask_ratio is 2.0, it must be more than 0 and less than 1\n"


def labelled_folder(root):
    for split, count in (("train", 6), ("test", 4)):
        for species in range(3):
            for i in range(count):
                save_picture(
                    root / split / f"species {species}/{i}.png", 30 * (split == "test") + 3 * i + species
                )


def test_the_readmes_lines_turn_pictures_into_features():
    for i in range(9):
        save_picture(Path(f"photos/{i}.jpg"), i, size=(300, 280))
    train.main(["--dataset", "folder", "--data-dir", "photos", *TINY, "--epochs", "1"])
    load, prepare = re.findall(
        r"```py\n(.*?)```", Path(__file__).with_name("README.md").read_text(), re.DOTALL
    )
    names = {"paths": sorted(Path("photos").glob("*.jpg"))}
    exec(prepare + load, names)
    assert names["features"].shape == (9, 16) and names["features"].isfinite().all()


def test_the_readme_quotes_the_source_and_its_commands_are_understood():
    readme = Path(__file__).with_name("README.md").read_text()
    quotes = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(quotes) > 5 and all(quote in Path(scott.__file__).read_text() for quote in quotes)
    for name, value in [*re.findall(r'^(\w+)="(.*)"$', readme, re.MULTILINE), ("seed", "1")]:
        readme = readme.replace(f"${name}", value)  # as a shell would
    commands = re.findall(r"python (train|eval)\.py([^#\n&`;]*)", readme)
    assert len(commands) > 5
    for program, arguments in commands:
        if "…" not in arguments and "--help" not in arguments:
            {"train": train, "eval": probing}[program].read_arguments(shlex.split(arguments))


def test_a_folder_with_classes(capsys):
    labelled_folder(Path("animals"))
    folder = ["--dataset", "folder", "--data-dir", "animals"]
    train.main([*folder, *TINY, "--max-steps", "4"])
    assert load_checkpoint("runs/folder/ckpt.pt")["recipe"]["data_dir"] == "animals"
    probing.main(["runs/folder/ckpt.pt", "--no-baseline", "--no-pca", "--encoder", "target", "--epochs", "1"])
    assert list(json.load(open("runs/folder/eval.json"))["results"]) == ["trained"]
    assert not Path("runs/folder/pca.png").exists()
    # the test pictures are left out on request; too few pictures for a batch are refused
    pictures = train.list_pictures("folder", "animals")
    assert (len(pictures.items), pictures.train, pictures.classes[0]) == (30, 18, "species 0")
    assert pictures.labels == [*sorted([0, 1, 2] * 6), *sorted([0, 1, 2] * 4)]
    error = refused(
        capsys, train, *folder, *TINY, "--pretrain-split", "train", "--batch-size", 19, "--out", "x"
    )
    assert "18 pictures" in error and not Path("x").exists()


def test_a_folder_without_labels_is_enough_to_pretrain(capsys):
    for i in range(9):
        save_picture(Path(f"photos/album {i % 2}/{i}.JPG"), i, size=(40 + 5 * i, 50))
    folder = ["--dataset", "folder", "--data-dir", "photos", *TINY, "--epochs", "2", "--out", "photos/run"]
    train.main([*folder, "--max-steps", "1"])
    train.main([*folder, "--resume"])  # the run's own views.png is no picture to learn from
    assert load_checkpoint("photos/run/ckpt.pt")["found"] == 9
    train.main(["--dataset", "folder", "--data-dir", "photos", *TINY, "--epochs", "1"])
    assert "labelled" in refused(capsys, probing, "runs/folder/ckpt.pt")
    labelled_folder(Path("animals"))
    probing.main(["runs/folder/ckpt.pt", "--data-dir", "animals", "--no-baseline", "--epochs", "1"])


def pets_layout(root):
    """A miniature of Oxford-IIIT Pet's own folders and lists."""
    lists = {"trainval": [], "test": []}
    for i in range(24):
        name, label = [("Bengal", 1), ("Siamese", 2), ("great_pyrenees", 3)][i % 3]
        save_picture(root / f"oxford-iiit-pet/images/{name}_{i}.jpg", i)
        lists["trainval" if i < 15 else "test"].append(f"{name}_{i} {label} 1 1")
    (root / "oxford-iiit-pet/annotations").mkdir()
    for split, lines in lists.items():
        (root / f"oxford-iiit-pet/annotations/{split}.txt").write_text("\n".join(lines) + "\n")


def test_pets_are_read_as_they_are():
    pets_layout(Path("data"))
    pictures = train.list_pictures("pets", "data")
    assert pictures.classes == ["Bengal", "Siamese", "Great Pyrenees"] and pictures.train == 15
    assert pictures.labels == [0, 1, 2] * 8
    train.main(["--dataset", "pets", *TINY, "--epochs", "1"])
    probing.main(["runs/pets/ckpt.pt", "--epochs", "1"])


def test_the_papers_recipe_is_the_default_for_the_papers_data():
    for name in ("pets", "flowers", "imagenet100"):
        recipe = train.RECIPES[name]
        assert train.check_recipe(recipe) == Config()
        assert (recipe["epochs"], recipe["batch_size"], recipe["lr"], recipe["seed"]) == (300, 64, 5e-4, 47)
        assert (recipe["momentum"], recipe["pretrain_split"], recipe["probe_epochs"]) == (0.996, "all", 100)


def test_pictures_as_thin_as_a_thread_give_numbers():
    sizes = torch.tensor([[5000.0, 10], [10, 5000], [3, 2000]])
    pixels = torch.randint(256, (3, 3, 320, 320), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    for crops in (train.centre_crops(sizes), *(train.draw_crops(sizes, generator) for _ in range(20))):
        assert train.crop_and_resize(pixels, crops, None, 32).isfinite().all()


def test_imagenets_unlabelled_test_folder_is_left_alone():
    for split, i in (("train", 0), ("train", 1), ("val", 2)):
        for name in ("n01", "n02"):
            save_picture(Path(f"imagenet/{split}/{name}/{i}.png"), i)
    save_picture(Path("imagenet/test/7.png"), 7)
    pictures = train.list_pictures("imagenet100", "imagenet")
    assert (len(pictures.items), pictures.train, pictures.classes) == (6, 4, ["n01", "n02"])


@pytest.mark.parametrize("epochs", [30, 300, 900])
def test_the_warm_up_is_a_share_of_a_short_run_and_forty_epochs_of_a_long_one(epochs):
    train.main([*CRITTERS, "--epochs", str(epochs), "--max-steps", "1"])
    loaded = load_checkpoint("runs/critters/ckpt.pt")
    steps_per_epoch = loaded["found"] // loaded["recipe"]["batch_size"]
    warmup_steps = min(epochs * 40 / 300, 40) * steps_per_epoch
    rate = loaded["optimizer"]["param_groups"][0]["lr"]  # of step 1
    assert rate == pytest.approx(1e-6 + (loaded["recipe"]["lr"] - 1e-6) / warmup_steps, rel=1e-9)


def test_the_cache_keeps_proportions_and_notices_changes(monkeypatch):
    recipe = {"cache_side": 48, "skip_bad_images": False}
    save_picture(Path("photos/a.png"), 1, size=(80, 40))
    save_picture(Path("photos/b.png"), 2, size=(30, 90))
    pictures = train.list_pictures("folder", "photos")
    pixels, sizes = train.load_pixels(
        pictures, "folder", "photos", "out", {"cache_side": 48, "skip_bad_images": False}
    )
    assert sizes.tolist() == [[80, 40], [30, 90]] and pixels.shape == (2, 3, 48, 48)
    squeezed = Image.open("photos/a.png").resize((48, 48), Image.Resampling.BICUBIC)
    assert (pixels[0].permute(1, 2, 0).numpy() == np.asarray(squeezed)).all()
    # a central crop of the squeezed picture shows what the same crop of the picture itself would
    crop = train.crop_and_resize(pixels, train.centre_crops(sizes), None, 32)[1]
    picture = TF.to_image(Image.open("photos/b.png"))
    their = TF.resize(
        TF.center_crop(TF.resize(picture, [36], T.InterpolationMode.BICUBIC), [32, 32]), [32, 32]
    )
    assert (crop - their / 255).abs().mean() < 0.02
    # what is there is used, by whatever path
    with monkeypatch.context() as patch:
        patch.setattr(train, "fill", None)
        again = train.list_pictures("folder", Path("photos").absolute())
        train.load_pixels(again, "folder", Path("photos").absolute(), "out", recipe)
        patch.setattr(train.os, "access", lambda *_: False)  # nor need it be writable
        train.load_pixels(pictures, "folder", "photos", "out", recipe)
    # a build that breaks off leaves nothing that could be taken for whole
    save_picture(Path("photos/b.png"), 3, size=(30, 70))
    with monkeypatch.context() as patch:
        patch.setattr(train, "fill", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.load_pixels(pictures, "folder", "photos", "out", recipe)
    assert not list(Path("photos/cache").glob("*.npy"))
    # a changed picture is noticed, and nothing old is left lying about
    save_picture(Path("photos/b.png"), 3, size=(30, 60))
    sizes = train.load_pixels(
        pictures, "folder", "photos", "out", {"cache_side": 48, "skip_bad_images": False}
    )[1]
    assert sizes.tolist() == [[80, 40], [30, 60]]
    assert len(list(Path("photos/cache").iterdir())) == 3  # pixels, sizes, lock


def test_the_number_of_workers_changes_no_bit(monkeypatch):
    for i in range(12):
        save_picture(Path(f"photos/{i}.png"), i)
    flags = "--dataset folder --data-dir photos --image-size 32 --dim 32 --depth 1 --batch-size 4 --epochs 1"
    for workers in (1, 7):
        monkeypatch.setattr(train.os, "cpu_count", lambda: workers)
        shutil.rmtree("photos/cache", ignore_errors=True)  # so that it is decoded anew
        train.main([*flags.split(), "--out", f"by{workers}"])
    assert load_checkpoint("by1/ckpt.pt")["step"] == 3 and same_state("by1/ckpt.pt", "by7/ckpt.pt")


def test_odd_names_links_and_folders_among_the_pictures(capsys):
    for i, name in enumerate(
        ["plain.png", "a b.png", "ünï.png", "new\nline.png", "--flag.png", "%s;$(x).png"]
    ):
        save_picture(Path("photos") / name, i)
    Path("photos/folder.png").mkdir()
    Path("photos/link.png").symlink_to(Path("photos/plain.png").absolute())
    command = ["--dataset", "folder", "--data-dir", "photos", *TINY, "--batch-size", "7", "--epochs", "1"]
    train.main(command)
    assert "folder: 7 pictures" in capsys.readouterr().out
    Path("photos/lost.png").symlink_to("nowhere.png")
    assert "lost.png" in refused(capsys, train, *command, "--out", "x") and not Path("x").exists()
    Path("photos/lost.png").unlink()
    shutil.rmtree("photos/cache")
    Path("photos/cache").touch()
    assert "cannot write" in refused(capsys, train, *command, "--out", "x")


def test_a_picture_that_the_disk_fails_to_read_is_named(capsys, monkeypatch):
    save_picture(Path("photos/a.png"), 1)
    save_picture(Path("photos/b.png"), 2)

    def broken(item, side):
        raise OSError(5, "Input/output error")  # as read() says it, without a name

    monkeypatch.setattr(train, "open_picture", broken)
    error = refused(capsys, train, "--dataset", "folder", "--data-dir", "photos", *TINY, "--batch-size", 2)
    assert "photos/a.png (Input/output error)" in error
    assert not list(Path("photos/cache").glob("*.npy"))


def test_no_room_for_the_cache_is_told_before_work_starts(capsys, monkeypatch):
    save_picture(Path("photos/a.png"), 1)
    save_picture(Path("photos/b.png"), 2)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    error = refused(capsys, train, "--dataset", "folder", "--data-dir", "photos", *TINY, "--batch-size", 2)
    assert "--cache-side" in error and [path.name for path in Path("photos/cache").iterdir()] == ["lock"]


# ------------------------------------------------------------------------------------------------------------
# Probes
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", probing.PROBES)
def test_a_probe_learns_which_tokens_matter(name):
    """One token in nine says the class, the others are noise: only attention to it solves the task."""
    probe = probing.PROBES[name](16, 4)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=5e-3)

    def draw(count):
        labels = torch.randint(4, (count,))
        tokens = torch.randn(count, 9, 16)
        tokens[torch.arange(count), torch.randint(9, (count,))] = (
            3 * torch.eye(16)[labels] + 3 * torch.eye(16)[15]
        )
        return layer_norm(tokens), labels

    for _ in range(200):
        tokens, labels = draw(64)
        optimizer.zero_grad()
        F.cross_entropy(probe(tokens), labels).backward()
        optimizer.step()
    tokens, labels = draw(500)
    scores = probe.eval()(tokens)
    assert scores.shape == (500, 4) and (scores.argmax(1) == labels).float().mean() > 0.8
    # a set of tokens has no order
    assert torch.allclose(probe(tokens.flip(1)), scores, atol=1e-4)


def test_accuracies_by_hand():
    scores = torch.tensor(
        [[9.0, 1, 2, 3, 4, 5, 6], [9, 1, 2, 3, 4, 5, 6], [0, 9, 0, 0, 0, 0, 0], [5, 4, 9, 0, 0, 0, 0]]
    )
    top1, top5, per_class = probing.accuracies(scores, torch.tensor([0, 0, 1, 1]))
    assert (top1, top5, per_class) == (75, 100, 75)
    top1, top5, per_class = probing.accuracies(scores[:3], torch.tensor([0, 1, 1]))
    assert (top1, top5, per_class) == (pytest.approx(200 / 3), pytest.approx(200 / 3), 75)


def test_knn_weighs_its_neighbours_by_similarity():
    train_features = F.normalize(torch.tensor([[1.0, 0.0], [1, 0.5], [1, 0.6], [-1, 0]]), dim=1)
    scores = probing.knn(
        train_features, torch.tensor([0, 1, 1, 2]), torch.tensor([[2.0, 0.0]]), classes=3, k=3
    )
    votes = [math.exp(1 / 0.07), sum(math.exp(1 / math.hypot(1, x) / 0.07) for x in (0.5, 0.6)), 0]
    assert scores[0].tolist() == pytest.approx(votes, rel=1e-3)


def test_the_linear_probe_separates_what_is_separable():
    labels = torch.arange(90) % 3
    features = torch.randn(90, 5) + 6 * torch.eye(5)[labels]
    scores = probing.linear(features[:60], labels[:60], features[60:], classes=3)
    assert (scores.argmax(1) == labels[60:]).all()


def test_the_encoders_that_are_compared_are_the_trained_and_the_one_of_step_0(monkeypatch):
    train.main([*CRITTERS, "--max-steps", "5"])
    saved, seen = load_checkpoint("runs/critters/ckpt.pt"), []
    figures = {"k-NN": (0, 0, 0)}
    monkeypatch.setattr(probing, "evaluate", lambda features, *_: seen.append(features.encoder) or figures)
    for which in ("context", "target"):
        probing.main(["runs/critters/ckpt.pt", "--encoder", which, "--no-pca"])
    torch.manual_seed(47)
    fresh = MIMJEPA(Config(**saved["config"])).context_encoder.state_dict()
    for encoder, which in zip(seen, ("context_encoder.", None, "target_encoder.", None)):
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, saved["model"][which + name] if which else fresh[name])


@pytest.mark.parametrize("name, count", [("simple", 14_630), ("multi-head", 313_001), ("cross", 1_786_405)])
def test_probes_have_the_papers_layers(name, count):
    assert trainable(probing.PROBES[name](384, 37)) == count


def small_evaluation(pictures):
    recipe = train.RECIPES["critters"] | {"batch_size": 8, "image_size": 32}
    config = Config(image_size=32, dim=16, depth=1, heads=2)
    torch.manual_seed(0)
    features = probing.Features(Encoder(config), torch.device("cpu"))
    before = {name: value.clone() for name, value in features.encoder.state_dict().items()}
    pixels, sizes = train.load_pixels(pictures, "critters", "data", "out", recipe)
    data = probing.labelled(pictures, pixels, sizes, 47, torch.device("cpu"))
    results = probing.evaluate(features, data, config, 2, 47)
    assert all(torch.equal(value, before[name]) for name, value in features.encoder.state_dict().items())
    return results, torch.random.get_rng_state()


def test_probing_leaves_the_encoder_alone_and_sees_no_test_label():
    """With other test labels the figures change, but not one bit of what was learned or drawn."""
    pictures = train.list_pictures("critters", "data", 40)
    heads = []
    original, probing.train_probes = probing.train_probes, lambda *a: heads.append(original(*a)) or heads[-1]
    try:
        results, state = small_evaluation(pictures)
        pictures.labels[30:] = [(label + 1) % 10 for label in pictures.labels[30:]]
        others, same = small_evaluation(pictures)
    finally:
        probing.train_probes = original
    assert results != others and torch.equal(state, same)
    assert all(
        torch.equal(a, b) for a, b in zip(heads[0].state_dict().values(), heads[1].state_dict().values())
    )


def test_few_labels_are_so_many_of_each_class_and_the_test_split_stays_whole():
    pictures = train.list_pictures("critters", "data", 80)
    pixels, sizes = torch.zeros(80, 3, 32, 32, dtype=torch.uint8), torch.full((80, 2), 32.0)
    data = probing.labelled(pictures, pixels, sizes, 47, torch.device("cpu"), per_class=2)
    assert (data.labels[data.train].bincount() == 2).all() and len(data.train) == 20
    assert data.train.max() < 60 and data.test.tolist() == list(range(60, 80))


def test_supervised_training_moves_the_encoder_and_learns(capsys):
    """From scratch and from the checkpoint: rows of their own in the table; the checkpoint stays as it is."""
    train.main([*CRITTERS, "--max-steps", "5"])
    before = Path("runs/critters/ckpt.pt").read_bytes()
    probing.main("runs/critters/ckpt.pt --from-scratch --finetune --epochs 0 --no-pca".split())
    report = json.load(open("runs/critters/eval.json"))["results"]
    assert set(report) == {"trained", "untrained", "from scratch", "fine-tuned"}
    assert set(report["trained"]) == {"k-NN", "linear"} and set(report["from scratch"]) == {"simple"}
    assert "fine-tuned" in capsys.readouterr().out and Path("runs/critters/ckpt.pt").read_bytes() == before

    # two classes that differ in brightness are told apart after a few epochs
    labels = torch.arange(80) % 2
    pixels = (80 + 100 * labels).to(torch.uint8)[:, None, None, None].repeat(1, 3, 32, 32)
    pictures = train.Pictures([None] * 80, labels.tolist(), ["dark", "light"], 60)
    data = probing.labelled(pictures, pixels, torch.full((80, 2), 32.0), 0, torch.device("cpu"))
    config = Config(image_size=32, dim=16, depth=1, heads=2, dropout=0.0)
    encoder = Encoder(config).requires_grad_(False)  # as load_encoder gives it
    weight = encoder.blocks[0].mlp.w3.weight.clone()
    figures = probing.supervise(encoder, data, config, 30, {"seed": 0, "lr": 3e-3}, torch.device("cpu"))
    assert figures["simple"][0] == 100 and not torch.equal(weight, encoder.blocks[0].mlp.w3.weight)


def test_several_checkpoints_are_summed_up_as_mean_and_deviation_or_as_curves(capsys, monkeypatch):
    for seed in ("1", "2"):
        train.main([*CRITTERS, "--seed", seed, "--out", seed, "--keep-every", "2"])
    assert {path.name for path in Path("1").glob("*.pt")} == {"ckpt.pt", "ckpt-0002.pt"}
    assert load_checkpoint("1/ckpt-0002.pt")["step"] == 10
    probing.main("1/ckpt.pt 2/ckpt.pt --epochs 0 --no-pca".split())
    first, second = (json.load(open(f"{run}/eval.json"))["results"]["trained"]["linear"][0] for run in "12")
    table = capsys.readouterr().out.split("mean ± standard deviation of 2 runs")[1]
    assert f"{(first + second) / 2:.1f} ± {abs(first - second) / 2**0.5:.1f}" in table
    drawn = []
    draw = probing.draw_curves
    monkeypatch.setattr(probing, "draw_curves", lambda *data: (drawn.append(data), draw(*data)))
    probing.main("1/ckpt.pt 1/ckpt-0002.pt --epochs 0 --no-pca".split())
    assert json.load(open("1/eval-0002.json"))["step"] == 10 and json.load(open("1/eval.json"))["step"] == 15
    assert Image.open("1/probes.png").size == (640, 2 * 120)
    [(_, steps, curves)] = drawn  # from the untrained encoder on, at step 0
    reports = [json.load(open(f"1/eval{tag}.json"))["results"] for tag in ("-0002", "")]
    linear = [reports[0]["untrained"]["linear"][0], *(report["trained"]["linear"][0] for report in reports)]
    assert steps == (0, 10, 15) and curves["linear, top-1 in %"] == linear


def test_the_leak_picture_shows_the_mask_where_it_holds_and_a_leak_where_it_does_not():
    visible = torch.zeros(1, 36, dtype=torch.bool)
    visible[0, [14, 15, 20, 21]] = True
    picture = probing.leak_picture(Tokenizer(SMALL), torch.rand(1, 3, 96, 96), visible)
    assert picture.shape == (3, 2 * 100, 6 * 100)
    hidden = ~blown_up(visible, 96)[0, 0]
    panels = picture.view(3, 2, 100, 6, 100)[:, :, 2:-2, :, 2:-2][0]  # [row, y, column, x]
    for column in range(2, 6):
        assert panels[0, :, column][hidden].max() == 0 and panels[1, :, column][hidden].max() > 0


@pytest.mark.parametrize("arguments, says", [
    (["none.pt"], "cannot read none.pt"),
    (["none.pt", "--epochs", "-1"], "epochs is -1"), (["none.pt", "--labels", "-1"], "labels is -1"),
    (["."], "cannot read"),
])  # fmt: skip
def test_a_checkpoint_that_is_not_there(capsys, arguments, says):
    assert says in refused(capsys, probing, *arguments)


@pytest.mark.parametrize("arguments, says", [
    ("--dataset cats", "--dataset"), ("--dataset folder --data-dir nowhere", "nowhere"), ("--what", "--what"),
    ("--epochs 0", "epochs"), ("--epochs many", "--epochs"), ("--lr -1", "lr"), ("--lr nan", "lr"),
    ("--image-size 100", "image_size"), ("--mask-ratio 1", "mask_ratio"), ("--device tpu9", "tpu9"),
    ("--batch-size 1", "batch_size"), ("--device meta", "device"), ("--keep-every 0", "keep_every"),
    ("--batch-size 50000", "--batch-size"), ("--momentum 2", "momentum"),
    ("--pretrain-split test", "pretrain_split"), ("--pictures -5", "pictures"),
    ("--max-steps 0", "max_steps"), ("--tokenizer vit", "tokenizer"), ("--seed -1", "seed"),
    ("--out /dev/null/run", "--out"), ("--dim 8192 --depth 1000", "GB of memory"),
    ("--cache-side 1", "cache_side"), ("--pictures 9", "pictures"),
    ("--pictures 5000000 --image-size 2048", "--pictures"), ("--batch-size 4000 --depth 999", "--batch-size"),
])  # fmt: skip
def test_wrong_arguments_are_refused_in_one_line_before_anything_is_written(capsys, arguments, says):
    assert says in refused(capsys, train, *arguments.split())
    assert not list(Path(".").iterdir())


# ------------------------------------------------------------------------------------------------------------
# Nothing is lost
# ------------------------------------------------------------------------------------------------------------


def start(*arguments):
    command = [sys.executable, Path(__file__).with_name("train.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


LONG = [*CRITTERS, "--epochs", "40"]  # long enough to be interrupted


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    train.main([*LONG, "--out", str(out / "run")])
    return out / "run/ckpt.pt"


@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_an_interrupted_run_goes_on_bit_for_bit(uninterrupted, number, status):
    """Asked to stop, a run saves inside the epoch; killed, it goes on from the last whole epoch."""
    run = start(*LONG, "--out", "run")
    while not Path("run/ckpt.pt").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == status
    assert ("--resume" in errors) == (number != signal.SIGKILL)
    train.main([*LONG, "--out", "run", "--resume"])
    assert same_state("run/ckpt.pt", uninterrupted)


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint_alone(capsys, monkeypatch):
    train.main([*CRITTERS, "--max-steps", "5"])
    before = Path("runs/critters/ckpt.pt").read_bytes()
    loss = scott.jepa_loss
    monkeypatch.setattr(scott, "jepa_loss", lambda *data: loss(*data) * float("inf"))
    assert "at step 6" in refused(capsys, train, *CRITTERS, "--resume")
    assert Path("runs/critters/ckpt.pt").read_bytes() == before


def test_a_full_disk_leaves_the_last_checkpoint_alone(capsys, monkeypatch):
    train.main([*CRITTERS, "--max-steps", "5"])
    before = Path("runs/critters/ckpt.pt").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.os, "fsync", full)
    monkeypatch.setattr(train, "save_metrics", lambda *_: None)
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)
    error = refused(capsys, train, *CRITTERS, "--resume")
    assert "No space left" in error and "ckpt.pt" in error and "--resume" in error
    assert Path("runs/critters/ckpt.pt").read_bytes() == before


def test_a_folder_that_vanishes_in_the_middle_of_a_run_is_one_line(capsys, monkeypatch):
    save = train.save_metrics
    monkeypatch.setattr(train, "save_metrics", lambda *row: (shutil.rmtree("runs"), save(*row)))
    assert "cannot write runs" in refused(capsys, train, *CRITTERS)


def test_no_memory_left_is_one_line_and_leaves_the_last_checkpoint_alone(capsys, monkeypatch):
    train.main([*CRITTERS, "--max-steps", "5"])
    before = Path("runs/critters/ckpt.pt").read_bytes()

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scott, "jepa_loss", full)
    guarded = SimpleNamespace(main=lambda arguments: train.run(lambda: train.main(arguments)))
    assert "--batch-size" in refused(capsys, guarded, *CRITTERS, "--resume")
    assert Path("runs/critters/ckpt.pt").read_bytes() == before
    monkeypatch.setattr(scott, "jepa_loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug is not talked away
        guarded.main([*CRITTERS, "--resume"])


def test_the_next_checkpoint_is_begun_only_when_the_last_one_is_whole(monkeypatch):
    """Written in a thread beside the training, in order, each as it was at its epoch's end."""
    running, steps, save = [], [], train.save_checkpoint

    def slowly(state, path):
        assert not running
        running.append(True)
        weights = {name: value.clone() for name, value in state["model"].items()}
        time.sleep(0.3)  # the training goes on meanwhile
        assert all(torch.equal(value, weights[name]) for name, value in state["model"].items())
        save(state, path)
        running.clear()
        steps.append(state["step"])

    monkeypatch.setattr(train, "save_checkpoint", slowly)
    train.main(CRITTERS)
    assert steps == [5, 10, 15] and load_checkpoint("runs/critters/ckpt.pt")["step"] == 15


def test_a_run_leaves_no_thread_and_no_open_file():
    train.main([*CRITTERS, "--max-steps", "1", "--out", "first"])
    before = threading.active_count(), len(os.listdir("/dev/fd"))
    train.main([*CRITTERS, "--epochs", "30"])
    assert (threading.active_count(), len(os.listdir("/dev/fd"))) == before


@pytest.mark.parametrize("precision, digits", [("bf16", 8), ("fp16", 11)])
def test_half_precision_trains_like_full_precision(precision, digits):
    """The loss of each step is the same within what numbers of so many binary digits allow."""
    flags = "--dropout 0 --drop-path 0 --attention-dropout 0 --max-steps 6".split()
    for name in ("fp32", precision):
        train.main([*CRITTERS, *flags, "--precision", name, "--out", name])
    full, half = (load_checkpoint(f"{name}/ckpt.pt")["log"][:, 0] for name in ("fp32", precision))
    rows = [load_checkpoint(f"{name}/ckpt.pt")["history"][0]["loss"] for name in ("fp32", precision)]
    assert torch.allclose(full, half, rtol=2.0**-digits)
    assert rows[0] == pytest.approx(rows[1], rel=2.0**-digits) and rows[0] != rows[1]


def test_bad_pictures_are_named_and_left_out_on_request(capsys):
    for i in range(10):
        save_picture(Path(f"photos/{i}.jpg"), i)
    whole = Path("photos/3.jpg").read_bytes()
    Path("photos/3.jpg").write_bytes(whole[: len(whole) // 2])
    Path("photos/empty.png").touch()
    Path("photos/words.jpg").write_text("not a picture")
    command = ["--dataset", "folder", "--data-dir", "photos", *TINY, "--epochs", "1"]
    error = refused(capsys, train, *command)
    assert "3.jpg" in error and "2 others" in error and not Path("runs").exists()
    train.main([*command, "--skip-bad-images"])
    output = capsys.readouterr().out
    assert "folder: 9 pictures" in output and "left out 3 bad files" in output


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA", "I;16", "exif"])
def test_pictures_of_every_kind_load_as_a_viewer_shows_them(mode):
    picture = train.draw_critter(3, 0)
    expected = picture
    if mode == "I;16":
        grey = np.asarray(picture.convert("L"))
        Image.fromarray(grey.astype(np.uint16) * 257).save("picture.png")
        expected = picture.convert("L")
    elif mode == "exif":
        turned = Image.Exif()
        turned[0x0112] = 6  # taken with the camera on its side
        picture.transpose(Image.Transpose.ROTATE_90).save("picture.png", exif=turned)
    elif mode in ("RGBA", "LA"):
        faded = picture.convert(mode)
        faded.putalpha(0)
        faded.save("picture.png")
        expected = Image.new("RGB", picture.size, "white")
    else:
        expected = picture.convert(mode)
        expected.save("picture.tiff" if mode == "CMYK" else "picture.png")
    path = next(Path(".").glob("picture.*"))
    assert np.array_equal(np.asarray(train.open_picture(path, 64)), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("damage, says", [
    (lambda c: c.pop("format"), "this version"),
    (lambda c: c.update(format="scott-mim-jepa 0"), "this version"),
    (lambda c: c["config"].update(dim=30), "dim is 30"),
    (lambda c: c["config"].update(colour="red"), "colour"),
    (lambda c: c.pop("config"), "config"), (lambda c: c.pop("model"), "model"),
    (lambda c: c["model"].pop("predictor.head.bias"), "predictor.head.bias"),
    (lambda c: c["model"].update(extra=torch.zeros(1)), "extra"),
    (lambda c: c["model"].update({"predictor.head.bias": torch.zeros(3)}), "predictor.head.bias"),
    (lambda c: c.pop("recipe"), "no recipe"), (lambda c: c["recipe"].update(epochs="3"), "no recipe"),
    (lambda c: c["recipe"].update(dataset="cats"), "no recipe"),
    (lambda c: c["recipe"].update(lr=-1.0), "lr is"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused(capsys, damage, says):
    train.main([*CRITTERS, "--max-steps", "1"])
    checkpoint = load_checkpoint("runs/critters/ckpt.pt")
    damage(checkpoint)
    torch.save(checkpoint, "runs/critters/ckpt.pt")
    assert says in refused(capsys, probing, "runs/critters/ckpt.pt")
    assert says in refused(capsys, train, *CRITTERS, "--resume")


@pytest.mark.parametrize("damage", [
    lambda c: c.pop("optimizer"), lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    lambda c: c["optimizer"]["state"][0].pop("exp_avg_sq"),
    lambda c: c["optimizer"]["param_groups"].pop(), lambda c: c.pop("random"), lambda c: c.pop("found"),
    lambda c: c.update(random={"cpu": torch.zeros(3)}), lambda c: c.pop("step"), lambda c: c.pop("log"),
    lambda c: c.update(step="many"), lambda c: c.update(history=[{"epoch": 1}]),
    lambda c: c.update(seconds=None),
])  # fmt: skip
def test_a_run_that_cannot_go_on_from_a_checkpoint_says_so(capsys, damage):
    train.main([*CRITTERS, "--max-steps", "5"])
    checkpoint = load_checkpoint("runs/critters/ckpt.pt")
    damage(checkpoint)
    torch.save(checkpoint, "runs/critters/ckpt.pt")
    assert "to go on" in refused(capsys, train, *CRITTERS, "--resume")


def test_damaged_checkpoints_never_end_in_a_traceback(capsys):
    """Cut short anywhere, or with bytes changed: refused in one line, or read as if nothing had happened."""
    train.main([*CRITTERS, "--max-steps", "1"])
    whole, rng = Path("runs/critters/ckpt.pt").read_bytes(), np.random.default_rng(0)
    for trial in range(60):
        damaged = bytearray(whole)
        if trial % 2:
            damaged = damaged[: rng.integers(len(whole))]
        else:
            for place in rng.integers(len(whole), size=20):
                damaged[place] = rng.integers(256)
        Path("damaged.pt").write_bytes(damaged)
        try:
            load_checkpoint("damaged.pt")
        except ValueError as error:
            assert "damaged.pt" in str(error) and "\n" not in str(error)
    # one bit of one weight is enough
    weight = load_checkpoint("runs/critters/ckpt.pt")["model"]["predictor.head.weight"]
    damaged = bytearray(whole)
    damaged[whole.index(weight.numpy().tobytes()) + 100] ^= 1
    Path("damaged.pt").write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint("damaged.pt")


class Exploit:
    def __reduce__(self):
        return Path.touch, (Path("exploited"),)


def test_a_checkpoint_cannot_run_code(capsys):
    torch.save({"format": scott.FORMAT, "model": Exploit()}, "evil.pt")
    torch.load("evil.pt", weights_only=False)
    assert Path("exploited").exists()  # the exploit works on those who let it
    Path("exploited").unlink()
    refused(capsys, probing, "evil.pt")
    Path("runs/critters").mkdir(parents=True)
    Path("evil.pt").rename("runs/critters/ckpt.pt")
    refused(capsys, train, *CRITTERS, "--resume")
    assert not Path("exploited").exists()
