//! What the commands do alike with the store: open it with progress, read it page by page, close it, and say what went
//! wrong and what to do.

use std::ops::Deref;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::progress::{self, size};
use crate::config::postgres::{is_database, without_password};
use crate::config::{Config, IndexEngine};
use crate::error::Error;
use crate::protocol::{Filter, Visibility};
use crate::store::dir::DataDir;
use crate::store::embedded::{EmbeddedStore, Options};
use crate::store::index::Engine;
use crate::store::quota::Rules;
use crate::store::{PageBudget, Progress, Query, Row, Store, StoreError, Wanted};

/// Bytes of event JSON read in one go; one event may exceed it.
const PAGE_BYTES_MAX: usize = 1024 * 1024;

/// How long one page may take. Nobody else waits for this process, so it only has to be some bound.
const PAGE_TIME_MAX: Duration = Duration::from_secs(60);

/// How long a command may take to bring the index up to its writes. Past that the next start does it.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(60);

/// A store that this process has open.
#[derive(Clone)]
pub struct Opened {
    store: Arc<dyn Store>,
    /// The same, if it is in a directory.
    embedded: Option<Arc<EmbeddedStore>>,
    /// The directory of the control socket, for a database that this process serves.
    control: Option<Arc<DataDir>>,
}

impl Opened {
    /// The store, to be kept.
    pub fn store(&self) -> Arc<dyn Store> {
        self.store.clone()
    }

    /// The store in its directory, if it is in one.
    pub fn in_directory(&self) -> Option<&Arc<EmbeddedStore>> {
        self.embedded.as_ref()
    }

    /// The store in its directory, for what only such a one can do.
    ///
    /// # Errors
    /// [`Error::Usage`] for a database.
    pub fn embedded(&self) -> Result<&Arc<EmbeddedStore>, Error> {
        self.in_directory().ok_or_else(only_for_directories)
    }

    /// Says in a directory what this process does, for the message that others get. Nothing depends on it.
    pub fn describe_owner(&self, text: &str) {
        let said = match (&self.embedded, &self.control) {
            (Some(store), _) => store.describe_owner(text),
            (None, Some(dir)) => dir.describe_owner(text),
            (None, None) => Ok(()),
        };
        if let Err(error) = said {
            tracing::warn!(%error, "other commands will not find this process");
        }
    }

    /// Takes the directory in which commands are to find this relay: of a store in a directory that is its own. A
    /// database can be served without.
    pub fn take_control_dir(&mut self, config: &Config) {
        if self.embedded.is_none() {
            let taken = DataDir::take(config.control_dir());
            let why = "commands will not reach this relay; see postgres.control_dir";
            self.control = taken.map(Arc::new).inspect_err(|error| tracing::warn!("{why}: {error}")).ok();
        }
    }

    /// Where this relay listens for commands.
    pub fn control_dir(&self) -> Option<PathBuf> {
        let of_database = || self.control.as_ref().map(|dir| dir.path().to_owned());
        self.embedded.as_ref().map(|store| store.path()).or_else(of_database)
    }
}

impl From<Arc<EmbeddedStore>> for Opened {
    fn from(store: Arc<EmbeddedStore>) -> Self {
        Opened { store: store.clone(), embedded: Some(store), control: None }
    }
}

impl Deref for Opened {
    type Target = dyn Store;

    fn deref(&self) -> &Self::Target {
        &*self.store
    }
}

/// Who can answer for the store of the settings.
pub enum Access {
    /// This process. Nobody else has it, but for a database.
    Own(Opened),
    /// A relay that runs here and has it, by its WebSocket URL.
    Relay(String),
}

/// Opens the store, making an empty one where there is none.
///
/// # Errors
/// [`Error::Failed`] when it is in use or cannot be opened.
pub fn open_or_create(config: &Config) -> Result<Arc<EmbeddedStore>, Error> {
    check_is_directory(config)?;
    open(config).map_err(|error| failed(config, error))
}

/// Opens whatever `store` names, a directory or a database.
///
/// # Errors
/// [`Error::Failed`] when it cannot be opened, [`Error::Usage`] when it is neither.
pub fn open_any(config: &Config) -> Result<Opened, Error> {
    match is_database(&config.store) {
        true => open_database(config),
        false => open_or_create(config).map(Opened::from),
    }
}

#[cfg(feature = "postgres")]
fn open_database(config: &Config) -> Result<Opened, Error> {
    use crate::store::postgres::{Options, PostgresStore};
    let options = Options { retention: retention(config), ..Options::of(config, &config.store) };
    let store = PostgresStore::open(&options).map_err(|error| failed(config, error))?;
    Ok(Opened { store: Arc::new(store), embedded: None, control: None })
}

#[cfg(not(feature = "postgres"))]
fn open_database(_config: &Config) -> Result<Opened, Error> {
    Err(Error::Usage(
        "--store postgres://…: this build keeps events in a directory only; build it with `--features postgres`, or name \
         a directory"
            .to_owned(),
    ))
}

/// As [`open_any`], but where a running relay has the store, tells how to reach it.
///
/// # Errors
/// [`Error::Failed`] when it is in use by something else or cannot be opened.
pub fn open_or_reach(config: &Config) -> Result<Access, Error> {
    if is_database(&config.store) {
        return open_database(config).map(Access::Own);
    }
    check_is_directory(config)?;
    match open(config) {
        Ok(store) => Ok(Access::Own(store.into())),
        Err(error @ StoreError::InUse(_)) => match owner_url(config) {
            Some(url) => Ok(Access::Relay(url)),
            None => Err(failed(config, error)),
        },
        Err(error) => Err(failed(config, error)),
    }
}

/// As [`open_or_reach`], for what concerns the relay more than the events: where one that runs on this machine has a
/// database, it is that relay's to answer.
///
/// # Errors
/// As [`open_or_reach`].
pub fn reach_or_open(config: &Config) -> Result<Access, Error> {
    match owner_url(config).filter(|_| is_database(&config.store)) {
        Some(url) => Ok(Access::Relay(url)),
        None => open_or_reach(config),
    }
}

/// Runs `work` on a store that must be there already, and closes it whatever comes of that.
///
/// # Errors
/// Those of `work`, else those of opening and closing.
pub fn with_existing<T>(config: &Config, work: impl FnOnce(&Opened) -> Result<T, Error>) -> Result<T, Error> {
    must_exist(config)?;
    let store = open_any(config)?;
    with_open(config, &store, work)
}

/// Runs `work` on an open store, and closes it whatever comes of that.
///
/// # Errors
/// Those of `work`, else those of closing.
pub fn with_open<T, E: From<Error>>(
    config: &Config,
    store: &Opened,
    work: impl FnOnce(&Opened) -> Result<T, E>,
) -> Result<T, E> {
    let result = work(store);
    let closed = store.close(Instant::now() + CLOSE_TIME_MAX);
    let value = result?;
    closed.map_err(|error| failed(config, error))?;
    Ok(value)
}

/// Refuses a directory that holds no store: whoever reads or deletes means one that is there, and a misspelt `--store`
/// must not look like an empty one.
///
/// # Errors
/// [`Error::Failed`], naming the directory.
pub fn must_exist(config: &Config) -> Result<(), Error> {
    if is_database(&config.store) {
        // A database is not made by opening it, so a misspelt one is found out then.
        return Ok(());
    }
    check_is_directory(config)?;
    let dir = config.store_dir();
    if dir.join("CURRENT").is_file() {
        return Ok(());
    }
    Err(Error::Failed(format!(
        "there is no store in {}; name its directory with --store, or make one with `sledge import` or `sledge serve`",
        dir.display()
    )))
}

/// Refuses a store that is no directory.
///
/// # Errors
/// [`Error::Usage`].
pub fn check_is_directory(config: &Config) -> Result<(), Error> {
    match config.store.split_once("://") {
        Some(_) if is_database(&config.store) => Err(only_for_directories()),
        Some((scheme, _)) => {
            Err(Error::Usage(format!("--store {scheme}://…: a store is a directory, or a database at postgres://…")))
        }
        None => Ok(()),
    }
}

fn only_for_directories() -> Error {
    Error::Usage(
        "this is for a store in a directory; a database has tools of its own, such as pg_dump and VACUUM".to_owned(),
    )
}

/// The store as messages name it.
pub fn shown(config: &Config) -> String {
    match is_database(&config.store) {
        true => without_password(&config.store),
        false => config.store_dir().display().to_string(),
    }
}

fn open(config: &Config) -> Result<Arc<EmbeddedStore>, StoreError> {
    opening(config, |options| EmbeddedStore::open(config.store_dir(), options)).map(Arc::new)
}

/// Gives what the settings say about opening to `open`; a bar is drawn where there is much of the log to be read.
///
/// # Errors
/// Those of `open`.
pub fn opening<T>(config: &Config, open: impl FnOnce(&Options) -> Result<T, StoreError>) -> Result<T, StoreError> {
    let bar: Arc<OnceLock<ProgressBar>> = Arc::default();
    let drawn = Arc::clone(&bar);
    let options = Options {
        engine: engine(config),
        run_entries_max: config.index_run_entries(),
        cache_bytes: config.index_cache_bytes() as u64,
        hot_bytes: config.record_cache_bytes(),
        index_open_timeout: config.storage.index_open_timeout(),
        compress: config.storage.compress,
        retention: retention(config),
        progress: Arc::new(move |done, total| {
            drawn.get_or_init(|| progress::bytes("reading the event log", Some(total))).set_position(done);
        }),
    };
    let opened = open(&options);
    // The store keeps the options, and so the bar.
    if let Some(bar) = bar.get() {
        bar.finish_and_clear();
    }
    opened
}

fn engine(config: &Config) -> Engine {
    match config.storage.index {
        IndexEngine::Sled => Engine::Sled,
        IndexEngine::Fjall => Engine::Fjall,
    }
}

/// The rules of the settings, whose keys were looked at when they were read.
fn retention(config: &Config) -> Rules {
    Rules::new(&config.retention).unwrap_or_else(|(key, error)| {
        tracing::error!("retention.keep: {key}: {error}; nothing is evicted");
        Rules::default()
    })
}

/// The address of the relay that has the store, from what it says of itself.
fn owner_url(config: &Config) -> Option<String> {
    let owner = DataDir::owner(config.control_dir())?;
    owner.split_whitespace().find(|word| word.starts_with("ws://")).map(str::to_owned)
}

/// A store's error as the user's: which directory, what happened, what to do.
pub fn failed(config: &Config, error: StoreError) -> Error {
    let dir = shown(config);
    Error::Failed(match &error {
        StoreError::DiskFull => {
            format!("the disk that holds {dir} is full; free some space, or move the directory to a larger disk")
        }
        StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
            format!("{error}; run as the user who owns {dir}, or name another directory with --store")
        }
        StoreError::NoRoom { needed_bytes, free_bytes } => format!(
            "this needs {} on the disk that holds {dir}, and {} are free; make room and try again",
            size(*needed_bytes),
            size(*free_bytes)
        ),
        StoreError::QuotaUsedUp => format!(
            "the quota for {dir} is used up and nothing may be evicted; raise `max_disk_mb` or lower what [retention] keeps"
        ),
        StoreError::Poisoned(_) => format!("writing to {dir} failed: {error}"),
        _ => error.to_string(),
    })
}

/// Calls `each` for every event that one of the filters matches, newest first; their limits hold.
///
/// # Errors
/// The first of `each`; [`Error::Failed`] when the store cannot be read.
pub fn for_each_row(
    config: &Config,
    store: &dyn Store,
    query: Query,
    mut each: impl FnMut(&Row) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut scan = store.scan(query).map_err(|error| failed(config, error))?;
    let mut rows = Vec::new();
    loop {
        let budget = PageBudget { bytes_max: PAGE_BYTES_MAX, until: Instant::now() + PAGE_TIME_MAX };
        let progress = scan.page(budget, &mut rows).map_err(|error| failed(config, error))?;
        rows.iter().try_for_each(&mut each)?;
        rows.clear();
        if progress != Progress::Paused {
            return Ok(());
        }
    }
}

/// The query that asks for these filters; one without a limit asks for every match.
pub fn query(filters: impl IntoIterator<Item = Filter>, now: u64) -> Query {
    let wanted = |filter: Filter| {
        let limit = filter.limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
        Wanted { filter, limit, whole_seconds: false }
    };
    let wanted = filters.into_iter().map(wanted).filter(|wanted| wanted.limit > 0);
    Query {
        wanted: wanted.filter(|wanted| !wanted.filter.matches_nothing()).collect(),
        now,
        before: None,
        visible: Visibility::everything(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn config_for(store: &std::path::Path) -> Config {
        Config { store: store.to_str().unwrap().to_owned(), ..Config::default() }
    }

    /// A misspelt directory is named and not made.
    #[test]
    fn a_missing_store_is_named_and_not_made() {
        let folder = tempfile::tempdir().unwrap();
        let config = config_for(&folder.path().join("misspelt"));
        let error = with_existing(&config, |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("misspelt") && error.to_string().contains("--store"), "{error}");
        assert!(!config.store_dir().exists());
    }

    /// Whoever has the store is reached if it says where, and named if not.
    #[test]
    fn an_owner_with_an_address_is_reached_and_another_named() {
        let folder = tempfile::tempdir().unwrap();
        let config = config_for(folder.path());
        let owner = open_or_create(&config).unwrap();
        owner.describe_owner("sledge import (process 7)").unwrap();
        let error = open_or_reach(&config).map(drop).unwrap_err().to_string();
        assert!(error.contains("in use by sledge import (process 7)"), "{error}");
        owner.describe_owner("sledge serve (process 7) on ws://127.0.0.1:7777").unwrap();
        match open_or_reach(&config).unwrap() {
            Access::Relay(url) => assert_eq!(url, "ws://127.0.0.1:7777"),
            Access::Own(_) => panic!("two owners"),
        }
        let error = with_existing(&config, |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("ws://127.0.0.1:7777; stop it first"), "{error}");
    }

    /// Whatever failed, the directory is named and a way out.
    #[test]
    fn errors_name_the_directory() {
        let config = config_for(std::path::Path::new("my-store"));
        let denied = std::io::ErrorKind::PermissionDenied.into();
        for error in [
            StoreError::DiskFull,
            StoreError::NoRoom { needed_bytes: 5 << 20, free_bytes: 1 << 20 },
            StoreError::Io { what: "open LOCK".to_owned(), source: denied },
            StoreError::Poisoned("EIO".to_owned()),
        ] {
            let failed = failed(&config, error);
            assert!(failed.to_string().contains("my-store"), "{failed}");
            assert_eq!(failed.exit_code(), 1);
        }
    }

    /// Without the feature a database is refused with what to do.
    #[cfg(not(feature = "postgres"))]
    #[test]
    fn a_build_without_databases_says_so() {
        let config = Config { store: "postgres://localhost/x".to_owned(), ..Config::default() };
        let error = open_any(&config).map(drop).unwrap_err();
        assert!(error.to_string().contains("--features postgres"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }

    /// A URL is no directory to be made.
    #[test]
    fn a_url_is_no_directory() {
        let config = Config { store: "postgres://localhost/x".to_owned(), ..Config::default() };
        assert_eq!(open_or_create(&config).map(drop).unwrap_err().exit_code(), 2);
    }
}
