// Rotary angles from integers (Su et al. 2021, arXiv:2104.09864).
//
// A frequency is turns per position as a 64-bit binary fraction. Position times frequency modulo one turn is then exact
// in 32-bit integer arithmetic, at any position, with no table: what is left is the error of one float32 angle of at
// most half a turn and of sin.approx and cos.approx, below 1e-6 together (docs/numerics.md).
// -D FLOAT32_ANGLES: a frequency is a float32 in its upper word and the angle the float32 product, as in transformers.
#pragma once

__device__ __forceinline__ void rotation(int position, uint2 frequency, float& cosine, float& sine) {
#ifdef FLOAT32_ANGLES
    sincosf(__fmul_rn(static_cast<float>(position), __uint_as_float(frequency.y)), &sine, &cosine);
#else
    const unsigned p = static_cast<unsigned>(position);
    // Of 2^32 to a turn, at most half a turn either way.
    const int turn = static_cast<int>(p * frequency.y + __umulhi(p, frequency.x));
    const float angle = static_cast<float>(turn) * 1.4629180792671596e-9f;
    sine = __sinf(angle);
    cosine = __cosf(angle);
#endif
}

// Rotate the pair (a, b) of dims (i, i + D / 2).
__device__ __forceinline__ void rotate(float& a, float& b, float cosine, float sine) {
    const float first = a * cosine - b * sine;
    b = b * cosine + a * sine;
    a = first;
}

__device__ __forceinline__ void rotate(float& a, float& b, int position, uint2 frequency) {
    float cosine, sine;
    rotation(position, frequency, cosine, sine);
    rotate(a, b, cosine, sine);
}
