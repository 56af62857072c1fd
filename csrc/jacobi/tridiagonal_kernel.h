// Eigenproblems by way of tridiagonal matrices, for one instruction set, after lanes_kernel.h. Nothing of the standard
// library is used, as code of its templates is shared with other processors' kernels.

namespace growkern {
namespace {

constexpr int kIterations = 30;  // for each eigenvalue

template <class T, int Bytes>
struct Tridiagonal {
  typedef T Vector __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));
  static constexpr int64_t width = Bytes / sizeof(T);
  template <int N>
  struct Strip {
    static constexpr int vectors = N;
  };
  static constexpr T kNothing = sizeof(T) == 8 ? T(1e-200) : T(1e-30);  // of squares, where entries are at most 1
  static constexpr double kResolved = sizeof(T) == 8 ? 1e-16 : 1e-8;  // of an off-diagonal entry, beside the norm

  int64_t n, row, index;  // rows are `row` apart; place in the batch
  T* a;                   // in the end its rows are eigenvectors
  double *d, *e;          // the diagonal and what is beside it, in double precision whatever T is
  T *cosines, *sines;     // of the rotations that wait for a
  int64_t* upper;         // and the first of the two rows that each turns
  T *z, *p, *beta;        // scratch: n × row, row and n
  T scale;
  bool good;
  int64_t l, m, i, iterations, waiting;  // the sweep under way turns i and i + 1 from i = m − 1 down to l
  double shift, limit;

  static int64_t padded(int64_t n) { return (n + width - 1) / width * width; }
  static int64_t held(int64_t n) { return n * n / 4 + n; }  // rotations that may wait
  static double magnitude(double x) { return x < 0 ? -x : x; }
  static Vector& at(T* x, int64_t block) { return *reinterpret_cast<Vector*>(x + block * width); }
  static T total(Vector x) {
    T sum = 0;
    for (int64_t lane = 0; lane < width; ++lane) sum += x[lane];
    return sum;
  }

  // Calls body(first, strip) on as many vectors of a row as fit into registers, until all are done.
  template <class Body>
  static void by_strips(int64_t blocks, const Body& body) {
    int64_t first = 0;
    for (; blocks - first >= 4; first += 4) body(first, Strip<4>());
    if (blocks - first >= 2) body(first, Strip<2>()), first += 2;
    if (blocks > first) body(first, Strip<1>());
  }

  // p = Σ over j < k of x[j] rows[j]
  void combine(const T* x, T* rows, int64_t k, int64_t blocks) {
    by_strips(blocks, [&](int64_t first, auto strip) {
      Vector sums[strip.vectors] = {};
      for (int64_t j = 0; j < k; ++j)
        for (int b = 0; b < strip.vectors; ++b) sums[b] += x[j] * at(rows + j * row, first + b);
      for (int b = 0; b < strip.vectors; ++b) at(p, first + b) = sums[b];
    });
  }

  // Householder's reflections, from the last row up; row k keeps the vector of its own, v, with H = 1 − beta v vᵀ.
  void reduce() {
    for (int64_t k = n - 1; k > 0; --k) {
      T* v = a + k * row;
      const int64_t blocks = (k + width - 1) / width;
      const T last = v[k - 1];
      d[k] = v[k], e[k - 1] = last, beta[k] = 0;
      for (int64_t j = k - 1; j < row; ++j) v[j] = 0;
      Vector squares{};
      for (int64_t b = 0; b < blocks; ++b) squares += at(v, b) * at(v, b);
      const T others = total(squares), square = others + last * last;
      if (others <= kNothing) continue;
      const T length = sizeof(T) == 8 ? __builtin_sqrt(square) : __builtin_sqrtf(square);
      const T kept = last > 0 ? -length : length;
      e[k - 1] = kept, beta[k] = 1 / (square - kept * last), v[k - 1] = last - kept;
      combine(v, a, k, blocks);
      Vector products{};
      for (int64_t b = 0; b < blocks; ++b) products += at(v, b) * (at(p, b) *= beta[k]);
      const T half = total(products) * beta[k] / 2;
      for (int64_t b = 0; b < blocks; ++b) at(p, b) -= half * at(v, b);
      by_strips(blocks, [&](int64_t first, auto strip) {
        Vector vs[strip.vectors], ps[strip.vectors];
        for (int b = 0; b < strip.vectors; ++b) vs[b] = at(v, first + b), ps[b] = at(p, first + b);
        for (int64_t j = 0; j < k; ++j)
          for (int b = 0; b < strip.vectors; ++b) at(a + j * row, first + b) -= v[j] * ps[b] + p[j] * vs[b];
      });
    }
    d[0] = a[0], e[n - 1] = 0;
  }

  // The product of all reflections, transposed, takes the place of their vectors.
  void multiply_out() {
    for (int64_t j = 0; j < n * row; ++j) z[j] = j / row == j % row;
    for (int64_t k = 2; k < n; ++k) {
      if (beta[k] == 0) continue;
      const T* v = a + k * row;
      const int64_t blocks = (k + width - 1) / width;
      combine(v, z, k, blocks);
      by_strips(blocks, [&](int64_t first, auto strip) {
        Vector ps[strip.vectors];
        for (int b = 0; b < strip.vectors; ++b) ps[b] = beta[k] * at(p, first + b);
        for (int64_t j = 0; j < k; ++j)
          for (int b = 0; b < strip.vectors; ++b) at(z + j * row, first + b) -= v[j] * ps[b];
      });
    }
    for (int64_t j = 0; j < n; ++j)
      for (int64_t k = 0; k < n; ++k) a[j * row + k] = z[k * row + j];
  }

  void start(const T* in) {
    good = true;
    T largest = 0;
    for (int64_t j = 0; j < n * n; ++j) {
      const T size = in[j] < 0 ? -in[j] : in[j];
      good &= size <= (sizeof(T) == 8 ? T(__DBL_MAX__) : T(__FLT_MAX__));
      largest = size > largest ? size : largest;
    }
    scale = largest > 0 && good ? largest : T(1);  // so that squares neither overflow nor vanish
    for (int64_t j = 0; j < n * row; ++j) a[j] = 0;
    for (int64_t j = 0; j < n; ++j)
      for (int64_t k = 0; k <= j; ++k) a[j * row + k] = a[k * row + j] = good ? in[j * n + k] / scale : T(0);
    reduce();
    multiply_out();
    double norm = 0;
    for (int64_t j = 0; j < n; ++j) {
      norm = magnitude(d[j]) > norm ? magnitude(d[j]) : norm;
      norm = magnitude(e[j]) > norm ? magnitude(e[j]) : norm;
    }
    limit = kResolved * norm, l = 0, waiting = 0, iterations = 0;
  }

  // Sets out on the next sweep of the QL method; false where there is none to do.
  bool next() {
    for (; l < n; ++l, iterations = 0) {
      for (m = l; m < n - 1 && magnitude(e[m]) > limit;) ++m;
      if (m > l && iterations < kIterations) break;
      good &= m == l;
    }
    if (l >= n) return false;
    if (waiting + m - l > held(n)) rotate();
    const double theta = (d[l + 1] - d[l]) / (2 * e[l]), root = __builtin_sqrt(theta * theta + 1);
    shift = d[m] - d[l] + e[l] / (theta + (theta < 0 ? -root : root));
    ++iterations, i = m - 1;
    return true;
  }

  // All rotations that wait, on one strip of columns after the other; neighbours share a row, which stays in registers.
  void rotate() {
    by_strips(row / width, [&](int64_t first, auto strip) {
      Vector shared[strip.vectors] = {};
      T* place = nullptr;
      for (int64_t r = 0; r < waiting; ++r) {
        T *one = a + upper[r] * row, *other = one + row;
        if (other != place)
          for (int b = 0; b < strip.vectors; ++b) {
            if (place) at(place, first + b) = shared[b];
            shared[b] = at(other, first + b);
          }
        const T c = cosines[r], s = sines[r];
        for (int b = 0; b < strip.vectors; ++b) {
          const Vector x = at(one, first + b);
          at(other, first + b) = s * x + c * shared[b];
          shared[b] = c * x - s * shared[b];
        }
        place = one;
      }
      for (int b = 0; b < strip.vectors && place; ++b) at(place, first + b) = shared[b];
    });
    waiting = 0;
  }

  void finish(T* w, T* q) {
    rotate();
    for (int64_t j = 0; j < n; ++j) {
      // The rank of an eigenvalue is its column; equal ones keep their order.
      int64_t column = 0;
      for (int64_t k = 0; k < n; ++k) column += d[k] < d[j] || (d[k] == d[j] && k < j);
      if (!good) column = j;
      w[column] = good ? T(d[j] * scale) : T(__builtin_nan(""));
      upper[column] = j;
    }
    for (int64_t k = 0; k < n; ++k)
      for (int64_t j = 0; j < n; ++j) q[k * n + j] = good ? a[upper[j] * row + k] : T(__builtin_nan(""));
  }
};

// Rotations of a sweep wait for each other, through a root and a quotient. So there are several matrices under way,
// each at a place of its own, and one rotation of each is computed at a time, in the lanes of a vector.
template <class T, int Bytes>
struct UnderWay {
  using Matrix = Tridiagonal<T, Bytes>;
  using Lanes = typename Tridiagonal<double, Bytes>::Vector;
  static constexpr int lanes = Bytes / 8;

  const T* in;
  int64_t count, begun, n;
  T *w, *q;
  Matrix matrices[lanes];

  template <class U>
  static U* take(uintptr_t& memory, int64_t length) {
    U* const taken = reinterpret_cast<U*>(memory);
    memory += (length * static_cast<int64_t>(sizeof(U)) + 63) / 64 * 64;
    return taken;
  }
  // Hands out memory, and tells where it ends.
  uintptr_t place(uintptr_t memory) {
    const int64_t row = Matrix::padded(n), held = Matrix::held(n);
    T *const z = take<T>(memory, n * row), *const p = take<T>(memory, row), *const beta = take<T>(memory, n);
    for (Matrix& each : matrices) {
      each.n = n, each.row = row, each.z = z, each.p = p, each.beta = beta, each.i = each.m = 0;
      each.a = take<T>(memory, n * row), each.d = take<double>(memory, n), each.e = take<double>(memory, n);
      each.cosines = take<T>(memory, held), each.sines = take<T>(memory, held);
      each.upper = take<int64_t>(memory, held);
    }
    return memory;
  }

  // Sets a matrix out on its next sweep, or what is next in its place; false where nothing is.
  __attribute__((noinline)) bool go_on(Matrix& each, bool fresh) {
    while (fresh || !each.next()) {
      if (!fresh) each.finish(w + each.index * n, q + each.index * n * n);
      each.i = 0;
      if (begun == count) return false;
      each.index = begun++, fresh = false;
      each.start(in + each.index * n * n);
    }
    return true;
  }

  void run() {
    Lanes shift{}, sine{}, cosine{}, carried{}, below{};
    bool working[lanes];
    int64_t rotating = 0;
    const auto set_out = [&](int k, bool fresh) __attribute__((always_inline)) {
      working[k] = go_on(matrices[k], fresh);
      shift[k] = matrices[k].shift, sine[k] = cosine[k] = 1, carried[k] = 0, below[k] = matrices[k].d[matrices[k].m];
      rotating += working[k] - !fresh;
    };
#pragma GCC unroll 8
    for (int k = 0; k < lanes; ++k) set_out(k, true);
    while (rotating > 0) {
      Lanes e{}, d{};
#pragma GCC unroll 8
      for (int k = 0; k < lanes; ++k) e[k] = matrices[k].e[matrices[k].i], d[k] = matrices[k].d[matrices[k].i];
      const Lanes f = sine * e, b = cosine * e;
      Lanes r = f * f + shift * shift;
      for (int k = 0; k < lanes; ++k) r[k] = __builtin_sqrt(r[k]);
      const Lanes inverse = 1 / r;
      sine = r == 0 ? Lanes{} : f * inverse;
      cosine = r == 0 ? Lanes{} + 1 : shift * inverse;
      const Lanes before = below - carried, twice = (d - before) * sine + 2 * cosine * b;
      carried = sine * twice, shift = cosine * twice - b, below = d;
      const Lanes diagonal = before + carried;
#pragma GCC unroll 8
      for (int k = 0; k < lanes; ++k) {
        if (!working[k]) continue;
        Matrix& each = matrices[k];
        const int64_t i = each.i--, rotation = each.waiting++;
        each.e[i + 1] = r[k], each.d[i + 1] = diagonal[k];
        each.cosines[rotation] = T(cosine[k]), each.sines[rotation] = T(sine[k]), each.upper[rotation] = i;
        if (i > each.l) continue;
        each.d[each.l] -= carried[k], each.e[each.l] = shift[k], each.e[each.m] = 0;
        set_out(k, false);
      }
    }
  }
};

template <class T, int Bytes>
int64_t tridiagonal_bytes(int64_t n) {
  UnderWay<T, Bytes> all;
  all.n = n;
  return static_cast<int64_t>(all.place(0));
}

template <class T, int Bytes>
void tridiagonal_eigh(const T* matrices, int64_t count, int64_t n, T* w, T* q, void* work) {
  UnderWay<T, Bytes> all{};
  all.in = matrices, all.count = count, all.n = n, all.w = w, all.q = q;
  all.place(reinterpret_cast<uintptr_t>(work));
  all.run();
}

template <class T, int Bytes>
constexpr Lanes<T> lanes_table() {
  return {{Bytes / sizeof(T), jacobi_eigh<T, Bytes>, jacobi_bytes<T, Bytes>},
          {1, tridiagonal_eigh<T, Bytes>, tridiagonal_bytes<T, Bytes>}};
}

}  // namespace
}  // namespace growkern
