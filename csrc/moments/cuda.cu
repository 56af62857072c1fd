// The kernels of the moments in growkern_cuda, on libtorch's stable ABI: the engine of growkern/ops/moments/gpu.py.
// Shapes and dtypes have been checked there.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../launch.h"
#include "ptx.cuh"

#include "assemble.cuh"
#include "correlate.cuh"
#include "pack.cuh"
#include "subtract.cuh"

namespace growkern {

template <class Math, int BLOCK>
__global__ void __launch_bounds__(Grid<BLOCK>::threads) correlate_kernel(const __grid_constant__ Correlation task) {
  extern __shared__ __align__(16) unsigned char shared[];
  Correlate<Math, BLOCK>(task, shared).run();
}

template <class Math, int BLOCK>
__global__ void __launch_bounds__(Grid<BLOCK>::threads) subtract_kernel(const __grid_constant__ Subtraction task) {
  extern __shared__ __align__(16) unsigned char shared[];
  Subtract<Math, BLOCK>(task, blockIdx.x, shared).run();
}

template <class Math, int BLOCK>
__global__ void __launch_bounds__(Grid<BLOCK>::threads, 1) subtract_group_kernel(const Site* sites, int count, Dtype dtype,
                                                                              int unit) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Site& site = row_of(sites, count);
  const Subtraction task = site.subtraction(dtype, unit);
  Subtract<Math, BLOCK>(task, blockIdx.x - site.first_program, shared).run();
}

__global__ void __launch_bounds__(kAssembleThreads) reduce_kernel(float* buffer, const SplitSum* sums, int elements) {
  reduce_block(buffer, sums, elements);
}

__global__ void __launch_bounds__(kAssembleThreads, 1) combine_kernel(const __grid_constant__ Combination task) {
  extern __shared__ __align__(16) unsigned char shared[];
  combine_block(task, reinterpret_cast<float*>(shared));
}

__global__ void __launch_bounds__(kAssembleThreads) assemble_kernel(const __grid_constant__ Assembly task) {
  assemble_block(task);
}

template <class From, class To>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const Copy* copies, int count) {
  extern __shared__ __align__(16) unsigned char shared[];
  pack_block<From>(copies, count, reinterpret_cast<To*>(shared));
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Integers = std::vector<int64_t>;

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: return Dtype::float32;
  }
}

Side side(const Tensor& tensor, int64_t pitch, int64_t channels) {
  return {tensor.const_data_ptr(), pitch, static_cast<int>(channels)};
}

void launch_correlate(const Launcher& launch, const Correlation& task, const Tensor& items, int64_t block, bool tf32) {
  STD_TORCH_CHECK(block == 16 || block == 32 || block == 64, "block: expected 16, 32 or 64, got ", block);
  const auto count = static_cast<unsigned>(items.sizes()[0]);
  choose_correlate(task, block, tf32, [&](auto math, auto size) {
    using Kernel = Correlate<decltype(math), size.value>;
    launch(correlate_kernel<decltype(math), size.value>, count, Grid<size.value>::threads,
           sizeof(typename Kernel::Shared), task);
  });
}

Correlation correlation(const Tensor& out, const Tensor& products, const Tensor& items, bool aligned) {
  STD_TORCH_CHECK(products.sizes()[1] * 8 == sizeof(Product), "products: expected rows of ", sizeof(Product) / 8);
  Correlation task{};
  task.out = data<float>(out), task.aligned = aligned;
  task.products = const_data<Product>(products), task.items = const_data<Item>(items);
  return task;
}

// Pitches and channels are those of us, then of vs: x, h, v and the ones.
void correlate(std::vector<Tensor> us, std::vector<Tensor> vs, Integers pitches, Integers channels, bool aligned,
               Tensor out, const Tensor& products, const Tensor& items, std::optional<Tensor> signs,
               int64_t block, bool tf32) {
  const Launcher launch(out);
  Correlation task = correlation(out, products, items, aligned);
  for (int i = 0; i < 4; ++i) {
    task.u[i] = side(us[i], pitches[i], channels[i]);
    task.v[i] = side(vs[i], pitches[4 + i], channels[4 + i]);
  }
  task.images = us[0].sizes()[0], task.u_dtype = dtype_of(us[0]), task.v_dtype = dtype_of(vs[2]);
  if (signs) task.signs = const_data<float>(*signs), task.pitch = signs->strides()[0];
  launch_correlate(launch, task, items, block, tf32);
}

// The same with sides and signs from tables; u and v tell the dtypes.
void correlate_group(const Tensor& sources, std::optional<Tensor> drawn, int64_t unit, const Tensor& u, const Tensor& v,
                     Tensor out, const Tensor& products, const Tensor& items, int64_t block, bool tf32) {
  const Launcher launch(out);
  Correlation task = correlation(out, products, items, unit > 1);
  task.sources = const_data<Source>(sources), task.unit = static_cast<int>(unit);
  if (drawn) task.drawn = const_data<Signs>(*drawn);
  task.u_dtype = dtype_of(u), task.v_dtype = dtype_of(v);
  launch_correlate(launch, task, items, block, tf32);
}

void pack(const Tensor& copies, const Tensor& source, const Tensor& target, int64_t programs, int64_t pixels,
          int64_t channels) {
  STD_TORCH_CHECK(copies.sizes()[1] * 8 == sizeof(Copy), "copies: expected rows of ", sizeof(Copy) / 8);
  STD_TORCH_CHECK(pixels == kPackPixels && channels == kPackChannels, "tiles: expected other sizes");
  const Launcher launch(copies);
  const auto blocks = static_cast<unsigned>(programs);
  const int count = static_cast<int>(copies.sizes()[0]);
  const auto run = [&](auto from, auto to) {
    launch(pack_kernel<decltype(from), decltype(to)>, blocks, kPackThreads,
           sizeof(to) * kPackPixels * (kPackChannels + 1), const_data<Copy>(copies), count);
  };
  if (source.scalar_type() == ScalarType::Double) run(double{}, float{});
  else if (dtype_of(target) == Dtype::float32) run(uint32_t{}, uint32_t{});
  else run(uint16_t{}, uint16_t{});
}

void reduce(Tensor workspace, const Tensor& sums, int64_t elements) {
  const Launcher launch(workspace);
  launch(reduce_kernel, static_cast<unsigned>(sums.sizes()[0]), kAssembleThreads, 0, data<float>(workspace),
         const_data<SplitSum>(sums), static_cast<int>(elements));
}

// Under `signs`, or those of a table.
void combine(Tensor workspace, const Tensor& sums, std::optional<Tensor> signs, std::optional<Tensor> drawn,
             int64_t draws, int64_t slots, bool add, int64_t elements, int64_t draws_at_once) {
  STD_TORCH_CHECK(elements == kCombineElements && draws_at_once == kCombineDraws, "blocks: expected other sizes");
  const Launcher launch(workspace);
  Combination task{data<float>(workspace), const_data<SplitSum>(sums)};
  if (signs) task.signs = const_data<float>(*signs), task.pitch = signs->strides()[0];
  if (signs) task.samples = signs->sizes()[1];
  if (drawn) task.drawn = const_data<Signs>(*drawn);
  task.draws = static_cast<int>(draws), task.slots = slots, task.add = add;
  const dim3 grid(static_cast<unsigned>(sums.sizes()[0]), static_cast<unsigned>((draws - 1) / kCombineDraws + 1));
  launch(combine_kernel, grid, kAssembleThreads, kCombineShared, task);
}

// To `results`, or with addresses to results at those.
void assemble(const Tensor& slots, std::vector<Tensor> results, std::optional<Tensor> addresses, const Tensor& regions,
              const Tensor& starts, const Tensor& terms, const Tensor& weights, int64_t programs, int64_t tile_rows,
              int64_t tile_columns) {
  STD_TORCH_CHECK(regions.sizes()[1] * 8 == sizeof(Region), "regions: expected rows of ", sizeof(Region) / 8);
  const Launcher launch(slots);
  Assembly task{};
  task.slots = const_data<float>(slots), task.slots_size = slots.strides()[0];
  for (size_t i = 0; i < results.size(); ++i) task.results[i] = data<float>(results[i]);
  if (addresses) task.addresses = const_data<int64_t>(*addresses);
  task.regions = const_data<Region>(regions), task.starts = const_data<int>(starts);
  task.terms = const_data<Term>(terms), task.weights = const_data<float>(weights);
  task.count = static_cast<int>(regions.sizes()[0]);
  task.tile_rows = static_cast<int>(tile_rows), task.tile_columns = static_cast<int>(tile_columns);
  const dim3 grid(static_cast<unsigned>(programs), static_cast<unsigned>(slots.sizes()[0]));
  launch(assemble_kernel, grid, kAssembleThreads, 0, task);
}

// Maps are NHWC; a matrix is a map of one pixel. kernel: taps, columns, then strides, paddings and dilations.
void subtract(const Tensor& h, const Tensor& v, Integers pitches, int64_t whole, int64_t channels, bool aligned,
              const Tensor& weight, Tensor out, Integers kernel, int64_t block, bool tf32) {
  const Launcher launch(out);
  const auto length = [](const Tensor& maps, int axis) {
    return maps.dim() == 4 ? static_cast<int>(maps.sizes()[axis]) : 1;
  };
  Subtraction task{};
  task.h = side(h, pitches[0], whole), task.v = side(v, pitches[1], 0);
  task.h_dtype = dtype_of(h), task.v_dtype = dtype_of(v), task.aligned = aligned;
  task.weight = const_data<float>(weight), task.weight_pitch = weight.sizes()[1];
  task.out = data<float>(out), task.out_pitch = pitches[2];
  task.channels = static_cast<int>(channels), task.targets = static_cast<int>(weight.sizes()[1]);
  task.rows = length(v, 1), task.columns = length(v, 2);
  task.map_rows = length(h, 1), task.map_columns = length(h, 2);
  task.positions = v.sizes()[0] * task.rows * task.columns;
  task.taps = static_cast<int>(kernel[0]), task.kernel_columns = static_cast<int>(kernel[1]);
  for (int axis = 0; axis < 2; ++axis) {
    task.stride[axis] = static_cast<int>(kernel[2 + axis]);
    task.padding[axis] = static_cast<int>(kernel[4 + axis]);
    task.step[axis] = static_cast<int>(kernel[6 + axis]);
  }
  const auto blocks = static_cast<unsigned>(subtract_blocks(task, block));
  choose_subtract(block, tf32, [&](auto math, auto size) {
    using Kernel = Subtract<decltype(math), size.value>;
    launch(subtract_kernel<decltype(math), size.value>, blocks, Grid<size.value>::threads,
           sizeof(typename Kernel::Shared), task);
  });
}

void subtract_group(const Tensor& sites, int64_t programs, const Tensor& like, int64_t unit, int64_t block, bool tf32) {
  STD_TORCH_CHECK(sites.sizes()[1] * 8 == sizeof(Site), "sites: expected rows of ", sizeof(Site) / 8);
  const Launcher launch(sites);
  choose_subtract(block, tf32, [&](auto math, auto size) {
    using Kernel = Subtract<decltype(math), size.value>;
    launch(subtract_group_kernel<decltype(math), size.value>, static_cast<unsigned>(programs),
           Grid<size.value>::threads, sizeof(typename Kernel::Shared), const_data<Site>(sites),
           static_cast<int>(sites.sizes()[0]), dtype_of(like), static_cast<int>(unit));
  });
}

}  // namespace
}  // namespace growkern

STABLE_TORCH_LIBRARY_FRAGMENT(growkern_cuda, m) {
  m.def(
      "correlate(Tensor[] us, Tensor[] vs, int[] pitches, int[] channels, bool aligned, Tensor(a!) out,"
      " Tensor products, Tensor items, Tensor? signs, int block, bool tf32) -> ()");
  m.def(
      "correlate_group(Tensor sources, Tensor? drawn, int unit, Tensor u, Tensor v, Tensor(a!) out, Tensor products,"
      " Tensor items, int block, bool tf32) -> ()");
  m.def("pack(Tensor copies, Tensor source, Tensor target, int programs, int pixels, int channels) -> ()");
  m.def(
      "combine(Tensor(a!) workspace, Tensor sums, Tensor? signs, Tensor? drawn, int draws, int slots, bool add,"
      " int elements, int draws_at_once) -> ()");
  m.def("reduce(Tensor(a!) workspace, Tensor sums, int elements) -> ()");
  m.def(
      "assemble(Tensor slots, Tensor(a!)[] results, Tensor? addresses, Tensor regions, Tensor starts, Tensor terms, Tensor weights,"
      " int programs, int tile_rows, int tile_columns) -> ()");
  m.def(
      "subtract(Tensor h, Tensor v, int[] pitches, int whole, int channels, bool aligned, Tensor weight,"
      " Tensor(a!) out, int[] kernel, int block, bool tf32) -> ()");
  m.def("subtract_group(Tensor sites, int programs, Tensor like, int unit, int block, bool tf32) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(growkern_cuda, CUDA, m) {
  m.impl("correlate", TORCH_BOX(&growkern::correlate));
  m.impl("correlate_group", TORCH_BOX(&growkern::correlate_group));
  m.impl("pack", TORCH_BOX(&growkern::pack));
  m.impl("reduce", TORCH_BOX(&growkern::reduce));
  m.impl("combine", TORCH_BOX(&growkern::combine));
  m.impl("assemble", TORCH_BOX(&growkern::assemble));
  m.impl("subtract", TORCH_BOX(&growkern::subtract));
  m.impl("subtract_group", TORCH_BOX(&growkern::subtract_group));
}
