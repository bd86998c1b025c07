// The scan h_t = a_t h_{t-1} + Δ_t B_t u_t, a_t = exp(Δ_t A), and its adjoint, for one vector of channels.
#pragma once

#include "../csrc/vec.h"

namespace mmspatialmamba {

/// Tokens whose step sizes and decays are computed together: they do not depend on each other, only the state does.
constexpr int SCAN_TILE = 4;

/// One run of tokens of one vector of channels: what the scan reads.
template <typename scalar_t, typename StepSize, typename Count>
struct ScanInput {
  using acc_t = at::opmath_type<scalar_t>;

  StepSize step_size;
  const scalar_t* u; // (tokens, E), at the vector's first channel
  const acc_t* B; // (tokens)
  Vec<acc_t> A;
  int64_t E;
  Count count; // as in `with_count`
};

template <int T, typename scalar_t, typename StepSize, typename Count, typename Sink,
          typename acc_t = at::opmath_type<scalar_t>>
inline void scan_tile(
    const ScanInput<scalar_t, StepSize, Count>& in, int64_t token, Vec<acc_t>& carry, const Sink& sink) {
  const auto steps = in.step_size.template tile<T>(token);
  Vec<acc_t> a[T], b[T];
  for (int i = 0; i < T; ++i) {
    a[i] = exp<acc_t>(steps.delta[i] * in.A);
    prefetch(in.u + (token + i + PREFETCH_TOKENS) * in.E);
    b[i] = steps.delta[i] * Vec<acc_t>(in.B[token + i]) * load(in.u + (token + i) * in.E, in.count);
  }
  for (int i = 0; i < T; ++i) {
    carry = at::vec::fmadd(a[i], carry, b[i]);
    sink(token + i, carry);
  }
}

/// Scans a run from the state `carry` before its first token, which becomes the state after its last.
///
/// Calls `sink(token, h)` for each token.
template <typename scalar_t, typename StepSize, typename Count, typename Sink,
          typename acc_t = at::opmath_type<scalar_t>>
inline void scan_run(
    const ScanInput<scalar_t, StepSize, Count>& in, int64_t tokens, Vec<acc_t>& carry, const Sink& sink) {
  Vec<acc_t> h = carry;
  int64_t token = 0;
  for (; token + SCAN_TILE <= tokens; token += SCAN_TILE) {
    scan_tile<SCAN_TILE>(in, token, h, sink);
  }
  for (; token < tokens; ++token) {
    scan_tile<1>(in, token, h, sink);
  }
  carry = h;
}

/// Gradients of one token's inputs, from the adjoint scan.
template <typename acc_t>
struct TokenGradients {
  Vec<acc_t> du;
  Vec<acc_t> dB; // to be summed over channels
};

template <int T, typename scalar_t, typename StepSize, typename Count, typename Dh, typename State, typename Sink,
          typename acc_t = at::opmath_type<scalar_t>>
inline void adjoint_tile(
    const ScanInput<scalar_t, StepSize, Count>& in, int64_t token, Vec<acc_t>& carry, Vec<acc_t>& dA, const Dh& dh,
    const State& state_before, const Sink& sink) {
  const auto steps = in.step_size.template tile<T>(token);
  Vec<acc_t> a[T], ddelta[T];
  for (int i = 0; i < T; ++i) {
    a[i] = exp<acc_t>(steps.delta[i] * in.A);
  }
  for (int i = T - 1; i >= 0; --i) {
    prefetch(in.u + (token + i - PREFETCH_TOKENS) * in.E);
    const Vec<acc_t> u = load(in.u + (token + i) * in.E, in.count);
    const Vec<acc_t> B(in.B[token + i]);
    const Vec<acc_t> lambda = dh(token + i) + carry;
    const Vec<acc_t> lambda_delta = lambda * steps.delta[i];
    const Vec<acc_t> decayed = a[i] * state_before(token + i);
    ddelta[i] = lambda * at::vec::fmadd(in.A, decayed, B * u);
    dA = at::vec::fmadd(lambda_delta, decayed, dA);
    sink(token + i, TokenGradients<acc_t>{lambda_delta * B, lambda_delta * u});
    carry = a[i] * lambda;
  }
  in.step_size.backward(token, steps, ddelta);
}

/// Runs the adjoint state λ_t = dh_t + a_{t+1} λ_{t+1} backwards over a run.
///
/// Args:
///   carry: a λ of the token after the run's last, 0 behind the end of the sequence; becomes that of the run's first.
///   dA: the gradient of A, which the run adds to.
///   dh: dh(token), the gradient of the state.
///   state_before: state_before(token), h of the token before.
///   sink: sink(token, TokenGradients), called for the tokens in descending order.
template <typename scalar_t, typename StepSize, typename Count, typename Dh, typename State, typename Sink,
          typename acc_t = at::opmath_type<scalar_t>>
inline void adjoint_run(
    const ScanInput<scalar_t, StepSize, Count>& in, int64_t tokens, Vec<acc_t>& carry, Vec<acc_t>& dA, const Dh& dh,
    const State& state_before, const Sink& sink) {
  // The sum over one run is added to the total at its end: this keeps the error of long sums in float32 small.
  Vec<acc_t> a_lambda = carry, run_dA(0);
  int64_t token = tokens;
  for (; token - SCAN_TILE >= 0; token -= SCAN_TILE) {
    adjoint_tile<SCAN_TILE>(in, token - SCAN_TILE, a_lambda, run_dA, dh, state_before, sink);
  }
  for (; token > 0; --token) {
    adjoint_tile<1>(in, token - 1, a_lambda, run_dA, dh, state_before, sink);
  }
  carry = a_lambda;
  dA = dA + run_dA;
}

} // namespace mmspatialmamba
