//! What links do with a profile: take the next steps, bring answers, bring events.

use std::collections::HashSet;

use super::{Profile, State};
use crate::client::carry::Carried;
use crate::client::status::RelayStatus;
use crate::client::unwanted::Why;
use crate::protocol::item::Item;
use crate::protocol::{Event, EventId, Filter, Kind, Tags, Verified};
use crate::store::{StoreError, fault};
use crate::sync::cipher::SealError;
use crate::sync::draft::{Draft, Op, SettingsForm};
use crate::sync::outbox::{Change, Content, Debt, Entry, RelayUrl, Seq, Step};
use crate::sync::shape;

/// Steps that are taken at a time for one relay: a window, and the signatures it needs.
const STEPS_MAX: usize = 128;

/// What a link is to do next.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// Canonical JSON of events to be sent, in this order.
    pub events: Vec<String>,
    /// Nothing goes out before the keys are proven.
    pub authenticate: bool,
    /// When to ask again, milliseconds since 1970; `None`: when something happens.
    pub wait_until_ms: Option<u64>,
}

/// A relay's answer to an event.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The event.
    pub id: EventId,
    /// Whether the relay has it.
    pub accepted: bool,
    /// Why.
    pub text: String,
}

/// A link that came up.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// The relay has judged our proof of the keys.
    pub proven: bool,
    /// What its clock says about ours.
    pub clock_offset_ms: Option<i64>,
    /// It keeps settings in slots of their own.
    pub slots: bool,
}

impl Profile {
    /// A link came up. The relay's clock corrects ours, what is unsigned is dated anew, and what is in a form that this
    /// relay is not to get is settled.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn link_up(&self, relay: &RelayUrl, arrival: Arrival) -> Result<(), StoreError> {
        let mut state = self.state();
        let state = &mut *state;
        // What has expired is judged by the relay's clock, and the clock must know every stamp before
        // drafts are dated anew. (Those of drafts it knows since they were written, or since the start.)
        if let Some(offset_ms) = arrival.clock_offset_ms {
            state.clock.correct(offset_ms);
        }
        self.collections(state)?;
        let rules = state.outbox.rules_mut();
        rules.link_up(relay);
        if arrival.proven {
            rules.authenticated(relay);
        }
        let mut changes = rules.settle_unsuited(relay, |entry| suits(entry, arrival.slots));
        if arrival.clock_offset_ms.is_some() {
            changes.extend(rules.restamp(&mut state.clock, self.world.now_ms()));
        }
        state.up.insert(relay.clone());
        let status = state.relays.entry(relay.clone()).or_default();
        (status.slots, status.clock_offset_ms) = (arrival.slots, arrival.clock_offset_ms);
        state.outbox.record(changes, false)
    }

    /// A link is gone.
    pub fn link_down(&self, relay: &RelayUrl) {
        let mut state = self.state();
        state.outbox.rules_mut().link_down(relay);
        state.up.remove(relay);
        if state.up.is_empty() {
            state.clock.doubt();
        }
    }

    /// What the relay has is being fetched, anew if it was before: what merges does not go out.
    pub fn fetching(&self, relay: &RelayUrl) {
        self.state().outbox.rules_mut().fetching(relay);
    }

    /// Everything that the relay had is here; what merges may go out.
    pub fn fetched(&self, relay: &RelayUrl) {
        self.state().outbox.rules_mut().fetched(relay);
    }

    /// The relay has judged our proof; what was refused for want of one is sent again.
    pub fn authenticated(&self, relay: &RelayUrl) {
        self.state().outbox.rules_mut().authenticated(relay);
    }

    /// What the link is to do next. What it is to send is signed, durable and in the cache when this returns.
    ///
    /// # Errors
    /// When the disk refuses. Nothing may be sent then, and the link counts as gone.
    pub fn steps(&self, relay: &RelayUrl, answer_time_ms: u64) -> Result<Steps, StoreError> {
        let mut state = self.state();
        let state = &mut *state;
        self.collections(state)?;
        let now_ms = self.world.now_ms();
        let sent_before = now_ms.saturating_sub(answer_time_ms);
        state.outbox.rules_mut().time_out(relay, sent_before, now_ms, self.world.chance());
        let mut steps = Steps::default();
        let mut changes = Vec::new();
        for _ in 0..STEPS_MAX {
            match state.outbox.rules_mut().next(relay, now_ms) {
                Step::Sign(seq) => changes.extend(self.sign(state, seq)),
                Step::Send { event, .. } => steps.events.push(event),
                Step::Authenticate => {
                    steps.authenticate = true;
                    break;
                }
                Step::Wait(until) => {
                    steps.wait_until_ms = until;
                    break;
                }
            }
        }
        if let Err(error) = self.make_durable(state, changes) {
            // What was taken for sent is owed as before.
            state.outbox.rules_mut().link_down(relay);
            return Err(error);
        }
        self.refresh(state);
        Ok(steps)
    }

    fn make_durable(&self, state: &mut State, changes: Vec<Change>) -> Result<(), StoreError> {
        state.outbox.record(changes, true)?;
        if !state.uncached.is_empty() {
            let signed = std::mem::take(&mut state.uncached);
            if let Err(error) = self.put(state, &signed) {
                state.uncached = signed;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Makes one event of the drafts that are told together. Without anything left to say, they are taken out.
    fn sign(&self, state: &mut State, seq: Seq) -> Vec<Change> {
        let mut dated = None;
        if !state.clock.is_corrected() {
            // This relay has not told the time. What is signed is dated for good, and with it whatever was written around
            // it: otherwise a deletion might come to be dated before what it deletes.
            dated = state.outbox.rules_mut().restamp(&mut state.clock, self.world.now_ms());
        }
        let mut changes: Vec<Change> = dated.into_iter().collect();
        changes.extend(self.sign_dated(state, seq));
        changes
    }

    fn sign_dated(&self, state: &mut State, seq: Seq) -> Vec<Change> {
        let told = state.outbox.rules().drafts_told_with(seq);
        let seqs: Vec<Seq> = told.iter().map(|(seq, _)| *seq).collect();
        let drafts: Vec<&Draft> = told.iter().map(|(_, draft)| *draft).collect();
        let collections = state.collections.as_ref().expect("made before any step is taken");
        let rules = match collections.build(&drafts, state.clock.device(), &self.cipher) {
            Ok(Some(unsigned)) => {
                let tags = Tags::from_lists(unsigned.tags.into_iter().filter(|tag| !tag.is_empty()));
                let event = self.keys.sign(unsigned.kind, unsigned.created_at, tags, unsigned.content);
                let change = state.outbox.rules_mut().freeze(seq, &event);
                state.uncached.push(event);
                return vec![change];
            }
            Ok(None) => {
                let rules = state.outbox.rules_mut();
                return seqs.into_iter().filter_map(|seq| rules.withdraw(seq)).collect();
            }
            Err(error) => bury(state.outbox.rules().entries(), &seqs, &error),
        };
        rules.iter().for_each(|change| state.outbox.rules_mut().apply(change));
        rules
    }

    /// Takes a relay's answers to what it was owed.
    ///
    /// # Errors
    /// When the disk refuses; the answers hold until the next start, and the relay is asked again then.
    pub fn answered(&self, relay: &RelayUrl, answers: &[Answer]) -> Result<(), StoreError> {
        let mut state = self.state();
        let now_ms = self.world.now_ms();
        let mut changes = Vec::new();
        for Answer { id, accepted, text } in answers {
            let chance = self.world.chance();
            changes.extend(state.outbox.rules_mut().answer(relay, id, *accepted, text, now_ms, chance));
        }
        fault::point("outbox.answered");
        let recorded = state.outbox.record(changes, false);
        self.refresh(&state);
        recorded.and_then(|()| self.learn(&mut state, relay, answers))
    }

    /// Takes a relay's answers to what it lacked.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn uploaded(&self, relay: &RelayUrl, answers: &[Answer]) -> Result<(), StoreError> {
        let mut state = self.state();
        let taken = answers.iter().filter(|answer| answer.accepted).count();
        state.relays.entry(relay.clone()).or_default().uploaded += taken;
        self.refresh(&state);
        self.learn(&mut state, relay, answers)
    }

    /// Remembers what the relay does not want.
    fn learn(&self, state: &mut State, relay: &RelayUrl, answers: &[Answer]) -> Result<(), StoreError> {
        let now_secs = self.true_secs(&state.clock);
        for why in [Why::Overtaken, Why::Refused] {
            let such = answers.iter().filter(|answer| Why::of(answer.accepted, &answer.text) == Some(why));
            state.unwanted.note(relay, why, such.map(|answer| answer.id).collect(), now_secs)?;
        }
        Ok(())
    }

    /// Takes events that came from somewhere. How many were new; those that are not what they claim to be are passed
    /// over.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn take(&self, events: Vec<Event>) -> Result<usize, StoreError> {
        let (checked, _) = checked(events);
        if checked.is_empty() {
            return Ok(0);
        }
        let mut state = self.state();
        let taken = self.put(&mut state, &checked)?;
        self.refresh(&state);
        Ok(taken.new)
    }

    /// Takes events that a relay gave, as [`Profile::take`] does, remembers those that are not wanted here, and tells the
    /// links to other relays of those that the user wrote.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn take_from(&self, relay: &RelayUrl, events: Vec<Event>) -> Result<usize, StoreError> {
        if events.is_empty() {
            return Ok(0);
        }
        let (checked, mut unwanted) = checked(events);
        let mut state = self.state();
        let taken = self.put(&mut state, &checked)?;
        for item in taken.own {
            // No other link: then nobody lacks it that could be told.
            let _ = self.carried.send(Carried { from: relay.clone(), item });
        }
        unwanted.extend(taken.unwanted);
        let now_secs = self.true_secs(&state.clock);
        state.unwanted.note(relay, Why::NotHere, unwanted, now_secs)?;
        state.relays.entry(relay.clone()).or_default().fetched += taken.new;
        self.refresh(&state);
        Ok(taken.new)
    }

    /// What a filter matches here, but for what the relay does not want: what a comparison with it compares.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub fn items_for(&self, relay: &RelayUrl, filter: &Filter) -> Result<Vec<Item>, StoreError> {
        let now_secs = self.now_secs();
        let mut items = self.cache.items(filter, now_secs, self.keys.pubkey())?;
        let state = self.state();
        if state.unwanted.has(relay) {
            items.retain(|item| matches!(state.unwanted.why(relay, &item.id, now_secs), None | Some(Why::NotHere)));
        }
        Ok(items)
    }

    /// Which of these events, that the relay has and a comparison did not find here, are to be fetched.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub fn wanted_from(&self, relay: &RelayUrl, ids: Vec<EventId>) -> Result<Vec<EventId>, StoreError> {
        let mut state = self.state();
        if !state.unwanted.has(relay) {
            return Ok(ids);
        }
        let now_secs = self.true_secs(&state.clock);
        let (mut wanted, mut shown) = (Vec::new(), Vec::new());
        for id in ids {
            match state.unwanted.why(relay, &id, now_secs) {
                Some(Why::NotHere) => {}
                // It was left out of the comparison because the relay had not wanted it, and the relay shows it.
                Some(Why::Overtaken | Why::Refused) if self.cache.contains(&id)? => shown.push(id),
                _ => wanted.push(id),
            }
        }
        state.unwanted.forget(relay, &shown)?;
        Ok(wanted)
    }

    /// Owes what is to be said again now that everything of the relays is known: merged settings, merged heads of chats.
    /// Nothing when all is said.
    ///
    /// # Errors
    /// When the disk refuses. What does not fit into the outbox is tried again after the next catch-up.
    pub fn say_what_is_due(&self) -> Result<(), StoreError> {
        let mut state = self.state();
        let state = &mut *state;
        self.collections(state)?;
        let collections = state.collections.as_ref().expect("made above");
        let due = collections.due(state.outbox.rules().drafts().map(|(_, draft)| draft));
        self.say_again(state, due).map(drop)
    }

    /// Which of these events the relay is owed, or has refused: no reconciliation needs to upload them.
    pub fn known_to_outbox(&self, relay: &RelayUrl) -> HashSet<EventId> {
        let state = self.state();
        let entries = state.outbox.rules().entries();
        let unpaid = |entry: &Entry| entry.debts.get(relay).is_some_and(|debt| !matches!(debt, Debt::Paid(_)));
        entries.filter(|(_, entry)| unpaid(entry)).filter_map(|(_, entry)| entry.id).collect()
    }

    /// How much this relay is owed.
    pub fn owed_to(&self, relay: &RelayUrl) -> usize {
        self.state().outbox.rules().link_status(relay).owed
    }

    /// Changes what is told of a relay.
    pub fn tell(&self, relay: &RelayUrl, change: impl FnOnce(&mut RelayStatus)) {
        let mut state = self.state();
        change(state.relays.entry(relay.clone()).or_default());
        self.refresh(&state);
    }
}

/// Events that are what they claim to be, and the ids of those that are not.
fn checked(events: Vec<Event>) -> (Vec<Verified<Event>>, Vec<EventId>) {
    let (mut checked, mut wrong) = (Vec::new(), Vec::new());
    for event in events {
        let id = event.id;
        match Verified::check(event) {
            Ok(event) => checked.push(event),
            Err(problem) => {
                tracing::warn!(%id, "a relay gave a false event: {problem}");
                wrong.push(id);
            }
        }
    }
    (checked, wrong)
}

/// A draft that cannot become an event goes to the dead letters, where a person sees it.
fn bury<'e>(entries: impl Iterator<Item = (Seq, &'e Entry)>, seqs: &[Seq], error: &SealError) -> Vec<Change> {
    let mut changes = Vec::new();
    for (seq, entry) in entries.filter(|(seq, _)| seqs.contains(seq)) {
        let relays = entry.debts.keys().cloned();
        changes.extend(relays.map(|relay| Change::Buried { seq, relay, reason: error.to_string() }));
    }
    changes
}

/// Settings travel in two forms, and a relay takes one of them.
fn suits(entry: &Entry, slots: bool) -> bool {
    let form = match &entry.content {
        Content::Draft(draft) => match &draft.op {
            Op::Settings { form, .. } => Some(*form),
            _ => None,
        },
        Content::Event(json) => Event::from_json(json).ok().and_then(|event| form_of(&event)),
    };
    match form {
        Some(SettingsForm::Slot) => slots,
        Some(SettingsForm::Document) => !slots,
        None => true,
    }
}

/// In which form an event says settings, if it does.
pub fn form_of(event: &Event) -> Option<SettingsForm> {
    let kinds: [(Kind, SettingsForm); 2] =
        [(shape::SETTINGS, SettingsForm::Slot), (shape::SETTINGS_DOCUMENT, SettingsForm::Document)];
    let is_ours = shape::Schema::of(event) == Some(shape::Schema::Settings);
    kinds.into_iter().find(|(kind, _)| is_ours && event.kind == *kind).map(|(_, form)| form)
}
