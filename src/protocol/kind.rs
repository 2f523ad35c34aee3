//! Event kinds and the ranges that decide how a relay treats them (NIP-01).

use std::fmt;

use serde::Deserialize;

/// What an event is about, and by its range how a relay keeps it (NIP-01).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(transparent)]
pub struct Kind(pub u16);

impl Kind {
    /// Profile (NIP-01).
    pub const METADATA: Kind = Kind(0);
    /// Contact list (NIP-02).
    pub const CONTACTS: Kind = Kind(3);
    /// Deletion request (NIP-09).
    pub const DELETION: Kind = Kind(5);
    /// Repost of a note (NIP-18).
    pub const REPOST: Kind = Kind(6);
    /// Repost of anything else (NIP-18).
    pub const GENERIC_REPOST: Kind = Kind(16);
    /// Request to vanish (NIP-62).
    pub const VANISH: Kind = Kind(62);
    /// Gift wrap (NIP-59).
    pub const GIFT_WRAP: Kind = Kind(1059);
    /// Report of objectionable content (NIP-56).
    pub const REPORT: Kind = Kind(1984);
    /// Somebody was added to the members of a relay (NIP-43).
    pub const MEMBER_ADDED: Kind = Kind(8000);
    /// Somebody was removed from them (NIP-43).
    pub const MEMBER_REMOVED: Kind = Kind(8001);
    /// A relay's list of members (NIP-43).
    pub const MEMBERS: Kind = Kind(13534);
    /// Request to join the members, with an invitation (NIP-43).
    pub const JOIN: Kind = Kind(28934);
    /// An invitation, made when asked for (NIP-43).
    pub const INVITE: Kind = Kind(28935);
    /// Request to be no longer a member (NIP-43).
    pub const LEAVE: Kind = Kind(28936);
    /// A role that members may have (NIP-43).
    pub const ROLE: Kind = Kind(33534);
    /// Authorisation of an HTTP request (NIP-98); no relay is to get it.
    pub const HTTP_AUTH: Kind = Kind(27235);
    /// Gift wrap that is not stored (NIP-59).
    pub const EPHEMERAL_GIFT_WRAP: Kind = Kind(21059);
    /// Answer to an authentication challenge (NIP-42); never stored or broadcast.
    pub const CLIENT_AUTH: Kind = Kind(22242);

    /// Only the latest of an author is kept.
    pub fn is_replaceable(self) -> bool {
        matches!(self.0, 0 | 3 | 10_000..=19_999)
    }

    /// Delivered to those who listen now, never stored.
    pub fn is_ephemeral(self) -> bool {
        matches!(self.0, 20_000..=29_999)
    }

    /// Only the latest of an author and `d` tag is kept.
    pub fn is_addressable(self) -> bool {
        matches!(self.0, 30_000..=39_999)
    }

    /// Whether its author is a throw-away key, so that only the `p` tag tells whom it concerns (NIP-59; 1060 is in use for
    /// wrapped messages too).
    pub fn is_wrapped(self) -> bool {
        matches!(self, Kind::GIFT_WRAP | Kind(1060) | Kind::EPHEMERAL_GIFT_WRAP)
    }

    /// Deletion requests and requests to vanish stay in force: no kind 5 removes them (NIP-09, NIP-62).
    pub fn is_undeletable(self) -> bool {
        self == Kind::DELETION || self == Kind::VANISH
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The edges of every range of NIP-01; kind 41 is a regular kind (T5).
    #[test]
    fn t05_ranges() {
        for kind in [0, 3, 10_000, 19_999] {
            assert!(Kind(kind).is_replaceable(), "{kind}");
        }
        for kind in [1, 2, 4, 41, 9_999, 20_000] {
            assert!(!Kind(kind).is_replaceable(), "{kind}");
        }
        assert!(Kind(20_000).is_ephemeral() && Kind(29_999).is_ephemeral());
        assert!(!Kind(19_999).is_ephemeral() && !Kind(30_000).is_ephemeral());
        assert!(Kind(30_000).is_addressable() && Kind(39_999).is_addressable());
        assert!(!Kind(29_999).is_addressable() && !Kind(40_000).is_addressable());
    }
}
