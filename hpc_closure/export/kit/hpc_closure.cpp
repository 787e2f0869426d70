// A trained closure for solvers in C, C++ and Fortran; the interface is described in hpc_closure.h.
//
// The compiled draw (closure.pt2) is a function of arrays without a state. This file draws the
// normal numbers by the counters of Python's hpc_closure.spectral.noise.counters, stores what later
// draws read as hpc_closure.closure.process does, and reads and writes the same files.

#include "hpc_closure.h"

#include <ATen/ATen.h>
#include <sys/statvfs.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Array = std::vector<double>;
using Shape = std::vector<int64_t>;

const char *const kFormat = "hpc_closure export 1";
const char *const kProcess = "hpc_closure process 1";
const char *const kCheck = "hpc_closure check 1";
const double kAgree = 2e-6;  // largest difference of the self-test over its largest value
const double kPi = 3.14159265358979323846;

thread_local std::string last_error;

[[noreturn]] void fail(const std::string &text) { throw std::runtime_error(text); }

template <class T>
std::string str(const T &value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

// ---- JSON, as much of it as the files of this package hold --------------------------------------

struct Json {
  enum Kind { null, boolean, number, text, list, object } kind = null;
  double value = 0;
  std::string words;  // of a text; of a number its digits
  std::vector<Json> items;
  std::map<std::string, Json> members;

  const Json &operator[](const std::string &name) const {
    auto found = members.find(name);
    if (found == members.end()) fail("no entry \"" + name + "\"");
    return found->second;
  }
  bool has(const std::string &name) const { return members.count(name) > 0; }
  int64_t integer() const {
    if (kind != number) fail("expected a number");
    return std::strtoll(words.c_str(), nullptr, 10);
  }
  Shape integers() const {
    Shape out;
    for (const Json &item : items) out.push_back(item.integer());
    return out;
  }
};

class Parser {
 public:
  explicit Parser(const std::string &text) : text_(text) {}
  Json whole() {
    Json out = value(0);
    space();
    if (at_ != text_.size()) fail("text after the end of JSON");
    return out;
  }

 private:
  const std::string &text_;
  size_t at_ = 0;

  void space() {
    while (at_ < text_.size() && std::strchr(" \t\r\n", text_[at_])) ++at_;
  }
  char next() {
    if (at_ >= text_.size()) fail("JSON ends early");
    return text_[at_++];
  }
  bool take(char wanted) {
    space();
    if (at_ >= text_.size() || text_[at_] != wanted) return false;
    ++at_;
    return true;
  }
  void word(const char *wanted) {
    for (; *wanted; ++wanted)
      if (next() != *wanted) fail("damaged JSON");
  }
  std::string string() {
    std::string out;
    if (!take('"')) fail("damaged JSON");
    for (char c = next(); c != '"'; c = next()) {
      if (c != '\\') {
        out += c;
        continue;
      }
      c = next();
      const char *from = "bfnrt", *to = "\b\f\n\r\t";
      if (c == 'u') {
        unsigned code = 0;
        for (int i = 0; i < 4; ++i)
          code = 16 * code + unsigned(std::stoi(std::string(1, next()), nullptr, 16));
        if (code < 0x80) {
          out += char(code);
        } else if (code < 0x800) {
          out += char(0xC0 | code >> 6);
          out += char(0x80 | (code & 0x3F));
        } else {
          out += char(0xE0 | code >> 12);
          out += char(0x80 | (code >> 6 & 0x3F));
          out += char(0x80 | (code & 0x3F));
        }
      } else {
        const char *found = std::strchr(from, c);
        out += found && c ? to[found - from] : c;
      }
    }
    return out;
  }
  Json value(int depth) {
    if (depth > 64) fail("JSON is nested too deeply");
    Json out;
    space();
    if (at_ >= text_.size()) fail("JSON ends early");
    const char c = text_[at_];
    if (take('{')) {
      out.kind = Json::object;
      if (take('}')) return out;
      do {
        std::string name = string();
        if (!take(':')) fail("damaged JSON");
        out.members[name] = value(depth + 1);
      } while (take(','));
      if (!take('}')) fail("damaged JSON");
    } else if (take('[')) {
      out.kind = Json::list;
      if (take(']')) return out;
      do out.items.push_back(value(depth + 1));
      while (take(','));
      if (!take(']')) fail("damaged JSON");
    } else if (c == '"') {
      out.kind = Json::text;
      out.words = string();
    } else if (c == 't' || c == 'f') {
      out.kind = Json::boolean;
      out.value = c == 't';
      word(c == 't' ? "true" : "false");
    } else if (c == 'n') {
      word("null");
    } else {
      out.kind = Json::number;
      const size_t first = at_;
      while (at_ < text_.size() && std::strchr("+-.0123456789eE", text_[at_])) ++at_;
      out.words = text_.substr(first, at_ - first);
      char *end = nullptr;
      out.value = std::strtod(out.words.c_str(), &end);
      if (out.words.empty() || *end) fail("damaged JSON");
    }
    return out;
  }
};

std::string quoted(const std::string &text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

std::string listed(const Shape &values) {
  std::string out = "[";
  for (size_t i = 0; i < values.size(); ++i) out += (i ? ", " : "") + str(values[i]);
  return out + "]";
}

// ---- files in the safetensors format ------------------------------------------------------------

std::string contents(const std::string &path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path + ": no such file, or not readable");
  std::ostringstream out;
  out << file.rdbuf();
  return out.str();
}

struct Tensors {
  std::map<std::string, std::string> metadata;
  std::map<std::string, std::pair<Shape, Array>> fields;
  std::vector<uint64_t> words;  // of the entry "words"
};

template <class T>
std::vector<T> numbers_of(const std::string &bytes, size_t first, size_t last) {
  std::vector<T> out((last - first) / sizeof(T));
  std::memcpy(out.data(), bytes.data() + first, out.size() * sizeof(T));
  return out;
}

Tensors parse(const std::string &bytes, const std::string &name, const std::string &format) {
  Tensors out;
  try {
    uint64_t length = 0;
    if (bytes.size() < 8) fail("it is too short");
    std::memcpy(&length, bytes.data(), 8);
    if (length > bytes.size() - 8) fail("it is truncated");
    const Json header = Parser(bytes.substr(8, length)).whole();
    size_t used = 8 + length;
    for (const auto &[key, entry] : header.members) {
      if (key == "__metadata__") {
        for (const auto &[one, value] : entry.members) out.metadata[one] = value.words;
        continue;
      }
      const std::string kind = entry["dtype"].words;
      const Shape shape = entry["shape"].integers(), range = entry["data_offsets"].integers();
      const size_t first = 8 + length + size_t(range.at(0)), last = 8 + length + size_t(range.at(1));
      if (last > bytes.size() || first > last) fail("it is truncated");
      used = std::max(used, last);
      int64_t count = 1;
      for (int64_t side : shape) count *= side;
      if (kind == "U64" || kind == "I64") {
        out.words = numbers_of<uint64_t>(bytes, first, last);
      } else if (kind == "F64") {
        out.fields[key] = {shape, numbers_of<double>(bytes, first, last)};
      } else if (kind == "F32") {
        const std::vector<float> read = numbers_of<float>(bytes, first, last);
        out.fields[key] = {shape, Array(read.begin(), read.end())};
      } else {
        fail("numbers of type " + kind);
      }
      if (kind[0] == 'F' && int64_t(out.fields[key].second.size()) != count) fail("it is damaged");
    }
    if (used != bytes.size()) fail("it has " + str(bytes.size()) + " bytes, expected " + str(used));
  } catch (const std::exception &error) {
    fail(name + ": not a whole file of a process (" + error.what() + ")");
  }
  if (out.metadata["format"] != format)
    fail(name + ": not a file of a process (expected '" + format + "')");
  return out;
}

// ---- noise: Philox4x64-10 (Salmon et al., SC 2011) keyed by SHA-256 (FIPS 180-4) ----------------

using Key = std::array<uint64_t, 2>;

std::array<uint8_t, 32> sha256(const std::string &text) {
  static const uint32_t k[64] = {
      0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
      0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
      0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
      0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
      0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
      0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
      0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
      0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
      0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
      0xc67178f2};
  uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                   0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::string padded = text + char(0x80);
  while (padded.size() % 64 != 56) padded += char(0);
  for (int i = 7; i >= 0; --i) padded += char(uint64_t(text.size()) * 8 >> 8 * i & 0xff);
  auto turn = [](uint32_t x, int n) { return x >> n | x << (32 - n); };
  for (size_t block = 0; block < padded.size(); block += 64) {
    uint32_t w[64];
    for (int i = 0; i < 16; ++i) {
      w[i] = 0;
      for (int j = 0; j < 4; ++j) w[i] = w[i] << 8 | uint8_t(padded[block + 4 * i + j]);
    }
    for (int i = 16; i < 64; ++i) {
      const uint32_t s0 = turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3;
      const uint32_t s1 = turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10;
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    uint32_t v[8];
    std::memcpy(v, h, sizeof v);
    for (int i = 0; i < 64; ++i) {
      const uint32_t s1 = turn(v[4], 6) ^ turn(v[4], 11) ^ turn(v[4], 25);
      const uint32_t one = v[7] + s1 + ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
      const uint32_t s0 = turn(v[0], 2) ^ turn(v[0], 13) ^ turn(v[0], 22);
      const uint32_t two = s0 + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
      for (int j = 7; j > 0; --j) v[j] = v[j - 1];
      v[4] += one;
      v[0] = one + two;
    }
    for (int i = 0; i < 8; ++i) h[i] += v[i];
  }
  std::array<uint8_t, 32> out;
  for (int i = 0; i < 32; ++i) out[i] = uint8_t(h[i / 4] >> (24 - 8 * (i % 4)));
  return out;
}

Key key_of(int64_t seed, const std::string &stage, int64_t member) {
  const auto digest = sha256(str(seed) + "/" + stage + "/" + str(member));
  Key key = {0, 0};
  for (int i = 0; i < 16; ++i) key[i / 8] |= uint64_t(digest[i]) << 8 * (i % 8);
  return key;
}

// Words of counters (1 .. ceil(count / 4), item, stream, 0).
void uniform_bits(const Key &key, uint64_t stream, uint64_t item, int64_t count, uint64_t *out) {
  for (int64_t done = 0; done < count; done += 4) {
    std::array<uint64_t, 4> x = {uint64_t(done / 4 + 1), item, stream, 0};
    Key k = key;
    for (int round = 0; round < 10; ++round) {
      const unsigned __int128 a = (unsigned __int128)0xD2E7470EE14C6C93u * x[0];
      const unsigned __int128 b = (unsigned __int128)0xCA5A826395121157u * x[2];
      x = {uint64_t(b >> 64) ^ x[1] ^ k[0], uint64_t(b), uint64_t(a >> 64) ^ x[3] ^ k[1],
           uint64_t(a)};
      k[0] += 0x9E3779B97F4A7C15u;
      k[1] += 0xBB67AE8584CAA73Bu;
    }
    for (int64_t i = 0; i < 4 && done + i < count; ++i) out[done + i] = x[i];
  }
}

// Complex normals with E|z|^2 = 2 of words, as Python's box_muller: the angle is the sum of a table
// entry and a remainder below 2 pi / 4096, for which short series are exact.
void box_muller(const uint64_t *words, int64_t count, double *out) {
  static const std::vector<double> tables = [] {
    std::vector<double> both(2 * 4096);
    for (int i = 0; i < 4096; ++i) {
      both[2 * i] = std::cos(2 * kPi * i / 4096);
      both[2 * i + 1] = std::sin(2 * kPi * i / 4096);
    }
    return both;
  }();
  for (int64_t i = 0; i < count; ++i) {
    const double high = (double(words[i] >> 32) + 0.5) * 0x1p-32;
    const double radius = std::sqrt(-2.0 * std::log(high));
    const uint32_t low = uint32_t(words[i]), index = low >> 20;
    const double rest = double(low & 0xFFFFF) * (2.0 * kPi * 0x1p-32), square = rest * rest;
    const double sin = ((square * (1.0 / 120) - 1.0 / 6) * square + 1.0) * rest * radius;
    const double cos = ((square * (1.0 / 24) - 0.5) * square + 1.0) * radius;
    const double c = tables[2 * index], s = tables[2 * index + 1];
    out[2 * i] = c * cos - s * sin;
    out[2 * i + 1] = s * cos + c * sin;
  }
}

// ---- where programs of the package are unpacked -------------------------------------------------

void check_temporary_folder() {
  const char *folder = "/tmp";
  for (const char *name : {"TMPDIR", "TMP", "TEMP", "TEMPDIR"})
    if (const char *value = std::getenv(name)) {
      folder = value;
      break;
    }
  struct statvfs about;
  if (statvfs(folder, &about) != 0 || access(folder, W_OK) != 0)
    fail(std::string("temporary folder ") + folder +
         ": missing or not writable, and torch unpacks closure.pt2 there; set TMPDIR to another");
  if (about.f_flag & ST_NOEXEC)
    fail(std::string("temporary folder ") + folder +
         ": mounted noexec, and torch loads programs of closure.pt2 there; set TMPDIR to another");
}

void check_processor(const std::string &isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has = isa == "avx512" ? __builtin_cpu_supports("avx512f")
                   : isa == "avx2" ? __builtin_cpu_supports("avx2")
                                   : true;
  if (!has)
    fail("closure.pt2 was compiled for " + isa + ", which this processor lacks; compile it again "
         "here: hpc-closure export FOLDER --here");
#else
  (void)isa;
#endif
}

std::mutex loading;  // torch's loader is not safe for threads

}  // namespace

// ---- a closure in time --------------------------------------------------------------------------

struct hc_closure {
  std::string folder, model, stage;
  int64_t members = 0, points = 0, modes = 0, fields = 1, dimensions = 2, interval = 1, seed = 0;
  int64_t frames = 0, lag = 0, previous = 0, draws = 0, width = 0, shells = 0, calls = 0;
  int64_t stream_base = 0, stream_memory = 0, stream_component = 0;
  bool chooses = false, forecast = false, has_range = false;
  double dt = 0, ratio = 1;
  Shape ids, spacings, field_shape, spectrum_shape;  // without the members' axis
  std::vector<Key> keys;
  std::deque<Array> states;    // oldest first, (M, ..., 2K + 1, K + 1, 2)
  std::deque<Array> closures;  // newest first
  Array beyond;                // share of members of each shell, of the last call
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> program;

  static int64_t product(const Shape &shape) {
    return std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<int64_t>());
  }
  int64_t field_size() const { return members * product(field_shape); }
  int64_t spectrum_size() const { return members * product(spectrum_shape); }
  int64_t noise_size() const {
    return draws * members * width * 2 + (chooses ? draws * members : 0);
  }
  Shape with_members(const Shape &shape, int64_t number = 0) const {
    Shape out = {members};
    if (number >= 0) out.push_back(number);
    out.insert(out.end(), shape.begin(), shape.end());
    return out;
  }

  void set_keys(const Shape &own, int64_t own_seed) {
    ids = own;
    seed = own_seed;
    keys.clear();
    for (int64_t id : ids) {
      if (id < 0) fail("member id " + str(id) + ": expected ids from 0 on");
      keys.push_back(key_of(seed, stage, id));
    }
  }

  // Streams and items of the draws of a call, and its place between the knots.
  void plan(std::vector<std::pair<int64_t, int64_t>> &at, Array &turns) const {
    at.clear();
    turns.clear();
    if (!draws) return;
    at.emplace_back(stream_base, calls);
    for (int64_t knots : spacings) {
      const double place = double(calls) * ratio / double(knots), before = std::floor(place);
      const double theta = 0.5 * kPi * (place - before);
      const int64_t stream = stream_memory + std::lround(std::log2(double(knots)));
      for (int64_t i = 0; i < 2; ++i) at.emplace_back(stream, int64_t(before) + i);
      turns.push_back(std::cos(theta));
      turns.push_back(std::sin(theta));
    }
  }

  void noise(double *out) const {
    std::vector<std::pair<int64_t, int64_t>> at;
    Array turns;
    plan(at, turns);
    std::vector<uint64_t> words(size_t(std::max<int64_t>(width, 1)));
    for (const auto &[stream, item] : at)
      for (const Key &key : keys) {
        uniform_bits(key, uint64_t(stream), uint64_t(item), width, words.data());
        box_muller(words.data(), width, out);
        out += 2 * width;
      }
    if (!chooses) return;
    for (const auto &draw : at)
      for (const Key &key : keys) {
        double both[2];
        uniform_bits(key, uint64_t(stream_component), uint64_t(draw.second), 1, words.data());
        box_muller(words.data(), 1, both);
        *out++ = both[0];
      }
  }

  void check_finite(const double *values, int64_t count, const char *name) const {
    for (int64_t i = 0; i < count; ++i)
      if (!std::isfinite(values[i]))
        fail(std::string(name) + " has non-finite values: the solver has blown up");
  }

  at::Tensor past(const std::vector<const Array *> &all) const {
    at::Tensor out = at::empty(with_members(spectrum_shape, int64_t(all.size())), at::kDouble);
    const int64_t each = product(spectrum_shape);
    double *to = out.data_ptr<double>();
    for (int64_t member = 0; member < members; ++member)
      for (const Array *one : all) {
        std::copy_n(one->data() + member * each, each, to);
        to += each;
      }
    return out;
  }

  void begin(const double *first_states, const double *first_closures) {
    std::deque<Array> read_states, read_closures;
    for (int64_t i = 0; first_states && i < frames * lag; ++i)
      read_states.push_back(spectra(first_states + i * field_size()));
    for (int64_t i = 0; first_closures && i < previous; ++i)
      read_closures.push_back(spectra(first_closures + i * field_size()));
    clear();
    states.swap(read_states);
    closures.swap(read_closures);
  }

  void draw(const double *state, const double *normals, double *u) {
    if (!state || !u) fail("hc_draw: expected arrays of states and closures, not NULL");
    check_finite(state, field_size(), "state");
    if (int64_t(states.size()) < frames * lag || int64_t(closures.size()) < previous)
      fail("this closure reads " + str(frames * lag) + " earlier states and " + str(previous) +
           " earlier closures, the process has " + str(states.size()) + " and " +
           str(closures.size()) + ": call hc_begin first");
    Array own;
    if (!normals) {
      own.resize(size_t(noise_size()));
      noise(own.data());
      normals = own.data();
    }
    std::vector<std::pair<int64_t, int64_t>> at;
    Array turns;
    plan(at, turns);
    std::vector<const Array *> earlier, last;
    for (int64_t number = 1; number <= frames; ++number)
      earlier.push_back(&states[states.size() - size_t(number * lag)]);
    for (const Array &one : closures) last.push_back(&one);
    auto of = [](const double *values, const Shape &shape) {
      return at::from_blob(const_cast<double *>(values), shape, at::kDouble);
    };
    const int64_t placed = draws * members * width * 2;
    c10::InferenceMode guard;
    const std::vector<at::Tensor> inputs = {
        of(state, with_members(field_shape, -1)),
        past(earlier),
        past(last),
        of(normals, {draws, members, width, 2}),
        of(normals + placed, {chooses ? draws : 0, members}),
        of(turns.data(), {int64_t(spacings.size()), 2}),
    };
    const std::vector<at::Tensor> made = program->run(inputs);
    auto copy = [](const at::Tensor &from, double *to) {
      const at::Tensor whole = from.to(at::kDouble).contiguous();
      std::copy_n(whole.data_ptr<double>(), whole.numel(), to);
    };
    copy(made.at(0), u);
    if (frames) {
      states.emplace_back(size_t(spectrum_size()));
      copy(made.at(1), states.back().data());
      while (int64_t(states.size()) > frames * lag) states.pop_front();
    }
    if (previous) {
      closures.emplace_front(size_t(spectrum_size()));
      Array &newest = closures.front();
      copy(made.at(2), newest.data());
      const int64_t each = product(spectrum_shape);
      for (int64_t member = 0; member < members; ++member) {
        double *first = newest.data() + member * each;
        bool finite = true;
        for (int64_t i = 0; i < each; ++i) finite = finite && std::isfinite(first[i]);
        if (!finite) std::fill_n(first, each, 0.0);
      }
      while (int64_t(closures.size()) > previous) closures.pop_back();
    }
    if (has_range) {
      const at::Tensor share = made.at(3).mean(0).contiguous();
      beyond.assign(share.data_ptr<double>(), share.data_ptr<double>() + share.numel());
    }
    ++calls;
  }

  // Retained spectra of fields of all members, as hpc_closure.spectral.modes.grid.to_spectra.
  Array spectra(const double *values) const {
    check_finite(values, field_size(), "state");
    const Shape shape = with_members(field_shape, -1);
    Shape axes;
    for (int64_t axis = -dimensions; axis < 0; ++axis) axes.push_back(axis);
    const at::Tensor field = at::from_blob(const_cast<double *>(values), shape, at::kDouble);
    at::Tensor full = at::fft_rfftn(field, std::nullopt, axes, "forward").narrow(-1, 0, modes + 1);
    for (int64_t axis = -dimensions; axis < -1; ++axis)
      full = at::cat({full.narrow(axis, 0, modes + 1), full.narrow(axis, points - modes, modes)},
                     axis);
    const at::Tensor pairs = at::view_as_real(full.contiguous()).contiguous();
    return Array(pairs.data_ptr<double>(), pairs.data_ptr<double>() + pairs.numel());
  }

  std::string pack() const {
    std::vector<std::pair<std::string, const std::deque<Array> *>> parts;
    if (!closures.empty()) parts.emplace_back("closures", &closures);
    if (!states.empty()) parts.emplace_back("states", &states);
    std::map<std::string, std::string> metadata = {{"calls", str(calls)},
                                                   {"format", kProcess},
                                                   {"interval", str(interval)},
                                                   {"members", listed(ids)},
                                                   {"model", quoted(model)},
                                                   {"seed", str(seed)}};
    std::string header = "{\"__metadata__\":{";
    for (const auto &[name, value] : metadata)
      header += (header.back() == '{' ? "" : ",") + quoted(name) + ":" + quoted(value);
    header += "}";
    int64_t first = 0;
    for (const auto &[name, fields_of] : parts) {
      const int64_t last = first + int64_t(fields_of->size()) * spectrum_size() * 8;
      Shape shape = with_members(spectrum_shape, -1);
      shape.insert(shape.begin(), int64_t(fields_of->size()));
      header += ",\"" + name + "\":{\"dtype\":\"F64\",\"shape\":" + listed(shape) +
                ",\"data_offsets\":" + listed({first, last}) + "}";
      first = last;
    }
    header += "}";
    while (header.size() % 8) header += ' ';
    const uint64_t length = header.size();
    std::string out(reinterpret_cast<const char *>(&length), 8);
    out += header;
    for (const auto &[name, fields_of] : parts)
      for (const Array &one : *fields_of)
        out.append(reinterpret_cast<const char *>(one.data()), one.size() * 8);
    return out;
  }

  std::deque<Array> stored_fields(const Tensors &file, const std::string &key, const std::string &name) {
    std::deque<Array> out;
    auto found = file.fields.find(key);
    if (found == file.fields.end()) return out;
    Shape shape = with_members(spectrum_shape, -1);
    shape.insert(shape.begin(), found->second.first.empty() ? 0 : found->second.first[0]);
    if (found->second.first != shape)
      fail(name + ": " + key + " have shape " + listed(found->second.first) + ", expected " +
           listed(shape) + ", those of " + str(points) + " points per side");
    const Array &all = found->second.second;
    const int64_t each = spectrum_size();
    for (int64_t i = 0; i < shape[0]; ++i)
      out.emplace_back(all.begin() + i * each, all.begin() + (i + 1) * each);
    return out;
  }

  void unpack(const std::string &bytes, const std::string &name) {
    const Tensors file = parse(bytes, name, kProcess);
    auto entry = [&](const char *key) {
      auto found = file.metadata.find(key);
      if (found == file.metadata.end()) fail(name + ": no entry \"" + key + "\"");
      return Parser(found->second).whole();
    };
    auto same = [&](const char *what, const std::string &stored, const std::string &own) {
      if (stored != own)
        fail(name + ": the stored process has " + what + "=" + stored + ", this one " + what + "=" +
             own);
    };
    same("members", listed(entry("members").integers()), listed(ids));
    same("seed", str(entry("seed").integer()), str(seed));
    same("interval", str(entry("interval").integer()), str(interval));
    same("model", entry("model").words, model);
    std::deque<Array> read_states = stored_fields(file, "states", name);
    std::deque<Array> read_closures = stored_fields(file, "closures", name);
    while (int64_t(read_states.size()) > frames * lag) read_states.pop_front();
    while (int64_t(read_closures.size()) > previous) read_closures.pop_back();
    calls = entry("calls").integer();
    states.swap(read_states);
    closures.swap(read_closures);
  }

  void read_description(const std::string &path) {
    try {
      const std::string text = contents(path);
      const Json about = Parser(text).whole();
      if (about["format"].words != kFormat)
        fail("format \"" + about["format"].words + "\", this source reads \"" + kFormat +
             "\"; export again");
      const std::string runs = str(TORCH_VERSION_MAJOR) + "." + str(TORCH_VERSION_MINOR);
      const std::string torch = about["torch"].words;
      if (torch.compare(0, runs.size() + 1, runs + ".") != 0)
        fail("closure.pt2 was compiled with torch " + torch + ", this program runs torch " + runs +
             "; compile it again here: hpc-closure export FOLDER --here");
      check_processor(about["isa"].words);
      model = about["model"].words;
      stage = about["stage"].words;
      members = about["members"].integer();
      points = about["points"].integer();
      modes = about["modes"].integer();
      fields = int64_t(about["fields"].items.size());
      dimensions = about["dimensions"].integer();
      interval = about["interval"].integer();
      dt = about["dt"].value;
      ratio = about["interval_ratio"].value;
      forecast = about["reads_forecast"].value != 0;
      has_range = about["range"].value != 0;
      shells = about["shells"].integer();
      const Json &memory = about["memory"], &random = about["noise"];
      frames = memory["frames"].integer();
      lag = memory["lag"].integer();
      previous = memory["previous"].integer();
      draws = random["draws"].integer();
      width = random["width"].integer();
      chooses = random["chooses"].value != 0;
      spacings = random["spacings"].integers();
      stream_base = random["streams"]["base"].integer();
      stream_memory = random["streams"]["memory"].integer();
      stream_component = random["streams"]["component"].integer();
    } catch (const std::exception &error) {
      const std::string said = error.what();
      if (said.compare(0, path.size(), path) == 0) throw;
      fail(path + ": " + said);
    }
    if (fields > 1) field_shape.push_back(fields);
    spectrum_shape = field_shape;
    for (int64_t side = 0; side < dimensions; ++side) {
      field_shape.push_back(points);
      spectrum_shape.push_back(side + 1 < dimensions ? 2 * modes + 1 : modes + 1);
    }
    spectrum_shape.push_back(2);
  }

  // Draw for the state of check.bin, with its key and past, and compare with Python's closure.
  void check() {
    const std::string name = folder + "/check.bin", bytes = contents(name);
    const Tensors file = parse(bytes, name, kCheck);
    const auto state = file.fields.find("state"), expected = file.fields.find("expected");
    if (state == file.fields.end() || int64_t(state->second.second.size()) != field_size() ||
        expected == file.fields.end() || int64_t(expected->second.second.size()) != field_size())
      fail(name + ": it is of another export; export again");
    auto number = [&](const char *key) { return Parser(file.metadata.at(key)).whole(); };
    set_keys(number("members").integers(), number("seed").integer());
    calls = number("calls").integer();
    states = stored_fields(file, "states", name);
    closures = stored_fields(file, "closures", name);
    std::vector<uint64_t> words(file.words.size());
    uniform_bits(keys.at(0), uint64_t(stream_base), uint64_t(calls), int64_t(words.size()),
                 words.data());
    if (words != file.words) fail(name + ": the random bits differ from Python's; report this");
    Array u(static_cast<size_t>(field_size()));
    draw(state->second.second.data(), nullptr, u.data());
    double largest = 0, off = 0;
    for (size_t i = 0; i < u.size(); ++i) {
      largest = std::max(largest, std::abs(expected->second.second[i]));
      off = std::max(off, std::abs(u[i] - expected->second.second[i]));
      if (!std::isfinite(u[i])) off = INFINITY;
    }
    if (!(off <= kAgree * largest))
      fail(name + ": closures differ from Python's by " + str(off / largest) + " of their size, at " +
           "most " + str(kAgree) + " expected; compile again here: hpc-closure export FOLDER --here");
    clear();
  }

  void clear() {
    calls = 0;
    states.clear();
    closures.clear();
    beyond.clear();
  }
};

// ---- the interface ------------------------------------------------------------------------------

namespace {

template <class Work>
int guarded(Work work) {
  try {
    last_error.clear();
    return work();
  } catch (const c10::Error &error) {
    last_error = error.what_without_backtrace();
  } catch (const std::exception &error) {
    last_error = error.what();
  } catch (...) {
    last_error = "an error of unknown kind";
  }
  last_error = last_error.substr(0, last_error.find('\n'));
  return HC_ERROR;
}

hc_closure &whole(hc_closure *h) {
  if (!h) fail("the handle is NULL: call hc_open first");
  return *h;
}

const hc_closure &whole(const hc_closure *h) { return whole(const_cast<hc_closure *>(h)); }

}  // namespace

int hc_open(const char *folder, int64_t members, const int64_t *ids, int64_t seed, hc_closure **out) {
  return guarded([&] {
    if (!folder || !out) fail("hc_open: expected a folder and a place for the handle, not NULL");
    *out = nullptr;
    auto h = std::make_unique<hc_closure>();
    h->folder = folder;
    h->read_description(h->folder + "/closure.json");
    if (members != h->members)
      fail(h->folder + ": exported for " + str(h->members) + " members, opened for " + str(members) +
           "; export again with --members " + str(members));
    if (seed < 0) fail("seed=" + str(seed) + ": expected an integer from 0 on");
    check_temporary_folder();
    {
      std::lock_guard<std::mutex> lock(loading);
      h->program = std::make_unique<torch::inductor::AOTIModelPackageLoader>(
          h->folder + "/closure.pt2", "model", false, 1, -1);
    }
    h->check();
    Shape own(static_cast<size_t>(members));
    std::iota(own.begin(), own.end(), int64_t(0));
    if (ids) own.assign(ids, ids + members);
    h->set_keys(own, seed);
    *out = h.release();
    return HC_OK;
  });
}

void hc_close(hc_closure *h) { delete h; }

int hc_begin(hc_closure *h, const double *states, const double *closures) {
  return guarded([&] { return whole(h).begin(states, closures), HC_OK; });
}

int hc_begin_f32(hc_closure *h, const float *states, const float *closures) {
  return guarded([&] {
    hc_closure &own = whole(h);
    auto in_double = [&](const float *values, int64_t fields) {
      return values ? Array(values, values + fields * own.field_size()) : Array();
    };
    const Array first = in_double(states, own.frames * own.lag);
    const Array second = in_double(closures, own.previous);
    return own.begin(states ? first.data() : nullptr, closures ? second.data() : nullptr), HC_OK;
  });
}

int hc_draw(hc_closure *h, const double *state, double *u) {
  return guarded([&] { return whole(h).draw(state, nullptr, u), HC_OK; });
}

int hc_draw_f32(hc_closure *h, const float *state, float *u) {
  return guarded([&] {
    hc_closure &own = whole(h);
    if (!state || !u) fail("hc_draw_f32: expected arrays of states and closures, not NULL");
    const Array wide(state, state + own.field_size());
    Array drawn(wide.size());
    own.draw(wide.data(), nullptr, drawn.data());
    std::transform(drawn.begin(), drawn.end(), u, [](double one) { return float(one); });
    return HC_OK;
  });
}

int hc_draw_with(hc_closure *h, const double *state, const double *normals, double *u) {
  return guarded([&] {
    if (!normals) fail("hc_draw_with: expected an array of normal numbers, not NULL");
    return whole(h).draw(state, normals, u), HC_OK;
  });
}

int hc_noise(hc_closure *h, double *normals) {
  return guarded([&] { return whole(h).noise(normals), HC_OK; });
}

int hc_beyond(const hc_closure *h, double *share) {
  return guarded([&]() -> int {
    const hc_closure &own = whole(h);
    if (!own.has_range) {
      last_error = own.folder + ": this model does not record the range of its training states";
      return HC_UNKNOWN;
    }
    if (own.beyond.empty()) fail("hc_beyond: no state yet; call hc_draw first");
    std::copy(own.beyond.begin(), own.beyond.end(), share);
    return HC_OK;
  });
}

int hc_save(const hc_closure *h, const char *path) {
  return guarded([&] {
    const std::string bytes = whole(h).pack(), name = path, part = name + ".part";
    std::FILE *file = std::fopen(part.c_str(), "wb");
    if (!file) fail(part + ": " + std::strerror(errno));
    bool written = std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size();
    written = std::fflush(file) == 0 && fsync(fileno(file)) == 0 && written;
    written = std::fclose(file) == 0 && written;
    if (!written || std::rename(part.c_str(), path) != 0) fail(name + ": " + std::strerror(errno));
    return HC_OK;
  });
}

int hc_load(hc_closure *h, const char *path) {
  return guarded([&] { return whole(h).unpack(contents(path), path), HC_OK; });
}

int64_t hc_state_size(const hc_closure *h) { return h ? int64_t(h->pack().size()) : 0; }

int hc_pack(const hc_closure *h, void *bytes) {
  return guarded([&] {
    const std::string packed = whole(h).pack();
    std::memcpy(bytes, packed.data(), packed.size());
    return HC_OK;
  });
}

int hc_unpack(hc_closure *h, const void *bytes, int64_t size) {
  return guarded([&] {
    whole(h).unpack(std::string(static_cast<const char *>(bytes), size_t(size)), "hc_unpack");
    return HC_OK;
  });
}

int64_t hc_earlier(const hc_closure *h, int closures) {
  return !h ? 0 : closures ? h->previous : h->frames * h->lag;
}
int64_t hc_noise_size(const hc_closure *h) { return h ? h->noise_size() : 0; }
int64_t hc_shells(const hc_closure *h) { return h ? h->shells : 0; }
int64_t hc_points(const hc_closure *h) { return h ? h->points : 0; }
int64_t hc_fields(const hc_closure *h) { return h ? h->fields : 0; }
int64_t hc_dimensions(const hc_closure *h) { return h ? h->dimensions : 0; }
int64_t hc_field_size(const hc_closure *h) { return h ? h->field_size() : 0; }
int64_t hc_calls(const hc_closure *h) { return h ? h->calls : 0; }
int64_t hc_interval(const hc_closure *h) { return h ? h->interval : 0; }
double hc_dt(const hc_closure *h) { return h ? h->dt : 0; }
int hc_reads_forecast(const hc_closure *h) { return h && h->forecast; }
const char *hc_error(void) { return last_error.c_str(); }
