// selective_scan: K scans over one map, each in an order of its own, summed, and the gradients.
//
// An order is a table of addresses, so that one loop walks along any of them. What belongs to a position and not to its
// channels, dt, B and C, is small: it is laid out once in the sequence of each order. One vector of channels takes one
// order after the other; the sum over orders stays in the accumulation type, (L, LANES), until the last.
#include "../csrc/channel_sums.h"
#include "../csrc/checks.h"
#include "../csrc/memory.h"
#include "../scan_states/step_size.h"
#include "orders.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

namespace mmspatialmamba {
namespace {

/// Tokens after which the next vector of a block takes its turn.
constexpr int64_t RUN = 128;
/// Tokens whose step sizes, decays and states backward holds: they fit into the first-level cache with one state.
constexpr int64_t CHUNK = 64;
/// Tokens whose step sizes are computed together.
constexpr int TILE = 4;

/// The op's inputs.
template <typename scalar_t>
struct Problem {
  using acc_t = at::opmath_type<scalar_t>;

  int64_t N, L, E, K, R, S;
  const scalar_t* u; // (N, L, E)
  const acc_t *dt, *B, *C; // (N, K, L, R), (N, K, L, S), (N, K, L, S), in the sequence of each order
  const acc_t* weight; // dt_weight, transposed: (K, R, E)
  const acc_t* bias; // (K, E)
  const acc_t* A; // transposed: (K, S, E)
  const acc_t* D; // (E), the sum over orders
  const Addresses& addresses;
};

/// Order k of x, (N, H, W, K, width), in its sequence and in the accumulation type: (N, K, L, width).
template <typename scalar_t>
at::Tensor in_sequence(const at::Tensor& x, const Addresses& addresses, at::ScalarType acc_dtype) {
  using acc_t = at::opmath_type<scalar_t>;
  const at::Tensor map = x.flatten(1, 2);
  const int64_t N = map.size(0), L = map.size(1), K = map.size(2), width = map.size(3);
  const int64_t image = map.stride(0), token = map.stride(1), order = map.stride(2), value = map.stride(3);
  at::Tensor out = at::empty({N, K, L, width}, x.options().dtype(acc_dtype));
  const scalar_t* source = map.const_data_ptr<scalar_t>();
  acc_t* sequences = out.mutable_data_ptr<acc_t>();
  constexpr int64_t TOKENS = 4096;
  const int64_t tasks = at::divup(L, TOKENS);
  at::parallel_for(0, N * K * tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / tasks / K, k = i / tasks % K, first = i % tasks * TOKENS;
      const int64_t* address = addresses.of(k);
      const scalar_t* from = source + n * image + k * order;
      acc_t* to = sequences + ((n * K + k) * L + first) * width;
      for (int64_t t = first; t < std::min(L, first + TOKENS); ++t) {
        for (int64_t j = 0; j < width; ++j) {
          *to++ = static_cast<acc_t>(from[address[t] * token + j * value]);
        }
      }
    }
  });
  return out;
}

/// The op's tensors, from which `Problem` points.
struct Inputs {
  at::Tensor u, dt, B, C, weight, bias, A, D;
  Addresses addresses;

  Inputs(
      const at::Tensor& u_in, const at::Tensor& dt_in, const at::Tensor& B_in, const at::Tensor& C_in,
      const at::Tensor& dt_weight, const at::Tensor& dt_bias, const at::Tensor& A_in, const at::Tensor& D_in,
      at::IntArrayRef orders) {
    check_map("u", u_in, 4);
    check_dim("dt", dt_in, 5);
    check_dim("B", B_in, 5);
    const int64_t N = u_in.size(0), H = u_in.size(1), W = u_in.size(2), E = u_in.size(3);
    const int64_t K = dt_in.size(3), R = dt_in.size(4), S = B_in.size(4);
    const auto dtype = u_in.scalar_type(), acc_dtype = at::toOpMathType(dtype);
    check_tensor("dt", dt_in, {N, H, W, K, R}, dtype);
    check_tensor("B", B_in, {N, H, W, K, S}, dtype);
    check_tensor("C", C_in, {N, H, W, K, S}, dtype);
    check_tensor("dt_weight", dt_weight, {K, E, R}, acc_dtype);
    check_tensor("dt_bias", dt_bias, {K, E}, acc_dtype);
    check_tensor("A", A_in, {K, E, S}, acc_dtype);
    check_tensor("D", D_in, {K, E}, acc_dtype);
    addresses = Addresses(orders, K, H * W);
    u = u_in.contiguous();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "selective_scan", [&] {
      dt = in_sequence<scalar_t>(dt_in, addresses, acc_dtype);
      B = in_sequence<scalar_t>(B_in, addresses, acc_dtype);
      C = in_sequence<scalar_t>(C_in, addresses, acc_dtype);
    });
    weight = dt_weight.transpose(1, 2).contiguous();
    bias = dt_bias.contiguous();
    A = A_in.transpose(1, 2).contiguous();
    D = D_in.sum(0);
  }

  template <typename scalar_t>
  Problem<scalar_t> problem() const {
    using acc_t = at::opmath_type<scalar_t>;
    return {u.size(0), addresses.positions(), u.size(3), dt.size(1), dt.size(3), B.size(3),
            u.const_data_ptr<scalar_t>(), dt.const_data_ptr<acc_t>(), B.const_data_ptr<acc_t>(),
            C.const_data_ptr<acc_t>(), weight.const_data_ptr<acc_t>(), bias.const_data_ptr<acc_t>(),
            A.const_data_ptr<acc_t>(), D.const_data_ptr<acc_t>(), addresses};
  }
};

/// One vector of channels of one image: the parameters of an order, and the states on their way along it.
template <typename scalar_t>
struct OrderVector {
  using acc_t = at::opmath_type<scalar_t>;

  const Problem<scalar_t>& p;
  int64_t n = 0, k = 0;
  Channels channels{};
  Vec<acc_t> bias, D;
  LaneBuffer<acc_t> weight, A, h; // R, S, S

  explicit OrderVector(const Problem<scalar_t>& problem) : p(problem), weight(p.R), A(p.S), h(p.S) {}

  void start(int64_t image, Channels image_channels) {
    n = image;
    channels = image_channels;
    D = of_channels(p.D);
  }

  void start_order(int64_t order) {
    k = order;
    bias = of_channels(p.bias + k * p.E);
    for (int64_t r = 0; r < p.R; ++r) {
      of_channels(p.weight + (k * p.R + r) * p.E).store(weight[r]);
    }
    for (int64_t s = 0; s < p.S; ++s) {
      of_channels(p.A + (k * p.S + s) * p.E).store(A[s]);
    }
    h.zero();
  }

  Vec<acc_t> of_channels(const acc_t* parameter) const {
    return load(parameter + channels.first, channels.count);
  }

  /// A map (N, L, E) at this image and these channels.
  template <typename T>
  T* map(T* tensor) const {
    return tensor + n * p.L * p.E + channels.first;
  }

  /// dt, B or C of this image and order from a token on, `width` values for each.
  const acc_t* sequence(const acc_t* tensor, int64_t token, int64_t width) const {
    return tensor + ((n * p.K + k) * p.L + token) * width;
  }

  LowRankStepSize<acc_t> step_size(int64_t token, LowRankGradients<acc_t> gradients = {}) const {
    return {sequence(p.dt, token, p.R), p.R, weight[0], bias, gradients};
  }
};

template <typename scalar_t>
class ForwardVector {
  using acc_t = at::opmath_type<scalar_t>;

 public:
  ForwardVector(const Problem<scalar_t>& problem, scalar_t* y) : p(problem), state_(problem), sum_(p.L), y_(y) {}

  void start(int64_t n, int64_t /*group*/, Channels channels) {
    state_.start(n, channels);
  }

  void start_order(int64_t k) {
    state_.start_order(k);
  }

  [[gnu::flatten]] void scan(int64_t begin, int64_t tokens) {
    with_count<acc_t>(state_.channels.count, [&](auto count) {
      with_flag(state_.k == 0, [&](auto first) {
        with_flag(state_.k == p.K - 1, [&](auto last) { run<first, last>(begin, tokens, count); });
      });
    });
  }

 private:
  template <bool first, bool last, typename Count>
  void run(int64_t begin, int64_t tokens, Count count) {
    int64_t token = 0;
    for (; token + TILE <= tokens; token += TILE) {
      tile<TILE, first, last>(begin, token, count);
    }
    for (; token < tokens; ++token) {
      tile<1, first, last>(begin, token, count);
    }
  }

  template <int T, bool first, bool last, typename Count>
  void tile(int64_t begin, int64_t token, Count count) {
    const int64_t* address = p.addresses.of(state_.k) + begin + token;
    const acc_t* B = state_.sequence(p.B, begin + token, p.S);
    const acc_t* C = state_.sequence(p.C, begin + token, p.S);
    const scalar_t* u = state_.map(p.u);
    const auto steps = state_.step_size(begin + token).template tile<T>(0);
    Vec<acc_t> delta_u[T], y[T];
    for (int i = 0; i < T; ++i) {
      prefetch(u + address[i + PREFETCH_TOKENS] * p.E);
      if (!first) {
        prefetch(sum_[address[i + PREFETCH_TOKENS]]);
      }
      const Vec<acc_t> u_t = load(u + address[i] * p.E, count);
      delta_u[i] = steps.delta[i] * u_t;
      y[i] = first ? state_.D * u_t : Vec<acc_t>::loadu(sum_[address[i]]);
    }
    for (int64_t s = 0; s < p.S; ++s) {
      const auto A = Vec<acc_t>::loadu(state_.A[s]);
      auto h = Vec<acc_t>::loadu(state_.h[s]);
      for (int i = 0; i < T; ++i) {
        h = at::vec::fmadd(exp<acc_t>(steps.delta[i] * A), h, delta_u[i] * Vec<acc_t>(B[i * p.S + s]));
        y[i] = at::vec::fmadd(Vec<acc_t>(C[i * p.S + s]), h, y[i]);
      }
      h.store(state_.h[s]);
    }
    for (int i = 0; i < T; ++i) {
      if (last) {
        store(state_.map(y_) + address[i] * p.E, y[i], count);
      } else {
        y[i].store(sum_[address[i]]);
      }
    }
  }

  const Problem<scalar_t>& p;
  OrderVector<scalar_t> state_;
  LaneBuffer<acc_t> sum_; // L, by address
  scalar_t* y_;
};

/// Where the gradients go. Sums over channels and images are kept apart for each task, to be added up in one order.
template <typename scalar_t>
struct Gradients {
  using acc_t = at::opmath_type<scalar_t>;

  const scalar_t* dy; // (N, L, E)
  scalar_t* du; // (N, L, E)
  TokenSums<acc_t> tokens; // of each order: ddt's R values, dB's S and dC's S, in its sequence
  acc_t* parameters; // (N, K, S + R + 1, E): dA and ddt_weight transposed, ddt_bias
  acc_t* dD; // (N, E)
};

/// One vector of channels of one image, backward. Along each order it keeps the states at the start of each chunk; then,
/// from the last chunk to the first, it computes those of the chunk again and goes through it backwards.
template <typename scalar_t>
class BackwardVector {
  using acc_t = at::opmath_type<scalar_t>;

 public:
  BackwardVector(const Problem<scalar_t>& problem, const Gradients<scalar_t>& gradients)
      : p(problem),
        out_(gradients),
        state_(problem),
        du_(p.L),
        starts_(at::divup(p.L, CHUNK) * p.S),
        delta_(CHUNK),
        slope_(CHUNK),
        decay_(p.S * CHUNK),
        h_(p.S * (CHUNK + 1)),
        dB_(p.S * CHUNK),
        dC_(p.S * CHUNK),
        dpre_(CHUNK),
        carry_(p.S),
        weight_by_channel_(p.R),
        chunk_sums_(p.S + p.R + 1),
        sums_(p.S + p.R + 1) {}

  void start(int64_t n, int64_t group, Channels channels) {
    state_.start(n, channels);
    group_ = group;
    dD_ = Vec<acc_t>(0);
  }

  void start_order(int64_t k) {
    state_.start_order(k);
    carry_.zero();
    sums_.zero();
    for (int64_t r = 0; r < p.R; ++r) {
      for (int64_t c = 0; c < LANES<acc_t>; ++c) {
        weight_by_channel_[0][c * p.R + r] = state_.weight[r][c];
      }
    }
  }

  /// Takes the states through a chunk.
  [[gnu::flatten]] void scan(int64_t begin, int64_t tokens) {
    const int64_t chunk = begin / CHUNK;
    for (int64_t s = 0; s < p.S; ++s) {
      Vec<acc_t>::loadu(state_.h[s]).store(starts_[chunk * p.S + s]);
    }
    with_count<acc_t>(state_.channels.count, [&](auto count) {
      for_tiles(tokens, [&](auto T, int64_t token) { advance<T, false>(begin, token, count); });
    });
  }

  /// Goes through a chunk backwards. Those behind it have been through this.
  void scan_backward(int64_t begin, int64_t tokens) {
    compute_again(begin, tokens);
    adjoint(begin, tokens);
    add_sums(begin, tokens);
  }

  /// Writes this order's sums over the image's tokens.
  void finish_order() const {
    acc_t* out = out_.parameters + (state_.n * p.K + state_.k) * (p.S + p.R + 1) * p.E + state_.channels.first;
    for (int64_t i = 0; i < p.S + p.R + 1; ++i) {
      store(out + i * p.E, Vec<acc_t>::loadu(sums_[i]), state_.channels.count);
    }
    if (state_.k == 0) {
      store(out_.dD + state_.n * p.E + state_.channels.first, dD_, state_.channels.count);
    }
  }

 private:
  /// Calls `work(T, token)` for tiles of T tokens, from the first to the last.
  template <typename Work>
  static void for_tiles(int64_t tokens, const Work& work) {
    int64_t token = 0;
    for (; token + TILE <= tokens; token += TILE) {
      work(std::integral_constant<int, TILE>{}, token);
    }
    for (; token < tokens; ++token) {
      work(std::integral_constant<int, 1>{}, token);
    }
  }

  template <int T, bool keep, typename Count>
  void advance(int64_t begin, int64_t token, Count count) {
    const int64_t* address = p.addresses.of(state_.k) + begin + token;
    const acc_t* B = state_.sequence(p.B, begin + token, p.S);
    const scalar_t* u = state_.map(p.u);
    const scalar_t* dy = state_.map(out_.dy);
    const auto steps = state_.step_size(begin + token).template tile<T>(0);
    Vec<acc_t> delta_u[T];
    for (int i = 0; i < T; ++i) {
      if (!keep) {
        prefetch(u + address[i + PREFETCH_TOKENS] * p.E);
      } else {
        // For the adjoint, which goes through this chunk next.
        prefetch(dy + address[i] * p.E);
        prefetch(du_[address[i]]);
        steps.delta[i].store(delta_[token + i]);
        steps.slope[i].store(slope_[token + i]);
      }
      delta_u[i] = steps.delta[i] * load(u + address[i] * p.E, count);
    }
    for (int64_t s = 0; s < p.S; ++s) {
      const auto A = Vec<acc_t>::loadu(state_.A[s]);
      auto h = Vec<acc_t>::loadu(state_.h[s]);
      for (int i = 0; i < T; ++i) {
        const auto decay = exp<acc_t>(steps.delta[i] * A);
        h = at::vec::fmadd(decay, h, delta_u[i] * Vec<acc_t>(B[i * p.S + s]));
        if (keep) {
          decay.store(decay_[s * CHUNK + token + i]);
          h.store(h_[s * (CHUNK + 1) + token + i + 1]);
        }
      }
      h.store(state_.h[s]);
    }
  }

  /// Step sizes, decays and states of a chunk.
  [[gnu::noinline, gnu::flatten]] void compute_again(int64_t begin, int64_t tokens) {
    for (int64_t s = 0; s < p.S; ++s) {
      const auto start = Vec<acc_t>::loadu(starts_[begin / CHUNK * p.S + s]);
      start.store(state_.h[s]);
      start.store(h_[s * (CHUNK + 1)]);
    }
    with_count<acc_t>(state_.channels.count, [&](auto count) {
      for_tiles(tokens, [&](auto T, int64_t token) { advance<T, true>(begin, token, count); });
    });
  }

  [[gnu::noinline, gnu::flatten]] void adjoint(int64_t begin, int64_t tokens) {
    // The sums over one chunk are added to the total at its end: this keeps the error of long sums in float32 small.
    chunk_sums_.zero();
    with_count<acc_t>(state_.channels.count, [&](auto count) {
      with_flag(state_.k == 0, [&](auto first) {
        with_flag(state_.k == p.K - 1, [&](auto last) {
          Vec<acc_t> dD(0);
          const int64_t whole = tokens / TILE * TILE;
          for (int64_t token = tokens - 1; token >= whole; --token) {
            retreat<1, first, last>(begin, token, dD, count);
          }
          for (int64_t token = whole - TILE; token >= 0; token -= TILE) {
            retreat<TILE, first, last>(begin, token, dD, count);
          }
          dD_ = dD_ + dD;
        });
      });
    });
    sums_.add(chunk_sums_);
  }

  template <int T, bool first, bool last, typename Count>
  void retreat(int64_t begin, int64_t token, Vec<acc_t>& dD, Count count) {
    const int64_t* address = p.addresses.of(state_.k) + begin + token;
    const acc_t* B = state_.sequence(p.B, begin + token, p.S);
    const acc_t* C = state_.sequence(p.C, begin + token, p.S);
    const scalar_t* u = state_.map(p.u);
    const scalar_t* dy = state_.map(out_.dy);
    typename LowRankStepSize<acc_t>::template Tile<T> steps;
    Vec<acc_t> u_t[T], dy_t[T], du[T], ddelta[T];
    const int64_t chunk_before = begin == 0 ? 0 : CHUNK;
    for (int i = 0; i < T; ++i) {
      prefetch(u + address[i - chunk_before] * p.E);
      steps.delta[i] = Vec<acc_t>::loadu(delta_[token + i]);
      steps.slope[i] = Vec<acc_t>::loadu(slope_[token + i]);
      u_t[i] = load(u + address[i] * p.E, count);
      dy_t[i] = load(dy + address[i] * p.E, count);
      du[i] = first ? state_.D * dy_t[i] : Vec<acc_t>::loadu(du_[address[i]]);
      ddelta[i] = Vec<acc_t>(0);
      if (first) {
        dD = at::vec::fmadd(dy_t[i], u_t[i], dD);
      }
    }
    for (int64_t s = 0; s < p.S; ++s) {
      const auto A = Vec<acc_t>::loadu(state_.A[s]);
      auto carry = Vec<acc_t>::loadu(carry_[s]);
      auto dA = Vec<acc_t>::loadu(chunk_sums_[s]);
      for (int i = T - 1; i >= 0; --i) {
        const Vec<acc_t> B_t(B[i * p.S + s]), C_t(C[i * p.S + s]);
        const auto decay = Vec<acc_t>::loadu(decay_[s * CHUNK + token + i]);
        const acc_t* h = h_[s * (CHUNK + 1) + token + i];
        const Vec<acc_t> decayed = decay * Vec<acc_t>::loadu(h);
        const Vec<acc_t> lambda = at::vec::fmadd(C_t, dy_t[i], carry);
        const Vec<acc_t> lambda_delta = lambda * steps.delta[i];
        ddelta[i] = at::vec::fmadd(lambda, at::vec::fmadd(A, decayed, B_t * u_t[i]), ddelta[i]);
        dA = at::vec::fmadd(lambda_delta, decayed, dA);
        du[i] = at::vec::fmadd(lambda_delta, B_t, du[i]);
        (lambda_delta * u_t[i]).store(dB_[s * CHUNK + token + i]);
        (dy_t[i] * Vec<acc_t>::loadu(h + LANES<acc_t>)).store(dC_[s * CHUNK + token + i]);
        carry = decay * lambda;
      }
      carry.store(carry_[s]);
      dA.store(chunk_sums_[s]);
    }
    state_.step_size(begin + token, {dpre_[token], chunk_sums_[p.S]}).template backward<T>(0, steps, ddelta);
    for (int i = 0; i < T; ++i) {
      if (last) {
        store(state_.map(out_.du) + address[i] * p.E, du[i], count);
      } else {
        du[i].store(du_[address[i]]);
      }
    }
  }

  /// Sums over these channels of what belongs to a position.
  [[gnu::noinline, gnu::flatten]] void add_sums(int64_t begin, int64_t tokens) {
    const int64_t first = state_.k * (p.R + 2 * p.S);
    const bool add = !state_.channels.first_of_group;
    const auto part = [&](int64_t value) { return out_.tokens.part(state_.n, group_, first + value) + begin; };
    with_count<acc_t>(state_.channels.count, [&](auto count) {
      add_channel_sums(dpre_[0], tokens, count, weight_by_channel_[0], p.R, part(0), p.L, add);
      for (int64_t s = 0; s < p.S; ++s) {
        add_channel_sums(dB_[s * CHUNK], tokens, count, part(p.R + s), add);
        add_channel_sums(dC_[s * CHUNK], tokens, count, part(p.R + p.S + s), add);
      }
    });
  }

  const Problem<scalar_t>& p;
  const Gradients<scalar_t>& out_;
  OrderVector<scalar_t> state_;
  LaneBuffer<acc_t> du_; // L, by address
  LaneBuffer<acc_t> starts_; // (chunks, S)
  LaneBuffer<acc_t> delta_, slope_; // CHUNK
  LaneBuffer<acc_t> decay_, h_; // (S, CHUNK), (S, CHUNK + 1): the state before each token, and after the last
  LaneBuffer<acc_t> dB_, dC_, dpre_; // (S, CHUNK), (S, CHUNK), CHUNK
  LaneBuffer<acc_t> carry_; // S: a λ of the token behind
  LaneBuffer<acc_t> weight_by_channel_; // (LANES, R)
  LaneBuffer<acc_t> chunk_sums_, sums_; // S of dA, R of dt_weight, dt_bias: of one chunk, of all
  int64_t group_ = 0;
  Vec<acc_t> dD_;
};

at::Tensor selective_scan(
    const at::Tensor& u, const at::Tensor& dt, const at::Tensor& B, const at::Tensor& C, const at::Tensor& dt_weight,
    const at::Tensor& dt_bias, const at::Tensor& A, const at::Tensor& D, at::IntArrayRef orders) {
  const Inputs inputs(u, dt, B, C, dt_weight, dt_bias, A, D, orders);
  at::Tensor y = empty_result(u.sizes(), u.options());
  map_pages(y);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, u.scalar_type(), "selective_scan", [&] {
    const auto p = inputs.problem<scalar_t>();
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    parallel_blocks<scalar_t>(
        p.N, p.E, [&] { return ForwardVector<scalar_t>(p, out); },
        [&](auto& vectors) {
          for (int64_t k = 0; k < p.K; ++k) {
            for (auto& v : vectors) v.start_order(k);
            for (int64_t t = 0; t < p.L; t += RUN) {
              for (auto& v : vectors) v.scan(t, std::min(RUN, p.L - t));
            }
          }
        });
  });
  return y;
}

using EightTensors = std::tuple<
    at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

EightTensors selective_scan_backward(
    const at::Tensor& dy, const at::Tensor& u, const at::Tensor& dt, const at::Tensor& B, const at::Tensor& C,
    const at::Tensor& dt_weight, const at::Tensor& dt_bias, const at::Tensor& A, const at::Tensor& D,
    at::IntArrayRef orders) {
  const Inputs inputs(u, dt, B, C, dt_weight, dt_bias, A, D, orders);
  check_tensor("dy", dy, u.sizes(), u.scalar_type());
  const at::Tensor dy_contiguous = dy.contiguous();
  const int64_t N = u.size(0), E = u.size(3), K = dt.size(3), R = dt.size(4), S = B.size(4);
  at::Tensor du = at::empty(u.sizes(), u.options());
  map_pages(du);
  at::Tensor ddt = at::empty(dt.sizes(), u.options());
  at::Tensor dB = at::empty(B.sizes(), u.options());
  at::Tensor dC = at::empty(C.sizes(), u.options());
  at::Tensor dparameters = at::empty({N, K, S + R + 1, E}, A.options());
  at::Tensor dD = at::empty({N, E}, A.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, u.scalar_type(), "selective_scan_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto p = inputs.problem<scalar_t>();
    const Gradients<scalar_t> gradients{
        dy_contiguous.const_data_ptr<scalar_t>(), du.mutable_data_ptr<scalar_t>(),
        TokenSums<acc_t>(N, channel_groups<scalar_t>(N, E), K * (R + 2 * S), p.L),
        dparameters.mutable_data_ptr<acc_t>(), dD.mutable_data_ptr<acc_t>()};
    parallel_blocks<scalar_t>(
        N, E, gradients.tokens.groups(), [&] { return BackwardVector<scalar_t>(p, gradients); },
        [&](auto& vectors) {
          for (int64_t k = 0; k < K; ++k) {
            for (auto& v : vectors) v.start_order(k);
            for (int64_t t = 0; t < p.L; t += CHUNK) {
              for (auto& v : vectors) v.scan(t, std::min(CHUNK, p.L - t));
            }
            for (int64_t t = (p.L - 1) / CHUNK * CHUNK; t >= 0; t -= CHUNK) {
              for (auto& v : vectors) v.scan_backward(t, std::min(CHUNK, p.L - t));
            }
            for (const auto& v : vectors) v.finish_order();
          }
        });
    for (int64_t k = 0; k < K; ++k) {
      const auto write = [&](int64_t first, const at::Tensor& out) {
        const int64_t width = out.size(4);
        gradients.tokens.template write<scalar_t>(k * (R + 2 * S) + first, width, out, [&](int64_t n, int64_t t) {
          return ((n * p.L + p.addresses.of(k)[t]) * K + k) * width;
        });
      };
      write(0, ddt);
      write(R, dB);
      write(R + S, dC);
    }
  });
  const at::Tensor parameters = dparameters.sum(0);
  const auto of_channels = [&](int64_t first, int64_t count) {
    return parameters.narrow(1, first, count).transpose(1, 2).contiguous();
  };
  return {
      du, ddt, dB, dC, of_channels(S, R), parameters.select(1, S + R).contiguous(), of_channels(0, S),
      dD.sum(0).expand({K, E}).contiguous()};
}

} // namespace

TORCH_LIBRARY_IMPL(mmspatialmamba, CPU, m) {
  m.impl("selective_scan.orders", selective_scan);
  m.impl("selective_scan_backward.orders", selective_scan_backward);
}

} // namespace mmspatialmamba
