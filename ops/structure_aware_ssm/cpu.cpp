// structure_aware_ssm: step size, scan, fusion and observation in one pass over the image, and its gradients.
//
// One vector of channels walks down the rows of an image. Its states live in a ring of 11 rows, which stays in the
// second-level cache; as soon as the five rows below a row are there, its fusion and its observation are computed.
#include "../csrc/channel_sums.h"
#include "../csrc/checks.h"
#include "../csrc/memory.h"
#include "../state_fusion/fusion.h"
#include "../scan_states/scan.h"
#include "../scan_states/step_size.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

namespace mmspatialmamba {
namespace {

/// The op's inputs. dt, B, C and the parameters are small next to u: they are converted to the accumulation type once.
template <typename scalar_t>
struct Problem {
  using acc_t = at::opmath_type<scalar_t>;

  int64_t N, H, W, E, R;
  const scalar_t* u; // (N, H, W, E)
  const acc_t *dt, *B, *C; // (N, H, W, R), (N, H, W), (N, H, W)
  const acc_t* weight; // dt_weight, transposed: (R, E)
  const acc_t *bias, *A, *D; // (E)
  const acc_t* taps; // (TAPS, E)
};

/// The op's tensors, contiguous, from which `Problem` points.
struct Inputs {
  at::Tensor u, dt, B, C, weight, bias, A, D, taps;

  Inputs(
      const at::Tensor& u, const at::Tensor& dt, const at::Tensor& B, const at::Tensor& C, const at::Tensor& dt_weight,
      const at::Tensor& dt_bias, const at::Tensor& A, const at::Tensor& D, const at::Tensor& taps)
      : u(u.contiguous()),
        dt(dt.to(A.scalar_type()).contiguous()),
        B(B.to(A.scalar_type()).contiguous()),
        C(C.to(A.scalar_type()).contiguous()),
        weight(dt_weight.t().contiguous()),
        bias(dt_bias.contiguous()),
        A(A.contiguous()),
        D(D.contiguous()),
        taps(taps.contiguous()) {
    check_map("u", u, 4);
    check_dim("dt", dt, 4);
    const int64_t N = u.size(0), H = u.size(1), W = u.size(2), E = u.size(3), R = dt.size(3);
    const auto dtype = u.scalar_type(), acc_dtype = at::toOpMathType(dtype);
    check_tensor("dt", dt, {N, H, W, R}, dtype);
    check_tensor("B", B, {N, H, W, 1}, dtype);
    check_tensor("C", C, {N, H, W, 1}, dtype);
    check_tensor("dt_weight", dt_weight, {E, R}, acc_dtype);
    check_tensor("dt_bias", dt_bias, {E}, acc_dtype);
    check_tensor("A", A, {E}, acc_dtype);
    check_tensor("D", D, {E}, acc_dtype);
    check_tensor("taps", taps, {TAPS, E}, acc_dtype);
  }

  template <typename scalar_t>
  Problem<scalar_t> problem() const {
    using acc_t = at::opmath_type<scalar_t>;
    Problem<scalar_t> p;
    p.N = u.size(0);
    p.H = u.size(1);
    p.W = u.size(2);
    p.E = u.size(3);
    p.R = dt.size(3);
    p.u = u.const_data_ptr<scalar_t>();
    p.dt = dt.const_data_ptr<acc_t>();
    p.B = B.const_data_ptr<acc_t>();
    p.C = C.const_data_ptr<acc_t>();
    p.weight = weight.const_data_ptr<acc_t>();
    p.bias = bias.const_data_ptr<acc_t>();
    p.A = A.const_data_ptr<acc_t>();
    p.D = D.const_data_ptr<acc_t>();
    p.taps = taps.const_data_ptr<acc_t>();
    return p;
  }
};

/// One vector of channels of one image: its parameters, and its states row by row.
template <typename scalar_t>
struct StateVector {
  using acc_t = at::opmath_type<scalar_t>;

  const Problem<scalar_t>& p;
  int64_t n = 0;
  Channels channels{};
  Vec<acc_t> A, D, bias;
  TapVectors<acc_t> taps;
  LaneBuffer<acc_t> weight; // R
  RowBuffer<acc_t> h;
  Vec<acc_t> carry;

  /// Keeps the states of the last `rows` rows.
  StateVector(const Problem<scalar_t>& problem, int64_t rows) : p(problem), weight(p.R), h(rows, p.W, RADIUS) {}

  void start(int64_t image, Channels image_channels) {
    n = image;
    channels = image_channels;
    const auto of_channels = [&](const acc_t* parameter) { return load(parameter + channels.first, channels.count); };
    A = of_channels(p.A);
    D = of_channels(p.D);
    bias = of_channels(p.bias);
    taps = load_taps(p.taps, p.E, channels);
    for (int64_t r = 0; r < p.R; ++r) {
      of_channels(p.weight + r * p.E).store(weight[r]);
    }
    carry = Vec<acc_t>(0);
  }

  /// Row r of a tensor (N, H, W, E), at this image and these channels.
  template <typename T>
  T* row(T* tensor, int64_t r) const {
    return tensor + (n * p.H + r) * p.W * p.E + channels.first;
  }

  /// Row r of a tensor (N, H, W, values), at this image.
  const acc_t* token_row(const acc_t* tensor, int64_t r, int64_t values = 1) const {
    return tensor + (n * p.H + r) * p.W * values;
  }

  template <typename Count>
  ScanInput<scalar_t, LowRankStepSize<acc_t>, Count> scan_input(
      int64_t r, Count count, LowRankGradients<acc_t> gradients = {}) const {
    return {
        {token_row(p.dt, r, p.R), p.R, weight[0], bias, gradients},
        row(p.u, r), token_row(p.B, r), A, p.E, count};
  }

  [[gnu::flatten]] void scan_row(int64_t r) {
    acc_t* h_row = h.row(r);
    with_count<acc_t>(channels.count, [&](auto count) {
      scan_run(scan_input(r, count), p.W, carry, [&](int64_t column, const Vec<acc_t>& value) {
        value.store(h_row + column * LANES<acc_t>);
      });
    });
    replicate_columns(h_row, p.W);
  }
};

template <typename scalar_t>
class ForwardVector {
  using acc_t = at::opmath_type<scalar_t>;

 public:
  ForwardVector(const Problem<scalar_t>& problem, scalar_t* y)
      : p(problem), state_(problem, 2 * RADIUS + 1), y_(y) {}

  void start(int64_t n, int64_t /*group*/, Channels channels) {
    state_.start(n, channels);
  }

  [[gnu::flatten]] void scan_row(int64_t r) {
    state_.scan_row(r);
  }

  /// y = g C + D u. Rows r - RADIUS to r + RADIUS have been through `scan_row`.
  [[gnu::flatten]] void observe_row(int64_t r) {
    const acc_t* C = state_.token_row(p.C, r);
    const scalar_t* u = state_.row(p.u, r);
    scalar_t* y = state_.row(y_, r);
    const Vec<acc_t> D = state_.D;
    with_count<acc_t>(state_.channels.count, [&](auto count) {
      fuse_row<FORWARD>(
          clamped_rows(state_.h, r, p.H), state_.taps, 0, p.W, [&](int64_t column, const Vec<acc_t>& g) {
            const Vec<acc_t> skip = D * load(u + column * p.E, count);
            store(y + column * p.E, at::vec::fmadd(g, Vec<acc_t>(C[column]), skip), count);
          });
    });
  }

 private:
  const Problem<scalar_t>& p;
  StateVector<scalar_t> state_;
  scalar_t* y_;
};

/// Where the gradients go. Sums over channels and images are kept apart for each task, to be added up in one order.
template <typename scalar_t>
struct Gradients {
  using acc_t = at::opmath_type<scalar_t>;

  const scalar_t* dy; // (N, H, W, E)
  scalar_t* du; // (N, H, W, E)
  TokenSums<acc_t> tokens; // ddt's R values, dB and dC
  acc_t* parameters; // (N, TAPS + 3 + R, E): dtaps, dA, dD, ddt_weight transposed, ddt_bias
};

/// One vector of channels of one image, backward: the states of all rows first, then the rows from last to first.
template <typename scalar_t>
class BackwardVector {
  using acc_t = at::opmath_type<scalar_t>;

 public:
  BackwardVector(const Problem<scalar_t>& problem, const Gradients<scalar_t>& gradients)
      : p(problem),
        out_(gradients),
        state_(problem, problem.H),
        dg_(p.W),
        dh_row_(1, p.W, RADIUS),
        per_channel_(p.W),
        dpre_row_(p.W),
        weight_by_channel_(p.R),
        row_dstep_size_(p.R + 1),
        dstep_size_(p.R + 1) {}

  void start(int64_t n, int64_t group, Channels channels) {
    state_.start(n, channels);
    dtokens_ = out_.tokens.part(n, group);
    carry_ = dA_ = dD_ = Vec<acc_t>(0);
    dtaps_.fill(Vec<acc_t>(0));
    dstep_size_.zero();
    for (int64_t r = 0; r < p.R; ++r) {
      for (int64_t c = 0; c < LANES<acc_t>; ++c) {
        weight_by_channel_[0][c * p.R + r] = state_.weight[r][c];
      }
    }
  }

  [[gnu::flatten]] void scan_row(int64_t r) {
    state_.scan_row(r);
  }

  /// Gradients of g, C and the taps.
  void observe_backward_row(int64_t r) {
    correlate(r);
    with_count<acc_t>(state_.channels.count, [&](auto count) {
      add_channel_sums(per_channel_[0], p.W, count, token_sums(p.R + 1, r), !state_.channels.first_of_group);
    });
  }

  /// Gradients of all else. Rows r - RADIUS to r + RADIUS have been through `observe_backward_row`.
  void scan_backward_row(int64_t r) {
    dg_.fuse_row(r, p.H, state_.taps, dh_row_.row(0));

    // No fusion reads this row's padding any more: the column to its left takes the state before its first token.
    acc_t* h = state_.h.row(r);
    const acc_t* last_of_row_above = state_.h.row(std::max<int64_t>(r - 1, 0)) + (p.W - 1) * LANES<acc_t>;
    (r == 0 ? Vec<acc_t>(0) : Vec<acc_t>::loadu(last_of_row_above)).store(h - LANES<acc_t>);

    adjoint(r);
    with_count<acc_t>(state_.channels.count, [&](auto count) {
      add_channel_sums(per_channel_[0], p.W, count, token_sums(p.R, r), !state_.channels.first_of_group);
      add_channel_sums(dpre_row_[0], p.W, count, weight_by_channel_[0], p.R, token_sums(0, r), p.H * p.W, !state_.channels.first_of_group);
    });
  }

  /// Writes the sums over this image's tokens.
  void finish() const {
    acc_t* out = out_.parameters + state_.n * (TAPS + 3 + p.R) * p.E + state_.channels.first;
    const auto put = [&](const Vec<acc_t>& value) {
      store(out, value, state_.channels.count);
      out += p.E;
    };
    std::for_each(dtaps_.begin(), dtaps_.end(), put);
    put(dA_);
    put(dD_);
    for (int64_t r = 0; r < p.R + 1; ++r) {
      put(Vec<acc_t>::loadu(dstep_size_[r]));
    }
  }

 private:
  [[gnu::noinline, gnu::flatten]] void correlate(int64_t r) {
    const int64_t E = p.E;
    const acc_t* C = state_.token_row(p.C, r);
    const scalar_t* dy = state_.row(out_.dy, r);
    acc_t* dg = dg_.buffer().row(r);
    acc_t* dC = per_channel_[0];
    const acc_t* next_h = state_.h.row(std::max<int64_t>(r - RADIUS - 1, 0)); // row r - 1 will be the first to read it
    with_count<acc_t>(state_.channels.count, [&](auto count) {
      correlate_row(
          clamped_rows(state_.h, r, p.H), state_.taps, p.W,
          [&](int64_t column) {
            prefetch(dy + (column + PREFETCH_TOKENS) * E);
            prefetch(next_h + column * LANES<acc_t>);
            const Vec<acc_t> value = load(dy + column * E, count) * Vec<acc_t>(C[column]);
            value.store(dg + column * LANES<acc_t>);
            return value;
          },
          dtaps_,
          [&](int64_t column, const Vec<acc_t>& g) {
            (load(dy + column * E, count) * g).store(dC + column * LANES<acc_t>);
          });
    });
  }

  [[gnu::noinline, gnu::flatten]] void adjoint(int64_t r) {
    const int64_t E = p.E;
    const scalar_t* u = state_.row(p.u, r);
    const scalar_t* dy = state_.row(out_.dy, r);
    scalar_t* du = state_.row(out_.du, r);
    const acc_t* dh = dh_row_.row(0);
    const acc_t* h = state_.h.row(r);
    acc_t* dB = per_channel_[0];
    const Vec<acc_t> D = state_.D;
    row_dstep_size_.zero();
    with_count<acc_t>(state_.channels.count, [&](auto count) {
      Vec<acc_t> row_dD(0);
      adjoint_run(
          state_.scan_input(r, count, {dpre_row_[0], row_dstep_size_[0]}), p.W, carry_, dA_,
          [&](int64_t column) { return Vec<acc_t>::loadu(dh + column * LANES<acc_t>); },
          [&](int64_t column) { return Vec<acc_t>::loadu(h + (column - 1) * LANES<acc_t>); },
          [&](int64_t column, const TokenGradients<acc_t>& gradient) {
            prefetch(dy + (column - PREFETCH_TOKENS) * E);
            prefetch(du + (column - PREFETCH_TOKENS) * E);
            const Vec<acc_t> dy_t = load(dy + column * E, count);
            row_dD = at::vec::fmadd(dy_t, load(u + column * E, count), row_dD);
            gradient.dB.store(dB + column * LANES<acc_t>);
            store(du + column * E, at::vec::fmadd(dy_t, D, gradient.du), count);
          });
      dD_ = dD_ + row_dD;
    });
    dstep_size_.add(row_dstep_size_);
  }

  /// Row r of this task's sums over channels; `place` counts ddt's R values, dB and dC.
  acc_t* token_sums(int64_t place, int64_t r) const {
    return dtokens_ + (place * p.H + r) * p.W;
  }

  const Problem<scalar_t>& p;
  const Gradients<scalar_t>& out_;
  StateVector<scalar_t> state_;
  AdjointFusion<acc_t> dg_;
  RowBuffer<acc_t> dh_row_;
  LaneBuffer<acc_t> per_channel_; // W, what is to be summed over channels
  LaneBuffer<acc_t> dpre_row_; // W
  LaneBuffer<acc_t> weight_by_channel_; // (LANES, R)
  LaneBuffer<acc_t> row_dstep_size_, dstep_size_; // R of dt_weight, then dt_bias: of one row, of all
  acc_t* dtokens_ = nullptr;
  Vec<acc_t> carry_, dA_, dD_;
  TapVectors<acc_t> dtaps_;
};

at::Tensor structure_aware_ssm(
    const at::Tensor& u, const at::Tensor& dt, const at::Tensor& B, const at::Tensor& C, const at::Tensor& dt_weight,
    const at::Tensor& dt_bias, const at::Tensor& A, const at::Tensor& D, const at::Tensor& taps) {
  const Inputs inputs(u, dt, B, C, dt_weight, dt_bias, A, D, taps);
  at::Tensor y = empty_result(u.sizes(), u.options());
  map_pages(y);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, u.scalar_type(), "structure_aware_ssm", [&] {
    const auto p = inputs.problem<scalar_t>();
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    parallel_blocks<scalar_t>(
        p.N, p.E, [&] { return ForwardVector<scalar_t>(p, out); },
        [&](auto& vectors) {
          walk_rows(
              p.H, [&](int64_t r) { for (auto& v : vectors) v.scan_row(r); },
              [&](int64_t r) { for (auto& v : vectors) v.observe_row(r); });
        });
  });
  return y;
}

using NineTensors = std::tuple<
    at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

NineTensors structure_aware_ssm_backward(
    const at::Tensor& dy, const at::Tensor& u, const at::Tensor& dt, const at::Tensor& B, const at::Tensor& C,
    const at::Tensor& dt_weight, const at::Tensor& dt_bias, const at::Tensor& A, const at::Tensor& D,
    const at::Tensor& taps) {
  const Inputs inputs(u, dt, B, C, dt_weight, dt_bias, A, D, taps);
  check_tensor("dy", dy, u.sizes(), u.scalar_type());
  const at::Tensor dy_contiguous = dy.contiguous();
  const int64_t N = u.size(0), H = u.size(1), W = u.size(2), E = u.size(3), R = dt.size(3);
  at::Tensor du = at::empty(u.sizes(), u.options());
  map_pages(du);
  at::Tensor ddt = at::empty(dt.sizes(), u.options());
  at::Tensor dB = at::empty(B.sizes(), u.options());
  at::Tensor dC = at::empty(C.sizes(), u.options());
  at::Tensor dparameters = at::empty({N, TAPS + 3 + R, E}, A.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, u.scalar_type(), "structure_aware_ssm_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto p = inputs.problem<scalar_t>();
    const Gradients<scalar_t> gradients{
        dy_contiguous.const_data_ptr<scalar_t>(), du.mutable_data_ptr<scalar_t>(),
        TokenSums<acc_t>(N, channel_groups<scalar_t>(N, E), R + 2, H * W), dparameters.mutable_data_ptr<acc_t>()};
    parallel_blocks<scalar_t>(
        N, E, gradients.tokens.groups(), [&] { return BackwardVector<scalar_t>(p, gradients); },
        [&](auto& vectors) {
          for (int64_t r = 0; r < H; ++r) {
            for (auto& v : vectors) v.scan_row(r);
          }
          walk_rows(
              H, [&](int64_t r) { for (auto& v : vectors) v.observe_backward_row(H - 1 - r); },
              [&](int64_t r) { for (auto& v : vectors) v.scan_backward_row(H - 1 - r); });
          for (const auto& v : vectors) v.finish();
        });
    gradients.tokens.template write<scalar_t>(0, ddt);
    gradients.tokens.template write<scalar_t>(R, dB);
    gradients.tokens.template write<scalar_t>(R + 1, dC);
  });
  const at::Tensor parameters = dparameters.sum(0);
  return {
      du,
      ddt,
      dB,
      dC,
      parameters.narrow(0, TAPS + 2, R).t().contiguous(),
      parameters.select(0, TAPS + 2 + R).clone(),
      parameters.select(0, TAPS).clone(),
      parameters.select(0, TAPS + 1).clone(),
      parameters.narrow(0, 0, TAPS).clone()};
}

} // namespace

TORCH_LIBRARY_IMPL(mmspatialmamba, CPU, m) {
  m.impl("structure_aware_ssm", structure_aware_ssm);
  m.impl("structure_aware_ssm_backward", structure_aware_ssm_backward);
}

} // namespace mmspatialmamba
