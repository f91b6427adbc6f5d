/* Rounding of a block of a fold, with what a certificate says of it, in one pass.
 *
 * rounding.py does the same with numpy where this was not compiled: both write the same bytes, and
 * find the same counts and extremes. The loop is written for compilers that make vectors of it
 * (-fopenmp-simd). For extremes it compares bits, which are in the order of the magnitudes: the
 * greater of two floats would depend on which is NaN, and no vectors be made.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { SOME = 4096 }; /* numbers that are counted in 32 bits */

/* What is written: bfloat16, IEEE 754's binary16 and binary32. */
enum { BF16, F16, F32 };

/* Of fp32: its sign and its exponent; the least normal number of fp32 and bf16, and of binary16. */
static const uint32_t SIGN = 0x80000000, EXPONENT = 0x7f800000;
static const uint32_t LEAST = 0x00800000, LEAST_F16 = 0x38800000;

/* As rounding.py has it. */
struct measures {
    uint64_t moved;
    double change, base;
    float largest; /* in powers of two at or below the larger end of a change, not in ulp */
    float rounding;
    int32_t is_finite;
};

#define INLINE static inline __attribute__((always_inline))

/* Where the loader can choose, each kind of processor gets code of its own. */
#if defined(__x86_64__) && defined(__GLIBC__)
#define FOR_EACH_PROCESSOR \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

INLINE uint32_t bits_of(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

INLINE float number_of(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

INLINE uint32_t greater(uint32_t one, uint32_t other)
{
    return one > other ? one : other;
}

/* The nearest of the numbers whose last `places` bits are 0; of two, the even one. */
INLINE uint32_t nearest(uint32_t bits, int places)
{
    uint32_t unit = 1u << places;
    return (bits + (unit / 2 - 1) + (bits / unit & 1)) & ~(unit - 1);
}

/* What binary16 has for a number of fp32: its bits, and the same number in fp32's. */
INLINE uint32_t in_binary16(uint32_t bits, uint32_t *back)
{
    uint32_t sign = bits & SIGN, size = bits & ~SIGN;
    /* Below its least normal number its steps are 2^-24, which fp32 has from 1/2 to 1. */
    float shifted = number_of(size) + 0.5f, small = shifted - 0.5f;
    uint32_t large = nearest(size, 13);
    int is_small = size < LEAST_F16, is_over = large >= 0x47800000; /* 2^16 */
    large = is_over ? EXPONENT : large;
    uint32_t rebiased = is_over ? 0x7c00 : (large - 0x38000000) >> 13;
    *back = sign | (is_small ? bits_of(small) : large);
    return sign >> 16 | (is_small ? bits_of(shifted) - bits_of(0.5f) : rebiased);
}

INLINE void round_all(const float *restrict before, const float *restrict exact,
    void *restrict written, uint64_t count, int dtype, struct measures *found)
{
    uint32_t largest = 0, rounding = 0, exponent = 0;
    memset(found, 0, sizeof *found);
    for (uint64_t start = 0; start < count; start += SOME) {
        const uint32_t some = count - start < SOME ? count - start : SOME;
        const float *was = before + start, *sum = exact + start;
        uint16_t *half = (uint16_t *)written + start;
        uint32_t *whole = (uint32_t *)written + start;
        uint32_t moved = 0;
        double change = 0, base = 0;
#pragma omp simd reduction(+ : moved, change, base) reduction(max : largest, rounding, exponent)
        for (uint32_t i = 0; i < some; i++) {
            uint32_t bits = bits_of(sum[i]), back = bits;
            if (dtype == F32)
                whole[i] = bits;
            else if (dtype == BF16)
                half[i] = (back = nearest(bits, 16)) >> 16;
            else
                half[i] = in_binary16(bits, &back);
            float gap = sum[i] - was[i], error = number_of(back) - sum[i];
            uint32_t larger = greater(bits_of(was[i]) & EXPONENT, bits & EXPONENT);
            float power = number_of(greater(larger, dtype == F16 ? LEAST_F16 : LEAST));
            moved += number_of(back) != was[i];
            largest = greater(largest, bits_of(gap / power) & ~SIGN);
            rounding = greater(rounding, bits_of(error) & ~SIGN);
            exponent = greater(exponent, greater(larger, back & EXPONENT));
            change += (double)gap * gap;
            base += (double)was[i] * was[i];
        }
        found->moved += moved;
        found->change += change;
        found->base += base;
    }
    found->largest = number_of(largest);
    found->rounding = number_of(rounding);
    found->is_finite = exponent < EXPONENT;
}

FOR_EACH_PROCESSOR
void round_block(const float *before, const float *exact, void *written, uint64_t count, int dtype,
    struct measures *found)
{
    /* Each dtype has a loop of its own. */
    if (dtype == BF16)
        round_all(before, exact, written, count, BF16, found);
    else if (dtype == F16)
        round_all(before, exact, written, count, F16, found);
    else
        round_all(before, exact, written, count, F32, found);
}
