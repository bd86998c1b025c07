"""The taps of the state fusion and their gradients in plain PyTorch."""

import torch


def fusion_taps_reference(dwconv_d1, dwconv_d3, dwconv_d5, alpha) -> torch.Tensor:
    """Computes `fusion_taps` with plain PyTorch."""
    E = len(dwconv_d1)
    kernels = torch.stack((dwconv_d1, dwconv_d3, dwconv_d5)).view(3, E, 9) * alpha.view(3, 1, 1)
    centre = kernels[:, :, 4].sum(0, keepdim=True)
    neighbours = torch.cat((kernels[:, :, :4], kernels[:, :, 5:]), 2).transpose(1, 2).reshape(24, E)
    return torch.cat((centre, neighbours))


def fusion_taps_backward_reference(dtaps, dwconv_d1, dwconv_d3, dwconv_d5, alpha) -> tuple[torch.Tensor, ...]:
    """Computes the gradients of `fusion_taps` with plain PyTorch."""
    E = len(dwconv_d1)
    neighbours = dtaps[1:].view(3, 8, E)
    centre = dtaps[:1].expand(3, 1, E)
    dmerged = torch.cat((neighbours[:, :4], centre, neighbours[:, 4:]), 1).transpose(1, 2)
    kernels = torch.stack((dwconv_d1, dwconv_d3, dwconv_d5)).view(3, E, 9)
    dkernels = (dmerged * alpha.view(3, 1, 1)).view(3, E, 1, 3, 3)
    separate = (gradient.clone(memory_format=torch.contiguous_format) for gradient in dkernels)
    return *separate, (dmerged * kernels).sum((1, 2))
