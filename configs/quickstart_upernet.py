# A light UPerNet with a small Spatial-Mamba for the generated shapes data (tools/make_shapes_dataset.py): made to train
# from scratch on two CPU cores in minutes, not for accuracy on anything else.
_base_ = './finetune_upernet_sm_t.py'

crop_size = (128, 160)  # height, width: the size of the shapes images
iterations = 1000

model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(arch=dict(_delete_=True, embed_dims=24, depths=(1, 1, 2, 1)), drop_path_rate=0.0, frozen_stages=-1),
    decode_head=dict(in_channels=[24, 48, 96, 192], channels=64),
    auxiliary_head=dict(in_channels=96, channels=32),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=crop_size[::-1], ratio_range=(1.0, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=crop_size[::-1], keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=5.0))
auto_scale_lr = dict(base_batch_size=8)
train_cfg = dict(max_iters=iterations, val_interval=iterations // 4)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=iterations // 10),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=iterations // 10, end=iterations, by_epoch=False),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=iterations // 4, max_keep_ckpts=2))
