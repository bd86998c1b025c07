// Checks of the arguments: the Python functions check them too, but anyone can call an op through torch.ops.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

namespace mmspatialmamba {

inline void check_tensor(const char* name, const at::Tensor& x, at::IntArrayRef sizes, at::ScalarType dtype) {
  TORCH_CHECK(x.sizes() == sizes, name, " must have shape ", sizes, ", got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == dtype, name, " must have dtype ", dtype, ", got ", x.scalar_type());
}

inline void check_dim(const char* name, const at::Tensor& x, int64_t dim) {
  TORCH_CHECK(x.dim() == dim, name, " must have ", dim, " dimensions, got shape ", x.sizes());
}

} // namespace mmspatialmamba
