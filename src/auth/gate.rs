//! What a question is answered with before anything is looked up: is authentication missing (NIP-42), or the right key?
//!
//! Only questions that can bring nothing but what the client may not see are refused. All others are answered from what it
//! may see ([`Visibility`]), so that a client without authentication keeps its feed.

use std::sync::Arc;

use super::Session;
use crate::config::{Access, Config};
use crate::protocol::visibility::PrivateKinds;
use crate::protocol::{Filter, PublicKey, TagLetter, Visibility};

const READ_NEEDS_AUTH: &str = "auth-required: this relay is for authenticated readers";
const PRIVATE_NEEDS_AUTH: &str = "auth-required: these events are for their authors and recipients only";
const FOREIGN: &str = "restricted: these events are for others than the keys you have authenticated with";

/// What is private here, for as long as the relay runs: live delivery goes by it too.
#[derive(Clone, Debug)]
pub struct Gate {
    private: Arc<PrivateKinds>,
}

impl Gate {
    /// The gate of these settings.
    pub fn new(config: &Config) -> Self {
        Gate { private: Arc::new(PrivateKinds::new(config.access.private_kinds.iter().map(|kinds| kinds.range()))) }
    }

    /// The kinds that only those involved may read.
    pub fn private(&self) -> &Arc<PrivateKinds> {
        &self.private
    }

    /// What a client sees: the operator everything, others what is public and what concerns the keys they have proven.
    pub fn visible_to(&self, session: &Session) -> Visibility {
        if session.is_operator() {
            return Visibility::everything();
        }
        Visibility::of(self.private.clone(), session.keys().clone())
    }

    /// Why a REQ, COUNT or the like is not answered; the text for `CLOSED`. `access` may have changed since the start.
    pub fn refuse(&self, filters: &[Filter], session: &Session, access: &Access) -> Option<&'static str> {
        if session.is_operator() {
            None
        } else if session.keys().is_empty() && access.auth_required_to_read {
            Some(READ_NEEDS_AUTH)
        } else {
            self.refuse_private(filters, session.keys())
        }
    }

    fn refuse_private(&self, filters: &[Filter], keys: &[PublicKey]) -> Option<&'static str> {
        let mut asked = filters.iter().filter(|filter| !filter.matches_nothing()).peekable();
        asked.peek()?;
        if keys.is_empty() {
            asked.all(|filter| self.private.covers_all_of(filter)).then_some(PRIVATE_NEEDS_AUTH)
        } else {
            asked.all(|filter| self.is_foreign(filter, keys)).then_some(FOREIGN)
        }
    }

    /// Whether a filter asks for private kinds between others than these keys. The author of a gift wrap is a throw-away
    /// key, so its recipient alone decides.
    fn is_foreign(&self, filter: &Filter, keys: &[PublicKey]) -> bool {
        let Some(kinds) = &filter.kinds else {
            return false;
        };
        let Some(recipients) = filter.tags.iter().find(|condition| condition.letter == TagLetter::P) else {
            return false;
        };
        let by_none_of_them = match &filter.authors {
            Some(authors) => !authors.iter().any(|author| keys.contains(author)),
            None => kinds.iter().all(|kind| kind.is_wrapped()),
        };
        let to_them = |value: &str| PublicKey::from_hex(value).is_some_and(|key| keys.contains(&key));
        by_none_of_them
            && kinds.iter().all(|kind| self.private.contains(*kind))
            && !recipients.values.iter().any(|value| to_them(value))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::auth::Challenge;
    use crate::protocol::label;

    const ME: PublicKey = PublicKey([1; 32]);

    #[track_caller]
    fn check(filters: &[String], keys: &[PublicKey], expected: &str) {
        let gate = Gate::new(&Config::default());
        let filters: Vec<Filter> = filters.iter().map(|json| Filter::from_json(json).unwrap()).collect();
        assert_eq!(
            gate.refuse_private(&filters, keys).unwrap_or_default().split(':').next(),
            Some(expected),
            "{filters:?}"
        );
    }

    /// What can bring nothing but private events needs AUTH; whatever may bring something else is answered.
    #[test]
    fn t34_questions_about_private_events_only_need_auth() {
        let me = ME.to_hex();
        for private in [
            r#"{"kinds":[1059]}"#.to_owned(),
            format!(r##"{{"kinds":[1059],"#p":["{me}"]}}"##),
            r#"{"kinds":[4,13,14,21059]}"#.to_owned(),
            format!(r##"{{"kinds":[30001],"#L":["{}"]}}"##, label::NAMESPACE),
        ] {
            check(std::slice::from_ref(&private), &[], "auth-required");
            check(std::slice::from_ref(&private), &[ME], "");
            check(&[private.clone(), private.clone()], &[], "auth-required");
            check(&[private.clone(), r#"{"kinds":[1]}"#.to_owned()], &[], "");
            check(&[private, r#"{"kinds":[]}"#.to_owned()], &[], "auth-required");
        }
        for public in [
            "{}".to_owned(),
            r#"{"kinds":[]}"#.to_owned(),
            r#"{"kinds":[4,1]}"#.to_owned(),
            format!(r##"{{"#p":["{me}"]}}"##),
            r##"{"#L":["other"]}"##.to_owned(),
        ] {
            check(&[public], &[], "");
        }
    }

    /// Another person's mail is restricted; what may concern one of the keys is answered.
    #[test]
    fn t34_the_mail_of_others_is_restricted() {
        let (me, other, third) = (ME.to_hex(), PublicKey([2; 32]).to_hex(), PublicKey([3; 32]).to_hex());
        for foreign in [
            format!(r##"{{"kinds":[1059],"#p":["{other}"]}}"##),
            format!(r##"{{"kinds":[4],"#p":["{other}"],"authors":["{third}"]}}"##),
        ] {
            check(&[foreign], &[ME], "restricted");
        }
        for own in [
            format!(r##"{{"kinds":[1059],"#p":["{other}","{me}"]}}"##),
            format!(r##"{{"kinds":[4],"#p":["{other}"]}}"##),
            format!(r##"{{"kinds":[4],"#p":["{other}"],"authors":["{me}"]}}"##),
            format!(r##"{{"kinds":[4],"authors":["{other}"]}}"##),
            format!(r##"{{"kinds":[1,1059],"#p":["{other}"]}}"##),
        ] {
            check(&[own], &[ME], "");
        }
    }

    /// Where reading needs authentication, nothing is answered without; an empty list of private kinds hides nothing.
    #[test]
    fn settings_decide() {
        let mut config = Config::default();
        config.access.private_kinds = Vec::new();
        let mail = [Filter::from_json(r#"{"kinds":[1059]}"#).unwrap()];
        let gate = Gate::new(&config);
        assert_eq!(gate.refuse_private(&mail, &[]), None);
        let anybody = Session::new(Challenge::new([7; 16]), None);
        assert_eq!(gate.refuse(&mail, &anybody, &config.access), None);
        config.access.auth_required_to_read = true;
        assert_eq!(gate.refuse(&mail, &anybody, &config.access), Some(READ_NEEDS_AUTH));
        assert_eq!(gate.refuse(&mail, &anybody.of_operator(), &config.access), None);
    }
}
