/* A trained closure for a solver in C, C++ or Fortran.
 *
 * hc_open() reads a folder that `hpc-closure export` wrote; hc_draw() draws the closure U of the
 * coming interval for all members and counts the call. Draws depend on (seed, member id, call)
 * alone and equal those of Python's `closure.process(...)` up to round-off; the bits of the random
 * numbers are the same.
 *
 * Fields are real numbers of double precision, (members, n, n), members slowest and y fastest; of
 * C fields (members, C, n, n); on a line (members, n), of three sides (members, n, n, n). In
 * Fortran they are u(n, n, members) with y first.
 *
 * Functions that return int return 0, or another number after an error; hc_error() then says in
 * one line what was wrong. A handle serves one thread at a time; different handles are independent.
 */
#ifndef HPC_CLOSURE_H
#define HPC_CLOSURE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct hc_closure hc_closure;

enum { HC_OK = 0, HC_ERROR = 1, HC_UNKNOWN = 2 };

/* Open a folder of an exported closure and check it against its self-test (check.bin).
 * members: number of members, as exported. ids: their ids in the keys of the draws, or NULL for
 * 0, 1, ... The handle must be closed by hc_close(). */
int hc_open(const char *folder, int64_t members, const int64_t *ids, int64_t seed, hc_closure **out);
void hc_close(hc_closure *h);

/* Start at call 0. A closure that reads earlier states or closures needs them here:
 * states: hc_earlier(h, 0) fields of all members, one interval apart, oldest first;
 * closures: hc_earlier(h, 1) closures of all members, newest first. NULL if none are read. */
int hc_begin(hc_closure *h, const double *states, const double *closures);
int64_t hc_earlier(const hc_closure *h, int closures);

/* Draw U of the coming interval for the states of all members, and count the call. A state with a
 * number that is not finite is an error. If the closure reads the state to which it is added
 * (hc_reads_forecast), pass the state after the interval. A member whose draw is not finite gets
 * it, and later draws read zeros in its place. */
int hc_draw(hc_closure *h, const double *state, double *u);

/* The same for fields of single precision. Inside, the draw has the precision of the closure, and
 * states are stored in double precision, so files of hc_save() serve both. */
int hc_begin_f32(hc_closure *h, const float *states, const float *closures);
int hc_draw_f32(hc_closure *h, const float *state, float *u);

/* Draw with normal numbers of the caller, hc_noise_size(h) of them, in place of the keyed ones:
 * (draws, members, wavevectors, 2), for a mixture followed by (draws, members). Draws after the
 * first are those at knots of noise with memory, and must be repeated until the next knot. */
int hc_draw_with(hc_closure *h, const double *state, const double *normals, double *u);
int64_t hc_noise_size(const hc_closure *h);

/* Write the normal numbers that the next hc_draw() will use. */
int hc_noise(hc_closure *h, double *normals);

/* Share of the members whose last state was beyond the range of the training, for each of
 * hc_shells(h) shells of wavenumber. HC_UNKNOWN if the model does not record that range. */
int hc_beyond(const hc_closure *h, double *share);
int64_t hc_shells(const hc_closure *h);

/* Write or read all that a continuation needs, in the file of Python's Process.save and load; or
 * the same bytes in memory, hc_state_size(h) of them, for a restart file of the solver. */
int hc_save(const hc_closure *h, const char *path);
int hc_load(hc_closure *h, const char *path);
int64_t hc_state_size(const hc_closure *h);
int hc_pack(const hc_closure *h, void *bytes);
int hc_unpack(hc_closure *h, const void *bytes, int64_t size);

/* Properties: points per side, fields, sides, and numbers in the states of all members; number of
 * calls so far; solver steps from one call to the next, their length; whether hc_draw() takes the
 * state after the interval. */
int64_t hc_points(const hc_closure *h);
int64_t hc_fields(const hc_closure *h);
int64_t hc_dimensions(const hc_closure *h);
int64_t hc_field_size(const hc_closure *h);
int64_t hc_calls(const hc_closure *h);
int64_t hc_interval(const hc_closure *h);
double hc_dt(const hc_closure *h);
int hc_reads_forecast(const hc_closure *h);

/* Last error of this thread, one line; empty if there was none. */
const char *hc_error(void);

#ifdef __cplusplus
}
#endif
#endif
