// Batch Layer Normalization on the CPU: the kernel behind lightning_bln::batch_layer_norm and its backward.
//
// What is computed is defined in reference.py; names here are the same. In short, with W = weight / sqrt(C):
//
//     y = W * w_b * r_b * (x - mu_b) + W * w_f * r_f * (x - mu_f) + bias,     r = 1 / sqrt(var + eps)
//
// How. A *key* is a place (c, p) of a sample, or a feature c where statistics are per channel: batch statistics are
// reductions over samples, key by key. Feature statistics are reductions within a sample. Two engines, by layout:
//
//   Inside   Features lie inside, x is N, P, C in memory: dense input, sequences, channels_last images. A *slab* is one
//            sample's part of a block of positions, [row][c], row = position. It is read where it lies, or packed into
//            the accumulation type A (float, or double for double input) so that rows are whole vectors.
//              fused   Per-position statistics make blocks of positions independent. If all N slabs of a block fit the
//                      cache, x is read from memory once and y written once: reduce both ways, normalise.
//              split   Otherwise (per-channel statistics, few positions, very large N * C) tasks own ranges of samples
//                      and of blocks: each reduces its part, the parts are merged in a fixed order, and x is read
//                      again to normalise.
//   Outside  Features lie outside, x is N, C, P in memory: contiguous images. See there.
//
// Nothing depends on which thread runs a task, only on how many tasks there are: results repeat bit for bit.
// Variances are sums around a mean or a value near it, never of raw squares, and means that were rounded are corrected by
// the sum around them.

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
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SSE__)
#include <immintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
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

// v where it is finite, else 0.
template <class A>
inline Vec<A> finite(Vec<A> v) {
  return v - v == 0 ? v : Vec<A>{};
}

// Mean and variance of 1 / inverse values, from their sums and sums of squares around a shift.
template <class A>
inline std::pair<Vec<A>, Vec<A>> mean_and_variance(Vec<A> shift, Vec<A> sum, Vec<A> square, A inverse) {
  const Vec<A> d = sum * inverse;
  return {shift + d, square * inverse - finite<A>(d * d)};
}

// A vector of float64 from and to memory of another type.
template <class A>
inline Vec<double> get_wide(const A* p) {
  typedef A Few __attribute__((vector_size(kLanes<double> * sizeof(A))));
  Few values;
  std::memcpy(&values, p, sizeof values);
  return __builtin_convertvector(values, Vec<double>);
}
template <class A>
inline void put_wide(A* p, Vec<double> v) {
  typedef A Few __attribute__((vector_size(kLanes<double> * sizeof(A))));
  const Few values = __builtin_convertvector(v, Few);
  std::memcpy(p, &values, sizeof values);
}

// As many values in float64.
template <class A>
struct WideOf {
  typedef double type __attribute__((vector_size(kLanes<A> * int(sizeof(double)))));
};
template <class A>
using Wide = typename WideOf<A>::type;
template <class A>
inline Wide<A> widen(Vec<A> v) {
  return __builtin_convertvector(v, Wide<A>);
}

// The same in parts that are vectors of float64: f(part) for each, and part `Part` of v.
template <class A, class F>
inline void each_wide_part(const F& f) {
  f(std::integral_constant<int, 0>());
  if constexpr (!std::is_same_v<A, double>) f(std::integral_constant<int, 1>());
}
template <class A, int Part>
inline Vec<double> wide_part(Vec<A> v) {
  A values[kLanes<A>];
  std::memcpy(values, &v, sizeof v);
  return get_wide(values + Part * kLanes<double>);
}

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

// To memory; past the caches, where p must be a multiple of a vector's size, no line is read before it is written.
template <class A>
inline void put(A* p, Vec<A> v, bool past_caches) {
  if (!past_caches) return put<A>(p, v);
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  put<A>(p, v);
#endif
}

// A task's stores past the caches are seen by other threads before what it stores next.
inline void finish_past_caches() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

// The sum over the lanes, by pairwise additions.
template <class A, int Width, size_t... I>
inline Vec<A> swap_lanes(Vec<A> v, std::index_sequence<I...>) {
  return __builtin_shuffle(v, typename VectorOf<A>::bits{(I ^ size_t(Width))...});
}
template <class A, int Width = kLanes<A> / 2>
inline A sum_all(Vec<A> v) {
  v += swap_lanes<A, Width>(v, std::make_index_sequence<size_t(kLanes<A>)>());
  if constexpr (Width > 1) return sum_all<A, Width / 2>(v);
  return v[0];
}

// The first `count` lanes, zeros beyond.
template <class A, size_t... I>
inline Vec<A> first_lanes(Vec<A> v, int count, std::index_sequence<I...>) {
  using Bits = typename VectorOf<A>::bits;
  using Lane = std::remove_reference_t<decltype(Bits{}[0])>;
  const Bits index = {I...};
  return (Vec<A>)((Bits)v & (Bits)(index < Lane(count) - Bits{}));
}
template <class A>
inline Vec<A> only(Vec<A> v, int count) {
  return first_lanes<A>(v, count, std::make_index_sequence<size_t(kLanes<A>)>());
}

// Partial sums of two vectors' lanes, those of the first and of the second in turns of `Width` lanes: within 128 bits,
// where lanes move at the least cost, then 128 bits at a time.
template <class A, int Width, size_t... I>
inline Vec<A> add_pairs(Vec<A> first, Vec<A> second, std::index_sequence<I...>) {
  using Bits = typename VectorOf<A>::bits;
  constexpr size_t K = kLanes<A>, W = Width, part = 16 / sizeof(A);
  if constexpr (W < part) {  // [f0 s0 f1 s1] + [f2 s2 f3 s3]
    const Bits low = {(I / W % 2 * K + I / part * part + I % part / (2 * W) * W + I % W)...};
    return __builtin_shuffle(first, second, low) + __builtin_shuffle(first, second, low + unsigned(part / 2));
  } else {  // [f0 f2 s0 s2] + [f1 f3 s1 s3]
    const Bits low = {(2 * (I / part) * part + I % part)...};
    return __builtin_shuffle(first, second, low) + __builtin_shuffle(first, second, low + unsigned(part));
  }
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

// 1 / sqrt(v), to the last digit or the one before.
template <class A>
inline Vec<A> inverse_root(Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {  // 14 bits and a step of Newton's: a third of the time
    const Vec<A> root = (Vec<A>)_mm512_rsqrt14_ps((__m512)v);
    return root + finite<A>(root * (A(0.5) - v * A(0.5) * root * root));  // of 0 and infinity it is exact
  }
#endif
  A values[kLanes<A>];
  put<A>(values, v);
  for (A& value : values) value = A(1) / std::sqrt(value);
  return get<A>(values);
}

// Memory of type T as vectors of the accumulation type.
template <class T, class A>
struct Memory {
  static_assert(std::is_same_v<T, A>);
  static Vec<A> load(const T* p) { return get<A>(p); }
  static void store(T* p, Vec<A> v) { put<A>(p, v); }
};

// A bfloat16 as it lies in memory.
struct BrainFloat {
  uint16_t bits;
};

template <>
struct Memory<BrainFloat, float> {
  using Bits = VectorOf<float>::bits;
  using HalfBits = VectorOf<float>::half_bits;
  static Vec<float> load(const BrainFloat* p) {
    HalfBits half;
    std::memcpy(&half, p, sizeof half);
    const Bits bits = __builtin_convertvector(half, Bits) << 16;
    Vec<float> v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
  static void store(BrainFloat* p, Vec<float> v) {
    Bits bits;
    std::memcpy(&bits, &v, sizeof v);
    Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const Bits is_nan = Bits(v != v);
    rounded = (rounded & ~is_nan) | (is_nan & 0x7fc0u);
    const HalfBits half = __builtin_convertvector(rounded, HalfBits);
    std::memcpy(p, &half, sizeof half);
  }
};

#if LIGHTNING_BLN_PART == 0
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

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
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return (Vec<A>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
#endif
  T padded[kLanes<A>] = {};
  std::memcpy(static_cast<void*>(padded), p, count * sizeof(T));
  return Memory<T, A>::load(padded);
}

// The first `count` of fewer than 2 * Width lanes.
template <int Width, class T>
inline void store_lanes(T* p, const T* lanes, int count) {
  if (count & Width) {
    std::memcpy(static_cast<void*>(p), lanes, Width * sizeof(T));
    p += Width;
    lanes += Width;
  }
  if constexpr (Width > 1) store_lanes<Width / 2>(p, lanes, count);
}
template <class T, class A>
inline void store_part(T* p, Vec<A> v, int count) {
  T lanes[kLanes<A>];
  Memory<T, A>::store(lanes, v);
  store_lanes<kLanes<A> / 2>(p, lanes, count);
}

// ------------------------------------------------------------------------------------------------ memory and tasks

// Memory of one thread or call, kept for the next one: fresh pages cost more than the arithmetic on small inputs.
class Scratch {
 public:
  template <class A>
  A* take(int64_t count) {
    // Arrays of one size should not lie a multiple of a page apart: their like values would share a set of the first cache.
    const size_t bytes = (size_t(count) * sizeof(A) + kLine - 1) / kLine * kLine + 5 * kLine;
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

// f(begin, context) for parts of [0, threads), by PyTorch's threads: the calling one has that which begins at 0, and waits
// for no other part before. In part 0 of the file.
void in_parallel(int64_t threads, void (*f)(int64_t, void*), void* context);
int64_t thread_count();

// A moment within a loop that waits for another thread, the i-th of it: long waits leave the core to others.
inline void wait_a_little(int64_t i) {
#if defined(__unix__) || defined(__APPLE__)
  if (i > 1000) sched_yield();
#endif
#if defined(__SSE2__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads that work on one call.
//
// They are woken once for all its jobs, since waking a thread takes some tens of microseconds, more than a job on a small
// input. One that comes late, or shares its core, finds what the others have left: each begins with a task of its own, for
// which its caches may hold something, if nobody else has begun it, and takes the next one that is left then. Nobody waits
// for a task that no thread works on, so that any number of threads, one too, finishes any job.
class Crew {
 public:
  // body(), which may run jobs, while up to `threads` - 1 other threads wait for them. Once for a crew.
  template <class F>
  void together(int64_t threads, const F& body) {
    if (threads == 1) return body();
    auto part = [&](int64_t i) {
      if (i > 0) return follow(i);
      const Ending ending{*this};
      body();
    };
    using Part = decltype(part);
    size_ = threads;
    in_parallel(threads, [](int64_t begin, void* part) { (*static_cast<Part*>(part))(begin); }, &part);
  }

  // A job: f(task) for each.
  template <class F>
  void run(int64_t tasks, const F& f) {
    auto one = [](int64_t t, const void* f) {
      const Clean clean;
      (*static_cast<const F*>(f))(t);
      finish_past_caches();
    };
    if (size_ == 1 || tasks == 1 || posted_ == kJobs) {
      for (int64_t t = 0; t < tasks; ++t) one(t, &f);
    } else {
      lead(tasks, one, &f);
    }
  }

 private:
  struct Job {
    int64_t tasks;
    void (*one)(int64_t, const void*);
    const void* f;
    std::vector<std::atomic<bool>> begun;  // task i of these is thread i's own
    std::atomic<int64_t> next, done = 0;   // next: of the others
    std::atomic<bool> failed = false;
    std::exception_ptr error;
  };
  static constexpr int64_t kJobs = 6;  // no call has more than 5; the calling thread would do further ones alone

  std::array<Job, kJobs> jobs_;  // each for one job: a thread may look at it late
  std::atomic<int64_t> posted_ = 0;
  std::atomic<bool> ended_ = false;
  int64_t size_ = 1;

  struct Clean {
    ~Clean() { task_scratch.reset(); }
  };
  struct Ending {
    Crew& crew;
    ~Ending() { crew.ended_.store(true, std::memory_order_release); }
  };

  void lead(int64_t tasks, void (*one)(int64_t, const void*), const void* f) {
    const int64_t k = posted_.load(std::memory_order_relaxed);
    Job& job = jobs_[k];
    job.tasks = tasks;
    job.one = one;
    job.f = f;
    job.begun = std::vector<std::atomic<bool>>(std::min(tasks, size_));
    job.next = int64_t(job.begun.size());
    posted_.store(k + 1, std::memory_order_release);
    take_part(job, 0);
    for (int64_t i = 0; job.done.load(std::memory_order_acquire) < tasks; ++i) wait_a_little(i);
    if (job.failed) std::rethrow_exception(job.error);
  }

  void follow(int64_t i) {
    for (int64_t k = 0;; ++k) {
      for (int64_t j = 0; posted_.load(std::memory_order_acquire) <= k; ++j) {
        if (ended_.load(std::memory_order_acquire)) return;
        wait_a_little(j);
      }
      take_part(jobs_[k], i);
    }
  }

  static void take_part(Job& job, int64_t i) {
    const int64_t own = int64_t(job.begun.size());
    if (i < own) take_own(job, i);
    for (int64_t t = job.next++; t < job.tasks; t = job.next++) take(job, t);
    for (int64_t t = 0; t < own; ++t) take_own(job, t);
  }
  static void take_own(Job& job, int64_t t) {
    if (!job.begun[t].exchange(true)) take(job, t);
  }
  static void take(Job& job, int64_t t) {
    try {
      job.one(t, job.f);
    } catch (...) {
      if (!job.failed.exchange(true)) job.error = std::current_exception();
    }
    job.done.fetch_add(1, std::memory_order_acq_rel);
  }
};

// Where nothing that tasks find has to be brought together: each block a task, or several of some samples each, at least
// four for each of `threads`.
template <class P>
void share_out(P& plan, int64_t samples, int64_t threads) {
  plan.parts_b = plan.blocks;
  plan.parts_n = std::min(samples, ceil_div(4 * threads, plan.blocks));
}

// Bytes of the caches that a core can use. The kernel's files come first: of some processors sysconf adds up the last
// caches of all groups of cores.
struct Caches {
  int64_t second, third;
  Caches() : second(512 << 10), third(8 << 20) {
#if defined(__linux__)
    if (const int64_t size = listed(2); size > 0) second = std::max<int64_t>(size, 256 << 10);
    if (const int64_t size = listed(3); size > 0) third = size;
#endif
#if defined(LIGHTNING_BLN_LAST_CACHE)  // of tests, for which small results are large
    third = LIGHTNING_BLN_LAST_CACHE;
#endif
  }

 private:
#if defined(__linux__)
  static int64_t listed(int level) {
    char name[64];
    std::snprintf(name, sizeof(name), "/sys/devices/system/cpu/cpu0/cache/index%d/size", level);
    long long kibibytes = 0;
    char unit = 0;
    if (FILE* file = std::fopen(name, "r")) {
      const bool read = std::fscanf(file, "%lld%c", &kibibytes, &unit) == 2;
      std::fclose(file);
      if (read && unit == 'K') return int64_t(kibibytes) << 10;
    }
#if defined(_SC_LEVEL2_CACHE_SIZE) && defined(_SC_LEVEL3_CACHE_SIZE)  // not in every C library
    return sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
#else
    return 0;
#endif
  }
#endif
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

// How rows of a tensor lie in memory and packed, in values.
struct RowShape {
  int64_t rows, count, memory_stride, slab_stride;
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

template <class T, class A>
void load_rows(const char* from, const RowShape& shape, A* to) {
  const RowShape s = shape;
  constexpr int L = kLanes<A>;
  const T* row = reinterpret_cast<const T*>(from);
  for (int64_t r = 0; r < s.rows; ++r, row += s.memory_stride, to += s.slab_stride) {
    each_vector<L>(
        s.count,
        [&](int64_t i) {
          // Rows or samples are far apart: hardware does not see the next ones coming.
          __builtin_prefetch(row + i + s.ahead);
          put<A>(to + i, Memory<T, A>::load(row + i));
        },
        [&](int64_t i, int n) { put<A>(to + i, load_part<T, A>(row + i, n)); });
  }
}

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

// Mean and squared deviations of `count` values, brought together with those of others (Chan, Golub and LeVeque 1979).
template <class A>
struct Moments {
  A count = 0, mean = 0, squares = 0;
  void merge(A other_count, A other_mean, A other_squares) {
    if (other_count == 0) return;
    if (count == 0) {  // below, a mean whose square overflows would be inf * 0
      *this = {other_count, other_mean, other_squares};
      return;
    }
    const A total = count + other_count, delta = other_mean - mean;
    mean += delta * (other_count / total);
    squares += other_squares + delta * delta * (count * (other_count / total));
    count = total;
  }
};

template <class A>
struct Problem {
  int64_t N, C, P;
  int64_t sn, sc, sp;  // element strides of x, y and their gradients
  bool per_channel, same_type, is_bfloat16;  // same_type: x is of type A
  bool past_caches = false;     // results are stored so, see put
  A eps, w_f, w_b, scale;  // scale = 1 / sqrt(C)
  double exact_w_b;
  const char* x = nullptr;
  const char* g = nullptr;
  char* out = nullptr;
  Rows<A> rows;
  const A* W = nullptr;             // weight * scale, padded with zeros to whole vectors, and one zero at least
  const double* exact_W = nullptr;  // not rounded, for values of which there are few
  const A* bias = nullptr;          // as W
  Side<A> batch, feature;
  A* grad_weight = nullptr;
  A* grad_bias = nullptr;
  int64_t batch_count() const { return per_channel ? N * P : N; }

  // Whether the last cache cannot hold the results beside the input.
  bool beyond_caches() const { return 2 * N * C * P * int64_t(sizeof(A)) > caches().third; }

  // Where results go. Those beyond the caches would be gone from there before they are read; all vectors of them must lie
  // at multiples of their size.
  void set_out(void* to) {
    out = static_cast<char*>(to);
    const int64_t row = sc == 1 ? (P == 1 ? C : sp) : sc;
    const bool whole = (sc == 1 ? C : P) % kLanes<A> == 0 && row % kLanes<A> == 0 && sn % kLanes<A> == 0;
    const bool aligned = reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0;
    past_caches = same_type && whole && aligned && beyond_caches();
  }

  // Room for own statistics that the backward pass has to take again.
  void take_own_batch(int64_t si, int64_t sp) {
    const int64_t count = C * (per_channel ? 1 : P);
    batch.own_mean = call_scratch.take<A>(count);
    batch.own_var = call_scratch.take<A>(count);
    batch.si = si;
    batch.sp = per_channel ? 0 : sp;
  }
  void take_own_feature() {
    feature.own_mean = call_scratch.take<A>(N * P);
    feature.own_var = call_scratch.take<A>(N * P);
    feature.si = P;
    feature.sp = 1;
  }

  // Own statistics per channel, from each task's moments.
  void store_channels(const std::vector<std::vector<Moments<double>>>& parts) const {
    for (int64_t c = 0; c < C; ++c) {
      Moments<double> total;
      for (const auto& part : parts) total.merge(part[c].count, part[c].mean, part[c].squares);
      if (batch.own_mean) batch.own_mean[c * batch.si] = A(total.mean);
      if (batch.own_var) batch.own_var[c * batch.si] = A(total.squares / total.count);
    }
  }

  // The parameters' gradients, from each task's sums for the weight and, C places on, for the bias.
  void finish_gradients(const std::vector<std::vector<double>>& parts) const {
    for (int64_t c = 0; c < C; ++c) {
      double of_weight = 0, of_bias = 0;
      for (const auto& part : parts) {
        of_weight += part[c];
        of_bias += part[C + c];
      }
      grad_weight[c] = A(of_weight * double(scale));
      grad_bias[c] = A(of_bias);
    }
  }
};

template <class A>
BLN_VECTORIZE void add_all(A* to, const A* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// The sum of two, rounded, and what rounding took off, exactly (Knuth); nothing of a sum that is not finite.
template <class A>
inline std::pair<Vec<A>, Vec<A>> exact_sum(Vec<A> a, Vec<A> b) {
  const Vec<A> sum = a + b, added = sum - a;
  return {sum, finite<A>((a - (sum - added)) + (b - added))};
}

// Whole vectors, where what the sums lose to rounding is gathered in `rest`.
template <class A>
inline void add_all(A* to, A* rest, const A* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const auto [sum, lost] = exact_sum<A>(get<A>(to + i), get<A>(from + i));
    put<A>(to + i, sum);
    put<A>(rest + i, get<A>(rest + i) + lost);
  }
}

// factor / sqrt(var + eps); the two may be one array.
template <class A>
BLN_VECTORIZE void to_rstd(const A* var, A* rstd, int64_t count, A eps, A factor = A(1)) {
  for (int64_t i = 0; i < count; ++i) rstd[i] = factor / std::sqrt(var[i] + eps);
}

// The same, rounded once.
template <class A>
BLN_VECTORIZE void to_scale(const A* var, A* scale, int64_t count, double eps, double factor) {
  for (int64_t i = 0; i < count; ++i) scale[i] = A(factor / std::sqrt(double(var[i]) + eps));
}
// Of var + rest.
template <class A>
BLN_VECTORIZE void to_scale(const A* var, const A* rest, A* scale, int64_t count, double eps, double factor) {
  for (int64_t i = 0; i < count; ++i) scale[i] = A(factor / std::sqrt(double(var[i]) + double(rest[i]) + eps));
}

// Samples whose sums are taken before they are added to those of others, so that no sum has many terms of its own size.
constexpr int64_t kPart = 32;

// Means to values near them that have no finer digits than values a few deviations away, so that those less these are
// exact; what is left of mean + rest, times -scale, goes to `offset`.
template <class A>
BLN_VECTORIZE void to_coarse(A* mean, const A* rest, const A* scale, A* offset, int64_t count, A factor) {
  for (int64_t i = 0; i < count; ++i) {
    // A scale of 0 is that of an infinite variance, or weight 0.
    const A far = scale[i] != A(0) ? A(4) * (factor / scale[i]) : A(0), coarse = (mean[i] + far) - far;
    offset[i] = ((coarse - mean[i]) - rest[i]) * scale[i];
    mean[i] = coarse;
  }
}

// Moments for each key over the samples so far, kept around a value near their mean: Chan's update by a few at a time.
template <class A>
struct RunningMoments {
  using V = Vec<A>;
  A *shift, *mean;
  A* squares;  // of the samples since the last flush
  A *total = nullptr, *rest = nullptr;  // of those before, and what rounding took off it; null where nothing is flushed
  int64_t count = 0;
  A share = 0, weight = 0;

  void restart() { count = 0; }
  void flush(int64_t first, int64_t keys) {
    add_all(total + first, rest + first, squares + first, keys);
    std::fill(squares + first, squares + first + keys, A(0));
  }
  // N values are about to be added at each key.
  void begin(int n) {
    share = A(n) / A(count + n);
    weight = A(count) * share;
    count += n;
  }
  template <int N>
  void add(int64_t k, const V* values) {
    const V s = get<A>(shift + k), old = get<A>(mean + k);
    V d[N], sum{}, spread{};
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) sum += d[u] = values[u] - s;
    const V m = sum * A(1.0 / N);
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) spread += (d[u] - m) * (d[u] - m);
    const V delta = m - old;
    put<A>(mean + k, old + delta * share);
    put<A>(squares + k, get<A>(squares + k) + (spread + delta * delta * weight));
  }
};

// Nothing of it.
template <class A>
struct NoMoments {
  void begin(int) {}
  template <int N>
  void add(int64_t, const Vec<A>*) {}
};

// ----------------------------------------------------------------------------------------------------- slab passes

// Everything the passes know about one block of positions: [first, first + width) and how a slab of it is laid out.
template <class A>
struct Block {
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;
  static constexpr int64_t kShort = 8, kNear = 4;  // vectors of a row
  // Vectors of features, and samples, whose sums over the samples stay in registers. float64 is not worth more code.
  static constexpr int kColumns = std::is_same_v<A, double> ? 1 : kVectorBytes == 64 ? 4 : 2;
  static constexpr int64_t kGroup = 16;
  static_assert(kGroup % L == 0);

  const Problem<A>& p;
  int64_t first, width;
  int64_t padded;   // C rounded up to whole vectors
  int64_t slab;     // from one sample's slab to the next
  int64_t key_row;  // keys from one row to the next; 0 where all rows share them
  int64_t keys;     // batch statistics of a block

  Block(const Problem<A>& problem, int64_t first_, int64_t width_) : p(problem), first(first_), width(width_) {
    padded = ceil_div(p.C, L) * L;
    slab = in_place() ? p.sn : width * padded;
    key_row = p.per_channel ? 0 : padded;
    keys = p.per_channel ? padded : width * padded;
  }

  // Whether x lies in memory as in slabs.
  bool in_place() const { return p.same_type && (p.sp == p.C || p.P == 1) && p.C == padded; }

  // --- moving data

  // Of the block's first value of sample n, in x and in the output.
  int64_t offset(int64_t n) const { return n * p.sn + first * p.sp; }

  // n slabs from sample n0: where they lie, or packed into `room`.
  A* read(const char* from, int64_t n0, int64_t n, A* room) const {
    if (in_place()) return const_cast<A*>(reinterpret_cast<const A*>(from)) + offset(n0);
    const RowShape shape = row_shape();
    for (int64_t i = 0; i < n; ++i) p.rows.load(from + offset(n0 + i) * p.rows.size, shape, room + i * slab);
    return room;
  }

  // The other way: to the output.
  void unpack(const A* slabs, int64_t n0, int64_t n) const {
    const RowShape shape = row_shape();
    for (int64_t i = 0; i < n; ++i) p.rows.store(slabs + i * slab, shape, p.out + offset(n0 + i) * p.rows.size);
  }

  // Whether results can go straight to the output: same type, whole vectors.
  bool direct() const { return p.same_type && p.C == padded; }

  // Where results go: rows of sample i at base + i * n + row * stride.
  struct Target {
    A* base;
    int64_t n, row;
  };
  Target target(A* slabs, int64_t n0) const {
    if (direct()) return {reinterpret_cast<A*>(p.out) + offset(n0), p.sn, p.sp};
    return {slabs, slab, padded};
  }

  // --- the statistics

  // Means and biased variances over the features of n slabs, and, into `batch`, what it takes of the values at each key.
  template <class Batch>
  void moments(const A* x, int64_t n, Batch& batch, A* mean_f, A* var_f) const {
    each_group(n, [&](auto count, int64_t i) {
      if (key_row) batch.begin(count);
      // So few rows at a time that the first cache holds them for the second pass.
      for (int64_t r = 0; r < width; r += L) {
        moments_some<count>(x + i * slab, batch, {r, std::min(r + L, width)}, mean_f + i * width, var_f + i * width);
      }
    });
  }

  // --- the two results

  // y of n slabs, with the normalisation's terms for each key (mean_b, scale_b) and each feature statistic
  // (mean_f, rstd_f), the latter `width` apart from slab to slab.
  void normalise(const A* x, const Target& out, int64_t n, const A* mean_b, const A* scale_b, const A* mean_f, const A* rstd_f) const {
    each_group(n, [&](auto count, int64_t i) {
      normalise_some<count>(x + i * slab, {out.base + i * out.n, out.n, out.row}, mean_b, scale_b, mean_f + i * width, rstd_f + i * width);
    });
  }

  // What the gradient of a slab's feature part is made of; arrays of `width` values a slab. With G = g * W * w_f:
  struct FeatureTerms {
    A *center, *rstd, *offset;  // offset = rstd * (center - used mean)
    A *sum, *sum_deviation;     // sums over c of G and of G * (x - center)
    FeatureTerms at(int64_t i) const { return {center + i, rstd + i, offset + i, sum + i, sum_deviation + i}; }
  };

  // Sums over the slabs for each key: of g, g * (x - center), g * normalised feature part, and two of x alone.
  struct BatchSums {
    A *g, *gd, *gf, *d;  // d: of x - center, what rounding left in the center
    A* square;           // of (x - center)^2; null where it is not wanted

    std::array<A*, 5> all() const { return {g, gd, gf, d, square}; }
    BatchSums at(int64_t k) const { return {g + k, gd + k, gf + k, d + k, square ? square + k : nullptr}; }
    void add(const BatchSums& other, int64_t keys) const {
      const auto totals = all(), parts = other.all();
      for (size_t i = 0; i < parts.size(); ++i) {
        if (parts[i]) add_all(totals[i], parts[i], keys);
      }
    }
  };

  // The reductions of the backward pass: sets the slabs' feature sums, adds to the sums for each key.
  void reduce(const A* x, const A* g, int64_t n, const A* center_b, const BatchSums& sums, const FeatureTerms& f) const {
    each_part(n, [&](int64_t r, int64_t n0, int64_t count) {
      RowSums of;
      const FeatureTerms terms = f.at(n0 * width + r);
      const int64_t at = n0 * slab + r * padded, key = r * key_row;
      each_columns([&](auto columns, int64_t c) {
        reduce_some<columns>(x + at + c, g + at + c, count, center_b + key + c, p.W + c, sums.at(key + c), terms, of, c == 0);
      });
      of.each(count, [&](int64_t i, V sum, V deviation) {
        put_column(terms.sum, i, sum * p.w_f, count);
        put_column(terms.sum_deviation, i, deviation * p.w_f, count);
      });
    });
  }

  // The gradient's terms for each key: dx = g * (scale + rstd_f * W * w_f) - (x - center) * slope - offset - ...
  struct BatchTerms {
    A *center, *scale, *slope, *offset;
  };

  // dx of n slabs. Of f: center and rstd, sum and sum_deviation turned into what is taken off by `finish_features`.
  void differentiate(const A* x, const A* g, const Target& out, int64_t n, const BatchTerms& b, const FeatureTerms& f) const {
    each_group(n, [&](auto count, int64_t i) {
      differentiate_some<count>(x + i * slab, g + i * slab, {out.base + i * out.n, out.n, out.row}, b, f, i * width);
    });
  }

 private:
  // f(slabs at once, first of them): by fours, so that what belongs to keys is read once for them all.
  template <class F>
  void each_group(int64_t n, const F& f) const {
    constexpr int U = std::is_same_v<A, double> ? 1 : 4;  // float64 is not worth more code
    int64_t i = 0;
    for (; i + U <= n; i += U) f(std::integral_constant<int, U>(), i);
    for (; U > 1 && i < n; ++i) f(std::integral_constant<int, 1>(), i);
  }

  RowShape row_shape() const {
    if (p.sp == p.C && p.C == padded) return {1, width * p.C, 0, 0, p.sn};
    return {width, p.C, p.sp, padded, p.sn};
  }

  static void add_to(A* total, V v) { put<A>(total, get<A>(total) + v); }

  // f(row, first sample, samples): so few samples that no sum over them has many terms of its own size, and that the
  // first cache holds one row of theirs.
  template <class F>
  void each_part(int64_t n, const F& f) const {
    for (int64_t n0 = 0; n0 < n; n0 += kGroup) {
      for (int64_t r = 0; r < width; ++r) f(r, n0, std::min(kGroup, n - n0));
    }
  }

  // f(vectors, first feature): the vectors of a row, some at a time; one that is not whole alone.
  template <int K = kColumns, class F>
  void each_columns(const F& f, int64_t c = 0) const {
    for (; c + K * L <= p.C; c += K * L) f(std::integral_constant<int, K>(), c);
    if constexpr (K > 1) {
      each_columns<K / 2>(f, c);
    } else if (c < p.C) {
      f(std::integral_constant<int, 1>(), c);
    }
  }

  // Two sums over a row for each sample of a part, lane by lane.
  struct RowSums {
    V first[kGroup], second[kGroup];

    // f(sample, their sums over the lanes): as many samples as lanes at once.
    template <class F>
    void each(int64_t count, const F& f) {
      for (int64_t i = 0; i < count; i += L) {
        for (int64_t j = count; j < i + L; ++j) first[j] = second[j] = V{};
        f(i, sum_each<A>(first + i), sum_each<A>(second + i));
      }
    }
  };

  // One value of each sample from i on, of `count`, into an array of `width` values a slab.
  void put_column(A* to, int64_t i, V v, int64_t count) const {
    if (width == 1 && i + L <= count) return put<A>(to + i, v);
    A lanes[L];
    put<A>(lanes, v);
    to += i * width;
    for (int64_t j = 0; j < std::min<int64_t>(L, count - i); ++j, to += width) *to = lanes[j];
  }

  // Sums over the first features of each of at most kLanes rows, `Sums` of them, of what `term(row, c, terms)` gives for U
  // slabs, after begin(row); lanes beyond those features count nothing. Then done(slab, sums): a vector holds one sum of
  // all rows.
  // Always inlined: what the functions refer to would be read from memory for every vector else.
  template <int U, int Sums, class Begin, class Term, class Done>
  __attribute__((always_inline)) void row_sums(const Range& range, int64_t features, const Begin& begin, const Term& term, const Done& done) const {
    const int64_t whole = features / L * L, first = range.begin;
    const int rows = int(range.size()), tail = int(features - whole);
    V sums[U][Sums][L];
    for (int u = 0; u < U; ++u) {
      for (int s = 0; s < Sums; ++s) {
        for (int i = rows; i < L; ++i) sums[u][s][i] = V{};
      }
    }
    for (int i = 0; i < rows; ++i) {
      V acc[U][Sums] = {};
      begin(first + i);
      for (int64_t c = 0; c < whole; c += L) {
        V terms[U][Sums];
        term(first + i, c, terms);
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) {
#pragma GCC unroll 8
          for (int s = 0; s < Sums; ++s) acc[u][s] += terms[u][s];
        }
      }
      if (tail) {
        V terms[U][Sums];
        term(first + i, whole, terms);
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) {
#pragma GCC unroll 8
          for (int s = 0; s < Sums; ++s) acc[u][s] += only<A>(terms[u][s], tail);
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
      done(u, totals);
    }
  }

  static void put_rows(A* to, V v, const Range& rows) {
    if (rows.size() == L) return put<A>(to, v);
    store_part<A, A>(to, v, int(rows.size()));
  }

  // In the passes below, sizes and pointers are copied to local variables first: stores through A* could otherwise be
  // taken to change the members, which would be read again for every vector.

  template <int U, class Batch>
  void moments_some(const A* x, Batch& batch, const Range& rows, A* mean_f, A* var_f) const {
    const int64_t slab = this->slab, padded = this->padded, width = this->width, key_row = this->key_row;
    // Short rows around their mean, others around that of some features, in vectors spread over the row: the first ones
    // alone may be of another kind. Those means are taken around the first feature, so that they are rounded once.
    const int64_t vectors = p.C / L, apart = vectors <= kShort ? 1 : vectors / kNear, near = vectors <= kShort ? p.C : kNear * L;
    const A inverse = A(1) / A(p.C), inverse_near = A(1) / A(near);
    A shifts[U][L] = {};
    V shift[U];
    row_sums<U, 1>(
        rows, near,
        [&](int64_t r) {
#pragma GCC unroll 8
          for (int u = 0; u < U; ++u) shift[u] = splat<A>(shifts[u][r - rows.begin] = x[u * slab + r * padded]);
        },
        [&](int64_t r, int64_t c, V(&terms)[U][1]) __attribute__((always_inline)) {
#pragma GCC unroll 8
          for (int u = 0; u < U; ++u) terms[u][0] = get<A>(x + u * slab + r * padded + c * apart) - shift[u];
        },
        [&](int u, V(&sums)[1]) { put<A>(shifts[u], get<A>(shifts[u]) + sums[0] * inverse_near); });
    auto begin = [&](int64_t r) {
      if (!key_row) batch.begin(U);
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) shift[u] = splat<A>(shifts[u][r - rows.begin]);
    };
    auto values_at = [&](int64_t r, int64_t c, V(&values)[U]) __attribute__((always_inline)) {
      const A* at = x + r * padded + c;
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        __builtin_prefetch(at + (u + U) * slab);
        values[u] = get<A>(at + u * slab);
      }
      batch.template add<U>(r * key_row + c, values);
    };
    auto store = [&](int u, V mean, V var) {
      put_rows(mean_f + u * width + rows.begin, mean, rows);
      put_rows(var_f + u * width + rows.begin, var, rows);
    };
    if (vectors <= kShort) {
      return row_sums<U, 1>(
          rows, p.C, begin,
          [&](int64_t r, int64_t c, V(&terms)[U][1]) __attribute__((always_inline)) {
            V values[U];
            values_at(r, c, values);
#pragma GCC unroll 8
            for (int u = 0; u < U; ++u) terms[u][0] = (values[u] - shift[u]) * (values[u] - shift[u]);
          },
          [&](int u, V(&sums)[1]) { store(u, get<A>(shifts[u]), sums[0] * inverse); });
    }
    row_sums<U, 2>(
        rows, p.C, begin,
        [&](int64_t r, int64_t c, V(&terms)[U][2]) __attribute__((always_inline)) {
          V values[U];
          values_at(r, c, values);
#pragma GCC unroll 8
          for (int u = 0; u < U; ++u) {
            terms[u][0] = values[u] - shift[u];
            terms[u][1] = terms[u][0] * terms[u][0];
          }
        },
        [&](int u, V(&sums)[2]) {
          const auto [mean, var] = mean_and_variance<A>(get<A>(shifts[u]), sums[0], sums[1], inverse);
          store(u, mean, var);
        });
  }

  template <int U>
  void normalise_some(const A* x, const Target out, const A* mean_b, const A* scale_b, const A* mean_f, const A* rstd_f) const {
    const int64_t slab = this->slab, padded = this->padded, width = this->width;
    const A *W_all = p.W, *bias_all = p.bias;
    const bool past_caches = p.past_caches;
    for (int64_t r = 0; r < width; ++r) {
      const A *keys_mean = mean_b + r * key_row, *keys_scale = scale_b + r * key_row, *row = x + r * padded;
      A* to = out.base + r * out.row;
      V mf[U], rf[U];
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        mf[u] = splat<A>(mean_f[u * width + r]);
        rf[u] = splat<A>(rstd_f[u * width + r] * p.w_f);
      }
      for (int64_t c = 0; c < padded; c += L) {
        const V mb = get<A>(keys_mean + c), sb = get<A>(keys_scale + c), W = get<A>(W_all + c), bias = get<A>(bias_all + c);
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) {
          const V value = get<A>(row + u * slab + c);
          const V y = (value - mb) * sb + ((value - mf[u]) * rf[u] * W + bias);
          put<A>(to + u * out.n + c, y, past_caches);
        }
      }
    }
  }

  template <int K>
  void reduce_some(const A* x, const A* g, int64_t count, const A* center_b, const A* weight, const BatchSums sums, const FeatureTerms f, RowSums& of,
                   bool begins) const {
    const int64_t slab = this->slab, padded = this->padded, width = this->width;
    V cb[K], W[K], sg[K] = {}, sgd[K] = {}, sgf[K] = {}, sd[K] = {}, sq[K] = {};
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      cb[k] = get<A>(center_b + k * L);
      W[k] = get<A>(weight + k * L);
    }
    const A *center = f.center, *rstd = f.rstd, *offset = f.offset;
    for (int64_t i = 0; i < count; ++i, x += slab, g += slab, center += width, rstd += width, offset += width) {
      const V cf = splat<A>(*center), rf = splat<A>(*rstd), off = splat<A>(*offset);
      V sum = begins ? V{} : of.first[i], deviation = begins ? V{} : of.second[i];
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        __builtin_prefetch(x + k * L + padded);  // the next row
        __builtin_prefetch(g + k * L + padded);
        const V xv = get<A>(x + k * L), gv = get<A>(g + k * L), d = xv - cf, gw = gv * W[k], db = xv - cb[k];
        sum += gw;
        deviation += gw * d;
        sg[k] += gv;
        sgd[k] += gv * db;
        sd[k] += db;
        sq[k] += db * db;
        sgf[k] += gv * (d * rf + off);
      }
      of.first[i] = sum;
      of.second[i] = deviation;
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      add_to(sums.g + k * L, sg[k]);
      add_to(sums.gd + k * L, sgd[k]);
      add_to(sums.gf + k * L, sgf[k]);
      add_to(sums.d + k * L, sd[k]);
      if (sums.square) add_to(sums.square + k * L, sq[k]);
    }
  }

  template <int U>
  void differentiate_some(const A* x, const A* g, const Target out, const BatchTerms b, const FeatureTerms f, int64_t f0) const {
    const int64_t slab = this->slab, padded = this->padded, width = this->width, key_row = this->key_row;
    const A* W_all = p.W;
    const A w_f = p.w_f;
    const bool past_caches = p.past_caches;
    for (int64_t r = 0; r < width; ++r) {
      const int64_t key = r * key_row;
      A* to = out.base + r * out.row;
      V cf[U], rf[U], base[U], slope[U];
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        const int64_t at = f0 + u * width + r;
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
          const V dx = gv * (sb + rf[u] * W) - (xv - cb) * eb - (xv - cf[u]) * slope[u] - (ob + base[u]);
          put<A>(to + u * out.n + c, dx, past_caches);
        }
      }
    }
  }
};

// --------------------------------------------------------------------------------------------------------- engines

struct Plan {
  bool fused;
  int64_t width, blocks;            // positions of a block
  int64_t threads;                  // that there is work for
  int64_t tasks, parts_n, parts_b;  // tasks = parts_n * parts_b: ranges of samples and of blocks
  int64_t chunk;                    // split: samples that are packed and worked on together
};

template <class A>
class Inside {
  using V = Vec<A>;
  using B = Block<A>;
  static constexpr int L = kLanes<A>;
  static constexpr int64_t kRows = 1024;  // rows whose moments are taken, per channel, before they are merged with others

 public:
  explicit Inside(Problem<A>& problem) : p(problem) {}

  void forward() {
    const bool reduces = p.batch.own();
    const Plan plan = choose(reduces && !p.per_channel, reduces, 1);
    crew.together(plan.threads, [&] {
      if (plan.fused) return each_fused_block(plan, [&](const B& b, int64_t) { forward_block(b); });
      if (reduces) {
        take_statistics(plan, true, p.feature.own());
        p.batch.known = p.feature.known = true;
      }
      normalise(plan);
    });
  }

  void backward() {
    const Plan plan = choose(!p.per_channel, true, 2);
    // Only the fused plan finds a variance on the way.
    if (!plan.fused && p.batch.var_unknown) p.batch.known = p.batch.var_unknown = false;
    const bool missing_b = p.batch.own() && !p.batch.known, missing_f = p.feature.own() && !p.feature.known;
    std::vector<std::vector<double>> grads(plan.tasks, std::vector<double>(2 * p.C, 0.0));
    if (!plan.fused && missing_f) p.take_own_feature();
    if (!plan.fused && missing_b) p.take_own_batch(1, p.C);
    crew.together(plan.threads, [&] {
      if (plan.fused) {
        return each_fused_block(plan, [&](const B& b, int64_t t) { backward_block(b, missing_b, missing_f, grads[t].data()); });
      }
      if (missing_b || missing_f) take_statistics(plan, missing_b, missing_f);
      p.batch.known = p.feature.known = true;
      backward_split(plan, grads);
    });
    p.finish_gradients(grads);
  }

 private:
  Problem<A>& p;
  mutable Crew crew;

  B block(const Plan& plan, int64_t i) const {
    const int64_t first = i * plan.width;
    return B(p, first, std::min(plan.width, p.P - first));
  }

  // f(block, task) for every block, one task's after the other.
  template <class F>
  void each_fused_block(const Plan& plan, const F& f) const {
    crew.run(plan.tasks, [&](int64_t t) {
      const Range blocks = part_of(plan.blocks, plan.tasks, t);
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        task_scratch.reset();
        f(block(plan, b), t);
      }
    });
  }

  // reduces: sums over samples are needed. inputs: 1 forward, 2 backward.
  Plan choose(bool may_fuse, bool reduces, int64_t inputs) const {
    Plan plan;
    plan.chunk = reduces ? 8 : 4;
    const int64_t threads = std::max<int64_t>(1, thread_count());
    const int64_t tasks = std::clamp<int64_t>(p.N * p.C * p.P / 65536, 1, threads);
    const int64_t row = ceil_div(p.C, L) * L, row_bytes = p.N * row * int64_t(sizeof(A)) * inputs;
    const int64_t limit = std::max<int64_t>(caches().second, std::min<int64_t>(caches().third / (2 * threads), 8 << 20));
    plan.fused = may_fuse && p.P >= tasks && row_bytes <= limit;
    if (plan.fused) {
      plan.width = std::clamp<int64_t>(caches().second * 3 / 8 / row_bytes, 1, std::max<int64_t>(1, 4096 / row));
      plan.width = ceil_div(p.P, ceil_div(ceil_div(p.P, plan.width), tasks) * tasks);
    } else {
      plan.width = std::clamp<int64_t>(4096 / row, 1, p.P);
    }
    plan.blocks = ceil_div(p.P, plan.width);
    plan.parts_n = plan.fused ? 1 : std::min(tasks, p.N);
    plan.parts_b = std::clamp<int64_t>(tasks / plan.parts_n, 1, plan.blocks);
    if (!reduces && tasks > 1) share_out(plan, p.N, tasks);
    plan.threads = tasks;
    plan.tasks = plan.parts_n * plan.parts_b;
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

  int64_t key_rows(const B& b) const { return p.per_channel ? 1 : b.width; }

  void load_keys(const B& b, const Statistic<A>& from, A* to) const {
    std::fill(to, to + b.keys, A(0));
    for (int64_t r = 0; r < key_rows(b); ++r, to += b.padded) {
      if (from.si == 1) {
        std::memcpy(to, from.data + (b.first + r) * from.sp, p.C * sizeof(A));
      } else {
        for (int64_t c = 0; c < p.C; ++c) to[c] = from.at(c, b.first + r);
      }
    }
  }

  // Where they lie, or in `room`.
  const A* read_keys(const B& b, const Statistic<A>& from, A* room) const {
    if (from.si == 1 && p.C == b.padded && (p.per_channel || p.P == 1 || from.sp == p.C)) return from.data + b.first * from.sp;
    load_keys(b, from, room);
    return room;
  }

  // W * w_b / sqrt(var + eps) for each key.
  void load_scales(const B& b, const Statistic<A>& var, A* to) const {
    const A* from = read_keys(b, var, to);
    const V eps = splat<A>(p.eps);
    for (int64_t r = 0; r < key_rows(b); ++r) {
      for (int64_t c = 0; c < b.padded; c += L, from += L, to += L) put<A>(to, get<A>(p.W + c) * p.w_b * inverse_root<A>(get<A>(from) + eps));
    }
  }

  void store_keys(const B& b, const A* from, A* to, const Side<A>& side) const {
    if (!to) return;
    for (int64_t r = 0; r < key_rows(b); ++r, from += b.padded) {
      if (side.si == 1) {
        std::memcpy(to + (b.first + r) * side.sp, from, p.C * sizeof(A));
      } else {
        for (int64_t c = 0; c < p.C; ++c) to[c * side.si + (b.first + r) * side.sp] = from[c];
      }
    }
  }

  void load_features(const B& b, const Statistic<A>& from, int64_t n0, int64_t n, A* to) const {
    for (int64_t i = n0; i < n0 + n; ++i, to += b.width) {
      if (from.sp == 1) {
        copy_row(from.data + i * from.si + b.first, b.width, to);
      } else {
        for (int64_t j = 0; j < b.width; ++j) to[j] = from.at(i, b.first + j);
      }
    }
  }

  void store_features(const B& b, const A* from, int64_t n0, int64_t n, A* to) const {
    if (!to) return;
    for (int64_t i = 0; i < n; ++i) copy_row(from + i * b.width, b.width, to + (n0 + i) * p.P + b.first);
  }

  // values[k] *= W of the key's feature * factor
  BLN_VECTORIZE void times_weight(const B& b, A* values, A factor) const {
    for (int64_t k = 0; k < b.keys; k += b.padded) {
      for (int64_t c = 0; c < b.padded; ++c) values[k + c] *= p.W[c] * factor;
    }
  }

  // ------------------------------------------------------------------------------------------------- the fused plan

  // Room for n packed slabs, if they are.
  A* take_room(const B& b, int64_t n) const { return task_scratch.take<A>(b.in_place() ? 0 : n * b.slab); }

  // Slabs [n, n + count), where those of all samples are packed at `room`, if they are. None: where the first one is.
  A* read(const B& b, const char* from, int64_t n, int64_t count, A* room) const {
    return b.read(from, n, count, b.in_place() ? nullptr : room + n * b.slab);
  }

  RunningMoments<A> take_moments(int64_t keys) const {
    A *shift = task_scratch.take<A>(keys), *mean = task_scratch.take<A>(keys), *squares = task_scratch.take<A>(keys);
    return {shift, mean, squares};
  }

  // Around the mean of the first few of n slabs.
  void start(const B& b, RunningMoments<A>& moments, const A* x, int64_t n) const {
    const int64_t near = std::min<int64_t>(4, n);
    moments.restart();
    for (int64_t k = 0; k < b.keys; k += L) {
      V total{};
      for (int64_t i = 0; i < near; ++i) total += get<A>(x + i * b.slab + k);
      put<A>(moments.shift + k, total * (A(1) / A(near)));
    }
    std::fill(moments.mean, moments.mean + b.keys, A(0));
    std::fill(moments.squares, moments.squares + b.keys, A(0));
  }

  // All slabs of a block, and the mini-batch's own statistics of it.
  A* take_block(const B& b, A* room, RunningMoments<A>& moments, A* mean_f, A* var_f) const {
    for (int64_t n = 0; n < p.N; n += 4) {
      const int64_t count = std::min<int64_t>(4, p.N - n);
      const A* x = read(b, p.x, n, count, room);
      if (n == 0) start(b, moments, x, count);
      b.moments(x, count, moments, mean_f + n * b.width, var_f + n * b.width);
    }
    const A inverse = A(1) / A(p.N);
    for (int64_t k = 0; k < b.keys; k += L) {
      put<A>(moments.mean + k, get<A>(moments.mean + k) + get<A>(moments.shift + k));
      put<A>(moments.squares + k, get<A>(moments.squares + k) * inverse);
    }
    return read(b, p.x, 0, 0, room);
  }

  void forward_block(const B& b) const {
    RunningMoments<A> moments = take_moments(b.keys);
    A *mean_b = moments.mean, *var_b = moments.squares, *mean_f = task_scratch.take<A>(p.N * b.width), *var_f = task_scratch.take<A>(p.N * b.width);
    A* x = take_block(b, take_room(b, p.N), moments, mean_f, var_f);
    store_keys(b, mean_b, p.batch.own_mean, p.batch);
    store_keys(b, var_b, p.batch.own_var, p.batch);
    store_features(b, mean_f, 0, p.N, p.feature.own_mean);
    store_features(b, var_f, 0, p.N, p.feature.own_var);
    if (p.batch.mean.data) load_keys(b, p.batch.mean, mean_b);
    if (p.batch.var.data) load_keys(b, p.batch.var, var_b);
    if (p.feature.mean.data) load_features(b, p.feature.mean, 0, p.N, mean_f);
    if (p.feature.var.data) load_features(b, p.feature.var, 0, p.N, var_f);
    to_rstd(var_b, var_b, b.keys, p.eps);
    times_weight(b, var_b, p.w_b);
    to_rstd(var_f, var_f, p.N * b.width, p.eps);
    b.normalise(x, b.target(x, 0), p.N, mean_b, var_b, mean_f, var_f);
    if (!b.direct()) b.unpack(x, 0, p.N);
  }

  // Arrays of a block for the backward pass.
  struct Terms {
    A *center, *used, *scale, *slope, *offset, *rstd;  // for each key; used: the mean that was used
    typename B::BatchSums sums;
    typename B::FeatureTerms f;
    A* used_f;
  };

  Terms take_terms(int64_t keys, int64_t features) const {
    Terms t;
    t.sums.square = nullptr;
    for (A** array : {&t.center, &t.used, &t.scale, &t.slope, &t.offset, &t.rstd, &t.sums.g, &t.sums.gd, &t.sums.gf, &t.sums.d}) {
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

  // From the centers of n slabs, and the variances that were used in f.rstd, to what `reduce` needs.
  BLN_VECTORIZE void prepare_features(const B& b, int64_t n0, int64_t n, const typename B::FeatureTerms& f, A* used) const {
    const int64_t count = n * b.width;
    to_rstd(f.rstd, f.rstd, count, p.eps);
    if (p.feature.own() && p.feature.mean.data) {
      load_features(b, p.feature.mean, n0, n, used);
      for (int64_t i = 0; i < count; ++i) f.offset[i] = f.rstd[i] * (f.center[i] - used[i]);
    } else {
      std::fill(f.offset, f.offset + count, A(0));
    }
  }

  // From the sums over features to the offset and the slope that `differentiate` takes off.
  BLN_VECTORIZE void finish_features(int64_t count, const typename B::FeatureTerms& f) const {
    const A inverse = A(1) / A(p.C);
    const A mean_own = p.feature.mean.data ? A(0) : inverse, var_own = p.feature.var.data ? A(0) : inverse;
    for (int64_t i = 0; i < count; ++i) {
      const A rstd = f.rstd[i], sum = f.sum[i];
      // sum of G * (x - used mean) = that around the center + (center - used mean) * sum of G
      const A deviation = f.sum_deviation[i] * rstd + f.offset[i] * sum;
      f.sum[i] = mean_own * rstd * sum;
      f.sum_deviation[i] = var_own * rstd * rstd * deviation;
    }
  }

  // From the sums over samples and the variance that was used, in t.rstd, to the batch terms of dx.
  void finish_keys(const B& b, Terms& t) const {
    const A inverse = A(1) / A(p.batch_count());
    const A mean_own = p.batch.mean.data ? A(0) : inverse, var_own = p.batch.var.data ? A(0) : inverse;
    // What rounding left in the center, which is the own mean: sums over many samples need it if the mean is large.
    const A residue = p.batch.own() ? inverse : A(0), residue_of_mean = p.batch.mean.data ? A(0) : residue;
    if (t.sums.square) {
      for (int64_t k = 0; k < b.keys; k += L) {
        const V d = get<A>(t.sums.d + k) * inverse;
        put<A>(t.rstd + k, get<A>(t.sums.square + k) * inverse - d * d);
      }
    }
    to_rstd(t.rstd, t.rstd, b.keys, p.eps);
    const bool other = p.batch.own() && p.batch.mean.data;
    if (other) load_keys(b, p.batch.mean, t.used);
    for (int64_t k0 = 0; k0 < b.keys; k0 += b.padded) {
      for (int64_t c = 0; c < b.padded; c += L) {
        const int64_t k = k0 + c;
        const V rstd = get<A>(t.rstd + k), g = get<A>(t.sums.g + k), d = get<A>(t.sums.d + k);
        V gd = get<A>(t.sums.gd + k);
        if (other) gd += (get<A>(t.center + k) - get<A>(t.used + k)) * g;
        gd -= residue_of_mean * d * g;
        const V scale = rstd * (get<A>(p.W + c) * p.w_b), slope = var_own * scale * rstd * rstd * gd;
        put<A>(t.sums.gd + k, gd);
        put<A>(t.scale + k, scale);
        put<A>(t.slope + k, slope);
        put<A>(t.offset + k, mean_own * scale * g - residue * d * slope);
      }
    }
  }

  // Adds a block's part of the parameters' gradients: the feature part of the weight's and, if batch_part, the rest.
  void add_gradients(const B& b, const Terms& t, bool batch_part, double* grads) const {
    for (int64_t c0 = 0; c0 < b.padded; c0 += L) {
      V weight{}, bias{};
      for (int64_t k = c0; k < b.keys; k += b.padded) {
        weight += get<A>(t.sums.gf + k) * p.w_f;
        if (!batch_part) continue;
        weight += get<A>(t.rstd + k) * get<A>(t.sums.gd + k) * p.w_b;
        bias += get<A>(t.sums.g + k);
      }
      for (int64_t i = 0; i < std::min<int64_t>(L, p.C - c0); ++i) {
        grads[c0 + i] += double(weight[i]);
        grads[p.C + c0 + i] += double(bias[i]);
      }
    }
  }

  typename B::BatchTerms batch_terms(const Terms& t) const { return {t.center, t.scale, t.slope, t.offset}; }

  void backward_block(const B& b, bool missing_b, bool missing_f, double* grads) const {
    A *room = take_room(b, p.N), *g = b.read(p.g, 0, p.N, take_room(b, p.N)), *x = nullptr;
    Terms t = take_terms(b.keys, p.N * b.width);
    if (missing_b) {
      RunningMoments<A> moments = take_moments(b.keys);
      x = take_block(b, room, moments, t.f.center, t.f.rstd);
      t.center = moments.mean;
      t.rstd = moments.squares;
    } else {
      x = b.read(p.x, 0, p.N, room);
      load_keys(b, p.batch.center(), t.center);
    }
    if (p.batch.var_unknown) {
      t.sums.square = t.rstd;
    } else if (!missing_b || p.batch.var.data) {
      load_keys(b, p.batch.used_var(), t.rstd);
    }
    NoMoments<A> none;
    if (missing_f && !missing_b) b.moments(x, p.N, none, t.f.center, t.f.rstd);
    if (!missing_f) load_features(b, p.feature.center(), 0, p.N, t.f.center);
    if (!missing_f || p.feature.var.data) load_features(b, p.feature.used_var(), 0, p.N, t.f.rstd);
    prepare_features(b, 0, p.N, t.f, t.used_f);
    clear_sums(t.sums, b.keys);
    b.reduce(x, g, p.N, t.center, t.sums, t.f);
    finish_features(p.N * b.width, t.f);
    finish_keys(b, t);
    b.differentiate(x, g, b.target(g, 0), p.N, batch_terms(t), t.f);
    if (!b.direct()) b.unpack(g, 0, p.N);
    add_gradients(b, t, true, grads);
  }

  // ------------------------------------------------------------------------------------------------- the split plan

  struct Share {
    int64_t part;  // of the samples
    Range samples, blocks;
  };

  Share share(const Plan& plan, int64_t t) const {
    // Threads have tasks next to each other at one time: of different samples, where those are in parts.
    const int64_t i = t % plan.parts_n, j = t / plan.parts_n;
    return {i, part_of(p.N, plan.parts_n, i), part_of(plan.blocks, plan.parts_b, j)};
  }

  // Where the keys of a block of per-position statistics begin among those of all blocks.
  int64_t key_offset(const B& b) const { return b.first * b.padded; }
  int64_t all_keys() const { return p.P * ceil_div(p.C, L) * L; }

  template <class Batch>
  void own_features(const B& b, const A* x, int64_t n0, int64_t n, Batch& batch, A* mean, A* var, bool wanted) const {
    b.moments(x, n, batch, mean, var);
    if (!wanted) return;
    store_features(b, mean, n0, n, p.feature.own_mean);
    store_features(b, var, n0, n, p.feature.own_var);
  }

  void take_statistics(const Plan& plan, bool with_batch, bool with_feature) const {
    const int64_t keys = all_keys();
    A *means = nullptr, *squares = nullptr;
    if (with_batch && !p.per_channel) {
      means = call_scratch.take<A>(plan.parts_n * keys);
      squares = call_scratch.take<A>(plan.parts_n * keys);
    }
    std::vector<std::vector<Moments<double>>> channels(plan.tasks, std::vector<Moments<double>>(p.per_channel ? p.C : 0));
    crew.run(plan.tasks, [&](int64_t t) {
      const Share own = share(plan, t);
      const B b0 = block(plan, own.blocks.begin);
      A* room = take_room(b0, plan.chunk);
      const int64_t rows = plan.chunk * b0.width;
      A *mean_f = task_scratch.take<A>(rows), *var_f = task_scratch.take<A>(rows);
      RunningMoments<A> moments = take_moments(b0.keys);
      NoMoments<A> none;
      for (int64_t j = own.blocks.begin; j < own.blocks.end; ++j) {
        const B b = block(plan, j);
        for (int64_t n = own.samples.begin; n < own.samples.end; n += plan.chunk) {
          const int64_t count = std::min(plan.chunk, own.samples.end - n);
          const A* x = b.read(p.x, n, count, room);
          // Per channel, all blocks share one set of moments.
          if (with_batch && (p.per_channel ? moments.count == 0 : n == own.samples.begin)) start(b, moments, x, count);
          if (with_batch) {
            own_features(b, x, n, count, moments, mean_f, var_f, with_feature);
            // Before it has many terms of its own size.
            if (p.per_channel && moments.count >= kRows) add_channels(moments, channels[t]);
          } else {
            own_features(b, x, n, count, none, mean_f, var_f, with_feature);
          }
        }
        if (with_batch && !p.per_channel) {
          const int64_t at = own.part * keys + key_offset(b);
          for (int64_t k = 0; k < b.keys; ++k) {
            means[at + k] = moments.shift[k] + moments.mean[k];
            squares[at + k] = moments.squares[k];
          }
        }
      }
      if (with_batch && p.per_channel) add_channels(moments, channels[t]);
    });
    if (!with_batch) return;
    if (p.per_channel) return p.store_channels(channels);
    crew.run(plan.tasks, [&](int64_t t) {
      const Range blocks = part_of(plan.blocks, plan.tasks, t);
      const B b0 = block(plan, 0);
      A* mean = task_scratch.take<A>(b0.keys);
      A* var = task_scratch.take<A>(b0.keys);
      for (int64_t j = blocks.begin; j < blocks.end; ++j) {
        const B b = block(plan, j);
        for (int64_t k = 0; k < b.keys; ++k) {
          Moments<A> total;
          for (int64_t part = 0; part < plan.parts_n; ++part) {
            const int64_t at = part * keys + key_offset(b) + k;
            total.merge(A(part_of(p.N, plan.parts_n, part).size()), means[at], squares[at]);
          }
          mean[k] = total.mean;
          var[k] = total.squares / total.count;
        }
        store_keys(b, mean, p.batch.own_mean, p.batch);
        store_keys(b, var, p.batch.own_var, p.batch);
      }
    });
  }

  // Moments for each feature, over positions, to those of a task; they begin anew.
  void add_channels(RunningMoments<A>& moments, std::vector<Moments<double>>& channels) const {
    for (int64_t c = 0; c < p.C && moments.count > 0; ++c) {
      channels[c].merge(double(moments.count), double(moments.shift[c]) + double(moments.mean[c]), double(moments.squares[c]));
    }
    moments.restart();
  }

  void normalise(const Plan& plan) const {
    const bool inline_features = p.feature.own() && !p.feature.known;
    crew.run(plan.tasks, [&](int64_t t) {
      const Share own = share(plan, t);
      const B b0 = block(plan, own.blocks.begin);
      A* room = take_room(b0, plan.chunk);
      const int64_t rows = plan.chunk * b0.width;
      A *mean_f = task_scratch.take<A>(rows), *var_f = task_scratch.take<A>(rows);
      NoMoments<A> none;
      A *room_mean = task_scratch.take<A>(b0.keys), *scale_b = task_scratch.take<A>(b0.keys);
      for (int64_t j = own.blocks.begin; j < own.blocks.end; ++j) {
        const B b = block(plan, j);
        const A* mean_b = read_keys(b, p.batch.used_mean(), room_mean);
        load_scales(b, p.batch.used_var(), scale_b);
        for (int64_t n = own.samples.begin; n < own.samples.end; n += plan.chunk) {
          const int64_t count = std::min(plan.chunk, own.samples.end - n);
          A* x = b.read(p.x, n, count, room);
          if (inline_features) own_features(b, x, n, count, none, mean_f, var_f, true);
          if (!inline_features || p.feature.mean.data) load_features(b, p.feature.used_mean(), n, count, mean_f);
          if (!inline_features || p.feature.var.data) load_features(b, p.feature.used_var(), n, count, var_f);
          to_rstd(var_f, var_f, count * b.width, p.eps);
          b.normalise(x, b.target(x, n), count, mean_b, scale_b, mean_f, var_f);
          if (!b.direct()) b.unpack(x, n, count);
        }
      }
    });
  }

  void backward_split(const Plan& plan, std::vector<std::vector<double>>& grads) const {
    const int64_t keys = p.per_channel ? block(plan, 0).keys : all_keys();
    // Sums of g and of g * (x - center) for each key: of each part of the samples (per position) or each task.
    const int64_t parts = p.per_channel ? plan.tasks : plan.parts_n;
    A* sums_g = call_scratch.take<A>(parts * keys);
    A* sums_gd = call_scratch.take<A>(parts * keys);
    A* sums_d = call_scratch.take<A>(parts * keys);
    A* offset_f = call_scratch.take<A>(p.N * p.P);
    A* slope_f = call_scratch.take<A>(p.N * p.P);
    crew.run(plan.tasks, [&](int64_t t) {
      const Share own = share(plan, t);
      const B b0 = block(plan, own.blocks.begin);
      A *room = take_room(b0, plan.chunk), *room_g = take_room(b0, plan.chunk);
      Terms m = take_terms(b0.keys, plan.chunk * b0.width);
      if (p.per_channel) {
        for (A* sums : {sums_g, sums_gd, sums_d}) std::fill(sums + t * keys, sums + (t + 1) * keys, A(0));
      }
      for (int64_t j = own.blocks.begin; j < own.blocks.end; ++j) {
        const B b = block(plan, j);
        load_keys(b, p.batch.center(), m.center);
        clear_sums(m.sums, b.keys);
        for (int64_t n = own.samples.begin; n < own.samples.end; n += plan.chunk) {
          const int64_t count = std::min(plan.chunk, own.samples.end - n);
          const A *x = b.read(p.x, n, count, room), *g = b.read(p.g, n, count, room_g);
          load_features(b, p.feature.center(), n, count, m.f.center);
          load_features(b, p.feature.used_var(), n, count, m.f.rstd);
          prepare_features(b, n, count, m.f, m.used_f);
          if (p.per_channel) {
            // All rows have the same keys: a sum of some of them at a time. These arrays are free until `finish_keys`.
            const typename B::BatchSums part = {m.scale, m.slope, m.offset, m.used, nullptr};
            clear_sums(part, b.keys);
            b.reduce(x, g, count, m.center, part, m.f);
            m.sums.add(part, b.keys);
          } else {
            b.reduce(x, g, count, m.center, m.sums, m.f);
          }
          finish_features(count * b.width, m.f);
          store_features(b, m.f.sum, n, count, offset_f);
          store_features(b, m.f.sum_deviation, n, count, slope_f);
        }
        const int64_t at = p.per_channel ? t * keys : own.part * keys + key_offset(b);
        for (int64_t k = 0; k < b.keys; ++k) {
          sums_g[at + k] = (p.per_channel ? sums_g[at + k] : A(0)) + m.sums.g[k];
          sums_gd[at + k] = (p.per_channel ? sums_gd[at + k] : A(0)) + m.sums.gd[k];
          sums_d[at + k] = (p.per_channel ? sums_d[at + k] : A(0)) + m.sums.d[k];
        }
        add_gradients(b, m, false, grads[t].data());
      }
    });
    if (p.per_channel) merge_channels(plan, keys, {sums_g, sums_gd, sums_d});
    crew.run(plan.tasks, [&](int64_t t) {
      const Share own = share(plan, t);
      const B b0 = block(plan, own.blocks.begin);
      A *room = take_room(b0, plan.chunk), *room_g = take_room(b0, plan.chunk);
      Terms m = take_terms(b0.keys, plan.chunk * b0.width);
      for (int64_t j = own.blocks.begin; j < own.blocks.end; ++j) {
        const B b = block(plan, j);
        clear_sums(m.sums, b.keys);
        load_keys(b, p.batch.center(), m.center);
        load_keys(b, p.batch.used_var(), m.rstd);
        const int64_t at = p.per_channel ? 0 : key_offset(b), merged = p.per_channel ? 1 : plan.parts_n;
        for (int64_t part = 0; part < merged; ++part) {
          add_all(m.sums.g, sums_g + part * keys + at, b.keys);
          add_all(m.sums.gd, sums_gd + part * keys + at, b.keys);
          add_all(m.sums.d, sums_d + part * keys + at, b.keys);
        }
        finish_keys(b, m);
        for (int64_t n = own.samples.begin; n < own.samples.end; n += plan.chunk) {
          const int64_t count = std::min(plan.chunk, own.samples.end - n);
          A *x = b.read(p.x, n, count, room), *g = b.read(p.g, n, count, room_g);
          load_features(b, p.feature.center(), n, count, m.f.center);
          load_features(b, p.feature.used_var(), n, count, m.f.rstd);
          to_rstd(m.f.rstd, m.f.rstd, count * b.width, p.eps);
          load_features(b, {offset_f, p.P, 1}, n, count, m.f.sum);
          load_features(b, {slope_f, p.P, 1}, n, count, m.f.sum_deviation);
          b.differentiate(x, g, b.target(g, n), count, batch_terms(m), m.f);
          if (!b.direct()) b.unpack(g, n, count);
        }
        // The batch part is the same for every task that works on the block, and, per channel, for every block.
        if (own.part == 0 && !p.per_channel) {
          add_gradients(b, m, true, grads[t].data());  // sums.gf is 0: the first phase added its part
        }
        if (p.per_channel && t == 0 && j == 0) channel_gradients(m, grads[t].data());
      }
    });
  }

  // Per channel: the sums of all tasks, in the first one's arrays.
  void merge_channels(const Plan& plan, int64_t keys, std::initializer_list<A*> all) const {
    for (A* sums : all) {
      for (int64_t c = 0; c < p.C; ++c) {
        double total = 0;
        for (int64_t t = 0; t < plan.tasks; ++t) total += double(sums[t * keys + c]);
        sums[c] = A(total);
      }
    }
  }

  void channel_gradients(const Terms& m, double* grads) const {
    for (int64_t c = 0; c < p.C; ++c) {
      grads[c] += double(p.w_b) * double(m.rstd[c]) * double(m.sums.gd[c]);
      grads[p.C + c] += double(m.sums.g[c]);
    }
  }
};

// ------------------------------------------------------------------------------------------------ features outside

// The engine for x as N, C, P with positions side by side in memory.
//
// Rows of a sample are read where they lie, block by block of positions: a block is so wide that what is kept for its
// C x width keys stays in the second cache, and all samples are read once to take statistics and, last one first, once
// more for the result; inference takes some shapes sample by sample instead, see tiles. Lanes beyond a block's last
// position hold values of the next row, or zeros: they are computed with, since lanes never mix, and left out of whatever
// is stored or summed over lanes.
// T: x's type in memory, which is read and written where it lies; if it is A, others are packed first.
template <class A, class T>
class Outside {
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;
  // Samples and rows of each that are worked on together: what belongs to a key is read once for the samples, what
  // belongs to a sample's position once for the rows. float64 is not worth more code.
  static constexpr int kSamples = std::is_same_v<A, double> ? 1 : 4;
  static constexpr int kRows = std::is_same_v<A, double> ? 1 : 2;
  static constexpr int kGradients = std::is_same_v<A, double> ? 1 : 2;
  static constexpr int64_t kFew = 8;   // samples, up to which sums of squares are not rounded
  static constexpr int kStrip = kVectorBytes == 64 ? 2 : 1;  // vectors of positions; there are twice as many registers
  static constexpr int64_t kPiece = 256;  // positions whose feature statistics the first cache keeps
  static constexpr int64_t kNear = 8;  // features, spread over some rows, whose mean is what a sample's are taken around
  template <int I>
  using Int = std::integral_constant<int, I>;

 public:
  explicit Outside(Problem<A>& problem) : p(problem) {}

  void forward() {
    const Plan plan = choose(p.batch.own());
    crew.together(plan.threads, [&] {
      if (const auto tile = this->tile(plan)) {
        std::atomic<int64_t> next = 0;
        const int64_t group = samples_at_once(plan.threads);
        return crew.run(plan.threads, [&](int64_t) { normalise_tiles(*tile, group, next); });
      }
      if (p.batch.own() && plan.whole) {
        return each_span(plan, [&](const Span& s, const Share&) {
          const Rest rest = take_block(plan, s, true);
          normalise(s, {0, p.N}, true, rest);
        });
      }
      const Rest rest = p.batch.own() ? take_statistics(plan) : Rest();
      each_span(plan, [&](const Span& s, const Share& own) { normalise(s, own.samples, p.batch.own(), rest.at(place(plan, s))); });
    });
  }

  void backward() {
    const Plan plan = choose(true);
    // Per channel, a variance is not found on the way.
    if (p.per_channel && p.batch.var_unknown) p.batch.known = p.batch.var_unknown = false;
    const bool missing_b = p.batch.own() && !p.batch.known;
    bool missing_f = p.feature.own() && !p.feature.known;
    if (missing_b) {
      p.take_own_batch(p.per_channel ? 1 : p.P, 1);
      if (missing_f) p.take_own_feature();
      missing_f = false;
    }
    grads_.assign(plan.tasks, std::vector<double>(2 * p.C, 0.0));
    crew.together(plan.threads, [&] {
      if (!plan.whole) {
        if (missing_b) take_statistics(plan);
        return backward_in_parts(plan, missing_f);
      }
      each_span(plan, [&](const Span& s, const Share& own) {
        if (missing_b) take_block(plan, s, !p.feature.known);
        const Sums sums = take_sums(task_scratch, s.keys(p.C), in_parts(plan));
        const FeatureTerms f = take_features(task_scratch, p.N * s.apart);
        reduce(s, {0, p.N}, missing_f, sums, f, own.task);
        const BatchTerms b = take_terms(task_scratch, s.keys(p.C));
        finish_positions(s, sums, b, own.task);
        differentiate(s, {0, p.N}, b, f);
      });
    });
    p.finish_gradients(grads_);
  }

 private:
  Problem<A>& p;
  mutable Crew crew;
  std::vector<std::vector<double>> grads_;  // of each task: of the weight and of the bias

  // ---------------------------------------------------------------------------------------------------- work and data

  struct Plan {
    bool whole;  // tasks own blocks of positions with all samples: statistics need no merging
    int64_t width, blocks;            // width: of the widest block
    int64_t threads;                  // that there is work for
    int64_t tasks, parts_n, parts_b;  // tasks = parts_n * parts_b: ranges of samples and of blocks
  };

  // Positions [first, first + width) of all rows.
  struct Span {
    int64_t index, first, width, padded;  // padded: width in whole vectors
    int64_t apart;  // of samples' rows of feature statistics
    int64_t keys(int64_t C) const { return C * padded; }
  };

  struct Share {
    int64_t task, part;  // part: of the samples
    Range samples, blocks;
  };

  Plan choose(bool reduces) const {
    Plan plan;
    const int64_t tasks = std::clamp<int64_t>(p.N * p.C * p.P / 65536, 1, std::max<int64_t>(1, thread_count()));
    // Two tasks that write parts of one row share a line of it, now and then: rows must be long for that.
    plan.whole = p.P >= 64 * tasks && reduces && !p.per_channel;
    plan.parts_n = plan.whole ? 1 : std::min(tasks, p.N);
    const int64_t parts_b = std::max<int64_t>(1, tasks / plan.parts_n);
    constexpr int64_t line = kLine / sizeof(A);
    // Rows of a quarter of a KiB at least, since each may lie in a page of its own; of 2 KiB where all samples are read from
    // beyond the caches, and then so few of them that some samples stay in the second cache until they are read again.
    const bool far = !reduces && p.beyond_caches();
    const int64_t least = far ? 32 * line : 4 * line, many = reduces ? 1 : far ? 2 : 4;
    const int64_t width = std::max(least, many * key_limit() / p.C / line * line);
    plan.blocks = std::min(ceil_div(ceil_div(p.P, width), parts_b) * parts_b, ceil_div(p.P, line));
    plan.width = ceil_div(ceil_div(p.P, line), plan.blocks) * line;
    plan.parts_b = std::min(parts_b, plan.blocks);
    if (!reduces && tasks > 1) share_out(plan, p.N, tasks);
    plan.threads = tasks;
    plan.tasks = plan.parts_n * plan.parts_b;
    return plan;
  }

  // Blocks are nearly equal, so that tasks are: whole lines, but for the last one.
  Span span(const Plan& plan, int64_t i) const {
    constexpr int64_t line = kLine / sizeof(A);
    const Range lines = part_of(ceil_div(p.P, line), plan.blocks, i);
    const int64_t first = lines.begin * line, width = std::min(lines.end * line, p.P) - first;
    return span_of(i, first, width);
  }
  // No block has more.
  Span widest(const Plan& plan) const { return span_of(0, 0, plan.width); }
  static Span span_of(int64_t i, int64_t first, int64_t width) {
    const int64_t padded = ceil_div(width, L) * L;
    return {i, first, width, padded, padded + 3 * kLine / int64_t(sizeof(A))};
  }

  template <class F>
  void each_span(const Plan& plan, const F& f) const {
    crew.run(plan.tasks, [&](int64_t t) {
      // Threads have tasks next to each other at one time: of different samples, where those are in parts.
      const int64_t i = t % plan.parts_n;
      const Share own = {t, i, part_of(p.N, plan.parts_n, i), part_of(plan.blocks, plan.parts_b, t / plan.parts_n)};
      for (int64_t b = own.blocks.begin; b < own.blocks.end; ++b) {
        task_scratch.reset();
        f(span(plan, b), own);
      }
    });
  }

  // f(samples at once, first of them): by kSamples, then one by one.
  template <int U = kSamples, class F>
  void each_group(const Range& samples, const F& f) const {
    int64_t n = samples.begin;
    for (; n + U <= samples.end; n += U) f(Int<U>(), n);
    for (; U > 1 && n < samples.end; ++n) f(Int<1>(), n);
  }
  // The same the other way round: what was read last is read first.
  template <int U = kSamples, class F>
  void each_group_backwards(const Range& samples, const F& f) const {
    int64_t n = samples.end;
    const int64_t rest = U > 1 ? samples.size() % U : 0;
    for (int64_t i = 0; i < rest; ++i) f(Int<1>(), --n);
    for (; n > samples.begin;) f(Int<U>(), n -= U);
  }

  // Row c of sample i: at data + i * n + c * row.
  struct View {
    const T* data;
    int64_t n, row;
  };
  static V load(const T* p) { return Memory<T, A>::load(p); }
  static void store(T* p, V v, bool past_caches) {
    if constexpr (std::is_same_v<T, A>) {
      put<A>(p, v, past_caches);
    } else {
      Memory<T, A>::store(p, v);
    }
  }
  bool in_place() const { return p.same_type || !std::is_same_v<T, A>; }

  int64_t offset(const Span& s, int64_t n) const { return n * p.sn + s.first; }

  // Some rows of samples [n, n + count), as they lie in memory or, in another type or where whole vectors would read
  // beyond the tensor, packed into `room`.
  View read(const char* from, const Span& s, int64_t n, int64_t count, const Range& rows, T* room) const {
    const int64_t last = (p.N - 1) * p.sn + (p.C - 1) * p.sc + p.P;
    const int64_t end = offset(s, n + count - 1) + (p.C - 1) * p.sc + s.padded;
    if (in_place() && end <= last) return {reinterpret_cast<const T*>(from) + offset(s, n), p.sn, p.sc};
    for (int64_t i = 0; i < count; ++i) {
      const char* row = from + (offset(s, n + i) + rows.begin * p.sc) * p.rows.size;
      T* to = room + i * s.keys(p.C) + rows.begin * s.padded;
      if constexpr (std::is_same_v<T, A>) {
        p.rows.load(row, {rows.size(), s.width, p.sc, s.padded, 2 * p.sc}, to);
      } else {
        for (int64_t c = rows.begin; c < rows.end; ++c, row += p.sc * sizeof(T), to += s.padded) {
          std::memcpy(static_cast<void*>(to), row, s.width * sizeof(T));
          std::fill(to + s.width, to + s.padded, T{});
        }
      }
    }
    return {room, s.keys(p.C), s.padded};
  }

  // Where results of samples from n on go: to the output, or to `room` and from there, by `flush`.
  struct Target {
    T* data;
    int64_t n, row, whole;  // whole: vectors of a row that are stored as such
    int tail;               // values of the last one
  };
  Target target(const Span& s, int64_t n, T* room) const {
    if (!in_place()) return {room, s.keys(p.C), s.padded, s.padded / L, 0};
    return {reinterpret_cast<T*>(p.out) + offset(s, n), p.sn, p.sc, s.width / L, int(s.width % L)};
  }
  void flush(const Span& s, int64_t n, int64_t count, const T* room) const {
    if constexpr (std::is_same_v<T, A>) {
      if (in_place()) return;
      const RowShape shape = {p.C, s.width, p.sc, s.padded, 0};
      for (int64_t i = 0; i < count; ++i) p.rows.store(room + i * s.keys(p.C), shape, p.out + offset(s, n + i) * p.rows.size);
    }
  }
  T* take_room(const Span& s) const { return task_scratch.take<T>(kSamples * s.keys(p.C)); }

  // Row i of a statistic over the span, zeros beyond it.
  void load_row(const Statistic<A>& from, int64_t i, const Span& s, A* to) const {
    if (from.sp == 1) {
      std::memcpy(to, from.data + i * from.si + s.first, s.width * sizeof(A));
    } else {
      for (int64_t j = 0; j < s.width; ++j) to[j] = from.at(i, s.first + j);
    }
    std::fill(to + s.width, to + s.padded, A(0));
  }
  void load_rows(const Statistic<A>& from, Range rows, const Span& s, A* to, int64_t apart) const {
    for (int64_t i = rows.begin; i < rows.end; ++i) load_row(from, i, s, to + (i - rows.begin) * apart);
  }
  void store_row(const A* from, int64_t i, const Span& s, A* to, const Side<A>& side) const {
    if (!to) return;
    if (side.sp == 1) {
      std::memcpy(to + i * side.si + s.first, from, s.width * sizeof(A));
    } else {
      for (int64_t j = 0; j < s.width; ++j) to[i * side.si + (s.first + j) * side.sp] = from[j];
    }
  }

  void store_features(const Span& s, const Range& samples, const A* mean, const A* var) const {
    for (int64_t n = samples.begin; n < samples.end; ++n, mean += s.apart, var += s.apart) {
      store_row(mean, n, s, p.feature.own_mean, p.feature);
      store_row(var, n, s, p.feature.own_var, p.feature);
    }
  }

  // ------------------------------------------------------------------------------------------------- the statistics

  // Moments for each key, over samples.
  struct PerPosition : RunningMoments<A> {
    int64_t padded;
    bool few;
    void flush(const Range& rows) {
      if (this->total && !few) RunningMoments<A>::flush(rows.begin * padded, rows.size() * padded);
    }
    void begin_row(int) {}
    template <int N>
    void add(int, int64_t c, int64_t at, const V* values) {
      few ? add_exactly<N>(c * padded + at, values) : RunningMoments<A>::template add<N>(c * padded + at, values);
    }
    void end_row(int, int64_t) {}
    // Of few samples the least lucky key has a variance so small that each rounding is seen in y: none in these sums.
    template <int N>
    void add_exactly(int64_t k, const V* values) {
      const V s = get<A>(this->shift + k);
      V d[N];
      for (int u = 0; u < N; ++u) d[u] = values[u] - s;
      each_wide_part<A>([&](auto part) __attribute__((always_inline)) {
        using D = Vec<double>;
        const int64_t at = k + part * kLanes<double>;
        D wide[N], sum{}, spread{};
#pragma GCC unroll 8
        for (int u = 0; u < N; ++u) sum += wide[u] = wide_part<A, part>(d[u]);
        const D m = sum * (1.0 / N), old = get_wide(this->mean + at), delta = m - old;
#pragma GCC unroll 8
        for (int u = 0; u < N; ++u) spread += (wide[u] - m) * (wide[u] - m);
        spread += delta * delta * double(this->weight) + get_wide(this->total + at) + get_wide(this->rest + at);
        put_wide(this->mean + at, old + delta * double(this->share));
        put_wide(this->total + at, spread);
        put_wide(this->rest + at, finite<double>(spread - get_wide(this->total + at)));
      });
    }
  };

  // Moments for each feature, over samples and positions, around the mean of the first row.
  struct PerChannel {
    const A* shift;
    Moments<double>* totals;
    const Span& span;
    V sum[kRows], square[kRows];
    int n = 0;

    void restart() {}
    void flush(const Range&) {}
    void begin(int samples) { n = samples; }
    void begin_row(int r) { sum[r] = square[r] = V{}; }
    template <int N>
    void add(int r, int64_t c, int64_t at, const V* values) {
      const V s = splat<A>(shift[c]);
#pragma GCC unroll 8
      for (int u = 0; u < N; ++u) {
        V d = values[u] - s;
        if (at + L > span.width) d = only<A>(d, int(span.width - at));
        sum[r] += d;
        square[r] += d * d;
      }
    }
    void end_row(int r, int64_t c) {
      const double count = double(n * span.width), total = double(sum_all<A>(sum[r])), mean = total / count;
      totals[c].merge(count, double(shift[c]) + mean, std::max(0.0, double(sum_all<A>(square[r])) - total * mean));
    }
  };

  // Of each sample and position: the mean of some features, and sums over the features around it.
  struct FeatureSums {
    A *shift, *sum, *square;
    FeatureSums at(int64_t i) const { return {shift + i, sum + i, square + i}; }
  };
  FeatureSums take_feature_sums(int64_t count) const {
    return {task_scratch.take<A>(count), task_scratch.take<A>(count), task_scratch.take<A>(count)};
  }

  template <int N>
  void begin_features(const View& x, const Span& s, int64_t rows, const FeatureSums& f) const {
    const int64_t near = std::min(kNear, rows), apart = rows / near * x.row;
    for (int u = 0; u < N; ++u) {
      for (int64_t j = 0; j < s.padded; j += L) {
        V total{};
        for (int64_t c = 0; c < near; ++c) total += load(x.data + u * x.n + c * apart + j);
        put<A>(f.shift + u * s.apart + j, total * (A(1) / A(near)));
      }
    }
    for (A* array : {f.sum, f.square}) std::fill(array, array + N * s.apart, A(0));
  }

  // To means and variances, over `rows` values each, of `count` places; the arrays may be those of the sums.
  void end_features(int64_t count, int64_t rows, const FeatureSums& f, A* mean, A* var) const {
    const A inverse = A(1) / A(rows);
    for (int64_t k = 0; k < count; k += L) {
      const auto [m, v] = mean_and_variance<A>(get<A>(f.shift + k), get<A>(f.sum + k), get<A>(f.square + k), inverse);
      put<A>(mean + k, m);
      put<A>(var + k, v);
    }
  }

  // Both of N samples, in one pass: by strips of so few positions that the sums stay in registers.
  template <int N>
  void features(const View& x, const Span& s, A* mean, A* var) const {
    each_strip(s.padded / L, [&](auto some, int64_t j) { features_some<N, some>({x.data + j, x.n, x.row}, s.apart, mean + j, var + j); });
  }

  template <int N, int M>
  void features_some(const View& x, int64_t apart, A* mean, A* var) const {
    const int64_t C = p.C, n = x.n, near = std::min(C, std::clamp<int64_t>(C / 8, 4, kNear));
    V shift[N][M] = {}, sum[N][M] = {}, square[N][M] = {};
    for (int64_t c = 0; c < near; ++c) {
      const T* at = x.data + c * (C / near) * x.row;
      each<N, M>([&](int u, int m) { shift[u][m] += load(at + u * n + m * L); });
    }
    each<N, M>([&](int u, int m) { shift[u][m] *= A(1) / A(near); });
    const T* at = x.data;
    for (int64_t c = 0; c < C; ++c, at += x.row) {
#pragma GCC unroll 8
      for (int u = 0; u < N; ++u) {
        __builtin_prefetch(at + u * n + 2 * M * L);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const V d = load(at + u * n + m * L) - shift[u][m];
          sum[u][m] += d;
          square[u][m] += d * d;
        }
      }
    }
    const A inverse = A(1) / A(C);
    each<N, M>([&](int u, int m) {
      const auto [own_mean, own_var] = mean_and_variance<A>(shift[u][m], sum[u][m], square[u][m], inverse);
      put<A>(mean + u * apart + m * L, own_mean);
      put<A>(var + u * apart + m * L, own_var);
    });
  }

  // f(vectors, first position) for strips of some vectors.
  template <class F>
  static void each_strip(int64_t vectors, const F& f) {
    int64_t i = 0;
    for (; i + kStrip <= vectors; i += kStrip) f(Int<kStrip>(), i * L);
    for (; kStrip > 1 && i < vectors; ++i) f(Int<1>(), i * L);
  }
  template <int N, int M, class F>
  static void each(const F& f) {
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) f(u, m);
    }
  }

  template <class F>
  void each_rows(const Range& rows, const F& f) const {
    int64_t c = rows.begin;
    for (; c + kRows <= rows.end; c += kRows) f(Int<kRows>(), c);
    for (; kRows > 1 && c < rows.end; ++c) f(Int<1>(), c);
  }

  // f(features, whether they are the first, whether they are the last): so many that their keys stay in the second
  // cache.
  template <class F>
  void each_part(const Span& s, const F& f) const {
    const int64_t parts = ceil_div(p.C, std::max(kNear, key_limit() / s.padded));
    for (int64_t i = 0; i < parts; ++i) f(part_of(p.C, parts, i), i == 0, i == parts - 1);
  }
  static int64_t key_limit() { return caches().second / (16 * int64_t(sizeof(A))); }

  template <int N, int M, class Batch>
  void add_moments(const View& x, const Span& s, int64_t c, Batch& batch, const FeatureSums& f) const {
    const T* rows = x.data + c * x.row;
    const int64_t n = x.n, row = x.row, padded = s.padded, apart = s.apart;
    A *shift = f.shift, *sum = f.sum, *square = f.square;
    for (int r = 0; r < M; ++r) batch.begin_row(r);
    for (int64_t j = 0; j < padded; j += L) {
      V values[M][N];
#pragma GCC unroll 8
      for (int u = 0; u < N; ++u) {
        const int64_t k = u * apart + j;
        const V s = get<A>(shift + k);
        V total{}, squares{};
#pragma GCC unroll 8
        for (int r = 0; r < M; ++r) {
          const T* at = rows + u * n + r * row + j;
          __builtin_prefetch(at + 2 * row);
          values[r][u] = load(at);
          const V d = values[r][u] - s;
          total += d;
          squares += d * d;
        }
        put<A>(sum + k, get<A>(sum + k) + total);
        put<A>(square + k, get<A>(square + k) + squares);
      }
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) batch.template add<N>(r, c + r, j, values[r]);
    }
    for (int r = 0; r < M; ++r) batch.end_row(r, c + r);
  }

  // The moments of samples over a span, into `batch`; own feature statistics to where they are wanted.
  template <class Batch>
  void take(const Span& s, const Range& samples, Batch& batch, bool with_feature) const {
    T* room = take_room(s);
    const FeatureSums all = take_feature_sums(samples.size() * s.apart);
    each_part(s, [&](const Range& rows, bool first, bool last) {
      batch.restart();
      each_group(samples, [&](auto count, int64_t n) {
        const View x = read(p.x, s, n, count, rows, room);
        const FeatureSums f = all.at((n - samples.begin) * s.apart);
        if (first) begin_features<count>(x, s, x.data == room ? rows.end : p.C, f);  // as many as can be read
        batch.begin(count);
        each_rows(rows, [&](auto some, int64_t c) { add_moments<count, some>(x, s, c, batch, f); });
        if ((n - samples.begin + count) % kPart == 0) batch.flush(rows);
        if (!last || !with_feature || !p.feature.own()) return;
        end_features(count * s.apart, p.C, f, f.sum, f.square);
        store_features(s, {n, n + count}, f.sum, f.square);
      });
      if (samples.size() % kPart != 0) batch.flush(rows);
    });
  }

  // Whether sums over samples are taken in parts: no task has more than one part's else.
  bool in_parts(const Plan& plan) const { return p.N > kPart * plan.parts_n; }

  // Arrays of moments: shift, mean, sum of squared deviations and, in parts or of few samples, what rounding took off it.
  bool keeps_rests(const Plan& plan) const { return in_parts(plan) || p.N <= kFew; }
  int64_t moment_arrays(const Plan& plan) const { return keeps_rests(plan) ? 4 : 3; }

  // Moments of samples at these arrays of C * padded values, `apart` from each other, around the mean of the first samples.
  PerPosition start(const Plan& plan, const Span& s, const Range& samples, A* arrays, int64_t apart) const {
    A *shift = arrays, *mean = arrays + apart, *total = arrays + 2 * apart, *rest = arrays + 3 * apart, *squares = total;
    if (in_parts(plan)) squares = task_scratch.take<A>(s.keys(p.C));
    if (!keeps_rests(plan)) total = rest = nullptr;
    const int64_t near = std::min<int64_t>(4, samples.size());
    const View x = read(p.x, s, samples.begin, near, {0, p.C}, task_scratch.take<T>(near * s.keys(p.C)));
    for (int64_t c = 0; c < p.C; ++c) {
      for (int64_t j = 0; j < s.padded; j += L) {
        const T* at = x.data + c * x.row + j;
        V total{}, far{};
        for (int64_t i = 0; i < near; ++i) total += load(at + i * x.n);
        const V mean = total * (A(1) / A(near));
        // Without finer digits than values have that are some deviations away, so that those less this are exact.
        for (int64_t i = 0; i < near; ++i) {
          const V d = load(at + i * x.n) - mean;
          far += d < 0 ? -d : d;
        }
        put<A>(shift + c * s.padded + j, (mean + far) - far);
      }
    }
    for (A* array : {mean, squares, total, rest}) {
      if (array) std::fill(array, array + s.keys(p.C), A(0));
    }
    return {{shift, mean, squares, total, rest}, s.padded, p.N <= kFew};
  }

  // What rounding took off own statistics, for each key; null for nothing.
  struct Rest {
    const A *mean = nullptr, *var = nullptr;
    Rest at(int64_t i) const { return {mean ? mean + i : nullptr, var ? var + i : nullptr}; }
  };

  // A sum of squared deviations of `count` samples to their variance.
  static std::pair<V, V> variance(V squares, V rest, A count) {
    const Wide<A> exact = (widen<A>(squares) + widen<A>(rest)) * (1.0 / double(count));
    const V var = __builtin_convertvector(exact, V);
    return {var, finite<A>(__builtin_convertvector(exact - widen<A>(var), V))};
  }

  // Own statistics of all samples over a span, stored.
  Rest take_block(const Plan& plan, const Span& s, bool with_feature) const {
    const int64_t keys = s.keys(p.C);
    PerPosition batch = start(plan, s, {0, p.N}, task_scratch.take<A>(moment_arrays(plan) * keys), keys);
    take(s, {0, p.N}, batch, with_feature);
    A* vars = batch.total ? batch.total : batch.squares;
    for (int64_t k = 0; k < keys; k += L) {
      const auto [mean, mean_rest] = exact_sum<A>(get<A>(batch.shift + k), get<A>(batch.mean + k));
      put<A>(batch.mean + k, mean);
      put<A>(batch.shift + k, mean_rest);
      const auto [var, var_rest] = variance(get<A>(vars + k), batch.rest ? get<A>(batch.rest + k) : V{}, A(p.N));
      put<A>(vars + k, var);
      if (batch.rest) put<A>(batch.rest + k, var_rest);
    }
    for (int64_t c = 0; c < p.C; ++c) {
      store_row(batch.mean + c * s.padded, c, s, p.batch.own_mean, p.batch);
      store_row(vars + c * s.padded, c, s, p.batch.own_var, p.batch);
    }
    return {batch.shift, batch.rest};
  }

  // Where a span's arrays begin among those of all spans.
  int64_t place(const Plan& plan, const Span& s) const { return s.index * widest(plan).keys(p.C); }
  int64_t all_keys(const Plan& plan) const { return plan.blocks * widest(plan).keys(p.C); }

  // Own statistics in parts, merged in a fixed order, stored. Returns the rest by spans; nothing per channel.
  Rest take_statistics(const Plan& plan) const {
    if (p.per_channel) {
      take_channels(plan);
      return {};
    }
    const int64_t keys = all_keys(plan), count = moment_arrays(plan);
    const bool rests = keeps_rests(plan);
    A* arrays = call_scratch.take<A>(count * plan.parts_n * keys);
    auto of_part = [&](int64_t part, const Span& s) { return arrays + count * part * keys + place(plan, s); };
    each_span(plan, [&](const Span& s, const Share& own) {
      PerPosition batch = start(plan, s, own.samples, of_part(own.part, s), keys);
      take(s, own.samples, batch, !p.feature.known);
    });
    crew.run(plan.tasks, [&](int64_t t) {
      A* mean = task_scratch.take<A>(2 * widest(plan).padded);
      A* var = mean + widest(plan).padded;
      const Range rows = part_of(plan.blocks * p.C, plan.tasks, t);
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const Span s = span(plan, i / p.C);
        const int64_t c = i % p.C;
        for (int64_t j = 0; j < s.padded; j += L) {
          A* first = of_part(0, s) + c * s.padded + j;
          const V shift = get<A>(first);
          V m{}, squares{}, lost{};  // m: less the first part's shift
          A seen = 0;
          for (int64_t part = 0; part < plan.parts_n; ++part) {
            const A* at = of_part(part, s) + c * s.padded + j;
            const A more = A(part_of(p.N, plan.parts_n, part).size()), share = more / (seen + more);
            const V delta = (get<A>(at) - shift) + get<A>(at + keys) - m;
            m += delta * share;
            const V between = seen > 0 ? delta * delta * (seen * share) : V{};  // the first delta's square may overflow
            const auto [added, lost_here] = exact_sum<A>(get<A>(at + 2 * keys), between);
            const auto [total, lost_there] = exact_sum<A>(squares, added);
            squares = total;
            lost += lost_here + lost_there;
            if (rests) lost += get<A>(at + 3 * keys);
            seen += more;
          }
          const auto [sum, mean_rest] = exact_sum<A>(shift, m);
          const auto [v, var_rest] = variance(squares, lost, seen);
          put<A>(mean + j, sum);
          put<A>(first, mean_rest);
          put<A>(var + j, v);
          if (rests) put<A>(first + 3 * keys, var_rest);
        }
        store_row(mean, c, s, p.batch.own_mean, p.batch);
        store_row(var, c, s, p.batch.own_var, p.batch);
      }
    });
    return {arrays, rests ? arrays + 3 * keys : nullptr};
  }

  void take_channels(const Plan& plan) const {
    std::vector<std::vector<Moments<double>>> parts(plan.tasks, std::vector<Moments<double>>(p.C));
    each_span(plan, [&](const Span& s, const Share& own) {
      A* shift = task_scratch.take<A>(p.C);
      const View x = read(p.x, s, own.samples.begin, 1, {0, p.C}, take_room(s));
      const int64_t near = std::min<int64_t>(s.width, 64);
      for (int64_t c = 0; c < p.C; ++c) {
        V total{};
        for (int64_t j = 0; j < near; j += L) total += only<A>(load(x.data + c * x.row + j), int(std::min<int64_t>(L, near - j)));
        shift[c] = sum_all<A>(total) / A(near);
      }
      PerChannel batch{shift, parts[own.task].data(), s};
      take(s, own.samples, batch, !p.feature.known);
    });
    p.store_channels(parts);
  }

  // ------------------------------------------------------------------------------------------------------ the output

  // W * w_b / sqrt(var + eps) of the population, for each key. Where there are few samples this takes much of the time.
  void load_scales(const Span& s, A* to) const {
    const Statistic<A>& var = p.batch.var;
    const V eps = splat<A>(p.eps);
    for (int64_t c = 0; c < p.C; ++c, to += s.padded) {
      const V factor = splat<A>(A(p.exact_w_b * p.exact_W[c]));
      if (var.sp != 1) load_row(var, c, s, to);
      const A* from = var.sp == 1 ? var.data + c * var.si + s.first : to;
      each_vector<L>(
          s.width, [&](int64_t j) { put<A>(to + j, factor * inverse_root<A>(get<A>(from + j) + eps)); },
          [&](int64_t j, int n) { put<A>(to + j, factor * inverse_root<A>(load_part<A, A>(from + j, n) + eps)); });
    }
  }

  // The same of own variances and, if there is any, what rounding took off them: rounded once.
  void own_scales(const Span& s, const A* rest, A* to) const {
    load_rows(p.batch.used_var(), {0, p.C}, s, to, s.padded);
    for (int64_t c = 0, k = 0; c < p.C; ++c, k += s.padded) {
      const double factor = p.exact_w_b * p.exact_W[c];
      rest ? to_scale(to + k, rest + k, to + k, s.padded, p.eps, factor) : to_scale(to + k, to + k, s.padded, p.eps, factor);
    }
  }

  // Batch means, a row of positions for each feature.
  struct MeanRows {
    const A* data;
    int64_t row;
  };

  // features_known: own feature statistics are where they belong already. rest: of own batch statistics.
  void normalise(const Span& s, const Range& samples, bool features_known, const Rest& rest) const {
    const int64_t keys = s.keys(p.C), rows = kSamples * s.apart;
    A* scale_b = task_scratch.take<A>(keys);
    p.batch.var.data ? load_scales(s, scale_b) : own_scales(s, rest.var, scale_b);
    // Where the mean is large and the deviation small, what rounding took off the mean is seen in y.
    A* offset_b = rest.mean && !p.batch.mean.data ? task_scratch.take<A>(keys) : nullptr;
    // Means of a population are read where they lie, if no vector of them reaches beyond.
    const Statistic<A> mean = p.batch.used_mean();
    const bool copied = !p.batch.mean.data || mean.sp != 1 || p.P % L != 0;
    A* copy = task_scratch.take<A>(copied ? keys : 0);
    if (copied) load_rows(mean, {0, p.C}, s, copy, s.padded);
    const MeanRows mean_b = copied ? MeanRows{copy, s.padded} : MeanRows{mean.data + s.first, mean.si};
    for (int64_t c = 0, k = 0; c < p.C && offset_b; ++c, k += s.padded) {
      to_coarse(copy + k, rest.mean + k, scale_b + k, offset_b + k, s.padded, A(p.exact_w_b * p.exact_W[c]));
    }
    T* room = take_room(s);
    A *mean_f = task_scratch.take<A>(rows), *rstd_f = task_scratch.take<A>(rows);
    const bool inline_features = p.feature.own() && !features_known;
    auto group = [&](auto count, int64_t n) {
      const View x = read(p.x, s, n, count, {0, p.C}, room);
      const Range own = {n, n + count};
      if (inline_features) {
        features<count>(x, s, mean_f, rstd_f);
        store_features(s, own, mean_f, rstd_f);
      }
      if (!inline_features || p.feature.mean.data) load_rows(p.feature.used_mean(), own, s, mean_f, s.apart);
      if (!inline_features || p.feature.var.data) load_rows(p.feature.used_var(), own, s, rstd_f, s.apart);
      to_rstd(rstd_f, rstd_f, count * s.apart, p.eps, p.w_f);
      normalise_some<count>(x, target(s, n, room), s, mean_b, scale_b, offset_b, mean_f, rstd_f);
      flush(s, n, count, room);
    };
    // Read twice, few samples at a time: they should stay in the second cache.
    if (inline_features && kSamples * keys * int64_t(sizeof(A)) > caches().second) {
      for (int64_t n = samples.begin; n < samples.end; ++n) group(Int<1>(), n);
    } else if (inline_features) {
      each_group(samples, group);
    } else {
      each_group_backwards(samples, group);
    }
  }

  template <int N>
  void normalise_some(const View& x, const Target& out, const Span& s, const MeanRows mean_b, const A* scale_b, const A* offset_b, const A* mean_f, const A* rstd_f) const {
    const int64_t padded = s.padded, apart = s.apart;
    const bool past_caches = p.past_caches;
    const View from = x;
    const Target to = out;
    const int64_t whole = to.whole * L;
    for (int64_t first = 0; first == 0 || first < whole; first += kPiece) {
      const int64_t end = std::min(first + kPiece, whole);
      for (int64_t c = 0; c < p.C; ++c) {
        const V W = splat<A>(p.W[c]), bias = splat<A>(p.bias[c]);
        const T* row = from.data + c * from.row;
        const A *mb = mean_b.data + c * mean_b.row, *sb = scale_b + c * padded;
        const A* ob = offset_b ? offset_b + c * padded : nullptr;
        T* y = to.data + c * to.row;
        auto value = [&](int64_t j, int u, V m, V scale, V offset) {
          const V v = load(row + u * from.n + j);
          return (v - m) * scale + ((v - get<A>(mean_f + u * apart + j)) * get<A>(rstd_f + u * apart + j) * W + offset);
        };
        int64_t j = first;
        for (; j < end; j += L) {
          const V m = get<A>(mb + j), scale = get<A>(sb + j), offset = ob ? bias + get<A>(ob + j) : bias;
          V values[N];
#pragma GCC unroll 8
          for (int u = 0; u < N; ++u) {
            __builtin_prefetch(row + u * from.n + j + from.row);
            values[u] = value(j, u, m, scale, offset);
          }
#pragma GCC unroll 8
          for (int u = 0; u < N; ++u) store(y + u * to.n + j, values[u], past_caches);
        }
        if (end == whole && to.tail) {
          const V offset = ob ? bias + get<A>(ob + j) : bias;
          for (int u = 0; u < N; ++u) store_part<T, A>(y + u * to.n + j, value(j, u, get<A>(mb + j), get<A>(sb + j), offset), to.tail);
        }
      }
    }
  }

  // ------------------------------------------------------------------------------------------------------------ tiles

  // With the population's batch statistics no sample needs another one, and each can be read and written from its first
  // row to its last, which the processor foresees as it does not foresee blocks of positions. Where rows are not whole
  // vectors, most of their vectors lie across two lines of the cache; so a sample is taken by *tiles*, as many rows as are
  // whole vectors together: 16 of 7x7 positions, 1 of 28x28.
  struct Tile {
    int64_t rows, vectors, count;
    int64_t size() const { return vectors * L; }
  };
  static constexpr int64_t kTile = 1024;      // values of one: a few for each should be in the nearest caches
  static constexpr int64_t kEnoughTiles = 8;  // in a sample, or bringing their rows together costs more than it saves
  static constexpr int64_t kStreams = 4;      // tiles at least that are read side by side for sums over all of them
  static constexpr int kPair = std::is_same_v<A, double> ? 1 : 2;  // samples at a time, where there are enough

  std::optional<Tile> tile(const Plan& plan) const {
    const int64_t shared = std::gcd(p.P, int64_t(L)), rows = L / shared, count = p.C / rows;
    // Not by their layout: the way taken, and so the last digit of y, must not depend on what a checkpoint had.
    auto each_position = [&](const Statistic<A>& s) { return s.data && s.sp != 0; };
    if (!in_place() || p.per_channel || p.sc != p.P || !each_position(p.batch.mean) || !each_position(p.batch.var) || plan.threads > p.N) return {};
    // Of short rows the beginnings and ends take longer than reading in order saves.
    const bool enough = rows == 1 ? p.P >= kPiece && count >= kStreams : p.P >= L && count >= kEnoughTiles;
    if (!enough || p.P * rows > kTile || count * rows != p.C) return {};
    return Tile{rows, p.P / shared, count};
  }

  // Of a tile's vector: the row of its first lane, and the lanes in which the next one is.
  struct TileVector {
    using Bits = typename VectorOf<A>::bits;
    Bits next;
    int64_t row;
    // The rows' values in its lanes.
    V values(const A* of) const { return next ? splat<A>(of[row + 1]) : splat<A>(of[row]); }
  };
  template <size_t... I>
  TileVector tile_vector(int64_t i, std::index_sequence<I...>) const {
    using Bits = typename TileVector::Bits;
    using Lane = std::remove_reference_t<decltype(Bits{}[0])>;
    const int64_t row = i * L / p.P, end = std::min<int64_t>((row + 1) * p.P - i * L, L);
    const Bits lane = {I...};
    return {(Bits)(lane >= Lane(end) - Bits{}), row};
  }

  // Two samples share what is read for a key, which saves a tenth of the time; unless a thread waits for another's pair.
  int64_t samples_at_once(int64_t threads) const {
    const int64_t in_pairs = kPair * ceil_div(ceil_div(p.N, kPair), threads), one_by_one = ceil_div(p.N, threads);
    return 10 * in_pairs <= 11 * one_by_one ? kPair : 1;
  }

  // Groups of so many samples, from the next one on that no thread has taken.
  void normalise_tiles(const Tile& tile, int64_t group, std::atomic<int64_t>& next) const {
    const int64_t groups = ceil_div(p.N, group);
    int64_t i = next++;
    if (i >= groups) return;
    TileVector* vectors = task_scratch.take<TileVector>(tile.vectors);
    for (int64_t j = 0; j < tile.vectors; ++j) vectors[j] = tile_vector(j, std::make_index_sequence<size_t(L)>());
    A* scales = task_scratch.take<A>(p.C * p.P);
    tile_scales(tile, vectors, dense_rows(p.batch.var), scales);
    const A* mean_b = dense_rows(p.batch.mean);
    A* terms = task_scratch.take<A>(kPair * 2 * tile.size());
    A *mean = task_scratch.take<A>(L + tile.size()) + L, *var = task_scratch.take<A>(L + tile.size()) + L;
    const FeatureSums f = take_feature_sums(tile.size() + L);
    // No more samples at a time than the second cache keeps until they are read again.
    for (; i < groups; i = next++) {
      each_group<kPair>({i * group, std::min(p.N, (i + 1) * group)}, [&](auto count, int64_t n) {
        const View x = {reinterpret_cast<const T*>(p.x) + n * p.sn, p.sn, tile.size()};
        for (int64_t u = 0; u < count; ++u) {
          take_tile_features(tile, n + u, x.data + u * x.n, f, mean, var);
          spread_tile_features(tile, vectors, mean, var, terms + 2 * L * u, 2 * L * count);
        }
        T* y = reinterpret_cast<T*>(p.out) + n * p.sn;
        for (int64_t t = 0, k = 0; t < tile.count; ++t, k += tile.size()) {
          const TileKeys keys = {vectors, tile.vectors, p.W + t * tile.rows, p.bias + t * tile.rows, mean_b + k, scales + k, terms, p.past_caches};
          tile.rows == 1 ? keys.template normalise<true, count>(x.data + k, y + k, x.n) : keys.template normalise<false, count>(x.data + k, y + k, x.n);
        }
      });
    }
  }

  // A population statistic as C rows of P values next to each other: where it lies, or a copy.
  const A* dense_rows(const Statistic<A>& from) const {
    if (from.sp == 1 && from.si == p.P) return from.data;
    A* copy = task_scratch.take<A>(p.C * p.P + L);
    load_rows(from, {0, p.C}, span_of(0, 0, p.P), copy, p.P);
    return copy;
  }

  // W * w_b / sqrt(var + eps), for each key.
  void tile_scales(const Tile& tile, const TileVector* vectors, const A* var, A* scales) const {
    const V eps = splat<A>(p.eps), w_b = splat<A>(p.w_b);
    const A* W = p.W;
    for (const A* end = W + p.C; W < end; W += tile.rows) {
      for (int64_t i = 0; i < tile.vectors; ++i, var += L, scales += L) {
        put<A>(scales, vectors[i].values(W) * w_b * inverse_root<A>(get<A>(var) + eps));
      }
    }
  }

  // Sums over N tiles of a sample into those of each place in a tile; the first ones say what they are taken around.
  template <int N, bool First>
  void add_tiles(const T* x, int64_t apart, int64_t size, const FeatureSums& sums) const {
    const FeatureSums f = sums;
    for (int64_t j = 0; j < size; j += L) {
      V values[N], shift{}, total{}, squares{};
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) values[i] = load(x + i * apart + j);
      if constexpr (First) {
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) shift += values[i];
        put<A>(f.shift + j, shift *= A(1) / A(N));
      } else {
        shift = get<A>(f.shift + j);
        total = get<A>(f.sum + j);
        squares = get<A>(f.square + j);
      }
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const V d = values[i] - shift;
        total += d;
        squares += d * d;
      }
      put<A>(f.sum + j, total);
      put<A>(f.square + j, squares);
    }
  }

  // Over all tiles, some side by side. These are far apart: features near each other are often alike, and a mean that all
  // are far from would cost digits.
  template <int N>
  void sum_tiles(const Tile& tile, const T* x, const FeatureSums& f) const {
    const int64_t size = tile.size(), part = tile.count / N, apart = part * size;
    add_tiles<N, true>(x, apart, size, f);
    for (int64_t t = 1; t < part; ++t) add_tiles<N, false>(x + t * size, apart, size, f);
    for (int64_t t = part * N; t < tile.count; ++t) add_tiles<1, false>(x + t * size, 0, size, f);
  }

  // Of sample n, whose values are at x: means and variances over the features, a row of positions.
  void take_tile_features(const Tile& tile, int64_t n, const T* x, const FeatureSums& f, A* mean, A* var) const {
    if (p.feature.own()) {
      constexpr int64_t most = std::is_same_v<A, double> ? kStreams : 2 * kStreams;
      tile.count < 8 * most ? sum_tiles<kStreams>(tile, x, f) : sum_tiles<most>(tile, x, f);
      tile.rows == 1 ? end_features(tile.size(), tile.count, f, mean, var) : join_rows(tile, f, mean, var);
    }
    const Span all = span_of(0, 0, p.P);
    store_features(all, {n, n + 1}, mean, var);
    if (p.feature.mean.data) load_row(p.feature.mean, n, all, mean);
    if (p.feature.var.data) load_row(p.feature.var, n, all, var);
  }

  // From sums for each place in a tile to the mean and variance of its position. Arrays go on for a vector beyond the tile.
  void join_rows(const Tile& tile, const FeatureSums& f, A* mean_f, A* var_f) const {
    const A *means = f.sum, *vars = f.square;
    end_features(tile.size(), tile.count, f, f.sum, f.square);
    const A inverse = A(1) / A(tile.rows);
    for (int64_t j = 0; j < p.P; j += L) {
      V mean{}, var{};
      for (int64_t r = 0; r < tile.rows; ++r) mean += get<A>(means + r * p.P + j);
      mean *= inverse;
      for (int64_t r = 0; r < tile.rows; ++r) {
        const V d = get<A>(means + r * p.P + j) - mean;
        var += get<A>(vars + r * p.P + j) + d * d;
      }
      put<A>(mean_f + j, mean);
      put<A>(var_f + j, var * inverse);
    }
  }

  // From a row of means and variances, which can be read a vector before its begin, to the mean and w_f / sqrt(var + eps)
  // for each place in a tile: two vectors next to each other, `step` from the next two.
  void spread_tile_features(const Tile& tile, const TileVector* vectors, const A* mean, const A* var, A* terms, int64_t step) const {
    const V eps = splat<A>(p.eps), w_f = splat<A>(p.w_f);
    for (int64_t i = 0; i < tile.vectors; ++i, terms += step) {
      const int64_t at = i * L - vectors[i].row * p.P, next = at + L > p.P ? at - p.P : at;
      put<A>(terms, vectors[i].next ? get<A>(mean + next) : get<A>(mean + at));
      put<A>(terms + L, w_f * inverse_root<A>((vectors[i].next ? get<A>(var + next) : get<A>(var + at)) + eps));
    }
  }

  // What is known about the keys of a tile; terms: of N samples, see `spread_tile_features`.
  struct TileKeys {
    const TileVector* vectors;
    int64_t count;
    const A *W, *bias, *mean, *scale, *terms;
    bool past_caches;

    // y of N samples, n from each other. Single: the tile is a row. Not inlined, or addresses take too many registers; with
    // a copy of what is known, since the compiler takes y for memory that anything may lie in.
    template <bool Single, int N>
    __attribute__((noinline)) void normalise(const T* x, T* y, const int64_t n) const {
      const TileKeys own = *this;
      const V W_row = splat<A>(*own.W), bias_row = splat<A>(*own.bias);
      for (int64_t i = 0; i < own.count; ++i) {
        const int64_t j = i * L;
        const V W = Single ? W_row : own.vectors[i].values(own.W), bias = Single ? bias_row : own.vectors[i].values(own.bias);
        const V mean = get<A>(own.mean + j), scale = get<A>(own.scale + j);
        V values[N];
#pragma GCC unroll 8
        for (int u = 0; u < N; ++u) {
          const A* of_sample = own.terms + (i * N + u) * 2 * L;
          const V v = load(x + u * n + j), mean_f = get<A>(of_sample), rstd_f = get<A>(of_sample + L);
          values[u] = (v - mean) * scale + ((v - mean_f) * rstd_f * W + bias);
        }
#pragma GCC unroll 8
        for (int u = 0; u < N; ++u) store(y + u * n + j, values[u], own.past_caches);
      }
    }
  };

  // ------------------------------------------------------------------------------------------------------ the gradient

  // For each key: sums over samples of g, g * (x - center), x - center, and (x - center)^2 where the variance is wanted.
  // rest: what rounding took off the first two, which are summed up further, over positions, for the parameters' gradients;
  // null where samples are not summed in parts.
  struct Sums {
    A *center, *g, *gd, *d, *square, *rest_g = nullptr, *rest_gd = nullptr;
    std::array<A*, 6> all() const { return {g, gd, d, square, rest_g, rest_gd}; }
    void add(const Sums& other, int64_t first, int64_t count) const {
      for (auto [to, rest, from] : {std::tuple(g, rest_g, other.g), std::tuple(gd, rest_gd, other.gd)}) {
        rest ? add_all(to + first, rest + first, from + first, count) : add_all(to + first, from + first, count);
      }
      add_all(d + first, other.d + first, count);
      add_all(square + first, other.square + first, count);
    }
    void add_rests(const Sums& other, int64_t count) const {
      if (!rest_g) return;
      add_all(rest_g, other.rest_g, count);
      add_all(rest_gd, other.rest_gd, count);
    }
    Sums at(int64_t k) const { return {center + k, g + k, gd + k, d + k, square + k, rest_g ? rest_g + k : nullptr, rest_gd ? rest_gd + k : nullptr}; }
  };
  Sums take_sums(Scratch& scratch, int64_t keys, bool rests) const {
    Sums sums;
    for (A** array : {&sums.center, &sums.g, &sums.gd, &sums.d, &sums.square}) *array = scratch.take<A>(keys);
    if (rests) {
      for (A** array : {&sums.rest_g, &sums.rest_gd}) *array = scratch.take<A>(keys);
    }
    return sums;
  }
  // For each key: dx = g * (scale + rstd_f * W * w_f) - (x - center) * slope - offset - the features' part.
  struct BatchTerms {
    A *center, *scale, *slope, *offset;
  };
  BatchTerms take_terms(Scratch& scratch, int64_t keys) const {
    BatchTerms terms;
    for (A** array : {&terms.center, &terms.scale, &terms.slope, &terms.offset}) *array = scratch.take<A>(keys);
    return terms;
  }
  // For each sample and position, with G = g * W * w_f. center and rstd are of the feature part; base and slope hold
  // sums over the features of G and G * (x - center) first, then what is taken off dx, as above.
  struct FeatureTerms {
    A *center, *rstd, *base, *slope;
    FeatureTerms at(int64_t i) const { return {center + i, rstd + i, base + i, slope + i}; }
  };
  FeatureTerms take_features(Scratch& scratch, int64_t count) const {
    FeatureTerms f;
    for (A** array : {&f.center, &f.rstd, &f.base, &f.slope}) *array = scratch.take<A>(count);
    return f;
  }

  struct SumsPerPosition {
    Sums total, sums;  // sums: of the samples since the last flush, so that no sum has many terms of its own size
    bool squares;
    int64_t padded;
    void flush(const Range& rows) {
      if (total.g == sums.g) return;
      const int64_t first = rows.begin * padded, count = rows.size() * padded;
      total.add(sums, first, count);
      for (A* array : {sums.g, sums.gd, sums.d, sums.square}) std::fill(array + first, array + first + count, A(0));
    }
    void begin_row(int) {}
    template <int N>
    void add(int, int64_t c, int64_t at, const V* x, const V* g) {
      const int64_t k = c * padded + at;
      const V center = get<A>(sums.center + k);
      V sg{}, sgd{}, sd{}, sq{};
#pragma GCC unroll 8
      for (int u = 0; u < N; ++u) {
        const V d = x[u] - center;
        sg += g[u];
        sgd += g[u] * d;
        sd += d;
        sq += d * d;
      }
      put<A>(sums.g + k, get<A>(sums.g + k) + sg);
      put<A>(sums.gd + k, get<A>(sums.gd + k) + sgd);
      put<A>(sums.d + k, get<A>(sums.d + k) + sd);
      if (squares) put<A>(sums.square + k, get<A>(sums.square + k) + sq);
    }
    void end_row(int, int64_t) {}
  };

  struct SumsPerChannel {
    const A* center;
    double *g, *gd, *d;
    const Span& span;
    V sg[kRows], sgd[kRows], sd[kRows];
    void flush(const Range&) {}
    void begin_row(int r) { sg[r] = sgd[r] = sd[r] = V{}; }
    template <int N>
    void add(int r, int64_t c, int64_t at, const V* x, const V* grad) {
      const bool partial = at + L > span.width;
      for (int u = 0; u < N; ++u) {
        V off = x[u] - splat<A>(center[c]), gv = grad[u];
        if (partial) {
          off = only<A>(off, int(span.width - at));
          gv = only<A>(gv, int(span.width - at));
        }
        sg[r] += gv;
        sgd[r] += gv * off;
        sd[r] += off;
      }
    }
    void end_row(int r, int64_t c) {
      g[c] += double(sum_all<A>(sg[r]));
      gd[c] += double(sum_all<A>(sgd[r]));
      d[c] += double(sum_all<A>(sd[r]));
    }
  };

  // offset: rstd * (center - used mean) of N samples. Adds the feature part of the weight's gradient to grad.
  template <int N, int M, class Batch>
  void add_sums(const View& x, const View& g, const Span& s, int64_t c, Batch& batch, const FeatureTerms& terms, const A* offset, double* grad) const {
    const int64_t padded = s.padded, apart = s.apart, whole = s.width / L * L;
    const FeatureTerms f = terms;
    const View from = x, gradient = g;
    V gf[M] = {}, W[M];
    for (int r = 0; r < M; ++r) {
      W[r] = splat<A>(p.W[c + r]);
      batch.begin_row(r);
    }
    for (int64_t j = 0; j < padded; j += L) {
      V xs[M][N], gs[M][N], part[M] = {};
#pragma GCC unroll 8
      for (int u = 0; u < N; ++u) {
        const int64_t k = u * apart + j;
        const V center = get<A>(f.center + k), rstd = get<A>(f.rstd + k), off = get<A>(offset + k);
        V sum{}, deviation{};
#pragma GCC unroll 8
        for (int r = 0; r < M; ++r) {
          const T *x_at = from.data + u * from.n + (c + r) * from.row + j, *g_at = gradient.data + u * gradient.n + (c + r) * gradient.row + j;
          __builtin_prefetch(x_at + 2 * from.row);
          __builtin_prefetch(g_at + 2 * gradient.row);
          const V xv = xs[r][u] = load(x_at), gv = gs[r][u] = load(g_at);
          const V d = xv - center, gw = gv * W[r];
          sum += gw;
          deviation += gw * d;
          part[r] += gv * (d * rstd + off);
        }
        put<A>(f.base + k, get<A>(f.base + k) + sum);
        put<A>(f.slope + k, get<A>(f.slope + k) + deviation);
      }
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) {
        gf[r] += j < whole ? part[r] : only<A>(part[r], int(s.width - whole));
        batch.template add<N>(r, c + r, j, xs[r], gs[r]);
      }
    }
    for (int r = 0; r < M; ++r) {
      batch.end_row(r, c + r);
      grad[c + r] += double(p.w_f) * double(sum_all<A>(gf[r]));
    }
  }

  // The reductions of the backward pass over samples of a span: f gets their features' terms, batch the keys' sums.
  template <class Batch>
  void reduce_samples(const Span& s, const Range& samples, bool missing_f, Batch& batch, const FeatureTerms& all, int64_t task) {
    const int64_t rows = kSamples * s.apart;
    T *room = take_room(s), *room_g = take_room(s);
    A *used = task_scratch.take<A>(rows), *offsets = task_scratch.take<A>(samples.size() * s.apart);
    each_part(s, [&](const Range& part, bool first, bool last) {
      each_group<kGradients>(samples, [&](auto count, int64_t n) {
        const int64_t at = (n - samples.begin) * s.apart;
        const FeatureTerms f = all.at(at);
        A* offset = offsets + at;
        const View x = read(p.x, s, n, count, first && missing_f ? Range{0, p.C} : part, room);
        if (first) begin_terms<count>(x, s, n, missing_f, f, offset, used);
        const View g = read(p.g, s, n, count, part, room_g);
        each_rows(part, [&](auto some, int64_t c) { add_sums<count, some>(x, g, s, c, batch, f, offset, grads_[task].data()); });
        if (last) end_terms(count * s.apart, f, offset);
        if ((n - samples.begin + count) % kPart == 0) batch.flush(part);
      });
      if (samples.size() % kPart != 0) batch.flush(part);
    });
  }

  template <int N>
  void begin_terms(const View& x, const Span& s, int64_t n, bool missing_f, const FeatureTerms& f, A* offset, A* used) const {
    const Range own = {n, n + N};
    const int64_t size = N * s.apart;
    if (missing_f) {
      features<N>(x, s, f.center, f.rstd);
      if (p.feature.var.data) load_rows(p.feature.var, own, s, f.rstd, s.apart);
    } else {
      load_rows(p.feature.center(), own, s, f.center, s.apart);
      load_rows(p.feature.used_var(), own, s, f.rstd, s.apart);
    }
    to_rstd(f.rstd, f.rstd, size, p.eps, A(1));
    if (p.feature.own() && p.feature.mean.data) {
      load_rows(p.feature.mean, own, s, used, s.apart);
      for (int64_t k = 0; k < size; k += L) put<A>(offset + k, get<A>(f.rstd + k) * (get<A>(f.center + k) - get<A>(used + k)));
    } else {
      std::fill(offset, offset + size, A(0));
    }
    for (A* array : {f.base, f.slope}) std::fill(array, array + size, A(0));
  }

  void end_terms(int64_t size, const FeatureTerms& f, const A* offset) const {
    const A inverse = A(1) / A(p.C), w_f = p.w_f;
    const A mean_own = p.feature.mean.data ? A(0) : inverse, var_own = p.feature.var.data ? A(0) : inverse;
    for (int64_t k = 0; k < size; k += L) {
      const V rstd = get<A>(f.rstd + k), sum = get<A>(f.base + k) * w_f;
      // sum of G * (x - used mean) = that around the center + (center - used mean) * sum of G
      const V deviation = get<A>(f.slope + k) * w_f * rstd + get<A>(offset + k) * sum;
      put<A>(f.base + k, rstd * sum * mean_own);
      put<A>(f.slope + k, rstd * rstd * deviation * var_own);
    }
  }

  void reduce(const Span& s, const Range& samples, bool missing_f, const Sums& sums, const FeatureTerms& f, int64_t task) {
    load_rows(p.batch.center(), {0, p.C}, s, sums.center, s.padded);
    for (A* array : sums.all()) {
      if (array) std::fill(array, array + s.keys(p.C), A(0));
    }
    Sums part = sums;
    if (sums.rest_g) {
      part = take_sums(task_scratch, s.keys(p.C), false);
      part.center = sums.center;
      for (A* array : {part.g, part.gd, part.d, part.square}) std::fill(array, array + s.keys(p.C), A(0));
    }
    SumsPerPosition batch{sums, part, p.batch.var_unknown, s.padded};
    reduce_samples(s, samples, missing_f, batch, f, task);
  }

  // From the sums for the keys of feature c, of which `count` are real, the variances that were used and the means, if they
  // are not the center, to their terms. Returns the batch part of the gradients of weight and bias.
  std::pair<double, double> finish(int64_t c, int64_t count, const Sums& sums, const BatchTerms& terms, A* var, const A* used) const {
    const A inverse = A(1) / A(p.batch_count());
    const A mean_own = p.batch.mean.data ? A(0) : inverse, var_own = p.batch.var.data ? A(0) : inverse;
    // What rounding left in the center, which is the own mean: sums over many samples need it if the mean is large.
    const A residue = p.batch.own() ? inverse : A(0), residue_of_mean = p.batch.mean.data ? A(0) : residue;
    for (int64_t k = 0; k < count && p.batch.var_unknown; k += L) {
      const V d = get<A>(sums.d + k) * inverse;
      put<A>(var + k, get<A>(sums.square + k) * inverse - d * d);
    }
    const int64_t padded = ceil_div(count, L) * L;
    to_scale(var, terms.scale, padded, p.eps, p.exact_w_b * p.exact_W[c]);
    to_scale(var, var, padded, p.eps, 1);
    Wide<A> weight{}, bias{};
    for (int64_t k = 0; k < count; k += L) {
      const V r = get<A>(var + k), g = get<A>(sums.g + k), d = get<A>(sums.d + k), center = get<A>(sums.center + k);
      V gd = get<A>(sums.gd + k) - d * g * residue_of_mean;
      if (used) gd += (center - get<A>(used + k)) * g;
      const int real = int(std::min<int64_t>(L, count - k));
      weight += widen<A>(only<A>(r, real)) * widen<A>(only<A>(gd, real));
      bias += widen<A>(only<A>(g, real));
      if (sums.rest_g) {
        weight += widen<A>(only<A>(r * get<A>(sums.rest_gd + k), real));
        bias += widen<A>(only<A>(get<A>(sums.rest_g + k), real));
      }
      const V scale = get<A>(terms.scale + k), slope = scale * r * r * gd * var_own;
      put<A>(terms.center + k, center);
      put<A>(terms.slope + k, slope);
      put<A>(terms.offset + k, scale * g * mean_own - d * slope * residue);
    }
    double total_weight = 0, total_bias = 0;
    for (int i = 0; i < L; ++i) {
      total_weight += weight[i];
      total_bias += bias[i];
    }
    return {total_weight * double(p.w_b), total_bias};
  }

  static BatchTerms shift(const BatchTerms& b, int64_t k) { return {b.center + k, b.scale + k, b.slope + k, b.offset + k}; }

  void finish_position_row(const Span& s, int64_t c, const Sums& sums, const BatchTerms& terms, A* var, A* used, int64_t task) {
    if (!p.batch.var_unknown) load_row(p.batch.used_var(), c, s, var);
    const bool other = p.batch.own() && p.batch.mean.data;
    if (other) load_row(p.batch.mean, c, s, used);
    const auto [weight, bias] = finish(c, s.width, sums, terms, var, other ? used : nullptr);
    grads_[task][c] += weight;
    grads_[task][p.C + c] += bias;
  }

  void finish_positions(const Span& s, const Sums& sums, const BatchTerms& terms, int64_t task) {
    A *var = task_scratch.take<A>(s.padded), *used = task_scratch.take<A>(s.padded);
    for (int64_t c = 0; c < p.C; ++c) finish_position_row(s, c, sums.at(c * s.padded), shift(terms, c * s.padded), var, used, task);
  }

  void differentiate(const Span& s, const Range& samples, const BatchTerms& b, const FeatureTerms& f) const {
    T *room = take_room(s), *room_g = take_room(s);
    each_group_backwards<kGradients>(samples, [&](auto count, int64_t n) {
      const View x = read(p.x, s, n, count, {0, p.C}, room), g = read(p.g, s, n, count, {0, p.C}, room_g);
      differentiate_some<count>(x, g, target(s, n, room_g), s, b, f.at((n - samples.begin) * s.apart));
      flush(s, n, count, room_g);
    });
  }

  template <int N>
  void differentiate_some(const View& x, const View& g, const Target& out, const Span& s, const BatchTerms& terms, const FeatureTerms& features) const {
    const int64_t padded = s.padded, apart = s.apart;
    const bool past_caches = p.past_caches;
    const View from = x, gradient = g;
    const Target to = out;
    const FeatureTerms f = features;
    const int64_t whole = to.whole * L;
    for (int64_t first = 0; first == 0 || first < whole; first += kPiece) {
      const int64_t end = std::min(first + kPiece, whole);
      for (int64_t c = 0; c < p.C; ++c) {
        const V W = splat<A>(p.W[c] * p.w_f);
        const T *row = from.data + c * from.row, *row_g = gradient.data + c * gradient.row;
        const BatchTerms b = shift(terms, c * padded);
        T* dx = to.data + c * to.row;
        auto value = [&](int64_t j, int u, V center, V scale, V slope, V offset) {
          const V xv = load(row + u * from.n + j), gv = load(row_g + u * gradient.n + j);
          const int64_t k = u * apart + j;
          return gv * (scale + get<A>(f.rstd + k) * W) - (xv - center) * slope - (xv - get<A>(f.center + k)) * get<A>(f.slope + k) - (offset + get<A>(f.base + k));
        };
        int64_t j = first;
        for (; j < end; j += L) {
          const V center = get<A>(b.center + j), scale = get<A>(b.scale + j), slope = get<A>(b.slope + j), offset = get<A>(b.offset + j);
          V values[N];
#pragma GCC unroll 8
          for (int u = 0; u < N; ++u) {
            __builtin_prefetch(row + u * from.n + j + from.row);
            __builtin_prefetch(row_g + u * gradient.n + j + gradient.row);
            values[u] = value(j, u, center, scale, slope, offset);
          }
#pragma GCC unroll 8
          for (int u = 0; u < N; ++u) store(dx + u * to.n + j, values[u], past_caches);
        }
        if (end == whole && to.tail) {
          const V center = get<A>(b.center + j), scale = get<A>(b.scale + j), slope = get<A>(b.slope + j), offset = get<A>(b.offset + j);
          for (int u = 0; u < N; ++u) store_part<T, A>(dx + u * to.n + j, value(j, u, center, scale, slope, offset), to.tail);
        }
      }
    }
  }

  void backward_in_parts(const Plan& plan, bool missing_f) {
    const int64_t padded = widest(plan).padded, apart = widest(plan).apart, keys = p.per_channel ? p.C * L : all_keys(plan);
    const FeatureTerms features = take_features(call_scratch, plan.blocks * p.N * apart);
    auto of_span = [&](const Span& s, const Share& own) { return features.at(s.index * p.N * apart + own.samples.begin * s.apart); };
    const BatchTerms terms = take_terms(call_scratch, keys);
    if (p.per_channel) {
      std::vector<std::vector<double>> totals(plan.tasks, std::vector<double>(3 * p.C, 0.0));
      std::vector<A> center(p.C);
      for (int64_t c = 0; c < p.C; ++c) center[c] = p.batch.center().at(c, 0);
      each_span(plan, [&](const Span& s, const Share& own) {
        double* sums = totals[own.task].data();
        SumsPerChannel batch{center.data(), sums, sums + p.C, sums + 2 * p.C, s};
        reduce_samples(s, own.samples, missing_f, batch, of_span(s, own), own.task);
      });
      const Sums sums = take_sums(call_scratch, L, false);
      A var[L] = {}, used[L] = {};
      for (int64_t c = 0; c < p.C; ++c) {
        double total[3] = {};
        for (const auto& part : totals) {
          for (int i = 0; i < 3; ++i) total[i] += part[i * p.C + c];
        }
        std::fill(sums.center, sums.center + L, center[c]);
        std::fill(sums.g, sums.g + L, A(total[0]));
        std::fill(sums.gd, sums.gd + L, A(total[1]));
        std::fill(sums.d, sums.d + L, A(total[2]));
        std::fill(var, var + L, p.batch.used_var().at(c, 0));
        const bool other = p.batch.own() && p.batch.mean.data;
        if (other) std::fill(used, used + L, p.batch.mean.at(c, 0));
        const auto [weight, bias] = finish(c, 1, sums, shift(terms, c * L), var, other ? used : nullptr);
        grads_[0][c] += weight;
        grads_[0][p.C + c] += bias;
      }
      each_span(plan, [&](const Span& s, const Share& own) {
        const BatchTerms expanded = take_terms(task_scratch, s.keys(p.C));
        for (int64_t c = 0; c < p.C; ++c) {
          for (auto [from, to] : {std::pair(terms.center, expanded.center), std::pair(terms.scale, expanded.scale), std::pair(terms.slope, expanded.slope), std::pair(terms.offset, expanded.offset)}) {
            std::fill(to + c * s.padded, to + (c + 1) * s.padded, from[c * L]);
          }
        }
        differentiate(s, own.samples, expanded, of_span(s, own));
      });
      return;
    }
    std::vector<Sums> parts;
    for (int64_t i = 0; i < plan.parts_n; ++i) parts.push_back(take_sums(call_scratch, keys, in_parts(plan)));
    each_span(plan, [&](const Span& s, const Share& own) {
      reduce(s, own.samples, missing_f, parts[own.part].at(place(plan, s)), of_span(s, own), own.task);
    });
    crew.run(plan.tasks, [&](int64_t t) {
      A *var = task_scratch.take<A>(padded), *used = task_scratch.take<A>(padded);
      const Range rows = part_of(plan.blocks * p.C, plan.tasks, t);
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const Span s = span(plan, i / p.C);
        const int64_t c = i % p.C, at = place(plan, s) + c * s.padded;
        const Sums first = parts[0].at(at);
        for (int64_t part = 1; part < plan.parts_n; ++part) {
          const Sums other = parts[part].at(at);
          first.add(other, 0, s.padded);
          first.add_rests(other, s.padded);
        }
        finish_position_row(s, c, first, shift(terms, at), var, used, t);
      }
    });
    each_span(plan, [&](const Span& s, const Share& own) { differentiate(s, own.samples, shift(terms, place(plan, s)), of_span(s, own)); });
  }
};

// The file is compiled several times, side by side, and linked: LIGHTNING_BLN_PART says which engines an object holds. The
// first one holds everything else besides.
template <class A, bool FeaturesInside>
void run(Problem<A>& p, bool backward);
void run_bfloat16(Problem<float>& p, bool backward);  // features outside, in bfloat16

template <class Engine, class A>
void run_here(Problem<A>& p, bool backward) {
  Engine engine(p);
  backward ? engine.backward() : engine.forward();
}

#if LIGHTNING_BLN_PART == 1
template <>
void run<float, true>(Problem<float>& p, bool backward) {
  run_here<Inside<float>>(p, backward);
}
#elif LIGHTNING_BLN_PART == 2
template <>
void run<double, true>(Problem<double>& p, bool backward) {
  run_here<Inside<double>>(p, backward);
}
template <>
void run<double, false>(Problem<double>& p, bool backward) {
  run_here<Outside<double, double>>(p, backward);
}
#elif LIGHTNING_BLN_PART == 3
void run_bfloat16(Problem<float>& p, bool backward) { run_here<Outside<float, BrainFloat>>(p, backward); }
#else
template <>
void run<float, false>(Problem<float>& p, bool backward) {
  p.is_bfloat16 ? run_bfloat16(p, backward) : run_here<Outside<float, float>>(p, backward);
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

void in_parallel(int64_t threads, void (*f)(int64_t, void*), void* context) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) { f(begin, context); });
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

// x as the kernels can take it: x itself, or a copy with the feature axis at 1; and a tensor for a result, in x's layout.
struct Input {
  Tensor x, out;  // as the kernels read and write them
  Tensor result;  // in the memory layout of the given tensor; out itself, unless that was copied
  int64_t given_axis, axis;
  bool copied = false;
  int64_t N, C, P, sn, sc, sp;
  bool features_inside = false;

  Input(const Tensor& given, int64_t feature_dim, const Tensor& result_) : x(given), out(result_), result(result_), given_axis(feature_dim), axis(feature_dim) {
    if (!same_strides(x, out) || !fits()) {
      x = torch::stable::contiguous(move_axis(x, axis, 1));
      out = torch::stable::empty_like(x);
      axis = 1;
      copied = true;
      fits();
    }
  }

  // Another tensor of the given shape with x's strides.
  Tensor like(const Tensor& given) const {
    Tensor moved = copied ? move_axis(given, given_axis, 1) : given;
    if (same_strides(moved, x)) return moved;
    Tensor copy = torch::stable::empty_like(x);
    torch::stable::copy_(copy, moved);
    return copy;
  }

  // The result, once `out` is written.
  const Tensor& finish() const {
    if (copied) {
      Tensor moved = move_axis(result, given_axis, 1);
      torch::stable::copy_(moved, out);
    }
    return result;
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
    features_inside = P == 1 ? (C == 1 || sc == 1) : (C > 1 && sc == 1);
    return sp >= 0 && (features_inside || sp == 1);
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

// How a type is read and written.
template <class A>
struct Format {
  Rows<A> rows;
  bool same_type, is_bfloat16;
};

template <class T, class A>
Format<A> format_of() {
  return {{load_rows<T, A>, store_rows<T, A>, int64_t(sizeof(T))}, std::is_same_v<T, A>, std::is_same_v<T, BrainFloat>};
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
  p.is_bfloat16 = format.is_bfloat16;
  p.eps = A(eps);
  int64_t nominal = in.N;
  if (batch_size) {
    const Tensor whole = batch_size->scalar_type() == ScalarType::Long ? *batch_size : torch::stable::to(*batch_size, ScalarType::Long);
    const int64_t given = *static_cast<const int64_t*>(whole.const_data_ptr());
    if (given > 0) nominal = given;
  }
  const A inverse = A(1) / A(std::max<int64_t>(nominal, 1));
  p.w_f = inverse - A(kDelta);
  p.exact_w_b = 1 - (1 / double(std::max<int64_t>(nominal, 1)) + kDelta);
  p.w_b = A(p.exact_w_b);
  p.scale = A(1.0 / std::sqrt(double(in.C)));
  p.rows = format.rows;
  p.x = static_cast<const char*>(in.x.const_data_ptr());
  const int64_t padded = ceil_div(in.C + 1, kLanes<A>) * kLanes<A>;
  A* W = call_scratch.take<A>(padded);
  A* b = call_scratch.take<A>(padded);
  double* exact = call_scratch.take<double>(in.C);
  std::fill(W, W + padded, A(0));
  std::fill(b, b + padded, A(0));
  std::fill(W, W + in.C, A(1));
  for (const auto& [given, values] : {std::pair(&weight, W), std::pair(&bias, b)}) {
    if (!*given) continue;
    STD_TORCH_CHECK((*given)->dim() == 1 && (*given)->size(0) == in.C,
                    "weight and bias must hold one value for each feature; pass torch.ones(C), say, for an input with C features.");
    read_vector<A>(**given, values);
  }
  for (int64_t c = 0; c < in.C; ++c) {
    exact[c] = double(W[c]) / std::sqrt(double(in.C));
    W[c] = A(exact[c]);
  }
  p.exact_W = exact;
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

// A new tensor, by the shortest way: several are made in each call.
template <class A>
Tensor new_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                         std::is_same_v<A, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class A>
Tensor new_empty(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  return new_strided<A>(sizes, strides);
}

// In place of a statistic that is not needed; an op must return a tensor all the same.
template <class A>
Tensor nothing(bool returned) {
  return returned ? new_empty<A>({0}) : Tensor();
}

// Where batch statistics of x go: x[0]'s strides, as far as those are dense (library.py says the same to the compiler).
template <class A>
Tensor new_batch_statistic(const Tensor& x) {
  const std::vector<int64_t> sizes = without(x, 0);
  if (x.is_contiguous()) return new_empty<A>(sizes);
  std::vector<int64_t> strides;
  for (int64_t d = 1; d < x.dim(); ++d) strides.push_back(x.stride(d));
  return torch::stable::empty_like(new_strided<A>(sizes, strides));
}

// A batch statistic that the kernel writes, directly or by way of a (C, P) array.
template <class A>
struct BatchOutput {
  Tensor tensor, staged;
  int64_t axis, si, sp;

  BatchOutput(const Tensor& x, const Input& in, int64_t feature_dim, bool per_channel, bool wanted, bool returned) : axis(feature_dim - 1) {
    if (!wanted) {
      tensor = nothing<A>(returned);
    } else if (per_channel) {
      tensor = new_empty<A>({in.C});
    } else {
      tensor = new_batch_statistic<A>(x);
    }
    staged = tensor;
    si = 1;
    sp = 0;
    if (!wanted || per_channel) return;
    si = tensor.stride(axis);
    sp = position_stride(tensor, 0, axis);
    if (sp < 0) {
      staged = new_empty<A>({in.C, in.P});
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

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor>;

// y: memory for it. statistics: own ones are results too; else those of features are kept only where they are needed in
// between.
template <class A>
Forward forward_as(const Tensor& y, bool statistics, const Format<A>& format, const Tensor& x, const Optional& weight, const Optional& bias, const Optional& batch_mean, const Optional& batch_var,
                   const Optional& feature_mean, const Optional& feature_var, const Optional& batch_size, int64_t feature_dim, bool per_channel,
                   double eps) {
  call_scratch.reset();
  const Input in(x, feature_dim, y);
  const bool own_b = !batch_mean || !batch_var, own_f = (!feature_mean || !feature_var) && (statistics || own_b);
  BatchOutput<A> own_batch_mean(x, in, feature_dim, per_channel, own_b, statistics), own_batch_var(x, in, feature_dim, per_channel, !batch_var, statistics);
  auto of_feature = [&](bool wanted) { return wanted ? new_empty<A>(without(x, feature_dim)) : nothing<A>(statistics); };
  const Tensor own_feature_mean = of_feature(own_f), own_feature_var = of_feature(own_f && !feature_var);
  if (x.numel() == 0) {
    for (Tensor t : {own_batch_mean.tensor, own_batch_var.tensor, own_feature_mean, own_feature_var}) {
      if (t.defined()) torch::stable::zero_(t);
    }
    return {in.finish(), own_batch_mean.tensor, own_batch_var.tensor, own_feature_mean, own_feature_var};
  }
  Problem<A> p{};
  set_up<A>(p, format, in, weight, bias, batch_size, per_channel, eps);
  p.set_out(in.out.mutable_data_ptr());
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
  if (own_f && !feature_var) p.feature.own_var = static_cast<A*>(own_feature_var.mutable_data_ptr());
  in.features_inside ? run<A, true>(p, false) : run<A, false>(p, false);
  own_batch_mean.finish();
  own_batch_var.finish();
  return {in.finish(), own_batch_mean.tensor, own_batch_var.tensor, own_feature_mean, own_feature_var};
}

template <class A>
Backward backward_as(const Format<A>& format, const Tensor& grad_y, const Tensor& x, const Optional& weight, const Tensor& own_batch_mean, const Tensor& own_batch_var,
                     const Tensor& own_feature_mean, const Tensor& own_feature_var, const Optional& batch_mean, const Optional& batch_var,
                     const Optional& feature_mean, const Optional& feature_var, const Optional& batch_size, int64_t feature_dim, bool per_channel,
                     double eps) {
  call_scratch.reset();
  const Input in(x, feature_dim, torch::stable::empty_like(x));
  const Tensor grad_weight = new_empty<A>({in.C}), grad_bias = new_empty<A>({in.C});
  if (x.numel() == 0) {
    for (Tensor t : {grad_weight, grad_bias}) torch::stable::zero_(t);
    return {in.finish(), grad_weight, grad_bias};
  }
  const Tensor g = in.like(grad_y.scalar_type() == x.scalar_type() ? grad_y : torch::stable::to(grad_y, x.scalar_type()));
  Problem<A> p{};
  set_up<A>(p, format, in, weight, std::nullopt, batch_size, per_channel, eps);
  p.g = static_cast<const char*>(g.const_data_ptr());
  p.set_out(in.out.mutable_data_ptr());
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
  in.features_inside ? run<A, true>(p, true) : run<A, false>(p, true);
  return {in.finish(), grad_weight, grad_bias};
}

// ----------------------------------------------------------------------------------------------------- registration

template <class F>
auto with_types(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float(), float());
    case ScalarType::Double: return f(double(), double());
    case ScalarType::BFloat16: return f(BrainFloat(), float());
    case ScalarType::Half: return f(Half(), float());
    default: STD_TORCH_CHECK(false, "Batch layer normalization needs float32, float64, bfloat16 or float16; call it with x.float(), say.");
  }
}

Forward forward(const Tensor& x, Optional weight, Optional bias, Optional batch_mean, Optional batch_var, Optional feature_mean, Optional feature_var,
                Optional batch_size, int64_t feature_dim, bool per_channel, double eps) {
  return with_types(x, [&](auto t, auto a) {
    return forward_as<decltype(a)>(torch::stable::empty_like(x), true, format_of<decltype(t), decltype(a)>(), x, weight, bias, batch_mean, batch_var, feature_mean, feature_var, batch_size, feature_dim, per_channel, eps);
  });
}

void infer(const Tensor& y, const Tensor& x, Optional weight, Optional bias, Optional batch_mean, Optional batch_var, Optional feature_mean, Optional feature_var,
           Optional batch_size, int64_t feature_dim, bool per_channel, double eps) {
  with_types(x, [&](auto t, auto a) {
    forward_as<decltype(a)>(y, false, format_of<decltype(t), decltype(a)>(), x, weight, bias, batch_mean, batch_var, feature_mean, feature_var, batch_size, feature_dim, per_channel, eps);
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

// Sum in double, in sixteen parts: one would wait for each addition.
template <class A>
BLN_VECTORIZE double sum_of(const A* from, int64_t count) {
  double parts[16] = {};
  const int64_t whole = count - count % 16;
  for (int64_t n = 0; n < whole; n += 16) {
    for (int64_t i = 0; i < 16; ++i) parts[i] += double(from[n + i]);
  }
  for (int64_t n = whole; n < count; ++n) parts[n - whole] += double(from[n]);
  double sum = 0;
  for (double part : parts) sum += part;
  return sum;
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
    if (kept == 1) {
      sums[0] = sum_of(from, count);
    } else {
      for (int64_t n = 0; n < count; ++n) {
        for (int64_t i = 0; i < kept; ++i) sums[i] += double(from[n * kept + i]);
      }
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
  m.impl("infer", TORCH_BOX(&lightning_bln::infer));
  m.impl("batch_layer_norm_backward", TORCH_BOX(&lightning_bln::backward));
  m.impl("accumulate_statistics", TORCH_BOX(&lightning_bln::accumulate));
}
#endif
