// What the headers of older versions of PyTorch lack, each with the version that makes it unneeded.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/version.h>

#include <optional>

namespace mmspatialmamba {

// 2.2: an optional argument of an op is a std::optional.
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 2
using OptionalTensor = c10::optional<at::Tensor>;
#else
using OptionalTensor = std::optional<at::Tensor>;
#endif

/// 2.4: at::vec::convert of one vector. Rounds float32 to 16 bits; the values lie in the lower half of the result.
template <typename scalar_t>
inline at::vec::Vectorized<scalar_t> rounded(const at::vec::Vectorized<float>& value) {
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 4
  return at::vec::convert_from_float<scalar_t>(value, value);
#else
  return at::vec::convert<scalar_t>(value);
#endif
}

} // namespace mmspatialmamba
