//! The fjall engine behind [`Index`]: its LSM tree, the crate `lsm-tree`.
//!
//! fjall itself puts a journal, memtables and worker threads around this tree. An index that is
//! written in sorted runs and replayed from the event log needs none of them:
//!
//! - A run is *ingested*: its changes go straight into new table files, which are flushed to disk
//!   and then named by a new manifest. So a run is there as a whole or not at all, and nothing of
//!   it waits in memory.
//! - Tables are merged (compacted) by the thread that wrote the run, right after it. So there is
//!   no other thread, and a merge that fails is seen.
//!
//! What the crate leaves to us:
//!
//! - It checks each block when it reads it, but not the manifest, and one flipped bit in the table
//!   of contents of a file can make it ask for more memory than there is, which ends the process.
//!   Both carry checksums, so they are checked here before it opens them.
//! - A manifest that was replaced long ago is as sound as the present one. So the number of the
//!   manifest is noted after each run, and an older one at opening is damage.
//! - A write that fails or is given up leaves its files behind until the tree is opened again.
//!   So that is done at once.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use lsm_tree::compaction::Leveled;
use lsm_tree::config::{BloomConstructionPolicy, FilterPolicy, FilterPolicyEntry, PinningPolicy};
use lsm_tree::{AbstractTree, AnyTree, Cache, DescriptorTable, Guard, SeqNo, SequenceNumberCounter};
use rustix::io::Errno;
use xxhash_rust::xxh3::xxh3_128;

use super::{Change, Index, IndexError, Key, Value, guard};

/// Entries of a run between two looks at the stop signal.
const STOP_CHECK_ENTRIES: usize = 4_096;
/// Bytes of a table that a merge writes. Small tables let a merge take up less at a time.
const TABLE_BYTES: u64 = 16 << 20;
/// Table files kept open; others are opened for each block that the cache lacks.
const OPEN_TABLES_MAX: usize = 128;
/// Bits of a table's filter for each key, so that looking for a key reads one table in a hundred in vain.
const FILTER_BITS: f32 = 10.0;
/// Every answer is the newest.
const NEWEST: SeqNo = SeqNo::MAX;

/// The folder of the tree, within ours.
const TREE_DIR: &str = "fjall";
/// The folder of the tables, within the tree's.
const TABLES_DIR: &str = "tables";
/// The file that names the tree's manifest: its number 8, its XXH3-128 16, and a zero, little-endian.
const CURRENT_FILE: &str = "current";
/// The file with the number of the manifest after the last run, as decimal text.
const LAST_MANIFEST_FILE: &str = "last-manifest";

/// What a file of the tree ends with: `SFA!`, two bytes, then XXH3-128 16, place 8 and length 8
/// of its table of contents, little-endian.
const TRAILER_MAGIC: &[u8] = b"SFA!";
const TRAILER_BYTES: usize = 4 + 2 + 16 + 8 + 8;

/// An index in fjall's LSM tree.
pub struct FjallIndex {
    dir: PathBuf,
    cache_bytes: u64,
    open_timeout: Duration,
    /// Readers and the writer hold it for reading; opening again takes it for writing.
    state: RwLock<State>,
    /// Held by the one who writes a run.
    writing: Mutex<()>,
    /// Given up last, when the tree is closed.
    _claim: Claim,
}

enum State {
    Open(Opened),
    Damaged(String),
}

/// The tree and what numbers its states.
struct Opened {
    tree: AnyTree,
    visible: SequenceNumberCounter,
}

impl FjallIndex {
    /// Opens the index in `dir`, or makes an empty one where there is none.
    ///
    /// `cache_bytes` bounds the blocks kept in memory. It must not be open elsewhere.
    ///
    /// # Errors
    /// [`IndexError::Damaged`] or [`IndexError::OpenTimeout`] when it has to be rebuilt: remove
    /// `dir` first. [`IndexError::Io`] when the directory is out of reach or claimed by another one of these.
    pub fn open(dir: &Path, cache_bytes: u64, open_timeout: Duration) -> Result<FjallIndex, IndexError> {
        fs::create_dir_all(dir).map_err(|source| IndexError::Io { what: "making the index directory", source })?;
        let claim = Claim::on(dir).map_err(|source| IndexError::Io { what: "claiming the index directory", source })?;
        guard::refuse_marked(dir)?;
        let opened = open_within(dir, cache_bytes, open_timeout)?;
        Ok(FjallIndex {
            dir: dir.to_owned(),
            cache_bytes,
            open_timeout,
            state: RwLock::new(State::Open(opened)),
            writing: Mutex::new(()),
            _claim: claim,
        })
    }

    /// Runs `work` on the tree. A failure that the files are to blame for damages the engine for good.
    fn with_tree<T>(&self, what: &'static str, work: impl FnOnce(&Opened) -> io::Result<T>) -> Result<T, IndexError> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let opened = match &*state {
            State::Open(opened) => opened,
            State::Damaged(why) => return Err(IndexError::Damaged(why.clone())),
        };
        match guard::caught(|| work(opened)) {
            Ok(answer) => Ok(answer),
            Err(source) if guard::is_passing(&source) => Err(IndexError::Io { what, source }),
            Err(error) => {
                drop(state);
                Err(self.damage(error.to_string()))
            }
        }
    }

    fn damage(&self, why: String) -> IndexError {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if let State::Open(_) = &*state {
            tracing::error!(why, dir = %self.dir.display(), "the index has failed");
            *state = State::Damaged(why.clone());
            guard::mark_damaged(&self.dir, &why);
        }
        IndexError::Damaged(why)
    }

    /// Closes the tree and opens it again, which deletes the files that no manifest names.
    fn reopen(&self) -> Result<(), IndexError> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if let State::Open(_) = &*state {
            *state = State::Damaged("it could not be opened again".into());
            *state = State::Open(open_within(&self.dir, self.cache_bytes, self.open_timeout)?);
        }
        Ok(())
    }

    /// Merges tables until the tree is in shape. The run is durable already, so a failure is only told.
    fn compact(&self, stop: &dyn Fn() -> bool) -> Result<(), IndexError> {
        let tree_dir = self.dir.join(TREE_DIR);
        match self.with_tree("merging the index's tables", |opened| compact(&tree_dir, opened, stop)) {
            Err(IndexError::Io { what, source }) => {
                tracing::warn!("{what} failed and will be tried again after the next run: {source}");
                self.reopen()
            }
            compacted => compacted,
        }
    }

    /// Notes how far the manifests have come.
    fn end_run(&self) -> Result<(), IndexError> {
        let number = self.with_tree("reading the index", |_| manifest_number(&self.dir.join(TREE_DIR)))?;
        guard::write_number(&self.dir.join(LAST_MANIFEST_FILE), number)
    }
}

impl Index for FjallIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, IndexError> {
        self.with_tree("reading the index", |opened| {
            let value = opened.tree.get(key, NEWEST).map_err(as_io)?;
            value.map(|value| guard::checked_value(&value)).transpose()
        })
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize, out: &mut Vec<(Key, Value)>) -> Result<(), IndexError> {
        if from >= to {
            return Ok(());
        }
        self.with_tree("reading the index", |opened| {
            for entry in opened.tree.range(from..to, NEWEST, None).take(limit) {
                let (key, value) = entry.into_inner().map_err(as_io)?;
                out.push((guard::checked_key(&key)?, guard::checked_value(&value)?));
            }
            Ok(())
        })
    }

    fn write_run(&self, run: &mut dyn Iterator<Item = Change>, stop: &dyn Fn() -> bool) -> Result<bool, IndexError> {
        let _one_writer = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let written = self.with_tree("writing the index", |opened| ingest(&opened.tree, run, stop));
        if !matches!(written, Ok(true) | Err(IndexError::Damaged(_))) {
            self.reopen()?;
            return written;
        }
        written?;
        self.compact(stop)?;
        self.end_run()?;
        Ok(true)
    }

    fn bytes_on_disk(&self) -> u64 {
        guard::bytes_below(&self.dir)
    }
}

/// Writes a run into new tables and makes them part of the tree. False when told to stop: then nothing has changed.
fn ingest(tree: &AnyTree, run: &mut dyn Iterator<Item = Change>, stop: &dyn Fn() -> bool) -> io::Result<bool> {
    let mut run = run.peekable();
    if run.peek().is_none() {
        return Ok(true);
    }
    let mut ingestion = tree.ingestion().map_err(as_io)?;
    for (number, (key, value)) in run.enumerate() {
        match value {
            Some(value) => ingestion.write(key.as_slice(), value.as_slice()),
            None => ingestion.write_tombstone(key.as_slice()),
        }
        .map_err(as_io)?;
        if number % STOP_CHECK_ENTRIES == STOP_CHECK_ENTRIES - 1 && stop() {
            return Ok(false);
        }
    }
    ingestion.finish().map_err(as_io)?;
    Ok(true)
}

/// Merges tables until there is nothing to merge, or until told to stop between two merges.
fn compact(tree_dir: &Path, opened: &Opened, stop: &dyn Fn() -> bool) -> io::Result<()> {
    let strategy = Arc::new(Leveled::default().with_table_target_size(TABLE_BYTES));
    while !stop() {
        let before = manifest_number(tree_dir)?;
        // Readers keep the tables they began with, so what is not the newest can go.
        opened.tree.compact(strategy.clone(), opened.visible.get()).map_err(as_io)?;
        if manifest_number(tree_dir)? == before {
            break; // it found nothing to do
        }
    }
    Ok(())
}

/// Checks what the tree does not check itself, opens it and reads its ends, all within the time limit.
fn open_within(dir: &Path, cache_bytes: u64, timeout: Duration) -> Result<Opened, IndexError> {
    let last_manifest = guard::read_number(&dir.join(LAST_MANIFEST_FILE))?;
    let tree_dir = dir.join(TREE_DIR);
    guard::within(timeout, move || {
        let open = || {
            check_manifest(&tree_dir, last_manifest)?;
            check_tables(&tree_dir.join(TABLES_DIR))?;
            open_tree(&tree_dir, cache_bytes)
        };
        open().map_err(guard::open_error)
    })
}

fn open_tree(dir: &Path, cache_bytes: u64) -> io::Result<Opened> {
    let (next, visible) = (SequenceNumberCounter::default(), SequenceNumberCounter::default());
    let filter = FilterPolicyEntry::Bloom(BloomConstructionPolicy::BitsPerKey(FILTER_BITS));
    let tree = lsm_tree::Config::new(dir, next.clone(), visible.clone())
        .use_cache(Arc::new(Cache::with_capacity_bytes(cache_bytes)))
        .use_descriptor_table(Some(Arc::new(DescriptorTable::new(OPEN_TABLES_MAX))))
        .filter_policy(FilterPolicy::all(filter))
        // In parts, so that they come and go with the cache instead of growing with the index.
        .index_block_partitioning_policy(PinningPolicy::all(true))
        .filter_block_partitioning_policy(PinningPolicy::all(true))
        .index_block_pinning_policy(PinningPolicy::all(false))
        .filter_block_pinning_policy(PinningPolicy::all(false))
        .open()
        .map_err(as_io)?;
    for end in [tree.first_key_value(NEWEST, None), tree.last_key_value(NEWEST, None)].into_iter().flatten() {
        guard::checked_key(&end.key().map_err(as_io)?)?;
    }
    let number = tree.get_highest_persisted_seqno().map_or(0, |highest| highest + 1);
    next.set(number);
    visible.set(number);
    Ok(Opened { tree, visible })
}

/// What [`CURRENT_FILE`] says of the manifest.
struct Current {
    number: u64,
    checksum: u128,
}

/// `None` in a new directory.
fn current(tree_dir: &Path) -> io::Result<Option<Current>> {
    let bytes = match fs::read(tree_dir.join(CURRENT_FILE)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let parts = bytes.split_first_chunk().and_then(|(number, rest)| Some((number, rest.split_first_chunk()?)));
    match parts {
        Some((number, (checksum, [0]))) => {
            Ok(Some(Current { number: u64::from_le_bytes(*number), checksum: u128::from_le_bytes(*checksum) }))
        }
        _ => Err(damaged(format!("{CURRENT_FILE} names no manifest"))),
    }
}

fn manifest_number(tree_dir: &Path) -> io::Result<u64> {
    Ok(current(tree_dir)?.map_or(0, |current| current.number))
}

/// Refuses a manifest that is not what was written, or not the last one.
fn check_manifest(tree_dir: &Path, last: u64) -> io::Result<()> {
    let Some(current) = current(tree_dir)? else {
        return if last == 0 { Ok(()) } else { Err(damaged("it has lost its manifest".into())) };
    };
    if current.number < last {
        return Err(damaged(format!("its manifest is number {} and should be {last}", current.number)));
    }
    let manifest = fs::read(tree_dir.join(format!("v{}", current.number)))?;
    if xxh3_128(&manifest) != current.checksum {
        return Err(damaged("its manifest is not what was written".into()));
    }
    Ok(())
}

/// Refuses tables whose table of contents is not what was written. One without an end may be the rest of a write
/// that was cut short; if it is not, the tree says so.
fn check_tables(dir: &Path) -> io::Result<()> {
    let tables = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        tables => tables?,
    };
    for table in tables {
        let table = table?;
        if !has_sound_contents(&mut File::open(table.path())?)? {
            return Err(damaged(format!("table {} is not what was written", table.file_name().display())));
        }
    }
    Ok(())
}

fn has_sound_contents(table: &mut File) -> io::Result<bool> {
    let table_bytes = table.metadata()?.len();
    let Some(trailer_at) = table_bytes.checked_sub(TRAILER_BYTES as u64) else { return Ok(true) };
    let mut trailer = [0; TRAILER_BYTES];
    table.seek(SeekFrom::Start(trailer_at))?;
    table.read_exact(&mut trailer)?;
    if !trailer.starts_with(TRAILER_MAGIC) {
        return Ok(true);
    }
    let number = |at: usize| u64::from_le_bytes(trailer[at..at + 8].try_into().expect("8 bytes"));
    let checksum = u128::from_le_bytes(trailer[6..22].try_into().expect("16 bytes"));
    let (at, bytes) = (number(22), number(30));
    if at.checked_add(bytes) != Some(trailer_at) {
        return Ok(false);
    }
    let mut contents = Vec::new();
    table.seek(SeekFrom::Start(at))?;
    table.take(bytes).read_to_end(&mut contents)?;
    Ok(xxh3_128(&contents) == checksum)
}

/// Two trees in one directory would destroy each other's files. Other processes are kept out by the lock on the data
/// directory; a lock file here would be inherited by every program that is started meanwhile, and outlive us in it.
struct Claim(PathBuf);

static CLAIMED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

impl Claim {
    fn on(dir: &Path) -> io::Result<Claim> {
        let dir = fs::canonicalize(dir)?;
        let is_free = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner).insert(dir.clone());
        if is_free { Ok(Claim(dir)) } else { Err(Errno::AGAIN.into()) }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        CLAIMED.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

/// Whatever is no error of the system is about what the files hold.
fn as_io(error: lsm_tree::Error) -> io::Error {
    match error {
        lsm_tree::Error::Io(error) => error,
        error => damaged(error.to_string()),
    }
}

fn damaged(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::suite::{CACHE_BYTES, OPEN_TIMEOUT, random_run, rng, scan, write};
    use super::*;
    use std::collections::BTreeMap;

    fn open(dir: &Path) -> Result<FjallIndex, IndexError> {
        FjallIndex::open(dir, CACHE_BYTES, OPEN_TIMEOUT)
    }

    fn number_of_files(dir: &Path) -> usize {
        fs::read_dir(dir.join(TREE_DIR).join(TABLES_DIR)).unwrap().count()
    }

    /// Enough runs to be merged several times, the later ones changing and removing what the earlier ones wrote:
    /// the tables stay few, and what they say stays right.
    #[test]
    fn runs_are_merged_into_few_tables() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(dir.path()).unwrap();
        let mut oracle = BTreeMap::new();
        for seed in 0..20 {
            let mut run = random_run(&mut rng(seed), 500);
            let (changed, removed) = (oracle.keys().skip(1).step_by(5), oracle.keys().step_by(5));
            let changed = changed.map(|key| (*key, Some(Value::new(&[seed]))));
            let changes: Vec<Change> = changed.chain(removed.map(|key| (*key, None))).collect();
            run.extend(changes);
            write(&index, run.clone());
            oracle.extend(run);
            oracle.retain(|_, value: &mut Option<Value>| value.is_some());
        }
        let expected: Vec<_> = oracle.iter().map(|(key, value)| (*key, value.unwrap())).collect();
        assert_eq!(scan(&index, &[], &[0xff; 31], usize::MAX).unwrap(), expected);
        drop(index);
        assert!(number_of_files(dir.path()) < 6);
        assert_eq!(scan(&open(dir.path()).unwrap(), &[], &[0xff; 31], usize::MAX).unwrap(), expected);
    }

    /// Nothing of a run that was given up stays on disk, and what was there before can be read.
    #[test]
    fn a_stopped_run_leaves_no_files() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(dir.path()).unwrap();
        let first = random_run(&mut rng(1), 100);
        write(&index, first.clone());
        let files = number_of_files(dir.path());
        let second = random_run(&mut rng(2), STOP_CHECK_ENTRIES + 1);
        assert!(!index.write_run(&mut second.into_iter(), &|| true).unwrap());
        assert_eq!(number_of_files(dir.path()), files);
        assert_eq!(scan(&index, &[], &[0xff; 31], usize::MAX).unwrap().len(), first.len());
    }

    /// A second one is refused, and may come when the first is gone.
    #[test]
    fn one_owner_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path()).unwrap();
        assert!(matches!(open(dir.path()), Err(IndexError::Io { .. })));
        drop(first);
        open(dir.path()).unwrap();
    }

    /// A sound state of the tree that is older than the last run is not taken for the present one.
    #[test]
    fn an_older_state_is_refused() {
        let (dir, older) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let index = open(dir.path()).unwrap();
        write(&index, random_run(&mut rng(1), 100));
        super::super::suite::copy(dir.path(), older.path());
        write(&index, random_run(&mut rng(2), 100));
        drop(index);
        fs::copy(dir.path().join(LAST_MANIFEST_FILE), older.path().join(LAST_MANIFEST_FILE)).unwrap();
        let error = open(older.path()).map(drop).unwrap_err();
        assert!(error.to_string().contains("manifest"), "{error}");
        fs::remove_dir_all(older.path().join(TREE_DIR)).unwrap();
        assert!(matches!(open(older.path()), Err(IndexError::Damaged(_))));
    }

    /// A table cut short by a crash, which no manifest names, is no damage.
    #[test]
    fn the_rest_of_an_unfinished_write_is_no_damage() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(dir.path()).unwrap();
        write(&index, random_run(&mut rng(1), 100));
        drop(index);
        fs::write(dir.path().join(TREE_DIR).join(TABLES_DIR).join("99"), [7; 100]).unwrap();
        assert_eq!(scan(&open(dir.path()).unwrap(), &[], &[0xff; 31], usize::MAX).unwrap().len(), 100);
    }

    /// A full disk is told and forgotten: the files are what they were.
    #[test]
    fn a_full_disk_damages_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(dir.path()).unwrap();
        let full = |_: &Opened| -> io::Result<()> { Err(io::ErrorKind::StorageFull.into()) };
        assert!(matches!(index.with_tree("writing", full), Err(IndexError::Io { .. })));
        write(&index, random_run(&mut rng(1), 100));
        assert_eq!(scan(&index, &[], &[0xff; 31], usize::MAX).unwrap().len(), 100);
    }

    /// A panic below becomes an error, and from then on the index answers nothing, also when opened again.
    #[test]
    fn a_panic_damages_the_engine_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(dir.path()).unwrap();
        let error = index.with_tree("reading", |_| -> io::Result<()> { panic!("deep below") }).unwrap_err();
        assert!(error.to_string().contains("deep below"), "{error}");
        assert!(matches!(index.get(b"key"), Err(IndexError::Damaged(_))));
        drop(index);
        assert!(matches!(open(dir.path()), Err(IndexError::Damaged(_))));
    }
}
