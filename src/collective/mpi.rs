//! MPI through rsmpi. Only the main thread calls MPI, with one exception: a panic in any thread aborts the world.

use super::{Collective, Solo};
use crate::weights::floats_mut;
use crate::{require, usage};
use anyhow::Result;
use mpi::Threading;
use mpi::collective::{CommunicatorCollectives, SystemOperation};
use mpi::environment::Universe;
use mpi::topology::{Color, Communicator, SimpleCommunicator};
use std::cell::RefCell;
use std::io::Write;
use std::time::Duration;
use tch::Tensor;

/// The world of ranks in which this process was started. Dropping the world finalises MPI, so it must outlive every communicator.
pub struct World {
    universe: Option<Universe>,
    all_ranks: Box<dyn Collective>,
}

impl World {
    /// Joins the world that mpirun or srun has started. Without these launchers, makes a world of one rank. Fails if the N started
    /// processes would form N worlds of one rank each, a common silent mistake on clusters (open-mpi/ompi#13523).
    pub fn join() -> Result<World> {
        let Some(launched) = launched_size()? else {
            return Ok(World::alone());
        };
        let (universe, _) =
            mpi::initialize_with_threading(Threading::Funneled).ok_or_else(|| usage!("MPI is initialised already"))?;
        let comm = universe.world();
        let size = comm.size() as usize;
        require!(
            size == launched.size,
            "{} says {} ranks, but MPI sees a world of {size}: the launcher belongs to another MPI than this binary. Start \
             the program with the mpirun of the MPI it was built with ({}), or with `srun --mpi=pmix`",
            launched.variable,
            launched.size,
            library_version()
        );
        Ok(World { universe: Some(universe), all_ranks: Box::new(Mpi::new(comm)) })
    }

    /// Makes a world of one rank, without MPI.
    pub fn alone() -> World {
        World { universe: None, all_ranks: Box::new(Solo) }
    }

    /// The group of all ranks of the world.
    pub fn all_ranks(&self) -> &dyn Collective {
        self.all_ranks.as_ref()
    }

    /// Splits the world into groups. Returns this rank's group: the ranks that give the same number `group`. All ranks of the world
    /// must call this method.
    pub fn split(&self, group: usize) -> Box<dyn Collective> {
        match &self.universe {
            None => Box::new(Solo),
            Some(universe) => {
                let color = Color::with_value(group as i32);
                let comm = universe.world().split_by_color(color).expect("a defined colour has a communicator");
                Box::new(Mpi::new(comm))
            }
        }
    }

    /// The group of the ranks on the node of rank zero. None on any other node. All ranks of the world must call this method.
    pub fn node_of_zero(&self) -> Result<Option<Box<dyn Collective>>> {
        let Some(universe) = &self.universe else { return Ok(Some(Box::new(Solo))) };
        let node = Mpi::new(universe.world().split_shared(self.all_ranks.rank() as i32));
        let mut zeros = [f64::from(u8::from(self.all_ranks.is_zero()))];
        node.all_reduce_f64(&mut zeros)?;
        Ok(if zeros[0] > 0.0 { Some(Box::new(node)) } else { None })
    }

    /// Ends every rank of the world at once with this exit code, so that no rank keeps waiting in a collective call.
    pub fn abort(&self, code: u8) -> ! {
        if self.all_ranks.size() > 1 {
            World::abort_all(code);
        }
        let _ = std::io::stdout().flush();
        // `exit` would run CUDA's cleanup, which would wait for work on the GPUs. After a failure, a sum on the GPUs may never end.
        // SAFETY: the call only ends the process.
        unsafe { libc::_exit(code.into()) }
    }

    /// Ends every rank of the world at once. After a panic, any thread may call it. Without MPI it does nothing.
    pub fn abort_all(code: u8) {
        if mpi::environment::is_initialized() {
            SimpleCommunicator::world().abort(code.into());
        }
    }
}

/// The name and version of the MPI library, such as `Open MPI v4.1.6`: the beginning of its version text.
pub fn library_version() -> String {
    let version = mpi::environment::library_version().unwrap_or_default();
    version.split(['\n', ',']).next().unwrap_or_default().trim().to_string()
}

/// A world that a launcher has started.
struct Launched {
    /// The environment variable that gives the world's size.
    variable: &'static str,
    size: usize,
}

/// The world that the environment variables describe. None if this process is to be a world of one rank without MPI. Slurm's
/// variables count only within a step, because a batch script has most of them too.
///
/// # Errors
/// A usage error if srun has started several tasks without a PMI that this MPI supports. Open MPI would then abort, or the N tasks
/// would be N worlds of one rank.
fn launched_size() -> Result<Option<Launched>> {
    let number = |variable: &str| -> Option<usize> { std::env::var(variable).ok()?.parse().ok() };
    let is_set = |variable: &str| std::env::var_os(variable).is_some();
    let pmi = number("PMI_SIZE").filter(|_| is_set("SLURM_STEP_ID") && !is_set("PMIX_RANK"));
    if let (Some(size), None) = (pmi, number("OMPI_COMM_WORLD_SIZE"))
        && library_version().contains("Open MPI")
    {
        // Without this check, Open MPI would abort with a message about how Slurm was built.
        require!(
            size == 1,
            "srun started {size} tasks with PMI-2, which {} does not support; start them with `srun --mpi=pmix`",
            library_version()
        );
        return Ok(None);
    }
    let by_mpi = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"].into_iter();
    if let Some(launched) = by_mpi.filter_map(|variable| Some(Launched { variable, size: number(variable)? })).next() {
        return Ok(Some(launched));
    }
    let variable = "SLURM_STEP_NUM_TASKS";
    let (Some(size), true) = (number(variable), std::env::var_os("SLURM_STEP_ID").is_some()) else { return Ok(None) };
    let pmix = std::env::var_os("PMIX_RANK").is_some();
    require!(
        pmix || size == 1,
        "srun started {size} tasks without PMIx, so each would be a world of one; start them with `srun --mpi=pmix`"
    );
    Ok(pmix.then_some(Launched { variable, size }))
}

/// Describes how this process was started, as a text for people.
///
/// # Errors
/// A usage error if Slurm has given the job several tasks but the world has one rank, because the other tasks would idle. Also a
/// usage error if srun was used without a PMI that this MPI supports.
pub fn launch() -> Result<String> {
    let tasks = std::env::var("SLURM_NTASKS").ok().and_then(|text| text.parse::<usize>().ok()).unwrap_or(1);
    let launched = launched_size()?;
    require!(
        tasks <= 1 || launched.as_ref().is_some_and(|launched| launched.size > 1),
        "a world of one in a job of {tasks} tasks; to train on all, start the program with `srun --mpi=pmix` or mpirun"
    );
    Ok(match launched {
        Some(launched) => format!("a world of {} ({})", launched.size, launched.variable),
        None => "a world of one; mpirun or `srun --mpi=pmix` starts more".into(),
    })
}

/// The largest number of fp32 values in one MPI call. This number limits the copy of the input to 256 MiB, and fits MPI's 32-bit
/// counts.
const AT_ONCE: usize = 1 << 26;

struct Mpi {
    comm: SimpleCommunicator,
    /// The copy of the values to sum. It is needed because rsmpi has no binding for MPI_IN_PLACE.
    scratch: RefCell<Vec<f32>>,
}

impl Mpi {
    fn new(comm: SimpleCommunicator) -> Mpi {
        Mpi { comm, scratch: RefCell::default() }
    }
}

impl Collective for Mpi {
    fn rank(&self) -> usize {
        self.comm.rank() as usize
    }

    fn size(&self) -> usize {
        self.comm.size() as usize
    }

    fn all_reduce(&self, values: &mut Tensor) -> Result<()> {
        if self.size() > 1 {
            let mut scratch = self.scratch.borrow_mut();
            for part in floats_mut(values).chunks_mut(AT_ONCE) {
                scratch.clear();
                scratch.extend_from_slice(part);
                self.comm.all_reduce_into(&scratch[..], part, SystemOperation::sum());
            }
        }
        Ok(())
    }

    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<()> {
        if self.size() > 1 {
            let input = values.to_vec();
            self.comm.all_reduce_into(&input[..], values, SystemOperation::sum());
        }
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        self.barrier_with(&mut || ())
    }

    fn barrier_with(&self, idle: &mut dyn FnMut()) -> Result<()> {
        let mut request = self.comm.immediate_barrier();
        while let Err(pending) = request.test() {
            request = pending;
            idle();
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}
