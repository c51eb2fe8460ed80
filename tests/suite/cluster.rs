//! A private, temporary Slurm of three virtual nodes on this machine. The daemons and commands are real. All files are in one
//! temporary folder, and the daemons end when the [`Cluster`] is dropped.

use crate::wait::{LIMIT, holds_within};
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

pub struct Cluster {
    folder: tempfile::TempDir,
    daemons: Vec<Child>,
}

const NODES: usize = 3;

impl Cluster {
    pub fn start() -> Cluster {
        // The path must be short, since PMIx puts its sockets below it. munged requires that everybody can enter the folder.
        let folder = tempfile::Builder::new().prefix("slurm-").tempdir_in("/tmp").unwrap();
        set_mode(folder.path(), 0o755);
        let mut cluster = Cluster { folder, daemons: Vec::new() };
        let d = cluster.folder.path().to_path_buf();
        for name in ["munge", "state", "log", "run", "fakegpu"] {
            fs::create_dir(d.join(name)).unwrap();
        }
        for i in 1..=NODES {
            fs::create_dir_all(d.join(format!("spool/n{i}"))).unwrap();
            fs::create_dir_all(d.join(format!("tmp/n{i}"))).unwrap();
            set_mode(&d.join(format!("tmp/n{i}")), 0o1777);
        }
        let base = free_ports();
        fs::write(d.join("slurm.conf"), configuration(&d, base)).unwrap();
        fs::write(d.join("cgroup.conf"), "CgroupPlugin=cgroup/v1\n").unwrap();
        // Any character device can stand for a GPU, since nobody computes on it.
        (0..4).for_each(|i| std::os::unix::fs::symlink("/dev/null", d.join(format!("fakegpu/gpu{i}"))).unwrap());
        fs::write(d.join("gres.conf"), format!("AutoDetect=off\nName=gpu File={}/fakegpu/gpu[0-3]\n", d.display()))
            .unwrap();
        let prolog = d.join("taskprolog.sh");
        let d_text = d.display();
        fs::write(
            &prolog,
            format!("#!/bin/sh\necho export OMPI_MCA_btl_vader_backing_directory={d_text}/tmp/$SLURMD_NODENAME\n"),
        )
        .unwrap();
        set_mode(&prolog, 0o755);

        let munge = |name: &str| d.join("munge").join(name).display().to_string();
        fs::write(munge("key"), [7u8; 1024]).unwrap();
        set_mode(Path::new(&munge("key")), 0o600);
        set_mode(&d.join("munge"), 0o755);
        let file = |option: &str, name: &str| format!("--{option}={}", munge(name));
        cluster.daemon(
            "munged",
            &[
                "-F",
                &file("key-file", "key"),
                &file("socket", "sock"),
                &file("pid-file", "pid"),
                &file("log-file", "log"),
                &file("seed-file", "seed"),
            ],
        );
        cluster.until("munged's socket", || Path::new(&munge("sock")).exists());
        let conf = d.join("slurm.conf").display().to_string();
        cluster.daemon("slurmctld", &["-D", "-i", "-f", &conf]);
        cluster.until("slurmctld", || std::net::TcpStream::connect(("127.0.0.1", base)).is_ok());
        for i in 1..=NODES {
            cluster.daemon("slurmd", &["-D", "-N", &format!("n{i}"), "-f", &conf]);
        }
        cluster.until("idle nodes", || {
            cluster.output("sinfo", &["-h", "-N", "-o", "%T"]).matches("idle").count() >= NODES
        });
        cluster
    }

    fn daemon(&mut self, program: &str, arguments: &[&str]) {
        let log =
            fs::File::create(self.folder.path().join("log").join(format!("{program}-{}", self.daemons.len()))).unwrap();
        let child = Command::new(program)
            .args(arguments)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("{program}: {e}; `tools/setup.sh --tests` installs it"));
        self.daemons.push(child);
    }

    /// Directs a Slurm command to this cluster.
    pub fn client<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("SLURM_CONF", self.folder.path().join("slurm.conf"))
    }

    /// The output of a Slurm command.
    pub fn output(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.client(Command::new(program).args(arguments)).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Like [`wait_until`](crate::wait::wait_until), but the panic also shows the daemons' logs.
    pub fn until(&self, what: &str, holds: impl FnMut() -> bool) {
        assert!(holds_within(LIMIT, holds), "waited in vain for {what}:\n{}", self.logs());
    }

    fn logs(&self) -> String {
        let mut text = self.output("squeue", &["-t", "all"]);
        for entry in fs::read_dir(self.folder.path().join("log")).into_iter().flatten().flatten() {
            let log = fs::read_to_string(entry.path()).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(8).collect();
            text +=
                &format!("{}:\n{}\n", entry.path().display(), tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
        text
    }

    /// The state of a job; for an array, the states of its tasks in one line.
    pub fn state(&self, job: &str) -> String {
        self.output("squeue", &["-h", "-t", "all", "-j", job, "-o", "%T"]).replace('\n', " ").trim().to_string()
    }

    /// The number, from 1, of the node that a job runs on.
    pub fn node_of(&self, job: &str) -> usize {
        let node = self.output("squeue", &["-h", "-j", job, "-o", "%N"]);
        node.trim().strip_prefix('n').and_then(|number| number.parse().ok()).expect("the job runs on one node")
    }

    /// Kills the daemon of a node and, with `all`, all processes of all jobs. Then tells Slurm that the node is down.
    pub fn lose_node(&mut self, node: usize, all: bool) {
        let slurmd = &mut self.daemons[1 + node];
        slurmd.kill().unwrap();
        slurmd.wait().unwrap();
        if all {
            for (pid, _) in self.processes() {
                // SAFETY: the signal goes to a process of this cluster's jobs.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
        }
        let name = format!("NodeName=n{node}");
        self.output("scontrol", &["update", &name, "State=DOWN", "Reason=test"]);
    }

    /// The process numbers and commands of all processes that jobs have started. They have inherited the variable SLURM_CONF.
    pub fn processes(&self) -> Vec<(i32, String)> {
        let mine = format!("SLURM_CONF={}", self.folder.path().join("slurm.conf").display());
        let of = |entry: fs::DirEntry| -> Option<(i32, String)> {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let environment = fs::read(entry.path().join("environ")).ok()?;
            let command = fs::read_to_string(entry.path().join("comm")).ok()?.trim().to_string();
            let daemon = self.daemons.iter().any(|daemon| daemon.id() as i32 == pid);
            let ours = environment.split(|&b| b == 0).any(|line| line == mine.as_bytes());
            (ours && !daemon).then_some((pid, command))
        };
        fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(of).collect()
    }

    /// Waits until a job has completed.
    pub fn until_completed(&self, job: &str) {
        self.until(&format!("job {job} to complete"), || {
            let state = self.state(job);
            assert!(
                !["FAILED", "CANCELLED", "TIMEOUT"].iter().any(|bad| state.contains(bad)),
                "{state}\n{}",
                self.logs()
            );
            !state.is_empty() && state.split(' ').all(|s| s == "COMPLETED")
        });
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.output("scancel", &["--full", "-u", &user()]);
        for daemon in self.daemons.iter_mut().rev() {
            // SAFETY: the daemon is our child and has not been waited for.
            unsafe { libc::kill(daemon.id() as i32, libc::SIGTERM) };
        }
        let has_ended = |daemon: &mut Child| !matches!(daemon.try_wait(), Ok(None));
        holds_within(Duration::from_secs(2), || self.daemons.iter_mut().all(has_ended));
        for daemon in &mut self.daemons {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        // The step daemons outlive slurmd.
        for (pid, _) in self.processes() {
            // SAFETY: the signal goes to a process of this cluster's jobs, which nobody needs any more.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// The first of four free ports below the range from which the system chooses ports. Tests that run at the same time begin their
/// search at different ports.
fn free_ports() -> u16 {
    let first = 20_000 + 4 * (std::process::id() % 2_500) as u16;
    (first..32_000)
        .step_by(4)
        .find(|&base| (base..base + 4).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()))
        .expect("four free ports")
}

fn user() -> String {
    let output = Command::new("id").arg("-un").output().unwrap();
    String::from_utf8_lossy(&output.stdout).trim().to_string()
}

fn configuration(folder: &Path, base: u16) -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim().to_string();
    let mut text = include_str!("../fake/slurm.conf").replace("{folder}", &folder.display().to_string());
    for (field, value) in [("{user}", user()), ("{host}", host), ("{patience}", "5".into())] {
        text = text.replace(field, &value);
    }
    (0..=NODES).fold(text, |text, i| text.replace(&format!("{{port{i}}}"), &(base + i as u16).to_string()))
}
