// oneDNN's convolutions as a custom call of XLA's CPU backend: images NHWC, kernels HWIO, float32 and bfloat16.
//
// XLA's own threads do the work, each a piece of the batch; oneDNN starts no threads of its own. The pieces depend on
// the shapes alone, so the numbers do not depend on how many threads there are or on which of them is first.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "oneapi/dnnl/dnnl.hpp"
#include "pieces.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using dnnl::memory;
using Type = memory::data_type;
using Tag = memory::format_tag;

namespace {

constexpr int64_t kMostPieces = 16;  // of a batch; all of one size
constexpr int64_t kFewestPixels = 512;  // of a piece's output: for fewer, adding up the kernel gradients costs too much
constexpr int64_t kLargest = int64_t{1} << 30;  // of a side, a batch, a number of channels, a padding and a stride

enum Of : int64_t { kImages = 0, kKernel = 1, kOutput = 2 };  // the one of the three arrays that is computed

dnnl::engine& Engine() {
  static auto* engine = new dnnl::engine(dnnl::engine::kind::cpu, 0);  // never freed: threads may outlive main
  return *engine;
}

// Within its scope oneDNN runs on the calling thread alone.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }

 private:
  int before_;
};

// At least so many bytes of a thread's own memory, which it keeps from call to call.
char* Kept(memory& kept, int64_t bytes) {
  if (!kept || static_cast<int64_t>(kept.get_desc().get_size()) < bytes) {
    kept = memory();  // frees the old one first
    kept = memory({{std::max<int64_t>(bytes, 1)}, Type::u8, Tag::a}, Engine());
  }
  return static_cast<char*>(kept.get_data_handle());
}

struct Convolution {
  memory::dims x, kernel, y;  // in oneDNN's order of axes: NCHW, OIHW
  Type type;
  int64_t stride, top, bottom, left, right;
};

// What oneDNN has compiled for a convolution; used by many threads at once.
struct Plan {
  dnnl::primitive run, reorder;  // reorder: of the kernel from or to HWIO; empty if the layouts are the same
  memory::desc x, kernel, y, packed, scratch;

  Plan(Of of, const Convolution& c)
      : x(c.x, c.type, Tag::nhwc), kernel(c.kernel, c.type, Tag::hwio), y(c.y, c.type, Tag::nhwc) {
    OneThread alone;
    memory::dims strides{c.stride, c.stride}, before{c.top, c.left}, after{c.bottom, c.right};
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    memory::desc any(c.kernel, c.type, Tag::any);
    memory::desc sums(c.kernel, Type::f32, Tag::any);  // a kernel gradient is summed in float32
    const auto direct = dnnl::algorithm::convolution_direct;
    dnnl::convolution_forward::primitive_desc forward(
        Engine(), of == kOutput ? dnnl::prop_kind::forward_inference : dnnl::prop_kind::forward_training, direct, x,
        any, y, strides, before, after, attributes);
    auto keep = [&](const auto& chosen, const memory::desc& weights) {
      scratch = chosen.scratchpad_desc();
      packed = weights;
      return chosen;
    };
    if (of == kOutput) {
      run = dnnl::convolution_forward(keep(forward, forward.weights_desc()));
    } else if (of == kImages) {
      dnnl::convolution_backward_data::primitive_desc backward(Engine(), direct, x, any, y, strides, before, after,
                                                               forward, attributes);
      run = dnnl::convolution_backward_data(keep(backward, backward.weights_desc()));
    } else {
      dnnl::convolution_backward_weights::primitive_desc backward(Engine(), direct, x, sums, y, strides, before, after,
                                                                  forward, attributes);
      run = dnnl::convolution_backward_weights(keep(backward, backward.diff_weights_desc()));
    }
    if (packed == kernel) return;
    const auto& [from, to] = of == kKernel ? std::tie(packed, kernel) : std::tie(kernel, packed);
    reorder = dnnl::reorder(dnnl::reorder::primitive_desc(Engine(), from, Engine(), to));
  }
};

const Plan& PlanFor(Of of, Convolution c, int64_t images) {
  static auto* mutex = new std::mutex;
  static auto* plans = new std::map<std::vector<int64_t>, std::unique_ptr<Plan>>;
  c.x[0] = c.y[0] = images;
  std::vector<int64_t> key{of, static_cast<int64_t>(c.type), c.stride, c.top, c.bottom, c.left, c.right};
  for (const auto& dims : {c.x, c.kernel, c.y}) key.insert(key.end(), dims.begin(), dims.end());
  std::lock_guard<std::mutex> lock(*mutex);
  auto& plan = (*plans)[key];
  if (!plan) plan = std::make_unique<Plan>(of, c);
  return *plan;
}

void Execute(const dnnl::primitive& primitive, const std::unordered_map<int, memory>& arguments) {
  static thread_local dnnl::stream stream(Engine());
  OneThread alone;
  primitive.execute(stream, arguments);
  stream.wait();
}

void Reorder(const Plan& plan, const memory::desc& from, void* source, const memory::desc& to, void* target) {
  Execute(plan.reorder, {{DNNL_ARG_FROM, memory(from, Engine(), source)}, {DNNL_ARG_TO, memory(to, Engine(), target)}});
}

void Run(Of of, const Convolution& c, ffi::ThreadPool& pool, char* x, void* kernel, char* y) {
  const int64_t images = c.x[0], pixels = c.y[2] * c.y[3];
  int64_t each = std::max((images + kMostPieces - 1) / kMostPieces, (kFewestPixels + pixels - 1) / pixels);
  while (each < images && images % each) ++each;
  const int64_t pieces = each < images ? images / each : 1;
  const Plan& plan = PlanFor(of, c, images / pieces);
  const int64_t kernel_bytes = plan.packed.get_size(), x_bytes = plan.x.get_size(), y_bytes = plan.y.get_size();
  static thread_local memory kernels;
  char* packed = static_cast<char*>(kernel);
  if (of == kKernel || plan.reorder) packed = Kept(kernels, kernel_bytes * (of == kKernel ? pieces : 1));
  if (of != kKernel && plan.reorder) Reorder(plan, plan.kernel, kernel, plan.packed, packed);
  InParallel(pool, pieces, [&](int64_t i) {
    static thread_local memory scratch;
    char* weights = packed + (of == kKernel ? i * kernel_bytes : 0);
    Execute(plan.run, {
        {of == kImages ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC, memory(plan.x, Engine(), x + i * x_bytes)},
        {of == kKernel ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_WEIGHTS, memory(plan.packed, Engine(), weights)},
        {of == kOutput ? DNNL_ARG_DST : DNNL_ARG_DIFF_DST, memory(plan.y, Engine(), y + i * y_bytes)},
        {DNNL_ARG_SCRATCHPAD, memory(plan.scratch, Engine(), Kept(scratch, plan.scratch.get_size()))},
    });
  });
  if (of != kKernel) return;
  float* sum = reinterpret_cast<float*>(packed);
  const int64_t numbers = kernel_bytes / sizeof(float);
  for (int64_t i = 1; i < pieces; ++i)
    for (int64_t j = 0; j < numbers; ++j) sum[j] += sum[i * numbers + j];
  if (plan.reorder) Reorder(plan, plan.packed, packed, plan.kernel, kernel);
  else std::copy_n(packed, kernel_bytes, static_cast<char*>(kernel));
}

// What is wrong with a call, or "".
std::string Wrong(const std::vector<ffi::AnyBuffer>& arrays, int64_t of, int64_t stride,
                  const std::vector<int64_t>& padding) {
  if (of < kImages || of > kOutput) return "of must be 0, 1 or 2";
  const auto type = arrays[0].element_type();
  if (type != ffi::DataType::F32 && type != ffi::DataType::BF16) return "the dtype must be float32 or bfloat16";
  for (const auto& array : arrays) {
    if (array.element_type() != type) return "all arrays must have one dtype";
    if (array.dimensions().size() != 4) return "all arrays must have 4 dimensions";
    for (int64_t size : array.dimensions())
      if (size < 1 || size > kLargest) return "a dimension is out of range";
  }
  if (stride < 1 || stride > kLargest) return "the stride is out of range";
  for (int64_t zeros : padding)
    if (zeros < 0 || zeros > kLargest) return "a padding is out of range";
  const auto x = arrays[0].dimensions(), kernel = arrays[1].dimensions(), y = arrays[2].dimensions();
  if (x[0] != y[0]) return "images and output differ in the batch";
  if (x[3] != kernel[2] || y[3] != kernel[3]) return "images, kernel and output differ in the channels";
  for (int axis : {0, 1}) {
    const int64_t free = x[1 + axis] + padding[2 * axis] + padding[2 * axis + 1] - kernel[axis];
    if (free < 0 || free / stride + 1 != y[1 + axis]) return "the output's size is not that of these images and kernel";
  }
  return "";
}

ffi::Error Convolve(ffi::ThreadPool pool, ffi::AnyBuffer first, ffi::AnyBuffer second,
                    ffi::Result<ffi::AnyBuffer> result, int64_t of, int64_t stride, int64_t top, int64_t bottom,
                    int64_t left, int64_t right) {
  std::vector<ffi::AnyBuffer> arrays{first, second};
  arrays.insert(arrays.begin() + std::clamp<int64_t>(of, kImages, kOutput), *result);
  const std::string wrong = Wrong(arrays, of, stride, {top, bottom, left, right});
  if (!wrong.empty()) return ffi::Error::InvalidArgument("dgkd_jax's convolution by oneDNN: " + wrong);
  const auto x = arrays[0].dimensions(), kernel = arrays[1].dimensions(), y = arrays[2].dimensions();
  const Convolution convolution{{x[0], x[3], x[1], x[2]},
                                {kernel[3], kernel[2], kernel[0], kernel[1]},
                                {y[0], y[3], y[1], y[2]},
                                first.element_type() == ffi::DataType::BF16 ? Type::bf16 : Type::f32,
                                stride, top, bottom, left, right};
  try {
    Run(static_cast<Of>(of), convolution, pool, static_cast<char*>(arrays[0].untyped_data()), arrays[1].untyped_data(),
        static_cast<char*>(arrays[2].untyped_data()));
  } catch (const std::exception& e) {  // dnnl::error too
    return ffi::Error::Internal(std::string("dgkd_jax's convolution by oneDNN: ") + e.what());
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dgkd_convolve, Convolve,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("of").Attr<int64_t>("stride")
                                  .Attr<int64_t>("top").Attr<int64_t>("bottom")
                                  .Attr<int64_t>("left").Attr<int64_t>("right"));

// Whether this processor computes in bfloat16; oneDNN has no such convolutions for others.
extern "C" int dgkd_takes_bfloat16() {
  try {
    for (Of of : {kImages, kKernel, kOutput})
      Plan(of, {{1, 16, 8, 8}, {16, 16, 3, 3}, {1, 16, 8, 8}, Type::bf16, 1, 1, 1, 1, 1});
    return 1;
  } catch (const std::exception&) {
    return 0;
  }
}
