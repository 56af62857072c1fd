// The kernels of csrc/moments, run by the emulation.
#include "ptx.h"

#include "../../csrc/moments/assemble.cuh"
#include "../../csrc/moments/correlate.cuh"
#include "../../csrc/moments/pack.cuh"
#include "../../csrc/moments/subtract.cuh"

using namespace growkern;

namespace {

void run(const Correlation& task, int count, int block, int tf32, int seed) {
  choose_correlate(task, block, tf32, [&](auto math, auto size) {
    using Kernel = Correlate<decltype(math), size.value>;
    emulation::launch({unsigned(count)}, {unsigned(Grid<size.value>::threads)}, sizeof(typename Kernel::Shared), seed,
                      [&](char* shared) { Kernel(task, reinterpret_cast<unsigned char*>(shared)).run(); });
  });
}

template <class From, class To>
void run_pack(const Copy* copies, int count, int programs, int seed) {
  emulation::launch({unsigned(programs)}, {kPackThreads}, sizeof(To) * kPackPixels * (kPackChannels + 1), seed,
                    [=](char* shared) { pack_block<From>(copies, count, reinterpret_cast<To*>(shared)); });
}

}  // namespace

extern "C" {
void correlate(const void** sides, const int64_t* pitches, const int64_t* channels, int aligned, int64_t images,
               int u_dtype, int v_dtype, float* out, const Product* products, const Item* items, int count,
               const float* signs, int64_t pitch, int block, int tf32, int seed) {
  Correlation task{};
  for (int i = 0; i < 4; ++i) {
    task.u[i] = {sides[i], pitches[i], int(channels[i])};
    task.v[i] = {sides[4 + i], pitches[4 + i], int(channels[4 + i])};
  }
  task.u_dtype = Dtype(u_dtype), task.v_dtype = Dtype(v_dtype), task.aligned = aligned;
  task.out = out, task.products = products, task.items = items, task.images = images;
  task.signs = signs, task.pitch = pitch;
  run(task, count, block, tf32, seed);
}

void correlate_group(const Source* sources, const Signs* drawn, int unit, int u_dtype, int v_dtype, float* out,
                     const Product* products, const Item* items, int count, int block, int tf32, int seed) {
  Correlation task{};
  task.sources = sources, task.drawn = drawn, task.unit = unit, task.aligned = unit > 1;
  task.u_dtype = Dtype(u_dtype), task.v_dtype = Dtype(v_dtype);
  task.out = out, task.products = products, task.items = items;
  run(task, count, block, tf32, seed);
}

void pack(const Copy* copies, int count, int from, int to, int programs, int seed) {
  if (from == 8) run_pack<double, float>(copies, count, programs, seed);
  else if (to == 4) run_pack<uint32_t, uint32_t>(copies, count, programs, seed);
  else run_pack<uint16_t, uint16_t>(copies, count, programs, seed);
}

void combine(float* buffer, const SplitSum* sums, int count, const float* signs, int64_t pitch, int64_t samples,
             const Signs* drawn, int draws, int64_t slots, int add, int seed) {
  const Combination task{buffer, sums, signs, pitch, samples, drawn, draws, slots, add != 0};
  emulation::launch({unsigned(count), unsigned((draws - 1) / kCombineDraws + 1)}, {kAssembleThreads}, kCombineShared,
                    seed, [&](char* shared) { combine_block(task, reinterpret_cast<float*>(shared)); });
}

void reduce(float* workspace, const SplitSum* sums, int count, int elements, int seed) {
  emulation::launch({unsigned(count)}, {kAssembleThreads}, 0, seed,
                    [=](char*) { reduce_block(workspace, sums, elements); });
}

void assemble(const float* slots, int64_t slots_size, int draws, float** results, int result_count,
              const int64_t* addresses, const Region* regions, int count, const int* starts, const Term* terms, const float* weights,
              int programs, int tile_rows, int tile_columns, int seed) {
  Assembly task{slots, slots_size, {}, addresses, regions, starts, terms, weights, count, tile_rows, tile_columns};
  std::copy(results, results + result_count, task.results);
  emulation::launch({unsigned(programs), unsigned(draws)}, {kAssembleThreads}, 0, seed,
                    [&](char*) { assemble_block(task); });
}

void subtract(const void* h, const void* v, const int64_t* pitches, int64_t whole, int64_t channels,
              int aligned, int h_dtype, int v_dtype, const float* weight, float* out, const int64_t* sizes,
              const int64_t* kernel, int block, int tf32, int seed) {
  Subtraction task{};
  task.h = {h, pitches[0], int(whole)}, task.channels = int(channels), task.v = {v, pitches[1], 0};
  task.h_dtype = Dtype(h_dtype), task.v_dtype = Dtype(v_dtype), task.aligned = aligned;
  task.weight = weight, task.weight_pitch = sizes[1], task.out = out, task.out_pitch = pitches[2];
  task.positions = sizes[0], task.targets = int(sizes[1]), task.rows = int(sizes[2]), task.columns = int(sizes[3]);
  task.map_rows = int(sizes[4]), task.map_columns = int(sizes[5]);
  task.taps = int(kernel[0]), task.kernel_columns = int(kernel[1]);
  for (int i = 0; i < 2; ++i)
    task.stride[i] = int(kernel[2 + i]), task.padding[i] = int(kernel[4 + i]), task.step[i] = int(kernel[6 + i]);
  choose_subtract(block, tf32, [&](auto math, auto size) {
    using Kernel = Subtract<decltype(math), size.value>;
    emulation::launch({unsigned(subtract_blocks(task, block))}, {unsigned(Grid<size.value>::threads)},
                      sizeof(typename Kernel::Shared), seed,
                      [&](char* shared) { Kernel(task, blockIdx.x, reinterpret_cast<unsigned char*>(shared)).run(); });
  });
}

void subtract_group(const Site* sites, int count, int programs, int dtype, int unit, int block, int tf32, int seed) {
  choose_subtract(block, tf32, [&](auto math, auto size) {
    using Kernel = Subtract<decltype(math), size.value>;
    emulation::launch({unsigned(programs)}, {unsigned(Grid<size.value>::threads)}, sizeof(typename Kernel::Shared),
                      seed, [&](char* shared) {
                        const Site& site = row_of(sites, count);
                        const Subtraction task = site.subtraction(Dtype(dtype), unit);
                        Kernel(task, blockIdx.x - site.first_program, reinterpret_cast<unsigned char*>(shared)).run();
                      });
  });
}
}
