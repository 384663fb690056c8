// Backward, fused: one work item = (sequence, key/value head, chunk of keys). It owns dK and dV of its keys and walks,
// for every query head that shares the keys, key tiles (64) outside and query tiles (64) inside; dQ of the head accumulates in
// fp32 scratch. Nothing is shared between threads, every sum has a fixed order: the same bits for the same call.
//
// Per tile pair, in strips of MR keys: S^T and dP^T by the micro-kernel -> P', dS; row (query) maxima of A = dS k_scale
// stay in lanes, column (key) maxima of P' and B = dS q_scale are reduced once per key row; P8 and B8 rows are written.
// Then A8, and the three INT8 matmuls dV += P8 dO8, dK += B8 Q8, dQ^T += A8 K8^T.
//
// When there are fewer (sequence, head) pairs than threads, keys are split into chunks with one partial dQ each,
// summed in order afterwards.
//
// Vector instructions per vector of scores at D = 64 (W = 16 on AVX-512, 8 on AVX2), without loads and stores:
//     matmuls       AVX-512  16 each for S, dV, dK, dQ (vpdpbusd) + 32 for dP (vdpbf16ps)                 = 96
//                   AVX2     64 each (vpmaddwd + vpaddd) + 64 for dP (fp32 FMA)                           = 320
//     elementwise   S to P' 14-18, dS, A, B and their maxima 9, thresholds 14-17, rounding and packing 9,
//                   dV dK dQ to fp32 9 = about 58
// so the matmul unit is the bound: at one 512-bit product a cycle (Zen 4) about 120 cycles for 16 scores, at two
// 256-bit products a cycle (Zen 3) about 105 for 8, if vpmaddwd and vpaddd never wait for each other.

#include "backward_pack.inl"

// ---- one tile pair ---------------------------------------------------------------------------------------------
template <int kDim, bool kHalf, int M>
SAGE_INLINE void multiply_scores(vf (&acc)[M][NV], const QuerySide<kDim>& q, const KeySide<kDim>& k, int64_t lane0,
                                 int j, int dim) {
  constexpr int group = Score<kHalf>::group;
  typedef typename Score<kHalf>::type score;
  const score *lanes = (const score*)q.d_o + lane0 * group, *rows = (const score*)k.v + j * kDim;
  for (int d = 0; d < dim; d += group, lanes += T * group, rows += group)
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < NV; ++n)
        if constexpr (kHalf) acc[m][n] = dot_bf16(acc[m][n], lanes + n * W * group, rows + m * kDim);
        else acc[m][n] = fma(load(lanes + n * W), splat(rows[m * kDim]), acc[m][n]);
}

// scale = max / levels and its inverse for packing; a NaN stays one, what overflowed becomes huge but finite.
SAGE_INLINE vf packing_scale(vf largest, float levels, float* scale) {
  largest = vmin(splat(0x1p90f), from_bits(umax(bits(largest), bits(splat(kAmaxMin)))));
  store(scale, largest * (1.0f / levels));
  return quotient(levels, largest);
}

template <int kDim, bool kHalf, bool kMasked>
static void scores(const QuerySide<kDim>& q, const KeySide<kDim>& k, TilePair<kDim>& t, int dim) {
  for (int i = 0; i < T; i += W) store(t.a_max + i, vf{});
  for_rows(kKeys, [&](auto tile, int j) SAGE_LAMBDA {
    constexpr int M = tile.count;
    vi p_max[M] = {}, b_max[M] = {};
    for (int64_t lane0 = 0; lane0 < T; lane0 += LB) {
      vacc s[M][NV];
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < NV; ++n) s[m][n] = acc_splat(k.bias[j + m]);
      multiply<T * G, kDim, false>(s, q.q + lane0 * G, k.k + j * kDim, kDim / G);
      for (int m = 0; m < M; ++m) {
        const vf key_scale = splat(k.signed_scale[j + m]);
        for (int n = 0; n < NV; ++n) {
          const int64_t i = lane0 + n * W;
          const vf x = fma(to_float(s[m][n]) * key_scale, load(q.g + i), load(q.offset + i));
          vf p = exp2(vmin(load(q.cap + i), x));
          if (kMasked) p = select(loadi(t.limit + i) > j + m, p, vf{});
          p_max[m] = umax(p_max[m], bits(p));
          store(t.p + m * T + i, p);
        }
      }
      vf d_p[M][NV];
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < NV; ++n) d_p[m][n] = load(q.minus_delta + lane0 + n * W);
      multiply_scores<kDim, kHalf>(d_p, q, k, lane0, j, dim);
      for (int n = 0; n < NV; ++n) {
        const int64_t i = lane0 + n * W;
        const vf query_scale = load(q.q_scale + i);
        vf a_max = load(t.a_max + i);
        for (int m = 0; m < M; ++m) {
          const vf d_s = load(t.p + m * T + i) * d_p[m][n];
          const vf a = d_s * splat(k.scale[j + m]), b = d_s * query_scale;
          a_max = amax(a_max, a);
          b_max[m] = umax(b_max[m], bits(vabs(b)));
          store(t.a + (j + m) * T + i, a);
          store(t.b + m * T + i, b);
        }
        store(t.a_max + i, a_max);
      }
    }
    float p_rows[W] = {}, b_rows[W] = {}, p_inverse[W], b_inverse[W], p_scale[W], b_scale[W];
    for (int m = 0; m < M; ++m) {
      const int32_t p_bits = hmax(p_max[m]), b_bits = hmax(b_max[m]);
      __builtin_memcpy(p_rows + m, &p_bits, 4);
      __builtin_memcpy(b_rows + m, &b_bits, 4);
    }
    store(p_inverse, packing_scale(load(p_rows), 255.0f, p_scale));
    store(b_inverse, packing_scale(load(b_rows), 127.0f, b_scale));
    for (int m = 0; m < M; ++m) {
      t.p_scale[j + m] = p_scale[m];
      t.b_scale[j + m] = b_scale[m] * q.unit;
      const uint32_t column = k.column[j + m];
      pack_lanes(t.p8 + (j + m) * T, [&](int i) SAGE_LAMBDA {
        const vf p = load(t.p + m * T + i);
        return dithered(p, splat(p_inverse[m]), p < kSmallP * p_scale[m], loadu(q.row + i), column, 0.0f);
      });
      pack_lanes(t.b8 + (j + m) * T, [&](int i) SAGE_LAMBDA {
        const vf b = load(t.b + m * T + i);
        return dithered(b, splat(b_inverse[m]), vabs(b) < kSmallDs * b_scale[m], loadu(q.row + i), column, U);
      });
    }
  });
  for (int i = 0; i < T; i += W) {
    const vf inverse = packing_scale(load(t.a_max + i), 127.0f, t.a_scale + i);
    const vf small = load(t.a_scale + i) * kSmallDs;
    const vu row = loadu(q.row + i);
    store(t.a_scale + i, load(t.a_scale + i) * load(q.row_unit + i));
    for (int j = 0; j < kKeys; j += G) {
      vf rows[G];
      for (int r = 0; r < G; ++r) {
        const vf a = load(t.a + (j + r) * T + i);
        rows[r] = dithered(a, inverse, vabs(a) < small, row, k.column[j + r], U);
      }
      pack_rows(t.a8 + (j * T + i * G), rows);
    }
  }
}

template <int kDim>
static void accumulate(const QuerySide<kDim>& q, KeySide<kDim>& k, const TilePair<kDim>& t, int dim, float* d_q) {
  for_rows(kKeys, [&](auto tile, int j) SAGE_LAMBDA {
    constexpr int M = tile.count;
    for (int d = 0; d < dim; d += LB) {
      vacc acc[M][NV];
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < NV; ++n) acc[m][n] = acc_splat(0);
      multiply<kDim * G, T, true>(acc, q.d_o8 + d * G, t.p8 + j * T, T / G);
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < NV; ++n) {
          float* out = k.d_v + (j + m) * kDim + d + n * W;
          const vf scale = load(q.d_o_scale + d + n * W) * splat(t.p_scale[j + m]);
          store(out, fma(to_float(acc[m][n]), scale, load(out)));
        }
    }
    for (int d = 0; d < kDim; d += LB) {
      vacc acc[M][NV];
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < NV; ++n) acc[m][n] = acc_load(q.q_sum + d + n * W);
      multiply<kDim * G, T, true>(acc, q.q_rows + d * G, t.b8 + j * T, T / G);
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < NV; ++n) {
          float* out = k.d_k + (j + m) * kDim + d + n * W;
          store(out, fma(to_float(acc[m][n]), splat(t.b_scale[j + m]), load(out)));
        }
    }
  });
  for_rows(kDim, [&](auto tile, int d) SAGE_LAMBDA {
    constexpr int M = tile.count;
    for (int64_t lane0 = 0; lane0 < T; lane0 += LB) {
      vacc acc[M][NV];
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < NV; ++n) acc[m][n] = acc_splat(k.k_sum[d + m]);
      multiply<T * G, kKeys, false>(acc, t.a8 + lane0 * G, k.k_columns + d * kKeys, kKeys / G);
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < NV; ++n) {
          float* out = d_q + (d + m) * T + lane0 + n * W;
          store(out, fma(to_float(acc[m][n]), load(t.a_scale + lane0 + n * W), load(out)));
        }
    }
  });
}

// ---- results ---------------------------------------------------------------------------------------------------
// dQ of a tile, summed over the chunks in order, rotated back, scaled, rounded. `x` is scratch [Dp][T].
template <int kDim>
static void write_d_q(const BackwardParams& p, const Sequence& q, int64_t n, int64_t head, int64_t i0,
                      const float* d_q, int64_t chunks, int64_t chunk_step, float* x) {
  const Shape& s = p.shape;
  const int64_t row = (q.batch * s.heads_q + head) * s.tokens_q + q.q0 + i0;
  const float* k_mean = p.k_mean + (n * s.heads_kv + head / (s.heads_q / s.heads_kv)) * s.head_dim;
  __builtin_memcpy(x, d_q, kDim * T * 4);
  for (int64_t c = 1; c < chunks; ++c)
    for (int64_t i = 0; i < kDim * T; i += W) store(x + i, load(x + i) + load(d_q + c * chunk_step + i));
  rotate(x, T, kDim);
  change_signs(x, T, kDim, signs_of(k_mean));
  for (int64_t i = 0; i < smaller<int64_t>(T, q.tq - i0); ++i) {
    float out[128];
    const bool sees = p.lse_smooth[row + i] != -__builtin_inff();
    for (int64_t d = 0; d < s.head_dim; ++d)
      out[d] = sees ? s.scale * (x[d * T + i] + (p.d_lse ? p.d_lse[row + i] * k_mean[d] : 0.0f)) : 0.0f;
    write_row(s.dtype, p.d_q, q.batch * p.d_q_strides.batch + head * p.d_q_strides.head +
                                  (q.q0 + i0 + i) * p.d_q_strides.token, s.head_dim, out);
  }
}
template <int kDim>
static void write_d_kv(const BackwardParams& p, const Sequence& q, int64_t head, int64_t j0, const KeySide<kDim>& k,
                       const float* k_mean, float* x) {
  const Shape& s = p.shape;
  for (int64_t j = 0; j < kKeys; ++j)
    for (int64_t d = 0; d < kDim; ++d) x[d * T + j] = k.d_k[j * kDim + d];
  rotate(x, T, kDim);
  change_signs(x, T, kDim, signs_of(k_mean));
  for (int64_t j = 0; j < smaller<int64_t>(kKeys, q.tk - j0); ++j) {
    float out[128];
    for (int64_t d = 0; d < s.head_dim; ++d) out[d] = s.scale * x[d * T + j];
    const int64_t token = q.k0 + j0 + j;
    write_row(s.dtype, p.d_k, q.batch * p.d_k_strides.batch + head * p.d_k_strides.head + token * p.d_k_strides.token,
              s.head_dim, out);
    write_row(s.dtype, p.d_v, q.batch * p.d_v_strides.batch + head * p.d_v_strides.head + token * p.d_v_strides.token,
              s.head_dim, k.d_v + j * kDim);
  }
}

// ---- the call --------------------------------------------------------------------------------------------------
static size_t backward_bytes(const BackwardParams& p) {
  Arena arena{nullptr};
  if (p.shape.head_dim_padded == 64) backward_scratch<64>(p.shape, p.parallel, arena);
  else backward_scratch<128>(p.shape, p.parallel, arena);
  return arena.used;
}

// One item: chunk `chunk` of the keys of (sequence n, key/value head).
template <int kDim, bool kHalf>
static void backward_item(const BackwardParams& p, const BackwardScratch<kDim>& w, int64_t n, int64_t head_kv,
                          int64_t chunk, int64_t worker) {
  const Shape& s = p.shape;
  const Sequence q = sequence(s, n);
  const int64_t query_tiles = ceil_div(q.tq, T), key_tiles = ceil_div(q.tk, kKeys), q_per_kv = s.heads_q / s.heads_kv;
  const int64_t first = key_tiles * chunk / w.chunks, last = key_tiles * (chunk + 1) / w.chunks;
  const int64_t tile_floats = kDim * T, all_tiles = w.query_tiles[s.num_sequences];
  const float* v_centre = p.v_centre + (n * s.heads_kv + head_kv) * s.head_dim;
  const float* k_mean = p.k_mean + (n * s.heads_kv + head_kv) * s.head_dim;
  TilePair<kDim>& t = w.pairs[worker];
  QuerySide<kDim>* queries = w.queries + worker * w.max_query_tiles;
  KeySide<kDim>* keys = w.keys + worker * ceil_div(w.max_key_tiles, w.chunks);
  for (int64_t j = first; j < last; ++j) pack_key_side<kDim, kHalf>(p, q, head_kv, j * kKeys, v_centre, keys[j - first]);
  for (int64_t head = head_kv * q_per_kv; head < (head_kv + 1) * q_per_kv; ++head) {
    float* d_q = w.chunks > 1 ? w.partial + ((chunk * s.heads_q + head) * all_tiles + w.query_tiles[n]) * tile_floats
                              : w.d_q + worker * w.max_query_tiles * tile_floats;
    __builtin_memset(d_q, 0, query_tiles * tile_floats * 4);
    for (int64_t i = 0; i < query_tiles; ++i)
      pack_query_side<kDim, kHalf>(p, q, head, i * T, v_centre, t, queries[i]);
    for (int64_t j = first; j < last; ++j)
      for (int64_t i = 0; i < query_tiles; ++i) {
        const int64_t last_query = smaller<int64_t>((i + 1) * T, q.tq) - 1, j0 = j * kKeys;
        if (visible(s, q, last_query) <= j0) continue;
        const bool masked = visible(s, q, i * T) < j0 + kKeys;
        if (masked)
          for (int64_t lane = 0; lane < T; ++lane)
            t.limit[lane] = (int32_t)smaller<int64_t>(kKeys, visible(s, q, i * T + lane) - j0);
        (masked ? scores<kDim, kHalf, true> : scores<kDim, kHalf, false>)(queries[i], keys[j - first], t,
                                                                         (int)s.head_dim);
        accumulate<kDim>(queries[i], keys[j - first], t, (int)s.head_dim, d_q + i * tile_floats);
      }
    if (w.chunks == 1)
      for (int64_t i = 0; i < query_tiles; ++i)
        write_d_q<kDim>(p, q, n, head, i * T, d_q + i * tile_floats, 1, 0, t.x);
  }
  for (int64_t j = first; j < last; ++j) write_d_kv(p, q, head_kv, j * kKeys, keys[j - first], k_mean, t.x);
}

static void backward_outside(const BackwardParams& p) {
  const Shape& s = p.shape;
  const float zeros[128] = {};
  outside(s.cu_seqlens_q, s.num_sequences, s.tokens_q, [&](int64_t begin, int64_t end) {
    for (int64_t h = 0; h < s.heads_q; ++h)
      for (int64_t i = begin; i < end; ++i)
        write_row(s.dtype, p.d_q, h * p.d_q_strides.head + i * p.d_q_strides.token, s.head_dim, zeros);
  });
  outside(s.cu_seqlens_k, s.num_sequences, s.tokens_k, [&](int64_t begin, int64_t end) {
    for (int64_t h = 0; h < s.heads_kv; ++h)
      for (int64_t j = begin; j < end; ++j) {
        write_row(s.dtype, p.d_k, h * p.d_k_strides.head + j * p.d_k_strides.token, s.head_dim, zeros);
        write_row(s.dtype, p.d_v, h * p.d_v_strides.head + j * p.d_v_strides.token, s.head_dim, zeros);
      }
  });
}

template <int kDim>
static void backward_padded(const BackwardParams& p) {
  const Shape& s = p.shape;
  Arena arena{(char*)p.workspace};
  const BackwardScratch<kDim> w = backward_scratch<kDim>(s, p.parallel, arena);
  w.query_tiles[0] = 0;
  for (int64_t n = 0; n < s.num_sequences; ++n)
    w.query_tiles[n + 1] = w.query_tiles[n] + ceil_div(sequence(s, n).tq, T);
  backward_outside(p);

  const bool half = half_dot() && s.dtype == DType::bfloat16;
  auto work = [&](int64_t item, int64_t worker) {
    const int64_t chunk = item % w.chunks, pair = item / w.chunks;
    const auto f = half ? backward_item<kDim, kHalfDot> : backward_item<kDim, false>;
    f(p, w, pair / s.heads_kv, pair % s.heads_kv, chunk, worker);
  };
  for_each(p.parallel, s.num_sequences * s.heads_kv * w.chunks, work);
  if (w.chunks == 1) return;

  auto sum = [&](int64_t item, int64_t worker) {
    const int64_t n = item / s.heads_q, head = item % s.heads_q, all_tiles = w.query_tiles[s.num_sequences];
    const Sequence q = sequence(s, n);
    const int64_t tile_floats = kDim * T;
    for (int64_t i = 0; i < ceil_div(q.tq, T); ++i)
      write_d_q<kDim>(p, q, n, head, i * T, w.partial + (head * all_tiles + w.query_tiles[n] + i) * tile_floats,
                      w.chunks, s.heads_q * all_tiles * tile_floats, w.pairs[worker].x);
  };
  for_each(p.parallel, s.num_sequences * s.heads_q, sum);
}

static void run_backward(const BackwardParams& p) {
  (p.shape.head_dim_padded == 64 ? backward_padded<64> : backward_padded<128>)(p);
}
