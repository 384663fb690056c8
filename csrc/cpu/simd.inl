// Vectors of W lanes, the micro-kernel, exp2, and the small tools every phase uses. Included inside the unnamed
// namespace of one instruction set, which has defined
//   W, G, U, MR          lanes, elements per 32-bit group, offset of unsigned operands (128 or 0), most rows of a tile
//   elem, vop, vacc      operand element, loaded operand vector, accumulator vector
// and defines, after this file, the primitives declared here.
//
// The register tile is up to MR rows x 2 vectors: MR * 2 accumulators, 2 operand vectors, 1 broadcast, 1 product. The
// more rows, the fewer loads an instruction of arithmetic needs: 8 rows of 32 registers, 6 of 16.
#define SAGE_INLINE inline __attribute__((always_inline))
#define SAGE_LAMBDA __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));

constexpr int NV = 2;        // vectors per register tile
constexpr int LB = NV * W;   // lanes per register tile ("lane block")
constexpr int T = kQueryTile;
static_assert(T % LB == 0 && (MR == 8 || MR == 6 || MR == 4), "tiles divide each other");

// ---- primitives of the instruction set -------------------------------------------------------------------------
SAGE_INLINE vop load_op(const elem* p);
SAGE_INLINE vop broadcast_op(const elem* p);           // one group to every lane
template <bool kRowUnsigned>
SAGE_INLINE vacc dot(vacc acc, vop lanes, vop row);    // which side is unsigned matters to vpdpbusd only
SAGE_INLINE vacc acc_splat(int32_t x);
SAGE_INLINE vacc acc_load(const int32_t* p);
SAGE_INLINE vf to_float(vacc x);
SAGE_INLINE vf fma(vf a, vf b, vf c);                  // a * b + c
SAGE_INLINE vf vmax(vf a, vf b);                       // a > b ? a : b, so b if either is NaN
SAGE_INLINE vf vmin(vf a, vf b);                       // a < b ? a : b, so b if either is NaN
SAGE_INLINE vi umax(vi a, vi b);                       // unsigned
SAGE_INLINE bool any(vi mask);
SAGE_INLINE int32_t hmax(vi x);                        // largest lane, unsigned
SAGE_INLINE vf exp2(vf x);                             // relative error 2e-7; x <= 126; tiny or 0 far below
SAGE_INLINE vf round_even(vf x);                       // |x| < 2^22
SAGE_INLINE void pack_rows(elem* dst, const vf (&x)[G]);    // G rows, W lanes -> [lane][G], rounded; values >= 0
SAGE_INLINE void pack_signed(elem* dst, const vf (&x)[G]);  // the same for values of either sign
template <class F>
SAGE_INLINE void pack_lanes(elem* dst, F row);              // row(lane) gives W lanes of a row of T, to be rounded
void half_to_float8(const uint16_t* src, float* dst);
void float_to_half8(const float* src, uint16_t* dst);
// bf16 dot products: pairs, [lane][2] x broadcast pair; compiled when kHalfDot, run when half_dot()
static bool half_dot();
SAGE_INLINE vf dot_bf16(vf acc, const uint16_t* lanes, const uint16_t* row);

// ---- vectors ---------------------------------------------------------------------------------------------------
SAGE_INLINE vf splat(float x) { return x - vf{}; }
SAGE_INLINE vf load(const float* p) { vf x; __builtin_memcpy(&x, p, sizeof x); return x; }
SAGE_INLINE void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof x); }
SAGE_INLINE vi loadi(const int32_t* p) { vi x; __builtin_memcpy(&x, p, sizeof x); return x; }
SAGE_INLINE vu loadu(const uint32_t* p) { vu x; __builtin_memcpy(&x, p, sizeof x); return x; }
SAGE_INLINE vi bits(vf x) { return (vi)x; }
SAGE_INLINE vf from_bits(vi x) { return (vf)x; }
SAGE_INLINE vf vabs(vf x) { return from_bits(bits(x) & 0x7fffffff); }
// Largest magnitude: unsigned comparison of the bits, so that Inf and NaN (of either sign) win and survive.
SAGE_INLINE vf amax(vf a, vf x) { return from_bits(umax(bits(a), bits(vabs(x)))); }
SAGE_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
SAGE_INLINE vf quotient(float a, vf x) { return splat(a) / x; }

// 2^r = 1 + c1 r + ... + c5 r^5, least relative error with the first coefficient held at 1.
SAGE_INLINE vf polynomial(vf r, float c1, float c2, float c3, float c4, float c5) {
  vf p = fma(splat(c5), r, splat(c4));
  p = fma(p, r, splat(c3));
  p = fma(p, r, splat(c2));
  p = fma(p, r, splat(c1));
  return fma(p, r, splat(1.0f));
}
// Adding 1.5 * 2^23 rounds x and leaves the integer in the low bits: 2^round(x) is one shift and one add away.
SAGE_INLINE vf exp2_by_shift(vf x) {
  x = vmax(splat(-125.0f), x);
  const vf shifted = x + 12582912.0f;
  const vf r = x - (shifted - 12582912.0f);  // [-1/2, 1/2]
  const vf p = polynomial(r, 0.6931470036506653f, 0.24022242426872253f, 0.05550733581185341f, 0.009671512991189957f,
                          0.001326472731307149f);
  return from_bits(bits(p) + (bits(shifted) << 23));
}

// ---- rounding by thresholds (docs/numerics.md) -----------------------------------------------------------------
// A threshold, -1/2 to 1/2 in units of 2^32, is that of the row, the last 12 bits of a float, plus that of the column,
// by the position of its key; the sum wraps.
constexpr float kSmallP = 2.5f, kSmallDs = 1.5f;  // in steps of their scales: only what is smaller gets one (DITHERED_BELOW)
static inline uint32_t row_threshold(float content) {
  uint32_t u;
  __builtin_memcpy(&u, &content, 4);
  return u << 20 | 1u << 19;
}
static inline uint32_t column_threshold(int64_t key) { return (uint32_t)key * 2531u << 20; }

// x * scale + shift, and of small ones the threshold added: what is then rounded to the nearest integer.
SAGE_INLINE vf dithered(vf x, vf scale, vi small, vu row, uint32_t column, float shift) {
  const vf y = fma(x, scale, splat(shift)), threshold = __builtin_convertvector((vi)(row + column), vf);
  return select(small, fma(threshold, splat(0x1p-32f), y), y);
}

// ---- the micro-kernel ------------------------------------------------------------------------------------------
// acc[M][NV] += rows x lanes over `groups` groups. The row stride is a compile-time constant, so that each operand is one
// address register plus displacements.
template <int kLaneStep, int kRowStep, bool kRowUnsigned, int M>
SAGE_INLINE void multiply(vacc (&acc)[M][NV], const elem* lanes, const elem* rows, int groups,
                          int64_t group_step = G) {
  for (int g = 0; g < groups; ++g, lanes += kLaneStep, rows += group_step) {
    vop x[NV];
    for (int n = 0; n < NV; ++n) x[n] = load_op(lanes + n * W * G);
    for (int m = 0; m < M; ++m) {
      const vop row = broadcast_op(rows + m * kRowStep);
      for (int n = 0; n < NV; ++n) acc[m][n] = dot<kRowUnsigned>(acc[m][n], x[n], row);
    }
  }
}

// f(Rows<M>, first row) over `rows` rows, a multiple of 8, in register tiles as large as they divide.
template <int M> struct Rows { static constexpr int count = M; };
template <class F>
SAGE_INLINE void for_rows(int rows, F f) {
  if constexpr (MR == 6) {
    int r = 0;
    for (; rows - r >= 6 && rows - r != 8; r += 6) f(Rows<6>{}, r);
    for (; r < rows; r += 4) f(Rows<4>{}, r);
  } else {
    for (int r = 0; r < rows; r += MR) f(Rows<MR>{}, r);
  }
}

// A number that a sum of a few hundred cannot push over the edge; NaN stays NaN.
static inline float clamp(float x, float limit = kAmaxMax) { return x > limit ? limit : x < -limit ? -limit : x; }

// ---- rows of the tensors ---------------------------------------------------------------------------------------
static inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class X> static inline X smaller(X a, X b) { return b < a ? b : a; }
template <class X> static inline X larger(X a, X b) { return a < b ? b : a; }
static inline int64_t element_size(DType t) { return t == DType::float32 ? 4 : 2; }
static inline float largest_finite(DType t) {
  return t == DType::float16 ? 65504.0f : t == DType::bfloat16 ? 0x1.fep127f : FLT_MAX;
}
static inline float bf16_to_float(uint16_t x) {
  const uint32_t u = (uint32_t)x << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
static inline uint16_t float_to_bf16(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, nan = (u >> 16) | 0x40;
  return (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

// One row of dim (a multiple of 8) elements, to fp32 and back (rounded to nearest even).
static void read_row(DType type, const void* base, int64_t offset, int64_t dim, float* dst) {
  if (type == DType::float32) {
    __builtin_memcpy(dst, (const float*)base + offset, dim * 4);
  } else if (type == DType::bfloat16) {
    const uint16_t* src = (const uint16_t*)base + offset;
    for (int64_t d = 0; d < dim; ++d) dst[d] = bf16_to_float(src[d]);
  } else {
    for (int64_t d = 0; d < dim; d += 8) half_to_float8((const uint16_t*)base + offset + d, dst + d);
  }
}
static void write_row(DType type, void* base, int64_t offset, int64_t dim, const float* src) {
  if (type == DType::float32) {
    __builtin_memcpy((float*)base + offset, src, dim * 4);
  } else if (type == DType::bfloat16) {
    uint16_t* dst = (uint16_t*)base + offset;
    for (int64_t d = 0; d < dim; ++d) dst[d] = float_to_bf16(src[d]);
  } else {
    for (int64_t d = 0; d < dim; d += 8) float_to_half8(src + d, (uint16_t*)base + offset + d);
  }
}

// ---- sequences -------------------------------------------------------------------------------------------------
struct Sequence { int64_t batch, q0, tq, k0, tk; };
static Sequence sequence(const Shape& s, int64_t n) {
  if (!s.cu_seqlens_q) return {n, 0, s.tokens_q, 0, s.tokens_k};
  const int64_t q0 = s.cu_seqlens_q[n], k0 = s.cu_seqlens_k[n];
  return {0, q0, s.cu_seqlens_q[n + 1] - q0, k0, s.cu_seqlens_k[n + 1] - k0};
}
// How many keys query i of the sequence sees: all, or those up to the bottom-right aligned diagonal.
static int64_t visible(const Shape& s, const Sequence& q, int64_t i) {
  return s.is_causal ? larger<int64_t>(0, smaller(q.tk, i + q.tk - q.tq + 1)) : q.tk;
}
// Calls f(begin, end) for the token ranges that lie outside every sequence (before the first, after the last).
template <class F>
static void outside(const int32_t* cu, int64_t sequences, int64_t tokens, F f) {
  if (!cu) return;
  if (cu[0] > 0) f((int64_t)0, (int64_t)cu[0]);
  if (cu[sequences] < tokens) f((int64_t)cu[sequences], tokens);
}

// ---- scratch and threads ---------------------------------------------------------------------------------------
// Hands out parts of the workspace; over a null base it only counts, which is how a size is computed.
struct Arena {
  char* base;
  size_t used = 0;
  template <class X>
  X* take(int64_t count) {
    char* p = base ? base + used : nullptr;
    used += (size_t)round_up(count * (int64_t)sizeof(X), 64);
    return (X*)p;
  }
};

static int64_t workers(const Parallel& parallel) { return larger<int64_t>(1, parallel.num_threads); }

// f(item, worker) for every item; each worker (a thread with its own scratch) takes the next item when it is free, so the
// order of the items is the schedule: longest first.
template <class F>
static void for_each(const Parallel& parallel, int64_t items, F& f) {
  struct Job { F* f; int64_t next, items; } job{&f, 0, items};
  if (items > 0)
    parallel.run(smaller(workers(parallel), items), &job, [](void* context, int64_t begin, int64_t end) {
      Job& job = *(Job*)context;
      for (int64_t worker = begin; worker < end; ++worker)
        for (int64_t i; (i = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED)) < job.items;) (*job.f)(i, worker);
    });
}
