// BatchNorm in training and its gradient as custom calls of XLA's CPU backend: values [rows, channels] in float32 or
// bfloat16, everything else in float32.
//
// XLA writes each intermediate of these formulas to memory in float32, and reads them again. Here each pass reads the
// values as they lie and writes at most the result. The pieces of the rows depend on the shapes alone, so the numbers do
// not depend on how many threads there are.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "pieces.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kMostPieces = 16;
constexpr int64_t kFewestNumbers = 1 << 16;  // of a piece
constexpr int64_t kLanes = 256;  // rows of fewer channels are read several at a time, as one row of at least so many
constexpr int64_t kBlock = 64;  // so many numbers are summed in float32, their sums in float64

// A function's clones are for processors with wider registers; the loader takes the widest. Older compilers do not know
// these names.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define DGKD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DGKD_CLONES
#endif
#define DGKD_INLINE inline __attribute__((always_inline))

struct BFloat16 {
  uint16_t bits;
};

DGKD_INLINE float Load(float value) { return value; }
DGKD_INLINE float Load(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
DGKD_INLINE void Store(float value, float& to) { to = value; }
DGKD_INLINE void Store(float value, BFloat16& to) {  // to the nearest, half to even; not a number stays that
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

// The passes. `lanes` is a row's length, of the values and of the numbers per channel.

// Σ (x − shift)
template <typename T>
DGKD_INLINE void AddUp(const T* x, int64_t rows, int64_t lanes, const float* shift, float* sum) {
  for (int64_t row = 0; row < rows; ++row, x += lanes)
    for (int64_t i = 0; i < lanes; ++i) sum[i] += Load(x[i]) - shift[i];
}

// Σ (x − shift)²
template <typename T>
DGKD_INLINE void AddSquares(const T* x, int64_t rows, int64_t lanes, const float* shift, float* sum) {
  for (int64_t row = 0; row < rows; ++row, x += lanes)
    for (int64_t i = 0; i < lanes; ++i) {
      const float centred = Load(x[i]) - shift[i];
      sum[i] += centred * centred;
    }
}

// Σ g and Σ g(x − shift)
template <typename T>
DGKD_INLINE void AddProducts(const T* x, const T* g, int64_t rows, int64_t lanes, const float* shift, float* plain,
                             float* product) {
  for (int64_t row = 0; row < rows; ++row, x += lanes, g += lanes)
    for (int64_t i = 0; i < lanes; ++i) {
      plain[i] += Load(g[i]);
      product[i] += Load(g[i]) * (Load(x[i]) - shift[i]);
    }
}

// y = (x − shift)·factor + offset
template <typename T>
DGKD_INLINE void Scale(const T* x, int64_t rows, int64_t lanes, const float* shift, const float* factor,
                       const float* offset, T* y) {
  for (int64_t row = 0; row < rows; ++row, x += lanes, y += lanes)
    for (int64_t i = 0; i < lanes; ++i) Store((Load(x[i]) - shift[i]) * factor[i] + offset[i], y[i]);
}

// y = g·factor + (x − shift)·slope + offset
template <typename T>
DGKD_INLINE void Combine(const T* x, const T* g, int64_t rows, int64_t lanes, const float* shift, const float* factor,
                         const float* slope, const float* offset, T* y) {
  for (int64_t row = 0; row < rows; ++row, x += lanes, g += lanes, y += lanes)
    for (int64_t i = 0; i < lanes; ++i)
      Store(Load(g[i]) * factor[i] + (Load(x[i]) - shift[i]) * slope[i] + offset[i], y[i]);
}

#define DGKD_PASSES(T)                                                                                             \
  DGKD_CLONES void Add(const T* x, int64_t rows, int64_t lanes, const float* shift, float* sum) {                  \
    AddUp(x, rows, lanes, shift, sum);                                                                             \
  }                                                                                                                \
  DGKD_CLONES void Squares(const T* x, int64_t rows, int64_t lanes, const float* shift, float* sum) {              \
    AddSquares(x, rows, lanes, shift, sum);                                                                        \
  }                                                                                                                \
  DGKD_CLONES void Products(const T* x, const T* g, int64_t rows, int64_t lanes, const float* shift, float* plain, \
                            float* product) {                                                                      \
    AddProducts(x, g, rows, lanes, shift, plain, product);                                                         \
  }                                                                                                                \
  DGKD_CLONES void Scaled(const T* x, int64_t rows, int64_t lanes, const float* shift, const float* factor,        \
                          const float* offset, T* y) {                                                             \
    Scale(x, rows, lanes, shift, factor, offset, y);                                                               \
  }                                                                                                                \
  DGKD_CLONES void Combined(const T* x, const T* g, int64_t rows, int64_t lanes, const float* shift,               \
                            const float* factor, const float* slope, const float* offset, T* y) {                  \
    Combine(x, g, rows, lanes, shift, factor, slope, offset, y);                                                   \
  }
DGKD_PASSES(float)
DGKD_PASSES(BFloat16)
#undef DGKD_PASSES

// The rows, cut into pieces for threads, and wide rows of several rows where there are few channels.
class Rows {
 public:
  Rows(ffi::ThreadPool& pool, int64_t rows, int64_t channels)
      : pool_(pool), rows_(rows), channels_(channels),
        together_(std::max<int64_t>(1, std::min(rows, (kLanes + channels - 1) / channels))),
        pieces_(std::clamp<int64_t>(rows * channels / kFewestNumbers, 1, kMostPieces)) {}

  // Per channel numbers, repeated for the rows that are read together.
  std::vector<float> Repeated(const std::vector<float>& of_channels) const {
    std::vector<float> lanes;
    for (int64_t i = 0; i < together_; ++i) lanes.insert(lanes.end(), of_channels.begin(), of_channels.end());
    return lanes;
  }

  // Calls pass(first number, rows, lanes) for blocks of rows of one length, on all threads.
  template <typename Pass>
  void Each(const Pass& pass) const {
    InParallel(pool_, pieces_, [&](int64_t piece) { Blocks(piece, rows_, pass); });
  }

  // Sums over the rows of what pass(first number, rows, lanes, sums) adds to `count` arrays of sums, per channel.
  template <typename Pass>
  std::vector<std::vector<double>> Sums(int64_t count, const Pass& pass) const {
    std::vector<std::vector<double>> of_pieces(pieces_);
    InParallel(pool_, pieces_, [&](int64_t piece) {
      std::vector<double> sums(count * channels_);
      std::vector<float> block(count * width());
      Blocks(piece, kBlock, [&](int64_t at, int64_t rows, int64_t lanes) {
        std::fill(block.begin(), block.end(), 0.0f);
        pass(at, rows, lanes, block.data());
        for (int64_t which = 0; which < count; ++which)
          for (int64_t lane = 0; lane < lanes; lane += channels_)
            for (int64_t i = 0; i < channels_; ++i) sums[which * channels_ + i] += block[which * width() + lane + i];
      });
      of_pieces[piece] = std::move(sums);
    });
    std::vector<std::vector<double>> total(count, std::vector<double>(channels_));
    for (const auto& sums : of_pieces)
      for (int64_t which = 0; which < count; ++which)
        for (int64_t i = 0; i < channels_; ++i) total[which][i] += sums[which * channels_ + i];
    return total;
  }

  int64_t width() const { return together_ * channels_; }  // of a row of several

 private:
  template <typename Work>
  void Blocks(int64_t piece, int64_t most, const Work& work) const {
    int64_t row = rows_ * piece / pieces_;
    const int64_t end = rows_ * (piece + 1) / pieces_;
    while (row + together_ <= end) {
      const int64_t wide = std::min(most, (end - row) / together_);
      work(row * channels_, wide, together_ * channels_);
      row += wide * together_;
    }
    if (row < end) work(row * channels_, end - row, channels_);
  }

  ffi::ThreadPool& pool_;
  int64_t rows_, channels_, together_, pieces_;
};

template <typename T>
void Normalise(const Rows& rows, int64_t count, const T* x, const std::vector<float>& scale,
               const std::vector<float>& bias, float epsilon, T* y, float* mean, float* var) {
  const int64_t channels = scale.size();
  std::vector<float> first(channels), factor(channels);
  for (int64_t i = 0; i < channels; ++i) first[i] = Load(x[i]);  // near the mean, so that the sums keep their digits
  const auto near = rows.Repeated(first);
  const auto sums = rows.Sums(1, [&](int64_t at, int64_t n, int64_t lanes, float* sum) {
    Add(x + at, n, lanes, near.data(), sum);
  })[0];
  for (int64_t i = 0; i < channels; ++i) mean[i] = static_cast<float>(first[i] + sums[i] / count);
  const auto shift = rows.Repeated({mean, mean + channels});
  const auto squares = rows.Sums(1, [&](int64_t at, int64_t n, int64_t lanes, float* sum) {
    Squares(x + at, n, lanes, shift.data(), sum);
  })[0];
  for (int64_t i = 0; i < channels; ++i) {
    var[i] = static_cast<float>(squares[i] / count);
    factor[i] = scale[i] / std::sqrt(var[i] + epsilon);
  }
  const auto factors = rows.Repeated(factor), offsets = rows.Repeated(bias);
  rows.Each([&](int64_t at, int64_t n, int64_t lanes) {
    Scaled(x + at, n, lanes, shift.data(), factors.data(), offsets.data(), y + at);
  });
}

template <typename T>
void PullBack(const Rows& rows, int64_t count, const T* x, const T* of_y, const std::vector<float>& scale,
              const std::vector<float>& mean, const float* var, float epsilon, T* of_x, float* of_scale,
              float* of_bias) {
  const int64_t channels = scale.size();
  const auto shift = rows.Repeated(mean);
  const auto sums = rows.Sums(2, [&](int64_t at, int64_t n, int64_t lanes, float* sum) {
    Products(x + at, of_y + at, n, lanes, shift.data(), sum, sum + rows.width());
  });
  std::vector<float> factor(channels), slope(channels), offset(channels);
  for (int64_t i = 0; i < channels; ++i) {
    const double rate = 1 / std::sqrt(double{var[i]} + epsilon), steep = scale[i] * rate;
    of_bias[i] = static_cast<float>(sums[0][i]);
    of_scale[i] = static_cast<float>(rate * sums[1][i]);
    factor[i] = static_cast<float>(steep);
    slope[i] = static_cast<float>(-steep * rate * rate * sums[1][i] / count);
    offset[i] = static_cast<float>(-steep * sums[0][i] / count);
  }
  const auto factors = rows.Repeated(factor), slopes = rows.Repeated(slope), offsets = rows.Repeated(offset);
  rows.Each([&](int64_t at, int64_t n, int64_t lanes) {
    Combined(x + at, of_y + at, n, lanes, shift.data(), factors.data(), slopes.data(), offsets.data(), of_x + at);
  });
}

// What is wrong with a call, or "". `values` have the shape of the images, `channels` are float32 and one per channel.
std::string Wrong(const std::vector<ffi::AnyBuffer>& values, const std::vector<ffi::AnyBuffer>& channels) {
  const auto type = values[0].element_type();
  const auto shape = values[0].dimensions();
  if (type != ffi::DataType::F32 && type != ffi::DataType::BF16) return "the dtype must be float32 or bfloat16";
  if (shape.size() < 2 || values[0].element_count() < 1) return "the values must have 2 dimensions or more, none empty";
  for (const auto& array : values)
    if (array.element_type() != type || !std::equal(shape.begin(), shape.end(), array.dimensions().begin(),
                                                    array.dimensions().end()))
      return "all values must have one dtype and shape";
  for (const auto& array : channels)
    if (array.element_type() != ffi::DataType::F32 || array.dimensions().size() != 1 ||
        array.dimensions()[0] != shape.back())
      return "the numbers of the channels must be float32, one for each";
  return "";
}

std::vector<float> Numbers(const ffi::AnyBuffer& array) {
  const auto* first = static_cast<const float*>(array.untyped_data());
  return {first, first + array.element_count()};
}

// Calls work(rows, count, T{}) with the values' type.
template <typename Work>
ffi::Error With(ffi::ThreadPool& pool, const std::vector<ffi::AnyBuffer>& values,
                const std::vector<ffi::AnyBuffer>& channels, const Work& work) {
  const std::string wrong = Wrong(values, channels);
  if (!wrong.empty()) return ffi::Error::InvalidArgument("dgkd_jax's BatchNorm: " + wrong);
  const int64_t width = values[0].dimensions().back(), count = values[0].element_count() / width;
  try {
    const Rows rows(pool, count, width);
    if (values[0].element_type() == ffi::DataType::F32) work(rows, count, float{});
    else work(rows, count, BFloat16{});
  } catch (const std::exception& e) {
    return ffi::Error::Internal(std::string("dgkd_jax's BatchNorm: ") + e.what());
  }
  return ffi::Error::Success();
}

template <typename T>
T* As(const ffi::AnyBuffer& array, T) {
  return static_cast<T*>(array.untyped_data());
}

ffi::Error NormaliseCall(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scale, ffi::AnyBuffer bias,
                         ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> mean,
                         ffi::Result<ffi::AnyBuffer> var, float epsilon) {
  return With(pool, {x, *y}, {scale, bias, *mean, *var}, [&](const Rows& rows, int64_t count, auto type) {
    Normalise(rows, count, As(x, type), Numbers(scale), Numbers(bias), epsilon, As(*y, type), As(*mean, 0.0f),
              As(*var, 0.0f));
  });
}

ffi::Error PullBackCall(ffi::ThreadPool pool, ffi::AnyBuffer of_y, ffi::AnyBuffer x, ffi::AnyBuffer scale,
                        ffi::AnyBuffer mean, ffi::AnyBuffer var, ffi::Result<ffi::AnyBuffer> of_x,
                        ffi::Result<ffi::AnyBuffer> of_scale, ffi::Result<ffi::AnyBuffer> of_bias, float epsilon) {
  return With(pool, {x, of_y, *of_x}, {scale, mean, var, *of_scale, *of_bias},
              [&](const Rows& rows, int64_t count, auto type) {
                PullBack(rows, count, As(x, type), As(of_y, type), Numbers(scale), Numbers(mean), As(var, 0.0f),
                         epsilon, As(*of_x, type), As(*of_scale, 0.0f), As(*of_bias, 0.0f));
              });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dgkd_normalise, NormaliseCall,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
                                  .Attr<float>("epsilon"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(dgkd_pull_back, PullBackCall,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
                                  .Attr<float>("epsilon"));
