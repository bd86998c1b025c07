// Memory of what an op returns.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <c10/util/accumulate.h>

namespace mmspatialmamba {

/// Bytes that a result has behind it. glibc before 2.38 serves aligned memory, PyTorch's, only from a gap that is some
/// 100 bytes larger than what is asked for: a gradient did not fit where a result of its size had lain. With malloc's
/// header of 16 bytes they are a multiple of the alignment, so that no small object settles behind a result and keeps
/// gaps apart.
constexpr int64_t ROOM = 256 - 16;

/// Uninitialised memory for the result of a forward op.
inline at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const int64_t room = ROOM / static_cast<int64_t>(options.dtype().itemsize());
  at::Tensor result = at::empty({c10::multiply_integers(sizes) + room}, options);
  result.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return result;
}

/// Has the system map the memory of a result, each thread a part of its own, before tasks write to it channel by
/// channel: threads that meet at a new page wait for each other there.
inline void map_pages(const at::Tensor& result) {
  constexpr int64_t PAGE = 4096, PAGES_OF_A_TASK = 256;
  char* bytes = static_cast<char*>(result.mutable_data_ptr());
  const int64_t pages = at::divup(static_cast<int64_t>(result.nbytes()), PAGE);
  at::parallel_for(0, pages, PAGES_OF_A_TASK, [&](int64_t begin, int64_t end) {
    for (int64_t page = begin; page < end; ++page) {
      bytes[page * PAGE] = 0;
    }
  });
}

} // namespace mmspatialmamba
