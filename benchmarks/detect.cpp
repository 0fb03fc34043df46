// Which blocks of floats changed, and the squared norms of the change and of the base: what a
// careful loop in C++ does, for benchmarks/detect.py to compare with.
#include <cstdint>
#include <cstring>

extern "C" void detect(const float *now, const float *base, int64_t blocks, int64_t block,
                       uint8_t *changed, double *sums) {
  double change = 0, size = 0;
#pragma omp parallel for schedule(static) reduction(+ : change, size)
  for (int64_t b = 0; b < blocks; b++) {
    const float *a = now + b * block, *o = base + b * block;
    double c = 0, s = 0;
    uint32_t differs = 0;
#pragma omp simd reduction(+ : c, s) reduction(| : differs)
    for (int64_t i = 0; i < block; i++) {
      uint32_t u, v;
      std::memcpy(&u, a + i, 4);
      std::memcpy(&v, o + i, 4);
      double old = o[i], d = (double)a[i] - old;
      differs |= u ^ v;
      s += old * old;
      c += u != v ? d * d : 0;
    }
    changed[b] = differs != 0;
    change += c;
    size += s;
  }
  sums[0] = change;
  sums[1] = size;
}
