/* When requests ought to leave: a Poisson process, the same times for the same seed. Link with -lm. */
#ifndef SKERRY_BENCH_ARRIVALS_H
#define SKERRY_BENCH_ARRIVALS_H

#include <math.h>
#include <stdint.h>

struct arrivals {
    uint64_t state;       /* of the random numbers */
    double mean_gap_ns;
    double next_ns;       /* a double: nanoseconds that were rounded away each time would change the rate */
};

/* splitmix64: any seed will do, and each number is as good as the last. */
static inline uint64_t random_bits(uint64_t *state)
{
    uint64_t mixed = *state += 0x9e3779b97f4a7c15u;
    mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9u;
    mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebu;
    return mixed ^ (mixed >> 31);
}

/* On to the next arrival. The gaps of independent clients are exponential: -ln(u) times their mean, u in (0, 1]. */
static inline void advance(struct arrivals *arrivals)
{
    double u = ((double)(random_bits(&arrivals->state) >> 11) + 1) / 9007199254740992.0; /* 2^53 */
    arrivals->next_ns += -log(u) * arrivals->mean_gap_ns;
}

/* Arrivals from `start_ns` on, `rate` a second on average. */
static inline struct arrivals arrive(uint64_t seed, double rate, uint64_t start_ns)
{
    struct arrivals arrivals = {.state = seed, .mean_gap_ns = 1e9 / rate, .next_ns = (double)start_ns};
    advance(&arrivals);
    return arrivals;
}

#endif
