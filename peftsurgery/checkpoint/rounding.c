/* Rounding of a block of a fold, with what a certificate says of it, in one pass.
 *
 * rounding.py does the same with numpy where this was not compiled: both write the same bytes, and
 * find the same counts and extremes. Vectors of 16 numbers are an extension that gcc and clang have
 * for any processor; extremes are those of the bits, since magnitudes are in the order of their bits.
 */

#include <stdint.h>
#include <string.h>

enum { LANES = 16, HALF = LANES / 2 };

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Words __attribute__((vector_size(2 * LANES)));
typedef float Half __attribute__((vector_size(4 * HALF)));
typedef double Doubles __attribute__((vector_size(8 * HALF)));

/* What is written: bfloat16, IEEE 754's binary16 and binary32. */
enum { BF16, F16, F32 };

/* Of fp32: its sign, its exponent, and 1/2; the least normal number of fp32 and bf16, of binary16. */
static const uint32_t SIGN = 0x80000000, EXPONENT = 0x7f800000, ONE_HALF = 0x3f000000;
static const uint32_t LEAST = 0x00800000, LEAST_F16 = 0x38800000;

/* As rounding.py has it. */
struct measures {
    uint64_t moved;
    double change, base;
    float largest; /* in powers of two at or below the larger end of a change, not in ulp */
    float rounding;
    int32_t is_finite;
};

/* What is measured so far, in each of the lanes by itself. */
struct lanes {
    Bits moved, largest, rounding, exponent;
    Doubles change, base;
};

#define INLINE static inline __attribute__((always_inline))

/* Where the loader can choose, each kind of processor gets code of its own. */
#if defined(__x86_64__) && defined(__GLIBC__)
#define FOR_EACH_PROCESSOR \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

INLINE Bits chosen(Bits is_one, Bits one, Bits other)
{
    return (one & is_one) | (other & ~is_one);
}

INLINE Bits greater(Bits one, Bits other)
{
    return chosen((Bits)(one > other), one, other);
}

/* The nearest of the numbers whose last `places` bits are 0; of two, the even one. */
INLINE Bits nearest(Bits value, int places)
{
    uint32_t unit = 1u << places;
    return (value + (unit / 2 - 1) + (value / unit & 1)) & ~(unit - 1);
}

/* What binary16 has for numbers of fp32: its bits, and the same number in fp32's. */
INLINE Bits in_binary16(Bits value, Bits *back)
{
    Bits sign = value & SIGN, size = value & ~SIGN;
    /* Below its least normal number its steps are 2^-24, which fp32 has from 1/2 to 1. */
    Floats shifted = (Floats)size + 0.5f, small = shifted - 0.5f;
    Bits is_small = (Bits)(size < LEAST_F16);
    Bits large = nearest(size, 13), is_over = (Bits)(large >= 0x47800000); /* 2^16 */
    large = chosen(is_over, (Bits){0} + EXPONENT, large);
    Bits rebiased = chosen(is_over, (Bits){0} + 0x7c00, (large - 0x38000000) >> 13);
    *back = sign | chosen(is_small, (Bits)small, large);
    return sign >> 16 | chosen(is_small, (Bits)shifted - ONE_HALF, rebiased);
}

/* The sums of the squares of 16 numbers, of two each. */
INLINE Doubles squares(Floats values)
{
    Half halves[2];
    memcpy(halves, &values, sizeof halves);
    Doubles low = __builtin_convertvector(halves[0], Doubles);
    Doubles high = __builtin_convertvector(halves[1], Doubles);
    return low * low + high * high;
}

/* Write 16 numbers as `dtype` has them, and measure. */
INLINE void round_some(
    const float *before, const float *exact, char *written, int dtype, struct lanes *all)
{
    Bits was, sum, back;
    memcpy(&was, before, sizeof was);
    memcpy(&sum, exact, sizeof sum);
    if (dtype == F32) {
        back = sum;
        memcpy(written, &back, sizeof back);
    } else {
        Bits stored = dtype == F16 ? in_binary16(sum, &back) : (back = nearest(sum, 16)) >> 16;
        Words words = __builtin_convertvector(stored, Words);
        memcpy(written, &words, sizeof words);
    }
    Floats gap = (Floats)sum - (Floats)was, error = (Floats)back - (Floats)sum;
    Bits exponent = greater(was & EXPONENT, sum & EXPONENT);
    Bits power = greater(exponent, (Bits){0} + (dtype == F16 ? LEAST_F16 : LEAST));
    all->moved -= (Bits)((Floats)back != (Floats)was);
    all->largest = greater(all->largest, (Bits)(gap / (Floats)power) & ~SIGN);
    all->rounding = greater(all->rounding, (Bits)error & ~SIGN);
    all->exponent = greater(all->exponent, greater(exponent, back & EXPONENT));
    all->change += squares(gap);
    all->base += squares((Floats)was);
}

INLINE uint32_t most(Bits values)
{
    uint32_t found = 0;
    for (int lane = 0; lane < LANES; lane++)
        found = values[lane] > found ? values[lane] : found;
    return found;
}

INLINE float number(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE void round_all(const float *before, const float *exact, char *written, uint64_t count,
    int dtype, struct measures *found)
{
    const size_t size = dtype == F32 ? 4 : 2;
    uint64_t place = 0;
    struct lanes all;
    memset(&all, 0, sizeof all);
    for (; place + LANES <= count; place += LANES)
        round_some(before + place, exact + place, written + place * size, dtype, &all);
    if (place < count) { /* the rest, before zeros, which change nothing */
        float was[LANES] = {0}, sum[LANES] = {0};
        char stored[4 * LANES];
        memcpy(was, before + place, (count - place) * sizeof *was);
        memcpy(sum, exact + place, (count - place) * sizeof *sum);
        round_some(was, sum, stored, dtype, &all);
        memcpy(written + place * size, stored, (count - place) * size);
    }
    memset(found, 0, sizeof *found);
    for (int lane = 0; lane < LANES; lane++)
        found->moved += all.moved[lane];
    for (int lane = 0; lane < HALF; lane++) {
        found->change += all.change[lane];
        found->base += all.base[lane];
    }
    found->largest = number(most(all.largest));
    found->rounding = number(most(all.rounding));
    found->is_finite = most(all.exponent) < EXPONENT;
}

FOR_EACH_PROCESSOR
void round_block(const float *before, const float *exact, void *written, uint64_t count, int dtype,
    struct measures *found)
{
    /* Each call has its dtype in its code, not in its loop. */
    if (dtype == BF16)
        round_all(before, exact, written, count, BF16, found);
    else if (dtype == F16)
        round_all(before, exact, written, count, F16, found);
    else
        round_all(before, exact, written, count, F32, found);
}
