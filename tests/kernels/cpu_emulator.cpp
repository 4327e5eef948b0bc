// What instructions of AVX-512 and AMX do, for CPUs that have AVX2 and FMA at most. Linked to kernels in place of the
// instructions (see `EmulatedCpu` in conftest.py): vectors come and go through memory, scalars as they are.
//
// What hardware would refuse, or quietly get wrong, is a fault: tiles that are used unconfigured or beyond their size, a
// configuration that is not released, memory that a task writes to beyond its end. The first one is kept to be read.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, and Instruction Set Extensions
// Programming Reference, chapter 3 (AMX).
#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#define EMULATED extern "C" __attribute__((visibility("default")))

static std::mutex fault_mutex;
static char first_fault[256];

__attribute__((format(printf, 1, 2))) static void fault(const char *format, ...) {
  std::lock_guard<std::mutex> lock(fault_mutex);
  if (first_fault[0]) return;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(first_fault, sizeof first_fault, format, arguments);
  va_end(arguments);
}

// ---------------------------------------------------------------------------------------------------------------------
// AVX-512
// ---------------------------------------------------------------------------------------------------------------------

// a * b of signed 16-bit numbers, summed up by twos.
static int32_t dot_of_pair(const int16_t *a, const int16_t *b, int lane) {
  uint32_t low = int32_t(a[2 * lane]) * b[2 * lane], high = int32_t(a[2 * lane + 1]) * b[2 * lane + 1];
  return int32_t(low + high);  // wraps around where all four are -32768
}

EMULATED void emulated_avx512_pmaddw_d_512(int32_t *result, const int16_t *a, const int16_t *b) {
  for (int i = 0; i < 16; i++) result[i] = dot_of_pair(a, b, i);
}

EMULATED void emulated_avx512_vpdpwssd_512(int32_t *result, const int32_t *total, const int16_t *a, const int16_t *b) {
  for (int i = 0; i < 16; i++) result[i] = int32_t(uint32_t(total[i]) + uint32_t(dot_of_pair(a, b, i)));
}

// a * b of unsigned and signed bytes, summed up by twos, with saturation.
static int16_t dot_of_bytes(const uint8_t *a, const int8_t *b, int lane) {
  int32_t sum = int32_t(a[2 * lane]) * b[2 * lane] + int32_t(a[2 * lane + 1]) * b[2 * lane + 1];
  return int16_t(sum > INT16_MAX ? INT16_MAX : sum < INT16_MIN ? INT16_MIN : sum);
}

EMULATED void emulated_avx512_pmaddubs_w_512(int16_t *result, const uint8_t *a, const int8_t *b) {
  for (int i = 0; i < 32; i++) result[i] = dot_of_bytes(a, b, i);
}

EMULATED void emulated_avx512_vpdpbusd_512(int32_t *result, const int32_t *total, const uint8_t *a, const int8_t *b) {
  for (int i = 0; i < 16; i++) {
    uint32_t sum = uint32_t(total[i]);  // without saturation, also between the products
    for (int j = 4 * i; j < 4 * i + 4; j++) sum += uint32_t(int32_t(a[j]) * b[j]);
    result[i] = int32_t(sum);
  }
}

EMULATED void emulated_avx512_mask_cvtps2dq_512(int32_t *result, const float *x, const int32_t *masked, uint16_t mask,
                                                int32_t rounding) {
  if (rounding != 4) fault("vcvtps2dq: rounding %d is not that of MXCSR", rounding);
  for (int i = 0; i < 16; i++) {
    float rounded = std::nearbyintf(x[i]);
    bool fits = rounded >= -2147483648.0f && rounded < 2147483648.0f;  // NaN does not
    result[i] = !(mask >> i & 1) ? masked[i] : fits ? int32_t(rounded) : INT32_MIN;
  }
}

EMULATED void emulated_avx512_mask_scalef_ps_512(float *result, const float *x, const float *exponent,
                                                 const float *masked, uint16_t mask, int32_t rounding) {
  if (rounding != 4) fault("vscalefps: rounding %d is not that of MXCSR", rounding);
  for (int i = 0; i < 16; i++) {
    float power = std::fmin(std::fmax(std::floor(exponent[i]), -1000.0f), 1000.0f);
    result[i] = mask >> i & 1 ? std::ldexp(x[i], int(power)) : masked[i];
  }
}

EMULATED void emulated_avx512_packssdw_512(int16_t *result, const int32_t *a, const int32_t *b) {
  for (int i = 0; i < 32; i++) {
    int32_t x = (i & 4 ? b : a)[i / 8 * 4 + i % 4];  // in 128-bit parts: four of a, then four of b
    result[i] = int16_t(x > INT16_MAX ? INT16_MAX : x < INT16_MIN ? INT16_MIN : x);
  }
}

EMULATED void emulated_avx512_packsswb_512(int8_t *result, const int16_t *a, const int16_t *b) {
  for (int i = 0; i < 64; i++) {
    int16_t x = (i & 8 ? b : a)[i / 16 * 8 + i % 8];  // in 128-bit parts: eight of a, then eight of b
    result[i] = int8_t(x > INT8_MAX ? INT8_MAX : x < INT8_MIN ? INT8_MIN : x);
  }
}

EMULATED void emulated_avx512_permvar_hi_512(uint16_t *result, const uint16_t *table, const uint16_t *index) {
  for (int i = 0; i < 32; i++) result[i] = table[index[i] & 31];
}

static uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  switch (std::fpclassify(x)) {
    case FP_ZERO:
    case FP_SUBNORMAL:
      return bits >> 16 & 0x8000;
    case FP_NAN:
      return bits >> 16 | 0x40;
    case FP_INFINITE:
      return bits >> 16;
    default:
      return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
}

EMULATED void emulated_avx512bf16_cvtne2ps2bf16_512(uint16_t *result, const float *high, const float *low) {
  for (int i = 0; i < 32; i++) result[i] = to_bfloat16(i < 16 ? low[i] : high[i - 16]);
}

// ---------------------------------------------------------------------------------------------------------------------
// AMX
// ---------------------------------------------------------------------------------------------------------------------

struct Tile {
  int rows = 0, bytes = 0;  // as configured
  alignas(64) uint8_t data[16][64];

  void clear() { memset(data, 0, sizeof data); }
  float *floats(int row) { return reinterpret_cast<float *>(data[row]); }
};

static std::atomic<int> threads_with_tiles{0};

struct Tiles {
  bool are_configured = false;
  Tile tile[8];

  void release() {
    if (are_configured) threads_with_tiles--;
    are_configured = false;
  }
  ~Tiles() { release(); }
};

static thread_local Tiles tiles;

// The tile, or none and a fault.
static Tile *tile_of(const char *instruction, int number) {
  if (!tiles.are_configured) return fault("%s: this thread has no tiles configured", instruction), nullptr;
  if (number > 7 || !tiles.tile[number].rows) return fault("%s: no tile %d", instruction, number), nullptr;
  return &tiles.tile[number];
}

EMULATED void emulated_ldtilecfg(const uint8_t *configuration) {
  const uint8_t *bytes = configuration + 16, *rows = configuration + 48;
  if (configuration[0] > 1) return fault("ldtilecfg: palette %d", configuration[0]);
  tiles.release();
  if (!configuration[0]) return;
  bool reserved_are_zero = true;
  for (int i = 2; i < 64; i++) reserved_are_zero &= (i >= 16 && i < 32) || (i >= 48 && i < 56) || !configuration[i];
  if (!reserved_are_zero) return fault("ldtilecfg: a reserved byte is not zero");
  for (int i = 0; i < 8; i++) {
    Tile &tile = tiles.tile[i];
    tile.rows = rows[i];
    tile.bytes = bytes[2 * i] | bytes[2 * i + 1] << 8;
    if (tile.rows > 16 || tile.bytes > 64 || !tile.rows != !tile.bytes)
      return fault("ldtilecfg: tile %d has %d rows of %d bytes", i, tile.rows, tile.bytes);
    tile.clear();
  }
  tiles.are_configured = true;
  threads_with_tiles++;
}

EMULATED void emulated_tilerelease() { tiles.release(); }

EMULATED void emulated_tilezero(uint8_t number) {
  if (Tile *tile = tile_of("tilezero", number)) tile->clear();
}

EMULATED void emulated_tileloadd64(uint8_t number, const uint8_t *memory, int64_t stride) {
  Tile *tile = tile_of("tileloadd", number);
  if (!tile) return;
  tile->clear();
  for (int row = 0; row < tile->rows; row++) memcpy(tile->data[row], memory + row * stride, tile->bytes);
}

EMULATED void emulated_tilestored64(uint8_t number, uint8_t *memory, int64_t stride) {
  Tile *tile = tile_of("tilestored", number);
  if (!tile) return;
  for (int row = 0; row < tile->rows; row++) memcpy(memory + row * stride, tile->data[row], tile->bytes);
}

// Its own function, so that arithmetic stays where the control register is set.
__attribute__((noipa)) static void sum_up_products(Tile &total, const Tile &a, const Tile &b) {
  const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
  for (int m = 0; m < total.rows; m++) {
    __m256 sums[2][2] = {};  // of even and odd inputs, which are added to one another last
    for (int k = 0; k < a.bytes / 4; k++) {
      uint32_t pair;
      memcpy(&pair, a.data[m] + 4 * k, sizeof pair);
      __m256i both = _mm256_set1_epi32(int(pair));
      __m256 x[2] = {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), _mm256_castsi256_ps(_mm256_and_si256(both, upper))};
      for (int half = 0; half < 2; half++) {
        __m256i weights = _mm256_load_si256(reinterpret_cast<const __m256i *>(b.data[k]) + half);
        __m256 w[2] = {_mm256_castsi256_ps(_mm256_slli_epi32(weights, 16)),
                       _mm256_castsi256_ps(_mm256_and_si256(weights, upper))};
        for (int odd = 0; odd < 2; odd++) sums[half][odd] = _mm256_fmadd_ps(x[odd], w[odd], sums[half][odd]);
      }
    }
    for (int half = 0; half < 2; half++) {
      float *place = total.floats(m) + 8 * half;
      __m256 sum = _mm256_add_ps(sums[half][0], sums[half][1]);
      _mm256_store_ps(place, _mm256_add_ps(_mm256_load_ps(place), sum));
    }
  }
}

EMULATED void emulated_tdpbf16ps(uint8_t total, uint8_t first, uint8_t second) {
  Tile *c = tile_of("tdpbf16ps", total), *a = tile_of("tdpbf16ps", first), *b = tile_of("tdpbf16ps", second);
  if (!c || !a || !b) return;
  if (total == first || total == second || first == second) return fault("tdpbf16ps: one tile serves twice");
  bool fits = a->rows == c->rows && b->bytes == c->bytes && a->bytes == 4 * b->rows && !(b->bytes % 4);
  if (!fits) return fault("tdpbf16ps: tiles do not fit together");
  // All exceptions masked, rounding to nearest, denormals as inputs and as outcomes zero: whatever MXCSR says.
  unsigned before = _mm_getcsr();
  _mm_setcsr(0x1f80 | 0x8000 | 0x0040);
  sum_up_products(*c, *a, *b);
  _mm_setcsr(before);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory of tasks
// ---------------------------------------------------------------------------------------------------------------------

static const size_t FENCE = 64;
static const uint8_t POISON = 0xff;  // NaN in float32 and in bfloat16: sums show where it has been read

EMULATED void *emulated_alloc(int, int, uint64_t bytes, int, int) {
  size_t whole = (bytes + 63) / 64 * 64;
  auto *memory = static_cast<uint8_t *>(std::aligned_alloc(128, (2 * FENCE + whole + 127) / 128 * 128));
  memcpy(memory, &bytes, sizeof bytes);
  memset(memory + sizeof bytes, POISON, 2 * FENCE + whole - sizeof bytes);
  return memory + FENCE;  // a multiple of 64, which is what buffers ask for, and not of 128
}

EMULATED int emulated_free(int, int, void *pointer) {
  auto *memory = static_cast<uint8_t *>(pointer) - FENCE;
  uint64_t bytes;
  memcpy(&bytes, memory, sizeof bytes);
  bool is_whole = true;
  for (size_t i = sizeof bytes; i < FENCE; i++) is_whole &= memory[i] == POISON;
  for (size_t i = 0; i < FENCE; i++) is_whole &= memory[FENCE + bytes + i] == POISON;
  if (!is_whole) fault("a task wrote beyond its %lu bytes of memory", static_cast<unsigned long>(bytes));
  std::free(memory);
  return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// For Python
// ---------------------------------------------------------------------------------------------------------------------

// Copies the first fault, if there was one, and forgets it. Call it when no kernel is running.
EMULATED void emulated_fault(char *text) {
  if (threads_with_tiles) fault("tilerelease: %d threads have tiles configured", threads_with_tiles.load());
  std::lock_guard<std::mutex> lock(fault_mutex);
  memcpy(text, first_fault, sizeof first_fault);
  first_fault[0] = 0;
}
