// Vectors of channels: loads and stores with conversion, and the elementary functions of the scan.
//
// A kernel works on one vector of neighbouring channels at a time. The last one may be partial: `count` says how many
// lanes exist in memory; the others read as zero and are never written.
#pragma once

#include "compat.h"

#include <ATen/OpMathType.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace mmspatialmamba {

template <typename acc_t>
using Vec = at::vec::Vectorized<acc_t>;

template <typename acc_t>
constexpr int64_t LANES = Vec<acc_t>::size();

template <typename Work, int... indices>
[[gnu::always_inline]] inline void unroll(const Work& work, std::integer_sequence<int, indices...>) {
  (work(std::integral_constant<int, indices>{}), ...);
}

/// Calls `work(index)` for 0 to N - 1, each a compile-time constant.
template <int N, typename Work>
[[gnu::always_inline]] inline void unroll(const Work& work) {
  unroll(work, std::make_integer_sequence<int, N>{});
}

inline void load_full(const at::BFloat16* data, Vec<float>& value) {
  at::vec::load_fp32_from_bf16(data, value);
}

inline void load_full(const at::Half* data, Vec<float>& value) {
  at::vec::load_fp32_from_fp16(data, value);
}

/// Reads `count` values as the accumulation type of their type.
template <typename scalar_t, typename acc_t = at::opmath_type<scalar_t>>
inline Vec<acc_t> load(const scalar_t* data, int64_t count) {
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    return Vec<acc_t>::loadu(data, count);
  } else {
    alignas(64) scalar_t full[LANES<acc_t>];
    if (count < LANES<acc_t>) {
      std::memset(static_cast<void*>(full), 0, sizeof(full));
      std::memcpy(static_cast<void*>(full), data, count * sizeof(scalar_t));
      data = full;
    }
    Vec<acc_t> value;
    load_full(data, value);
    return value;
  }
}

/// Writes the first `count` lanes, rounded to the type of `data`.
template <typename scalar_t, typename acc_t = at::opmath_type<scalar_t>>
inline void store(scalar_t* data, const Vec<acc_t>& value, int64_t count) {
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    value.store(data, static_cast<int>(count));
  } else {
    rounded<scalar_t>(value).store(data, static_cast<int>(count));
  }
}

/// Tokens that a loop asks for ahead of their use. The channels of a block lie one cache line a token, E apart, which
/// the hardware does not foresee: without it the forward op takes 1.7 times as long.
constexpr int64_t PREFETCH_TOKENS = 16;

/// Asks for the cache line at an address, which may lie outside the tensor.
inline void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#endif
}

/// e^x to about 1 ulp; NaN stays NaN, results below 2^-126 are 0.
///
/// For float32 inlined, because a call into Sleef spills every vector register of the loop around it: with
/// n = round(x / ln 2) and r = x - n ln 2, e^x = 2^n (1 + r + r^2 Q(r)), Q the minimax polynomial on |r| <= ln 2 / 2
/// (relative error 3e-9).
template <typename acc_t>
inline Vec<acc_t> exp(Vec<acc_t> x) {
  if constexpr (std::is_same_v<acc_t, double>) {
    return x.exp();
  } else {
    using at::vec::fmadd;
    // Adding 1.5 * 2^23 rounds to an integer, and leaves n + 126, the exponent bits of 2^(n-1), in the lowest bits.
    const Vec<float> magic(12582912.f + 126.f);
    x = at::vec::clamp(x, Vec<float>(-87.3f), Vec<float>(89.f));
    const Vec<float> shifted = fmadd(x, Vec<float>(1.44269504f), magic);
    const Vec<float> n = shifted - magic;
    Vec<float> r = fmadd(n, Vec<float>(-0.693359375f), x);
    r = fmadd(n, Vec<float>(2.12194440e-4f), r);
    Vec<float> q(1.38146133e-3f);
    q = fmadd(q, r, Vec<float>(8.36870982e-3f));
    q = fmadd(q, r, Vec<float>(4.16683874e-2f));
    q = fmadd(q, r, Vec<float>(1.66665207e-1f));
    q = fmadd(q, r, Vec<float>(4.99999935e-1f));
    const Vec<float> power = fmadd(q, r * r, r) + Vec<float>(1.f);
    const Vec<float> half_scale =
        at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << at::vec::Vectorized<int32_t>(23));
    return (power + power) * half_scale;
  }
}

/// log(1 + t) for 0 <= t <= 1, to about 1 ulp. For float32 t + t^2 P(t), P minimax (relative error 7e-9).
template <typename acc_t>
inline Vec<acc_t> log1p_unit(Vec<acc_t> t) {
  if constexpr (std::is_same_v<acc_t, double>) {
    return t.log1p();
  } else {
    using at::vec::fmadd;
    const Vec<float> t2 = t * t;
    Vec<float> even(-3.67243399e-3f);
    even = fmadd(even, t2, Vec<float>(-6.08766850e-2f));
    even = fmadd(even, t2, Vec<float>(-1.55666789e-1f));
    even = fmadd(even, t2, Vec<float>(-2.49748894e-1f));
    even = fmadd(even, t2, Vec<float>(-4.99999993e-1f));
    Vec<float> odd(2.18522016e-2f);
    odd = fmadd(odd, t2, Vec<float>(1.10204535e-1f));
    odd = fmadd(odd, t2, Vec<float>(1.97732937e-1f));
    odd = fmadd(odd, t2, Vec<float>(3.33322296e-1f));
    return fmadd(fmadd(odd, t, even), t2, t);
  }
}

/// 1 / (1 + e^-x).
template <typename acc_t>
inline Vec<acc_t> sigmoid(const Vec<acc_t>& x) {
  return Vec<acc_t>(1) / (Vec<acc_t>(1) + exp<acc_t>(x.neg()));
}

/// softplus and its slope, the sigmoid.
template <typename acc_t>
struct Softplus {
  Vec<acc_t> value;
  Vec<acc_t> slope;
};

/// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|): no overflow, and no threshold above which it is cut off.
template <typename acc_t>
inline Softplus<acc_t> softplus(const Vec<acc_t>& x) {
  const Vec<acc_t> zero(0), one(1);
  const Vec<acc_t> t = exp<acc_t>(x.abs().neg());
  return {
      at::vec::clamp_min(x, zero) + log1p_unit<acc_t>(t),
      Vec<acc_t>::blendv(t, one, x >= zero) / (one + t),
  };
}

} // namespace mmspatialmamba
