#!/usr/bin/env python3
"""Writes tests/golden/detection.safetensors: results of detectron2 and torchvision, with which the tests of src/task/detection
compare incubate's results.

  tools/golden_detection.py DETECTRON2 [FOLDER]      (needs torch 2.11, torchvision 0.26, pycocotools, scipy, safetensors)

DETECTRON2 is a clone of github.com/facebookresearch/detectron2 (02b5c4e). Its files of plain Python compute anchors, deltas,
labels, proposals, losses, mask targets and detections; they need none of its compiled operators. Weights and tokens of the whole
model come from the formula `noise`, which the test computes too.
"""
import importlib
import importlib.machinery
import os
import sys
import types
from unittest.mock import MagicMock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file

CLONE = sys.argv[1]
FOLDER = sys.argv[2] if len(sys.argv) > 2 else "tests/golden"


class Stand_ins:
    """Gives stand-ins for modules that need not be installed, because the functions used here do not call them."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fvcore", "iopath", "omegaconf", "cloudpickle") or name.startswith("detectron2.data"):
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        pass


def package(name):
    """A package whose own code does not run."""
    module = types.ModuleType(name)
    module.__path__ = [os.path.join(CLONE, *name.split("."))]
    sys.modules[name] = module
    return module


sys.meta_path.insert(0, Stand_ins())
for name in ["", ".modeling", ".layers", ".structures", ".utils", ".config", ".modeling.proposal_generator", ".modeling.roi_heads"]:
    package("detectron2" + name)
sys.modules["detectron2.config"].configurable = lambda function=None, **keys: function
sys.modules["detectron2.config"].CfgNode = dict
events = types.ModuleType("detectron2.utils.events")
events.get_event_storage = MagicMock
sys.modules["detectron2.utils.events"] = events
registry = types.ModuleType("detectron2.utils.registry")
registry.Registry = lambda name: types.SimpleNamespace(register=lambda: lambda part: part)
sys.modules["detectron2.utils.registry"] = registry
layers = sys.modules["detectron2.layers"]
for name in ["wrappers", "nms", "mask_ops"]:
    for key, value in vars(importlib.import_module("detectron2.layers." + name)).items():
        if not key.startswith("_"):
            setattr(layers, key, value)
for name in ["ROIAlign", "ROIAlignRotated", "ShapeSpec", "Conv2d", "ConvTranspose2d", "Linear", "get_norm", "move_device_like",
             "ciou_loss", "diou_loss"]:
    if not hasattr(layers, name):
        setattr(layers, name, MagicMock())
layers.move_device_like = lambda tensor, other: tensor.to(other.device)
structures = sys.modules["detectron2.structures"]
for name in ["boxes", "instances", "image_list", "masks"]:
    for key, value in vars(importlib.import_module("detectron2.structures." + name)).items():
        if not key.startswith("_"):
            setattr(structures, key, value)
for name in ["RotatedBoxes", "BitMasks", "Keypoints"]:
    if not hasattr(structures, name):
        setattr(structures, name, type(name, (), {}))
Boxes, Instances, PolygonMasks = structures.Boxes, structures.Instances, structures.PolygonMasks
box_regression = importlib.import_module("detectron2.modeling.box_regression")
box_regression.smooth_l1_loss = lambda ours, theirs, beta, reduction: F.l1_loss(ours, theirs, reduction=reduction)
Box2BoxTransform = box_regression.Box2BoxTransform
Matcher = importlib.import_module("detectron2.modeling.matcher").Matcher
anchor_generator = importlib.import_module("detectron2.modeling.anchor_generator")
poolers = importlib.import_module("detectron2.modeling.poolers")
proposal_utils = importlib.import_module("detectron2.modeling.proposal_generator.proposal_utils")
fast_rcnn = importlib.import_module("detectron2.modeling.roi_heads.fast_rcnn")
mask_head = importlib.import_module("detectron2.modeling.roi_heads.mask_head")
LayerNorm = importlib.import_module("detectron2.layers.batch_norm").LayerNorm

golden = {}
generator = torch.Generator().manual_seed(5)
OF_ANCHORS, OF_REGIONS = (1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)
matchers = {
    "anchors": Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
    "proposals": Matcher([0.5], [0, 1], allow_low_quality_matches=False),
}


def uniform(*shape):
    return torch.rand(*shape, generator=generator)


def some_boxes(count, side):
    corner = uniform(count, 2) * side
    return torch.cat([corner, corner + 1 + uniform(count, 2) * side / 2], 1)


def anchors_of(sides, patch):
    strides = [patch * 2.0 ** (level - 2) for level in range(5)]
    all_anchors = []
    for side, stride in zip(sides, strides, strict=True):
        cell = anchor_generator.DefaultAnchorGenerator.generate_cell_anchors(None, (8 * stride,), (0.5, 1.0, 2.0))
        x, y = anchor_generator._create_grid_offsets([side, side], stride, 0.0, cell)
        shifts = torch.stack((x, y, x, y), dim=1)
        all_anchors.append((shifts.view(-1, 1, 4) + cell.view(1, -1, 4)).reshape(-1, 4))
    return all_anchors


def pieces():
    for level, anchors in enumerate(anchors_of([12, 6, 3, 2, 1], 16)):
        golden[f"anchors.{level}"] = anchors
    origin, target = some_boxes(20, 100), some_boxes(20, 100)
    golden["coder.from"], golden["coder.to"] = origin, target
    for name, factors in [("anchors", OF_ANCHORS), ("regions", OF_REGIONS)]:
        coder = Box2BoxTransform(factors)
        large = (uniform(20, 4) - 0.5) * 10 * torch.tensor(factors)
        golden[f"coder.{name}.deltas"] = coder.get_deltas(origin, target)
        golden[f"coder.{name}.large"] = large
        golden[f"coder.{name}.decoded"] = coder.apply_deltas(large, origin)
    # Some boxes are copies of objects, moved a little; two boxes tie for one object.
    objects = some_boxes(6, 200)
    near = objects.repeat(4, 1) + (uniform(24, 4) - 0.5) * 12
    tied = torch.tensor([[300.0, 300, 310, 310], [306, 300, 316, 310]])
    objects = torch.cat([objects, torch.tensor([[303.0, 300, 313, 310]])])
    boxes = torch.cat([some_boxes(30, 200), near, tied])
    golden["matcher.boxes"], golden["matcher.objects"] = boxes, objects
    for name, matcher in matchers.items():
        matches, labels = matcher(structures.pairwise_iou(Boxes(objects), Boxes(boxes)))
        golden[f"matcher.{name}.matches"], golden[f"matcher.{name}.labels"] = matches, labels.long()
    boxes, scores, groups = some_boxes(200, 60), torch.randperm(200, generator=generator) / 200, torch.arange(200) % 3
    golden["nms.boxes"], golden["nms.scores"], golden["nms.groups"] = boxes, scores, groups
    for limit in [0.5, 0.7]:
        golden[f"nms.kept.{limit}"] = torchvision.ops.nms(boxes, scores, limit)
        golden[f"nms.grouped.{limit}"] = layers.batched_nms(boxes, scores, groups, limit)


def pooled(maps, boxes, images, bins, patch):
    """`ROIPooler` of detectron2: RoIAlign of each box from the map of the box's level. Also returns the levels."""
    levels = poolers.assign_boxes_to_levels([Boxes(boxes)], 2, 5, 14 * patch, 4)
    output = torch.zeros(len(boxes), maps[0].shape[1], bins, bins)
    for level in range(4):
        of_level = (levels == level).nonzero()[:, 0]
        rois = torch.cat([images[of_level, None].float(), boxes[of_level]], 1)
        scale = 1 / (patch * 2.0 ** (level - 2))
        regions = torchvision.ops.roi_align(maps[level], rois, bins, scale, sampling_ratio=0, aligned=True)
        output = output.index_put((of_level,), regions)
    return output, levels


def pooling():
    maps = [uniform(2, 3, side, side) for side in (32, 16, 8, 4)]
    inside = some_boxes(20, 80)
    # Boxes over the borders, outside of the image, without area, long and thin, and of every level of the pyramid.
    others = [[-30, -20, 60, 50], [100, 90, 170, 180], [200, 200, 240, 260], [20, 30, 20, 60], [40, 40, 40, 40], [5, 60, 125, 61],
              [-100, -80, 160, 200], [-200, -100, 300, 400], [0, 0, 128, 128], [-300, -300, 500, 600], [10, 10, 10.2, 10.2]]
    boxes = torch.cat([inside, torch.tensor(others, dtype=torch.float32)])
    images = torch.arange(len(boxes)) % 2
    golden["pool.boxes"], golden["pool.images"] = boxes, images
    for level, map_ in enumerate(maps):
        golden[f"pool.map.{level}"] = map_
    for bins in [7, 14]:
        leaves = [map_.clone().requires_grad_() for map_ in maps]
        features, golden["pool.levels"] = pooled(leaves, boxes, images, bins, 16)
        factors = uniform(*features.shape)
        (features * factors).sum().backward()
        golden[f"pool.factors.{bins}"], golden[f"pool.features.{bins}"] = factors, features.detach()
        for level, leaf in enumerate(leaves):
            golden[f"pool.gradient.{bins}.{level}"] = leaf.grad


# The sizes of the whole model, which is small.
WIDTH, GRID, PATCH, CLASSES, CHANNELS, HIDDEN, PER_LEVEL, PROPOSALS = 16, 8, 4, 5, 8, 24, 100, 60
SIDES = [32, 16, 8, 4, 2]
# Each scene: the height and width of the part of the crop that shows the image, and of each object the class, the box (x, y, w, h)
# and the polygons.
SCENES = [
    ([32, 32], [(1, [3, 4, 16, 12], [[3, 4, 19, 4, 19, 16, 3, 16]]),
                (4, [10, 9, 18, 20], [[10, 9, 28, 12, 20, 29], [11, 20, 17, 22, 12, 27]]),
                (2, [1, 0, 30, 29], [[1, 5, 20, 0, 31, 14, 28, 29, 4, 25]])]),
    ([24, 30], [(0, [1.5, 2, 9.5, 20], [[1.5, 2, 11, 3, 9, 22, 2, 15]]),
                (3, [1, 1, 27, 22], [[1, 1, 28, 1, 28, 23, 1, 23]])]),
    ([32, 20], []),
]
ORIGINAL = [45, 60]


def noise(count, phase):
    wave = np.sin(12.9898 * np.arange(count, dtype=np.float64) + phase) * 43758.5453
    return wave - np.floor(wave)


def weight(name, shape):
    numbers = torch.from_numpy(noise(int(np.prod(shape)), float(sum(name.encode()))) * 2 - 1).float().view(shape)
    if ".norm." in name or "simfp_2.1." in name:
        return numbers * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    if name.endswith("bias"):
        return numbers * 0.1
    fan_in = shape[0] if "deconv" in name or name in ("backbone.simfp_2.0.weight", "backbone.simfp_2.3.weight",
                                                      "backbone.simfp_3.0.weight") else int(np.prod(shape[1:]))
    return numbers * (0.3 if "anchor_deltas" in name or "bbox_pred" in name else 2.0) / fan_in**0.5


class Model:
    """SimpleFeaturePyramid, StandardRPNHead, FastRCNNConvFCHead, FastRCNNOutputLayers and MaskRCNNConvUpsampleHead of detectron2's
    mask_rcnn_vitdet, as functions of named weights."""

    def __init__(self, gradients):
        self.weights, self.gradients = {}, gradients

    def weight(self, name, *shape):
        if name not in self.weights:
            self.weights[name] = weight(name, shape).requires_grad_(self.gradients)
        return self.weights[name]

    def both(self, name, *shape, output=None):
        return self.weight(name + ".weight", *shape), self.weight(name + ".bias", output or shape[0])

    def norm(self, name, x):
        norm = LayerNorm(x.shape[1])
        norm.weight.requires_grad_(False), norm.bias.requires_grad_(False)
        del norm.weight, norm.bias
        norm.weight, norm.bias = self.both(name, x.shape[1])
        return norm(x)

    def unit(self, name, x, kernel=3):
        x = F.conv2d(x, self.weight(name + ".weight", CHANNELS, x.shape[1], kernel, kernel), padding=kernel // 2)
        return self.norm(name + ".norm", x)

    def doubled(self, name, x, output):
        return F.conv_transpose2d(x, *self.both(name, x.shape[1], output, 2, 2, output=output), stride=2)

    def pyramid(self, x):
        fine = self.doubled("backbone.simfp_2.0", x, WIDTH // 2)
        fine = self.doubled("backbone.simfp_2.3", F.gelu(self.norm("backbone.simfp_2.1", fine)), WIDTH // 4)
        maps = [(2, 4, fine), (3, 1, self.doubled("backbone.simfp_3.0", x, WIDTH // 2)), (4, 0, x), (5, 1, F.max_pool2d(x, 2, 2))]
        maps = [self.unit(f"backbone.simfp_{n}.{i + 1}", self.unit(f"backbone.simfp_{n}.{i}", m, 1)) for n, i, m in maps]
        return maps + [F.max_pool2d(maps[-1], 1, 2)]

    def proposal_head(self, maps):
        logits, deltas = [], []
        for x in maps:
            for i in range(2):
                x = F.relu(F.conv2d(x, *self.both(f"proposal_generator.rpn_head.conv.conv{i}", CHANNELS, CHANNELS, 3, 3), padding=1))
            name = "proposal_generator.rpn_head."
            logits.append(F.conv2d(x, *self.both(name + "objectness_logits", 3, CHANNELS, 1, 1)).permute(0, 2, 3, 1).flatten(1))
            of_map = F.conv2d(x, *self.both(name + "anchor_deltas", 12, CHANNELS, 1, 1))
            deltas.append(of_map.view(len(x), 3, 4, *x.shape[2:]).permute(0, 3, 4, 1, 2).flatten(1, -2))
        return logits, deltas

    def box_head(self, x):
        for i in range(4):
            x = F.relu(self.unit(f"roi_heads.box_head.conv{i + 1}", x))
        x = F.relu(F.linear(x.flatten(1), *self.both("roi_heads.box_head.fc1", HIDDEN, CHANNELS * 49)))
        name = "roi_heads.box_predictor."
        return F.linear(x, *self.both(name + "cls_score", CLASSES + 1, HIDDEN)), F.linear(
            x, *self.both(name + "bbox_pred", CLASSES * 4, HIDDEN))

    def mask_head(self, x):
        for i in range(4):
            x = F.relu(self.unit(f"roi_heads.mask_head.mask_fcn{i + 1}", x))
        x = F.relu(self.doubled("roi_heads.mask_head.deconv", x, CHANNELS))
        return F.conv2d(x, *self.both("roi_heads.mask_head.predictor", CLASSES, CHANNELS, 1, 1))


def proposals_of(logits, deltas, sizes, training):
    coder = Box2BoxTransform(OF_ANCHORS)
    anchors = anchors_of(SIDES, PATCH)
    boxes = [coder.apply_deltas(d.reshape(-1, 4), a.repeat(len(d), 1)).view(len(d), -1, 4) for d, a in zip(deltas, anchors, strict=True)]
    return proposal_utils.find_top_rpn_proposals(boxes, logits, sizes, 0.7, PER_LEVEL, PROPOSALS, 0.0, training)


def proposal_losses(logits, deltas, targets, everything):
    """`RPN.losses`, if all anchors that are not ignored are drawn. `everything` is the number of anchors to draw."""
    anchors = anchors_of(SIDES, PATCH)
    labels, boxes = [], []
    for target in targets:
        matches, label = matchers["anchors"](structures.pairwise_iou(target.gt_boxes, Boxes(torch.cat(anchors))))
        labels.append(label)
        boxes.append(target.gt_boxes.tensor[matches] if len(target) else torch.zeros(len(label), 4))
    labels = torch.stack(labels)
    box_loss = box_regression._dense_box_regression_loss(
        [Boxes(a) for a in anchors], Box2BoxTransform(OF_ANCHORS), deltas, boxes, labels == 1)
    valid = labels >= 0
    loss = F.binary_cross_entropy_with_logits(torch.cat(logits, 1)[valid], labels[valid].float(), reduction="sum")
    return loss / (everything * len(targets)), box_loss / (everything * len(targets))


def labelled(proposals, targets):
    """`ROIHeads.label_and_sample_proposals`, if all proposals are drawn."""
    proposals = proposal_utils.add_ground_truth_to_proposals([target.gt_boxes for target in targets], proposals)
    for each, target in zip(proposals, targets, strict=True):
        matches, labels = matchers["proposals"](structures.pairwise_iou(target.gt_boxes, each.proposal_boxes))
        if len(target):
            classes = target.gt_classes[matches]
            classes[labels == 0] = CLASSES
            each.gt_boxes, each.gt_masks = target.gt_boxes[matches], target.gt_masks[matches]
        else:
            classes = torch.full((len(each),), CLASSES)
        each.gt_classes = classes
    return proposals


def whole():
    everything = 5000
    model = Model(True)
    tokens = torch.from_numpy(noise(3 * WIDTH * GRID**2, 1.0) * 4 - 2).float().view(3, WIDTH, GRID, GRID).requires_grad_()
    targets = []
    for size, objects in SCENES:
        target = Instances(size)
        corners = [[x, y, x + w, y + h] for _, (x, y, w, h), _ in objects]
        target.gt_boxes = Boxes(torch.tensor(corners, dtype=torch.float32).view(-1, 4))
        target.gt_classes = torch.tensor([c for c, _, _ in objects], dtype=torch.int64)
        target.gt_masks = PolygonMasks([[np.array(p, dtype=np.float64) for p in polygons] for _, _, polygons in objects])
        targets.append(target)
    maps = model.pyramid(tokens)
    logits, deltas = model.proposal_head(maps)
    losses = dict(zip(["objectness", "anchor_boxes"], proposal_losses(logits, deltas, targets, everything), strict=True))
    with torch.no_grad():
        proposals = labelled(proposals_of(logits, deltas, [size for size, _ in SCENES], True), targets)
    images = torch.cat([torch.full((len(p),), i) for i, p in enumerate(proposals)])
    boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
    scores, changes = model.box_head(pooled(maps, boxes, images, 7, PATCH)[0])
    head = types.SimpleNamespace(num_classes=CLASSES, box2box_transform=Box2BoxTransform(OF_REGIONS), smooth_l1_beta=0.0,
                                 box_reg_loss_type="smooth_l1", use_sigmoid_ce=False, loss_weight={})
    head.box_reg_loss = types.MethodType(fast_rcnn.FastRCNNOutputLayers.box_reg_loss, head)
    of_regions = fast_rcnn.FastRCNNOutputLayers.losses(head, (scores, changes), proposals)
    losses["classes"], losses["boxes"] = of_regions["loss_cls"], of_regions["loss_box_reg"]
    with_object = [p[p.gt_classes < CLASSES] for p in proposals]
    images = torch.cat([torch.full((len(p),), i) for i, p in enumerate(with_object)])
    boxes = torch.cat([p.proposal_boxes.tensor for p in with_object])
    features = pooled(maps, boxes, images, 14, PATCH)[0]
    losses["masks"] = mask_head.mask_rcnn_loss(model.mask_head(features), with_object)
    sum(losses.values()).backward()
    golden["whole.counts"] = torch.tensor([len(p) for p in proposals] + [len(p) for p in with_object])
    golden["whole.losses"] = torch.stack([losses[name].detach() for name in ["objectness", "anchor_boxes", "classes", "boxes", "masks"]])
    golden["whole.tokens.gradient"] = tokens.grad
    golden["whole.masks"] = torch.cat([
        p.gt_masks.crop_and_resize(p.proposal_boxes.tensor, 28) for p in with_object if len(p)]).to(torch.uint8)
    golden["whole.mask_boxes"] = boxes
    for name, leaf in model.weights.items():
        golden["gradient." + name] = leaf.grad


@torch.no_grad()
def inference():
    model = Model(False)
    tokens = torch.from_numpy(noise(WIDTH * GRID**2, 2.0) * 4 - 2).float().view(1, WIDTH, GRID, GRID)
    maps = model.pyramid(tokens)
    logits, deltas = model.proposal_head(maps)
    size = [24, 32]
    proposals = proposals_of(logits, deltas, [size], False)
    boxes = proposals[0].proposal_boxes.tensor
    scores, changes = model.box_head(pooled(maps, boxes, torch.zeros(len(boxes)), 7, PATCH)[0])
    decoded = Box2BoxTransform(OF_REGIONS).apply_deltas(changes, boxes)
    found, _ = fast_rcnn.fast_rcnn_inference_single_image(decoded, scores.softmax(1), size, 0.05, 0.5, 100)
    features = pooled(maps, found.pred_boxes.tensor, torch.zeros(len(found)), 14, PATCH)[0]
    mask_head.mask_rcnn_inference(model.mask_head(features), [found])
    # `detector_postprocess`.
    found.pred_boxes.scale(ORIGINAL[1] / size[1], ORIGINAL[0] / size[0])
    found.pred_boxes.clip(tuple(ORIGINAL))
    found = found[found.pred_boxes.nonempty()]
    golden["found.classes"], golden["found.scores"] = found.pred_classes, found.scores
    golden["found.boxes"], golden["found.mask"] = found.pred_boxes.tensor.clone(), found.pred_masks[:20, 0].clone()
    pasted = layers.paste_masks_in_image(found.pred_masks[:20, 0], found.pred_boxes[:20], tuple(ORIGINAL))
    golden["found.pasted"] = pasted.to(torch.uint8)


pieces()
pooling()
whole()
inference()
save_file({name: value.detach().contiguous() for name, value in golden.items()}, os.path.join(FOLDER, "detection.safetensors"))
print({name: tuple(value.shape) for name, value in golden.items() if not name.startswith("gradient.")})
print(golden["whole.losses"], golden["whole.counts"], golden["found.scores"][:5], len(golden["found.scores"]))
