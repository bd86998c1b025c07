# paramwise_cfg of this project's recipes: no decay on norms, biases and other 1-D parameters (D, step bias, alpha);
# A_log is 2-D, so it needs its name, and so does VMamba's step bias.
no_decay = dict(
    norm_decay_mult=0.0,
    bias_decay_mult=0.0,
    flat_decay_mult=0.0,
    custom_keys={'A_log': dict(decay_mult=0.0), 'dt_bias': dict(decay_mult=0.0)},
)
