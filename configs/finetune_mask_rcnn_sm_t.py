# Fine-tuning on a data set of one's own, on one GPU or on a CPU; the generated shapes (make quickstart) stand in.
# Copy this file and change data_root and classes. Start from published weights by --cfg-options load_from=FILE (heads
# of another class count are left as they are, and the log names them) or model.backbone.pretrained=FILE.
_base_ = './mask_rcnn_sm_t.py'

data_root = 'data/shapes/coco/'
classes = ('circle', 'square', 'triangle')

model = dict(
    backbone=dict(frozen_stages=0),
    roi_head=dict(bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))),
)

# Images without an object are kept: they teach what is background.
train_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=dict(classes=classes),
        filter_cfg=dict(filter_empty_gt=False, min_size=0),
    )
)
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=dict(classes=classes)))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

# One GPU with 2 images per step, where the published recipe has 16: an eighth of its learning rate. --auto-scale-lr
# starts from these 2 images.
optim_wrapper = dict(optimizer=dict(lr=1e-4 / 8))
auto_scale_lr = dict(base_batch_size=2)

# Stops before the first step where a head has another number of classes than the data set. Not in custom_hooks, which a
# config that inherits this one would replace as a whole.
default_hooks = dict(num_classes=dict(type='mmdet.NumClassCheckHook'))
