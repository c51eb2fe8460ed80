//! Tests how weights are found in files of different programs: wrappers, prefixes, protocols, and objects beside the weights.

use super::*;
use crate::import::stored::without_prefixes;

fn text(text: &str) -> Vec<u8> {
    [&b"X"[..], &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn dictionary(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let entries: Vec<u8> = entries.iter().flat_map(|(key, value)| [&text(key)[..], value].concat()).collect();
    [b"}(", &entries[..], b"u"].concat()
}

/// The opcodes of a tensor of two rows and three columns, in the storage with the key 0.
fn matrix() -> Vec<u8> {
    let storage = [&text("storage")[..], b"ctorch\nFloatStorage\n", &text("0"), &text("cpu"), b"K\x06tQ"].concat();
    [b"ctorch._utils\n_rebuild_tensor_v2\n((", &storage[..], b"K\x00K\x02K\x03\x86K\x03K\x01\x86\x89}tR"].concat()
}

/// The opcodes of a dictionary of one tensor.
fn weights(name: &str) -> Vec<u8> {
    dictionary(&[(name, &matrix())])
}

fn pickle(value: &[u8]) -> Vec<u8> {
    [b"\x80\x02", value, b"."].concat()
}

/// The names of the tensors that are found in a .pth with this pickle, or the error if the file is refused.
fn names(pickle: &[u8], ema: bool) -> Result<Vec<String>> {
    let folder = tempfile::tempdir().unwrap();
    let path = zip_of(&folder, pickle);
    list(&File::open(path).unwrap(), ema).map(|listing| listing.names())
}

/// A .safetensors of one tensor of 6 bytes, whose header is padded to `header` bytes.
fn safetensors(kind: &str, header: usize) -> Vec<u8> {
    let json = format!(r#"{{"a":{{"dtype":"{kind}","shape":[6],"data_offsets":[0,6]}}}}"#);
    [&(header as u64).to_le_bytes()[..], format!("{json:header$}").as_bytes(), &[0; 6]].concat()
}

#[test]
fn weights_are_found_behind_every_wrapper_that_holds_tensors() {
    let (one, name) = (weights("a"), text("vit_base"));
    for entries in [
        &[("model", &one[..])][..],
        &[("model", &name), ("state_dict", &one)],
        &[("model", &name), ("model_state_dict", &one)],
        &[("a", &matrix()), ("model", &name)],
        // If a key is set twice, Python keeps the later value.
        &[("model", &weights("b")), ("model", &one)],
    ] {
        assert_eq!(names(&pickle(&dictionary(entries)), false).unwrap(), ["a"]);
    }
    let error = format!("{:#}", names(&pickle(&dictionary(&[("model", &name)])), false).unwrap_err());
    assert!(error.contains("no dictionary of tensors") && error.contains("`state_dict`"), "{error}");
}

#[test]
fn moving_averages_are_taken_on_request_alone() {
    for (raw, averages) in [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("state_dict", "ema_state_dict")]
    {
        let both = pickle(&dictionary(&[(raw, &weights("a")), (averages, &weights("b"))]));
        assert_eq!(names(&both, false).unwrap(), ["a"]);
        assert_eq!(names(&both, true).unwrap(), ["b"]);
        let alone = pickle(&dictionary(&[(averages, &weights("b"))]));
        assert!(format!("{:#}", names(&alone, false).unwrap_err()).contains("--ema"));
    }
    let none = pickle(&dictionary(&[("model", &weights("a"))]));
    assert!(format!("{:#}", names(&none, true).unwrap_err()).contains("no moving averages"));
}

#[test]
fn prefixes_are_removed_unless_two_names_would_become_one() {
    let stored = Stored { number: globals::Number::F32, sizes: vec![1], start: 0 };
    let stripped = |names: &[&str]| -> Vec<String> {
        let named = names.iter().map(|name| (name.to_string(), stored.clone())).collect();
        without_prefixes(named).into_keys().collect()
    };
    for prefix in ["_orig_mod.", "module.", "model.", "backbone.", "module._orig_mod.", "model.backbone."] {
        let named = ["blocks.0.a", "head.b"].map(|name| format!("{prefix}{name}"));
        assert_eq!(stripped(&[&named[0], &named[1]]), ["blocks.0.a", "head.b"], "{prefix}");
    }
    assert_eq!(stripped(&["backbone.blocks.0.a", "head.b"]), ["blocks.0.a", "head.b"]);
    assert_eq!(stripped(&["module.a", "a"]), ["a", "module.a"]);
    assert_eq!(stripped(&["encoder.module.a"]), ["encoder.module.a"]);
    let json = r#"{"_orig_mod.a":{"dtype":"U8","shape":[6],"data_offsets":[0,6]}}"#;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    std::fs::write(&path, [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &[0; 6]].concat()).unwrap();
    assert_eq!(listed(&path).unwrap().names(), ["a"]);
}

#[test]
fn objects_beside_the_weights_are_ignored_in_protocols_2_to_5() {
    let scalar = [
        &b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n"[..],
        &text("f8"),
        b"\x89\x88\x87R(K\x03",
        &text("<"),
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbc_codecs\nencode\n",
        &text("12345678"),
        &text("latin1"),
        b"\x86RtR",
    ]
    .concat();
    let path = [b"cpathlib\nPosixPath\n(", &text("/")[..], &text("data"), b"tR"].concat();
    for beside in [
        &b"ccollections\nCounter\n}K\x01K\x02s\x85R"[..],
        b"ccollections\ndefaultdict\nc__builtin__\nlist\n\x85R(K\x01]K\x02]u",
        &scalar,
        &path,
        b"c__builtin__\nset\n]K\x01a\x85R",
        b"ctorch\nfloat32\n",
        b"\x8a\x0a0123456789",
        b"ccollections\ndeque\n)R(K\x01K\x02e",
    ] {
        let checkpoint = dictionary(&[("history", beside), ("model", &weights("a"))]);
        assert_eq!(names(&pickle(&checkpoint), false).unwrap(), ["a"], "{}", String::from_utf8_lossy(beside));
    }
    // This pickle uses opcodes that are newer than protocol 2: frames, short texts, STACK_GLOBAL, MEMOIZE, sets and bytes.
    let newer = |protocol: u8| {
        let storage = b"(\x8c\x07storage\x94\x8c\x05torch\x94\x8c\x0cFloatStorage\x94\x93\x94\x8c\x010\x94\x8c\x03cpu\x94K\x06t\x94Q";
        let rebuild = b"\x8c\x0ctorch._utils\x94\x8c\x12_rebuild_tensor_v2\x94\x93\x94(";
        let tensor = [&rebuild[..], storage, b"K\x00K\x02K\x03\x86\x94K\x03K\x01\x86\x94\x89}\x94t\x94R\x94"].concat();
        let others = b"\x8c\x04tags\x94\x8f\x94(K\x01\x90\x8c\x05bytes\x94C\x02ab\x94";
        let model = [&b"\x8c\x05model\x94}\x94\x8c\x01a\x94"[..], &tensor, b"s"].concat();
        [&[0x80, protocol][..], b"\x95\0\0\0\0\0\0\0\0}\x94(", others, &model, b"u."].concat()
    };
    for protocol in 2..=5 {
        assert_eq!(names(&newer(protocol), false).unwrap(), ["a"], "protocol {protocol}");
    }
}

#[test]
fn an_entry_that_is_not_read_is_named_with_the_python_that_saves_the_weights() {
    let config = b"cyacs.config\nCfgNode\n)R";
    for checkpoint in [
        dictionary(&[("model", &weights("a")), ("args", config), ("epoch", b"K\x01")]),
        dictionary(&[("model", &weights("a")), ("args", &dictionary(&[("deep", config)]))]),
        [b"}", &text("args")[..], config, b"s"].concat(),
    ] {
        let error = format!("{:#}", names(&pickle(&checkpoint), false).unwrap_err());
        assert!(error.contains("its entry \"args\" holds \"yacs.config\".\"CfgNode\""), "{error}");
        assert!(error.contains("torch.save(") && error.contains("nothing of it was executed") && !error.contains('\n'));
    }
}

#[test]
fn a_safetensors_is_known_by_its_brace_and_the_error_of_a_truncated_or_8_bit_one_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    // The first bytes of this header's length are «PK», like the first bytes of a zip.
    std::fs::write(&path, safetensors("U8", 0x4b50)).unwrap();
    assert_eq!(listed(&path).unwrap().names(), ["a"]);
    for (kind, words) in [("F8_E4M3", "8 bits or fewer"), ("F8_E5M2", "8 bits or fewer"), ("U8", "it holds integers")] {
        std::fs::write(&path, safetensors(kind, 80)).unwrap();
        let Listing::Flat(tensors) = listed(&path).unwrap() else { panic!("flat") };
        let error = tensors["a"].read(&File::open(&path).unwrap()).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("convert it"), "{error}");
    }
    let intact = safetensors("U8", 80);
    for (length, words) in
        [(intact.len() - 1, "breaks off after 93 of 94 bytes"), (50, "within its header"), (5, "breaks off")]
    {
        std::fs::write(&path, &intact[..length]).unwrap();
        let error = format!("{:#}", listed(&path).unwrap_err());
        assert!(error.contains(words) && error.contains("copy it again"), "{error}");
    }
    let torch = zipped(CHECKPOINT, &[vec![1; 24]]);
    std::fs::write(&path, &torch[..torch.len() / 2]).unwrap();
    let error = format!("{:#}", listed(&path).unwrap_err());
    assert!(error.contains("the directory at its end is missing") && error.contains("copy it again"), "{error}");
}

#[test]
fn a_new_head_is_initialised_for_other_classes_and_everything_else_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (config, pickle, storages) = tiny(&folder);
    let file = folder.path().join("official.pth");
    std::fs::write(&file, zipped(&pickle, &storages)).unwrap();
    let ours = import(&config, &file, as_role(Role::Final)).unwrap();
    let before = artefact::read(&ours).unwrap().weights;
    let mut other = config.clone();
    other.model = config.model.with_classes(5);
    let new_head = Choice { new_head: true, ..Choice::default() };
    for (number, file) in [&file, &ours].into_iter().enumerate() {
        other.run.dir = folder.path().join(format!("other-{number}"));
        assert!(import(&other, file, as_role(Role::Assembled)).is_err());
        let refused = import(&other, file, Choice { role: Some(Role::Final), ..new_head }).unwrap_err();
        assert!(format!("{refused:#}").contains("has not been trained"), "{refused:#}");
        let path = import(&other, file, new_head).unwrap();
        assert!(path.ends_with("assembled.h5"));
        let after = artefact::read(&path).unwrap();
        assert_eq!(after.header.model.classes(), 5);
        for ((stage, name), tensor) in &after.weights {
            if name.starts_with("head.") {
                assert_eq!(tensor.size()[0], 5);
            } else {
                assert_eq!(tensor, &before[&(*stage, name.clone())], "{name}");
            }
        }
        let drawn = &after.weights[&(1, "head.weight".into())];
        assert!(floats(drawn).iter().any(|&weight| weight != 0.0 && weight.abs() < 0.2));
    }
    let mut shape = config.clone();
    shape.model = other.model.clone();
    shape.run.dir = folder.path().join("shape");
    let error = format!("{:#}", import(&shape, &file, as_role(Role::Assembled)).unwrap_err());
    assert!(error.contains("head.") && error.contains("--new-head"), "{error}");
}

#[test]
fn weights_under_names_that_are_not_timms_are_shown() {
    let folder = tempfile::tempdir().unwrap();
    let (config, ..) = tiny(&folder);
    let path = zip_of(&folder, &pickle(&weights("vit.encoder.layer.0.output.dense.weight")));
    let error = format!("{:#}", import(&config, &path, Choice::default()).unwrap_err());
    assert!(error.contains("the first names found are vit.encoder.layer.0.output.dense.weight"), "{error}");
    assert!(!error.contains("model.depths"), "{error}");
}
