// mlp: a token plus its MLP branch (LayerNorm, linear layer, GELU, linear layer), some tokens at a time; its gradients.
#include "../csrc/blocks.h"
#include "../csrc/checks.h"
#include "../csrc/memory.h"
#include "../csrc/normal.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

namespace mmspatialmamba {
namespace {

/// Tokens taken at a time: few enough for their hidden values to stay in the cache and to need little memory, and enough
/// for the products; with 256 a training step of the op takes a tenth longer.
constexpr int64_t TOKENS_AT_ONCE = 2048;

/// Tasks of one such part, by the shape alone: sums over tokens have one order whatever the number of threads.
constexpr int64_t TASKS = 16;

/// values = GELU(values + bias); copies what GELU takes to `kept`, if that is defined.
///
/// In a training step a product that writes far from the cache takes twice as long: so it writes to a part that stays
/// there, and this pass, which goes through memory in order, writes what is kept.
template <typename scalar_t>
void activate(const at::Tensor& values, const at::Tensor& bias, const at::Tensor& kept) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t tokens = values.size(0), F = values.size(1);
  scalar_t* data = values.mutable_data_ptr<scalar_t>();
  const scalar_t* bias_data = bias.const_data_ptr<scalar_t>();
  scalar_t* kept_data = kept.defined() ? kept.mutable_data_ptr<scalar_t>() : nullptr;
  at::parallel_for(0, tokens, at::divup(tokens, TASKS), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for_vectors<acc_t>(F, [&](int64_t first, auto count) {
        const int64_t i = t * F + first;
        const Vec<acc_t> x = load(data + i, count) + load(bias_data + first, count);
        if (kept_data) {
          store(kept_data + i, x, count);
        }
        store(data + i, x * normal<acc_t>(x).distribution, count);
      });
    }
  });
}

/// activated = GELU(hidden), and the gradient before it in place of the one after it; dbias grows by its sum over tokens.
template <typename scalar_t>
void activate_backward(
    const at::Tensor& hidden, const at::Tensor& activated, const at::Tensor& gradient, at::Tensor& dbias) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t tokens = hidden.size(0), F = hidden.size(1);
  const scalar_t* hidden_data = hidden.const_data_ptr<scalar_t>();
  scalar_t* out = activated.mutable_data_ptr<scalar_t>();
  scalar_t* gradient_data = gradient.mutable_data_ptr<scalar_t>();
  const int64_t task_tokens = at::divup(tokens, TASKS), tasks = at::divup(tokens, task_tokens);
  at::Tensor parts = at::zeros({tasks, F}, dbias.options());
  acc_t* parts_data = parts.mutable_data_ptr<acc_t>();
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      acc_t* sums = parts_data + task * F;
      for (int64_t t = task * task_tokens; t < std::min(tokens, (task + 1) * task_tokens); ++t) {
        for_vectors<acc_t>(F, [&](int64_t first, auto count) {
          const int64_t i = t * F + first;
          const Vec<acc_t> x = load(hidden_data + i, count);
          const auto [distribution, density] = normal<acc_t>(x);
          store(out + i, x * distribution, count);
          const Vec<acc_t> d = load(gradient_data + i, count) * at::vec::fmadd(x, density, distribution);
          store(gradient_data + i, d, count);
          store(sums + first, load(sums + first, count) + d, count);
        });
      }
    }
  });
  dbias.add_(parts.sum(0));
}

/// total = a b for the first part, then total += a b: in the dtype of `total`, as 16 bits would not do for many parts.
void add_product(at::Tensor& total, const at::Tensor& a, const at::Tensor& b, bool first) {
  if (a.scalar_type() != total.scalar_type()) {
    const at::Tensor product = at::mm(a, b);
    first ? total.copy_(product) : total.add_(product);
  } else if (first) {
    at::mm_out(total, a, b);
  } else {
    total.addmm_(a, b);
  }
}

struct Norm {
  at::Tensor out, mean, inverse_deviation;
};

/// LayerNorm of each token, computed in the dtype of its weight.
Norm layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  auto [out, mean, inverse] = at::native_layer_norm(x.to(weight.scalar_type()), {x.size(1)}, weight, bias, eps);
  return {out, mean, inverse};
}

void check_inputs(
    const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& norm_bias, const at::Tensor& weight1,
    const at::Tensor& weight2, const OptionalTensor& scale) {
  check_map("x", x, 2);
  check_dim("weight1", weight1, 2);
  const int64_t d = x.size(1), F = weight1.size(0);
  const auto dtype = weight1.scalar_type();
  check_tensor("norm_weight", norm_weight, {d}, at::toOpMathType(x.scalar_type()));
  check_tensor("norm_bias", norm_bias, {d}, at::toOpMathType(x.scalar_type()));
  check_tensor("weight1", weight1, {F, d}, dtype);
  check_tensor("weight2", weight2, {d, F}, dtype);
  if (scale) {
    check_tensor("scale", *scale, {x.size(0)}, x.scalar_type());
  }
}

std::tuple<at::Tensor, std::vector<at::Tensor>> mlp(
    const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps,
    const at::Tensor& weight1, const at::Tensor& bias1, const at::Tensor& weight2, const at::Tensor& bias2,
    const OptionalTensor& scale, bool keep) {
  check_inputs(x, norm_weight, norm_bias, weight1, weight2, scale);
  const int64_t tokens = x.size(0), d = x.size(1), F = weight1.size(0);
  check_tensor("bias1", bias1, {F}, weight1.scalar_type());
  check_tensor("bias2", bias2, {d}, weight1.scalar_type());
  const at::Tensor bias1_ = bias1.contiguous(), weight1_t = weight1.t(), weight2_t = weight2.t();
  const int64_t part = std::min(tokens, TOKENS_AT_ONCE);
  at::Tensor out = empty_result({tokens, d}, x.options());
  at::Tensor branch = at::empty({part, d}, weight1.options());
  at::Tensor values = at::empty({part, F}, weight1.options());
  at::Tensor hidden = at::empty({keep ? tokens : 0, F}, weight1.options());
  for (int64_t first = 0; first < tokens; first += TOKENS_AT_ONCE) {
    const int64_t count = std::min(TOKENS_AT_ONCE, tokens - first);
    const at::Tensor x_part = x.narrow(0, first, count);
    const at::Tensor norm = layer_norm(x_part, norm_weight, norm_bias, eps).out;
    at::Tensor values_part = values.narrow(0, 0, count);
    at::Tensor branch_part = branch.narrow(0, 0, count), out_part = out.narrow(0, first, count);
    at::mm_out(values_part, norm.to(weight1.scalar_type()), weight1_t);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, hidden.scalar_type(), "mlp", [&] {
      activate<scalar_t>(values_part, bias1_, keep ? hidden.narrow(0, first, count) : at::Tensor());
    });
    at::addmm_out(branch_part, bias2, values_part, weight2_t);
    if (scale) {
      at::addcmul_out(out_part, x_part, branch_part, scale->narrow(0, first, count).unsqueeze(1));
    } else {
      at::add_out(out_part, x_part, branch_part);
    }
  }
  return {out, keep ? std::vector<at::Tensor>{hidden} : std::vector<at::Tensor>{}};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> mlp_backward(
    const at::Tensor& dout, const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps,
    const at::Tensor& weight1, const at::Tensor& weight2, const OptionalTensor& scale, at::TensorList kept,
    bool parameters) {
  check_inputs(x, norm_weight, norm_bias, weight1, weight2, scale);
  const auto dtype = weight1.scalar_type(), acc = at::toOpMathType(dtype);
  const auto acc_options = weight1.options().dtype(acc);
  const int64_t tokens = x.size(0), d = x.size(1), F = weight1.size(0);
  check_tensor("dout", dout, {tokens, d}, x.scalar_type());
  TORCH_CHECK(kept.size() == 1, "kept must have one tensor, got ", kept.size());
  check_tensor("kept[0]", kept[0], {tokens, F}, dtype);
  const at::Tensor hidden_ = kept[0].contiguous(), dout_ = dout.contiguous();
  const int64_t part = std::min(tokens, TOKENS_AT_ONCE);
  at::Tensor dx = at::empty(x.sizes(), x.options());
  at::Tensor dnorm_weight = at::zeros_like(norm_weight), dnorm_bias = at::zeros_like(norm_bias);
  at::Tensor dweight1 = at::empty({F, d}, acc_options), dweight2 = at::empty({d, F}, acc_options);
  if (tokens == 0) {
    dweight1.zero_();
    dweight2.zero_();
  }
  at::Tensor dbias1 = at::zeros({F}, acc_options), dbias2 = at::zeros({d}, acc_options);
  const at::Tensor activated = at::empty({part, F}, weight1.options());
  const at::Tensor gradient = at::empty({part, F}, weight1.options());
  at::Tensor dnorm = at::empty({part, d}, weight1.options()), dbranch = at::empty({part, d}, weight1.options());
  for (int64_t first = 0; first < tokens; first += TOKENS_AT_ONCE) {
    const int64_t count = std::min(TOKENS_AT_ONCE, tokens - first);
    const at::Tensor x_part = x.narrow(0, first, count), dout_part = dout_.narrow(0, first, count);
    const at::Tensor activated_part = activated.narrow(0, 0, count);
    at::Tensor gradient_part = gradient.narrow(0, 0, count), dnorm_part = dnorm.narrow(0, 0, count);
    at::Tensor dbranch_part = dbranch.narrow(0, 0, count), dx_part = dx.narrow(0, first, count);
    scale ? at::mul_out(dbranch_part, dout_part, scale->narrow(0, first, count).unsqueeze(1)) : dbranch_part.copy_(dout_part);
    if (parameters) {
      dbias2.add_(dbranch_part.sum({0}, false, acc));
    }
    at::mm_out(gradient_part, dbranch_part, weight2);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "mlp_backward", [&] {
      activate_backward<scalar_t>(hidden_.narrow(0, first, count), activated_part, gradient_part, dbias1);
    });
    const Norm norm = layer_norm(x_part, norm_weight, norm_bias, eps);
    if (parameters) {
      add_product(dweight2, dbranch_part.t(), activated_part, first == 0);
      add_product(dweight1, gradient_part.t(), norm.out.to(dtype), first == 0);
    }
    at::mm_out(dnorm_part, gradient_part, weight1);
    const auto [dx_branch, dweight_part, dbias_part] = at::native_layer_norm_backward(
        dnorm_part.to(norm_weight.scalar_type()), x_part.to(norm_weight.scalar_type()), {d}, norm.mean,
        norm.inverse_deviation, norm_weight, norm_bias, {true, parameters, parameters});
    at::add_out(dx_part, dout_part, dx_branch);
    if (parameters) {
      dnorm_weight.add_(dweight_part);
      dnorm_bias.add_(dbias_part);
    }
  }
  if (!parameters) {
    const at::Tensor none = at::empty({0}, acc_options);
    return {dx, none, none, none, none, none, none};
  }
  return {dx, dnorm_weight, dnorm_bias, dweight1.to(dtype), dbias1.to(dtype), dweight2.to(dtype), dbias2.to(dtype)};
}

} // namespace

TORCH_LIBRARY_IMPL(mmspatialmamba, CPU, m) {
  m.impl("mlp", mlp);
  m.impl("mlp_backward", mlp_backward);
}

} // namespace mmspatialmamba
