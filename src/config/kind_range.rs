//! Event kinds in a rule: one (`7`) or a range, both ends included (`"1000-1999"`).

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One kind, or a range of kinds with both its ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KindRange {
    first: u16,
    last: u16,
}

impl KindRange {
    /// Whether it holds this kind.
    pub fn contains(&self, kind: u16) -> bool {
        self.range().contains(&kind)
    }

    /// The same as a range of numbers.
    pub fn range(&self) -> RangeInclusive<u16> {
        self.first..=self.last
    }
}

/// The text is neither a kind nor a range of kinds.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither a kind such as 7 nor a range such as \"1000-1999\"; kinds go up to 65535")]
pub struct KindRangeError(String);

impl FromStr for KindRange {
    type Err = KindRangeError;

    fn from_str(text: &str) -> Result<Self, KindRangeError> {
        let wrong = || KindRangeError(text.to_owned());
        let number = |part: &str| part.trim().parse::<u16>().map_err(|_| wrong());
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let range = KindRange { first: number(first)?, last: number(last)? };
        if range.first <= range.last { Ok(range) } else { Err(wrong()) }
    }
}

impl fmt::Display for KindRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first == self.last {
            true => write!(f, "{}", self.first),
            false => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

impl Serialize for KindRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.first == self.last {
            true => serializer.serialize_u16(self.first),
            false => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for KindRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NumberOrText;
        impl Visitor<'_> for NumberOrText {
            type Value = KindRange;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a kind such as 7 or a range such as \"1000-1999\"")
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<KindRange, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<KindRange, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<KindRange, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(NumberOrText)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Both ends belong to a range; what is neither is named.
    #[test]
    fn kinds_and_ranges() {
        let range: KindRange = "1000-1999".parse().unwrap();
        assert_eq!([999, 1000, 1999, 2000].map(|kind| range.contains(kind)), [false, true, true, false]);
        assert!("7".parse::<KindRange>().unwrap().contains(7));
        for text in ["", "-", "7-", "9-7", "65536", "-1", "seven"] {
            assert_eq!(text.parse::<KindRange>(), Err(KindRangeError(text.to_owned())));
        }
    }
}
