//! The embedded store's events by time, for the keeper. The reaches lie beside the log in `retention.json`.

use std::path::{Path, PathBuf};

use super::keeper::{Evicted, Ground, Used};
use crate::protocol::{Kind, PublicKey};
use crate::store::StoreError;
use crate::store::batch::Batch;
use crate::store::dir::write_atomically;
use crate::store::embedded::{Files, WriterState};
use crate::store::index::Key;
use crate::store::schema::{Prefix, place_and_kind};

const REACH_FILE: &str = "retention.json";

/// The reaches that were saved in a data directory.
pub(in crate::store) fn saved_reaches(dir: &Path) -> Option<Vec<u8>> {
    std::fs::read(dir.join(REACH_FILE)).ok()
}

/// The files of a store, and the right to write.
pub(in crate::store) struct FilesGround<'s> {
    files: &'s Files,
    state: &'s mut WriterState,
    path: PathBuf,
}

impl<'s> FilesGround<'s> {
    /// The files in a data directory.
    pub(in crate::store) fn new(dir: &Path, files: &'s Files, state: &'s mut WriterState) -> Self {
        FilesGround { files, state, path: dir.join(REACH_FILE) }
    }
}

/// A key, and the generation of files that it is of.
pub(in crate::store) type FilesPlace = ([u8; 16], Key);

impl Ground for FilesGround<'_> {
    type Place = FilesPlace;

    fn used(&mut self) -> Used {
        Used {
            live_bytes: self.files.log.end().saturating_sub(self.state.dead_bytes),
            other_bytes: self.files.index.bytes_on_disk(),
            events: self.state.events,
        }
    }

    fn count(&mut self, from: u64, until: u64, limit: usize) -> Result<usize, StoreError> {
        let mut found = Vec::new();
        self.files.index.scan(&Prefix::time().start(until), &Prefix::time().end(from), limit, &mut found)?;
        Ok(found.len())
    }

    fn evict(
        &mut self,
        (since, until): (u64, u64),
        place: Option<FilesPlace>,
        entries_max: usize,
        goes: &dyn Fn(Kind) -> bool,
        kept: &dyn Fn(&PublicKey) -> bool,
    ) -> Result<Evicted<FilesPlace>, StoreError> {
        let (time, generation) = (Prefix::time(), self.files.log.id());
        // A compaction in between has made other files; the stretch is walked from its beginning then.
        let place = place.filter(|(of, _)| *of == generation);
        let from = place.map_or_else(|| time.start(until), |(_, key)| key);
        let mut entries = Vec::new();
        self.files.index.scan(&from, &time.end(since), entries_max, &mut entries)?;
        let mut writes = Batch::new(self.files, self.state);
        let (mut removed, mut latest) = (0, 0);
        for (key, value) in &entries {
            let Some(suffix) = time.suffix_of(key) else { continue };
            let Some((place, kind)) = place_and_kind(&suffix, value) else { continue };
            if goes(kind) && writes.evict(place, kept)? {
                removed += 1;
                latest = latest.max(suffix.created_at());
            }
        }
        writes.commit()?;
        let rest = entries.last().filter(|_| entries.len() >= entries_max).and_then(|(key, _)| key.successor());
        Ok(Evicted { removed, latest, rest: rest.map(|key| (generation, key)) })
    }

    fn save(&mut self, reaches: &[u8]) -> Result<(), StoreError> {
        write_atomically(&self.path, reaches)
    }
}
