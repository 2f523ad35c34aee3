//! From a filter to the stretches of the index that hold all its matches. Pure.
//!
//! Whatever plan is chosen, each record is checked against the whole filter afterwards: a plan decides how much is
//! read, never what is answered.

use crate::protocol::{EventId, Filter, Kind, PublicKey, TagLetter};

/// Where to look for a filter's matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan<'f> {
    /// Nowhere: nothing can match.
    Nothing,
    /// At these ids, one look-up each.
    Ids(&'f [EventId]),
    /// In these stretches, merged newest first.
    Ranges(Vec<Stretch<'f>>),
}

/// Events that an index keeps together, newest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stretch<'f> {
    /// Every event.
    Time,
    /// An author's events.
    Author(&'f PublicKey),
    /// An author's events of a kind.
    AuthorKind(&'f PublicKey, Kind),
    /// The events of a kind.
    Kind(Kind),
    /// The events with a tag value.
    Tag(TagLetter, &'f str),
}

impl Stretch<'_> {
    /// What the index it lies in goes by, in words.
    pub fn index(&self) -> &'static str {
        match self {
            Stretch::Time => "time",
            Stretch::Author(_) => "author",
            Stretch::AuthorKind(..) => "author and kind",
            Stretch::Kind(_) => "kind",
            Stretch::Tag(..) => "tag",
        }
    }
}

/// More stretches than this by author and kind cost more to open than reading the authors' other kinds.
const AUTHOR_KINDS_MAX: usize = 512;

/// Chooses the narrowest index.
///
/// Ids name single events. A tag that refers to one thing (an event, an address, a quote) has few events a value, an
/// author has more, a topic or a mentioned person may have very many, a kind most of all.
pub fn plan(filter: &Filter) -> Plan<'_> {
    if filter.matches_nothing() {
        return Plan::Nothing;
    }
    if let Some(ids) = &filter.ids {
        return Plan::Ids(ids);
    }
    let narrow = narrowest_tag(filter, refers_to_one_thing);
    let ranges = narrow.or_else(|| by_author(filter)).or_else(|| narrowest_tag(filter, |_| true));
    let ranges = ranges.or_else(|| Some(filter.kinds.as_ref()?.iter().map(|kind| Stretch::Kind(*kind)).collect()));
    Plan::Ranges(ranges.unwrap_or_else(|| vec![Stretch::Time]))
}

/// From so many stretches on, opening them costs more than most answers.
const MANY_STRETCHES: usize = 16;

/// The indexes that `filter` can be looked up in, the one that [`plan`] chooses first; `None` where its rules do well
/// enough without looking at what is stored, as they do for nearly all questions.
pub fn rivals(filter: &Filter) -> Option<Vec<Vec<Stretch<'_>>>> {
    let Plan::Ranges(chosen) = plan(filter) else { return None };
    let is_narrow = match chosen.first()? {
        Stretch::Tag(letter, _) => refers_to_one_thing(*letter),
        Stretch::Author(_) | Stretch::AuthorKind(..) => filter.tags.is_empty(),
        Stretch::Kind(_) | Stretch::Time => return None,
    };
    if is_narrow && chosen.len() < MANY_STRETCHES {
        return None;
    }
    let by_tags = filter.tags.iter().map(|condition| {
        condition.values.iter().map(|value| Stretch::Tag(condition.letter, value)).collect::<Vec<_>>()
    });
    let by_kind = filter.kinds.as_ref().map(|kinds| kinds.iter().map(|kind| Stretch::Kind(*kind)).collect());
    let by_time = filter.kinds.is_none().then(|| vec![Stretch::Time]);
    let others = by_author(filter).into_iter().chain(by_tags).chain(by_kind).chain(by_time);
    let others: Vec<_> = others.filter(|other| *other != chosen).collect();
    Some(std::iter::once(chosen).chain(others).collect())
}

/// Tags whose value is one event, address or identifier.
fn refers_to_one_thing(letter: TagLetter) -> bool {
    matches!(letter.as_byte(), b'e' | b'E' | b'a' | b'A' | b'q' | b'd' | b'i' | b'I' | b'x')
}

fn narrowest_tag(filter: &Filter, eligible: impl Fn(TagLetter) -> bool) -> Option<Vec<Stretch<'_>>> {
    let eligible = filter.tags.iter().filter(|condition| eligible(condition.letter));
    let narrowest = eligible.min_by_key(|condition| condition.values.len())?;
    Some(narrowest.values.iter().map(|value| Stretch::Tag(narrowest.letter, value)).collect())
}

fn by_author(filter: &Filter) -> Option<Vec<Stretch<'_>>> {
    let authors = filter.authors.as_ref()?;
    match &filter.kinds {
        Some(kinds) if authors.len() * kinds.len() <= AUTHOR_KINDS_MAX => {
            let pairs = authors.iter().flat_map(|author| kinds.iter().map(move |kind| (author, *kind)));
            Some(pairs.map(|(author, kind)| Stretch::AuthorKind(author, kind)).collect())
        }
        _ => Some(authors.iter().map(Stretch::Author).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(json: &str, expected: &[Stretch<'_>]) {
        let filter = Filter::from_json(json).expect(json);
        assert_eq!(plan(&filter), Plan::Ranges(expected.to_vec()), "{json}");
    }

    /// One line a rule, the rules in their order.
    #[test]
    fn the_narrowest_index_is_chosen() {
        let (author, hex) = (PublicKey([0xab; 32]), "ab".repeat(32));
        let tag = |letter, value| Stretch::Tag(TagLetter::from_byte(letter).expect("letter"), value);
        check("{}", &[Stretch::Time]);
        check(r#"{"kinds":[1,7]}"#, &[Stretch::Kind(Kind(1)), Stretch::Kind(Kind(7))]);
        check(&format!(r#"{{"authors":["{hex}"]}}"#), &[Stretch::Author(&author)]);
        check(&format!(r#"{{"authors":["{hex}"],"kinds":[3]}}"#), &[Stretch::AuthorKind(&author, Kind(3))]);
        check(&format!(r##"{{"authors":["{hex}"],"#t":["x"]}}"##), &[Stretch::Author(&author)]);
        check(&format!(r##"{{"authors":["{hex}"],"#e":["{hex}"]}}"##), &[tag(b'e', &hex)]);
        check(r##"{"#t":["x","y"],"#r":["z"],"kinds":[1]}"##, &[tag(b'r', "z")]);
        assert_eq!(plan(&Filter::from_json(r#"{"kinds":[]}"#).expect("good")), Plan::Nothing);
        let ids = Filter::from_json(&format!(r#"{{"ids":["{hex}"],"kinds":[1]}}"#)).expect("good");
        assert_eq!(plan(&ids), Plan::Ids(&[EventId([0xab; 32])]));
    }

    /// The rules are enough for most questions; where they are not, every index that holds all matches is in question.
    #[test]
    fn rivals_are_sought_where_the_rules_do_not_tell() {
        let hex = |n: u8| format!("{n:02x}").repeat(32);
        let authors = |count| (0..count).map(|n| format!("\"{}\"", hex(n))).collect::<Vec<_>>().join(",");
        let names = |json: &str| {
            let filter = Filter::from_json(json).expect(json);
            let indexes = rivals(&filter)?;
            assert_eq!(Plan::Ranges(indexes[0].clone()), plan(&filter));
            Some(indexes.iter().map(|stretches| stretches[0].index()).collect::<Vec<_>>())
        };
        let one_thing = format!("{{\"#e\":[\"{}\"],\"kinds\":[1]}}", hex(1));
        for json in ["{}", r#"{"kinds":[1]}"#, r#"{"ids":[]}"#, &one_thing] {
            assert_eq!(names(json), None, "{json}");
        }
        assert_eq!(names(&format!("{{\"authors\":[{}],\"kinds\":[1]}}", authors(15))), None);
        let many = names(&format!("{{\"authors\":[{}],\"kinds\":[1]}}", authors(16)));
        assert_eq!(many, Some(vec!["author and kind", "kind"]));
        let kindless = names(&format!("{{\"authors\":[{}]}}", authors(16)));
        assert_eq!(kindless, Some(vec!["author", "time"]));
        let topic = names(r##"{"kinds":[30023],"#t":["x"]}"##);
        assert_eq!(topic, Some(vec!["tag", "kind"]));
        let both = names(&format!("{{\"authors\":[{}],\"#p\":[\"{}\"],\"kinds\":[1]}}", authors(1), hex(9)));
        assert_eq!(both, Some(vec!["author and kind", "tag", "kind"]));
    }
}
