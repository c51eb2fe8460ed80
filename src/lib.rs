//! Deep Incubation (arXiv 2212.04129) for clusters: trains a large Vision Transformer module by module over MPI. «The official
//! code» in this documentation is the code of the paper's authors.
//!
//! # The idea in four lines
//! Divide the **target** network into K **stages**. Train a **meta model** in which every stage is thin. Then train each **module**
//! (one stage at target depth) on its own, inside the frozen meta model; this network is its **hybrid**. Assemble the modules into
//! the target and fine-tune it. Modules need nothing of each other, so they can train at the same time on different ranks.
//!
//! # The map: a file imports only from lower floors
//! ```text
//! 6  main, cli          commands, exit codes
//! 5  pipeline           walks the graph of the run; assembly, evaluation, pictures of predictions, progress bars
//! 5  report             the table at the end of a run, and the page about one run or several
//! 5  study              a grid of configs: its cells, their cost, and shares of them
//! 5  pack               writes any source as HDF5 shards
//! 5  bench              commands that measure performance
//! 5  export, import     one small file per format of other programs
//! 5  downstream         the official figures of results on COCO and ADE20K
//! 5  cluster            Slurm scripts and submission, status, doctor
//! 4  train              THE LOOP (read this first), one optimiser step, AdamW and SGD, evaluation
//! 3  task               losses with their gradients, metrics as data; classification, segmentation and detection; objectives
//! 2  data               source: image folders, tars, packs, IDX, CIFAR, drawn images; image: decoding, augmentation; feed: loader
//! 2  model              staged networks of each family, flat parameters, initialisation
//! 2  collective         trait Collective { rank, size, all_reduce, barrier }: solo, mpi, replicas of a rank, nccl
//! 2  device             CUDA loaded at run time, this rank's GPUs, cores near them
//! 2  store              run directory, HDF5 artefacts, durable write, leases, metrics, heartbeats, ledger
//! 1  run                the graph of a run as data: the table of its rows, the rule that decides the state of each node
//! 1  plan               everything that follows from the config: phases, schedules, local losses, groups, cost
//! 1  random, weights    counter-based randomness; named tensors, which the entries of floor 2 exchange
//! 1  launcher           the rank and the cores of this process, known before MPI is initialised
//! 1  driver, libtorch   the NVIDIA driver's library, loaded at run time; functions of libtorch that tch does not bind
//! 1  seal               checksums that find damage before a byte of an HDF5 file is parsed
//! 1  svg                pictures: curves, charts, bars, a confusion matrix, masks and objects over photographs
//! 1  coco               objects in images: annotations, outlines, their encoding as numbers, figures, results files
//! 0  family             per kind of network: config keys, table of parameters, cost, names in other programs
//! 0  config, error      exactly what the TOML says; failures and their exit codes
//! 0  bounds             limits of the numbers in a config
//! 0  thread, stop       starting threads; whether a signal asked this process to stop
//! ```
//! The entries of one floor do not import each other, except on floors 0 and 1. A test checks the imports. `mpi::` stays in
//! `collective/mpi.rs`. Reading and writing HDF5 stays in `store/artefact.rs` and `data/source/shard.rs`. `clap` stays in `cli/`
//! and `main.rs`.
//!
//! # From `main` to one optimiser step in five calls
//! 1. `main.rs` parses the command line, sets up logging and signals, joins the world of ranks, and turns any error into an exit
//!    code.
//! 2. [`cli::dispatch`] loads the config and opens a [`pipeline::Job`]: plan, data, run directory, world.
//! 3. [`pipeline::Job::run`] walks the rows of [`run::table::TABLE`], which read like the paper: meta, modules, assemble,
//!    fine-tune. A row that trains becomes a [`plan::PhasePlan`]. No training code asks which phase it is in.
//! 4. [`train::run`] is the loop: step, log, evaluate, checkpoint, stop after a signal, write the artefact.
//! 5. [`train::step::Stepper::step`] is one optimiser step: forward, backward, all-reduce, clip, optimiser.
//!
//! # Invariants
//! - All randomness is a pure function of a key such as (seed, epoch, sample) ([`random`]), so there is no generator state to
//!   save. On a CPU, a resumed run gives the same bits as an uninterrupted run. The samples of each step are the same for any
//!   number of ranks and workers.
//! - The backward pass of a ViT is written out ([`model`]), not left to autograd. A test compares every gradient with timm's.
//! - Within a step the host does not wait for a GPU, with two exceptions. It waits if the gradients of several GPUs are summed in
//!   host memory, and if a detector trains, because the host selects the detector's boxes. The host reads the loss of a step while
//!   the GPU computes the next step ([`train::step`]).
//! - The trained parameters of a phase, their gradients and their moments are flat buffers ([`model::FlatParameters`]), so a step
//!   sums its gradients in one all-reduce. No activations are kept for the frozen stages before the trained stages. No weight
//!   gradients are computed for the frozen stages after them.
//! - Artefacts, checkpoints, packs, configs and reports are written under a temporary name, synced and renamed
//!   ([`store::durable`]). An artefact is verified whole before a byte of it is parsed ([`store::artefact`]). Nothing in a model or
//!   data file is executed.
//! - Either all ranks make a collective call, or none does. If a step can fail on one rank alone, the ranks first agree on its
//!   result ([`collective::agree`]). Any other failure ends the whole world ([`collective::mpi::World::abort`]).
//!
//! Deliberately absent: a plug-in system, a second way to write a config, any state outside the run directory.

pub mod bench;
pub mod bounds;
pub mod cli;
pub mod cluster;
pub mod coco;
pub mod collective;
pub mod config;
pub mod data;
pub mod device;
pub mod downstream;
pub mod driver;
pub mod error;
pub mod export;
pub mod family;
pub mod import;
pub mod launcher;
pub mod libtorch;
pub mod model;
pub mod pack;
pub mod pipeline;
pub mod plan;
pub mod random;
pub mod report;
pub mod run;
pub mod seal;
pub mod stop;
pub mod store;
pub mod study;
pub mod svg;
pub mod task;
pub mod thread;
pub mod train;
pub mod weights;
