//! Settings: `sync.toml` read once, checked once, then plain data.
//!
//! The `sync.toml` at the top of the repository is built in and gives every default, so a user's file names only what
//! it changes. Nothing here imports the rest of the crate. A running relay goes by [`Live`] settings, of which a reload
//! replaces what can be changed while it runs.

mod access;
mod check;
mod client;
mod ip_range;
mod kind_range;
mod live;
mod members;
mod memory;
mod mirror;
mod operation;
mod plugin;
pub mod postgres;
mod rate;
mod read;
mod sync;
mod tls;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use access::{Access, PowRule, Writers};
pub use client::Client;
pub use ip_range::{IpRange, IpRangeError, subscriber_line};
pub use kind_range::{KindRange, KindRangeError};
pub use live::{Live, Reloaded, reload};
pub use members::{Members, Trust};
pub use memory::Memory;
pub use mirror::{Direction, Mirror};
pub use operation::Operation;
pub use plugin::{OnFailure, Plugin};
pub use postgres::Postgres;
pub use rate::Rate;
pub use read::{ConfigError, Origin};
pub use sync::Sync;
pub use tls::Tls;

/// The built-in `sync.toml`: every key with its default, and the reason in a comment.
pub const DEFAULTS: &str = include_str!("../sync.toml");

const MIB: usize = 1024 * 1024;

/// Memory of one index entry in the write buffer: key, value and its share of the ordered map's nodes.
const INDEX_ENTRY_BYTES: usize = 56;

/// Every setting of sledge. Defaults and reasons stand in [`DEFAULTS`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Data directory (see [`Config::store_dir`]), or the URL of a database (see [`postgres`]).
    pub store: String,
    /// Address and port to listen on.
    pub listen: SocketAddr,
    /// WebSocket URL under which clients reach this relay; empty when unknown.
    pub service_url: String,
    /// Other relays with which this one is kept equal.
    pub mirror: Vec<Mirror>,
    /// What is logged, and how.
    pub log: Log,
    /// What the relay tells about itself (NIP-11).
    pub info: Info,
    /// What one client may cost.
    pub limits: Limits,
    /// What one client may ask for a second.
    pub rate: Rate,
    /// A second port, encrypted.
    pub tls: Tls,
    /// What whoever looks after the relay gets to see.
    pub operation: Operation,
    /// Who may read and write.
    pub access: Access,
    /// Invitations and members.
    pub members: Members,
    /// The web of trust.
    pub trust: Trust,
    /// A program that judges events.
    pub plugin: Plugin,
    /// The memory budget.
    pub memory: Memory,
    /// How the store works.
    pub storage: Storage,
    /// What is kept, and for how long.
    pub retention: Retention,
    /// What reconciliation (NIP-77) may cost.
    pub sync: Sync,
    /// The user's own side of the sync engine.
    pub client: Client,
    /// A database instead of a directory.
    pub postgres: Postgres,
    /// Where these settings were read, for messages.
    #[serde(skip)]
    pub origin: Origin,
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// A level, or levels by module: `info,sledge=debug`.
    pub level: String,
    /// How a line looks.
    pub format: LogFormat,
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// `[info]`: the fields of NIP-11 that the operator fills in. An empty string leaves a field out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Info {
    /// Name of the relay.
    pub name: String,
    /// What the relay is for, plain text.
    pub description: String,
    /// The operator's public key as the file spells it: npub, nprofile or hex. The command line turns it into hex.
    pub pubkey: String,
    /// URI of another way to reach the operator.
    pub contact: String,
    /// URL of a square picture.
    pub icon: String,
    /// URL of a wide picture.
    pub banner: String,
    /// URL of the terms of service.
    pub terms_of_service: String,
}

/// `[limits]`: what one client may cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Open connections in all.
    pub connections_max: usize,
    /// Open connections from one address; 0 = no limit. Loopback and trusted proxies are exempt.
    pub connections_per_ip_max: usize,
    /// Peers whose forwarding headers are believed; see [`Limits::trusts_proxy`].
    pub trusted_proxies: Vec<IpRange>,
    /// From accepting a connection to a complete HTTP request, milliseconds.
    pub handshake_timeout_ms: u64,
    /// Silence of a client before it is pinged, seconds.
    pub idle_ping_secs: u64,
    /// Silence of a client before it is closed, seconds.
    pub idle_timeout_secs: u64,
    /// Time for a graceful stop, milliseconds.
    pub stop_timeout_ms: u64,
    /// Bytes of one WebSocket message (NIP-11 `max_message_length`).
    pub frame_bytes_max: usize,
    /// Whether messages are compressed for clients that can (RFC 7692).
    pub compress_messages: bool,
    /// Tags of one event (NIP-11 `max_event_tags`).
    pub event_tags_max: usize,
    /// Characters in the content of one event (NIP-11 `max_content_length`).
    pub content_chars_max: usize,
    /// Seconds an event may be dated ahead of now (NIP-11 `created_at_upper_limit`).
    pub created_at_ahead_secs_max: u64,
    /// Seconds an event may be dated back; 0 = no limit (NIP-11 `created_at_lower_limit`).
    pub created_at_behind_secs_max: u64,
    /// Unanswered EVENTs of one connection before its socket is not read.
    pub events_in_flight_max: usize,
    /// Open subscriptions of one connection (NIP-11 `max_subscriptions`).
    pub subscriptions_max: usize,
    /// List items in all open subscriptions of one connection.
    pub subscription_values_max: usize,
    /// Filters of one REQ or COUNT.
    pub filters_max: usize,
    /// List items in all filters of one REQ or COUNT.
    pub filter_values_max: usize,
    /// Largest `limit` of a filter (NIP-11 `max_limit`).
    pub limit_max: usize,
    /// `limit` of a filter that names none (NIP-11 `default_limit`).
    pub limit_default: usize,
    /// Threads that read for REQ and COUNT; 0 = by processor cores, see [`Limits::query_threads_on`].
    pub query_threads: usize,
    /// Running time of a query before others get their turn, milliseconds.
    pub query_slice_ms: u64,
    /// Running time of a query before it is closed, milliseconds.
    pub query_time_ms_max: u64,
    /// Bytes queued for one connection before it is closed as too slow.
    pub live_queue_bytes_max: usize,
}

/// `[storage]`: how the store works.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Storage {
    /// What keeps the index.
    pub index: IndexEngine,
    /// Events in one durable write.
    pub batch_events_max: usize,
    /// Events that wait for the writer.
    pub writer_queue_events_max: usize,
    /// Bytes of events that wait for the writer.
    pub writer_queue_bytes_max: usize,
    /// Index entries of one sorted run; 0 = by the budget, see [`Config::index_run_entries`].
    pub index_run_entries_max: usize,
    /// MiB of index pages in memory; 0 = by the budget, see [`Config::index_cache_bytes`].
    pub index_cache_mb: usize,
    /// MiB of records in memory that were read of late; 0 = by the budget, see [`Config::record_cache_bytes`].
    pub record_cache_mb: usize,
    /// Time in which the index must open before it is rebuilt, seconds.
    pub index_open_timeout_secs: u64,
    /// Time between sweeps for expired events, seconds.
    pub expiry_sweep_secs: u64,
    /// Share of the event log that must be dead before the relay compacts by itself; 1 = never.
    pub compact_dead_share: f64,
    /// MiB of the event log that must be dead before the relay compacts by itself.
    pub compact_dead_mb_min: u64,
    /// Share of the time in which compaction beside a serving relay works rather than rests.
    pub compact_share: f64,
    /// Whether compaction compresses what it keeps.
    pub compress: bool,
}

/// `[retention]`: what is kept, and for how long. See [`DEFAULTS`] for the order in which events are evicted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retention {
    /// MiB that live events and index may take; 0 = no limit.
    pub max_disk_mb: u64,
    /// Days after which an event is removed, counted from its `created_at`; 0 = never.
    pub max_age_days: u64,
    /// Public keys, npub or hex, whose events are never evicted.
    pub keep: Vec<String>,
    /// Rules of their own for some kinds; the first that names a kind holds.
    pub rules: Vec<RetentionRule>,
}

/// One of `retention.rules`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetentionRule {
    /// The kinds it is for.
    pub kinds: Vec<KindRange>,
    /// As [`Retention::max_age_days`], for these kinds; that one holds when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_age_days: Option<u64>,
    /// Whether the quota may evict these kinds.
    #[serde(default = "evict_by_default")]
    pub evict: bool,
}

fn evict_by_default() -> bool {
    true
}

/// What keeps the index on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IndexEngine {
    /// sled 1.0 alpha.
    Sled,
    /// The LSM tree of fjall.
    Fjall,
}

impl Default for Config {
    /// The settings of [`DEFAULTS`].
    fn default() -> Config {
        Config::parse(DEFAULTS, None).expect("the built-in sync.toml is valid: a test reads it")
    }
}

impl Config {
    /// Reads the file that `named` (`--config`) or `SLEDGE_CONFIG` names, else `./sync.toml`, else
    /// `/etc/sledge/sync.toml`, else the built-in defaults.
    ///
    /// # Errors
    /// [`ConfigError`] when a named or existing file cannot be read, or says something that does not hold.
    pub fn load(named: Option<&Path>) -> Result<Config, ConfigError> {
        let from_env = std::env::var_os("SLEDGE_CONFIG").map(PathBuf::from);
        match read::locate(named, from_env, Path::exists) {
            Some(file) => Config::load_file(&file),
            None => Ok(Config::default()),
        }
    }

    /// Reads exactly this file.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn load_file(file: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(file)
            .map_err(|source| ConfigError::Unreadable { file: file.to_owned(), source })?;
        Config::parse(&text, Some(file))
    }

    /// Reads settings from `text`; keys it does not name keep their defaults. `file` is for messages only.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`], naming file, line and key.
    pub fn parse(text: &str, file: Option<&Path>) -> Result<Config, ConfigError> {
        let mut config = read::parse(text, file)?;
        config.lower_unset_defaults();
        check::check(&config)?;
        Ok(config)
    }

    /// Lowers what the user did not set to what the user did: whoever asks for smaller answers need not know of both keys.
    fn lower_unset_defaults(&mut self) {
        if self.origin.line("limits.limit_default").is_none() {
            self.limits.limit_default = self.limits.limit_default.min(self.limits.limit_max);
        }
    }

    /// An error about the value of `key` (`"log.level"`), naming the place where the user set it. For checks that need
    /// more of the crate than this module may import.
    pub fn refuse(&self, key: &str, problem: impl Into<String>) -> ConfigError {
        self.origin.refuse(Some(key), problem)
    }

    /// The data directory.
    pub fn store_dir(&self) -> &Path {
        Path::new(&self.store)
    }

    /// The directory in which commands find the relay that has the store.
    pub fn control_dir(&self) -> &Path {
        match postgres::is_database(&self.store) {
            true => Path::new(&self.postgres.control_dir),
            false => self.store_dir(),
        }
    }

    /// Index entries that one run of the write buffer holds.
    pub fn index_run_entries(&self) -> usize {
        match self.storage.index_run_entries_max {
            0 => self.memory.budget_bytes() / 8 / INDEX_ENTRY_BYTES,
            entries => entries,
        }
    }

    /// Bytes of records that were read of late, kept in memory.
    pub fn record_cache_bytes(&self) -> usize {
        match self.storage.record_cache_mb {
            0 => self.memory.budget_bytes() / 16,
            mib => mib_to_bytes(mib),
        }
    }

    /// Bytes of index pages kept in memory.
    pub fn index_cache_bytes(&self) -> usize {
        match self.storage.index_cache_mb {
            0 => self.memory.budget_bytes() / 4,
            mib => mib_to_bytes(mib),
        }
    }
}

/// Saturating, since 64 GiB do not fit the address space of a 32-bit Pi.
fn mib_to_bytes(mib: usize) -> usize {
    mib.saturating_mul(MIB)
}

impl Limits {
    /// Is this peer a proxy whose forwarding headers are believed?
    pub fn trusts_proxy(&self, peer: std::net::IpAddr) -> bool {
        self.trusted_proxies.iter().any(|range| range.contains(peer))
    }

    /// Query threads on a machine with this many processor cores.
    pub fn query_threads_on(&self, cores: usize) -> usize {
        match self.query_threads {
            0 => cores.clamp(2, 8),
            threads => threads,
        }
    }

    /// From accepting a connection to a complete HTTP request.
    pub fn handshake_timeout(&self) -> Duration {
        Duration::from_millis(self.handshake_timeout_ms)
    }

    /// Silence of a client before it is pinged.
    pub fn idle_ping(&self) -> Duration {
        Duration::from_secs(self.idle_ping_secs)
    }

    /// Silence of a client before it is closed.
    pub fn idle_timeout(&self) -> Duration {
        Duration::from_secs(self.idle_timeout_secs)
    }

    /// Time for a graceful stop.
    pub fn stop_timeout(&self) -> Duration {
        Duration::from_millis(self.stop_timeout_ms)
    }

    /// Running time of a query before others get their turn.
    pub fn query_slice(&self) -> Duration {
        Duration::from_millis(self.query_slice_ms)
    }

    /// Running time of a query before it is closed.
    pub fn query_time_max(&self) -> Duration {
        Duration::from_millis(self.query_time_ms_max)
    }
}

impl Storage {
    /// Time in which the index must open before it is rebuilt.
    pub fn index_open_timeout(&self) -> Duration {
        Duration::from_secs(self.index_open_timeout_secs)
    }

    /// Bytes of the event log that must be dead before the relay compacts by itself.
    pub fn compact_dead_bytes_min(&self) -> u64 {
        self.compact_dead_mb_min.saturating_mul(MIB as u64)
    }

    /// Time between sweeps for expired events.
    pub fn expiry_sweep(&self) -> Duration {
        Duration::from_secs(self.expiry_sweep_secs)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// The built-in file is valid and complete, so `Config::default` cannot panic, and its prose agrees with it.
    #[test]
    fn the_built_in_file_is_valid_and_complete() {
        let config = Config::parse(DEFAULTS, None).unwrap();
        assert_eq!(config.store_dir(), Path::new("sledge-data"));
        assert_eq!(config.listen.to_string(), "127.0.0.1:7777");
        assert_eq!(config.limits.stop_timeout(), Duration::from_secs(5));
        assert_eq!(config.log.format, LogFormat::Text);
    }

    /// Every key has its unit and reason directly above it.
    #[test]
    fn every_key_has_a_comment_above_it() {
        let lines: Vec<&str> = DEFAULTS.lines().collect();
        let keys = lines
            .iter()
            .enumerate()
            .filter(|(_, line)| line.contains(" = ") && !line.starts_with('#') && !line.starts_with('['));
        let mut seen = 0;
        for (at, line) in keys {
            assert!(lines[at - 1].starts_with("# "), "no comment above: {line}");
            seen += 1;
        }
        let shown = toml::to_string(&Config::default()).unwrap();
        let fields = shown.lines().filter(|line| line.contains(" = ")).count();
        assert_eq!(seen, fields, "a key of the file was not looked at");
    }

    /// What `config show` prints is itself a file that gives the same settings.
    #[test]
    fn settings_survive_a_round_trip_through_toml() {
        let mut config = Config::default();
        config.limits.limit_default = 77;
        config.limits.trusted_proxies = vec!["10.0.0.0/8".parse().unwrap()];
        let mut back = Config::parse(&toml::to_string(&config).unwrap(), None).unwrap();
        back.origin = Origin::default();
        config.origin = Origin::default();
        assert_eq!(back, config);
    }

    /// 0 follows the memory budget; a number of one's own stands.
    #[test]
    fn derived_values_follow_the_budget_or_the_users_number() {
        let mut config = Config::default();
        assert_eq!(config.index_cache_bytes(), config.memory.budget_bytes() / 4);
        config.memory.budget_mb = 256;
        assert_eq!(config.index_cache_bytes(), 64 * MIB);
        assert_eq!(config.index_run_entries(), 599_186);
        config.memory.budget_mb = 64;
        assert_eq!(config.index_cache_bytes(), 16 * MIB);
        assert_eq!(config.record_cache_bytes(), 4 * MIB);
        assert_eq!(config.index_run_entries(), 149_796);
        (config.storage.index_cache_mb, config.storage.record_cache_mb) = (5, 3);
        config.storage.index_run_entries_max = 9_000;
        assert_eq!(config.index_cache_bytes(), 5 * MIB);
        assert_eq!(config.record_cache_bytes(), 3 * MIB);
        assert_eq!(config.index_run_entries(), 9_000);
    }

    /// A single core still gets two threads, so that one long query never blocks a short one.
    #[test]
    fn query_threads_follow_the_cores_within_bounds() {
        let mut limits = Config::default().limits;
        assert_eq!([1, 4, 64].map(|cores| limits.query_threads_on(cores)), [2, 4, 8]);
        limits.query_threads = 1;
        assert_eq!(limits.query_threads_on(4), 1);
    }

    /// Loopback is the usual place of a proxy; anybody else is not believed.
    #[test]
    fn only_loopback_is_a_trusted_proxy_by_default() {
        let limits = Config::default().limits;
        let trusts = |ip: &str| limits.trusts_proxy(ip.parse().unwrap());
        assert!(trusts("127.0.0.1") && trusts("::1") && trusts("::ffff:127.0.0.1"));
        assert!(!trusts("192.168.1.1") && !trusts("fe80::1"));
    }
}
