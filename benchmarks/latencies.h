/* Latencies in fixed memory: a histogram with 2^8 steps per power of two, so a value is known to 0.4 %. */
#ifndef SKERRY_BENCH_LATENCIES_H
#define SKERRY_BENCH_LATENCIES_H

#include <stdint.h>

enum { STEP_BITS = 8, STEPS = 1 << STEP_BITS, OCTAVES = 64 - STEP_BITS + 1 };

struct latencies {
    uint64_t counts[OCTAVES][STEPS];
    uint64_t total, sum_ns, max_ns;
};

static inline void record_latency(struct latencies *latencies, uint64_t ns)
{
    int octave = 0;
    uint64_t step = ns;
    if (ns >= STEPS) {
        octave = 64 - STEP_BITS - __builtin_clzll(ns);
        step = (ns >> (octave - 1)) - STEPS;
    }
    latencies->counts[octave][step]++;
    latencies->total++;
    latencies->sum_ns += ns;
    if (ns > latencies->max_ns)
        latencies->max_ns = ns;
}

/* The latency in microseconds that a share of `quantile` of the requests stayed within; 0 if there were none. */
static inline double latency_us(const struct latencies *latencies, double quantile)
{
    uint64_t wanted = (uint64_t)(quantile * (double)latencies->total), seen = 0;
    for (int octave = 0; octave < OCTAVES; octave++)
        for (uint64_t step = 0; step < STEPS; step++) {
            seen += latencies->counts[octave][step];
            if (seen > wanted || (seen == latencies->total && seen > 0)) {
                uint64_t ns = octave == 0 ? step : (step + STEPS) << (octave - 1);
                return (double)ns / 1000.0;
            }
        }
    return 0;
}

static inline double mean_us(const struct latencies *latencies)
{
    return latencies->total > 0 ? (double)latencies->sum_ns / (double)latencies->total / 1000.0 : 0;
}

#endif
