// Sums of outer products over positions of maps: one item of a schedule by one block. Free of torch.
#pragma once

#include <type_traits>

#include "tile.cuh"

namespace growkern {

// As growkern/ops/moments/schedule.py lays them out.
struct Product {
  int64_t u, v, rows, columns, area, width, length, target, stride;
  int64_t u_base, u_row, u_column, u_pixels, v_base, v_row, v_column, v_pixels;
  int64_t draw, symmetric;
  int64_t first_column, columns_of_v, distance;  // for several shifts at once: here there is one
};

struct Item {
  int product, row, column, split;
};

// A side in memory, for many of them; pitch and channels in units that the call names.
struct Source {
  int64_t address, pitch, channels, images;
};

struct Correlation {
  Side u[4], v[4];
  int64_t images;
  const Source* sources;  // instead of u, v and images, if there are any: four for each site
  const Signs* drawn;     // likewise instead of signs, one for each site
  int unit;
  Dtype u_dtype, v_dtype;
  bool aligned;  // every row starts and ends at a multiple of 16 bytes
  float* out;
  const Product* products;
  const Item* items;
  const float* signs;  // (draws − 1, pitch), or none; they multiply v. Draw 0 is of ones.
  int64_t pitch;

  __device__ __host__ bool is_signed() const { return signs || drawn; }
};

template <class Math, int BLOCK>
struct Correlate {
  using Operand = typename Math::Operand;
  using Grid = growkern::Grid<BLOCK>;
  static constexpr int depth = Math::depth, chunk = 16 / sizeof(Operand), across = BLOCK / chunk;
  static constexpr int rows_at_once = Grid::threads / across, parts = depth / rows_at_once;
  static constexpr int tile = depth * Grid::ld;

  // Two stages: while one is multiplied the next is read.
  struct Shared {
    Operand tiles[2][2][tile];
    int64_t elements[2][2][depth];  // where rows of u and v start, −1 for none
    float signs[2][depth];
  };

  const Correlation& task;
  Shared& shared;
  const Item item;
  const Product& product;
  const Side u, v;
  const int64_t first, last;
  const int row = threadIdx.x / across, channel = threadIdx.x % across * chunk;
  Chunk<chunk> u_read[parts], v_read[parts];

  __device__ static Side pick(const Correlation& task, const Side (&sides)[4], int64_t index) {
    if (task.sources) {
      const Source& source = task.sources[index];
      const int channels = static_cast<int>(source.channels) * task.unit;
      return {reinterpret_cast<const void*>(source.address), source.pitch * task.unit, channels};
    }
    return index == 0 ? sides[0] : index == 1 ? sides[1] : index == 2 ? sides[2] : sides[3];
  }

  __device__ Correlate(const Correlation& task_, unsigned char* memory)
      : task(task_), shared(*reinterpret_cast<Shared*>(memory)), item(task.items[blockIdx.x]),
        product(task.products[item.product]), u(pick(task, task.u, product.u)), v(pick(task, task.v, product.v)),
        first(item.split * product.length), last(min(images() * product.area, first + product.length)) {}

  __device__ int64_t images() const { return task.sources ? task.sources[product.u].images : task.images; }

  __device__ float sign(int64_t image) const {
    if (!task.drawn) return task.signs[(product.draw - 1) * task.pitch + image];
    const Signs& of_site = task.drawn[product.u / 4];
    return reinterpret_cast<const float*>(of_site.address)[(product.draw - 1) * of_site.pitch + image];
  }

  // Position k is (image, row, column); one division for all channels of a row.
  __device__ void locate(int64_t start, int stage) {
    for (int i = threadIdx.x; i < depth; i += Grid::threads) {
      const int64_t k = start + i;
      int64_t image = 0, y = 0, x = 0;
      if (last < (int64_t(1) << 31)) {
        const auto area = static_cast<uint32_t>(product.area), width = static_cast<uint32_t>(product.width);
        const uint32_t number = static_cast<uint32_t>(k) / area, rest = static_cast<uint32_t>(k) % area;
        image = number, y = rest / width, x = rest % width;
      } else {
        image = k / product.area, y = k % product.area / product.width, x = k % product.area % product.width;
      }
      const int64_t u_pixel = product.u_base + image * product.u_pixels + y * product.u_row + x * product.u_column;
      const int64_t v_pixel = product.v_base + image * product.v_pixels + y * product.v_row + x * product.v_column;
      shared.elements[stage][0][i] = k < last ? u_pixel * u.pitch : -1;
      shared.elements[stage][1][i] = k < last ? v_pixel * v.pitch : -1;
      if (task.is_signed()) shared.signs[stage][i] = k < last && product.draw ? sign(image) : 1.0f;
    }
  }

  __device__ void read(int stage) {
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      const int64_t u_start = shared.elements[stage][0][row + part * rows_at_once];
      const int64_t v_start = shared.elements[stage][1][row + part * rows_at_once];
      u_read[part] = {}, v_read[part] = {};
      if (u_start >= 0) u_read[part].read(u, u_start, item.row * BLOCK + channel, task.u_dtype, task.aligned);
      if (v_start >= 0) v_read[part].read(v, v_start, item.column * BLOCK + channel, task.v_dtype, task.aligned);
    }
  }

  __device__ void write(int stage) {
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      const int at = (row + part * rows_at_once) * Grid::ld + channel;
      const float sign = task.is_signed() ? shared.signs[stage][row + part * rows_at_once] : 1.0f;
      u_read[part].write(shared.tiles[stage][0] + at, task.u_dtype, task.aligned, 1.0f);
      v_read[part].write(shared.tiles[stage][1] + at, task.v_dtype, task.aligned, sign);
    }
  }

  __device__ void run() {
    Sums<BLOCK> total;
    locate(first, 0);
    __syncthreads();
    read(0);
    locate(first + depth, 1);
    write(0);
    __syncthreads();
    int stage = 0;
    for (int64_t k = first; k < last; k += depth, stage ^= 1) {
      const bool more = k + depth < last;
      if (more) read(stage ^ 1);
      locate(k + 2 * depth, stage);
      Sums<BLOCK> part;
      Math::template multiply<BLOCK>(shared.tiles[stage][0], shared.tiles[stage][1], part);
      total += part;
      if (more) write(stage ^ 1);
      __syncthreads();
    }
    store(total);
  }

  // Of a symmetric product only the part on and above the diagonal counts, so that it is symmetric bit by bit.
  __device__ void store(const Sums<BLOCK>& total) const {
    float* const target = task.out + product.target + item.split * product.stride;
    const int64_t rows = product.rows, columns = product.columns;
    const bool symmetric = product.symmetric;
    total.each([&](int m, int n, float value) {
      m += item.row * BLOCK, n += item.column * BLOCK;
      if (m >= rows || n >= columns || (symmetric && m > n)) return;
      target[m * columns + n] = value;
      if (symmetric && m != n) target[n * columns + m] = value;
    });
  }
};

// Calls run(way to multiply, tile size): 16-bit numbers are multiplied as they are where both sides have them. Tiles of
// 16 are too small for tensor cores to gain anything.
template <class Run>
void choose_correlate(const Correlation& task, int64_t block, bool tf32, const Run& run) {
  const auto sized = [&](auto math) {
    if (block == 32) run(math, std::integral_constant<int, 32>{});
    else run(math, std::integral_constant<int, 64>{});
  };
  const bool half = task.u_dtype == task.v_dtype && task.u_dtype != Dtype::float32 && !task.is_signed();
  if (block == 16) run(Fma{}, std::integral_constant<int, 16>{});
  else if (half && task.u_dtype == Dtype::bfloat16) sized(Half<true>{});
  else if (half) sized(Half<false>{});
  else if (tf32) sized(Tf32<false>{});
  else sized(Tf32<true>{});
}

}  // namespace growkern
