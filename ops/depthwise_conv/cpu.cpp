// depthwise_conv: a 3x3 convolution of each channel, with what stands around it in the model; and its gradients.
//
// A row of a channels-last map is read in the order of memory: a tile of neighbouring columns, one vector of channels
// after the other. What lies outside of the map is read from a buffer of zeros.
//
// The loops over a tile's columns are unrolled by pragma: GCC 12 leaves nests of them as they are, with the tile in
// memory in place of registers, and backward takes two to three times as long.
#include "../csrc/blocks.h"
#include "../csrc/checks.h"
#include "../csrc/memory.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>

namespace mmspatialmamba {
namespace {

constexpr int SIDE = 3;
constexpr int KERNEL = SIDE * SIDE;

/// Rows of one task of the backward op at least. With an activation each task computes the convolution of two more.
constexpr int64_t TASK_ROWS = 8;

enum class Activation { NONE, SILU, RELU };

/// A map (N, H, W, E) whose channels are neighbours in memory; the other strides are free, in elements.
template <typename T>
struct Map {
  const T* data;
  int64_t H, W, image, row, column;

  /// Column 0 of a row, nullptr outside of the map.
  const T* row_at(int64_t n, int64_t r) const {
    return r < 0 || r >= H ? nullptr : data + n * image + r * row;
  }
};

template <typename T>
Map<T> map_of(const at::Tensor& x) {
  return {x.const_data_ptr<T>(), x.size(1), x.size(2), x.stride(0), x.stride(1), x.stride(2)};
}

/// The rows that the three rows of the kernel meet: column 0 of each, nullptr outside, and the distance of two columns.
template <typename T>
struct Rows {
  std::array<const T*, SIDE> rows;
  int64_t W, column;
};

template <typename scalar_t>
struct ConvProblem {
  using acc_t = at::opmath_type<scalar_t>;

  int64_t N, E, lanes; // lanes: E, rounded up to whole vectors
  Map<scalar_t> x;
  int64_t H_out, W_out;
  const acc_t* weight; // (KERNEL, lanes)
  const acc_t* bias; // (lanes)
  Activation activation;
  bool relu_input, residual;
  at::Tensor zeros; // (lanes)

  template <typename T>
  const T* nothing() const {
    return static_cast<const T*>(zeros.const_data_ptr());
  }

  /// Rows are cut by the shape alone, so that sums over them have one order whatever the number of threads.
  int64_t task_rows() const {
    return std::max(TASK_ROWS, at::divup(N * x.H, 16));
  }

  int64_t tasks_of_image() const {
    return at::divup(x.H, task_rows());
  }
};

/// Pointers to `count` neighbouring pixels of one row.
template <int count, typename T>
inline std::array<const T*, count> pixels_at(const T* row, const Rows<T>& rows, int64_t first, const T* nothing) {
  std::array<const T*, count> pixels;
  for (int j = 0; j < count; ++j) {
    const int64_t c = first + j;
    pixels[j] = row != nullptr && c >= 0 && c < rows.W ? row + c * rows.column : nothing;
  }
  return pixels;
}

/// Calls `work(tile, column)` with a compile-time number of columns, for all columns of a row: a vector of weights or
/// of the map serves several of them.
template <typename Work>
inline void for_tiles(int64_t W, const Work& work) {
  int64_t column = 0;
  for (; column + 4 <= W; column += 4) {
    work(std::integral_constant<int, 4>{}, column);
  }
  if (column + 2 <= W) {
    work(std::integral_constant<int, 2>{}, column);
    column += 2;
  }
  if (column < W) {
    work(std::integral_constant<int, 1>{}, column);
  }
}

template <typename acc_t>
inline Vec<acc_t> relu(const Vec<acc_t>& x) {
  // NaN stays: the comparison is false for it.
  return Vec<acc_t>::blendv(x, Vec<acc_t>(0), x < Vec<acc_t>(0));
}

/// Calls `sink(column, first, count, pre, x)` with the convolution and its input, for all columns and channels of an
/// output row; x is the pixel at the centre of the kernel.
template <int stride, typename scalar_t, typename Sink>
[[gnu::flatten]] void convolve_row(const ConvProblem<scalar_t>& p, int64_t n, int64_t r, const Sink& sink) {
  using acc_t = at::opmath_type<scalar_t>;
  Rows<scalar_t> rows{{}, p.x.W, p.x.column};
  for (int ky = 0; ky < SIDE; ++ky) {
    rows.rows[ky] = p.x.row_at(n, stride * r + ky - 1);
  }
  for_tiles(p.W_out, [&](auto tile, int64_t column) {
    constexpr int T = decltype(tile)::value;
    constexpr int WIDTH = stride * (T - 1) + SIDE;
    std::array<std::array<const scalar_t*, WIDTH>, SIDE> pixels;
    for (int ky = 0; ky < SIDE; ++ky) {
      pixels[ky] = pixels_at<WIDTH>(rows.rows[ky], rows, stride * column - 1, p.template nothing<scalar_t>());
    }
    for_vectors<acc_t>(p.E, [&](int64_t first, auto count) {
      Vec<acc_t> sum[T], centre[T];
      #pragma GCC unroll 8
      for (int i = 0; i < T; ++i) {
        sum[i] = Vec<acc_t>::loadu(p.bias + first);
      }
      for (int ky = 0; ky < SIDE; ++ky) {
        Vec<acc_t> weight[SIDE];
        #pragma GCC unroll 8
        for (int kx = 0; kx < SIDE; ++kx) {
          weight[kx] = Vec<acc_t>::loadu(p.weight + (ky * SIDE + kx) * p.lanes + first);
        }
        #pragma GCC unroll 8
        for (int j = 0; j < WIDTH; ++j) {
          Vec<acc_t> value = load(pixels[ky][j] + first, count);
          if (p.relu_input) {
            value = relu(value);
          }
          #pragma GCC unroll 8
          for (int i = 0; i < T; ++i) {
            const int kx = j - stride * i;
            if (kx >= 0 && kx < SIDE) {
              sum[i] = at::vec::fmadd(weight[kx], value, sum[i]);
            }
            if (ky == 1 && kx == 1) {
              centre[i] = value;
            }
          }
        }
      }
      #pragma GCC unroll 8
      for (int i = 0; i < T; ++i) {
        sink(column + i, first, count, sum[i], centre[i]);
      }
    });
  });
}

template <int stride, typename scalar_t>
void forward_row(const ConvProblem<scalar_t>& p, int64_t n, int64_t r, scalar_t* y) {
  using acc_t = at::opmath_type<scalar_t>;
  convolve_row<stride>(p, n, r, [&](int64_t column, int64_t first, auto count, Vec<acc_t> value, Vec<acc_t> x) {
    if (p.activation == Activation::SILU) {
      value = value * sigmoid(value);
    } else if (p.activation == Activation::RELU) {
      value = relu(value);
    }
    if (p.residual) {
      value = value + x;
    }
    store(y + column * p.E + first, value, count);
  });
}

/// Gradients of one task, rows [begin, end) of an image.
template <int stride, typename scalar_t>
class ConvBackward {
  using acc_t = at::opmath_type<scalar_t>;

 public:
  /// Args: dx, (N, H, W, E); sums, (KERNEL + 1, lanes), the gradients of weight and bias of this task.
  ConvBackward(const ConvProblem<scalar_t>& problem, const Map<scalar_t>& dy, scalar_t* dx, acc_t* sums)
      : p(problem), dy_(dy), dx_(dx), sums_(sums), dpre_(activated() ? at::divup(SIDE * row_size(), LANES<acc_t>) : 0) {}

  void run(int64_t n, int64_t begin, int64_t end) {
    int64_t next = std::max<int64_t>(begin - 1, 0) / stride; // row of dpre
    for (int64_t r = begin; r < end; ++r) {
      if (!activated()) {
        backward_row(n, r, Rows<scalar_t>{{}, p.W_out, dy_.column}, [&](int64_t row) { return dy_.row_at(n, row); });
        continue;
      }
      for (; next <= (r + 1) / stride && next < p.H_out; ++next) {
        compute_dpre(n, next);
      }
      backward_row(n, r, Rows<acc_t>{{}, p.W_out, p.E}, [&](int64_t row) -> const acc_t* {
        return row < 0 || row >= p.H_out ? nullptr : dpre_row(row);
      });
    }
  }

 private:
  bool activated() const {
    return p.activation != Activation::NONE;
  }

  int64_t row_size() const {
    return p.W_out * p.E;
  }

  /// Row r of the gradient before the activation, (W_out, E); three rows are kept.
  acc_t* dpre_row(int64_t r) const {
    return dpre_[0] + (r % SIDE) * row_size();
  }

  void compute_dpre(int64_t n, int64_t r) {
    const scalar_t* dy = dy_.row_at(n, r);
    acc_t* dpre = dpre_row(r);
    const Vec<acc_t> zero(0), one(1);
    convolve_row<stride>(p, n, r, [&](int64_t column, int64_t first, auto count, Vec<acc_t> pre, Vec<acc_t>) {
      Vec<acc_t> gradient = load(dy + column * dy_.column + first, count);
      if (p.activation == Activation::SILU) {
        const Vec<acc_t> s = sigmoid(pre);
        gradient = gradient * s * at::vec::fmadd(pre, one - s, one);
      } else {
        gradient = Vec<acc_t>::blendv(gradient, zero, pre <= zero);
      }
      store(dpre + column * p.E + first, gradient, count);
    });
  }

  /// Args: rows, to be filled; row_at(r), row r of the gradient of the convolution, or nullptr.
  template <typename P, typename RowAt>
  [[gnu::flatten]] void backward_row(int64_t n, int64_t r, Rows<P> rows, const RowAt& row_at) {
    for (int ky = 0; ky < SIDE; ++ky) {
      const int64_t from = r + 1 - ky; // what tap ky made of row r
      rows.rows[ky] = from % stride == 0 ? row_at(from / stride) : nullptr;
    }
    const scalar_t* x = p.x.row_at(n, r);
    const scalar_t* dy = dy_.row_at(n, r);
    scalar_t* dx = dx_ + (n * p.x.H + r) * p.x.W * p.E;
    const Vec<acc_t> zero(0);
    for_tiles(p.x.W, [&](auto tile, int64_t column) {
      constexpr int T = decltype(tile)::value;
      // Columns of the gradient that the tile reads: its own and one on each side, or with stride 2 every second one
      // and one on the right.
      constexpr int LEFT = stride == 1 ? 1 : 0;
      constexpr int WIDTH = stride == 1 ? T + 2 : T / 2 + 1;
      std::array<std::array<const P*, WIDTH>, SIDE> pixels;
      for (int ky = 0; ky < SIDE; ++ky) {
        pixels[ky] = pixels_at<WIDTH>(rows.rows[ky], rows, column / stride - LEFT, p.template nothing<P>());
      }
      for_vectors<acc_t>(p.E, [&](int64_t first, auto count) {
        Vec<acc_t> value[T], gradient[T];
        #pragma GCC unroll 8
        for (int i = 0; i < T; ++i) {
          value[i] = load(x + (column + i) * p.x.column + first, count);
          gradient[i] = zero;
        }
        Vec<acc_t> bias = Vec<acc_t>::loadu(sums_ + KERNEL * p.lanes + first);
        for (int ky = 0; ky < SIDE; ++ky) {
          if (rows.rows[ky] == nullptr) {
            continue;
          }
          Vec<acc_t> weight[SIDE], sum[SIDE];
          #pragma GCC unroll 8
          for (int kx = 0; kx < SIDE; ++kx) {
            weight[kx] = Vec<acc_t>::loadu(p.weight + (ky * SIDE + kx) * p.lanes + first);
            sum[kx] = Vec<acc_t>::loadu(sums_ + (ky * SIDE + kx) * p.lanes + first);
          }
          #pragma GCC unroll 8
          for (int j = 0; j < WIDTH; ++j) {
            const Vec<acc_t> g = load(pixels[ky][j] + first, count);
            #pragma GCC unroll 8
            for (int i = 0; i < T; ++i) {
              const int kx = i + 1 - stride * (j - LEFT);
              if (kx >= 0 && kx < SIDE) {
                gradient[i] = at::vec::fmadd(weight[kx], g, gradient[i]);
                sum[kx] = at::vec::fmadd(p.relu_input ? relu(value[i]) : value[i], g, sum[kx]);
              }
              if (ky == 1 && kx == 1) {
                bias = bias + g;
              }
            }
          }
          #pragma GCC unroll 8
          for (int kx = 0; kx < SIDE; ++kx) {
            sum[kx].store(sums_ + (ky * SIDE + kx) * p.lanes + first);
          }
        }
        bias.store(sums_ + KERNEL * p.lanes + first);
        #pragma GCC unroll 8
        for (int i = 0; i < T; ++i) {
          if (p.residual) {
            gradient[i] = gradient[i] + load(dy + (column + i) * dy_.column + first, count);
          }
          if (p.relu_input) {
            gradient[i] = Vec<acc_t>::blendv(gradient[i], zero, value[i] <= zero);
          }
          store(dx + (column + i) * p.E + first, gradient[i], count);
        }
      });
    });
  }

  const ConvProblem<scalar_t>& p;
  const Map<scalar_t>& dy_;
  scalar_t* dx_;
  acc_t* sums_;
  LaneBuffer<acc_t> dpre_;
};

Activation activation_of(c10::string_view name) {
  if (name == "silu") {
    return Activation::SILU;
  }
  if (name == "relu") {
    return Activation::RELU;
  }
  TORCH_CHECK(name == "none", "activation must be none, silu or relu, got ", name);
  return Activation::NONE;
}

std::array<int64_t, 4> output_sizes(const at::Tensor& x, int64_t stride) {
  return {x.size(0), at::divup(x.size(1), stride), at::divup(x.size(2), stride), x.size(3)};
}

void check_inputs(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t stride, bool residual) {
  check_map("x", x, 4);
  const auto acc = at::toOpMathType(x.scalar_type());
  check_tensor("weight", weight, {x.size(3), 1, SIDE, SIDE}, acc);
  if (bias) {
    check_tensor("bias", *bias, {x.size(3)}, acc);
  }
  TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  TORCH_CHECK(stride == 1 || !residual, "residual needs stride 1, got stride ", stride);
}

/// The tensor itself if its channels are neighbours, else a copy.
at::Tensor channels_together(const at::Tensor& x) {
  return x.stride(3) == 1 ? x : x.contiguous();
}

/// The rows of `values`, (K, E), each filled up to whole vectors with zeros.
at::Tensor in_whole_vectors(const at::Tensor& values, int64_t lanes) {
  at::Tensor padded = at::zeros({values.size(0), lanes}, values.options());
  padded.narrow(1, 0, values.size(1)).copy_(values);
  return padded;
}

/// A problem and the tensors that it points to.
template <typename scalar_t>
struct ConvInputs {
  using acc_t = at::opmath_type<scalar_t>;

  at::Tensor x, weight, bias;
  ConvProblem<scalar_t> problem;

  ConvInputs(
      const at::Tensor& x_, const at::Tensor& weight_, const OptionalTensor& bias_, int64_t stride,
      c10::string_view activation, bool relu_input, bool residual)
      : x(channels_together(x_)) {
    const int64_t E = x.size(3);
    const int64_t lanes = at::divup(E, LANES<acc_t>) * LANES<acc_t>;
    const auto sizes = output_sizes(x, stride);
    weight = in_whole_vectors(weight_.reshape({E, KERNEL}).t(), lanes);
    bias = bias_ ? in_whole_vectors(bias_->unsqueeze(0), lanes) : at::zeros({1, lanes}, weight.options());
    problem = {x.size(0), E, lanes, map_of<scalar_t>(x), sizes[1], sizes[2],
               weight.const_data_ptr<acc_t>(), bias.const_data_ptr<acc_t>(), activation_of(activation), relu_input,
               residual, at::zeros({lanes}, weight.options())};
  }
};

/// Calls `work(stride)` with a compile-time stride.
template <typename Work>
void with_stride(int64_t stride, const Work& work) {
  if (stride == 1) {
    work(std::integral_constant<int, 1>{});
  } else {
    work(std::integral_constant<int, 2>{});
  }
}

at::Tensor depthwise_conv(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t stride,
    c10::string_view activation, bool relu_input, bool residual) {
  check_inputs(x, weight, bias, stride, residual);
  at::Tensor y = empty_result(output_sizes(x, stride), x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "depthwise_conv", [&] {
    const ConvInputs<scalar_t> inputs(x, weight, bias, stride, activation, relu_input, residual);
    const auto& p = inputs.problem;
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    with_stride(stride, [&](auto constant) {
      at::parallel_for(0, p.N * p.H_out, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          forward_row<decltype(constant)::value>(p, row / p.H_out, row % p.H_out, out + row * p.W_out * p.E);
        }
      });
    });
  });
  return y;
}

/// Returns dx, and the gradients of weight and bias one after the other.
std::tuple<at::Tensor, at::Tensor> depthwise_conv_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
    int64_t stride, c10::string_view activation, bool relu_input, bool residual) {
  check_inputs(x, weight, bias, stride, residual);
  check_tensor("dy", dy, output_sizes(x, stride), x.scalar_type());
  const int64_t E = x.size(3);
  at::Tensor dx = at::empty(x.sizes(), x.options());
  at::Tensor sums;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "depthwise_conv_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const ConvInputs<scalar_t> inputs(x, weight, bias, stride, activation, relu_input, residual);
    const auto& p = inputs.problem;
    const at::Tensor dy_together = channels_together(dy);
    const auto dy_map = map_of<scalar_t>(dy_together);
    const int64_t tasks_of_image = p.tasks_of_image(), task_rows = p.task_rows();
    at::Tensor parts = at::zeros({p.N * tasks_of_image, KERNEL + 1, p.lanes}, weight.options());
    scalar_t* dx_data = dx.mutable_data_ptr<scalar_t>();
    acc_t* parts_data = parts.mutable_data_ptr<acc_t>();
    with_stride(stride, [&](auto constant) {
      at::parallel_for(0, p.N * tasks_of_image, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t first = task % tasks_of_image * task_rows;
          acc_t* task_sums = parts_data + task * (KERNEL + 1) * p.lanes;
          ConvBackward<decltype(constant)::value, scalar_t>(p, dy_map, dx_data, task_sums)
              .run(task / tasks_of_image, first, std::min(p.x.H, first + task_rows));
        }
      });
    });
    sums = parts.sum(0).narrow(1, 0, E);
  });
  return {dx, at::cat({sums.narrow(0, 0, KERNEL).t().reshape({KERNEL * E}), sums[KERNEL]})};
}

} // namespace

TORCH_LIBRARY_IMPL(mmspatialmamba, CPU, m) {
  m.impl("depthwise_conv", depthwise_conv);
  m.impl("depthwise_conv_backward", depthwise_conv_backward);
}

} // namespace mmspatialmamba
