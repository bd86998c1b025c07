# The published runs exempted from weight decay only what has "norm" in its original name: every norm but the two
# LayerNorms of each block. This config repeats that, for faithful reruns; everything else is mask_rcnn_sm_t.py.
_base_ = './mask_rcnn_sm_t.py'

optim_wrapper = dict(
    paramwise_cfg=dict(
        _delete_=True,
        # The longest key wins: norm1 and norm2 of a block (official ln_1, ln_2) keep the decay.
        custom_keys={
            'norm': dict(decay_mult=0.0),
            '.norm1.': dict(decay_mult=1.0),
            '.norm2.': dict(decay_mult=1.0),
        },
    ),
)
