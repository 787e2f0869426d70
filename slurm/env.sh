# Sourced by slurm/*.sbatch: what every job does first, and how it ends.
#
# slurm/pipeline takes modules and set-up from the site profile (slurm/profiles/*.yaml) and needs
# no edit here. For jobs submitted by hand, `sbatch slurm/generate.sbatch experiment.yaml`, this is
# the one file to edit:

# module load gcc cuda
# source "$HOME/venv/bin/activate"

eval "${HPC_CLOSURE_SETUP:-}"

export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# srun stopped taking this from sbatch in Slurm 22.05.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# Ranks leave one after another when they were told to stop; a crashed one ends the others.
export SLURM_KILL_BAD_EXIT=0 SLURM_WAIT=300
python=${HPC_CLOSURE_INTERPRETER:-python3}

say() { echo "[$(date +'%F %T') job ${SLURM_JOB_ID:-?}] $*"; }

# Tells srun which --mpi=... the MPI library speaks; that is no matter of the site.
choose_mpi() {
  local library found=none
  library=$($python -c 'import mpi4py; mpi4py.rc.initialize = False
from mpi4py import MPI; print(MPI.Get_library_version())' 2> /dev/null)
  case $library in
    *'Open MPI'*) found=pmix ;;
    *CRAY*) found=cray_shasta ;;
    *MPICH* | *Intel* | *MVAPICH*) found=pmi2 ;;
  esac
  # MPICH publishes UCX addresses in lines of up to 1100 characters, of which Slurm reads 1024:
  # now and then MPI_Init fails. The addresses of the pip wheel's other transport are short.
  case $library in
    *CRAY*) ;;
    *MPICH*ucx*ofi* | *MPICH*ofi*ucx*) export MPIR_CVAR_CH4_NETMOD=${MPIR_CVAR_CH4_NETMOD:-ofi} ;;
  esac
  export SLURM_MPI_TYPE=${SLURM_MPI_TYPE:-$found}
}

# run COMMAND...: runs it, forwards the warning signal, gives back its exit code.
heard=
run() {
  local before=
  trap 'heard="$heard USR2"; kill -USR2 "$step" 2> /dev/null' USR2
  # Slurm itself sends TERM to the tasks.
  trap 'heard="$heard TERM"' TERM
  say "start ${SLURM_RESTART_COUNT:-0} on ${SLURM_JOB_NODELIST:-$(hostname)}: $*"
  "$@" &
  step=$!
  while true; do
    wait "$step"
    code=$?
    # A trapped signal ends wait, not the step.
    [ "$code" -gt 128 ] && [ "$heard" != "$before" ] || break
    before=$heard
  done
  return "$code"
}

# Slurm requeues a preempted job of such a partition itself; done twice, the job is started once
# more after it has finished.
preempted_to_queue() {
  scontrol show job -o "$SLURM_JOB_ID" 2> /dev/null | grep -q ' PreemptTime=[0-9]' \
    && scontrol show partition -o "$SLURM_JOB_PARTITION" 2> /dev/null \
    | grep -q 'PreemptMode=REQUEUE'
}

# finish CODE: ends the job; 75 (saved, not finished) goes back to the queue.
finish() {
  local code=$1 restarts=${SLURM_RESTART_COUNT:-0} most=${HPC_CLOSURE_MAX_REQUEUES:-20} job why=
  if [ "$code" -ne 75 ]; then say "exit code $code"; exit "$code"; fi
  case $heard in
    *USR2*) ;;
    # A requeue would undo scancel; past the time limit the warning was lost.
    *TERM*) [ "$(date +%s)" -ge "${SLURM_JOB_END_TIME:-99999999999}" ] || why="cancelled or killed" ;;
  esac
  if [ -z "$why" ] && [ "$restarts" -ge "$most" ]; then
    why="started $((restarts + 1)) times already (HPC_CLOSURE_MAX_REQUEUES=$most)"
  elif [ -z "$why" ] && ! command -v scontrol > /dev/null; then
    why="there is no scontrol on this node"
  elif [ -z "$why" ] && preempted_to_queue; then
    why="Slurm does it itself"
  fi
  if [ -z "$why" ]; then
    job=$SLURM_JOB_ID
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    say "saved, not finished: back to the queue (requeue $((restarts + 1)) of at most $most)"
    scontrol requeue "$job" || why="the cluster refused"
  fi
  [ -z "$why" ] || say "saved, not requeued: $why; in any case the same command continues"
  exit 75
}
