//! Invitations for whoever asks with a REQ for kind 28935 (NIP-43): made for the asker, never stored.
//!
//! In: a question's filters and the keys that the asker has proven. Out: the invitation as the first row of the answer, or
//! why there is none.

use std::sync::Arc;

use super::Policy;
use super::admin::Chore;
use super::members::new_invite;
use super::methods::Result;
use crate::protocol::{Event, Filter, Kind, PublicKey, Tags, Verified};
use crate::relay::outbox::{Outbox, Outgoing};
use crate::relay::query::{Job, Page, PageEnd};
use crate::store::Row;

const NEEDS_AUTH: &str = "auth-required: invitations are for members";
const NOT_YOURS: &str = "restricted: your key may not invite others";

/// What a question calls for.
#[derive(Debug, PartialEq, Eq)]
pub enum Question {
    /// Nothing of this module.
    Other,
    /// An invitation in the name of this key, and what is stored.
    Invite(PublicKey),
    /// It asks for invitations alone, and there are none for the asker; the text for `CLOSED`.
    Refused(&'static str),
}

/// Looks at a question by somebody who has proven these keys.
pub fn question(policy: &Policy, filters: &[Filter], keys: &[PublicKey]) -> Question {
    let names = |filter: &Filter| filter.kinds.as_ref().is_some_and(|kinds| kinds.contains(&Kind::INVITE));
    if !filters.iter().any(names) {
        return Question::Other;
    }
    let only = |filter: &Filter| filter.kinds.as_ref().is_some_and(|kinds| kinds == &[Kind::INVITE]);
    let refused = |text| if filters.iter().all(only) { Question::Refused(text) } else { Question::Other };
    match asker(policy, keys) {
        None => Question::Other,
        Some(Asker::May(key)) => Question::Invite(key),
        Some(Asker::Unknown) => refused(NEEDS_AUTH),
        Some(Asker::Other) => refused(NOT_YOURS),
    }
}

/// The page that refuses a question.
pub fn refusal(serial: u64, text: &'static str) -> Outgoing {
    Outgoing::Page(Box::new(Page { serial, rows: Vec::new(), end: PageEnd::Failed(text) }))
}

/// Makes the invitation and puts it before the rows that `job` will find. Work for the writer's thread, since it saves.
pub fn chore(policy: Arc<Policy>, by: PublicKey, filters: Vec<Filter>, outbox: Arc<Outbox>, job: Job) -> Chore {
    let mut job = Some(job);
    Box::new(move |desk| {
        let Some(job) = job.take() else { return false };
        let invitation = invite(&policy, by, desk.now).unwrap_or_else(|problem| {
            tracing::warn!(%problem, "an invitation was not made");
            None
        });
        let wanted = invitation.filter(|event| filters.iter().any(|filter| filter.matches(&**event)));
        let row = |event: Verified<Event>| Row {
            id: event.id,
            created_at: event.created_at,
            json: event.canonical().json.clone(),
        };
        let page = Page { serial: job.serial(), rows: wanted.map(row).into_iter().collect(), end: PageEnd::More(job) };
        outbox.push(Outgoing::Page(Box::new(page)));
        false
    })
}

/// Who asks for an invitation, and may have one.
#[derive(Debug)]
enum Asker {
    /// Nobody who has authenticated.
    Unknown,
    /// Somebody who may not invite.
    Other,
    /// A member or an admin.
    May(PublicKey),
}

/// Whether somebody who has proven these keys may have an invitation. `None`: there are no members here.
fn asker(policy: &Policy, keys: &[PublicKey]) -> Option<Asker> {
    policy.key.as_ref()?;
    let decided = policy.decided();
    let may = |key: &&PublicKey| {
        let is_inviting_member = policy.config().members.may_invite && decided.members.contains_key(key);
        policy.is_admin(key) || (is_inviting_member && !decided.banned_keys.contains_key(key))
    };
    Some(match keys.iter().find(may) {
        Some(key) => Asker::May(*key),
        None if keys.is_empty() => Asker::Unknown,
        None => Asker::Other,
    })
}

/// An invitation for one person (kind 28935), in the name of `by`. Whoever asks again gets the same one until it is used, so that
/// asking fills no memory. On the writer's thread: it saves.
///
/// # Errors
/// A text when it cannot be saved.
fn invite(policy: &Policy, by: PublicKey, now: u64) -> Result<Option<Verified<Event>>> {
    let Some(key) = &policy.key else { return Ok(None) };
    policy.decide(|decided| {
        let own = decided.invites.iter().find(|(_, invite)| invite.by == Some(by) && invite.expires > now);
        let code = match own {
            Some((code, _)) => code.clone(),
            None => new_invite(policy, decided, 1, None, Some(by), now)?,
        };
        let at = decided.sign_at(now);
        Ok(Some(key.sign(Kind::INVITE, at, Tags::from_lists([vec!["-"], vec!["claim", &code]]))))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;
    use crate::protocol::testing::NOW;
    use crate::relay::policy::tests::{ADMIN, join, key, room};

    /// Members get an invitation when they ask, the same one again until it is used; others do not.
    #[test]
    fn members_may_invite() {
        let room = room(|config| {
            config.members.enabled = true;
            config.members.may_invite = true;
        });
        room.call("addmember", json!([key(1).to_hex()]));
        let asks = |json: &[&str], keys: &[u8]| {
            let filters: Vec<Filter> = json.iter().map(|json| Filter::from_json(json).unwrap()).collect();
            let keys: Vec<PublicKey> = keys.iter().map(|number| key(*number)).collect();
            question(&room.policy, &filters, &keys)
        };
        let plain = r#"{"kinds":[28935]}"#;
        assert_eq!(asks(&[plain], &[]), Question::Refused(NEEDS_AUTH));
        assert_eq!(asks(&[plain], &[2]), Question::Refused(NOT_YOURS));
        assert_eq!(asks(&[plain, r#"{"kinds":[1]}"#], &[]), Question::Other);
        assert_eq!(asks(&["{}"], &[1]), Question::Other);
        assert_eq!(asks(&[plain], &[2, 1]), Question::Invite(key(1)));
        assert_eq!(asks(&[plain], &[ADMIN]), Question::Invite(key(ADMIN)));
        let code = || {
            let invite = invite(&room.policy, key(1), NOW).unwrap().unwrap();
            assert_eq!((invite.kind, Some(invite.pubkey)), (Kind::INVITE, room.policy.relay_key()));
            invite.tags.values("claim").next().unwrap().to_owned()
        };
        let first = code();
        assert_eq!(code(), first);
        assert!(room.request(&join(2, NOW, &first)).0);
        assert_ne!(code(), first);
        room.call("removemember", json!([key(1).to_hex()]));
        assert_eq!(room.call("listinvites", json!([])), json!([]), "his invitations go with him");
    }
}
