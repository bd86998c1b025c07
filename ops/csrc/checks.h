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

/// Checks a map or sequence of tokens: of its sizes only the first, the batch, may be 0.
inline void check_map(const char* name, const at::Tensor& x, int64_t dim) {
  check_dim(name, x, dim);
  for (const int64_t size : x.sizes().slice(1)) {
    TORCH_CHECK(size > 0, name, " must have at least one token and one channel, got shape ", x.sizes());
  }
}

} // namespace mmspatialmamba
