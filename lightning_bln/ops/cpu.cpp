// Batch Layer Normalization on the CPU: the kernel behind lightning_bln::batch_layer_norm and its backward.
//
// What is computed is defined in reference.py; names here are the same. In short, with W = weight / sqrt(C):
//
//     y = W * w_b * r_b * (x - mu_b) + W * w_f * r_f * (x - mu_f) + bias,     r = 1 / sqrt(var + eps)
//
// How. A *slab* is one sample's part of a block of positions, packed into the accumulation type A (float, or double
// for double input) so that its rows are whole vectors:
//
//     features outside (x contiguous as N, C, P):    slab[c][lane], lane = position      (FeaturesLast = false)
//     features inside  (x contiguous as N, P, C):    slab[row][c],  row  = position      (FeaturesLast = true)
//
// Packing also spares the caches: samples lie a power of two apart as a rule, and would otherwise evict each other.
// A *key* is a place in a slab: batch statistics are reductions over slabs, key by key. Feature statistics are
// reductions within a slab.
//
// Two plans:
//   fused   Per-position statistics make blocks of positions independent. If all N slabs of a block fit the cache, x is
//           read from memory once and y written once: pack, reduce both ways, normalise.
//   split   Otherwise (per-channel statistics, few positions, very large N * C) tasks own ranges of samples and of
//           blocks: each reduces its part, the parts are merged in a fixed order, and x is read again to normalise.
//
// Nothing depends on which thread runs a task, only on how many tasks there are: results repeat bit for bit.
// Variances are sums around a mean, never of raw squares, and means that were rounded are corrected by the sum around
// them.

#if LIGHTNING_BLN_PART == 0  // PyTorch's headers take longer to read than the engines to compile
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <unistd.h>
#endif

namespace lightning_bln {

// For plain loops that the compiler is to turn into vector code by itself; doing that everywhere costs seconds of
// compiling and gains nothing, since the passes over the data are written as vectors.
#if defined(__GNUC__) && !defined(__clang__)
#define BLN_VECTORIZE __attribute__((optimize("tree-vectorize", "vect-cost-model=dynamic"), noinline))
#else
#define BLN_VECTORIZE
#endif

constexpr double kDelta = 1e-4;
constexpr int64_t kLine = 64;  // bytes in a cache line

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// ------------------------------------------------------------------------------------------------------- vectors

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t half_bits __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t bits __attribute__((vector_size(kVectorBytes)));
};

template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));
// Lanes of a slab's row where positions are inside: one cache line of float32.
template <class A>
constexpr int kRow = int(kLine / sizeof(A)) > kLanes<A> ? int(kLine / sizeof(A)) : kLanes<A>;

template <class A>
inline Vec<A> splat(A value) {
  return value - Vec<A>{};
}

template <class A>
inline Vec<A> get(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class A>
inline void put(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class A>
inline A sum_lanes(Vec<A> v) {
  A total = v[0];
  for (int i = 1; i < kLanes<A>; ++i) total += v[i];
  return total;
}

// Lane i of the result takes partial sums from the first vector where bit `Width` of i is 0, else from the second.
template <class A, int Width, size_t... I>
inline Vec<A> add_pairs(Vec<A> first, Vec<A> second, std::index_sequence<I...>) {
  using Bits = typename VectorOf<A>::bits;
  const Bits low = {((I & Width) ? kLanes<A> + (I & ~size_t(Width)) : I)...};
  const Bits high = {((I & Width) ? kLanes<A> + I : I + Width)...};
  return __builtin_shuffle(first, second, low) + __builtin_shuffle(first, second, high);
}

// The sums over the lanes of kLanes vectors, as one vector: a tree of pairwise additions.
template <class A, int Width = 1>
inline Vec<A> sum_each(Vec<A>* v) {
  if constexpr (Width == kLanes<A>) {
    return v[0];
  } else {
    #pragma GCC unroll 8
    for (int j = 0; j < kLanes<A>; j += 2 * Width) {
      v[j] = add_pairs<A, Width>(v[j], v[j + Width], std::make_index_sequence<size_t(kLanes<A>)>());
    }
    return sum_each<A, 2 * Width>(v);
  }
}

// Memory of type T as vectors of the accumulation type.
template <class T, class A>
struct Memory {
  static_assert(std::is_same_v<T, A>);
  static Vec<A> load(const T* p) { return get<A>(p); }
  static void store(T* p, Vec<A> v) { put<A>(p, v); }
};

#if LIGHTNING_BLN_PART == 0
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <>
struct Memory<BFloat16, float> {
  using Bits = VectorOf<float>::bits;
  using HalfBits = VectorOf<float>::half_bits;
  static Vec<float> load(const BFloat16* p) {
    HalfBits half;
    std::memcpy(&half, p, sizeof half);
    const Bits bits = __builtin_convertvector(half, Bits) << 16;
    Vec<float> v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
  static void store(BFloat16* p, Vec<float> v) {
    Bits bits;
    std::memcpy(&bits, &v, sizeof v);
    Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const Bits is_nan = Bits(v != v);
    rounded = (rounded & ~is_nan) | (is_nan & 0x7fc0u);
    const HalfBits half = __builtin_convertvector(rounded, HalfBits);
    std::memcpy(p, &half, sizeof half);
  }
};

template <>
struct Memory<Half, float> {
  static Vec<float> load(const Half* p) {
#if defined(__F16C__) && defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__) && defined(__AVX__)
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Vec<float> v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(p[i]);
    return v;
#endif
  }
  static void store(Half* p, Vec<float> v) {
#if defined(__F16C__) && defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes<float>; ++i) p[i] = Half(v[i]);
#endif
  }
};
#endif

// A row that ends within a vector.
template <class T, class A>
inline Vec<A> load_part(const T* p, int count) {
  T padded[kLanes<A>] = {};
  std::memcpy(static_cast<void*>(padded), p, count * sizeof(T));
  return Memory<T, A>::load(padded);
}

template <class T, class A>
inline void store_part(T* p, Vec<A> v, int count) {
  T padded[kLanes<A>];
  Memory<T, A>::store(padded, v);
  std::memcpy(static_cast<void*>(p), padded, count * sizeof(T));
}

// ------------------------------------------------------------------------------------------------ memory and tasks

// Memory of one thread or call, kept for the next one: fresh pages cost more than the arithmetic on small inputs.
class Scratch {
 public:
  template <class A>
  A* take(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(A) + kLine - 1) / kLine * kLine;
    used_ += bytes;
    if (used_ > size_) {
      // Earlier pieces stay valid until the next reset.
      size_t piece = std::max(bytes, size_t(1) << 16);
      pieces_.emplace_back(static_cast<char*>(std::aligned_alloc(kLine, (piece + kLine - 1) / kLine * kLine)), std::free);
      if (!pieces_.back()) throw std::bad_alloc();
      return reinterpret_cast<A*>(pieces_.back().get());
    }
    return reinterpret_cast<A*>(main_.get() + used_ - bytes);
  }

  void reset() {
    pieces_.clear();
    if (used_ > size_ && used_ <= kKept) {
      main_.reset(static_cast<char*>(std::aligned_alloc(kLine, used_)));
      size_ = main_ ? used_ : 0;
    }
    used_ = 0;
  }

 private:
  static constexpr size_t kKept = size_t(32) << 20;
  std::unique_ptr<char, decltype(&std::free)> main_{nullptr, std::free};
  std::vector<std::unique_ptr<char, decltype(&std::free)>> pieces_;
  size_t size_ = 0, used_ = 0;
};

inline thread_local Scratch task_scratch;  // of one task
inline thread_local Scratch call_scratch;  // of one call, shared by its tasks

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Part i of `parts` nearly equal ones.
inline Range part_of(int64_t size, int64_t parts, int64_t i) { return {size * i / parts, size * (i + 1) / parts}; }

// PyTorch's threads, in part 0.
void in_parallel(int64_t tasks, void (*f)(int64_t, int64_t, void*), void* context);
int64_t thread_count();

template <class F>
void run_tasks(int64_t tasks, const F& f) {
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      task_scratch.reset();
      f(i);
    }
    task_scratch.reset();
  };
  if (tasks == 1) {
    run(0, 1);
  } else {
    using Run = decltype(run);
    in_parallel(tasks, [](int64_t begin, int64_t end, void* f) { (*static_cast<Run*>(f))(begin, end); }, &run);
  }
}

struct Caches {
  int64_t second, third;  // bytes
  Caches() : second(512 << 10), third(8 << 20) {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (const long size = sysconf(_SC_LEVEL2_CACHE_SIZE); size > 0) second = size;
    if (const long size = sysconf(_SC_LEVEL3_CACHE_SIZE); size > 0) third = size;
#endif
  }
};

inline const Caches& caches() {
  static const Caches found;
  return found;
}

// --------------------------------------------------------------------------------------------------------- problem

// A statistic as the kernels read it: its value for (i, p) is data[i * si + p * sp]; i is a feature or a sample.
template <class A>
struct Statistic {
  const A* data = nullptr;
  int64_t si = 0, sp = 0;
  A at(int64_t i, int64_t p) const { return data[i * si + p * sp]; }
};

// One of the two normalisations: what was given from the population and where the mini-batch's own statistics go
// (forward) or come from (backward).
template <class A>
struct Side {
  Statistic<A> mean, var;          // population; data is null where the mini-batch's is used
  A* own_mean = nullptr;           // null where not needed
  A* own_var = nullptr;
  int64_t si = 0, sp = 0;          // of the own statistics
  bool known = false;              // own statistics need not be computed,
  bool var_unknown = false;        // but for the variance, whose mean is known
  bool own() const { return !mean.data || !var.data; }
  Statistic<A> center() const { return own() ? Statistic<A>{own_mean, si, sp} : mean; }
  Statistic<A> used_mean() const { return mean.data ? mean : Statistic<A>{own_mean, si, sp}; }
  Statistic<A> used_var() const { return var.data ? var : Statistic<A>{own_var, si, sp}; }
};

// How rows of a tensor lie in memory and in slabs, in values. Where positions are inside, a row of `count` values is
// packed in pieces of kRow values, `piece_stride` apart.
struct RowShape {
  int64_t rows, count, memory_stride, slab_stride, piece_stride;
  int64_t ahead;  // from a value to the one that is wanted soon after
};

// Between x's type and whole vectors of A; what a row leaves of its last vector is packed as zeros.
template <class A>
struct Rows {
  void (*load)(const char* from, const RowShape& shape, A* to);
  void (*store)(const A* from, const RowShape& shape, char* to);
  int64_t size;  // bytes of a value in memory
};

// The vectors of `count` values: whole(i) at each but the last, if that is partial, then part(i, values).
template <int L, class Whole, class Part>
inline void each_vector(int64_t count, const Whole& whole, const Part& part) {
  const int64_t end = count & ~int64_t(L - 1);
  for (int64_t i = 0; i < end; i += L) whole(i);
  if (end < count) part(end, int(count - end));
}

template <class T, class A, bool FeaturesLast>
void load_rows(const char* from, const RowShape& shape, A* to) {
  const RowShape s = shape;
  constexpr int L = kLanes<A>;
  constexpr int64_t R = kRow<A>;
  const T* row = reinterpret_cast<const T*>(from);
  for (int64_t r = 0; r < s.rows; ++r, row += s.memory_stride, to += s.slab_stride) {
    // Rows or samples are far apart: hardware does not see the next ones coming.
    auto whole = [&](const T* source, A* target) {
      __builtin_prefetch(source + s.ahead);
      put<A>(target, Memory<T, A>::load(source));
    };
    if constexpr (FeaturesLast) {
      each_vector<L>(
          s.count, [&](int64_t i) { whole(row + i, to + i); }, [&](int64_t i, int n) { put<A>(to + i, load_part<T, A>(row + i, n)); });
    } else {
      A* piece = to;
      int64_t j = 0;
      for (; j + R <= s.count; j += R, piece += s.piece_stride) {
#pragma GCC unroll 8
        for (int i = 0; i < R; i += L) whole(row + j + i, piece + i);
      }
      each_vector<L>(
          s.count - j, [&](int64_t i) { whole(row + j + i, piece + i); },
          [&](int64_t i, int n) { put<A>(piece + i, load_part<T, A>(row + j + i, n)); });
    }
  }
}

// One piece of each row.
template <class T, class A>
void store_rows(const A* from, const RowShape& shape, char* to) {
  const RowShape s = shape;
  constexpr int L = kLanes<A>;
  T* row = reinterpret_cast<T*>(to);
  for (int64_t r = 0; r < s.rows; ++r, row += s.memory_stride, from += s.slab_stride) {
    each_vector<L>(
        s.count, [&](int64_t i) { Memory<T, A>::store(row + i, get<A>(from + i)); },
        [&](int64_t i, int n) { store_part<T, A>(row + i, get<A>(from + i), n); });
  }
}

template <class A>
struct Problem {
  int64_t N, C, P;
  int64_t sn, sc, sp;  // element strides of x, y and their gradients
  bool per_channel, same_type;  // same_type: x's type is A
  A eps, w_f, w_b, scale;  // scale = 1 / sqrt(C)
  const char* x = nullptr;
  const char* g = nullptr;
  char* out = nullptr;
  Rows<A> rows;
  const A* W = nullptr;     // weight * scale, padded with zeros to whole vectors
  const A* bias = nullptr;  // likewise
  const A* real = nullptr;  // 1 for each feature, likewise
  Side<A> batch, feature;
  A* grad_weight = nullptr;
  A* grad_bias = nullptr;
  int64_t batch_count() const { return per_channel ? N * P : N; }
};

// Mean and squared deviations of `count` values, brought together with those of others (Chan, Golub and LeVeque 1979).
template <class A>
struct Moments {
  A count = 0, mean = 0, squares = 0;
  void merge(A other_count, A other_mean, A other_squares) {
    if (other_count == 0) return;
    const A total = count + other_count, delta = other_mean - mean;
    mean += delta * (other_count / total);
    squares += other_squares + delta * delta * (count * (other_count / total));
    count = total;
  }
};

// ----------------------------------------------------------------------------------------------------- slab passes

// Everything the passes know about one block of positions: [first, first + width) and how a slab of it is laid out.
template <class A, bool FeaturesLast>
struct Block {
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;
  static constexpr int R = kRow<A>;
  static constexpr int RV = R / L;

  const Problem<A>& p;
  int64_t first, width;
  int64_t padded;    // FeaturesLast: C rounded up to whole vectors
  int64_t slab;      // elements of a slab
  int64_t features;  // feature statistics of a slab (of which `width` are real)
  int64_t key_row;   // FeaturesLast: keys from one row to the next; 0 where all rows share them
  int64_t keys;      // batch statistics of a block

  Block(const Problem<A>& problem, int64_t first_, int64_t width_) : p(problem), first(first_), width(width_) {
    padded = ceil_div(p.C, L) * L;
    slab = FeaturesLast ? width * padded : p.C * R;
    features = FeaturesLast ? width : R;
    key_row = FeaturesLast && !p.per_channel ? padded : 0;
    keys = FeaturesLast ? (p.per_channel ? padded : width * padded) : p.C * R;
  }

  int64_t groups() const { return FeaturesLast ? 1 : ceil_div(width, R); }
  // Where positions are inside, a block is worked on in groups of one row's width, each with its own slabs.
  Block group(int64_t i) const {
    if constexpr (FeaturesLast) {
      return *this;
    } else {
      return Block(p, first + i * R, std::min<int64_t>(R, width - i * R));
    }
  }

  // --- moving data

  // Of the block's first value of sample n, in x and in the output.
  int64_t offset(int64_t n) const { return n * p.sn + first * (FeaturesLast ? p.sp : 1); }

  // Packs n slabs from sample n0; group i of them at slabs + i * group_stride.
  void pack(const char* from, int64_t n0, int64_t n, A* slabs, int64_t group_stride) const {
    const RowShape shape = row_shape(group_stride);
    for (int64_t i = 0; i < n; ++i) p.rows.load(from + offset(n0 + i) * p.rows.size, shape, slabs + i * slab);
    if (!FeaturesLast && width % R) clear_beyond(n, slabs, group_stride);
  }

  // The other way, of one group: to the output.
  void unpack(const A* slabs, int64_t n0, int64_t n) const {
    const RowShape shape = row_shape(0);
    for (int64_t i = 0; i < n; ++i) p.rows.store(slabs + i * slab, shape, p.out + offset(n0 + i) * p.rows.size);
  }

  // Whether results of a group can go straight to the output: same type, whole vectors.
  bool direct() const { return p.same_type && (FeaturesLast ? p.C == padded : width == R); }

  // Where results go: rows of sample i at base + i * n + row * stride.
  struct Target {
    A* base;
    int64_t n, row;
  };
  Target target(A* slabs, int64_t n0) const {
    if (direct()) return {reinterpret_cast<A*>(p.out) + offset(n0), p.sn, FeaturesLast ? p.sp : p.sc};
    return {slabs, slab, FeaturesLast ? padded : R};
  }

  // --- the statistics, in two passes over n slabs

  // Means over the features, and, if WithBatch, total[k] += sum over the slabs of x.
  template <bool WithBatch>
  void first_pass(const A* x, int64_t n, A* mean_f, A* total) const {
    clear_features(n, {mean_f});
    each_tile(n, [&](auto count, int64_t i, Range c) { first_some<count, WithBatch>(x + i * slab, mean_f + i * features, total, c); });
    const A inverse = A(1) / A(p.C);
    for (int64_t i = 0; i < n * features; ++i) mean_f[i] *= inverse;
  }

  // Biased variances over the features, and the means again: the first pass rounds sums as large as the data, this one
  // sums deviations, which cost nothing more here. If WithBatch, the same for each key: total[k] += sum over the slabs
  // of x - mean_b[k], squares[k] += sum of its square.
  // off_f: room for n slabs' features.
  template <bool WithBatch>
  void second_pass(const A* x, int64_t n, A* mean_f, A* off_f, A* var_f, const A* mean_b, A* total, A* squares) const {
    clear_features(n, {var_f, off_f});
    each_tile(n, [&](auto count, int64_t i, Range c) {
      second_some<count, WithBatch>(x + i * slab, mean_f + i * features, off_f + i * features, var_f + i * features, mean_b, total, squares, c);
    });
    const A inverse = A(1) / A(p.C);
    for (int64_t i = 0; i < n * features; ++i) {
      const A d = off_f[i] * inverse;
      mean_f[i] += d;
      var_f[i] = var_f[i] * inverse - d * d;
    }
  }

  // --- the two results

  // y of n slabs, with the normalisation's terms for each key (mean_b, scale_b) and each feature statistic
  // (mean_f, rstd_f), the latter `features` apart from slab to slab.
  void normalise(const A* x, const Target& out, int64_t n, const A* mean_b, const A* scale_b, const A* mean_f, const A* rstd_f) const {
    each_tile(n, [&](auto count, int64_t i, Range c) {
      normalise_some<count>(x + i * slab, {out.base + i * out.n, out.n, out.row}, mean_b, scale_b, mean_f + i * features, rstd_f + i * features, c);
    });
  }

  // What the gradient of a slab's feature part is made of; arrays of `features` values a slab. With G = g * W * w_f:
  struct FeatureTerms {
    A *center, *rstd, *offset;  // offset = rstd * (center - used mean)
    A *sum, *sum_deviation;     // sums over c of G and of G * (x - center)
  };

  // Sums over the slabs for each key: of g, g * (x - center), g * normalised feature part, and two of x alone.
  struct BatchSums {
    A *g, *gd, *gf, *d;  // d: of x - center, what rounding left in the center
    A* square;           // of (x - center)^2; null where it is not wanted

    std::array<A*, 5> all() const { return {g, gd, gf, d, square}; }
  };

  // The reductions of the backward pass: sets the slabs' feature sums, adds to the sums for each key.
  void reduce(const A* x, const A* g, int64_t n, const A* center_b, const BatchSums& sums, const FeatureTerms& f) const {
    clear_features(n, {f.sum, f.sum_deviation});
    each_tile(n, [&](auto count, int64_t i, Range c) { reduce_some<count>(x + i * slab, g + i * slab, center_b, sums, f, i * features, c); });
  }

  // The gradient's terms for each key: dx = g * (scale + rstd_f * W * w_f) - (x - center) * slope - offset - ...
  struct BatchTerms {
    A *center, *scale, *slope, *offset;
  };

  // dx of n slabs. Of f: center and rstd, sum and sum_deviation turned into what is taken off by `finish_features`.
  void differentiate(const A* x, const A* g, const Target& out, int64_t n, const BatchTerms& b, const FeatureTerms& f) const {
    each_tile(n, [&](auto count, int64_t i, Range c) {
      differentiate_some<count>(x + i * slab, g + i * slab, {out.base + i * out.n, out.n, out.row}, b, f, i * features, c);
    });
  }

 private:
  // f(slabs at once, first of them, features): slabs by fours or twos, so that what belongs to keys is read once for
  // them all, and, where positions are inside, so many features at a time that their keys stay in the first cache.
  template <class F>
  void each_tile(int64_t n, const F& f) const {
    constexpr int U = std::is_same_v<A, double> ? 1 : FeaturesLast ? 4 : 2;  // float64 is not worth more code
    const int64_t tile = FeaturesLast ? p.C : std::max<int64_t>(1, 512 / R);
    for (int64_t c = 0; c < p.C; c += tile) {
      const Range features_ = {c, std::min(c + tile, p.C)};
      int64_t i = 0;
      for (; i + U <= n; i += U) f(std::integral_constant<int, U>(), i, features_);
      for (; U > 1 && i < n; ++i) f(std::integral_constant<int, 1>(), i, features_);
    }
  }

  void clear_features(int64_t n, std::initializer_list<A*> arrays) const {
    for (A* array : arrays) std::fill(array, array + n * features, A(0));
  }

  RowShape row_shape(int64_t group_stride) const {
    if constexpr (FeaturesLast) {
      if (p.sp == p.C && p.C == padded) return {1, width * p.C, 0, 0, 0, p.sn};
      return {width, p.C, p.sp, padded, 0, p.sn};
    }
    return {p.C, width, p.sc, R, group_stride, 4 * p.sc};
  }

  // Lanes beyond the last position: zeros, so that nothing there is read before it is written.
  void clear_beyond(int64_t n, A* slabs, int64_t group_stride) const {
    const int64_t from = ceil_div(width % R, L) * L;
    if (from == R) return;
    A* last = slabs + width / R * group_stride;
    for (int64_t i = 0; i < n * p.C; ++i) std::fill(last + i * R + from, last + (i + 1) * R, A(0));
  }

  static V sum_over(const V* v, std::integral_constant<int, 1>) { return v[0]; }
  static V sum_over(const V* v, std::integral_constant<int, 2>) { return v[0] + v[1]; }
  static V sum_over(const V* v, std::integral_constant<int, 4>) { return (v[0] + v[1]) + (v[2] + v[3]); }

  static void add_to(A* total, V v) { put<A>(total, get<A>(total) + v); }

  // Sums over rows (features last), `Sums` of them, of what `term(row, c, terms)` gives for U slabs; lanes beyond C count
  // nothing. Then done(slab, first row, rows, sums): a vector holds one sum of kLanes rows.
  template <int U, int Sums, class Term, class Done>
  void each_row_sum(const Term& term, const Done& done) const {
    const int64_t whole = p.C / L * L, width = this->width;
    const int tail = int(p.C - whole);
    const V real = tail ? get<A>(p.real + whole) : V{};
    for (int64_t r0 = 0; r0 < width; r0 += L) {
      const int rows = int(std::min<int64_t>(L, width - r0));
      V sums[U][Sums][L];
      for (int u = 0; u < U; ++u) {
        for (int s = 0; s < Sums; ++s) {
          for (int i = rows; i < L; ++i) sums[u][s][i] = V{};
        }
      }
      for (int i = 0; i < rows; ++i) {
        V acc[U][Sums] = {};
        for (int64_t c = 0; c < whole; c += L) {
          V terms[U][Sums];
          term(r0 + i, c, terms);
#pragma GCC unroll 8
          for (int u = 0; u < U; ++u) {
#pragma GCC unroll 8
            for (int s = 0; s < Sums; ++s) acc[u][s] += terms[u][s];
          }
        }
        if (tail) {
          V terms[U][Sums];
          term(r0 + i, whole, terms);
#pragma GCC unroll 8
          for (int u = 0; u < U; ++u) {
#pragma GCC unroll 8
            for (int s = 0; s < Sums; ++s) acc[u][s] += real * terms[u][s];
          }
        }
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) {
#pragma GCC unroll 8
          for (int s = 0; s < Sums; ++s) sums[u][s][i] = acc[u][s];
        }
      }
      for (int u = 0; u < U; ++u) {
        V totals[Sums];
        for (int s = 0; s < Sums; ++s) totals[s] = sum_each<A>(sums[u][s]);
        done(u, r0, rows, totals);
      }
    }
  }

  // In the passes below, sizes and pointers are copied to local variables first: stores through A* could otherwise be
  // taken to change the members, which would be read again for every vector.

  template <int U, bool WithBatch>
  void first_some(const A* x, A* sum_f, A* total, Range tile) const {
    using Count = std::integral_constant<int, U>;
    const int64_t slab = this->slab, padded = this->padded, features = this->features;
    if constexpr (FeaturesLast) {
      each_row_sum<U, 1>(
          [&](int64_t r, int64_t c, V(&terms)[U][1]) {
            V values[U];
            const int64_t k = r * padded + c;
#pragma GCC unroll 8
            for (int u = 0; u < U; ++u) terms[u][0] = values[u] = get<A>(x + u * slab + k);
            if constexpr (WithBatch) add_to(total + k, sum_over(values, Count()));
          },
          [&](int u, int64_t r0, int rows, V(&sums)[1]) {
            for (int i = 0; i < rows; ++i) sum_f[u * features + r0 + i] = sums[0][i];
          });
    } else {
      V acc[U][RV] = {};
      for (int64_t c = tile.begin; c < tile.end; ++c) {
#pragma GCC unroll 8
        for (int v = 0; v < RV; ++v) {
          const int64_t k = c * R + v * L;
          V values[U];
#pragma GCC unroll 8
          for (int u = 0; u < U; ++u) {
            values[u] = get<A>(x + u * slab + k);
            acc[u][v] += values[u];
          }
          if constexpr (WithBatch) add_to(total + k, sum_over(values, Count()));
        }
      }
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
#pragma GCC unroll 8
        for (int v = 0; v < RV; ++v) add_to(sum_f + u * features + v * L, acc[u][v]);
      }
    }
  }

  template <int U, bool WithBatch>
  void second_some(const A* x, const A* mean_f, A* sum_f, A* square_f, const A* mean_b, A* total, A* squares, Range tile) const {
    using Count = std::integral_constant<int, U>;
    const int64_t slab = this->slab, padded = this->padded, features = this->features;
    // Batch deviations of U slabs at key k.
    auto add_batch = [&](int64_t k, const V* values) {
      if constexpr (WithBatch) {
        const V m = get<A>(mean_b + k);
        V d[U], q[U];
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) {
          d[u] = values[u] - m;
          q[u] = d[u] * d[u];
        }
        add_to(total + k, sum_over(d, Count()));
        add_to(squares + k, sum_over(q, Count()));
      }
    };
    if constexpr (FeaturesLast) {
      each_row_sum<U, 2>(
          [&](int64_t r, int64_t c, V(&terms)[U][2]) {
            V values[U];
            const int64_t k = r * padded + c;
#pragma GCC unroll 8
            for (int u = 0; u < U; ++u) {
              values[u] = get<A>(x + u * slab + k);
              terms[u][0] = values[u] - splat<A>(mean_f[u * features + r]);
              terms[u][1] = terms[u][0] * terms[u][0];
            }
            add_batch(k, values);
          },
          [&](int u, int64_t r0, int rows, V(&sums)[2]) {
            for (int i = 0; i < rows; ++i) {
              sum_f[u * features + r0 + i] = sums[0][i];
              square_f[u * features + r0 + i] = sums[1][i];
            }
          });
    } else {
      V acc[U][RV] = {}, deviations[U][RV] = {};
      for (int64_t c = tile.begin; c < tile.end; ++c) {
#pragma GCC unroll 8
        for (int v = 0; v < RV; ++v) {
          const int64_t k = c * R + v * L;
          V values[U];
#pragma GCC unroll 8
          for (int u = 0; u < U; ++u) {
            values[u] = get<A>(x + u * slab + k);
            const V d = values[u] - get<A>(mean_f + u * features + v * L);
            deviations[u][v] += d;
            acc[u][v] += d * d;
          }
          add_batch(k, values);
        }
      }
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
#pragma GCC unroll 8
        for (int v = 0; v < RV; ++v) {
          add_to(sum_f + u * features + v * L, deviations[u][v]);
          add_to(square_f + u * features + v * L, acc[u][v]);
        }
      }
    }
  }

  template <int U>
  void normalise_some(const A* x, const Target out, const A* mean_b, const A* scale_b, const A* mean_f, const A* rstd_f, Range tile) const {
    const int64_t slab = this->slab, padded = this->padded, features = this->features, width = this->width;
    const A *W_all = p.W, *bias_all = p.bias;
    if constexpr (FeaturesLast) {
      for (int64_t r = 0; r < width; ++r) {
        const A *keys_mean = mean_b + r * key_row, *keys_scale = scale_b + r * key_row, *row = x + r * padded;
        A* to = out.base + r * out.row;
        V mf[U], rf[U];
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) {
          mf[u] = splat<A>(mean_f[u * features + r]);
          rf[u] = splat<A>(rstd_f[u * features + r] * p.w_f);
        }
        for (int64_t c = 0; c < padded; c += L) {
          const V mb = get<A>(keys_mean + c), sb = get<A>(keys_scale + c), W = get<A>(W_all + c), bias = get<A>(bias_all + c);
#pragma GCC unroll 8
          for (int u = 0; u < U; ++u) {
            const V value = get<A>(row + u * slab + c);
            put<A>(to + u * out.n + c, (value - mb) * sb + ((value - mf[u]) * rf[u] * W + bias));
          }
        }
      }
    } else {
      V mf[U][RV], rf[U][RV];
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
#pragma GCC unroll 8
        for (int v = 0; v < RV; ++v) {
          mf[u][v] = get<A>(mean_f + u * features + v * L);
          rf[u][v] = get<A>(rstd_f + u * features + v * L) * p.w_f;
        }
      }
      for (int64_t c = tile.begin; c < tile.end; ++c) {
        const V W = splat<A>(W_all[c]), bias = splat<A>(bias_all[c]);
        A* to = out.base + c * out.row;
#pragma GCC unroll 8
        for (int v = 0; v < RV; ++v) {
          const int64_t k = c * R + v * L;
          const V mb = get<A>(mean_b + k), sb = get<A>(scale_b + k);
#pragma GCC unroll 8
          for (int u = 0; u < U; ++u) {
            const V value = get<A>(x + u * slab + k);
            put<A>(to + u * out.n + v * L, (value - mb) * sb + ((value - mf[u][v]) * rf[u][v] * W + bias));
          }
        }
      }
    }
  }

  template <int U>
  void reduce_some(const A* x, const A* g, const A* center_b, const BatchSums sums, const FeatureTerms f, int64_t f0, Range tile) const {
    const int64_t slab = this->slab, padded = this->padded, features = this->features, key_row = this->key_row;
    const A* W_all = p.W;
    if constexpr (FeaturesLast) {
      each_row_sum<U, 2>(
          [&](int64_t r, int64_t c, V(&terms)[U][2]) {
            const int64_t k = r * padded + c, key = r * key_row + c, at = f0 + r;
            const V cb = get<A>(center_b + key), W = get<A>(W_all + c);
            V sg{}, sgd{}, sgf{}, sd{}, sq{};
#pragma GCC unroll 8
            for (int u = 0; u < U; ++u) {
              const V xv = get<A>(x + u * slab + k), gv = get<A>(g + u * slab + k);
              const V d = xv - splat<A>(f.center[at + u * features]), gw = gv * W;
              terms[u][0] = gw;
              terms[u][1] = gw * d;
              sg += gv;
              const V db = xv - cb;
              sgd += gv * db;
              sd += db;
              sq += db * db;
              sgf += gv * (d * splat<A>(f.rstd[at + u * features]) + splat<A>(f.offset[at + u * features]));
            }
            add_to(sums.g + key, sg);
            add_to(sums.gd + key, sgd);
            add_to(sums.gf + key, sgf);
            add_to(sums.d + key, sd);
            if (sums.square) add_to(sums.square + key, sq);
          },
          [&](int u, int64_t r0, int rows, V(&totals)[2]) {
            for (int i = 0; i < rows; ++i) {
              f.sum[f0 + u * features + r0 + i] = totals[0][i] * p.w_f;
              f.sum_deviation[f0 + u * features + r0 + i] = totals[1][i] * p.w_f;
            }
          });
    } else {
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) {
        V cf[U], rf[U], of[U], G[U] = {}, GD[U] = {};
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) {
          const int64_t at = f0 + u * features + v * L;
          cf[u] = get<A>(f.center + at);
          rf[u] = get<A>(f.rstd + at);
          of[u] = get<A>(f.offset + at);
        }
        for (int64_t c = tile.begin; c < tile.end; ++c) {
          const int64_t k = c * R + v * L;
          const V cb = get<A>(center_b + k), W = splat<A>(W_all[c]);
          V sg{}, sgd{}, sgf{}, sd{}, sq{};
#pragma GCC unroll 8
          for (int u = 0; u < U; ++u) {
            const V xv = get<A>(x + u * slab + k), gv = get<A>(g + u * slab + k);
            const V d = xv - cf[u], gw = gv * W;
            G[u] += gw;
            GD[u] += gw * d;
            sg += gv;
            const V db = xv - cb;
            sgd += gv * db;
            sd += db;
            sq += db * db;
            sgf += gv * (d * rf[u] + of[u]);
          }
          add_to(sums.g + k, sg);
          add_to(sums.gd + k, sgd);
          add_to(sums.gf + k, sgf);
          add_to(sums.d + k, sd);
          if (sums.square) add_to(sums.square + k, sq);
        }
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) {
          const int64_t at = f0 + u * features + v * L;
          add_to(f.sum + at, G[u] * p.w_f);
          add_to(f.sum_deviation + at, GD[u] * p.w_f);
        }
      }
    }
  }

  template <int U>
  void differentiate_some(const A* x, const A* g, const Target out, const BatchTerms b, const FeatureTerms f, int64_t f0, Range tile) const {
    const int64_t slab = this->slab, padded = this->padded, features = this->features, width = this->width, key_row = this->key_row;
    const A* W_all = p.W;
    const A w_f = p.w_f;
    if constexpr (FeaturesLast) {
      for (int64_t r = 0; r < width; ++r) {
        const int64_t key = r * key_row;
        A* to = out.base + r * out.row;
        V cf[U], rf[U], base[U], slope[U];
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) {
          const int64_t at = f0 + u * features + r;
          cf[u] = splat<A>(f.center[at]);
          rf[u] = splat<A>(f.rstd[at] * w_f);
          base[u] = splat<A>(f.sum[at]);
          slope[u] = splat<A>(f.sum_deviation[at]);
        }
        for (int64_t c = 0; c < padded; c += L) {
          const V cb = get<A>(b.center + key + c), sb = get<A>(b.scale + key + c), ob = get<A>(b.offset + key + c), eb = get<A>(b.slope + key + c);
          const V W = get<A>(W_all + c);
#pragma GCC unroll 8
          for (int u = 0; u < U; ++u) {
            const V xv = get<A>(x + u * slab + r * padded + c), gv = get<A>(g + u * slab + r * padded + c);
            put<A>(to + u * out.n + c, gv * (sb + rf[u] * W) - (xv - cb) * eb - (xv - cf[u]) * slope[u] - (ob + base[u]));
          }
        }
      }
    } else {
      // All columns of lanes at once: one after the other would write each line of the output twice.
      const A *cf = f.center + f0, *rf = f.rstd + f0, *base = f.sum + f0, *slope = f.sum_deviation + f0;
      for (int64_t c = tile.begin; c < tile.end; ++c) {
        const V W = splat<A>(W_all[c] * w_f);
        A* to = out.base + c * out.row;
#pragma GCC unroll 8
        for (int v = 0; v < RV; ++v) {
          const int64_t k = c * R + v * L;
          const V cb = get<A>(b.center + k), sb = get<A>(b.scale + k), ob = get<A>(b.offset + k), eb = get<A>(b.slope + k);
#pragma GCC unroll 8
          for (int u = 0; u < U; ++u) {
            const int64_t j = u * features + v * L;
            const V xv = get<A>(x + u * slab + k), gv = get<A>(g + u * slab + k);
            put<A>(to + u * out.n + v * L,
                   gv * (sb + get<A>(rf + j) * W) - (xv - cb) * eb - (xv - get<A>(cf + j)) * get<A>(slope + j) - (ob + get<A>(base + j)));
          }
        }
      }
    }
  }
};

// Chan's update of `n` values at each of `keys` places, `stride` apart: mean (around shift) and squared deviations of
// the `count` values before.
template <class A>
struct RunningMoments {
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;
  A *shift, *mean, *squares;
  int64_t keys, count = 0;

  RunningMoments(Scratch& scratch, int64_t keys_)
      : shift(scratch.take<A>(keys_)), mean(scratch.take<A>(keys_)), squares(scratch.take<A>(keys_)), keys(keys_) {}

  void start(const A* first) {
    count = 0;
    std::memcpy(shift, first, keys * sizeof(A));
    std::fill(mean, mean + keys, A(0));
    std::fill(squares, squares + keys, A(0));
  }

  void add(const A* x, int64_t n, int64_t stride) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) add_some<8>(x + i * stride, stride);
    for (; i < n; ++i) add_some<1>(x + i * stride, stride);
  }

 private:
  template <int U>
  void add_some(const A* x, int64_t stride) {
    const A share = A(U) / A(count + U), weight = A(count) * share;
    for (int64_t k = 0; k < keys; k += L) {
      const V s = get<A>(shift + k);
      V d[U], sum{}, spread{};
      #pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        d[u] = get<A>(x + u * stride + k) - s;
        sum += d[u];
      }
      const V m = sum * A(1.0 / U);
      #pragma GCC unroll 8
      for (int u = 0; u < U; ++u) spread += (d[u] - m) * (d[u] - m);
      const V old = get<A>(mean + k), delta = m - old;
      put<A>(mean + k, old + delta * share);
      put<A>(squares + k, get<A>(squares + k) + (spread + delta * delta * weight));
    }
    count += U;
  }
};

// --------------------------------------------------------------------------------------------------------- engines

struct Plan {
  bool fused;
  int64_t width, blocks;          // positions of a block
  int64_t tasks, parts_n, parts_b;  // tasks = parts_n * parts_b: ranges of samples and of blocks
  int64_t chunk;                    // split: samples that are packed and worked on together
};

template <class A, bool FeaturesLast>
class Engine {
  using V = Vec<A>;
  using B = Block<A, FeaturesLast>;
  static constexpr int64_t kPart = 32;  // samples whose sums are taken before they are added to those of others
  static constexpr int L = kLanes<A>;
  static constexpr int R = kRow<A>;

 public:
  explicit Engine(Problem<A>& problem) : p(problem) {}

  void forward() {
    const bool reduces = p.batch.own();
    const Plan plan = choose(reduces && !p.per_channel, reduces, 1);
    if (plan.fused) {
      each_fused_block(plan, [&](const B& b, int64_t) { forward_block(b); });
      return;
    }
    if (reduces) {
      take_statistics(plan, true, p.feature.own());
      p.batch.known = p.feature.known = true;
    }
    normalise(plan);
  }

  void backward() {
    const Plan plan = choose(!p.per_channel, true, 2);
    // Only the fused plan finds a variance on the way.
    if (!plan.fused && p.batch.var_unknown) p.batch.known = p.batch.var_unknown = false;
    const bool missing_b = p.batch.own() && !p.batch.known, missing_f = p.feature.own() && !p.feature.known;
    std::vector<std::vector<double>> grads(plan.tasks, std::vector<double>(2 * p.C, 0.0));
    if (plan.fused) {
      each_fused_block(plan, [&](const B& b, int64_t t) { backward_block(b, missing_b, missing_f, grads[t].data()); });
    } else {
      if (missing_f) {
        p.feature.own_mean = call_scratch.take<A>(p.N * p.P);
        p.feature.own_var = call_scratch.take<A>(p.N * p.P);
        p.feature.si = p.P;
        p.feature.sp = 1;
      }
      if (missing_b) {
        const int64_t positions = p.per_channel ? 1 : p.P;
        p.batch.own_mean = call_scratch.take<A>(p.C * positions);
        p.batch.own_var = call_scratch.take<A>(p.C * positions);
        p.batch.si = FeaturesLast ? 1 : positions;
        p.batch.sp = p.per_channel ? 0 : (FeaturesLast ? p.C : 1);
      }
      if (missing_b || missing_f) take_statistics(plan, missing_b, missing_f);
      p.batch.known = p.feature.known = true;
      backward_split(plan, grads);
    }
    for (int64_t c = 0; c < p.C; ++c) {
      double weight = 0, bias = 0;
      for (const auto& part : grads) {
        weight += part[c];
        bias += part[p.C + c];
      }
      p.grad_weight[c] = A(weight * double(p.scale));
      p.grad_bias[c] = A(bias);
    }
  }

 private:
  Problem<A>& p;

  B block(const Plan& plan, int64_t i) const {
    const int64_t first = i * plan.width;
    return B(p, first, std::min(plan.width, p.P - first));
  }

  // f(block, task) for every block, one task's after the other.
  template <class F>
  void each_fused_block(const Plan& plan, const F& f) const {
    run_tasks(plan.tasks, [&](int64_t t) {
      const Range blocks = part_of(plan.blocks, plan.tasks, t);
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        task_scratch.reset();
        f(block(plan, b), t);
      }
    });
  }

  // reduces: sums over samples are needed. inputs: 1 forward, 2 backward (x and the gradient are both packed).
  Plan choose(bool may_fuse, bool reduces, int64_t inputs) const {
    Plan plan;
    plan.chunk = reduces ? 8 : FeaturesLast ? 4 : 2;
    const int64_t threads = std::max<int64_t>(1, thread_count());
    const int64_t tasks = std::clamp<int64_t>(p.N * p.C * p.P / 65536, 1, threads);
    const int64_t unit = FeaturesLast ? 1 : R;  // positions that a slab cannot be narrower than
    const int64_t units = ceil_div(p.P, unit);
    const int64_t row = FeaturesLast ? ceil_div(p.C, L) * L : p.C * R;
    const int64_t unit_bytes = p.N * row * int64_t(sizeof(A)) * inputs;
    const int64_t good = caches().second * 3 / 4;
    const int64_t limit = std::max<int64_t>(caches().second, std::min<int64_t>(caches().third / (2 * threads), FeaturesLast ? 8 << 20 : 2 << 20));
    plan.fused = may_fuse && units >= tasks && unit_bytes <= limit;
    int64_t per_block;
    if (plan.fused && FeaturesLast) {
      // Slabs of a few KiB: four of them and their keys fit the first cache.
      per_block = std::clamp<int64_t>(good / unit_bytes, 1, std::max<int64_t>(1, 1024 / row));
    } else if (plan.fused) {
      // Rows of several lines if at all possible, since each may lie in a page of its own.
      per_block = std::clamp<int64_t>(limit / unit_bytes, 1, 8);
    } else {
      per_block = FeaturesLast ? 1024 / row : reduces ? 4 : std::max<int64_t>(4, 16384 / row);
      per_block = std::clamp<int64_t>(per_block, 1, units);
    }
    if (plan.fused) {
      const int64_t blocks = ceil_div(ceil_div(units, per_block), tasks) * tasks;
      per_block = ceil_div(units, blocks);
    }
    plan.width = per_block * unit;
    plan.blocks = ceil_div(p.P, plan.width);
    if (plan.fused) {
      plan.parts_n = 1;
      plan.parts_b = plan.tasks = std::min(tasks, plan.blocks);
    } else {
      plan.parts_n = std::min(tasks, p.N);
      plan.parts_b = std::clamp<int64_t>(tasks / plan.parts_n, 1, plan.blocks);
      plan.tasks = plan.parts_n * plan.parts_b;
    }
    return plan;
  }

  // ------------------------------------------------------------------------------- between statistics and key arrays

  // Short rows, of which there are many: no call for each.
  static void copy_row(const A* from, int64_t count, A* to) {
    each_vector<L>(
        count, [&](int64_t i) { put<A>(to + i, get<A>(from + i)); },
        [&](int64_t i, int n) {
          for (int64_t j = i; j < i + n; ++j) to[j] = from[j];
        });
  }

  template <class F>
  void each_key(const B& b, const F& f) const {
    if constexpr (FeaturesLast) {
      const int64_t rows = p.per_channel ? 1 : b.width;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < p.C; ++c) f(r * b.padded + c, c, b.first + r);
      }
    } else {
      for (int64_t c = 0; c < p.C; ++c) {
        for (int64_t i = 0; i < b.width; ++i) f(c * R + i, c, b.first + i);
      }
    }
  }

  void load_keys(const B& b, const Statistic<A>& from, A* to) const {
    std::fill(to, to + b.keys, A(0));
    if (FeaturesLast && from.si == 1) {
      const int64_t rows = p.per_channel ? 1 : b.width;
      for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * b.padded, from.data + (b.first + r) * from.sp, p.C * sizeof(A));
    } else if (!FeaturesLast && from.sp == 1) {
      for (int64_t c = 0; c < p.C; ++c) copy_row(from.data + c * from.si + b.first, b.width, to + c * R);
    } else {
      each_key(b, [&](int64_t k, int64_t c, int64_t pos) { to[k] = from.at(c, pos); });
    }
  }

  void store_keys(const B& b, const A* from, A* to, const Side<A>& side) const {
    if (!to) return;
    if (FeaturesLast && side.si == 1) {
      for (int64_t r = 0; r < b.width; ++r) std::memcpy(to + (b.first + r) * side.sp, from + r * b.padded, p.C * sizeof(A));
    } else if (!FeaturesLast && side.sp == 1) {
      for (int64_t c = 0; c < p.C; ++c) copy_row(from + c * R, b.width, to + c * side.si + b.first);
    } else {
      each_key(b, [&](int64_t k, int64_t c, int64_t pos) { to[c * side.si + pos * side.sp] = from[k]; });
    }
  }

  void load_features(const B& b, const Statistic<A>& from, int64_t n0, int64_t n, A* to) const {
    for (int64_t i = 0; i < n; ++i) {
      A* row = to + i * b.features;
      if (from.sp == 1) {
        copy_row(from.data + (n0 + i) * from.si + b.first, b.width, row);
      } else {
        for (int64_t j = 0; j < b.width; ++j) row[j] = from.at(n0 + i, b.first + j);
      }
      std::fill(row + b.width, row + b.features, A(0));
    }
  }

  void store_features(const B& b, const A* from, int64_t n0, int64_t n, A* to) const {
    if (!to) return;
    for (int64_t i = 0; i < n; ++i) copy_row(from + i * b.features, b.width, to + (n0 + i) * p.P + b.first);
  }

  // 1 / sqrt(var + eps); the two may be one array.
  BLN_VECTORIZE void to_rstd(const A* var, A* rstd, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) rstd[i] = A(1) / std::sqrt(var[i] + p.eps);
  }

  // values[k] *= W of the key's feature * factor
  BLN_VECTORIZE void times_weight(const B& b, A* values, A factor) const {
    if constexpr (FeaturesLast) {
      for (int64_t k = 0; k < b.keys; k += b.padded) {
        for (int64_t c = 0; c < b.padded; ++c) values[k + c] *= p.W[c] * factor;
      }
    } else {
      for (int64_t c = 0; c < p.C; ++c) {
        for (int64_t i = 0; i < R; ++i) values[c * R + i] *= p.W[c] * factor;
      }
    }
  }

  // ------------------------------------------------------------------------------------------------- the fused plan

  // A fused block: its packed slabs, and its statistics as the mini-batch has them. Group i begins at i times the size.
  struct Packed {
    A *x, *g, *mean_b, *var_b, *mean_f, *var_f, *off_f;
  };

  // Packs a block and takes the statistics that are asked for.
  Packed pack_block(const B& b, bool with_gradient, bool with_batch, bool with_feature) const {
    const B g0 = b.group(0);
    const int64_t groups = b.groups(), per_group = p.N * g0.slab;
    Packed s;
    s.x = task_scratch.take<A>(groups * per_group);
    s.g = with_gradient ? task_scratch.take<A>(groups * per_group) : nullptr;
    for (A** array : {&s.mean_b, &s.var_b}) *array = task_scratch.take<A>(groups * g0.keys);
    for (A** array : {&s.mean_f, &s.var_f}) *array = task_scratch.take<A>(groups * p.N * g0.features);
    s.off_f = task_scratch.take<A>(p.N * g0.features);
    if (with_batch) std::fill(s.mean_b, s.mean_b + groups * g0.keys, A(0));
    // So many samples at a time that they are still in the first cache when they are summed up.
    const int64_t chunk = std::clamp<int64_t>(4096 / (groups * g0.slab + 1), 1, 4) * 4;
    for (int64_t n = 0; n < p.N; n += chunk) {
      const int64_t count = std::min(chunk, p.N - n);
      b.pack(p.x, n, count, s.x + n * g0.slab, per_group);
      if (with_gradient) b.pack(p.g, n, count, s.g + n * g0.slab, per_group);
      for (int64_t i = 0; i < groups; ++i) {
        const B g = b.group(i);
        const A* x = s.x + i * per_group + n * g.slab;
        A* mean = s.mean_f + (i * p.N + n) * g.features;
        if (with_batch) {
          g.template first_pass<true>(x, count, mean, s.mean_b + i * g.keys);
        } else if (with_feature) {
          A* var = s.var_f + (i * p.N + n) * g.features;
          g.template first_pass<false>(x, count, mean, nullptr);
          g.template second_pass<false>(x, count, mean, s.off_f, var, nullptr, nullptr, nullptr);
        }
      }
    }
    if (!with_batch) return s;
    A* total = task_scratch.take<A>(g0.keys);
    A* part = task_scratch.take<A>(2 * g0.keys);
    const A inverse = A(1) / A(p.N);
    for (int64_t i = 0; i < groups; ++i) {
      const B g = b.group(i);
      A *mean = s.mean_b + i * g.keys, *var = s.var_b + i * g.keys;
      for (int64_t k = 0; k < g.keys; ++k) {
        mean[k] *= inverse;
        total[k] = var[k] = 0;
      }
      for (int64_t n = 0; n < p.N; n += kPart) {
        const int64_t at = (i * p.N + n) * g.features;
        std::fill(part, part + 2 * g.keys, A(0));
        g.template second_pass<true>(s.x + i * per_group + n * g.slab, std::min(kPart, p.N - n), s.mean_f + at, s.off_f, s.var_f + at, mean, part,
                                     part + g.keys);
        add_all(total, part, g.keys);
        add_all(var, part + g.keys, g.keys);
      }
      for (int64_t k = 0; k < g.keys; ++k) {
        const A d = total[k] * inverse;
        mean[k] += d;
        var[k] = var[k] * inverse - d * d;
      }
    }
    return s;
  }

  void forward_block(const B& b) const {
    const int64_t groups = b.groups();
    const Packed s = pack_block(b, false, true, true);
    for (int64_t i = 0; i < groups; ++i) {
      const B g = b.group(i);
      A* x = s.x + i * p.N * g.slab;
      A *mb = s.mean_b + i * g.keys, *vb = s.var_b + i * g.keys, *mf = s.mean_f + i * p.N * g.features, *vf = s.var_f + i * p.N * g.features;
      store_keys(g, mb, p.batch.own_mean, p.batch);
      store_keys(g, vb, p.batch.own_var, p.batch);
      store_features(g, mf, 0, p.N, p.feature.own_mean);
      store_features(g, vf, 0, p.N, p.feature.own_var);
      if (p.batch.mean.data) load_keys(g, p.batch.mean, mb);
      if (p.batch.var.data) load_keys(g, p.batch.var, vb);
      if (p.feature.mean.data) load_features(g, p.feature.mean, 0, p.N, mf);
      if (p.feature.var.data) load_features(g, p.feature.var, 0, p.N, vf);
      to_rstd(vb, vb, g.keys);
      times_weight(g, vb, p.w_b);
      to_rstd(vf, vf, p.N * g.features);
      g.normalise(x, g.target(x, 0), p.N, mb, vb, mf, vf);
      if (!g.direct()) g.unpack(x, 0, p.N);
    }
  }

  // Arrays of a group for the backward pass.
  struct Terms {
    A *center, *used, *scale, *slope, *offset, *rstd;  // for each key; used: the mean that was used
    typename B::BatchSums sums, part;  // part: of a few samples, so that no sum has many terms of its own size
    typename B::FeatureTerms f;
    A* used_f;
  };

  Terms take_terms(int64_t keys, int64_t features) const {
    Terms t;
    t.sums.square = t.part.square = nullptr;
    for (A** array : {&t.center, &t.used, &t.scale, &t.slope, &t.offset, &t.rstd, &t.sums.g, &t.sums.gd, &t.sums.gf, &t.sums.d, &t.part.g, &t.part.gd, &t.part.gf, &t.part.d}) {
      *array = task_scratch.take<A>(keys);
    }
    for (A** array : {&t.f.center, &t.f.rstd, &t.f.offset, &t.f.sum, &t.f.sum_deviation, &t.used_f}) *array = task_scratch.take<A>(features);
    return t;
  }

  static void clear_sums(const typename B::BatchSums& sums, int64_t keys) {
    for (A* sum : sums.all()) {
      if (sum) std::fill(sum, sum + keys, A(0));
    }
  }

  static BLN_VECTORIZE void add_all(A* to, const A* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  }

  // `reduce` of n slabs on top of t.sums. Features from slab n0 of t.f on.
  void reduce_part(const B& b, const A* x, const A* g, int64_t n0, int64_t n, Terms& t) const {
    clear_sums(t.part, b.keys);
    typename B::FeatureTerms f = t.f;
    for (A** array : {&f.center, &f.rstd, &f.offset, &f.sum, &f.sum_deviation}) *array += n0 * b.features;
    b.reduce(x + n0 * b.slab, g + n0 * b.slab, n, t.center, t.part, f);
    const auto totals = t.sums.all(), parts = t.part.all();
    for (size_t i = 0; i < parts.size(); ++i) {
      if (parts[i]) add_all(totals[i], parts[i], b.keys);
    }
  }

  // From the centers of n slabs, and the variances that were used in t.f.rstd, to what `reduce` needs.
  BLN_VECTORIZE void prepare_features(const B& b, int64_t n0, int64_t n, Terms& t) const {
    const int64_t count = n * b.features;
    to_rstd(t.f.rstd, t.f.rstd, count);
    if (p.feature.own() && p.feature.mean.data) {
      load_features(b, p.feature.mean, n0, n, t.used_f);
      for (int64_t i = 0; i < count; ++i) t.f.offset[i] = t.f.rstd[i] * (t.f.center[i] - t.used_f[i]);
    } else {
      std::fill(t.f.offset, t.f.offset + count, A(0));
    }
  }

  // From the sums over features to the offset and the slope that `differentiate` takes off.
  BLN_VECTORIZE void finish_features(int64_t count, Terms& t) const {
    const A inverse = A(1) / A(p.C);
    const A mean_own = p.feature.mean.data ? A(0) : inverse, var_own = p.feature.var.data ? A(0) : inverse;
    for (int64_t i = 0; i < count; ++i) {
      const A rstd = t.f.rstd[i], sum = t.f.sum[i];
      // sum of G * (x - used mean) = that around the center + (center - used mean) * sum of G
      const A deviation = t.f.sum_deviation[i] * rstd + t.f.offset[i] * sum;
      t.f.sum[i] = mean_own * rstd * sum;
      t.f.sum_deviation[i] = var_own * rstd * rstd * deviation;
    }
  }

  // From the sums over samples and the variance that was used, in t.rstd, to the batch terms of dx.
  BLN_VECTORIZE void finish_keys(const B& b, Terms& t) const {
    const A inverse = A(1) / A(p.batch_count());
    const A mean_own = p.batch.mean.data ? A(0) : inverse, var_own = p.batch.var.data ? A(0) : inverse;
    to_rstd(t.rstd, t.rstd, b.keys);
    if (p.batch.own() && p.batch.mean.data) {
      load_keys(b, p.batch.mean, t.used);
      for (int64_t k = 0; k < b.keys; ++k) t.sums.gd[k] += (t.center[k] - t.used[k]) * t.sums.g[k];
    }
    // What rounding left in the center, which is the own mean: sums over many samples need it if the mean is large.
    const A residue = p.batch.own() ? inverse : A(0), residue_of_mean = p.batch.mean.data ? A(0) : residue;
    for (int64_t k = 0; k < b.keys; ++k) t.sums.gd[k] -= residue_of_mean * t.sums.d[k] * t.sums.g[k];
    std::memcpy(t.scale, t.rstd, b.keys * sizeof(A));
    times_weight(b, t.scale, p.w_b);
    for (int64_t k = 0; k < b.keys; ++k) {
      t.offset[k] = mean_own * t.scale[k] * t.sums.g[k];
      t.slope[k] = var_own * t.scale[k] * t.rstd[k] * t.rstd[k] * t.sums.gd[k];
      t.offset[k] -= residue * t.sums.d[k] * t.slope[k];
    }
  }

  // Adds a block's part of the parameters' gradients: the feature part of the weight's and, if batch_part, the rest.
  void add_gradients(const B& b, const Terms& t, bool batch_part, double* grads) const {
    auto weight_at = [&](int64_t k) { return (batch_part ? get<A>(t.rstd + k) * get<A>(t.sums.gd + k) * p.w_b : V{}) + get<A>(t.sums.gf + k) * p.w_f; };
    auto bias_at = [&](int64_t k) { return batch_part ? get<A>(t.sums.g + k) : V{}; };
    if constexpr (FeaturesLast) {
      for (int64_t c0 = 0; c0 < b.padded; c0 += L) {
        V weight{}, bias{};
        for (int64_t k = c0; k < b.keys; k += b.padded) {
          weight += weight_at(k);
          bias += bias_at(k);
        }
        for (int64_t i = 0; i < std::min<int64_t>(L, p.C - c0); ++i) {
          grads[c0 + i] += double(weight[i]);
          grads[p.C + c0 + i] += double(bias[i]);
        }
      }
    } else {
      for (int64_t c = 0; c < p.C; ++c) {
        V weight{}, bias{};
        for (int64_t k = c * R; k < (c + 1) * R; k += L) {
          weight += weight_at(k);
          bias += bias_at(k);
        }
        grads[c] += double(sum_lanes<A>(weight));
        grads[p.C + c] += double(sum_lanes<A>(bias));
      }
    }
  }

  typename B::BatchTerms batch_terms(const Terms& t) const { return {t.center, t.scale, t.slope, t.offset}; }

  void backward_block(const B& b, bool missing_b, bool missing_f, double* grads) const {
    const B g0 = b.group(0);
    const Packed s = pack_block(b, true, missing_b, missing_f);
    Terms t = take_terms(g0.keys, p.N * g0.features);
    for (int64_t i = 0; i < b.groups(); ++i) {
      const B g = b.group(i);
      A *x = s.x + i * p.N * g.slab, *gy = s.g + i * p.N * g.slab;
      t.center = s.mean_b + i * g.keys;
      t.rstd = s.var_b + i * g.keys;
      t.f.center = s.mean_f + i * p.N * g.features;
      t.f.rstd = s.var_f + i * p.N * g.features;
      if (!missing_b) load_keys(g, p.batch.center(), t.center);
      if (p.batch.var_unknown) {
        t.sums.square = t.rstd;
        t.part.square = t.scale;  // free until `finish_keys`
      } else if (!missing_b || p.batch.var.data) {
        load_keys(g, p.batch.used_var(), t.rstd);
      }
      if (!missing_f) load_features(g, p.feature.center(), 0, p.N, t.f.center);
      if (!missing_f || p.feature.var.data) load_features(g, p.feature.used_var(), 0, p.N, t.f.rstd);
      prepare_features(g, 0, p.N, t);
      clear_sums(t.sums, g.keys);
      for (int64_t n = 0; n < p.N; n += kPart) reduce_part(g, x, gy, n, std::min(kPart, p.N - n), t);
      finish_features(p.N * g.features, t);
      for (int64_t k = 0; k < g.keys && p.batch.var_unknown; ++k) {
        const A d = t.sums.d[k] / A(p.N);
        t.rstd[k] = t.rstd[k] / A(p.N) - d * d;
      }
      finish_keys(g, t);
      g.differentiate(x, gy, g.target(gy, 0), p.N, batch_terms(t), t.f);
      if (!g.direct()) g.unpack(gy, 0, p.N);
      add_gradients(g, t, true, grads);
    }
  }

  // ------------------------------------------------------------------------------------------------- the split plan

  struct Share {
    int64_t part;  // of the samples
    Range samples, blocks;
  };

  Share share(const Plan& plan, int64_t t) const {
    const int64_t i = t / plan.parts_b, j = t % plan.parts_b;
    return {i, part_of(p.N, plan.parts_n, i), part_of(plan.blocks, plan.parts_b, j)};
  }

  // Where the keys of a block of per-position statistics begin among those of all blocks.
  int64_t key_offset(const B& b) const { return FeaturesLast ? b.first * b.padded : b.first / R * b.keys; }
  int64_t all_keys() const { return FeaturesLast ? p.P * ceil_div(p.C, L) * L : ceil_div(p.P, R) * R * p.C; }

  void own_features(const B& g, const A* x, int64_t n0, int64_t n, A* mean, A* off, A* var) const {
    g.template first_pass<false>(x, n, mean, nullptr);
    g.template second_pass<false>(x, n, mean, off, var, nullptr, nullptr, nullptr);
    store_features(g, mean, n0, n, p.feature.own_mean);
    store_features(g, var, n0, n, p.feature.own_var);
  }

  void take_statistics(const Plan& plan, bool with_batch, bool with_feature) const {
    const int64_t keys = all_keys();
    A *means = nullptr, *squares = nullptr;
    if (with_batch && !p.per_channel) {
      means = call_scratch.take<A>(plan.parts_n * keys);
      squares = call_scratch.take<A>(plan.parts_n * keys);
    }
    std::vector<std::vector<Moments<double>>> channels(plan.tasks);
    run_tasks(plan.tasks, [&](int64_t t) {
      const Share own = share(plan, t);
      const B b0 = block(plan, own.blocks.begin), g0 = b0.group(0);
      A* slabs = task_scratch.take<A>(b0.groups() * plan.chunk * g0.slab);
      A* mean_f = task_scratch.take<A>(plan.chunk * g0.features);
      A* var_f = task_scratch.take<A>(plan.chunk * g0.features);
      A* off_f = task_scratch.take<A>(plan.chunk * g0.features);
      // Per channel, all blocks share one set of moments; a group with lanes beyond the last position has another.
      std::vector<RunningMoments<A>> moments;
      const int64_t sets = !with_batch ? 0 : p.per_channel ? 2 : b0.groups();
      for (int64_t i = 0; i < sets; ++i) moments.emplace_back(task_scratch, g0.keys);
      int64_t tail = 0;
      for (int64_t j = own.blocks.begin; j < own.blocks.end; ++j) {
        const B b = block(plan, j);
        const int64_t groups = b.groups(), per_group = plan.chunk * g0.slab;
        for (int64_t n = own.samples.begin; n < own.samples.end; n += plan.chunk) {
          const int64_t count = std::min(plan.chunk, own.samples.end - n);
          b.pack(p.x, n, count, slabs, per_group);
          for (int64_t i = 0; i < groups; ++i) {
            const B g = b.group(i);
            const A* x = slabs + i * per_group;
            if (with_feature) own_features(g, x, n, count, mean_f, off_f, var_f);
            if (!with_batch) continue;
            const bool partial = !FeaturesLast && p.per_channel && g.width < R;
            if (partial) tail = g.width;
            RunningMoments<A>& m = moments[p.per_channel ? int(partial) : i];
            if (p.per_channel ? m.count == 0 : n == own.samples.begin) {
              m.keys = g.keys;
              m.start(x);
            }
            if (FeaturesLast && p.per_channel) {
              m.add(x, count * g.width, g.padded);
            } else {
              m.add(x, count, g.slab);
            }
          }
        }
        if (with_batch && !p.per_channel) {
          for (int64_t i = 0; i < groups; ++i) {
            const B g = b.group(i);
            const int64_t at = own.part * keys + key_offset(g);
            for (int64_t k = 0; k < g.keys; ++k) {
              means[at + k] = moments[i].shift[k] + moments[i].mean[k];
              squares[at + k] = moments[i].squares[k];
            }
          }
        }
      }
      if (with_batch && p.per_channel) channels[t] = by_channel(moments, tail);
    });
    if (!with_batch) return;
    if (p.per_channel) {
      for (int64_t c = 0; c < p.C; ++c) {
        Moments<double> total;
        for (const auto& part : channels) {
          if (!part.empty()) total.merge(part[c].count, part[c].mean, part[c].squares);
        }
        if (p.batch.own_mean) p.batch.own_mean[c * p.batch.si] = A(total.mean);
        if (p.batch.own_var) p.batch.own_var[c * p.batch.si] = A(total.squares / total.count);
      }
      return;
    }
    run_tasks(plan.tasks, [&](int64_t t) {
      const Range blocks = part_of(plan.blocks, plan.tasks, t);
      const B g0 = block(plan, 0).group(0);
      A* mean = task_scratch.take<A>(g0.keys);
      A* var = task_scratch.take<A>(g0.keys);
      for (int64_t j = blocks.begin; j < blocks.end; ++j) {
        const B b = block(plan, j);
        for (int64_t i = 0; i < b.groups(); ++i) {
          const B g = b.group(i);
          for (int64_t k = 0; k < g.keys; ++k) {
            Moments<A> total;
            for (int64_t part = 0; part < plan.parts_n; ++part) {
              const int64_t at = part * keys + key_offset(g) + k;
              total.merge(A(part_of(p.N, plan.parts_n, part).size()), means[at], squares[at]);
            }
            mean[k] = total.mean;
            var[k] = total.squares / total.count;
          }
          store_keys(g, mean, p.batch.own_mean, p.batch);
          store_keys(g, var, p.batch.own_var, p.batch);
        }
      }
    });
  }

  // A task's moments for each feature, over its positions: all lanes of the first set, `tail` lanes of the second.
  std::vector<Moments<double>> by_channel(const std::vector<RunningMoments<A>>& sets, int64_t tail) const {
    std::vector<Moments<double>> channels(p.C);
    for (size_t s = 0; s < sets.size(); ++s) {
      const RunningMoments<A>& m = sets[s];
      if (m.count == 0) continue;
      const int64_t lanes = FeaturesLast ? 1 : (s == 0 ? R : tail);
      for (int64_t c = 0; c < p.C; ++c) {
        for (int64_t i = 0; i < lanes; ++i) {
          const int64_t k = FeaturesLast ? c : c * R + i;
          channels[c].merge(double(m.count), double(m.shift[k]) + double(m.mean[k]), double(m.squares[k]));
        }
      }
    }
    return channels;
  }

  void normalise(const Plan& plan) const {
    const bool inline_features = p.feature.own() && !p.feature.known;
    // Few samples at a time, which lie in memory as they would in slabs: read where they are.
    const bool in_place = FeaturesLast && p.same_type && p.sp == p.C && block(plan, 0).padded == p.C;
    run_tasks(plan.tasks, [&](int64_t t) {
      const Share own = share(plan, t);
      const B b0 = block(plan, own.blocks.begin), g0 = b0.group(0);
      const int64_t per_group = plan.chunk * g0.slab;
      A* slabs = task_scratch.take<A>(b0.groups() * per_group);
      A* mean_f = task_scratch.take<A>(plan.chunk * g0.features);
      A* var_f = task_scratch.take<A>(plan.chunk * g0.features);
      A* off_f = task_scratch.take<A>(plan.chunk * g0.features);
      A* mean_b = task_scratch.take<A>(b0.groups() * g0.keys);
      A* scale_b = task_scratch.take<A>(b0.groups() * g0.keys);
      for (int64_t j = own.blocks.begin; j < own.blocks.end; ++j) {
        const B b = block(plan, j);
        for (int64_t i = 0; i < b.groups(); ++i) {
          const B g = b.group(i);
          load_keys(g, p.batch.used_mean(), mean_b + i * g0.keys);
          load_keys(g, p.batch.used_var(), scale_b + i * g0.keys);
          to_rstd(scale_b + i * g0.keys, scale_b + i * g0.keys, g.keys);
          times_weight(g, scale_b + i * g0.keys, p.w_b);
        }
        for (int64_t n = own.samples.begin; n < own.samples.end; n += plan.chunk) {
          const int64_t count = std::min(plan.chunk, own.samples.end - n);
          if (!in_place) b.pack(p.x, n, count, slabs, per_group);
          for (int64_t i = 0; i < b.groups(); ++i) {
            B g = b.group(i);
            const A* x = slabs + i * per_group;
            if (in_place) {
              g.slab = p.sn;
              x = reinterpret_cast<const A*>(p.x) + g.offset(n);
            }
            if (inline_features) own_features(g, x, n, count, mean_f, off_f, var_f);
            if (!inline_features || p.feature.mean.data) load_features(g, p.feature.used_mean(), n, count, mean_f);
            if (!inline_features || p.feature.var.data) load_features(g, p.feature.used_var(), n, count, var_f);
            to_rstd(var_f, var_f, count * g.features);
            A* y = slabs + i * per_group;
            g.normalise(x, g.target(y, n), count, mean_b + i * g0.keys, scale_b + i * g0.keys, mean_f, var_f);
            if (!g.direct()) g.unpack(y, n, count);
          }
        }
      }
    });
  }

  void backward_split(const Plan& plan, std::vector<std::vector<double>>& grads) const {
    const int64_t keys = p.per_channel ? block(plan, 0).group(0).keys : all_keys();
    // Sums of g and of g * (x - center) for each key: of each part of the samples (per position) or each task.
    const int64_t parts = p.per_channel ? plan.tasks : plan.parts_n;
    A* sums_g = call_scratch.take<A>(parts * keys);
    A* sums_gd = call_scratch.take<A>(parts * keys);
    A* sums_d = call_scratch.take<A>(parts * keys);
    A* offset_f = call_scratch.take<A>(p.N * p.P);
    A* slope_f = call_scratch.take<A>(p.N * p.P);
    run_tasks(plan.tasks, [&](int64_t t) {
      const Share own = share(plan, t);
      const B b0 = block(plan, own.blocks.begin), g0 = b0.group(0);
      const int64_t per_group = plan.chunk * g0.slab;
      A* slabs = task_scratch.take<A>(b0.groups() * per_group);
      A* gradients = task_scratch.take<A>(b0.groups() * per_group);
      std::vector<Terms> terms;
      for (int64_t i = 0; i < b0.groups(); ++i) terms.push_back(take_terms(g0.keys, plan.chunk * g0.features));
      if (p.per_channel) {
        std::fill(sums_g + t * keys, sums_g + (t + 1) * keys, A(0));
        std::fill(sums_gd + t * keys, sums_gd + (t + 1) * keys, A(0));
        std::fill(sums_d + t * keys, sums_d + (t + 1) * keys, A(0));
      }
      for (int64_t j = own.blocks.begin; j < own.blocks.end; ++j) {
        const B b = block(plan, j);
        for (int64_t i = 0; i < b.groups(); ++i) {
          load_keys(b.group(i), p.batch.center(), terms[i].center);
          clear_sums(terms[i].sums, g0.keys);
        }
        for (int64_t n = own.samples.begin; n < own.samples.end; n += plan.chunk) {
          const int64_t count = std::min(plan.chunk, own.samples.end - n);
          b.pack(p.x, n, count, slabs, per_group);
          b.pack(p.g, n, count, gradients, per_group);
          for (int64_t i = 0; i < b.groups(); ++i) {
            const B g = b.group(i);
            Terms& m = terms[i];
            load_features(g, p.feature.center(), n, count, m.f.center);
            load_features(g, p.feature.used_var(), n, count, m.f.rstd);
            prepare_features(g, n, count, m);
            reduce_part(g, slabs + i * per_group, gradients + i * per_group, 0, count, m);
            finish_features(count * g.features, m);
            store_features(g, m.f.sum, n, count, offset_f);
            store_features(g, m.f.sum_deviation, n, count, slope_f);
          }
        }
        for (int64_t i = 0; i < b.groups(); ++i) {
          const B g = b.group(i);
          const int64_t at = p.per_channel ? t * keys : own.part * keys + key_offset(g);
          for (int64_t k = 0; k < g.keys; ++k) {
            sums_g[at + k] = (p.per_channel ? sums_g[at + k] : A(0)) + terms[i].sums.g[k];
            sums_gd[at + k] = (p.per_channel ? sums_gd[at + k] : A(0)) + terms[i].sums.gd[k];
            sums_d[at + k] = (p.per_channel ? sums_d[at + k] : A(0)) + terms[i].sums.d[k];
          }
          add_gradients(g, terms[i], false, grads[t].data());
        }
      }
    });
    if (p.per_channel) merge_channels(plan, keys, {sums_g, sums_gd, sums_d});
    run_tasks(plan.tasks, [&](int64_t t) {
      const Share own = share(plan, t);
      const B b0 = block(plan, own.blocks.begin), g0 = b0.group(0);
      const int64_t per_group = plan.chunk * g0.slab;
      A* slabs = task_scratch.take<A>(b0.groups() * per_group);
      A* gradients = task_scratch.take<A>(b0.groups() * per_group);
      std::vector<Terms> terms;
      for (int64_t i = 0; i < b0.groups(); ++i) terms.push_back(take_terms(g0.keys, plan.chunk * g0.features));
      for (int64_t j = own.blocks.begin; j < own.blocks.end; ++j) {
        const B b = block(plan, j);
        for (int64_t i = 0; i < b.groups(); ++i) {
          const B g = b.group(i);
          Terms& m = terms[i];
          clear_sums(m.sums, g.keys);
          load_keys(g, p.batch.center(), m.center);
          load_keys(g, p.batch.used_var(), m.rstd);
          const int64_t at = p.per_channel ? 0 : key_offset(g), merged = p.per_channel ? 1 : plan.parts_n;
          for (int64_t part = 0; part < merged; ++part) {
            for (int64_t k = 0; k < g.keys; ++k) {
              m.sums.g[k] += sums_g[part * keys + at + k];
              m.sums.gd[k] += sums_gd[part * keys + at + k];
              m.sums.d[k] += sums_d[part * keys + at + k];
            }
          }
          finish_keys(g, m);
        }
        for (int64_t n = own.samples.begin; n < own.samples.end; n += plan.chunk) {
          const int64_t count = std::min(plan.chunk, own.samples.end - n);
          b.pack(p.x, n, count, slabs, per_group);
          b.pack(p.g, n, count, gradients, per_group);
          for (int64_t i = 0; i < b.groups(); ++i) {
            const B g = b.group(i);
            Terms& m = terms[i];
            A *x = slabs + i * per_group, *gy = gradients + i * per_group;
            load_features(g, p.feature.center(), n, count, m.f.center);
            load_features(g, p.feature.used_var(), n, count, m.f.rstd);
            to_rstd(m.f.rstd, m.f.rstd, count * g.features);
            load_features(g, {offset_f, p.P, 1}, n, count, m.f.sum);
            load_features(g, {slope_f, p.P, 1}, n, count, m.f.sum_deviation);
            g.differentiate(x, gy, g.target(gy, n), count, batch_terms(m), m.f);
            if (!g.direct()) g.unpack(gy, n, count);
          }
        }
        // The batch part is the same for every task that works on the block, and, per channel, for every block.
        for (int64_t i = 0; i < b.groups() && own.part == 0 && !p.per_channel; ++i) {
          add_gradients(b.group(i), terms[i], true, grads[t].data());  // sums.gf is 0: the first phase added its part
        }
        if (p.per_channel && t == 0 && j == 0) channel_gradients(terms[0], grads[t].data());
      }
    });
  }

  // Per channel: the sums of all tasks and lanes, for every key of the first task's arrays.
  void merge_channels(const Plan& plan, int64_t keys, std::initializer_list<A*> all) const {
    const int64_t lanes = FeaturesLast ? 1 : R;
    for (A* sums : all) {
      for (int64_t c = 0; c < p.C; ++c) {
        double total = 0;
        for (int64_t t = 0; t < plan.tasks; ++t) {
          for (int64_t i = 0; i < lanes; ++i) total += double(sums[t * keys + c * lanes + i]);
        }
        for (int64_t i = 0; i < lanes; ++i) sums[c * lanes + i] = A(total);
      }
    }
  }

  void channel_gradients(const Terms& m, double* grads) const {
    for (int64_t c = 0; c < p.C; ++c) {
      const int64_t k = FeaturesLast ? c : c * R;
      grads[c] += double(p.w_b) * double(m.rstd[k]) * double(m.sums.gd[k]);
      grads[p.C + c] += double(m.sums.g[k]);
    }
  }
};

// The file is compiled three times, side by side, and linked: LIGHTNING_BLN_PART says which engines an object holds. The
// first one holds everything else besides.
template <class A, bool FeaturesLast>
void run(Problem<A>& p, bool backward);

template <class A, bool FeaturesLast>
void run_here(Problem<A>& p, bool backward) {
  Engine<A, FeaturesLast> engine(p);
  backward ? engine.backward() : engine.forward();
}

#if LIGHTNING_BLN_PART == 1
template <>
void run<float, true>(Problem<float>& p, bool backward) {
  run_here<float, true>(p, backward);
}
#elif LIGHTNING_BLN_PART == 2
template <>
void run<double, true>(Problem<double>& p, bool backward) {
  run_here<double, true>(p, backward);
}
template <>
void run<double, false>(Problem<double>& p, bool backward) {
  run_here<double, false>(p, backward);
}
#else
template <>
void run<float, false>(Problem<float>& p, bool backward) {
  run_here<float, false>(p, backward);
}
template <>
void run<float, true>(Problem<float>& p, bool backward);
template <>
void run<double, true>(Problem<double>& p, bool backward);
template <>
void run<double, false>(Problem<double>& p, bool backward);

// ------------------------------------------------------------------------------------------- tensors to problems

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

void in_parallel(int64_t tasks, void (*f)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { f(begin, end, context); });
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

// The feature axis first among those from `to` on: positions keep their order.
Tensor move_axis(Tensor t, int64_t from, int64_t to) {
  for (int64_t d = from; d > to; --d) t = torch::stable::transpose(t, d - 1, d);
  return t;
}

// The stride of positions, if all axes from `first` on but the features' collapse into one; -1 if they do not.
int64_t position_stride(const Tensor& t, int64_t first, int64_t feature_axis) {
  int64_t stride = 1, expected = -1;
  for (int64_t d = t.dim() - 1; d >= first; --d) {
    if (d == feature_axis || t.size(d) == 1) continue;
    if (expected == -1) {
      stride = t.stride(d);
    } else if (t.stride(d) != expected) {
      return -1;
    }
    expected = t.stride(d) * t.size(d);
  }
  return expected == -1 ? 0 : stride;  // 0: there is one position
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// x as the kernels can take it: x itself, or a copy with the feature axis at 1.
struct Input {
  Tensor x;
  int64_t axis;
  bool copied = false;
  int64_t N, C, P, sn, sc, sp;
  bool features_last = false;

  Input(const Tensor& given, int64_t feature_dim) : x(given), axis(feature_dim) {
    if (!same_strides(x, torch::stable::empty_like(x)) || !fits()) {
      x = torch::stable::contiguous(move_axis(x, axis, 1));
      axis = 1;
      copied = true;
      fits();
    }
  }

  // Another tensor of the given shape with x's strides.
  Tensor like(const Tensor& given, int64_t feature_dim) const {
    Tensor moved = copied ? move_axis(given, feature_dim, 1) : given;
    if (same_strides(moved, x)) return moved;
    Tensor copy = torch::stable::empty_like(x);
    torch::stable::copy_(copy, moved);
    return copy;
  }

 private:
  bool fits() {
    N = x.size(0);
    C = x.size(axis);
    P = 1;
    for (int64_t d = 1; d < x.dim(); ++d) P *= d == axis ? 1 : x.size(d);
    sn = x.stride(0);
    sc = x.stride(axis);
    sp = position_stride(x, 1, axis);
    if (P == 1) sp = 0;
    if (C == 1) sc = 0;
    features_last = P == 1 ? (C == 1 || sc == 1) : (C > 1 && sc == 1);
    return sp >= 0 && (features_last || sp == 1);
  }
};

template <class A>
constexpr ScalarType type_of = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

template <class A>
void read_vector(const Tensor& t, A* out) {
  const int64_t stride = t.stride(0), n = t.size(0);
  auto read = [&](const auto* data) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(data[i * stride]);
  };
  switch (t.scalar_type()) {
    case ScalarType::Float: return read(static_cast<const float*>(t.const_data_ptr()));
    case ScalarType::Double: return read(static_cast<const double*>(t.const_data_ptr()));
    case ScalarType::BFloat16: return read(static_cast<const BFloat16*>(t.const_data_ptr()));
    case ScalarType::Half: return read(static_cast<const Half*>(t.const_data_ptr()));
    default: STD_TORCH_CHECK(false, "weight and bias must be float32, float64, bfloat16 or float16; pass weight.float(), say.");
  }
}

Tensor with_strides_of(const Tensor& like, const Tensor& t) {
  if (same_strides(like, t)) return t;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

// Population tensors and their converted copies, alive for the call.
template <class A>
class Given {
 public:
  // shape x.shape[1:], or (C,) for one value a feature
  Statistic<A> batch(const Optional& given, int64_t ndim, int64_t feature_dim) {
    if (!given) return {};
    Tensor t = typed(*given);
    if (t.dim() == 1 || t.dim() != ndim - 1) return {keep(t), t.stride(0), 0};
    int64_t axis = feature_dim - 1, sp = position_stride(t, 0, axis);
    if (sp < 0) {
      t = torch::stable::contiguous(move_axis(t, axis, 0));
      axis = 0;
      sp = position_stride(t, 0, 0);
    }
    return {keep(t), t.stride(axis), sp};
  }

  // shape (N, positions), (positions) or ()
  Statistic<A> feature(const Optional& given, int64_t ndim, int64_t positions) {
    if (!given) return {};
    const Tensor t = torch::stable::contiguous(typed(*given));
    const bool slots = t.dim() == ndim - 1;
    const bool one = t.dim() == 0 && ndim > 2;  // one value for all samples and positions
    return {keep(t), slots ? positions : 0, one ? 0 : 1};
  }

 private:
  std::vector<Tensor> kept_;
  Tensor typed(const Tensor& t) {
    return t.scalar_type() == type_of<A> ? t : torch::stable::to(t, type_of<A>);
  }
  const A* keep(const Tensor& t) {
    kept_.push_back(t);
    return static_cast<const A*>(t.const_data_ptr());
  }
};

// How a type is read and written, by layout.
template <class A>
struct Format {
  Rows<A> features_last, features_outside;
  bool same_type;
};

template <class T, class A>
Format<A> format_of() {
  return {{load_rows<T, A, true>, store_rows<T, A>, int64_t(sizeof(T))}, {load_rows<T, A, false>, store_rows<T, A>, int64_t(sizeof(T))}, std::is_same_v<T, A>};
}

template <class A>
void set_up(Problem<A>& p, const Format<A>& format, const Input& in, const Optional& weight, const Optional& bias, const Optional& batch_size, bool per_channel, double eps) {
  p.N = in.N;
  p.C = in.C;
  p.P = in.P;
  p.sn = in.sn;
  p.sc = in.sc;
  p.sp = in.sp;
  p.per_channel = per_channel;
  p.same_type = format.same_type;
  p.eps = A(eps);
  int64_t nominal = in.N;
  if (batch_size) {
    const Tensor whole = batch_size->scalar_type() == ScalarType::Long ? *batch_size : torch::stable::to(*batch_size, ScalarType::Long);
    const int64_t given = *static_cast<const int64_t*>(whole.const_data_ptr());
    if (given > 0) nominal = given;
  }
  const A inverse = A(1) / A(std::max<int64_t>(nominal, 1));
  p.w_f = inverse - A(kDelta);
  p.w_b = A(1) - (inverse + A(kDelta));
  p.scale = A(1.0 / std::sqrt(double(in.C)));
  p.rows = in.features_last ? format.features_last : format.features_outside;
  p.x = static_cast<const char*>(in.x.const_data_ptr());
  const int64_t padded = ceil_div(in.C, kLanes<A>) * kLanes<A>;
  A* W = call_scratch.take<A>(padded);
  A* b = call_scratch.take<A>(padded);
  std::fill(W, W + padded, A(0));
  std::fill(b, b + padded, A(0));
  std::fill(W, W + in.C, A(1));
  if (weight) read_vector<A>(*weight, W);
  if (bias) read_vector<A>(*bias, b);
  for (int64_t c = 0; c < in.C; ++c) W[c] *= p.scale;
  A* real = call_scratch.take<A>(padded);
  for (int64_t c = 0; c < padded; ++c) real[c] = c < in.C ? A(1) : A(0);
  p.real = real;
  p.W = W;
  p.bias = b;
}

// Sizes of x without one axis.
std::vector<int64_t> without(const Tensor& x, int64_t axis) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d != axis) sizes.push_back(x.size(d));
  }
  return sizes;
}

Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), type);
}

// Where batch statistics of x go: x[0]'s strides, as far as those are dense (library.py says the same to the compiler).
Tensor new_batch_statistic(const Tensor& x, ScalarType type) {
  const std::vector<int64_t> sizes = without(x, 0);
  if (x.is_contiguous()) return new_empty(x, sizes, type);
  std::vector<int64_t> strides;
  for (int64_t d = 1; d < x.dim(); ++d) strides.push_back(x.stride(d));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                         type == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::empty_like(Tensor(handle));
}

// A batch statistic that the kernel writes, directly or by way of a (C, P) array.
template <class A>
struct BatchOutput {
  Tensor tensor, staged;
  int64_t axis, si, sp;

  BatchOutput(const Tensor& x, const Input& in, int64_t feature_dim, bool per_channel, bool wanted) : axis(feature_dim - 1) {
    if (!wanted) {
      tensor = new_empty(x, {0}, type_of<A>);
    } else if (per_channel) {
      tensor = new_empty(x, {in.C}, type_of<A>);
    } else {
      tensor = new_batch_statistic(x, type_of<A>);
    }
    staged = tensor;
    si = 1;
    sp = 0;
    if (!wanted || per_channel) return;
    si = tensor.stride(axis);
    sp = position_stride(tensor, 0, axis);
    if (sp < 0) {
      staged = new_empty(x, {in.C, in.P}, type_of<A>);
      si = in.P;
      sp = 1;
    }
  }

  A* data() const { return static_cast<A*>(staged.mutable_data_ptr()); }

  void finish() {
    if (staged.get() == tensor.get()) return;
    Tensor moved = move_axis(tensor, axis, 0);
    std::vector<int64_t> sizes;
    for (int64_t d = 0; d < moved.dim(); ++d) sizes.push_back(moved.size(d));
    torch::stable::copy_(moved, torch::stable::view(staged, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size())));
  }
};

// The result in the memory layout of empty_like(x).
Tensor as_given(const Tensor& result, const Tensor& x, const Input& in, int64_t feature_dim) {
  if (!in.copied) return result;
  Tensor out = torch::stable::empty_like(x);
  Tensor moved = move_axis(out, feature_dim, 1);
  torch::stable::copy_(moved, result);
  return out;
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor>;

template <class A>
Forward forward_as(const Format<A>& format, const Tensor& x, const Optional& weight, const Optional& bias, const Optional& batch_mean, const Optional& batch_var,
                   const Optional& feature_mean, const Optional& feature_var, const Optional& batch_size, int64_t feature_dim, bool per_channel,
                   double eps) {
  call_scratch.reset();
  const Input in(x, feature_dim);
  const bool own_b = !batch_mean || !batch_var, own_f = !feature_mean || !feature_var;
  BatchOutput<A> own_batch_mean(x, in, feature_dim, per_channel, own_b), own_batch_var(x, in, feature_dim, per_channel, !batch_var);
  const std::vector<int64_t> rows = without(x, feature_dim), none = {0};
  const Tensor own_feature_mean = new_empty(x, own_f ? rows : none, type_of<A>);
  const Tensor own_feature_var = new_empty(x, !feature_var ? rows : none, type_of<A>);
  Tensor y = torch::stable::empty_like(in.x);
  if (x.numel() == 0) {
    for (Tensor t : {own_batch_mean.tensor, own_batch_var.tensor, own_feature_mean, own_feature_var}) torch::stable::zero_(t);
    return {as_given(y, x, in, feature_dim), own_batch_mean.tensor, own_batch_var.tensor, own_feature_mean, own_feature_var};
  }
  Problem<A> p{};
  set_up<A>(p, format, in, weight, bias, batch_size, per_channel, eps);
  p.out = static_cast<char*>(y.mutable_data_ptr());
  Given<A> given;
  p.batch.mean = given.batch(batch_mean, x.dim(), feature_dim);
  p.batch.var = given.batch(batch_var, x.dim(), feature_dim);
  p.feature.mean = given.feature(feature_mean, x.dim(), in.P);
  p.feature.var = given.feature(feature_var, x.dim(), in.P);
  if (own_b) {
    p.batch.own_mean = own_batch_mean.data();
    p.batch.si = own_batch_mean.si;
    p.batch.sp = own_batch_mean.sp;
  }
  if (!batch_var) p.batch.own_var = own_batch_var.data();
  if (own_f) {
    p.feature.own_mean = static_cast<A*>(own_feature_mean.mutable_data_ptr());
    p.feature.si = in.P;
    p.feature.sp = 1;
  }
  if (!feature_var) p.feature.own_var = static_cast<A*>(own_feature_var.mutable_data_ptr());
  in.features_last ? run<A, true>(p, false) : run<A, false>(p, false);
  own_batch_mean.finish();
  own_batch_var.finish();
  return {as_given(y, x, in, feature_dim), own_batch_mean.tensor, own_batch_var.tensor, own_feature_mean, own_feature_var};
}

template <class A>
Backward backward_as(const Format<A>& format, const Tensor& grad_y, const Tensor& x, const Optional& weight, const Tensor& own_batch_mean, const Tensor& own_batch_var,
                     const Tensor& own_feature_mean, const Tensor& own_feature_var, const Optional& batch_mean, const Optional& batch_var,
                     const Optional& feature_mean, const Optional& feature_var, const Optional& batch_size, int64_t feature_dim, bool per_channel,
                     double eps) {
  call_scratch.reset();
  const Input in(x, feature_dim);
  const Tensor grad_weight = new_empty(x, {in.C}, type_of<A>), grad_bias = new_empty(x, {in.C}, type_of<A>);
  Tensor grad_x = torch::stable::empty_like(in.x);
  if (x.numel() == 0) {
    for (Tensor t : {grad_weight, grad_bias}) torch::stable::zero_(t);
    return {as_given(grad_x, x, in, feature_dim), grad_weight, grad_bias};
  }
  const Tensor g = in.like(grad_y.scalar_type() == x.scalar_type() ? grad_y : torch::stable::to(grad_y, x.scalar_type()), feature_dim);
  Problem<A> p{};
  set_up<A>(p, format, in, weight, std::nullopt, batch_size, per_channel, eps);
  p.g = static_cast<const char*>(g.const_data_ptr());
  p.out = static_cast<char*>(grad_x.mutable_data_ptr());
  p.grad_weight = static_cast<A*>(grad_weight.mutable_data_ptr());
  p.grad_bias = static_cast<A*>(grad_bias.mutable_data_ptr());
  Given<A> given;
  p.batch.mean = given.batch(batch_mean, x.dim(), feature_dim);
  p.batch.var = given.batch(batch_var, x.dim(), feature_dim);
  p.feature.mean = given.feature(feature_mean, x.dim(), in.P);
  p.feature.var = given.feature(feature_var, x.dim(), in.P);
  // The kernels only read through these.
  auto take = [](Side<A>& side, const Statistic<A>& mean, const Statistic<A>& var) {
    side.own_mean = const_cast<A*>(mean.data);
    side.own_var = const_cast<A*>(var.data);
    side.si = mean.si;
    side.sp = mean.sp;
    side.known = true;
  };
  // Two statistics of one pair are read with the same strides.
  if (p.batch.own() && own_batch_mean.numel() > 0) {
    p.batch.var_unknown = !p.batch.var.data && own_batch_var.numel() == 0;
    const Optional var = p.batch.var.data || p.batch.var_unknown ? Optional() : Optional(with_strides_of(own_batch_mean, own_batch_var));
    take(p.batch, given.batch(own_batch_mean, x.dim(), feature_dim), given.batch(var, x.dim(), feature_dim));
  }
  if (p.feature.own() && own_feature_mean.numel() > 0) {
    const Optional var = p.feature.var.data ? Optional() : Optional(own_feature_var);
    take(p.feature, given.feature(own_feature_mean, x.dim(), in.P), given.feature(var, x.dim(), in.P));
  }
  in.features_last ? run<A, true>(p, true) : run<A, false>(p, true);
  return {as_given(grad_x, x, in, feature_dim), grad_weight, grad_bias};
}

// ----------------------------------------------------------------------------------------------------- registration

template <class F>
auto with_types(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float(), float());
    case ScalarType::Double: return f(double(), double());
    case ScalarType::BFloat16: return f(BFloat16(), float());
    case ScalarType::Half: return f(Half(), float());
    default: STD_TORCH_CHECK(false, "Batch layer normalization needs float32, float64, bfloat16 or float16; call it with x.float(), say.");
  }
}

Forward forward(const Tensor& x, Optional weight, Optional bias, Optional batch_mean, Optional batch_var, Optional feature_mean, Optional feature_var,
                Optional batch_size, int64_t feature_dim, bool per_channel, double eps) {
  return with_types(x, [&](auto t, auto a) {
    return forward_as<decltype(a)>(format_of<decltype(t), decltype(a)>(), x, weight, bias, batch_mean, batch_var, feature_mean, feature_var, batch_size, feature_dim, per_channel, eps);
  });
}

Backward backward(const Tensor& grad_y, const Tensor& x, Optional weight, const Tensor& own_batch_mean, const Tensor& own_batch_var,
                  const Tensor& own_feature_mean, const Tensor& own_feature_var, Optional batch_mean, Optional batch_var, Optional feature_mean,
                  Optional feature_var, Optional batch_size, int64_t feature_dim, bool per_channel, double eps) {
  return with_types(x, [&](auto t, auto a) {
    return backward_as<decltype(a)>(format_of<decltype(t), decltype(a)>(), grad_y, x, weight, own_batch_mean, own_batch_var, own_feature_mean, own_feature_var, batch_mean,
                                                 batch_var, feature_mean, feature_var, batch_size, feature_dim, per_channel, eps);
  });
}

// ---------------------------------------------------------------------------------------------- population statistics

// running = new value where `first`, else lerp(running, new value, rate); as torch.lerp rounds it.
template <class A, class F>
BLN_VECTORIZE void accumulate_into(A* running, int64_t count, bool first, A rate, const F& value) {
  if (first) {
    for (int64_t i = 0; i < count; ++i) running[i] = value(i);
  } else if (rate < A(0.5)) {
    for (int64_t i = 0; i < count; ++i) running[i] += rate * (value(i) - running[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const A v = value(i);
      running[i] = v - (v - running[i]) * (A(1) - rate);
    }
  }
}

template <class A>
void accumulate_as(const Tensor& batch_mean, const Tensor& batch_var, const Tensor& feature_mean, const Tensor& feature_var, const Tensor& own_batch_mean,
                   const Tensor& own_batch_var, const Tensor& own_feature_mean, const Tensor& own_feature_var, bool first, A rate, A batch_factor,
                   A feature_factor) {
  call_scratch.reset();
  auto batch = [&](const Tensor& running, const Tensor& own, A factor) {
    const A* from = static_cast<const A*>(own.const_data_ptr());
    accumulate_into(static_cast<A*>(running.mutable_data_ptr()), running.numel(), first, rate, [&](int64_t i) { return from[i] * factor; });
  };
  // Averages over the samples, or over everything; sums in double, as there may be many.
  auto feature = [&](const Tensor& running, const Tensor& own, A factor) {
    const int64_t kept = running.numel(), count = own.numel() / kept;
    const A* from = static_cast<const A*>(own.const_data_ptr());
    double* sums = call_scratch.take<double>(kept);
    std::fill(sums, sums + kept, 0.0);
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t i = 0; i < kept; ++i) sums[i] += double(from[n * kept + i]);
    }
    accumulate_into(static_cast<A*>(running.mutable_data_ptr()), kept, first, rate,
                    [&](int64_t i) { return A(sums[i] / double(count)) * factor; });
  };
  batch(batch_mean, own_batch_mean, A(1));
  batch(batch_var, own_batch_var, batch_factor);
  feature(feature_mean, own_feature_mean, A(1));
  feature(feature_var, own_feature_var, feature_factor);
}

// One mini-batch of `samples` into the population statistics; see library.py.
void accumulate(const Tensor& batch_mean, const Tensor& batch_var, const Tensor& feature_mean, const Tensor& feature_var, const Tensor& num_samples,
                const Tensor& nominal_batch_size, const Tensor& own_batch_mean, const Tensor& own_batch_var, const Tensor& own_feature_mean,
                const Tensor& own_feature_var, int64_t samples, int64_t values, double momentum, bool fixed_batch_size) {
  int64_t* seen = static_cast<int64_t*>(num_samples.mutable_data_ptr());
  int64_t* nominal = static_cast<int64_t*>(nominal_batch_size.mutable_data_ptr());
  const bool first = *seen == 0, cumulative = momentum < 0;
  *seen += samples;
  if (!fixed_batch_size) *nominal = first ? samples : std::max(*nominal, samples);
  const double rate = cumulative ? double(samples) / double(*seen) : momentum;
  auto unbiased = [](int64_t n) { return n > 1 ? double(n) / double(n - 1) : 1.0; };
  auto run = [&](auto a) {
    using A = decltype(a);
    accumulate_as<A>(batch_mean, batch_var, feature_mean, feature_var, own_batch_mean, own_batch_var, own_feature_mean, own_feature_var,
                     first && cumulative, A(rate), A(unbiased(values)), A(unbiased(samples)));
  };
  batch_mean.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

#endif  // LIGHTNING_BLN_PART

}  // namespace lightning_bln

#if LIGHTNING_BLN_PART == 0
STABLE_TORCH_LIBRARY_IMPL(lightning_bln, CPU, m) {
  m.impl("batch_layer_norm", TORCH_BOX(&lightning_bln::forward));
  m.impl("batch_layer_norm_backward", TORCH_BOX(&lightning_bln::backward));
  m.impl("accumulate_statistics", TORCH_BOX(&lightning_bln::accumulate));
}
#endif
