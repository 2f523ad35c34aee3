//! The answer to a challenge (NIP-42): an event of kind 22242 that only the holder of a key can have made, for this
//! relay, on this connection, now.
//!
//! <https://github.com/nostr-protocol/nips/blob/master/42.md>

use super::Authority;
use crate::protocol::verify::Invalid;
use crate::protocol::{Event, Kind, PublicKey, Verified};

/// How far the event's `created_at` may be from now, either way, seconds (NIP-42: about ten minutes).
pub const WINDOW_SECS: u64 = 600;

/// What a connection is asked to sign: 16 random bytes, its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Challenge([u8; 16]);

impl Challenge {
    /// A challenge of these bytes, which nobody must be able to guess.
    pub fn new(random: [u8; 16]) -> Self {
        Challenge(random)
    }

    /// As it is sent: 32 hex digits.
    pub fn text(&self) -> String {
        faster_hex::hex_string(&self.0)
    }
}

/// Why an `AUTH` event proves nothing. `Display` is the `OK` text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AuthError {
    /// Another kind than 22242.
    #[error("invalid: an AUTH event has kind 22242, not {0}")]
    WrongKind(Kind),
    /// Made too long ago, or ahead of time.
    #[error("invalid: created_at is {off_secs} s off, at most {WINDOW_SECS} s are accepted; check your clock")]
    WrongTime {
        /// Seconds between `created_at` and now.
        off_secs: u64,
    },
    /// The challenge of another connection, or none.
    #[error("invalid: the challenge is not the one that this connection was sent")]
    WrongChallenge,
    /// Made for another relay, or for none.
    #[error("invalid: the relay tag does not name this relay")]
    WrongRelay,
    /// The relay does not know under which name the public reaches it.
    #[error("error: this relay cannot tell whether the relay tag names it, since its service_url is not set")]
    OwnNameUnknown,
    /// The connection has proven as many keys as it may.
    #[error("error: at most {keys_max} keys are accepted on one connection")]
    TooManyKeys {
        /// Keys allowed.
        keys_max: usize,
    },
    /// Id, key or signature do not hold.
    #[error(transparent)]
    Invalid(#[from] Invalid),
}

/// The key that an `AUTH` event proves. `own` are the names of this relay, `now` is in seconds since 1970. Costs a
/// signature check (25 µs) if all else is right.
///
/// # Errors
/// What does not hold, the cheap checks first.
pub fn check(event: Event, challenge: &Challenge, own: &[&Authority], now: u64) -> Result<PublicKey, AuthError> {
    if event.kind != Kind::CLIENT_AUTH {
        return Err(AuthError::WrongKind(event.kind));
    }
    let value = |name| event.tags.find(name).and_then(|tag| tag.value());
    if value("challenge") != Some(challenge.text().as_str()) {
        return Err(AuthError::WrongChallenge);
    }
    let meant = value("relay").and_then(Authority::of_url).ok_or(AuthError::WrongRelay)?;
    if !own.contains(&&meant) {
        return Err(if own.is_empty() { AuthError::OwnNameUnknown } else { AuthError::WrongRelay });
    }
    let off_secs = event.created_at.abs_diff(now);
    if off_secs > WINDOW_SECS {
        return Err(AuthError::WrongTime { off_secs });
    }
    Ok(Verified::check(event)?.pubkey)
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::protocol::testing::{Author, NOW};

    pub(crate) const CHALLENGE: Challenge = Challenge([0xab; 16]);

    /// An `AUTH` event by this author for the challenge of these tests.
    pub(crate) fn answer(author: u8, relay: &str, created_at: u64) -> Event {
        let tags = [vec!["relay".to_owned(), relay.to_owned()], vec!["challenge".to_owned(), CHALLENGE.text()]];
        Author::new(author).event(22_242, created_at, &tags, "")
    }

    fn checked(event: Event) -> Result<PublicKey, AuthError> {
        let own = Authority::of_url("wss://relay.example.com").unwrap();
        check(event, &CHALLENGE, &[&own], NOW)
    }

    /// Ten minutes either way, the last second included (T37).
    #[test]
    fn t37_ten_minutes_either_way() {
        let at = |created_at| checked(answer(1, "wss://relay.example.com", created_at));
        for good in [NOW, NOW - 600, NOW + 600] {
            assert!(at(good).is_ok(), "{good}");
        }
        for bad in [NOW - 601, NOW + 601] {
            assert_eq!(at(bad), Err(AuthError::WrongTime { off_secs: 601 }));
        }
        assert!(matches!(at(0), Err(AuthError::WrongTime { .. })));
    }

    /// Kind, challenge, relay and signature must all hold (T35).
    #[test]
    fn t35_everything_must_hold() {
        let relay = "wss://relay.example.com/";
        let good = answer(1, relay, NOW);
        assert_eq!(checked(good.clone()), Ok(good.pubkey));
        let tags = |list: &[[&str; 2]]| {
            let list: Vec<Vec<&str>> = list.iter().map(|tag| tag.to_vec()).collect();
            checked(Author::new(1).event(22_242, NOW, &list, ""))
        };
        let challenge = CHALLENGE.text();
        let upper = challenge.to_uppercase();
        assert_eq!(tags(&[["relay", relay]]), Err(AuthError::WrongChallenge));
        assert_eq!(tags(&[["relay", relay], ["challenge", ""]]), Err(AuthError::WrongChallenge));
        assert_eq!(tags(&[["relay", relay], ["challenge", &upper]]), Err(AuthError::WrongChallenge));
        assert_eq!(tags(&[["challenge", &challenge]]), Err(AuthError::WrongRelay));
        assert_eq!(tags(&[["challenge", &challenge], ["relay", "wss://evil.net"]]), Err(AuthError::WrongRelay));
        let note = Author::new(1).event(1, NOW, &[vec!["challenge", challenge.as_str()], vec!["relay", relay]], "");
        assert_eq!(checked(note), Err(AuthError::WrongKind(Kind(1))));
        let mut forged = good.clone();
        forged.sig.0[0] ^= 1;
        assert_eq!(checked(forged), Err(AuthError::Invalid(Invalid::Signature)));
        let mut changed = good;
        changed.pubkey = answer(2, relay, NOW).pubkey;
        assert_eq!(checked(changed), Err(AuthError::Invalid(Invalid::Id)));
    }

    /// A relay that does not know its name accepts nobody, and says why.
    #[test]
    fn an_unknown_own_name_is_said() {
        let unknown = check(answer(1, "wss://relay.example.com", NOW), &CHALLENGE, &[], NOW);
        assert_eq!(unknown, Err(AuthError::OwnNameUnknown));
    }
}
