# UPerNet with a plain ViT backbone on ADE20K: 80,000 steps of 16 images, by mmsegmentation's own recipe for ViT and DeiT.
# Deep Incubation's own recipe is not published.
_base_ = [
    'mmseg::_base_/models/upernet_vit-b16_ln_mln.py', 'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/default_runtime.py', 'mmseg::_base_/schedules/schedule_80k.py'
]

# NUMBERS

crop_size = (crop, crop)
data_preprocessor = dict(type='SegDataPreProcessor', size=crop_size, mean=pixel_mean, std=pixel_std, bgr_to_rgb=True,
                         pad_val=0, seg_pad_val=255)
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained='{{ fileDirname }}/model.pth',
    backbone=dict(
        img_size=crop_size,
        patch_size=patch_size,
        patch_bias=True,
        in_channels=in_channels,
        embed_dims=embed_dims,
        num_layers=num_layers,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        out_indices=out_indices,
        qkv_bias=True,
        drop_path_rate=0.1,
        norm_cfg=dict(type='LN', eps=layer_norm_eps)),
    neck=dict(_delete_=True, type='Feature2Pyramid', embed_dim=embed_dims, rescales=[4, 2, 1, 0.5]),
    decode_head=dict(in_channels=[embed_dims] * 4, channels=512, num_classes=150),
    auxiliary_head=dict(in_channels=embed_dims, num_classes=150))

# No weight decay for position embeddings, class token and norms (mmsegmentation calls these ln).
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.00006, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(
        norm_decay_mult=0.,
        custom_keys=dict(pos_embed=dict(decay_mult=0.), cls_token=dict(decay_mult=0.))))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=80000, by_epoch=False)
]

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs')
]
# Two images on each of eight GPUs.
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=1)
test_dataloader = val_dataloader
