// Smoothing, rotation and rounding of tiles that are held transposed: X[channel][T token lanes], fp32.
//
// In this orientation the Hadamard rotation is additions of whole rows, a token's largest magnitude is a lane, and the
// packed operand of the score matmul falls out without a shuffle. Cost: about 20 vector instructions per T tokens and
// channel, once per token; 3% of a forward at 2048 keys.

// Token rows to X, x * mul (padding lanes and channels become zeros).
static void load_transposed(float* x, DType type, const void* base, int64_t offset, int64_t stride, int64_t tokens,
                            int64_t lanes, int64_t dim, int64_t dim_padded, float mul) {
  float row[128];
  for (int64_t i = 0; i < lanes; ++i) {
    if (i < tokens) {
      read_row(type, base, offset + i * stride, dim, row);
      for (int64_t d = 0; d < dim; ++d) x[d * T + i] = row[d] * mul;
    } else {
      for (int64_t d = 0; d < dim; ++d) x[d * T + i] = 0.0f;
    }
  }
  for (int64_t i = dim * T; i < dim_padded * T; ++i) x[i] = 0.0f;
}

// X <- diag(signs) X, before the rotation of q and k and after that of their gradients.
static void change_signs(float* x, int64_t lanes, int64_t dim_padded, Signs signs) {
  for (int64_t d = 0; d < dim_padded; ++d)
    if ((d < 64 ? signs.low : signs.high) >> d % 64 & 1)
      for (int64_t i = 0; i < lanes; i += W) store(x + d * T + i, -load(x + d * T + i));
}

// X <- H X, Sylvester's Hadamard matrix by butterflies, not normalised.
static void rotate(float* x, int64_t lanes, int64_t dim_padded) {
  for (int64_t half = 1; half < dim_padded; half *= 2)
    for (int64_t start = 0; start < dim_padded; start += 2 * half)
      for (int64_t d = start; d < start + half; ++d)
        for (int64_t i = 0; i < lanes; i += W) {
          float *p = x + d * T + i, *q = p + half * T;
          const vf a = load(p), b = load(q);
          store(p, a + b);
          store(q, a - b);
        }
}

// 127 / a, and the scale a / 127 of rows whose largest magnitude is a; not_finite is NaN where it must spread, else 0.
SAGE_INLINE vf inverse_scale(vf a, vf not_finite, float* scale) {
  a = vmin(splat(kAmaxMax), vmax(splat(kAmaxMin), a));
  store(scale, a * (1.0f / 127.0f) + not_finite);
  return quotient(127.0f, a);
}
SAGE_INLINE vf round_clip(vf x) { return round_even(vmax(splat(-127.0f), vmin(x, splat(127.0f)))); }

// X -> rounded integers (still as floats, in place), one scale per lane.
static void quantise_lanes(float* x, int64_t lanes, int64_t dim_padded, float* scale) {
  for (int64_t i = 0; i < lanes; i += W) {
    vf a = vf{};
    for (int64_t d = 0; d < dim_padded; ++d) a = amax(a, load(x + d * T + i));
    // after the rotation one non-finite channel has reached all of them
    const vf inverse = inverse_scale(a, load(x + i) * 0.0f, scale + i);
    for (int64_t d = 0; d < dim_padded; ++d) store(x + d * T + i, round_clip(load(x + d * T + i) * inverse));
  }
}
static void write_int8(const float* x, int64_t tokens, int64_t dim_padded, int8_t* dst) {
  for (int64_t i = 0; i < tokens; ++i)
    for (int64_t d = 0; d < dim_padded; ++d) dst[i * dim_padded + d] = (int8_t)(int32_t)x[d * T + i];
}
// X (integers) to the packed operand [channel/G][T][G], shifted by U.
static void pack_transposed(const float* x, int64_t lanes, int64_t dim_padded, elem* dst) {
  for (int64_t d = 0; d < dim_padded; d += G)
    for (int64_t i = 0; i < lanes; i += W) {
      vf rows[G];
      for (int g = 0; g < G; ++g) rows[g] = load(x + (d + g) * T + i) + (float)U;
      pack_rows(dst + (d * T + i * G), rows);
    }
}

// Mean over the sequence of one key/value head, as a sum of x / tokens, which cannot overflow.
static void mean_row(DType type, const void* base, int64_t offset, int64_t stride, int64_t tokens, int64_t dim,
                     float* mean) {
  float row[128], sum[128] = {};
  const float weight = tokens ? 1.0f / (float)tokens : 0.0f;
  for (int64_t i = 0; i < tokens; ++i) {
    read_row(type, base, offset + i * stride, dim, row);
    for (int64_t d = 0; d < dim; ++d) sum[d] += row[d] * weight;
  }
  __builtin_memcpy(mean, sum, dim * 4);
}

// What the channels of values about `mean`, at most amax away from it, are centred by in the backward, in their own type:
// the mean, or what is nearest to it of the numbers of which all values are 1/2 to 2, for then every difference is exact
// (Sterbenz); 0 where there is none. These are (|mean| + amax) / 2 to 2 (|mean| - amax), there are some up to amax =
// 0.6 |mean|, and rounding wants a margin. A rounding error that values have in common is no noise.
static void centre_row(DType type, const float* mean, const float* amax, int64_t dim, float* centre) {
  alignas(4) char stored[4 * 128];
  float nearest[128];
  for (int64_t d = 0; d < dim; ++d) {
    const float size = mean[d] < 0 ? -mean[d] : mean[d];
    const float c = amax[d] <= 0.58f * size ? smaller(smaller(size, 1.95f * (size - amax[d])), largest_finite(type)) : 0.0f;
    nearest[d] = mean[d] < 0 ? -c : c;
  }
  write_row(type, stored, 0, dim, nearest);
  read_row(type, stored, 0, dim, centre);
}
