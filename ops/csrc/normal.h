// The standard normal distribution, of which GELU is made: GELU(x) = x times its distribution function.
#pragma once

#include "vec.h"

namespace mmspatialmamba {

/// Standard normal distribution function and density.
template <typename acc_t>
struct Normal {
  Vec<acc_t> distribution;
  Vec<acc_t> density;
};

/// For float32 Abramowitz and Stegun, 7.1.26 (error 8e-8), whose e^(-x^2 / 2) is the density's too.
template <typename acc_t>
inline Normal<acc_t> normal(const Vec<acc_t>& x) {
  const Vec<acc_t> half(0.5), one(1);
  const Vec<acc_t> density_at_0(0.3989422804014327);
  if constexpr (std::is_same_v<acc_t, double>) {
    return {half + half * (x * Vec<double>(0.7071067811865476)).erf(), (x * x * half.neg()).exp() * density_at_0};
  } else {
    using at::vec::fmadd;
    // Below e^-80 the products with the polynomial would be denormal numbers, which are slow: there it is 0.
    const Vec<float> exponent = x * x * Vec<float>(-0.5f), lowest(-80.f);
    const Vec<float> power = exp<float>(at::vec::clamp_min(exponent, lowest));
    const Vec<float> e = Vec<float>::blendv(power, Vec<float>(0), exponent < lowest);
    const Vec<float> t = one / fmadd(x.abs(), Vec<float>(0.23164189f), one);
    Vec<float> q(0.5307027145f);
    q = fmadd(q, t, Vec<float>(-0.7265760135f));
    q = fmadd(q, t, Vec<float>(0.7107068705f));
    q = fmadd(q, t, Vec<float>(-0.142248368f));
    q = fmadd(q, t, Vec<float>(0.127414796f));
    const Vec<float> tail = q * t * e;
    return {Vec<float>::blendv(tail, one - tail, x >= Vec<float>(0)), e * density_at_0};
  }
}

} // namespace mmspatialmamba
