// The backward's scratch, and the packing of one key tile and of one (query head, query tile) into the operands that
// kernel.h draws. Cost: per query tile and key chunk once, against one matmul tile pair per key tile; 3% at 2048 keys.

constexpr int kKeys = kKeyTileBackward;

// dP operands: bf16 pairs where the CPU has bf16 dot products, else fp32. Both live in the same scratch.
template <bool kHalf> struct Score;
template <> struct Score<true> { typedef uint16_t type; static constexpr int group = 2; };
template <> struct Score<false> { typedef float type; static constexpr int group = 1; };

template <int kDim>
struct QuerySide {            // one query tile of one head, packed
  elem q[kDim * T];            // Q8  [Dp/G][T][G] (+U)
  elem q_rows[kDim * T];       // Q8  [T/G][Dp][G]
  elem d_o8[kDim * T];         // dO8 [T/G][Dp][G]
  float d_o[kDim * T];         // dO' [D/2][T][2] bf16 or [D][T] fp32
  float d_o_scale[kDim];       // sdO * unit
  int32_t q_sum[kDim];         // -U * sum_i Q8
  float g[T], offset[T], cap[T], minus_delta[T], q_scale[T];  // q_scale: in units of `unit` / row_unit
  uint32_t row[T];             // row_threshold of the LSE
  float row_unit[T], unit;     // what one of dS' is worth, of a row; the largest of them
};
template <int kDim>
struct KeySide {              // one key tile, packed
  elem k[kKeys * kDim];        // K8   [64][Dp]
  elem k_columns[kDim * kKeys];  // K8^T [Dp][64]
  float v[kKeys * kDim];       // V'   [64][D] bf16 or fp32
  int32_t bias[kKeys], k_sum[kDim];  // -U * sum_d K8, -U * sum_j K8
  float scale[kKeys], signed_scale[kKeys];  // signed: with the sign of the softmax scale, as in the forward
  uint32_t column[kKeys];      // column_threshold
  float d_k[kKeys * kDim], d_v[kKeys * kDim];  // gradients, [64][Dp], dK still rotated
};
template <int kDim>
struct TilePair {             // L1-sized working set of one thread
  float a[kKeys * T];         // A = dS * k_scale [64 keys][T]
  float p[MR * T], b[MR * T];  // a strip of P' and B = dS * q_scale
  elem p8[kKeys * T], b8[kKeys * T], a8[kKeys * T];
  float p_scale[kKeys], b_scale[kKeys], a_max[T], a_scale[T];
  int32_t limit[T];
  float x[kDim * T], rows[T * kDim];  // packing and unpacking
};
template <int kDim>
struct BackwardScratch {
  int64_t chunks;             // dQ partials
  int64_t* query_tiles;       // [N + 1] running count
  float* partial;             // [chunks][Hq][query tiles, all batches][Dp][T], only when chunks > 1
  int64_t max_query_tiles, max_key_tiles;
  TilePair<kDim>* pairs;            // [workers]
  QuerySide<kDim>* queries;         // [workers][max_query_tiles]
  KeySide<kDim>* keys;              // [workers][max_key_tiles]
  float* d_q;                 // [workers][max_query_tiles][Dp][T]
};

template <int kDim>
static BackwardScratch<kDim> backward_scratch(const Shape& s, const Parallel& parallel, Arena& arena) {
  BackwardScratch<kDim> w{};
  int64_t items = 0, query_tiles = 0;
  for (int64_t n = 0; n < s.num_sequences; ++n) {
    const Sequence q = sequence(s, n);
    w.max_query_tiles = larger(w.max_query_tiles, ceil_div(q.tq, T));
    w.max_key_tiles = larger(w.max_key_tiles, ceil_div(q.tk, kKeys));
    query_tiles += ceil_div(q.tq, T);
    items += q.tq && q.tk ? s.heads_kv : 0;
  }
  const int64_t threads = workers(parallel);
  const bool few = threads > 1 && items < 2 * threads && items > 0;
  w.chunks = few ? larger<int64_t>(1, smaller(ceil_div(2 * threads, items), w.max_key_tiles)) : 1;
  w.query_tiles = arena.take<int64_t>(s.num_sequences + 1);
  w.partial = arena.take<float>(w.chunks > 1 ? w.chunks * s.heads_q * query_tiles * T * kDim : 0);
  w.pairs = arena.take<TilePair<kDim>>(threads);
  w.queries = arena.take<QuerySide<kDim>>(threads * w.max_query_tiles);
  w.keys = arena.take<KeySide<kDim>>(threads * ceil_div(w.max_key_tiles, w.chunks));
  w.d_q = arena.take<float>(w.chunks > 1 ? 0 : threads * w.max_query_tiles * T * kDim);
  return w;
}

// ---- exponents -------------------------------------------------------------------------------------------------
constexpr int kExponentMin = -126, kExponentMax = 126, kNone = -1000;
constexpr int kLeastRho = -32;  // of a row 2^-64 of the largest, or zero: 8 bits hold nothing of it

static inline int exponent_of(float x) {  // floor(log2(|x|)), of what has a normal exponent with a normal inverse
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return larger(kExponentMin, smaller(kExponentMax, (int)(bits >> 23 & 255) - 127));
}
static inline float exp2_int(int n) {  // of kExponentMin to kExponentMax
  const uint32_t bits = (uint32_t)(n + 127) << 23;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// ---- packing ---------------------------------------------------------------------------------------------------
template <int kDim, bool kHalf>
static void pack_key_side(const BackwardParams& p, const Sequence& q, int64_t head, int64_t j0, const float* v_centre,
                          KeySide<kDim>& k) {
  typedef typename Score<kHalf>::type score;
  const Shape& s = p.shape;
  const int64_t row = (q.batch * s.heads_kv + head) * s.tokens_k + q.k0 + j0;
  const int64_t count = smaller<int64_t>(kKeys, q.tk - j0);
  __builtin_memset(&k, 0, sizeof k);
  score* v8 = (score*)k.v;
  const float limit = smaller(largest_finite(s.dtype), kAmaxMax);
  for (int64_t j = 0; j < count; ++j) {
    const int8_t* k8 = p.k8 + (row + j) * kDim;
    int32_t sum = 0;
    for (int64_t d = 0; d < kDim; ++d) {
      k.k[j * kDim + d] = k.k_columns[d * kKeys + j] = (elem)k8[d];
      k.k_sum[d] -= U * k8[d];
      sum += k8[d];
    }
    k.bias[j] = -U * sum;
    k.scale[j] = p.k_scale[row + j];
    k.column[j] = column_threshold(j0 + j);
    k.signed_scale[j] = s.scale < 0 ? -k.scale[j] : k.scale[j];
    float v[128];
    read_row(s.dtype, p.v, q.batch * p.v_strides.batch + head * p.v_strides.head +
                               (q.k0 + j0 + j) * p.v_strides.token, s.head_dim, v);
    for (int64_t d = 0; d < s.head_dim; ++d) v[d] = clamp(v[d] - v_centre[d], limit);
    if (s.dtype == DType::float16) {  // V' is kept in the 16-bit type of the inputs
      uint16_t half[128];
      write_row(s.dtype, half, 0, s.head_dim, v);
      read_row(s.dtype, half, 0, s.head_dim, v);
    }
    for (int64_t d = 0; d < s.head_dim; ++d) {
      const uint16_t rounded = float_to_bf16(v[d]);
      v8[j * kDim + d] = kHalf ? (score)rounded : (score)(s.dtype == DType::bfloat16 ? bf16_to_float(rounded) : v[d]);
    }
  }
}

template <int kDim, bool kHalf>
static void pack_query_side(const BackwardParams& p, const Sequence& q, int64_t head, int64_t i0, const float* v_centre,
                            TilePair<kDim>& t, QuerySide<kDim>& out) {
  typedef typename Score<kHalf>::type score;
  constexpr int group = Score<kHalf>::group;
  const Shape& s = p.shape;
  const int64_t row = (q.batch * s.heads_q + head) * s.tokens_q + q.q0 + i0;
  const int64_t count = smaller<int64_t>(T, q.tq - i0);
  const int64_t d_o = q.batch * p.d_o_strides.batch + head * p.d_o_strides.head + (q.q0 + i0) * p.d_o_strides.token;
  const int64_t o = q.batch * p.o_strides.batch + head * p.o_strides.head + (q.q0 + i0) * p.o_strides.token;
  __builtin_memset(&out, 0, sizeof out);
  __builtin_memset(t.rows, 0, sizeof t.rows);
  score* packed = (score*)out.d_o;
  const float scale = s.scale < 0 ? -s.scale : s.scale;
  // Nothing depends on the absolute size of dO: each row is taken in units of its own largest number, the tile in units
  // of the largest of those.
  float largest[T];
  int exponent[T], tile_exponent = kExponentMin;
  for (int64_t i = 0; i < T; ++i) {
    const bool live = i < count && p.lse_smooth[row + i] != -__builtin_inff();
    exponent[i] = kNone;
    if (!live) continue;
    float* x = t.rows + i * kDim;
    read_row(s.dtype, p.d_o, d_o + i * p.d_o_strides.token, s.head_dim, x);
    largest[i] = 0.0f;
    for (int64_t d = 0; d < s.head_dim; ++d) {
      const float magnitude = x[d] < 0 ? -x[d] : x[d];
      largest[i] = magnitude > largest[i] ? magnitude : largest[i];
    }
    exponent[i] = larger(exponent_of(largest[i]), p.d_lse ? exponent_of(p.d_lse[row + i]) : kExponentMin);
    tile_exponent = larger(tile_exponent, exponent[i]);
  }
  out.unit = exp2_int(tile_exponent);
  const float to_tile = exp2_int(-tile_exponent);
  for (int64_t i = 0; i < T; ++i) {
    out.offset[i] = -200.0f;  // a lane that takes part in nothing: P' = 2^-200 against dO' = delta = 0
    if (exponent[i] == kNone) continue;
    const int8_t* q8 = p.q8 + (row + i) * kDim;
    for (int64_t d = 0; d < kDim; ++d) {
      out.q[(d / G * T + i) * G + d % G] = (elem)q8[d];
      out.q_rows[(i / G * kDim + d) * G + i % G] = (elem)q8[d];
      out.q_sum[d] -= U * q8[d];
    }
    float *x = t.rows + i * kDim, output[128];
    read_row(s.dtype, p.o, o + i * p.o_strides.token, s.head_dim, output);
    // log2(rho): half of what the row is below the largest. A row without dO (d_lse may give it a dS) gets next to none
    // of P, so that it has no say in the scales of dV.
    const int below = (exponent_of(largest[i]) - tile_exponent) >> 1;
    const int rho = largest[i] < FLT_MIN ? kLeastRho : larger(below, kLeastRho);
    const float up = exp2_int(-rho), to_row = exp2_int(-exponent[i]);
    float delta = (p.d_lse ? -p.d_lse[row + i] * to_row * up : 0.0f) + largest[i] * 0.0f;  // NaN if dO has an infinity
    for (int64_t d = 0; d < s.head_dim; ++d) {
      const float y = x[d] * to_row * up;
      delta += y * clamp(output[d] - v_centre[d]);
      packed[(d / group * T + i) * group + d % group] = kHalf ? (score)float_to_bf16(y) : (score)y;
      x[d] = x[d] * to_tile * up;
    }
    out.minus_delta[i] = -delta;
    out.row_unit[i] = exp2_int(exponent[i]);
    const float q_scale = p.q_scale[row + i];
    out.q_scale[i] = q_scale * (out.row_unit[i] * to_tile);
    out.g[i] = q_scale * (float)kDim * scale * kLog2e;
    out.offset[i] = (float)rho - p.lse_smooth[row + i] * kLog2e;
    out.row[i] = row_threshold(p.lse_smooth[row + i]);
    out.cap[i] = (float)rho;  // P <= 1, whatever the rounding of huge logits says
  }
  if (U)
    for (int64_t i = 0; i < kDim * T; ++i) out.q[i] = (elem)(out.q[i] + (elem)U);
  for (int64_t d = 0; d < kDim; d += W) {
    vf a = vf{};
    for (int64_t i = 0; i < T; ++i) a = amax(a, load(t.rows + i * kDim + d));
    const vf inverse = inverse_scale(a, a * 0.0f, out.d_o_scale + d);
    store(out.d_o_scale + d, load(out.d_o_scale + d) * out.unit);
    for (int64_t i = 0; i < T; i += G) {
      vf rows[G];
      for (int r = 0; r < G; ++r) rows[r] = round_clip(load(t.rows + (i + r) * kDim + d) * inverse);
      pack_signed(out.d_o8 + (i * kDim + d * G), rows);
    }
  }
}
