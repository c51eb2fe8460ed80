//! Checks exported folders without the programs that read them. `tools/check_exports.py` checks with these programs.

use crate::incubate::{Incubate, TINY, ended, plain};
use incubate::store::artefact;
use incubate::weights::bytes;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use tch::Tensor;
use zip::{CompressionMethod, ZipArchive};

/// A run with a trained meta model, which stands for any model because it trains in a second. Like ViT-H it has no qkv biases, a
/// patch size that is not a power of two, and an epsilon other than timm's.
fn trained() -> Incubate {
    let text = TINY.replace("image_size = 16", "image_size = 28").replace("patch_size = 4", "patch_size = 7");
    let run = Incubate::with(&text).set("model.qkv_bias=false").set("model.layer_norm_eps=1e-5").set("meta.epochs=1");
    run.ok(&["meta"]);
    run
}

fn export(run: &Incubate, format: &str) {
    let weights = run.file("meta.h5");
    run.ok(&["export", "--format", format, "--weights", weights.to_str().unwrap()]);
}

/// The bytes of each tensor in a .pth, in the file's order. Also checks the layout of the zip.
fn payloads(path: &Path) -> Vec<Vec<u8>> {
    let mut zip = ZipArchive::new(File::open(path).unwrap()).unwrap();
    let mut found = BTreeMap::new();
    for index in 0..zip.len() {
        let mut entry = zip.by_index(index).unwrap();
        assert_eq!(entry.compression(), CompressionMethod::Stored, "a compressed entry cannot be mapped");
        assert!(entry.data_start().unwrap().is_multiple_of(64));
        let name = entry.name().unwrap().strip_prefix("model/").expect("one folder").to_string();
        if let Some(key) = name.strip_prefix("data/") {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            found.insert(key.parse::<usize>().unwrap(), bytes);
        }
    }
    found.into_values().collect()
}

fn safetensors_of(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.tensors().into_iter().map(|(name, t)| (name, (t.shape().to_vec(), t.data().to_vec()))).collect()
}

#[test]
fn every_format_is_written_with_its_config_and_readme() {
    let run = trained();
    export(&run, "all");
    for file in [
        "timm/config.json",
        "timm/model.safetensors",
        "hf/config.json",
        "hf/preprocessor_config.json",
        "hf/model.safetensors",
        "detectron2/model.pth",
        "detectron2/mask_rcnn_1x.py",
        "detectron2/mask_rcnn_3x.py",
        "mmdet/model.pth",
        "mmdet/mask_rcnn_1x.py",
        "mmdet/mask_rcnn_3x.py",
        "mmseg/model.pth",
        "mmseg/upernet_80k.py",
        "safetensors/model.safetensors",
        "pth/model.pth",
    ] {
        let path = run.file("export/meta").join(file);
        assert!(path.exists() && path.with_file_name("README.md").exists(), "{file}");
    }
}

#[test]
fn weights_are_exported_bit_for_bit_and_missing_qkv_biases_as_zeros() {
    let run = trained();
    export(&run, "pth");
    export(&run, "hf");
    let artefact = artefact::read(&run.file("meta.h5")).unwrap();
    let header = &artefact.header;
    let theirs = payloads(&run.file("export/meta/pth/model.pth"));
    let mut theirs = theirs.iter();
    let hf = safetensors_of(&run.file("export/meta/hf/model.safetensors"));
    for parameter in header.parameters() {
        let ours = bytes(&artefact.weights[&(parameter.stage, parameter.name.clone())]);
        assert_eq!(theirs.next().unwrap(), ours, "{}", parameter.name);
        if parameter.name.ends_with("qkv.weight") {
            assert!(theirs.next().unwrap().iter().all(|&byte| byte == 0), "the bias after {}", parameter.name);
            let block = header.model.whole_name(&parameter, &header.depths).split('.').nth(1).unwrap().to_string();
            let third = |name: &str| {
                let (shape, bytes) = &hf[&format!("vit.encoder.layer.{block}.attention.attention.{name}.weight")];
                assert_eq!(shape, &[16, 16]);
                bytes.clone()
            };
            assert_eq!(["query", "key", "value"].map(third).concat(), ours);
        }
    }
    assert!(theirs.next().is_none());
    assert_eq!(hf.len(), header.parameters().len() + 4 * (1 + 4), "three weights for one, and three biases, per block");
}

#[test]
fn detectors_take_patches_of_16_pixels() {
    let run = trained();
    export(&run, "detectron2");
    let config = String::from_utf8(run.bytes("export/meta/detectron2/mask_rcnn_3x.py")).unwrap();
    for line in
        ["patch_size = 16", "pretrain_img_size = 28", "max_iter = 270000", "layer_norm_eps = 0.00001", "in_chans = 1"]
    {
        assert!(config.contains(line), "{line} in {config}");
    }
    let sizes: Vec<usize> = payloads(&run.file("export/meta/detectron2/model.pth")).iter().map(Vec::len).collect();
    assert_eq!(sizes[..2], [4 * 16 * (1 + 1), 4 * 16 * 16 * 16], "positions on a grid of 1, kernels of 16");
}

#[test]
fn the_preprocessor_config_names_the_processor_that_crops_as_we_do() {
    let run = trained();
    export(&run, "hf");
    let config: serde_json::Value =
        serde_json::from_slice(&run.bytes("export/meta/hf/preprocessor_config.json")).unwrap();
    assert_eq!(
        (&config["image_processor_type"], &config["crop_pct"]),
        (&"ConvNextImageProcessorFast".into(), &1.0.into())
    );
}

#[test]
fn weights_of_another_model_or_too_few_blocks_for_a_format_are_refused() {
    let run = trained();
    let weights = run.file("meta.h5");
    let weights = ["--weights", weights.to_str().unwrap()];
    let ended = run.incubate(&["export", weights[0], weights[1], "--set", "model.heads=4"]);
    assert!(ended.code == Some(3) && ended.err.contains("meta.h5") && ended.err.contains("[model]"), "{}", ended.err);
    let shallow = Incubate::new().set("model.depths=[2, 1]").set("meta.epochs=1");
    shallow.ok(&["meta"]);
    let weights = shallow.file("meta.h5");
    let refused = shallow.incubate(&["export", "--format", "mmseg", "--weights", weights.to_str().unwrap()]);
    refused.fails(2, &["meta.h5", "2 blocks", "UPerNet"]);
    export(&shallow, "all");
    assert!(shallow.file("export/meta/pth").exists() && !shallow.file("export/meta/mmseg").exists());
}

#[test]
fn outputs_hold_every_small_image_and_are_decoded_at_full_size() {
    let run = trained();
    let outputs = |run: &Incubate, sets: &[&str]| {
        let (weights, into) = (run.file("meta.h5"), run.folder.path().join("outputs"));
        let mut arguments =
            vec!["evaluate", "--weights", weights.to_str().unwrap(), "--outputs", into.to_str().unwrap()];
        arguments.extend(sets);
        run.ok(&arguments);
        safetensors_of(&into)
    };
    let nowhere = run.incubate(&["evaluate", "--weights", "meta.h5", "--outputs", "nowhere/outputs"]);
    nowhere.fails(2, &["nowhere: no such folder"]);
    let all = outputs(&run, &[]);
    assert_eq!((&all["inputs"].0, &all["logits"].0), (&vec![128, 1, 28, 28], &vec![128, 4]));
    // The photograph is so large that training would decode it at a reduced size.
    let images = run.folder.path().join("images");
    for (split, number) in [("train", 0), ("val", 1)] {
        let class = images.join(split).join("a");
        std::fs::create_dir_all(&class).unwrap();
        std::fs::write(class.join("a.jpg"), crate::drawn::jpeg(0, number, 180, 200)).unwrap();
    }
    let colour =
        Incubate::new().set("model.channels=3").set("data.mean=[0.5, 0.5, 0.5]").set("data.std=[0.3, 0.3, 0.3]");
    let colour = colour.set("meta.epochs=1");
    colour.ok(&["meta"]);
    let path = format!("data.path={:?}", images.to_str().unwrap());
    let sets = |reduced: &'static str| {
        [
            "--set",
            "data.format=folder",
            "--set",
            &path,
            "--set",
            "data.train_images=0",
            "--set",
            "data.test_images=0",
            "--set",
            reduced,
        ]
        .map(String::from)
    };
    let pixels = |reduced: &'static str| {
        let sets = sets(reduced);
        outputs(&colour, &sets.iter().map(String::as_str).collect::<Vec<_>>())["inputs"].clone()
    };
    assert_eq!(pixels("data.reduced_decode=true"), pixels("data.reduced_decode=false"));
}

#[test]
fn a_format_that_does_not_exist_or_a_single_module_is_refused() {
    let run = trained();
    run.ok(&["module", "--index", "1"]);
    let module = run.file("module-1.h5");
    run.incubate(&["export", "--weights", module.to_str().unwrap()]).fails(2, &["module-1.h5", "single module"]);
    let ended = run.incubate(&["export", "--format", "onnx"]);
    assert!(ended.code == Some(2) && ended.err.contains("onnx") && ended.err.contains("detectron2"), "{}", ended.err);
}

#[test]
fn an_exported_model_is_imported_bit_for_bit_and_the_run_goes_on_from_it() {
    let run = trained();
    export(&run, "pth");
    export(&run, "safetensors");
    let ours = artefact::read(&run.file("meta.h5")).unwrap();
    let source: serde_json::Value = serde_json::from_slice(&run.bytes("export/meta/pth/source.json")).unwrap();
    assert!(source["file"].as_str().unwrap().ends_with("meta.h5") && source["content_hash"] == ours.hash, "{source}");
    let permissions = |file: &str| std::fs::metadata(run.file(file)).unwrap().permissions();
    assert_eq!(
        permissions("export/meta/safetensors/model.safetensors"),
        permissions("export/meta/safetensors/README.md")
    );
    for file in ["pth/model.pth", "safetensors/model.safetensors"] {
        let other = run.fork(&[]);
        let import = |config: &str| {
            let mut command = plain(&["import"]);
            command
                .arg(run.file("export/meta").join(file))
                .arg(config)
                .args(["--as", "meta", "--run-dir"])
                .arg(&other.run_dir);
            command.args([
                "--set",
                "model.qkv_bias=false",
                "--set",
                "model.layer_norm_eps=1e-5",
                "--set",
                "meta.epochs=1",
            ]);
            ended(command.current_dir(&other.folder).output().unwrap())
        };
        import("config.toml").ok();
        let theirs = artefact::read(&other.file("meta.h5")).unwrap();
        assert!(ours.weights.iter().all(|(name, tensor)| bytes(tensor) == bytes(&theirs.weights[name])), "{file}");
        assert_eq!(ours.header.recipe, theirs.header.recipe);
        import("config.toml").fails(2, &["meta.h5", "there already"]);
        other.ok(&["module", "--index", "0"]);
    }
}

#[test]
fn a_file_that_does_not_fit_the_config_or_is_none_is_refused() {
    let run = trained();
    export(&run, "pth");
    let other = run.fork(&[]);
    let import = |file: &Path, sets: &[&str]| {
        let mut command = plain(&["import"]);
        command
            .arg(file)
            .args(["config.toml", "--run-dir"])
            .arg(&other.run_dir)
            .args(["--set", "model.qkv_bias=false"]);
        command.args(sets.iter().flat_map(|set| ["--set", set]));
        ended(command.current_dir(&other.folder).output().unwrap())
    };
    let exported = run.file("export/meta/pth/model.pth");
    import(&exported, &["model.width=32"]).fails(2, &["model.pth", "cls_token", "[1, 1, 16]", "[1, 1, 32]"]);
    import(&exported, &["model.depths=[3, 2, 2, 2]", "model.meta_depth=2"]).fails(2, &["model.depths"]);
    import(&exported, &["model.depths=[1, 1, 1, 1]"]).fails(2, &["equally deep", "--as"]);
    export(&run, "safetensors");
    let bad = other.folder.path().join("bad.safetensors");
    let mut tensors = Tensor::read_safetensors(run.file("export/meta/safetensors/model.safetensors")).unwrap();
    let (_, bias) = tensors.iter_mut().find(|(name, _)| name == "blocks.1.norm1.bias").unwrap();
    let _ = bias.fill_(f64::NAN);
    let named: Vec<(&str, &Tensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    Tensor::write_safetensors(&named, &bad).unwrap();
    import(&bad, &[]).fails(2, &["bad.safetensors", "norm1.bias", "not finite"]);
    let text = run.file("config.toml");
    import(&text, &[]).fails(2, &["config.toml", "neither a .pth"]);
    import(Path::new("nowhere.pth"), &[]).fails(2, &["nowhere.pth", "No such file"]);
}

#[test]
fn a_model_goes_on_at_a_higher_resolution() {
    let run = Incubate::new();
    run.ok(&["meta"]);
    export(&run, "safetensors");
    let larger = Incubate::new().set("model.image_size=24").set("model.depths=[1, 1, 1, 1]").set("finetune.epochs=1");
    let file = run.file("export/meta/safetensors/model.safetensors");
    let mut command = plain(&["import"]);
    command.arg(&file).args(["config.toml", "--as", "assembled", "--run-dir"]).arg(&larger.run_dir);
    command.args(
        ["model.image_size=24", "model.depths=[1, 1, 1, 1]", "finetune.epochs=1"].iter().flat_map(|s| ["--set", s]),
    );
    ended(command.current_dir(&larger.folder).output().unwrap()).ok();
    let assembled = artefact::read(&larger.file("assembled.h5")).unwrap();
    assert_eq!(assembled.weights[&(0, "pos_embed".into())].size(), [1, 37, 16]);
    // The run has no phases before the imported model.
    let json = |arguments: &[&str]| -> serde_json::Value { serde_json::from_str(&larger.ok(arguments).out).unwrap() };
    let states = || -> Vec<String> {
        let status = ended(plain(&["status", "--json"]).arg(&larger.run_dir).output().unwrap()).ok();
        let lines: serde_json::Value = serde_json::from_str(&status.out).unwrap();
        let state = |line: &serde_json::Value| format!("{} {}", line["phase"], line["state"]).replace('"', "");
        lines.as_array().unwrap().iter().map(state).collect()
    };
    assert_eq!(states(), ["assemble done", "finetune waiting"]);
    let phases = json(&["plan", "--rate", "1", "--json"])["phases"].clone();
    let finetune =
        phases.as_array().unwrap().iter().find(|phase| phase["phase"] == "finetune").unwrap()["flops"].clone();
    assert_eq!(json(&["submit", "--dry-run", "--json"])[0]["flops"], finetune);
    larger.ok(&["run"]);
    assert_eq!(states(), ["assemble done", "finetune done"]);
    let rows: serde_json::Value = serde_json::from_slice(&larger.bytes("summary.json")).unwrap();
    let models: Vec<&str> = rows.as_array().unwrap().iter().map(|row| row["model"].as_str().unwrap()).collect();
    assert_eq!(models, ["assembled", "fine-tuned"]);
    assert_eq!(json(&["submit", "--dry-run", "--json"]), serde_json::json!([]));
    // Importing the artefact itself, without an export, gives the same file.
    let imported = larger.bytes("assembled.h5");
    let other = Incubate::new().set("model.image_size=24").set("model.depths=[1, 1, 1, 1]").set("finetune.epochs=1");
    command = plain(&["import"]);
    command.arg(run.file("meta.h5")).args(["config.toml", "--as", "assembled", "--run-dir"]).arg(&other.run_dir);
    command.args(
        ["model.image_size=24", "model.depths=[1, 1, 1, 1]", "finetune.epochs=1"].iter().flat_map(|s| ["--set", s]),
    );
    ended(command.current_dir(&other.folder).output().unwrap()).ok();
    assert_eq!(other.bytes("assembled.h5"), imported);
}
