# Mask R-CNN with a plain ViT backbone (ViTDet) on COCO, 16 images per step. AdamW has a learning rate of 1e-4 and a weight decay of
# 0.05, with which others train plain ViTs at this batch size. Layer decay and drop path are ViTDet's. Deep Incubation's own recipe for
# Mask R-CNN is not published.
import os
from functools import partial

import detectron2.data.transforms as T
import torch.nn as nn
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

# NUMBERS

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
model.pixel_mean = pixel_mean
model.pixel_std = pixel_std
model.backbone.net.embed_dim = embed_dim
model.backbone.net.depth = depth
model.backbone.net.num_heads = num_heads
model.backbone.net.mlp_ratio = mlp_ratio
model.backbone.net.in_chans = in_chans
model.backbone.net.patch_size = patch_size
model.backbone.net.pretrain_img_size = pretrain_img_size
model.backbone.net.pretrain_use_cls_token = True
model.backbone.net.norm_layer = partial(nn.LayerNorm, eps=layer_norm_eps)
model.backbone.net.window_block_indexes = windowed_blocks
model.backbone.net.drop_path_rate = drop_path_rate

_image_size = 1024
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=_image_size, target_width=_image_size),
    L(T.FixedSizeCrop)(crop_size=(_image_size, _image_size), pad=False),
]
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.recompute_boxes = True
dataloader.train.total_batch_size = 16
dataloader.test.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=_image_size, max_size=_image_size)]

train = model_zoo.get_config("common/train.py").train
train.init_checkpoint = os.path.join(os.path.dirname(os.path.abspath(__file__)), "model.pth")
train.amp.enabled = True
train.ddp.fp16_compression = True
train.max_iter = max_iter

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=milestones, num_updates=max_iter),
    warmup_length=250 / max_iter,
    warmup_factor=0.001,
)

optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.lr = 1e-4
optimizer.weight_decay = 0.05
optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=depth, lr_decay_rate=layer_decay)
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
