// Jacobi's method for one instruction set: each of portable.cpp, avx2.cpp and avx512.cpp includes this after it has set
// the compiler's target.

namespace growkern {
namespace {

constexpr int kSweeps = 30;

template <class T>
constexpr T kTolerance = sizeof(T) == 8 ? T(1e-15) : T(3e-7);  // of the off-diagonal part, beside the whole

template <class T, int Bytes>
struct LaneBatch {
  typedef T Vector __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));
  static constexpr int width = Bytes / sizeof(T);

  int64_t n;                               // even; an odd matrix has a row and column of zeros more
  Vector *a, *v, *original, *scratch;      // n × n each, row-major; of a the upper triangle
  int64_t* order;                          // of the round robin: 2i and 2i + 1 meet
  Vector *s, *tau;                         // of the rotations of a round

  static Vector root(Vector x) {
    Vector y;
    for (int lane = 0; lane < width; ++lane)
      y[lane] = sizeof(T) == 8 ? __builtin_sqrt(x[lane]) : __builtin_sqrtf(x[lane]);
    return y;
  }
  static Vector magnitude(Vector x) { return x < 0 ? -x : x; }

  // (x, y) ← (x − s(y + τx), y + s(x − τy)): Rutishauser's form keeps the product of all rotations orthogonal.
  static inline __attribute__((always_inline)) void rotate(Vector& x, Vector& y, Vector s, Vector tau) {
    const Vector x0 = x, y0 = y;
    x = x0 - s * (y0 + tau * x0);
    y = y0 + s * (x0 - tau * y0);
  }

  Vector& upper(int64_t i, int64_t j) { return i < j ? a[i * n + j] : a[j * n + i]; }

  // The n/2 rotations of a round touch disjoint rows, so that all angles are known before the first is applied.
  void angles() {
    const Vector zero{}, one = zero + T(1);
    for (int64_t pair = 0; pair < n / 2; ++pair) {
      const int64_t p = order[2 * pair], q = order[2 * pair + 1];
      Vector &app = a[p * n + p], &aqq = a[q * n + q], &apq = upper(p, q);
      const Vector theta = (aqq - app) / (apq + apq), size = magnitude(theta);
      Vector t = one / (size + root(one + size * size));
      t = theta < 0 ? -t : t;
      t = apq == 0 ? zero : t;
      const Vector c = one / root(one + t * t);
      s[pair] = t * c;
      tau[pair] = s[pair] / (one + c);
      app -= t * apq;
      aqq += t * apq;
      apq = zero;
    }
  }

  void apply() {
    for (int64_t first = 0; first < n / 2; ++first) {
      const int64_t p = order[2 * first], q = order[2 * first + 1];
      const Vector s0 = s[first], tau0 = tau[first];
      for (int64_t second = first + 1; second < n / 2; ++second) {
        const Vector s1 = s[second], tau1 = tau[second];
        const int64_t r = order[2 * second], t = order[2 * second + 1];
        // A block of two by two is read once, and turned from both sides.
        Vector pr = upper(p, r), pt = upper(p, t), qr = upper(q, r), qt = upper(q, t);
        rotate(pr, qr, s0, tau0);
        rotate(pt, qt, s0, tau0);
        rotate(pr, pt, s1, tau1);
        rotate(qr, qt, s1, tau1);
        upper(p, r) = pr;
        upper(p, t) = pt;
        upper(q, r) = qr;
        upper(q, t) = qt;
      }
      // Rows of v are eigenvectors, so that both are contiguous.
      for (int64_t k = 0; k < n; ++k) rotate(v[p * n + k], v[q * n + k], s0, tau0);
    }
  }

  // All pairs once in n − 1 rounds: the first index stays, the others move on by one place.
  void sweep() {
    for (int64_t round = 0; round < n - 1; ++round) {
      const auto at = [&](int64_t place) { return place == 0 ? 0 : 1 + (place - 1 + round) % (n - 1); };
      for (int64_t pair = 0; pair < n / 2; ++pair) {
        order[2 * pair] = at(pair);
        order[2 * pair + 1] = at(n - 1 - pair);
      }
      angles();
      apply();
    }
  }

  // Squares of the off-diagonal part, or of all.
  Vector energy(bool diagonal) const {
    Vector sum{};
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i + 1; j < n; ++j) sum += a[i * n + j] * a[i * n + j] * T(2);
      if (diagonal) sum += a[i * n + i] * a[i * n + i];
    }
    return sum;
  }

  // Sweeps until every lane is diagonal; lanes that are not are zero in the result.
  Vector diagonalise() {
    const Vector limit = energy(true) * kTolerance<T> * kTolerance<T>;
    for (int sweeps = 0; sweeps < kSweeps; ++sweeps) {
      sweep();
      bool all = true;
      const Vector off = energy(false);
      for (int lane = 0; lane < width; ++lane) all &= off[lane] <= limit[lane];
      if (all) break;
    }
    return energy(false) <= limit ? Vector{} + T(1) : Vector{};
  }

  // out = left · right, or left · rightᵀ
  void product(const Vector* left, const Vector* right, bool transposed, Vector* out) const {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) out[i * n + j] = Vector{};
      if (transposed) {
        for (int64_t j = 0; j < n; ++j) {
          Vector sum{};
          for (int64_t k = 0; k < n; ++k) sum += left[i * n + k] * right[j * n + k];
          out[i * n + j] = sum;
        }
      } else {
        for (int64_t k = 0; k < n; ++k) {
          const Vector scale = left[i * n + k];
          for (int64_t j = 0; j < n; ++j) out[i * n + j] += scale * right[k * n + j];
        }
      }
    }
  }

  // One step of Newton and Schulz, v ← 1.5 v − 0.5 v vᵀ v, then the diagonal of v · original · vᵀ: rounding of
  // hundreds of rotations is undone.
  void polish() {
    product(v, v, true, a);
    product(a, v, false, scratch);
    for (int64_t i = 0; i < n * n; ++i) v[i] = v[i] * T(1.5) - scratch[i] * T(0.5);
    product(v, original, false, scratch);
    for (int64_t i = 0; i < n; ++i) {
      Vector sum{};
      for (int64_t k = 0; k < n; ++k) sum += scratch[i * n + k] * v[i * n + k];
      a[i * n + i] = sum;
    }
  }
};

template <class T, int Bytes>
int64_t jacobi_bytes(int64_t n) {
  return (4 * (n + 1) * (n + 1) + n + 1) * Bytes;
}

template <class T, int Bytes>
void jacobi_eigh(const T* matrices, int64_t count, int64_t n, T* w, T* q, void* work) {
  using Lane = LaneBatch<T, Bytes>;
  using Vector = typename Lane::Vector;
  constexpr int width = Lane::width;
  const int64_t even = n + n % 2;
  Vector* memory = reinterpret_cast<Vector*>(work);
  int64_t order[kLargestInLanes];
  Lane batch{even, memory, memory + even * even, memory + 2 * even * even, memory + 3 * even * even, order,
             memory + 4 * even * even, memory + 4 * even * even + even / 2};
  for (int64_t first = 0; first < count; first += width) {
    const int used = static_cast<int>(count - first < width ? count - first : width);
    bool finite[width];
    T scale[width];
    for (int lane = 0; lane < width; ++lane) {
      const T* in = matrices + (first + (lane < used ? lane : 0)) * n * n;
      T largest = 0;
      finite[lane] = true;
      for (int64_t i = 0; i < n * n; ++i) {
        const T size = in[i] < 0 ? -in[i] : in[i];
        finite[lane] &= size <= (sizeof(T) == 8 ? T(__DBL_MAX__) : T(__FLT_MAX__));
        largest = size > largest ? size : largest;
      }
      // So that squares neither overflow nor vanish.
      scale[lane] = largest > 0 && finite[lane] ? largest : T(1);
      for (int64_t i = 0; i < even; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
          const T value = finite[lane] && i < n ? in[i * n + j] / scale[lane] : T(0);
          const int64_t here = i * even + j, there = j * even + i;
          batch.a[there][lane] = batch.original[here][lane] = batch.original[there][lane] = value;
        }
      }
    }
    for (int64_t i = 0; i < even * even; ++i) batch.v[i] = Vector{} + T(i / even == i % even);
    const Vector converged = batch.diagonalise();
    batch.polish();
    for (int lane = 0; lane < used; ++lane) {
      T* values = w + (first + lane) * n;
      T* vectors = q + (first + lane) * n * n;
      const bool good = finite[lane] && converged[lane] != 0;
      for (int64_t i = 0; i < n; ++i) {
        // The rank of an eigenvalue is its column; equal ones keep their order.
        const T value = batch.a[i * (even + 1)][lane];
        int64_t column = 0;
        for (int64_t j = 0; j < n; ++j) {
          const T other = batch.a[j * (even + 1)][lane];
          column += other < value || (other == value && j < i);
        }
        if (!good) column = i;
        values[column] = good ? value * scale[lane] : T(__builtin_nan(""));
        for (int64_t k = 0; k < n; ++k)
          vectors[k * n + column] = good ? batch.v[i * even + k][lane] : T(__builtin_nan(""));
      }
    }
  }
}

}  // namespace
}  // namespace growkern
