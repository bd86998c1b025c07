// state_fusion: the weighted sum of 25 neighbours on the grid, and its gradients.
#include "../csrc/checks.h"
#include "../csrc/memory.h"
#include "fusion.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

namespace mmspatialmamba {
namespace {

template <typename scalar_t>
struct FusionProblem {
  using acc_t = at::opmath_type<scalar_t>;

  int64_t N, H, W, E;
  const scalar_t* h; // (N, H, W, E)
  const acc_t* taps; // (TAPS, E)
};

/// One vector of channels of one image.
template <typename scalar_t>
struct FusionVector {
  using acc_t = at::opmath_type<scalar_t>;

  const FusionProblem<scalar_t>& p;
  int64_t n = 0;
  Channels channels{};
  TapVectors<acc_t> taps;
  RowBuffer<acc_t> h;

  explicit FusionVector(const FusionProblem<scalar_t>& problem) : p(problem), h(2 * RADIUS + 1, p.W, RADIUS) {}

  void start(int64_t image, Channels image_channels) {
    n = image;
    channels = image_channels;
    taps = load_taps(p.taps, p.E, channels);
  }

  /// Row r of a tensor (N, H, W, E), at this image and these channels.
  template <typename T>
  T* row(T* tensor, int64_t r) const {
    return tensor + (n * p.H + r) * p.W * p.E + channels.first;
  }

  /// Copies row r of a tensor (N, H, W, E) into row r of a buffer.
  [[gnu::flatten]] void read_row(const scalar_t* tensor, const RowBuffer<acc_t>& buffer, int64_t r) const {
    const scalar_t* from = row(tensor, r);
    acc_t* to = buffer.row(r);
    for (int64_t column = 0; column < p.W; ++column) {
      prefetch(from + (column + PREFETCH_TOKENS) * p.E);
      load(from + column * p.E, channels.count).store(to + column * LANES<acc_t>);
    }
  }

  [[gnu::flatten]] void write_row(const acc_t* from, scalar_t* tensor, int64_t r) const {
    scalar_t* to = row(tensor, r);
    for (int64_t column = 0; column < p.W; ++column) {
      store(to + column * p.E, Vec<acc_t>::loadu(from + column * LANES<acc_t>), channels.count);
    }
  }

  void read_states(int64_t r) {
    read_row(p.h, h, r);
    replicate_columns(h.row(r), p.W);
  }
};

template <typename scalar_t>
class FusionForward {
  using acc_t = at::opmath_type<scalar_t>;

 public:
  FusionForward(const FusionProblem<scalar_t>& problem, scalar_t* g) : state_(problem), g_(g) {}

  void start(int64_t n, int64_t /*group*/, Channels channels) {
    state_.start(n, channels);
  }

  void read_row(int64_t r) {
    state_.read_states(r);
  }

  /// Rows r - RADIUS to r + RADIUS have been through `read_row`.
  [[gnu::flatten]] void fuse(int64_t r) {
    const auto& p = state_.p;
    scalar_t* g = state_.row(g_, r);
    with_count<acc_t>(state_.channels.count, [&](auto count) {
      fuse_row<FORWARD>(
          clamped_rows(state_.h, r, p.H), state_.taps, 0, p.W,
          [&](int64_t column, const Vec<acc_t>& value) { store(g + column * p.E, value, count); });
    });
  }

 private:
  FusionVector<scalar_t> state_;
  scalar_t* g_;
};

/// Where the gradients go. The sum over images is kept apart for each, to be added up in one order.
template <typename scalar_t>
struct FusionGradients {
  const scalar_t* dg; // (N, H, W, E)
  scalar_t* dh; // (N, H, W, E)
  at::opmath_type<scalar_t>* dtaps; // (N, TAPS, E)
};

template <typename scalar_t>
class FusionBackward {
  using acc_t = at::opmath_type<scalar_t>;

 public:
  FusionBackward(const FusionProblem<scalar_t>& problem, const FusionGradients<scalar_t>& gradients)
      : state_(problem), out_(gradients), dg_(problem.W), dh_row_(1, problem.W, RADIUS) {}

  void start(int64_t n, int64_t /*group*/, Channels channels) {
    state_.start(n, channels);
    dtaps_.fill(Vec<acc_t>(0));
  }

  void read_row(int64_t r) {
    state_.read_states(r);
    state_.read_row(out_.dg, dg_.buffer(), r);
  }

  /// Rows r - RADIUS to r + RADIUS have been through `read_row`.
  [[gnu::flatten]] void fuse_backward(int64_t r) {
    const auto& p = state_.p;
    const acc_t* dg = dg_.buffer().row(r);
    correlate_row(
        clamped_rows(state_.h, r, p.H), state_.taps, p.W,
        [&](int64_t column) { return Vec<acc_t>::loadu(dg + column * LANES<acc_t>); }, dtaps_,
        [](int64_t /*column*/, const Vec<acc_t>& /*g*/) {});
    dg_.fuse_row(r, p.H, state_.taps, dh_row_.row(0));
    state_.write_row(dh_row_.row(0), out_.dh, r);
  }

  void finish() const {
    for (int k = 0; k < TAPS; ++k) {
      acc_t* out = out_.dtaps + (state_.n * TAPS + k) * state_.p.E + state_.channels.first;
      store(out, dtaps_[k], state_.channels.count);
    }
  }

 private:
  FusionVector<scalar_t> state_;
  const FusionGradients<scalar_t>& out_;
  AdjointFusion<acc_t> dg_;
  RowBuffer<acc_t> dh_row_;
  TapVectors<acc_t> dtaps_;
};

void check_inputs(const at::Tensor& h, const at::Tensor& taps) {
  check_map("h", h, 4);
  check_tensor("taps", taps, {TAPS, h.size(3)}, at::toOpMathType(h.scalar_type()));
}

template <typename scalar_t>
FusionProblem<scalar_t> fusion_problem(const at::Tensor& h, const at::Tensor& taps) {
  return {h.size(0), h.size(1), h.size(2), h.size(3), h.const_data_ptr<scalar_t>(),
          taps.const_data_ptr<at::opmath_type<scalar_t>>()};
}

at::Tensor state_fusion(const at::Tensor& h, const at::Tensor& taps) {
  check_inputs(h, taps);
  const at::Tensor h_contiguous = h.contiguous(), taps_contiguous = taps.contiguous();
  at::Tensor g = empty_result(h.sizes(), h.options());
  map_pages(g);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, h.scalar_type(), "state_fusion", [&] {
    const auto p = fusion_problem<scalar_t>(h_contiguous, taps_contiguous);
    scalar_t* out = g.mutable_data_ptr<scalar_t>();
    parallel_blocks<scalar_t>(
        p.N, p.E, [&] { return FusionForward<scalar_t>(p, out); }, [&](auto& vectors) {
          walk_rows(
              p.H, [&](int64_t r) { for (auto& v : vectors) v.read_row(r); },
              [&](int64_t r) { for (auto& v : vectors) v.fuse(r); });
        });
  });
  return g;
}

std::tuple<at::Tensor, at::Tensor> state_fusion_backward(
    const at::Tensor& dg, const at::Tensor& h, const at::Tensor& taps) {
  check_inputs(h, taps);
  check_tensor("dg", dg, h.sizes(), h.scalar_type());
  const at::Tensor dg_contiguous = dg.contiguous(), h_contiguous = h.contiguous(), taps_contiguous = taps.contiguous();
  at::Tensor dh = at::empty(h.sizes(), h.options());
  map_pages(dh);
  at::Tensor dtaps = at::empty({h.size(0), TAPS, h.size(3)}, taps.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, h.scalar_type(), "state_fusion_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto p = fusion_problem<scalar_t>(h_contiguous, taps_contiguous);
    const FusionGradients<scalar_t> gradients{
        dg_contiguous.const_data_ptr<scalar_t>(), dh.mutable_data_ptr<scalar_t>(), dtaps.mutable_data_ptr<acc_t>()};
    parallel_blocks<scalar_t>(
        p.N, p.E, [&] { return FusionBackward<scalar_t>(p, gradients); },
        [&](auto& vectors) {
          walk_rows(
              p.H, [&](int64_t r) { for (auto& v : vectors) v.read_row(r); },
              [&](int64_t r) { for (auto& v : vectors) v.fuse_backward(r); });
          for (const auto& v : vectors) v.finish();
        });
  });
  return {dh, dtaps.sum(0)};
}

} // namespace

TORCH_LIBRARY_IMPL(mmspatialmamba, CPU, m) {
  m.impl("state_fusion", state_fusion);
  m.impl("state_fusion_backward", state_fusion_backward);
}

} // namespace mmspatialmamba
