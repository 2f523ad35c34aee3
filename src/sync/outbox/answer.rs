//! What a relay's answer to an event means for the debt to that relay, and how long to wait before the next attempt.

use serde::{Deserialize, Serialize};

/// Shortest wait before another attempt, in milliseconds.
pub const BACKOFF_MS_MIN: u64 = 500;
/// Longest wait before another attempt, in milliseconds.
pub const BACKOFF_MS_MAX: u64 = 60_000;

/// Why nothing is owed to a relay any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Settlement {
    /// It stored the event, or has it already.
    Stored,
    /// It has a newer version.
    Superseded,
    /// The author deleted what the event says.
    Deleted,
    /// The event is in a form that this relay is not to get.
    NotForThisRelay,
}

/// What follows from an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Consequence {
    /// The debt is paid.
    Settle(Settlement),
    /// Prove the key (NIP-42), then send the same bytes again.
    Authenticate,
    /// The relay wants fewer events: halve the window, pause the whole link, then go on.
    SlowDown,
    /// This event failed for now: try it again later, go on with others.
    Retry,
    /// It will never be accepted as it is: to the dead letters, for a person to see.
    Bury,
}

/// Judges the flag and text of an `OK`.
///
/// Other relays than this project's say `OK false` with `replaced:` and `deleted:` for what has been overtaken; ours says
/// `blocked: deleted by its author`. A refusal without a prefix of NIP-01 may pass: it is tried again.
pub fn judge(accepted: bool, text: &str) -> Consequence {
    let prefix = text.split_once(':').map_or("", |(prefix, _)| prefix);
    match prefix {
        "duplicate" | "replaced" if says_newer(text) => Consequence::Settle(Settlement::Superseded),
        "duplicate" => Consequence::Settle(Settlement::Stored),
        _ if accepted => Consequence::Settle(Settlement::Stored),
        "deleted" => Consequence::Settle(Settlement::Deleted),
        "blocked" if says_deleted(text) => Consequence::Settle(Settlement::Deleted),
        "auth-required" => Consequence::Authenticate,
        "rate-limited" => Consequence::SlowDown,
        "invalid" | "blocked" | "restricted" | "pow" | "mute" => Consequence::Bury,
        _ => Consequence::Retry,
    }
}

fn says_newer(text: &str) -> bool {
    text.starts_with("replaced:") || text.contains("newer")
}

fn says_deleted(text: &str) -> bool {
    text.starts_with("blocked: deleted") || text.starts_with("blocked: its author asked to vanish")
}

/// How long to wait after `attempts` failures in a row (1 or more): full jitter between [`BACKOFF_MS_MIN`] and a bound
/// that doubles up to [`BACKOFF_MS_MAX`]. `chance` is any random number.
pub fn backoff_ms(attempts: u32, chance: u64) -> u64 {
    let bound = BACKOFF_MS_MIN.saturating_mul(1 << attempts.min(16)).min(BACKOFF_MS_MAX);
    BACKOFF_MS_MIN + chance % (bound - BACKOFF_MS_MIN + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every prefix of NIP-01 and NIP-42, and what other relays say in its place.
    #[test]
    fn t27_each_prefix_has_its_consequence() {
        use Consequence::{Authenticate, Bury, Retry, Settle, SlowDown};
        for (accepted, text, expected) in [
            (true, "", Settle(Settlement::Stored)),
            (true, "welcome", Settle(Settlement::Stored)),
            (true, "duplicate: already have this event", Settle(Settlement::Stored)),
            (true, "duplicate: a newer version is stored", Settle(Settlement::Superseded)),
            (false, "duplicate: have it", Settle(Settlement::Stored)),
            (false, "replaced: have newer event", Settle(Settlement::Superseded)),
            (false, "deleted: user requested deletion", Settle(Settlement::Deleted)),
            (false, "blocked: deleted by its author", Settle(Settlement::Deleted)),
            (false, "blocked: its author asked to vanish from this relay", Settle(Settlement::Deleted)),
            (false, "blocked: you are banned", Bury),
            (false, "auth-required: prove it", Authenticate),
            (false, "rate-limited: slow down", SlowDown),
            (false, "invalid: created_at 901 s ahead", Bury),
            (false, "restricted: members only", Bury),
            (false, "pow: 20 bits", Bury),
            (false, "mute: nobody listens", Bury),
            (false, "error: disk full", Retry),
            (false, "", Retry),
            (false, "no", Retry),
        ] {
            assert_eq!(judge(accepted, text), expected, "{accepted} {text:?}");
        }
    }

    /// Within the bounds for any number, the bound doubling to its end.
    #[test]
    fn backoff_stays_within_its_bounds() {
        for attempts in [0, 1, 2, 7, 8, 1000, u32::MAX] {
            for chance in [0, 1, 499, 500, 59_500, 59_501, u64::MAX] {
                let wait = backoff_ms(attempts, chance);
                assert!((BACKOFF_MS_MIN..=BACKOFF_MS_MAX).contains(&wait), "{attempts} {chance}: {wait}");
            }
        }
        assert_eq!(backoff_ms(1, 500), 1_000);
        assert_eq!(backoff_ms(1, 501), 500);
        assert_eq!(backoff_ms(20, 59_500), 60_000);
    }
}
