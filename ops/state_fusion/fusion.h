// State fusion: each state becomes a weighted sum of 25 neighbours on the grid; and its adjoint.
#pragma once

#include "../csrc/blocks.h"

#include <array>

namespace mmspatialmamba {

constexpr int RADIUS = 5;
constexpr int TAPS = 25;

/// The seven rows that the taps read, relative to the output's. A tap names its row by its place in this list.
constexpr int ROW_OFFSETS[] = {-5, -3, -1, 0, 1, 3, 5};
constexpr int FUSION_ROWS = 7;
constexpr int CENTRE_ROW = 3;

struct Tap {
  int row; // relative to CENTRE_ROW in ROW_OFFSETS
  int column; // relative to the output's column
};

/// The centre, then the eight neighbours of each dilation: TAP_OFFSETS of state_fusion.py.
constexpr std::array<Tap, TAPS> tap_table() {
  std::array<Tap, TAPS> table{};
  int k = 1;
  for (int d = 1; d <= 3; ++d) {
    for (int y = -1; y <= 1; ++y) {
      for (int x = -1; x <= 1; ++x) {
        if (y != 0 || x != 0) {
          table[k++] = {d * y, (2 * d - 1) * x};
        }
      }
    }
  }
  return table;
}
constexpr std::array<Tap, TAPS> TAP_TABLE = tap_table();

/// Rows of vectors with `pad` more columns on each side, so that the taps need no branch at the borders.
///
/// Row r lies at place r modulo the capacity: with 2 RADIUS + 1 rows it is a ring that holds what one output row needs.
template <typename acc_t>
class RowBuffer {
 public:
  RowBuffer(int64_t capacity, int64_t columns, int64_t pad)
      : capacity_(capacity),
        stride_(columns + 2 * pad),
        pad_(pad),
        vectors_(capacity * stride_) {}

  void zero() {
    vectors_.zero();
  }

  /// Points to column 0.
  acc_t* row(int64_t r) const {
    return vectors_[(r % capacity_) * stride_ + pad_];
  }

 private:
  int64_t capacity_;
  int64_t stride_;
  int64_t pad_;
  LaneBuffer<acc_t> vectors_;
};

/// Copies the border columns of a row into `RADIUS` columns of padding on each side.
template <typename acc_t>
inline void replicate_columns(acc_t* row, int64_t W) {
  const auto left = Vec<acc_t>::loadu(row);
  const auto right = Vec<acc_t>::loadu(row + (W - 1) * LANES<acc_t>);
  for (int64_t x = 0; x < RADIUS; ++x) {
    left.store(row - (x + 1) * LANES<acc_t>);
    right.store(row + (W + x) * LANES<acc_t>);
  }
}

/// Adds `RADIUS` columns of padding on each side to the border columns: the adjoint of `replicate_columns`.
template <typename acc_t>
inline void fold_columns(acc_t* row, int64_t W) {
  for (int64_t x = 0; x < RADIUS; ++x) {
    (Vec<acc_t>::loadu(row) + Vec<acc_t>::loadu(row - (x + 1) * LANES<acc_t>)).store(row);
    acc_t* right = row + (W - 1) * LANES<acc_t>;
    (Vec<acc_t>::loadu(right) + Vec<acc_t>::loadu(row + (W + x) * LANES<acc_t>)).store(right);
  }
}

/// Column 0 of the seven rows that one output row reads, in the order of ROW_OFFSETS.
template <typename acc_t>
using FusionRows = std::array<const acc_t*, FUSION_ROWS>;

/// The rows that row r of a map of H rows reads: a row outside is clamped to the border.
template <typename acc_t>
inline FusionRows<acc_t> clamped_rows(const RowBuffer<acc_t>& buffer, int64_t r, int64_t H) {
  FusionRows<acc_t> rows;
  for (int i = 0; i < FUSION_ROWS; ++i) {
    rows[i] = buffer.row(std::clamp<int64_t>(r + ROW_OFFSETS[i], 0, H - 1));
  }
  return rows;
}

template <typename acc_t>
using TapVectors = std::array<Vec<acc_t>, TAPS>;

/// Reads one vector of channels of the taps, (TAPS, E).
template <typename acc_t>
inline TapVectors<acc_t> load_taps(const acc_t* taps, int64_t E, Channels channels) {
  TapVectors<acc_t> vectors;
  for (int k = 0; k < TAPS; ++k) {
    vectors[k] = load(taps + k * E + channels.first, channels.count);
  }
  return vectors;
}

/// Whether a tap reads at its offset (fusion) or at the opposite one (adjoint).
enum Direction : int { FORWARD = 1, ADJOINT = -1 };

/// Columns that are fused together: one load of a tap serves them all.
constexpr int FUSION_TILE = 4;

template <Direction direction, int T, typename acc_t, typename Sink>
inline void fuse_tile(const FusionRows<acc_t>& rows, const TapVectors<acc_t>& taps, int64_t column, const Sink& sink) {
  Vec<acc_t> g[T];
  for (int i = 0; i < T; ++i) {
    g[i] = Vec<acc_t>(0);
  }
  unroll<TAPS>([&](auto k) {
    constexpr Tap tap = TAP_TABLE[k];
    const acc_t* row = rows[CENTRE_ROW + direction * tap.row] + (column + direction * tap.column) * LANES<acc_t>;
    for (int i = 0; i < T; ++i) {
      g[i] = at::vec::fmadd(taps[k], Vec<acc_t>::loadu(row + i * LANES<acc_t>), g[i]);
    }
  });
  for (int i = 0; i < T; ++i) {
    sink(column + i, g[i]);
  }
}

/// Calls `sink(column, sum_k taps_k * rows[at tap k])` for columns [begin, end) of one row.
template <Direction direction, typename acc_t, typename Sink>
inline void fuse_row(
    const FusionRows<acc_t>& rows, const TapVectors<acc_t>& taps, int64_t begin, int64_t end, const Sink& sink) {
  const FusionRows<acc_t> local_rows = rows;
  const TapVectors<acc_t> local_taps = taps;
  int64_t column = begin;
  for (; column + FUSION_TILE <= end; column += FUSION_TILE) {
    fuse_tile<direction, FUSION_TILE>(local_rows, local_taps, column, sink);
  }
  for (; column < end; ++column) {
    fuse_tile<direction, 1>(local_rows, local_taps, column, sink);
  }
}

/// The adjoint of fusion: a ring of rows of dg, and dh of a row from it.
///
/// Along the columns the convolution runs beyond both borders, over columns of zeros, and what it yields there is
/// folded back. Along the rows the sum over the outputs that were clamped to a border row is taken first, which costs nothing
/// but at the border.
template <typename acc_t>
class AdjointFusion {
 public:
  explicit AdjointFusion(int64_t W) : W_(W), dg_(2 * RADIUS + 1, W, PAD), sums_(FUSION_ROWS, W, PAD), zero_(1, W, PAD) {
    dg_.zero();
    zero_.zero();
  }

  /// The rows of dg: row r needs r - RADIUS to r + RADIUS.
  const RowBuffer<acc_t>& buffer() const {
    return dg_;
  }

  /// Writes row r of dh, of a map of H rows. The output has RADIUS columns of padding, which are overwritten.
  [[gnu::noinline, gnu::flatten]] void fuse_row(int64_t r, int64_t H, const TapVectors<acc_t>& taps, acc_t* dh) const {
    mmspatialmamba::fuse_row<ADJOINT>(rows(r, H), taps, -RADIUS, W_ + RADIUS, [&](int64_t column, const auto& value) {
      value.store(dh + column * LANES<acc_t>);
    });
    fold_columns(dh, W_);
  }

 private:
  static constexpr int64_t PAD = 2 * RADIUS;

  /// For each row offset the sum of the rows q of dg with clamp(q + offset) = r: one inside, several at the border.
  FusionRows<acc_t> rows(int64_t r, int64_t H) const {
    FusionRows<acc_t> rows;
    for (int i = 0; i < FUSION_ROWS; ++i) {
      // In the order of the rows that the adjoint reads: the opposite of the forward offsets.
      const int64_t q = r + ROW_OFFSETS[i];
      const int64_t first = r == 0 ? 0 : std::max<int64_t>(0, q);
      const int64_t last = r == H - 1 ? H - 1 : std::min(H - 1, q);
      if (first > last) {
        rows[i] = zero_.row(0);
      } else if (first == last) {
        rows[i] = dg_.row(first);
      } else {
        rows[i] = sums_.row(i);
        sum_rows(first, last, sums_.row(i));
      }
    }
    return rows;
  }

  void sum_rows(int64_t first, int64_t last, acc_t* out) const {
    for (int64_t x = -PAD * LANES<acc_t>; x < (W_ + PAD) * LANES<acc_t>; x += LANES<acc_t>) {
      Vec<acc_t> sum(0);
      for (int64_t q = first; q <= last; ++q) {
        sum = sum + Vec<acc_t>::loadu(dg_.row(q) + x);
      }
      sum.store(out + x);
    }
  }

  int64_t W_;
  RowBuffer<acc_t> dg_, sums_, zero_;
};

template <int T, typename acc_t, typename Gradient, typename Sink>
inline void correlate_tile(
    const FusionRows<acc_t>& rows, const TapVectors<acc_t>& taps, int64_t column, const Gradient& gradient,
    TapVectors<acc_t>& sums, const Sink& sink) {
  Vec<acc_t> dg[T], g[T];
  for (int i = 0; i < T; ++i) {
    dg[i] = gradient(column + i);
    g[i] = Vec<acc_t>(0);
  }
  unroll<TAPS>([&](auto k) {
    constexpr Tap tap = TAP_TABLE[k];
    const acc_t* row = rows[CENTRE_ROW + tap.row] + (column + tap.column) * LANES<acc_t>;
    Vec<acc_t> sum = sums[k];
    for (int i = 0; i < T; ++i) {
      const auto h = Vec<acc_t>::loadu(row + i * LANES<acc_t>);
      g[i] = at::vec::fmadd(taps[k], h, g[i]);
      sum = at::vec::fmadd(dg[i], h, sum);
    }
    sums[k] = sum;
  });
  for (int i = 0; i < T; ++i) {
    sink(column + i, g[i]);
  }
}

/// Gradient of the taps, and the fusion once more, over the columns of one row.
///
/// Adds the sums over columns of `gradient(column) * rows[at tap k]` to `dtaps`; calls `sink` as `fuse_row` does.
template <typename acc_t, typename Gradient, typename Sink>
inline void correlate_row(
    const FusionRows<acc_t>& rows, const TapVectors<acc_t>& taps, int64_t W, const Gradient& gradient,
    TapVectors<acc_t>& dtaps, const Sink& sink) {
  // The sum over one row is added to the total at its end: this keeps the error of long sums in float32 small.
  // Zeros by name: the constructor of a vector leaves its register as it is before PyTorch 2.9.
  TapVectors<acc_t> sums;
  sums.fill(Vec<acc_t>(0));
  const FusionRows<acc_t> local_rows = rows;
  const TapVectors<acc_t> local_taps = taps;
  int64_t column = 0;
  for (; column + FUSION_TILE <= W; column += FUSION_TILE) {
    correlate_tile<FUSION_TILE>(local_rows, local_taps, column, gradient, sums, sink);
  }
  for (; column < W; ++column) {
    correlate_tile<1>(local_rows, local_taps, column, gradient, sums, sink);
  }
  for (int k = 0; k < TAPS; ++k) {
    dtaps[k] = dtaps[k] + sums[k];
  }
}

/// Walks the rows of a map from first to last: `fill(r)` once for each row, in order, and `use(r)` as soon as the
/// RADIUS rows after r are filled.
template <typename Fill, typename Use>
inline void walk_rows(int64_t H, const Fill& fill, const Use& use) {
  for (int64_t r = 0; r < H + RADIUS; ++r) {
    if (r < H) {
      fill(r);
    }
    if (r >= RADIUS) {
      use(r - RADIUS);
    }
  }
}

} // namespace mmspatialmamba
