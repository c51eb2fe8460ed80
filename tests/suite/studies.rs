//! `incubate study` trains every cell once, at the costs that it has announced, and reports on all of them.

use crate::documents::{blocks, root};
use crate::incubate::{Ended, TINY, ended, plain};
use crate::wait::wait_until;
use incubate::study::{Method, Study};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use tempfile::TempDir;

const STUDY: &str = r#"
name = "tiny"
base = "base.toml"
dir = "cells"
[set]
run.export = []
[axes.method.incubation]
[axes.method.e2e]
method = "e2e"
equal_cost_to = "incubation"
[axes.seed.s0]
run.seed = 0
[axes.seed.s1]
run.seed = 1
"#;

struct Folder(TempDir);

impl Folder {
    fn new(study: &str) -> Folder {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("base.toml"), TINY).unwrap();
        fs::write(folder.path().join("study.toml"), study).unwrap();
        Folder(folder)
    }

    fn command(&self, launcher: &[&str], arguments: &[&str]) -> Command {
        let words = [launcher, &[env!("CARGO_BIN_EXE_incubate"), "study", "study.toml"], arguments].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).current_dir(&self.0);
        command
    }

    fn study(&self, arguments: &[&str]) -> Ended {
        ended(self.command(&[], arguments).output().unwrap())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join("cells").join(name)
    }

    fn starts(&self, cell: &str, phase: &str) -> usize {
        fs::read_to_string(self.file(cell).join(format!("ledger/{phase}.jsonl"))).map_or(0, |text| text.lines().count())
    }
}

#[test]
fn the_ranks_of_a_world_share_the_cells_and_a_second_start_trains_nothing() {
    let folder = Folder::new(STUDY);
    let cells: Vec<Value> = serde_json::from_str(&folder.study(&["--dry-run", "--json"]).ok().out).unwrap();
    let names: Vec<&str> = cells.iter().map(|cell| cell["cell"].as_str().unwrap()).collect();
    assert_eq!(names, ["incubation-s0", "incubation-s1", "e2e-s0", "e2e-s1"]);
    let number = |cell: usize, key: &str| cells[cell][key].as_f64().unwrap();
    let epoch = number(2, "flops") / cells[2]["epochs"][0][1].as_f64().unwrap();
    assert!((number(2, "flops") - number(0, "flops")).abs() <= epoch / 2.0, "{cells:?}");
    assert!((number(2, "difference") - (number(2, "flops") / number(0, "flops") - 1.0)).abs() < 1e-12);
    assert!(number(0, "hours") > 0.0 && !folder.file("").exists());

    let world = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"];
    ended(folder.command(&world, &[]).output().unwrap()).ok();
    for name in names {
        let (phase, model) = if name.starts_with("e2e") { ("e2e", "e2e.h5") } else { ("meta", "final.h5") };
        assert!(folder.file(name).join(model).exists() && folder.file(name).join("report.html").exists(), "{name}");
        assert_eq!(folder.starts(name, phase), 1, "{name}");
    }
    assert!(!folder.file("e2e-s0/meta.h5").exists());
    // The cost that was announced is the cost that was computed.
    let summary: Vec<Value> =
        serde_json::from_slice(&fs::read(folder.file("incubation-s0/summary.json")).unwrap()).unwrap();
    let computed: f64 = summary.iter().map(|model| model["flops"].as_f64().unwrap()).sum();
    assert!((computed / number(0, "flops") - 1.0).abs() < 1e-9);

    let before = fs::read(folder.file("incubation-s0/report.html")).unwrap();
    let again = folder.study(&[]).ok();
    assert_eq!(again.err.matches("done already").count(), 4, "{}", again.err);
    assert_eq!(fs::read(folder.file("incubation-s0/report.html")).unwrap(), before);
    let page = fs::read_to_string(folder.file("report.html")).unwrap();
    assert!(
        page.contains("4 runs train a Vision Transformer") && page.contains("At equal cost Deep Incubation reaches")
    );
    assert!(page.contains("4 runs") && !page.contains("What this report lacks"), "{}", again.out);
}

#[test]
fn the_announced_cost_of_a_cell_includes_the_phases_downstream_of_its_method() {
    let colours = "model.channels = 3\ndata.mean = [0.3, 0.3, 0.3]\ndata.std = [0.3, 0.3, 0.3]\n";
    let maps = "segmentation.format = \"shapes\"\nsegmentation.train_images = 12\nsegmentation.test_images = 3\n\
                segmentation.classes = 3\nsegmentation.reduce_zero_label = false\nsegmentation.crop = 32\n\
                segmentation.width = 8\nsegmentation.auxiliary_width = 8\nsegment.epochs = 3\nsegment.global_batch = 4\n\
                segment.warmup_epochs = 0";
    let study = |keys: &str| Folder::new(&STUDY.replace("run.export = []", &format!("run.export = []\n{keys}")));
    let folder = study(&format!("{colours}{maps}"));
    let lines = |folder: &Folder| -> Vec<Value> {
        serde_json::from_str(&folder.study(&["--dry-run", "--json", "--gpu", "h100"]).ok().out).unwrap()
    };
    let (with, without) = (lines(&folder), lines(&study(colours)));
    for (cell, phase) in [(0, "segment"), (2, "segment-e2e")] {
        assert_eq!(with[cell]["epochs"].as_array().unwrap().last().unwrap(), &json!([phase, 3]), "{with:?}");
        assert_eq!(with[cell]["difference"], without[cell]["difference"], "classes are learned at the same cost");
        for key in ["flops", "hours"] {
            assert!(with[cell][key].as_f64().unwrap() > without[cell][key].as_f64().unwrap(), "{key} of {with:?}");
        }
    }
    folder.study(&["--only", "incubation-s0"]).ok();
    let summary = fs::read(folder.file("incubation-s0/summary.json")).unwrap();
    let summary: Vec<Value> = serde_json::from_slice(&summary).unwrap();
    assert!(summary.iter().any(|model| model["model"] == "segmentation"), "{summary:?}");
    let computed: f64 = summary.iter().map(|model| model["flops"].as_f64().unwrap()).sum();
    assert!((computed / with[0]["flops"].as_f64().unwrap() - 1.0).abs() < 1e-9, "{computed} and {with:?}");
}

#[test]
fn a_cell_of_local_losses_trains_that_baseline_alone_at_the_cost_that_it_should_have() {
    let folder = Folder::new(&STUDY.replace(
        "[axes.seed.s0]",
        "[axes.method.dgl]\nmethod = \"dgl\"\nequal_cost_to = \"incubation\"\n[axes.seed.s0]",
    ));
    let cells: Vec<Value> = serde_json::from_str(&folder.study(&["--dry-run", "--json"]).ok().out).unwrap();
    let cell = |name: &str| cells.iter().find(|cell| cell["cell"] == name).unwrap().clone();
    let [flops, wanted] = ["dgl-s0", "incubation-s0"].map(|name| cell(name)["flops"].as_f64().unwrap());
    let epochs = cell("dgl-s0")["epochs"][0][1].as_f64().unwrap();
    assert_eq!(
        (cell("dgl-s0")["method"].as_str(), cell("dgl-s0")["epochs"][0][0].as_str()),
        (Some("dgl"), Some("dgl"))
    );
    assert!((flops - wanted).abs() <= flops / epochs / 2.0, "{cells:?}");
    folder.study(&["--only", "dgl-s0", "--only", "incubation-s0"]).ok();
    assert!(folder.file("dgl-s0/dgl.h5").exists() && !folder.file("dgl-s0/meta.h5").exists());
    assert!(!folder.file("incubation-s0/dgl.h5").exists() && !folder.file("dgl-s0/e2e.h5").exists());
    let page = fs::read_to_string(folder.file("report.html")).unwrap();
    assert!(
        page.contains("with losses for each stage (DGL, InfoPro) or end to end") && page.contains(">DGL<"),
        "the page has the method"
    );
}

#[test]
fn a_signal_ends_a_study_resumably_and_a_cell_that_fails_does_not_stop_the_others() {
    let folder = Folder::new(&STUDY.replace("run.export = []", "run.export = []\nmeta.epochs = 60"));
    let mut child = folder.command(&[], &["--only", "incubation-s1"]).stderr(Stdio::null()).spawn().unwrap();
    let has_checkpoint = || fs::read_dir(folder.file("incubation-s1/checkpoints")).is_ok_and(|all| all.count() > 0);
    wait_until("a checkpoint", has_checkpoint);
    // SAFETY: the child was not waited for, so its number is its own.
    unsafe { libc::kill(child.id() as i32, libc::SIGUSR2) };
    assert_eq!(child.wait().unwrap().code(), Some(75));

    fs::write(folder.file("incubation-s0"), "in the way").unwrap();
    let only = ["--only", "incubation-s0", "--only", "incubation-s1"];
    folder.study(&only).fails(2, &["1 cell(s) of tiny have failed", "incubation-s0", "choose another --run-dir"]);
    assert!(folder.file("incubation-s1/report.html").exists());
    assert_eq!(folder.starts("incubation-s1", "meta"), 2);
    folder.study(&["--only", "incubation-s7"]).fails(2, &["--only incubation-s7: no such cell"]);
}

#[test]
fn the_studies_of_fashion_mnist_and_of_the_page_are_ones_that_the_program_takes() {
    let drawn = "format = \"shapes\"\ntrain_images = 60000\ntest_images = 10000";
    let base =
        fs::read_to_string(root().join("configs/fashion-mnist.toml")).unwrap().replace("format = \"idx\"", drawn);
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("studies")).unwrap();
    fs::write(folder.path().join("fashion-mnist.toml"), base).unwrap();
    let page = fs::read_to_string(root().join("docs/studies.md")).unwrap();
    for name in ["cifar-resnet-110.toml", "cifar100-deit-t-32.toml", "cifar100-deit-t-128.toml"] {
        fs::copy(root().join("configs").join(name), folder.path().join(name)).unwrap();
    }
    let of_cifar = fs::read_to_string(root().join("configs/cifar10-resnet-32.toml")).unwrap();
    fs::write(folder.path().join("cifar10-resnet-32.toml"), of_cifar.replace("\"folder\"", "\"shapes\"")).unwrap();
    let mut texts: Vec<String> = blocks(&page, &["toml study"]).into_iter().map(str::to_string).collect();
    let names =
        ["fashion-mnist-depth.toml", "table-2.toml", "fashion-mnist-depth-rates.toml", "cifar-10-resnet-32.toml"];
    let files = names.map(|name| root().join("configs/studies").join(name));
    // The study at the paper's size has a test of its own.
    let count = fs::read_dir(root().join("configs/studies")).unwrap().count();
    assert_eq!((texts.len(), count), (1, files.len() + 1));
    texts.extend(files.iter().map(|file| fs::read_to_string(file).unwrap()));
    for (text, cells) in texts.iter().zip([8, 81, 36, 18, 3]) {
        let file = folder.path().join("studies/study.toml");
        fs::write(&file, text).unwrap();
        let study = Study::load(&file).unwrap();
        assert_eq!(study.cells.len(), cells);
        for cell in study.cells.iter().filter(|cell| cell.method == Method::E2e) {
            let difference = cell.equal_to.as_ref().map(|(_, difference)| difference.abs());
            // Some studies give their methods the same epochs.
            let has_own_epochs = ["table-2", "cifar-10-resnet-32"].contains(&study.name.as_str());
            assert!(difference.map_or(has_own_epochs, |apart| apart < 0.1), "{}: {difference:?}", cell.name);
        }
    }
}

#[test]
fn a_study_at_the_size_of_the_paper_is_planned_for_a_gpu_without_its_images() {
    let study = root().join("configs/studies/imagenet.toml");
    let mut command = plain(&["study", study.to_str().unwrap(), "--dry-run", "--gpu", "h100", "--json"]);
    let lines: Vec<Value> = serde_json::from_str(&ended(command.output().unwrap()).ok().out).unwrap();
    assert_eq!(lines.len(), 9);
    for line in &lines {
        // 40 % of the peak of the data sheet, 989.4 TFLOP/s in bf16.
        let hours = line["flops"].as_f64().unwrap() / (0.4 * 989.4e12) / 3600.0;
        assert!((line["hours"].as_f64().unwrap() / hours - 1.0).abs() < 1e-9, "{line}");
    }
    let of = |cell: &str| lines.iter().find(|line| line["cell"] == cell).unwrap()["epochs"].to_string();
    assert_eq!(of("vit_l-incubation"), r#"[["meta",300],["module",100],["finetune",100]]"#);
    assert_eq!(of("vit_l-e2e"), r#"[["e2e",300]]"#);
}
