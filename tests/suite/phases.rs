//! A new phase needs only one row of the table. The row is trained and submitted, and the status and the summary show it, although
//! no other code names it.
//!
//! If a phase has a config table of its own, the table is documented in `configs/default.toml` and is a field of `Config`. If it
//! has a command of its own, the help is in `cli/args.rs`. A row needs neither: it may share another row's table, and
//! `incubate run` trains it.

use crate::incubate::TINY;
use clap::CommandFactory;
use incubate::cli::Cli;
use incubate::cluster::queue::Queue;
use incubate::cluster::script::Paths;
use incubate::cluster::slurm::{DEFAULT_MAX_ARRAY_SIZE, OpenJobs, Situation, jobs};
use incubate::cluster::status;
use incubate::collective::mpi::World;
use incubate::config::{Config, DeviceChoice, ObjectiveKind, PHASE_TABLES, TaskKind};
use incubate::device::{Devices, OnNode};
use incubate::pipeline::Job;
use incubate::report::summary;
use incubate::run::graph::Graph;
use incubate::run::table::{Depths, FINETUNE, Kind, Method, ModelSpec, Origin, Phase, Row, SlurmJob, TABLE, Trains};
use incubate::store::{ArtefactCache, artefact};
use std::path::Path;

/// Fine-tunes the finished model once more.
static AGAIN: Row = Row {
    name: "again",
    kind: Kind::Train(Phase {
        start: Origin::From("finetune"),
        trains: Trains::Everything,
        task: TaskKind::Classification,
        objective: ObjectiveKind::EndToEnd,
        training: |config| &config.finetune,
    }),
    needs: &["pack", "finetune"],
    writes: "again.h5",
    model: Some(ModelSpec {
        depths: Depths::Deep,
        recipe: &["model", "data", "meta", "module", "finetune"],
        derives_from: Some("meta"),
        may_be_imported: false,
        label: "tuned again",
        method: Method::Incubation,
    }),
    until_assembled: false,
    job: SlurmJob::Last,
    time: |slurm| &slurm.time_finalize,
    is_wanted: |_| true,
};

#[test]
fn a_new_phase_is_one_row() {
    let mut rows = TABLE.to_vec();
    let after_finetune = rows.iter().position(|row| row.name == FINETUNE.name).unwrap() + 1;
    rows.insert(after_finetune, &AGAIN);
    let folder = tempfile::tempdir().unwrap();
    let config = Config::parse(TINY, &[format!("run.dir={:?}", folder.path().join("run"))]).unwrap();
    let graph = Graph::new(&config, &rows);

    // The new phase trains from the model of the phase before it.
    tch::set_num_threads(1);
    let world = World::alone();
    let devices = Devices::of_rank(DeviceChoice::Cpu, 1, OnNode { rank: 0, ranks: 1 }).unwrap();
    let mut job = Job::open(config, &world, devices, false, TaskKind::Classification).unwrap();
    job.graph = graph.clone();
    job.run().unwrap();
    let header = |file: &str| artefact::read_header(&job.run.file(file)).unwrap().0;
    assert_eq!((header("again.h5").phase.as_str(), header("again.h5").meta), ("again", header("final.h5").meta));
    job.run().unwrap();

    let models = summary::rows(&job.plan, &graph, &job.run, 0, &mut ArtefactCache::default()).unwrap();
    let models: Vec<&str> = models.iter().map(|row| row.model.as_str()).collect();
    assert_eq!(models[5..], ["assembled", "fine-tuned", "tuned again"]);

    let lines = status::lines(&job.plan, &graph, &job.run, &Queue::default(), &mut ArtefactCache::default()).unwrap();
    assert!(status::is_all_done(&lines) && lines.last().unwrap().phase == "again", "{lines:?}");

    // The last job, `finalize`, executes the new phase.
    let position = graph.nodes().iter().position(|node| node.name == "again").unwrap();
    let situation = Situation {
        unfinished: vec![position],
        open: OpenJobs::default(),
        max_array_size: DEFAULT_MAX_ARRAY_SIZE,
        save_s: 0.0,
    };
    let paths = Paths { binary: Path::new("/i"), config: Path::new("/c.toml"), run_dir: Path::new("/r") };
    let jobs = jobs(&job.plan, &graph, paths, &situation).unwrap();
    assert_eq!((jobs.len(), jobs[0].kind.to_string().as_str(), &jobs[0].nodes), (1, "finalize", &vec![position]));
    assert!(jobs[0].script.contains("finetune*.json again*.json e2e*.json"), "{}", jobs[0].script);
}

#[test]
fn every_phase_of_the_table_has_a_config_table_and_a_command() {
    let commands = Cli::command();
    for row in TABLE.iter().filter(|row| row.phase().is_some()) {
        // A row such as `segment-e2e`, which does the same for the baseline, has the table of `segment`.
        let table = row.name.strip_suffix("-e2e").unwrap_or(row.name);
        assert!(PHASE_TABLES.contains(&table), "configs/default.toml and Config: [{}]", row.name);
        assert!(commands.find_subcommand(row.name).is_some(), "cli/args.rs: incubate {}", row.name);
    }
}

#[test]
fn every_row_comes_after_the_rows_that_it_needs() {
    for (position, row) in TABLE.iter().enumerate() {
        let before: Vec<&str> = TABLE[..position].iter().map(|row| row.name).collect();
        assert!(row.needs.iter().all(|need| before.contains(need)), "{}", row.name);
        if let Some(Origin::From(start)) = row.phase().map(|phase| phase.start) {
            assert!(row.needs.contains(&start), "{} starts from a row that it does not need", row.name);
        }
    }
}
