//! Which relay may have which event.
//!
//! Public events go where their author writes and the people they name read (NIP-65). Labelled events go only to the
//! relays that the user named for them: chats and settings to the home relays, training data to its own allow-list.
//! Pure: relay lists come in as an argument.

use std::collections::BTreeSet;

use crate::protocol::label;
use crate::protocol::{Event, Filter, Kind, PublicKey};
use crate::sync::draft::Audience;
use crate::sync::outbox::RelayUrl;
use crate::sync::shape;

/// A user's list of relays (NIP-65).
pub const RELAY_LIST: Kind = Kind(10_002);
/// Relays that are taken from one person's list, since lists of hundreds exist.
const RELAYS_A_PERSON_MAX: usize = 4;
/// People whose relays get a copy of an event that names them.
const PEOPLE_MAX: usize = 16;

/// Which relays a signed event may go to: by its labels. Training data of a version not known here is training data.
pub fn audience_of(event: &Event) -> Audience {
    if !label::is_labelled(event) {
        return Audience::Public;
    }
    let is_training = event.tags.iter().any(|tag| {
        tag.name() == "l"
            && tag.get(2) == Some(label::NAMESPACE)
            && tag.value().is_some_and(|value| value.starts_with("training/"))
    });
    if is_training { Audience::Training } else { Audience::Private }
}

/// A person's relays (NIP-65).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RelayList {
    /// Where they publish.
    pub write: Vec<RelayUrl>,
    /// Where they look for what concerns them.
    pub read: Vec<RelayUrl>,
}

impl RelayList {
    /// Reads a relay list event. What is no relay's URL is passed over; only the first few count.
    pub fn of(event: &Event) -> RelayList {
        let mut list = RelayList::default();
        for tag in event.tags.iter().filter(|tag| tag.name() == "r") {
            let Some(url) = tag.value().filter(|url| url.starts_with("wss://") || url.starts_with("ws://")) else {
                continue;
            };
            let marker = tag.get(2);
            for (wanted, relays) in [("write", &mut list.write), ("read", &mut list.read)] {
                if marker.is_none_or(|marker| marker == wanted) && relays.len() < RELAYS_A_PERSON_MAX {
                    relays.push(RelayUrl::new(url));
                }
            }
        }
        list
    }
}

/// The relays that the user named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routing {
    home: BTreeSet<RelayUrl>,
    training: BTreeSet<RelayUrl>,
}

/// What a relay is to this user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Role {
    /// It keeps the user's own events: it is reconciled with.
    pub home: bool,
    /// It may have training data.
    pub training: bool,
}

impl Routing {
    /// From the URLs of the settings.
    pub fn new<'u>(home: impl IntoIterator<Item = &'u String>, training: impl IntoIterator<Item = &'u String>) -> Self {
        let urls = |urls: &mut dyn Iterator<Item = &'u String>| urls.map(|url| RelayUrl::new(url)).collect();
        Routing { home: urls(&mut home.into_iter()), training: urls(&mut training.into_iter()) }
    }

    /// All relays that are named.
    pub fn named(&self) -> BTreeSet<RelayUrl> {
        self.home.union(&self.training).cloned().collect()
    }

    /// The relays that keep the user's events.
    pub fn home(&self) -> impl Iterator<Item = RelayUrl> + '_ {
        self.home.iter().cloned()
    }

    /// What this relay is.
    pub fn role(&self, relay: &RelayUrl) -> Role {
        Role { home: self.home.contains(relay), training: self.training.contains(relay) }
    }

    /// The relays for what is labelled; `None` for what is public.
    pub fn labelled(&self, audience: Audience) -> Option<Vec<RelayUrl>> {
        match audience {
            Audience::Public => None,
            Audience::Private => Some(self.home.iter().cloned().collect()),
            Audience::Training => Some(self.training.iter().cloned().collect()),
        }
    }

    /// The relays for a public event: the home relays, those its author writes to, and those where the people that `p`
    /// tags name read.
    pub fn public(&self, event: &Event, list_of: impl Fn(&PublicKey) -> Option<RelayList>) -> Vec<RelayUrl> {
        let mut relays = self.home.clone();
        relays.extend(list_of(&event.pubkey).unwrap_or_default().write);
        let people = event.tags.values("p").filter_map(PublicKey::from_hex).filter(|key| *key != event.pubkey);
        for person in people.take(PEOPLE_MAX) {
            relays.extend(list_of(&person).unwrap_or_default().read);
        }
        relays.into_iter().collect()
    }

    /// Whether a relay may have an event that it does not have: what a reconciliation uploads.
    pub fn may_have(&self, relay: &RelayUrl, event: &Event) -> bool {
        let role = self.role(relay);
        match audience_of(event) {
            Audience::Public | Audience::Private => role.home,
            Audience::Training => role.training,
        }
    }

    /// What is kept equal here and on a relay: the user's own events, and labelled ones that are for the user.
    pub fn scopes(&self, relay: &RelayUrl, user: PublicKey) -> Vec<Filter> {
        let role = self.role(relay);
        let filter = |json: String| Filter::from_json(&json).expect("made of hex and constants");
        let ours = format!("\"#L\":[\"{}\"]", label::NAMESPACE);
        let mut scopes = Vec::new();
        if role.home {
            scopes.push(filter(format!("{{\"authors\":[\"{user}\"]}}")));
            // Settings in slots are given only to who names the label; everything else would be compared twice.
            scopes.push(filter(format!("{{\"authors\":[\"{user}\"],\"kinds\":[{}],{ours}}}", shape::SETTINGS)));
        } else if role.training {
            scopes.push(filter(format!("{{\"authors\":[\"{user}\"],{ours}}}")));
        }
        if role.home || role.training {
            scopes.push(filter(format!("{{\"#p\":[\"{user}\"],{ours}}}")));
        }
        scopes
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::protocol::testing::{NOW, sign};

    fn urls(texts: &[&str]) -> Vec<RelayUrl> {
        texts.iter().map(|text| RelayUrl::new(text)).collect()
    }

    fn routing() -> Routing {
        Routing::new(&["wss://home.example".to_owned()], &["wss://train.example/".to_owned()])
    }

    /// Markers decide, none means both, rubbish and the fifth relay are passed over.
    #[test]
    fn relay_lists_are_read() {
        let tags: &[&[&str]] = &[
            &["r", "wss://both.example"],
            &["r", "wss://out.example/", "write"],
            &["r", "WSS://x"],
            &["r", "https://no.example"],
            &["r"],
            &["r", "wss://in.example", "read"],
            &["r", "wss://odd.example", "sideways"],
        ];
        let list = RelayList::of(&sign(1, 10_002, NOW, tags, ""));
        assert_eq!(list.write, urls(&["wss://both.example", "wss://out.example"]));
        assert_eq!(list.read, urls(&["wss://both.example", "wss://in.example"]));
        let many: Vec<String> = (0..9).map(|number| format!("wss://{number}.example")).collect();
        let tags: Vec<[&str; 2]> = many.iter().map(|url| ["r", url.as_str()]).collect();
        let tags: Vec<&[&str]> = tags.iter().map(|tag| &tag[..]).collect();
        assert_eq!(RelayList::of(&sign(1, 10_002, NOW, &tags, "")).read.len(), RELAYS_A_PERSON_MAX);
    }

    /// Training data goes to its allow-list and nowhere else, chats to the home relays and nowhere else, also when the
    /// user's public list names more.
    #[test]
    fn labelled_events_go_to_their_relays_only() {
        let routing = routing();
        let [home, train] = ["wss://home.example", "wss://train.example"].map(RelayUrl::new);
        for (label, audience, home_may, train_may) in [
            ("chat.msg/1", Audience::Private, true, false),
            ("settings/1", Audience::Private, true, false),
            ("training/1", Audience::Training, false, true),
        ] {
            let event = sign(1, 1, NOW, &[&["L", label::NAMESPACE], &["l", label, label::NAMESPACE]], "");
            assert_eq!(audience_of(&event), audience, "{label}");
            assert_eq!(routing.may_have(&home, &event), home_may, "{label}");
            assert_eq!(routing.may_have(&train, &event), train_may, "{label}");
            let expected = if home_may { &home } else { &train };
            assert_eq!(routing.labelled(audience), Some(vec![expected.clone()]));
        }
        assert_eq!(routing.labelled(Audience::Public), None);
        // A label in a namespace of somebody else's is none of ours.
        assert_eq!(audience_of(&sign(1, 1, NOW, &[&["L", "x"], &["l", "training/1", "x"]], "")), Audience::Public);
    }

    /// A public event goes to the home relays, where its author writes and where those it names read.
    #[test]
    fn public_events_follow_relay_lists() {
        let reader = sign(2, 1, NOW, &[], "").pubkey;
        let hex = reader.to_hex();
        let event = sign(1, 1, NOW, &[&["p", &hex], &["p", "rubbish"]], "");
        let list = RelayList { write: urls(&["wss://w"]), read: urls(&["wss://r"]) };
        let relays = routing().public(&event, |_| Some(list.clone()));
        assert_eq!(relays, urls(&["wss://home.example", "wss://r", "wss://w"]));
        assert_eq!(routing().public(&event, |_| None), urls(&["wss://home.example"]));
    }

    /// A home relay is asked for everything of the user's, a training relay for labelled events only, others for nothing.
    #[test]
    fn scopes_follow_the_role() {
        let user = sign(1, 1, NOW, &[], "").pubkey;
        let count = |url| routing().scopes(&RelayUrl::new(url), user).len();
        assert_eq!([count("wss://home.example"), count("wss://train.example"), count("wss://x")], [3, 2, 0]);
    }
}
