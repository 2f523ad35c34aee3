//! Which of two events stays: replaceable and addressable events (NIP-01), deletion (NIP-09), expiration (NIP-40),
//! requests to vanish (NIP-62). Every store asks here, so that there is one answer.

use std::cmp::Ordering;

use super::slot::{self, Rank};
use super::{Event, EventId, Fields, Kind, PublicKey, TagLetter};

/// The slot that a replaceable or addressable event occupies (NIP-01).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// A replaceable or addressable kind.
    pub kind: Kind,
    /// The author.
    pub pubkey: PublicKey,
    /// Value of the first `d` tag; empty for replaceable kinds.
    pub d: String,
}

impl Address {
    /// The slot of `event`; `None` for regular and ephemeral kinds, and for versions of settings (see [`slot`]).
    ///
    /// No `d` tag, `["d"]` and `["d",""]` are the same slot; only the first `d` counts.
    pub fn of(event: &Event) -> Option<Self> {
        if slot::is_version(event) {
            return None;
        }
        let d = if event.kind.is_addressable() {
            event.tags.find("d").and_then(|tag| tag.value()).unwrap_or_default()
        } else if event.kind.is_replaceable() {
            ""
        } else {
            return None;
        };
        Some(Address { kind: event.kind, pubkey: event.pubkey, d: d.to_owned() })
    }

    /// Reads an `a` tag's `kind:pubkey:d`; the `d` part may hold colons.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, ':');
        let kind = Kind(parts.next()?.parse().ok()?);
        let pubkey = PublicKey::from_hex(parts.next()?)?;
        let d = parts.next().unwrap_or_default();
        let fits = kind.is_addressable() || (kind.is_replaceable() && d.is_empty());
        fits.then(|| Address { kind, pubkey, d: d.to_owned() })
    }
}

/// What orders the versions of one address: the later wins, among equals the lower id (NIP-01).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// When its author says it was made.
    pub created_at: u64,
    /// Its id.
    pub id: EventId,
}

impl Version {
    /// The version that an event is.
    pub fn of(event: &Event) -> Self {
        Version { created_at: event.created_at, id: event.id }
    }

    /// Whether this version takes the place of `other`.
    pub fn replaces(&self, other: &Version) -> bool {
        let by_time = self.created_at.cmp(&other.created_at);
        by_time.then_with(|| other.id.cmp(&self.id)) == Ordering::Greater
    }
}

/// One thing that a deletion request names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// An `e` tag: this event, if the request's author may delete it.
    Event(EventId),
    /// An `a` tag of the author's own: all versions up to the request's `created_at`.
    Address(Address),
}

/// What one indexed tag of a deletion request by `requester` names; nothing if it is unreadable or a foreign address.
///
/// Whether an `e` target is the author's own is not known before that event is: see [`may_delete`].
pub fn deletion_target(requester: &PublicKey, letter: TagLetter, value: &str) -> Option<Target> {
    match letter.as_byte() {
        b'e' => EventId::from_hex(value).map(Target::Event),
        b'a' => {
            let address = Address::parse(value).filter(|address| address.pubkey == *requester)?;
            Some(Target::Address(address))
        }
        _ => None,
    }
}

/// What a deletion request (kind 5) names.
pub fn deletion_targets(request: &Event) -> impl Iterator<Item = Target> {
    let indexed = request.tags.iter().filter_map(|tag| tag.indexed());
    indexed.filter_map(|(letter, value)| deletion_target(&request.pubkey, letter, value))
}

/// Whether a deletion request by `requester` reaches `event` by its id: its author may, and for a gift wrap, whose
/// author is a throw-away key, its recipient. Deletion requests and requests to vanish stay.
pub fn may_delete(requester: &PublicKey, event: &impl Fields) -> bool {
    let is_recipient = || {
        let hex = requester.to_hex();
        event.kind() == Kind::GIFT_WRAP && event.has_tag(TagLetter::P, &mut |value| value == hex)
    };
    !event.kind().is_undeletable() && (event.pubkey() == requester || is_recipient())
}

/// The keys whose deletion request removes this event.
pub fn deleters(event: &Event) -> impl Iterator<Item = PublicKey> {
    let recipients = (event.kind == Kind::GIFT_WRAP).then(|| event.tags.values("p").filter_map(PublicKey::from_hex));
    std::iter::once(event.pubkey).chain(recipients.into_iter().flatten())
}

/// Whether an expiration time has come; the event is gone in that very second.
pub fn is_expired(expiration: Option<u64>, now: u64) -> bool {
    expiration.is_some_and(|at| at <= now)
}

/// Whether a request to vanish (kind 62) is meant for the relay at `service_url`.
pub fn vanish_applies(request: &Event, service_url: &str) -> bool {
    let own = normal_url(service_url);
    request.tags.values("relay").any(|url| url == "ALL_RELAYS" || (!own.is_empty() && normal_url(url) == own))
}

/// A relay URL in the form that comparisons use: lower-case scheme and host, no default port, no trailing slash.
pub fn normal_url(url: &str) -> String {
    let url = url.trim();
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.trim_end_matches('/').to_ascii_lowercase();
    };
    let scheme = scheme.to_ascii_lowercase();
    let (host, path) = rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash));
    let default_port = if scheme == "wss" || scheme == "https" { ":443" } else { ":80" };
    let host = host.to_ascii_lowercase();
    let host = host.strip_suffix(default_port).unwrap_or(&host);
    format!("{scheme}://{host}{}", path.trim_end_matches('/'))
}

/// What the store knows that bears on an incoming event.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known {
    /// The very event is stored.
    pub stored: bool,
    /// The version that occupies the event's address.
    pub current: Option<Version>,
    /// One of its [`deleters`] asked for this id to be deleted.
    pub deleted_by_id: bool,
    /// Its author deleted the address, up to this `created_at`.
    pub address_deleted_until: Option<u64>,
    /// The newest version of its address that was deleted by id: what that one had replaced stays replaced, whichever
    /// comes first, so that the order of arrival does not matter.
    pub deleted_version: Option<Version>,
    /// Its author, or a gift wrap's recipient, vanished up to this `created_at`.
    pub vanished_until: Option<u64>,
    /// Of a version of settings: where it stands among the others.
    pub rank: Option<Rank>,
}

/// What becomes of an incoming event. `Display` is the `OK` text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Verdict {
    /// It is stored, and takes the place of [`Known::current`] if there is one.
    #[error("")]
    Store,
    /// It is stored as a former version of settings, which is news to nobody.
    #[error("")]
    StoreFormer,
    /// It is stored already.
    #[error("duplicate: already have this event")]
    Duplicate,
    /// A version that wins over it is stored; for the sender this is as good as being stored.
    #[error("duplicate: a newer version is stored")]
    Superseded,
    /// A deletion request covers it.
    #[error("blocked: deleted by its author")]
    Deleted,
    /// A request to vanish covers it.
    #[error("blocked: its author asked to vanish from this relay")]
    Vanished,
    /// Its time has passed.
    #[error("invalid: the event has expired")]
    Expired,
}

impl Verdict {
    /// Whether the sender may regard the event as delivered (the flag of `OK`).
    pub fn is_accepted(self) -> bool {
        self.is_stored() || matches!(self, Verdict::Duplicate | Verdict::Superseded)
    }

    /// Whether the event is stored by this.
    pub fn is_stored(self) -> bool {
        matches!(self, Verdict::Store | Verdict::StoreFormer)
    }
}

/// Decides about an incoming event from what is known.
pub fn judge(event: &Event, known: &Known, now: u64) -> Verdict {
    let covers = |until: Option<u64>| until.is_some_and(|until| event.created_at <= until);
    let deletable = !event.kind.is_undeletable();
    let older_than_deleted = known.deleted_version.is_some_and(|deleted| !Version::of(event).replaces(&deleted));
    if known.stored {
        Verdict::Duplicate
    } else if covers(known.vanished_until) && event.kind != Kind::VANISH {
        Verdict::Vanished
    } else if deletable && (known.deleted_by_id || covers(known.address_deleted_until) || older_than_deleted) {
        Verdict::Deleted
    } else if is_expired(event.expiration(), now) {
        Verdict::Expired
    } else if known.current.is_some_and(|current| !Version::of(event).replaces(&current)) {
        Verdict::Superseded
    } else {
        match known.rank {
            Some(Rank::Surplus) => Verdict::Superseded,
            Some(Rank::Former) => Verdict::StoreFormer,
            Some(Rank::Head) | None => Verdict::Store,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Signature, Tags};

    fn event(kind: u16, created_at: u64, id: u8, tags: &[&[&str]]) -> Event {
        Event {
            id: EventId([id; 32]),
            pubkey: PublicKey([7; 32]),
            created_at,
            kind: Kind(kind),
            tags: Tags::from_lists(tags.iter().map(|tag| tag.iter())),
            content: String::new(),
            sig: Signature([0; 64]),
        }
    }

    /// Later wins, then the lower id; no version wins over itself (T1).
    #[test]
    fn t01_later_then_lower_id() {
        let version = |created_at, id| Version { created_at, id: EventId([id; 32]) };
        assert!(version(2, 9).replaces(&version(1, 1)));
        assert!(version(1, 1).replaces(&version(1, 2)));
        assert!(!version(1, 2).replaces(&version(1, 1)));
        assert!(!version(1, 1).replaces(&version(1, 1)));
    }

    /// A missing, bare or empty `d` is one slot; the first `d` counts; long values are told apart (T3, T4).
    #[test]
    fn t03_t04_addresses() {
        let of = |tags: &[&[&str]]| Address::of(&event(30_000, 1, 1, tags)).expect("addressable");
        assert_eq!(of(&[]), of(&[&["d"]]));
        assert_eq!(of(&[]), of(&[&["d", ""]]));
        assert_eq!(of(&[&["x", "y"], &["d", "a"], &["d", "b"]]), of(&[&["d", "a"]]));
        let long = "x".repeat(300);
        assert_ne!(of(&[&["d", &format!("{long}1")]]), of(&[&["d", &format!("{long}2")]]));
        assert_eq!(Address::of(&event(10_002, 1, 1, &[&["d", "a"]])), Address::of(&event(10_002, 1, 1, &[])));
        assert_eq!(Address::of(&event(41, 1, 1, &[])), None);
    }

    /// Own addresses only, colons in `d` and replaceable kinds included; nothing readable is an empty list (T8, T11).
    #[test]
    fn t08_deletion_targets() {
        let own = PublicKey([7; 32]).to_hex();
        let foreign = PublicKey([8; 32]).to_hex();
        let targets = |values: &[String]| {
            let tags: Vec<[&str; 2]> = values.iter().map(|value| ["a", value.as_str()]).collect();
            let tags: Vec<&[&str]> = tags.iter().map(|tag| &tag[..]).collect();
            deletion_targets(&event(5, 1, 1, &tags)).collect::<Vec<_>>()
        };
        let address =
            |kind, d: &str| Target::Address(Address { kind: Kind(kind), pubkey: PublicKey([7; 32]), d: d.into() });
        assert_eq!(targets(&[format!("30023:{own}:a:b")]), [address(30_023, "a:b")]);
        assert_eq!(targets(&[format!("10002:{own}:")]), [address(10_002, "")]);
        assert_eq!(targets(&[format!("30023:{foreign}:a"), "x".into(), format!("1:{own}:"), "70000:".into()]), []);
    }

    /// The author and a gift wrap's recipient may delete; nobody deletes a deletion (T9, T13).
    #[test]
    fn t09_t13_who_may_delete() {
        let (author, recipient) = (PublicKey([7; 32]), PublicKey([8; 32]));
        let to = recipient.to_hex();
        let tags: &[&[&str]] = &[&["p", &to]];
        assert!(may_delete(&author, &event(1, 1, 1, tags)) && !may_delete(&recipient, &event(1, 1, 1, tags)));
        assert!(may_delete(&author, &event(1059, 1, 1, tags)) && may_delete(&recipient, &event(1059, 1, 1, tags)));
        assert!(!may_delete(&author, &event(5, 1, 1, tags)) && !may_delete(&author, &event(62, 1, 1, tags)));
    }

    /// The order of verdicts, each bound at its edge (T2, T7, T14, T31).
    #[test]
    fn verdicts() {
        let note = event(1, 100, 5, &[&["expiration", "200"], &["expiration", "x"]]);
        let judge = |known: Known, now| judge(&note, &known, now);
        assert_eq!(judge(Known::default(), 199), Verdict::Store);
        assert_eq!(judge(Known::default(), 200), Verdict::Expired);
        assert_eq!(judge(Known { stored: true, deleted_by_id: true, ..Known::default() }, 0), Verdict::Duplicate);
        assert_eq!(judge(Known { deleted_by_id: true, ..Known::default() }, 0), Verdict::Deleted);
        assert_eq!(judge(Known { address_deleted_until: Some(99), ..Known::default() }, 0), Verdict::Store);
        assert_eq!(judge(Known { address_deleted_until: Some(100), ..Known::default() }, 0), Verdict::Deleted);
        assert_eq!(judge(Known { vanished_until: Some(100), ..Known::default() }, 0), Verdict::Vanished);
        assert_eq!(judge(Known { vanished_until: Some(99), ..Known::default() }, 0), Verdict::Store);
        let deleted = |created_at, id| Some(Version { created_at, id: EventId([id; 32]) });
        assert_eq!(judge(Known { deleted_version: deleted(100, 4), ..Known::default() }, 0), Verdict::Deleted);
        assert_eq!(judge(Known { deleted_version: deleted(100, 6), ..Known::default() }, 0), Verdict::Store);
        let newer = Version { created_at: 101, id: EventId([9; 32]) };
        assert_eq!(judge(Known { current: Some(newer), ..Known::default() }, 0), Verdict::Superseded);
    }

    /// Only requests that name this relay or all of them apply; URLs are compared in normal form (T14).
    #[test]
    fn t14_vanish_is_for_the_named_relay() {
        let request = |url| event(62, 1, 1, &[&["relay", url]]);
        let own = "wss://Relay.example.com/";
        for url in ["wss://relay.example.com", "WSS://RELAY.example.com:443/", "ALL_RELAYS"] {
            assert!(vanish_applies(&request(url), own), "{url}");
        }
        for url in ["wss://other.example.com", "ws://relay.example.com", "all_relays", "wss://relay.example.com/x", ""]
        {
            assert!(!vanish_applies(&request(url), own), "{url}");
        }
        assert!(!vanish_applies(&request(""), ""));
    }
}
