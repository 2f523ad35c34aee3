//! What keeps an engine's failures inside the index: time limits, caught panics, and what is noted beside its files.
//!
//! Nothing here knows an engine. Failures are [`io::Error`]s, whatever they were below.

use std::any::Any;
use std::fs::{self, File};
use std::io::{self, Write};
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use super::{IndexError, KEY_BYTES_MAX, Key, VALUE_BYTES_MAX, Value};

/// Says why the files must not be used again; there only when they must not.
const DAMAGED_FILE: &str = "damaged";

/// Runs `open` on a thread of its own, which is left behind when it does not end in time.
pub(super) fn within<T: Send + 'static>(
    timeout: Duration,
    open: impl FnOnce() -> Result<T, IndexError> + Send + 'static,
) -> Result<T, IndexError> {
    let (answer, opened) = mpsc::channel();
    thread::Builder::new()
        .name("index-open".into())
        .spawn(move || {
            let opened = panic::catch_unwind(AssertUnwindSafe(open));
            let _ = answer.send(opened.unwrap_or_else(|panic| Err(IndexError::Damaged(message(panic.as_ref())))));
        })
        .map_err(|source| IndexError::Io { what: "starting the thread that opens the index", source })?;
    match opened.recv_timeout(timeout) {
        Ok(opened) => opened,
        Err(RecvTimeoutError::Timeout) => Err(IndexError::OpenTimeout(timeout)),
        Err(RecvTimeoutError::Disconnected) => Err(IndexError::Damaged("opening ended without an answer".into())),
    }
}

/// Runs `work` and makes an error of a panic in it.
pub(super) fn caught<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(io::Error::other(message(panic.as_ref()))))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("the engine panicked: {}", text.unwrap_or("without a message"))
}

/// Whether the system lacked something for a moment, so that the files are not to blame.
pub(super) fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, OutOfMemory, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | OutOfMemory | Interrupted)
        || matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
}

/// A failure at opening as what the caller has to do about it: rebuild, or look at the system.
pub(super) fn open_error(source: io::Error) -> IndexError {
    use io::ErrorKind::{InvalidData, NotFound, Other, UnexpectedEof, Unsupported};
    let unreadable = Errno::from_io_error(&source) == Some(Errno::IO);
    match source.kind() {
        InvalidData | NotFound | Other | UnexpectedEof | Unsupported => IndexError::Damaged(source.to_string()),
        _ if unreadable => IndexError::Damaged(source.to_string()),
        _ => IndexError::Io { what: "opening the index", source },
    }
}

/// Notes that the files in `dir` have failed in use: the next open refuses them, where damage deep inside would not
/// show. As good as the disk allows; not being able to is no further failure.
pub(super) fn mark_damaged(dir: &Path, why: &str) {
    let _ = fs::write(dir.join(DAMAGED_FILE), why);
}

/// Takes the note back.
pub(super) fn unmark_damaged(dir: &Path) {
    let _ = fs::remove_file(dir.join(DAMAGED_FILE)); // where it stays, the index is rebuilt, which does no harm
}

/// Refuses files that have failed in use.
pub(super) fn refuse_marked(dir: &Path) -> Result<(), IndexError> {
    match fs::read(dir.join(DAMAGED_FILE)) {
        Ok(why) => Err(IndexError::Damaged(String::from_utf8_lossy(&why).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(IndexError::Io { what: "looking for a mark of damage", source }),
    }
}

/// The number in a file, as decimal text; 0 when there is none.
pub(super) fn read_number(path: &Path) -> Result<u64, IndexError> {
    let damaged = || IndexError::Damaged(format!("{} holds no number", path.display()));
    match fs::read_to_string(path) {
        Ok(text) => text.trim().parse().map_err(|_| damaged()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(damaged()),
        Err(source) => Err(IndexError::Io { what: "reading a number of the index", source }),
    }
}

/// Replaces the number in a file in one step.
pub(super) fn write_number(path: &Path, number: u64) -> Result<(), IndexError> {
    let write = || {
        let new = path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(format!("{number}\n").as_bytes())?;
        // An empty file after a power loss would look like damage.
        file.sync_all()?;
        fs::rename(new, path)
    };
    write().map_err(|source| IndexError::Io { what: "recording the end of a run", source })
}

/// Bytes of the files in `dir` and below; what cannot be read counts nothing.
pub(super) fn bytes_below(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    let bytes = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.flatten().map(bytes).sum()
}

/// A key that an engine gave back, which may be anything.
pub(super) fn checked_key(bytes: &[u8]) -> io::Result<Key> {
    if bytes.len() > KEY_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a key is too long"));
    }
    Ok(Key::new(bytes))
}

/// A value that an engine gave back.
pub(super) fn checked_value(bytes: &[u8]) -> io::Result<Value> {
    if bytes.len() > VALUE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a value is too long"));
    }
    Ok(Value::new(bytes))
}
