//! Runs the program as a user does. Each test has a folder of its own.

use crate::wait::wait_until;
use std::fs::DirEntry;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// Drawn images and a tiny model, with which all phases take a few seconds on one core.
pub const TINY: &str = r#"
[run]
threads = 1
micro_batch = 32
checkpoint_every = "5 steps"
log_steps = 1
[model]
image_size = 16
channels = 1
classes = 4
patch_size = 4
width = 16
heads = 2
depths = [2, 2, 2, 2]
[data]
format = "shapes"
train_images = 512
test_images = 128
mean = [0.3]
std = [0.3]
repeats = 1
auto_augment = ""
color_jitter = 0.0
[train]
global_batch = 64
base_lr = 8e-3
schedule = "cosine"
warmup_epochs = 0
epochs = 2
eval_epochs = 0
[meta]
epochs = 3
[module]
epochs = 2
[finetune]
epochs = 2
[e2e]
epochs = 2
"#;

/// A folder with a config, in which commands run.
pub struct Incubate {
    pub folder: TempDir,
    pub run_dir: PathBuf,
    sets: Vec<String>,
}

pub struct Ended {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Incubate {
    pub fn new() -> Incubate {
        Self::with(TINY)
    }

    /// A run of [`TINY`] with colour images, stages of one block, and one epoch in each phase after the meta model. The text
    /// `tables` is added to the config.
    pub fn of_thin_stages_with(tables: &str) -> Incubate {
        let text = TINY.replace("channels = 1", "channels = 3").replace("[0.3]", "[0.3, 0.3, 0.3]");
        let text =
            text.replace("epochs = 2\n", "epochs = 1\n").replace("depths = [2, 2, 2, 2]", "depths = [1, 1, 1, 1]");
        Self::with(&(text + tables))
    }

    pub fn with(config: &str) -> Incubate {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.toml"), config).unwrap();
        let run_dir = folder.path().join("run");
        Incubate { folder, run_dir, sets: Vec::new() }
    }

    pub fn set(mut self, set: &str) -> Incubate {
        self.sets.push(set.into());
        self
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.run_dir.join(name)
    }

    pub fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.file(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// The command `incubate COMMAND config.toml …`.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = plain(&[]);
        self.arguments(&mut command, arguments);
        command
    }

    fn arguments(&self, command: &mut Command, arguments: &[&str]) {
        command.current_dir(&self.folder).arg(arguments[0]).arg("config.toml").args(&arguments[1..]);
        command.arg("--run-dir").arg(&self.run_dir);
        for set in &self.sets {
            command.args(["--set", set]);
        }
    }

    pub fn incubate(&self, arguments: &[&str]) -> Ended {
        ended(self.command(arguments).output().unwrap())
    }

    /// Like [`Incubate::incubate`], but the command must succeed.
    pub fn ok(&self, arguments: &[&str]) -> Ended {
        self.incubate(arguments).ok()
    }

    /// Runs the command under mpirun. There may be more ranks than cores.
    pub fn mpirun(&self, ranks: usize, arguments: &[&str]) -> Ended {
        ended(self.mpirun_command(ranks, arguments).output().expect("mpirun is installed"))
    }

    /// The command of [`Incubate::mpirun`].
    pub fn mpirun_command(&self, ranks: usize, arguments: &[&str]) -> Command {
        let mut command = Command::new("mpirun");
        command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", &ranks.to_string()]);
        command.arg(env!("CARGO_BIN_EXE_incubate"));
        self.arguments(&mut command, arguments);
        command
    }

    /// The losses that a phase has logged, in the order of the steps.
    pub fn losses(&self, phase: &str) -> Vec<f64> {
        let lines = incubate::store::metrics::read(&self.run_dir.join("logs").join(phase)).unwrap();
        lines.iter().filter_map(|line| line.get("loss")?.as_f64()).collect()
    }

    /// Whether the run directory holds a checkpoint.
    pub fn has_checkpoint(&self) -> bool {
        let is_finished = |entry: DirEntry| entry.path().extension().is_some_and(|extension| extension == "h5");
        std::fs::read_dir(self.file("checkpoints")).is_ok_and(|all| all.flatten().any(is_finished))
    }

    /// Trains all phases up to the final model.
    pub fn fine_tuned(self) -> Incubate {
        ["meta", "module", "assemble", "finetune"].iter().for_each(|phase| {
            self.ok(&[phase]);
        });
        self
    }

    /// Starts a phase three times. Kills it twice, each time after a checkpoint exists and the phase has logged three more steps.
    pub fn ok_after_two_kills(&self, phase: &str) {
        for _ in 0..2 {
            let before = self.losses(phase).len();
            let mut child = self.command(&[phase]).stderr(Stdio::null()).spawn().unwrap();
            let has_gone_on = || self.has_checkpoint() && self.losses(phase).len() >= before + 3;
            wait_until("a checkpoint and three steps", || has_gone_on() || child.try_wait().unwrap().is_some());
            child.kill().unwrap();
            child.wait().unwrap();
        }
        self.ok(&[phase]);
    }

    /// A run in another folder, with the same config and with copies of these files from the run directory.
    pub fn fork(&self, files: &[&str]) -> Incubate {
        let config = std::fs::read_to_string(self.folder.path().join("config.toml")).unwrap();
        let mut fork = Incubate::with(&config);
        fork.sets = self.sets.clone();
        std::fs::create_dir(&fork.run_dir).unwrap();
        files.iter().for_each(|name| {
            std::fs::copy(self.file(name), fork.file(name)).unwrap();
        });
        fork
    }
}

/// The command `incubate …` without a config.
pub fn plain(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_incubate"));
    command.args(arguments);
    command
}

pub fn ended(output: Output) -> Ended {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    Ended { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
}

impl Ended {
    #[track_caller]
    pub fn ok(self) -> Ended {
        assert_eq!(self.code, Some(0), "{}", self.err);
        self
    }

    /// Checks that the command failed with this code and with one error line, which holds all of `words`.
    #[track_caller]
    pub fn fails(self, code: i32, words: &[&str]) -> Ended {
        let errors: Vec<&str> = self.err.lines().filter(|line| line.contains(" ERROR")).collect();
        assert_eq!(self.code, Some(code), "{}", self.err);
        assert_eq!(errors.len(), 1, "one error line: {}", self.err);
        for word in words {
            assert!(errors[0].contains(word), "{word:?} in {:?}", errors[0]);
        }
        self
    }
}

/// Flips one bit of a file.
pub fn flip(path: &Path, byte: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[byte] ^= 1 << (byte % 8);
    std::fs::write(path, bytes).unwrap();
}
