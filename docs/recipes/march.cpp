// Advection and diffusion of an ensemble, with a closure of hpc_closure: w_t + c w_x = nu lap w + U.
//
//   march FOLDER SEED LAST [START]
//
// FOLDER is an exported closure. initial.bin holds the states, (members, n, n) doubles. Without
// START the run begins at call 0; with START, a file of hc_save or of Python's Process.save, it
// continues. After every call up to LAST, state and closure are appended to run.bin; at the end
// the process is saved as process.safetensors.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <vector>

#include "hpc_closure.h"

using Array = std::vector<double>;

static void must(int status) {  // stop with the library's line
  if (status == HC_OK) return;
  std::fprintf(stderr, "%s\n", hc_error());
  std::exit(1);
}

// Exact spectral step on one side: the circulant matrix of exp(-nu k^2 t - i k c t).
static Array step_matrix(int n, double nu, double c, double time) {
  const double unit = 2 * std::acos(-1.0);  // of a side of length 1
  Array a(n * n);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) {
      double sum = 1;
      for (int k = 1; k < n / 2; ++k)
        sum += 2 * std::exp(-nu * unit * unit * k * k * time) *
               std::cos(unit * k * (double(i - j) / n - c * time));
      a[i * n + j] = sum / n;
    }
  return a;
}

static void advance(const Array &x, const Array &y, int n, double *w) {  // w <- X w Y^T
  Array half(n * n, 0.0);
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < n; ++k)
      for (int j = 0; j < n; ++j) half[i * n + j] += x[i * n + k] * w[k * n + j];
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) {
      w[i * n + j] = 0;
      for (int k = 0; k < n; ++k) w[i * n + j] += half[i * n + k] * y[j * n + k];
    }
}

int main(int argc, char **argv) {
  if (argc < 4) return std::fprintf(stderr, "usage: march FOLDER SEED LAST [START]\n"), 2;
  const int members = 20, last = std::atoi(argv[3]);
  hc_closure *closure;
  must(hc_open(argv[1], members, nullptr, std::atoll(argv[2]), &closure));
  const int n = int(hc_points(closure));
  const double span = hc_dt(closure) * double(hc_interval(closure));
  const Array x = step_matrix(n, 0.05, 0.3, span), y = step_matrix(n, 0.05, 0.0, span);

  Array w(hc_field_size(closure)), u(w.size());
  std::ifstream("initial.bin", std::ios::binary).read((char *)w.data(), w.size() * 8);
  if (argc > 4) {
    must(hc_load(closure, argv[4]));
  } else {  // a closure that reads previous closures starts from none here
    const Array none(w.size() * hc_earlier(closure, 1), 0.0);
    must(hc_begin(closure, nullptr, none.data()));
  }
  std::ofstream run("run.bin", std::ios::binary);
  while (hc_calls(closure) < last) {
    const Array before = w;  // the closure reads the state before the step, or the one after it
    for (int m = 0; m < members; ++m) advance(x, y, n, &w[m * n * n]);
    const Array &read = hc_reads_forecast(closure) ? w : before;
    must(hc_draw(closure, read.data(), u.data()));
    run.write((char *)read.data(), read.size() * 8);
    run.write((char *)u.data(), u.size() * 8);
    for (size_t i = 0; i < w.size(); ++i) w[i] += span * u[i];
  }
  must(hc_save(closure, "process.safetensors"));
  std::ofstream("initial.bin", std::ios::binary).write((char *)w.data(), w.size() * 8);
  hc_close(closure);
}
