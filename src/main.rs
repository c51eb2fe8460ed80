//! Parses the command line, starts logging, runs the command and exits.

use clap::Parser;
use incubate::cli::{Cli, dispatch};
use incubate::collective::mpi::World;
use incubate::device::{cuda, memory};
use incubate::error::{Failure, exit_code};
use incubate::launcher::launched_rank;
use incubate::pipeline::bars::{LogTarget, on_a_terminal};
use incubate::stop::STOP;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR2};
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // This program never opens an HDF5 file for update. So HDF5's file locks protect nothing, and on Lustre and NFS they fail.
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("HDF5_USE_FILE_LOCKING", "FALSE") };
    memory::keep_freed(true);
    start_logging(&cli);
    hdf5::silence_errors(true);
    if cli.command.heeds_signals() {
        for signal in [SIGHUP, SIGINT, SIGTERM, SIGUSR2].into_iter().filter(|&signal| !is_ignored(signal)) {
            // SAFETY: the handler only stores to an atomic, or restores the signal's default action and raises the signal.
            unsafe { signal_hook::low_level::register(signal, move || stop(signal)) }
                .expect("the signal can be caught");
        }
    }
    let world = match if cli.command.joins_world() { World::join() } else { Ok(World::alone()) } {
        Ok(world) => world,
        Err(error) => return ExitCode::from(finish(&error, None)),
    };
    abort_on_panic();
    let code = match dispatch(&cli.command, &world) {
        Ok(()) => 0,
        Err(error) => finish(&error, Some(&world)),
    };
    drop(world);
    if cuda().is_ok() {
        let _ = std::io::stdout().flush();
        // SAFETY: null stands for all of C's streams, such as NCCL's log.
        unsafe { libc::fflush(std::ptr::null_mut()) };
        // Everything is written, so skip the exit handlers of the libraries of CUDA and NCCL: they are not needed, and may fail.
        // SAFETY: the call ends the process.
        unsafe { libc::_exit(code.into()) };
    }
    ExitCode::from(code)
}

/// Whether this process was started with the signal ignored, as nohup does with SIGHUP.
fn is_ignored(signal: i32) -> bool {
    // SAFETY: the call only writes the signal's present action into `present`, for which zeros are a valid value.
    unsafe {
        let mut present: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut present) == 0 && present.sa_sigaction == libc::SIG_IGN
    }
}

/// Asks for a stop at the next step. A SIGINT (Ctrl-C) after an earlier signal ends the process at once. Any other repeated signal
/// changes nothing, because Slurm sends a warning signal and then SIGTERM.
fn stop(signal: i32) {
    if STOP.swap(true, Ordering::Relaxed) && signal == SIGINT {
        let _ = signal_hook::low_level::emulate_default_handler(signal);
    }
}

/// Logs the error of a command, and aborts the world unless the error is a stop by a signal, at which all ranks stop. A rank whose
/// failure came from another rank logs nothing. If the world could not be joined, only rank zero logs. Returns the exit code.
fn finish(error: &anyhow::Error, world: Option<&World>) -> u8 {
    let code = exit_code(error);
    if Failure::is_stop(error) {
        log::warn!("{error:#}");
        return code;
    }
    let failure = error.chain().find_map(|e| e.downcast_ref::<Failure>());
    match (failure, world) {
        // The rank that failed logs the error and aborts the world. That ends this rank too, usually within the five seconds.
        (Some(Failure::OnOtherRank { .. }), _) => std::thread::sleep(Duration::from_secs(5)),
        (_, None) if launched_rank() > 0 => {}
        _ => log::error!("{error:#}"),
    }
    match world {
        Some(world) => world.abort(code),
        None => code,
    }
}

/// Makes a panic abort the whole world. Otherwise a rank that panics would finalise MPI while it unwinds, and the other ranks
/// would wait for this rank for ever.
fn abort_on_panic() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        // `memory::catch` turns this panic into an error.
        if memory::will_be_caught(info.payload()) {
            return;
        }
        default(info);
        World::abort_all(101);
    }));
}

/// Writes log lines to standard error, with the time, the level and, under mpirun or Slurm, the rank. On a terminal, rank zero
/// draws progress bars for all ranks. By default, rank zero then logs no lines about steps, and the other ranks log only warnings.
fn start_logging(cli: &Cli) {
    use log::LevelFilter::{Debug, Error, Info, Off, Trace, Warn};
    let rank = launched_rank();
    let terminal = on_a_terminal();
    let base = if terminal && rank > 0 { Warn } else { Info };
    let level = match i16::from(cli.verbose) - i16::from(cli.quiet) {
        0 => base,
        1 => Debug,
        2.. => Trace,
        -1 => Warn,
        -2 => Error,
        _ => Off,
    };
    let has_launcher = std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some() || std::env::var_os("SLURM_PROCID").is_some();
    env_logger::Builder::new()
        .filter_level(Warn)
        .filter_module("incubate", level)
        .filter_module("incubate::steps", if terminal && level == Info { Warn } else { level })
        .parse_env("INCUBATE_LOG")
        .target(env_logger::Target::Pipe(Box::new(LogTarget)))
        .format(move |out, record| {
            let tag = if has_launcher { format!(" [{rank}]") } else { String::new() };
            let time = out.timestamp_seconds();
            writeln!(out, "{time} {}{tag} {}", record.level(), record.args())
        })
        .init();
}
