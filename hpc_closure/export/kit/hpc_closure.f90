! A trained closure for solvers in Fortran; hpc_closure.h describes every function.
!
!   use hpc_closure
!   type(c_ptr) :: closure
!   call hc_must(hc_open("closure", 20_c_int64_t, seed, closure))
!   call hc_must(hc_draw(closure, state, u))        ! real(c_double) state(n, n, members)
!   call hc_must(hc_save(closure, "process.safetensors"))
!   call hc_close(closure)
module hpc_closure
   use, intrinsic :: iso_c_binding
   implicit none
   private
   public :: c_ptr, c_null_ptr, c_int, c_int64_t, c_double, c_float
   public :: hc_begin_f32, hc_draw_f32
   public :: hc_open, hc_close, hc_begin, hc_draw, hc_draw_with, hc_noise, hc_beyond
   public :: hc_save, hc_load, hc_pack, hc_unpack, hc_state_size, hc_noise_size, hc_shells
   public :: hc_earlier, hc_points, hc_fields, hc_dimensions, hc_field_size, hc_calls
   public :: hc_interval, hc_dt, hc_reads_forecast, hc_error, hc_must
   integer(c_int), parameter, public :: HC_OK = 0, HC_ERROR_CODE = 1, HC_UNKNOWN = 2

   interface
      integer(c_int) function c_open(folder, members, ids, seed, closure) bind(c, name="hc_open")
         import
         character(kind=c_char), intent(in) :: folder(*)
         integer(c_int64_t), value :: members, seed
         type(c_ptr), value :: ids
         type(c_ptr), intent(out) :: closure
      end function
      subroutine hc_close(closure) bind(c)
         import
         type(c_ptr), value :: closure
      end subroutine
      integer(c_int) function c_begin(closure, states, closures) bind(c, name="hc_begin")
         import
         type(c_ptr), value :: closure, states, closures
      end function
      integer(c_int) function hc_draw(closure, state, u) bind(c)
         import
         type(c_ptr), value :: closure
         real(c_double), intent(in) :: state(*)
         real(c_double), intent(out) :: u(*)
      end function
      integer(c_int) function c_begin_f32(closure, states, closures) bind(c, name="hc_begin_f32")
         import
         type(c_ptr), value :: closure, states, closures
      end function
      integer(c_int) function hc_draw_f32(closure, state, u) bind(c)
         import
         type(c_ptr), value :: closure
         real(c_float), intent(in) :: state(*)
         real(c_float), intent(out) :: u(*)
      end function
      integer(c_int) function hc_draw_with(closure, state, normals, u) bind(c)
         import
         type(c_ptr), value :: closure
         real(c_double), intent(in) :: state(*), normals(*)
         real(c_double), intent(out) :: u(*)
      end function
      integer(c_int) function hc_noise(closure, normals) bind(c)
         import
         type(c_ptr), value :: closure
         real(c_double), intent(out) :: normals(*)
      end function
      integer(c_int) function hc_beyond(closure, share) bind(c)
         import
         type(c_ptr), value :: closure
         real(c_double), intent(out) :: share(*)
      end function
      integer(c_int) function c_save(closure, path) bind(c, name="hc_save")
         import
         type(c_ptr), value :: closure
         character(kind=c_char), intent(in) :: path(*)
      end function
      integer(c_int) function c_load(closure, path) bind(c, name="hc_load")
         import
         type(c_ptr), value :: closure
         character(kind=c_char), intent(in) :: path(*)
      end function
      integer(c_int) function hc_pack(closure, bytes) bind(c)
         import
         type(c_ptr), value :: closure
         character(kind=c_char), intent(out) :: bytes(*)
      end function
      integer(c_int) function hc_unpack(closure, bytes, size) bind(c)
         import
         type(c_ptr), value :: closure
         character(kind=c_char), intent(in) :: bytes(*)
         integer(c_int64_t), value :: size
      end function
      integer(c_int64_t) function hc_state_size(closure) bind(c)
         import
         type(c_ptr), value :: closure
      end function
      integer(c_int64_t) function hc_noise_size(closure) bind(c)
         import
         type(c_ptr), value :: closure
      end function
      integer(c_int64_t) function hc_shells(closure) bind(c)
         import
         type(c_ptr), value :: closure
      end function
      integer(c_int64_t) function c_earlier(closure, closures) bind(c, name="hc_earlier")
         import
         type(c_ptr), value :: closure
         integer(c_int), value :: closures
      end function
      integer(c_int64_t) function hc_points(closure) bind(c)
         import
         type(c_ptr), value :: closure
      end function
      integer(c_int64_t) function hc_fields(closure) bind(c)
         import
         type(c_ptr), value :: closure
      end function
      integer(c_int64_t) function hc_dimensions(closure) bind(c)
         import
         type(c_ptr), value :: closure
      end function
      integer(c_int64_t) function hc_field_size(closure) bind(c)
         import
         type(c_ptr), value :: closure
      end function
      integer(c_int64_t) function hc_calls(closure) bind(c)
         import
         type(c_ptr), value :: closure
      end function
      integer(c_int64_t) function hc_interval(closure) bind(c)
         import
         type(c_ptr), value :: closure
      end function
      real(c_double) function hc_dt(closure) bind(c)
         import
         type(c_ptr), value :: closure
      end function
      integer(c_int) function hc_reads_forecast(closure) bind(c)
         import
         type(c_ptr), value :: closure
      end function
      type(c_ptr) function c_error() bind(c, name="hc_error")
         import
      end function
   end interface

contains

   !> Open a folder of an exported closure; ids are those of the members, by default 0, 1, ...
   integer(c_int) function hc_open(folder, members, seed, closure, ids)
      character(*), intent(in) :: folder
      integer(c_int64_t), intent(in) :: members, seed
      type(c_ptr), intent(out) :: closure
      integer(c_int64_t), intent(in), optional, target :: ids(:)
      integer(c_int64_t), allocatable, target :: own(:)
      type(c_ptr) :: place
      place = c_null_ptr
      if (present(ids)) then
         own = ids
         place = c_loc(own)
      end if
      hc_open = c_open(trim(folder) // c_null_char, members, place, seed, closure)
   end function

   !> Start at call 0 with earlier states and closures, if the closure reads any.
   integer(c_int) function hc_begin(closure, states, closures)
      type(c_ptr), intent(in) :: closure
      real(c_double), intent(in), contiguous, optional, target :: states(..), closures(..)
      type(c_ptr) :: first, second
      first = c_null_ptr
      second = c_null_ptr
      if (present(states)) first = c_loc(states)
      if (present(closures)) second = c_loc(closures)
      hc_begin = c_begin(closure, first, second)
   end function

   !> The same with fields of single precision.
   integer(c_int) function hc_begin_f32(closure, states, closures)
      type(c_ptr), intent(in) :: closure
      real(c_float), intent(in), contiguous, optional, target :: states(..), closures(..)
      type(c_ptr) :: first, second
      first = c_null_ptr
      second = c_null_ptr
      if (present(states)) first = c_loc(states)
      if (present(closures)) second = c_loc(closures)
      hc_begin_f32 = c_begin_f32(closure, first, second)
   end function

   integer(c_int) function hc_save(closure, path)
      type(c_ptr), intent(in) :: closure
      character(*), intent(in) :: path
      hc_save = c_save(closure, trim(path) // c_null_char)
   end function

   integer(c_int) function hc_load(closure, path)
      type(c_ptr), intent(in) :: closure
      character(*), intent(in) :: path
      hc_load = c_load(closure, trim(path) // c_null_char)
   end function

   !> Number of earlier states, or of earlier closures, that hc_begin reads.
   integer(c_int64_t) function hc_earlier(closure, closures)
      type(c_ptr), intent(in) :: closure
      logical, intent(in) :: closures
      hc_earlier = c_earlier(closure, merge(1_c_int, 0_c_int, closures))
   end function

   !> Last error of this thread, one line.
   function hc_error() result(text)
      character(:), allocatable :: text
      character(kind=c_char), pointer :: letters(:)
      integer :: i
      call c_f_pointer(c_error(), letters, [4096])
      text = ""
      do i = 1, size(letters)
         if (letters(i) == c_null_char) exit
         text = text // letters(i)
      end do
   end function

   !> Stop with the error's line unless a function returned 0.
   subroutine hc_must(status)
      integer(c_int), intent(in) :: status
      if (status == HC_OK) return
      write (*, "(a)") hc_error()
      error stop 1
   end subroutine
end module
