//! An event's tags (NIP-01), held in one buffer: a contact list of 5,000 tags is three allocations, not 15,000.

use std::fmt;
use std::ops::Range;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, SeqAccess, Visitor};

/// A tag name that relays index: one English letter, `a` and `A` being different (NIP-01).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TagLetter(u8);

impl TagLetter {
    /// The `p` of keys that an event refers to.
    pub const P: TagLetter = TagLetter(b'p');
    /// The `L` of label namespaces (NIP-32).
    pub const LABEL_NAMESPACE: TagLetter = TagLetter(b'L');

    /// The letter that is the whole of `name`, if it is one.
    pub fn from_name(name: &str) -> Option<Self> {
        match name.as_bytes() {
            [letter] if letter.is_ascii_alphabetic() => Some(TagLetter(*letter)),
            _ => None,
        }
    }

    /// The letter that an ASCII byte stands for.
    pub fn from_byte(byte: u8) -> Option<Self> {
        byte.is_ascii_alphabetic().then_some(TagLetter(byte))
    }

    /// The letter as an ASCII byte.
    pub fn as_byte(self) -> u8 {
        self.0
    }
}

impl fmt::Display for TagLetter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        char::from(self.0).fmt(f)
    }
}

/// All tags of an event, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tags {
    text: String,
    /// Where each item ends in `text`.
    item_ends: Vec<u32>,
    /// Where each tag ends in `item_ends`.
    tag_ends: Vec<u32>,
}

impl Tags {
    /// Tags from lists of items, as tests and tools write them.
    ///
    /// # Panics
    /// When a tag has no items: NIP-01 knows no empty tag.
    pub fn from_lists<T: AsRef<str>>(tags: impl IntoIterator<Item = impl IntoIterator<Item = T>>) -> Self {
        let mut all = Tags::default();
        for tag in tags {
            for item in tag {
                all.push_item(item.as_ref());
            }
            assert!(all.end_tag(), "a tag has at least one item");
        }
        all
    }

    /// How many tags there are.
    pub fn len(&self) -> usize {
        self.tag_ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tag_ends.is_empty()
    }

    /// The tags in order.
    pub fn iter(&self) -> impl Iterator<Item = Tag<'_>> {
        (0..self.tag_ends.len()).map(|index| Tag { tags: self, items: self.span(&self.tag_ends, index) })
    }

    /// The first value of each tag named `name`, in order.
    pub fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.iter().filter(move |tag| tag.name() == name).filter_map(|tag| tag.value())
    }

    /// The first tag named `name`.
    pub fn find<'a>(&'a self, name: &str) -> Option<Tag<'a>> {
        self.iter().find(|tag| tag.name() == name)
    }

    fn push_item(&mut self, item: &str) {
        self.text.push_str(item);
        self.item_ends.push(self.text.len() as u32);
    }

    /// Closes the tag whose items were pushed; false when it has none.
    fn end_tag(&mut self) -> bool {
        let end = self.item_ends.len() as u32;
        let has_items = end > self.tag_ends.last().copied().unwrap_or(0);
        self.tag_ends.push(end);
        has_items
    }

    fn span(&self, ends: &[u32], index: usize) -> Range<usize> {
        let start = index.checked_sub(1).map_or(0, |before| ends[before] as usize);
        start..ends[index] as usize
    }
}

/// One tag: a name and any number of further items.
#[derive(Clone, Debug)]
pub struct Tag<'a> {
    tags: &'a Tags,
    items: Range<usize>,
}

impl<'a> Tag<'a> {
    /// The first item.
    pub fn name(&self) -> &'a str {
        self.get(0).expect("parsing refuses a tag without items")
    }

    /// The second item, which is the only one that is indexed (NIP-01).
    pub fn value(&self) -> Option<&'a str> {
        self.get(1)
    }

    /// Item `index`, the name being 0.
    pub fn get(&self, index: usize) -> Option<&'a str> {
        let item = self.items.clone().nth(index)?;
        Some(&self.tags.text[self.tags.span(&self.tags.item_ends, item)])
    }

    /// All items, the name first.
    pub fn items(&self) -> impl Iterator<Item = &'a str> {
        let tags = self.tags;
        self.items.clone().map(move |item| &tags.text[tags.span(&tags.item_ends, item)])
    }

    /// Letter and value, if relays index this tag.
    pub fn indexed(&self) -> Option<(TagLetter, &'a str)> {
        Some((TagLetter::from_name(self.name())?, self.value()?))
    }
}

impl<'de> Deserialize<'de> for Tags {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(TagsVisitor)
    }
}

struct TagsVisitor;

impl<'de> Visitor<'de> for TagsVisitor {
    type Value = Tags;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of tags")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Tags, A::Error> {
        let mut tags = Tags::default();
        while seq.next_element_seed(TagSeed(&mut tags))?.is_some() {
            if !tags.end_tag() {
                return Err(A::Error::custom("a tag has no items"));
            }
        }
        Ok(tags)
    }
}

/// Reads the items of one tag into the buffer of all.
struct TagSeed<'t>(&'t mut Tags);

impl<'de> DeserializeSeed<'de> for TagSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for TagSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a tag: a list of strings")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(ItemSeed(self.0))?.is_some() {}
        Ok(())
    }
}

struct ItemSeed<'t>(&'t mut Tags);

impl<'de> DeserializeSeed<'de> for ItemSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for ItemSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string in a tag")
    }

    fn visit_str<E: Error>(self, item: &str) -> Result<(), E> {
        self.0.push_item(item);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Tags, serde_json::Error> {
        serde_json::from_str(json)
    }

    /// What was read is what is given back, item by item; only the first value of a one-letter tag is indexed.
    #[test]
    fn items_and_indexed_values() {
        let tags = parse(r#"[["e","aa","bb"],["client","x"],["-"],["P",""],["d"]]"#).expect("good tags");
        let lists: Vec<Vec<&str>> = tags.iter().map(|tag| tag.items().collect()).collect();
        assert_eq!(lists, [vec!["e", "aa", "bb"], vec!["client", "x"], vec!["-"], vec!["P", ""], vec!["d"]]);
        let indexed: Vec<_> = tags.iter().filter_map(|tag| tag.indexed()).map(|(l, v)| (l.as_byte(), v)).collect();
        assert_eq!(indexed, [(b'e', "aa"), (b'P', "")]);
        assert_eq!(tags, Tags::from_lists(lists));
    }

    /// Empty tags and items that are not strings are refused (T29).
    #[test]
    fn t29_malformed_tags() {
        for bad in ["[[]]", r#"[["e"],[]]"#, "[[1]]", r#"[["e",null]]"#, r#"["e"]"#, "{}", r#"[["e",["x"]]]"#] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
