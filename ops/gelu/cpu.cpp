// gelu and its gradient, one pass each.
#include "../csrc/blocks.h"
#include "../csrc/checks.h"
#include "../csrc/memory.h"
#include "../csrc/normal.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace mmspatialmamba {
namespace {

/// Values of one task.
constexpr int64_t TASK = 1 << 15;

/// Calls `work(first, count)` for each vector of so many values, in parallel.
template <typename acc_t, typename Work>
void parallel_vectors(int64_t values, const Work& work) {
  at::parallel_for(0, at::divup(values, TASK), 1, [&](int64_t begin, int64_t end) {
    const int64_t offset = begin * TASK;
    for_vectors<acc_t>(std::min(values, end * TASK) - offset, [&](int64_t first, auto count) { work(offset + first, count); });
  });
}

at::Tensor gelu(const at::Tensor& x) {
  const at::Tensor x_ = x.contiguous();
  at::Tensor out = empty_result(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "gelu", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const scalar_t* in = x_.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    parallel_vectors<acc_t>(x.numel(), [&](int64_t i, auto count) {
      const Vec<acc_t> value = load(in + i, count);
      store(to + i, value * normal<acc_t>(value).distribution, count);
    });
  });
  return out;
}

at::Tensor gelu_backward(const at::Tensor& dy, const at::Tensor& x) {
  check_tensor("dy", dy, x.sizes(), x.scalar_type());
  const at::Tensor x_ = x.contiguous(), dy_ = dy.contiguous();
  at::Tensor dx = at::empty(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "gelu_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const scalar_t* in = x_.const_data_ptr<scalar_t>();
    const scalar_t* gradient = dy_.const_data_ptr<scalar_t>();
    scalar_t* to = dx.mutable_data_ptr<scalar_t>();
    parallel_vectors<acc_t>(x.numel(), [&](int64_t i, auto count) {
      const Vec<acc_t> value = load(in + i, count);
      const auto [distribution, density] = normal<acc_t>(value);
      store(to + i, load(gradient + i, count) * at::vec::fmadd(value, density, distribution), count);
    });
  });
  return dx;
}

} // namespace

TORCH_LIBRARY_IMPL(mmspatialmamba, CPU, m) {
  m.impl("gelu", gelu);
  m.impl("gelu_backward", gelu_backward);
}

} // namespace mmspatialmamba
