//! Who may read what: private kinds and our labelled events are for their author and the keys in their `p` tags.
//!
//! One predicate for stored queries, COUNT, live delivery, NEG and search: [`Visibility::allows`]. Pure; which keys a
//! connection has proven (NIP-42) is the caller's knowledge.

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::bytes::PublicKey;
use super::event::Fields;
use super::filter::Filter;
use super::kind::Kind;
use super::label;
use super::slot;
use super::tag::TagLetter;

/// The kinds that only those involved may read. Labelled events are private whatever their kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrivateKinds(Vec<RangeInclusive<u16>>);

impl PrivateKinds {
    /// These kinds; none: only labelled events are private.
    pub fn new(kinds: impl IntoIterator<Item = RangeInclusive<u16>>) -> Self {
        PrivateKinds(kinds.into_iter().collect())
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = Kind> + '_ {
        self.0.iter().cloned().flatten().map(Kind)
    }

    /// Whether this kind is private.
    pub fn contains(&self, kind: Kind) -> bool {
        self.0.iter().any(|range| range.contains(&kind.0))
    }

    /// Whether a filter can match nothing but private events: it names private kinds only, or our label.
    pub fn covers_all_of(&self, filter: &Filter) -> bool {
        let names_our_label = filter.tags.iter().any(|condition| {
            condition.letter == TagLetter::LABEL_NAMESPACE
                && condition.values.iter().all(|value| **value == *label::NAMESPACE)
        });
        names_our_label || filter.kinds.as_ref().is_some_and(|kinds| kinds.iter().all(|kind| self.contains(*kind)))
    }

    /// Whether only those involved may read this event.
    pub fn covers(&self, event: &impl Fields) -> bool {
        self.contains(event.kind()) || label::is_labelled(event)
    }

    /// Who may read this event; `None`: anybody.
    pub fn audience(&self, event: &impl Fields) -> Option<Audience> {
        self.covers(event).then(|| Audience::of(event))
    }
}

/// Who may read a private event: its author and the keys in its `p` tags. Found out once for many readers, since an event
/// may have thousands of such tags.
#[derive(Clone, Debug)]
pub struct Audience(Vec<PublicKey>);

impl Audience {
    fn of(event: &impl Fields) -> Self {
        let mut keys = vec![*event.pubkey()];
        event.has_tag(TagLetter::P, &mut |value| {
            keys.extend(PublicKey::from_hex(value));
            false
        });
        keys.sort_unstable();
        Audience(keys)
    }

    fn has(&self, key: &PublicKey) -> bool {
        self.0.binary_search(key).is_ok()
    }
}

/// What one reader may see. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Visibility(Option<Reader>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Reader {
    private: Arc<PrivateKinds>,
    keys: Arc<[PublicKey]>,
}

impl Visibility {
    /// All of it: for the operator's own commands, never for a connection.
    pub fn everything() -> Self {
        Visibility(None)
    }

    /// What a client sees that has proven these keys; none: what anybody sees.
    pub fn of(private: Arc<PrivateKinds>, keys: Arc<[PublicKey]>) -> Self {
        Visibility(Some(Reader { private, keys }))
    }

    /// What of this anybody sees.
    pub fn public(&self) -> Self {
        Visibility(
            self.0.as_ref().map(|Reader { private, .. }| Reader { private: private.clone(), keys: Arc::default() }),
        )
    }

    /// What is private and which keys the reader has proven; `None` for somebody who sees everything.
    pub fn reader(&self) -> Option<(&PrivateKinds, &[PublicKey])> {
        self.0.as_ref().map(|Reader { private, keys }| (&**private, &**keys))
    }

    /// Whether the reader may see this event.
    pub fn allows(&self, event: &impl Fields) -> bool {
        self.0.as_ref().is_none_or(|reader| !reader.private.covers(event) || is_involved(&reader.keys, event))
    }

    /// Whether the reader may see a private event for this audience.
    pub fn is_among(&self, audience: &Audience) -> bool {
        self.0.as_ref().is_none_or(|reader| reader.keys.iter().any(|key| audience.has(key)))
    }

    /// Whether the reader may see this event, which matches, as an answer to this filter. Versions of settings are for
    /// those who ask for them, former ones for their author by id; see [`slot`].
    pub fn answers(&self, filter: &Filter, event: &impl Fields, is_former: impl FnOnce() -> bool) -> bool {
        let Some(reader) = &self.0 else { return true };
        let is_in_order = || {
            slot::is_asked_for(filter)
                && (!is_former() || (filter.ids.is_some() && reader.keys.contains(event.pubkey())))
        };
        self.allows(event) && (!slot::is_version(event) || is_in_order())
    }
}

/// Whether one of these keys is the author or one that a `p` tag names.
fn is_involved(keys: &[PublicKey], event: &impl Fields) -> bool {
    let is_among = |value: &str| PublicKey::from_hex(value).is_some_and(|key| keys.contains(&key));
    !keys.is_empty() && (keys.contains(event.pubkey()) || event.has_tag(TagLetter::P, &mut |value| is_among(value)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::testing::{Author, NOW};

    /// Private kinds and labelled events: author and recipients only; everything else: anybody (T34).
    #[test]
    fn t34_author_and_recipients_only() {
        let (author, recipient, stranger) = (Author::new(1), Author::new(2), Author::new(3));
        let to = recipient.note(NOW, "").pubkey.to_hex();
        let private = Arc::new(PrivateKinds::new([4..=4, 1059..=1060]));
        let sees = |who: &[&Author], kind, tags: &[Vec<&str>]| {
            let keys: Arc<[PublicKey]> = who.iter().map(|who| who.note(NOW, "").pubkey).collect();
            let (reader, event) = (Visibility::of(private.clone(), keys), author.event(kind, NOW, tags, ""));
            let allowed = reader.allows(&event);
            let among = private.audience(&event).is_none_or(|audience| reader.is_among(&audience));
            assert_eq!(allowed, among, "both ways of asking agree");
            allowed
        };
        let addressed = vec![vec!["p", to.as_str()]];
        let labelled = vec![vec!["L", label::NAMESPACE], vec!["p", to.as_str()]];
        for (kind, tags) in
            [(4, &addressed), (1059, &addressed), (1060, &addressed), (1, &labelled), (30_001, &labelled)]
        {
            assert!(sees(&[&author], kind, tags) && sees(&[&recipient], kind, tags), "{kind}");
            assert!(sees(&[&stranger, &recipient], kind, tags), "{kind}");
            assert!(!sees(&[&stranger], kind, tags) && !sees(&[], kind, tags), "{kind}");
        }
        assert!(sees(&[], 1, &addressed) && sees(&[], 30_001, &addressed) && sees(&[], 1, &[vec!["L", "other"]]));
    }
}
