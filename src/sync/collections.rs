//! All collections of a person behind one door: events in, drafts out as events.

use std::collections::BTreeMap;

use super::chat::message::{self, MessageDraft};
use super::chat::{ChatKey, ChatView, Chats};
use super::cipher::{Cipher, SealError};
use super::clock::{Clock, Device, Hlc};
use super::draft::{Draft, Op, SettingsForm};
use super::settings::Settings;
use super::shape::{Schema, Unsigned};
use super::training::{Training, is_training_kind};
use crate::protocol::{Event, Kind, PublicKey, Verified};

/// What became of an event that was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absorbed {
    /// It is one of ours and counts. That it changes anything is not said.
    Taken,
    /// It is none of ours, or of a version not known here.
    NotOurs,
    /// It claims to be one of ours and is not; why.
    Invalid(&'static str),
}

/// Chats, settings and training data of one key.
#[derive(Clone, Debug)]
pub struct Collections {
    me: PublicKey,
    /// All chats.
    pub chats: Chats,
    /// The settings.
    pub settings: Settings,
    /// Training data.
    pub training: Training,
}

impl Collections {
    /// Nothing yet.
    pub fn new(me: PublicKey) -> Self {
        Collections { me, chats: Chats::default(), settings: Settings::default(), training: Training::default() }
    }

    /// Whose collections they are.
    pub fn me(&self) -> PublicKey {
        self.me
    }

    /// Takes an event from a relay or the cache, in any order and as often as it comes, and shows `clock` its stamp.
    pub fn absorb(&mut self, event: &Verified<Event>, cipher: &dyn Cipher, clock: &mut Clock) -> Absorbed {
        if event.kind == Kind::DELETION || event.kind == Kind::VANISH {
            return self.absorb_deletion(event, clock);
        }
        let stamp = match Schema::of(event) {
            Some(Schema::ChatHead) => self.chats.take_head(event, cipher),
            Some(Schema::ChatMessage) => self.chats.take_message(event, cipher),
            Some(Schema::Settings) => self.settings.take(event, cipher),
            Some(Schema::Training) if is_training_kind(event.kind) => self.training.take(event).map(|()| Hlc::ZERO),
            _ => return Absorbed::NotOurs,
        };
        match stamp {
            Ok(stamp) => {
                clock.observe(stamp);
                Absorbed::Taken
            }
            Err(why) => Absorbed::Invalid(why),
        }
    }

    fn absorb_deletion(&mut self, request: &Event, clock: &mut Clock) -> Absorbed {
        let chats = self.chats.take_deletion(request);
        let training = self.training.take_deletion(request);
        if (chats || training) && request.pubkey == self.me {
            // What is written after the deletion was seen is written after its whole second.
            clock.observe(end_of_second(request.created_at));
        }
        Absorbed::Taken
    }

    /// Takes everything of another state of the same person, made from other events.
    pub fn merge(&mut self, other: Collections) {
        self.chats.merge(other.chats);
        self.settings.merge(other.settings);
        self.training.merge(other.training);
    }

    /// The chats as the app sees them.
    pub fn chat_view<'s>(&'s self, drafts: impl IntoIterator<Item = &'s Draft>) -> ChatView<'s> {
        ChatView::new(&self.chats, self.me, drafts)
    }

    /// The event that tells these drafts, as [`super::outbox::Outbox::drafts_told_with`] gives them; nothing if there is
    /// nothing to say any more, and the entry is to be withdrawn.
    ///
    /// # Errors
    /// See [`SealError`].
    pub fn build(&self, drafts: &[&Draft], device: Device, cipher: &dyn Cipher) -> Result<Option<Unsigned>, SealError> {
        let Some(last) = drafts.last() else { return Ok(None) };
        let stamp = last.written.stamp;
        match &last.op {
            Op::Plain(plain) => Ok(Some(Unsigned {
                kind: Kind(plain.kind),
                created_at: stamp.second(),
                tags: plain.tags.clone(),
                content: plain.content.clone(),
            })),
            Op::Head { chat, .. } => {
                let key = ChatKey { owner: self.me, id: chat.clone() };
                self.chats.build_head(&key, drafts, cipher)
            }
            Op::Message(_) => message::build(cipher, &messages(drafts)),
            Op::Delete(deletion) => Ok(Some(deletion.build(stamp))),
            Op::Settings { form, .. } => self.settings.build(*form, device, drafts, cipher),
            Op::Training(op) => Ok(Some(op.build(stamp))),
        }
    }

    /// What is to be said again because the relays' versions say less than is known; empty at rest. `drafts` are all that
    /// wait. To be queued when a catch-up is done; a driver whose cache lets go of replaced versions queues what is due of
    /// heads ([`Chats::heads_due`]) before the cache takes the event that replaces them.
    pub fn due<'d>(&self, drafts: impl IntoIterator<Item = &'d Draft>) -> Vec<Op> {
        let drafts: Vec<&Draft> = drafts.into_iter().collect();
        let mut due = self.heads_due(&drafts);
        let waits = |draft: &&Draft| matches!(draft.op, Op::Settings { form: SettingsForm::Slot, .. });
        if self.settings.merge_due() && !drafts.iter().any(waits) {
            due.push(Op::Settings { form: SettingsForm::Slot, fields: BTreeMap::new() });
        }
        due
    }

    /// The part of [`Collections::due`] that is about heads of chats.
    pub fn heads_due(&self, drafts: &[&Draft]) -> Vec<Op> {
        let due = self.chats.heads_due(&self.me, drafts).into_iter();
        due.map(|(chat, known)| Op::Head { chat, fields: BTreeMap::new(), known }).collect()
    }
}

/// The latest stamp that is valid in a second.
fn end_of_second(second: u64) -> Hlc {
    let wall_ms = second.saturating_mul(1000).saturating_add(999).min(super::clock::WALL_MS_MAX);
    Hlc { counter: u16::MAX, ..Hlc::at(wall_ms, Device(u64::MAX)) }
}

fn messages<'d>(drafts: &[&'d Draft]) -> Vec<(&'d Draft, &'d MessageDraft)> {
    let messages = drafts.iter().filter_map(|draft| match &draft.op {
        Op::Message(message) => Some((*draft, message)),
        _ => None,
    });
    messages.collect()
}
