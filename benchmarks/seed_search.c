/* Find the seed of a torch.Generator on a CPU from sixteen released values.

   seed_search START COUNT SKIP TOLERANCE x0 ... x15

   A torch.Generator is a Mersenne Twister that starts from 32 bits. `torch.randn` of a float32
   tensor of at least 16 values turns outputs k ... k+15 of it into 16 normal values at a time:
   u_j = (output & 0xffffff) / 2^24, and for j < 8
       x_j   = sqrt(-2 ln(1 - u_j)) cos(2 pi u_{j+8}),
       x_j+8 = sqrt(-2 ln(1 - u_j)) sin(2 pi u_{j+8}).
   The x_j on the command line are the noise plus something of 2-norm at most TOLERANCE (the
   clipped sum over the noise's deviation). SKIP outputs were used before. Each seed from START
   on, COUNT of them, whose noise is that near is printed with its distance.

   Only the state words that the sixteen outputs depend on are computed: 413 + SKIP of 624. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LANES 64
#define BLOCK 16
#define PAIRS 8
#define SHIFT 397 /* an output needs its own word, the next and the one 397 further */
#define WORDS 624

static const double TWO_PI = 6.283185307179586476925;

static uint32_t early[BLOCK + 1][LANES];
static uint32_t late[BLOCK][LANES];

static inline void advance(uint32_t *word, unsigned i) {
  for (int l = 0; l < LANES; l++) word[l] = 1812433253u * (word[l] ^ (word[l] >> 30)) + i;
}

/* Fill in the state words that outputs skip ... skip+15 depend on, for LANES seeds at once.
   Three plain loops, so that the compiler keeps the words of all lanes in vector registers. */
static void seed_lanes(uint32_t start, unsigned skip) {
  uint32_t word[LANES];
  unsigned i = 0;
  for (int l = 0; l < LANES; l++) word[l] = start + (uint32_t)l;
  while (i < skip) advance(word, ++i);
  for (int k = 0; k <= BLOCK; k++) {
    memcpy(early[k], word, sizeof word);
    advance(word, ++i);
  }
  while (i < skip + SHIFT) advance(word, ++i);
  for (int k = 0; k < BLOCK; k++) {
    memcpy(late[k], word, sizeof word);
    advance(word, ++i);
  }
}

/* Output k of a lane, its lowest 24 bits. */
static inline uint32_t output(int k, int l) {
  uint32_t y = (early[k][l] & 0x80000000u) | (early[k + 1][l] & 0x7fffffffu);
  y = late[k][l] ^ (y >> 1) ^ ((early[k + 1][l] & 1u) ? 0x9908b0dfu : 0u);
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  y ^= y >> 18;
  return y & 0xffffffu;
}

/* Squared distance of a lane's noise from the values; stops once it exceeds the limit. */
static double distance(const double *x, int l, double limit) {
  double total = 0;
  for (int j = 0; j < PAIRS && total <= limit; j++) {
    double radius = sqrt(-2 * log(1 - output(j, l) / 16777216.0));
    double angle = TWO_PI * output(j + PAIRS, l) / 16777216.0;
    double dx = x[j] - radius * cos(angle), dy = x[j + PAIRS] - radius * sin(angle);
    total += dx * dx + dy * dy;
  }
  return total;
}

int main(int count, char **args) {
  if (count != 5 + BLOCK) {
    fprintf(stderr, "usage: seed_search START COUNT SKIP TOLERANCE x0 ... x15\n");
    return 2;
  }
  uint64_t start = strtoull(args[1], NULL, 10), seeds = strtoull(args[2], NULL, 10);
  unsigned skip = (unsigned)strtoul(args[3], NULL, 10);
  double tolerance = atof(args[4]), x[BLOCK];
  if (skip + SHIFT + BLOCK > WORDS || start + seeds > (1ull << 32)) {
    fprintf(stderr, "SKIP is at most %d, START + COUNT at most 2^32\n", WORDS - SHIFT - BLOCK);
    return 2;
  }
  for (int i = 0; i < BLOCK; i++) x[i] = atof(args[5 + i]);

  /* The first pair lies in a disc around (x0, x8): an interval for u_0 and an arc for u_8. */
  double radius = hypot(x[0], x[PAIRS]);
  double inner = fmax(radius - tolerance, 0), outer = radius + tolerance;
  double low_u = floor((1 - exp(-inner * inner / 2)) * 16777216.0) - 1;
  double high_u = ceil((1 - exp(-outer * outer / 2)) * 16777216.0) + 1;
  uint32_t low = (uint32_t)fmax(low_u, 0), width = (uint32_t)(high_u - low);
  double half = tolerance < radius ? asin(tolerance / radius) / TWO_PI : 0.5;
  double middle = atan2(x[PAIRS], x[0]) / TWO_PI;
  uint32_t arc_low = (uint32_t)(int32_t)floor((middle - half) * 16777216.0 - 1) & 0xffffffu;
  uint32_t arc = (uint32_t)fmin(ceil(2 * half * 16777216.0) + 3, 16777215.0);

  for (uint64_t s = start; s < start + seeds; s += LANES) {
    uint32_t near[LANES], any = 0;
    seed_lanes((uint32_t)s, skip);
    for (int l = 0; l < LANES; l++) {
      near[l] = (output(0, l) - low <= width) & (((output(PAIRS, l) - arc_low) & 0xffffffu) <= arc);
      any |= near[l];
    }
    if (!any) continue;
    for (int l = 0; l < LANES && s + (uint64_t)l < start + seeds; l++) {
      double squared = near[l] ? distance(x, l, tolerance * tolerance) : INFINITY;
      if (squared <= tolerance * tolerance)
        printf("%llu %.9g\n", (unsigned long long)(s + (uint64_t)l), sqrt(squared));
    }
    fflush(stdout);
  }
  return 0;
}
