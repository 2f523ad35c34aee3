//! Compaction: a new generation that holds only what is stored, then an atomic switch. Offline: the store is closed.
//!
//! A crash at any moment leaves either the old generation or the new one current, and both are whole. The index of the
//! new generation is built at its first opening, as after any loss of an index.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::StoreError;
use super::dir::DataDir;
use super::embedded::{Options, Shared};
use super::log::{HEADER_LEN, Log, Step, io_at};
use super::open;
use super::record::Record;
use super::schema::{self, Place};

/// Bytes of log between two reports of progress.
const PROGRESS_BYTES: u64 = 1 << 20;

/// What compaction came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct CompactReport {
    /// Events that are kept: all that were stored.
    pub events: u64,
    /// Bytes of the old log.
    pub bytes_before: u64,
    /// Bytes of the new log.
    pub bytes_after: u64,
}

/// Compacts the store in `dir`.
///
/// # Errors
/// [`StoreError::InUse`] when a process has it; [`StoreError::Damaged`] when the log has damage, which compaction would
/// make final; I/O errors. The old generation stays current then.
pub fn compact(dir: &Path, options: &Options) -> Result<CompactReport, StoreError> {
    let opened = open::open(DataDir::take(dir)?, options)?;
    let shared = opened.shared;
    let new = shared.dir.new_generation()?;
    let bytes_before = shared.log.end();
    let copied = copy_stored(&shared, &new.log(), options);
    let (events, bytes_after) = match copied {
        Ok(copied) => copied,
        Err(error) => {
            shared.dir.remove_other_generations(&shared.generation)?;
            return Err(error);
        }
    };
    let Shared { dir, index, .. } = shared;
    drop(index); // before its files are deleted
    dir.switch_to(&new)?;
    Ok(CompactReport { events, bytes_before, bytes_after })
}

/// Bytes that the new generation will take beside the old one, its index included.
pub fn bytes_needed(log_bytes: u64, dead_bytes: u64, index_bytes: u64) -> u64 {
    log_bytes.saturating_sub(dead_bytes) + index_bytes
}

/// Writes the stored events to a new log, in their order. Returns how many and its length.
fn copy_stored(shared: &Shared, path: &Path, options: &Options) -> Result<(u64, u64), StoreError> {
    Log::create(path, secp256k1::rand::random())?;
    let file = File::options().append(true).open(path).map_err(io_at("open", path))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let (mut events, mut told) = (0, 0);
    let mut bytes = Vec::new();
    let mut reader = shared.log.reader(HEADER_LEN);
    while let Some(step) = reader.next()? {
        let place = match step {
            Step::Record(offset, len, Record::Put(event)) => {
                let place = Place::new(offset, len);
                let current = shared.index.get(&schema::by_id(&event.id))?.as_ref().and_then(schema::place);
                (current == Some(place)).then_some((offset, len))
            }
            Step::Record(..) => None,
            Step::Damaged { offset, .. } | Step::TornTail { offset, .. } => {
                return Err(StoreError::Damaged(format!(
                    "{} is damaged at byte {offset}; compacting would make the loss final. Run `sledge verify` first",
                    shared.log.path().display()
                )));
            }
        };
        if let Some((offset, len)) = place {
            shared.log.read_raw(offset, len, &mut bytes)?;
            out.write_all(&bytes).map_err(io_at("write", path))?;
            events += 1;
        }
        if reader.offset() >= told + PROGRESS_BYTES {
            told = reader.offset();
            (options.progress)(told, shared.log.end());
        }
    }
    let file = out.into_inner().map_err(|error| io_at("write", path)(error.into_error()))?;
    file.sync_all().map_err(io_at("sync", path))?;
    let bytes_after = file.metadata().map_err(io_at("look at", path))?.len();
    Ok((events, bytes_after))
}
