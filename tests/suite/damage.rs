//! Every way to damage an artefact or its folder ends in one clear error and the right exit code.

use crate::incubate::{Incubate, ended, flip, plain};
use incubate::store::artefact::{self, Artefact};
use std::path::Path;
use std::sync::OnceLock;

/// A finished small run, from which the tests copy files.
fn finished() -> &'static Incubate {
    static RUN: OnceLock<Incubate> = OnceLock::new();
    RUN.get_or_init(|| {
        let run = Incubate::new();
        run.ok(&["meta"]);
        run.ok(&["module"]);
        run
    })
}

const ALL: [&str; 6] = ["config.toml", "meta.h5", "module-0.h5", "module-1.h5", "module-2.h5", "module-3.h5"];

fn verify(path: &Path) -> crate::incubate::Ended {
    ended(plain(&["verify", path.to_str().unwrap()]).output().unwrap())
}

#[test]
fn a_flipped_bit_anywhere_is_found_before_anything_is_parsed() {
    let run = finished().fork(&ALL);
    let original = run.bytes("module-1.h5");
    let path = run.file("module-1.h5");
    let offsets = (0..original.len()).step_by(original.len() / 60).chain([0, 511, 512, original.len() - 1]);
    for byte in offsets {
        flip(&path, byte);
        assert!(artefact::read(&path).is_err(), "byte {byte}");
        std::fs::write(&path, &original).unwrap();
    }
    flip(&path, original.len() / 2);
    run.incubate(&["assemble"]).fails(3, &["module-1.h5", "its bytes have changed", "delete it"]);
    verify(&path).fails(3, &["module-1.h5"]);
}

#[test]
fn a_truncated_artefact_is_refused() {
    let run = finished().fork(&["config.toml", "meta.h5"]);
    let bytes = run.bytes("meta.h5");
    for keep in [0, 100, 600, bytes.len() - 1] {
        std::fs::write(run.file("meta.h5"), &bytes[..keep]).unwrap();
        run.incubate(&["module", "--index", "0"]).fails(3, &["meta.h5"]);
        verify(&run.file("meta.h5")).fails(3, &["meta.h5"]);
    }
}

#[test]
fn a_checkpoint_that_does_not_verify_falls_back_to_the_one_before() {
    let uninterrupted = Incubate::new();
    uninterrupted.ok(&["meta"]);
    let run = Incubate::new();
    let mut child = run.command(&["meta"]).stderr(std::process::Stdio::null()).spawn().unwrap();
    let checkpoints = run.file("checkpoints");
    let count = || {
        std::fs::read_dir(&checkpoints)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|e| e.path().extension().is_some_and(|x| x == "h5"))
            .count()
    };
    while count() < 2 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before two checkpoints were seen");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let mut files: Vec<_> = std::fs::read_dir(&checkpoints)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|x| x == "h5"))
        .collect();
    files.sort();
    flip(files.last().unwrap(), 5000);
    let resumed = run.ok(&["meta"]);
    assert!(
        resumed.err.contains("trying the checkpoint before it") && resumed.err.contains("resuming at step"),
        "{}",
        resumed.err
    );
    assert!(uninterrupted.bytes("meta.h5") == run.bytes("meta.h5"));
}

#[test]
fn assembly_refuses_a_mixture() {
    let run = finished().fork(&ALL);
    // Module 2 is in the file of module 1.
    std::fs::copy(run.file("module-2.h5"), run.file("module-1.h5")).unwrap();
    run.incubate(&["assemble"]).fails(3, &["module-1.h5", "holds module 2, not module 1"]);
    // A module is missing.
    std::fs::remove_file(run.file("module-1.h5")).unwrap();
    run.incubate(&["assemble"]).fails(2, &["module-1.h5", "missing", "--index 1"]);
    let replace_module_1 = |change: fn(&mut Artefact)| {
        let foreign = rewritten(&finished().file("module-1.h5"), change);
        std::fs::write(run.file("module-1.h5"), foreign).unwrap();
    };
    let cure = "delete module-1.h5 and train module 1 again";
    // The module was trained in another meta model of the same recipe. No config leads to such a module, so its header is changed.
    replace_module_1(|module| module.header.meta = Some("0".repeat(64)));
    run.incubate(&["assemble"]).fails(3, &["module-1.h5", "another meta model", cure]);
    // The module has another recipe.
    replace_module_1(|module| module.header.recipe = "0".repeat(64));
    run.incubate(&["assemble"]).fails(3, &["module-1.h5", "another recipe", cure]);
    // The module is one block deeper than in the config.
    replace_module_1(|module| {
        module.header.depths[1] = 3;
        let block = |from: &str, to: &str| {
            let own = module.weights.iter().filter(|((_, name), _)| name.starts_with(from));
            own.map(|((stage, name), tensor)| ((*stage, name.replacen(from, to, 1)), tensor.copy())).collect::<Vec<_>>()
        };
        module.weights.extend(block("blocks.1.", "blocks.2."));
    });
    run.incubate(&["assemble"]).fails(3, &["has depths [1, 3, 1, 1], expected [1, 2, 1, 1]", cure]);
}

#[test]
fn no_command_takes_a_module_of_another_meta_model_for_done() {
    let run = finished().fork(&ALL);
    let foreign = rewritten(&finished().file("module-1.h5"), |module| module.header.meta = Some("0".repeat(64)));
    std::fs::write(run.file("module-1.h5"), foreign).unwrap();
    let words = ["module-1.h5", "another meta model", "delete module-1.h5 and train module 1 again"];
    for command in [&["submit", "--dry-run"][..], &["module", "--index", "1"], &["run"]] {
        run.incubate(command).fails(3, &words);
    }
    let status = ended(plain(&["status", run.run_dir.to_str().unwrap(), "--json"]).output().unwrap()).ok();
    let lines: serde_json::Value = serde_json::from_str(&status.out).unwrap();
    let line = lines.as_array().unwrap().iter().find(|line| line["phase"] == "module-1").unwrap();
    assert!(line["state"] == "stale" && line["why"].as_str().unwrap().contains(words[2]), "{line}");
    // The file of another module under this name does not count as done either.
    std::fs::copy(run.file("module-2.h5"), run.file("module-1.h5")).unwrap();
    run.incubate(&["submit", "--dry-run"]).fails(3, &["module-1.h5", "holds module 2, not module 1"]);
}

/// The bytes of an artefact after a change, with a new seal.
fn rewritten(path: &Path, change: impl FnOnce(&mut Artefact)) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let mut artefact = artefact::read(path).unwrap();
    change(&mut artefact);
    let to = folder.path().join("a.h5");
    artefact::write(&to, &artefact.header, &artefact.weights, None).unwrap();
    std::fs::read(to).unwrap()
}

#[test]
fn a_missing_artefact_is_not_called_damaged_and_the_error_names_the_cure() {
    let run = Incubate::new();
    run.incubate(&["evaluate"]).fails(2, &["final.h5: missing", "incubate run CONFIG"]);
    run.incubate(&["assemble"]).fails(2, &["meta.h5: missing", "incubate meta CONFIG"]);
    let ended = verify(Path::new("/nonexistent.h5")).fails(2, &["/nonexistent.h5: missing", "name another file"]);
    assert_eq!(ended.err.matches("/nonexistent.h5").count(), 1, "{}", ended.err);
}

#[test]
fn errors_advise_to_delete_only_files_that_incubate_wrote() {
    let run = Incubate::new();
    // One file is shorter than a seal, the other longer.
    for text in ["[run]\n".to_string(), "# a config\n".repeat(100)] {
        let path = run.folder.path().join("own.toml");
        std::fs::write(&path, text).unwrap();
        let ended = verify(&path).fails(3, &["own.toml", "not an artefact of incubate"]);
        assert!(!ended.err.contains("delete it") && !ended.out.contains("delete it"), "{}", ended.err);
    }
    let truncated = run.folder.path().join("meta.h5");
    std::fs::write(&truncated, &finished().bytes("meta.h5")[..100]).unwrap();
    verify(&truncated).fails(3, &["truncated", "only 100 bytes", "delete it"]);
}

#[test]
fn a_missing_stage_and_a_wrong_shape_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("a.h5");
    let meta = artefact::read(&finished().file("meta.h5")).unwrap();

    let mut weights = artefact::read(&finished().file("meta.h5")).unwrap().weights;
    weights.retain(|(stage, _), _| *stage != 2);
    artefact::write(&to, &meta.header, &weights, None).unwrap();
    verify(&to).fails(3, &["a.h5", "stage/2/", "is missing"]);

    let mut weights = artefact::read(&finished().file("meta.h5")).unwrap().weights;
    weights.insert((3, "head.bias".into()), tch::Tensor::zeros([5], incubate::model::FP32_ON_HOST));
    artefact::write(&to, &meta.header, &weights, None).unwrap();
    verify(&to).fails(3, &["stage/3/head.bias", "[5]", "[4]"]);
}

#[test]
fn a_full_disk_fails_the_write_with_one_error_and_leaves_no_pieces() {
    let run = Incubate::new();
    run.ok(&["meta"]);
    std::fs::remove_file(run.file("meta.h5")).unwrap();
    // If its signal is ignored, a limit on the file size makes a write fail in the middle, as a full disk does.
    let script =
        format!("trap '' XFSZ; ulimit -f 20; exec \"$0\" meta config.toml --run-dir '{}'", run.run_dir.display());
    let output = std::process::Command::new("bash")
        .args(["-c", &script, env!("CARGO_BIN_EXE_incubate")])
        .current_dir(&run.folder)
        .output()
        .unwrap();
    ended(output).fails(1, &["cannot write", "checkpoints/meta-"]);
    // With two ranks, one waits for the other in an all-reduce. It must not wait for ever.
    let output = std::process::Command::new("mpirun")
        .args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"])
        .args(["bash", "-c", &script, env!("CARGO_BIN_EXE_incubate")])
        .current_dir(&run.folder)
        .output()
        .unwrap();
    ended(output).fails(1, &["cannot write", "checkpoints/meta-"]);
    let remaining: Vec<_> = std::fs::read_dir(run.file("checkpoints")).unwrap().collect();
    assert!(remaining.is_empty(), "{remaining:?}");
}

#[test]
fn a_damaged_config_of_a_run_is_refused_with_a_cure_that_works() {
    let run = finished().fork(&["config.toml", "meta.h5"]);
    let whole = std::fs::read_to_string(run.file("config.toml")).unwrap();
    let (without_checksum, _) = whole.trim_end().rsplit_once('\n').unwrap();
    let (without_finetune, _) = whole.split_once("[finetune]").unwrap();
    let changed = whole.replacen("base_lr = 0.0", "base_lr = 0.1", 1);
    assert_ne!(changed, whole);
    for text in ["", "[run", without_finetune, without_checksum, &changed] {
        std::fs::write(run.file("config.toml"), text).unwrap();
        run.incubate(&["meta"])
            .fails(3, &["config.toml", "truncated or changed", "has not changed", "delete this file"]);
    }
    std::fs::remove_file(run.file("config.toml")).unwrap();
    assert!(run.ok(&["meta"]).err.contains("meta: done already"));
}

#[test]
fn an_unwritable_folder_is_named() {
    let run = Incubate::new();
    // A file already has the path of the folder, so even root cannot make it.
    std::fs::write(&run.run_dir, b"a file").unwrap();
    run.incubate(&["meta"]).fails(2, &["run", "cannot make the run directory", "--run-dir"]);
}
