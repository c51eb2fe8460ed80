//! Reads folders of images in the layout of torchvision's ImageFolder. JPEG and PNG files are at any depth below `train/CLASS/`
//! and `val/CLASS/` (or `validation` or `test` in place of `val`). Classes are numbered in the order of their names, and images
//! in the order of their paths. Unlike torchvision, this program ignores hidden folders and files, such as `.ipynb_checkpoints`
//! and `._photo.jpg`.

use super::index::{
    Index, IndexFile, IndexFolder, LARGEST, Stamp, fingerprint, fingerprint_of, sample_length, stamp_of,
};
use super::samples::{Samples, Stored};
use super::splits::{TRAINING, evaluation_split};
use crate::error::Failure;
use crate::{require, stop, usage};
use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use std::fs::{DirEntry, File, Metadata};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The extensions of image files. Upper and lower case count as equal.
const EXTENSIONS: [&str; 3] = ["jpg", "jpeg", "png"];

/// One split: the image files below a folder.
#[derive(Debug)]
pub struct Folder {
    /// The folder of the split.
    root: PathBuf,
    /// The names of the classes, in the order of the labels.
    classes: Vec<String>,
    /// The images. The groups of the index are the class folders and the folders within them.
    index: Index,
}

/// Opens the training and the evaluation split. If `indexes` is given, the indexes of the splits are kept in this folder.
///
/// # Errors
/// A usage error if a split is missing, or if there are several evaluation splits. Also if a class has no image, a folder cannot
/// be listed, or the splits have different classes.
pub fn open(folder: &Path, indexes: Option<&IndexFolder>) -> Result<(Folder, Folder)> {
    let name = evaluation_split(folder, |name| Ok(folder.join(name).is_dir()))?;
    let split = |name: &str| Folder::open(&folder.join(name), indexes.map(|indexes| indexes.file(name)).as_ref());
    let (training, evaluation) = (split(TRAINING)?, split(name)?);
    for (own, within, other) in [(TRAINING, &training, &evaluation), (name, &evaluation, &training)] {
        if let Some(class) = within.classes.iter().find(|class| other.classes.binary_search(class).is_err()) {
            return Err(usage!(
                "{}: class {class:?} is in {own} alone ({} classes in {TRAINING}, {} in {name}); both splits need the same \
                 class folders",
                folder.display(),
                training.classes.len(),
                evaluation.classes.len()
            ));
        }
    }
    Ok((training, evaluation))
}

impl Folder {
    /// Lists every image of one split. Reads the list from the file `kept` instead, if the folders have not changed since the file
    /// was written.
    pub fn open(root: &Path, kept: Option<&IndexFile>) -> Result<Folder> {
        let index = Index::cached(kept, |groups| fingerprint(root, groups), || build(root))?;
        let class_folders = index.groups.iter().filter(|group| !group.contains(&b'/'));
        let classes = class_folders.map(|group| String::from_utf8_lossy(group).into_owned()).collect();
        Ok(Folder { root: root.into(), classes, index })
    }

    /// Lists every image below a folder. All images belong to one class without a name.
    ///
    /// # Errors
    /// A usage error if the folder cannot be listed or has fewer than two images.
    pub fn flat(root: &Path) -> Result<Folder> {
        let class = class(root, ".".into(), &[])?;
        require!(class.files.len() >= 2, "{}: fewer than two .jpg, .jpeg or .png files", root.display());
        Ok(Folder { root: root.into(), classes: vec![String::new()], index: number(&[class])? })
    }

    /// The path of an image relative to the folder of the split.
    pub(super) fn path(&self, index: usize) -> PathBuf {
        self.index.path(index)
    }
}

/// The folders and files of one class.
#[derive(Default)]
struct Class {
    /// The class folder and the folders within it, relative to the folder of the split.
    folders: Vec<String>,
    /// The [`Stamp`] that each folder had before it was listed.
    stamps: Vec<Stamp>,
    /// The index in `folders` of each file's folder, and the file's name.
    files: Vec<(usize, String)>,
    /// How many hidden folders and files were ignored.
    hidden: usize,
}

/// Lists the images of a split. Returns their index, and the fingerprint that the folders had before they were listed.
fn build(root: &Path) -> Result<(Index, blake3::Hash)> {
    let metadata = std::fs::metadata(root).ok();
    let own = metadata.as_ref().map(stamp_of).unwrap_or_default();
    let above: Vec<_> = metadata.iter().map(identity).collect();
    let (entries, hidden) = entries(root).map_err(|e| {
        usage!(
            "{}: {e:#}; data.path must hold train/CLASS/*.jpg (or .jpeg, .png) and val/CLASS/*.jpg, or validation or test in \
             place of val",
            root.display()
        )
    })?;
    let names: Vec<String> = entries.into_iter().filter(|(_, e)| e.path().is_dir()).map(|(name, _)| name).collect();
    require!(
        !names.is_empty(),
        "{}: the folder has no class folders; it must hold CLASS/*.jpg (or .jpeg, .png)",
        root.display()
    );
    let classes = names.into_par_iter().map(|name| class(root, name, &above)).collect::<Result<Vec<_>>>()?;
    let hidden = hidden + classes.iter().map(|class| class.hidden).sum::<usize>();
    if hidden > 0 {
        log::warn!("{}: {hidden} hidden folders or files (names that begin with a dot) are ignored", root.display());
    }
    let index = number(&classes)?;
    let stamps = classes.iter().flat_map(|class| class.stamps.iter().copied());
    let fingerprint = fingerprint_of(root, own, index.groups.iter().zip(stamps))?;
    Ok((index, fingerprint))
}

/// Makes the index of all files, class after class. The labels are the positions of the classes in `classes`.
fn number(classes: &[Class]) -> Result<Index> {
    let mut index = Index::default();
    for (label, class) in classes.iter().enumerate() {
        let first = index.groups.len();
        class.folders.iter().try_for_each(|folder| index.groups.push(folder.as_bytes()))?;
        for (folder, file) in &class.files {
            index.names.push(file.as_bytes())?;
            index.group.push((first + folder) as u32);
            index.label.push(label as u32);
        }
    }
    Ok(index)
}

/// Lists the images in the class folder `name` of `root`. `above` holds the identities of the folders above the class folder.
fn class(root: &Path, name: String, above: &[Identity]) -> Result<Class> {
    let path = root.join(&name);
    let mut class = Class::default();
    class.walk(root, name, &mut above.to_vec()).map_err(|error| Failure::at(&path, error))?;
    require!(
        !class.files.is_empty(),
        "{}: the class has no .jpg, .jpeg or .png file; add an image, or remove the class folder from both splits",
        path.display()
    );
    Ok(class)
}

impl Class {
    /// Lists a folder and the folders within it, depth first, in the order of their names. `above` holds the identities of the
    /// folders above `folder`. Fails if a link leads to one of these folders.
    fn walk(&mut self, root: &Path, folder: String, above: &mut Vec<Identity>) -> Result<()> {
        stop::check("listing images")?;
        let path = root.join(&folder);
        let metadata = std::fs::metadata(&path).with_context(|| path.display().to_string())?;
        let own = identity(&metadata);
        ensure!(!above.contains(&own), "{folder} is a link to a folder above it; remove the link");
        above.push(own);
        let number = self.folders.len();
        self.folders.push(folder.clone());
        self.stamps.push(stamp_of(&metadata));
        let (entries, hidden) = entries(&path).with_context(|| folder.clone())?;
        self.hidden += hidden;
        for (name, entry) in entries {
            let kind = entry.file_type()?;
            // A link with the name of an image counts as a file. Whether it leads to a file is checked when the image is read.
            if kind.is_dir() || !is_image(&name) && kind.is_symlink() && entry.path().is_dir() {
                self.walk(root, format!("{folder}/{name}"), above)?;
            } else if is_image(&name) {
                let regular = kind.is_file() || kind.is_symlink();
                ensure!(regular, "{folder}/{name} is not a regular file; remove it or rename it");
                self.files.push((number, name));
            }
        }
        above.pop();
        Ok(())
    }
}

/// The numbers of a folder's device and inode. A link to the folder has the same numbers.
type Identity = (u64, u64);

fn identity(folder: &Metadata) -> Identity {
    (folder.dev(), folder.ino())
}

fn is_image(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|own| EXTENSIONS.iter().any(|known| own.eq_ignore_ascii_case(known)))
}

/// Lists a folder. Returns its entries in the order of their names, and the number of hidden entries. The list leaves out hidden
/// entries. It also leaves out files that are no images, if their names are not UTF-8.
///
/// # Errors
/// The folder cannot be read, or the name of an image or a folder in it is not UTF-8.
fn entries(folder: &Path) -> Result<(Vec<(String, DirEntry)>, usize)> {
    let (mut entries, mut hidden) = (Vec::new(), 0);
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_name().into_string() {
            Ok(name) if name.starts_with('.') => hidden += 1,
            Ok(name) => entries.push((name, entry)),
            Err(name) if name.as_encoded_bytes().starts_with(b".") => hidden += 1,
            Err(name) => {
                let lossy = name.to_string_lossy();
                ensure!(!is_image(&lossy) && !entry.path().is_dir(), "the name {lossy} is not UTF-8; rename it");
            }
        }
    }
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    Ok((entries, hidden))
}

impl Samples for Folder {
    fn len(&self) -> usize {
        self.index.len()
    }

    fn label(&self, index: usize) -> u32 {
        self.index.label[index]
    }

    fn name(&self, index: usize) -> String {
        self.root.join(self.index.path(index)).display().to_string()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<Stored> {
        read_file(&self.root.join(self.index.path(index)), bytes)?;
        Ok(Stored::Encoded)
    }
}

/// Replaces the content of `bytes` by the content of a regular file.
///
/// # Errors
/// The file cannot be read, is not regular, or is larger than [`LARGEST`].
pub(super) fn read_file(path: &Path, bytes: &mut Vec<u8>) -> Result<()> {
    bytes.clear();
    // The path may lead to a pipe. Without `O_NONBLOCK`, opening the pipe would wait for a writer.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    ensure!(metadata.is_file(), "it is not a regular file");
    let length = sample_length(metadata.len())?;
    bytes.reserve(length as usize + 1);
    // The file may grow while it is read, so the length is checked again.
    file.take(LARGEST + 1).read_to_end(bytes)?;
    sample_length(bytes.len() as u64)?;
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Makes a folder with these files. Each file holds its own path as text.
    pub fn folder(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let path = folder.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, file).unwrap();
        }
        folder
    }

    #[test]
    fn classes_and_files_are_numbered_in_the_order_of_their_names() {
        let folder =
            folder(&["train/b/2.PNG", "train/b/10.jpeg", "train/B/1.jpg", "train/b/x/0.jpg", "train/b/note.txt"]);
        let train = Folder::open(&folder.path().join("train"), None).unwrap();
        assert_eq!(train.classes, ["B", "b"]);
        let mut bytes = Vec::new();
        let mut read = |i| {
            assert_eq!(train.read(i, &mut bytes).unwrap(), Stored::Encoded);
            String::from_utf8(bytes.clone()).unwrap()
        };
        assert_eq!(
            (0..4).map(&mut read).collect::<Vec<_>>(),
            ["train/B/1.jpg", "train/b/10.jpeg", "train/b/2.PNG", "train/b/x/0.jpg"]
        );
        assert_eq!(train.index.label, [0, 1, 1, 1]);
    }

    #[test]
    fn a_file_larger_than_any_image_is_refused_before_memory_is_taken() {
        let folder = folder(&["train/a/1.jpg"]);
        let huge = File::options().write(true).open(folder.path().join("train/a/1.jpg")).unwrap();
        huge.set_len(1 << 40).unwrap();
        let train = Folder::open(&folder.path().join("train"), None).unwrap();
        let error = train.read(0, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("more than any image"), "{error}");
    }

    #[test]
    fn a_pipe_a_device_and_a_link_to_a_folder_above_are_refused_and_a_folder_named_like_an_image_is_entered() {
        let folder = folder(&["train/a/1.jpg/2.png", "train/a/x/3.jpg"]);
        let path = |name: &str| folder.path().join("train/a").join(name);
        let pipe = std::ffi::CString::new(path("pipe").into_os_string().into_encoded_bytes()).unwrap();
        // SAFETY: the pointer is to a text that ends with a NUL and outlives the call.
        assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
        for (link, target) in [("4.jpg", "pipe"), ("5.jpg", "/dev/zero")] {
            std::os::unix::fs::symlink(target, path(link)).unwrap();
        }
        let open = || Folder::open(&folder.path().join("train"), None);
        let train = open().unwrap();
        assert_eq!(
            (0..4).map(|index| train.index.names.path(index)).collect::<Vec<_>>(),
            [Path::new("2.png"), Path::new("4.jpg"), Path::new("5.jpg"), Path::new("3.jpg")]
        );
        for index in [1, 2] {
            let error = train.read(index, &mut Vec::new()).unwrap_err().to_string();
            assert!(error.contains("not a regular file"), "{error}");
        }
        std::fs::rename(path("pipe"), path("pipe.jpg")).unwrap();
        let error = open().unwrap_err().to_string();
        assert!(error.contains("a/pipe.jpg is not a regular file"), "{error}");
        std::fs::remove_file(path("pipe.jpg")).unwrap();
        std::os::unix::fs::symlink("../..", path("x/up")).unwrap();
        let error = open().unwrap_err().to_string();
        assert!(error.contains("a/x/up is a link to a folder above"), "{error}");
    }

    #[test]
    fn hidden_folders_are_no_classes_and_a_name_that_is_not_utf_8_matters_only_if_it_is_an_image() {
        use std::os::unix::ffi::OsStrExt;
        let folder =
            folder(&["train/.ipynb_checkpoints/1.jpg", "train/a/.hidden.jpg", "train/a/1.jpg", "train/b/2.jpg"]);
        let open = || Folder::open(&folder.path().join("train"), None);
        let named = |name: &[u8]| folder.path().join("train/a").join(std::ffi::OsStr::from_bytes(name));
        std::fs::write(named(b"note\xff.txt"), "").unwrap();
        let train = open().unwrap();
        assert_eq!(
            (train.classes.as_slice(), train.index.label.as_slice()),
            (&["a".into(), "b".into()][..], &[0, 1][..])
        );
        std::fs::write(named(b"\xff.jpg"), "").unwrap();
        let error = open().unwrap_err().to_string();
        assert!(error.contains("train/a") && error.contains("\u{fffd}.jpg is not UTF-8"), "{error}");
    }

    #[test]
    fn the_evaluation_split_may_have_any_of_its_three_names_but_only_one() {
        for name in ["val", "validation", "test"] {
            let folder = folder(&["train/a/1.jpg", &format!("{name}/a/2.jpg"), &format!("{name}/a/3.jpg")]);
            let (training, evaluation) = open(folder.path(), None).unwrap();
            assert_eq!((training.len(), evaluation.len()), (1, 2));
        }
        let both = folder(&["train/a/1.jpg", "val/a/1.jpg", "test/a/1.jpg"]);
        let error = open(both.path(), None).unwrap_err().to_string();
        assert!(error.contains("val and test"), "{error}");
    }

    #[test]
    fn splits_with_different_classes_an_empty_class_and_no_folder_are_refused_by_name() {
        let fault = |folder: &tempfile::TempDir| open(folder.path(), None).unwrap_err().to_string();
        let differing = folder(&["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/c/1.jpg"]);
        assert!(fault(&differing).contains("class \"b\" is in train alone"), "{}", fault(&differing));
        let empty = folder(&["train/a/1.jpg", "train/b/1.txt", "val/a/1.jpg"]);
        assert!(fault(&empty).contains("train/b") && fault(&empty).contains("no .jpg"), "{}", fault(&empty));
        let missing = folder(&["train/a/1.jpg"]);
        assert!(fault(&missing).contains("val") && fault(&missing).contains("data.path"), "{}", fault(&missing));
    }
}
