//! Maps whose fields merge one by one: each field is a last-writer-wins register under the hybrid logical clock.
//!
//! Settings and the heads of chats are such maps. Merging is commutative, associative and idempotent; a field that was
//! removed stays as a null with its stamp, so that an older value does not come back.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::clock::Hlc;

/// A value and when it was written: `[value, stamp]` in JSON. A null is a removal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Field(pub Value, pub Hlc);

impl Field {
    /// When it was written.
    pub fn stamp(&self) -> Hlc {
        self.1
    }

    /// Whether this field takes the place of `other`: the later does. Two devices that share an identity by mistake may
    /// give one stamp to two values; then the greater text wins, so that all devices agree all the same.
    fn replaces(&self, other: &Field) -> bool {
        match self.1.cmp(&other.1) {
            Ordering::Equal => text_of(&self.0) > text_of(&other.0),
            order => order == Ordering::Greater,
        }
    }
}

fn text_of(value: &Value) -> String {
    value.to_string()
}

/// Fields by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fields(BTreeMap<String, Field>);

impl Fields {
    /// A field's value; `None` if it was never written or was removed.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).map(|field| &field.0).filter(|value| !value.is_null())
    }

    /// The field with its stamp, removed ones too.
    pub fn field(&self, name: &str) -> Option<&Field> {
        self.0.get(name)
    }

    /// All fields, removed ones too.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Field)> {
        self.0.iter().map(|(name, field)| (name.as_str(), field))
    }

    /// Whether nothing was ever written.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes a write, if it is later than what is there. Whether anything changed.
    pub fn set(&mut self, name: &str, field: Field) -> bool {
        match self.0.get_mut(name) {
            Some(have) if !field.replaces(have) => return false,
            Some(have) => *have = field,
            None => drop(self.0.insert(name.to_owned(), field)),
        }
        true
    }

    /// Takes every field of `other` that is later. Whether anything changed.
    pub fn merge(&mut self, other: &Fields) -> bool {
        other.0.iter().fold(false, |changed, (name, field)| self.set(name, field.clone()) || changed)
    }

    /// The latest stamp; [`Hlc::ZERO`] if there is none.
    pub fn latest(&self) -> Hlc {
        self.0.values().map(Field::stamp).max().unwrap_or_default()
    }

    /// Whether all stamps may stand in an event of this `created_at`.
    pub fn are_valid_in(&self, created_at: u64) -> bool {
        self.0.values().all(|field| field.stamp().is_valid_in(created_at))
    }

    /// Drops every field that was written in this second (since 1970) or before.
    pub fn drop_until(&mut self, second: u64) {
        self.0.retain(|_, field| field.stamp().second() > second);
    }
}

impl FromIterator<(String, Field)> for Fields {
    fn from_iter<I: IntoIterator<Item = (String, Field)>>(fields: I) -> Self {
        let mut all = Fields::default();
        for (name, field) in fields {
            all.set(&name, field);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::sync::clock::Device;

    fn field() -> impl Strategy<Value = Field> {
        // So few stamps that they collide, with different values too.
        (0..3u8, 0..4u64, 0..2u64).prop_map(|(value, wall_ms, device)| {
            let value = if value == 0 { Value::Null } else { json!(value) };
            Field(value, Hlc::at(wall_ms, Device(device)))
        })
    }

    fn fields() -> impl Strategy<Value = Fields> {
        prop::collection::vec((prop::sample::select(vec!["a", "b", "c"]), field()), 0..6)
            .prop_map(|fields| fields.into_iter().map(|(name, field)| (name.to_owned(), field)).collect())
    }

    fn merged(mut a: Fields, b: &Fields) -> Fields {
        a.merge(b);
        a
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Law 2: commutative, associative, idempotent, monotone.
        #[test]
        fn law_2_merge(a in fields(), b in fields(), c in fields()) {
            prop_assert_eq!(merged(a.clone(), &b), merged(b.clone(), &a));
            prop_assert_eq!(merged(merged(a.clone(), &b), &c), merged(a.clone(), &merged(b.clone(), &c)));
            prop_assert_eq!(merged(a.clone(), &a), a.clone());
            let both = merged(a.clone(), &b);
            for (name, field) in a.iter() {
                prop_assert!(both.field(name).is_some_and(|have| have.stamp() >= field.stamp()));
            }
        }

        /// The answer of a merge says whether anything changed.
        #[test]
        fn merge_tells_changes(a in fields(), b in fields()) {
            let mut both = a.clone();
            prop_assert_eq!(both.merge(&b), both != a);
        }
    }

    /// The JSON is `[value, stamp]` a field; a removal hides the value and stays.
    #[test]
    fn json_and_removal() {
        let stamp = |wall_ms| Hlc::at(wall_ms, Device(1));
        let mut fields = Fields::default();
        assert!(fields.set("a.b", Field(json!({"x": 1}), stamp(5))));
        let json = r#"{"a.b":[{"x":1},"000000000005-0000-0000000000000001"]}"#;
        assert_eq!(serde_json::to_string(&fields).expect("writable"), json);
        assert_eq!(serde_json::from_str::<Fields>(json).expect("readable"), fields);
        assert!(fields.set("a.b", Field(Value::Null, stamp(6))) && !fields.set("a.b", Field(json!(1), stamp(5))));
        assert_eq!((fields.get("a.b"), fields.latest()), (None, stamp(6)));
        assert!(
            fields.are_valid_in(0)
                && !Fields::from_iter([("x".to_owned(), Field(json!(1), stamp(1_000)))]).are_valid_in(0)
        );
    }
}
