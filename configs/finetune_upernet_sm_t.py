# Fine-tuning for semantic segmentation on a data set of one's own: images beside masks of class numbers; the generated
# shapes (tools/make_shapes_dataset.py) stand in. Copy this file and change data_root and classes. Start from published
# weights by --cfg-options load_from=FILE (heads of another class count are left as they are, and the log names them)
# or model.backbone.pretrained=FILE.
_base_ = './upernet_sm_t.py'

data_root = 'data/shapes/masks/'
classes = ('background', 'circle', 'square', 'triangle')  # the names of the numbers 0, 1, 2, 3 in the masks
crop_size = (512, 512)
iterations = 20000

model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(frozen_stages=0),
    decode_head=dict(num_classes=len(classes)),
    auxiliary_head=dict(num_classes=len(classes)),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
# ADE20K's type has classes of its own and takes 0 for "no class"; this one takes every number for a class, but 255.
train_dataloader = dict(
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        data_prefix=dict(img_path='images/train/', seg_map_path='masks/train/'),
        metainfo=dict(classes=classes),
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        data_prefix=dict(img_path='images/val/', seg_map_path='masks/val/'),
        metainfo=dict(classes=classes),
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader

# One GPU with 4 images per step, where the published recipe has 16: a quarter of its learning rate.
optim_wrapper = dict(optimizer=dict(lr=6e-5 / 4))
auto_scale_lr = dict(base_batch_size=4)
train_cfg = dict(max_iters=iterations, val_interval=iterations // 10)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=iterations // 20),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=iterations // 20, end=iterations, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=iterations // 10, max_keep_ckpts=2))
