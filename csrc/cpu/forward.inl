// Forward: pack keys and values once per key/value head, then sweep key tiles per (query head, 64 queries).
//
// Per key tile of 32 and lane block of NV vectors: S^T by the micro-kernel into an L1 buffer with the lane maximum on
// the way; exp2, row sum and rounding of P, G key rows packed into one operand vector; O^T by the micro-kernel,
// dequantised into fp32 rows O^T[d][i].
//
// Vector instructions per vector of scores at D = 64 (W = 16 on AVX-512, 8 on AVX2), without loads and stores:
//     matmuls       AVX-512  16 + 16 (vpdpbusd);  AVX2  64 + 64 (vpmaddwd + vpaddd)
//     elementwise   S to fp32 and its maximum 3, exp2 and row sum 11-14, thresholds 4-5, rounding and packing 3,
//                   O to fp32 2 x 3
// The matmul unit is the bound: at one 512-bit product a cycle (Zen 4) about 47 cycles for 16 scores; at two 256-bit
// products a cycle (Zen 3) about 39 for 8, if vpmaddwd and vpaddd never wait for each other.

// ---- what the workspace holds ----------------------------------------------------------------------------------
struct QueryTile {                   // one thread's
  float x[128 * T];                  // the query tile transposed; O^T after it
  elem q[128 * T];                   // Q8 [Dp/G][T][G]
  elem p[kKeyTileForward * LB];      // P8 [32/G][LB][G]
  float s[kKeyTileForward * LB];     // S^T [32][LB]
  float g[T], largest[T], sum[T], mean_dot[T], scale[T];
  float first[128];                  // the first key's value, centred: it is in no product of P and V
  int32_t limit[T];                  // keys that a lane sees, counted from the start of the key tile
  uint32_t row[T];                   // row_threshold of mean_dot
};
struct ForwardScratch {
  int64_t *query_tiles, *key_tiles, *padded_values;  // [N + 1] running counts over the sequences
  elem* k;           // [B * Hkv][Tk + 32][Dp]   K8 as broadcast operand
  int32_t* k_bias;   // [B * Hkv][Tk + 32]       -U * sum_d K8
  float* k_scale;    // [B * Hkv][Tk + 32]       key scale, with the sign of the softmax scale
  elem* v;           // [B * Hkv][padded_values / G][D][G]  V8^T as broadcast operand
  float* v_scale;    // [B * Hkv][key_tiles][D]  sV / 255
  float* v_mean;     // [N][Hkv][D]              mean value of the sequence
  QueryTile* tiles;  // [workers]
};
constexpr int kValuePad = 8;  // a ragged tile's keys are rounded up to this

static ForwardScratch forward_scratch(const Shape& s, const Parallel& parallel, Arena& arena) {
  const int64_t n = s.num_sequences, heads = s.batch * s.heads_kv;
  int64_t key_tiles = 0, padded_values = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t tk = sequence(s, i).tk;
    key_tiles += ceil_div(tk, kKeyTileForward), padded_values += round_up(tk, kValuePad);
  }
  if (!s.cu_seqlens_q && n) key_tiles /= n, padded_values /= n;  // counted per batch through B * Hkv
  ForwardScratch w;
  w.query_tiles = arena.take<int64_t>(n + 1);
  w.key_tiles = arena.take<int64_t>(n + 1);
  w.padded_values = arena.take<int64_t>(n + 1);
  w.k = arena.take<elem>(heads * (s.tokens_k + kKeyTileForward) * s.head_dim_padded);
  w.k_bias = arena.take<int32_t>(heads * (s.tokens_k + kKeyTileForward));
  w.k_scale = arena.take<float>(heads * (s.tokens_k + kKeyTileForward));
  w.v = arena.take<elem>(heads * padded_values * s.head_dim);
  w.v_scale = arena.take<float>(heads * key_tiles * s.head_dim);
  w.v_mean = arena.take<float>(n * s.heads_kv * s.head_dim);
  w.tiles = arena.take<QueryTile>(workers(parallel));
  return w;
}

// Where the packed keys and values of one (sequence, key/value head) lie.
struct PackedKeys {
  elem* k;
  int32_t* bias;
  float* scale;
  elem* v;
  float* v_scale;
};
static PackedKeys packed_keys(const ForwardScratch& w, const Shape& s, int64_t n, const Sequence& q, int64_t head) {
  const int64_t h = q.batch * s.heads_kv + head, row = h * (s.tokens_k + kKeyTileForward) + q.k0;
  // not packed: every batch has the same counts; packed: one batch, running counts
  const bool packed = s.cu_seqlens_q;
  const int64_t per_head = packed ? s.num_sequences : 1, before = packed ? n : 0;
  return {w.k + row * s.head_dim_padded, w.k_bias + row, w.k_scale + row,
          w.v + (h * w.padded_values[per_head] + w.padded_values[before]) * s.head_dim,
          w.v_scale + (h * w.key_tiles[per_head] + w.key_tiles[before]) * s.head_dim};
}

// ---- phase 1: keys and values ----------------------------------------------------------------------------------
static void pack_keys(const ForwardParams& p, const Sequence& q, int64_t head, const float* mean, QueryTile& t,
                      const PackedKeys& out) {
  const Shape& s = p.shape;
  const int64_t dp = s.head_dim_padded, row = (q.batch * s.heads_kv + head) * s.tokens_k + q.k0;
  const int64_t offset = q.batch * p.k_strides.batch + head * p.k_strides.head + q.k0 * p.k_strides.token;
  const float prescale = 1.0f / (float)dp;
  for (int64_t j = 0; j < q.tk; j += T) {
    const int64_t count = smaller<int64_t>(T, q.tk - j), lanes = round_up(count, W);
    load_transposed(t.x, s.dtype, p.k, offset + j * p.k_strides.token, p.k_strides.token, count, lanes, s.head_dim, dp,
                    prescale);
    for (int64_t d = 0; d < s.head_dim; ++d)
      for (int64_t i = 0; i < lanes; i += W) store(t.x + d * T + i, load(t.x + d * T + i) - mean[d] * prescale);
    change_signs(t.x, lanes, dp, signs_of(mean));
    rotate(t.x, lanes, dp);
    quantise_lanes(t.x, lanes, dp, t.scale);
    int8_t* k8 = p.k8 + (row + j) * dp;
    write_int8(t.x, count, dp, k8);
    for (int64_t i = 0; i < count; ++i) {
      int32_t sum = 0;
      for (int64_t d = 0; d < dp; ++d) {
        out.k[(j + i) * dp + d] = (elem)k8[i * dp + d];
        sum += k8[i * dp + d];
      }
      out.bias[j + i] = -U * sum;
      p.k_scale[row + j + i] = t.scale[i];
      out.scale[j + i] = s.scale < 0 ? -t.scale[i] : t.scale[i];
    }
  }
}

static void pack_values(const ForwardParams& p, const Sequence& q, int64_t head, float* mean, float* centre,
                        const PackedKeys& out) {
  const Shape& s = p.shape;
  const int64_t dim = s.head_dim;
  const int64_t offset = q.batch * p.v_strides.batch + head * p.v_strides.head + q.k0 * p.v_strides.token;
  float x[kKeyTileForward * 128], first[128], residual[128] = {}, amax[128] = {};
  if (q.tk) read_row(s.dtype, p.v, offset, dim, first);
  for (int64_t j = 0; j < q.tk; j += kKeyTileForward) {
    const int64_t count = smaller<int64_t>(kKeyTileForward, q.tk - j), padded = round_up(count, kValuePad);
    float largest[128 + W] = {}, finite[128 + W] = {}, inverse[128 + W], scale[128 + W];
    for (int64_t i = 0; i < count; ++i) {
      read_row(s.dtype, p.v, offset + (j + i) * p.v_strides.token, dim, x + i * dim);
      for (int64_t d = 0; d < dim; ++d) {
        float v = x[i * dim + d];
        finite[d] += v * 0.0f;  // NaN once anything was not finite
        v = i + j ? clamp(v - mean[d]) : 0.0f;  // the first key goes its own way (attend_tile)
        const float magnitude = v < 0 ? -v : v;
        largest[d] = magnitude > largest[d] ? magnitude : largest[d];
        x[i * dim + d] = v;
      }
    }
    for (int64_t d = 0; d < dim; d += W)
      store(inverse + d, inverse_scale(load(largest + d), load(finite + d), scale + d));
    float* v_scale = out.v_scale + j / kKeyTileForward * dim;
    for (int64_t d = 0; d < dim; ++d) {
      amax[d] = larger(amax[d], largest[d]);
      elem* v8 = out.v + j * dim + d * G;
      for (int64_t i = 0; i < padded; ++i) {
        float rounded = 0.0f;
        if (i < count) {
          const float v = x[i * dim + d];
          rounded = __builtin_rintf(v * inverse[d]);
          rounded = rounded > 127.0f ? 127.0f : rounded >= -127.0f ? rounded : -127.0f;  // NaN: -127
          residual[d] += v - rounded * scale[d];
        }
        v8[i / G * dim * G + i % G] = (elem)(int32_t)rounded;
      }
      v_scale[d] = scale[d] * (1.0f / 255.0f);
    }
  }
  for (int64_t d = 0; d < dim; ++d) {
    mean[d] += q.tk ? residual[d] / (float)q.tk : 0.0f;
    const float from_first = q.tk ? first[d] - mean[d] : 0.0f;
    amax[d] = larger(amax[d], from_first < 0 ? -from_first : from_first);
  }
  centre_row(s.dtype, mean, amax, dim, centre);
}

// ---- phase 2: one query tile against its keys ------------------------------------------------------------------
// One key tile, from key `key0` of the sequence on (`keys` of it packed, a multiple of kValuePad), against one lane block.
// Of the first tile the first key, on which many rows look alone, is in no product of P and V: O begins with it.
template <int kDim, bool kMasked, bool kFirst>
static void attend(QueryTile& t, int64_t lane0, int dim, int64_t key0, int keys, const PackedKeys& k) {
  vf largest[NV], g[NV], sum[NV] = {};
  vi limit[NV];
  vu row[NV];
  for (int n = 0; n < NV; ++n) {
    largest[n] = splat(-FLT_MAX), g[n] = load(t.g + lane0 + n * W);
    row[n] = loadu(t.row + lane0 + n * W);
    if (kMasked) limit[n] = loadi(t.limit + lane0 + n * W);
  }
  for_rows(keys, [&](auto tile, int j) SAGE_LAMBDA {
    constexpr int M = tile.count;
    vacc acc[M][NV];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < NV; ++n) acc[m][n] = acc_splat(k.bias[j + m]);
    multiply<T * G, kDim, false>(acc, t.q + lane0 * G, k.k + (int64_t)j * kDim, kDim / G);
    for (int m = 0; m < M; ++m) {
      const vf scale = splat(k.scale[j + m]);
      for (int n = 0; n < NV; ++n) {
        vf s = to_float(acc[m][n]) * scale;
        if (kMasked) s = select(limit[n] > j + m, s, splat(-FLT_MAX));
        store(t.s + (j + m) * LB + n * W, s);
        if (!kFirst || j + m) largest[n] = vmax(s, largest[n]);
      }
    }
  });
  for (int j = 0; j < keys; j += G)
    for (int n = 0; n < NV; ++n) {
      vf rows[G];
      for (int r = 0; r < G; ++r) {
        vf p = exp2((load(t.s + (j + r) * LB + n * W) - largest[n]) * g[n]);
        if (kMasked) p = select(limit[n] > j + r, p, vf{});
        if (kFirst && !(j + r)) p = vf{};
        sum[n] += p;
        rows[r] = dithered(p, splat(255.0f), p < kSmallP / 255.0f, row[n], column_threshold(key0 + j + r), 0.0f);
      }
      pack_rows(t.p + (j * LB + n * W * G), rows);
    }

  // The running maximum is raised only when a tile exceeds it by 2^16: until then the factor 2^(m_tile - m) merely
  // grows, and O need not be rescaled.
  vf factor[NV];
  for (int n = 0; n < NV; ++n) {
    float *m_ptr = t.largest + lane0 + n * W, *l_ptr = t.sum + lane0 + n * W;
    vf m_tile = largest[n] * g[n], m = load(m_ptr), l = load(l_ptr);
    if (kMasked) m_tile = select(limit[n] > (kFirst ? 1 : 0), m_tile, splat(-__builtin_inff()));
    if (kFirst) {
      m = select(limit[n] > 0, load(t.s + n * W) * g[n], m);
      l = select(limit[n] > 0, splat(1.0f) + (m - m), l);  // NaN where the query or the key is not finite
      store(m_ptr, m);
      for (int d = 0; d < dim; ++d) store(t.x + d * T + lane0 + n * W, select(limit[n] > 0, splat(t.first[d]), vf{}));
    }
    if (any(m_tile > m + 16.0f)) {
      const vf m_new = vmax(m_tile, m), correction = exp2(m - vmax(m_new, splat(-FLT_MAX)));
      l *= correction;
      for (int d = 0; d < dim; ++d) {
        float* o = t.x + d * T + lane0 + n * W;
        store(o, load(o) * correction);
      }
      store(m_ptr, m = m_new);
    }
    factor[n] = exp2(m_tile - vmax(m, splat(-FLT_MAX)));
    store(l_ptr, fma(factor[n], sum[n], l));
  }
  for_rows(dim, [&](auto tile, int d) SAGE_LAMBDA {
    constexpr int M = tile.count;
    vacc acc[M][NV];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < NV; ++n) acc[m][n] = acc_splat(0);
    multiply<LB * G, G, false>(acc, t.p, k.v + d * G, keys / G, dim * G);
    for (int m = 0; m < M; ++m) {
      const vf scale = splat(k.v_scale[d + m]);
      for (int n = 0; n < NV; ++n) {
        float* o = t.x + (d + m) * T + lane0 + n * W;
        store(o, fma(to_float(acc[m][n]) * scale, factor[n], load(o)));
      }
    }
  });
}

// Quantise the tile's queries: q8, q_scale, the packed operand, g, and q . k_mean.
static void pack_queries(const ForwardParams& p, const Sequence& q, int64_t head, int64_t i0, int64_t count,
                         int64_t lanes, const float* k_mean, QueryTile& t) {
  const Shape& s = p.shape;
  const int64_t dp = s.head_dim_padded, row = (q.batch * s.heads_q + head) * s.tokens_q + q.q0 + i0;
  const int64_t offset =
      q.batch * p.q_strides.batch + head * p.q_strides.head + (q.q0 + i0) * p.q_strides.token;
  load_transposed(t.x, s.dtype, p.q, offset, p.q_strides.token, count, lanes, s.head_dim, dp, 1.0f);
  for (int64_t i = 0; i < lanes; i += W) {
    vf sum = vf{};
    for (int64_t d = 0; d < s.head_dim; ++d) {
      const vf x = vmin(splat(kAmaxMax), vmax(splat(-kAmaxMax), load(t.x + d * T + i)));
      sum = fma(x, splat(clamp(k_mean[d])), sum);
    }
    store(t.mean_dot + i, sum);
    for (int64_t d = 0; d < s.head_dim; ++d) store(t.x + d * T + i, load(t.x + d * T + i) * (1.0f / (float)dp));
  }
  change_signs(t.x, lanes, dp, signs_of(k_mean));
  rotate(t.x, lanes, dp);
  quantise_lanes(t.x, lanes, dp, t.scale);
  write_int8(t.x, count, dp, p.q8 + row * dp);
  pack_transposed(t.x, lanes, dp, t.q);
  __builtin_memcpy(p.q_scale + row, t.scale, count * 4);
  const float scale = s.scale < 0 ? -s.scale : s.scale;  // the sign went into the key scales
  for (int64_t i = 0; i < lanes; ++i) {
    t.g[i] = t.scale[i] * (float)dp * scale * kLog2e;
    t.row[i] = row_threshold(t.mean_dot[i]);
  }
}

template <int kDim>
static void attend_tile(const ForwardParams& p, const Sequence& q, int64_t head, int64_t i0, PackedKeys k,
                        const float* k_mean, const float* v_mean, QueryTile& t) {
  const Shape& s = p.shape;
  const int64_t count = smaller<int64_t>(T, q.tq - i0), lanes = round_up(count, LB), dim = s.head_dim;
  pack_queries(p, q, head, i0, count, lanes, k_mean, t);
  __builtin_memset(t.x, 0, dim * T * 4);
  for (int64_t i = 0; i < lanes; ++i) t.largest[i] = -__builtin_inff(), t.sum[i] = 0.0f;
  if (q.tk) {
    const int64_t head_kv = head / (s.heads_q / s.heads_kv);
    read_row(s.dtype, p.v, q.batch * p.v_strides.batch + head_kv * p.v_strides.head + q.k0 * p.v_strides.token, dim,
             t.first);
    for (int64_t d = 0; d < dim; ++d) t.first[d] = clamp(t.first[d] - v_mean[d]);
  }

  const int64_t seen_by_all = visible(s, q, i0), seen_by_any = visible(s, q, i0 + count - 1);
  for (int64_t j = 0; j < seen_by_any; j += kKeyTileForward) {
    const int64_t rest = smaller<int64_t>(kKeyTileForward, q.tk - j);
    const int keys = (int)round_up(rest, kValuePad);
    const bool masked = j == 0 || j + keys > seen_by_all;
    if (masked)
      for (int64_t i = 0; i < lanes; ++i)
        t.limit[i] = (int32_t)smaller<int64_t>(kKeyTileForward, visible(s, q, i0 + i) - j);
    for (int64_t b = 0; b < lanes; b += LB)
      (j == 0   ? attend<kDim, true, true>
       : masked ? attend<kDim, true, false>
                : attend<kDim, false, false>)(t, b, (int)dim, j, keys, k);
    k.k += keys * kDim, k.bias += keys, k.scale += keys, k.v += keys * dim, k.v_scale += dim;
  }

  const int64_t row = (q.batch * s.heads_q + head) * s.tokens_q + q.q0 + i0;
  const int64_t offset =
      q.batch * p.o_strides.batch + head * p.o_strides.head + (q.q0 + i0) * p.o_strides.token;
  const float limit = largest_finite(s.dtype);  // rounding must not push a mean of values out of their type
  for (int64_t i = 0; i < count; ++i) {
    float o[128] = {};
    const bool sees = visible(s, q, i0 + i) > 0;
    const float smooth = sees ? kLn2 * (t.largest[i] + __builtin_log2f(t.sum[i])) : -__builtin_inff();
    p.lse_smooth[row + i] = smooth;
    p.lse[row + i] = sees ? smooth + s.scale * t.mean_dot[i] : smooth;
    if (sees)
      for (int64_t d = 0; d < dim; ++d) o[d] = clamp(t.x[d * T + i] / t.sum[i] + v_mean[d], limit);
    write_row(s.dtype, p.o, offset + i * p.o_strides.token, dim, o);
  }
}

// ---- the call --------------------------------------------------------------------------------------------------
static size_t forward_bytes(const ForwardParams& p) {
  Arena arena{nullptr};
  forward_scratch(p.shape, p.parallel, arena);
  return arena.used;
}

static void forward_outside(const ForwardParams& p) {
  const Shape& s = p.shape;
  const float zeros[128] = {};
  outside(s.cu_seqlens_q, s.num_sequences, s.tokens_q, [&](int64_t begin, int64_t end) {
    for (int64_t h = 0; h < s.heads_q; ++h)
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = h * s.tokens_q + i;
        write_row(s.dtype, p.o, h * p.o_strides.head + i * p.o_strides.token, s.head_dim, zeros);
        p.lse[row] = p.lse_smooth[row] = -__builtin_inff();
        p.q_scale[row] = 0.0f;
        __builtin_memset(p.q8 + row * s.head_dim_padded, 0, s.head_dim_padded);
      }
  });
  outside(s.cu_seqlens_k, s.num_sequences, s.tokens_k, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < s.heads_kv * s.tokens_k; ++row)
      if (row % s.tokens_k >= begin && row % s.tokens_k < end) {
        p.k_scale[row] = 0.0f;
        __builtin_memset(p.k8 + row * s.head_dim_padded, 0, s.head_dim_padded);
      }
  });
}

static void run_forward(const ForwardParams& p) {
  const Shape& s = p.shape;
  Arena arena{(char*)p.workspace};
  const ForwardScratch w = forward_scratch(s, p.parallel, arena);
  w.query_tiles[0] = w.key_tiles[0] = w.padded_values[0] = 0;
  for (int64_t n = 0; n < s.num_sequences; ++n) {
    const Sequence q = sequence(s, n);
    w.query_tiles[n + 1] = w.query_tiles[n] + ceil_div(q.tq, T);
    w.key_tiles[n + 1] = w.key_tiles[n] + ceil_div(q.tk, kKeyTileForward);
    w.padded_values[n + 1] = w.padded_values[n] + round_up(q.tk, kValuePad);
  }
  forward_outside(p);

  auto pack = [&](int64_t item, int64_t worker) {
    const int64_t n = item / s.heads_kv, head = item % s.heads_kv;
    const Sequence q = sequence(s, n);
    const PackedKeys out = packed_keys(w, s, n, q, head);
    float *k_mean = p.k_mean + item * s.head_dim, *v_mean = w.v_mean + item * s.head_dim;
    mean_row(s.dtype, p.k, q.batch * p.k_strides.batch + head * p.k_strides.head + q.k0 * p.k_strides.token,
             p.k_strides.token, q.tk, s.head_dim, k_mean);
    mean_row(s.dtype, p.v, q.batch * p.v_strides.batch + head * p.v_strides.head + q.k0 * p.v_strides.token,
             p.v_strides.token, q.tk, s.head_dim, v_mean);
    pack_keys(p, q, head, k_mean, w.tiles[worker], out);
    pack_values(p, q, head, v_mean, p.v_centre + item * s.head_dim, out);
    if (!s.cu_seqlens_k || n == s.num_sequences - 1) {  // the last tile reads up to 32 rows past the last key
      __builtin_memset(out.k + q.tk * s.head_dim_padded, 0, kKeyTileForward * s.head_dim_padded * sizeof(elem));
      __builtin_memset(out.bias + q.tk, 0, kKeyTileForward * 4);
      __builtin_memset(out.scale + q.tk, 0, kKeyTileForward * 4);
    }
  };
  for_each(p.parallel, s.num_sequences * s.heads_kv, pack);

  // Items: sequence by sequence, head by head, last query tile (longest when causal) first.
  auto work = [&](int64_t item, int64_t worker) {
    int64_t low = 0, high = s.num_sequences;  // sequence n with query_tiles[n] <= item / Hq < query_tiles[n + 1]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (w.query_tiles[middle] * s.heads_q <= item ? low : high) = middle;
    }
    const int64_t n = low, tiles = w.query_tiles[n + 1] - w.query_tiles[n], index = item - w.query_tiles[n] * s.heads_q;
    const int64_t head = index / tiles, tile = tiles - 1 - index % tiles, head_kv = head / (s.heads_q / s.heads_kv);
    const Sequence q = sequence(s, n);
    const float* k_mean = p.k_mean + (n * s.heads_kv + head_kv) * s.head_dim;
    const float* v_mean = w.v_mean + (n * s.heads_kv + head_kv) * s.head_dim;
    const PackedKeys k = packed_keys(w, s, n, q, head_kv);
    (s.head_dim_padded == 64 ? attend_tile<64> : attend_tile<128>)(p, q, head, tile * T, k, k_mean, v_mean,
                                                                    w.tiles[worker]);
  };
  for_each(p.parallel, w.query_tiles[s.num_sequences] * s.heads_q, work);
}
