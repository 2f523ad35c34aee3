//! What went wrong with the database, and what follows from it.

use std::time::Duration;

use sqlx::Error;

use crate::store::StoreError;

/// How often a transaction that lost against another one is tried again.
pub(super) const RETRIES_MAX: u32 = 5;

/// How long to wait before the n-th retry.
pub(super) fn pause_before(retry: u32) -> Duration {
    Duration::from_millis(5 << retry.min(6))
}

/// What a failed piece of work calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remedy {
    /// It lost against another transaction (deadlock, serialization): the same again, a few times.
    Again,
    /// The connection or the server behind it went away: once more on a fresh connection, then say so.
    Reconnect,
    /// Nothing helps.
    None,
}

/// What to do about an error.
pub(super) fn remedy(error: &Error) -> Remedy {
    match code(error).as_deref() {
        Some("40001" | "40P01") => Remedy::Again,
        Some(code) if is_away(code) => Remedy::Reconnect,
        // A statement that was prepared for tables which have changed since, or behind a pooler that lost it.
        Some("26000" | "0A000" | "42P05") => Remedy::Reconnect,
        Some(_) => Remedy::None,
        // The pool has tried for long enough.
        None if is_connection(error) && !matches!(error, Error::PoolTimedOut) => Remedy::Reconnect,
        None => Remedy::None,
    }
}

/// Whether the server is gone, or no primary any more: another one may have taken its place.
pub(super) fn is_lost(error: &Error) -> bool {
    code(error).map_or_else(|| is_connection(error), |code| is_away(&code))
}

/// The error as the store's caller gets it.
pub(super) fn told(error: Error) -> StoreError {
    match code(&error).as_deref() {
        Some("53100") => StoreError::DiskFull,
        Some("26000" | "42P05") => StoreError::Damaged(POOLER.to_owned()),
        Some("55P03" | "57014") => StoreError::Away("it is busy".to_owned()),
        Some(code) if is_away(code) => StoreError::Away(error.to_string()),
        Some(_) => StoreError::Damaged(format!("the database refused: {error}")),
        None if is_connection(&error) => StoreError::Away(error.to_string()),
        None => StoreError::Damaged(format!("the database's answer was not understood: {error}")),
    }
}

const POOLER: &str = "the database forgets prepared statements: a pooler before it shares connections transaction by \
                      transaction; use its session mode, or pgbouncer 1.21 or newer with max_prepared_statements";

/// It took longer than it may.
pub(super) fn too_slow(limit: Duration) -> StoreError {
    StoreError::Away(format!("it did not answer within {} s", limit.as_secs()))
}

/// Shutting down, starting up, out of places, a standby where a primary was, or a broken connection.
fn is_away(code: &str) -> bool {
    code.starts_with("08") || code.starts_with("57P") || matches!(code, "53300" | "25006" | "25P03")
}

fn is_connection(error: &Error) -> bool {
    matches!(error, Error::Io(_) | Error::PoolTimedOut | Error::PoolClosed | Error::Tls(_) | Error::Protocol(_))
}

fn code(error: &Error) -> Option<String> {
    error.as_database_error()?.code().map(|code| code.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lost connection is tried again and told; nonsense is not.
    #[test]
    fn lost_connections_are_told_from_nonsense() {
        let lost = || Error::Io(std::io::ErrorKind::ConnectionReset.into());
        assert_eq!(remedy(&lost()), Remedy::Reconnect);
        assert!(matches!(told(lost()), StoreError::Away(_)));
        assert_eq!(remedy(&Error::RowNotFound), Remedy::None);
        assert!(matches!(told(Error::PoolTimedOut), StoreError::Away(_)));
        assert!(matches!(told(Error::RowNotFound), StoreError::Damaged(_)));
    }
}
