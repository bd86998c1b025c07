# ADE20K, 160k iterations: the recipe of the published runs, 512x512 crops, 16 images per step on 4 GPUs x 4.
# mmseg's files are named by path: the form 'mmseg::' does not resolve on the onedl forks.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/_base_/datasets/ade20k.py',
    __import__('mmseg').__path__[0] + '/.mim/configs/_base_/schedules/schedule_160k.py',
    __import__('mmseg').__path__[0] + '/.mim/configs/_base_/default_runtime.py',
    './no_decay.py',
]

custom_imports = dict(imports=['mmspatialmamba'], allow_failed_imports=False)

train_dataloader = dict(batch_size=4)

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg={{_base_.no_decay}},
)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False),
]

auto_scale_lr = dict(enable=False, base_batch_size=16)

# The published multi-scale mIoU of Spatial-Mamba: three scales and their flips.
img_ratios = [0.75, 1.0, 1.25]
tta_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale_factor=ratio, keep_ratio=True) for ratio in img_ratios],
            [
                dict(type='RandomFlip', prob=0.0, direction='horizontal'),
                dict(type='RandomFlip', prob=1.0, direction='horizontal'),
            ],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
