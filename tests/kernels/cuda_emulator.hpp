// Runs one CUDA kernel of TVM's on a CPU: as many threads as a block has, block after block. Compiled with a sanitizer,
// it finds what wrong results would not show: reads and writes beyond a tensor or a shared buffer (address), and shared
// memory that is used without a barrier (thread).
//
// It knows what the kernels use: __syncthreads, shared memory of a fixed size, atomicAdd, float16, bfloat16, and
// fragments of 16 x 16 x 16 on tensor cores. The first thread of a warp holds all 256 numbers of a fragment, and works for the others.
//
// Usage: program FILE. FILE holds int64 numbers (blocks along x, y and z, threads of a block, parameters), then for
// each parameter its size in bytes, whether it is a pointer, and its bytes. The bytes of pointers are written back.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define WITHOUT_THREAD_SANITIZER __attribute__((noinline, no_sanitize("thread")))
#else
#define WITHOUT_THREAD_SANITIZER
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(threads)
#define alignas(bytes) __attribute__((aligned(bytes)))  // which may stand where TVM puts it
#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short

struct Index {
  int x, y, z;
};

// Threads are coroutines of one system thread, each on until it comes to a barrier. The thread sanitizer takes them for
// threads that know of one another through barriers only.
struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 << 10);
  void *sanitizer = nullptr;
  bool is_done = false;
};

static ucontext_t scheduler;
static void *scheduler_sanitizer;
static std::vector<Thread> block;
static Index current_block;
static int current_thread;
// What is done between two barriers is one round; two marks, so that nobody learns from the round that it is in.
static int current_round;
static char barriers[2];

WITHOUT_THREAD_SANITIZER static Index thread_index() { return {current_thread, 0, 0}; }
WITHOUT_THREAD_SANITIZER static Index block_index() { return current_block; }
WITHOUT_THREAD_SANITIZER static ucontext_t *current_context() { return &block[current_thread].context; }
#define threadIdx (thread_index())
#define blockIdx (block_index())

static void switch_context(ucontext_t *from, ucontext_t *to, void *sanitizer) {
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(from, to);
}

WITHOUT_THREAD_SANITIZER static char *mark(int round) { return &barriers[round % 2]; }

WITHOUT_THREAD_SANITIZER static void pass_on() {
#ifdef __SANITIZE_THREAD__
  __tsan_release(mark(current_round));
#endif
}

WITHOUT_THREAD_SANITIZER static void take_over() {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(mark(current_round + 1));
#endif
}

static void __syncthreads() {
  pass_on();
  switch_context(current_context(), &scheduler, scheduler_sanitizer);
  take_over();
}

template <class T>
static inline T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
static inline T min(T a, T b) {
  return b < a ? b : a;
}

static inline int atomicAdd(int *to, int value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }

using half = _Float16;

struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  explicit nv_bfloat16(float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    bits = std::isnan(x) ? 0x7fff : (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  }
  operator float() const {
    uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
};

static inline half __float2half_rn(float x) { return half(x); }
static inline nv_bfloat16 __float2bfloat16_rn(float x) { return nv_bfloat16(x); }

namespace nvcuda::wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16);
  float x[16][16];
};

static bool is_idle() { return threadIdx.x % 32; }

template <class F>
void fill_fragment(F &f, float value) {
  if (is_idle()) return;
  for (auto &row : f.x)
    for (auto &x : row) x = value;
}

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout> &f, const T *from, unsigned stride) {
  if (is_idle()) return;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j)
      f.x[i][j] = float(std::is_same_v<Layout, row_major> ? from[i * stride + j] : from[j * stride + i]);
}

template <class D, class A, class B, class C>
void mma_sync(D &d, const A &a, const B &b, const C &c) {
  if (is_idle()) return;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      float sum = c.x[i][j];
      for (int k = 0; k < 16; ++k) sum += a.x[i][k] * b.x[k][j];
      d.x[i][j] = sum;
    }
}

template <class F>
void store_matrix_sync(float *to, const F &f, unsigned stride, layout_t layout) {
  if (is_idle()) return;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[layout == mem_row_major ? i * stride + j : j * stride + i] = f.x[i][j];
}
}  // namespace nvcuda::wmma

static void (*run_thread)();

WITHOUT_THREAD_SANITIZER static void finish_thread() { block[current_thread].is_done = true; }

static void start_thread() {
  take_over();
  run_thread();
  pass_on();
  finish_thread();
  switch_context(current_context(), &scheduler, scheduler_sanitizer);
}

// Run the threads of one block from barrier to barrier.
WITHOUT_THREAD_SANITIZER static void run_block(int threads) {
  block.resize(threads);
  for (auto &thread : block) {
    getcontext(&thread.context);
    thread.context.uc_stack = {thread.stack.data(), 0, thread.stack.size()};
    thread.is_done = false;
    makecontext(&thread.context, start_thread, 0);
#ifdef __SANITIZE_THREAD__
    if (!thread.sanitizer) thread.sanitizer = __tsan_create_fiber(0);
#endif
  }
  pass_on();
  for (int done = 0; done < threads;) {
    done = 0;
    ++current_round;
    for (current_thread = 0; current_thread < threads; ++current_thread) {
      Thread &thread = block[current_thread];
      if (thread.is_done) {
        std::fprintf(stderr, "thread %d does not come to a barrier that others wait at\n", current_thread);
        std::exit(3);
      }
      switch_context(&scheduler, &thread.context, thread.sanitizer);
      done += thread.is_done;
    }
  }
  ++current_round;
  take_over();
}

template <class... Arguments, std::size_t... I>
void call(void (*kernel)(Arguments...), const std::vector<std::vector<char>> &values, std::index_sequence<I...>) {
  kernel(*reinterpret_cast<const Arguments *>(values[I].data())...);
}

template <class... Arguments>
int emulate(void (*kernel)(Arguments...), const char *name) {
  std::FILE *file = std::fopen(name, "r+b");
  auto number = [&] {
    int64_t x;
    if (std::fread(&x, sizeof x, 1, file) != 1) std::abort();
    return x;
  };
  int64_t grid[3] = {number(), number(), number()}, threads = number(), count = number();
  if (count != sizeof...(Arguments)) return 2;
  std::vector<std::vector<char>> values;
  std::vector<std::tuple<long, char *, int64_t>> memory;
  for (int64_t i = 0; i < count; ++i) {
    int64_t size = number(), is_pointer = number();
    long place = std::ftell(file);
    char *bytes = static_cast<char *>(std::malloc(size));
    if (size && std::fread(bytes, size, 1, file) != 1) std::abort();
    if (is_pointer) {
      memory.emplace_back(place, bytes, size);
      values.emplace_back(reinterpret_cast<char *>(&bytes), reinterpret_cast<char *>(&bytes + 1));
    } else {
      values.emplace_back(bytes, bytes + size);
      std::free(bytes);
    }
  }
  static void (*const the_kernel)(Arguments...) = kernel;
  static const std::vector<std::vector<char>> &the_values = values;
  run_thread = [] { call(the_kernel, the_values, std::index_sequence_for<Arguments...>()); };
#ifdef __SANITIZE_THREAD__
  scheduler_sanitizer = __tsan_get_current_fiber();
#endif
  for (int z = 0; z < grid[2]; ++z)
    for (int y = 0; y < grid[1]; ++y)
      for (int x = 0; x < grid[0]; ++x) {
        current_block = {x, y, z};
        run_block(threads);
      }
  for (auto [place, bytes, size] : memory) {
    std::fseek(file, place, SEEK_SET);
    std::fwrite(bytes, 1, size, file);
    std::free(bytes);
  }
  return std::fclose(file);
}
