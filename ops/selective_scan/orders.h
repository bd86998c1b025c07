// Orders in which a scan visits the positions of a map, as tables of addresses in its row-major memory.
#pragma once

#include "../csrc/vec.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <vector>

namespace mmspatialmamba {

/// The addresses of K orders. An order is five integers: position t of line l is start + l * line + t * token, a line
/// has `length` positions, and with `turn` every second line is walked from its other end.
class Addresses {
 public:
  Addresses() = default;

  Addresses(at::IntArrayRef orders, int64_t K, int64_t positions)
      : positions_(positions) {
    TORCH_CHECK(
        K > 0 && static_cast<int64_t>(orders.size()) == INTEGERS * K, "orders must be ", INTEGERS,
        " integers for each of ", K, ", got ", orders.size());
    table_.reserve(K * row());
    for (int64_t k = 0; k < K; ++k) {
      const at::IntArrayRef order = orders.slice(k * INTEGERS, INTEGERS);
      TORCH_CHECK(
          visits_each_once(order), "each order must visit each of the ", positions, " positions once, got ", order);
      append(order);
    }
  }

  int64_t positions() const {
    return positions_;
  }

  /// The addresses of order k. They go on for PREFETCH_TOKENS past the last, with that one.
  const int64_t* of(int64_t k) const {
    return table_.data() + k * row();
  }

 private:
  static constexpr int64_t INTEGERS = 5;

  int64_t row() const {
    return positions_ + PREFETCH_TOKENS;
  }

  /// Two strides visit a range without gaps once each if one is 1 and the other as long as what that one covers.
  bool visits_each_once(at::IntArrayRef order) const {
    const int64_t length = order[3], turn = order[4];
    if (length < 1 || length > positions_ || positions_ % length || turn < 0 || turn > 1) {
      return false;
    }
    const int64_t lines = positions_ / length;
    const auto is = [](int64_t stride, int64_t count, int64_t size) {
      return count == 1 || stride == size || stride == -size;
    };
    const int64_t token = order[1], line = order[2];
    if (!(is(token, length, 1) && is(line, lines, length)) && !(is(line, lines, 1) && is(token, length, lines))) {
      return false;
    }
    const auto below = [](int64_t stride, int64_t count) { return count == 1 || stride > 0 ? 0 : stride * (count - 1); };
    return order[0] == -below(token, length) - below(line, lines);
  }

  void append(at::IntArrayRef order) {
    const int64_t start = order[0], token = order[1], line = order[2], length = order[3];
    const int64_t lines = positions_ / length;
    for (int64_t l = 0; l < lines; ++l) {
      const bool turned = order[4] && l % 2;
      for (int64_t t = 0; t < length; ++t) {
        table_.push_back(start + (lines > 1 ? l * line : 0) + (length > 1 ? (turned ? length - 1 - t : t) * token : 0));
      }
    }
    const int64_t last = table_.back();
    table_.insert(table_.end(), PREFETCH_TOKENS, last);
  }

  int64_t positions_ = 0;
  std::vector<int64_t> table_;
};

} // namespace mmspatialmamba
