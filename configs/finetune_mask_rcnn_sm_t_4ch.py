# finetune_mask_rcnn_sm_t.py for images of four channels (red, green, blue and near infrared, say) in PNG or TIFF files.
# Published weights get a stem for it by tools/convert_checkpoint.py SOURCE TARGET --in-channels 4 --bgr.
_base_ = './finetune_mask_rcnn_sm_t.py'

image_loader = dict(type='LoadImageFromFile', color_type='unchanged')

# MMEngine's preprocessor normalizes one or three channels only, so the pipeline does it. cv2 gives blue, green, red,
# near infrared; the statistics of the data set belong here, in this order.
normalize = dict(
    type='Normalize', mean=[103.53, 116.28, 123.675, 116.28], std=[57.375, 57.12, 58.395, 57.12], to_rgb=False
)

model = dict(
    data_preprocessor=dict(mean=None, std=None, bgr_to_rgb=False),
    backbone=dict(in_channels=4),
)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            image_loader,
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='Resize', scale=(1333, 800), keep_ratio=True),
            dict(type='RandomFlip', prob=0.5),
            normalize,
            dict(type='PackDetInputs'),
        ]
    )
)
val_dataloader = dict(
    dataset=dict(
        pipeline=[
            image_loader,
            dict(type='Resize', scale=(1333, 800), keep_ratio=True),
            normalize,
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
        ]
    )
)
test_dataloader = val_dataloader
