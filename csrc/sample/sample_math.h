// The formulas of sampling, once, for the CPU and the device. In float32 every step is an integer operation or a
// correctly rounded one of normal.h's, in the same order on both ends.
#pragma once

#include <cmath>

#include "common/normal.h"
#include "common/storage.h"
#include "sample/sample.h"

namespace fastnuggets::sample {

FN_HD float fused(float a, float b, float c) { return exact::fma(a, b, c); }
FN_HD double fused(double a, double b, double c) { return fma(a, b, c); }
// A product that is rounded here, whatever is added to it.
FN_HD float product(float a, float b) { return exact::mul(a, b); }
FN_HD double product(double a, double b) { return a * b; }
FN_HD float root(float x) { return exact::sqrt(x); }
FN_HD double root(double x) { return sqrt(x); }

// ---- logarithm and exponential, in plain arithmetic that the compiler can vectorise

FN_HD double log_(double x) { return log(x); }
FN_HD double log_normal_number(double x) { return log(x); }
FN_HD double exp_(double x) { return exp(x); }

// ln x of a positive float that is neither subnormal nor infinite.
FN_HD float log_normal_number(float x) {
  constexpr std::uint32_t kRootHalf = 0x3F3504F3u;  // bits of sqrt(1/2)
  const std::uint32_t bits = exact::bits(x);
  const std::uint32_t k = std::uint32_t(std::int32_t(bits - kRootHalf) >> 23);
  const float e = exact::from_int(k);
  const float t = exact::value(bits - (k << 23)) - 1.0f;  // x = (1 + t) 2^e with 1 + t in [sqrt(1/2), sqrt(2))
  // (ln(1 + t) - t) / t^2, found as the polynomials of normal.h; largest error 5.8e-9, relative to the logarithm.
  const float t2 = t * t;
  float p = -0x1.38cf2p-4f;
  p = exact::fma(p, t, 0x1.05602ep-3f);
  p = exact::fma(p, t, -0x1.0d81f2p-3f);
  p = exact::fma(p, t, 0x1.22d8f8p-3f);
  p = exact::fma(p, t, -0x1.54728cp-3f);
  p = exact::fma(p, t, 0x1.99a01ep-3f);
  p = exact::fma(p, t, -0x1.000226p-2f);
  p = exact::fma(p, t, 0x1.555554p-2f);
  p = exact::fma(p, t, -0.5f);
  const float low = exact::fma(t2, p, exact::mul(e, 0x1.7f7d1cp-20f)) + t;
  return exact::fma(e, 0x1.62e4p-1f, low);  // ln 2 in two parts, the first with few bits
}

// ln x of any float; seen over one in 37 of the positive ones, and all in [0.7, 1.5]: right to 0.88 units of the last
// place.
FN_HD float log_(float x) {
  const bool tiny = x < 0x1p-126f;
  const float ln = log_normal_number(tiny ? x * 0x1p23f : x);
  const float finite = tiny ? exact::fma(23.0f, -0x1.62e43p-1f, ln) : ln;
  const float special = x == 0.0f ? -HUGE_VALF : x > 0.0f ? HUGE_VALF : NAN;
  return x > 0.0f && x < HUGE_VALF ? finite : special;
}

// exp x of any float; seen over one in 37 of them, and all whose exponential is below 2^-124: right to 1.02 units of
// the last place.
FN_HD float exp_(float x) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const float above = x < -104.0f ? -104.0f : x;
  const float within = above > 89.0f ? 89.0f : above;  // NaN stays
  const float shifted = exact::fma(within, 0x1.715476p+0f, kToInteger);
  const float n = shifted - kToInteger;
  const float r = exact::fma(n, -0x1.7f7d1cp-20f, exact::fma(n, -0x1.62e4p-1f, within));
  // (exp r - 1 - r) / r^2 for |r| <= ln(2) / 2; largest error 3.7e-9, relative to the exponential.
  float p = 0x1.6b6996p-10f;
  p = exact::fma(p, r, 0x1.122f1ep-7f);
  p = exact::fma(p, r, 0x1.55568cp-5f);
  p = exact::fma(p, r, 0x1.5554a4p-3f);
  p = exact::fma(p, r, 0.5f);
  const float r2 = r * r;
  p = exact::fma(p, r2, r) + 1.0f;
  // 2^n as a product of two: n reaches from the subnormals to beyond the largest float.
  const std::uint32_t k = exact::bits(shifted) - 0x4B400000u;
  const std::uint32_t half = std::uint32_t(std::int32_t(k) >> 1);
  return p * exact::value((half + 127u) << 23) * exact::value((k - half + 127u) << 23);
}

// ln(1 + x) for x in [0, 1], given 1 + x as rounded and the inverse of that.
template <class R>
FN_HD R log1p_(R x, R above, R inverse) {
  return fused(x - (above - R(1)), inverse, log_normal_number(above));
}

// ---- noise

FN_HD PhiloxStream stream_of(const std::int64_t* key) {
  const std::uint64_t offset = std::uint64_t(key[1]);
  return {std::uint64_t(key[0]), std::uint32_t(offset), std::uint32_t(offset >> 32)};
}

// Numbers of a call, prepared once. A probability to keep is a multiple of 2^-16, and what is kept is divided by that.
struct Parameter {
  float value;
  std::int32_t threshold;  // of Kind::keep: this many of the 2^16 numbers of 16 bits keep

  FN_HD Parameter(Kind kind, double given) : value(float(given)), threshold(0) {
    if (kind != Kind::keep) return;
    threshold = std::int32_t(given * 0x1p16 + 0.5);
    value = threshold > 0 ? float(0x1p16 / threshold) : 0.0f;
  }
};

// u is inside (0, 1), so the exponential is neither 0 nor infinite.
FN_HD float gumbel_of(float exponential) { return -log_normal_number(exponential); }

// Noise of one random word; normals pair words and are normal.h's, masks share them.
template <Kind kind>
FN_HD float noise_of(std::uint32_t word) {
  if constexpr (kind == Kind::uniform) {
    return uniform(word);
  } else if constexpr (kind == Kind::laplace) {  // the top bit is the sign
    return exact::value(exact::bits(0.5f * minus_two_log(word << 1)) ^ (word & 0x80000000u));
  } else if constexpr (kind == Kind::logistic) {  // ln u - ln(1 - u)
    return 0.5f * (minus_two_log(~word) - minus_two_log(word));
  } else if constexpr (kind == Kind::gumbel) {  // -ln(-ln u)
    return gumbel_of(noise_of<Kind::exponential>(word));
  } else if constexpr (kind == Kind::exponential) {
    return 0.5f * minus_two_log(word);
  } else {
    static_assert(kind == Kind::sign);
    return exact::value((word & 0x80000000u) | 0x3F800000u);
  }
}

// A mask needs 16 bits, so a block of words serves kKeepGroup elements: those with number e, p = e % kKeepGroup and
// h = p / 16, take half h % 2, the low one first, of word h / 2 of counter 16 (e / kKeepGroup) + p % 16.
constexpr int kKeepGroup = 2 * kPhiloxBlock;
FN_HD float keep(std::uint32_t half, const Parameter& parameter) {
  return std::int32_t(half) < parameter.threshold ? parameter.value : 0.0f;
}

// ---- softplus, ln(1 + exp x), in steps: each is a loop of its own on the CPU

template <class R>
FN_HD R exp_of_minus_size(R x) {
  return exp_(x < R(0) ? x : -x);
}
template <class R>
FN_HD R softplus(R x, R e) {
  const R above = R(1) + e;
  return (x > R(0) ? x : R(0)) + log1p_(e, above, R(1) / above);
}
template <class R>
FN_HD R softplus_slope(R x, R e) {
  return (x < R(0) ? e : R(1)) / (R(1) + e);
}
// Far below 0 the softplus is exp(x), which underflows before its logarithm does.
template <class R>
FN_HD R log_softplus(R x, R softplus) {
  return x < R(-16) ? x : log_normal_number(softplus);
}
template <class R>
FN_HD R log_softplus_slope(R x, R softplus, R slope) {
  return x < R(-16) ? R(1) : slope / softplus;
}

// ---- normals: the width, its logarithm, and the derivatives of both with respect to what says it

template <class R>
struct Spread {
  R std, log, std_slope, log_slope;
};

template <Form form, class R>
FN_HD Spread<R> spread_of(R x) {
  if constexpr (form == Form::std) {
    return {x, log_(x), R(1), R(1) / x};
  } else if constexpr (form == Form::logvar) {
    const R std = exp_(R(0.5) * x);
    return {std, R(0.5) * x, R(0.5) * std, R(0.5)};
  } else if constexpr (form == Form::log_std) {
    const R std = exp_(x);
    return {std, x, std, R(1)};
  } else if constexpr (form == Form::var) {
    // The slope grows without bound towards 0; at 0, where nothing is left of the noise, it is 0.
    const R var = x < R(0) ? R(0) : x;
    const R std = root(var);
    return {std, R(0.5) * log_(var), var > R(0) ? R(0.5) / std : R(0), R(0.5) / var};
  } else {
    const R e = exp_of_minus_size(x), std = softplus(x, e), slope = softplus_slope(x, e);
    return {std, log_softplus(x, std), slope, log_softplus_slope(x, std, slope)};
  }
}

// Of the prior: what the divergence is made of.
template <class R>
struct Prior {
  R inverse, log;
};
template <class R>
FN_HD Prior<R> prior_of(R std) {
  return {R(1) / std, log_(std)};
}

template <class R>
FN_HD R normal_kl(R mean, R std, R log, R prior_mean, R inverse, R prior_log) {
  const R q = product(std, inverse), d = (mean - prior_mean) * inverse;
  return fused(R(0.5), fused(d, d, (q - R(1)) * (q + R(1))), prior_log - log);
}

// Gradients, given that of the divergence and what reaches mean and std by the other outputs.
template <class R>
FN_HD R grad_of_mean(R by_mean, R grad_kl, R mean, R prior_mean, R inverse) {
  return fused(grad_kl * inverse, (mean - prior_mean) * inverse, by_mean);
}
template <class R>
FN_HD R grad_of_spread(R by_std, R grad_kl, R std, R std_slope, R log_slope, R inverse) {
  return fused(fused(grad_kl * inverse, std * inverse, by_std), std_slope, -(grad_kl * log_slope));
}
template <class R>
FN_HD R grad_of_prior_mean(R grad_kl, R mean, R prior_mean, R inverse) {
  return -(grad_kl * inverse * ((mean - prior_mean) * inverse));
}
template <class R>
FN_HD R grad_of_prior_std(R grad_kl, R mean, R std, R prior_mean, R inverse) {
  const R q = std * inverse, d = (mean - prior_mean) * inverse;
  return grad_kl * inverse * fused(-d, d, fused(-q, q, R(1)));
}

// ---- log-uniform prior

template <class R>
FN_HD R sigmoid(R x) {
  return softplus_slope(x, exp_of_minus_size(x));
}
template <class R>
FN_HD R softplus(R x) {
  return softplus(x, exp_of_minus_size(x));
}

template <Approximation approximation, class R>
FN_HD R log_uniform_kl(R log_alpha) {
  if constexpr (approximation == Approximation::molchanov) {
    constexpr R k1 = R(kMolchanov[0]), k2 = R(kMolchanov[1]), k3 = R(kMolchanov[2]);
    const R s = sigmoid(fused(k3, log_alpha, k2));
    return fused(k1, R(1) - s, R(0.5) * softplus(-log_alpha));
  } else if constexpr (approximation == Approximation::kingma) {
    const R a = exp_(log_alpha);
    const R p = fused(fused(R(-kKingma[2]), a, R(-kKingma[1])), a, R(-kKingma[0]));
    return fused(p, a, R(-0.5) * log_alpha);
  } else {
    return R(0.5) * softplus(-log_alpha);
  }
}

// With respect to log_alpha.
template <Approximation approximation, class R>
FN_HD R log_uniform_slope(R log_alpha) {
  if constexpr (approximation == Approximation::molchanov) {
    constexpr R k2 = R(kMolchanov[1]), k3 = R(kMolchanov[2]), slope = R(-kMolchanov[0] * kMolchanov[2]);
    const R s = sigmoid(fused(k3, log_alpha, k2));
    return fused(slope * s, R(1) - s, R(-0.5) * sigmoid(-log_alpha));
  } else if constexpr (approximation == Approximation::kingma) {
    const R a = exp_(log_alpha);
    const R p = fused(fused(R(-3 * kKingma[2]), a, R(-2 * kKingma[1])), a, R(-kKingma[0]));
    return fused(p, a, R(-0.5));
  } else {
    return R(-0.5) * sigmoid(-log_alpha);
  }
}

}  // namespace fastnuggets::sample
