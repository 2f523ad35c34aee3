//! `[postgres]`: a store on a database that several relays share.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Config, ConfigError};

/// How a database is used, where `store` is the URL of one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Postgres {
    /// Replicas that stored queries may be read from.
    pub read_urls: Vec<String>,
    /// Where to listen for notifications; empty: at the database itself.
    pub listen_url: String,
    /// Directory of the control socket, since a database has none of its own.
    pub control_dir: String,
    /// Connections for queries, to the database and to each replica.
    pub connections_max: usize,
    /// How long one piece of work may take, milliseconds.
    pub timeout_ms: u64,
    /// How long to wait at the start for a database that is away, seconds.
    pub start_timeout_secs: u64,
    /// Time between looks for what other relays stored, where no notification comes, milliseconds.
    pub poll_ms: u64,
}

impl Postgres {
    /// How long one piece of work may take.
    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    /// How long to wait at the start for a database that is away.
    pub fn start_timeout(&self) -> Duration {
        Duration::from_secs(self.start_timeout_secs)
    }

    /// Time between looks for what other relays stored.
    pub fn poll(&self) -> Duration {
        Duration::from_millis(self.poll_ms)
    }
}

/// Whether a `store` is a database and no directory.
pub fn is_database(store: &str) -> bool {
    ["postgres://", "postgresql://"].iter().any(|scheme| store.starts_with(scheme))
}

/// One URL for each host that a URL names, as libpq has it: `postgres://me@one:5432,two/relay`, or `host=` and `port=` with
/// lists behind the question mark.
pub fn hosts(url: &str) -> Vec<String> {
    let Some((scheme, rest)) = url.split_once("://") else { return vec![url.to_owned()] };
    let (authority, tail) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let (user, hosts) = authority.rsplit_once('@').map_or(("", authority), |(user, hosts)| (user, hosts));
    let at = if authority.contains('@') { "@" } else { "" };
    let (path, parameters) = tail.split_once('?').map_or((tail, None), |(path, rest)| (path, Some(rest)));
    let pairs: Vec<&str> = parameters.into_iter().flat_map(|parameters| parameters.split('&')).collect();
    let lists = |pair: &&&str| pair.starts_with("host=") || pair.starts_with("port=");
    let listed = pairs.iter().filter(lists).map(|pair| pair.matches(',').count() + 1).max().unwrap_or(1);
    // A list of one holds for all hosts.
    let one_of = |list: &str, number: usize| {
        let mut items = list.split(',');
        let first = items.next().unwrap_or_default().to_owned();
        items.nth(number.wrapping_sub(1)).map_or(first, str::to_owned)
    };
    let url_of = |number| {
        let pairs = pairs.iter().map(|pair| match pair.split_once('=') {
            Some((name @ ("host" | "port"), list)) => format!("{name}={}", one_of(list, number)),
            _ => (*pair).to_owned(),
        });
        let parameters = pairs.collect::<Vec<_>>().join("&");
        let mark = if parameters.is_empty() { "" } else { "?" };
        format!("{scheme}://{user}{at}{}{path}{mark}{parameters}", one_of(hosts, number))
    };
    (0..listed.max(hosts.matches(',').count() + 1)).map(url_of).collect()
}

/// A URL as it may stand in a message or log: without its password.
pub fn without_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return "***".to_owned() };
    let (authority, tail) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let authority = match authority.rsplit_once('@') {
        Some((user, host)) => format!("{}@{host}", user.split(':').next().unwrap_or_default()),
        None => authority.to_owned(),
    };
    let tail = match tail.split_once('?') {
        Some((path, parameters)) => {
            let kept: Vec<&str> = parameters.split('&').filter(|pair| !pair.starts_with("password=")).collect();
            format!("{path}?{}", kept.join("&"))
        }
        None => tail.to_owned(),
    };
    format!("{scheme}://{authority}{tail}")
}

/// Every URL is one of a database.
pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    let wrong = |url: &&String| !is_database(url);
    if let Some(url) = config.postgres.read_urls.iter().find(wrong) {
        let shown = without_password(url);
        return Err(config.refuse("postgres.read_urls", format!("`{shown}` must start with postgres://")));
    }
    if !config.postgres.listen_url.is_empty() && !is_database(&config.postgres.listen_url) {
        return Err(config.refuse("postgres.listen_url", "must start with postgres://, or be \"\""));
    }
    if config.postgres.control_dir.is_empty() {
        return Err(config.refuse("postgres.control_dir", "must name a directory, such as \"sledge-control\""));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Wherever a URL has its password, no log gets it.
    #[test]
    fn passwords_are_left_out() {
        for (url, shown) in [
            ("postgres://me:secret@db.example.com:5432/relay", "postgres://me@db.example.com:5432/relay"),
            ("postgres://me:se@cret@db/relay?sslmode=require", "postgres://me@db/relay?sslmode=require"),
            ("postgres:///relay?host=/tmp&password=secret&user=me", "postgres:///relay?host=/tmp&user=me"),
            ("postgresql://db", "postgresql://db"),
            ("secret", "***"),
        ] {
            assert_eq!(without_password(url), shown);
        }
    }

    /// Each host of a list has a URL of its own, and one host is what it was.
    #[test]
    fn hosts_are_told_apart() {
        for (url, expected) in [
            (
                "postgres://me:s@cret@one:5432,two/relay?sslmode=require",
                &[
                    "postgres://me:s@cret@one:5432/relay?sslmode=require",
                    "postgres://me:s@cret@two/relay?sslmode=require",
                ][..],
            ),
            (
                "postgres:///relay?host=/a,/b&user=me&port=5432,5433",
                &["postgres:///relay?host=/a&user=me&port=5432", "postgres:///relay?host=/b&user=me&port=5433"],
            ),
            (
                "postgres:///relay?host=/a,/b&port=6000",
                &["postgres:///relay?host=/a&port=6000", "postgres:///relay?host=/b&port=6000"],
            ),
            ("postgresql://[::1]:5432/relay", &["postgresql://[::1]:5432/relay"]),
            ("postgres://db", &["postgres://db"]),
        ] {
            assert_eq!(hosts(url), expected);
        }
    }

    /// What is no database is named, without a password in it.
    #[test]
    fn other_urls_are_refused() {
        let error = |toml: &str| Config::parse(&format!("[postgres]\n{toml}"), None).unwrap_err().to_string();
        let read = error("read_urls = [\"postgres://a\", \"mysql://me:secret@b\"]");
        assert!(read.contains("postgres.read_urls: `mysql://me@b`"), "{read}");
        assert!(error("listen_url = \"here\"").contains("postgres.listen_url"));
        assert!(error("control_dir = \"\"").contains("postgres.control_dir"));
        assert!(is_database("postgresql://x") && !is_database("sledge-data"));
    }
}
