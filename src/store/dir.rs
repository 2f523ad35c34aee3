//! The data directory: who owns it, and which generation of files is current.
//!
//! ```text
//! LOCK                    locked by the process that has the directory; says who that is
//! CURRENT                 name of the current generation's folder
//! gen-000001/events.log   the event log: the database
//! gen-000001/index/       the index engine's files; can be deleted
//! gen-000001/index.meta   which log the index belongs to and how far it reaches; can be deleted
//! gen-000001/index.bloom  the filter on ids; can be deleted
//! gen-000001/index.rebuilding  there while the index was last built from the whole log and is not sure to count right
//! state/                  small blobs of the layers above, see [`super::state`]
//! ```

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::StoreError;
use super::fault;
use super::log::io_at;

const LOCK: &str = "LOCK";
const CURRENT: &str = "CURRENT";

/// How long a lock is waited for that somebody has.
const LOCK_PATIENCE: Duration = Duration::from_millis(200);
/// Between two attempts.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// A data directory that this process owns until it is dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    lock: File,
}

/// One generation's folder.
#[derive(Clone, Debug)]
pub struct Generation {
    path: PathBuf,
}

impl DataDir {
    /// Takes the directory, making it if need be.
    ///
    /// # Errors
    /// [`StoreError::InUse`] when another process has it, with what that process says of itself.
    pub fn take(path: &Path) -> Result<Self, StoreError> {
        fs::create_dir_all(path).map_err(io_at("create", path))?;
        let lock_path = path.join(LOCK);
        let mut options = OpenOptions::new();
        let mut lock = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(io_at("open", &lock_path))?;
        match try_lock(&lock) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                let _ = lock.read_to_string(&mut owner); // only makes the message better
                return Err(StoreError::InUse(in_use(path, owner.trim())));
            }
            Err(TryLockError::Error(error)) => return Err(io_at("lock", &lock_path)(error)),
        }
        let dir = DataDir { path: path.to_owned(), lock };
        dir.describe_owner(&format!("process {}", std::process::id()))?;
        Ok(dir)
    }

    /// Writes into the lock file who has the directory, for the message that another process gets.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn describe_owner(&self, text: &str) -> Result<(), StoreError> {
        let path = self.path.join(LOCK);
        let mut lock = &self.lock;
        let mut write = || -> std::io::Result<()> {
            // In this order the file keeps its place on a disk that is full.
            lock.seek(SeekFrom::Start(0))?;
            lock.write_all(text.as_bytes())?;
            lock.set_len(text.len() as u64)
        };
        write().map_err(io_at("write", &path))
    }

    /// Deletes the lock file of a directory that turned out to be no store. The lock itself is held on.
    pub(super) fn remove_lock_file(&self) -> std::io::Result<()> {
        fs::remove_file(self.path.join(LOCK))
    }

    /// What the owner of a directory says of itself; `None` when nobody has it or nothing is said.
    pub fn owner(path: &Path) -> Option<String> {
        let lock = OpenOptions::new().read(true).open(path.join(LOCK)).ok()?;
        let taken = matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock));
        taken.then(|| fs::read_to_string(path.join(LOCK)).ok()).flatten()
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The current generation; `None` in a new directory.
    ///
    /// # Errors
    /// When it cannot be read or names something strange.
    pub fn current(&self) -> Result<Option<Generation>, StoreError> {
        Self::current_in(&self.path)
    }

    /// The current generation of a directory that another process may own.
    ///
    /// # Errors
    /// As [`DataDir::current`].
    pub fn current_in(dir: &Path) -> Result<Option<Generation>, StoreError> {
        let path = dir.join(CURRENT);
        let name = match fs::read_to_string(&path) {
            Ok(name) => name,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => String::from("no text"),
            Err(error) => return Err(io_at("read", &path)(error)),
        };
        let name = name.trim();
        if generation_number(name).is_none() {
            return Err(StoreError::Damaged(format!(
                "{} should name a folder such as gen-000001 and says {name:?}; see `sledge repair`",
                path.display()
            )));
        }
        Ok(Some(Generation { path: dir.join(name) }))
    }

    /// The generations that hold an event log, current or not, the oldest first.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn generations(&self) -> Result<Vec<Generation>, StoreError> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(io_at("read", &self.path))? {
            let generation = Generation { path: entry.map_err(io_at("read", &self.path))?.path() };
            if let Some(number) = generation_number(generation.name())
                && generation.log().is_file()
            {
                found.push((number, generation));
            }
        }
        found.sort_by_key(|(number, _)| *number);
        Ok(found.into_iter().map(|(_, generation)| generation).collect())
    }

    /// Makes an empty folder for a new generation, numbered after the current one.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new_generation(&self) -> Result<Generation, StoreError> {
        let current = self.current()?;
        let number = current.and_then(|current| generation_number(current.name())).unwrap_or(0) + 1;
        let path = self.path.join(format!("gen-{number:06}"));
        remove_dir(&path)?; // what an interrupted attempt left
        fs::create_dir(&path).map_err(io_at("create", &path))?;
        sync_dir(&self.path)?;
        Ok(Generation { path })
    }

    /// Makes a generation the current one, atomically and durably.
    ///
    /// # Errors
    /// When that cannot be written; the old generation then stays current.
    pub fn switch_to(&self, generation: &Generation) -> Result<(), StoreError> {
        sync_dir(&generation.path)?;
        write_atomically(&self.path.join(CURRENT), format!("{}\n", generation.name()).as_bytes())
    }

    /// Bytes that the disk has left for us.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn free_bytes(&self) -> Result<u64, StoreError> {
        free_bytes_at(&self.path)
    }

    /// Deletes generations that are not current: leftovers of an interrupted switch.
    ///
    /// # Errors
    /// When they cannot be deleted.
    pub fn remove_other_generations(&self, current: &Generation) -> Result<(), StoreError> {
        for entry in fs::read_dir(&self.path).map_err(io_at("read", &self.path))? {
            let path = entry.map_err(io_at("read", &self.path))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if generation_number(name).is_some() && path != current.path {
                remove_dir(&path)?;
            }
        }
        Ok(())
    }
}

impl Generation {
    /// The event log.
    pub fn log(&self) -> PathBuf {
        self.path.join("events.log")
    }

    /// The index engine's folder.
    pub fn index(&self) -> PathBuf {
        self.path.join("index")
    }

    /// What is known of the index.
    pub fn index_meta(&self) -> PathBuf {
        self.path.join("index.meta")
    }

    /// The saved filter on ids.
    pub fn bloom(&self) -> PathBuf {
        self.path.join("index.bloom")
    }

    /// Says that the index is being built from the whole log.
    pub fn rebuild_mark(&self) -> PathBuf {
        self.path.join("index.rebuilding")
    }

    /// Deletes the index, so that it is rebuilt.
    ///
    /// # Errors
    /// When it cannot be deleted.
    pub fn remove_index(&self) -> Result<(), StoreError> {
        for file in [self.index_meta(), self.bloom(), self.rebuild_mark()] {
            match fs::remove_file(&file) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(io_at("delete", &file)(error));
                }
                _ => {}
            }
        }
        remove_dir(&self.index())
    }

    /// Deletes all files of the generation.
    ///
    /// # Errors
    /// When they cannot be deleted.
    pub fn remove(&self) -> Result<(), StoreError> {
        remove_dir(&self.path)?;
        fault::point("generation.removed");
        Ok(())
    }

    /// Its folder's name.
    pub fn name(&self) -> &str {
        self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
    }
}

/// Writes a small file so that after a crash it holds either the old or the new bytes.
///
/// # Errors
/// When it cannot be written.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    write_new(path, bytes, OpenOptions::new().write(true).create(true).truncate(true))
}

/// As [`write_atomically`], for a file that only its owner may read.
///
/// # Errors
/// When it cannot be written.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    write_new(path, bytes, options.write(true).create(true).truncate(true))
}

fn write_new(path: &Path, bytes: &[u8], options: &OpenOptions) -> Result<(), StoreError> {
    let temporary = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let mut file = options.open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fault::point("file.written");
        fs::rename(&temporary, path)?;
        fault::point("file.renamed");
        Ok(())
    };
    write().map_err(io_at("write", path))?;
    sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// Bytes that the disk below a path has left for us.
///
/// # Errors
/// When the system does not tell.
pub fn free_bytes_at(path: &Path) -> Result<u64, StoreError> {
    let disk = rustix::fs::statvfs(path).map_err(|error| io_at("look at the disk of", path)(error.into()))?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Makes a folder's entries durable.
///
/// # Errors
/// When the system refuses.
pub fn sync_dir(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(io_at("sync", path))
}

fn remove_dir(path: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io_at("delete", path)(error)),
        _ => Ok(()),
    }
}

fn generation_number(name: &str) -> Option<u32> {
    name.strip_prefix("gen-")?.parse().ok()
}

/// Locks, waiting a moment for a lock that is just being let go: a child that some thread of its owner forks, as sled does
/// on opening, holds it until the child runs its own program.
fn try_lock(lock: &File) -> Result<(), TryLockError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(LOCK_PAUSE),
            result => return result,
        }
    }
}

fn in_use(path: &Path, owner: &str) -> String {
    let owner = if owner.is_empty() { "another process" } else { owner };
    format!(
        "the data directory {} is in use by {owner}; stop it first, or name another directory with --store",
        path.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A second taker is told who has the directory; after the first has gone, it gets it.
    #[test]
    fn one_owner_at_a_time() {
        let folder = tempfile::tempdir().expect("a folder for the test");
        let first = DataDir::take(folder.path()).expect("free");
        first.describe_owner("sledge serve on ws://127.0.0.1:7777").expect("written");
        let error = DataDir::take(folder.path()).expect_err("taken").to_string();
        assert!(error.contains("in use by sledge serve on ws://127.0.0.1:7777"), "{error}");
        assert_eq!(DataDir::owner(folder.path()).as_deref(), Some("sledge serve on ws://127.0.0.1:7777"));
        drop(first);
        assert_eq!(DataDir::owner(folder.path()), None);
        DataDir::take(folder.path()).expect("free again");
    }

    /// After a switch only the new generation is there; a strange CURRENT is an error, not a new database.
    #[test]
    fn generations_switch() {
        let folder = tempfile::tempdir().expect("a folder for the test");
        let dir = DataDir::take(folder.path()).expect("free");
        assert!(dir.current().expect("readable").is_none());
        let first = dir.new_generation().expect("made");
        dir.switch_to(&first).expect("switched");
        let second = dir.new_generation().expect("made");
        assert_eq!(dir.current().expect("readable").expect("there").path, first.path);
        dir.switch_to(&second).expect("switched");
        dir.remove_other_generations(&second).expect("removed");
        assert_eq!(dir.current().expect("readable").expect("there").path, second.path);
        assert!(!first.path.exists() && second.path.exists());
        fs::write(folder.path().join("CURRENT"), "../elsewhere").expect("written");
        assert!(matches!(dir.current(), Err(StoreError::Damaged(_))));
    }
}
