// scan_states: the linear recurrence of each channel over the tokens, and its gradients.
#include "../csrc/channel_sums.h"
#include "../csrc/checks.h"
#include "../csrc/memory.h"
#include "scan.h"
#include "step_size.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

namespace mmspatialmamba {
namespace {

/// Tokens after which the next vector of a block takes its turn: the block's cache lines are still there then.
constexpr int64_t RUN = 128;

template <typename scalar_t>
struct ScanProblem {
  using acc_t = at::opmath_type<scalar_t>;

  int64_t N, L, E;
  const scalar_t *u, *delta; // (N, L, E)
  const acc_t* A; // (E)
  const acc_t* B; // (N, L)
};

/// Where the gradients go. Sums over channels and images are kept apart for each task, to be added up in one order.
template <typename scalar_t>
struct ScanGradients {
  using acc_t = at::opmath_type<scalar_t>;

  const scalar_t* dh; // (N, L, E)
  scalar_t *du, *ddelta; // (N, L, E)
  TokenSums<acc_t> dB;
  acc_t* dA; // (N, E)
};

/// One vector of channels of one image.
template <typename scalar_t>
struct ScanVector {
  using acc_t = at::opmath_type<scalar_t>;

  const ScanProblem<scalar_t>& p;
  int64_t n = 0;
  Channels channels{};
  Vec<acc_t> A;
  Vec<acc_t> carry;

  explicit ScanVector(const ScanProblem<scalar_t>& problem) : p(problem) {}

  void start(int64_t image, Channels image_channels) {
    n = image;
    channels = image_channels;
    A = load(p.A + channels.first, channels.count);
    carry = Vec<acc_t>(0);
  }

  /// A tensor (N, L, E) from a token on, at this image and these channels.
  template <typename T>
  T* at_token(T* tensor, int64_t token) const {
    return tensor + (n * p.L + token) * p.E + channels.first;
  }

  template <typename Count>
  ScanInput<scalar_t, GivenStepSize<scalar_t, Count>, Count> input(
      int64_t token, Count count, scalar_t* ddelta = nullptr) const {
    return {
        {at_token(p.delta, token), ddelta, p.E, count},
        at_token(p.u, token), p.B + n * p.L + token, A, p.E, count};
  }
};

template <typename scalar_t>
class ScanForward {
  using acc_t = at::opmath_type<scalar_t>;

 public:
  ScanForward(const ScanProblem<scalar_t>& problem, scalar_t* h) : state_(problem), h_(h) {}

  void start(int64_t n, int64_t /*group*/, Channels channels) {
    state_.start(n, channels);
  }

  [[gnu::flatten]] void scan(int64_t begin, int64_t tokens) {
    scalar_t* h = state_.at_token(h_, begin);
    const int64_t E = state_.p.E;
    with_count<acc_t>(state_.channels.count, [&](auto count) {
      scan_run(state_.input(begin, count), tokens, state_.carry, [&](int64_t token, const Vec<acc_t>& value) {
        store(h + token * E, value, count);
      });
    });
  }

 private:
  ScanVector<scalar_t> state_;
  scalar_t* h_;
};

/// Backward: the states of all tokens first, then the tokens from last to first.
template <typename scalar_t>
class ScanBackward {
  using acc_t = at::opmath_type<scalar_t>;

 public:
  ScanBackward(const ScanProblem<scalar_t>& problem, const ScanGradients<scalar_t>& gradients)
      : state_(problem), out_(gradients), states_(problem.L + 1), dB_run_(RUN) {}

  void start(int64_t n, int64_t group, Channels channels) {
    state_.start(n, channels);
    dB_ = out_.dB.part(n, group);
    carry_ = dA_ = Vec<acc_t>(0);
    carry_.store(states_[0]);
  }

  [[gnu::flatten]] void scan(int64_t begin, int64_t tokens) {
    with_count<acc_t>(state_.channels.count, [&](auto count) {
      scan_run(state_.input(begin, count), tokens, state_.carry, [&](int64_t token, const Vec<acc_t>& value) {
        value.store(states_[begin + token + 1]);
      });
    });
  }

  [[gnu::flatten]] void scan_backward(int64_t begin, int64_t tokens) {
    const scalar_t* dh = state_.at_token(out_.dh, begin);
    scalar_t* du = state_.at_token(out_.du, begin);
    const int64_t E = state_.p.E;
    with_count<acc_t>(state_.channels.count, [&](auto count) {
      adjoint_run(
          state_.input(begin, count, state_.at_token(out_.ddelta, begin)), tokens, carry_, dA_,
          [&](int64_t token) { return load(dh + token * E, count); },
          [&](int64_t token) { return Vec<acc_t>::loadu(states_[begin + token]); },
          [&](int64_t token, const TokenGradients<acc_t>& gradient) {
            prefetch(dh + (token - PREFETCH_TOKENS) * E);
            gradient.dB.store(dB_run_[token]);
            store(du + token * E, gradient.du, count);
          });
    });
    with_count<acc_t>(state_.channels.count, [&](auto count) {
      add_channel_sums(dB_run_[0], tokens, count, dB_ + begin, !state_.channels.first_of_group);
    });
  }

  void finish() const {
    store(out_.dA + state_.n * state_.p.E + state_.channels.first, dA_, state_.channels.count);
  }

 private:
  ScanVector<scalar_t> state_;
  const ScanGradients<scalar_t>& out_;
  LaneBuffer<acc_t> states_; // L + 1: the state before each token, and after the last
  LaneBuffer<acc_t> dB_run_; // RUN
  acc_t* dB_ = nullptr;
  Vec<acc_t> carry_, dA_;
};

/// The op's tensors, contiguous; B is small and converted to the accumulation type once.
struct ScanInputs {
  at::Tensor u, delta, A, B;

  ScanInputs(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B)
      : u(u.contiguous()),
        delta(delta.contiguous()),
        A(A.contiguous()),
        B(B.to(A.scalar_type()).contiguous()) {
    check_map("u", u, 3);
    check_tensor("delta", delta, u.sizes(), u.scalar_type());
    check_tensor("A", A, {u.size(2)}, at::toOpMathType(u.scalar_type()));
    check_tensor("B", B, {u.size(0), u.size(1), 1}, u.scalar_type());
  }

  template <typename scalar_t>
  ScanProblem<scalar_t> problem() const {
    using acc_t = at::opmath_type<scalar_t>;
    return {u.size(0), u.size(1), u.size(2), u.const_data_ptr<scalar_t>(), delta.const_data_ptr<scalar_t>(),
            A.const_data_ptr<acc_t>(), B.const_data_ptr<acc_t>()};
  }
};

at::Tensor scan_states(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B) {
  const ScanInputs inputs(u, delta, A, B);
  at::Tensor h = empty_result(u.sizes(), u.options());
  map_pages(h);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, u.scalar_type(), "scan_states", [&] {
    const auto p = inputs.problem<scalar_t>();
    scalar_t* out = h.mutable_data_ptr<scalar_t>();
    parallel_blocks<scalar_t>(
        p.N, p.E, [&] { return ScanForward<scalar_t>(p, out); }, [&](auto& vectors) {
          for (int64_t t = 0; t < p.L; t += RUN) {
            for (auto& v : vectors) v.scan(t, std::min(RUN, p.L - t));
          }
        });
  });
  return h;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> scan_states_backward(
    const at::Tensor& dh, const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B) {
  const ScanInputs inputs(u, delta, A, B);
  check_tensor("dh", dh, u.sizes(), u.scalar_type());
  const at::Tensor dh_contiguous = dh.contiguous();
  at::Tensor du = at::empty(u.sizes(), u.options());
  map_pages(du);
  at::Tensor ddelta = at::empty(u.sizes(), u.options());
  map_pages(ddelta);
  at::Tensor dA = at::empty({u.size(0), u.size(2)}, A.options());
  at::Tensor dB = at::empty(B.sizes(), u.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, u.scalar_type(), "scan_states_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto p = inputs.problem<scalar_t>();
    const ScanGradients<scalar_t> gradients{
        dh_contiguous.const_data_ptr<scalar_t>(), du.mutable_data_ptr<scalar_t>(), ddelta.mutable_data_ptr<scalar_t>(),
        TokenSums<acc_t>(p.N, channel_groups<scalar_t>(p.N, p.E), 1, p.L), dA.mutable_data_ptr<acc_t>()};
    parallel_blocks<scalar_t>(
        p.N, p.E, gradients.dB.groups(), [&] { return ScanBackward<scalar_t>(p, gradients); },
        [&](auto& vectors) {
          for (int64_t t = 0; t < p.L; t += RUN) {
            for (auto& v : vectors) v.scan(t, std::min(RUN, p.L - t));
          }
          for (int64_t t = (p.L - 1) / RUN * RUN; t >= 0; t -= RUN) {
            for (auto& v : vectors) v.scan_backward(t, std::min(RUN, p.L - t));
          }
          for (const auto& v : vectors) v.finish();
        });
    gradients.dB.template write<scalar_t>(0, dB);
  });
  return {du, ddelta, dA.sum(0), dB};
}

} // namespace

TORCH_LIBRARY_IMPL(mmspatialmamba, CPU, m) {
  m.impl("scan_states", scan_states);
  m.impl("scan_states_backward", scan_states_backward);
}

} // namespace mmspatialmamba
