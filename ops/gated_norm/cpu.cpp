// gated_norm: LayerNorm of each token times SiLU of a gate; and its gradients.
#include "../csrc/blocks.h"
#include "../csrc/checks.h"
#include "../csrc/memory.h"

#include <ATen/Dispatch.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace mmspatialmamba {
namespace {

/// The tokens are cut into this many tasks at most, by the shape alone: sums over tokens have one order whatever the
/// number of threads.
constexpr int64_t TASKS = 16;
constexpr int64_t TASK_TOKENS = 64;

template <typename scalar_t>
struct NormProblem {
  using acc_t = at::opmath_type<scalar_t>;

  int64_t tokens, E, z_stride; // z_stride: elements from a token's gate to the next one's
  const scalar_t* y; // (tokens, E)
  const scalar_t* z;
  const acc_t* weight; // (E)
  const acc_t* bias; // (E)
  acc_t eps;

  int64_t task_tokens() const {
    return std::max(TASK_TOKENS, at::divup(tokens, TASKS));
  }

  int64_t tasks() const {
    return at::divup(tokens, task_tokens());
  }
};

template <typename acc_t>
struct Statistics {
  acc_t mean, inverse_deviation;
};

template <typename acc_t>
inline acc_t sum_of_lanes(const Vec<acc_t>& x) {
  return at::vec::vec_reduce_all<acc_t>([](const Vec<acc_t>& a, const Vec<acc_t>& b) { return a + b; }, x);
}

/// In two passes over the token, which stays in the first cache: the sum of squares less the squared mean would cancel.
template <typename scalar_t, typename acc_t = at::opmath_type<scalar_t>>
inline Statistics<acc_t> statistics(const scalar_t* y, int64_t E, acc_t eps) {
  Vec<acc_t> sum(0), squares(0);
  for_vectors<acc_t>(E, [&](int64_t first, auto count) { sum = sum + load(y + first, count); });
  const acc_t mean = sum_of_lanes(sum) / static_cast<acc_t>(E);
  for_vectors<acc_t>(E, [&](int64_t first, auto count) {
    Vec<acc_t> difference = load(y + first, count) - Vec<acc_t>(mean);
    if (count < LANES<acc_t>) {
      difference = Vec<acc_t>::set(Vec<acc_t>(0), difference, count);
    }
    squares = at::vec::fmadd(difference, difference, squares);
  });
  return {mean, acc_t(1) / std::sqrt(sum_of_lanes(squares) / static_cast<acc_t>(E) + eps)};
}

template <typename scalar_t>
[[gnu::flatten]] void forward_token(const NormProblem<scalar_t>& p, int64_t t, scalar_t* out) {
  using acc_t = at::opmath_type<scalar_t>;
  const scalar_t *y = p.y + t * p.E, *z = p.z + t * p.z_stride;
  const auto [mean, inverse] = statistics(y, p.E, p.eps);
  const Vec<acc_t> centre(mean), scale(inverse);
  for_vectors<acc_t>(p.E, [&](int64_t first, auto count) {
    const Vec<acc_t> normalized = (load(y + first, count) - centre) * scale;
    const Vec<acc_t> gate = load(z + first, count);
    const Vec<acc_t> norm =
        at::vec::fmadd(normalized, load(p.weight + first, count), load(p.bias + first, count));
    store(out + t * p.E + first, norm * gate * sigmoid(gate), count);
  });
}

/// Where the gradients go. Those of weight and bias are sums over tokens, kept apart for each task.
template <typename scalar_t>
struct NormGradients {
  const scalar_t* dout; // (tokens, E)
  scalar_t* dy; // (tokens, E)
  scalar_t* dz; // (tokens, E)
  scalar_t* out; // (tokens, E), the forward op's result once more, or nullptr
};

template <typename scalar_t, typename acc_t = at::opmath_type<scalar_t>>
[[gnu::flatten]] void backward_token(
    const NormProblem<scalar_t>& p, const NormGradients<scalar_t>& g, int64_t t, acc_t* dnormalized, acc_t* dweight,
    acc_t* dbias) {
  const scalar_t *y = p.y + t * p.E, *z = p.z + t * p.z_stride, *dout = g.dout + t * p.E;
  const auto [mean, inverse] = statistics(y, p.E, p.eps);
  const Vec<acc_t> one(1), centre(mean), scale(inverse);
  Vec<acc_t> sum(0), correlation(0);
  for_vectors<acc_t>(p.E, [&](int64_t first, auto count) {
    const Vec<acc_t> normalized = (load(y + first, count) - centre) * scale;
    const Vec<acc_t> weight = load(p.weight + first, count);
    const Vec<acc_t> norm = at::vec::fmadd(normalized, weight, load(p.bias + first, count));
    const Vec<acc_t> gate = load(z + first, count);
    const Vec<acc_t> gradient = load(dout + first, count);
    const Vec<acc_t> s = sigmoid(gate);
    if (g.out != nullptr) {
      store(g.out + t * p.E + first, norm * gate * s, count);
    }
    store(g.dz + t * p.E + first, gradient * norm * s * at::vec::fmadd(gate, one - s, one), count);
    const Vec<acc_t> dnorm = gradient * gate * s;
    store(dbias + first, load(dbias + first, count) + dnorm, count);
    store(dweight + first, at::vec::fmadd(dnorm, normalized, load(dweight + first, count)), count);
    const Vec<acc_t> d = dnorm * weight; // beyond the last channel 0, as the weight is
    store(dnormalized + first, d, count);
    sum = sum + d;
    correlation = at::vec::fmadd(d, normalized, correlation);
  });
  const Vec<acc_t> mean_d(sum_of_lanes(sum) / static_cast<acc_t>(p.E));
  const Vec<acc_t> mean_dn(sum_of_lanes(correlation) / static_cast<acc_t>(p.E));
  for_vectors<acc_t>(p.E, [&](int64_t first, auto count) {
    const Vec<acc_t> normalized = (load(y + first, count) - centre) * scale;
    const Vec<acc_t> d = load(dnormalized + first, count) - mean_d;
    store(g.dy + t * p.E + first, (d - normalized * mean_dn) * scale, count);
  });
}

void check_inputs(const at::Tensor& y, const at::Tensor& z, const at::Tensor& weight, const at::Tensor& bias) {
  check_map("y", y, 4);
  check_tensor("z", z, y.sizes(), y.scalar_type());
  const auto acc = at::toOpMathType(y.scalar_type());
  check_tensor("weight", weight, {y.size(3)}, acc);
  check_tensor("bias", bias, {y.size(3)}, acc);
}

/// The gate as it lies in memory if its tokens are equally far apart, as in one half of a projection; else a copy.
at::Tensor evenly_spaced(const at::Tensor& z) {
  const bool even = z.stride(3) == 1 && z.stride(1) == z.size(2) * z.stride(2) && z.stride(0) == z.size(1) * z.stride(1);
  return even ? z : z.contiguous();
}

template <typename scalar_t>
NormProblem<scalar_t> norm_problem(
    const at::Tensor& y, const at::Tensor& z, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  using acc_t = at::opmath_type<scalar_t>;
  return {y.size(0) * y.size(1) * y.size(2), y.size(3), z.stride(2), y.const_data_ptr<scalar_t>(),
          z.const_data_ptr<scalar_t>(), weight.const_data_ptr<acc_t>(), bias.const_data_ptr<acc_t>(),
          static_cast<acc_t>(eps)};
}

at::Tensor gated_norm(
    const at::Tensor& y, const at::Tensor& z, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  check_inputs(y, z, weight, bias);
  const at::Tensor y_ = y.contiguous(), z_ = evenly_spaced(z), weight_ = weight.contiguous(), bias_ = bias.contiguous();
  at::Tensor out = empty_result(y.sizes(), y.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, y.scalar_type(), "gated_norm", [&] {
    const auto p = norm_problem<scalar_t>(y_, z_, weight_, bias_, eps);
    scalar_t* data = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, p.tokens, TASK_TOKENS, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        forward_token(p, t, data);
      }
    });
  });
  return out;
}

/// Returns dy, dz, the gradients of weight and bias as the rows of one tensor, and out.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gated_norm_backward(
    const at::Tensor& dout, const at::Tensor& y, const at::Tensor& z, const at::Tensor& weight, const at::Tensor& bias,
    double eps, bool with_out) {
  check_inputs(y, z, weight, bias);
  check_tensor("dout", dout, y.sizes(), y.scalar_type());
  const at::Tensor y_ = y.contiguous(), z_ = evenly_spaced(z), weight_ = weight.contiguous(), bias_ = bias.contiguous();
  const at::Tensor dout_ = dout.contiguous();
  at::Tensor dy = at::empty(y.sizes(), y.options()), dz = at::empty(y.sizes(), y.options());
  at::Tensor out = with_out ? at::empty(y.sizes(), y.options()) : at::empty({0}, y.options());
  at::Tensor sums;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, y.scalar_type(), "gated_norm_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto p = norm_problem<scalar_t>(y_, z_, weight_, bias_, eps);
    const NormGradients<scalar_t> gradients{
        dout_.const_data_ptr<scalar_t>(), dy.mutable_data_ptr<scalar_t>(), dz.mutable_data_ptr<scalar_t>(),
        with_out ? out.mutable_data_ptr<scalar_t>() : nullptr};
    at::Tensor parts = at::zeros({p.tasks(), 2, p.E}, weight.options());
    acc_t* parts_data = parts.mutable_data_ptr<acc_t>();
    at::parallel_for(0, p.tasks(), 1, [&](int64_t begin, int64_t end) {
      const LaneBuffer<acc_t> dnormalized(at::divup(p.E, LANES<acc_t>));
      for (int64_t task = begin; task < end; ++task) {
        acc_t* sums_of_task = parts_data + task * 2 * p.E;
        const int64_t last = std::min(p.tokens, (task + 1) * p.task_tokens());
        for (int64_t t = task * p.task_tokens(); t < last; ++t) {
          backward_token(p, gradients, t, dnormalized[0], sums_of_task, sums_of_task + p.E);
        }
      }
    });
    sums = parts.sum(0);
  });
  return {dy, dz, sums, out};
}

} // namespace

TORCH_LIBRARY_IMPL(mmspatialmamba, CPU, m) {
  m.impl("gated_norm", gated_norm);
  m.impl("gated_norm_backward", gated_norm_backward);
}

} // namespace mmspatialmamba
