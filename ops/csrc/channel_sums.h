// Sums over channels, the only place where the lanes of a vector meet.
#pragma once

#include "blocks.h"

#include <c10/util/Unroll.h>

namespace mmspatialmamba {

/// Transposes a square of vectors: lane j of vector i becomes lane i of vector j.
///
/// Each round rotates the address bits (i, j) of the elements by one; after log2(LANES) rounds i and j have changed
/// places.
template <typename acc_t>
inline void transpose(Vec<acc_t> (&rows)[LANES<acc_t>]) {
  constexpr int HALF = LANES<acc_t> / 2;
  for (int64_t round = 1; round < LANES<acc_t>; round *= 2) {
    Vec<acc_t> rotated[LANES<acc_t>];
    for (int i = 0; i < HALF; ++i) {
      std::tie(rotated[2 * i], rotated[2 * i + 1]) = at::vec::interleave2(rows[i], rows[i + HALF]);
    }
    std::copy(std::begin(rotated), std::end(rotated), std::begin(rows));
  }
}

/// sums[r * stride + t] += sum over channels of values[t][channel] * weight[channel][r]
///
/// Args:
///   values: (tokens, LANES), the channels of one vector; its first `count` lanes are summed.
///   weight: (LANES, R).
///   sums: R rows, `stride` apart, of `tokens` values.
template <typename acc_t>
inline void add_channel_sums(
    const acc_t* values, int64_t tokens, int64_t count, const acc_t* weight, int64_t R, acc_t* sums, int64_t stride) {
  for (int64_t t = 0; t < tokens; t += LANES<acc_t>) {
    const int64_t tile = std::min(LANES<acc_t>, tokens - t);
    Vec<acc_t> channel[LANES<acc_t>];
    for (int64_t i = 0; i < tile; ++i) {
      channel[i] = Vec<acc_t>::loadu(values + (t + i) * LANES<acc_t>);
    }
    transpose<acc_t>(channel);
    for (int64_t r = 0; r < R; ++r) {
      acc_t* out = sums + r * stride + t;
      Vec<acc_t> sum = Vec<acc_t>::loadu(out, tile);
      for (int64_t c = 0; c < count; ++c) {
        sum = at::vec::fmadd(channel[c], Vec<acc_t>(weight[c * R + r]), sum);
      }
      sum.store(out, tile);
    }
  }
}

/// sums[t] += sum over channels of values[t][channel]
template <typename acc_t>
inline void add_channel_sums(const acc_t* values, int64_t tokens, int64_t count, acc_t* sums) {
  alignas(64) acc_t ones[LANES<acc_t>];
  std::fill(std::begin(ones), std::end(ones), acc_t(1));
  add_channel_sums<acc_t>(values, tokens, count, ones, 1, sums, 0);
}

} // namespace mmspatialmamba
