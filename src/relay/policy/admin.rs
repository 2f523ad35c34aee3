//! Carrying out decisions: on the writer's thread, in steps between batches, so that a ban with many stored events holds up
//! nobody for long.
//!
//! In: calls of management methods (NIP-86), from HTTP, the control socket or the command line. Out: an [`Answer`], once the
//! decision is saved and what is stored has followed it. What a stop or a crash cut off is gone on with at the next start.

use std::sync::Arc;

use serde_json::Value;

use super::methods::{self, Caller, Effects};
use super::{Policy, members};
use crate::config::IpRange;
use crate::protocol::{Event, EventId, Filter, Kind, PublicKey, Verified};
use crate::relay::fanout::Fanout;
use crate::store::{Removal, Store, StoreError, for_each_match};

/// Events removed in one step; publishers wait behind it.
const ERASED_AT_ONCE: usize = 500;

/// What only the writer's thread has: the right to write.
pub struct Desk<'d> {
    /// Written to.
    pub store: &'d dyn Store,
    /// Told what was stored; `None`: nobody listens, on the command line.
    pub fanout: Option<&'d Fanout>,
    /// Seconds since 1970.
    pub now: u64,
}

impl Desk<'_> {
    /// Stores the relay's own events and delivers them live.
    ///
    /// # Errors
    /// When the store does not take them.
    pub fn publish(&self, events: &[Verified<Event>]) -> Result<(), StoreError> {
        if events.is_empty() {
            return Ok(());
        }
        let applied = self.store.apply(events, self.now)?;
        if let Some(fanout) = self.fanout {
            let epoch = fanout.begin_batch(Some(applied.end));
            for event in &applied.others {
                fanout.dispatch_from_elsewhere(epoch, event);
            }
            for event in events {
                fanout.dispatch(epoch, event);
            }
        }
        Ok(())
    }
}

/// Work for the writer's thread beside events. Returns whether it wants another turn.
pub type Chore = Box<dyn FnMut(&Desk<'_>) -> bool + Send>;

/// What a call came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// `result`, or the text of `error`.
    pub result: Result<Value, String>,
    /// Connections from these addresses are to be closed.
    pub block: Option<IpRange>,
}

/// A call of a method.
#[derive(Clone, Debug)]
pub struct Call {
    /// Who calls.
    pub caller: Caller,
    /// The method's name.
    pub method: String,
    /// Its parameters.
    pub params: Vec<Value>,
}

/// The work that a call is; `answer` gets its end, once.
pub fn chore(policy: Arc<Policy>, call: Call, answer: impl FnOnce(Answer) + Send + 'static) -> Chore {
    let mut stage = Stage::Called(call);
    let mut answer = Some(answer);
    Box::new(move |desk| {
        let next = match std::mem::replace(&mut stage, Stage::Done) {
            Stage::Called(call) => decide(&policy, &call, desk),
            Stage::Erasing(given) => erase_some(&policy, given, desk),
            Stage::Answering(_) | Stage::Done => Stage::Done,
        };
        match next {
            Stage::Answering(given) => {
                if let Some(answer) = answer.take() {
                    answer(given);
                }
                false
            }
            Stage::Done => false,
            more => {
                stage = more;
                true
            }
        }
    })
}

/// How far a call is.
enum Stage {
    Called(Call),
    /// Stored events of banned keys are being removed; then this is the answer.
    Erasing(Answer),
    Answering(Answer),
    Done,
}

fn decide(policy: &Policy, call: &Call, desk: &Desk<'_>) -> Stage {
    let (result, effects) = match methods::call(policy, &call.caller, &call.method, &call.params, desk.now) {
        Ok((value, effects)) => (Ok(value), effects),
        Err(problem) => (Err(problem), Effects::default()),
    };
    tracing::info!(method = %call.method, caller = ?call.caller, ok = result.is_ok(), "management call");
    let mut answer = Answer { result, block: effects.block };
    if let Err(error) = follow(policy, &effects, desk) {
        tracing::error!(%error, "a decision is in force, but not all of what follows from it");
        answer.result = Err(format!("decided, but not carried out: {error}"));
    }
    if policy.decided().erasing.is_empty() { Stage::Answering(answer) } else { Stage::Erasing(answer) }
}

fn follow(policy: &Policy, effects: &Effects, desk: &Desk<'_>) -> Result<(), StoreError> {
    if let Some(id) = effects.erase {
        desk.store.remove(&[id], Removal::Operator)?;
    }
    let Some(key) = &policy.key else { return Ok(()) };
    if *effects == Effects::default() {
        return Ok(());
    }
    let events = policy.decide(|decided| Ok(members::events_for(key, decided, effects, desk.now)));
    desk.publish(&events.unwrap_or_default())
}

fn erase_some(policy: &Policy, mut answer: Answer, desk: &Desk<'_>) -> Stage {
    match erase_step(policy, desk) {
        Ok(true) => Stage::Erasing(answer),
        Ok(false) => Stage::Answering(answer),
        Err(problem) => {
            tracing::error!(%problem, "stored events of banned keys are still there; the next start tries again");
            answer.result = Err(format!("decided, but not carried out: {problem}"));
            Stage::Answering(answer)
        }
    }
}

/// Removes some stored events of banned keys; whether there may be more.
fn erase_step(policy: &Policy, desk: &Desk<'_>) -> Result<bool, String> {
    let Some(key) = policy.decided().erasing.first().copied() else { return Ok(false) };
    let ids = to_erase(policy, desk.store, key).map_err(|error| error.to_string())?;
    desk.store.remove(&ids, Removal::Operator).map_err(|error| error.to_string())?;
    if ids.len() < ERASED_AT_ONCE {
        policy.decide(|decided| {
            decided.erasing.remove(&key);
            Ok(())
        })?;
    }
    Ok(!policy.decided().erasing.is_empty())
}

/// Why a walk through stored events ends early.
enum Ended {
    Enough,
    Failed(StoreError),
}

impl From<StoreError> for Ended {
    fn from(error: StoreError) -> Self {
        Ended::Failed(error)
    }
}

/// The next stored events of a banned key. Requests to vanish stay, since they must hold on, and so does what was allowed.
fn to_erase(policy: &Policy, store: &dyn Store, key: PublicKey) -> Result<Vec<EventId>, StoreError> {
    let filter = Filter { authors: Some(vec![key]), ..Filter::default() };
    let mut ids = Vec::new();
    let walked = for_each_match(store, vec![filter], |row| {
        let event = std::str::from_utf8(&row.json).ok().and_then(|json| Event::from_json(json).ok());
        let is_vanish = event.is_some_and(|event| event.kind == Kind::VANISH);
        if !is_vanish && !policy.decided().allowed_events.contains_key(&row.id) {
            ids.push(row.id);
        }
        if ids.len() >= ERASED_AT_ONCE { Err(Ended::Enough) } else { Ok(()) }
    });
    match walked {
        Err(Ended::Failed(error)) => Err(error),
        Ok(()) | Err(Ended::Enough) => Ok(ids),
    }
}

/// The work of a start: going on with what the last run has left, and publishing the list of members if it is not the one
/// that is stored.
pub fn start_chore(policy: Arc<Policy>) -> Chore {
    let mut listed = false;
    Box::new(move |desk| {
        if !std::mem::replace(&mut listed, true) {
            let published = members::list_if_stale(&policy, desk.store, desk.now).and_then(|list| desk.publish(&list));
            if let Err(error) = published {
                tracing::warn!(%error, "the list of members was not published");
            }
        }
        erase_step(&policy, desk).unwrap_or_else(|problem| {
            tracing::error!(%problem, "stored events of banned keys are still there; the next start tries again");
            false
        })
    })
}
