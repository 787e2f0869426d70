// The basic model interface (BMI 2.0, bmi.readthedocs.io) of an exported closure: a framework sets
// the state, calls Update once an interval, and reads the closure.
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "hpc_closure.h"

class ClosureBmi {
 public:
  void Initialize(const std::string &folder, int64_t members, int64_t seed) {
    Must(hc_open(folder.c_str(), members, nullptr, seed, &closure_));
    state_.resize(size_t(hc_field_size(closure_))), u_ = state_;
    const std::vector<double> none(state_.size() * size_t(hc_earlier(closure_, 1)), 0.0);
    Must(hc_begin(closure_, nullptr, none.data()));
  }
  void Update() { Must(hc_draw(closure_, state_.data(), u_.data())); }
  void Finalize() { hc_close(closure_), closure_ = nullptr; }
  double GetTimeStep() const { return hc_dt(closure_) * double(hc_interval(closure_)); }
  double GetCurrentTime() const { return double(hc_calls(closure_)) * GetTimeStep(); }
  int GetVarNbytes(const std::string &) const { return int(state_.size() * sizeof(double)); }
  void SetValue(const std::string &name, const void *from) {
    std::memcpy(Of(name).data(), from, size_t(GetVarNbytes(name)));
  }
  void GetValue(const std::string &name, void *to) {
    std::memcpy(to, Of(name).data(), size_t(GetVarNbytes(name)));
  }

 private:
  hc_closure *closure_ = nullptr;
  std::vector<double> state_, u_;
  static void Must(int status) {
    if (status != HC_OK) throw std::runtime_error(hc_error());
  }
  std::vector<double> &Of(const std::string &name) {
    if (name != "state" && name != "closure")
      throw std::runtime_error(name + ": expected state or closure");
    return name == "state" ? state_ : u_;
  }
};

int main(int argc, char **argv) {  // a framework in three lines: two updates of a state at rest
  if (argc < 2) return std::fprintf(stderr, "usage: bmi FOLDER\n"), 2;
  ClosureBmi model;
  model.Initialize(argv[1], 20, 1);
  for (int call = 0; call < 2; ++call) model.Update();
  std::printf("%.6g\n", model.GetCurrentTime());
  model.Finalize();
}
