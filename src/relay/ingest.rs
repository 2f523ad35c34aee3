//! The stages that every event passes on its way in, cheapest first: limits, policy, id, already stored, signature.
//!
//! Served and imported events come through here alike; [`Sender`] says who hands one in. What remains to be said
//! about an event (is it deleted, superseded?) only the store knows, at the moment of writing.

use std::net::IpAddr;
use std::sync::Arc;

use super::look::on_second_look;
use super::policy::{self, Policy};
use crate::config::Live;
use crate::protocol::supersede::{is_expired, vanish_applies};
use crate::protocol::verify::{Hashed, Invalid};
use crate::protocol::{Event, Kind, PublicKey, Tags, Verified, pow};
use crate::store::Store;

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A client published it.
    Client,
    /// The operator brings it in through the running relay: who he is, is not asked.
    Operator,
    /// The operator brings it in while no relay runs; it may be dated at any time too.
    Import,
    /// It comes from another relay with which the operator keeps this one equal. It was written for that one and may be
    /// old, so proofs that a client owes are not asked for, nor is it refused for its age.
    Mirror,
}

/// Who hands an event in, as far as the relay knows. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sender {
    /// By which door the event comes.
    pub source: Source,
    /// The keys that the connection has proven (NIP-42), in the order of proof.
    pub keys: Arc<[PublicKey]>,
    /// The client's address, behind a trusted proxy the one that the proxy names. `None`: it does not come over a network.
    pub ip: Option<IpAddr>,
    /// The other relay, where the event comes from one.
    pub upstream: Option<Arc<Upstream>>,
}

/// Another relay that events come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// Where it is.
    pub url: String,
    /// Whether events come as long as this relay serves (`[[mirror]]`), and not once (`sledge sync`).
    pub is_mirror: bool,
}

impl Sender {
    /// The operator, at the command line.
    pub fn import() -> Self {
        Sender { source: Source::Import, keys: Arc::default(), ip: None, upstream: None }
    }

    /// Another relay; with `own` the operator's own, and so everything that it says is said by him.
    pub fn relay(upstream: Upstream, own: bool) -> Self {
        let source = if own { Source::Operator } else { Source::Mirror };
        Sender { source, keys: Arc::default(), ip: None, upstream: Some(Arc::new(upstream)) }
    }

    /// A client at this address that has proven these keys.
    pub fn client(ip: IpAddr, keys: Arc<[PublicKey]>) -> Self {
        Sender { source: Source::Client, keys, ip: Some(ip), upstream: None }
    }
}

/// Why an event goes no further. `Display` is the `OK` text (NIP-01 prefixes).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejection {
    /// Stored already; for the sender as good as accepted.
    #[error("duplicate: already have this event")]
    Duplicate,
    /// Id, key or signature do not hold.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// More tags than the operator allows.
    #[error("invalid: {tags} tags, at most {tags_max} are accepted")]
    TooManyTags {
        /// Tags of the event.
        tags: usize,
        /// Tags allowed.
        tags_max: usize,
    },
    /// More content than the operator allows.
    #[error("invalid: the content has more than {chars_max} characters")]
    ContentTooLong {
        /// Characters allowed.
        chars_max: usize,
    },
    /// More JSON than the operator allows.
    #[error("invalid: the event has {bytes} bytes, at most {bytes_max} are accepted")]
    TooLarge {
        /// Bytes of the event's JSON.
        bytes: usize,
        /// Bytes allowed.
        bytes_max: usize,
    },
    /// Dated further ahead than the operator allows.
    #[error("invalid: created_at is {ahead_secs} s ahead, at most {secs_max} s are accepted")]
    TooFarAhead {
        /// Seconds between now and `created_at`.
        ahead_secs: u64,
        /// Seconds allowed.
        secs_max: u64,
    },
    /// Dated further back than the operator allows.
    #[error("invalid: created_at is {behind_secs} s ago, at most {secs_max} s are accepted")]
    TooFarBehind {
        /// Seconds between `created_at` and now.
        behind_secs: u64,
        /// Seconds allowed.
        secs_max: u64,
    },
    /// Its expiration has come (NIP-40).
    #[error("invalid: the event has expired")]
    Expired,
    /// An answer to an authentication challenge (NIP-42) is for one relay's eyes.
    #[error("invalid: kind 22242 belongs in an AUTH message")]
    ClientAuth,
    /// Publishing needs authentication here (NIP-42).
    #[error("auth-required: this relay accepts events from authenticated clients only")]
    AuthRequired,
    /// Too little proof of work (NIP-13).
    #[error("pow: {proven} bits of work are proven, {needed} are needed for kind {kind}")]
    TooLittleWork {
        /// Leading zero bits of the id, or the target that the event names if that is lower.
        proven: u32,
        /// Bits needed.
        needed: u8,
        /// The event's kind.
        kind: Kind,
    },
    /// Only its authenticated author may publish it (NIP-70), and the client has not authenticated.
    #[error("auth-required: this event may only be published by its author")]
    ProtectedNeedsAuth,
    /// Only its authenticated author may publish it (NIP-70), and the client is somebody else.
    #[error("restricted: this event may only be published by its author")]
    ProtectedForeign,
    /// A repost that carries a protected event (NIP-70).
    #[error("blocked: the reposted event is protected")]
    RepostOfProtected,
    /// A request to vanish that names other relays (NIP-62).
    #[error("invalid: the request to vanish does not name this relay")]
    VanishElsewhere,
    /// Older than the rules of retention keep, or than what the quota has evicted.
    #[error("blocked: older than this relay keeps")]
    NotKept,
    /// The store takes more than its quota, and nothing may be evicted.
    #[error("error: the relay's disk quota is used up")]
    QuotaUsedUp,
    /// Against the rules about who may write.
    #[error(transparent)]
    Policy(#[from] policy::Refusal),
    /// The store could not be asked.
    #[error("error: the store cannot be read")]
    StoreUnreadable,
}

impl Rejection {
    /// Whether the sender may regard the event as delivered (the flag of `OK`).
    pub fn is_accepted(&self) -> bool {
        *self == Rejection::Duplicate
    }
}

/// The stages, with the limits they go by.
pub struct Ingest {
    config: Live,
    store: Arc<dyn Store>,
    policy: Arc<Policy>,
}

impl Ingest {
    /// Stages that go by `config`, know what `store` holds, and ask `policy` who may write.
    pub fn new(config: impl Into<Live>, store: Arc<dyn Store>, policy: Arc<Policy>) -> Self {
        Ingest { config: config.into(), store, policy }
    }

    /// Takes an event through all stages; costs one signature check (25 µs) when it is good and new. `now` is in
    /// seconds since 1970.
    ///
    /// # Errors
    /// The [`Rejection`] of the first stage that it does not pass.
    pub fn check(&self, event: Event, sender: &Sender, now: u64) -> Result<Verified<Event>, Rejection> {
        self.check_limits(&event)?;
        if sender.source == Source::Client {
            self.check_access(&event, sender)?;
        }
        if sender.source != Source::Import {
            self.check_ahead(event.created_at, now)?;
            if sender.source != Source::Mirror {
                self.check_behind(event.created_at, now)?;
            }
            // Here and not only at the store, where it would cost a batch's deletions too. An import is to end instead.
            if !event.kind.is_ephemeral() && !self.store.has_room_for(event.kind) {
                return Err(Rejection::QuotaUsedUp);
            }
        }
        self.policy.check(&event, sender, now)?;
        self.check_policy(&event, sender, now)?;
        let hashed = Hashed::check(event)?;
        if !hashed.event().kind.is_ephemeral() && self.is_stored(hashed.event())? {
            return Err(Rejection::Duplicate);
        }
        let id = hashed.event().id;
        let verified = hashed.verify().map_err(|invalid| match sender.source {
            // Nothing on a connection's own path waits for the store; see `look`.
            Source::Client | Source::Operator => invalid.into(),
            Source::Import | Source::Mirror => on_second_look(&*self.store, &id, invalid.into()),
        })?;
        let bytes = verified.canonical().json.len();
        let bytes_max = self.config.load().limits.frame_bytes_max;
        if bytes > bytes_max {
            return Err(Rejection::TooLarge { bytes, bytes_max });
        }
        self.policy.count(&verified, bytes, sender, now);
        Ok(verified)
    }

    fn check_limits(&self, event: &Event) -> Result<(), Rejection> {
        let limits = &self.config.load().limits;
        if event.tags.len() > limits.event_tags_max {
            return Err(Rejection::TooManyTags { tags: event.tags.len(), tags_max: limits.event_tags_max });
        }
        let chars_max = limits.content_chars_max;
        // Characters are counted only where the bytes leave it open.
        if event.content.len() > chars_max && event.content.chars().nth(chars_max).is_some() {
            return Err(Rejection::ContentTooLong { chars_max });
        }
        Ok(())
    }

    fn check_ahead(&self, created_at: u64, now: u64) -> Result<(), Rejection> {
        let ahead_secs = created_at.saturating_sub(now);
        let secs_max = self.config.load().limits.created_at_ahead_secs_max;
        if ahead_secs > secs_max { Err(Rejection::TooFarAhead { ahead_secs, secs_max }) } else { Ok(()) }
    }

    fn check_behind(&self, created_at: u64, now: u64) -> Result<(), Rejection> {
        let behind_secs = now.saturating_sub(created_at);
        let secs_max = self.config.load().limits.created_at_behind_secs_max;
        if secs_max > 0 && behind_secs > secs_max {
            return Err(Rejection::TooFarBehind { behind_secs, secs_max });
        }
        Ok(())
    }

    /// What every client must have done. Requests to vanish are followed whoever sends them (NIP-62).
    fn check_access(&self, event: &Event, sender: &Sender) -> Result<(), Rejection> {
        let access = &self.config.load().access;
        if event.kind == Kind::VANISH {
            return Ok(());
        }
        if access.auth_required_to_write && sender.keys.is_empty() {
            return Err(Rejection::AuthRequired);
        }
        match access.pow_bits(event.kind.0) {
            0 => Ok(()),
            needed => check_work(event, needed),
        }
    }

    fn check_policy(&self, event: &Event, sender: &Sender, now: u64) -> Result<(), Rejection> {
        if event.kind == Kind::CLIENT_AUTH {
            return Err(Rejection::ClientAuth);
        }
        if is_expired(event.expiration(), now) {
            return Err(Rejection::Expired);
        }
        if event.is_protected() {
            check_author_publishes(event, sender)?;
        }
        if matches!(event.kind, Kind::REPOST | Kind::GENERIC_REPOST) && embeds_protected(&event.content) {
            return Err(Rejection::RepostOfProtected);
        }
        if event.kind == Kind::VANISH && !vanish_applies(event, &self.config.load().service_url) {
            return Err(Rejection::VanishElsewhere);
        }
        if !event.kind.is_ephemeral() && !self.store.keeps(event, now) {
            return Err(Rejection::NotKept);
        }
        Ok(())
    }

    fn is_stored(&self, event: &Event) -> Result<bool, Rejection> {
        let known = self.store.contains_at_hand(&event.id).map(|known| known.unwrap_or(false));
        known.map_err(|error| {
            tracing::error!(%error, "the store cannot tell whether it has an event");
            Rejection::StoreUnreadable
        })
    }
}

fn check_work(event: &Event, needed: u8) -> Result<(), Rejection> {
    let proven = pow::proven(event);
    if proven >= needed.into() { Ok(()) } else { Err(Rejection::TooLittleWork { proven, needed, kind: event.kind }) }
}

/// A protected event (NIP-70) comes in only from a client that has authenticated as its author.
fn check_author_publishes(event: &Event, sender: &Sender) -> Result<(), Rejection> {
    match sender.source {
        Source::Client if sender.keys.contains(&event.pubkey) => Ok(()),
        Source::Client if sender.keys.is_empty() => Err(Rejection::ProtectedNeedsAuth),
        Source::Client | Source::Mirror => Err(Rejection::ProtectedForeign),
        // What others protect, the operator's commands leave out unless they are told otherwise.
        Source::Operator | Source::Import => Ok(()),
    }
}

/// Whether a repost's content is the JSON of an event with a `-` tag. Anything that is no such JSON embeds nothing.
fn embeds_protected(content: &str) -> bool {
    #[derive(serde::Deserialize)]
    struct Embedded {
        tags: Tags,
    }
    serde_json::from_str::<Embedded>(content).is_ok_and(|embedded| embedded.tags.find("-").is_some())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config::Config;
    use crate::protocol::testing::{Author, NOW};
    use crate::store::memory::MemoryStore;

    fn ingest() -> Ingest {
        let mut config = Config { service_url: "wss://relay.example.com".to_owned(), ..Config::default() };
        config.limits.event_tags_max = 3;
        config.limits.content_chars_max = 5;
        config.limits.created_at_behind_secs_max = 1_000;
        ingest_of(config, &MemoryStore::new())
    }

    fn ingest_of(config: Config, store: &MemoryStore) -> Ingest {
        let (config, store): (_, Arc<dyn Store>) = (Arc::new(config), Arc::new(store.clone()));
        let policy = Policy::open(config.clone(), store.clone()).unwrap();
        Ingest::new(config, store, Arc::new(policy))
    }

    fn client() -> Sender {
        Sender::client([192, 0, 2, 1].into(), Arc::default())
    }

    #[track_caller]
    fn check(event: Event, expected: Result<(), &str>) {
        let found = ingest().check(event, &client(), NOW).map(drop).map_err(|rejection| rejection.to_string());
        match (&found, expected) {
            (Ok(()), Ok(())) => {}
            (Err(text), Err(start)) if text.starts_with(start) => {}
            _ => panic!("{found:?}, expected {expected:?}"),
        }
    }

    /// Each limit at its edge: tags, characters (not bytes), both ends of the time window.
    #[test]
    fn limits_hold_at_their_edges() {
        let author = Author::new(1);
        let tags = |count| vec![vec!["x"]; count];
        check(author.event(1, NOW, &tags(3), "🛷🛷🛷🛷🛷"), Ok(()));
        check(author.event(1, NOW, &tags(4), ""), Err("invalid: 4 tags"));
        check(author.event(1, NOW, &tags(0), "🛷🛷🛷🛷🛷🛷"), Err("invalid: the content"));
        check(author.event(1, NOW + 900, &tags(0), ""), Ok(()));
        check(author.event(1, NOW + 901, &tags(0), ""), Err("invalid: created_at is 901 s ahead"));
        check(author.event(1, NOW - 1_000, &tags(0), ""), Ok(()));
        check(author.event(1, NOW - 1_001, &tags(0), ""), Err("invalid: created_at is 1001 s ago"));
    }

    /// An import takes any date, and refuses all else alike.
    #[test]
    fn an_import_takes_any_date() {
        let author = Author::new(1);
        let import = |event| ingest().check(event, &Sender::import(), NOW).map(drop);
        assert_eq!(import(author.event(1, NOW * 1_000, &[] as &[Vec<&str>], "")), Ok(()));
        assert_eq!(import(author.event(1, 0, &[] as &[Vec<&str>], "")), Ok(()));
        assert_eq!(import(author.event(1, 0, &[vec!["-"]], "")), Ok(()));
        assert_eq!(import(author.event(22_242, 0, &[] as &[Vec<&str>], "")), Err(Rejection::ClientAuth));
    }

    /// What another relay gives may be of any age, but not of the future, and owes no proof that a client owes; what only
    /// its author may publish stays away.
    #[test]
    fn t38_what_a_mirror_brings() {
        let author = Author::new(1);
        let sender = Sender::relay(Upstream { url: "wss://relay.example.com/".to_owned(), is_mirror: true }, false);
        let mirror = |event| ingest().check(event, &sender, NOW).map(drop).map_err(|error| error.to_string());
        let none: &[Vec<&str>] = &[];
        assert_eq!(mirror(author.event(1, 0, none, "")), Ok(()));
        assert!(mirror(author.event(1, NOW + 901, none, "")).unwrap_err().starts_with("invalid: created_at is 901 s"));
        assert!(mirror(author.event(1, 0, &[vec!["-"]], "")).unwrap_err().starts_with("restricted: "));
    }

    /// Kind 22242 goes nowhere (T33); protected events and reposts that carry one are refused (T38).
    #[test]
    fn t33_t38_policy() {
        let mut config = Config::default();
        config.limits.content_chars_max = 10_000;
        let ingest = ingest_of(config, &MemoryStore::new());
        let author = Author::new(1);
        let none: &[Vec<&str>] = &[];
        let verdict = |event| ingest.check(event, &client(), NOW).map(drop);
        assert_eq!(verdict(author.event(22_242, NOW, none, "")), Err(Rejection::ClientAuth));
        let protected = author.event(1, NOW, &[vec!["-"]], "secret");
        let open = author.event(1, NOW, &[vec!["t", "-"]], "");
        let json = |event: &Event| String::from_utf8(event.canonical().json.to_vec()).unwrap();
        for kind in [6, 16] {
            let spaced = json(&protected).replace("\"-\"", " \"\\u002d\" ");
            assert_eq!(verdict(author.event(kind, NOW, none, &json(&protected))), Err(Rejection::RepostOfProtected));
            assert_eq!(verdict(author.event(kind, NOW, none, &spaced)), Err(Rejection::RepostOfProtected));
            assert_eq!(verdict(author.event(kind, NOW, none, &json(&open))), Ok(()));
            assert_eq!(verdict(author.event(kind, NOW, none, "not JSON")), Ok(()));
        }
        assert_eq!(verdict(author.event(1, NOW, none, &json(&protected))), Ok(()), "only reposts are looked into");
        assert_eq!(verdict(protected.clone()), Err(Rejection::ProtectedNeedsAuth));
        let proven = |authors: &[u8]| {
            let keys = authors.iter().map(|author| Author::new(*author).note(NOW, "").pubkey).collect();
            ingest.check(protected.clone(), &Sender::client([192, 0, 2, 1].into(), keys), NOW).map(drop)
        };
        assert_eq!(proven(&[2]), Err(Rejection::ProtectedForeign));
        assert_eq!(proven(&[2, 1]), Ok(()));
    }

    /// Past its expiration, in that very second too, an event is refused; an unreadable value is none (T31).
    #[test]
    fn t31_expired_events_are_refused() {
        let author = Author::new(1);
        let expiring = |at: &str| author.event(1, NOW, &[vec!["expiration", at]], "");
        check(expiring(&(NOW + 1).to_string()), Ok(()));
        check(expiring(&NOW.to_string()), Err("invalid: the event has expired"));
        check(expiring("soon"), Ok(()));
    }

    /// A request to vanish must name this relay or all of them (T14).
    #[test]
    fn t14_vanish_names_this_relay() {
        let author = Author::new(1);
        let vanish = |url: &str| author.event(62, NOW, &[vec!["relay", url]], "");
        check(vanish("ALL_RELAYS"), Ok(()));
        check(vanish("wss://Relay.example.com/"), Ok(()));
        check(vanish("wss://other.example.com"), Err("invalid: the request to vanish"));
    }

    /// A wrong id costs no signature check, a stored event neither; a wrong signature is told apart.
    #[test]
    fn id_then_stored_then_signature() {
        let author = Author::new(1);
        let store = MemoryStore::new();
        let ingest = ingest_of(Config::default(), &store);
        let verdict = |event| ingest.check(event, &client(), NOW).map(drop);
        let none: &[Vec<&str>] = &[];
        let mut event = author.event(1, NOW, none, "hi");
        store.apply(&[Verified::check(event.clone()).unwrap()], NOW).unwrap();
        event.sig.0[5] ^= 1;
        assert_eq!(verdict(event.clone()), Err(Rejection::Duplicate));
        event.content.push('!');
        assert_eq!(verdict(event), Err(Rejection::Invalid(Invalid::Id)));
        let mut forged = author.event(1, NOW, none, "new");
        forged.sig.0[5] ^= 1;
        assert_eq!(verdict(forged), Err(Rejection::Invalid(Invalid::Signature)));
    }
}
