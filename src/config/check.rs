//! Values that have the right type but cannot work.

use std::ops::RangeInclusive;

use super::memory::BUDGET_MB_MIN;
use super::{Config, ConfigError, access, members, plugin};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const DAY_SECS: u64 = 24 * 60 * 60;
/// Rules, and kinds or ranges in one of them.
const RULES_MAX: usize = 64;
const AGE_DAYS_MAX: u64 = 36_525;
const HUNDRED_YEARS_SECS: u64 = 36_525 * DAY_SECS;

/// Checks each number against its range, then numbers against each other.
pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    for (key, value, range) in ranges(config) {
        if !range.contains(&value) {
            let (low, high) = (range.start(), range.end());
            return Err(config.refuse(key, format!("must be from {low} to {high}, not {value}")));
        }
    }
    if config.store.is_empty() {
        return Err(config.refuse("store", "must name a directory"));
    }
    check_budget(config)?;
    check_shares(config)?;
    check_rules(config)?;
    super::mirror::check(config)?;
    super::access::check(config)?;
    super::client::check(config)?;
    super::postgres::check(config)?;
    check_relations(config)?;
    if let Err(error) = config.tls.addr() {
        return Err(config.refuse("tls.listen", format!("{error}; an address and a port, or \"\"")));
    }
    if let Some(key) = config.tls.missing() {
        return Err(config.refuse(key, "must name a file where tls.listen names an address"));
    }
    if let Err(error) = config.operation.metrics_addr() {
        return Err(config.refuse("operation.metrics_listen", format!("{error}; an address and a port, or \"\"")));
    }
    check_service_url(config)
}

/// A number of the settings: its key, its value, and what it may be.
pub(super) type Range = (&'static str, u64, RangeInclusive<u64>);

/// The range of every number.
fn ranges(config: &Config) -> Vec<Range> {
    let lists = [
        limit_ranges,
        rate_ranges,
        operation_ranges,
        access::ranges,
        members::ranges,
        plugin::ranges,
        sync_ranges,
        client_ranges,
        storage_ranges,
        retention_ranges,
        postgres_ranges,
    ];
    lists.iter().flat_map(|list| list(config)).collect()
}

fn limit_ranges(config: &Config) -> Vec<Range> {
    let l = &config.limits;
    vec![
        ("limits.connections_max", l.connections_max as u64, 1..=1_000_000),
        ("limits.connections_per_ip_max", l.connections_per_ip_max as u64, 0..=1_000_000),
        ("limits.handshake_timeout_ms", l.handshake_timeout_ms, 100..=600_000),
        ("limits.idle_ping_secs", l.idle_ping_secs, 1..=DAY_SECS),
        ("limits.idle_timeout_secs", l.idle_timeout_secs, 2..=DAY_SECS),
        ("limits.stop_timeout_ms", l.stop_timeout_ms, 100..=600_000),
        // Below this not even small contact lists pass; above it one message is a good part of a Pi's memory.
        ("limits.frame_bytes_max", l.frame_bytes_max as u64, 4 * KIB..=8 * MIB),
        ("limits.event_tags_max", l.event_tags_max as u64, 1..=1_000_000),
        ("limits.content_chars_max", l.content_chars_max as u64, 1..=16 * MIB),
        ("limits.created_at_ahead_secs_max", l.created_at_ahead_secs_max, 0..=HUNDRED_YEARS_SECS),
        ("limits.created_at_behind_secs_max", l.created_at_behind_secs_max, 0..=HUNDRED_YEARS_SECS),
        ("limits.events_in_flight_max", l.events_in_flight_max as u64, 1..=65_536),
        ("limits.subscriptions_max", l.subscriptions_max as u64, 1..=10_000),
        ("limits.subscription_values_max", l.subscription_values_max as u64, 1..=10_000_000),
        ("limits.filters_max", l.filters_max as u64, 1..=1_000),
        ("limits.filter_values_max", l.filter_values_max as u64, 1..=1_000_000),
        ("limits.limit_max", l.limit_max as u64, 1..=1_000_000),
        ("limits.limit_default", l.limit_default as u64, 1..=1_000_000),
        ("limits.query_threads", l.query_threads as u64, 0..=256),
        ("limits.query_slice_ms", l.query_slice_ms, 1..=10_000),
        ("limits.query_time_ms_max", l.query_time_ms_max, 1..=3_600_000),
        ("limits.live_queue_bytes_max", l.live_queue_bytes_max as u64, 8 * KIB..=1024 * MIB),
    ]
}

fn storage_ranges(config: &Config) -> Vec<Range> {
    let s = &config.storage;
    vec![
        ("memory.budget_mb", config.memory.budget_mb as u64, 0..=65_536),
        ("storage.batch_events_max", s.batch_events_max as u64, 1..=65_536),
        ("storage.writer_queue_events_max", s.writer_queue_events_max as u64, 1..=1_000_000),
        ("storage.writer_queue_bytes_max", s.writer_queue_bytes_max as u64, 4 * KIB..=1024 * MIB),
        ("storage.index_run_entries_max", s.index_run_entries_max as u64, 0..=50_000_000),
        ("storage.index_cache_mb", s.index_cache_mb as u64, 0..=65_536),
        ("storage.record_cache_mb", s.record_cache_mb as u64, 0..=65_536),
        ("storage.index_open_timeout_secs", s.index_open_timeout_secs, 1..=DAY_SECS),
        ("storage.expiry_sweep_secs", s.expiry_sweep_secs, 1..=DAY_SECS),
        ("storage.compact_dead_mb_min", s.compact_dead_mb_min, 0..=MIB),
    ]
}

fn rate_ranges(config: &Config) -> Vec<Range> {
    let r = &config.rate;
    let mut ranges = vec![("rate.ban_secs", r.ban_secs, 1..=30 * DAY_SECS)];
    for (speed_key, speed, burst_key, burst) in [
        ("rate.events_per_sec", r.events_per_sec, "rate.events_burst", r.events_burst),
        ("rate.bytes_per_sec", r.bytes_per_sec, "rate.bytes_burst", r.bytes_burst),
        ("rate.reqs_per_sec", r.reqs_per_sec, "rate.reqs_burst", r.reqs_burst),
        ("rate.query_ms_per_sec", r.query_ms_per_sec, "rate.query_ms_burst", r.query_ms_burst),
        ("rate.garbage_per_sec", r.garbage_per_sec, "rate.garbage_burst", r.garbage_burst),
    ] {
        ranges.extend([(speed_key, speed, 0..=MIB * KIB), (burst_key, burst, 1..=MIB * KIB)]);
    }
    ranges
}

fn operation_ranges(config: &Config) -> Vec<Range> {
    vec![("operation.slow_query_ms", config.operation.slow_query_ms, 0..=3_600_000)]
}

fn postgres_ranges(config: &Config) -> Vec<Range> {
    let p = &config.postgres;
    vec![
        ("postgres.connections_max", p.connections_max as u64, 1..=1_000),
        ("postgres.timeout_ms", p.timeout_ms, 100..=600_000),
        ("postgres.start_timeout_secs", p.start_timeout_secs, 0..=DAY_SECS),
        ("postgres.poll_ms", p.poll_ms, 10..=600_000),
    ]
}

fn retention_ranges(config: &Config) -> Vec<Range> {
    let r = &config.retention;
    vec![
        ("retention.max_disk_mb", r.max_disk_mb, 0..=MIB * MIB),
        ("retention.max_age_days", r.max_age_days, 0..=AGE_DAYS_MAX),
    ]
}

fn sync_ranges(config: &Config) -> Vec<Range> {
    let s = &config.sync;
    vec![
        ("sync.sessions_max", s.sessions_max as u64, 0..=1_000),
        ("sync.session_records_max", s.session_records_max as u64, 0..=100_000_000),
        ("sync.records_max", s.records_max as u64, 0..=1_000_000_000),
        ("sync.session_idle_secs", s.session_idle_secs, 1..=DAY_SECS),
        // The smallest message of the protocol, in hex.
        ("sync.message_bytes_max", s.message_bytes_max as u64, 8 * KIB..=8 * MIB),
    ]
}

fn client_ranges(config: &Config) -> Vec<Range> {
    let c = &config.client;
    vec![
        ("client.outbox_mb_max", c.outbox_mb_max, 1..=MIB),
        ("client.cache_mb_warn", c.cache_mb_warn, 1..=MIB),
        ("client.memory_mb", c.memory_mb as u64, 1..=65_536),
        ("client.visit_timeout_secs", c.visit_timeout_secs, 1..=DAY_SECS),
        ("client.connect_timeout_ms", c.connect_timeout_ms, 100..=600_000),
        ("client.idle_ping_secs", c.idle_ping_secs, 1..=DAY_SECS),
        ("client.idle_timeout_secs", c.idle_timeout_secs, 2..=DAY_SECS),
        ("client.answer_timeout_secs", c.answer_timeout_secs, 1..=DAY_SECS),
        ("client.reconnect_first_ms", c.reconnect_first_ms, 1..=3_600_000),
        ("client.reconnect_max_ms", c.reconnect_max_ms, 1..=3_600_000),
        ("client.message_bytes_max", c.message_bytes_max as u64, 64 * KIB..=64 * MIB),
        ("client.queue_messages_max", c.queue_messages_max as u64, 1..=10_000),
    ]
}

/// Every event that comes in is held against each rule, and each age is a walk of its own through the index.
fn check_rules(config: &Config) -> Result<(), ConfigError> {
    let rules = &config.retention.rules;
    if rules.len() > RULES_MAX {
        return Err(config.refuse("retention.rules", format!("at most {RULES_MAX} rules, not {}", rules.len())));
    }
    for (number, rule) in (1..).zip(rules) {
        let problem = if rule.kinds.is_empty() || rule.kinds.len() > RULES_MAX {
            format!("rule {number} must name from 1 to {RULES_MAX} kinds or ranges of kinds")
        } else if rule.max_age_days.is_some_and(|days| days > AGE_DAYS_MAX) {
            format!("max_age_days of rule {number} must be from 0 to {AGE_DAYS_MAX}")
        } else {
            continue;
        };
        return Err(config.refuse("retention.rules", problem));
    }
    Ok(())
}

fn check_budget(config: &Config) -> Result<(), ConfigError> {
    match config.memory.budget_mb {
        mib @ 1..BUDGET_MB_MIN => {
            let problem = format!("must be 0 (automatic) or at least {BUDGET_MB_MIN}, not {mib}");
            Err(config.refuse("memory.budget_mb", problem))
        }
        _ => Ok(()),
    }
}

/// Shares of a whole. Compaction that hardly ever works would never catch up with the writer.
fn check_shares(config: &Config) -> Result<(), ConfigError> {
    let s = &config.storage;
    for (key, value, low) in
        [("storage.compact_dead_share", s.compact_dead_share, 0.05), ("storage.compact_share", s.compact_share, 0.01)]
    {
        if !(low..=1.0).contains(&value) {
            return Err(config.refuse(key, format!("must be from {low} to 1.0, not {value}")));
        }
    }
    Ok(())
}

/// Pairs of which the first must not be above the second. Two messages must fit a connection's queue, so that one
/// large event being sent does not make the next one close the connection.
fn check_relations(config: &Config) -> Result<(), ConfigError> {
    let limits = &config.limits;
    let frame = limits.frame_bytes_max as u64;
    let pairs = [
        ("limits.limit_default", limits.limit_default as u64, "limits.limit_max", limits.limit_max as u64, ""),
        (
            "limits.idle_ping_secs",
            limits.idle_ping_secs + 1,
            "limits.idle_timeout_secs",
            limits.idle_timeout_secs,
            " less 1",
        ),
        (
            "limits.frame_bytes_max",
            2 * frame,
            "limits.live_queue_bytes_max",
            limits.live_queue_bytes_max as u64,
            " / 2",
        ),
        (
            "limits.frame_bytes_max",
            frame,
            "storage.writer_queue_bytes_max",
            config.storage.writer_queue_bytes_max as u64,
            "",
        ),
        ("limits.query_slice_ms", limits.query_slice_ms, "limits.query_time_ms_max", limits.query_time_ms_max, ""),
    ];
    for (small_key, small, large_key, large, how) in pairs {
        if small <= large {
            continue;
        }
        // Blame the key that the user set; the other one is a default.
        let blamed = match config.origin.line(small_key) {
            Some(_) => small_key,
            None => large_key,
        };
        let problem = format!("{small_key} must not be above {large_key}{how}");
        return Err(config.refuse(blamed, problem));
    }
    Ok(())
}

fn check_service_url(config: &Config) -> Result<(), ConfigError> {
    let url = config.service_url.as_str();
    let host = url.strip_prefix("wss://").or(url.strip_prefix("ws://"));
    match host {
        Some(host) if !host.is_empty() && !host.starts_with('/') => Ok(()),
        None if url.is_empty() => Ok(()),
        _ => Err(config.refuse("service_url", "must start with wss:// or ws:// and name a host")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::path::Path;

    use super::*;

    fn error_of(text: &str) -> String {
        Config::parse(text, Some(Path::new("my.toml"))).unwrap_err().to_string()
    }

    /// Too small, too large, and not a relay's URL: file, line, key and what would be right.
    #[test]
    fn values_out_of_range_name_file_line_key_and_range() {
        for (text, expected) in [
            (
                "[limits]\nframe_bytes_max = 5\n",
                "my.toml:2: limits.frame_bytes_max: must be from 4096 to 8388608, not 5",
            ),
            (
                "[storage]\n# never\nexpiry_sweep_secs = 0\n",
                "my.toml:3: storage.expiry_sweep_secs: must be from 1 to 86400, not 0",
            ),
            ("memory.budget_mb = 1\n", "my.toml:1: memory.budget_mb: must be 0 (automatic) or at least 16, not 1"),
            (
                "service_url = \"https://relay.example.com\"\n",
                "my.toml:1: service_url: must start with wss:// or ws:// and name a host",
            ),
            ("[storage]\ncompact_share = 0.0\n", "my.toml:2: storage.compact_share: must be from 0.01 to 1.0, not 0"),
            (
                "[[retention.rules]]\nkinds = []\n",
                "my.toml:1: retention.rules: rule 1 must name from 1 to 64 kinds or ranges of kinds",
            ),
            ("store = \"\"\n", "my.toml:1: store: must name a directory"),
            ("service_url = \"wss://\"\n", "my.toml:1: service_url: must start with wss:// or ws:// and name a host"),
        ] {
            assert_eq!(error_of(text), expected, "{text}");
        }
    }

    /// Two values that exclude each other: the message points at the one in the file.
    #[test]
    fn values_that_exclude_each_other_point_at_the_users_key() {
        for (text, expected) in [
            (
                "[limits]\nlimit_max = 100\nlimit_default = 101\n",
                "my.toml:3: limits.limit_default: limits.limit_default must not be above limits.limit_max",
            ),
            (
                "[limits]\nlimit_default = 5001\n",
                "my.toml:2: limits.limit_default: limits.limit_default must not be above limits.limit_max",
            ),
            (
                "[limits]\nidle_ping_secs = 120\n",
                "my.toml:2: limits.idle_ping_secs: limits.idle_ping_secs must not be above limits.idle_timeout_secs less 1",
            ),
            (
                "[limits]\nframe_bytes_max = 1_048_577\n",
                "my.toml:2: limits.frame_bytes_max: limits.frame_bytes_max must not be above limits.live_queue_bytes_max / 2",
            ),
        ] {
            assert_eq!(error_of(text), expected, "{text}");
        }
        Config::parse("[limits]\nframe_bytes_max = 1_048_576\n", None).unwrap();
    }

    /// Who lowers only the largest limit gets no error about a key that the file does not name.
    #[test]
    fn a_lower_limit_max_lowers_the_default_limit() {
        let limits = |text: &str| Config::parse(&format!("[limits]\n{text}"), None).unwrap().limits;
        let lowered = limits("limit_max = 100\n");
        assert_eq!((lowered.limit_max, lowered.limit_default), (100, 100));
        assert_eq!(limits("limit_max = 600\n").limit_default, 500);
        assert_eq!(limits("limit_max = 100\nlimit_default = 7\n").limit_default, 7);
    }

    /// Each number of the file is in the list of ranges, so a new setting cannot be forgotten here.
    #[test]
    fn every_number_has_a_range() {
        let config = Config::default();
        let shown = toml::to_string(&config).unwrap();
        let numbers = shown.lines().filter(|line| {
            let value = line.split_once(" = ").map(|(_, value)| value);
            value.is_some_and(|value| value.parse::<u64>().is_ok())
        });
        assert_eq!(numbers.count(), ranges(&config).len());
    }
}
