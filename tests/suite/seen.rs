//! Checks the output for other programs: curves for TensorBoard, artefacts for HDF5's tools, progress bars for a terminal.

use crate::incubate::Incubate;
use std::path::Path;
use std::process::Command;

/// CRC-32C, computed bit by bit (RFC 3720, B.4) and masked for TFRecord.
fn masked_crc(bytes: &[u8]) -> u32 {
    let crc = !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0x82F6_3B78 } else { 0 })
    });
    crc.rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// The payloads of a TFRecord file. All checksums are verified.
fn records(mut bytes: &[u8]) -> Vec<&[u8]> {
    let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!(number(&bytes[8..12]), masked_crc(&bytes[..8]), "record {}: its length", records.len());
        let payload = &bytes[12..12 + length];
        assert_eq!(number(&bytes[12 + length..16 + length]), masked_crc(payload), "record {}", records.len());
        records.push(payload);
        bytes = &bytes[16 + length..];
    }
    records
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let byte = bytes[0];
        *bytes = &bytes[1..];
        value |= u64::from(byte & 0x7f) << shift;
        shift += 7;
        if byte < 0x80 {
            return value;
        }
    }
}

/// The number and the bytes of each field of a message in protocol buffers. A varint is given by the eight bytes of its value.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let length = match key & 7 {
            0 => {
                fields.push((key >> 3, varint(&mut bytes).to_le_bytes().to_vec()));
                continue;
            }
            1 => 8,
            2 => varint(&mut bytes) as usize,
            5 => 4,
            kind => panic!("wire type {kind}"),
        };
        fields.push((key >> 3, bytes[..length].to_vec()));
        bytes = &bytes[length..];
    }
    fields
}

fn field(message: &[u8], number: u64) -> Option<Vec<u8>> {
    fields(message).into_iter().find(|(n, _)| *n == number).map(|(_, bytes)| bytes)
}

#[test]
fn tensorboard_events_have_valid_checksums_and_the_values_of_metrics_jsonl() {
    assert_eq!(masked_crc(b"123456789"), 0xE306_9283u32.rotate_right(15).wrapping_add(0xA282_EAD8), "the check value");
    let run = Incubate::new();
    run.ok(&["meta"]);
    let logs = run.file("logs/meta");
    let events = std::fs::read_dir(&logs).unwrap().map(|entry| entry.unwrap().path());
    let events: Vec<_> = events.filter(|path| path.to_string_lossy().contains("tfevents")).collect();
    let [events] = &events[..] else { panic!("one file of events: {events:?}") };
    let bytes = std::fs::read(events).unwrap();
    let records = records(&bytes);
    assert_eq!(field(records[0], 3).unwrap(), b"brain.Event:2");
    // The fields and their numbers: Event has step (2) and summary (5). A summary has value (1), with tag (1) and simple_value (2).
    let scalars: Vec<(String, u64, f32)> = records[1..]
        .iter()
        .map(|event| {
            let value = field(&field(event, 5).unwrap(), 1).unwrap();
            let step = field(event, 2).map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().unwrap()));
            let number = f32::from_le_bytes(field(&value, 2).unwrap().try_into().unwrap());
            (String::from_utf8(field(&value, 1).unwrap()).unwrap(), step, number)
        })
        .collect();
    let logged: Vec<(String, u64, f32)> = incubate::store::metrics::read(&logs)
        .unwrap()
        .iter()
        .flat_map(|line| {
            let step = line["step"].as_u64().unwrap();
            let values = line.iter().filter(|(name, _)| !["step", "time"].contains(&name.as_str()));
            values.map(move |(name, value)| (name.clone(), step, value.as_f64().unwrap() as f32)).collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(scalars, logged);
    assert_eq!(scalars.iter().filter(|(tag, _, _)| tag == "loss").count(), 24, "3 epochs of 8 steps");
}

/// The names of the root's attributes and of all objects in the file, by the first of h5dump, h5py and the HDF5 library that works.
fn listing(path: &Path) -> String {
    const H5PY: &str = "import h5py, sys\nf = h5py.File(sys.argv[1])\nprint(*f.attrs, sep='\\n')\nf.visit(print)";
    let h5dump = Command::new("h5dump").arg("-A").arg(path).output();
    let h5py = || Command::new("python3").args(["-c", H5PY]).arg(path).output();
    let worked = |output: &std::process::Output| output.status.success();
    if let Some(output) = h5dump.ok().filter(worked).or_else(|| h5py().ok().filter(worked)) {
        return String::from_utf8(output.stdout).unwrap();
    }
    fn walk(group: &hdf5::Group, names: &mut Vec<String>) {
        names.extend(group.member_names().unwrap());
        group.groups().unwrap().iter().for_each(|group| walk(group, names));
    }
    let file = hdf5::File::open(path).unwrap();
    let mut names = file.attr_names().unwrap();
    walk(&file, &mut names);
    names.join("\n")
}

#[test]
fn an_artefact_opens_in_other_readers_of_hdf5_under_the_official_names() {
    let run = Incubate::new();
    run.ok(&["meta"]);
    let listing = listing(&run.file("meta.h5"));
    for name in ["format_version", "software", "phase", "depths", "step", "recipe", "model", "metrics"] {
        assert!(listing.contains(name), "attribute {name} in {listing}");
    }
    for name in ["stage", "cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.bias"]
    {
        assert!(listing.contains(name), "{name} in {listing}");
    }
}

#[test]
fn bars_are_drawn_on_a_terminal_and_lines_in_a_log() {
    let run = Incubate::new().set("meta.epochs=60").set("run.log_steps=8");
    let log = run.ok(&["meta"]);
    assert!(
        log.err.contains("meta: step 8/480") && !log.err.contains('\x1b') && !log.err.contains('\r'),
        "{}",
        log.err
    );
    if Command::new("script").arg("--version").output().is_err() {
        eprintln!("not tested: no `script` (util-linux) to make a terminal");
        return;
    }
    let run = run.fork(&[]);
    let command = run.command(&["meta"]);
    let words: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| format!("'{}'", word.to_str().unwrap().replace('\'', "'\\''")))
        .collect();
    let output = Command::new("script").args(["-qec", &words.join(" "), "/dev/null"]).current_dir(&run.folder).output();
    let output = output.unwrap();
    let seen = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{seen}");
    for word in ["      meta [", "/480 loss ", "images/s  ETA ", "\x1b["] {
        assert!(seen.contains(word), "{word:?} in {seen}");
    }
    assert!(!seen.contains("meta: step 8/480"), "step lines would only scroll: {seen}");
}
