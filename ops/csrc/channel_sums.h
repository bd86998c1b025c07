// Sums over channels, the only place where the lanes of a vector meet.
#pragma once

#include "blocks.h"

#include <tuple>

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

/// The sums of ROWS neighbouring values of r below, of the first `tile` lanes. Several at a time, because each is a chain
/// of additions that wait for one another.
template <int ROWS, typename acc_t, typename Count>
inline void add_weighted_channels(
    const Vec<acc_t> (&channel)[LANES<acc_t>], int64_t tile, Count count, const acc_t* weight, int64_t R, acc_t* sums,
    int64_t stride, bool add) {
  Vec<acc_t> sum[ROWS];
  for (int i = 0; i < ROWS; ++i) {
    sum[i] = add ? Vec<acc_t>::loadu(sums + i * stride, tile) : Vec<acc_t>(0);
  }
#pragma GCC unroll 16
  for (int64_t c = 0; c < count; ++c) {
    for (int i = 0; i < ROWS; ++i) {
      sum[i] = at::vec::fmadd(channel[c], Vec<acc_t>(weight[c * R + i]), sum[i]);
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    sum[i].store(sums + i * stride, tile);
  }
}

/// sums[r * stride + t] = sum over channels of values[t][channel] * weight[channel][r]
///
/// Args:
///   values: (tokens, LANES), the channels of one vector; its first `count` lanes (as in `with_count`) are summed.
///   weight: (LANES, R).
///   sums: R rows, `stride` apart, of `tokens` values.
///   add: To the values of `sums`, in place of writing these for the first time.
template <typename acc_t, typename Count>
inline void add_channel_sums(
    const acc_t* values, int64_t tokens, Count count, const acc_t* weight, int64_t R, acc_t* sums, int64_t stride,
    bool add) {
  for (int64_t t = 0; t < tokens; t += LANES<acc_t>) {
    const int64_t tile = std::min(LANES<acc_t>, tokens - t);
    Vec<acc_t> channel[LANES<acc_t>];
    for (int64_t i = 0; i < tile; ++i) {
      channel[i] = Vec<acc_t>::loadu(values + (t + i) * LANES<acc_t>);
    }
    std::fill(channel + tile, std::end(channel), Vec<acc_t>(0));
    transpose<acc_t>(channel);
    int64_t r = 0;
    for (; r + 4 <= R; r += 4) {
      add_weighted_channels<4>(channel, tile, count, weight + r, R, sums + r * stride + t, stride, add);
    }
    for (; r < R; ++r) {
      add_weighted_channels<1>(channel, tile, count, weight + r, R, sums + r * stride + t, stride, add);
    }
  }
}

/// sums[t] = sum over channels of values[t][channel]; `add` as above.
///
/// A tree of sums of neighbours: each round halves the number of vectors, and the lanes that one token has. It takes a
/// third of the instructions of the sum with weights.
template <typename acc_t, typename Count>
inline void add_channel_sums(const acc_t* values, int64_t tokens, Count count, acc_t* sums, bool add) {
  for (int64_t t = 0; t < tokens; t += LANES<acc_t>) {
    const int64_t tile = std::min(LANES<acc_t>, tokens - t);
    Vec<acc_t> sum[LANES<acc_t>];
    for (int64_t i = 0; i < tile; ++i) {
      sum[i] = load(values + (t + i) * LANES<acc_t>, count);
    }
    std::fill(sum + tile, std::end(sum), Vec<acc_t>(0));
    for (int64_t vectors = LANES<acc_t> / 2; vectors > 0; vectors /= 2) {
      for (int64_t i = 0; i < vectors; ++i) {
        const auto [even, odd] = at::vec::deinterleave2(sum[2 * i], sum[2 * i + 1]);
        sum[i] = even + odd;
      }
    }
    (add ? Vec<acc_t>::loadu(sums + t, tile) + sum[0] : sum[0]).store(sums + t, tile);
  }
}

/// Sums over channels of all images: one partial sum a group of channels, which `write` adds up in the groups' order.
/// They are not set to 0: that would take their memory from the system, and through the caches, a second time.
template <typename acc_t>
class TokenSums {
 public:
  /// Each token has `values` sums.
  TokenSums(int64_t N, int64_t groups, int64_t values, int64_t L)
      : N_(N), groups_(groups), values_(values), L_(L), parts_(at::divup(N * groups * values * L, LANES<acc_t>)) {}

  int64_t groups() const {
    return groups_;
  }

  /// The sums of one value of a group's channels, (L); those of the next value follow.
  acc_t* part(int64_t n, int64_t group, int64_t value = 0) const {
    return parts_[0] + ((n * groups_ + group) * values_ + value) * L_;
  }

  /// out[n][t][i] = value first + i of token t of image n, for i below the last dimension of `out`, (N, ..., values).
  template <typename scalar_t>
  void write(int64_t first, const at::Tensor& out) const {
    const int64_t width = out.size(-1);
    write<scalar_t>(first, width, out, [&](int64_t n, int64_t t) { return (n * L_ + t) * width; });
  }

  /// The same for `width` values of each token, which go to where `place(n, t)` says, as an offset in `out`.
  template <typename scalar_t, typename Place>
  void write(int64_t first, int64_t width, const at::Tensor& out, const Place& place) const {
    scalar_t* data = out.mutable_data_ptr<scalar_t>();
    constexpr int64_t TILE = 64;
    at::parallel_for(0, N_ * width, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / width;
        const int64_t i = task % width;
        for (int64_t first_token = 0; first_token < L_; first_token += TILE) {
          const int64_t tile = std::min(TILE, L_ - first_token);
          acc_t sums[TILE] = {};
          for (int64_t group = 0; group < groups_; ++group) {
            const acc_t* values = part(n, group, first + i) + first_token;
            for (int64_t t = 0; t < tile; ++t) {
              sums[t] += values[t];
            }
          }
          for (int64_t t = 0; t < tile; ++t) {
            data[place(n, first_token + t) + i] = static_cast<scalar_t>(sums[t]);
          }
        }
      }
    });
  }

 private:
  int64_t N_, groups_, values_, L_;
  LaneBuffer<acc_t> parts_;
};

} // namespace mmspatialmamba
