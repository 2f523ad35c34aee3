//! The event log: one append-only file that is the database. Format version 1.
//!
//! ```text
//! 0   magic     8  "SLEDGELG"
//! 8   version   4  1, little-endian
//! 12  reserved  4  zero
//! 16  log_id   16  random; an index belongs to one log
//! 32  records      see `record`, each at a multiple of 8
//! ```
//!
//! An append returns after fdatasync. The file is only ever written at its end, with one exception: a record may be
//! overwritten by an *erased* record of the same length (NIP-62, NIP-09), so readers check every checksum.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::protocol::EventId;

use super::StoreError;
use super::fault;
use super::hot::Hot;
use super::pack::Unpacker;
use super::record::{self, ALIGN, FRAME_LEN, NotARecord, PAYLOAD_BYTES_MAX, Record};

const MAGIC: &[u8; 8] = b"SLEDGELG";
/// Version of the file format. Older logs stay readable for ever.
pub const FORMAT_VERSION: u32 = 1;
/// Numbers above this are no format that will ever be, but damage.
const FORMAT_VERSION_MAX: u32 = 0xffff;
/// Where the first record begins.
pub const HEADER_LEN: u64 = 32;
/// How much of the file a sequential reader holds.
const READ_AHEAD_BYTES: usize = 1 << 20;
/// A reader that meets a record in the middle of being erased looks again this often.
const ERASE_RACE_RETRIES: usize = 3;

/// The log, open for reading anywhere and for writing at its end.
#[derive(Debug)]
pub struct Log {
    file: File,
    path: PathBuf,
    id: [u8; 16],
    end: AtomicU64,
    poison: Mutex<Option<String>>,
    unpacker: Option<Unpacker>,
    hot: Hot,
}

/// A record to overwrite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Erasure {
    /// The event in it.
    pub id: EventId,
    /// Where it begins.
    pub offset: u64,
    /// Its whole length.
    pub len: u32,
}

/// What a sequential reader meets.
#[derive(Debug)]
pub enum Step<'a> {
    /// A record, where it begins, and its whole length.
    Record(u64, u32, Record<'a>),
    /// Bytes that are no record, followed by one that is.
    Damaged {
        /// Where they begin.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// Bytes at the end that are no record: a write that was cut off.
    TornTail {
        /// Where they begin.
        offset: u64,
        /// How many.
        len: u64,
    },
}

impl Log {
    /// Makes a new log; the file must not be there. The caller makes its folder entry durable. With a dictionary it can
    /// hold packed records.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn create(path: &Path, id: [u8; 16], dictionary: Option<Vec<u8>>) -> Result<Self, StoreError> {
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).open(path).map_err(io_at("create", path))?;
        let mut head = header(id).to_vec();
        if let Some(dictionary) = &dictionary {
            // Twice, since no packed record can be read without it.
            record::push_dictionary(&mut head, dictionary);
            record::push_dictionary(&mut head, dictionary);
        }
        file.write_all_at(&head, 0).map_err(io_at("write", path))?;
        file.sync_all().map_err(io_at("sync", path))?;
        let end = AtomicU64::new(head.len() as u64);
        let unpacker = dictionary.map(Unpacker::new).transpose()?;
        let (poison, hot) = (Mutex::new(None), Hot::default());
        Ok(Log { file, path: path.to_owned(), id, end, poison, unpacker, hot })
    }

    /// Opens a log. Its end is taken to be the file's until [`Log::cut`] says otherwise.
    ///
    /// # Errors
    /// When it is not a log, or of a newer format.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_file(path, true)
    }

    /// As [`Log::open`], but every write fails. Another process may be writing.
    ///
    /// # Errors
    /// As [`Log::open`].
    pub fn open_read_only(path: &Path) -> Result<Self, StoreError> {
        Self::open_file(path, false)
    }

    fn open_file(path: &Path, write: bool) -> Result<Self, StoreError> {
        let file = OpenOptions::new().read(true).write(write).open(path).map_err(io_at("open", path))?;
        let mut header = [0; HEADER_LEN as usize];
        file.read_exact_at(&mut header, 0).map_err(io_at("read the header of", path))?;
        if header[..8] != *MAGIC {
            return Err(StoreError::Damaged(format!("{} is not a sledge event log", path.display())));
        }
        let version = version_in(&header);
        if version > FORMAT_VERSION {
            return Err(StoreError::Damaged(format!(
                "{} has log format {version}, and this sledge knows up to {FORMAT_VERSION}; use a newer sledge",
                path.display()
            )));
        }
        Self::with_header(path, file, &header)
    }

    fn with_header(path: &Path, file: File, header: &[u8; HEADER_LEN as usize]) -> Result<Self, StoreError> {
        let id = header[16..].try_into().expect("the header ends with 16 bytes of id");
        let end = file.metadata().map_err(io_at("look at", path))?.len();
        let end = AtomicU64::new(end);
        let (poison, hot) = (Mutex::new(None), Hot::default());
        let log = Log { file, path: path.to_owned(), id, end, poison, unpacker: None, hot };
        let mut reader = log.reader(HEADER_LEN);
        let mut first = reader.next()?;
        if let Some(Step::Damaged { .. }) = first {
            first = reader.next()?; // the other dictionary, if there is one
        }
        let unpacker = match first {
            Some(Step::Record(_, _, Record::Dictionary(dictionary))) => Some(Unpacker::new(dictionary.to_vec())?),
            _ => None,
        };
        Ok(Log { unpacker, ..log })
    }

    /// The same log with room for records in memory.
    #[must_use]
    pub fn with_hot_bytes(self, bytes_max: usize) -> Self {
        Log { hot: Hot::new(bytes_max), ..self }
    }

    /// Records in memory; readers that do not come back to what they read leave it alone.
    pub fn hot(&self) -> &Hot {
        &self.hot
    }

    /// The dictionary of its packed records.
    pub fn dictionary(&self) -> Option<&[u8]> {
        self.unpacker.as_ref().map(Unpacker::dictionary)
    }

    /// Writes the header of a damaged log again, if there are sound records behind it. True when that was needed.
    ///
    /// # Errors
    /// When it is a log of a newer format, or nothing in the file shows that it is a log at all.
    pub fn mend_header(path: &Path) -> Result<bool, StoreError> {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(io_at("open", path))?;
        let mut bytes = [0; HEADER_LEN as usize];
        let no_log = || StoreError::Damaged(format!("{} holds no record of an event log", path.display()));
        match file.read_exact_at(&mut bytes, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(no_log()),
            read => read.map_err(io_at("read the header of", path))?,
        }
        let has_magic = bytes[..8] == *MAGIC;
        match version_in(&bytes) {
            1..=FORMAT_VERSION if has_magic => return Ok(false),
            version @ 2..=FORMAT_VERSION_MAX if has_magic => {
                return Err(StoreError::Damaged(format!("{} has log format {version}", path.display())));
            }
            _ => {}
        }
        let log = Self::with_header(path, file, &bytes)?;
        let mut reader = log.reader(HEADER_LEN);
        let mut has_record = false;
        while let Some(step) = reader.next()?
            && !has_record
        {
            has_record = matches!(step, Step::Record(..));
        }
        if !has_record {
            return Err(no_log());
        }
        log.file.write_all_at(&header(log.id), 0).map_err(io_at("write", path))?;
        log.sync()?;
        Ok(true)
    }

    /// Checks also those bytes of the header that reading does not depend on.
    ///
    /// # Errors
    /// When one of them is not as it was written.
    pub fn check_header(&self) -> Result<(), StoreError> {
        let mut bytes = Vec::new();
        self.read_bytes(0, HEADER_LEN as usize, &mut bytes)?;
        if bytes == header(self.id) { Ok(()) } else { Err(self.damaged(0)) }
    }

    /// Random mark of this log.
    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    /// How far the file reaches by now, which another process may be writing.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn file_len(&self) -> Result<u64, StoreError> {
        Ok(self.file.metadata().map_err(io_at("look at", &self.path))?.len())
    }

    /// Where the next record will begin.
    pub fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends whole records and waits until they are on the disk. Returns where they begin.
    ///
    /// # Errors
    /// [`StoreError::DiskFull`] leaves the log as it was. After a failed sync nobody knows what the disk holds, so
    /// the log takes no more writes.
    pub fn append(&self, records: &[u8]) -> Result<u64, StoreError> {
        self.check_writable()?;
        let start = self.end();
        fault::point("log.append");
        self.write_or_die_half_way("log.half_written", records, start)
            .map_err(|error| self.undo_append(start, error))?;
        fault::point("log.written");
        self.sync()?;
        fault::point("log.synced");
        self.end.store(start + records.len() as u64, Ordering::Release);
        Ok(start)
    }

    /// Appends whole records to a log that nobody relies on yet; [`Log::sync`] makes them durable.
    ///
    /// # Errors
    /// As [`Log::append`].
    pub fn append_unsynced(&self, records: &[u8]) -> Result<(), StoreError> {
        self.check_writable()?;
        let start = self.end();
        self.file.write_all_at(records, start).map_err(|error| self.undo_append(start, error))?;
        self.end.store(start + records.len() as u64, Ordering::Release);
        Ok(())
    }

    /// Overwrites events' records with erased ones, and waits for the disk.
    ///
    /// # Errors
    /// When the disk fails; the log then takes no more writes.
    pub fn erase(&self, records: &[Erasure]) -> Result<(), StoreError> {
        self.check_writable()?;
        fault::point("erase.begin");
        for Erasure { id, offset, len } in records {
            let bytes = record::erased(id, *len as usize);
            let written = self.write_or_die_half_way("erase.half_written", &bytes, *offset);
            written.map_err(|error| self.poison(&error))?;
        }
        self.hot.forget(records.iter().map(|erasure| erasure.offset));
        fault::point("erase.written");
        self.sync()
    }

    /// Cuts off what a broken write left behind `end`.
    ///
    /// # Errors
    /// When the file cannot be cut.
    pub fn cut(&self, end: u64) -> Result<(), StoreError> {
        self.file.set_len(end).map_err(io_at("cut", &self.path))?;
        self.file.sync_all().map_err(io_at("sync", &self.path))?;
        self.end.store(end, Ordering::Release);
        Ok(())
    }

    /// Reads the record at `offset` into `buffer`, which is best given room for it: `guess` is its expected length.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when there is no sound record.
    pub fn read<'b>(
        &self,
        offset: u64,
        guess: usize,
        buffer: &'b mut Vec<u8>,
    ) -> Result<(Record<'b>, u32), StoreError> {
        let (record, len) = self.read_packed(offset, guess, buffer)?;
        Ok((self.unpacked(record, offset)?, len))
    }

    /// As [`Log::read`], but a packed event stays packed: its header says what most questions are about.
    ///
    /// # Errors
    /// As [`Log::read`].
    pub fn read_packed<'b>(
        &self,
        offset: u64,
        guess: usize,
        buffer: &'b mut Vec<u8>,
    ) -> Result<(Record<'b>, u32), StoreError> {
        let mut want = guess.max(FRAME_LEN);
        let mut retries = 0;
        loop {
            self.read_bytes(offset, want, buffer)?;
            match record::check(buffer) {
                Ok(len) => {
                    return Ok((record::parse(buffer).ok_or_else(|| self.damaged(offset))?, len as u32));
                }
                Err(NotARecord::Short(need)) if need > buffer.len() && buffer.len() == want => want = need,
                Err(_) if retries < ERASE_RACE_RETRIES => {
                    retries += 1;
                    std::thread::yield_now();
                }
                Err(_) => return Err(self.damaged(offset)),
            }
        }
    }

    /// A packed event with its JSON; any other record as it is.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when it cannot be unpacked; `offset` is for the message.
    pub fn unpacked<'r>(&self, record: Record<'r>, offset: u64) -> Result<Record<'r>, StoreError> {
        let Record::Packed(packed) = record else { return Ok(record) };
        let json = self.unpacker.as_ref().and_then(|unpacker| unpacker.json(&packed));
        Ok(Record::Put(packed.header.with_json(json.ok_or_else(|| self.damaged(offset))?)))
    }

    /// The bytes of a sound record of known length, as they lie in the file.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when it is not sound.
    pub fn read_raw(&self, offset: u64, len: u32, buffer: &mut Vec<u8>) -> Result<(), StoreError> {
        self.read_bytes(offset, len as usize, buffer)?;
        if record::check(buffer) == Ok(len as usize) { Ok(()) } else { Err(self.damaged(offset)) }
    }

    /// Reads from `start` to the end, record by record; damage is stepped over and told.
    pub fn reader(&self, start: u64) -> LogReader<'_> {
        self.reader_until(start, self.end())
    }

    /// As [`Log::reader`], up to an earlier end.
    pub fn reader_until(&self, start: u64, end: u64) -> LogReader<'_> {
        LogReader { log: self, next: start, end, buffer: Vec::new(), buffer_start: start }
    }

    /// Up to `want` bytes at `offset`, sound or not; fewer at the end of the file.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read_bytes(&self, offset: u64, want: usize, buffer: &mut Vec<u8>) -> Result<(), StoreError> {
        buffer.resize(want, 0);
        let mut got = 0;
        while got < want {
            match self.file.read_at(&mut buffer[got..], offset + got as u64) {
                Ok(0) => break,
                Ok(n) => got += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(io_at("read", &self.path)(error)),
            }
        }
        buffer.truncate(got);
        Ok(())
    }

    /// Waits until what was written is on the disk.
    ///
    /// # Errors
    /// When the disk fails; the log then takes no more writes.
    pub fn sync(&self) -> Result<(), StoreError> {
        self.file.sync_data().map_err(|error| self.poison(&error))
    }

    /// Writes; at the fault point only the first half, and then the process ends.
    fn write_or_die_half_way(&self, point: &str, bytes: &[u8], offset: u64) -> io::Result<()> {
        if fault::is_due(point) {
            self.file.write_all_at(&bytes[..bytes.len() / 2], offset)?;
            std::process::abort();
        }
        self.file.write_all_at(bytes, offset)
    }

    fn undo_append(&self, start: u64, error: io::Error) -> StoreError {
        if let Err(cut_error) = self.file.set_len(start) {
            return self.poison(&cut_error);
        }
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                StoreError::DiskFull
            }
            _ => io_at("append to", &self.path)(error),
        }
    }

    fn poison(&self, error: &io::Error) -> StoreError {
        let reason = format!("{}: {error}", self.path.display());
        tracing::error!("event log: {reason}; no more writes until the next start");
        *self.poison.lock().expect("no panic while holding it") = Some(reason.clone());
        StoreError::Poisoned(reason)
    }

    /// Takes no more writes until the next start; reading goes on.
    pub fn stop_writes(&self, why: &str) {
        self.poison(&io::Error::other(why.to_owned()));
    }

    fn check_writable(&self) -> Result<(), StoreError> {
        match &*self.poison.lock().expect("no panic while holding it") {
            Some(reason) => Err(StoreError::Poisoned(reason.clone())),
            None => Ok(()),
        }
    }

    fn damaged(&self, offset: u64) -> StoreError {
        StoreError::Damaged(format!("{}: the record at byte {offset} is damaged", self.path.display()))
    }
}

/// A sequential reader; see [`Log::reader`].
#[derive(Debug)]
pub struct LogReader<'l> {
    log: &'l Log,
    next: u64,
    end: u64,
    buffer: Vec<u8>,
    buffer_start: u64,
}

impl LogReader<'_> {
    /// Where the next step begins.
    pub fn offset(&self) -> u64 {
        self.next
    }

    /// The next record or stretch of damage; `None` at the end.
    ///
    /// # Errors
    /// When the file cannot be read.
    #[allow(clippy::should_implement_trait, reason = "lends from its buffer")]
    pub fn next(&mut self) -> Result<Option<Step<'_>>, StoreError> {
        if self.next >= self.end {
            return Ok(None);
        }
        let offset = self.next;
        if !self.load(offset)? {
            return self.step_over_damage(offset).map(Some);
        }
        let at = (offset - self.buffer_start) as usize;
        let (record, len) = record::decode(&self.buffer[at..]).map_err(|_| self.log.damaged(offset))?;
        self.next = offset + len as u64;
        match self.log.unpacked(record, offset) {
            Ok(record) => Ok(Some(Step::Record(offset, len as u32, record))),
            Err(_) => Ok(Some(Step::Damaged { offset, len: len as u64 })),
        }
    }

    /// Appends the bytes of the record that the last step told, its padding as it ought to be.
    pub fn copy_record(&self, offset: u64, len: u32, out: &mut Vec<u8>) {
        let end = out.len() + len as usize;
        let at = (offset - self.buffer_start) as usize;
        let held = self.buffer.get(at..).unwrap_or_default();
        out.extend_from_slice(&held[..record::checked_len(held)]);
        out.resize(end, 0);
    }

    /// Makes the buffer hold the whole record at `offset`; false when there is none.
    fn load(&mut self, offset: u64) -> Result<bool, StoreError> {
        let mut want = READ_AHEAD_BYTES;
        loop {
            let at = (offset - self.buffer_start) as usize;
            let room = (self.end - offset) as usize;
            match record::decode(self.buffer.get(at..).unwrap_or_default()) {
                Ok((_, len)) => return Ok(len <= room),
                Err(NotARecord::Short(need)) if need <= room && need <= record::record_len(PAYLOAD_BYTES_MAX) => {
                    want = want.max(need).min(room);
                    self.log.read_bytes(offset, want, &mut self.buffer)?;
                    self.buffer_start = offset;
                    if self.buffer.len() < need {
                        return Ok(false);
                    }
                }
                Err(_) => return Ok(false),
            }
        }
    }

    /// Looks for the next sound record behind `offset`.
    fn step_over_damage(&mut self, offset: u64) -> Result<Step<'static>, StoreError> {
        let mut candidate = offset + ALIGN as u64;
        while candidate + FRAME_LEN as u64 <= self.end {
            if self.has_mark(candidate)? && self.load(candidate)? {
                self.next = candidate;
                return Ok(Step::Damaged { offset, len: candidate - offset });
            }
            candidate += ALIGN as u64;
        }
        self.next = self.end;
        Ok(Step::TornTail { offset, len: self.end - offset })
    }

    fn has_mark(&mut self, offset: u64) -> Result<bool, StoreError> {
        let held = self.buffer_start..self.buffer_start + self.buffer.len() as u64;
        if !held.contains(&offset) || !held.contains(&(offset + FRAME_LEN as u64 - 1)) {
            let want = READ_AHEAD_BYTES.min((self.end - offset) as usize);
            self.log.read_bytes(offset, want, &mut self.buffer)?;
            self.buffer_start = offset;
        }
        let at = (offset - self.buffer_start) as usize;
        Ok(self.buffer.get(at..at + record::MARK.len()) == Some(&record::MARK[..]))
    }
}

fn header(id: [u8; 16]) -> [u8; HEADER_LEN as usize] {
    let mut header = [0; HEADER_LEN as usize];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    header[16..].copy_from_slice(&id);
    header
}

fn version_in(header: &[u8; HEADER_LEN as usize]) -> u32 {
    u32::from_le_bytes([header[8], header[9], header[10], header[11]])
}

/// Turns an I/O error into one that says what was tried on which file.
pub fn io_at(what: &str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let what = format!("cannot {what} {}", path.display());
    move |source| match source.kind() {
        io::ErrorKind::StorageFull => StoreError::DiskFull,
        _ => StoreError::Io { what, source },
    }
}

#[cfg(test)]
mod tests;
