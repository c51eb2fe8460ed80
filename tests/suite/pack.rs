//! Packs drawn images with `incubate pack`, and trains on packs, folders and tars.

use crate::drawn;
use crate::incubate::{Ended, Incubate, ended, flip, plain};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A temporary folder with drawn images in `images`, in which packs can be written.
struct Images {
    folder: TempDir,
}

impl Images {
    fn new(classes: u64, train: u64, val: u64) -> Images {
        let images = Images { folder: tempfile::tempdir().unwrap() };
        drawn::folder(&images.path("images"), classes, train, val);
        images
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn pack(&self, from: &str, into: &str, options: &[&str]) -> Ended {
        ended(plain(&["pack"]).args([self.path(from), self.path(into)]).args(options).output().unwrap())
    }
}

fn verify(path: &Path) -> Ended {
    ended(plain(&["verify", path.to_str().unwrap()]).output().unwrap())
}

fn json(ended: &Ended) -> Value {
    serde_json::from_str(&ended.out).unwrap_or_else(|e| panic!("{e}: {}", ended.out))
}

/// Labels, names and bytes of a packed shard, read as h5py would.
fn shard(path: &Path) -> (Vec<u32>, Vec<String>, Vec<Vec<u8>>) {
    let file = hdf5::File::open(path).unwrap();
    let bytes: Vec<u8> = file.dataset("bytes").unwrap().read_raw().unwrap();
    let offset: Vec<u64> = file.dataset("offset").unwrap().read_raw().unwrap();
    let names: Vec<hdf5::types::VarLenUnicode> = file.dataset("name").unwrap().read_raw().unwrap();
    let samples = offset.windows(2).map(|o| bytes[o[0] as usize..o[1] as usize].to_vec()).collect();
    (file.dataset("label").unwrap().read_raw().unwrap(), names.iter().map(|n| n.to_string()).collect(), samples)
}

#[test]
fn a_folder_is_packed_with_its_names_and_labels_and_small_jpegs_as_they_are() {
    let images = Images::new(3, 10, 2);
    let report = json(&images.pack("images", "pack", &["--json"]).ok());
    assert_eq!((&report["train_images"], &report["val_images"], &report["shards"]), (&30.into(), &6.into(), &2.into()));
    let (labels, names, samples) = shard(&images.path("pack/train-00000.h5"));
    assert_eq!((labels[0], labels[29], names[12].as_str()), (0, 2, "train/class-01/0002.jpg"));
    assert_eq!(samples[12], std::fs::read(images.path("images/train/class-01/0002.jpg")).unwrap());
    // A PNG is packed as a JPEG.
    assert!(names[9].ends_with(".png") && samples[9].starts_with(&[0xFF, 0xD8]));
    assert!(verify(&images.path("pack")).ok().out.contains("30 train samples, jpeg"));
}

#[test]
fn images_larger_than_asked_for_are_shrunk_and_raw_pixels_fill_height_times_width() {
    let images = Images::new(2, 3, 1);
    images.pack("images", "pack", &["--size", "20", "--raw"]).ok();
    let path = images.path("pack/train-00000.h5");
    let (_, _, samples) = shard(&path);
    // The images are drawn 40 pixels high and 64 wide, and 48 high and 60 wide.
    assert_eq!((samples[0].len(), samples[1].len()), (3 * 20 * 32, 3 * 20 * 25));
    // Packing a pack at the same size keeps the pixels.
    images.pack("pack", "again", &["--size", "20", "--raw"]).ok();
    assert_eq!(shard(&images.path("again/train-00000.h5")).2, samples);
}

#[test]
fn finished_shards_are_kept_and_shards_of_other_settings_are_refused() {
    let images = Images::new(2, 6, 2);
    images.pack("images", "pack", &[]).ok();
    let path = images.path("pack/train-00000.h5");
    let first = std::fs::read(&path).unwrap();
    std::fs::remove_file(images.path("pack/val-00000.h5")).unwrap();
    verify(&images.path("pack")).fails(2, &["no val-*.h5"]);
    let report = json(&images.pack("images", "pack", &["--json"]).ok());
    assert_eq!((&report["kept_shards"], &report["val_images"]), (&1.into(), &4.into()));
    images.pack("images", "pack", &["--quality", "50"]).fails(2, &["train-00000.h5", "in another way"]);
    assert!(std::fs::read(&path).unwrap() == first);
    // The same images give the same bytes.
    images.pack("images", "again", &[]).ok();
    assert!(std::fs::read(images.path("again/train-00000.h5")).unwrap() == first);
}

#[test]
fn a_damaged_sample_is_named_by_verify_and_a_damaged_table_refuses_the_shard() {
    let images = Images::new(2, 6, 2);
    images.pack("images", "pack", &[]).ok();
    let path = images.path("pack/train-00000.h5");
    let intact = std::fs::read(&path).unwrap();
    let sample = std::fs::read(images.path("images/train/class-01/0003.jpg")).unwrap();
    let start = intact.windows(sample.len()).position(|window| window == sample).unwrap();
    flip(&path, start + 100);
    let words = ["train-00000.h5", "1 of 12 samples", "train/class-01/0003.jpg"];
    verify(&path).fails(3, &words);
    verify(&images.path("pack")).fails(3, &words);
    std::fs::write(&path, &intact).unwrap();
    flip(&path, intact.len() - 40);
    verify(&path).fails(3, &["train-00000.h5", "its bytes have changed"]);
    images.pack("images", "pack", &[]).fails(3, &["train-00000.h5", "delete it and start `incubate pack` again"]);
}

#[test]
fn an_image_that_cannot_be_read_stops_packing_by_name_or_is_left_out_if_the_config_says_so() {
    let images = Images::new(2, 6, 2);
    std::fs::write(images.path("images/train/class-00/0001.jpg"), b"").unwrap();
    images.pack("images", "pack", &[]).fails(2, &["train/class-00/0001.jpg", "empty"]);
    let report = json(&images.pack("images", "pack", &["--set", "data.bad_images=1", "--json"]).ok());
    assert_eq!((&report["train_images"], &report["skipped_images"]), (&11.into(), &1.into()));
    ended(plain(&["pack", images.folder.path().to_str().unwrap(), "x"]).output().unwrap()).fails(2, &["data.format"]);
}

#[test]
fn small_images_can_be_packed_too() {
    let run = Incubate::new();
    let pack = run.folder.path().join("pack");
    run.ok(&["pack", pack.to_str().unwrap(), "--raw"]);
    let (labels, names, samples) = shard(&pack.join("train-00000.h5"));
    assert_eq!((labels.len(), samples[0].len(), names[7].as_str()), (512, 3 * 16 * 16, "image 7"));
}

#[test]
fn a_config_may_name_the_images_to_pack() {
    let images = Images::new(2, 3, 1);
    let config = format!(
        "[data]\nformat = \"packed\"\npath = {:?}\npack_from = {:?}\ntrain_images = 6\n[train]\nglobal_batch = 2\n",
        images.path("pack"),
        images.path("images")
    );
    let run = Incubate::with(&config);
    // In a run directory, `status` shows the progress of packing.
    run.ok(&["submit", "--dry-run"]);
    let status = || {
        let ended = ended(plain(&["status", "--json", run.run_dir.to_str().unwrap()]).output().unwrap()).ok();
        serde_json::from_str::<Value>(&ended.out).unwrap()[0].clone()
    };
    let (image, away) = (images.path("images/train/class-00/0001.jpg"), images.path("away.jpg"));
    std::fs::copy(&image, &away).unwrap();
    std::fs::write(&image, b"").unwrap();
    run.incubate(&["pack"]).fails(2, &["0001.jpg", "empty"]);
    let line = status();
    assert!(line["state"] == "failed" && line["why"].as_str().unwrap().contains("0001.jpg"), "{line}");
    std::fs::rename(&away, &image).unwrap();
    run.ok(&["pack"]);
    assert_eq!(status()["state"], "done");
    verify(&images.path("pack")).ok();
    let dry = run.set("data.path=\"nowhere\"").incubate(&["submit", "--dry-run", "--json"]);
    assert_eq!(json(&dry)[0]["name"], "pack");
}

/// The paper's config with a small model, on 2,000 drawn images in 20 classes.
fn small_imagenet(format: &str, path: &Path) -> Incubate {
    let config = include_str!("../../configs/imagenet-vit-b.toml");
    let mut run = Incubate::with(config).set(&format!("data.format={format:?}")).set(&format!("data.path={path:?}"));
    for set in [
        "data.train_images=1600",
        "data.test_images=400",
        "model.classes=20",
        "model.image_size=32",
        "model.patch_size=8",
        "model.width=16",
        "model.heads=2",
        "model.depths=[1, 1, 1, 1]",
        "train.global_batch=128",
        "train.warmup_epochs=0",
        "train.epochs=1",
        "meta.epochs=1",
        "module.epochs=1",
        "finetune.epochs=1",
        "run.threads=1",
    ] {
        run = run.set(set);
    }
    run
}

#[track_caller]
fn run_finishes_all_phases(run: &Incubate) {
    run.ok(&["run"]);
    let status = ended(plain(&["status", run.run_dir.to_str().unwrap(), "--json"]).output().unwrap()).ok();
    let lines = json(&status);
    let lines = lines.as_array().unwrap();
    assert!(lines.len() >= 6 && lines.iter().all(|line| line["state"] == "done"), "{}", status.out);
}

#[test]
fn the_imagenet_config_runs_on_a_folder() {
    let images = Images::new(20, 80, 20);
    run_finishes_all_phases(&small_imagenet("folder", &images.path("images")));
}

#[test]
fn the_imagenet_config_runs_on_packed_images() {
    let images = Images::new(20, 80, 20);
    images.pack("images", "pack", &[]).ok();
    run_finishes_all_phases(&small_imagenet("packed", &images.path("pack")));
}

#[test]
fn the_imagenet_config_runs_on_tar_shards() {
    let folder = tempfile::tempdir().unwrap();
    drawn::tars(folder.path(), 20, 80, 20);
    run_finishes_all_phases(&small_imagenet("tar", folder.path()));
}
