//! Progress bars on a terminal, one for each running phase. They are drawn from the heartbeats in the run directory, so rank zero
//! shows the modules of all ranks on all nodes.

use crate::plan::Plan;
use crate::run::state::Activity;
use crate::store::RunDir;
use crate::store::process::unix_time;
use crate::store::progress::{Progress, duration};
use crate::thread;
use anyhow::Result;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

static SCREEN: OnceLock<MultiProgress> = OnceLock::new();

/// Whether standard error goes to a terminal, directly or through the pipe of an mpirun whose own standard error is a terminal.
pub fn on_a_terminal() -> bool {
    terminal().is_some()
}

fn terminal() -> Option<File> {
    if io::stderr().is_terminal() {
        return File::open("/proc/self/fd/2").ok();
    }
    std::env::var_os("OMPI_COMM_WORLD_SIZE")?;
    // SAFETY: getppid has no arguments, no memory and no failure.
    let parent = unsafe { libc::getppid() };
    File::open(format!("/proc/{parent}/fd/2")).ok().filter(IsTerminal::is_terminal)
}

/// The number of columns of the terminal, to which the bars' lines are cut. Longer lines would wrap and displace the bars.
fn columns() -> Option<u16> {
    let terminal = terminal()?;
    // SAFETY: TIOCGWINSZ writes only a winsize, into the zeroed struct of this type, and the file is open.
    let size = unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        (libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &mut size) == 0).then_some(size)
    };
    size.map(|size| size.ws_col).filter(|&columns| columns > 0)
}

/// Standard error as a target for log lines, which are printed above the bars if there are any.
pub struct LogTarget;

impl Write for LogTarget {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        match SCREEN.get() {
            Some(screen) => screen.suspend(|| io::stderr().write_all(text))?,
            None => io::stderr().write_all(text)?,
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// A thread that draws the bars until this value is dropped.
pub struct Bars {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Bars {
    /// Starts to draw the progress of a plan's phases, if standard error goes to a terminal.
    pub fn start(plan: &Plan, run: &RunDir) -> Result<Option<Bars>> {
        if !on_a_terminal() {
            return Ok(None);
        }
        let screen = screen();
        let stop = Arc::new(AtomicBool::new(false));
        let phases = phase_names(plan);
        let (run, stopped, began) = (run.path.clone(), stop.clone(), unix_time());
        let thread = thread::start("bars", move || {
            let mut bars = HashMap::new();
            while !stopped.load(Ordering::Relaxed) {
                for (phase, global_batch) in &phases {
                    if let Some(progress) = Progress::read(&run, phase).filter(|p| p.updated >= began - 1.0) {
                        draw(screen, &mut bars, &progress, *global_batch);
                    }
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        })?;
        Ok(Some(Bars { stop, thread: Some(thread) }))
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Some(screen) = SCREEN.get() {
            let _ = screen.clear();
        }
    }
}

/// The name and the global batch of every phase. This includes phases that the config does not ask for, because a command can train
/// them.
fn phase_names(plan: &Plan) -> Vec<(String, usize)> {
    let phases = plan.graph().nodes().iter().filter_map(|node| plan.phase_of(node)).collect::<Vec<_>>();
    phases.into_iter().map(|phase| (phase.name, phase.training.global_batch)).collect()
}

/// A bar with this name that counts up to `total`. None if standard error does not go to a terminal.
pub fn counting(name: &'static str, total: usize) -> Option<ProgressBar> {
    let style = ProgressStyle::with_template("{prefix:>10} [{bar:30}] {pos}/{len} {per_sec}  ETA {eta}")
        .expect("a valid template")
        .progress_chars("=> ");
    let bar = || screen().add(ProgressBar::new(total as u64).with_style(style).with_prefix(name));
    on_a_terminal().then(bar)
}

fn screen() -> &'static MultiProgress {
    SCREEN.get_or_init(|| MultiProgress::with_draw_target(ProgressDrawTarget::term_like(Box::new(Screen))))
}

fn draw(screen: &MultiProgress, bars: &mut HashMap<String, ProgressBar>, progress: &Progress, global_batch: usize) {
    if progress.state == Activity::Done {
        // A log line says how the phase ended.
        if let Some(bar) = bars.remove(&progress.phase) {
            bar.finish_and_clear();
        }
        return;
    }
    let bar = bars.entry(progress.phase.clone()).or_insert_with(|| {
        let style = ProgressStyle::with_template("{prefix:>10} [{bar:30}] {pos}/{len} {msg}")
            .expect("a valid template")
            .progress_chars("=> ");
        screen.add(ProgressBar::new(progress.steps).with_style(style).with_prefix(progress.phase.clone()))
    });
    bar.set_position(progress.step);
    let eta = progress.eta(global_batch).map_or("?".into(), duration);
    let loss = progress.loss.map_or("?".into(), |loss| format!("{loss:.4}"));
    bar.set_message(format!("loss {loss}  {:.0} images/s  ETA {eta}", progress.images_per_s));
}

/// Standard error as a terminal. It may be a pipe to mpirun, which passes control sequences on to the terminal.
#[derive(Debug)]
struct Screen;

impl Screen {
    fn control(&self, count: usize, letter: char) -> io::Result<()> {
        if count > 0 { write!(io::stderr(), "\x1b[{count}{letter}") } else { Ok(()) }
    }
}

impl TermLike for Screen {
    fn width(&self) -> u16 {
        columns().unwrap_or(100)
    }
    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.control(n, 'A')
    }
    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.control(n, 'B')
    }
    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.control(n, 'C')
    }
    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.control(n, 'D')
    }
    fn write_line(&self, text: &str) -> io::Result<()> {
        writeln!(io::stderr(), "{text}")
    }
    fn write_str(&self, text: &str) -> io::Result<()> {
        write!(io::stderr(), "{text}")
    }
    fn clear_line(&self) -> io::Result<()> {
        write!(io::stderr(), "\r\x1b[2K")
    }
    fn flush(&self) -> io::Result<()> {
        io::stderr().flush()
    }
}
