# ruff: noqa: C408 (OpenMMLab configs are written with dict())
"""UPerNet with Spatial-Mamba-T on images and masks of one's own: the example of own_segmentation.md."""

_base_ = [__import__('mmspatialmamba').config_path('finetune_upernet_sm_t.py')]

data_root = 'data/own/'
classes = ('background', 'cat', 'dog')  # the names of the numbers 0, 1, 2 in the masks
image_size = (512, 512)  # height and width of what is cut out of an image for training, in pixels
iterations = 4000

model = dict(
    data_preprocessor=dict(size=image_size),
    decode_head=dict(num_classes=len(classes)),
    auxiliary_head=dict(num_classes=len(classes)),
)

train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        data_root=data_root,
        data_prefix=dict(img_path='images/train/', seg_map_path='masks/train/'),
        img_suffix='.jpg',
        seg_map_suffix='.png',
        metainfo=dict(classes=classes),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='RandomResize', scale=image_size[::-1], ratio_range=(1.0, 2.0), keep_ratio=True),
            dict(type='RandomCrop', crop_size=image_size),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackSegInputs'),
        ],
    ),
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        data_prefix=dict(img_path='images/val/', seg_map_path='masks/val/'),
        img_suffix='.jpg',
        seg_map_suffix='.png',
        metainfo=dict(classes=classes),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=image_size[::-1], keep_ratio=True),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
    ),
)
test_dataloader = val_dataloader

train_cfg = dict(max_iters=iterations, val_interval=iterations // 10)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=iterations // 20),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=iterations // 20, end=iterations, by_epoch=False),
]
optim_wrapper = dict(optimizer=dict(lr=6e-5))
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=iterations // 10, max_keep_ckpts=2),
    visualization=dict(interval=1),  # with --show-dir, a picture of every image
)
