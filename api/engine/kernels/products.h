// Matrix products y = x W^T in bfloat16 with the processor's own instruction for them (AVX512_BF16).
//
// A product of few rows is bound by reading the weights, one of many rows by arithmetic; in between both must overlap.
// Weights are stored in panels of 32 features, in the order of their multiplication. Threads take one panel after another
// from a shared counter, so that a thread that has lost its core to another program does not delay the rest; and while a
// panel is multiplied, the next one is prefetched.

#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <optional>
#include <vector>

#include "checks.h"

namespace glm {

using bf16 = c10::BFloat16;

constexpr int64_t PANEL = 32;        // features
constexpr int64_t LANES = 16;        // float32 numbers in a register
constexpr int64_t TILE = 12;         // rows whose sums for a panel fit into registers
constexpr int64_t MAX_ROWS = 512;    // packed together
constexpr int64_t MAX_DEPTH = 8192;  // inputs of a panel that fit into the L2 cache
constexpr int64_t HUGE_PAGE = int64_t{2} << 20;

extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();

// Allocates aligned to cache lines, so that loading a register touches one line only.
template <class T>
struct Aligned {
  using value_type = T;
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* from, size_t) { ::operator delete(from, std::align_val_t{64}); }
  template <class U>
  bool operator==(const Aligned<U>&) const { return true; }
};

// Runs work(thread, threads) in every thread. It must neither allocate nor throw: an exception would end the process.
template <class Work>
void in_parallel(const Work& work) {
#pragma omp parallel num_threads(at::get_num_threads())
  work(omp_get_thread_num(), omp_get_num_threads());
}

inline void barrier() {
#pragma omp barrier
}

// A tensor in pages of 2 MiB where the system has them: reading is 20 % faster than in pages of 4 KiB.
inline Tensor empty_huge(at::IntArrayRef shape, const at::TensorOptions& options) {
  const int64_t bytes = c10::multiply_integers(shape) * options.dtype().itemsize();
  if (bytes < HUGE_PAGE) return at::empty(shape, options);
  const size_t mapped = bytes + HUGE_PAGE;
  void* map = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(map != MAP_FAILED, "not enough memory for ", bytes, " bytes of weights");
  char* start = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(map) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
  madvise(start, bytes, MADV_HUGEPAGE);
  return at::from_blob(start, shape, [map, mapped](void*) { munmap(map, mapped); }, options);
}

// Packs a weight [features, inputs] -> [panels, inputs / 2, PANEL, 2]. `gated`: the first half of the features are the
// gates of the second half; a panel has 16 of each.
inline Tensor pack(const Tensor& weight, bool gated) {
  check_bf16(weight, 2, "pack", "weight");
  const int64_t features = weight.size(0), inputs = weight.size(1), pairs = inputs / 2;
  TORCH_CHECK(features % PANEL == 0 && inputs % 2 == 0, "pack: ", features, " x ", inputs, " does not fit");
  Tensor packed = empty_huge({features / PANEL, pairs, PANEL, 2}, weight.options());
  const uint32_t* from = reinterpret_cast<const uint32_t*>(weight.const_data_ptr<bf16>());
  uint32_t* to = reinterpret_cast<uint32_t*>(packed.data_ptr<bf16>());
  for (int64_t panel = 0; panel < features / PANEL; ++panel) {
    for (int64_t i = 0; i < PANEL; ++i) {
      const int64_t half = panel * LANES + i % LANES + (i < LANES ? 0 : features / 2);
      const uint32_t* row = from + (gated ? half : panel * PANEL + i) * pairs;
      for (int64_t k = 0; k < pairs; ++k) to[(panel * pairs + k) * PANEL + i] = row[k];
    }
  }
  return packed;
}

// What is prefetched while a tile is multiplied.
struct Prefetch {
  const char* at;
  int64_t step;  // bytes for each pair of inputs: 0, 64 or 128
};

// e^x as 2^n times a polynomial of the remainder (coefficients of Cephes' expf): exact to the last bits of a float32.
inline __m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.3f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1)));
  return _mm512_scalef_ps(p, n);
}

inline __m512 widened(__m256i numbers) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16)); }
inline __m256i narrowed(__m512 numbers) { return (__m256i)_mm512_cvtneps_pbh(numbers); }
inline __m512 as_bf16(__m512 numbers) { return widened(narrowed(numbers)); }
inline void store(bf16* to, __m512 numbers) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowed(numbers)); }
inline __m512 load(const bf16* from) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }

// Epilogues, applied to the sums of a tile: add a bias, or multiply by the silu of the gates.
struct Biased {
  const bf16* bias;
  void operator()(__m512 low, __m512 high, int64_t panel, int, bf16* row) const {
    const int64_t at = panel * PANEL;
    if (bias) low = _mm512_add_ps(low, load(bias + at)), high = _mm512_add_ps(high, load(bias + at + LANES));
    store(row + at, low);
    store(row + at + LANES, high);
  }
};

struct Gated {
  void operator()(__m512 gate, __m512 up, int64_t panel, int, bf16* row) const {  // rounded where torch rounds
    gate = as_bf16(gate);
    const __m512 denominator = _mm512_add_ps(_mm512_set1_ps(1), exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
    store(row + panel * LANES, _mm512_mul_ps(as_bf16(_mm512_div_ps(gate, denominator)), as_bf16(up)));
  }
};

struct Product {
  const bf16* weights;
  int64_t panels, inputs, rows;
  const bf16* x;  // in the layout of pack_rows
  bf16* out;
  int64_t width;  // of a row of `out`
};

// Multiplies ROWS rows by one panel. x [pairs][ROWS][2], w [pairs][PANEL][2]; `sums` carries the sums from one depth to
// the next.
template <int ROWS, class Epilogue, class Out>
void multiply(const bf16* w, const bf16* x, int64_t pairs, float* sums, bool first, bool last, Prefetch prefetch,
              const Epilogue& epilogue, int64_t panel, Out* out, int64_t width) {
  __m512 sum[ROWS][2];  // in registers, provided that the compiler unrolls every loop over it
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
    sum[r][0] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + 2 * r * LANES);
    sum[r][1] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (2 * r + 1) * LANES);
  }
  for (int64_t k = 0; k < pairs; ++k) {
    const __m512bh low = (__m512bh)_mm512_load_si512(w + k * 2 * PANEL);
    const __m512bh high = (__m512bh)_mm512_load_si512(w + k * 2 * PANEL + PANEL);
    _mm_prefetch(prefetch.at, _MM_HINT_T1);
    if (prefetch.step > 64) _mm_prefetch(prefetch.at + 64, _MM_HINT_T1);
    prefetch.at += prefetch.step;
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + (k * ROWS + r) * 2, sizeof pair);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], low, both);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], high, both);
    }
  }
  if (last) {
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) epilogue(sum[r][0], sum[r][1], panel, r, out + r * width);
  } else {
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      _mm512_storeu_ps(sums + 2 * r * LANES, sum[r][0]);
      _mm512_storeu_ps(sums + (2 * r + 1) * LANES, sum[r][1]);
    }
  }
}

template <class Epilogue, class Out, int... ROWS>
constexpr auto by_rows(std::integer_sequence<int, ROWS...>) {
  return std::array<decltype(&multiply<1, Epilogue, Out>), sizeof...(ROWS)>{&multiply<ROWS + 1, Epilogue, Out>...};
}

// Rows of each tile but the last: shared out evenly, because a tile of one or two rows takes as long as one of three.
inline int64_t tile_rows(int64_t rows) {
  const int64_t tiles = (rows + TILE - 1) / TILE;
  return (rows + tiles - 1) / tiles;
}

// x [rows, inputs] -> for each tile [inputs / 2][rows of the tile][2]; every `step`th tile from `first` on.
inline void pack_rows(const bf16* x, int64_t rows, int64_t inputs, int64_t first, int64_t step, bf16* packed) {
  const int64_t pairs = inputs / 2, each = tile_rows(rows);
  for (int64_t start = first * each; start < rows; start += step * each) {
    const int64_t count = std::min(each, rows - start);
    const uint32_t* from = reinterpret_cast<const uint32_t*>(x + start * inputs);
    uint32_t* to = reinterpret_cast<uint32_t*>(packed + start * inputs);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t k = 0; k < pairs; ++k) to[k * count + r] = from[r * pairs + k];
  }
}

inline int64_t depths_of(int64_t inputs) { return (inputs + MAX_DEPTH - 1) / MAX_DEPTH; }

// One thread's share of a product: one panel after another until none is left. With several depths, `sums` has room for
// rows * PANEL sums that are carried from one to the next.
template <class Epilogue>
void multiply_panels(const Product& product, const Epilogue& epilogue, std::atomic<int64_t>& next, float* sums) {
  static constexpr auto kernels = by_rows<Epilogue, bf16>(std::make_integer_sequence<int, TILE>());
  const int64_t pairs = product.inputs / 2, each = tile_rows(product.rows);
  const int64_t depths = depths_of(product.inputs), depth = (pairs + depths - 1) / depths;
  int64_t panel = next.fetch_add(1);
  while (panel < product.panels) {
    const int64_t after = next.fetch_add(1);
    const bf16* weights = product.weights + panel * pairs * 2 * PANEL;
    const char* following =
        reinterpret_cast<const char*>(product.weights + std::min(after, product.panels - 1) * pairs * 2 * PANEL);
    for (int64_t k = 0; k < pairs; k += depth) {
      const int64_t count = std::min(depth, pairs - k);
      for (int64_t row = 0; row < product.rows; row += each) {
        // With several tiles, the first two prefetch one half of the next panel each.
        Prefetch prefetch{following + k * 128, 128};
        if (each < product.rows) prefetch = {following + k * 128 + (row ? count * 64 : 0), row <= each ? 64 : 0};
        const int64_t rows = std::min(each, product.rows - row);
        kernels[rows - 1](weights + k * 2 * PANEL, product.x + row * product.inputs + k * rows * 2, count,
                          depths > 1 ? sums + row * PANEL : nullptr, k == 0, k + count == pairs, prefetch, epilogue, panel,
                          product.out + row * product.width, product.width);
      }
    }
    panel = after;
  }
}

template <class Epilogue>
Tensor product_of(const Tensor& x, const Tensor& packed, int64_t width, const Epilogue& epilogue) {
  check_bf16(x, 2, "product", "x");
  const int64_t rows = x.size(0), inputs = x.size(1);
  TORCH_CHECK(inputs == 2 * packed.size(1), "product: x ", x.sizes(), " does not fit weights ", packed.sizes());
  Tensor out = at::empty({rows, width}, x.options());
  Tensor ordered = at::empty({std::min(rows, MAX_ROWS), inputs}, x.options());
  const int64_t sums_each = depths_of(inputs) > 1 ? std::min(rows, MAX_ROWS) * PANEL : 0;  // for each thread
  Tensor sums = at::empty({at::get_num_threads(), sums_each}, x.options().dtype(at::kFloat));
  float* all_sums = sums.data_ptr<float>();
  const bf16* from = x.const_data_ptr<bf16>();
  bf16* packed_rows = ordered.data_ptr<bf16>();
  Product product{packed.const_data_ptr<bf16>(), packed.size(0), inputs, 0, packed_rows, nullptr, width};
  for (int64_t row = 0; row < rows; row += MAX_ROWS) {
    product.rows = std::min(MAX_ROWS, rows - row);
    product.out = out.data_ptr<bf16>() + row * width;
    std::atomic<int64_t> next{0};
    in_parallel([&](int64_t thread, int64_t threads) {
      pack_rows(from + row * inputs, product.rows, inputs, thread, threads, packed_rows);
      barrier();
      multiply_panels(product, epilogue, next, all_sums + thread * sums_each);
    });
  }
  return out;
}

inline void check_panels(const Tensor& packed) {
  check_bf16(packed, 4, "product", "weights");
  check_size(packed, 2, PANEL, "product", "weights");
  check_size(packed, 3, 2, "product", "weights");
  TORCH_CHECK(reinterpret_cast<uintptr_t>(packed.const_data_ptr<bf16>()) % 64 == 0, "product: the weights are not aligned");
}

// x [rows, inputs] -> [rows, features]
inline Tensor product(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias) {
  check_panels(packed);
  if (bias) {
    check_bf16(*bias, 1, "product", "bias");
    check_size(*bias, 0, packed.size(0) * PANEL, "product", "bias");
  }
  return product_of(x, packed, packed.size(0) * PANEL, Biased{bias ? bias->const_data_ptr<bf16>() : nullptr});
}

// x [rows, inputs] -> silu of the first half of the features times the second half: [rows, features / 2]
inline Tensor gated_product(const Tensor& x, const Tensor& packed) {
  check_panels(packed);
  return product_of(x, packed, packed.size(0) * LANES, Gated{});
}

}  // namespace glm
