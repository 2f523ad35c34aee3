//! What a connection has proven about itself (NIP-42): keys, any number up to a bound, for as long as it lasts.

use std::sync::Arc;

use super::challenge::{self, AuthError};
use super::{Authority, Challenge};
use crate::protocol::{Event, PublicKey};

/// Keys that one connection may prove. A client has a few accounts, a bridge some dozens; each costs 32 bytes, and a look
/// at every private event.
pub const KEYS_MAX: usize = 64;

/// One connection's authentication. Small: there are thousands of idle connections.
#[derive(Clone, Debug)]
pub struct Session {
    challenge: Challenge,
    /// The local name under which the client has reached the relay, if there is one.
    reached: Option<Authority>,
    /// In the order of proof, without repeats.
    keys: Arc<[PublicKey]>,
    is_operator: bool,
}

impl Session {
    /// Nothing is proven yet.
    pub fn new(challenge: Challenge, reached: Option<Authority>) -> Self {
        Session { challenge, reached, keys: Arc::default(), is_operator: false }
    }

    /// The same for the operator, who has shown the [`super::Pass`].
    pub fn of_operator(self) -> Self {
        Session { is_operator: true, ..self }
    }

    /// Whether it is the operator's own.
    pub fn is_operator(&self) -> bool {
        self.is_operator
    }

    /// What the client is to sign.
    pub fn challenge(&self) -> &Challenge {
        &self.challenge
    }

    /// The proven keys.
    pub fn keys(&self) -> &Arc<[PublicKey]> {
        &self.keys
    }

    /// Takes an `AUTH` event. Keys that were proven before stay valid. `own` is the public name of this relay, `now` is in
    /// seconds since 1970.
    ///
    /// # Errors
    /// Why the event proves nothing; nothing has changed then.
    pub fn authenticate(&mut self, event: Event, own: Option<&Authority>, now: u64) -> Result<(), AuthError> {
        let names: Vec<&Authority> = own.into_iter().chain(&self.reached).collect();
        let key = challenge::check(event, &self.challenge, &names, now)?;
        if self.keys.contains(&key) {
            return Ok(());
        }
        if self.keys.len() >= KEYS_MAX {
            return Err(AuthError::TooManyKeys { keys_max: KEYS_MAX });
        }
        self.keys = self.keys.iter().copied().chain([key]).collect();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::auth::challenge::tests::{CHALLENGE, answer};
    use crate::protocol::testing::NOW;

    const RELAY: &str = "wss://relay.example.com";

    /// Several keys are valid side by side, once each, up to the bound; a failed attempt takes none away (T36).
    #[test]
    fn t36_several_keys() {
        let own = Authority::of_url(RELAY).unwrap();
        let mut session = Session::new(CHALLENGE, None);
        let mut prove = |author, relay| session.authenticate(answer(author, relay, NOW), Some(&own), NOW);
        assert_eq!(prove(1, RELAY), Ok(()));
        assert_eq!(prove(2, RELAY), Ok(()));
        assert_eq!(prove(1, RELAY), Ok(()));
        assert_eq!(prove(3, "wss://evil.net"), Err(AuthError::WrongRelay));
        for author in 3..=KEYS_MAX as u8 {
            assert_eq!(prove(author, RELAY), Ok(()));
        }
        assert_eq!(prove(65, RELAY), Err(AuthError::TooManyKeys { keys_max: KEYS_MAX }));
        assert_eq!(prove(64, RELAY), Ok(()));
        let proven: Vec<PublicKey> = (1..=64).map(|author| answer(author, RELAY, NOW).pubkey).collect();
        assert_eq!(session.keys()[..], proven);
    }

    /// On a local network both names hold: the public one and the one by which the client came (T35).
    #[test]
    fn t35_the_public_name_and_the_local_one() {
        let own = Authority::of_url(RELAY).unwrap();
        let reached = Authority::parse("pi.local:7777");
        let prove =
            |own, reached, relay| Session::new(CHALLENGE, reached).authenticate(answer(1, relay, NOW), own, NOW);
        for relay in ["ws://pi.local:7777", "wss://relay.example.com"] {
            assert_eq!(prove(Some(&own), reached.clone(), relay), Ok(()), "{relay}");
        }
        assert_eq!(prove(Some(&own), None, "ws://pi.local:7777"), Err(AuthError::WrongRelay));
        assert_eq!(prove(None, reached, "ws://pi.local:7777"), Ok(()));
        assert_eq!(prove(None, None, "ws://pi.local:7777"), Err(AuthError::OwnNameUnknown));
    }
}
