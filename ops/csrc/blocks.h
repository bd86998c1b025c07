// How the work is cut: images x blocks of channels.
#pragma once

#include "vec.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

namespace mmspatialmamba {

/// Bytes of one block's channels in one token: a cache line, so that no two threads write to the same one.
constexpr int64_t BLOCK_BYTES = 64;

template <typename scalar_t>
constexpr int64_t BLOCK_VECTORS =
    std::max<int64_t>(1, BLOCK_BYTES / (sizeof(scalar_t) * LANES<at::opmath_type<scalar_t>>));

template <typename scalar_t>
constexpr int64_t BLOCK_CHANNELS = BLOCK_VECTORS<scalar_t> * LANES<at::opmath_type<scalar_t>>;

/// Neighbouring channels in the lanes of one vector. `count` is below LANES at the end of E, and 0 beyond it: such a
/// vector reads zeros and writes nothing. A group's first vector writes the sums to which the others add.
struct Channels {
  int64_t first;
  int64_t count;
  bool first_of_group;
};

template <typename acc_t>
inline Channels channels_from(int64_t first, int64_t E, bool first_of_group) {
  first = std::min(first, E);
  return {first, std::min(LANES<acc_t>, E - first), first_of_group};
}

template <typename scalar_t>
inline int64_t channel_blocks(int64_t E) {
  return at::divup(E, BLOCK_CHANNELS<scalar_t>);
}

/// Calls `work(count)`, with a compile-time constant for a full vector: a branch at each load and store would keep the
/// compiler from holding tiles of tokens in registers.
template <typename acc_t, typename Work>
inline void with_count(int64_t count, const Work& work) {
  if (count == LANES<acc_t>) {
    work(std::integral_constant<int64_t, LANES<acc_t>>{});
  } else {
    work(count);
  }
}

/// Calls `work(flag)` with a compile-time constant.
template <typename Work>
inline void with_flag(bool flag, const Work& work) {
  if (flag) {
    work(std::true_type{});
  } else {
    work(std::false_type{});
  }
}

/// Calls `work(first, count)` for each vector of channels; `count` as in `with_count`.
template <typename acc_t, typename Work>
inline void for_vectors(int64_t E, const Work& work) {
  int64_t first = 0;
  for (; first + LANES<acc_t> <= E; first += LANES<acc_t>) {
    work(first, std::integral_constant<int64_t, LANES<acc_t>>{});
  }
  if (first < E) {
    work(first, E - first);
  }
}

/// Blocks of channels are taken in turn by `groups` tasks an image, none of which is without one. The number depends on
/// the shape only, so that sums over channels have one order whatever the number of threads.
template <typename scalar_t>
inline int64_t channel_groups(int64_t N, int64_t E) {
  constexpr int64_t TASKS = 16;
  const int64_t blocks = channel_blocks<scalar_t>(E);
  return at::divup(blocks, at::divup(blocks, std::min(blocks, at::divup(TASKS, std::max<int64_t>(N, 1)))));
}

/// Runs all blocks of channels of all images in parallel.
///
/// Each thread builds one worker per vector of a block with `make()`. For each block of its tasks it calls
/// `worker.start(n, group, channels)` on all workers and `walk(workers)`.
template <typename scalar_t, typename Make, typename Walk>
inline void parallel_blocks(int64_t N, int64_t E, int64_t groups, const Make& make, const Walk& walk) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t blocks = channel_blocks<scalar_t>(E);
  const int64_t blocks_per_group = at::divup(blocks, groups);
  at::parallel_for(0, N * groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<decltype(make())> workers;
    for (int64_t v = 0; v < BLOCK_VECTORS<scalar_t>; ++v) {
      workers.push_back(make());
    }
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / groups;
      const int64_t group = task % groups;
      const int64_t first_block = group * blocks_per_group;
      const int64_t last = std::min(blocks, first_block + blocks_per_group);
      for (int64_t block = first_block; block < last; ++block) {
        int64_t first = block * BLOCK_CHANNELS<scalar_t>;
        for (auto& worker : workers) {
          worker.start(n, group, channels_from<acc_t>(first, E, first == first_block * BLOCK_CHANNELS<scalar_t>));
          first += LANES<acc_t>;
        }
        walk(workers);
      }
    }
  });
}

/// The same without groups: each block of channels is a task of its own.
template <typename scalar_t, typename Make, typename Walk>
inline void parallel_blocks(int64_t N, int64_t E, const Make& make, const Walk& walk) {
  parallel_blocks<scalar_t>(N, E, channel_blocks<scalar_t>(E), make, walk);
}

/// Working memory of one thread: vectors, uninitialised.
template <typename acc_t>
class LaneBuffer {
 public:
  explicit LaneBuffer(int64_t vectors)
      : storage_(at::empty({vectors * LANES<acc_t>}, c10::CppTypeToScalarType<acc_t>::value)),
        data_(storage_.template mutable_data_ptr<acc_t>()) {}

  acc_t* operator[](int64_t vector) const {
    return data_ + vector * LANES<acc_t>;
  }

  void zero() {
    std::fill_n(data_, storage_.numel(), acc_t(0));
  }

  void add(const LaneBuffer& other) {
    for (int64_t i = 0; i < storage_.numel(); i += LANES<acc_t>) {
      (Vec<acc_t>::loadu(data_ + i) + Vec<acc_t>::loadu(other.data_ + i)).store(data_ + i);
    }
  }

 private:
  at::Tensor storage_;
  acc_t* data_;
};

} // namespace mmspatialmamba
