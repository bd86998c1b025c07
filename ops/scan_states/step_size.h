// The step size Δ of a vector of channels: read, or computed from its low-rank form on the fly.
//
// Both classes have the same two members, so that the scan is written once:
//   tile<T>(token)                    Δ of T tokens, and what backward needs to know of them
//   backward<T>(token, tile, ddelta)  takes the gradient of those T step sizes
#pragma once

#include "../csrc/blocks.h"

namespace mmspatialmamba {

/// Δ is an input.
template <typename scalar_t, typename Count>
class GivenStepSize {
  using acc_t = at::opmath_type<scalar_t>;

 public:
  template <int T>
  struct Tile {
    Vec<acc_t> delta[T];
  };

  /// `delta`, and for backward `ddelta`, are (tokens, E), at the vector's first channel.
  GivenStepSize(const scalar_t* delta, scalar_t* ddelta, int64_t E, Count count)
      : delta_(delta), ddelta_(ddelta), E_(E), count_(count) {}

  template <int T>
  Tile<T> tile(int64_t token) const {
    Tile<T> tile;
    for (int i = 0; i < T; ++i) {
      prefetch(delta_ + (token + i + PREFETCH_TOKENS) * E_);
      tile.delta[i] = load(delta_ + (token + i) * E_, count_);
    }
    return tile;
  }

  template <int T>
  void backward(int64_t token, const Tile<T>&, const Vec<acc_t> (&ddelta)[T]) const {
    for (int i = 0; i < T; ++i) {
      store(ddelta_ + (token + i) * E_, ddelta[i], count_);
    }
  }

 private:
  const scalar_t* delta_;
  scalar_t* ddelta_;
  int64_t E_;
  Count count_;
};

/// What backward writes about Δ = softplus(dt · dt_weight + dt_bias), for one run of tokens.
template <typename acc_t>
struct LowRankGradients {
  acc_t* dpre = nullptr; // (tokens, LANES): gradient of what softplus is applied to
  acc_t* dparameters = nullptr; // (R + 1, LANES): gradients of dt_weight, transposed, and dt_bias, added to
};

/// Δ = softplus(pre), pre = dt · dt_weight + dt_bias.
template <typename acc_t>
class LowRankStepSize {
 public:
  template <int T>
  struct Tile {
    Vec<acc_t> delta[T];
    Vec<acc_t> slope[T];
  };

  /// Args:
  ///   dt: (tokens, R).
  ///   weight: (R, LANES), the vector's channels of dt_weight, transposed.
  ///   bias: the vector's channels of dt_bias.
  LowRankStepSize(
      const acc_t* dt, int64_t R, const acc_t* weight, Vec<acc_t> bias, LowRankGradients<acc_t> gradients)
      : dt_(dt), R_(R), weight_(weight), bias_(bias), gradients_(gradients) {}

  template <int T>
  Tile<T> tile(int64_t token) const {
    Vec<acc_t> pre[T];
    for (int i = 0; i < T; ++i) {
      pre[i] = bias_;
    }
    const acc_t* dt = dt_ + token * R_;
    for (int64_t r = 0; r < R_; ++r) {
      const auto weight = Vec<acc_t>::loadu(weight_ + r * LANES<acc_t>);
      for (int i = 0; i < T; ++i) {
        pre[i] = at::vec::fmadd(Vec<acc_t>(dt[i * R_ + r]), weight, pre[i]);
      }
    }
    Tile<T> tile;
    for (int i = 0; i < T; ++i) {
      const auto result = softplus<acc_t>(pre[i]);
      tile.delta[i] = result.value;
      tile.slope[i] = result.slope;
    }
    return tile;
  }

  template <int T>
  void backward(int64_t token, const Tile<T>& tile, const Vec<acc_t> (&ddelta)[T]) const {
    Vec<acc_t> dpre[T];
    for (int i = 0; i < T; ++i) {
      dpre[i] = ddelta[i] * tile.slope[i];
      dpre[i].store(gradients_.dpre + (token + i) * LANES<acc_t>);
    }
    const acc_t* dt = dt_ + token * R_;
    for (int64_t r = 0; r < R_; ++r) {
      acc_t* dweight = gradients_.dparameters + r * LANES<acc_t>;
      auto sum = Vec<acc_t>::loadu(dweight);
      for (int i = 0; i < T; ++i) {
        sum = at::vec::fmadd(Vec<acc_t>(dt[i * R_ + r]), dpre[i], sum);
      }
      sum.store(dweight);
    }
    acc_t* dbias = gradients_.dparameters + R_ * LANES<acc_t>;
    auto sum = Vec<acc_t>::loadu(dbias);
    for (int i = 0; i < T; ++i) {
      sum = sum + dpre[i];
    }
    sum.store(dbias);
  }

 private:
  const acc_t* dt_;
  int64_t R_;
  const acc_t* weight_;
  Vec<acc_t> bias_;
  LowRankGradients<acc_t> gradients_;
};

} // namespace mmspatialmamba
