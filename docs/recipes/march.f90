! Advection and diffusion of an ensemble, with a closure of hpc_closure: w_t + c w_x = nu lap w + U.
!
!   march FOLDER SEED LAST [START]
!
! FOLDER is an exported closure. initial.bin holds the states, w(n, n, members), y first. Without
! START the run begins at call 0; with START, a file of hc_save or of Python's Process.save, it
! continues. After every call up to LAST, state and closure are appended to run.bin; at the end
! the process is saved as process.safetensors.
program march
   use hpc_closure
   implicit none
   integer, parameter :: members = 20
   type(c_ptr) :: closure
   character(4096) :: folder, word, start
   integer(c_int64_t) :: seed
   integer :: last, n, m, initial, run
   real(c_double) :: span
   real(c_double), allocatable :: w(:, :, :), u(:, :, :), seen(:, :, :), x(:, :), y(:, :), none(:, :, :, :)

   if (command_argument_count() < 3) error stop "usage: march FOLDER SEED LAST [START]"
   call get_command_argument(1, folder)
   call get_command_argument(2, word)
   read (word, *) seed
   call get_command_argument(3, word)
   read (word, *) last
   call hc_must(hc_open(folder, int(members, c_int64_t), seed, closure))
   n = int(hc_points(closure))
   span = hc_dt(closure) * real(hc_interval(closure), c_double)
   x = step_matrix(0.3_c_double)
   y = step_matrix(0.0_c_double)

   allocate (w(n, n, members), u(n, n, members))
   open (newunit=initial, file="initial.bin", access="stream", form="unformatted")
   read (initial) w
   if (command_argument_count() > 3) then
      call get_command_argument(4, start)
      call hc_must(hc_load(closure, start))
   else ! a closure that reads previous closures starts from none here
      allocate (none(n, n, members, hc_earlier(closure, closures=.true.)), source=0.0_c_double)
      call hc_must(hc_begin(closure, closures=none))
   end if
   open (newunit=run, file="run.bin", access="stream", form="unformatted", status="replace")
   do while (hc_calls(closure) < last)
      seen = w ! the closure reads the state before the step, or the one after it
      call advance()
      if (hc_reads_forecast(closure) == 1) seen = w
      call hc_must(hc_draw(closure, seen, u))
      write (run) seen
      write (run) u
      w = w + span * u
   end do
   call hc_must(hc_save(closure, "process.safetensors"))
   write (initial, pos=1) w
   call hc_close(closure)

contains

   !> Exact spectral step on one side: the circulant matrix of exp(-nu k^2 t - i k c t).
   function step_matrix(c) result(a)
      real(c_double), intent(in) :: c
      real(c_double), parameter :: unit = 2 * acos(-1.0_c_double), nu = 0.05_c_double
      real(c_double) :: a(n, n)
      integer :: i, j, k
      a = 1
      do concurrent(i=1:n, j=1:n)
         do k = 1, n / 2 - 1
            a(i, j) = a(i, j) + 2 * exp(-nu * unit**2 * k**2 * span) &
                      * cos(unit * k * (real(i - j, c_double) / n - c * span))
         end do
      end do
      a = a / n
   end function

   subroutine advance() ! x is the second index
      do m = 1, members
         w(:, :, m) = matmul(matmul(y, w(:, :, m)), transpose(x))
      end do
   end subroutine
end program
